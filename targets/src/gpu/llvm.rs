//! MLIR text to assembly or objects, through the LLVM linked into this binary.
//!
//! The module holds ops of the `llvm` dialect and of a vendor's. For NVIDIA `convert-nvvm-to-llvm` turns those nvvm ops that have no
//! intrinsic into inline assembly; the rest is translated as it is. LLVM's own optimiser does not run unless asked: the lowering prints
//! what it means, and hoisting costs registers that tensor-core kernels do not have.

use inkwell::OptimizationLevel;
use inkwell::context::Context;
use inkwell::llvm_sys::LLVMDiagnosticSeverity::LLVMDSError;
use inkwell::llvm_sys::core::{
    LLVMContextSetDiagnosticHandler, LLVMDisposeMessage, LLVMGetDiagInfoDescription, LLVMGetDiagInfoSeverity,
};
use inkwell::llvm_sys::error_handling::LLVMInstallFatalErrorHandler;
use inkwell::llvm_sys::prelude::LLVMDiagnosticInfoRef;
use inkwell::module::Module;
use inkwell::passes::PassBuilderOptions;
use inkwell::targets::{CodeModel, FileType, InitializationConfig, RelocMode, Target, TargetMachine, TargetTriple};
use melior::diagnostic::{Diagnostic, DiagnosticSeverity};
use melior::dialect::{DialectHandle, DialectRegistry};
use melior::pass::{PassManager, conversion};
use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_void};
use std::rc::Rc;
use std::sync::Once;

/// Messages an error repeats at most: one wrong op may be wrong a thousand times.
const MAX_MESSAGES: usize = 5;

/// What LLVM calls a chip.
#[derive(Clone, Copy, Debug)]
pub struct Chip<'a> {
    /// Target triple.
    pub triple: &'a str,
    /// Processor.
    pub cpu: &'a str,
    /// Subtarget features.
    pub features: &'a str,
}

/// What to make, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Passes to run before code generation, as `opt -passes` takes them; none if empty.
    pub passes: &'static str,
    /// Return the LLVM IR as text.
    pub llvm_ir: bool,
    /// Return assembly.
    pub assembly: bool,
    /// Return an object file.
    pub object: bool,
}

/// Code of one MLIR module: what [`Options`] asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    /// Assembly: PTX, for NVIDIA.
    pub assembly: String,
    /// The object file.
    pub object: Vec<u8>,
    /// The LLVM IR they were made from.
    pub llvm_ir: Option<String>,
}

/// Code of a module given as text; `kernel` is its name in messages. Any number of threads may call it at a time.
///
/// # Errors
/// What MLIR or LLVM said, with the line of `mlir` that it is about. LLVM ends the process where it has no instruction for
/// something; a message then names the kernel.
pub fn generate(kernel: &str, mlir: &str, chip: Chip, options: Options) -> Result<Code, String> {
    set_up();
    KERNEL.with_borrow_mut(|name| *name = kernel.to_owned());
    let context = Context::create();
    let said: RefCell<Vec<String>> = RefCell::default();
    // SAFETY: `said` outlives `context`, which is dropped before it; the handler runs on this thread only.
    unsafe {
        LLVMContextSetDiagnosticHandler(context.raw(), Some(on_diagnostic), (&raw const said).cast_mut().cast());
    }
    let module = translate(mlir, &context)?;
    let machine = machine(chip)?;
    module.set_triple(&TargetTriple::create(chip.triple));
    module.set_data_layout(&machine.get_target_data().get_data_layout());
    module.verify().map_err(|e| format!("LLVM: {}", e.to_string().trim_end()))?;
    if !options.passes.is_empty() {
        module.run_passes(options.passes, &machine, PassBuilderOptions::create()).map_err(|e| format!("LLVM: {e}"))?;
    }
    let mut code = Code { llvm_ir: options.llvm_ir.then(|| module.print_to_string().to_string()), ..Code::default() };
    // Code generation changes the module, so the first of two works on a copy.
    let write = |module: &Module, file| machine.write_to_memory_buffer(module, file).map_err(|e| format!("LLVM: {e}"));
    if options.assembly {
        let copy = options.object.then(|| module.clone());
        let text = write(copy.as_ref().unwrap_or(&module), FileType::Assembly)?;
        code.assembly = String::from_utf8_lossy(text.as_slice()).trim_end_matches('\0').to_owned();
    }
    if options.object {
        code.object = write(&module, FileType::Object)?.as_slice().to_vec();
    }
    match said.take() {
        said if said.is_empty() => Ok(code),
        said => Err(format!("LLVM: {}", said[..said.len().min(MAX_MESSAGES)].join("; "))),
    }
}

fn machine(chip: Chip) -> Result<TargetMachine, String> {
    let triple = TargetTriple::create(chip.triple);
    let target = Target::from_triple(&triple).map_err(|e| format!("LLVM: {e}"))?;
    let (level, reloc) = (OptimizationLevel::Aggressive, RelocMode::Default);
    target
        .create_target_machine(&triple, chip.cpu, chip.features, level, reloc, CodeModel::Default)
        .ok_or_else(|| format!("LLVM makes no code for {}", chip.cpu))
}

/// Parses and verifies `text`, and makes a module of LLVM IR in `context` of it.
fn translate<'c>(text: &str, context: &'c Context) -> Result<Module<'c>, String> {
    let registry = DialectRegistry::new();
    DialectHandle::llvm().insert_dialect(&registry);
    // SAFETY: the handle is a static of MLIR.
    unsafe { DialectHandle::from_raw(mlir_sys::mlirGetDialectHandle__nvvm__()) }.insert_dialect(&registry);
    // SAFETY: as above.
    unsafe { DialectHandle::from_raw(mlir_sys::mlirGetDialectHandle__rocdl__()) }.insert_dialect(&registry);
    // MLIR's own threads would only get in the way of ours, one a kernel.
    let mlir = melior::Context::new_with_registry(&registry, false);
    melior::utility::register_all_llvm_translations(&mlir);
    mlir.load_all_available_dialects();
    let said: Rc<RefCell<Vec<String>>> = Rc::default();
    let sink = said.clone();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    mlir.attach_diagnostic_handler(move |d| {
        if matches!(d.severity(), DiagnosticSeverity::Error) && sink.borrow().len() < MAX_MESSAGES {
            sink.borrow_mut().push(describe(&d, &lines));
        }
        true
    });
    let fail = |what: &str| match said.take() {
        said if said.is_empty() => format!("MLIR: {what} failed without a message"),
        said => format!("MLIR: {}", said.join("\n")),
    };
    let mut module = melior::ir::Module::parse(&mlir, text).ok_or_else(|| fail("parsing"))?;
    let passes = PassManager::new(&mlir);
    passes.add_pass(conversion::create_nvvm_to_llvm());
    passes.run(&mut module).map_err(|_| fail("convert-nvvm-to-llvm"))?;
    // SAFETY: the operation is a verified module, the context is alive; both libraries are the same LLVM, so its pointers are
    // those of inkwell. The module that comes back is ours.
    unsafe {
        let raw = mlir_sys::mlirTranslateModuleToLLVMIR(module.as_operation().to_raw(), context.raw().cast::<_>());
        if raw.is_null() { Err(fail("translation to LLVM IR")) } else { Ok(Module::new(raw.cast())) }
    }
}

/// Message, place and text of a diagnostic.
fn describe(diagnostic: &Diagnostic, lines: &[String]) -> String {
    let location = diagnostic.location();
    if !location.is_file_line_col_range() {
        return diagnostic.to_string();
    }
    let (line, column) = (location.file_line_col_range_start_line(), location.file_line_col_range_start_column());
    let mut text = format!("{diagnostic} (line {line}, column {column})");
    if let Some(source) = line.checked_sub(1).and_then(|i| lines.get(i)) {
        const SHOWN: usize = 200;
        text += "\n    ";
        text.extend(source.trim().chars().take(SHOWN));
    }
    text
}

/// Keeps LLVM's errors; without a handler LLVM prints them and ends the process.
extern "C" fn on_diagnostic(info: LLVMDiagnosticInfoRef, sink: *mut c_void) {
    // SAFETY: LLVM hands over a live diagnostic, and the pointer that `generate` registered, which outlives the context.
    unsafe {
        if LLVMGetDiagInfoSeverity(info) == LLVMDSError {
            let text = LLVMGetDiagInfoDescription(info);
            (*sink.cast::<RefCell<Vec<String>>>())
                .borrow_mut()
                .push(CStr::from_ptr(text).to_string_lossy().into_owned());
            LLVMDisposeMessage(text);
        }
    }
}

thread_local! {
    /// What this thread is compiling, for [`on_fatal_error`].
    static KERNEL: RefCell<String> = const { RefCell::new(String::new()) };
}

/// LLVM has reached a state that it cannot return from. Says so; destructors must not run while other threads are in LLVM.
extern "C" fn on_fatal_error(reason: *const c_char) {
    // SAFETY: LLVM hands over a C string.
    let reason = unsafe { CStr::from_ptr(reason) }.to_string_lossy();
    KERNEL.with_borrow(|kernel| eprintln!("error: kernel {kernel}: LLVM gave up, which is a bug of dsc: {reason}"));
    // SAFETY: ends the process at once.
    unsafe { libc::_exit(1) }
}

/// Registers the code generators, once a process.
fn set_up() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        #[cfg(feature = "nvidia")]
        Target::initialize_nvptx(&InitializationConfig::default());
        #[cfg(feature = "amd")]
        Target::initialize_amd_gpu(&InitializationConfig::default());
        // SAFETY: the handler is a function that never returns to LLVM.
        unsafe { LLVMInstallFatalErrorHandler(Some(on_fatal_error)) };
    });
}
