//! `embed`: rows of the embedding table.
//!
//! A block takes `tile_m` tokens and up to 1024 columns: one load of ids, one gather, one store. Floor: `2 T D` elements moved.

use super::view::{Emit, times};
use super::{Class, Emitted, KernelError, Part, elem_name};
use dsc_ir::graph::{Graph, NodeId, Value};
use dsc_ir::schedule::Schedule;
use dsc_ir::{DType, Sym};

const COLUMNS: u32 = 1024;

/// The kernel of an [`Op::Embed`](dsc_ir::graph::Op::Embed) node.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let inputs = graph.inputs(node);
    let out = Value { node, output: 0 };
    let name = format!("embed_{}", elem_name(graph.ty(inputs[1])));
    let mut e = Emit::new(graph, node, None, &name);
    let (ids, table) = (e.read("ids", inputs[0])?, e.read("table", inputs[1])?);
    let y = e.write("y", 0, Part::Data, None)?;
    let d = e.dim(out, 1)?;
    let (rows, columns) = (schedule.tile_m.clamp(1, class.max.get(Sym::T).max(1)), d.min(COLUMNS));
    let b = &mut e.b;
    let block = b.grid(Sym::T, rows);
    let column = b.grid(d, columns);
    let (row, column) = (times(b, block, rows), times(b, column, columns));
    let ids = b.load(ids, &[row.into()], &[rows]);
    let mut x = b.gather(table, ids, &[column.into()], &[rows, columns]);
    if b.dtype(x) != b.dtype(y) {
        x = b.cast(x, DType::F32);
    }
    let to = b.dtype(y);
    let x = b.cast(x, to);
    b.store(y, &[row.into(), column.into()], x);
    e.finish(format!("embed: rows of {d}"))
}
