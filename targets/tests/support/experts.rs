//! Tile programs of grouped matrix products, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Ix, Program, ReduceKind, ValueId};
use dsc_ir::{DType, Sym};

/// Rows of a tile that can be left out together.
const GRAIN: u32 = 64;

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
    /// Blocks that take turns at the tiles of an expert's rows.
    pub parts: u32,
    /// Whether those have an axis of the grid of their own, and the tiles of an expert about as many rows each.
    pub apart: bool,
    /// Whether a weight has gate and up, `n` rows each, and the result is `silu(gate) · up` in e4m3, with a scale for every row of a tile.
    pub glu: bool,
    /// Whether rows of `x` lie in the order of the experts, so that nothing is gathered.
    pub sorted: bool,
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
        let Experts { experts, per_token, n, k, tile: [tm, tn], parts, apart, glu, sorted } = self;
        let w_rows = if glu { 2 * n } else { n };
        let (blocks, scale_rows) = (k.div_ceil(128), w_rows.div_ceil(128));
        let tokens = if per_token > 0 && !sorted { Sym::T } else { Sym::L };
        let mut b = Builder::new(name);
        let x = b.param("x", DType::E4m3, &[tokens.into(), k.into()], Access::Read);
        let w = b.param("w", DType::E4m3, &[(experts * w_rows).into(), k.into()], Access::Constant);
        let xs = b.param("x_scales", DType::F32, &[tokens.into(), blocks.into()], Access::Read);
        let ws = b.param("w_scales", DType::F32, &[(experts * scale_rows).into(), blocks.into()], Access::Constant);
        let orders = b.param("order", DType::I32, &[Sym::L.into()], Access::Read);
        let bounds = b.param("offsets", DType::I32, &[(experts + 1).into()], Access::Read);
        let out = if glu { DType::E4m3 } else { DType::Bf16 };
        let y = b.param("y", out, &[Sym::L.into(), n.into()], Access::Write);
        let y_scales =
            glu.then(|| b.param("y_scales", DType::F32, &[Sym::L.into(), n.div_ceil(tn).into()], Access::Write));
        let columns = n.div_ceil(tn);
        // Parts next to one another, so that they find the expert's weights in the cache; or behind one another, all columns each.
        let first_axis = b.grid(if apart { columns } else { columns * parts }, 1);
        let own_axis = apart.then(|| b.grid(parts, 1));
        let expert = b.grid(experts, 1);
        let (group, part) = match own_axis {
            Some(part) => (first_axis, part),
            None => {
                let part = arithmetic(&mut b, first_axis, parts, |m, v| m.rem(v[0], v[1]));
                (arithmetic(&mut b, first_axis, parts, |m, v| m.div(v[0], v[1])), part)
            }
        };
        let n0 = arithmetic(&mut b, group, tn, |m, v| m.mul(v[0], v[1]));
        let row = arithmetic(&mut b, expert, w_rows, |m, v| m.mul(v[0], v[1]));
        let row = b.map(&[row, n0], |m, v| m.add(v[0], v[1]));
        let first_scale = arithmetic(&mut b, expert, scale_rows, |m, v| m.mul(v[0], v[1]));
        let lo = b.load_scalar(bounds, &[expert.into()]);
        let next = arithmetic(&mut b, expert, 1, |m, v| m.add(v[0], v[1]));
        let hi = b.load_scalar(bounds, &[next.into()]);
        // Where the last tile starts at the latest, so that it has not much less to do than the others.
        let latest = (apart && tm > 2 * GRAIN).then(|| {
            b.map(&[lo, hi], |m, v| {
                let [up, grain, least] = [GRAIN - 1, GRAIN, (tm / 2).next_multiple_of(GRAIN)].map(|n| m.i32(n as i32));
                let rows = m.sub(v[1], v[0]);
                let rows = m.add(rows, up);
                let rows = m.div(rows, grain);
                let rows = m.mul(rows, grain);
                let last = m.sub(rows, least);
                let zero = m.i32(0);
                let last = m.max(last, zero);
                m.add(v[0], last)
            })
        });
        let first = arithmetic(&mut b, part, tm, |m, v| m.mul(v[0], v[1]));
        let start = b.map(&[lo, first], |m, v| m.add(v[0], v[1]));
        b.for_(start, hi, tm * parts, &[], |b, at, _| {
            let (first, hi) = match latest {
                Some(latest) => {
                    let first = b.map(&[at, latest], |m, v| m.min(v[0], v[1]));
                    let next = arithmetic(b, at, tm, |m, v| m.add(v[0], v[1]));
                    let end = b.map(&[next, latest, hi], |m, v| {
                        let more = m.lt(v[0], v[2]);
                        let end = m.min(v[0], v[1]);
                        m.select(more, end, v[2])
                    });
                    (first, end)
                }
                None => (at, hi),
            };
            let counted = b.iota(0, &[tm]);
            let place = b.map(&[counted, first], |m, v| m.add(v[0], v[1]));
            let order = b.load(orders, &[first.into()], &[tm]);
            let below = |b: &mut Builder, v: ValueId| {
                b.map(&[v, place, hi], |m, v| {
                    let none = m.i32(-1);
                    let inside = m.lt(v[1], v[2]);
                    m.select(inside, v[0], none)
                })
            };
            let to = below(b, order);
            let from = (!sorted).then(|| {
                let source =
                    if per_token > 0 { arithmetic(b, order, per_token, |m, v| m.div(v[0], v[1])) } else { order };
                below(b, source)
            });
            let offsets = if glu { vec![0, n] } else { vec![0] };
            let zeros: Vec<ValueId> = offsets.iter().map(|_| b.full(0.0, &[tm, tn])).collect();
            let totals = b.for_(0, blocks, 1, &zeros, |b, block, accs| {
                let at = arithmetic(b, block, 128, |m, v| m.mul(v[0], v[1]));
                let left = match from {
                    None => b.load(x, &[first.into(), at.into()], &[tm, 128]),
                    Some(from) => b.gather(x, from, &[at.into()], &[tm, 128]),
                };
                let rights: Vec<ValueId> =
                    offsets.iter().map(|&o| arithmetic(b, row, o, |m, v| m.add(v[0], v[1]))).collect();
                let rights: Vec<ValueId> =
                    rights.into_iter().map(|r| b.load(w, &[r.into(), at.into()], &[tn, 128])).collect();
                let partials: Vec<ValueId> = rights.into_iter().map(|r| b.dot_t(left, r, None)).collect();
                let sx = match from {
                    None => b.load(xs, &[first.into(), block.into()], &[tm, 1]),
                    Some(from) => b.gather(xs, from, &[block.into()], &[tm, 1]),
                };
                let mut sums = Vec::new();
                for (i, &offset) in offsets.iter().enumerate() {
                    let column = arithmetic(b, n0, offset, |m, v| m.add(v[0], v[1]));
                    let scale_row = arithmetic(b, column, 128, |m, v| m.div(v[0], v[1]));
                    let scale_row = b.map(&[scale_row, first_scale], |m, v| m.add(v[0], v[1]));
                    let index: [Ix; 2] = [scale_row.into(), block.into()];
                    let sw = b.load(ws, &index, &[1, 1]);
                    let scale = b.map(&[sx, sw], |m, v| m.mul(v[0], v[1]));
                    sums.push(b.map(&[accs[i], partials[i], scale], |m, v| {
                        let scaled = m.mul(v[1], v[2]);
                        m.add(v[0], scaled)
                    }));
                }
                sums
            });
            let (&[result] | &[_, result]) = totals.as_slice() else { unreachable!("one product or two") };
            let Some(y_scales) = y_scales else {
                let result = b.cast(result, DType::Bf16);
                b.scatter(y, to, &[n0.into()], result);
                return vec![];
            };
            let product = b.map(&[totals[0], result], |m, v| {
                let s = m.sigmoid(v[0]);
                let silu = m.mul(v[0], s);
                m.mul(silu, v[1])
            });
            let groups = b.reshape(product, &[tm, 1, tn]);
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
            let codes = b.reshape(codes, &[tm, tn]);
            let scale = b.reshape(scale, &[tm, 1]);
            b.scatter(y_scales, to, &[group.into()], scale);
            b.scatter(y, to, &[n0.into()], codes);
            vec![]
        });
        b.finish().expect("well-typed")
    }
}
