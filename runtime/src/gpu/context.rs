//! A GPU, and its primary context where the driver has such.

use super::driver::{Driver, Handle, OUT_OF_MEMORY, Spec};
use crate::error::DeviceError;
use std::ffi::{CStr, c_char, c_int};
use std::path::Path;
use std::sync::Arc;

/// A GPU, with the context that everything on it belongs to.
pub(super) struct Context {
    pub(super) driver: Driver,
    ordinal: u32,
    device: c_int,
    raw: Handle,
    /// What the driver calls it.
    pub(super) name: String,
    /// Version of its architecture, such as (9, 0): the compute capability of NVIDIA's, the first two numbers of an AMD GPU's.
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

impl Context {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverOld`], [`DeviceError::NoGpu`], [`DeviceError::Driver`].
    pub(super) fn open(spec: &'static Spec, driver: &Path, ordinal: u32) -> Result<Arc<Context>, DeviceError> {
        let driver = Driver::load(spec, driver)?;
        let f = &driver.functions;
        let mut count = 0;
        // SAFETY: the pointer is to an int.
        driver.check(|n| n.device_count, unsafe { (f.device_count)(&mut count) })?;
        let count = u32::try_from(count).unwrap_or(0);
        if ordinal >= count {
            return Err(DeviceError::NoGpu { vendor: spec.vendor, ordinal, count });
        }
        let mut device = 0;
        // SAFETY: the pointer is to an int.
        driver.check(|n| n.device_get, unsafe { (f.device_get)(&mut device, ordinal as c_int) })?;
        let attribute = |id| {
            let mut value = 0;
            // SAFETY: the pointer is to an int.
            driver.check(|n| n.device_attribute, unsafe { (f.device_attribute)(&mut value, id, device) })?;
            Ok::<u32, DeviceError>(u32::try_from(value).unwrap_or(0))
        };
        let [multiprocessors, major, minor, max_shared_bytes] = spec.attributes.map(attribute);
        let (capability, multiprocessors, max_shared_bytes) = ((major?, minor?), multiprocessors?, max_shared_bytes?);
        let name = device_name(&driver, device)?;
        // `drop` releases what is retained here.
        let raw = driver.api.retain(device).map_err(|called| driver.error(called))?;
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
        self.driver.checked(self.driver.api.enter(self.device, self.raw))
    }

    /// Bytes of memory that are free, and of all.
    pub(super) fn memory(&self) -> Result<(u64, u64), DeviceError> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to sizes.
        let status = unsafe { (self.driver.functions.memory_info)(&mut free, &mut total) };
        self.driver.check(|n| n.memory_info, status)?;
        Ok((free as u64, total as u64))
    }

    /// The error of an allocation: with what is free, if that is what is wrong.
    pub(super) fn memory_error(&self, status: u32, bytes: u64, what: &'static str) -> DeviceError {
        match status {
            OUT_OF_MEMORY => self.too_little(bytes, what),
            status => self.driver.error((self.driver.spec.names.memory_alloc, status)),
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
        let spec = self.driver.spec;
        let (architecture, serves) = ((spec.capability)(self.capability), self.driver.serves());
        format!("{}, {architecture}, {} {}, driver for {serves}", self.name, self.multiprocessors, spec.units)
    }
}

fn device_name(driver: &Driver, device: c_int) -> Result<String, DeviceError> {
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the driver writes at most the length it is told, with a zero at the end.
    let status = unsafe { (driver.functions.device_name)(name.as_mut_ptr(), 255, device) };
    driver.check(|n| n.device_name, status)?;
    // SAFETY: the last byte is zero whatever the driver wrote.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

impl Drop for Context {
    fn drop(&mut self) {
        // Retained once, by `open`, and nothing of it is left: everything else holds an Arc of this.
        self.driver.api.release(self.device);
    }
}
