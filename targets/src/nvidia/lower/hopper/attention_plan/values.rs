//! The roles that have the accumulator, each its columns: what weights are multiplied with.

use super::*;

impl<'a> Planner<'a> {
    /// Instructions behind the loop.
    pub(super) fn behind(&self) -> Vec<&'a tile::Inst> {
        let insts = &self.program.body.insts;
        insts.iter().skip_while(|i| i.results != self.a.key_loop.results).skip(1).collect()
    }

    /// What stores of the accumulator (or of anything else) need of what is computed behind the loop.
    pub(super) fn after(&self, totals: &[ValueId], of_acc: bool) -> HashSet<ValueId> {
        let mut roots = if of_acc { Vec::new() } else { totals.to_vec() };
        for inst in self.behind() {
            if let tile::Op::Store { value, .. } = &inst.op
                && self.of_acc(*value) == of_acc
            {
                roots.extend(tile::operands(&inst.op));
            }
        }
        self.slice(roots)
    }

    /// The same type with this group's columns only, if it is as wide as the accumulator.
    pub(super) fn narrowed(&self, v: ValueId) -> Option<Type> {
        let mut t = self.tile(v)?.clone();
        if t.shape.last() == Some(&self.a.shape[2]) {
            *t.shape.last_mut()? /= self.groups;
        }
        Some(Type::Tile(t))
    }

    /// What of the values in front of the loop those who have the accumulator need.
    pub(super) fn roots_of_values(&self) -> Vec<ValueId> {
        let mut roots = self.bounds();
        let other = |v: &ValueId| !self.of_acc(*v) && !self.of_rows(*v);
        roots.extend(self.after(&[], true).into_iter().filter(other));
        if let tile::Op::Map { inputs, .. } = &self.a.rescale.op {
            roots.extend(inputs.iter().filter(|&&v| v != self.a.carried_acc() && !self.of_rows(v)));
        }
        roots
    }

    /// The empty sum that the program begins with, of this group's columns.
    pub(super) fn no_sum(&mut self, names: &mut Names, out: &mut Vec<Inst>) -> Option<()> {
        let tile::Op::For { init, .. } = &self.a.key_loop.op else { return None };
        let zero = init[self.a.acc];
        let Type::Tile(t) = self.narrowed(zero)? else { return None };
        let full = tile::Op::Full { value: tile::Scalar::F32(0.0), shape: t.shape.clone() };
        let first = self.values.fresh(Type::Tile(t), Place::Lazy);
        names.insert(zero, first);
        out.push(Inst { results: vec![first], op: Op::Tile(full), scratch: None });
        Some(())
    }

    /// One group's columns of the accumulator.
    pub(super) fn values(&mut self, split: &Split, group: u32, names: &mut Names) -> Option<Vec<Inst>> {
        let mut out = self.before(self.roots_of_values(), names)?;
        self.no_sum(names, &mut out)?;
        let (range, carried) = (self.range(names, &mut out)?, self.carried(&[self.a.acc], names)?);
        out.push(self.rounds(range, &carried, names, |p, names| p.value_round(split, group, names))?);
        if let Some(joined) = self.joins(false, Some(group), names, &mut out)? {
            self.finish_piece(&joined, names, &mut out)?;
            return Some(out);
        }
        self.take_totals(split, self.total_channel(), names, &mut out);
        self.finish_values(split, group, names, &mut out)?;
        if !split.totals.is_empty() {
            out.push(plain(Op::Release { channel: self.total_channel(), lag: 0 }));
        }
        Some(out)
    }

    pub(super) fn take_totals(&mut self, split: &Split, channel: ChannelId, names: &mut Names, out: &mut Vec<Inst>) {
        if split.totals.is_empty() {
            return;
        }
        out.push(plain(Op::Wait(channel)));
        for (slot, &v) in split.totals.iter().enumerate() {
            let taken = self.take(channel, slot as u32, DType::F32, &[self.a.shape[0], 1], out);
            names.insert(v, taken);
        }
    }

    /// What stands behind the loop and needs this group's columns of the accumulator.
    pub(super) fn finish_values(
        &mut self,
        split: &Split,
        group: u32,
        names: &mut Names,
        out: &mut Vec<Inst>,
    ) -> Option<()> {
        let after = self.after(&[], true);
        for inst in self.behind() {
            let place = match &inst.op {
                tile::Op::Store { value, .. } if self.of_acc(*value) => Place::Lazy,
                _ if !inst.results.first().is_some_and(|r| after.contains(r) && !split.totals.contains(r)) => continue,
                _ if self.of_rows(inst.results[0]) && !self.of_acc(inst.results[0]) => continue,
                _ if self.tile(inst.results[0])?.elements() == 1 => Place::Uniform,
                _ => Place::Lazy,
            };
            let mut new = self.copied(inst, place, names)?;
            self.narrow(inst, group, &mut new)?;
            out.push(new);
        }
        Some(())
    }

    /// Makes a copied instruction one of this group's columns.
    pub(super) fn narrow(&mut self, inst: &tile::Inst, group: u32, new: &mut Inst) -> Option<()> {
        for (&old, &v) in inst.results.iter().zip(&new.results) {
            if self.of_acc(old) {
                self.values.types[v.0 as usize] = self.narrowed(old)?;
            }
        }
        let columns = self.a.shape[2] / self.groups;
        match &mut new.op {
            Op::Tile(tile::Op::Reshape { shape, .. }) => *shape.last_mut()? = columns,
            Op::Tile(tile::Op::Store { index, .. }) => *index.last_mut()? = Index::Const((group * columns).into()),
            Op::Tile(tile::Op::Map { .. }) => {}
            // Anything else is computed alike in every group.
            _ if !inst.results.iter().any(|&r| self.of_acc(r)) => {}
            _ => return None,
        }
        Some(())
    }

    /// One round of a group.
    pub(super) fn value_round(
        &mut self,
        split: &Split,
        group: u32,
        names: &mut Names,
    ) -> Option<(Vec<Inst>, Vec<ValueId>)> {
        let [heads, keys, columns] = self.a.shape;
        let mut insts = Vec::new();
        let weights = self.weight_channel();
        insts.push(plain(Op::Wait(weights)));
        let p = self.take(weights, 0, self.a.dtype, &[heads, keys], &mut insts);
        for (i, &v) in split.factors.iter().enumerate() {
            let taken = self.take(weights, 1 + i as u32, DType::F32, &[heads, 1], &mut insts);
            names.insert(v, taken);
        }
        let number = self.parts.iter().position(|p| p.group == Some(group))?;
        let channel = self.key_channel(number);
        insts.push(plain(Op::Wait(channel)));
        let v = self.take(channel, 0, self.a.dtype, &[keys, columns / self.groups], &mut insts);
        let result = self.add_values(group, [p, v], names, &mut insts)?;
        insts.push(plain(Op::Release { channel: weights, lag: 0 }));
        insts.push(plain(Op::Release { channel, lag: 0 }));
        Some((insts, vec![result]))
    }

    /// `acc · factors + p · v`: the next accumulator, under the name of the last.
    pub(super) fn add_values(
        &mut self,
        group: u32,
        [p, v]: [ValueId; 2],
        names: &mut Names,
        insts: &mut Vec<Inst>,
    ) -> Option<ValueId> {
        let rescale = self.a.rescale;
        let place = self.fragment();
        let mut scaled = self.copied(rescale, place, names)?;
        self.narrow(rescale, group, &mut scaled)?;
        let acc = scaled.results[0];
        insts.push(scaled);
        let ty = self.values.types[acc.0 as usize].clone();
        let result = self.values.fresh(ty, self.fragment());
        let op = tile::Op::Dot { a: p, b: v, acc: Some(acc), trans_b: false };
        insts.push(Inst { results: vec![result], op: Op::Tile(op), scratch: None });
        names.insert(self.a.carried_acc(), result);
        Some(result)
    }
}
