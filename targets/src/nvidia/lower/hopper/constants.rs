//! Constants that are on their way before the launches before have ended.
//!
//! A kernel starts while the one before it ends, and waits for its results. Weights are nobody's results: where a role of one thread brings both
//! operands of a product, two threads do, each with its own warp:
//!
//! ```text
//!                                       one thread            the other
//! wait for the launches before          for k ..              wait for the launches before
//! for k ..                        =>      acquire             for k ..
//!   acquire; copy x; copy w               copy w                acquire; copy x
//! ```
//!
//! so that a ring of weights is there when the first rows of `x` are. The first announces the bytes of both: a stage is not full before that, though
//! `x` may have come.

use super::emit::{Emit, How, uneven};
use dsc_ir::sched::{Block, Op, Role, Scheduled};
use dsc_ir::tile::{self, Access, ValueId};

/// What of a stage a thread brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Brings {
    /// All of it.
    All,
    /// What no launch writes; announces all of it.
    Constants,
    /// The rest, once the launches before have ended.
    Rest,
}

/// Whether nobody writes what is behind a view.
fn is_constant(s: &Scheduled, view: ValueId) -> bool {
    tile::access_of(&s.params, view) == Some(Access::Constant)
}

/// Whether a role's thread reads no memory but by copies of whole tiles into its own block; notes whether constants are among them, and others.
fn copies_only(s: &Scheduled, block: &Block, found: &mut [bool; 2]) -> bool {
    block.insts.iter().all(|inst| match &inst.op {
        Op::Copy { view, rows, shared, .. } => {
            found[usize::from(is_constant(s, *view))] = true;
            rows.is_none() && !shared
        }
        Op::Tile(op) => matches!(op, tile::Op::BlockId { .. } | tile::Op::Map { .. } | tile::Op::Sym(_)),
        Op::Acquire(_) | Op::Commit(_) => true,
        Op::For { body, .. } => copies_only(s, body, found),
        _ => false,
    })
}

/// The role that two threads can be, if there is one and it has a warp for each.
pub fn of_two_threads(s: &Scheduled, how: &How) -> Option<usize> {
    if how.late || s.parts() || s.team > 1 || s.cluster.is_some() || uneven(s) {
        return None;
    }
    let two = |r: &Role| {
        let mut found = [false; 2];
        r.elected && r.warps[1] - r.warps[0] > 1 && copies_only(s, &r.body, &mut found) && found == [true; 2]
    };
    s.roles.iter().position(two)
}

impl Emit<'_> {
    /// Whether this thread brings what is copied from there.
    pub fn brings_from(&self, view: ValueId) -> bool {
        match self.brings {
            Brings::All => true,
            Brings::Constants => is_constant(self.s, view),
            Brings::Rest => !is_constant(self.s, view),
        }
    }
}
