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
//! The bias may be missing. So are there: the sum of a split router product before the chain, the appended shared expert behind
//! it, and, where launches run all blocks at once ([`Cx::blocks`]) and a block has all tokens of a step, the `route` of the ids.
//!
//! Legal: nothing else reads the scores, and the chain has no way out and back in.
//!
//! Effect: five launches on tensors of a few KB become one that keeps a token's scores in registers.

use super::Cx;
use super::outline::{escaping, is_convex, outline};
use dsc_ir::Sym;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value};

/// See the top of the file. Returns the number of gates fused.
pub fn fuse_gate(graph: &mut Graph, cx: &Cx) -> usize {
    let gates: Vec<Vec<NodeId>> = graph
        .order()
        .into_iter()
        .filter_map(|n| chain(graph, n).map(|members| with_neighbours(graph, members, cx)))
        .filter(|members| is_convex(graph, members))
        .collect();
    for members in &gates {
        let ids = members.iter().find(|&&n| matches!(graph.dag[n].op, Op::GroupTopK { .. }));
        let name = ids.map(|&n| graph.dag[n].name.clone()).unwrap_or_default();
        // In order of the members: ids, then weights.
        let outputs = escaping(graph, members);
        outline(graph, members, &outputs, FusedKind::Gate, name);
    }
    gates.len()
}

/// Most tokens that one block gates and routes: it takes them one after another, while a launch more costs a few microseconds.
const TOKENS: u32 = 1;

/// The chain (scores first; ids, chosen, weights last) with the ops next to it that nothing else needs.
fn with_neighbours(graph: &Graph, mut members: Vec<NodeId>, cx: &Cx) -> Vec<NodeId> {
    let value = |node: NodeId| Value { node, output: 0 };
    let [.., ids, _, weights] = members[..] else { return members };
    let logits = graph.inputs(members[0])[0];
    // A block has the scores of all tokens twice, in f32.
    let tokens = cx.class.max.get(Sym::T);
    let experts = graph.tensor(logits).shape.last().map_or(0, |e| e.factor);
    let route = cx.blocks > 0 && tokens <= TOKENS && tokens * experts * 8 <= cx.block_bytes;
    if graph.dag[logits.node].op == Op::SumPartials && graph.users(logits).len() == 1 && !graph.is_output(logits) {
        members.insert(0, logits.node);
    }
    let append = |of: NodeId| {
        let users = graph.users(value(of)).into_iter().map(|(user, _)| user);
        users.filter(|&n| matches!(graph.dag[n].op, Op::Append { .. })).collect::<Vec<NodeId>>()
    };
    let (more_ids, more_weights) = (append(ids), append(weights));
    let last_ids = more_ids.last().copied().unwrap_or(ids);
    members.extend(more_ids);
    members.extend(more_weights);
    let routes = graph.users(value(last_ids)).into_iter().map(|(user, _)| user);
    members.extend(routes.filter(|&n| route && matches!(graph.dag[n].op, Op::Route { .. })));
    members
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
