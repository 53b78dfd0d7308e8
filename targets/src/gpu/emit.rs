//! Scheduled tile IR to MLIR: control flow, elementwise evaluation, and access to shared and global memory.
//!
//! A tile is read by [`Emitter::chunk`]: some neighbours along its last axis, at coordinates that may be run-time values. Lazy
//! values are computed there and then, recursively; shared ones are loaded. Fragments are read only by the thread that has
//! them: [`super::fragment`].
//!
//! Bounds are part of the meaning: a global access is masked by its view unless the coordinates are provably inside. A masked load
//! reads the view's first element instead, so it needs no branch.

use super::block::Threads;
use super::direct::{Ring, rings_in};
use super::fragment::Spread;
use super::isa;
use super::mlir::{Ty, Val, f32, i32, i64};
use super::schedule::{matrix, shared_bytes};
use super::{arith, divisor};
use super::{scan, topk};
use dsc_ir::sched::{Block, Buffer, BufferId, ChannelId, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, MapFn, Type, ValueId, ViewType};
use dsc_ir::{DType, Extent, Sym};
use std::collections::{HashMap, HashSet};

/// Rounds of an elementwise loop that are written out rather than looped over.
pub const UNROLLED: u32 = 8;
/// Rounds in flight in a loop.
const IN_FLIGHT: u32 = 4;

/// One kernel being written.
pub struct Emitter<'a> {
    /// Threads and the function.
    pub t: Threads<'a>,
    /// The kernel.
    pub s: &'a Scheduled,
    defs: HashMap<ValueId, &'a tile::Op>,
    /// Single elements, which each thread has.
    pub uniform: HashMap<ValueId, Val>,
    /// Registers of fragments.
    pub fragments: HashMap<ValueId, Vec<Val>>,
    /// Buffers whose elements are as [`super::isa::Isa::operand_word`] makes them.
    pub ready: HashSet<BufferId>,
    /// Loads that were made a round ahead, by the tile they are of: see [`super::ahead`].
    pub ahead: HashMap<ValueId, Vec<Val>>,
    /// Inputs of arithmetic on fragments that were read before its turn, by result and input.
    pub early: HashMap<(ValueId, ValueId), Vec<Val>>,
    /// Whether global memory is read at all: where this does not hold, a load's address is its view's first element.
    pub reading: Val,
    /// By channel.
    pub rings: Vec<Ring>,
    /// What lies in a stage of a ring: the stage's first byte behind its buffer's.
    pub taken: HashMap<ValueId, Val>,
    /// The ring of the loop being written, if halves of the block alternate there.
    pub alternating: Option<ChannelId>,
    /// A number that divides a uniform integer.
    pub divisors: HashMap<ValueId, i64>,
    params: HashMap<ValueId, Val>,
    syms: [Val; 6],
    blocks: [Val; 3],
    /// What the schedule should have given and did not; such a kernel must not be used.
    pub fault: Option<String>,
}

/// A tile on its way to its buffer.
pub struct Fill<'a> {
    /// What makes it.
    pub op: &'a tile::Op,
    /// The tile.
    pub r: ValueId,
    /// Where it goes.
    pub b: &'a Buffer,
    /// Elements of a chunk.
    n: u32,
    /// Whether the buffer has elements as matrix instructions take them.
    ready: bool,
}

impl Fill<'_> {
    /// Chunks of the buffer, padding included.
    pub fn chunks(&self) -> u32 {
        self.b.shape[0] * (self.b.shape[1] / self.n)
    }

    /// Chunks of a thread.
    pub fn rounds(&self, threads: u32) -> u32 {
        self.chunks().div_ceil(threads)
    }
}

/// Where a chunk of global memory is.
pub struct Access {
    /// The view's first element.
    first: Val,
    /// Type of elements, and how many.
    dtype: DType,
    n: u32,
    /// Address of the first element.
    at: Val,
    /// Whether all elements may be moved at once.
    whole: bool,
    /// Whether the elements are inside the view: one for all if `whole`, else one each.
    inside: Vec<Val>,
    /// Bytes from element to element.
    step: Val,
}

impl<'a> Emitter<'a> {
    /// Writes the kernel's body.
    pub fn run(t: Threads<'a>, s: &'a Scheduled) -> Emitter<'a> {
        let mut e = Emitter {
            t,
            s,
            defs: HashMap::new(),
            uniform: HashMap::new(),
            fragments: HashMap::new(),
            ready: HashSet::new(),
            ahead: HashMap::new(),
            early: HashMap::new(),
            reading: Val::Int(1, Ty::I1),
            rings: s.channels.iter().map(|_| Ring::default()).collect(),
            taken: HashMap::new(),
            alternating: None,
            divisors: HashMap::new(),
            params: HashMap::new(),
            syms: [i32(0); 6],
            blocks: [i32(0); 3],
            fault: None,
        };
        definitions(&s.common, &mut e.defs);
        e.ready = e.only_multiplied();
        for (i, p) in s.params.iter().enumerate() {
            e.params.insert(p.value, Val::Arg(i as u32, Ty::Global));
        }
        let syms = Val::Arg(s.params.len() as u32, e.t.symbols);
        for sym in Sym::ALL {
            let at = e.t.f.offset(syms, i64(4 * sym as i64));
            e.syms[sym as usize] = e.t.f.load(at, Ty::I32, 1)[0];
        }
        for axis in 0..s.grid.len().min(3) {
            e.blocks[axis] = e.t.arch.block(&mut e.t.f, axis);
        }
        // Launches may have blocks beyond the grid: they have nothing to do.
        let mut inside = Val::Int(1, Ty::I1);
        for (axis, dim) in s.grid.iter().enumerate() {
            if dim.extent.sym.is_some() {
                let extent = e.extent(dim.extent);
                let first = e.t.f.mul(e.blocks[axis], i32(dim.tile.into()));
                let ok = e.t.f.cmp("slt", first, extent);
                inside = e.t.f.bin("and", inside, ok);
            }
        }
        let (body, end) = (e.t.f.label(), e.t.f.label());
        e.t.f.cond_br(inside, (body, &[]), (end, &[]));
        e.t.f.start(body, &[]);
        e.deal_to_dies();
        e.block(&s.common);
        e.t.f.br(end, &[]);
        e.t.f.start(end, &[]);
        e
    }

    /// Numbers blocks anew, so that neighbours run on one die. Die `d` of `D` runs the blocks that the hardware numbers `d`, `d + D`, ..; of all
    /// in order it gets the `d`-th part.
    fn deal_to_dies(&mut self) {
        let [x, y, ..] = self.s.grid[..] else { return };
        let dies = self.s.dies;
        if dies == 1 {
            return;
        }
        let [columns, lines] = [x, y].map(|dim| {
            let extent = self.extent(dim.extent);
            let extent = self.t.f.add(extent, i32(i64::from(dim.tile) - 1));
            self.t.f.div(extent, dim.tile)
        });
        let f = &mut self.t.f;
        let line = f.mul(self.blocks[1], columns);
        let number = f.add(line, self.blocks[0]);
        let all = f.mul(columns, lines);
        let (die, at) = (f.rem(number, dies), f.div(number, dies));
        let (each, more) = (f.div(all, dies), f.rem(all, dies));
        let first = f.mul(die, each);
        // The first dies have one more where they do not divide.
        let fewer = f.cmp("slt", die, more);
        let extra = f.select(fewer, die, more);
        let first = f.add(first, extra);
        let number = f.add(first, at);
        let (line, place) = (f.bin("udiv", number, columns), f.bin("urem", number, columns));
        self.blocks[0] = self.t.arch.uniform(&mut self.t.f, place);
        self.blocks[1] = self.t.arch.uniform(&mut self.t.f, line);
    }

    /// Type of a tile's elements.
    pub fn dtype(&self, v: ValueId) -> DType {
        match &self.s.types[v.0 as usize] {
            Type::Tile(t) => t.dtype,
            Type::View(t) => t.dtype,
            Type::Topk { .. } => DType::F32,
        }
    }

    /// Shape of a tile.
    pub fn shape(&self, v: ValueId) -> &'a [u32] {
        match &self.s.types[v.0 as usize] {
            Type::Tile(t) => &t.shape,
            _ => &[],
        }
    }

    /// What makes a value; none for parameters, and for what loops and branches give.
    pub fn definition(&self, v: ValueId) -> Option<&'a tile::Op> {
        self.defs.get(&v).copied()
    }

    /// Where a value lies.
    pub fn place(&self, v: ValueId) -> &'a Place {
        &self.s.places[v.0 as usize]
    }

    /// Whether the kernel only reads a view.
    pub fn read_only(&self, view: ValueId) -> bool {
        self.s.params.iter().any(|p| p.value == view && p.access == tile::Access::Read)
    }

    /// A buffer of shared memory.
    pub fn buffer(&self, b: BufferId) -> &'a Buffer {
        &self.s.buffers[b.0 as usize]
    }

    /// The shared buffer that a value is, seen through reshapes.
    pub fn root_buffer(&self, v: ValueId) -> &'a Buffer {
        match self.root(v) {
            Some(b) => self.buffer(b),
            None => unreachable!("the scheduler put %{} in shared memory", v.0),
        }
    }

    /// Which shared buffer a value is, seen through reshapes; none if it is not in shared memory.
    pub fn root(&self, mut v: ValueId) -> Option<BufferId> {
        loop {
            match (self.place(v), self.defs.get(&v)) {
                (Place::Shared(b), _) => return Some(*b),
                (Place::Slot(c, slot), _) => return Some(self.s.channels[c.0 as usize].slots[*slot as usize]),
                (_, Some(tile::Op::Reshape { x, .. })) => v = *x,
                _ => return None,
            }
        }
    }

    fn scratch(&self, inst: &Inst) -> Option<u32> {
        inst.scratch.map(|b| self.buffer(b).offset)
    }

    /// Scratch memory that an operation cannot do without.
    pub fn needed(&mut self, scratch: Option<u32>, by: &str) -> u32 {
        if scratch.is_none() {
            self.fault = Some(format!("no scratch memory was scheduled for {by}"));
        }
        scratch.unwrap_or_default()
    }

    /// The same of the state of a top-k.
    fn topk_scratch(&mut self, inst: &Inst, state: &topk::State) -> u32 {
        match self.scratch(inst) {
            None if state.scratch_bytes(self.t.threads) == 0 => 0,
            scratch => self.needed(scratch, "a top-k"),
        }
    }

    /// The address that a view is of.
    pub fn param(&self, view: ValueId) -> Val {
        self.params[&view]
    }

    /// A size in this step.
    pub fn extent(&mut self, e: Extent) -> Val {
        match e.sym {
            None => i32(e.factor.into()),
            Some(sym) => self.t.f.mul(self.syms[sym as usize], i32(e.factor.into())),
        }
    }

    fn block(&mut self, block: &'a Block) {
        for inst in &block.insts {
            self.inst(inst);
        }
    }

    /// Emits one instruction, with the blocks inside it.
    pub fn inst(&mut self, inst: &'a Inst) {
        match &inst.op {
            Op::Tile(op) => self.tile_op(inst, op),
            Op::Barrier => self.t.barrier(),
            Op::For { lo, hi, step, init, body } => self.for_loop(inst, (*lo, *hi, *step), init, body),
            Op::If { cond, then, otherwise } => self.branch(inst, *cond, then, otherwise),
            _ => self.channel_op(inst),
        }
    }

    /// An i32 index.
    pub fn index(&mut self, i: Index) -> Val {
        match i {
            Index::Const(n) => i32(n),
            Index::Value(v) => self.chunk(v, &[], 1)[0],
        }
    }

    fn divisor(&self, i: Index) -> i64 {
        match i {
            Index::Const(n) => divisor::of_constant(n),
            Index::Value(v) => self.divisors.get(&v).copied().unwrap_or(1),
        }
    }

    /// Registers that a carried value takes, for block arguments.
    fn registers(&mut self, v: ValueId, like: ValueId) -> Vec<Val> {
        match self.place(like) {
            Place::Uniform => {
                let at = vec![i32(0); self.shape(v).len()];
                self.chunk(v, &at, 1)
            }
            Place::Fragment(f) => {
                let spread = Spread::new(self, *f, self.shape(like));
                self.fragment(v, &spread)
            }
            _ => Vec::new(),
        }
    }

    fn define(&mut self, v: ValueId, values: &[Val]) -> usize {
        match self.place(v) {
            Place::Uniform => {
                self.uniform.insert(v, values[0]);
                1
            }
            Place::Fragment(f) => {
                let n = Spread::count(*f, self.shape(v));
                self.fragments.insert(v, values[..n].to_vec());
                n
            }
            _ => 0,
        }
    }

    fn for_loop(&mut self, inst: &'a Inst, (lo, hi, step): (Index, Index, u32), init: &[ValueId], body: &'a Block) {
        let d = divisor::gcd(self.divisor(lo), step.into());
        let (lo, hi) = (self.index(lo), self.index(hi));
        let mut carried = Vec::new();
        for (i, &v) in init.iter().enumerate() {
            carried.extend(self.registers(v, body.args[i + 1]));
        }
        self.divisors.insert(body.args[0], d);
        let ahead = super::ahead::find(self, body);
        if ahead.behind_barrier {
            self.t.barrier();
        }
        let first = self.load_ahead(&ahead, body, lo, hi);
        carried.extend(first.iter().flatten());
        let mut rings = Vec::new();
        rings_in(body, &mut rings);
        self.begin_alternation(body);
        let under_way = self.under_way(&rings);
        let stages = self.ring_state(&rings);
        carried.extend(&stages);
        let l = self.t.f.open_loop(lo, hi, &carried);
        self.uniform.insert(body.args[0], l.args[0]);
        let mut at = 1;
        for &arg in &body.args[1..] {
            at += self.define(arg, &l.args[at..]);
        }
        for (load, values) in ahead.loads.iter().zip(&first) {
            self.ahead.insert(load.result, l.args[at..at + values.len()].to_vec());
            at += values.len();
        }
        self.set_ring_state(&rings, &l.args[at..]);
        let mut loaded = Vec::new();
        let product = |inst: &Inst| matches!(inst.op, Op::Tile(tile::Op::Dot { .. }));
        let first_product = body.insts.iter().position(product).filter(|_| !rings.is_empty());
        for (i, inst) in body.insts.iter().enumerate() {
            if first_product == Some(i) {
                self.read_slots_early(&body.insts[i..]);
            }
            if ahead.before == Some(i) {
                self.read_early(&body.insts[i..]);
                let next = self.t.f.add(l.args[0], i32(step.into()));
                loaded = self.load_ahead(&ahead, body, next, hi);
            }
            self.inst(inst);
        }
        let mut next = Vec::new();
        for (i, &v) in body.yields.iter().enumerate() {
            next.extend(self.registers(v, body.args[i + 1]));
        }
        next.extend(loaded.iter().flatten());
        next.extend(self.ring_state(&rings));
        if self.under_way(&rings) != under_way {
            self.fault = Some("a round leaves other copies under way than it found".into());
        }
        self.t.f.close_loop(&l, i32(step.into()), &next);
        self.set_ring_state(&rings, &l.args[l.args.len() - stages.len()..]);
        self.end_alternation(body);
        let mut at = 1;
        for &r in &inst.results {
            at += self.define(r, &l.args[at..]);
        }
    }

    fn branch(&mut self, inst: &'a Inst, cond: ValueId, then: &'a Block, otherwise: &'a Block) {
        let c = self.chunk(cond, &[], 1)[0];
        let (yes, no, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        self.t.f.cond_br(c, (yes, &[]), (no, &[]));
        let mut types = Vec::new();
        for (label, block) in [(yes, then), (no, otherwise)] {
            self.t.f.start(label, &[]);
            self.block(block);
            let mut values = Vec::new();
            for (&v, &r) in block.yields.iter().zip(&inst.results) {
                values.extend(self.registers(v, r));
            }
            types = values.iter().map(|v: &Val| v.ty()).collect();
            self.t.f.br(after, &values);
        }
        let values = self.t.f.start(after, &types);
        let mut at = 0;
        for &r in &inst.results {
            at += self.define(r, &values[at..]);
        }
    }

    fn tile_op(&mut self, inst: &'a Inst, op: &'a tile::Op) {
        match op {
            tile::Op::Store { view, index, value } => return self.store(*view, index, *value),
            tile::Op::Scatter { view, rows, index, value } => return self.scatter(*view, *rows, index, *value),
            tile::Op::TopkInit { .. } => {
                let (state, at) = (self.state(inst.results[0]), self.state_at(inst.results[0]));
                return topk::init(&mut self.t, &state, at);
            }
            tile::Op::TopkPush { state, values, base } => {
                let base = self.chunk(*base, &[], 1)[0];
                let (from, n) = (self.root_buffer(*values).offset, self.shape(*values)[1]);
                let (at, state) = (self.state_at(*state), self.state(*state));
                let scratch = self.topk_scratch(inst, &state);
                return topk::push(&mut self.t, &state, at, scratch, from, n, base);
            }
            tile::Op::TopkTake { state } => {
                let to: Vec<u32> = inst.results.iter().map(|&r| self.root_buffer(r).offset).collect();
                let (at, state) = (self.state_at(*state), self.state(*state));
                let scratch = self.topk_scratch(inst, &state);
                return topk::take(&mut self.t, &state, at, scratch, to[0], to[1]);
            }
            tile::Op::Scan { x, axis, kind } => {
                let (from, to) = (self.root_buffer(*x).offset, self.root_buffer(inst.results[0]).offset);
                let (shape, axis) = (self.shape(*x), *axis as usize);
                let shape = [shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product()];
                let ty = isa::stored(self.dtype(*x));
                return scan::scan(&mut self.t, from, to, shape, ty, *kind);
            }
            tile::Op::Reduce { x, axis, kind } => {
                let scratch = self.scratch(inst);
                if let Some(v) = self.reduce(inst.results[0], *x, *axis as usize, *kind, scratch) {
                    self.uniform.insert(inst.results[0], v);
                }
                return;
            }
            tile::Op::Dot { a, b, acc, trans_b } => return self.dot(inst.results[0], (*a, *b), *acc, *trans_b),
            tile::Op::Concat { xs, axis } => return self.concat(inst.results[0], xs, *axis as usize),
            _ => {}
        }
        let r = inst.results[0];
        match self.place(r) {
            Place::Lazy | Place::View => {}
            Place::Uniform => {
                let at = vec![i32(0); self.shape(r).len()];
                // What no kernel writes while this one reads it may be loaded once for all lanes.
                self.t.f.constant =
                    self.t.arch.loads_once() && matches!(op, tile::Op::Load { view, .. } if self.read_only(*view));
                let v = self.evaluate(op, r, &at, 1)[0];
                self.t.f.constant = false;
                self.uniform.insert(r, v);
                let d = divisor::of(op, &|i| self.divisor(i));
                self.divisors.insert(r, d);
            }
            Place::Fragment(f) => {
                let spread = Spread::new(self, *f, self.shape(r));
                let values = self.fragment_of(op, r, &spread);
                self.fragments.insert(r, values);
            }
            Place::Shared(b) => match op {
                tile::Op::Map { inputs, body } if body.insts.is_empty() && self.is_fragment(inputs[0]) => {
                    self.spill_fragment(inputs[0], self.buffer(*b));
                }
                _ => self.materialise(op, r, self.buffer(*b)),
            },
            Place::Slot(..) => unreachable!("only a take is in a slot"),
        }
    }

    /// Whether a value is in registers as a product left it.
    pub fn is_fragment(&self, v: ValueId) -> bool {
        matches!(self.place(v), Place::Fragment(_))
    }

    fn state(&self, v: ValueId) -> topk::State {
        let mut ops = Vec::new();
        selections(&self.s.common, &mut ops);
        topk::State::of(&self.s.types[v.0 as usize], &ops, &self.s.types)
    }

    fn state_at(&self, v: ValueId) -> u32 {
        match self.place(v) {
            Place::Shared(b) => self.buffer(*b).offset,
            _ => unreachable!("selections are in shared memory"),
        }
    }

    /// How many neighbours along the last axis of a value can be read at once, starting at any multiple of that many.
    pub fn width(&self, v: ValueId) -> u32 {
        let last = self.shape(v).last().copied().unwrap_or(1);
        let most = power_of_two_in(last).min(16);
        match self.place(v) {
            Place::Lazy => self.defs.get(&v).map_or(1, |op| self.width_of(op, v)).min(most),
            _ => most,
        }
    }

    fn width_of(&self, op: &tile::Op, v: ValueId) -> u32 {
        let last = |v: ValueId| self.shape(v).last().copied().unwrap_or(1);
        let most = power_of_two_in(last(v)).min(16);
        match op {
            tile::Op::Map { inputs, .. } => {
                let wide = inputs.iter().filter(|&&i| last(i) != 1);
                wide.map(|&i| self.width(i)).min().unwrap_or(16).min(most)
            }
            tile::Op::Reshape { x, .. } => self.width(*x).min(power_of_two_in(last(*x))).min(most),
            tile::Op::Slice { x, offsets, .. } => {
                let offset = offsets.last().copied().unwrap_or(0);
                let aligned = if offset == 0 { 16 } else { power_of_two_in(offset) };
                self.width(*x).min(aligned).min(most)
            }
            tile::Op::Permute { x, perm } => {
                let keeps = perm.last().is_some_and(|&p| p as usize + 1 == perm.len());
                if keeps { self.width(*x).min(most) } else { 1 }
            }
            _ => most,
        }
    }

    /// `n` neighbours along the last axis of a tile, from these coordinates; as they are stored ([`isa::stored`]).
    pub fn chunk(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        match self.place(v) {
            Place::Uniform => vec![self.uniform[&v]; n as usize],
            Place::Shared(b) => self.load_buffer(self.buffer(*b), i32(0), self.dtype(v), (self.shape(v), at), n),
            Place::Slot(c, slot) => {
                let (b, stage) = (self.slot_buffer(*c, *slot), self.stage_byte(v));
                self.load_buffer(b, stage, self.dtype(v), (self.shape(v), at), n)
            }
            Place::Lazy => match self.defs.get(&v) {
                Some(&op) => self.evaluate(op, v, at, n),
                None => unreachable!("lazy %{} has a definition", v.0),
            },
            _ => unreachable!("%{} is read by its owner only", v.0),
        }
    }

    /// Neighbours from coordinates of a tile in a buffer, which begins `first` bytes behind the buffer's first byte.
    fn load_buffer(&mut self, b: &Buffer, first: Val, dtype: DType, (shape, at): (&[u32], &[Val]), n: u32) -> Vec<Val> {
        let row = self.linear(&at[..at.len().saturating_sub(1)], &shape[..shape.len().saturating_sub(1)]);
        let col = at.last().copied().unwrap_or(i32(0));
        let byte = self.buffer_byte(b, dtype, row, col);
        let byte = self.t.f.add(byte, first);
        let ty = if dtype == DType::Bool { Ty::I8 } else { isa::stored(dtype) };
        let most = (16 / ty.bytes()).min(n);
        let most = if b.pitch.is_multiple_of(most * ty.bytes()) || b.shape[0] == 1 { most } else { 1 };
        let mut values = Vec::new();
        for i in (0..n).step_by(most as usize) {
            let byte = self.t.f.add(byte, i32((i * ty.bytes()).into()));
            values.extend(self.t.load_shared(byte, ty, most));
        }
        if dtype == DType::Bool {
            values = values.into_iter().map(|v| self.t.f.cmp("ne", v, Val::Int(0, Ty::I8))).collect();
        }
        values
    }

    /// Byte of shared memory of an element.
    pub fn buffer_byte(&mut self, b: &Buffer, dtype: DType, row: Val, col: Val) -> Val {
        let row = self.t.f.mul(row, i32(b.pitch.into()));
        let col = self.t.f.mul(col, i32(dtype.bytes() as i64));
        let byte = self.t.f.add(row, col);
        self.t.f.add(byte, i32(b.offset.into()))
    }

    /// Stores neighbours to a row of a buffer.
    pub fn store_buffer(&mut self, b: &Buffer, dtype: DType, row: Val, col: Val, values: &[Val]) {
        let mut values = values.to_vec();
        if dtype == DType::Bool {
            values = values.into_iter().map(|v| self.t.f.cast("zext", v, Ty::I8)).collect();
        }
        let ty = values[0].ty();
        let byte = self.buffer_byte(b, dtype, row, col);
        let n = values.len() as u32;
        let most = (16 / ty.bytes()).min(n);
        let most = if b.pitch.is_multiple_of(most * ty.bytes()) || b.shape[0] == 1 { most } else { 1 };
        for (i, part) in values.chunks(most as usize).enumerate() {
            let byte = self.t.f.add(byte, i32((i as u32 * most * ty.bytes()).into()));
            self.t.store_shared(byte, part);
        }
    }

    /// Row-major number of an element.
    pub fn linear(&mut self, at: &[Val], shape: &[u32]) -> Val {
        let mut n = i32(0);
        for (&c, &size) in at.iter().zip(shape) {
            n = self.t.f.mul(n, i32(size.into()));
            n = self.t.f.add(n, c);
        }
        n
    }

    /// Coordinates of a row-major number.
    pub fn delinear(&mut self, mut n: Val, shape: &[u32]) -> Vec<Val> {
        let mut at = vec![i32(0); shape.len()];
        for d in (0..shape.len()).rev() {
            if shape[..d].iter().all(|&s| s == 1) {
                at[d] = n;
                break;
            }
            at[d] = self.t.f.rem(n, shape[d]);
            n = self.t.f.div(n, shape[d]);
        }
        at
    }

    /// Coordinates of the first element of chunk `c`, of `n` neighbours each, of a tile.
    pub fn first_of(&mut self, c: Val, n: u32, shape: &[u32]) -> Vec<Val> {
        let first = self.t.f.mul(c, i32(n.into()));
        self.delinear(first, shape)
    }

    /// `n` neighbours of what an op makes.
    pub fn evaluate(&mut self, op: &'a tile::Op, r: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        match op {
            tile::Op::BlockId { axis } => vec![self.blocks[*axis as usize]; n as usize],
            tile::Op::Sym(sym) => vec![self.syms[*sym as usize]; n as usize],
            tile::Op::Full { value, .. } => vec![arith::constant(*value); n as usize],
            tile::Op::Iota { axis, shape } => {
                let c = at[*axis as usize];
                if *axis as usize + 1 < shape.len() {
                    return vec![c; n as usize];
                }
                (0..n).map(|i| self.t.f.add(c, i32(i.into()))).collect()
            }
            tile::Op::Load { view, index, .. } => {
                let index: Vec<Index> = index.clone();
                self.load_global(*view, &index, at, None, n)
            }
            tile::Op::Gather { view, rows, index, .. } => {
                let row = self.chunk(*rows, &at[..1], 1)[0];
                let mut index = index.clone();
                index.insert(0, Index::Const(0));
                self.load_global(*view, &index, at, Some(row), n)
            }
            tile::Op::Map { inputs, body } => {
                let args: Vec<Vec<(Val, DType)>> = inputs
                    .iter()
                    .enumerate()
                    .map(|(k, &i)| {
                        let shape = self.shape(i) == self.shape(r);
                        if shape
                            && arith::only_widens(body, k as u32)
                            && let Some(wide) = self.widened(i, at, n)
                        {
                            return wide.into_iter().map(|v| (v, DType::F32)).collect();
                        }
                        let dtype = self.dtype(i);
                        self.broadcast(i, at, n).into_iter().map(|v| (v, dtype)).collect()
                    })
                    .collect();
                let arch = self.t.arch;
                // Where nothing varies along the chunk, one evaluation does.
                if args.iter().all(|a| a.iter().all(|v| *v == a[0])) {
                    let one: Vec<Vec<(Val, DType)>> = args.iter().map(|a| vec![a[0]]).collect();
                    return vec![arith::apply_each(&mut self.t.f, arch, body, &one, 1)[0]; n as usize];
                }
                arith::apply_each(&mut self.t.f, arch, body, &args, n as usize)
            }
            tile::Op::Reshape { x, .. } => {
                let linear = self.linear(at, self.shape(r));
                if n > 1 && self.width(*x) < n {
                    return self.one_by_one(n, linear, |e, c| {
                        let at = e.delinear(c, e.shape(*x));
                        e.chunk(*x, &at, 1)[0]
                    });
                }
                let at = self.delinear(linear, self.shape(*x));
                self.chunk(*x, &at, n)
            }
            tile::Op::Slice { x, offsets, .. } => {
                let at: Vec<Val> = at.iter().zip(offsets).map(|(&c, &o)| self.t.f.add(c, i32(o.into()))).collect();
                self.chunk(*x, &at, n)
            }
            tile::Op::Permute { x, perm } => {
                let back = |at: &[Val]| {
                    let mut from = vec![i32(0); at.len()];
                    for (i, &p) in perm.iter().enumerate() {
                        from[p as usize] = at[i];
                    }
                    from
                };
                if n == 1 || perm.last().is_some_and(|&p| p as usize + 1 == perm.len()) {
                    return self.chunk(*x, &back(at), n);
                }
                let (mut at, last) = (at.to_vec(), at.len() - 1);
                self.one_by_one(n, at[last], |e, c| {
                    at[last] = c;
                    e.chunk(*x, &back(&at), 1)[0]
                })
            }
            _ => unreachable!("{op:?} is no elementwise op"),
        }
    }

    /// Neighbours of a tile that is read from memory as f32, by words; none if the chip or the tile has no such way.
    fn widened(&mut self, v: ValueId, at: &[Val], n: u32) -> Option<Vec<Val>> {
        let (dtype, arch) = (self.dtype(v), self.t.arch);
        if !arch.widens_words(dtype) || !(n * dtype.bytes() as u32).is_multiple_of(4) || self.place(v) != &Place::Lazy {
            return None;
        }
        let access = match self.definition(v)? {
            tile::Op::Load { view, index, .. } => self.access(*view, index, at, None, n),
            tile::Op::Gather { view, rows, index, .. } => {
                let row = self.chunk(*rows, &at[..1], 1)[0];
                let mut index = index.clone();
                index.insert(0, Index::Const(0));
                self.access(*view, &index, at, Some(row), n)
            }
            _ => return None,
        };
        if !access.whole {
            return None;
        }
        let words = self.load_from(&access, true);
        let words = self.masked(&access, words);
        let wide = words.into_iter().map(|word| arch.widen_word(&mut self.t.f, word, dtype));
        Some(wide.collect::<Option<Vec<_>>>()?.concat())
    }

    fn one_by_one(&mut self, n: u32, from: Val, mut one: impl FnMut(&mut Self, Val) -> Val) -> Vec<Val> {
        (0..n)
            .map(|i| {
                let c = self.t.f.add(from, i32(i.into()));
                one(self, c)
            })
            .collect()
    }

    /// A map's input at the coordinates of its result.
    pub fn broadcast(&mut self, v: ValueId, at: &[Val], n: u32) -> Vec<Val> {
        let shape = self.shape(v);
        if shape.is_empty() || self.place(v) == &Place::Uniform {
            let at = vec![i32(0); shape.len()];
            let one = self.chunk(v, &at, 1)[0];
            return vec![one; n as usize];
        }
        let at: Vec<Val> = at.iter().zip(shape).map(|(&c, &s)| if s == 1 { i32(0) } else { c }).collect();
        if shape.last() == Some(&1) {
            let one = self.chunk(v, &at, 1)[0];
            return vec![one; n as usize];
        }
        let step = self.width(v).min(n);
        if step == n {
            return self.chunk(v, &at, n);
        }
        let (mut at, last) = (at, shape.len() - 1);
        let first = at[last];
        let mut values = Vec::new();
        for i in (0..n).step_by(step as usize) {
            at[last] = self.t.f.add(first, i32(i.into()));
            values.extend(self.chunk(v, &at, step));
        }
        values
    }

    /// A map's arithmetic on one element.
    pub fn apply(&mut self, body: &MapFn, args: &[Val], dtypes: &[DType]) -> Val {
        let args: Vec<(Val, DType)> = args.iter().copied().zip(dtypes.iter().copied()).collect();
        arith::apply(&mut self.t.f, self.t.arch, body, &args).0
    }

    /// Address and bounds of `n` elements of a view at `index + at`, with `row` instead of the first coordinate if given.
    fn access(&mut self, view: ValueId, index: &[Index], at: &[Val], row: Option<Val>, n: u32) -> Access {
        let Type::View(ty) = &self.s.types[view.0 as usize] else { unreachable!("verified: a view") };
        let ty: &'a ViewType = ty;
        let bytes = ty.dtype.bytes() as i64;
        let last = ty.shape.len().saturating_sub(1);
        let unit = i64::from(n) * bytes;
        let dense = n == 1 || ty.strides.last().is_some_and(|s| s.bytes == bytes && s.sym.is_none());
        let aligned = |stride: &tile::Stride| stride.bytes % unit.min(16) == 0;
        let whole = n == 1
            || (dense
                && ty.offset as i64 % unit.min(16) == 0
                && ty.strides[..last].iter().all(aligned)
                && self.divisor(index[last]) % i64::from(n) == 0
                && ty.shape[last].factor.is_multiple_of(n)
                && row.is_none_or(|_| last > 0));
        let mut offset = i64(ty.offset as i64);
        let mut inside = Val::Int(1, Ty::I1);
        let mut last_at = (i32(0), i32(1));
        for d in 0..ty.shape.len() {
            let start = self.index(index[d]);
            let c = match row {
                Some(row) if d == 0 => row,
                _ => self.t.f.add(start, at[d]),
            };
            let extent = self.extent(ty.shape[d]);
            if d == last {
                last_at = (c, extent);
            }
            if d < last || whole {
                let ok = self.within(c, extent);
                inside = self.t.f.bin("and", inside, ok);
            }
            let wide = self.t.f.cast("sext", c, Ty::I64);
            let stride = self.stride(ty, d);
            let part = self.t.f.mul(wide, stride);
            offset = self.t.f.add(offset, part);
        }
        let step = match ty.strides.last() {
            Some(s) => match s.sym {
                None => i64(s.bytes),
                Some(sym) => {
                    let sym = self.t.f.cast("sext", self.syms[sym as usize], Ty::I64);
                    self.t.f.mul(i64(s.bytes), sym)
                }
            },
            None => i64(bytes),
        };
        let inside = if whole {
            vec![inside]
        } else {
            (0..n)
                .map(|i| {
                    let c = self.t.f.add(last_at.0, i32(i.into()));
                    let ok = self.within(c, last_at.1);
                    self.t.f.bin("and", inside, ok)
                })
                .collect()
        };
        let at = self.t.f.offset(self.params[&view], offset);
        let first = self.t.f.offset(self.params[&view], i64(ty.offset as i64));
        Access { first, dtype: ty.dtype, n, at, whole, inside, step }
    }

    /// Bytes between neighbours along a dim (i64).
    pub fn stride(&mut self, ty: &ViewType, d: usize) -> Val {
        let stride = i64(ty.strides[d].bytes);
        match ty.strides[d].sym {
            Some(sym) => {
                let sym = self.t.f.cast("sext", self.syms[sym as usize], Ty::I64);
                self.t.f.mul(stride, sym)
            }
            None => stride,
        }
    }

    /// `0 <= c < extent`.
    pub fn within(&mut self, c: Val, extent: Val) -> Val {
        if c.int().is_some_and(|c| c < 0) {
            return Val::Int(0, Ty::I1);
        }
        self.t.f.cmp("ult", c, extent)
    }

    /// `n` neighbours; zero where they are outside.
    fn load_global(&mut self, view: ValueId, index: &[Index], at: &[Val], row: Option<Val>, n: u32) -> Vec<Val> {
        let a = self.access(view, index, at, row, n);
        let values = self.load_from(&a, false);
        self.masked(&a, values)
    }

    /// Loads a chunk, anything where it is outside; in words, if that is asked for and possible.
    pub fn load_from(&mut self, a: &Access, words: bool) -> Vec<Val> {
        let (mut ty, mut n) = (isa::stored(a.dtype), a.n);
        if words && a.whole && ty.bytes() < 4 && (n * ty.bytes()).is_multiple_of(4) {
            (ty, n) = (Ty::I32, n * ty.bytes() / 4);
        }
        let mut values = Vec::new();
        if a.whole {
            let inside = self.t.f.bin("and", self.reading, a.inside[0]);
            let from = self.t.f.select(inside, a.at, a.first);
            let most = (16 / ty.bytes()).min(n);
            for i in (0..n).step_by(most as usize) {
                let from = self.t.f.offset(from, i64((i * ty.bytes()).into()));
                values.extend(self.t.f.load(from, ty, most));
            }
            return values;
        }
        let mut element = a.at;
        for &inside in &a.inside {
            let inside = self.t.f.bin("and", self.reading, inside);
            let from = self.t.f.select(inside, element, a.first);
            values.push(self.t.f.load(from, ty, 1)[0]);
            element = self.t.f.offset(element, a.step);
        }
        values
    }

    /// What [`Emitter::load_from`] gave, with zeros outside.
    fn masked(&mut self, a: &Access, values: Vec<Val>) -> Vec<Val> {
        let inside = |i: usize| if a.whole { a.inside[0] } else { a.inside[i] };
        let one = |(i, v): (usize, Val)| {
            let zero = if v.ty() == Ty::F32 { f32(0.0) } else { Val::Int(0, v.ty()) };
            self.t.f.select(inside(i), v, zero)
        };
        values.into_iter().enumerate().map(one).collect()
    }

    /// Stores neighbours where they are inside the view and `c` holds.
    pub fn store_global(
        &mut self,
        view: ValueId,
        index: &[Index],
        at: &[Val],
        (row, c): (Option<Val>, Val),
        values: &[Val],
    ) {
        let a = self.access(view, index, at, row, values.len() as u32);
        if a.whole {
            let ok = self.t.f.bin("and", a.inside[0], c);
            let most = (16 / values[0].ty().bytes()) as usize;
            let mut at = a.at;
            for part in values.chunks(most) {
                let words = self.words(part);
                self.t.arch.store_global_if(&mut self.t, ok, at, &words);
                at = self.t.f.offset(at, i64(i64::from(values[0].ty().bytes()) * part.len() as i64));
            }
            return;
        }
        let mut element = a.at;
        for (&v, &inside) in values.iter().zip(&a.inside) {
            let ok = self.t.f.bin("and", inside, c);
            let words = self.words(&[v]);
            self.t.arch.store_global_if(&mut self.t, ok, element, &words);
            element = self.t.f.offset(element, a.step);
        }
    }

    /// Small elements packed to 32-bit words where there are enough of them.
    pub fn words(&mut self, values: &[Val]) -> Vec<Val> {
        let per = (4 / values[0].ty().bytes()) as usize;
        if per == 1 || values.len() < per {
            return values.to_vec();
        }
        let pack = |part: &[Val]| {
            let mut word = i32(0);
            for (i, &v) in part.iter().enumerate() {
                let wide = self.t.f.cast("zext", v, Ty::I32);
                let moved = self.t.f.bin("shl", wide, i32((i * 32 / per) as i64));
                word = self.t.f.bin("or", word, moved);
            }
            word
        };
        values.chunks(per).map(pack).collect()
    }

    /// Runs `body` for chunk numbers `0..total`, shared out among the threads; several rounds are evaluated before the first of
    /// them is stored.
    pub fn each_chunk<T>(
        &mut self,
        total: u32,
        mut evaluate: impl FnMut(&mut Self, Val) -> T,
        mut store: impl FnMut(&mut Self, Val, T, Val),
    ) {
        let threads = self.t.threads;
        let rounds = total.div_ceil(threads);
        let mut group = |e: &mut Self, first: Val, rounds: u32, last: bool| {
            let mut pending = Vec::new();
            for i in 0..rounds {
                let partial = last && i + 1 == rounds && !total.is_multiple_of(threads);
                let (clamped, ok) = e.round(first, i, partial.then_some(total));
                let value = evaluate(e, clamped);
                pending.push((clamped, value, ok));
            }
            for (c, value, ok) in pending {
                store(e, c, value, ok);
            }
        };
        let tid = self.t.tid;
        if rounds <= UNROLLED {
            return group(self, tid, rounds, true);
        }
        // The last rounds, and those that do not fill a group, come after the loop.
        let looped = (rounds - 1) / IN_FLIGHT * IN_FLIGHT;
        let l = self.t.f.open_loop(tid, i32((looped * threads).into()), &[]);
        group(self, l.args[0], IN_FLIGHT, false);
        self.t.f.close_loop(&l, i32((IN_FLIGHT * threads).into()), &[]);
        group(self, l.args[0], rounds - looped, true);
    }

    /// The chunk of a round, and whether there is one: of `total`, if this thread may be beyond them.
    pub fn round(&mut self, first: Val, i: u32, total: Option<u32>) -> (Val, Val) {
        let c = self.t.f.add(first, i32((i * self.t.threads).into()));
        let Some(total) = total else { return (c, Val::Int(1, Ty::I1)) };
        let ok = self.t.f.cmp("slt", c, i32(total.into()));
        (self.t.f.select(ok, c, i32(0)), ok)
    }

    /// How a tile is evaluated into its buffer.
    pub fn fill(&self, op: &'a tile::Op, r: ValueId, b: &'a Buffer) -> Fill<'a> {
        let (shape, dtype) = (self.shape(r), self.dtype(r));
        let cols = matrix(shape)[1];
        let n = self.width_of(op, r).min(power_of_two_in(b.shape[1])).min(power_of_two_in(cols)).min(16);
        let n = n.min((32 / dtype.bytes() as u32).max(1));
        let ready = self.ready.iter().any(|&id| std::ptr::eq(self.buffer(id), b));
        Fill { op, r, b, n, ready }
    }

    /// Row and column of a chunk of the buffer; where to read it from, which is its place or the tile's beginning; and whether that
    /// is inside the tile.
    fn place_of(&mut self, fill: &Fill, c: Val) -> ([Val; 2], [Val; 2], Val) {
        let [rows, cols] = matrix(self.shape(fill.r));
        let [all_rows, all_cols] = fill.b.shape;
        let per_row = all_cols / fill.n;
        let row = self.t.f.div(c, per_row);
        let col = self.t.f.rem(c, per_row);
        let col = self.t.f.mul(col, i32(fill.n.into()));
        let mut ok = Val::Int(1, Ty::I1);
        let (mut from_row, mut from_col) = (row, col);
        if all_rows > rows {
            let inside = self.t.f.cmp("slt", row, i32(rows.into()));
            ok = self.t.f.bin("and", ok, inside);
            from_row = self.t.f.select(inside, row, i32(0));
        }
        if all_cols > cols {
            let inside = self.t.f.cmp("slt", col, i32(cols.into()));
            ok = self.t.f.bin("and", ok, inside);
            from_col = self.t.f.select(inside, col, i32(0));
        }
        ([row, col], [from_row, from_col], ok)
    }

    /// Where a chunk of a tile that is moved from global memory as it is comes from; none for others.
    pub fn source(&mut self, fill: &Fill<'a>, c: Val) -> Option<Access> {
        if !self.t.arch.moves_words() {
            return None;
        }
        let (_, [row, col], _) = self.place_of(fill, c);
        let shape = self.shape(fill.r);
        let mut at = self.delinear(row, &shape[..shape.len().saturating_sub(1)]);
        if !shape.is_empty() {
            at.push(col);
        }
        match fill.op {
            tile::Op::Load { view, index, .. } => Some(self.access(*view, index, &at, None, fill.n)),
            tile::Op::Gather { view, rows, index, .. } => {
                let row = self.chunk(*rows, &at[..1], 1)[0];
                let mut index = index.clone();
                index.insert(0, Index::Const(0));
                Some(self.access(*view, &index, &at, Some(row), fill.n))
            }
            _ => None,
        }
    }

    /// A chunk of a tile as its buffer holds it: `loaded` as [`Emitter::load_from`] gave it, or evaluated.
    fn chunk_of(&mut self, fill: &Fill<'a>, c: Val, loaded: Option<Vec<Val>>) -> Vec<Val> {
        let values = match self.source(fill, c) {
            Some(access) => {
                let loaded = loaded.unwrap_or_else(|| self.load_from(&access, true));
                self.masked(&access, loaded)
            }
            None => {
                let (_, [row, col], _) = self.place_of(fill, c);
                let shape = self.shape(fill.r);
                let mut at = self.delinear(row, &shape[..shape.len().saturating_sub(1)]);
                if !shape.is_empty() {
                    at.push(col);
                }
                self.evaluate(fill.op, fill.r, &at, fill.n)
            }
        };
        let values = if fill.ready { self.operand(self.dtype(fill.r), &values) } else { values };
        let (.., ok) = self.place_of(fill, c);
        let zero = if values[0].ty() == Ty::F32 { f32(0.0) } else { Val::Int(0, values[0].ty()) };
        values.into_iter().map(|v| self.t.f.select(ok, v, zero)).collect()
    }

    /// Evaluates a tile into its buffer; padding is zero.
    fn materialise(&mut self, op: &'a tile::Op, r: ValueId, b: &'a Buffer) {
        let fill = self.fill(op, r, b);
        let ahead = self.ahead.remove(&r);
        let mut at = 0;
        self.each_chunk(
            fill.chunks(),
            |e, c| {
                // All rounds of what is loaded ahead are written out, with as many values each.
                let loaded = ahead.as_ref().map(|values| {
                    let count = values.len() / fill.rounds(e.t.threads) as usize;
                    at += count;
                    values[at - count..at].to_vec()
                });
                e.chunk_of(&fill, c, loaded)
            },
            |e, c, values, ok| {
                let ([row, col], ..) = e.place_of(&fill, c);
                let dtype = e.dtype(r);
                e.guarded(ok, |e| e.store_buffer(b, dtype, row, col, &values));
            },
        );
    }

    /// Runs `body` where `c` holds (a branch).
    pub fn guarded(&mut self, c: Val, body: impl FnOnce(&mut Self)) {
        if c.int() == Some(1) {
            return body(self);
        }
        let after = self.t.f.open_if(c);
        body(self);
        self.t.f.close_if(after);
    }

    fn concat(&mut self, r: ValueId, xs: &'a [ValueId], axis: usize) {
        let Place::Shared(b) = self.place(r) else { unreachable!("concatenations are in shared memory") };
        let (b, dtype, shape) = (self.buffer(*b), self.dtype(r), self.shape(r));
        let last = shape.len() - 1;
        let mut offset = 0u32;
        for &x in xs {
            let from = self.shape(x);
            let mut n = self.width(x);
            if axis == last && offset > 0 {
                n = n.min(power_of_two_in(offset));
            }
            let total = from.iter().product::<u32>() / n;
            self.each_chunk(
                total,
                |e, c| {
                    let at = e.first_of(c, n, from);
                    e.chunk(x, &at, n)
                },
                |e, c, values, ok| {
                    let mut at = e.first_of(c, n, from);
                    at[axis] = e.t.f.add(at[axis], i32(offset.into()));
                    let row = e.linear(&at[..last], &shape[..last]);
                    e.guarded(ok, |e| e.store_buffer(b, dtype, row, at[last], &values));
                },
            );
            offset += from[axis];
        }
    }

    /// Widest chunk that a view takes at that index.
    fn store_width(&self, view: ValueId, value: ValueId) -> u32 {
        let bytes = self.dtype(view).bytes() as u32;
        self.width(value).min((16 / bytes).max(1))
    }

    fn store(&mut self, view: ValueId, index: &'a [Index], value: ValueId) {
        if self.is_fragment(value) {
            return self.store_fragment(view, index, value);
        }
        let shape = self.shape(value);
        let n = self.store_width(view, value);
        let total = (shape.iter().product::<u32>() / n).max(1);
        self.each_chunk(
            total,
            |e, c| {
                let at = e.first_of(c, n, shape);
                e.chunk(value, &at, n)
            },
            |e, c, values, ok| {
                let at = e.first_of(c, n, shape);
                e.store_global(view, index, &at, (None, ok), &values);
            },
        );
    }

    fn scatter(&mut self, view: ValueId, rows: ValueId, index: &'a [Index], value: ValueId) {
        let shape = self.shape(value);
        let n = if shape.len() == 1 { 1 } else { self.store_width(view, value) };
        let total = (shape.iter().product::<u32>() / n).max(1);
        let mut full = index.to_vec();
        full.insert(0, Index::Const(0));
        self.each_chunk(
            total,
            |e, c| {
                let at = e.first_of(c, n, shape);
                (e.chunk(rows, &at[..1], 1)[0], e.chunk(value, &at, n))
            },
            |e, c, (row, values), ok| {
                let at = e.first_of(c, n, shape);
                e.store_global(view, &full, &at, (Some(row), ok), &values);
            },
        );
    }

    /// Dynamic shared memory of the kernel.
    pub fn shared_bytes(&self) -> u32 {
        shared_bytes(self.s)
    }
}

fn definitions<'a>(block: &'a Block, into: &mut HashMap<ValueId, &'a tile::Op>) {
    for inst in &block.insts {
        match &inst.op {
            Op::Tile(op) => into.extend(inst.results.iter().map(|&r| (r, op))),
            Op::For { body, .. } => definitions(body, into),
            Op::If { then, otherwise, .. } => {
                definitions(then, into);
                definitions(otherwise, into);
            }
            _ => {}
        }
    }
}

/// The operations on selections, with their results.
fn selections<'a>(block: &'a Block, ops: &mut Vec<(ValueId, &'a tile::Op)>) {
    for inst in &block.insts {
        match &inst.op {
            Op::Tile(op @ (tile::Op::TopkInit { .. } | tile::Op::TopkPush { .. } | tile::Op::TopkTake { .. })) => {
                ops.push((inst.results[0], op));
            }
            Op::For { body, .. } => selections(body, ops),
            Op::If { then, otherwise, .. } => {
                selections(then, ops);
                selections(otherwise, ops);
            }
            _ => {}
        }
    }
}

/// The largest power of two that divides `n`; 1 for 0.
pub fn power_of_two_in(n: u32) -> u32 {
    if n == 0 { 1 } else { 1 << n.trailing_zeros() }
}
