//! Fuses indexer logits, top-k and sparse attention into one node.
//!
//! ```text
//! before                                                after
//! l  = indexer_logits iq, iw, ik, pos, seqs, pages      o, sel = fused sparse_attention (..) {
//! sel = topk l                                              l, sel, o as before
//! o  = mqa_attention ql, qr, s, sel, seqs, pages        }
//! ```
//!
//! The first attention that reads a selection takes the indexer with it. `sel` is a second result if something else wants it: a
//! later layer that shares the selection (whose attention becomes a node of its own), or the tap `topk.i`. A selection that no
//! MQA attention reads (the MHA class) becomes a node with the selection as its result.
//!
//! Legal: nothing but the top-k reads the logits; the set is convex (checked; if the attention's query depended on the selection
//! the indexer would get a node of its own).
//!
//! Effect: the `[T, C]` logits are inside a body, where the kernel makes them by tiles and selects as it goes: no buffer grows with
//! chunk times context, and a decode step launches one kernel for the whole chain.

use super::Cx;
use super::outline::{escaping, is_convex, outline};
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op};

/// See the top of the file. Returns the number of fused nodes made.
pub fn fuse_sparse_attention(graph: &mut Graph, _cx: &Cx) -> usize {
    let mut fused = 0;
    for attention in nodes(graph, |op| matches!(op, Op::MqaAttention { .. })) {
        let mut members = indexer_of(graph, attention);
        members.push(attention);
        if !is_convex(graph, &members) {
            members = vec![attention];
        }
        fuse(graph, &members);
        fused += 1;
    }
    for topk in nodes(graph, |op| matches!(op, Op::TopK { .. })) {
        if let Some(logits) = logits_of(graph, topk) {
            fuse(graph, &[logits, topk]);
            fused += 1;
        }
    }
    fused
}

fn nodes(graph: &Graph, wanted: impl Fn(&Op) -> bool) -> Vec<NodeId> {
    graph.order().into_iter().filter(|&n| wanted(&graph.dag[n].op)).collect()
}

/// Logits and top-k of an attention, unless an earlier attention has taken them.
fn indexer_of(graph: &Graph, attention: NodeId) -> Vec<NodeId> {
    const SELECTED: usize = 3;
    let topk = graph.inputs(attention)[SELECTED].node;
    logits_of(graph, topk).map_or(Vec::new(), |logits| vec![logits, topk])
}

/// The indexer logits that only this top-k reads.
fn logits_of(graph: &Graph, topk: NodeId) -> Option<NodeId> {
    if !matches!(graph.dag[topk].op, Op::TopK { .. }) {
        return None;
    }
    let logits = graph.inputs(topk)[0];
    let private = graph.users(logits).len() == 1 && !graph.is_output(logits);
    (private && graph.dag[logits.node].op == Op::IndexerLogits).then_some(logits.node)
}

/// Results in reverse order of the members: attention before selection.
fn fuse(graph: &mut Graph, members: &[NodeId]) {
    let last = *members.last().expect("a fused node has members");
    let name = graph.dag[last].name.clone();
    let mut outputs = escaping(graph, members);
    outputs.reverse();
    outline(graph, members, &outputs, FusedKind::SparseAttention, name);
}
