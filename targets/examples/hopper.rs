//! Matrix products for Hopper as cubins, with what a program needs to launch them:
//! `cargo run --release -p dsc-targets --features nvidia --example hopper DIR`. `tests/bench/hopper.py DIR` checks and times them.

#[path = "../tests/support/linear.rs"]
mod linear;

use dsc_ir::DType;
use dsc_ir::artifact::TensorMap;
use dsc_ir::schedule::Schedule;
use dsc_targets::{Kernel, Target, TargetOptions};
use linear::Linear;
use std::fmt::Write;
use std::path::PathBuf;

/// Row counts that a kernel is run with.
type Rows = &'static [u32];

fn bf16(n: u32, k: u32, tile: [u32; 2]) -> Linear {
    Linear { dtype: DType::Bf16, n, k, tile, step: 64, out: DType::Bf16 }
}

fn fp8(n: u32, k: u32, tile: [u32; 2]) -> Linear {
    Linear { dtype: DType::E4m3, n, k, tile, step: 128, out: DType::Bf16 }
}

/// The products of a layer, at prefill and at decode.
fn products() -> Vec<(Linear, Rows)> {
    let mut all: Vec<(Linear, Rows)> = vec![
        (bf16(4096, 4096, [128, 256]), &[4096, 4000]),
        (bf16(8192, 8192, [128, 256]), &[8192]),
        (Linear { out: DType::F32, ..bf16(4096, 4096, [128, 256]) }, &[4096]),
        (bf16(4096, 4096, [128, 128]), &[4096]),
    ];
    for (n, k) in [(4096, 7168), (7168, 2048), (24576, 1536), (7168, 16384)] {
        all.push((fp8(n, k, [128, 128]), &[4096, 1000]));
    }
    for (n, k) in [(2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)] {
        all.push((fp8(n, k, [16, 64]), &[1, 16]));
        all.push((fp8(n, k, [16, 128]), &[16]));
        all.push((fp8(n, k, [32, 64]), &[32]));
        all.push((fp8(n, k, [64, 128]), &[64, 128]));
    }
    all.push((bf16(4096, 7168, [16, 64]), &[16]));
    all.push((Linear { out: DType::F32, ..bf16(129_280, 7168, [16, 128]) }, &[3]));
    all
}

fn name(l: &Linear) -> String {
    let [m, n] = l.tile;
    format!("{}_n{}_k{}_{m}x{n}_{}", l.dtype, l.n, l.k, l.out)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("give the folder to write to")?);
    std::fs::create_dir_all(&folder)?;
    let products = products();
    let kernels: Vec<Kernel> =
        products.iter().map(|(l, _)| Kernel { program: l.program(&name(l)), schedule: Schedule::default() }).collect();
    let target = dsc_targets::nvidia::NvidiaTarget::named("sm_90a", &TargetOptions::default()).ok_or("no sm_90a")?;
    let module = target.compile(&kernels)?;
    module.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    let mut lines = Vec::new();
    for ((l, rows), kernel) in products.iter().zip(&module.kernels) {
        let gpu = kernel.gpu.as_ref().ok_or("no launch")?;
        let code = &module.code[kernel.entry as usize..(kernel.entry + kernel.code_bytes) as usize];
        std::fs::write(folder.join(format!("{}.cubin", kernel.name)), code)?;
        let maps: Vec<String> = gpu.maps.iter().map(map).collect();
        let mut line = String::new();
        write!(line, r#"{{"name":"{}","dtype":"{}","out":"{}","n":{},"k":{},"#, kernel.name, l.dtype, l.out, l.n, l.k)?;
        write!(line, r#""tile":{:?},"rows":{rows:?},"threads":{},"#, l.tile, gpu.threads)?;
        write!(line, r#""shared_bytes":{},"persistent":{},"#, gpu.shared_bytes, gpu.persistent)?;
        let blocks = gpu.resources.map_or(0, |r| r.blocks_per_sm);
        write!(line, r#""blocks_per_sm":{blocks},"maps":[{}]}}"#, maps.join(","))?;
        lines.push(line);
    }
    std::fs::write(folder.join("manifest.json"), format!("[\n{}\n]\n", lines.join(",\n")))?;
    println!("{} kernels in {}", lines.len(), folder.display());
    Ok(())
}

fn map(m: &TensorMap) -> String {
    format!(r#"{{"param":{},"tile":{:?},"swizzle":{}}}"#, m.param, m.tile, m.swizzle)
}
