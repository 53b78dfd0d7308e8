//! Tiles that the blocks of a team exchange, through one another's shared memory or, where a team is no cluster, through memory.
//!
//! A matrix lies there as registers have it: four of a thread's registers together, those of neighbouring threads side by side, so that a warp moves
//! whole lines and no bank waits. Registers of a piece are neighbours: pieces are numbered as registers are, by 64 of the instruction's rows first.
//!
//! **Through memory** each block has a part of its own, at its place in the grid, and each team a counter. Who comes to a meeting adds 1 to it, the first block
//! 2^31 − (n − 1), so that n blocks turn its first bit over and leave the rest as it was: zeros. So no launch has to clear it. A block waits
//! until the bit is not as it found it. Blocks that do not all run at once would wait for ever: a launch has no more than fit.

use super::config::WARPGROUP;
use super::emit::{Emit, Held};
use super::fragment::Geometry;
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32, i64};
use dsc_ir::artifact::COUNTER_PITCH;
use dsc_ir::sched::{Buffer, BufferId, Inst, Op, Scheduled};
use dsc_ir::tile::ValueId;
use std::collections::HashMap;

/// Registers that a thread moves at a time, and their bytes, where they are not halved on their way.
const TOGETHER: usize = 4;
const BYTES: u32 = 16;
/// Lanes that have the same rows.
const QUAD: u32 = 4;

impl Emit<'_> {
    /// Rank in the cluster of a block of this one's number in its team, by its number among those that share copies.
    pub fn rank_of(&mut self, shares: Val) -> Val {
        if self.s.apart() {
            return shares;
        }
        let first = self.t.f.mul(self.member, i32(self.cluster.into()));
        self.t.f.add(first, shares)
    }

    /// All threads of the team wait for one another.
    pub fn meet(&mut self) -> Result<(), String> {
        self.settle_all();
        self.met += 1;
        self.rows_of_four = None;
        let all = self.s.roles.iter().map(|r| r.body.insts.iter().filter(|i| i.op == Op::Meet).count()).max();
        if self.s.apart() {
            // The barriers' phases of a tile are those of every tile.
            if self.more.is_some() && all.is_some_and(|n| !n.is_multiple_of(2)) {
                return Err("an odd number of meetings in tiles of a team".into());
            }
            return self.meet_apart(all == Some(self.met));
        }
        if all == Some(self.met) {
            // What comes next into this memory may come by the copy engine.
            ptx::fence_async(&mut self.t.f);
        }
        ptx::cluster_barrier(&mut self.t.f);
        Ok(())
    }

    /// Writes a tile for the team's other blocks.
    pub fn put_part(&mut self, buffer: BufferId, value: ValueId) -> Result<(), String> {
        let (geometry, data) = (self.seen_in(value)?, &self.s.buffers[buffer.0 as usize]);
        if data.outside {
            return self.put_outside(&geometry, value, buffer);
        }
        let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
        if data.shape[1] == 1 {
            return self.fill_rows(&geometry, value, data, base);
        }
        let registers = geometry.registers();
        if geometry.shape != data.shape || !registers.len().is_multiple_of(TOGETHER) {
            return Err(format!("%{} is no tile of a product's shape", value.0));
        }
        let own = self.own_place(base);
        let mut seen = HashMap::new();
        for (n, four) in (0..).zip(registers.chunks(TOGETHER)) {
            let values = four.iter().map(|&at| self.element(value, at, &mut seen)).collect::<Result<Vec<_>, _>>()?;
            let at = self.t.f.add(own, i32((n * WARPGROUP * BYTES).into()));
            ptx::store_shared_floats(&mut self.t.f, at, &values);
        }
        Ok(())
    }

    /// What the block so many places behind this one has put, or the piece of it that is this block's.
    pub fn get_part(&mut self, r: ValueId, buffer: BufferId, after: u32, own: bool) -> Result<(), String> {
        let (data, team) = (&self.s.buffers[buffer.0 as usize], self.team);
        let &[rows, columns] = self.shape(r) else { return Err(format!("%{} is no matrix", r.0)) };
        let down = data.shape[0] / rows;
        let (row, mut column) = (self.t.f.rem(self.member, down), self.t.f.div(self.member, down));
        let across = data.shape[1] / columns;
        if across * down < team {
            let there = self.t.f.cmp("ult", column, i32(across.into()));
            column = self.t.f.select(there, column, i32(i64::from(across) - 1));
        }
        let quads = self.quads_share(r, data)?;
        let (name, lane) = ((buffer, after / QUAD, own), after % QUAD);
        if let Some((_, rows)) = self.rows_of_four.as_ref().filter(|(of, _)| quads && *of == name) {
            self.held.insert(r, Held::Shared(rows.clone(), [true, false], lane));
            return Ok(());
        }
        let mut other = self.t.f.add(self.member, i32((if quads { after - lane } else { after }).into()));
        if quads {
            let own = self.t.f.rem(self.t.lane, QUAD);
            other = self.t.f.add(other, own);
        }
        let other = self.t.f.bin("urem", other, i32(team.into()));
        if data.outside {
            let kept = if own && after == 0 { self.own_pieces.remove(&buffer) } else { None };
            if let Some(values) = kept {
                // What is made of it is seen so.
                self.geometry(r)?;
                let values = self.halves_of(data, values);
                self.held.insert(r, Held::Registers(values, [true, true]));
                return Ok(());
            }
            let piece = [row, column];
            self.get_outside(r, data, other, own.then_some((piece, down)))?;
            if let (true, Some(Held::Registers(values, varies))) = (quads, self.held.get(&r).cloned()) {
                self.rows_of_four = Some((name, values.clone()));
                self.held.insert(r, Held::Shared(values, varies, lane));
            }
            return Ok(());
        }
        let rank = self.t.f.mul(other, i32(self.cluster.into()));
        let rank = self.t.f.add(rank, self.rank);
        let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
        if columns == 1 {
            let first = self.t.f.mul(row, i32((rows * data.pitch).into()));
            let base = self.t.f.add(base, first);
            let base = ptx::address_in(&mut self.t.f, base, rank);
            return self.read_rows(r, data.pitch, |e, byte| {
                let at = e.t.f.add(base, byte);
                ptx::load_cluster_f32(&mut e.t.f, at)
            });
        }
        let registers = self.geometry(r)?.registers().len();
        if !registers.is_multiple_of(TOGETHER) {
            return Err(format!("%{} is a piece of {registers} registers", r.0));
        }
        let groups = registers / TOGETHER;
        let mut base = self.own_place(base);
        if own {
            let first = self.first_of_piece([row, column], down, groups as u32 * WARPGROUP * BYTES);
            base = self.t.f.add(base, first);
        }
        let base = ptx::address_in(&mut self.t.f, base, rank);
        let mut values = Vec::new();
        for n in 0..groups as u32 {
            let at = self.t.f.add(base, i32((n * WARPGROUP * BYTES).into()));
            values.extend(ptx::load_cluster_floats(&mut self.t.f, at));
        }
        self.held.insert(r, Held::Registers(values, [true, true]));
        Ok(())
    }

    /// Whether rows of four blocks, one behind the other, are got by a quad, whose lanes have the same rows: each lane those of a block. All of
    /// them by every lane would be four times as many loads.
    fn quads_share(&mut self, r: ValueId, data: &Buffer) -> Result<bool, String> {
        let rows = data.outside && data.shape[1] == 1 && self.team.is_multiple_of(QUAD);
        Ok(rows && !self.seen_in(r)?.transposed)
    }

    /// Bytes in front of a piece at that place, of so many bytes, where that many pieces are one under another.
    fn first_of_piece(&mut self, [row, column]: [Val; 2], down: u32, bytes: u32) -> Val {
        let number = self.t.f.mul(column, i32(down.into()));
        let number = self.t.f.add(number, row);
        self.t.f.mul(number, i32(bytes.into()))
    }

    fn own_place(&mut self, base: Val) -> Val {
        let own = self.t.f.mul(self.role_tid, i32(BYTES.into()));
        self.t.f.add(base, own)
    }
}

/// Bytes that a block puts outside, whole lines of the cache.
pub fn outside_bytes(s: &Scheduled) -> u64 {
    let ends = s.buffers.iter().filter(|b| b.outside).map(|b| b.offset + b.bytes());
    ends.max().map_or(0, |end| u64::from(end.next_multiple_of(LINE)))
}

/// Bytes of shared memory behind the rings for the meetings of a block's roles.
pub fn meeting_bytes(s: &Scheduled) -> u32 {
    if s.apart() { MEETING } else { 0 }
}

/// Makes the barriers of the meetings: a thread of each warp comes to the first, the block's first thread to the second.
pub fn init_meeting(t: &mut Threads, at: u32) {
    for (byte, arrivals) in [(at, t.threads / Arch::WARP), (at + BARRIER, 1)] {
        let at = t.f.add(t.shared32, i32(byte.into()));
        ptx::barrier_init(&mut t.f, at, arrivals);
    }
}

/// Bytes of a barrier in shared memory, and of both that a block's roles meet at.
const BARRIER: u32 = 8;
pub const MEETING: u32 = 2 * BARRIER;

/// Bytes of a line of the cache.
const LINE: u32 = 128;

impl Emit<'_> {
    /// This block's numbers, where a team is no cluster: the blocks of a cluster are neighbours, and the clusters of a team.
    pub fn begin_apart(&mut self) {
        let block = isa::sreg(&mut self.t.f, "ctaid.x");
        if self.cluster > 1 {
            self.rank = isa::sreg(&mut self.t.f, "cluster.ctarank");
        }
        let cluster = self.t.f.div(block, self.cluster);
        self.member = self.t.f.rem(cluster, self.team);
    }

    /// Where this block's memory begins, or the memory of all.
    fn outside(&mut self, own: bool) -> Val {
        let all = Val::Arg(self.s.params.len() as u32 + 1, Ty::Global);
        if !own {
            return all;
        }
        let block = isa::sreg(&mut self.t.f, "ctaid.x");
        let block = self.t.f.cast("zext", block, Ty::I64);
        let bytes = self.t.f.mul(block, i64(outside_bytes(self.s) as i64));
        self.t.f.offset(all, bytes)
    }

    /// All threads of the team wait for one another; at the end of a tile only if there is another, for which memory is written anew.
    fn meet_apart(&mut self, ends: bool) -> Result<(), String> {
        let after = match self.more.filter(|_| ends) {
            Some(more) => {
                let (inside, after) = (self.t.f.label(), self.t.f.label());
                self.t.f.cond_br(more, (inside, &[]), (after, &[]));
                self.t.f.start(inside, &[]);
                Some(after)
            }
            None => None,
        };
        // (Roles that only bring keys need not wait here. But without it the assembler gives them registers so that they spill in every round.)
        // What all threads of the block have put, one of them releases; what it acquires, all may get. Each role comes here at its own place in
        // the code, where barriers of the block are not meant to be met. A tile that is not the last has an even number of meetings.
        let all = self.t.f.add(self.t.shared32, i32(self.meeting.into()));
        let met = self.t.f.add(self.t.shared32, i32((self.meeting + BARRIER).into()));
        let parity = i32(((self.met - 1) % 2) as i64);
        let first = self.t.f.cmp("eq", self.t.lane, i32(0));
        ptx::warp_barrier(&mut self.t.f);
        ptx::barrier_arrive_if(&mut self.t.f, all, first);
        if self.first_role() {
            self.meet_others([all, met], parity);
        }
        ptx::barrier_wait(&mut self.t.f, met, parity);
        if let Some(after) = after {
            self.t.f.br(after, &[]);
            self.t.f.start(after, &[]);
        }
        Ok(())
    }

    /// The block's first thread meets those of the team's other blocks, once `all` of its own have come; `met` is when it has.
    fn meet_others(&mut self, [all, met]: [Val; 2], parity: Val) {
        let block = isa::sreg(&mut self.t.f, "ctaid.x");
        let together = self.cluster * self.team;
        let number = self.t.f.div(block, together);
        let number = self.t.f.mul(number, i32(self.cluster.into()));
        let number = self.t.f.add(number, self.rank);
        let number = self.t.f.add(number, i32(1));
        let bytes = self.t.f.mul(number, i32(-(COUNTER_PITCH as i64)));
        let bytes = self.t.f.cast("sext", bytes, Ty::I64);
        let memory = self.outside(false);
        let counter = self.t.f.offset(memory, bytes);
        let leads = self.t.f.cmp("eq", self.member, i32(0));
        let turns = i64::from(i32::MAX) + 2 - i64::from(self.team);
        let step = self.t.f.select(leads, i32(turns), i32(1));
        let one = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(one, |t| {
            ptx::barrier_wait(&mut t.f, all, parity);
            ptx::meet_through(&mut t.f, counter, step);
            ptx::barrier_arrive(&mut t.f, met);
        });
    }

    /// Registers of a piece, where each block has one of its own: what a block has put of that nobody else gets, so that it stays where it is.
    fn kept(&self, buffer: BufferId) -> Option<usize> {
        let own = |i: &&Inst| matches!(i.op, Op::Get { buffer: b, own: true, .. } if b == buffer);
        let got = self.s.roles.iter().flat_map(|r| &r.body.insts).find(own)?;
        let elements = |shape: &[u32]| shape.iter().product::<u32>();
        let (whole, piece) = (elements(&self.s.buffers[buffer.0 as usize].shape), elements(self.shape(got.results[0])));
        (whole == piece * self.team).then_some((piece / WARPGROUP) as usize)
    }

    fn put_outside(&mut self, geometry: &Geometry, value: ValueId, buffer: BufferId) -> Result<(), String> {
        let data = &self.s.buffers[buffer.0 as usize];
        let base = self.outside(true);
        let base = self.t.f.offset(base, i64(data.offset.into()));
        let mut seen = HashMap::new();
        if data.shape[1] == 1 {
            let writes = self.writes_rows(geometry);
            for at in geometry.varying(true, false) {
                let [row, _] = geometry.coordinates(&mut self.t, at);
                let byte = self.t.f.mul(row, i32(data.pitch.into()));
                let byte = self.t.f.cast("zext", byte, Ty::I64);
                let to = self.t.f.offset(base, byte);
                let v = self.element(value, at, &mut seen)?;
                ptx::store_f32_if(&mut self.t.f, writes, to, v);
            }
            return Ok(());
        }
        let registers = geometry.registers();
        if geometry.shape != data.shape || !registers.len().is_multiple_of(TOGETHER) {
            return Err(format!("%{} is no tile of a product's shape", value.0));
        }
        let bytes = moved_bytes(data);
        let own = self.own_byte(bytes);
        let own = self.t.f.offset(base, own);
        let kept = self.kept(buffer);
        let mut mine: Vec<Val> = Vec::new();
        let mut at = 0;
        for (number, piece) in (0..).zip(registers.chunks(kept.unwrap_or(registers.len()))) {
            let own_piece = self.t.f.cmp("eq", self.member, i32(number));
            let writes = match kept {
                Some(_) => self.t.f.cmp("ne", self.member, i32(number)),
                None => Val::Int(1, Ty::I1),
            };
            let words = match data.dtype.bytes() {
                2 => piece.chunks_exact(2).map(|two| self.packed(value, [two[0], two[1]], &mut seen)).collect(),
                _ => piece.iter().map(|&at| self.element(value, at, &mut seen)).collect::<Result<Vec<_>, _>>(),
            }?;
            for some in words.chunks(bytes as usize / 4) {
                let to = self.t.f.offset(own, i64(at.into()));
                isa::store_global_if(&mut self.t.f, writes, to, some);
                at += WARPGROUP * bytes;
            }
            mine = match mine.is_empty() {
                true => words,
                false => mine.iter().zip(&words).map(|(&m, &v)| self.t.f.select(own_piece, v, m)).collect(),
            };
        }
        if kept.is_some() {
            self.own_pieces.insert(buffer, mine);
        }
        Ok(())
    }

    /// What the block of that number in the team has put, or this block's piece of it: its place, and pieces down.
    fn get_outside(
        &mut self,
        r: ValueId,
        data: &Buffer,
        other: Val,
        own: Option<([Val; 2], u32)>,
    ) -> Result<(), String> {
        let away = self.t.f.sub(other, self.member);
        let away = self.t.f.mul(away, i32(self.cluster.into()));
        let away = self.t.f.cast("sext", away, Ty::I64);
        let away = self.t.f.mul(away, i64(outside_bytes(self.s) as i64));
        let base = self.outside(true);
        let base = self.t.f.offset(base, away);
        let mut base = self.t.f.offset(base, i64(data.offset.into()));
        let &[rows, columns] = self.shape(r) else { return Err(format!("%{} is no matrix", r.0)) };
        if columns == 1 {
            if let Some(([row, _], _)) = own {
                let first = self.t.f.mul(row, i32((rows * data.pitch).into()));
                let first = self.t.f.cast("zext", first, Ty::I64);
                base = self.t.f.offset(base, first);
            }
            return self.read_rows(r, data.pitch, |e, byte| {
                let byte = e.t.f.cast("zext", byte, Ty::I64);
                let at = e.t.f.offset(base, byte);
                ptx::load_others_f32(&mut e.t.f, at)
            });
        }
        let registers = self.geometry(r)?.registers().len();
        if !registers.is_multiple_of(TOGETHER) {
            return Err(format!("%{} is a piece of {registers} registers", r.0));
        }
        let (groups, bytes) = ((registers / TOGETHER) as u32, moved_bytes(data));
        if let Some(([row, column], down)) = own {
            let first = self.first_of_piece([row, column], down, groups * WARPGROUP * bytes);
            let first = self.t.f.cast("zext", first, Ty::I64);
            base = self.t.f.offset(base, first);
        }
        let thread = self.own_byte(bytes);
        let base = self.t.f.offset(base, thread);
        let mut words = Vec::new();
        for n in 0..groups {
            let at = self.t.f.offset(base, i64((n * WARPGROUP * bytes).into()));
            words.extend(match data.dtype.bytes() {
                2 => ptx::load_others_pair(&mut self.t.f, at),
                _ => ptx::load_others_floats(&mut self.t.f, at),
            });
        }
        let values = self.halves_of(data, words);
        self.held.insert(r, Held::Registers(values, [true, true]));
        Ok(())
    }

    /// The elements of words of such a buffer: words that are two.
    fn halves_of(&mut self, data: &Buffer, words: Vec<Val>) -> Vec<Val> {
        if data.dtype.bytes() != 2 {
            return words;
        }
        let f = &mut self.t.f;
        let half = |word: Val| {
            let high = f.bin("lshr", word, i32(16));
            [word, high].map(|w| f.cast("trunc", w, Ty::I16))
        };
        words.into_iter().flat_map(half).collect()
    }

    fn own_byte(&mut self, bytes: u32) -> Val {
        let own = self.t.f.mul(self.role_tid, i32(bytes.into()));
        self.t.f.cast("zext", own, Ty::I64)
    }
}

/// Bytes that a thread moves at a time into such a buffer or out of it: [`TOGETHER`] elements.
fn moved_bytes(data: &Buffer) -> u32 {
    TOGETHER as u32 * data.dtype.bytes() as u32
}
