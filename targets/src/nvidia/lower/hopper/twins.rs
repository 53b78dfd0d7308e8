//! Weighted sums over groups of rows, whose groups are made in two halves.
//!
//! One product of all rows leaves nothing to multiply while its sums are made. So the groups become two halves with a product each, both
//! of the same streamed operand: while one is summed the other is under way.
//!
//! ```text
//! a = load x                 [R·H, k]        a0 = load x, a1 = load x at R/2     [R/2·H, k] each
//! for j in lo..hi {                          for j in lo..hi {
//!     b = load y at j        [64, k]             b = load y at j
//!     s = Σ map(a · bᵀ)      [R, 64]     =>      p0 = a0 · bᵀ, p1 = a1 · bᵀ
//!     store s                                    store Σ map(p0), then store Σ map(p1) at R/2
//! }                                          }
//! ```
//!
//! Tiles whose first axis has as many elements as there are groups or rows are of groups; in every such tile the first half of the elements is
//! that of the first groups.

use super::contraction::definitions;
use super::plan::for_each;
use super::values::{plus, slice};
use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, Op, Program, Region, TileType, Type, ValueId, operands};
use std::collections::{HashMap, HashSet};

/// The same program with the groups in two halves; none if something of it is not of one half or the other. `dot` is its product, of
/// so many groups and rows.
pub fn twins(program: &Program, dot: ValueId, [groups, rows]: [u32; 2]) -> Option<Program> {
    let mut made = HashSet::from([dot]);
    follow(&program.body, &mut made);
    let types = program.types.clone();
    let mut twins = Twins { types, sizes: [groups, rows], made, halves: HashMap::new() };
    let mut body = twins.region(&program.body)?;
    let used = used(&body);
    strip(&mut body, &used);
    Some(Program { types: twins.types, body, ..program.clone() })
}

/// Adds what is computed from these values.
fn follow(region: &Region, made: &mut HashSet<ValueId>) {
    for inst in &region.insts {
        match &inst.op {
            Op::For { body, .. } => follow(body, made),
            op if operands(op).iter().any(|v| made.contains(v)) => made.extend(inst.results.iter().copied()),
            _ => {}
        }
    }
}

/// What stores and the bounds of loops need.
fn used(region: &Region) -> HashSet<ValueId> {
    let (mut defs, mut roots) = (HashMap::new(), Vec::new());
    definitions(region, &mut defs);
    for_each(region, &mut |inst| {
        if let Op::For { .. } | Op::Store { .. } = inst.op {
            roots.extend(operands(&inst.op));
        }
    });
    slice(&defs, roots, |_| false)
}

/// Leaves out what nothing uses.
fn strip(region: &mut Region, used: &HashSet<ValueId>) {
    region.insts.retain(|i| i.results.is_empty() || i.results.iter().any(|r| used.contains(r)));
    for inst in &mut region.insts {
        if let Op::For { body, .. } = &mut inst.op {
            strip(body, used);
        }
    }
}

struct Twins {
    types: Vec<Type>,
    /// Groups, and rows of all of them.
    sizes: [u32; 2],
    /// The product, and what is made of it.
    made: HashSet<ValueId>,
    /// Both halves of values of groups.
    halves: HashMap<ValueId, [ValueId; 2]>,
}

impl Twins {
    fn region(&mut self, region: &Region) -> Option<Region> {
        let mut insts = Vec::new();
        // All that is made of the product comes by halves, behind both products.
        let [mut products, mut behind] = [(); 2].map(|()| [Vec::new(), Vec::new()]);
        for inst in &region.insts {
            if let Op::For { lo, hi, step, init, body } = &inst.op {
                init.is_empty().then_some(())?;
                let op = Op::For { lo: *lo, hi: *hi, step: *step, init: Vec::new(), body: self.region(body)? };
                insts.push(Inst { results: Vec::new(), op });
                continue;
            }
            let late = inst.results.iter().chain(&operands(&inst.op)).any(|v| self.made.contains(v));
            let whole = match &inst.op {
                Op::Store { value, .. } => !self.is_of_groups(*value),
                _ => !inst.results.iter().any(|&r| self.is_of_groups(r)),
            };
            if whole {
                (!late).then_some(())?;
            }
            if !late {
                // Some use may be of all groups.
                let stays = !matches!(inst.op, Op::Store { .. }) || whole;
                insts.extend(stays.then(|| inst.clone()));
            }
            if whole {
                continue;
            }
            let results = inst.results.iter().map(|&r| self.split(r)).collect::<Option<Vec<_>>>()?;
            let product = matches!(inst.op, Op::Dot { .. });
            for half in 0..2 {
                let to = match (late, product) {
                    (true, true) => &mut products[half],
                    (true, false) => &mut behind[half],
                    _ => &mut insts,
                };
                let op = self.half(&inst.op, half, inst.results.first().copied(), to)?;
                to.push(Inst { results: results.iter().map(|r| r[half]).collect(), op });
            }
        }
        insts.extend(products.into_iter().chain(behind).flatten());
        Some(Region { args: region.args.clone(), insts, yields: region.yields.clone() })
    }

    fn is_of_groups(&self, v: ValueId) -> bool {
        matches!(&self.types[v.0 as usize], Type::Tile(t) if t.shape.first().is_some_and(|n| self.sizes.contains(n)))
    }

    /// Two values for a value of groups.
    fn split(&mut self, v: ValueId) -> Option<[ValueId; 2]> {
        let Type::Tile(t) = &self.types[v.0 as usize] else { return None };
        let half = Type::Tile(TileType { dtype: t.dtype, shape: halved(&t.shape) });
        let both = [0; 2].map(|_| {
            self.types.push(half.clone());
            ValueId(self.types.len() as u32 - 1)
        });
        self.halves.insert(v, both);
        Some(both)
    }

    /// What an instruction does for one half; what it needs for that goes in front.
    fn half(&mut self, op: &Op, half: usize, result: Option<ValueId>, before: &mut Vec<Inst>) -> Option<Op> {
        let halves = self.halves.clone();
        let v = |v: &ValueId| halves.get(v).map_or(*v, |h| h[half]);
        Some(match op {
            Op::Full { value, shape } => Op::Full { value: *value, shape: halved(shape) },
            Op::Iota { axis, shape } if *axis > 0 || half == 0 => Op::Iota { axis: *axis, shape: halved(shape) },
            Op::Iota { axis, shape } => {
                self.types.push(Type::Tile(TileType { dtype: DType::I32, shape: halved(shape) }));
                let counted = ValueId(self.types.len() as u32 - 1);
                before.push(Inst { results: vec![counted], op: Op::Iota { axis: *axis, shape: halved(shape) } });
                plus(counted, (shape[0] / 2) as i32)
            }
            Op::Load { view, index, shape } => {
                let index = self.moved(index, half as u32 * shape[0] / 2, before);
                Op::Load { view: *view, index, shape: halved(shape) }
            }
            Op::Store { view, index, value } => {
                let Type::Tile(t) = &self.types[value.0 as usize] else { return None };
                let index = self.moved(index, half as u32 * t.shape[0] / 2, before);
                Op::Store { view: *view, index, value: v(value) }
            }
            Op::Map { inputs, body } => Op::Map { inputs: inputs.iter().map(v).collect(), body: body.clone() },
            Op::Reduce { x, axis, kind } if *axis > 0 => Op::Reduce { x: v(x), axis: *axis, kind: *kind },
            Op::Reshape { x, shape } if halves.contains_key(x) => Op::Reshape { x: v(x), shape: halved(shape) },
            Op::Dot { a, b, acc: None, trans_b } if halves.contains_key(a) && !halves.contains_key(b) => {
                result.filter(|r| self.made.contains(r))?;
                Op::Dot { a: v(a), b: *b, acc: None, trans_b: *trans_b }
            }
            _ => return None,
        })
    }

    /// An index that many further along its first axis.
    fn moved(&mut self, index: &[Index], by: u32, before: &mut Vec<Inst>) -> Vec<Index> {
        let mut index = index.to_vec();
        match index.first_mut() {
            Some(Index::Const(n)) => *n += i64::from(by),
            Some(Index::Value(v)) if by > 0 => {
                self.types.push(Type::Tile(TileType::scalar(DType::I32)));
                let sum = ValueId(self.types.len() as u32 - 1);
                before.push(Inst { results: vec![sum], op: plus(*v, by as i32) });
                *v = sum;
            }
            _ => {}
        }
        index
    }
}

fn halved(shape: &[u32]) -> Vec<u32> {
    let mut shape = shape.to_vec();
    shape[0] /= 2;
    shape
}
