//! Barriers between instructions: where a thread may meet what another one wrote, or overwrite what another one may still read.
//!
//! Shared memory is followed by buffers and their bytes; global memory only where a parameter is both read and written, as views of
//! one launch are not written otherwise if they are read.

use dsc_ir::sched::{Block, Buffer, BufferId, Channel, ChannelId, Inst, Op, Place};
use dsc_ir::tile::{self, Index, ValueId};
use std::collections::{BTreeSet, HashMap};

/// Which buffers reading a value touches, lazies included.
pub struct Reads<'a> {
    /// Definitions of lazy values.
    pub defs: &'a HashMap<ValueId, tile::Op>,
    /// Places.
    pub places: &'a [Place],
    /// Rings, whose slots are buffers that copies write.
    pub channels: &'a [Channel],
}

impl Reads<'_> {
    /// Adds the buffers that evaluating `v` reads.
    pub fn of(&self, v: ValueId, into: &mut BTreeSet<BufferId>) {
        match &self.places[v.0 as usize] {
            Place::Shared(b) => {
                into.insert(*b);
            }
            Place::Slot(c, slot) => {
                into.extend(self.slot(*c, *slot));
            }
            Place::Lazy => {
                if let Some(op) = self.defs.get(&v) {
                    for x in tile::operands(op) {
                        self.of(x, into);
                    }
                }
            }
            _ => {}
        }
    }

    fn slot(&self, c: ChannelId, slot: u32) -> Option<BufferId> {
        self.channels.get(c.0 as usize)?.slots.get(slot as usize).copied()
    }

    /// Buffers that an instruction reads and writes itself (not those of the blocks inside it). A lazy result touches nothing yet.
    pub fn touched(&self, inst: &Inst) -> (BTreeSet<BufferId>, BTreeSet<BufferId>) {
        let (mut reads, mut writes) = (BTreeSet::new(), BTreeSet::new());
        let lazy = !inst.results.is_empty() && inst.results.iter().all(|r| self.places[r.0 as usize] == Place::Lazy);
        match &inst.op {
            Op::Tile(_) if lazy => {}
            Op::Tile(op) => {
                for v in tile::operands(op) {
                    self.of(v, &mut reads);
                }
                for r in &inst.results {
                    if let Place::Shared(b) = self.places[r.0 as usize] {
                        writes.insert(b);
                    }
                }
                writes.extend(inst.scratch);
            }
            Op::For { lo, hi, init, .. } => {
                for i in [lo, hi] {
                    if let Index::Value(v) = i {
                        self.of(*v, &mut reads);
                    }
                }
                for &v in init {
                    self.of(v, &mut reads);
                }
            }
            Op::If { cond, .. } => self.of(*cond, &mut reads),
            Op::Copy { channel, slot, rows, .. } => {
                if let Some(rows) = rows {
                    self.of(*rows, &mut reads);
                }
                writes.extend(self.slot(*channel, *slot));
            }
            _ => {}
        }
        (reads, writes)
    }
}

/// What happened to memory since the last barrier.
#[derive(Clone, Default)]
struct Hazards {
    written: BTreeSet<BufferId>,
    read: BTreeSet<BufferId>,
}

impl Hazards {
    fn union(&mut self, other: Hazards) {
        self.written.extend(other.written);
        self.read.extend(other.read);
    }
}

/// Puts a barrier before every instruction that reads what was written since the last one, or overwrites what was touched. `updated`:
/// views that are both read and written.
pub fn place_barriers(block: &mut Block, reads: &Reads, buffers: &[Buffer], updated: &[ValueId]) {
    let placing = Placing { reads, buffers, updated };
    placing.block(block, &mut Hazards::default(), &[]);
}

struct Placing<'a> {
    reads: &'a Reads<'a>,
    buffers: &'a [Buffer],
    updated: &'a [ValueId],
}

impl Placing<'_> {
    /// Whether two sets have bytes in common.
    fn meet(&self, a: &BTreeSet<BufferId>, b: &BTreeSet<BufferId>) -> bool {
        let span = |id: &BufferId| self.buffers.get(id.0 as usize).map(|b| [b.offset, b.offset + b.bytes()]);
        a.iter().any(|x| {
            b.iter().any(|y| match (span(x), span(y)) {
                (Some(x), Some(y)) => x[0] < y[1] && y[0] < x[1],
                _ => x == y,
            })
        })
    }

    /// Buffers that an instruction reads and writes, and views as buffers behind the last one. Slots of rings are the rings' affair: around
    /// the loop that has one there are barriers.
    fn touched(&self, inst: &Inst) -> (BTreeSet<BufferId>, BTreeSet<BufferId>) {
        let (mut reads, mut writes) = self.reads.touched(inst);
        let slot = |b: &BufferId| self.reads.channels.iter().any(|c| c.slots.contains(b));
        reads.retain(|b| !slot(b));
        writes.retain(|b| !slot(b));
        let place = |view: &ValueId| self.updated.iter().position(|v| v == view);
        let buffer = |i: usize| BufferId((self.buffers.len() + i) as u32);
        match &inst.op {
            Op::Tile(tile::Op::Load { view, .. } | tile::Op::Gather { view, .. }) => {
                reads.extend(place(view).map(buffer));
            }
            Op::Tile(tile::Op::Store { view, .. } | tile::Op::Scatter { view, .. }) => {
                writes.extend(place(view).map(buffer));
            }
            _ => {}
        }
        (reads, writes)
    }

    /// What handing over `yields` reads: tiles in shared memory stay there, the rest goes to registers.
    fn handed_over(&self, yields: &[ValueId], to: &[ValueId]) -> BTreeSet<BufferId> {
        let mut read = BTreeSet::new();
        for (&v, to) in yields.iter().zip(to) {
            if !matches!(self.reads.places[to.0 as usize], Place::Shared(_)) {
                self.reads.of(v, &mut read);
            }
        }
        read
    }

    /// A block that hands its yields over to the values `to`.
    fn block(&self, block: &mut Block, state: &mut Hazards, to: &[ValueId]) {
        let barrier = || Inst { results: Vec::new(), op: Op::Barrier, scratch: None };
        let mut out = Vec::with_capacity(block.insts.len());
        for mut inst in std::mem::take(&mut block.insts) {
            if inst.op == Op::Barrier {
                *state = Hazards::default();
            }
            let (r, w) = self.touched(&inst);
            if self.meet(&r, &state.written) || self.meet(&w, &state.written) || self.meet(&w, &state.read) {
                out.push(barrier());
                *state = Hazards::default();
            }
            state.read.extend(&r);
            state.written.extend(&w);
            match &mut inst.op {
                Op::For { body, .. } => {
                    // Every round but the first starts behind a barrier, with what the last one handed over still being read.
                    let carried = body.args[1..].to_vec();
                    state.read.extend(self.handed_over(&body.yields, &carried));
                    let entry = state.clone();
                    self.block(body, state, &carried);
                    let clean = state.written.is_empty() && state.read.is_empty();
                    if !clean && !matches!(body.insts.last(), Some(Inst { op: Op::Barrier, .. })) {
                        body.insts.push(barrier());
                    }
                    *state = entry;
                }
                Op::If { then, otherwise, .. } => {
                    let mut other = state.clone();
                    self.block(then, state, &inst.results);
                    self.block(otherwise, &mut other, &inst.results);
                    state.union(other);
                }
                _ => {}
            }
            out.push(inst);
        }
        let handed = self.handed_over(&block.yields, to);
        if self.meet(&handed, &state.written) {
            out.push(barrier());
            *state = Hazards::default();
        }
        state.read.extend(handed);
        block.insts = out;
    }
}
