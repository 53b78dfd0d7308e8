//! Marks selections that need no scores when the context is short.
//!
//! ```text
//! before                                   after
//! o = fused sparse_attention (..) {..}     o = fused sparse_attention select_all_below 2048 (..) {..}
//! ```
//!
//! Legal: a top-k selects every visible position when there are at most `k`, whatever the scores are, and lists them in ascending
//! order: that list can be written down without scores. Scores that are NaN or −inf within the visible range do not occur in a
//! finite model.
//!
//! Effect: up to a context of `k` (2048) a step reads no index keys and scores nothing. The check is on the step's longest context,
//! so it costs the kernel one scalar comparison.

use super::Cx;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op};

/// See the top of the file. Returns the number of fused nodes marked.
pub fn skip_short_selection(graph: &mut Graph, _cx: &Cx) -> usize {
    let nodes: Vec<NodeId> = graph.dag.node_indices().collect();
    let mut marked = 0;
    for node in nodes {
        let Op::Fused(fused) = &mut graph.dag[node].op else { continue };
        if fused.kind != FusedKind::SparseAttention {
            continue;
        }
        let k = fused.body.dag.node_weights().find_map(|n| match n.op {
            Op::TopK { k } => Some(k),
            _ => None,
        });
        if let Some(k) = k {
            fused.select_all_below = k;
            marked += 1;
        }
    }
    marked
}
