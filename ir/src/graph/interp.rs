//! The reference interpreter of graphs: plain loops that say what each op means.
//!
//! One code path computes in f32 or f64 ([`Real`]). Each op reads its inputs as numbers (dequantised where need be), computes, and
//! rounds once to the declared type of its output. In f64, plain f32 values stay unrounded; bf16 values are rounded in both, and
//! quantised tensors hold exact codes and scales. Quantisation itself always works on f32 values.
//!
//! Caches live in the [`Interp`] across steps, as rows by slot in the precision of their format. In a step they are values like
//! others; a graph output with the name of a state makes it that state after the step.
//!
//! Scoring is never skipped: where a fused body may select everything ([`super::Fused::select_all_below`]), selecting by scores
//! selects the same.
//!
//! **Cost.** Memory of a value ends with its last use. Matrix products go by blocks of weight rows that stay in the first cache;
//! everything else is as simple as the definition. Nothing here panics on any graph that verifies, whatever the step.

use super::verify::{Diagnostic, verify};
use super::weights::{Data, Real, TensorData, limit};
use super::{
    Elem, Graph, NodeId, Op, PAGE_TOKENS, Quant, RopeLayout, StateFormat, StepInput, TensorType, Value, ValueType,
    Weight,
};
use crate::dtype::{DType, f32_to_e4m3, pow2_ceil};
use crate::extent::{Sym, SymValues};
use crate::sample::Draw;
use std::collections::HashMap;
use std::sync::Arc;

/// Most slots of a cache here.
const MAX_SLOTS: usize = 1 << 24;

/// Why a graph or a step cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InterpError {
    /// The graph breaks its rules.
    #[error("the graph is not valid: {}", .0.iter().map(|d| d.to_string()).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Diagnostic>),
    /// A weight could not be made.
    #[error("{0}")]
    Weight(String),
    /// The step's inputs do not fit together.
    #[error("step: {0}")]
    Step(String),
    /// A value of the step leads out of a table or past a limit.
    #[error("{node}: {message}")]
    Node {
        /// The node.
        node: String,
        /// What is wrong.
        message: String,
    },
}

/// What a step is fed with; see [`StepInput`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepInputs {
    /// `[T]`
    pub tokens: Vec<i32>,
    /// `[T]`
    pub positions: Vec<i32>,
    /// `[T]`
    pub seqs: Vec<i32>,
    /// `[T]`
    pub slots: Vec<i32>,
    /// `[S, P]`: a row a sequence, all of one length.
    pub page_table: Vec<Vec<i32>>,
    /// `[L]`
    pub logit_rows: Vec<i32>,
    /// `[L]`; those that are missing are [`Draw::GREEDY`].
    pub draws: Vec<Draw>,
}

impl StepInputs {
    /// Tokens of one sequence from position `start` on, cached in pages `0..`, all logits wanted.
    pub fn sequence(tokens: &[i32], start: usize) -> StepInputs {
        let end = start + tokens.len();
        let positions: Vec<i32> = (start..end).map(|p| p as i32).collect();
        StepInputs {
            tokens: tokens.to_vec(),
            seqs: vec![0; tokens.len()],
            slots: positions.clone(),
            page_table: vec![(0..end.div_ceil(PAGE_TOKENS as usize) as i32).collect()],
            logit_rows: (0..tokens.len() as i32).collect(),
            draws: Vec::new(),
            positions,
        }
    }

    /// [`StepInput::Draws`], `[L, 3]`.
    pub fn draw_bits(&self) -> Vec<i32> {
        let draws = self.draws.iter().copied().chain(std::iter::repeat(Draw::GREEDY));
        draws.take(self.logit_rows.len()).flat_map(Draw::bits).collect()
    }

    /// The sizes of this step; [`Sym::N`] is left at 0.
    ///
    /// # Errors
    /// When lengths or ranges disagree.
    pub fn syms(&self) -> Result<SymValues, InterpError> {
        let wrong = |message: &str| Err(InterpError::Step(message.into()));
        let (t, s) = (self.tokens.len(), self.page_table.len());
        if [self.positions.len(), self.seqs.len(), self.slots.len()] != [t; 3] {
            return wrong("tokens, positions, seqs and slots differ in length");
        }
        let p = self.page_table.first().map_or(0, Vec::len);
        if self.page_table.iter().any(|row| row.len() != p) {
            return wrong("rows of the page table differ in length");
        }
        if self.seqs.iter().any(|&q| q < 0 || q as usize >= s) {
            return wrong("a token's sequence is not in the page table");
        }
        if self.logit_rows.iter().any(|&r| r < 0 || r as usize >= t) {
            return wrong("a logit row is not a token of the step");
        }
        if self.positions.iter().any(|&p| !(0..MAX_SLOTS as i32).contains(&p)) {
            return wrong("a position is out of range");
        }
        let context = self.positions.iter().max().map_or(0, |p| p + 1);
        let [t, s, p, l] = [t, s, p, self.logit_rows.len()].map(|n| n as u32);
        Ok(SymValues([t, s, p, l, 0, context as u32]))
    }
}

/// The contents of a cache: rows by slot.
#[derive(Clone, Debug)]
pub struct Cache<F> {
    format: StateFormat,
    slots: usize,
    /// Codes of the quantised part, and its scales.
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// The plain part.
    plain: Vec<F>,
}

impl<F: Real> Cache<F> {
    /// An empty cache.
    pub fn new(format: StateFormat) -> Cache<F> {
        Cache { format, slots: 0, codes: Vec::new(), scales: Vec::new(), plain: Vec::new() }
    }

    /// Elements a row has quantised (and how many share a scale), and plain.
    fn layout(&self) -> (usize, usize, usize) {
        match self.format {
            StateFormat::LatentFp8 { latent, rope } => (latent as usize, StateFormat::GROUP as usize, rope as usize),
            StateFormat::Latent { latent, rope, .. } => (0, 1, (latent + rope) as usize),
            StateFormat::IndexFp8 { dim } => (dim as usize, dim as usize, 0),
            StateFormat::Index { dim, .. } => (0, 1, dim as usize),
        }
    }

    fn grow(&mut self, slots: usize) {
        let (codes, group, plain) = self.layout();
        self.slots = self.slots.max(slots);
        self.codes.resize(self.slots * codes, 0);
        self.scales.resize(self.slots * codes.div_ceil(group), 0.0);
        self.plain.resize(self.slots * plain, F::default());
    }

    fn write(&mut self, slot: usize, row: usize, parts: &[Arc<TensorData<F>>]) {
        self.grow(slot + 1);
        let (codes, group, plain) = self.layout();
        let mut at = slot * plain;
        for part in parts {
            match &part.data {
                Data::Quant { codes: c, scales: s, .. } => {
                    let n = codes.div_ceil(group);
                    self.codes[slot * codes..][..codes].copy_from_slice(&c[row * codes..][..codes]);
                    self.scales[slot * n..][..n].copy_from_slice(&s[row * n..][..n]);
                }
                Data::Real(x) => {
                    let columns = part.columns();
                    self.plain[at..at + columns].copy_from_slice(&x[row * columns..][..columns]);
                    at += columns;
                }
                Data::Int(_) => {}
            }
        }
    }

    /// The cache whose pages are these bytes, as [`StateFormat`] lays them out; what is left of a page is not looked at.
    pub fn from_bytes(format: StateFormat, bytes: &[u8]) -> Cache<F> {
        let page_bytes = format.page_bytes() as usize;
        let tokens = PAGE_TOKENS as usize;
        let mut cache = Cache::new(format);
        cache.grow(bytes.len() / page_bytes * tokens);
        let (codes, group, plain) = cache.layout();
        let (groups, pitch) = (codes.div_ceil(group), codes.next_multiple_of(4));
        let f32_at = |at: usize| f32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        for slot in 0..cache.slots {
            let (page, offset) = (slot / tokens * page_bytes, slot % tokens);
            let (row, scales) = match format {
                StateFormat::IndexFp8 { .. } => (page + offset * pitch, page + tokens * pitch + 4 * offset),
                _ => {
                    let row = page + offset * format.row_bytes() as usize;
                    (row, row + pitch)
                }
            };
            cache.codes[slot * codes..][..codes].copy_from_slice(&bytes[row..][..codes]);
            for g in 0..groups {
                cache.scales[slot * groups + g] = f32_at(scales + 4 * g);
            }
            let dtype = match format {
                StateFormat::Latent { dtype, .. } | StateFormat::Index { dtype, .. } => dtype,
                StateFormat::LatentFp8 { .. } | StateFormat::IndexFp8 { .. } => DType::Bf16,
            };
            let at = if codes == 0 { row } else { scales + 4 * groups };
            for i in 0..plain {
                let at = at + i * dtype.bytes();
                let x = match dtype {
                    DType::Bf16 => half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
                    DType::F16 => half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
                    _ => f32_at(at),
                };
                cache.plain[slot * plain + i] = F::from_f32(x);
            }
        }
        cache
    }

    /// All elements of the row in a slot, dequantised; `None` past the written slots.
    pub fn row(&self, slot: usize) -> Option<Vec<F>> {
        if slot >= self.slots {
            return None;
        }
        let (codes, group, plain) = self.layout();
        let scales = &self.scales[slot * codes.div_ceil(group)..];
        let decode =
            |(i, &code): (usize, &u8)| F::from_f32(crate::dtype::e4m3_to_f32(code)) * F::from_f32(scales[i / group]);
        let mut row: Vec<F> = self.codes[slot * codes..][..codes].iter().enumerate().map(decode).collect();
        row.extend_from_slice(&self.plain[slot * plain..][..plain]);
        Some(row)
    }
}

/// A value of a step.
#[derive(Clone, Debug)]
pub enum StepValue<F> {
    /// A tensor.
    Tensor(Arc<TensorData<F>>),
    /// A cache.
    State(Arc<Cache<F>>),
}

impl<F> StepValue<F> {
    /// The tensor, if it is one.
    pub fn tensor(&self) -> Option<&TensorData<F>> {
        match self {
            StepValue::Tensor(t) => Some(t),
            StepValue::State(_) => None,
        }
    }
}

/// A graph with its weights and caches.
#[derive(Debug)]
pub struct Interp<'g, F> {
    graph: &'g Graph,
    weights: Vec<Arc<TensorData<F>>>,
    states: Vec<Arc<Cache<F>>>,
    exchange: Option<Exchange<F>>,
}

/// The sum over all ranks of what each gives, called by all of them in the same order.
#[derive(Clone)]
pub struct Exchange<F>(pub Arc<dyn Fn(Vec<F>) -> Vec<F> + Send + Sync>);

impl<F> std::fmt::Debug for Exchange<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the other ranks")
    }
}

impl<'g, F: Real> Interp<'g, F> {
    /// Verifies the graph and makes its weights; caches are empty. Rope tables need a row for each position to come.
    ///
    /// # Errors
    /// The verifier's diagnostics, what `weights` says, or a weight that is not as its type declares.
    pub fn new<E: std::fmt::Display>(
        graph: &'g Graph,
        weights: &dyn Fn(&Weight) -> Result<TensorData<F>, E>,
    ) -> Result<Interp<'g, F>, InterpError> {
        let diagnostics = verify(graph);
        if !diagnostics.is_empty() {
            return Err(InterpError::Invalid(diagnostics));
        }
        let make = |w: &Weight| {
            let data = weights(w).map_err(|e| InterpError::Weight(e.to_string()))?;
            check_weight(w, &data).map_err(|e| InterpError::Weight(format!("weight `{}`: {e}", w.name)))?;
            Ok(Arc::new(data))
        };
        Ok(Interp {
            graph,
            weights: graph.weights.iter().map(make).collect::<Result<_, InterpError>>()?,
            states: graph.states.iter().map(|s| Arc::new(Cache::new(s.format))).collect(),
            exchange: None,
        })
    }

    /// Connects it with the interpreters of the other ranks.
    pub fn connect(&mut self, exchange: Exchange<F>) {
        self.exchange = Some(exchange);
    }

    /// Forgets everything cached.
    pub fn reset(&mut self) {
        self.states = self.graph.states.iter().map(|s| Arc::new(Cache::new(s.format))).collect();
    }

    /// The cache of that index in [`Graph::states`].
    pub fn state(&self, index: usize) -> Option<&Cache<F>> {
        self.states.get(index).map(Arc::as_ref)
    }

    /// Runs a graph that declares arguments; returns its outputs in order. `syms` are the sizes.
    ///
    /// # Errors
    /// [`InterpError::Step`] or [`InterpError::Node`].
    pub fn call(&self, args: &[StepValue<F>], syms: SymValues) -> Result<Vec<StepValue<F>>, InterpError> {
        if args.len() != self.graph.args.len() {
            return Err(InterpError::Step(format!("{} arguments of {}", args.len(), self.graph.args.len())));
        }
        Step { weights: &self.weights, states: &self.states, inputs: &StepInputs::default(), syms, exchange: None }
            .run(self.graph, args)
    }

    /// Runs one step; returns the graph's outputs by name. Caches change only if the step succeeds.
    ///
    /// # Errors
    /// [`InterpError::Step`] or [`InterpError::Node`].
    pub fn step(&mut self, inputs: &StepInputs) -> Result<HashMap<String, StepValue<F>>, InterpError> {
        let exchange = self.exchange.as_ref();
        let step = Step { weights: &self.weights, states: &self.states, inputs, syms: inputs.syms()?, exchange };
        let values = step.run(self.graph, &[])?;
        let mut outputs = HashMap::new();
        for ((name, _), value) in self.graph.outputs.iter().zip(values) {
            if let (StepValue::State(cache), Some(i)) = (&value, self.graph.states.iter().position(|s| s.name == *name))
            {
                self.states[i] = cache.clone();
            }
            outputs.insert(name.clone(), value);
        }
        Ok(outputs)
    }
}

/// Whether a weight's data is as declared; a symbolic dim may have any size.
fn check_weight<F: Real>(weight: &Weight, data: &TensorData<F>) -> Result<(), String> {
    let shape = &weight.ty.shape;
    let fits = |(e, n): (&crate::Extent, &usize)| e.constant().is_none_or(|c| c as usize == *n);
    if shape.len() != data.shape.len()
        || !shape.iter().zip(&data.shape).all(fits)
        || limit(&data.shape)? != data.elements()
    {
        return Err(format!("has shape {:?} and {} elements, declared {shape:?}", data.shape, data.elements()));
    }
    let sound = match (weight.ty.elem, &data.data) {
        (Elem::Plain(DType::I32), Data::Int(_)) => true,
        (Elem::Plain(dtype), Data::Real(_)) => dtype != DType::I32,
        (Elem::Quant(q), Data::Quant { scales, quant, .. }) => {
            let n: usize = weight.ty.scale_shape().into_iter().flatten().map(|e| e.factor as usize).product();
            q.block == quant.block && scales.len() == n
        }
        _ => false,
    };
    if sound { Ok(()) } else { Err(format!("its data is not {:?}", weight.ty.elem)) }
}

/// What all nodes of a step see.
struct Step<'a, F> {
    weights: &'a [Arc<TensorData<F>>],
    states: &'a [Arc<Cache<F>>],
    inputs: &'a StepInputs,
    syms: SymValues,
    exchange: Option<&'a Exchange<F>>,
}

impl<F: Real> Step<'_, F> {
    /// Runs a graph; returns its outputs in order.
    fn run(&self, graph: &Graph, args: &[StepValue<F>]) -> Result<Vec<StepValue<F>>, InterpError> {
        let mut uses: HashMap<Value, usize> = HashMap::new();
        let order = graph.order();
        for v in order.iter().flat_map(|&n| graph.inputs(n)).chain(graph.outputs.iter().map(|(_, v)| *v)) {
            *uses.entry(v).or_default() += 1;
        }
        let mut values: HashMap<Value, StepValue<F>> = HashMap::new();
        let lost = || InterpError::Step("a value is used before it is made".into());
        for id in order {
            let sources = graph.inputs(id);
            let fed = sources.iter().map(|v| values.get(v).cloned().ok_or_else(lost)).collect::<Result<Vec<_>, _>>()?;
            for v in &sources {
                if let Some(n) = uses.get_mut(v) {
                    *n -= 1;
                    if *n == 0 {
                        values.remove(v);
                    }
                }
            }
            let made = self.node(graph, id, fed, args)?;
            for (output, value) in made.into_iter().enumerate() {
                let v = Value { node: id, output: output as u32 };
                if uses.contains_key(&v) {
                    values.insert(v, value);
                }
            }
        }
        graph.outputs.iter().map(|(_, v)| values.get(v).cloned().ok_or_else(lost)).collect()
    }

    fn node(
        &self,
        graph: &Graph,
        id: NodeId,
        fed: Vec<StepValue<F>>,
        args: &[StepValue<F>],
    ) -> Result<Vec<StepValue<F>>, InterpError> {
        let node = &graph.dag[id];
        let wrong = |message: String| InterpError::Node { node: node.name.clone(), message };
        let value = match &node.op {
            Op::Input(input) => StepValue::Tensor(Arc::new(self.input(*input))),
            Op::Weight(i) => StepValue::Tensor(self.weights[*i as usize].clone()),
            Op::State(i) => StepValue::State(self.states[*i as usize].clone()),
            Op::Arg(i) => args[*i as usize].clone(),
            Op::Fused(fused) => {
                let made = self.run(&fused.body, &fed)?;
                let short = self.syms.get(Sym::C) <= fused.select_all_below;
                return Ok(if short { unscored(&fused.body, made) } else { made });
            }
            Op::AllReduce { ranks } if *ranks > 1 => {
                let x =
                    fed.first().and_then(StepValue::tensor).ok_or_else(|| wrong("input 0 is not a tensor".into()))?;
                let exchange = self.exchange.ok_or_else(|| wrong("it needs the other ranks".into()))?;
                let dtype = node.outputs[0]
                    .tensor()
                    .and_then(|t| Out::new(t, &self.syms).ok())
                    .map_or(DType::F32, |o| o.dtype());
                let sum = (exchange.0)(x.values().to_vec()).into_iter().map(|v| v.round(dtype)).collect();
                StepValue::Tensor(Arc::new(TensorData::new(x.shape.clone(), Data::Real(sum))))
            }
            op => {
                let mut eval = Eval { fed, outs: Vec::new(), syms: self.syms };
                for ty in node.outputs.iter().filter_map(ValueType::tensor) {
                    eval.outs.push(Out::new(ty, &self.syms).map_err(wrong)?);
                }
                return eval.op(op).map_err(wrong);
            }
        };
        Ok(vec![value])
    }

    fn input(&self, input: StepInput) -> TensorData<F> {
        let shape = input.shape().iter().map(|e| e.eval(&self.syms) as usize).collect();
        let i = self.inputs;
        let data = match input {
            StepInput::Tokens => i.tokens.clone(),
            StepInput::Positions => i.positions.clone(),
            StepInput::Seqs => i.seqs.clone(),
            StepInput::Slots => i.slots.clone(),
            StepInput::PageTable => i.page_table.concat(),
            StepInput::LogitRows => i.logit_rows.clone(),
            StepInput::Draws => i.draw_bits(),
        };
        TensorData::int(shape, data)
    }
}

/// What a body makes, its logits without scores.
fn unscored<F: Real>(body: &Graph, made: Vec<StepValue<F>>) -> Vec<StepValue<F>> {
    let least = F::from_f64(f64::NEG_INFINITY);
    let visible = |x: &F| if *x > least { F::default() } else { least };
    let hide = |value: StepValue<F>| match &value {
        StepValue::Tensor(t) => {
            let zeros = Data::Real(t.values().iter().map(visible).collect());
            StepValue::Tensor(Arc::new(TensorData::new(t.shape.clone(), zeros)))
        }
        StepValue::State(_) => value,
    };
    let logits = |v: &Value| body.dag[v.node].op == Op::IndexerLogits;
    let outputs = body.outputs.iter().map(|(_, v)| logits(v));
    made.into_iter().zip(outputs).map(|(value, logits)| if logits { hide(value) } else { value }).collect()
}

/// The declared type of an output, with sizes.
struct Out {
    shape: Vec<usize>,
    elem: Elem,
    elements: usize,
}

impl Out {
    fn new(ty: &TensorType, syms: &SymValues) -> Result<Out, String> {
        let shape: Vec<usize> = ty.shape.iter().map(|e| e.eval(syms) as usize).collect();
        let elements = limit(&shape)?;
        Ok(Out { shape, elem: ty.elem, elements })
    }

    fn dtype(&self) -> DType {
        match self.elem {
            Elem::Plain(dtype) => dtype,
            Elem::Quant(_) => DType::E4m3,
        }
    }
}

type Made<F> = Result<Vec<StepValue<F>>, String>;

/// One node with its inputs. The verifier vouches for their number, kinds and shapes; what remains to check is values.
struct Eval<F> {
    fed: Vec<StepValue<F>>,
    outs: Vec<Out>,
    syms: SymValues,
}

impl<F: Real> Eval<F> {
    fn t(&self, i: usize) -> Result<&TensorData<F>, String> {
        self.fed.get(i).and_then(StepValue::tensor).ok_or_else(|| format!("input {i} is not a tensor"))
    }

    fn x(&self, i: usize) -> Result<&[F], String> {
        Ok(self.t(i)?.values())
    }

    fn ints(&self, i: usize) -> Result<&[i32], String> {
        Ok(self.t(i)?.ints())
    }

    fn cache(&self, i: usize) -> Result<&Arc<Cache<F>>, String> {
        match self.fed.get(i) {
            Some(StepValue::State(cache)) => Ok(cache),
            _ => Err(format!("input {i} is not a cache")),
        }
    }

    fn out(&self) -> Result<&Out, String> {
        self.outs.first().ok_or_else(|| "it has no output".into())
    }

    /// The first output, rounded to its declared type.
    fn rounded(&self, mut data: Vec<F>) -> Made<F> {
        let out = self.out()?;
        let dtype = out.dtype();
        if dtype != DType::F32 {
            data.iter_mut().for_each(|x| *x = x.round(dtype));
        }
        self.tensor(Data::Real(data))
    }

    fn tensor(&self, data: Data<F>) -> Made<F> {
        let out = TensorData::new(self.out()?.shape.clone(), data);
        if out.elements() != self.out()?.elements {
            return Err(format!("made {} elements for {:?}", out.elements(), out.shape));
        }
        Ok(vec![StepValue::Tensor(Arc::new(out))])
    }

    fn map(&self, f: impl Fn(F) -> F) -> Made<F> {
        self.rounded(self.x(0)?.iter().map(|&x| f(x)).collect())
    }

    fn op(&self, op: &Op) -> Made<F> {
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
            Op::ExpertLinear { per_token } => self.expert_linear(*per_token as usize),
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

    fn rows(&self, embed: bool) -> Made<F> {
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
    fn norm(&self, eps: f32) -> Made<F> {
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

    fn head_linear(&self, first: usize, count: usize, transposed: bool) -> Made<F> {
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

    fn slice_last(&self, start: usize, len: usize) -> Made<F> {
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

    fn rope(&self, layout: RopeLayout, start: usize) -> Made<F> {
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

    fn hadamard(&self) -> Made<F> {
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

    fn quantize(&self) -> Made<F> {
        let x = self.t(0)?;
        let Elem::Quant(quant) = self.out()?.elem else { return Err("its output is not quantised".into()) };
        self.quantized(x.values(), x.columns(), quant)
    }

    fn quantized(&self, x: &[F], columns: usize, quant: Quant) -> Made<F> {
        let (mut codes, mut scales) = (Vec::with_capacity(x.len()), Vec::new());
        for row in x.chunks(columns.max(1)) {
            for block in row.chunks(quant.block[1].max(1) as usize) {
                let scale = quantize_block(block.iter().map(|v| v.to_f32()), quant, &mut codes);
                scales.push(scale);
            }
        }
        self.tensor(Data::Quant { codes, scales, quant })
    }

    fn cache_write(&self) -> Made<F> {
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

    /// The slot of a position of a sequence, by input `table`.
    fn slot(&self, table: usize, seq: usize, position: usize) -> Result<Option<usize>, String> {
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
    fn cached(&self, cache: usize, table: usize, seq: usize, position: usize) -> Result<Option<Vec<F>>, String> {
        let slot = self.slot(table, seq, position)?;
        Ok(slot.and_then(|slot| self.cache(cache).ok()?.row(slot)))
    }

    /// Codes of a cache in fp8 are made again: what was quantised to powers of two quantises to itself.
    fn cache_read(&self, first: bool) -> Made<F> {
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

    /// Cached rows `0..end` of each sequence that some token of the step needs.
    fn contexts(
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

    fn indexer_logits(&self) -> Made<F> {
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
    fn sequences(&self, table: usize, rows: usize) -> Result<Vec<i32>, String> {
        let seqs = self.t(table)?.shape[0];
        if seqs == 0 || !rows.is_multiple_of(seqs) {
            return if rows == 0 { Ok(Vec::new()) } else { Err(format!("{rows} tokens of {seqs} sequences")) };
        }
        Ok((0..rows).map(|t| (t / (rows / seqs)) as i32).collect())
    }

    fn topk(&self, k: usize) -> Made<F> {
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
    fn selection(&self, i: usize, t: usize, limit: usize) -> Result<Vec<usize>, String> {
        let selected = self.t(i)?;
        let row = &selected.ints()[t * selected.columns()..][..selected.columns()];
        let check = |&s: &i32| {
            if (s as usize) < limit { Ok(s as usize) } else { Err(format!("selects position {s} of {limit}")) }
        };
        row.iter().filter(|&&s| s >= 0).map(check).collect()
    }

    fn mha(&self, scale: F, [nope, value]: [usize; 2], narrow: bool) -> Made<F> {
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
                let p = softmax(rows.iter().map(score).collect(), narrow);
                let o = &mut out[(t * heads + h) * value..][..value];
                for (&p, &s) in p.iter().zip(&rows) {
                    add_scaled(o, p, &kvs[s * stride + h * width + nope..][..value]);
                }
            }
        }
        self.rounded(out)
    }

    fn mqa(&self, scale: F, narrow: bool) -> Made<F> {
        let (heads, l) = (self.t(0)?.shape[1], self.t(0)?.columns());
        let mut out = vec![F::default(); self.t(0)?.elements()];
        let mut sums = Vec::new();
        for t in 0..self.t(0)?.shape[0] {
            let keys = self.selected_keys(t)?;
            for h in 0..heads {
                let scores = self.mqa_scores(t * heads + h, &keys, scale)?;
                sums.push(log_sum(&scores));
                let p = softmax(scores, narrow);
                let o = &mut out[(t * heads + h) * l..][..l];
                p.iter().zip(&keys).for_each(|(&p, k)| add_scaled(o, p, &k[..l]));
            }
        }
        self.attended(out, sums)
    }

    /// The result of attention, and its further outputs if they are declared: logarithms of sums, and largest scores.
    fn attended(&self, out: Vec<F>, sums: Vec<(F, F)>) -> Made<F> {
        let mut made = self.rounded(out)?;
        let (logs, largest): (Vec<F>, Vec<F>) = sums.into_iter().unzip();
        for (out, data) in self.outs.iter().skip(1).zip([logs, largest]) {
            made.push(StepValue::Tensor(Arc::new(TensorData::new(out.shape.clone(), Data::Real(data)))));
        }
        Ok(made)
    }

    /// The keys that token `t` selects: positions of its sequence, or slots.
    fn selected_keys(&self, t: usize) -> Result<Vec<Vec<F>>, String> {
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
    fn selected_slots(&self, t: usize) -> Result<Vec<Vec<F>>, String> {
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
    fn mqa_scores(&self, at: usize, keys: &[Vec<F>], scale: F) -> Result<Vec<F>, String> {
        let (q, q_rope) = (self.t(0)?, self.t(1)?);
        let (l, r) = (q.columns(), q_rope.columns());
        let (ql, qr) = (&q.values()[at * l..][..l], &q_rope.values()[at * r..][..r]);
        Ok(keys.iter().map(|k| (dot(ql, &k[..l]) + dot(qr, &k[l..])) * scale).collect())
    }

    /// Parts of equal numbers of positions.
    fn mqa_partial(&self, scale: F, narrow: bool, parts: usize) -> Made<F> {
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

    fn mqa_combine(&self) -> Made<F> {
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

    fn linear_partial(&self, parts: u32) -> Made<F> {
        let (x, w) = (self.t(0)?, self.t(1)?);
        let (k, n) = (w.columns(), w.shape[0]);
        let each = super::part_columns(k as u32, parts) as usize;
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

    fn sum_partials(&self) -> Made<F> {
        let x = self.t(0)?;
        let (parts, n) = (x.shape[1].max(1), x.columns().max(1));
        let mut out = vec![F::default(); x.elements() / parts];
        for (i, row) in x.values().chunks(n).enumerate() {
            add_scaled(&mut out[i / parts * n..][..n], F::from_f32(1.0), row);
        }
        self.rounded(out)
    }

    fn append(&self, value: f32) -> Made<F> {
        let x = self.t(0)?;
        let columns = x.columns().max(1);
        match &x.data {
            Data::Int(v) => self.tensor(Data::Int(appended(v, columns, value as i32))),
            _ => self.rounded(appended(x.values(), columns, F::from_f32(value))),
        }
    }

    /// Several f32 outputs.
    fn outputs(&self, data: Vec<Vec<F>>) -> Made<F> {
        let shapes = self.outs.iter().map(|o| (o.shape.clone(), o.elements));
        let tensor = |((shape, elements), data): ((Vec<usize>, usize), Vec<F>)| {
            let out = TensorData::new(shape, Data::Real(data));
            let fits = out.elements() == elements;
            fits.then(|| StepValue::Tensor(Arc::new(out))).ok_or_else(|| format!("did not make {elements} elements"))
        };
        shapes.zip(data).map(tensor).collect()
    }

    fn group_topk(&self, groups: usize, keep: usize, k: usize) -> Made<F> {
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

    fn take_along(&self) -> Made<F> {
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

    fn normalize(&self, factor: F, by_sum: bool) -> Made<F> {
        let x = self.t(0)?;
        let mut out = Vec::with_capacity(x.elements());
        for row in x.values().chunks(x.columns().max(1)) {
            let total = if by_sum { sum(row.iter().copied()) } else { F::from_f32(1.0) };
            out.extend(row.iter().map(|&v| v / total * factor));
        }
        self.rounded(out)
    }

    /// The expert of each flat row `t·k + j`.
    fn experts_of_rows(&self, per_token: usize, experts: usize) -> Result<Vec<usize>, String> {
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

    fn expert_linear(&self, per_token: usize) -> Made<F> {
        let (x, w) = (self.t(0)?, self.t(1)?);
        let (experts, n, k) = (w.shape[0], w.shape[1], w.columns());
        let shared = x.shape.len() == 2;
        let mut out = vec![F::default(); self.out()?.elements];
        let expert_of = self.experts_of_rows(per_token, experts)?;
        for e in 0..experts {
            let rows: Vec<usize> = (0..expert_of.len()).filter(|&r| expert_of[r] == e).collect();
            let mut xs = Vec::with_capacity(rows.len() * k);
            for r in &rows {
                let source = if shared { r / per_token } else { *r };
                xs.extend_from_slice(&x.values()[source * k..][..k]);
            }
            let y = matmul(&xs, &w.values()[e * n * k..][..n * k], k, n);
            rows.iter().zip(y.chunks(n.max(1))).for_each(|(&r, y)| out[r * n..][..n].copy_from_slice(y));
        }
        self.rounded(out)
    }

    fn route(&self, experts: usize) -> Made<F> {
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
        Ok(vec![tensor(order), tensor(offsets)])
    }

    fn arg_max(&self, parts: u32) -> Made<F> {
        let x = self.t(0)?;
        let width = super::part_columns(x.columns() as u32, parts) as usize;
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

    fn sample(&self) -> Made<F> {
        let (x, draws) = (self.t(0)?, self.ints(3)?);
        let mut tokens = Vec::with_capacity(x.shape[0]);
        for (row, bits) in x.values().chunks(x.columns().max(1)).zip(draws.chunks_exact(3)) {
            let logits: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
            let token = Draw::from_bits([bits[0], bits[1], bits[2]]).pick(&logits);
            tokens.push(token.map_or(-1, |t| t as i32));
        }
        self.tensor(Data::Int(tokens))
    }

    fn weighted_sum(&self) -> Made<F> {
        let (y, weights) = (self.t(0)?, self.x(1)?);
        let (t, k, d) = (y.shape[0], y.shape[1], y.columns());
        let mut out = vec![F::default(); t * d];
        for (i, row) in y.values().chunks(d.max(1)).enumerate() {
            add_scaled(&mut out[i / k * d..][..d], weights[i], row);
        }
        self.rounded(out)
    }
}

/// Quantises one block: appends its codes, returns its scale.
pub fn quantize_block(values: impl Iterator<Item = f32> + Clone, quant: Quant, codes: &mut Vec<u8>) -> f32 {
    let largest = values.clone().fold(1e-4f32, |m, v| m.max(v.abs()));
    let exact = largest * (1.0 / 448.0f32);
    let scale = if quant.pow2 { pow2_ceil(exact) } else { exact };
    codes.extend(values.map(|v| f32_to_e4m3(v / scale)));
    scale
}

fn sigmoid<F: Real>(x: F) -> F {
    let one = F::from_f32(1.0);
    one / (one + (F::default() - x).exp())
}

fn sum<F: Real>(values: impl Iterator<Item = F>) -> F {
    values.fold(F::default(), |a, b| a + b)
}

/// Dot product in eight partial sums.
fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    let mut parts = [F::default(); 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = sum(a8.remainder().iter().zip(b8.remainder()).map(|(&x, &y)| x * y));
    for (x, y) in a8.zip(b8) {
        for i in 0..8 {
            parts[i] += x[i] * y[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = parts;
    ((a + b) + (c + d)) + ((e + f) + (g + h)) + rest
}

/// `y += s · x`.
fn add_scaled<F: Real>(y: &mut [F], s: F, x: &[F]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += s * x);
}

/// `x [M, K] · wᵀ` with w `[N, K]`.
fn matmul<F: Real>(x: &[F], w: &[F], k: usize, n: usize) -> Vec<F> {
    if k == 0 || n == 0 {
        return Vec::new();
    }
    let rows = x.len() / k;
    let mut out = vec![F::default(); rows * n];
    for (block, wb) in w.chunks(8 * k).enumerate() {
        for (m, xm) in x.chunks(k).enumerate() {
            let y = &mut out[m * n + block * 8..];
            y.iter_mut().zip(wb.chunks(k)).for_each(|(y, row)| *y = dot(xm, row));
        }
    }
    out
}

/// Each row of `columns` and one more element.
fn appended<T: Copy>(x: &[T], columns: usize, value: T) -> Vec<T> {
    x.chunks(columns).flat_map(|row| row.iter().copied().chain([value])).collect()
}

/// The largest score of a part of an attention without keys.
const NO_SCORE: f32 = -1e30;

fn narrowed<F: Real>(x: F, narrow: bool) -> F {
    if narrow { x.round(DType::Bf16) } else { x }
}

fn softmax<F: Real>(mut scores: Vec<F>, narrow: bool) -> Vec<F> {
    let most = scores.iter().copied().fold(F::from_f64(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
    scores.iter_mut().for_each(|s| *s = (*s - most).exp());
    let total = sum(scores.iter().copied());
    scores.iter_mut().for_each(|s| *s = narrowed(*s, narrow) / total);
    scores
}

/// Logarithm of the sum of exponentials, and largest, of no scores.
const NO_SUM: [f64; 2] = [f64::INFINITY, f64::NEG_INFINITY];

/// `ln Σ exp(score)`, and the largest score.
fn log_sum<F: Real>(scores: &[F]) -> (F, F) {
    let Some(&first) = scores.first() else { return NO_SUM.map(F::from_f64).into() };
    let most = scores.iter().copied().fold(first, |a, b| if b > a { b } else { a });
    (most + sum(scores.iter().map(|&s| (s - most).exp())).ln(), most)
}

/// First or past-the-end columns of rows, of so many columns.
fn bounds(ints: &[i32], columns: usize) -> Vec<usize> {
    ints.iter().map(|&n| usize::try_from(n).unwrap_or(0).min(columns)).collect()
}

/// Indices of the `k` largest values that `allow`s, ascending; the lowest index first among equals; never −inf or NaN.
fn largest<F: Real>(values: &[F], k: usize, allow: impl Fn(usize) -> bool) -> Vec<usize> {
    let least = F::from_f64(f64::NEG_INFINITY);
    let mut order: Vec<usize> = (0..values.len()).filter(|&i| values[i] > least && allow(i)).collect();
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// Rows of a matrix with `count` rows.
fn gather<T: Copy>(x: &[T], count: usize, rows: &[usize]) -> Vec<T> {
    let columns = x.len() / count.max(1);
    rows.iter().flat_map(|&r| &x[r * columns..][..columns]).copied().collect()
}

/// Columns `start..start + len` of each row.
fn slice<T: Copy>(x: &[T], columns: usize, start: usize, len: usize) -> Vec<T> {
    x.chunks(columns.max(1)).flat_map(|row| &row[start..start + len]).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::super::infer::{Rule, infer};
    use super::*;
    use crate::Extent;

    type T = TensorData<f32>;

    fn fixed(shape: &[usize]) -> Vec<Extent> {
        shape.iter().map(|&n| Extent::from(n as u32)).collect()
    }

    fn r(shape: &[usize], data: &[f32]) -> T {
        T::real(shape.to_vec(), data.to_vec())
    }

    fn i(shape: &[usize], data: &[i32]) -> T {
        T::int(shape.to_vec(), data.to_vec())
    }

    /// Runs one op on constant shapes, checking its type rule on the way.
    fn run(op: Op, inputs: &[T], out: Elem, shape: &[usize]) -> T {
        all(op, inputs, out, shape).remove(0)
    }

    /// As [`run`], every result; `out` and `shape` are the first's.
    fn all(op: Op, inputs: &[T], out: Elem, shape: &[usize]) -> Vec<T> {
        let ty = |t: &T| {
            let elem = match &t.data {
                Data::Real(_) => Elem::Plain(DType::F32),
                Data::Int(_) => Elem::Plain(DType::I32),
                Data::Quant { quant, .. } => Elem::Quant(*quant),
            };
            ValueType::Tensor(TensorType { shape: fixed(&t.shape), elem })
        };
        let types: Vec<ValueType> = inputs.iter().map(ty).collect();
        let declared = TensorType { shape: fixed(shape), elem: out };
        match &infer(&op, &types, &[ValueType::Tensor(declared.clone())]).expect("types that fit")[0] {
            Rule::Tensor(shape, elems) => assert!(*shape == declared.shape && elems.allow(out), "{shape:?}"),
            Rule::State(_) => panic!("a cache"),
        }
        let syms = SymValues::default();
        let fed = inputs.iter().map(|t| StepValue::Tensor(Arc::new(t.clone()))).collect();
        let eval = Eval { fed, outs: vec![Out::new(&declared, &syms).expect("a size")], syms };
        let made = eval.op(&op).expect("a result");
        made.iter().map(|value| value.tensor().expect("a tensor").clone()).collect()
    }

    const F32: Elem = Elem::Plain(DType::F32);
    const I32: Elem = Elem::Plain(DType::I32);

    fn floats(op: Op, inputs: &[T], shape: &[usize]) -> Vec<f32> {
        run(op, inputs, F32, shape).values().to_vec()
    }

    fn close(got: &[f32], wanted: &[f32]) {
        assert_eq!(got.len(), wanted.len());
        for (a, b) in got.iter().zip(wanted) {
            assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "{got:?} is not {wanted:?}");
        }
    }

    #[test]
    fn lookups() {
        let table = r(&[3, 2], &[0., 1., 2., 3., 4., 5.]);
        close(&floats(Op::Embed, &[i(&[2], &[2, 0]), table.clone()], &[2, 2]), &[4., 5., 0., 1.]);
        close(&floats(Op::TakeRows, &[table.clone(), i(&[1], &[1])], &[1, 2]), &[2., 3.]);
        close(&floats(Op::TakeAlong, &[table, i(&[3, 1], &[1, 0, 1])], &[3, 1]), &[1., 2., 5.]);
    }

    #[test]
    fn elementwise() {
        let (a, b) = (r(&[2, 2], &[1., 2., 3., 4.]), r(&[2], &[10., 20.]));
        close(&floats(Op::Add, &[a.clone(), b], &[2, 2]), &[11., 22., 13., 24.]);
        close(&floats(Op::Scale { factor: 0.5 }, std::slice::from_ref(&a), &[2, 2]), &[0.5, 1., 1.5, 2.]);
        close(&floats(Op::Sigmoid, &[r(&[2], &[0., 2.])], &[2]), &[0.5, 0.880_797]);
        close(&floats(Op::SwiGlu, &[r(&[1], &[2.]), r(&[1], &[3.])], &[1]), &[5.284_782]);
        close(&floats(Op::SliceLast { start: 1, len: 1 }, std::slice::from_ref(&a), &[2, 1]), &[2., 4.]);
        close(&floats(Op::Reshape, &[a], &[4, 1]), &[1., 2., 3., 4.]);
        let bf16 = run(Op::Cast, &[r(&[1], &[1.003_906_3])], Elem::Plain(DType::Bf16), &[1]);
        close(bf16.values(), &[1.0]);
        let op = Op::Normalize { factor: 2.5, by_sum: true };
        close(&floats(op, &[r(&[1, 2], &[1., 3.])], &[1, 2]), &[0.625, 1.875]);
    }

    #[test]
    fn norms() {
        let x = r(&[1, 2], &[3., 4.]);
        close(
            &floats(Op::RmsNorm { eps: 0.0 }, &[x.clone(), r(&[2], &[1., 2.])], &[1, 2]),
            &[0.848_528_1, 2.262_741_7],
        );
        let inputs = [x, r(&[2], &[1., 2.]), r(&[2], &[0., 1.])];
        close(&floats(Op::LayerNorm { eps: 0.0 }, &inputs, &[1, 2]), &[-1., 3.]);
    }

    #[test]
    fn products() {
        let w = r(&[3, 2], &[1., 0., 0., 1., 1., 1.]);
        close(&floats(Op::Linear, &[r(&[1, 2], &[5., 7.]), w], &[1, 3]), &[5., 7., 12.]);
        // Two heads with two rows each: head 0 has rows [1 2], [3 4]; head 1 has [5 6], [7 8].
        let w = r(&[4, 2], &[1., 2., 3., 4., 5., 6., 7., 8.]);
        let op = |transposed| Op::HeadLinear { first: 1, count: 1, transposed };
        close(&floats(op(false), &[r(&[1, 2, 1], &[1., 2.]), w.clone()], &[1, 2, 2]), &[3., 4., 14., 16.]);
        close(&floats(op(true), &[r(&[1, 2, 2], &[1., 1., 1., 2.]), w], &[1, 2, 1]), &[7., 23.]);
    }

    /// The vector of the model facts: x_j = (j + 1) / 64, position 5, with the frequencies of 64 dims under YaRN.
    #[test]
    fn rope_vectors() {
        let ramp = |i: f64| ((i - 10.0) / 13.0).clamp(0.0, 1.0);
        let omega = |i: usize| {
            let theta = 10000f64.powf(-(i as f64) / 32.0);
            (theta / 40.0 * ramp(i as f64) + theta * (1.0 - ramp(i as f64))) as f32
        };
        let angles: Vec<f64> = (0..32).map(|i| f64::from(5.0 * omega(i))).collect();
        let row: Vec<f32> =
            angles.iter().map(|a| a.cos() as f32).chain(angles.iter().map(|a| a.sin() as f32)).collect();
        let x: Vec<f32> = (1..=64).map(|j| j as f32 / 64.0).collect();
        let inputs = [r(&[1, 64], &x), i(&[1], &[0]), r(&[1, 64], &row)];
        let rope = |layout| floats(Op::Rope { layout, start: 0 }, &inputs, &[1, 64]);
        let y = rope(RopeLayout::Interleaved);
        close(&y[..4], &[0.034_398_6, -0.006_118_7, -0.002_782_4, -0.078_075_4]);
        close(&y[31..34], &[0.519_745_2, 0.500_822_5, 0.545_227]);
        let y = rope(RopeLayout::Half);
        close(&y[..4], &[0.498_877_6, 0.277_759_4, -0.221_499_5, -0.515_138_4]);
        close(&y[62..], &[0.984_385_8, 1.000_008_3]);
    }

    #[test]
    fn quantisation_vector() {
        let x: Vec<f32> = (0..128).map(|i| ((37 * i % 101) - 50) as f32 / 16.0).collect();
        let quant = Elem::Quant(Quant { block: [1, 128], pow2: true });
        let q = run(Op::Quantize, &[r(&[1, 128], &x)], quant, &[1, 128]);
        let Data::Quant { codes, scales, .. } = &q.data else { panic!("not quantised") };
        assert_eq!(scales, &[2f32.powi(-7)]);
        assert_eq!(codes[..8], [0xfc, 0xed, 0x74, 0xfa, 0xdc, 0x78, 0xf7, 0x66]);
        let y = floats(Op::Dequantize, &[q], &[1, 128]);
        assert_eq!(y.iter().sum::<f32>(), -4.8125);
        assert_eq!(y.iter().map(|v| v * v).sum::<f32>(), 422.738_28);
    }

    #[test]
    fn hadamard_is_natural_order() {
        close(&floats(Op::Hadamard, &[r(&[1, 4], &[1., 2., 3., 4.])], &[1, 4]), &[5., -1., -2., 0.]);
    }

    #[test]
    fn topk_takes_the_lowest_of_equals_and_never_minus_infinity() {
        let x = r(&[2, 4], &[1., 3., 1., 1., f32::NEG_INFINITY, 0., f32::NEG_INFINITY, f32::NEG_INFINITY]);
        assert_eq!(run(Op::TopK { k: 2 }, std::slice::from_ref(&x), I32, &[2, 2]).ints(), [0, 1, 1, -1]);
        let (starts, ends) = (i(&[2], &[1, 0]), i(&[2], &[9, 1]));
        assert_eq!(run(Op::TopK { k: 2 }, &[x.clone(), ends.clone()], I32, &[2, 2]).ints(), [0, 1, -1, -1]);
        assert_eq!(run(Op::TopK { k: 2 }, &[x, starts, ends], I32, &[2, 2]).ints(), [1, 2, -1, -1]);
    }

    /// The gate vector of the model facts.
    #[test]
    fn gate_vector() {
        let logits: Vec<f32> =
            (0..256).map(|i| (2.0 * (0.37 * i as f64).sin() + 0.3 * (1.91 * i as f64).cos()) as f32).collect();
        let bias: Vec<f32> = (0..256).map(|i| 0.05 * ((7 * i % 13) - 6) as f32).collect();
        let scores = run(Op::Sigmoid, &[r(&[1, 256], &logits)], F32, &[1, 256]);
        let biased = run(Op::Add, &[scores.clone(), r(&[256], &bias)], F32, &[1, 256]);
        let ids = run(Op::GroupTopK { groups: 8, keep: 4, k: 8 }, &[biased], I32, &[1, 8]);
        assert_eq!(ids.ints(), [72, 89, 139, 141, 174, 191, 241, 243]);
        let chosen = run(Op::TakeAlong, &[scores, ids], F32, &[1, 8]);
        let weights = floats(Op::Normalize { factor: 2.5, by_sum: true }, &[chosen], &[1, 8]);
        let wanted =
            [0.316_734_8, 0.318_421_1, 0.302_474_5, 0.312_165_4, 0.317_085_7, 0.318_378_2, 0.303_239_4, 0.311_500_9];
        close(&weights, &wanted);
    }

    #[test]
    fn tokens_are_chosen() {
        let nan = f32::NAN;
        let x = r(&[3, 130], &[&[1., 3., 3.][..], &[0.; 125], &[7., 2.], &[nan; 130], &[0.; 129], &[9.]].concat());
        let made = all(Op::ArgMax { parts: 2 }, std::slice::from_ref(&x), F32, &[3, 2]);
        let none = f32::NEG_INFINITY;
        assert_eq!(made[0].values(), [3., 7., none, none, 0., 9.]);
        assert_eq!(made[1].ints(), [1, 128, -1, -1, 0, 129]);
        let draw = Draw { temperature: 2.0, top_p: 1.0, quantile: 0.0 };
        let draws = i(&[3, 3], &[Draw::GREEDY, draw, draw].map(Draw::bits).concat());
        let inputs = [x, made[0].clone(), made[1].clone(), draws];
        assert_eq!(run(Op::Sample, &inputs, I32, &[3]).ints(), [128, -1, 0]);
    }

    #[test]
    fn experts() {
        let w = r(&[2, 1, 2], &[1., 1., 10., 0.]);
        let (x, ids) = (r(&[2, 2], &[1., 2., 3., 4.]), i(&[2, 2], &[1, 0, 0, 1]));
        let op = Op::ExpertLinear { per_token: 2 };
        let y = run(op.clone(), &[x.clone(), w.clone(), ids.clone()], F32, &[2, 2, 1]);
        close(y.values(), &[10., 3., 7., 30.]);
        let (order, offsets) = (i(&[4], &[1, 2, 0, 3]), i(&[3], &[0, 2, 4]));
        assert_eq!(run(Op::Route { experts: 2 }, &[ids], I32, &[4]).ints(), order.ints());
        close(&floats(op, &[x, w, order, offsets], &[2, 2, 1]), y.values());
        close(&floats(Op::WeightedSum, &[y, r(&[2, 2], &[0.5, 1., 2., 0.1])], &[2, 1]), &[8., 17.]);
    }

    /// The indexer vector of the model facts: 4 heads, 6 keys, fp8 with Hadamard, one token that sees all keys.
    #[test]
    fn indexer_vector() {
        let mut g = Graph::default();
        let shape = |dims: &[u32]| dims.iter().map(|&n| Extent::from(n)).collect::<Vec<_>>();
        let source = || crate::artifact::WeightSource::Tensors(Vec::new());
        let weight = |g: &mut Graph, name: &str, dtype: DType, dims: &[u32]| {
            let ty = TensorType::plain(dtype, &shape(dims));
            g.weights.push(Weight { name: name.into(), ty: ty.clone(), source: source() });
            g.add1(name, Op::Weight(g.weights.len() as u32 - 1), &[], ty)
        };
        let ints = |g: &mut Graph, input: StepInput| {
            g.add1("in", Op::Input(input), &[], TensorType::plain(DType::I32, &input.shape()))
        };
        let t: Extent = Sym::T.into();
        let tokens = ints(&mut g, StepInput::Tokens);
        let fp8 = Quant { block: [1, 128], pow2: true };
        let prepare = |g: &mut Graph, x: Value, dims: &[Extent]| {
            let h = g.add1("h", Op::Hadamard, &[x], TensorType::plain(DType::Bf16, dims));
            g.add1("quant", Op::Quantize, &[h], TensorType::quant(fp8, dims))
        };
        let table = weight(&mut g, "k", DType::F32, &[6, 128]);
        let k = g.add1("keys", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 128.into()]));
        let k = prepare(&mut g, k, &[t, 128.into()]);
        let table = weight(&mut g, "q", DType::F32, &[6, 512]);
        let q = g.add1("queries", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 512.into()]));
        let dims = [t, 4.into(), 128.into()];
        let q = g.add1("heads", Op::Reshape, &[q], TensorType::plain(DType::F32, &dims));
        let q = prepare(&mut g, q, &dims);
        let table = weight(&mut g, "w", DType::F32, &[6, 4]);
        let w = g.add1("by_head", Op::Embed, &[tokens, table], TensorType::plain(DType::F32, &[t, 4.into()]));
        let format = StateFormat::IndexFp8 { dim: 128 };
        g.states.push(super::super::State { name: "index".into(), format });
        let state = Value { node: g.add("index", Op::State(0), &[], vec![ValueType::State(format)]), output: 0 };
        let slots = ints(&mut g, StepInput::Slots);
        let state = Value {
            node: g.add("write", Op::CacheWrite, &[state, slots, k], vec![ValueType::State(format)]),
            output: 0,
        };
        let rest = [StepInput::Positions, StepInput::Seqs, StepInput::PageTable].map(|x| ints(&mut g, x));
        let inputs = [&[q, w, state][..], &rest].concat();
        let logits = g.add1("logits", Op::IndexerLogits, &inputs, TensorType::plain(DType::F32, &[t, Sym::C.into()]));
        g.outputs = vec![("index".into(), state), ("logits".into(), logits)];

        let value = |n: &str| -> Vec<f32> {
            match n {
                "k" => (0..6 * 128).map(|j| ((29 * (j / 128) + 23 * (j % 128)) % 53 - 26) as f32 / 16.0).collect(),
                "q" => {
                    (0..6 * 512).map(|j| ((31 * (j % 512 / 128) + 17 * (j % 128)) % 61 - 30) as f32 / 16.0).collect()
                }
                _ => (0..24).map(|j| ((5 * (j % 4)) % 7 - 3) as f32 / 4.0 * 0.5 * 128f32.powf(-0.5)).collect(),
            }
        };
        let make = |w: &Weight| -> Result<T, String> {
            let data = value(&w.name);
            Ok(r(&w.ty.shape.iter().map(|e| e.factor as usize).collect::<Vec<_>>(), &data))
        };
        let mut interp = Interp::<f32>::new(&g, &make).expect("a valid graph");
        let out = interp.step(&StepInputs::sequence(&[0, 1, 2, 3, 4, 5], 0)).expect("a step");
        let logits = out["logits"].tensor().expect("logits").values();
        let wanted = [0.000_759_317_6, -0.129_324_06, -0.133_698_23, -0.056_778_21, 0.095_072_5, -0.052_494_74];
        close(&logits[30..], &wanted);
        assert_eq!(logits[29], f32::NEG_INFINITY);
    }

    #[test]
    fn attention_forms_agree_and_bad_steps_are_refused() {
        let kv = r(&[1, 3, 2], &[1., 10., 2., 20., 3., 30.]);
        let (q, rope) = (r(&[1, 1, 2], &[0., 1.]), r(&[1, 3, 1], &[0., 0., 2f32.ln()]));
        let inputs = [q, kv, rope, i(&[1, 3], &[0, 2, -1]), i(&[1], &[0])];
        let op = Op::MhaAttention { scale: 1.0, nope: 1, value: 1, narrow: false };
        close(&floats(op, &inputs, &[1, 1]), &[(10. + 2. * 30.) / 3.]);

        let mut inputs = StepInputs::sequence(&[1, 2], 0);
        assert!(inputs.syms().is_ok());
        inputs.seqs[1] = 1;
        assert!(inputs.syms().is_err());
    }

    #[test]
    fn mqa_reads_the_cache() {
        let mut cache = Cache::<f32>::new(StateFormat::Latent { latent: 2, rope: 1, dtype: DType::F32 });
        cache.write(64, 0, &[Arc::new(r(&[1, 2], &[1., 5.])), Arc::new(r(&[1, 1], &[0.]))]);
        cache.write(65, 0, &[Arc::new(r(&[1, 2], &[1., 8.])), Arc::new(r(&[1, 1], &[2f32.ln()]))]);
        let syms = SymValues::default().with(Sym::C, 2);
        let out = TensorType::plain(DType::F32, &fixed(&[1, 1, 2]));
        let tensors =
            [r(&[1, 1, 2], &[0., 0.]), r(&[1, 1, 1], &[1.]), i(&[1, 2], &[0, 1]), i(&[1], &[0]), i(&[1, 1], &[1])];
        let mut fed: Vec<StepValue<f32>> = tensors.into_iter().map(|t| StepValue::Tensor(Arc::new(t))).collect();
        fed.insert(2, StepValue::State(Arc::new(cache)));
        let eval = Eval { fed, outs: vec![Out::new(&out, &syms).expect("a size")], syms };
        let made = eval.op(&Op::MqaAttention { scale: 1.0, narrow: false }).expect("a result");
        close(made[0].tensor().expect("a tensor").values(), &[1., 7.]);
    }

    /// Of a matrix of keys, with what is selected outside it, and nothing; logarithms of sums and largest scores too.
    #[test]
    fn mqa_reads_a_matrix() {
        let syms = SymValues::default().with(Sym::C, 2);
        let f32s = |shape: &[usize]| Out::new(&TensorType::plain(DType::F32, &fixed(shape)), &syms).expect("a size");
        let tensors = [
            r(&[2, 1, 2], &[0.; 4]),
            r(&[2, 1, 1], &[1., 1.]),
            r(&[2, 3], &[1., 5., 0., 1., 8., 2f32.ln()]),
            i(&[2, 3], &[0, 7, 1, -1, 2, -1]),
        ];
        let fed: Vec<StepValue<f32>> = tensors.into_iter().map(|t| StepValue::Tensor(Arc::new(t))).collect();
        let eval = Eval { fed, outs: vec![f32s(&[2, 1, 2]), f32s(&[2, 1]), f32s(&[2, 1])], syms };
        let made = eval.op(&Op::MqaAttention { scale: 1.0, narrow: false }).expect("results");
        let values = |n: usize| made[n].tensor().expect("a tensor").values().to_vec();
        close(&values(0), &[1., 7., 0., 0.]);
        close(&values(1)[..1], &[3f32.ln()]);
        close(&values(2)[..1], &[2f32.ln()]);
        assert_eq!([values(1)[1], values(2)[1]], [f32::INFINITY, f32::NEG_INFINITY]);
    }
}
