//! Two warpgroups that score in turn, and have half of the values' columns each.
//!
//! Warpgroup `a` scores rounds 0, 2, 4.., `b` rounds 1, 3, 5..: one's softmax runs beside the other's products. Who scores a round multiplies
//! its weights from registers, and hands them on for the other columns; carried rows (the running maximum, the sum) go to and fro.
//!
//! ```text
//! a: scores(2i)   softmax  += w(2i) v   .. wait for b's weights ..   += w(2i+1) v
//! b:        scores(2i+1)  .. wait for a's weights ..   += w(2i) v   softmax   += w(2i+1) v
//! ```
//!
//! Every ring of keys goes through both in order, so a warpgroup also gives back what of a round it has no use for. Rounds come in pairs; `a` has
//! the last of an odd number. Where keys are copied `a` scores its next round right behind its products of `b`'s values, so that the multipliers
//! have both at hand, and gives back what these read while it scores. Weights are added to each half in the order of rounds, as the program has
//! it, so no result depends on who was first.

use super::scores::{Scored, hand_on};
use super::*;
use dsc_ir::tile::{MapArg, MapFn, MapInst, ScalarOp};

/// A warpgroup at work.
struct Turn<'s> {
    split: &'s Split,
    /// 0 is `a`, 1 is `b`: whose rounds, and which columns of the values.
    number: u32,
    /// The queries by part.
    queries: Vec<ValueId>,
    /// What a round knows from its number alone.
    ahead: Vec<ValueId>,
}

/// Values of a round that the other warpgroup scores.
struct Others {
    channel: ChannelId,
    values: ValueId,
}

impl<'a> Planner<'a> {
    fn weights_of(&self, number: u32) -> ChannelId {
        ChannelId(1 + self.parts.len() as u32 + number)
    }

    /// The channel by which a warpgroup hands on carried rows that weights do not depend on: they need not be there as early.
    fn late_rows_of(&self, number: u32) -> ChannelId {
        self.weights_of(2 + number)
    }

    fn totals_of_turns(&self, split: &Split) -> ChannelId {
        self.weights_of(if self.rows_late(split).is_empty() { 2 } else { 4 })
    }

    /// Carried rows that weights depend on.
    pub(super) fn rows_early(&self, split: &Split) -> Vec<usize> {
        let mut rows = self.carried_rows();
        rows.retain(|&i| split.weighing.contains(&self.a.body.yields[i]));
        rows
    }

    /// The others.
    pub(super) fn rows_late(&self, split: &Split) -> Vec<usize> {
        let mut rows = self.carried_rows();
        rows.retain(|&i| !split.weighing.contains(&self.a.body.yields[i]));
        rows
    }

    /// Numbers of what the loop carries besides the accumulator.
    pub(super) fn carried_rows(&self) -> Vec<usize> {
        (0..self.a.body.yields.len()).filter(|&i| i != self.a.acc).collect()
    }

    /// Whether two warpgroups score in turn: where heads are many and the accumulator needs two.
    pub(super) fn takes_turns(&self) -> bool {
        !self.transposed && self.groups == 2
    }

    /// Whether they can: each round makes the carried rows anew, and each half of the values is a part of the keys.
    fn can_take_turns(&self) -> bool {
        let column =
            |v: ValueId| self.tile(v).is_some_and(|t| t.dtype == DType::F32 && t.shape == [self.a.shape[0], 1]);
        let made = |v: ValueId| self.a.body.insts.iter().any(|inst| inst.results.first() == Some(&v));
        let rows = |&i: &usize| column(self.a.body.args[1 + i]) && made(self.a.body.yields[i]);
        let halves = |group: u32| self.parts.iter().filter(|p| p.group == Some(group)).count() == 1;
        halves(0) && halves(1) && self.carried_rows().iter().all(rows)
    }

    /// Whether parts of a round's keys come in the order in which they are given back, another in every second round: where they are copied.
    pub(super) fn turns_order(&self) -> bool {
        self.takes_turns() && !self.parts.iter().any(|p| p.computed)
    }

    /// Whether weights lie in one buffer both ways, which leaves room for keys: each warpgroup has given the other's back before it makes its own, and
    /// each warp overwrites the rows that its own part of the products has read.
    pub(super) fn shares_weights(&self) -> bool {
        self.turns_order()
    }

    /// The order of parts in rounds that `a` or `b` scores: who scores gives its own values back first.
    pub(super) fn order_of(&self, number: u32) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.parts.len()).collect();
        if self.turns_order() && number == 1 {
            let of = |g: u32| self.parts.iter().position(|p| p.group == Some(g));
            if let (Some(a), Some(b)) = (of(0), of(1)) {
                order.swap(a, b);
            }
        }
        order
    }

    /// One of the two warpgroups.
    pub(super) fn turn(&mut self, split: &Split, number: u32, names: &mut Names) -> Option<Vec<Inst>> {
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        self.can_take_turns().then_some(())?;
        let rows = self.carried_rows();
        let totals = self.after(&split.totals, false);
        let mut roots = self.roots_of_values();
        roots.extend(self.bounds());
        roots.extend(split.weighing.iter().chain(&split.carrying));
        if number == 0 {
            roots.extend(rows.iter().map(|&i| init[i]));
            roots.extend(&totals);
        }
        let mut out = self.before(roots, names)?;
        self.no_sum(names, &mut out)?;
        let queries = self.take_queries(&mut out);
        let turn = Turn { split, number, queries, ahead: self.rows_ahead(split) };
        self.pairs(&turn, names, &mut out)?;
        if let Some(joined) = self.joins(number == 0, Some(number), names, &mut out)? {
            self.finish_piece(&joined, names, &mut out)?;
            return Some(out);
        }
        if number == 0 {
            self.finish_rows(&totals, names, None, &mut out)?;
            self.hand_totals(split, self.totals_of_turns(split), names, &mut out)?;
        } else {
            self.take_totals(split, self.totals_of_turns(split), names, &mut out);
        }
        self.finish_values(split, number, names, &mut out)?;
        if number == 1 && !split.totals.is_empty() {
            out.push(plain(Op::Release { channel: self.totals_of_turns(split), lag: 0 }));
        }
        Some(out)
    }

    /// The loop over pairs of rounds, and the round that may be left.
    fn pairs(&mut self, turn: &Turn<'_>, names: &mut Names, out: &mut Vec<Inst>) -> Option<()> {
        let (lo, hi, step) = self.range(names, out)?;
        let (from, to) = (self.scalar_of(lo, out)?, self.scalar_of(hi, out)?);
        let mut numbers = vec![self.a.acc];
        if turn.number == 0 {
            numbers.extend(self.carried_rows());
        }
        let mut carried = self.carried(&numbers, names)?;
        let own = self.moved(from, turn.number * step, out);
        let known = self.known_in(turn.split, own, names, out)?;
        for &v in &turn.ahead {
            carried.push(Carried { inside: v, first: *known.get(&v)?, behind: v });
        }
        let behind = self.scalar(behind_pairs([from, to], step), out);
        let mut rest = lo;
        if self.scores_ahead(turn) {
            let sum = self.score_sum()?;
            let first = self.first_scores(turn, (lo, hi), names, out)?;
            carried.push(Carried { inside: sum, first, behind: sum });
            rest = Index::Value(self.scalar(last_of_own([from, to], step), out));
            let body = |p: &mut Self, names: &mut Names| p.pair_of_rounds(turn, &numbers, true, names);
            let ahead = self.rounds((lo, rest, 2 * step), &carried, names, body)?;
            out.push(ahead);
            self.go_on(&mut carried, names)?;
        }
        let body = |p: &mut Self, names: &mut Names| p.pair_of_rounds(turn, &numbers, false, names);
        let pairs = self.rounds((rest, Index::Value(behind), 2 * step), &carried, names, body)?;
        out.push(pairs);
        // A tile may have no round, and then no product brings the warps together.
        let scored = [Op::Barrier, Op::Release { channel: QUERIES, lag: 0 }].map(plain);
        carried.truncate(numbers.len());
        self.go_on(&mut carried, names)?;
        let body = |p: &mut Self, names: &mut Names| p.last_round(turn, &numbers, names);
        let last = self.rounds((Index::Value(behind), hi, 2 * step), &carried, names, body)?;
        // Queries of the next tile can come as soon as there is nothing more to score.
        let at = if turn.number == 0 { out.len() } else { out.len() + scored.len() };
        out.extend(scored);
        out.insert(at, last);
        Some(())
    }

    /// A next loop begins with what the one before ended with.
    fn go_on(&self, carried: &mut [Carried], names: &Names) -> Option<()> {
        carried.iter_mut().try_for_each(|c| {
            c.first = *names.get(&c.behind)?;
            Some(())
        })
    }

    /// Two rounds, one of them scored here. The other's values are added behind those of the own round, or, where the own round is the
    /// second, while its softmax runs. Where scores are made ahead, those of the next own round follow, if there is one.
    fn pair_of_rounds(
        &mut self,
        turn: &Turn<'_>,
        carried: &[usize],
        next_follows: bool,
        names: &mut Names,
    ) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let step = self.step();
        let mut insts = Vec::new();
        let first = *names.get(&self.a.body.args[0])?;
        let own = self.moved(first, turn.number * step, &mut insts);
        names.insert(self.a.body.args[0], own);
        let next = self.moved(own, 2 * step, &mut insts);
        let mut rows = Vec::new();
        let mut scores = None;
        let known = if turn.number == 0 {
            let ahead = self.scores_ahead(turn);
            let known_next = (!ahead).then_some(next);
            let (known, others) = self.own_round(turn, known_next, (None, true), names, &mut insts)?;
            // One more stage of these values is waited for if scores follow.
            let lag = u32::from(next_follows);
            let read = self.add_others(turn, &others?, lag, true, names, &mut insts)?;
            let late = self.take_late(turn, true, names, &mut insts);
            let given_back = read.into_iter().chain(late).collect();
            for &i in &carried[1..] {
                rows.push(*names.get(&self.a.body.args[1 + i])?);
            }
            if next_follows {
                let (known, sum) = self.next_scores(turn, next, given_back, names, &mut insts)?;
                scores = Some(sum);
                known
            } else {
                insts.extend(given_back);
                if ahead {
                    // Nobody reads what is carried on as of a next round: no register is to hold scores of this one until then.
                    scores = Some(self.zeros(self.score_sum()?, &mut insts)?);
                    names.clone()
                } else {
                    known
                }
            }
        } else {
            let others = self.others_values(turn, &mut insts)?;
            self.own_round(turn, Some(next), (Some(others), false), names, &mut insts)?.0
        };
        let mut yields = vec![*names.get(&self.a.carried_acc())?];
        yields.extend(rows);
        for v in &turn.ahead {
            yields.push(*known.get(v)?);
        }
        yields.extend(scores);
        Some((insts, yields))
    }

    /// Whether a warpgroup scores its next round while the other's values of this one are multiplied, and gives those back then: where keys are
    /// copied, so that they are there, and the accumulator and scores of a round leave registers.
    fn scores_ahead(&self, turn: &Turn<'_>) -> bool {
        turn.number == 0 && self.turns_order()
    }

    /// The program's scores.
    fn score_sum(&self) -> Option<ValueId> {
        Some(self.a.scores.last()?.dot.results[0])
    }

    /// Scores of the first round, if there is one.
    fn first_scores(
        &mut self,
        turn: &Turn<'_>,
        (lo, hi): (Index, Index),
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<ValueId> {
        /// More than there are rounds.
        const ONCE: u32 = 1 << 30;
        let sum = self.score_sum()?;
        let none = self.zeros(sum, out)?;
        let carried = [Carried { inside: sum, first: none, behind: sum }];
        let order = self.order_of(turn.number);
        let first = self.rounds((lo, hi, ONCE), &carried, names, |p, _| {
            let (mut scored, mut insts) = (Scored::default(), Vec::new());
            p.scored(&order, &turn.queries, &mut scored, &mut insts);
            Some((insts, vec![scored.sum?]))
        })?;
        out.push(first);
        names.get(&sum).copied()
    }

    /// Scores of the next own round, behind the products that read what is then given back, and what that round knows from its number alone.
    fn next_scores(
        &mut self,
        turn: &Turn<'_>,
        next: ValueId,
        given_back: Vec<Inst>,
        names: &Names,
        insts: &mut Vec<Inst>,
    ) -> Option<(Names, ValueId)> {
        let order = self.order_of(turn.number);
        let mut scored = Scored::default();
        self.scored(&order[..1], &turn.queries, &mut scored, insts);
        insts.extend(given_back);
        self.scored(&order[1..], &turn.queries, &mut scored, insts);
        let known = self.known_in(turn.split, next, names, insts)?;
        Some((known, scored.sum?))
    }

    /// Zeros like a value of the program, of f32.
    fn zeros(&mut self, like: ValueId, insts: &mut Vec<Inst>) -> Option<ValueId> {
        let Type::Tile(t) = self.program.ty(like).clone() else { return None };
        let full = tile::Op::Full { value: tile::Scalar::F32(0.0), shape: t.shape.clone() };
        let v = self.values.fresh(Type::Tile(t), Place::Lazy);
        insts.push(Inst { results: vec![v], op: Op::Tile(full), scratch: None });
        Some(v)
    }

    /// The round behind the last pair: `a` scores it, and nothing comes from `b` any more.
    fn last_round(
        &mut self,
        turn: &Turn<'_>,
        carried: &[usize],
        names: &mut Names,
    ) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let mut insts = Vec::new();
        if turn.number == 0 {
            self.own_round(turn, None, (None, false), names, &mut insts)?;
        } else {
            let others = self.others_values(turn, &mut insts)?;
            let read = self.add_others(turn, &others, 0, false, names, &mut insts)?;
            let late = self.take_late(turn, false, names, &mut insts);
            insts.extend(read.into_iter().chain(late));
        }
        let rows = carried[1..].iter().map(|&i| names.get(&self.a.body.yields[i]).copied());
        let yields = [names.get(&self.a.carried_acc()).copied()].into_iter().chain(rows).collect::<Option<_>>()?;
        Some((insts, yields))
    }

    /// A row from a stage in registers of its own: it is used when the stage is given back.
    fn kept_row(&mut self, channel: ChannelId, slot: u32, insts: &mut Vec<Inst>) -> ValueId {
        let taken = self.take(channel, slot, DType::F32, &[self.a.shape[0], 1], insts);
        let kept = self.values.fresh(self.values.types[taken.0 as usize].clone(), self.fragment());
        let body = MapFn { insts: Vec::new(), result: MapArg::Input(0) };
        let op = Op::Tile(tile::Op::Map { inputs: vec![taken], body });
        insts.push(Inst { results: vec![kept], op, scratch: None });
        kept
    }

    /// Scores a round and adds its values; `next` is the round whose rows are loaded meanwhile. The other's values of the round before, if
    /// there are any to be added, are multiplied while the softmax runs; those of the round behind, if it comes `behind`, are waited for while the
    /// own are multiplied.
    fn own_round(
        &mut self,
        turn: &Turn<'_>,
        next: Option<ValueId>,
        (before, behind): (Option<Others>, bool),
        names: &mut Names,
        insts: &mut Vec<Inst>,
    ) -> Option<(Names, Option<Others>)> {
        let own = self.parts.iter().position(|p| p.group == Some(turn.number))?;
        let keys = if self.scores_ahead(turn) {
            // Scores are made, and the stage is the last that was waited for.
            let [_, keys, _] = self.a.shape;
            self.take(self.key_channel(own), 0, self.a.dtype, &[keys, self.parts[own].columns[1]], insts)
        } else {
            let mut scored = Scored::default();
            self.scored(&self.order_of(turn.number), &turn.queries, &mut scored, insts);
            names.insert(self.score_sum()?, scored.sum?);
            scored.taken.iter().find(|t| t.0 == own)?.1
        };
        let read = match before {
            // One more stage of the values was waited for since.
            Some(others) => self.add_others(turn, &others, 1, true, names, insts)?,
            None => Vec::new(),
        };
        // While the products run: what the next round knows already.
        let known = match next {
            Some(next) => self.known_in(turn.split, next, names, insts)?,
            None => Names::new(),
        };
        let held = self.key_channel(own);
        let channels = (0..self.parts.len()).map(|i| self.key_channel(i)).filter(|&c| c != held);
        insts.extend(channels.map(|channel| plain(Op::Release { channel, lag: 0 })));
        let mut rest: HashSet<ValueId> = turn.split.weighing.iter().copied().filter(|&v| v != self.a.weights).collect();
        self.softmax(turn, &rest, names, insts)?;
        // No product may be under way while the left operand of another is made in registers.
        insts.extend(read);
        self.softmax(turn, &HashSet::from([self.a.weights]), names, insts)?;
        let made = |i: &usize| self.a.body.yields[*i];
        let (early, late): (Vec<_>, Vec<_>) = (
            self.rows_early(turn.split).iter().map(made).collect(),
            self.rows_late(turn.split).iter().map(made).collect(),
        );
        let handed = [self.a.weights].into_iter().chain(turn.split.factors.iter().copied()).chain(early);
        hand_on(self.weights_of(turn.number), handed, names, insts)?;
        self.add_values(turn.number, [*names.get(&self.a.weights)?, keys], names, insts)?;
        // While these products run: what only the rows need.
        rest = turn.split.carrying.difference(&turn.split.weighing).copied().collect();
        let taken = if turn.number == 1 { self.take_late(turn, true, names, insts) } else { None };
        self.softmax(turn, &rest, names, insts)?;
        insts.extend(taken);
        if !late.is_empty() {
            hand_on(self.late_rows_of(turn.number), late, names, insts)?;
        }
        let others = if behind { Some(self.others_values(turn, insts)?) } else { None };
        insts.push(plain(Op::Release { channel: held, lag: u32::from(behind) }));
        Some((known, others))
    }

    /// Those of these values that a round computes from its scores.
    fn softmax(
        &mut self,
        turn: &Turn<'_>,
        wanted: &HashSet<ValueId>,
        names: &mut Names,
        insts: &mut Vec<Inst>,
    ) -> Option<()> {
        let body: &'a Region = self.a.body;
        for inst in &body.insts {
            let Some(&r) = inst.results.first() else { continue };
            if !wanted.contains(&r) || self.a.is_product(r) || turn.ahead.contains(&r) {
                continue;
            }
            if r == self.a.weights {
                let new = self.copied(inst, self.fragment(), names)?;
                insts.push(new);
            } else {
                self.score_inst(inst, None, names, insts)?;
            }
        }
        Some(())
    }

    /// Waits for the carried rows that come late from the other warpgroup, and takes them if they are wanted. Gives what frees their stage.
    fn take_late(&mut self, turn: &Turn<'_>, wanted: bool, names: &mut Names, insts: &mut Vec<Inst>) -> Option<Inst> {
        let (rows, channel) = (self.rows_late(turn.split), self.late_rows_of(1 - turn.number));
        if rows.is_empty() {
            return None;
        }
        insts.push(plain(Op::Wait(channel)));
        for (slot, i) in (0..).zip(rows).filter(|_| wanted) {
            let row = self.kept_row(channel, slot, insts);
            names.insert(self.a.body.args[1 + i], row);
        }
        Some(plain(Op::Release { channel, lag: 0 }))
    }

    /// This warpgroup's values of the round that the other scores. What else there is of that round's keys is given back.
    fn others_values(&mut self, turn: &Turn<'_>, insts: &mut Vec<Inst>) -> Option<Others> {
        let mut own = None;
        for (i, part) in self.parts.clone().iter().enumerate() {
            let channel = self.key_channel(i);
            if part.group == Some(turn.number) {
                own = Some((channel, part.columns[1]));
            } else {
                insts.extend([plain(Op::Wait(channel)), plain(Op::Release { channel, lag: 0 })]);
            }
        }
        let (channel, columns) = own?;
        insts.push(plain(Op::Wait(channel)));
        let values = self.take(channel, 0, self.a.dtype, &[self.a.shape[1], columns], insts);
        Some(Others { channel, values })
    }

    /// Adds them, with the other's weights, and takes the carried rows that come with these. Gives what frees the stages, that of the values so
    /// many waits later.
    fn add_others(
        &mut self,
        turn: &Turn<'_>,
        others: &Others,
        lag: u32,
        rows: bool,
        names: &mut Names,
        insts: &mut Vec<Inst>,
    ) -> Option<Vec<Inst>> {
        let [heads, keys, _] = self.a.shape;
        let weights = self.weights_of(1 - turn.number);
        insts.push(plain(Op::Wait(weights)));
        let p = self.take(weights, 0, self.a.dtype, &[heads, keys], insts);
        let mut known = names.clone();
        for (i, &v) in turn.split.factors.iter().enumerate() {
            let taken = self.take(weights, 1 + i as u32, DType::F32, &[heads, 1], insts);
            known.insert(v, taken);
        }
        let first = 1 + turn.split.factors.len() as u32;
        for (slot, i) in (first..).zip(self.rows_early(turn.split)).filter(|_| rows) {
            let row = self.kept_row(weights, slot, insts);
            names.insert(self.a.body.args[1 + i], row);
        }
        let acc = self.add_values(turn.number, [p, others.values], &mut known, insts)?;
        names.insert(self.a.carried_acc(), acc);
        Some(vec![plain(Op::Release { channel: others.channel, lag }), plain(Op::Release { channel: weights, lag: 0 })])
    }
}

/// The number of the last round that `a` scores of `lo..hi`: `lo + (max(hi − lo, 1) − 1) / (2 step) · 2 step`, `lo` if there is none.
fn last_of_own(bounds: [ValueId; 2], step: u32) -> tile::Op {
    let rounds = vec![
        arithmetic(ScalarOp::Sub, &[MapArg::Input(1), MapArg::Input(0)]),
        constant(1),
        arithmetic(ScalarOp::Max, &[MapArg::Inst(0), MapArg::Inst(1)]),
        arithmetic(ScalarOp::Sub, &[MapArg::Inst(2), MapArg::Inst(1)]),
    ];
    behind_whole_pairs(rounds, bounds, step)
}

/// The number of the round behind the last pair of `lo..hi`: `lo + (hi − lo + step − 1) / (2 step) · 2 step`.
pub(super) fn behind_pairs(bounds: [ValueId; 2], step: u32) -> tile::Op {
    let rounds = vec![
        arithmetic(ScalarOp::Sub, &[MapArg::Input(1), MapArg::Input(0)]),
        constant((step - 1) as i32),
        arithmetic(ScalarOp::Add, &[MapArg::Inst(0), MapArg::Inst(1)]),
    ];
    behind_whole_pairs(rounds, bounds, step)
}

/// `lo + n / (2 step) · 2 step`, where `n` is what these instructions make of `lo` and `hi`.
fn behind_whole_pairs(mut insts: Vec<MapInst>, bounds: [ValueId; 2], step: u32) -> tile::Op {
    let n = insts.len() as u32;
    let [rounds, pair, pairs, behind] = [n - 1, n, n + 1, n + 2].map(MapArg::Inst);
    insts.extend([
        constant((2 * step) as i32),
        arithmetic(ScalarOp::Div, &[rounds, pair]),
        arithmetic(ScalarOp::Mul, &[pairs, pair]),
        arithmetic(ScalarOp::Add, &[MapArg::Input(0), behind]),
    ]);
    mapped(bounds.to_vec(), insts)
}
