//! Runs scheduled kernels, to see whether they compute what their tile programs do however their units interleave.
//!
//! `common` runs first. Then the roles take turns by chance, from a seed; within a role instructions run in order and on whole tiles, as the
//! interpreter of tile programs ([`crate::tile::interp`]) runs them: operations are its. What differs is memory. Values in shared memory and
//! in slots are real bytes at their buffer's offset, pitch and swizzle, so that an overlap or a stage given back too early shows as wrong
//! data. A copy takes effect at any time between its issue and the wait for its stage. A write to shared memory reaches the other
//! threads in parts, the rest of it with the next barrier. A value that is lazy is computed where it is used.
//!
//! Shared memory starts as NaNs. Top-k states are kept beside it: their layout is the target's.
//!
//! The blocks of a team run one after another from one meeting to the next, in any order: what one puts too late, or where another still
//! reads, shows as wrong data.
//!
//! A persistent kernel is run by a few blocks, each of which takes every so many tiles; its roles go from tile to tile on their own. Where blocks
//! have parts of tiles, each comes to all of them and has an equal share of every one: which ranges they have must not matter.
//!
//! Whether synchronisation is right is not asked of the verifier, but shown; types and places must be sound.
//!
//! **Cost.** As the interpreter of tile programs, and a copy of every shared tile at each use.

use super::memory::{Chance, Shared};
use super::ring::{Ring, Unit, channel_of, rings, unit_name, units};
use super::verify::structure;
use super::visit::{Definitions, operands};
use super::walk::{Host, Walker};
use super::{ChannelId, Inst, Op, Place, Scheduled};
use crate::extent::{GridDim, SymValues};
use crate::tile::interp::{self, Access, Binding, Data, InterpError, Machine};
use crate::tile::{self, Index, Program, Region, Type, ValueId};
use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;

/// How to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Decides how units interleave, and when copies and writes take effect.
    pub seed: u64,
    /// As of [`interp::Options::check_races`].
    pub check_races: bool,
}

/// Blocks that share the tiles of a persistent kernel.
const PERSISTENT_BLOCKS: usize = 3;

/// Runs every block of a launch. `bindings` has one entry a parameter; several may name one buffer.
///
/// # Errors
/// As of [`interp::run`]; [`InterpError::Contract`] also if units wait for one another for ever, misuse a channel, or overwrite shared memory
/// that other threads may still read.
pub fn run(
    kernel: &Scheduled,
    syms: &SymValues,
    buffers: &mut [Vec<u8>],
    bindings: &[Binding],
    options: Options,
) -> Result<(), InterpError> {
    let diagnostics = structure(kernel);
    if !diagnostics.is_empty() {
        return Err(InterpError::Invalid { kernel: kernel.name.clone(), diagnostics });
    }
    let program = Program {
        name: kernel.name.clone(),
        grid: kernel.grid.clone(),
        params: kernel.params.clone(),
        types: kernel.types.clone(),
        body: Region::default(),
    };
    let races = interp::Options { check_races: options.check_races };
    let sizes: Vec<u64> = kernel.grid.iter().map(|g: &GridDim| g.eval(syms)).collect();
    let Some(blocks) = sizes.iter().try_fold(1u64, |n, &size| n.checked_mul(size)) else {
        return Err(InterpError::Launch { kernel: kernel.name.clone(), message: format!("a grid of {sizes:?}") });
    };
    let machine = Machine::new(&program, *syms, buffers, bindings, races)?;
    let team = if kernel.roles.is_empty() { 1 } else { kernel.team.max(1) as usize };
    let mut executor = Executor {
        team: (0..team).map(|_| None).collect(),
        member: 0,
        kernel,
        definitions: Definitions::new(kernel),
        machine,
        chance: Chance::new(options.seed),
        sizes,
        shared: Shared::new(&[], 0),
        rings: Vec::new(),
        taken: HashMap::new(),
        copies: Vec::new(),
        unit: 0,
        tiles: Vec::new(),
        block: 0,
    };
    if kernel.persistent.is_none() {
        return (0..blocks).try_for_each(|block| executor.run_block(&[block]));
    }
    (0..PERSISTENT_BLOCKS).try_for_each(|first| {
        executor.block = first;
        let (from, step) = if kernel.parts() { (0, 1) } else { (first as u64, PERSISTENT_BLOCKS) };
        let tiles: Vec<u64> = (from..blocks).step_by(step).collect();
        if tiles.is_empty() { Ok(()) } else { executor.run_block(&tiles) }
    })
}

/// A copy or fill that was issued and has not taken effect.
struct Copying {
    channel: ChannelId,
    slot: u32,
    stage: u64,
    from: Source,
    shape: [usize; 2],
    tile: u64,
}

/// What fills a slot.
enum Source {
    /// Memory, read when the copy takes effect.
    Memory(Access),
    /// A tile, as it was computed.
    Tile(Vec<u8>),
}

/// A unit on its way.
struct Running<'a> {
    unit: Unit,
    walker: Walker<'a>,
    /// What it could not do yet.
    pending: Option<&'a Inst>,
    /// Tiles still to come.
    tiles: VecDeque<u64>,
    /// Whether the team's other blocks have come to where it waits for them.
    met: bool,
}

/// A block of a team while another runs.
struct Parked {
    shared: Shared,
    rings: Vec<Ring>,
    taken: HashMap<ValueId, u64>,
    copies: Vec<Copying>,
    tiles: Vec<u64>,
    values: Vec<Option<Rc<Data>>>,
}

struct Executor<'a> {
    /// The blocks that run one tile together, but the one whose turn it is.
    team: Vec<Option<Parked>>,
    /// That one's number.
    member: usize,
    kernel: &'a Scheduled,
    definitions: Definitions<'a>,
    machine: Machine<'a>,
    chance: Chance,
    /// Of the grid.
    sizes: Vec<u64>,
    shared: Shared,
    rings: Vec<Ring>,
    /// The stage of what was taken.
    taken: HashMap<ValueId, u64>,
    copies: Vec<Copying>,
    /// Whose turn it is.
    unit: Unit,
    /// By unit, the tile it is at.
    tiles: Vec<u64>,
    /// Which of a persistent kernel's blocks runs.
    block: usize,
}

impl<'a> Executor<'a> {
    /// One block or team of blocks, for one tile or, if it is persistent, several.
    fn run_block(&mut self, tiles: &[u64]) -> Result<(), InterpError> {
        let mut running = Vec::new();
        for member in 0..self.team.len() {
            self.member = member;
            running.push(self.begin(tiles)?);
            self.park();
        }
        while running.iter().any(|r| !r.is_empty()) {
            let first = self.chance.below(running.len());
            for n in 0..running.len() {
                let member = (first + n) % running.len();
                self.unpark(member);
                running[member] = self.together(std::mem::take(&mut running[member]))?;
                self.park();
            }
            if running.iter().any(Vec::is_empty) != running.iter().all(Vec::is_empty) {
                return Err(self.machine.contract("a block meets others of its team that have ended"));
            }
            running.iter_mut().flatten().for_each(|r| r.met = true);
        }
        Ok(())
    }

    /// Leaves the block whose turn it is as it stands.
    fn park(&mut self) {
        self.team[self.member] = Some(Parked {
            shared: std::mem::replace(&mut self.shared, Shared::new(&[], 0)),
            rings: std::mem::take(&mut self.rings),
            taken: std::mem::take(&mut self.taken),
            copies: std::mem::take(&mut self.copies),
            tiles: std::mem::take(&mut self.tiles),
            values: self.machine.swapped(Vec::new()),
        });
    }

    /// Goes on with that block.
    fn unpark(&mut self, member: usize) {
        self.member = member;
        let Some(parked) = self.team[member].take() else { return };
        (self.shared, self.rings, self.taken) = (parked.shared, parked.rings, parked.taken);
        (self.copies, self.tiles) = (parked.copies, parked.tiles);
        self.machine.swapped(parked.values);
    }

    /// A block at its start: `common` has run, the roles have not.
    fn begin(&mut self, tiles: &[u64]) -> Result<Vec<Running<'a>>, InterpError> {
        let blocks = units(self.kernel);
        self.machine.swapped(vec![None; self.kernel.types.len()]);
        self.shared = Shared::new(&self.kernel.buffers, blocks.len());
        self.rings = rings(self.kernel);
        self.taken.clear();
        self.copies.clear();
        self.tiles = vec![tiles[0]; blocks.len()];
        let mut all: Vec<Running<'a>> = Vec::new();
        for (unit, block) in blocks.into_iter().enumerate() {
            let rest = if unit == 0 { VecDeque::new() } else { tiles[1..].iter().copied().collect() };
            all.push(Running { unit, walker: Walker::repeat(block, 1), pending: None, tiles: rest, met: false });
        }
        let roles = all.split_off(1);
        self.together(all)?;
        Ok(roles)
    }

    /// Runs units until all have ended, or wait for the other blocks of the team; gives those.
    fn together(&mut self, mut running: Vec<Running<'a>>) -> Result<Vec<Running<'a>>, InterpError> {
        // Units that could not go on since another last did.
        let mut stuck: HashSet<Unit> = HashSet::new();
        while !running.is_empty() {
            if !self.copies.is_empty() && self.chance.below(4) == 0 {
                let i = self.chance.below(self.copies.len());
                self.complete(i)?;
                continue;
            }
            let i = self.chance.below(running.len());
            let steps = 1 + self.chance.below(8);
            self.turn_to(running[i].unit);
            match self.turn(&mut running[i], steps)? {
                Turn::Ended => {
                    running.remove(i);
                    stuck.clear();
                }
                Turn::Moved => stuck.clear(),
                Turn::Stuck => {
                    stuck.insert(running[i].unit);
                }
            }
            let meets = |r: &Running<'_>| r.pending.is_some_and(|inst| inst.op == Op::Meet);
            if stuck.len() == running.len() && running.iter().all(meets) {
                return Ok(running);
            }
            if !running.is_empty() && stuck.len() == running.len() {
                let wait = |r: &Running<'_>| {
                    let what = r.pending.and_then(|inst| {
                        if inst.op == Op::Meet {
                            return Some("for the team's other blocks".to_owned());
                        }
                        Some(if matches!(inst.op, Op::Wait(_)) {
                            format!("for a full stage of {}", channel_of(&inst.op)?)
                        } else {
                            format!("for a free stage of {}", channel_of(&inst.op)?)
                        })
                    });
                    format!("{} waits {}", unit_name(self.kernel, r.unit), what.unwrap_or_default())
                };
                let waits: Vec<String> = running.iter().map(wait).collect();
                return Err(self.machine.contract(format!("deadlock: {}", waits.join("; "))));
            }
        }
        Ok(running)
    }

    fn turn_to(&mut self, unit: Unit) {
        self.unit = unit;
        self.machine.enter_block(self.tiles[unit], &self.sizes);
    }

    /// A few instructions of a unit.
    fn turn(&mut self, running: &mut Running<'a>, steps: usize) -> Result<Turn, InterpError> {
        for step in 0..steps {
            let inst = match running.pending.take() {
                Some(inst) => Some(inst),
                None => running.walker.next(self)?,
            };
            let Some(inst) = inst else {
                let Some(tile) = running.tiles.pop_front() else { return Ok(Turn::Ended) };
                self.tiles[running.unit] = tile;
                running.walker = Walker::repeat(units(self.kernel)[running.unit], 1);
                return Ok(Turn::Moved);
            };
            let could = match inst.op {
                Op::Meet => {
                    self.shared.barrier(running.unit);
                    std::mem::take(&mut running.met)
                }
                _ => self.step(inst)?,
            };
            if !could {
                running.pending = Some(inst);
                return Ok(if step == 0 { Turn::Stuck } else { Turn::Moved });
            }
        }
        Ok(Turn::Moved)
    }

    /// Whether the instruction could run.
    fn step(&mut self, inst: &'a Inst) -> Result<bool, InterpError> {
        let unit = self.unit;
        let misuse =
            |me: &Self, message: String| me.machine.contract(format!("{} {message}", unit_name(me.kernel, unit)));
        match &inst.op {
            Op::Tile(op) => self.tile_op(op, inst)?,
            Op::Barrier => self.shared.barrier(unit),
            Op::Acquire(c) => return Ok(self.rings[c.0 as usize].acquire().map_err(|e| misuse(self, e))?.is_some()),
            Op::Copy { channel, slot, view, rows, index, shape, .. } => {
                let stage = self.rings[channel.0 as usize].filling().map_err(|e| misuse(self, e))?;
                self.prepare(&operands(&inst.op))?;
                let access = self.machine.access(*view, index, *rows, shape)?;
                let shape = rows_and_columns(shape);
                self.copies.push(Copying {
                    channel: *channel,
                    slot: *slot,
                    stage,
                    from: Source::Memory(access),
                    shape,
                    tile: self.tiles[unit],
                });
            }
            Op::Fill { channel, slot, value, .. } => {
                let stage = self.rings[channel.0 as usize].filling().map_err(|e| misuse(self, e))?;
                let read = self.prepare(&[*value])?;
                let bytes = self.machine.get(*value)?.to_bytes();
                self.note(read);
                let shape = match &self.kernel.types[value.0 as usize] {
                    Type::Tile(t) => rows_and_columns(&t.shape),
                    _ => [0, 0],
                };
                self.copies.push(Copying {
                    channel: *channel,
                    slot: *slot,
                    stage,
                    from: Source::Tile(bytes),
                    shape,
                    tile: self.tiles[unit],
                });
            }
            Op::Commit(c) => {
                self.rings[c.0 as usize].commit().map_err(|e| misuse(self, e))?;
            }
            Op::Wait(c) => {
                let Some(stage) = self.rings[c.0 as usize].wait(unit).map_err(|e| misuse(self, e))? else {
                    return Ok(false);
                };
                while let Some(i) = self.copies.iter().position(|copy| copy.channel == *c && copy.stage == stage) {
                    self.complete(i)?;
                }
            }
            Op::Take { channel, .. } => {
                let stage = self.rings[channel.0 as usize].taken(unit).map_err(|e| misuse(self, e))?;
                self.taken.extend(inst.results.iter().map(|&v| (v, stage)));
            }
            Op::Release { channel, lag } => {
                self.rings[channel.0 as usize].release(unit, *lag).map_err(|e| misuse(self, e))?;
            }
            Op::Number => {
                let number = i32::try_from(self.member).unwrap_or(0);
                self.define(&inst.results, vec![Rc::new(Data::I32(vec![number]))])?;
            }
            Op::Part { lo, hi, end } => {
                let [lo, hi] = [self.number(*lo)?, self.number(*hi)?];
                let before = (hi - lo).max(0) * (self.block + usize::from(*end)) as i64 / PERSISTENT_BLOCKS as i64;
                self.define(&inst.results, vec![Rc::new(Data::I32(vec![(lo + before) as i32]))])?;
            }
            Op::Put { buffer, value } => {
                let read = self.prepare(&[*value])?;
                let data = self.machine.get(*value)?;
                self.note(read);
                self.write_late(*buffer, *value, &data)?;
            }
            Op::Get { buffer, after, own } => self.get(inst, *buffer, *after as usize, *own)?,
            // The walker resolves these, and whose turn it is the meeting.
            Op::For { .. } | Op::If { .. } | Op::Meet => {}
        }
        Ok(true)
    }

    /// What another block of the team, or this one, has put, or a piece of it.
    fn get(&mut self, inst: &Inst, buffer: super::BufferId, after: usize, own: bool) -> Result<(), InterpError> {
        let (buffer, from) = (&self.kernel.buffers[buffer.0 as usize], (self.member + after) % self.team.len());
        let shape = buffer.shape.map(|n| n as usize);
        let shared = match &self.team[from] {
            Some(parked) => &parked.shared,
            None => &self.shared,
        };
        let whole = shared.read(buffer, 0, shape);
        let Some(Type::Tile(t)) = inst.results.first().and_then(|v| self.kernel.types.get(v.0 as usize)) else {
            return Ok(());
        };
        let [rows, columns] = rows_and_columns(&t.shape).map(|n| n.max(1));
        let down = (shape[0] / rows).max(1);
        let number = if own { self.member } else { 0 };
        let last = (shape[1] / columns).max(1) - 1;
        let (size, first) = (t.dtype.bytes(), [number % down * rows, (number / down).min(last) * columns]);
        let mut piece = Vec::with_capacity(rows * columns * size);
        for row in first[0]..first[0] + rows {
            let at = (row * shape[1] + first[1]) * size;
            piece.extend_from_slice(&whole[at..at + columns * size]);
        }
        self.define(&inst.results, vec![Rc::new(Data::from_bytes(t.dtype, &piece))])
    }

    fn number(&mut self, v: ValueId) -> Result<i64, InterpError> {
        let read = self.prepare(&[v])?;
        self.note(read);
        self.machine.index(&Index::Value(v))
    }

    /// Writes a value to a buffer by the threads of the unit.
    fn write_late(&mut self, b: super::BufferId, v: ValueId, data: &Data) -> Result<(), InterpError> {
        let Type::Tile(t) = &self.kernel.types[v.0 as usize] else { return Ok(()) };
        let (buffer, shape) = (&self.kernel.buffers[b.0 as usize], rows_and_columns(&t.shape));
        if self.shared.write_late(buffer, shape, &data.to_bytes(), self.unit, &mut self.chance) {
            return Ok(());
        }
        let unit = unit_name(self.kernel, self.unit);
        let message = format!("{unit} overwrites {b} with %{} while other threads may still read it", v.0);
        Err(self.machine.contract(format!("{message}: a barrier is missing")))
    }

    fn tile_op(&mut self, op: &tile::Op, inst: &Inst) -> Result<(), InterpError> {
        let lazy = |v: &ValueId| self.definitions.place(*v) == Some(&Place::Lazy);
        if !inst.results.is_empty() && inst.results.iter().all(lazy) {
            return Ok(());
        }
        let read = self.prepare(&tile::operands(op))?;
        let results = self.machine.results(op)?;
        self.define(&inst.results, results)?;
        self.note(read);
        Ok(())
    }

    /// Puts the present data of values, and of what lazy ones are computed from, where operations find them. Gives the values in shared memory
    /// that were read.
    fn prepare(&mut self, vs: &[ValueId]) -> Result<Vec<ValueId>, InterpError> {
        let (mut ready, mut read) = (HashSet::new(), Vec::new());
        let mut pending = vs.to_vec();
        while let Some(&v) = pending.last() {
            if ready.contains(&v) {
                pending.pop();
                continue;
            }
            let lazy = self.definitions.inst(v).filter(|_| self.definitions.place(v) == Some(&Place::Lazy));
            if let Some(Inst { op: Op::Tile(op), results, .. }) = lazy {
                let missing: Vec<ValueId> = tile::operands(op).into_iter().filter(|v| !ready.contains(v)).collect();
                if !missing.is_empty() {
                    pending.extend(missing);
                    continue;
                }
                let data = self.machine.results(op)?;
                results.iter().zip(data).for_each(|(&v, data)| self.machine.set(v, data));
            } else if self.fetch(v)? {
                read.push(v);
            }
            ready.insert(v);
            pending.pop();
        }
        Ok(read)
    }

    /// Reads a value's bytes, if it is kept as bytes. Whether it lies in a buffer of its own.
    fn fetch(&mut self, v: ValueId) -> Result<bool, InterpError> {
        let Some(Type::Tile(t)) = self.kernel.types.get(v.0 as usize) else { return Ok(false) };
        let (buffer, copy, own) = match self.definitions.place(v) {
            Some(Place::Shared(b)) => (*b, 0, true),
            Some(Place::Slot(c, slot)) => {
                let Some(stage) = self.taken.get(&v) else {
                    return Err(self.machine.contract(format!("%{} is used before it is taken", v.0)));
                };
                let channel = &self.kernel.channels[c.0 as usize];
                (channel.slots[*slot as usize], stage % u64::from(channel.stages), false)
            }
            _ => return Ok(false),
        };
        let bytes = self.shared.read(&self.kernel.buffers[buffer.0 as usize], copy, rows_and_columns(&t.shape));
        self.machine.set(v, Rc::new(Data::from_bytes(t.dtype, &bytes)));
        Ok(own)
    }

    /// Keeps reads in mind until the next barrier. A single thread is never behind itself.
    fn note(&mut self, read: Vec<ValueId>) {
        let single = self.unit > 0 && self.kernel.roles[self.unit - 1].elected;
        for v in read.into_iter().filter(|_| !single) {
            if let Some(b) = self.definitions.place(v).and_then(Place::buffer) {
                self.shared.note_read(&self.kernel.buffers[b.0 as usize], self.unit);
            }
        }
    }

    /// Puts new values in their places.
    fn define(&mut self, vs: &[ValueId], data: Vec<Rc<Data>>) -> Result<(), InterpError> {
        for (&v, data) in vs.iter().zip(data) {
            match (self.definitions.place(v), &self.kernel.types[v.0 as usize]) {
                (Some(Place::Shared(b)), Type::Tile(_)) => self.write_late(*b, v, &data)?,
                _ => self.machine.set(v, data),
            }
        }
        Ok(())
    }

    /// A copy takes effect.
    fn complete(&mut self, i: usize) -> Result<(), InterpError> {
        let Copying { channel, slot, stage, from, shape, tile } = self.copies.swap_remove(i);
        let channel = &self.kernel.channels[channel.0 as usize];
        let Some(&buffer) = channel.slots.get(slot as usize) else { return Ok(()) };
        let data = match from {
            Source::Tile(bytes) => bytes,
            Source::Memory(access) => {
                self.machine.enter_block(tile, &self.sizes);
                let data = self.machine.load(access)?.to_bytes();
                self.machine.enter_block(self.tiles[self.unit], &self.sizes);
                data
            }
        };
        let copy = stage % u64::from(channel.stages);
        self.shared.write(&self.kernel.buffers[buffer.0 as usize], copy, shape, &data);
        Ok(())
    }
}

enum Turn {
    Ended,
    Moved,
    Stuck,
}

fn rows_and_columns(shape: &[u32]) -> [usize; 2] {
    match shape.split_last() {
        Some((&columns, rows)) => [rows.iter().map(|&n| n as usize).product(), columns as usize],
        None => [1, 1],
    }
}

impl Host for Executor<'_> {
    type Error = InterpError;

    fn integer(&mut self, i: &Index) -> Result<i64, InterpError> {
        if let Index::Value(v) = i {
            let read = self.prepare(&[*v])?;
            self.note(read);
        }
        self.machine.index(i)
    }

    fn truth(&mut self, v: ValueId) -> Result<bool, InterpError> {
        let read = self.prepare(&[v])?;
        self.note(read);
        Ok(matches!(&*self.machine.get(v)?, Data::Bool(b) if b.first() == Some(&true)))
    }

    fn count(&mut self, counter: ValueId, i: i64) -> Result<(), InterpError> {
        let i = i32::try_from(i).map_err(|_| self.machine.contract(format!("loop counter {i} is no i32")))?;
        self.machine.set(counter, Rc::new(Data::I32(vec![i])));
        Ok(())
    }

    fn hand(&mut self, from: &[ValueId], to: &[ValueId]) -> Result<(), InterpError> {
        let tile = |v: ValueId| matches!(self.kernel.types[v.0 as usize], Type::Tile(_));
        let stays = |f: ValueId, t: ValueId| match (self.definitions.place(f), self.definitions.place(t)) {
            (Some(f), Some(t)) => f.stays(t),
            _ => false,
        };
        // Tiles that stay in their buffer need no copy.
        let moved: Vec<(ValueId, ValueId)> =
            from.iter().copied().zip(to.iter().copied()).filter(|&(f, t)| !(tile(f) && stays(f, t))).collect();
        let (from, to): (Vec<ValueId>, Vec<ValueId>) = moved.into_iter().unzip();
        let read = self.prepare(&from)?;
        let data = from.iter().map(|&v| self.machine.get_once(v)).collect::<Result<Vec<_>, _>>()?;
        self.define(&to, data)?;
        self.note(read);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
