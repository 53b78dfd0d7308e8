//! Made-up weights: plausible in size, the same for the same seed and name, and fast to make in any amount.
//!
//! A matrix repeats one block of random values from a place that its name gives. The block's length has a large prime factor, so
//! rows of a matrix differ. Activations keep their size through the model: a matrix of `k` columns has elements of variance
//! `1/k`, by its values or, if it is quantised, by its scales.

use super::PIECE_BYTES;
use super::pieces::{Cutter, Work, store};
use dsc_ir::DType;
use dsc_ir::artifact::{SCALE_ALIGN, WeightEntry, WeightSource};
use dsc_ir::graph::Elem;
use std::collections::BTreeMap;
use std::ops::Range;

/// Elements a block is rotated by, so that copies stay aligned.
const STEP: usize = 16;
/// Elements of a block: [`STEP`] times the largest prime below 2^16.
const BLOCK_ELEMENTS: usize = STEP * 65521;
/// Standard deviation of e4m3 codes, a power of two: far from both ends of their range.
const CODE_DEVIATION: f32 = 64.0;

/// What elements a block has: their type, and the columns of the matrix, or 0 for codes that have scales.
type Kind = (DType, u32);

/// Makes up the weights of a model.
pub(super) struct Random {
    seed: u64,
    blocks: BTreeMap<Kind, Vec<u8>>,
}

/// A block of random values, repeated from a place in it.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    /// The block.
    pub(crate) bytes: &'a [u8],
    /// Its byte that comes first.
    first: usize,
}

impl Block<'_> {
    /// The next `bytes` bytes: ranges of the block, each with its place from the start.
    pub(crate) fn ranges(&self, bytes: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        let (length, first) = (self.bytes.len(), self.first);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (first + at) % length;
            let count = (length - start).min(bytes - at);
            let range = (at, start..start + count);
            at += count;
            (count > 0).then_some(range)
        })
    }
}

/// Random values that are computed one by one: `middle` plus a normal deviate times `deviation`, or with `powers` the power of two
/// `middle` or half of it.
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    seed: u64,
    middle: f32,
    deviation: f32,
    powers: bool,
}

impl Sequence {
    /// Element `i`.
    pub(super) fn at(&self, i: u64) -> f32 {
        let bits = mix(self.seed.wrapping_add(i));
        match self.powers {
            true if bits & 1 == 1 => self.middle / 2.0,
            true => self.middle,
            false => self.middle + self.deviation * normal(bits),
        }
    }
}

/// Spreads the bits of a counter (splitmix64).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// About normal, of mean 0 and variance 1, at most 3.5: the sum of four uniform values.
fn normal(bits: u64) -> f32 {
    let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
    (sum as f32 / 65535.0 - 2.0) * 3f32.sqrt()
}

fn columns(entry: &WeightEntry) -> u32 {
    entry.shape.last().copied().unwrap_or(1).max(1)
}

/// The kind of block a matrix repeats; none for vectors and for integers.
fn kind(entry: &WeightEntry) -> Option<Kind> {
    if entry.shape.len() < 2 || !matches!(entry.source, WeightSource::Tensors(_)) {
        return None;
    }
    match entry.elem {
        Elem::Quant(_) => Some((DType::E4m3, 0)),
        Elem::Plain(DType::I32 | DType::Bool) => None,
        Elem::Plain(dtype) => Some((dtype, columns(entry))),
    }
}

impl Random {
    pub(super) fn new(entries: &[WeightEntry], seed: u64) -> Random {
        let mut blocks = BTreeMap::new();
        for kind in entries.iter().filter_map(kind) {
            blocks.entry(kind).or_insert_with(|| block(seed, kind));
        }
        Random { seed, blocks }
    }

    /// Cuts a weight that a checkpoint would give.
    pub(super) fn cut<'a>(&'a self, entry: &WeightEntry, cut: &mut Cutter<'a>) {
        let elements: usize = entry.shape.iter().map(|&n| n as usize).product();
        let seed = name_seed(self.seed, &entry.name);
        let block = kind(entry).and_then(|(dtype, columns)| Some((dtype, self.blocks.get(&(dtype, columns))?)));
        match (block, entry.elem) {
            (Some((dtype, bytes)), _) => {
                let first = (seed as usize % (BLOCK_ELEMENTS / STEP)) * STEP * dtype.bytes();
                let length = bytes.len();
                cut.rows(elements * dtype.bytes(), 1, |at| Work::Block(Block { bytes, first: (first + at) % length }));
            }
            (None, Elem::Plain(DType::I32 | DType::Bool)) => {
                // Integers are tables of indices: of those, zero is always one.
                let zeros = Sequence { seed, middle: 0.0, deviation: 0.0, powers: false };
                cut.rows(elements, 4, |i| Work::Sequence(zeros, i, DType::F32));
            }
            (None, elem) => {
                let middle = if entry.name.contains("bias") { 0.0 } else { 1.0 };
                let values = Sequence { seed, middle, deviation: 0.02, powers: false };
                let dtype = match elem {
                    Elem::Plain(dtype) => dtype,
                    Elem::Quant(_) => DType::E4m3,
                };
                cut.rows(elements, dtype.bytes(), |i| Work::Sequence(values, i, dtype));
            }
        }
        if let Some(range) = entry.scale_range() {
            cut.align(SCALE_ALIGN as usize);
            let scales = Sequence { seed: mix(seed), middle: scale(columns(entry)), deviation: 0.0, powers: true };
            let count = ((range.end - range.start) / 4) as usize;
            cut.rows(count, 4, |i| Work::Sequence(scales, i, DType::F32));
        }
    }
}

/// The power of two that gives codes about the deviation `columns^-0.5`.
fn scale(columns: u32) -> f32 {
    (-0.5 * (columns as f32).log2()).round().exp2() / CODE_DEVIATION
}

fn name_seed(seed: u64, name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let first = hash.as_bytes()[..8].iter().fold(0, |n, &b| n << 8 | u64::from(b));
    mix(first ^ mix(seed))
}

/// A block of one kind.
fn block(seed: u64, (dtype, columns): Kind) -> Vec<u8> {
    let deviation = if columns == 0 { CODE_DEVIATION } else { (columns as f32).powf(-0.5) };
    let seed = mix(seed ^ (u64::from(columns) << 8) ^ dtype as u64);
    let values = Sequence { seed, middle: 0.0, deviation, powers: false };
    let mut bytes = vec![0; BLOCK_ELEMENTS * dtype.bytes()];
    let mut row = Vec::new();
    let step = PIECE_BYTES / dtype.bytes();
    for (i, dest) in bytes.chunks_mut(step * dtype.bytes()).enumerate() {
        row.clear();
        row.extend((0..dest.len() / dtype.bytes()).map(|j| values.at((i * step + j) as u64)));
        store(&row, dtype, dest);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use crate::weights::Weights;
    use dsc_ir::DType;
    use dsc_ir::artifact::{WeightEntry, WeightSource};
    use dsc_ir::dtype::e4m3_to_f32;
    use dsc_ir::graph::{Elem, Quant};

    fn entry(name: &str, shape: &[u32], elem: Elem) -> WeightEntry {
        WeightEntry { name: name.into(), shape: shape.to_vec(), elem, source: WeightSource::Tensors(Vec::new()) }
    }

    fn made(entries: &[WeightEntry], seed: u64) -> Weights {
        let mut weights = Weights::random(entries, seed, 8).unwrap();
        weights.make(2, &|_, _| {}).unwrap();
        weights
    }

    fn f32s(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn sizes_are_kept_through_a_matrix() {
        let quant = Elem::Quant(Quant { block: [128, 128], pow2: true });
        let entries = [
            entry("a", &[3, 700, 2048], quant),
            entry("b", &[1000, 512], Elem::Plain(DType::Bf16)),
            entry("norm", &[512], Elem::Plain(DType::F32)),
            entry("gate.bias", &[512], Elem::Plain(DType::F32)),
        ];
        let weights = made(&entries, 1);
        let a = weights.bytes(0);
        let scales = f32s(&a[entries[0].scale_range().unwrap().start as usize..]);
        assert_eq!(scales.len(), 3 * 6 * 16);
        assert!(scales.iter().all(|s| s.to_bits() & 0x7f_ffff == 0) && scales.windows(2).any(|w| w[0] != w[1]));
        let square = |codes: &[u8], scale: f32| codes.iter().map(|&c| (e4m3_to_f32(c) * scale).powi(2)).sum::<f32>();
        let row = square(&a[..2048], scales.iter().copied().fold(0.0, f32::max));
        assert!((0.4..2.5).contains(&row), "{row}");
        let b: f32 = weights
            .bytes(1)
            .chunks_exact(2)
            .take(512)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32().powi(2))
            .sum();
        assert!((0.8..1.2).contains(&b), "{b}");
        assert!(f32s(weights.bytes(2)).iter().all(|x| (0.9..1.1).contains(x)));
        assert!(f32s(weights.bytes(3)).iter().all(|x| x.abs() < 0.1));
        // No row comes twice.
        let rows: std::collections::BTreeSet<&[u8]> = a[..3 * 700 * 2048].chunks_exact(2048).collect();
        assert_eq!(rows.len(), 2100);
    }

    #[test]
    fn seed_and_name_decide() {
        let plain = Elem::Plain(DType::Bf16);
        let entries = [entry("a", &[64, 64], plain), entry("b", &[64, 64], plain)];
        let (one, again, other) = (made(&entries, 1), made(&entries, 1), made(&entries, 2));
        assert!(one.bytes(0) == again.bytes(0) && one.bytes(0) != one.bytes(1) && one.bytes(0) != other.bytes(0));
    }
}
