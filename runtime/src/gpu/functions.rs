//! Kernels of a library, launched with addresses and in a stream of the caller.

use super::bind::{check_grid, encode_map};
use super::code::Kernels;
use super::context::Context;
use super::driver::{Address, Handle, Spec};
use super::graph::launch_raw;
use super::memory::Scratch;
use crate::device::{Code, Vendor};
use crate::error::DeviceError;
use dsc_ir::SymValues;
use dsc_ir::artifact::Header;
use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

/// The functions of a kernel library on a GPU.
pub(crate) struct GpuFunctions {
    context: Arc<Context>,
    kernels: Kernels,
    /// Memory for blocks of kernels that want such.
    scratch: Option<Scratch>,
}

impl GpuFunctions {
    /// Loads an artifact's kernels on a vendor's GPU `ordinal`, in its primary context, which is that of the vendor's runtime and of
    /// PyTorch.
    ///
    /// # Errors
    /// As [`GpuDevice::open`](super::GpuDevice::open) and [`Kernels::load`]; [`DeviceError::Misuse`] for kernels that want their
    /// symbols in device memory.
    pub(crate) fn open(
        vendor: Vendor,
        ordinal: u32,
        header: &Header,
        code: Code<'_>,
    ) -> Result<GpuFunctions, DeviceError> {
        let spec = Spec::of(vendor);
        GpuFunctions::open_with((spec, &spec.path()), ordinal, header, code)
    }

    /// As [`GpuFunctions::open`] with the driver library at `driver`.
    pub(super) fn open_with(
        (spec, driver): (&'static Spec, &Path),
        ordinal: u32,
        header: &Header,
        code: Code<'_>,
    ) -> Result<GpuFunctions, DeviceError> {
        let context = Context::open(spec, driver, ordinal)?;
        if let Some(kernel) = header.kernels.iter().find(|k| !k.schedule.symbols_by_value) {
            return Err(DeviceError::Misuse(format!("kernel {} takes symbols from device memory", kernel.name)));
        }
        let kernels = Kernels::load(&context, header, code)?;
        let wanted = kernels.kernels.iter().map(|k| k.scratch_bytes(context.multiprocessors)).max().unwrap_or(0);
        let scratch = (wanted > 0).then(|| Scratch::new(&context, wanted)).transpose()?;
        Ok(GpuFunctions { context, kernels, scratch })
    }

    /// Makes the GPU's context that of this thread.
    pub(crate) fn enter(&self) -> Result<(), DeviceError> {
        self.context.enter()
    }

    /// Puts a launch in a stream; its parameters are at `addresses`. All launches of kernels that want memory for their blocks share it:
    /// they must not run at once, in two streams say.
    ///
    /// # Errors
    /// [`DeviceError::Binding`] for a grid or a tensor map that hardware cannot have; [`DeviceError::Driver`].
    ///
    /// # Safety
    /// What the kernel's views at these symbols span from the addresses is memory that stays until the launch is done. The stream
    /// is null or one of the context.
    pub(crate) unsafe fn launch(
        &self,
        stream: Handle,
        kernel: usize,
        addresses: Vec<Address>,
        syms: &SymValues,
    ) -> Result<(), DeviceError> {
        let kernel = &self.kernels.kernels[kernel];
        let entry = &kernel.entry;
        let fault = |what| DeviceError::Binding { launch: 0, node: entry.name.clone(), what };
        check_grid(entry, &kernel.gpu, self.context.driver.spec.most_blocks, syms).map_err(fault)?;
        let mut maps = Vec::with_capacity(kernel.gpu.maps.len());
        for map in &kernel.gpu.maps {
            let param = map.param as usize;
            let none = || fault(format!("a tensor map of parameter {param}, of {}", addresses.len()));
            let (param, &address) = entry.params.get(param).zip(addresses.get(param)).ok_or_else(none)?;
            maps.push(encode_map(&self.context, map, param, address, (syms, true)).map_err(fault)?);
        }
        let symbols = syms.0;
        let addresses = addresses.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast::<c_void>());
        let scratch = self.scratch.as_ref().filter(|_| kernel.gpu.scratch_bytes > 0).map(Scratch::address);
        let scratch = scratch.iter().map(|a| std::ptr::from_ref(a).cast_mut().cast());
        let values = [std::ptr::from_ref(&symbols).cast_mut().cast()];
        let maps = maps.iter().map(|m| std::ptr::from_ref(m).cast_mut().cast());
        let mut params: Vec<*mut c_void> = addresses.chain(values).chain(scratch).chain(maps).collect();
        // SAFETY: the parameters are those of a kernel with symbols by value (`open`): addresses, six words, tensor maps; the
        // driver copies them before it returns. The rest is the caller's word.
        unsafe { launch_raw(&self.context, stream, kernel, params.as_mut_ptr(), syms) }
    }
}
