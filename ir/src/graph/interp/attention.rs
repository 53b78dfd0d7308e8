//! Reading caches, scoring and choosing keys, attention in its forms.

use super::super::weights::{Data, Real, TensorData};
use super::super::{Elem, PAGE_TOKENS};
use super::StepValue;
use super::eval::{Eval, Made};
use super::math::{Base, NO_SCORE, NO_SUM, add_scaled, bounds, dot, largest, log_sum, narrowed, softmax, sum};
use crate::extent::Sym;
use std::collections::HashMap;
use std::sync::Arc;

impl<F: Real> Eval<F> {
    /// The slot of a position of a sequence, by input `table`.
    pub(super) fn slot(&self, table: usize, seq: usize, position: usize) -> Result<Option<usize>, String> {
        let table = self.t(table)?;
        let (page, offset) = (position / PAGE_TOKENS as usize, position % PAGE_TOKENS as usize);
        let pages = table.columns();
        if page >= pages || seq >= table.shape[0] {
            return Ok(None);
        }
        let page = table.ints()[seq * pages + page];
        Ok(usize::try_from(page).ok().map(|page| page * PAGE_TOKENS as usize + offset))
    }

    /// The cached row at a position of a sequence.
    pub(super) fn cached(
        &self,
        cache: usize,
        table: usize,
        seq: usize,
        position: usize,
    ) -> Result<Option<Vec<F>>, String> {
        let slot = self.slot(table, seq, position)?;
        Ok(slot.and_then(|slot| self.cache(cache).ok()?.row(slot)))
    }

    /// Codes of a cache in fp8 are made again: what was quantised to powers of two quantises to itself.
    pub(super) fn cache_read(&self, first: bool) -> Made<F> {
        let (s, c, columns) = (self.out()?.shape[0], self.out()?.shape[1], self.out()?.shape[2]);
        let mut out = Vec::with_capacity(s * c * columns);
        for seq in 0..s {
            for position in 0..c {
                match self.cached(0, 1, seq, position)? {
                    Some(row) if first => out.extend_from_slice(&row[..columns]),
                    Some(row) => out.extend_from_slice(&row[row.len() - columns..]),
                    None => out.resize(out.len() + columns, F::default()),
                }
            }
        }
        if let Elem::Quant(quant) = self.out()?.elem {
            return self.quantized(&out, columns, quant);
        }
        self.rounded(out)
    }

    /// Whole rows of the first sequence by position.
    pub(super) fn cache_rows(&self) -> Made<F> {
        let (c, columns) = (self.out()?.shape[0], self.out()?.shape[1]);
        let mut out = Vec::with_capacity(c * columns);
        for position in 0..c {
            match self.cached(0, 1, 0, position)? {
                Some(row) => out.extend_from_slice(&row),
                None => out.resize(out.len() + columns, F::default()),
            }
        }
        self.rounded(out)
    }

    /// Cached rows `0..end` of each sequence that some token of the step needs.
    pub(super) fn contexts(
        &self,
        cache: usize,
        table: usize,
        seqs: &[i32],
        ends: &[usize],
    ) -> Result<HashMap<i32, Vec<Vec<F>>>, String> {
        let mut contexts: HashMap<i32, Vec<Vec<F>>> = HashMap::new();
        for (&seq, &end) in seqs.iter().zip(ends) {
            let rows = contexts.entry(seq).or_default();
            for position in rows.len()..end {
                let row = self.cached(cache, table, seq as usize, position)?;
                rows.push(row.ok_or_else(|| format!("position {position} of sequence {seq} is not cached"))?);
            }
        }
        Ok(contexts)
    }

    pub(super) fn indexer_logits(&self) -> Made<F> {
        let (q, weights) = (self.t(0)?, self.x(1)?);
        let (rows, heads, d, c) = (q.shape[0], q.shape[1], q.columns(), self.syms.get(Sym::C) as usize);
        let matrix = self.fed.get(2).and_then(StepValue::tensor);
        let mut starts = vec![0; rows];
        let (ends, seqs): (Vec<usize>, Vec<i32>) = if matrix.is_some() {
            starts = bounds(self.ints(3)?, c);
            (bounds(self.ints(4)?, c), vec![0; rows])
        } else if self.fed.len() == 6 {
            (self.ints(3)?.iter().map(|&p| (p.max(-1) + 1) as usize).collect(), self.ints(4)?.to_vec())
        } else {
            (bounds(self.ints(3)?, c), self.sequences(4, rows)?)
        };
        let contexts = match matrix {
            Some(keys) => HashMap::from([(0, keys.values().chunks(d.max(1)).map(<[F]>::to_vec).collect())]),
            None => self.contexts(2, self.fed.len() - 1, &seqs, &ends)?,
        };
        let mut out = vec![F::from_f64(f64::NEG_INFINITY); rows * c];
        let qs = q.values();
        for (t, (&start, &end)) in starts.iter().zip(&ends).enumerate() {
            let keys = contexts[&seqs[t]].iter().take(end.min(c));
            for (logit, key) in out[t * c..].iter_mut().zip(keys).skip(start) {
                let head = |h: usize| {
                    let score = dot(&qs[(t * heads + h) * d..][..d], key);
                    if score > F::default() { score * weights[t * heads + h] } else { F::default() }
                };
                *logit = sum((0..heads).map(head));
            }
        }
        self.rounded(out)
    }

    /// The sequence of each of `rows` tokens where all have as many; `table` is the input of the page table.
    pub(super) fn sequences(&self, table: usize, rows: usize) -> Result<Vec<i32>, String> {
        let seqs = self.t(table)?.shape[0];
        if seqs == 0 || !rows.is_multiple_of(seqs) {
            return if rows == 0 { Ok(Vec::new()) } else { Err(format!("{rows} tokens of {seqs} sequences")) };
        }
        Ok((0..rows).map(|t| (t / (rows / seqs)) as i32).collect())
    }

    pub(super) fn topk(&self, k: usize) -> Made<F> {
        let x = self.t(0)?;
        let (rows, columns) = (x.shape[0], x.columns());
        let (starts, ends) = match self.fed.len() {
            1 => (vec![0; rows], vec![columns; rows]),
            2 => (vec![0; rows], bounds(self.ints(1)?, columns)),
            _ => (bounds(self.ints(1)?, columns), bounds(self.ints(2)?, columns)),
        };
        let mut out = Vec::with_capacity(rows * k);
        for t in 0..rows {
            let row = &x.values()[t * columns..][..columns];
            let selected = largest(row, k, |c| (starts[t]..ends[t]).contains(&c));
            out.extend(selected.iter().map(|&c| c as i32));
            out.resize((t + 1) * k, -1);
        }
        self.tensor(Data::Int(out))
    }

    /// The selected positions of row `t`, in `0..limit`.
    pub(super) fn selection(&self, i: usize, t: usize, limit: usize) -> Result<Vec<usize>, String> {
        let selected = self.t(i)?;
        let row = &selected.ints()[t * selected.columns()..][..selected.columns()];
        let check = |&s: &i32| {
            if (s as usize) < limit { Ok(s as usize) } else { Err(format!("selects position {s} of {limit}")) }
        };
        row.iter().filter(|&&s| s >= 0).map(check).collect()
    }

    pub(super) fn mha(&self, scale: F, [nope, value]: [usize; 2], narrow: bool) -> Made<F> {
        let (q, kv, rope, seqs) = (self.t(0)?, self.t(1)?, self.t(2)?, self.ints(4)?);
        let (heads, c, r) = (q.shape[1], kv.shape[1], rope.columns());
        let (width, stride) = (nope + value, kv.columns());
        let (qs, kvs, ropes) = (q.values(), kv.values(), rope.values());
        let mut out = vec![F::default(); q.shape[0] * heads * value];
        for (t, &seq) in seqs.iter().enumerate() {
            let base =
                usize::try_from(seq).ok().filter(|&s| s < kv.shape[0]).ok_or_else(|| format!("sequence {seq}"))? * c;
            let rows: Vec<usize> = self.selection(3, t, c)?.into_iter().map(|s| base + s).collect();
            for h in 0..heads {
                let (qn, qr) = qs[(t * heads + h) * (nope + r)..][..nope + r].split_at(nope);
                let score = |&s: &usize| {
                    (dot(qn, &kvs[s * stride + h * width..][..nope]) + dot(qr, &ropes[s * r..][..r])) * scale
                };
                let p = softmax(rows.iter().map(score).collect(), narrow, Base::Largest);
                let o = &mut out[(t * heads + h) * value..][..value];
                for (&p, &s) in p.iter().zip(&rows) {
                    add_scaled(o, p, &kvs[s * stride + h * width + nope..][..value]);
                }
            }
        }
        self.rounded(out)
    }

    pub(super) fn mqa(&self, scale: F, narrow: bool) -> Made<F> {
        let (heads, l) = (self.t(0)?.shape[1], self.t(0)?.columns());
        let mut out = vec![F::default(); self.t(0)?.elements()];
        let mut sums = Vec::new();
        for t in 0..self.t(0)?.shape[0] {
            let keys = self.selected_keys(t)?;
            for h in 0..heads {
                let scores = self.mqa_scores(t * heads + h, &keys, scale)?;
                sums.push(log_sum(&scores));
                let p = softmax(scores, narrow, Base::PowerOfTwo);
                let o = &mut out[(t * heads + h) * l..][..l];
                p.iter().zip(&keys).for_each(|(&p, k)| add_scaled(o, p, &k[..l]));
            }
        }
        self.attended(out, sums)
    }

    /// The result of attention, and its further outputs if they are declared: logarithms of sums, and largest scores.
    pub(super) fn attended(&self, out: Vec<F>, sums: Vec<(F, F)>) -> Made<F> {
        let mut made = self.rounded(out)?;
        let (logs, largest): (Vec<F>, Vec<F>) = sums.into_iter().unzip();
        for (out, data) in self.outs.iter().skip(1).zip([logs, largest]) {
            made.push(StepValue::Tensor(Arc::new(TensorData::new(out.shape.clone(), Data::Real(data)))));
        }
        Ok(made)
    }

    /// The keys that token `t` selects: positions of its sequence, or slots.
    pub(super) fn selected_keys(&self, t: usize) -> Result<Vec<Vec<F>>, String> {
        if self.fed.len() == 4 {
            return self.selected_slots(t);
        }
        let (table, seq) = match self.fed.len() {
            5 => (4, self.sequences(4, self.t(0)?.shape[0])?[t]),
            _ => (5, self.ints(4)?[t]),
        };
        let row = |s: usize| {
            let row = self.cached(2, table, seq as usize, s)?;
            row.ok_or_else(|| format!("position {s} of sequence {seq} is not cached"))
        };
        self.selection(3, t, self.syms.get(Sym::C) as usize)?.into_iter().map(row).collect()
    }

    /// Rows of a cache or a matrix by number; those outside are left out.
    pub(super) fn selected_slots(&self, t: usize) -> Result<Vec<Vec<F>>, String> {
        let selected = self.t(3)?;
        let row = &selected.ints()[t * selected.columns()..][..selected.columns()];
        let numbers = row.iter().filter_map(|&s| usize::try_from(s).ok());
        Ok(match self.fed.get(2).and_then(StepValue::tensor) {
            Some(matrix) => {
                let columns = matrix.columns();
                let row = |s: usize| matrix.values().get(s * columns..(s + 1) * columns).map(<[F]>::to_vec);
                numbers.filter_map(row).collect()
            }
            None => numbers.filter_map(|s| self.cache(2).ok()?.row(s)).collect(),
        })
    }

    /// Scaled scores of one token and head, as row `at` of the queries.
    pub(super) fn mqa_scores(&self, at: usize, keys: &[Vec<F>], scale: F) -> Result<Vec<F>, String> {
        let (q, q_rope) = (self.t(0)?, self.t(1)?);
        let (l, r) = (q.columns(), q_rope.columns());
        let (ql, qr) = (&q.values()[at * l..][..l], &q_rope.values()[at * r..][..r]);
        Ok(keys.iter().map(|k| (dot(ql, &k[..l]) + dot(qr, &k[l..])) * scale).collect())
    }

    /// Parts of equal numbers of positions.
    pub(super) fn mqa_partial(&self, scale: F, narrow: bool, parts: usize) -> Made<F> {
        let (rows, heads, l) = (self.t(0)?.shape[0], self.t(0)?.shape[1], self.t(0)?.columns());
        let log2_e = F::from_f64(std::f64::consts::LOG2_E);
        let cells = rows * heads * parts;
        let (mut sums, mut largest) = (vec![F::default(); cells * l], vec![F::from_f32(NO_SCORE); cells]);
        let mut totals = vec![F::default(); cells];
        for t in 0..rows {
            let keys = self.selected_keys(t)?;
            let each = keys.len().div_ceil(parts).max(1);
            for (h, (part, keys)) in (0..heads).flat_map(|h| keys.chunks(each).enumerate().map(move |k| (h, k))) {
                let at = (t * heads + h) * parts + part;
                let scores = self.mqa_scores(t * heads + h, keys, scale)?;
                let most = scores.iter().copied().fold(scores[0], |a, b| if b > a { b } else { a });
                let e: Vec<F> = scores.iter().map(|&s| (s - most).exp()).collect();
                (largest[at], totals[at]) = (most * log2_e, sum(e.iter().copied()));
                let o = &mut sums[at * l..][..l];
                e.iter().zip(keys).for_each(|(&e, k)| add_scaled(o, narrowed(e, narrow), &k[..l]));
            }
        }
        self.outputs(vec![sums, largest, totals])
    }

    pub(super) fn mqa_combine(&self) -> Made<F> {
        let (sums, largest, totals) = (self.t(0)?, self.x(1)?, self.x(2)?);
        let (parts, l) = (sums.shape[2].max(1), sums.columns());
        let ln_2 = F::from_f64(std::f64::consts::LN_2);
        let mut out = vec![F::default(); sums.elements() / parts];
        let mut logs = Vec::new();
        for (i, o) in out.chunks_mut(l.max(1)).enumerate() {
            let range = i * parts..(i + 1) * parts;
            let most =
                largest[range.clone()].iter().copied().fold(F::from_f32(NO_SCORE), |a, b| if b > a { b } else { a });
            let weight = |p: usize| ((largest[p] - most) * ln_2).exp();
            let total = sum(range.clone().map(|p| weight(p) * totals[p]));
            if total > F::default() {
                range.for_each(|p| add_scaled(o, weight(p) / total, &sums.values()[p * l..][..l]));
                logs.push((most * ln_2 + total.ln(), most * ln_2));
            } else {
                logs.push(NO_SUM.map(F::from_f64).into());
            }
        }
        self.attended(out, logs)
    }
}
