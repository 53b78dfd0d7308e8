//! Attention in MHA form over expanded keys and values: the short prefill, where every visible position is selected.
//!
//! The class guarantees contexts of at most `k` positions, so the selection of a token is `0..=position` and the causal mask
//! is the selection; the position is the selection's largest member. A block takes `tile_m` tokens and a head:
//!
//! ```text
//! q [m, N + R];  m, l, acc = -big, 0, 0
//! for keys c0 .. up to the tile's last position, tile_n at a time {
//!     s = (q_nope · kᵀ + q_rope · kropeᵀ) · scale · log2 e, -inf beyond each token's position
//!     online softmax in powers of two; acc = acc · α + p · v
//! }
//! store acc / l
//! ```
//!
//! Values of keys that no token of the tile sees are set to zero: rows past the cached ones are unspecified, and `0 · NaN` is not 0.
//!
//! Floors of a token and head: `2 C (N + R + V)` operations; keys and values of the head are read once a token tile.

use super::linear::tile;
use super::softmax::{Follow, LOWEST, normalized, online_softmax};
use super::view::{Emit, times};
use super::{Class, Emitted, KernelError, Part, several_sequences, unsupported};
use dsc_ir::DType;
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId, Op};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, Ix, ReduceKind, ValueId};

/// The kernel of an [`Op::MhaAttention`] node.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let Op::MhaAttention { scale, nope, value, narrow } = graph.dag[node].op else {
        return Err(unsupported(graph, node, "not an mha_attention"));
    };
    let &[q, kv, rope, selected, seqs] = graph.inputs(node).as_slice() else {
        return Err(unsupported(graph, node, "mha_attention without its five inputs"));
    };
    let shape = &graph.tensor(q).shape;
    let (heads, width) = (shape[1].factor, shape[2].factor);
    let mut e = Emit::new(graph, node, None, &format!("mha_h{heads}_n{nope}_r{}_v{value}", width - nope));
    let k = e.dim(selected, 1)?;
    if class.max.get(Sym::C) > k {
        return Err(e.unsupported(format!(
            "mha_attention over contexts up to {} with a selection of {k}: only where all is selected; absorb it",
            class.max.get(Sym::C)
        )));
    }
    let tokens = if several_sequences(class) { 1 } else { tile(schedule.tile_m, 16, class.max.get(Sym::T).into()) };
    let keys = tile(schedule.tile_n, 64, class.max.get(Sym::C).into());
    let each = nope + value;
    let (qs, ropes) = (e.read("q", q)?, e.read("rope", rope)?);
    let kvs = e.read_as("kv", kv, Part::Data, &[Sym::S.into(), Sym::C.into(), heads.into(), each.into()])?;
    let (selected, seqs) = (e.read("selected", selected)?, e.read("seqs", seqs)?);
    let y = e.write("y", 0, Part::Data, Some(&[Sym::T.into(), heads.into(), value.into()]))?;

    let b = &mut e.b;
    let (token, head) = (b.grid(Sym::T, tokens), b.grid(heads, 1));
    let token = times(b, token, tokens);
    let seq = b.load_scalar(seqs, &[token.into()]);
    let chosen = b.load(selected, &[token.into(), 0.into()], &[tokens, k]);
    let positions = b.reduce(chosen, 1, ReduceKind::Max);
    let last = b.reduce(positions, 0, ReduceKind::Max);
    let last = b.reshape(last, &[]);
    let end = super::view::plus(b, last, 1);
    let query = |b: &mut Builder, start: u32, columns: u32| {
        let q = b.load(qs, &[token.into(), head.into(), start.into()], &[tokens, 1, columns]);
        b.reshape(q, &[tokens, columns])
    };
    let (q_nope, q_rope) = (query(b, 0, nope), query(b, nope, width - nope));
    let init = [b.full(LOWEST, &[tokens, 1]), b.full(0.0, &[tokens, 1]), b.full(0.0, &[tokens, value])];
    let done = b.for_(0, end, keys, &init, |b, at, carried| {
        let part = |b: &mut Builder, start: u32, columns: u32| {
            let index: [Ix; 4] = [seq.into(), at.into(), head.into(), start.into()];
            let tile = b.load(kvs, &index, &[1, keys, 1, columns]);
            b.reshape(tile, &[keys, columns])
        };
        let key = part(b, 0, nope);
        let key_rope = b.load(ropes, &[seq.into(), at.into(), 0.into()], &[1, keys, width - nope]);
        let key_rope = b.reshape(key_rope, &[keys, width - nope]);
        let scores = b.dot_t(q_nope, key, None);
        let scores = b.dot_t(q_rope, key_rope, Some(scores));
        let scores = causal(b, scores, at, positions, scale * std::f32::consts::LOG2_E);
        let values = part(b, nope, value);
        let values = seen(b, values, at, last, narrow);
        online_softmax(b, scores, values, narrow, Follow::Always, carried)
    });
    let out = normalized(b, done[1], done[2]);
    let to = b.dtype(y);
    let out = b.cast(out, to);
    let out = b.reshape(out, &[tokens, 1, value]);
    b.store(y, &[token.into(), head.into(), 0.into()], out);
    e.finish(format!("mha: {heads} heads of {width} and {value}, causal"))
}

/// Scaled scores `[m, n]` of keys from `at`, −inf beyond each row's position.
fn causal(b: &mut Builder, scores: ValueId, at: ValueId, positions: ValueId, scale: f32) -> ValueId {
    let n = b.shape(scores)[1];
    let columns = b.iota(1, &[1, n]);
    b.map(&[scores, columns, at, positions], |m, v| {
        let (scale, none) = (m.f32(scale), m.f32(f32::NEG_INFINITY));
        let (scaled, key) = (m.mul(v[0], scale), m.add(v[1], v[2]));
        let visible = m.le(key, v[3]);
        m.select(visible, scaled, none)
    })
}

/// Values `[n, v]` of keys from `at`, zero beyond the last position that counts; in f32, or as stored if `narrow`.
fn seen(b: &mut Builder, values: ValueId, at: ValueId, last: ValueId, narrow: bool) -> ValueId {
    let (n, stored) = (b.shape(values)[0], b.dtype(values));
    let values = b.cast(values, DType::F32);
    let rows = b.iota(0, &[n, 1]);
    let values = b.map(&[values, rows, at, last], |m, v| {
        let (zero, key) = (m.f32(0.0), m.add(v[1], v[2]));
        let visible = m.le(key, v[3]);
        m.select(visible, v[0], zero)
    });
    if narrow { b.cast(values, stored) } else { values }
}
