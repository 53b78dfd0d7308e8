//! Left operands that stay in registers. What a loop's product multiplies with in all rounds alike, as queries of attention are, is loaded in front of the
//! loop, by each lane as the instruction takes it: it takes no shared memory, and no round reads it from there.

use super::fragment::Layout;
use super::isa::Isa;
use super::ring::made_in;
use super::schedule::{Scheduler, matrix};
use dsc_ir::sched::{Atom, Block, Op, Place};
use dsc_ir::tile::{self, ValueId};
use std::collections::{BTreeMap, BTreeSet};

/// Bytes of a lane's registers for them.
const MOST_BYTES: u32 = 320;

/// Who reads a tile in shared memory.
#[derive(Default)]
struct Readers {
    /// Products of loops that it is made in front of, as their left operand.
    products: Vec<ValueId>,
    /// Whether something else does.
    others: bool,
}

impl Scheduler<'_> {
    /// Loads left operands of loops to registers, where there is room for all of them.
    pub(super) fn hold_left_operands(&mut self, block: &mut Block, arch: &dyn Isa) {
        let mut readers = BTreeMap::new();
        self.find_readers(block, false, &mut readers);
        let mut bytes = 0;
        let mut held = Vec::new();
        for (&v, readers) in &readers {
            let Readers { products, others: false } = readers else { continue };
            let ([product], Place::Shared(_)) = (&products[..], self.place(v)) else { continue };
            let Some(tile::Op::Load { view, .. }) = self.defs.get(&v) else { continue };
            let (t, Place::Fragment(f)) = (self.tile(v), self.place(*product)) else { continue };
            let (k, layout) = (matrix(&t.shape)[1], Layout::of(f.atom));
            if !self.only_reads(*view) || f.atom == Atom::Fma || !arch.holds_left(t.dtype, k) {
                continue;
            }
            let rows = matrix(&self.tile(*product).shape)[0].div_ceil(f.warps[0]).next_multiple_of(layout.unit[0]);
            bytes += rows * k * t.dtype.bytes() as u32 / layout.lanes;
            held.push(v);
        }
        if bytes > MOST_BYTES {
            return;
        }
        held.iter().for_each(|&v| self.set(v, Place::Held));
        self.drop_unused_buffers(block);
    }

    fn find_readers(&self, block: &Block, looped: bool, into: &mut BTreeMap<ValueId, Readers>) {
        let here = made_in(block);
        let others = |v: ValueId, into: &mut BTreeMap<ValueId, Readers>| {
            let mut read = BTreeSet::new();
            self.sources(v, &[], &mut read);
            read.into_iter().for_each(|v| into.entry(v).or_default().others = true);
        };
        for inst in &block.insts {
            let lazy = |r: &ValueId| self.place(*r) == &Place::Lazy;
            if !inst.results.is_empty() && inst.results.iter().all(lazy) {
                continue;
            }
            let mut left = None;
            if let Op::Tile(tile::Op::Dot { a, .. }) = &inst.op
                && let Some(v) = self.reshaped(*a)
                && looped
                && !here.contains(&v)
            {
                into.entry(v).or_default().products.push(inst.results[0]);
                left = Some(*a);
            }
            let mut skip = left;
            for v in dsc_ir::sched::operands(&inst.op) {
                if skip == Some(v) {
                    // It may be the right one as well.
                    skip = None;
                    continue;
                }
                others(v, into);
            }
            let inside = looped || matches!(inst.op, Op::For { .. });
            inst.op.blocks().into_iter().for_each(|b| self.find_readers(b, inside, into));
        }
        block.yields.iter().for_each(|&v| others(v, into));
    }

    /// The tile in shared memory that a value is with the same columns.
    fn reshaped(&self, mut v: ValueId) -> Option<ValueId> {
        loop {
            match (self.place(v), self.defs.get(&v)) {
                (Place::Shared(_), _) => return Some(v),
                (Place::Lazy, Some(tile::Op::Reshape { x, .. }))
                    if self.tile(*x).shape.last() == self.tile(v).shape.last() =>
                {
                    v = *x;
                }
                _ => return None,
            }
        }
    }
}
