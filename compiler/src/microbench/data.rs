//! Random contents of buffers: numbers of one size, so that no kernel meets an infinity, and positions that lead somewhere.

use dsc_ir::artifact::WeightEntry;
use dsc_ir::dtype::f32_to_e4m3;
use dsc_ir::graph::{Elem, PAGE_TOKENS, StateFormat, StepInput};
use dsc_ir::sample::Draw;
use dsc_ir::{DType, Sym, SymValues};

/// Bytes that repeat from `at` to `end`.
pub struct Fill {
    pub at: u64,
    pub end: u64,
    pub period: Vec<u8>,
}

/// Elements that differ, at most: odd, so that rows of a matrix do.
const PERIOD: u64 = 65_521;

/// splitmix64.
struct Rng(u64);

impl Rng {
    /// Even in −1..1.
    fn real(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn element(&mut self, dtype: DType) -> Vec<u8> {
        let x = self.real();
        match dtype {
            DType::F32 => x.to_le_bytes().to_vec(),
            DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            DType::E4m3 => vec![f32_to_e4m3(x * 100.0)],
            DType::I32 | DType::Bool => vec![0; dtype.bytes()],
        }
    }

    fn elements(&mut self, dtype: DType, n: u64) -> Vec<u8> {
        (0..n.min(PERIOD)).flat_map(|_| self.element(dtype)).collect()
    }

    /// Scales of [`DType::E4m3`] elements that make them elements of −1..1.
    fn scales(&mut self, n: u64) -> Vec<u8> {
        (0..n.min(PERIOD)).flat_map(|_| ((self.real() + 2.0) * 0.005).to_le_bytes()).collect()
    }
}

/// What a weight holds.
pub fn weight(entry: &WeightEntry, bytes: u64) -> Vec<Fill> {
    let mut rng = Rng(7);
    match (entry.elem, entry.scale_range()) {
        (Elem::Quant(_), Some(scales)) => {
            let codes = Fill { at: 0, end: entry.code_bytes(0).unwrap_or(0), period: rng.elements(DType::E4m3, bytes) };
            let period = rng.scales((scales.end - scales.start) / 4);
            vec![codes, Fill { at: scales.start, end: scales.end, period }]
        }
        (Elem::Plain(dtype), _) => {
            vec![Fill { at: 0, end: bytes, period: rng.elements(dtype, bytes / dtype.bytes() as u64) }]
        }
        (Elem::Quant(_), None) => Vec::new(),
    }
}

/// What a cache holds: pages alike.
pub fn state(format: StateFormat, bytes: u64) -> Vec<Fill> {
    let mut rng = Rng(11);
    let tokens = u64::from(PAGE_TOKENS);
    let mut page: Vec<u8> = Vec::new();
    match format {
        StateFormat::LatentFp8 { latent, rope } => {
            for _ in 0..tokens {
                let row = page.len();
                page.extend(rng.elements(DType::E4m3, latent.into()));
                page.resize(row + latent.next_multiple_of(4) as usize, 0);
                // A power of two near 1 / 100.
                page.extend((0..latent.div_ceil(StateFormat::GROUP)).flat_map(|_| 0.007_812_5f32.to_le_bytes()));
                page.extend(rng.elements(DType::Bf16, rope.into()));
                page.resize(row + format.row_bytes() as usize, 0);
            }
        }
        StateFormat::IndexFp8 { dim } => {
            for token in 1..=tokens as usize {
                page.extend(rng.elements(DType::E4m3, dim.into()));
                page.resize(token * dim.next_multiple_of(4) as usize, 0);
            }
            page.extend((0..tokens).flat_map(|_| 0.007_812_5f32.to_le_bytes()));
        }
        StateFormat::Latent { dtype, .. } | StateFormat::Index { dtype, .. } => {
            page =
                (0..u64::from(format.page_bytes()) / dtype.bytes() as u64).flat_map(|_| rng.element(dtype)).collect();
        }
    }
    vec![Fill { at: 0, end: bytes, period: page }]
}

/// What a step input holds: sequences that are equally long and whose last tokens the step feeds, pages all over the cache.
pub fn input(input: StepInput, syms: &SymValues, vocab: u32) -> Vec<u8> {
    let [tokens, sequences, pages, all_pages, context] = [Sym::T, Sym::S, Sym::P, Sym::N, Sym::C].map(|s| syms.get(s));
    let each = tokens / sequences.max(1);
    let position = |i: u32| context - each + i % each;
    let values: Vec<u32> = match input {
        StepInput::Tokens => (0..tokens).map(|i| (u64::from(i) * 2_654_435_761 % u64::from(vocab)) as u32).collect(),
        StepInput::Positions => (0..tokens).map(position).collect(),
        StepInput::Seqs => (0..tokens).map(|i| i / each).collect(),
        StepInput::Slots => {
            let slot = |i: u32| {
                let page = page(i / each * pages + position(i) / PAGE_TOKENS, all_pages);
                page * PAGE_TOKENS + position(i) % PAGE_TOKENS
            };
            (0..tokens).map(slot).collect()
        }
        StepInput::PageTable => (0..sequences * pages).map(|i| page(i, all_pages)).collect(),
        StepInput::LogitRows => (0..tokens).collect(),
        StepInput::Draws => (0..syms.get(Sym::L)).flat_map(|_| Draw::GREEDY.bits().map(|b| b as u32)).collect(),
    };
    values.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The number of the `i`-th page: each of `n` once, neighbours far apart.
fn page(i: u32, n: u32) -> u32 {
    let coprime = |step: &u64| {
        let (mut a, mut b) = (*step, u64::from(n));
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a == 1
    };
    let step = (u64::from(n) * 5 / 8 + 1..).find(coprime).unwrap_or(1);
    (u64::from(i) * step % u64::from(n.max(1))) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_used_once() {
        for n in [1, 2, 7, 64, 100] {
            let mut pages: Vec<u32> = (0..n).map(|i| page(i, n)).collect();
            pages.sort_unstable();
            assert_eq!(pages, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn pages_of_caches_are_full() {
        let formats = [
            StateFormat::LatentFp8 { latent: 200, rope: 6 },
            StateFormat::IndexFp8 { dim: 30 },
            StateFormat::Latent { latent: 3, rope: 2, dtype: DType::Bf16 },
        ];
        for format in formats {
            let page = u64::from(format.page_bytes());
            assert_eq!(state(format, 2 * page)[0].period.len() as u64, page, "{format:?}");
        }
    }
}
