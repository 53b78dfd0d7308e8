//! Tile program and schedule to MLIR text, in two steps: `schedule` makes scheduled tile IR, `emit` writes it down instruction by
//! instruction. Nothing here needs LLVM.
//!
//! | file | does |
//! |---|---|
//! | `schedule`, `barriers` | places, buffers and barriers: the plain way, for any shape and architecture |
//! | `emit` | control flow, elementwise evaluation, memory |
//! | `fragment` | tiles in registers as a matrix product leaves them |
//! | `dot`, `reduce`, `scan`, `topk` | the ops of those names |
//! | `hopper` | contractions through tensor maps, rings and warpgroup products |
//! | `arith` | scalar arithmetic of maps |
//! | `mlir`, `isa`, `block` | text of the dialects, PTX instructions, and the running threads |

mod arith;
mod barriers;
pub mod block;
mod dot;
mod emit;
#[cfg(any(test, feature = "emulate"))]
pub mod emulate;
mod fragment;
pub mod hopper;
pub mod isa;
pub mod mlir;
mod reduce;
mod scan;
mod schedule;
mod topk;

use super::arch::Arch;
use crate::{Kernel, TargetError};
use dsc_ir::artifact::GpuKernel;
use dsc_ir::sched::{self, Place, Scheduled};
use dsc_ir::tile::{self, Type, ValueId};
use std::fmt::Write;

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

/// Accumulators of a thread beyond which the rest no longer finds registers.
const MOST_ACCUMULATORS: usize = 160;

/// Whether a block of the kernel has room on that architecture: shared memory, and registers for its accumulators.
pub fn fits(kernel: &Kernel, arch: &Arch) -> bool {
    hopper::schedule(kernel, arch).is_some()
        || schedule::schedule(kernel, arch).is_ok_and(|s| accumulators(&s, &s.common) <= MOST_ACCUMULATORS)
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

/// Lowers a kernel for an architecture.
///
/// # Errors
/// [`TargetError::Unsupported`] if the tiles do not fit its shared memory.
pub fn lower(kernel: &Kernel, arch: &Arch) -> Result<Lowered, TargetError> {
    if let Some(scheduled) = hopper::schedule(kernel, arch) {
        let failed = |reason| TargetError::Codegen { kernel: kernel.program.name.clone(), reason };
        let (mlir, gpu) = hopper::lower(&scheduled, arch).map_err(failed)?;
        return Ok(Lowered { mlir, gpu, sched: scheduled.to_string() });
    }
    let scheduled = schedule::schedule(kernel, arch)?;
    let threads = block::Threads::new(mlir::Fn::default(), arch, scheduled.threads);
    let emitter = emit::Emitter::run(threads, &scheduled);
    let shared_bytes = emitter.shared_bytes();
    let mut args: Vec<String> = (0..=scheduled.params.len()).map(|i| format!("%{i}: !llvm.ptr<1>")).collect();
    args.iter_mut().for_each(|a| a.push_str(" {llvm.align = 16 : i64}"));
    let mut text = String::from("module {\n");
    text.push_str(
        "  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 128 : i64} : !llvm.array<0 x i8>\n",
    );
    let _ = writeln!(
        text,
        "  llvm.func @{}({}) attributes {{nvvm.kernel, nvvm.reqntid = array<i32: {}, 1, 1>}} {{",
        scheduled.name,
        args.join(", "),
        scheduled.threads
    );
    text.push_str(emitter.t.f.text());
    text.push_str("    llvm.return\n  }\n}\n");
    let gpu = GpuKernel { threads: scheduled.threads, shared_bytes, cluster: 1, ..GpuKernel::default() };
    Ok(Lowered { mlir: text, gpu, sched: scheduled.to_string() })
}
