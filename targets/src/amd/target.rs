//! Kernels to a module: every kernel by itself and on all cores, then laid out one after another.

use super::arch::Arch;
use super::lld::Lld;
use super::lower::{Bounds, NO_ACCUMULATORS, lower};
use super::metadata::Metadata;
use crate::gpu::{self, Lowered, llvm};
use crate::parallel::in_parallel;
use crate::{Kernel, KernelCode, Level, Module, Target, TargetError, TargetOptions};
use dsc_ir::artifact::Resources;
use dsc_ir::schedule::{KernelShape, Schedule};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// LLVM's passes for a kernel with more truth values than scalar registers: tests become fewer, and what is tested twice is so once. Not for all:
/// products of gfx950 issue 4 to 8 % more instructions a round with them.
const FEWER_TESTS: &str = "function(early-cse,instcombine<no-verify-fixpoint>)";

/// Code for one AMD chip.
#[derive(Clone, Debug)]
pub struct AmdTarget {
    arch: &'static Arch,
    levels: Vec<Level>,
    lld: Option<PathBuf>,
    bounds: Bounds,
}

/// What is to be said of a kernel that spills.
fn spills(name: &str, resources: &Resources) -> Vec<String> {
    let ([bytes, _], registers) = (resources.spill_bytes, resources.registers);
    let (scalars, scalar_registers) = (resources.scalar_spills, resources.scalar_registers);
    let vectors = format!("kernel {name} spills {bytes} bytes a lane, with {registers} registers");
    let lanes = format!(
        "kernel {name} keeps {scalars} scalars in lanes of a vector register, with {scalar_registers} scalar registers"
    );
    [(bytes, vectors), (scalars, lanes)].into_iter().filter(|s| s.0 > 0).map(|s| s.1).collect()
}

/// A kernel and its code object.
struct Built {
    lowered: Lowered,
    code: llvm::Code,
    object: Vec<u8>,
    resources: Resources,
}

impl AmdTarget {
    /// The target of that name.
    pub fn named(name: &str, options: &TargetOptions) -> Option<AmdTarget> {
        let arch = Arch::named(name)?;
        Some(AmdTarget { arch, levels: options.levels.clone(), lld: options.lld.clone(), bounds: Bounds::Tested })
    }

    /// The same, with bounds folded in all kernels instead of those that have too few scalar registers.
    pub fn folding(self) -> AmdTarget {
        AmdTarget { bounds: Bounds::Folded, ..self }
    }

    /// The chip compiled for.
    pub fn arch(&self) -> &'static Arch {
        self.arch
    }

    fn keeps(&self, level: Level) -> bool {
        self.levels.contains(&level)
    }

    /// A kernel's code object. The first of these that spills nothing, or else the one that spills least: all there is, the same with
    /// accumulator registers, and then without loads ahead. Of that, with bounds that always hold folded where scalar registers are too few.
    fn build(&self, lld: &Lld, kernel: &Kernel) -> Result<Built, TargetError> {
        let plain = Arch { ahead_bytes: 0, ..*self.arch };
        let attempt = |(arch, accumulators), bounds| {
            let mut lowered = lower(kernel, arch, bounds)?;
            if accumulators {
                lowered.mlir = lowered.mlir.replace(NO_ACCUMULATORS, "");
            }
            let passes = if bounds == Bounds::Folded { FEWER_TESTS } else { "" };
            self.assemble(lld, &kernel.program.name, lowered, passes)
        };
        let mut way = (self.arch, false);
        let mut best = attempt(way, self.bounds)?;
        for other_way in [(self.arch, true), (&plain, false), (&plain, true)] {
            if best.resources.spill_bytes == [0, 0] {
                break;
            }
            let other = attempt(other_way, self.bounds)?;
            if other.resources.spill_bytes < best.resources.spill_bytes {
                (way, best) = (other_way, other);
            }
        }
        if best.resources.scalar_spills > 0 {
            let other = attempt(way, Bounds::Folded)?;
            let [now, before] = [&other, &best].map(|b| (b.resources.spill_bytes, b.resources.scalar_spills));
            if now < before && other.resources.blocks_per_sm >= best.resources.blocks_per_sm {
                best = other;
            }
        }
        Ok(best)
    }

    fn assemble(&self, lld: &Lld, name: &str, lowered: Lowered, passes: &'static str) -> Result<Built, TargetError> {
        let failed = |reason| TargetError::Codegen { kernel: name.to_owned(), reason };
        let (llvm_ir, assembly) = (self.keeps(Level::Llvm), self.keeps(Level::Asm));
        let options = llvm::Options { passes, llvm_ir, assembly, object: true };
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
        Ok(Built { lowered, code, object, resources })
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
            module.warnings.extend(spills(name, &built.resources));
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
