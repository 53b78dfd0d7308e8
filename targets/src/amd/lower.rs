//! Tile program and schedule to MLIR text for an AMD chip. Nothing here needs LLVM.

use super::arch::Arch;
use super::isa::MEET_BYTES;
use crate::gpu::{Lowered, block, emit, known, mlir, schedule};
use crate::{Kernel, TargetError};
use dsc_ir::artifact::GpuKernel;
use std::fmt::Write;

/// What the runtime may pass to a kernel and ours do not read; without these words the hardware would be asked for it.
const UNUSED: [&str; 13] = [
    "amdgpu-no-completion-action",
    "amdgpu-no-default-queue",
    "amdgpu-no-dispatch-id",
    "amdgpu-no-dispatch-ptr",
    "amdgpu-no-flat-scratch-init",
    "amdgpu-no-heap-ptr",
    "amdgpu-no-hostcall-ptr",
    "amdgpu-no-implicitarg-ptr",
    "amdgpu-no-lds-kernel-id",
    "amdgpu-no-multigrid-sync-arg",
    "amdgpu-no-queue-ptr",
    "amdgpu-no-workitem-id-y",
    "amdgpu-no-workitem-id-z",
];

/// Matrix instructions write vector registers as well; accumulator registers would only be copied from and to. A kernel that
/// needs more than the 256 vector registers is better off without these words.
pub const NO_ACCUMULATORS: &str = "[\"amdgpu-agpr-alloc\", \"0\"], ";

/// Bounds of views.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// Every access is asked about.
    Tested,
    /// Not those that are inside by what is known of threads and blocks.
    Folded,
}

/// Lowers a kernel for a chip.
///
/// # Errors
/// [`TargetError::Unsupported`] if the tiles do not fit its LDS.
pub fn lower(kernel: &Kernel, arch: &Arch, bounds: Bounds) -> Result<Lowered, TargetError> {
    let scheduled = schedule::schedule(kernel, arch)?;
    let mut function = mlir::Fn::default();
    function.asks_last = true;
    function.known = (bounds == Bounds::Folded).then(known::Known::default);
    let mut threads = block::Threads::new(function, arch, scheduled.threads);
    if kernel.schedule.symbols_by_value {
        threads.symbols = mlir::Ty::Constant;
    }
    let symbols = threads.symbols;
    let mut emitter = emit::Emitter::run(threads, &scheduled);
    if let Some(reason) = emitter.fault.take() {
        return Err(TargetError::Codegen { kernel: kernel.program.name.clone(), reason });
    }
    let mut text = String::from("module {\n");
    // Which version of code objects: 5 is what every ROCm from 5.5 on loads.
    text.push_str("  llvm.module_flags [#llvm.mlir.module_flag<error, \"amdhsa_code_object_version\", 500 : i32>]\n");
    memory(&mut text, "shared", emitter.shared_bytes());
    if emitter.t.meetings > 0 {
        memory(&mut text, "meet", MEET_BYTES);
    }
    let address = |i: usize| format!("%{i}: !llvm.ptr<1> {{llvm.align = 16 : i64, llvm.noundef}}");
    let addresses = scheduled.params.len();
    let mut args: Vec<String> = (0..addresses).map(address).collect();
    args.push(match symbols {
        // One argument of 24 bytes, read where it lies.
        mlir::Ty::Constant => {
            format!("%{addresses}: !llvm.ptr<4> {{llvm.byref = !llvm.array<6 x i32>, llvm.align = 4 : i64}}")
        }
        _ => address(addresses),
    });
    let threads = scheduled.threads;
    let unused: Vec<String> = UNUSED.iter().map(|word| format!("\"{word}\"")).collect();
    let _ = writeln!(
        text,
        "  llvm.func @{}({}) attributes {{rocdl.kernel, rocdl.reqd_work_group_size = array<i32: {threads}, 1, 1>, \
         rocdl.flat_work_group_size = \"{threads},{threads}\", passthrough = [{}, {NO_ACCUMULATORS}\
         [\"uniform-work-group-size\", \"true\"]]}} {{",
        scheduled.name,
        args.join(", "),
        unused.join(", "),
    );
    text.push_str(emitter.t.f.text());
    text.push_str("    llvm.return\n  }\n}\n");
    let gpu = GpuKernel { threads, shared_bytes: 0, cluster: 1, ..GpuKernel::default() };
    Ok(Lowered { mlir: text, gpu, sched: scheduled.to_string() })
}

/// A static piece of LDS.
fn memory(text: &mut String, name: &str, bytes: u32) {
    let ty = format!("!llvm.array<{bytes} x i8>");
    let _ = writeln!(
        text,
        "  llvm.mlir.global internal @{name}() {{addr_space = 3 : i32, alignment = 128 : i64}} : {ty} {{\n    \
         %0 = llvm.mlir.undef : {ty}\n    llvm.return %0 : {ty}\n  }}"
    );
}
