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
//!
//! Where a tile of the grid is a loop of such tiles, over the rows of an expert, the loop's bounds come from memory too. Those of the block's next
//! tile of the grid are loaded when this one begins, and behind the last round's sum the front is that of the next one's first round:
//!
//! ```text
//! for tile {                      bounds (first tile), front (its first round)
//!     bounds                      for tile (bounds, loaded) {
//!     for round in bounds {           next = bounds (next tile)
//!         front              =>       for round in bounds (loaded) {
//!         sum                             sum
//!         stores                          loaded = front (next round, or the first of next)
//!     }                                   stores
//! }                                   }
//!                                     front (the first round of next), if there was no round
//!                                 } yield next, loaded
//! ```

use super::emit::{Emit, Held, uneven};
use crate::nvidia::lower::mlir::{Val, i32};
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, ValueId};

/// A scalar and what it is.
type Scalar = (ValueId, Val);

/// Instructions in front of the only loop of a block whose loads are all shared out.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    insts: &'a [Inst],
    rest: &'a [Inst],
}

/// A tile of the grid that is a loop of tiles with fronts.
#[derive(Clone, Copy, Debug)]
pub struct Nest<'a> {
    /// Scalars.
    bounds: &'a [Inst],
    /// The loop's.
    range: (Index, Index, u32),
    body: &'a Block,
    front: Front<'a>,
}

/// Whether an instruction reads memory.
fn is_load(inst: &Inst) -> bool {
    matches!(inst.op, Op::Tile(tile::Op::Load { .. } | tile::Op::Gather { .. }))
}

/// Registers in their order, in lists of those lengths.
pub fn in_lists(mut values: &[Val], lengths: &[usize]) -> Vec<Vec<Val>> {
    let mut lists = Vec::new();
    for &n in lengths {
        let (here, after) = values.split_at(n);
        lists.push(here.to_vec());
        values = after;
    }
    lists
}

impl<'a> Emit<'a> {
    /// The front of a role's body, if it can be run for another tile while this one's results are there.
    pub fn front(&self, body: &'a Block) -> Option<Front<'a>> {
        let at = body.insts.iter().position(|i| matches!(i.op, Op::For { .. }))?;
        let (insts, rest) = body.insts.split_at(at);
        let plain = |i: &Inst| {
            let shared = i.results.first().is_some_and(|r| self.shares.contains_key(r));
            matches!(i.op, Op::Tile(_)) && (!is_load(i) || shared || self.is_lazy(i))
        };
        let loads = insts.iter().any(|i| is_load(i) && !self.is_lazy(i));
        (!self.elected && loads && insts.iter().all(plain)).then_some(Front { insts, rest })
    }

    /// A role's body that is scalars and a loop with a front, where the block's next tile is known.
    pub fn nest(&self, body: &'a Block) -> Option<Nest<'a>> {
        let (last, bounds) = body.insts.split_last()?;
        let Op::For { lo, hi, step, init, body } = &last.op else { return None };
        let uniform = |i: &Inst| {
            let scalar = i.results.first().is_some_and(|r| self.s.places[r.0 as usize] == Place::Uniform);
            matches!(i.op, Op::Tile(_)) && scalar
        };
        let front = self.front(body)?;
        let plain = init.is_empty() && bounds.iter().all(uniform) && !uneven(self.s);
        plain.then_some(Nest { bounds, range: (*lo, *hi, *step), body, front })
    }

    fn is_lazy(&self, inst: &Inst) -> bool {
        inst.results.first().is_some_and(|r| self.s.places[r.0 as usize] == Place::Lazy)
    }

    /// Runs the front for the tile at `block`; what its loads have brought. Everything else is as before.
    pub fn run_front(&mut self, front: Front<'a>, block: [Val; 3]) -> Result<Vec<Vec<Val>>, String> {
        let here = std::mem::replace(&mut self.block, block);
        let made = self.front_with(front, &[]);
        self.block = here;
        made
    }

    /// Runs the front where those scalars are others.
    fn front_with(&mut self, front: Front<'a>, scalars: &[Scalar]) -> Result<Vec<Vec<Val>>, String> {
        let (held, shared_out) = (self.held.clone(), std::mem::take(&mut self.shared_out));
        self.held.extend(scalars.iter().map(|&(v, x)| (v, Held::Scalar(x))));
        for inst in front.insts {
            self.inst(inst)?;
        }
        self.held = held;
        let made = std::mem::replace(&mut self.shared_out, shared_out);
        let leaders = front.insts.iter().filter_map(|i| made.get(i.results.first()?).cloned());
        Ok(leaders.collect())
    }

    /// Runs a block whose front's loads have been made; what `next` makes behind its sum.
    pub fn block_behind_front(
        &mut self,
        front: Front<'a>,
        loaded: &[Vec<Val>],
        next: impl FnOnce(&mut Self) -> Result<Vec<Vec<Val>>, String>,
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
        let made = next(self)?;
        for inst in rest {
            self.inst(inst)?;
        }
        Ok(made)
    }

    /// The scalars of a nest for the tile at `block`, in order, and which of them came from memory: those are `loaded` if they are known.
    pub fn bounds_of(
        &mut self,
        nest: Nest<'a>,
        block: [Val; 3],
        loaded: Option<&[Val]>,
    ) -> Result<(Vec<Scalar>, Vec<Val>), String> {
        let (here, held) = (std::mem::replace(&mut self.block, block), self.held.clone());
        let (mut scalars, mut made) = (Vec::new(), Vec::new());
        for inst in nest.bounds {
            let r = inst.results[0];
            match loaded.filter(|_| is_load(inst)).map(|known| known.get(made.len()).copied()) {
                Some(known) => _ = self.held.insert(r, Held::Scalar(known.ok_or("a bound that was not loaded")?)),
                None => self.inst(inst)?,
            }
            let x = self.uniform(r)?;
            scalars.push((r, x));
            made.extend(is_load(inst).then_some(x));
        }
        (self.block, self.held) = (here, held);
        Ok((scalars, made))
    }

    /// The front of a nest's first round, its scalars being those.
    pub fn first_front(&mut self, nest: Nest<'a>, scalars: &[Scalar]) -> Result<Vec<Vec<Val>>, String> {
        let first = self.index_among(nest.range.0, scalars)?;
        let scalars: Vec<_> = scalars.iter().copied().chain([(nest.body.args[0], first)]).collect();
        self.front_with(nest.front, &scalars)
    }

    /// Runs a nest of the scalars `here`, whose first front has `loaded`; afterwards the first front of the nest of the scalars `after` has been.
    pub fn run_nest(
        &mut self,
        nest: Nest<'a>,
        [here, after]: [&[Scalar]; 2],
        loaded: &[Vec<Val>],
    ) -> Result<Vec<Vec<Val>>, String> {
        self.settle_all();
        self.held.extend(here.iter().map(|&(v, x)| (v, Held::Scalar(x))));
        let (lo, hi, step) = nest.range;
        let [lo, hi] = [self.index(lo)?, self.index(hi)?];
        let first = self.index_among(nest.range.0, after)?;
        let step = i32(step.into());
        let lengths: Vec<usize> = loaded.iter().map(Vec::len).collect();
        let mut state = self.ring_state();
        let counters = state.len();
        state.extend(loaded.iter().flatten());
        let end = self.counted((lo, hi, step), &state, |e, round, state| {
            let (rings, loaded) = state.split_at(counters);
            e.resume(rings);
            let loaded = in_lists(loaded, &lengths);
            e.held.insert(nest.body.args[0], Held::Scalar(round));
            e.spare.clear();
            e.settled = None;
            // Of the next round, or of the next tile's first.
            let next = |e: &mut Self| {
                let behind = e.t.f.add(round, step);
                let more = e.t.f.cmp("slt", behind, hi);
                let mut scalars = vec![(nest.body.args[0], e.t.f.select(more, behind, first))];
                for (&(v, x), &(_, other)) in here.iter().zip(after) {
                    scalars.push((v, if x == other { x } else { e.t.f.select(more, x, other) }));
                }
                e.front_with(nest.front, &scalars)
            };
            let made = e.unless_idle(nest.body, |e| e.block_behind_front(nest.front, &loaded, next), next)?;
            e.spare.clear();
            e.settled = None;
            e.settle_all();
            Ok(e.ring_state().into_iter().chain(made.into_iter().flatten()).collect())
        })?;
        self.resume(&end[..counters]);
        let some = self.t.f.cmp("slt", lo, hi);
        let (none, out) = (self.t.f.label(), self.t.f.label());
        let types: Vec<_> = end[counters..].iter().map(|x| x.ty()).collect();
        self.t.f.cond_br(some, (out, &end[counters..]), (none, &[]));
        self.t.f.start(none, &[]);
        let made = self.first_front(nest, after)?;
        self.t.f.br(out, &made.concat());
        let made = self.t.f.start(out, &types);
        Ok(in_lists(&made, &lengths))
    }

    /// An index, of which some scalars are others.
    fn index_among(&mut self, index: Index, scalars: &[Scalar]) -> Result<Val, String> {
        match index {
            Index::Value(v) => match scalars.iter().find(|s| s.0 == v) {
                Some(&(_, x)) => Ok(x),
                None => self.uniform(v),
            },
            Index::Const(_) => self.index(index),
        }
    }
}
