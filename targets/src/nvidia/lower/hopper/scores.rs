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
//! other multiplies ([`super::twins`], [`super::overlap`]); with few, several blocks share a multiprocessor, each with one.

use super::config::{ROWS, WARPGROUP};
use super::contraction::{STEP_BYTES, definitions};
use super::loops::ALL_ROWS;
use super::overlap::ALONE;
use super::tensor_map::{can_describe, view_type};
use super::twins::twins;
use super::values::{Names, Values, plain, rename_index, slice};
use crate::nvidia::arch::Arch;
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, Buffer, BufferId, Channel, ChannelId, Fragment, Inst, Op, Place, Role, Scheduled};
use dsc_ir::tile::{self, Index, Program, ReduceKind, Region, TileType, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// The ring of the resident operand, and that of the streamed one.
const RESIDENT: ChannelId = ChannelId(0);
const STREAM: ChannelId = ChannelId(1);
/// Most rows of the resident operand in a warpgroup: columns of an instruction.
const MOST_ROWS: u32 = 256;
/// Rows of sums in a warpgroup: what a quad's lanes divide.
const MOST_SUMS: u32 = 4;
/// Registers of a thread of the producer and of the consumers, where there are two consumer warpgroups.
const REGISTERS: [u32; 2] = [40, 232];
/// Deepest ring, and least.
const STAGES: [u32; 2] = [2, 8];
/// Blocks that share a multiprocessor where one has a single consumer warpgroup with at most 64 rows, or 128; two where two products are in flight. Four also
/// of 128 rows where blocks divide rounds: one product each is then in flight.
pub const SHARING: [u32; 2] = [4, 3];
/// Alignment of operands.
const ALIGN: u32 = 1024;

/// What was found in a program.
struct Pattern<'a> {
    /// `a · bᵀ`, or of the halves of `a` one after the other.
    dots: Vec<&'a tile::Inst>,
    /// The load of `a`, or of each half.
    residents: Vec<&'a tile::Inst>,
    /// The load of `b`, then those of vectors beside it.
    streamed: Vec<&'a tile::Inst>,
    /// What the products are combined with, a value a row of `a`.
    weights: Vec<ValueId>,
    /// Groups of a product, and rows of each.
    groups: [u32; 2],
    /// Whether rows of sums are selected from.
    selects: bool,
    dtype: DType,
}

impl<'a> Pattern<'a> {
    fn of(program: &'a Program, defs: &HashMap<ValueId, &'a tile::Inst>) -> Option<Pattern<'a>> {
        let mut homes = HashMap::new();
        let mut insts = Vec::new();
        collect(&program.body, &mut homes, &mut insts, 0, &mut 1);
        let all = |wanted: fn(&tile::Op) -> bool| -> Vec<&'a tile::Inst> {
            insts.iter().filter(|i| wanted(&i.op)).copied().collect()
        };
        let dots = all(|op| matches!(op, tile::Op::Dot { .. }));
        let sums = all(|op| matches!(op, tile::Op::Reduce { kind: ReduceKind::Sum, .. }));
        let (dot, sum) = (*dots.first()?, *sums.first()?);
        (dots.len() <= 2 && dots.len() == sums.len()).then_some(())?;
        let unknown = |op: &tile::Op| {
            !matches!(
                op,
                tile::Op::BlockId { .. }
                    | tile::Op::Sym(_)
                    | tile::Op::Full { .. }
                    | tile::Op::Iota { .. }
                    | tile::Op::Load { .. }
                    | tile::Op::Store { .. }
                    | tile::Op::Map { .. }
                    | tile::Op::Reduce { .. }
                    | tile::Op::Reshape { .. }
                    | tile::Op::Dot { .. }
                    | tile::Op::For { .. }
                    | tile::Op::Gather { .. }
                    | tile::Op::TopkInit { .. }
                    | tile::Op::TopkPush { .. }
                    | tile::Op::TopkTake { .. }
            )
        };
        let tile::Op::Dot { a, b, acc: None, trans_b: true } = dot.op else { return None };
        let tile::Op::Reduce { x, axis: 1, .. } = sum.op else { return None };
        if insts.iter().any(|i| unknown(&i.op)) {
            return None;
        }
        let (ta, tb, tx) = (program.tile(a)?, program.tile(b)?, program.tile(x)?);
        let (&[rows, k], &[columns, _], &[outer, each, last]) =
            (ta.shape.as_slice(), tb.shape.as_slice(), tx.shape.as_slice())
        else {
            return None;
        };
        let bytes = k * ta.dtype.bytes() as u32;
        let sound = columns == ROWS
            && last == ROWS
            && outer * each == rows
            && each.is_multiple_of(8)
            && bytes == STEP_BYTES
            && ta.dtype == tb.dtype
            && matches!(ta.dtype, DType::E4m3 | DType::Bf16 | DType::F16);
        sound.then_some(())?;
        let load = |v: ValueId| -> Option<&'a tile::Inst> {
            let mut inst = *defs.get(&v)?;
            while let tile::Op::Reshape { x, .. } = inst.op {
                inst = defs.get(&x)?;
            }
            matches!(inst.op, tile::Op::Load { .. }).then_some(inst)
        };
        let first = load(b)?;
        let home = |i: &tile::Inst| homes.get(&i.results[0]).copied();
        let inner = home(dot)?;
        let mut residents = Vec::new();
        for other in &dots {
            let tile::Op::Dot { a: own, b: same, acc: None, trans_b: true } = other.op else { return None };
            (same == b && program.tile(own)? == ta).then_some(())?;
            residents.push(load(own)?);
        }
        let alike =
            |i: &&tile::Inst| matches!(i.op, tile::Op::Reduce { x, axis: 1, .. } if program.tile(x) == Some(tx));
        let outside = residents.iter().all(|r| home(r) != Some(inner));
        let inside = dots.iter().chain(&sums).all(|i| home(i) == Some(inner));
        if home(first)? != inner || !outside || !inside || !sums.iter().all(alike) {
            return None;
        }
        let mut streamed = vec![first];
        for i in insts.iter().filter(|i| matches!(i.op, tile::Op::Load { .. }) && home(i) == Some(inner)) {
            let t = program.tile(i.results[0])?;
            if i.results != first.results && t.elements() > 1 {
                (t.dtype == DType::F32 && t.elements() == ROWS as usize).then_some(())?;
                streamed.push(i);
            }
        }
        for i in streamed.iter().chain(&residents) {
            let tile::Op::Load { view, .. } = &i.op else { return None };
            can_describe(view_type(&program.types, *view)?).then_some(())?;
        }
        // Everything else that is loaded, threads load.
        for i in &insts {
            if let tile::Op::Load { .. } = i.op
                && !residents.iter().any(|r| r.results == i.results)
                && !streamed.iter().any(|s| s.results == i.results)
            {
                matches!(program.tile(i.results[0])?.dtype, DType::F32 | DType::I32).then_some(())?;
            }
        }
        let mut weights = Vec::new();
        for i in &insts {
            if let tile::Op::Map { inputs, .. } = &i.op
                && let Some(dot) = dots.iter().find(|d| inputs.contains(&d.results[0]))
            {
                for &v in inputs.iter().filter(|&&v| v != dot.results[0]) {
                    let t = program.tile(v)?;
                    if t.elements() > 1 {
                        (t.shape == [rows, 1] && homes.get(&v) != Some(&inner)).then_some(())?;
                        weights.push(v);
                    }
                }
            }
        }
        // A selection is of the rows of sums, and what is made of it is stored at the end.
        let selects = insts.iter().filter(|i| matches!(i.op, tile::Op::TopkInit { .. })).count();
        for i in &insts {
            match &i.op {
                tile::Op::TopkInit { rows, k } if selects > 1 || *rows != outer || *k > super::stream::MOST_K => {
                    return None;
                }
                tile::Op::TopkPush { values, .. } if program.tile(*values)?.shape != [outer, ROWS] => return None,
                tile::Op::Store { .. } if selects > 0 && !program.body.insts.contains(i) => return None,
                tile::Op::Gather { view, .. } => {
                    let integers = view_type(&program.types, *view)?.dtype == DType::I32;
                    (selects > 0 && integers).then_some(())?;
                }
                _ => {}
            }
        }
        let (groups, dtype) = ([outer, each], ta.dtype);
        Some(Pattern { dots, residents, streamed, weights, groups, selects: selects > 0, dtype })
    }
}

impl Pattern<'_> {
    /// Whether a warpgroup has as many rows as an instruction may, and halves are whole groups: these are then made one after the other.
    fn is_large(&self) -> bool {
        let [groups, each] = self.groups;
        !self.selects && groups * each == 2 * MOST_ROWS && groups.is_multiple_of(4)
    }
}

/// All instructions, and the region that each is in.
fn collect<'a>(
    region: &'a Region,
    homes: &mut HashMap<ValueId, u32>,
    insts: &mut Vec<&'a tile::Inst>,
    number: u32,
    next: &mut u32,
) {
    for inst in &region.insts {
        homes.extend(inst.results.iter().map(|&r| (r, number)));
        insts.push(inst);
        let inner: Vec<&Region> = match &inst.op {
            tile::Op::For { body, .. } => vec![body],
            tile::Op::If { then, otherwise, .. } => vec![then, otherwise],
            _ => Vec::new(),
        };
        for r in inner {
            let own = *next;
            *next += 1;
            collect(r, homes, insts, own, next);
        }
    }
}

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
        // Of what rarely changes nothing is brought ahead, which leaves room for more blocks.
        let rare = ranges && !p.selects && rows == ALONE;
        let limit = match rows * warpgroups {
            _ if rare => arch.shared_per_sm / SHARING[0] - Arch::SHARED_RESERVED,
            0..=64 => arch.shared_per_sm / SHARING[0] - Arch::SHARED_RESERVED,
            n @ 65..=128 if n != ALONE || p.selects => arch.shared_per_sm / SHARING[1] - Arch::SHARED_RESERVED,
            65..=256 => arch.shared_per_sm / 2 - Arch::SHARED_RESERVED,
            _ => arch.shared_per_block,
        };
        let lists = if p.selects { warpgroups * super::stream::SHARED } else { 0 };
        let shares_weights = p.selects || warpgroups == 1;
        let weights = if shares_weights { rows * 4 * p.weights.len() as u32 } else { 0 };
        let limit = limit.checked_sub(ALIGN + lists + weights)?;
        let depth = |ahead: u32| limit.checked_sub(resident * ahead).map(|left| left / (streamed + vectors + 16));
        let stages = if rare { 1..=1 } else { 1..=2 }.rev().find_map(|ahead| {
            let n = depth(ahead)?;
            (n >= STAGES[0]).then_some([ahead, n.min(STAGES[1])])
        })?;
        Some(Config { warpgroups, stages, resident, streamed, lists, shares_weights })
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
        for i in me.p.streamed.iter().chain(&me.p.residents) {
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
        self.p.streamed.iter().chain(&self.p.residents).any(|i| i.results == inst.results)
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
        BufferId((self.p.residents.len() + self.p.streamed.len()) as u32)
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

    /// What a role does where a ring brings something; whether that is so.
    fn ring(&mut self, inst: &tile::Inst, producing: bool, names: &mut Names, out: &mut Vec<Inst>) -> Option<bool> {
        let tile::Op::Dot { b, .. } = self.p.dots[0].op else { return None };
        if let Some(number) = self.p.residents.iter().position(|r| r.results == inst.results) {
            let last = self.p.residents.len() - 1;
            if producing {
                out.extend((number == 0).then(|| plain(Op::Acquire(RESIDENT))));
                out.push(self.copy(inst, (RESIDENT, number as u32), names)?);
                out.extend((number == last).then(|| plain(Op::Commit(RESIDENT))));
            } else {
                out.extend((number == 0).then(|| plain(Op::Wait(RESIDENT))));
                let tile::Op::Dot { a, .. } = self.p.dots[number].op else { return None };
                let v = self.take(self.program.ty(a).clone(), (RESIDENT, number as u32), out);
                names.insert(a, v);
            }
            return Some(true);
        }
        let Some(number) = self.p.streamed.iter().position(|s| s.results == inst.results) else { return Some(false) };
        // All of a stage comes where the program loads the last of it.
        let last = self.last_streamed()?;
        if number != last {
            return Some(true);
        }
        let loads = self.p.streamed.clone();
        if producing {
            out.push(plain(Op::Acquire(STREAM)));
            for (slot, load) in loads.into_iter().enumerate() {
                out.push(self.copy(load, (STREAM, slot as u32), names)?);
            }
            out.push(plain(Op::Commit(STREAM)));
            return Some(true);
        }
        out.push(plain(Op::Wait(STREAM)));
        let v = self.take(self.program.ty(b).clone(), (STREAM, 0), out);
        names.insert(b, v);
        for (slot, load) in loads.into_iter().enumerate().skip(1) {
            let r = load.results[0];
            let v = self.take(self.program.ty(r).clone(), (STREAM, slot as u32), out);
            let v = self.spread(v, out)?;
            names.insert(r, v);
        }
        Some(true)
    }

    /// Which of the streamed loads the program has last.
    fn last_streamed(&self) -> Option<usize> {
        let mut last = None;
        for_each(&self.program.body, &mut |inst| {
            last = self.p.streamed.iter().position(|s| s.results == inst.results).or(last);
        });
        last
    }

    /// A region as a role runs it.
    fn role(&mut self, region: &'a Region, producing: bool, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        let operands: Vec<ValueId> = self.p.dots.iter().flat_map(|d| tile::operands(&d.op)).collect();
        let mut resident = false;
        let (mut late, mut dots, mut stores) = (Vec::new(), 0, 0);
        for inst in &region.insts {
            let wanted = |v: &ValueId| if producing { self.produced.contains(v) } else { self.consumed.contains(v) };
            let wanted = inst.results.first().is_some_and(wanted);
            if self.ring(inst, producing, names, &mut out)? {
                resident |= self.p.residents.iter().any(|r| r.results == inst.results);
                continue;
            }
            match &inst.op {
                tile::Op::For { lo, hi, step, init, body } => {
                    let needed = |i: &tile::Inst| self.brought(i) || (!producing && effect(i));
                    if !any(body, &needed) {
                        continue;
                    }
                    let carried: &[ValueId] = if producing { &[] } else { init };
                    let carried: Vec<ValueId> = carried.iter().map(|v| names.get(v).copied()).collect::<Option<_>>()?;
                    let states = init.iter().all(|v| matches!(self.program.ty(*v), Type::Topk { .. }));
                    states.then_some(())?;
                    let (lo, hi) = (rename_index(*lo, names)?, rename_index(*hi, names)?);
                    let counter = self.values.fresh(self.program.ty(body.args[0]).clone(), Place::Uniform);
                    names.insert(body.args[0], counter);
                    let mut args = vec![counter];
                    let mut results = Vec::new();
                    for i in 0..carried.len() {
                        let place = self.sums();
                        args.push(self.values.fresh(self.program.ty(body.args[1 + i]).clone(), place.clone()));
                        names.insert(body.args[1 + i], args[1 + i]);
                        results.push(self.values.fresh(self.program.ty(body.args[1 + i]).clone(), place));
                    }
                    let mut insts = self.role(body, producing, names)?;
                    let yields = if carried.is_empty() { &[][..] } else { &body.yields };
                    let mut yields: Vec<ValueId> =
                        yields.iter().map(|v| names.get(v).copied()).collect::<Option<_>>()?;
                    names.extend(inst.results.iter().copied().zip(results.iter().copied()));
                    let mut init = carried;
                    let last =
                        self.push_late((&mut init, &mut args), &mut insts, (&mut yields, &mut results), &mut out);
                    let op = Op::For { lo, hi, step: *step, init, body: Block { args, insts, yields } };
                    out.push(Inst { results, op, scratch: None });
                    if let Some(last) = last {
                        names.insert(inst.results[0], last.results[0]);
                        out.push(last);
                    }
                }
                tile::Op::TopkInit { .. } if !producing => {
                    let place = self.place(inst, producing)?;
                    let state = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], state);
                    let scratch = Some(self.lists());
                    out.push(Inst { results: vec![state], op: Op::Tile(inst.op.clone()), scratch });
                }
                tile::Op::TopkPush { state, values, base } if !producing => {
                    let values = *names.get(values)?;
                    let values = self.spread(values, &mut out)?;
                    let op = tile::Op::TopkPush { state: *names.get(state)?, values, base: *names.get(base)? };
                    let place = self.place(inst, producing)?;
                    let new = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], new);
                    out.push(Inst { results: vec![new], op: Op::Tile(op), scratch: None });
                }
                tile::Op::TopkTake { state } if !producing => {
                    // What is stored is made of the numbers as they come.
                    let op = tile::Op::TopkTake { state: *names.get(state)? };
                    let place = self.sums();
                    let mut results = Vec::new();
                    for &r in &inst.results {
                        results.push(self.values.fresh(self.program.ty(r).clone(), place.clone()));
                        names.insert(r, results[results.len() - 1]);
                    }
                    late.push(Inst { results, op: Op::Tile(op), scratch: None });
                }
                tile::Op::Store { view, index, value } if !producing => {
                    // The second product reads the stage while sums of the first are made.
                    stores += usize::from(dots == 2);
                    let mut value = *names.get(value)?;
                    if late.is_empty() {
                        value = self.spread(value, &mut out)?;
                    }
                    out.append(&mut late);
                    let index = index.iter().map(|&i| rename_index(i, names)).collect::<Option<_>>()?;
                    let op = tile::Op::Store { view: *names.get(view)?, index, value };
                    out.push(plain(Op::Tile(op)));
                    if stores == 1 {
                        out.push(plain(Op::Release { channel: STREAM, lag: 0 }));
                    }
                }
                // Other names of what a ring brings.
                tile::Op::Reshape { .. } if inst.results.iter().any(|r| operands.contains(r)) => {}
                tile::Op::Dot { a, b, .. } if !producing => {
                    let op = tile::Op::Dot { a: *names.get(a)?, b: *names.get(b)?, acc: None, trans_b: true };
                    let place = self.products();
                    let v = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], v);
                    out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
                    dots += 1;
                    if self.p.dots.len() == 1 {
                        out.push(plain(Op::Release { channel: STREAM, lag: 0 }));
                    }
                }
                tile::Op::Reduce { x, axis, kind } if wanted => {
                    let place = self.place(inst, producing)?;
                    let op = tile::Op::Reduce { x: *names.get(x)?, axis: *axis, kind: *kind };
                    let v = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], v);
                    out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
                }
                _ if wanted => {
                    let place = self.place(inst, producing)?;
                    let shared = matches!(place, Place::Shared(_));
                    if shared {
                        // Some thread may still read those of the tile before.
                        out.push(plain(Op::Barrier));
                    }
                    out.push(self.values.copied(inst, place, names)?);
                    if shared {
                        out.push(plain(Op::Barrier));
                    }
                }
                _ => {}
            }
        }
        if resident && !producing {
            out.push(plain(Op::Release { channel: RESIDENT, lag: 0 }));
        }
        Some(out)
    }

    /// Offers the sums of a round while the product of the next one is made, if the loop selects: it carries them, from a round that
    /// has nothing. What comes behind the loop offers the last ones.
    fn push_late(
        &mut self,
        (init, args): (&mut Vec<ValueId>, &mut Vec<ValueId>),
        insts: &mut Vec<Inst>,
        (yields, results): (&mut Vec<ValueId>, &mut Vec<ValueId>),
        before: &mut Vec<Inst>,
    ) -> Option<Inst> {
        let is_push = |i: &Inst| matches!(i.op, Op::Tile(tile::Op::TopkPush { .. }));
        let release = insts.iter().position(|i| matches!(i.op, Op::Release { channel: STREAM, .. }))?;
        let mut push = insts.remove(insts.iter().position(is_push)?);
        let Op::Tile(tile::Op::TopkPush { state, values, base }) = push.op else { return None };
        // Nothing but the push changes the state.
        let [values_type, base_type] = [values, base].map(|v| self.values.types[v.0 as usize].clone());
        let Type::Tile(TileType { shape, .. }) = &values_type else { return None };
        // As if it were the tile before the first.
        let number = -i32::try_from(ROWS).ok()?;
        let nothing = [(tile::Scalar::F32(f32::NEG_INFINITY), shape.clone()), (tile::Scalar::I32(number), Vec::new())];
        let mut carried = Vec::new();
        for ((value, shape), ty) in nothing.into_iter().zip([values_type, base_type]) {
            let place = if shape.is_empty() { Place::Uniform } else { self.sums() };
            let [first, arg, result] = [0; 3].map(|_| self.values.fresh(ty.clone(), place.clone()));
            before.push(Inst { results: vec![first], op: Op::Tile(tile::Op::Full { value, shape }), scratch: None });
            init.push(first);
            args.push(arg);
            results.push(result);
            carried.push((arg, result));
        }
        yields.extend([values, base]);
        let (offered, number) = (carried[0], carried[1]);
        push.op = Op::Tile(tile::Op::TopkPush { state, values: offered.0, base: number.0 });
        let ty = self.values.types[state.0 as usize].clone();
        let place = self.sums();
        let end = self.values.fresh(ty, place);
        insts.insert(release, push);
        let op = tile::Op::TopkPush { state: results[0], values: offered.1, base: number.1 };
        Some(Inst { results: vec![end], op: Op::Tile(op), scratch: None })
    }

    fn scheduled(mut self) -> Option<Scheduled> {
        let mut names = self.values.names.clone();
        let producer = self.role(&self.program.body, true, &mut names)?;
        let mut names = self.values.names.clone();
        let consumer = self.role(&self.program.body, false, &mut names)?;
        let warps = self.config.warpgroups * WARPGROUP / Arch::WARP;
        let redistributed = self.config.warpgroups == 2;
        // Of many tokens the later see more columns; few are of many sequences, which see whatever they have.
        let folded = redistributed && self.program.grid.len() == 2;
        let (produces, consumes) =
            if redistributed { ([0, 4], [4, 4 + warps]) } else { ([warps, warps + 1], [0, warps]) };
        let role = |name: &str, warps, registers, elected, insts| Role {
            name: name.into(),
            warps,
            registers: redistributed.then_some(registers),
            elected,
            body: Block { insts, ..Block::default() },
        };
        let roles = vec![
            role("producer", produces, REGISTERS[0], true, producer),
            role("consumer", consumes, REGISTERS[1], false, consumer),
        ];
        let (buffers, [residents, slots]) = self.buffers();
        let [ahead, depth] = self.config.stages;
        Some(Scheduled {
            name: self.program.name.clone(),
            grid: self.program.grid.clone(),
            // Neighbours share the resident operand.
            persistent: Some(if folded { 1 } else { ALL_ROWS }),
            folded,
            cluster: None,
            team: 1,
            alternate: false,
            dies: 1,
            params: self.values.params,
            threads: produces[1].max(consumes[1]) * Arch::WARP,
            buffers,
            channels: vec![
                Channel { name: "resident".into(), stages: ahead, slots: residents },
                Channel { name: "stream".into(), stages: depth, slots },
            ],
            types: self.values.types,
            places: self.values.places,
            common: Block::default(),
            roles,
        })
    }

    /// Buffers, and those of a stage of each ring.
    fn buffers(&self) -> (Vec<Buffer>, [Vec<BufferId>; 2]) {
        let c = &self.config;
        let columns = STEP_BYTES / self.p.dtype.bytes() as u32;
        let operand = |name: &str, bytes: u32, copies: u32, offset: u32| Buffer {
            name: name.into(),
            dtype: self.p.dtype,
            shape: [bytes / STEP_BYTES, columns],
            pitch: STEP_BYTES,
            swizzle: STEP_BYTES,
            copies,
            offset,
            outside: false,
        };
        let [ahead, depth] = c.stages;
        let mut end = 0;
        let mut buffers = Vec::new();
        for _ in &self.p.residents {
            let bytes = c.resident / self.p.residents.len() as u32;
            buffers.push(operand("resident", bytes, ahead, end));
            end += bytes * ahead;
        }
        let residents = (0..buffers.len() as u32).map(BufferId).collect();
        buffers.push(operand("streamed", c.streamed, depth, end));
        end += c.streamed * depth;
        for _ in 1..self.p.streamed.len() {
            buffers.push(Buffer {
                name: "vector".into(),
                dtype: DType::F32,
                shape: [1, ROWS],
                pitch: ROWS * 4,
                swizzle: 0,
                copies: depth,
                offset: end,
                outside: false,
            });
            end += ROWS * 4 * depth;
        }
        let slots = (self.p.residents.len() as u32..buffers.len() as u32).map(BufferId).collect();
        if c.lists > 0 {
            buffers.push(Buffer {
                name: "lists".into(),
                dtype: DType::I32,
                shape: [1, c.lists / 4],
                pitch: c.lists,
                swizzle: 0,
                copies: 1,
                offset: end,
                outside: false,
            });
            end += c.lists;
        }
        let rows = c.resident / STEP_BYTES;
        for _ in self.p.weights.iter().filter(|_| c.shares_weights) {
            buffers.push(Buffer {
                name: "weights".into(),
                dtype: DType::F32,
                shape: [rows, 1],
                pitch: 4,
                swizzle: 0,
                copies: 1,
                offset: end,
                outside: false,
            });
            end += rows * 4;
        }
        (buffers, [residents, slots])
    }
}

/// Whether an instruction is one for whose effect a kernel runs.
fn effect(inst: &tile::Inst) -> bool {
    matches!(inst.op, tile::Op::Store { .. } | tile::Op::TopkPush { .. })
}

/// Visits every instruction.
fn for_each<'a>(region: &'a Region, visit: &mut dyn FnMut(&'a tile::Inst)) {
    for inst in &region.insts {
        visit(inst);
        if let tile::Op::For { body, .. } = &inst.op {
            for_each(body, visit);
        }
    }
}

/// Whether an instruction of the region, or within one, is so.
fn any(region: &Region, wanted: &dyn Fn(&tile::Inst) -> bool) -> bool {
    region.insts.iter().any(|inst| wanted(inst) || matches!(&inst.op, tile::Op::For { body, .. } if any(body, wanted)))
}
