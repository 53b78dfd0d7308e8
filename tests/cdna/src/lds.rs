//! The local memory of a block, with a record of who has written and read each word.
//!
//! Two accesses of a byte by different waves, of which one writes, must have a barrier between them, and what was under way at
//! the barrier must have been waited for: a write is seen by others after the writer's wait and the barrier. Atomics do not race
//! with each other. Bytes of loads that go straight to LDS may not be touched, by their own wave neither, before the wait.

use crate::fault::Cause;

/// How an access touches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// An atomic.
    Atomic,
    /// A write by a load from global memory.
    Direct,
}

/// Who touches memory, and when.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    /// The wave.
    pub wave: u8,
    /// Barriers that it has passed.
    pub epoch: u32,
    /// Number of the access among the wave's of the same counter.
    pub seq: u32,
    /// Accesses of the wave that its waits cover: by lgkmcnt and by vmcnt.
    pub done: Done,
}

/// Accesses that waits cover, by the counter that counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// By lgkmcnt.
    pub lgkm: u32,
    /// By vmcnt.
    pub vm: u32,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    write_epoch: u32,
    write_seq: u32,
    read_epoch: u32,
    read_seq: u32,
    readers: u16,
    writer: u8,
    reader: u8,
    kind: Kind,
    /// Bytes of the word that were written.
    defined: u8,
}

const NOBODY: u8 = 255;
/// Writer of what atomics of several waves have changed.
const MANY: u8 = 254;
const FRESH: Record = Record {
    write_epoch: 0,
    write_seq: 0,
    read_epoch: 0,
    read_seq: 0,
    readers: 0,
    writer: NOBODY,
    reader: NOBODY,
    kind: Kind::Write,
    defined: 0,
};

/// Local memory of one block.
#[derive(Debug)]
pub struct Lds {
    bytes: Vec<u8>,
    records: Vec<Record>,
    /// Records of bytes, for words of which parts were accessed.
    split: Vec<Option<Box<[Record; 4]>>>,
    /// What each wave's waits covered at its last two barriers.
    at_barrier: Vec<[Done; 2]>,
}

impl Lds {
    /// For `waves` waves.
    pub fn new(bytes: usize, waves: usize) -> Lds {
        let words = bytes.div_ceil(4);
        Lds {
            bytes: vec![0xa5; words * 4],
            records: vec![FRESH; words],
            split: vec![None; words],
            at_barrier: vec![[Done::default(); 2]; waves],
        }
    }

    /// Forgets everything, for another block.
    pub fn reset(&mut self) {
        self.records.fill(FRESH);
        self.split.fill(None);
        self.at_barrier.fill([Done::default(); 2]);
    }

    /// A wave reaches its barrier number `epoch`.
    pub fn barrier(&mut self, wave: usize, epoch: u32, done: Done) {
        self.at_barrier[wave][epoch as usize % 2] = done;
    }

    /// A wave has ended: all it has done is done.
    pub fn end(&mut self, wave: usize) {
        self.at_barrier[wave] = [Done { lgkm: u32::MAX, vm: u32::MAX }; 2];
    }

    #[inline(always)]
    fn check(&self, lane: usize, address: u64, bytes: usize, align: usize) -> Result<(), Cause> {
        if address as usize + bytes > self.bytes.len() || address > u64::from(u32::MAX) {
            return Err(Cause::LdsBounds { lane, address, bytes, size: self.bytes.len() });
        }
        if !(address as usize).is_multiple_of(align) {
            return Err(Cause::Misaligned { lane, address, bytes });
        }
        Ok(())
    }

    /// Reads a word or, of it, `bytes` bytes; says too whether they were all written.
    #[inline(always)]
    pub fn read(&mut self, who: Who, lane: usize, address: u64, bytes: usize) -> Result<(u32, bool), Cause> {
        self.check(lane, address, bytes, bytes)?;
        let defined = self.touch(who, address, bytes, Kind::Read, true)?;
        Ok((self.get(address as usize, bytes), defined))
    }

    /// Writes the low bytes of a value; `defined` says whether anything ever wrote it.
    #[inline(always)]
    pub fn write(
        &mut self,
        who: Who,
        kind: Kind,
        at: (usize, u64),
        bytes: usize,
        value: (u32, bool),
    ) -> Result<(), Cause> {
        let (lane, address) = at;
        self.check(lane, address, bytes, bytes)?;
        self.touch(who, address, bytes, kind, value.1)?;
        self.put(address as usize, bytes, value.0);
        Ok(())
    }

    /// Replaces a word by what `f` makes of it; returns what was there.
    pub fn update(&mut self, who: Who, lane: usize, address: u64, f: impl Fn(u32) -> u32) -> Result<u32, Cause> {
        self.check(lane, address, 4, 4)?;
        if !self.touch(who, address, 4, Kind::Atomic, true)? {
            return Err(Cause::Undefined(format!("LDS at {address:#x}, which an atomic reads,")));
        }
        let old = self.get(address as usize, 4);
        self.put(address as usize, 4, f(old));
        Ok(old)
    }

    /// Whether an access of several words may begin there.
    pub fn aligned(&self, lane: usize, address: u64, bytes: usize, align: usize) -> Result<(), Cause> {
        self.check(lane, address, bytes, align)
    }

    #[inline(always)]
    fn get(&self, at: usize, bytes: usize) -> u32 {
        let mut word = [0; 4];
        word[..bytes].copy_from_slice(&self.bytes[at..at + bytes]);
        u32::from_le_bytes(word)
    }

    #[inline(always)]
    fn put(&mut self, at: usize, bytes: usize, value: u32) {
        self.bytes[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    }

    /// Checks and records an access inside of one word; says whether all of it was written before.
    #[inline(always)]
    fn touch(&mut self, who: Who, address: u64, bytes: usize, kind: Kind, defined: bool) -> Result<bool, Cause> {
        let word = address as usize / 4;
        if bytes == 4 && self.split[word].is_none() {
            return access(&mut self.records[word], &self.at_barrier, who, address, kind, (0xf, defined));
        }
        let record = self.records[word];
        let parts = self.split[word].get_or_insert_with(|| {
            let part = |i: u8| Record { defined: record.defined >> i & 1, ..record };
            Box::new([part(0), part(1), part(2), part(3)])
        });
        let mut all = true;
        for i in 0..bytes {
            let at = address + i as u64;
            all &= access(&mut parts[at as usize % 4], &self.at_barrier, who, at, kind, (1, defined))?;
        }
        Ok(all)
    }
}

/// Checks an access against the record of what was before, and records it.
#[inline(always)]
fn access(
    r: &mut Record,
    at_barrier: &[[Done; 2]],
    who: Who,
    address: u64,
    kind: Kind,
    (mask, defined): (u8, bool),
) -> Result<bool, Cause> {
    let atomics = kind == Kind::Atomic && r.kind == Kind::Atomic;
    if r.writer != NOBODY && !atomics && (r.writer != who.wave || r.kind == Kind::Direct) {
        after_write(r, at_barrier, who, address, kind)?;
    }
    let was_defined = r.defined == mask;
    if kind == Kind::Read {
        if r.read_epoch != who.epoch {
            r.readers = 0;
        }
        (r.read_epoch, r.read_seq, r.reader) = (who.epoch, who.seq, who.wave);
        r.readers |= 1 << who.wave;
        return Ok(was_defined);
    }
    if r.reader != NOBODY && !(r.reader == who.wave && r.readers == 1 << who.wave && kind != Kind::Direct) {
        after_read(r, at_barrier, who, address, kind)?;
    }
    let writer = if atomics && r.writer != who.wave { MANY } else { who.wave };
    (r.write_epoch, r.write_seq, r.writer, r.kind) = (who.epoch, who.seq, writer, kind);
    r.defined = if defined { mask } else { 0 };
    Ok(was_defined)
}

fn name(writer: u8) -> String {
    if writer == MANY { "atomics of several waves have".to_owned() } else { format!("wave {writer} has") }
}

/// What the wave's waits covered at the barrier that began the epoch.
fn settled(at_barrier: &[[Done; 2]], wave: u8, epoch: u32) -> Done {
    if epoch == 0 { Done::default() } else { at_barrier[usize::from(wave)][(epoch - 1) as usize % 2] }
}

#[inline(always)]
fn after_write(r: &Record, at_barrier: &[[Done; 2]], who: Who, address: u64, kind: Kind) -> Result<(), Cause> {
    let own = r.writer == who.wave;
    let done = match r.writer {
        MANY => Done { lgkm: u32::MAX, vm: u32::MAX },
        _ if own => who.done,
        _ => settled(at_barrier, r.writer, who.epoch),
    };
    let done = if r.kind == Kind::Direct { done.vm } else { done.lgkm };
    if (own || r.write_epoch < who.epoch) && done >= r.write_seq {
        return Ok(());
    }
    let verb = if kind == Kind::Read { "reads" } else { "writes" };
    let what = if own {
        format!("wave {} {verb} it before its own load to LDS was waited for", who.wave)
    } else if r.write_epoch >= who.epoch {
        format!("wave {} {verb} what {} written since the last barrier", who.wave, name(r.writer))
    } else {
        format!("wave {} {verb} what wave {} wrote without waiting for it before the barrier", who.wave, r.writer)
    };
    Err(Cause::Race { address, what })
}

#[inline(always)]
fn after_read(r: &Record, at_barrier: &[[Done; 2]], who: Who, address: u64, kind: Kind) -> Result<(), Cause> {
    let others = r.readers & !(1 << who.wave);
    if others != 0 && r.read_epoch >= who.epoch {
        let what =
            format!("wave {} writes what wave {} has read since the last barrier", who.wave, others.trailing_zeros());
        return Err(Cause::Race { address, what });
    }
    let done = if r.reader == who.wave { who.done } else { settled(at_barrier, r.reader, who.epoch) };
    // A wave's own DS instructions stay in order; a load to LDS does not stay behind its reads.
    if done.lgkm < r.read_seq && (r.reader != who.wave || kind == Kind::Direct) {
        let what = format!("wave {} writes what wave {} read without waiting for it", who.wave, r.reader);
        return Err(Cause::Race { address, what });
    }
    Ok(())
}
