//! Matrix products with weights: `linear` and `head_linear`.
//!
//! `linear`: `y[m, n] = Σ_k x[m, k] w[n, k]`. A block makes a `tile_m × tile_n` tile of `y`:
//!
//! ```text
//! acc = 0
//! for kk in 0..K step tile_k { acc += x[m0.., kk..] · w[n0.., kk..]ᵀ }
//! y[m0.., n0..] = round acc
//! ```
//!
//! Both operands are contiguous along `k`, and tiles of them go straight from memory into the dot. Axis 0 of the grid counts row
//! tiles, so that blocks which run together share a tile of `w`: each byte of the weight comes from memory once while
//! the rows of `x` fit the cache.
//!
//! Quantised operands (facts 4.3): the step is one scale block of `k`; `acc += (x codes · w codesᵀ) · (sx[m, b] · sw[n/128, b])`,
//! the two scales multiplied first. One quantised side alone is scaled the same way.
//!
//! `head_linear` is one such product a head, with heads as the last grid axis: the head's rows of `w` are the right operand, as
//! `[k, n]` or transposed.
//!
//! Floors: `2 M N K` operations; `M K + N K + M N` elements. At `M` ≤ 16 the weight's bytes decide.

use super::view::{Emit, divided, merged, plus, product, range, sum, times};
use super::{Class, Emitted, KernelError, Part, elem_name};
use dsc_ir::graph::{Graph, NodeId, Op, Value};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, Ix, ValueId};
use dsc_ir::{DType, Extent};

/// Reads a tile of an operand that starts at a column and has that many.
pub(crate) type LoadTile<'a> = dyn Fn(&mut Builder, Ix, u32) -> ValueId + 'a;
/// Reads the scales of one block of the contracted dim, to be broadcast over the result.
pub(crate) type LoadScales<'a> = dyn Fn(&mut Builder, ValueId) -> ValueId + 'a;

/// One contraction: `m × n` results over `k`, by steps.
pub(crate) struct Contraction<'a> {
    /// Shape of the result.
    pub shape: [u32; 2],
    /// Contracted length.
    pub k: u32,
    /// Length of one step; of one scale block if there are scales.
    pub step: u32,
    /// `[m, step]` from a column.
    pub left: &'a LoadTile<'a>,
    /// `[n, step]` from a column, or `[step, n]` from a row.
    pub right: &'a LoadTile<'a>,
    /// Whether `right` gives `[n, step]`.
    pub transposed: bool,
    /// Factors of one block's partial sums.
    pub scales: Vec<&'a LoadScales<'a>>,
}

impl Contraction<'_> {
    /// The f32 result.
    pub fn emit(&self, b: &mut Builder) -> ValueId {
        let step = self.step.min(self.k);
        let dot = |b: &mut Builder, at: Ix, acc: Option<ValueId>| {
            let (x, w) = ((self.left)(b, at, step), (self.right)(b, at, step));
            if self.transposed { b.dot_t(x, w, acc) } else { b.dot(x, w, acc) }
        };
        if self.scales.is_empty() {
            if step == self.k {
                return dot(b, 0.into(), None);
            }
            let zero = b.full(0.0, &self.shape);
            return b.for_(0, self.k, step, &[zero], |b, at, acc| vec![dot(b, at.into(), Some(acc[0]))])[0];
        }
        let zero = b.full(0.0, &self.shape);
        b.for_(0, self.k.div_ceil(self.step), 1, &[zero], |b, block, acc| {
            let at = times(b, block, self.step);
            let partial = dot(b, at.into(), None);
            let mut scale = (self.scales[0])(b, block);
            for more in &self.scales[1..] {
                let other = more(b, block);
                scale = product(b, scale, other);
            }
            vec![b.map(&[acc[0], partial, scale], |m, v| {
                let scaled = m.mul(v[1], v[2]);
                m.add(v[0], scaled)
            })]
        })[0]
    }
}

/// The step of a contraction: a scale block if a side is quantised, else the schedule's.
pub(crate) fn k_step(e: &Emit, x: Value, w: Value, schedule: &Schedule) -> Result<u32, KernelError> {
    match (e.quant(x), e.quant(w)) {
        (Some(x), Some(w)) if x.block[1] != w.block[1] => {
            Err(e.unsupported(format!("scale blocks of {} and {} columns in one product", x.block[1], w.block[1])))
        }
        (Some(q), _) | (_, Some(q)) => Ok(q.block[1]),
        _ => Ok(if schedule.tile_k == 0 { 512 } else { schedule.tile_k }),
    }
}

/// `tile` or a default, at most `limit` and at least 1.
pub(crate) fn tile(wanted: u32, default: u32, limit: u64) -> u32 {
    let wanted = if wanted == 0 { default } else { wanted };
    u64::from(wanted).min(limit.max(1)) as u32
}

/// Scales of rows `row..row + n` of a weight (`row` a scalar) for one block of columns: `[1, n]` or `[1, 1]`. `view` is
/// `[row blocks, column blocks]`, `first` the row block where the matrix starts.
pub(crate) fn weight_scales(
    b: &mut Builder,
    view: ValueId,
    (row, n): (ValueId, u32),
    rows_of_block: u32,
    first: Option<ValueId>,
    block: ValueId,
) -> ValueId {
    let from = |b: &mut Builder, at: ValueId| match first {
        Some(first) => sum(b, at, first),
        None => at,
    };
    if rows_of_block.is_multiple_of(n) {
        let at = divided(b, row, rows_of_block);
        let at = from(b, at);
        return b.load(view, &[at.into(), block.into()], &[1, 1]);
    }
    let rows = range(b, row, n);
    let rows = divided(b, rows, rows_of_block);
    let rows = from(b, rows);
    let scales = b.gather(view, rows, &[block.into()], &[n, 1]);
    b.reshape(scales, &[1, n])
}

/// The rows of an activation: `[M, K]`, or `[S, M, K]` where two symbols do not merge.
struct Rows {
    batch: Option<Extent>,
    rows: Extent,
}

impl Rows {
    fn of(e: &Emit, x: Value) -> Result<Rows, KernelError> {
        let shape = &e.tensor(x).shape;
        let leading = &shape[..shape.len() - 1];
        match (merged(leading), leading) {
            (Some(rows), _) => Ok(Rows { batch: None, rows }),
            (None, &[batch, rows]) => Ok(Rows { batch: Some(batch), rows }),
            _ => Err(e.unsupported(format!("rows {leading:?} with more than one symbol"))),
        }
    }

    fn shape(&self, columns: u32) -> Vec<Extent> {
        self.batch.into_iter().chain([self.rows, columns.into()]).collect()
    }
}

/// The kernel of an [`Op::Linear`] node.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let inputs = graph.inputs(node);
    let (x, w, out) = (inputs[0], inputs[1], Value { node, output: 0 });
    let types = [x, w, out].map(|v| elem_name(graph.ty(v)));
    let (n, k) = match graph.tensor(w).shape[..] {
        [n, k] => (n.factor, k.factor),
        _ => return Err(super::unsupported(graph, node, "the weight is no matrix")),
    };
    let name = format!("linear_{}_{}_{}_n{n}_k{k}", types[0], types[1], types[2]);
    let mut e = Emit::new(graph, node, None, &name);
    let rows = Rows::of(&e, x)?;
    let step = k_step(&e, x, w, schedule)?;
    let (tm, tn) = (tile(schedule.tile_m, 16, rows.rows.eval(&class.max)), tile(schedule.tile_n, 64, n.into()));
    let (qx, qw) = (e.quant(x), e.quant(w));
    let xs = e.read_as("x", x, Part::Data, &rows.shape(k))?;
    let ws = e.read("w", w)?;
    let sx = match qx {
        Some(q) if q.block[0] == 1 => {
            Some(e.read_as("x_scales", x, Part::Scales, &rows.shape(k.div_ceil(q.block[1])))?)
        }
        Some(q) => return Err(e.unsupported(format!("activations with scale blocks of {} rows", q.block[0]))),
        None => None,
    };
    let sw = match qw {
        Some(q) => Some((e.read_scales("w_scales", w)?, q.block[0])),
        None => None,
    };
    let y = e.write("y", 0, Part::Data, Some(&rows.shape(n)))?;

    let b = &mut e.b;
    let (m0, n0) = (b.grid(rows.rows, tm), b.grid(n, tn));
    let batch = rows.batch.map(|s| b.grid(s, 1));
    let (m0, n0) = (times(b, m0, tm), times(b, n0, tn));
    let at = |column: Ix| -> Vec<Ix> { batch.iter().map(|&s| s.into()).chain([m0.into(), column]).collect() };
    let load = |b: &mut Builder, view: ValueId, column: Ix, width: u32| {
        let shape: Vec<u32> = batch.iter().map(|_| 1).chain([tm, width]).collect();
        let tile = b.load(view, &at(column), &shape);
        b.reshape(tile, &[tm, width])
    };
    let left = |b: &mut Builder, kk: Ix, width: u32| load(b, xs, kk, width);
    let right = |b: &mut Builder, kk: Ix, width: u32| b.load(ws, &[n0.into(), kk], &[tn, width]);
    let left_scales = sx.map(|s| move |b: &mut Builder, block: ValueId| load(b, s, block.into(), 1));
    let right_scales =
        sw.map(|(s, r)| move |b: &mut Builder, block: ValueId| weight_scales(b, s, (n0, tn), r, None, block));
    let mut scales: Vec<&LoadScales> = Vec::new();
    scales.extend(left_scales.as_ref().map(|f| f as &LoadScales));
    scales.extend(right_scales.as_ref().map(|f| f as &LoadScales));
    let product = Contraction { shape: [tm, tn], k, step, left: &left, right: &right, transposed: true, scales };
    let acc = product.emit(b);
    store(b, y, &at(n0.into()), acc);
    e.finish(format!("linear {} x {}: [{} x {k}] · [{n} x {k}]ᵀ -> {}", types[0], types[1], rows.rows, types[2]))
}

/// Stores an f32 matrix as the view's element type, with leading axes of 1 as its rank asks.
fn store(b: &mut Builder, view: ValueId, index: &[Ix], x: ValueId) {
    let matrix = b.shape(x);
    let shape: Vec<u32> = std::iter::repeat_n(1, index.len() - matrix.len()).chain(matrix).collect();
    let to = b.dtype(view);
    let x = b.cast(x, to);
    let x = b.reshape(x, &shape);
    b.store(view, index, x);
}

/// The kernel of an [`Op::HeadLinear`] node.
pub fn emit_heads(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let Op::HeadLinear { first, count, transposed } = graph.dag[node].op else {
        return Err(super::unsupported(graph, node, "not a head_linear"));
    };
    let inputs = graph.inputs(node);
    let (x, w, out) = (inputs[0], inputs[1], Value { node, output: 0 });
    let types = [x, w, out].map(|v| elem_name(graph.ty(v)));
    let form = if transposed { "t" } else { "n" };
    let name = format!("head_linear_{form}_{}_{}_{}_c{count}", types[0], types[1], types[2]);
    let mut e = Emit::new(graph, node, None, &name);
    if e.quant(x).is_some() || e.quant(w).is_some() {
        return Err(e.unsupported("a quantised operand of head_linear; expand it to bf16 or f32"));
    }
    let (heads, k) = (e.dim(x, 1)?, e.dim(x, 2)?);
    let (rows_of_head, n) = (e.dim(w, 0)? / heads, e.dim(out, 2)?);
    let tokens = e.tensor(x).shape[0];
    let step = k_step(&e, x, w, schedule)?;
    let (tm, tn) = (tile(schedule.tile_m, 16, tokens.eval(&class.max)), tile(schedule.tile_n, 64, n.into()));
    let (xs, ws) = (e.read("x", x)?, e.read("w", w)?);
    let y = e.write("y", 0, Part::Data, None)?;

    let b = &mut e.b;
    let (m0, n0, head) = (b.grid(tokens, tm), b.grid(n, tn), b.grid(heads, 1));
    let (m0, n0) = (times(b, m0, tm), times(b, n0, tn));
    let row = times(b, head, rows_of_head);
    let row = plus(b, row, first as i32);
    let left = |b: &mut Builder, kk: Ix, width: u32| {
        let tile = b.load(xs, &[m0.into(), head.into(), kk], &[tm, 1, width]);
        b.reshape(tile, &[tm, width])
    };
    let offset = |b: &mut Builder, at: Ix| match at {
        Ix::Const(c) => plus(b, row, c as i32),
        Ix::Value(v) => sum(b, row, v),
    };
    // The rows of one head follow those of another: a ragged tile reads into the next head, where the left operand is zero
    // (or, transposed, makes columns that are not stored).
    let right = |b: &mut Builder, kk: Ix, width: u32| {
        if transposed {
            let at = offset(b, n0.into());
            b.load(ws, &[at.into(), kk], &[tn, width])
        } else {
            let at = offset(b, kk);
            b.load(ws, &[at.into(), n0.into()], &[width, tn])
        }
    };
    let product = Contraction { shape: [tm, tn], k, step, left: &left, right: &right, transposed, scales: Vec::new() };
    let acc = product.emit(b);
    let to = b.dtype(y);
    let acc = b.cast(acc, to);
    let acc = b.reshape(acc, &[tm, 1, tn]);
    b.store(y, &[m0.into(), head.into(), n0.into()], acc);
    debug_assert!(b.dtype(xs) != DType::E4m3);
    e.finish(format!("head_linear: {heads} heads, [{tokens} x {k}] · [{k} x {n}], {} x {}", types[0], types[1]))
}
