use super::*;
use crate::Sym;
use crate::dtype::DType;
use crate::tile::{Access, Builder};

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn floats(x: &[u8]) -> Vec<f32> {
    x.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect()
}

fn one_each(n: usize) -> Vec<Binding> {
    (0..n).map(|buffer| Binding { buffer, offset: 0 }).collect()
}

/// One block: loads each input tile whole and stores what `body` makes of them, as f32.
fn eval(inputs: &[(&[u32], &[f32])], body: impl FnOnce(&mut Builder, &[ValueId]) -> ValueId) -> Vec<f32> {
    let mut b = Builder::new("test");
    let views: Vec<ValueId> = inputs
        .iter()
        .enumerate()
        .map(|(i, (shape, _))| {
            let shape: Vec<_> = shape.iter().map(|&n| n.into()).collect();
            b.param(&format!("x{i}"), DType::F32, &shape, Access::Read)
        })
        .collect();
    b.grid(1, 1);
    let load = |b: &mut Builder, (v, i): (&ValueId, &(&[u32], &[f32]))| b.load(*v, &vec![0.into(); i.0.len()], i.0);
    let tiles: Vec<ValueId> = views.iter().zip(inputs).map(|pair| load(&mut b, pair)).collect();
    let out = body(&mut b, &tiles);
    let out = match b.dtype(out) {
        DType::Bool => b.map(&[out], |m, v| {
            let (one, zero) = (m.f32(1.0), m.f32(0.0));
            m.select(v[0], one, zero)
        }),
        _ => b.cast(out, DType::F32),
    };
    let shape = b.shape(out);
    let extents: Vec<_> = shape.iter().map(|&n| n.into()).collect();
    let y = b.param("y", DType::F32, &extents, Access::Write);
    b.store(y, &vec![0.into(); shape.len()], out);
    let mut buffers: Vec<Vec<u8>> = inputs.iter().map(|(_, x)| bytes(x)).collect();
    buffers.push(vec![0; elements(&shape) * 4]);
    let n = buffers.len();
    run(&b.finish().unwrap(), &SymValues::default(), &mut buffers, &one_each(n)).unwrap();
    floats(&buffers[n - 1])
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

#[test]
fn map_broadcasts_scalars_and_unit_axes() {
    let out = eval(&[(&[2, 1], &[10., 20.]), (&[1, 3], &[1., 2., 3.])], |b, v| {
        let s = b.full(100.0, &[]);
        b.map(&[v[0], v[1], s], |m, v| {
            let t = m.add(v[0], v[1]);
            m.add(t, v[2])
        })
    });
    assert_eq!(out, [111., 112., 113., 121., 122., 123.]);
}

#[test]
fn arithmetic_on_edges() {
    let nan = f32::NAN;
    let x: (&[u32], &[f32]) = (&[4], &[1.0, nan, -2.5, f32::NEG_INFINITY]);
    let y: (&[u32], &[f32]) = (&[4], &[nan, 1.0, 0.5, 3.0]);
    let max = eval(&[x, y], |b, v| b.map(v, |m, v| m.max(v[0], v[1])));
    assert!(max[0].is_nan() && max[1].is_nan());
    assert_eq!(max[2..], [0.5, 3.0]);
    let less = eval(&[x, y], |b, v| b.map(v, |m, v| m.lt(v[0], v[1])));
    assert_eq!(less, [0., 0., 1., 1.]);
    let exp = eval(&[x], |b, v| b.map(v, |m, v| m.exp2(v[0])));
    assert_eq!((exp[0], exp[3]), (2.0, 0.0));
    let int = eval(&[x], |b, v| {
        b.map(v, |m, v| {
            let (i, two) = (m.cast(v[0], DType::I32), m.i32(2));
            let q = m.div(i, two);
            m.cast(q, DType::F32)
        })
    });
    assert_eq!(int, [0., 0., -1., (i32::MIN / 2) as f32]);
}

#[test]
fn integers_wrap_and_shift() {
    let out = eval(&[(&[1], &[0.0])], |b, _| {
        let x = b.full_i32(i32::MAX, &[1]);
        b.map(&[x], |m, v| {
            let one = m.i32(1);
            let wrapped = m.add(v[0], one);
            let n = m.i32(28);
            m.shr(wrapped, n)
        })
    });
    assert_eq!(out, [8.0]);
}

#[test]
fn casts_round_to_nearest_even() {
    let x: (&[u32], &[f32]) = (&[3], &[257.0 / 256.0, 1000.0, 0.3]);
    let through = |to| eval(&[x], move |b, v| b.cast(v[0], to));
    assert_eq!(through(DType::E4m3), [1.0, 448.0, 0.312_5]);
    assert_eq!(through(DType::Bf16)[0], 1.0);
    assert_eq!(through(DType::F16)[0], 257.0 / 256.0);
}

#[test]
fn reductions_and_scans() {
    let x: (&[u32], &[f32]) = (&[2, 3], &[1., 2., 3., -4., f32::NAN, 6.]);
    assert_eq!(eval(&[x], |b, v| b.reduce(v[0], 1, ReduceKind::Sum))[0], 6.0);
    let max = eval(&[x], |b, v| b.reduce(v[0], 0, ReduceKind::Max));
    assert_eq!((max[0], max[1].is_nan(), max[2]), (1.0, true, 6.0));
    assert_eq!(eval(&[x], |b, v| b.scan(v[0], 1, ReduceKind::Sum))[..3], [1., 3., 6.]);
    let down = eval(&[x], |b, v| b.scan(v[0], 0, ReduceKind::Sum));
    assert_eq!((down[3], down[4].is_nan(), down[5]), (-3.0, true, 9.0));
}

#[test]
fn a_sum_is_rounded_once() {
    let x: (&[u32], &[f32]) = (&[1, 4], &[1e8, 1.0, -1e8, 1.0]);
    assert_eq!(eval(&[x], |b, v| b.reduce(v[0], 1, ReduceKind::Sum)), [2.0]);
    let ones: (&[u32], &[f32]) = (&[1, 4], &[1.0; 4]);
    assert_eq!(eval(&[x, ones], |b, v| b.dot_t(v[0], v[1], None)), [2.0]);
}

#[test]
fn dots() {
    let (a, b) = (ramp(6), ramp(12));
    let plain = eval(&[(&[2, 3], &a), (&[3, 4], &b)], |b, v| b.dot(v[0], v[1], None));
    assert_eq!(plain, [20., 23., 26., 29., 56., 68., 80., 92.]);
    let transposed = eval(&[(&[2, 3], &a), (&[3, 4], &b)], |b, v| {
        let (t, acc) = (b.permute(v[1], &[1, 0]), b.full(1.0, &[2, 4]));
        let t = b.cast(t, DType::Bf16);
        b.dot_t(v[0], t, Some(acc))
    });
    assert_eq!(transposed, [21., 24., 27., 30., 57., 69., 81., 93.]);
}

#[test]
fn shapes_move_elements() {
    let x = ramp(6);
    let x: (&[u32], &[f32]) = (&[2, 3], &x);
    assert_eq!(eval(&[x], |b, v| b.permute(v[0], &[1, 0])), [0., 3., 1., 4., 2., 5.]);
    assert_eq!(eval(&[x], |b, v| b.slice(v[0], &[0, 1], &[2, 2])), [1., 2., 4., 5.]);
    assert_eq!(eval(&[x], |b, v| b.reshape(v[0], &[3, 2])), ramp(6));
    assert_eq!(eval(&[x], |b, _| b.iota(1, &[2, 3])), [0., 1., 2., 0., 1., 2.]);
    let joined = eval(&[x], |b, v| {
        let column = b.slice(v[0], &[0, 0], &[2, 1]);
        b.concat(&[column, v[0]], 1)
    });
    assert_eq!(joined, [0., 0., 1., 2., 3., 3., 4., 5.]);
}

#[test]
fn topk_keeps_the_largest_and_lowest_numbers() {
    let x: (&[u32], &[f32]) = (&[1, 8], &[3., f32::NAN, 7., 3., f32::NEG_INFINITY, 3., -0.0, 0.0]);
    let numbers = |k: u32, step: u32| {
        eval(&[x], |b, v| {
            let mut state = b.topk_init(1, k);
            for at in (0..8).step_by(step as usize) {
                let (part, base) = (b.slice(v[0], &[0, at], &[1, step]), b.full_i32(at as i32, &[]));
                state = b.topk_push(state, part, base);
            }
            b.topk_take(state).1
        })
    };
    for step in [1, 2, 8] {
        assert_eq!(numbers(1, step), [2.]);
        assert_eq!(numbers(3, step), [0., 2., 3.]);
        assert_eq!(numbers(5, step), [0., 2., 3., 5., 6.], "the zeros are equal: the lower number wins");
        assert_eq!(numbers(8, step), [0., 2., 3., 5., 6., 7., -1., -1.]);
    }
}

#[test]
fn topk_contract_and_loops() {
    let mut b = Builder::new("streaming");
    let x = b.param("x", DType::F32, &[1.into(), Sym::C.into()], Access::Read);
    let y = b.param("y", DType::I32, &[1.into(), 2.into()], Access::Write);
    b.grid(1, 1);
    let (state, n) = (b.topk_init(1, 2), b.sym(Sym::C));
    let state = b.for_(0, n, 4, &[state], |b, i, carried| {
        let (tile, index) = (b.load(x, &[0.into(), i.into()], &[1, 4]), b.iota(1, &[1, 4]));
        let masked = b.map(&[tile, index, i, n], |m, v| {
            let (at, low) = (m.add(v[1], v[2]), m.f32(f32::NEG_INFINITY));
            let inside = m.lt(at, v[3]);
            m.select(inside, v[0], low)
        });
        vec![b.topk_push(carried[0], masked, i)]
    })[0];
    let (_, numbers) = b.topk_take(state);
    b.store(y, &[0.into(), 0.into()], numbers);
    let program = b.finish().unwrap();
    let mut buffers = [bytes(&[-5., -1., -2., -9., -3., -1.]), vec![0; 8]];
    run(&program, &SymValues::default().with(Sym::C, 6), &mut buffers, &one_each(2)).unwrap();
    assert_eq!(buffers[1], [1, 0, 0, 0, 5, 0, 0, 0]);

    let mut b = Builder::new("descending");
    b.grid(1, 1);
    let (state, values) = (b.topk_init(1, 2), b.full(0.0, &[1, 4]));
    let (four, zero) = (b.full_i32(4, &[]), b.full_i32(0, &[]));
    let state = b.topk_push(state, values, four);
    let state = b.topk_push(state, values, zero);
    b.topk_take(state);
    let error = run(&b.finish().unwrap(), &SymValues::default(), &mut [], &[]).unwrap_err();
    assert!(matches!(error, InterpError::Contract { .. }), "{error}");
}

/// `y[rows] = x[rows]` with rows from memory, one block for each two rows; C elements in x.
fn copy_rows() -> Program {
    let mut b = Builder::new("copy_rows");
    let x = b.param("x", DType::F32, &[Sym::C.into(), 2.into()], Access::Read);
    let r = b.param("rows", DType::I32, &[Sym::T.into()], Access::Read);
    let y = b.param("y", DType::F32, &[Sym::C.into(), 2.into()], Access::Write);
    let block = b.grid(Sym::T, 2);
    let start = b.map(&[block], |m, v| {
        let two = m.i32(2);
        m.mul(v[0], two)
    });
    let rows = b.load(r, &[start.into()], &[2]);
    let tile = b.gather(x, rows, &[0.into()], &[2, 2]);
    b.scatter(y, rows, &[0.into()], tile);
    b.finish().unwrap()
}

fn ints(x: &[i32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn gather_and_scatter_mask_rows_outside() {
    let syms = SymValues::default().with(Sym::C, 3).with(Sym::T, 4);
    let mut buffers = [bytes(&ramp(6)), ints(&[2, -1, 3, 1]), vec![0; 24]];
    run(&copy_rows(), &syms, &mut buffers, &one_each(3)).unwrap();
    assert_eq!(floats(&buffers[2]), [0., 0., 2., 3., 4., 5.]);
}

#[test]
fn races_are_found() {
    let program = copy_rows();
    let syms = SymValues::default().with(Sym::C, 3).with(Sym::T, 4);
    let check = |rows: &[i32; 4], bindings: &[Binding]| {
        let mut buffers = [bytes(&ramp(6)), ints(rows), vec![0; 24]];
        run_blocks(&program, &syms, &mut buffers, bindings, 0..2, Options { check_races: true })
    };
    assert_eq!(check(&[0, 7, 1, 2], &one_each(3)), Ok(()));
    for rows in [[0, 0, 1, 2], [0, 1, 2, 1]] {
        assert!(matches!(check(&rows, &one_each(3)), Err(InterpError::Race { .. })), "{rows:?}");
    }
    // In place: each block reads only what it writes; shifted by a row it reads what the other writes.
    let at = |buffer, offset| Binding { buffer, offset };
    assert_eq!(check(&[0, 7, 1, 2], &[at(0, 0), at(1, 0), at(0, 0)]), Ok(()));
    let shifted = check(&[0, 7, 1, 9], &[at(0, 8), at(1, 0), at(0, 0)]);
    assert!(matches!(shifted, Err(InterpError::Race { .. })), "{shifted:?}");
}

#[test]
fn leaving_the_buffer_is_an_error_and_leaving_the_view_is_not() {
    let mut b = Builder::new("shift");
    let x = b.param("x", DType::F32, &[4.into()], Access::Read);
    let y = b.param("y", DType::F32, &[4.into()], Access::Write);
    b.grid(1, 1);
    let tile = b.load(x, &[(-2).into()], &[5]);
    b.store(y, &[1.into()], tile);
    let program = b.finish().unwrap();
    let mut buffers = [bytes(&[1., 2., 3., 4.]), bytes(&[9.; 4])];
    run(&program, &SymValues::default(), &mut buffers, &one_each(2)).unwrap();
    assert_eq!(floats(&buffers[1]), [9., 0., 0., 1.]);
    let error = run(&program, &SymValues::default(), &mut [vec![0; 16], vec![0; 10]], &one_each(2)).unwrap_err();
    assert_eq!(error.to_string(), "kernel shift: %y[2] is at byte 8 of a buffer of 10 bytes");
}

#[test]
fn branches_and_carried_values() {
    for (n, want) in [(0, 5.0), (3, 8.0), (10, 0.0)] {
        let out = eval(&[(&[1], &[5.0])], |b, v| {
            let sum = b.for_(0, n, 1, &[v[0]], |b, _, carried| {
                let one = b.full(1.0, &[1]);
                vec![b.map(&[carried[0], one], |m, v| m.add(v[0], v[1]))]
            })[0];
            let scalar = b.reshape(sum, &[]);
            let small = b.map(&[scalar], |m, v| {
                let ten = m.f32(10.0);
                m.lt(v[0], ten)
            });
            b.if_(small, |_| vec![sum], |b| vec![b.full(0.0, &[1])])[0]
        });
        assert_eq!(out, [want]);
    }
}
