//! Symbolic dims: sizes that are known only when a step runs.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A size that a step binds. Every step of a model is described with these and constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Sym {
    /// Tokens fed in this step, over all sequences.
    T,
    /// Sequences in this step (rows of the page table).
    S,
    /// Page-table entries a sequence (columns of the page table).
    P,
    /// Rows of the step whose logits are wanted.
    L,
    /// Pages in a cache.
    N,
    /// Longest context of this step in tokens, including the tokens fed.
    C,
}

impl Sym {
    /// Every symbol, in the order of [`SymValues`].
    pub const ALL: [Sym; 6] = [Sym::T, Sym::S, Sym::P, Sym::L, Sym::N, Sym::C];

    /// One capital letter.
    pub const fn name(self) -> &'static str {
        ["T", "S", "P", "L", "N", "C"][self as usize]
    }

    /// The symbol of that [`name`](Sym::name).
    pub fn from_name(name: &str) -> Option<Sym> {
        Sym::ALL.into_iter().find(|s| s.name() == name)
    }
}

/// What each symbol is in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SymValues(pub [u32; 6]);

impl SymValues {
    /// The value of `sym`.
    pub fn get(&self, sym: Sym) -> u32 {
        self.0[sym as usize]
    }

    /// The same values with `sym` bound to `value`.
    pub fn with(mut self, sym: Sym, value: u32) -> SymValues {
        self.0[sym as usize] = value;
        self
    }
}

/// The size of one dim: a constant, or a constant times a symbol.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// The constant factor.
    pub factor: u32,
    /// The symbol, if the size is not constant.
    pub sym: Option<Sym>,
}

impl Extent {
    /// `self * factor`.
    pub fn times(self, factor: u32) -> Extent {
        Extent { factor: self.factor * factor, sym: self.sym }
    }

    /// The size as a constant, if it is one.
    pub fn constant(self) -> Option<u32> {
        self.sym.is_none().then_some(self.factor)
    }

    /// The size once the symbols are bound.
    pub fn eval(self, syms: &SymValues) -> u64 {
        u64::from(self.factor) * self.sym.map_or(1, |s| u64::from(syms.get(s)))
    }
}

impl From<u32> for Extent {
    fn from(factor: u32) -> Extent {
        Extent { factor, sym: None }
    }
}

impl From<Sym> for Extent {
    fn from(sym: Sym) -> Extent {
        Extent { factor: 1, sym: Some(sym) }
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.sym, self.factor) {
            (None, n) => write!(f, "{n}"),
            (Some(s), 1) => f.write_str(s.name()),
            (Some(s), n) => write!(f, "{n}*{}", s.name()),
        }
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The size of one grid axis: `ceil(extent / tile)` blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GridDim {
    /// What is divided among the blocks.
    pub extent: Extent,
    /// How much of it one block takes; at least 1.
    pub tile: u32,
}

impl GridDim {
    /// The number of blocks once the symbols are bound.
    pub fn eval(self, syms: &SymValues) -> u64 {
        self.extent.eval(syms).div_ceil(u64::from(self.tile.max(1)))
    }
}

impl fmt::Display for GridDim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.extent, self.tile)
    }
}
