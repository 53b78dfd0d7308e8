//! Graph IR: one step of a model (a prefill chunk or a decode step) as typed ops on tensors.
//!
//! A [`Graph`] is a petgraph DAG of [`Node`]s; an edge carries one output of a node to one input of another. Tensors have
//! symbolic dims ([`Extent`]) and element types that include quantised ones ([`Elem::Quant`]); caches are explicit state that
//! ops take and return, so a read after a write is a data dependence.
//!
//! Numerics are visible in the types: an op computes in f32 and rounds once to its declared output type; activation
//! quantisation is an op of its own. So `exact` and `deployed` are two graphs of one front end, and one interpreter runs both.
//!
//! **Invariants** (checked by the verifier): acyclic; every input of a node is fed by exactly one edge; output types follow from
//! input types and attributes up to the choice of the output's element type; [`Op::Arg`] occurs in fused bodies, and in graphs
//! that declare [`Graph::args`].

pub mod infer;
pub mod interp;
pub mod text;
pub mod verify;
pub mod weights;

use crate::artifact::WeightSource;
use crate::dtype::DType;
use crate::extent::Extent;
use petgraph::Direction;
use petgraph::stable_graph::{NodeIndex, StableDiGraph};
use petgraph::visit::EdgeRef;
use serde::{Deserialize, Serialize};
use std::collections::BinaryHeap;

/// A node of the graph.
pub type NodeId = NodeIndex<u32>;

/// How the elements of a tensor are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Elem {
    /// One value an element.
    Plain(DType),
    /// e4m3 codes with an f32 scale (a multiplier) for each block of the last two dims.
    Quant(Quant),
}

impl Elem {
    /// Bytes of an element, or of its code.
    pub fn bytes(self) -> u64 {
        match self {
            Elem::Plain(dtype) => dtype.bytes() as u64,
            Elem::Quant(_) => DType::E4m3.bytes() as u64,
        }
    }
}

/// Block quantisation to e4m3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Quant {
    /// Rows and columns that share a scale: `[1, 128]` for activations, `[128, 128]` for weights.
    pub block: [u32; 2],
    /// Whether scales are powers of two (`ue8m0`).
    pub pow2: bool,
}

/// Shape and storage of a tensor, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorType {
    /// Size of each dim.
    pub shape: Vec<Extent>,
    /// Storage of the elements.
    pub elem: Elem,
}

impl TensorType {
    /// A tensor of plain elements.
    pub fn plain(dtype: DType, shape: &[Extent]) -> TensorType {
        TensorType { shape: shape.to_vec(), elem: Elem::Plain(dtype) }
    }

    /// A tensor of e4m3 codes and block scales.
    pub fn quant(quant: Quant, shape: &[Extent]) -> TensorType {
        TensorType { shape: shape.to_vec(), elem: Elem::Quant(quant) }
    }

    /// Shape of the scales of a quantised tensor: the last two dims divided by the block, rounding up. A dim divided by 1
    /// may be symbolic; any other must be constant.
    pub fn scale_shape(&self) -> Option<Vec<Extent>> {
        let Elem::Quant(q) = self.elem else { return None };
        let mut shape = self.shape.clone();
        let rank = shape.len();
        for (dim, block) in [(rank.checked_sub(1)?, q.block[1]), (rank.checked_sub(2)?, q.block[0])] {
            if block > 1 {
                shape[dim] = shape[dim].constant()?.div_ceil(block).into();
            }
        }
        Some(shape)
    }
}

/// Columns of each part of an [`Op::LinearPartial`] or [`Op::ArgMax`] over `k` columns but the last: a multiple of 128, the usual
/// scale block.
pub fn part_columns(k: u32, parts: u32) -> u32 {
    k.div_ceil(128).div_ceil(parts.max(1)).saturating_mul(128)
}

fn is_false(x: &bool) -> bool {
    !x
}

/// Tokens a cache page holds.
pub const PAGE_TOKENS: u32 = 64;

/// What a cache holds for each token, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateFormat {
    /// MLA latent in e4m3 with a power-of-two f32 scale for each 128, then the rope key in bf16, token by token: 656 bytes at
    /// 512 + 64 (the layout the serving engines share).
    LatentFp8 {
        /// Elements of the latent.
        latent: u32,
        /// Elements of the rope key.
        rope: u32,
    },
    /// MLA latent and rope key side by side, plain.
    Latent {
        /// Elements of the latent.
        latent: u32,
        /// Elements of the rope key.
        rope: u32,
        /// Element type.
        dtype: DType,
    },
    /// Index keys in e4m3: in each page the codes of all its tokens, then their f32 scales.
    IndexFp8 {
        /// Elements of a key.
        dim: u32,
    },
    /// Index keys, plain.
    Index {
        /// Elements of a key.
        dim: u32,
        /// Element type.
        dtype: DType,
    },
}

impl StateFormat {
    /// Elements that share a scale in the fp8 formats.
    pub const GROUP: u32 = 128;

    /// Bytes of one token's row ([`StateFormat::LatentFp8`] rows are padded to a multiple of 16).
    pub fn row_bytes(self) -> u32 {
        match self {
            StateFormat::LatentFp8 { latent, rope } => {
                (latent.next_multiple_of(4) + 4 * latent.div_ceil(Self::GROUP) + 2 * rope).next_multiple_of(16)
            }
            StateFormat::Latent { latent, rope, dtype } => (latent + rope) * dtype.bytes() as u32,
            StateFormat::IndexFp8 { dim } => dim.next_multiple_of(4) + 4,
            StateFormat::Index { dim, dtype } => dim * dtype.bytes() as u32,
        }
    }

    /// Bytes of one page.
    pub fn page_bytes(self) -> u32 {
        self.row_bytes() * PAGE_TOKENS
    }
}

/// The type of a graph value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ValueType {
    /// Data made in this step, or a weight.
    Tensor(TensorType),
    /// A cache that lives across steps.
    State(StateFormat),
}

impl ValueType {
    /// The tensor type, if it is a tensor.
    pub fn tensor(&self) -> Option<&TensorType> {
        match self {
            ValueType::Tensor(t) => Some(t),
            ValueType::State(_) => None,
        }
    }
}

/// What the runtime feeds a step with. All are i32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepInput {
    /// `[T]`: token ids, each below the vocabulary size.
    Tokens,
    /// `[T]`: position of each token in its sequence.
    Positions,
    /// `[T]`: the sequence of each token, a row of the page table.
    Seqs,
    /// `[T]`: where each token's keys are cached: page number times [`PAGE_TOKENS`] plus offset in the page.
    Slots,
    /// `[S, P]`: the pages of each sequence in order of position; −1 where it has none.
    PageTable,
    /// `[L]`: the tokens of the step whose logits are wanted.
    LogitRows,
    /// `[L, 3]`: how each of those rows chooses its token: the bits of a [`Draw`](crate::sample::Draw).
    Draws,
}

impl StepInput {
    /// Every input.
    pub const ALL: [StepInput; 7] = [
        StepInput::Tokens,
        StepInput::Positions,
        StepInput::Seqs,
        StepInput::Slots,
        StepInput::PageTable,
        StepInput::LogitRows,
        StepInput::Draws,
    ];

    /// Its shape.
    pub fn shape(self) -> Vec<Extent> {
        use crate::extent::Sym;
        match self {
            StepInput::PageTable => vec![Sym::S.into(), Sym::P.into()],
            StepInput::LogitRows => vec![Sym::L.into()],
            StepInput::Draws => vec![Sym::L.into(), 3.into()],
            _ => vec![Sym::T.into()],
        }
    }
}

/// Which elements a rotary embedding pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeLayout {
    /// Elements `2i` and `2i + 1`.
    Interleaved,
    /// Elements `i` and `i + dim / 2`.
    Half,
}

/// What [`Op::Normalize`] adds to a sum.
pub const LEAST_SUM: f32 = 1e-20;

/// A graph operation. "Rounds" means: to the declared element type of the output. Inputs in order of the doc line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// A step input. No inputs.
    Input(StepInput),
    /// The weight of that index in [`Graph::weights`]. No inputs.
    Weight(u32),
    /// The cache of that index in [`Graph::states`], as it was before the step. No inputs.
    State(u32),
    /// The argument of that number of a fused body, or of the graph ([`Graph::args`]). No inputs.
    Arg(u32),

    /// `(ids [T], table [V, D])`: rows of the table.
    Embed,
    /// `(x [T, ..], rows [L])`: rows of `x`.
    TakeRows,
    /// `(x)`: rounds.
    Cast,
    /// `(a, b)` of one shape, or b `[D]` with D the last dim of a: sum, rounds.
    Add,
    /// `(x)`: times a constant, rounds.
    Scale {
        /// The constant.
        factor: f32,
    },
    /// `(x [.., D], gain [D])`: `x / sqrt(mean(x²) + eps) * gain`, rounds.
    RmsNorm {
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x [.., D], gain [D], bias [D])`: normalises mean and variance, rounds.
    LayerNorm {
        /// Added to the variance.
        eps: f32,
    },
    /// `(x [.., K], w [N, K])`: `x · wᵀ`, rounds. Either side may be quantised. With an f32 output nothing is rounded.
    Linear,
    /// `(x [T, K], w [N, K])`: f32 `[T, parts, N]`: the sum of [`Op::Linear`] in parts: `x · wᵀ` over the columns
    /// `p·c..(p + 1)·c`, with `c` as [`part_columns`] gives it. For products with few outputs, whose parts run side by side.
    LinearPartial {
        /// Parts of K.
        parts: u32,
    },
    /// `(x [T, P, N])` f32: `Σ_p x_p` in ascending `p`, `[T, N]`, rounds.
    SumPartials,
    /// `(x [T, H, A], w [H·R, K])`: for each head `h` the rows `first..first + count` of its `R` rows of `w`, `wh [count, K]`:
    /// `x_h · wh` (`A = count`, result `[T, H, K]`), or `x_h · whᵀ` if `transposed` (`A = K`, result `[T, H, count]`). Rounds.
    HeadLinear {
        /// First row of each head.
        first: u32,
        /// Rows of each head.
        count: u32,
        /// Which side is contracted.
        transposed: bool,
    },
    /// `(x [.., D])`: columns `start..start + len` of the last dim.
    SliceLast {
        /// First column.
        start: u32,
        /// Columns.
        len: u32,
    },
    /// `(x)`: the declared output shape, same elements.
    Reshape,
    /// `(x [T, .., D], positions [T], table [C, dim])`: rotates elements `start..start + dim` of the last dim. Row `p` of the f32
    /// table holds `dim / 2` cosines then `dim / 2` sines of position `p`. Rounds.
    Rope {
        /// Which elements pair up.
        layout: RopeLayout,
        /// First rotated element.
        start: u32,
    },
    /// `(x [.., D])`, D a power of two: `D^-0.5 · H x` with `H[i][j] = (−1)^popcount(i & j)`, rounds.
    Hadamard,
    /// `(x)` to the declared quantised type with blocks `[1, n]`: scale `max(amax, 1e-4) / 448`, rounded up to a power of two
    /// if the type says so.
    Quantize,
    /// `(x)` quantised to plain: codes times scales, rounds.
    Dequantize,
    /// `(state, slots [T], latent [T, L], rope [T, R])` or `(state, slots [T], key [T, D])`: the state with these rows written.
    /// The fp8 formats take their first part quantised with blocks `[1, 128]` (latent) or `[1, D]` (key).
    CacheWrite,
    /// `(state, page_table [S, P])` of a latent cache: `[S, C, latent]` by position, dequantised; or, of an fp8 cache, its codes
    /// and scales as a quantised tensor of the cache's blocks. Rows past the cached ones are unspecified.
    CacheLatent,
    /// `(state, page_table [S, P])` of a latent cache: `[S, C, rope]` by position.
    CacheRope,
    /// `(state, page_table [S, P])` of a latent cache: `[C, latent + rope]`: the rows of the first sequence by position, dequantised,
    /// rounds. Rows past the cached ones are unspecified.
    CacheRows,
    /// `(q [T, H, D], weights [T, H] f32, state, positions [T], seqs [T], page_table)`: f32 `[T, C]`:
    /// `Σ_h max(q_h · k_s, 0) · weights_h` for positions `s` up to the token's own, −inf beyond.
    ///
    /// Two forms without step inputs, whose other columns are unspecified, and whose `q` may be plain e4m3:
    /// `(q, weights, state, ends [T], page_table [S, P])`: positions below `ends[t]`; token `t` is of sequence `t / (T / S)`.
    /// `(q, weights, keys [C, D], starts [T], ends [T])`: rows `starts[t]..ends[t]` of a matrix of keys.
    IndexerLogits,
    /// `(x [T, C])` f32: i32 `[T, k]`: the columns of the `k` largest values of each row in ascending order, lowest column first
    /// among equals; −inf is never selected, the tail is −1. `(x, ends [T])`: of the columns below `ends[t]`;
    /// `(x, starts [T], ends [T])`: of the columns `starts[t]..ends[t]`.
    TopK {
        /// Members of each row.
        k: u32,
    },
    /// `(q [T, H, N + R], kv [S, C, H·(N + V)], rope [S, C, R], selected [T, k], seqs [T])`: softmax attention of each head over the
    /// selected positions of the token's sequence; `kv` holds for each head N key then V value elements. `[T, H·V]`, rounds.
    MhaAttention {
        /// Multiplies the scores.
        scale: f32,
        /// N.
        nope: u32,
        /// V.
        value: u32,
        /// Whether probabilities round to bf16 before they multiply values; their sum does not.
        #[serde(default, skip_serializing_if = "is_false")]
        narrow: bool,
    },
    /// `(q_latent [T, H, L], q_rope [T, H, R], state, selected [T, k], seqs [T], page_table)`: softmax attention with one shared key
    /// (latent and rope) and the latent as value: `[T, H, L]`, rounds; 0 if nothing is selected.
    ///
    /// Two forms without `seqs`: `(.., state, selected, page_table [S, P])`: token `t` is of sequence `t / (T / S)`.
    /// `(.., state, selected)`: what is selected are slots. That form may have a matrix `[C, L + R]` of keys for a state, of
    /// which rows are selected. A selection outside the state or matrix counts as none.
    ///
    /// Two more outputs, where declared, f32 `[T, H]`: the natural logarithm of `Σ exp(score)`, +inf if nothing is selected; and the
    /// largest score, −inf if nothing is selected.
    MqaAttention {
        /// Multiplies the scores.
        scale: f32,
        /// Whether weights round to bf16 before they multiply values; their sum does not. They are powers of two of a score less an integer, so that
        /// how they round does not depend on which.
        #[serde(default, skip_serializing_if = "is_false")]
        narrow: bool,
    },
    /// The inputs of [`Op::MqaAttention`]: the attention over each of `parts` parts of the selected positions, for
    /// [`Op::MqaCombine`] to join: f32 `Σ e_s c_s` `[T, H, parts, L]`, the largest score in units of `ln 2` and `Σ e_s`, both
    /// `[T, H, parts]`, with `e_s = 2^(score_s − largest)`. A part without positions is 0, a score below all others, 0. Which
    /// positions are in which part is the kernel's choice.
    MqaPartial {
        /// Multiplies the scores.
        scale: f32,
        /// Whether probabilities round to bf16 before they multiply values; their sum does not.
        #[serde(default, skip_serializing_if = "is_false")]
        narrow: bool,
        /// Parts.
        parts: u32,
    },
    /// `(sums [T, H, P, L], largest [T, H, P], totals [T, H, P])` of [`Op::MqaPartial`]: `[T, H, L]`, rounds; and the further
    /// outputs of [`Op::MqaAttention`], where declared.
    MqaCombine,
    /// `(gate, up)` of one shape: `silu(gate) · up`, rounds.
    SwiGlu,
    /// `(x)`: `1 / (1 + e^-x)`, rounds.
    Sigmoid,
    /// `(x [T, E])` f32: i32 `[T, k]`: columns of the `k` largest values among the `keep` groups (of `groups` equal ones) whose two
    /// largest values have the largest sum. Ascending columns; ties go to the lowest.
    GroupTopK {
        /// Equal groups of consecutive columns.
        groups: u32,
        /// Groups kept.
        keep: u32,
        /// Columns selected.
        k: u32,
    },
    /// `(x [T, E], columns [T, k])`: `x[t, columns[t, j]]`.
    TakeAlong,
    /// `(x [T, k])`: `[T, k + 1]` of the same type: `x` and a last column of one number.
    Append {
        /// The number.
        value: f32,
    },
    /// `(x [T, k])`: `x / (Σ_j x + 1e-20) · factor`, so that zeros stay zeros; as transformers has it.
    Normalize {
        /// The sum of the result.
        factor: f32,
        /// Whether to divide by the sum.
        by_sum: bool,
    },
    /// `(x, w [E, N, K], experts [T, k])` with x `[T, K]` or `[T, k, K]`: `[T, k, N]`: row `(t, j)` times expert `experts[t, j]`'s
    /// transposed matrix, rounds. After `group_experts` it takes `(x, w, order [T·k], offsets [E + 1])` instead, and `owners [T·k]` where
    /// a step has fewer rows than there are experts. Only then rows may be sorted: in the place of row `r` of x, or of the result, is
    /// row `order[r]`, and what is behind the last group is not looked at.
    ExpertLinear {
        /// k: experts a token.
        per_token: u32,
        /// Whether rows of x, `[T, k, K]`, are sorted.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        x_sorted: bool,
        /// Whether rows of the result are.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        y_sorted: bool,
    },
    /// `(experts [T, k])`: `order` i32 `[T·k]`: the flat rows `t·k + j` grouped by expert, in ascending order within one; and
    /// `offsets` i32 `[E + 1]`: where each expert's group starts; and `owners` i32 `[T·k]`: the expert of each place of `order`.
    Route {
        /// E.
        experts: u32,
    },
    /// `(y [T, k, D], weights [T, k] f32)`: f32-accumulated `Σ_j y_j · w_j` in ascending `j`, rounds.
    WeightedSum,
    /// `(x [L, V])` f32: f32 `[L, parts]` and i32 `[L, parts]`: the largest number among columns `p·c..(p + 1)·c`, with `c` as
    /// [`part_columns`] gives it, and its column, the lowest among equals; −inf and −1 where none of them is a number.
    ArgMax {
        /// Parts of a row.
        parts: u32,
    },
    /// `(x [L, V], largest [L, P], columns [L, P], draws [L, 3])` with the results of [`Op::ArgMax`] on x: i32 `[L]`: the token that
    /// each row's [`Draw`](crate::sample::Draw) picks, −1 where no logit is a number.
    Sample,
    /// `(x [T, D])` plain: the sum of the x of all ranks, in ascending order, rounds. Each rank runs a graph of its own, with the same
    /// nodes and its part of the weights; no kernel does this, and it overwrites x, which nothing else may read.
    AllReduce {
        /// Ranks.
        ranks: u32,
    },
    /// Ops that one kernel will run. Inputs are the body's arguments, outputs its outputs.
    Fused(Box<Fused>),
}

/// Why ops were fused: it decides which kernel emitter takes the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FusedKind {
    /// Each token's row by itself: norms, rope, quantisation, cache writes, sums.
    Row,
    /// Indexer logits, top-k and sparse MQA attention (or a part of that chain) by tiles of tokens.
    SparseAttention,
    /// Router logits to expert ids and weights; with a route, for all tokens at once.
    Gate,
    /// Each head of each token by itself: a product by head, rope, quantisation.
    Heads,
    /// A matrix product with what makes its operand or is made of its result, block by block: joined partial attention before
    /// it, SwiGLU and quantisation after it.
    Product,
    /// Two products of the same rows that need nothing of each other, each by blocks of its own; an output each, in order.
    Beside,
}

/// The body of a fused node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fused {
    /// What kind of kernel.
    pub kind: FusedKind,
    /// When the context (`C`) is at most this, every visible position is selected and scoring is skipped: logits that are a result
    /// are 0 where a position is visible. 0: never.
    pub select_all_below: u32,
    /// The ops; its [`Op::Arg`]s are the node's inputs, its outputs the node's outputs.
    pub body: Graph,
}

/// One op with its output types.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// The type of each output.
    pub outputs: Vec<ValueType>,
    /// Where it comes from, such as `layers.3.self_attn.q_a_proj`: for people and for verifier messages.
    pub name: String,
}

/// Which output of the source feeds which input of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// Output number at the source.
    pub output: u32,
    /// Input number at the target.
    pub input: u32,
}

/// One output of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Value {
    /// The node.
    pub node: NodeId,
    /// Which of its outputs.
    pub output: u32,
}

/// A weight of the model as the kernels read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Weight {
    /// Unique name.
    pub name: String,
    /// Shape and storage in device memory.
    pub ty: TensorType,
    /// How it is made from the checkpoint.
    pub source: WeightSource,
}

/// A cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Unique name, such as `layers.3.latent`.
    pub name: String,
    /// Its format.
    pub format: StateFormat,
}

/// An argument of a graph that is no step of a model: an entry point of a kernel library, whose caller gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Argument {
    /// Unique name.
    pub name: String,
    /// Its type.
    pub ty: ValueType,
}

/// A step of a model, an entry point of a kernel library, or the body of a fused node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Graph {
    /// The DAG.
    pub dag: StableDiGraph<Node, Edge, u32>,
    /// Weights, by index.
    pub weights: Vec<Weight>,
    /// Caches, by index.
    pub states: Vec<State>,
    /// Arguments, by index, of an entry point; it has no weights, caches and step inputs. A body's are those of its node.
    pub args: Vec<Argument>,
    /// Named results. A step has `logits` f32 `[L, V]`, `tokens` i32 `[L]`, the taps `hidden.i` and `topk.i`, and every written state.
    pub outputs: Vec<(String, Value)>,
}

impl Graph {
    /// Adds a node fed by `inputs`; returns its id. Its outputs are `Value { node, output: 0.. }`.
    pub fn add(&mut self, name: impl Into<String>, op: Op, inputs: &[Value], outputs: Vec<ValueType>) -> NodeId {
        let node = self.dag.add_node(Node { op, outputs, name: name.into() });
        for (input, v) in inputs.iter().enumerate() {
            self.dag.add_edge(v.node, node, Edge { output: v.output, input: input as u32 });
        }
        node
    }

    /// Adds a node with one tensor output.
    pub fn add1(&mut self, name: impl Into<String>, op: Op, inputs: &[Value], output: TensorType) -> Value {
        let node = self.add(name, op, inputs, vec![ValueType::Tensor(output)]);
        Value { node, output: 0 }
    }

    /// The values that feed a node, in order.
    pub fn inputs(&self, node: NodeId) -> Vec<Value> {
        let mut edges: Vec<(u32, Value)> = self
            .dag
            .edges_directed(node, Direction::Incoming)
            .map(|e| (e.weight().input, Value { node: e.source(), output: e.weight().output }))
            .collect();
        edges.sort_unstable();
        edges.into_iter().map(|(_, v)| v).collect()
    }

    /// The nodes that use a value, with the input number, in a fixed order.
    pub fn users(&self, value: Value) -> Vec<(NodeId, u32)> {
        let mut users: Vec<(NodeId, u32)> = self
            .dag
            .edges_directed(value.node, Direction::Outgoing)
            .filter(|e| e.weight().output == value.output)
            .map(|e| (e.target(), e.weight().input))
            .collect();
        users.sort_unstable();
        users
    }

    /// Whether a graph output names this value.
    pub fn is_output(&self, value: Value) -> bool {
        self.outputs.iter().any(|(_, v)| *v == value)
    }

    /// The type of a value.
    pub fn ty(&self, value: Value) -> &ValueType {
        &self.dag[value.node].outputs[value.output as usize]
    }

    /// The tensor type of a value; panics on a state (the verifier rules it out where ops want tensors).
    pub fn tensor(&self, value: Value) -> &TensorType {
        self.ty(value).tensor().expect("a tensor, by the verifier's rules")
    }

    /// Redirects every use of `old`, graph outputs included, to `new`.
    pub fn replace_uses(&mut self, old: Value, new: Value) {
        for (user, input) in self.users(old) {
            self.set_input(user, input, new);
        }
        for (_, v) in self.outputs.iter_mut().filter(|(_, v)| *v == old) {
            *v = new;
        }
    }

    /// Feeds input number `input` of `node` from `value` instead.
    pub fn set_input(&mut self, node: NodeId, input: u32, value: Value) {
        let old =
            self.dag.edges_directed(node, Direction::Incoming).find(|e| e.weight().input == input).map(|e| e.id());
        if let Some(edge) = old {
            self.dag.remove_edge(edge);
        }
        self.dag.add_edge(value.node, node, Edge { output: value.output, input });
    }

    /// Cuts a node off: nothing feeds it and it feeds nothing. Its id stays taken until [`Graph::remove_dead`].
    pub fn detach(&mut self, node: NodeId) {
        for direction in [Direction::Incoming, Direction::Outgoing] {
            let edges: Vec<_> = self.dag.edges_directed(node, direction).map(|e| e.id()).collect();
            edges.into_iter().for_each(|e| {
                self.dag.remove_edge(e);
            });
        }
    }

    /// Numbers nodes from 0 in the order of their ids. New nodes then get the highest ids instead of those of nodes that were
    /// removed, so equal layers of a model keep equal orders.
    pub fn close_gaps(&mut self) {
        let old = std::mem::take(&mut self.dag);
        let mut moved = std::collections::HashMap::new();
        for n in old.node_indices() {
            moved.insert(n, self.dag.add_node(old[n].clone()));
        }
        for e in old.edge_indices() {
            if let (Some((from, to)), Some(edge)) = (old.edge_endpoints(e), old.edge_weight(e)) {
                self.dag.add_edge(moved[&from], moved[&to], *edge);
            }
        }
        for (_, v) in &mut self.outputs {
            v.node = moved[&v.node];
        }
    }

    /// Removes nodes whose outputs nothing uses; returns how many.
    pub fn remove_dead(&mut self) -> usize {
        let mut removed = 0;
        loop {
            let dead: Vec<NodeId> = self
                .dag
                .node_indices()
                .filter(|&n| self.dag.edges_directed(n, Direction::Outgoing).next().is_none())
                .filter(|&n| !self.outputs.iter().any(|(_, v)| v.node == n))
                .collect();
            if dead.is_empty() {
                return removed;
            }
            removed += dead.len();
            for n in dead {
                self.dag.remove_node(n);
            }
        }
    }

    /// Nodes in a topological order that is stable: among ready nodes the oldest (lowest id) comes first. Nodes on a cycle are
    /// left out.
    pub fn order(&self) -> Vec<NodeId> {
        let mut waiting: Vec<usize> = vec![0; self.dag.node_indices().map(|n| n.index() + 1).max().unwrap_or(0)];
        let mut ready = BinaryHeap::new();
        for n in self.dag.node_indices() {
            waiting[n.index()] = self.dag.edges_directed(n, Direction::Incoming).count();
            if waiting[n.index()] == 0 {
                ready.push(std::cmp::Reverse(n));
            }
        }
        let mut order = Vec::with_capacity(self.dag.node_count());
        while let Some(std::cmp::Reverse(n)) = ready.pop() {
            order.push(n);
            for e in self.dag.edges_directed(n, Direction::Outgoing) {
                waiting[e.target().index()] -= 1;
                if waiting[e.target().index()] == 0 {
                    ready.push(std::cmp::Reverse(e.target()));
                }
            }
        }
        order
    }
}

impl PartialEq for Graph {
    /// Equality of the printed form's content: the same nodes in the same order with the same wiring.
    fn eq(&self, other: &Graph) -> bool {
        let (a, b) = (self.order(), other.order());
        let rank = |order: &[NodeId]| -> std::collections::HashMap<NodeId, usize> {
            order.iter().enumerate().map(|(i, &n)| (n, i)).collect()
        };
        let (ra, rb) = (rank(&a), rank(&b));
        let place = |r: &std::collections::HashMap<NodeId, usize>, v: &Value| (r.get(&v.node).copied(), v.output);
        let wired = |x: NodeId, y: NodeId| {
            let (ix, iy) = (self.inputs(x), other.inputs(y));
            ix.len() == iy.len() && ix.iter().zip(&iy).all(|(u, v)| place(&ra, u) == place(&rb, v))
        };
        a.len() == b.len()
            && self.weights == other.weights
            && self.states == other.states
            && self.args == other.args
            && a.iter().zip(&b).all(|(&x, &y)| self.dag[x] == other.dag[y] && wired(x, y))
            && self.outputs.len() == other.outputs.len()
            && self.outputs.iter().zip(&other.outputs).all(|((n, u), (m, v))| n == m && place(&ra, u) == place(&rb, v))
    }
}
