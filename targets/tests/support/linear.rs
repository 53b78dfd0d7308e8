//! Tile programs of matrix products, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Ix, Program, ValueId};
use dsc_ir::{DType, Sym};

/// A product `y[T, n] = x[T, k] wᵀ`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Element type of both operands; e4m3 with scales of 1x128 and 128x128.
    pub dtype: DType,
    /// Outputs.
    pub n: u32,
    /// Contracted length.
    pub k: u32,
    /// Rows and columns a block makes.
    pub tile: [u32; 2],
    /// Elements of `k` a round; scale blocks have 128.
    pub step: u32,
    /// Element type of the result.
    pub out: DType,
}

fn by(b: &mut Builder, v: ValueId, n: u32, divide: bool) -> ValueId {
    b.map(&[v], |m, v| {
        let n = m.i32(n as i32);
        if divide { m.div(v[0], n) } else { m.mul(v[0], n) }
    })
}

impl Linear {
    /// The program.
    pub fn program(self, name: &str) -> Program {
        let (n, k, [tm, tn]) = (self.n, self.k, self.tile);
        let mut b = Builder::new(name);
        let x = b.param("x", self.dtype, &[Sym::T.into(), k.into()], Access::Read);
        let w = b.param("w", self.dtype, &[n.into(), k.into()], Access::Read);
        let scales = (self.dtype == DType::E4m3).then(|| {
            let blocks = k.div_ceil(128);
            let x = b.param("x_scales", DType::F32, &[Sym::T.into(), blocks.into()], Access::Read);
            (x, b.param("w_scales", DType::F32, &[n.div_ceil(128).into(), blocks.into()], Access::Read))
        });
        let y = b.param("y", self.out, &[Sym::T.into(), n.into()], Access::Write);
        let (row, column) = (b.grid(Sym::T, tm), b.grid(n, tn));
        let (row, column) = (by(&mut b, row, tm, false), by(&mut b, column, tn, false));
        let tiles = |b: &mut Builder, at: Ix, step: u32| {
            (b.load(x, &[row.into(), at], &[tm, step]), b.load(w, &[column.into(), at], &[tn, step]))
        };
        let zero = b.full(0.0, &[tm, tn]);
        let total = match scales {
            None => b.for_(0, k, self.step, &[zero], |b, at, acc| {
                let (x, w) = tiles(b, at.into(), self.step);
                vec![b.dot_t(x, w, Some(acc[0]))]
            }),
            Some((xs, ws)) => b.for_(0, k.div_ceil(128), 1, &[zero], |b, block, acc| {
                let at = by(b, block, 128, false);
                let (x, w) = tiles(b, at.into(), 128);
                let partial = b.dot_t(x, w, None);
                let sx = b.load(xs, &[row.into(), block.into()], &[tm, 1]);
                let at = by(b, column, 128, true);
                let sw = b.load(ws, &[at.into(), block.into()], &[1, 1]);
                let scale = b.map(&[sx, sw], |m, v| m.mul(v[0], v[1]));
                vec![b.map(&[acc[0], partial, scale], |m, v| {
                    let scaled = m.mul(v[1], v[2]);
                    m.add(v[0], scaled)
                })]
            }),
        };
        let result = b.cast(total[0], self.out);
        b.store(y, &[row.into(), column.into()], result);
        b.finish().expect("well-typed")
    }
}
