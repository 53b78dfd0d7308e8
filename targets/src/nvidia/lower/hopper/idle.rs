//! Warpgroups none of whose rows are stored.
//!
//! An expert's last tile of rows is rarely full, and what is computed of rows behind its end is dropped by the stores. Those are numbered, and
//! the number is −1 from a bound on:
//!
//! ```text
//! numbers = select(at + iota < end, .., -1)        scatter [numbers, n] = ..
//! ```
//!
//! So a warpgroup whose first row is at the bound or behind it does nothing for that tile but wait for its stages and give them back; the
//! matrix unit is left to the others.

use super::emit::Emit;
use super::front::in_lists;
use crate::nvidia::lower::mlir::Val;
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, MapArg, MapFn, Scalar, ScalarOp, ValueId};

use super::config::ROWS;

impl<'a> Emit<'a> {
    /// Runs what a loop does in a round: what of it gives stages back, where the warpgroup has none of the rows that it stores.
    pub fn block_unless_idle(&mut self, body: &'a Block) -> Result<(), String> {
        let run = |e: &mut Self| e.block(body).map(|()| Vec::new());
        self.unless_idle(body, run, |_| Ok(Vec::new())).map(|_| ())
    }

    /// The same with what `run` makes beside it, of which an idle warpgroup has what `rest` makes.
    pub fn unless_idle(
        &mut self,
        body: &'a Block,
        run: impl FnOnce(&mut Self) -> Result<Vec<Vec<Val>>, String>,
        rest: impl FnOnce(&mut Self) -> Result<Vec<Vec<Val>>, String>,
    ) -> Result<Vec<Vec<Val>>, String> {
        let Some(bounds) = self.bounds_of_rows(body) else { return run(self) };
        let first = self.the_geometry()?.first[0];
        self.settle_all();
        // Where a tile's end is computed for each.
        if bounds.iter().any(|[_, end]| !self.held.contains_key(end)) {
            body.insts.iter().take_while(|i| matches!(i.op, Op::Tile(_))).try_for_each(|i| self.known_scalar(i))?;
        }
        let mut idle = None;
        for [place, end] in bounds {
            let (place, end) = (self.row_element(place, first)?, self.uniform(end)?);
            let behind = self.t.f.cmp("sge", place, end);
            idle = Some(idle.map_or(behind, |all| self.t.f.bin("and", all, behind)));
        }
        let idle = idle.ok_or("a loop that stores nothing")?;
        let (works, rests, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        let before = self.ring_state();
        self.t.f.cond_br(idle, (rests, &[]), (works, &[]));
        self.t.f.start(rests, &[]);
        let held = self.held.clone();
        self.stages_only(body)?;
        self.held = held;
        let made = rest(self)?;
        let (counters, lengths) = (before.len(), made.iter().map(Vec::len).collect::<Vec<_>>());
        let state: Vec<Val> = self.ring_state().into_iter().chain(made.concat()).collect();
        let types: Vec<_> = state.iter().map(|x| x.ty()).collect();
        self.t.f.br(after, &state);
        self.t.f.start(works, &[]);
        self.resume(&before);
        let made = run(self)?;
        self.settle_all();
        let state: Vec<Val> = self.ring_state().into_iter().chain(made.concat()).collect();
        self.t.f.br(after, &state);
        let state = self.t.f.start(after, &types);
        self.resume(&state[..counters]);
        self.spare.clear();
        self.settled = None;
        Ok(in_lists(&state[counters..], &lengths))
    }

    /// What a block does with stages, and the scalars that its loops are bounded by.
    fn stages_only(&mut self, block: &'a Block) -> Result<(), String> {
        for inst in &block.insts {
            match &inst.op {
                Op::Wait(_) | Op::Release { .. } => self.inst(inst)?,
                Op::Tile(_) => self.known_scalar(inst)?,
                Op::For { lo, hi, step, body, .. } => {
                    let bounds = (self.index(*lo)?, self.index(*hi)?, crate::nvidia::lower::mlir::i32((*step).into()));
                    let state = self.ring_state();
                    let end = self.counted(bounds, &state, |e, counter, state| {
                        e.resume(state);
                        e.held.insert(body.args[0], super::emit::Held::Scalar(counter));
                        e.stages_only(body)?;
                        Ok(e.ring_state())
                    })?;
                    self.resume(&end);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Computes a scalar that does not come from memory, if its operands are known.
    fn known_scalar(&mut self, inst: &'a Inst) -> Result<(), String> {
        let Op::Tile(op) = &inst.op else { return Ok(()) };
        let loaded = matches!(op, tile::Op::Load { .. } | tile::Op::Gather { .. });
        let scalar = inst.results.first().is_some_and(|r| self.s.places[r.0 as usize] == Place::Uniform);
        let known = tile::operands(op).iter().all(|v| self.held.contains_key(v));
        if scalar && known && !loaded { self.inst(inst) } else { Ok(()) }
    }

    /// Of everything that a body stores, the rows' places, which count up, and their bound; none if there is something else, or if all
    /// warpgroups have the same rows.
    fn bounds_of_rows(&self, body: &Block) -> Option<Vec<[ValueId; 2]>> {
        let g = self.the_geometry().ok()?;
        let multiplies = body.insts.iter().any(|i| matches!(&i.op, Op::For { .. }));
        let together = body.insts.iter().any(|i| matches!(i.op, Op::Barrier));
        if g.transposed || g.shape[0] <= g.subs * ROWS || !multiplies || together {
            return None;
        }
        let mut bounds = Vec::new();
        for inst in &body.insts {
            match &inst.op {
                Op::Tile(tile::Op::Scatter { rows, .. }) => bounds.push(self.dropped_from(*rows)?),
                Op::Tile(tile::Op::Store { .. }) => return None,
                _ => {}
            }
        }
        (!bounds.is_empty()).then_some(bounds)
    }

    /// Places that count up, and the bound from which on numbers of rows are negative.
    fn dropped_from(&self, rows: ValueId) -> Option<[ValueId; 2]> {
        let (inputs, map) = self.map_of(rows)?;
        let inst = |a: &MapArg| if let MapArg::Inst(i) = a { map.insts.get(*i as usize) } else { None };
        let input = |a: &MapArg| if let MapArg::Input(i) = a { inputs.get(*i as usize).copied() } else { None };
        let chosen = inst(&map.result).filter(|i| i.op == ScalarOp::Select)?;
        let below = inst(chosen.args.first()?).filter(|i| i.op == ScalarOp::Lt)?;
        let dropped = matches!(inst(chosen.args.get(2)?)?.op, ScalarOp::Const(Scalar::I32(n)) if n < 0);
        let [place, end] = [input(below.args.first()?)?, input(below.args.get(1)?)?];
        (dropped && self.counts_up(place) && self.shape(end).is_empty()).then_some([place, end])
    }

    /// Whether a vector is numbers in order, one after another: from 0, or from a scalar.
    fn counts_up(&self, v: ValueId) -> bool {
        match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(tile::Op::Iota { shape, .. })) => shape.len() == 1,
            _ => self.map_of(v).is_some_and(|(inputs, map)| {
                let sums = map.insts.iter().all(|i| matches!(i.op, ScalarOp::Add | ScalarOp::Const(_)));
                let (vectors, scalars): (Vec<_>, Vec<_>) = inputs.iter().partition(|v| !self.shape(**v).is_empty());
                let used = |i: usize| {
                    let args = map.insts.iter().flat_map(|n| &n.args);
                    args.filter(|a| **a == MapArg::Input(i as u32)).count() == 1
                };
                let once = (0..inputs.len()).all(used) && scalars.len() + 1 == inputs.len();
                sums && once && vectors.into_iter().all(|&v| self.counts_up(v))
            }),
        }
    }

    fn map_of(&self, v: ValueId) -> Option<(&'a [ValueId], &'a MapFn)> {
        match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(tile::Op::Map { inputs, body })) => Some((inputs, body)),
            _ => None,
        }
    }
}
