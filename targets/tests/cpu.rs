//! The CPU target against the interpreter: every operation, on random data with ragged edges.

mod support;

use dsc_ir::extent::{Extent, Sym};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::interp::{self, Binding};
use dsc_ir::tile::{Access, Builder, Index, MapBuilder, MapVal, Program, ReduceKind, Stride, ValueId, ViewType};
use dsc_ir::{DType, SymValues};
use dsc_targets::cpu::{CpuTarget, Level};
use dsc_targets::{Kernel, Target};
use support::Mapped;

/// A small generator of random numbers (splitmix64), so that failures repeat.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Random memory of an element type: moderate floats, small integers.
fn random(rng: &mut Rng, dtype: DType, elements: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..elements {
        match dtype {
            DType::F32 => out.extend((rng.float() * 2.0).to_le_bytes()),
            DType::I32 => out.extend((rng.below(41) as i32 - 20).to_le_bytes()),
            DType::Bf16 => out.extend(&((rng.float() * 2.0).to_bits() >> 16).to_le_bytes()[..2]),
            DType::F16 => out.extend(half_bits(rng.float() * 2.0).to_le_bytes()),
            DType::E4m3 => out.push(dsc_ir::dtype::f32_to_e4m3(rng.float() * 4.0)),
            DType::Bool => unreachable!("truth values are never in memory"),
        }
    }
    out
}

/// A normal f16 near `x`.
fn half_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let exponent = ((bits >> 23) & 255) as i32 - 112;
    if exponent <= 0 {
        0
    } else {
        ((bits >> 16) & 0x8000) as u16 | (exponent as u16) << 10 | ((bits >> 13) & 0x3ff) as u16
    }
}

fn extents(program: &Program, syms: &SymValues) -> Vec<usize> {
    let bytes = |v: &ViewType| {
        let last: i64 = v
            .shape
            .iter()
            .zip(&v.strides)
            .map(|(n, s)| (n.eval(syms) as i64 - 1).max(0) * s.bytes * s.sym.map_or(1, |s| i64::from(syms.get(s))))
            .sum();
        v.offset as usize + last as usize + v.dtype.bytes()
    };
    program.params.iter().map(|p| bytes(program.view(p.value).expect("parameters are views"))).collect()
}

fn compile(level: Level, program: &Program) -> Mapped {
    let diagnostics = dsc_ir::tile::verify(program);
    assert!(diagnostics.is_empty(), "{diagnostics:?}");
    let target = CpuTarget::new(level).with_asm(std::env::var_os("DSC_ASM").is_some());
    let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
    let module = target.compile(&[kernel]).unwrap_or_else(|e| panic!("{e}"));
    if let Some(asm) = &module.asm {
        eprintln!("{asm}");
        std::fs::write(std::env::temp_dir().join("dsc-module.bin"), &module.code).unwrap();
    }
    Mapped::new(module)
}

fn levels() -> Vec<Level> {
    match Level::host() {
        Some(Level::V4) => vec![Level::V4, Level::V3],
        Some(level) => vec![level],
        None => vec![],
    }
}

/// Runs a program on both and compares all buffers, each read with the element type of its parameter's view.
fn check_with(program: &Program, syms: SymValues, buffers: Vec<Vec<u8>>, bindings: &[Binding], tolerance: f32) {
    let mut expected = buffers.clone();
    interp::run(program, &syms, &mut expected, bindings).unwrap_or_else(|e| panic!("{e}"));
    for level in levels() {
        let mapped = compile(level, program);
        // Guards on both sides catch accesses outside.
        const GUARD: usize = 256;
        let mut actual: Vec<Vec<u8>> =
            buffers.iter().map(|b| [vec![0x5a; GUARD], b.clone(), vec![0x5a; GUARD]].concat()).collect();
        let args: Vec<*mut u8> = bindings.iter().map(|b| actual[b.buffer][GUARD + b.offset..].as_mut_ptr()).collect();
        let blocks = interp::block_count(program, &syms).unwrap();
        // Two calls, so that ranges that do not start at zero are covered.
        mapped.call(0, &args, &syms, blocks / 2, blocks);
        mapped.call(0, &args, &syms, 0, blocks / 2);
        for (i, b) in actual.iter().enumerate() {
            let guards = b[..GUARD].iter().chain(&b[b.len() - GUARD..]);
            assert!(guards.into_iter().all(|&x| x == 0x5a), "buffer {i} was written outside");
        }
        for (p, binding) in program.params.iter().zip(bindings) {
            let dtype = program.view(p.value).unwrap().dtype;
            let got = &actual[binding.buffer][GUARD..actual[binding.buffer].len() - GUARD];
            compare(&p.name, dtype, got, &expected[binding.buffer], tolerance, level);
        }
    }
}

fn compare(name: &str, dtype: DType, got: &[u8], want: &[u8], tolerance: f32, level: Level) {
    let decode = |b: &[u8], i: usize| -> f32 {
        match dtype {
            DType::F32 => f32::from_le_bytes(b[i * 4..i * 4 + 4].try_into().unwrap()),
            DType::I32 => i32::from_le_bytes(b[i * 4..i * 4 + 4].try_into().unwrap()) as f32,
            DType::Bf16 => f32::from_bits(u32::from(u16::from_le_bytes(b[i * 2..i * 2 + 2].try_into().unwrap())) << 16),
            DType::F16 => f32::from(u16::from_le_bytes(b[i * 2..i * 2 + 2].try_into().unwrap())),
            DType::E4m3 => dsc_ir::dtype::e4m3_to_f32(b[i]),
            DType::Bool => unreachable!(),
        }
    };
    // A rounding that falls on the other side moves a storage type by one unit.
    let tolerance = match dtype {
        DType::Bf16 => tolerance.max(if tolerance > 0.0 { 1.0 / 128.0 } else { 0.0 }),
        DType::E4m3 => tolerance.max(if tolerance > 0.0 { 1.0 / 8.0 } else { 0.0 }),
        DType::F16 => tolerance.max(if tolerance > 0.0 { 1.0 / 256.0 } else { 0.0 }),
        _ => tolerance,
    };
    for i in 0..want.len() / dtype.bytes() {
        let (g, w) = (decode(got, i), decode(want, i));
        let same = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= tolerance * w.abs().max(1.0);
        assert!(same, "{level:?}: {name}[{i}] is {g}, expected {w}");
    }
}

/// [`check_with`] random buffers, one a parameter.
fn check(program: &Program, syms: SymValues, seed: u64) {
    let mut rng = Rng(seed);
    let buffers = extents(program, &syms)
        .into_iter()
        .zip(&program.params)
        .map(|(bytes, p)| {
            let dtype = program.view(p.value).unwrap().dtype;
            random(&mut rng, dtype, bytes.div_ceil(dtype.bytes()))
        })
        .collect();
    let bindings: Vec<Binding> = (0..program.params.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    check_with(program, syms, buffers, &bindings, 1e-5);
}

fn t(n: u32) -> SymValues {
    SymValues::default().with(Sym::T, n).with(Sym::C, 3)
}

fn c(n: u32) -> Extent {
    n.into()
}

/// `y[T, ..] = f(x[T, ..])` for a block of `rows` rows.
fn rowwise(
    rows: u32,
    cols: u32,
    out_cols: u32,
    from: DType,
    to: DType,
    f: impl FnOnce(&mut Builder, ValueId) -> ValueId,
) -> Program {
    let mut b = Builder::new("rowwise");
    let x = b.param("x", from, &[Sym::T.into(), c(cols)], Access::Read);
    let y = b.param("y", to, &[Sym::T.into(), c(out_cols)], Access::Write);
    let block = b.grid(Sym::T, rows);
    let row = b.map(&[block], |m, v| {
        let r = m.i32(rows as i32);
        m.mul(v[0], r)
    });
    let tile = b.load(x, &[row.into(), 0.into()], &[rows, cols]);
    let out = f(&mut b, tile);
    b.store(y, &[row.into(), 0.into()], out);
    b.finish().unwrap()
}

#[test]
fn elementwise_chain_with_ragged_rows() {
    for (rows, cols) in [(4, 17), (1, 64), (3, 5), (8, 1), (5, 130), (2, 4)] {
        let p = rowwise(rows, cols, cols, DType::F32, DType::F32, |b, x| {
            let y = b.map(&[x], |m, v| {
                let s = m.sigmoid(v[0]);
                m.mul(v[0], s)
            });
            b.map(&[y, x], |m, v| {
                let half = m.f32(0.5);
                m.fma(v[0], v[1], half)
            })
        });
        for n in [0, 1, 7, 8, 9] {
            check(&p, t(n), 1);
        }
    }
}

/// Every scalar operation on rows of special values.
#[test]
fn scalar_operations() {
    type F = fn(&mut MapBuilder, MapVal, MapVal) -> MapVal;
    let float: Vec<(&str, F)> = vec![
        ("add", |m, a, b| m.add(a, b)),
        ("sub", |m, a, b| m.sub(a, b)),
        ("mul", |m, a, b| m.mul(a, b)),
        ("div", |m, a, b| m.div(a, b)),
        ("min", |m, a, b| m.min(a, b)),
        ("max", |m, a, b| m.max(a, b)),
        ("fma", |m, a, b| m.fma(a, b, a)),
        ("neg", |m, a, _| m.neg(a)),
        ("abs", |m, a, _| m.abs(a)),
        ("sqrt", |m, a, _| m.sqrt(a)),
        ("exp2", |m, a, _| m.exp2(a)),
        ("select lt", |m, a, b| {
            let c = m.lt(a, b);
            m.select(c, a, b)
        }),
        ("select le or eq", |m, a, b| {
            let (c, d) = (m.le(a, b), m.eq(a, a));
            let e = m.and(c, d);
            let f = m.or(e, c);
            m.select(f, b, a)
        }),
        ("i32 and back", |m, a, _| {
            let i = m.cast(a, DType::I32);
            m.cast(i, DType::F32)
        }),
        ("bits", |m, a, _| {
            let i = m.bitcast(a, DType::I32);
            let (one, mask) = (m.i32(9), m.i32(0x7fff_ffff));
            let s = m.shr(i, one);
            let t = m.shl(s, one);
            let u = m.and(t, mask);
            m.bitcast(u, DType::F32)
        }),
        ("bf16", |m, a, _| {
            let x = m.cast(a, DType::Bf16);
            m.cast(x, DType::F32)
        }),
        ("f16", |m, a, _| {
            let x = m.cast(a, DType::F16);
            m.cast(x, DType::F32)
        }),
        ("e4m3", |m, a, _| {
            let x = m.cast(a, DType::E4m3);
            m.cast(x, DType::F32)
        }),
    ];
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        3e38,
        -3e38,
        1e-30,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        65504.0,
        65520.0,
        65519.0,
        448.0,
        464.0,
        465.0,
        1e9,
        127.99,
        128.0,
        -126.0,
        -125.5,
        6e-5,
        6.1e-5,
        3e-8,
        2.9e-8,
        1e-3,
        -2e-3,
        0.3,
        300.7,
        -300.7,
        2_147_483_648.0,
        -2_147_483_648.0,
        2_147_483_500.0,
        8.5,
        9.5,
    ];
    let n = special.len() as u32;
    let mut values = Vec::new();
    for s in special {
        values.extend((0..n).flat_map(|_| f32::to_le_bytes(s)));
    }
    let other: Vec<u8> = special.iter().cycle().take((n * n) as usize).flat_map(|x| x.to_le_bytes()).collect();
    for (name, f) in float {
        for cols in [n, 1] {
            let mut b = Builder::new("scalar_op");
            let rows = n * n / cols;
            let x = b.param("x", DType::F32, &[c(rows), c(cols)], Access::Read);
            let z = b.param("z", DType::F32, &[c(rows), c(cols)], Access::Read);
            let y = b.param(&name.replace(" ", "_"), DType::F32, &[c(rows), c(cols)], Access::Write);
            let row = b.grid(rows, 1);
            let at = [row.into(), Index::Const(0)];
            let (a, d) = (b.load(x, &at, &[1, cols]), b.load(z, &at, &[1, cols]));
            let out = b.map(&[a, d], |m, v| f(m, v[0], v[1]));
            b.store(y, &at, out);
            let p = b.finish().unwrap();
            let buffers = vec![values.clone(), other.clone(), vec![0; values.len()]];
            let bindings = [0, 1, 2].map(|buffer| Binding { buffer, offset: 0 });
            check_with(&p, SymValues::default(), buffers, &bindings, 3e-7);
        }
    }
}

#[test]
fn integer_operations() {
    let body = |m: &mut MapBuilder, v: &[MapVal]| {
        let (seven, eight) = (m.i32(7), m.i32(8));
        let (q, r) = (m.div(v[0], seven), m.rem(v[0], seven));
        let (q8, r8) = (m.div(v[0], eight), m.rem(v[0], eight));
        let (lo, hi) = (m.min(q, r), m.max(q8, r8));
        let n = m.neg(lo);
        let p = m.mul(n, hi);
        let (s, o) = (m.shl(p, seven), m.or(r, q8));
        let a = m.add(s, o);
        let c = m.lt(a, v[0]);
        let d = m.sub(a, v[0]);
        m.select(c, d, a)
    };
    for cols in [1, 3, 4, 37] {
        let p = rowwise(2, cols, cols, DType::I32, DType::I32, |b, x| b.map(&[x], body));
        check(&p, t(5), 2);
    }
}

#[test]
fn conversions_of_every_code() {
    for (from, bytes) in [(DType::E4m3, 1), (DType::Bf16, 2), (DType::F16, 2)] {
        let n = 1u32 << (8 * bytes);
        let codes: Vec<u8> = (0..n).flat_map(|i| i.to_le_bytes()[..bytes].to_vec()).collect();
        let mut b = Builder::new("decode");
        let x = b.param("x", from, &[c(n / 64), c(64)], Access::Read);
        let y = b.param("y", DType::F32, &[c(n / 64), c(64)], Access::Write);
        let z = b.param("z", from, &[c(n / 64), c(64)], Access::Write);
        let row = b.grid(n / 64, 1);
        let at = [row.into(), Index::Const(0)];
        let codes_tile = b.load(x, &at, &[1, 64]);
        let decoded = b.cast(codes_tile, DType::F32);
        b.store(y, &at, decoded);
        let encoded = b.cast(decoded, from);
        b.store(z, &at, encoded);
        let p = b.finish().unwrap();
        let buffers = vec![codes.clone(), vec![0; n as usize * 4], vec![0; codes.len()]];
        let bindings = [0, 1, 2].map(|buffer| Binding { buffer, offset: 0 });
        check_with(&p, SymValues::default(), buffers, &bindings, 0.0);
    }
}

#[test]
fn encoding_rounds_like_the_reference() {
    let mut rng = Rng(77);
    let mut values: Vec<f32> = Vec::new();
    for code in 0..=0x7eu8 {
        let (a, b) = (dsc_ir::dtype::e4m3_to_f32(code), dsc_ir::dtype::e4m3_to_f32((code + 1).min(0x7e)));
        let mid = (a + b) / 2.0;
        values.extend([a, mid, -mid, f32::from_bits(mid.to_bits() + 1), f32::from_bits(mid.to_bits().max(1) - 1)]);
    }
    values.extend((0..4096).map(|_| f32::from_bits(rng.next() as u32)));
    values.resize(values.len().next_multiple_of(64), 0.0);
    let rows = values.len() as u32 / 64;
    let x: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    for to in [DType::E4m3, DType::Bf16, DType::F16] {
        let p = rowwise(1, 64, 64, DType::F32, to, |b, x| b.cast(x, to));
        let buffers = vec![x.clone(), vec![0; values.len() * to.bytes()]];
        let bindings = [0, 1].map(|buffer| Binding { buffer, offset: 0 });
        check_with(&p, t(rows), buffers, &bindings, 0.0);
    }
}

#[test]
fn reductions_and_scans() {
    for kind in [ReduceKind::Sum, ReduceKind::Max] {
        for dtype in [DType::F32, DType::I32] {
            for shape in [[1, 1, 50], [3, 7, 19], [4, 16, 1], [2, 1, 4], [2, 33, 8]] {
                for axis in 0..3u32 {
                    let mut b = Builder::new("reduce");
                    let dims = shape.map(c);
                    let mut out = shape;
                    out[axis as usize] = 1;
                    let x = b.param("x", dtype, &dims, Access::Read);
                    let y = b.param("y", dtype, &out.map(c), Access::Write);
                    let z = b.param("z", dtype, &dims, Access::Write);
                    let at: [Index; 3] = [0.into(), 0.into(), 0.into()];
                    b.grid(1, 1);
                    let tile = b.load(x, &at, &shape);
                    let doubled = b.map(&[tile], |m, v| m.add(v[0], v[0]));
                    let r = b.reduce(doubled, axis, kind);
                    b.store(y, &at, r);
                    let s = b.scan(tile, axis, kind);
                    b.store(z, &at, s);
                    check(&b.finish().unwrap(), SymValues::default(), 3);
                }
            }
        }
    }
}

#[test]
fn softmax_and_broadcasts() {
    let p = rowwise(3, 21, 21, DType::F32, DType::F32, |b, x| {
        let top = b.reduce(x, 1, ReduceKind::Max);
        let e = b.map(&[x, top], |m, v| {
            let d = m.sub(v[0], v[1]);
            m.exp2(d)
        });
        let sum = b.reduce(e, 1, ReduceKind::Sum);
        let cols = b.iota(1, &[1, 21]);
        let cols = b.cast(cols, DType::F32);
        b.map(&[e, sum, cols], |m, v| {
            let q = m.div(v[0], v[1]);
            m.add(q, v[2])
        })
    });
    check(&p, t(7), 4);
}

#[test]
fn reshape_permute_slice_concat() {
    let p = rowwise(4, 24, 36, DType::F32, DType::F32, |b, x| {
        let pairs = b.reshape(x, &[4, 12, 2]);
        let even = b.slice(pairs, &[0, 0, 0], &[4, 12, 1]);
        let odd = b.slice(pairs, &[0, 0, 1], &[4, 12, 1]);
        let rotated = b.map(&[odd], |m, v| m.neg(v[0]));
        let swapped = b.concat(&[rotated, even], 2);
        let flat = b.reshape(swapped, &[4, 24]);
        let turned = b.permute(flat, &[1, 0]);
        let doubled = b.map(&[turned], |m, v| m.add(v[0], v[0]));
        let back = b.permute(doubled, &[1, 0]);
        let part = b.slice(x, &[0, 5], &[4, 12]);
        b.concat(&[back, part], 1)
    });
    for n in [1, 4, 6] {
        check(&p, t(n), 5);
    }
}

/// `y = x wᵀ` or `x w`, over blocks of rows and columns, summed along k in steps.
fn matmul(m: u32, n: u32, k: u32, (tm, tn, tk): (u32, u32, u32), w_type: DType, trans: bool) -> Program {
    let mut b = Builder::new("matmul");
    let x = b.param("x", DType::F32, &[Sym::T.into(), c(k)], Access::Read);
    let w_shape = if trans { [c(n), c(k)] } else { [c(k), c(n)] };
    let w = b.param("w", w_type, &w_shape, Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), c(n)], Access::Write);
    let (bn, bm) = (b.grid(n, tn), b.grid(Sym::T, tm));
    let scale = |b: &mut Builder, v: ValueId, by: u32| {
        b.map(&[v], |m, v| {
            let r = m.i32(by as i32);
            m.mul(v[0], r)
        })
    };
    let (row, col) = (scale(&mut b, bm, tm), scale(&mut b, bn, tn));
    let zero = b.full(0.0, &[tm, tn]);
    let acc = b.for_(0, k, tk, &[zero], |b, i, acc| {
        let a = b.load(x, &[row.into(), i.into()], &[tm, tk]);
        if trans {
            let w = b.load(w, &[col.into(), i.into()], &[tn, tk]);
            vec![b.dot_t(a, w, Some(acc[0]))]
        } else {
            let w = b.load(w, &[i.into(), col.into()], &[tk, tn]);
            vec![b.dot(a, w, Some(acc[0]))]
        }
    });
    b.store(y, &[row.into(), col.into()], acc[0]);
    let _ = m;
    b.finish().unwrap()
}

#[test]
fn dots_of_many_sizes() {
    for trans in [true, false] {
        for w_type in [DType::F32, DType::Bf16, DType::F16, DType::E4m3] {
            for (m, n, k, tile) in [
                (1, 40, 64, (1, 16, 32)),
                (1, 9, 37, (1, 9, 37)),
                (2, 33, 48, (2, 13, 16)),
                (3, 17, 40, (3, 17, 20)),
                (5, 31, 70, (5, 31, 35)),
                (11, 65, 33, (11, 40, 33)),
                (13, 47, 65, (13, 47, 65)),
                (16, 64, 64, (16, 64, 64)),
                (40, 70, 36, (33, 33, 18)),
                (25, 20, 5, (64, 20, 5)),
                (2, 3, 1, (2, 3, 1)),
                (1, 1, 8, (1, 1, 8)),
            ] {
                check(&matmul(m, n, k, tile, w_type, trans), t(m), 6);
            }
        }
    }
}

#[test]
fn gather_and_scatter() {
    for dtype in [DType::F32, DType::Bf16, DType::E4m3, DType::I32] {
        let mut b = Builder::new("gather");
        let x = b.param("x", dtype, &[c(20), c(3), c(9)], Access::Read);
        let rows = b.param("rows", DType::I32, &[c(12)], Access::Read);
        let y = b.param("y", dtype, &[c(12), c(3), c(7)], Access::Write);
        let z = b.param("z", dtype, &[c(40), c(3), c(7)], Access::Write);
        b.grid(1, 1);
        let r = b.load(rows, &[0.into()], &[12]);
        let got = b.gather(x, r, &[0.into(), 4.into()], &[12, 3, 7]);
        b.store(y, &[0.into(), 0.into(), 0.into()], got);
        let places = b.iota(0, &[12]);
        let places = b.map(&[places], |m, v| {
            let (three, back) = (m.i32(5), m.i32(-7));
            m.fma_i32(v[0], three, back)
        });
        b.scatter(z, places, &[1.into(), (-2).into()], got);
        check(&b.finish().unwrap(), SymValues::default(), 7);
    }
}

/// Integer `a * b + c`, for tests.
trait FmaI32 {
    fn fma_i32(&mut self, a: MapVal, b: MapVal, c: MapVal) -> MapVal;
}
impl FmaI32 for MapBuilder {
    fn fma_i32(&mut self, a: MapVal, b: MapVal, c: MapVal) -> MapVal {
        let p = self.mul(a, b);
        self.add(p, c)
    }
}

#[test]
fn negative_and_far_indices_are_masked() {
    let mut b = Builder::new("masked");
    let x = b.param("x", DType::F32, &[Sym::T.into(), c(10), c(6)], Access::Read);
    let i = b.param("i", DType::I32, &[c(3)], Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), c(10), c(6)], Access::Write);
    b.grid(1, 1);
    let ix: Vec<Index> = (0..3).map(|d| b.load_scalar(i, &[Index::Const(d)]).into()).collect();
    let tile = b.load(x, &ix, &[4, 5, 3]);
    let more = b.map(&[tile], |m, v| {
        let one = m.f32(1.0);
        m.add(v[0], one)
    });
    b.store(y, &ix, more);
    let p = b.finish().unwrap();
    let mut rng = Rng(8);
    for at in
        [[0, 0, 0], [-1, -2, -1], [3, 8, 5], [-4, 0, 0], [0, 100, 0], [i32::MIN, 0, 0], [i32::MAX, 1, 2], [2, -1, 4]]
    {
        for n in [0, 5] {
            let bytes = n as usize * 240;
            let index: Vec<u8> = at.iter().flat_map(|v: &i32| v.to_le_bytes()).collect();
            let buffers = vec![random(&mut rng, DType::F32, bytes / 4), index, random(&mut rng, DType::F32, bytes / 4)];
            let bindings = [0, 1, 2].map(|buffer| Binding { buffer, offset: 0 });
            check_with(&p, t(n), buffers, &bindings, 0.0);
        }
    }
}

#[test]
fn views_with_strides_and_offsets() {
    let mut b = Builder::new("strided");
    let stride = |bytes, sym| Stride { bytes, sym };
    let view = |dtype, strides: [Stride; 2], offset| ViewType {
        dtype,
        shape: vec![c(6), c(5)],
        strides: strides.to_vec(),
        offset,
    };
    let x = b.param_view("x", view(DType::F32, [stride(4, None), stride(24, None)], 8), Access::Read);
    let y = b.param_view("y", view(DType::F32, [stride(12, Some(Sym::C)), stride(4, None)], 4), Access::Write);
    b.grid(1, 1);
    let tile = b.load(x, &[Index::Const(-1), 0.into()], &[5, 5]);
    let tile = b.map(&[tile], |m, v| m.neg(v[0]));
    b.store(y, &[2.into(), 1.into()], tile);
    check(&b.finish().unwrap(), t(1), 9);
}

#[test]
fn control_flow() {
    let mut b = Builder::new("control");
    let x = b.param("x", DType::F32, &[Sym::T.into(), c(12)], Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), c(12)], Access::Write);
    let z = b.param("z", DType::F32, &[Sym::T.into(), c(12)], Access::Write);
    let row = b.grid(Sym::T, 1);
    let first = b.load(x, &[row.into(), 0.into()], &[1, 12]);
    let zero = b.full(0.0, &[1, 12]);
    let start = b.full(0.0, &[]);
    // Carried tiles change places each round; a scalar counts; the bound is a value.
    let out = b.for_(1, row, 2, &[first, zero, start], |b, i, v| {
        let f = b.cast(i, DType::F32);
        let sum = b.map(&[v[0], v[1], f], |m, v| m.fma(v[1], v[2], v[0]));
        let odd = b.map(&[i], |m, v| {
            let four = m.i32(3);
            let r = m.rem(v[0], four);
            let zero = m.i32(0);
            m.eq(r, zero)
        });
        let count = v[2];
        let (a, c) = (v[0], v[1]);
        let picked = b.if_(
            odd,
            |b| {
                let twice = b.map(&[a], |m, v| m.add(v[0], v[0]));
                let more = b.map(&[count], |m, v| {
                    let one = m.f32(1.0);
                    m.add(v[0], one)
                });
                vec![twice, more]
            },
            |_| vec![c, count],
        );
        vec![picked[0], sum, picked[1]]
    });
    let total = b.map(&[out[0], out[1], out[2]], |m, v| {
        let s = m.add(v[0], v[1]);
        m.add(s, v[2])
    });
    b.store(y, &[row.into(), 0.into()], total);
    let swapped = b.for_(0, 3, 1, &[first, total], |_, _, v| vec![v[1], v[0]]);
    b.store(z, &[row.into(), 0.into()], swapped[0]);
    check(&b.finish().unwrap(), t(9), 10);
}

#[test]
fn stores_do_not_disturb_earlier_loads() {
    // One buffer, read and written through two views that overlap with a shift.
    let mut b = Builder::new("alias");
    let x = b.param("x", DType::F32, &[c(64)], Access::Read);
    let y = b.param("y", DType::F32, &[c(64)], Access::ReadWrite);
    b.grid(1, 1);
    let tile = b.load(x, &[0.into()], &[40]);
    let pending = b.map(&[tile], |m, v| m.neg(v[0]));
    b.store(y, &[3.into()], tile);
    b.store(y, &[1.into()], pending);
    let p = b.finish().unwrap();
    let buffer = random(&mut Rng(11), DType::F32, 64);
    let both = Binding { buffer: 0, offset: 0 };
    check_with(&p, SymValues::default(), vec![buffer], &[both, both], 0.0);
}

fn topk_program(rows: u32, n: u32, chunk: u32, k: u32) -> Program {
    let mut b = Builder::new("topk");
    let x = b.param("x", DType::F32, &[c(rows), c(n)], Access::Read);
    let v = b.param("values", DType::F32, &[c(rows), c(k)], Access::Write);
    let i = b.param("numbers", DType::I32, &[c(rows), c(k)], Access::Write);
    b.grid(1, 1);
    let state = b.topk_init(rows, k);
    let out = b.for_(0, n, chunk, &[state], |b, at, s| {
        let tile = b.load(x, &[0.into(), at.into()], &[rows, chunk]);
        // Columns beyond the end read zero; they must not be candidates.
        let cols = b.iota(1, &[1, chunk]);
        let tile = b.map(&[tile, cols, at], |m, v| {
            let c = m.add(v[1], v[2]);
            let n = m.i32(n as i32);
            let inside = m.lt(c, n);
            let none = m.f32(f32::NEG_INFINITY);
            m.select(inside, v[0], none)
        });
        vec![b.topk_push(s[0], tile, at)]
    });
    let (values, numbers) = b.topk_take(out[0]);
    b.store(v, &[0.into(), 0.into()], values);
    b.store(i, &[0.into(), 0.into()], numbers);
    b.finish().unwrap()
}

#[test]
fn topk_is_exact() {
    let mut rng = Rng(12);
    type Input = Box<dyn Fn(&mut Rng, usize) -> f32>;
    let inputs: Vec<(&str, Input)> = vec![
        ("random", Box::new(|r, _| r.float())),
        ("equal", Box::new(|_, _| 1.5)),
        ("few", Box::new(|r, _| r.below(4) as f32 - 1.0)),
        ("rising", Box::new(|_, i| i as f32)),
        ("falling", Box::new(|_, i| -(i as f32))),
        ("zeros of both signs", Box::new(|r, _| if r.below(2) == 0 { 0.0 } else { -0.0 })),
        (
            "mostly excluded",
            Box::new(|r, _| match r.below(5) {
                0 => r.float(),
                1 => f32::NAN,
                2 => f32::INFINITY,
                _ => f32::NEG_INFINITY,
            }),
        ),
    ];
    for (rows, n, chunk, k) in
        [(1, 1, 1, 1), (2, 100, 32, 7), (3, 10, 16, 32), (1, 9000, 640, 64), (2, 5000, 500, 1000), (1, 300, 300, 1)]
    {
        let p = topk_program(rows, n, chunk, k);
        for (name, input) in &inputs {
            let x: Vec<u8> = (0..rows * n).flat_map(|i| input(&mut rng, (i % n) as usize).to_le_bytes()).collect();
            let room = (rows * k) as usize * 4;
            let bindings = [0, 1, 2].map(|buffer| Binding { buffer, offset: 0 });
            eprintln!("{name} {rows}x{n} in {chunk}, {k}");
            check_with(&p, SymValues::default(), vec![x, vec![0; room], vec![0; room]], &bindings, 0.0);
        }
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let programs = [matmul(5, 31, 70, (5, 31, 35), DType::Bf16, true), topk_program(2, 100, 32, 7)];
    let kernels: Vec<Kernel> =
        programs.iter().map(|p| Kernel { program: p.clone(), schedule: Schedule::default() }).collect();
    let target = CpuTarget::new(Level::V4);
    assert_eq!(target.compile(&kernels).unwrap(), target.compile(&kernels).unwrap());
}

/// Random programs on small whole numbers, where every sum and product is exact, so that both sides agree to the bit.
struct Fuzz<'r> {
    rng: &'r mut Rng,
    b: Builder,
    /// f32 tiles to draw from, by nesting: values of an inner region are not seen outside.
    pool: Vec<(ValueId, Vec<u32>)>,
    /// Views of memory: read only, and read and written.
    source: [ValueId; 2],
    row: ValueId,
}

impl Fuzz<'_> {
    fn tile(&mut self) -> (ValueId, Vec<u32>) {
        let recent = self.pool.len().min(6);
        let i = self.pool.len() - 1 - self.rng.below(recent as u32) as usize;
        self.pool[i].clone()
    }

    fn shape(&mut self) -> Vec<u32> {
        let sizes = [1, 2, 3, 4, 5, 8, 16, 19, 33];
        loop {
            let rank = 1 + self.rng.below(3);
            let shape: Vec<u32> = (0..rank).map(|_| sizes[self.rng.below(sizes.len() as u32) as usize]).collect();
            if shape.iter().product::<u32>() <= 1000 {
                return shape;
            }
        }
    }

    /// Keeps numbers small.
    fn clamped(&mut self, x: ValueId) -> ValueId {
        self.b.map(&[x], |m, v| {
            let (lo, hi) = (m.f32(-9.0), m.f32(9.0));
            let x = m.max(v[0], lo);
            m.min(hi, x)
        })
    }

    /// A tile of that shape, partly outside its view.
    fn load(&mut self, shape: &[u32]) -> ValueId {
        let n: u32 = shape.iter().product();
        let at = self.rng.below(290) as i32 - (n.min(20) as i32 - 1);
        let view = self.source[self.rng.below(2) as usize];
        let tile = self.b.load(view, &[self.row.into(), at.into()], &[1, n]);
        self.b.reshape(tile, shape)
    }

    fn op(&mut self, depth: u32) {
        let (x, shape) = self.tile();
        let rank = shape.len() as u32;
        let axis = self.rng.below(rank.max(1));
        let new = match self.rng.below(if depth < 2 { 14 } else { 12 }) {
            0 | 1 => {
                // Another tile of the shape, of size 1 along an axis, or a scalar.
                let mut other = shape.clone();
                if rank > 0 && self.rng.below(2) == 0 {
                    other[axis as usize] = 1;
                }
                let y = self.load(&other);
                let kind = self.rng.below(4);
                let z = self.b.map(&[x, y], |m, v| match kind {
                    0 => m.add(v[0], v[1]),
                    1 => m.mul(v[0], v[1]),
                    2 => m.max(v[1], v[0]),
                    _ => {
                        let c = m.lt(v[0], v[1]);
                        m.select(c, v[1], v[0])
                    }
                });
                self.clamped(z)
            }
            2 if rank > 0 => {
                let kind = if self.rng.below(2) == 0 { ReduceKind::Sum } else { ReduceKind::Max };
                let r = self.b.reduce(x, axis, kind);
                let r = self.clamped(r);
                self.b.map(&[x, r], |m, v| m.sub(v[0], v[1]))
            }
            3 if rank > 0 => {
                let s = self.b.scan(x, axis, ReduceKind::Sum);
                self.clamped(s)
            }
            4 if rank > 0 => {
                let offsets: Vec<u32> = shape.iter().map(|&n| self.rng.below(n)).collect();
                let sizes: Vec<u32> = shape.iter().zip(&offsets).map(|(&n, &o)| 1 + self.rng.below(n - o)).collect();
                self.b.slice(x, &offsets, &sizes)
            }
            5 if rank > 0 => {
                let y = self.load(&shape);
                let joined = self.b.concat(&[x, y, x], axis);
                if self.b.shape(joined).iter().product::<u32>() > 4000 { x } else { joined }
            }
            6 if rank > 1 => {
                let mut perm: Vec<u32> = (0..rank).collect();
                perm.rotate_left(1 + self.rng.below(rank - 1) as usize);
                self.b.permute(x, &perm)
            }
            7 => {
                let n: u32 = shape.iter().product();
                let split = (2..=n).find(|d| n.is_multiple_of(*d)).unwrap_or(1);
                let to = if self.rng.below(2) == 0 { vec![n] } else { vec![split, 1, n / split] };
                self.b.reshape(x, &to)
            }
            8 => {
                let n: u32 = shape.iter().product();
                let k = (1..=n.min(40)).rev().find(|d| n.is_multiple_of(*d)).unwrap_or(1);
                let a = self.b.reshape(x, &[n / k, k]);
                let wide = 1 + self.rng.below(20);
                let trans = self.rng.below(2) == 0;
                let w = self.load(&if trans { [wide, k] } else { [k, wide] });
                let acc = self.load(&[n / k, wide]);
                let acc = (self.rng.below(2) == 0).then_some(acc);
                let d = if trans { self.b.dot_t(a, w, acc) } else { self.b.dot(a, w, acc) };
                if self.b.shape(d).iter().product::<u32>() > 4000 { x } else { self.clamped(d) }
            }
            9 => {
                let to = [DType::Bf16, DType::F16, DType::E4m3, DType::I32][self.rng.below(4) as usize];
                let stored = self.b.cast(x, to);
                self.b.cast(stored, DType::F32)
            }
            10 if rank > 0 => {
                let i = self.b.iota(axis, &shape);
                let i = self.b.cast(i, DType::F32);
                let z = self.b.map(&[i, x], |m, v| m.add(v[0], v[1]));
                self.clamped(z)
            }
            11 => {
                let n: u32 = shape.iter().product();
                let flat = self.b.reshape(x, &[1, n]);
                let at = self.rng.below(290) as i32 - (n.min(20) as i32 - 1);
                self.b.store(self.source[1], &[self.row.into(), at.into()], flat);
                x
            }
            12 => {
                let y = self.load(&shape);
                let (low, high) = (self.rng.below(3), self.rng.below(5));
                let pool = self.pool.clone();
                let (rng, source, row) = (Rng(self.rng.next()), self.source, self.row);
                let out = self.b.for_(low, high, 1, &[x, y], |b, i, v| {
                    let mut rng = rng;
                    let mut pool = pool.clone();
                    pool.extend(v.iter().map(|&v| (v, shape.clone())));
                    let taken = std::mem::replace(b, Builder::new("inner"));
                    let mut inner = Fuzz { rng: &mut rng, b: taken, pool, source, row };
                    for _ in 0..3 {
                        inner.op(depth + 1);
                    }
                    let f = inner.b.cast(i, DType::F32);
                    let sum = inner.b.map(&[v[0], v[1], f], |m, v| {
                        let s = m.sub(v[0], v[1]);
                        m.add(s, v[2])
                    });
                    let sum = inner.clamped(sum);
                    let alike: Vec<ValueId> = inner.pool.iter().filter(|p| p.1 == shape).map(|p| p.0).collect();
                    let other = alike[inner.rng.below(alike.len() as u32) as usize];
                    let swap = inner.rng.below(2) == 0;
                    *b = inner.b;
                    if swap { vec![other, sum] } else { vec![sum, v[0]] }
                });
                let z = self.b.map(&[out[0], out[1]], |m, v| m.add(v[0], v[1]));
                self.clamped(z)
            }
            13 => {
                let odd = self.rng.below(3) as i32;
                let cond = self.b.map(&[self.row], |m, v| {
                    let c = m.i32(odd);
                    m.lt(v[0], c)
                });
                let (y, pool) = (self.load(&shape), self.pool.clone());
                let (seed, source, row) = (self.rng.next(), self.source, self.row);
                let mut arm = |b: &mut Builder, seed: u64, start: ValueId| {
                    let mut rng = Rng(seed);
                    let mut arm_pool = pool.clone();
                    arm_pool.push((start, shape.clone()));
                    let taken = std::mem::replace(b, Builder::new("inner"));
                    let mut inner = Fuzz { rng: &mut rng, b: taken, pool: arm_pool, source, row };
                    for _ in 0..2 {
                        inner.op(depth + 1);
                    }
                    let alike: Vec<ValueId> = inner.pool.iter().filter(|p| p.1 == shape).map(|p| p.0).collect();
                    let out = alike[inner.rng.below(alike.len() as u32) as usize];
                    *b = inner.b;
                    vec![out, start]
                };
                // Both closures use `arm`, one after the other.
                let arm = std::cell::RefCell::new(&mut arm);
                let out = self.b.if_(cond, |b| (arm.borrow_mut())(b, seed, x), |b| (arm.borrow_mut())(b, seed ^ 1, y));
                let z = self.b.map(&[out[0], out[1]], |m, v| m.add(v[0], v[1]));
                self.clamped(z)
            }
            _ => x,
        };
        let shape = self.b.shape(new);
        self.pool.push((new, shape));
    }
}

fn random_program(seed: u64) -> Program {
    let mut rng = Rng(seed);
    let mut b = Builder::new("random");
    let source = b.param("source", DType::F32, &[Sym::T.into(), c(300)], Access::Read);
    let work = b.param("work", DType::F32, &[Sym::T.into(), c(300)], Access::ReadWrite);
    let source = [source, work];
    let outs: Vec<ValueId> =
        (0..3).map(|i| b.param(&format!("out{i}"), DType::F32, &[Sym::T.into(), c(2000)], Access::Write)).collect();
    let row = b.grid(Sym::T, 1);
    let mut fuzz = Fuzz { rng: &mut rng, b, pool: Vec::new(), source, row };
    for _ in 0..2 {
        let shape = fuzz.shape();
        let tile = fuzz.load(&shape);
        fuzz.pool.push((tile, shape));
    }
    let steps = 3 + fuzz.rng.below(10);
    for _ in 0..steps {
        fuzz.op(0);
    }
    for out in outs {
        let (x, shape) = fuzz.tile();
        let n: u32 = shape.iter().product();
        let flat = fuzz.b.reshape(x, &[1, n]);
        fuzz.b.store(out, &[row.into(), 3.into()], flat);
    }
    fuzz.b.finish().unwrap()
}

fn check_random(seed: u64) {
    let program = random_program(seed);
    let mut rng = Rng(seed ^ 0xabcd);
    let rows = 3;
    let source: Vec<u8> = (0..rows * 300).flat_map(|_| (rng.below(7) as f32 - 3.0).to_le_bytes()).collect();
    let mut buffers = vec![source.clone(), source];
    buffers.extend((0..3).map(|_| vec![0; rows * 8000]));
    let bindings: Vec<Binding> = (0..5).map(|buffer| Binding { buffer, offset: 0 }).collect();
    check_with(&program, t(rows as u32), buffers, &bindings, 0.0);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_programs_agree_with_the_interpreter(seed: u64) {
        check_random(seed);
    }
}
