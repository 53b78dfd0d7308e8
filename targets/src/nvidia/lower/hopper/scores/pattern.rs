//! What is found in a program of this form.

use super::super::config::ROWS;
use super::super::contraction::STEP_BYTES;
use super::super::stream::MOST_K;
use super::super::tensor_map::{can_describe, view_type};
use super::super::values::slice;
use dsc_ir::DType;
use dsc_ir::tile::{self, Program, ReduceKind, Region, TileType, ValueId};
use std::collections::HashMap;

/// Most rows of the resident operand in a warpgroup: columns of an instruction.
pub(super) const MOST_ROWS: u32 = 256;

/// What was found in a program.
pub(super) struct Pattern<'a> {
    /// `a · bᵀ`, or of the halves of `a` one after the other.
    pub(super) dots: Vec<&'a tile::Inst>,
    /// The load of `a`, or of each half.
    pub(super) residents: Vec<&'a tile::Inst>,
    /// The load of `b`, then those of vectors beside it.
    pub(super) streamed: Vec<&'a tile::Inst>,
    /// What the products are combined with, a value a row of `a`.
    pub(super) weights: Vec<ValueId>,
    /// Loads that weights are computed of, a number a row each, and that the copy engine can bring.
    pub(super) columns: Vec<&'a tile::Inst>,
    /// Groups of a product, and rows of each.
    pub(super) groups: [u32; 2],
    /// Whether rows of sums are selected from.
    pub(super) selects: bool,
    pub(super) dtype: DType,
}

impl<'a> Pattern<'a> {
    pub(super) fn of(program: &'a Program, defs: &HashMap<ValueId, &'a tile::Inst>) -> Option<Pattern<'a>> {
        let mut homes = HashMap::new();
        let mut insts = Vec::new();
        collect(&program.body, &mut homes, &mut insts, 0, &mut 1);
        let all = |wanted: fn(&tile::Op) -> bool| -> Vec<&'a tile::Inst> {
            insts.iter().filter(|i| wanted(&i.op)).copied().collect()
        };
        let dots = all(|op| matches!(op, tile::Op::Dot { .. }));
        let sums = all(|op| matches!(op, tile::Op::Reduce { kind: ReduceKind::Sum, .. }));
        let (dot, sum) = (*dots.first()?, *sums.first()?);
        (dots.len() <= 2 && dots.len() == sums.len()).then_some(())?;
        let unknown = |op: &tile::Op| {
            !matches!(
                op,
                tile::Op::BlockId { .. }
                    | tile::Op::Sym(_)
                    | tile::Op::Full { .. }
                    | tile::Op::Iota { .. }
                    | tile::Op::Load { .. }
                    | tile::Op::Store { .. }
                    | tile::Op::Map { .. }
                    | tile::Op::Reduce { .. }
                    | tile::Op::Reshape { .. }
                    | tile::Op::Dot { .. }
                    | tile::Op::For { .. }
                    | tile::Op::Gather { .. }
                    | tile::Op::TopkInit { .. }
                    | tile::Op::TopkPush { .. }
                    | tile::Op::TopkTake { .. }
            )
        };
        let tile::Op::Dot { a, b, acc: None, trans_b: true } = dot.op else { return None };
        let tile::Op::Reduce { x, axis: 1, .. } = sum.op else { return None };
        if insts.iter().any(|i| unknown(&i.op)) {
            return None;
        }
        let (ta, tb, tx) = (program.tile(a)?, program.tile(b)?, program.tile(x)?);
        let (&[rows, k], &[columns, _], &[outer, each, last]) =
            (ta.shape.as_slice(), tb.shape.as_slice(), tx.shape.as_slice())
        else {
            return None;
        };
        let bytes = k * ta.dtype.bytes() as u32;
        let sound = columns == ROWS
            && last == ROWS
            && outer * each == rows
            && each.is_multiple_of(8)
            && bytes == STEP_BYTES
            && ta.dtype == tb.dtype
            && matches!(ta.dtype, DType::E4m3 | DType::Bf16 | DType::F16);
        sound.then_some(())?;
        let load = |v: ValueId| -> Option<&'a tile::Inst> {
            let mut inst = *defs.get(&v)?;
            while let tile::Op::Reshape { x, .. } = inst.op {
                inst = defs.get(&x)?;
            }
            matches!(inst.op, tile::Op::Load { .. }).then_some(inst)
        };
        let first = load(b)?;
        let home = |i: &tile::Inst| homes.get(&i.results[0]).copied();
        let inner = home(dot)?;
        let mut residents = Vec::new();
        for other in &dots {
            let tile::Op::Dot { a: own, b: same, acc: None, trans_b: true } = other.op else { return None };
            (same == b && program.tile(own)? == ta).then_some(())?;
            residents.push(load(own)?);
        }
        let alike =
            |i: &&tile::Inst| matches!(i.op, tile::Op::Reduce { x, axis: 1, .. } if program.tile(x) == Some(tx));
        let outside = residents.iter().all(|r| home(r) != Some(inner));
        let inside = dots.iter().chain(&sums).all(|i| home(i) == Some(inner));
        if home(first)? != inner || !outside || !inside || !sums.iter().all(alike) {
            return None;
        }
        let mut streamed = vec![first];
        for i in insts.iter().filter(|i| matches!(i.op, tile::Op::Load { .. }) && home(i) == Some(inner)) {
            let t = program.tile(i.results[0])?;
            if i.results != first.results && t.elements() > 1 {
                (t.dtype == DType::F32 && t.elements() == ROWS as usize).then_some(())?;
                streamed.push(i);
            }
        }
        for i in streamed.iter().chain(&residents) {
            let tile::Op::Load { view, .. } = &i.op else { return None };
            can_describe(view_type(&program.types, *view)?).then_some(())?;
        }
        // Everything else that is loaded, threads load.
        for i in &insts {
            if let tile::Op::Load { .. } = i.op
                && !residents.iter().any(|r| r.results == i.results)
                && !streamed.iter().any(|s| s.results == i.results)
            {
                matches!(program.tile(i.results[0])?.dtype, DType::F32 | DType::I32).then_some(())?;
            }
        }
        let mut weights = Vec::new();
        for i in &insts {
            if let tile::Op::Map { inputs, .. } = &i.op
                && let Some(dot) = dots.iter().find(|d| inputs.contains(&d.results[0]))
            {
                for &v in inputs.iter().filter(|&&v| v != dot.results[0]) {
                    let t = program.tile(v)?;
                    if t.elements() > 1 {
                        (t.shape == [rows, 1] && homes.get(&v) != Some(&inner)).then_some(())?;
                        weights.push(v);
                    }
                }
            }
        }
        // A selection is of the rows of sums, and what is made of it is stored at the end.
        let selects = insts.iter().filter(|i| matches!(i.op, tile::Op::TopkInit { .. })).count();
        for i in &insts {
            match &i.op {
                tile::Op::TopkInit { rows, k } if selects > 1 || *rows != outer || *k > MOST_K => {
                    return None;
                }
                tile::Op::TopkPush { values, .. } if program.tile(*values)?.shape != [outer, ROWS] => return None,
                tile::Op::Store { .. } if selects > 0 && !program.body.insts.contains(i) => return None,
                tile::Op::Gather { view, .. } => {
                    let integers = view_type(&program.types, *view)?.dtype == DType::I32;
                    (selects > 0 && integers).then_some(())?;
                }
                _ => {}
            }
        }
        let (groups, dtype) = ([outer, each], ta.dtype);
        let of_rows = slice(defs, weights.clone(), |_| false);
        let is_column = |i: &&tile::Inst| {
            let tile::Op::Load { view, .. } = &i.op else { return false };
            let whole = |t: &TileType| t.dtype == DType::F32 && t.elements() == rows as usize;
            of_rows.contains(&i.results[0])
                && program.tile(i.results[0]).is_some_and(whole)
                && view_type(&program.types, *view).is_some_and(can_describe)
        };
        let columns = insts.iter().copied().filter(is_column).collect();
        Some(Pattern { dots, residents, streamed, weights, columns, groups, selects: selects > 0, dtype })
    }
}

impl Pattern<'_> {
    /// Whether a warpgroup has as many rows as an instruction may, and halves are whole groups: these are then made one after the other.
    pub(super) fn is_large(&self) -> bool {
        let [groups, each] = self.groups;
        !self.selects && groups * each == 2 * MOST_ROWS && groups.is_multiple_of(4)
    }
}

/// All instructions, and the region that each is in.
fn collect<'a>(
    region: &'a Region,
    homes: &mut HashMap<ValueId, u32>,
    insts: &mut Vec<&'a tile::Inst>,
    number: u32,
    next: &mut u32,
) {
    for inst in &region.insts {
        homes.extend(inst.results.iter().map(|&r| (r, number)));
        insts.push(inst);
        let inner: Vec<&Region> = match &inst.op {
            tile::Op::For { body, .. } => vec![body],
            tile::Op::If { then, otherwise, .. } => vec![then, otherwise],
            _ => Vec::new(),
        };
        for r in inner {
            let own = *next;
            *next += 1;
            collect(r, homes, insts, own, next);
        }
    }
}
