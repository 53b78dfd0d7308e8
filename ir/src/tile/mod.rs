//! Tile programs: what one kernel does to tiles, with no target in it.
//!
//! A [`Program`] runs once for every block of its grid. Values are in SSA form: tiles of static shape, scalars (tiles
//! of rank 0), views of memory, and streaming top-k states. Control flow is structured ([`Op::For`], [`Op::If`]).
//!
//! Semantics that every executor shares:
//!
//! * **Bounds are part of the meaning.** A load reads zero (false) outside its view; a store outside is dropped. So ragged
//!   edges need no code in the program. Indices may be negative.
//! * Tiles of a storage type (bf16, f16, e4m3) hold exactly what memory holds; arithmetic happens in f32 and i32, after a
//!   [`ScalarOp::Cast`].
//! * Blocks of one launch may run in any order and at once: a program never reads what another block of the same launch
//!   writes.
//! * Integer arithmetic wraps. Divisors are non-zero constants.

mod build;
mod infer;
pub mod interp;
pub mod text;
pub mod verify;

pub use build::{Builder, Ix, MapBuilder, MapVal};
pub use infer::infer;
pub use text::{canonical, parse};
pub use verify::{Diagnostic, for_each_operand, operands, verify};

use crate::dtype::DType;
use crate::extent::{Extent, GridDim, Sym};
use serde::{Deserialize, Serialize};

/// One SSA value of a program; the index of its type in [`Program::types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ValueId(pub u32);

/// What a value is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// A tile of static shape; rank 0 is a scalar.
    Tile(TileType),
    /// A typed, strided window on memory.
    View(ViewType),
    /// A streaming selection of the `k` largest of each of `rows` rows.
    Topk {
        /// Independent selections.
        rows: u32,
        /// Members kept a row.
        k: u32,
    },
}

/// Element type and static shape of a tile, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TileType {
    /// Element type.
    pub dtype: DType,
    /// Elements along each axis; empty for a scalar.
    pub shape: Vec<u32>,
}

impl TileType {
    /// The type of a scalar.
    pub fn scalar(dtype: DType) -> TileType {
        TileType { dtype, shape: Vec::new() }
    }

    /// Elements in the tile.
    pub fn elements(&self) -> usize {
        self.shape.iter().map(|&n| n as usize).product()
    }
}

/// A stride in bytes: a constant, or a constant times a symbol. May be negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stride {
    /// The constant factor in bytes.
    pub bytes: i64,
    /// The symbol it is multiplied by, if any.
    pub sym: Option<Sym>,
}

/// A window on a buffer: element `[i0, i1, ..]` is at byte `offset + Σ i_d * stride_d`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ViewType {
    /// Element type in memory.
    pub dtype: DType,
    /// Size of each dim; accesses outside are masked.
    pub shape: Vec<Extent>,
    /// Distance between neighbours along each dim.
    pub strides: Vec<Stride>,
    /// Byte of element zero, from the start of the bound buffer.
    pub offset: u64,
}

impl ViewType {
    /// A dense row-major view. Only the outermost dim, and dims after the last symbolic one, may follow a symbolic dim.
    pub fn dense(dtype: DType, shape: &[Extent]) -> ViewType {
        let mut stride = Stride { bytes: dtype.bytes() as i64, sym: None };
        let mut strides = vec![stride; shape.len()];
        for d in (0..shape.len()).rev() {
            strides[d] = stride;
            stride.bytes = stride.bytes.saturating_mul(shape[d].factor.into());
            stride.sym = stride.sym.or(shape[d].sym);
        }
        ViewType { dtype, shape: shape.to_vec(), strides, offset: 0 }
    }
}

/// Whether a kernel reads or writes a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// Only read.
    Read,
    /// Only read, and written by no launch of a step: weights. It may be read before the launches before this one have ended.
    Constant,
    /// Only written.
    Write,
    /// Both, by the same block.
    ReadWrite,
}

impl Access {
    /// Whether the kernel writes it.
    pub fn writes(self) -> bool {
        matches!(self, Access::Write | Access::ReadWrite)
    }
}

/// A parameter: a view that a launch binds to a buffer. Several may be bound to one buffer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Name, for people.
    pub name: String,
    /// The SSA value of the view; its type is a [`Type::View`].
    pub value: ValueId,
    /// Direction.
    pub access: Access,
}

/// What the parameter that a view is of allows; none if it is no parameter.
pub fn access_of(params: &[Param], view: ValueId) -> Option<Access> {
    params.iter().find(|p| p.value == view).map(|p| p.access)
}

/// An index operand of a memory access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Index {
    /// Known at compile time.
    Const(i64),
    /// An i32 scalar.
    Value(ValueId),
}

/// A constant of a scalar type.
#[derive(Clone, Copy, Debug)]
pub enum Scalar {
    /// A float, of type [`DType::F32`].
    F32(f32),
    /// An integer, of type [`DType::I32`].
    I32(i32),
    /// A truth value.
    Bool(bool),
}

impl Scalar {
    /// The element type.
    pub fn dtype(self) -> DType {
        match self {
            Scalar::F32(_) => DType::F32,
            Scalar::I32(_) => DType::I32,
            Scalar::Bool(_) => DType::Bool,
        }
    }

    fn key(self) -> (DType, u32) {
        match self {
            Scalar::F32(x) => (DType::F32, x.to_bits()),
            Scalar::I32(x) => (DType::I32, x as u32),
            Scalar::Bool(x) => (DType::Bool, u32::from(x)),
        }
    }
}

/// Equality of bits, so that programs compare and hash exactly (NaN equals itself).
impl PartialEq for Scalar {
    fn eq(&self, other: &Scalar) -> bool {
        self.key() == other.key()
    }
}
impl Eq for Scalar {}
impl std::hash::Hash for Scalar {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

/// A scalar operation of a [`MapFn`]. Operand and result types: f32 unless said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScalarOp {
    /// A constant.
    Const(Scalar),
    /// `a + b`, f32 or i32.
    Add,
    /// `a - b`, f32 or i32.
    Sub,
    /// `a * b`, f32 or i32.
    Mul,
    /// `a / b`, f32; or i32 by a positive constant, rounding towards zero.
    Div,
    /// Remainder of the i32 division.
    Rem,
    /// The smaller, f32 or i32; if either is NaN the result is NaN.
    Min,
    /// The larger, f32 or i32; if either is NaN the result is NaN.
    Max,
    /// `a * b + c`, rounded once.
    Fma,
    /// `-a`, f32 or i32.
    Neg,
    /// `|a|`, f32.
    Abs,
    /// Square root.
    Sqrt,
    /// `2^a`, relative error at most 2^-22; 0 at −inf. A result below 2^-126 may be 0.
    Exp2,
    /// Bitwise and, i32; logical and, bool.
    And,
    /// Bitwise or, i32; logical or, bool.
    Or,
    /// Bitwise exclusive or, i32 and bool.
    Xor,
    /// `a << b`, i32, `b` in 0..32.
    Shl,
    /// Logical `a >> b`, i32, `b` in 0..32.
    Shr,
    /// `a < b`, f32 or i32 to bool; false if either is NaN.
    Lt,
    /// `a <= b`, f32 or i32 to bool.
    Le,
    /// `a == b`, f32 or i32 to bool.
    Eq,
    /// `a ? b : c`: bool and two of one type.
    Select,
    /// Converts to the type: rounds to nearest even, e4m3 saturates at ±448; f32 to i32 truncates and saturates.
    Cast(DType),
    /// The same 32 bits as f32 or i32.
    Bitcast(DType),
}

/// An operand inside a [`MapFn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MapArg {
    /// The element of that input tile.
    Input(u32),
    /// The result of that earlier instruction.
    Inst(u32),
}

/// One instruction of a [`MapFn`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MapInst {
    /// What it does.
    pub op: ScalarOp,
    /// Its operands, one to three ([`ScalarOp::Const`] has none).
    pub args: Vec<MapArg>,
}

/// Scalar arithmetic applied to every element: straight-line instructions and the one whose value is the result.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MapFn {
    /// Instructions in order of evaluation.
    pub insts: Vec<MapInst>,
    /// The result.
    pub result: MapArg,
}

/// How [`Op::Reduce`] and [`Op::Scan`] combine elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceKind {
    /// Sum, f32 or i32. The order of f32 additions is the executor's, but fixed.
    Sum,
    /// Maximum, f32 or i32; NaN wins.
    Max,
}

/// An operation. Result types follow from the operands: see [`infer`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// This block's coordinate on a grid axis, i32.
    BlockId {
        /// 0, 1 or 2.
        axis: u32,
    },
    /// The step's value of a symbol, i32.
    Sym(Sym),
    /// Every element the same; rank 0 gives a scalar constant.
    Full {
        /// The element.
        value: Scalar,
        /// Shape of the result.
        shape: Vec<u32>,
    },
    /// Each element is its coordinate along `axis`, i32.
    Iota {
        /// The axis counted.
        axis: u32,
        /// Shape of the result.
        shape: Vec<u32>,
    },
    /// Reads the tile that starts at `index`; zero outside the view.
    Load {
        /// A view of the rank of `index` and `shape`.
        view: ValueId,
        /// Start along each dim.
        index: Vec<Index>,
        /// Shape of the result.
        shape: Vec<u32>,
    },
    /// Writes the tile that starts at `index`; dropped outside the view.
    Store {
        /// A view of the rank of `index` and of the tile, and of its element type.
        view: ValueId,
        /// Start along each dim.
        index: Vec<Index>,
        /// The tile.
        value: ValueId,
    },
    /// Reads rows chosen by index: result row `i` is the slice at `rows[i]` of dim 0, starting at `index` in the other dims.
    /// A row outside the view (negative, say) reads zero.
    Gather {
        /// The view.
        view: ValueId,
        /// i32 tile of rank 1: coordinates in dim 0.
        rows: ValueId,
        /// Start along dims 1 and up.
        index: Vec<Index>,
        /// Shape of the result; `shape[0]` is the number of rows.
        shape: Vec<u32>,
    },
    /// Writes rows chosen by index; rows outside the view are dropped; two equal rows in a launch are not allowed.
    Scatter {
        /// The view.
        view: ValueId,
        /// i32 tile of rank 1: coordinates in dim 0.
        rows: ValueId,
        /// Start along dims 1 and up.
        index: Vec<Index>,
        /// The tile; its dim 0 is the number of rows.
        value: ValueId,
    },
    /// Elementwise arithmetic. Inputs broadcast: scalars to all, and axes of size 1 to the others' size.
    Map {
        /// Tiles of one rank, or scalars.
        inputs: Vec<ValueId>,
        /// The arithmetic.
        body: MapFn,
    },
    /// Combines along one axis, which stays with size 1.
    Reduce {
        /// The tile.
        x: ValueId,
        /// The axis.
        axis: u32,
        /// How.
        kind: ReduceKind,
    },
    /// Inclusive running combination along one axis.
    Scan {
        /// The tile.
        x: ValueId,
        /// The axis.
        axis: u32,
        /// How.
        kind: ReduceKind,
    },
    /// `acc + a · b` in f32. `a` is `[m, k]`; `b` is `[k, n]`, or `[n, k]` if `trans_b`. Operands f32, bf16, f16 or e4m3, their
    /// products exact in f32 up to rounding of the sums.
    Dot {
        /// Left operand.
        a: ValueId,
        /// Right operand.
        b: ValueId,
        /// f32 `[m, n]`, or none for zero.
        acc: Option<ValueId>,
        /// Whether `b` is given as `[n, k]`.
        trans_b: bool,
    },
    /// The same elements in row-major order under another shape.
    Reshape {
        /// The tile.
        x: ValueId,
        /// Shape of the result.
        shape: Vec<u32>,
    },
    /// Axis `i` of the result is axis `perm[i]` of `x`.
    Permute {
        /// The tile.
        x: ValueId,
        /// A permutation of the axes.
        perm: Vec<u32>,
    },
    /// A static sub-tile.
    Slice {
        /// The tile.
        x: ValueId,
        /// Start along each axis.
        offsets: Vec<u32>,
        /// Shape of the result.
        shape: Vec<u32>,
    },
    /// Tiles joined along one axis.
    Concat {
        /// The tiles, alike but for their size along `axis`.
        xs: Vec<ValueId>,
        /// The axis.
        axis: u32,
    },
    /// An empty streaming selection.
    TopkInit {
        /// Independent selections.
        rows: u32,
        /// Members kept a row.
        k: u32,
    },
    /// Offers candidates: column `j` of row `r` is candidate number `base + j` of selection `r`. −inf and NaN are never
    /// selected. Every candidate number is offered at most once, in ascending order over the pushes.
    TopkPush {
        /// The selection so far.
        state: ValueId,
        /// f32 `[rows, n]`.
        values: ValueId,
        /// i32 scalar.
        base: ValueId,
    },
    /// The selection: values f32 `[rows, k]` and candidate numbers i32 `[rows, k]`, in ascending order of number. The `k`
    /// largest values win; among equal values the lowest number. If fewer were offered, the tail is −inf and −1.
    TopkTake {
        /// The selection.
        state: ValueId,
    },
    /// Runs `body` for `lo, lo + step, ..` below `hi`. Region arguments: the i32 counter, then the carried values; its yields
    /// are the carried values of the next round; the results are the last ones.
    For {
        /// First value of the counter.
        lo: Index,
        /// Bound, exclusive.
        hi: Index,
        /// Positive.
        step: u32,
        /// Initial carried values.
        init: Vec<ValueId>,
        /// The loop's body.
        body: Region,
    },
    /// Runs one of two regions without arguments; the results are its yields.
    If {
        /// bool scalar.
        cond: ValueId,
        /// When true.
        then: Region,
        /// When false.
        otherwise: Region,
    },
}

/// One operation and the values it defines.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Inst {
    /// Values defined, as many as [`infer`] gives types.
    pub results: Vec<ValueId>,
    /// The operation.
    pub op: Op,
}

/// Instructions with arguments and yielded values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Region {
    /// Values defined on entry.
    pub args: Vec<ValueId>,
    /// Instructions in order.
    pub insts: Vec<Inst>,
    /// Values handed to the enclosing operation.
    pub yields: Vec<ValueId>,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// Name: a C identifier.
    pub name: String,
    /// Blocks along each of up to three axes.
    pub grid: Vec<GridDim>,
    /// Parameters in the order of a launch's arguments.
    pub params: Vec<Param>,
    /// The type of every value, by [`ValueId`].
    pub types: Vec<Type>,
    /// What a block does. No arguments, no yields.
    pub body: Region,
}

impl Program {
    /// The type of a value; panics on a foreign id (verify programs from outside first).
    pub fn ty(&self, v: ValueId) -> &Type {
        &self.types[v.0 as usize]
    }

    /// The tile type of a value, if it is a tile.
    pub fn tile(&self, v: ValueId) -> Option<&TileType> {
        match self.ty(v) {
            Type::Tile(t) => Some(t),
            _ => None,
        }
    }

    /// The view type of a value, if it is a view.
    pub fn view(&self, v: ValueId) -> Option<&ViewType> {
        match self.ty(v) {
            Type::View(t) => Some(t),
            _ => None,
        }
    }
}

impl std::fmt::Display for TileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.shape.is_empty() {
            return write!(f, "{}", self.dtype);
        }
        write!(f, "tile<")?;
        for n in &self.shape {
            write!(f, "{n}x")?;
        }
        write!(f, "{}>", self.dtype)
    }
}

impl std::fmt::Display for ViewType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "view<[")?;
        for (d, n) in self.shape.iter().enumerate() {
            write!(f, "{}{n}", if d == 0 { "" } else { ", " })?;
        }
        write!(f, "] {}", self.dtype)?;
        if *self != (ViewType { offset: self.offset, ..ViewType::dense(self.dtype, &self.shape) }) {
            write!(f, ", strides [")?;
            for (d, s) in self.strides.iter().enumerate() {
                write!(f, "{}{}", if d == 0 { "" } else { ", " }, s.bytes)?;
                if let Some(sym) = s.sym {
                    write!(f, "*{}", sym.name())?;
                }
            }
            write!(f, "]")?;
        }
        if self.offset != 0 {
            write!(f, ", offset {}", self.offset)?;
        }
        write!(f, ">")
    }
}

impl std::fmt::Display for Type {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Type::Tile(t) => t.fmt(f),
            Type::View(t) => t.fmt(f),
            Type::Topk { rows, k } => write!(f, "topk<{rows}x{k}>"),
        }
    }
}
