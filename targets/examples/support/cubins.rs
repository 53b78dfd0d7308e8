//! Kernels as cubins and PTX in a folder, with a manifest of what a launch needs, as the programs in tests/bench read it.

use dsc_ir::artifact::TensorMap;
use dsc_targets::nvidia::NvidiaTarget;
use dsc_targets::{Kernel, Target, TargetOptions};
use std::path::Path;

/// Compiles kernels for Hopper into `folder`; each comes with JSON fields that say what it computes.
pub fn write(folder: &Path, described: &[(Kernel, String)]) -> Result<(), Box<dyn std::error::Error>> {
    std::fs::create_dir_all(folder)?;
    let kernels: Vec<Kernel> = described.iter().map(|(kernel, _)| kernel.clone()).collect();
    let target = NvidiaTarget::named("sm_90a", &TargetOptions::default()).ok_or("no sm_90a")?;
    let module = target.compile(&kernels)?;
    module.warnings.iter().for_each(|w| eprintln!("warning: {w}"));
    let mut lines = Vec::new();
    for ((_, text), kernel) in described.iter().zip(&module.kernels) {
        let gpu = kernel.gpu.as_ref().ok_or("no launch")?;
        let code = &module.code[kernel.entry as usize..(kernel.entry + kernel.code_bytes) as usize];
        std::fs::write(folder.join(format!("{}.cubin", kernel.name)), code)?;
        let ptx = module.portable.as_deref().and_then(|all| all.get(gpu.asm[0] as usize..gpu.asm[1] as usize));
        std::fs::write(folder.join(format!("{}.ptx", kernel.name)), ptx.unwrap_or_default())?;
        let maps: Vec<String> = gpu.maps.iter().map(map).collect();
        let r = gpu.resources.unwrap_or_default();
        lines.push(format!(
            r#"{{"name":"{}",{text},"threads":{},"shared_bytes":{},"scratch":{},"persistent":{},"turns":{},"dependent":{},"cluster":{},"team":{},"apart":{},"registers":{},"spills":{:?},"blocks_per_sm":{},"maps":[{}]}}"#,
            kernel.name,
            gpu.threads,
            gpu.shared_bytes,
            gpu.scratch_bytes,
            gpu.persistent,
            gpu.turns,
            gpu.dependent,
            gpu.cluster,
            gpu.team,
            gpu.apart,
            r.registers,
            r.spill_bytes,
            r.blocks_per_sm,
            maps.join(",")
        ));
    }
    std::fs::write(folder.join("manifest.json"), format!("[\n{}\n]\n", lines.join(",\n")))?;
    println!("{} kernels in {}", lines.len(), folder.display());
    Ok(())
}

fn map(m: &TensorMap) -> String {
    format!(r#"{{"param":{},"tile":{:?},"swizzle":{}}}"#, m.param, m.tile, m.swizzle)
}
