//! The types of an operation's results, and every rule on its operands' types.

use super::{Index, MapArg, MapFn, Op, ScalarOp, TileType, Type, ValueId, ViewType};
use crate::dtype::DType;

/// Largest rank of a tile or view.
pub const MAX_RANK: usize = 6;
/// Most elements a tile may have.
pub const MAX_ELEMENTS: u64 = 1 << 26;

/// The result types of `op`, where `ty` gives the types of its operands; or what is wrong with them.
///
/// For [`Op::For`] and [`Op::If`] the results are checked against the regions' yields by the verifier; here the former takes
/// its types from `init` and the latter from `then`.
pub fn infer<'a>(op: &Op, ty: &dyn Fn(ValueId) -> &'a Type) -> Result<Vec<Type>, String> {
    let cx = Cx { ty };
    let one = |dtype, shape: &[u32]| checked_tile(dtype, shape).map(|t| vec![t]);
    match op {
        Op::BlockId { axis } => {
            if *axis > 2 {
                return Err(format!("a grid has axes 0 to 2, not {axis}"));
            }
            one(DType::I32, &[])
        }
        Op::Sym(_) => one(DType::I32, &[]),
        Op::Full { value, shape } => one(value.dtype(), shape),
        Op::Iota { axis, shape } => {
            cx.axis(*axis, shape)?;
            one(DType::I32, shape)
        }
        Op::Load { view, index, shape } => {
            let view = cx.view(*view)?;
            cx.access(view, index, 0, shape)?;
            one(view.dtype, shape)
        }
        Op::Store { view, index, value } => {
            let (view, tile) = (cx.view(*view)?, cx.tile(*value)?);
            cx.access(view, index, 0, &tile.shape)?;
            cx.same_dtype(view, tile)?;
            Ok(vec![])
        }
        Op::Gather { view, rows, index, shape } => {
            let view = cx.view(*view)?;
            cx.rows(*rows, shape)?;
            cx.access(view, index, 1, shape)?;
            one(view.dtype, shape)
        }
        Op::Scatter { view, rows, index, value } => {
            let (view, tile) = (cx.view(*view)?, cx.tile(*value)?);
            cx.rows(*rows, &tile.shape)?;
            cx.access(view, index, 1, &tile.shape)?;
            cx.same_dtype(view, tile)?;
            Ok(vec![])
        }
        Op::Map { inputs, body } => {
            let tiles = inputs.iter().map(|&v| cx.tile(v)).collect::<Result<Vec<_>, _>>()?;
            let shape = broadcast(&tiles)?;
            let dtypes: Vec<DType> = tiles.iter().map(|t| t.dtype).collect();
            one(map_dtype(body, &dtypes)?, &shape)
        }
        Op::Reduce { x, axis, .. } => {
            let x = cx.number(*x)?;
            cx.axis(*axis, &x.shape)?;
            let mut shape = x.shape.clone();
            shape[*axis as usize] = 1;
            one(x.dtype, &shape)
        }
        Op::Scan { x, axis, .. } => {
            let x = cx.number(*x)?;
            cx.axis(*axis, &x.shape)?;
            one(x.dtype, &x.shape)
        }
        Op::Dot { a, b, acc, trans_b } => {
            let (a, b) = (cx.tile(*a)?, cx.tile(*b)?);
            if a.shape.len() != 2 || b.shape.len() != 2 || !a.dtype.is_float() || !b.dtype.is_float() {
                return Err(format!("dot takes two float matrices, not {a} and {b}"));
            }
            let (k, n) = if *trans_b { (b.shape[1], b.shape[0]) } else { (b.shape[0], b.shape[1]) };
            if a.shape[1] != k {
                return Err(format!("dot contracts {} columns of {a} with {k} of {b}", a.shape[1]));
            }
            let shape = [a.shape[0], n];
            if let Some(acc) = acc {
                let acc = cx.tile(*acc)?;
                if acc.dtype != DType::F32 || acc.shape != shape {
                    return Err(format!("dot accumulates into f32 {shape:?}, not {acc}"));
                }
            }
            one(DType::F32, &shape)
        }
        Op::Reshape { x, shape } => {
            let x = cx.tile(*x)?;
            if x.elements() as u64 != shape.iter().fold(1u64, |n, &d| n.saturating_mul(d.into())) {
                return Err(format!("cannot reshape {x} to {shape:?}"));
            }
            one(x.dtype, shape)
        }
        Op::Permute { x, perm } => {
            let x = cx.tile(*x)?;
            let mut sorted = perm.clone();
            sorted.sort_unstable();
            if sorted != (0..x.shape.len() as u32).collect::<Vec<_>>() {
                return Err(format!("{perm:?} is no permutation of the axes of {x}"));
            }
            let shape: Vec<u32> = perm.iter().map(|&p| x.shape[p as usize]).collect();
            one(x.dtype, &shape)
        }
        Op::Slice { x, offsets, shape } => {
            let x = cx.tile(*x)?;
            let fits = |d: usize| offsets[d].checked_add(shape[d]).is_some_and(|end| end <= x.shape[d]);
            if offsets.len() != x.shape.len() || shape.len() != x.shape.len() || !(0..shape.len()).all(fits) {
                return Err(format!("slice {offsets:?} + {shape:?} leaves {x}"));
            }
            one(x.dtype, shape)
        }
        Op::Concat { xs, axis } => {
            let Some(&first) = xs.first() else { return Err("concat of nothing".into()) };
            let first = cx.tile(first)?;
            cx.axis(*axis, &first.shape)?;
            let axis = *axis as usize;
            let mut shape = first.shape.clone();
            for &x in &xs[1..] {
                let x = cx.tile(x)?;
                let alike = x.shape.len() == shape.len()
                    && x.dtype == first.dtype
                    && (0..shape.len()).all(|d| d == axis || x.shape[d] == shape[d]);
                if !alike {
                    return Err(format!("cannot concat {x} to {first} along axis {axis}"));
                }
                shape[axis] = shape[axis].saturating_add(x.shape[axis]);
            }
            one(first.dtype, &shape)
        }
        Op::TopkInit { rows, k } => {
            if *rows == 0 || *k == 0 || u64::from(*rows) * u64::from(*k) > MAX_ELEMENTS {
                return Err(format!("top-k of {rows} rows and {k} members"));
            }
            Ok(vec![Type::Topk { rows: *rows, k: *k }])
        }
        Op::TopkPush { state, values, base } => {
            let (rows, k) = cx.topk(*state)?;
            let values = cx.tile(*values)?;
            if values.dtype != DType::F32 || values.shape.len() != 2 || values.shape[0] != rows {
                return Err(format!("top-k of {rows} rows takes f32 [{rows}, n], not {values}"));
            }
            cx.scalar(*base, DType::I32)?;
            Ok(vec![Type::Topk { rows, k }])
        }
        Op::TopkTake { state } => {
            let (rows, k) = cx.topk(*state)?;
            Ok(vec![checked_tile(DType::F32, &[rows, k])?, checked_tile(DType::I32, &[rows, k])?])
        }
        Op::For { lo, hi, step, init, .. } => {
            cx.index(lo)?;
            cx.index(hi)?;
            if *step == 0 {
                return Err("a loop's step is positive".into());
            }
            Ok(init.iter().map(|&v| (cx.ty)(v).clone()).collect())
        }
        Op::If { cond, then, .. } => {
            cx.scalar(*cond, DType::Bool)?;
            Ok(then.yields.iter().map(|&v| (cx.ty)(v).clone()).collect())
        }
    }
}

fn checked_tile(dtype: DType, shape: &[u32]) -> Result<Type, String> {
    let tile = TileType { dtype, shape: shape.to_vec() };
    let mut elements = 1u64;
    for &n in shape {
        elements = elements.saturating_mul(u64::from(n));
    }
    if shape.len() > MAX_RANK || elements == 0 || elements > MAX_ELEMENTS {
        return Err(format!("{tile}: a tile has rank 0 to {MAX_RANK} and 1 to {MAX_ELEMENTS} elements"));
    }
    Ok(Type::Tile(tile))
}

/// The common shape of a map's inputs.
fn broadcast(tiles: &[&TileType]) -> Result<Vec<u32>, String> {
    let rank = tiles.iter().map(|t| t.shape.len()).max().unwrap_or(0);
    let mut shape = vec![1; rank];
    for t in tiles.iter().filter(|t| !t.shape.is_empty()) {
        for (d, out) in shape.iter_mut().enumerate() {
            match t.shape.get(d) {
                Some(&n) if t.shape.len() == rank && (n == *out || n == 1 || *out == 1) => *out = (*out).max(n),
                _ => return Err(format!("{t} does not broadcast with {}", tiles[0])),
            }
        }
    }
    Ok(shape)
}

/// The type of every instruction of a map's body; the last entry is the type of its result.
pub(crate) fn map_types(body: &MapFn, inputs: &[DType]) -> Result<Vec<DType>, String> {
    let mut types: Vec<DType> = Vec::new();
    let arg_type = |types: &[DType], a: MapArg| match a {
        MapArg::Input(i) => inputs.get(i as usize).copied().ok_or(format!("map has no input {i}")),
        MapArg::Inst(i) => types.get(i as usize).copied().ok_or(format!("map instruction {i} is not defined here")),
    };
    for inst in &body.insts {
        let args = inst.args.iter().map(|&a| arg_type(&types, a)).collect::<Result<Vec<_>, _>>()?;
        types.push(scalar_type(inst.op, &args).ok_or_else(|| format!("{:?} does not take {args:?}", inst.op))?);
        if matches!(inst.op, ScalarOp::Div | ScalarOp::Rem) && args[0] == DType::I32 && !divisor_ok(body, inst.args[1])
        {
            return Err("an i32 divisor is a positive constant".into());
        }
    }
    types.push(arg_type(&types, body.result)?);
    Ok(types)
}

fn map_dtype(body: &MapFn, inputs: &[DType]) -> Result<DType, String> {
    Ok(*map_types(body, inputs)?.last().expect("map_types gives the result last"))
}

fn divisor_ok(body: &MapFn, arg: MapArg) -> bool {
    let MapArg::Inst(i) = arg else { return false };
    matches!(body.insts[i as usize].op, ScalarOp::Const(super::Scalar::I32(c)) if c > 0)
}

fn scalar_type(op: ScalarOp, args: &[DType]) -> Option<DType> {
    use DType::{Bool, F32, I32};
    use ScalarOp::*;
    let number = |d: DType| d == F32 || d == I32;
    match (op, args) {
        (Const(c), []) => Some(c.dtype()),
        (Add | Sub | Mul | Div | Min | Max, [a, b]) if a == b && number(*a) => Some(*a),
        (Rem | Shl | Shr, [I32, I32]) => Some(I32),
        (Fma, [F32, F32, F32]) => Some(F32),
        (Neg, [a]) if number(*a) => Some(*a),
        (Abs | Sqrt | Exp2, [F32]) => Some(F32),
        (And | Or | Xor, [a, b]) if a == b && (*a == I32 || *a == Bool) => Some(*a),
        (Lt | Le | Eq, [a, b]) if a == b && number(*a) => Some(Bool),
        (Select, [Bool, a, b]) if a == b => Some(*a),
        (Cast(to), [from]) => {
            (from.is_float() || to.is_float() || *from == to).then_some(to).filter(|_| cast_ok(*from, to))
        }
        (Bitcast(to), [from]) if number(*from) && number(to) => Some(to),
        _ => None,
    }
}

/// Casts go between f32 and every other type; storage types do not convert to each other directly.
fn cast_ok(from: DType, to: DType) -> bool {
    from == to || from == DType::F32 || (to == DType::F32 && from != DType::Bool)
}

struct Cx<'a, 'f> {
    ty: &'f dyn Fn(ValueId) -> &'a Type,
}

impl<'a> Cx<'a, '_> {
    fn tile(&self, v: ValueId) -> Result<&'a TileType, String> {
        match (self.ty)(v) {
            Type::Tile(t) => Ok(t),
            other => Err(format!("expected a tile, found {other}")),
        }
    }

    fn number(&self, v: ValueId) -> Result<&'a TileType, String> {
        let t = self.tile(v)?;
        if t.dtype == DType::F32 || t.dtype == DType::I32 {
            Ok(t)
        } else {
            Err(format!("expected f32 or i32, found {t}"))
        }
    }

    fn view(&self, v: ValueId) -> Result<&'a ViewType, String> {
        match (self.ty)(v) {
            Type::View(t) => Ok(t),
            other => Err(format!("expected a view, found {other}")),
        }
    }

    fn topk(&self, v: ValueId) -> Result<(u32, u32), String> {
        match (self.ty)(v) {
            Type::Topk { rows, k } => Ok((*rows, *k)),
            other => Err(format!("expected a top-k state, found {other}")),
        }
    }

    fn scalar(&self, v: ValueId, dtype: DType) -> Result<(), String> {
        let t = self.tile(v)?;
        if t.shape.is_empty() && t.dtype == dtype {
            Ok(())
        } else {
            Err(format!("expected a scalar {dtype}, found {t}"))
        }
    }

    fn index(&self, index: &Index) -> Result<(), String> {
        match index {
            Index::Const(_) => Ok(()),
            Index::Value(v) => self.scalar(*v, DType::I32),
        }
    }

    fn axis(&self, axis: u32, shape: &[u32]) -> Result<(), String> {
        if (axis as usize) < shape.len() { Ok(()) } else { Err(format!("{shape:?} has no axis {axis}")) }
    }

    fn rows(&self, rows: ValueId, shape: &[u32]) -> Result<(), String> {
        let t = self.tile(rows)?;
        if t.dtype == DType::I32 && t.shape.len() == 1 && shape.first() == Some(&t.shape[0]) {
            Ok(())
        } else {
            Err(format!("rows {t} do not index a tile of shape {shape:?}"))
        }
    }

    /// `leading` dims are indexed by other means.
    fn access(&self, view: &ViewType, index: &[Index], leading: usize, shape: &[u32]) -> Result<(), String> {
        for i in index {
            self.index(i)?;
        }
        if index.len() + leading == view.shape.len() && shape.len() == view.shape.len() {
            Ok(())
        } else {
            Err(format!("{view} is accessed with {} indices for a tile of rank {}", index.len() + leading, shape.len()))
        }
    }

    fn same_dtype(&self, view: &ViewType, tile: &TileType) -> Result<(), String> {
        if view.dtype == tile.dtype { Ok(()) } else { Err(format!("{tile} stored to {view}")) }
    }
}
