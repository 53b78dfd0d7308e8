//! Loops of products whose operands go from global to shared memory without registers, some rounds ahead of their use:
//!
//! ```text
//! for ..:                        (rounds 0 .. stages - 2: acquire, copy, commit)
//!   a = load ..                  for ..:
//!   b = load ..        ──▶         wait; take a, b
//!   products                       acquire; copy the tiles of the round after the next ones; commit
//!                                  products; release
//!                                (wait and release what was copied for nothing)
//! ```
//!
//! A stage is free for the copies behind a wait when all threads are past that wait: one barrier a round. Beyond the last round copies are
//! of tiles outside of their view, which are zeros and move nothing. So a round always leaves the same number of copies under way, and its
//! wait never is for all of them.
//!
//! A loop is taken if all it reads of memory by tiles moves as it is, in rows that a copy can take (`Ring::slot`): operands of matrix products,
//! which are put down so that eight neighbouring rows lie in different banks (a swizzle), and factors of partial sums. Any load by registers
//! among them would have to wait for the copies before it.

use super::divisor;
use super::schedule::{Scheduler, matrix};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, Buffer, BufferId, Channel, ChannelId, Inst, Op, Place};
use dsc_ir::tile::{self, Index, MapArg, MapFn, MapInst, Scalar, ScalarOp, Stride, TileType, Type, ValueId, ViewType};
use std::collections::{BTreeSet, HashMap, HashSet};

/// What a chip copies, and how deep rings are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Bytes that a lane moves.
    pub lane_bytes: u32,
    /// Rounds in shared memory.
    pub stages: u32,
    /// Whether rows chosen by number are near enough ([`Schedule::near`](dsc_ir::schedule::Schedule::near)).
    pub near: bool,
}

/// Bytes of a row that one step of a matrix product reads: [`Isa::matrix_step`](super::isa::Isa::matrix_step) elements.
const STEP_BYTES: u32 = 64;
/// Copies of a thread that may be under way: what the counter of outstanding ones holds.
const MOST_COPIES: u32 = 60;
/// Bytes of a factor's row.
const FACTOR_BYTES: u32 = 16;

/// A tile that a loop copies.
struct Slot {
    result: ValueId,
    view: ValueId,
    /// Numbers of rows, if they are chosen; the index is then of the other dims.
    rows: Option<ValueId>,
    index: Vec<Index>,
    shape: Vec<u32>,
    /// Whether products read it; else it is factors of partial sums.
    operand: bool,
    lane_bytes: u32,
}

impl Scheduler<'_> {
    /// Turns the loops that can be into loops with a ring. How many they are.
    pub(super) fn make_rings(&mut self, block: &mut Block, ring: Ring) -> usize {
        let (mut out, mut made) = (Vec::with_capacity(block.insts.len()), 0);
        for mut inst in std::mem::take(&mut block.insts) {
            let slots = match &inst.op {
                Op::For { lo, step, body, .. } => {
                    let counter = body.args[0];
                    let first = self.divisor(*lo, (counter, 1));
                    self.slots(body, (counter, divisor::gcd(first, i64::from(*step))), ring)
                }
                _ => None,
            };
            match (&mut inst.op, slots) {
                (_, Some(mut slots)) => {
                    self.make_ring(inst, &mut slots, ring, &mut out);
                    made += 1;
                    continue;
                }
                (Op::For { body, .. }, None) => made += self.make_rings(body, ring),
                (Op::If { then, otherwise, .. }, None) => {
                    made += self.make_rings(then, ring) + self.make_rings(otherwise, ring);
                }
                _ => {}
            }
            out.push(inst);
        }
        block.insts = out;
        made
    }

    /// What a loop copies, if all that it loads can be. `counter`: the loop's, and a number that divides it.
    fn slots(&self, body: &Block, counter: (ValueId, i64), ring: Ring) -> Option<Vec<Slot>> {
        let made = made_in(body);
        let (mut slots, mut operands, mut views) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
        for inst in &body.insts {
            let Op::Tile(op) = &inst.op else { return None };
            let result = *inst.results.first()?;
            match op {
                tile::Op::Dot { a, b, trans_b, .. } => {
                    if !matches!(self.place(result), Place::Fragment(f) if f.atom != Atom::Fma) {
                        return None;
                    }
                    for (v, along) in [(*a, true), (*b, *trans_b)] {
                        let root = self.seen_through(v);
                        if made.contains(&root) && !along {
                            return None;
                        }
                        operands.insert(root);
                    }
                }
                tile::Op::Load { view, index, shape } if self.place(result) != &Place::Uniform => {
                    let slot = self.slot(result, (*view, None), (index, shape), ring);
                    slots.push(slot);
                }
                tile::Op::Gather { view, rows, index, shape } if ring.near => {
                    let slot = self.slot(result, (*view, Some(*rows)), (index, shape), ring);
                    slots.push(slot);
                }
                tile::Op::Load { .. } | tile::Op::Map { .. } | tile::Op::Full { .. } | tile::Op::Iota { .. } => {}
                tile::Op::Reshape { .. } => {
                    views.insert(result);
                }
                _ => return None,
            }
        }
        if !slots.iter().all(|s| self.can_copy(s, body, counter, &made)) {
            return None;
        }
        // Operands are put down for products and for nothing else; what products read of this round is copied.
        let copied: BTreeSet<ValueId> = slots.iter().filter(|s| s.operand).map(|s| s.result).collect();
        if copied.is_empty() || operands.iter().any(|v| made.contains(v) && !copied.contains(v)) {
            return None;
        }
        let reads = |v: &ValueId| copied.contains(&self.seen_through(*v));
        let elsewhere = body.insts.iter().any(|inst| match &inst.op {
            Op::Tile(tile::Op::Dot { .. } | tile::Op::Reshape { .. }) => false,
            Op::Tile(op) => tile::operands(op).iter().any(reads),
            _ => true,
        });
        (!elsewhere && !body.yields.iter().any(reads)).then_some(slots)
    }

    fn slot(
        &self,
        result: ValueId,
        (view, rows): (ValueId, Option<ValueId>),
        (index, shape): (&[Index], &[u32]),
        ring: Ring,
    ) -> Slot {
        let operand = self.operands.contains_key(&result);
        let lane_bytes = if operand { ring.lane_bytes } else { 4 };
        Slot { result, view, rows, index: index.to_vec(), shape: shape.to_vec(), operand, lane_bytes }
    }

    /// What a value is a view of, through reshapes.
    fn seen_through(&self, mut v: ValueId) -> ValueId {
        while let Some(tile::Op::Reshape { x, .. }) = self.defs.get(&v) {
            v = *x;
        }
        v
    }

    /// Whether a load moves as it is: rows without gaps, aligned, all at places that the loop does not change but for the column; and
    /// a column that is either wholly inside of the view or wholly outside.
    fn can_copy(&self, s: &Slot, body: &Block, counter: (ValueId, i64), made: &HashSet<ValueId>) -> bool {
        let Type::View(view) = &self.types[s.view.0 as usize] else { return false };
        let bytes = view.dtype.bytes() as u32;
        let [rows, columns] = matrix(&s.shape);
        let row_bytes = columns * bytes;
        let long = s.shape[..s.shape.len() - 1].iter().filter(|&&n| n > 1).count();
        let read_only = self.only_reads(s.view);
        let shaped = if s.operand {
            row_bytes.is_multiple_of(STEP_BYTES) && !self.converts.contains(&view.dtype)
        } else {
            view.dtype == DType::F32 && row_bytes <= FACTOR_BYTES
        };
        let (Some((last, leading)), Some((column, outer))) = (view.strides.split_last(), s.index.split_last()) else {
            return false;
        };
        let dense = *last == Stride { bytes: bytes.into(), sym: None };
        let unit = i64::from(s.lane_bytes);
        let aligned = (view.offset as i64) % unit == 0 && leading.iter().all(|s| s.bytes >= 0 && s.bytes % unit == 0);
        let first = usize::from(s.rows.is_some());
        let tall = |d: usize| d < first || s.shape[d] > 1;
        let near = leading.iter().enumerate().filter(|(d, _)| tall(*d));
        let near = near.clone().all(|(_, s)| s.sym.is_none() && s.bytes.saturating_mul(rows.into()) < 1 << 31);
        let known = |i: &Index| match i {
            Index::Const(_) => true,
            Index::Value(v) => self.is_fixed(*v, body, made),
        };
        let whole = view.shape.last().is_some_and(|e| e.sym.is_none() && e.factor.is_multiple_of(columns))
            && self.divisor(*column, counter) % i64::from(columns) == 0
            && match column {
                Index::Const(_) => true,
                Index::Value(v) => self.steps_to(*v, body, made).is_some(),
            };
        let chosen = s.rows.is_none_or(|v| !made.contains(&v) && s.shape.len() == view.shape.len() && long <= 1);
        let near = near && (s.rows.is_none() || s.shape[1..s.shape.len() - 1].iter().all(|&n| n == 1));
        read_only && chosen && shaped && dense && aligned && near && long <= 1 && outer.iter().all(known) && whole
    }

    /// A number that divides an index, where `counter` is a loop's and what divides that.
    fn divisor(&self, i: Index, counter: (ValueId, i64)) -> i64 {
        match i {
            Index::Const(n) => divisor::of_constant(n),
            Index::Value(v) if v == counter.0 => counter.1,
            Index::Value(v) => self.defs.get(&v).map_or(1, |op| divisor::of(op, &|i| self.divisor(i, counter))),
        }
    }

    /// The instructions of a body that make a single integer from its counter, in order; none if it depends on anything else of the body.
    fn steps_to(&self, v: ValueId, body: &Block, made: &HashSet<ValueId>) -> Option<Vec<ValueId>> {
        if v == body.args[0] || !made.contains(&v) {
            return Some(Vec::new());
        }
        let op = self.defs.get(&v).filter(|op| {
            self.place(v) == &Place::Uniform
                && matches!(op, tile::Op::Map { .. } | tile::Op::Full { .. } | tile::Op::Reshape { .. })
        })?;
        let mut steps = Vec::new();
        for x in tile::operands(op) {
            for step in self.steps_to(x, body, made)? {
                if !steps.contains(&step) {
                    steps.push(step);
                }
            }
        }
        steps.push(v);
        Some(steps)
    }

    /// Whether a value is the same in all rounds, made by steps that can be made before them.
    fn is_fixed(&self, v: ValueId, body: &Block, made: &HashSet<ValueId>) -> bool {
        let counts = |steps: Vec<ValueId>| {
            let operands = steps.iter().filter_map(|s| self.defs.get(s)).flat_map(tile::operands);
            operands.chain([v]).any(|x| x == body.args[0])
        };
        self.steps_to(v, body, made).is_some_and(|steps| !counts(steps))
    }

    /// A new value.
    pub(super) fn fresh(&mut self, ty: Type, place: Place) -> ValueId {
        self.types.push(ty);
        self.places.push(place);
        ValueId(self.types.len() as u32 - 1)
    }

    /// A single integer or truth value by arithmetic.
    fn uniform(&mut self, dtype: DType, inputs: Vec<ValueId>, insts: Vec<MapInst>, out: &mut Vec<Inst>) -> ValueId {
        let v = self.fresh(Type::Tile(TileType::scalar(dtype)), Place::Uniform);
        let result = MapArg::Inst(insts.len() as u32 - 1);
        self.emit(v, tile::Op::Map { inputs, body: MapFn { insts, result } }, out);
        v
    }

    pub(super) fn emit(&mut self, v: ValueId, op: tile::Op, out: &mut Vec<Inst>) {
        self.defs.insert(v, op.clone());
        out.push(Inst { results: vec![v], op: Op::Tile(op), scratch: None });
    }

    /// A loop's bound as a value.
    pub(super) fn bound(&mut self, i: Index, out: &mut Vec<Inst>) -> ValueId {
        match i {
            Index::Value(v) => v,
            Index::Const(n) => {
                let v = self.fresh(Type::Tile(TileType::scalar(DType::I32)), Place::Uniform);
                self.emit(v, tile::Op::Full { value: Scalar::I32(n as i32), shape: Vec::new() }, out);
                v
            }
        }
    }

    fn make_ring(&mut self, mut inst: Inst, slots: &mut [Slot], ring: Ring, out: &mut Vec<Inst>) {
        let Op::For { lo, hi, step, body, .. } = &mut inst.op else { unreachable!("a loop") };
        let (lo, hi, step) = (*lo, *hi, *step);
        let channel = ChannelId(self.channels.len() as u32);
        let buffers: Vec<BufferId> = slots.iter().map(|s| self.slot_buffer(s, ring)).collect();
        let name = format!("ring{}", channel.0);
        self.channels.push(Channel { name, stages: ring.stages, turns: 1, slots: buffers });
        for (i, s) in slots.iter().enumerate() {
            self.set(s.result, Place::Slot(channel, i as u32));
            self.defs.remove(&s.result);
        }
        let plain = |op| Inst { results: Vec::new(), op, scratch: None };
        let ahead = ring.stages - 1;
        out.push(plain(Op::Barrier));
        let (first, end) = (self.bound(lo, out), self.bound(hi, out));
        self.fix_rows(slots, body, out);
        for round in 0..ahead {
            let at = self.plus(first, i64::from(round * step), out);
            self.copies(channel, slots, body, (at, end), out);
        }
        let mut head = vec![plain(Op::Wait(channel))];
        for (i, s) in slots.iter().enumerate() {
            let op = Op::Take { channel, slot: i as u32 };
            head.push(Inst { results: vec![s.result], op, scratch: None });
        }
        let at = self.plus(body.args[0], i64::from(ahead * step), &mut head);
        self.copies(channel, slots, body, (at, end), &mut head);
        let copied: HashSet<ValueId> = slots.iter().map(|s| s.result).collect();
        let rest = std::mem::take(&mut body.insts);
        body.insts = head;
        body.insts.extend(rest.into_iter().filter(|i| !i.results.iter().any(|r| copied.contains(r))));
        body.insts.push(plain(Op::Release { channel, lag: 0 }));
        self.read_factors_in_place(body);
        self.products_last(body);
        out.push(inst);
        for _ in 0..ahead {
            out.extend([plain(Op::Wait(channel)), plain(Op::Release { channel, lag: 0 })]);
        }
        out.push(plain(Op::Barrier));
    }

    /// Makes what slots' tiles begin at, columns aside, in front of the loop.
    fn fix_rows(&mut self, slots: &mut [Slot], body: &Block, out: &mut Vec<Inst>) {
        let made = made_in(body);
        let mut renamed = HashMap::new();
        for s in slots {
            let outer = s.index.len().saturating_sub(1);
            for i in &mut s.index[..outer] {
                let Index::Value(v) = i else { continue };
                for step in self.steps_to(*v, body, &made).unwrap_or_default() {
                    self.repeat(step, &mut renamed, out);
                }
                *v = renamed.get(v).copied().unwrap_or(*v);
            }
        }
    }

    pub(super) fn plus(&mut self, v: ValueId, n: i64, out: &mut Vec<Inst>) -> ValueId {
        if n == 0 {
            return v;
        }
        let constant = MapInst { op: ScalarOp::Const(Scalar::I32(n as i32)), args: Vec::new() };
        let add = MapInst { op: ScalarOp::Add, args: vec![MapArg::Input(0), MapArg::Inst(0)] };
        self.uniform(DType::I32, vec![v], vec![constant, add], out)
    }

    /// Fills a stage with the round at `at`, or with zeros if that is not before `end`.
    fn copies(
        &mut self,
        channel: ChannelId,
        slots: &[Slot],
        body: &Block,
        (at, end): (ValueId, ValueId),
        out: &mut Vec<Inst>,
    ) {
        let plain = |op| Inst { results: Vec::new(), op, scratch: None };
        let lt = MapInst { op: ScalarOp::Lt, args: vec![MapArg::Input(0), MapArg::Input(1)] };
        let inside = self.uniform(DType::Bool, vec![at, end], vec![lt], out);
        let made = made_in(body);
        let mut renamed = HashMap::from([(body.args[0], at)]);
        out.push(plain(Op::Acquire(channel)));
        for (slot, s) in slots.iter().enumerate() {
            let mut index = s.index.clone();
            let columns = match &self.types[s.view.0 as usize] {
                Type::View(ViewType { shape, .. }) => shape.last().map_or(0, |e| e.factor),
                _ => 0,
            };
            let column = match index.pop() {
                Some(Index::Value(v)) => {
                    let steps = self.steps_to(v, body, &made).unwrap_or_default();
                    for step in steps {
                        self.repeat(step, &mut renamed, out);
                    }
                    renamed.get(&v).copied().unwrap_or(v)
                }
                Some(constant) => self.bound(constant, out),
                None => at,
            };
            let outside = MapInst { op: ScalarOp::Const(Scalar::I32(columns as i32)), args: Vec::new() };
            let select =
                MapInst { op: ScalarOp::Select, args: vec![MapArg::Input(0), MapArg::Input(1), MapArg::Inst(0)] };
            let column = self.uniform(DType::I32, vec![inside, column], vec![outside, select], out);
            index.push(Index::Value(column));
            let (view, rows, shape) = (s.view, s.rows, s.shape.clone());
            out.push(plain(Op::Copy { channel, slot: slot as u32, view, rows, index, shape, shared: false }));
        }
        out.push(plain(Op::Commit(channel)));
    }

    /// Makes a value of the body anew, from renamed ones.
    fn repeat(&mut self, v: ValueId, renamed: &mut HashMap<ValueId, ValueId>, out: &mut Vec<Inst>) {
        if renamed.contains_key(&v) {
            return;
        }
        let Some(mut op) = self.defs.get(&v).cloned() else { return };
        let name = |v: &mut ValueId| *v = renamed.get(v).copied().unwrap_or(*v);
        match &mut op {
            tile::Op::Map { inputs, .. } => inputs.iter_mut().for_each(name),
            tile::Op::Reshape { x, .. } => name(x),
            _ => {}
        }
        let again = self.fresh(self.types[v.0 as usize].clone(), Place::Uniform);
        self.emit(again, op, out);
        renamed.insert(v, again);
    }

    /// A slot's buffer: rows one after another, operands swizzled, whole copies of all threads.
    fn slot_buffer(&mut self, s: &Slot, ring: Ring) -> BufferId {
        let [rows, columns] = matrix(&s.shape);
        let dtype = match &self.types[s.view.0 as usize] {
            Type::View(view) => view.dtype,
            _ => DType::F32,
        };
        let pitch = columns * dtype.bytes() as u32;
        let round = self.threads * s.lane_bytes;
        let whole = round / divisor::gcd(round.into(), pitch.into()) as u32;
        let name = format!("v{}", s.result.0);
        let id = self.buffer(name, dtype, [rows.next_multiple_of(whole), columns], pitch);
        let b = &mut self.buffers[id.0 as usize];
        b.copies = ring.stages;
        b.swizzle = match s.operand {
            true if pitch.is_multiple_of(128) => 128,
            true => STEP_BYTES,
            false => 0,
        };
        id
    }

    /// Arithmetic on factors that lie in the ring is done where it is used rather than kept.
    fn read_factors_in_place(&mut self, body: &Block) {
        for inst in &body.insts {
            let (Op::Tile(tile::Op::Map { inputs, .. }), Some(&r)) = (&inst.op, inst.results.first()) else { continue };
            let near = |v: &ValueId| matches!(self.place(*v), Place::Slot(..) | Place::Uniform);
            if matches!(self.place(r), Place::Shared(_)) && inputs.iter().all(near) && !self.operands.contains_key(&r) {
                self.set(r, Place::Lazy);
            }
        }
    }

    /// What is not of products goes before them: where halves alternate, all is read before a half multiplies.
    fn products_last(&self, body: &mut Block) {
        let single = |inst: &Inst| {
            let near = |r: &ValueId| matches!(self.place(*r), Place::Uniform | Place::Lazy);
            matches!(inst.op, Op::Tile(_)) && !inst.results.is_empty() && inst.results.iter().all(near)
        };
        let first = body.insts.iter().position(|i| matches!(i.op, Op::Tile(tile::Op::Dot { .. }))).unwrap_or(0);
        let (mut before, mut behind): (Vec<Inst>, Vec<Inst>) = body.insts.drain(first..).partition(single);
        body.insts.append(&mut before);
        body.insts.append(&mut behind);
    }

    /// Copies that each thread makes to fill a stage of a channel; more than may be under way at once if the ring is too deep.
    pub(super) fn too_many_copies(&self, ring: Ring) -> bool {
        self.channels.iter().any(|c| {
            let bytes = |b: &BufferId| {
                let b = &self.buffers[b.0 as usize];
                b.copy_bytes() / (self.threads * lane_bytes(b, ring.lane_bytes))
            };
            c.slots.iter().map(bytes).sum::<u32>() * (c.stages - 1) > MOST_COPIES
        })
    }

    /// Forgets buffers that nothing lies in any more.
    pub(super) fn drop_unused_buffers(&mut self, block: &mut Block) {
        let mut used: BTreeSet<BufferId> = self.channels.iter().flat_map(|c| c.slots.clone()).collect();
        used.extend(self.places.iter().filter_map(Place::buffer));
        scratch(block, &mut |b| {
            used.insert(*b);
        });
        let numbers: HashMap<BufferId, BufferId> =
            used.iter().enumerate().map(|(i, &b)| (b, BufferId(i as u32))).collect();
        let mut at = 0;
        self.buffers.retain(|_| {
            at += 1;
            used.contains(&BufferId(at - 1))
        });
        for place in &mut self.places {
            if let Place::Shared(b) = place {
                *b = numbers[b];
            }
        }
        self.channels.iter_mut().flat_map(|c| &mut c.slots).for_each(|b| *b = numbers[b]);
        scratch(block, &mut |b| *b = numbers[b]);
    }
}

/// Bytes that a lane moves of a slot: operands are swizzled, factors are not and move by words.
pub fn lane_bytes(b: &Buffer, operand: u32) -> u32 {
    if b.swizzle > 0 { operand } else { 4 }
}

/// Values that a loop's body makes itself.
pub(super) fn made_in(body: &Block) -> HashSet<ValueId> {
    body.args.iter().chain(body.insts.iter().flat_map(|i| &i.results)).copied().collect()
}

fn scratch(block: &mut Block, f: &mut impl FnMut(&mut BufferId)) {
    for inst in &mut block.insts {
        inst.scratch.iter_mut().for_each(&mut *f);
        match &mut inst.op {
            Op::For { body, .. } => scratch(body, f),
            Op::If { then, otherwise, .. } => {
                scratch(then, f);
                scratch(otherwise, f);
            }
            _ => {}
        }
    }
}
