//! Access to parameters: bounds, masks, gathers and scatters.
//!
//! Every access is checked against its view when the kernel runs: this is the safety boundary, since indices come
//! from data. A tile that lies wholly inside its view is not copied: it is used at its address ([`Base::Param`]). If a part
//! lies outside, the part inside is copied into a cleared slot, and the code after it sees another base and other strides.
//! So the check costs one branch a tile and nothing an element.
//!
//! Stores first have their tile in scratch, then copy the part inside the view. That is one pass more than a fused store
//! would need, in the nearest cache, and it makes a store safe whatever else is bound to the same buffer. A tile that is still at
//! an address in a parameter when something is stored is copied before ([`Cg::settle_params`]), for the same reason.

use super::emit::{Bound, Routine};
use super::lower::{Cg, Val};
use super::tile::{Base, Coef, Expr, Leaf, MemTile, Tile, dense_coefs, element_bytes};
use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{InstBuilder, Value, types};
use dsc_ir::DType;
use dsc_ir::tile::{Index, ValueId};

/// A number of elements: static, or known when the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    Const(i64),
    Value(Value),
}

/// A parameter's view at run time.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// Address of element zero.
    pub(crate) base: Value,
    pub(crate) dtype: DType,
    pub(crate) dims: Vec<Count>,
    pub(crate) strides: Vec<Coef>,
}

/// A range along one axis of a tile: what lies inside the view.
#[derive(Clone, Copy, Debug)]
struct Range {
    lo: Count,
    hi: Count,
}

impl Cg<'_> {
    fn count(&mut self, c: Count) -> Value {
        match c {
            Count::Const(c) => self.f.i64(c),
            Count::Value(v) => v,
        }
    }

    pub(crate) fn coef(&mut self, c: Coef) -> Value {
        match c {
            Coef::Const(c) => self.f.i64(c),
            Coef::Value(v) => v,
        }
    }

    /// An index as an i64.
    fn start(&mut self, index: &Index) -> Count {
        match index {
            Index::Const(c) => Count::Const(*c),
            Index::Value(v) => {
                let v = self.scalar(*v);
                Count::Value(self.f.b.ins().sextend(types::I64, v))
            }
        }
    }

    /// Whether `start .. start + n` lies in `0 .. dim`; `None` if it certainly does.
    fn inside(&mut self, start: Count, n: i64, dim: Count) -> Option<Value> {
        if let (Count::Const(s), Count::Const(d)) = (start, dim) {
            let inside = s >= 0 && s + n <= d;
            return (!inside).then(|| self.f.b.ins().iconst(types::I8, 0));
        }
        let (start_value, dim_value) = (self.count(start), self.count(dim));
        let end = self.f.add_const(start_value, n);
        let below = self.f.b.ins().icmp(IntCC::SignedLessThanOrEqual, end, dim_value);
        if matches!(start, Count::Const(s) if s >= 0) {
            return Some(below);
        }
        let above = self.f.b.ins().icmp_imm_s(IntCC::SignedGreaterThanOrEqual, start_value, 0);
        Some(self.f.b.ins().band(above, below))
    }

    fn both(&mut self, a: Option<Value>, b: Option<Value>) -> Option<Value> {
        match (a, b) {
            (Some(a), Some(b)) => Some(self.f.b.ins().band(a, b)),
            (a, b) => a.or(b),
        }
    }

    /// The part of a tile's axis that lies inside the view.
    fn clip(&mut self, start: Count, n: i64, dim: Count) -> Range {
        if let (Count::Const(s), Count::Const(d)) = (start, dim) {
            let lo = (-s).clamp(0, n);
            return Range { lo: Count::Const(lo), hi: Count::Const((d - s).clamp(lo, n)) };
        }
        let (start, dim) = (self.count(start), self.count(dim));
        let (zero, n) = (self.f.i64(0), self.f.i64(n));
        let before = self.f.b.ins().ineg(start);
        let lo = self.f.b.ins().smax(before, zero);
        let lo = self.f.b.ins().smin(lo, n);
        let left = self.f.b.ins().isub(dim, start);
        let hi = self.f.b.ins().smin(left, n);
        let hi = self.f.b.ins().smax(hi, lo);
        Range { lo: Count::Value(lo), hi: Count::Value(hi) }
    }

    /// `base + Σ start * stride`.
    fn offset(&mut self, base: Value, starts: &[Count], strides: &[Coef]) -> Value {
        let mut at = base;
        for (&start, &stride) in starts.iter().zip(strides) {
            match (start, stride) {
                (Count::Const(s), Coef::Const(c)) => at = self.f.add_const(at, s * c),
                (Count::Const(0), _) => {}
                (start, stride) => {
                    let start = self.count(start);
                    let by = self.scaled(start, stride);
                    at = self.f.b.ins().iadd(at, by);
                }
            }
        }
        at
    }

    /// Emits `body` where `cond` holds (always for `None`).
    fn when(&mut self, cond: Option<Value>, body: impl FnOnce(&mut Self)) {
        let Some(cond) = cond else { return body(self) };
        let (yes, next) = (self.f.block(&[]), self.f.block(&[]));
        self.f.branch(cond, yes, &[], next, &[]);
        self.f.switch(yes);
        body(self);
        self.f.jump(next, &[]);
        self.f.switch(next);
    }

    /// Copies the part of a tile of `shape` that `ranges` say lies inside. Both sides are at the tile's element zero.
    fn copy_box(
        &mut self,
        dtype: DType,
        (dst, dst_coefs): (Value, &[Coef]),
        (src, src_coefs): (Value, &[Coef]),
        shape: &[u32],
        ranges: &[Range],
    ) {
        let mut any = None;
        // An axis of one element has no loop to skip: below the view its range is 1..1, above it 0..0.
        let whole = |r: &Range| r.lo == Count::Const(0) && r.hi == Count::Const(1);
        for (r, _) in ranges.iter().zip(shape).filter(|(r, n)| **n == 1 && !whole(r)) {
            let (lo, hi) = (self.count(r.lo), self.count(r.hi));
            let some = self.f.b.ins().icmp(IntCC::SignedLessThan, lo, hi);
            any = self.both(any, Some(some));
        }
        let axes: Vec<usize> = (0..shape.len()).filter(|&d| shape[d] != 1).collect();
        self.when(any, |cg| cg.copy_axes(dtype, (dst, dst_coefs), (src, src_coefs), &axes, ranges));
    }

    fn copy_axes(
        &mut self,
        dtype: DType,
        (mut d, dst_coefs): (Value, &[Coef]),
        (mut s, src_coefs): (Value, &[Coef]),
        axes: &[usize],
        ranges: &[Range],
    ) {
        let bytes = element_bytes(dtype);
        let unit = |d: usize| dst_coefs[d] == Coef::Const(bytes) && src_coefs[d] == Coef::Const(bytes);
        let row = axes.last().copied().filter(|&d| unit(d));
        let rows_axis = row.and_then(|_| axes.len().checked_sub(2).map(|i| axes[i]));
        let outer = &axes[..axes.len() - usize::from(row.is_some()) - usize::from(rows_axis.is_some())];
        let mut loops = Vec::new();
        for &axis in outer {
            let (lo, hi) = (self.count(ranges[axis].lo), self.count(ranges[axis].hi));
            let l = self.f.begin_loop(lo, Bound::Value(hi), 1, &[]);
            let (by_d, by_s) = (self.scaled(l.i, dst_coefs[axis]), self.scaled(l.i, src_coefs[axis]));
            (d, s) = (self.f.b.ins().iadd(d, by_d), self.f.b.ins().iadd(s, by_s));
            loops.push(l);
        }
        match row {
            None => {
                let raw = if dtype == DType::Bool { DType::I32 } else { dtype };
                let v = self.load_one(raw, s, 0);
                self.store_one(raw, v, d, 0);
            }
            Some(row) => {
                let lo = self.count(ranges[row].lo);
                let hi = self.count(ranges[row].hi);
                let length = self.f.b.ins().isub(hi, lo);
                let (length, skip) = (self.f.mul_const(length, bytes), self.f.mul_const(lo, bytes));
                (d, s) = (self.f.b.ins().iadd(d, skip), self.f.b.ins().iadd(s, skip));
                let (mut count, mut ld_d, mut ld_s) = (self.f.i64(1), lo, lo);
                if let Some(axis) = rows_axis {
                    let (lo, hi) = (self.count(ranges[axis].lo), self.count(ranges[axis].hi));
                    count = self.f.b.ins().isub(hi, lo);
                    (ld_d, ld_s) = (self.coef(dst_coefs[axis]), self.coef(src_coefs[axis]));
                    let (by_d, by_s) = (self.scaled(lo, dst_coefs[axis]), self.scaled(lo, src_coefs[axis]));
                    (d, s) = (self.f.b.ins().iadd(d, by_d), self.f.b.ins().iadd(s, by_s));
                }
                self.f.call(Routine::CopyRows, &[d, ld_d, s, ld_s, count, length]);
            }
        }
        for l in loops.into_iter().rev() {
            self.f.end_loop(l, &[]);
        }
    }

    fn clear(&mut self, at: Value, bytes: u64) {
        let bytes = self.f.i64(bytes as i64);
        self.f.call(Routine::Clear, &[at, bytes]);
    }

    /// [`dsc_ir::tile::Op::Load`].
    pub(crate) fn load(&mut self, view: ValueId, index: &[Index], shape: &[u32]) -> Val {
        let view = self.view(view);
        let starts: Vec<Count> = index.iter().map(|i| self.start(i)).collect();
        let mut inside = None;
        for d in 0..shape.len() {
            let here = self.inside(starts[d], shape[d].into(), view.dims[d]);
            inside = self.both(inside, here);
        }
        let at = self.offset(view.base, &starts, &view.strides);
        if shape.iter().all(|&n| n == 1) {
            return Val::Scalar(self.load_masked(view.dtype, at, inside), view.dtype);
        }
        let dense = dense_coefs(view.dtype, shape);
        let plain = |d: usize| if shape[d] == 1 { Coef::ZERO } else { view.strides[d] };
        let tile = |base: Base, coefs: Vec<Coef>| {
            let expr = Expr::Leaf(Leaf::Mem(MemTile { base, coefs, dtype: view.dtype }));
            Val::Tile(Tile { dtype: view.dtype, shape: shape.to_vec(), expr })
        };
        let Some(inside) = inside else {
            return tile(Base::Param(at, None), (0..shape.len()).map(plain).collect());
        };
        // Strides that differ between memory and the copy become parameters of the block where both meet.
        let differs: Vec<usize> = (0..shape.len()).filter(|&d| shape[d] != 1 && view.strides[d] != dense[d]).collect();
        let slot = self.slot_for(view.dtype, shape);
        let masked = self.f.block(&[]);
        self.f.b.set_cold_block(masked);
        let meet = self.f.block(&vec![types::I64; 1 + differs.len()]);
        let mut direct = vec![at];
        for &d in &differs {
            let stride = self.coef(view.strides[d]);
            direct.push(stride);
        }
        self.f.branch(inside, meet, &direct, masked, &[]);
        self.f.switch(masked);
        let copy = self.address(&Base::Slot(slot.clone(), 0));
        self.clear(copy, slot.bytes);
        let ranges: Vec<Range> =
            (0..shape.len()).map(|d| self.clip(starts[d], shape[d].into(), view.dims[d])).collect();
        self.copy_box(view.dtype, (copy, &dense), (at, &view.strides), shape, &ranges);
        let mut other = vec![copy];
        for &d in &differs {
            let stride = self.coef(dense[d]);
            other.push(stride);
        }
        self.f.jump(meet, &other);
        let params = self.f.switch(meet);
        let mut coefs: Vec<Coef> = (0..shape.len()).map(plain).collect();
        for (&d, &v) in differs.iter().zip(&params[1..]) {
            coefs[d] = Coef::Value(v);
        }
        tile(Base::Param(params[0], Some(slot)), coefs)
    }

    /// One element, zero if not `inside`.
    fn load_masked(&mut self, dtype: DType, at: Value, inside: Option<Value>) -> Value {
        let Some(inside) = inside else { return self.load_one(dtype, at, 0) };
        let ty = super::math::Lanes::One.ty(dtype);
        let (yes, next) = (self.f.block(&[]), self.f.block(&[ty]));
        let zero = if ty == types::F32 { self.f.f32(0.0) } else { self.f.b.ins().iconst(ty, 0) };
        self.f.branch(inside, yes, &[], next, &[zero]);
        self.f.switch(yes);
        let v = self.load_one(dtype, at, 0);
        self.f.jump(next, &[v]);
        self.f.switch(next)[0]
    }

    /// [`dsc_ir::tile::Op::Store`].
    pub(crate) fn store(&mut self, view: ValueId, index: &[Index], value: ValueId) {
        let view = self.view(view);
        let starts: Vec<Count> = index.iter().map(|i| self.start(i)).collect();
        match self.take(value) {
            Val::Scalar(v, dtype) => {
                let mut inside = None;
                for (&start, &dim) in starts.iter().zip(&view.dims) {
                    let here = self.inside(start, 1, dim);
                    inside = self.both(inside, here);
                }
                let at = self.offset(view.base, &starts, &view.strides);
                self.when(inside, |cg| cg.store_one(dtype, v, at, 0));
            }
            Val::Tile(tile) => {
                let source = self.in_scratch(value, &tile);
                let at = self.offset(view.base, &starts, &view.strides);
                let ranges: Vec<Range> =
                    (0..starts.len()).map(|d| self.clip(starts[d], tile.shape[d].into(), view.dims[d])).collect();
                let from = self.address(&source.base);
                self.copy_box(view.dtype, (at, &view.strides), (from, &source.coefs), &tile.shape, &ranges);
            }
            Val::Topk(_) => unreachable!("`infer` stores tiles only"),
        }
    }

    /// A tile in scratch, for a copy out: as it is if it is there with contiguous rows.
    fn in_scratch(&mut self, id: ValueId, tile: &Tile) -> MemTile {
        let row = (0..tile.shape.len()).rev().find(|&d| tile.shape[d] != 1);
        let contiguous = |m: &MemTile| row.is_none_or(|d| m.coefs[d] == Coef::Const(element_bytes(m.dtype)));
        match tile.expr.memory() {
            Some(m) if matches!(m.base, Base::Slot(..)) && contiguous(m) => m.clone(),
            _ => self.materialise_over(id, tile),
        }
    }

    /// [`dsc_ir::tile::Op::Gather`].
    pub(crate) fn gather(&mut self, view: ValueId, rows: ValueId, index: &[Index], shape: &[u32]) -> Val {
        let view = self.view(view);
        let rows = self.dense(rows);
        let slot = self.slot_for(view.dtype, shape);
        let dst = MemTile::dense(&slot, view.dtype, shape);
        let to = self.address(&dst.base);
        self.indexed_rows(&view, &rows, index, shape, Some((to, &dst.coefs)), None);
        self.tile_value(dst, shape)
    }

    /// [`dsc_ir::tile::Op::Scatter`].
    pub(crate) fn scatter(&mut self, view: ValueId, rows: ValueId, index: &[Index], value: ValueId) {
        let view = self.view(view);
        let rows = self.dense(rows);
        let (source, shape) = match self.take(value) {
            Val::Tile(tile) => (self.in_scratch(value, &tile), tile.shape),
            _ => {
                let m = self.dense(value);
                let rank = view.dims.len();
                (m, vec![1; rank])
            }
        };
        let from = self.address(&source.base);
        self.indexed_rows(&view, &rows, index, &shape, None, Some((from, &source.coefs)));
    }

    /// Copies rows chosen by index, from the view to `dst` or from `src` to the view.
    fn indexed_rows(
        &mut self,
        view: &View,
        rows: &MemTile,
        index: &[Index],
        shape: &[u32],
        dst: Option<(Value, &[Coef])>,
        src: Option<(Value, &[Coef])>,
    ) {
        let starts: Vec<Count> = index.iter().map(|i| self.start(i)).collect();
        let column = self.offset(view.base, &starts, &view.strides[1..]);
        let mut inside = None;
        for (d, &start) in starts.iter().enumerate() {
            let here = self.inside(start, shape[d + 1].into(), view.dims[d + 1]);
            inside = self.both(inside, here);
        }
        let ranges: Vec<Range> =
            starts.iter().enumerate().map(|(d, &s)| self.clip(s, shape[d + 1].into(), view.dims[d + 1])).collect();
        let row_bytes = shape[1..].iter().map(|&n| i64::from(n)).product::<i64>() * element_bytes(view.dtype);
        let table = self.address(&rows.base);
        let height = self.count(view.dims[0]);

        let l = self.f.begin_count(shape[0].into(), 1);
        let at = self.f.mul_const(l.i, 4);
        let at = self.f.b.ins().iadd(table, at);
        let row = self.f.b.ins().load(types::I32, super::emit::mem(), at, 0);
        let row = self.f.b.ins().sextend(types::I64, row);
        // Unsigned: a negative row is beyond every height.
        let valid = self.f.b.ins().icmp(IntCC::UnsignedLessThan, row, height);
        let by = self.scaled(row, view.strides[0]);
        let in_view = self.f.b.ins().iadd(column, by);
        let tile_coef = dst.or(src).map_or(Coef::ZERO, |(_, coefs)| if shape[0] == 1 { Coef::ZERO } else { coefs[0] });
        let by = self.scaled(l.i, tile_coef);
        if let Some((to, coefs)) = dst {
            let to = self.f.b.ins().iadd(to, by);
            let whole = self.both(inside, Some(valid)).expect("validity is always checked");
            let partial = self.f.b.ins().bxor_imm_u(whole, 1);
            self.when(Some(partial), |cg| cg.clear_row(view.dtype, to, row_bytes));
            self.when(Some(valid), |cg| {
                cg.copy_box(view.dtype, (to, &coefs[1..]), (in_view, &view.strides[1..]), &shape[1..], &ranges);
            });
        }
        if let Some((from, coefs)) = src {
            let from = self.f.b.ins().iadd(from, by);
            self.when(Some(valid), |cg| {
                cg.copy_box(view.dtype, (in_view, &view.strides[1..]), (from, &coefs[1..]), &shape[1..], &ranges);
            });
        }
        self.f.end_loop(l, &[]);
    }

    /// Clears a row of any length: [`Routine::Clear`] would round it up over the next one.
    fn clear_row(&mut self, dtype: DType, at: Value, bytes: i64) {
        let whole = bytes / 64 * 64;
        if whole > 0 {
            self.clear(at, whole as u64);
        }
        let step = element_bytes(dtype);
        if bytes > whole {
            let (lo, zero) = (self.f.i64(whole), self.f.i32(0));
            let l = self.f.begin_loop(lo, Bound::Const(bytes), step, &[]);
            let to = self.f.b.ins().iadd(at, l.i);
            match step {
                4 => drop(self.f.b.ins().store(super::emit::mem(), zero, to, 0)),
                2 => drop(self.f.b.ins().istore16(super::emit::mem(), zero, to, 0)),
                _ => drop(self.f.b.ins().istore8(super::emit::mem(), zero, to, 0)),
            }
            self.f.end_loop(l, &[]);
        }
    }

    /// Copies every live tile that is (partly) at an address in a parameter into scratch: a store is about to happen. The value
    /// that is stored goes there anyway.
    pub(crate) fn settle_params(&mut self, stored: Option<ValueId>) {
        for id in self.live_values() {
            if Some(id) == stored && !self.used_later(id) {
                continue;
            }
            if let Some(Val::Tile(tile)) = self.peek(id)
                && tile.expr.reads_param()
            {
                let tile = tile.clone();
                let m = self.materialise(&tile);
                let settled = self.tile_value(m, &tile.shape);
                self.improve(id, settled);
            }
        }
    }
}
