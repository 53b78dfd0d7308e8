//! Schedules for AMD chips: what [`Schedule::wide`] says of tiles, and what CDNA is better served by.
//!
//! A block of four waves has one on each SIMD; of eight, two, which alternate: while one multiplies, the other brings and reads operands. Eight
//! waves of 64 x 64 results need LDS for three rounds of 256 + 128 rows of 128 bytes, 144 KB, which gfx950 has and gfx942 has not: there a round
//! of bf16 is 64 bytes a row, and four waves make 128 x 128.

use super::arch::Arch;
use dsc_ir::schedule::{KernelShape, Schedule};

/// Steps of so many tokens have tall tiles.
const LARGE: u32 = 256;

/// The schedule of a kernel of that shape in steps of at most `tokens` tokens.
pub fn choose(arch: &Arch, shape: &KernelShape, tokens: u32) -> Schedule {
    let wide = Schedule::wide(shape, tokens);
    if matches!(shape.op, "attention" | "attention_part") && !arch.cdna4 {
        // 64 KB hold 32 keys, which are a step of a matrix product; heads are in registers.
        return Schedule { tile_n: 32, ..wide };
    }
    if tokens <= 64 {
        return Schedule { near: shape.op.starts_with("expert_linear") && near(shape), ..wide };
    }
    match shape.op {
        "linear" => linear(arch, shape, tokens, wide),
        // A contraction of few rounds is not worth cutting, nor is one that pieces of four bytes are copied for.
        "head_linear" if shape.k >= 256 && arch.cdna4 => Schedule { tile_k: round(arch), ..wide },
        "expert_linear" | "expert_linear_sorted" => Schedule { dies: arch.device.dies, near: near(shape), ..wide },
        _ => wide,
    }
}

/// Elements of bf16 of a round; scale blocks say themselves how long they are.
fn round(arch: &Arch) -> u32 {
    if arch.cdna4 { 64 } else { 32 }
}

/// Whether activations of the most rows there may be, of four bytes an element at most, span less than 2 GiB.
fn near(shape: &KernelShape) -> bool {
    shape.m_max.saturating_mul(u64::from(shape.k) * 4) < 1 << 31
}

fn linear(arch: &Arch, shape: &KernelShape, tokens: u32, wide: Schedule) -> Schedule {
    let flat = Schedule { tile_k: round(arch), dies: arch.device.dies, ..wide };
    // Gate and up are two results of as many accumulators.
    let tile_m = if shape.products > 1 { 128 } else { 256 };
    let blocks = tokens.div_ceil(tile_m) * shape.n.div_ceil(128);
    if !arch.cdna4 || tokens < LARGE || shape.n < 128 || blocks < arch.device.units {
        return flat;
    }
    Schedule { tile_m, threads: 512, stages: 3, alternate: true, ..flat }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amd::arch::ARCHS;
    use dsc_ir::Sym;

    #[test]
    fn halves_alternate_where_there_is_lds_and_work_for_them() {
        let shape =
            |n, products| KernelShape { op: "linear", m: Sym::T.into(), m_max: 4096, n, k: 7168, heads: 1, products };
        let [cdna3, cdna4] = [&ARCHS[0], &ARCHS[1]];
        let of = |arch, n, products, tokens| {
            let s = choose(arch, &shape(n, products), tokens);
            (s.tile_m, s.threads, s.alternate, s.dies)
        };
        assert_eq!(of(cdna4, 7168, 1, 4096), (256, 512, true, 8));
        assert_eq!(of(cdna4, 18432, 2, 4096), (128, 512, true, 8));
        assert_eq!(of(cdna4, 256, 1, 4096), (128, 0, false, 8));
        assert_eq!(of(cdna3, 7168, 1, 4096), (128, 0, false, 8));
        assert_eq!(of(cdna4, 7168, 1, 64), (64, 0, false, 0));
        let experts = |m_max| KernelShape { op: "expert_linear", m_max, heads: 257, ..shape(4096, 2) };
        assert!(choose(cdna4, &experts(4096 * 9), 4096).near);
        assert!(!choose(cdna4, &experts(1 << 20), 1 << 16).near);
    }
}
