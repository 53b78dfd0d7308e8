//! Operations on tiles inside of roles: what the running thread holds of their results, and elements of what it holds or computes where it is used.

use super::config::MANY_REGISTERS;
use super::emit::{Emit, Held};
use super::fragment::{Geometry, Register, varies};
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use crate::nvidia::lower::{arith, isa};
use dsc_ir::sched::{Atom, Fragment, Inst, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, Type, ValueId};
use std::collections::HashMap;

/// Elements of a vector whose largest every thread finds for itself.
const EACH_BY_ITSELF: u32 = 16;

impl<'a> Emit<'a> {
    pub fn tile_op(&mut self, inst: &'a Inst, op: &'a tile::Op) -> Result<(), String> {
        match op {
            // Stored when the selection was taken.
            tile::Op::Store { .. } if self.lists.is_some() => return Ok(()),
            tile::Op::Store { view, index, value } if self.is_sums(*value) => {
                return self.store_sums(*view, index, *value);
            }
            tile::Op::TopkInit { .. } => {
                return self.begin_lists(inst.results[0], inst.scratch.ok_or("a selection without shared memory")?);
            }
            tile::Op::TopkPush { values, base, .. } => return self.push_sums(*values, *base),
            tile::Op::TopkTake { .. } => return self.take_lists(inst.results[1]),
            tile::Op::Reduce { x, kind: tile::ReduceKind::Max, .. } if matches!(self.shape(*x), &[count] if count <= EACH_BY_ITSELF) =>
            {
                return self.largest_of(inst.results[0], *x);
            }
            tile::Op::Store { view, index, value } => return self.store((*view, None, index), *value, inst.scratch),
            tile::Op::Scatter { view, rows, index, value } => {
                return self.store((*view, Some(*rows), index), *value, inst.scratch);
            }
            tile::Op::Reduce { x, kind: tile::ReduceKind::Max, .. } if self.dtype(*x) == dsc_ir::DType::I32 => {
                return self.largest(inst.results[0], *x);
            }
            tile::Op::Reduce { .. } if self.is_sums(inst.results[0]) => return self.sums_op(inst.results[0], op),
            tile::Op::Reduce { x, kind, .. } => return self.reduce_rows(inst.results[0], *x, *kind, inst.scratch),
            tile::Op::Dot { a, b, acc, trans_b } => return self.dot(inst.results[0], [*a, *b], *acc, *trans_b),
            _ => {}
        }
        let r = inst.results[0];
        if let Some(&share) = self.shares.get(&r) {
            return self.load_shared_out(r, share, op);
        }
        if matches!(self.s.places[r.0 as usize], Place::Fragment(_))
            && let Some(of) = self.rescaled(r, op)
        {
            return self.rescale(r, of);
        }
        match (&self.s.places[r.0 as usize], op) {
            (Place::Lazy, _) => Ok(()),
            (Place::Uniform, _) => {
                let v = self.scalar(op)?;
                self.held.insert(r, Held::Scalar(v));
                Ok(())
            }
            (Place::Fragment(Fragment { atom: Atom::WgmmaSums, .. }), op) => self.sums_op(r, op),
            (Place::Fragment(_), _) if self.sums.is_some() && self.shape(r).last() == Some(&1) => self.sums_of_rows(r),
            (Place::Shared(buffer), _) if self.sums.is_some() => self.share_rows(r, *buffer),
            (Place::Fragment(_), tile::Op::Load { view, index, shape }) if shape.len() == 2 => {
                self.load_fragment(r, *view, index)
            }
            (Place::Fragment(_), tile::Op::Load { .. } | tile::Op::Reshape { .. } | tile::Op::Map { .. })
                if self.spread(r).is_ok_and(|s| s == [false, true]) =>
            {
                self.hold_row(r)
            }
            (Place::Fragment(_), tile::Op::Gather { view, rows, index, .. }) => {
                self.gather_fragment(r, *view, *rows, index)
            }
            (Place::Fragment(_), tile::Op::Map { .. }) if self.shape(r).len() == 1 => {
                let geometry = self.the_geometry()?;
                let mut values = Vec::new();
                for register in geometry.varying(true, false) {
                    let [row, _] = geometry.coordinates(&mut self.t, register);
                    values.push(self.row_element(r, row)?);
                }
                self.held.insert(r, Held::Registers(values, [true, false]));
                Ok(())
            }
            (Place::Fragment(_), _) if self.lefts.contains(&r) => self.hold_packed(r),
            (Place::Fragment(_), tile::Op::Map { .. }) => {
                let geometry = self.seen_in(r)?;
                let mut seen = HashMap::new();
                let own = self.spread(r)?;
                let registers = geometry.varying(own[0], own[1]);
                let values =
                    registers.iter().map(|&at| self.map_element(op, at, &mut seen)).collect::<Result<_, _>>()?;
                self.held.insert(r, Held::Registers(values, own));
                self.note_spare(op);
                Ok(())
            }
            (place, _) => Err(format!("%{} in {place:?}", r.0)),
        }
    }

    /// Where the elements of a fragment lie.
    pub fn geometry(&mut self, v: ValueId) -> Result<Geometry, String> {
        let (Place::Fragment(fragment), Type::Tile(t)) = (&self.s.places[v.0 as usize], &self.s.types[v.0 as usize])
        else {
            return Err(format!("%{} is no fragment", v.0));
        };
        let &[rows, columns] = t.shape.as_slice() else { return Err(format!("%{} is no matrix", v.0)) };
        let key = (*fragment, [rows, columns]);
        if let Some(known) = self.geometries.get(&key) {
            return Ok(*known);
        }
        let new = Geometry::new(&mut self.t, self.role_warp, *fragment, [rows, columns]);
        self.geometries.insert(key, new);
        Ok(new)
    }

    /// Whether the role has no products.
    pub fn geometries_are_none(&self) -> bool {
        self.geometries.is_empty()
    }

    /// The only geometry of the role: what a lazy tile is seen in.
    pub fn the_geometry(&self) -> Result<Geometry, String> {
        let mut all = self.geometries.values();
        match (all.next(), all.next()) {
            (Some(one), None) => Ok(*one),
            _ => Err("a role with no product, or with products of several shapes".into()),
        }
    }

    /// The geometry that a tile is seen in: of products with as many rows and columns, where it has more than one of them.
    pub fn seen_in(&self, v: ValueId) -> Result<Geometry, String> {
        if self.geometries.len() < 2 {
            return self.the_geometry();
        }
        let shape = self.shape(self.before_reshapes(v));
        let (&columns, rows) = shape.split_last().unwrap_or((&1, &[]));
        let fits =
            |g: &&Geometry| [rows.iter().product(), columns].iter().zip(g.shape).all(|(&n, all)| n == 1 || n == all);
        // What fits several is a column or a row, which is alike in all of them.
        let all = self.geometries.values().filter(fits).min_by_key(|g| g.shape);
        all.copied().ok_or_else(|| format!("%{} is like none of the role's products", v.0))
    }

    /// Along which axes the registers of a tile vary: a matrix as products leave it has padding too.
    pub fn spread(&self, v: ValueId) -> Result<[bool; 2], String> {
        self.geometries.values().next().ok_or("a role with no product")?;
        let whole = self.geometries.values().any(|g| self.shape(v) == g.shape);
        Ok(if whole { [true, true] } else { varies(self.shape(v)) })
    }

    /// Computes a row: what a thread's columns are, or, where they are many, some each lane, which the others ask for where they use it.
    fn hold_row(&mut self, r: ValueId) -> Result<(), String> {
        let geometry = self.seen_in(r)?;
        let registers = geometry.varying(false, true);
        let columns = geometry.shape[1];
        let lanes = columns.is_multiple_of(Arch::WARP) && columns / Arch::WARP < registers.len() as u32;
        let whole = !geometry.transposed && geometry.wide == columns && self.shape(r).last() == Some(&columns);
        let mut values = Vec::new();
        if lanes && whole {
            for first in (0..columns).step_by(Arch::WARP as usize) {
                let column = self.t.f.add(self.t.lane, i32(first.into()));
                values.push(self.row_element(r, column)?);
            }
            self.held.insert(r, Held::Lanes(values));
            return Ok(());
        }
        for register in registers {
            let [_, column] = geometry.coordinates(&mut self.t, register);
            values.push(self.row_element(r, column)?);
        }
        self.held.insert(r, Held::Registers(values, [false, true]));
        Ok(())
    }

    /// Computes the left operand of a product, as the instruction takes it from registers.
    fn hold_packed(&mut self, r: ValueId) -> Result<(), String> {
        let geometry = self.geometry(r)?;
        if geometry.transposed || geometry.subs != 1 || self.dtype(r).bytes() != 2 {
            return Err(format!("%{} is no left operand of a product of one warpgroup", r.0));
        }
        let mut seen = HashMap::new();
        let mut words = Vec::new();
        for (j, h) in (0..geometry.wide / 8).flat_map(|j| [(j, 0), (j, 1)]) {
            words.push(self.packed(r, [0, 1].map(|e| Register { sub: 0, j, h, e }), &mut seen)?);
        }
        self.held.insert(r, Held::Packed(words));
        Ok(())
    }

    /// Notes the registers of partial sums that this has added.
    fn note_spare(&mut self, op: &tile::Op) {
        // A single ring feeds a contraction.
        for v in tile::operands(op).into_iter().filter(|_| self.s.channels.len() == 1) {
            let product = matches!(self.defs.get(&v).map(|i| &i.op), Some(Op::Tile(tile::Op::Dot { .. })));
            if let (true, Some(Held::Registers(values, [true, true]))) = (product, self.held.get(&v))
                && values.len() >= MANY_REGISTERS as usize
            {
                self.spare.push(values.clone());
            }
        }
    }

    /// An index operand.
    pub fn index(&mut self, i: Index) -> Result<Val, String> {
        match i {
            Index::Const(c) => Ok(i32(c)),
            Index::Value(v) => self.uniform(v),
        }
    }

    /// A value that is the same everywhere.
    pub fn uniform(&mut self, v: ValueId) -> Result<Val, String> {
        self.hand_out(v);
        match self.held.get(&v) {
            Some(Held::Scalar(x)) => Ok(*x),
            _ => Err(format!("%{} is not uniform", v.0)),
        }
    }

    /// A value that every thread computes.
    fn scalar(&mut self, op: &tile::Op) -> Result<Val, String> {
        match op {
            tile::Op::BlockId { axis } => Ok(self.block[*axis as usize]),
            tile::Op::Sym(sym) => Ok(self.syms[*sym as usize]),
            tile::Op::Full { value, .. } => Ok(arith::constant(*value)),
            tile::Op::Reshape { x, .. } => self.uniform(*x),
            tile::Op::Iota { .. } => Ok(i32(0)),
            tile::Op::Map { inputs, body } => {
                let args = inputs
                    .iter()
                    .map(|&v| Ok((self.uniform(v)?, self.dtype(v))))
                    .collect::<Result<Vec<_>, String>>()?;
                Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
            }
            tile::Op::Load { view, index, .. } => {
                let at = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
                let (at, inside) = self.element_at(*view, &at);
                match self.dtype(*view) {
                    dsc_ir::DType::F32 => Ok(ptx::load_f32_if(&mut self.t.f, inside, at)),
                    dsc_ir::DType::I32 => Ok(ptx::load_i32_if(&mut self.t.f, inside, at)),
                    other => Err(format!("a scalar of {other} from memory")),
                }
            }
            _ => Err("an operation that is no scalar arithmetic".into()),
        }
    }

    /// Element type of a tile or view.
    pub fn dtype(&self, v: ValueId) -> dsc_ir::DType {
        match &self.s.types[v.0 as usize] {
            Type::Tile(t) => t.dtype,
            Type::View(t) => t.dtype,
            Type::Topk { .. } => dsc_ir::DType::F32,
        }
    }

    /// Shape of a tile.
    pub fn shape(&self, v: ValueId) -> &'a [u32] {
        match &self.s.types[v.0 as usize] {
            Type::Tile(t) => &t.shape,
            _ => &[],
        }
    }

    /// A row or a column that the tile's elements are combined with.
    fn load_fragment(&mut self, r: ValueId, view: ValueId, index: &[Index]) -> Result<(), String> {
        let geometry = self.seen_in(r)?;
        let shape = self.shape(r);
        let Some(axis) = shape.iter().position(|&n| n > 1) else { return Err("a fragment of one element".into()) };
        let columns = axis + 1 == shape.len();
        let start = index.iter().map(|&i| self.index(i)).collect::<Result<Vec<_>, _>>()?;
        let mut values = Vec::new();
        for register in geometry.varying(!columns, columns) {
            let own = geometry.coordinates(&mut self.t, register)[usize::from(columns)];
            let mut at = start.clone();
            at[axis] = self.t.f.add(at[axis], own);
            let (at, inside) = self.element_at(view, &at);
            values.push(match self.dtype(view) {
                dsc_ir::DType::I32 => ptx::load_i32_if(&mut self.t.f, inside, at),
                _ => ptx::load_f32_if(&mut self.t.f, inside, at),
            });
        }
        self.held.insert(r, Held::Registers(values, [!columns, columns]));
        Ok(())
    }

    /// One element of a tile, as it is stored. `seen` keeps what lazy tiles have already given.
    pub fn element(
        &mut self,
        v: ValueId,
        at: Register,
        seen: &mut HashMap<(ValueId, usize), Val>,
    ) -> Result<Val, String> {
        self.settle(v);
        self.hand_out(v);
        match self.held.get(&v) {
            Some(Held::Scalar(x)) => return Ok(*x),
            Some(Held::Registers(values, [rows, columns])) => {
                let position = self.seen_in(v)?.position(at, *rows, *columns);
                return values.get(position).copied().ok_or_else(|| format!("%{} has no register {position}", v.0));
            }
            Some(Held::Lanes(values)) => {
                let (values, geometry) = (values.clone(), self.seen_in(v)?);
                let key = (v, geometry.position(at, false, true));
                if let Some(&known) = seen.get(&key) {
                    return Ok(known);
                }
                // Neighbours in a quad of lanes have neighbouring columns, from a multiple of 8 on.
                let first = 8 * at.j;
                let own = self.t.f.add(geometry.own[1], i32((first % Arch::WARP + at.e).into()));
                let value = ptx::from_lane(&mut self.t.f, values[(first / Arch::WARP) as usize], own);
                seen.insert(key, value);
                return Ok(value);
            }
            _ => {}
        }
        let geometry = self.seen_in(v)?;
        if let Place::Shared(buffer) = self.s.places[v.0 as usize] {
            let key = (v, geometry.position(at, true, false));
            if let Some(&known) = seen.get(&key) {
                return Ok(known);
            }
            let value = self.shared_row(buffer, at)?;
            seen.insert(key, value);
            return Ok(value);
        }
        let inst = *self.defs.get(&v).ok_or_else(|| format!("%{} is not defined", v.0))?;
        let [rows, columns] = varies(self.shape(v));
        let key = (v, geometry.position(at, rows, columns));
        if let Some(&known) = seen.get(&key) {
            return Ok(known);
        }
        let value = match &inst.op {
            Op::Tile(tile::Op::Full { value, .. }) => arith::constant(*value),
            Op::Tile(tile::Op::Iota { axis, shape }) if shape.len() == 2 => {
                geometry.coordinates(&mut self.t, at)[*axis as usize]
            }
            Op::Tile(tile::Op::Reshape { x, .. }) => self.element(*x, at, seen)?,
            Op::Tile(op @ tile::Op::Map { .. }) => self.map_element(op, at, seen)?,
            _ => return Err(format!("%{} is read where it is not held", v.0)),
        };
        seen.insert(key, value);
        Ok(value)
    }

    fn map_element(
        &mut self,
        op: &tile::Op,
        at: Register,
        seen: &mut HashMap<(ValueId, usize), Val>,
    ) -> Result<Val, String> {
        let tile::Op::Map { inputs, body } = op else { return Err("no map".into()) };
        let mut args = Vec::with_capacity(inputs.len());
        for &v in inputs {
            args.push((self.element(v, at, seen)?, self.dtype(v)));
        }
        Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
    }

    /// What a value is the same elements of.
    pub fn before_reshapes(&self, mut v: ValueId) -> ValueId {
        while let Some(Op::Tile(tile::Op::Reshape { x, .. })) = self.defs.get(&v).map(|i| &i.op) {
            v = *x;
        }
        v
    }

    /// Two neighbours of a 16-bit or 8-bit tile in one word, the first in the low half.
    pub fn packed(
        &mut self,
        v: ValueId,
        at: [Register; 2],
        seen: &mut HashMap<(ValueId, usize), Val>,
    ) -> Result<Val, String> {
        let dtype = self.dtype(v);
        if let Some(Held::Packed(words)) = self.held.get(&v) {
            return words.get((2 * at[0].j + at[0].h) as usize).copied().ok_or_else(|| format!("%{} is narrower", v.0));
        }
        let root = self.before_reshapes(v);
        // The usual end of a kernel is a rounding: then one instruction rounds both.
        if let Some(Op::Tile(tile::Op::Map { inputs, body })) = self.defs.get(&root).map(|i| &i.op)
            && let MapArg::Inst(last) = body.result
            && let Some(rounding) = body.insts.get(last as usize)
            && rounding.op == tile::ScalarOp::Cast(dtype)
            && let Some(&from) = rounding.args.first()
        {
            let before = tile::MapFn { insts: body.insts[..last as usize].to_vec(), result: from };
            let mut halves = Vec::new();
            for register in at {
                let mut args = Vec::new();
                for &input in inputs {
                    args.push((self.element(input, register, seen)?, self.dtype(input)));
                }
                halves.push(arith::apply(&mut self.t.f, self.t.arch, &before, &args));
            }
            if halves.iter().all(|h| h.1 == dsc_ir::DType::F32) {
                let (low, high) = (halves[0].0, halves[1].0);
                return Ok(match dtype {
                    dsc_ir::DType::E4m3 => ptx::pack_e4m3(&mut self.t.f, low, high),
                    _ => isa::pack(&mut self.t.f, dtype, low, high),
                });
            }
        }
        let low = self.element(v, at[0], seen)?;
        let high = self.element(v, at[1], seen)?;
        let (low, high) = (self.t.f.cast("zext", low, Ty::I32), self.t.f.cast("zext", high, Ty::I32));
        let high = self.t.f.bin("shl", high, i32(8 * dtype.bytes() as i64));
        let both = self.t.f.bin("or", low, high);
        Ok(if dtype.bytes() == 1 { self.t.f.cast("trunc", both, Ty::I16) } else { both })
    }
}
