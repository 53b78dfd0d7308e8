//! The part of the CUDA driver's interface that the device uses, loaded when it is first wanted: a program that links this
//! crate runs where there is no driver.
//!
//! Signatures and constants are those of the CUDA driver API reference, version 12; the driver keeps them for good under the
//! versioned names used here.

use crate::error::DeviceError;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;

/// `CUresult`; 0 is success.
pub(super) type Status = c_uint;
/// An address in device memory.
pub(super) type Address = u64;
/// `CUcontext`, `CUmodule`, `CUfunction`, `CUstream`, `CUevent`, `CUgraph`, `CUgraphExec`: opaque.
pub(super) type Handle = *mut c_void;

/// `CUDA_ERROR_OUT_OF_MEMORY`.
pub(super) const OUT_OF_MEMORY: Status = 2;
/// `CUDA_ERROR_NO_DEVICE`.
pub(super) const NO_DEVICE: Status = 100;
/// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`.
pub(super) const UNSUPPORTED_PTX_VERSION: Status = 222;

/// `CU_DEVICE_ATTRIBUTE_*`.
pub(super) mod attribute {
    pub(in super::super) const MULTIPROCESSORS: i32 = 16;
    pub(in super::super) const CAPABILITY_MAJOR: i32 = 75;
    pub(in super::super) const CAPABILITY_MINOR: i32 = 76;
    pub(in super::super) const MAX_SHARED_BYTES: i32 = 97;
}

/// `CU_FUNC_ATTRIBUTE_*`.
pub(super) mod function {
    pub(in super::super) const DYNAMIC_SHARED_BYTES: i32 = 8;
    pub(in super::super) const LARGE_CLUSTERS: i32 = 14;
}

/// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
pub(super) const JIT_ERROR_LOG: [c_uint; 2] = [5, 6];
/// `CU_STREAM_NON_BLOCKING`.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_DISABLE_TIMING`.
pub(super) const EVENT_NO_TIMING: c_uint = 2;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`: other threads may allocate meanwhile.
pub(super) const CAPTURE_RELAXED: c_uint = 2;
/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
pub(super) const LAUNCH_CLUSTER: c_uint = 4;

/// `CUtensorMap`. CUDA 13 wants 128-byte alignment where 12 wants 64.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMapBytes(pub(super) [u64; 16]);

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: [c_uint; 3],
    pub(super) block: [c_uint; 3],
    pub(super) shared_bytes: c_uint,
    pub(super) stream: Handle,
    pub(super) attributes: *mut LaunchAttribute,
    pub(super) attribute_count: c_uint,
}

/// `CUlaunchAttribute`; the value is a union of 64 bytes, of which a cluster dimension is the first three words.
#[repr(C, align(8))]
pub(super) struct LaunchAttribute {
    pub(super) id: c_uint,
    pub(super) pad: c_uint,
    pub(super) value: [c_uint; 16],
}

/// Declares the table of functions and how it is filled.
macro_rules! functions {
    ($($field:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// Functions of the driver, by what they do; the symbol is in [`Functions::load`].
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($arg),*) -> Status,)*
        }

        impl Functions {
            /// Looks every function up; the error is the name of one that is missing.
            ///
            /// # Safety
            /// The library must be a CUDA driver, and stay loaded.
            unsafe fn load(library: &Library) -> Result<Functions, &'static str> {
                Ok(Functions {
                    // SAFETY: the symbol of a CUDA driver has this type.
                    $($field: *unsafe { library.get($symbol) }.map_err(|_| $symbol)?,)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit" (c_uint);
    driver_version = "cuDriverGetVersion" (*mut c_int);
    error_name = "cuGetErrorName" (Status, *mut *const c_char);
    error_string = "cuGetErrorString" (Status, *mut *const c_char);
    device_count = "cuDeviceGetCount" (*mut c_int);
    device_get = "cuDeviceGet" (*mut c_int, c_int);
    device_name = "cuDeviceGetName" (*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    context_retain = "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2" (c_int);
    context_set = "cuCtxSetCurrent" (Handle);
    memory_info = "cuMemGetInfo_v2" (*mut usize, *mut usize);
    memory_alloc = "cuMemAlloc_v2" (*mut Address, usize);
    memory_free = "cuMemFree_v2" (Address);
    host_alloc = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    host_free = "cuMemFreeHost" (*mut c_void);
    copy_to_device = "cuMemcpyHtoDAsync_v2" (Address, *const c_void, usize, Handle);
    copy_to_host = "cuMemcpyDtoHAsync_v2" (*mut c_void, Address, usize, Handle);
    copy_on_device = "cuMemcpyDtoDAsync_v2" (Address, Address, usize, Handle);
    fill = "cuMemsetD8Async" (Address, u8, usize, Handle);
    stream_create = "cuStreamCreate" (*mut Handle, c_uint);
    stream_destroy = "cuStreamDestroy_v2" (Handle);
    stream_wait = "cuStreamSynchronize" (Handle);
    capture_begin = "cuStreamBeginCapture_v2" (Handle, c_uint);
    capture_end = "cuStreamEndCapture" (Handle, *mut Handle);
    graph_destroy = "cuGraphDestroy" (Handle);
    graph_instantiate = "cuGraphInstantiateWithFlags" (*mut Handle, Handle, u64);
    graph_launch = "cuGraphLaunch" (Handle, Handle);
    graph_exec_destroy = "cuGraphExecDestroy" (Handle);
    event_create = "cuEventCreate" (*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2" (Handle);
    event_record = "cuEventRecord" (Handle, Handle);
    event_wait = "cuEventSynchronize" (Handle);
    event_elapsed = "cuEventElapsedTime" (*mut f32, Handle, Handle);
    module_load = "cuModuleLoadDataEx" (*mut Handle, *const c_void, c_uint, *mut c_uint, *mut *mut c_void);
    module_unload = "cuModuleUnload" (Handle);
    module_function = "cuModuleGetFunction" (*mut Handle, Handle, *const c_char);
    function_attribute = "cuFuncSetAttribute" (Handle, c_int, c_int);
    launch = "cuLaunchKernelEx" (*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
    encode_tiled = "cuTensorMapEncodeTiled" (
        *mut TensorMapBytes, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const c_uint, *const c_uint,
        c_uint, c_uint, c_uint, c_uint
    );
}

/// A loaded and initialised driver.
pub(super) struct Driver {
    pub(super) functions: Functions,
    /// CUDA version it serves, such as (12, 8).
    pub(super) version: (i32, i32),
}

impl Driver {
    /// Loads and initialises the driver library at `path`, or found by the system's rules if that is a bare name.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverOld`], [`DeviceError::NoGpu`] if it finds no device at all.
    pub(super) fn load(path: &Path) -> Result<Driver, DeviceError> {
        let missing = |reason: String| DeviceError::NoDriver { library: path.display().to_string(), reason };
        // SAFETY: what a library does when it is loaded is its own affair; this one is the system's driver, or what the user
        // named in its place.
        let library = unsafe { Library::new(path) }.map_err(|e| missing(e.to_string()))?;
        // SAFETY: as above; the library is never unloaded (below).
        let functions = unsafe { Functions::load(&library) };
        // Threads of the driver may outlive every handle.
        std::mem::forget(library);
        let functions = functions
            .map_err(|symbol| DeviceError::DriverOld { found: "an unknown version".into(), wants: symbol.into() })?;
        let mut version = 0;
        // SAFETY: the pointer is to an int; the call needs no initialisation.
        let status = unsafe { (functions.driver_version)(&mut version) };
        let driver = Driver { functions, version: (version / 1000, version % 1000 / 10) };
        driver.check("cuDriverGetVersion", status)?;
        // SAFETY: no pointers are passed.
        match unsafe { (driver.functions.init)(0) } {
            NO_DEVICE => Err(DeviceError::NoGpu { ordinal: 0, count: 0 }),
            status => driver.check("cuInit", status).map(|()| driver),
        }
    }

    /// Turns a status into an error that names the call.
    pub(super) fn check(&self, call: &'static str, status: Status) -> Result<(), DeviceError> {
        if status == 0 {
            return Ok(());
        }
        Err(DeviceError::Driver { call, code: status, what: self.describe(status) })
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
