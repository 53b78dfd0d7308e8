//! Every kernel of some models, compiled to code objects for AMD GPUs, run on an interpreter of their instructions (`dsc-cdna`) and
//! compared with the tile interpreter on the same random memory. Not hardware; but waits, barriers, LDS and bounds are checked as none does.

#[path = "../../targets/tests/support/attention.rs"]
mod attention;
#[path = "executed/device.rs"]
mod device;
#[path = "executed/hot.rs"]
mod hot;
mod launches;
#[path = "../../targets/tests/support/linear.rs"]
mod linear;
#[path = "executed/products.rs"]
mod products;

use device::Interpreted;
use dsc::compile::{Options, compile_dir, compile_dir_for};
use dsc_cdna::{CodeObject, Memory};
use dsc_ir::artifact::{GpuKernel, Numerics};
use dsc_ir::schedule::{KernelShape, Schedule};
use dsc_ir::tile::Program;
use dsc_ir::{Sym, SymValues};
use dsc_runtime::{GenerateOptions, Model, Session};
use dsc_targets::amd::AmdTarget;
use dsc_targets::{Kernel, Level, Module, Target, TargetError, TargetOptions};
use launches::{Errors, Launch, check_plan};
use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::ControlFlow;
use std::path::Path;

/// Compiles for a chip, and keeps the code objects.
struct Executed {
    target: AmdTarget,
    module: RefCell<Module>,
    objects: RefCell<HashMap<u64, CodeObject>>,
}

impl Executed {
    fn new(chip: &str) -> Executed {
        Executed::keeping(chip, Vec::new())
    }

    /// That keeps listings too.
    fn keeping(chip: &str, levels: Vec<Level>) -> Executed {
        let options = TargetOptions { levels, ..TargetOptions::default() };
        let target = AmdTarget::named(chip, &options).expect("a known chip");
        Executed { target, module: RefCell::default(), objects: RefCell::default() }
    }

    /// With bounds folded in all kernels.
    fn folding(self) -> Executed {
        Executed { target: self.target.folding(), ..self }
    }

    /// Decodes a kernel's code object, once.
    fn load(&self, kernel: usize) -> Result<u64, String> {
        let module = self.module.borrow();
        let code = &module.kernels[kernel];
        let mut objects = self.objects.borrow_mut();
        if let Entry::Vacant(free) = objects.entry(code.entry) {
            let bytes = &module.code[code.entry as usize..][..code.code_bytes as usize];
            let object = CodeObject::parse(bytes).map_err(|e| e.to_string())?;
            let gpu = code.gpu.as_ref().ok_or("no launch")?;
            as_a_loader_expects(&object, gpu)?;
            free.insert(object);
        }
        Ok(code.entry)
    }

    fn check(&self, kernel: usize, launch: &Launch) -> Result<Errors, String> {
        let entry = self.load(kernel)?;
        let object = &self.objects.borrow()[&entry];
        let threads = self.module.borrow().kernels[kernel].gpu.as_ref().map_or(0, |g| g.threads);
        let mut memory = Memory::new();
        let read_only = |b: usize| {
            let mut bound = launch.program.params.iter().zip(&launch.bindings).filter(|(_, at)| at.buffer == b);
            bound.all(|(p, _)| !p.access.writes())
        };
        let buffers = launch.buffers.iter().enumerate();
        let starts: Vec<u64> = buffers
            .map(|(b, bytes)| if read_only(b) { memory.alloc_read_only(bytes) } else { memory.alloc(bytes) })
            .collect();
        let symbols: Vec<u8> = launch.syms.0.iter().flat_map(|s| s.to_le_bytes()).collect();
        let bound = launch.bindings.iter().map(|b| starts[b.buffer] + b.offset as u64);
        let mut arguments: Vec<u8> = bound.flat_map(u64::to_le_bytes).collect();
        if object.kernels[0].arguments.last().is_some_and(|a| a.kind == "by_value") {
            arguments.extend(&symbols);
        } else {
            arguments.extend(memory.alloc_read_only(&symbols).to_le_bytes());
        }
        let run = dsc_cdna::Launch {
            kernel: &object.kernels[0].name,
            grid: grid(launch.program, &launch.syms),
            block: [threads, 1, 1],
            dynamic_lds: 0,
            arguments: &arguments,
        };
        // Every other kernel with waves in turns of random length.
        let seed = if kernel.is_multiple_of(2) { 0 } else { kernel as u64 };
        let options = dsc_cdna::Options { seed, ..dsc_cdna::Options::default() };
        object.launch(&run, &mut memory, options).map_err(|e| e.to_string())?;
        let got: Vec<Vec<u8>> = starts.iter().map(|&start| memory.read(start)).collect();
        launch.compare(&got)
    }
}

/// What a loader goes by, and the runtime passes: one kernel, an address an argument (the last of a library's are the symbols) and none
/// hidden, static LDS, no scratch. That its descriptor says what its metadata say, waves of 64 among it, is checked when it is read.
fn as_a_loader_expects(object: &CodeObject, gpu: &GpuKernel) -> Result<(), String> {
    let [kernel] = &object.kernels[..] else { return Err(format!("{} kernels", object.kernels.len())) };
    let resources = gpu.resources.ok_or("no resources")?;
    let last = kernel.arguments.len().saturating_sub(1);
    let addresses = kernel.arguments.iter().enumerate().all(|(i, a)| {
        let symbols = i == last && (a.kind.as_str(), a.size) == ("by_value", 4 * Sym::ALL.len());
        a.offset == 8 * i && (symbols || (a.kind.as_str(), a.size) == ("global_buffer", 8))
    });
    let bytes = kernel.arguments.iter().map(|a| a.size).sum();
    let sizes = [kernel.kernarg_bytes, kernel.lds_bytes, kernel.scratch_bytes, kernel.max_threads as usize];
    let stated = [bytes, resources.static_shared_bytes as usize, 0, gpu.threads as usize];
    if addresses && kernel.hidden.is_empty() && sizes == stated && gpu.shared_bytes == 0 {
        return Ok(());
    }
    Err(format!("a loader would not expect {kernel:?} of {gpu:?}"))
}

/// The blocks of a launch: one more than there is work for where a symbol says how many, as a launch may have.
fn grid(program: &Program, syms: &SymValues) -> [u32; 3] {
    let mut sizes = [1; 3];
    for (size, dim) in sizes.iter_mut().zip(&program.grid) {
        *size = dim.eval(syms) as u32 + u32::from(dim.extent.sym.is_some());
    }
    sizes
}

impl Target for Executed {
    fn name(&self) -> &'static str {
        self.target.name()
    }

    fn multiplies_fp8(&self) -> bool {
        self.target.multiplies_fp8()
    }

    fn blocks(&self) -> u32 {
        self.target.blocks()
    }

    fn block_bytes(&self) -> u32 {
        self.target.block_bytes()
    }

    fn schedule(&self, shape: &KernelShape, tokens: u32) -> Schedule {
        self.target.schedule(shape, tokens)
    }

    fn fits(&self, kernel: &Kernel) -> bool {
        self.target.fits(kernel)
    }

    fn compile(&self, kernels: &[Kernel]) -> Result<Module, TargetError> {
        let module = self.target.compile(kernels)?;
        self.module.replace(module.clone());
        Ok(module)
    }
}

fn check_model(folder: &str, numerics: Numerics, chip: &str) {
    check_model_for(&Executed::new(chip), folder, numerics);
}

fn check_model_for(target: &Executed, folder: &str, numerics: Numerics) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let options = Options { numerics, max_context: Some(1024), ..Options::default() };
    let chip = target.name();
    let compiled = compile_dir_for(target, &dir, &options, &mut |_| {});
    let compiled = compiled.unwrap_or_else(|e| panic!("{folder}: {e}"));
    check_plan(&format!("{folder} {numerics:?} {chip}"), &compiled.plan, &|kernel, launch| {
        target.check(kernel, launch)
    });
}

/// A session of the tiny model, compiled for a target.
fn session(target: &str, open: impl Fn(&Path, &Path) -> Session) -> Session {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-model");
    let numerics = Numerics::Deployed;
    let options = Options { target: target.into(), numerics, max_context: Some(256), ..Options::default() };
    let compiled = compile_dir(&dir, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{target}: {e}"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.dsc");
    std::fs::write(&path, &compiled.bytes).expect("room");
    open(&path, &dir)
}

/// What all layers make of a prompt and of what they said before, on the interpreter and on the CPU.
fn check_generation(chip: &str) {
    let options = dsc_runtime::Options::default();
    let generate = |mut session: Session| {
        let options = GenerateOptions { max_new_tokens: 3, ignore_eos: true, ..GenerateOptions::default() };
        let prompt = [5, 130, 71, 260, 33, 9, 400];
        let result = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(()));
        result.unwrap_or_else(|e| panic!("{e}")).token_ids
    };
    let cpu = session("cpu", |path, dir| {
        Model::open(path, dir, &options).and_then(|m| m.session()).unwrap_or_else(|e| panic!("{e}"))
    });
    let interpreted = session(chip, |path, dir| {
        let model = Model::open_detached(path, dir, &options);
        let device = Box::new(Interpreted::default());
        model.and_then(|m| m.session_on(device)).unwrap_or_else(|e| panic!("{e}"))
    });
    let wanted = generate(cpu);
    assert_eq!(generate(interpreted), wanted);
    println!("{chip}: {wanted:?}");
}

#[test]
fn tiny_model_says_the_same_gfx942() {
    check_generation("gfx942");
}

#[test]
fn tiny_model_says_the_same_gfx950() {
    check_generation("gfx950");
}

/// Small models need it of no kernel: here it is done to all. Sizes that tiles do not divide keep their tests.
#[test]
fn folded_bounds_gfx942() {
    check_model_for(&Executed::new("gfx942").folding(), "golden/v32-odd", Numerics::Deployed);
}

#[test]
fn folded_bounds_gfx950() {
    check_model_for(&Executed::new("gfx950").folding(), "golden/v32-tiny", Numerics::Deployed);
}

/// Every kernel of a model, in both numerics, on both chips.
macro_rules! models {
    ($($name:ident: $folder:literal;)*) => {$(
        mod $name {
            use super::{Numerics, check_model};

            #[test]
            fn exact_gfx942() {
                check_model($folder, Numerics::Exact, "gfx942");
            }

            #[test]
            fn exact_gfx950() {
                check_model($folder, Numerics::Exact, "gfx950");
            }

            #[test]
            fn deployed_gfx942() {
                check_model($folder, Numerics::Deployed, "gfx942");
            }

            #[test]
            fn deployed_gfx950() {
                check_model($folder, Numerics::Deployed, "gfx950");
            }
        }
    )*};
}

models! {
    tiny_model: "../examples/tiny-model";
    v32_odd: "golden/v32-odd";
    v32_tiny: "golden/v32-tiny";
    v32_heads_fp8: "golden/v32-heads-fp8";
    glm_tiny: "golden/glm-tiny";
    glm_odd: "golden/glm-odd";
}
