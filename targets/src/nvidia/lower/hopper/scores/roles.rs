//! What the roles run.

use super::super::config::ROWS;
use super::super::values::{Names, plain, rename_index};
use super::{Planner, RESIDENT, STREAM, any, effect, for_each};
use dsc_ir::sched::{Block, Inst, Op, Place};
use dsc_ir::tile::{self, Region, TileType, Type, ValueId};

impl<'a> Planner<'a> {
    /// What a role does where a ring brings something; whether that is so.
    fn ring(&mut self, inst: &tile::Inst, producing: bool, names: &mut Names, out: &mut Vec<Inst>) -> Option<bool> {
        let tile::Op::Dot { b, .. } = self.p.dots[0].op else { return None };
        let slot = self.kept().position(|r| r.results == inst.results);
        if let Some(slot) = slot {
            let [first, last] = self.first_and_last(&inst.results);
            let place = (RESIDENT, slot as u32);
            if producing {
                out.extend(first.then(|| plain(Op::Acquire(RESIDENT))));
                out.push(self.copy(inst, place, names)?);
                out.extend(last.then(|| plain(Op::Commit(RESIDENT))));
                return Some(true);
            }
            out.extend(first.then(|| plain(Op::Wait(RESIDENT))));
            let taken = match self.p.dots.get(slot).map(|d| &d.op) {
                Some(tile::Op::Dot { a, .. }) => *a,
                _ => inst.results[0],
            };
            let v = self.take(self.program.ty(taken).clone(), place, out);
            names.insert(taken, v);
            return Some(true);
        }
        let Some(number) = self.p.streamed.iter().position(|s| s.results == inst.results) else { return Some(false) };
        // All of a stage comes where the program loads the last of it.
        let last = self.last_streamed()?;
        if number != last {
            return Some(true);
        }
        let loads = self.p.streamed.clone();
        if producing {
            out.push(plain(Op::Acquire(STREAM)));
            for (slot, load) in loads.into_iter().enumerate() {
                out.push(self.copy(load, (STREAM, slot as u32), names)?);
            }
            out.push(plain(Op::Commit(STREAM)));
            return Some(true);
        }
        out.push(plain(Op::Wait(STREAM)));
        let v = self.take(self.program.ty(b).clone(), (STREAM, 0), out);
        names.insert(b, v);
        for (slot, load) in loads.into_iter().enumerate().skip(1) {
            let r = load.results[0];
            let v = self.take(self.program.ty(r).clone(), (STREAM, slot as u32), out);
            let v = self.spread(v, out)?;
            names.insert(r, v);
        }
        Some(true)
    }

    /// What is loaded once for all rounds of a tile, by slot.
    fn kept(&self) -> impl Iterator<Item = &&'a tile::Inst> {
        self.p.residents.iter().chain(&self.p.columns)
    }

    /// Whether the program has that load as the first of those, and as the last.
    fn first_and_last(&self, results: &[ValueId]) -> [bool; 2] {
        let mut order = Vec::new();
        for_each(&self.program.body, &mut |inst| {
            order.extend(self.kept().any(|k| k.results == inst.results).then_some(&inst.results));
        });
        [order.first(), order.last()].map(|end| end.is_some_and(|r| r.as_slice() == results))
    }

    /// Which of the streamed loads the program has last.
    fn last_streamed(&self) -> Option<usize> {
        let mut last = None;
        for_each(&self.program.body, &mut |inst| {
            last = self.p.streamed.iter().position(|s| s.results == inst.results).or(last);
        });
        last
    }

    /// A region as a role runs it.
    pub(super) fn role(&mut self, region: &'a Region, producing: bool, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = Vec::new();
        let operands: Vec<ValueId> = self.p.dots.iter().flat_map(|d| tile::operands(&d.op)).collect();
        let mut resident = false;
        let (mut late, mut dots, mut stores) = (Vec::new(), 0, 0);
        for inst in &region.insts {
            let wanted = |v: &ValueId| if producing { self.produced.contains(v) } else { self.consumed.contains(v) };
            let wanted = inst.results.first().is_some_and(wanted);
            if self.ring(inst, producing, names, &mut out)? {
                resident |= self.p.residents.iter().any(|r| r.results == inst.results);
                continue;
            }
            match &inst.op {
                tile::Op::For { lo, hi, step, init, body } => {
                    let needed = |i: &tile::Inst| self.brought(i) || (!producing && effect(i));
                    if !any(body, &needed) {
                        continue;
                    }
                    let carried: &[ValueId] = if producing { &[] } else { init };
                    let carried: Vec<ValueId> = carried.iter().map(|v| names.get(v).copied()).collect::<Option<_>>()?;
                    let states = init.iter().all(|v| matches!(self.program.ty(*v), Type::Topk { .. }));
                    states.then_some(())?;
                    let (lo, hi) = (rename_index(*lo, names)?, rename_index(*hi, names)?);
                    let counter = self.values.fresh(self.program.ty(body.args[0]).clone(), Place::Uniform);
                    names.insert(body.args[0], counter);
                    let mut args = vec![counter];
                    let mut results = Vec::new();
                    for i in 0..carried.len() {
                        let place = self.sums();
                        args.push(self.values.fresh(self.program.ty(body.args[1 + i]).clone(), place.clone()));
                        names.insert(body.args[1 + i], args[1 + i]);
                        results.push(self.values.fresh(self.program.ty(body.args[1 + i]).clone(), place));
                    }
                    let mut insts = self.role(body, producing, names)?;
                    let yields = if carried.is_empty() { &[][..] } else { &body.yields };
                    let mut yields: Vec<ValueId> =
                        yields.iter().map(|v| names.get(v).copied()).collect::<Option<_>>()?;
                    names.extend(inst.results.iter().copied().zip(results.iter().copied()));
                    let mut init = carried;
                    let last =
                        self.push_late((&mut init, &mut args), &mut insts, (&mut yields, &mut results), &mut out);
                    let op = Op::For { lo, hi, step: *step, init, body: Block { args, insts, yields } };
                    out.push(Inst { results, op, scratch: None });
                    if let Some(last) = last {
                        names.insert(inst.results[0], last.results[0]);
                        out.push(last);
                    }
                }
                tile::Op::TopkInit { .. } if !producing => {
                    let place = self.place(inst, producing)?;
                    let state = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], state);
                    let scratch = Some(self.lists());
                    out.push(Inst { results: vec![state], op: Op::Tile(inst.op.clone()), scratch });
                }
                tile::Op::TopkPush { state, values, base } if !producing => {
                    let values = *names.get(values)?;
                    let values = self.spread(values, &mut out)?;
                    let op = tile::Op::TopkPush { state: *names.get(state)?, values, base: *names.get(base)? };
                    let place = self.place(inst, producing)?;
                    let new = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], new);
                    out.push(Inst { results: vec![new], op: Op::Tile(op), scratch: None });
                }
                tile::Op::TopkTake { state } if !producing => {
                    // What is stored is made of the numbers as they come.
                    let op = tile::Op::TopkTake { state: *names.get(state)? };
                    let place = self.sums();
                    let mut results = Vec::new();
                    for &r in &inst.results {
                        results.push(self.values.fresh(self.program.ty(r).clone(), place.clone()));
                        names.insert(r, results[results.len() - 1]);
                    }
                    late.push(Inst { results, op: Op::Tile(op), scratch: None });
                }
                tile::Op::Store { view, index, value } if !producing => {
                    // The second product reads the stage while sums of the first are made.
                    stores += usize::from(dots == 2);
                    let mut value = *names.get(value)?;
                    if late.is_empty() {
                        value = self.spread(value, &mut out)?;
                    }
                    out.append(&mut late);
                    let index = index.iter().map(|&i| rename_index(i, names)).collect::<Option<_>>()?;
                    let op = tile::Op::Store { view: *names.get(view)?, index, value };
                    out.push(plain(Op::Tile(op)));
                    if stores == 1 {
                        out.push(plain(Op::Release { channel: STREAM, lag: 0 }));
                    }
                }
                // Other names of what a ring brings.
                tile::Op::Reshape { .. } if inst.results.iter().any(|r| operands.contains(r)) => {}
                tile::Op::Dot { a, b, .. } if !producing => {
                    let op = tile::Op::Dot { a: *names.get(a)?, b: *names.get(b)?, acc: None, trans_b: true };
                    let place = self.products();
                    let v = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], v);
                    out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
                    dots += 1;
                    if self.p.dots.len() == 1 {
                        out.push(plain(Op::Release { channel: STREAM, lag: 0 }));
                    }
                }
                tile::Op::Reduce { x, axis, kind } if wanted => {
                    let place = self.place(inst, producing)?;
                    let op = tile::Op::Reduce { x: *names.get(x)?, axis: *axis, kind: *kind };
                    let v = self.values.fresh(self.program.ty(inst.results[0]).clone(), place);
                    names.insert(inst.results[0], v);
                    out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
                }
                _ if wanted => {
                    let place = self.place(inst, producing)?;
                    let shared = matches!(place, Place::Shared(_));
                    if shared {
                        // Some thread may still read those of the tile before.
                        out.push(plain(Op::Barrier));
                    }
                    out.push(self.values.copied(inst, place, names)?);
                    if shared {
                        out.push(plain(Op::Barrier));
                    }
                }
                _ => {}
            }
        }
        if resident && !producing {
            out.push(plain(Op::Release { channel: RESIDENT, lag: 0 }));
        }
        Some(out)
    }

    /// Offers the sums of a round while the product of the next one is made, if the loop selects: it carries them, from a round that
    /// has nothing. What comes behind the loop offers the last ones.
    fn push_late(
        &mut self,
        (init, args): (&mut Vec<ValueId>, &mut Vec<ValueId>),
        insts: &mut Vec<Inst>,
        (yields, results): (&mut Vec<ValueId>, &mut Vec<ValueId>),
        before: &mut Vec<Inst>,
    ) -> Option<Inst> {
        let is_push = |i: &Inst| matches!(i.op, Op::Tile(tile::Op::TopkPush { .. }));
        let release = insts.iter().position(|i| matches!(i.op, Op::Release { channel: STREAM, .. }))?;
        let mut push = insts.remove(insts.iter().position(is_push)?);
        let Op::Tile(tile::Op::TopkPush { state, values, base }) = push.op else { return None };
        // Nothing but the push changes the state.
        let [values_type, base_type] = [values, base].map(|v| self.values.types[v.0 as usize].clone());
        let Type::Tile(TileType { shape, .. }) = &values_type else { return None };
        // As if it were the tile before the first.
        let number = -i32::try_from(ROWS).ok()?;
        let nothing = [(tile::Scalar::F32(f32::NEG_INFINITY), shape.clone()), (tile::Scalar::I32(number), Vec::new())];
        let mut carried = Vec::new();
        for ((value, shape), ty) in nothing.into_iter().zip([values_type, base_type]) {
            let place = if shape.is_empty() { Place::Uniform } else { self.sums() };
            let [first, arg, result] = [0; 3].map(|_| self.values.fresh(ty.clone(), place.clone()));
            before.push(Inst { results: vec![first], op: Op::Tile(tile::Op::Full { value, shape }), scratch: None });
            init.push(first);
            args.push(arg);
            results.push(result);
            carried.push((arg, result));
        }
        yields.extend([values, base]);
        let (offered, number) = (carried[0], carried[1]);
        push.op = Op::Tile(tile::Op::TopkPush { state, values: offered.0, base: number.0 });
        let ty = self.values.types[state.0 as usize].clone();
        let place = self.sums();
        let end = self.values.fresh(ty, place);
        insts.insert(release, push);
        let op = tile::Op::TopkPush { state: results[0], values: offered.1, base: number.1 };
        Some(Inst { results: vec![end], op: Op::Tile(op), scratch: None })
    }
}
