//! Softmax in powers of two as the keys come, and what is kept of it: shared by every form of attention.

use super::view::{Emit, product};
use super::{KernelError, Part};
use dsc_ir::DType;
use dsc_ir::tile::{Builder, MapBuilder, MapVal, ReduceKind, ValueId};

/// Below every score: a finite stand-in for −inf whose differences are not NaN.
pub(super) const LOWEST: f32 = -1e30;

/// Powers of two by which a score may be above the base of a softmax.
const FAR: f32 = 8.0;

/// Added and taken away again, it leaves the nearest integer.
const WHOLE: f32 = 12_582_912.0;

/// `2^(x − base)`.
fn power(b: &mut Builder, x: ValueId, base: ValueId) -> ValueId {
    b.map(&[x, base], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    })
}

/// When the base of a softmax becomes the largest score so far.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// In every round: the base is the largest score.
    Always,
    /// Where that is [`FAR`] above it: the nearest integer. Rescaling what was added before is then work of few rounds, and nothing overflows; and as
    /// bases differ by whole numbers, parts of the keys round their weights as all of them would.
    Rarely,
}

/// One step of a softmax in powers of two: scores `[h, n]` and values `[n, l]` join (base, sum, accumulator), and a fourth, the largest score,
/// where that is wanted and the base may be another. Powers are relative to the base. With `narrow`, probabilities round to the type of the
/// values before they multiply them.
pub(super) fn online_softmax(
    b: &mut Builder,
    scores: ValueId,
    values: ValueId,
    narrow: bool,
    follow: Follow,
    carried: &[ValueId],
) -> Vec<ValueId> {
    let (base, total, acc) = (carried[0], carried[1], carried[2]);
    let here = b.reduce(scores, 1, ReduceKind::Max);
    let most = carried.get(3).map(|&most| b.map(&[most, here], |m, v| m.max(v[0], v[1])));
    let next = b.map(&[base, here], |m, v| {
        if follow == Follow::Always {
            return m.max(v[0], v[1]);
        }
        let (above, far) = (m.sub(v[1], v[0]), m.f32(FAR));
        let (far, whole) = (m.lt(far, above), m.f32(WHOLE));
        let rounded = m.add(v[1], whole);
        let rounded = m.sub(rounded, whole);
        m.select(far, rounded, v[0])
    });
    let alpha = power(b, base, next);
    let p = power(b, scores, next);
    let here = b.reduce(p, 1, ReduceKind::Sum);
    let total = b.map(&[total, alpha, here], |m, v| {
        let old = m.mul(v[0], v[1]);
        m.add(old, v[2])
    });
    let acc = product(b, acc, alpha);
    let to = if narrow { b.dtype(values) } else { DType::F32 };
    let p = b.cast(p, to);
    [next, total, b.dot(p, values, Some(acc))].into_iter().chain(most).collect()
}

/// `acc / total`; zero where nothing was selected.
pub(super) fn normalized(b: &mut Builder, total: ValueId, acc: ValueId) -> ValueId {
    let inverse = b.map(&[total], |m, v| {
        let (zero, one) = (m.f32(0.0), m.f32(1.0));
        let some = m.lt(zero, v[0]);
        let total = m.select(some, v[0], one);
        m.div(one, total)
    });
    product(b, acc, inverse)
}

/// Parameters of the further outputs of attention that are declared; `output` says which output of the node one is.
pub(super) fn statistics(
    e: &mut Emit,
    output: impl Fn(u32) -> Option<u32>,
) -> Result<[Option<ValueId>; 2], KernelError> {
    let mut write = |i: u32, name: &str| output(i).map(|o| e.write(name, o, Part::Data, None)).transpose();
    Ok([write(1, "log_sums")?, write(2, "largest_scores")?])
}

/// Stores them for a tile of heads of a token: of `base` and `largest`, `[h, 1]` in units of ln 2, the largest scores and what they were
/// sums of powers of two relative to.
pub(super) fn store_statistics(
    b: &mut Builder,
    to: [Option<ValueId>; 2],
    (token, head): (ValueId, ValueId),
    [base, largest]: [ValueId; 2],
    totals: ValueId,
) {
    let heads = b.shape(largest)[0];
    let put = |b: &mut Builder, view: Option<ValueId>, x: ValueId| {
        let Some(view) = view else { return };
        let x = b.reshape(x, &[1, heads]);
        b.store(view, &[token.into(), head.into()], x);
    };
    if to[0].is_some() {
        let logs = b.map(&[base, totals], |m, v| {
            let (zero, none, ln_2) = (m.f32(0.0), m.f32(f32::INFINITY), m.f32(std::f32::consts::LN_2));
            let log = log2(m, v[1]);
            let log = m.add(v[0], log);
            let (log, some) = (m.mul(log, ln_2), m.lt(zero, v[1]));
            m.select(some, log, none)
        });
        put(b, to[0], logs);
    }
    if to[1].is_some() {
        let most = b.map(&[largest, totals], |m, v| {
            let (zero, none, ln_2) = (m.f32(0.0), m.f32(f32::NEG_INFINITY), m.f32(std::f32::consts::LN_2));
            let (most, some) = (m.mul(v[0], ln_2), m.lt(zero, v[1]));
            m.select(some, most, none)
        });
        put(b, to[1], most);
    }
}

/// log2 of a normal number of at least 0.71: its exponent, and of what is left, `f` in √½..√2, the odd series
/// `2 / ln 2 · atanh((f − 1) / (f + 1))` up to the ninth power (the next term is below 4e-9).
fn log2(m: &mut MapBuilder, x: MapVal) -> MapVal {
    const SQRT_HALF: i32 = 0x3f35_04f3;
    let (bits, half, shift) = (m.bitcast(x, DType::I32), m.i32(SQRT_HALF), m.i32(23));
    let above = m.sub(bits, half);
    let exponent = m.shr(above, shift);
    let scaled = m.shl(exponent, shift);
    let rest = m.sub(bits, scaled);
    let f = m.bitcast(rest, DType::F32);
    let one = m.f32(1.0);
    let (below, sum) = (m.sub(f, one), m.add(f, one));
    let s = m.div(below, sum);
    let z = m.mul(s, s);
    let mut p = m.f32(2.0 * std::f32::consts::LOG2_E / 9.0);
    for n in [7.0, 5.0, 3.0, 1.0] {
        let c = m.f32(2.0 * std::f32::consts::LOG2_E / n);
        p = m.fma(p, z, c);
    }
    let exponent = m.cast(exponent, DType::F32);
    m.fma(p, s, exponent)
}
