//! Rings of stages: counters, barriers, copies into them.

use super::constants::Brings;
use super::emit::{Emit, Held};
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::{Fn, Ty, Val, i32};
use dsc_ir::sched::{Block, Channel, ChannelId, Op, Scheduled};
use dsc_ir::tile::{Index, ValueId};

use super::config::WARPGROUP;

/// Rings from which on, and registers of a role's threads from which on, parities of all rings are bits of one register.
const MANY_RINGS: usize = 5;
const MANY_REGISTERS: u32 = 192;

/// A bit of the parities that no ring has.
const SPARE_BIT: u32 = 31;

/// One channel as a role sees it.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Depth.
    pub stages: u32,
    /// Byte of shared memory where its barriers start: `full` of each stage, then `empty` of each.
    pub barriers: u32,
    /// Number of the next stage.
    pub stage: Val,
    /// How many parts of its consumers take stages in turns.
    pub turns: u32,
    /// The first stage that this role takes, and how many it goes on by.
    first: Val,
    pub by: u32,
    /// Parity of its round, unless it is a bit of [`Emit::phases`].
    pub phase: Val,
    /// Which.
    bit: Option<u32>,
    /// How a stage becomes full.
    pub delivery: Delivery,
    /// Whether all threads of its consumers arrive when they give a stage back: those that read it themselves. Else one a
    /// warpgroup does, whose products have ended.
    pub all_arrive: bool,
    /// Whether one of each warp does, as some consumer gives stages back that its other warps may not have seen yet: one so late would wait
    /// for a stage after the next.
    pub warps_arrive: bool,
    /// Whether blocks of a cluster fill each other's stages: one is free when it is free in all of them.
    pub shared: bool,
    /// Stages waited for, the newest first, as far as this stretch of code knows.
    recent: Vec<Val>,
}

/// How a stage becomes full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The copy engine brings it.
    Engine,
    /// So many threads gather rows; each copy arrives by itself, and readers make what came visible to products.
    Gathered(u32),
    /// The copy engine brings some operands, and so many threads gather rows of the others.
    Both(u32),
    /// So many threads write it; readers make it visible to products as well.
    Written(u32),
}

impl Delivery {
    /// Arrivals that make a stage full, besides its bytes.
    pub fn arrivals(self) -> u32 {
        match self {
            Delivery::Engine => 1,
            Delivery::Both(n) => 1 + n,
            Delivery::Gathered(n) | Delivery::Written(n) => n,
        }
    }
}

impl Ring {
    /// A ring at its start.
    pub fn new(channel: &Channel, barriers: u32, delivery: Delivery, all_arrive: bool) -> Ring {
        let (stage, phase) = (i32(0), i32(0));
        Ring {
            stages: channel.stages,
            turns: channel.turns,
            barriers,
            stage,
            first: stage,
            by: 1,
            phase,
            bit: None,
            delivery,
            all_arrive,
            warps_arrive: false,
            shared: false,
            recent: Vec::new(),
        }
    }

    /// Back to the start, for a role that takes every stage, or for that one of its parts which take stages in turns.
    pub fn restart(&mut self, part: Option<Val>) {
        (self.first, self.by) = part.filter(|_| self.turns > 1).map_or((i32(0), 1), |part| (part, self.turns));
        self.stage = self.first;
        self.phase = i32(0);
        self.recent.clear();
    }

    /// Threads of a consumer of which one arrives when it gives a stage back, where not all do.
    pub fn arriving(&self) -> u32 {
        if self.warps_arrive { Arch::WARP } else { WARPGROUP }
    }

    /// How many waits ago a stage was waited for.
    pub fn waits_since(&self, stage: Val) -> u32 {
        self.recent.iter().position(|&s| s == stage).unwrap_or(0) as u32
    }

    /// The stage waited for `lag` waits before the last.
    pub fn back(&self, f: &mut Fn, lag: u32) -> Val {
        if let Some(&known) = self.recent.get(lag as usize) {
            return known;
        }
        if self.stages == 1 {
            return i32(0);
        }
        let back = f.sub(self.stage, i32((lag + 1).into()));
        let below = f.cmp("slt", back, i32(0));
        let round = f.add(back, i32(self.stages.into()));
        f.select(below, round, back)
    }
}

/// The axis along which blocks share a copy.
fn shared_axis(shape: &[u32]) -> Result<usize, String> {
    let axis = shape.iter().rev().skip(1).position(|&n| n > 1).ok_or("a shared copy of one row")?;
    Ok(shape.len() - 2 - axis)
}

/// Puts the parities of rings into one register, if there are many and some role has few registers to spare.
pub fn share_phases(s: &Scheduled, rings: &mut [Ring]) {
    let full = s.roles.iter().any(|r| r.registers.is_some_and(|n| n >= MANY_REGISTERS));
    if full && rings.len() >= MANY_RINGS {
        rings.iter_mut().zip(0..SPARE_BIT).for_each(|(ring, bit)| ring.bit = Some(bit));
    }
}

impl<'a> Emit<'a> {
    /// What loops carry for the rings.
    pub fn ring_state(&self) -> Vec<Val> {
        let mut state = Vec::new();
        for ring in &self.rings {
            // The only stage stays the constant that it was.
            state.extend((ring.stages > 1 || ring.bit.is_none()).then_some(ring.stage));
            state.extend(ring.bit.is_none().then_some(ring.phase));
        }
        state.extend(self.rings.iter().any(|r| r.bit.is_some()).then_some(self.phases));
        state
    }

    /// Takes up what a loop carries.
    pub fn resume(&mut self, state: &[Val]) {
        let mut state = state.iter().copied();
        for ring in &mut self.rings {
            if ring.stages > 1 {
                ring.stage = state.next().unwrap_or(ring.stage);
            } else if ring.bit.is_none() {
                state.next();
            }
            if ring.bit.is_none() {
                ring.phase = state.next().unwrap_or(ring.phase);
            }
            ring.recent.clear();
        }
        self.phases = state.next().unwrap_or(self.phases);
    }

    /// The next stage of a ring, and the parity of its round.
    fn next_stage(&mut self, channel: ChannelId) -> [Val; 2] {
        let ring = &self.rings[channel.0 as usize];
        let (stage, phase) = (ring.stage, ring.phase);
        let Some(bit) = ring.bit else { return [stage, phase] };
        let phase = self.t.f.bin("lshr", self.phases, i32(bit.into()));
        [stage, self.t.f.bin("and", phase, i32(1))]
    }

    /// The same, where there are many rings, as the assembler does not know: what follows from a constant it would compute once and keep in
    /// registers through all rounds.
    pub fn anew(&mut self, v: Val) -> Val {
        if self.rings.iter().all(|r| r.bit.is_none()) {
            return v;
        }
        let zero = self.t.f.bin("lshr", self.phases, i32(SPARE_BIT.into()));
        self.t.f.add(v, zero)
    }

    /// Goes to a ring's next stage.
    pub fn advance(&mut self, channel: ChannelId) {
        let (f, ring) = (&mut self.t.f, &mut self.rings[channel.0 as usize]);
        let mut turn = i32(1);
        if ring.stages > 1 {
            let next = f.add(ring.stage, i32(ring.by.into()));
            let wrapped = f.cmp(if ring.by > 1 { "sge" } else { "eq" }, next, i32(ring.stages.into()));
            ring.stage = f.select(wrapped, ring.first, next);
            turn = f.cast("zext", wrapped, Ty::I32);
        }
        match ring.bit {
            None => ring.phase = f.bin("xor", ring.phase, turn),
            Some(bit) => {
                let turn = f.bin("shl", turn, i32(bit.into()));
                self.phases = f.bin("xor", self.phases, turn);
            }
        }
    }

    pub fn barrier_at(&mut self, channel: ChannelId, empty: bool, stage: Val) -> Val {
        let ring = &self.rings[channel.0 as usize];
        let first = ring.barriers + if empty { 8 * ring.stages } else { 0 };
        let base = self.t.f.add(self.t.shared32, i32(first.into()));
        let at = self.t.f.mul(stage, i32(8));
        self.t.f.add(base, at)
    }

    /// Waits until the next stage is free and announces its bytes.
    pub fn acquire(&mut self, channel: ChannelId) -> Result<(), String> {
        let [stage, phase] = self.next_stage(channel);
        let empty = self.barrier_at(channel, true, stage);
        let parity = self.t.f.bin("xor", phase, i32(1));
        let delivery = self.rings[channel.0 as usize].delivery;
        if self.brings == Brings::Rest {
            ptx::barrier_wait(&mut self.t.f, empty, parity);
            return Ok(());
        }
        if delivery == Delivery::Engine {
            // Who has nothing to bring need not wait, and could be so late that it would wait for a stage after the next.
            let drives = self.drives();
            self.t.when(drives, |t| ptx::barrier_wait(&mut t.f, empty, parity));
        } else {
            ptx::barrier_wait(&mut self.t.f, empty, parity);
        }
        if let Delivery::Gathered(_) | Delivery::Written(_) = delivery {
            return Ok(());
        }
        let full = self.barrier_at(channel, false, stage);
        let bytes = self.stage_bytes(channel);
        let drives = self.drives();
        self.t.when(drives, |t| ptx::barrier_expect(&mut t.f, full, bytes));
        Ok(())
    }

    /// Whether this thread drives the copy engine: the only one of an elected role, the first of another.
    pub fn drives(&mut self) -> Val {
        if self.elected { Val::Int(1, Ty::I1) } else { self.t.f.cmp("eq", self.role_tid, i32(0)) }
    }

    /// Bytes that the copy engine brings for one stage.
    fn stage_bytes(&self, channel: ChannelId) -> u32 {
        let s = self.s;
        let mut bytes = vec![0; s.channels[channel.0 as usize].slots.len()];
        let mut pending: Vec<&Block> = s.roles.iter().map(|r| &r.body).collect();
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                match &inst.op {
                    Op::Copy { channel: c, slot, view, rows: None, shape, .. } if *c == channel => {
                        bytes[*slot as usize] = shape.iter().product::<u32>() * self.dtype(*view).bytes() as u32;
                    }
                    op => pending.extend(op.blocks()),
                }
            }
        }
        bytes.iter().sum()
    }

    /// The parameter that a tensor map is: they come behind addresses, symbols and the block's own memory.
    pub fn map(&self, number: usize) -> Val {
        let first = self.s.params.len() + 1 + usize::from(super::emit::scratch_bytes(self.s) > 0);
        Val::Arg((first + number) as u32, Ty::Generic)
    }

    /// The number of the map that a copy of the engine goes by, and the box that it brings: a panel of what this block copies.
    fn copy_map(
        &mut self,
        (channel, slot): (ChannelId, u32),
        view: ValueId,
        shape: &[u32],
        shared: bool,
    ) -> Result<(usize, Vec<u32>), String> {
        let s = self.s;
        let buffer = &s.buffers[s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let mut part = shape.to_vec();
        if shared {
            part[shared_axis(shape)?] /= self.cluster;
        }
        *part.last_mut().ok_or("a copy of a scalar")? /= buffer.panels();
        let number = self.maps.number(s, view, &part, buffer.swizzle).ok_or("a copy from what is no parameter")?;
        Ok((number, part))
    }

    /// Has the copy engine fetch its maps before the launches before this one have ended: they are parameters.
    pub fn fetch_maps(&mut self) -> Result<(), String> {
        let s = self.s;
        let mut pending: Vec<&Block> = s.roles.iter().map(|r| &r.body).collect();
        let mut numbers = Vec::new();
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                match &inst.op {
                    Op::Copy { channel, slot, view, rows: None, shape, shared, .. } => {
                        numbers.push(self.copy_map((*channel, *slot), *view, shape, *shared)?.0);
                    }
                    op => pending.extend(op.blocks()),
                }
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        let maps: Vec<Val> = numbers.into_iter().map(|n| self.map(n)).collect();
        let one = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(one, |t| maps.iter().for_each(|&map| ptx::fetch_map(&mut t.f, map)));
        Ok(())
    }

    /// Starts a copy into the acquired stage; of one that a cluster shares, this block's part, to the same place in every block.
    pub fn copy(
        &mut self,
        (channel, slot): (ChannelId, u32),
        view: ValueId,
        index: &[Index],
        shape: &[u32],
        shared: bool,
    ) -> Result<(), String> {
        if !self.brings_from(view) {
            return Ok(());
        }
        let s = self.s;
        let buffer = &s.buffers[s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let stage = self.rings[channel.0 as usize].stage;
        let full = self.barrier_at(channel, false, stage);
        let base = self.t.f.add(self.t.shared32, i32(buffer.offset.into()));
        let offset = self.t.f.mul(stage, i32(buffer.copy_bytes().into()));
        let mut to = self.t.f.add(base, offset);
        let mut coordinates = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
        let (number, part) = self.copy_map((channel, slot), view, shape, shared)?;
        if shared && self.team > 1 {
            return Err("a copy that blocks of several teams share".into());
        }
        if shared {
            let axis = shared_axis(shape)?;
            let first = self.t.f.mul(self.rank, i32(part[axis].into()));
            coordinates[axis] = self.t.f.add(coordinates[axis], first);
            let bytes = self.t.f.mul(first, i32(buffer.pitch.into()));
            to = self.t.f.add(to, bytes);
        }
        let panels = buffer.panels();
        let columns = *part.last().ok_or("a copy of a scalar")?;
        let map = self.map(number);
        coordinates.reverse();
        let drives = self.drives();
        let blocks = shared.then_some(self.cluster);
        for panel in 0..panels {
            let to = self.t.f.add(to, i32((panel * buffer.panel_bytes()).into()));
            let mut at = coordinates.clone();
            at[0] = self.t.f.add(at[0], i32((panel * columns).into()));
            self.t.when(drives, |t| ptx::copy_box(&mut t.f, to, map, full, &at, blocks));
        }
        Ok(())
    }

    /// Waits until the next stage is full.
    pub fn wait(&mut self, channel: ChannelId) -> Result<(), String> {
        let [stage, phase] = self.next_stage(channel);
        let full = self.barrier_at(channel, false, stage);
        ptx::barrier_wait(&mut self.t.f, full, phase);
        self.rings[channel.0 as usize].recent.insert(0, stage);
        self.advance(channel);
        self.flight.waited(channel);
        Ok(())
    }

    /// Where a slot of a stage starts.
    pub fn slot_at(&mut self, channel: ChannelId, slot: u32, stage: Val) -> Val {
        let buffer = &self.s.buffers[self.s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let base = self.t.f.add(self.t.shared32, i32(buffer.offset.into()));
        let offset = self.t.f.mul(stage, i32(buffer.copy_bytes().into()));
        self.t.f.add(base, offset)
    }

    /// A slot of the stage waited for last.
    pub fn take(&mut self, channel: ChannelId, slot: u32, result: ValueId) -> Result<(), String> {
        let buffer = self.s.channels[channel.0 as usize].slots[slot as usize];
        let stage = self.rings[channel.0 as usize].back(&mut self.t.f, 0);
        let data = &self.s.buffers[buffer.0 as usize];
        if data.swizzle > 0 || data.shape[1] != 1 {
            // What other threads wrote is ordered before this thread by the barrier, and before its products by a fence.
            self.unfenced |= self.rings[channel.0 as usize].delivery != Delivery::Engine;
            self.held.insert(result, Held::Stage(buffer, stage));
            return Ok(());
        }
        // A column, and no operand of a product: every thread takes the values of its own rows.
        if data.dtype != dsc_ir::DType::F32 {
            return Err(format!("{} is read by threads and is no column of f32", data.name));
        }
        let base = self.slot_at(channel, slot, stage);
        self.read_rows(result, data.pitch, |e, byte| {
            let at = e.t.f.add(base, byte);
            ptx::load_shared_f32(&mut e.t.f, at)
        })
    }

    /// Frees the stage waited for `lag` waits before the last, once the products that read it have ended.
    pub fn release(&mut self, channel: ChannelId, lag: u32) -> Result<(), String> {
        if let Some(last) = self.flight.readers(channel, lag) {
            self.finish(last);
        }
        let stage = self.rings[channel.0 as usize].back(&mut self.t.f, lag);
        let empty = self.barrier_at(channel, true, stage);
        if self.rings[channel.0 as usize].all_arrive {
            ptx::barrier_arrive(&mut self.t.f, empty);
            return Ok(());
        }
        let each = self.rings[channel.0 as usize].arriving();
        let within = self.t.f.rem(self.role_tid, each);
        if self.rings[channel.0 as usize].shared {
            // One thread for each block of the cluster.
            let mine = self.t.f.cmp("ult", within, i32(self.cluster.into()));
            let mine = self.t.f.cast("zext", mine, Ty::I32);
            let rank = self.rank_of(within);
            ptx::barrier_arrive_at_if(&mut self.t.f, empty, rank, mine);
            return Ok(());
        }
        let first = self.t.f.cmp("eq", within, i32(0));
        let first = self.t.f.cast("zext", first, Ty::I32);
        ptx::barrier_arrive_if(&mut self.t.f, empty, first);
        Ok(())
    }
}
