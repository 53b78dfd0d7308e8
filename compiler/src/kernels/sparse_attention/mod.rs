//! The DeepSeek sparse attention chain: indexer logits, top-k, attention over the selected keys; whole or in part.
//!
//! Whole, a block takes `tile_m` tokens of one sequence (one token, in classes with several sequences):
//!
//! ```text
//! iq [R·Hi, Di], iw [R, Hi]                             select
//! for each page j up to the tile's last position {
//!     s = relu(iq · keys[j]ᵀ) · iw, summed over heads   [R, 64]     times key scales
//!     s = -inf where 64 j + column > position
//!     push s to the running top-k of each row
//! }
//! for each token of the tile, each tile of heads {      attend
//!     m, l, acc = -big, 0, 0                            [h, 1], [h, 1], [h, L] (and the largest score, where wanted)
//!     for each tile of selected positions {
//!         slot = page_table[position / 64] · 64 + position % 64
//!         c, r = latent[slot], rope[slot]               [n, L], [n, rope], dequantised
//!         s = (q_latent · cᵀ + q_rope · rᵀ) · scale · log2 e, -inf where nothing is selected
//!         online softmax in powers of two relative to m: l; acc = acc · α + p · c
//!     }
//!     store acc / l
//! }
//! ```
//!
//! No `[T, C]` matrix exists: the logits of a page live until they are pushed. If every context of the tile is at most
//! `select_all_below`, the selection is `0..=position` and no key is scored; in a class whose contexts are all that short, the
//! scoring is not even emitted. The selection stays on chip; a tile of it is picked by a masked maximum, `tile_m · k` operations
//! against `tile_n · H · (2 L + R)` of the tile's products.
//!
//! Heads come in tiles of at most 64, so that `acc` stays near; each repeats the gathers, a small part of the products. Attention
//! with a given selection needs no scores, so heads get a grid axis: that is how one decoded token occupies a whole machine.
//!
//! Ops alone: `indexer_logits` writes its `[T, C]` matrix, some pages a block; `top_k` reads one. If all are to be selected below some
//! length, neither scores nor searches there: visible scores are 0, and what is not −inf is the selection. `mqa_partial` is
//! attention with a third grid axis: each block takes an equal share of the tiles that hold something, and stores its accumulator as
//! it is, with maximum and sum; `epilogue` joins them.
//!
//! Graphs of a kernel library use the forms of the ops without step inputs ([`Op::IndexerLogits`]): keys in a matrix instead of pages,
//! first and last columns instead of a position, slots instead of positions. The programs differ in where a tile of keys comes
//! from and in what is visible; columns that nobody may look at are not stored.
//!
//! Scores are in `indexer`, selections in `select`, attention in `attend`.
//!
//! Floors of a token with context `C`: scoring `2 C Hi Di` operations, `C` index rows (shared by the tile's tokens); attention
//! `2 k H (2 L + R)` operations and `k` latent rows.

mod attend;
mod indexer;
mod select;

use super::linear::tile;
use super::view::{Emit, sum, times};
use super::{Class, Emitted, KernelError, Part, body_of, elem_name, several_sequences};
use attend::{Attend, attention};
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, Op, Value};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, ValueId};
use indexer::{Indexer, logits};
use select::{Chosen, last_selected, select_from_matrix};

/// The kernel of a sparse attention body, or of one of its ops alone.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = body_of(graph, node)?;
    let parts = Parts::of(graph, node, &fused.body)?;
    let e = Emit::new(graph, node, Some(&fused.body), &parts.name(&fused.body));
    match (parts.logits, parts.topk, parts.attention) {
        (Some(_), Some(_), _) => whole(e, &fused.body, &parts, fused.select_all_below, schedule, class),
        (None, None, Some(n)) => attention(e, &fused.body, n, schedule, class),
        (Some(n), None, None) => logits(e, &fused.body, n, fused.select_all_below, schedule, class),
        (None, Some(topk), None) => select_from_matrix(e, &fused.body, topk, fused.select_all_below, schedule, class),
        _ => Err(e.unsupported("this part of the sparse attention chain; leave its ops unfused")),
    }
}

/// The ops of a body.
struct Parts {
    logits: Option<NodeId>,
    topk: Option<(NodeId, u32)>,
    attention: Option<NodeId>,
}

impl Parts {
    fn of(graph: &Graph, node: NodeId, body: &Graph) -> Result<Parts, KernelError> {
        let mut parts = Parts { logits: None, topk: None, attention: None };
        for n in body.order() {
            let again = match &body.dag[n].op {
                Op::Arg(_) | Op::SliceLast { .. } | Op::Reshape => false,
                Op::IndexerLogits => parts.logits.replace(n).is_some(),
                Op::TopK { k } => parts.topk.replace((n, *k)).is_some(),
                Op::MqaAttention { .. } | Op::MqaPartial { .. } => parts.attention.replace(n).is_some(),
                _ => true,
            };
            if again {
                let op = super::op_name(&body.dag[n].op);
                return Err(super::unsupported(graph, node, format!("{op} in a sparse attention body, or twice")));
            }
        }
        Ok(parts)
    }

    fn name(&self, body: &Graph) -> String {
        let mut name = String::from("dsa");
        let input = |n: NodeId, i: usize| body.inputs(n)[i];
        if let Some(n) = self.logits {
            name += &format!("_index_{}", elem_name(body.ty(input(n, 0))));
        }
        if let Some((_, k)) = self.topk {
            name += &format!("_top{k}");
        }
        if let Some(n) = self.attention {
            let q = input(n, 0);
            let shape = &body.tensor(q).shape;
            let part = match body.dag[n].op {
                Op::MqaPartial { parts, .. } => format!("part{parts}_"),
                _ => String::new(),
            };
            name += &format!("_mqa_{part}{}_h{}_l{}", elem_name(body.ty(q)), shape[1].factor, shape[2].factor);
        }
        name
    }
}

/// Which output of the node is the first result of an op of the body.
fn output_of(body: &Graph, node: NodeId) -> Option<u32> {
    output_at(body, Value { node, output: 0 })
}

/// Which output of the node is that value of the body.
fn output_at(body: &Graph, value: Value) -> Option<u32> {
    body.outputs.iter().position(|(_, v)| *v == value).map(|i| i as u32)
}

fn whole(
    mut e: Emit,
    body: &Graph,
    parts: &Parts,
    select_all_below: u32,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let (Some(scored), Some((topk, k))) = (parts.logits, parts.topk) else {
        return Err(e.unsupported("a chain without indexer"));
    };
    let (bounds, visible) = (body.inputs(topk), body.inputs(scored));
    let same = match bounds.len() {
        1 => visible.len() == 6,
        2 => bounds[1] == visible[3],
        _ => bounds[1..] == visible[3..5],
    };
    if !same {
        return Err(e.unsupported("a selection from other columns than are scored; leave the two unfused"));
    }
    let rows = tokens_of_block(schedule, class, body.inputs(scored).len());
    let token = e.b.grid(Sym::T, rows);
    let token = times(&mut e.b, token, rows);
    let indexer = Indexer::new(&mut e, body, scored, (rows, token), class)?;
    // Where selection is cheap, short contexts take no other way than long ones.
    let below = if schedule.cluster > 0 { 0 } else { select_all_below.min(k) };
    let selection = if class.max.get(Sym::C) <= select_all_below.min(k) {
        indexer.all_visible(&mut e.b, k)
    } else if below == 0 {
        indexer.select(&mut e.b, k)
    } else {
        let span = indexer.span(&mut e.b);
        let short = e.b.map(&[span], |m, v| {
            let below = m.i32(below as i32);
            m.lt(v[0], below)
        });
        e.b.if_(short, |b| vec![indexer.all_visible(b, k)], |b| vec![indexer.select(b, k)])[0]
    };
    if let Some(output) = output_of(body, topk) {
        let y = e.write("selected", output, Part::Data, None)?;
        e.b.store(y, &[token.into(), 0.into()], selection);
    }
    if let Some(n) = parts.attention {
        let attend = Attend::new(&mut e, body, n, schedule, (rows, k))?;
        let seq = attend.pages.map(|_| indexer.seq);
        let chosen = Chosen::new(&mut e.b, selection, rows, k, attend.keys);
        for_each(&mut e.b, rows, |b, r| {
            let token = sum(b, token, r);
            let row = chosen.row(b, r);
            let end = last_selected(b, row);
            let pick = |b: &mut Builder, j: ValueId| chosen.tile(b, row, j);
            for_each_tile(b, attend.heads, attend.head_tile, |b, head| {
                attend.emit(b, token, head, seq, (end, None), &pick);
            });
        });
    }
    e.finish(format!(
        "sparse attention: indexer, top {k}{}",
        if parts.attention.is_some() { ", attention" } else { "" }
    ))
}

/// Tokens of one block: neighbours share a sequence where there is one, or all have as many (scores from five operands).
fn tokens_of_block(schedule: &Schedule, class: &Class, operands: usize) -> u32 {
    let neighbours = if !several_sequences(class) {
        class.max.get(Sym::T)
    } else if operands == 5 {
        queries(class)
    } else {
        1
    };
    // A block's tokens are whole sequences' or parts of one.
    let divisor = if several_sequences(class) { 1 << neighbours.trailing_zeros() } else { neighbours };
    tile(schedule.tile_m, 1, divisor.into())
}

/// Tokens of a sequence, in classes where all have as many.
pub(super) fn queries(class: &Class) -> u32 {
    (class.max.get(Sym::T) / class.max.get(Sym::S).max(1)).max(1)
}

/// Runs `body` for `0..n`; straight code if `n` is 1.
fn for_each(b: &mut Builder, n: u32, body: impl Fn(&mut Builder, ValueId)) {
    for_each_tile(b, n, 1, body);
}

/// Runs `body` for `0, step, .. < n`; straight code if that is one round.
fn for_each_tile(b: &mut Builder, n: u32, step: u32, body: impl Fn(&mut Builder, ValueId)) {
    if n <= step {
        let zero = b.full_i32(0, &[]);
        return body(b, zero);
    }
    b.for_(0, n, step, &[], |b, i, _| {
        body(b, i);
        vec![]
    });
}
