//! The caches' layouts as views, and `cache_latent`, `cache_rope`, `cache_rows`: the cached rows of each sequence, or of the first, in order of position.
//!
//! | format | element `(slot, i)` |
//! |---|---|
//! | `latent_fp8` | row of `row_bytes` a slot: e4m3 latent, padded to 4 bytes; f32 scales of each 128; bf16 rope key |
//! | `latent` | row a slot: latent, rope key |
//! | `index_fp8` | in each page the codes of its 64 slots (each padded to 4 bytes), then their f32 scales |
//! | `index` | row a slot |
//!
//! A slot is `page · 64 + offset`; a negative one is outside every view, so reads of it are zero and writes are dropped.
//!
//! `cache_latent` and `cache_rope` take a page of a sequence a block: one scalar load of the page's number, one load of 64 rows,
//! dequantisation (unless the result is quantised as the cache is), one store. `cache_rows` takes `ROWS` rows of a page a block, so that short
//! contexts have blocks enough. Floor: the bytes of the cached context, once, and of the result.

use super::arithmetic::dequantize;
use super::view::{Emit, divided, times};
use super::{Class, Emitted, KernelError, Part, elem_name, unsupported};
use dsc_ir::extent::Extent;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, PAGE_TOKENS, StateFormat, Value};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, Stride, ValueId, ViewType};
use dsc_ir::{DType, Sym};

fn fixed(bytes: u32) -> Stride {
    Stride { bytes: i64::from(bytes), sym: None }
}

/// `[64 N, columns]`: `columns` elements at `offset` of each slot's row.
fn by_slot(dtype: DType, columns: u32, row_bytes: u32, offset: u32) -> ViewType {
    ViewType {
        dtype,
        shape: vec![Extent::from(Sym::N).times(PAGE_TOKENS), columns.into()],
        strides: vec![fixed(row_bytes), fixed(dtype.bytes() as u32)],
        offset: offset.into(),
    }
}

/// `[N, 64, columns]`: rows of `pitch` bytes at `offset` of each page.
fn by_page(dtype: DType, columns: u32, page_bytes: u32, pitch: u32, offset: u64) -> ViewType {
    ViewType {
        dtype,
        shape: vec![Sym::N.into(), PAGE_TOKENS.into(), columns.into()],
        strides: vec![fixed(page_bytes), fixed(pitch), fixed(dtype.bytes() as u32)],
        offset,
    }
}

/// One array of a cache: elements or codes, and their scales.
#[derive(Clone, Copy)]
pub(crate) struct Cached {
    /// Elements or codes: `[64 N, columns]`, or `[N, 64, columns]` of the planar format.
    pub data: ValueId,
    /// f32 scales, of the same leading dims; of the planar format `[N, 64]` where they are only read.
    pub scales: Option<ValueId>,
    /// Elements of a row.
    pub columns: u32,
    /// Whether views are by page and offset rather than by slot.
    pub planar: bool,
}

/// Which array of a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Array {
    /// The latent of a latent cache.
    Latent,
    /// The rope key of a latent cache.
    Rope,
    /// The key of an index cache.
    Key,
}

/// Views of one array of a cache: elements or codes, scales.
fn views(format: StateFormat, array: Array, access: Access) -> Option<(ViewType, Option<ViewType>)> {
    let row = format.row_bytes();
    Some(match (format, array) {
        (StateFormat::LatentFp8 { latent, .. }, Array::Latent) => {
            let scales = by_slot(DType::F32, latent.div_ceil(StateFormat::GROUP), row, latent.next_multiple_of(4));
            (by_slot(DType::E4m3, latent, row, 0), Some(scales))
        }
        (StateFormat::LatentFp8 { latent, rope }, Array::Rope) => {
            let offset = latent.next_multiple_of(4) + 4 * latent.div_ceil(StateFormat::GROUP);
            (by_slot(DType::Bf16, rope, row, offset), None)
        }
        (StateFormat::Latent { latent, dtype, .. }, Array::Latent) => (by_slot(dtype, latent, row, 0), None),
        (StateFormat::Latent { latent, rope, dtype }, Array::Rope) => {
            (by_slot(dtype, rope, row, latent * dtype.bytes() as u32), None)
        }
        (StateFormat::IndexFp8 { dim }, Array::Key) => {
            let (page, pitch) = (format.page_bytes(), dim.next_multiple_of(4));
            let mut scales = by_page(DType::F32, 1, page, 4, u64::from(PAGE_TOKENS * pitch));
            if access == Access::Read {
                // Elements side by side along the last dim, as copy engines want them.
                scales.shape.pop();
                scales.strides.pop();
            }
            (by_page(DType::E4m3, dim, page, pitch, 0), Some(scales))
        }
        (StateFormat::Index { dim, dtype }, Array::Key) => (by_slot(dtype, dim, row, 0), None),
        _ => return None,
    })
}

/// The parameters of one array of a cache.
pub(crate) fn array(e: &mut Emit, state: Value, array: Array, access: Access) -> Result<Cached, KernelError> {
    let (arg, format) = e.state(state)?;
    let (data, scales) =
        views(format, array, access).ok_or_else(|| e.unsupported(format!("this read or write of {format:?}")))?;
    let name = match array {
        Array::Latent => "latent",
        Array::Rope => "rope",
        Array::Key => "keys",
    };
    let columns = data.shape[data.shape.len() - 1].factor;
    let planar = data.shape.len() == 3;
    let data = e.param(name, arg, data, access);
    let scales = scales.map(|view| e.param(&format!("{name}_scales"), arg, view, access));
    Ok(Cached { data, scales, columns, planar })
}

/// Columns `first..first + count` of a matrix of keys, by row.
pub(crate) fn columns(
    e: &mut Emit,
    matrix: Value,
    name: &str,
    (first, count): (u32, u32),
) -> Result<Cached, KernelError> {
    let (arg, mut view) = e.view(matrix, Part::Data)?;
    view.offset += u64::from(first) * view.dtype.bytes() as u64;
    view.shape[1] = count.into();
    Ok(Cached { data: e.param(name, arg, view, Access::Read), scales: None, columns: count, planar: false })
}

impl Cached {
    /// Rows by slot, dequantised to f32 if quantised (and then to bf16 if `narrow`, which is exact: scales are powers of two), else
    /// as stored. Not for the planar format.
    pub fn gather(&self, b: &mut Builder, slots: ValueId, n: u32, narrow: bool) -> ValueId {
        let data = b.gather(self.data, slots, &[0.into()], &[n, self.columns]);
        let scales = self.scales.map(|scales| b.gather(scales, slots, &[0.into()], &[n, self.groups()]));
        let rows = decoded(b, data, scales);
        if narrow && scales.is_some() { b.cast(rows, DType::Bf16) } else { rows }
    }

    /// `n` rows from a slot on, dequantised to f32 if quantised, else as stored. Not for the planar format.
    fn rows(&self, b: &mut Builder, slot: ValueId, n: u32) -> ValueId {
        let index = [slot.into(), 0.into()];
        let data = b.load(self.data, &index, &[n, self.columns]);
        let scales = self.scales.map(|scales| b.load(scales, &index, &[n, self.groups()]));
        decoded(b, data, scales)
    }

    /// The 64 rows of a page, as stored, and their scales `[64, groups]`.
    pub fn page(&self, b: &mut Builder, page: ValueId) -> (ValueId, Option<ValueId>) {
        let planar = self.planar;
        let index: Vec<Ix> = if planar {
            vec![page.into(), 0.into(), 0.into()]
        } else {
            let slot = times(b, page, PAGE_TOKENS);
            vec![slot.into(), 0.into()]
        };
        let mut load = |view: ValueId, index: &[Ix], columns: u32| {
            let shape = match index {
                [_, _] if planar => vec![1, PAGE_TOKENS],
                [_, _] => vec![PAGE_TOKENS, columns],
                _ => vec![1, PAGE_TOKENS, columns],
            };
            let tile = b.load(view, index, &shape);
            b.reshape(tile, &[PAGE_TOKENS, columns])
        };
        let data = load(self.data, &index, self.columns);
        let groups = if planar { 1 } else { self.groups() };
        (data, self.scales.map(|s| load(s, &index[..2], groups)))
    }

    /// Scales of a row. Not for the planar format.
    fn groups(&self) -> u32 {
        self.columns.div_ceil(StateFormat::GROUP)
    }
}

/// Rows as stored, dequantised to f32 if they have scales.
fn decoded(b: &mut Builder, data: ValueId, scales: Option<ValueId>) -> ValueId {
    let Some(scales) = scales else { return data };
    let codes = b.cast(data, DType::F32);
    dequantize(b, codes, scales, StateFormat::GROUP)
}

/// The kernel of an [`Op::CacheLatent`] or [`Op::CacheRope`] node.
pub fn emit(graph: &Graph, node: NodeId, _schedule: &Schedule, _class: &Class) -> Result<Emitted, KernelError> {
    let inputs = graph.inputs(node);
    let which = match graph.dag[node].op {
        Op::CacheLatent => Array::Latent,
        Op::CacheRope => Array::Rope,
        _ => return Err(unsupported(graph, node, "not a read of a latent cache")),
    };
    let to = elem_name(&graph.dag[node].outputs[0]);
    let name = format!("{}_{to}", super::op_name(&graph.dag[node].op));
    let mut e = Emit::new(graph, node, None, &name);
    let cached = array(&mut e, inputs[0], which, Access::Read)?;
    let pages = e.read("page_table", inputs[1])?;
    let y = e.write("y", 0, Part::Data, None)?;
    let codes = matches!(graph.dag[node].outputs[0].tensor(), Some(ty) if matches!(ty.elem, Elem::Quant(_)));
    let y_scales = if codes { Some(e.write("y_scales", 0, Part::Scales, None)?) } else { None };
    let b = &mut e.b;
    let (block, seq) = (b.grid(Sym::C, PAGE_TOKENS), b.grid(Sym::S, 1));
    let page = b.load_scalar(pages, &[seq.into(), block.into()]);
    let (mut rows, mut scales) = cached.page(b, page);
    let to = b.dtype(y);
    let at = times(b, block, PAGE_TOKENS);
    if let (Some(tile), Some(view)) = (scales, y_scales) {
        let groups = b.shape(tile)[1];
        let tile = b.reshape(tile, &[1, PAGE_TOKENS, groups]);
        b.store(view, &[seq.into(), at.into(), 0.into()], tile);
        scales = None;
    }
    rows = decoded(b, rows, scales);
    if b.dtype(rows) != to && !codes {
        rows = b.cast(rows, DType::F32);
    }
    let rows = b.cast(rows, to);
    let rows = b.reshape(rows, &[1, PAGE_TOKENS, cached.columns]);
    b.store(y, &[seq.into(), at.into(), 0.into()], rows);
    let columns = cached.columns;
    e.finish(format!("{} of {columns}: cached rows by position", super::op_name(&graph.dag[node].op)))
}

/// Rows of a block of `cache_rows`; they divide a page.
const ROWS: u32 = 16;

/// The kernel of an [`Op::CacheRows`] node.
pub fn emit_rows(graph: &Graph, node: NodeId) -> Result<Emitted, KernelError> {
    let inputs = graph.inputs(node);
    let name = format!("{}_{}", super::op_name(&graph.dag[node].op), elem_name(&graph.dag[node].outputs[0]));
    let mut e = Emit::new(graph, node, None, &name);
    let arrays =
        [array(&mut e, inputs[0], Array::Latent, Access::Read)?, array(&mut e, inputs[0], Array::Rope, Access::Read)?];
    let pages = e.read("page_table", inputs[1])?;
    let y = e.write("y", 0, Part::Data, None)?;
    let b = &mut e.b;
    let block = b.grid(Sym::C, ROWS);
    let page = divided(b, block, PAGE_TOKENS / ROWS);
    let page = b.load_scalar(pages, &[0.into(), page.into()]);
    let slot = b.map(&[page, block], |m, v| {
        let (tokens, rows, parts) = (m.i32(PAGE_TOKENS as i32), m.i32(ROWS as i32), m.i32((PAGE_TOKENS / ROWS) as i32));
        let (first, part) = (m.mul(v[0], tokens), m.rem(v[1], parts));
        let offset = m.mul(part, rows);
        m.add(first, offset)
    });
    let to = b.dtype(y);
    let at = times(b, block, ROWS);
    let mut column = 0;
    for cached in arrays {
        let rows = cached.rows(b, slot, ROWS);
        let rows = b.cast(rows, to);
        b.store(y, &[at.into(), column.into()], rows);
        column += cached.columns;
    }
    e.finish(format!("{} of {column}: whole cached rows by position", super::op_name(&graph.dag[node].op)))
}
