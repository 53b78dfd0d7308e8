//! A vendor's driver: the part of its interface that the device uses, loaded when it is first wanted, so that a program that links this
//! crate runs where there is none.
//!
//! The CUDA driver and HIP have the same functions under other names ([`Functions`], [`Names`]); what differs beyond names is an
//! [`Api`]; numbers and words are a [`Spec`].

use crate::device::Vendor;
use crate::error::DeviceError;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

use super::bind::{MapPlan, TensorMapBytes};
use super::{cuda, hip};

/// What a function returns; 0 is success.
pub(super) type Status = c_uint;
/// An address in device memory.
pub(super) type Address = u64;
/// A context, module, function, stream, event or graph: opaque.
pub(super) type Handle = *mut c_void;

/// Out of memory; as the others here, the same in both interfaces.
pub(super) const OUT_OF_MEMORY: Status = 2;
/// There is no device.
pub(super) const NO_DEVICE: Status = 100;
/// A stream that does not wait for the default one.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// An event that takes no time.
pub(super) const EVENT_NO_TIMING: c_uint = 2;
/// A capture during which other threads may allocate.
pub(super) const CAPTURE_RELAXED: c_uint = 2;

/// Declares a table of functions, one of their names, and how the first is filled by the second.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident, $names:ident { $($field:ident ($($arg:ty),*);)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> $crate::gpu::driver::Status,)*
        }

        /// The symbol of each function.
        pub(super) struct $names {
            $(pub(super) $field: &'static str,)*
        }

        impl $table {
            /// Looks every function up; the error is the name of one that is missing.
            ///
            /// # Safety
            /// The library must be the driver that the names are of, and stay loaded.
            pub(super) unsafe fn load(library: &libloading::Library, names: &$names) -> Result<$table, &'static str> {
                Ok($table {
                    // SAFETY: the symbol of that driver has this type.
                    $($field: *unsafe { library.get(names.$field) }.map_err(|_| names.$field)?,)*
                })
            }
        }
    };
}
pub(super) use functions;

functions! {
    /// Functions that both drivers have, by what they do.
    Functions, Names {
        init (c_uint);
        version (*mut c_int);
        error_name (Status, *mut *const c_char);
        error_string (Status, *mut *const c_char);
        device_count (*mut c_int);
        device_get (*mut c_int, c_int);
        device_name (*mut c_char, c_int, c_int);
        device_attribute (*mut c_int, c_int, c_int);
        memory_info (*mut usize, *mut usize);
        memory_alloc (*mut Address, usize);
        memory_free (Address);
        host_alloc (*mut *mut c_void, usize, c_uint);
        host_free (*mut c_void);
        copy_to_device (Address, *const c_void, usize, Handle);
        copy_to_host (*mut c_void, Address, usize, Handle);
        copy_on_device (Address, Address, usize, Handle);
        fill (Address, u8, usize, Handle);
        stream_create (*mut Handle, c_uint);
        stream_destroy (Handle);
        stream_wait (Handle);
        capture_begin (Handle, c_uint);
        capture_end (Handle, *mut Handle);
        graph_destroy (Handle);
        graph_instantiate (*mut Handle, Handle, u64);
        graph_launch (Handle, Handle);
        graph_exec_destroy (Handle);
        event_create (*mut Handle, c_uint);
        event_destroy (Handle);
        event_record (Handle, Handle);
        event_wait (Handle);
        event_elapsed (*mut f32, Handle, Handle);
        module_unload (Handle);
        module_function (*mut Handle, Handle, *const c_char);
    }
}

/// A function that was called, and what it returned.
pub(super) type Called = (&'static str, Status);

/// A launch of a function.
pub(super) struct Launch {
    pub(super) function: Handle,
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub(super) shared_bytes: u32,
    /// Blocks of a cluster along x; 1: none.
    pub(super) cluster: u32,
    /// Whether it waits by itself for the launches before it.
    pub(super) dependent: bool,
    /// Whether all its blocks must run at once: if they cannot, the launch is refused.
    pub(super) together: bool,
    pub(super) stream: Handle,
    /// A pointer to each of the function's parameters.
    pub(super) params: *mut *mut c_void,
}

/// Why a module was not loaded.
pub(super) enum Refusal {
    /// The driver is too old for it.
    Old,
    /// It is for another GPU.
    Foreign,
    /// Anything else, with what the driver said about it (perhaps nothing).
    Broken(Called, String),
}

/// What the drivers do each in their own way.
pub(super) trait Api: Send + Sync {
    /// Makes a GPU usable; the handle is for [`Api::enter`].
    ///
    /// # Errors
    /// The call that failed.
    fn retain(&self, device: c_int) -> Result<Handle, Called>;

    /// Ends what [`Api::retain`] began, when nothing of it is left.
    fn release(&self, device: c_int);

    /// Makes the GPU that of this thread.
    fn enter(&self, device: c_int, context: Handle) -> Called;

    /// Loads machine code, or assembly that ends in a zero.
    ///
    /// # Errors
    /// Why not.
    fn load(&self, image: &[u64]) -> Result<Handle, Refusal>;

    /// Makes a function of a loaded module ready for launches like this.
    ///
    /// # Errors
    /// The call that failed.
    ///
    /// # Safety
    /// The function is of a loaded module.
    unsafe fn prepare(&self, function: Handle, shared_bytes: u32, cluster: u32) -> Result<(), Called>;

    /// Puts a launch in its stream's queue.
    ///
    /// # Safety
    /// The parameters are the function's, and what they point to on the device is there until the launch is done.
    unsafe fn launch(&self, launch: &Launch) -> Called;

    /// Encodes a tensor map.
    ///
    /// # Errors
    /// That there are none, or the driver's refusal.
    fn encode(&self, plan: &MapPlan, address: Address, bytes: &mut TensorMapBytes) -> Called;
}

/// What is known of a vendor's driver without loading it.
pub(super) struct Spec {
    pub(super) vendor: Vendor,
    /// Its library, by the system's rules.
    pub(super) library: &'static str,
    /// The environment variable that names another.
    pub(super) variable: &'static str,
    pub(super) names: Names,
    /// Loads what is the vendor's own; the error is a function that is missing.
    ///
    /// # Safety
    /// The library must be the vendor's driver, and stay loaded.
    pub(super) open: unsafe fn(&Library) -> Result<Box<dyn Api>, &'static str>,
    /// What its version is one of, such as `CUDA`.
    pub(super) platform: &'static str,
    /// The number that the driver gives as (major, minor).
    pub(super) version: fn(c_int) -> (c_int, c_int),
    /// The oldest major version.
    pub(super) oldest: c_int,
    /// What it calls its processors.
    pub(super) units: &'static str,
    /// Numbers of attributes: processors, both parts of the architecture's version, and shared memory of a block.
    pub(super) attributes: [c_int; 4],
    /// An architecture in words, such as `compute capability 9.0`.
    pub(super) capability: fn((u32, u32)) -> String,
    /// Blocks that a grid may have along each axis, of so many threads each.
    pub(super) most_blocks: fn(u32) -> [u64; 3],
}

impl Spec {
    /// The vendor's.
    pub(super) fn of(vendor: Vendor) -> &'static Spec {
        match vendor {
            Vendor::Nvidia => &cuda::SPEC,
            Vendor::Amd => &hip::SPEC,
        }
    }

    /// The driver library: what the environment names, or the system's.
    pub(super) fn path(&self) -> PathBuf {
        let named = std::env::var_os(self.variable).filter(|path| !path.is_empty());
        named.map_or_else(|| self.library.into(), PathBuf::from)
    }
}

/// A loaded and initialised driver.
pub(super) struct Driver {
    pub(super) spec: &'static Spec,
    pub(super) functions: Functions,
    pub(super) api: Box<dyn Api>,
    /// Version of the platform it serves, such as (12, 8).
    pub(super) version: (c_int, c_int),
}

impl Driver {
    /// Loads and initialises the driver library at `path`, or found by the system's rules if that is a bare name.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverOld`], [`DeviceError::NoGpu`] if it finds no device at all.
    pub(super) fn load(spec: &'static Spec, path: &Path) -> Result<Driver, DeviceError> {
        let vendor = spec.vendor;
        let missing = |reason: String| DeviceError::NoDriver { vendor, library: path.display().to_string(), reason };
        // SAFETY: what a library does when it is loaded is its own affair; this one is the system's driver, or what the user
        // named in its place.
        let library = unsafe { Library::new(path) }.map_err(|e| missing(e.to_string()))?;
        // SAFETY: as above; the library is never unloaded (below).
        let functions = unsafe { Functions::load(&library, &spec.names) };
        // SAFETY: as above.
        let api = unsafe { (spec.open)(&library) };
        // Threads of the driver may outlive every handle.
        std::mem::forget(library);
        let old = |symbol: &str| DeviceError::DriverOld {
            vendor,
            found: "an unknown version".into(),
            wants: symbol.to_owned(),
        };
        let mut driver = Driver { spec, functions: functions.map_err(old)?, api: api.map_err(old)?, version: (0, 0) };
        let mut version = 0;
        // SAFETY: the pointer is to an int; the call needs no initialisation.
        driver.check(|n| n.version, unsafe { (driver.functions.version)(&mut version) })?;
        driver.version = (spec.version)(version);
        // SAFETY: no pointers are passed.
        match unsafe { (driver.functions.init)(0) } {
            NO_DEVICE => return Err(DeviceError::NoGpu { vendor, ordinal: 0, count: 0 }),
            status => driver.check(|n| n.init, status)?,
        }
        if driver.version.0 < spec.oldest {
            let wants = format!("{} {}", spec.platform, spec.oldest);
            return Err(DeviceError::DriverOld { vendor, found: driver.serves(), wants });
        }
        Ok(driver)
    }

    /// What it serves, such as `CUDA 12.8`.
    pub(super) fn serves(&self) -> String {
        format!("{} {}.{}", self.spec.platform, self.version.0, self.version.1)
    }

    /// Turns the status of a shared function into an error that names it.
    pub(super) fn check(&self, call: impl Fn(&Names) -> &'static str, status: Status) -> Result<(), DeviceError> {
        self.checked((call(&self.spec.names), status))
    }

    /// Turns the status of any call into an error that names it.
    pub(super) fn checked(&self, called: Called) -> Result<(), DeviceError> {
        if called.1 == 0 { Ok(()) } else { Err(self.error(called)) }
    }

    /// The error of a call that failed.
    pub(super) fn error(&self, (call, code): Called) -> DeviceError {
        DeviceError::Driver { call, code, what: self.describe(code) }
    }

    /// The driver's words for a status.
    fn describe(&self, status: Status) -> String {
        let text = |get: unsafe extern "C" fn(Status, *mut *const c_char) -> Status| {
            let mut pointer = std::ptr::null();
            // SAFETY: the driver writes a pointer to a constant string, or null.
            let known = unsafe { get(status, &mut pointer) } == 0 && !pointer.is_null();
            // SAFETY: checked not to be null; the driver's strings end in a zero and live for good.
            known.then(|| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
        };
        match (text(self.functions.error_name), text(self.functions.error_string)) {
            (Some(name), Some(what)) => format!("{name}, {what}"),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => format!("error {status}"),
        }
    }
}
