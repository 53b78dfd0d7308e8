//! An artifact's kernels as functions of a GPU.

use super::context::Context;
use super::driver::{Handle, Refusal};
use crate::device::{Code, Vendor};
use crate::error::DeviceError;
use dsc_ir::artifact::{COUNTERS, GpuKernel, Header, KernelEntry};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::CString;
use std::sync::Arc;

/// A target's name: `sm_` with the compute capability, and `a` if code runs on that one alone; or `gfx` with the architecture's version and
/// stepping, which code runs on alone. (What stepping a GPU is, HIP tells by what it loads.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Arch {
    capability: (u32, u32),
    exact: bool,
}

impl Arch {
    fn parse(target: &str) -> Option<(Vendor, Arch)> {
        let vendor = Vendor::of(target)?;
        if vendor == Vendor::Amd {
            // The major number is decimal; minor and stepping are a hexadecimal digit each.
            let digits = target.strip_prefix("gfx")?;
            let (major, last) = digits.split_at_checked(digits.len().checked_sub(2)?)?;
            let last = u32::from_str_radix(last, 16).ok()?;
            let capability = (major.parse().ok().filter(|n| *n < 100)?, last >> 4);
            return Some((vendor, Arch { capability, exact: true }));
        }
        let digits = target.strip_prefix("sm_")?;
        let (digits, exact) = digits.strip_suffix('a').map_or((digits, false), |d| (d, true));
        let number: u32 = digits.parse().ok().filter(|n| (10..1000).contains(n))?;
        Some((vendor, Arch { capability: (number / 10, number % 10), exact }))
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

impl Kernel {
    /// Blocks that the GPU holds at a time, in whole clusters, or whole teams of several: those wait for one another. At least one of them.
    pub(super) fn held(gpu: &GpuKernel, multiprocessors: u32) -> u32 {
        let together = Kernel::together(gpu);
        let each = gpu.resources.map_or(1, |r| r.blocks_per_sm.max(1));
        let held = (multiprocessors.saturating_mul(each) / together).max(1);
        held.min(if gpu.apart { COUNTERS / gpu.cluster.max(1) } else { u32::MAX / together }) * together
    }

    /// Blocks that must run at once.
    fn together(gpu: &GpuKernel) -> u32 {
        gpu.cluster.max(1).saturating_mul(if gpu.apart { gpu.team.max(1) } else { 1 })
    }

    /// Bytes that all blocks of a launch together want to themselves: those that the GPU holds at a time.
    pub(super) fn scratch_bytes(&self, multiprocessors: u32) -> u64 {
        let blocks = self.gpu.resources.map_or(1, |r| r.blocks_per_sm.max(1));
        self.gpu.scratch_bytes.saturating_mul(u64::from(blocks) * u64::from(multiprocessors))
    }
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
        let spec = context.driver.spec;
        let Some((_, arch)) = Arch::parse(&header.target).filter(|(vendor, _)| *vendor == spec.vendor) else {
            let available = spec.vendor.targets().into();
            return Err(DeviceError::Target { target: header.target.clone(), available });
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
                    return Err(foreign(context, &header.target));
                }
            };
            check_shared(context, gpu)?;
            check_teams(context, gpu)?;
            let (module, shared) = match loaded.entry(image) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let module = load_module(context, (&header.target, &entry.name), image, is_machine)?;
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

/// Blocks that wait for one another must all have a multiprocessor.
fn check_teams(context: &Context, gpu: &GpuKernel) -> Result<(), DeviceError> {
    let each = gpu.resources.map_or(1, |r| r.blocks_per_sm.max(1));
    let wanted = Kernel::together(gpu);
    if gpu.apart && wanted > context.multiprocessors.saturating_mul(each) {
        let missing = format!("room for {wanted} blocks at once (it has {} multiprocessors)", context.multiprocessors);
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

/// That the GPU does not run code for a target.
fn foreign(context: &Context, target: &str) -> DeviceError {
    let gpu = format!("{}, of {}", context.label(), (context.driver.spec.capability)(context.capability));
    DeviceError::Architecture { target: target.to_owned(), gpu }
}

fn load_module(
    context: &Arc<Context>,
    (target, kernel): (&str, &str),
    image: &[u8],
    is_machine: bool,
) -> Result<Module, DeviceError> {
    // The driver finds the end of text by a zero, and that of machine code by its headers, which it reads by whole words.
    let mut words = vec![0u64; image.len() / 8 + 1];
    // SAFETY: a u64 is eight bytes of any value; the slice is as long as the vector's words.
    let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), words.len() * 8) };
    bytes[..image.len()].copy_from_slice(image);
    let driver = &context.driver;
    let raw = driver.api.load(&words).map_err(|refusal| match refusal {
        Refusal::Foreign => foreign(context, target),
        Refusal::Old => DeviceError::DriverOld {
            vendor: driver.spec.vendor,
            found: driver.serves(),
            wants: format!("the assembly of kernel {kernel}"),
        },
        Refusal::Broken(called, said) => DeviceError::Assembly {
            vendor: driver.spec.vendor,
            kernel: kernel.to_owned(),
            kind: if is_machine { "machine code" } else { "assembly" },
            log: if said.is_empty() { driver.error(called).to_string() } else { said },
        },
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
    let driver = &context.driver;
    let symbol = CString::new(name).map_err(|_| DeviceError::Misuse(format!("a kernel is called {name:?}")))?;
    let mut function = std::ptr::null_mut();
    // SAFETY: the pointer is to a handle, the name ends in a zero, the module is loaded.
    let status = unsafe { (driver.functions.module_function)(&mut function, module, symbol.as_ptr()) };
    driver
        .check(|n| n.module_function, status)
        .map_err(|e| DeviceError::Misuse(format!("its code has no function {name}: {e}")))?;
    // SAFETY: the function is of a loaded module.
    unsafe { driver.api.prepare(function, shared_bytes, cluster) }.map_err(|called| driver.error(called))?;
    Ok(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_gpus_run_which_code() {
        let of =
            |target: &str, gpu| Arch::parse(target).map(|(_, arch)| (arch.runs_native(gpu), arch.runs_portable(gpu)));
        assert_eq!(of("sm_90a", (9, 0)), Some((true, true)));
        assert_eq!(of("sm_90a", (10, 0)), Some((false, false)));
        assert_eq!(of("sm_80", (8, 6)), Some((true, true)));
        assert_eq!(of("sm_80", (9, 0)), Some((false, true)));
        assert_eq!(of("sm_89", (8, 6)), Some((false, false)));
        assert_eq!(of("sm_120a", (12, 0)), Some((true, true)));
        assert_eq!(of("gfx942", (9, 4)), Some((true, true)));
        assert_eq!(of("gfx942", (9, 5)), Some((false, false)));
        assert_eq!(of("gfx950", (9, 5)), Some((true, true)));
        assert_eq!(of("gfx1100", (11, 0)), Some((true, true)));
        assert_eq!([of("gfx", (9, 4)), of("gfx94x", (9, 4)), of("gfxfffffffff", (9, 4))], [None; 3]);
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
