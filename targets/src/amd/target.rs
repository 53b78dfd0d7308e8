//! Kernels to a module: every kernel by itself and on all cores, then laid out one after another.

use super::arch::Arch;
use super::lld::Lld;
use super::lower::{NO_ACCUMULATORS, lower};
use super::metadata::Metadata;
use crate::gpu::{self, Lowered, llvm};
use crate::parallel::in_parallel;
use crate::{Kernel, KernelCode, Level, Module, Target, TargetError, TargetOptions};
use dsc_ir::artifact::Resources;
use dsc_ir::schedule::{KernelShape, Schedule};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// LLVM's passes for a kernel with more masks than scalar registers: bounds that always hold, of a thread's number against an extent, go. Not for all:
/// products of gfx950 issue 4 to 8 % more instructions a round with them.
const FEWER_MASKS: &str = "function(early-cse,instcombine<no-verify-fixpoint>)";

/// Code for one AMD chip.
#[derive(Clone, Debug)]
pub struct AmdTarget {
    arch: &'static Arch,
    levels: Vec<Level>,
    lld: Option<PathBuf>,
}

/// A kernel and its code object.
struct Built {
    lowered: Lowered,
    code: llvm::Code,
    object: Vec<u8>,
    resources: Resources,
    /// Scalar registers kept in lanes of vector registers.
    scalar_spills: u32,
}

impl AmdTarget {
    /// The target of that name.
    pub fn named(name: &str, options: &TargetOptions) -> Option<AmdTarget> {
        let arch = Arch::named(name)?;
        Some(AmdTarget { arch, levels: options.levels.clone(), lld: options.lld.clone() })
    }

    /// The chip compiled for.
    pub fn arch(&self) -> &'static Arch {
        self.arch
    }

    fn keeps(&self, level: Level) -> bool {
        self.levels.contains(&level)
    }

    /// A kernel's code object. The first of these that spills nothing, or else the one that spills least: all there is, the same with
    /// accumulator registers, and then without loads ahead. Of that, with fewer masks where scalar registers are too few.
    fn build(&self, lld: &Lld, kernel: &Kernel) -> Result<Built, TargetError> {
        let plain = Arch { ahead_bytes: 0, ..*self.arch };
        let attempt = |(arch, accumulators), passes| {
            let mut lowered = lower(kernel, arch)?;
            if accumulators {
                lowered.mlir = lowered.mlir.replace(NO_ACCUMULATORS, "");
            }
            self.assemble(lld, &kernel.program.name, lowered, passes)
        };
        let mut way = (self.arch, false);
        let mut best = attempt(way, "")?;
        for other_way in [(self.arch, true), (&plain, false), (&plain, true)] {
            if best.resources.spill_bytes == [0, 0] {
                break;
            }
            let other = attempt(other_way, "")?;
            if other.resources.spill_bytes < best.resources.spill_bytes {
                (way, best) = (other_way, other);
            }
        }
        if best.scalar_spills > 0 {
            let other = attempt(way, FEWER_MASKS)?;
            let [now, before] = [&other, &best].map(|b| (b.resources.spill_bytes, b.scalar_spills));
            if now < before && other.resources.blocks_per_sm >= best.resources.blocks_per_sm {
                best = other;
            }
        }
        Ok(best)
    }

    fn assemble(&self, lld: &Lld, name: &str, lowered: Lowered, passes: &'static str) -> Result<Built, TargetError> {
        let failed = |reason| TargetError::Codegen { kernel: name.to_owned(), reason };
        let options =
            llvm::Options { passes, llvm_ir: self.keeps(Level::Llvm), assembly: self.keeps(Level::Asm), object: true };
        let chip = llvm::Chip { triple: "amdgcn-amd-amdhsa", cpu: self.arch.name, features: "" };
        let code = llvm::generate(name, &lowered.mlir, chip, options).map_err(failed)?;
        let object = lld.link(&code.object).map_err(failed)?;
        let metadata = Metadata::read(&object).map_err(failed)?;
        let mut resources = metadata.resources();
        resources.blocks_per_sm = self.arch.occupancy(lowered.gpu.threads, &resources);
        if resources.blocks_per_sm == 0 {
            return Err(failed(format!(
                "a block does not fit on a compute unit of {}: {} threads of {} registers, {} bytes of LDS of {}",
                self.arch.name,
                lowered.gpu.threads,
                resources.registers,
                resources.static_shared_bytes,
                self.arch.lds_bytes
            )));
        }
        Ok(Built { lowered, code, object, resources, scalar_spills: metadata.spills[1] })
    }
}

impl Target for AmdTarget {
    fn name(&self) -> &'static str {
        self.arch.name
    }

    fn levels(&self) -> &'static [Level] {
        &[Level::Sched, Level::Mlir, Level::Llvm, Level::Asm]
    }

    fn multiplies_fp8(&self) -> bool {
        true
    }

    fn blocks(&self) -> u32 {
        self.arch.device.units
    }

    fn block_bytes(&self) -> u32 {
        gpu::block_bytes(self.arch)
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        super::schedule::choose(self.arch, shape, tokens)
    }

    fn fits(&self, kernel: &Kernel) -> bool {
        gpu::fits(kernel, self.arch)
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let setup = |reason| TargetError::Setup { target: self.arch.name.to_owned(), reason };
        let lld = Lld::find(self.lld.as_deref()).map_err(setup)?;
        let built = in_parallel(kernels, |kernel| self.build(&lld, kernel));
        let built = built.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut module = Module::default();
        let mut entries: BTreeMap<&[u8], u64> = BTreeMap::new();
        for (kernel, built) in kernels.iter().zip(&built) {
            let name = &kernel.program.name;
            let entry = *entries.entry(&built.object).or_insert_with(|| module.append(&built.object));
            let [spilled, _] = built.resources.spill_bytes;
            if spilled > 0 {
                let registers = built.resources.registers;
                module
                    .warnings
                    .push(format!("kernel {name} spills {spilled} bytes a lane, with {registers} registers"));
            }
            let mut gpu = built.lowered.gpu.clone();
            gpu.resources = Some(built.resources);
            module.kernels.push(KernelCode {
                name: name.clone(),
                entry,
                code_bytes: built.object.len() as u64,
                scratch_bytes: 0,
                gpu: Some(gpu),
            });
            module.listings.extend(built.lowered.listings(name, &built.code, &self.levels));
        }
        Ok(module)
    }
}
