//! Fused gate bodies: router logits to expert ids and weights.
//!
//! The body is rowwise and runs on the emitter of [`rows`](super::rows); this file has its ops, on a tile `[R, E]`:
//!
//! * `group_topk`: a top-2 of each of the `R · G` groups gives group scores; a top-k of those (ties to the lowest group) the kept
//!   groups; other groups become −inf; a top-k of what is left the columns, ascending.
//! * `take_along`: a one-hot comparison with column numbers and a sum of the bits as integers, of which one is not zero: exact in any order.
//! * `normalize`: divided by the row's sum, times the factor.
//!
//! * `append`: one more column.
//! * `route`, where a block has all tokens: each row's place and each expert's start are counts of rows before them.
//!
//! A few thousand operations a token: the launch is the cost, and there is one.

use super::rows::emit_body;
use super::view::product;
use super::{Class, Emitted, KernelError, body_of};
use dsc_ir::DType;
use dsc_ir::graph::{Graph, LEAST_SUM, NodeId};
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
    let dtype = b.dtype(x);
    let picked = b.map(&[x, columns, numbers], |m, v| {
        let here = m.eq(v[1], v[2]);
        let zero = m.i32(0);
        let bits = if dtype == DType::I32 { v[0] } else { m.bitcast(v[0], DType::I32) };
        m.select(here, bits, zero)
    });
    let picked = b.reduce(picked, 2, ReduceKind::Sum);
    let picked = if dtype == DType::I32 { picked } else { b.map(&[picked], |m, v| m.bitcast(v[0], dtype)) };
    b.reshape(picked, &[rows, k])
}

/// `x / (Σ x + 1e-20) · factor`, or without the sum.
pub(crate) fn normalize(b: &mut Builder, x: ValueId, factor: f32, by_sum: bool) -> ValueId {
    let divided = if by_sum {
        let last = b.shape(x).len() as u32 - 1;
        let total = b.reduce(x, last, ReduceKind::Sum);
        b.map(&[x, total], |m, v| {
            let least = m.f32(LEAST_SUM);
            let total = m.add(v[1], least);
            m.div(v[0], total)
        })
    } else {
        x
    };
    let factor = b.full(factor, &[]);
    product(b, divided, factor)
}

/// `[R, k + 1]`: one more column of one number.
pub(crate) fn append(b: &mut Builder, x: ValueId, value: f32) -> ValueId {
    let shape = [b.shape(x)[0], 1];
    let last = if b.dtype(x) == DType::I32 { b.full_i32(value as i32, &shape) } else { b.full(value, &shape) };
    b.concat(&[x, last], 1)
}

/// Stores the flat rows of `ids` (i32 `[R, k]`, −1 for none) grouped by expert, where each group starts, and the expert of each place.
///
/// A row comes behind those of lower experts and the earlier ones of its own, and a group behind the rows of lower experts: counts over all
/// rows, `R · k` squared and `E · R · k` comparisons. For few rows that is less than a barrier costs.
pub(crate) fn route(
    b: &mut Builder,
    ids: ValueId,
    experts: u32,
    [order, offsets]: [ValueId; 2],
    owners: Option<ValueId>,
) {
    let n = b.shape(ids).iter().product();
    let across = b.reshape(ids, &[1, n]);
    let down = b.reshape(ids, &[n, 1]);
    let (column, row) = (b.iota(1, &[1, n]), b.iota(0, &[n, 1]));
    let before = b.map(&[across, down, column, row], |m, v| {
        let (one, zero) = (m.i32(1), m.i32(0));
        let (some, lower) = (m.le(zero, v[0]), m.lt(v[0], v[1]));
        let (same, earlier) = (m.eq(v[0], v[1]), m.lt(v[2], v[3]));
        let tied = m.and(same, earlier);
        let first = m.or(lower, tied);
        let both = m.and(some, first);
        m.select(both, one, zero)
    });
    let before = b.reduce(before, 1, ReduceKind::Sum);
    let places = b.map(&[before, down], |m, v| {
        let (none, zero) = (m.i32(-1), m.i32(0));
        let some = m.le(zero, v[1]);
        m.select(some, v[0], none)
    });
    let places = b.reshape(places, &[n]);
    let rows = b.iota(0, &[n]);
    b.scatter(order, places, &[], rows);
    if let Some(owners) = owners {
        let ids = b.reshape(ids, &[n]);
        b.scatter(owners, places, &[], ids);
    }
    // One expert more than there are: its group is empty, and starts where the last one ends.
    let numbers = b.iota(0, &[experts + 1, 1]);
    let lower = b.map(&[across, numbers], |m, v| {
        let (one, zero) = (m.i32(1), m.i32(0));
        let (some, lower) = (m.le(zero, v[0]), m.lt(v[0], v[1]));
        let both = m.and(some, lower);
        m.select(both, one, zero)
    });
    let starts = b.reduce(lower, 1, ReduceKind::Sum);
    let starts = b.reshape(starts, &[experts + 1]);
    b.store(offsets, &[0.into()], starts);
}
