//! Tile programs that select the best columns of the rows of a matrix, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Program, ReduceKind, Stride, ViewType};
use dsc_ir::{DType, Sym};

/// The `k` largest of the first columns of each row.
#[derive(Clone, Copy, Debug)]
pub struct Select {
    /// Columns selected.
    pub k: u32,
    /// Columns that the program offers at a time.
    pub step: u32,
    /// Whether the result is slots of pages of 64, which a table gives, instead of columns.
    pub slots: bool,
}

impl Select {
    /// The program. Parameters in order: x `[T, C]`, positions `[T]` (the last column of a row that counts), sequences `[T]` and page
    /// table, `[S, P]` in memory, if slots are wanted, result i32 `[T, k]`.
    pub fn program(self, name: &str) -> Program {
        let (k, step) = (self.k, self.step);
        let mut b = Builder::new(name);
        let x = b.param("x", DType::F32, &[Sym::T.into(), Sym::C.into()], Access::Read);
        let positions = b.param("positions", DType::I32, &[Sym::T.into()], Access::Read);
        let table = self.slots.then(|| {
            let seqs = b.param("seqs", DType::I32, &[Sym::T.into()], Access::Read);
            let view = ViewType {
                dtype: DType::I32,
                shape: vec![Sym::P.into(), Sym::S.into()],
                strides: vec![Stride { bytes: 4, sym: None }, Stride { bytes: 4, sym: Some(Sym::P) }],
                offset: 0,
            };
            (seqs, b.param_view("pages", view, Access::Read))
        });
        let y = b.param("selected", DType::I32, &[Sym::T.into(), k.into()], Access::Write);
        let token = b.grid(Sym::T, 1);
        // The last of all tokens of a block, as for a block with more.
        let own = b.load(positions, &[token.into()], &[1]);
        let last = b.reduce(own, 0, ReduceKind::Max);
        let (position, width) = (b.reshape(last, &[]), b.sym(Sym::C));
        let end = b.map(&[position, width], |m, v| {
            let one = m.i32(1);
            let end = m.add(v[0], one);
            m.min(end, v[1])
        });
        let state = b.topk_init(1, k);
        let state = b.for_(0, end, step, &[state], |b, at, state| {
            let values = b.load(x, &[token.into(), at.into()], &[1, step]);
            let columns = b.iota(1, &[1, step]);
            let values = b.map(&[values, columns, at, end], |m, v| {
                let column = m.add(v[1], v[2]);
                let (inside, none) = (m.lt(column, v[3]), m.f32(f32::NEG_INFINITY));
                m.select(inside, v[0], none)
            });
            vec![b.topk_push(state[0], values, at)]
        })[0];
        let (_, mut numbers) = b.topk_take(state);
        if let Some((seqs, pages)) = table {
            let seq = b.load_scalar(seqs, &[token.into()]);
            let flat = b.reshape(numbers, &[k]);
            let which = b.map(&[flat], |m, v| {
                let page = m.i32(64);
                m.div(v[0], page)
            });
            let page = b.gather(pages, which, &[seq.into()], &[k, 1]);
            let page = b.reshape(page, &[k]);
            let slots = b.map(&[flat, page], |m, v| {
                let (size, zero, none) = (m.i32(64), m.i32(0), m.i32(-1));
                let (first, offset) = (m.mul(v[1], size), m.rem(v[0], size));
                let (slot, empty) = (m.add(first, offset), m.lt(v[0], zero));
                m.select(empty, none, slot)
            });
            numbers = b.reshape(slots, &[1, k]);
        }
        b.store(y, &[token.into(), 0.into()], numbers);
        b.finish().expect("well-typed")
    }
}
