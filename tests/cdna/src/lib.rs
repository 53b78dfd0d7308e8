//! An interpreter of the instruction sets of CDNA 3 (gfx942) and CDNA 4 (gfx950).
//!
//! It loads a code object as the HIP runtime would, by its kernel descriptors and metadata, and runs launches on the CPU: waves of 64
//! lanes, scalar and vector registers, LDS, barriers, global memory, matrix products. LLVM's disassembler decodes. It is no model of
//! time. It is stricter than hardware, and reports as a [`Fault`]:
//!
//! - accesses outside of allocations, of LDS or of scratch, and writes to what is read-only;
//! - registers that are read or written while a load to them is under way that no `s_waitcnt` covers;
//! - accesses of LDS by several waves with no barrier, or no wait before the barrier, between them, and loads to LDS that nothing waited for;
//! - decisions, addresses and stored values that come from registers or LDS that were never written;
//! - registers outside of what the descriptor allocates, and instructions that it does not have.
//!
//! Not modelled: time, caches and their coherence between blocks, the wait states between instructions that LLVM fills with `s_nop`,
//! rounding other than to nearest, exceptions. `v_exp_f32`, `v_rcp_f32` and their like are rounded correctly, which hardware's are not quite.
//!
//! Sources: AMD's "CDNA 3" and "CDNA 4" instruction set reference guides; LLVM's "User Guide for AMDGPU Backend".
//!
//! ```no_run
//! use dsc_cdna::{CodeObject, Launch, Memory, Options};
//! let object = CodeObject::parse(&std::fs::read("kernel.co")?)?;
//! let mut memory = Memory::new();
//! let out = memory.alloc(&[0; 256]);
//! let launch =
//!     Launch { kernel: "fill", grid: [1, 1, 1], block: [64, 1, 1], dynamic_lds: 0, arguments: &out.to_le_bytes() };
//! object.launch(&launch, &mut memory, Options::default())?;
//! assert_eq!(memory.read(out), [7; 256]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![allow(clippy::needless_range_loop, reason = "a lane is an index into several registers")]
#![allow(clippy::precedence, reason = "shifts bind as in the guides' pseudocode")]

mod decode;
mod fault;
mod isa;
mod lanes;
mod launch;
mod lds;
pub mod loops;
mod memory;
mod object;
pub mod tools;
mod wave;

pub use fault::{Cause, Error, Fault};
pub use launch::{Launch, Options, Stats};
pub use memory::{Access, Memory};
pub use object::{Argument, Chip, CodeObject, GFX942, GFX950, Hidden, Kernel, Mode};
