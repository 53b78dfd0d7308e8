//! Puts two products side by side in one launch.
//!
//! ```text
//! before                          after
//! p = linear_partial x, w         q, p = fused beside (y, v, x, w) {
//! q = linear_partial y, v             q = linear_partial y, v
//! .. = fused row (p, q, ..)           p = linear_partial x, w
//!                                 }
//!                                 .. = fused row (p, q, ..)
//! ```
//!
//! Legal: neither needs the other's result, nor does anything between them. Asked for: products of the same rows, all of whose results one
//! kernel reads (so that nobody waits longer than before), at most two rows a block, and a target whose blocks choose what they run ([`Cx::beside`]).
//!
//! Effect: a launch less. The head weights of the indexer (64 rows of a weight in bf16) fill a tenth of a large device, beside the latents'
//! products (2240 rows in e4m3) they take no time of their own.

use super::Cx;
use super::outline::{base, is_convex, is_read_by, outline};
use dsc_ir::Sym;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value};

/// See the top of the file. Returns the number of pairs.
pub fn fuse_beside(graph: &mut Graph, cx: &Cx) -> usize {
    // With two rows a block the smaller product still leaves most of a device idle.
    if !cx.beside || cx.class.max.get(Sym::T) > 2 * cx.blocks {
        return 0;
    }
    let mut pairs = 0;
    for reader in graph.order() {
        let Some([first, second]) = pair(graph, reader) else { continue };
        let name = [first, second].map(|n| graph.dag[n].name.as_str()).join("+");
        let outputs = [first, second].map(|node| Value { node, output: 0 });
        outline(graph, &[first, second], &outputs, FusedKind::Beside, name);
        pairs += 1;
    }
    pairs
}

/// Two products whose results that node alone reads, the one with more to read first.
fn pair(graph: &Graph, reader: NodeId) -> Option<[NodeId; 2]> {
    let mut products: Vec<NodeId> = Vec::new();
    for value in graph.inputs(reader) {
        let from = base(graph, value).node;
        let alone = |value: Value| is_read_by(graph, value, &|node| node == reader);
        if !products.contains(&from) && is_product(graph, from) && alone(Value { node: from, output: 0 }) {
            products.push(from);
        }
    }
    let &[a, b] = products.as_slice() else { return None };
    let needs = |a: NodeId, b: NodeId| graph.inputs(a).into_iter().any(|v| base(graph, v).node == b);
    let rows = |n: NodeId| graph.tensor(Value { node: n, output: 0 }).shape[0];
    let legal = rows(a) == rows(b) && !needs(a, b) && !needs(b, a) && is_convex(graph, &[a, b]);
    legal.then(|| if weight_bytes(graph, a) < weight_bytes(graph, b) { [b, a] } else { [a, b] })
}

/// Whether a node is a product of the step's tokens that stands alone.
fn is_product(graph: &Graph, node: NodeId) -> bool {
    if !matches!(graph.dag[node].op, Op::Linear | Op::LinearPartial { .. }) {
        return false;
    }
    let y = Value { node, output: 0 };
    let (x, rows) = (graph.inputs(node)[0], graph.tensor(y).shape[0]);
    graph.tensor(x).shape.len() == 2 && rows.sym == Some(Sym::T) && rows.factor == 1
}

/// Bytes of a product's weight, without scales.
fn weight_bytes(graph: &Graph, product: NodeId) -> u64 {
    let ty = graph.tensor(graph.inputs(product)[1]);
    ty.shape.iter().fold(ty.elem.bytes(), |n, e| n.saturating_mul(e.factor.into()))
}
