//! The stand-in of `cuda.rs` under the names of HIP: the tests in `runtime/src/gpu/tests/hip.rs` build and load it.
//!
//! A module is a code object here, so the letters behind the first four bytes name its function; one called `foreign` is for another GPU.

#![allow(non_snake_case, clippy::missing_safety_doc)]

#[path = "cuda.rs"]
mod cuda;

use cuda::*;
use std::ffi::{c_char, c_int, c_uint, c_void};

type Status = c_uint;
type Handle = *mut c_void;

/// A setting, if it is not the CUDA driver's default.
fn changed(which: usize) -> Option<u64> {
    Some(setting(which)).filter(|&value| value != DEFAULTS[which])
}

/// Functions that are the same but for their names.
macro_rules! same {
    ($($hip:ident = $cuda:ident ($($name:ident: $arg:ty),*);)*) => {
        $(#[unsafe(no_mangle)]
        pub unsafe extern "C" fn $hip($($name: $arg),*) -> Status {
            #[allow(unused_unsafe)]
            unsafe { $cuda($($name),*) }
        })*
    };
}

same! {
    hipInit = cuInit(flags: c_uint);
    hipDrvGetErrorString = cuGetErrorString(status: Status, text: *mut *const c_char);
    hipGetDeviceCount = cuDeviceGetCount(count: *mut c_int);
    hipDeviceGet = cuDeviceGet(device: *mut c_int, ordinal: c_int);
    hipMemGetInfo = cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    hipMalloc = cuMemAlloc_v2(address: *mut u64, bytes: usize);
    hipFree = cuMemFree_v2(address: u64);
    hipHostMalloc = cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: c_uint);
    hipHostFree = cuMemFreeHost(pointer: *mut c_void);
    hipMemcpyHtoDAsync = cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle);
    hipMemcpyDtoHAsync = cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle);
    hipMemcpyDtoDAsync = cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle);
    hipMemsetD8Async = cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: Handle);
    hipStreamCreateWithFlags = cuStreamCreate(stream: *mut Handle, flags: c_uint);
    hipStreamDestroy = cuStreamDestroy_v2(stream: Handle);
    hipStreamSynchronize = cuStreamSynchronize(stream: Handle);
    hipStreamBeginCapture = cuStreamBeginCapture_v2(stream: Handle, mode: c_uint);
    hipStreamEndCapture = cuStreamEndCapture(stream: Handle, graph: *mut Handle);
    hipGraphDestroy = cuGraphDestroy(graph: Handle);
    hipGraphInstantiateWithFlags = cuGraphInstantiateWithFlags(made: *mut Handle, graph: Handle, flags: u64);
    hipGraphLaunch = cuGraphLaunch(graph: Handle, stream: Handle);
    hipGraphExecDestroy = cuGraphExecDestroy(graph: Handle);
    hipEventCreateWithFlags = cuEventCreate(event: *mut Handle, flags: c_uint);
    hipEventDestroy = cuEventDestroy_v2(event: Handle);
    hipEventRecord = cuEventRecord(event: Handle, stream: Handle);
    hipEventSynchronize = cuEventSynchronize(event: Handle);
    hipEventElapsedTime = cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle);
    hipModuleUnload = cuModuleUnload(module: Handle);
    hipModuleGetFunction = cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char);
}

/// HIP 6.4, unless a test says otherwise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipRuntimeGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = changed(VERSION).unwrap_or(60_443_483) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDrvGetErrorName(status: Status, text: *mut *const c_char) -> Status {
    let name = match status {
        2 => c"hipErrorOutOfMemory",
        200 => c"hipErrorInvalidImage",
        700 => c"hipErrorIllegalAddress",
        _ => return 1,
    };
    unsafe { *text = name.as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetName(name: *mut c_char, _: c_int, _: c_int) -> Status {
    let text = c"Fake Instinct";
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name, text.count_bytes() + 1) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipDeviceGetAttribute(value: *mut c_int, attribute: c_int, _: c_int) -> Status {
    let found = match attribute {
        63 => 304,
        23 => setting(MAJOR) as c_int,
        61 => changed(MINOR).unwrap_or(4) as c_int,
        74 => 65_536,
        _ => return 1,
    };
    unsafe { *value = found };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn hipSetDevice(device: c_int) -> Status {
    if (device as u64) < setting(DEVICES) { 0 } else { 101 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipModuleLoadData(module: *mut Handle, image: *const c_void) -> Status {
    let Some(name) = (unsafe { module_name(image.cast()) }) else { return 200 };
    log(format!("load {name}"));
    match name.as_str() {
        "broken" => return 200,
        "foreign" => return 209,
        _ => {}
    }
    unsafe { *module = Box::into_raw(Box::new(name)).cast() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn hipModuleLaunchKernel(
    function: Handle,
    x: c_uint,
    y: c_uint,
    z: c_uint,
    threads: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared_bytes: c_uint,
    _: Handle,
    params: *const *const u64,
    extra: *mut *mut c_void,
) -> Status {
    assert!((threads_y, threads_z) == (1, 1) && extra.is_null());
    unsafe { enqueue(function, [x, y, z], threads, &format!("{shared_bytes} bytes"), params) };
    0
}
