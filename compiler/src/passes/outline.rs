//! Moves a set of nodes into the body of one fused node: the mechanics that the `fuse_*` passes share.
//!
//! ```text
//! before                          after
//! s = add a, b                    n, s = fused (a, b, g) {
//! n = rms_norm s, g                   s = add arg0, arg1
//! .. = linear n, w                    n = rms_norm s, arg2
//! .. = add s, ..                  }
//! ```
//!
//! Views ([`is_view`]) belong to nobody. One that leads from a member to a member is copied into the body; the original stays
//! outside for its other users, or goes. One of a value made outside stays there and its result is an argument: a kernel reads a
//! view for free.
//!
//! Legality is [`is_convex`]: no path leaves the set through a node that is neither a member nor a view, and returns. The fused
//! node would need its own result before it starts.

use super::is_view;
use dsc_ir::graph::{Fused, FusedKind, Graph, NodeId, Op, Value};
use std::collections::{HashMap, HashSet};

/// The value that a chain of views looks at; the value itself if its node is no view.
pub(super) fn base(graph: &Graph, value: Value) -> Value {
    let mut at = value;
    while is_view(&graph.dag[at.node].op) {
        at = graph.inputs(at.node)[0];
    }
    at
}

/// Whether the set can become one node.
pub(super) fn is_convex(graph: &Graph, members: &[NodeId]) -> bool {
    let inside: HashSet<NodeId> = members.iter().copied().collect();
    // Nodes reached without, and with, a non-view node outside on the way.
    let mut inner: Vec<NodeId> = members.iter().flat_map(|&m| graph.dag.neighbors(m)).collect();
    let mut outer = Vec::new();
    while let Some(n) = inner.pop() {
        if inside.contains(&n) {
            continue;
        }
        if is_view(&graph.dag[n].op) { inner.extend(graph.dag.neighbors(n)) } else { outer.push(n) }
    }
    let mut seen: HashSet<NodeId> = outer.iter().copied().collect();
    while let Some(n) = outer.pop() {
        if inside.contains(&n) {
            return false;
        }
        outer.extend(graph.dag.neighbors(n).filter(|&next| seen.insert(next)));
    }
    true
}

/// Results of members (in topological order) that something outside uses, itself or through a view, in order of the members.
pub(super) fn escaping(graph: &Graph, members: &[NodeId]) -> Vec<Value> {
    let inside: HashSet<NodeId> = members.iter().copied().collect();
    members
        .iter()
        .flat_map(|&node| (0..graph.dag[node].outputs.len() as u32).map(move |output| Value { node, output }))
        .filter(|&v| !is_read_by(graph, v, &|node| inside.contains(&node)))
        .collect()
}

/// Whether such nodes alone read a value, itself or through views, and neither is a result of the graph.
pub(super) fn is_read_by(graph: &Graph, value: Value, by: &dyn Fn(NodeId) -> bool) -> bool {
    !graph.is_output(value)
        && graph.users(value).into_iter().all(|(user, _)| match is_view(&graph.dag[user].op) {
            true => is_read_by(graph, Value { node: user, output: 0 }, by),
            false => by(user),
        })
}

/// Replaces `members`, a convex set in topological order, with one fused node whose outputs are `outputs`: all of
/// [`escaping`], in the wanted order. Arguments are numbered in order of first use.
pub(super) fn outline(
    graph: &mut Graph,
    members: &[NodeId],
    outputs: &[Value],
    kind: FusedKind,
    name: String,
) -> NodeId {
    let mut making = Making { inside: members.iter().copied().collect(), ..Making::default() };
    for &member in members {
        making.copy(graph, member);
    }
    let mut body = making.body;
    body.outputs = outputs.iter().enumerate().map(|(i, v)| (format!("out{i}"), making.made[v])).collect();

    let types = outputs.iter().map(|&v| graph.ty(v).clone()).collect();
    let op = Op::Fused(Box::new(Fused { kind, select_all_below: 0, body }));
    let node = graph.add(name, op, &making.args, types);
    for (i, &v) in outputs.iter().enumerate() {
        graph.replace_uses(v, Value { node, output: i as u32 });
    }
    remove(graph, members);
    node
}

/// A body on the way.
#[derive(Default)]
struct Making {
    inside: HashSet<NodeId>,
    body: Graph,
    /// Values of the graph in the body.
    made: HashMap<Value, Value>,
    args: Vec<Value>,
}

impl Making {
    fn copy(&mut self, graph: &Graph, node: NodeId) {
        let inputs: Vec<Value> = graph.inputs(node).into_iter().map(|v| self.import(graph, v)).collect();
        let from = &graph.dag[node];
        let copy = self.body.add(from.name.clone(), from.op.clone(), &inputs, from.outputs.clone());
        for output in 0..from.outputs.len() as u32 {
            self.made.insert(Value { node, output }, Value { node: copy, output });
        }
    }

    fn import(&mut self, graph: &Graph, value: Value) -> Value {
        if let Some(&made) = self.made.get(&value) {
            return made;
        }
        if self.inside.contains(&base(graph, value).node) {
            self.copy(graph, value.node);
            return self.made[&value];
        }
        let arg = Op::Arg(self.args.len() as u32);
        self.args.push(value);
        let node = self.body.add(graph.dag[value.node].name.clone(), arg, &[], vec![graph.ty(value).clone()]);
        let made = Value { node, output: 0 };
        self.made.insert(value, made);
        made
    }
}

/// Cuts off the members and the views of them, which nothing else uses any more.
fn remove(graph: &mut Graph, members: &[NodeId]) {
    let mut work: Vec<NodeId> = members.to_vec();
    while let Some(node) = work.pop() {
        work.extend(graph.dag.neighbors(node).filter(|&n| is_view(&graph.dag[n].op)));
        graph.detach(node);
    }
}
