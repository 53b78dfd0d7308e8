//! Tile programs of products a head, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Program, ValueId};
use dsc_ir::{DType, Sym};

fn times(b: &mut Builder, v: ValueId, n: u32) -> ValueId {
    b.map(&[v], |m, v| {
        let n = m.i32(n as i32);
        m.mul(v[0], n)
    })
}

/// A product a head, `y[T, h] = x[T, h] w[h]`, in bf16: rows of a head's weight run across what is contracted.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Heads.
    pub heads: u32,
    /// Outputs of a head.
    pub n: u32,
    /// Contracted length.
    pub k: u32,
    /// Rows and columns a block makes.
    pub tile: [u32; 2],
    /// Elements of `k` a round.
    pub step: u32,
}

impl Heads {
    /// The program.
    pub fn program(self, name: &str) -> Program {
        let Heads { heads, n, k, tile: [tm, tn], step } = self;
        let mut b = Builder::new(name);
        let x = b.param("x", DType::Bf16, &[Sym::T.into(), heads.into(), k.into()], Access::Read);
        let w = b.param("w", DType::Bf16, &[(heads * k).into(), n.into()], Access::Constant);
        let y = b.param("y", DType::Bf16, &[Sym::T.into(), heads.into(), n.into()], Access::Write);
        let (row, column, head) = (b.grid(Sym::T, tm), b.grid(n, tn), b.grid(heads, 1));
        let (row, column) = (times(&mut b, row, tm), times(&mut b, column, tn));
        let first = times(&mut b, head, k);
        let zero = b.full(0.0, &[tm, tn]);
        let sum = b.for_(0, k, step, &[zero], |b, at, acc| {
            let left = b.load(x, &[row.into(), head.into(), at.into()], &[tm, 1, step]);
            let left = b.reshape(left, &[tm, step]);
            let from = b.map(&[first, at], |m, v| m.add(v[0], v[1]));
            let right = b.load(w, &[from.into(), column.into()], &[step, tn]);
            vec![b.dot(left, right, Some(acc[0]))]
        })[0];
        let rounded = b.cast(sum, DType::Bf16);
        let rounded = b.reshape(rounded, &[tm, 1, tn]);
        b.store(y, &[row.into(), head.into(), column.into()], rounded);
        b.finish().expect("well-typed")
    }
}
