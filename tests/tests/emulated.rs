//! Every kernel of some models as NVIDIA GPUs would run it: lowered the plain way and emulated, against the tile interpreter, on the
//! same random memory. The emulator finds races, missing barriers and accesses outside of buffers too. Needs neither LLVM nor a GPU.
//!
//! Hopper's tensor maps and warpgroup products are not emulated: its kernels are lowered as on an architecture without them.

mod launches;

use dsc::compile::{Options, compile_for};
use dsc::front::config::ModelConfig;
use dsc_ir::artifact::Numerics;
use dsc_ir::schedule::{KernelShape, Schedule};
use dsc_targets::gpu::Lowered;
use dsc_targets::nvidia::arch::Arch;
use dsc_targets::nvidia::lower::emulate::run_blocks;
use dsc_targets::nvidia::lower::{fits, lower};
use dsc_targets::{Kernel, KernelCode, Module, Target, TargetError};
use launches::{Errors, Launch, check_plan};
use std::cell::RefCell;
use std::path::Path;

/// Lowers kernels, and keeps them.
struct Emulated {
    arch: Arch,
    /// Whether every kernel begins with loads and knows bounds, not only those that have few tokens to wait for.
    early: bool,
    lowered: RefCell<Vec<Lowered>>,
}

impl Emulated {
    fn new(arch: &str, early: bool) -> Emulated {
        let arch = Arch::named(arch).expect("a known architecture");
        Emulated { arch: Arch { has_wgmma: false, has_tma: false, ..*arch }, early, lowered: RefCell::default() }
    }

    fn check(&self, kernel: usize, launch: &Launch) -> Result<Errors, String> {
        let mut buffers = launch.buffers.clone();
        let lowered = &self.lowered.borrow()[kernel];
        run_blocks(launch.program, lowered, &launch.syms, &mut buffers, &launch.bindings, kernel as u64)?;
        launch.compare(&buffers)
    }
}

impl Target for Emulated {
    fn name(&self) -> &'static str {
        self.arch.name
    }

    fn multiplies_fp8(&self) -> bool {
        self.arch.has_fp8_mma
    }

    fn blocks(&self) -> u32 {
        self.arch.device.sms
    }

    fn copies_boxes(&self) -> bool {
        self.arch.has_tma
    }

    fn runs_beside(&self) -> bool {
        true
    }

    fn block_bytes(&self) -> u32 {
        dsc_targets::gpu::block_bytes(&self.arch)
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        let early = self.early || matches!(shape.op, "row" | "heads" | "head_linear");
        Schedule { early, ..Schedule::wide(shape, tokens) }
    }

    fn fits(&self, kernel: &Kernel) -> bool {
        fits(kernel, &self.arch)
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let mut module = Module::default();
        for kernel in kernels {
            let lowered = lower(kernel, &self.arch)?;
            module.kernels.push(KernelCode {
                name: kernel.program.name.clone(),
                entry: module.code.len() as u64,
                code_bytes: lowered.mlir.len() as u64,
                scratch_bytes: 0,
                gpu: None,
            });
            module.code.extend(lowered.mlir.as_bytes());
            self.lowered.borrow_mut().push(lowered);
        }
        Ok(module)
    }
}

fn check_model(folder: &str, numerics: Numerics, arch: &str) {
    check_model_on(folder, numerics, arch, false);
}

fn check_model_on(folder: &str, numerics: Numerics, arch: &str, early: bool) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let config = ModelConfig::read(&dir).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let options = Options { numerics, max_context: Some(1024), ..Options::default() };
    let target = Emulated::new(arch, early);
    let compiled = compile_for(&target, &config, "", None, &options, &mut |_| {});
    let compiled = compiled.unwrap_or_else(|e| panic!("{folder}: {e}"));
    check_plan(&format!("{folder} {numerics:?} {arch}"), &compiled.plan, &|kernel, launch| {
        target.check(kernel, launch)
    });
}

#[test]
fn v32_odd_exact() {
    check_model("golden/v32-odd", Numerics::Exact, "sm_90a");
}

#[test]
fn v32_odd_deployed() {
    check_model("golden/v32-odd", Numerics::Deployed, "sm_90a");
}

/// Tiles whose last round is a part, of all kinds of kernels.
#[test]
fn v32_odd_deployed_with_known_bounds() {
    check_model_on("golden/v32-odd", Numerics::Deployed, "sm_90a", true);
}

#[test]
fn v32_odd_deployed_without_fp8() {
    check_model("golden/v32-odd", Numerics::Deployed, "sm_80");
}

#[test]
fn v32_tiny_exact() {
    check_model("golden/v32-tiny", Numerics::Exact, "sm_90a");
}

#[test]
fn v32_tiny_deployed() {
    check_model("golden/v32-tiny", Numerics::Deployed, "sm_90a");
}

#[test]
#[ignore = "takes a minute or two; the other models have these kernels in smaller sizes"]
fn v32_heads_fp8_deployed() {
    check_model("golden/v32-heads-fp8", Numerics::Deployed, "sm_90a");
}

#[test]
fn glm_tiny_exact() {
    check_model("golden/glm-tiny", Numerics::Exact, "sm_90a");
}

#[test]
fn glm_tiny_deployed() {
    check_model("golden/glm-tiny", Numerics::Deployed, "sm_90a");
}

#[test]
fn tiny_model_deployed() {
    check_model("../examples/tiny-model", Numerics::Deployed, "sm_90a");
}

#[test]
#[ignore = "takes a minute or two; the other models have these kernels in smaller sizes"]
fn tiny_model_deployed_without_fp8() {
    check_model("../examples/tiny-model", Numerics::Deployed, "sm_80");
}
