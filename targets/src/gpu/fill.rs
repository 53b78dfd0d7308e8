//! Tiles on their way to shared and global memory: who of the threads moves what.

use super::emit::Emitter;
use super::evaluate::power_of_two_in;
use super::mlir::{Ty, Val, f32, i32};
use super::schedule::matrix;
use dsc_ir::sched::{Buffer, Place};
use dsc_ir::tile::{self, Index, ValueId};

/// Rounds of an elementwise loop that are written out rather than looped over.
pub const UNROLLED: u32 = 8;
/// Rounds in flight in a loop.
const IN_FLIGHT: u32 = 4;

/// A tile on its way to its buffer.
pub struct Fill<'a> {
    /// What makes it.
    pub op: &'a tile::Op,
    /// The tile.
    pub r: ValueId,
    /// Where it goes.
    pub b: &'a Buffer,
    /// Elements of a chunk.
    n: u32,
    /// Whether the buffer has elements as matrix instructions take them.
    ready: bool,
}

impl Fill<'_> {
    /// Chunks of the buffer, padding included.
    pub fn chunks(&self) -> u32 {
        self.b.shape[0] * (self.b.shape[1] / self.n)
    }

    /// Chunks of a thread.
    pub fn rounds(&self, threads: u32) -> u32 {
        self.chunks().div_ceil(threads)
    }
}

impl<'a> Emitter<'a> {
    /// Runs `body` for chunk numbers `0..total`, shared out among the threads; several rounds are evaluated before the first of
    /// them is stored.
    pub fn each_chunk<T>(
        &mut self,
        total: u32,
        mut evaluate: impl FnMut(&mut Self, Val) -> T,
        mut store: impl FnMut(&mut Self, Val, T, Val),
    ) {
        let threads = self.t.threads;
        let rounds = total.div_ceil(threads);
        let mut group = |e: &mut Self, first: Val, rounds: u32, last: bool| {
            let mut pending = Vec::new();
            for i in 0..rounds {
                let partial = last && i + 1 == rounds && !total.is_multiple_of(threads);
                let (clamped, ok) = e.round(first, i, partial.then_some(total));
                let value = evaluate(e, clamped);
                pending.push((clamped, value, ok));
            }
            for (c, value, ok) in pending {
                store(e, c, value, ok);
            }
        };
        let tid = self.t.tid;
        if rounds <= UNROLLED {
            return group(self, tid, rounds, true);
        }
        // The last rounds, and those that do not fill a group, come after the loop.
        let looped = (rounds - 1) / IN_FLIGHT * IN_FLIGHT;
        let l = self.t.f.open_loop(tid, i32((looped * threads).into()), &[]);
        let [inside, after] = [looped - IN_FLIGHT, looped].map(|rounds| i64::from((rounds + 1) * threads));
        self.t.f.bound_counter(&l, inside, after);
        group(self, l.args[0], IN_FLIGHT, false);
        self.t.f.close_loop(&l, i32((IN_FLIGHT * threads).into()), &[]);
        group(self, l.done[0], rounds - looped, true);
    }

    /// The chunk of a round, and whether there is one: of `total`, if this thread may be beyond them.
    pub fn round(&mut self, first: Val, i: u32, total: Option<u32>) -> (Val, Val) {
        let c = self.t.f.add(first, i32((i * self.t.threads).into()));
        let Some(total) = total else { return (c, Val::Int(1, Ty::I1)) };
        let ok = self.t.f.cmp("slt", c, i32(total.into()));
        (self.t.f.select(ok, c, i32(0)), ok)
    }

    /// How a tile is evaluated into its buffer.
    pub fn fill(&self, op: &'a tile::Op, r: ValueId, b: &'a Buffer) -> Fill<'a> {
        let (shape, dtype) = (self.shape(r), self.dtype(r));
        let cols = matrix(shape)[1];
        let n = self.width_of(op, r).min(power_of_two_in(b.shape[1])).min(power_of_two_in(cols)).min(16);
        let n = n.min((self.t.piece.unwrap_or(32) / dtype.bytes() as u32).max(1));
        let ready = self.ready.iter().any(|&id| std::ptr::eq(self.buffer(id), b));
        Fill { op, r, b, n, ready }
    }

    /// Row and column of a chunk of the buffer; where to read it from, which is its place or the tile's beginning; and whether that
    /// is inside the tile.
    pub fn place_of(&mut self, fill: &Fill, c: Val) -> ([Val; 2], [Val; 2], Val) {
        let [rows, cols] = matrix(self.shape(fill.r));
        let [all_rows, all_cols] = fill.b.shape;
        let per_row = all_cols / fill.n;
        let row = self.t.f.div(c, per_row);
        let col = self.t.f.rem(c, per_row);
        let col = self.t.f.mul(col, i32(fill.n.into()));
        let mut ok = Val::Int(1, Ty::I1);
        let (mut from_row, mut from_col) = (row, col);
        if all_rows > rows {
            let inside = self.t.f.cmp("slt", row, i32(rows.into()));
            ok = self.t.f.bin("and", ok, inside);
            from_row = self.t.f.select(inside, row, i32(0));
        }
        if all_cols > cols {
            let inside = self.t.f.cmp("slt", col, i32(cols.into()));
            ok = self.t.f.bin("and", ok, inside);
            from_col = self.t.f.select(inside, col, i32(0));
        }
        ([row, col], [from_row, from_col], ok)
    }

    /// A piece of a tile, as its op makes it: by words, where it only moves and that can be.
    pub fn evaluate_fill(&mut self, fill: &Fill<'a>, c: Val) -> Vec<Val> {
        let (_, [row, col], _) = self.place_of(fill, c);
        let shape = self.shape(fill.r);
        let mut at = self.delinear(row, &shape[..shape.len().saturating_sub(1)]);
        if !shape.is_empty() {
            at.push(col);
        }
        let held = match fill.op {
            tile::Op::Map { inputs, body } if body.insts.is_empty() && self.place(inputs[0]) == &Place::Held => {
                self.held_words(inputs[0], &at, fill.n)
            }
            _ => None,
        };
        if let Some(words) = held {
            return words;
        }
        let moved = if self.t.arch.moves_words() { self.source(fill.op, &at, fill.n) } else { None };
        let Some(access) = moved else { return self.evaluate(fill.op, fill.r, &at, fill.n) };
        let words = self.load_from(&access, true);
        self.masked(&access, words)
    }

    /// A chunk of a tile as its buffer holds it.
    pub fn chunk_of(&mut self, fill: &Fill<'a>, c: Val) -> Vec<Val> {
        let values = self.evaluate_fill(fill, c);
        let values = if fill.ready { self.operand(self.dtype(fill.r), &values) } else { values };
        let (.., ok) = self.place_of(fill, c);
        let zero = if values[0].ty() == Ty::F32 { f32(0.0) } else { Val::Int(0, values[0].ty()) };
        values.into_iter().map(|v| self.t.f.select(ok, v, zero)).collect()
    }

    /// Evaluates a tile into its buffer; padding is zero.
    pub fn materialise(&mut self, op: &'a tile::Op, r: ValueId, b: &'a Buffer) {
        let fill = self.fill(op, r, b);
        if self.is_put_down(r) {
            return self.put_down(&fill);
        }
        self.each_chunk(
            fill.chunks(),
            |e, c| e.chunk_of(&fill, c),
            |e, c, values, ok| {
                let ([row, col], ..) = e.place_of(&fill, c);
                let dtype = e.dtype(r);
                e.guarded(ok, |e| e.store_buffer(b, dtype, row, col, &values));
            },
        );
    }

    /// Tiles side by side in one buffer.
    pub fn concat(&mut self, r: ValueId, xs: &'a [ValueId], axis: usize) {
        let Place::Shared(b) = self.place(r) else { unreachable!("concatenations are in shared memory") };
        let (b, dtype, shape) = (self.buffer(*b), self.dtype(r), self.shape(r));
        if self.concat_in_turns(r, xs, axis, b) {
            return;
        }
        let last = shape.len() - 1;
        let mut offset = 0u32;
        for &x in xs {
            let from = self.shape(x);
            let mut n = self.width(x);
            if axis == last && offset > 0 {
                n = n.min(power_of_two_in(offset));
            }
            let total = from.iter().product::<u32>() / n;
            self.each_chunk(
                total,
                |e, c| {
                    let at = e.first_of(c, n, from);
                    e.chunk(x, &at, n)
                },
                |e, c, values, ok| {
                    let mut at = e.first_of(c, n, from);
                    at[axis] = e.t.f.add(at[axis], i32(offset.into()));
                    let row = e.linear(&at[..last], &shape[..last]);
                    e.guarded(ok, |e| e.store_buffer(b, dtype, row, at[last], &values));
                },
            );
            offset += from[axis];
        }
    }

    /// Widest chunk that a view takes at that index.
    fn store_width(&self, view: ValueId, value: ValueId) -> u32 {
        let bytes = self.dtype(view).bytes() as u32;
        self.width(value).min((16 / bytes).max(1))
    }

    /// Stores a tile to a view.
    pub fn store(&mut self, view: ValueId, index: &'a [Index], value: ValueId) {
        if self.is_fragment(value) {
            return self.store_fragment(view, index, value);
        }
        let shape = self.shape(value);
        let n = self.store_width(view, value);
        let total = (shape.iter().product::<u32>() / n).max(1);
        self.each_chunk(
            total,
            |e, c| {
                let at = e.first_of(c, n, shape);
                e.chunk(value, &at, n)
            },
            |e, c, values, ok| {
                let at = e.first_of(c, n, shape);
                e.store_global(view, index, &at, (None, ok), &values);
            },
        );
    }

    /// Stores a tile to rows of a view that are chosen by number.
    pub fn scatter(&mut self, view: ValueId, rows: ValueId, index: &'a [Index], value: ValueId) {
        let shape = self.shape(value);
        let n = if shape.len() == 1 { 1 } else { self.store_width(view, value) };
        let total = (shape.iter().product::<u32>() / n).max(1);
        let mut full = index.to_vec();
        full.insert(0, Index::Const(0));
        self.each_chunk(
            total,
            |e, c| {
                let at = e.first_of(c, n, shape);
                (e.chunk(rows, &at[..1], 1)[0], e.chunk(value, &at, n))
            },
            |e, c, (row, values), ok| {
                let at = e.first_of(c, n, shape);
                e.store_global(view, &full, &at, (Some(row), ok), &values);
            },
        );
    }
}
