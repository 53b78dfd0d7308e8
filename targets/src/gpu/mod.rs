//! What GPU targets share: tile programs to scheduled tile IR and on to MLIR text, the plain way that takes every program on every chip. Nothing
//! here names a vendor: what instructions there are is an [`isa::Isa`].
//!
//! | file | does |
//! |---|---|
//! | `isa` | what the lowering must know of a chip, and the instructions it asks for |
//! | `schedule` | a place for every value, for any shape and chip |
//! | `analysis` | what it goes by: uses, fragments, products and their operands |
//! | `lifetimes`, `barriers` | where buffers lie, and where threads meet |
//! | `emit` | instructions one by one, loops and branches |
//! | `evaluate` | elementwise evaluation, by pieces of neighbours |
//! | `memory`, `fill` | access to shared and global memory; tiles on their way there |
//! | `overlap` | what is done while the launches before still run |
//! | `interleave` | tiles whose elements take turns |
//! | `ring`, `direct` | loops whose operands are copied to shared memory some rounds before |
//! | `ahead`, `held` | loops whose operands are loaded to registers rounds before; these loads |
//! | `operands` | left operands that stay in registers |
//! | `fragment` | tiles in registers as a matrix product leaves them |
//! | `dot`, `reduce`, `scan`, `topk` | the ops of those names |
//! | `arith` | scalar arithmetic of maps |
//! | `mlir`, `known`, `block` | text of the dialects, what is known of its integers, and the running threads |
//! | `llvm` | MLIR text to code, through the LLVM linked into this binary (feature `llvm`) |

mod ahead;
mod analysis;
pub mod arith;
pub mod barriers;
pub mod block;
pub mod direct;
pub mod divisor;
pub mod dot;
mod early;
pub mod emit;
pub mod evaluate;
pub mod fill;
pub mod fragment;
pub mod held;
mod interleave;
pub mod isa;
pub mod known;
mod lifetimes;
#[cfg(feature = "llvm")]
pub mod llvm;
pub mod memory;
pub mod mlir;
mod operands;
mod overlap;
pub mod reduce;
pub mod ring;
pub mod scan;
pub mod schedule;
pub mod topk;

use crate::Kernel;
#[cfg(feature = "llvm")]
use crate::{Level, Listing};
use dsc_ir::artifact::GpuKernel;
use dsc_ir::sched::{self, Place, Scheduled};
use dsc_ir::tile::{self, Type, ValueId};
use isa::Isa;

/// A kernel on its way to LLVM.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// One MLIR module with one function.
    pub mlir: String,
    /// How it is launched.
    pub gpu: GpuKernel,
    /// The scheduled tile IR, as text.
    pub sched: String,
}

#[cfg(feature = "llvm")]
impl Lowered {
    /// What was asked to be kept of a kernel, from its schedule down to its assembly.
    pub fn listings(&self, name: &str, code: &llvm::Code, kept: &[Level]) -> Vec<Listing> {
        let levels = [
            (Level::Sched, Some(&self.sched)),
            (Level::Mlir, Some(&self.mlir)),
            (Level::Llvm, code.llvm_ir.as_ref()),
            (Level::Asm, Some(&code.assembly)),
        ];
        let kept = levels.into_iter().filter(|(level, _)| kept.contains(level));
        kept.filter_map(|(level, text)| Some(Listing { kernel: name.to_owned(), level, text: text?.clone() })).collect()
    }
}

/// Bytes of operands that a block keeps beside its other tiles: five eighths of its shared memory.
pub fn block_bytes(arch: &dyn Isa) -> u32 {
    arch.shared_per_block() / 8 * 5
}

/// Accumulators of a thread beyond which the rest no longer finds registers.
const MOST_ACCUMULATORS: usize = 160;

/// Whether a block of the kernel, scheduled the plain way, has room on that chip: shared memory, and registers for its accumulators.
pub fn fits(kernel: &Kernel, arch: &dyn Isa) -> bool {
    schedule::schedule(kernel, arch).is_ok_and(|s| accumulators(&s, &s.common) <= MOST_ACCUMULATORS)
}

/// Registers of a thread for what loops carry of products, and for products that begin at zero.
fn accumulators(s: &Scheduled, block: &sched::Block) -> usize {
    let registers = |v: &ValueId| match (&s.places[v.0 as usize], &s.types[v.0 as usize]) {
        (Place::Fragment(f), Type::Tile(t)) => fragment::Spread::count(*f, &t.shape),
        _ => 0,
    };
    let of = |inst: &sched::Inst| match &inst.op {
        sched::Op::For { body, .. } => inst.results.iter().map(registers).sum::<usize>() + accumulators(s, body),
        sched::Op::If { then, otherwise, .. } => accumulators(s, then).max(accumulators(s, otherwise)),
        sched::Op::Tile(tile::Op::Dot { acc: None, .. }) => inst.results.iter().map(registers).sum(),
        _ => 0,
    };
    block.insts.iter().map(of).sum()
}
