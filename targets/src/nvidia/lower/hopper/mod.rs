//! Hopper's way with contractions: copies by descriptor, rings of stages, products of warpgroups.
//!
//! | file | does |
//! |---|---|
//! | `contraction` | finds the contraction of a tile program |
//! | `config` | tile, warpgroups, depth of the ring |
//! | `tensor_map` | what the copy engine can bring |
//! | `plan` | contraction to scheduled tile IR with a producer and consumers |
//! | `emit`, `loops`, `ring`, `gather`, `wgmma`, `fragment`, `memory`, `reduce`, `store` | that to MLIR |
//! | `ptx` | the instructions |
//!
//! Schedule and lowering know nothing of particular kernels: what a consumer does with its fragments besides products is whatever
//! maps, loads, stores and maxima of whole rows the program has.

mod config;
mod contraction;
mod emit;
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
use dsc_ir::sched::Scheduled;

/// The kernel with roles and rings, if it is a contraction that this architecture's copy engine and warpgroups can run; the plain way
/// takes the others.
pub fn schedule(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    if !arch.has_wgmma || !arch.has_tma {
        return None;
    }
    plan::plan(kernel, arch)
}
