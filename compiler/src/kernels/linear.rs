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
//! `linear_partial` has parts of the contracted columns as the last grid axis, and stores their sums apart.
//!
//! Two products of the same rows may share a launch ([`emit_beside`]): blocks choose by their number.
//!
//! Fused bodies: see `epilogue`. With SwiGLU a block has two accumulators, for the same columns of gate and up.
//!
//! `head_linear` is one such product a head, with heads as the last grid axis: the head's rows of `w` are the right operand, as
//! `[k, n]` or transposed.
//!
//! Floors: `2 M N K` operations; `M K + N K + M N` elements. At `M` ≤ 16 the weight's bytes decide.

use super::epilogue::{Epilogue, JOINED_ELEMENTS, Joined, Results};
use super::view::{Emit, divided, merged, plus, product, range, remainder, sum, times};
use super::{Class, Emitted, KernelError, Part, elem_name};
use dsc_ir::Extent;
use dsc_ir::graph::{Graph, NodeId, Op, Value, part_columns};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Builder, Ix, ValueId};

/// Reads a tile of an operand that starts at a column and has that many.
pub(crate) type LoadTile<'a> = dyn Fn(&mut Builder, Ix, u32) -> ValueId + 'a;
/// Reads the scales of one block of the contracted dim, to be broadcast over the result.
pub(crate) type LoadScales<'a> = dyn Fn(&mut Builder, ValueId) -> ValueId + 'a;

/// One right operand of a contraction.
pub(crate) struct Right<'a> {
    /// `[n, step]` from a column, or `[step, n]` from a row.
    pub load: Box<LoadTile<'a>>,
    /// Factors of one block's partial sums.
    pub scales: Option<Box<LoadScales<'a>>>,
}

/// Rows of a weight as right operands: `n` of them, one operand for each of some offsets.
#[derive(Clone, Copy)]
pub(crate) struct WeightRows {
    /// `[rows, k]`, of one matrix or of several.
    pub view: ValueId,
    /// The first in the view, and in its matrix.
    pub first: [ValueId; 2],
    pub n: u32,
    /// Their scales: a view, how many rows share one, and where those of the matrix start.
    pub scales: Option<(ValueId, u32, Option<ValueId>)>,
}

impl WeightRows {
    /// The operands.
    pub fn at(self, offsets: &[u32]) -> Vec<Right<'static>> {
        let WeightRows { view, first: [in_view, in_matrix], n, scales } = self;
        let right = |&offset: &u32| Right {
            load: Box::new(move |b, kk, width| {
                let row = plus(b, in_view, offset as i32);
                b.load(view, &[row.into(), kk], &[n, width])
            }),
            scales: scales.map(|(view, share, start)| -> Box<LoadScales<'static>> {
                Box::new(move |b, block| weight_scales(b, view, (in_matrix, offset, n), share, start, block))
            }),
        };
        offsets.iter().map(right).collect()
    }
}

/// Contractions of one left operand: `m × n` results each over `k`, by steps.
pub(crate) struct Contraction<'a> {
    /// Shape of each result.
    pub shape: [u32; 2],
    /// Contracted length.
    pub k: u32,
    /// Length of one step; of one scale block if there are scales.
    pub step: u32,
    /// Only this part of the contracted columns: its number, a scalar, and the columns of each part, a multiple of the step.
    pub part: Option<(ValueId, u32)>,
    /// `[m, step]` from a column.
    pub left: &'a LoadTile<'a>,
    /// Factors of one block's partial sums.
    pub left_scales: Option<&'a LoadScales<'a>>,
    /// Right operands, one a result.
    pub rights: Vec<Right<'a>>,
    /// Whether right operands are `[n, step]`.
    pub transposed: bool,
}

impl Contraction<'_> {
    /// The f32 results.
    pub fn emit(&self, b: &mut Builder) -> Vec<ValueId> {
        let step = self.step.min(self.k);
        let scaled = self.left_scales.is_some() || self.rights.iter().any(|r| r.scales.is_some());
        if !scaled && step == self.k && self.part.is_none() {
            return self.dots(b, 0.into(), step, None);
        }
        let zeros: Vec<ValueId> = self.rights.iter().map(|_| b.full(0.0, &self.shape)).collect();
        // Columns, or scale blocks.
        let unit = if scaled { self.step } else { 1 };
        let (lo, hi): (Ix, Ix) = match self.part {
            None => (0.into(), self.k.div_ceil(unit).into()),
            Some((part, columns)) => {
                let lo = times(b, part, columns / unit);
                let hi = b.map(&[lo], |m, v| {
                    let (each, all) = (m.i32((columns / unit) as i32), m.i32(self.k.div_ceil(unit) as i32));
                    let end = m.add(v[0], each);
                    m.min(end, all)
                });
                (lo.into(), hi.into())
            }
        };
        if scaled {
            b.for_(lo, hi, 1, &zeros, |b, block, accs| self.block(b, block, accs))
        } else {
            b.for_(lo, hi, step, &zeros, |b, at, accs| self.dots(b, at.into(), step, Some(accs)))
        }
    }

    fn dots(&self, b: &mut Builder, at: Ix, step: u32, accs: Option<&[ValueId]>) -> Vec<ValueId> {
        let x = (self.left)(b, at, step);
        let mut made = Vec::new();
        for (i, right) in self.rights.iter().enumerate() {
            let (w, acc) = ((right.load)(b, at, step), accs.map(|a| a[i]));
            made.push(if self.transposed { b.dot_t(x, w, acc) } else { b.dot(x, w, acc) });
        }
        made
    }

    /// Adds the scaled products of a scale block.
    fn block(&self, b: &mut Builder, block: ValueId, accs: &[ValueId]) -> Vec<ValueId> {
        let at = times(b, block, self.step);
        let partials = self.dots(b, at.into(), self.step.min(self.k), None);
        let left = self.left_scales.map(|f| f(b, block));
        let mut made = Vec::new();
        for (i, right) in self.rights.iter().enumerate() {
            let scale = match (left, right.scales.as_ref().map(|f| f(b, block))) {
                (Some(x), Some(w)) => product(b, x, w),
                (Some(one), None) | (None, Some(one)) => one,
                (None, None) => b.full(1.0, &[]),
            };
            made.push(b.map(&[accs[i], partials[i], scale], |m, v| {
                let scaled = m.mul(v[1], v[2]);
                m.add(v[0], scaled)
            }));
        }
        made
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

/// Scales of rows `row + offset..` of a weight, `n` of them (`row` a scalar, a multiple of `n`), for one block of columns: `[1, n]` or
/// `[1, 1]`. `view` is `[row blocks, column blocks]`, `first` the row block where the matrix starts.
pub(crate) fn weight_scales(
    b: &mut Builder,
    view: ValueId,
    (row, offset, n): (ValueId, u32, u32),
    rows_of_block: u32,
    first: Option<ValueId>,
    block: ValueId,
) -> ValueId {
    let from = |b: &mut Builder, at: ValueId| match first {
        Some(first) => sum(b, at, first),
        None => at,
    };
    let row = plus(b, row, offset as i32);
    if rows_of_block.is_multiple_of(n) && offset.is_multiple_of(n) {
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
#[derive(PartialEq)]
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

/// The kernel of an [`Op::Linear`] or [`Op::LinearPartial`] node, or of a fused one.
pub fn emit(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = super::body_of(graph, node)?;
    let product = Product::of(graph, node, &fused.body, Epilogue::of(graph, node, &fused.body)?, 0)?;
    let mut e = Emit::new(graph, node, Some(&fused.body), &product.name());
    let product = product.declare(&mut e, (0, 1), schedule, class)?;
    let b = &mut e.b;
    let tile = [product.rows_axis(b), b.grid(product.n, product.tiles[1])];
    let batch = product.rows.batch.map(|s| b.grid(s, 1));
    let part = product.of.parts.map(|parts| b.grid(parts, 1));
    product.tile(b, tile, batch, part);
    let what = product.what();
    e.finish(what)
}

/// The kernel of a [`FusedKind::Beside`](dsc_ir::graph::FusedKind::Beside) node. Axis 1 of the grid counts the blocks of the first product, then those
/// of the second.
pub fn emit_beside(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = super::body_of(graph, node)?;
    let body = &fused.body;
    let product = |output: usize| {
        let Some((_, value)) = body.outputs.get(output) else {
            return Err(super::unsupported(graph, node, "less than two products side by side"));
        };
        Product::of(graph, node, body, Epilogue::none(graph, node, body, value.node)?, output as u32)
    };
    let (first, second) = (product(0)?, product(1)?);
    let name = format!("{}_beside_{}", first.name(), second.name().trim_start_matches("linear_"));
    let mut e = Emit::new(graph, node, Some(body), &name);
    let (first, second) =
        (first.declare(&mut e, (0, 1), schedule, class)?, second.declare(&mut e, (1, NARROW), schedule, class)?);
    if first.rows != second.rows || first.rows.batch.is_some() || first.tiles[0] != second.tiles[0] {
        return Err(e.unsupported("products of different rows side by side"));
    }
    let b = &mut e.b;
    let row = first.rows_axis(b);
    let [of_first, of_second] = [&first, &second].map(|p| p.blocks().iter().product::<u32>());
    let place = b.grid(of_first + of_second, 1);
    let is_first = b.map(&[place], |m, v| {
        let count = m.i32(of_first as i32);
        m.lt(v[0], count)
    });
    let arm = |b: &mut Builder, product: &Declared, place: ValueId| {
        let [across, _] = product.blocks();
        let column = if across == 1 { b.full_i32(0, &[]) } else { remainder(b, place, across) };
        let part = product.of.parts.map(|_| divided(b, place, across));
        product.tile(b, [row, column], None, part);
        Vec::new()
    };
    b.if_(
        is_first,
        |b| arm(b, &first, place),
        |b| {
            let place = plus(b, place, -(of_first as i32));
            arm(b, &second, place)
        },
    );
    let what = [first.what(), second.what()].join(" | ");
    e.finish(what)
}

/// Columns of the narrowest tiles of a product beside another: a target that multiplies by so many would run neither its own way for a narrower one.
const NARROW: u32 = 64;

/// A product of the body with what is fused with it.
struct Product {
    epilogue: Epilogue,
    x: Value,
    w: Value,
    /// Rows and columns of the weight.
    weight: [u32; 2],
    parts: Option<u32>,
    /// Elements of the activation, the weight, the result.
    types: [&'static str; 3],
}

/// A product that has parameters.
struct Declared {
    of: Product,
    rows: Rows,
    /// Columns of the result.
    n: u32,
    /// Rows and columns of a tile of it.
    tiles: [u32; 2],
    /// Contracted at a time.
    step: u32,
    /// Contracted columns of a part.
    columns: Option<u32>,
    xs: ValueId,
    ws: ValueId,
    sx: Option<ValueId>,
    /// Scales of the weight, and how many rows share one.
    sw: Option<(ValueId, u32)>,
    y: Results,
}

impl Product {
    /// The product that the epilogue is of, whose result is that output of the node.
    fn of(graph: &Graph, node: NodeId, body: &Graph, epilogue: Epilogue, output: u32) -> Result<Product, KernelError> {
        let inputs = body.inputs(epilogue.product);
        let (x, w) = (inputs[0], inputs[1]);
        let types = [body.ty(x), body.ty(w), &graph.dag[node].outputs[output as usize]].map(elem_name);
        let weight = match body.tensor(w).shape[..] {
            [n, k] => [n.factor, k.factor],
            _ => return Err(super::unsupported(graph, node, "the weight is no matrix")),
        };
        let parts = match body.dag[epilogue.product].op {
            Op::LinearPartial { parts } => Some(parts),
            _ => None,
        };
        Ok(Product { epilogue, x, w, weight, parts, types })
    }

    fn name(&self) -> String {
        let form = self.epilogue.name() + if self.parts.is_some() { "_part" } else { "" };
        let ([x, w, y], [n, k]) = (self.types, self.weight);
        format!("linear{form}_{x}_{w}_{y}_n{n}_k{k}")
    }

    /// Declares parameters; the result is that output of the node. Tiles are as the schedule says, but no wider than the result, in columns by that
    /// many.
    fn declare(
        self,
        e: &mut Emit,
        (output, grain): (u32, u32),
        schedule: &Schedule,
        class: &Class,
    ) -> Result<Declared, KernelError> {
        let (Product { epilogue, x, w, .. }, [rows_of_w, k]) = (&self, self.weight);
        let (x, w, n) = (*x, *w, epilogue.columns(rows_of_w));
        let rows = Rows::of(e, x)?;
        let mut step = k_step(e, x, w, schedule)?;
        let tm = tile(schedule.tile_m, 16, rows.rows.eval(&class.max));
        let tn = epilogue.tile_n(tile(schedule.tile_n, 64, n.next_multiple_of(grain).into()));
        let (qx, qw) = (e.quant(x), e.quant(w));
        let columns = self.parts.map(|parts| part_columns(k, parts));
        if let Some(columns) = columns {
            let plain = qx.is_none() && qw.is_none();
            step = if plain && !columns.is_multiple_of(step) { 128 } else { step };
            if !columns.is_multiple_of(step) {
                return Err(e.unsupported(format!("parts of {columns} columns in steps of {step}")));
            }
        }
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
        let shape = |columns: u32| match self.parts {
            Some(parts) => vec![rows.rows, parts.into(), columns.into()],
            None => rows.shape(columns),
        };
        let y = epilogue.write(e, output, n, &shape)?;
        Ok(Declared { of: self, rows, n, tiles: [tm, tn], step, columns, xs, ws, sx, sw, y })
    }
}

impl Declared {
    /// Adds the axis that counts tiles of rows.
    fn rows_axis(&self, b: &mut Builder) -> ValueId {
        b.grid(self.rows.rows, self.tiles[0])
    }

    /// Tiles along the columns, and parts.
    fn blocks(&self) -> [u32; 2] {
        [self.n.div_ceil(self.tiles[1]), self.of.parts.unwrap_or(1)]
    }

    /// Makes the tile with these numbers along rows and columns, of that sequence or that part of the contracted columns.
    fn tile(&self, b: &mut Builder, [m, n]: [ValueId; 2], batch: Option<ValueId>, part: Option<ValueId>) {
        let [tm, tn] = self.tiles;
        let (m0, n0) = (times(b, m, tm), times(b, n, tn));
        let at = |column: Ix| -> Vec<Ix> { batch.iter().map(|&s| s.into()).chain([m0.into(), column]).collect() };
        let load = |b: &mut Builder, view: ValueId, column: Ix, width: u32| {
            let shape: Vec<u32> = batch.iter().map(|_| 1).chain([tm, width]).collect();
            let tile = b.load(view, &at(column), &shape);
            b.reshape(tile, &[tm, width])
        };
        let left = |b: &mut Builder, kk: Ix, width: u32| load(b, self.xs, kk, width);
        let left_scales = self.sx.map(|s| move |b: &mut Builder, block: ValueId| load(b, s, block.into(), 1));
        let scales = self.sw.map(|(view, share)| (view, share, None));
        let rows = WeightRows { view: self.ws, first: [n0, n0], n: tn, scales };
        let product = Contraction {
            shape: [tm, tn],
            k: self.of.weight[1],
            step: self.step,
            part: part.zip(self.columns),
            left: &left,
            left_scales: left_scales.as_ref().map(|f| f as &LoadScales),
            rights: rows.at(&self.of.epilogue.offsets(self.n)),
            transposed: true,
        };
        let accs = product.emit(b);
        self.of.epilogue.finish(b, self.y, accs, n0, &|b, view, column, x| match part {
            Some(part) => store(b, view, &[m0.into(), part.into(), column.into()], x, 1),
            None => store(b, view, &at(column.into()), x, 0),
        });
    }

    /// For people.
    fn what(&self) -> String {
        let ([x, w, y], [n, k], rows) = (self.of.types, self.of.weight, self.rows.rows);
        let fused = self.of.epilogue.what();
        format!("linear {x} x {w}: [{rows} x {k}] · [{n} x {k}]ᵀ{fused} -> {y}")
    }
}

/// Stores an f32 matrix (or codes) as the view's element type, with axes of 1 before its axis `before` as its rank asks.
fn store(b: &mut Builder, view: ValueId, index: &[Ix], x: ValueId, before: usize) {
    let mut shape = b.shape(x);
    while shape.len() < index.len() {
        shape.insert(before, 1);
    }
    let to = b.dtype(view);
    let x = b.cast(x, to);
    let x = b.reshape(x, &shape);
    b.store(view, index, x);
}

/// The kernel of an [`Op::HeadLinear`] node, or of a fused one.
pub fn emit_heads(graph: &Graph, node: NodeId, schedule: &Schedule, class: &Class) -> Result<Emitted, KernelError> {
    let fused = super::body_of(graph, node)?;
    let body = &fused.body;
    let epilogue = Epilogue::of(graph, node, body)?;
    let Op::HeadLinear { first, count, transposed } = body.dag[epilogue.product].op else {
        return Err(super::unsupported(graph, node, "not a head_linear"));
    };
    let inputs = body.inputs(epilogue.product);
    let (x, w, out) = (inputs[0], inputs[1], Value { node: epilogue.product, output: 0 });
    let types = [body.ty(x), body.ty(w), &graph.dag[node].outputs[0]].map(elem_name);
    let form = if transposed { "t" } else { "n" };
    let name = format!("head_linear{}_{form}_{}_{}_{}_c{count}", epilogue.name(), types[0], types[1], types[2]);
    let mut e = Emit::new(graph, node, Some(body), &name);
    if e.quant(x).is_some() || e.quant(w).is_some() {
        return Err(e.unsupported("a quantised operand of head_linear; expand it to bf16 or f32"));
    }
    let (heads, k) = (e.dim(x, 1)?, e.dim(x, 2)?);
    let (rows_of_head, n) = (e.dim(w, 0)? / heads, e.dim(out, 2)?);
    let tokens = e.tensor(x).shape[0];
    let tm = tile(schedule.tile_m, 16, tokens.eval(&class.max));
    let tn = epilogue.tile_n(tile(schedule.tile_n, 64, n.into()));
    let mut step = k_step(&e, x, w, schedule)?;
    let joined = match epilogue.combine {
        Some(combine) => Some(Joined::new(&mut e, body, combine)?),
        None => None,
    };
    if let Some(joined) = &joined
        && tm > 1
    {
        step = step.min((JOINED_ELEMENTS / (tm * joined.parts)).next_power_of_two().max(32));
    }
    let xs = if joined.is_none() { Some(e.read("x", x)?) } else { None };
    let ws = e.read("w", w)?;
    let y = epilogue.write(&mut e, 0, n, &|columns| vec![tokens, heads.into(), columns.into()])?;

    let b = &mut e.b;
    let (m0, n0, head) = (b.grid(tokens, tm), b.grid(n, tn), b.grid(heads, 1));
    let (m0, n0) = (times(b, m0, tm), times(b, n0, tn));
    let row = times(b, head, rows_of_head);
    let row = plus(b, row, first as i32);
    let weights = joined.as_ref().map(|j| j.weights(b, (m0, tm), head));
    let left = |b: &mut Builder, kk: Ix, width: u32| match (&joined, weights, xs) {
        (Some(joined), Some(weights), _) => joined.load(b, (m0, tm), head, weights, kk, width),
        (_, _, Some(xs)) => {
            let tile = b.load(xs, &[m0.into(), head.into(), kk], &[tm, 1, width]);
            b.reshape(tile, &[tm, width])
        }
        _ => b.full(0.0, &[tm, width]),
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
    let product = Contraction {
        shape: [tm, tn],
        k,
        step,
        part: None,
        left: &left,
        left_scales: None,
        rights: vec![Right { load: Box::new(right), scales: None }],
        transposed,
    };
    let accs = product.emit(b);
    epilogue.finish(b, y, accs, n0, &|b, view, column, x| {
        store(b, view, &[m0.into(), head.into(), column.into()], x, 1);
    });
    let what = epilogue.what();
    e.finish(format!("head_linear: {heads} heads, [{tokens} x {k}] · [{k} x {n}]{what}, {} x {}", types[0], types[1]))
}
