//! Loop nests over expressions: evaluation into memory, reductions and scans.
//!
//! All accesses of a nest (the destination and the leaves) are strided. Axes of size 1 are dropped and neighbouring axes are
//! joined where every access allows it, so most nests become one or two loops. The innermost axis is the one along which
//! most accesses are contiguous; it is taken four elements at a time, the rest of it one by one. Accesses that do not
//! move along it are loaded once before it. A whole chain of maps is evaluated in registers per four elements.
//!
//! A destination may be one of the leaves' slots if it is accessed at the same element: each round loads before it stores.
//!
//! Sums run in four partial vectors; the order is fixed by the shape, never by data.

use super::asm::Width;
use super::emit::{Routine, mem};
use super::lower::Cg;
use super::math::{Lanes, Math, scalar_const, splat};
use super::tile::{Base, Coef, Expr, Leaf, MemTile, Tile, dense_coefs, element_bytes};
use super::wide::{self, Form};
use cranelift_codegen::ir::{InstBuilder, StackSlotData, StackSlotKind, Value, types};
use dsc_ir::DType;
use dsc_ir::tile::{ReduceKind, Scalar, ScalarOp};

/// Where one access stands inside a nest.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cursor {
    Mem {
        at: Value,
        dtype: DType,
        inner: Coef,
    },
    Iota {
        at: Value,
        inner: i64,
    },
    /// A value alone and in all lanes.
    Fixed {
        one: Value,
        four: Value,
    },
}

/// The accesses of an expression's leaves, in order.
type Cursors<'c> = std::iter::Copied<std::slice::Iter<'c, Cursor>>;

/// An element of the innermost axis: `i + c`, `i` a loop's counter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pos {
    pub(crate) i: Option<Value>,
    pub(crate) c: i64,
}

const START: Pos = Pos { i: None, c: 0 };

/// One access of a nest, with its coefficient along each axis.
#[derive(Clone, Debug)]
struct Access {
    leaf: Leaf,
    coefs: Vec<Coef>,
}

impl Access {
    fn new(leaf: &Leaf, rank: usize) -> Access {
        let coefs = match leaf {
            Leaf::Mem(m) => m.coefs.clone(),
            Leaf::Iota { coefs, .. } => coefs.iter().map(|&c| Coef::Const(c)).collect(),
            Leaf::Splat(..) | Leaf::Const(_) => vec![Coef::ZERO; rank],
        };
        Access { leaf: leaf.clone(), coefs }
    }

    /// Whether four neighbours along the axis are one vector access.
    fn contiguous(&self, axis: usize) -> bool {
        match &self.leaf {
            Leaf::Mem(m) => self.coefs[axis] == Coef::ZERO || self.coefs[axis] == Coef::Const(element_bytes(m.dtype)),
            _ => true,
        }
    }
}

/// The axes and accesses of a nest.
struct Nest {
    dims: Vec<i64>,
    accesses: Vec<Access>,
}

impl Nest {
    fn new(shape: &[u32], leaves: &[&Leaf]) -> Nest {
        let accesses = leaves.iter().map(|l| Access::new(l, shape.len())).collect();
        Nest { dims: shape.iter().map(|&n| i64::from(n)).collect(), accesses }
    }

    /// Takes an axis out: its size, and the coefficient of each access along it.
    fn remove(&mut self, axis: usize) -> (i64, Vec<Coef>) {
        let coefs = self.accesses.iter_mut().map(|a| a.coefs.remove(axis)).collect();
        (self.dims.remove(axis), coefs)
    }

    /// Drops axes of size 1 and joins neighbours.
    fn collapse(&mut self) {
        for d in (0..self.dims.len()).rev() {
            if self.dims[d] == 1 {
                self.remove(d);
            }
        }
        for d in (1..self.dims.len()).rev() {
            let n = self.dims[d];
            let joins = self.accesses.iter().all(|a| match (a.coefs[d - 1], a.coefs[d]) {
                (Coef::Const(outer), Coef::Const(inner)) => outer == inner * n,
                _ => false,
            });
            if joins {
                self.dims[d] *= self.dims[d - 1];
                self.remove(d - 1);
            }
        }
    }

    /// How many accesses are contiguous along an axis; the first counts twice when it is a destination.
    fn score(&self, axis: usize, destination: bool) -> usize {
        let contiguous = self.accesses.iter().filter(|a| a.contiguous(axis)).count();
        contiguous + usize::from(destination && self.accesses[0].contiguous(axis))
    }

    /// The axis to vectorise: at least four long and with the best score, the last of equals.
    fn vector_axis(&self, destination: bool) -> Option<usize> {
        (0..self.dims.len()).filter(|&d| self.dims[d] >= 4).max_by_key(|&d| self.score(d, destination))
    }
}

impl Cg<'_> {
    /// Address of an access's element zero, as a cursor.
    fn open(&mut self, access: &Access) -> Cursor {
        match &access.leaf {
            Leaf::Mem(m) => Cursor::Mem { at: self.address(&m.base), dtype: m.dtype, inner: Coef::ZERO },
            Leaf::Iota { base, .. } => Cursor::Iota { at: self.f.i32(*base as i32), inner: 0 },
            Leaf::Splat(v, dtype) => Cursor::Fixed { one: *v, four: splat(&mut self.f, *dtype, *v) },
            Leaf::Const(c) => {
                let one = scalar_const(&mut self.f, *c);
                Cursor::Fixed { one, four: splat(&mut self.f, c.dtype(), one) }
            }
        }
    }

    /// The address of a base.
    pub(crate) fn address(&mut self, base: &Base) -> Value {
        match base {
            Base::Slot(slot, offset) => {
                let scratch = self.scratch;
                self.f.add_const(scratch, slot.offset as i64 + offset)
            }
            Base::Param(at, _) => *at,
        }
    }

    /// `i * coef`, i64.
    pub(crate) fn scaled(&mut self, i: Value, coef: Coef) -> Value {
        match coef {
            Coef::Const(c) => self.f.mul_const(i, c),
            Coef::Value(v) => self.f.b.ins().imul(i, v),
        }
    }

    fn moved(&mut self, cursor: Cursor, coef: Coef, i: Value) -> Cursor {
        if coef == Coef::ZERO {
            return cursor;
        }
        match cursor {
            Cursor::Mem { at, dtype, inner } => {
                let by = self.scaled(i, coef);
                Cursor::Mem { at: self.f.b.ins().iadd(at, by), dtype, inner }
            }
            Cursor::Iota { at, inner } => {
                let by = self.scaled(i, coef);
                let by = self.f.b.ins().ireduce(types::I32, by);
                Cursor::Iota { at: self.f.b.ins().iadd(at, by), inner }
            }
            fixed => fixed,
        }
    }

    /// Sets what a step along the innermost axis moves; loads what does not move now.
    fn along(&mut self, cursor: Cursor, coef: Coef, is_destination: bool) -> Cursor {
        let moved = match (cursor, coef) {
            (Cursor::Mem { at, dtype, .. }, _) => Cursor::Mem { at, dtype, inner: coef },
            (Cursor::Iota { at, .. }, Coef::Const(inner)) => Cursor::Iota { at, inner },
            (other, _) => other,
        };
        let (Cursor::Mem { dtype, .. }, Coef::ZERO, false) = (moved, coef, is_destination) else { return moved };
        let one = self.read(moved, START, Lanes::One);
        Cursor::Fixed { one, four: splat(&mut self.f, dtype, one) }
    }

    /// Loops over `dims`, moving the cursors; `body` gets them at each point.
    fn outer_loops(
        &mut self,
        dims: &[i64],
        coefs: &[Vec<Coef>],
        cursors: &[Cursor],
        body: &mut dyn FnMut(&mut Self, &[Cursor]),
    ) {
        let Some((&n, inner_dims)) = dims.split_first() else { return body(self, cursors) };
        let l = self.f.begin_count(n, 1);
        let moved: Vec<Cursor> = cursors.iter().zip(coefs).map(|(&c, k)| self.moved(c, k[0], l.i)).collect();
        let inner_coefs: Vec<Vec<Coef>> = coefs.iter().map(|k| k[1..].to_vec()).collect();
        self.outer_loops(inner_dims, &inner_coefs, &moved, body);
        self.f.end_loop(l, &[]);
    }

    /// Runs `body` over `n` elements, four at a time and then one at a time.
    fn vector_loop(&mut self, n: i64, weight: usize, body: &mut dyn FnMut(&mut Self, Pos, Lanes)) {
        let vectors = n / 4;
        let unroll = match weight {
            0..=4 => 4,
            5..=12 => 2,
            _ => 1,
        };
        let rounds = vectors / unroll;
        if rounds > 1 {
            let l = self.f.begin_count(rounds * unroll * 4, unroll * 4);
            for u in 0..unroll {
                body(self, Pos { i: Some(l.i), c: 4 * u }, Lanes::Four);
            }
            self.f.end_loop(l, &[]);
        }
        let done = if rounds > 1 { rounds * unroll } else { 0 };
        for v in done..vectors {
            body(self, Pos { i: None, c: 4 * v }, Lanes::Four);
        }
        for c in vectors * 4..n {
            body(self, Pos { i: None, c }, Lanes::One);
        }
    }

    /// Address of element `pos + extra` and a static offset from it.
    fn element(&mut self, at: Value, inner: Coef, pos: Pos, extra: i64) -> (Value, i32) {
        let c = pos.c + extra;
        let at = match pos.i {
            Some(i) if inner != Coef::ZERO => {
                let by = self.scaled(i, inner);
                self.f.b.ins().iadd(at, by)
            }
            _ => at,
        };
        match inner {
            Coef::Const(s) => match i32::try_from(s * c) {
                Ok(offset) => (at, offset),
                Err(_) => (self.f.add_const(at, s * c), 0),
            },
            Coef::Value(s) if c != 0 => {
                let by = self.f.mul_const(s, c);
                (self.f.b.ins().iadd(at, by), 0)
            }
            Coef::Value(_) => (at, 0),
        }
    }

    /// Reads an element or four neighbours.
    fn read(&mut self, cursor: Cursor, pos: Pos, lanes: Lanes) -> Value {
        match (cursor, lanes) {
            (Cursor::Fixed { one, .. }, Lanes::One) => one,
            (Cursor::Fixed { four, .. }, Lanes::Four) => four,
            (Cursor::Iota { at, inner }, lanes) => self.read_iota(at, inner, pos, lanes),
            (Cursor::Mem { at, dtype, inner }, Lanes::One) => {
                let (at, offset) = self.element(at, inner, pos, 0);
                self.load_one(dtype, at, offset)
            }
            (Cursor::Mem { at, dtype, inner: Coef::ZERO }, Lanes::Four) => {
                let one = self.load_one(dtype, at, 0);
                splat(&mut self.f, dtype, one)
            }
            (Cursor::Mem { at, dtype, inner }, Lanes::Four) if inner == Coef::Const(element_bytes(dtype)) => {
                let (at, offset) = self.element(at, inner, pos, 0);
                self.load_four(dtype, at, offset)
            }
            (Cursor::Mem { at, dtype, inner }, Lanes::Four) => {
                let raw = if dtype == DType::Bool { DType::I32 } else { dtype };
                let mut out = None;
                for lane in 0..4 {
                    let (at, offset) = self.element(at, inner, pos, lane);
                    let one = self.load_one(raw, at, offset);
                    out = Some(match out {
                        None => self.f.b.ins().scalar_to_vector(Lanes::Four.ty(dtype), one),
                        Some(v) => self.f.b.ins().insertlane(v, one, lane as u8),
                    });
                }
                out.expect("there are four lanes")
            }
        }
    }

    fn read_iota(&mut self, at: Value, inner: i64, pos: Pos, lanes: Lanes) -> Value {
        let mut base = at;
        if let Some(i) = pos.i {
            let by = self.f.mul_const(i, inner);
            let by = self.f.b.ins().ireduce(types::I32, by);
            base = self.f.b.ins().iadd(base, by);
        }
        let c = (inner * pos.c) as i32;
        if lanes == Lanes::One {
            let c = self.f.i32(c);
            return self.f.b.ins().iadd(base, c);
        }
        let base = self.f.b.ins().splat(types::I32X4, base);
        let step = inner as i32;
        let steps = [0, 1, 2, 3].map(|lane| c.wrapping_add(step.wrapping_mul(lane)));
        let steps = self.f.i32x4(steps);
        self.f.b.ins().iadd(base, steps)
    }

    /// Loads an element into a register.
    pub(crate) fn load_one(&mut self, dtype: DType, at: Value, offset: i32) -> Value {
        let ins = self.f.b.ins();
        match dtype {
            DType::F32 => ins.load(types::F32, mem(), at, offset),
            DType::I32 => ins.load(types::I32, mem(), at, offset),
            DType::Bf16 | DType::F16 => ins.uload16(types::I32, mem(), at, offset),
            DType::E4m3 => ins.uload8(types::I32, mem(), at, offset),
            DType::Bool => {
                let mask = ins.load(types::I8, mem(), at, offset);
                self.f.b.ins().band_imm_u(mask, 1)
            }
        }
    }

    fn load_four(&mut self, dtype: DType, at: Value, offset: i32) -> Value {
        let ins = self.f.b.ins();
        match dtype {
            DType::F32 => ins.load(types::F32X4, mem(), at, offset),
            DType::I32 | DType::Bool => ins.load(types::I32X4, mem(), at, offset),
            DType::Bf16 | DType::F16 => ins.uload16x4(mem(), at, offset),
            DType::E4m3 => {
                let four = ins.load(types::I32, mem(), at, offset);
                let bytes = self.f.b.ins().scalar_to_vector(types::I32X4, four);
                let bytes = self.f.cast_bits(types::I8X16, bytes);
                let words = self.f.b.ins().uwiden_low(bytes);
                self.f.b.ins().uwiden_low(words)
            }
        }
    }

    /// Stores an element from a register.
    pub(crate) fn store_one(&mut self, dtype: DType, value: Value, at: Value, offset: i32) {
        match dtype {
            DType::F32 | DType::I32 => {
                self.f.b.ins().store(mem(), value, at, offset);
            }
            DType::Bf16 | DType::F16 => {
                self.f.b.ins().istore16(mem(), value, at, offset);
            }
            DType::E4m3 => {
                self.f.b.ins().istore8(mem(), value, at, offset);
            }
            DType::Bool => {
                let mask = self.f.b.ins().bmask(types::I32, value);
                self.f.b.ins().store(mem(), mask, at, offset);
            }
        }
    }

    fn store_four(&mut self, dtype: DType, value: Value, at: Value, offset: i32) {
        let packed = match dtype {
            DType::F32 | DType::I32 | DType::Bool => value,
            DType::Bf16 | DType::F16 => {
                let words = self.f.b.ins().unarrow(value, value);
                let words = self.f.cast_bits(types::I64X2, words);
                self.f.b.ins().extractlane(words, 0)
            }
            DType::E4m3 => {
                let words = self.f.b.ins().unarrow(value, value);
                let bytes = self.f.b.ins().unarrow(words, words);
                let bytes = self.f.cast_bits(types::I32X4, bytes);
                self.f.b.ins().extractlane(bytes, 0)
            }
        };
        self.f.b.ins().store(mem(), packed, at, offset);
    }

    fn write(&mut self, cursor: Cursor, pos: Pos, lanes: Lanes, value: Value) {
        let Cursor::Mem { at, dtype, inner } = cursor else { unreachable!("destinations are memory") };
        if lanes == Lanes::One {
            let (at, offset) = self.element(at, inner, pos, 0);
            return self.store_one(dtype, value, at, offset);
        }
        if inner == Coef::Const(element_bytes(dtype)) {
            let (at, offset) = self.element(at, inner, pos, 0);
            return self.store_four(dtype, value, at, offset);
        }
        for lane in 0..4 {
            let one = self.f.b.ins().extractlane(value, lane as u8);
            let (at, offset) = self.element(at, inner, pos, lane);
            // A lane of a truth vector is already 0 or −1 in 32 bits.
            let raw = if dtype == DType::Bool { DType::I32 } else { dtype };
            self.store_one(raw, one, at, offset);
        }
    }

    /// The value of an expression at one position; `cursors` are those of its leaves, in order.
    fn value(&mut self, expr: &Expr, cursors: &mut Cursors, pos: Pos, lanes: Lanes) -> Value {
        match expr {
            Expr::Leaf(_) => {
                let cursor = cursors.next().expect("one cursor a leaf");
                self.read(cursor, pos, lanes)
            }
            Expr::Map(node, inputs) => {
                let values: Vec<Value> = inputs.iter().map(|x| self.value(x, cursors, pos, lanes)).collect();
                Math { f: &mut self.f, lanes }.map(&node.body, &node.types, &node.inputs, &values)
            }
        }
    }

    fn value_at(&mut self, expr: &Expr, cursors: &[Cursor], pos: Pos, lanes: Lanes) -> Value {
        self.value(expr, &mut cursors.iter().copied(), pos, lanes)
    }

    /// Evaluates a tile into memory of its shape.
    pub(crate) fn evaluate_into(&mut self, dst: &MemTile, tile: &Tile) {
        let dst = Leaf::Mem(dst.clone());
        let mut leaves = vec![&dst];
        leaves.extend(tile.expr.leaves());
        let mut nest = Nest::new(&tile.shape, &leaves);
        nest.collapse();
        let (n, inner) = match nest.vector_axis(true).or(nest.dims.len().checked_sub(1)) {
            Some(axis) => nest.remove(axis),
            None => (1, vec![Coef::ZERO; nest.accesses.len()]),
        };
        let cursors: Vec<Cursor> = nest.accesses.iter().map(|a| self.open(a)).collect();
        let coefs: Vec<Vec<Coef>> = nest.accesses.iter().map(|a| a.coefs.clone()).collect();
        let weight = tile.expr.weight();
        let plan = WidePlan { form: Form::Map, n, inner: &inner, middle: None };
        if self.run_wide(&nest, &cursors, &plan, &tile.expr) {
            return;
        }
        self.outer_loops(&nest.dims, &coefs, &cursors, &mut |cg, cursors| {
            let cursors: Vec<Cursor> =
                cursors.iter().zip(&inner).enumerate().map(|(i, (&c, &k))| cg.along(c, k, i == 0)).collect();
            cg.vector_loop(n, weight, &mut |cg, pos, lanes| {
                let v = cg.value_at(&tile.expr, &cursors[1..], pos, lanes);
                cg.write(cursors[0], pos, lanes, v);
            });
        });
    }

    /// The only element of a tile whose axes are all of size 1.
    pub(crate) fn single_element(&mut self, tile: &Tile) -> Value {
        let leaves = tile.expr.leaves();
        let cursors: Vec<Cursor> = leaves.iter().map(|l| self.open(&Access::new(l, tile.shape.len()))).collect();
        self.value_at(&tile.expr, &cursors, START, Lanes::One)
    }

    fn identity(&mut self, kind: ReduceKind, dtype: DType) -> Value {
        let value = match (kind, dtype) {
            (ReduceKind::Sum, DType::F32) => Scalar::F32(0.0),
            (ReduceKind::Sum, _) => Scalar::I32(0),
            (ReduceKind::Max, DType::F32) => Scalar::F32(f32::NEG_INFINITY),
            (ReduceKind::Max, _) => Scalar::I32(i32::MIN),
        };
        scalar_const(&mut self.f, value)
    }

    fn combine(&mut self, kind: ReduceKind, dtype: DType, lanes: Lanes, a: Value, b: Value) -> Value {
        let float = dtype == DType::F32;
        match kind {
            ReduceKind::Sum if float => self.f.b.ins().fadd(a, b),
            ReduceKind::Sum => self.f.b.ins().iadd(a, b),
            ReduceKind::Max => Math { f: &mut self.f, lanes }.extreme(float, true, a, b),
        }
    }

    /// Reduces along `axis` into `dst`, which has the tile's shape but for size 1 there; or, if that leaves one element and
    /// there is no `dst`, into a register.
    pub(crate) fn reduce_into(
        &mut self,
        dst: Option<&MemTile>,
        tile: &Tile,
        axis: usize,
        kind: ReduceKind,
    ) -> Option<Value> {
        if dst.is_none() && self.wants_wide(tile) {
            // The wide form leaves its result in memory.
            let slot = self.slot_for(tile.dtype, &[]);
            let m = MemTile { base: Base::Slot(slot, 0), coefs: vec![Coef::ZERO; tile.shape.len()], dtype: tile.dtype };
            self.reduce_into(Some(&m), tile, axis, kind);
            let at = self.address(&m.base);
            return Some(self.load_one(tile.dtype, at, 0));
        }
        let mut leaves = tile.expr.leaves();
        let target = dst.map(|d| {
            let mut d = d.clone();
            d.coefs[axis] = Coef::ZERO;
            Leaf::Mem(d)
        });
        if let Some(target) = &target {
            leaves.insert(0, target);
        }
        let mut nest = Nest::new(&tile.shape, &leaves);
        let (n, along) = nest.remove(axis);
        nest.collapse();
        let offset = usize::from(dst.is_some());
        let unit = |k: &Coef, a: &Access| match &a.leaf {
            Leaf::Mem(m) => *k == Coef::ZERO || *k == Coef::Const(element_bytes(m.dtype)),
            _ => true,
        };
        let score = along[offset..].iter().zip(&nest.accesses[offset..]).filter(|(k, a)| unit(k, a)).count();
        let other = nest.vector_axis(false).filter(|&d| n < 4 || nest.score(d, false) > score + offset);
        let cursors: Vec<Cursor> = nest.accesses.iter().map(|a| self.open(a)).collect();
        let Some(lane_axis) = other else {
            let plan = WidePlan { form: Form::ReduceInner(kind), n, inner: &along, middle: None };
            if dst.is_some() && self.run_wide(&nest, &cursors, &plan, &tile.expr) {
                return None;
            }
            let coefs: Vec<Vec<Coef>> = nest.accesses.iter().map(|a| a.coefs.clone()).collect();
            let mut register = None;
            self.outer_loops(&nest.dims, &coefs, &cursors, &mut |cg, cursors| {
                let inner: Vec<Cursor> =
                    cursors[offset..].iter().zip(&along[offset..]).map(|(&c, &k)| cg.along(c, k, false)).collect();
                let v = cg.reduce_row(&tile.expr, &inner, n, tile.dtype, kind);
                if offset == 1 {
                    cg.write(cursors[0], START, Lanes::One, v);
                }
                register = Some(v);
            });
            return register;
        };
        let (width, inner) = nest.remove(lane_axis);
        let form = Form::ReduceMiddle(kind, n as u32);
        let plan = WidePlan { form, n: width, inner: &inner, middle: Some(&along) };
        if self.run_wide(&nest, &cursors, &plan, &tile.expr) {
            return None;
        }
        let coefs: Vec<Vec<Coef>> = nest.accesses.iter().map(|a| a.coefs.clone()).collect();
        self.outer_loops(&nest.dims, &coefs, &cursors, &mut |cg, cursors| {
            let cursors: Vec<Cursor> = cursors.iter().zip(&inner).map(|(&c, &k)| with_inner(c, k)).collect();
            cg.vector_loop(width, 99, &mut |cg, pos, lanes| {
                let identity = cg.identity(kind, tile.dtype);
                let start = if lanes == Lanes::Four { splat(&mut cg.f, tile.dtype, identity) } else { identity };
                let zero = cg.f.i64(0);
                let l = cg.f.begin_loop(zero, super::emit::Bound::Const(n), 1, &[start]);
                let at: Vec<Cursor> =
                    cursors[1..].iter().zip(&along[1..]).map(|(&c, &k)| cg.moved(c, k, l.i)).collect();
                let v = cg.value_at(&tile.expr, &at, pos, lanes);
                let acc = cg.combine(kind, tile.dtype, lanes, l.accs[0], v);
                let total = cg.f.end_loop(l, &[acc]);
                cg.write(cursors[0], pos, lanes, total[0]);
            });
        });
        None
    }

    /// Reduces `n` elements along the innermost axis to a register.
    fn reduce_row(&mut self, expr: &Expr, cursors: &[Cursor], n: i64, dtype: DType, kind: ReduceKind) -> Value {
        let vectors = n / 4;
        let parts = if expr.weight() > 12 { 2 } else { 4 }.min(vectors.max(1));
        let identity = self.identity(kind, dtype);
        let start = splat(&mut self.f, dtype, identity);
        let mut accs = vec![start; parts as usize];
        let rounds = vectors / parts;
        if rounds > 1 {
            let zero = self.f.i64(0);
            let l = self.f.begin_loop(zero, super::emit::Bound::Const(rounds * parts * 4), parts * 4, &accs);
            let mut next = Vec::new();
            for u in 0..parts {
                let v = self.value_at(expr, cursors, Pos { i: Some(l.i), c: 4 * u }, Lanes::Four);
                next.push(self.combine(kind, dtype, Lanes::Four, l.accs[u as usize], v));
            }
            accs = self.f.end_loop(l, &next);
        }
        let done = if rounds > 1 { rounds * parts } else { 0 };
        for v in done..vectors {
            let x = self.value_at(expr, cursors, Pos { i: None, c: 4 * v }, Lanes::Four);
            let part = (v % parts) as usize;
            accs[part] = self.combine(kind, dtype, Lanes::Four, accs[part], x);
        }
        let mut total = identity;
        if vectors > 0 {
            let mut four = accs[0];
            for &acc in &accs[1..] {
                four = self.combine(kind, dtype, Lanes::Four, four, acc);
            }
            let l: Vec<Value> = (0..4).map(|lane| self.f.b.ins().extractlane(four, lane)).collect();
            let (a, b) =
                (self.combine(kind, dtype, Lanes::One, l[0], l[2]), self.combine(kind, dtype, Lanes::One, l[1], l[3]));
            total = self.combine(kind, dtype, Lanes::One, a, b);
        }
        for c in vectors * 4..n {
            let x = self.value_at(expr, cursors, Pos { i: None, c }, Lanes::One);
            total = self.combine(kind, dtype, Lanes::One, total, x);
        }
        total
    }

    /// Inclusive running combination along `axis` into `dst` of the tile's shape.
    pub(crate) fn scan_into(&mut self, dst: &MemTile, tile: &Tile, axis: usize, kind: ReduceKind) {
        let target = Leaf::Mem(dst.clone());
        let mut leaves = vec![&target];
        leaves.extend(tile.expr.leaves());
        let mut nest = Nest::new(&tile.shape, &leaves);
        let (n, along) = nest.remove(axis);
        nest.collapse();
        let lane_axis = nest.vector_axis(true);
        let (width, inner) = match lane_axis {
            Some(d) => nest.remove(d),
            None => (1, vec![Coef::ZERO; nest.accesses.len()]),
        };
        let cursors: Vec<Cursor> = nest.accesses.iter().map(|a| self.open(a)).collect();
        let coefs: Vec<Vec<Coef>> = nest.accesses.iter().map(|a| a.coefs.clone()).collect();
        self.outer_loops(&nest.dims, &coefs, &cursors, &mut |cg, cursors| {
            let cursors: Vec<Cursor> = cursors.iter().zip(&inner).map(|(&c, &k)| with_inner(c, k)).collect();
            cg.vector_loop(width, 99, &mut |cg, pos, lanes| {
                let identity = cg.identity(kind, tile.dtype);
                let start = if lanes == Lanes::Four { splat(&mut cg.f, tile.dtype, identity) } else { identity };
                let zero = cg.f.i64(0);
                let l = cg.f.begin_loop(zero, super::emit::Bound::Const(n), 1, &[start]);
                let at: Vec<Cursor> = cursors.iter().zip(&along).map(|(&c, &k)| cg.moved(c, k, l.i)).collect();
                let v = cg.value_at(&tile.expr, &at[1..], pos, lanes);
                let acc = cg.combine(kind, tile.dtype, lanes, l.accs[0], v);
                cg.write(at[0], pos, lanes, acc);
                cg.f.end_loop(l, &[acc]);
            });
        });
    }

    /// A dense copy of a tile in a slot of its own; the tile itself if it is that already.
    pub(crate) fn materialise(&mut self, tile: &Tile) -> MemTile {
        if let Some(m) = tile.expr.memory()
            && m.whole_slot(&tile.shape).is_some()
        {
            return m.clone();
        }
        let slot = self.slot_for(tile.dtype, &tile.shape);
        let dst = MemTile { base: Base::Slot(slot, 0), coefs: dense_coefs(tile.dtype, &tile.shape), dtype: tile.dtype };
        self.evaluate_into(&dst, tile);
        dst
    }
}

/// The inner loops of a nest that [`super::wide`] may take over.
struct WidePlan<'a> {
    form: Form,
    n: i64,
    /// Coefficients along the innermost axis, and along the one reduced over if that is another.
    inner: &'a [Coef],
    middle: Option<&'a [Coef]>,
}

/// Below this many scalar operations a call costs more than it saves.
const WIDE_FROM: usize = 200;
/// Words of the argument array: the most accesses, and strides, that a wide routine takes.
const WIDE_WORDS: usize = 32;

impl Cg<'_> {
    fn wants_wide(&self, tile: &Tile) -> bool {
        let elements: usize = tile.shape.iter().map(|&n| n as usize).product();
        self.width() == Width::Z && elements * tile.expr.weight() >= WIDE_FROM
    }

    /// Emits the nest as calls of a wide routine, if there can be one. The first access is the destination.
    fn run_wide(&mut self, nest: &Nest, cursors: &[Cursor], plan: &WidePlan, expr: &Expr) -> bool {
        let rows = nest.dims.last().copied().unwrap_or(1);
        let middle = match plan.form {
            Form::ReduceMiddle(_, count) => i64::from(count),
            _ => 1,
        };
        let work = (rows * middle * plan.n) as usize * expr.weight();
        if self.width() != Width::Z || work < WIDE_FROM || plan.n < 8 {
            return false;
        }
        let mut strides = Vec::new();
        let Some(spec) = wide_spec(nest, plan, rows, expr, &mut strides) else { return false };
        if spec.accesses.len() + strides.len() > WIDE_WORDS {
            return false;
        }
        let Some(code) = wide::assemble(&spec) else { return false };
        let slot = *self.wide_args.get_or_insert_with(|| {
            let data = StackSlotData::new(StackSlotKind::ExplicitSlot, WIDE_WORDS as u32 * 8, 4);
            self.f.b.create_sized_stack_slot(data)
        });
        let outer = nest.dims.len().saturating_sub(1);
        let coefs: Vec<Vec<Coef>> = nest.accesses.iter().map(|a| a.coefs[..outer].to_vec()).collect();
        self.outer_loops(&nest.dims[..outer], &coefs, cursors, &mut |cg, cursors| {
            let args = cg.f.b.ins().stack_addr(types::I64, slot, 0);
            for (i, (cursor, access)) in cursors.iter().zip(&spec.accesses).enumerate() {
                if let Some(word) = cg.wide_word(*cursor, access) {
                    cg.f.b.ins().store(mem(), word, args, i as i32 * 8);
                }
            }
            for (i, &stride) in strides.iter().enumerate() {
                cg.f.b.ins().store(mem(), stride, args, (spec.accesses.len() + i) as i32 * 8);
            }
            cg.f.call(Routine::Wide(code.clone()), &[args]);
        });
        true
    }

    /// What the routine is told of an access.
    fn wide_word(&mut self, cursor: Cursor, access: &wide::Access) -> Option<Value> {
        match (cursor, access.kind) {
            (_, wide::Kind::Constant(_)) => None,
            (Cursor::Mem { at, .. }, _) => Some(at),
            (Cursor::Iota { at, .. }, _) => Some(self.f.b.ins().uextend(types::I64, at)),
            (Cursor::Fixed { one, .. }, _) => {
                let bits = match access.dtype {
                    DType::F32 => self.f.cast_bits(types::I32, one),
                    DType::Bool => self.f.b.ins().bmask(types::I32, one),
                    _ => one,
                };
                Some(self.f.b.ins().uextend(types::I64, bits))
            }
        }
    }
}

/// The routine for the inner loops of a nest; run-time strides are added to `strides`, in the order of their words.
fn wide_spec(nest: &Nest, plan: &WidePlan, rows: i64, expr: &Expr, strides: &mut Vec<Value>) -> Option<wide::Spec> {
    let count = nest.accesses.len() as u32;
    let mut step = |c: Coef| match c {
        Coef::Const(c) => i32::try_from(c).ok().map(|c| wide::Step::Const(c.into())),
        Coef::Value(v) => {
            let at = strides.iter().position(|&s| s == v).unwrap_or_else(|| {
                strides.push(v);
                strides.len() - 1
            });
            Some(wide::Step::Arg(count + at as u32))
        }
    };
    let mut accesses = Vec::new();
    for (i, access) in nest.accesses.iter().enumerate() {
        let inner = plan.inner[i];
        let (kind, dtype) = match &access.leaf {
            Leaf::Mem(m) if inner == Coef::Const(element_bytes(m.dtype)) => (wide::Kind::Row(m.dtype), m.dtype),
            Leaf::Mem(m) if inner == Coef::ZERO && element_bytes(m.dtype) == 4 => {
                (wide::Kind::Repeated(m.dtype), m.dtype)
            }
            Leaf::Mem(_) => return None,
            Leaf::Iota { .. } => match inner {
                Coef::Const(c) => (wide::Kind::Coordinate(c), DType::I32),
                Coef::Value(_) => return None,
            },
            Leaf::Splat(_, dtype) => (wide::Kind::Splat, *dtype),
            Leaf::Const(c) => (wide::Kind::Constant(wide::scalar_bits(*c)), c.dtype()),
        };
        // Only a row's sum goes to a destination that stands still.
        let reduces_inner = matches!(plan.form, Form::ReduceInner(_));
        if i == 0 && reduces_inner != matches!(kind, wide::Kind::Repeated(_)) {
            return None;
        }
        let row = step(access.coefs.last().copied().unwrap_or(Coef::ZERO))?;
        let middle = step(plan.middle.map_or(Coef::ZERO, |m| m[i]))?;
        accesses.push(wide::Access { kind, dtype, row, middle });
    }
    let mut nodes = Vec::new();
    let mut next = 1;
    let result = add_nodes(&mut nodes, expr, &accesses, &mut next);
    if result + 1 != nodes.len() {
        let dtype = nodes[result].dtype;
        nodes.push(wide::Node { what: wide::What::Op(ScalarOp::Bitcast(dtype), vec![result]), dtype });
    }
    Some(wide::Spec { form: plan.form, rows: rows as u32, n: plan.n as u32, accesses, nodes })
}

/// The nodes of an expression; its leaves are the accesses from `next` on. Gives the node of its value.
fn add_nodes(nodes: &mut Vec<wide::Node>, expr: &Expr, accesses: &[wide::Access], next: &mut usize) -> usize {
    match expr {
        Expr::Leaf(_) => {
            let access = *next;
            *next += 1;
            nodes.push(wide::Node { what: wide::What::Leaf(access), dtype: accesses[access].dtype });
            nodes.len() - 1
        }
        Expr::Map(node, inputs) => {
            let inputs: Vec<usize> = inputs.iter().map(|x| add_nodes(nodes, x, accesses, next)).collect();
            wide::add_body(nodes, node, &inputs)
        }
    }
}

fn with_inner(cursor: Cursor, coef: Coef) -> Cursor {
    match (cursor, coef) {
        (Cursor::Mem { at, dtype, .. }, inner) => Cursor::Mem { at, dtype, inner },
        (Cursor::Iota { at, .. }, Coef::Const(inner)) => Cursor::Iota { at, inner },
        (other, _) => other,
    }
}
