//! Clusters the ops that work on each token's row by itself into fused row nodes.
//!
//! ```text
//! before                                   after
//! s = add h, attn            f32           h2, q = fused row (h, attn, gain) {
//! h2 = cast s                bf16              s, h2, n, q as before
//! n = rms_norm s, gain       bf16          }
//! q = quantize n             fp8           y = linear q, w
//! y = linear q, w
//! ```
//!
//! Which ops: [`is_row_op`]. Row `t` of their results needs row `t` of their operands (of an operand gathered by index, for
//! `take_rows`), parameters, and nothing else; a cache write puts row `t` where its slot says. So any set of them over the same
//! rows runs row by row, all ops on one row before the next, and intermediate rows never leave the chip.
//!
//! One rule builds the clusters: **two clusters over the same rows may become one if the graph of clusters stays acyclic**.
//! It is tried
//!
//! 1. on producer and consumer, in topological order. Norm + quantisation, rotation + quantisation + cache write, SwiGLU +
//!    quantisation and expert sum + residual + norm + quantisation fall out;
//! 2. on clusters that read the same computed value. After `merge_projections` the norm of the query latent and everything that
//!    becomes of the key's latent, rope part and index key are slices of one product, and join;
//! 3. on clusters that read products of one activation: the activations of routed and shared experts, the indexer's head weights.
//!
//! The graph of clusters, not convexity of each, is what must be checked: `{a1, a2}` and `{b1, b2}` with `a1 → b1`, `b2 → a2` are
//! each convex and wait for each other.
//!
//! "The same rows" means equal symbolic dims of the results: `[T, D]` and `[T, H, D]` are the same rows, `[L, D]`
//! and an expanded cache `[S, C, D]` are others. So `take_rows` starts a cluster: its operand has other rows.
//!
//! Legal: as said. Every op still rounds to its own type, so results do not change by a bit.
//!
//! Effect: about 30 row ops of a layer become 6 launches, and a tensor between two of them is read and written nowhere. Joining
//! siblings costs parallelism at very small steps, where a row is one block's work: kernels may spread a body's independent
//! chains over blocks.
//!
//! Cost: each trial is a search over clusters; linear in their number, quadratic in all.

use super::outline::{base, escaping, outline};
use super::{Cx, is_source, is_view};
use dsc_ir::Extent;
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, Value, ValueType};
use std::collections::HashMap;

/// See the top of the file. Returns the number of clusters made.
pub fn fuse_rows(graph: &mut Graph, _cx: &Cx) -> usize {
    let mut clusters = Clusters::new(graph);
    clusters.join_producers();
    clusters.join_siblings(&|clusters, node| clusters.values_read(node));
    clusters.join_siblings(&|clusters, node| clusters.products_read(node));
    let clusters = clusters.finish();
    for members in &clusters {
        let outputs = escaping(graph, members);
        let name = cluster_name(graph, members);
        outline(graph, members, &outputs, FusedKind::Row, name);
    }
    clusters.len()
}

/// Ops whose result rows depend on the same rows of their operands only.
pub(super) fn is_row_op(op: &Op) -> bool {
    matches!(
        op,
        Op::Add
            | Op::Cast
            | Op::Scale { .. }
            | Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::Rope { .. }
            | Op::Hadamard
            | Op::Quantize
            | Op::Dequantize
            | Op::CacheWrite
            | Op::SwiGlu
            | Op::WeightedSum
            | Op::SumPartials
            | Op::TakeRows
            | Op::Sigmoid
    )
}

fn is_product(op: &Op) -> bool {
    matches!(op, Op::Linear | Op::LinearPartial { .. } | Op::ExpertLinear { .. } | Op::HeadLinear { .. })
}

/// The symbolic dims of what the op makes; for a cache write, of the slots. `None`: constant, or a product of matrices.
fn rows_of(graph: &Graph, node: NodeId) -> Option<Vec<Extent>> {
    let ty = match &graph.dag[node].outputs[0] {
        ValueType::Tensor(ty) => ty,
        ValueType::State(_) => graph.tensor(graph.inputs(node)[1]),
    };
    let rows: Vec<Extent> = ty.shape.iter().copied().filter(|e| e.sym.is_some()).collect();
    (!rows.is_empty()).then_some(rows)
}

/// First and last op: what goes in, what comes out.
fn cluster_name(graph: &Graph, members: &[NodeId]) -> String {
    let name = |n: NodeId| graph.dag[n].name.as_str();
    let (first, last) = (name(members[0]), name(members[members.len() - 1]));
    if first == last { first.to_string() } else { format!("{first}..{last}") }
}

/// What siblings have in common: a producer and one of its outputs.
type Read = (usize, u32);

/// The graph without views, its nodes partitioned into clusters. Nodes that are no row ops are clusters of one.
struct Clusters<'a> {
    graph: &'a Graph,
    /// Nodes but views, in topological order; other fields index into it.
    nodes: Vec<NodeId>,
    index: HashMap<NodeId, usize>,
    /// Producers of each node's inputs, through views.
    producers: Vec<Vec<usize>>,
    consumers: Vec<Vec<usize>>,
    /// Rows of a row op that may join others.
    rows: Vec<Option<Vec<Extent>>>,
    /// The cluster of each node, by its first member.
    cluster: Vec<usize>,
    /// Members by cluster, in topological order; empty for a cluster that joined another.
    members: Vec<Vec<usize>>,
}

impl<'a> Clusters<'a> {
    fn new(graph: &'a Graph) -> Clusters<'a> {
        let nodes: Vec<NodeId> = graph.order().into_iter().filter(|&n| !is_view(&graph.dag[n].op)).collect();
        let index: HashMap<NodeId, usize> = nodes.iter().enumerate().map(|(i, &n)| (n, i)).collect();
        let producer = |v: Value| index[&base(graph, v).node];
        let producers: Vec<Vec<usize>> =
            nodes.iter().map(|&n| graph.inputs(n).into_iter().map(producer).collect()).collect();
        let mut consumers = vec![Vec::new(); nodes.len()];
        for (to, from) in producers.iter().enumerate() {
            from.iter().for_each(|&from| consumers[from].push(to));
        }
        let rows = nodes.iter().map(|&n| is_row_op(&graph.dag[n].op).then(|| rows_of(graph, n)).flatten()).collect();
        let (cluster, members) = (0..nodes.len()).map(|i| (i, vec![i])).unzip();
        Clusters { graph, nodes, index, producers, consumers, rows, cluster, members }
    }

    fn op(&self, node: usize) -> &Op {
        &self.graph.dag[self.nodes[node]].op
    }

    /// Rule 1.
    fn join_producers(&mut self) {
        for node in 0..self.nodes.len() {
            for i in 0..self.producers[node].len() {
                self.try_join(self.producers[node][i], node);
            }
        }
    }

    /// Rules 2 and 3: joins clusters, in topological order, of which `reads` names the same thing.
    fn join_siblings(&mut self, reads: &dyn Fn(&Clusters<'_>, usize) -> Vec<Read>) {
        let mut readers: HashMap<Read, Vec<usize>> = HashMap::new();
        let row_ops: Vec<usize> = (0..self.nodes.len()).filter(|&n| self.rows[n].is_some()).collect();
        for node in row_ops {
            for read in reads(self, node) {
                let earlier = readers.entry(read).or_default();
                earlier.push(node);
                for other in earlier.clone() {
                    if self.try_join(other, node) {
                        break;
                    }
                }
            }
        }
    }

    /// Values computed outside a row op's cluster that it reads, as producer and output.
    fn values_read(&self, node: usize) -> Vec<Read> {
        let inputs = self.graph.inputs(self.nodes[node]).into_iter().map(|v| base(self.graph, v));
        let reads = inputs.map(|v| (self.index[&v.node], v.output));
        reads.filter(|&(from, _)| !is_source(self.op(from)) && self.cluster[from] != self.cluster[node]).collect()
    }

    /// Clusters that made the activations of the matrix products that a row op reads.
    fn products_read(&self, node: usize) -> Vec<Read> {
        let products = self.values_read(node).into_iter().filter(|&(from, _)| is_product(self.op(from)));
        products.map(|(from, _)| (self.cluster[self.producers[from][0]], 0)).collect()
    }

    /// Joins the clusters of two nodes if they run over the same rows and the graph of clusters stays acyclic.
    fn try_join(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.cluster[a], self.cluster[b]);
        if a == b || self.rows[a].is_none() || self.rows[a] != self.rows[b] {
            return false;
        }
        if self.reaches_around(a, b) || self.reaches_around(b, a) {
            return false;
        }
        let (to, from) = (a.min(b), a.max(b));
        let moved = std::mem::take(&mut self.members[from]);
        moved.iter().for_each(|&m| self.cluster[m] = to);
        self.members[to].extend(moved);
        self.members[to].sort_unstable();
        true
    }

    /// Whether a path leads from cluster `from` to cluster `to` through a third one.
    fn reaches_around(&self, from: usize, to: usize) -> bool {
        let mut seen = vec![false; self.nodes.len()];
        seen[from] = true;
        let mut work: Vec<usize> = vec![from];
        while let Some(at) = work.pop() {
            for &next in self.members[at].iter().flat_map(|&m| &self.consumers[m]) {
                let next = self.cluster[next];
                if next == to {
                    if at != from {
                        return true;
                    }
                } else if !seen[next] {
                    seen[next] = true;
                    work.push(next);
                }
            }
        }
        false
    }

    /// The clusters of row ops.
    fn finish(self) -> Vec<Vec<NodeId>> {
        let rowwise = self.members.iter().filter(|m| m.first().is_some_and(|&n| is_row_op(self.op(n))));
        rowwise.map(|members| members.iter().map(|&m| self.nodes[m]).collect()).collect()
    }
}
