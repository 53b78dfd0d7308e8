//! The NVIDIA targets: tile programs to PTX, and to cubins where there is a ptxas.
//!
//! The way down, one file a step:
//!
//! | file | does |
//! |---|---|
//! | `arch` | what differs between architectures, as data |
//! | `lower` | tile program and schedule to MLIR text |
//! | `tiles` | tiles of matrix products on Hopper |
//! | `ptxas` | PTX to a cubin, and what it takes of a multiprocessor |
//! | `target` | the way down for all kernels of a module; [`crate::gpu::llvm`] makes PTX of MLIR |
//!
//! With the feature `emulate` alone, without LLVM, there are `arch` and `lower` only.
//!
//! **Invariants.** The same kernels, and the same ptxas or none, give the same bytes: nothing depends on threads, paths or time. Every kernel
//! that has machine code fits on a multiprocessor.

pub mod arch;
pub mod lower;
#[cfg(feature = "nvidia")]
pub mod ptxas;
#[cfg(feature = "nvidia")]
mod target;
pub mod tiles;

#[cfg(feature = "nvidia")]
pub use target::NvidiaTarget;
