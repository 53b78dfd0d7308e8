//! GPUs as a device: kernels of the artifact as functions of the vendor's driver, which is loaded when a GPU is first wanted.
//!
//! ```text
//! driver    the driver's functions, by dlopen         code    kernels: machine code, or PTX that the driver compiles
//! cuda, hip what each vendor's does in its own way    bind    parameters, tensor maps, grids, checked once
//! context   a GPU, what it has and is                 graph   launches, captured and kept
//! memory    device and pinned memory, streams         functions  kernels of a library, for callers
//! upload    weights on their way
//! ```
//!
//! Everything a device does goes in one queue, so nothing waits but the host, once a step: when it reads a result. Symbols lie in
//! device memory, so one captured graph serves every step whose grids it covers.
//!
//! HIP has not met hardware: its part runs against a stand-in, as all of this does in our tests.

mod bind;
mod code;
mod context;
mod cuda;
mod driver;
mod functions;
mod graph;
mod hip;
mod memory;
#[cfg(test)]
mod tests;
mod upload;

use crate::device::{Bound, BoundLaunch, Buffer, Code, Device, LaunchTimes, Vendor};
use crate::error::DeviceError;
use crate::limits::Limits;
use crate::weights::Weights;
use bind::{Program, Ready};
use code::Kernels;
use context::Context;
use driver::{Address, Spec};
use dsc_ir::artifact::Header;
use dsc_ir::{Sym, SymValues};
pub(crate) use functions::GpuFunctions;
use graph::{Graph, Graphs};
use memory::{DeviceMemory, Event, Pinned, Scratch, Stream};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use upload::DeviceWeights;

/// Bytes of the pinned memory that step inputs go through.
const INBOX_BYTES: usize = 4 << 20;
/// Bytes of the pinned memory that results come through.
const OUTBOX_BYTES: usize = 8 << 20;
/// Distance of copies in pinned memory: a cache line.
const COPY_ALIGN: usize = 64;
/// Launches of a graph that is made to time them.
const MAX_TIMED_LAUNCHES: usize = 4096;

/// A GPU with code and weights on it, which any number of devices share.
#[derive(Clone)]
pub(crate) struct Loaded {
    context: Arc<Context>,
    kernels: Option<Arc<Kernels>>,
    weights: Option<Arc<DeviceWeights>>,
}

enum Memory {
    Own(DeviceMemory),
    /// A weight, by number.
    Weight(usize),
}

/// An NVIDIA or AMD GPU.
pub struct GpuDevice {
    /// First, so that it goes first: that waits for all work on what follows.
    stream: Stream,
    graphs: Graphs,
    loaded: Loaded,
    /// Threads that make weights.
    threads: usize,
    buffers: Vec<Memory>,
    bound: Vec<Program>,
    /// The symbols in device memory, and what they are now.
    symbols: DeviceMemory,
    current: Option<SymValues>,
    /// Memory for blocks of kernels that want such: launches follow one another, so all share it. What was made first stays, for its
    /// bindings.
    scratch: Vec<Scratch>,
    /// What uploads go through, and how much of it copies under way may still read.
    inbox: Pinned,
    inbox_used: usize,
    outbox: Pinned,
}

impl GpuDevice {
    /// The vendor's GPU `ordinal` as the driver counts; `threads` threads (0: one a core) make weights for it. The driver is the
    /// system's, or the library that the environment variable `DSC_CUDA_DRIVER` or `DSC_HIP_LIBRARY` names.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::DriverOld`], [`DeviceError::NoGpu`], [`DeviceError::Memory`],
    /// [`DeviceError::Driver`].
    pub fn open(vendor: Vendor, ordinal: u32, threads: usize) -> Result<GpuDevice, DeviceError> {
        GpuDevice::open_with(vendor, &Spec::of(vendor).path(), ordinal, threads)
    }

    /// As [`GpuDevice::open`] with the driver library at `driver`.
    ///
    /// # Errors
    /// As [`GpuDevice::open`].
    pub fn open_with(vendor: Vendor, driver: &Path, ordinal: u32, threads: usize) -> Result<GpuDevice, DeviceError> {
        let context = Context::open(Spec::of(vendor), driver, ordinal)?;
        GpuDevice::sharing(Loaded { context, kernels: None, weights: None }, threads)
    }

    /// Another device on the same GPU, with the same code and weights: buffers `0..` are the weights.
    pub(crate) fn sharing(loaded: Loaded, threads: usize) -> Result<GpuDevice, DeviceError> {
        let context = &loaded.context;
        let weights = loaded.weights.as_ref().map_or(0, |w| w.len());
        Ok(GpuDevice {
            stream: Stream::new(context)?,
            threads: match threads {
                0 => std::thread::available_parallelism().map_or(1, usize::from),
                n => n,
            },
            graphs: Graphs::default(),
            buffers: (0..weights).map(Memory::Weight).collect(),
            bound: Vec::new(),
            symbols: DeviceMemory::new(context, 4 * Sym::ALL.len() as u64, "symbols")?,
            current: None,
            scratch: Vec::new(),
            inbox: Pinned::new(context, INBOX_BYTES)?,
            inbox_used: 0,
            outbox: Pinned::new(context, OUTBOX_BYTES)?,
            loaded,
        })
    }

    /// What [`GpuDevice::sharing`] shares.
    pub(crate) fn loaded(&self) -> Loaded {
        self.loaded.clone()
    }

    /// Refuses what does not fit in the memory that is free now.
    ///
    /// # Errors
    /// [`DeviceError::Memory`] with what is free; [`DeviceError::Driver`].
    pub(crate) fn check_room(&self, weights: &Weights, others: u64) -> Result<(), DeviceError> {
        let bytes = upload::device_bytes(weights).saturating_add(others);
        let context = &self.loaded.context;
        if bytes > context.memory()?.0 {
            return Err(context.too_little(bytes, "weights, caches and intermediate results"));
        }
        Ok(())
    }

    /// Address and size of a buffer.
    fn place(&self, buffer: Buffer) -> Option<(Address, u64)> {
        match self.buffers.get(buffer.0)? {
            Memory::Own(memory) => Some((memory.address(), memory.bytes())),
            Memory::Weight(index) => self.loaded.weights.as_ref()?.place(*index),
        }
    }

    /// Puts a copy of `bytes` to `to` in the queue.
    fn enqueue_upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        for (i, part) in bytes.chunks(self.inbox.len()).enumerate() {
            if self.inbox_used + part.len() > self.inbox.len() {
                self.stream.wait()?;
                self.inbox_used = 0;
            }
            let at = self.inbox_used;
            self.inbox.as_mut()[at..at + part.len()].copy_from_slice(part);
            let to = to + (i * self.inbox.len()) as u64;
            // SAFETY: the caller says that `to` has `bytes`. What is used of the inbox is written again only after a wait.
            unsafe { self.stream.upload(to, &self.inbox, at, part.len())? };
            self.inbox_used = (at + part.len()).next_multiple_of(COPY_ALIGN);
        }
        Ok(())
    }

    /// Waits for the queue.
    fn finish(&mut self) -> Result<(), DeviceError> {
        self.stream.wait()?;
        self.inbox_used = 0;
        Ok(())
    }

    /// Makes the memory that blocks of these launches want to themselves.
    fn make_scratch(&mut self, launches: &[BoundLaunch]) -> Result<(), DeviceError> {
        let context = &self.loaded.context;
        let kernels = self.loaded.kernels.as_ref().map_or(&[][..], |k| &k.kernels);
        let wanted = launches.iter().filter_map(|l| kernels.get(l.kernel as usize));
        let wanted = wanted.map(|k| k.scratch_bytes(context.multiprocessors)).max().unwrap_or(0);
        if self.scratch.iter().all(|m| m.bytes() < wanted) && wanted > 0 {
            self.scratch.push(Scratch::new(context, wanted)?);
        }
        Ok(())
    }

    /// Checks a call of `run` and puts its symbols in device memory.
    fn prepare(&mut self, bound: Bound, launches: &Range<usize>, syms: &SymValues) -> Result<(), DeviceError> {
        let misuse = |what: &str| Err(DeviceError::Misuse(what.to_string()));
        let Some(program) = self.bound.get(bound.0) else { return misuse("nothing is bound under this number") };
        if Sym::ALL.iter().any(|&s| syms.get(s) > program.limits.get(s)) || syms.0.iter().any(|&n| n > i32::MAX as u32)
        {
            return misuse("symbols beyond the limits of the binding");
        }
        if program.launches.get(launches.clone()).is_none() {
            return misuse("launches out of range");
        }
        self.loaded.context.enter()?;
        if self.current != Some(*syms) {
            let bytes: Vec<u8> = syms.0.iter().flat_map(|n| n.to_le_bytes()).collect();
            self.current = None;
            self.enqueue_upload(self.symbols.address(), &bytes)?;
            self.current = Some(*syms);
        }
        Ok(())
    }

    /// The code, and a binding that [`GpuDevice::prepare`] has checked.
    fn program(&self, bound: Bound) -> Result<(&Arc<Kernels>, &Program), DeviceError> {
        let kernels = self.loaded.kernels.as_ref().ok_or_else(|| DeviceError::Misuse("no code is loaded".into()))?;
        Ok((kernels, &self.bound[bound.0]))
    }

    /// Runs launches one by one, with a mark between each two.
    fn run_timed(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        times: &mut LaunchTimes,
    ) -> Result<(), DeviceError> {
        let context = &self.loaded.context;
        let marks = (0..=launches.len()).map(|_| Event::new(context, true)).collect::<Result<Vec<_>, _>>()?;
        let (kernels, program) = self.program(bound)?;
        marks[0].record(&self.stream)?;
        for (ready, mark) in program.launches[launches.clone()].iter().zip(&marks[1..]) {
            graph::launch(&self.stream, &kernels.kernels[ready.kernel], ready, syms)?;
            mark.record(&self.stream)?;
        }
        self.stream.wait()?;
        for ((i, ready), marks) in launches.clone().zip(&program.launches[launches]).zip(marks.windows(2)) {
            let blocks = kernels.kernels[ready.kernel].entry.blocks(syms).unwrap_or(0);
            times.add(i, blocks, marks[1].since(&marks[0])?);
        }
        self.finish()
    }

    /// Binds one launch: the addresses of its arguments, checked, and its tensor maps.
    fn ready(&self, launch: &BoundLaunch, limits: &SymValues) -> Result<Ready, String> {
        let index = launch.kernel as usize;
        let kernels = self.loaded.kernels.as_ref().ok_or("no code is loaded")?;
        let kernel = kernels.kernels.get(index).ok_or_else(|| format!("there is no kernel {index}"))?;
        let params = &kernel.entry.params;
        if params.len() != launch.args.len() {
            return Err(format!("{} arguments do not fit {}", launch.args.len(), kernel.entry.name));
        }
        if kernel.entry.schedule.symbols_by_value {
            return Err(format!("{} takes symbols by value, as kernels of a library do", kernel.entry.name));
        }
        bind::check_grid(&kernel.entry, &kernel.gpu, self.loaded.context.driver.spec.most_blocks, limits)?;
        let mut addresses = Vec::with_capacity(params.len() + 1);
        for (param, &(buffer, at)) in params.iter().zip(&launch.args) {
            let none = || format!("parameter {}: no buffer {}", param.name, buffer.0);
            let (address, bytes) = self.place(buffer).ok_or_else(none)?;
            param.check_binding(at, bytes, limits)?;
            if param.write && matches!(self.buffers[buffer.0], Memory::Weight(_)) {
                return Err(format!("parameter {} writes a weight", param.name));
            }
            // The offset may point past a buffer only if the view is empty, and then nothing is read there.
            addresses.push(address.wrapping_add(at));
        }
        let maps = kernel.gpu.maps.iter().map(|map| {
            let param = map.param as usize;
            let fault = || format!("a tensor map of parameter {param}, of {}", params.len());
            let (entry, address) = params.get(param).zip(addresses.get(param)).ok_or_else(fault)?;
            bind::encode_map(&self.loaded.context, map, entry, *address, (limits, false))
        });
        let maps = maps.collect::<Result<_, String>>()?;
        let scratch = match kernel.scratch_bytes(self.stream.context.multiprocessors) {
            0 => None,
            bytes => {
                let memory = self.scratch.iter().find(|m| m.bytes() >= bytes);
                Some(memory.ok_or("its blocks have no memory of their own")?.address())
            }
        };
        Ok(Ready::new(index, addresses, self.symbols.address(), scratch, maps))
    }
}

impl Device for GpuDevice {
    fn describe(&self) -> String {
        self.loaded.context.describe()
    }

    fn load_code(&mut self, header: &Header, code: Code<'_>) -> Result<(), DeviceError> {
        if self.loaded.kernels.is_some() {
            return Err(DeviceError::Misuse("code is loaded twice".into()));
        }
        self.loaded.kernels = Some(Arc::new(Kernels::load(&self.loaded.context, header, code)?));
        Ok(())
    }

    fn load_weights(
        &mut self,
        weights: &Arc<Weights>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Buffer>, DeviceError> {
        if self.loaded.weights.is_some() {
            return Err(DeviceError::Misuse("weights are loaded twice".into()));
        }
        let loaded = DeviceWeights::upload(&self.loaded.context, weights, self.threads, progress)?;
        let first = self.buffers.len();
        self.buffers.extend((0..loaded.len()).map(Memory::Weight));
        self.loaded.weights = Some(Arc::new(loaded));
        Ok((first..self.buffers.len()).map(Buffer).collect())
    }

    fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError> {
        let memory = DeviceMemory::new(&self.loaded.context, bytes, what)?;
        self.stream.clear(&memory)?;
        self.buffers.push(Memory::Own(memory));
        Ok(Buffer(self.buffers.len() - 1))
    }

    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let to = match self.buffers.get(buffer.0) {
            Some(Memory::Own(memory)) => memory.range(at, bytes.len()),
            _ => None,
        };
        let misuse = || DeviceError::Misuse(format!("upload of {} bytes at {at} of buffer {}", bytes.len(), buffer.0));
        let to = to.ok_or_else(misuse)?;
        self.loaded.context.enter()?;
        self.enqueue_upload(to, bytes)
    }

    fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let misuse = || DeviceError::Misuse(format!("reading {} bytes at {at} of buffer {}", bytes.len(), buffer.0));
        let (address, size) = self.place(buffer).ok_or_else(misuse)?;
        if at.checked_add(bytes.len() as u64).is_none_or(|end| end > size) {
            return Err(misuse());
        }
        self.loaded.context.enter()?;
        if bytes.is_empty() {
            return self.finish();
        }
        let mut from = address + at;
        for part in bytes.chunks_mut(self.outbox.len()) {
            // SAFETY: the source is inside the buffer; the outbox is read after the wait only.
            unsafe { self.stream.download(&mut self.outbox, from, part.len())? };
            self.stream.wait()?;
            part.copy_from_slice(&self.outbox.as_mut()[..part.len()]);
            from += part.len() as u64;
        }
        self.inbox_used = 0;
        Ok(())
    }

    fn copy(&mut self, buffer: Buffer, from: u64, to: u64, bytes: u64) -> Result<(), DeviceError> {
        let misuse =
            || DeviceError::Misuse(format!("a copy of {bytes} bytes from {from} to {to} of buffer {}", buffer.0));
        let Some(Memory::Own(memory)) = self.buffers.get(buffer.0) else { return Err(misuse()) };
        let size = usize::try_from(bytes).ok().filter(|_| from.abs_diff(to) >= bytes).ok_or_else(misuse)?;
        let (from, to) = memory.range(from, size).zip(memory.range(to, size)).ok_or_else(misuse)?;
        self.loaded.context.enter()?;
        // SAFETY: both ranges are inside a buffer of ours, and do not overlap.
        unsafe { self.stream.copy(to, from, size) }
    }

    fn bind(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        self.loaded.context.enter()?;
        self.make_scratch(launches)?;
        let mut ready = Vec::with_capacity(launches.len());
        for (i, launch) in launches.iter().enumerate() {
            let fault = |what| DeviceError::Binding { launch: i, node: launch.node.clone(), what };
            ready.push(self.ready(launch, limits).map_err(fault)?);
        }
        let kernels = self.loaded.kernels.as_ref().map_or(&[][..], |k| &k.kernels);
        self.bound.push(Program::new(*limits, ready, kernels));
        Ok(Bound(self.bound.len() - 1))
    }

    fn bind_part(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        let bound = self.bind(launches, limits)?;
        self.bound[bound.0].kept = false;
        Ok(bound)
    }

    fn run(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        times: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError> {
        self.prepare(bound, &launches, syms)?;
        if let Some(times) = times {
            return self.run_timed(bound, launches, syms, times);
        }
        let kernels = self.loaded.kernels.as_ref().ok_or_else(|| DeviceError::Misuse("no code is loaded".into()))?;
        let program = (bound.0, &self.bound[bound.0]);
        self.graphs.run(&self.stream, kernels, program, launches, syms)
    }

    fn memory_used(&mut self) -> Option<u64> {
        let context = &self.loaded.context;
        Some(context.free_at_open.saturating_sub(context.memory().ok()?.0))
    }

    fn limits(&mut self, _: u64) -> Option<Limits> {
        Limits::of_gpu(&self.loaded.context.name)
    }

    fn time(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        repeat: u32,
    ) -> Result<Duration, DeviceError> {
        self.prepare(bound, &launches, syms)?;
        let most = (MAX_TIMED_LAUNCHES / launches.len().max(1)).max(1);
        let inner = (repeat as usize).clamp(1, most);
        let outer = (repeat as usize).div_ceil(inner).max(1);
        let marks = [Event::new(&self.loaded.context, true)?, Event::new(&self.loaded.context, true)?];
        let (kernels, program) = self.program(bound)?;
        let ready = &program.launches[launches];
        // Functions are loaded when they are first launched, and the first run of a graph sets it up.
        ready.iter().try_for_each(|l| graph::launch(&self.stream, &kernels.kernels[l.kernel], l, syms))?;
        let graph = Graph::capture(&self.stream, kernels, ready, syms, inner)?;
        graph.launch(&self.stream)?;
        self.stream.wait()?;
        marks[0].record(&self.stream)?;
        for _ in 0..outer {
            graph.launch(&self.stream)?;
        }
        marks[1].record(&self.stream)?;
        self.stream.wait()?;
        let runs = (inner * outer) as f64;
        Ok(Duration::from_secs_f64(marks[1].since(&marks[0])?.as_secs_f64() / runs))
    }
}
