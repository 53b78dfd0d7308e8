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
//! Floors of a token with context `C`: scoring `2 C Hi Di` operations, `C` index rows (shared by the tile's tokens); attention
//! `2 k H (2 L + R)` operations and `k` latent rows.

use super::cache::{self, Array, Cached};
use super::linear::tile;
use super::view::{Emit, divided, plus, product, range, sum, times};
use super::{Class, Emitted, KernelError, Part, body_of, elem_name, several_sequences};
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, Op, PAGE_TOKENS, Value, ValueType};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, MapBuilder, MapVal, ReduceKind, ValueId};
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
fn queries(class: &Class) -> u32 {
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

/// Where index keys come from, 64 at a time.
enum Keys {
    /// A cache, by the page table of a sequence.
    Paged(Cached, ValueId),
    /// A matrix: elements or codes, and scales.
    Matrix(ValueId, Option<ValueId>, u32),
}

impl Keys {
    fn new(e: &mut Emit, state: Value, pages: Option<Value>) -> Result<Keys, KernelError> {
        if let Some(pages) = pages {
            let keys = cache::array(e, state, Array::Key, Access::Read)?;
            return Ok(Keys::Paged(keys, e.page_table(pages)?));
        }
        let columns = e.dim(state, 1)?;
        let scales = match e.quant(state) {
            Some(quant) if quant.block[0] == 1 && quant.block[1] >= columns => {
                let rows = e.tensor(state).shape[0];
                Some(e.read_as("key_scales", state, Part::Scales, &[rows])?)
            }
            Some(_) => return Err(e.unsupported("index keys with several scales")),
            None => None,
        };
        Ok(Keys::Matrix(e.read("keys", state)?, scales, columns))
    }

    /// Keys `64 j..64 j + 64` of a sequence: `[64, D]`, and their scales.
    fn page(&self, b: &mut Builder, j: ValueId, seq: ValueId) -> (ValueId, Option<ValueId>) {
        match self {
            Keys::Paged(cached, pages) => {
                let page = b.load_scalar(*pages, &[j.into(), seq.into()]);
                cached.page(b, page)
            }
            Keys::Matrix(data, scales, columns) => {
                let row = times(b, j, PAGE_TOKENS);
                let keys = b.load(*data, &[row.into(), 0.into()], &[PAGE_TOKENS, *columns]);
                let scales = scales.map(|s| b.load(s, &[row.into()], &[PAGE_TOKENS]));
                (keys, scales)
            }
        }
    }
}

/// What scoring needs, loaded once a block.
struct Indexer {
    q: ValueId,
    weights: ValueId,
    keys: Keys,
    seq: ValueId,
    /// First visible column of each row, i32 `[R, 1]`, and the smallest; none: 0.
    starts: Option<(ValueId, ValueId)>,
    /// Last visible column of each row: i32 `[R, 1]`.
    positions: ValueId,
    /// The largest of them.
    last: ValueId,
    shape: [u32; 2],
}

impl Indexer {
    fn new(
        e: &mut Emit,
        body: &Graph,
        node: NodeId,
        (rows, token): (u32, ValueId),
        class: &Class,
    ) -> Result<Indexer, KernelError> {
        let inputs = body.inputs(node);
        let &[q, weights, state, ..] = inputs.as_slice() else {
            return Err(e.unsupported("indexer_logits without its inputs"));
        };
        let matrix = matches!(body.ty(state), ValueType::Tensor(_));
        let (ends, seqs, pages) = match (inputs.len(), matrix) {
            (6, false) => (inputs[3], Some(inputs[4]), Some(inputs[5])),
            (5, false) => (inputs[3], None, Some(inputs[4])),
            (5, true) => (inputs[4], None, None),
            _ => return Err(e.unsupported("indexer_logits in none of its forms")),
        };
        let (heads, dim) = (e.dim(q, 1)?, e.dim(q, 2)?);
        let scale = match e.quant(q) {
            Some(quant) if quant.block[0] == 1 && quant.block[1] >= dim => Some(e.read_scales("q_scales", q)?),
            Some(_) => return Err(e.unsupported("index queries with several scales a head")),
            None => None,
        };
        let (qs, ws) = (e.read("q", q)?, e.read("weights", weights)?);
        let keys = Keys::new(e, state, pages)?;
        let positions = e.read(if inputs.len() == 6 { "positions" } else { "ends" }, ends)?;
        let seqs = seqs.map(|seqs| e.read("seqs", seqs)).transpose()?;
        let starts = if matrix { Some(e.read("starts", inputs[3])?) } else { None };
        let b = &mut e.b;
        let seq = match seqs {
            Some(seqs) => b.load_scalar(seqs, &[token.into()]),
            None => divided(b, token, queries(class)),
        };
        let mut positions = b.load(positions, &[token.into()], &[rows]);
        if inputs.len() == 5 {
            let columns = b.sym(Sym::C);
            positions = b.map(&[positions, columns], |m, v| {
                let one = m.i32(1);
                let end = m.min(v[0], v[1]);
                m.sub(end, one)
            });
        }
        let last = b.reduce(positions, 0, ReduceKind::Max);
        let last = b.reshape(last, &[]);
        let positions = b.reshape(positions, &[rows, 1]);
        let starts = starts.map(|starts| {
            let starts = b.load(starts, &[token.into()], &[rows]);
            let starts = b.map(&[starts], |m, v| {
                let zero = m.i32(0);
                m.max(v[0], zero)
            });
            (b.reshape(starts, &[rows, 1]), least(b, starts))
        });
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
        Ok(Indexer { q, weights, keys, seq, starts, positions, last, shape: [rows, heads] })
    }

    /// f32 `[R, 64]`: scores of the keys of page number `j` of the sequence, −inf where a row may not look.
    fn scores(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let [rows, heads] = self.shape;
        let (keys, scales) = self.keys.page(b, j, self.seq);
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
        self.masked(b, j, scores)
    }

    /// f32 `[R, 64]`: 0 for visible keys of a page and −inf for others.
    fn unscored(&self, b: &mut Builder, j: ValueId) -> ValueId {
        let zeros = b.full(0.0, &[1, PAGE_TOKENS]);
        self.masked(b, j, zeros)
    }

    /// Scores of page `j`, −inf where a row may not look.
    fn masked(&self, b: &mut Builder, j: ValueId, scores: ValueId) -> ValueId {
        let first = times(b, j, PAGE_TOKENS);
        let columns = b.iota(1, &[1, PAGE_TOKENS]);
        let mut inputs = vec![scores, columns, first, self.positions];
        inputs.extend(self.starts.map(|s| s.0));
        b.map(&inputs, |m, v| {
            let key = m.add(v[1], v[2]);
            let (mut visible, none) = (m.le(key, v[3]), m.f32(f32::NEG_INFINITY));
            if let Some(&start) = v.get(4) {
                let begun = m.le(start, key);
                visible = m.and(visible, begun);
            }
            m.select(visible, v[0], none)
        })
    }

    /// At least as many columns, less one, as a row may look at.
    fn span(&self, b: &mut Builder) -> ValueId {
        let Some((_, start)) = self.starts else { return self.last };
        b.map(&[self.last, start], |m, v| m.sub(v[0], v[1]))
    }

    /// i32 `[R, k]`: the visible columns, then −1.
    fn all_visible(&self, b: &mut Builder, k: u32) -> ValueId {
        let mut numbers = b.iota(1, &[self.shape[0], k]);
        if let Some((starts, _)) = self.starts {
            numbers = sum(b, numbers, starts);
        }
        b.map(&[numbers, self.positions], |m, v| {
            let (visible, none) = (m.le(v[0], v[1]), m.i32(-1));
            m.select(visible, v[0], none)
        })
    }

    /// i32 `[R, k]`.
    fn select(&self, b: &mut Builder, k: u32) -> ValueId {
        let pages = divided(b, self.last, PAGE_TOKENS);
        let pages = plus(b, pages, 1);
        let first: Ix = match self.starts {
            Some((_, start)) => divided(b, start, PAGE_TOKENS).into(),
            None => 0.into(),
        };
        let state = b.topk_init(self.shape[0], k);
        let state = b.for_(first, pages, 1, &[state], |b, j, state| {
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
    /// The page table, if positions are selected; else slots are.
    pages: Option<ValueId>,
    /// Slots that there are.
    slots: Extent,
    to: To,
    heads: u32,
    head_tile: u32,
    keys: u32,
    scale: f32,
    narrow: bool,
}

/// Where attention goes.
enum To {
    /// The result; and the logarithms of sums, and the largest scores, if they are wanted.
    Whole(ValueId, [Option<ValueId>; 2]),
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
        let inputs = body.inputs(node);
        let &[q_latent, q_rope, state, _, ..] = inputs.as_slice() else {
            return Err(e.unsupported("mqa_attention without its inputs"));
        };
        let pages = inputs[4..].last().copied();
        let (scale, narrow, parts) = match body.dag[node].op {
            Op::MqaAttention { scale, narrow } => (scale, narrow, None),
            Op::MqaPartial { scale, narrow, parts } => (scale, narrow, Some(parts)),
            _ => return Err(e.unsupported("not an mqa_attention")),
        };
        let output = output_of(body, node).ok_or_else(|| e.unsupported("attention that nothing reads"))?;
        let heads = e.dim(q_latent, 1)?;
        debug_assert!(rows > 0);
        let (latent, rope, slots) = match body.ty(state) {
            ValueType::State(_) => (
                cache::array(e, state, Array::Latent, Access::Read)?,
                cache::array(e, state, Array::Rope, Access::Read)?,
                Extent::from(Sym::N).times(PAGE_TOKENS),
            ),
            ValueType::Tensor(_) => {
                let (l, r) = (e.dim(q_latent, 2)?, e.dim(q_rope, 2)?);
                let latent = cache::columns(e, state, "latent", (0, l))?;
                (latent, cache::columns(e, state, "rope", (l, r))?, e.tensor(state).shape[0])
            }
        };
        Ok(Attend {
            heads,
            head_tile: tile(schedule.tile_h, HEADS, heads.into()),
            keys: tile(schedule.tile_n, 64, k.into()),
            scale: scale * std::f32::consts::LOG2_E,
            q_latent: e.read("q_latent", q_latent)?,
            q_rope: e.read("q_rope", q_rope)?,
            latent,
            rope,
            pages: pages.map(|pages| e.page_table(pages)).transpose()?,
            slots,
            to: match parts {
                None => {
                    let y = e.write("y", output, Part::Data, None)?;
                    To::Whole(y, statistics(e, |i| output_at(body, Value { node, output: i }))?)
                }
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
        seq: Option<ValueId>,
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
        let lowest = b.full(LOWEST, &[h, 1]);
        let mut init = vec![lowest, b.full(0.0, &[h, 1]), b.full(0.0, &[h, l])];
        let follow = match self.to {
            To::Whole(_, [_, most]) => {
                init.extend(most.map(|_| lowest));
                Follow::Rarely
            }
            To::Parts(..) => Follow::Always,
        };
        let done = b.for_(lo, hi, 1, &init, |b, j, carried| {
            let chosen = pick(b, j);
            let (chosen, slots) = self.slots(b, chosen, seq);
            let keys = self.latent.gather(b, slots, n, self.narrow);
            let rope = self.rope.gather(b, slots, n, self.narrow);
            let scores = b.dot_t(q_latent, keys, None);
            let scores = b.dot_t(q_rope, rope, Some(scores));
            let chosen = b.reshape(chosen, &[1, n]);
            // By key, not by score: that is one operation a score.
            let penalty = b.map(&[chosen], |m, v| {
                let (zero, free, none) = (m.i32(0), m.f32(0.0), m.f32(f32::NEG_INFINITY));
                let empty = m.lt(v[0], zero);
                m.select(empty, none, free)
            });
            let scores = b.map(&[scores, penalty], |m, v| {
                let scale = m.f32(self.scale);
                m.fma(v[0], scale, v[1])
            });
            online_softmax(b, scores, keys, self.narrow, follow, carried)
        });
        match (&self.to, part) {
            (To::Whole(y, further), _) => {
                let most = done.get(3).copied().unwrap_or(done[0]);
                store_statistics(b, *further, (token, head), [done[0], most], done[1]);
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

    /// What is selected of a tile of a selection (−1: nothing), and its slots: of positions of a sequence, or slots themselves.
    fn slots(&self, b: &mut Builder, positions: ValueId, seq: Option<ValueId>) -> (ValueId, ValueId) {
        let (Some(table), Some(seq)) = (self.pages, seq) else {
            let there = super::view::extent(b, self.slots);
            let slots = super::view::where_below(b, positions, positions, there);
            return (slots, slots);
        };
        let pages = divided(b, positions, PAGE_TOKENS);
        let pages = b.gather(table, pages, &[seq.into()], &[self.keys, 1]);
        let pages = b.reshape(pages, &[self.keys]);
        let slots = b.map(&[positions, pages], |m, v| {
            let (page, zero, none) = (m.i32(PAGE_TOKENS as i32), m.i32(0), m.i32(-1));
            let (first, offset) = (m.mul(v[1], page), m.rem(v[0], page));
            let (slot, empty) = (m.add(first, offset), m.lt(v[0], zero));
            m.select(empty, none, slot)
        });
        (positions, slots)
    }
}

/// Parameters of the further outputs of attention that are declared; `output` says which output of the node one is.
pub(super) fn statistics(
    e: &mut Emit,
    output: impl Fn(u32) -> Option<u32>,
) -> Result<[Option<ValueId>; 2], KernelError> {
    let mut write = |i: u32, name: &str| output(i).map(|o| e.write(name, o, Part::Data, None)).transpose();
    Ok([write(1, "log_sums")?, write(2, "largest_scores")?])
}

/// Stores them for a tile of heads of a token: of `base` and `largest`, `[h, 1]` in units of ln 2, the largest scores and what they were
/// sums of powers of two relative to.
pub(super) fn store_statistics(
    b: &mut Builder,
    to: [Option<ValueId>; 2],
    (token, head): (ValueId, ValueId),
    [base, largest]: [ValueId; 2],
    totals: ValueId,
) {
    let heads = b.shape(largest)[0];
    let put = |b: &mut Builder, view: Option<ValueId>, x: ValueId| {
        let Some(view) = view else { return };
        let x = b.reshape(x, &[1, heads]);
        b.store(view, &[token.into(), head.into()], x);
    };
    if to[0].is_some() {
        let logs = b.map(&[base, totals], |m, v| {
            let (zero, none, ln_2) = (m.f32(0.0), m.f32(f32::INFINITY), m.f32(std::f32::consts::LN_2));
            let log = log2(m, v[1]);
            let log = m.add(v[0], log);
            let (log, some) = (m.mul(log, ln_2), m.lt(zero, v[1]));
            m.select(some, log, none)
        });
        put(b, to[0], logs);
    }
    if to[1].is_some() {
        let most = b.map(&[largest, totals], |m, v| {
            let (zero, none, ln_2) = (m.f32(0.0), m.f32(f32::NEG_INFINITY), m.f32(std::f32::consts::LN_2));
            let (most, some) = (m.mul(v[0], ln_2), m.lt(zero, v[1]));
            m.select(some, most, none)
        });
        put(b, to[1], most);
    }
}

/// log2 of a normal number of at least 0.71: its exponent, and of what is left, `f` in √½..√2, the odd series
/// `2 / ln 2 · atanh((f − 1) / (f + 1))` up to the ninth power (the next term is below 4e-9).
fn log2(m: &mut MapBuilder, x: MapVal) -> MapVal {
    const SQRT_HALF: i32 = 0x3f35_04f3;
    let (bits, half, shift) = (m.bitcast(x, DType::I32), m.i32(SQRT_HALF), m.i32(23));
    let above = m.sub(bits, half);
    let exponent = m.shr(above, shift);
    let scaled = m.shl(exponent, shift);
    let rest = m.sub(bits, scaled);
    let f = m.bitcast(rest, DType::F32);
    let one = m.f32(1.0);
    let (below, sum) = (m.sub(f, one), m.add(f, one));
    let s = m.div(below, sum);
    let z = m.mul(s, s);
    let mut p = m.f32(2.0 * std::f32::consts::LOG2_E / 9.0);
    for n in [7.0, 5.0, 3.0, 1.0] {
        let c = m.f32(2.0 * std::f32::consts::LOG2_E / n);
        p = m.fma(p, z, c);
    }
    let exponent = m.cast(exponent, DType::F32);
    m.fma(p, s, exponent)
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

/// Powers of two by which a score may be above the base of a softmax.
const FAR: f32 = 8.0;

/// `2^(x − base)`.
fn power(b: &mut Builder, x: ValueId, base: ValueId) -> ValueId {
    b.map(&[x, base], |m, v| {
        let d = m.sub(v[0], v[1]);
        m.exp2(d)
    })
}

/// When the base of a softmax becomes the largest score so far.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Follow {
    /// In every round: the base is the largest score.
    Always,
    /// Where that is [`FAR`] above it. Rescaling what was added before is then work of few rounds, and nothing overflows.
    Rarely,
}

/// One step of a softmax in powers of two: scores `[h, n]` and values `[n, l]` join (base, sum, accumulator), and a fourth, the largest score,
/// where that is wanted and the base may be another. Powers are relative to the base. With `narrow`, probabilities round to the type of the
/// values before they multiply them.
pub(super) fn online_softmax(
    b: &mut Builder,
    scores: ValueId,
    values: ValueId,
    narrow: bool,
    follow: Follow,
    carried: &[ValueId],
) -> Vec<ValueId> {
    let (base, total, acc) = (carried[0], carried[1], carried[2]);
    let here = b.reduce(scores, 1, ReduceKind::Max);
    let most = carried.get(3).map(|&most| b.map(&[most, here], |m, v| m.max(v[0], v[1])));
    let next = b.map(&[base, here], |m, v| {
        if follow == Follow::Always {
            return m.max(v[0], v[1]);
        }
        let (above, far) = (m.sub(v[1], v[0]), m.f32(FAR));
        let far = m.lt(far, above);
        m.select(far, v[1], v[0])
    });
    let alpha = power(b, base, next);
    let p = power(b, scores, next);
    let here = b.reduce(p, 1, ReduceKind::Sum);
    let total = b.map(&[total, alpha, here], |m, v| {
        let old = m.mul(v[0], v[1]);
        m.add(old, v[2])
    });
    let acc = product(b, acc, alpha);
    let to = if narrow { b.dtype(values) } else { DType::F32 };
    let p = b.cast(p, to);
    [next, total, b.dot(p, values, Some(acc))].into_iter().chain(most).collect()
}

/// `acc / total`; zero where nothing was selected.
pub(super) fn normalized(b: &mut Builder, total: ValueId, acc: ValueId) -> ValueId {
    let inverse = b.map(&[total], |m, v| {
        let (zero, one) = (m.f32(0.0), m.f32(1.0));
        let some = m.lt(zero, v[0]);
        let total = m.select(some, v[0], one);
        m.div(one, total)
    });
    product(b, acc, inverse)
}

/// Attention over a selection in memory.
fn attention(
    mut e: Emit,
    body: &Graph,
    node: NodeId,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let inputs = body.inputs(node);
    let k = e.dim(inputs[3], 1)?;
    let attend = Attend::new(&mut e, body, node, schedule, (1, k))?;
    let selected = e.read("selected", inputs[3])?;
    let seqs = if inputs.len() == 6 { Some(e.read("seqs", inputs[4])?) } else { None };
    let b = &mut e.b;
    let token = b.grid(Sym::T, 1);
    let head = b.grid(attend.heads, attend.head_tile);
    let part = match attend.to {
        To::Parts(_, parts) => Some(b.grid(parts, 1)),
        To::Whole(..) => None,
    };
    let head = times(b, head, attend.head_tile);
    let seq = match (seqs, attend.pages) {
        (Some(seqs), _) => Some(b.load_scalar(seqs, &[token.into()])),
        (None, Some(_)) => Some(divided(b, token, queries(class))),
        (None, None) => None,
    };
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
    let operands = body.inputs(node).len();
    let rows = tokens_of_block(schedule, class, operands);
    let pages = tile(schedule.tile_n, PAGE_TOKENS, class.max.get(Sym::C).into()).div_ceil(PAGE_TOKENS);
    let chunk = e.b.grid(Sym::C, PAGE_TOKENS * pages);
    let token = e.b.grid(Sym::T, rows);
    let token = times(&mut e.b, token, rows);
    let indexer = Indexer::new(&mut e, body, node, (rows, token), class)?;
    let output = output_of(body, node).ok_or_else(|| e.unsupported("logits that nothing reads"))?;
    let y = e.write("y", output, Part::Data, None)?;
    let b = &mut e.b;
    let lo = times(b, chunk, pages);
    let context = b.sym(Sym::C);
    // Pages that some token sees, if any are scored, then the others.
    let end = b.map(&[lo, context], |m, v| {
        let (pages, up, page) = (m.i32(pages as i32), m.i32(PAGE_TOKENS as i32 - 1), m.i32(PAGE_TOKENS as i32));
        let (end, all) = (m.add(v[0], pages), m.add(v[1], up));
        let all = m.div(all, page);
        m.min(end, all)
    });
    let middle = b.map(&[lo, end, indexer.last, context], |m, v| {
        let (up, page, below) = (m.i32(PAGE_TOKENS as i32), m.i32(PAGE_TOKENS as i32), m.i32(select_all_below as i32));
        // The last column may be −1.
        let seen = m.add(v[2], up);
        let seen = m.div(seen, page);
        let seen = m.min(seen, v[1]);
        let long = m.lt(below, v[3]);
        let scored = m.max(seen, v[0]);
        m.select(long, scored, v[0])
    });
    let first = match indexer.starts {
        Some((_, start)) => b.map(&[lo, start], |m, v| {
            let page = m.i32(PAGE_TOKENS as i32);
            let first = m.div(v[1], page);
            m.max(first, v[0])
        }),
        None => lo,
    };
    b.for_(first, middle, 1, &[], |b, j, _| {
        let scores = indexer.scores(b, j);
        let first = times(b, j, PAGE_TOKENS);
        b.store(y, &[token.into(), first.into()], scores);
        vec![]
    });
    if operands == 5 {
        // Nobody looks at other pages.
        return e.finish(format!("indexer logits, {pages} pages a block, where they are visible"));
    }
    b.for_(middle, end, 1, &[], |b, j, _| {
        let scores = indexer.unscored(b, j);
        let first = times(b, j, PAGE_TOKENS);
        b.store(y, &[token.into(), first.into()], scores);
        vec![]
    });
    e.finish(format!("indexer logits, {pages} pages a block"))
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
    let bounds: Vec<ValueId> =
        body.inputs(node)[1..].iter().map(|&v| e.read("bounds", v)).collect::<Result<_, KernelError>>()?;
    let output = output_of(body, node).ok_or_else(|| e.unsupported("a selection that nothing reads"))?;
    let y = e.write("selected", output, Part::Data, None)?;
    let b = &mut e.b;
    let token = b.grid(Sym::T, rows);
    let token = times(b, token, rows);
    let Bounds { first, end, lo, hi } = Bounds::new(b, bounds, (rows, token), width);
    let search = |b: &mut Builder| {
        let state = b.topk_init(rows, k);
        let state = b.for_(lo, hi, step, &[state], |b, at, state| {
            let values = b.load(x, &[token.into(), at.into()], &[rows, step]);
            let columns = b.iota(1, &[1, step]);
            let mut inputs = vec![values, columns, at, end];
            inputs.extend(first);
            let values = b.map(&inputs, |m, v| {
                let column = m.add(v[1], v[2]);
                let (mut inside, none) = (m.lt(column, v[3]), m.f32(f32::NEG_INFINITY));
                if let Some(&first) = v.get(4) {
                    let begun = m.le(first, column);
                    inside = m.and(inside, begun);
                }
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
    // With a first column, what is selected does not start at 0. Where a row is read at once, a search through a short one is no work.
    let below = if first.is_some() || schedule.cluster > 0 { 0 } else { select_all_below.min(k) };
    let numbers = if below == 0 {
        search(b)
    } else {
        let short = b.map(&[hi], |m, v| {
            let below = m.i32(below as i32);
            m.le(v[0], below)
        });
        b.if_(short, |b| vec![all(b)], |b| vec![search(b)])[0]
    };
    b.store(y, &[token.into(), 0.into()], numbers);
    e.finish(format!("top {k} of a matrix of scores"))
}

/// The smallest element of an i32 tile of rank 1.
fn least(b: &mut Builder, x: ValueId) -> ValueId {
    let negated = b.map(&[x], |m, v| m.neg(v[0]));
    let most = b.reduce(negated, 0, ReduceKind::Max);
    let most = b.reshape(most, &[]);
    b.map(&[most], |m, v| m.neg(v[0]))
}

/// Which columns of a matrix a block looks at.
struct Bounds {
    /// First of each row, i32 `[R, 1]`; none: 0.
    first: Option<ValueId>,
    /// One past the last: i32, one for all or `[R, 1]`.
    end: ValueId,
    /// The least of the first.
    lo: Ix,
    /// The largest end.
    hi: ValueId,
}

impl Bounds {
    /// `bounds` are none, the ends, or starts and ends of all rows.
    fn new(b: &mut Builder, bounds: Vec<ValueId>, (rows, token): (u32, ValueId), width: Extent) -> Bounds {
        let width = super::view::extent(b, width);
        let load = |b: &mut Builder, view: ValueId| {
            let x = b.load(view, &[token.into()], &[rows]);
            b.map(&[x, width], |m, v| {
                let zero = m.i32(0);
                let x = m.max(v[0], zero);
                m.min(x, v[1])
            })
        };
        let (starts, ends) = match bounds.as_slice() {
            [] => return Bounds { first: None, end: width, lo: 0.into(), hi: width },
            [ends] => (None, load(b, *ends)),
            [starts, ends, ..] => (Some(load(b, *starts)), load(b, *ends)),
        };
        let hi = b.reduce(ends, 0, ReduceKind::Max);
        let hi = b.reshape(hi, &[]);
        let end = b.reshape(ends, &[rows, 1]);
        let Some(starts) = starts else { return Bounds { first: None, end, lo: 0.into(), hi } };
        let lo = least(b, starts);
        Bounds { first: Some(b.reshape(starts, &[rows, 1])), end, lo: lo.into(), hi }
    }
}
