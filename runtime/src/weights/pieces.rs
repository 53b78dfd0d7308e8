//! Pieces of weights: what each is made of, and the threads that make them.

use super::random::{Block, Sequence};
use super::{PIECE_BYTES, Part};
use dsc_ir::DType;
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::graph::Quant;
use std::sync::Mutex;

/// Bytes of a weight that are made together.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    /// First byte, from the weight's start.
    pub(crate) at: usize,
    /// How many.
    pub(crate) bytes: usize,
    /// How.
    pub(crate) work: Work<'a>,
}

impl Piece<'_> {
    /// Whether it repeats a [`Block`].
    pub(crate) fn is_block(&self) -> bool {
        matches!(self.work, Work::Block(_))
    }
}

/// How a piece is made.
#[derive(Clone, Copy)]
pub(crate) enum Work<'a> {
    /// Rows of a part from this one on, converted.
    Convert(Part<'a>, usize, DType),
    /// Rows of a part from this one on, copied.
    Copy(Part<'a>, usize),
    /// These bytes from the first on, copied.
    Bytes(&'a [u8]),
    /// Scales of a part.
    Scales(Part<'a>, Quant),
    /// Rows of a rope table from this one on.
    Rope(&'a [f32], usize),
    /// Rows of a Hadamard matrix from this one on.
    Hadamard(u32, usize, DType),
    /// Random values, repeated.
    Block(Block<'a>),
    /// Random values, computed: elements from this one on.
    Sequence(Sequence, usize, DType),
}

/// Cuts a weight into pieces, from its start on.
#[derive(Default)]
pub(super) struct Cutter<'a> {
    pub(super) pieces: Vec<Piece<'a>>,
    at: usize,
}

impl<'a> Cutter<'a> {
    /// Adds one piece.
    pub(super) fn push(&mut self, bytes: usize, work: Work<'a>) {
        if bytes > 0 {
            self.pieces.push(Piece { at: self.at, bytes, work });
            self.at += bytes;
        }
    }

    /// Adds rows in pieces of about [`PIECE_BYTES`]; `work` is told the first row of each.
    pub(super) fn rows(&mut self, rows: usize, row_bytes: usize, work: impl Fn(usize) -> Work<'a>) {
        let step = (PIECE_BYTES / row_bytes.max(1)).max(1);
        for row in (0..rows).step_by(step) {
            self.push(row_bytes * step.min(rows - row), work(row));
        }
    }

    /// Leaves bytes out up to a multiple of `bytes`.
    pub(super) fn align(&mut self, bytes: usize) {
        self.at = self.at.next_multiple_of(bytes);
    }
}

/// Threads that make pieces, and how far they are.
pub(crate) struct Filler<'a> {
    threads: usize,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    total: u64,
    done: u64,
    /// Value of each e4m3 code.
    codes: [f32; 256],
}

struct Job<'d, 'a> {
    dest: &'d mut [u8],
    work: Work<'a>,
}

impl<'a> Filler<'a> {
    /// For `total` bytes in all; `progress` is told how many are made, and the total.
    pub(crate) fn new(threads: usize, total: u64, progress: &'a (dyn Fn(u64, u64) + Sync)) -> Filler<'a> {
        let codes = std::array::from_fn(|code| e4m3_to_f32(code as u8));
        Filler { threads, progress, total, done: 0, codes }
    }

    /// Counts bytes that were made elsewhere.
    pub(crate) fn count(&mut self, bytes: u64) {
        self.done += bytes;
        (self.progress)(self.done, self.total);
    }

    /// Makes pieces at their places in `dest`, which are ascending, and zeros between them.
    pub(crate) fn fill<'p>(&mut self, dest: &mut [u8], pieces: impl Iterator<Item = (usize, Piece<'p>)>) {
        self.carve(dest, pieces, true);
    }

    /// As [`Filler::fill`], where `dest` is zeros.
    pub(crate) fn fill_zeros<'p>(&mut self, dest: &mut [u8], pieces: impl Iterator<Item = (usize, Piece<'p>)>) {
        self.carve(dest, pieces, false);
    }

    fn carve<'p>(&mut self, dest: &mut [u8], pieces: impl Iterator<Item = (usize, Piece<'p>)>, clear: bool) {
        let (mut rest, mut at, mut jobs) = (dest, 0, Vec::new());
        for (start, piece) in pieces {
            let (gap, behind) = rest.split_at_mut(start - at);
            if clear {
                gap.fill(0);
            }
            let (dest, behind) = behind.split_at_mut(piece.bytes);
            jobs.push(Job { dest, work: piece.work });
            (rest, at) = (behind, start + piece.bytes);
        }
        self.run(jobs);
    }

    fn run(&mut self, jobs: Vec<Job<'_, '_>>) {
        let threads = self.threads.clamp(1, jobs.len().max(1));
        let queue = Mutex::new((jobs.into_iter(), self.done));
        let worker = || {
            let (mut row, mut made) = (Vec::new(), 0);
            loop {
                let job = {
                    // A panic of another worker ends the scope anyway.
                    let mut queue = queue.lock().unwrap_or_else(|e| e.into_inner());
                    queue.1 += made;
                    if made > 0 {
                        (self.progress)(queue.1, self.total);
                    }
                    queue.0.next()
                };
                let Some(job) = job else { return };
                made = job.dest.len() as u64;
                job.run(&mut row, &self.codes);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(worker);
            }
            worker();
        });
        self.done = queue.into_inner().unwrap_or_else(|e| e.into_inner()).1;
    }
}

impl Job<'_, '_> {
    fn run(self, row: &mut Vec<f32>, codes: &[f32; 256]) {
        if self.dest.is_empty() {
            return;
        }
        match self.work {
            Work::Convert(part, first, dtype) => {
                for (i, dest) in self.dest.chunks_exact_mut(part.columns() * dtype.bytes()).enumerate() {
                    part.row_f32(first + i, row, codes);
                    store(row, dtype, dest);
                }
            }
            Work::Copy(part, first) => {
                for (i, dest) in self.dest.chunks_exact_mut(part.columns() * part.view.dtype.size()).enumerate() {
                    dest.copy_from_slice(part.row(first + i));
                }
            }
            Work::Bytes(bytes) => self.dest.copy_from_slice(&bytes[..self.dest.len()]),
            Work::Scales(part, quant) => {
                let across = part.columns().div_ceil(quant.block[1] as usize);
                let first =
                    [part.spec.rows[0] / quant.block[0], part.spec.cols[0] / quant.block[1]].map(|n| n as usize);
                for (i, dest) in self.dest.chunks_exact_mut(4).enumerate() {
                    dest.copy_from_slice(&part.scale(first[0] + i / across, first[1] + i % across).to_le_bytes());
                }
            }
            Work::Rope(frequencies, first) => {
                for (i, dest) in self.dest.chunks_exact_mut(8 * frequencies.len()).enumerate() {
                    let angle = |f: &f32| f64::from((first + i) as f32 * f);
                    row.clear();
                    row.extend(frequencies.iter().map(|f| angle(f).cos() as f32));
                    row.extend(frequencies.iter().map(|f| angle(f).sin() as f32));
                    store(row, DType::F32, dest);
                }
            }
            Work::Hadamard(n, first, dtype) => {
                let size = f64::from(n).powf(-0.5) as f32;
                for (i, dest) in self.dest.chunks_exact_mut(n as usize * dtype.bytes()).enumerate() {
                    let i = (first + i) as u32;
                    row.clear();
                    row.extend((0..n).map(|j| if (i & j).count_ones().is_multiple_of(2) { size } else { -size }));
                    store(row, dtype, dest);
                }
            }
            Work::Block(block) => {
                for (at, range) in block.ranges(self.dest.len()) {
                    self.dest[at..at + range.len()].copy_from_slice(&block.bytes[range]);
                }
            }
            Work::Sequence(sequence, first, dtype) => {
                row.clear();
                row.extend((first..first + self.dest.len() / dtype.bytes()).map(|i| sequence.at(i as u64)));
                store(row, dtype, self.dest);
            }
        }
    }
}

/// Writes values as `dtype`, rounded to nearest even.
pub(super) fn store(values: &[f32], dtype: DType, dest: &mut [u8]) {
    fn each<const N: usize>(values: &[f32], dest: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
        for (x, dest) in values.iter().zip(dest.chunks_exact_mut(N)) {
            dest.copy_from_slice(&encode(*x));
        }
    }
    match dtype {
        DType::F32 => each(values, dest, f32::to_le_bytes),
        DType::Bf16 => each(values, dest, |x| half::bf16::from_f32(x).to_le_bytes()),
        DType::F16 => each(values, dest, |x| half::f16::from_f32(x).to_le_bytes()),
        DType::E4m3 => each(values, dest, |x| [f32_to_e4m3(x)]),
        DType::I32 | DType::Bool => unreachable!("no weight is converted to {dtype}"),
    }
}
