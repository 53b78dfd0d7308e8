//! Finds attention in a tile program: a loop over rounds of keys with two products of the same keys, and an online softmax between.
//!
//! ```text
//! for j in lo..hi (rows.., acc) {
//!     keys = gather ..                            and maps of gathers
//!     s = q · keysᵀ (+ q' · keys'ᵀ ..)
//!     weights, alpha, next rows = maps and reductions along rows of s and the carried rows
//!     acc · alpha + weights · keys                values are keys: the first columns of what scores are made of
//! }
//! ```
//!
//! Nothing is asked of what the maps compute, unless parts of the loop are to be joined ([`Attention::softmax`]). What stands around the loop may be anything that each thread can do for its own elements.

use super::contraction::{Operand, definitions, product_loops, products, source};
use super::values::arithmetic;
use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, MapArg, MapFn, MapInst, Op, Program, ReduceKind, Region, Scalar, ScalarOp, ValueId};
use std::collections::HashMap;

/// One product of the chain that makes scores.
#[derive(Clone, Debug)]
pub struct Score<'a> {
    /// The product.
    pub dot: &'a Inst,
    /// Where the queries come from.
    pub queries: Operand<'a>,
    /// `[keys, columns]`.
    pub keys: ValueId,
    /// Columns of both.
    pub columns: u32,
}

/// The attention of a program.
#[derive(Clone, Debug)]
pub struct Attention<'a> {
    /// The loop over rounds of keys.
    pub key_loop: &'a Inst,
    /// Its bounds and step.
    pub range: (Index, Index, u32),
    /// Its body.
    pub body: &'a Region,
    /// What makes the scores, in order; each adds to the one before.
    pub scores: Vec<Score<'a>>,
    /// The product of weights and values.
    pub values: &'a Inst,
    /// Its left operand.
    pub weights: ValueId,
    /// Its right operand: the keys of a score.
    pub keys: ValueId,
    /// What rescales the accumulator.
    pub rescale: &'a Inst,
    /// Which of the carried values is the accumulator.
    pub acc: usize,
    /// Heads, keys of a round, columns of the values.
    pub shape: [u32; 3],
    /// Type of all operands.
    pub dtype: DType,
}

/// Rows that an online softmax in powers of two carries, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Softmax {
    /// The largest score so far, or what powers are relative to where that follows it rarely.
    pub largest: usize,
    /// The sum of the weights.
    pub total: usize,
}

impl<'a> Attention<'a> {
    /// The carried rows, if they and the accumulator are those of an online softmax and nothing else is carried: then what disjoint parts of the
    /// loop end with are joined as its rounds are.
    ///
    /// ```text
    /// m' = max(m, max s)   α = 2^(m − m')   p = 2^(s − m')   l' = l α + Σ p   acc' = acc α + p · v
    /// ```
    pub fn softmax(&self, program: &Program, defs: &HashMap<ValueId, &'a Inst>) -> Option<Softmax> {
        let arg = MapArg::Input;
        let made = |v: ValueId, insts: &[MapInst]| match &defs.get(&v)?.op {
            Op::Map { inputs, body: MapFn { insts: own, result } } => {
                (own == insts && *result == MapArg::Inst(insts.len() as u32 - 1)).then_some(inputs.as_slice())
            }
            _ => None,
        };
        let reduced = |v: ValueId, wanted: ReduceKind| match defs.get(&v)?.op {
            Op::Reduce { x, axis: 1, kind } if kind == wanted => Some(x),
            _ => None,
        };
        let power = [arithmetic(ScalarOp::Sub, &[arg(0), arg(1)]), arithmetic(ScalarOp::Exp2, &[MapArg::Inst(0)])];
        let &[acc, alpha] = made(self.rescale.results[0], &[arithmetic(ScalarOp::Mul, &[arg(0), arg(1)])])? else {
            return None;
        };
        let &[before, largest] = made(alpha, &power)? else { return None };
        let (carried, yields) = (&self.body.args[1..], &self.body.yields);
        let at = carried.iter().position(|&v| v == before)?;
        let total = (0..carried.len()).find(|&i| i != at && i != self.acc)?;
        // The base becomes the largest score; or an integer near it, or stays.
        let always = made(largest, &[arithmetic(ScalarOp::Max, &[arg(0), arg(1)])]);
        let rarely = match &defs.get(&largest)?.op {
            Op::Map { inputs, body } => match body.insts.as_slice() {
                [above, far, is, whole, more, rounded, next]
                    if [far, whole].iter().all(|c| matches!(c.op, ScalarOp::Const(Scalar::F32(_))))
                        && *above == arithmetic(ScalarOp::Sub, &[arg(1), arg(0)])
                        && *is == arithmetic(ScalarOp::Lt, &[MapArg::Inst(1), MapArg::Inst(0)])
                        && *more == arithmetic(ScalarOp::Add, &[arg(1), MapArg::Inst(3)])
                        && *rounded == arithmetic(ScalarOp::Sub, &[MapArg::Inst(4), MapArg::Inst(3)])
                        && *next == arithmetic(ScalarOp::Select, &[MapArg::Inst(2), MapArg::Inst(5), arg(0)])
                        && body.result == MapArg::Inst(6) =>
                {
                    Some(inputs.as_slice())
                }
                _ => None,
            },
            _ => None,
        };
        let &[old, here] = always.or(rarely)? else { return None };
        let scores = reduced(here, ReduceKind::Max)?;
        let sum = [arithmetic(ScalarOp::Mul, &[arg(0), arg(1)]), arithmetic(ScalarOp::Add, &[MapArg::Inst(0), arg(2)])];
        let &[counted, factor, more] = made(yields[total], &sum)? else { return None };
        let weights = reduced(more, ReduceKind::Sum)?;
        let &[exponents, most] = made(weights, &power)? else { return None };
        let narrow = made(self.weights, &[arithmetic(ScalarOp::Cast(self.dtype), &[arg(0)])]);
        let rows = |v: ValueId| program.tile(v).is_some_and(|t| t.shape == [self.shape[0], 1]);
        let chained = acc == carried[self.acc]
            && old == before
            && yields[at] == largest
            && counted == carried[total]
            && factor == alpha
            && exponents == scores
            && most == largest
            && (self.weights == weights || narrow == Some(&[weights]));
        let empty = |i: usize, wanted: &dyn Fn(f32) -> bool| {
            let Op::For { init, .. } = &self.key_loop.op else { return false };
            let full = defs.get(&init[i]).map(|i| &i.op);
            matches!(full, Some(Op::Full { value: Scalar::F32(x), .. }) if wanted(*x)) && rows(carried[i])
        };
        let begins = empty(at, &|x| x.is_finite() && x < 0.0) && empty(total, &|x| x == 0.0);
        (chained && begins && carried.len() == 3).then_some(Softmax { largest: at, total })
    }

    /// The attention of a program whose products are all in one such loop.
    pub fn of(program: &'a Program) -> Option<Attention<'a>> {
        let mut loops = Vec::new();
        product_loops(&program.body, &mut loops);
        let &[(key_loop, body)] = loops.as_slice() else { return None };
        // Roles go through the loop on their own: it stands by itself in the program.
        program.body.insts.iter().any(|i| i.results == key_loop.results).then_some(())?;
        let Op::For { lo, hi, step, init, .. } = &key_loop.op else { return None };
        let mut defs = HashMap::new();
        definitions(&program.body, &mut defs);
        let carried = body.args.get(1..)?;
        let mut dots = body.insts.iter().filter(|i| matches!(i.op, Op::Dot { .. }));
        let (mut scores, mut before) = (Vec::new(), None);
        let values = loop {
            let dot = dots.next()?;
            let Op::Dot { a, b, acc, trans_b } = dot.op else { return None };
            if !trans_b {
                break dot;
            }
            (acc == before).then_some(())?;
            before = Some(dot.results[0]);
            let columns = *program.tile(a)?.shape.get(1)?;
            scores.push(Score { dot, queries: source(program, &defs, a)?, keys: b, columns });
        };
        let Op::Dot { a: weights, b: keys, acc: Some(scaled), .. } = values.op else { return None };
        let alone = dots.next().is_none() && products(&program.body) == scores.len() + 1;
        let acc = body.yields.iter().position(|&y| y == values.results[0])?;
        let rescale = *defs.get(&scaled)?;
        let rescales = matches!(&rescale.op, Op::Map { inputs, .. } if inputs.contains(carried.get(acc)?));
        let zero = matches!(defs.get(init.get(acc)?)?.op, Op::Full { value: Scalar::F32(x), .. } if x == 0.0);
        let (p, v) = (program.tile(weights)?, program.tile(keys)?);
        let &[heads, count] = p.shape.as_slice() else { return None };
        let &[rows, columns] = v.shape.as_slice() else { return None };
        let alike = |s: &Score<'_>| {
            let dtype = |v: ValueId| program.tile(v).map(|t| t.dtype);
            dtype(s.keys) == Some(v.dtype) && s.queries.gathered.is_none() && s.queries.rows == heads
        };
        let fits = rows == count && p.dtype == v.dtype && matches!(v.dtype, DType::Bf16 | DType::F16);
        let shared = scores.iter().any(|s| s.keys == keys) && scores.iter().all(alike);
        (alone && rescales && zero && fits && shared).then_some(Attention {
            key_loop,
            range: (*lo, *hi, *step),
            body,
            scores,
            values,
            weights,
            keys,
            rescale,
            acc,
            shape: [heads, count, columns],
            dtype: v.dtype,
        })
    }

    /// The accumulator of a round's start.
    pub fn carried_acc(&self) -> ValueId {
        self.body.args[1 + self.acc]
    }

    /// Whether a value is a product.
    pub fn is_product(&self, v: ValueId) -> bool {
        self.values.results[0] == v || self.scores.iter().any(|s| s.dot.results[0] == v)
    }
}
