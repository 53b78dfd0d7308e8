//! Groups the rows of expert multiplications by expert.
//!
//! ```text
//! before                                    after
//! h = expert_linear x, w1, ids              order, offsets, owners = route ids
//! y = expert_linear a, w2, ids              h = expert_linear x, w1, order, offsets
//!                                           y = expert_linear a, w2, order, offsets
//! ```
//!
//! Legal: `order` holds every pair of token and slot once, those of expert `e` at `offsets[e]..offsets[e + 1]`; the op computes the
//! same row for each pair, in another order. `order` is ascending within an expert, so it is the same on every run.
//!
//! Where steps have fewer rows than there are experts, products also take `owners`, the expert of each place of `order`: groups are then
//! looked for by place, and most experts, which have none, are never visited.
//!
//! Effect: each expert is one dense multiplication that reads its weights once, and rows are gathered and scattered by index in
//! its prologue and epilogue: no permuted copy of the activations exists. One routing serves both multiplications of a layer.

use super::Cx;
use dsc_ir::graph::{Graph, NodeId, Op, TensorType, Value, ValueType};
use dsc_ir::{DType, Extent};
use std::collections::HashMap;

/// See the top of the file. Returns the number of routings inserted.
pub fn group_experts(graph: &mut Graph, cx: &Cx) -> usize {
    let mut routes: HashMap<(Value, u32), NodeId> = HashMap::new();
    for node in graph.order() {
        if !matches!(graph.dag[node].op, Op::ExpertLinear { .. }) {
            continue;
        }
        let &[_, w, ids] = graph.inputs(node).as_slice() else { continue };
        let Some(experts) = graph.tensor(w).shape[0].constant() else { continue };
        let route = *routes.entry((ids, experts)).or_insert_with(|| add_route(graph, ids, experts));
        graph.set_input(node, 2, Value { node: route, output: 0 });
        graph.set_input(node, 3, Value { node: route, output: 1 });
        let rows = graph.tensor(Value { node: route, output: 0 }).shape[0];
        if rows.eval(&cx.class.max) < u64::from(experts) {
            graph.set_input(node, 4, Value { node: route, output: 2 });
        }
    }
    routes.len()
}

fn add_route(graph: &mut Graph, ids: Value, experts: u32) -> NodeId {
    let shape = &graph.tensor(ids).shape;
    let rows = shape[0].times(shape[1].factor);
    let i32s = |n: Extent| ValueType::Tensor(TensorType::plain(DType::I32, &[n]));
    let name = format!("{}.route", graph.dag[ids.node].name);
    graph.add(name, Op::Route { experts }, &[ids], vec![i32s(rows), i32s((experts + 1).into()), i32s(rows)])
}
