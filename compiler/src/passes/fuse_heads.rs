//! Fuses what is made of the heads of a projected query, head by head, where steps have few tokens.
//!
//! ```text
//! before                                             after
//! q  = linear ..            [T, H·(N+R) + Hi·D]      ql, qr, iq = fused heads (q, ..) {
//! ql = head_linear (q's nope part), w                    the same
//! qr = rope (q's rope part)                          }
//! iq = quantize (hadamard (rope (q's index part)))
//! ```
//!
//! Legal: head `h` of each result needs head `h` of its operand and nothing else. Numbers of heads may differ: a block whose head one
//! of them does not have loads zeros for it and stores nothing.
//!
//! Effect: one launch with a block a head, instead of one product and one row kernel, which at one token is a single block's work.

use super::outline::{base, escaping, is_convex, outline};
use super::{Cx, is_view};
use dsc_ir::Sym;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value};

/// Most tokens that a block takes: all of a step.
const TOKENS: u32 = 64;

/// See the top of the file. Returns the number of nodes made.
pub fn fuse_heads(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.blocks == 0 || cx.class.max.get(Sym::T) > TOKENS {
        return 0;
    }
    let fits = |n: &NodeId| head_bytes(graph, *n) <= cx.block_bytes;
    let found: Vec<Vec<NodeId>> = graph.order().into_iter().filter(fits).filter_map(|n| members(graph, n)).collect();
    for members in &found {
        let name = graph.dag[members[0]].name.clone();
        let outputs = escaping(graph, members);
        outline(graph, members, &outputs, FusedKind::Heads, name);
    }
    found.len()
}

/// Bytes of one head's matrix of a head product, which a block keeps whole.
fn head_bytes(graph: &Graph, product: NodeId) -> u32 {
    let inputs = graph.inputs(product);
    let (Op::HeadLinear { .. }, Some(&w)) = (&graph.dag[product].op, inputs.get(1)) else { return 0 };
    let size = |v: Value| graph.ty(v).tensor().and_then(|t| t.shape.last()).map_or(0, |e| e.factor);
    let bytes = graph.tensor(w).elem.bytes() as u32;
    size(inputs[0]) * size(Value { node: product, output: 0 }) * bytes
}

/// The head product and the ops by head that read what it reads, in topological order; none if there are none.
fn members(graph: &Graph, product: NodeId) -> Option<Vec<NodeId>> {
    if !matches!(graph.dag[product].op, Op::HeadLinear { .. }) {
        return None;
    }
    let source = base(graph, graph.inputs(product)[0]);
    if graph.dag[source.node].op != Op::Linear {
        return None;
    }
    let mut members = vec![product];
    let mut work = vec![source];
    while let Some(value) = work.pop() {
        for (user, input) in graph.users(value) {
            let made = Value { node: user, output: 0 };
            if is_view(&graph.dag[user].op) {
                work.push(made);
            } else if input == 0 && by_head(graph, user) && !members.contains(&user) {
                members.push(user);
                work.push(made);
            }
        }
    }
    let order = graph.order();
    members.sort_unstable_by_key(|m| order.iter().position(|n| n == m));
    (members.len() > 1 && is_convex(graph, &members)).then_some(members)
}

/// Whether an op makes `[T, heads, columns]` of its first operand alone, head by head.
fn by_head(graph: &Graph, node: NodeId) -> bool {
    let kind = matches!(graph.dag[node].op, Op::Rope { .. } | Op::Hadamard | Op::Quantize | Op::Cast);
    let fits = |v: Value| {
        let shape = graph.ty(v).tensor().map_or(&[][..], |t| &t.shape);
        matches!(shape, [t, h, d] if t.sym == Some(Sym::T) && h.sym.is_none() && d.sym.is_none())
    };
    kind && fits(Value { node, output: 0 }) && fits(graph.inputs(node)[0])
}
