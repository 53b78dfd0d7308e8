//! Rings of operands: copies from global to shared memory that need no registers, and the waits for them.
//!
//! Each instruction of a copy moves a piece of every lane, to consecutive pieces of shared memory; which piece of global memory a lane brings is
//! free, and that is how a swizzle comes about. What a lane brings in every round is worked out once, before the loop: of a round only the
//! column differs, which is the same in all lanes. Pieces outside of the view are beyond the bound that the instruction is given, and so zero.
//!
//! Waits count: all threads issue equally many instructions for a stage, so that a stage is there when no more of them are under way than those of the
//! stages behind it. Then a barrier; it also frees the stage that was released before it.
//!
//! Where halves of the block alternate ([`Scheduled::alternate`](dsc_ir::sched::Scheduled::alternate)) one is a barrier behind the other:
//!
//! ```text
//! first half:   | copy, read | multiply   | copy, read | multiply   |
//! second half:               | copy, read | multiply   | copy, read | multiply   |
//! ```
//!
//! There a half waits for the next round's stage before it lets the other one read, so that both halves' copies are there when the first reads.

use super::emit::Emitter;
use super::mlir::{Ty, Val, i32, i64};
use super::ring::lane_bytes;
use super::schedule::matrix;
use dsc_ir::sched::{Block, Buffer, ChannelId, Inst, Op, Place};
use dsc_ir::tile::{self, Index, Type, ValueId, ViewType};
use std::collections::HashMap;

/// A ring while its kernel is written.
pub struct Ring {
    /// Numbers of the stages to fill and to wait for next, and of the one waited for last.
    fill: Val,
    read: Val,
    current: Val,
    /// Stages committed and not yet waited for.
    pending: u32,
    /// By slot, what lanes bring.
    plans: HashMap<u32, Plan>,
}

/// What lanes bring to a slot.
struct Plan {
    /// Address of the tile's first row, in its view's first column (i64).
    base: Val,
    /// Whether the tile is inside of its view, columns and rows aside.
    inside: Val,
    /// By instruction, bytes from there to this lane's piece; beyond the bound if it is outside.
    pieces: Vec<Val>,
    /// Of a lane.
    bytes: u32,
    /// First byte in an instruction's result of what this wave brings.
    wave: Val,
}

/// Bytes of memory behind a tile's first row that copies may reach.
pub const BOUND: i64 = 1 << 31;

impl Default for Ring {
    fn default() -> Ring {
        Ring { fill: i32(0), read: i32(0), current: i32(0), pending: 0, plans: HashMap::new() }
    }
}

/// The rings that a block works on.
pub fn rings_in(block: &Block, into: &mut Vec<ChannelId>) {
    for inst in &block.insts {
        match &inst.op {
            Op::Wait(c) if !into.contains(c) => into.push(*c),
            Op::For { body, .. } => rings_in(body, into),
            Op::If { then, otherwise, .. } => {
                rings_in(then, into);
                rings_in(otherwise, into);
            }
            _ => {}
        }
    }
}

impl<'a> Emitter<'a> {
    /// One instruction on a channel.
    pub fn channel_op(&mut self, inst: &'a Inst) {
        match &inst.op {
            // What frees a stage is the barrier of a later wait.
            Op::Acquire(_) | Op::Release { .. } => {}
            Op::Copy { channel, slot, view, rows, index, shape, .. } => {
                self.copy(*channel, *slot, (*view, *rows), index, shape);
            }
            Op::Commit(c) => {
                let next = self.next_stage(*c, self.rings[c.0 as usize].fill);
                let ring = &mut self.rings[c.0 as usize];
                ring.fill = next;
                ring.pending += 1;
            }
            Op::Wait(c) => self.wait(*c),
            Op::Take { channel, slot } => {
                let b = self.slot_buffer(*channel, *slot);
                let stage = self.rings[channel.0 as usize].current;
                let at = self.t.f.mul(stage, i32(b.copy_bytes().into()));
                self.taken.insert(inst.results[0], at);
            }
            op => self.fault = Some(format!("{op:?} has no lowering in a plain schedule")),
        }
    }

    /// The buffer of a slot.
    pub fn slot_buffer(&self, c: ChannelId, slot: u32) -> &'a Buffer {
        self.buffer(self.s.channels[c.0 as usize].slots[slot as usize])
    }

    fn next_stage(&mut self, c: ChannelId, stage: Val) -> Val {
        let next = self.t.f.add(stage, i32(1));
        let last = self.t.f.cmp("eq", next, i32(self.s.channels[c.0 as usize].stages.into()));
        self.t.f.select(last, i32(0), next)
    }

    /// Instructions of a thread that fill a stage.
    fn copies_of(&self, c: ChannelId) -> u32 {
        let operand = self.t.arch.copies_bytes().unwrap_or(4);
        let slots = self.s.channels[c.0 as usize].slots.iter().map(|b| self.buffer(*b));
        slots.map(|b| b.copy_bytes() / (self.t.threads * lane_bytes(b, operand))).sum()
    }

    /// Waits for the oldest stage under way, of `pending`.
    fn wait_for(&mut self, c: ChannelId, pending: u32) {
        let left = pending.saturating_sub(1) * self.copies_of(c);
        self.t.arch.wait_copies(&mut self.t.f, left);
    }

    fn wait(&mut self, c: ChannelId) {
        let pending = self.rings[c.0 as usize].pending;
        if pending == 0 {
            self.fault = Some(format!("{c} is waited for before anything is committed"));
            return;
        }
        if self.alternating == Some(c) {
            self.t.arch.turn(&mut self.t.f);
        } else {
            self.wait_for(c, pending);
            self.t.barrier();
        }
        let next = self.next_stage(c, self.rings[c.0 as usize].read);
        let ring = &mut self.rings[c.0 as usize];
        (ring.current, ring.read, ring.pending) = (ring.read, next, pending - 1);
    }

    /// Whether evaluating a value reads a stage of a ring.
    pub fn reads_slot(&self, v: ValueId) -> bool {
        match (self.place(v), self.definition(v)) {
            (Place::Slot(..), _) => true,
            (Place::Lazy, Some(op)) => tile::operands(op).into_iter().any(|x| self.reads_slot(x)),
            _ => false,
        }
    }

    /// Operands of a product have been read: the other half's turn to read.
    pub fn begin_product(&mut self) {
        let Some(c) = self.alternating else { return };
        self.wait_for(c, self.rings[c.0 as usize].pending);
        self.t.arch.turn_behind_reads(&mut self.t.f);
        self.t.arch.hurry(&mut self.t.f, true);
    }

    /// The product is issued.
    pub fn end_product(&mut self) {
        if self.alternating.is_some() {
            self.t.arch.hurry(&mut self.t.f, false);
        }
    }

    /// In front of a loop with a ring in which halves alternate: the first stage is there for both of them, and one falls behind.
    pub fn begin_alternation(&mut self, body: &Block) {
        let mut rings = Vec::new();
        rings_in(body, &mut rings);
        let [c] = rings[..] else { return };
        if !self.s.alternate || !body.insts.iter().any(|i| i.op == Op::Wait(c)) {
            return;
        }
        self.wait_for(c, self.rings[c.0 as usize].pending);
        self.t.barrier();
        self.turn_of_half(true);
        self.alternating = Some(c);
    }

    /// Behind it: the other one catches up.
    pub fn end_alternation(&mut self, body: &Block) {
        let Some(c) = self.alternating else { return };
        if body.insts.iter().any(|i| i.op == Op::Wait(c)) {
            self.turn_of_half(false);
            self.alternating = None;
        }
    }

    /// A barrier that one half of the block meets.
    fn turn_of_half(&mut self, second: bool) {
        let first = self.wave_start();
        let how = if second { "sge" } else { "slt" };
        let mine = self.t.f.cmp(how, first, i32((self.t.threads / 2).into()));
        self.t.when(mine, |t| t.arch.turn(&mut t.f));
    }

    /// The number of the first thread that shares instructions with this one.
    fn wave_start(&mut self) -> Val {
        let lanes = self.t.arch.lanes();
        let wave = self.t.f.div(self.t.tid, lanes);
        let first = self.t.f.mul(wave, i32(lanes.into()));
        self.t.arch.uniform(&mut self.t.f, first)
    }

    /// Numbers that go round a loop: stages of its rings.
    pub fn ring_state(&self, rings: &[ChannelId]) -> Vec<Val> {
        rings.iter().flat_map(|c| [self.rings[c.0 as usize].fill, self.rings[c.0 as usize].read]).collect()
    }

    /// Takes them up again.
    pub fn set_ring_state(&mut self, rings: &[ChannelId], values: &[Val]) {
        for (c, pair) in rings.iter().zip(values.chunks(2)) {
            let ring = &mut self.rings[c.0 as usize];
            (ring.fill, ring.read) = (pair[0], pair[1]);
        }
    }

    /// Stages that are under way, which a round leaves as they were.
    pub fn under_way(&self, rings: &[ChannelId]) -> Vec<u32> {
        rings.iter().map(|c| self.rings[c.0 as usize].pending).collect()
    }

    /// First byte of a tile behind its buffer's: its stage, if it lies in a ring.
    pub fn stage_byte(&self, mut v: ValueId) -> Val {
        loop {
            match (self.place(v), self.definition(v)) {
                (Place::Slot(..), _) => return self.taken.get(&v).copied().unwrap_or(i32(0)),
                (_, Some(tile::Op::Reshape { x, .. })) => v = *x,
                _ => return i32(0),
            }
        }
    }

    fn copy(
        &mut self,
        c: ChannelId,
        slot: u32,
        (view, rows): (ValueId, Option<ValueId>),
        index: &'a [Index],
        shape: &'a [u32],
    ) {
        let Type::View(ty) = &self.s.types[view.0 as usize] else { unreachable!("verified: a view") };
        let (Some((&column, outer)), Some(columns)) = (index.split_last(), ty.shape.last()) else { return };
        let plan = match self.rings[c.0 as usize].plans.remove(&slot) {
            Some(plan) => plan,
            None => self.plan(c, slot, (view, ty, rows), outer, shape),
        };
        let b = self.slot_buffer(c, slot);
        let column = self.index(column);
        let extent = self.extent(*columns);
        let ok = self.within(column, extent);
        let inside = self.t.f.bin("and", plan.inside, ok);
        let wide = self.t.f.cast("sext", column, Ty::I64);
        let bytes = self.t.f.mul(wide, i64(ty.dtype.bytes() as i64));
        let base = self.t.f.add(plan.base, bytes);
        let arch = self.t.arch;
        let source = arch.copy_source(&mut self.t.f, base, inside);
        let stage = self.t.f.mul(self.rings[c.0 as usize].fill, i32(b.copy_bytes().into()));
        let to = self.t.f.add(stage, plan.wave);
        let to = self.t.f.add(to, self.t.shared32);
        for (i, &piece) in plan.pieces.iter().enumerate() {
            let at = i64::from(b.offset) + i as i64 * i64::from(self.t.threads * plan.bytes);
            let to = self.t.f.add(to, i32(at));
            arch.copy(&mut self.t.f, &source, to, piece, plan.bytes);
        }
        self.rings[c.0 as usize].plans.insert(slot, plan);
    }

    /// Works out what lanes bring to a slot, from coordinates that no round changes.
    fn plan(
        &mut self,
        c: ChannelId,
        slot: u32,
        (view, ty, chosen): (ValueId, &'a ViewType, Option<ValueId>),
        outer: &'a [Index],
        shape: &'a [u32],
    ) -> Plan {
        let b = self.slot_buffer(c, slot);
        let bytes = lane_bytes(b, self.t.arch.copies_bytes().unwrap_or(4));
        let start = self.t.f.offset(self.param(view), i64(ty.offset as i64));
        let mut base = self.t.f.cast("ptrtoint", start, Ty::I64);
        let (mut inside, mut row_of) = (Val::Int(1, Ty::I1), None);
        let first_dim = usize::from(chosen.is_some());
        for (d, &i) in outer.iter().enumerate().map(|(d, i)| (d + first_dim, i)) {
            let at = self.index(i);
            let extent = self.extent(ty.shape[d]);
            if shape[d] > 1 {
                row_of = Some((at, extent, ty.strides[d].bytes));
            } else {
                let ok = self.within(at, extent);
                inside = self.t.f.bin("and", inside, ok);
            }
            let wide = self.t.f.cast("sext", at, Ty::I64);
            let stride = self.stride(ty, d);
            let part = self.t.f.mul(wide, stride);
            base = self.t.f.add(base, part);
        }
        let base = self.t.arch.uniform(&mut self.t.f, base);
        let rows = matrix(shape)[0];
        let count = b.copy_bytes() / (self.t.threads * bytes);
        let mut pieces = Vec::new();
        for i in 0..count {
            let number = self.t.f.add(self.t.tid, i32((i * self.t.threads).into()));
            let byte = self.t.f.mul(number, i32(bytes.into()));
            let (row, in_row) = (self.t.f.div(byte, b.pitch), self.t.f.rem(byte, b.pitch));
            let from = self.swizzled(b, row, in_row);
            let mut ok = Val::Int(1, Ty::I1);
            if b.shape[0] > rows {
                ok = self.t.f.cmp("slt", row, i32(rows.into()));
            }
            let mut piece = from;
            if let Some((first, extent, stride)) = row_of {
                let at = self.t.f.add(first, row);
                let exists = self.within(at, extent);
                ok = self.t.f.bin("and", ok, exists);
                let down = self.t.f.mul(row, i32(stride));
                piece = self.t.f.add(piece, down);
            }
            if let Some(chosen) = chosen {
                let known = self.t.f.select(ok, row, i32(0));
                let at = self.chunk(chosen, &[known], 1)[0];
                let extent = self.extent(ty.shape[0]);
                let exists = self.within(at, extent);
                ok = self.t.f.bin("and", ok, exists);
                let down = self.t.f.mul(at, i32(ty.strides[0].bytes));
                piece = self.t.f.add(piece, down);
            }
            pieces.push(self.t.f.select(ok, piece, i32(-BOUND)));
        }
        let wave = self.wave_start();
        let wave = self.t.f.mul(wave, i32(bytes.into()));
        Plan { base, inside, pieces, bytes, wave }
    }

    /// Byte of a row where a swizzled buffer keeps another byte of it; the same function back.
    pub fn swizzled(&mut self, b: &Buffer, row: Val, byte: Val) -> Val {
        if b.swizzle == 0 {
            return byte;
        }
        let turn = self.t.f.rem(row, b.swizzle / 16);
        let turn = self.t.f.mul(turn, i32(16));
        self.t.f.bin("xor", byte, turn)
    }
}
