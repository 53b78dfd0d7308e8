//! Barriers: what other threads of the unit wrote since the last barrier is not read, what they may still read is not overwritten.
//!
//! Forward through the code with two sets of buffers, written and read since the last barrier on some path: after a branch those of either
//! arm, before a loop those of the code before and of its own end. Any instruction may be spread over the threads in its own way, so a write
//! and a read conflict whichever elements they are of. Lazy values are read where they are used.
//!
//! A channel keeps what is read of a stage and what is filled later apart, by all that release it. Where two channels have a buffer in common, who
//! empties one fills the other: its threads then need a barrier between, unless each warp fills the rows that it alone has read, as the left operand
//! of products by warpgroup instructions.
//!
//! An instruction may read and write one buffer if each thread overwrites only what it alone reads: elementwise, on tiles of one shape.
//! What a store takes for scratch is its own affair.
//!
//! Behind `common` a role meets what all threads did, which only a barrier at the end of `common` settles.

use super::lifetimes::overlap;
use super::{Report, location};
use crate::sched::ring::{Unit, units};
use crate::sched::visit::Definitions;
use crate::sched::{Atom, Block, BufferId, Inst, Op, Place, Scheduled};
use crate::tile::{self, ValueId};
use std::collections::{BTreeSet, HashMap};

pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    let mut walk = Hazards {
        kernel,
        definitions: Definitions::new(kernel),
        report,
        unit: 0,
        before: Since::default(),
        heads: HashMap::new(),
    };
    let mut common = Since::default();
    for (unit, block) in units(kernel).into_iter().enumerate() {
        walk.unit = unit;
        let mut since = Since::default();
        walk.block(block, &mut since);
        if unit > 0 && kernel.persistent.is_some() {
            // The next tile meets what this one left.
            walk.block(block, &mut since);
        }
        if unit == 0 {
            common = since;
        }
        walk.before = common.clone();
    }
}

/// Buffers touched since the last barrier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Since {
    written: BTreeSet<BufferId>,
    read: BTreeSet<BufferId>,
    /// Buffers of two channels that a warp has read more of than its own rows.
    crossed: BTreeSet<BufferId>,
}

impl Since {
    fn join(&mut self, other: &Since) {
        self.written.extend(&other.written);
        self.read.extend(&other.read);
        self.crossed.extend(&other.crossed);
    }

    fn is_within(&self, other: &Since) -> bool {
        self.written.is_subset(&other.written)
            && self.read.is_subset(&other.read)
            && self.crossed.is_subset(&other.crossed)
    }
}

struct Hazards<'a, 'r, 'k> {
    kernel: &'a Scheduled,
    definitions: Definitions<'a>,
    report: &'r mut Report<'k>,
    unit: Unit,
    /// What `common` left; empty there.
    before: Since,
    /// By the counter of each loop, what was met at its head: it only grows, so that loops in loops are not gone through anew.
    heads: HashMap<ValueId, Since>,
}

impl<'a> Hazards<'a, '_, '_> {
    fn block(&mut self, block: &'a Block, since: &mut Since) {
        for inst in &block.insts {
            self.inst(inst, since);
        }
    }

    fn inst(&mut self, inst: &'a Inst, since: &mut Since) {
        match &inst.op {
            Op::Barrier | Op::Meet => *since = Since::default(),
            Op::For { init, body, .. } => {
                self.access(inst, self.bounds(inst), BTreeSet::new(), since);
                let args = body.args.get(1..).unwrap_or_default();
                self.hand(inst, init, args, since);
                let results = since.clone();
                let counter = body.args.first().copied().unwrap_or(ValueId(u32::MAX));
                loop {
                    let head = self.heads.entry(counter).or_default();
                    head.join(since);
                    let head = head.clone();
                    since.clone_from(&head);
                    self.block(body, since);
                    self.hand(inst, &body.yields, args, since);
                    if since.is_within(&head) {
                        break;
                    }
                }
                since.join(&results);
            }
            Op::If { then, otherwise, .. } => {
                self.access(inst, self.bounds(inst), BTreeSet::new(), since);
                let mut other = since.clone();
                self.block(then, since);
                self.hand(inst, &then.yields, &inst.results, since);
                self.block(otherwise, &mut other);
                self.hand(inst, &otherwise.yields, &inst.results, &mut other);
                since.join(&other);
            }
            _ => {
                let inputs = self.definitions.inputs(inst);
                let mut writes: BTreeSet<BufferId> = self.buffers(&inst.results);
                let mut reads = self.buffers(&inputs);
                if let Some(&b) = reads.intersection(&writes).find(|&&b| !self.in_place(inst, b)) {
                    self.say(inst, format!("reads and overwrites {b} at once, and not element by element"));
                }
                if !matches!(inst.op, Op::Tile(tile::Op::Store { .. } | tile::Op::Scatter { .. })) {
                    writes.extend(inst.scratch);
                }
                writes.extend(if let Op::Put { buffer, .. } = inst.op { Some(buffer) } else { None });
                reads.extend(if let Op::Get { buffer, .. } = inst.op { Some(buffer) } else { None });
                if let Op::Copy { channel, slot, .. } | Op::Fill { channel, slot, .. } = &inst.op {
                    writes.insert(self.kernel.channels[channel.0 as usize].slots[*slot as usize]);
                }
                self.both_ways(inst, &reads, since);
                self.access(inst, reads, writes, since);
            }
        }
    }

    /// Buffers that two channels have in common, read and filled by the same unit.
    fn both_ways(&mut self, inst: &Inst, reads: &BTreeSet<BufferId>, since: &mut Since) {
        let in_common = |b: BufferId| self.kernel.channels_of(b).count() > 1;
        let common: BTreeSet<BufferId> = reads.iter().copied().filter(|&b| in_common(b)).collect();
        let by_rows =
            |v: ValueId| matches!(self.definitions.place(v), Some(Place::Fragment(f)) if f.atom == Atom::Wgmma);
        match &inst.op {
            Op::Take { .. } => {}
            Op::Tile(tile::Op::Dot { a, b, .. }) if inst.results.iter().all(|&v| by_rows(v)) => {
                let (left, right) = (self.buffers(&[*a]), self.buffers(&self.definitions.sources(&[*b])));
                since.crossed.extend(common.iter().filter(|b| !left.contains(b) || right.contains(b)));
            }
            _ => since.crossed.extend(common),
        }
        let Op::Fill { channel, slot, value, .. } = &inst.op else { return };
        let into = self.kernel.channels[channel.0 as usize].slots[*slot as usize];
        if in_common(into) && (since.crossed.contains(&into) || since.read.contains(&into) && !by_rows(*value)) {
            self.say(
                inst,
                format!(
                    "fills {into}, which other threads may still read by another channel, without a barrier between"
                ),
            );
        }
    }

    /// What bounds and conditions read.
    fn bounds(&self, inst: &Inst) -> BTreeSet<BufferId> {
        let values: Vec<ValueId> = match &inst.op {
            Op::For { lo, hi, .. } => [lo, hi]
                .into_iter()
                .filter_map(|i| if let tile::Index::Value(v) = i { Some(*v) } else { None })
                .collect(),
            Op::If { cond, .. } => vec![*cond],
            _ => Vec::new(),
        };
        self.buffers(&self.definitions.sources(&values))
    }

    /// Values that move to where other values lie.
    fn hand(&mut self, inst: &Inst, from: &[ValueId], to: &[ValueId], since: &mut Since) {
        let places = |v: &ValueId| self.definitions.place(*v).unwrap_or(&Place::Lazy);
        let moved: Vec<(ValueId, ValueId)> =
            from.iter().zip(to).filter(|(f, t)| !places(f).stays(places(t))).map(|(f, t)| (*f, *t)).collect();
        let (from, to): (Vec<ValueId>, Vec<ValueId>) = moved.into_iter().unzip();
        let (reads, writes) = (self.buffers(&self.definitions.sources(&from)), self.buffers(&to));
        if let Some(b) = reads.intersection(&writes).next() {
            self.say(inst, format!("hands on a value from {b} and another to it"));
        }
        self.access(inst, reads, writes, since);
    }

    /// The buffers that values lie in, slots of channels among them.
    fn buffers(&self, vs: &[ValueId]) -> BTreeSet<BufferId> {
        let of = |v: &ValueId| match self.definitions.place(*v)? {
            Place::Shared(b) => Some(*b),
            Place::Slot(c, slot) => self.kernel.channels.get(c.0 as usize)?.slots.get(*slot as usize).copied(),
            _ => None,
        };
        vs.iter().filter_map(of).filter(|b| (b.0 as usize) < self.kernel.buffers.len()).collect()
    }

    fn access(&mut self, inst: &Inst, reads: BTreeSet<BufferId>, writes: BTreeSet<BufferId>, since: &mut Since) {
        let mut writes = writes;
        if let Op::Take { .. } = inst.op {
            // Copies wrote the slot; the take only names it.
            writes.clear();
        }
        let elected = self.unit > 0 && self.kernel.roles[self.unit - 1].elected;
        let own = if elected { Since::default() } else { since.clone() };
        for (sets, whose) in [(own, ""), (self.before.clone(), " in common")] {
            for (mine, theirs, what) in [
                (&reads, &sets.written, "reads {}, written by other threads{}"),
                (&writes, &sets.written, "writes {}, written by other threads{}"),
                (&writes, &sets.read, "writes {}, read by other threads{}"),
            ] {
                if let Some(message) = self.clash(mine, theirs, what, whose) {
                    self.say(inst, message);
                }
            }
        }
        since.read.extend(reads);
        since.written.extend(writes);
    }

    /// The first pair of buffers that share memory, unless a channel keeps them apart.
    fn clash(&self, mine: &BTreeSet<BufferId>, theirs: &BTreeSet<BufferId>, what: &str, whose: &str) -> Option<String> {
        let slot = |b: &BufferId| self.kernel.channels_of(*b).next().is_some();
        let meets = |a: &BufferId, b: &BufferId| {
            let [x, y] = [a, b].map(|b| &self.kernel.buffers[b.0 as usize]);
            !(a == b && slot(a)) && overlap(x, y)
        };
        let (a, b) = mine.iter().find_map(|a| theirs.iter().find(|b| meets(a, b)).map(|b| (a, b)))?;
        let alias = if a == b { String::new() } else { format!(" as {b}") };
        let message = what.replacen("{}", &a.to_string(), 1).replacen("{}", &format!("{alias}{whose}"), 1);
        Some(format!("{message}, without a barrier between"))
    }

    fn say(&mut self, inst: &Inst, message: String) {
        self.report.add(&location(self.kernel, self.unit, inst), message);
    }

    /// Whether each element of `b` is read only to compute what overwrites it.
    fn in_place(&self, inst: &Inst, b: BufferId) -> bool {
        match &inst.op {
            Op::Tile(tile::Op::Map { inputs, .. }) => inputs.iter().all(|&v| self.aligned(v, inst.results[0], b)),
            // The state stays where it is; its buffer is the operation's to order.
            Op::Tile(tile::Op::TopkPush { values, .. }) => {
                !self.buffers(&self.definitions.sources(&[*values])).contains(&b)
            }
            Op::Tile(tile::Op::Reshape { x, .. }) => self.definitions.place(*x).and_then(Place::buffer) == Some(b),
            _ => false,
        }
    }

    /// Whether evaluating an element of `v` reads from `b` at most the same element.
    fn aligned(&self, v: ValueId, like: ValueId, b: BufferId) -> bool {
        let same = self.kernel.types[v.0 as usize] == self.kernel.types[like.0 as usize] || {
            let shape = |v: ValueId| match &self.kernel.types[v.0 as usize] {
                tile::Type::Tile(t) => t.shape.clone(),
                _ => Vec::new(),
            };
            shape(v) == shape(like)
        };
        match (self.definitions.place(v), self.definitions.inst(v).map(|i| &i.op)) {
            (Some(Place::Shared(own)), _) => *own != b || same,
            (Some(Place::Lazy), Some(Op::Tile(tile::Op::Map { inputs, .. }))) if same => {
                inputs.iter().all(|&i| self.aligned(i, like, b))
            }
            (Some(Place::Lazy), _) => !self.buffers(&self.definitions.sources(&[v])).contains(&b),
            _ => true,
        }
    }
}
