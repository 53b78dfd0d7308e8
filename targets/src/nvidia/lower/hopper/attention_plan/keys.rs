//! What brings queries and keys.

use super::*;

impl<'a> Planner<'a> {
    /// Warpgroups that bring keys: with many heads there are no registers for a second.
    pub(super) fn bringing(&self) -> u32 {
        if self.transposed && self.parts.iter().any(|p| p.computed) { self.groups } else { 1 }
    }

    /// What numbers of a tile's queries are computed from.
    pub(super) fn query_places(&self) -> Vec<ValueId> {
        self.a.scores.iter().flat_map(|s| s.queries.index.iter().filter_map(|&i| value_of(i))).collect()
    }

    /// Brings a tile's queries. Where one warpgroup scores, it does so itself: no other has the time to wait for it. Where two do, both
    /// are done with them before they are done with their keys, so that who brings these brings them ahead.
    pub(super) fn queries(&mut self, names: &Names, out: &mut Vec<Inst>) -> Option<()> {
        out.push(plain(Op::Acquire(QUERIES)));
        for (slot, part) in self.parts.clone().into_iter().enumerate() {
            let q = &self.a.scores[part.score].queries;
            let mut index = q.index.iter().map(|&i| rename_index(i, names)).collect::<Option<Vec<_>>>()?;
            let Index::Const(first) = index.last_mut()? else { return None };
            *first += i64::from(part.columns[0]);
            let mut shape = q.shape.to_vec();
            *shape.last_mut()? = part.columns[1];
            let view = *names.get(&q.view)?;
            out.push(plain(Op::Copy {
                channel: QUERIES,
                slot: slot as u32,
                view,
                rows: None,
                index,
                shape,
                shared: false,
            }));
        }
        out.push(plain(Op::Commit(QUERIES)));
        Some(())
    }

    /// A warpgroup brings these parts of the keys, round by round.
    pub(super) fn keys(&mut self, parts: &[usize], queries: bool, names: &mut Names) -> Option<Vec<Inst>> {
        let mut gathers = Vec::new();
        for &i in parts {
            self.gathers(self.a.scores[self.parts[i].score].keys, &mut gathers);
        }
        let needed = self.slice(gathers.iter().flat_map(|g| tile::operands(&g.op)).collect());
        let mut roots: Vec<ValueId> = self.bounds().into_iter().chain(needed.iter().copied()).collect();
        if queries {
            roots.extend(self.query_places());
        }
        let mut out;
        // Computing keys begins with loads whose way is long, and so is that of queries: they do not wait for the search of the last round.
        if queries && self.parts.iter().any(|p| p.computed) {
            out = self.before(self.query_places(), names)?;
            self.queries(names, &mut out)?;
            out.extend(self.before(roots, names)?);
        } else {
            out = self.before(roots, names)?;
            if queries {
                self.queries(names, &mut out)?;
            }
        }
        let body: &'a Region = self.a.body;
        let step = self.step();
        // Rounds of these parts, one behind the other: what numbers of rows of all of them are computed from comes first.
        let rounds = |p: &mut Self, rounds: &[Vec<usize>], names: &mut Names| {
            let (mut insts, mut named) = (Vec::new(), Vec::new());
            let first = *names.get(&body.args[0])?;
            for n in 0..rounds.len() as u32 {
                let at = p.moved(first, n * step, &mut insts);
                names.insert(body.args[0], at);
                for inst in &body.insts {
                    if inst.results.first().is_some_and(|r| needed.contains(r)) {
                        let place = if p.tile(inst.results[0])?.elements() == 1 { Place::Uniform } else { Place::Lazy };
                        insts.push(p.copied(inst, place, names)?);
                    }
                }
                named.push(names.clone());
            }
            for (parts, names) in rounds.iter().zip(&named) {
                parts.iter().try_for_each(|&i| p.bring(i, names, &mut insts))?;
            }
            Some((insts, Vec::new()))
        };
        let (lo, hi, step) = self.range(names, &mut out)?;
        if !self.turns_order() {
            out.push(self.rounds((lo, hi, step), &[], names, |p, names| rounds(p, &[parts.to_vec()], names))?);
            self.looks_on(&mut out);
            return Some(out);
        }
        let bounds = [self.scalar_of(lo, &mut out)?, self.scalar_of(hi, &mut out)?];
        let behind = Index::Value(self.scalar(turns::behind_pairs(bounds, step), &mut out));
        let orders = [0, 1].map(|number| self.order_of(number));
        out.push(self.rounds((lo, behind, 2 * step), &[], names, |p, names| rounds(p, &orders, names))?);
        out.push(self.rounds((behind, hi, 2 * step), &[], names, |p, names| rounds(p, &orders[..1], names))?);
        self.looks_on(&mut out);
        Some(out)
    }

    /// The gathers that a value is computed from.
    pub(super) fn gathers(&self, v: ValueId, found: &mut Vec<&'a tile::Inst>) {
        let Some(&inst) = self.defs.get(&v) else { return };
        if let tile::Op::Gather { .. } = inst.op {
            found.push(inst);
        } else {
            tile::operands(&inst.op).into_iter().for_each(|v| self.gathers(v, found));
        }
    }

    /// Fills a stage of one part of the keys.
    pub(super) fn bring(&mut self, number: usize, names: &Names, out: &mut Vec<Inst>) -> Option<()> {
        let (part, channel) = (self.parts[number].clone(), self.key_channel(number));
        let keys = self.a.scores[part.score].keys;
        let fill = match copied_from(self.program, &self.defs, keys) {
            Some(inst) => {
                let tile::Op::Gather { view, rows, .. } = &inst.op else { return None };
                let rows = Some(*names.get(rows)?);
                let [first, columns] = part.columns;
                let (index, shape) = (vec![Index::Const(first.into())], vec![self.a.shape[1], columns]);
                Op::Copy { channel, slot: 0, view: *names.get(view)?, rows, index, shape, shared: false }
            }
            None => {
                let value = self.share(keys, part.of, &mut names.clone(), out)?;
                Op::Fill { channel, slot: 0, value, shared: self.cluster.is_some() }
            }
        };
        out.extend([Op::Acquire(channel), fill, Op::Commit(channel)].map(plain));
        Some(())
    }

    /// An equal share of the columns of a computed tile: of axis 1 of all that it is computed from.
    pub(super) fn share(
        &mut self,
        v: ValueId,
        of: [u32; 2],
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<ValueId> {
        if let Some(&known) = names.get(&v) {
            return Some(known);
        }
        let inst = *self.defs.get(&v)?;
        let mut ty = self.tile(v)?.clone();
        let [n, count] = of;
        let axis = ty.shape.get_mut(1)?;
        let own = if *axis == 1 { 1 } else { axis.is_multiple_of(count).then_some(*axis / count)? };
        *axis = own;
        let shape = ty.shape.clone();
        let op = match &inst.op {
            tile::Op::Gather { view, rows, index, .. } => {
                let mut index = index.clone();
                let Index::Const(first) = index.first_mut()? else { return None };
                *first += i64::from(n * own);
                tile::Op::Gather { view: *names.get(view)?, rows: *names.get(rows)?, index, shape }
            }
            tile::Op::Map { inputs, body } => {
                let mut own = Vec::new();
                for &v in inputs {
                    own.push(self.share(v, of, names, out)?);
                }
                tile::Op::Map { inputs: own, body: body.clone() }
            }
            tile::Op::Reshape { x, .. } => {
                // Axis 1 has to mean the same before and after: what follows it is split or joined.
                (self.tile(*x)?.shape.first() == shape.first()).then_some(())?;
                tile::Op::Reshape { x: self.share(*x, of, names, out)?, shape }
            }
            _ => return None,
        };
        let result = self.values.fresh(Type::Tile(ty), Place::Lazy);
        names.insert(v, result);
        out.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
        Some(result)
    }
}
