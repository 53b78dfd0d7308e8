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
//!     m, l, acc = -big, 0, 0                            [h, 1], [h, 1], [h, L]
//!     for each tile of selected positions {
//!         slot = page_table[position / 64] · 64 + position % 64
//!         c, r = latent[slot], rope[slot]               [n, L], [n, rope], dequantised
//!         s = (q_latent · cᵀ + q_rope · rᵀ) · scale · log2 e, -inf where nothing is selected
//!         online softmax in powers of two: m, l; acc = acc · α + p · c
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
//! Ops alone: `indexer_logits` writes its `[T, C]` matrix, a page a block; `top_k` reads one. If all are to be selected below some
//! length, neither scores nor searches there: visible scores are 0, and what is not −inf is the selection. `mqa_partial` is
//! attention with a third grid axis: each block takes an equal share of the tiles that hold something, and stores its accumulator as
//! it is, with maximum and sum; `epilogue` joins them.
//!
//! Floors of a token with context `C`: scoring `2 C Hi Di` operations, `C` index rows (shared by the tile's tokens); attention
//! `2 k H (2 L + R)` operations and `k` latent rows.

use super::cache::{self, Array, Cached};
use super::linear::tile;
use super::view::{Emit, divided, plus, product, range, sum, times};
use super::{Class, Emitted, KernelError, Part, body_of, elem_name, several_sequences};
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, Op, PAGE_TOKENS};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, ReduceKind, ValueId};
use dsc_ir::{DType, Extent};

/// Heads that share an accumulator, unless the schedule says otherwise.
const HEADS: u32 = 64;
/// Below every score: a finite stand-in for −inf whose differences are not NaN.
pub(super) const LOWEST: f32 = -1e30;

/// The kernel of a sparse attention body, or of one of its ops alone.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = body_of(graph, node)?;
    let parts = Parts::of(graph, node, &fused.body)?;
    let e = Emit::new(graph, node, Some(&fused.body), &parts.name(&fused.body));
    match (parts.logits, parts.topk, parts.attention) {
        (Some(_), Some(_), _) => whole(e, &fused.body, &parts, fused.select_all_below, schedule, class),
        (None, None, Some(n)) => attention(e, &fused.body, n, schedule),
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

/// Which output of the node is that value of the body.
fn output_of(body: &Graph, node: NodeId) -> Option<u32> {
    body.outputs.iter().position(|(_, v)| v.node == node).map(|i| i as u32)
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
    let rows = tokens_of_block(schedule, class);
    let token = e.b.grid(Sym::T, rows);
    let token = times(&mut e.b, token, rows);
    let indexer = Indexer::new(&mut e, body, scored, rows, token)?;
    let below = select_all_below.min(k);
    let selection = if class.max.get(Sym::C) <= below {
        all_visible(&mut e.b, indexer.positions, rows, k)
    } else if below == 0 {
        indexer.select(&mut e.b, k)
    } else {
        let short = e.b.map(&[indexer.last], |m, v| {
            let below = m.i32(below as i32);
            m.lt(v[0], below)
        });
        e.b.if_(short, |b| vec![all_visible(b, indexer.positions, rows, k)], |b| vec![indexer.select(b, k)])[0]
    };
    if let Some(output) = output_of(body, topk) {
        let y = e.write("selected", output, Part::Data, None)?;
        e.b.store(y, &[token.into(), 0.into()], selection);
    }
    if let Some(n) = parts.attention {
        let attend = Attend::new(&mut e, body, n, schedule, (rows, k))?;
        let chosen = Chosen::new(&mut e.b, selection, rows, k, attend.keys);
        for_each(&mut e.b, rows, |b, r| {
            let token = sum(b, token, r);
            let row = chosen.row(b, r);
            let end = last_selected(b, row);
            let pick = |b: &mut Builder, j: ValueId| chosen.tile(b, row, j);
            for_each_tile(b, attend.heads, attend.head_tile, |b, head| {
                attend.emit(b, token, head, indexer.seq, (end, None), &pick);
            });
        });
    }
    e.finish(format!(
        "sparse attention: indexer, top {k}{}",
        if parts.attention.is_some() { ", attention" } else { "" }
    ))
}

/// Tokens of one block: neighbours share a sequence only where there is one.
fn tokens_of_block(schedule: &Schedule, class: &Class) -> u32 {
    if several_sequences(class) { 1 } else { tile(schedule.tile_m, 1, class.max.get(Sym::T).into()) }
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

/// `0..=position`, then −1.
fn all_visible(b: &mut Builder, positions: ValueId, rows: u32, k: u32) -> ValueId {
    let numbers = b.iota(1, &[rows, k]);
    b.map(&[numbers, positions], |m, v| {
        let (visible, none) = (m.le(v[0], v[1]), m.i32(-1));
        m.select(visible, v[0], none)
    })
}

/// What scoring needs, loaded once a block.
struct Indexer {
    q: ValueId,
    weights: ValueId,
    keys: Cached,
    pages: ValueId,
    seq: ValueId,
    /// i32 `[R, 1]`.
    positions: ValueId,
    /// The largest of them.
    last: ValueId,
    shape: [u32; 2],
}

impl Indexer {
    fn new(e: &mut Emit, body: &Graph, node: NodeId, rows: u32, token: ValueId) -> Result<Indexer, KernelError> {
        let &[q, weights, state, positions, seqs, pages] = body.inputs(node).as_slice() else {
            return Err(e.unsupported("indexer_logits without its six inputs"));
        };
        let (heads, dim) = (e.dim(q, 1)?, e.dim(q, 2)?);
        let scale = match e.quant(q) {
            Some(quant) if quant.block[0] == 1 && quant.block[1] >= dim => Some(e.read_scales("q_scales", q)?),
            Some(_) => return Err(e.unsupported("index queries with several scales a head")),
            None => None,
        };
        let (qs, ws) = (e.read("q", q)?, e.read("weights", weights)?);
        let keys = cache::array(e, state, Array::Key, Access::Read)?;
        let (positions, seqs) = (e.read("positions", positions)?, e.read("seqs", seqs)?);
        let pages = e.page_table(pages)?;
        let b = &mut e.b;
        let seq = b.load_scalar(seqs, &[token.into()]);
        let positions = b.load(positions, &[token.into()], &[rows]);
        let last = b.reduce(positions, 0, ReduceKind::Max);
        let last = b.reshape(last, &[]);
        let positions = b.reshape(positions, &[rows, 1]);
        let q = b.load(qs, &[token.into(), 0.into(), 0.into()], &[rows, heads, dim]);
        let q = b.reshape(q, &[rows * heads, dim]);
        let weights = b.load(ws, &[token.into(), 0.into()], &[rows, heads]);
        let mut weights = b.cast(weights, DType::F32);
        weights = b.reshape(weights, &[rows * heads, 1]);
        if let Some(scale) = scale {
            let scale = b.load(scale, &[token.into(), 0.into(), 0.into()], &[rows, heads, 1]);
            let scale = b.reshape(scale, &[rows * heads, 1]);
            weights = product(b, weights, scale);
        }
        Ok(Indexer { q, weights, keys, pages, seq, positions, last, shape: [rows, heads] })
    }

    /// f32 `[R, 64]`: scores of the keys of page number `j` of the sequence, −inf beyond each token's position.
    fn scores(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let [rows, heads] = self.shape;
        let page = b.load_scalar(self.pages, &[j.into(), self.seq.into()]);
        let (keys, scales) = self.keys.page(b, page);
        let dots = b.dot_t(self.q, keys, None);
        let weighted = b.map(&[dots, self.weights], |m, v| {
            let zero = m.f32(0.0);
            let relu = m.max(v[0], zero);
            m.mul(relu, v[1])
        });
        let weighted = b.reshape(weighted, &[rows, heads, PAGE_TOKENS]);
        let scores = b.reduce(weighted, 1, ReduceKind::Sum);
        let mut scores = b.reshape(scores, &[rows, PAGE_TOKENS]);
        if let Some(scales) = scales {
            let scales = b.reshape(scales, &[1, PAGE_TOKENS]);
            scores = product(b, scores, scales);
        }
        let first = times(b, j, PAGE_TOKENS);
        let columns = b.iota(1, &[1, PAGE_TOKENS]);
        b.map(&[scores, columns, first, self.positions], |m, v| {
            let key = m.add(v[1], v[2]);
            let (visible, none) = (m.le(key, v[3]), m.f32(f32::NEG_INFINITY));
            m.select(visible, v[0], none)
        })
    }

    /// f32 `[R, 64]`: 0 for visible keys of a page and −inf for others.
    fn unscored(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let first = times(b, j, PAGE_TOKENS);
        let columns = b.iota(1, &[1, PAGE_TOKENS]);
        b.map(&[columns, first, self.positions], |m, v| {
            let (zero, none) = (m.f32(0.0), m.f32(f32::NEG_INFINITY));
            let key = m.add(v[0], v[1]);
            let visible = m.le(key, v[2]);
            m.select(visible, zero, none)
        })
    }

    /// i32 `[R, k]`.
    fn select(&self, b: &mut Builder, k: u32) -> ValueId {
        let pages = divided(b, self.last, PAGE_TOKENS);
        let pages = plus(b, pages, 1);
        let state = b.topk_init(self.shape[0], k);
        let state = b.for_(0, pages, 1, &[state], |b, j, state| {
            let scores = self.scores(b, j);
            let base = times(b, j, PAGE_TOKENS);
            vec![b.topk_push(state[0], scores, base)]
        })[0];
        b.topk_take(state).1
    }
}

/// A selection on chip, in tiles of keys.
struct Chosen {
    /// i32 `[R, tiles, n]`.
    tiles: ValueId,
    shape: [u32; 3],
}

impl Chosen {
    fn new(b: &mut Builder, selection: ValueId, rows: u32, k: u32, n: u32) -> Chosen {
        let mut padded = selection;
        if !k.is_multiple_of(n) {
            let none = b.full_i32(-1, &[rows, k.next_multiple_of(n) - k]);
            padded = b.concat(&[selection, none], 1);
        }
        let shape = [rows, k.div_ceil(n), n];
        Chosen { tiles: b.reshape(padded, &shape), shape }
    }

    /// The selection of token `r` of the tile: `[1, tiles, n]`.
    fn row(&self, b: &mut Builder, r: ValueId) -> ValueId {
        if self.shape[0] == 1 { self.tiles } else { pick(b, self.tiles, 0, r) }
    }

    /// Tile number `j` of a row: `[n]`.
    fn tile(&self, b: &mut Builder, row: ValueId, j: ValueId) -> ValueId {
        let tile = if self.shape[1] == 1 { row } else { pick(b, row, 1, j) };
        b.reshape(tile, &[self.shape[2]])
    }
}

/// The slice at `at` of an axis of an i32 tile of rank 3 whose elements are at least −1.
fn pick(b: &mut Builder, x: ValueId, axis: u32, at: ValueId) -> ValueId {
    let mut shape = vec![1; 3];
    shape[axis as usize] = b.shape(x)[axis as usize];
    let numbers = b.iota(axis, &shape);
    let masked = b.map(&[x, numbers, at], |m, v| {
        let (here, none) = (m.eq(v[1], v[2]), m.i32(-1));
        m.select(here, v[0], none)
    });
    b.reduce(masked, axis, ReduceKind::Max)
}

/// One more than the last place of a selection that is not −1: a scalar.
fn last_selected(b: &mut Builder, row: ValueId) -> ValueId {
    let n = b.shape(row).iter().product();
    let row = b.reshape(row, &[n]);
    let places = b.iota(0, &[n]);
    let ends = b.map(&[row, places], |m, v| {
        let (zero, one) = (m.i32(0), m.i32(1));
        let (end, empty) = (m.add(v[1], one), m.lt(v[0], zero));
        m.select(empty, zero, end)
    });
    let end = b.reduce(ends, 0, ReduceKind::Max);
    b.reshape(end, &[])
}

/// What attention needs, and its tiles.
struct Attend {
    q_latent: ValueId,
    q_rope: ValueId,
    latent: Cached,
    rope: Cached,
    pages: ValueId,
    to: To,
    heads: u32,
    head_tile: u32,
    keys: u32,
    scale: f32,
    narrow: bool,
}

/// Where attention goes.
enum To {
    /// The result.
    Whole(ValueId),
    /// Sums, largest scores and totals of so many parts of the selection.
    Parts([ValueId; 3], u32),
}

impl Attend {
    fn new(
        e: &mut Emit,
        body: &Graph,
        node: NodeId,
        schedule: &Schedule,
        (rows, k): (u32, u32),
    ) -> Result<Attend, KernelError> {
        let &[q_latent, q_rope, state, _, _, pages] = body.inputs(node).as_slice() else {
            return Err(e.unsupported("mqa_attention without its six inputs"));
        };
        let (scale, narrow, parts) = match body.dag[node].op {
            Op::MqaAttention { scale, narrow } => (scale, narrow, None),
            Op::MqaPartial { scale, narrow, parts } => (scale, narrow, Some(parts)),
            _ => return Err(e.unsupported("not an mqa_attention")),
        };
        let output = output_of(body, node).ok_or_else(|| e.unsupported("attention that nothing reads"))?;
        let heads = e.dim(q_latent, 1)?;
        debug_assert!(rows > 0);
        Ok(Attend {
            heads,
            head_tile: tile(schedule.tile_h, HEADS, heads.into()),
            keys: tile(schedule.tile_n, 64, k.into()),
            scale: scale * std::f32::consts::LOG2_E,
            q_latent: e.read("q_latent", q_latent)?,
            q_rope: e.read("q_rope", q_rope)?,
            latent: cache::array(e, state, Array::Latent, Access::Read)?,
            rope: cache::array(e, state, Array::Rope, Access::Read)?,
            pages: e.page_table(pages)?,
            to: match parts {
                None => To::Whole(e.write("y", output, Part::Data, None)?),
                Some(parts) => {
                    let sums = e.write("sums", output, Part::Data, None)?;
                    let largest = e.write("largest", output + 1, Part::Data, None)?;
                    To::Parts([sums, largest, e.write("totals", output + 2, Part::Data, None)?], parts)
                }
            },
            narrow,
        })
    }

    /// Attention of one token and one tile of heads over the first `end` places of a selection, which `pick` gives by tiles.
    fn emit(
        &self,
        b: &mut Builder,
        token: ValueId,
        head: ValueId,
        seq: ValueId,
        (end, part): (ValueId, Option<ValueId>),
        pick: &dyn Fn(&mut Builder, ValueId) -> ValueId,
    ) {
        let (h, n, l) = (self.head_tile, self.keys, self.latent.columns);
        let query = |b: &mut Builder, view: ValueId, columns: u32| {
            let q = b.load(view, &[token.into(), head.into(), 0.into()], &[1, h, columns]);
            b.reshape(q, &[h, columns])
        };
        let q_latent = query(b, self.q_latent, l);
        let q_rope = query(b, self.q_rope, self.rope.columns);
        let tiles = plus(b, end, n as i32 - 1);
        let tiles = divided(b, tiles, n);
        let (lo, hi): (Ix, Ix) = match (&self.to, part) {
            (To::Parts(_, parts), Some(part)) => share(b, tiles, *parts, part),
            _ => (0.into(), tiles.into()),
        };
        let init = [b.full(LOWEST, &[h, 1]), b.full(0.0, &[h, 1]), b.full(0.0, &[h, l])];
        let done = b.for_(lo, hi, 1, &init, |b, j, carried| {
            let chosen = pick(b, j);
            let slots = self.slots(b, chosen, seq);
            let keys = self.latent.gather(b, slots, n, self.narrow);
            let rope = self.rope.gather(b, slots, n, self.narrow);
            let scores = b.dot_t(q_latent, keys, None);
            let scores = b.dot_t(q_rope, rope, Some(scores));
            let chosen = b.reshape(chosen, &[1, n]);
            let scores = b.map(&[scores, chosen], |m, v| {
                let (scale, zero, none) = (m.f32(self.scale), m.i32(0), m.f32(f32::NEG_INFINITY));
                let (scaled, empty) = (m.mul(v[0], scale), m.lt(v[1], zero));
                m.select(empty, none, scaled)
            });
            online_softmax(b, scores, keys, self.narrow, carried)
        });
        match (&self.to, part) {
            (To::Whole(y), _) => {
                let out = normalized(b, done[1], done[2]);
                let to = b.dtype(*y);
                let out = b.cast(out, to);
                let out = b.reshape(out, &[1, h, l]);
                b.store(*y, &[token.into(), head.into(), 0.into()], out);
            }
            (To::Parts([sums, largest, totals], _), part) => {
                let part: Ix = part.map_or(0.into(), Ix::from);
                for (view, x) in [(*largest, done[0]), (*totals, done[1])] {
                    let x = b.reshape(x, &[1, h, 1]);
                    b.store(view, &[token.into(), head.into(), part], x);
                }
                let x = b.reshape(done[2], &[1, h, 1, l]);
                b.store(*sums, &[token.into(), head.into(), part, 0.into()], x);
            }
        }
    }

    /// Slots of positions of a sequence; −1 where a position is −1.
    fn slots(&self, b: &mut Builder, positions: ValueId, seq: ValueId) -> ValueId {
        let pages = divided(b, positions, PAGE_TOKENS);
        let pages = b.gather(self.pages, pages, &[seq.into()], &[self.keys, 1]);
        let pages = b.reshape(pages, &[self.keys]);
        b.map(&[positions, pages], |m, v| {
            let (page, zero, none) = (m.i32(PAGE_TOKENS as i32), m.i32(0), m.i32(-1));
            let (first, offset) = (m.mul(v[1], page), m.rem(v[0], page));
            let (slot, empty) = (m.add(first, offset), m.lt(v[0], zero));
            m.select(empty, none, slot)
        })
    }
}

/// The tiles of one of `parts` equal shares of `tiles` tiles.
fn share(b: &mut Builder, tiles: ValueId, parts: u32, part: ValueId) -> (Ix, Ix) {
    let each = plus(b, tiles, parts as i32 - 1);
    let each = divided(b, each, parts);
    let lo = product(b, each, part);
    let hi = b.map(&[lo, each, tiles], |m, v| {
        let end = m.add(v[0], v[1]);
        m.min(end, v[2])
    });
    (lo.into(), hi.into())
}

/// One step of a softmax in powers of two: scores `[h, n]` and values `[n, l]` join (maximum, sum, accumulator). With `narrow`,
/// probabilities round to the type of the values before they multiply them.
pub(super) fn online_softmax(
    b: &mut Builder,
    scores: ValueId,
    values: ValueId,
    narrow: bool,
    carried: &[ValueId],
) -> Vec<ValueId> {
    let (max, total, acc) = (carried[0], carried[1], carried[2]);
    let here = b.reduce(scores, 1, ReduceKind::Max);
    let new_max = b.map(&[max, here], |m, v| m.max(v[0], v[1]));
    let alpha = b.map(&[max, new_max], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    });
    let p = b.map(&[scores, new_max], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    });
    let here = b.reduce(p, 1, ReduceKind::Sum);
    let total = b.map(&[total, alpha, here], |m, v| {
        let old = m.mul(v[0], v[1]);
        m.add(old, v[2])
    });
    let acc = product(b, acc, alpha);
    let to = if narrow { b.dtype(values) } else { DType::F32 };
    let p = b.cast(p, to);
    vec![new_max, total, b.dot(p, values, Some(acc))]
}

/// `acc / total`; zero where nothing was selected.
pub(super) fn normalized(b: &mut Builder, total: ValueId, acc: ValueId) -> ValueId {
    b.map(&[acc, total], |m, v| {
        let (zero, one) = (m.f32(0.0), m.f32(1.0));
        let some = m.lt(zero, v[1]);
        let total = m.select(some, v[1], one);
        m.div(v[0], total)
    })
}

/// Attention over a selection in memory.
fn attention(mut e: Emit, body: &Graph, node: NodeId, schedule: &Schedule) -> Result<Emitted, KernelError> {
    let inputs = body.inputs(node);
    let k = e.dim(inputs[3], 1)?;
    let attend = Attend::new(&mut e, body, node, schedule, (1, k))?;
    let (selected, seqs) = (e.read("selected", inputs[3])?, e.read("seqs", inputs[4])?);
    let b = &mut e.b;
    let token = b.grid(Sym::T, 1);
    let head = b.grid(attend.heads, attend.head_tile);
    let part = match attend.to {
        To::Parts(_, parts) => Some(b.grid(parts, 1)),
        To::Whole(_) => None,
    };
    let head = times(b, head, attend.head_tile);
    let seq = b.load_scalar(seqs, &[token.into()]);
    let row = b.load(selected, &[token.into(), 0.into()], &[1, k]);
    let end = last_selected(b, row);
    let n = attend.keys;
    let pick = |b: &mut Builder, j: ValueId| {
        let at = times(b, j, n);
        let tile = b.load(selected, &[token.into(), at.into()], &[1, n]);
        let tile = b.reshape(tile, &[n]);
        // Past the last column a load reads 0, which is a position: not so here.
        if k.is_multiple_of(n) {
            return tile;
        }
        let columns = range(b, at, n);
        let width = b.full_i32(k as i32, &[]);
        super::view::where_below(b, tile, columns, width)
    };
    attend.emit(b, token, head, seq, (end, part), &pick);
    e.finish(format!("sparse attention: {} heads over a given selection of {k}", attend.heads))
}

/// The `[T, C]` matrix of indexer logits.
fn logits(
    mut e: Emit,
    body: &Graph,
    node: NodeId,
    select_all_below: u32,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let rows = tokens_of_block(schedule, class);
    let page = e.b.grid(Sym::C, PAGE_TOKENS);
    let token = e.b.grid(Sym::T, rows);
    let token = times(&mut e.b, token, rows);
    let indexer = Indexer::new(&mut e, body, node, rows, token)?;
    let output = output_of(body, node).ok_or_else(|| e.unsupported("logits that nothing reads"))?;
    let y = e.write("y", output, Part::Data, None)?;
    let b = &mut e.b;
    let first = times(b, page, PAGE_TOKENS);
    let visible = b.map(&[first, indexer.last], |m, v| m.le(v[0], v[1]));
    let wanted = if select_all_below == 0 {
        visible
    } else {
        let context = b.sym(Sym::C);
        b.map(&[visible, context], |m, v| {
            let below = m.i32(select_all_below as i32);
            let long = m.lt(below, v[1]);
            m.and(v[0], long)
        })
    };
    let scores = b.if_(wanted, |b| vec![indexer.scores(b, page)], |b| vec![indexer.unscored(b, page)])[0];
    b.store(y, &[token.into(), first.into()], scores);
    e.finish("indexer logits of a page a block")
}

/// Top-k of the rows of a `[T, C]` matrix. Rows of at most `select_all_below` columns select all that are not −inf, which then
/// come first: no search.
fn select_from_matrix(
    mut e: Emit,
    body: &Graph,
    (node, k): (NodeId, u32),
    select_all_below: u32,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let x = body.inputs(node)[0];
    let width: Extent = e.tensor(x).shape[1];
    let step = tile(0, 512, width.eval(&class.max));
    let rows = tile(schedule.tile_m, 1, class.max.get(Sym::T).into());
    let x = e.read("x", x)?;
    let output = output_of(body, node).ok_or_else(|| e.unsupported("a selection that nothing reads"))?;
    let y = e.write("selected", output, Part::Data, None)?;
    let b = &mut e.b;
    let token = b.grid(Sym::T, rows);
    let token = times(b, token, rows);
    let end = super::view::extent(b, width);
    let search = |b: &mut Builder| {
        let state = b.topk_init(rows, k);
        let state = b.for_(0, end, step, &[state], |b, at, state| {
            let values = b.load(x, &[token.into(), at.into()], &[rows, step]);
            let columns = b.iota(1, &[1, step]);
            let values = b.map(&[values, columns, at, end], |m, v| {
                let column = m.add(v[1], v[2]);
                let (inside, none) = (m.lt(column, v[3]), m.f32(f32::NEG_INFINITY));
                m.select(inside, v[0], none)
            });
            vec![b.topk_push(state[0], values, at)]
        })[0];
        b.topk_take(state).1
    };
    let all = |b: &mut Builder| {
        let values = b.load(x, &[token.into(), 0.into()], &[rows, k]);
        let columns = b.iota(1, &[rows, k]);
        b.map(&[values, columns, end], |m, v| {
            let (lowest, none) = (m.f32(f32::NEG_INFINITY), m.i32(-1));
            let (some, inside) = (m.lt(lowest, v[0]), m.lt(v[1], v[2]));
            let here = m.and(some, inside);
            m.select(here, v[1], none)
        })
    };
    let below = select_all_below.min(k);
    let numbers = if below == 0 {
        search(b)
    } else {
        let short = b.map(&[end], |m, v| {
            let below = m.i32(below as i32);
            m.le(v[0], below)
        });
        b.if_(short, |b| vec![all(b)], |b| vec![search(b)])[0]
    };
    b.store(y, &[token.into(), 0.into()], numbers);
    e.finish(format!("top {k} of a matrix of scores"))
}
