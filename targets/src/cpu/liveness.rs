//! When a value is last used, so that its memory can be taken over or freed.
//!
//! Instructions are numbered in the order in which the lowering visits them; the end of a region (its yields) and the end of
//! a loop have numbers of their own. A use inside a loop of a value defined outside counts as a use at the loop's end as
//! well, since the next round needs it again. The two arms of an [`Op::If`] exclude each other: while one is
//! lowered, uses in the other do not count ([`Liveness::used_after`] takes the excluded ranges).

use dsc_ir::tile::{Index, Op, Program, Region, ValueId};
use std::collections::HashMap;
use std::ops::Range;

/// What is known of an [`Op::For`] or [`Op::If`], by its number.
#[derive(Clone, Debug, Default)]
pub(crate) struct Nested {
    /// Whether it stores to memory.
    pub(crate) stores: bool,
    /// Numbers inside the second arm of an [`Op::If`].
    pub(crate) otherwise: Range<u32>,
}

/// Uses of every value.
#[derive(Default)]
pub(crate) struct Liveness {
    uses: HashMap<ValueId, Vec<u32>>,
    nested: HashMap<u32, Nested>,
    next: u32,
}

impl Liveness {
    pub(crate) fn new(program: &Program) -> Liveness {
        let mut l = Liveness::default();
        l.region(&program.body);
        l
    }

    /// Whether `v` has exactly one use, where it is defined (not inside a loop or arm below).
    pub(crate) fn single_use(&self, v: ValueId) -> bool {
        self.uses.get(&v).is_none_or(|u| u.len() <= 1)
    }

    /// Whether `v` is used at a number of at least `from` outside the `excluded` ranges.
    pub(crate) fn used_from(&self, v: ValueId, from: u32, excluded: &[Range<u32>]) -> bool {
        let counts = |p: u32| p >= from && !excluded.iter().any(|r| r.contains(&p));
        self.uses.get(&v).is_some_and(|u| u.iter().any(|&p| counts(p)))
    }

    /// The facts of the nested operation with that number.
    pub(crate) fn nested(&self, number: u32) -> Nested {
        self.nested.get(&number).cloned().unwrap_or_default()
    }

    fn number(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    /// Scans a region; gives the values used in it that come from outside, and whether it stores.
    fn region(&mut self, region: &Region) -> (Vec<ValueId>, bool) {
        let mut used = Vec::new();
        let mut defined: Vec<ValueId> = region.args.clone();
        let mut stores = false;
        for inst in &region.insts {
            let at = self.number();
            for v in operands(&inst.op) {
                self.uses.entry(v).or_default().push(at);
                used.push(v);
            }
            match &inst.op {
                Op::Store { .. } | Op::Scatter { .. } => stores = true,
                Op::For { body, .. } => {
                    let (inner, inner_stores) = self.region(body);
                    let end = self.number();
                    for &v in &inner {
                        self.uses.entry(v).or_default().push(end);
                    }
                    used.extend(inner);
                    self.nested.insert(at, Nested { stores: inner_stores, otherwise: 0..0 });
                    stores |= inner_stores;
                }
                Op::If { then, otherwise, .. } => {
                    let (inner, then_stores) = self.region(then);
                    used.extend(inner);
                    let start = self.next;
                    let (inner, other_stores) = self.region(otherwise);
                    used.extend(&inner);
                    // A second use keeps values from being evaluated lazily inside an arm.
                    let nested = Nested { stores: then_stores || other_stores, otherwise: start..self.next };
                    stores |= nested.stores;
                    self.nested.insert(at, nested);
                }
                _ => {}
            }
            defined.extend(&inst.results);
        }
        let end = self.number();
        for &v in &region.yields {
            self.uses.entry(v).or_default().push(end);
            used.push(v);
        }
        used.sort_unstable();
        used.dedup();
        let defined: std::collections::HashSet<ValueId> = defined.into_iter().collect();
        used.retain(|v| !defined.contains(v));
        (used, stores)
    }
}

/// The values an operation reads itself (not those its regions read).
pub(crate) fn operands(op: &Op) -> Vec<ValueId> {
    let mut out = Vec::new();
    let index = |i: &Index, out: &mut Vec<ValueId>| {
        if let Index::Value(v) = i {
            out.push(*v);
        }
    };
    match op {
        Op::BlockId { .. } | Op::Sym(_) | Op::Full { .. } | Op::Iota { .. } | Op::TopkInit { .. } => {}
        Op::Load { index: ix, .. } => ix.iter().for_each(|i| index(i, &mut out)),
        Op::Store { index: ix, value, .. } => {
            ix.iter().for_each(|i| index(i, &mut out));
            out.push(*value);
        }
        Op::Gather { rows, index: ix, .. } => {
            ix.iter().for_each(|i| index(i, &mut out));
            out.push(*rows);
        }
        Op::Scatter { rows, index: ix, value, .. } => {
            ix.iter().for_each(|i| index(i, &mut out));
            out.extend([*rows, *value]);
        }
        Op::Map { inputs, .. } => out.extend(inputs),
        Op::Reduce { x, .. } | Op::Scan { x, .. } => out.push(*x),
        Op::Dot { a, b, acc, .. } => {
            out.extend([*a, *b]);
            out.extend(acc);
        }
        Op::Reshape { x, .. } | Op::Permute { x, .. } | Op::Slice { x, .. } => out.push(*x),
        Op::Concat { xs, .. } => out.extend(xs),
        Op::TopkPush { state, values, base } => out.extend([*state, *values, *base]),
        Op::TopkTake { state } => out.push(*state),
        Op::For { lo, hi, init, .. } => {
            index(lo, &mut out);
            index(hi, &mut out);
            out.extend(init);
        }
        Op::If { cond, .. } => out.push(*cond),
    }
    out
}
