//! Gives quantised operands and caches to targets that cannot multiply fp8: as the numbers they stand for.
//!
//! ```text
//! before                                     after (target without fp8 matrix units)
//! w = weight 7 : quant[128x128] [N, K]       w = weight 7 : f32 [N, K]
//! q = quantize x : quant[1x128] [T, K]       q = quantize x : quant[1x128] [T, K]
//! y = linear q, w : bf16                     d = dequantize q : f32 [T, K]
//! s0 = state 0 : latent fp8                  y = linear d, w : bf16
//! s = cache_write s0, slots, q, r            s0 = state 0 : latent f32
//!                                            c = cast r : f32
//!                                            s = cache_write s0, slots, d, c
//! ```
//!
//! Legal: a code times a power-of-two scale is exact in f32; with any other scale (of a weight) the product is rounded to f32
//! once, where a block-scaled multiplication rounds the scaled sum. Activations and cached keys still pass through e4m3, so
//! `deployed` numerics stay those of fp8. The weight's source does not change: the loader dequantises what the entry calls plain.
//!
//! Effect: no matrix kernel of the target has an fp8 operand. Decoding a gathered row costs such a target more than the product
//! it is gathered for (33 of 35 us a tile of 64 keys, before caches were expanded too); weights and caches take four times the memory.

use super::Cx;
use dsc_ir::DType;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, StateFormat, TensorType, Value, ValueType};

/// See the top of the file. Returns the number of weights and activations expanded.
pub fn expand_fp8(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.target_fp8 {
        return 0;
    }
    expand_weights(graph) + expand_caches(graph) + expand_activations(graph)
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

fn expand_caches(graph: &mut Graph) -> usize {
    let mut expanded = 0;
    for state in &mut graph.states {
        let dtype = DType::F32;
        state.format = match state.format {
            StateFormat::LatentFp8 { latent, rope } => StateFormat::Latent { latent, rope, dtype },
            StateFormat::IndexFp8 { dim } => StateFormat::Index { dim, dtype },
            StateFormat::Latent { .. } | StateFormat::Index { .. } => continue,
        };
        expanded += 1;
    }
    for node in graph.order() {
        let format = match graph.dag[node].op {
            Op::State(i) => graph.states[i as usize].format,
            Op::CacheWrite => match graph.ty(graph.inputs(node)[0]) {
                ValueType::State(format) => *format,
                ValueType::Tensor(_) => continue,
            },
            _ => continue,
        };
        if graph.dag[node].outputs[0] != ValueType::State(format) {
            graph.dag[node].outputs[0] = ValueType::State(format);
            widen_parts(graph, node);
        }
    }
    expanded
}

/// Casts what is written to an expanded cache; quantised parts are dequantised with the other operands.
fn widen_parts(graph: &mut Graph, write: NodeId) {
    for (input, part) in graph.inputs(write).into_iter().enumerate().skip(2) {
        let ty = graph.tensor(part).clone();
        if matches!(ty.elem, Elem::Plain(dtype) if dtype != DType::F32) {
            let name = format!("{}.widen", graph.dag[part.node].name);
            let wide = graph.add1(name, Op::Cast, &[part], TensorType { elem: Elem::Plain(DType::F32), ..ty });
            graph.set_input(write, input as u32, wide);
        }
    }
}

fn expand_activations(graph: &mut Graph) -> usize {
    let mut expanded = 0;
    for node in graph.order().into_iter().filter(|&n| graph.dag[n].op == Op::Quantize).collect::<Vec<_>>() {
        let codes = Value { node, output: 0 };
        let users = plain_users(graph, codes);
        if users.is_empty() {
            continue;
        }
        let ty = TensorType { elem: Elem::Plain(DType::F32), ..graph.tensor(codes).clone() };
        let name = format!("{}.dequantize", graph.dag[node].name);
        let plain = graph.add1(name, Op::Dequantize, &[codes], ty);
        for (user, input) in users {
            graph.set_input(user, input, plain);
        }
        expanded += 1;
    }
    expanded
}

/// The uses of a quantised value as a matrix operand or as what a cache keeps.
fn plain_users(graph: &Graph, value: Value) -> Vec<(NodeId, u32)> {
    let wants_plain = |&(user, input): &(NodeId, u32)| match graph.dag[user].op {
        Op::Linear | Op::ExpertLinear { .. } | Op::IndexerLogits => input == 0,
        Op::CacheWrite => input >= 2,
        _ => false,
    };
    graph.users(value).into_iter().filter(wants_plain).collect()
}
