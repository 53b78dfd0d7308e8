//! Loads of the next tile before this tile's results are stored.
//!
//! What sums of a tile's first rounds are scaled by is wanted at once, and memory takes a thousand cycles to answer; the products of a short
//! contraction take fifteen. So a role that begins each tile with such loads, shared out by quads, runs in another order:
//!
//! ```text
//! for tile {                      front (first tile)
//!     front: scalars, loads       for tile (loaded) {
//!     sum                    =>       scalars of the front
//!     stores                          sum
//! }                                   next = front (next tile)
//!                                     stores
//!                                 } yield next
//! ```

use super::emit::{Emit, Held};
use crate::nvidia::lower::mlir::Val;
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile;

/// Instructions in front of the only loop of a block whose loads are all shared out.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    insts: &'a [Inst],
    rest: &'a [Inst],
}

/// Whether an instruction reads memory.
fn is_load(inst: &Inst) -> bool {
    matches!(inst.op, Op::Tile(tile::Op::Load { .. } | tile::Op::Gather { .. }))
}

impl<'a> Emit<'a> {
    /// The front of a role's body, if it can be run for another tile while this one's results are there.
    pub fn front(&self, body: &'a Block) -> Option<Front<'a>> {
        let at = body.insts.iter().position(|i| matches!(i.op, Op::For { .. }))?;
        let (insts, rest) = body.insts.split_at(at);
        let plain = |i: &Inst| {
            let shared = i.results.first().is_some_and(|r| self.shares.contains_key(r));
            matches!(i.op, Op::Tile(_)) && (!is_load(i) || shared)
        };
        let loads = insts.iter().any(is_load);
        (!self.elected && loads && insts.iter().all(plain)).then_some(Front { insts, rest })
    }

    /// Runs the front for the tile at `block`; what its loads have brought. Everything else is as before.
    pub fn run_front(&mut self, front: Front<'a>, block: [Val; 3]) -> Result<Vec<Vec<Val>>, String> {
        let (held, shared_out) = (self.held.clone(), std::mem::take(&mut self.shared_out));
        let here = std::mem::replace(&mut self.block, block);
        for inst in front.insts {
            self.inst(inst)?;
        }
        self.block = here;
        self.held = held;
        let made = std::mem::replace(&mut self.shared_out, shared_out);
        let leaders = front.insts.iter().filter_map(|i| made.get(i.results.first()?).cloned());
        Ok(leaders.collect())
    }

    /// Runs a block whose front's loads have been made; afterwards those of the front of the tile at `next` have been.
    pub fn block_behind_front(
        &mut self,
        front: Front<'a>,
        loaded: &[Vec<Val>],
        next: [Val; 3],
    ) -> Result<Vec<Vec<Val>>, String> {
        let mut loaded = loaded.iter();
        for inst in front.insts {
            let share = inst.results.first().and_then(|r| self.shares.get(r).copied()).filter(|_| is_load(inst));
            let Some(share) = share else {
                self.inst(inst)?;
                continue;
            };
            let r = inst.results[0];
            if r == share.leader {
                self.shared_out.insert(r, loaded.next().cloned().ok_or("a load that was not made")?);
            }
            let values = self.shared_out.get(&share.leader).cloned().ok_or("a load before the one it is part of")?;
            let by_row = self.s.places[r.0 as usize] != Place::Uniform;
            self.held.insert(r, Held::Shared(values, [by_row, false], share.lane));
        }
        let (sum, rest) = front.rest.split_first().ok_or("a front of nothing")?;
        self.inst(sum)?;
        let made = self.run_front(front, next)?;
        for inst in rest {
            self.inst(inst)?;
        }
        Ok(made)
    }
}
