//! Attention over the keys of a selection, on chip or in memory.

use super::select::last_selected;
use super::{output_at, output_of, queries};
use crate::kernels::cache::{self, Array, Cached};
use crate::kernels::linear::tile;
use crate::kernels::softmax::{Follow, LOWEST, normalized, online_softmax, statistics, store_statistics};
use crate::kernels::view::{self, Emit, divided, plus, product, range, times};
use crate::kernels::{Class, Emitted, KernelError, Part};
use dsc_ir::Extent;
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, Op, PAGE_TOKENS, Value, ValueType};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, ValueId};

/// Heads that share an accumulator, unless the schedule says otherwise.
const HEADS: u32 = 64;

/// What attention needs, and its tiles.
pub(super) struct Attend {
    q_latent: ValueId,
    q_rope: ValueId,
    latent: Cached,
    rope: Cached,
    /// The page table, if positions are selected; else slots are.
    pub(super) pages: Option<ValueId>,
    /// Slots that there are.
    slots: Extent,
    to: To,
    pub(super) heads: u32,
    pub(super) head_tile: u32,
    pub(super) keys: u32,
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
    pub(super) fn new(
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
    pub(super) fn emit(
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
            let there = view::extent(b, self.slots);
            let slots = view::where_below(b, positions, positions, there);
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

/// Attention over a selection in memory.
pub(super) fn attention(
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
        view::where_below(b, tile, columns, width)
    };
    attend.emit(b, token, head, seq, (end, part), &pick);
    e.finish(format!("sparse attention: {} heads over a given selection of {k}", attend.heads))
}
