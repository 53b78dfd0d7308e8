//! The CPU as a device: native code of the artifact, run by a pool of threads.
//!
//! A kernel is an `extern "C"` function that runs a range of its grid's blocks; blocks are independent, so any number of
//! threads gives the same bits.

use crate::cpu_limits;
use crate::device::{Bound, BoundLaunch, Buffer, Code, Device, LaunchTimes};
use crate::error::DeviceError;
use crate::limits::Limits;
use crate::pool::Pool;
use crate::weights::Weights;
use dsc_ir::artifact::{Header, KernelEntry};
use dsc_ir::{Sym, SymValues};
use memmap2::{Mmap, MmapMut};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// A kernel's code: base address of each parameter, the six symbols, the worker's scratch memory (64-aligned), and the first
/// and past-the-end of the blocks to run (axis 0 of the grid fastest).
type Entry = unsafe extern "C" fn(*const *mut u8, *const i32, *mut u8, u64, u64);

/// Distance between workers' scratch memory: two cache lines beyond the kernels' need keep neighbours apart.
const SCRATCH_ALIGN: usize = 4096;
/// Tasks a thread should find, so that late threads are made up for.
const TASKS_PER_WORKER: u64 = 4;

/// The CPU of this machine.
pub struct CpuDevice {
    pool: Pool,
    code: Option<Mmap>,
    kernels: Vec<Kernel>,
    scratch: Option<MmapMut>,
    scratch_stride: usize,
    buffers: Vec<Memory>,
    bound: Vec<Program>,
}

struct Kernel {
    entry: KernelEntry,
    call: Entry,
}

enum Memory {
    Own(MmapMut),
    Weight(Arc<Weights>, usize),
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Own(map) => map,
            Memory::Weight(weights, index) => weights.bytes(*index),
        }
    }
}

/// Launches with their addresses.
struct Program {
    limits: SymValues,
    launches: Vec<Ready>,
}

struct Ready {
    kernel: usize,
    /// Base addresses, which stay valid as long as the device: buffers are never freed or moved.
    args: Vec<*mut u8>,
}

// SAFETY: the raw pointers in `bound` and `kernels` point to memory that the device owns (buffers, code) or keeps alive
// (weights); they are used through `&mut self` only, by `run`, whose threads end their use before it returns.
unsafe impl Send for CpuDevice {}

/// What the threads of a launch share.
struct Call<'a> {
    entry: Entry,
    args: &'a [*mut u8],
    syms: [i32; 6],
    scratch: *mut u8,
    scratch_stride: usize,
    blocks: u64,
    blocks_per_task: u64,
}

// SAFETY: threads read the struct only; what the kernel does with the pointers is bounded by `bind` (views stay in their
// buffers), and blocks of a launch write disjoint places by the rules of tile programs. Each worker has scratch of its own.
unsafe impl Sync for Call<'_> {}

impl Call<'_> {
    fn task(&self, worker: usize, task: u64) {
        let first = task * self.blocks_per_task;
        let last = (first + self.blocks_per_task).min(self.blocks);
        // SAFETY: `entry` is code that the artifact's compiler made for this signature, on a processor that has its features
        // (`load_code`). Every parameter's view stays inside its buffer for symbols within the limits (`bind`, `run`), the
        // kernel masks accesses by its views, and scratch is `scratch_stride` bytes for each worker of the pool.
        unsafe {
            let scratch = self.scratch.add(worker * self.scratch_stride);
            (self.entry)(self.args.as_ptr(), self.syms.as_ptr(), scratch, first, last);
        }
    }
}

impl CpuDevice {
    /// The CPU with `threads` threads; 0 is one for each that the system grants this process.
    ///
    /// # Errors
    /// [`DeviceError::Thread`].
    pub fn new(threads: usize) -> Result<CpuDevice, DeviceError> {
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        Ok(CpuDevice {
            pool: Pool::new(threads)?,
            code: None,
            kernels: Vec::new(),
            scratch: None,
            scratch_stride: 0,
            buffers: Vec::new(),
            bound: Vec::new(),
        })
    }

    /// Runs a kernel on memory of the caller, whose addresses are `args`.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] if there is no such kernel, or its parameters are not as many.
    ///
    /// # Safety
    /// What the kernel's views at these symbols span from the addresses is memory, and what it writes is nobody else's meanwhile.
    pub(crate) unsafe fn launch(
        &mut self,
        kernel: usize,
        args: &[*mut u8],
        syms: &SymValues,
    ) -> Result<(), DeviceError> {
        let misuse = |what: &str| DeviceError::Misuse(what.to_string());
        let scratch = self.scratch.as_mut().ok_or_else(|| misuse("no code is loaded"))?.as_mut_ptr();
        let kernel = self.kernels.get(kernel).filter(|k| k.entry.params.len() == args.len());
        let kernel = kernel.ok_or_else(|| misuse("no kernel with such parameters"))?;
        start_blocks(&mut self.pool, kernel, args, syms, (scratch, self.scratch_stride));
        Ok(())
    }

    fn own(&mut self, bytes: u64, what: &'static str) -> Result<MmapMut, DeviceError> {
        let memory = |reason: String| DeviceError::Memory { what, bytes, reason };
        let size = usize::try_from(bytes).map_err(|e| memory(e.to_string()))?;
        MmapMut::map_anon(size.max(1)).map_err(|e| memory(e.to_string()))
    }

    /// The address of an argument, once its view is known to stay in its buffer.
    fn address(
        &mut self,
        param: &dsc_ir::artifact::ParamEntry,
        arg: (Buffer, u64),
        limits: &SymValues,
    ) -> Result<*mut u8, String> {
        let (Buffer(index), at) = arg;
        let memory =
            self.buffers.get_mut(index).ok_or_else(|| format!("parameter {}: no buffer {index}", param.name))?;
        param.check_binding(at, memory.bytes().len() as u64, limits)?;
        let base = match memory {
            Memory::Own(map) => map.as_mut_ptr(),
            Memory::Weight(..) if param.write => return Err(format!("parameter {} writes a weight", param.name)),
            Memory::Weight(weights, index) => weights.bytes(*index).as_ptr().cast_mut(),
        };
        // The offset may point past a buffer only if the view is empty, and then nothing is read there.
        Ok(base.wrapping_add(at as usize))
    }
}

/// What this processor lacks of `features`, by the names of /proc/cpuinfo (or Cranelift's, with `has_` in front).
fn missing_features(features: &[String]) -> Vec<String> {
    features.iter().filter(|f| !has_feature(f.strip_prefix("has_").unwrap_or(f))).cloned().collect()
}

#[cfg(target_arch = "x86_64")]
fn has_feature(name: &str) -> bool {
    use std::is_x86_feature_detected as has;
    match name {
        "x86_64" | "x86-64" | "sse" | "sse2" => true,
        "sse3" | "pni" => has!("sse3"),
        "ssse3" => has!("ssse3"),
        "sse41" | "sse4_1" | "sse4.1" => has!("sse4.1"),
        "sse42" | "sse4_2" | "sse4.2" => has!("sse4.2"),
        "popcnt" => has!("popcnt"),
        "lzcnt" | "abm" => has!("lzcnt"),
        "bmi1" => has!("bmi1"),
        "bmi2" => has!("bmi2"),
        "f16c" => has!("f16c"),
        "fma" => has!("fma"),
        "avx" => has!("avx"),
        "avx2" => has!("avx2"),
        "avx_vnni" | "avxvnni" => has!("avxvnni"),
        "avx512f" => has!("avx512f"),
        "avx512bw" => has!("avx512bw"),
        "avx512cd" => has!("avx512cd"),
        "avx512dq" => has!("avx512dq"),
        "avx512vl" => has!("avx512vl"),
        "avx512vbmi" => has!("avx512vbmi"),
        "avx512_vbmi2" | "avx512vbmi2" => has!("avx512vbmi2"),
        "avx512_vnni" | "avx512vnni" => has!("avx512vnni"),
        "avx512_bitalg" | "avx512bitalg" => has!("avx512bitalg"),
        "avx512_bf16" | "avx512bf16" => has!("avx512bf16"),
        "avx512_fp16" | "avx512fp16" => has!("avx512fp16"),
        _ => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn has_feature(name: &str) -> bool {
    use std::arch::is_aarch64_feature_detected as has;
    match name {
        "aarch64" | "arm64" => true,
        "asimd" | "neon" => has!("neon"),
        "fphp" | "asimdhp" | "fp16" => has!("fp16"),
        "bf16" => has!("bf16"),
        "asimddp" | "dotprod" => has!("dotprod"),
        "i8mm" => has!("i8mm"),
        "lse" | "atomics" => has!("lse"),
        _ => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_feature(_: &str) -> bool {
    false
}

/// Maps code readable and executable; at no time it is writable and executable.
fn map_code(code: &[u8]) -> Result<Mmap, DeviceError> {
    let refused = |e: std::io::Error| DeviceError::Code(e.to_string());
    let mut map = MmapMut::map_anon(code.len().max(1)).map_err(refused)?;
    map[..code.len()].copy_from_slice(code);
    let map = map.make_exec().map_err(refused)?;
    #[cfg(target_arch = "aarch64")]
    {
        unsafe extern "C" {
            fn __clear_cache(start: *mut libc::c_char, end: *mut libc::c_char);
        }
        let range = map.as_ptr_range();
        // SAFETY: the range is the mapping just made; the call only makes instruction fetches see its bytes.
        unsafe { __clear_cache(range.start.cast_mut().cast(), range.end.cast_mut().cast()) };
    }
    Ok(map)
}

impl Device for CpuDevice {
    fn describe(&self) -> String {
        format!("cpu ({}), {} threads", std::env::consts::ARCH, self.pool.workers())
    }

    fn load_code(&mut self, header: &Header, code: Code<'_>) -> Result<(), DeviceError> {
        let code = code.native;
        if header.target != "cpu" {
            return Err(DeviceError::Target { target: header.target.clone(), available: "cpu".into() });
        }
        let missing = missing_features(&header.features);
        if !missing.is_empty() {
            return Err(DeviceError::Features { missing });
        }
        if !self.kernels.is_empty() {
            return Err(DeviceError::Misuse("code is loaded twice".into()));
        }
        let map = map_code(code)?;
        for k in &header.kernels {
            if k.entry.checked_add(k.code_bytes).is_none_or(|end| end > code.len() as u64) {
                return Err(DeviceError::Misuse(format!("kernel {} is outside the code", k.name)));
            }
            // SAFETY: the address is inside the mapping, which the device keeps as long as its kernels. That a function of
            // this signature starts there is the artifact's word, guarded by its hash.
            let call = unsafe { std::mem::transmute::<*const u8, Entry>(map.as_ptr().add(k.entry as usize)) };
            self.kernels.push(Kernel { entry: k.clone(), call });
        }
        let scratch = header.kernels.iter().map(|k| k.scratch_bytes).max().unwrap_or(0) as usize;
        self.scratch_stride = (scratch + 128).next_multiple_of(SCRATCH_ALIGN);
        let total = self.scratch_stride.checked_mul(self.pool.workers());
        self.scratch = Some(self.own(total.map_or(u64::MAX, |n| n as u64), "scratch memory")?);
        self.code = Some(map);
        Ok(())
    }

    fn load_weights(
        &mut self,
        weights: &Arc<Weights>,
        _: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Buffer>, DeviceError> {
        if !weights.is_made() {
            return Err(DeviceError::Misuse("the weights are not in host memory".into()));
        }
        let first = self.buffers.len();
        self.buffers.extend((0..weights.len()).map(|i| Memory::Weight(Arc::clone(weights), i)));
        Ok((first..self.buffers.len()).map(Buffer).collect())
    }

    fn limits(&mut self, working_set: u64) -> Option<Limits> {
        Some(cpu_limits::measure(&mut self.pool, working_set))
    }

    fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError> {
        let map = self.own(bytes, what)?;
        self.buffers.push(Memory::Own(map));
        Ok(Buffer(self.buffers.len() - 1))
    }

    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let misuse = || DeviceError::Misuse(format!("upload of {} bytes at {at} of buffer {}", bytes.len(), buffer.0));
        let Some(Memory::Own(map)) = self.buffers.get_mut(buffer.0) else { return Err(misuse()) };
        let end = (at as usize).saturating_add(bytes.len());
        map.get_mut(at as usize..end).ok_or_else(misuse)?.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let misuse = || DeviceError::Misuse(format!("reading {} bytes at {at} of buffer {}", bytes.len(), buffer.0));
        let end = (at as usize).saturating_add(bytes.len());
        let source = self.buffers.get(buffer.0).and_then(|m| m.bytes().get(at as usize..end));
        bytes.copy_from_slice(source.ok_or_else(misuse)?);
        Ok(())
    }

    fn bind(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        let mut ready = Vec::with_capacity(launches.len());
        for (i, launch) in launches.iter().enumerate() {
            let fault = |what: String| DeviceError::Binding { launch: i, node: launch.node.clone(), what };
            let index = launch.kernel as usize;
            let kernel = self.kernels.get(index).ok_or_else(|| fault(format!("there is no kernel {index}")))?;
            let params = kernel.entry.params.clone();
            if params.len() != launch.args.len() || kernel.entry.blocks(limits).is_none() {
                return Err(fault(format!(
                    "{} arguments, or a grid, do not fit {}",
                    launch.args.len(),
                    kernel.entry.name
                )));
            }
            let args = params.iter().zip(&launch.args).map(|(p, &arg)| self.address(p, arg, limits));
            ready.push(Ready { kernel: index, args: args.collect::<Result<_, _>>().map_err(fault)? });
        }
        self.bound.push(Program { limits: *limits, launches: ready });
        Ok(Bound(self.bound.len() - 1))
    }

    fn run(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        mut times: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError> {
        let misuse = |what: &str| DeviceError::Misuse(what.to_string());
        let program = self.bound.get(bound.0).ok_or_else(|| misuse("nothing is bound under this number"))?;
        if Sym::ALL.iter().any(|&s| syms.get(s) > program.limits.get(s)) || syms.0.iter().any(|&n| n > i32::MAX as u32)
        {
            return Err(misuse("symbols beyond the limits of the binding"));
        }
        let first = launches.start;
        let ready = program.launches.get(launches).ok_or_else(|| misuse("launches out of range"))?;
        let scratch = self.scratch.as_mut().ok_or_else(|| misuse("no code is loaded"))?.as_mut_ptr();
        for (i, launch) in ready.iter().enumerate() {
            let start = times.is_some().then(Instant::now);
            let kernel = &self.kernels[launch.kernel];
            let blocks = start_blocks(&mut self.pool, kernel, &launch.args, syms, (scratch, self.scratch_stride));
            if let (Some(times), Some(start)) = (&mut times, start) {
                times.add(first + i, blocks, start.elapsed());
            }
        }
        Ok(())
    }
}

/// Runs every block of a kernel; returns how many there are.
fn start_blocks(
    pool: &mut Pool,
    kernel: &Kernel,
    args: &[*mut u8],
    syms: &SymValues,
    (scratch, scratch_stride): (*mut u8, usize),
) -> u64 {
    let entry = &kernel.entry;
    let blocks = entry.blocks(syms).unwrap_or(0);
    let blocks_per_task = match entry.schedule.blocks_per_task {
        0 => (blocks / (TASKS_PER_WORKER * pool.workers() as u64)).max(1),
        n => u64::from(n),
    };
    let syms = syms.0.map(|n| n as i32);
    let call = Call { entry: kernel.call, args, syms, scratch, scratch_stride, blocks, blocks_per_task };
    pool.run(blocks.div_ceil(blocks_per_task), &|worker, task| call.task(worker, task));
    blocks
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::Checkpoint;
    use crate::testing::{COUNT_KERNEL, header, write_checkpoint};

    fn device(threads: usize, limits: &SymValues) -> (CpuDevice, Buffer, Result<Bound, DeviceError>) {
        let mut device = CpuDevice::new(threads).unwrap();
        device.load_code(&header(), Code::native(COUNT_KERNEL)).unwrap();
        let arena = device.alloc(4 * 1000, "test").unwrap();
        let launch = |at| BoundLaunch { kernel: 0, node: "count".into(), args: vec![(arena, at)] };
        let bound = device.bind(&[launch(0), launch(0), launch(4)], limits);
        (device, arena, bound)
    }

    #[test]
    fn launches_run_in_order_on_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let limits = SymValues([999, 1, 1, 1, 1, 1]);
            let (mut device, arena, bound) = device(threads, &limits);
            let bound = bound.unwrap();
            let mut times = LaunchTimes::default();
            for _ in 0..100 {
                device.run(bound, 0..2, &limits, None).unwrap();
                device.run(bound, 2..3, &limits.with(Sym::T, 10), Some(&mut times)).unwrap();
                device.run(bound, 0..3, &limits.with(Sym::T, 0), None).unwrap();
            }
            let mut bytes = vec![0; 4000];
            device.read(arena, 0, &mut bytes).unwrap();
            let counts: Vec<u32> =
                bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            for (i, count) in counts.iter().enumerate() {
                let expected = if i == 999 { 0 } else { 200 } + if (1..11).contains(&i) { 100 } else { 0 };
                assert_eq!(*count, expected, "{threads} threads, cell {i}");
            }
            assert_eq!((times.launches[2].runs, times.launches[2].blocks), (100, 1000));
        }
    }

    #[test]
    fn what_leaves_a_buffer_is_refused() {
        let (_, _, bound) = device(1, &SymValues([1000, 1, 1, 1, 1, 1]));
        let error = bound.unwrap_err().to_string();
        assert!(error.contains("launch 2 (count)") && error.contains("parameter out"), "{error}");
        let limits = SymValues([999, 1, 1, 1, 1, 1]);
        let (mut device, arena, bound) = device(1, &limits);
        assert!(device.run(bound.unwrap(), 0..1, &limits.with(Sym::T, 1000), None).is_err());
        assert!(device.run(Bound(7), 0..1, &limits, None).is_err());
        assert!(device.run(Bound(0), 0..4, &limits, None).is_err());
        assert!(device.upload(arena, 3999, &[0; 2]).is_err());
        assert!(device.upload(arena, u64::MAX, &[0; 2]).is_err());
        assert!(device.read(Buffer(9), 0, &mut [0; 2]).is_err());
        assert!(device.alloc(u64::MAX, "test").is_err());
        let dir = tempfile::tempdir().unwrap();
        write_checkpoint(dir.path());
        let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
        let weights = Arc::new(Weights::load(&header().weights, &checkpoint, 64, 1, &|_, _| {}).unwrap());
        let weight = device.load_weights(&weights, &|_, _| {}).unwrap()[0];
        let launch = BoundLaunch { kernel: 0, node: "count".into(), args: vec![(weight, 0)] };
        let error = device.bind(&[launch], &limits.with(Sym::T, 1)).unwrap_err().to_string();
        assert!(error.contains("writes a weight"), "{error}");
    }

    #[test]
    fn other_machines_are_named() {
        let error = |target: &str, features: &[&str]| {
            let mut header = header();
            header.target = target.into();
            header.features = features.iter().map(|f| f.to_string()).collect();
            CpuDevice::new(1).unwrap().load_code(&header, Code::native(COUNT_KERNEL)).map_err(|e| e.to_string())
        };
        assert!(error("sm_90a", &[]).unwrap_err().contains("target sm_90a"));
        assert!(error("cpu", &["sse2", "avx9000"]).unwrap_err().contains("lacks avx9000"));
        assert!(error("cpu", &["sse2", "has_sse3"]).is_ok());
    }

    /// Not a bound on any machine, only a guard against a launch that wakes threads or allocates.
    #[test]
    fn a_launch_of_one_task_is_cheap() {
        let limits = SymValues([1, 1, 1, 1, 1, 1]);
        let (mut device, _, bound) = device(2, &limits);
        let bound = bound.unwrap();
        let start = Instant::now();
        for _ in 0..10_000 {
            device.run(bound, 0..3, &limits, None).unwrap();
        }
        let each = start.elapsed() / 30_000;
        assert!(each < std::time::Duration::from_micros(20), "{each:?}");
    }
}
