//! What the copy engine can do: which tiles of which views it takes.

use super::contraction::Operand;
use dsc_ir::artifact::TensorMap;
use dsc_ir::sched::Scheduled;
use dsc_ir::tile::{Type, ValueId, ViewType};

/// Dims a tensor map can have.
const MOST_DIMS: usize = 5;
/// Elements a box can have along a dim.
const MOST_ROWS: u32 = 256;
/// Addresses and strides are multiples of this many bytes.
const UNIT: i64 = 16;

/// Whether tiles of this view can be copied by descriptor: elements side by side, strides and start multiples of 16 bytes and known
/// when arguments are bound.
pub fn can_describe(view: &ViewType) -> bool {
    let Some((last, outer)) = view.strides.split_last() else { return false };
    let aligned = |bytes: i64| bytes > 0 && bytes % UNIT == 0;
    view.shape.len() <= MOST_DIMS
        && last.bytes == view.dtype.bytes() as i64
        && last.sym.is_none()
        && outer.iter().all(|s| s.sym.is_none() && aligned(s.bytes))
        && view.offset as i64 % UNIT == 0
}

/// Whether that operand can be brought a stage of `k`, so many elements, at a time: by the copy engine, or, if its rows are gathered, by
/// the producer's threads in pieces that are never cut by the view's edge.
pub fn can_copy(operand: &Operand<'_>, view: &ViewType, stage: u32) -> bool {
    let whole = match (operand.gathered, view.shape.as_slice()) {
        (None, _) => operand.rows <= MOST_ROWS,
        (Some(_), [_, columns]) => columns.constant().is_some_and(|n| n % stage == 0),
        _ => false,
    };
    whole && can_describe(view)
}

/// The maps of a kernel in order of use, each once.
#[derive(Default)]
pub struct Maps(pub Vec<TensorMap>);

impl Maps {
    /// The number of the map for tiles of that shape of a view.
    pub fn number(&mut self, s: &Scheduled, view: ValueId, tile: &[u32], swizzle: u32) -> Option<usize> {
        let param = s.params.iter().position(|p| p.value == view)? as u32;
        let map = TensorMap { param, tile: tile.to_vec(), swizzle };
        Some(self.0.iter().position(|m| *m == map).unwrap_or_else(|| {
            self.0.push(map);
            self.0.len() - 1
        }))
    }
}

/// The view's type.
pub fn view_type(types: &[Type], view: ValueId) -> Option<&ViewType> {
    match types.get(view.0 as usize)? {
        Type::View(t) => Some(t),
        _ => None,
    }
}
