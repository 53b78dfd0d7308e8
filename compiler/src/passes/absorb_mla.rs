//! Turns latent attention from its MHA form into the absorbed MQA form.
//!
//! ```text
//! before                                              after
//! c  = cache_latent s, pages     [S, C, L]            qn = slice_last q, 0, N            [T, H, N]
//! kv = linear c, w               [S, C, H*(N+V)]      qr = rope (slice_last q, N, R)     [T, H, R]
//! kr = cache_rope s, pages       [S, C, R]            ql = head_linear qn, w  rows 0..N  [T, H, L]
//! qq = rope q                    [T, H, N+R]          ol = mqa_attention ql, qr, s, sel, seqs, pages  [T, H, L]
//! o  = mha_attention qq, kv, kr, sel, seqs [T, H*V]   ov = head_linear ol, w  rows N..N+V, transposed [T, H, V]
//!                                                     o  = reshape ov                    [T, H*V]
//! ```
//!
//! Legal: head `h` of `kv` is `K_h c` and `V_h c` for the row ranges `K_h`, `V_h` of `w`, so `q_h · (K_h c) = (K_hᵀ q_h) · c` and
//! `Σ p (V_h c) = V_h (Σ p c)`: the same sums in another order. Only rounding changes: the query in latent space and the sum in
//! latent space round to the activation type instead of keys and values. A `quantize` between `c` and `kv` goes with `kv`: `c` was
//! quantised with the same blocks when it was cached, and quantising to powers of two twice is quantising once.
//! The rotation does not touch the first `N` elements, so it is applied to the slice.
//!
//! `w` is read by rows in one place and by columns in the other, so its block scales help nobody: it becomes plain. In `exact`
//! numerics, and where the target has no fp8, that is the f32 it stands for; in `deployed` on a target with fp8 it is bf16, as
//! serving engines hold it. There the MHA form of another class still reads the codes, so the plain weight has a name of its own.
//!
//! Effect: keys and values of the context never exist: attention reads `L + R` elements a cached token for all heads together
//! instead of `H · (N + V) + R`, which is what makes decoding, and gathering only the selected rows, possible. Not for the class
//! that keeps the MHA form ([`Class::keep_mha`](super::Class)): a short prefill where each expanded key is used by many queries does fewer
//! operations that way (N + R + V a pair and head, instead of 2L + R).

use super::Cx;
use super::outline::base;
use dsc_ir::artifact::Numerics;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, TensorType, Value, ValueType, Weight};
use dsc_ir::{DType, Extent};

/// See the top of the file. Returns the number of attentions rewritten.
pub fn absorb_mla(graph: &mut Graph, cx: &Cx) -> usize {
    if cx.class.keep_mha {
        return 0;
    }
    let found: Vec<Mha> = graph.order().into_iter().filter_map(|n| Mha::find(graph, n)).collect();
    for mha in &found {
        absorb(graph, cx, mha);
    }
    found.len()
}

/// One attention in MHA form.
struct Mha {
    node: NodeId,
    scale: f32,
    nope: u32,
    value: u32,
    q: Value,
    /// The `Op::Weight` node of kv_b.
    weight: NodeId,
    state: Value,
    page_table: Value,
    selected: Value,
    seqs: Value,
}

impl Mha {
    fn find(graph: &Graph, node: NodeId) -> Option<Mha> {
        let Op::MhaAttention { scale, nope, value, .. } = graph.dag[node].op else { return None };
        let &[q, kv, rope, selected, seqs] = graph.inputs(node).as_slice() else { return None };
        let linear = base(graph, kv).node;
        if graph.dag[linear].op != Op::Linear || graph.dag[rope.node].op != Op::CacheRope {
            return None;
        }
        let (x, weight) = (graph.inputs(linear)[0], graph.inputs(linear)[1].node);
        let latent = cached(graph, x)?;
        let &[state, page_table] = graph.inputs(latent).as_slice() else { return None };
        let same_cache = graph.inputs(rope.node) == [state, page_table];
        let is_weight = matches!(graph.dag[weight].op, Op::Weight(_));
        (same_cache && is_weight).then_some(Mha {
            node,
            scale,
            nope,
            value,
            q,
            weight,
            state,
            page_table,
            selected,
            seqs,
        })
    }
}

/// The `CacheLatent` behind the ops that only change how its elements are held.
fn cached(graph: &Graph, value: Value) -> Option<NodeId> {
    let mut at = value.node;
    loop {
        match &graph.dag[at].op {
            Op::CacheLatent => return Some(at),
            Op::Quantize | Op::Dequantize | Op::Cast => at = graph.inputs(at)[0].node,
            _ => return None,
        }
    }
}

fn absorb(graph: &mut Graph, cx: &Cx, mha: &Mha) {
    let name = graph.dag[mha.node].name.clone();
    let weight = plain_weight(graph, cx, mha.weight);
    let q_type = graph.tensor(mha.q).clone();
    let (tokens, heads, width) = (q_type.shape[0], q_type.shape[1], q_type.shape[2]);
    let latent = graph.tensor(weight).shape[1];
    let rope = width.factor - mha.nope;
    let of = |elem: Elem, last: Extent| TensorType { shape: vec![tokens, heads, last], elem };

    let (q_nope, q_rope) = split_query(graph, mha, rope);
    let op = Op::HeadLinear { first: 0, count: mha.nope, transposed: false };
    let q_latent = graph.add1(format!("{name}.q_latent"), op, &[q_nope, weight], of(q_type.elem, latent));

    let inputs = [q_latent, q_rope, mha.state, mha.selected, mha.seqs, mha.page_table];
    let o_latent = graph.add1(
        name.clone(),
        Op::MqaAttention { scale: mha.scale, narrow: false },
        &inputs,
        of(q_type.elem, latent),
    );

    let old = Value { node: mha.node, output: 0 };
    let o_type = graph.tensor(old).clone();
    let op = Op::HeadLinear { first: mha.nope, count: mha.value, transposed: true };
    let o = graph.add1(format!("{name}.value"), op, &[o_latent, weight], of(o_type.elem, mha.value.into()));
    let o = graph.add1(format!("{name}.concat"), Op::Reshape, &[o], o_type);
    graph.replace_uses(old, o);
}

/// The parts of the query without and with position. Where the query was just rotated, the rotation moves to the part it
/// changes.
fn split_query(graph: &mut Graph, mha: &Mha, rope: u32) -> (Value, Value) {
    let name = graph.dag[mha.q.node].name.clone();
    let slice = |graph: &mut Graph, of: Value, start: u32, len: u32| {
        let mut ty = graph.tensor(of).clone();
        *ty.shape.last_mut().expect("queries have three dims") = len.into();
        graph.add1(
            format!("{name}.{}", if start == 0 { "nope" } else { "rope" }),
            Op::SliceLast { start, len },
            &[of],
            ty,
        )
    };
    let inputs = graph.inputs(mha.q.node);
    match graph.dag[mha.q.node].op {
        Op::Rope { layout, start } if start == mha.nope && graph.tensor(inputs[0]).elem == graph.tensor(mha.q).elem => {
            let nope = slice(graph, inputs[0], 0, mha.nope);
            let raw = slice(graph, inputs[0], mha.nope, rope);
            let ty = graph.tensor(raw).clone();
            let rotated = graph.add1(name.clone(), Op::Rope { layout, start: 0 }, &[raw, inputs[1], inputs[2]], ty);
            (nope, rotated)
        }
        _ => (slice(graph, mha.q, 0, mha.nope), slice(graph, mha.q, mha.nope, rope)),
    }
}

/// The weight in plain storage; itself if it is already.
fn plain_weight(graph: &mut Graph, cx: &Cx, node: NodeId) -> Value {
    let (value, Op::Weight(index)) = (Value { node, output: 0 }, graph.dag[node].op.clone()) else {
        unreachable!("found as a weight")
    };
    let old = graph.weights[index as usize].clone();
    if matches!(old.ty.elem, Elem::Plain(_)) {
        return value;
    }
    let dtype = match (cx.target_fp8, cx.numerics) {
        (true, Numerics::Deployed) => DType::Bf16,
        _ => DType::F32,
    };
    // Another node reads the codes.
    let shared = graph.dag.node_indices().any(|n| n != node && graph.dag[n].op == Op::Weight(index))
        || graph.users(value).len() > 1;
    // Without fp8 the weight is this same f32 in every class.
    let name = if shared || cx.target_fp8 { format!("{}@{dtype}", old.name) } else { old.name };
    let ty = TensorType { elem: Elem::Plain(dtype), ..old.ty };
    let new = Weight { name, ty: ty.clone(), source: old.source };
    if shared {
        let index = graph.weights.len() as u32;
        let label = new.name.clone();
        graph.weights.push(new);
        return graph.add1(label, Op::Weight(index), &[], ty);
    }
    graph.weights[index as usize] = new;
    graph.dag[node].outputs[0] = ValueType::Tensor(ty);
    value
}
