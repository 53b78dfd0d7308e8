//! What a tile is while code is generated: an expression over linear accesses.
//!
//! A tile is evaluated when something needs it in memory, not when it is defined. Until then it is an [`Expr`]: a tree of maps
//! over leaves, where a leaf is memory, coordinates or a constant, each a linear function of the element's index. Slices,
//! permutations and broadcasts only change the coefficients, so they cost nothing; a reshape does where the strides allow.
//!
//! Memory is a [`Slot`] of the worker's scratch, or, for a load that lies inside its view, the parameter itself
//! ([`Base::Param`]): weights are read where they are.
//!
//! Slots come from an [`Arena`] with static offsets. A slot is freed when its last reference goes, so its bytes are used again
//! by whatever is lowered later and a kernel's working set stays small.

use cranelift_codegen::ir::Value;
use dsc_ir::DType;
use dsc_ir::tile::{MapFn, Scalar};
use std::cell::RefCell;
use std::rc::Rc;

/// Bytes that a step along one axis moves: static, or known when the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coef {
    Const(i64),
    Value(Value),
}

impl Coef {
    pub(crate) const ZERO: Coef = Coef::Const(0);

    fn times(self, n: i64) -> Option<Coef> {
        match self {
            Coef::Const(c) => Some(Coef::Const(c * n)),
            Coef::Value(_) => (n == 1).then_some(self),
        }
    }
}

/// Free and used bytes of a worker's scratch.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    /// Free ranges below `end`, by offset, never touching.
    free: Vec<(u64, u64)>,
    end: u64,
}

impl Arena {
    /// Bytes a worker needs.
    pub(crate) fn bytes(&self) -> u64 {
        self.end
    }

    fn take(&mut self, bytes: u64) -> u64 {
        // Smallest range that fits: large ones stay whole.
        let fits = (0..self.free.len()).filter(|&i| self.free[i].1 >= bytes).min_by_key(|&i| self.free[i].1);
        if let Some(i) = fits {
            let (offset, length) = self.free[i];
            if length == bytes {
                self.free.remove(i);
            } else {
                self.free[i] = (offset + bytes, length - bytes);
            }
            return offset;
        }
        self.end += bytes;
        self.end - bytes
    }

    fn give_back(&mut self, offset: u64, bytes: u64) {
        let i = self.free.partition_point(|r| r.0 < offset);
        self.free.insert(i, (offset, bytes));
        if i + 1 < self.free.len() && self.free[i].0 + self.free[i].1 == self.free[i + 1].0 {
            self.free[i].1 += self.free[i + 1].1;
            self.free.remove(i + 1);
        }
        if i > 0 && self.free[i - 1].0 + self.free[i - 1].1 == self.free[i].0 {
            self.free[i - 1].1 += self.free[i].1;
            self.free.remove(i);
        }
    }
}

/// A part of the worker's scratch, freed when dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    arena: Rc<RefCell<Arena>>,
}

impl Slot {
    /// Room for `bytes`, aligned to a cache line.
    pub(crate) fn new(arena: &Rc<RefCell<Arena>>, bytes: u64) -> Rc<Slot> {
        let bytes = bytes.max(1).next_multiple_of(64);
        let offset = arena.borrow_mut().take(bytes);
        Rc::new(Slot { offset, bytes, arena: arena.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.arena.borrow_mut().give_back(self.offset, self.bytes);
    }
}

/// Where element zero of a memory access is.
#[derive(Clone, Debug)]
pub(crate) enum Base {
    /// In scratch, that many bytes into the slot.
    Slot(Rc<Slot>, i64),
    /// At an address in a parameter, or in the slot that holds a copy of it if it was not all inside the view.
    Param(Value, Option<Rc<Slot>>),
}

/// A strided access to memory.
#[derive(Clone, Debug)]
pub(crate) struct MemTile {
    pub(crate) base: Base,
    pub(crate) coefs: Vec<Coef>,
    pub(crate) dtype: DType,
}

impl MemTile {
    /// A row-major tile at the start of a slot.
    pub(crate) fn dense(slot: &Rc<Slot>, dtype: DType, shape: &[u32]) -> MemTile {
        MemTile { base: Base::Slot(slot.clone(), 0), coefs: dense_coefs(dtype, shape), dtype }
    }

    /// Whether it is row-major without gaps.
    pub(crate) fn is_dense(&self, shape: &[u32]) -> bool {
        let dense = dense_coefs(self.dtype, shape);
        (0..shape.len()).all(|d| shape[d] == 1 || self.coefs[d] == dense[d])
    }

    /// The slot, if it is the whole tile from the slot's start on.
    pub(crate) fn whole_slot(&self, shape: &[u32]) -> Option<&Rc<Slot>> {
        match &self.base {
            Base::Slot(slot, 0) if self.is_dense(shape) => Some(slot),
            _ => None,
        }
    }

    pub(crate) fn uses_slot(&self, slot: &Rc<Slot>) -> bool {
        match &self.base {
            Base::Slot(s, _) => Rc::ptr_eq(s, slot),
            Base::Param(_, copy) => copy.as_ref().is_some_and(|s| Rc::ptr_eq(s, slot)),
        }
    }
}

/// Bytes of an element in scratch.
pub(crate) fn element_bytes(dtype: DType) -> i64 {
    if dtype == DType::Bool { 4 } else { dtype.bytes() as i64 }
}

/// Byte strides of a row-major tile in scratch.
pub(crate) fn dense_coefs(dtype: DType, shape: &[u32]) -> Vec<Coef> {
    let mut stride = element_bytes(dtype);
    let mut coefs = vec![Coef::ZERO; shape.len()];
    for d in (0..shape.len()).rev() {
        coefs[d] = Coef::Const(stride);
        stride *= i64::from(shape[d]);
    }
    coefs
}

/// An operand of an expression.
#[derive(Clone, Debug)]
pub(crate) enum Leaf {
    Mem(MemTile),
    /// i32 `base + Σ index * coef`.
    Iota {
        base: i64,
        coefs: Vec<i64>,
    },
    /// The same element everywhere.
    Splat(Value, DType),
    Const(Scalar),
}

/// A map to be evaluated.
#[derive(Debug)]
pub(crate) struct MapNode {
    pub(crate) body: MapFn,
    /// Types of the instructions, then of the result.
    pub(crate) types: Vec<DType>,
    pub(crate) inputs: Vec<DType>,
}

/// An elementwise expression.
#[derive(Clone, Debug)]
pub(crate) enum Expr {
    Leaf(Leaf),
    Map(Rc<MapNode>, Vec<Expr>),
}

/// A tile of at least two elements.
#[derive(Clone, Debug)]
pub(crate) struct Tile {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u32>,
    pub(crate) expr: Expr,
}

impl Expr {
    /// The leaves in order of evaluation.
    pub(crate) fn leaves(&self) -> Vec<&Leaf> {
        match self {
            Expr::Leaf(leaf) => vec![leaf],
            Expr::Map(_, inputs) => inputs.iter().flat_map(Expr::leaves).collect(),
        }
    }

    /// Scalar operations an element takes.
    pub(crate) fn weight(&self) -> usize {
        match self {
            Expr::Leaf(_) => 1,
            Expr::Map(node, inputs) => node.body.insts.len() + inputs.iter().map(Expr::weight).sum::<usize>(),
        }
    }

    /// The same tree over other leaves; nothing if a leaf does not allow it.
    pub(crate) fn map_leaves(&self, f: &mut impl FnMut(&Leaf) -> Option<Leaf>) -> Option<Expr> {
        Some(match self {
            Expr::Leaf(leaf) => Expr::Leaf(f(leaf)?),
            Expr::Map(node, inputs) => {
                let inputs = inputs.iter().map(|x| x.map_leaves(f)).collect::<Option<Vec<_>>>()?;
                Expr::Map(node.clone(), inputs)
            }
        })
    }

    /// The memory it is, if it is not computed.
    pub(crate) fn memory(&self) -> Option<&MemTile> {
        match self {
            Expr::Leaf(Leaf::Mem(m)) => Some(m),
            _ => None,
        }
    }

    /// Whether it reads a parameter.
    pub(crate) fn reads_param(&self) -> bool {
        self.leaves().iter().any(|l| matches!(l, Leaf::Mem(MemTile { base: Base::Param(..), .. })))
    }

    pub(crate) fn uses_slot(&self, slot: &Rc<Slot>) -> bool {
        self.leaves().iter().any(|l| matches!(l, Leaf::Mem(m) if m.uses_slot(slot)))
    }

    /// Whether every access to `slot` is element by element, as the tile would be stored there.
    pub(crate) fn aligned_with(&self, slot: &Rc<Slot>, shape: &[u32], dtype: DType) -> bool {
        self.leaves().iter().all(|l| match l {
            Leaf::Mem(m) if m.uses_slot(slot) => {
                m.whole_slot(shape).is_some() && element_bytes(m.dtype) == element_bytes(dtype)
            }
            _ => true,
        })
    }
}

impl Leaf {
    /// Applies `f` to the coefficients of an access; constants stay.
    fn with_coefs(
        &self,
        mem: impl FnOnce(&[Coef]) -> Option<Vec<Coef>>,
        iota: impl FnOnce(&[Coef]) -> Option<Vec<Coef>>,
    ) -> Option<Leaf> {
        Some(match self {
            Leaf::Mem(m) => Leaf::Mem(MemTile { coefs: mem(&m.coefs)?, ..m.clone() }),
            Leaf::Iota { base, coefs } => {
                let coefs: Vec<Coef> = coefs.iter().map(|&c| Coef::Const(c)).collect();
                let constant = |c: Coef| match c {
                    Coef::Const(c) => Some(c),
                    Coef::Value(_) => None,
                };
                Leaf::Iota { base: *base, coefs: iota(&coefs)?.into_iter().map(constant).collect::<Option<_>>()? }
            }
            other => other.clone(),
        })
    }

    /// Repeats axes of size 1 along the axes of `to`.
    pub(crate) fn broadcast(&self, from: &[u32], to: &[u32]) -> Leaf {
        let f = |coefs: &[Coef]| {
            Some((0..to.len()).map(|d| if from[d] == 1 && to[d] != 1 { Coef::ZERO } else { coefs[d] }).collect())
        };
        self.with_coefs(f, f).expect("broadcasting keeps every access linear")
    }

    pub(crate) fn permute(&self, perm: &[u32]) -> Leaf {
        let f = |coefs: &[Coef]| Some(perm.iter().map(|&p| coefs[p as usize]).collect());
        self.with_coefs(f, f).expect("permuting keeps every access linear")
    }

    /// The same elements in another shape, if the strides allow it.
    pub(crate) fn reshape(&self, from: &[u32], to: &[u32]) -> Option<Leaf> {
        let f = |coefs: &[Coef]| reshape_coefs(from, coefs, to);
        self.with_coefs(f, f)
    }
}

/// Strides under another shape: axes are split freely, and joined where they are contiguous.
fn reshape_coefs(from: &[u32], coefs: &[Coef], to: &[u32]) -> Option<Vec<Coef>> {
    // Axes of size 1 carry no stride.
    let old: Vec<(i64, Coef)> =
        from.iter().zip(coefs).filter(|(n, _)| **n != 1).map(|(&n, &c)| (i64::from(n), c)).collect();
    let mut out = vec![Coef::ZERO; to.len()];
    let new: Vec<usize> = (0..to.len()).filter(|&d| to[d] != 1).collect();
    let (mut i, mut j) = (0, 0);
    while i < old.len() && j < new.len() {
        // The shortest runs of axes with equal products.
        let (i0, j0) = (i, j);
        let (mut a, mut b) = (old[i].0, i64::from(to[new[j]]));
        while a != b {
            if a < b {
                i += 1;
                a *= old[i].0;
            } else {
                j += 1;
                b *= i64::from(to[new[j]]);
            }
        }
        for d in i0..i {
            if old[d].1 != old[d + 1].1.times(old[d + 1].0)? {
                return None;
            }
        }
        let mut inner = 1;
        for d in (j0..=j).rev() {
            out[new[d]] = old[i].1.times(inner)?;
            inner *= i64::from(to[new[d]]);
        }
        (i, j) = (i + 1, j + 1);
    }
    Some(out)
}
