//! The values of a schedule in the making, and instructions of the program under their names: what every plan is built with.

use dsc_ir::DType;
use dsc_ir::sched::{Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, MapArg, MapFn, MapInst, Program, Scalar, ScalarOp, TileType, Type, ValueId};
use std::collections::{HashMap, HashSet};

/// Values of the schedule by those of the program.
pub type Names = HashMap<ValueId, ValueId>;

/// Values of a schedule.
pub struct Values<'a> {
    program: &'a Program,
    /// Their types.
    pub types: Vec<Type>,
    /// Where they lie.
    pub places: Vec<Place>,
    /// The program's parameters, which are the first of them.
    pub params: Vec<tile::Param>,
    /// Names of the parameters: what a role begins with.
    pub names: Names,
}

impl<'a> Values<'a> {
    /// The parameters of a program.
    pub fn new(program: &'a Program) -> Values<'a> {
        let (types, places, params) = (Vec::new(), Vec::new(), Vec::new());
        let mut all = Values { program, types, places, params, names: Names::new() };
        for param in &program.params {
            let value = all.fresh(program.ty(param.value).clone(), Place::View);
            all.names.insert(param.value, value);
            all.params.push(tile::Param { value, ..param.clone() });
        }
        all
    }

    /// A new value.
    pub fn fresh(&mut self, ty: Type, place: Place) -> ValueId {
        self.types.push(ty);
        self.places.push(place);
        ValueId(self.types.len() as u32 - 1)
    }

    /// An instruction of the program under new names.
    pub fn copied(&mut self, inst: &tile::Inst, place: Place, names: &mut Names) -> Option<Inst> {
        Some(self.computed(inst, renamed(&inst.op, names)?, place, names))
    }

    /// What an instruction of the program makes, made by `op`.
    pub fn computed(&mut self, inst: &tile::Inst, op: tile::Op, place: Place, names: &mut Names) -> Inst {
        let results = inst.results.iter().map(|&r| {
            let new = self.fresh(self.program.ty(r).clone(), place.clone());
            names.insert(r, new);
            new
        });
        Inst { results: results.collect(), op: Op::Tile(op), scratch: None }
    }
}

/// These values and what they are computed from; what makes values that `ends` holds for is not followed.
pub fn slice(
    defs: &HashMap<ValueId, &tile::Inst>,
    roots: Vec<ValueId>,
    ends: impl Fn(ValueId) -> bool,
) -> HashSet<ValueId> {
    let (mut seen, mut pending) = (HashSet::new(), roots);
    while let Some(v) = pending.pop() {
        if seen.insert(v)
            && !ends(v)
            && let Some(inst) = defs.get(&v)
        {
            pending.extend(tile::operands(&inst.op));
        }
    }
    seen
}

/// An instruction without results.
pub fn plain(op: Op) -> Inst {
    Inst { results: Vec::new(), op, scratch: None }
}

/// The value that an index is.
pub fn value_of(i: Index) -> Option<ValueId> {
    match i {
        Index::Value(v) => Some(v),
        Index::Const(_) => None,
    }
}

/// An index under new names.
pub fn rename_index(i: Index, names: &Names) -> Option<Index> {
    Some(match i {
        Index::Value(v) => Index::Value(*names.get(&v)?),
        Index::Const(_) => i,
    })
}

/// A new value of a schedule that is made already.
pub fn added(s: &mut Scheduled, ty: Type, place: Place) -> ValueId {
    s.types.push(ty);
    s.places.push(place);
    ValueId(s.types.len() as u32 - 1)
}

/// A new i32 of such a schedule, the same for every thread.
pub fn added_number(s: &mut Scheduled) -> ValueId {
    added(s, Type::Tile(TileType::scalar(DType::I32)), Place::Uniform)
}

/// An instruction of arithmetic.
pub fn arithmetic(op: ScalarOp, args: &[MapArg]) -> MapInst {
    MapInst { op, args: args.to_vec() }
}

/// An i32 that is known.
pub fn constant(n: i32) -> MapInst {
    arithmetic(ScalarOp::Const(Scalar::I32(n)), &[])
}

/// Arithmetic whose last instruction is its result; there is one at least.
pub fn mapped(inputs: Vec<ValueId>, insts: Vec<MapInst>) -> tile::Op {
    let result = MapArg::Inst(insts.len() as u32 - 1);
    tile::Op::Map { inputs, body: MapFn { insts, result } }
}

/// `v + n`, of i32.
pub fn plus(v: ValueId, n: i32) -> tile::Op {
    mapped(vec![v], vec![constant(n), arithmetic(ScalarOp::Add, &[MapArg::Input(0), MapArg::Inst(0)])])
}

/// An operation that roles may run, with its operands renamed.
pub fn renamed(op: &tile::Op, names: &Names) -> Option<tile::Op> {
    let v = |v: &ValueId| names.get(v).copied();
    let indices = |index: &[Index]| index.iter().map(|&i| rename_index(i, names)).collect::<Option<Vec<_>>>();
    Some(match op {
        tile::Op::BlockId { .. } | tile::Op::Sym(_) | tile::Op::Full { .. } | tile::Op::Iota { .. } => op.clone(),
        tile::Op::Map { inputs, body } => {
            tile::Op::Map { inputs: inputs.iter().map(v).collect::<Option<_>>()?, body: body.clone() }
        }
        tile::Op::Reshape { x, shape } => tile::Op::Reshape { x: v(x)?, shape: shape.clone() },
        tile::Op::Load { view, index, shape } => {
            tile::Op::Load { view: v(view)?, index: indices(index)?, shape: shape.clone() }
        }
        tile::Op::Store { view, index, value } => {
            tile::Op::Store { view: v(view)?, index: indices(index)?, value: v(value)? }
        }
        tile::Op::Gather { view, rows, index, shape } => {
            tile::Op::Gather { view: v(view)?, rows: v(rows)?, index: indices(index)?, shape: shape.clone() }
        }
        tile::Op::Scatter { view, rows, index, value } => {
            tile::Op::Scatter { view: v(view)?, rows: v(rows)?, index: indices(index)?, value: v(value)? }
        }
        _ => return None,
    })
}
