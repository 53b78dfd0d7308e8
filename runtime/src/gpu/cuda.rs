//! NVIDIA's driver. Signatures and constants are those of the CUDA driver API reference, version 12; the driver keeps them for good under
//! the versioned names used here.

use super::bind::{MapPlan, TensorMapBytes};
use super::driver::{Address, Api, Called, Handle, Launch, Names, Refusal, Spec, Status, functions};
use crate::device::Vendor;
use std::ffi::{c_int, c_uint, c_void};

/// What is known of it without loading it.
pub(super) static SPEC: Spec = Spec {
    vendor: Vendor::Nvidia,
    library: if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" },
    variable: "DSC_CUDA_DRIVER",
    names: NAMES,
    open,
    platform: "CUDA",
    version: |n| (n / 1000, n % 1000 / 10),
    oldest: 12,
    units: "multiprocessors",
    // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _COMPUTE_CAPABILITY_MAJOR, _MINOR, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    attributes: [16, 75, 76, 97],
    capability: |(major, minor)| format!("compute capability {major}.{minor}"),
    most_blocks: |_| [i32::MAX as u64, 65535, 65535],
};

const NAMES: Names = Names {
    init: "cuInit",
    version: "cuDriverGetVersion",
    error_name: "cuGetErrorName",
    error_string: "cuGetErrorString",
    device_count: "cuDeviceGetCount",
    device_get: "cuDeviceGet",
    device_name: "cuDeviceGetName",
    device_attribute: "cuDeviceGetAttribute",
    memory_info: "cuMemGetInfo_v2",
    memory_alloc: "cuMemAlloc_v2",
    memory_free: "cuMemFree_v2",
    host_alloc: "cuMemHostAlloc",
    host_free: "cuMemFreeHost",
    copy_to_device: "cuMemcpyHtoDAsync_v2",
    copy_to_host: "cuMemcpyDtoHAsync_v2",
    copy_on_device: "cuMemcpyDtoDAsync_v2",
    fill: "cuMemsetD8Async",
    stream_create: "cuStreamCreate",
    stream_destroy: "cuStreamDestroy_v2",
    stream_wait: "cuStreamSynchronize",
    capture_begin: "cuStreamBeginCapture_v2",
    capture_end: "cuStreamEndCapture",
    graph_destroy: "cuGraphDestroy",
    graph_instantiate: "cuGraphInstantiateWithFlags",
    graph_launch: "cuGraphLaunch",
    graph_exec_destroy: "cuGraphExecDestroy",
    event_create: "cuEventCreate",
    event_destroy: "cuEventDestroy_v2",
    event_record: "cuEventRecord",
    event_wait: "cuEventSynchronize",
    event_elapsed: "cuEventElapsedTime",
    module_unload: "cuModuleUnload",
    module_function: "cuModuleGetFunction",
};

functions! {
    /// Functions of its own.
    Cuda, CudaNames {
        context_retain (*mut Handle, c_int);
        context_release (c_int);
        context_set (Handle);
        module_load (*mut Handle, *const c_void, c_uint, *mut c_uint, *mut *mut c_void);
        function_attribute (Handle, c_int, c_int);
        launch (*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
        encode_tiled (
            *mut TensorMapBytes, c_uint, c_uint, *mut c_void, *const u64, *const u64, *const c_uint, *const c_uint,
            c_uint, c_uint, c_uint, c_uint
        );
    }
}

const OWN: CudaNames = CudaNames {
    context_retain: "cuDevicePrimaryCtxRetain",
    context_release: "cuDevicePrimaryCtxRelease_v2",
    context_set: "cuCtxSetCurrent",
    module_load: "cuModuleLoadDataEx",
    function_attribute: "cuFuncSetAttribute",
    launch: "cuLaunchKernelEx",
    encode_tiled: "cuTensorMapEncodeTiled",
};

/// `CUDA_ERROR_UNSUPPORTED_PTX_VERSION`.
const UNSUPPORTED_PTX_VERSION: Status = 222;
/// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
const JIT_ERROR_LOG: [c_uint; 2] = [5, 6];
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const DYNAMIC_SHARED_BYTES: c_int = 8;
/// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
const LARGE_CLUSTERS: c_int = 14;
/// `CU_LAUNCH_ATTRIBUTE_COOPERATIVE`: all blocks run at once, or the launch is refused.
const LAUNCH_TOGETHER: c_uint = 2;
/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
const LAUNCH_CLUSTER: c_uint = 4;
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel itself waits for the launches before it.
const LAUNCH_DEPENDENT: c_uint = 6;
/// Blocks of a cluster that every GPU with clusters runs; more must be asked for.
const PORTABLE_CLUSTER: u32 = 8;
/// Bytes kept of what the driver says about assembly it refuses.
const LOG_BYTES: usize = 8192;

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *mut LaunchAttribute,
    attribute_count: c_uint,
}

/// `CUlaunchAttribute`; the value is a union of 64 bytes, of which a cluster dimension is the first three words, and a truth value the first.
#[repr(C, align(8))]
pub(super) struct LaunchAttribute {
    id: c_uint,
    pad: c_uint,
    value: [c_uint; 16],
}

/// # Safety
/// As [`Spec::open`].
unsafe fn open(library: &libloading::Library) -> Result<Box<dyn Api>, &'static str> {
    // SAFETY: as the caller says.
    Ok(Box::new(unsafe { Cuda::load(library, &OWN) }?))
}

impl Api for Cuda {
    fn retain(&self, device: c_int) -> Result<Handle, Called> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a handle.
        match unsafe { (self.context_retain)(&mut raw, device) } {
            0 => Ok(raw),
            status => Err((OWN.context_retain, status)),
        }
    }

    fn release(&self, device: c_int) {
        // SAFETY: what was retained is released once; a failure has nobody to tell.
        unsafe { (self.context_release)(device) };
    }

    fn enter(&self, _: c_int, context: Handle) -> Called {
        // SAFETY: a context that is retained.
        (OWN.context_set, unsafe { (self.context_set)(context) })
    }

    fn load(&self, image: &[u64]) -> Result<Handle, Refusal> {
        let mut log = vec![0u8; LOG_BYTES];
        let mut options = JIT_ERROR_LOG;
        let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), std::ptr::without_provenance_mut(LOG_BYTES)];
        let mut raw = std::ptr::null_mut();
        let image = image.as_ptr().cast();
        // SAFETY: the image ends in a zero; options and values are two each, of the types the options ask for (a buffer, and
        // its size in place of a pointer); all live during the call.
        let status = unsafe { (self.module_load)(&mut raw, image, 2, options.as_mut_ptr(), values.as_mut_ptr()) };
        let called = (OWN.module_load, status);
        match status {
            0 => Ok(raw),
            UNSUPPORTED_PTX_VERSION => Err(Refusal::Old),
            _ => {
                let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
                Err(Refusal::Broken(called, String::from_utf8_lossy(&log[..end]).trim().to_owned()))
            }
        }
    }

    unsafe fn prepare(&self, function: Handle, shared_bytes: u32, cluster: u32) -> Result<(), Called> {
        let set = |attribute, value: u32| {
            let value = i32::try_from(value).unwrap_or(i32::MAX);
            // SAFETY: the caller's word.
            match unsafe { (self.function_attribute)(function, attribute, value) } {
                0 => Ok(()),
                status => Err((OWN.function_attribute, status)),
            }
        };
        // Also of 0 bytes: it loads the function now, which a driver that loads lazily would do at the first launch, and that may
        // be one which is captured.
        set(DYNAMIC_SHARED_BYTES, shared_bytes)?;
        if cluster > PORTABLE_CLUSTER { set(LARGE_CLUSTERS, 1) } else { Ok(()) }
    }

    unsafe fn launch(&self, launch: &Launch) -> Called {
        let attribute = |id, first: [u32; 3]| {
            let mut value = [0; 16];
            value[..3].copy_from_slice(&first);
            LaunchAttribute { id, pad: 0, value }
        };
        let cluster = (launch.cluster > 1).then(|| attribute(LAUNCH_CLUSTER, [launch.cluster, 1, 1]));
        let dependent = launch.dependent.then(|| attribute(LAUNCH_DEPENDENT, [1, 0, 0]));
        let together = launch.together.then(|| attribute(LAUNCH_TOGETHER, [1, 0, 0]));
        let mut attributes: Vec<LaunchAttribute> = cluster.into_iter().chain(dependent).chain(together).collect();
        let config = LaunchConfig {
            grid: launch.grid,
            block: [launch.threads, 1, 1],
            shared_bytes: launch.shared_bytes,
            stream: launch.stream,
            attributes: attributes.as_mut_ptr(),
            attribute_count: attributes.len() as u32,
        };
        // SAFETY: as the caller says; the driver copies the parameters before it returns.
        (OWN.launch, unsafe { (self.launch)(&config, launch.function, launch.params, std::ptr::null_mut()) })
    }

    fn encode(&self, plan: &MapPlan, address: Address, bytes: &mut TensorMapBytes) -> Called {
        let ones = [1u32; 5];
        // SAFETY: every array has `rank` elements, strides one less; the driver reads them and writes the 128 bytes of the map.
        // The address is not followed: that the view stays in its buffer is checked by the caller.
        let status = unsafe {
            (self.encode_tiled)(
                bytes,
                plan.element,
                plan.dims.len() as u32,
                std::ptr::without_provenance_mut(address as usize),
                plan.dims.as_ptr(),
                plan.strides.as_ptr(),
                plan.tile.as_ptr(),
                ones.as_ptr(),
                0,
                plan.swizzle,
                3, // fetch 256 bytes into L2
                0, // zeros outside
            )
        };
        (OWN.encode_tiled, status)
    }
}
