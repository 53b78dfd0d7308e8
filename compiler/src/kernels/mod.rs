//! The kernel library: a tile program for every node that launches.
//!
//! After the passes a step graph holds two sorts of nodes. Some are **names for memory**: step inputs, weights, caches, and
//! `slice_last` and `reshape` outside fused bodies, which [`resolve`] turns into strided views of the tensor they look at.
//! All others **launch**: [`emit`] writes their [`Program`], with one [`ArgRef`] a parameter that says which value of
//! the graph the memory planner must bind there.
//!
//! | family | nodes | block of the grid |
//! |---|---|---|
//! | [`embed`] | `embed` | tokens × columns |
//! | [`linear`] | `linear`, `head_linear`, and fused `product` bodies around them; `beside` bodies of two | rows × outputs (× sequence, part or head) |
//! | [`experts`] | `route`, `expert_linear`, and fused `product` bodies around it | one block; outputs × experts |
//! | [`rows`] | fused `row` bodies, and each of their ops alone; fused `heads` bodies | tokens (× heads) |
//! | [`gate`] | fused `gate` bodies, and each of their ops alone | tokens |
//! | [`sparse_attention`] | fused `sparse_attention` bodies, and each of their ops alone | tokens (× heads or pages × parts) |
//! | [`combine`] | `mqa_combine` by itself | tokens × heads |
//! | [`mha`] | `mha_attention` | tokens × heads |
//! | [`cache`] | `cache_latent`, `cache_rope`; `cache_rows` | pages × sequences; quarters of pages |
//! | [`sample`] | `arg_max`, `sample` | rows with logits (× parts) |
//!
//! Every emitter reads its dims from the types, model numbers never appear; ragged edges need no code, because loads outside
//! a view read zero and stores outside are dropped. A [`Schedule`] chooses tile sizes only: results may differ by
//! the order of f32 additions, selections not at all.
//!
//! **Invariants.** A program depends on ops, types, views, the schedule and the shape class, never on a layer's number: equal
//! kernels of different layers are equal programs. The last part of a name is a hash of the program, so that names are
//! unique and the same on every run.

use dsc_ir::graph::{Fused, FusedKind, Graph, NodeId, Op, Value, ValueType};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::Program;
use dsc_ir::{DType, Sym};
use std::borrow::Cow;

mod arithmetic;
pub mod cache;
mod chains;
pub mod combine;
pub mod embed;
mod epilogue;
pub mod experts;
pub mod gate;
mod heuristics;
pub mod linear;
pub mod mha;
pub mod rows;
pub mod sample;
mod softmax;
pub mod sparse_attention;
#[cfg(test)]
mod tests;
mod view;
mod work;

pub use crate::passes::Class;
pub use heuristics::{KernelShape, default_schedule, shape_of};
pub use view::{resolve, resolve_part, state_root};
pub use work::work_of;

/// Which array of a value a parameter is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// The elements, or the codes of a quantised tensor, or a cache.
    Data,
    /// The f32 scales of a quantised tensor.
    Scales,
}

/// What a parameter is bound to: a value that has memory of its own (a step input, a weight, a cache, or an output of a node
/// that launches).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ArgRef {
    /// The value.
    pub value: Value,
    /// Which of its arrays.
    pub part: Part,
}

/// A kernel and what it is launched with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emitted {
    /// The tile program.
    pub program: Program,
    /// One a parameter.
    pub args: Vec<ArgRef>,
    /// What it computes, for people.
    pub what: String,
}

/// Why a node has no kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// The kernel library does not do this.
    #[error("{node}: {what}")]
    Unsupported {
        /// The node's name.
        node: String,
        /// What is not supported, and what to do about it.
        what: String,
    },
    /// A `slice_last` or `reshape` cannot be read in place.
    #[error("{node}: {what} is no strided view of its tensor; materialise it with a cast, or fuse it")]
    Alias {
        /// The node's name.
        node: String,
        /// Which step of the alias.
        what: String,
    },
    /// The emitter wrote an ill-typed program: a bug of the kernel library.
    #[error("{node}: the emitted program is ill-typed: {message}")]
    Build {
        /// The node's name.
        node: String,
        /// The builder's message.
        message: String,
    },
}

/// Whether neighbouring tokens of a step may belong to different sequences.
pub(crate) fn several_sequences(class: &Class) -> bool {
    class.max.get(Sym::S) > 1
}

/// Whether a node needs a kernel (as opposed to being a name for memory).
pub fn launches(graph: &Graph, node: NodeId) -> bool {
    !matches!(
        graph.dag[node].op,
        Op::Input(_)
            | Op::Weight(_)
            | Op::State(_)
            | Op::Arg(_)
            | Op::SliceLast { .. }
            | Op::Reshape
            | Op::AllReduce { .. }
    )
}

/// The kernel of a node that [`launches`].
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    match &graph.dag[node].op {
        Op::Embed => embed::emit(graph, node, schedule, class),
        Op::Linear | Op::LinearPartial { .. } => linear::emit(graph, node, schedule, class),
        Op::HeadLinear { .. } => linear::emit_heads(graph, node, schedule, class),
        Op::ExpertLinear { .. } => experts::emit(graph, node, schedule, class),
        Op::Route { .. } => experts::emit_route(graph, node, schedule, class),
        Op::MqaCombine => combine::emit(graph, node, schedule, class),
        Op::MhaAttention { .. } => mha::emit(graph, node, schedule, class),
        Op::CacheLatent | Op::CacheRope => cache::emit(graph, node, schedule, class),
        Op::CacheRows => cache::emit_rows(graph, node),
        Op::ArgMax { .. } => sample::emit_arg_max(graph, node, schedule, class),
        Op::Sample => sample::emit(graph, node, schedule, class),
        _ => match body_of(graph, node)?.kind {
            FusedKind::Row | FusedKind::Heads => rows::emit(graph, node, schedule, class),
            FusedKind::Gate => gate::emit(graph, node, schedule, class),
            FusedKind::SparseAttention => sparse_attention::emit(graph, node, schedule, class),
            FusedKind::Product => emit_product(graph, node, schedule, class),
            FusedKind::Beside => linear::emit_beside(graph, node, schedule, class),
        },
    }
}

fn emit_product(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let body = body_of(graph, node)?;
    let product = epilogue::Epilogue::of(graph, node, &body.body)?.product;
    match body.body.dag[product].op {
        Op::HeadLinear { .. } => linear::emit_heads(graph, node, schedule, class),
        Op::ExpertLinear { .. } => experts::emit(graph, node, schedule, class),
        _ => linear::emit(graph, node, schedule, class),
    }
}

/// The body of a fused node; an op of a fused family that stands alone gets a body of its own.
pub(crate) fn body_of(graph: &Graph, node: NodeId) -> Result<Cow<'_, Fused>, KernelError> {
    let data = &graph.dag[node];
    let kind = match &data.op {
        Op::Fused(fused) => return Ok(Cow::Borrowed(fused)),
        Op::IndexerLogits | Op::TopK { .. } | Op::MqaAttention { .. } | Op::MqaPartial { .. } => {
            FusedKind::SparseAttention
        }
        Op::GroupTopK { .. } | Op::TakeAlong | Op::Normalize { .. } | Op::Append { .. } => FusedKind::Gate,
        Op::Linear | Op::LinearPartial { .. } | Op::HeadLinear { .. } | Op::ExpertLinear { .. } => FusedKind::Product,
        op if rows::supports(op) => FusedKind::Row,
        op => return Err(unsupported(graph, node, format!("no kernel computes {op:?}"))),
    };
    let mut body = Graph::default();
    let mut args = Vec::new();
    for (i, v) in graph.inputs(node).into_iter().enumerate() {
        let arg = body.add(format!("arg.{i}"), Op::Arg(i as u32), &[], vec![graph.ty(v).clone()]);
        args.push(Value { node: arg, output: 0 });
    }
    let only = body.add("op", data.op.clone(), &args, data.outputs.clone());
    body.outputs =
        (0..data.outputs.len() as u32).map(|i| (format!("out.{i}"), Value { node: only, output: i })).collect();
    Ok(Cow::Owned(Fused { kind, select_all_below: 0, body }))
}

pub(crate) fn unsupported(graph: &Graph, node: NodeId, what: impl Into<String>) -> KernelError {
    KernelError::Unsupported { node: graph.dag[node].name.clone(), what: what.into() }
}

/// The short lower-case name of an op, for program names.
pub(crate) fn op_name(op: &Op) -> &'static str {
    match op {
        Op::Input(_) => "input",
        Op::Weight(_) => "weight",
        Op::State(_) => "state",
        Op::Arg(_) => "arg",
        Op::Embed => "embed",
        Op::TakeRows => "take",
        Op::Cast => "cast",
        Op::Add => "add",
        Op::Scale { .. } => "scale",
        Op::RmsNorm { .. } => "rmsnorm",
        Op::LayerNorm { .. } => "layernorm",
        Op::Linear => "linear",
        Op::LinearPartial { .. } => "linearpartial",
        Op::SumPartials => "sumpartials",
        Op::HeadLinear { .. } => "headlinear",
        Op::SliceLast { .. } => "slice",
        Op::Reshape => "reshape",
        Op::Rope { .. } => "rope",
        Op::Hadamard => "hadamard",
        Op::Quantize => "quant",
        Op::Dequantize => "dequant",
        Op::CacheWrite => "cachewrite",
        Op::CacheLatent => "cachelatent",
        Op::CacheRope => "cacherope",
        Op::CacheRows => "cacherows",
        Op::IndexerLogits => "indexer",
        Op::TopK { .. } => "topk",
        Op::MhaAttention { .. } => "mha",
        Op::MqaAttention { .. } => "mqa",
        Op::MqaPartial { .. } => "mqapartial",
        Op::MqaCombine => "mqacombine",
        Op::SwiGlu => "swiglu",
        Op::Sigmoid => "sigmoid",
        Op::GroupTopK { .. } => "grouptopk",
        Op::TakeAlong => "takealong",
        Op::Append { .. } => "append",
        Op::Normalize { .. } => "normalize",
        Op::ExpertLinear { .. } => "expertlinear",
        Op::Route { .. } => "route",
        Op::WeightedSum => "weightedsum",
        Op::ArgMax { .. } => "argmax",
        Op::Sample => "sample",
        Op::AllReduce { .. } => "allreduce",
        Op::Fused(_) => "fused",
    }
}

/// Element type of a tensor as a name: `f32`, or `fp8` for quantised ones.
pub(crate) fn elem_name(ty: &ValueType) -> &'static str {
    match ty.tensor().map(|t| t.elem) {
        Some(dsc_ir::graph::Elem::Plain(d)) => d.name(),
        Some(dsc_ir::graph::Elem::Quant(_)) => "fp8",
        None => DType::E4m3.name(),
    }
}
