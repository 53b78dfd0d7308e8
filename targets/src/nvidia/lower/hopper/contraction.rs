//! Finds the contraction of a tile program: a loop over `k` around matrix products whose operands come straight from memory. There may
//! be several products of one left operand (gate and up, say), or of one right operand (halves of the rows).
//!
//! ```text
//! for kk in lo..hi step s (acc) {        for block in lo..hi (acc) {
//!     acc + load x · load wᵀ                 acc + (load x · load wᵀ) scaled by loads of scales
//! }                                      }
//! ```
//!
//! What stands around the loop may be anything that each thread can do for its own elements: scalars, maps, a store.

use super::config::Config;
use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, MapArg, Op, Program, Region, Scalar, ScalarOp, TileType, ValueId};
use std::collections::{HashMap, HashSet};

/// Bytes of `k` that one stage holds of each row: the widest swizzle.
pub const STEP_BYTES: u32 = 128;

/// An operand of the product.
#[derive(Clone, Debug)]
pub struct Operand<'a> {
    /// The view it is loaded from.
    pub view: ValueId,
    /// Start of the tile.
    pub index: &'a [Index],
    /// Shape of the load; its last axis is `k`, or, of a right operand that lies across, its columns.
    pub shape: &'a [u32],
    /// Rows (columns of the result) of the tile.
    pub rows: u32,
    /// i32 row numbers in dim 0, if rows are gathered.
    pub gathered: Option<ValueId>,
}

impl Operand<'_> {
    /// The same with its last axis for rows, if it lies across `k`.
    fn lying(mut self, across: bool) -> Self {
        if across && let Some(&last) = self.shape.last() {
            self.rows = last;
        }
        self
    }
}

/// The contraction of a program.
#[derive(Clone, Debug)]
pub struct Contraction<'a> {
    /// The loop over `k`.
    pub k_loop: &'a Inst,
    /// Its bounds and step.
    pub range: (Index, Index, u32),
    /// Its body.
    pub body: &'a Region,
    /// Rounds of the loop, if they are the same for every block.
    pub rounds: Option<u32>,
    /// Elements of `k` that a round takes.
    pub step: u32,
    /// The products.
    pub dots: Vec<&'a Inst>,
    /// Which left and which right operand each multiplies.
    pub pairs: Vec<[usize; 2]>,
    /// Left operands, alike: rows of the results.
    pub lefts: Vec<Operand<'a>>,
    /// Right operands, alike: columns of the results.
    pub rights: Vec<Operand<'a>>,
    /// Whether the right operands' rows run across `k`: tiles of `[k, columns]`.
    pub across: bool,
    /// Element type of all.
    pub dtype: DType,
    /// Whether products add to the carried tiles themselves; else maps combine them.
    pub direct: bool,
}

/// Parts of a sum at most, where all are asked how long they are.
const MOST_PARTS: u32 = 512;

/// Where every value is defined, loops included.
pub fn definitions<'a>(region: &'a Region, into: &mut HashMap<ValueId, &'a Inst>) {
    for inst in &region.insts {
        into.extend(inst.results.iter().map(|&r| (r, inst)));
        for body in regions(&inst.op) {
            definitions(body, into);
        }
    }
}

/// Those of an instruction.
pub fn regions(op: &Op) -> Vec<&Region> {
    match op {
        Op::For { body, .. } => vec![body],
        Op::If { then, otherwise, .. } => vec![then, otherwise],
        _ => Vec::new(),
    }
}

/// All loops that directly hold a product.
pub fn product_loops<'a>(region: &'a Region, found: &mut Vec<(&'a Inst, &'a Region)>) {
    for inst in &region.insts {
        if let Op::For { body, .. } = &inst.op
            && body.insts.iter().any(|i| matches!(i.op, Op::Dot { .. }))
        {
            found.push((inst, body));
        }
        regions(&inst.op).into_iter().for_each(|r| product_loops(r, found));
    }
}

/// Products of a region, loops included.
pub fn products(region: &Region) -> usize {
    let here = region.insts.iter().filter(|i| matches!(i.op, Op::Dot { .. })).count();
    here + region.insts.iter().flat_map(|i| regions(&i.op)).map(products).sum::<usize>()
}

impl<'a> Contraction<'a> {
    /// The contraction of a program whose products are all in one loop.
    pub fn of(program: &'a Program) -> Option<Contraction<'a>> {
        let mut loops = Vec::new();
        product_loops(&program.body, &mut loops);
        let &[(k_loop, body)] = loops.as_slice() else { return None };
        let dots: Vec<&Inst> = body.insts.iter().filter(|i| matches!(i.op, Op::Dot { .. })).collect();
        let Op::For { lo, hi, step, init, .. } = &k_loop.op else { return None };
        if products(&program.body) != dots.len() || init.len() != dots.len() {
            return None;
        }
        let mut defs = HashMap::new();
        definitions(&program.body, &mut defs);
        if !init.iter().all(|v| defs.get(v).is_some_and(|i| is_zero(i))) {
            return None;
        }
        let carried = &body.args[1..];
        let direct = dots.iter().enumerate().all(|(i, dot)| adds_to(dot) == carried.get(i).copied())
            && dots.iter().map(|d| d.results[0]).eq(body.yields.iter().copied());
        let combined = || {
            let map = |(y, &c): (&ValueId, &ValueId)| defs.get(y).is_some_and(|i| combines(i, c));
            dots.iter().all(|d| adds_to(d).is_none()) && body.yields.iter().zip(carried).all(map)
        };
        if !direct && !combined() {
            return None;
        }
        let across = dots.iter().any(|d| matches!(d.op, Op::Dot { trans_b: false, .. }));
        let pairs: Vec<(ValueId, ValueId)> = dots
            .iter()
            .filter_map(|d| match d.op {
                Op::Dot { a, b, trans_b, .. } => (trans_b != across).then_some((a, b)),
                _ => None,
            })
            .collect();
        let distinct = |all: &mut dyn Iterator<Item = ValueId>| {
            let mut found = Vec::new();
            all.for_each(|v| {
                if !found.contains(&v) {
                    found.push(v)
                }
            });
            found
        };
        let (lefts, rights) = (distinct(&mut pairs.iter().map(|p| p.0)), distinct(&mut pairs.iter().map(|p| p.1)));
        let left = program.tile(*lefts.first()?)?;
        let alike = |all: &[ValueId]| {
            let mut types = all.iter().map(|&v| program.tile(v));
            let first = program.tile(all[0]);
            types.all(|t| t.is_some() && t == first && t.map(|t| t.dtype) == Some(left.dtype))
        };
        let alike = pairs.len() == dots.len() && alike(&lefts) && alike(&rights);
        let rounds = rounds(program, &defs, (*lo, *hi, *step));
        let place = |all: &[ValueId], v: ValueId| all.iter().position(|&x| x == v).unwrap_or(0);
        (alike && rounds != Some(0)).then_some(Contraction {
            k_loop,
            range: (*lo, *hi, *step),
            body,
            rounds,
            step: *left.shape.get(1)?,
            pairs: pairs.iter().map(|p| [place(&lefts, p.0), place(&rights, p.1)]).collect(),
            lefts: lefts.iter().map(|&v| operand(program, body, &defs, v)).collect::<Option<_>>()?,
            rights: rights
                .iter()
                .map(|&v| Some(operand(program, body, &defs, v)?.lying(across)))
                .collect::<Option<_>>()?,
            across,
            dots,
            dtype: left.dtype,
            direct,
        })
    }

    /// Rows and columns of each result.
    pub fn shape(&self) -> [u32; 2] {
        [self.lefts[0].rows, self.rights[0].rows]
    }

    /// Left operands, then the right ones: slots of a stage.
    pub fn operands(&self) -> Vec<&Operand<'a>> {
        self.lefts.iter().chain(&self.rights).collect()
    }

    /// Whether a value is one of the products.
    pub fn is_product(&self, v: ValueId) -> bool {
        self.dots.iter().any(|d| d.results[0] == v)
    }

    /// Whether the instruction takes right operands whose rows run across `k`: 16-bit ones, whose columns no two warpgroups share out, in
    /// panels as wide as the swizzle.
    pub fn can_lie_across(&self, config: &Config) -> bool {
        let panels = |o: &Operand<'_>| {
            o.rows.is_multiple_of(self.stage_k()) && o.shape.len() > 1 && o.shape[o.shape.len() - 2] == self.step
        };
        self.dtype.bytes() == 2 && !config.transposed && config.groups[1] == 1 && self.rights.iter().all(panels)
    }

    /// Elements of `k` in a stage.
    pub fn stage_k(&self) -> u32 {
        STEP_BYTES / self.dtype.bytes() as u32
    }
}

/// Rounds of a loop whose bounds are constants, or arithmetic on the block's number along one axis of constant size, if all blocks have
/// as many.
fn rounds(program: &Program, defs: &HashMap<ValueId, &Inst>, (lo, hi, step): (Index, Index, u32)) -> Option<u32> {
    let at = |axes: &mut HashSet<u32>, block: i64| {
        let mut of = |i: Index| match i {
            Index::Const(n) => Some(n),
            Index::Value(v) => number(defs, v, block, axes),
        };
        u32::try_from(of(hi)?.checked_sub(of(lo)?)?).ok().map(|n| n.div_ceil(step))
    };
    let mut axes = HashSet::new();
    let first = at(&mut axes, 0)?;
    let count = match axes.iter().collect::<Vec<_>>().as_slice() {
        [] => 1,
        [axis] => {
            let dim = program.grid.get(**axis as usize)?;
            dim.extent.constant()?.div_ceil(dim.tile.max(1))
        }
        _ => return None,
    };
    let alike = count <= MOST_PARTS && (1..count).all(|n| at(&mut axes, n.into()) == Some(first));
    alike.then_some(first)
}

/// A scalar integer for a block's number along whatever axis it asks for, which is noted.
fn number(defs: &HashMap<ValueId, &Inst>, v: ValueId, block: i64, axes: &mut HashSet<u32>) -> Option<i64> {
    match &defs.get(&v)?.op {
        Op::BlockId { axis } => {
            axes.insert(*axis);
            Some(block)
        }
        Op::Full { value: Scalar::I32(n), .. } => Some((*n).into()),
        Op::Map { inputs, body } => {
            let mut done: Vec<i64> = Vec::new();
            let mut arg = |a: &MapArg, done: &[i64]| match a {
                MapArg::Input(i) => number(defs, *inputs.get(*i as usize)?, block, axes),
                MapArg::Inst(i) => done.get(*i as usize).copied(),
            };
            for inst in &body.insts {
                let args = inst.args.iter().map(|a| arg(a, &done)).collect::<Option<Vec<_>>>()?;
                done.push(match (inst.op, args.as_slice()) {
                    (ScalarOp::Const(Scalar::I32(n)), _) => n.into(),
                    (ScalarOp::Add, &[a, b]) => a.checked_add(b)?,
                    (ScalarOp::Sub, &[a, b]) => a.checked_sub(b)?,
                    (ScalarOp::Mul, &[a, b]) => a.checked_mul(b)?,
                    (ScalarOp::Div, &[a, b]) if b > 0 => a / b,
                    (ScalarOp::Rem, &[a, b]) if b > 0 => a % b,
                    (ScalarOp::Min, &[a, b]) => a.min(b),
                    (ScalarOp::Max, &[a, b]) => a.max(b),
                    _ => return None,
                });
            }
            arg(&body.result, &done)
        }
        _ => None,
    }
}

/// What a product adds to.
fn adds_to(dot: &Inst) -> Option<ValueId> {
    match dot.op {
        Op::Dot { acc, .. } => acc,
        _ => None,
    }
}

fn is_zero(inst: &Inst) -> bool {
    matches!(&inst.op, Op::Full { value: Scalar::F32(x), .. } if *x == 0.0)
}

/// Whether an instruction is elementwise arithmetic on the carried tile.
fn combines(inst: &Inst, carried: ValueId) -> bool {
    matches!(&inst.op, Op::Map { inputs, .. } if inputs.contains(&carried))
}

/// The load behind an operand, through a reshape that only drops axes of one element.
fn operand<'a>(program: &Program, body: &Region, defs: &HashMap<ValueId, &'a Inst>, v: ValueId) -> Option<Operand<'a>> {
    // A tile made outside of the loop would have to stay for all of it.
    body.insts.iter().find(|i| i.results == loaded(defs, v).map(|i| i.results.clone()).unwrap_or_default())?;
    source(program, defs, v)
}

/// What defines a value, or what it is a reshape of.
fn loaded<'a>(defs: &HashMap<ValueId, &'a Inst>, v: ValueId) -> Option<&'a Inst> {
    let inst = *defs.get(&v)?;
    match &inst.op {
        Op::Reshape { x, .. } => defs.get(x).copied(),
        _ => Some(inst),
    }
}

/// The same wherever the load stands.
pub fn source<'a>(program: &Program, defs: &HashMap<ValueId, &'a Inst>, v: ValueId) -> Option<Operand<'a>> {
    let tile: &TileType = program.tile(v)?;
    let &[rows, k] = tile.shape.as_slice() else { return None };
    let inst = loaded(defs, v)?;
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
