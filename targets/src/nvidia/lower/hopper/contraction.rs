//! Finds the one contraction of a tile program: a loop over `k` around a matrix product whose operands come straight from memory.
//!
//! ```text
//! for kk in 0..K step s (acc) {          for block in 0..K/s (acc) {
//!     acc + load x · load wᵀ                 acc + (load x · load wᵀ) scaled by loads of scales
//! }                                      }
//! ```
//!
//! What stands around the loop may be anything that each thread can do for its own elements: scalars, maps, a store.

use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, Op, Program, Region, TileType, ValueId};
use std::collections::HashMap;

/// Bytes of `k` that one stage holds of each row: the widest swizzle.
pub const STEP_BYTES: u32 = 128;

/// An operand of the product.
#[derive(Clone, Debug)]
pub struct Operand<'a> {
    /// The view it is loaded from.
    pub view: ValueId,
    /// Start of the tile.
    pub index: &'a [Index],
    /// Shape of the load; its last axis is `k`.
    pub shape: &'a [u32],
    /// Rows (columns of the result) of the tile.
    pub rows: u32,
    /// i32 row numbers in dim 0, if rows are gathered.
    pub gathered: Option<ValueId>,
}

/// The contraction of a program.
#[derive(Clone, Debug)]
pub struct Contraction<'a> {
    /// The loop over `k`, its bounds constants from zero.
    pub k_loop: &'a Inst,
    /// Its body.
    pub body: &'a Region,
    /// Rounds of the loop as the program has them.
    pub rounds: u32,
    /// Elements of `k` that a round takes.
    pub step: u32,
    /// The product.
    pub dot: &'a Inst,
    /// Left operand: rows of the result.
    pub left: Operand<'a>,
    /// Right operand: columns of the result.
    pub right: Operand<'a>,
    /// Element type of both.
    pub dtype: DType,
    /// Whether the product adds to the carried tile itself; else a map combines the two.
    pub direct: bool,
}

/// Where every value is defined, loops included.
pub fn definitions<'a>(region: &'a Region, into: &mut HashMap<ValueId, &'a Inst>) {
    for inst in &region.insts {
        into.extend(inst.results.iter().map(|&r| (r, inst)));
        for body in regions(&inst.op) {
            definitions(body, into);
        }
    }
}

fn regions(op: &Op) -> Vec<&Region> {
    match op {
        Op::For { body, .. } => vec![body],
        Op::If { then, otherwise, .. } => vec![then, otherwise],
        _ => Vec::new(),
    }
}

/// All loops that directly hold a product.
fn product_loops<'a>(region: &'a Region, found: &mut Vec<(&'a Inst, &'a Region)>) {
    for inst in &region.insts {
        if let Op::For { body, .. } = &inst.op
            && body.insts.iter().any(|i| matches!(i.op, Op::Dot { .. }))
        {
            found.push((inst, body));
        }
        regions(&inst.op).into_iter().for_each(|r| product_loops(r, found));
    }
}

fn products(region: &Region) -> usize {
    let here = region.insts.iter().filter(|i| matches!(i.op, Op::Dot { .. })).count();
    here + region.insts.iter().flat_map(|i| regions(&i.op)).map(products).sum::<usize>()
}

impl<'a> Contraction<'a> {
    /// The contraction of a program that has exactly one.
    pub fn of(program: &'a Program) -> Option<Contraction<'a>> {
        let mut loops = Vec::new();
        product_loops(&program.body, &mut loops);
        let &[(k_loop, body)] = loops.as_slice() else { return None };
        if products(&program.body) != 1 {
            return None;
        }
        let mut defs = HashMap::new();
        definitions(&program.body, &mut defs);
        let dot = body.insts.iter().find(|i| matches!(i.op, Op::Dot { .. }))?;
        let (Op::For { lo, hi, step, init, .. }, Op::Dot { a, b, acc, trans_b: true }) = (&k_loop.op, &dot.op) else {
            return None;
        };
        let (&Index::Const(0), &Index::Const(hi)) = (lo, hi) else { return None };
        let (&[carried], &[yielded], &[init]) = (&body.args[1..], body.yields.as_slice(), init.as_slice()) else {
            return None;
        };
        if !is_zero(defs.get(&init)?) {
            return None;
        }
        let direct = *acc == Some(carried) && yielded == dot.results[0];
        if !direct && (acc.is_some() || !combines(defs.get(&yielded)?, carried)) {
            return None;
        }
        let [left, right] = [*a, *b].map(|v| operand(program, body, &defs, v));
        let (left, right) = (left?, right?);
        let types = [*a, *b].map(|v| program.tile(v).map(|t| t.dtype));
        let [Some(dtype), Some(other)] = types else { return None };
        let width = program.tile(*a)?.shape.get(1).copied()?;
        (dtype == other).then_some(Contraction {
            k_loop,
            body,
            rounds: u32::try_from(hi).ok()?.div_ceil(*step),
            step: width,
            dot,
            left,
            right,
            dtype,
            direct,
        })
    }

    /// Elements of `k` in a stage.
    pub fn stage_k(&self) -> u32 {
        STEP_BYTES / self.dtype.bytes() as u32
    }
}

fn is_zero(inst: &Inst) -> bool {
    matches!(&inst.op, Op::Full { value: dsc_ir::tile::Scalar::F32(x), .. } if *x == 0.0)
}

/// Whether an instruction is elementwise arithmetic on the carried tile.
fn combines(inst: &Inst, carried: ValueId) -> bool {
    matches!(&inst.op, Op::Map { inputs, .. } if inputs.contains(&carried))
}

/// The load behind an operand, through a reshape that only drops axes of one element.
fn operand<'a>(program: &Program, body: &Region, defs: &HashMap<ValueId, &'a Inst>, v: ValueId) -> Option<Operand<'a>> {
    let tile: &TileType = program.tile(v)?;
    let &[rows, k] = tile.shape.as_slice() else { return None };
    let mut inst = *defs.get(&v)?;
    if let Op::Reshape { x, .. } = &inst.op {
        inst = defs.get(x)?;
    }
    // A tile made outside of the loop would have to stay for all of it.
    body.insts.iter().find(|i| i.results == inst.results)?;
    let (view, index, shape, gathered) = match &inst.op {
        Op::Load { view, index, shape } => (*view, index, shape, None),
        Op::Gather { view, rows, index, shape } => (*view, index, shape, Some(*rows)),
        _ => return None,
    };
    let squeezed: Vec<u32> = shape.iter().copied().filter(|&n| n > 1).collect();
    let straight =
        shape.last() == Some(&k) && squeezed == tile.shape.iter().copied().filter(|&n| n > 1).collect::<Vec<_>>();
    straight.then_some(Operand { view, index, shape, rows, gathered })
}
