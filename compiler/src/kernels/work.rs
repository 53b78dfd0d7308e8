//! What a node's kernel has to compute and to move: see [`Work`].

use dsc_ir::graph::{Elem, Graph, NodeId, Op, StateFormat, TensorType, Value, ValueType};
use dsc_ir::work::{Count, Term, Work};
use dsc_ir::{DType, Extent, Sym};

/// The work of a node that launches.
pub fn work_of(graph: &Graph, node: NodeId) -> Work {
    let mut work = Work::default();
    match &graph.dag[node].op {
        Op::Fused(fused) => {
            for inner in fused.body.order() {
                work.flop.extend(products(&fused.body, inner, fused.select_all_below));
                if let Op::Arg(_) = fused.body.dag[inner].op {
                    let arg = Value { node: inner, output: 0 };
                    work.bytes.extend(read(&fused.body, arg, fused.select_all_below));
                }
            }
        }
        _ => {
            work.flop.extend(products(graph, node, 0));
            for (i, value) in graph.inputs(node).into_iter().enumerate() {
                work.bytes.extend(operand(graph, node, i, 0).or_else(|| whole(graph.ty(value))));
            }
        }
    }
    work.bytes.extend(graph.dag[node].outputs.iter().filter_map(whole));
    work
}

/// FLOP of the matrix product that a node is.
fn products(graph: &Graph, node: NodeId, below: u32) -> Option<(DType, Term)> {
    let inputs = graph.inputs(node);
    let shape = |i: usize| graph.tensor(inputs[i]).shape.clone();
    let last = |i: usize| shape(i).last().copied().unwrap_or(1.into());
    let out = || graph.dag[node].outputs[0].tensor().map_or(Vec::new(), |t| t.shape.clone());
    let both = |a: usize, b: usize| multiplier(graph.ty(inputs[a]), graph.ty(inputs[b]));
    match &graph.dag[node].op {
        Op::Linear | Op::HeadLinear { .. } | Op::ExpertLinear { .. } => {
            Some((both(0, 1), Term::of(2, &[out(), vec![last(0)]].concat())))
        }
        Op::LinearPartial { .. } => Some((both(0, 1), Term::of(2, &[shape(0), shape(1)[..1].to_vec()].concat()))),
        Op::IndexerLogits => {
            let scores = Term::of(2, &shape(0)[1..]).times(Count::Pairs(u32::MAX));
            Some((both(0, 2), Term { context_above: below, ..scores }))
        }
        Op::MqaAttention { .. } | Op::MqaPartial { .. } => {
            // Scores over latent and rope key, then the sum of latents.
            let (latent, rope) = (last(0).factor, last(1).factor);
            let each = latent.saturating_mul(2).saturating_add(rope);
            Some((both(0, 2), Term::of(2, &[shape(0)[1], each.into()]).times(Count::Pairs(last(3).factor))))
        }
        Op::MhaAttention { value, .. } => {
            let each = last(0).factor.saturating_add(*value);
            Some((both(0, 1), Term::of(2, &[shape(0)[1], each.into()]).times(Count::Pairs(last(3).factor))))
        }
        _ => None,
    }
}

/// The smallest type that both sides of a product have room in.
fn multiplier(a: &ValueType, b: &ValueType) -> DType {
    let bits = |ty: &ValueType| match ty {
        ValueType::Tensor(TensorType { elem: Elem::Plain(dtype), .. })
        | ValueType::State(StateFormat::Latent { dtype, .. } | StateFormat::Index { dtype, .. }) => dtype.bytes(),
        // Its rope part is bf16.
        ValueType::State(StateFormat::LatentFp8 { .. }) => 2,
        ValueType::Tensor(_) | ValueType::State(StateFormat::IndexFp8 { .. }) => 1,
    };
    match bits(a).max(bits(b)) {
        1 => DType::E4m3,
        2 => DType::Bf16,
        _ => DType::F32,
    }
}

/// What a body reads of an argument: what its users do, each part once.
fn read(body: &Graph, arg: Value, below: u32) -> Vec<Term> {
    let mut parts: Vec<(Option<(u32, u32)>, Term)> = Vec::new();
    for (user, input) in body.users(arg) {
        let slice = match body.dag[user].op {
            Op::SliceLast { start, len } => Some((start, len)),
            _ => None,
        };
        let part = match slice {
            Some(_) => whole(&body.dag[user].outputs[0]),
            None => operand(body, user, input as usize, below),
        };
        match part {
            Some(part) if parts.contains(&(slice, part.clone())) => {}
            Some(part) => parts.push((slice, part)),
            None => return whole(body.ty(arg)).into_iter().collect(),
        }
    }
    let columns: u64 = parts.iter().filter_map(|(slice, _)| slice.map(|(_, len)| u64::from(len))).sum();
    let all = body.ty(arg).tensor().and_then(|t| t.shape.last()?.constant());
    match whole(body.ty(arg)) {
        // Slices that overlap.
        Some(all_bytes) if all.is_some_and(|n| columns > u64::from(n)) => vec![all_bytes],
        _ => parts.into_iter().map(|(_, term)| term).collect(),
    }
}

/// Bytes that a node needs of an operand of which it does not need all; `None`: it needs all.
fn operand(graph: &Graph, node: NodeId, input: usize, below: u32) -> Option<Term> {
    let inputs = graph.inputs(node);
    let ty = graph.ty(inputs[input]);
    let of_output = || whole(&graph.dag[node].outputs[0]);
    match (&graph.dag[node].op, input) {
        (Op::Embed, 1) => {
            let Elem::Plain(dtype) = ty.tensor()?.elem else { return None };
            let rows = graph.dag[node].outputs[0].tensor()?;
            Some(Term::of(dtype.bytes() as u64, &rows.shape))
        }
        (Op::TakeRows | Op::TakeAlong, 0) => of_output(),
        (Op::Rope { .. }, 2) => {
            let table = ty.tensor()?;
            Some(Term::of(4, &[graph.tensor(inputs[1]).shape[0], *table.shape.last()?]))
        }
        (Op::HeadLinear { count, .. }, 1) => {
            let w = ty.tensor()?;
            let heads = graph.tensor(inputs[0]).shape[1];
            let rows = TensorType { shape: vec![heads.times(*count), w.shape[1]], elem: w.elem };
            whole(&ValueType::Tensor(rows))
        }
        (Op::ExpertLinear { per_token, .. }, 1) => {
            let w = ty.tensor()?;
            let experts = w.shape[0].constant()?;
            let one = TensorType { shape: w.shape[1..].to_vec(), elem: w.elem };
            let pairs = graph.tensor(inputs[0]).shape[0].times(*per_token);
            Some(whole(&ValueType::Tensor(one))?.times(Count::AtMost(pairs, experts)))
        }
        (_, _) => cached(graph, node, ty, below),
    }
}

/// Bytes of a cache that a node reads or writes.
fn cached(graph: &Graph, node: NodeId, ty: &ValueType, below: u32) -> Option<Term> {
    let ValueType::State(format) = ty else { return None };
    let inputs = graph.inputs(node);
    let context: [Extent; 2] = [Sym::S.into(), Sym::C.into()];
    let row = u64::from(format.row_bytes());
    match &graph.dag[node].op {
        Op::CacheWrite => Some(Term::of(row, &graph.tensor(inputs[1]).shape)),
        Op::CacheLatent => Some(Term::of(row - rope_bytes(*format), &context)),
        Op::CacheRope => Some(Term::of(rope_bytes(*format), &context)),
        Op::CacheRows => Some(Term::of(row, &[Sym::C.into()])),
        Op::IndexerLogits => Some(Term { context_above: below, ..Term::of(row, &context) }),
        Op::MqaAttention { .. } | Op::MqaPartial { .. } => {
            let selected = graph.tensor(inputs[3]).shape.last()?.constant()?;
            Some(Term::of(row, &[Sym::S.into()]).times(Count::AtMost(Sym::C.into(), selected)))
        }
        _ => Some(Term::of(row, &context)),
    }
}

/// Bytes of a token's rope key.
fn rope_bytes(format: StateFormat) -> u64 {
    match format {
        StateFormat::LatentFp8 { rope, .. } => 2 * u64::from(rope),
        StateFormat::Latent { rope, dtype, .. } => u64::from(rope) * dtype.bytes() as u64,
        StateFormat::IndexFp8 { .. } | StateFormat::Index { .. } => 0,
    }
}

/// All bytes of a tensor, one term: scales of a quantised one are added to its rows. A cache is its writers' and readers' business.
fn whole(ty: &ValueType) -> Option<Term> {
    let tensor = ty.tensor()?;
    let scales = tensor.scale_shape().map_or(0, |shape| constant(&shape).saturating_mul(4));
    let symbols: Vec<Extent> = tensor.shape.iter().filter_map(|e| e.sym).map(Extent::from).collect();
    Some(Term::of(constant(&tensor.shape).saturating_mul(tensor.elem.bytes()).saturating_add(scales), &symbols))
}

fn constant(shape: &[Extent]) -> u64 {
    shape.iter().fold(1, |n: u64, e| n.saturating_mul(u64::from(e.factor)))
}
