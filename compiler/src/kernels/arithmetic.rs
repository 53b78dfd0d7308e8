//! Arithmetic on tiles of rows: norms, turned pairs, Hadamard transforms, quantisation.

use super::gate;
use super::view::{product, sum};
use dsc_ir::DType;
use dsc_ir::graph::Op;
use dsc_ir::tile::{Builder, MapBuilder, MapVal, ReduceKind, ValueId};

/// Rows, and contracted elements, of a matrix unit.
const UNIT: u32 = 16;
/// Longest rows that are worth a product with a matrix.
const MOST_PRODUCT: u32 = 256;

/// Ops of one tensor and parameters; none for other ops.
pub fn elementwise(b: &mut Builder, op: &Op, x: ValueId, y: Option<ValueId>, bias: Option<ValueId>) -> Option<ValueId> {
    Some(match op {
        Op::Cast => x,
        Op::Add => sum(b, x, y?),
        Op::Scale { factor } => scaled(b, x, *factor),
        Op::RmsNorm { eps } => rms_norm(b, x, y?, *eps),
        Op::LayerNorm { eps } => layer_norm(b, x, y?, bias?, *eps),
        Op::Hadamard => hadamard(b, x),
        Op::SwiGlu => b.map(&[x, y?], |m, v| {
            let s = m.sigmoid(v[0]);
            let silu = m.mul(v[0], s);
            m.mul(silu, v[1])
        }),
        Op::Sigmoid => b.map(&[x], |m, v| m.sigmoid(v[0])),
        Op::GroupTopK { groups, keep, k } => gate::group_topk(b, x, *groups, *keep, *k),
        Op::Normalize { factor, by_sum } => gate::normalize(b, x, *factor, *by_sum),
        _ => return None,
    })
}

/// Every element times that.
pub fn scaled(b: &mut Builder, x: ValueId, factor: f32) -> ValueId {
    b.map(&[x], |m, v| {
        let factor = m.f32(factor);
        m.mul(v[0], factor)
    })
}

/// Columns `start..start + len` of the last axis.
pub fn columns(b: &mut Builder, x: ValueId, start: u32, len: u32) -> ValueId {
    let mut shape = b.shape(x);
    let last = shape.len() - 1;
    if start == 0 && shape[last] == len {
        return x;
    }
    let mut offsets = vec![0; shape.len()];
    (offsets[last], shape[last]) = (start, len);
    b.slice(x, &offsets, &shape)
}

/// One of each pair `u`, `v`, turned by an angle of that cosine and sine, and rounded.
pub fn rotated(b: &mut Builder, [u, v, cos, sin]: [ValueId; 4], minus: bool, to: DType) -> ValueId {
    let x = b.map(&[u, v, cos, sin], |m, t| {
        let (u, v) = if minus { (t[0], t[1]) } else { (t[1], t[0]) };
        let (a, c) = (m.mul(u, t[2]), m.mul(v, t[3]));
        if minus { m.sub(a, c) } else { m.add(a, c) }
    });
    b.cast(x, to)
}

/// The mean of squares, or of elements, along the last axis.
fn mean(b: &mut Builder, x: ValueId) -> ValueId {
    let shape = b.shape(x);
    let total = b.reduce(x, shape.len() as u32 - 1, ReduceKind::Sum);
    scaled(b, total, 1.0 / shape[shape.len() - 1] as f32)
}

/// `1 / sqrt(v + eps)`.
fn rsqrt(b: &mut Builder, v: ValueId, eps: f32) -> ValueId {
    b.map(&[v], |m, v| {
        let (eps, one) = (m.f32(eps), m.f32(1.0));
        let shifted = m.add(v[0], eps);
        let root = m.sqrt(shifted);
        m.div(one, root)
    })
}

fn rms_norm(b: &mut Builder, x: ValueId, gain: ValueId, eps: f32) -> ValueId {
    let squares = product(b, x, x);
    let squares = mean(b, squares);
    let r = rsqrt(b, squares, eps);
    b.map(&[x, r, gain], |m, v| {
        let normed = m.mul(v[0], v[1]);
        m.mul(normed, v[2])
    })
}

fn layer_norm(b: &mut Builder, x: ValueId, gain: ValueId, bias: ValueId, eps: f32) -> ValueId {
    let center = mean(b, x);
    let centered = b.map(&[x, center], |m, v| m.sub(v[0], v[1]));
    let squares = product(b, centered, centered);
    let variance = mean(b, squares);
    let r = rsqrt(b, variance, eps);
    b.map(&[centered, r, gain, bias], |m, v| {
        let normed = m.mul(v[0], v[1]);
        let scaled = m.mul(normed, v[2]);
        m.add(scaled, v[3])
    })
}

/// Whether there are rows enough for a matrix unit.
pub fn is_product(shape: &[u32]) -> bool {
    let (&d, rows) = shape.split_last().unwrap_or((&0, &[]));
    rows.iter().product::<u32>() >= UNIT && d.is_multiple_of(UNIT) && d <= MOST_PRODUCT
}

/// What a Hadamard transform of that length is scaled by.
pub fn hadamard_scale(d: u32) -> f32 {
    f64::from(d).powf(-0.5) as f32
}

/// The matrix of a Hadamard transform: element `(i, j)` is −1 if `i & j` has an odd number of bits.
pub fn hadamard_signs(b: &mut Builder, d: u32) -> ValueId {
    let (row, column) = (b.iota(0, &[d, d]), b.iota(1, &[d, d]));
    b.map(&[row, column], |m, v| {
        let mut bits = m.and(v[0], v[1]);
        for by in (0..d.ilog2().next_power_of_two().ilog2()).rev() {
            let by = m.i32(1 << by);
            let upper = m.shr(bits, by);
            bits = m.xor(bits, upper);
        }
        let one = m.i32(1);
        let last = m.and(bits, one);
        let odd = m.eq(last, one);
        let (minus, plus) = (m.f32(-1.0), m.f32(1.0));
        let sign = m.select(odd, minus, plus);
        m.cast(sign, DType::Bf16)
    })
}

/// Butterflies over the last axis: stage `h` pairs elements `h` apart.
fn hadamard(b: &mut Builder, x: ValueId) -> ValueId {
    let shape = b.shape(x);
    let d = shape[shape.len() - 1];
    let rows: u32 = shape[..shape.len() - 1].iter().product();
    let mut y = x;
    for h in (0..d.ilog2()).map(|i| 1 << i) {
        y = b.reshape(y, &[rows, d / (2 * h), 2, h]);
        let half = |b: &mut Builder, i: u32| b.slice(y, &[0, 0, i, 0], &[rows, d / (2 * h), 1, h]);
        let (u, v) = (half(b, 0), half(b, 1));
        let (plus, minus) = (sum(b, u, v), b.map(&[u, v], |m, v| m.sub(v[0], v[1])));
        y = b.concat(&[plus, minus], 2);
    }
    let y = scaled(b, y, hadamard_scale(d));
    b.reshape(y, &shape)
}

/// `[.., D]` as `[.., groups, n]`, padded with zeros.
fn grouped(b: &mut Builder, x: ValueId, n: u32) -> ValueId {
    let mut shape = b.shape(x);
    let last = shape.len() - 1;
    let d = shape[last];
    let mut x = x;
    if !d.is_multiple_of(n) {
        shape[last] = d.next_multiple_of(n) - d;
        let pad = b.full(0.0, &shape);
        x = b.concat(&[x, pad], last as u32);
    }
    shape[last] = d.div_ceil(n);
    shape.push(n);
    b.reshape(x, &shape)
}

/// Undoes [`grouped`].
fn ungrouped(b: &mut Builder, x: ValueId, shape: &[u32]) -> ValueId {
    let (mut padded, last) = (b.shape(x), shape.len() - 1);
    let n = padded.pop().unwrap_or(1);
    padded[last] *= n;
    let x = b.reshape(x, &padded);
    columns(b, x, 0, shape[last])
}

/// e4m3 codes and f32 scales `[.., groups]` of an f32 tile, by groups of `n` along the last axis (facts 4.1).
pub fn quantize(b: &mut Builder, x: ValueId, n: u32, pow2: bool) -> (ValueId, ValueId) {
    let shape = b.shape(x);
    let n = n.min(shape[shape.len() - 1]);
    // Of heads that are a group each, a matrix: what a product leaves in registers is reduced there.
    let apart = shape.len() > 2 && shape[shape.len() - 1] == n;
    let groups = if apart { b.reshape(x, &[shape[..shape.len() - 1].iter().product(), n]) } else { grouped(b, x, n) };
    let rank = b.shape(groups).len() as u32;
    let magnitude = b.map(&[groups], |m, v| m.abs(v[0]));
    let amax = b.reduce(magnitude, rank - 1, ReduceKind::Max);
    let scale = |m: &mut MapBuilder, amax: MapVal| {
        let (floor, inverse) = (m.f32(1e-4), m.f32(f32::from_bits(0x3b12_4925)));
        let amax = m.max(amax, floor);
        let scale = m.mul(amax, inverse);
        if pow2 { m.pow2_ceil(scale) } else { scale }
    };
    let scales = b.map(&[amax], |m, v| scale(m, v[0]));
    // What a power of two divides, its reciprocal multiplies to the same bits: no division for each element.
    let factors = pow2.then(|| {
        b.map(&[amax], |m, v| {
            let scale = scale(m, v[0]);
            m.pow2_reciprocal(scale)
        })
    });
    let codes = b.map(&[groups, factors.unwrap_or(scales)], |m, v| {
        let scaled = if pow2 { m.mul(v[0], v[1]) } else { m.div(v[0], v[1]) };
        m.cast(scaled, DType::E4m3)
    });
    let codes = if apart { b.reshape(codes, &shape) } else { ungrouped(b, codes, &shape) };
    let mut scale_shape = shape;
    if let Some(last) = scale_shape.last_mut() {
        *last = last.div_ceil(n);
    }
    let scales = b.reshape(scales, &scale_shape);
    (codes, scales)
}

/// f32 codes `[.., D]` times scales `[.., groups]` of `n` columns each.
pub fn dequantize(b: &mut Builder, codes: ValueId, scales: ValueId, n: u32) -> ValueId {
    let shape = b.shape(codes);
    if b.shape(scales).last() == Some(&1) {
        return product(b, codes, scales);
    }
    let groups = grouped(b, codes, n);
    let mut scale_shape = b.shape(scales);
    scale_shape.push(1);
    let scales = b.reshape(scales, &scale_shape);
    let x = product(b, groups, scales);
    ungrouped(b, x, &shape)
}
