//! Fuses matrix products with what makes their operand and with what is made of their result.
//!
//! ```text
//! before                                         after
//! h = expert_linear x, w, ..   [T, k, 2F]        q = fused product (x, w, ..) {
//! g, u = slices of h                                 the same
//! a = swiglu g, u                                }
//! q = quantize a
//!
//! o = mqa_combine sums, largest, totals          q = fused product (sums, largest, totals, w) {
//! v = head_linear o, w         [T, H, V]             the same
//! q = quantize (reshape v)     [T, H V]          }
//! ```
//!
//! Each part may be missing: SwiGLU without quantisation, quantisation without SwiGLU, attention that is not split.
//!
//! Legal: nothing else reads what becomes internal. Scale blocks must not cross heads. For launches that run all blocks at once
//! ([`Cx::blocks`]): where a few workers take blocks in turn, a row's ops are cheaper together.
//!
//! Effect: two launches less in a layer, and the widest activation of a layer, gate and up of all experts, is never stored.

use super::Cx;
use super::outline::{escaping, is_convex, outline};
use dsc_ir::graph::{Elem, FusedKind, Graph, NodeId, Op, Value};

/// See the top of the file. Returns the number of products fused.
pub fn fuse_products(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.blocks == 0 {
        return 0;
    }
    let found: Vec<Vec<NodeId>> = graph.order().into_iter().filter_map(|n| members(graph, n)).collect();
    for members in &found {
        let name = graph.dag[members[0]].name.clone();
        let outputs = escaping(graph, members);
        outline(graph, members, &outputs, FusedKind::Product, name);
    }
    found.len()
}

/// The product and what joins it, but views, in topological order; none if nothing joins.
fn members(graph: &Graph, product: NodeId) -> Option<Vec<NodeId>> {
    let op = &graph.dag[product].op;
    let heads = matches!(op, Op::HeadLinear { .. });
    if !heads && !matches!(op, Op::Linear | Op::ExpertLinear { .. }) {
        return None;
    }
    let y = Value { node: product, output: 0 };
    let mut members = Vec::new();
    let x = graph.inputs(product)[0];
    if heads && graph.dag[x.node].op == Op::MqaCombine && sole(graph, x) {
        members.push(x.node);
    }
    members.push(product);
    let quantized = if heads {
        let (reshape, width) =
            (sole_user(graph, y, |op| *op == Op::Reshape), graph.tensor(y).shape.last()?.constant()?);
        let flat = reshape.map(|node| Value { node, output: 0 }).filter(|&v| graph.tensor(v).shape.len() == 2);
        flat.and_then(|v| quantize_of(graph, v, width))
    } else {
        let act = swiglu_of(graph, y)?;
        members.push(act);
        let act = Value { node: act, output: 0 };
        quantize_of(graph, act, graph.tensor(act).shape.last()?.constant()?)
    };
    members.extend(quantized);
    (members.len() > 1 && is_convex(graph, &members)).then_some(members)
}

fn sole(graph: &Graph, value: Value) -> bool {
    graph.users(value).len() == 1 && !graph.is_output(value)
}

/// The only user of a value, if it is of a kind.
fn sole_user(graph: &Graph, value: Value, kind: impl Fn(&Op) -> bool) -> Option<NodeId> {
    let user = graph.users(value).first()?.0;
    (sole(graph, value) && kind(&graph.dag[user].op)).then_some(user)
}

/// The quantisation that alone reads a value, with scale blocks that divide `width` and fit a tile.
fn quantize_of(graph: &Graph, value: Value, width: u32) -> Option<NodeId> {
    let node = sole_user(graph, value, |op| *op == Op::Quantize)?;
    match graph.tensor(Value { node, output: 0 }).elem {
        Elem::Quant(q) => (width.is_multiple_of(q.block[1]) && q.block[1] <= 128).then_some(node),
        Elem::Plain(_) => None,
    }
}

/// The SwiGLU of the two halves of a product that nothing else reads.
fn swiglu_of(graph: &Graph, y: Value) -> Option<NodeId> {
    let width = graph.tensor(y).shape.last()?.constant()?;
    let halves: Vec<NodeId> = graph.users(y).into_iter().map(|(user, _)| user).collect();
    let &[a, b] = halves.as_slice() else { return None };
    let act = sole_user(graph, Value { node: a, output: 0 }, |op| *op == Op::SwiGlu)?;
    let inputs = graph.inputs(act);
    let start = |v: &Value| match graph.dag[v.node].op {
        Op::SliceLast { start, len } if len * 2 == width => Some(start),
        _ => None,
    };
    let starts: Vec<Option<u32>> = inputs.iter().map(start).collect();
    let own = !graph.is_output(y)
        && sole(graph, Value { node: b, output: 0 })
        && inputs.iter().all(|v| halves.contains(&v.node));
    (own && starts == [Some(0), Some(width / 2)]).then_some(act)
}
