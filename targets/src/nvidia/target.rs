//! Kernels to a module: every kernel by itself and on all cores, then laid out one after another.

use super::arch::Arch;
use super::lower::lower;
use super::ptxas;
use super::ptxas::{Cubin, Ptxas};
use crate::gpu::{self, Lowered, llvm};
use crate::nvidia::{lower, tiles};
use crate::parallel::in_parallel;
use crate::{Kernel, KernelCode, Level, Module, Target, TargetError, TargetOptions};
use dsc_ir::schedule::{KernelShape, Rule, Schedule, Teams};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Code for one NVIDIA architecture.
#[derive(Clone, Debug)]
pub struct NvidiaTarget {
    arch: &'static Arch,
    levels: Vec<Level>,
    ptxas: Option<PathBuf>,
}

/// A kernel before its machine code.
struct Assembly {
    lowered: Lowered,
    code: llvm::Code,
}

impl NvidiaTarget {
    /// The target of that name.
    pub fn named(name: &str, options: &TargetOptions) -> Option<NvidiaTarget> {
        let arch = Arch::named(name)?;
        Some(NvidiaTarget { arch, levels: options.levels.clone(), ptxas: options.ptxas.clone() })
    }

    /// The architecture compiled for.
    pub fn arch(&self) -> &'static Arch {
        self.arch
    }

    fn keeps(&self, level: Level) -> bool {
        self.levels.contains(&level)
    }

    /// PTX of one kernel.
    fn assembly(&self, kernel: &str, lowered: Lowered) -> Result<Assembly, TargetError> {
        let options = llvm::Options { llvm_ir: self.keeps(Level::Llvm), assembly: true, ..llvm::Options::default() };
        let features = self.arch.llvm_features();
        let chip = llvm::Chip { triple: "nvptx64-nvidia-cuda", cpu: self.arch.name, features: &features };
        let code = llvm::generate(kernel, &lowered.mlir, chip, options)
            .map_err(|reason| TargetError::Codegen { kernel: kernel.to_owned(), reason })?;
        Ok(Assembly { lowered, code })
    }

    /// One module of kernels that have their PTX: machine code for each, if there is a ptxas.
    fn link(&self, names: &[&str], kernels: &[Assembly]) -> Result<Module, TargetError> {
        let ptxas = Ptxas::find(self.ptxas.as_deref(), self.arch)
            .map_err(|reason| TargetError::Setup { target: self.arch.name.to_owned(), reason })?;
        let mut module = Module::default();
        let cubins = match &ptxas {
            Some(ptxas) => assemble(ptxas, names, kernels)?,
            None => {
                module.warnings.push(format!(
                    "no machine code: without ptxas the artifact holds PTX, which the driver compiles at each start; {}",
                    ptxas::REMEDY
                ));
                BTreeMap::new()
            }
        };
        let mut entries: BTreeMap<&str, u64> = BTreeMap::new();
        let mut portable = Vec::new();
        for (&name, kernel) in names.iter().zip(kernels) {
            let ptx = kernel.code.assembly.as_str();
            let mut gpu = kernel.lowered.gpu.clone();
            gpu.asm = [portable.len() as u64, (portable.len() + ptx.len()) as u64];
            portable.extend(ptx.as_bytes());
            let cubin = cubins.get(ptx);
            let entry = match cubin {
                Some(cubin) => *entries.entry(ptx).or_insert_with(|| module.append(&cubin.bytes)),
                None => 0,
            };
            if let Some(cubin) = cubin {
                let mut resources = cubin.resources;
                resources.blocks_per_sm = self.arch.occupancy(gpu.threads, gpu.shared_bytes, &resources);
                fits(self.arch, name, &gpu, resources)?;
                module.warnings.extend(remarks(name, cubin));
                gpu.resources = Some(resources);
            }
            let code_bytes = cubin.map_or(0, |c| c.bytes.len() as u64);
            module.kernels.push(KernelCode {
                name: name.to_owned(),
                entry,
                code_bytes,
                scratch_bytes: 0,
                gpu: Some(gpu),
            });
            module.listings.extend(kernel.lowered.listings(name, &kernel.code, &self.levels));
        }
        module.portable = Some(portable);
        Ok(module)
    }
}

impl Target for NvidiaTarget {
    fn name(&self) -> &'static str {
        self.arch.name
    }

    fn levels(&self) -> &'static [Level] {
        &[Level::Sched, Level::Mlir, Level::Llvm, Level::Asm]
    }

    fn multiplies_fp8(&self) -> bool {
        self.arch.has_fp8_mma
    }

    fn blocks(&self) -> u32 {
        self.arch.device.sms
    }

    fn copies_boxes(&self) -> bool {
        self.arch.has_tma && self.arch.has_wgmma
    }

    fn runs_beside(&self) -> bool {
        self.arch.has_tma && self.arch.has_wgmma
    }

    fn chunk(&self) -> u32 {
        4096
    }

    fn batch(&self) -> u32 {
        if self.arch.has_wgmma { 256 } else { 64 }
    }

    fn selects_from_memory(&self) -> bool {
        self.arch.has_wgmma
    }

    fn teams(&self) -> Teams {
        if self.arch.has_wgmma { self.arch.device.teams } else { Teams::default() }
    }

    fn block_bytes(&self) -> u32 {
        gpu::block_bytes(self.arch)
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        if !self.arch.has_wgmma {
            return Schedule::wide(shape, tokens);
        }
        let chosen = tiles::choose(shape, tokens, self.arch.device.sms);
        let mut chosen = chosen.unwrap_or_else(|| Schedule::wide(shape, tokens));
        if matches!(shape.op, "attention" | "attention_part") {
            // Whole turns of two that score take one token's heads as fast as a few of them.
            chosen.tile_h = shape.heads.clamp(1, Teams::HEADS);
        }
        tiles::hasten(&mut chosen, shape, tokens);
        if shape.op == "attention" {
            let rounds = shape.k.div_ceil(chosen.tile_n.max(1));
            (chosen.split, chosen.apart) = self.teams().split(tokens, shape.heads, rounds);
        }
        Rule::applied(tiles::measured(), chosen, shape, tokens, "")
    }

    fn fits(&self, kernel: &Kernel) -> bool {
        lower::fits(kernel, self.arch)
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let assembled = in_parallel(kernels, |kernel| self.assembly(&kernel.program.name, lower(kernel, self.arch)?));
        let assembled = assembled.into_iter().collect::<Result<Vec<_>, _>>()?;
        let names: Vec<&str> = kernels.iter().map(|k| k.program.name.as_str()).collect();
        self.link(&names, &assembled)
    }
}

/// The cubin of each different PTX.
fn assemble<'k>(
    ptxas: &Ptxas,
    names: &[&str],
    kernels: &'k [Assembly],
) -> Result<BTreeMap<&'k str, Cubin>, TargetError> {
    let mut seen = BTreeSet::new();
    let different: Vec<(&str, &str)> = names
        .iter()
        .zip(kernels)
        .map(|(&name, kernel)| (name, kernel.code.assembly.as_str()))
        .filter(|(_, ptx)| seen.insert(*ptx))
        .collect();
    let cubins = in_parallel(&different, |(name, ptx)| {
        let cubin =
            ptxas.assemble(ptx).map_err(|reason| TargetError::Codegen { kernel: (*name).to_owned(), reason })?;
        Ok((*ptx, cubin))
    });
    cubins.into_iter().collect()
}

/// A block that no multiprocessor can hold would only be found out at its launch.
fn fits(
    arch: &Arch,
    kernel: &str,
    gpu: &dsc_ir::artifact::GpuKernel,
    resources: dsc_ir::artifact::Resources,
) -> Result<(), TargetError> {
    if resources.blocks_per_sm > 0 {
        return Ok(());
    }
    let reason = format!(
        "a block does not fit on a multiprocessor of {}: {} threads of {} registers, {} + {} bytes of shared memory of {}",
        arch.name,
        gpu.threads,
        resources.registers,
        gpu.shared_bytes,
        resources.static_shared_bytes,
        arch.shared_per_block
    );
    Err(TargetError::Codegen { kernel: kernel.to_owned(), reason })
}

/// What costs speed.
fn remarks(kernel: &str, cubin: &Cubin) -> Vec<String> {
    let [stores, loads] = cubin.resources.spill_bytes;
    let spills = (stores + loads > 0).then(|| {
        let registers = cubin.resources.registers;
        format!(
            "kernel {kernel} spills: {stores} bytes of stores, {loads} of loads, with {registers} registers a thread"
        )
    });
    let said = cubin.remarks.iter().map(|r| format!("kernel {kernel}: ptxas: {r}"));
    spills.into_iter().chain(said).collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
