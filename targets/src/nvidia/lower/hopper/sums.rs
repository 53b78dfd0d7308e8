//! Sums over groups of rows of a transposed fragment, and what is done with them.
//!
//! A thread adds the registers of a group, weighted if the elements are products, and then has, of each row of sums, the parts of two
//! columns that its own rows give. The lanes of a quad have the other parts: they exchange halves twice, each keeping half, so
//! that every lane ends with whole sums of its own ([`dsc_ir::sched::Atom::WgmmaSums`]).

use super::config::WARPGROUP;
use super::emit::{Emit, Held};
use super::fragment::Register;
use super::ptx;
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32};
use crate::nvidia::lower::{arith, isa};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, BufferId, Fragment, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, MapFn, ReduceKind, ScalarOp, Type, ValueId};
use std::collections::HashMap;

/// The sums of the running thread.
#[derive(Clone, Debug)]
pub struct Sums {
    /// Rows of a warpgroup.
    pub(super) rows: u32,
    /// Row and column of each.
    pub at: Vec<[Val; 2]>,
    /// Whether this thread is the one to write them, of those that have the same.
    pub(super) first: Val,
}

/// Lazy elements known already, by value and number of the sum.
type Seen = HashMap<(ValueId, usize), Val>;

impl<'a> Emit<'a> {
    /// Finds out which sums the running thread gets, if the role makes any.
    pub fn prepare_sums(&mut self, block: &'a Block) {
        for inst in &block.insts {
            for &v in &inst.results {
                if let (Place::Fragment(Fragment { atom: Atom::WgmmaSums, warps }), Type::Tile(t)) =
                    (&self.s.places[v.0 as usize], &self.s.types[v.0 as usize])
                    && let Op::Tile(tile::Op::Reduce { .. }) = inst.op
                {
                    self.sums = Some(self.own_sums(t.shape.first().map_or(1, |r| r / warps[0])));
                }
            }
            inst.op.blocks().into_iter().for_each(|b| self.prepare_sums(b));
        }
    }

    fn own_sums(&mut self, rows: u32) -> Sums {
        let f = &mut self.t.f;
        let group = f.div(self.role_tid, WARPGROUP);
        let first_row = f.mul(group, i32(rows.into()));
        let warp = f.div(self.role_tid, 32);
        let warp = f.rem(warp, 4);
        let column = f.mul(warp, i32(16));
        let quad = f.div(self.t.lane, 4);
        let column = f.add(column, quad);
        let q = f.rem(self.t.lane, 4);
        let (low, high) = (f.rem(q, 2), f.div(q, 2));
        let half = |f: &mut crate::nvidia::lower::mlir::Fn, h: Val| {
            let h = f.mul(h, i32(8));
            f.add(column, h)
        };
        let all = Val::Int(1, Ty::I1);
        match rows {
            1 => {
                let c = half(f, low);
                let first = f.cmp("eq", high, i32(0));
                Sums { rows, at: vec![[first_row, c]], first }
            }
            2 => {
                let (row, c) = (f.add(first_row, low), half(f, high));
                Sums { rows, at: vec![[row, c]], first: all }
            }
            _ => {
                let row = f.add(first_row, q);
                let at = [0, 1].map(|h| [row, half(f, i32(h))]);
                Sums { rows, at: at.to_vec(), first: all }
            }
        }
    }

    pub(super) fn the_sums(&self) -> Result<Sums, String> {
        self.sums.clone().ok_or_else(|| "a role without sums".into())
    }

    /// Whether a value lies as sums do.
    pub fn is_sums(&self, v: ValueId) -> bool {
        matches!(self.s.places[v.0 as usize], Place::Fragment(Fragment { atom: Atom::WgmmaSums, .. }))
    }

    /// `r`: a value in each thread's part of the sums.
    pub fn sums_op(&mut self, r: ValueId, op: &'a tile::Op) -> Result<(), String> {
        let held = match op {
            tile::Op::Reduce { x, kind: ReduceKind::Sum, .. } => self.group_sums(*x)?,
            _ => {
                let mut seen = Seen::new();
                let count = self.the_sums()?.at.len();
                (0..count).map(|u| self.sums_element_of(r, op, u, &mut seen)).collect::<Result<_, _>>()?
            }
        };
        self.held.insert(r, Held::Sums(held));
        Ok(())
    }

    /// Sums over the groups of rows of `x`, which is made of products.
    fn group_sums(&mut self, x: ValueId) -> Result<Vec<Val>, String> {
        let (g, s) = (self.the_geometry()?, self.the_sums()?);
        let each = g.wide / 8 / s.rows;
        let weighted = self.product(x);
        let mut seen = HashMap::new();
        // By row, then upper or lower half.
        let mut parts = Vec::new();
        for row in 0..s.rows {
            for h in 0..2 {
                let mut sum: Option<Val> = None;
                for j in row * each..(row + 1) * each {
                    for e in 0..2 {
                        let at = Register { sub: 0, j, h, e };
                        let next = match &weighted {
                            Some((inputs, factors)) => {
                                let mut args = Vec::new();
                                for &v in *inputs {
                                    args.push((self.element(v, at, &mut seen)?, self.dtype(v)));
                                }
                                let [a, b] =
                                    [0, 1].map(|i| arith::apply(&mut self.t.f, self.t.arch, &factors[i], &args).0);
                                match sum {
                                    Some(sum) => self.t.f.intrinsic("fma", &[a, b, sum]),
                                    None => self.t.f.bin("fmul", a, b),
                                }
                            }
                            None => {
                                let v = self.element(x, at, &mut seen)?;
                                sum.map_or(v, |sum| self.t.f.bin("fadd", sum, v))
                            }
                        };
                        sum = Some(next);
                    }
                }
                parts.push(sum.unwrap_or(f32(0.0)));
            }
        }
        // The loop's next product may have the registers of this one.
        for v in weighted.map_or(&[][..], |w| w.0) {
            if let Some(Held::Registers(values, [true, true])) = self.held.get(v) {
                self.spare.push(values.clone());
            }
        }
        Ok(self.exchanged(s.rows, parts))
    }

    /// Whole sums of this lane from every lane's parts, by row and half.
    fn exchanged(&mut self, rows: u32, parts: Vec<Val>) -> Vec<Val> {
        let low = self.t.f.rem(self.t.lane, 2);
        let low = self.t.f.cmp("ne", low, i32(0));
        let high = self.t.f.div(self.t.lane, 2);
        let high = self.t.f.rem(high, 2);
        let high = self.t.f.cmp("ne", high, i32(0));
        match rows {
            1 => {
                let one = self.halved(parts[0], parts[1], low, 1);
                let other = isa::shuffle_xor(&mut self.t.f, one, 2);
                vec![self.t.f.bin("fadd", one, other)]
            }
            2 => {
                let rows = [0, 2].map(|r| self.halved(parts[r], parts[r + 1], high, 2));
                vec![self.halved(rows[0], rows[1], low, 1)]
            }
            _ => {
                let pairs = [0, 1, 2, 3].map(|i| self.halved(parts[i], parts[i + 4], high, 2));
                [0, 1].map(|h| self.halved(pairs[h], pairs[h + 2], low, 1)).to_vec()
            }
        }
    }

    /// Keeps `b` where `c` holds, else `a`, and adds what the lane that differs in `bit` has of it.
    fn halved(&mut self, a: Val, b: Val, c: Val, bit: u32) -> Val {
        let (keep, give) = (self.t.f.select(c, b, a), self.t.f.select(c, a, b));
        let got = isa::shuffle_xor(&mut self.t.f, give, bit);
        self.t.f.bin("fadd", keep, got)
    }

    /// The two factors of a tile, behind changes of shape, whose elements are products: inputs, and each factor's arithmetic.
    fn product(&self, mut x: ValueId) -> Option<(&'a [ValueId], [MapFn; 2])> {
        loop {
            match self.defs.get(&x).map(|i| &i.op)? {
                Op::Tile(tile::Op::Reshape { x: from, .. }) => x = *from,
                Op::Tile(tile::Op::Map { inputs, body }) => {
                    let MapArg::Inst(last) = body.result else { return None };
                    let last = body.insts.get(last as usize)?;
                    if last.op != ScalarOp::Mul {
                        return None;
                    }
                    return Some((inputs, [reaching(body, last.args[0]), reaching(body, last.args[1])]));
                }
                _ => return None,
            }
        }
    }

    /// The element of a tile that belongs to this thread's sum number `u`.
    fn sums_element(&mut self, v: ValueId, u: usize, seen: &mut Seen) -> Result<Val, String> {
        match self.held.get(&v) {
            Some(Held::Scalar(x)) => return Ok(*x),
            Some(Held::Sums(values)) => return Ok(values[u]),
            Some(&Held::Stage(buffer, stage)) => {
                let data = &self.s.buffers[buffer.0 as usize];
                let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
                let offset = self.t.f.mul(stage, i32(data.copy_bytes().into()));
                let column = self.the_sums()?.at[u][1];
                let byte = self.t.f.mul(column, i32(4));
                let at = self.t.f.add(base, offset);
                let at = self.t.f.add(at, byte);
                return Ok(ptx::load_shared_f32(&mut self.t.f, at));
            }
            _ => {}
        }
        if let Some(&known) = seen.get(&(v, u)) {
            return Ok(known);
        }
        let op = match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(op)) => op,
            _ => return Err(format!("%{} is read where it is not held", v.0)),
        };
        let value = self.sums_element_of(v, op, u, seen)?;
        seen.insert((v, u), value);
        Ok(value)
    }

    fn sums_element_of(&mut self, v: ValueId, op: &'a tile::Op, u: usize, seen: &mut Seen) -> Result<Val, String> {
        let shape = self.shape(v);
        match op {
            tile::Op::Full { value, .. } => Ok(arith::constant(*value)),
            tile::Op::Reshape { x, .. } => self.sums_element(*x, u, seen),
            tile::Op::Iota { axis, .. } => self.sums_coordinate(shape, *axis as usize, u),
            tile::Op::Load { view, index, .. } => {
                let mut at = Vec::new();
                for (d, &i) in index.iter().enumerate() {
                    let (start, own) = (self.index(i)?, self.sums_coordinate(shape, d, u)?);
                    at.push(self.t.f.add(start, own));
                }
                self.word_at(*view, &at)
            }
            tile::Op::Map { inputs, body } => {
                let mut args = Vec::new();
                for &v in inputs {
                    args.push((self.sums_element(v, u, seen)?, self.dtype(v)));
                }
                Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
            }
            _ => Err(format!("%{} is no arithmetic on sums", v.0)),
        }
    }

    /// Coordinate along an axis of a tile with as many columns as sums have, or rows.
    fn sums_coordinate(&mut self, shape: &[u32], axis: usize, u: usize) -> Result<Val, String> {
        let [row, column] = self.the_sums()?.at[u];
        Ok(match shape[axis] {
            1 => i32(0),
            super::config::ROWS => column,
            _ => row,
        })
    }

    /// An f32 or i32 of memory; zero outside the view.
    fn word_at(&mut self, view: ValueId, at: &[Val]) -> Result<Val, String> {
        let (at, inside) = self.element_at(view, at);
        match self.dtype(view) {
            DType::F32 => Ok(ptx::load_f32_if(&mut self.t.f, inside, at)),
            DType::I32 => Ok(ptx::load_i32_if(&mut self.t.f, inside, at)),
            other => Err(format!("an element of {other} from memory")),
        }
    }

    /// Stores sums.
    pub fn store_sums(&mut self, view: ValueId, index: &[Index], value: ValueId) -> Result<(), String> {
        let (s, shape) = (self.the_sums()?, self.shape(value));
        let start = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
        let mut seen = Seen::new();
        for u in 0..s.at.len() {
            let word = self.sums_element(value, u, &mut seen)?;
            let mut at = Vec::new();
            for (d, &start) in start.iter().enumerate() {
                let own = self.sums_coordinate(shape, d, u)?;
                at.push(self.t.f.add(start, own));
            }
            let (address, inside) = self.element_at(view, &at);
            let inside = self.t.f.bin("and", inside, s.first);
            isa::store_global_if(&mut self.t.f, inside, address, &[word]);
        }
        if self.flight.is_busy() {
            // What comes next waits for a product: not before these sums are made.
            ptx::warp_barrier(&mut self.t.f);
        }
        Ok(())
    }

    /// A column that products are combined with, whatever shape it is computed in: an element for each of this thread's rows.
    pub fn sums_of_rows(&mut self, r: ValueId) -> Result<(), String> {
        let g = self.the_geometry()?;
        let mut values = Vec::new();
        for at in g.varying(true, false) {
            let [row, _] = g.coordinates(&mut self.t, at);
            values.push(self.flat_element(r, row)?);
        }
        self.held.insert(r, Held::Registers(values, [true, false]));
        Ok(())
    }

    /// The same into shared memory, an element at a time a thread.
    pub fn share_rows(&mut self, r: ValueId, buffer: BufferId) -> Result<(), String> {
        let data = &self.s.buffers[buffer.0 as usize];
        let (rows, threads) = (data.shape[0], self.role_barrier_threads());
        for from in (0..rows).step_by(threads as usize) {
            let row = self.t.f.add(self.role_tid, i32(from.into()));
            let v = self.flat_element(r, row)?;
            let byte = self.t.f.mul(row, i32(4));
            let at = self.t.f.add(self.t.shared32, byte);
            let at = self.t.f.add(at, i32(data.offset.into()));
            let inside = self.t.f.cmp("slt", row, i32(rows.into()));
            ptx::store_shared_f32_if(&mut self.t.f, inside, at, v);
        }
        Ok(())
    }

    /// The element of such a column that belongs to a register of the products.
    pub fn shared_row(&mut self, buffer: BufferId, at: Register) -> Result<Val, String> {
        let g = self.the_geometry()?;
        let [row, _] = g.coordinates(&mut self.t, Register { h: 0, sub: 0, j: 0, e: 0 });
        let byte = self.t.f.mul(row, i32(4));
        let base = self.t.f.add(self.t.shared32, byte);
        let first = self.s.buffers[buffer.0 as usize].offset + 4 * (8 * at.j + at.e);
        let at = self.t.f.add(base, i32(first.into()));
        Ok(ptx::load_shared_f32(&mut self.t.f, at))
    }

    /// An element by its place in row-major order.
    pub fn flat_element(&mut self, v: ValueId, at: Val) -> Result<Val, String> {
        if let Some(Held::Scalar(x)) = self.held.get(&v) {
            return Ok(*x);
        }
        if let Some(&Held::Stage(buffer, stage)) = self.held.get(&v) {
            // Rows one after another, as the copy engine has brought them.
            let data = &self.s.buffers[buffer.0 as usize];
            let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
            let from = self.t.f.mul(stage, i32(data.copy_bytes().into()));
            let base = self.t.f.add(base, from);
            let byte = self.t.f.mul(at, i32(4));
            let at = self.t.f.add(base, byte);
            return Ok(ptx::load_shared_f32(&mut self.t.f, at));
        }
        let op = match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(op)) => op,
            _ => return Err(format!("%{} is not computed here", v.0)),
        };
        let shape = self.shape(v);
        match op {
            tile::Op::Full { value, .. } => Ok(arith::constant(*value)),
            tile::Op::Reshape { x, .. } => self.flat_element(*x, at),
            tile::Op::Reduce { x, kind: ReduceKind::Max, .. } if self.shape(*x).iter().all(|&n| n == 1) => {
                self.flat_element(*x, at)
            }
            tile::Op::Iota { axis, .. } => Ok(self.unravelled(shape, at)[*axis as usize]),
            tile::Op::Load { view, index, .. } => {
                let own = self.unravelled(shape, at);
                let mut there = Vec::new();
                for (own, &i) in own.into_iter().zip(index) {
                    let start = self.lazy_index(i)?;
                    there.push(self.t.f.add(start, own));
                }
                self.word_at(*view, &there)
            }
            tile::Op::Gather { view, rows, index, .. } => {
                let own = self.unravelled(shape, at);
                let mut there = vec![self.flat_element(*rows, own[0])?];
                for (&own, &i) in own[1..].iter().zip(index) {
                    let start = self.lazy_index(i)?;
                    there.push(self.t.f.add(start, own));
                }
                self.word_at(*view, &there)
            }
            tile::Op::Map { inputs, body } => {
                let own = self.unravelled(shape, at);
                let mut args = Vec::new();
                for &input in inputs {
                    let mut flat = i32(0);
                    for (d, &n) in self.shape(input).iter().enumerate() {
                        flat = self.t.f.mul(flat, i32(n.into()));
                        if n > 1 {
                            flat = self.t.f.add(flat, own[d]);
                        }
                    }
                    args.push((self.flat_element(input, flat)?, self.dtype(input)));
                }
                Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
            }
            _ => Err(format!("%{} is no arithmetic by place", v.0)),
        }
    }

    /// An index operand, computed here if it is not held.
    pub fn lazy_index(&mut self, i: Index) -> Result<Val, String> {
        match i {
            Index::Const(c) => Ok(i32(c)),
            Index::Value(v) => self.flat_element(v, i32(0)),
        }
    }

    /// Coordinates of an element by its place in row-major order.
    pub fn unravelled(&mut self, shape: &[u32], at: Val) -> Vec<Val> {
        let (mut rest, mut own) = (at, Vec::new());
        for (d, &n) in shape.iter().enumerate().rev() {
            let outermost = shape[..d].iter().all(|&n| n == 1);
            own.push(if outermost { rest } else { self.t.f.rem(rest, n) });
            rest = if outermost { i32(0) } else { self.t.f.div(rest, n) };
        }
        own.reverse();
        own
    }

    /// The largest element of a vector, which every thread reads for itself.
    pub fn largest_of(&mut self, r: ValueId, x: ValueId) -> Result<(), String> {
        let count: u32 = self.shape(x).iter().product();
        let mut most: Option<Val> = None;
        for i in 0..count {
            let v = self.flat_element(x, i32(i.into()))?;
            let name = if self.dtype(x) == DType::F32 { "maximum" } else { "smax" };
            most = Some(most.map_or(v, |most| self.t.f.intrinsic(name, &[most, v])));
        }
        self.held.insert(r, Held::Scalar(most.ok_or("the largest of nothing")?));
        Ok(())
    }
}

/// The instructions that a value of a map needs, and that value as the result.
fn reaching(body: &MapFn, result: MapArg) -> MapFn {
    let mut needed = vec![false; body.insts.len()];
    let mut pending = vec![result];
    while let Some(arg) = pending.pop() {
        if let MapArg::Inst(i) = arg
            && !std::mem::replace(&mut needed[i as usize], true)
        {
            pending.extend(&body.insts[i as usize].args);
        }
    }
    let mut numbers = vec![0; body.insts.len()];
    let mut insts = Vec::new();
    let moved = |a: &MapArg, numbers: &[u32]| match a {
        MapArg::Inst(i) => MapArg::Inst(numbers[*i as usize]),
        MapArg::Input(_) => *a,
    };
    for (i, inst) in body.insts.iter().enumerate().filter(|(i, _)| needed[*i]) {
        let mut inst = inst.clone();
        inst.args.iter_mut().for_each(|a| *a = moved(a, &numbers));
        numbers[i] = insts.len() as u32;
        insts.push(inst);
    }
    MapFn { insts, result: moved(&result, &numbers) }
}
