//! Weights on their way to the GPU.
//!
//! They are made in two pinned buffers in turn: while the GPU copies one, all threads fill the other, reading the mapped files and
//! transforming as they go. So no more than the two buffers of a checkpoint is ever in host memory of its own.

use super::context::Context;
use super::memory::{DeviceMemory, Event, Pinned, Stream};
use crate::error::DeviceError;
use crate::weights::{Block, Filler, Piece, Weights, Work};
use std::sync::Arc;

/// Bytes of one buffer.
const CHUNK_BYTES: u64 = 64 << 20;
/// Distance of weights: what tensor maps and wide loads want.
const PLACE_ALIGN: u64 = 256;

/// Weights in device memory.
pub(super) struct DeviceWeights {
    memory: DeviceMemory,
    /// Offset and size of each.
    places: Vec<(u64, u64)>,
}

impl DeviceWeights {
    /// Uploads all weights, made by `threads` threads; `progress` is told the bytes done and of all.
    ///
    /// # Errors
    /// [`DeviceError::Memory`], [`DeviceError::Driver`].
    pub(super) fn upload(
        context: &Arc<Context>,
        weights: &Weights,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<DeviceWeights, DeviceError> {
        let (places, total) = places(weights);
        let memory = DeviceMemory::new(context, total, "weights")?;
        let stream = Stream::new(context)?;
        // Padding is zeros, as in host memory.
        stream.clear(&memory)?;
        let mut upload = Upload::new(&stream, &memory, weights, threads, progress)?;
        for (i, &(start, _)) in places.iter().enumerate() {
            for piece in weights.pieces(i) {
                upload.add(start, piece)?;
            }
        }
        upload.flush()?;
        stream.wait()?;
        drop(upload);
        Ok(DeviceWeights { memory, places })
    }

    /// Number of weights.
    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Address and size of a weight.
    pub(super) fn place(&self, index: usize) -> Option<(u64, u64)> {
        self.places.get(index).map(|&(at, bytes)| (self.memory.address() + at, bytes))
    }
}

/// Where each weight goes in their allocation (offset, size), and the size of that.
fn places(weights: &Weights) -> (Vec<(u64, u64)>, u64) {
    let mut end = 0u64;
    let places = (0..weights.len()).map(|i| {
        let start = end.next_multiple_of(PLACE_ALIGN);
        end = start + weights.weight_bytes(i);
        (start, end - start)
    });
    (places.collect(), end)
}

/// Bytes of device memory that weights take.
pub(super) fn device_bytes(weights: &Weights) -> u64 {
    places(weights).1
}

/// An upload under way.
struct Upload<'a> {
    stream: &'a Stream,
    memory: &'a DeviceMemory,
    filler: Filler<'a>,
    /// Buffers, with the end of the last copy from each.
    buffers: [(Pinned, Event); 2],
    next: usize,
    /// Pieces for the next buffer, by their place in device memory: ascending.
    batch: Vec<(u64, Piece<'a>)>,
    /// Blocks of random values in device memory, by address of their host bytes.
    blocks: Vec<(*const u8, DeviceMemory)>,
}

impl<'a> Upload<'a> {
    fn new(
        stream: &'a Stream,
        memory: &'a DeviceMemory,
        weights: &'a Weights,
        threads: usize,
        progress: &'a (dyn Fn(u64, u64) + Sync),
    ) -> Result<Upload<'a>, DeviceError> {
        let context = &stream.context;
        // A piece is never split, and a model may be smaller than a buffer.
        let largest = (0..weights.len()).flat_map(|i| weights.pieces(i)).filter(|p| !p.is_block());
        let largest = largest.map(|p| p.bytes as u64).max().unwrap_or(0);
        let bytes = CHUNK_BYTES.min(memory.bytes()).max(largest) as usize;
        let buffer = || Ok::<_, DeviceError>((Pinned::new(context, bytes)?, Event::new(context, false)?));
        Ok(Upload {
            stream,
            memory,
            filler: Filler::new(threads, weights.total_bytes(), progress),
            buffers: [buffer()?, buffer()?],
            next: 0,
            batch: Vec::new(),
            blocks: Vec::new(),
        })
    }

    /// Adds a piece of the weight that starts at `start` of device memory.
    fn add(&mut self, start: u64, piece: Piece<'a>) -> Result<(), DeviceError> {
        let at = start + piece.at as u64;
        if let Work::Block(block) = piece.work {
            // What a buffer covers must not reach over it.
            self.flush()?;
            self.copy_block(at, piece.bytes, block)?;
            self.filler.count(piece.bytes as u64);
            return Ok(());
        }
        let room = self.buffers[0].0.len() as u64;
        if self.batch.first().is_some_and(|(first, _)| at + piece.bytes as u64 - first > room) {
            self.flush()?;
        }
        self.batch.push((at, piece));
        Ok(())
    }

    /// Makes the pieces in a buffer and starts its copy.
    fn flush(&mut self) -> Result<(), DeviceError> {
        let (Some(&(first, _)), Some((last, piece))) = (self.batch.first(), self.batch.last()) else { return Ok(()) };
        let bytes = (last + piece.bytes as u64 - first) as usize;
        let (pinned, copied) = &mut self.buffers[self.next];
        self.stream.context.enter()?;
        copied.wait()?;
        let pieces = self.batch.drain(..).map(|(at, piece)| ((at - first) as usize, piece));
        self.filler.fill(&mut pinned.as_mut()[..bytes], pieces);
        let to = self.memory.range(first, bytes).ok_or_else(|| outside(first))?;
        // SAFETY: the destination is inside the allocation; the buffer is written again after `copied` only.
        unsafe { self.stream.upload(to, pinned, 0, bytes)? };
        copied.record(self.stream)?;
        self.next = 1 - self.next;
        Ok(())
    }

    /// Fills a range with a repeated block, copied inside the GPU.
    fn copy_block(&mut self, at: u64, bytes: usize, block: Block<'a>) -> Result<(), DeviceError> {
        let source = self.block(block.bytes)?;
        let to = self.memory.range(at, bytes).ok_or_else(|| outside(at))?;
        self.stream.context.enter()?;
        for (done, range) in block.ranges(bytes) {
            // SAFETY: both ranges are inside their allocations, which differ.
            unsafe { self.stream.copy(to + done as u64, source + range.start as u64, range.len())? };
        }
        Ok(())
    }

    /// Where a block is in device memory.
    fn block(&mut self, bytes: &'a [u8]) -> Result<u64, DeviceError> {
        if let Some((_, memory)) = self.blocks.iter().find(|(host, _)| *host == bytes.as_ptr()) {
            return Ok(memory.address());
        }
        let memory = DeviceMemory::new(&self.stream.context, bytes.len() as u64, "a block of random values")?;
        let mut pinned = Pinned::new(&self.stream.context, bytes.len())?;
        pinned.as_mut().copy_from_slice(bytes);
        // SAFETY: as large as each other; the copy is over before the buffer goes.
        unsafe { self.stream.upload(memory.address(), &pinned, 0, bytes.len())? };
        self.stream.wait()?;
        let address = memory.address();
        self.blocks.push((bytes.as_ptr(), memory));
        Ok(address)
    }
}

fn outside(at: u64) -> DeviceError {
    DeviceError::Misuse(format!("a piece of a weight at {at} is outside the weights"))
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        // Buffers and blocks must not go while they are copied from, whatever failed.
        let _ = self.stream.wait();
    }
}
