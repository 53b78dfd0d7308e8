//! Tile programs of grouped matrix products, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Ix, Program, ValueId};
use dsc_ir::{DType, Sym};

/// `y[r] = x[order r / per_token] w[e]ᵀ` for the rows `r` that `order[offsets e .. offsets e + 1]` lists of each expert `e`, in e4m3 with
/// scales of 1x128 and 128x128. There are `L` rows, `T` tokens.
#[derive(Clone, Copy, Debug)]
pub struct Experts {
    /// Experts.
    pub experts: u32,
    /// Experts of a token; 0 if each row has a row of `x` of its own.
    pub per_token: u32,
    /// Outputs.
    pub n: u32,
    /// Contracted length.
    pub k: u32,
    /// Rows and columns a block makes.
    pub tile: [u32; 2],
}

fn arithmetic(
    b: &mut Builder,
    v: ValueId,
    n: u32,
    op: fn(&mut dsc_ir::tile::MapBuilder, [dsc_ir::tile::MapVal; 2]) -> dsc_ir::tile::MapVal,
) -> ValueId {
    b.map(&[v], |m, v| {
        let n = m.i32(n as i32);
        op(m, [v[0], n])
    })
}

impl Experts {
    /// The program.
    pub fn program(self, name: &str) -> Program {
        let Experts { experts, per_token, n, k, tile: [tm, tn] } = self;
        let (blocks, scale_rows) = (k.div_ceil(128), n.div_ceil(128));
        let tokens = if per_token > 0 { Sym::T } else { Sym::L };
        let mut b = Builder::new(name);
        let x = b.param("x", DType::E4m3, &[tokens.into(), k.into()], Access::Read);
        let w = b.param("w", DType::E4m3, &[(experts * n).into(), k.into()], Access::Read);
        let xs = b.param("x_scales", DType::F32, &[tokens.into(), blocks.into()], Access::Read);
        let ws = b.param("w_scales", DType::F32, &[(experts * scale_rows).into(), blocks.into()], Access::Read);
        let orders = b.param("order", DType::I32, &[Sym::L.into()], Access::Read);
        let bounds = b.param("offsets", DType::I32, &[(experts + 1).into()], Access::Read);
        let y = b.param("y", DType::Bf16, &[Sym::L.into(), n.into()], Access::Write);
        let (n0, expert) = (b.grid(n, tn), b.grid(experts, 1));
        let n0 = arithmetic(&mut b, n0, tn, |m, v| m.mul(v[0], v[1]));
        let row = arithmetic(&mut b, expert, n, |m, v| m.mul(v[0], v[1]));
        let row = b.map(&[row, n0], |m, v| m.add(v[0], v[1]));
        let first_scale = arithmetic(&mut b, expert, scale_rows, |m, v| m.mul(v[0], v[1]));
        let lo = b.load_scalar(bounds, &[expert.into()]);
        let next = arithmetic(&mut b, expert, 1, |m, v| m.add(v[0], v[1]));
        let hi = b.load_scalar(bounds, &[next.into()]);
        b.for_(lo, hi, tm, &[], |b, at, _| {
            let counted = b.iota(0, &[tm]);
            let place = b.map(&[counted, at], |m, v| m.add(v[0], v[1]));
            let order = b.load(orders, &[at.into()], &[tm]);
            let below = |b: &mut Builder, v: ValueId| {
                b.map(&[v, place, hi], |m, v| {
                    let none = m.i32(-1);
                    let inside = m.lt(v[1], v[2]);
                    m.select(inside, v[0], none)
                })
            };
            let to = below(b, order);
            let source = if per_token > 0 { arithmetic(b, order, per_token, |m, v| m.div(v[0], v[1])) } else { order };
            let from = below(b, source);
            let zero = b.full(0.0, &[tm, tn]);
            let total = b.for_(0, blocks, 1, &[zero], |b, block, acc| {
                let at = arithmetic(b, block, 128, |m, v| m.mul(v[0], v[1]));
                let left = b.gather(x, from, &[at.into()], &[tm, 128]);
                let right = b.load(w, &[row.into(), at.into()], &[tn, 128]);
                let partial = b.dot_t(left, right, None);
                let sx = b.gather(xs, from, &[block.into()], &[tm, 1]);
                let scale_row = arithmetic(b, n0, 128, |m, v| m.div(v[0], v[1]));
                let scale_row = b.map(&[scale_row, first_scale], |m, v| m.add(v[0], v[1]));
                let index: [Ix; 2] = [scale_row.into(), block.into()];
                let sw = b.load(ws, &index, &[1, 1]);
                let scale = b.map(&[sx, sw], |m, v| m.mul(v[0], v[1]));
                vec![b.map(&[acc[0], partial, scale], |m, v| {
                    let scaled = m.mul(v[1], v[2]);
                    m.add(v[0], scaled)
                })]
            });
            let result = b.cast(total[0], DType::Bf16);
            b.scatter(y, to, &[n0.into()], result);
            vec![]
        });
        b.finish().expect("well-typed")
    }
}
