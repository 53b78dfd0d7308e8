//! The AMD targets: tile programs to code objects for CDNA 3 (gfx942) and CDNA 4 (gfx950).
//!
//! The way down, one file a step:
//!
//! | file | does |
//! |---|---|
//! | `arch` | what differs between chips, as data |
//! | `isa` | instructions: what [`crate::gpu`] asks of a chip |
//! | `mfma`, `fp8` | matrix products, and the conversions of e4m3 that gfx942 needs |
//! | `schedule` | tiles and what surrounds them, by a kernel's shape |
//! | `lower` | tile program and schedule to MLIR text |
//! | `lld`, `metadata` | objects to code objects, and what these say of themselves |
//! | `target` | the way down for all kernels of a module; [`crate::gpu::llvm`] makes objects of MLIR |
//!
//! With the feature `emulate` alone, without LLVM, there are `arch` and what `lower` needs only.
//!
//! **Kernel arguments** are, in order and without gaps: the address of each argument and the address of the six symbols, 64 bits each (the
//! metadata's `.args`). Shared memory is static. Each kernel is a code object of its own, which `hipModuleLoadData` takes.
//!
//! **Invariants.** Memory holds the same bytes as on every other target: e4m3 are OCP codes, also on gfx942, whose instructions take FNUZ.
//! The same kernels and the same lld give the same bytes.

pub mod arch;
mod fp8;
mod isa;
#[cfg(feature = "amd")]
pub mod lld;
pub mod lower;
#[cfg(feature = "amd")]
pub mod metadata;
mod mfma;
#[cfg(any(feature = "amd", test))]
mod schedule;
#[cfg(feature = "amd")]
mod target;

#[cfg(feature = "amd")]
pub use target::AmdTarget;
