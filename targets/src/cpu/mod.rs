//! The CPU target: tile programs to x86-64 code.
//!
//! One function a kernel, made by Cranelift, which walks the blocks it is given; inside a block a tile program becomes loops
//! over 128-bit vectors (`elementwise`), masked copies (`memory`) and calls of routines. Dot products and the decoding of weights are
//! assembled by us in 256- or 512-bit vectors (`atoms`), since Cranelift has neither. Nothing is resolved
//! at load time: the blob has no relocation left and calls no library.
//!
//! The way down, one file a step:
//!
//! | file | does |
//! |---|---|
//! | `liveness` | when each value is last used |
//! | `lower` | block loop, control flow, which slot a value lives in, what is fused |
//! | `tile` | late tiles: expressions over strided leaves; the scratch arena |
//! | `memory` | views, bounds, loads, stores, gathers, scatters |
//! | `elementwise` | loop nests: maps, reductions, scans |
//! | `math` | scalar operations and conversions |
//! | `wide` | the hot loop nests again, in 512-bit vectors |
//! | `dot`, `atoms`, `asm` | dot products: choice, inner loops, encoding |
//! | `topk`, `routines` | streaming selection; copies |
//! | `link` | one blob |
//!
//! A kernel is called as `extern "C" fn(args: *const *mut u8, syms: *const i32, scratch: *mut u8, first: u64, last: u64)`: the base
//! address of each parameter's buffer, the six values of [`dsc_ir::SymValues`], the worker's scratch (aligned to 64 bytes), and the range of
//! blocks in linear order, axis 0 fastest.
//!
//! **Invariants.** The same kernels give the same bytes: nothing depends on threads or addresses. Every access to a parameter is
//! checked against its view. A sum's order depends on shapes only.

mod asm;
mod atoms;
mod dot;
mod elementwise;
mod emit;
mod link;
mod liveness;
mod lower;
mod math;
mod memory;
mod routines;
mod tile;
mod topk;
mod wide;

use crate::parallel::in_parallel;
use crate::{Kernel, KernelCode, Module, Target, TargetError};
use asm::Width;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{AbiParam, ExternalName, Function, Signature, UserFuncName, types};
use cranelift_codegen::isa::{CallConv, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, FinalizedRelocTarget, binemit::Reloc, isa};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use dsc_ir::schedule::{KernelShape, Schedule};
use emit::{Fun, Routine};
use link::Piece;
use std::collections::{BTreeMap, BTreeSet};

/// What the processor is known to have: the x86-64 microarchitecture levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX2, FMA, F16C, BMI.
    V3,
    /// AVX-512 F, BW, DQ and VL as well.
    V4,
}

impl Level {
    /// The highest level of the machine this runs on, if it has any.
    pub fn host() -> Option<Level> {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return Some(Level::V4);
            }
            if has!("avx2") && has!("fma") && has!("f16c") && has!("bmi1") && has!("bmi2") && has!("lzcnt") {
                return Some(Level::V3);
            }
        }
        None
    }

    fn width(self) -> Width {
        match self {
            Level::V3 => Width::Y,
            Level::V4 => Width::Z,
        }
    }

    /// Names of the features as `/proc/cpuinfo` has them.
    fn features(self) -> Vec<String> {
        let v3 = ["avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "popcnt", "sse4_2"];
        let v4 = ["avx512f", "avx512bw", "avx512dq", "avx512vl"];
        let more: &[&str] = if self == Level::V4 { &v4 } else { &[] };
        v3.iter().chain(more).map(|s| (*s).to_owned()).collect()
    }
}

/// x86-64 code through Cranelift.
#[derive(Clone, Copy, Debug)]
pub struct CpuTarget {
    level: Level,
    asm: bool,
}

impl Default for CpuTarget {
    /// For the machine this runs on; for [`Level::V3`] if that is none we know.
    fn default() -> CpuTarget {
        CpuTarget::new(Level::host().unwrap_or(Level::V3))
    }
}

impl CpuTarget {
    /// Code for every machine of that level.
    pub fn new(level: Level) -> CpuTarget {
        CpuTarget { level, asm: false }
    }

    /// Whether to fill [`Module::asm`].
    pub fn with_asm(self, asm: bool) -> CpuTarget {
        CpuTarget { asm, ..self }
    }

    /// The level compiled for.
    pub fn level(self) -> Level {
        self.level
    }

    fn isa(self) -> Result<OwnedTargetIsa, TargetError> {
        let setup = |reason: String| TargetError::Setup { target: "cpu".to_owned(), reason };
        let mut flags = settings::builder();
        for (name, value) in [
            ("opt_level", "speed"),
            ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
            ("enable_probestack", "false"),
            ("unwind_info", "false"),
            ("is_pic", "true"),
        ] {
            flags.set(name, value).map_err(|e| setup(e.to_string()))?;
        }
        let mut builder = isa::lookup_by_name("x86_64-unknown-linux-gnu").map_err(|e| setup(e.to_string()))?;
        for feature in [
            "has_sse3",
            "has_ssse3",
            "has_sse41",
            "has_sse42",
            "has_popcnt",
            "has_avx",
            "has_avx2",
            "has_fma",
            "has_bmi1",
            "has_bmi2",
            "has_lzcnt",
        ] {
            builder.enable(feature).map_err(|e| setup(e.to_string()))?;
        }
        builder.finish(settings::Flags::new(flags)).map_err(|e| setup(e.to_string()))
    }
}

impl Target for CpuTarget {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn multiplies_fp8(&self) -> bool {
        false
    }

    /// Products: rows enough that packing the weights and decoding the activations once a tile vanish beside the multiplications;
    /// for one token the whole contraction in one go, so that weights stream in long rows.
    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        let base = Schedule::heuristic(shape, tokens);
        let rows = |most: u32| u64::from(most).min(shape.m_max.max(1)) as u32;
        match shape.op {
            "linear" | "head_linear" | "expert_linear" | "expert_linear_sorted" if tokens <= 16 => Schedule {
                tile_m: rows(tokens),
                tile_n: (shape.n / 8).next_multiple_of(16).clamp(16, 64).min(shape.n.max(1)),
                tile_k: shape.k.clamp(1, 4096),
                ..base
            },
            "linear" | "head_linear" | "expert_linear" | "expert_linear_sorted" => Schedule {
                tile_m: rows(if shape.op.starts_with("expert_linear") { 64 } else { 128 }),
                tile_n: if shape.n >= 512 { 128 } else { 64.min(shape.n.max(1)) },
                tile_k: shape.k.clamp(1, 512),
                ..base
            },
            "mha_attention" => Schedule { tile_m: rows(64), tile_n: 64, ..base },
            _ => base,
        }
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let isa = self.isa()?;
        let compiled = in_parallel(kernels, |k| compile_kernel(&isa, k, self.level.width(), self.asm));
        let compiled = compiled.into_iter().collect::<Result<Vec<_>, _>>()?;
        let wanted: BTreeSet<Routine> =
            compiled.iter().flat_map(|k| k.piece.calls.iter().map(|c| c.2.clone())).collect();
        let routines = compile_routines(&isa, wanted, self.level.width())?;
        let pieces: Vec<Piece> = compiled.iter().map(|k| k.piece.clone()).collect();
        let (code, starts) = link::link(&pieces, &routines);
        let asm = self.asm.then(|| listing(kernels, &compiled, &routines, &starts));
        let kernel_code = compiled.iter().zip(kernels).zip(starts).map(|((c, k), entry)| KernelCode {
            name: k.program.name.clone(),
            entry,
            code_bytes: c.piece.code.len() as u64,
            scratch_bytes: c.scratch_bytes,
            gpu: None,
        });
        let (kernels, features) = (kernel_code.collect(), self.level.features());
        Ok(Module { code, kernels, asm, features, ..Module::default() })
    }
}

/// Where each piece is, then the kernels' code.
fn listing(kernels: &[Kernel], compiled: &[Compiled], routines: &[(Routine, Piece)], starts: &[u64]) -> String {
    let names = kernels.iter().map(|k| format!("kernel {}", k.program.name));
    let names = names.chain(routines.iter().map(|r| format!("routine {:?}", r.0)));
    let map: String = names.zip(starts).map(|(name, start)| format!("; {start:#x} {name}\n")).collect();
    let code: Vec<String> = compiled.iter().filter_map(|k| k.asm.clone()).collect();
    format!("{map}\n{}", code.join("\n"))
}

struct Compiled {
    piece: Piece,
    scratch_bytes: u64,
    asm: Option<String>,
}

fn compile_kernel(isa: &OwnedTargetIsa, kernel: &Kernel, width: Width, asm: bool) -> Result<Compiled, TargetError> {
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(types::I64); 5];
    let mut function = Function::with_name_signature(UserFuncName::user(1, 0), signature);
    let mut builder_context = FunctionBuilderContext::new();
    let builder = FunctionBuilder::new(&mut function, &mut builder_context);
    let (scratch_bytes, callees) = lower::lower(Fun::new(builder, isa.frontend_config()), &kernel.program, width);
    let name = &kernel.program.name;
    let (piece, text) = compile_function(isa, function, &callees, name, asm)?;
    let asm = text.map(|text| format!("; kernel {name}, {scratch_bytes} bytes of scratch\n{text}"));
    Ok(Compiled { piece, scratch_bytes, asm })
}

/// Compiles `wanted` and all that they call.
fn compile_routines(
    isa: &OwnedTargetIsa,
    wanted: BTreeSet<Routine>,
    width: Width,
) -> Result<Vec<(Routine, Piece)>, TargetError> {
    let mut done: BTreeMap<Routine, Piece> = BTreeMap::new();
    let mut pending: Vec<Routine> = wanted.into_iter().collect();
    while let Some(routine) = pending.pop() {
        if done.contains_key(&routine) {
            continue;
        }
        let piece = match routine {
            Routine::Atom(atom) => Piece { code: atoms::assemble(atom, width), calls: Vec::new() },
            Routine::CopyRows if width == Width::Z => Piece { code: atoms::assemble_copy(), calls: Vec::new() },
            Routine::Wide(ref code) => Piece { code: code.0.to_vec(), calls: Vec::new() },
            _ => compile_routine(isa, &routine)?,
        };
        pending.extend(piece.calls.iter().map(|c| c.2.clone()));
        done.insert(routine, piece);
    }
    Ok(done.into_iter().collect())
}

fn compile_routine(isa: &OwnedTargetIsa, routine: &Routine) -> Result<Piece, TargetError> {
    let mut function = Function::with_name_signature(UserFuncName::user(1, 0), routine.signature());
    let mut builder_context = FunctionBuilderContext::new();
    let mut f = Fun::new(FunctionBuilder::new(&mut function, &mut builder_context), isa.frontend_config());
    let entry = f.b.create_block();
    f.b.append_block_params_for_function_params(entry);
    let params = f.switch(entry);
    routines::emit(&mut f, routine, &params);
    let callees = f.routines();
    f.finish();
    Ok(compile_function(isa, function, &callees, &format!("{routine:?}"), false)?.0)
}

/// Code of a finished function. Its calls name `callees` by place; any other relocation is an error.
fn compile_function(
    isa: &OwnedTargetIsa,
    function: Function,
    callees: &[Routine],
    name: &str,
    asm: bool,
) -> Result<(Piece, Option<String>), TargetError> {
    let fail = |reason: String| TargetError::Codegen { kernel: name.to_owned(), reason };
    let mut context = Context::for_function(function);
    context.set_disasm(asm);
    let code = context
        .compile(&**isa, &mut ControlPlane::default())
        .map_err(|e| cranelift_codegen::print_errors::pretty_error(e.func, e.inner))
        .map_err(fail)?;
    let mut piece = Piece { code: code.code_buffer().to_vec(), calls: Vec::new() };
    let text = code.vcode.clone();
    let relocations: Vec<_> = code.buffer.relocs().to_vec();
    for r in relocations {
        let callee = match &r.target {
            FinalizedRelocTarget::ExternalName(ExternalName::User(user)) if r.kind == Reloc::X86CallPCRel4 => {
                let user = &context.func.params.user_named_funcs()[*user];
                callees.get(user.index as usize).cloned()
            }
            _ => None,
        };
        let Some(callee) = callee else { return Err(fail(format!("relocation {:?} {:?}", r.kind, r.target))) };
        piece.calls.push((r.offset, r.addend, callee));
    }
    Ok((piece, text))
}
