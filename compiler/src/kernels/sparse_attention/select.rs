//! Selections: from a matrix of scores, and tiles of one that is on chip.

use super::output_of;
use crate::kernels::linear::tile;
use crate::kernels::view::{self, Emit, times};
use crate::kernels::{Class, Emitted, KernelError, Part};
use dsc_ir::Extent;
use dsc_ir::extent::Sym;
use dsc_ir::graph::{Graph, NodeId};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, Ix, ReduceKind, ValueId};

/// A selection on chip, in tiles of keys.
pub(super) struct Chosen {
    /// i32 `[R, tiles, n]`.
    tiles: ValueId,
    shape: [u32; 3],
}

impl Chosen {
    pub(super) fn new(b: &mut Builder, selection: ValueId, rows: u32, k: u32, n: u32) -> Chosen {
        let mut padded = selection;
        if !k.is_multiple_of(n) {
            let none = b.full_i32(-1, &[rows, k.next_multiple_of(n) - k]);
            padded = b.concat(&[selection, none], 1);
        }
        let shape = [rows, k.div_ceil(n), n];
        Chosen { tiles: b.reshape(padded, &shape), shape }
    }

    /// The selection of token `r` of the tile: `[1, tiles, n]`.
    pub(super) fn row(&self, b: &mut Builder, r: ValueId) -> ValueId {
        if self.shape[0] == 1 { self.tiles } else { pick(b, self.tiles, 0, r) }
    }

    /// Tile number `j` of a row: `[n]`.
    pub(super) fn tile(&self, b: &mut Builder, row: ValueId, j: ValueId) -> ValueId {
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
pub(super) fn last_selected(b: &mut Builder, row: ValueId) -> ValueId {
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

/// Top-k of the rows of a `[T, C]` matrix. Rows of at most `select_all_below` columns select all that are not −inf, which then
/// come first: no search.
pub(super) fn select_from_matrix(
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
pub(super) fn least(b: &mut Builder, x: ValueId) -> ValueId {
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
        let width = view::extent(b, width);
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
