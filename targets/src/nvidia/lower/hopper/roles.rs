//! The two roles of a contraction: the producer fills stages, the consumers multiply from them and do what comes after.
//!
//! Products are kept one group deep: a stage is released when the product after it has been issued, so the first round of a plain
//! contraction stands before the loop.

use super::plan::{Planner, RING};
use super::values::{Names, plain, rename_index};
use dsc_ir::DType;
use dsc_ir::sched::{Block, BufferId, Inst, Op, Place};
use dsc_ir::tile::{self, Index, Region, Scalar, TileType, Type, ValueId};

impl<'a> Planner<'a> {
    /// A region as the producer runs it.
    pub fn producer(&mut self, region: &'a Region, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        for inst in &region.insts {
            if inst.results == self.c.k_loop.results {
                let fill = self.fill_loop(names, &mut out)?;
                out.push(fill);
            } else if let Some(around) = self.around(inst) {
                out.push(self.loop_around(around, names, Self::producer)?);
            } else if inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                // Which rows a thread brings is its own affair: no place of a fragment.
                let place = self.place(inst)?;
                let place = if matches!(place, Place::Fragment(_)) { Place::Lazy } else { place };
                out.push(self.values.copied(inst, place, names)?);
            }
        }
        Some(out)
    }

    /// The bounds of the loop over `k` as a role has them: where the number of rounds is known, the end follows from the start.
    pub fn bounds_in(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<(Index, Index)> {
        let (lo, hi, step) = self.c.range;
        let lo = rename_index(lo, names)?;
        let hi = match (self.c.rounds, lo) {
            (Some(rounds), Index::Value(v)) => {
                let (inst, end) = self.plus(v, rounds * step);
                out.push(inst);
                Index::Value(end)
            }
            _ => rename_index(hi, names)?,
        };
        Some((lo, hi))
    }

    /// The loop over `k` that fills stages.
    fn fill_loop(&mut self, names: &mut Names, out: &mut Vec<Inst>) -> Option<Inst> {
        let c = self.c.clone();
        let step = c.range.2;
        let (lo, hi) = self.bounds_in(names, out)?;
        let counter = self.values.fresh(self.program.ty(c.body.args[0]).clone(), Place::Uniform);
        names.insert(c.body.args[0], counter);
        let mut insts = Vec::new();
        for inst in &c.body.insts {
            if !inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                continue;
            }
            let place = self.place(inst)?;
            insts.push(self.values.copied(inst, place, names)?);
        }
        for part in 0..c.step / c.stage_k() {
            let mut copies = Vec::new();
            for (slot, operand) in c.operands().into_iter().enumerate() {
                let mut index: Vec<Index> =
                    operand.index.iter().map(|&i| rename_index(i, names)).collect::<Option<_>>()?;
                let across = c.across && slot >= c.lefts.len();
                let from_end = if across { 2 } else { 1 };
                let along = index.iter_mut().rev().nth(from_end - 1)?;
                if part > 0 {
                    *along = match *along {
                        Index::Const(at) => Index::Const(at + i64::from(part * c.stage_k())),
                        Index::Value(v) => {
                            let (inst, v) = self.plus(v, part * c.stage_k());
                            insts.push(inst);
                            Index::Value(v)
                        }
                    };
                }
                let shared = self.cluster.is_some_and(|(_, rights)| rights == (slot >= c.lefts.len()));
                let mut shape = operand.shape.to_vec();
                *shape.iter_mut().rev().nth(from_end - 1)? = c.stage_k();
                let view = *names.get(&operand.view)?;
                let rows = operand.gathered.map(|r| names.get(&r).copied().ok_or(())).transpose().ok()?;
                copies.push(plain(Op::Copy { channel: RING, slot: slot as u32, view, rows, index, shape, shared }));
            }
            insts.push(plain(Op::Acquire(RING)));
            insts.extend(copies);
            insts.push(plain(Op::Commit(RING)));
        }
        let body = Block { args: vec![counter], insts, yields: Vec::new() };
        Some(plain(Op::For { lo, hi, step, init: Vec::new(), body }))
    }

    /// A region as the consumers run it.
    pub fn consumer(&mut self, region: &'a Region, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        let mut stores = 0_u32;
        for inst in &region.insts {
            if inst.results == self.c.k_loop.results {
                let totals = if self.c.direct { self.sum(names, &mut out)? } else { self.scaled_sum(names, &mut out)? };
                names.extend(inst.results.iter().copied().zip(totals));
            } else if let Some(around) = self.around(inst) {
                out.push(self.loop_around(around, names, Self::consumer)?);
            } else if let tile::Op::Reduce { .. } = &inst.op {
                out.extend(self.row_maxima(inst, names)?);
            } else if let tile::Op::Store { value, .. } | tile::Op::Scatter { value, .. } = &inst.op {
                self.storable(self.tile(*value)?).then_some(())?;
                let mut store = self.values.copied(inst, Place::Lazy, names)?;
                if let Some(number) = stores.checked_rem(self.config.staged) {
                    store.scratch = Some(BufferId(self.c.operands().len() as u32 + number));
                }
                stores += 1;
                out.push(store);
            } else if inst.results.first().is_some_and(|r| self.consumed.contains(r)) {
                let place = self.place(inst)?;
                out.push(self.values.copied(inst, place, names)?);
            } else if !inst.results.first().is_some_and(|r| self.produced.contains(r)) {
                return None;
            }
        }
        Some(out)
    }

    /// Whether threads have the elements of such a tile: results, or one value a row.
    fn storable(&self, t: &TileType) -> bool {
        let [rows, columns] = self.c.shape();
        let count = if t.shape.last() == Some(&1) { rows } else { rows * columns };
        t.shape.len() > 1 && t.shape.last().is_some_and(|&n| n == 1 || n == columns) && t.elements() == count as usize
    }

    /// The largest element of each row of a tile of results.
    fn row_maxima(&mut self, inst: &tile::Inst, names: &mut Names) -> Option<Vec<Inst>> {
        let tile::Op::Reduce { x, axis, kind: tile::ReduceKind::Max } = inst.op else { return None };
        let t = self.tile(x)?;
        let rows = t.dtype == DType::F32
            && axis as usize + 1 == t.shape.len()
            && t.shape.last() == Some(&self.c.shape()[1])
            && self.storable(t);
        rows.then_some(())?;
        let one = self.tile(inst.results[0])?.elements() == 1;
        let place = if one { Place::Uniform } else { self.fragment() };
        let result = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
        names.insert(inst.results[0], result);
        let op = tile::Op::Reduce { x: *names.get(&x)?, axis, kind: tile::ReduceKind::Max };
        let mut out = Vec::new();
        let mut scratch = None;
        if self.config.row_parts > 1 {
            // Some thread may still read the maxima of the tile before.
            out.push(plain(Op::Barrier));
            scratch = Some(BufferId(self.c.operands().len() as u32 + self.config.staged));
        }
        out.push(Inst { results: vec![result], op: Op::Tile(op), scratch });
        Some(out)
    }

    /// A new value for each product's result.
    pub fn results(&mut self) -> Vec<ValueId> {
        let types: Vec<Type> = self.c.dots.iter().map(|d| self.program.ty(d.results[0]).clone()).collect();
        let place = self.fragment();
        types.into_iter().map(|ty| self.values.fresh(ty, place.clone())).collect()
    }

    /// Waits for the stages of one round and multiplies them; the sums with `accs`. Of each stage but the first the one `lag` before is
    /// released once it is multiplied; of the first too if `first`.
    fn multiply(
        &mut self,
        mut accs: Option<Vec<ValueId>>,
        (lag, first): (Option<u32>, bool),
        out: &mut Vec<Inst>,
    ) -> Vec<ValueId> {
        let c = self.c.clone();
        for part in 0..c.step / c.stage_k() {
            out.push(plain(Op::Wait(RING)));
            let taken = self.take(out);
            let results = self.results();
            for (i, &result) in results.iter().enumerate() {
                let acc = accs.as_ref().map(|accs| accs[i]);
                let [a, b] = self.operands_of(&taken, i);
                let op = tile::Op::Dot { a, b, acc, trans_b: !c.across };
                out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            }
            if let Some(lag) = lag
                && (first || part > 0)
            {
                out.push(plain(Op::Release { channel: RING, lag }));
            }
            accs = Some(results);
        }
        accs.unwrap_or_default()
    }

    /// Zeros for each product's sum.
    pub fn zeros(&mut self, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let shape = self.c.shape().to_vec();
        let ty = TileType { dtype: DType::F32, shape: shape.clone() };
        let zero = self.values.fresh(Type::Tile(ty), Place::Lazy);
        let op = Op::Tile(tile::Op::Full { value: Scalar::F32(0.0), shape });
        out.push(Inst { results: vec![zero], op, scratch: None });
        vec![zero; self.c.dots.len()]
    }

    /// A new value for the counter of a loop over rounds.
    pub fn counter(&mut self) -> ValueId {
        self.values.fresh(self.program.ty(self.c.body.args[0]).clone(), Place::Uniform)
    }

    /// A loop that carries sums; `body` gets its counter and the sums.
    fn carrying(
        &mut self,
        (lo, hi, step): (Index, Index, u32),
        init: Vec<ValueId>,
        out: &mut Vec<Inst>,
        body: impl FnOnce(&mut Self, ValueId, Vec<ValueId>, &mut Vec<Inst>) -> Option<Vec<ValueId>>,
    ) -> Option<Vec<ValueId>> {
        let counter = self.counter();
        let carried = self.results();
        let mut insts = Vec::new();
        let yields = body(self, counter, carried.clone(), &mut insts)?;
        let args = [counter].into_iter().chain(carried).collect();
        let results = self.results();
        let op = Op::For { lo, hi, step, init, body: Block { args, insts, yields } };
        out.push(Inst { results: results.clone(), op, scratch: None });
        Some(results)
    }

    /// `Σ_k a · bᵀ`.
    fn sum(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<Vec<ValueId>> {
        let step = self.c.range.2;
        let (lo, hi) = self.bounds_in(names, out)?;
        let Some(rounds) = self.c.rounds else {
            // There may be no round at all: nothing can stand before the loop.
            let zeros = self.zeros(out);
            return self.carrying((lo, hi, step), zeros, out, |p, _, accs, out| {
                Some(p.multiply(Some(accs), (Some(0), true), out))
            });
        };
        let second = match lo {
            Index::Const(first) => Index::Const(first + i64::from(step)),
            Index::Value(first) => {
                let (inst, second) = self.plus(first, step);
                out.push(inst);
                Index::Value(second)
            }
        };
        let mut totals = self.multiply(None, (Some(1), false), out);
        if rounds > 1 {
            let rest = (second, hi, step);
            totals =
                self.carrying(rest, totals, out, |p, _, accs, out| Some(p.multiply(Some(accs), (Some(1), true), out)))?;
        }
        out.push(plain(Op::Release { channel: RING, lag: 0 }));
        Some(totals)
    }

    /// The operands of a product, of what is in the slots.
    pub fn operands_of(&self, taken: &[ValueId], product: usize) -> [ValueId; 2] {
        let [left, right] = self.c.pairs[product];
        [taken[left], taken[self.c.lefts.len() + right]]
    }

    /// What is in the slots of the stage waited for last.
    pub fn take(&mut self, out: &mut Vec<Inst>) -> Vec<ValueId> {
        let c = self.c.clone();
        let mut taken = Vec::new();
        for (slot, operand) in c.operands().into_iter().enumerate() {
            let mut shape = vec![operand.rows, c.stage_k()];
            if c.across && slot >= c.lefts.len() {
                shape.reverse();
            }
            let ty = TileType { dtype: c.dtype, shape };
            taken.push(self.values.fresh(Type::Tile(ty), Place::Slot(RING, slot as u32)));
            let op = Op::Take { channel: RING, slot: slot as u32 };
            out.push(Inst { results: vec![taken[slot]], op, scratch: None });
        }
        taken
    }
}
