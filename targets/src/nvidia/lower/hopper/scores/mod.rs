//! Weighted sums of products over groups of rows: a resident operand against a streamed one.
//!
//! ```text
//! a = load x                                  [R·H, k], once a block
//! for j in lo..hi {
//!     b = load y at j                         [64, k]
//!     s = Σ over H of map(a · bᵀ, ..)         [R, 64]
//!     store map(s, ..)
//! }
//! ```
//!
//! Where rows of sums are selected from, a round offers the sums of the round before while its own product is made.
//!
//! The scores of a lightning indexer are of this form. A producer brings `a` through a ring of its own (the next block's while this one is
//! at work), and `b`, with the vectors of 64 that are combined with it, through a second. Consumers make `b` the instruction's
//! rows and `a` its columns, so that a thread has two of 64 columns and many rows: it adds most of a sum in its own registers, and the
//! four lanes of a quad then exchange halves until each has the sums that [`Atom::WgmmaSums`] gives it.
//!
//! **Arithmetic**, `k` of 128 e4m3: a multiprocessor multiplies 32 elements of `a · bᵀ` a cycle and needs two operations (maximum, fused
//! multiply-add) for each, of 128 a cycle: half the issue slots. So sums hide behind products if something multiplies
//! meanwhile: with many rows two warpgroups share a stage of `b`, each with up to 256 rows of `a` in two halves, one of which is summed while the
//! other multiplies ([`super::twins`], [`super::overlap`]); with few, several blocks share a multiprocessor, each with one. Where blocks divide rounds, four
//! warpgroups of one block take stages of `b` in turns ([`super::turns`]): `a` is there once, and so are the few stages that memory needs under way.

mod memory;
mod pattern;
mod roles;

use super::config::ROWS;
use super::contraction::{STEP_BYTES, definitions};
use super::overlap::ALONE;
use super::plan::for_each;
use super::twins::twins;
use super::values::{Names, Values, plain, rename_index, slice};
use crate::nvidia::arch::Arch;
use dsc_ir::sched::{Atom, BufferId, ChannelId, Fragment, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, Program, Region, TileType, Type, ValueId};
use pattern::{MOST_ROWS, Pattern};
use std::collections::{HashMap, HashSet};

/// The ring of the resident operand, and that of the streamed one.
const RESIDENT: ChannelId = ChannelId(0);
const STREAM: ChannelId = ChannelId(1);
/// Rows of sums in a warpgroup: what a quad's lanes divide.
const MOST_SUMS: u32 = 4;
/// Registers of a thread of the producer and of the consumers, where there are two consumer warpgroups.
const REGISTERS: [u32; 2] = [40, 232];
/// Warpgroups that take stages in turns where blocks divide rounds of 128 rows, and registers as above.
const TURNS: u32 = 4;
const REGISTERS_IN_TURNS: [u32; 2] = [32, 112];
/// Deepest ring, and least. Where stages are taken in turns there is room for more, but more bytes under way are slower.
const STAGES: [u32; 2] = [2, 8];
/// Blocks that share a multiprocessor where one has a single consumer warpgroup with at most 64 rows, or 128; two where two products are in flight.
const SHARING: [u32; 2] = [4, 3];
/// Alignment of operands.
const ALIGN: u32 = 1024;

/// The schedule of a program of this form; none if it is not. `ranges`: blocks are to divide the rounds of tiles, so that what is resident rarely changes.
pub fn plan(program: &Program, arch: &Arch, ranges: bool) -> Option<Scheduled> {
    let mut defs = HashMap::new();
    definitions(&program.body, &mut defs);
    let pattern = Pattern::of(program, &defs)?;
    if pattern.is_large() {
        let [groups, each] = pattern.groups;
        let halves = twins(program, pattern.dots[0].results[0], [groups, groups * each]);
        let planned = halves.as_ref().and_then(|halves| planned(halves, arch, ranges));
        if planned.is_some() {
            return planned;
        }
    }
    planned(program, arch, ranges)
}

/// The same of a program whose groups are as they stay.
fn planned(program: &Program, arch: &Arch, ranges: bool) -> Option<Scheduled> {
    let mut defs = HashMap::new();
    definitions(&program.body, &mut defs);
    let pattern = Pattern::of(program, &defs)?;
    let config = Config::of(&pattern, arch, ranges)?;
    Planner::new(program, pattern, config, defs).scheduled()
}

/// Warpgroups and shared memory.
struct Config {
    warpgroups: u32,
    /// How many such teams of warpgroups take stages in turns.
    turns: u32,
    /// Stages of the resident operand, and of the streamed one.
    stages: [u32; 2],
    /// Bytes of a stage of each slot.
    resident: u32,
    streamed: u32,
    /// Bytes for selections.
    lists: u32,
    /// Whether weights are read from shared memory with every stage, which leaves registers for selections or for more blocks; else each
    /// thread keeps those of its rows, which is faster.
    shares_weights: bool,
}

impl Config {
    fn of(p: &Pattern<'_>, arch: &Arch, ranges: bool) -> Option<Config> {
        let [sums, each] = [p.groups[0] * p.dots.len() as u32, p.groups[1]];
        let rows = sums * each;
        let warpgroups = if rows > MOST_ROWS || sums > MOST_SUMS { 2 } else { 1 };
        let own = sums / warpgroups;
        let fits = sums.is_multiple_of(warpgroups) && matches!(own, 1 | 2 | 4) && rows / warpgroups <= MOST_ROWS;
        fits.then_some(())?;
        let (resident, streamed, vectors) =
            (rows * STEP_BYTES, ROWS * STEP_BYTES, ROWS * 4 * (p.streamed.len() as u32 - 1));
        let turns = if ranges && !p.selects && rows == ALONE { TURNS } else { 1 };
        let limit = match rows * warpgroups {
            _ if turns > 1 => arch.shared_per_block,
            0..=64 => arch.shared_per_sm / SHARING[0] - Arch::SHARED_RESERVED,
            n @ 65..=128 if n != ALONE || p.selects => arch.shared_per_sm / SHARING[1] - Arch::SHARED_RESERVED,
            65..=256 => arch.shared_per_sm / 2 - Arch::SHARED_RESERVED,
            _ => arch.shared_per_block,
        };
        let lists = if p.selects { warpgroups * super::stream::SHARED } else { 0 };
        let shares_weights = p.selects || warpgroups * turns == 1;
        let weights = if shares_weights { rows * 4 * p.weights.len() as u32 } else { 0 };
        let columns = if turns > 1 { rows * 4 * p.columns.len() as u32 } else { 0 };
        let limit = limit.checked_sub(ALIGN + lists + weights)?;
        let depth =
            |ahead: u32| limit.checked_sub((resident + columns) * ahead).map(|left| left / (streamed + vectors + 16));
        let stages = [2, 1].into_iter().find_map(|ahead| {
            let n = depth(ahead)?.min(STAGES[1]) / turns * turns;
            (n >= STAGES[0]).then_some([ahead, n])
        })?;
        Some(Config { warpgroups, turns, stages, resident, streamed, lists, shares_weights })
    }
}

struct Planner<'a> {
    program: &'a Program,
    p: Pattern<'a>,
    config: Config,
    defs: HashMap<ValueId, &'a tile::Inst>,
    produced: HashSet<ValueId>,
    consumed: HashSet<ValueId>,
    /// What weights are computed from.
    of_rows: HashSet<ValueId>,
    values: Values<'a>,
}

impl<'a> Planner<'a> {
    fn new(
        program: &'a Program,
        p: Pattern<'a>,
        config: Config,
        defs: HashMap<ValueId, &'a tile::Inst>,
    ) -> Planner<'a> {
        let mut p = p;
        if config.turns == 1 {
            p.columns.clear();
        }
        let mut me = Planner {
            program,
            p,
            config,
            defs,
            produced: HashSet::new(),
            consumed: HashSet::new(),
            of_rows: HashSet::new(),
            values: Values::new(program),
        };
        let mut copied = me.bounds(&|inst| me.brought(inst));
        for i in me.p.streamed.iter().chain(&me.p.residents).chain(&me.p.columns) {
            copied.extend(tile::operands(&i.op));
        }
        let mut kept = me.bounds(&|inst| effect(inst) || me.brought(inst));
        for_each(&program.body, &mut |inst| {
            if effect(inst) {
                kept.extend(tile::operands(&inst.op));
            }
        });
        me.produced = me.slice(copied);
        me.consumed = me.slice(kept);
        me.of_rows = me.slice(me.p.weights.clone());
        me
    }

    /// Whether an instruction is a load through a ring.
    fn brought(&self, inst: &tile::Inst) -> bool {
        self.p.streamed.iter().chain(&self.p.residents).chain(&self.p.columns).any(|i| i.results == inst.results)
    }

    /// Bounds of loops that hold such an instruction.
    fn bounds(&self, holds: &dyn Fn(&tile::Inst) -> bool) -> Vec<ValueId> {
        let mut out = Vec::new();
        for_each(&self.program.body, &mut |inst| {
            if let tile::Op::For { lo, hi, body, .. } = &inst.op
                && any(body, holds)
            {
                out.extend([lo, hi].into_iter().filter_map(|i| match i {
                    Index::Value(v) => Some(*v),
                    Index::Const(_) => None,
                }));
            }
        });
        out
    }

    /// These values and what they are computed from; what comes through a ring is not followed.
    fn slice(&self, roots: Vec<ValueId>) -> HashSet<ValueId> {
        slice(&self.defs, roots, |v| self.defs.get(&v).is_some_and(|inst| self.brought(inst)))
    }

    fn products(&self) -> Place {
        Place::Fragment(Fragment { atom: Atom::WgmmaTransposed, warps: [self.config.warpgroups, 1] })
    }

    fn sums(&self) -> Place {
        Place::Fragment(Fragment { atom: Atom::WgmmaSums, warps: [self.config.warpgroups, 1] })
    }

    /// The shared memory of selections.
    fn lists(&self) -> BufferId {
        BufferId((self.p.residents.len() + self.p.columns.len() + self.p.streamed.len()) as u32)
    }

    /// The shared memory of the first of the weights.
    fn weights(&self) -> BufferId {
        BufferId(self.lists().0 + u32::from(self.config.lists > 0))
    }

    /// Where an instruction's result lies.
    fn place(&self, inst: &tile::Inst, producing: bool) -> Option<Place> {
        let r = *inst.results.first()?;
        if let tile::Op::TopkInit { .. } | tile::Op::TopkPush { .. } | tile::Op::TopkTake { .. } = inst.op {
            return Some(self.sums());
        }
        let t = self.program.tile(r)?;
        Some(match &inst.op {
            _ if t.elements() == 1 => Place::Uniform,
            // One thread of the producer computes alone, what it needs of vectors where it needs it.
            _ if producing => Place::Lazy,
            tile::Op::Dot { .. } => self.products(),
            tile::Op::Reduce { .. } => self.sums(),
            _ if self.p.weights.contains(&r) && !self.config.shares_weights => self.products(),
            _ if self.p.weights.contains(&r) => {
                let number = self.p.weights.iter().position(|&w| w == r)?;
                Place::Shared(BufferId(self.weights().0 + number as u32))
            }
            tile::Op::Load { .. } if !self.of_rows.contains(&r) => self.sums(),
            _ => Place::Lazy,
        })
    }

    /// Copies a tile into a slot of the acquired stage.
    fn copy(&self, inst: &tile::Inst, (channel, slot): (ChannelId, u32), names: &Names) -> Option<Inst> {
        let tile::Op::Load { view, index, shape } = &inst.op else { return None };
        let index = index.iter().map(|&i| rename_index(i, names)).collect::<Option<_>>()?;
        Some(plain(Op::Copy {
            channel,
            slot,
            view: *names.get(view)?,
            rows: None,
            index,
            shape: shape.clone(),
            shared: false,
        }))
    }

    /// A tile taken from a slot.
    fn take(&mut self, ty: Type, (channel, slot): (ChannelId, u32), out: &mut Vec<Inst>) -> ValueId {
        let v = self.values.fresh(ty, Place::Slot(channel, slot));
        out.push(Inst { results: vec![v], op: Op::Take { channel, slot }, scratch: None });
        v
    }

    /// The same tile in each thread's part of the sums.
    fn spread(&mut self, v: ValueId, out: &mut Vec<Inst>) -> Option<ValueId> {
        let ty = self.values.types[v.0 as usize].clone();
        let Type::Tile(TileType { shape, .. }) = &ty else { return None };
        let op = Op::Tile(tile::Op::Reshape { x: v, shape: shape.clone() });
        let place = self.sums();
        let new = self.values.fresh(ty, place);
        out.push(Inst { results: vec![new], op, scratch: None });
        Some(new)
    }
}

/// Whether an instruction is one for whose effect a kernel runs.
fn effect(inst: &tile::Inst) -> bool {
    matches!(inst.op, tile::Op::Store { .. } | tile::Op::TopkPush { .. })
}

/// Whether an instruction of the region, or within one, is so.
fn any(region: &Region, wanted: &dyn Fn(&tile::Inst) -> bool) -> bool {
    region.insts.iter().any(|inst| wanted(inst) || matches!(&inst.op, tile::Op::For { body, .. } if any(body, wanted)))
}
