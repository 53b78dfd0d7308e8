//! AMD's HIP, `libamdhip64.so` of ROCm. **It has not met hardware**: our tests load a stand-in. Signatures and constants are those of
//! `hip_runtime_api.h` of ROCm 6 and 7.

use super::bind::{MapPlan, TensorMapBytes};
use super::driver::{Address, Api, Called, Handle, Launch, Names, Refusal, Spec, Status, functions};
use crate::device::Vendor;
use std::ffi::{c_int, c_uint, c_void};

/// What is known of it without loading it.
pub(super) static SPEC: Spec = Spec {
    vendor: Vendor::Amd,
    library: if cfg!(windows) { "amdhip64.dll" } else { "libamdhip64.so" },
    variable: "DSC_HIP_LIBRARY",
    names: NAMES,
    open,
    platform: "HIP",
    version: |n| (n / 10_000_000, n / 100_000 % 100),
    oldest: 6,
    units: "compute units",
    // hipDeviceAttributeMultiprocessorCount, ComputeCapabilityMajor, ComputeCapabilityMinor, MaxSharedMemoryPerBlock
    attributes: [63, 23, 61, 74],
    capability: |(major, minor)| format!("architecture gfx{major}{minor:x}x"),
    // Sizes of a grid are counted in threads, of 32 bits.
    most_blocks: |threads| [u64::from(u32::MAX / threads.max(1)).min(i32::MAX as u64), 65535, 65535],
};

const NAMES: Names = Names {
    init: "hipInit",
    version: "hipRuntimeGetVersion",
    error_name: "hipDrvGetErrorName",
    error_string: "hipDrvGetErrorString",
    device_count: "hipGetDeviceCount",
    device_get: "hipDeviceGet",
    device_name: "hipDeviceGetName",
    device_attribute: "hipDeviceGetAttribute",
    memory_info: "hipMemGetInfo",
    memory_alloc: "hipMalloc",
    memory_free: "hipFree",
    host_alloc: "hipHostMalloc",
    host_free: "hipHostFree",
    copy_to_device: "hipMemcpyHtoDAsync",
    copy_to_host: "hipMemcpyDtoHAsync",
    copy_on_device: "hipMemcpyDtoDAsync",
    fill: "hipMemsetD8Async",
    stream_create: "hipStreamCreateWithFlags",
    stream_destroy: "hipStreamDestroy",
    stream_wait: "hipStreamSynchronize",
    capture_begin: "hipStreamBeginCapture",
    capture_end: "hipStreamEndCapture",
    graph_destroy: "hipGraphDestroy",
    graph_instantiate: "hipGraphInstantiateWithFlags",
    graph_launch: "hipGraphLaunch",
    graph_exec_destroy: "hipGraphExecDestroy",
    event_create: "hipEventCreateWithFlags",
    event_destroy: "hipEventDestroy",
    event_record: "hipEventRecord",
    event_wait: "hipEventSynchronize",
    event_elapsed: "hipEventElapsedTime",
    module_unload: "hipModuleUnload",
    module_function: "hipModuleGetFunction",
};

functions! {
    /// Functions of its own.
    Hip, HipNames {
        device_set (c_int);
        module_load (*mut Handle, *const c_void);
        launch (
            Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *mut *mut c_void, *mut *mut c_void
        );
    }
}

const OWN: HipNames =
    HipNames { device_set: "hipSetDevice", module_load: "hipModuleLoadData", launch: "hipModuleLaunchKernel" };

/// `hipErrorNoBinaryForGpu`.
const NO_BINARY_FOR_GPU: Status = 209;
/// `hipErrorNotSupported`.
const NOT_SUPPORTED: Status = 801;

/// # Safety
/// As [`Spec::open`].
unsafe fn open(library: &libloading::Library) -> Result<Box<dyn Api>, &'static str> {
    // SAFETY: as the caller says.
    Ok(Box::new(unsafe { Hip::load(library, &OWN) }?))
}

impl Api for Hip {
    /// A thread has a device, whose context lives as long as the process.
    fn retain(&self, device: c_int) -> Result<Handle, Called> {
        match self.enter(device, std::ptr::null_mut()) {
            (_, 0) => Ok(std::ptr::null_mut()),
            called => Err(called),
        }
    }

    fn release(&self, _: c_int) {}

    fn enter(&self, device: c_int, _: Handle) -> Called {
        // SAFETY: no pointers are passed.
        (OWN.device_set, unsafe { (self.device_set)(device) })
    }

    fn load(&self, image: &[u64]) -> Result<Handle, Refusal> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a handle; a code object says itself how long it is.
        let status = unsafe { (self.module_load)(&mut raw, image.as_ptr().cast()) };
        let called = (OWN.module_load, status);
        match status {
            0 => Ok(raw),
            NO_BINARY_FOR_GPU => Err(Refusal::Foreign),
            _ => Err(Refusal::Broken(called, String::new())),
        }
    }

    /// Shared memory is a code object's own affair, and there are no clusters.
    unsafe fn prepare(&self, _: Handle, _: u32, cluster: u32) -> Result<(), Called> {
        if cluster > 1 { Err((OWN.launch, NOT_SUPPORTED)) } else { Ok(()) }
    }

    unsafe fn launch(&self, launch: &Launch) -> Called {
        let [x, y, z] = launch.grid;
        let (threads, shared_bytes) = (launch.threads, launch.shared_bytes);
        let extra = std::ptr::null_mut();
        // SAFETY: as the caller says; how long each parameter is stands in the code object's metadata, and the values are copied
        // before it returns.
        let status = unsafe {
            (self.launch)(launch.function, x, y, z, threads, 1, 1, shared_bytes, launch.stream, launch.params, extra)
        };
        (OWN.launch, status)
    }

    /// There are none.
    fn encode(&self, _: &MapPlan, _: Address, _: &mut TensorMapBytes) -> Called {
        ("tensor maps", NOT_SUPPORTED)
    }
}
