//! What a kernel has to do, whatever does it: products to compute and bytes to move, as formulas in a step's symbols.
//!
//! The formulas are floors, from the ops that a kernel runs rather than from its program: every operand element that is needed is
//! moved once, every result once, intermediate results inside a kernel not at all; FLOP are those of matrix products (two a
//! multiplication and addition), the rest is not counted. Divided by a device's rates they say how fast a kernel could be.
//!
//! Where the true number depends on data, the formula says what is certain or usual: sequences of a step are equally long,
//! experts are chosen as differently as they can be, the tokens of one sequence select the same keys.

use crate::dtype::DType;
use crate::extent::{Extent, Sym, SymValues};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The formulas of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Work {
    /// FLOP of matrix products, with the smallest type that holds both operands: the rate of the multipliers depends on it.
    pub flop: Vec<(DType, Term)>,
    /// Bytes read and written.
    pub bytes: Vec<Term>,
}

/// A product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// The constant factor.
    pub factor: u64,
    /// The others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub counts: Vec<Count>,
    /// The term is 0 in steps whose longest context is at most this.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub context_above: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// A number that a step decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Count {
    /// A symbol.
    Sym(Sym),
    /// An extent, but at most so much.
    AtMost(Extent, u32),
    /// Pairs of a token and a key that it sees: of each token the positions up to its own, at most so many.
    Pairs(u32),
}

impl Count {
    fn eval(self, syms: &SymValues) -> f64 {
        match self {
            Count::Sym(sym) => f64::from(syms.get(sym)),
            Count::AtMost(extent, most) => extent.eval(syms).min(u64::from(most)) as f64,
            Count::Pairs(most) => pairs(syms, f64::from(most)),
        }
    }
}

/// `Σ min(position + 1, most)` over the tokens of a step whose sequences are equally long.
fn pairs(syms: &SymValues, most: f64) -> f64 {
    let sequences = f64::from(syms.get(Sym::S)).max(1.0);
    let (tokens, context) = (f64::from(syms.get(Sym::T)) / sequences, f64::from(syms.get(Sym::C)));
    // The first `growing` tokens see fewer keys than `most`: one more each.
    let first = (context - tokens + 1.0).max(1.0);
    let growing = (most - first).clamp(0.0, tokens);
    sequences * (growing * first + growing * (growing - 1.0) / 2.0 + (tokens - growing) * most.min(context))
}

impl Term {
    /// `factor` times all `extents`.
    pub fn of(factor: u64, extents: &[Extent]) -> Term {
        let constant = extents.iter().fold(factor, |n, e| n.saturating_mul(u64::from(e.factor)));
        let counts = extents.iter().filter_map(|e| e.sym).map(Count::Sym).collect();
        Term { factor: constant, counts, context_above: 0 }
    }

    /// The same times `count`.
    pub fn times(mut self, count: Count) -> Term {
        self.counts.push(count);
        self
    }

    /// Its value in a step.
    pub fn eval(&self, syms: &SymValues) -> f64 {
        if self.context_above > 0 && syms.get(Sym::C) <= self.context_above {
            return 0.0;
        }
        self.counts.iter().fold(self.factor as f64, |n, c| n * c.eval(syms))
    }
}

impl Work {
    /// The numbers of one step.
    pub fn eval(&self, syms: &SymValues) -> Cost {
        let mut cost = Cost { bytes: self.bytes.iter().map(|t| t.eval(syms)).sum(), ..Cost::default() };
        for (dtype, term) in &self.flop {
            *cost.flop.entry(*dtype).or_default() += term.eval(syms);
        }
        cost
    }
}

/// Work in numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// FLOP by operand type.
    pub flop: BTreeMap<DType, f64>,
    /// Bytes moved.
    pub bytes: f64,
}

impl Cost {
    /// FLOP of all types.
    pub fn all_flop(&self) -> f64 {
        self.flop.values().sum()
    }
}

impl std::ops::AddAssign<&Cost> for Cost {
    fn add_assign(&mut self, other: &Cost) {
        self.bytes += other.bytes;
        for (dtype, flop) in &other.flop {
            *self.flop.entry(*dtype).or_default() += flop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(tokens: u32, sequences: u32, context: u32) -> SymValues {
        SymValues::default().with(Sym::T, tokens).with(Sym::S, sequences).with(Sym::C, context)
    }

    #[test]
    fn pairs_are_those_of_each_token() {
        for (tokens, sequences, context) in [(1, 1, 1), (1, 1, 90), (16, 16, 90), (7, 1, 7), (40, 1, 90), (40, 2, 33)] {
            for most in [1, 5, 33, 60, 89, 90, u32::MAX] {
                let each = tokens / sequences;
                let wanted: u32 = (context - each + 1..=context).map(|keys| keys.min(most)).sum::<u32>() * sequences;
                let got = Count::Pairs(most).eval(&step(tokens, sequences, context));
                assert_eq!(got, f64::from(wanted), "{tokens} {sequences} {context} {most}");
            }
        }
    }

    #[test]
    fn terms_are_products() {
        let syms = step(3, 2, 10);
        assert_eq!(Term::of(2, &[Sym::T.into(), 5.into()]).eval(&syms), 30.0);
        assert_eq!(Term::of(2, &[]).times(Count::AtMost(Extent::from(Sym::T).times(8), 16)).eval(&syms), 32.0);
        let scored = Term { context_above: 10, ..Term::of(1, &[Sym::C.into()]) };
        assert_eq!((scored.eval(&syms), scored.eval(&step(3, 2, 11))), (0.0, 11.0));
        let work = Work {
            flop: vec![(DType::Bf16, Term::of(4, &[])), (DType::Bf16, Term::of(1, &[Sym::T.into()]))],
            bytes: vec![Term::of(1, &[]); 2],
        };
        assert_eq!(work.eval(&syms), Cost { flop: [(DType::Bf16, 7.0)].into(), bytes: 2.0 });
    }

    #[test]
    fn numbers_beyond_reason_do_not_overflow() {
        let most = Extent { factor: u32::MAX, sym: Some(Sym::C) };
        let syms = SymValues([u32::MAX; 6]);
        assert!(Term::of(u64::MAX, &[most; 4]).times(Count::Pairs(7)).eval(&syms).is_finite());
        assert!(Count::AtMost(most, 3).eval(&syms) == 3.0 && Count::Pairs(0).eval(&SymValues::default()) == 0.0);
    }
}
