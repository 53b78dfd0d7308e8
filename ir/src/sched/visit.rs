//! Walking scheduled code: operands, definitions, and what an instruction reads through values that lie nowhere.

use super::{Block, BufferId, Inst, Op, Place, Scheduled};
use crate::tile::verify::for_each_operand as for_each_tile_operand;
use crate::tile::{self, Index, ValueId};
use std::collections::HashSet;

/// Calls `f` on every value an operation uses itself, in the order of its text; not those used in its blocks.
pub(crate) fn for_each_operand(op: &mut Op, f: &mut dyn FnMut(&mut ValueId)) {
    fn index(i: &mut Index, f: &mut dyn FnMut(&mut ValueId)) {
        if let Index::Value(v) = i {
            f(v);
        }
    }
    match op {
        Op::Tile(op) => for_each_tile_operand(op, f),
        Op::For { lo, hi, init, .. } => {
            index(lo, f);
            index(hi, f);
            init.iter_mut().for_each(f);
        }
        Op::If { cond, .. } => f(cond),
        Op::Copy { view, rows, index: at, .. } => {
            f(view);
            rows.iter_mut().for_each(&mut *f);
            at.iter_mut().for_each(|i| index(i, f));
        }
        Op::Fill { value, .. } | Op::Put { value, .. } => f(value),
        Op::Barrier | Op::Acquire(_) | Op::Commit(_) | Op::Wait(_) | Op::Take { .. } | Op::Release { .. } => {}
        Op::Number | Op::Meet | Op::Get { .. } => {}
        Op::Part { lo, hi, .. } => [lo, hi].into_iter().for_each(f),
    }
}

/// The values an operation uses itself, in the order of its text; not those used in its blocks.
pub fn operands(op: &Op) -> Vec<ValueId> {
    let values = |indices: &[Index]| -> Vec<ValueId> {
        indices.iter().filter_map(|i| if let Index::Value(v) = i { Some(*v) } else { None }).collect()
    };
    match op {
        Op::Tile(op) => tile::operands(op),
        Op::For { lo, hi, init, .. } => [values(&[*lo, *hi]), init.clone()].concat(),
        Op::If { cond, .. } => vec![*cond],
        Op::Copy { view, rows, index, .. } => vec![*view].into_iter().chain(*rows).chain(values(index)).collect(),
        Op::Fill { value, .. } | Op::Put { value, .. } => vec![*value],
        Op::Barrier | Op::Acquire(_) | Op::Commit(_) | Op::Wait(_) | Op::Take { .. } | Op::Release { .. } => Vec::new(),
        Op::Number | Op::Meet | Op::Get { .. } => Vec::new(),
        Op::Part { lo, hi, .. } => vec![*lo, *hi],
    }
}

impl Op {
    /// The blocks inside, in order.
    pub fn blocks(&self) -> Vec<&Block> {
        match self {
            Op::For { body, .. } => vec![body],
            Op::If { then, otherwise, .. } => vec![then, otherwise],
            _ => Vec::new(),
        }
    }
}

/// Where every value of a kernel is defined.
pub struct Definitions<'a> {
    kernel: &'a Scheduled,
    insts: Vec<Option<&'a Inst>>,
}

impl<'a> Definitions<'a> {
    /// Looks through the whole kernel once.
    pub fn new(kernel: &'a Scheduled) -> Definitions<'a> {
        let mut insts = vec![None; kernel.types.len()];
        let mut pending: Vec<&Block> = kernel.roles.iter().map(|r| &r.body).chain([&kernel.common]).collect();
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                for v in &inst.results {
                    if let Some(slot) = insts.get_mut(v.0 as usize) {
                        *slot = Some(inst);
                    }
                }
                pending.extend(inst.op.blocks());
            }
        }
        Definitions { kernel, insts }
    }

    /// The instruction that defines a value; none for parameters and block arguments.
    pub fn inst(&self, v: ValueId) -> Option<&'a Inst> {
        self.insts.get(v.0 as usize).copied().flatten()
    }

    /// Where a value lies; none for one without a place, which only an invalid kernel has.
    pub fn place(&self, v: ValueId) -> Option<&'a Place> {
        self.kernel.places.get(v.0 as usize)
    }

    /// The values that lie somewhere and are read where `vs` are used: each itself, or, if it is lazy, those it is computed from.
    /// Each once, in the order met.
    pub fn sources(&self, vs: &[ValueId]) -> Vec<ValueId> {
        let (mut seen, mut out) = (HashSet::new(), Vec::new());
        let mut pending: Vec<ValueId> = vs.iter().rev().copied().collect();
        while let Some(v) = pending.pop() {
            if !seen.insert(v) {
                continue;
            }
            match self.inst(v).filter(|_| self.place(v) == Some(&Place::Lazy)) {
                Some(inst) => pending.extend(operands(&inst.op).into_iter().rev()),
                None => out.push(v),
            }
        }
        out
    }

    /// The values that an instruction reads when it runs: none if it is lazy itself. Yields of its blocks are read by the blocks.
    pub fn inputs(&self, inst: &Inst) -> Vec<ValueId> {
        let lazy = |v: &ValueId| self.place(*v) == Some(&Place::Lazy);
        if !inst.results.is_empty() && inst.results.iter().all(lazy) {
            return Vec::new();
        }
        self.sources(&operands(&inst.op))
    }
}

/// The shared buffers that an instruction reads when it runs, through lazy operands too; not those read in its blocks, and not slots
/// of channels. A lazy instruction reads nothing itself: its user does.
pub fn reads(definitions: &Definitions<'_>, inst: &Inst) -> Vec<BufferId> {
    let inputs = definitions.inputs(inst);
    let mut out: Vec<BufferId> = inputs.iter().filter_map(|&v| definitions.place(v)?.buffer()).collect();
    out.sort_unstable();
    out.dedup();
    out
}

impl Place {
    /// The buffer of a value in shared memory.
    pub fn buffer(&self) -> Option<BufferId> {
        match self {
            Place::Shared(b) => Some(*b),
            _ => None,
        }
    }
}

/// Calls `f(is a definition, value)` on every value of a block in the order of their numbering.
pub(crate) fn visit(block: &mut Block, f: &mut dyn FnMut(bool, &mut ValueId)) {
    block.args.iter_mut().for_each(|v| f(true, v));
    for inst in &mut block.insts {
        for_each_operand(&mut inst.op, &mut |v| f(false, v));
        match &mut inst.op {
            Op::For { body, .. } => visit(body, f),
            Op::If { then, otherwise, .. } => {
                visit(then, f);
                visit(otherwise, f);
            }
            _ => {}
        }
        inst.results.iter_mut().for_each(|v| f(true, v));
    }
    block.yields.iter_mut().for_each(|v| f(false, v));
}
