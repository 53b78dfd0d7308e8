//! The data of `dsc` and its rules: what the compiler, the targets and the runtime agree on.
//!
//! Three levels of IR, each printed, parsed, verified and executed by a plain interpreter:
//!
//! * [`graph`]: a whole model step as typed ops on tensors with symbolic dims;
//! * [`tile`]: what one kernel does to tiles, with no target in it;
//! * [`schedule`]: how a target runs a tile program, as plain data beside it.
//!
//! [`artifact`] is the schema of the file that the compiler writes and the runtime loads; [`work`] says what its kernels have to
//! compute and to move.
//!
//! **Invariants.** No LLVM, no device, no file access and no target name in this crate.

pub mod artifact;
pub mod dtype;
pub mod extent;
pub mod graph;
pub mod layout;
pub mod sample;
pub mod sched;
pub mod schedule;
pub mod tile;
pub mod work;

pub use dtype::DType;
pub use extent::{Extent, Sym, SymValues};
