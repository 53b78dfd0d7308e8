//! Fuses indexer logits, top-k and sparse attention into one node.
//!
//! ```text
//! before                                                after
//! l  = indexer_logits iq, iw, ik, pos, seqs, pages      o, sel = fused sparse_attention (..) {
//! sel = topk l                                              l, sel, o as before
//! o  = mqa_attention ql, qr, s, sel, seqs, pages        }
//! ```
//!
//! Where launches run all blocks at once ([`Cx::blocks`]) the chain is cut, so that each part has many blocks:
//!
//! ```text
//! many tokens (a block's tokens fill the target)         few tokens
//! sel = fused sparse_attention (..) { logits, topk }     l = fused sparse_attention (..) { logits }    pages x tokens
//! o = fused sparse_attention (..) { mqa_attention }      sel = fused sparse_attention (l) { topk }     tokens
//!                                                        p, m, t = mqa_partial[parts=16] ..            tokens x heads x parts
//!                                                        o = mqa_combine p, m, t
//! ```
//!
//! Where nothing of the graph reads `o` and the target's blocks can join parts by themselves ([`Cx::teams`]), attention stays whole: its schedule
//! divides it.
//!
//! With few tokens `l` is a matrix in memory, of fewer rows than the target has blocks; with many only where scores and selection are made for pieces of
//! the tokens ([`Class::pieces`](super::Class)), so that it stays small.
//!
//! Elsewhere the first attention that reads a selection takes the indexer with it. `sel` is a second result if something else wants it: a
//! later layer that shares the selection (whose attention becomes a node of its own), or the tap `topk.i`. A selection that no
//! MQA attention reads (the MHA class) becomes a node with the selection as its result.
//!
//! Legal: nothing but the top-k reads the logits; the set is convex (checked; if the attention's query depended on the selection
//! the indexer would get a node of its own).
//!
//! Effect: the `[T, C]` logits are inside a body, where the kernel makes them by tiles and selects as it goes: no buffer grows with
//! chunk times context, and a decode step launches one kernel for the whole chain.

use super::Cx;
use super::outline::{escaping, is_convex, outline};
use dsc_ir::graph::{FusedKind, Graph, NodeId, Op, TensorType, Value, ValueType};
use dsc_ir::schedule::Teams;
use dsc_ir::{DType, Extent, Sym};

/// See the top of the file. Returns the number of fused nodes made.
pub fn fuse_sparse_attention(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.blocks > 0 {
        return cut(graph, cx);
    }
    let mut fused = 0;
    for attention in nodes(graph, |op| matches!(op, Op::MqaAttention { .. })) {
        let mut members = indexer_of(graph, attention);
        members.push(attention);
        if !is_convex(graph, &members) {
            members = vec![attention];
        }
        fuse(graph, &members);
        fused += 1;
    }
    for topk in nodes(graph, |op| matches!(op, Op::TopK { .. })) {
        if let Some(logits) = logits_of(graph, topk) {
            fuse(graph, &[logits, topk]);
            fused += 1;
        }
    }
    fused
}

/// Heads that share a block of a split attention, of a single token and of several; selected keys of a round of its loop.
const HEADS: [u32; 2] = [16, Teams::HEADS];
const ROUND: u32 = 64;
/// Most parts.
const MOST_PARTS: u32 = 32;
/// What a block takes besides its rounds, and joining the parts, in rounds.
const START: u32 = 2;
const JOIN: u32 = 3;
/// What writing and reading the parts takes besides, in rounds, if every block there is leaves one of 64 heads (on an H200 with 128 heads: two
/// tokens in 32 parts 24.4 us, in 16, which are half of its blocks, 17.0).
const LEFT: u32 = 3;

fn cut(graph: &mut Graph, cx: &Cx) -> usize {
    let few = cx.few_tokens();
    let mut fused = 0;
    for attention in nodes(graph, |op| matches!(op, Op::MqaAttention { .. })) {
        let parts = if few && !by_teams(graph, cx, attention) { parts(graph, cx, attention) } else { 1 };
        if parts > 1 {
            split(graph, attention, parts)
        } else {
            fuse(graph, &[attention])
        }
        fused += 1;
    }
    for topk in nodes(graph, |op| matches!(op, Op::TopK { .. })) {
        let Some(logits) = logits_of(graph, topk) else { continue };
        if (few || cx.class.pieces.is_some()) && !cx.class.keep_mha {
            fuse(graph, &[logits]);
            fuse(graph, &[topk]);
        } else {
            fuse(graph, &[logits, topk]);
        }
        fused += 1;
    }
    fused
}

/// Whether blocks of the kernel itself divide the selected keys, as its schedule says.
fn by_teams(graph: &Graph, cx: &Cx, attention: NodeId) -> bool {
    let heads = graph.tensor(graph.inputs(attention)[0]).shape[1].constant().unwrap_or(1);
    let narrow = matches!(graph.dag[attention].op, Op::MqaAttention { narrow: true, .. });
    let result = Value { node: attention, output: 0 };
    let rounds = graph.tensor(graph.inputs(attention)[3]).shape[1].constant().unwrap_or(1).div_ceil(ROUND);
    let tokens = cx.class.max.get(Sym::T);
    // A model's only token is joined by the product of heads that follows, at no cost of its own.
    narrow && (tokens > 1 || graph.is_output(result)) && cx.teams.split(tokens, heads, rounds).0 > 1
}

/// Parts of the selected keys such that all blocks together are done soonest: in turns of as many as the target runs at once.
fn parts(graph: &Graph, cx: &Cx, attention: NodeId) -> u32 {
    let inputs = graph.inputs(attention);
    let dim = |v: Value, d: usize| graph.tensor(v).shape[d].constant().unwrap_or(1);
    let tokens = cx.class.max.get(Sym::T);
    let (all, few) = (dim(inputs[0], 1), HEADS[usize::from(tokens > 1 || cx.teams.pairs > 0)]);
    let blocks = tokens.saturating_mul(all.div_ceil(few));
    let rounds = dim(inputs[3], 1).div_ceil(ROUND);
    let at_once = u64::from(cx.blocks.max(1));
    // In quarters of a round.
    let cost = |parts: u32| {
        let made = u64::from(blocks) * u64::from(parts);
        let left = made * u64::from(4 * LEFT * all.min(few)) / (at_once * u64::from(Teams::HEADS));
        made.div_ceil(at_once) * u64::from(4 * (rounds.div_ceil(parts) + START))
            + if parts > 1 { u64::from(4 * JOIN) + left } else { 0 }
    };
    let most = MOST_PARTS.min(rounds);
    (0..).map(|n| 1 << n).take_while(|&parts| parts <= most).min_by_key(|&parts| cost(parts)).unwrap_or(1)
}

fn split(graph: &mut Graph, attention: NodeId, parts: u32) {
    let Op::MqaAttention { scale, narrow } = graph.dag[attention].op else { unreachable!("chosen as one") };
    let old = Value { node: attention, output: 0 };
    let (name, outputs, inputs) =
        (graph.dag[attention].name.clone(), graph.dag[attention].outputs.clone(), graph.inputs(attention));
    let mut shape = graph.tensor(old).shape.clone();
    shape.insert(2, parts.into());
    let f32s = |shape: &[Extent]| ValueType::Tensor(TensorType::plain(DType::F32, shape));
    let types = vec![f32s(&shape), f32s(&shape[..3]), f32s(&shape[..3])];
    let node = graph.add(name.clone(), Op::MqaPartial { scale, narrow, parts }, &inputs, types);
    let made = [0, 1, 2].map(|output| Value { node, output });
    let joined = graph.add(format!("{name}.combine"), Op::MqaCombine, &made, outputs.clone());
    for output in 0..outputs.len() as u32 {
        graph.replace_uses(Value { node: attention, output }, Value { node: joined, output });
    }
    graph.detach(attention);
}

fn nodes(graph: &Graph, wanted: impl Fn(&Op) -> bool) -> Vec<NodeId> {
    graph.order().into_iter().filter(|&n| wanted(&graph.dag[n].op)).collect()
}

/// Logits and top-k of an attention, unless an earlier attention has taken them.
fn indexer_of(graph: &Graph, attention: NodeId) -> Vec<NodeId> {
    const SELECTED: usize = 3;
    let topk = graph.inputs(attention)[SELECTED].node;
    logits_of(graph, topk).map_or(Vec::new(), |logits| vec![logits, topk])
}

/// The indexer logits that only this top-k reads.
fn logits_of(graph: &Graph, topk: NodeId) -> Option<NodeId> {
    if !matches!(graph.dag[topk].op, Op::TopK { .. }) {
        return None;
    }
    // None: an earlier attention has taken it.
    let logits = *graph.inputs(topk).first()?;
    let private = graph.users(logits).len() == 1 && !graph.is_output(logits);
    (private && graph.dag[logits.node].op == Op::IndexerLogits).then_some(logits.node)
}

/// Results in reverse order of the members: attention before selection.
fn fuse(graph: &mut Graph, members: &[NodeId]) {
    let last = *members.last().expect("a fused node has members");
    let name = graph.dag[last].name.clone();
    let mut outputs = escaping(graph, members);
    outputs.reverse();
    outline(graph, members, &outputs, FusedKind::SparseAttention, name);
}
