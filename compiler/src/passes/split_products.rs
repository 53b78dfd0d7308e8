//! Splits products with few outputs over the contracted columns, so that they fill the target.
//!
//! ```text
//! before                          after
//! y = linear x, w   [T, N]        p = linear_partial[parts=4] x, w   f32 [T, 4, N]
//! n = rms_norm y, g               y = sum_partials p                 [T, N]
//!                                 n = rms_norm y, g
//! ```
//!
//! Legal: the same sum in another order, rounded once. Deterministic: parts are added in order, by the kernel that reads them.
//! Asked for: few tokens, and readers that `fuse_rows` or `fuse_gate` make part of, so that no launch is added.
//!
//! Effect: a block reads `K / parts` columns of its rows of the weight. Without it, a matrix of 2240 rows in tiles of 64 has 35
//! blocks, and most of a large device idles while memory could be read.

use super::Cx;
use super::fuse_rows::is_row_op;
use super::outline::is_read_by;
use dsc_ir::graph::{Graph, NodeId, Op, TensorType, Value};
use dsc_ir::{DType, Sym};

/// Outputs of a block, as schedules for few tokens choose them.
const TILE: u32 = 64;
/// Fewest contracted columns worth a block.
const COLUMNS: u32 = 512;
/// Most parts: they are written and read again.
const PARTS: u32 = 16;

/// See the top of the file. Returns the number of products split.
pub fn split_products(graph: &mut Graph, cx: &Cx) -> usize {
    if !cx.few_tokens() {
        return 0;
    }
    let found: Vec<(NodeId, u32)> = graph.order().into_iter().filter_map(|n| Some((n, parts(graph, cx, n)?))).collect();
    for &(node, parts) in &found {
        split(graph, node, parts);
    }
    found.len()
}

/// Into how many parts a node is to be split, if more than one.
fn parts(graph: &Graph, cx: &Cx, node: NodeId) -> Option<u32> {
    if graph.dag[node].op != Op::Linear {
        return None;
    }
    let y = Value { node, output: 0 };
    let &[n, k] = graph.tensor(graph.inputs(node)[1]).shape.as_slice() else { return None };
    let rows = graph.tensor(y).shape[0];
    let by_rows = rows.sym == Some(Sym::T) && rows.factor == 1 && graph.tensor(y).shape.len() == 2;
    let blocks = n.constant()?.div_ceil(TILE) * cx.class.max.get(Sym::T).div_ceil(TILE);
    let parts = cx.blocks.div_ceil(blocks.max(1)).min(PARTS).min(k.constant()? / COLUMNS);
    // What joins the parts works by rows, or is a gate.
    let joined = || is_read_by(graph, y, &|reader| is_row_op(&graph.dag[reader].op));
    (by_rows && parts > 1 && joined()).then_some(parts)
}

fn split(graph: &mut Graph, node: NodeId, parts: u32) {
    let y = Value { node, output: 0 };
    let (name, ty) = (graph.dag[node].name.clone(), graph.tensor(y).clone());
    let partial = TensorType::plain(DType::F32, &[ty.shape[0], parts.into(), ty.shape[1]]);
    let inputs = graph.inputs(node);
    let partial = graph.add1(name.clone(), Op::LinearPartial { parts }, &inputs, partial);
    let sum = graph.add1(format!("{name}.sum"), Op::SumPartials, &[partial], ty);
    graph.replace_uses(y, sum);
    graph.detach(node);
}
