//! An artifact's kernels as functions of a GPU.

use super::context::Context;
use super::driver::{Handle, JIT_ERROR_LOG, UNSUPPORTED_PTX_VERSION, function};
use crate::device::Code;
use crate::error::DeviceError;
use dsc_ir::artifact::{GpuKernel, Header, KernelEntry};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// Blocks of a cluster that every GPU with clusters runs; more must be asked for.
const PORTABLE_CLUSTER: u32 = 8;
/// Bytes kept of what the driver says about assembly it refuses.
const LOG_BYTES: usize = 8192;

/// A target's name: `sm_` with the compute capability, and `a` if code runs on that one alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arch {
    capability: (u32, u32),
    exact: bool,
}

impl Arch {
    fn parse(target: &str) -> Option<Arch> {
        let digits = target.strip_prefix("sm_")?;
        let (digits, exact) = digits.strip_suffix('a').map_or((digits, false), |d| (d, true));
        let number: u32 = digits.parse().ok().filter(|n| (10..1000).contains(n))?;
        Some(Arch { capability: (number / 10, number % 10), exact })
    }

    /// Whether a GPU runs its machine code: one of the same generation that is not older.
    fn runs_native(self, gpu: (u32, u32)) -> bool {
        if self.exact { gpu == self.capability } else { gpu.0 == self.capability.0 && gpu.1 >= self.capability.1 }
    }

    /// Whether a driver makes machine code for a GPU from its assembly: for all that are not older.
    fn runs_portable(self, gpu: (u32, u32)) -> bool {
        if self.exact { gpu == self.capability } else { gpu >= self.capability }
    }
}

/// Loaded code.
struct Module {
    context: Arc<Context>,
    raw: Handle,
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: loaded by `load_module`, unloaded once.
            unsafe { (self.context.driver.functions.module_unload)(self.raw) };
        }
    }
}

/// A kernel that can be launched.
pub(super) struct Kernel {
    pub(super) entry: KernelEntry,
    pub(super) gpu: GpuKernel,
    pub(super) function: Handle,
}

/// The kernels of an artifact, in its order.
pub(super) struct Kernels {
    pub(super) kernels: Vec<Kernel>,
    /// What the functions are in.
    _modules: Vec<Module>,
}

// SAFETY: modules and functions are handles that the driver lets any thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads every kernel: its machine code if the GPU runs that, else what the driver makes of its assembly.
    ///
    /// # Errors
    /// [`DeviceError::Architecture`], [`DeviceError::Features`] for too much shared memory, [`DeviceError::Assembly`],
    /// [`DeviceError::DriverOld`], [`DeviceError::Driver`].
    pub(super) fn load(context: &Arc<Context>, header: &Header, code: Code<'_>) -> Result<Kernels, DeviceError> {
        context.enter()?;
        let available = || {
            let (major, minor) = context.capability;
            format!("{}, of compute capability {major}.{minor}", context.label())
        };
        let Some(arch) = Arch::parse(&header.target) else {
            return Err(DeviceError::Target { target: header.target.clone(), available: "sm_*".into() });
        };
        let (native, portable) = (arch.runs_native(context.capability), arch.runs_portable(context.capability));
        let mut modules: Vec<Module> = Vec::new();
        // By image: the module, and the most shared memory that a kernel in it asks for.
        let mut loaded: BTreeMap<&[u8], (Handle, u32)> = BTreeMap::new();
        let mut kernels = Vec::with_capacity(header.kernels.len());
        for entry in &header.kernels {
            let Some(gpu) = &entry.gpu else {
                return Err(DeviceError::Misuse(format!("kernel {} says nothing about its launch", entry.name)));
            };
            let outside = || DeviceError::Misuse(format!("kernel {} is outside the code", entry.name));
            let machine = slice(code.native, entry.entry, entry.entry.saturating_add(entry.code_bytes));
            let assembly = slice(code.portable, gpu.asm[0], gpu.asm[1]);
            let (machine, assembly) = (machine.ok_or_else(outside)?, assembly.ok_or_else(outside)?);
            let (image, is_machine) = match (native && !machine.is_empty(), portable && !assembly.is_empty()) {
                (true, _) => (machine, true),
                (false, true) => (assembly, false),
                (false, false) => {
                    return Err(DeviceError::Architecture { target: header.target.clone(), gpu: available() });
                }
            };
            check_shared(context, gpu)?;
            let (module, shared) = match loaded.entry(image) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let module = load_module(context, &entry.name, image, is_machine)?;
                    let raw = module.raw;
                    modules.push(module);
                    new.insert((raw, 0))
                }
            };
            *shared = gpu.shared_bytes.max(*shared);
            let name = entry_name(assembly).unwrap_or(&entry.name);
            let function = find_function(context, *module, name, *shared, gpu.cluster)?;
            kernels.push(Kernel { entry: entry.clone(), gpu: gpu.clone(), function });
        }
        Ok(Kernels { kernels, _modules: modules })
    }
}

fn slice(bytes: &[u8], start: u64, end: u64) -> Option<&[u8]> {
    bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn check_shared(context: &Context, gpu: &GpuKernel) -> Result<(), DeviceError> {
    let fixed = gpu.resources.map_or(0, |r| r.static_shared_bytes);
    let wanted = u64::from(gpu.shared_bytes) + u64::from(fixed);
    if wanted > u64::from(context.max_shared_bytes) {
        let missing = format!("{wanted} bytes of shared memory a block (it has {})", context.max_shared_bytes);
        return Err(DeviceError::Features { missing: vec![missing] });
    }
    Ok(())
}

/// The name behind `.entry` in PTX text: what the function is called in its module.
fn entry_name(assembly: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(assembly).ok()?;
    let after = text.split(".entry").nth(1)?.trim_start();
    let end = after.find(|c: char| !(c.is_ascii_alphanumeric() || "_$%".contains(c))).unwrap_or(after.len());
    Some(&after[..end]).filter(|name| !name.is_empty())
}

fn load_module(context: &Arc<Context>, kernel: &str, image: &[u8], is_machine: bool) -> Result<Module, DeviceError> {
    // The driver finds the end of text by a zero, and that of machine code by its headers, which it reads by whole words.
    let mut words = vec![0u64; image.len() / 8 + 1];
    // SAFETY: a u64 is eight bytes of any value; the slice is as long as the vector's words.
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), words.len() * 8) };
    bytes[..image.len()].copy_from_slice(image);
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = JIT_ERROR_LOG;
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG_BYTES)];
    let mut raw = std::ptr::null_mut();
    // SAFETY: the image ends in a zero; options and values are two each, of the types the options ask for (a buffer, and its
    // size in place of a pointer); all live during the call.
    let status = unsafe {
        (context.driver.functions.module_load)(
            &mut raw,
            words.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    if status == UNSUPPORTED_PTX_VERSION {
        let (major, minor) = context.driver.version;
        let wants = format!("the assembly of kernel {kernel}");
        return Err(DeviceError::DriverOld { found: format!("CUDA {major}.{minor}"), wants });
    }
    context.driver.check("cuModuleLoadDataEx", status).map_err(|e| {
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        let mut said = String::from_utf8_lossy(&log[..end]).trim().to_owned();
        if said.is_empty() {
            said = e.to_string();
        }
        let kind = if is_machine { "machine code" } else { "assembly" };
        DeviceError::Assembly { kernel: kernel.to_owned(), kind, log: said }
    })?;
    Ok(Module { context: Arc::clone(context), raw })
}

fn find_function(
    context: &Context,
    module: Handle,
    name: &str,
    shared_bytes: u32,
    cluster: u32,
) -> Result<Handle, DeviceError> {
    let (driver, f) = (&context.driver, &context.driver.functions);
    let symbol = CString::new(name).map_err(|_| DeviceError::Misuse(format!("a kernel is called {name:?}")))?;
    let mut function = std::ptr::null_mut();
    // SAFETY: the pointer is to a handle, the name ends in a zero, the module is loaded.
    let status = unsafe { (f.module_function)(&mut function, module, symbol.as_ptr()) };
    driver
        .check("cuModuleGetFunction", status)
        .map_err(|e| DeviceError::Misuse(format!("its code has no function {name}: {e}")))?;
    let set = |attribute, value: u32| {
        let value = i32::try_from(value).unwrap_or(i32::MAX);
        // SAFETY: the function is of a loaded module.
        driver.check("cuFuncSetAttribute", unsafe { (f.function_attribute)(function, attribute, value) })
    };
    // Also of 0 bytes: it loads the function now, which a driver that loads lazily would do at the first launch, and that may be
    // one which is captured.
    set(function::DYNAMIC_SHARED_BYTES, shared_bytes)?;
    if cluster > PORTABLE_CLUSTER {
        set(function::LARGE_CLUSTERS, 1)?;
    }
    Ok(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_gpus_run_which_code() {
        let of = |target: &str, gpu| Arch::parse(target).map(|arch| (arch.runs_native(gpu), arch.runs_portable(gpu)));
        assert_eq!(of("sm_90a", (9, 0)), Some((true, true)));
        assert_eq!(of("sm_90a", (10, 0)), Some((false, false)));
        assert_eq!(of("sm_80", (8, 6)), Some((true, true)));
        assert_eq!(of("sm_80", (9, 0)), Some((false, true)));
        assert_eq!(of("sm_89", (8, 6)), Some((false, false)));
        assert_eq!(of("sm_120a", (12, 0)), Some((true, true)));
        assert_eq!([of("cpu", (9, 0)), of("sm_", (9, 0)), of("sm_9x", (9, 0)), of("sm_90aa", (9, 0))], [None; 4]);
    }

    #[test]
    fn functions_are_named_in_assembly() {
        let text = b".version 8.6\n.visible .entry linear_7(\n\t.param .u64 p0\n)\n.maxntid 128\n{ ret; }\n";
        assert_eq!(entry_name(text), Some("linear_7"));
        assert_eq!(entry_name(b".visible .func f() {}"), None);
        assert_eq!(entry_name(b".entry"), None);
        assert_eq!(entry_name(b"\xff.entry k("), None);
    }
}
