use super::*;
use crate::dtype::DType;
use crate::extent::{Extent, Sym};
use crate::tile::interp::{Binding, Options, block_count, run_blocks};
use crate::tile::{Builder, MapBuilder, MapVal, Stride, ViewType, verify};
use expect_test::{Expect, expect};
use proptest::prelude::*;

fn example() -> Program {
    let mut b = Builder::new("row_sums");
    let x = b.param("x", DType::Bf16, &[Sym::T.into(), Extent::from(Sym::C).times(64)], Access::Read);
    let ids = b.param("ids", DType::I32, &[Sym::T.into()], Access::Read);
    let token = b.grid(Sym::T, 1);
    let n = b.sym(Sym::C);
    let strides = [256, 4].map(|bytes| Stride { bytes, sym: None }).to_vec();
    let shape = vec![Sym::N.into(), 1u32.into()];
    let y = b.param_view("y", ViewType { dtype: DType::F32, shape, strides, offset: 128 }, Access::ReadWrite);
    let rows = b.load(ids, &[token.into()], &[1]);
    let init = b.full(f32::NEG_INFINITY, &[1, 1]);
    let best = b.for_(0, n, 64, &[init], |b, i, acc| {
        let tile = b.load(x, &[token.into(), i.into()], &[1, 64]);
        let wide = b.map(&[tile, acc[0]], |m, v| {
            let (x, half) = (m.cast(v[0], DType::F32), m.f32(0.5));
            let scaled = m.mul(x, half);
            let (s, one) = (m.sigmoid(scaled), m.f32(1.0));
            let t = m.add(s, one);
            m.max(t, v[1])
        });
        vec![b.reduce(wide, 1, ReduceKind::Max)]
    })[0];
    let scalar = b.reshape(best, &[]);
    let positive = b.map(&[scalar], |m, v| {
        let zero = m.f32(0.0);
        m.lt(zero, v[0])
    });
    b.if_(
        positive,
        |b| {
            b.scatter(y, rows, &[0.into()], best);
            vec![]
        },
        |_| vec![],
    );
    b.finish().unwrap()
}

#[test]
fn prints_for_people() {
    let program = example();
    assert_eq!(verify(&program), []);
    assert_eq!(parse(&program.to_string()), Ok(vec![canonical(&program)]));
    expect![[r#"
        kernel row_sums grid(T/1)
            read %x: view<[T, 64*C] bf16>
            read %ids: view<[T] i32>
            readwrite %y: view<[N, 1] f32, strides [256, 4], offset 128>
        {
            %3 = block_id 0 : i32
            %4 = sym C : i32
            %5 = load %ids[%3] : tile<1xi32>
            %6 = full -inf : tile<1x1xf32>
            %12 = for %7 = 0 to %4 step 64 iter(%8 = %6: tile<1x1xf32>) {
                %9 = load %x[%3, %7] : tile<1x64xbf16>
                %10 = map(%9, %8) { a, b -> t0 = cast<f32> a; t2 = mul t0, 0.5; t4 = mul t2, -1.442695; t5 = exp2 t4; t6 = 1.0; t7 = add t6, t5; t8 = div t6, t7; t10 = add t8, 1.0; t11 = max t10, b; t11 } : tile<1x64xf32>
                %11 = reduce max %10 axis 1 : tile<1x1xf32>
                yield %11
            }
            %13 = reshape %12 : f32
            %14 = map(%13) { a -> t1 = lt 0.0, a; t1 } : bool
            if %14 {
                scatter %y[rows %5, 0], %12
            }
        }
    "#]].assert_eq(&program.to_string());
}

#[test]
fn floats_keep_their_bits() {
    for bits in
        [0, 1, 0x8000_0000, 0x7f80_0000, 0xff80_0000, NAN_BITS, 0xffc0_0001, 0x7f80_0001, 0x3dcc_cccd, 0x7f7f_ffff]
    {
        let text = Scalar::F32(f32::from_bits(bits)).to_string();
        let mut p = Parser::new(&text).unwrap();
        assert_eq!(p.literal(), Ok(Some(Scalar::F32(f32::from_bits(bits)))), "{text}");
    }
}

fn check_error(text: &str, expected: Expect) {
    expected.assert_eq(&parse(text).unwrap_err().to_string());
}

#[test]
fn errors_have_a_place_and_a_reason() {
    check_error("kernel", expect!["1:7: expected the kernel's name"]);
    check_error("kernel k grid(1/1) {\n  %1 = lod %x[0] : f32\n}", expect!["2:11: no operation lod"]);
    check_error("kernel k grid(1/1) {\n  store %x[0], %y\n}", expect!["2:11: %x is not defined above"]);
    check_error("kernel k grid(4294967296/1) {}", expect!["1:15: expected an integer in range"]);
    check_error("kernel k grid(1/1) {\n  %1 = full 1e99 : f32 }", expect!["2:17: 1e99 is no constant"]);
    check_error("kernel k grid(1/1) {\n  %1 = iota 0\n}", expect!["3:1: the result of this operation is a tile"]);
    check_error(
        "kernel k grid(1/1) {\n  %1 = map() { -> t0 = 1.0; t1 } : f32\n}",
        expect!["2:32: t1 is not defined above"],
    );
    check_error("kernel k grid(1/1) { // no end", expect!["1:31: expected an operation"]);
    let deep: String = (0..65).map(|i| format!("for %{i} = 0 to 1 step 1 {{ ")).collect();
    check_error(&format!("kernel k grid(1/1) {{ {deep}"), expect!["1:1675: regions are nested more than 64 deep"]);
}

/// Writes a well-typed program as bytes dictate. Loads in loops, top-k through loops, every op and scalar op.
struct Random<'a> {
    bytes: &'a [u8],
    views: Vec<ValueId>,
}

impl Random<'_> {
    fn byte(&mut self) -> usize {
        let Some((&first, rest)) = self.bytes.split_first() else { return 0 };
        self.bytes = rest;
        first.into()
    }

    fn program(&mut self) -> Program {
        let mut b = Builder::new("random");
        let rows = b.grid(Sym::T, 1 + self.byte() as u32 % 3);
        for (i, dtype) in [DType::F32, DType::Bf16, DType::F16, DType::E4m3, DType::I32].into_iter().enumerate() {
            let stride = |bytes| Stride { bytes, sym: None };
            let row = dtype.bytes() as i64 * (16 + (self.byte() % 3) as i64);
            let strides = vec![stride(row), stride(dtype.bytes() as i64)];
            let shape = vec![if self.byte() < 128 { Sym::T.into() } else { 8.into() }, 16.into()];
            let view = ViewType { dtype, shape, strides, offset: self.byte() as u64 / 64 * 4 };
            self.views.push(b.param_view(&format!("p{i}"), view, Access::ReadWrite));
        }
        let mut pool = vec![rows];
        self.block(&mut b, &mut pool, 0);
        b.finish().unwrap()
    }

    fn block(&mut self, b: &mut Builder, pool: &mut Vec<ValueId>, depth: usize) {
        for _ in 0..self.byte() % 12 {
            let made = self.op(b, pool, depth);
            pool.extend(made);
        }
    }

    fn any(&mut self, pool: &[ValueId]) -> ValueId {
        pool[self.byte() % pool.len()]
    }

    /// A value of that shape and type, made if there is none.
    fn of(&mut self, b: &mut Builder, pool: &[ValueId], dtype: DType, shape: &[u32]) -> ValueId {
        let fits: Vec<ValueId> = pool.iter().copied().filter(|&v| b.dtype(v) == dtype && b.shape(v) == shape).collect();
        if !fits.is_empty() {
            return self.any(&fits);
        }
        let float = f32::from_bits(u32::from_le_bytes([0; 4].map(|_: u8| self.byte() as u8)));
        let x = if dtype == DType::I32 { b.full_i32(self.byte() as i32 - 9, shape) } else { b.full(float, shape) };
        b.cast(x, dtype)
    }

    fn op(&mut self, b: &mut Builder, pool: &[ValueId], depth: usize) -> Vec<ValueId> {
        let (x, n) = (self.any(pool), 1 + self.byte() as u32 % 4);
        let (shape, dtype) = (b.shape(x), b.dtype(x));
        let axis = self.byte() as u32 % shape.len().max(1) as u32;
        let number = matches!(dtype, DType::F32 | DType::I32) && !shape.is_empty();
        let kind = if n % 2 == 0 { ReduceKind::Sum } else { ReduceKind::Max };
        let view = self.byte() % self.views.len();
        let view = self.views[view];
        let kept = b.dtype(view);
        let index = |me: &mut Self, b: &mut Builder| match me.byte() {
            i @ 0..32 => Index::from(i as i32 % 8 - n as i32 / 2),
            _ => me.of(b, pool, DType::I32, &[]).into(),
        };
        vec![match self.byte() % 17 {
            0 => b.sym(Sym::ALL[self.byte() % 6]),
            1 => b.iota(1, &[n, 2]),
            2 => {
                let at = [index(self, b), index(self, b)];
                b.load(view, &at, &[n, 4])
            }
            3 => {
                let (at, tile) = ([index(self, b), index(self, b)], self.of(b, pool, kept, &[n, 4]));
                b.store(view, &at, tile);
                return vec![];
            }
            4 => {
                let (rows, at) = (self.of(b, pool, DType::I32, &[n]), [index(self, b)]);
                b.gather(view, rows, &at, &[n, 3])
            }
            5 => {
                let (rows, at) = (self.of(b, pool, DType::I32, &[n]), [index(self, b)]);
                let tile = self.of(b, pool, kept, &[n, 3]);
                b.scatter(view, rows, &at, tile);
                return vec![];
            }
            6 if number => b.reduce(x, axis, kind),
            7 if number => b.scan(x, axis, kind),
            8 => {
                let (a, w) = (self.of(b, pool, DType::F32, &[n, 4]), self.of(b, pool, DType::E4m3, &[2, 4]));
                let acc = (n > 1).then(|| self.of(b, pool, DType::F32, &[n, 2]));
                if n < 4 { b.dot_t(a, w, acc) } else { b.dot(w, a, None) }
            }
            9 => b.reshape(x, &[1, shape.iter().product()]),
            10 => b.permute(x, &(0..shape.len() as u32).rev().collect::<Vec<_>>()),
            11 => b.slice(x, &vec![0; shape.len()], &vec![1; shape.len()]),
            12 if !shape.is_empty() && shape.iter().product::<u32>() < 256 => b.concat(&[x, x], axis),
            13 => return self.topk(b, pool, n),
            14 if depth < 3 => return self.loops(b, pool, x, depth),
            15 if depth < 3 => return self.branch(b, pool, x, depth),
            _ => self.map(b, pool, x),
        }]
    }

    fn topk(&mut self, b: &mut Builder, pool: &[ValueId], n: u32) -> Vec<ValueId> {
        let (state, values) = (b.topk_init(n, 3), self.of(b, pool, DType::F32, &[n, 2]));
        let state = b.for_(0, 6, 2, &[state], |b, i, state| vec![b.topk_push(state[0], values, i)])[0];
        let (values, numbers) = b.topk_take(state);
        vec![values, numbers]
    }

    fn loops(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId, depth: usize) -> Vec<ValueId> {
        let (dtype, shape) = (b.dtype(x), b.shape(x));
        let hi = self.of(b, &[], DType::I32, &[]);
        let hi = if self.byte() < 128 { hi.into() } else { Index::from(4) };
        b.for_(-1, hi, 100, &[x], |b, i, carried| {
            let mut pool = [pool, &[i], carried].concat();
            self.block(b, &mut pool, depth + 1);
            vec![self.of(b, &pool, dtype, &shape)]
        })
    }

    fn branch(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId, depth: usize) -> Vec<ValueId> {
        let (dtype, shape) = (b.dtype(x), b.shape(x));
        let zero = b.full(0.0, &[]);
        let cond = b.cast(zero, DType::Bool);
        let mut then_pool = pool.to_vec();
        let mut other = Random { bytes: self.bytes, views: self.views.clone() };
        b.if_(
            cond,
            |b| {
                self.block(b, &mut then_pool, depth + 1);
                vec![self.of(b, &then_pool, dtype, &shape)]
            },
            |b| vec![other.of(b, pool, dtype, &shape)],
        )
    }

    fn map(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId) -> ValueId {
        let s = self.of(b, pool, DType::F32, &[]);
        let (dtype, constant) = (b.dtype(x), self.byte() as f32 / 8.0 - 3.0);
        let choices: Vec<usize> = (0..self.byte() % 8).map(|_| self.byte()).collect();
        b.map(&[x, s], |m, v| {
            let mut x = if dtype == DType::Bool { m.select(v[0], v[1], v[1]) } else { m.cast(v[0], DType::F32) };
            for choice in choices {
                x = Self::scalar(m, choice, x, v[1], constant);
            }
            if constant > 20.0 { m.cast(x, DType::Bf16) } else { x }
        })
    }

    fn scalar(m: &mut MapBuilder, choice: usize, x: MapVal, y: MapVal, constant: f32) -> MapVal {
        let c = m.f32(constant);
        match choice % 16 {
            0 => m.add(x, c),
            1 => m.sub(c, y),
            2 => m.mul(c, c),
            3 => m.div(y, x),
            4 => m.min(x, y),
            5 => m.fma(c, x, y),
            6 => m.neg(x),
            7 => m.abs(x),
            8 => m.sqrt(x),
            9 => m.exp2(x),
            10 => m.sigmoid(x),
            11 => m.pow2_ceil(x),
            12 => {
                let less = m.le(x, c);
                m.select(less, x, y)
            }
            13 => {
                let (i, three) = (m.cast(x, DType::I32), m.i32(3));
                let (q, r) = (m.div(i, three), m.rem(i, three));
                let shifted = m.shl(q, r);
                m.cast(shifted, DType::F32)
            }
            14 => {
                let (a, b) = (m.eq(x, y), m.lt(x, y));
                let both = m.or(a, b);
                m.select(both, c, x)
            }
            _ => c,
        }
    }
}

pub(crate) fn random_program() -> impl Strategy<Value = Program> {
    proptest::collection::vec(any::<u8>(), 0..400)
        .prop_map(|bytes| Random { bytes: &bytes, views: Vec::new() }.program())
}

proptest! {
    #[test]
    fn printing_and_parsing_are_inverse(program in random_program()) {
        prop_assert_eq!(verify(&program), []);
        let parsed = parse(&program.to_string());
        prop_assert_eq!(parsed, Ok(vec![canonical(&program)]));
        prop_assert_eq!(canonical(&canonical(&program)), canonical(&program));
    }

    #[test]
    fn a_program_and_its_canonical_form_compute_the_same(program in random_program()) {
        let syms = crate::SymValues([3; 6]);
        let bindings: Vec<Binding> = (0..5).map(|buffer| Binding { buffer, offset: 0 }).collect();
        let run = |program: &Program| {
            let mut buffers: Vec<Vec<u8>> = (0..5).map(|i| (0..1024u32).map(|b| (b * 7 + i) as u8).collect()).collect();
            let blocks = 0..block_count(program, &syms).unwrap();
            let result = run_blocks(program, &syms, &mut buffers, &bindings, blocks, Options::default());
            result.map(|()| buffers)
        };
        let result = run(&program);
        prop_assert!(result.is_ok(), "{:?}", result);
        prop_assert_eq!(run(&canonical(&program)), result);
    }

    /// Whatever the text, nothing panics, and what parses prints again.
    #[test]
    fn damaged_text_is_survived(program in random_program(), cuts in proptest::collection::vec((any::<u16>(), any::<u16>(), 0..9usize), 1..4)) {
        let mut text: Vec<char> = program.to_string().chars().collect();
        for (at, to, len) in cuts {
            let (at, to) = (usize::from(at) % text.len(), usize::from(to) % text.len());
            let piece: Vec<char> = text[to..(to + len).min(text.len())].to_vec();
            text.splice(at..(at + len / 2).min(text.len()), piece);
        }
        let text: String = text.into_iter().collect();
        for program in parse(&text).unwrap_or_default() {
            let clean = verify(&program).is_empty();
            let again = parse(&program.to_string());
            prop_assert!(!clean || again == Ok(vec![program]));
        }
    }

    #[test]
    fn any_text_is_survived(text in "(kernel k grid\\([0-9TC*/]{0,6}\\) ?)?[{}%a-z0-9 =:<>\\[\\],x.;/-]{0,80}") {
        for program in parse(&text).unwrap_or_default() {
            let _ = (verify(&program), program.to_string());
        }
    }
}
