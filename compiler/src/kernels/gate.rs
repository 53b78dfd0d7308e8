//! Fused gate bodies: router logits to expert ids and weights.
//!
//! The body is rowwise and runs on the emitter of [`rows`](super::rows); this file has its three ops, on a tile `[R, E]`:
//!
//! * `group_topk`: a top-2 of each of the `R · G` groups gives group scores; a top-k of those (ties to the lowest group) the kept
//!   groups; other groups become −inf; a top-k of what is left the columns, ascending.
//! * `take_along`: a one-hot comparison with column numbers and a sum, exact since one term is not zero.
//! * `normalize`: divided by the row's sum, times the factor.
//!
//! A few thousand operations a token: the launch is the cost, and there is one.

use super::rows::emit_body;
use super::view::product;
use super::{Class, Emitted, KernelError, body_of};
use dsc_ir::graph::{Graph, NodeId};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, ReduceKind, ValueId};

/// The kernel of a gate body, or of one of its ops alone.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = body_of(graph, node)?;
    emit_body(graph, node, &fused.body, "gate", schedule, class)
}

/// Columns and values of the `k` largest of each row, ascending by column.
fn topk(b: &mut Builder, x: ValueId, k: u32) -> (ValueId, ValueId) {
    let rows = b.shape(x)[0];
    let state = b.topk_init(rows, k);
    let zero = b.full_i32(0, &[]);
    let state = b.topk_push(state, x, zero);
    let (values, numbers) = b.topk_take(state);
    (numbers, values)
}

/// i32 `[R, k]` from f32 `[R, E]`.
pub(crate) fn group_topk(b: &mut Builder, x: ValueId, groups: u32, keep: u32, k: u32) -> ValueId {
    let shape = b.shape(x);
    let (rows, columns) = (shape[0], shape[1]);
    if keep >= groups {
        return topk(b, x, k).0;
    }
    let width = columns / groups;
    let by_group = b.reshape(x, &[rows * groups, width]);
    let scores = if width == 1 {
        by_group
    } else {
        let (_, best) = topk(b, by_group, 2);
        b.reduce(best, 1, ReduceKind::Sum)
    };
    let scores = b.reshape(scores, &[rows, groups]);
    let (kept, _) = topk(b, scores, keep);
    let kept = b.reshape(kept, &[rows, keep, 1]);
    let numbers = b.iota(2, &[1, 1, groups]);
    let hits = b.map(&[kept, numbers], |m, v| {
        let (one, zero) = (m.i32(1), m.i32(0));
        let hit = m.eq(v[0], v[1]);
        m.select(hit, one, zero)
    });
    let hits = b.reduce(hits, 1, ReduceKind::Max);
    let hits = b.reshape(hits, &[rows, groups, 1]);
    let x = b.reshape(x, &[rows, groups, width]);
    let left = b.map(&[hits, x], |m, v| {
        let (one, none) = (m.i32(1), m.f32(f32::NEG_INFINITY));
        let hit = m.eq(v[0], one);
        m.select(hit, v[1], none)
    });
    let left = b.reshape(left, &[rows, columns]);
    topk(b, left, k).0
}

/// `[R, k]` from `[R, E]` and i32 columns `[R, k]`.
pub(crate) fn take_along(b: &mut Builder, x: ValueId, columns: ValueId) -> ValueId {
    let (shape, k) = (b.shape(x), b.shape(columns)[1]);
    let (rows, n) = (shape[0], shape[1]);
    let x = b.reshape(x, &[rows, 1, n]);
    let columns = b.reshape(columns, &[rows, k, 1]);
    let numbers = b.iota(2, &[1, 1, n]);
    let integer = b.dtype(x) == dsc_ir::DType::I32;
    let picked = b.map(&[x, columns, numbers], |m, v| {
        let here = m.eq(v[1], v[2]);
        let zero = if integer { m.i32(0) } else { m.f32(0.0) };
        m.select(here, v[0], zero)
    });
    let picked = b.reduce(picked, 2, ReduceKind::Sum);
    b.reshape(picked, &[rows, k])
}

/// `x / Σ x · factor`, or without the sum.
pub(crate) fn normalize(b: &mut Builder, x: ValueId, factor: f32, by_sum: bool) -> ValueId {
    let divided = if by_sum {
        let last = b.shape(x).len() as u32 - 1;
        let total = b.reduce(x, last, ReduceKind::Sum);
        b.map(&[x, total], |m, v| m.div(v[0], v[1]))
    } else {
        x
    };
    let factor = b.full(factor, &[]);
    product(b, divided, factor)
}
