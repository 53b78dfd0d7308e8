//! Sums whose rounds are scaled: partial sums of each round, and maps that add them to the accumulators.
//!
//! Where registers allow, partial sums of two rounds are in flight and each is added to the accumulator while the other is made.

use super::plan::{Planner, RING};
use super::values::{Names, plain};
use dsc_ir::DType;
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, MapFn, MapInst, ScalarOp, ValueId};
use std::collections::{HashSet, VecDeque};

impl<'a> Planner<'a> {
    /// The same with maps of each round's partial sums into the accumulators.
    ///
    /// A turn of the loop takes several rounds. In it partial sums of some rounds are in flight: a round's products are issued, then the oldest
    /// partial sums are added while the younger ones are made. None is in flight from turn to turn, which the assembler would serialise.
    /// What sums are scaled by is loaded some rounds before.
    pub fn scaled_sum(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<Vec<ValueId>> {
        let (lo, hi) = self.bounds_in(names, out)?;
        let (step, products, ahead) = (self.c.range.2, self.c.dots.len(), self.config.loads_ahead);
        let mut accs = self.zeros(out);
        let first = match lo {
            Index::Value(v) => v,
            Index::Const(n) => {
                let (inst, v) = self.scalar(i32::try_from(n).ok()?);
                out.push(inst);
                v
            }
        };
        let rounds = self.c.rounds;
        let turn = ((2 * self.config.partials).max(4) / products as u32).max(ahead);
        let each_turn = rounds.map_or(1, |rounds| turn.max(2).min(rounds));
        let rest = rounds.map_or(0, |rounds| rounds % each_turn);
        let end = match rounds {
            Some(rounds) if rest > 0 => {
                let (inst, end) = self.plus(first, (rounds - rest) * step);
                out.push(inst);
                Index::Value(end)
            }
            _ => hi,
        };
        let mut loaded = VecDeque::new();
        for round in 0..ahead {
            loaded.push_back(self.load_round((first, round * step), names, out)?);
        }
        let counter = self.counter();
        let init: Vec<ValueId> = accs.iter().copied().chain(loaded.iter().flatten().copied()).collect();
        let carried = |p: &mut Self| -> Vec<ValueId> {
            let mut all = p.results();
            for &v in &init[products..] {
                all.push(p.values.fresh(p.values.types[v.0 as usize].clone(), p.values.places[v.0 as usize].clone()));
            }
            all
        };
        let by_round = |values: &[ValueId]| -> VecDeque<Vec<ValueId>> {
            let each = values.len() / ahead as usize;
            (0..ahead as usize).map(|i| values[i * each..(i + 1) * each].to_vec()).collect()
        };
        let args = carried(self);
        let mut insts = Vec::new();
        let mut next = by_round(&args[products..]);
        let sums = args[..products].to_vec();
        let sums = self.scaled_rounds((counter, each_turn, true), (sums, &mut next), names, &mut insts)?;
        let yields = sums.into_iter().chain(next.into_iter().flatten()).collect();
        let body = Block { args: [counter].into_iter().chain(args).collect(), insts, yields };
        let results = carried(self);
        let op = Op::For { lo, hi: end, step: step * each_turn, init, body };
        out.push(Inst { results: results.clone(), op, scratch: None });
        accs = results[..products].to_vec();
        if let (Index::Value(counter), true) = (end, rest > 0) {
            let mut loaded = by_round(&results[products..]);
            accs = self.scaled_rounds((counter, rest, false), (accs, &mut loaded), names, out)?;
        }
        Some(accs)
    }

    /// `count` rounds from `counter` on, the first of which `loaded` has what is loaded for; afterwards it has that of the first
    /// rounds behind, if there are `more`.
    fn scaled_rounds(
        &mut self,
        (counter, count, more): (ValueId, u32, bool),
        (mut accs, loaded): (Vec<ValueId>, &mut VecDeque<Vec<ValueId>>),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let (step, ahead) = (self.c.range.2, self.config.loads_ahead);
        let products = self.c.dots.len() as u32;
        let (mut flight, mut taken, mut waited) = (VecDeque::new(), Vec::new(), 0);
        let (mut issued, mut ready) = (0, None);
        for round in 0..count {
            let now = loaded.pop_front()?;
            let mut factors: Option<Names> = ready.take();
            for product in 0..products {
                let unit = round * products + product;
                while issued < (unit + self.config.partials).min(count * products) {
                    if issued % products == 0 {
                        // In front of a wait the assembler leaves them there; between products they would hold these up.
                        match (&factors, loaded.front().cloned()) {
                            (None, _) => factors = Some(self.factors(&now, names, out)?),
                            (_, Some(next)) if product > 0 => ready = Some(self.factors(&next, names, out)?),
                            _ => {}
                        }
                        taken = self.wait_for_round(out);
                        waited += 1;
                    }
                    flight.push_back(self.issue(&taken, (issued % products) as usize, out));
                    issued += 1;
                }
                let next = more || round + ahead < count;
                // With several products registers are scarce: what this round was loaded for makes room first.
                if next && products == 1 {
                    loaded.push_back(self.load_round((counter, (round + ahead) * step), names, out)?);
                }
                let last = (product + 1 == products).then_some(waited - 1 - round);
                if factors.is_none() {
                    factors = Some(self.factors(&now, names, out)?);
                }
                let names = factors.as_ref()?;
                accs = self.promote((accs, flight.pop_front()?), (product as usize, last), names, out)?;
                if next && last.is_some() && products > 1 {
                    loaded.push_back(self.load_round((counter, (round + ahead) * step), names, out)?);
                }
            }
        }
        Some(accs)
    }

    /// Waits for the stages of a round; what is in their slots, stage by stage.
    fn wait_for_round(&mut self, out: &mut Vec<Inst>) -> Vec<Vec<ValueId>> {
        let c = self.c.clone();
        let mut stages = Vec::new();
        for _ in 0..c.step / c.stage_k() {
            out.push(plain(Op::Wait(RING)));
            stages.push(self.take(out));
        }
        stages
    }

    /// The partial sum of one of the products of a round.
    fn issue(&mut self, stages: &[Vec<ValueId>], product: usize, out: &mut Vec<Inst>) -> ValueId {
        let mut acc = None;
        let ty = self.program.ty(self.c.dots[product].results[0]).clone();
        for taken in stages {
            let result = self.values.fresh(ty.clone(), self.fragment());
            let [a, b] = self.operands_of(taken, product);
            let op = tile::Op::Dot { a, b, acc, trans_b: !self.c.across };
            out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            acc = Some(result);
        }
        acc.unwrap_or(ValueId(u32::MAX))
    }

    /// What the maps of a round take from memory.
    fn round_loads(&self) -> Vec<ValueId> {
        let loads =
            self.c.body.insts.iter().filter(|i| matches!(i.op, tile::Op::Load { .. } | tile::Op::Gather { .. }));
        let results = loads.filter_map(|i| i.results.first().copied());
        results.filter(|r| self.consumed.contains(r) && !self.after.contains(r)).collect()
    }

    /// Instructions of the loop that those values need, without what is loaded, the products, and what needs them.
    fn computed_for(&self, roots: Vec<ValueId>, loads: &[ValueId]) -> Vec<&'a tile::Inst> {
        let (mut seen, mut pending) = (HashSet::new(), roots);
        while let Some(v) = pending.pop() {
            let stops = loads.contains(&v) || self.c.is_product(v);
            if seen.insert(v)
                && !stops
                && let Some(inst) = self.defs.get(&v)
            {
                pending.extend(tile::operands(&inst.op));
            }
        }
        let wanted = |r: &ValueId| seen.contains(r) && !loads.contains(r) && !self.after.contains(r);
        self.c.body.insts.iter().filter(|i| i.results.first().is_some_and(wanted)).collect()
    }

    /// Loads what the round `offset` after `counter` is scaled by.
    fn load_round(
        &mut self,
        (counter, offset): (ValueId, u32),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let loads = self.round_loads();
        let operands = loads.iter().filter_map(|v| self.defs.get(v)).flat_map(|i| tile::operands(&i.op)).collect();
        let mut names = names.clone();
        let (inst, at) = self.plus(counter, offset);
        out.push(inst);
        names.insert(self.c.body.args[0], at);
        for inst in self.computed_for(operands, &[]) {
            let place = self.place(inst)?;
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        for load in &loads {
            let inst = *self.defs.get(load)?;
            let place = self.place(inst)?;
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        loads.iter().map(|v| names.get(v).copied()).collect()
    }

    /// Names of what partial sums of a round are scaled by, which is computed; `loaded` is of the round.
    fn factors(&mut self, loaded: &[ValueId], names: &Names, out: &mut Vec<Inst>) -> Option<Names> {
        let c = self.c.clone();
        let loads = self.round_loads();
        let mut names = names.clone();
        names.extend(loads.iter().copied().zip(loaded.iter().copied()));
        let scaled =
            |i: &&'a tile::Inst| i.results.first().is_some_and(|r| self.after.contains(r) && !c.is_product(*r));
        let operands = c.body.insts.iter().filter(scaled).flat_map(|i| tile::operands(&i.op)).collect();
        for inst in self.computed_for(operands, &loads) {
            let column = self.tile(inst.results[0])?.shape == [c.shape()[0], 1];
            let place = match self.place(inst)? {
                Place::Lazy if column && !self.config.transposed => self.fragment(),
                place => place,
            };
            out.push(self.values.copied(inst, place, &mut names)?);
        }
        Some(names)
    }

    /// Adds the partial sums of one product of a round to its accumulator; `names` has the round's factors. With the `last` product its
    /// stages are given back, the waits for so many younger rounds after theirs.
    fn promote(
        &mut self,
        (mut accs, partial): (Vec<ValueId>, ValueId),
        (product, last): (usize, Option<u32>),
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Vec<ValueId>> {
        let c = self.c.clone();
        let parts = c.step / c.stage_k();
        for part in 0..last.map_or(0, |_| parts) {
            out.push(plain(Op::Release { channel: RING, lag: (last? + 1) * parts - 1 - part }));
        }
        let mut names = names.clone();
        names.insert(c.dots[product].results[0], partial);
        names.extend(c.body.args[1..].iter().copied().zip(accs.iter().copied()));
        let wanted = self.slice(vec![c.body.yields[product]]);
        let after = |i: &&'a tile::Inst| {
            i.results.first().is_some_and(|r| wanted.contains(r) && self.after.contains(r) && !c.is_product(*r))
        };
        let maps: Vec<&'a tile::Inst> = c.body.insts.iter().filter(after).collect();
        for inst in maps {
            out.push(self.combination(inst, &mut names)?);
        }
        accs[product] = *names.get(&c.body.yields[product])?;
        Some(accs)
    }

    /// An instruction of the loop that comes after the products.
    fn combination(&mut self, inst: &tile::Inst, names: &mut Names) -> Option<Inst> {
        let place = if self.c.body.yields.contains(&inst.results[0]) { self.fragment() } else { Place::Lazy };
        let floats = inst
            .results
            .iter()
            .chain(&tile::operands(&inst.op))
            .all(|&v| self.tile(v).is_some_and(|t| t.dtype == DType::F32));
        let mut new = self.values.copied(inst, place, names)?;
        if let Op::Tile(tile::Op::Map { body, .. }) = &mut new.op
            && floats
        {
            contract(body);
        }
        Some(new)
    }
}

/// Makes one fused operation of each product that is used by one sum only: it is rounded once instead of twice.
fn contract(body: &mut MapFn) {
    let uses = |body: &MapFn, i: usize| {
        let by = body.insts.iter().flat_map(|n| &n.args).chain([&body.result]);
        by.filter(|a| **a == MapArg::Inst(i as u32)).count()
    };
    for at in 0..body.insts.len() {
        let MapInst { op: ScalarOp::Add, args } = body.insts[at].clone() else { continue };
        let &[a, b] = args.as_slice() else { continue };
        for (product, other) in [(b, a), (a, b)] {
            let MapArg::Inst(i) = product else { continue };
            let factors = body.insts[i as usize].clone();
            if factors.op == ScalarOp::Mul && uses(body, i as usize) == 1 {
                body.insts[at] = MapInst { op: ScalarOp::Fma, args: vec![factors.args[0], factors.args[1], other] };
                break;
            }
        }
    }
    drop_unused(body);
}

/// Removes instructions that nothing uses.
fn drop_unused(body: &mut MapFn) {
    while let Some(dead) = (0..body.insts.len() as u32).rev().find(|&i| {
        let used = |a: &MapArg| *a == MapArg::Inst(i);
        !used(&body.result) && !body.insts.iter().flat_map(|n| &n.args).any(used)
    }) {
        body.insts.remove(dead as usize);
        for a in body.insts.iter_mut().flat_map(|n| &mut n.args).chain([&mut body.result]) {
            if let MapArg::Inst(i) = a
                && *i > dead
            {
                *i -= 1;
            }
        }
    }
}
