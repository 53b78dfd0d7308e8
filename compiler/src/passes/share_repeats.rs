//! Computes equal things once.
//!
//! ```text
//! before                    after
//! a = quantize x            a = quantize x
//! b = quantize x            y = linear a, w
//! y = linear a, w           z = linear a, v
//! z = linear b, v
//! ```
//!
//! Legal: every op is a function of its inputs, caches included (a write takes a state and returns the next), so the same op on
//! the same values with the same result types gives the same results.
//!
//! Effect: one quantisation of an activation that several projections read, and `merge_projections` sees that they read the same.

use super::Cx;
use dsc_ir::graph::{Graph, NodeId, Value};
use std::collections::HashMap;

/// See the top of the file. Returns the number of nodes that repeated another.
pub fn share_repeats(graph: &mut Graph, _cx: &Cx) -> usize {
    let mut first: HashMap<String, NodeId> = HashMap::new();
    let mut shared = 0;
    for node in graph.order() {
        let it = &graph.dag[node];
        let outputs = it.outputs.len() as u32;
        let key = format!("{:?} {:?} {:?}", it.op, graph.inputs(node), it.outputs);
        let kept = *first.entry(key).or_insert(node);
        if kept == node {
            continue;
        }
        for output in 0..outputs {
            graph.replace_uses(Value { node, output }, Value { node: kept, output });
        }
        graph.detach(node);
        shared += 1;
    }
    shared
}
