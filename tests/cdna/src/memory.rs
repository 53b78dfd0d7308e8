//! Global memory: allocations with nothing between them.

use crate::fault::Cause;
use std::sync::atomic::{AtomicU32, Ordering};

/// Address space of an allocation: far apart, so that no wrong offset leads from one to another.
const SPACING: u32 = 34;
/// Where in its space an allocation begins. Low halves of addresses overflow inside of it, so that a sum without its carry leads outside.
const BASE: u64 = 0xffff_f000;

/// One allocation.
#[derive(Debug)]
struct Allocation {
    words: Vec<AtomicU32>,
    bytes: usize,
    writable: bool,
}

/// Memory that all blocks of a launch share. Accesses outside of an allocation are faults.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Allocation>,
}

/// An access: lane, address, bytes, and whether it writes.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The lane that a fault names.
    pub lane: usize,
    /// The first byte.
    pub address: u64,
    /// How many.
    pub bytes: usize,
}

impl Memory {
    /// No allocation.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Allocates memory that holds `bytes`, aligned to 4096 bytes; returns its address.
    pub fn alloc(&mut self, bytes: &[u8]) -> u64 {
        self.add(bytes, true)
    }

    /// As [`alloc`](Memory::alloc), for what kernels only read.
    pub fn alloc_read_only(&mut self, bytes: &[u8]) -> u64 {
        self.add(bytes, false)
    }

    fn add(&mut self, bytes: &[u8], writable: bool) -> u64 {
        let word = |c: &[u8]| {
            let mut word = [0; 4];
            word[..c.len()].copy_from_slice(c);
            AtomicU32::new(u32::from_le_bytes(word))
        };
        let words = bytes.chunks(4).map(word).collect();
        self.allocations.push(Allocation { words, bytes: bytes.len(), writable });
        ((self.allocations.len() as u64) << SPACING) + BASE
    }

    /// Gives back the allocations made after there were `count` of them, whose addresses may then be used again.
    pub fn truncate(&mut self, count: usize) {
        self.allocations.truncate(count);
    }

    /// How many allocations there are.
    pub fn count(&self) -> usize {
        self.allocations.len()
    }

    /// What an allocation holds, by its address.
    pub fn read(&self, address: u64) -> Vec<u8> {
        let Some(a) = self.index(address).and_then(|i| self.allocations.get(i)) else { return Vec::new() };
        let mut bytes: Vec<u8> = a.words.iter().flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes()).collect();
        bytes.truncate(a.bytes);
        bytes
    }

    /// Copies from inside of an allocation; false if it does not contain the bytes.
    pub fn read_at(&self, address: u64, bytes: &mut [u8]) -> bool {
        let Ok((a, offset)) = self.find(Access { lane: 0, address, bytes: bytes.len() }, false) else { return false };
        for (i, byte) in bytes.iter_mut().enumerate() {
            let at = offset + i;
            *byte = (a.words[at / 4].load(Ordering::Relaxed) >> (8 * (at % 4))) as u8;
        }
        true
    }

    /// Overwrites bytes inside of an allocation, read-only ones too; false if it does not contain them.
    pub fn write_at(&mut self, address: u64, bytes: &[u8]) -> bool {
        let Ok((a, offset)) = self.find(Access { lane: 0, address, bytes: bytes.len() }, false) else { return false };
        for (i, &byte) in bytes.iter().enumerate() {
            let (word, shift) = (&a.words[(offset + i) / 4], 8 * ((offset + i) % 4));
            let old = word.load(Ordering::Relaxed);
            word.store(old & !(0xff << shift) | u32::from(byte) << shift, Ordering::Relaxed);
        }
        true
    }

    fn index(&self, address: u64) -> Option<usize> {
        ((address.wrapping_sub(BASE) >> SPACING) as usize).checked_sub(1)
    }

    /// The allocation and the offset in it.
    #[inline(always)]
    fn find(&self, a: Access, write: bool) -> Result<(&Allocation, usize), Cause> {
        let offset = (a.address.wrapping_sub(BASE) & ((1 << SPACING) - 1)) as usize;
        let found = self.index(a.address).and_then(|i| self.allocations.get(i));
        match found {
            Some(all) if offset + a.bytes <= all.bytes => {
                if write && !all.writable {
                    return Err(Cause::ReadOnly { lane: a.lane, address: a.address });
                }
                Ok((all, offset))
            }
            _ => Err(self.outside(a, write)),
        }
    }

    #[cold]
    fn outside(&self, a: Access, write: bool) -> Cause {
        let nearest = (0..self.allocations.len())
            .map(|i| (((i as u64 + 1) << SPACING) + BASE, self.allocations[i].bytes as u64))
            .min_by_key(|&(base, bytes)| base.saturating_sub(a.address).max(a.address.saturating_sub(base + bytes)));
        let near = nearest.map_or(String::new(), |(base, bytes)| {
            format!(" (the nearest has {bytes} bytes; this is byte {} of it)", a.address.wrapping_sub(base) as i64)
        });
        let what = if write { "writes" } else { "reads" };
        Cause::GlobalBounds { lane: a.lane, what, address: a.address, bytes: a.bytes, near }
    }

    /// Whether an allocation contains the bytes.
    pub fn contains(&self, a: Access) -> bool {
        self.find(a, false).is_ok()
    }

    /// Loads up to 4 bytes that lie in one word, or a word.
    #[inline(always)]
    pub fn load(&self, a: Access) -> Result<u32, Cause> {
        let (all, offset) = self.find(a, false)?;
        let (at, shift) = (offset / 4, 8 * (offset as u32 % 4));
        let low = all.words[at].load(Ordering::Relaxed);
        if shift == 0 && a.bytes == 4 {
            return Ok(low);
        }
        let high = all.words.get(at + 1).map_or(0, |w| w.load(Ordering::Relaxed));
        let value = ((u64::from(high) << 32 | u64::from(low)) >> shift) as u32;
        Ok(if a.bytes == 4 { value } else { value & ((1 << (8 * a.bytes)) - 1) })
    }

    /// Loads words.
    #[inline(always)]
    pub fn load_words<const N: usize>(&self, lane: usize, address: u64) -> Result<[u32; N], Cause> {
        let (all, offset) = self.find(Access { lane, address, bytes: 4 * N }, false)?;
        let mut out = [0; N];
        if offset % 4 == 0 {
            for (out, word) in out.iter_mut().zip(&all.words[offset / 4..]) {
                *out = word.load(Ordering::Relaxed);
            }
        } else {
            for (i, out) in out.iter_mut().enumerate() {
                *out = self.load(Access { lane, address: address + 4 * i as u64, bytes: 4 })?;
            }
        }
        Ok(out)
    }

    /// Stores the low bytes of a value.
    #[inline(always)]
    pub fn store(&self, a: Access, value: u32) -> Result<(), Cause> {
        let (all, offset) = self.find(a, true)?;
        if a.bytes == 4 && offset % 4 == 0 {
            all.words[offset / 4].store(value, Ordering::Relaxed);
            return Ok(());
        }
        for i in 0..a.bytes {
            let (at, shift) = ((offset + i) / 4, 8 * ((offset + i) as u32 % 4));
            let byte = value >> (8 * i) & 0xff;
            let put = |old: u32| Some(old & !(0xff << shift) | byte << shift);
            let _ = all.words[at].fetch_update(Ordering::Relaxed, Ordering::Relaxed, put);
        }
        Ok(())
    }

    /// Replaces a word by what `f` makes of it, at once; returns what was there.
    pub fn update(&self, a: Access, f: impl Fn(u32) -> u32) -> Result<u32, Cause> {
        let (all, offset) = self.find(a, true)?;
        if offset % 4 != 0 {
            return Err(Cause::Misaligned { lane: a.lane, address: a.address, bytes: a.bytes });
        }
        let result = all.words[offset / 4].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(f(old)));
        Ok(result.unwrap_or_default())
    }
}
