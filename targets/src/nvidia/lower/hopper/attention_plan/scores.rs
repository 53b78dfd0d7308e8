//! The role that scores: products of queries and keys, softmax, and whatever needs no accumulator.

use super::*;

/// Scores of a round as far as they are made.
#[derive(Default)]
pub(super) struct Scored {
    /// The sum so far.
    pub(super) sum: Option<ValueId>,
    /// Keys taken, by part.
    pub(super) taken: Vec<(usize, ValueId)>,
}

impl<'a> Planner<'a> {
    /// Where a value of the scores' role lies.
    pub(super) fn score_place(&self, inst: &tile::Inst) -> Option<Place> {
        let t = self.tile(inst.results[0])?;
        let [heads, keys, _] = self.a.shape;
        let uses = |v: ValueId| {
            let mut count = 0;
            for_each(&self.program.body, &mut |i| count += tile::operands(&i.op).iter().filter(|&&o| o == v).count());
            count
        };
        let beside = |v: ValueId| {
            let mut found = false;
            for_each(&self.program.body, &mut |i| {
                let matrix = i.results.first().and_then(|&r| self.tile(r)).is_some_and(|t| t.shape == [heads, keys]);
                found |= matrix && tile::operands(&i.op).contains(&v);
            });
            found
        };
        Some(match &inst.op {
            _ if t.elements() == 1 => Place::Uniform,
            tile::Op::Reduce { .. } if t.shape == [heads, 1] => self.fragment(),
            tile::Op::Map { .. } if t.shape == [heads, 1] => self.fragment(),
            tile::Op::Map { .. } if t.shape == [heads, keys] && uses(inst.results[0]) > 1 => self.fragment(),
            tile::Op::Load { .. } | tile::Op::Map { .. } | tile::Op::Reshape { .. }
                if t.shape == [1, keys] && beside(inst.results[0]) =>
            {
                self.fragment()
            }
            _ => Place::Lazy,
        })
    }

    /// An instruction of the scores' role.
    pub(super) fn score_inst(
        &mut self,
        inst: &tile::Inst,
        scratch: Option<u32>,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        let place = self.score_place(inst)?;
        let mut new = self.copied(inst, place, names)?;
        if let (tile::Op::Reduce { kind, .. }, Some(first)) = (&inst.op, scratch)
            && self.tile(inst.results[0])?.elements() > 1
        {
            // Some thread may still read what was exchanged before.
            out.push(plain(Op::Barrier));
            new.scratch = Some(BufferId(first + u32::from(*kind == tile::ReduceKind::Sum)));
        }
        out.push(new);
        Some(())
    }

    /// Scores, softmax, and whatever needs no accumulator.
    pub(super) fn scores(&mut self, split: &Split, scratch: Option<u32>, names: &mut Names) -> Option<Vec<Inst>> {
        let carried: Vec<usize> = (0..self.a.body.yields.len()).filter(|&i| i != self.a.acc).collect();
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let mut roots = self.bounds();
        roots.extend(carried.iter().map(|&i| init[i]));
        roots.extend(split.weighing.iter().chain(&split.carrying));
        let after = self.after(&split.totals, false);
        roots.extend(&after);
        roots.extend(self.query_places());
        let mut out = self.before(roots, names)?;
        // All products of the tile before have read theirs.
        out.push(plain(Op::Barrier));
        self.queries(names, &mut out)?;
        let queries = self.take_queries(&mut out);
        let rows = self.rows_ahead(split);
        let range = self.range(names, &mut out)?;
        let first = self.scalar_of(range.0, &mut out)?;
        let known = self.known_in(split, first, names, &mut out)?;
        let others: Vec<(ValueId, ValueId)> =
            rows.into_iter().map(|r| Some((r, *known.get(&r)?))).collect::<Option<_>>()?;
        let mut all = self.carried(&carried, names)?;
        // Behind the loop nothing reads what a next round would know.
        all.extend(others.iter().map(|&(v, first)| Carried { inside: v, first, behind: v }));
        let round = self.rounds(range, &all, names, |p, names| {
            p.score_round(split, (&carried, &others), &queries, scratch, names)
        })?;
        out.push(round);
        out.push(plain(Op::Release { channel: QUERIES, lag: 0 }));
        if self.joins(true, None, names, &mut out)?.is_some() {
            self.finish_rows_once(scratch, names, &mut out)?;
            out.push(plain(Op::Meet));
            return Some(out);
        }
        self.finish_rows(&after, names, scratch, &mut out)?;
        self.hand_totals(split, self.total_channel(), names, &mut out)?;
        Some(out)
    }

    /// What stands behind the loop and needs no accumulator.
    pub(super) fn finish_rows(
        &mut self,
        needed: &HashSet<ValueId>,
        names: &mut Names,
        scratch: Option<u32>,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        for inst in self.behind() {
            if matches!(&inst.op, tile::Op::Store { value, .. } if !self.of_acc(*value)) {
                let new = self.copied(inst, Place::Lazy, names)?;
                out.push(new);
            } else if inst.results.first().is_some_and(|r| needed.contains(r)) {
                self.score_inst(inst, scratch, names, out)?;
            }
        }
        Some(())
    }

    /// Gives what is made of rows behind the loop to those who have the accumulator.
    pub(super) fn hand_totals(
        &mut self,
        split: &Split,
        channel: ChannelId,
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        if split.totals.is_empty() {
            return Some(());
        }
        hand_on(channel, split.totals.iter().copied(), names, out)
    }

    /// Waits for a tile's queries; gives them, a value a part.
    pub(super) fn take_queries(&mut self, out: &mut Vec<Inst>) -> Vec<ValueId> {
        out.push(plain(Op::Wait(QUERIES)));
        let shapes: Vec<[u32; 2]> = self.parts.iter().map(|p| [self.a.shape[0], p.columns[1]]).collect();
        let take = |(slot, shape): (u32, &[u32; 2])| self.take(QUERIES, slot, self.a.dtype, shape, out);
        (0..).zip(&shapes).map(take).collect()
    }

    /// Products of a round's queries and keys, of these parts.
    pub(super) fn scored(&mut self, order: &[usize], queries: &[ValueId], scored: &mut Scored, insts: &mut Vec<Inst>) {
        let [heads, keys, _] = self.a.shape;
        // Products of the first columns run while the last are on their way.
        for &i in order {
            let columns = self.parts[i].columns[1];
            insts.push(plain(Op::Wait(self.key_channel(i))));
            let b = self.take(self.key_channel(i), 0, self.a.dtype, &[keys, columns], insts);
            scored.taken.push((i, b));
            let ty = TileType { dtype: DType::F32, shape: vec![heads, keys] };
            let result = self.values.fresh(Type::Tile(ty), self.fragment());
            let op = tile::Op::Dot { a: queries[i], b, acc: scored.sum, trans_b: true };
            insts.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
            scored.sum = Some(result);
        }
    }

    /// What scores are combined with and a round knows from its number alone, such as who is selected: threads have it a round ahead. A fence
    /// between what others wrote and products waits for loads.
    pub(super) fn rows_ahead(&self, split: &Split) -> Vec<ValueId> {
        let results = self.a.body.insts.iter().filter_map(|i| Some((i, *i.results.first()?)));
        let fragment = |i: &tile::Inst| matches!(self.score_place(i), Some(Place::Fragment(_)));
        let ahead = results.filter(|(i, r)| self.known_ahead(split, *r) && fragment(i));
        ahead.map(|(_, r)| r).collect()
    }

    pub(super) fn known_ahead(&self, split: &Split, r: ValueId) -> bool {
        (split.weighing.contains(&r) || split.carrying.contains(&r)) && !self.a.is_product(r) && !self.of_rows(r)
    }

    /// A bound of a loop as a value.
    pub(super) fn scalar_of(&mut self, i: Index, out: &mut Vec<Inst>) -> Option<ValueId> {
        let Index::Const(n) = i else { return value_of(i) };
        let value = tile::Scalar::I32(i32::try_from(n).ok()?);
        Some(self.scalar(tile::Op::Full { value, shape: Vec::new() }, out))
    }

    /// A number that every thread computes.
    pub(super) fn scalar(&mut self, op: tile::Op, out: &mut Vec<Inst>) -> ValueId {
        let v = self.values.fresh(self.program.ty(self.a.body.args[0]).clone(), Place::Uniform);
        out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
        v
    }

    /// A round so much later.
    pub(super) fn moved(&mut self, round: ValueId, by: u32, out: &mut Vec<Inst>) -> ValueId {
        match by {
            0 => round,
            n => self.scalar(plus(round, n as i32), out),
        }
    }

    /// Computes what the round of that number knows from its number alone; gives the names.
    pub(super) fn known_in(
        &mut self,
        split: &Split,
        round: ValueId,
        names: &Names,
        out: &mut Vec<Inst>,
    ) -> Option<Names> {
        let body: &'a Region = self.a.body;
        let mut known = names.clone();
        known.insert(body.args[0], round);
        for inst in &body.insts {
            if inst.results.first().is_some_and(|&r| self.known_ahead(split, r)) {
                self.score_inst(inst, None, &mut known, out)?;
            }
        }
        Some(known)
    }

    /// One round of the scores' role.
    pub(super) fn score_round(
        &mut self,
        split: &Split,
        (carried, others): (&[usize], &[(ValueId, ValueId)]),
        queries: &[ValueId],
        scratch: Option<u32>,
        names: &mut Names,
    ) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let body: &'a Region = self.a.body;
        let mut insts = Vec::new();
        let mut done: HashSet<ValueId> = HashSet::new();
        let mut scored = Scored::default();
        self.scored(&(0..self.parts.len()).collect::<Vec<_>>(), queries, &mut scored, &mut insts);
        names.insert(self.a.scores.last()?.dot.results[0], scored.sum?);
        // While the products run: what the next round knows already.
        let counter = *names.get(&body.args[0])?;
        let next = self.moved(counter, self.step(), &mut insts);
        let known = self.known_in(split, next, names, &mut insts)?;
        insts.extend((0..self.parts.len()).map(|i| plain(Op::Release { channel: self.key_channel(i), lag: 0 })));
        for inst in &body.insts {
            let Some(&r) = inst.results.first() else { continue };
            if split.weighing.contains(&r) && !self.a.is_product(r) && !others.iter().any(|o| o.0 == r) {
                self.score_inst(inst, scratch, names, &mut insts)?;
                done.insert(r);
            }
        }
        let handed = [self.a.weights].into_iter().chain(split.factors.iter().copied());
        hand_on(self.weight_channel(), handed, names, &mut insts)?;
        for inst in &body.insts {
            let Some(&r) = inst.results.first() else { continue };
            let ahead = others.iter().any(|o| o.0 == r);
            if split.carrying.contains(&r) && !self.a.is_product(r) && !done.contains(&r) && !ahead {
                self.score_inst(inst, scratch, names, &mut insts)?;
            }
        }
        let rows = others.iter().map(|o| known.get(&o.0).copied());
        let yields = carried.iter().map(|&i| names.get(&body.yields[i]).copied()).chain(rows);
        Some((insts, yields.collect::<Option<_>>()?))
    }
}

/// Fills a stage of a channel with values, a slot each.
pub(super) fn hand_on(
    channel: ChannelId,
    values: impl IntoIterator<Item = ValueId>,
    names: &Names,
    insts: &mut Vec<Inst>,
) -> Option<()> {
    insts.push(plain(Op::Acquire(channel)));
    for (slot, v) in (0..).zip(values) {
        insts.push(plain(Op::Fill { channel, slot, value: *names.get(&v)?, shared: false }));
    }
    insts.push(plain(Op::Commit(channel)));
    Some(())
}
