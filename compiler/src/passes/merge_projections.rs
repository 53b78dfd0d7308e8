//! Stacks projections of one activation into one matrix multiplication.
//!
//! ```text
//! before                              after
//! a = linear x, wa   [T, A]           y = linear x, wa+wb   [T, A+B]
//! b = linear x, wb   [T, B]           a = slice_last y, 0, A
//! c = slice_last b, 0, C              c = slice_last y, A, C
//! ```
//!
//! Legal: row `n` of a product depends on row `n` of the weight only. Asked of the linears: the same activation, result type and
//! storage of weights, and weights that nothing else reads. Rows of quantised weights share scales by blocks, so every part but
//! the last must end at a block boundary: of parts that do not, one goes last and others stay alone (`kv_a`: 576 rows in blocks
//! of 128).
//!
//! Effect: `q_a`, `kv_a` and the index key, `q_b` and the index query, gate and up become one launch each that reads the
//! activation once. The slices are views.

use super::Cx;
use dsc_ir::Extent;
use dsc_ir::artifact::WeightSource;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, Value, Weight};
use std::collections::HashMap;

/// See the top of the file. Returns the number of linears merged away.
pub fn merge_projections(graph: &mut Graph, _cx: &Cx) -> usize {
    let mut groups: Vec<(Key, Vec<Projection>)> = Vec::new();
    let mut group_of: HashMap<Key, usize> = HashMap::new();
    let nodes_of_weight = count_weight_nodes(graph);
    for node in graph.order() {
        if let Some((key, projection)) = Projection::find(graph, node, &nodes_of_weight) {
            let at = *group_of.entry(key).or_insert_with(|| {
                groups.push((key, Vec::new()));
                groups.len() - 1
            });
            groups[at].1.push(projection);
        }
    }
    groups.into_iter().map(|(key, linears)| merge(graph, &key, linears)).sum()
}

/// What linears must have in common: activation, storage of results, storage of weights.
type Key = (Value, Elem, Elem);

/// A linear whose weight is its own.
struct Projection {
    node: NodeId,
    weight: u32,
    rows: u32,
}

impl Projection {
    fn find(graph: &Graph, node: NodeId, nodes_of_weight: &HashMap<u32, usize>) -> Option<(Key, Projection)> {
        if graph.dag[node].op != Op::Linear {
            return None;
        }
        let &[x, w] = graph.inputs(node).as_slice() else { return None };
        let Op::Weight(weight) = graph.dag[w.node].op else { return None };
        let ty = graph.tensor(w);
        let own = graph.users(w).len() == 1 && nodes_of_weight[&weight] == 1;
        let stacks = matches!(graph.weights[weight as usize].source, WeightSource::Tensors(_));
        let rows = ty.shape[0].constant()?;
        let key = (x, graph.tensor(Value { node, output: 0 }).elem, ty.elem);
        (own && stacks).then_some((key, Projection { node, weight, rows }))
    }

    /// Whether another part may follow this one.
    fn ends_on_block(&self, elem: Elem) -> bool {
        match elem {
            Elem::Plain(_) => true,
            Elem::Quant(quant) => self.rows.is_multiple_of(quant.block[0]),
        }
    }
}

fn count_weight_nodes(graph: &Graph) -> HashMap<u32, usize> {
    let mut count = HashMap::new();
    for node in graph.dag.node_indices() {
        if let Op::Weight(i) = graph.dag[node].op {
            *count.entry(i).or_insert(0) += 1;
        }
    }
    count
}

fn merge(graph: &mut Graph, key: &Key, linears: Vec<Projection>) -> usize {
    let &(x, _, weight_elem) = key;
    let (mut parts, ragged): (Vec<_>, Vec<_>) = linears.into_iter().partition(|p| p.ends_on_block(weight_elem));
    parts.extend(ragged.into_iter().take(1));
    if parts.len() < 2 {
        return 0;
    }
    let w = stack_weights(graph, &parts);
    let rows: u32 = parts.iter().map(|p| p.rows).sum();
    let mut ty = graph.tensor(Value { node: parts[0].node, output: 0 }).clone();
    *ty.shape.last_mut().expect("linears have a last dim") = rows.into();
    let name = parts.iter().map(|p| graph.dag[p.node].name.as_str()).collect::<Vec<_>>().join("+");
    let merged = graph.add1(name, Op::Linear, &[x, w], ty);

    let mut start = 0;
    for part in &parts {
        let old = Value { node: part.node, output: 0 };
        // A slice of the part becomes a slice of the whole, so that kernels see one view.
        for (user, _) in graph.users(old) {
            if let Op::SliceLast { start: within, len } = graph.dag[user].op {
                graph.dag[user].op = Op::SliceLast { start: start + within, len };
                graph.set_input(user, 0, merged);
            }
        }
        let (name, ty) = (graph.dag[part.node].name.clone(), graph.tensor(old).clone());
        let slice = graph.add1(name, Op::SliceLast { start, len: part.rows }, &[merged], ty);
        graph.replace_uses(old, slice);
        graph.detach(part.node);
        start += part.rows;
    }
    parts.len() - 1
}

/// One weight of all rows in order. The entries of the parts stay in the table until it is compacted.
fn stack_weights(graph: &mut Graph, parts: &[Projection]) -> Value {
    let olds: Vec<&Weight> = parts.iter().map(|p| &graph.weights[p.weight as usize]).collect();
    let name = olds.iter().map(|w| w.name.as_str()).collect::<Vec<_>>().join("+");
    let tensors = olds.iter().flat_map(|w| match &w.source {
        WeightSource::Tensors(parts) => parts.clone(),
        WeightSource::RopeTable { .. } | WeightSource::Hadamard { .. } => unreachable!("only tensors stack"),
    });
    let source = WeightSource::Tensors(tensors.collect());
    let mut ty = olds[0].ty.clone();
    ty.shape[0] = Extent::from(parts.iter().map(|p| p.rows).sum::<u32>());
    let index = graph.weights.len() as u32;
    graph.weights.push(Weight { name: name.clone(), ty: ty.clone(), source });
    graph.add1(name, Op::Weight(index), &[], ty)
}
