//! Gives quantised matrix operands to targets that cannot multiply them: as the f32 numbers they stand for.
//!
//! ```text
//! before                                     after (target without fp8 matrix units)
//! w = weight 7 : quant[128x128] [N, K]       w = weight 7 : f32 [N, K]
//! q = quantize x : quant[1x128] [T, K]       q = quantize x : quant[1x128] [T, K]
//! y = linear q, w : bf16                     d = dequantize q : f32 [T, K]
//! s = cache_write s0, slots, q, r            y = linear d, w : bf16
//!                                            s = cache_write s0, slots, q, r
//! ```
//!
//! Legal: a code times a power-of-two scale is exact in f32; with any other scale (of a weight) the product is rounded to f32
//! once, where a block-scaled multiplication rounds the scaled sum. Activations still pass through e4m3, so `deployed` numerics
//! stay those of fp8. The weight's source does not change: the loader dequantises what the entry calls plain. What goes
//! into a cache stays quantised, because the cache's format is the same on every target.
//!
//! Effect: a target needs no fp8 operand in its matrix kernels; weights take four times the memory, which such targets have.

use super::Cx;
use dsc_ir::DType;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, TensorType, Value, ValueType};

/// See the top of the file. Returns the number of weights and activations expanded.
pub fn expand_fp8(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.target_fp8 {
        return 0;
    }
    expand_weights(graph) + expand_activations(graph)
}

fn expand_weights(graph: &mut Graph) -> usize {
    let mut expanded = 0;
    for weight in graph.weights.iter_mut().filter(|w| matches!(w.ty.elem, Elem::Quant(_))) {
        weight.ty.elem = Elem::Plain(DType::F32);
        expanded += 1;
    }
    let nodes: Vec<NodeId> = graph.dag.node_indices().collect();
    for node in nodes {
        if let Op::Weight(i) = graph.dag[node].op {
            graph.dag[node].outputs[0] = ValueType::Tensor(graph.weights[i as usize].ty.clone());
        }
    }
    expanded
}

fn expand_activations(graph: &mut Graph) -> usize {
    let mut expanded = 0;
    for node in graph.order().into_iter().filter(|&n| graph.dag[n].op == Op::Quantize).collect::<Vec<_>>() {
        let codes = Value { node, output: 0 };
        let users = matrix_users(graph, codes);
        if users.is_empty() {
            continue;
        }
        let ty = TensorType { elem: Elem::Plain(DType::F32), ..graph.tensor(codes).clone() };
        let name = format!("{}.dequantize", graph.dag[node].name);
        let plain = graph.add1(name, Op::Dequantize, &[codes], ty);
        for user in users {
            graph.set_input(user, 0, plain);
        }
        expanded += 1;
    }
    expanded
}

/// Matrix ops whose left operand (the query, for the indexer) is `value`.
fn matrix_users(graph: &Graph, value: Value) -> Vec<NodeId> {
    graph
        .users(value)
        .into_iter()
        .filter(|&(user, input)| {
            input == 0 && matches!(graph.dag[user].op, Op::Linear | Op::ExpertLinear { .. } | Op::IndexerLogits)
        })
        .map(|(user, _)| user)
        .collect()
}
