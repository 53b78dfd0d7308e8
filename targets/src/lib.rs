//! The targets of `dsc`: what each can run, and how tile programs become its code.
//!
//! A target is one folder behind the [`Target`] trait and one cargo feature. It takes [`Kernel`]s (a tile program and its
//! schedule) and gives back a [`Module`]: bytes that a runtime maps and calls, with no symbol left to resolve.
//!
//! **Invariants.** A target never changes what a program means: the interpreter in `dsc-ir` is the oracle. Capabilities are
//! data ([`targets`]), so that `dsc targets` and selection read the same table.

#[cfg(any(feature = "amd", feature = "emulate"))]
pub mod amd;
#[cfg(feature = "cpu")]
pub mod cpu;
#[cfg(any(feature = "llvm", feature = "emulate"))]
pub mod gpu;
#[cfg(any(feature = "nvidia", feature = "emulate"))]
pub mod nvidia;
#[cfg(any(feature = "cpu", feature = "llvm"))]
mod parallel;

use dsc_ir::artifact::GpuKernel;
use dsc_ir::schedule::{KernelShape, Schedule, Teams};
use dsc_ir::tile::Program;
use std::path::PathBuf;

/// What to compile: a program, and how the target should run it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The tile program; verified by the caller.
    pub program: Program,
    /// Its schedule for this target.
    pub schedule: Schedule,
}

/// One kernel inside a [`Module`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCode {
    /// The program's name.
    pub name: String,
    /// Where it starts, in bytes from the start of [`Module::code`].
    pub entry: u64,
    /// Bytes of code, without the routines it shares with other kernels.
    pub code_bytes: u64,
    /// Bytes of scratch each worker must hand to a call, aligned to 64.
    pub scratch_bytes: u64,
    /// How a GPU launches it.
    pub gpu: Option<GpuKernel>,
}

/// Compiled kernels: one position-independent blob.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Machine code and its constants; may be mapped at any address aligned to 64 bytes.
    pub code: Vec<u8>,
    /// The kernels in the order given to [`Target::compile`].
    pub kernels: Vec<KernelCode>,
    /// Section `asm` of the artifact: portable assembly of all kernels, where a target has such.
    pub portable: Option<Vec<u8>>,
    /// Readable code, if it was asked for.
    pub asm: Option<String>,
    /// The levels that [`TargetOptions::levels`] asked for, of targets that keep them by kernel; in the kernels' order.
    pub listings: Vec<Listing>,
    /// What the processor must have, by the names of `/proc/cpuinfo`.
    pub features: Vec<String>,
    /// What a user should know of the code: one line each.
    pub warnings: Vec<String>,
}

#[cfg(feature = "llvm")]
impl Module {
    /// Appends a kernel's own image, which drivers read by words; gives where it starts.
    fn append(&mut self, image: &[u8]) -> u64 {
        let start = self.code.len().next_multiple_of(64);
        self.code.resize(start, 0);
        self.code.extend(image);
        start as u64
    }
}

/// A level that kernels pass through inside a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// The scheduled tile program.
    Sched,
    /// MLIR.
    Mlir,
    /// LLVM IR.
    Llvm,
    /// Assembly.
    Asm,
}

/// One kernel at one level, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The kernel's name.
    pub kernel: String,
    /// The level.
    pub level: Level,
    /// The text.
    pub text: String,
}

/// What a target may be told.
#[derive(Clone, Debug, Default)]
pub struct TargetOptions {
    /// Levels to keep as text.
    pub levels: Vec<Level>,
    /// The assembler of NVIDIA targets, `none` for none; looked for if not given.
    pub ptxas: Option<PathBuf>,
    /// The linker of AMD targets; looked for if not given.
    pub lld: Option<PathBuf>,
}

/// Why a target could not compile a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The program uses something this target does not do.
    #[error("kernel {kernel}: {op} is not supported: {reason}")]
    Unsupported {
        /// The program's name.
        kernel: String,
        /// The operation.
        op: String,
        /// What about it.
        reason: String,
    },
    /// The code generator refused what we gave it: our bug.
    #[error("kernel {kernel}: code generation failed: {reason}")]
    Codegen {
        /// The program's name.
        kernel: String,
        /// What it said.
        reason: String,
    },
    /// The target cannot be set up on this build.
    #[error("target {target}: {reason}")]
    Setup {
        /// The target's name.
        target: String,
        /// What is missing.
        reason: String,
    },
}

/// Turns tile programs into code.
pub trait Target {
    /// The name that `--target` takes.
    fn name(&self) -> &'static str;

    /// The levels it can keep as text.
    fn levels(&self) -> &'static [Level] {
        &[Level::Asm]
    }

    /// Whether it multiplies e4m3 tiles. If not, the graph is lowered to plain weights and dequantised activations.
    fn multiplies_fp8(&self) -> bool;

    /// Blocks that a launch needs to fill it, where it runs all of them at once; 0 where a few workers take them one after another.
    fn blocks(&self) -> u32 {
        0
    }

    /// Tokens of a prefill step, unless it is said: steps of fewer read the weights more often than it takes to multiply by them.
    fn chunk(&self) -> u32 {
        512
    }

    /// Sequences of a decode step at most, unless it is said: steps of fewer read the weights again for the others.
    fn batch(&self) -> u32 {
        if self.blocks() > 0 { 64 } else { 16 }
    }

    /// How it runs a kernel of that shape, in steps of at most `tokens` tokens.
    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        Schedule::heuristic(shape, tokens)
    }

    /// Bytes of operands that a block can keep beside what else it needs, where [`blocks`](Target::blocks) is not 0.
    fn block_bytes(&self) -> u32 {
        0
    }

    /// Which of its blocks can join parts of a loop by themselves.
    fn teams(&self) -> Teams {
        Teams::default()
    }

    /// Whether its copies bring boxes of rows that lie together faster than rows chosen by number.
    fn copies_boxes(&self) -> bool {
        false
    }

    /// Whether blocks of one launch run different products as fast as blocks of two launches do.
    fn runs_beside(&self) -> bool {
        false
    }

    /// Whether scores of many tokens that go to memory and are selected from there take less time than both in one kernel.
    fn selects_from_memory(&self) -> bool {
        false
    }

    /// Whether a block of the kernel fits the device; if not, smaller tiles are tried.
    fn fits(&self, kernel: &Kernel) -> bool {
        let _ = kernel;
        true
    }

    /// Compiles `kernels` into one blob. The same input gives the same bytes.
    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError>;
}

/// The target of that name; with `asm` its modules come with readable code.
///
/// # Errors
/// [`TargetError::Setup`] if there is none, if it is not implemented, or if this build lacks it.
pub fn target(name: &str, asm: bool) -> Result<Box<dyn Target>, TargetError> {
    let levels = if asm { vec![Level::Asm] } else { Vec::new() };
    target_with(name, &TargetOptions { levels, ..TargetOptions::default() })
}

/// The target of that name, told more.
///
/// # Errors
/// As [`target`].
pub fn target_with(name: &str, options: &TargetOptions) -> Result<Box<dyn Target>, TargetError> {
    #[cfg(feature = "nvidia")]
    if let Some(target) = nvidia::NvidiaTarget::named(name, options) {
        return Ok(Box::new(target));
    }
    #[cfg(feature = "amd")]
    if let Some(target) = amd::AmdTarget::named(name, options) {
        return Ok(Box::new(target));
    }
    let asm = options.levels.contains(&Level::Asm);
    let _ = asm;
    let refuse = |reason: &str| Err(TargetError::Setup { target: name.to_owned(), reason: reason.to_owned() });
    match name {
        #[cfg(feature = "cpu")]
        "cpu" => Ok(Box::new(cpu::CpuTarget::default().with_asm(asm))),
        #[cfg(feature = "cpu")]
        "cpu-v3" => Ok(Box::new(cpu::CpuTarget::new(cpu::Level::V3).with_asm(asm))),
        #[cfg(feature = "cpu")]
        "cpu-v4" => Ok(Box::new(cpu::CpuTarget::new(cpu::Level::V4).with_asm(asm))),
        _ if name.starts_with("sm_") && targets().iter().any(|t| t.name == name) => {
            refuse("this dsc was built without it; build it with `--features nvidia` (needs LLVM 22)")
        }
        _ if name.starts_with("gfx") && targets().iter().any(|t| t.name == name) => {
            refuse("this dsc was built without it; build it with `--features amd` (needs LLVM 22)")
        }
        _ if targets().iter().any(|t| t.name == name) => refuse("not implemented (see `dsc targets`)"),
        _ => refuse("there is no such target (`dsc targets` lists them)"),
    }
}

/// How far a target has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Compiles every tile program, and its output was run on such a device: by the test suite, or as `note` says.
    RunOnHardware,
    /// Makes code of tile programs, which was not run on the hardware.
    Compiles,
    /// Named so that a user can see it is known; nothing is implemented.
    Planned,
}

/// One line of `dsc targets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct TargetInfo {
    /// The name that `--target` takes.
    pub name: &'static str,
    /// What it is.
    pub description: &'static str,
    /// How code is made for it.
    pub lowering: &'static str,
    /// What the device must have.
    pub requires: &'static [&'static str],
    /// Bytes of a vector register or warp-wide fragment row that a kernel library may tune for.
    pub vector_bytes: u32,
    /// How far it has come.
    pub status: Status,
    /// The status in words.
    pub note: &'static str,
}

/// Every target that has a name, implemented or not.
pub fn targets() -> &'static [TargetInfo] {
    const PLANNED: TargetInfo = TargetInfo {
        name: "",
        description: "",
        lowering: "none",
        requires: &[],
        vector_bytes: 0,
        status: Status::Planned,
        note: "planned: not implemented",
    };
    const NVIDIA: TargetInfo = TargetInfo {
        name: "",
        description: "",
        lowering: "MLIR and LLVM to PTX; cubins with ptxas",
        requires: &[],
        vector_bytes: 16,
        status: Status::Compiles,
        note: if cfg!(feature = "nvidia") {
            "compiles; not run on hardware"
        } else {
            "not in this build (feature `nvidia`)"
        },
    };
    const AMD: TargetInfo = TargetInfo {
        name: "",
        description: "",
        lowering: "MLIR and LLVM to code objects, linked by lld",
        requires: &[],
        vector_bytes: 16,
        status: Status::Compiles,
        note: if cfg!(feature = "amd") {
            "executed on an interpreter of its instructions, not on hardware; HIP tried on a stand-in only"
        } else {
            "not in this build (feature `amd`)"
        },
    };
    const ALL: &[TargetInfo] = &[
        TargetInfo {
            name: "cpu",
            description: "x86-64 with AVX2 and FMA; AVX-512 where the machine has it",
            lowering: "Cranelift, with dot products from our own assembler",
            requires: &["avx2", "fma", "f16c", "bmi2"],
            vector_bytes: 64,
            status: Status::RunOnHardware,
            note: "every tile op; run by the test suite on the build machine",
        },
        TargetInfo { name: "sm_80", description: "NVIDIA Ampere (A100), without fp8", ..NVIDIA },
        TargetInfo { name: "sm_89", description: "NVIDIA Ada (L40S)", ..NVIDIA },
        TargetInfo {
            name: "sm_90a",
            description: "NVIDIA Hopper (H100, H200)",
            status: Status::RunOnHardware,
            note: "every tile op; run on an H200 (docs/nvidia.md has what was measured)",
            ..NVIDIA
        },
        TargetInfo { name: "sm_100a", description: "NVIDIA Blackwell (B200)", ..NVIDIA },
        TargetInfo { name: "sm_120a", description: "NVIDIA Blackwell (RTX 5090)", ..NVIDIA },
        TargetInfo { name: "gfx942", description: "AMD CDNA 3 (MI300X, MI325X)", ..AMD },
        TargetInfo { name: "gfx950", description: "AMD CDNA 4 (MI350X, MI355X)", ..AMD },
        TargetInfo { name: "ascend910b", description: "Huawei Ascend 910B", ..PLANNED },
    ];
    ALL
}
