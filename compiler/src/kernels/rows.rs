//! Fused row bodies: everything that works on each token by itself.
//!
//! A generic emitter. A block takes `tile_m` rows (tokens; positions, for expanded caches with sequences as a second grid axis). A
//! value of the body `[T, .., D]` is a tile `[R, .., D]`: f32, rounded through the declared type of its op where that
//! is narrower; quantised values are codes and scales. Values are emitted when first wanted, in the order of the body's outputs:
//!
//! ```text
//! load operands (slices of an argument load just the slice)
//! norms, rope, Hadamard, SwiGLU, sums, quantisation on tiles
//! store results; scatter cache rows by slot
//! ```
//!
//! Intermediate rows never reach memory: a body's traffic is its arguments and its results, once, which is its floor; it does
//! a few operations a byte.
//!
//! A body by heads (`heads`) has heads as a second grid axis: values `[T, H, D]` are tiles `[R, 1, D]`; a body by rows whose heads are
//! computed apart takes `tile_h` of them a block. Where numbers of heads differ, blocks past the last head of a value read zeros and
//! store nothing.
//!
//! With `split` in the schedule, results that are independent have blocks of their own (`chains`).
//!
//! Choices. *Hadamard*: log2 D butterfly stages of reshape, add and subtract (`D log2 D` additions); with `tile_k` in the schedule, for
//! targets with matrix units, a product with a constructed ±1 matrix (`D²`, and the matrix), which bf16 holds exactly. *Rope*: cosines and sines are gathered by position from the table, pairs are
//! the last axis after a reshape (interleaved) or two halves. *Planar index cache*: codes and scales of a row are stored at
//! (page, offset) of its slot, row by row; other formats scatter all rows at once. A negative slot gives a negative page or
//! offset and so is dropped; rows past the last token get slot -1.

use super::arithmetic::{
    columns, dequantize, elementwise, hadamard_scale, hadamard_signs, is_product, quantize, rotated, scaled,
};
use super::cache::{self, Array};
use super::chains::{Piece, chains};
use super::gate;
use super::view::{Emit, divided, extent, plus, product, range, remainder, sum, times, where_below};
use super::{Class, Emitted, KernelError, Part, body_of, op_name};
use dsc_ir::DType;
use dsc_ir::extent::{Extent, Sym};
use dsc_ir::graph::{
    Elem, FusedKind, Graph, NodeId, Op, PAGE_TOKENS, RopeLayout, StateFormat, TensorType, Value, ValueType,
};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Ix, ValueId};
use std::collections::HashMap;

/// Whether a row body may hold this op.
pub fn supports(op: &Op) -> bool {
    matches!(
        op,
        Op::TakeRows
            | Op::Cast
            | Op::Add
            | Op::Scale { .. }
            | Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::Rope { .. }
            | Op::Hadamard
            | Op::Quantize
            | Op::Dequantize
            | Op::CacheWrite
            | Op::SwiGlu
            | Op::Sigmoid
            | Op::WeightedSum
            | Op::SumPartials
    )
}

/// The kernel of a row body, or of one of its ops alone.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = body_of(graph, node)?;
    let prefix = if fused.kind == FusedKind::Heads { "heads" } else { "rows" };
    emit_body(graph, node, &fused.body, prefix, schedule, class)
}

/// The kernel of a body whose ops are rowwise.
pub(crate) fn emit_body(
    graph: &Graph,
    node: NodeId,
    body: &Graph,
    prefix: &str,
    schedule: &Schedule,
    class: &Class,
) -> Result<Emitted, KernelError> {
    let ops: Vec<&str> = body
        .order()
        .into_iter()
        .map(|n| &body.dag[n].op)
        .filter(|op| !matches!(op, Op::Arg(_) | Op::Reshape | Op::SliceLast { .. }))
        .map(op_name)
        .collect();
    let mut e = Emit::new(graph, node, Some(body), &kernel_name(prefix, &ops));
    let (batch, rows) = row_syms(&e, body)?;
    let most = class.max.get(rows).max(1);
    let routes = body.dag.node_weights().any(|n| matches!(n.op, Op::Route { .. }));
    let tile = if routes { most } else { schedule.tile_m.clamp(1, most) };
    // What is the same for all rows is made once for those that a block takes in turn.
    let matrix = by_product_of(body, schedule);
    let turns = if matrix.is_some() { schedule.in_turn.clamp(1, most.div_ceil(tile)) } else { 1 };
    let block = e.b.grid(rows, tile * turns);
    let first = times(&mut e.b, block, tile * turns);
    let seq = batch.map(|sym| e.b.grid(sym, 1));
    let head = heads_of_block(&mut e.b, body, prefix, schedule);
    let signs = matrix.filter(|_| turns > 1).map(|d| (d, hadamard_signs(&mut e.b, d)));
    let end = (turns > 1).then(|| {
        let last = plus(&mut e.b, first, (tile * turns) as i32);
        let all = extent(&mut e.b, rows.into());
        e.b.map(&[last, all], |m, v| m.min(v[0], v[1]))
    });
    let row0 = if end.is_some() { e.b.begin_for() } else { first };
    let mut emitter = Rows {
        e,
        body,
        rows,
        tile,
        row0,
        batch: batch.zip(seq),
        head,
        by_product: schedule.tile_k > 0,
        signs,
        columns: None,
        values: HashMap::new(),
        angles: HashMap::new(),
        narrow: HashMap::new(),
    };
    emitter.outputs(schedule)?;
    if let Some(end) = end {
        emitter.e.b.end_for(first, end, tile);
    }
    emitter.e.finish(format!("{prefix}: {}", ops.join(", ")))
}

/// The first head that a block takes, and how many, if not all: of a body by heads one, of rows of heads that are too large together as many as the
/// schedule says.
fn heads_of_block(b: &mut Builder, body: &Graph, prefix: &str, schedule: &Schedule) -> Option<(ValueId, u32)> {
    let heads = body.outputs.iter().filter_map(|(_, v)| body.ty(*v).tensor()?.shape.get(1)?.constant()).max()?;
    if prefix == "heads" {
        return Some((b.grid(heads, 1), 1));
    }
    if !(1..heads).contains(&schedule.tile_h) || !apart_by_head(body, heads) {
        return None;
    }
    let block = b.grid(heads, schedule.tile_h);
    Some((times(b, block, schedule.tile_h), schedule.tile_h))
}

/// The length of the rows of a body of which a product makes a Hadamard transform, if there are such.
fn by_product_of(body: &Graph, schedule: &Schedule) -> Option<u32> {
    let is = |node: &&dsc_ir::graph::Node| node.op == Op::Hadamard && schedule.tile_k > 0;
    let node = body.dag.node_weights().find(is)?;
    node.outputs[0].tensor()?.shape.last()?.constant()
}

/// Whether each head of a body's values `[T, h, ..]` is computed by itself, `h` at most `heads`: some values may have fewer.
fn apart_by_head(body: &Graph, heads: u32) -> bool {
    body.dag.node_weights().all(|node| match node.op {
        // What views look at is judged where it is made.
        Op::Arg(_) | Op::SliceLast { .. } | Op::Reshape => true,
        Op::Rope { .. }
        | Op::Quantize
        | Op::Dequantize
        | Op::Cast
        | Op::Scale { .. }
        | Op::Hadamard
        | Op::RmsNorm { .. }
        | Op::LayerNorm { .. }
        | Op::Add
        | Op::SwiGlu
        | Op::Sigmoid => {
            let shape = node.outputs[0].tensor().map_or(&[][..], |t| &t.shape);
            shape.len() == 3 && shape[1].constant().is_some_and(|own| own <= heads)
        }
        _ => false,
    })
}

/// A name that says the first ops; the hash tells the rest.
fn kernel_name(prefix: &str, ops: &[&str]) -> String {
    let shown: Vec<&str> = ops.iter().copied().take(6).collect();
    let more = if ops.len() > shown.len() { format!("_and_{}", ops.len() - shown.len()) } else { String::new() };
    format!("{prefix}_{}{more}", shown.join("_"))
}

/// What the rows of a body are: the symbolic dim of its results; and the one before it, if they have two.
fn row_syms(e: &Emit, body: &Graph) -> Result<(Option<Sym>, Sym), KernelError> {
    for (_, value) in &body.outputs {
        let shape = match body.ty(*value) {
            ValueType::Tensor(ty) => &ty.shape,
            ValueType::State(_) => &body.tensor(body.inputs(value.node)[1]).shape,
        };
        match shape.iter().filter_map(|d| d.sym).collect::<Vec<_>>()[..] {
            [rows] => return Ok((None, rows)),
            [batch, rows] => return Ok((Some(batch), rows)),
            _ => {}
        }
    }
    Err(e.unsupported("a row body without rows"))
}

/// A value of the body on chip.
#[derive(Clone, Copy)]
enum Tile {
    /// f32, or i32.
    Plain(ValueId),
    /// f32 codes' e4m3 tile, scales `[.., groups]`, and elements a group.
    Quant { codes: ValueId, scales: ValueId, group: u32 },
    /// A cache: nothing on chip.
    State,
}

struct Rows<'g> {
    e: Emit<'g>,
    body: &'g Graph,
    /// What the rows count.
    rows: Sym,
    /// Rows of a block.
    tile: u32,
    /// First row of this block.
    row0: ValueId,
    batch: Option<(Sym, ValueId)>,
    /// The first head that a block takes of values `[T, heads, ..]`, and how many, if not all.
    head: Option<(ValueId, u32)>,
    /// Whether matrix units do what they can.
    by_product: bool,
    /// The matrix of a Hadamard transform of rows of that length, where rows in turn share it.
    signs: Option<(u32, ValueId)>,
    /// The first column that a block takes of a head's product, and how many, if not all.
    columns: Option<(ValueId, u32)>,
    values: HashMap<Value, Tile>,
    /// Rows of tables of cosines and sines, by table and positions.
    angles: HashMap<(ValueId, ValueId), ValueId>,
    /// What was converted from a narrower type: the values of that type.
    narrow: HashMap<ValueId, ValueId>,
}

impl Rows<'_> {
    /// All results; those that are independent by blocks of their own, of which there are as many as the schedule says at most.
    fn outputs(&mut self, schedule: &Schedule) -> Result<(), KernelError> {
        let chains = chains(self.body, schedule.split, schedule.tile_n);
        let blocks: u32 = chains.iter().map(|c| c.blocks).sum();
        if blocks == 1 {
            let all = 0..self.body.outputs.len() as u32;
            return all.map(|output| Piece { output, array: None }).try_for_each(|piece| self.output(piece));
        }
        let block = self.e.b.grid(blocks, 1);
        let mut first = 0;
        for chain in chains {
            let (lo, hi) = (first as i32, (first + chain.blocks) as i32);
            first += chain.blocks;
            let here = self.e.b.map(&[block], |m, v| {
                let (lo, hi) = (m.i32(lo), m.i32(hi));
                let (from, to) = (m.le(lo, v[0]), m.lt(v[0], hi));
                m.and(from, to)
            });
            self.e.b.begin_when();
            if chain.blocks > 1 {
                let number = plus(&mut self.e.b, block, -lo);
                self.columns = Some((times(&mut self.e.b, number, schedule.tile_n), schedule.tile_n));
            }
            self.values.clear();
            self.angles.clear();
            chain.pieces.into_iter().try_for_each(|piece| self.output(piece))?;
            self.columns = None;
            self.e.b.end_when(here);
        }
        Ok(())
    }

    /// Tile shape and start of a tensor of that shape.
    fn place(&mut self, shape: &[Extent]) -> Result<(Vec<u32>, Vec<Ix>), KernelError> {
        let (mut sizes, mut start) = (Vec::new(), Vec::new());
        for (axis, &d) in shape.iter().enumerate() {
            if let (1, 3, Some((head, count))) = (axis, shape.len(), self.head) {
                sizes.push(count);
                start.push(head.into());
                continue;
            }
            match (d.sym, self.batch) {
                (None, _) => {
                    sizes.push(d.factor);
                    start.push(0.into());
                }
                (Some(sym), _) if sym == self.rows => {
                    sizes.push(self.tile * d.factor);
                    let at = times(&mut self.e.b, self.row0, d.factor);
                    start.push(at.into());
                }
                (Some(sym), Some((batch, seq))) if sym == batch => {
                    sizes.push(d.factor);
                    let at = times(&mut self.e.b, seq, d.factor);
                    start.push(at.into());
                }
                _ => return Err(self.e.unsupported(format!("{shape:?} in a body over {}", self.rows.name()))),
            }
        }
        Ok((sizes, start))
    }

    fn load(&mut self, value: Value) -> Result<Tile, KernelError> {
        let ty = self.body.tensor(value).clone();
        let (shape, start) = self.place(&ty.shape)?;
        let data = self.e.read("x", value)?;
        let data = self.e.b.load(data, &start, &shape);
        let Elem::Quant(q) = ty.elem else {
            let plain = self.e.b.dtype(data) == DType::I32;
            return Ok(Tile::Plain(if plain { data } else { self.e.b.cast(data, DType::F32) }));
        };
        let scale_shape = ty.scale_shape().ok_or_else(|| self.e.unsupported("scales of a symbolic dim"))?;
        let (shape, start) = self.place(&scale_shape)?;
        let scales = self.e.read_scales("x_scales", value)?;
        let scales = self.e.b.load(scales, &start, &shape);
        Ok(Tile::Quant { codes: data, scales, group: q.block[1] })
    }

    /// The tile of a value; emitted when first asked for.
    fn value(&mut self, value: Value) -> Result<Tile, KernelError> {
        if let Some(&tile) = self.values.get(&value) {
            return Ok(tile);
        }
        let direct = self.body.ty(value).tensor().is_some()
            && self.e.is_argument(value)
            && self.e.view(value, Part::Data).is_ok();
        let tile = if direct { self.load(value)? } else { self.compute(value)? };
        self.values.insert(value, tile);
        Ok(tile)
    }

    fn plain(&mut self, value: Value) -> Result<ValueId, KernelError> {
        match self.value(value)? {
            Tile::Plain(v) => Ok(v),
            _ => Err(self.e.unsupported("a quantised operand; dequantise it first")),
        }
    }

    /// A vector `[D]` under the rank of `like`.
    fn vector(&mut self, value: Value, like: ValueId) -> Result<ValueId, KernelError> {
        let v = self.plain(value)?;
        let (shape, rank) = (self.e.b.shape(v), self.e.b.shape(like).len());
        let aligned: Vec<u32> = std::iter::repeat_n(1, rank - shape.len()).chain(shape).collect();
        Ok(self.e.b.reshape(v, &aligned))
    }

    /// An f32 result as its declared type holds it.
    fn rounded(&mut self, x: ValueId, value: Value) -> Tile {
        let b = &mut self.e.b;
        match self.body.tensor(value).elem {
            Elem::Plain(dtype) if dtype.is_float() && dtype != DType::F32 && b.dtype(x) == DType::F32 => {
                let narrow = b.cast(x, dtype);
                Tile::Plain(b.cast(narrow, DType::F32))
            }
            _ => Tile::Plain(x),
        }
    }

    fn compute(&mut self, value: Value) -> Result<Tile, KernelError> {
        let inputs = self.body.inputs(value.node);
        let op = self.body.dag[value.node].op.clone();
        let x = match &op {
            Op::SliceLast { start, len } => return self.slice_last(inputs[0], *start, *len),
            Op::Reshape => return self.reshape(inputs[0], value),
            Op::TakeRows => return self.take_rows(inputs[0], inputs[1]),
            Op::Quantize => return self.quantize(inputs[0], value),
            Op::CacheWrite => return self.cache_write(&inputs, None),
            Op::Arg(_) => return Err(self.e.unsupported("an argument that cannot be read in place")),
            Op::WeightedSum => self.weighted_sum(inputs[0], inputs[1])?,
            Op::SumPartials => {
                let width = self.e.dim(inputs[0], 2)?;
                self.sum_partials(inputs[0], 0, width)?
            }
            Op::Append { value } => {
                let x = self.plain(inputs[0])?;
                gate::append(&mut self.e.b, x, *value)
            }
            Op::Dequantize => match self.value(inputs[0])? {
                Tile::Quant { codes, scales, group } => {
                    let codes = self.e.b.cast(codes, DType::F32);
                    dequantize(&mut self.e.b, codes, scales, group)
                }
                _ => return Err(self.e.unsupported("dequantize of a plain value")),
            },
            Op::HeadLinear { first, count, transposed } => self.head_linear(&inputs, [*first, *count], *transposed)?,
            Op::Rope { layout, start } => {
                let narrow = match self.body.tensor(value).elem {
                    Elem::Plain(dtype) if dtype.is_float() => dtype,
                    _ => DType::F32,
                };
                return Ok(Tile::Plain(self.rope(&inputs, *layout, *start, narrow)?));
            }
            Op::TakeAlong => {
                let (x, columns) = (self.plain(inputs[0])?, self.plain(inputs[1])?);
                gate::take_along(&mut self.e.b, x, columns)
            }
            _ => {
                let x = self.plain(inputs[0])?;
                let other = match inputs.get(1) {
                    Some(&v) if matches!(op, Op::Add | Op::RmsNorm { .. } | Op::LayerNorm { .. } | Op::SwiGlu) => {
                        Some(self.vector(v, x)?)
                    }
                    _ => None,
                };
                let bias = match inputs.get(2) {
                    Some(&v) if matches!(op, Op::LayerNorm { .. }) => Some(self.vector(v, x)?),
                    _ => None,
                };
                let exact = self.body.tensor(inputs[0]).elem == Elem::Plain(DType::Bf16);
                if op == Op::Hadamard && self.by_product && exact && is_product(&self.e.b.shape(x)) {
                    let x = self.hadamard_product(x);
                    return Ok(self.rounded(x, value));
                }
                match elementwise(&mut self.e.b, &op, x, other, bias) {
                    Some(x) => x,
                    None => return Err(self.e.unsupported(format!("{} in a row body", op_name(&op)))),
                }
            }
        };
        Ok(self.rounded(x, value))
    }

    fn slice_last(&mut self, x: Value, start: u32, len: u32) -> Result<Tile, KernelError> {
        // Of a sum, only the slice is summed.
        if self.body.dag[x.node].op == Op::SumPartials && !self.values.contains_key(&x) {
            let part = self.sum_partials(self.body.inputs(x.node)[0], start, len)?;
            return Ok(self.rounded(part, x));
        }
        Ok(match self.value(x)? {
            Tile::Plain(x) => Tile::Plain(columns(&mut self.e.b, x, start, len)),
            Tile::Quant { codes, scales, group } if start.is_multiple_of(group) => Tile::Quant {
                codes: columns(&mut self.e.b, codes, start, len),
                scales: columns(&mut self.e.b, scales, start / group, len.div_ceil(group)),
                group,
            },
            _ => return Err(self.e.unsupported("a slice through a scale block")),
        })
    }

    fn reshape(&mut self, x: Value, value: Value) -> Result<Tile, KernelError> {
        let ty = self.body.tensor(value).clone();
        let (shape, _) = self.place(&ty.shape)?;
        Ok(match self.value(x)? {
            Tile::Plain(x) => Tile::Plain(self.e.b.reshape(x, &shape)),
            Tile::Quant { codes, scales, group } => {
                let scale_shape = ty.scale_shape().ok_or_else(|| self.e.unsupported("scales of a symbolic dim"))?;
                let (scale_shape, _) = self.place(&scale_shape)?;
                let (codes, scales) = (self.e.b.reshape(codes, &shape), self.e.b.reshape(scales, &scale_shape));
                Tile::Quant { codes, scales, group }
            }
            Tile::State => return Err(self.e.unsupported("a reshape of a cache")),
        })
    }

    fn take_rows(&mut self, x: Value, rows: Value) -> Result<Tile, KernelError> {
        let rows = self.plain(rows)?;
        let ty = self.body.tensor(x).clone();
        let mut gather = |part: Part, shape: &[Extent]| -> Result<ValueId, KernelError> {
            let sizes: Option<Vec<u32>> = shape[1..].iter().map(|d| d.constant()).collect();
            let sizes = sizes.ok_or_else(|| self.e.unsupported("rows of more than one symbolic dim"))?;
            let (arg, view) = self.e.view(x, part)?;
            let view = self.e.param("x", arg, view, Access::Read);
            let shape: Vec<u32> = [self.tile].into_iter().chain(sizes).collect();
            Ok(self.e.b.gather(view, rows, &super::view::zeros(shape.len() - 1), &shape))
        };
        let data = gather(Part::Data, &ty.shape)?;
        match (ty.elem, ty.scale_shape()) {
            (Elem::Quant(q), Some(shape)) => {
                Ok(Tile::Quant { codes: data, scales: gather(Part::Scales, &shape)?, group: q.block[1] })
            }
            (Elem::Plain(DType::I32), _) => Ok(Tile::Plain(data)),
            _ => Ok(Tile::Plain(self.e.b.cast(data, DType::F32))),
        }
    }

    fn quantize(&mut self, x: Value, value: Value) -> Result<Tile, KernelError> {
        let x = self.plain(x)?;
        match self.body.tensor(value).elem {
            Elem::Quant(q) if q.block[0] == 1 => {
                let (codes, scales) = quantize(&mut self.e.b, x, q.block[1], q.pow2);
                Ok(Tile::Quant { codes, scales, group: q.block[1] })
            }
            elem => Err(self.e.unsupported(format!("quantize to {elem:?}"))),
        }
    }

    /// `Σ_j y_j w_j` in ascending `j`; the rows of an argument are loaded one by one.
    fn weighted_sum(&mut self, y: Value, weights: Value) -> Result<ValueId, KernelError> {
        let (k, d) = (self.e.dim(y, 1)?, self.e.dim(y, 2)?);
        let rows = self.tile;
        let weights = self.plain(weights)?;
        let argument = self.e.is_argument(y) && self.e.view(y, Part::Data).is_ok() && self.e.quant(y).is_none();
        let whole = if argument { None } else { Some(self.plain(y)?) };
        let view = if argument { Some(self.e.read("x", y)?) } else { None };
        let b = &mut self.e.b;
        let mut acc = None;
        for j in 0..k {
            let row = match (view, whole) {
                (Some(view), _) => b.load(view, &[self.row0.into(), j.into(), 0.into()], &[rows, 1, d]),
                (_, Some(y)) => b.slice(y, &[0, j, 0], &[rows, 1, d]),
                _ => continue,
            };
            let row = b.cast(row, DType::F32);
            let row = b.reshape(row, &[rows, d]);
            let weight = b.slice(weights, &[0, j], &[rows, 1]);
            acc = Some(match acc {
                None => product(b, row, weight),
                Some(acc) => b.map(&[acc, row, weight], |m, v| {
                    let term = m.mul(v[1], v[2]);
                    m.add(v[0], term)
                }),
            });
        }
        acc.ok_or_else(|| self.e.unsupported("a sum of nothing"))
    }

    /// `Σ_p x_p` in ascending `p` of columns `start..start + len`.
    fn sum_partials(&mut self, x: Value, start: u32, len: u32) -> Result<ValueId, KernelError> {
        let (parts, rows) = (self.e.dim(x, 1)?, self.tile);
        let view = self.e.read("parts", x)?;
        let b = &mut self.e.b;
        let mut total = None;
        for p in 0..parts {
            let part = b.load(view, &[self.row0.into(), p.into(), start.into()], &[rows, 1, len]);
            let part = b.reshape(part, &[rows, len]);
            total = Some(match total {
                None => part,
                Some(total) => sum(b, total, part),
            });
        }
        total.ok_or_else(|| self.e.unsupported("a sum of nothing"))
    }

    /// The results of a route of all tokens.
    fn route(&mut self, node: NodeId, experts: u32) -> Result<(), KernelError> {
        let ids = self.plain(self.body.inputs(node)[0])?;
        let output = |o: u32| self.body.outputs.iter().position(|(_, v)| *v == Value { node, output: o });
        let (Some(order), Some(offsets)) = (output(0), output(1)) else {
            return Err(self.e.unsupported("a route whose order or offsets are not used"));
        };
        let order = self.e.write("order", order as u32, Part::Data, None)?;
        let offsets = self.e.write("offsets", offsets as u32, Part::Data, None)?;
        let owners = output(2).map(|o| self.e.write("owners", o as u32, Part::Data, None)).transpose()?;
        let rows = self.rows;
        let b = &mut self.e.b;
        let end = extent(b, rows.into());
        let shape = b.shape(ids);
        let numbers = b.iota(0, &[shape[0], 1]);
        let ids = where_below(b, ids, numbers, end);
        gate::route(b, ids, experts, [order, offsets], owners);
        Ok(())
    }

    /// One head's product, all columns at once.
    fn head_linear(
        &mut self,
        inputs: &[Value],
        [first, count]: [u32; 2],
        transposed: bool,
    ) -> Result<ValueId, KernelError> {
        let &[x, w] = inputs else { return Err(self.e.unsupported("head_linear without its two inputs")) };
        let Some((head, _)) = self.head else { return Err(self.e.unsupported("head_linear in a body by rows")) };
        let (heads, k) = (self.e.dim(x, 1)?, self.e.dim(w, 1)?);
        let rows_of_head = self.e.dim(w, 0)? / heads;
        let stored = super::view::storage(self.body.tensor(x).elem);
        let x = self.plain(x)?;
        let w = self.e.read("w", w)?;
        let b = &mut self.e.b;
        let width = b.shape(x)[2];
        let x = b.reshape(x, &[self.tile, width]);
        let x = b.cast(x, stored);
        let row = times(b, head, rows_of_head);
        let row = plus(b, row, first as i32);
        let (column, columns) = match self.columns {
            Some((column, columns)) => (Ix::from(column), columns),
            None => (0.into(), if transposed { count } else { k }),
        };
        let y = if transposed {
            let row = match column {
                Ix::Value(column) => sum(b, row, column),
                Ix::Const(_) => row,
            };
            let w = b.load(w, &[row.into(), 0.into()], &[columns, k]);
            b.dot_t(x, w, None)
        } else {
            let w = b.load(w, &[row.into(), column], &[count, columns]);
            b.dot(x, w, None)
        };
        Ok(b.reshape(y, &[self.tile, 1, columns]))
    }

    /// `x` as `to` has it; without an instruction if it came from that.
    fn narrowed(&mut self, x: ValueId, to: DType) -> ValueId {
        let narrow = self.narrow.get(&x).copied().filter(|&v| self.e.b.dtype(v) == to);
        narrow.unwrap_or_else(|| self.e.b.cast(x, to))
    }

    /// A Hadamard transform of values that bf16 holds, by a product with its matrix.
    fn hadamard_product(&mut self, x: ValueId) -> ValueId {
        let shape = self.e.b.shape(x);
        let d = shape[shape.len() - 1];
        let rows: u32 = shape[..shape.len() - 1].iter().product();
        let signs = match self.signs {
            Some((of, signs)) if of == d => signs,
            _ => hadamard_signs(&mut self.e.b, d),
        };
        let x = self.narrowed(x, DType::Bf16);
        let b = &mut self.e.b;
        let x = b.reshape(x, &[rows, d]);
        let y = b.dot_t(x, signs, None);
        let y = scaled(b, y, hadamard_scale(d));
        b.reshape(y, &shape)
    }

    /// Rotated pairs in their places, rounded to `narrow`.
    fn rope(
        &mut self,
        inputs: &[Value],
        layout: RopeLayout,
        start: u32,
        narrow: DType,
    ) -> Result<ValueId, KernelError> {
        let (x, positions) = (self.plain(inputs[0])?, self.plain(inputs[1])?);
        let dim = self.e.dim(inputs[2], 1)?;
        let table = self.e.read("table", inputs[2])?;
        let b = &mut self.e.b;
        let shape = b.shape(x);
        let (rank, d) = (shape.len(), shape[shape.len() - 1]);
        let angles = *self.angles.entry((table, positions)).or_insert_with(|| {
            let angles = b.gather(table, positions, &[0.into()], &[self.tile, dim]);
            b.cast(angles, DType::F32)
        });
        // One axis a pair: the last, or the one before.
        let pairs = |part: ValueId, b: &mut Builder| {
            let mut shape = vec![1; rank];
            (shape[0], shape[rank - 1]) = (self.tile, dim / 2);
            if layout == RopeLayout::Interleaved {
                shape.push(1);
            }
            b.reshape(part, &shape)
        };
        let (cos, sin) = (columns(b, angles, 0, dim / 2), columns(b, angles, dim / 2, dim / 2));
        let (cos, sin) = (pairs(cos, b), pairs(sin, b));
        let mut part = columns(b, x, start, dim);
        if layout == RopeLayout::Interleaved {
            let mut paired = shape.clone();
            paired[rank - 1] = dim / 2;
            paired.push(2);
            part = b.reshape(part, &paired);
        }
        let half = if layout == RopeLayout::Interleaved { 1 } else { dim / 2 };
        let (u, v) = (columns(b, part, 0, half), columns(b, part, half, half));
        // Rounded before they are put side by side, which then are those that are kept.
        let mut turned = [true, false].map(|minus| rotated(b, [u, v, cos, sin], minus, narrow)).to_vec();
        if layout == RopeLayout::Interleaved {
            let axis = b.shape(u).len() as u32 - 1;
            let pairs = b.concat(&turned, axis);
            let mut whole = shape.clone();
            whole[rank - 1] = dim;
            turned = vec![b.reshape(pairs, &whole)];
        }
        let mut beside = |from: u32, to: u32| {
            let part = (from < to).then(|| columns(b, x, from, to - from));
            part.map(|part| b.cast(part, narrow))
        };
        let parts: Vec<ValueId> = beside(0, start).into_iter().chain(turned).chain(beside(start + dim, d)).collect();
        let b = &mut self.e.b;
        let kept = if parts.len() == 1 { parts[0] } else { b.concat(&parts, rank as u32 - 1) };
        let y = b.cast(kept, DType::F32);
        self.narrow.insert(y, kept);
        Ok(y)
    }

    /// Writes the rows of a cache: all of its arrays, or one.
    fn cache_write(&mut self, inputs: &[Value], only: Option<usize>) -> Result<Tile, KernelError> {
        if matches!(self.body.dag[inputs[0].node].op, Op::CacheWrite) {
            self.value(inputs[0])?;
        }
        let (_, format) = self.e.state(inputs[0])?;
        let slots = self.plain(inputs[1])?;
        let slots = self.masked(slots);
        let arrays: &[Array] = match format {
            StateFormat::LatentFp8 { .. } | StateFormat::Latent { .. } => &[Array::Latent, Array::Rope],
            StateFormat::IndexFp8 { .. } | StateFormat::Index { .. } => &[Array::Key],
        };
        let written = arrays.iter().zip(&inputs[2..]).enumerate().filter(|(i, _)| only.is_none_or(|one| one == *i));
        for (_, (&array, &part)) in written {
            let tile = self.value(part)?;
            let cached = cache::array(&mut self.e, inputs[0], array, Access::Write)?;
            let stored = match (tile, cached.scales) {
                (Tile::Quant { codes, scales, .. }, Some(view)) => vec![(cached.data, codes), (view, scales)],
                (Tile::Plain(x), None) => {
                    let to = self.e.b.dtype(cached.data);
                    vec![(cached.data, self.narrowed(x, to))]
                }
                _ => return Err(self.e.unsupported(format!("what is written to {format:?} is not stored like it"))),
            };
            for (view, tile) in stored {
                if cached.planar {
                    self.store_by_page(view, slots, tile);
                } else {
                    self.e.b.scatter(view, slots, &[0.into()], tile);
                }
            }
        }
        Ok(Tile::State)
    }

    /// Slots, -1 for rows past the last one.
    fn masked(&mut self, slots: ValueId) -> ValueId {
        if self.tile == 1 {
            return slots;
        }
        let (rows, tile) = (self.rows, self.tile);
        let b = &mut self.e.b;
        let end = extent(b, rows.into());
        let numbers = range(b, self.row0, tile);
        where_below(b, slots, numbers, end)
    }

    fn store_by_page(&mut self, view: ValueId, slots: ValueId, tile: ValueId) {
        let b = &mut self.e.b;
        let columns = b.shape(tile)[1];
        for r in 0..self.tile {
            let slot = b.slice(slots, &[r], &[1]);
            let slot = b.reshape(slot, &[]);
            let page = divided(b, slot, PAGE_TOKENS);
            let offset = remainder(b, slot, PAGE_TOKENS);
            let row = b.slice(tile, &[r, 0], &[1, columns]);
            let row = b.reshape(row, &[1, 1, columns]);
            b.store(view, &[page.into(), offset.into(), 0.into()], row);
        }
    }

    fn output(&mut self, Piece { output, array }: Piece) -> Result<(), KernelError> {
        let (_, value) = self.body.outputs[output as usize];
        if let Op::Route { experts } = self.body.dag[value.node].op {
            return if value.output == 0 { self.route(value.node, experts) } else { Ok(()) };
        }
        let ty: TensorType = match self.body.ty(value) {
            ValueType::State(_) if array.is_some() => {
                return self.cache_write(&self.body.inputs(value.node), array).map(|_| ());
            }
            ValueType::State(_) => return self.value(value).map(|_| ()),
            ValueType::Tensor(ty) => ty.clone(),
        };
        let tile = self.value(value)?;
        let (_, mut start) = self.place(&ty.shape)?;
        if let (Some((column, _)), Some(last)) = (self.columns, start.last_mut()) {
            *last = column.into();
        }
        let y = self.e.write("y", output, Part::Data, None)?;
        match tile {
            Tile::Plain(x) => {
                let to = self.e.b.dtype(y);
                let x = self.narrowed(x, to);
                self.e.b.store(y, &start, x);
            }
            Tile::Quant { codes, scales, .. } => {
                let shape = ty.scale_shape().ok_or_else(|| self.e.unsupported("scales of a symbolic dim"))?;
                let (_, scale_start) = self.place(&shape)?;
                let s = self.e.write("y_scales", output, Part::Scales, None)?;
                self.e.b.store(y, &start, codes);
                self.e.b.store(s, &scale_start, scales);
            }
            Tile::State => {}
        }
        Ok(())
    }
}
