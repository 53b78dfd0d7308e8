//! Channels pair up: each has one producer, and nothing ever waits for what does not come.
//!
//! Units are deterministic and channels are queues with one writer, so whether a kernel hangs does not depend on how its units interleave: one
//! run for a size shows it for that size. What is run is the control flow alone, on [`Ring`]s: symbols, block numbers and whatever comes from
//! memory get values of a [`Trial`], the same for the same expression in every unit, so that trip counts agree exactly where both sides
//! compute them from the same things. Loops without channels are left out. Sizes tried: none, one, and a few that are unlike each other
//! and longer than any ring.
//!
//! Two channels may have a buffer in common ([`in_common`]). What fills such a stage goes only when nobody else can go on: then nothing of the
//! other channel may be full or held, and nobody else about to fill. As each role fills one of them and alone empties the other, whatever was
//! filled before is behind it in every interleaving, and whatever comes after waits for it.
//!
//! Also checked on the way: a stage is filled whole between acquire and commit, stages are released in order and each once, and what was taken
//! is not read after its stage was given back.

use super::{Report, location};
use crate::dtype::DType;
use crate::sched::ring::{Ring, Unit, channel_of, rings, unit_name, units, users};
use crate::sched::visit::{Definitions, operands};
use crate::sched::walk::{Host, Walker};
use crate::sched::{Block, Channel, ChannelId, Inst, Op, Place, Scheduled};
use crate::tile::interp::{Data, eval_map};
use crate::tile::{self, Index, TileType, Type, ValueId};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::rc::Rc;

/// Longest run, in instructions of all units.
const MAX_STEPS: usize = 100_000;
/// Tiles that a persistent block is run for, alike to it.
const PERSISTENT_TILES: usize = 3;
/// Runs.
const TRIALS: u64 = 8;

pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    if !pairs(kernel, report) || !commons(kernel, report) {
        return;
    }
    let definitions = Definitions::new(kernel);
    let needed: Vec<Needed> = units(kernel).into_iter().map(|block| Needed::new(&definitions, block)).collect();
    for seed in 0..if kernel.channels.is_empty() { 0 } else { TRIALS } {
        let before = report.diagnostics.len();
        Run::new(kernel, &needed, seed).all(report);
        if report.diagnostics.len() > before {
            return;
        }
    }
}

/// One producer and at least one consumer each, all roles or all `common`.
fn pairs(kernel: &Scheduled, report: &mut Report) -> bool {
    let before = report.diagnostics.len();
    for (i, users) in users(kernel).into_iter().enumerate() {
        let place = format!(", channel c{i}");
        let names = |units: &[Unit]| units.iter().map(|&u| unit_name(kernel, u)).collect::<Vec<_>>().join(" and ");
        if users.producers.len() != 1 {
            let who = if users.producers.is_empty() { "none".into() } else { names(&users.producers) };
            report.add(&place, format!("a channel has one producer; this has {who}"));
        }
        if users.consumers.is_empty() {
            report.add(&place, "nothing waits for this channel");
        }
        let all: BTreeSet<Unit> = users.producers.into_iter().chain(users.consumers).collect();
        if all.len() > 1 && all.contains(&0) {
            report.add(&place, "a channel is used by common alone, or by roles alone");
        }
    }
    report.diagnostics.len() == before
}

/// By channel, the others that have a buffer of it.
fn in_common(kernel: &Scheduled) -> Vec<BTreeSet<usize>> {
    let others = |(i, c): (usize, &Channel)| {
        let all = c.slots.iter().flat_map(|&b| kernel.channels_of(b)).map(|c| c.0 as usize);
        all.filter(|&other| other != i).collect()
    };
    kernel.channels.iter().enumerate().map(others).collect()
}

/// Channels with a buffer in common are two of one stage each, to and fro between two roles.
fn commons(kernel: &Scheduled, report: &mut Report) -> bool {
    let before = report.diagnostics.len();
    let (in_common, users) = (in_common(kernel), users(kernel));
    for (i, others) in in_common.iter().enumerate() {
        let Some(&other) = others.first() else { continue };
        let two = others.len() == 1 && in_common[other].len() == 1;
        let single = kernel.channels[i].stages == 1;
        let returns = users[i].producers == users[other].consumers && users[i].consumers == users[other].producers;
        if !(two && single && returns) {
            let what = format!(
                "has a buffer of c{other}, and the two are not of one stage each, to and fro between two roles"
            );
            report.add(&format!(", channel c{i}"), what);
        }
    }
    report.diagnostics.len() == before
}

/// What of a unit matters to channels.
struct Needed {
    /// Counters of loops with channel operations inside.
    loops: HashSet<ValueId>,
}

impl Needed {
    fn new(definitions: &Definitions<'_>, block: &Block) -> Needed {
        let mut needed = Needed { loops: HashSet::new() };
        needed.block(definitions, block);
        needed
    }

    /// Whether a block holds a channel operation, or reads a slot.
    fn block(&mut self, definitions: &Definitions<'_>, block: &Block) -> bool {
        let mut any = reads_slot(definitions, &block.yields);
        for inst in &block.insts {
            let mut inside = false;
            for b in inst.op.blocks() {
                inside |= self.block(definitions, b);
            }
            if let (Op::For { body, .. }, true) = (&inst.op, inside) {
                self.loops.extend(body.args.first());
            }
            any |= inside || channel_of(&inst.op).is_some() || reads_slot(definitions, &definitions.inputs(inst));
        }
        any
    }
}

fn reads_slot(definitions: &Definitions<'_>, vs: &[ValueId]) -> bool {
    definitions.sources(vs).iter().any(|&v| matches!(definitions.place(v), Some(Place::Slot(..))))
}

/// Values that nothing but the seed decides.
#[derive(Clone, Copy)]
struct Trial {
    seed: u64,
    stages: u64,
}

impl Trial {
    /// A number for what the hash stands for: small, but not always smaller than a ring is deep.
    fn number(self, hash: u64) -> i32 {
        match self.seed {
            0 => 0,
            1 => 1,
            seed => {
                let mut hasher = DefaultHasher::new();
                (seed, hash).hash(&mut hasher);
                (hasher.finish() % (3 * self.stages + 4)) as i32
            }
        }
    }

    /// A symbol: sizes of tensors, some in the hundreds so that loops over tiles of them go round.
    fn symbol(self, hash: u64) -> i32 {
        let n = self.number(hash);
        if self.seed >= 4 { n.saturating_mul(61) } else { n }
    }
}

/// What is known of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Known {
    Int(i32),
    Bool(bool),
    /// Something that is the same wherever the hash is.
    Some(u64),
}

struct Run<'a> {
    kernel: &'a Scheduled,
    needed: &'a [Needed],
    definitions: Definitions<'a>,
    trial: Trial,
    rings: Vec<Ring>,
    /// Counters, and what was handed on.
    known: HashMap<ValueId, Known>,
    /// The stage of what was taken.
    taken: HashMap<ValueId, u64>,
    /// Slots filled of the stage acquired last.
    filled: Vec<HashSet<u32>>,
    /// By channel, the other one that has a buffer of it; and the one of which a stage may be acquired although.
    in_common: Vec<Option<usize>>,
    allowed: Option<usize>,
    /// How often each unit has come to meet other blocks, and how often all have.
    come: Vec<u32>,
    met: u32,
    /// Who waits for the others to come.
    meeting: HashSet<Unit>,
    unit: Unit,
}

impl<'a> Run<'a> {
    fn new(kernel: &'a Scheduled, needed: &'a [Needed], seed: u64) -> Run<'a> {
        let rings = rings(kernel);
        let stages = rings.iter().map(Ring::stages).max().unwrap_or(1).min(64);
        Run {
            kernel,
            needed,
            definitions: Definitions::new(kernel),
            trial: Trial { seed, stages },
            filled: vec![HashSet::new(); rings.len()],
            in_common: in_common(kernel).into_iter().map(|others| others.first().copied()).collect(),
            allowed: None,
            rings,
            known: HashMap::new(),
            taken: HashMap::new(),
            come: vec![0; 1 + kernel.roles.len()],
            met: 0,
            meeting: HashSet::new(),
            unit: 0,
        }
    }

    /// Runs `common`, then the roles by turns, each until it must wait.
    fn all(&mut self, report: &mut Report) {
        let tiles = |unit| if unit > 0 && self.kernel.persistent.is_some() { PERSISTENT_TILES } else { 1 };
        let blocks = units(self.kernel).into_iter().enumerate();
        let mut walkers: Vec<(Unit, Walker<'a>, Option<&'a Inst>)> =
            blocks.map(|(unit, block)| (unit, Walker::repeat(block, tiles(unit)), None)).collect();
        let mut steps = 0;
        let roles = walkers.split_off(1);
        for mut group in [walkers, roles] {
            while !group.is_empty() {
                let before = steps;
                let mut waiting = Vec::new();
                for (unit, mut walker, pending) in group {
                    match self.turn(unit, &mut walker, pending, &mut steps) {
                        Ok(Some(inst)) => waiting.push((unit, walker, Some(inst))),
                        Ok(None) => {}
                        Err((inst, message)) => return report.add(&location(self.kernel, unit, inst), message),
                    }
                    if steps > MAX_STEPS {
                        return;
                    }
                }
                if steps == before && !waiting.is_empty() {
                    let pending: Vec<&'a Inst> = waiting.iter().filter_map(|w| w.2).collect();
                    match self.allow(&pending) {
                        Ok(true) => {
                            group = waiting;
                            continue;
                        }
                        Ok(false) => {}
                        Err((inst, message)) => {
                            let unit =
                                waiting.iter().find(|w| w.2.is_some_and(|i| std::ptr::eq(i, inst))).map_or(0, |w| w.0);
                            return report.add(&location(self.kernel, unit, inst), message);
                        }
                    }
                    for (unit, _, inst) in &waiting {
                        let Some(inst) = inst else { continue };
                        report.add(&location(self.kernel, *unit, inst), self.stuck(inst));
                    }
                    return;
                }
                group = waiting;
            }
        }
        for (c, ring) in self.rings.iter().enumerate() {
            if let Some(message) = ring.uneven(&|unit| unit_name(self.kernel, unit)) {
                let size = self.size();
                report.add(&format!(", channel c{c}"), format!("{message}{size}"));
            }
        }
    }

    /// Lets one go on who waits to fill a buffer that two channels have, as nobody else can. Whether there is one.
    fn allow(&mut self, pending: &[&'a Inst]) -> Result<bool, (&'a Inst, String)> {
        let fills = |inst: &&'a Inst| match inst.op {
            Op::Acquire(ChannelId(c)) if self.in_common[c as usize].is_some() => {
                self.rings[c as usize].has_free().then_some((*inst, c as usize))
            }
            _ => None,
        };
        let able: Vec<(&Inst, usize)> = pending.iter().filter_map(fills).collect();
        let Some(&(inst, c)) = able.first() else { return Ok(false) };
        let other = self.in_common[c].unwrap_or(c);
        if able.iter().any(|&(_, d)| d == other) {
            return Err((inst, format!("c{c} and c{other} have a buffer in common, and both may be filled at once")));
        }
        if self.rings[other].uneven(&|_| String::new()).is_some() {
            return Err((inst, format!("fills a buffer that c{other} has too, of which a stage is full or held")));
        }
        self.allowed = Some(c);
        Ok(true)
    }

    /// Whether all roles have come to where this one meets the team's other blocks. Then all stages are free.
    fn meet(&mut self) -> Result<bool, String> {
        let unit = self.unit;
        if !self.meeting.insert(unit) {
            return Ok(self.come[unit] <= self.met && self.meeting.remove(&unit));
        }
        self.come[unit] += 1;
        if self.come[1..].iter().all(|&n| n > self.met) {
            self.met += 1;
            if let Some(ring) = self.rings.iter().find_map(|r| r.uneven(&|unit| unit_name(self.kernel, unit))) {
                return Err(format!("meets other blocks while a channel is in use: {ring}"));
            }
        }
        Ok(self.come[unit] <= self.met && self.meeting.remove(&unit))
    }

    fn stuck(&self, inst: &Inst) -> String {
        let size = self.size();
        match inst.op {
            Op::Meet => format!("waits for ever: another role meets other blocks less often{size}"),
            Op::Acquire(_) => format!("waits for ever: no stage is given back{size}"),
            _ => format!("waits for ever: no stage is committed{size}"),
        }
    }

    /// For which sizes a problem shows.
    fn size(&self) -> &'static str {
        match self.trial.seed {
            0 => " (where sizes are 0)",
            1 => " (where sizes are 1)",
            _ => "",
        }
    }

    /// One unit until it ends, or until the instruction that has to wait. Errors name the instruction.
    fn turn(
        &mut self,
        unit: Unit,
        walker: &mut Walker<'a>,
        pending: Option<&'a Inst>,
        steps: &mut usize,
    ) -> Result<Option<&'a Inst>, (&'a Inst, String)> {
        self.unit = unit;
        let mut next = pending;
        while *steps <= MAX_STEPS {
            let inst = match next.take() {
                Some(inst) => inst,
                None => match walker.next(self) {
                    Ok(Some(inst)) => inst,
                    Ok(None) => return Ok(None),
                    Err(never) => match never {},
                },
            };
            if !self.step(inst).map_err(|message| (inst, message))? {
                return Ok(Some(inst));
            }
            *steps += 1;
        }
        Ok(None)
    }

    /// Whether the instruction could run.
    fn step(&mut self, inst: &'a Inst) -> Result<bool, String> {
        let unit = self.unit;
        for v in self.definitions.inputs(inst) {
            let Some(Place::Slot(c, _)) = self.definitions.place(v) else { continue };
            let held = self.taken.get(&v).is_some_and(|&stage| self.rings[c.0 as usize].holds(unit, stage));
            if !held {
                return Err(format!("reads %{} after its stage of {c} was released", v.0));
            }
        }
        if inst.op == Op::Meet {
            return self.meet();
        }
        let Some(ChannelId(c)) = channel_of(&inst.op) else { return Ok(true) };
        let ring = &mut self.rings[c as usize];
        match &inst.op {
            Op::Acquire(_) => {
                if self.in_common[c as usize].is_some() && self.allowed.take_if(|a| *a == c as usize).is_none() {
                    return Ok(false);
                }
                self.filled[c as usize].clear();
                return Ok(ring.acquire()?.is_some());
            }
            Op::Copy { slot, .. } | Op::Fill { slot, .. } => {
                ring.filling()?;
                if !self.filled[c as usize].insert(*slot) {
                    return Err(format!("fills slot {slot} of the stage twice"));
                }
            }
            Op::Commit(_) => {
                ring.commit()?;
                let slots = self.kernel.channels[c as usize].slots.len() as u32;
                if let Some(slot) = (0..slots).find(|s| !self.filled[c as usize].contains(s)) {
                    return Err(format!("commits a stage whose slot {slot} is not filled"));
                }
            }
            Op::Wait(_) => return Ok(ring.wait(unit)?.is_some()),
            Op::Take { .. } => {
                let stage = ring.taken(unit)?;
                if !ring.holds(unit, stage) {
                    return Err("takes from a stage after it was released".into());
                }
                self.taken.extend(inst.results.iter().map(|&v| (v, stage)));
            }
            Op::Release { lag, .. } => ring.release(unit, *lag)?,
            _ => {}
        }
        Ok(true)
    }

    fn scalar(&self, v: ValueId) -> Option<&TileType> {
        match self.kernel.types.get(v.0 as usize) {
            Some(Type::Tile(t)) if t.elements() == 1 => Some(t),
            _ => None,
        }
    }

    /// What is known of a value here; `memo` holds what this query has found out.
    fn value(&self, v: ValueId, memo: &mut HashMap<ValueId, Known>) -> Known {
        // Definitions come before uses, so in order of number nothing is met that is not known, but text may number them anyhow.
        let mut pending = vec![v];
        while let Some(&v) = pending.last() {
            if self.known.contains_key(&v) || memo.contains_key(&v) {
                pending.pop();
                continue;
            }
            let inputs: Vec<ValueId> = match self.definitions.inst(v).map(|i| &i.op) {
                Some(op @ (Op::Tile(_) | Op::Part { .. })) => operands(op),
                _ => Vec::new(),
            };
            let get = |v: &ValueId| self.known.get(v).or_else(|| memo.get(v)).copied();
            let missing: Vec<ValueId> = inputs.iter().filter(|v| get(v).is_none()).copied().collect();
            if missing.is_empty() {
                let inputs: Vec<Known> = inputs.iter().filter_map(get).collect();
                memo.insert(v, self.evaluate(v, &inputs));
                pending.pop();
            } else {
                pending.extend(missing);
            }
        }
        self.known.get(&v).or_else(|| memo.get(&v)).copied().unwrap_or(Known::Some(v.0.into()))
    }

    fn evaluate(&self, v: ValueId, inputs: &[Known]) -> Known {
        let (op, results) = match self.definitions.inst(v) {
            Some(Inst { op: Op::Tile(op), results, .. }) => (op, results),
            // A block may have all of a tile.
            Some(Inst { op: Op::Part { end, .. }, .. }) => return inputs[usize::from(*end)],
            // The same in all roles.
            Some(Inst { op: Op::Number, .. }) => {
                return Known::Int(self.trial.number(u64::MAX) % self.kernel.team.clamp(1, 64) as i32);
            }
            _ => return self.unknown(v, v.0.into()),
        };
        let mut hasher = DefaultHasher::new();
        let mut shape = op.clone();
        tile::verify::for_each_operand(&mut shape, &mut |v| *v = ValueId(0));
        (&shape, inputs, results.iter().position(|r| *r == v)).hash(&mut hasher);
        // Views differ although what is known of them does not.
        if let tile::Op::Load { view, .. } | tile::Op::Gather { view, .. } = op {
            view.hash(&mut hasher);
        }
        let hash = hasher.finish();
        match op {
            tile::Op::Sym(_) => Known::Int(self.trial.symbol(hash)),
            tile::Op::Full { value: tile::Scalar::I32(x), .. } if self.scalar(v).is_some() => Known::Int(*x),
            tile::Op::Full { value: tile::Scalar::Bool(x), .. } if self.scalar(v).is_some() => Known::Bool(*x),
            tile::Op::Reshape { .. } if self.scalar(v).is_some() => inputs[0],
            tile::Op::Map { body, .. } if self.scalar(v).is_some() => {
                self.map(body, inputs).unwrap_or_else(|| self.unknown(v, hash))
            }
            _ => self.unknown(v, hash),
        }
    }

    /// Arithmetic on integers and truth values; none if there is anything else.
    fn map(&self, body: &tile::MapFn, inputs: &[Known]) -> Option<Known> {
        let data = |k: &Known| match k {
            Known::Int(x) => Some(Rc::new(Data::I32(vec![*x]))),
            Known::Bool(x) => Some(Rc::new(Data::Bool(vec![*x]))),
            Known::Some(_) => None,
        };
        let inputs = inputs.iter().map(data).collect::<Option<Vec<_>>>()?;
        match &*eval_map(body, &inputs)? {
            Data::I32(x) => x.first().map(|&x| Known::Int(x)),
            Data::Bool(x) => x.first().map(|&x| Known::Bool(x)),
            _ => None,
        }
    }

    fn unknown(&self, v: ValueId, hash: u64) -> Known {
        match self.scalar(v).map(|t| t.dtype) {
            Some(DType::I32) => Known::Int(self.trial.number(hash)),
            Some(DType::Bool) => Known::Bool(self.trial.number(hash) % 2 == 1),
            _ => Known::Some(hash),
        }
    }
}

/// Nothing here fails.
enum Never {}

impl Host for Run<'_> {
    type Error = Never;

    fn integer(&mut self, i: &Index) -> Result<i64, Never> {
        Ok(match i {
            Index::Const(c) => *c,
            Index::Value(v) => match self.value(*v, &mut HashMap::new()) {
                Known::Int(x) => x.into(),
                _ => 0,
            },
        })
    }

    fn truth(&mut self, v: ValueId) -> Result<bool, Never> {
        Ok(self.value(v, &mut HashMap::new()) == Known::Bool(true))
    }

    fn count(&mut self, counter: ValueId, i: i64) -> Result<(), Never> {
        self.known.insert(counter, Known::Int(i as i32));
        Ok(())
    }

    fn hand(&mut self, from: &[ValueId], to: &[ValueId]) -> Result<(), Never> {
        let mut memo = HashMap::new();
        let values: Vec<Known> = from.iter().map(|&v| self.handed(v, &mut memo)).collect();
        self.known.extend(to.iter().copied().zip(values));
        Ok(())
    }

    fn enters(&self, loop_inst: &Inst) -> bool {
        let Op::For { body, .. } = &loop_inst.op else { return true };
        body.args.first().is_some_and(|v| self.needed[self.unit].loops.contains(v))
    }
}

impl Run<'_> {
    /// Tiles that are carried are not followed: their hash would be of all that was computed.
    fn handed(&self, v: ValueId, memo: &mut HashMap<ValueId, Known>) -> Known {
        if self.scalar(v).is_some() { self.value(v, memo) } else { Known::Some(v.0.into()) }
    }
}
