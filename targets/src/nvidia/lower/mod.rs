//! Tile program and schedule to MLIR text, in two steps: `schedule` makes scheduled tile IR, `emit` writes it down instruction by
//! instruction. Nothing here needs LLVM.
//!
//! | file | does |
//! |---|---|
//! | [`gpu`] | the plain way, for any shape and architecture, which other vendors' targets share |
//! | `isa`, `mma` | PTX instructions, and products by `mma.sync` |
//! | `hopper` | contractions through tensor maps, rings and warpgroup products |
//! | `emulate` | runs the text on the processor, for tests |

#[cfg(any(test, feature = "emulate"))]
pub mod emulate;
pub mod hopper;
pub mod isa;
mod mma;

use super::arch::Arch;
use crate::gpu::{self, Lowered, emit, known, schedule};
use crate::nvidia::tiles::is_tall;
use crate::{Kernel, TargetError};
use dsc_ir::artifact::GpuKernel;
use std::fmt::Write;

pub use crate::gpu::{arith, block, mlir};

/// Whether a block of the kernel has room on that architecture: shared memory, and registers for its accumulators.
pub fn fits(kernel: &Kernel, arch: &Arch) -> bool {
    // Tall tiles are chosen for what the Hopper path makes of them.
    let plain = !is_tall(kernel.schedule.tile_m) && gpu::fits(kernel, arch);
    hopper::compile(kernel, arch, mlir::Ty::Global).is_some() || plain
}

/// Lowers a kernel for an architecture.
///
/// # Errors
/// [`TargetError::Unsupported`] if the tiles do not fit its shared memory.
pub fn lower(kernel: &Kernel, arch: &Arch) -> Result<Lowered, TargetError> {
    let symbols = if kernel.schedule.symbols_by_value { mlir::Ty::Generic } else { mlir::Ty::Global };
    let failed = |reason| TargetError::Codegen { kernel: kernel.program.name.clone(), reason };
    if let Some((sched, mlir, gpu)) = hopper::compile(kernel, arch, symbols) {
        return Ok(Lowered { mlir, gpu, sched });
    }
    let scheduled = schedule::schedule(kernel, arch)?;
    let mut function = mlir::Fn::default();
    // Of other kernels, which may fill the registers, folding changes what the assembler makes; how fast that is was not measured.
    function.known = kernel.schedule.early.then(known::Known::default);
    let mut threads = block::Threads::new(function, arch, scheduled.threads);
    threads.symbols = symbols;
    // A launch of few blocks takes as long as a thread's instructions, whatever they meet.
    threads.piece = (!kernel.schedule.early).then_some(16);
    let dependent = arch.has_tma;
    if dependent {
        let late = kernel.schedule.late;
        threads.begin = if late { |f| isa::launch_wait(f, true) } else { isa::launch_next };
        threads.wait = (!late).then_some(isa::await_launches);
    }
    let mut emitter = emit::Emitter::run(threads, &scheduled);
    if let Some(fault) = emitter.fault.take() {
        return Err(failed(fault));
    }
    let shared_bytes = emitter.shared_bytes();
    let addresses = scheduled.params.len();
    let mut args: Vec<String> =
        (0..addresses).map(|i| format!("%{i}: !llvm.ptr<1> {{llvm.align = 16 : i64}}")).collect();
    args.push(symbols_parameter(addresses, symbols));
    let mut text = String::from("module {\n");
    text.push_str(
        "  llvm.mlir.global external @shared() {addr_space = 3 : i32, alignment = 128 : i64} : !llvm.array<0 x i8>\n",
    );
    let _ = writeln!(
        text,
        "  llvm.func @{}({}) attributes {{nvvm.kernel, nvvm.reqntid = array<i32: {}, 1, 1>{}}} {{",
        scheduled.name,
        args.join(", "),
        scheduled.threads,
        match kernel.schedule.sharing {
            0 => String::new(),
            n => format!(", nvvm.minctasm = {n} : i32"),
        }
    );
    text.push_str(emitter.t.f.text());
    text.push_str("    llvm.return\n  }\n}\n");
    let gpu = GpuKernel { threads: scheduled.threads, shared_bytes, cluster: 1, dependent, ..GpuKernel::default() };
    Ok(Lowered { mlir: text, gpu, sched: scheduled.to_string() })
}

/// The kernel's parameter that symbols are read from, which has that number: an address, or their values.
pub fn symbols_parameter(number: usize, place: mlir::Ty) -> String {
    match place {
        // Without grid_constant the values would be copied to the stack.
        mlir::Ty::Generic => format!(
            "%{number}: !llvm.ptr {{llvm.byval = !llvm.array<6 x i32>, llvm.align = 4 : i64, nvvm.grid_constant}}"
        ),
        _ => format!("%{number}: !llvm.ptr<1>"),
    }
}
