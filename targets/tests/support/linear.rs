//! Tile programs of matrix products, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Ix, Program, ReduceKind, ValueId};
use dsc_ir::{DType, Extent, Sym};

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
    /// Element type of the result; e4m3 with a scale for every row of a tile.
    pub out: DType,
    /// Whether the weight has gate and up, `n` rows each, and the result is `silu(gate) · up`.
    pub glu: bool,
    /// Elements of `k` of each part, where parts of the sum are stored apart: `y[T, parts, n]`.
    pub part: Option<u32>,
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
        let offsets = if self.glu { vec![0, n] } else { vec![0] };
        let w_rows = n * offsets.len() as u32;
        let parts = self.part.map(|columns| k.div_ceil(columns));
        let mut b = Builder::new(name);
        let x = b.param("x", self.dtype, &[Sym::T.into(), k.into()], Access::Read);
        let w = b.param("w", self.dtype, &[w_rows.into(), k.into()], Access::Constant);
        let blocks = k.div_ceil(128);
        let scales = (self.dtype == DType::E4m3).then(|| {
            let x = b.param("x_scales", DType::F32, &[Sym::T.into(), blocks.into()], Access::Read);
            (x, b.param("w_scales", DType::F32, &[w_rows.div_ceil(128).into(), blocks.into()], Access::Constant))
        });
        let y_shape: Vec<Extent> =
            [Sym::T.into()].into_iter().chain(parts.map(Extent::from)).chain([n.into()]).collect();
        let y = b.param("y", self.out, &y_shape, Access::Write);
        let quantised = (self.out == DType::E4m3)
            .then(|| b.param("y_scales", DType::F32, &[Sym::T.into(), n.div_ceil(tn).into()], Access::Write));
        let (row, column) = (b.grid(Sym::T, tm), b.grid(n, tn));
        let part = parts.map(|parts| b.grid(parts, 1));
        let (row, column) = (by(&mut b, row, tm, false), by(&mut b, column, tn, false));
        let w_row = |b: &mut Builder, offset: u32| {
            b.map(&[column], |m, v| {
                let offset = m.i32(offset as i32);
                m.add(v[0], offset)
            })
        };
        let dots = |b: &mut Builder, at: Ix, step: u32, accs: Option<&[ValueId]>| -> Vec<ValueId> {
            let x = b.load(x, &[row.into(), at], &[tm, step]);
            let mut made = Vec::new();
            for (i, &offset) in offsets.iter().enumerate() {
                let row = w_row(b, offset);
                let w = b.load(w, &[row.into(), at], &[tn, step]);
                made.push(b.dot_t(x, w, accs.map(|a| a[i])));
            }
            made
        };
        let zeros: Vec<ValueId> = offsets.iter().map(|_| b.full(0.0, &[tm, tn])).collect();
        // Columns, or scale blocks.
        let unit = if scales.is_some() { 128 } else { 1 };
        let (lo, hi): (Ix, Ix) = match part.zip(self.part) {
            None => (0.into(), k.div_ceil(unit).into()),
            Some((part, columns)) => {
                let lo = by(&mut b, part, columns / unit, false);
                let hi = b.map(&[lo], |m, v| {
                    let (each, all) = (m.i32((columns / unit) as i32), m.i32(k.div_ceil(unit) as i32));
                    let end = m.add(v[0], each);
                    m.min(end, all)
                });
                (lo.into(), hi.into())
            }
        };
        let totals = match scales {
            None => b.for_(lo, hi, self.step, &zeros, |b, at, accs| dots(b, at.into(), self.step, Some(accs))),
            Some((xs, ws)) => b.for_(lo, hi, 1, &zeros, |b, block, accs| {
                let at = by(b, block, 128, false);
                let partials = dots(b, at.into(), 128, None);
                let sx = b.load(xs, &[row.into(), block.into()], &[tm, 1]);
                let mut made = Vec::new();
                for (i, &offset) in offsets.iter().enumerate() {
                    let row = w_row(b, offset);
                    let at = by(b, row, 128, true);
                    let sw = b.load(ws, &[at.into(), block.into()], &[1, 1]);
                    let scale = b.map(&[sx, sw], |m, v| m.mul(v[0], v[1]));
                    made.push(b.map(&[accs[i], partials[i], scale], |m, v| {
                        let scaled = m.mul(v[1], v[2]);
                        m.add(v[0], scaled)
                    }));
                }
                made
            }),
        };
        let mut result = totals[0];
        if let &[gate, up] = totals.as_slice() {
            result = b.map(&[gate, up], |m, v| {
                let s = m.sigmoid(v[0]);
                let silu = m.mul(v[0], s);
                m.mul(silu, v[1])
            });
        }
        if let Some(scales) = quantised {
            let groups = b.reshape(result, &[tm, 1, tn]);
            let sizes = b.map(&[groups], |m, v| m.abs(v[0]));
            let most = b.reduce(sizes, 2, ReduceKind::Max);
            let scale = b.map(&[most], |m, v| {
                let (least, part) = (m.f32(1e-4), m.f32(1.0 / 448.0));
                let most = m.max(v[0], least);
                m.mul(most, part)
            });
            let codes = b.map(&[groups, scale], |m, v| {
                let scaled = m.div(v[0], v[1]);
                m.cast(scaled, DType::E4m3)
            });
            result = b.reshape(codes, &[tm, tn]);
            let scale = b.reshape(scale, &[tm, 1]);
            let group = by(&mut b, column, tn, true);
            b.store(scales, &[row.into(), group.into()], scale);
        }
        let result = b.cast(result, self.out);
        match part {
            None => b.store(y, &[row.into(), column.into()], result),
            Some(part) => {
                let result = b.reshape(result, &[tm, 1, tn]);
                b.store(y, &[row.into(), part.into(), column.into()], result);
            }
        }
        b.finish().expect("well-typed")
    }
}
