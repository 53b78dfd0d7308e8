//! Arithmetic on rows of numbers.

use super::super::Quant;
use super::super::weights::Real;
use crate::dtype::{DType, f32_to_e4m3, pow2_ceil};

/// Quantises one block: appends its codes, returns its scale.
pub fn quantize_block(values: impl Iterator<Item = f32> + Clone, quant: Quant, codes: &mut Vec<u8>) -> f32 {
    let largest = values.clone().fold(1e-4f32, |m, v| m.max(v.abs()));
    let exact = largest * (1.0 / 448.0f32);
    let scale = if quant.pow2 { pow2_ceil(exact) } else { exact };
    codes.extend(values.map(|v| f32_to_e4m3(v / scale)));
    scale
}

pub(super) fn sigmoid<F: Real>(x: F) -> F {
    let one = F::from_f32(1.0);
    one / (one + (F::default() - x).exp())
}

pub(super) fn sum<F: Real>(values: impl Iterator<Item = F>) -> F {
    values.fold(F::default(), |a, b| a + b)
}

/// Dot product in eight partial sums.
pub(super) fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    let mut parts = [F::default(); 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = sum(a8.remainder().iter().zip(b8.remainder()).map(|(&x, &y)| x * y));
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            parts[i] += x[i] * y[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = parts;
    ((a + b) + (c + d)) + ((e + f) + (g + h)) + rest
}

/// `y += s · x`.
pub(super) fn add_scaled<F: Real>(y: &mut [F], s: F, x: &[F]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += s * x);
}

/// `x [M, K] · wᵀ` with w `[N, K]`.
pub(super) fn matmul<F: Real>(x: &[F], w: &[F], k: usize, n: usize) -> Vec<F> {
    if k == 0 || n == 0 {
        return Vec::new();
    }
    let rows = x.len() / k;
    let mut out = vec![F::default(); rows * n];
    for (block, wb) in w.chunks(8 * k).enumerate() {
        for (m, xm) in x.chunks(k).enumerate() {
            let y = &mut out[m * n + block * 8..];
            y.iter_mut().zip(wb.chunks(k)).for_each(|(y, row)| *y = dot(xm, row));
        }
    }
    out
}

/// Each row of `columns` and one more element.
pub(super) fn appended<T: Copy>(x: &[T], columns: usize, value: T) -> Vec<T> {
    x.chunks(columns).flat_map(|row| row.iter().copied().chain([value])).collect()
}

/// The largest score of a part of an attention without keys.
pub(super) const NO_SCORE: f32 = -1e30;

pub(super) fn narrowed<F: Real>(x: F, narrow: bool) -> F {
    if narrow { x.round(DType::Bf16) } else { x }
}

/// What weights are relative to that round.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    /// The largest.
    Largest,
    /// The power of two nearest to that.
    PowerOfTwo,
}

pub(super) fn softmax<F: Real>(mut scores: Vec<F>, narrow: bool, base: Base) -> Vec<F> {
    let most = scores.iter().copied().fold(F::from_f64(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
    scores.iter_mut().for_each(|s| *s = (*s - most).exp());
    if narrow && base == Base::PowerOfTwo {
        let log = most.to_f64() * std::f64::consts::LOG2_E;
        let largest = F::from_f64((log - log.round_ties_even()).exp2());
        scores.iter_mut().for_each(|s| *s = *s * largest);
    }
    let total = sum(scores.iter().copied());
    scores.iter_mut().for_each(|s| *s = narrowed(*s, narrow) / total);
    scores
}

/// Logarithm of the sum of exponentials, and largest, of no scores.
pub(super) const NO_SUM: [f64; 2] = [f64::INFINITY, f64::NEG_INFINITY];

/// `ln Σ exp(score)`, and the largest score.
pub(super) fn log_sum<F: Real>(scores: &[F]) -> (F, F) {
    let Some(&first) = scores.first() else { return NO_SUM.map(F::from_f64).into() };
    let most = scores.iter().copied().fold(first, |a, b| if b > a { b } else { a });
    (most + sum(scores.iter().map(|&s| (s - most).exp())).ln(), most)
}

/// First or past-the-end columns of rows, of so many columns.
pub(super) fn bounds(ints: &[i32], columns: usize) -> Vec<usize> {
    ints.iter().map(|&n| usize::try_from(n).unwrap_or(0).min(columns)).collect()
}

/// Indices of the `k` largest values that `allow`s, ascending; the lowest index first among equals; never −inf or NaN.
pub(super) fn largest<F: Real>(values: &[F], k: usize, allow: impl Fn(usize) -> bool) -> Vec<usize> {
    let least = F::from_f64(f64::NEG_INFINITY);
    let mut order: Vec<usize> = (0..values.len()).filter(|&i| values[i] > least && allow(i)).collect();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Rows of a matrix with `count` rows.
pub(super) fn gather<T: Copy>(x: &[T], count: usize, rows: &[usize]) -> Vec<T> {
    let columns = x.len() / count.max(1);
    rows.iter().flat_map(|&r| &x[r * columns..][..columns]).copied().collect()
}

/// Columns `start..start + len` of each row.
pub(super) fn slice<T: Copy>(x: &[T], columns: usize, start: usize, len: usize) -> Vec<T> {
    x.chunks(columns.max(1)).flat_map(|row| &row[start..start + len]).copied().collect()
}
