//! Scheduled tile IR to MLIR: instructions one by one, loops and branches. What an instruction does to its tiles is in the files beside this one.

use super::analysis::has_column_products;
use super::block::Threads;
use super::direct::{Ring, rings_in};
use super::fragment::Spread;
use super::held::Held;
use super::isa;
use super::mlir::{Ty, Val, i32, i64};
use super::schedule::{matrix, shared_bytes};
use super::{divisor, scan, topk};
use dsc_ir::sched::{Atom, Block, Buffer, BufferId, ChannelId, Fragment, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Index, Type, ValueId};
use dsc_ir::{DType, Extent, Sym};
use std::collections::{HashMap, HashSet};

/// One kernel being written.
pub struct Emitter<'a> {
    /// Threads and the function.
    pub t: Threads<'a>,
    /// The kernel.
    pub s: &'a Scheduled,
    /// What makes each value.
    pub defs: HashMap<ValueId, &'a tile::Op>,
    /// Single elements, which each thread has.
    pub uniform: HashMap<ValueId, Val>,
    /// Registers of fragments.
    pub fragments: HashMap<ValueId, Vec<Val>>,
    /// Buffers whose elements are as [`super::isa::Isa::operand_word`] makes them.
    pub ready: HashSet<BufferId>,
    /// Whether fragments of one column are one number for each row, and no products.
    lines: bool,
    /// Loads on their way.
    pub held: Held<'a>,
    /// Inputs of arithmetic on fragments that were read before its turn, by result and input.
    pub early: HashMap<(ValueId, ValueId), Vec<Val>>,
    /// By channel.
    pub rings: Vec<Ring>,
    /// What lies in a stage of a ring: the stage's first byte behind its buffer's.
    pub taken: HashMap<ValueId, Val>,
    /// The ring of the loop being written, if halves of the block alternate there.
    pub alternating: Option<ChannelId>,
    /// A number that divides a uniform integer.
    pub divisors: HashMap<ValueId, i64>,
    /// Addresses that views are of.
    pub params: HashMap<ValueId, Val>,
    /// Sizes in this step.
    pub syms: [Val; 6],
    /// The block's number along each axis of the grid.
    pub blocks: [Val; 3],
    /// What the schedule should have given and did not; such a kernel must not be used.
    pub fault: Option<String>,
    /// Whether the launches before are still to be waited for.
    pub waits: bool,
    /// Scalars that follow from the block's number and the step's sizes.
    pub known: HashSet<ValueId>,
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
            lines: false,
            held: Held::default(),
            early: HashMap::new(),
            rings: s.channels.iter().map(|_| Ring::default()).collect(),
            taken: HashMap::new(),
            alternating: None,
            divisors: HashMap::new(),
            params: HashMap::new(),
            syms: [i32(0); 6],
            blocks: [i32(0); 3],
            fault: None,
            waits: true,
            known: HashSet::new(),
        };
        definitions(&s.common, &mut e.defs);
        e.lines = e.t.arch.keeps_lines() && !has_column_products(e.defs.iter().map(|(&v, &op)| (op, e.shape(v))));
        e.find_readers(&s.common);
        e.ready = e.only_multiplied();
        for (i, p) in s.params.iter().enumerate() {
            e.params.insert(p.value, Val::Arg(i as u32, Ty::Global));
        }
        let syms = Val::Arg(s.params.len() as u32, e.t.symbols);
        for sym in Sym::ALL {
            let at = e.t.f.offset(syms, i64(4 * sym as i64));
            e.syms[sym as usize] = e.t.f.load(at, Ty::I32, 1)[0];
        }
        (e.t.begin)(&mut e.t.f);
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
        e.bound_blocks();
        e.block(&s.common);
        e.t.f.br(end, &[]);
        e.t.f.start(end, &[]);
        e.end_of_launch();
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

    /// Notes that blocks are inside of the grid.
    fn bound_blocks(&mut self) {
        for (axis, dim) in self.s.grid.iter().enumerate().take(3) {
            let block = self.blocks[axis];
            match dim.extent.sym {
                None => self.t.f.set_below(block, dim.extent.factor.div_ceil(dim.tile).into()),
                Some(_) if dim.tile == 1 => {
                    let extent = self.extent(dim.extent);
                    self.t.f.learn(|k| k.set_less(block, extent));
                }
                Some(_) => {}
            }
        }
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
        tile::access_of(&self.s.params, view).is_some_and(|a| !a.writes())
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
            self.await_launches(Some(inst));
            self.inst(inst);
        }
        if !block.yields.is_empty() {
            self.await_launches(None);
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

    /// A number that divides an index.
    pub fn divisor(&self, i: Index) -> i64 {
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
                let spread = self.spread(*f, like);
                let values = self.fragment(v, &spread);
                if self.is_line(like) { values } else { self.together(f.atom, &values) }
            }
            Place::Held => self.held_registers(v),
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
                let fours = values.first().is_some_and(|v| v.ty() == Ty::Quad);
                let n = match self.is_line(v) {
                    true => self.spread(*f, v).rows.len(),
                    false => Spread::count(*f, self.shape(v)) / if fours { 4 } else { 1 },
                };
                self.fragments.insert(v, values[..n].to_vec());
                n
            }
            _ => 0,
        }
    }

    fn for_loop(&mut self, inst: &'a Inst, (lo, hi, step): (Index, Index, u32), init: &[ValueId], body: &'a Block) {
        let d = divisor::gcd(self.divisor(lo), step.into());
        // All threads go round together, and the compiler is to know it.
        let [lo, hi] = [lo, hi].map(|i| {
            let i = self.index(i);
            self.t.arch.uniform(&mut self.t.f, i)
        });
        let mut carried = Vec::new();
        for (i, &v) in init.iter().enumerate() {
            carried.extend(self.registers(v, body.args[i + 1]));
        }
        self.divisors.insert(body.args[0], d);
        let mut rings = Vec::new();
        rings_in(body, &mut rings);
        self.begin_alternation(body);
        let under_way = self.under_way(&rings);
        let stages = self.ring_state(&rings);
        carried.extend(&stages);
        let l = self.t.f.open_loop(lo, hi, &carried);
        if let (Some(lo), Some(hi)) = (lo.int(), hi.int())
            && (0..hi).contains(&lo)
        {
            let last = (hi - 1 - lo) / i64::from(step) * i64::from(step) + lo;
            // Behind the loop nobody asks for its counter.
            self.t.f.set_below(l.args[0], last + 1);
        }
        self.uniform.insert(body.args[0], l.args[0]);
        let mut at = 1;
        for (&arg, &given) in body.args[1..].iter().zip(init) {
            at += match self.place(arg) {
                Place::Held => self.hold_argument(arg, given, &l.args[at..]),
                _ => self.define(arg, &l.args[at..]),
            };
        }
        self.set_ring_state(&rings, &l.args[at..]);
        let product = |inst: &Inst| matches!(inst.op, Op::Tile(tile::Op::Dot { .. }));
        let first_product = body.insts.iter().position(product).filter(|_| !rings.is_empty());
        let held = |inst: &Inst| inst.results.iter().any(|r| self.place(*r) == &Place::Held);
        let first_held = body.insts.iter().position(held);
        for (i, inst) in body.insts.iter().enumerate() {
            if first_product == Some(i) {
                self.read_early(&body.insts[i..], |e, v, _| e.reads_slot(v));
            }
            // Loads are answered in order: what this round still needs goes before those of further ones.
            if first_held == Some(i) {
                self.read_early(&body.insts[i..], Emitter::loads_only);
            }
            self.inst(inst);
        }
        let mut next = Vec::new();
        for (i, &v) in body.yields.iter().enumerate() {
            next.extend(self.registers(v, body.args[i + 1]));
        }
        next.extend(self.ring_state(&rings));
        if self.under_way(&rings) != under_way {
            self.fault = Some("a round leaves other copies under way than it found".into());
        }
        self.t.f.close_loop(&l, i32(step.into()), &next);
        self.set_ring_state(&rings, &l.done[l.done.len() - stages.len()..]);
        self.end_alternation(body);
        let mut at = 1;
        for &r in &inst.results {
            at += self.define(r, &l.done[at..]);
        }
    }

    fn branch(&mut self, inst: &'a Inst, cond: ValueId, then: &'a Block, otherwise: &'a Block) {
        let c = self.chunk(cond, &[], 1)[0];
        let c = self.t.arch.uniform(&mut self.t.f, c);
        let (yes, no, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        self.t.f.cond_br(c, (yes, &[]), (no, &[]));
        let mut types = Vec::new();
        let (waits, mut some_wait) = (self.waits, false);
        for (label, block) in [(yes, then), (no, otherwise)] {
            self.t.f.start(label, &[]);
            self.waits = waits;
            self.block(block);
            some_wait |= self.waits;
            let mut values = Vec::new();
            for (&v, &r) in block.yields.iter().zip(&inst.results) {
                values.extend(self.registers(v, r));
            }
            types = values.iter().map(|v: &Val| v.ty()).collect();
            self.t.f.br(after, &values);
        }
        self.waits = some_wait;
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
            Place::Held => self.hold(r, op),
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
                let spread = self.spread(*f, r);
                let values = self.fragment_of(op, r, &spread);
                self.set_registers(r, &values);
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

    /// Whether a value is one number for each row of a fragment.
    pub fn is_line(&self, v: ValueId) -> bool {
        self.lines
            && matches!(self.place(v), Place::Fragment(f) if f.atom != Atom::Fma)
            && matrix(self.shape(v))[1] == 1
    }

    /// Which elements of a fragment a thread has.
    pub fn spread(&mut self, f: Fragment, v: ValueId) -> Spread {
        let spread = Spread::new(self, f, self.shape(v));
        if self.is_line(v) { spread.line() } else { spread }
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

    /// Runs `body` where `c` holds (a branch).
    pub fn guarded(&mut self, c: Val, body: impl FnOnce(&mut Self)) {
        if c.int() == Some(1) {
            return body(self);
        }
        let after = self.t.f.open_if(c);
        body(self);
        self.t.f.close_if(after);
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
