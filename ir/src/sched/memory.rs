//! Shared memory as the interpreter has it: real bytes, in which writes of one thread reach the others late.
//!
//! A write is seen by others at the next barrier of its unit, or before: each element is written at once or then, as chance has it. What was
//! read since the last barrier may still be being read by a thread that is behind, so overwriting it is an error.

use super::Buffer;
use super::ring::Unit;
use std::ops::Range;

/// Numbers that depend on a seed only.
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Chance {
        Chance(seed)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n.max(1) as u64) as usize
    }
}

/// What one unit has done since its last barrier.
#[derive(Clone, Default)]
struct Since {
    /// Elements that the other threads do not see yet.
    late: Vec<(usize, Vec<u8>)>,
    read: Vec<Range<usize>>,
}

/// A block's shared memory, and behind it what it has outside.
pub(crate) struct Shared {
    bytes: Vec<u8>,
    /// Where that begins.
    outside: usize,
    units: Vec<Since>,
}

impl Shared {
    /// Memory in which every float is NaN.
    pub(crate) fn new(buffers: &[Buffer], units: usize) -> Shared {
        let end = |outside: bool| {
            let all = buffers.iter().filter(|b| b.outside == outside);
            all.map(|b| b.offset as usize + b.bytes() as usize).max().unwrap_or(0)
        };
        let outside = end(false);
        Shared { bytes: vec![0xff; outside + end(true)], outside, units: vec![Since::default(); units] }
    }

    /// Where the elements of a tile lie, in row-major order.
    fn addresses(&self, buffer: &Buffer, copy: u64, shape: [usize; 2]) -> impl Iterator<Item = usize> + use<> {
        let first = if buffer.outside { self.outside } else { 0 };
        addresses(buffer, copy, shape).map(move |at| first + at)
    }

    fn span(&self, buffer: &Buffer) -> Range<usize> {
        let first = buffer.offset as usize + if buffer.outside { self.outside } else { 0 };
        first..first + buffer.bytes() as usize
    }

    /// The elements of a tile of so many rows and columns in a copy of a buffer.
    pub(crate) fn read(&self, buffer: &Buffer, copy: u64, shape: [usize; 2]) -> Vec<u8> {
        let size = buffer.dtype.bytes();
        let mut out = Vec::with_capacity(shape[0] * shape[1] * size);
        for at in self.addresses(buffer, copy, shape) {
            out.extend_from_slice(&self.bytes[at..at + size]);
        }
        out
    }

    /// Notes that a unit read from a buffer; until its next barrier it must not be overwritten.
    pub(crate) fn note_read(&mut self, buffer: &Buffer, unit: Unit) {
        let span = self.span(buffer);
        self.units[unit].read.push(span);
    }

    /// Writes a tile at once: a copy that is complete.
    pub(crate) fn write(&mut self, buffer: &Buffer, copy: u64, shape: [usize; 2], data: &[u8]) {
        let size = buffer.dtype.bytes();
        for (at, element) in self.addresses(buffer, copy, shape).zip(data.chunks_exact(size)) {
            self.bytes[at..at + size].copy_from_slice(element);
        }
    }

    /// Writes a tile by the threads of a unit. False if it overwrites what other threads may still read.
    pub(crate) fn write_late(
        &mut self,
        buffer: &Buffer,
        shape: [usize; 2],
        data: &[u8],
        unit: Unit,
        chance: &mut Chance,
    ) -> bool {
        let (size, whole) = (buffer.dtype.bytes(), self.span(buffer));
        let busy = |since: &Since| since.read.iter().any(|r| r.start < whole.end && whole.start < r.end);
        // What all threads read in `common`, no barrier of a role settles.
        if busy(&self.units[unit]) || busy(&self.units[0]) {
            return false;
        }
        for (at, element) in self.addresses(buffer, 0, shape).zip(data.chunks_exact(size)) {
            if chance.below(2) == 0 {
                self.units[unit].late.push((at, element.to_vec()));
            } else {
                self.bytes[at..at + size].copy_from_slice(element);
            }
        }
        true
    }

    /// A barrier of a unit: its writes are seen, its reads are done.
    pub(crate) fn barrier(&mut self, unit: Unit) {
        for (at, element) in std::mem::take(&mut self.units[unit]).late {
            self.bytes[at..at + element.len()].copy_from_slice(&element);
        }
    }
}

/// Where the elements of a tile lie in their memory, in row-major order.
fn addresses(buffer: &Buffer, copy: u64, [rows, columns]: [usize; 2]) -> impl Iterator<Item = usize> + use<> {
    let base = buffer.offset as usize + copy as usize * buffer.copy_bytes() as usize;
    let (pitch, size, chunks) = (buffer.pitch as usize, buffer.dtype.bytes(), buffer.swizzle as usize / 16);
    let panel = buffer.panel_bytes() as usize;
    let swizzled = move |row: usize, byte: usize| match (byte / 16).checked_rem(chunks) {
        Some(chunk) => (byte / 16 - chunk + (chunk ^ (row % chunks))) * 16 + byte % 16,
        None => byte,
    };
    let within = move |r: usize, byte: usize| byte / pitch * panel + r * pitch + swizzled(r, byte % pitch);
    (0..rows).flat_map(move |r| (0..columns).map(move |c| base + within(r, c * size)))
}
