//! Measures what this processor can do at best: reading a working set again and again, and multiplying in registers.

use crate::limits::Limits;
use crate::pool::Pool;
use dsc_ir::DType;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// How long each measurement goes on.
const PATIENCE: Duration = Duration::from_millis(80);
/// Tasks a thread should find.
const TASKS_PER_WORKER: usize = 4;
/// Rounds of the multiplying loop in one task.
const ROUNDS: u32 = 200_000;
/// Smallest and largest buffer that is read, in bytes.
const BUFFER: (u64, u64) = (1 << 16, 1 << 30);

/// The limits of the processor with the threads of `pool`, reading `working_set` bytes: small ones stay in caches, for kernels too.
pub(crate) fn measure(pool: &mut Pool, working_set: u64) -> Limits {
    let level = Level::detect();
    let bytes = working_set.clamp(BUFFER.0, BUFFER.1);
    let buffer = vec![1u64; bytes as usize / 8];
    let tasks = (pool.workers() * TASKS_PER_WORKER) as u64;
    let chunk = buffer.len().div_ceil(tasks as usize);
    let reading = best(pool, tasks, &|_, task| {
        let from = (task as usize * chunk).min(buffer.len());
        black_box(level.sum(&buffer[from..(from + chunk).min(buffer.len())]));
    });
    let multiplying = best(pool, tasks, &|_, _| {
        black_box(level.multiply(ROUNDS));
    });
    let flop = tasks as f64 * f64::from(ROUNDS) * level.flop_a_round();
    Limits {
        bytes_per_s: buffer.len() as f64 * 8.0 / reading,
        flop_per_s: vec![(DType::F32, flop / multiplying)],
        source: format!(
            "measured: {} threads read {:.1} MB, and multiply and add f32 in registers",
            pool.workers(),
            bytes as f64 / 1e6
        ),
    }
}

/// Seconds of the fastest run.
fn best(pool: &mut Pool, tasks: u64, task: &(dyn Fn(usize, u64) + Sync)) -> f64 {
    pool.run(tasks, task);
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < PATIENCE || best.is_infinite() {
        let run = Instant::now();
        pool.run(tasks, task);
        best = best.min(run.elapsed().as_secs_f64());
    }
    best.max(1e-9)
}

/// What the loops may use.
#[derive(Clone, Copy)]
enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Base,
}

/// Independent sums: more than the latency of a multiplication times the number of multipliers.
const SUMS: usize = 12;

impl Level {
    fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Level::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Base
    }

    fn sum(self, words: &[u64]) -> u64 {
        match self {
            // SAFETY: the processor has what the function is compiled for, by `detect`.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx2 => unsafe { x86::sum(words) },
            Level::Base => sum(words),
        }
    }

    fn multiply(self, rounds: u32) -> f32 {
        match self {
            // SAFETY: the processor has what the function is compiled for, by `detect`.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { x86::multiply512(rounds) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::multiply256(rounds) },
            Level::Base => multiply(rounds),
        }
    }

    /// FLOP of one round of [`multiply`](Level::multiply).
    fn flop_a_round(self) -> f64 {
        let lanes = match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => 16,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => 8,
            Level::Base => BASE_LANES,
        };
        (2 * SUMS * lanes) as f64
    }
}

/// Lanes of the loop that the compiler vectorises for whatever the processor is.
const BASE_LANES: usize = 4;

#[inline(always)]
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in words.chunks_exact(32) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

fn multiply(rounds: u32) -> f32 {
    let (a, b) = (black_box([0.999f32; BASE_LANES]), black_box([0.001f32; BASE_LANES]));
    let mut sums = [[0.5f32; BASE_LANES]; SUMS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in 0..BASE_LANES {
                sum[lane] = sum[lane] * a[lane] + b[lane];
            }
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{SUMS, black_box};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2")]
    pub fn sum(words: &[u64]) -> u64 {
        super::sum(words)
    }

    // Loops, not closures: a closure would not be compiled for these features.
    #[target_feature(enable = "avx512f")]
    pub fn multiply512(rounds: u32) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_set1_ps(0.5); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        let mut all = 0.0;
        for sum in sums {
            all += _mm512_reduce_add_ps(sum);
        }
        all
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn multiply256(rounds: u32) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_set1_ps(0.5); SUMS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        let mut all = 0.0;
        for sum in sums {
            all += _mm_cvtss_f32(_mm256_castps256_ps128(sum));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Wide bounds: only what no processor of this century misses.
    #[test]
    fn limits_are_of_this_world() {
        let limits = measure(&mut Pool::new(2).unwrap(), 1 << 20);
        let rate = limits.flop_per_s[0].1;
        assert!((1e8..1e14).contains(&limits.bytes_per_s), "{limits:?}");
        assert!((1e8..1e14).contains(&rate), "{limits:?}");
    }
}
