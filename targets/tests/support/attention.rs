//! Tile programs of sparse attention over a latent cache, as the compiler's kernel library writes them.

use dsc_ir::tile::{Access, Builder, Ix, Program, ReduceKind, Stride, ValueId, ViewType};
use dsc_ir::{DType, Extent, Sym};

/// Attention of every token's heads over the `k` rows of a cache that its list names. `T` tokens, `C` rows in the cache.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Heads of a token.
    pub heads: u32,
    /// Heads of a block.
    pub tile: u32,
    /// Columns of the latent, which are the values too.
    pub latent: u32,
    /// Columns of the rope key.
    pub rope: u32,
    /// Entries of a list; negative ones and those past the cache are left out.
    pub k: u32,
    /// Rows of a round.
    pub keys: u32,
    /// Codes of e4m3 with a scale for each 128, instead of bf16.
    pub fp8: bool,
    /// Equal shares of the list, whose sums are stored apart.
    pub parts: Option<u32>,
    /// The list is looked through for its last entry that is not negative; what is behind is no work.
    pub searched: bool,
}

/// Columns that share a scale.
const GROUP: u32 = 128;
/// Below every score, and finite.
const LOWEST: f32 = -1e30;
/// Powers of two by which a score may be above what powers are relative to.
const FAR: f32 = 8.0;
/// Added and taken away again, it leaves the nearest integer.
const WHOLE: f32 = 12_582_912.0;

fn fixed(bytes: u32) -> Stride {
    Stride { bytes: bytes.into(), sym: None }
}

impl Attention {
    /// Bytes of a cached row.
    pub fn row_bytes(self) -> u32 {
        if self.fp8 {
            self.latent + self.latent.div_ceil(GROUP) * 4 + 2 * self.rope
        } else {
            2 * (self.latent + self.rope)
        }
    }

    /// What scores are multiplied with, log2 e included.
    pub fn scale(self) -> f32 {
        ((self.latent + self.rope) as f32).powf(-0.5) * std::f32::consts::LOG2_E
    }

    /// The program. Parameters: `q [T, heads, latent + rope]`; the cache as `latent`, (`scales`,) `rope`; `indices [T, k]`,
    /// `lengths [T]`; then `y [T, heads, latent]` and with bf16 `largest_scores [T, heads]` (in powers of two), or `sums [T, heads, parts, latent]`, `largest` and `totals [T, heads, parts]`.
    pub fn program(self, name: &str) -> Program {
        let Attention { heads, latent, rope, k, keys, .. } = self;
        let mut b = Builder::new(name);
        let q_row = 2 * (latent + rope);
        let queries = |b: &mut Builder, name: &str, columns: u32, offset: u64| {
            let view = ViewType {
                dtype: DType::Bf16,
                shape: vec![Sym::T.into(), heads.into(), columns.into()],
                strides: vec![fixed(heads * q_row), fixed(q_row), fixed(2)],
                offset,
            };
            b.param_view(name, view, Access::Read)
        };
        let (q_latent, q_rope) =
            (queries(&mut b, "q", latent, 0), queries(&mut b, "q_rope", rope, (2 * latent).into()));
        let cached = |b: &mut Builder, name: &str, dtype: DType, columns: u32, offset: u32| {
            let view = ViewType {
                dtype,
                shape: vec![Sym::C.into(), columns.into()],
                strides: vec![fixed(self.row_bytes()), fixed(dtype.bytes() as u32)],
                offset: offset.into(),
            };
            b.param_view(name, view, Access::Read)
        };
        let groups = latent.div_ceil(GROUP);
        let (codes, scales, rope_keys) = if self.fp8 {
            let codes = cached(&mut b, "latent", DType::E4m3, latent, 0);
            let scales = cached(&mut b, "scales", DType::F32, groups, latent);
            (codes, Some(scales), cached(&mut b, "rope", DType::Bf16, rope, latent + 4 * groups))
        } else {
            let keys = cached(&mut b, "latent", DType::Bf16, latent, 0);
            (keys, None, cached(&mut b, "rope", DType::Bf16, rope, 2 * latent))
        };
        let indices = b.param("indices", DType::I32, &[Sym::T.into(), k.into()], Access::Read);
        let lengths = b.param("lengths", DType::I32, &[Sym::T.into()], Access::Read);
        let by_head = |columns: Option<u32>| -> Vec<Extent> {
            let parts = self.parts.map(Extent::from);
            [Sym::T.into(), heads.into()].into_iter().chain(parts).chain(columns.map(Extent::from)).collect()
        };
        let out = if self.parts.is_some() { DType::F32 } else { DType::Bf16 };
        let y = b.param(if self.parts.is_some() { "sums" } else { "y" }, out, &by_head(Some(latent)), Access::Write);
        let row_stats = self
            .parts
            .map(|_| ["largest", "totals"].map(|name| b.param(name, DType::F32, &by_head(None), Access::Write)));
        let most = (self.parts.is_none() && !self.fp8)
            .then(|| b.param("largest_scores", DType::F32, &[Sym::T.into(), heads.into()], Access::Write));
        let (token, head) = (b.grid(Sym::T, 1), b.grid(heads, self.tile));
        let part = self.parts.map(|parts| b.grid(parts, 1));
        let h = self.tile;
        let head = scaled(&mut b, head, h);
        let query = |b: &mut Builder, view: ValueId, columns: u32| {
            let q = b.load(view, &[token.into(), head.into(), 0.into()], &[1, h, columns]);
            b.reshape(q, &[h, columns])
        };
        let (q_latent, q_rope) = (query(&mut b, q_latent, latent), query(&mut b, q_rope, rope));
        let rows = b.sym(Sym::C);
        let mut length = b.load_scalar(lengths, &[token.into()]);
        if self.searched {
            let row = b.load(indices, &[token.into(), 0.into()], &[1, k]);
            let end = last_selected(&mut b, row);
            length = b.map(&[length, end], |m, v| m.min(v[0], v[1]));
        }
        let tiles = b.map(&[length], |m, v| {
            let (most, up, n) = (m.i32(k as i32), m.i32(keys as i32 - 1), m.i32(keys as i32));
            let length = m.min(v[0], most);
            let length = m.add(length, up);
            m.div(length, n)
        });
        let (lo, hi): (Ix, Ix) = match (part, self.parts) {
            (Some(part), Some(parts)) => share(&mut b, tiles, parts, part),
            _ => (0.into(), tiles.into()),
        };
        let lowest = b.full(LOWEST, &[h, 1]);
        let mut init = vec![lowest, b.full(0.0, &[h, 1]), b.full(0.0, &[h, latent])];
        init.extend(most.map(|_| lowest));
        let done = b.for_(lo, hi, 1, &init, |b, j, carried| {
            let at = scaled(b, j, keys);
            let chosen = b.load(indices, &[token.into(), at.into()], &[1, keys]);
            let chosen = b.reshape(chosen, &[keys]);
            let numbers = b.iota(0, &[keys]);
            let slots = b.map(&[chosen, rows, numbers, at, length], |m, v| {
                let (zero, none) = (m.i32(0), m.i32(-1));
                let (from, to) = (m.le(zero, v[0]), m.lt(v[0], v[1]));
                let place = m.add(v[2], v[3]);
                let listed = m.lt(place, v[4]);
                let inside = m.and(from, to);
                let inside = m.and(inside, listed);
                m.select(inside, v[0], none)
            });
            let penalty = b.reshape(slots, &[1, keys]);
            let penalty = b.map(&[penalty], |m, v| {
                let (zero, free, none) = (m.i32(0), m.f32(0.0), m.f32(f32::NEG_INFINITY));
                let empty = m.lt(v[0], zero);
                m.select(empty, none, free)
            });
            let mut values = b.gather(codes, slots, &[0.into()], &[keys, latent]);
            if let Some(scales) = scales {
                let scales = b.gather(scales, slots, &[0.into()], &[keys, groups]);
                values = dequantised(b, values, scales);
            }
            let ropes = b.gather(rope_keys, slots, &[0.into()], &[keys, rope]);
            let scores = b.dot_t(q_latent, values, None);
            let scores = b.dot_t(q_rope, ropes, Some(scores));
            let scores = b.map(&[scores, penalty], |m, v| {
                let scale = m.f32(self.scale());
                m.fma(v[0], scale, v[1])
            });
            online_softmax(b, scores, values, self.parts.is_none(), carried)
        });
        match (row_stats, part) {
            (Some([largest, totals]), Some(part)) => {
                for (view, x) in [(largest, done[0]), (totals, done[1])] {
                    let x = b.reshape(x, &[1, h, 1]);
                    b.store(view, &[token.into(), head.into(), part.into()], x);
                }
                let x = b.reshape(done[2], &[1, h, 1, latent]);
                b.store(y, &[token.into(), head.into(), part.into(), 0.into()], x);
            }
            _ => {
                let inverse = b.map(&[done[1]], |m, v| {
                    let (zero, one) = (m.f32(0.0), m.f32(1.0));
                    let some = m.lt(zero, v[0]);
                    let total = m.select(some, v[0], one);
                    m.div(one, total)
                });
                if let Some(most) = most {
                    let x = b.reshape(done[3], &[1, h]);
                    b.store(most, &[token.into(), head.into()], x);
                }
                let out = b.map(&[done[2], inverse], |m, v| m.mul(v[0], v[1]));
                let out = b.cast(out, DType::Bf16);
                let out = b.reshape(out, &[1, h, latent]);
                b.store(y, &[token.into(), head.into(), 0.into()], out);
            }
        }
        b.finish().expect("the program is well-typed")
    }
}

/// One more than the last place of a list that is not negative.
fn last_selected(b: &mut Builder, row: ValueId) -> ValueId {
    let n = b.shape(row).iter().product();
    let row = b.reshape(row, &[n]);
    let places = b.iota(0, &[n]);
    let ends = b.map(&[row, places], |m, v| {
        let (zero, one) = (m.i32(0), m.i32(1));
        let (end, empty) = (m.add(v[1], one), m.lt(v[0], zero));
        m.select(empty, zero, end)
    });
    let end = b.reduce(ends, 0, ReduceKind::Max);
    b.reshape(end, &[])
}

fn scaled(b: &mut Builder, v: ValueId, n: u32) -> ValueId {
    b.map(&[v], |m, v| {
        let n = m.i32(n as i32);
        m.mul(v[0], n)
    })
}

/// The tiles of one of `parts` equal shares.
fn share(b: &mut Builder, tiles: ValueId, parts: u32, part: ValueId) -> (Ix, Ix) {
    let each = b.map(&[tiles], |m, v| {
        let (up, n) = (m.i32(parts as i32 - 1), m.i32(parts as i32));
        let x = m.add(v[0], up);
        m.div(x, n)
    });
    let lo = b.map(&[each, part], |m, v| m.mul(v[0], v[1]));
    let hi = b.map(&[lo, each, tiles], |m, v| {
        let end = m.add(v[0], v[1]);
        m.min(end, v[2])
    });
    (lo.into(), hi.into())
}

/// Codes times the scales of their groups, as bf16.
fn dequantised(b: &mut Builder, codes: ValueId, scales: ValueId) -> ValueId {
    let (shape, groups) = (b.shape(codes), b.shape(scales)[1]);
    let wide = b.cast(codes, DType::F32);
    let wide = b.reshape(wide, &[shape[0], groups, shape[1] / groups]);
    let scales = b.reshape(scales, &[shape[0], groups, 1]);
    let x = b.map(&[wide, scales], |m, v| m.mul(v[0], v[1]));
    let x = b.reshape(x, &shape);
    b.cast(x, DType::Bf16)
}

/// `rarely`: what powers are relative to follows the largest score only where that is far above it.
fn online_softmax(
    b: &mut Builder,
    scores: ValueId,
    values: ValueId,
    rarely: bool,
    carried: &[ValueId],
) -> Vec<ValueId> {
    let (max, total, acc) = (carried[0], carried[1], carried[2]);
    let here = b.reduce(scores, 1, ReduceKind::Max);
    let most = carried.get(3).map(|&most| b.map(&[most, here], |m, v| m.max(v[0], v[1])));
    let new_max = b.map(&[max, here], |m, v| {
        if !rarely {
            return m.max(v[0], v[1]);
        }
        let (above, far) = (m.sub(v[1], v[0]), m.f32(FAR));
        let (far, whole) = (m.lt(far, above), m.f32(WHOLE));
        let rounded = m.add(v[1], whole);
        let rounded = m.sub(rounded, whole);
        m.select(far, rounded, v[0])
    });
    let power = |m: &mut dsc_ir::tile::MapBuilder, v: &[dsc_ir::tile::MapVal]| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    };
    let alpha = b.map(&[max, new_max], power);
    let p = b.map(&[scores, new_max], power);
    let here = b.reduce(p, 1, ReduceKind::Sum);
    let total = b.map(&[total, alpha, here], |m, v| {
        let old = m.mul(v[0], v[1]);
        m.add(old, v[2])
    });
    let acc = b.map(&[acc, alpha], |m, v| m.mul(v[0], v[1]));
    let p = b.cast(p, DType::Bf16);
    [new_max, total, b.dot(p, values, Some(acc))].into_iter().chain(most).collect()
}
