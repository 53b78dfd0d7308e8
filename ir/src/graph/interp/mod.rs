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

mod attention;
mod cache;
mod eval;
mod experts;
mod math;

pub use cache::Cache;
pub use math::quantize_block;

use super::verify::{Diagnostic, verify};
use super::weights::{Data, Real, TensorData, limit};
use super::{Elem, Graph, NodeId, Op, PAGE_TOKENS, StepInput, Value, ValueType, Weight};
use crate::dtype::DType;
use crate::extent::{Sym, SymValues};
use crate::sample::Draw;
use eval::{Eval, Out};
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

#[cfg(test)]
mod tests;
