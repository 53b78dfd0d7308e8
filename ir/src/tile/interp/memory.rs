//! Views on buffers: which bytes an access touches, and who touched them before.

use crate::dtype::DType;

/// A parameter bound to a buffer, its symbols evaluated.
pub(super) struct Bound {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<i128>,
    pub(super) strides: Vec<i128>,
    pub(super) buffer: usize,
    pub(super) base: i128,
}

/// Neighbouring elements of a tile that lie in the view: `count` from tile position `at`, the first at byte `addr`.
pub(super) struct Run {
    pub(super) at: usize,
    pub(super) addr: i128,
    pub(super) step: i128,
    pub(super) count: usize,
}

impl Bound {
    /// The part of a tile that lies in the view. Dim 0 is `rows` if given; other dims start at `start`.
    pub(super) fn runs(&self, start: &[i128], rows: Option<&[i32]>, shape: &[u32]) -> Vec<Run> {
        let rank = shape.len();
        // The innermost dim is walked as a run, unless rows choose it.
        let split = if rank == 0 || (rank == 1 && rows.is_some()) { rank } else { rank - 1 };
        let (mut lo, mut hi, mut inner, mut step, mut base) = (0, 1, 1, 0, self.base);
        if split < rank {
            inner = i128::from(shape[split]);
            step = self.strides[split];
            lo = start[split].saturating_neg().max(0);
            hi = self.shape[split].saturating_sub(start[split]).min(inner);
            base = base.saturating_add(start[split].saturating_add(lo).saturating_mul(step));
        }
        let outer: usize = shape[..split].iter().map(|&n| n as usize).product();
        let mut runs = Vec::new();
        'rows: for o in (0..outer).filter(|_| lo < hi) {
            let (mut addr, mut rest) = (base, o);
            for d in (0..split).rev() {
                let i = rest % shape[d] as usize;
                rest /= shape[d] as usize;
                let c = match rows {
                    Some(rows) if d == 0 => i128::from(rows[i]),
                    _ => start[d].saturating_add(i as i128),
                };
                if c < 0 || c >= self.shape[d] {
                    continue 'rows;
                }
                addr = addr.saturating_add(c.saturating_mul(self.strides[d]));
            }
            runs.push(Run { at: o * inner as usize + lo as usize, addr, step, count: (hi - lo) as usize });
        }
        runs
    }

    /// View coordinates of the element at a tile position.
    pub(super) fn coordinates(&self, start: &[i128], rows: Option<&[i32]>, shape: &[u32], mut at: usize) -> Vec<i128> {
        let mut index = vec![0; shape.len()];
        for d in (0..shape.len()).rev() {
            let i = at % shape[d] as usize;
            at /= shape[d] as usize;
            index[d] = match rows {
                Some(rows) if d == 0 => i128::from(rows[i]),
                _ => start[d].saturating_add(i as i128),
            };
        }
        index
    }
}

/// Which blocks touched each byte of each buffer: 0 none, n block n-1, [`MANY`] several.
pub(super) struct Races {
    pub(super) readers: Vec<Vec<u32>>,
    pub(super) writers: Vec<Vec<u32>>,
}

pub(super) const MANY: u32 = u32::MAX;

impl Races {
    /// Records an access; the block (number + 1) it conflicts with, if any.
    pub(super) fn touch(&mut self, buffer: usize, byte: usize, block: u32, write: bool) -> Option<u32> {
        let (reader, writer) = (&mut self.readers[buffer][byte], &mut self.writers[buffer][byte]);
        let foreign = |b: u32| (b != 0 && b != block).then_some(b);
        if write {
            let clash = foreign(*writer).or(foreign(*reader));
            *writer = block;
            return clash;
        }
        *reader = if *reader == 0 || *reader == block { block } else { MANY };
        foreign(*writer)
    }
}

impl Run {
    /// Byte of element `e`; the run was checked to lie in its buffer.
    pub(super) fn byte(&self, e: usize) -> usize {
        (self.addr + self.step * e as i128) as usize
    }

    pub(super) fn read<T, const N: usize>(&self, memory: &[u8], tile: &mut [T], decode: impl Fn([u8; N]) -> T) {
        let tile = &mut tile[self.at..self.at + self.count];
        if self.step == N as i128 {
            let (first, end) = (self.byte(0), self.byte(self.count));
            for (x, code) in tile.iter_mut().zip(memory[first..end].as_chunks::<N>().0) {
                *x = decode(*code);
            }
            return;
        }
        for (e, x) in tile.iter_mut().enumerate() {
            if let Some(code) = memory[self.byte(e)..].first_chunk() {
                *x = decode(*code);
            }
        }
    }

    pub(super) fn write<T: Copy, const N: usize>(&self, memory: &mut [u8], tile: &[T], encode: impl Fn(T) -> [u8; N]) {
        for (e, &x) in tile[self.at..self.at + self.count].iter().enumerate() {
            let at = self.byte(e);
            memory[at..at + N].copy_from_slice(&encode(x));
        }
    }
}
