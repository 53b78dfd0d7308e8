//! One kernel: the block loop, and the walk over the program's structure.
//!
//! Scalars, and tiles of one element, are registers. Larger tiles are [`Tile`] expressions, evaluated late: a map with a
//! single use is evaluated inside its user's loop. A value that more than one thing needs is evaluated where it is defined.
//!
//! A result takes over the slot of an operand where that operand is dead afterwards and is read element by element
//! ([`Cg::materialise_over`]); so `acc = acc * scale; acc = dot(p, v, acc)` inside a loop works on one slot that never moves. Tiles carried by a
//! loop have a slot each; a yield writes there, through a temporary only if it reads another carried slot.

use super::asm::Width;
use super::emit::{Bound, Fun, Routine, mem};
use super::liveness::Liveness;
use super::math::{Lanes, Math, inst_types};
use super::memory::{Count, View};
use super::tile::{Arena, Base, Coef, Expr, Leaf, MapNode, MemTile, Slot, Tile, dense_coefs, element_bytes};
use super::topk;
use cranelift_codegen::ir::{InstBuilder, StackSlot, Value, types};
use dsc_ir::tile::{Index, Inst, MapFn, Op, Program, ReduceKind, Region, Type, ValueId};
use dsc_ir::{DType, Extent};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// What a value of the program is while its code is generated.
#[derive(Clone, Debug)]
pub(crate) enum Val {
    /// A tile of one element, in a register.
    Scalar(Value, DType),
    Tile(Tile),
    /// The rows of a streaming selection.
    Topk(Rc<Slot>),
}

impl Val {
    fn uses_slot(&self, slot: &Rc<Slot>) -> bool {
        match self {
            Val::Scalar(..) => false,
            Val::Tile(t) => t.expr.uses_slot(slot),
            Val::Topk(s) => Rc::ptr_eq(s, slot),
        }
    }
}

/// The generator of one kernel.
pub(crate) struct Cg<'a> {
    pub(crate) f: Fun<'a>,
    pub(crate) scratch: Value,
    pub(crate) arena: Rc<RefCell<Arena>>,
    program: &'a Program,
    width: Width,
    syms: [Value; 6],
    views: Vec<(ValueId, View)>,
    blocks: Vec<Value>,
    /// Where the arguments of [`Routine::Wide`] are put.
    pub(crate) wide_args: Option<StackSlot>,
    env: Vec<Option<Val>>,
    /// The region each value is defined in, and the one being lowered.
    home: Vec<u32>,
    here: u32,
    regions: u32,
    live: Liveness,
    /// Number of the instruction being lowered.
    at: u32,
    next: u32,
    /// Numbers that cannot be reached from here: second arms while in the first.
    excluded: Vec<Range<u32>>,
}

/// Emits the whole kernel into `f`; gives the bytes of scratch a worker needs and the routines called.
pub(crate) fn lower(f: Fun, program: &Program, width: Width) -> (u64, Vec<Routine>) {
    let mut f = f;
    let entry = f.b.create_block();
    f.b.append_block_params_for_function_params(entry);
    let params = f.switch(entry);
    let [args, syms, scratch, first, last] = params[..] else { unreachable!("the signature has five parameters") };
    let syms: [Value; 6] = std::array::from_fn(|i| {
        let v = f.b.ins().load(types::I32, mem(), syms, i as i32 * 4);
        f.b.ins().uextend(types::I64, v)
    });
    let mut cg = Cg {
        f,
        scratch,
        arena: Rc::default(),
        program,
        width,
        syms,
        views: Vec::new(),
        blocks: Vec::new(),
        wide_args: None,
        env: vec![None; program.types.len()],
        home: vec![0; program.types.len()],
        here: 0,
        regions: 0,
        live: Liveness::new(program),
        at: 0,
        next: 0,
        excluded: Vec::new(),
    };
    cg.open_views(args);
    let sizes: Vec<Value> = program.grid.iter().map(|g| cg.grid_size(g)).collect();
    let l = cg.f.begin_loop(first, Bound::Value(last), 1, &[]);
    let mut rest = l.i;
    for (axis, &size) in sizes.iter().enumerate() {
        let id = if axis + 1 == sizes.len() {
            rest
        } else {
            let id = cg.f.b.ins().urem(rest, size);
            rest = cg.f.b.ins().udiv(rest, size);
            id
        };
        let id = cg.f.b.ins().ireduce(types::I32, id);
        cg.blocks.push(id);
    }
    cg.region(&program.body);
    cg.f.end_loop(l, &[]);
    cg.f.b.ins().return_(&[]);
    let bytes = cg.arena.borrow().bytes();
    let routines = cg.f.routines();
    let Cg { f, .. } = cg;
    f.finish();
    (bytes, routines)
}

impl Cg<'_> {
    pub(crate) fn width(&self) -> Width {
        self.width
    }

    fn extent(&mut self, e: Extent) -> Count {
        match e.sym {
            None => Count::Const(i64::from(e.factor)),
            Some(sym) => {
                let v = self.syms[sym as usize];
                Count::Value(self.f.mul_const(v, i64::from(e.factor)))
            }
        }
    }

    fn open_views(&mut self, args: Value) {
        for (i, param) in self.program.params.iter().enumerate() {
            let Some(ty) = self.program.view(param.value) else { continue };
            let base = self.f.b.ins().load(types::I64, mem(), args, i as i32 * 8);
            let base = self.f.add_const(base, ty.offset as i64);
            let dims = ty.shape.iter().map(|&e| self.extent(e)).collect();
            let stride = |cg: &mut Self, s: &dsc_ir::tile::Stride| match s.sym {
                None => Coef::Const(s.bytes),
                Some(sym) => {
                    let v = cg.syms[sym as usize];
                    Coef::Value(cg.f.mul_const(v, s.bytes))
                }
            };
            let strides = ty.strides.iter().map(|s| stride(self, s)).collect();
            self.views.push((param.value, View { base, dtype: ty.dtype, dims, strides }));
        }
    }

    /// Blocks along an axis, at least one so that dividing by it is defined.
    fn grid_size(&mut self, g: &dsc_ir::extent::GridDim) -> Value {
        let tile = i64::from(g.tile.max(1));
        match self.extent(g.extent) {
            Count::Const(n) => self.f.i64(((n + tile - 1) / tile).max(1)),
            Count::Value(n) => {
                let up = self.f.add_const(n, tile - 1);
                let tile = self.f.i64(tile);
                let blocks = self.f.b.ins().udiv(up, tile);
                let one = self.f.i64(1);
                self.f.b.ins().umax(blocks, one)
            }
        }
    }

    // Values.

    pub(crate) fn view(&self, v: ValueId) -> View {
        self.views.iter().find(|x| x.0 == v).expect("views are parameters").1.clone()
    }

    pub(crate) fn shape(&self, v: ValueId) -> Vec<u32> {
        self.program.tile(v).expect("the operand is a tile").shape.clone()
    }

    pub(crate) fn set(&mut self, v: ValueId, val: Val) {
        self.env[v.0 as usize] = Some(val);
        self.home[v.0 as usize] = self.here;
    }

    /// Replaces a value by an equal one that is cheaper to use. Only where it is defined: what an arm or a loop's body learns
    /// of an outer value does not hold outside, where the code may not have run.
    pub(crate) fn improve(&mut self, v: ValueId, val: Val) {
        if self.home[v.0 as usize] == self.here {
            self.env[v.0 as usize] = Some(val);
        }
    }

    pub(crate) fn peek(&self, v: ValueId) -> Option<&Val> {
        self.env[v.0 as usize].as_ref()
    }

    /// An operand of the instruction being lowered.
    pub(crate) fn take(&self, v: ValueId) -> Val {
        self.peek(v).expect("operands are defined before their use").clone()
    }

    /// A scalar operand.
    pub(crate) fn scalar(&self, v: ValueId) -> Value {
        match self.take(v) {
            Val::Scalar(v, _) => v,
            other => unreachable!("expected a scalar, found {other:?}"),
        }
    }

    pub(crate) fn used_later(&self, v: ValueId) -> bool {
        self.live.used_from(v, self.at + 1, &self.excluded)
    }

    /// Values that something after the instruction being lowered needs.
    pub(crate) fn live_values(&self) -> Vec<ValueId> {
        let ids = (0..self.env.len() as u32).map(ValueId);
        ids.filter(|&v| self.peek(v).is_some() && self.used_later(v)).collect()
    }

    pub(crate) fn slot_for(&self, dtype: DType, shape: &[u32]) -> Rc<Slot> {
        let elements: u64 = shape.iter().map(|&n| u64::from(n)).product();
        Slot::new(&self.arena, elements * element_bytes(dtype) as u64)
    }

    /// Memory as a value: a register if it is one element.
    pub(crate) fn tile_value(&mut self, m: MemTile, shape: &[u32]) -> Val {
        let dtype = m.dtype;
        if shape.iter().all(|&n| n == 1) {
            let at = self.address(&m.base);
            return Val::Scalar(self.load_one(dtype, at, 0), dtype);
        }
        Val::Tile(Tile { dtype, shape: shape.to_vec(), expr: Expr::Leaf(Leaf::Mem(m)) })
    }

    /// An operand, dense in scratch.
    pub(crate) fn dense(&mut self, v: ValueId) -> MemTile {
        match self.take(v) {
            Val::Scalar(value, dtype) => {
                let shape = self.shape(v);
                let slot = self.slot_for(dtype, &shape);
                let m = MemTile::dense(&slot, dtype, &shape);
                let at = self.address(&m.base);
                self.store_one(dtype, value, at, 0);
                m
            }
            Val::Tile(tile) => self.materialise(&tile),
            Val::Topk(_) => unreachable!("`infer` takes tiles here"),
        }
    }

    /// Whether nothing needs `slot` after this instruction but `id`, nor this instruction through another operand.
    fn exclusive(&self, slot: &Rc<Slot>, id: Option<ValueId>) -> bool {
        (0..self.env.len() as u32).map(ValueId).all(|v| {
            let from = if id.is_none() || id == Some(v) { self.at + 1 } else { self.at };
            !self.peek(v).is_some_and(|x| x.uses_slot(slot)) || !self.live.used_from(v, from, &self.excluded)
        })
    }

    /// Evaluates a tile, which is operand `id` or (without one) the result of this instruction, into a slot that may be
    /// written: that of a leaf if it is free from here on, else a new one.
    pub(crate) fn evaluate_over(&mut self, id: Option<ValueId>, tile: &Tile) -> MemTile {
        let slots: Vec<Rc<Slot>> = tile
            .expr
            .leaves()
            .into_iter()
            .filter_map(|l| match l {
                Leaf::Mem(m) => m.whole_slot(&tile.shape).cloned(),
                _ => None,
            })
            .collect();
        let free =
            slots.into_iter().find(|s| tile.expr.aligned_with(s, &tile.shape, tile.dtype) && self.exclusive(s, id));
        let in_place = free.is_some();
        let slot = free.unwrap_or_else(|| self.slot_for(tile.dtype, &tile.shape));
        let dst = MemTile::dense(&slot, tile.dtype, &tile.shape);
        if !(in_place && tile.expr.memory().is_some()) {
            self.evaluate_into(&dst, tile);
        }
        dst
    }

    /// [`Cg::evaluate_over`] of an operand.
    pub(crate) fn materialise_over(&mut self, id: ValueId, tile: &Tile) -> MemTile {
        self.evaluate_over(Some(id), tile)
    }

    /// Puts a tile into a slot that may hold something the tile reads.
    fn assign(&mut self, slot: &Rc<Slot>, tile: &Tile) {
        if tile.expr.memory().and_then(|m| m.whole_slot(&tile.shape)).is_some_and(|s| Rc::ptr_eq(s, slot)) {
            return;
        }
        let dst = MemTile::dense(slot, tile.dtype, &tile.shape);
        if tile.expr.aligned_with(slot, &tile.shape, tile.dtype) {
            return self.evaluate_into(&dst, tile);
        }
        let temporary = self.slot_for(tile.dtype, &tile.shape);
        let m = MemTile::dense(&temporary, tile.dtype, &tile.shape);
        self.evaluate_into(&m, tile);
        self.evaluate_into(&dst, &Tile { expr: Expr::Leaf(Leaf::Mem(m)), ..tile.clone() });
    }

    // Structure.

    fn number(&mut self) {
        self.at = self.next;
        self.next += 1;
    }

    /// Goes into a new region; gives the one that is left.
    fn enter(&mut self) -> u32 {
        self.regions += 1;
        std::mem::replace(&mut self.here, self.regions)
    }

    /// Lowers a region; afterwards its own number is current and its yields are still defined.
    fn region(&mut self, region: &Region) {
        for inst in &region.insts {
            self.number();
            let at = self.at;
            self.inst(inst);
            // Nested regions have moved on; what they needed is over.
            self.at = self.at.max(at);
            self.prune();
        }
        self.number();
    }

    /// Forgets values that nothing needs any more, which frees their slots.
    fn prune(&mut self) {
        for i in 0..self.env.len() {
            if self.env[i].is_some() && !self.used_later(ValueId(i as u32)) {
                self.env[i] = None;
            }
        }
    }

    fn inst(&mut self, inst: &Inst) {
        let out = |i: usize| inst.results[i];
        match &inst.op {
            Op::BlockId { axis } => {
                let id = self.blocks.get(*axis as usize).copied();
                let id = id.unwrap_or_else(|| self.f.i32(0));
                self.set(out(0), Val::Scalar(id, DType::I32));
            }
            Op::Sym(sym) => {
                let v = self.syms[*sym as usize];
                let v = self.f.b.ins().ireduce(types::I32, v);
                self.set(out(0), Val::Scalar(v, DType::I32));
            }
            Op::Full { value, shape } => {
                let val = self.leaf(Leaf::Const(*value), value.dtype(), shape);
                self.set(out(0), val);
            }
            Op::Iota { axis, shape } => {
                let mut coefs = vec![0; shape.len()];
                coefs[*axis as usize] = 1;
                let val = self.leaf(Leaf::Iota { base: 0, coefs }, DType::I32, shape);
                self.set(out(0), val);
            }
            Op::Load { view, index, shape } => {
                let val = self.load(*view, index, shape);
                self.set(out(0), val);
            }
            Op::Store { view, index, value } => {
                self.settle_params(Some(*value));
                self.store(*view, index, *value);
            }
            Op::Gather { view, rows, index, shape } => {
                let val = self.gather(*view, *rows, index, shape);
                self.set(out(0), val);
            }
            Op::Scatter { view, rows, index, value } => {
                self.settle_params(Some(*value));
                self.scatter(*view, *rows, index, *value);
            }
            Op::Map { inputs, body } => self.map(out(0), inputs, body),
            Op::Reduce { x, axis, kind } => self.reduce(out(0), *x, *axis as usize, *kind),
            Op::Scan { x, axis, kind } => self.scan(out(0), *x, *axis as usize, *kind),
            Op::Dot { a, b, acc, trans_b } => {
                let shape = self.shape(out(0));
                let val = self.dot(*a, *b, *acc, *trans_b, &shape);
                self.set(out(0), val);
            }
            Op::Reshape { x, shape } => self.reshape(out(0), *x, shape),
            Op::Permute { x, perm } => self.reindex(out(0), *x, |l, _| Some(l.permute(perm))),
            Op::Slice { x, offsets, .. } => self.slice(out(0), *x, offsets),
            Op::Concat { xs, axis } => self.concat(out(0), xs, *axis as usize),
            Op::TopkInit { rows, k } => self.topk_init(out(0), *rows, *k),
            Op::TopkPush { state, values, base } => self.topk_push(out(0), *state, *values, *base),
            Op::TopkTake { state } => self.topk_take(&inst.results, *state),
            Op::For { lo, hi, step, init, body } => self.for_loop(inst, lo, hi, *step, init, body),
            Op::If { cond, then, otherwise } => self.if_else(inst, *cond, then, otherwise),
        }
    }

    /// A leaf as a value: a register if it is one element.
    fn leaf(&mut self, leaf: Leaf, dtype: DType, shape: &[u32]) -> Val {
        let tile = Tile { dtype, shape: shape.to_vec(), expr: Expr::Leaf(leaf) };
        self.tile_or_scalar(tile)
    }

    fn tile_or_scalar(&mut self, tile: Tile) -> Val {
        if tile.shape.iter().all(|&n| n == 1) {
            return Val::Scalar(self.single_element(&tile), tile.dtype);
        }
        Val::Tile(tile)
    }

    fn map(&mut self, out: ValueId, inputs: &[ValueId], body: &MapFn) {
        let dtypes: Vec<DType> =
            inputs.iter().map(|&v| self.program.tile(v).expect("inputs are tiles").dtype).collect();
        let (types, result) = inst_types(body, &dtypes);
        let shape = self.shape(out);
        let values: Vec<Val> = inputs.iter().map(|&v| self.take(v)).collect();
        if shape.iter().all(|&n| n == 1) {
            let scalars: Vec<Value> = inputs.iter().map(|&v| self.scalar(v)).collect();
            let v = Math { f: &mut self.f, lanes: Lanes::One }.map(body, &types, &dtypes, &scalars);
            return self.set(out, Val::Scalar(v, result));
        }
        let mut exprs = Vec::new();
        for (val, &id) in values.into_iter().zip(inputs) {
            exprs.push(match val {
                Val::Scalar(v, dtype) => Expr::Leaf(Leaf::Splat(v, dtype)),
                Val::Tile(tile) if tile.shape == shape => tile.expr,
                Val::Tile(tile) => {
                    // Evaluated once, not once for every repetition.
                    let expr = match &tile.expr {
                        Expr::Map(..) => {
                            let m = self.materialise(&tile);
                            let memory = self.tile_value(m.clone(), &tile.shape);
                            self.improve(id, memory);
                            Expr::Leaf(Leaf::Mem(m))
                        }
                        leaf => leaf.clone(),
                    };
                    expr.map_leaves(&mut |l| Some(l.broadcast(&tile.shape, &shape))).expect("broadcasts are linear")
                }
                Val::Topk(_) => unreachable!("`infer` takes tiles here"),
            });
        }
        let node = Rc::new(MapNode { body: body.clone(), types, inputs: dtypes });
        let tile = Tile { dtype: result, shape, expr: Expr::Map(node, exprs) };
        self.define(out, tile);
    }

    /// Defines a computed tile: late if it has one use, else now.
    fn define(&mut self, out: ValueId, tile: Tile) {
        let val = if self.live.single_use(out) {
            Val::Tile(tile)
        } else {
            let m = self.evaluate_over(None, &tile);
            self.tile_value(m, &tile.shape)
        };
        self.set(out, val);
    }

    fn reduce(&mut self, out: ValueId, x: ValueId, axis: usize, kind: ReduceKind) {
        let val = match self.take(x) {
            Val::Tile(tile) if tile.shape[axis] != 1 => {
                let shape = self.shape(out);
                if shape.iter().all(|&n| n == 1) {
                    let v = self.reduce_into(None, &tile, axis, kind).expect("one element comes in a register");
                    Val::Scalar(v, tile.dtype)
                } else {
                    let slot = self.slot_for(tile.dtype, &shape);
                    let dst = MemTile::dense(&slot, tile.dtype, &shape);
                    self.reduce_into(Some(&dst), &tile, axis, kind);
                    self.tile_value(dst, &shape)
                }
            }
            same => same,
        };
        self.set(out, val);
    }

    fn scan(&mut self, out: ValueId, x: ValueId, axis: usize, kind: ReduceKind) {
        let val = match self.take(x) {
            Val::Tile(tile) if tile.shape[axis] != 1 => {
                let slot = self.slot_for(tile.dtype, &tile.shape);
                let dst = MemTile::dense(&slot, tile.dtype, &tile.shape);
                self.scan_into(&dst, &tile, axis, kind);
                self.tile_value(dst, &tile.shape)
            }
            same => same,
        };
        self.set(out, val);
    }

    fn reshape(&mut self, out: ValueId, x: ValueId, shape: &[u32]) {
        let Val::Tile(tile) = self.take(x) else { return self.set(out, self.take(x)) };
        let moved = tile.expr.map_leaves(&mut |l| l.reshape(&tile.shape, shape));
        let expr = match moved {
            Some(expr) if matches!(expr, Expr::Leaf(_)) || self.live.single_use(x) => expr,
            _ => {
                let m = self.materialise(&tile);
                let memory = self.tile_value(m.clone(), &tile.shape);
                self.improve(x, memory);
                Expr::Leaf(Leaf::Mem(MemTile { coefs: dense_coefs(m.dtype, shape), ..m }))
            }
        };
        self.computed(out, Tile { dtype: tile.dtype, shape: shape.to_vec(), expr });
    }

    /// Defines a tile that may be a leaf (which costs nothing to use twice) or still to be computed.
    fn computed(&mut self, out: ValueId, tile: Tile) {
        if matches!(tile.expr, Expr::Leaf(_)) {
            let val = self.tile_or_scalar(tile);
            return self.set(out, val);
        }
        self.define(out, tile);
    }

    /// The same elements under a linear change of index.
    fn reindex(&mut self, out: ValueId, x: ValueId, f: impl Fn(&Leaf, &[u32]) -> Option<Leaf>) {
        let Val::Tile(tile) = self.take(x) else { return self.set(out, self.take(x)) };
        let expr = tile.expr.map_leaves(&mut |l| f(l, &tile.shape)).expect("the change is linear");
        let shape = self.shape(out);
        self.computed(out, Tile { dtype: tile.dtype, shape, expr });
    }

    fn slice(&mut self, out: ValueId, x: ValueId, offsets: &[u32]) {
        let Val::Tile(tile) = self.take(x) else { return self.set(out, self.take(x)) };
        let shape = self.shape(out);
        let mut expr = tile.expr.clone();
        expr = expr.map_leaves(&mut |l| Some(self.shifted(l, offsets))).expect("a shift is linear");
        let tile = Tile { dtype: tile.dtype, shape, expr };
        if tile.shape.iter().all(|&n| n == 1) {
            let val = self.tile_or_scalar(tile);
            return self.set(out, val);
        }
        self.computed(out, tile);
    }

    /// A leaf from another element on.
    fn shifted(&mut self, leaf: &Leaf, offsets: &[u32]) -> Leaf {
        match leaf {
            Leaf::Iota { base, coefs } => {
                let moved: i64 = coefs.iter().zip(offsets).map(|(&c, &o)| c * i64::from(o)).sum();
                Leaf::Iota { base: base + moved, coefs: coefs.clone() }
            }
            Leaf::Mem(m) => {
                let mut constant = 0;
                let mut dynamic = Vec::new();
                for (&c, &o) in m.coefs.iter().zip(offsets) {
                    match c {
                        Coef::Const(c) => constant += c * i64::from(o),
                        Coef::Value(_) if o == 0 => {}
                        Coef::Value(v) => dynamic.push((v, i64::from(o))),
                    }
                }
                let base = match &m.base {
                    Base::Slot(slot, offset) if dynamic.is_empty() => Base::Slot(slot.clone(), offset + constant),
                    base => {
                        let mut at = self.address(base);
                        at = self.f.add_const(at, constant);
                        for (v, o) in dynamic {
                            let by = self.f.mul_const(v, o);
                            at = self.f.b.ins().iadd(at, by);
                        }
                        match base {
                            Base::Param(_, copy) => Base::Param(at, copy.clone()),
                            Base::Slot(..) => unreachable!("slots have static strides"),
                        }
                    }
                };
                Leaf::Mem(MemTile { base, ..m.clone() })
            }
            constant => constant.clone(),
        }
    }

    fn concat(&mut self, out: ValueId, xs: &[ValueId], axis: usize) {
        let shape = self.shape(out);
        let dtype = self.program.tile(out).expect("the result is a tile").dtype;
        if shape.iter().all(|&n| n == 1) {
            return self.set(out, self.take(xs[0]));
        }
        let slot = self.slot_for(dtype, &shape);
        let dst = MemTile::dense(&slot, dtype, &shape);
        let mut offset = 0;
        for &x in xs {
            let part = MemTile { base: Base::Slot(slot.clone(), offset), ..dst.clone() };
            let part_shape = self.shape(x);
            match self.take(x) {
                Val::Scalar(v, _) => {
                    let at = self.address(&part.base);
                    self.store_one(dtype, v, at, 0);
                }
                Val::Tile(tile) => self.evaluate_into(&part, &tile),
                Val::Topk(_) => unreachable!("`infer` takes tiles here"),
            }
            let Coef::Const(stride) = dst.coefs[axis] else { unreachable!("slots have static strides") };
            offset += stride * i64::from(part_shape[axis]);
        }
        let val = self.tile_value(dst, &shape);
        self.set(out, val);
    }

    // Streaming selections.

    fn topk_type(&self, v: ValueId) -> (u32, u32) {
        match self.program.ty(v) {
            Type::Topk { rows, k } => (*rows, *k),
            other => unreachable!("expected a selection, found {other}"),
        }
    }

    fn topk_slot(&self, rows: u32, k: u32) -> Rc<Slot> {
        Slot::new(&self.arena, u64::from(rows) * topk::row_bytes(k))
    }

    /// Emits `body` for each row of a state, with the row's counter and address.
    fn topk_rows(&mut self, slot: &Rc<Slot>, rows: u32, k: u32, body: impl FnOnce(&mut Self, Value, Value)) {
        let state = self.address(&Base::Slot(slot.clone(), 0));
        let l = self.f.begin_count(rows.into(), 1);
        let by = self.f.mul_const(l.i, topk::row_bytes(k) as i64);
        let row = self.f.b.ins().iadd(state, by);
        body(self, l.i, row);
        self.f.end_loop(l, &[]);
    }

    fn topk_init(&mut self, out: ValueId, rows: u32, k: u32) {
        let slot = self.topk_slot(rows, k);
        self.topk_rows(&slot, rows, k, |cg, _, row| topk::emit_reset(&mut cg.f, row));
        self.set(out, Val::Topk(slot));
    }

    /// A state that may be changed: the operand's own if nothing else needs it.
    fn topk_over(&mut self, id: ValueId) -> Rc<Slot> {
        let Val::Topk(slot) = self.take(id) else { unreachable!("expected a selection") };
        if self.exclusive(&slot, Some(id)) {
            return slot;
        }
        let (rows, k) = self.topk_type(id);
        let copy = self.topk_slot(rows, k);
        self.topk_copy(&copy, &slot, rows, k);
        copy
    }

    fn topk_copy(&mut self, to: &Rc<Slot>, from: &Rc<Slot>, rows: u32, k: u32) {
        let (to, from) = (self.address(&Base::Slot(to.clone(), 0)), self.address(&Base::Slot(from.clone(), 0)));
        let (count, bytes) = (self.f.i64(rows.into()), self.f.i64(topk::row_bytes(k) as i64));
        self.f.call(Routine::CopyRows, &[to, bytes, from, bytes, count, bytes]);
    }

    fn topk_push(&mut self, out: ValueId, state: ValueId, values: ValueId, base: ValueId) {
        let (rows, k) = self.topk_type(state);
        let n = self.shape(values)[1];
        let values = self.dense(values);
        let slot = self.topk_over(state);
        let base = self.scalar(base);
        let base = self.f.b.ins().sextend(types::I64, base);
        let from = self.address(&values.base);
        self.topk_rows(&slot, rows, k, |cg, i, row| {
            let by = cg.f.mul_const(i, i64::from(n) * 4);
            let source = cg.f.b.ins().iadd(from, by);
            let (k_value, capacity) = (cg.f.i64(k.into()), cg.f.i64(topk::capacity(k) as i64));
            let n = cg.f.i64(n.into());
            cg.f.call(Routine::TopkPush, &[row, k_value, capacity, source, n, base]);
        });
        self.set(out, Val::Topk(slot));
    }

    fn topk_take(&mut self, out: &[ValueId], state: ValueId) {
        let (rows, k) = self.topk_type(state);
        // Taking cuts the state to its best, which changes nothing that a later push or take could see.
        let Val::Topk(slot) = self.take(state) else { unreachable!("expected a selection") };
        let shape = [rows, k];
        let values = MemTile::dense(&self.slot_for(DType::F32, &shape), DType::F32, &shape);
        let numbers = MemTile::dense(&self.slot_for(DType::I32, &shape), DType::I32, &shape);
        let (to_values, to_numbers) = (self.address(&values.base), self.address(&numbers.base));
        self.topk_rows(&slot, rows, k, |cg, i, row| {
            let by = cg.f.mul_const(i, i64::from(k) * 4);
            let (v, n) = (cg.f.b.ins().iadd(to_values, by), cg.f.b.ins().iadd(to_numbers, by));
            let (k_value, capacity) = (cg.f.i64(k.into()), cg.f.i64(topk::capacity(k) as i64));
            cg.f.call(Routine::TopkTake, &[row, k_value, capacity, v, n]);
        });
        let values = self.tile_value(values, &shape);
        let numbers = self.tile_value(numbers, &shape);
        self.set(out[0], values);
        self.set(out[1], numbers);
    }

    // Control flow.

    fn bound(&mut self, index: &Index) -> (Value, Option<i64>) {
        match index {
            Index::Const(c) => (self.f.i64(*c), Some(*c)),
            Index::Value(v) => {
                let v = self.scalar(*v);
                (self.f.b.ins().sextend(types::I64, v), None)
            }
        }
    }

    fn for_loop(&mut self, inst: &Inst, lo: &Index, hi: &Index, step: u32, init: &[ValueId], body: &Region) {
        if self.live.nested(self.at).stores {
            self.settle_params(None);
        }
        let ((lo, lo_const), (hi, hi_const)) = (self.bound(lo), self.bound(hi));
        let mut carried: Vec<Option<Rc<Slot>>> = Vec::new();
        let mut scalars = Vec::new();
        for (i, &v) in init.iter().enumerate() {
            let repeated = init.iter().enumerate().any(|(j, &w)| j != i && w == v);
            match self.take(v) {
                Val::Scalar(value, _) => {
                    scalars.push(value);
                    carried.push(None);
                }
                Val::Tile(tile) => carried.push(Some(self.carried_tile(v, &tile, repeated))),
                Val::Topk(_) if !repeated => carried.push(Some(self.topk_over(v))),
                Val::Topk(slot) => {
                    let (rows, k) = self.topk_type(v);
                    let copy = self.topk_slot(rows, k);
                    self.topk_copy(&copy, &slot, rows, k);
                    carried.push(Some(copy));
                }
            }
        }
        let bound = match (lo_const, hi_const) {
            (Some(lo), Some(hi)) if lo < hi => Bound::Const(hi),
            _ => Bound::Value(hi),
        };
        let l = self.f.begin_loop(lo, bound, step.into(), &scalars);
        let counter = self.f.b.ins().ireduce(types::I32, l.i);
        let outside = self.enter();
        self.set(body.args[0], Val::Scalar(counter, DType::I32));
        self.bind(&body.args[1..], &carried, &l.accs.clone());
        self.region(body);
        let next = self.yield_into(&body.yields, &carried);
        let results = self.f.end_loop(l, &next);
        self.number();
        self.forget(body);
        self.here = outside;
        self.bind(&inst.results, &carried, &results);
    }

    /// A slot for a carried tile, holding its initial value.
    fn carried_tile(&mut self, id: ValueId, tile: &Tile, repeated: bool) -> Rc<Slot> {
        if !repeated {
            let m = self.materialise_over(id, tile);
            if let Base::Slot(slot, 0) = m.base {
                return slot;
            }
        }
        let slot = self.slot_for(tile.dtype, &tile.shape);
        self.evaluate_into(&MemTile::dense(&slot, tile.dtype, &tile.shape), tile);
        slot
    }

    /// Defines values that live in slots, or in the next of `scalars`.
    fn bind(&mut self, ids: &[ValueId], slots: &[Option<Rc<Slot>>], scalars: &[Value]) {
        let mut scalars = scalars.iter();
        for (&id, slot) in ids.iter().zip(slots) {
            let val = match (slot, self.program.ty(id)) {
                (None, Type::Tile(t)) => Val::Scalar(*scalars.next().expect("one a scalar"), t.dtype),
                (Some(slot), Type::Tile(t)) => {
                    let m = MemTile::dense(slot, t.dtype, &t.shape);
                    Val::Tile(Tile { dtype: t.dtype, shape: t.shape.clone(), expr: Expr::Leaf(Leaf::Mem(m)) })
                }
                (Some(slot), _) => Val::Topk(slot.clone()),
                (None, other) => unreachable!("{other} is not held in a register"),
            };
            self.set(id, val);
        }
    }

    /// Writes yields to their slots; gives those held in registers. What reads a slot that another yield writes goes
    /// to a temporary before anything is written.
    fn yield_into(&mut self, yields: &[ValueId], slots: &[Option<Rc<Slot>>]) -> Vec<Value> {
        let mut scalars = Vec::new();
        let mut direct = Vec::new();
        let mut moved = Vec::new();
        for (i, (&v, slot)) in yields.iter().zip(slots).enumerate() {
            let conflicts = |cg: &Self| {
                let val = cg.peek(v).expect("yields are defined");
                slots.iter().enumerate().any(|(j, s)| j != i && s.as_ref().is_some_and(|s| val.uses_slot(s)))
            };
            match (self.take(v), slot) {
                (Val::Scalar(value, _), _) => scalars.push(value),
                (Val::Tile(tile), Some(slot)) if conflicts(self) => {
                    let temporary = self.slot_for(tile.dtype, &tile.shape);
                    let m = MemTile::dense(&temporary, tile.dtype, &tile.shape);
                    self.evaluate_into(&m, &tile);
                    moved.push((slot.clone(), Tile { expr: Expr::Leaf(Leaf::Mem(m)), ..tile }));
                }
                (Val::Tile(tile), Some(slot)) => direct.push((slot.clone(), tile)),
                (Val::Topk(from), Some(slot)) if !Rc::ptr_eq(&from, slot) => {
                    let (rows, k) = self.topk_type(v);
                    if conflicts(self) {
                        let temporary = self.topk_slot(rows, k);
                        self.topk_copy(&temporary, &from, rows, k);
                        moved_topk(&mut moved, slot, &temporary, rows, k);
                    } else {
                        moved_topk(&mut moved, slot, &from, rows, k);
                    }
                }
                (Val::Topk(_), _) => {}
                (Val::Tile(_), None) => unreachable!("a tile is carried in a slot"),
            }
        }
        for (slot, tile) in direct.into_iter().chain(moved) {
            self.assign(&slot, &tile);
        }
        scalars
    }

    /// Forgets what a region defined.
    fn forget(&mut self, region: &Region) {
        for &v in region.args.iter().chain(region.insts.iter().flat_map(|i| &i.results)) {
            self.env[v.0 as usize] = None;
        }
    }

    fn if_else(&mut self, inst: &Inst, cond: ValueId, then: &Region, otherwise: &Region) {
        let nested = self.live.nested(self.at);
        if nested.stores {
            self.settle_params(None);
        }
        let cond = self.scalar(cond);
        let tys: Vec<_> = inst
            .results
            .iter()
            .filter_map(|&v| match self.program.ty(v) {
                Type::Tile(t) if t.elements() == 1 => Some(Lanes::One.ty(t.dtype)),
                _ => None,
            })
            .collect();
        let (yes, no, meet) = (self.f.block(&[]), self.f.block(&[]), self.f.block(&tys));
        self.f.branch(cond, yes, &[], no, &[]);
        self.f.switch(yes);
        let before = self.env.clone();
        let outside = self.enter();
        self.excluded.push(nested.otherwise);
        self.region(then);
        let slots = self.result_slots(&then.yields);
        let scalars = self.yield_into(&then.yields, &slots);
        self.excluded.pop();
        self.f.jump(meet, &scalars);
        self.env = before;
        self.enter();
        self.f.switch(no);
        self.region(otherwise);
        let scalars = self.yield_into(&otherwise.yields, &slots);
        self.f.jump(meet, &scalars);
        self.forget(otherwise);
        self.here = outside;
        let results = self.f.switch(meet);
        self.bind(&inst.results, &slots, &results);
    }

    /// Where the results of a branch go: the slot that the first arm has them in if that is free, else a new one.
    fn result_slots(&mut self, yields: &[ValueId]) -> Vec<Option<Rc<Slot>>> {
        let mut slots: Vec<Option<Rc<Slot>>> = Vec::new();
        for &v in yields {
            let taken = |s: &Rc<Slot>| slots.iter().flatten().any(|t| Rc::ptr_eq(s, t));
            let slot = match self.take(v) {
                Val::Scalar(..) => None,
                Val::Tile(tile) => {
                    let own = tile.expr.memory().and_then(|m| m.whole_slot(&tile.shape)).cloned();
                    let own = own.filter(|s| !taken(s) && self.exclusive(s, Some(v)));
                    Some(own.unwrap_or_else(|| self.slot_for(tile.dtype, &tile.shape)))
                }
                Val::Topk(slot) if !taken(&slot) && self.exclusive(&slot, Some(v)) => Some(slot),
                Val::Topk(_) => {
                    let (rows, k) = self.topk_type(v);
                    Some(self.topk_slot(rows, k))
                }
            };
            slots.push(slot);
        }
        slots
    }
}

/// A state's bytes as a tile of dwords, so that it is moved like one.
fn moved_topk(moved: &mut Vec<(Rc<Slot>, Tile)>, to: &Rc<Slot>, from: &Rc<Slot>, rows: u32, k: u32) {
    let shape = vec![rows, (topk::row_bytes(k) / 4) as u32];
    let m = MemTile::dense(from, DType::I32, &shape);
    moved.push((to.clone(), Tile { dtype: DType::I32, shape, expr: Expr::Leaf(Leaf::Mem(m)) }));
}
