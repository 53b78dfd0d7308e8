//! A model of two layers (one dense; one of experts that shares the first one's selection) as the front end would build it, with
//! sizes that fit a test.

use dsc_ir::artifact::{Numerics, TensorPart, WeightSource};
use dsc_ir::graph::{
    Elem, Graph, Op, Quant, RopeLayout, State, StateFormat, StepInput, TensorType, Value, ValueType, Weight,
};
use dsc_ir::{DType, Extent, Sym};

pub const HIDDEN: u32 = 32;
pub const HEADS: u32 = 4;
pub const NOPE: u32 = 8;
pub const VALUE: u32 = 16;
pub const ROPE: u32 = 4;
pub const Q_LORA: u32 = 16;
pub const LATENT: u32 = 24;
pub const INDEX_HEADS: u32 = 2;
pub const INDEX_DIM: u32 = 8;
pub const TOP_K: u32 = 4;
pub const EXPERTS: u32 = 8;
pub const PER_TOKEN: u32 = 2;
pub const INTER: u32 = 16;
pub const VOCAB: u32 = 11;
/// Rows of the rope table.
pub const POSITIONS: u32 = 32;

const BLOCK: u32 = 8;

/// Builds a graph op by op.
pub struct Mini {
    pub graph: Graph,
    numerics: Numerics,
    /// Step inputs and the tables, made once.
    tokens: Value,
    positions: Value,
    seqs: Value,
    slots: Value,
    pages: Value,
    rows: Value,
    table: Value,
}

impl Mini {
    pub fn new(numerics: Numerics) -> Mini {
        let mut graph = Graph::default();
        let mut input = |i: StepInput| {
            graph.add1(format!("{i:?}").to_lowercase(), Op::Input(i), &[], TensorType::plain(DType::I32, &i.shape()))
        };
        use StepInput::{LogitRows, PageTable, Positions, Seqs, Slots, Tokens};
        let [tokens, positions, seqs, slots, pages, rows] =
            [Tokens, Positions, Seqs, Slots, PageTable, LogitRows].map(&mut input);
        let ty = TensorType::plain(DType::F32, &[POSITIONS.into(), ROPE.into()]);
        let source = WeightSource::RopeTable { frequencies: vec![1.0, 0.1] };
        graph.weights.push(Weight { name: "rope".into(), ty: ty.clone(), source });
        let table = graph.add1("rope", Op::Weight(0), &[], ty);
        Mini { graph, numerics, tokens, positions, seqs, slots, pages, rows, table }
    }

    /// The whole model.
    pub fn model(numerics: Numerics) -> Graph {
        let mut m = Mini::new(numerics);
        let table = m.plain_weight("embed", m.act(), &[VOCAB, HIDDEN]);
        let h = m.graph.add1(
            "embed",
            Op::Embed,
            &[m.tokens, table],
            TensorType::plain(m.act(), &[Sym::T.into(), HIDDEN.into()]),
        );
        let x = m.norm("0.input_norm", h, HIDDEN);
        let (attention, selected) = m.attention("0.attn", x, None);
        let (x, h) = m.add_norm("0.post_norm", attention, h);
        let y = m.mlp("0.mlp", x);
        let (x, h) = m.add_norm("1.input_norm", y, h);
        m.graph.outputs.push(("hidden.0".into(), h));
        let (attention, _) = m.attention("1.attn", x, Some(selected));
        let (x, h) = m.add_norm("1.post_norm", attention, h);
        let y = m.experts("1.mlp", x);
        let (x, h) = m.add_norm("norm", y, h);
        m.graph.outputs.push(("hidden.1".into(), h));
        m.head(x)
    }

    /// Layer after layer with experts, each with an indexer: what most of the model is.
    pub fn moe_layers(numerics: Numerics, layers: u32) -> Graph {
        let mut m = Mini::new(numerics);
        let table = m.plain_weight("embed", m.act(), &[VOCAB, HIDDEN]);
        let mut h = m.graph.add1(
            "embed",
            Op::Embed,
            &[m.tokens, table],
            TensorType::plain(m.act(), &[Sym::T.into(), HIDDEN.into()]),
        );
        let mut x = m.norm("0.input_norm", h, HIDDEN);
        for i in 0..layers {
            let (attention, _) = m.attention(&format!("{i}.attn"), x, None);
            (x, h) = m.add_norm(&format!("{i}.post_norm"), attention, h);
            let y = m.experts(&format!("{i}.mlp"), x);
            (x, h) = m.add_norm(&format!("{}.input_norm", i + 1), y, h);
        }
        m.head(x)
    }

    fn head(mut self, x: Value) -> Graph {
        let ty = TensorType::plain(self.act(), &[Sym::L.into(), HIDDEN.into()]);
        let x = self.graph.add1("take_rows", Op::TakeRows, &[x, self.rows], ty);
        let w = self.plain_weight("lm_head", DType::F32, &[VOCAB, HIDDEN]);
        let logits = self.linear_with("lm_head", x, w, DType::F32);
        self.graph.outputs.push(("logits".into(), logits));
        self.graph
    }

    fn deployed(&self) -> bool {
        self.numerics == Numerics::Deployed
    }

    fn act(&self) -> DType {
        if self.deployed() { DType::Bf16 } else { DType::F32 }
    }

    /// The type of a value with another last dim.
    fn like(&self, x: Value, last: u32, dtype: DType) -> TensorType {
        let mut ty = TensorType::plain(dtype, &self.graph.tensor(x).shape);
        *ty.shape.last_mut().unwrap() = last.into();
        ty
    }

    fn last(&self, x: Value) -> u32 {
        self.graph.tensor(x).shape.last().unwrap().factor
    }

    fn weight(&mut self, name: &str, elem: Elem, shape: &[u32]) -> Value {
        let rows: u32 = shape[..shape.len() - 1].iter().product();
        let cols = shape[shape.len() - 1];
        let scale_block = match elem {
            Elem::Quant(q) => q.block,
            Elem::Plain(_) => [1, 1],
        };
        let part = TensorPart {
            tensor: name.into(),
            scale: matches!(elem, Elem::Quant(_)).then(|| format!("{name}_scale_inv")),
            scale_block,
            shape: [rows, cols],
            rows: [0, rows],
            cols: [0, cols],
        };
        let ty = TensorType { shape: shape.iter().map(|&d| d.into()).collect(), elem };
        let index = self.graph.weights.len() as u32;
        self.graph.weights.push(Weight {
            name: name.into(),
            ty: ty.clone(),
            source: WeightSource::Tensors(vec![part]),
        });
        self.graph.add1(name, Op::Weight(index), &[], ty)
    }

    fn plain_weight(&mut self, name: &str, dtype: DType, shape: &[u32]) -> Value {
        self.weight(name, Elem::Plain(dtype), shape)
    }

    /// A matrix that the checkpoint holds in e4m3.
    fn matrix(&mut self, name: &str, block: [u32; 2], shape: &[u32]) -> Value {
        let elem = if self.deployed() { Elem::Quant(Quant { block, pow2: false }) } else { Elem::Plain(DType::F32) };
        self.weight(name, elem, shape)
    }

    fn quantize(&mut self, name: &str, x: Value, block: u32) -> Value {
        let quant = Quant { block: [1, block], pow2: true };
        let ty = TensorType::quant(quant, &self.graph.tensor(x).shape);
        self.graph.add1(format!("{name}.quantize"), Op::Quantize, &[x], ty)
    }

    /// The operand of a matrix product.
    fn operand(&mut self, name: &str, x: Value) -> Value {
        if self.deployed() { self.quantize(name, x, BLOCK) } else { x }
    }

    fn linear_with(&mut self, name: &str, x: Value, w: Value, dtype: DType) -> Value {
        let rows = self.graph.tensor(w).shape[0].factor;
        let ty = self.like(x, rows, dtype);
        self.graph.add1(name, Op::Linear, &[x, w], ty)
    }

    fn linear(&mut self, name: &str, x: Value, rows: u32) -> Value {
        let w = self.matrix(name, [BLOCK, BLOCK], &[rows, self.last(x)]);
        let x = self.operand(name, x);
        self.linear_with(name, x, w, self.act())
    }

    fn norm(&mut self, name: &str, x: Value, dim: u32) -> Value {
        let gain = self.plain_weight(name, DType::F32, &[dim]);
        let ty = self.like(x, dim, self.act());
        self.graph.add1(name, Op::RmsNorm { eps: 1e-6 }, &[x, gain], ty)
    }

    /// The norm of the sum, and the sum.
    fn add_norm(&mut self, name: &str, a: Value, b: Value) -> (Value, Value) {
        let sum = self.graph.add1(format!("{name}.add"), Op::Add, &[a, b], self.like(a, HIDDEN, DType::F32));
        let x = self.norm(name, sum, HIDDEN);
        let h = if self.deployed() {
            self.graph.add1(format!("{name}.residual"), Op::Cast, &[sum], self.like(a, HIDDEN, DType::Bf16))
        } else {
            sum
        };
        (x, h)
    }

    fn slice(&mut self, name: &str, x: Value, start: u32, len: u32) -> Value {
        let mut ty = self.graph.tensor(x).clone();
        *ty.shape.last_mut().unwrap() = len.into();
        self.graph.add1(name, Op::SliceLast { start, len }, &[x], ty)
    }

    fn reshape(&mut self, name: &str, x: Value, shape: &[Extent]) -> Value {
        let ty = TensorType { shape: shape.to_vec(), ..self.graph.tensor(x).clone() };
        self.graph.add1(name, Op::Reshape, &[x], ty)
    }

    fn rope(&mut self, name: &str, x: Value, layout: RopeLayout, start: u32) -> Value {
        let ty = self.graph.tensor(x).clone();
        self.graph.add1(name, Op::Rope { layout, start }, &[x, self.positions, self.table], ty)
    }

    fn state(&mut self, name: String, format: StateFormat) -> Value {
        let index = self.graph.states.len() as u32;
        self.graph.states.push(State { name: name.clone(), format });
        let node = self.graph.add(name, Op::State(index), &[], vec![ValueType::State(format)]);
        Value { node, output: 0 }
    }

    fn write(&mut self, name: String, state: Value, parts: &[Value]) -> Value {
        let inputs: Vec<Value> = [state, self.slots].iter().chain(parts).copied().collect();
        let ty = self.graph.ty(state).clone();
        let node = self.graph.add(format!("{name}.write"), Op::CacheWrite, &inputs, vec![ty]);
        let written = Value { node, output: 0 };
        self.graph.outputs.push((name, written));
        written
    }

    /// The attention's result and the selection, which is the given one or its own indexer's.
    fn attention(&mut self, name: &str, x: Value, selected: Option<Value>) -> (Value, Value) {
        let n = |s: &str| format!("{name}.{s}");
        let t = Extent::from(Sym::T);
        let (qk, act) = (NOPE + ROPE, self.act());
        let q_latent = self.linear(&n("q_a"), x, Q_LORA);
        let q_latent = self.norm(&n("q_norm"), q_latent, Q_LORA);
        let q = self.linear(&n("q_b"), q_latent, HEADS * qk);
        let q = self.reshape(&n("q"), q, &[t, HEADS.into(), qk.into()]);
        let q = self.rope(&n("q_rope"), q, RopeLayout::Interleaved, NOPE);

        let kv = self.linear(&n("kv_a"), x, LATENT + ROPE);
        let latent = self.slice(&n("latent"), kv, 0, LATENT);
        let latent = self.norm(&n("kv_norm"), latent, LATENT);
        let key = self.slice(&n("k_rope"), kv, LATENT, ROPE);
        let key = self.rope(&n("k_rope"), key, RopeLayout::Interleaved, 0);
        let (latent, format) = if self.deployed() {
            (self.quantize(&n("kv"), latent, StateFormat::GROUP), StateFormat::LatentFp8 { latent: LATENT, rope: ROPE })
        } else {
            (latent, StateFormat::Latent { latent: LATENT, rope: ROPE, dtype: DType::F32 })
        };
        let state = self.state(n("latent"), format);
        let state = self.write(n("latent"), state, &[latent, key]);

        let selected = selected.unwrap_or_else(|| self.indexer(&n("indexer"), x, q_latent));
        let expanded = |last: u32| TensorType::plain(act, &[Sym::S.into(), Sym::C.into(), last.into()]);
        let mut cached = self.graph.add1(n("cached"), Op::CacheLatent, &[state, self.pages], expanded(LATENT));
        if self.deployed() {
            cached = self.quantize(&n("cached"), cached, StateFormat::GROUP);
        }
        let w = self.matrix(&n("kv_b"), [BLOCK, StateFormat::GROUP], &[HEADS * (NOPE + VALUE), LATENT]);
        let kv = self.linear_with(&n("kv_b"), cached, w, act);
        let keys = self.graph.add1(n("keys"), Op::CacheRope, &[state, self.pages], expanded(ROPE));
        let op = Op::MhaAttention { scale: 0.3, nope: NOPE, value: VALUE, narrow: false };
        let inputs = [q, kv, keys, selected, self.seqs];
        let o = self.graph.add1(n("mha"), op, &inputs, TensorType::plain(act, &[t, (HEADS * VALUE).into()]));
        (self.linear(&n("o"), o, HIDDEN), selected)
    }

    fn indexer(&mut self, name: &str, x: Value, q_latent: Value) -> Value {
        let n = |s: &str| format!("{name}.{s}");
        let t = Extent::from(Sym::T);
        let q = self.linear(&n("wq_b"), q_latent, INDEX_HEADS * INDEX_DIM);
        let q = self.reshape(&n("q"), q, &[t, INDEX_HEADS.into(), INDEX_DIM.into()]);
        let q = self.index_vector(&n("q"), q);

        let k = self.linear(&n("wk"), x, INDEX_DIM);
        let (gain, bias) = (
            self.plain_weight(&n("k_gain"), DType::F32, &[INDEX_DIM]),
            self.plain_weight(&n("k_bias"), DType::F32, &[INDEX_DIM]),
        );
        let ty = self.graph.tensor(k).clone();
        let k = self.graph.add1(n("k_norm"), Op::LayerNorm { eps: 1e-6 }, &[k, gain, bias], ty);
        let k = self.index_vector(&n("k"), k);
        let format = if self.deployed() {
            StateFormat::IndexFp8 { dim: INDEX_DIM }
        } else {
            StateFormat::Index { dim: INDEX_DIM, dtype: DType::F32 }
        };
        let state = self.state(n("keys"), format);
        let state = self.write(n("keys"), state, &[k]);

        let w = self.plain_weight(&n("weights_proj"), DType::F32, &[INDEX_HEADS, HIDDEN]);
        let weights = self.linear_with(&n("weights_proj"), x, w, DType::F32);
        let ty = self.graph.tensor(weights).clone();
        let weights = self.graph.add1(n("scale"), Op::Scale { factor: 0.25 }, &[weights], ty);
        let inputs = [q, weights, state, self.positions, self.seqs, self.pages];
        let ty = TensorType::plain(DType::F32, &[t, Sym::C.into()]);
        let logits = self.graph.add1(n("logits"), Op::IndexerLogits, &inputs, ty);
        let ty = TensorType::plain(DType::I32, &[t, TOP_K.into()]);
        let selected = self.graph.add1(n("topk"), Op::TopK { k: TOP_K }, &[logits], ty);
        self.graph.outputs.push((format!("topk.{}", &name[..1]), selected));
        selected
    }

    fn index_vector(&mut self, name: &str, x: Value) -> Value {
        let x = self.rope(&format!("{name}_rope"), x, RopeLayout::Half, 0);
        if !self.deployed() {
            return x;
        }
        let ty = self.graph.tensor(x).clone();
        let x = self.graph.add1(format!("{name}.hadamard"), Op::Hadamard, &[x], ty);
        self.quantize(name, x, INDEX_DIM)
    }

    fn swiglu(&mut self, name: &str, gate: Value, up: Value) -> Value {
        let ty = self.graph.tensor(gate).clone();
        self.graph.add1(name, Op::SwiGlu, &[gate, up], ty)
    }

    fn mlp(&mut self, name: &str, x: Value) -> Value {
        let (gate, up) = (self.linear(&format!("{name}.gate"), x, INTER), self.linear(&format!("{name}.up"), x, INTER));
        let y = self.swiglu(&format!("{name}.swiglu"), gate, up);
        self.linear(&format!("{name}.down"), y, HIDDEN)
    }

    fn experts(&mut self, name: &str, x: Value) -> Value {
        let n = |s: &str| format!("{name}.{s}");
        let (ids, weights) = self.gate(&n("gate"), x);
        let up = self.expert_linear(&n("gate_up"), x, 2 * INTER, ids);
        let (gate, up) = (self.slice(&n("g"), up, 0, INTER), self.slice(&n("u"), up, INTER, INTER));
        let y = self.swiglu(&n("swiglu"), gate, up);
        let y = self.expert_linear(&n("down"), y, HIDDEN, ids);
        let ty = TensorType::plain(DType::F32, &[Sym::T.into(), HIDDEN.into()]);
        let y = self.graph.add1(n("sum"), Op::WeightedSum, &[y, weights], ty);
        let shared = self.mlp(&n("shared"), x);
        let ty = self.like(shared, HIDDEN, self.act());
        self.graph.add1(n("add"), Op::Add, &[y, shared], ty)
    }

    fn gate(&mut self, name: &str, x: Value) -> (Value, Value) {
        let n = |s: &str| format!("{name}.{s}");
        let w = self.plain_weight(name, DType::F32, &[EXPERTS, HIDDEN]);
        let logits = self.linear_with(name, x, w, DType::F32);
        let all = self.graph.tensor(logits).clone();
        let scores = self.graph.add1(n("sigmoid"), Op::Sigmoid, &[logits], all.clone());
        let bias = self.plain_weight(&n("bias"), DType::F32, &[EXPERTS]);
        let ranked = self.graph.add1(n("ranked"), Op::Add, &[scores, bias], all);
        let of = |dtype| TensorType::plain(dtype, &[Sym::T.into(), PER_TOKEN.into()]);
        let op = Op::GroupTopK { groups: 4, keep: 2, k: PER_TOKEN };
        let ids = self.graph.add1(n("ids"), op, &[ranked], of(DType::I32));
        let chosen = self.graph.add1(n("chosen"), Op::TakeAlong, &[scores, ids], of(DType::F32));
        let op = Op::Normalize { factor: 2.5, by_sum: true };
        (ids, self.graph.add1(n("weights"), op, &[chosen], of(DType::F32)))
    }

    fn expert_linear(&mut self, name: &str, x: Value, rows: u32, ids: Value) -> Value {
        let w = self.matrix(name, [BLOCK, BLOCK], &[EXPERTS, rows, self.last(x)]);
        let x = self.operand(name, x);
        let ty = TensorType::plain(self.act(), &[Sym::T.into(), PER_TOKEN.into(), rows.into()]);
        self.graph.add1(
            name,
            Op::ExpertLinear { per_token: PER_TOKEN, x_sorted: false, y_sorted: false },
            &[x, w, ids],
            ty,
        )
    }
}
