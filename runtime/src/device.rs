//! What the executor asks of a device. The CPU is the one that exists; a GPU fits behind the same trait: buffers are opaque,
//! weights are uploaded or referenced as the device likes, and bound launches may become a captured graph.

use crate::error::DeviceError;
use crate::limits::Limits;
use crate::weights::Weights;
use dsc_ir::SymValues;
use dsc_ir::artifact::Header;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

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

/// A device with one artifact's code on it.
pub trait Device: Send {
    /// What it is, in a line: for logs and benches.
    fn describe(&self) -> String;

    /// Checks that the device can run the artifact, and loads its code. Called once, first.
    ///
    /// # Errors
    /// [`DeviceError::Target`], [`DeviceError::Features`], [`DeviceError::Code`], [`DeviceError::Memory`].
    fn load_code(&mut self, header: &Header, code: &[u8]) -> Result<(), DeviceError>;

    /// Makes weights readable by kernels; one buffer a weight.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    fn load_weights(&mut self, weights: &Arc<Weights>) -> Result<Vec<Buffer>, DeviceError>;

    /// Memory of zeros; `what` is for the message.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError>;

    /// Copies `bytes` to byte `at` of a buffer.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] outside the buffer, or if it holds a weight.
    fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies from byte `at` of a buffer.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] outside the buffer.
    fn read(&self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError>;

    /// Prepares launches for every step whose symbols are at most `limits`.
    ///
    /// # Errors
    /// [`DeviceError::Binding`] if a view could leave its buffer at these limits, or writes a weight.
    fn bind(&mut self, launches: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError>;

    /// Runs a range of bound launches, one after the other, and waits for the last. With `times` it adds the duration of each.
    ///
    /// # Errors
    /// [`DeviceError::Misuse`] if symbols are beyond the limits of [`bind`](Device::bind), or there is no such range.
    fn run(
        &mut self,
        bound: Bound,
        launches: Range<usize>,
        syms: &SymValues,
        times: Option<&mut LaunchTimes>,
    ) -> Result<(), DeviceError>;

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
}
