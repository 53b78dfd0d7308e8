//! Memory plan: a place in one arena for every intermediate of a step.
//!
//! Each value that a launch writes lives from that launch to the last one that reads it (through slices and reshapes, which
//! are views). Two values may share bytes when their lives do not meet. Values are placed largest first, each at the lowest
//! offset where it meets no placed value whose life overlaps: close to optimal for these graphs, where a step's peak is one
//! layer's widest moment. Sizes are those of the class's largest step, so the arena is one exact number of bytes and offsets are
//! constants of the artifact.
//!
//! Cost: quadratic in the values of a step, about 1000 for 61 layers.

use super::pieces::Looped;
use super::{ALIGN, total_bytes};
use dsc_ir::SymValues;
use dsc_ir::graph::{Graph, NodeId, Op, TensorType, Value, ValueType};
use std::collections::HashMap;

/// Where each value is.
#[derive(Clone, Debug, Default)]
pub struct Placement {
    /// Byte offset of each placed value.
    pub offsets: HashMap<Value, u64>,
    /// Bytes of the arena.
    pub bytes: u64,
    /// Bytes that the values would take without sharing.
    pub unshared_bytes: u64,
}

/// The value whose memory `value` is a view on, and how many views lie between.
pub fn root(graph: &Graph, mut value: Value) -> (Value, usize) {
    let mut views = 0;
    // Sums over ranks are made in place.
    while matches!(graph.dag[value.node].op, Op::SliceLast { .. } | Op::Reshape | Op::AllReduce { .. }) {
        value = graph.inputs(value.node)[0];
        views += 1;
    }
    (value, views)
}

/// The index of the cache that a state value is a version of.
pub fn state_of(graph: &Graph, value: Value) -> Option<u32> {
    match &graph.dag[value.node].op {
        Op::State(i) => Some(*i),
        Op::CacheWrite => state_of(graph, *graph.inputs(value.node).first()?),
        Op::Fused(fused) => {
            let (_, inner) = fused.body.outputs.get(value.output as usize)?;
            let arg = arg_of(&fused.body, *inner)?;
            state_of(graph, *graph.inputs(value.node).get(arg as usize)?)
        }
        _ => None,
    }
}

/// The argument of a fused body that a state value is a version of.
fn arg_of(body: &Graph, value: Value) -> Option<u32> {
    match &body.dag[value.node].op {
        Op::Arg(i) => Some(*i),
        Op::CacheWrite => arg_of(body, *body.inputs(value.node).first()?),
        _ => None,
    }
}

struct Life {
    value: Value,
    bytes: u64,
    first: usize,
    last: usize,
}

/// Places every tensor that `launches` write, except logits and tokens, which have buffers of their own. Of the launches in a loop the matrix has the
/// loop's bytes, and what they read or write lives while it runs.
pub(super) fn place(graph: &Graph, launches: &[NodeId], max: &SymValues, looped: &[Looped]) -> Placement {
    let mut lives = lives(graph, launches, max, looped);
    let unshared_bytes = lives.iter().map(|l| l.bytes).sum();
    lives.sort_by_key(|l| (std::cmp::Reverse(l.bytes), l.first, l.value));
    let mut placed: Vec<(u64, &Life)> = Vec::with_capacity(lives.len());
    let mut placement = Placement { unshared_bytes, ..Placement::default() };
    for life in &lives {
        let offset = lowest_gap(&placed, life);
        let at = placed.partition_point(|(o, _)| *o <= offset);
        placed.insert(at, (offset, life));
        placement.offsets.insert(life.value, offset);
        placement.bytes = placement.bytes.max(offset + life.bytes);
    }
    placement
}

fn lives(graph: &Graph, launches: &[NodeId], max: &SymValues, looped: &[Looped]) -> Vec<Life> {
    let mut time: HashMap<NodeId, usize> = launches.iter().enumerate().map(|(i, &n)| (n, i)).collect();
    // What the first launch of a loop reads it reads again behind the last one: all are one moment.
    for [first, last] in looped.iter().map(|l| l.nodes) {
        time.insert(last, time[&first]);
    }
    let bytes = |value: Value, ty: &TensorType| match looped.iter().find(|l| l.matrix == value) {
        Some(looped) => looped.bytes,
        None => total_bytes(ty, max),
    };
    let results = graph.outputs.iter().filter(|(name, _)| ["logits", "tokens"].contains(&name.as_str()));
    let results: Vec<Value> = results.map(|(_, v)| *v).collect();
    let mut lives = Vec::new();
    for &node in launches {
        let first = time[&node];
        for (output, ty) in graph.dag[node].outputs.iter().enumerate() {
            let value = Value { node, output: output as u32 };
            let ValueType::Tensor(ty) = ty else { continue };
            if !results.contains(&value) {
                let bytes = bytes(value, ty).next_multiple_of(ALIGN);
                lives.push(Life { value, bytes, first, last: last_use(graph, value, &time).max(first) });
            }
        }
    }
    lives
}

/// The last launch that reads `value`, through any views.
fn last_use(graph: &Graph, value: Value, time: &HashMap<NodeId, usize>) -> usize {
    let through = |user: NodeId| match time.get(&user) {
        Some(&t) => t,
        None => last_use(graph, Value { node: user, output: 0 }, time),
    };
    graph.users(value).into_iter().map(|(user, _)| through(user)).max().unwrap_or(0)
}

/// The lowest offset at which `life` fits; `placed` is in order of offset.
fn lowest_gap(placed: &[(u64, &Life)], life: &Life) -> u64 {
    let mut offset = 0;
    for (at, other) in placed {
        if other.last < life.first || life.last < other.first {
            continue;
        }
        if offset + life.bytes <= *at {
            break;
        }
        offset = offset.max(at + other.bytes);
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsc_ir::graph::StepInput;
    use dsc_ir::{DType, Sym};

    /// A chain of rowwise ops: two buffers suffice, whatever its length.
    #[test]
    fn a_chain_ping_pongs_between_two_places() {
        let mut g = Graph::default();
        let ids = g.add1("ids", Op::Input(StepInput::Tokens), &[], TensorType::plain(DType::I32, &[Sym::T.into()]));
        let ty = TensorType::plain(DType::F32, &[Sym::T.into(), 64.into()]);
        let mut x = g.add1("x0", Op::Embed, &[ids, ids], ty.clone());
        for i in 1..8 {
            x = g.add1(format!("x{i}"), Op::Sigmoid, &[x], ty.clone());
        }
        g.outputs.push(("hidden.0".into(), x));
        let (launches, _) = super::super::launch_order(&g);
        let max = SymValues::default().with(Sym::T, 16);
        let placement = place(&g, &launches, &max, &[]);
        assert_eq!(launches.len(), 8);
        assert_eq!(placement.bytes, 2 * 16 * 64 * 4);
        assert_eq!(placement.unshared_bytes, 8 * 16 * 64 * 4);
    }

    /// A view keeps its source alive.
    #[test]
    fn views_extend_lives() {
        let mut g = Graph::default();
        let ids = g.add1("ids", Op::Input(StepInput::Tokens), &[], TensorType::plain(DType::I32, &[Sym::T.into()]));
        let ty = |n: u32| TensorType::plain(DType::F32, &[Sym::T.into(), n.into()]);
        let x = g.add1("x", Op::Embed, &[ids, ids], ty(64));
        let half = g.add1("half", Op::SliceLast { start: 0, len: 32 }, &[x], ty(32));
        let y = g.add1("y", Op::Sigmoid, &[x], ty(64));
        let z = g.add1("z", Op::Sigmoid, &[y], ty(64));
        let w = g.add1("w", Op::Sigmoid, &[half], ty(32));
        g.outputs = vec![("z".into(), z), ("w".into(), w)];
        let (launches, _) = super::super::launch_order(&g);
        let placement = place(&g, &launches, &SymValues::default().with(Sym::T, 4), &[]);
        let overlap = |a: Value, b: Value| {
            let (a, b) = (placement.offsets[&a], placement.offsets[&b]);
            a < b + 1024 && b < a + 1024
        };
        assert!(!overlap(x, y) && !overlap(x, z), "x is read through `half` after z is made");
    }
}
