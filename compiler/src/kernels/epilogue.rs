//! Fused product bodies: what a matrix product's kernel does before its first and after its last multiplication.
//!
//! ```text
//! [mqa_combine] product [swiglu of its halves] [quantize]
//! ```
//!
//! * **SwiGLU**: the product's rows of the weight are gate and up, one after the other. A block computes the same columns of
//!   both, so `silu(gate) · up` needs nothing from another block.
//! * **Quantisation**: a block's columns are whole scale blocks, so it quantises what it has.
//! * **Combine**: the left operand is the sum of an attention's parts, weighted; each tile of it is made as it is loaded:
//!   `x = Σ_p 2^(largest_p − largest) · sums_p / total`. A block reads its rows of the parts once.
//!
//! Every op rounds to its declared type on the way, as it would in a kernel of its own.

use super::arithmetic::quantize;
use super::view::{Emit, divided, product};
use super::{KernelError, Part, unsupported};
use dsc_ir::graph::{Elem, Graph, NodeId, Op, Quant, Value};
use dsc_ir::tile::{Builder, Ix, ReduceKind, ValueId};
use dsc_ir::{DType, Extent};

/// Elements of the parts that one step of a combining product of several rows has on chip.
pub(crate) const JOINED_ELEMENTS: u32 = 8192;

/// A product and what is fused with it.
pub(crate) struct Epilogue {
    /// The product, in the body.
    pub product: NodeId,
    /// The combination that makes its left operand.
    pub combine: Option<NodeId>,
    /// Element type of the product's result.
    rounds: DType,
    /// Element type of SwiGLU's result, if there is one.
    glu: Option<DType>,
    quant: Option<Quant>,
}

/// Where results go: elements or codes, scales.
#[derive(Clone, Copy)]
pub(crate) struct Results {
    data: ValueId,
    scales: Option<ValueId>,
}

/// Stores a tile in a view, from a column.
pub(crate) type Put<'a> = dyn Fn(&mut Builder, ValueId, ValueId, ValueId) + 'a;

impl Epilogue {
    /// Reads the body of a node that is a product, or fused around one.
    pub fn of(graph: &Graph, node: NodeId, body: &Graph) -> Result<Epilogue, KernelError> {
        let (mut product, mut combine, mut glu, mut quant, mut other) = (None, None, None, None, None);
        let plain = |n: NodeId| match body.tensor(Value { node: n, output: 0 }).elem {
            Elem::Plain(dtype) => Ok(dtype),
            Elem::Quant(_) => Err(unsupported(graph, node, "a quantised result of an op that does not quantise")),
        };
        for n in body.order() {
            match body.dag[n].op {
                Op::Linear | Op::LinearPartial { .. } | Op::HeadLinear { .. } | Op::ExpertLinear { .. }
                    if product.is_none() =>
                {
                    product = Some(n);
                }
                Op::MqaCombine => combine = Some(n),
                Op::SwiGlu => glu = Some(plain(n)?),
                Op::Quantize => match body.tensor(Value { node: n, output: 0 }).elem {
                    Elem::Quant(q) if q.block[0] == 1 => quant = Some(q),
                    elem => return Err(unsupported(graph, node, format!("quantize to {elem:?}"))),
                },
                Op::Arg(_) | Op::SliceLast { .. } | Op::Reshape => {}
                _ => other = Some(n),
            }
        }
        match (product, other) {
            (Some(product), None) => Ok(Epilogue { product, combine, rounds: plain(product)?, glu, quant }),
            (_, Some(n)) => Err(unsupported(graph, node, format!("{} in a product", super::op_name(&body.dag[n].op)))),
            (None, _) => Err(unsupported(graph, node, "a product body without a product")),
        }
    }

    /// A product of the body that nothing is fused with.
    pub fn none(graph: &Graph, node: NodeId, body: &Graph, product: NodeId) -> Result<Epilogue, KernelError> {
        match body.tensor(Value { node: product, output: 0 }).elem {
            Elem::Plain(rounds) => Ok(Epilogue { product, combine: None, rounds, glu: None, quant: None }),
            Elem::Quant(_) => Err(unsupported(graph, node, "a quantised result of an op that does not quantise")),
        }
    }

    /// Columns of the result for that many rows of the weight.
    pub fn columns(&self, rows: u32) -> u32 {
        if self.glu.is_some() { rows / 2 } else { rows }
    }

    /// Where, after a tile's first row of the weight, the rows of each accumulator start; `n` columns in the result.
    pub fn offsets(&self, n: u32) -> Vec<u32> {
        if self.glu.is_some() { vec![0, n] } else { vec![0] }
    }

    /// Columns of a block: whole scale blocks.
    pub fn tile_n(&self, wanted: u32) -> u32 {
        self.quant.map_or(wanted, |q| wanted.next_multiple_of(q.block[1]))
    }

    /// For program names.
    pub fn name(&self) -> String {
        let parts =
            [(self.combine.is_some(), "_combine"), (self.glu.is_some(), "_swiglu"), (self.quant.is_some(), "_quant")];
        parts.iter().filter(|p| p.0).map(|p| p.1).collect()
    }

    /// For people.
    pub fn what(&self) -> String {
        self.name().replace('_', ", ")
    }

    /// Parameters for `n` columns of results, an output of the node; `shape` gives the shape of the result for that many columns.
    pub fn write(
        &self,
        e: &mut Emit,
        output: u32,
        n: u32,
        shape: &dyn Fn(u32) -> Vec<Extent>,
    ) -> Result<Results, KernelError> {
        let data = e.write("y", output, Part::Data, Some(&shape(n)))?;
        let scales = match self.quant {
            Some(q) => Some(e.write("y_scales", output, Part::Scales, Some(&shape(n.div_ceil(q.block[1]))))?),
            None => None,
        };
        Ok(Results { data, scales })
    }

    /// Makes results of the f32 accumulators and stores them from column `n0`.
    pub fn finish(&self, b: &mut Builder, to: Results, accs: Vec<ValueId>, n0: ValueId, put: &Put) {
        let mut x = accs[0];
        if let (Some(act), &[gate, up]) = (self.glu, accs.as_slice()) {
            let (gate, up) = (rounded(b, gate, self.rounds), rounded(b, up, self.rounds));
            x = b.map(&[gate, up], |m, v| {
                let s = m.sigmoid(v[0]);
                let silu = m.mul(v[0], s);
                m.mul(silu, v[1])
            });
            if self.quant.is_some() {
                x = rounded(b, x, act);
            }
        } else if self.quant.is_some() {
            x = rounded(b, x, self.rounds);
        }
        let (Some(quant), Some(scales_to)) = (self.quant, to.scales) else { return put(b, to.data, n0, x) };
        let (codes, scales) = quantize(b, x, quant.block[1], quant.pow2);
        put(b, to.data, n0, codes);
        let column = divided(b, n0, quant.block[1]);
        put(b, scales_to, column, scales);
    }
}

/// An f32 tile as `dtype` holds it, in f32.
fn rounded(b: &mut Builder, x: ValueId, dtype: DType) -> ValueId {
    let narrow = b.cast(x, dtype);
    b.cast(narrow, DType::F32)
}

/// The parts of an attention that are joined as they are loaded.
pub(crate) struct Joined {
    sums: ValueId,
    largest: ValueId,
    totals: ValueId,
    /// Parts.
    pub parts: u32,
    dtype: DType,
}

impl Joined {
    /// Declares the parameters.
    pub fn new(e: &mut Emit, body: &Graph, combine: NodeId) -> Result<Joined, KernelError> {
        let &[sums, largest, totals] = body.inputs(combine).as_slice() else {
            return Err(e.unsupported("mqa_combine without its three inputs"));
        };
        let Elem::Plain(dtype) = body.tensor(Value { node: combine, output: 0 }).elem else {
            return Err(e.unsupported("a quantised combination"));
        };
        Ok(Joined {
            parts: e.dim(sums, 2)?,
            sums: e.read("sums", sums)?,
            largest: e.read("largest", largest)?,
            totals: e.read("totals", totals)?,
            dtype,
        })
    }

    /// f32 `[m, parts, 1]`: what each part of the rows from `m0` counts.
    pub fn weights(&self, b: &mut Builder, (m0, m): (ValueId, u32), head: ValueId) -> ValueId {
        let load = |b: &mut Builder, view: ValueId| {
            let tile = b.load(view, &[m0.into(), head.into(), 0.into()], &[m, 1, self.parts]);
            b.reshape(tile, &[m, self.parts])
        };
        let (largest, totals) = (load(b, self.largest), load(b, self.totals));
        let most = b.reduce(largest, 1, ReduceKind::Max);
        let weights = b.map(&[largest, most], |m, v| {
            let d = m.sub(v[0], v[1]);
            m.exp2(d)
        });
        let total = product(b, weights, totals);
        let total = b.reduce(total, 1, ReduceKind::Sum);
        let weights = super::softmax::normalized(b, total, weights);
        b.reshape(weights, &[m, self.parts, 1])
    }

    /// `[m, width]` of the joined rows, from a column.
    pub fn load(
        &self,
        b: &mut Builder,
        (m0, m): (ValueId, u32),
        head: ValueId,
        weights: ValueId,
        column: Ix,
        width: u32,
    ) -> ValueId {
        let sums = b.load(self.sums, &[m0.into(), head.into(), 0.into(), column], &[m, 1, self.parts, width]);
        let sums = b.reshape(sums, &[m, self.parts, width]);
        let weighted = product(b, sums, weights);
        let x = b.reduce(weighted, 1, ReduceKind::Sum);
        let x = b.reshape(x, &[m, width]);
        b.cast(x, self.dtype)
    }
}
