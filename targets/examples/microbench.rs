//! Speed of the CPU target's hot code on one core: `cargo run --release -p dsc-targets --example microbench`.
//!
//! Each line is one kernel: the best of several timings, as GFLOP/s (or GB/s where memory is what counts), and as a share of what
//! the core's two multipliers can do at the clock measured by a chain of dependent additions.

#[path = "../tests/support/mod.rs"]
mod support;

use dsc_ir::extent::Sym;
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Program, ReduceKind, ValueId};
use dsc_ir::{DType, SymValues};
use dsc_targets::cpu::{CpuTarget, Level};
use dsc_targets::{Kernel, Target};
use std::time::Instant;
use support::Mapped;

fn scaled(b: &mut Builder, v: ValueId, by: u32) -> ValueId {
    b.map(&[v], |m, v| {
        let r = m.i32(by as i32);
        m.mul(v[0], r)
    })
}

/// `y[T, n] = x[T, k] wᵀ` (or `w`) in tiles.
fn matmul(n: u32, k: u32, (tm, tn, tk): (u32, u32, u32), dtype: DType, trans: bool) -> Program {
    let mut b = Builder::new("matmul");
    let x = b.param("x", DType::F32, &[Sym::T.into(), k.into()], Access::Read);
    let w_shape = if trans { [n.into(), k.into()] } else { [k.into(), n.into()] };
    let w = b.param("w", dtype, &w_shape, Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), n.into()], Access::Write);
    let (bm, bn) = (b.grid(Sym::T, tm), b.grid(n, tn));
    let (row, col) = (scaled(&mut b, bm, tm), scaled(&mut b, bn, tn));
    let zero = b.full(0.0, &[tm, tn]);
    let acc = b.for_(0, k, tk, &[zero], |b, i, acc| {
        let a = b.load(x, &[row.into(), i.into()], &[tm, tk]);
        if trans {
            let w = b.load(w, &[col.into(), i.into()], &[tn, tk]);
            vec![b.dot_t(a, w, Some(acc[0]))]
        } else {
            let w = b.load(w, &[i.into(), col.into()], &[tk, tn]);
            vec![b.dot(a, w, Some(acc[0]))]
        }
    });
    b.store(y, &[row.into(), col.into()], acc[0]);
    b.finish().expect("the program is well-typed")
}

/// `softmax(x)` of rows.
fn softmax(cols: u32) -> Program {
    let mut b = Builder::new("softmax");
    let x = b.param("x", DType::F32, &[Sym::T.into(), cols.into()], Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), cols.into()], Access::Write);
    let row = b.grid(Sym::T, 1);
    let at = [row.into(), 0.into()];
    let tile = b.load(x, &at, &[1, cols]);
    let top = b.reduce(tile, 1, ReduceKind::Max);
    let e = b.map(&[tile, top], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    });
    let sum = b.reduce(e, 1, ReduceKind::Sum);
    let out = b.map(&[e, sum], |m, v| m.div(v[0], v[1]));
    b.store(y, &at, out);
    b.finish().expect("the program is well-typed")
}

fn topk(n: u32, chunk: u32, k: u32) -> Program {
    let mut b = Builder::new("topk");
    let x = b.param("x", DType::F32, &[Sym::T.into(), n.into()], Access::Read);
    let y = b.param("y", DType::I32, &[Sym::T.into(), k.into()], Access::Write);
    let row = b.grid(Sym::T, 1);
    let state = b.topk_init(1, k);
    let out = b.for_(0, n, chunk, &[state], |b, at, s| {
        let tile = b.load(x, &[row.into(), at.into()], &[1, chunk]);
        vec![b.topk_push(s[0], tile, at)]
    });
    let (_, numbers) = b.topk_take(out[0]);
    b.store(y, &[row.into(), 0.into()], numbers);
    b.finish().expect("the program is well-typed")
}

/// Seconds of the best run.
fn best(level: Level, program: &Program, t: u32, buffers: &mut [Vec<u8>]) -> f64 {
    let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
    let module = CpuTarget::new(level).compile(&[kernel]).expect("the program compiles");
    let scratch_bytes = module.kernels[0].scratch_bytes as usize;
    let mapped = Mapped::new(module);
    let mut scratch = vec![0u8; scratch_bytes + 64];
    let offset = scratch.as_ptr().align_offset(64);
    let syms = SymValues::default().with(Sym::T, t);
    let blocks: u64 = program.grid.iter().map(|g| g.eval(&syms)).product();
    let args: Vec<*mut u8> = buffers.iter_mut().map(|b| b.as_mut_ptr()).collect();
    mapped.call(0, &args, &syms, 0, blocks);
    let mut fastest = f64::MAX;
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < 0.5 {
        let start = Instant::now();
        mapped.call_with(0, &args, &syms, scratch[offset..].as_mut_ptr(), 0, blocks);
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    fastest
}

fn floats(elements: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..elements).flat_map(|_| next().to_le_bytes()).collect()
}

/// Cycles a second, from a chain of additions that take one each.
fn clock() -> f64 {
    let mut best = 0f64;
    for _ in 0..5 {
        let start = Instant::now();
        let mut x = 1u64;
        for _ in 0..20_000_000u64 {
            x = std::hint::black_box(x.wrapping_add(1));
            x ^= x << 1;
        }
        std::hint::black_box(x);
        best = best.max(20e6 / start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    println!(
        "{:.2} G dependent steps a second (a memory round trip, an addition and two more operations each)",
        clock() / 1e9
    );
    let levels: &[Level] = match Level::host() {
        Some(Level::V4) => &[Level::V4, Level::V3],
        Some(Level::V3) => &[Level::V3],
        None => &[],
    };
    for &level in levels {
        println!("{level:?}");
        let gemm = |name: &str, t: u32, n: u32, k: u32, tile: (u32, u32, u32), dtype: DType, trans: bool| {
            let program = matmul(n, k, tile, dtype, trans);
            let weights = floats((n * k) as usize)[..(n * k) as usize * dtype.bytes()].to_vec();
            let weight_bytes = weights.len() as f64;
            let mut buffers = [floats((t * k) as usize), weights, floats((t * n) as usize)];
            let seconds = best(level, &program, t, &mut buffers);
            let flops = 2.0 * f64::from(t) * f64::from(n) * f64::from(k);
            println!(
                "  {name:42} {:9.1} us {:8.1} GFLOP/s {:7.1} GB/s of weights",
                seconds * 1e6,
                flops / seconds / 1e9,
                weight_bytes / seconds / 1e9
            );
        };
        gemm("NT 1024x256x2048, tile 32x64x512", 1024, 256, 2048, (32, 64, 512), DType::F32, true);
        gemm("NT 1024x256x2048, tile 128x64x512", 1024, 256, 2048, (128, 64, 512), DType::F32, true);
        gemm("NT 1024x256x2048, tile 128x128x256", 1024, 256, 2048, (128, 128, 256), DType::F32, true);
        gemm("NT 1024x256x2048, tile 128x64x512, e4m3", 1024, 256, 2048, (128, 64, 512), DType::E4m3, true);
        gemm("NT 1024x256x2048, tile 64x128x128, e4m3", 1024, 256, 2048, (64, 128, 128), DType::E4m3, true);
        gemm("NT 1024x256x2048, tile 8x64x512", 1024, 256, 2048, (8, 64, 512), DType::F32, true);
        gemm("NN 1024x256x2048, tile 32x64x512", 1024, 256, 2048, (32, 64, 512), DType::F32, false);
        for dtype in [DType::F32, DType::Bf16, DType::E4m3] {
            gemm(&format!("GEMV NT 1x256x2048 {dtype}"), 1, 256, 2048, (1, 64, 2048), dtype, true);
            gemm(&format!("GEMV NT 1x8192x2048 {dtype}"), 1, 8192, 2048, (1, 64, 2048), dtype, true);
            gemm(&format!("GEMV NT 1x8192x2048, k step 128, {dtype}"), 1, 8192, 2048, (1, 128, 128), dtype, true);
        }
        gemm("GEMV NN 1x256x2048 f32", 1, 256, 2048, (1, 256, 512), DType::F32, false);
        let seconds = best(level, &softmax(1024), 512, &mut [floats(512 * 1024), floats(512 * 1024)]);
        println!("  softmax 512x1024: {:.2} ns an element", seconds * 1e9 / (512.0 * 1024.0));
        let (n, k) = (65536, 2048);
        let mut buffers = [floats(4 * n as usize), vec![0; 4 * k as usize * 4]];
        let seconds = best(level, &topk(n, 1024, k), 4, &mut buffers);
        println!("  top-{k} of {n}: {:.2} ns an element", seconds * 1e9 / (4.0 * f64::from(n)));
    }
}
