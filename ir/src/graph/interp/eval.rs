//! What each op does, but attention and experts.

use super::super::weights::{Data, Real, TensorData, limit};
use super::super::{Elem, Op, Quant, RopeLayout, TensorType, part_columns};
use super::math::{add_scaled, appended, dot, gather, matmul, quantize_block, sigmoid, slice, sum};
use super::{Cache, MAX_SLOTS, StepValue};
use crate::dtype::DType;
use crate::extent::SymValues;
use crate::sample::Draw;
use std::sync::Arc;

/// The declared type of an output, with sizes.
pub(super) struct Out {
    pub(super) shape: Vec<usize>,
    pub(super) elem: Elem,
    pub(super) elements: usize,
}

impl Out {
    pub(super) fn new(ty: &TensorType, syms: &SymValues) -> Result<Out, String> {
        let shape: Vec<usize> = ty.shape.iter().map(|e| e.eval(syms) as usize).collect();
        let elements = limit(&shape)?;
        Ok(Out { shape, elem: ty.elem, elements })
    }

    pub(super) fn dtype(&self) -> DType {
        match self.elem {
            Elem::Plain(dtype) => dtype,
            Elem::Quant(_) => DType::E4m3,
        }
    }
}

pub(super) type Made<F> = Result<Vec<StepValue<F>>, String>;

/// One node with its inputs. The verifier vouches for their number, kinds and shapes; what remains to check is values.
pub(super) struct Eval<F> {
    pub(super) fed: Vec<StepValue<F>>,
    pub(super) outs: Vec<Out>,
    pub(super) syms: SymValues,
}

impl<F: Real> Eval<F> {
    pub(super) fn t(&self, i: usize) -> Result<&TensorData<F>, String> {
        self.fed.get(i).and_then(StepValue::tensor).ok_or_else(|| format!("input {i} is not a tensor"))
    }

    pub(super) fn x(&self, i: usize) -> Result<&[F], String> {
        Ok(self.t(i)?.values())
    }

    pub(super) fn ints(&self, i: usize) -> Result<&[i32], String> {
        Ok(self.t(i)?.ints())
    }

    pub(super) fn cache(&self, i: usize) -> Result<&Arc<Cache<F>>, String> {
        match self.fed.get(i) {
            Some(StepValue::State(cache)) => Ok(cache),
            _ => Err(format!("input {i} is not a cache")),
        }
    }

    pub(super) fn out(&self) -> Result<&Out, String> {
        self.outs.first().ok_or_else(|| "it has no output".into())
    }

    /// The first output, rounded to its declared type.
    pub(super) fn rounded(&self, mut data: Vec<F>) -> Made<F> {
        let out = self.out()?;
        let dtype = out.dtype();
        if dtype != DType::F32 {
            data.iter_mut().for_each(|x| *x = x.round(dtype));
        }
        self.tensor(Data::Real(data))
    }

    pub(super) fn tensor(&self, data: Data<F>) -> Made<F> {
        let out = TensorData::new(self.out()?.shape.clone(), data);
        if out.elements() != self.out()?.elements {
            return Err(format!("made {} elements for {:?}", out.elements(), out.shape));
        }
        Ok(vec![StepValue::Tensor(Arc::new(out))])
    }

    pub(super) fn map(&self, f: impl Fn(F) -> F) -> Made<F> {
        self.rounded(self.x(0)?.iter().map(|&x| f(x)).collect())
    }

    pub(super) fn op(&self, op: &Op) -> Made<F> {
        match op {
            Op::Embed | Op::TakeRows => self.rows(matches!(op, Op::Embed)),
            Op::Cast | Op::Dequantize => self.map(|x| x),
            Op::Scale { factor } => self.map(|x| x * F::from_f32(*factor)),
            Op::Sigmoid => self.map(sigmoid),
            Op::Add => {
                let (a, b) = (self.x(0)?, self.x(1)?);
                self.rounded(a.iter().zip(b.iter().cycle()).map(|(&a, &b)| a + b).collect())
            }
            Op::SwiGlu => self.rounded(self.x(0)?.iter().zip(self.x(1)?).map(|(&g, &u)| g * sigmoid(g) * u).collect()),
            Op::RmsNorm { eps } | Op::LayerNorm { eps } => self.norm(*eps),
            Op::Linear => {
                let (x, w) = (self.t(0)?, self.t(1)?);
                self.rounded(matmul(x.values(), w.values(), w.columns(), w.shape[0]))
            }
            Op::LinearPartial { parts } => self.linear_partial(*parts),
            Op::SumPartials => self.sum_partials(),
            Op::HeadLinear { first, count, transposed } => {
                self.head_linear(*first as usize, *count as usize, *transposed)
            }
            Op::SliceLast { start, len } => self.slice_last(*start as usize, *len as usize),
            Op::Reshape => self.tensor(self.t(0)?.data.clone()),
            Op::Rope { layout, start } => self.rope(*layout, *start as usize),
            Op::Hadamard => self.hadamard(),
            Op::Quantize => self.quantize(),
            Op::CacheWrite => self.cache_write(),
            Op::CacheLatent | Op::CacheRope => self.cache_read(matches!(op, Op::CacheLatent)),
            Op::CacheRows => self.cache_rows(),
            Op::IndexerLogits => self.indexer_logits(),
            Op::TopK { k } => self.topk(*k as usize),
            Op::MhaAttention { scale, nope, value, narrow } => {
                self.mha(F::from_f32(*scale), [*nope, *value].map(|n| n as usize), *narrow)
            }
            Op::MqaAttention { scale, narrow } => self.mqa(F::from_f32(*scale), *narrow),
            Op::MqaPartial { scale, narrow, parts } => self.mqa_partial(F::from_f32(*scale), *narrow, *parts as usize),
            Op::MqaCombine => self.mqa_combine(),
            Op::Append { value } => self.append(*value),
            Op::GroupTopK { groups, keep, k } => self.group_topk(*groups as usize, *keep as usize, *k as usize),
            Op::TakeAlong => self.take_along(),
            Op::Normalize { factor, by_sum } => self.normalize(F::from_f32(*factor), *by_sum),
            Op::ExpertLinear { per_token, x_sorted, y_sorted } => {
                self.expert_linear(*per_token as usize, [*x_sorted, *y_sorted])
            }
            Op::Route { experts } => self.route(*experts as usize),
            Op::WeightedSum => self.weighted_sum(),
            Op::ArgMax { parts } => self.arg_max(*parts),
            Op::Sample => self.sample(),
            Op::AllReduce { .. } => self.map(|x| x),
            Op::Input(_) | Op::Weight(_) | Op::State(_) | Op::Arg(_) | Op::Fused(_) => {
                Err("is not an op on values".into())
            }
        }
    }

    pub(super) fn rows(&self, embed: bool) -> Made<F> {
        let (table, ids) = if embed { (self.t(1)?, self.ints(0)?) } else { (self.t(0)?, self.ints(1)?) };
        let count = table.shape[0];
        let row =
            |id: i32| usize::try_from(id).ok().filter(|&r| r < count).ok_or_else(|| format!("row {id} of {count}"));
        let rows = ids.iter().map(|&id| row(id)).collect::<Result<Vec<usize>, String>>()?;
        match &table.data {
            Data::Int(x) => self.tensor(Data::Int(gather(x, count, &rows))),
            Data::Real(x) => self.rounded(gather(x, count, &rows)),
            Data::Quant { codes, scales, quant } => self.tensor(Data::Quant {
                codes: gather(codes, count, &rows),
                scales: gather(scales, count, &rows),
                quant: *quant,
            }),
        }
    }

    /// With a gain: RMS norm; with a bias too: layer norm.
    pub(super) fn norm(&self, eps: f32) -> Made<F> {
        let (x, gain) = (self.x(0)?, self.x(1)?);
        let bias = if self.fed.len() > 2 { Some(self.x(2)?) } else { None };
        let n = F::from_f64(gain.len() as f64);
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks(gain.len().max(1)) {
            let mean = if bias.is_some() { sum(row.iter().copied()) / n } else { F::default() };
            let square = sum(row.iter().map(|&v| (v - mean) * (v - mean))) / n;
            let inverse = F::from_f32(1.0) / (square + F::from_f32(eps)).sqrt();
            out.extend(row.iter().zip(gain).map(|(&v, &g)| (v - mean) * inverse * g));
            if let Some(bias) = bias {
                let at = out.len() - row.len();
                out[at..].iter_mut().zip(bias).for_each(|(v, &b)| *v += b);
            }
        }
        self.rounded(out)
    }

    pub(super) fn head_linear(&self, first: usize, count: usize, transposed: bool) -> Made<F> {
        let (x, w) = (self.t(0)?, self.t(1)?);
        let (heads, a) = (x.shape[1].max(1), x.columns());
        let (rows, k) = (w.shape[0] / heads, w.columns());
        let (xs, ws) = (x.values(), w.values());
        let mut out = Vec::with_capacity(self.out()?.elements);
        for (i, xh) in xs.chunks(a.max(1)).enumerate() {
            let wh = &ws[(i % heads * rows + first) * k..][..count * k];
            if transposed {
                out.extend(wh.chunks(k.max(1)).map(|row| dot(xh, row)));
            } else {
                let mut y = vec![F::default(); k];
                xh.iter().zip(wh.chunks(k.max(1))).for_each(|(&s, row)| add_scaled(&mut y, s, row));
                out.append(&mut y);
            }
        }
        self.rounded(out)
    }

    pub(super) fn slice_last(&self, start: usize, len: usize) -> Made<F> {
        let x = self.t(0)?;
        let columns = x.columns();
        self.tensor(match &x.data {
            Data::Real(v) => Data::Real(slice(v, columns, start, len)),
            Data::Int(v) => Data::Int(slice(v, columns, start, len)),
            Data::Quant { codes, scales, quant } => {
                let block = quant.block[1].max(1) as usize;
                let scales = slice(scales, columns.div_ceil(block), start / block, len.div_ceil(block));
                Data::Quant { codes: slice(codes, columns, start, len), scales, quant: *quant }
            }
        })
    }

    pub(super) fn rope(&self, layout: RopeLayout, start: usize) -> Made<F> {
        let (x, positions, table) = (self.t(0)?, self.ints(1)?, self.t(2)?);
        let (columns, dim) = (x.columns().max(1), table.columns());
        let per_token = x.elements() / columns / positions.len().max(1);
        let mut out = x.values().to_vec();
        for (i, row) in out.chunks_mut(columns).enumerate() {
            let p = positions[i / per_token.max(1)];
            let angles = usize::try_from(p).ok().and_then(|p| table.values().get(p * dim..(p + 1) * dim));
            let (cos, sin) = angles.ok_or_else(|| format!("position {p} of {}", table.shape[0]))?.split_at(dim / 2);
            let part = &mut row[start..start + dim];
            for j in 0..dim / 2 {
                let (p, q) = match layout {
                    RopeLayout::Interleaved => (2 * j, 2 * j + 1),
                    RopeLayout::Half => (j, j + dim / 2),
                };
                let (a, b) = (part[p], part[q]);
                part[p] = a * cos[j] - b * sin[j];
                part[q] = a * sin[j] + b * cos[j];
            }
        }
        self.rounded(out)
    }

    pub(super) fn hadamard(&self) -> Made<F> {
        let n = self.t(0)?.columns().max(1);
        let factor = F::from_f64((n as f64).powf(-0.5));
        let mut out = self.x(0)?.to_vec();
        for row in out.chunks_mut(n) {
            let mut half = 1;
            while half < n {
                for pair in row.chunks_mut(2 * half) {
                    let (low, high) = pair.split_at_mut(half);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                half *= 2;
            }
            row.iter_mut().for_each(|x| *x = *x * factor);
        }
        self.rounded(out)
    }

    pub(super) fn quantize(&self) -> Made<F> {
        let x = self.t(0)?;
        let Elem::Quant(quant) = self.out()?.elem else { return Err("its output is not quantised".into()) };
        self.quantized(x.values(), x.columns(), quant)
    }

    pub(super) fn quantized(&self, x: &[F], columns: usize, quant: Quant) -> Made<F> {
        let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::new());
        for row in x.chunks(columns.max(1)) {
            for block in row.chunks(quant.block[1].max(1) as usize) {
                let scale = quantize_block(block.iter().map(|v| v.to_f32()), quant, &mut codes);
                scales.push(scale);
            }
        }
        self.tensor(Data::Quant { codes, scales, quant })
    }

    pub(super) fn cache_write(&self) -> Made<F> {
        let mut cache = self.cache(0)?.as_ref().clone();
        let parts: Vec<Arc<TensorData<F>>> = self.fed[2..]
            .iter()
            .filter_map(|v| match v {
                StepValue::Tensor(t) => Some(t.clone()),
                StepValue::State(_) => None,
            })
            .collect();
        for (row, &slot) in self.ints(1)?.iter().enumerate() {
            let slot = usize::try_from(slot)
                .ok()
                .filter(|&s| s < MAX_SLOTS)
                .ok_or_else(|| format!("slot {slot} of {MAX_SLOTS}"))?;
            cache.write(slot, row, &parts);
        }
        Ok(vec![StepValue::State(Arc::new(cache))])
    }

    pub(super) fn linear_partial(&self, parts: u32) -> Made<F> {
        let (x, w) = (self.t(0)?, self.t(1)?);
        let (k, n) = (w.columns(), w.shape[0]);
        let each = part_columns(k as u32, parts) as usize;
        let cut = |v: &[F], part: usize| {
            let (from, to) = ((part * each).min(k), ((part + 1) * each).min(k));
            v.chunks(k.max(1)).flat_map(|row| row[from..to].iter().copied()).collect::<Vec<F>>()
        };
        let mut out = vec![F::default(); self.out()?.elements];
        for part in 0..parts as usize {
            let (xs, ws) = (cut(x.values(), part), cut(w.values(), part));
            if ws.is_empty() {
                continue;
            }
            let y = matmul(&xs, &ws, ws.len() / n.max(1), n);
            for (t, row) in y.chunks(n.max(1)).enumerate() {
                out[(t * parts as usize + part) * n..][..n].copy_from_slice(row);
            }
        }
        self.rounded(out)
    }

    pub(super) fn sum_partials(&self) -> Made<F> {
        let x = self.t(0)?;
        let (parts, n) = (x.shape[1].max(1), x.columns().max(1));
        let mut out = vec![F::default(); x.elements() / parts];
        for (i, row) in x.values().chunks(n).enumerate() {
            add_scaled(&mut out[i / parts * n..][..n], F::from_f32(1.0), row);
        }
        self.rounded(out)
    }

    pub(super) fn append(&self, value: f32) -> Made<F> {
        let x = self.t(0)?;
        let columns = x.columns().max(1);
        match &x.data {
            Data::Int(v) => self.tensor(Data::Int(appended(v, columns, value as i32))),
            _ => self.rounded(appended(x.values(), columns, F::from_f32(value))),
        }
    }

    /// Several f32 outputs.
    pub(super) fn outputs(&self, data: Vec<Vec<F>>) -> Made<F> {
        let shapes = self.outs.iter().map(|o| (o.shape.clone(), o.elements));
        let tensor = |((shape, elements), data): ((Vec<usize>, usize), Vec<F>)| {
            let out = TensorData::new(shape, Data::Real(data));
            let fits = out.elements() == elements;
            fits.then(|| StepValue::Tensor(Arc::new(out))).ok_or_else(|| format!("did not make {elements} elements"))
        };
        shapes.zip(data).map(tensor).collect()
    }

    pub(super) fn arg_max(&self, parts: u32) -> Made<F> {
        let x = self.t(0)?;
        let width = part_columns(x.columns() as u32, parts) as usize;
        let (mut values, mut columns) = (Vec::new(), Vec::new());
        for row in x.values().chunks(x.columns().max(1)) {
            for p in 0..parts as usize {
                let mut best = (F::from_f64(f64::NEG_INFINITY), -1);
                for (c, &v) in row.iter().enumerate().skip(p * width).take(width) {
                    if v > best.0 || (best.1 < 0 && !v.to_f64().is_nan()) {
                        best = (v, c as i32);
                    }
                }
                values.push(best.0);
                columns.push(best.1);
            }
        }
        let shape = vec![x.shape[0], parts as usize];
        let columns = TensorData::int(shape.clone(), columns);
        let values = TensorData::new(shape, Data::Real(values));
        Ok([values, columns].map(|t| StepValue::Tensor(Arc::new(t))).into())
    }

    pub(super) fn sample(&self) -> Made<F> {
        let (x, draws) = (self.t(0)?, self.ints(3)?);
        let mut tokens = Vec::with_capacity(x.shape[0]);
        for (row, bits) in x.values().chunks(x.columns().max(1)).zip(draws.chunks_exact(3)) {
            let logits: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
            let token = Draw::from_bits([bits[0], bits[1], bits[2]]).pick(&logits);
            tokens.push(token.map_or(-1, |t| t as i32));
        }
        self.tensor(Data::Int(tokens))
    }
}
