//! Reductions: fragments by registers, shuffles and warps; everything else by groups of threads over chunks that are read where
//! they lie. The order of additions is fixed by the shape and the number of threads.

use super::emit::Emitter;
use super::evaluate::power_of_two_in;
use super::fragment::Spread;
use super::isa;
use super::mlir::{Fn, Ty, Val, f32, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Buffer, Place};
use dsc_ir::tile::{ReduceKind, ValueId};

/// Rounds of a reduction that are written out rather than looped over.
const UNROLLED: u32 = 8;
/// The same where each is a load of the thread's own: all are on their way at once.
pub const LOADED: u32 = 32;
/// Bytes that all banks of shared memory give at once.
const BANKS_BYTES: u32 = 128;

/// Whether all threads make each of a few results together, of so many lines of that length whose elements are so far apart. Where these may be
/// combined in any order, or there are two, each wave has a line that is short for it: what waves do together they do one line after the other.
pub fn by_block([lines, len, apart]: [u32; 3], (kind, dtype): (ReduceKind, DType), [threads, lanes]: [u32; 2]) -> bool {
    let any_order = kind == ReduceKind::Max || dtype == DType::I32;
    let short = len <= 2 || any_order && len <= UNROLLED * lanes;
    apart == 1 && (lines == 1 || lines <= threads / lanes && !short)
}

impl<'a> Emitter<'a> {
    /// Reduces `x` along an axis to `r`; the value itself if that is a single element.
    pub fn reduce(
        &mut self,
        r: ValueId,
        x: ValueId,
        axis: usize,
        kind: ReduceKind,
        scratch: Option<u32>,
    ) -> Option<Val> {
        let to = match self.place(r) {
            Place::Shared(b) => Some(self.buffer(*b)),
            _ => None,
        };
        if let Place::Fragment(f) = self.place(x) {
            let s = Spread::new(self, *f, self.shape(x));
            if self.is_line(r) {
                let lines = self.reduce_to_lines(x, &s, kind, scratch);
                self.set_registers(r, &lines);
                return None;
            }
            return self.reduce_fragment(x, &s, axis, kind, scratch, to);
        }
        let shape = self.shape(x);
        let outer: u32 = shape[..axis].iter().product();
        let inner: u32 = shape[axis + 1..].iter().product();
        let threads = [self.t.threads, self.t.arch.lanes()];
        let whole = by_block([outer, shape[axis], inner], (kind, self.dtype(x)), threads);
        match (inner, to) {
            (1, None) => self.reduce_by_block(x, axis, kind, outer, scratch, None),
            (1, Some(to)) if whole => self.reduce_by_block(x, axis, kind, outer, scratch, Some(to)),
            (1, Some(to)) => {
                self.reduce_by_groups(r, x, axis, kind, outer, to);
                None
            }
            (_, Some(to)) => {
                self.reduce_columns(r, x, axis, kind, to);
                None
            }
            // A single element, but axes of one element follow the reduced one.
            (_, None) => self.reduce_by_block(x, axis, kind, outer, scratch, None),
        }
    }

    fn combine(&mut self, kind: ReduceKind, a: Val, b: Val) -> Val {
        combine(&mut self.t.f, kind, a, b)
    }

    /// The values of groups of `n` neighbouring lanes, each combined in its lane [`combined_lane`](isa::Isa::combined_lane).
    fn combine_lanes(&mut self, kind: ReduceKind, v: Val, n: u32) -> Val {
        self.t.arch.combine_lanes(&mut self.t, v, n, &|f, a, b| combine(f, kind, a, b))
    }

    /// Pairs first, so that the chain is short.
    fn combine_all(&mut self, kind: ReduceKind, values: &[Val]) -> Val {
        let mut values = values.to_vec();
        while values.len() > 1 {
            values = values
                .chunks(2)
                .map(|pair| if let [a, b] = *pair { self.combine(kind, a, b) } else { pair[0] })
                .collect();
        }
        values[0]
    }

    fn shuffled(&mut self, kind: ReduceKind, mut v: Val, masks: &[u32]) -> Val {
        for &mask in masks {
            let other = self.t.arch.shuffle_xor(&mut self.t, v, mask);
            v = self.combine(kind, v, other);
        }
        v
    }

    /// Reads `n` partial results that lie side by side in scratch memory, and combines them.
    fn gathered(&mut self, kind: ReduceKind, first: Val, n: u32, ty: Ty) -> Val {
        let values: Vec<Val> = (0..n)
            .map(|i| {
                let byte = self.t.f.add(first, i32((4 * i).into()));
                self.t.load_shared(byte, ty, 1)[0]
            })
            .collect();
        self.combine_all(kind, &values)
    }

    fn reduce_fragment(
        &mut self,
        x: ValueId,
        s: &Spread,
        axis: usize,
        kind: ReduceKind,
        scratch: Option<u32>,
        to: Option<&'a Buffer>,
    ) -> Option<Val> {
        let values = self.registers_of(x);
        let ty = values[0].ty();
        let none = identity(kind, ty);
        let (warps, outputs) = (s.warps[axis], s.shape[1 - axis]);
        // This thread's partial results: one a row, or one a column of its groups.
        let mut partial: Vec<(Val, Val, Val)> = Vec::new();
        if axis == 1 {
            let lines = self.rows_of_wave(s, kind, &values);
            partial.extend(s.rows.iter().zip(lines).map(|(&(row, ok), v)| (row, ok, v)));
        } else {
            for gi in 0..s.groups.len() {
                for e in 0..s.width {
                    let mut all = Vec::new();
                    for (ri, &(_, ok)) in s.rows.iter().enumerate() {
                        all.push(self.t.f.select(ok, values[s.register(ri, gi, e)], none));
                    }
                    let v = self.combine_all(kind, &all);
                    let v = self.shuffled(kind, v, &s.row_lanes);
                    let col = self.t.f.add(s.groups[gi].0, i32(e.into()));
                    let exists = self.column_exists(s, gi, e);
                    partial.push((col, exists, v));
                }
            }
        }
        let lanes: u32 = if axis == 1 { &s.column_lanes } else { &s.row_lanes }.iter().sum();
        let lane = self.t.f.bin("and", s.lane, i32(lanes.into()));
        let first_lane = self.t.f.cmp("eq", lane, i32(0));
        if warps == 1
            && let Some(to) = to
        {
            for (at, ok, v) in partial {
                let ok = self.t.f.bin("and", first_lane, ok);
                let byte = self.output_byte(to, axis, at);
                self.guarded(ok, |e| e.t.store_shared(byte, &[v]));
            }
            return None;
        }
        let scratch = self.needed(scratch, "a reduction across warps");
        for (at, ok, v) in partial {
            let ok = self.t.f.bin("and", first_lane, ok);
            let slot = self.t.f.mul(at, i32(warps.into()));
            let slot = self.t.f.add(slot, s.warp[axis]);
            let byte = self.t.f.mul(slot, i32(4));
            let byte = self.t.f.add(byte, i32(scratch.into()));
            self.guarded(ok, |e| e.t.store_shared(byte, &[v]));
        }
        self.t.barrier();
        let Some(to) = to else {
            return Some(self.gathered(kind, i32(scratch.into()), warps, ty));
        };
        self.each_output(outputs, |e, at| {
            let byte = e.t.f.mul(at, i32((4 * warps).into()));
            let byte = e.t.f.add(byte, i32(scratch.into()));
            let v = e.gathered(kind, byte, warps, ty);
            let to = e.output_byte(to, axis, at);
            e.t.store_shared(to, &[v]);
        });
        None
    }

    /// The rows of a fragment, each combined over the columns that a wave has, in all its lanes.
    fn rows_of_wave(&mut self, s: &Spread, kind: ReduceKind, values: &[Val]) -> Vec<Val> {
        let none = identity(kind, values[0].ty());
        let mut lines = Vec::new();
        for ri in 0..s.rows.len() {
            let mut all = Vec::new();
            for gi in 0..s.groups.len() {
                for e in 0..s.width {
                    let exists = self.column_exists(s, gi, e);
                    all.push(self.t.f.select(exists, values[s.register(ri, gi, e)], none));
                }
            }
            let v = self.combine_all(kind, &all);
            lines.push(self.shuffled(kind, v, &s.column_lanes));
        }
        lines
    }

    /// The rows of a fragment, each combined, for all who have it: by scratch memory where several waves do.
    fn reduce_to_lines(&mut self, x: ValueId, s: &Spread, kind: ReduceKind, scratch: Option<u32>) -> Vec<Val> {
        let values = self.registers_of(x);
        let lines = self.rows_of_wave(s, kind, &values);
        let waves = s.warps[1];
        if waves == 1 {
            return lines;
        }
        let scratch = self.needed(scratch, "a reduction across waves");
        let byte = |e: &mut Self, row: Val, wave: Val| {
            let slot = e.t.f.mul(row, i32(waves.into()));
            let slot = e.t.f.add(slot, wave);
            let byte = e.t.f.mul(slot, i32(4));
            e.t.f.add(byte, i32(scratch.into()))
        };
        let lane = self.t.f.bin("and", s.lane, i32(s.column_lanes.iter().sum::<u32>().into()));
        let first = self.t.f.cmp("eq", lane, i32(0));
        for (&(row, exists), &v) in s.rows.iter().zip(&lines) {
            let ok = self.t.f.bin("and", first, exists);
            let byte = byte(self, row, s.warp[1]);
            self.guarded(ok, |e| e.t.store_shared(byte, &[v]));
        }
        self.t.barrier();
        let all = |e: &mut Self, row: Val| {
            let (mut parts, ty) = (Vec::new(), values[0].ty());
            for wave in (0..waves).step_by(4) {
                let byte = byte(e, row, i32(wave.into()));
                parts.extend(e.t.load_shared(byte, ty, (waves - wave).min(4)));
            }
            e.combine_all(kind, &parts)
        };
        s.rows.iter().map(|&(row, _)| all(self, row)).collect()
    }

    /// Byte of a reduced fragment's element: a column or a row of the result.
    fn output_byte(&mut self, to: &Buffer, axis: usize, at: Val) -> Val {
        let step = if axis == 1 { to.pitch } else { 4 };
        let byte = self.t.f.mul(at, i32(step.into()));
        self.t.f.add(byte, i32(to.offset.into()))
    }

    /// Runs `body` for outputs `0..n`, one a thread at a time.
    fn each_output(&mut self, n: u32, mut body: impl FnMut(&mut Self, Val)) {
        let threads = self.t.threads;
        for first in (0..n).step_by(threads as usize) {
            let at = self.t.f.add(self.t.tid, i32(first.into()));
            let ok = if first + threads <= n { Val::Int(1, Ty::I1) } else { self.t.f.cmp("slt", at, i32(n.into())) };
            self.guarded(ok, |e| body(e, at));
        }
    }

    /// `body` for `0..count`, carrying values; as straight code up to so many rounds.
    fn repeat(
        &mut self,
        (count, straight): (u32, u32),
        mut carried: Vec<Val>,
        mut body: impl FnMut(&mut Self, Val, &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        if count <= straight {
            for i in 0..count {
                carried = body(self, i32(i.into()), &carried);
            }
            return carried;
        }
        let looped = count / 4 * 4;
        let l = self.t.f.open_loop(i32(0), i32(looped.into()), &carried);
        carried = l.args[1..].to_vec();
        for i in 0..4 {
            let at = self.t.f.add(l.args[0], i32(i));
            carried = body(self, at, &carried);
        }
        self.t.f.close_loop(&l, i32(4), &carried);
        carried = l.done[1..].to_vec();
        for i in looped..count {
            carried = body(self, i32(i.into()), &carried);
        }
        carried
    }

    /// Elements `first + i * step` (in chunks of `n`) of a line of `x`, combined.
    #[allow(clippy::too_many_arguments)]
    fn line(
        &mut self,
        x: ValueId,
        axis: usize,
        lead: &[Val],
        kind: ReduceKind,
        (first, step, n): (Val, u32, u32),
        len: u32,
    ) -> Val {
        let ty = isa::stored(self.dtype(x));
        let none = identity(kind, ty);
        let chunks = len / n;
        let rank = self.shape(x).len();
        let acc = self.repeat((chunks.div_ceil(step), UNROLLED), vec![none; n as usize], |e, i, acc| {
            let skip = e.t.f.mul(i, i32(step.into()));
            let c = e.t.f.add(first, skip);
            let partial = !chunks.is_multiple_of(step);
            let ok = if partial { e.t.f.cmp("slt", c, i32(chunks.into())) } else { Val::Int(1, Ty::I1) };
            let c = if partial { e.t.f.select(ok, c, i32(0)) } else { c };
            let mut at = lead.to_vec();
            at.push(e.t.f.mul(c, i32(n.into())));
            at.resize(rank, i32(0));
            let values = if axis + 1 == rank { e.chunk(x, &at, n) } else { e.broadcast(x, &at, 1) };
            let mut next = Vec::new();
            for (&a, v) in acc.iter().zip(values) {
                let v = e.t.f.select(ok, v, none);
                next.push(e.combine(kind, a, v));
            }
            next
        });
        self.combine_all(kind, &acc)
    }

    fn line_width(&self, x: ValueId, axis: usize) -> u32 {
        if axis + 1 == self.shape(x).len() { self.width(x).min(8) } else { 1 }
    }

    /// The whole block on each of a few outputs.
    fn reduce_by_block(
        &mut self,
        x: ValueId,
        axis: usize,
        kind: ReduceKind,
        outer: u32,
        scratch: Option<u32>,
        to: Option<&'a Buffer>,
    ) -> Option<Val> {
        let shape = self.shape(x);
        let n = self.line_width(x, axis);
        let (threads, lanes) = (self.t.threads, self.t.arch.lanes());
        let warps = threads / lanes;
        let ty = isa::stored(self.dtype(x));
        let (warp, lane) = self.t.lanes(lanes);
        let has_it = self.t.f.cmp("eq", lane, i32(self.t.arch.combined_lane(lanes).into()));
        let scratch = self.needed(scratch, "a reduction by a block");
        for o in 0..outer {
            let lead = self.delinear(i32(o.into()), &shape[..axis]);
            let tid = self.t.tid;
            let v = self.line(x, axis, &lead, kind, (tid, threads, n), shape[axis]);
            let v = self.combine_lanes(kind, v, lanes);
            let byte = self.t.f.mul(warp, i32(4));
            let byte = self.t.f.add(byte, i32((scratch + o * warps * 4).into()));
            self.guarded(has_it, |e| e.t.store_shared(byte, &[v]));
        }
        self.t.barrier();
        let Some(to) = to else {
            return Some(self.gathered(kind, i32(scratch.into()), warps, ty));
        };
        self.each_output(outer, |e, o| {
            let byte = e.t.f.mul(o, i32((4 * warps).into()));
            let byte = e.t.f.add(byte, i32(scratch.into()));
            let v = e.gathered(kind, byte, warps, ty);
            let row = e.t.f.mul(o, i32(to.pitch.into()));
            let row = e.t.f.add(row, i32(to.offset.into()));
            e.t.store_shared(row, &[v]);
        });
        None
    }

    /// A group of lanes on each output.
    fn reduce_by_groups(&mut self, r: ValueId, x: ValueId, axis: usize, kind: ReduceKind, outer: u32, to: &'a Buffer) {
        let shape = self.shape(x);
        let n = self.line_width(x, axis);
        let threads = self.t.threads;
        // As many as read all banks at once.
        let least = self.t.piece.map_or(1, |bytes| BANKS_BYTES / bytes);
        let lanes = (threads / outer.next_power_of_two()).clamp(least, self.t.arch.lanes());
        let lanes = lanes.min((shape[axis] / n).next_power_of_two());
        let per_round = threads / lanes;
        let group = self.t.f.div(self.t.tid, lanes);
        let lane = self.t.f.rem(self.t.tid, lanes);
        let has_it = self.t.f.cmp("eq", lane, i32(self.t.arch.combined_lane(lanes).into()));
        let rounds = outer.div_ceil(per_round);
        let result_shape = self.shape(r);
        self.repeat((rounds, UNROLLED), Vec::new(), |e, round, _| {
            let skip = e.t.f.mul(round, i32(per_round.into()));
            let o = e.t.f.add(group, skip);
            let partial = !outer.is_multiple_of(per_round);
            let ok = if partial { e.t.f.cmp("slt", o, i32(outer.into())) } else { Val::Int(1, Ty::I1) };
            let o = if partial { e.t.f.select(ok, o, i32(0)) } else { o };
            let lead = e.delinear(o, &shape[..axis]);
            let v = e.line(x, axis, &lead, kind, (lane, lanes, n), shape[axis]);
            let v = e.combine_lanes(kind, v, lanes);
            let ok = e.t.f.bin("and", ok, has_it);
            // Of the result's row-major number only the last axis is a column.
            let cols = result_shape.last().copied().unwrap_or(1);
            let (row, col) = (e.t.f.div(o, cols), e.t.f.rem(o, cols));
            let dtype = e.dtype(r);
            e.guarded(ok, |e| e.store_buffer(to, dtype, row, col, &[v]));
            Vec::new()
        });
    }

    /// A thread on neighbouring columns of each output.
    fn reduce_columns(&mut self, r: ValueId, x: ValueId, axis: usize, kind: ReduceKind, to: &'a Buffer) {
        let none = identity(kind, isa::stored(self.dtype(x)));
        let columns = self.columns(x, axis);
        let Columns { n, total, lines, .. } = columns;
        let (last, dtype) = (columns.reduced.len() - 1, self.dtype(r));
        let store = |e: &mut Self, c: Val, values: Vec<Val>, ok: Val| {
            let at = e.first_of(c, n, &columns.reduced);
            let row = e.linear(&at[..last], &columns.reduced[..last]);
            e.guarded(ok, |e| e.store_buffer(to, dtype, row, at[last], &values));
        };
        if self.is_put_down(r) {
            for i in 0..total.div_ceil(self.t.threads) {
                let (c, ok) = self.piece_round(total, i);
                let mut acc = vec![none; n as usize];
                for k in 0..lines {
                    self.set_piece(i * lines + k);
                    let values = self.column(x, &columns, c, k);
                    acc = acc.iter().zip(values).map(|(&a, v)| self.combine(kind, a, v)).collect();
                }
                store(self, c, acc, ok);
            }
            return;
        }
        self.each_chunk(
            total,
            |e, c| {
                let at = e.first_of(c, n, &columns.reduced);
                e.repeat((lines, LOADED), vec![none; n as usize], |e, i, acc| {
                    let mut at = at.clone();
                    at[axis] = i;
                    let values = e.chunk(x, &at, n);
                    acc.iter().zip(values).map(|(&a, v)| e.combine(kind, a, v)).collect()
                })
            },
            store,
        );
    }

    /// How threads share the columns of a tile that is reduced along `axis`.
    pub fn columns(&self, x: ValueId, axis: usize) -> Columns {
        let shape = self.shape(x);
        let mut n = self.width(x).min(4).min(power_of_two_in(shape[shape.len() - 1]));
        let mut reduced = shape.to_vec();
        reduced[axis] = 1;
        let outputs = reduced.iter().product::<u32>();
        // Few outputs: narrower loads, so that all threads have some.
        while n > 1 && outputs / n < self.t.threads {
            n /= 2;
        }
        Columns { axis, n, total: outputs / n, lines: shape[axis], reduced }
    }

    /// Neighbours of a line of the columns of chunk `c`.
    pub fn column(&mut self, x: ValueId, columns: &Columns, c: Val, line: u32) -> Vec<Val> {
        let mut at = self.first_of(c, columns.n, &columns.reduced);
        at[columns.axis] = i32(line.into());
        self.chunk(x, &at, columns.n)
    }
}

/// Columns of a tile that is reduced along another axis than its last, by chunks of neighbours.
pub struct Columns {
    axis: usize,
    /// Neighbours of a chunk.
    n: u32,
    /// Chunks.
    pub total: u32,
    /// Elements that make one of the result.
    pub lines: u32,
    /// The result's shape.
    reduced: Vec<u32>,
}

fn combine(f: &mut Fn, kind: ReduceKind, a: Val, b: Val) -> Val {
    match (kind, a.ty()) {
        (ReduceKind::Sum, Ty::F32) => f.bin("fadd", a, b),
        (ReduceKind::Sum, _) => f.add(a, b),
        (ReduceKind::Max, Ty::F32) => f.intrinsic("maximum", &[a, b]),
        (ReduceKind::Max, _) => f.intrinsic("smax", &[a, b]),
    }
}

fn identity(kind: ReduceKind, ty: Ty) -> Val {
    match (kind, ty) {
        (ReduceKind::Sum, Ty::F32) => f32(0.0),
        (ReduceKind::Sum, ty) => Val::Int(0, ty),
        (ReduceKind::Max, Ty::F32) => f32(f32::NEG_INFINITY),
        (ReduceKind::Max, ty) => Val::Int(i32::MIN.into(), ty),
    }
}
