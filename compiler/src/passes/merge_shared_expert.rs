//! Makes the shared expert one more routed expert, which every token chooses with weight 1.
//!
//! ```text
//! before                                            after
//! h = expert_linear x, W1, ids     [T, k, 2F]       ids' = append[E] ids                        [T, k + 1]
//! y = expert_linear (act h), W2, ids                w'   = append[1] w                          [T, k + 1]
//! r = weighted_sum y, w            f32              h'   = expert_linear x, W1+w1, ids'         [T, k + 1, 2F]
//! s = linear (act (linear x, w1)), w2               y'   = expert_linear (act h'), W2+w2, ids'
//! o = add r, s                                      o    = weighted_sum y', w'
//! ```
//!
//! Legal: the sum adds in ascending order, so the shared expert, times 1, comes last, in f32, and the result rounds once, as the
//! `add` did. Asked for: weights of the same storage and shape as one expert's, read by nothing else, and the same activation. For
//! launches that run all blocks at once ([`Cx::blocks`]); where they do not, the shared expert's own dense products are as good.
//!
//! Effect: two launches less a layer, and the shared expert's weights stream beside the others'.

use super::Cx;
use super::outline::base;
use dsc_ir::Extent;
use dsc_ir::artifact::WeightSource;
use dsc_ir::graph::{Graph, NodeId, Op, TensorType, Value, Weight};

/// See the top of the file. Returns the number of shared experts merged.
pub fn merge_shared_expert(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.blocks == 0 {
        return 0;
    }
    let found: Vec<Moe> = graph.order().into_iter().filter_map(|n| Moe::find(graph, n)).collect();
    for moe in &found {
        moe.merge(graph);
    }
    found.len()
}

/// Two products with an activation between them.
struct Mlp {
    x: Value,
    first: NodeId,
    /// From the first product (left out) to the second (left out): slices, SwiGLU, quantisation, in order.
    between: Vec<NodeId>,
    second: NodeId,
}

impl Mlp {
    /// Ends in `second`, whose operand only it reads.
    fn ending(graph: &Graph, second: NodeId, product: fn(&Op) -> bool) -> Option<Mlp> {
        if !product(&graph.dag[second].op) {
            return None;
        }
        let mut at = graph.inputs(second)[0];
        let mut between = Vec::new();
        if graph.dag[at.node].op == Op::Quantize && sole(graph, at) {
            between.push(at.node);
            at = graph.inputs(at.node)[0];
        }
        if graph.dag[at.node].op != Op::SwiGlu || !sole(graph, at) {
            return None;
        }
        between.push(at.node);
        let halves = graph.inputs(at.node);
        between.extend(halves.iter().rev().map(|h| h.node));
        between.reverse();
        let slice = |v: &Value| matches!(graph.dag[v.node].op, Op::SliceLast { .. }) && sole(graph, *v);
        if !halves.iter().all(slice) {
            return None;
        }
        let first = base(graph, halves[0]);
        let only = graph.users(first).len() == 2 && base(graph, halves[1]) == first && !graph.is_output(first);
        (only && product(&graph.dag[first.node].op)).then(|| Mlp {
            x: graph.inputs(first.node)[0],
            first: first.node,
            between,
            second,
        })
    }

    fn weights(&self, graph: &Graph) -> [Value; 2] {
        [self.first, self.second].map(|n| graph.inputs(n)[1])
    }
}

fn sole(graph: &Graph, value: Value) -> bool {
    graph.users(value).len() == 1 && !graph.is_output(value)
}

struct Moe {
    add: NodeId,
    routed: Mlp,
    shared: Mlp,
    ids: Value,
    weights: Value,
    experts: u32,
    per_token: u32,
}

impl Moe {
    fn find(graph: &Graph, add: NodeId) -> Option<Moe> {
        if graph.dag[add].op != Op::Add {
            return None;
        }
        let &[routed, shared] = graph.inputs(add).as_slice() else { return None };
        if graph.dag[routed.node].op != Op::WeightedSum || !sole(graph, routed) || !sole(graph, shared) {
            return None;
        }
        let (y, weights) = (graph.inputs(routed.node)[0], graph.inputs(routed.node)[1]);
        let routed =
            Mlp::ending(graph, y.node, |op| matches!(op, Op::ExpertLinear { .. })).filter(|_| sole(graph, y))?;
        let shared = Mlp::ending(graph, shared.node, |op| *op == Op::Linear)?;
        let Op::ExpertLinear { per_token, .. } = graph.dag[routed.first].op else { return None };
        let ids = graph.inputs(routed.first).get(2).copied()?;
        let experts = graph.tensor(routed.weights(graph)[0]).shape[0].constant()?;
        let same = routed.x == shared.x
            && graph.inputs(routed.second).get(2) == Some(&ids)
            && routed.between.len() == shared.between.len()
            && routed.weights(graph).iter().zip(shared.weights(graph)).all(|(&w, one)| stacks(graph, w, one));
        same.then_some(Moe { add, routed, shared, ids, weights, experts, per_token })
    }

    fn merge(&self, graph: &mut Graph) {
        let append = |graph: &mut Graph, of: Value, value: f32| {
            let name = format!("{}.and_shared", graph.dag[of.node].name);
            let mut ty = graph.tensor(of).clone();
            ty.shape[1] = (self.per_token + 1).into();
            graph.add1(name, Op::Append { value }, &[of], ty)
        };
        let ids = append(graph, self.ids, self.experts as f32);
        let weights = append(graph, self.weights, 1.0);
        let [w1, w2] = [0, 1]
            .map(|i| stack(graph, self.routed.weights(graph)[i], self.shared.weights(graph)[i], self.experts + 1));
        let op = Op::ExpertLinear { per_token: self.per_token + 1, x_sorted: false, y_sorted: false };
        let first = self.copy(graph, self.routed.first, op.clone(), &[self.routed.x, w1, ids]);
        let mut made = vec![(self.routed.first, first)];
        for &node in &self.routed.between {
            let inputs: Vec<Value> = graph.inputs(node).iter().map(|v| moved(&made, v.node)).collect();
            let op = graph.dag[node].op.clone();
            let copy = self.copy(graph, node, op, &inputs);
            made.push((node, copy));
        }
        let x = made.last().map_or(first, |m| m.1);
        let y = self.copy(graph, self.routed.second, op, &[x, w2, ids]);
        let old = Value { node: self.add, output: 0 };
        let (name, ty) = (graph.dag[self.add].name.clone(), graph.tensor(old).clone());
        let sum = graph.add1(name, Op::WeightedSum, &[y, weights], ty);
        graph.replace_uses(old, sum);
    }

    /// A node of the routed experts with a row more a token.
    fn copy(&self, graph: &mut Graph, node: NodeId, op: Op, inputs: &[Value]) -> Value {
        let mut ty = graph.tensor(Value { node, output: 0 }).clone();
        ty.shape[1] = (self.per_token + 1).into();
        graph.add1(graph.dag[node].name.clone(), op, inputs, ty)
    }
}

fn moved(made: &[(NodeId, Value)], node: NodeId) -> Value {
    made.iter().find(|m| m.0 == node).expect("members come in topological order").1
}

/// The table's entry of a weight that nothing else reads and that is made by stacking.
fn own(graph: &Graph, value: Value) -> Option<&Weight> {
    let Op::Weight(i) = graph.dag[value.node].op else { return None };
    let nodes = graph.dag.node_weights().filter(|n| n.op == Op::Weight(i)).count();
    let weight = &graph.weights[i as usize];
    (nodes == 1 && sole(graph, value) && matches!(weight.source, WeightSource::Tensors(_))).then_some(weight)
}

/// Whether `one` is a matrix like each of `many`.
fn stacks(graph: &Graph, many: Value, one: Value) -> bool {
    match (own(graph, many), own(graph, one)) {
        (Some(many), Some(one)) => many.ty.elem == one.ty.elem && many.ty.shape[1..] == one.ty.shape[..],
        _ => false,
    }
}

fn stack(graph: &mut Graph, many: Value, one: Value, experts: u32) -> Value {
    let (Some(many), Some(one)) = (own(graph, many), own(graph, one)) else { unreachable!("found as such") };
    let parts = [many, one].into_iter().flat_map(|w| match &w.source {
        WeightSource::Tensors(parts) => parts.clone(),
        WeightSource::RopeTable { .. } | WeightSource::Hadamard { .. } => unreachable!("only tensors stack"),
    });
    let source = WeightSource::Tensors(parts.collect());
    let name = format!("{}+{}", many.name, one.name);
    let mut ty: TensorType = many.ty.clone();
    ty.shape[0] = Extent::from(experts);
    let index = graph.weights.len() as u32;
    graph.weights.push(Weight { name: name.clone(), ty: ty.clone(), source });
    graph.add1(name, Op::Weight(index), &[], ty)
}
