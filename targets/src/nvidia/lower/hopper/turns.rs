//! Rounds of a loop that parts of a role take in turns ([`Channel::turns`](dsc_ir::sched::Channel::turns)).
//!
//! Rounds of a block's range are numbered through all its tiles, as the producer fills stages; of `n` parts, part `i` takes those with `i` modulo `n`, and the
//! same of the stages. So a part has a ring of its own within the ring, and whose turn is next in a tile follows from the range.

use super::emit::Emit;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{Block, Op, Role};

impl Emit<'_> {
    /// Makes threads and warps of a role those of its part, if it has parts, and rings those of the part.
    pub fn take_turns(&mut self, role: &Role) {
        let turns = self.s.turns(role);
        if turns == 1 {
            return;
        }
        let warps = (role.warps[1] - role.warps[0]) / turns;
        let f = &mut self.t.f;
        self.part = f.div(self.role_warp, warps);
        let before = f.mul(self.part, i32(warps.into()));
        self.role_warp = f.sub(self.role_warp, before);
        let before = f.mul(self.part, i32((warps * Arch::WARP).into()));
        self.role_tid = f.sub(self.role_tid, before);
        let part = self.part;
        self.rings.iter_mut().for_each(|r| r.restart(Some(part)));
    }

    /// How many parts take the rounds of a loop in turns.
    pub fn turns_in(&self, rounds: &Block) -> u32 {
        let of = |op: &Op| if let Op::Wait(c) = op { self.rings[c.0 as usize].by } else { 1 };
        rounds.insts.iter().map(|i| of(&i.op)).max().unwrap_or(1)
    }

    /// The first round of this part, of those of the tile from `lo` on, the block's first.
    pub fn own_round(&mut self, lo: Val, turns: u32) -> Result<Val, String> {
        let done = self.rounds_done().ok_or("rounds in turns of a block without a range")?;
        let f = &mut self.t.f;
        let next = f.rem(done, turns);
        let behind = f.sub(self.part, next);
        let again = f.add(behind, i32(turns.into()));
        let before = f.cmp("slt", behind, i32(0));
        let behind = f.select(before, again, behind);
        Ok(f.add(lo, behind))
    }
}
