//! Shared memory that is needed at once does not overlap.
//!
//! A value in a buffer lives from its definition to its last use, to the end of a loop in which it is used and not defined, and, if roles use a
//! value of `common`, to the end of `common` and from the start of the role. A channel's slots live around all loops that work on it, in every
//! unit that does; a channel of `common` only around those whose rounds meet stages of others, or leave some. Roles run at once, so that what two of them use never overlaps.
//!
//! What blocks of a team put into buffers for one another lives from its phase to that of its last reader ([`super::team`]).
//!
//! Two values of one buffer may follow each other within an instruction that reads the first and defines the second; [`super::hazards`] says
//! when that is sound.

use super::Report;
use super::team::Phases;
use crate::sched::ring::{Unit, channel_of, unit_name, units};
use crate::sched::visit::Definitions;
use crate::sched::{Block, Buffer, BufferId, ChannelId, Inst, Op, Place, Scheduled};
use crate::tile::{self, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Who needs a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Value(ValueId),
    /// The instruction at that time.
    Scratch(u32),
    Channel,
    /// What blocks of a team exchange.
    Put,
}

/// First and last time, in half instructions: `2 n` is where instruction `n` reads, `2 n + 1` where it writes.
type Life = [u32; 2];

pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    let definitions = Definitions::new(kernel);
    let mut timeline = Timeline {
        kernel,
        definitions,
        unit: 0,
        now: 0,
        end: Vec::new(),
        loops: Vec::new(),
        made: vec![None; kernel.types.len()],
        lives: BTreeMap::new(),
    };
    for (unit, block) in units(kernel).into_iter().enumerate() {
        (timeline.unit, timeline.now) = (unit, 1);
        timeline.block(block);
        timeline.finish();
    }
    let mut needs: Vec<(Unit, Life, BufferId, Need)> =
        timeline.lives.into_iter().map(|((unit, buffer, need), life)| (unit, life, buffer, need)).collect();
    needs.sort_unstable();
    let what = |need: Need| match need {
        Need::Value(v) => format!("%{}", v.0),
        Need::Scratch(_) => "scratch memory".into(),
        Need::Channel => "a channel".into(),
        Need::Put => "what a block has put there".into(),
    };
    let bytes = |b: BufferId| &kernel.buffers[b.0 as usize];
    let phases = Phases::of(kernel);
    for (i, &(unit, life, buffer, need)) in needs.iter().enumerate() {
        for &(_, other_life, other, other_need) in
            needs[i + 1..].iter().take_while(|n| n.0 == unit && n.1[0] / 2 <= life[1] / 2)
        {
            let at_once = match buffer == other {
                true => other_life[0] <= life[1] && need != other_need,
                false => overlap(bytes(buffer), bytes(other)) && !phases.apart(buffer, other),
            };
            if at_once {
                let (need, other_need) = (what(need), what(other_need));
                let place = format!(", {}", unit_name(kernel, unit));
                report.add(
                    &place,
                    format!("{buffer} for {need} and {other} for {other_need} are needed at once and overlap"),
                );
            }
        }
    }
    between_roles(kernel, &needs, &phases, report);
}

fn between_roles(kernel: &Scheduled, needs: &[(Unit, Life, BufferId, Need)], phases: &Phases, report: &mut Report) {
    let used: BTreeSet<(Unit, BufferId, Option<Need>)> = needs
        .iter()
        .filter(|n| n.0 > 0)
        .map(|&(unit, _, buffer, need)| (unit, buffer, Some(need).filter(|n| !matches!(n, Need::Scratch(_)))))
        .collect();
    let used: Vec<_> = used.into_iter().collect();
    for (i, &(unit, buffer, need)) in used.iter().enumerate() {
        for &(other_unit, other, other_need) in &used[i + 1..] {
            // A value of `common` that both read, or their channel.
            let shared = buffer == other && need == other_need && need.is_some();
            let [a, b] = [buffer, other].map(|b| &kernel.buffers[b.0 as usize]);
            if unit != other_unit && !shared && overlap(a, b) && !phases.apart(buffer, other) {
                let (name, other_name) = (unit_name(kernel, unit), unit_name(kernel, other_unit));
                report.add(
                    "",
                    format!("{buffer} of role {name} and {other} of role {other_name} overlap, and roles run at once"),
                );
            }
        }
    }
}

/// Whether two buffers share a byte.
pub(super) fn overlap(a: &Buffer, b: &Buffer) -> bool {
    a.outside == b.outside && a.offset < b.offset + b.bytes() && b.offset < a.offset + a.bytes()
}

/// A loop: its start, what is used in it that was made before, and its body.
type Around<'a> = (u32, BTreeSet<(BufferId, Need)>, &'a Block);

struct Timeline<'a> {
    kernel: &'a Scheduled,
    definitions: Definitions<'a>,
    unit: Unit,
    /// Number of the instruction.
    now: u32,
    /// By unit, its last time.
    end: Vec<u32>,
    /// The loops around.
    loops: Vec<Around<'a>>,
    made: Vec<Option<(Unit, u32)>>,
    lives: BTreeMap<(Unit, BufferId, Need), Life>,
}

impl<'a> Timeline<'a> {
    /// At the end of a unit.
    fn finish(&mut self) {
        let end = 2 * self.now;
        self.end.resize(self.unit + 1, end);
        if self.kernel.persistent.is_some() {
            let channels =
                self.lives.iter_mut().filter(|((unit, _, need), _)| *unit == self.unit && *need == Need::Channel);
            channels.for_each(|(_, life)| life[1] = end);
        }
    }

    fn block(&mut self, block: &'a Block) {
        block.args.iter().for_each(|&v| self.define(v));
        for inst in &block.insts {
            self.now += 1;
            self.inst(inst);
        }
        self.now += 1;
        self.use_all(self.definitions.sources(&block.yields));
    }

    fn inst(&mut self, inst: &'a Inst) {
        self.use_all(self.definitions.inputs(inst));
        if let Some(b) = inst.scratch {
            let here = self.now;
            self.lives.insert((self.unit, b, Need::Scratch(here)), [2 * here, 2 * here + 1]);
        }
        if let Some(channel) = channel_of(&inst.op) {
            // Of `common` the outermost loop that does not find the channel empty, and leave it so.
            let around = self.loops.iter().position(|(.., body)| self.unit > 0 || !starts_anew(body, channel));
            for &slot in &self.kernel.channels[channel.0 as usize].slots {
                let from = match self.kernel.persistent {
                    // From tile to tile.
                    Some(_) => 0,
                    None => around.map_or(2 * self.now, |l| self.loops[l].0),
                };
                self.extend(slot, Need::Channel, from);
                if let Some((_, used, _)) = around.and_then(|l| self.loops.get_mut(l)) {
                    used.insert((slot, Need::Channel));
                }
            }
        }
        if let Op::Put { buffer, .. } | Op::Get { buffer, .. } = inst.op {
            self.extend(buffer, Need::Put, 2 * self.now);
        }
        match &inst.op {
            Op::For { body, .. } => {
                self.loops.push((2 * self.now + 1, BTreeSet::new(), body));
                self.block(body);
                let used = self.loops.pop().map(|l| l.1).unwrap_or_default();
                used.into_iter().for_each(|(b, need)| self.extend(b, need, u32::MAX));
            }
            op => op.blocks().into_iter().for_each(|b| self.block(b)),
        }
        inst.results.iter().for_each(|&v| self.define(v));
    }

    /// A value's buffer, and the value that was put there: a reshape in place makes no new one.
    fn stored(&self, mut v: ValueId) -> Option<(BufferId, ValueId)> {
        let place = self.definitions.place(v)?;
        let buffer = place.buffer()?;
        while let Some(Op::Tile(tile::Op::Reshape { x, .. })) = self.definitions.inst(v).map(|i| &i.op)
            && self.definitions.place(*x) == Some(place)
        {
            v = *x;
        }
        Some((buffer, v))
    }

    fn define(&mut self, v: ValueId) {
        let here = 2 * self.now + 1;
        self.made[v.0 as usize] = Some((self.unit, here));
        match self.stored(v) {
            Some((b, stored)) if stored == v => {
                self.lives.insert((self.unit, b, Need::Value(v)), [here, here]);
            }
            _ => {}
        }
    }

    fn use_all(&mut self, vs: Vec<ValueId>) {
        for v in vs {
            let (Some((b, v)), Some((unit, made))) = (self.stored(v), self.made[v.0 as usize]) else { continue };
            let (here, need) = (2 * self.now, Need::Value(v));
            if unit != self.unit {
                // Made in `common`, which has ended.
                let end = self.end[unit];
                self.lives.entry((unit, b, need)).and_modify(|life| life[1] = end);
                self.extend(b, need, 0);
            }
            self.extend(b, need, here);
            for (start, used, _) in &mut self.loops {
                if unit != self.unit || made < *start {
                    used.insert((b, need));
                }
            }
        }
    }

    /// Makes a life in this unit hold from `from` at the latest to now at the earliest.
    fn extend(&mut self, b: BufferId, need: Need, from: u32) {
        let here = 2 * self.now;
        let life = self.lives.entry((self.unit, b, need)).or_insert([from.min(here), here]);
        *life = [life[0].min(from), life[1].max(here)];
    }
}

/// Whether a round finds no stage of a channel and leaves none, whatever there was before.
fn starts_anew(body: &Block, channel: ChannelId) -> bool {
    stages(body, channel).is_some_and(|(left, fewest)| left == 0 && fewest >= 0)
}

/// How many more stages a block commits than it waits for, and how many fewer it waited for at some time; none if that depends on more.
fn stages(block: &Block, channel: ChannelId) -> Option<(i64, i64)> {
    let (mut now, mut fewest) = (0, 0);
    for inst in &block.insts {
        let (change, low) = match &inst.op {
            Op::Commit(c) if *c == channel => (1, 0),
            Op::Wait(c) if *c == channel => (-1, -1),
            Op::For { body, .. } => stages(body, channel).filter(|(left, _)| *left == 0)?,
            Op::If { then, otherwise, .. } => {
                let (a, b) = (stages(then, channel)?, stages(otherwise, channel)?);
                if a.0 != b.0 {
                    return None;
                }
                (a.0, a.1.min(b.1))
            }
            _ => (0, 0),
        };
        fewest = fewest.min(now + low);
        now += change;
    }
    Some((now, fewest))
}

impl Place {
    /// Whether two values with these places share memory without being copied.
    pub(crate) fn stays(&self, to: &Place) -> bool {
        self == to && matches!(self, Place::Shared(_))
    }
}
