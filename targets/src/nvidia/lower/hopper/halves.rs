//! A tile program whose rows are made in halves.
//!
//! Of a tall tile all accumulators stay in registers, but partial sums of all its rows do not fit beside them. So each operation on rows becomes
//! two, on the upper and on the lower half: two products of one right operand, each with its partial sums, one after the other.
//!
//! ```text
//! x = load [256, 128] at [r, k]              x0 = load [128, 128] at [r, k]    x1 = load [128, 128] at [r + 128, k]
//! p = x · load wᵀ                     =>     p0 = x0 · load wᵀ                 p1 = x1 · load wᵀ
//! y = store [256, 128] at [r, n]             store at [r, n]                   store at [r + 128, n]
//! ```
//!
//! Which axes are rows follows from the products: the first of their left operands and of their results, and what these are computed
//! from and used for. A program that does with rows what halves cannot do each by itself is left alone.

use super::plan::for_each;
use super::values::plus;
use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, Op, Program, Region, TileType, Type, ValueId, operands};
use std::collections::HashMap;

/// The same program with tiles of half as many rows, twice; none if it cannot be split.
pub fn halves(program: &Program) -> Option<Program> {
    let axes = Axes::of(program)?;
    let (types, half) = (program.types.clone(), axes.rows / 2);
    let mut split = Split { types, axes: axes.found, half, lower: HashMap::new(), sums: HashMap::new() };
    let body = split.region(&program.body)?;
    Some(Program { types: split.types, body, ..program.clone() })
}

/// Which axis of each value is rows.
struct Axes<'a> {
    program: &'a Program,
    rows: u32,
    found: HashMap<ValueId, usize>,
    /// Whether a value has two, or one that is no rows.
    clash: bool,
}

impl Axes<'_> {
    fn of(program: &Program) -> Option<Axes<'_>> {
        let mut axes = Axes { program, rows: 0, found: HashMap::new(), clash: false };
        for inst in insts(&program.body) {
            if let Op::Dot { a, .. } = inst.op {
                axes.rows = program.tile(a)?.shape[0];
                axes.note(a, 0);
            }
        }
        loop {
            let before = axes.found.len();
            axes.pass(&program.body);
            if axes.clash || axes.found.len() == before {
                break;
            }
        }
        (!axes.clash && axes.rows.is_multiple_of(2)).then_some(axes)
    }

    fn note(&mut self, v: ValueId, axis: usize) {
        let fits = self.program.tile(v).is_some_and(|t| t.shape.get(axis) == Some(&self.rows));
        self.clash |= !fits || *self.found.entry(v).or_insert(axis) != axis;
    }

    /// What is known of one of these is so of all.
    fn alike(&mut self, values: &[ValueId]) {
        if let Some(axis) = values.iter().find_map(|v| self.found.get(v).copied()) {
            values.iter().for_each(|&v| self.note(v, axis));
        }
    }

    fn pass(&mut self, region: &Region) {
        for inst in &region.insts {
            let result = inst.results.first().copied();
            match (&inst.op, result) {
                (Op::For { init, body, .. }, _) => {
                    for (i, &v) in init.iter().enumerate() {
                        self.alike(&[v, body.args[i + 1], body.yields[i], inst.results[i]]);
                    }
                    self.pass(body);
                }
                (Op::Dot { a, acc, .. }, Some(r)) => {
                    self.alike(&[*a, r]);
                    acc.iter().for_each(|&acc| self.alike(&[acc, r]));
                }
                (Op::Gather { rows, .. }, Some(r)) if self.found.get(&r) == Some(&0) => self.note(*rows, 0),
                (Op::Gather { rows, .. }, Some(r)) if self.found.contains_key(rows) => self.note(r, 0),
                (Op::Scatter { rows, value, .. }, _) => self.alike(&[*rows, *value]),
                (Op::Map { inputs, .. }, Some(r)) => {
                    let known = inputs.iter().chain([&r]).find_map(|v| self.found.get(v).copied());
                    let Some(axis) = known else { continue };
                    self.note(r, axis);
                    let wide = |v: &&ValueId| {
                        self.program.tile(**v).is_some_and(|t| t.shape.get(axis).is_some_and(|&n| n > 1))
                    };
                    inputs
                        .iter()
                        .filter(wide)
                        .copied()
                        .collect::<Vec<_>>()
                        .into_iter()
                        .for_each(|v| self.note(v, axis));
                }
                (Op::Reduce { x, .. }, Some(r)) => self.alike(&[*x, r]),
                (Op::Reshape { x, .. }, Some(r)) => {
                    let pairs = [(*x, r), (r, *x)];
                    for (from, to) in pairs {
                        if let Some(&axis) = self.found.get(&from) {
                            let to_axis = self.same_axis(from, axis, to);
                            self.clash |= to_axis.is_none();
                            to_axis.into_iter().for_each(|axis| self.note(to, axis));
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// The axis of `to`, a reshape, that is this axis of `from`.
    fn same_axis(&self, from: ValueId, axis: usize, to: ValueId) -> Option<usize> {
        let (from, to) = (self.program.tile(from)?, self.program.tile(to)?);
        let before = |shape: &[u32], axis: usize| shape[..axis].iter().product::<u32>();
        let same = |d: &usize| to.shape[*d] == self.rows && before(&to.shape, *d) == before(&from.shape, axis);
        (0..to.shape.len()).find(same)
    }
}

/// All instructions, those of loops included.
fn insts(region: &Region) -> Vec<&Inst> {
    let mut all = Vec::new();
    for_each(region, &mut |inst| all.push(inst));
    all
}

struct Split {
    types: Vec<Type>,
    /// The axis of rows of the program's values, where they have one.
    axes: HashMap<ValueId, usize>,
    half: u32,
    /// Lower halves by the upper ones, which keep the value's number.
    lower: HashMap<ValueId, ValueId>,
    /// Indices of lower halves that are computed in the region at hand.
    sums: HashMap<ValueId, ValueId>,
}

impl Split {
    fn region(&mut self, region: &Region) -> Option<Region> {
        let before = std::mem::take(&mut self.sums);
        let args = self.both(&region.args);
        let mut insts = Vec::new();
        for inst in &region.insts {
            self.inst(inst, &mut insts)?;
        }
        self.sums = before;
        Some(Region { args, insts, yields: self.both_of(&region.yields) })
    }

    /// A shape with half of the rows.
    fn halved(&self, shape: &[u32], axis: usize) -> Vec<u32> {
        let mut shape = shape.to_vec();
        shape[axis] = self.half;
        shape
    }

    /// Defines values: each that has rows gets its upper half's type, and a lower half.
    fn both(&mut self, values: &[ValueId]) -> Vec<ValueId> {
        for &v in values {
            if let (Some(&axis), Type::Tile(t)) = (self.axes.get(&v), self.types[v.0 as usize].clone()) {
                let half = Type::Tile(TileType { shape: self.halved(&t.shape, axis), ..t });
                self.types[v.0 as usize] = half.clone();
                self.types.push(half);
                self.lower.insert(v, ValueId(self.types.len() as u32 - 1));
            }
        }
        self.both_of(values)
    }

    fn both_of(&self, values: &[ValueId]) -> Vec<ValueId> {
        values.iter().flat_map(|v| [Some(*v), self.lower.get(v).copied()]).flatten().collect()
    }

    fn inst(&mut self, inst: &Inst, out: &mut Vec<Inst>) -> Option<()> {
        if let Op::For { lo, hi, step, init, body } = &inst.op {
            let (init, body) = (self.both_of(init), self.region(body)?);
            let op = Op::For { lo: *lo, hi: *hi, step: *step, init, body };
            out.push(Inst { results: self.both(&inst.results), op });
            return Some(());
        }
        if let Op::If { .. } = inst.op {
            return None;
        }
        if !operands(&inst.op).iter().chain(&inst.results).any(|v| self.axes.contains_key(v)) {
            out.push(inst.clone());
            return Some(());
        }
        self.both(&inst.results);
        let upper = self.half_of(inst, false, out)?;
        out.push(Inst { results: inst.results.clone(), op: upper });
        let lower = self.half_of(inst, true, out)?;
        let results = inst.results.iter().map(|r| self.lower.get(r).copied()).collect::<Option<_>>()?;
        out.push(Inst { results, op: lower });
        Some(())
    }

    /// What an instruction does for one half.
    fn half_of(&mut self, inst: &Inst, lower: bool, out: &mut Vec<Inst>) -> Option<Op> {
        let names: HashMap<ValueId, ValueId> = if lower { self.lower.clone() } else { HashMap::new() };
        let v = |v: &ValueId| *names.get(v).unwrap_or(v);
        let axis = |v: &ValueId| self.axes.get(v).copied();
        let own = inst.results.first().and_then(axis);
        Some(match &inst.op {
            Op::Full { value, shape } => Op::Full { value: *value, shape: self.halved(shape, own?) },
            Op::Iota { axis, shape } if lower && own == Some(*axis as usize) => {
                let shape = self.halved(shape, own?);
                let counted = self.fresh(DType::I32, shape.clone());
                out.push(Inst { results: vec![counted], op: Op::Iota { axis: *axis, shape } });
                plus(counted, self.half as i32)
            }
            Op::Iota { axis, shape } => Op::Iota { axis: *axis, shape: self.halved(shape, own?) },
            Op::Load { view, index, shape } => {
                let index = self.moved(index, own?, lower, out);
                Op::Load { view: *view, index, shape: self.halved(shape, own?) }
            }
            Op::Store { view, index, value } => {
                let index = self.moved(index, axis(value)?, lower, out);
                Op::Store { view: *view, index, value: v(value) }
            }
            Op::Gather { view, rows, index, shape } if own == Some(0) => {
                Op::Gather { view: *view, rows: v(rows), index: index.clone(), shape: self.halved(shape, 0) }
            }
            Op::Scatter { view, rows, index, value } if axis(value) == Some(0) => {
                Op::Scatter { view: *view, rows: v(rows), index: index.clone(), value: v(value) }
            }
            Op::Map { inputs, body } => Op::Map { inputs: inputs.iter().map(v).collect(), body: body.clone() },
            Op::Reduce { x, axis, kind } if own != Some(*axis as usize) => {
                Op::Reduce { x: v(x), axis: *axis, kind: *kind }
            }
            Op::Dot { a, b, acc, trans_b } if own == Some(0) && axis(b).is_none() => {
                Op::Dot { a: v(a), b: *b, acc: acc.as_ref().map(v), trans_b: *trans_b }
            }
            Op::Reshape { x, shape } => Op::Reshape { x: v(x), shape: self.halved(shape, own?) },
            _ => return None,
        })
    }

    /// The start of a half.
    fn moved(&mut self, index: &[Index], axis: usize, lower: bool, out: &mut Vec<Inst>) -> Vec<Index> {
        let mut index = index.to_vec();
        if lower {
            index[axis] = match index[axis] {
                Index::Const(n) => Index::Const(n + i64::from(self.half)),
                Index::Value(v) => Index::Value(match self.sums.get(&v) {
                    Some(&known) => known,
                    None => {
                        let sum = self.fresh(DType::I32, Vec::new());
                        out.push(Inst { results: vec![sum], op: plus(v, self.half as i32) });
                        self.sums.insert(v, sum);
                        sum
                    }
                }),
            };
        }
        index
    }

    fn fresh(&mut self, dtype: DType, shape: Vec<u32>) -> ValueId {
        self.types.push(Type::Tile(TileType { dtype, shape }));
        ValueId(self.types.len() as u32 - 1)
    }
}
