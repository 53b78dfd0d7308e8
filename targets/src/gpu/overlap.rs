//! What a kernel does while the launches before it still run.
//!
//! Where launches overlap, a kernel waits for those before in front of the first instruction that needs what they write, or writes anything itself.
//! In front of that it may read constants: scalars that follow from the block's number, loads of weights into registers.

use super::emit::Emitter;
use dsc_ir::sched::{Inst, Op, Place};
use dsc_ir::tile::{self, Access, Index};

impl<'a> Emitter<'a> {
    /// Waits for the launches before, if that was not done yet and an instruction asks for it; none: in any case.
    pub fn await_launches(&mut self, next: Option<&Inst>) {
        if self.waits && !next.is_some_and(|inst| self.is_ahead(inst)) {
            self.end_of_launch();
            self.waits = false;
        }
    }

    /// Waits for the launches before: at the end too, as a launch that ended before them would let the next one begin.
    pub fn end_of_launch(&mut self) {
        if let Some(wait) = self.t.wait {
            wait(&mut self.t.f);
        }
    }

    /// Whether an instruction needs nothing that launches before may write, and writes nothing: it makes a scalar of what is known from the start, or
    /// loads constants into registers. Notes what scalars are known.
    fn is_ahead(&mut self, inst: &Inst) -> bool {
        match &inst.op {
            Op::Tile(tile::Op::Load { view, index, .. }) => {
                let constant = tile::access_of(&self.s.params, *view) == Some(Access::Constant);
                let known = |i: &Index| !matches!(i, Index::Value(v) if !self.known.contains(v));
                constant && self.place(inst.results[0]) == &Place::Held && index.iter().all(known)
            }
            Op::Tile(
                op @ (tile::Op::BlockId { .. } | tile::Op::Sym(_) | tile::Op::Full { .. } | tile::Op::Map { .. }),
            ) => {
                let scalar = inst.results.iter().all(|&r| self.place(r) == &Place::Uniform);
                let known = scalar && tile::operands(op).iter().all(|v| self.known.contains(v));
                self.known.extend(inst.results.iter().filter(|_| known));
                known
            }
            Op::If { cond, .. } => self.known.contains(cond),
            _ => false,
        }
    }
}
