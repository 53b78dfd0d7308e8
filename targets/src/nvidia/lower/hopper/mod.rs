//! Hopper's way with contractions and attention: copies by descriptor, rings of stages, products of warpgroups.
//!
//! | file | does |
//! |---|---|
//! | `contraction`, `attention` | find the contraction, the attention of a tile program |
//! | `config` | tile, warpgroups, depth of the ring |
//! | `tensor_map` | what the copy engine can bring |
//! | `plan`, `attention_plan` | these to scheduled tile IR with roles |
//! | `emit`, `loops`, `ring`, `gather`, `fill`, `wgmma`, `fragment`, `memory`, `reduce`, `store` | that to MLIR |
//! | `ptx` | the instructions |
//!
//! Schedule and lowering know nothing of particular kernels: what a consumer does with its fragments besides products is whatever
//! maps, loads, stores and maxima of whole rows the program has.

mod attention;
mod attention_plan;
mod config;
mod contraction;
mod emit;
mod fill;
mod fragment;
mod gather;
mod loops;
mod memory;
mod plan;
pub mod ptx;
mod reduce;
mod ring;
mod store;
mod tensor_map;
#[cfg(test)]
mod tests;
mod wgmma;

pub use emit::lower;

use crate::Kernel;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::Ty;
use dsc_ir::sched::Scheduled;

/// The kernel with roles and rings, if it is a contraction or attention that this architecture's copy engine and warpgroups can run; the plain way
/// takes the others.
pub fn schedule(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    if !arch.has_wgmma || !arch.has_tma {
        return None;
    }
    plan::plan(kernel, arch).or_else(|| {
        // What stands around attention may be more than threads of roles can do.
        let scheduled = attention_plan::plan(&kernel.program, arch)?;
        lower(&scheduled, arch, Ty::Global).is_ok().then_some(scheduled)
    })
}
