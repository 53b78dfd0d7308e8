//! Blocks that run one tile together ([`Scheduled::team`]): that all their roles meet as often and in step, and what they exchange.
//!
//! The places where they meet cut a tile into phases, the same in every role. A buffer that is used in some phases does not meet one that
//! is used in others; as the last instruction is such a place, the next tile's first phase comes behind this one's last.

use super::{Report, location, matrix};
use crate::sched::ring::{channel_of, units};
use crate::sched::visit::Definitions;
use crate::sched::{Block, BufferId, MOST_APART, MOST_IN_CLUSTER, Op, Place, Scheduled};
use crate::tile::Type;
use std::collections::{BTreeMap, BTreeSet};

/// In which phases of a tile each buffer is used; none where blocks do not meet.
pub(super) struct Phases(BTreeMap<BufferId, BTreeSet<u32>>);

impl Phases {
    pub(super) fn of(kernel: &Scheduled) -> Phases {
        let mut phases = Phases(BTreeMap::new());
        if kernel.roles.iter().all(|r| meets(&r.body) == 0) {
            return phases;
        }
        let definitions = Definitions::new(kernel);
        for role in &kernel.roles {
            let mut phase = 0;
            for inst in &role.body.insts {
                phase += u32::from(inst.op == Op::Meet);
                let mut pending = vec![inst];
                while let Some(inst) = pending.pop() {
                    let blocks = inst.op.blocks();
                    pending.extend(blocks.iter().flat_map(|b| &b.insts));
                    let mut values = definitions.inputs(inst);
                    values.extend(&inst.results);
                    values.extend(
                        blocks.iter().flat_map(|b| definitions.sources(&b.yields).into_iter().chain(b.args.clone())),
                    );
                    let mut used: Vec<BufferId> =
                        values.iter().filter_map(|&v| buffer_of(kernel, definitions.place(v)?)).collect();
                    used.extend(inst.scratch);
                    if let Op::Put { buffer, .. } | Op::Get { buffer, .. } = inst.op {
                        used.push(buffer);
                    }
                    if let Some(channel) = channel_of(&inst.op).and_then(|c| kernel.channels.get(c.0 as usize)) {
                        used.extend(&channel.slots);
                    }
                    for b in used {
                        phases.0.entry(b).or_default().insert(phase);
                    }
                }
            }
        }
        phases
    }

    /// Whether two buffers are used in different phases.
    pub(super) fn apart(&self, a: BufferId, b: BufferId) -> bool {
        match (self.0.get(&a), self.0.get(&b)) {
            (Some(a), Some(b)) => a.is_disjoint(b),
            _ => false,
        }
    }
}

fn buffer_of(kernel: &Scheduled, place: &Place) -> Option<BufferId> {
    match place {
        Place::Shared(b) => Some(*b),
        Place::Slot(c, slot) => kernel.channels.get(c.0 as usize)?.slots.get(*slot as usize).copied(),
        _ => None,
    }
}

fn meets(block: &Block) -> usize {
    block.insts.iter().filter(|i| i.op == Op::Meet).count()
}

pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    let together = kernel.team > 1 && !kernel.roles.is_empty();
    let most = kernel.roles.iter().map(|r| meets(&r.body)).max().unwrap_or(0);
    let mut exchanges = false;
    for (unit, block) in units(kernel).into_iter().enumerate() {
        let mut pending = vec![(block, unit > 0)];
        while let Some((block, outermost)) = pending.pop() {
            for inst in &block.insts {
                pending.extend(inst.op.blocks().into_iter().map(|b| (b, false)));
                let of_team = matches!(inst.op, Op::Number | Op::Meet | Op::Put { .. } | Op::Get { .. });
                exchanges |= of_team;
                let problem = match &inst.op {
                    _ if of_team && !together => "a block without others that run its roles meets none",
                    Op::Meet if !outermost => "blocks meet in the body of a role, not in loops and branches",
                    Op::Get { after, .. } if *after >= kernel.team => "a team has no such block",
                    Op::Put { buffer, value } if !holds(kernel, *buffer, &kernel.types[value.0 as usize], false) => {
                        "what is put is as large as its buffer"
                    }
                    Op::Get { buffer, own, .. } => match inst.results.as_slice() {
                        [v] if holds(kernel, *buffer, &kernel.types[v.0 as usize], *own) => continue,
                        _ => "what is got is what was put, or a piece of it",
                    },
                    _ => continue,
                };
                report.add(&location(kernel, unit, inst), problem);
            }
        }
    }
    if !exchanges {
        return;
    }
    let most_blocks = if kernel.apart() { MOST_APART } else { MOST_IN_CLUSTER };
    if kernel.team > most_blocks {
        report.add("", format!("a team of {}, but at most {most_blocks} blocks run together", kernel.team));
    }
    exchanged(kernel, report);
    for role in &kernel.roles {
        let last = role.body.insts.last().is_some_and(|i| i.op == Op::Meet);
        if !last || role.elected || meets(&role.body) != most {
            report.add(
                &format!(", role {}", role.name),
                "all roles meet the team's other blocks equally often, by all threads, and last of all",
            );
        }
    }
}

/// What is exchanged lies where the others find it, and is got behind a meeting that whoever puts it comes to first.
fn exchanged(kernel: &Scheduled, report: &mut Report) {
    let (apart, mut put, mut got) = (kernel.apart(), BTreeMap::new(), BTreeMap::new());
    for role in &kernel.roles {
        let mut phase = 0u32;
        for inst in &role.body.insts {
            phase += u32::from(inst.op == Op::Meet);
            let mut pending = vec![inst];
            while let Some(inst) = pending.pop() {
                pending.extend(inst.op.blocks().into_iter().flat_map(|b| &b.insts));
                match inst.op {
                    Op::Put { buffer, .. } => {
                        let last = put.entry(buffer).or_insert(phase);
                        *last = phase.max(*last);
                    }
                    Op::Get { buffer, .. } => {
                        let first = got.entry(buffer).or_insert(phase);
                        *first = phase.min(*first);
                    }
                    _ => {}
                }
            }
        }
    }
    for (buffer, last) in put {
        if kernel.buffers.get(buffer.0 as usize).is_some_and(|b| b.outside != apart) {
            report.add("", format!("{buffer} is in a block's shared memory, others outside: blocks meet in one way"));
        }
        if got.get(&buffer).is_some_and(|&first: &u32| first <= last) {
            report.add("", format!("{buffer} is got in the phase in which it is put: no meeting is between"));
        }
    }
}

/// Whether a tile is of a buffer's type and shape, or a piece of it.
fn holds(kernel: &Scheduled, buffer: BufferId, ty: &Type, piece: bool) -> bool {
    let (Some(buffer), Type::Tile(t)) = (kernel.buffers.get(buffer.0 as usize), ty) else { return false };
    let fits = |(whole, own): (&u32, u64)| match piece {
        true => own > 0 && u64::from(*whole).is_multiple_of(own),
        false => u64::from(*whole) == own,
    };
    t.dtype == buffer.dtype && buffer.shape.iter().zip(matrix(ty)).all(fits)
}
