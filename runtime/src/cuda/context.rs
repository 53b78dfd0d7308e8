//! A GPU and its primary context.

use super::driver::{Driver, Handle, OUT_OF_MEMORY, attribute};
use crate::error::DeviceError;
use std::ffi::{CStr, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Environment variable that names another driver library.
const DRIVER_VARIABLE: &str = "DSC_CUDA_DRIVER";

/// A GPU, with the context that everything on it belongs to.
pub(super) struct Context {
    pub(super) driver: Driver,
    ordinal: u32,
    device: c_int,
    raw: Handle,
    /// What the driver calls it.
    pub(super) name: String,
    /// Compute capability, such as (9, 0).
    pub(super) capability: (u32, u32),
    pub(super) multiprocessors: u32,
    /// Shared memory that a block may ask for, in bytes.
    pub(super) max_shared_bytes: u32,
    /// Bytes of memory that were free when it was opened, itself counted as used.
    pub(super) free_at_open: u64,
}

// SAFETY: the handle is one of a primary context, which any number of threads may use at once; the rest is plain data and
// function pointers.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The driver library: what `DSC_CUDA_DRIVER` names, or the system's.
pub(super) fn driver_path() -> PathBuf {
    let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
    std::env::var_os(DRIVER_VARIABLE).filter(|path| !path.is_empty()).map_or_else(|| name.into(), PathBuf::from)
}

impl Context {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverOld`], [`DeviceError::NoGpu`], [`DeviceError::Driver`].
    pub(super) fn open(driver: &Path, ordinal: u32) -> Result<Arc<Context>, DeviceError> {
        let driver = Driver::load(driver)?;
        if driver.version.0 < 12 {
            let found = format!("CUDA {}.{}", driver.version.0, driver.version.1);
            return Err(DeviceError::DriverOld { found, wants: "CUDA 12".into() });
        }
        let f = &driver.functions;
        let mut count = 0;
        // SAFETY: the pointer is to an int.
        driver.check("cuDeviceGetCount", unsafe { (f.device_count)(&mut count) })?;
        let count = u32::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(DeviceError::NoGpu { ordinal, count });
        }
        let mut device = 0;
        // SAFETY: the pointer is to an int.
        driver.check("cuDeviceGet", unsafe { (f.device_get)(&mut device, ordinal as c_int) })?;
        let attribute = |id| {
            let mut value = 0;
            // SAFETY: the pointer is to an int.
            driver.check("cuDeviceGetAttribute", unsafe { (f.device_attribute)(&mut value, id, device) })?;
            Ok::<u32, DeviceError>(u32::try_from(value).unwrap_or(0))
        };
        let capability = (attribute(attribute::CAPABILITY_MAJOR)?, attribute(attribute::CAPABILITY_MINOR)?);
        let multiprocessors = attribute(attribute::MULTIPROCESSORS)?;
        let max_shared_bytes = attribute(attribute::MAX_SHARED_BYTES)?;
        let name = device_name(&driver, device)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a handle; `drop` releases what is retained here.
        driver.check("cuDevicePrimaryCtxRetain", unsafe { (f.context_retain)(&mut raw, device) })?;
        let mut context = Context {
            driver,
            ordinal,
            device,
            raw,
            name,
            capability,
            multiprocessors,
            max_shared_bytes,
            free_at_open: 0,
        };
        context.free_at_open = context.memory()?.0;
        Ok(Arc::new(context))
    }

    /// Makes the context that of this thread. Everything else that is done with the driver needs it.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self`.
        self.driver.check("cuCtxSetCurrent", unsafe { (self.driver.functions.context_set)(self.raw) })
    }

    /// Bytes of memory that are free, and of all.
    pub(super) fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to sizes.
        let status = unsafe { (self.driver.functions.memory_info)(&mut free, &mut total) };
        self.driver.check("cuMemGetInfo", status)?;
        Ok((free as u64, total as u64))
    }

    /// The error of an allocation: with what is free, if that is what is wrong.
    pub(super) fn memory_error(&self, call: &'static str, status: u32, bytes: u64, what: &'static str) -> DeviceError {
        match self.driver.check(call, status) {
            Err(_) if status == OUT_OF_MEMORY => self.too_little(bytes, what),
            Err(e) => e,
            Ok(()) => DeviceError::Misuse(format!("{call} failed without an error")),
        }
    }

    /// Says that `bytes` do not fit.
    pub(super) fn too_little(&self, bytes: u64, what: &'static str) -> DeviceError {
        let reason = match self.memory() {
            Ok((free, total)) => format!("{} has {free} bytes free of {total}", self.label()),
            Err(e) => e.to_string(),
        };
        DeviceError::Memory { what, bytes, reason }
    }

    /// Such as `GPU 0 (NVIDIA H200)`.
    pub(super) fn label(&self) -> String {
        format!("GPU {} ({})", self.ordinal, self.name)
    }

    /// The GPU and driver, in a line.
    pub(super) fn describe(&self) -> String {
        let ((major, minor), (cuda, update)) = (self.capability, self.driver.version);
        format!(
            "{}, compute capability {major}.{minor}, {} multiprocessors, driver for CUDA {cuda}.{update}",
            self.name, self.multiprocessors
        )
    }
}

fn device_name(driver: &Driver, device: c_int) -> Result<String, DeviceError> {
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the driver writes at most the length it is told, with a zero at the end.
    let status = unsafe { (driver.functions.device_name)(name.as_mut_ptr(), 255, device) };
    driver.check("cuDeviceGetName", status)?;
    // SAFETY: the last byte is zero whatever the driver wrote.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, by `open`, and nothing of it is left: everything else holds an Arc of this. A failure has
        // nobody to tell.
        unsafe { (self.driver.functions.context_release)(self.device) };
    }
}
