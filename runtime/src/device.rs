//! What the executor asks of a device, be it the CPU or a GPU: buffers are opaque, weights are uploaded or referenced as the device
//! likes, and bound launches may become a captured graph.

use crate::cpu::CpuDevice;
use crate::error::DeviceError;
use crate::gpu::GpuDevice;
use crate::limits::Limits;
use crate::weights::Weights;
use dsc_ir::SymValues;
use dsc_ir::artifact::Header;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Memory of a device, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer(pub usize);

/// Launches bound by [`Device::bind`], by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bound(pub usize);

/// One launch and what its parameters are bound to.
#[derive(Clone, Debug)]
pub struct BoundLaunch {
    /// Index in [`Header::kernels`].
    pub kernel: u32,
    /// The graph node, for messages.
    pub node: String,
    /// For each parameter a buffer and a byte in it.
    pub args: Vec<(Buffer, u64)>,
}

/// Code of an artifact's kernels, which [`Header::kernels`] point into.
#[derive(Clone, Copy, Debug, Default)]
pub struct Code<'a> {
    /// Machine code: section `code`.
    pub native: &'a [u8],
    /// Portable assembly: section `asm`; empty where the target has none.
    pub portable: &'a [u8],
}

impl<'a> Code<'a> {
    /// Machine code alone.
    pub fn native(native: &'a [u8]) -> Code<'a> {
        Code { native, portable: &[] }
    }
}

/// Whose GPUs an artifact is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// NVIDIA: targets `sm_*`, on the CUDA driver.
    Nvidia,
    /// AMD: targets `gfx*`, on HIP.
    Amd,
}

impl Vendor {
    /// Whose a target's GPUs are; none if it has none.
    pub fn of(target: &str) -> Option<Vendor> {
        match target {
            t if t.starts_with("sm_") => Some(Vendor::Nvidia),
            t if t.starts_with("gfx") => Some(Vendor::Amd),
            _ => None,
        }
    }

    /// Its targets, as a pattern.
    pub fn targets(self) -> &'static str {
        match self {
            Vendor::Nvidia => "sm_*",
            Vendor::Amd => "gfx*",
        }
    }

    /// What drives its GPUs.
    pub(crate) fn driver(self) -> &'static str {
        match self {
            Vendor::Nvidia => "CUDA driver",
            Vendor::Amd => "HIP library",
        }
    }

    /// What the user installs for that.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Vendor::Nvidia => "the NVIDIA driver",
            Vendor::Amd => "ROCm",
        }
    }

    /// The environment variable that hides GPUs.
    pub(crate) fn hides(self) -> &'static str {
        match self {
            Vendor::Nvidia => "CUDA_VISIBLE_DEVICES does",
            Vendor::Amd => "HIP_VISIBLE_DEVICES and ROCR_VISIBLE_DEVICES do",
        }
    }
}

/// The device that runs artifacts for a target: the CPU with `threads` threads (0: one for each that the system grants), or for
/// `sm_*` and `gfx*` the GPU of number `ordinal`.
///
/// # Errors
/// What [`CpuDevice::new`] and [`GpuDevice::open`] say.
pub fn open(target: &str, threads: usize, ordinal: u32) -> Result<Box<dyn Device>, DeviceError> {
    Ok(match Vendor::of(target) {
        Some(vendor) => Box::new(GpuDevice::open(vendor, ordinal, threads)?),
        None => Box::new(CpuDevice::new(threads)?),
    })
}

/// A device with one artifact's code on it.
pub trait Device: Send {
    /// What it is, in a line: for logs and benches.
    fn describe(&self) -> String;

    /// Checks that the device can run the artifact, and loads its code. Called once, first.
    ///
    /// # Errors
    /// [`DeviceError::Target`], [`DeviceError::Features`], [`DeviceError::Code`], [`DeviceError::Memory`]; of a GPU also
    /// [`DeviceError::Architecture`], [`DeviceError::Assembly`], [`DeviceError::DriverOld`], [`DeviceError::Driver`].
    fn load_code(&mut self, header: &Header, code: Code<'_>) -> Result<(), DeviceError>;

    /// Makes weights readable by kernels; one buffer a weight. The CPU wants them [made](Weights::make); a device with memory of
    /// its own makes them there. `progress` is told the bytes loaded and of all.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], [`DeviceError::Driver`]; [`DeviceError::Misuse`] for weights that are not made.
    fn load_weights(
        &mut self,
        weights: &Arc<Weights>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Vec<Buffer>, DeviceError>;

    /// Memory of zeros; `what` is for the message.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError>;

    /// Copies `bytes` to byte `at` of a buffer: after runs that were asked for before, and before those that come.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] outside the buffer, or if it holds a weight.
    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Waits for everything asked for before, and copies from byte `at` of a buffer.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] outside the buffer; [`DeviceError::Driver`] if something before failed.
    fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies `bytes` bytes of a buffer from byte `from` to byte `to` of it; the two ranges do not overlap. In the order of
    /// [`upload`](Device::upload).
    ///
    /// # Errors
    /// As [`upload`](Device::upload); [`DeviceError::Misuse`] for ranges that overlap.
    fn copy(&mut self, buffer: Buffer, from: u64, to: u64, bytes: u64) -> Result<(), DeviceError> {
        if from.abs_diff(to) < bytes {
            return Err(DeviceError::Misuse(format!("a copy of {bytes} bytes from {from} to {to}, which overlap")));
        }
        let mut held = vec![0; bytes as usize];
        self.read(buffer, from, &mut held)?;
        self.upload(buffer, to, &held)
    }

    /// Prepares launches for every step whose symbols are at most `limits`.
    ///
    /// # Errors
    /// [`DeviceError::Binding`] if a view could leave its buffer at these limits, or writes a weight.
    fn bind(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError>;

    /// As [`bind`](Device::bind), of launches that are one of very many parts of a step: nothing is kept for when they run again.
    ///
    /// # Errors
    /// As [`bind`](Device::bind).
    fn bind_part(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
        self.bind(launches, limits)
    }

    /// Runs a range of bound launches, one after the other. It may return before they are done: [`read`](Device::read) waits. With
    /// `times` it waits, and adds the duration of each.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] if symbols are beyond the limits of [`bind`](Device::bind), or there is no such range;
    /// [`DeviceError::Driver`].
    fn run(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        times: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError>;

    /// How long one run of a range takes, once it has run before: the mean of `repeat` runs, one right after the other.
    ///
    /// # Errors
    /// As [`run`](Device::run).
    fn time(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        repeat: u32,
    ) -> Result<Duration, DeviceError> {
        self.run(bound, launches.clone(), syms, None)?;
        let start = Instant::now();
        for _ in 0..repeat.max(1) {
            self.run(bound, launches.clone(), syms, None)?;
        }
        Ok(start.elapsed() / repeat.max(1))
    }

    /// Bytes of its memory that are in use now and were not when it was opened: by everything on the device, which should be this alone.
    /// `None` where there is no memory of its own.
    fn memory_used(&mut self) -> Option<u64> {
        None
    }

    /// How fast it can be at best on so many bytes, which may be measured now; `None` if that is not known.
    fn limits(&mut self, working_set: u64) -> Option<Limits> {
        let _ = working_set;
        None
    }
}

/// How long launches of one step took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LaunchTimes {
    /// By launch.
    pub launches: Vec<LaunchTime>,
}

/// How long one launch took, over all its runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaunchTime {
    /// Runs.
    pub runs: u64,
    /// Blocks of all runs.
    pub blocks: u64,
    /// Time of all runs.
    pub total: Duration,
    /// Shortest run.
    pub shortest: Duration,
}

impl LaunchTimes {
    /// Adds one run.
    pub fn add(&mut self, launch: usize, blocks: u64, took: Duration) {
        if self.launches.len() <= launch {
            self.launches.resize(launch + 1, LaunchTime::default());
        }
        let time = &mut self.launches[launch];
        time.shortest = if time.runs == 0 { took } else { time.shortest.min(took) };
        time.runs += 1;
        time.blocks += blocks;
        time.total += took;
    }

    /// Adds all runs of some launches, of which the first has that number here.
    pub fn add_all(&mut self, first: usize, runs: &LaunchTimes) {
        let end = first + runs.launches.len();
        if self.launches.len() < end {
            self.launches.resize(end, LaunchTime::default());
        }
        for (time, more) in self.launches[first..].iter_mut().zip(&runs.launches).filter(|(_, more)| more.runs > 0) {
            time.shortest = if time.runs == 0 { more.shortest } else { time.shortest.min(more.shortest) };
            time.runs += more.runs;
            time.blocks += more.blocks;
            time.total += more.total;
        }
    }
}
