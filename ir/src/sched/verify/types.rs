//! Types and scopes, by the verifier of tile programs: synchronisation is left out, a copy becomes the load that it is, and a take the load of
//! a parameter of the type that it declares (which [`super::places`] compares with the slot). Roles become branches, so that none sees the
//! values of another.

use crate::dtype::DType;
use crate::extent::Extent;
use crate::sched::{Block, Op, Scheduled};
use crate::tile::{self, Access, Diagnostic, Index, MapArg, MapFn, MapInst, Param, Program, Region, Scalar, ScalarOp};
use crate::tile::{TileType, Type, ValueId, ViewType};

/// Arithmetic on two i32.
fn sum_of(a: ValueId, b: ValueId) -> tile::Op {
    let sum = MapInst { op: ScalarOp::Add, args: vec![MapArg::Input(0), MapArg::Input(1)] };
    tile::Op::Map { inputs: vec![a, b], body: MapFn { insts: vec![sum], result: MapArg::Inst(0) } }
}

/// What the verifier of tile programs says.
pub(super) fn check(kernel: &Scheduled) -> Vec<Diagnostic> {
    let program = Program {
        name: kernel.name.clone(),
        grid: kernel.grid.clone(),
        params: kernel.params.clone(),
        types: kernel.types.clone(),
        body: Region::default(),
    };
    let mut eraser = Eraser { program, copies: Vec::new(), problems: Vec::new() };
    let mut body = eraser.block(&kernel.common);
    for role in &kernel.roles {
        let cond = eraser.fresh(Type::Tile(TileType::scalar(DType::Bool)));
        let full = tile::Op::Full { value: Scalar::Bool(true), shape: Vec::new() };
        body.insts.push(tile::Inst { results: vec![cond], op: full });
        let then = eraser.block(&role.body);
        if !role.body.args.is_empty() || !role.body.yields.is_empty() {
            eraser.problems.push(format!("role {} has no arguments and yields nothing", role.name));
        }
        // A result of its own keeps the branch out of the numbering of instructions without results.
        let op = tile::Op::If { cond, then: with_yield(then, cond), otherwise: with_yield(Region::default(), cond) };
        let result = eraser.fresh(Type::Tile(TileType::scalar(DType::Bool)));
        body.insts.push(tile::Inst { results: vec![result], op });
    }
    let Eraser { mut program, copies, problems } = eraser;
    program.body = body;
    let mut diagnostics = tile::verify(&program);
    for d in &mut diagnostics {
        if let Some((v, name)) = copies.iter().find(|(v, _)| d.location.ends_with(&format!(", inst %{}", v.0))) {
            d.location = d.location.replace(&format!("inst %{}", v.0), name);
        }
    }
    let location = format!("kernel {}", kernel.name);
    diagnostics.extend(problems.into_iter().map(|message| Diagnostic { location: location.clone(), message }));
    diagnostics
}

fn with_yield(mut region: Region, v: ValueId) -> Region {
    region.yields = vec![v];
    region
}

struct Eraser {
    program: Program,
    /// Values that stand for copies, and how to call them.
    copies: Vec<(ValueId, String)>,
    problems: Vec<String>,
}

impl Eraser {
    fn fresh(&mut self, ty: Type) -> ValueId {
        self.program.types.push(ty);
        ValueId(self.program.types.len() as u32 - 1)
    }

    fn block(&mut self, block: &Block) -> Region {
        let mut region = Region { args: block.args.clone(), insts: Vec::new(), yields: block.yields.clone() };
        for inst in &block.insts {
            let op = match &inst.op {
                Op::Tile(tile::Op::For { .. } | tile::Op::If { .. }) => {
                    self.problems
                        .push("loops and branches of a scheduled kernel are its own, not a tile program's".into());
                    continue;
                }
                Op::Tile(op) => op.clone(),
                Op::For { lo, hi, step, init, body } => {
                    tile::Op::For { lo: *lo, hi: *hi, step: *step, init: init.clone(), body: self.block(body) }
                }
                Op::If { cond, then, otherwise } => {
                    tile::Op::If { cond: *cond, then: self.block(then), otherwise: self.block(otherwise) }
                }
                Op::Copy { channel, slot, view, rows, index, shape, .. } => {
                    let dtype = match self.program.types.get(view.0 as usize) {
                        Some(Type::View(t)) => t.dtype,
                        _ => DType::F32,
                    };
                    let tile = self.fresh(Type::Tile(TileType { dtype, shape: shape.clone() }));
                    self.copies.push((tile, format!("copy {channel}.{slot}")));
                    let (view, index, shape) = (*view, index.clone(), shape.clone());
                    let op = match *rows {
                        Some(rows) => tile::Op::Gather { view, rows, index, shape },
                        None => tile::Op::Load { view, index, shape },
                    };
                    region.insts.push(tile::Inst { results: vec![tile], op });
                    self.no_results(inst);
                    continue;
                }
                Op::Fill { channel, slot, value, .. } => {
                    let Some(Type::Tile(t)) = self.program.types.get(value.0 as usize).cloned() else {
                        self.problems.push(format!("%{} fills {channel}.{slot} and is no tile", value.0));
                        continue;
                    };
                    let shape = t.shape.clone();
                    let tile = self.fresh(Type::Tile(t));
                    let op = tile::Op::Reshape { x: *value, shape };
                    region.insts.push(tile::Inst { results: vec![tile], op });
                    self.no_results(inst);
                    continue;
                }
                Op::Put { buffer, value } => {
                    let Some(Type::Tile(t)) = self.program.types.get(value.0 as usize).cloned() else {
                        self.problems.push(format!("%{} is put into {buffer} and is no tile", value.0));
                        continue;
                    };
                    let shape = t.shape.clone();
                    let tile = self.fresh(Type::Tile(t));
                    region.insts.push(tile::Inst { results: vec![tile], op: tile::Op::Reshape { x: *value, shape } });
                    self.no_results(inst);
                    continue;
                }
                Op::Number => tile::Op::Full { value: Scalar::I32(0), shape: Vec::new() },
                // As what takes such bounds and gives such a number.
                Op::Part { lo, hi, .. } => sum_of(*lo, *hi),
                Op::Take { .. } | Op::Get { .. } => match self.take(inst) {
                    Some(op) => op,
                    None => continue,
                },
                Op::Barrier | Op::Meet | Op::Acquire(_) | Op::Commit(_) | Op::Wait(_) | Op::Release { .. } => {
                    self.no_results(inst);
                    continue;
                }
            };
            region.insts.push(tile::Inst { results: inst.results.clone(), op });
        }
        region
    }

    fn no_results(&mut self, inst: &crate::sched::Inst) {
        if let Some(v) = inst.results.first() {
            self.problems.push(format!("%{} is the result of an operation that has none", v.0));
        }
    }

    /// A load of the type that a take declares.
    fn take(&mut self, inst: &crate::sched::Inst) -> Option<tile::Op> {
        let declared = match inst.results.as_slice() {
            [v] => self.program.types.get(v.0 as usize),
            _ => None,
        };
        let Some(Type::Tile(TileType { dtype, shape })) =
            declared.filter(|t| !matches!(t, Type::Tile(t) if t.dtype == DType::Bool))
        else {
            self.problems.push("a take or get gives one tile of a type that memory holds".into());
            return None;
        };
        let (shape, extents) = (shape.clone(), shape.iter().map(|&n| Extent::from(n)).collect::<Vec<_>>());
        let view = self.fresh(Type::View(ViewType::dense(*dtype, &extents)));
        self.program.params.push(Param { name: format!("slot_{}", view.0), value: view, access: Access::Read });
        Some(tile::Op::Load { view, index: vec![Index::Const(0); shape.len()], shape })
    }
}
