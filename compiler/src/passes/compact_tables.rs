//! Drops weights and caches that no node reads, and numbers nodes in the order they run.
//!
//! ```text
//! before                                   after
//! weights: q_a, kv_a, q_a+kv_a             weights: q_a+kv_a
//! w = weight 2                             w = weight 0
//! ```
//!
//! Legal: an index into the tables is only a name. Nodes keep their wiring; among nodes that may run in any order the one that
//! came first still does.
//!
//! Effect: the artifact lists, and the runtime loads, what the step reads. The graph is dense, so equal graphs print and
//! serialise equally, whatever passes did to get there.

use super::Cx;
use dsc_ir::graph::{Graph, NodeId, Op, Value};
use std::collections::HashMap;

/// See the top of the file. Returns the number of table entries dropped.
pub fn compact_tables(graph: &mut Graph, _cx: &Cx) -> usize {
    let old = std::mem::take(graph);
    let mut moved: HashMap<NodeId, NodeId> = HashMap::new();
    let (mut weights, mut states) = (HashMap::new(), HashMap::new());
    let order = old.order();
    for &node in &order {
        match old.dag[node].op {
            Op::Weight(i) => weights.insert(i, 0),
            Op::State(i) => states.insert(i, 0),
            _ => None,
        };
    }
    graph.weights = keep(&old.weights, &mut weights);
    graph.states = keep(&old.states, &mut states);
    graph.args = old.args.clone();

    for node in order {
        let it = old.dag[node].clone();
        let op = match it.op {
            Op::Weight(i) => Op::Weight(weights[&i]),
            Op::State(i) => Op::State(states[&i]),
            op => op,
        };
        let inputs: Vec<Value> = old.inputs(node).into_iter().map(|v| Value { node: moved[&v.node], ..v }).collect();
        moved.insert(node, graph.add(it.name, op, &inputs, it.outputs));
    }
    graph.outputs = old.outputs.into_iter().map(|(name, v)| (name, Value { node: moved[&v.node], ..v })).collect();
    old.weights.len() + old.states.len() - graph.weights.len() - graph.states.len()
}

/// The used entries in table order; fills in where each went.
fn keep<T: Clone>(table: &[T], used: &mut HashMap<u32, u32>) -> Vec<T> {
    let mut kept = Vec::new();
    for (i, entry) in (0..).zip(table) {
        if let Some(to) = used.get_mut(&i) {
            *to = kept.len() as u32;
            kept.push(entry.clone());
        }
    }
    kept
}
