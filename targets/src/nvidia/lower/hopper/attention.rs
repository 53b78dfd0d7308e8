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
//! Nothing is asked of what the maps compute. What stands around the loop may be anything that each thread can do for its own elements.

use super::contraction::{Operand, definitions, product_loops, products, source};
use dsc_ir::DType;
use dsc_ir::tile::{Index, Inst, Op, Program, Region, Scalar, ValueId};
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

impl<'a> Attention<'a> {
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
