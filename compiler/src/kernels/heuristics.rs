//! What a schedule is chosen by: the shape of each node's kernel.

use super::body_of;
use super::sparse_attention::queries;
use crate::passes::Class;
use dsc_ir::Sym;
use dsc_ir::extent::Extent;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value, ValueType};
use dsc_ir::schedule::Schedule;

pub use dsc_ir::schedule::KernelShape;

/// The shape of a node's kernel in a class.
pub fn shape_of(graph: &Graph, node: NodeId, class: &Class) -> KernelShape {
    let inputs = graph.inputs(node);
    let dim = |v: Value, d: usize| constant(graph, v, d);
    let out = Value { node, output: 0 };
    let shape = |op: &'static str, m: Extent, n: u32, k: u32, heads: u32| KernelShape {
        op,
        m,
        m_max: m.eval(&class.max),
        n,
        k,
        heads,
        products: 1,
    };
    let tokens = Extent::from(Sym::T);
    match &graph.dag[node].op {
        Op::Linear | Op::LinearPartial { .. } | Op::HeadLinear { .. } | Op::ExpertLinear { .. } => {
            product(graph, node, class)
        }
        Op::MhaAttention { value, .. } => shape("mha_attention", tokens, *value, dim(inputs[3], 1), dim(inputs[0], 1)),
        op @ (Op::Embed
        | Op::Route { .. }
        | Op::CacheLatent
        | Op::CacheRope
        | Op::CacheRows
        | Op::ArgMax { .. }
        | Op::Sample) => shape(super::op_name(op), rows(graph, out), last(graph, out), 1, 1),
        _ => match body_of(graph, node) {
            Ok(fused) => match fused.kind {
                FusedKind::Product => {
                    let body = &fused.body;
                    let is_product = |op: &Op| {
                        matches!(
                            op,
                            Op::Linear | Op::LinearPartial { .. } | Op::HeadLinear { .. } | Op::ExpertLinear { .. }
                        )
                    };
                    match body.order().into_iter().find(|&n| is_product(&body.dag[n].op)) {
                        Some(n) => {
                            let glu = body.dag.node_weights().any(|n| n.op == Op::SwiGlu);
                            KernelShape { products: 1 + u32::from(glu), ..product(body, n, class) }
                        }
                        None => shape("linear", tokens, 1, 1, 1),
                    }
                }
                // The first is the larger.
                FusedKind::Beside => match fused.body.outputs.first() {
                    Some((_, first)) => product(&fused.body, first.node, class),
                    None => shape("linear", tokens, 1, 1, 1),
                },
                FusedKind::Heads => shape("heads", tokens, last(graph, out), 1, dim(out, 1)),
                FusedKind::Row => {
                    let heads = graph.ty(out).tensor().filter(|t| t.shape.len() == 3).map_or(1, |_| dim(out, 1));
                    shape("row", rows(graph, out), last(graph, out), 1, heads)
                }
                FusedKind::Gate => shape("gate", rows(graph, out), last(graph, out), 1, 1),
                FusedKind::SparseAttention => {
                    let (op, n, k, heads) = attention(&fused.body, class);
                    shape(op, tokens, n, k, heads)
                }
            },
            Err(_) => shape(super::op_name(&graph.dag[node].op), tokens, 1, 1, 1),
        },
    }
}

/// The shape of a matrix product's kernel.
fn product(graph: &Graph, node: NodeId, class: &Class) -> KernelShape {
    let inputs = graph.inputs(node);
    let (out, w) = (Value { node, output: 0 }, inputs[1]);
    let dim = |v: Value, d: usize| constant(graph, v, d);
    let tokens = Extent::from(Sym::T);
    let (op, m, n, k, heads) = match &graph.dag[node].op {
        Op::HeadLinear { .. } => ("head_linear", tokens, dim(out, 2), dim(inputs[0], 2), dim(inputs[0], 1)),
        Op::ExpertLinear { x_sorted, .. } => {
            let op = if *x_sorted { "expert_linear_sorted" } else { "expert_linear" };
            (op, tokens.times(dim(out, 1)), dim(w, 1), dim(w, 2), dim(w, 0))
        }
        Op::LinearPartial { parts } => ("linear", rows(graph, out), dim(w, 0), dim(w, 1).div_ceil(*parts), *parts),
        _ => ("linear", rows(graph, out), dim(w, 0), dim(w, 1), 1),
    };
    KernelShape { op, m, m_max: m.eval(&class.max), n, k, heads, products: 1 }
}

/// A schedule from the shape alone; targets may have better ones.
pub fn default_schedule(shape: &KernelShape, class: &Class) -> Schedule {
    Schedule::heuristic(shape, class.max.get(Sym::T))
}

/// Kind, latent elements, keys selected and heads of a sparse attention body; of scores of a cache where all sequences have as many tokens, how many
/// those are, and elements of a key.
fn attention(body: &Graph, class: &Class) -> (&'static str, u32, u32, u32) {
    let (mut op, mut n, mut k, mut heads) = ("top_k", 1, 1, 1);
    for node in body.order() {
        let inputs = body.inputs(node);
        match &body.dag[node].op {
            Op::IndexerLogits => {
                heads = constant(body, inputs[0], 1);
                op = "indexer_logits";
                if let [q, _, state, _, _] = inputs[..]
                    && matches!(body.ty(state), ValueType::State(_))
                {
                    (n, k) = (queries(class), constant(body, q, 2));
                }
            }
            Op::TopK { k: members } => {
                k = *members;
                if op == "indexer_logits" {
                    (op, n) = ("sparse_attention", 1);
                }
            }
            Op::MqaAttention { .. } | Op::MqaPartial { .. } => {
                n = constant(body, inputs[0], 2);
                k = constant(body, inputs[3], 1);
                if op == "top_k" {
                    let part = matches!(body.dag[node].op, Op::MqaPartial { .. });
                    (op, heads) = (if part { "attention_part" } else { "attention" }, constant(body, inputs[0], 1));
                }
            }
            _ => {}
        }
    }
    (op, n, k, heads)
}

/// A constant dim of a tensor, else 1.
fn constant(graph: &Graph, value: Value, d: usize) -> u32 {
    let ty = graph.ty(value).tensor();
    ty.and_then(|t| t.shape.get(d)).and_then(|e| e.constant()).unwrap_or(1)
}

fn last(graph: &Graph, value: Value) -> u32 {
    match graph.ty(value) {
        ValueType::Tensor(t) => constant(graph, value, t.shape.len().saturating_sub(1)),
        ValueType::State(_) => 1,
    }
}

/// The last symbolic dim of a result, else tokens.
fn rows(graph: &Graph, value: Value) -> Extent {
    let ty = graph.ty(value).tensor();
    ty.and_then(|t| t.shape.iter().rev().find(|e| e.sym.is_some()).copied()).unwrap_or(Sym::T.into())
}
