//! A stand-in for the CUDA driver, for machines that have none: device memory is host memory, everything happens at once, and calls are
//! written down. The tests in `runtime/src/gpu/tests.rs` build it with rustc and load it as the driver.
//!
//! Its kernels: `count` adds one to element `b` of its first argument (u32) for each block `b` below symbol T; `tally` does so with the
//! symbols by value; every other name does nothing. A module is the name of its one function: `.entry NAME` in text, and the letters behind the first four bytes in machine
//! code. `hip.rs` is the same under the names of HIP.

#![allow(non_snake_case, clippy::missing_safety_doc)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Mutex;

type Status = c_uint;
type Handle = *mut c_void;

/// What tests may set with [`fake_set`], by number.
static SETTINGS: Mutex<[u64; 6]> = Mutex::new(DEFAULTS);
pub const DEFAULTS: [u64; 6] = [12080, 1, 9, 0, 1 << 30, 0];
pub const VERSION: usize = 0;
pub const DEVICES: usize = 1;
pub const MAJOR: usize = 2;
pub const MINOR: usize = 3;
const MEMORY: usize = 4;
/// The status that the next wait returns.
const FAULT: usize = 5;

static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());
static STATE: Mutex<State> = Mutex::new(State { live: BTreeMap::new(), used: 0, capture: None, next: 1 });

struct State {
    /// Sizes of allocations by address.
    live: BTreeMap<u64, usize>,
    used: u64,
    capture: Option<Vec<Launch>>,
    next: usize,
}

/// A launch with the values of its parameters.
#[derive(Clone)]
struct Launch {
    name: String,
    grid: [c_uint; 3],
    line: String,
    params: [u64; 2],
}

#[repr(C)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *const [c_uint; 18],
    attribute_count: c_uint,
}

pub fn setting(which: usize) -> u64 {
    SETTINGS.lock().unwrap()[which]
}

pub fn log(line: String) {
    LOG.lock().unwrap().push(line);
}

/// A handle that is nothing but different from others.
fn handle() -> Handle {
    let mut state = STATE.lock().unwrap();
    state.next += 1;
    std::ptr::without_provenance_mut(state.next)
}

#[unsafe(no_mangle)]
pub extern "C" fn fake_set(which: usize, value: u64) {
    SETTINGS.lock().unwrap()[which] = value;
}

/// Writes the log's lines to `text` and forgets them; returns their length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_log(text: *mut u8, room: usize) -> usize {
    let lines = std::mem::take(&mut *LOG.lock().unwrap()).join("\n");
    let count = lines.len().min(room);
    unsafe { std::ptr::copy_nonoverlapping(lines.as_ptr(), text, count) };
    count
}

/// Bytes of device memory in use.
#[unsafe(no_mangle)]
pub extern "C" fn fake_used() -> u64 {
    STATE.lock().unwrap().used
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> Status {
    if setting(DEVICES) == 0 { 100 } else { 0 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    unsafe { *version = setting(VERSION) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(status: Status, text: *mut *const c_char) -> Status {
    let name = match status {
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        _ => return 1,
    };
    unsafe { *text = name.as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_: Status, text: *mut *const c_char) -> Status {
    unsafe { *text = c"as the test asked".as_ptr() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    unsafe { *count = setting(DEVICES) as c_int };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    unsafe { *device = ordinal };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, _: c_int, _: c_int) -> Status {
    let text = c"Fake H200";
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name, text.count_bytes() + 1) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _: c_int) -> Status {
    let found = match attribute {
        16 => 132,
        75 => setting(MAJOR) as c_int,
        76 => setting(MINOR) as c_int,
        97 => 232_448,
        _ => return 1,
    };
    unsafe { *value = found };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, _: c_int) -> Status {
    unsafe { *context = handle() };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_: c_int) -> Status {
    log("release".into());
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(_: Handle) -> Status {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Status {
    let (used, all) = (STATE.lock().unwrap().used, setting(MEMORY));
    unsafe { (*free, *total) = (all.saturating_sub(used) as usize, all as usize) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    let mut state = STATE.lock().unwrap();
    if state.used + bytes as u64 > setting(MEMORY) {
        return 2;
    }
    state.used += bytes as u64;
    let memory = unsafe { alloc_zeroed(Layout::from_size_align(bytes, 256).unwrap()) };
    // What is new holds anything but zeros.
    unsafe { std::ptr::write_bytes(memory, 0xa5, bytes) };
    state.live.insert(memory.expose_provenance() as u64, bytes);
    unsafe { *address = memory.expose_provenance() as u64 };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> Status {
    let mut state = STATE.lock().unwrap();
    let Some(bytes) = state.live.remove(&address) else { return 1 };
    state.used -= bytes as u64;
    let memory = std::ptr::with_exposed_provenance_mut(address as usize);
    unsafe { dealloc(memory, Layout::from_size_align(bytes, 256).unwrap()) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, _: c_uint) -> Status {
    // As the real one does not say how large a block is when it is freed, its size is kept in front of it.
    let memory = unsafe { alloc_zeroed(Layout::from_size_align(bytes + 64, 64).unwrap()) };
    unsafe { memory.cast::<usize>().write(bytes) };
    unsafe { *pointer = memory.add(64).cast() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(pointer: *mut c_void) -> Status {
    let memory = unsafe { pointer.cast::<u8>().sub(64) };
    let bytes = unsafe { memory.cast::<usize>().read() };
    unsafe { dealloc(memory, Layout::from_size_align(bytes + 64, 64).unwrap()) };
    0
}

/// Whether a range is inside one allocation.
fn inside(address: u64, bytes: usize) -> bool {
    let state = STATE.lock().unwrap();
    let below = state.live.range(..=address).next_back();
    below.is_some_and(|(start, size)| address + bytes as u64 <= start + *size as u64)
}

fn at(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, _: Handle) -> Status {
    log(format!("to device {bytes}"));
    if !inside(to, bytes) {
        return 1;
    }
    unsafe { std::ptr::copy_nonoverlapping(from.cast(), at(to), bytes) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, _: Handle) -> Status {
    log(format!("to host {bytes}"));
    if !inside(from, bytes) {
        return 1;
    }
    unsafe { std::ptr::copy_nonoverlapping(at(from), to.cast(), bytes) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _: Handle) -> Status {
    if !inside(to, bytes) || !inside(from, bytes) {
        return 1;
    }
    unsafe { std::ptr::copy_nonoverlapping(at(from), at(to), bytes) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, _: Handle) -> Status {
    if !inside(to, bytes) {
        return 1;
    }
    unsafe { std::ptr::write_bytes(at(to), value, bytes) };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, _: c_uint) -> Status {
    unsafe { *stream = handle() };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(_: Handle) -> Status {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_: Handle) -> Status {
    log("wait".into());
    setting(FAULT) as Status
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(_: Handle, _: c_uint) -> Status {
    log("capture".into());
    STATE.lock().unwrap().capture = Some(Vec::new());
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(_: Handle, graph: *mut Handle) -> Status {
    let Some(launches) = STATE.lock().unwrap().capture.take() else { return 1 };
    unsafe { *graph = Box::into_raw(Box::new(launches)).cast() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    drop(unsafe { Box::from_raw(graph.cast::<Vec<Launch>>()) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(made: *mut Handle, graph: Handle, _: u64) -> Status {
    let launches = unsafe { (*graph.cast::<Vec<Launch>>()).clone() };
    unsafe { *made = Box::into_raw(Box::new(launches)).cast() };
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(graph: Handle, _: Handle) -> Status {
    let launches = unsafe { &*graph.cast::<Vec<Launch>>() };
    log(format!("graph of {}", launches.len()));
    launches.iter().for_each(execute);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(graph: Handle) -> Status {
    log("destroy graph".into());
    drop(unsafe { Box::from_raw(graph.cast::<Vec<Launch>>()) });
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, _: c_uint) -> Status {
    unsafe { *event = handle() };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(_: Handle) -> Status {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(_: Handle, _: Handle) -> Status {
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(_: Handle) -> Status {
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(milliseconds: *mut f32, _: Handle, _: Handle) -> Status {
    unsafe { *milliseconds = 2.0 };
    0
}

/// The name behind `.entry`, or that behind the first four bytes; both end where letters do.
pub unsafe fn module_name(image: *const u8) -> Option<String> {
    let text = unsafe { CStr::from_ptr(image.cast()) }.to_string_lossy().into_owned();
    let name = match text.split_once(".entry ") {
        Some((_, name)) => name.to_owned(),
        None => text.get(4..)?.to_owned(),
    };
    Some(name.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut Handle,
    image: *const c_void,
    count: c_uint,
    options: *const c_uint,
    values: *const *mut c_void,
) -> Status {
    assert_eq!((count, unsafe { *options }, unsafe { *options.add(1) }), (2, 5, 6));
    let Some(name) = (unsafe { module_name(image.cast()) }) else { return 200 };
    log(format!("load {name}"));
    if name == "broken" {
        let said = b"line 3: what is this";
        let room = unsafe { *values.add(1) }.addr();
        assert!(room > said.len());
        unsafe { std::ptr::copy_nonoverlapping(said.as_ptr(), (*values).cast(), said.len()) };
        return 218;
    }
    unsafe { *module = Box::into_raw(Box::new(name)).cast() };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_: Handle) -> Status {
    // The name is left to the functions that were found in it.
    log("unload".into());
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> Status {
    let wanted = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
    if unsafe { &*module.cast::<String>() } != &wanted {
        return 500;
    }
    unsafe { *function = module };
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(_: Handle, attribute: c_int, value: c_int) -> Status {
    log(format!("attribute {attribute} = {value}"));
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const Config,
    function: Handle,
    params: *const *const u64,
    _: *mut *mut c_void,
) -> Status {
    let config = unsafe { &*config };
    let (mut cluster, mut dependent, mut together) = (1, "", "");
    for i in 0..config.attribute_count as usize {
        match unsafe { *config.attributes.add(i) } {
            [4, _, blocks, 1, 1, ..] => cluster = blocks,
            [6, _, 1, ..] => dependent = ", dependent",
            [2, _, 1, ..] => together = ", together",
            other => panic!("attribute {other:?}"),
        }
    }
    let how = format!("{} bytes, cluster {cluster}{dependent}{together}", config.shared_bytes);
    unsafe { enqueue(function, config.grid, config.block[0], &how, params) };
    0
}

/// Executes a launch, or notes it for the graph that is being captured.
pub unsafe fn enqueue(function: Handle, grid: [c_uint; 3], threads: c_uint, how: &str, params: *const *const u64) {
    let name = unsafe { &*function.cast::<String>() };
    let [x, y, z] = grid;
    let line = format!("launch {name} {x}x{y}x{z} of {threads}, {how}");
    let params = unsafe { [**params, **params.add(1)] };
    let launch = Launch { name: name.clone(), grid, line, params };
    let mut state = STATE.lock().unwrap();
    match &mut state.capture {
        Some(captured) => captured.push(launch),
        None => {
            drop(state);
            execute(&launch);
        }
    }
}

fn execute(launch: &Launch) {
    log(launch.line.clone());
    let by_value = launch.name == "tally";
    if launch.name != "count" && !by_value {
        return;
    }
    let out = at(launch.params[0]).cast::<u32>();
    let tokens =
        if by_value { launch.params[1] as u32 } else { unsafe { at(launch.params[1]).cast::<u32>().read() } };
    for block in 0..launch.grid[0].min(tokens) as usize {
        unsafe { *out.add(block) += 1 };
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u64; 16],
    element: c_uint,
    rank: c_uint,
    address: *mut c_void,
    dims: *const u64,
    strides: *const u64,
    tile: *const c_uint,
    _: *const c_uint,
    interleave: c_uint,
    swizzle: c_uint,
    promotion: c_uint,
    fill: c_uint,
) -> Status {
    let rank = rank as usize;
    assert!(map.addr().is_multiple_of(64));
    let dims = unsafe { std::slice::from_raw_parts(dims, rank) };
    let strides = unsafe { std::slice::from_raw_parts(strides, rank - 1) };
    let tile = unsafe { std::slice::from_raw_parts(tile, rank) };
    log(format!("map {element} {dims:?} {strides:?} {tile:?} {interleave} {swizzle} {promotion} {fill}"));
    unsafe { *map = [address.expose_provenance() as u64; 16] };
    0
}
