//! Memory of the GPU, pinned memory of the host, and the order in which copies and launches happen.

use super::context::Context;
use super::driver::{Address, EVENT_NO_TIMING, Handle, STREAM_NON_BLOCKING};
use crate::error::DeviceError;
use dsc_ir::artifact::{COUNTER_PITCH, COUNTERS};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

/// Memory of the GPU.
pub(super) struct DeviceMemory {
    context: Arc<Context>,
    address: Address,
    bytes: u64,
}

impl DeviceMemory {
    /// `bytes` bytes, aligned to 256 at least; `what` is for the message. Their contents are undefined.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub(super) fn new(context: &Arc<Context>, bytes: u64, what: &'static str) -> Result<DeviceMemory, DeviceError> {
        context.enter()?;
        let size = usize::try_from(bytes).map_err(|_| context.too_little(bytes, what))?;
        let mut address = 0;
        // SAFETY: the pointer is to an address. `drop` frees what is allocated here.
        let status = unsafe { (context.driver.functions.memory_alloc)(&mut address, size.max(1)) };
        if status != 0 {
            return Err(context.memory_error(status, bytes, what));
        }
        Ok(DeviceMemory { context: Arc::clone(context), address, bytes })
    }

    /// Its first byte.
    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of byte `at`, if `bytes` bytes from there are inside.
    pub(super) fn range(&self, at: u64, bytes: usize) -> Option<Address> {
        at.checked_add(bytes as u64).filter(|&end| end <= self.bytes).map(|_| self.address + at)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `new`, freed once. The driver waits for work that uses it.
            unsafe { (self.context.driver.functions.memory_free)(self.address) };
        }
    }
}

/// Memory that blocks of kernels have to themselves, behind the counters of their teams.
pub(super) struct Scratch(DeviceMemory);

impl Scratch {
    /// Bytes of all counters.
    const COUNTERS: u64 = COUNTER_PITCH * COUNTERS as u64;

    /// `bytes` bytes for blocks, and counters at zero: no launch has to clear them, as each leaves them so.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], [`DeviceError::Driver`].
    pub(super) fn new(context: &Arc<Context>, bytes: u64) -> Result<Scratch, DeviceError> {
        let all = bytes.saturating_add(Scratch::COUNTERS);
        let memory = DeviceMemory::new(context, all, "scratch memory of kernels")?;
        let stream = Stream::new(context)?;
        stream.clear(&memory)?;
        stream.wait()?;
        Ok(Scratch(memory))
    }

    /// The first byte for blocks.
    pub(super) fn address(&self) -> Address {
        self.0.address() + Scratch::COUNTERS
    }

    /// Bytes for blocks.
    pub(super) fn bytes(&self) -> u64 {
        self.0.bytes() - Scratch::COUNTERS
    }
}

/// Host memory that the GPU copies from and to by itself.
pub(super) struct Pinned {
    context: Arc<Context>,
    pointer: *mut u8,
    bytes: usize,
}

// SAFETY: it owns its memory, as a Box does.
unsafe impl Send for Pinned {}

impl Pinned {
    /// `bytes` bytes of zeros.
    ///
    /// # Errors
    /// [`DeviceError::Memory`].
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Pinned, DeviceError> {
        context.enter()?;
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // SAFETY: the pointer is to a pointer. `drop` frees what is allocated here.
        let status = unsafe { (context.driver.functions.host_alloc)(&mut pointer, bytes.max(1), 0) };
        if status != 0 || pointer.is_null() {
            let reason = "the system does not pin as much of its memory".into();
            let what = "host memory to copy through";
            return Err(DeviceError::Memory { what, bytes: bytes as u64, reason });
        }
        // SAFETY: the driver gave this many bytes; a slice of them needs them initialised.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Pinned { context: Arc::clone(context), pointer: pointer.cast(), bytes })
    }

    /// The bytes. Who writes them must know that no copy from them is under way.
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: `bytes` initialised bytes that nobody else of this program refers to.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.bytes) }
    }

    /// Its size.
    pub(super) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: allocated by `new`, freed once.
            unsafe { (self.context.driver.functions.host_free)(self.pointer.cast()) };
        }
    }
}

/// A queue of the GPU: what is put in it happens in order.
pub(super) struct Stream {
    pub(super) context: Arc<Context>,
    raw: Handle,
}

// SAFETY: the driver lets any thread use a stream, and it is used through `&self` by its one owner.
unsafe impl Send for Stream {}

impl Stream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Stream, DeviceError> {
        context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a handle.
        let status = unsafe { (context.driver.functions.stream_create)(&mut raw, STREAM_NON_BLOCKING) };
        context.driver.check(|n| n.stream_create, status)?;
        Ok(Stream { context: Arc::clone(context), raw })
    }

    pub(super) fn raw(&self) -> Handle {
        self.raw
    }

    /// Waits for everything in the queue, and tells of what failed in it.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the stream lives.
        let status = unsafe { (self.context.driver.functions.stream_wait)(self.raw) };
        self.context.driver.check(|n| n.stream_wait, status)
    }

    /// Copies the first `bytes` bytes from `at` of pinned memory to `to`.
    ///
    /// # Safety
    /// `to` must have as many bytes; the pinned bytes must not be written before the copy is done.
    pub(super) unsafe fn upload(&self, to: Address, from: &Pinned, at: usize, bytes: usize) -> Result<(), DeviceError> {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= from.bytes), "a copy from outside of pinned memory");
        // SAFETY: the source is checked above, the rest is asked of the caller.
        let status =
            unsafe { (self.context.driver.functions.copy_to_device)(to, from.pointer.add(at).cast(), bytes, self.raw) };
        self.context.driver.check(|n| n.copy_to_device, status)
    }

    /// Copies `bytes` bytes from `from` to the start of pinned memory.
    ///
    /// # Safety
    /// `from` must have as many bytes; the pinned bytes must not be touched before the copy is done.
    pub(super) unsafe fn download(&self, to: &mut Pinned, from: Address, bytes: usize) -> Result<(), DeviceError> {
        assert!(bytes <= to.bytes, "a copy beyond pinned memory");
        // SAFETY: the destination is checked above, the rest is asked of the caller.
        let status = unsafe { (self.context.driver.functions.copy_to_host)(to.pointer.cast(), from, bytes, self.raw) };
        self.context.driver.check(|n| n.copy_to_host, status)
    }

    /// Copies inside the GPU.
    ///
    /// # Safety
    /// Both ranges must be the caller's and not overlap.
    pub(super) unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: asked of the caller.
        let status = unsafe { (self.context.driver.functions.copy_on_device)(to, from, bytes, self.raw) };
        self.context.driver.check(|n| n.copy_on_device, status)
    }

    /// Fills memory with zeros.
    pub(super) fn clear(&self, memory: &DeviceMemory) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the range is the whole of a live allocation.
        let status =
            unsafe { (self.context.driver.functions.fill)(memory.address, 0, memory.bytes as usize, self.raw) };
        self.context.driver.check(|n| n.fill, status)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.wait().is_ok() || self.context.enter().is_ok() {
            // SAFETY: created by `new`, destroyed once.
            unsafe { (self.context.driver.functions.stream_destroy)(self.raw) };
        }
    }
}

/// A place in a queue.
pub(super) struct Event {
    context: Arc<Context>,
    raw: Handle,
}

// SAFETY: the driver lets any thread use an event.
unsafe impl Send for Event {}

impl Event {
    /// One that can be waited for, and with `timing` compared with others.
    pub(super) fn new(context: &Arc<Context>, timing: bool) -> Result<Event, DeviceError> {
        context.enter()?;
        let (mut raw, flags) = (std::ptr::null_mut(), if timing { 0 } else { EVENT_NO_TIMING });
        // SAFETY: the pointer is to a handle.
        let status = unsafe { (context.driver.functions.event_create)(&mut raw, flags) };
        context.driver.check(|n| n.event_create, status)?;
        Ok(Event { context: Arc::clone(context), raw })
    }

    /// Marks the end of what is in the queue now.
    pub(super) fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both live.
        let status = unsafe { (self.context.driver.functions.event_record)(self.raw, stream.raw) };
        self.context.driver.check(|n| n.event_record, status)
    }

    /// Waits until the queue is past the mark; not at all if there is none.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the event lives.
        let status = unsafe { (self.context.driver.functions.event_wait)(self.raw) };
        self.context.driver.check(|n| n.event_wait, status)
    }

    /// Time from another mark to this one, both passed.
    pub(super) fn since(&self, start: &Event) -> Result<Duration, DeviceError> {
        let mut milliseconds = 0f32;
        // SAFETY: the pointer is to a float, both events live.
        let status = unsafe { (self.context.driver.functions.event_elapsed)(&mut milliseconds, start.raw, self.raw) };
        self.context.driver.check(|n| n.event_elapsed, status)?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: created by `new`, destroyed once.
            unsafe { (self.context.driver.functions.event_destroy)(self.raw) };
        }
    }
}
