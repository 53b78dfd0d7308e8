//! The gate, and products with the experts it chose.

use super::super::LEAST_SUM;
use super::super::weights::{Data, Real, TensorData};
use super::StepValue;
use super::eval::{Eval, Made};
use super::math::{add_scaled, largest, matmul, sum};
use std::sync::Arc;

impl<F: Real> Eval<F> {
    pub(super) fn group_topk(&self, groups: usize, keep: usize, k: usize) -> Made<F> {
        let x = self.t(0)?;
        let columns = x.columns();
        let size = columns / groups.max(1);
        let mut out = Vec::with_capacity(x.shape[0] * k);
        for row in x.values().chunks(columns.max(1)) {
            let score = |group: &[F]| sum(largest(group, 2, |_| true).into_iter().map(|c| group[c]));
            let scores: Vec<F> = row.chunks(size.max(1)).map(score).collect();
            let kept = largest(&scores, keep, |_| true);
            let chosen = largest(row, k, |c| kept.contains(&(c / size)));
            if chosen.len() < k {
                return Err("an expert's score is not a finite number".into());
            }
            out.extend(chosen.into_iter().map(|c| c as i32));
        }
        self.tensor(Data::Int(out))
    }

    pub(super) fn take_along(&self) -> Made<F> {
        let (x, columns) = (self.t(0)?, self.t(1)?);
        let (n, k) = (x.columns(), columns.columns().max(1));
        let at = columns.ints().iter().enumerate().map(|(i, &c)| {
            let c = usize::try_from(c).ok().filter(|&c| c < n).ok_or_else(|| format!("column {c} of {n}"))?;
            Ok(i / k * n + c)
        });
        let at = at.collect::<Result<Vec<usize>, String>>()?;
        match &x.data {
            Data::Int(v) => self.tensor(Data::Int(at.into_iter().map(|i| v[i]).collect())),
            _ => self.rounded(at.into_iter().map(|i| x.values()[i]).collect()),
        }
    }

    pub(super) fn normalize(&self, factor: F, by_sum: bool) -> Made<F> {
        let x = self.t(0)?;
        let mut out = Vec::with_capacity(x.elements());
        for row in x.values().chunks(x.columns().max(1)) {
            let total = if by_sum { sum(row.iter().copied()) + F::from_f32(LEAST_SUM) } else { F::from_f32(1.0) };
            out.extend(row.iter().map(|&v| v / total * factor));
        }
        self.rounded(out)
    }

    /// The expert of each flat row `t·k + j`.
    pub(super) fn experts_of_rows(&self, per_token: usize, experts: usize) -> Result<Vec<usize>, String> {
        let check =
            |e: i32| usize::try_from(e).ok().filter(|&e| e < experts).ok_or_else(|| format!("expert {e} of {experts}"));
        if self.fed.len() == 3 {
            return self.ints(2)?.iter().map(|&e| check(e)).collect();
        }
        let (order, offsets) = (self.ints(2)?, self.ints(3)?);
        let rows = self.t(0)?.shape[0] * per_token;
        let mut expert_of = vec![usize::MAX; rows];
        for e in 0..experts {
            let range = offsets[e].max(0) as usize..offsets[e + 1].max(0) as usize;
            for &row in order.get(range).ok_or("the offsets leave the order")? {
                *expert_of.get_mut(row as usize).ok_or_else(|| format!("row {row} of {rows}"))? = e;
            }
        }
        if expert_of.contains(&usize::MAX) { Err("a row has no expert".into()) } else { Ok(expert_of) }
    }

    pub(super) fn expert_linear(&self, per_token: usize, sorted: [bool; 2]) -> Made<F> {
        let (x, w) = (self.t(0)?, self.t(1)?);
        let (experts, n, k) = (w.shape[0], w.shape[1], w.columns());
        let shared = x.shape.len() == 2;
        let mut out = vec![F::default(); self.out()?.elements];
        let expert_of = self.experts_of_rows(per_token, experts)?;
        // Every row has an expert, so that the order has them all.
        let mut places: Vec<usize> = (0..expert_of.len()).collect();
        if sorted.contains(&true) {
            self.ints(2)?.iter().enumerate().for_each(|(place, &row)| places[row as usize] = place);
        }
        let [from, to] = sorted;
        let place = |row: usize, sorted: bool| if sorted { places[row] } else { row };
        for e in 0..experts {
            let rows: Vec<usize> = (0..expert_of.len()).filter(|&r| expert_of[r] == e).collect();
            let mut xs = Vec::with_capacity(rows.len() * k);
            for r in &rows {
                let source = if shared { r / per_token } else { place(*r, from) };
                xs.extend_from_slice(&x.values()[source * k..][..k]);
            }
            let y = matmul(&xs, &w.values()[e * n * k..][..n * k], k, n);
            for (&r, y) in rows.iter().zip(y.chunks(n.max(1))) {
                out[place(r, to) * n..][..n].copy_from_slice(y);
            }
        }
        self.rounded(out)
    }

    pub(super) fn route(&self, experts: usize) -> Made<F> {
        let ids = self.ints(0)?;
        let mut offsets = vec![0i32];
        let mut order = Vec::with_capacity(ids.len());
        if let Some(id) = ids.iter().find(|&&e| e < 0 || e as usize >= experts) {
            return Err(format!("expert {id} of {experts}"));
        }
        for e in 0..experts as i32 {
            order.extend((0..ids.len() as i32).filter(|&i| ids[i as usize] == e));
            offsets.push(order.len() as i32);
        }
        let tensor = |data: Vec<i32>| StepValue::Tensor(Arc::new(TensorData::int(vec![data.len()], data)));
        let owners = order.iter().map(|&row| ids[row as usize]).collect();
        Ok(vec![tensor(order), tensor(offsets), tensor(owners)])
    }

    pub(super) fn weighted_sum(&self) -> Made<F> {
        let (y, weights) = (self.t(0)?, self.x(1)?);
        let (t, k, d) = (y.shape[0], y.shape[1], y.columns());
        let mut out = vec![F::default(); t * d];
        for (i, row) in y.values().chunks(d.max(1)).enumerate() {
            add_scaled(&mut out[i / k * d..][..d], weights[i], row);
        }
        self.rounded(out)
    }
}
