//! Writing tile programs from Rust.
//!
//! ```
//! use dsc_ir::tile::{Access, Builder};
//! use dsc_ir::{DType, Sym};
//!
//! // y = 2 x, a row of 64 a block.
//! let mut b = Builder::new("double");
//! let x = b.param("x", DType::F32, &[Sym::T.into(), 64.into()], Access::Read);
//! let y = b.param("y", DType::F32, &[Sym::T.into(), 64.into()], Access::Write);
//! let row = b.grid(Sym::T, 1);
//! let tile = b.load(x, &[row.into(), 0.into()], &[1, 64]);
//! let doubled = b.map(&[tile], |m, v| m.add(v[0], v[0]));
//! b.store(y, &[row.into(), 0.into()], doubled);
//! let program = b.finish().unwrap();
//! assert_eq!(program.params.len(), 2);
//! ```

use super::{
    Access, Index, Inst, MapArg, MapFn, MapInst, Op, Param, Program, ReduceKind, Region, Scalar, ScalarOp, Type,
    ValueId, ViewType, infer,
};
use crate::dtype::DType;
use crate::extent::{Extent, GridDim, Sym};

/// An index operand as the builder takes it: `3.into()` or a scalar value.
pub type Ix = Index;

impl From<i64> for Index {
    fn from(i: i64) -> Index {
        Index::Const(i)
    }
}
impl From<i32> for Index {
    fn from(i: i32) -> Index {
        Index::Const(i.into())
    }
}
impl From<u32> for Index {
    fn from(i: u32) -> Index {
        Index::Const(i.into())
    }
}
impl From<ValueId> for Index {
    fn from(v: ValueId) -> Index {
        Index::Value(v)
    }
}

/// Builds one program. Type errors are kept and returned by [`Builder::finish`], so that building code stays straight.
pub struct Builder {
    program: Program,
    regions: Vec<Region>,
    errors: Vec<String>,
}

impl Builder {
    /// An empty program of that name.
    pub fn new(name: &str) -> Builder {
        let program = Program {
            name: name.to_owned(),
            grid: Vec::new(),
            params: Vec::new(),
            types: Vec::new(),
            body: Region::default(),
        };
        Builder { program, regions: vec![Region::default()], errors: Vec::new() }
    }

    /// The program, or the first type errors.
    pub fn finish(mut self) -> Result<Program, String> {
        if !self.errors.is_empty() {
            return Err(format!("kernel {}: {}", self.program.name, self.errors.join("; ")));
        }
        self.program.body = self.regions.pop().unwrap_or_default();
        Ok(self.program)
    }

    /// The type of a value built so far.
    pub fn ty(&self, v: ValueId) -> &Type {
        self.program.ty(v)
    }

    /// The shape of a tile; empty for anything else.
    pub fn shape(&self, v: ValueId) -> Vec<u32> {
        self.program.tile(v).map(|t| t.shape.clone()).unwrap_or_default()
    }

    /// The element type of a tile or view; f32 for anything else.
    pub fn dtype(&self, v: ValueId) -> DType {
        match self.ty(v) {
            Type::Tile(t) => t.dtype,
            Type::View(t) => t.dtype,
            Type::Topk { .. } => DType::F32,
        }
    }

    fn value(&mut self, ty: Type) -> ValueId {
        self.program.types.push(ty);
        ValueId(self.program.types.len() as u32 - 1)
    }

    fn push(&mut self, op: Op) -> Vec<ValueId> {
        let types = infer(&op, &|v| &self.program.types[v.0 as usize]).unwrap_or_else(|e| {
            self.errors.push(e);
            let broken = super::TileType::scalar(DType::F32);
            vec![Type::Tile(broken); 2]
        });
        let results: Vec<ValueId> = types.into_iter().map(|t| self.value(t)).collect();
        let region = self.regions.last_mut().expect("the body region is open until finish");
        region.insts.push(Inst { results: results.clone(), op });
        results
    }

    fn push1(&mut self, op: Op) -> ValueId {
        self.push(op)[0]
    }

    /// Declares a dense row-major parameter.
    pub fn param(&mut self, name: &str, dtype: DType, shape: &[Extent], access: Access) -> ValueId {
        self.param_view(name, ViewType::dense(dtype, shape), access)
    }

    /// Declares a parameter with any strides.
    pub fn param_view(&mut self, name: &str, view: ViewType, access: Access) -> ValueId {
        let value = self.value(Type::View(view));
        self.program.params.push(Param { name: name.to_owned(), value, access });
        value
    }

    /// Adds a grid axis of `ceil(extent / tile)` blocks and returns this block's coordinate on it.
    pub fn grid(&mut self, extent: impl Into<Extent>, tile: u32) -> ValueId {
        self.program.grid.push(GridDim { extent: extent.into(), tile });
        let axis = self.program.grid.len() as u32 - 1;
        self.push1(Op::BlockId { axis })
    }

    /// The step's value of a symbol.
    pub fn sym(&mut self, sym: Sym) -> ValueId {
        self.push1(Op::Sym(sym))
    }

    /// A tile of one f32.
    pub fn full(&mut self, value: f32, shape: &[u32]) -> ValueId {
        self.push1(Op::Full { value: Scalar::F32(value), shape: shape.to_vec() })
    }

    /// A tile of one i32.
    pub fn full_i32(&mut self, value: i32, shape: &[u32]) -> ValueId {
        self.push1(Op::Full { value: Scalar::I32(value), shape: shape.to_vec() })
    }

    /// Coordinates along `axis`.
    pub fn iota(&mut self, axis: u32, shape: &[u32]) -> ValueId {
        self.push1(Op::Iota { axis, shape: shape.to_vec() })
    }

    /// Reads a tile.
    pub fn load(&mut self, view: ValueId, index: &[Ix], shape: &[u32]) -> ValueId {
        self.push1(Op::Load { view, index: index.to_vec(), shape: shape.to_vec() })
    }

    /// Reads one element as a scalar.
    pub fn load_scalar(&mut self, view: ValueId, index: &[Ix]) -> ValueId {
        let tile = self.load(view, index, &vec![1; index.len()]);
        self.reshape(tile, &[])
    }

    /// Writes a tile.
    pub fn store(&mut self, view: ValueId, index: &[Ix], value: ValueId) {
        self.push(Op::Store { view, index: index.to_vec(), value });
    }

    /// Reads rows by index.
    pub fn gather(&mut self, view: ValueId, rows: ValueId, index: &[Ix], shape: &[u32]) -> ValueId {
        self.push1(Op::Gather { view, rows, index: index.to_vec(), shape: shape.to_vec() })
    }

    /// Writes rows by index.
    pub fn scatter(&mut self, view: ValueId, rows: ValueId, index: &[Ix], value: ValueId) {
        self.push(Op::Scatter { view, rows, index: index.to_vec(), value });
    }

    /// Elementwise arithmetic; `body` gets a [`MapBuilder`] and one [`MapVal`] an input.
    pub fn map(&mut self, inputs: &[ValueId], body: impl FnOnce(&mut MapBuilder, &[MapVal]) -> MapVal) -> ValueId {
        let mut m = MapBuilder { insts: Vec::new() };
        let args: Vec<MapVal> = (0..inputs.len() as u32).map(|i| MapVal(MapArg::Input(i))).collect();
        let result = body(&mut m, &args).0;
        self.push1(Op::Map { inputs: inputs.to_vec(), body: MapFn { insts: m.insts, result } })
    }

    /// Converts every element.
    pub fn cast(&mut self, x: ValueId, to: DType) -> ValueId {
        if self.dtype(x) == to {
            return x;
        }
        self.map(&[x], |m, v| m.cast(v[0], to))
    }

    /// Combines along `axis`, which stays with size 1.
    pub fn reduce(&mut self, x: ValueId, axis: u32, kind: ReduceKind) -> ValueId {
        self.push1(Op::Reduce { x, axis, kind })
    }

    /// Inclusive running combination.
    pub fn scan(&mut self, x: ValueId, axis: u32, kind: ReduceKind) -> ValueId {
        self.push1(Op::Scan { x, axis, kind })
    }

    /// `acc + a · bᵀ` for `b` given as `[n, k]`.
    pub fn dot_t(&mut self, a: ValueId, b: ValueId, acc: Option<ValueId>) -> ValueId {
        self.push1(Op::Dot { a, b, acc, trans_b: true })
    }

    /// `acc + a · b` for `b` given as `[k, n]`.
    pub fn dot(&mut self, a: ValueId, b: ValueId, acc: Option<ValueId>) -> ValueId {
        self.push1(Op::Dot { a, b, acc, trans_b: false })
    }

    /// Another shape for the same elements.
    pub fn reshape(&mut self, x: ValueId, shape: &[u32]) -> ValueId {
        if self.program.tile(x).is_some_and(|t| t.shape == shape) {
            return x;
        }
        self.push1(Op::Reshape { x, shape: shape.to_vec() })
    }

    /// Reorders axes.
    pub fn permute(&mut self, x: ValueId, perm: &[u32]) -> ValueId {
        self.push1(Op::Permute { x, perm: perm.to_vec() })
    }

    /// A static sub-tile.
    pub fn slice(&mut self, x: ValueId, offsets: &[u32], shape: &[u32]) -> ValueId {
        self.push1(Op::Slice { x, offsets: offsets.to_vec(), shape: shape.to_vec() })
    }

    /// Joins tiles along `axis`.
    pub fn concat(&mut self, xs: &[ValueId], axis: u32) -> ValueId {
        self.push1(Op::Concat { xs: xs.to_vec(), axis })
    }

    /// An empty selection.
    pub fn topk_init(&mut self, rows: u32, k: u32) -> ValueId {
        self.push1(Op::TopkInit { rows, k })
    }

    /// Offers candidates.
    pub fn topk_push(&mut self, state: ValueId, values: ValueId, base: ValueId) -> ValueId {
        self.push1(Op::TopkPush { state, values, base })
    }

    /// Values and candidate numbers selected.
    pub fn topk_take(&mut self, state: ValueId) -> (ValueId, ValueId) {
        let r = self.push(Op::TopkTake { state });
        (r[0], r[1])
    }

    /// A counted loop with carried values; `body` gets the counter and the carried values and returns their next values.
    pub fn for_(
        &mut self,
        lo: impl Into<Ix>,
        hi: impl Into<Ix>,
        step: u32,
        init: &[ValueId],
        body: impl FnOnce(&mut Builder, ValueId, &[ValueId]) -> Vec<ValueId>,
    ) -> Vec<ValueId> {
        let counter = self.value(Type::Tile(super::TileType::scalar(DType::I32)));
        let mut args = vec![counter];
        for &v in init {
            let ty = self.ty(v).clone();
            args.push(self.value(ty));
        }
        self.regions.push(Region { args: args.clone(), ..Region::default() });
        let yields = body(self, counter, &args[1..]);
        let body = self.close(yields);
        self.push(Op::For { lo: lo.into(), hi: hi.into(), step, init: init.to_vec(), body })
    }

    /// Two-way branch; both arms return the same types.
    pub fn if_(
        &mut self,
        cond: ValueId,
        then: impl FnOnce(&mut Builder) -> Vec<ValueId>,
        otherwise: impl FnOnce(&mut Builder) -> Vec<ValueId>,
    ) -> Vec<ValueId> {
        self.regions.push(Region::default());
        let yields = then(self);
        let then = self.close(yields);
        self.regions.push(Region::default());
        let yields = otherwise(self);
        let otherwise = self.close(yields);
        self.push(Op::If { cond, then, otherwise })
    }

    /// Begins what happens only under a condition, and gives nothing: up to [`Builder::end_when`].
    pub fn begin_when(&mut self) {
        self.regions.push(Region::default());
    }

    /// Ends what happens only where `cond` holds.
    pub fn end_when(&mut self, cond: ValueId) {
        let then = self.close(Vec::new());
        self.push(Op::If { cond, then, otherwise: Region::default() });
    }

    /// Begins a counted loop that carries nothing, up to [`Builder::end_for`]; gives the counter.
    pub fn begin_for(&mut self) -> ValueId {
        let counter = self.value(Type::Tile(super::TileType::scalar(DType::I32)));
        self.regions.push(Region { args: vec![counter], ..Region::default() });
        counter
    }

    /// Ends what [`Builder::begin_for`] began.
    pub fn end_for(&mut self, lo: impl Into<Ix>, hi: impl Into<Ix>, step: u32) {
        let body = self.close(Vec::new());
        self.push(Op::For { lo: lo.into(), hi: hi.into(), step, init: Vec::new(), body });
    }

    fn close(&mut self, yields: Vec<ValueId>) -> Region {
        let mut region = self.regions.pop().expect("opened by the caller");
        region.yields = yields;
        region
    }
}

/// A value inside a map's body.
#[derive(Clone, Copy, Debug)]
pub struct MapVal(MapArg);

/// Writes a map's body.
pub struct MapBuilder {
    insts: Vec<MapInst>,
}

impl MapBuilder {
    fn push(&mut self, op: ScalarOp, args: &[MapVal]) -> MapVal {
        self.insts.push(MapInst { op, args: args.iter().map(|a| a.0).collect() });
        MapVal(MapArg::Inst(self.insts.len() as u32 - 1))
    }

    /// An f32 constant.
    pub fn f32(&mut self, x: f32) -> MapVal {
        self.push(ScalarOp::Const(Scalar::F32(x)), &[])
    }
    /// An i32 constant.
    pub fn i32(&mut self, x: i32) -> MapVal {
        self.push(ScalarOp::Const(Scalar::I32(x)), &[])
    }
    /// `a + b`.
    pub fn add(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Add, &[a, b])
    }
    /// `a - b`.
    pub fn sub(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Sub, &[a, b])
    }
    /// `a * b`.
    pub fn mul(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Mul, &[a, b])
    }
    /// `a / b`.
    pub fn div(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Div, &[a, b])
    }
    /// i32 remainder.
    pub fn rem(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Rem, &[a, b])
    }
    /// The smaller.
    pub fn min(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Min, &[a, b])
    }
    /// The larger.
    pub fn max(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Max, &[a, b])
    }
    /// `a * b + c`, rounded once.
    pub fn fma(&mut self, a: MapVal, b: MapVal, c: MapVal) -> MapVal {
        self.push(ScalarOp::Fma, &[a, b, c])
    }
    /// `-a`.
    pub fn neg(&mut self, a: MapVal) -> MapVal {
        self.push(ScalarOp::Neg, &[a])
    }
    /// `|a|`.
    pub fn abs(&mut self, a: MapVal) -> MapVal {
        self.push(ScalarOp::Abs, &[a])
    }
    /// Square root.
    pub fn sqrt(&mut self, a: MapVal) -> MapVal {
        self.push(ScalarOp::Sqrt, &[a])
    }
    /// `2^a`.
    pub fn exp2(&mut self, a: MapVal) -> MapVal {
        self.push(ScalarOp::Exp2, &[a])
    }
    /// Bitwise or logical and.
    pub fn and(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::And, &[a, b])
    }
    /// Bitwise or logical or.
    pub fn or(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Or, &[a, b])
    }
    /// Bitwise or logical exclusive or.
    pub fn xor(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Xor, &[a, b])
    }
    /// Left shift.
    pub fn shl(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Shl, &[a, b])
    }
    /// Logical right shift.
    pub fn shr(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Shr, &[a, b])
    }
    /// `a < b`.
    pub fn lt(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Lt, &[a, b])
    }
    /// `a <= b`.
    pub fn le(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Le, &[a, b])
    }
    /// `a == b`.
    pub fn eq(&mut self, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Eq, &[a, b])
    }
    /// `c ? a : b`.
    pub fn select(&mut self, c: MapVal, a: MapVal, b: MapVal) -> MapVal {
        self.push(ScalarOp::Select, &[c, a, b])
    }
    /// Conversion.
    pub fn cast(&mut self, a: MapVal, to: DType) -> MapVal {
        self.push(ScalarOp::Cast(to), &[a])
    }
    /// Reinterpretation of the bits.
    pub fn bitcast(&mut self, a: MapVal, to: DType) -> MapVal {
        self.push(ScalarOp::Bitcast(to), &[a])
    }
    /// `1 / (1 + e^-a)`.
    pub fn sigmoid(&mut self, a: MapVal) -> MapVal {
        let minus_log2e = self.f32(-std::f32::consts::LOG2_E);
        let scaled = self.mul(a, minus_log2e);
        let e = self.exp2(scaled);
        let one = self.f32(1.0);
        let denominator = self.add(one, e);
        self.div(one, denominator)
    }
    /// The smallest power of two that is at least `a`, for positive normal `a`.
    pub fn pow2_ceil(&mut self, a: MapVal) -> MapVal {
        let bits = self.bitcast(a, DType::I32);
        let round = self.i32(0x7f_ffff);
        let up = self.add(bits, round);
        let mask = self.i32(0x7f80_0000);
        let power = self.and(up, mask);
        self.bitcast(power, DType::F32)
    }
    /// `1 / a`, exactly, of a power of two that is normal, as its reciprocal is; 0 of infinity.
    pub fn pow2_reciprocal(&mut self, a: MapVal) -> MapVal {
        let bits = self.bitcast(a, DType::I32);
        // Exponents of a power of two and of its reciprocal add up to those of one twice.
        let both = self.i32(0x7f00_0000);
        let rest = self.sub(both, bits);
        let zero = self.i32(0);
        let rest = self.max(rest, zero);
        self.bitcast(rest, DType::F32)
    }
}
