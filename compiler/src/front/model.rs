//! From a model's configuration to the graph of one step.
//!
//! [`build`] writes down the model as its definition does, with nothing fused, absorbed or skipped: attention is the multi-head form
//! over keys and values expanded from the cached latent, the indexer scores every cached key. Passes take it from there.
//!
//! ```text
//! embed
//! each layer   add, norm ─ q_a ─ norm ─ q_b ─ rope ──────────────────┐
//!                        ├ kv_a ─ norm, rope ─ cache ─ kv_b ─────────┤
//!                        └ indexer: q, k ─ cache ─ logits ─ top-k ───┴ attention ─ o
//!              add, norm ─ dense MLP, or router ─ experts ─ weighted sum + shared expert
//! add, norm ─ rows wanted ─ head
//! ```
//!
//! Numerics are chosen here and only here. `exact`: every activation, weight and cache is f32. `deployed`: activations are bf16;
//! norms read the unrounded f32 sum of the residual stream; router, index weights and head give f32; the latent and the index keys
//! are cached in fp8 after a Hadamard transform of the latter (where its width is a power of two); and if the checkpoint is
//! fp8, its block-quantised weights stay so, and what they multiply is quantised first, once a value. The expanded latent is the
//! exception: it comes dequantised from the cache, and quantising it again in blocks of the same 128 would give the same numbers.
//!
//! Nodes have the checkpoint's module names without `model.`. gate and up projections are stacked, gate first; experts are
//! stacked too: `[experts, 2 · width, hidden]`. Stacking that would cut scale blocks gives a plain weight instead.
//!
//! Outputs: `logits`; `tokens`, chosen from them; `hidden.i`, the residual stream into layer `i`, and after the last layer the final norm's result;
//! `topk.i` of each layer with an indexer; each cache, by its name; and in `exact` numerics `index_q.i` and `index_w.i`, from which and
//! the cached keys `dsc verify` makes index scores to judge ties. Kernels read both from memory anyway.

use super::config::{IndexerKind, MlpKind, ModelConfig};
use dsc_ir::artifact::{Numerics, TensorPart, WeightSource};
use dsc_ir::graph::{
    Graph, Op, Quant, RopeLayout, State, StateFormat, StepInput, TensorType, Value, ValueType, Weight,
};
use dsc_ir::{DType, Extent, Sym};
use std::collections::HashMap;

/// The indexer's layer norm has an epsilon of its own, which no config names.
const INDEX_NORM_EPS: f32 = 1e-6;

/// Epsilon of the norms of both latents. `rms_norm_eps` of the config does not reach them in the reference implementation: GLM-5 sets
/// 1e-5, and the golden case agrees to 1e-6 with this and to 1e-5 with that.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Logits of a part of a row whose largest one block finds.
const ARG_MAX_COLUMNS: u32 = 4096;

/// What to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOptions {
    /// Numerics of activations and caches.
    pub numerics: Numerics,
    /// Only these layers, in this order, under their own numbers; those that the model lacks are skipped. A layer that shares the
    /// selection of one left out runs that one's indexer itself. `None`: all.
    pub layers: Option<Vec<usize>>,
    /// Longest context in tokens: a selection never has more members.
    pub max_context: u32,
}

/// Which part of a model that several devices run together: tensor parallelism.
///
/// Each rank has its heads of attention, and its part of the inner columns of every MLP and every expert. Down and output projections
/// then give parts of sums, which [`Op::AllReduce`] adds. Everything else (embedding, indexer, gate, norms, head) each rank does
/// in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Ranks.
    pub ranks: u32,
    /// This one, from 0.
    pub rank: u32,
}

impl Default for Shard {
    fn default() -> Shard {
        Shard { ranks: 1, rank: 0 }
    }
}

impl Shard {
    /// Whether a model can be split so.
    ///
    /// # Errors
    /// What the number of ranks does not divide.
    pub fn check(self, config: &ModelConfig, numerics: Numerics) -> Result<(), String> {
        let ranks = self.ranks as usize;
        if ranks == 0 || self.rank >= self.ranks {
            return Err(format!("rank {} of {ranks}: ranks are numbered from 0", self.rank));
        }
        let quantization = config.quantization.filter(|_| numerics == Numerics::Deployed && ranks > 1);
        let block = quantization.map_or(1, |q| q.block[0].max(q.block[1]));
        let c = config;
        let sizes = [
            ("attention heads", c.heads, 1),
            ("columns of queries", c.heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), block),
            ("columns of keys and values", c.heads * (c.qk_nope_head_dim + c.v_head_dim), block),
            ("columns of attention", c.heads * c.v_head_dim, block),
            ("columns of a dense MLP", c.intermediate, block),
            ("columns of an expert", c.moe_intermediate, block),
        ];
        match sizes.into_iter().find(|(_, n, block)| !n.is_multiple_of(ranks * block)) {
            None => Ok(()),
            Some((what, n, 1)) => Err(format!("{n} {what} cannot be split over {ranks} ranks")),
            Some((what, n, block)) => Err(format!(
                "{n} {what} cannot be split over {ranks} ranks in whole blocks of {block} that share a scale"
            )),
        }
    }
}

/// Along which axis ranks share a matrix.
#[derive(Clone, Copy, PartialEq)]
enum Split {
    /// Each has all of it.
    Whole,
    /// Each has some of its outputs.
    Rows,
    /// Each has some of the columns it contracts.
    Columns,
}

/// The graph of one step of the model.
pub fn build(config: &ModelConfig, opts: &BuildOptions) -> Graph {
    build_rank(config, opts, Shard::default())
}

/// The graph of one step of a rank's part of the model, which [`Shard::check`] has passed.
pub fn build_rank(config: &ModelConfig, opts: &BuildOptions, shard: Shard) -> Graph {
    let mut b = Builder::new(config, opts, shard);
    b.model();
    b.graph
}

/// Sizes beyond any real model become ones that the verifier refuses.
fn dim(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

struct Builder<'c> {
    config: &'c ModelConfig,
    opts: &'c BuildOptions,
    shard: Shard,
    graph: Graph,
    inputs: HashMap<StepInput, Value>,
    rope_table: Option<Value>,
    /// The quantised form of values that have one.
    quantised: HashMap<Value, Value>,
    /// The latest selection and the full layer it comes from.
    selection: Option<(usize, Value)>,
    /// Element type of activations.
    act: DType,
}

impl<'c> Builder<'c> {
    fn new(config: &'c ModelConfig, opts: &'c BuildOptions, shard: Shard) -> Builder<'c> {
        let act = match opts.numerics {
            Numerics::Exact => DType::F32,
            Numerics::Deployed => DType::Bf16,
        };
        Builder {
            config,
            opts,
            shard,
            graph: Graph::default(),
            inputs: HashMap::new(),
            rope_table: None,
            quantised: HashMap::new(),
            selection: None,
            act,
        }
    }

    fn deployed(&self) -> bool {
        self.opts.numerics == Numerics::Deployed
    }

    fn model(&mut self) {
        let c = self.config;
        for input in StepInput::ALL {
            let ty = TensorType::plain(DType::I32, &input.shape());
            let name = format!("{input:?}").to_lowercase();
            let value = self.graph.add1(name, Op::Input(input), &[], ty);
            self.inputs.insert(input, value);
        }
        let table = self.plain_matrix("embed_tokens", "model.embed_tokens", c.vocab, c.hidden);
        let tokens = self.input(StepInput::Tokens);
        let mut h =
            self.op("embed_tokens", Op::Embed, &[tokens, table], self.act, &[Sym::T.into(), dim(c.hidden).into()]);
        let mut residual = None;
        let all: Vec<usize> = (0..c.layers).collect();
        for &layer in self.opts.layers.as_ref().unwrap_or(&all).iter().filter(|&&l| l < c.layers) {
            let name = format!("layers.{layer}");
            let (x, r) = self.add_norm(&format!("{name}.input_layernorm"), h, residual);
            self.output(format!("hidden.{layer}"), r);
            let attention = self.attention(layer, &format!("{name}.self_attn"), x);
            let (x, r) = self.add_norm(&format!("{name}.post_attention_layernorm"), attention, Some(r));
            h = match c.mlps[layer] {
                MlpKind::Dense => self.mlp(&format!("{name}.mlp"), x, c.intermediate, self.act),
                MlpKind::Moe => self.moe(&format!("{name}.mlp"), x),
            };
            h = self.all_reduce(&format!("{name}.mlp"), h);
            residual = Some(r);
        }
        let (x, _) = self.add_norm("norm", h, residual);
        self.output(format!("hidden.{}", c.layers), x);
        self.head(x, table);
        // The sum that goes into the final norm needs no rounded copy.
        self.graph.remove_dead();
    }

    fn head(&mut self, x: Value, embedding: Value) {
        let c = self.config;
        let rows = self.input(StepInput::LogitRows);
        let wanted: [Extent; 2] = [Sym::L.into(), dim(c.hidden).into()];
        let x = self.op("lm_head.rows", Op::TakeRows, &[x, rows], self.act, &wanted);
        let w =
            if c.tie_word_embeddings { embedding } else { self.plain_matrix("lm_head", "lm_head", c.vocab, c.hidden) };
        let logits = self.op("lm_head", Op::Linear, &[x, w], DType::F32, &[Sym::L.into(), dim(c.vocab).into()]);
        self.output("logits".into(), logits);
        self.tokens(logits);
    }

    /// The token that each row's draw picks.
    fn tokens(&mut self, logits: Value) {
        let parts = dim(self.config.vocab).div_ceil(ARG_MAX_COLUMNS);
        let [largest, columns] = [DType::F32, DType::I32]
            .map(|dtype| ValueType::Tensor(TensorType::plain(dtype, &[Sym::L.into(), parts.into()])));
        let node = self.graph.add("tokens.largest", Op::ArgMax { parts }, &[logits], vec![largest, columns]);
        let [largest, columns] = [0, 1].map(|output| Value { node, output });
        let draws = self.input(StepInput::Draws);
        let tokens = self.op("tokens", Op::Sample, &[logits, largest, columns, draws], DType::I32, &[Sym::L.into()]);
        self.output("tokens".into(), tokens);
    }

    // ---- attention ----

    fn attention(&mut self, layer: usize, name: &str, x: Value) -> Value {
        let c = self.config;
        let [heads, nope, rope, v] = [self.mine(c.heads), c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim];
        let q_latent = self.linear(&format!("{name}.q_a_proj"), x, c.q_lora_rank, self.act);
        let q_latent = self.rms_norm(&format!("{name}.q_a_layernorm"), q_latent, LATENT_NORM_EPS);
        let q = self.split_linear(&format!("{name}.q_b_proj"), q_latent, heads * (nope + rope), self.act, Split::Rows);
        let q = self.heads(&format!("{name}.q"), q, heads, nope + rope);
        let q = self.rope(&format!("{name}.q_rope"), q, RopeLayout::Interleaved, nope);

        let cache = self.latent_cache(layer, name, x);
        let selected = self.select(layer, name, x, q_latent);

        let (pages, seqs) = (self.input(StepInput::PageTable), self.input(StepInput::Seqs));
        let cached = |columns: usize| -> [Extent; 3] { [Sym::S.into(), Sym::C.into(), dim(columns).into()] };
        let latent =
            self.op(&format!("{name}.latent"), Op::CacheLatent, &[cache, pages], self.act, &cached(c.kv_lora_rank));
        let k_rope = self.op(&format!("{name}.k_rope_cached"), Op::CacheRope, &[cache, pages], self.act, &cached(rope));
        let w = self.split_matrix(&format!("{name}.kv_b_proj"), heads * (nope + v), c.kv_lora_rank, Split::Rows);
        let kv = self.op(&format!("{name}.kv_b_proj"), Op::Linear, &[latent, w], self.act, &cached(heads * (nope + v)));
        let op = Op::MhaAttention { scale: c.softmax_scale() as f32, nope: dim(nope), value: dim(v), narrow: false };
        let out: [Extent; 2] = [Sym::T.into(), dim(heads * v).into()];
        let o = self.op(&format!("{name}.attention"), op, &[q, kv, k_rope, selected, seqs], self.act, &out);
        let o = self.split_linear(&format!("{name}.o_proj"), o, c.hidden, self.act, Split::Columns);
        self.all_reduce(name, o)
    }

    /// Key/value latent and rope key of the step, cached.
    fn latent_cache(&mut self, layer: usize, name: &str, x: Value) -> Value {
        let c = self.config;
        let [latent, rope] = [c.kv_lora_rank, c.qk_rope_head_dim].map(dim);
        let kv = self.linear(&format!("{name}.kv_a_proj_with_mqa"), x, c.kv_lora_rank + c.qk_rope_head_dim, self.act);
        let part = self.slice(&format!("{name}.kv_latent"), kv, 0, latent);
        let mut key = self.rms_norm(&format!("{name}.kv_a_layernorm"), part, LATENT_NORM_EPS);
        let k_rope = self.slice(&format!("{name}.k_rope_raw"), kv, latent, rope);
        let k_rope = self.rope(&format!("{name}.k_rope"), k_rope, RopeLayout::Interleaved, 0);
        let format = if self.deployed() {
            key = self.quantize(&format!("{name}.kv_latent_quant"), key, StateFormat::GROUP, true);
            StateFormat::LatentFp8 { latent, rope }
        } else {
            StateFormat::Latent { latent, rope, dtype: DType::F32 }
        };
        self.cache(format!("layers.{layer}.latent"), &format!("{name}.kv_cache"), format, &[key, k_rope])
    }

    /// The positions each token attends to.
    fn select(&mut self, layer: usize, name: &str, x: Value, q_latent: Value) -> Value {
        let kinds = &self.config.indexers;
        let source = (0..=layer).rev().find(|&l| kinds[l] == IndexerKind::Full).unwrap_or(layer);
        match self.selection {
            Some((from, selected)) if from == source && kinds[layer] == IndexerKind::Shared => selected,
            _ => {
                let selected = self.indexer(
                    layer,
                    &format!("{name}.indexer"),
                    &format!("layers.{source}.self_attn.indexer"),
                    x,
                    q_latent,
                );
                self.selection = Some((source, selected));
                self.output(format!("topk.{layer}"), selected);
                selected
            }
        }
    }

    fn indexer(&mut self, layer: usize, name: &str, weights: &str, x: Value, q_latent: Value) -> Value {
        let c = self.config;
        let (heads, width) = (c.index_n_heads, c.index_head_dim);
        let w = self.block_matrix(&format!("{weights}.wq_b"), heads * width, c.q_lora_rank);
        let q = self.linear_with(&format!("{name}.wq_b"), q_latent, w, heads * width, self.act);
        let q = self.heads(&format!("{name}.q"), q, heads, width);
        let q = self.index_key(&format!("{name}.q"), q);

        let w = self.block_matrix(&format!("{weights}.wk"), width, c.hidden);
        let k = self.linear_with(&format!("{name}.wk"), x, w, width, self.act);
        let gain = self.vector(&format!("{weights}.k_norm.weight"), width);
        let bias = self.vector(&format!("{weights}.k_norm.bias"), width);
        let k = self.like(&format!("{name}.k_norm"), Op::LayerNorm { eps: INDEX_NORM_EPS }, &[k, gain, bias], self.act);
        let k = self.index_key(&format!("{name}.k"), k);
        let format = match self.deployed() {
            true => StateFormat::IndexFp8 { dim: dim(width) },
            false => StateFormat::Index { dim: dim(width), dtype: DType::F32 },
        };
        let cache = self.cache(format!("layers.{layer}.index"), &format!("{name}.k_cache"), format, &[k]);

        let w = self.plain_matrix(
            &format!("{weights}.weights_proj"),
            &format!("model.{weights}.weights_proj"),
            heads,
            c.hidden,
        );
        let by_head: [Extent; 2] = [Sym::T.into(), dim(heads).into()];
        let weight = self.op(&format!("{name}.weights_proj"), Op::Linear, &[x, w], DType::F32, &by_head);
        let factor = ((heads as f64).powf(-0.5) * (width as f64).powf(-0.5)) as f32;
        let weight = self.like(&format!("{name}.weights_scale"), Op::Scale { factor }, &[weight], DType::F32);
        let [positions, seqs, pages] =
            [StepInput::Positions, StepInput::Seqs, StepInput::PageTable].map(|i| self.input(i));
        if !self.deployed() {
            self.output(format!("index_q.{layer}"), q);
            self.output(format!("index_w.{layer}"), weight);
        }
        let from = [q, weight, cache, positions, seqs, pages];
        let logits =
            self.op(&format!("{name}.logits"), Op::IndexerLogits, &from, DType::F32, &[Sym::T.into(), Sym::C.into()]);
        let k = dim(c.index_topk).min(self.opts.max_context.max(1));
        self.op(&format!("{name}.topk"), Op::TopK { k }, &[logits], DType::I32, &[Sym::T.into(), k.into()])
    }

    /// What happens to index queries and keys alike: rope, and deployed, a Hadamard transform and quantisation.
    fn index_key(&mut self, name: &str, x: Value) -> Value {
        let width = dim(self.config.index_head_dim);
        let layout = if self.config.indexer_rope_interleaved { RopeLayout::Interleaved } else { RopeLayout::Half };
        let mut x = self.rope(&format!("{name}_rope"), x, layout, 0);
        if !self.deployed() {
            return x;
        }
        if width.is_power_of_two() {
            x = self.like(&format!("{name}_hadamard"), Op::Hadamard, &[x], self.act);
        }
        self.quantize(&format!("{name}_quant"), x, width, true)
    }

    // ---- feed-forward ----

    /// A rank's part of the sum.
    fn mlp(&mut self, name: &str, x: Value, width: usize, out: DType) -> Value {
        let width = self.mine(width);
        let gate_up = [format!("{name}.gate_proj"), format!("{name}.up_proj")];
        let shape = [2 * width, self.config.hidden];
        let w = self.stacked(&format!("{name}.gate_up_proj"), &gate_up, &shape, width, Split::Rows);
        let y = self.linear_with(&format!("{name}.gate_up_proj"), x, w, 2 * width, self.act);
        let y = self.swiglu(name, y, width);
        self.split_linear(&format!("{name}.down_proj"), y, self.config.hidden, out, Split::Columns)
    }

    fn swiglu(&mut self, name: &str, gate_up: Value, width: usize) -> Value {
        let gate = self.slice(&format!("{name}.gate"), gate_up, 0, dim(width));
        let up = self.slice(&format!("{name}.up"), gate_up, dim(width), dim(width));
        self.like(&format!("{name}.act"), Op::SwiGlu, &[gate, up], self.act)
    }

    fn moe(&mut self, name: &str, x: Value) -> Value {
        let c = self.config;
        let (experts, weights) = self.gate(&format!("{name}.gate"), x);
        let y = self.experts(name, x, experts);
        let out: [Extent; 2] = [Sym::T.into(), dim(c.hidden).into()];
        if c.n_shared_experts == 0 {
            return self.op(&format!("{name}.combine"), Op::WeightedSum, &[y, weights], self.act, &out);
        }
        let routed = self.op(&format!("{name}.combine"), Op::WeightedSum, &[y, weights], DType::F32, &out);
        let shared = self.mlp(&format!("{name}.shared_experts"), x, c.n_shared_experts * c.moe_intermediate, self.act);
        self.op(&format!("{name}.add_shared"), Op::Add, &[routed, shared], self.act, &out)
    }

    /// Ids and weights of each token's experts.
    fn gate(&mut self, name: &str, x: Value) -> (Value, Value) {
        let c = self.config;
        let w = self.plain_matrix(name, &format!("model.{name}"), c.n_routed_experts, c.hidden);
        let by_expert: [Extent; 2] = [Sym::T.into(), dim(c.n_routed_experts).into()];
        let logits = self.op(name, Op::Linear, &[x, w], DType::F32, &by_expert);
        let scores = self.like(&format!("{name}.sigmoid"), Op::Sigmoid, &[logits], DType::F32);
        let bias = self.vector(&format!("{name}.e_score_correction_bias"), c.n_routed_experts);
        let biased = self.like(&format!("{name}.biased"), Op::Add, &[scores, bias], DType::F32);
        let k = dim(c.experts_per_token);
        let by_token: [Extent; 2] = [Sym::T.into(), k.into()];
        let op = Op::GroupTopK { groups: dim(c.n_group), keep: dim(c.topk_group), k };
        let experts = self.op(&format!("{name}.topk"), op, &[biased], DType::I32, &by_token);
        let chosen = self.op(&format!("{name}.chosen"), Op::TakeAlong, &[scores, experts], DType::F32, &by_token);
        let op = Op::Normalize { factor: c.routed_scaling_factor as f32, by_sum: c.norm_topk_prob };
        (experts, self.like(&format!("{name}.weights"), op, &[chosen], DType::F32))
    }

    fn experts(&mut self, name: &str, x: Value, experts: Value) -> Value {
        let c = self.config;
        let (n, width, hidden) = (c.n_routed_experts, self.mine(c.moe_intermediate), c.hidden);
        let per_token = dim(c.experts_per_token);
        let names = |of: &[&str]| -> Vec<String> {
            (0..n).flat_map(|e| of.iter().map(move |p| format!("{name}.experts.{e}.{p}"))).collect()
        };
        let rows = |columns: usize| -> [Extent; 3] { [Sym::T.into(), per_token.into(), dim(columns).into()] };
        let w = self.stacked(
            &format!("{name}.experts.gate_up_proj"),
            &names(&["gate_proj", "up_proj"]),
            &[n, 2 * width, hidden],
            width,
            Split::Rows,
        );
        let x = self.operand(x);
        let y = self.op(
            &format!("{name}.experts.gate_up_proj"),
            Op::ExpertLinear { per_token, x_sorted: false, y_sorted: false },
            &[x, w, experts],
            self.act,
            &rows(2 * width),
        );
        let y = self.swiglu(&format!("{name}.experts"), y, width);
        let (down, shape) = (names(&["down_proj"]), [n, hidden, width]);
        let w = self.stacked(&format!("{name}.experts.down_proj"), &down, &shape, hidden, Split::Columns);
        let y = self.operand(y);
        self.op(
            &format!("{name}.experts.down_proj"),
            Op::ExpertLinear { per_token, x_sorted: false, y_sorted: false },
            &[y, w, experts],
            self.act,
            &rows(hidden),
        )
    }

    // ---- ops ----

    fn input(&self, input: StepInput) -> Value {
        self.inputs[&input]
    }

    fn output(&mut self, name: String, value: Value) {
        if self.graph.outputs.iter().all(|(n, _)| *n != name) {
            self.graph.outputs.push((name, value));
        }
    }

    fn op(&mut self, name: &str, op: Op, inputs: &[Value], dtype: DType, shape: &[Extent]) -> Value {
        self.graph.add1(name, op, inputs, TensorType::plain(dtype, shape))
    }

    /// An op whose result has the shape of its first input.
    fn like(&mut self, name: &str, op: Op, inputs: &[Value], dtype: DType) -> Value {
        let shape = self.graph.tensor(inputs[0]).shape.clone();
        self.op(name, op, inputs, dtype, &shape)
    }

    /// The residual stream plus `h` (or `h` alone in the first layer), normed, and the new residual stream.
    fn add_norm(&mut self, name: &str, h: Value, residual: Option<Value>) -> (Value, Value) {
        let eps = self.config.rms_norm_eps as f32;
        let Some(residual) = residual else { return (self.rms_norm(name, h, eps), h) };
        let sum = self.like(&format!("{name}.add"), Op::Add, &[h, residual], DType::F32);
        let normed = self.rms_norm(name, sum, eps);
        let rounded = match self.act {
            DType::F32 => sum,
            act => self.like(&format!("{name}.residual"), Op::Cast, &[sum], act),
        };
        (normed, rounded)
    }

    fn rms_norm(&mut self, name: &str, x: Value, eps: f32) -> Value {
        let width = self.columns(x);
        let gain = self.vector(&format!("{name}.weight"), width);
        self.like(name, Op::RmsNorm { eps }, &[x, gain], self.act)
    }

    fn columns(&self, x: Value) -> usize {
        self.graph.tensor(x).shape.last().and_then(|e| e.constant()).unwrap_or(0) as usize
    }

    /// How many of something that is split are this rank's.
    fn mine(&self, all: usize) -> usize {
        all / self.shard.ranks.max(1) as usize
    }

    /// The sum of what the ranks have each made.
    fn all_reduce(&mut self, name: &str, x: Value) -> Value {
        match self.shard.ranks {
            1 => x,
            ranks => self.like(&format!("{name}.all_reduce"), Op::AllReduce { ranks }, &[x], self.act),
        }
    }

    fn slice(&mut self, name: &str, x: Value, start: u32, len: u32) -> Value {
        let mut shape = self.graph.tensor(x).shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = len.into();
        }
        self.op(name, Op::SliceLast { start, len }, &[x], self.act, &shape)
    }

    fn heads(&mut self, name: &str, x: Value, heads: usize, width: usize) -> Value {
        self.op(name, Op::Reshape, &[x], self.act, &[Sym::T.into(), dim(heads).into(), dim(width).into()])
    }

    fn rope(&mut self, name: &str, x: Value, layout: RopeLayout, start: usize) -> Value {
        let table = match self.rope_table {
            Some(table) => table,
            None => {
                let frequencies = self.config.rope_frequencies();
                let ty = TensorType::plain(DType::F32, &[Sym::C.into(), dim(2 * frequencies.len()).into()]);
                let table = self.weight("rope_table", ty, WeightSource::RopeTable { frequencies });
                *self.rope_table.insert(table)
            }
        };
        let positions = self.input(StepInput::Positions);
        self.like(name, Op::Rope { layout, start: dim(start) }, &[x, positions, table], self.act)
    }

    fn quantize(&mut self, name: &str, x: Value, block: u32, pow2: bool) -> Value {
        let ty = TensorType::quant(Quant { block: [1, block], pow2 }, &self.graph.tensor(x).shape.clone());
        self.graph.add1(name, Op::Quantize, &[x], ty)
    }

    fn cache(&mut self, state: String, name: &str, format: StateFormat, parts: &[Value]) -> Value {
        let index = self.graph.states.len() as u32;
        self.graph.states.push(State { name: state.clone(), format });
        let old = self.graph.add(state.clone(), Op::State(index), &[], vec![ValueType::State(format)]);
        let mut inputs = vec![Value { node: old, output: 0 }, self.input(StepInput::Slots)];
        inputs.extend_from_slice(parts);
        let node = self.graph.add(name, Op::CacheWrite, &inputs, vec![ValueType::State(format)]);
        let written = Value { node, output: 0 };
        self.output(state, written);
        written
    }

    /// `x` times the block-quantised (or plain) matrix of module `name`.
    fn linear(&mut self, name: &str, x: Value, rows: usize, out: DType) -> Value {
        self.split_linear(name, x, rows, out, Split::Whole)
    }

    fn split_linear(&mut self, name: &str, x: Value, rows: usize, out: DType, split: Split) -> Value {
        let w = self.split_matrix(name, rows, self.columns(x), split);
        self.linear_with(name, x, w, rows, out)
    }

    fn linear_with(&mut self, name: &str, x: Value, w: Value, rows: usize, out: DType) -> Value {
        let mut shape = self.graph.tensor(x).shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = dim(rows).into();
        }
        let x = self.operand(x);
        self.op(name, Op::Linear, &[x, w], out, &shape)
    }

    /// What a linear over checkpoint-quantised weights reads: `x` quantised (once), or `x` itself.
    fn operand(&mut self, x: Value) -> Value {
        let Some(quantization) = self.config.quantization.filter(|_| self.deployed()) else { return x };
        if let Some(&quantised) = self.quantised.get(&x) {
            return quantised;
        }
        let name = format!("{}.quant", self.graph.dag[x.node].name);
        let quantised = self.quantize(&name, x, dim(quantization.block[1]), quantization.scale_pow2);
        self.quantised.insert(x, quantised);
        quantised
    }

    // ---- weights ----

    fn weight(&mut self, name: &str, ty: TensorType, source: WeightSource) -> Value {
        let known = self.graph.weights.iter().position(|w| w.name == name);
        let index = known.unwrap_or(self.graph.weights.len());
        if known.is_none() {
            self.graph.weights.push(Weight { name: name.into(), ty: ty.clone(), source });
        }
        self.graph.add1(name, Op::Weight(index as u32), &[], ty)
    }

    /// All of a stored tensor.
    fn part(&self, tensor: String, rows: usize, columns: usize, quantised: bool) -> TensorPart {
        let [rows, columns] = [rows, columns].map(dim);
        let quantization = self.config.quantization.filter(|_| quantised);
        TensorPart {
            scale: quantization.map(|_| format!("{tensor}_scale_inv")),
            scale_block: quantization.map_or([1, 1], |q| q.block.map(dim)),
            shape: [rows, columns],
            rows: [0, rows],
            cols: [0, columns],
            tensor,
        }
    }

    /// A vector, in f32 whatever it is stored in; `name` is the tensor's without `model.`.
    fn vector(&mut self, name: &str, n: usize) -> Value {
        let part = self.part(format!("model.{name}"), 1, n, false);
        self.weight(name, TensorType::plain(DType::F32, &[dim(n).into()]), WeightSource::Tensors(vec![part]))
    }

    /// A matrix that no checkpoint quantises.
    fn plain_matrix(&mut self, name: &str, module: &str, rows: usize, columns: usize) -> Value {
        let part = self.part(format!("{module}.weight"), rows, columns, false);
        let ty = TensorType::plain(self.act, &[dim(rows).into(), dim(columns).into()]);
        self.weight(&format!("{name}.weight"), ty, WeightSource::Tensors(vec![part]))
    }

    /// A matrix that fp8 checkpoints quantise.
    fn block_matrix(&mut self, module: &str, rows: usize, columns: usize) -> Value {
        self.split_matrix(module, rows, columns, Split::Whole)
    }

    /// A rank's part of one.
    fn split_matrix(&mut self, module: &str, rows: usize, columns: usize, split: Split) -> Value {
        self.stacked(module, &[module.to_string()], &[rows, columns], rows, split)
    }

    /// Matrices of `rows` rows each that fp8 checkpoints quantise, stacked to `shape`; of split ones, this rank's parts.
    fn stacked(&mut self, name: &str, modules: &[String], shape: &[usize], rows: usize, split: Split) -> Value {
        let columns = shape.last().copied().unwrap_or(0);
        let per_matrix = shape[shape.len() - 2] / rows.max(1);
        let dims: Vec<Extent> = shape.iter().map(|&n| dim(n).into()).collect();
        let ty = match self.config.quantization.filter(|_| self.deployed()) {
            None => TensorType::plain(self.act, &dims),
            Some(q) if per_matrix > 1 && !rows.is_multiple_of(q.block[0]) => TensorType::plain(DType::F32, &dims),
            Some(q) => TensorType::quant(Quant { block: q.block.map(dim), pow2: false }, &dims),
        };
        let (ranks, rank) = (self.shard.ranks, self.shard.rank);
        let part = |m: &String| {
            let mut part = self.part(format!("model.{m}.weight"), rows, columns, true);
            let axis = match split {
                Split::Whole => return part,
                Split::Rows => 0,
                Split::Columns => 1,
            };
            let mine = part.shape[axis];
            part.shape[axis] = mine * ranks;
            *if axis == 0 { &mut part.rows } else { &mut part.cols } = [rank * mine, (rank + 1) * mine];
            part
        };
        let parts = modules.iter().map(part).collect();
        self.weight(&format!("{name}.weight"), ty, WeightSource::Tensors(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsc_ir::graph::text::parse;
    use dsc_ir::graph::verify::verify;

    fn config(path: &str) -> ModelConfig {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        ModelConfig::read(&dir).expect("a config")
    }

    fn checked(config: &ModelConfig, numerics: Numerics, layers: Option<Vec<usize>>) -> Graph {
        let graph = build(config, &BuildOptions { numerics, layers, max_context: 4096 });
        assert_eq!(verify(&graph), []);
        graph
    }

    #[test]
    fn real_models_build_and_verify() {
        for path in ["examples/deepseek-v3.2", "examples/glm-5"] {
            let config = config(path);
            for numerics in [Numerics::Exact, Numerics::Deployed] {
                let graph = checked(&config, numerics, None);
                assert_eq!(graph.states.len(), 2 * config.layers);
            }
        }
    }

    #[test]
    fn graphs_round_trip_through_text() {
        for path in
            ["tests/golden/v32-tiny", "tests/golden/glm-tiny", "tests/golden/v32-heads-fp8", "examples/tiny-model"]
        {
            for numerics in [Numerics::Exact, Numerics::Deployed] {
                let graph = checked(&config(path), numerics, None);
                let text = graph.to_string();
                let back = parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
                assert!(back == graph, "{path}");
                assert_eq!(back.to_string(), text, "{path}");
            }
        }
    }

    #[test]
    fn selections_are_shared_and_inputs_quantised_once() {
        let glm = checked(&config("tests/golden/glm-tiny"), Numerics::Deployed, None);
        let count = |g: &Graph, op: fn(&Op) -> bool| g.dag.node_weights().filter(|n| op(&n.op)).count();
        assert_eq!(count(&glm, |op| matches!(op, Op::TopK { .. })), 3);
        assert_eq!(
            count(&glm, |op| matches!(op, Op::Quantize)),
            6 + 2 * 3,
            "a BF16 checkpoint quantises for caches only"
        );
        let fp8 = checked(&config("tests/golden/v32-heads-fp8"), Numerics::Deployed, Some(vec![0]));
        // Latent, index query, index key; attention input, query latent, attention output, MLP input, MLP activation.
        assert_eq!(count(&fp8, |op| matches!(op, Op::Quantize)), 8);
        assert!(
            count(&checked(&config("tests/golden/v32-heads-fp8"), Numerics::Exact, None), |op| matches!(
                op,
                Op::Quantize
            )) == 0
        );
    }

    #[test]
    fn subsets_of_layers_build() {
        let config = config("tests/golden/glm-tiny");
        let graph = checked(&config, Numerics::Exact, Some(vec![0, 3, 5, 99]));
        let names: Vec<&str> = graph.outputs.iter().map(|(n, _)| n.as_str()).collect();
        assert!(names.contains(&"topk.3") && names.contains(&"hidden.6") && names.contains(&"topk.5"), "{names:?}");
    }

    #[test]
    fn exact_indexers_show_what_scores_are_made_of() {
        let config = config("tests/golden/glm-tiny");
        let named = |numerics, prefix: &str| {
            let graph = checked(&config, numerics, None);
            let names = graph.outputs.iter().map(|(name, _)| name.as_str());
            names.filter_map(|n| n.strip_prefix(prefix).map(str::to_string)).collect::<Vec<_>>()
        };
        for prefix in ["index_q.", "index_w."] {
            assert_eq!(named(Numerics::Exact, prefix), named(Numerics::Exact, "topk."));
            assert!(named(Numerics::Deployed, prefix).is_empty());
        }
    }
}
