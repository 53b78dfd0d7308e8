//! Marks selections that need no scores when the context is short.
//!
//! ```text
//! before                                   after
//! o = fused sparse_attention (..) {..}     o = fused sparse_attention select_all_below 2048 (..) {..}
//! ```
//!
//! Where scoring and selecting are two nodes, both are marked: scores are then any numbers where a position is visible and −inf
//! elsewhere.
//!
//! Legal: a top-k selects every visible position when there are at most `k`, whatever the scores are, and lists them in ascending
//! order: that list can be written down without scores. Scores that are NaN or −inf within the visible range do not occur in a
//! finite model.
//!
//! Effect: up to a context of `k` (2048) a step reads no index keys and scores nothing. The check is on the step's longest context,
//! so it costs the kernel one scalar comparison.

use super::Cx;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value};

/// See the top of the file. Returns the number of fused nodes marked.
pub fn skip_short_selection(graph: &mut Graph, _cx: &Cx) -> usize {
    let nodes: Vec<NodeId> = graph.dag.node_indices().collect();
    let mut marked = 0;
    for node in nodes {
        let Some(k) =
            body_of(graph, node).and_then(|body| members(body).or_else(|| members_of_reader(graph, node, body)))
        else {
            continue;
        };
        if let Op::Fused(fused) = &mut graph.dag[node].op {
            fused.select_all_below = k;
            marked += 1;
        }
    }
    marked
}

fn body_of(graph: &Graph, node: NodeId) -> Option<&Graph> {
    match &graph.dag[node].op {
        Op::Fused(fused) if fused.kind == FusedKind::SparseAttention => Some(&fused.body),
        _ => None,
    }
}

/// Members of the selection that a body makes.
fn members(body: &Graph) -> Option<u32> {
    body.dag.node_weights().find_map(|n| match n.op {
        Op::TopK { k } => Some(k),
        _ => None,
    })
}

/// Members of the selection that is made of the scores of a body which only scores.
fn members_of_reader(graph: &Graph, node: NodeId, body: &Graph) -> Option<u32> {
    // Scores of a kernel library's forms are given back as they are: five operands.
    let scores = body.dag.node_indices().any(|n| body.dag[n].op == Op::IndexerLogits && body.inputs(n).len() == 6);
    let readers = if scores { graph.users(Value { node, output: 0 }) } else { Vec::new() };
    match readers.as_slice() {
        [(reader, _)] => members(body_of(graph, *reader)?),
        _ => None,
    }
}
