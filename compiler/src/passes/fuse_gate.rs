//! Fuses the router's chain from logits to expert ids and weights into one node.
//!
//! ```text
//! before                                  after
//! s = sigmoid logits      [T, E]          ids, w = fused gate (logits, bias) {
//! b = add s, bias         [T, E]              the same
//! ids = group_topk b      [T, k]          }
//! p = take_along s, ids   [T, k]
//! w = normalize p         [T, k]
//! ```
//!
//! The bias may be missing.
//!
//! Legal: nothing else reads the scores, and the chain has no way out and back in.
//!
//! Effect: five launches on tensors of a few KB become one that keeps a token's scores in registers.

use super::Cx;
use super::outline::{escaping, is_convex, outline};
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op};

/// See the top of the file. Returns the number of gates fused.
pub fn fuse_gate(graph: &mut Graph, _cx: &Cx) -> usize {
    let gates: Vec<Vec<NodeId>> =
        graph.order().into_iter().filter_map(|n| chain(graph, n)).filter(|members| is_convex(graph, members)).collect();
    for members in &gates {
        let name = graph.dag[members[members.len() - 3]].name.clone();
        // In order of the members: ids, then weights.
        let outputs = escaping(graph, members);
        outline(graph, members, &outputs, FusedKind::Gate, name);
    }
    gates.len()
}

/// The members in topological order, if `normalize` ends a router's chain.
fn chain(graph: &Graph, normalize: NodeId) -> Option<Vec<NodeId>> {
    if !matches!(graph.dag[normalize].op, Op::Normalize { .. }) {
        return None;
    }
    let take = graph.inputs(normalize)[0].node;
    if graph.dag[take].op != Op::TakeAlong {
        return None;
    }
    let &[scores, ids] = graph.inputs(take).as_slice() else { return None };
    if graph.dag[scores.node].op != Op::Sigmoid || !matches!(graph.dag[ids.node].op, Op::GroupTopK { .. }) {
        return None;
    }
    let ranked = graph.inputs(ids.node)[0];
    let mut members = vec![scores.node];
    if ranked != scores {
        if graph.dag[ranked.node].op != Op::Add || !graph.inputs(ranked.node).contains(&scores) {
            return None;
        }
        members.push(ranked.node);
    }
    members.extend([ids.node, take, normalize]);
    Some(members)
}
