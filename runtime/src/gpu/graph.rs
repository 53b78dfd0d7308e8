//! Launches one by one, and as captured graphs that are kept.
//!
//! A decode step is hundreds of launches of some microseconds each; one by one, the host could not keep up. A graph holds its
//! grids, so there is one for each [bucket](super::bind::Program::bucket) of symbols; everything else that changes from step to
//! step lies in device memory. A range is captured when it comes a second time: most prefills come once.

use super::bind::{Program, Ready, grid};
use super::code::{Kernel, Kernels};
use super::context::Context;
use super::driver::{CAPTURE_RELAXED, Handle, Launch};
use super::memory::Stream;
use crate::error::DeviceError;
use dsc_ir::SymValues;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;

/// Graphs kept; the one not used for longest goes first.
const MAX_GRAPHS: usize = 64;
/// Ranges of fewer launches are not worth a graph.
const MIN_LAUNCHES: usize = 3;

/// Puts a launch in the stream's queue, with the grid at `syms`. Does nothing if there is no block.
pub(super) fn launch(stream: &Stream, kernel: &Kernel, ready: &Ready, syms: &SymValues) -> Result<(), DeviceError> {
    // SAFETY: the function is of a loaded module and has the parameters that `ready` was bound with: an address each, that of
    // the symbols, and the tensor maps. Every view stays in its buffer at the binding's limits, which the caller has compared
    // the symbols with.
    unsafe { launch_raw(&stream.context, stream.raw(), kernel, ready.params(), syms) }
}

/// Puts a launch in a queue, with the grid at `syms`. Does nothing if there is no block.
///
/// # Safety
/// `params` points to a pointer to each of the kernel's parameters; the driver copies their values before this returns. What they
/// point to on the device must be there. The stream is null or one of the context.
pub(super) unsafe fn launch_raw(
    context: &Context,
    stream: Handle,
    kernel: &Kernel,
    params: *mut *mut c_void,
    syms: &SymValues,
) -> Result<(), DeviceError> {
    let multiprocessors = context.multiprocessors;
    let Some(grid) = grid(&kernel.entry, &kernel.gpu, multiprocessors, syms) else { return Ok(()) };
    let launch = Launch {
        function: kernel.function,
        grid,
        threads: kernel.gpu.threads,
        shared_bytes: kernel.gpu.shared_bytes,
        cluster: kernel.gpu.cluster.max(1),
        dependent: kernel.gpu.dependent,
        together: kernel.gpu.apart,
        stream,
        params,
    };
    // SAFETY: as the caller says.
    context.driver.checked(unsafe { context.driver.api.launch(&launch) })
}

/// A captured and instantiated graph.
pub(super) struct Graph {
    raw: Handle,
    destroy: unsafe extern "C" fn(Handle) -> u32,
}

// SAFETY: the driver lets any thread use a graph, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures `repeat` runs of some launches, one after the other.
    pub(super) fn capture(
        stream: &Stream,
        kernels: &Kernels,
        launches: &[Ready],
        syms: &SymValues,
        repeat: usize,
    ) -> Result<Graph, DeviceError> {
        let (driver, f) = (&stream.context.driver, &stream.context.driver.functions);
        // SAFETY: the stream lives; every path below ends the capture.
        driver.check(|n| n.capture_begin, unsafe { (f.capture_begin)(stream.raw(), CAPTURE_RELAXED) })?;
        let mut runs = (0..repeat).flat_map(|_| launches);
        let launched = runs.try_for_each(|ready| launch(stream, &kernels.kernels[ready.kernel], ready, syms));
        let mut graph = std::ptr::null_mut();
        // SAFETY: the pointer is to a handle, the stream is being captured.
        let ended = driver.check(|n| n.capture_end, unsafe { (f.capture_end)(stream.raw(), &mut graph) });
        let mut raw = std::ptr::null_mut();
        let made = launched.and(ended).and_then(|()| {
            // SAFETY: the pointer is to a handle, the graph was just captured.
            driver.check(|n| n.graph_instantiate, unsafe { (f.graph_instantiate)(&mut raw, graph, 0) })
        });
        if !graph.is_null() {
            // SAFETY: captured above, destroyed once; what was instantiated of it stands alone.
            unsafe { (f.graph_destroy)(graph) };
        }
        made.map(|()| Graph { raw, destroy: f.graph_exec_destroy })
    }

    /// Puts it in the queue.
    pub(super) fn launch(&self, stream: &Stream) -> Result<(), DeviceError> {
        let driver = &stream.context.driver;
        // SAFETY: graph and stream live and are of one context.
        driver.check(|n| n.graph_launch, unsafe { (driver.functions.graph_launch)(self.raw, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated by `capture`, destroyed once, when nothing of it is in a queue (its owner has waited).
        unsafe { (self.destroy)(self.raw) };
    }
}

/// What a graph was captured of: binding, range, and the symbols of its grids.
type Key = (usize, usize, usize, SymValues);

/// The graphs of a device.
#[derive(Default)]
pub(super) struct Graphs {
    kept: BTreeMap<[u64; 9], Kept>,
    clock: u64,
}

struct Kept {
    /// None when it came once.
    graph: Option<Graph>,
    used: u64,
}

impl Graphs {
    /// Puts a range of bound launches in the queue.
    pub(super) fn run(
        &mut self,
        stream: &Stream,
        kernels: &Kernels,
        (bound, program): (usize, &Program),
        range: Range<usize>,
        syms: &SymValues,
    ) -> Result<(), DeviceError> {
        let launches = &program.launches[range.clone()];
        let one_by_one = || launches.iter().try_for_each(|l| launch(stream, &kernels.kernels[l.kernel], l, syms));
        if launches.len() < MIN_LAUNCHES || !program.kept {
            return one_by_one();
        }
        let bucket = program.bucket(syms);
        let key = ordered((bound, range.start, range.end, bucket));
        self.clock += 1;
        let Some(kept) = self.kept.get_mut(&key) else {
            self.make_room(stream)?;
            self.kept.insert(key, Kept { graph: None, used: self.clock });
            return one_by_one();
        };
        kept.used = self.clock;
        let graph = match &mut kept.graph {
            Some(graph) => graph,
            none => none.insert(Graph::capture(stream, kernels, launches, &bucket, 1)?),
        };
        graph.launch(stream)
    }

    /// Drops the entry that was not used for longest, if there are too many.
    fn make_room(&mut self, stream: &Stream) -> Result<(), DeviceError> {
        if self.kept.len() < MAX_GRAPHS {
            return Ok(());
        }
        let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(key, _)| *key);
        stream.wait()?;
        if let Some(key) = oldest {
            self.kept.remove(&key);
        }
        Ok(())
    }
}

fn ordered((bound, start, end, syms): Key) -> [u64; 9] {
    let mut key = [0; 9];
    key[..3].copy_from_slice(&[bound as u64, start as u64, end as u64]);
    key[3..].copy_from_slice(&syms.0.map(u64::from));
    key
}
