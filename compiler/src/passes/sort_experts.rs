//! Keeps rows between two multiplications by experts in the order of the experts.
//!
//! ```text
//! before                                        after
//! h = expert_linear x, w1, order, offsets       h = expert_linear[y_sorted] x, w1, order, offsets
//! a = swiglu, quantize, .. h                    a = the same
//! y = expert_linear a, w2, order, offsets       y = expert_linear[x_sorted] a, w2, order, offsets
//! ```
//!
//! Legal: what stands between treats each row by itself, and nothing else reads it, so it does not matter in which places the rows are.
//!
//! Effect: an expert's rows of `a` lie together. Nothing is gathered by the second multiplication, so that a copy engine can bring its tiles of
//! rows whole: for targets with such copies ([`Cx::boxes`]), where steps have rows enough for groups to be looked for by expert.

use super::Cx;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, Value};

/// See the top of the file. Returns the number of pairs of multiplications.
pub fn sort_experts(graph: &mut Graph, cx: &Cx) -> usize {
    if !cx.boxes {
        return 0;
    }
    let pairs: Vec<[NodeId; 2]> =
        graph.order().into_iter().filter_map(|first| Some([first, second(graph, first)?])).collect();
    for &[first, second] in &pairs {
        if let Op::ExpertLinear { y_sorted, .. } = &mut graph.dag[first].op {
            *y_sorted = true;
        }
        if let Op::ExpertLinear { x_sorted, .. } = &mut graph.dag[second].op {
            *x_sorted = true;
        }
    }
    pairs.len()
}

/// The multiplication by the same routing that alone takes, row by row, what becomes of this one's result.
fn second(graph: &Graph, first: NodeId) -> Option<NodeId> {
    let grouped = |node: NodeId| match (&graph.dag[node].op, graph.inputs(node).as_slice()) {
        (Op::ExpertLinear { .. }, &[_, _, order, offsets]) => Some([order, offsets]),
        _ => None,
    };
    let routed = grouped(first)?;
    let (mut rows, mut second) = (vec![Value { node: first, output: 0 }], None);
    let mut at = 0;
    while let Some(&value) = rows.get(at) {
        at += 1;
        let users = graph.users(value);
        if graph.is_output(value) || users.is_empty() || graph.ty(value).tensor()?.shape.len() != 3 {
            return None;
        }
        for (user, input) in users {
            let result = Value { node: user, output: 0 };
            match &graph.dag[user].op {
                Op::ExpertLinear { .. } if input == 0 && grouped(user) == Some(routed) && second.is_none() => {
                    second = Some(user);
                }
                op if !by_row(graph, op, result) => return None,
                _ if !rows.contains(&result) => rows.push(result),
                _ => {}
            }
        }
    }
    // Nothing between may join these rows with others, which are in other places.
    let joined = rows[1..].iter().flat_map(|v| graph.inputs(v.node)).all(|v| rows.contains(&v));
    second.filter(|_| joined)
}

/// Whether an op makes each row of its result of the same row of its inputs.
fn by_row(graph: &Graph, op: &Op, result: Value) -> bool {
    match op {
        Op::SliceLast { .. } | Op::SwiGlu | Op::Cast => true,
        Op::Quantize => matches!(graph.tensor(result).elem, Elem::Quant(q) if q.block[0] == 1),
        _ => false,
    }
}
