//! Expands cached rows once a step where attention would convert each of them many times.
//!
//! ```text
//! before                                                    after
//! o = mqa_attention[narrow] ql, qr, s, sel, seqs, pages     m = cache_rows s, pages : bf16 [C, L + R]
//!     s: latent fp8                                         o = mqa_attention[narrow] ql, qr, m, sel
//! ```
//!
//! Legal: a code times a power of two is exact in bf16, which is what attention multiplies where it is `narrow`. In a class of one sequence a
//! position is the number of its row of `m`, and no position that is selected is outside of the context. Only rows that are cached are selected.
//!
//! Effect: a chunk of `T` tokens selects `T k` rows, each of them a row of the context: every row is converted once instead of `T k / C` times, and
//! attention finds it without the page table. What it costs is a pass over the context (`C` rows of the cache read, `C (L + R)` elements written) and
//! that matrix in the arena while attention runs. By the most that a class admits, as memory is planned: a step of few tokens behind a long
//! context pays for the pass and gains nothing.

use super::Cx;
use dsc_ir::graph::{Graph, NodeId, Op, StateFormat, TensorType, Value, ValueType};
use dsc_ir::{DType, Sym};

/// Selected rows for each row of the longest context from which on expanding is worth it: a pass over a row takes as long as converting some five
/// of those that are selected.
const REPEATED: u64 = 8;

/// See the top of the file. Returns the number of attentions that read expanded rows.
pub fn expand_cache(graph: &mut Graph, cx: &Cx) -> usize {
    let attentions: Vec<NodeId> = graph.order().into_iter().filter(|&n| converts(graph, cx, n)).collect();
    for &attention in &attentions {
        expand(graph, attention);
    }
    attentions.len()
}

/// Whether attention converts rows of one sequence, and each of them so often.
fn converts(graph: &Graph, cx: &Cx, node: NodeId) -> bool {
    let Op::MqaAttention { narrow: true, .. } = graph.dag[node].op else { return false };
    let inputs = graph.inputs(node);
    let fp8 = matches!(graph.ty(inputs[2]), ValueType::State(StateFormat::LatentFp8 { .. }));
    let max = &cx.class.max;
    let selected = graph.tensor(inputs[3]).shape[1].constant().unwrap_or(0);
    let rows = u64::from(max.get(Sym::T)) * u64::from(selected);
    fp8 && inputs.len() == 6 && max.get(Sym::S) == 1 && rows >= REPEATED * u64::from(max.get(Sym::C))
}

fn expand(graph: &mut Graph, attention: NodeId) {
    let inputs = graph.inputs(attention);
    let &[q_latent, q_rope, state, selected, _, page_table] = inputs.as_slice() else {
        unreachable!("it has six inputs")
    };
    let ValueType::State(StateFormat::LatentFp8 { latent, rope }) = *graph.ty(state) else {
        unreachable!("chosen by its cache")
    };
    let name = graph.dag[attention].name.clone();
    let ty = TensorType::plain(DType::Bf16, &[Sym::C.into(), (latent + rope).into()]);
    let rows = graph.add1(format!("{name}.rows"), Op::CacheRows, &[state, page_table], ty);
    let (op, outputs) = (graph.dag[attention].op.clone(), graph.dag[attention].outputs.clone());
    let node = graph.add(name, op, &[q_latent, q_rope, rows, selected], outputs.clone());
    for output in 0..outputs.len() as u32 {
        graph.replace_uses(Value { node: attention, output }, Value { node, output });
    }
    graph.detach(attention);
}
