//! Parts of a role's warps that take stages in turns ([`Channel::turns`](crate::sched::Channel::turns)).

use super::Report;
use crate::sched::{Block, ChannelId, Inst, Op, Role, Scheduled};
use crate::tile::{Index, ValueId};

/// Parts are equal; each takes whole rounds of its block's part of a tile, and does by itself whatever it does.
pub(super) fn check(kernel: &Scheduled, report: &mut Report) {
    if kernel.channels.iter().any(|c| c.turns > 1) && !kernel.parts() {
        report.add("", "stages are taken in turns where blocks divide the rounds of tiles");
    }
    for role in kernel.roles.iter().filter(|r| kernel.turns(r) > 1) {
        Turns { kernel, role, taken: Vec::new() }.check(report);
    }
}

struct Turns<'a> {
    kernel: &'a Scheduled,
    role: &'a Role,
    /// Channels whose stages are taken in turns so far.
    taken: Vec<ChannelId>,
}

impl Turns<'_> {
    fn check(&mut self, report: &mut Report) {
        let (turns, [first, end]) = (self.kernel.turns(self.role), self.role.warps);
        if self.role.elected || !(end - first).is_multiple_of(turns) {
            report.add(&self.place(), format!("warps {first}..{end} are no {turns} parts that take turns"));
        }
        self.block(&self.role.body, false, report);
        if self.taken.iter().any(|c| self.kernel.channels[c.0 as usize].turns != turns) {
            report.add(&self.place(), format!("takes stages of some channels in {turns} turns, of others in fewer"));
        }
    }

    fn place(&self) -> String {
        format!(", role {}", self.role.name)
    }

    /// `rounds`: the block is the body of the loop over the rounds of a tile's part.
    fn block(&mut self, block: &Block, rounds: bool, report: &mut Report) {
        for inst in &block.insts {
            if inst.scratch.is_some() || matches!(inst.op, Op::Barrier | Op::Acquire(_) | Op::Commit(_)) {
                report.add(&self.place(), "parts that take turns meet no barrier, fill no stage and have no scratch");
            }
            if let Op::Wait(c) = inst.op
                && self.kernel.channels.get(c.0 as usize).is_some_and(|c| c.turns > 1)
            {
                if !rounds || self.taken.contains(&c) {
                    report.add(
                        &self.place(),
                        format!("waits in turns for {c} otherwise than once in each round of its part"),
                    );
                }
                self.taken.push(c);
            }
            let rounds = self.is_of_rounds(inst);
            inst.op.blocks().into_iter().for_each(|b| self.block(b, rounds, report));
        }
    }

    /// Whether it is a loop over the rounds of a tile's part, one by one, none of which needs the one before.
    fn is_of_rounds(&self, inst: &Inst) -> bool {
        let Op::For { lo: Index::Value(lo), hi: Index::Value(hi), step: 1, init, .. } = &inst.op else { return false };
        init.is_empty() && self.is_end(*lo, false) && self.is_end(*hi, true)
    }

    /// Whether that value is the begin or the end of the part.
    fn is_end(&self, v: ValueId, of: bool) -> bool {
        let gives = |i: &Inst| matches!(i.op, Op::Part { end, .. } if end == of) && i.results.contains(&v);
        self.role.body.insts.iter().any(gives)
    }
}
