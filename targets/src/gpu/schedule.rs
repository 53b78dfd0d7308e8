//! Tile program to scheduled tile IR, the plain way: one role of all threads, any shape, any architecture.
//!
//! Every value gets a place:
//!
//! * single elements are [`Place::Uniform`]: each thread has them;
//! * results of matrix products, and elementwise arithmetic on them, are [`Place::Fragment`]: spread over registers as the
//!   instruction leaves them;
//! * operands of products, reductions, concatenations, selections and whatever is read more than once are [`Place::Shared`];
//! * the rest is [`Place::Lazy`]: views of other tiles, counters, and loads and arithmetic with one use, which fuse into it.
//!
//! Loops of products may get a ring of operands that are copied ahead ([`super::ring`]): [`Place::Slot`]; or load them ahead
//! (`ahead`): [`Place::Held`].
//!
//! Then buffers get offsets by their lifetimes (`allocate`) and barriers go where a thread may meet another's write
//! (`place_barriers`).

use crate::{Kernel, TargetError};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Block, Buffer, BufferId, Channel, Fragment, Inst, Op, Place, Scheduled};
use dsc_ir::tile::{self, Access, Index, MapArg, MapFn, MapInst, Program, Region, ScalarOp, TileType, Type, ValueId};
use std::collections::{BTreeSet, HashMap};

use super::ahead::Room;
use super::analysis::{Analysis, Operand, Uses, each};
use super::barriers::{Reads, place_barriers};
use super::fragment::Layout;
use super::isa::Isa;
use super::lifetimes::allocate;
use super::reduce::by_block;
use super::ring::Ring;
use super::topk;

/// Bytes of buffers that share their place with no others, where loops load ahead: statistics of rows.
pub(super) const SMALL: u32 = 1024;

/// Applies a kernel's schedule on that architecture.
///
/// # Errors
/// [`TargetError::Unsupported`] if shared memory does not suffice; the message lists the buffers.
pub fn schedule(kernel: &Kernel, arch: &dyn Isa) -> Result<Scheduled, TargetError> {
    if let Some(scheduled) = with_ring(kernel, arch) {
        return Ok(scheduled);
    }
    let room = Room { bytes: arch.ahead_bytes(), in_place: false };
    // What is put down ahead takes shared memory a little longer.
    let error = match attempt(kernel, arch, How::Plain, room) {
        Ok(scheduled) => return Ok(scheduled),
        Err(_) if kernel.schedule.early => {
            let late = dsc_ir::schedule::Schedule { early: false, ..kernel.schedule.clone() };
            return schedule(&Kernel { program: kernel.program.clone(), schedule: late }, arch);
        }
        Err(error) => error,
    };
    let (late, none) = (Room { in_place: true, ..room }, Room { bytes: 0, in_place: false });
    let others = [(How::Plain, late), (How::Plain, none), (How::Lean, room), (How::Lean, none)];
    others.into_iter().find_map(|(how, room)| attempt(kernel, arch, how, room).ok()).ok_or(error)
}

/// With loops that copy rounds ahead, if there are such: as deep as is asked for, else four rounds if two blocks have room for them, or three.
fn with_ring(kernel: &Kernel, arch: &dyn Isa) -> Option<Scheduled> {
    let lane_bytes = arch.copies_bytes()?;
    let whole = arch.shared_per_block();
    let depths: &[(u32, u32)] = match kernel.schedule.stages {
        0 => &[(4, whole / 2), (3, whole)],
        1 => return None,
        n => &[(n, whole)],
    };
    let mut tries = depths.iter().filter_map(|&(stages, most)| {
        let scheduled = attempt(
            kernel,
            arch,
            How::Ring(Ring { lane_bytes, stages, near: kernel.schedule.near }),
            Room { bytes: arch.ahead_bytes(), in_place: false },
        )
        .ok()?;
        (shared_bytes(&scheduled) <= most).then_some(scheduled)
    });
    tries.next()
}

/// What an attempt does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    /// Operands go to shared memory by registers.
    Plain,
    /// The same, and what can be read again from global memory is not kept.
    Lean,
    /// Loops copy their operands some rounds ahead; an error if no loop does.
    Ring(Ring),
}

fn attempt(kernel: &Kernel, arch: &dyn Isa, how: How, room: Room) -> Result<Scheduled, TargetError> {
    let program = &kernel.program;
    let threads = threads(kernel);
    let analysis = Analysis::of(program, arch);
    let mut s = Scheduler {
        program,
        threads,
        lanes: arch.lanes(),
        places: vec![Place::Lazy; program.types.len()],
        types: program.types.clone(),
        defs: analysis.defs,
        uses: analysis.uses,
        fragments: analysis.fragments,
        operands: analysis.operands,
        atom: analysis.atom,
        atoms: analysis.atoms,
        lines: analysis.lines,
        buffers: Vec::new(),
        channels: Vec::new(),
        converts: [DType::E4m3, DType::Bf16, DType::F16].into_iter().filter(|&t| arch.converts(t)).collect(),
        lean: how == How::Lean,
        sparing: arch.spares_shared() && !kernel.schedule.early,
        in_place: room.bytes > 0,
        spilled: HashMap::new(),
        updated: program.params.iter().filter(|p| p.access == Access::ReadWrite).map(|p| p.value).collect(),
    };
    for p in &program.params {
        s.places[p.value.0 as usize] = Place::View;
    }
    let mut common = s.region(&program.body);
    if kernel.schedule.early && how == How::Plain {
        s.begin_early(&mut common, arch.early_bytes(threads));
    }
    if let How::Ring(ring) = how {
        if s.make_rings(&mut common, ring) == 0 || s.too_many_copies(ring) {
            return Err(TargetError::Unsupported {
                kernel: program.name.clone(),
                op: "a ring".into(),
                reason: "no loop copies its operands as they are, or it has too many copies under way".into(),
            });
        }
        s.drop_unused_buffers(&mut common);
    }
    if room.bytes > 0 && how == How::Plain {
        s.hold_left_operands(&mut common, arch);
    }
    let ahead = s.load_ahead(&mut common, room);
    let reads = Reads { defs: &s.defs, places: &s.places, channels: &s.channels };
    // Only pushes to selections ask whether something holds in any thread.
    let mut pushes = false;
    each(&program.body, &mut |inst| pushes |= matches!(inst.op, tile::Op::TopkPush { .. }));
    let limit = arch.shared_per_block() - if pushes { arch.meeting_bytes() } else { 0 };
    let small = if ahead { SMALL } else { 0 };
    for own in [small, 0] {
        allocate(&mut s.buffers, &common, &reads, own);
        if bytes_of(&s.buffers) <= limit {
            break;
        }
    }
    place_barriers(&mut common, &reads, &s.buffers, &s.updated);
    let scheduled = Scheduled {
        name: program.name.clone(),
        grid: program.grid.clone(),
        persistent: None,
        cluster: None,
        team: 1,
        folded: false,
        alternate: kernel.schedule.alternate && !s.channels.is_empty(),
        dies: kernel.schedule.dies.max(1),
        params: program.params.clone(),
        types: s.types,
        places: s.places,
        threads,
        buffers: s.buffers,
        channels: s.channels,
        common,
        roles: Vec::new(),
    };
    let bytes = shared_bytes(&scheduled);
    if bytes > limit {
        return Err(TargetError::Unsupported {
            kernel: program.name.clone(),
            op: "shared memory".into(),
            reason: format!(
                "{bytes} bytes of {} that a block of {} has; choose smaller tiles:\n{}",
                limit,
                arch.name(),
                table(&scheduled.buffers)
            ),
        });
    }
    Ok(scheduled)
}

/// Bytes of shared memory of a block.
pub fn shared_bytes(s: &Scheduled) -> u32 {
    bytes_of(&s.buffers)
}

fn bytes_of(buffers: &[Buffer]) -> u32 {
    buffers.iter().map(|b| b.offset + b.bytes()).max().unwrap_or(0)
}

fn table(buffers: &[Buffer]) -> String {
    let mut order: Vec<&Buffer> = buffers.iter().collect();
    order.sort_by_key(|b| std::cmp::Reverse(b.bytes()));
    let line = |b: &&Buffer| {
        format!("  {:>8} bytes at {:>7}  {} {}x{} {}\n", b.bytes(), b.offset, b.name, b.shape[0], b.shape[1], b.dtype)
    };
    order.iter().take(12).map(line).collect()
}

/// Threads of a block: as the schedule says, else by the largest tile.
fn threads(kernel: &Kernel) -> u32 {
    if kernel.schedule.threads > 0 {
        return kernel.schedule.threads;
    }
    let elements = |t: &Type| match t {
        Type::Tile(t) => t.elements(),
        Type::View(_) => 0,
        Type::Topk { rows, k } => (rows * k) as usize,
    };
    match kernel.program.types.iter().map(elements).max().unwrap_or(1) {
        0..=1024 => 128,
        _ => 256,
    }
}

/// A shape without axes of one element.
pub fn squeezed(shape: &[u32]) -> Vec<u32> {
    shape.iter().copied().filter(|&n| n != 1).collect()
}

/// Rows and columns of a tile: its last axis, and all before it.
pub fn matrix(shape: &[u32]) -> [u32; 2] {
    match shape.split_last() {
        Some((&cols, rows)) => [rows.iter().product(), cols],
        None => [1, 1],
    }
}

pub(super) struct Scheduler<'a> {
    pub(super) program: &'a Program,
    pub(super) threads: u32,
    /// Lanes that share instructions.
    lanes: u32,
    pub(super) places: Vec<Place>,
    pub(super) types: Vec<Type>,
    pub(super) defs: HashMap<ValueId, tile::Op>,
    uses: HashMap<ValueId, Uses>,
    fragments: BTreeSet<ValueId>,
    pub(super) operands: HashMap<ValueId, Operand>,
    atom: Atom,
    atoms: HashMap<ValueId, Atom>,
    lines: HashMap<ValueId, ValueId>,
    pub(super) buffers: Vec<Buffer>,
    pub(super) channels: Vec<Channel>,
    /// Types of which matrix instructions take other bits than memory holds.
    pub(super) converts: Vec<DType>,
    /// Whether carried tiles are overwritten where they are read, if that can be.
    in_place: bool,
    /// Whether what can be read again from global memory is not kept in shared memory.
    lean: bool,
    /// Whether the same goes for what is read twice, in pieces, and what was widened lies as narrow as it was.
    sparing: bool,
    /// Shared copies of fragments, valid in the block being written.
    spilled: HashMap<ValueId, ValueId>,
    /// Views that are both read and written.
    updated: Vec<ValueId>,
}

impl Scheduler<'_> {
    pub(super) fn tile(&self, v: ValueId) -> TileType {
        match &self.types[v.0 as usize] {
            Type::Tile(t) => t.clone(),
            _ => TileType::scalar(DType::I32),
        }
    }

    pub(super) fn place(&self, v: ValueId) -> &Place {
        &self.places[v.0 as usize]
    }

    pub(super) fn set(&mut self, v: ValueId, place: Place) {
        self.places[v.0 as usize] = place;
    }

    pub(super) fn buffer(&mut self, name: String, dtype: DType, shape: [u32; 2], pitch: u32) -> BufferId {
        self.buffers.push(Buffer { name, dtype, shape, pitch, swizzle: 0, copies: 1, offset: 0, outside: false });
        BufferId(self.buffers.len() as u32 - 1)
    }

    /// Shared memory for a tile; padded if it is an operand of a product.
    pub(super) fn shared(&mut self, v: ValueId) -> Place {
        let t = self.tile(v);
        let [rows, cols] = matrix(&t.shape);
        let bytes = t.dtype.bytes() as u32;
        let name = format!("v{}", v.0);
        let id = match self.operands.get(&v) {
            Some(o) => {
                let shape = [rows.next_multiple_of(o.rows), cols.next_multiple_of(o.cols)];
                // 16 bytes more than a multiple of 128 leave the eight rows of a matrix in different banks.
                let pitch = (shape[1] * bytes).next_multiple_of(128) + 16;
                let pitch = if shape[1] * bytes <= 112 { (shape[1] * bytes).next_multiple_of(32) + 16 } else { pitch };
                self.buffer(name, t.dtype, shape, pitch)
            }
            None => self.buffer(name, t.dtype, [rows, cols], cols * bytes),
        };
        Place::Shared(id)
    }

    /// Whether a value is one number for each row of a fragment, in registers of those who have the row.
    fn is_line(&self, v: ValueId) -> bool {
        self.lines.contains_key(&v) && matches!(self.place(v), Place::Fragment(_))
    }

    fn scratch(&mut self, bytes: u32) -> Option<BufferId> {
        (bytes > 0)
            .then(|| self.buffer("scratch".into(), DType::I32, [1, bytes.div_ceil(4)], bytes.next_multiple_of(16)))
    }

    /// How warps share an `m x n` result: as square as it comes, so that operands are read least.
    fn fragment(&self, v: ValueId) -> Place {
        let [m, n] = matrix(&self.tile(v).shape);
        let atom = self.atoms.get(&v).copied().unwrap_or(self.atom);
        let Layout { unit, lanes, .. } = Layout::of(atom);
        let warps = self.threads / lanes;
        let cost = |wm: u32| {
            let wn = warps / wm;
            let (rows, cols) = (m.div_ceil(wm).next_multiple_of(unit[0]), n.div_ceil(wn).next_multiple_of(unit[1]));
            // Instructions of the warp with most work first, then bytes of operands.
            ((rows / unit[0]) * (cols / unit[1]), rows + cols, wm)
        };
        let mut wm = (0..=warps.ilog2()).map(|b| 1 << b).min_by_key(|&wm| cost(wm)).unwrap_or(1);
        // Where rows are reduced, as few as can be share one.
        if self.lines.values().next().is_some_and(|&of| self.tile(of).shape == self.tile(v).shape) {
            wm = warps.min(1 << m.div_ceil(unit[0]).ilog2());
        }
        Place::Fragment(Fragment { atom, warps: [wm, warps / wm] })
    }

    fn region(&mut self, region: &Region) -> Block {
        let mut block = Block { args: region.args.clone(), insts: Vec::new(), yields: region.yields.clone() };
        for inst in &region.insts {
            self.inst(inst, &mut block.insts);
        }
        block
    }

    /// A region whose yields go to these places: those of shared memory are moved to shared memory at its end, `there` if
    /// nothing else needs what is in the target.
    fn region_into(&mut self, region: &Region, targets: &[Place], there: bool) -> Block {
        let spilled = self.spilled.clone();
        let mut block = self.region(region);
        for (i, target) in targets.iter().enumerate() {
            let v = block.yields[i];
            if *target == Place::Uniform {
                block.yields[i] = self.readable(v, &mut block.insts);
            }
            if !matches!(target, Place::Shared(_)) || self.is_state(v) || self.place(v) == target {
                continue;
            }
            if there {
                block.yields[i] = self.copy(v, target.clone(), &mut block.insts);
            } else if !matches!(self.place(v), Place::Shared(_)) && !self.stays_in_place(v, target, targets) {
                block.yields[i] = self.spill(v, &mut block.insts);
            }
        }
        self.spilled = spilled;
        block
    }

    /// Whether what goes to `target` is computed element by element from what is there and in no other of the targets: then each thread may
    /// overwrite what it read. The chips that load ahead count barriers.
    fn stays_in_place(&self, v: ValueId, target: &Place, targets: &[Place]) -> bool {
        let Some(tile::Op::Map { inputs, .. }) = self.defs.get(&v).filter(|_| self.place(v) == &Place::Lazy) else {
            return false;
        };
        self.in_place
            && inputs.iter().all(|&x| {
                let same = self.tile(x).shape == self.tile(v).shape;
                match self.place(x) {
                    Place::Uniform => true,
                    Place::Shared(_) if self.place(x) == target => same,
                    Place::Shared(_) => same && !targets.contains(self.place(x)),
                    _ => same && self.stays_in_place(x, target, targets),
                }
            })
    }

    fn is_state(&self, v: ValueId) -> bool {
        matches!(self.types[v.0 as usize], Type::Topk { .. })
    }

    /// A value like `v`, at `place`, by an instruction that copies it.
    fn copy(&mut self, v: ValueId, place: Place, out: &mut Vec<Inst>) -> ValueId {
        let copy = ValueId(self.types.len() as u32);
        self.types.push(self.types[v.0 as usize].clone());
        self.places.push(place);
        let op = tile::Op::Map { inputs: vec![v], body: MapFn { insts: Vec::new(), result: MapArg::Input(0) } };
        self.defs.insert(copy, op.clone());
        out.push(Inst { results: vec![copy], op: Op::Tile(op), scratch: None });
        copy
    }

    /// `v` in shared memory.
    fn spill(&mut self, v: ValueId, out: &mut Vec<Inst>) -> ValueId {
        if let Some(&copy) = self.spilled.get(&v) {
            return copy;
        }
        let place = self.shared(v);
        let copy = self.copy(v, place, out);
        self.spilled.insert(v, copy);
        copy
    }

    /// `v`, or a shared copy if threads other than the owner of an element will want it.
    fn readable(&mut self, v: ValueId, out: &mut Vec<Inst>) -> ValueId {
        match self.place(v) {
            Place::Fragment(_) => self.spill(v, out),
            _ => v,
        }
    }

    /// `v`, if it is a shared buffer seen through reshapes, in row-major order without gaps if `dense`; else a copy that is.
    fn stored(&mut self, v: ValueId, dense: bool, out: &mut Vec<Inst>) -> ValueId {
        let mut root = v;
        while let (Place::Lazy, Some(tile::Op::Reshape { x, .. })) = (self.place(root), self.defs.get(&root)) {
            root = *x;
        }
        match self.place(root) {
            Place::Shared(b) => {
                let b = &self.buffers[b.0 as usize];
                let t = self.tile(v);
                let fits = if dense {
                    b.pitch == b.shape[1] * b.dtype.bytes() as u32
                } else {
                    // The same rows and columns, and room for the padding that this operand needs.
                    let [rows, cols] = matrix(&t.shape);
                    let o = self.operands.get(&v).copied().unwrap_or(Operand { rows: 1, cols: 1 });
                    matrix(&self.tile(root).shape)[1] == cols
                        && b.shape[0] >= rows.next_multiple_of(o.rows)
                        && b.shape[1] >= cols.next_multiple_of(o.cols)
                        && b.pitch.is_multiple_of(16)
                };
                if fits { v } else { self.spill_dense(v, dense, out) }
            }
            _ => self.spill_dense(v, dense, out),
        }
    }

    fn spill_dense(&mut self, v: ValueId, dense: bool, out: &mut Vec<Inst>) -> ValueId {
        if !dense {
            return self.spill(v, out);
        }
        let operand = self.operands.remove(&v);
        let copy = self.spill(v, out);
        if let Some(o) = operand {
            self.operands.insert(v, o);
            self.spilled.remove(&v);
        }
        copy
    }

    fn inst(&mut self, inst: &tile::Inst, out: &mut Vec<Inst>) {
        let result = inst.results.first().copied();
        let single = |s: &Self, v: ValueId| s.tile(v).elements() == 1;
        let mut scratch = None;
        let op = match &inst.op {
            tile::Op::For { lo, hi, step, init, body } => {
                return self.for_loop(inst, (*lo, *hi, *step), init, body, out);
            }
            tile::Op::If { cond, then, otherwise } => {
                let targets: Vec<Place> = inst.results.iter().map(|&r| self.result_place(r)).collect();
                for (&r, place) in inst.results.iter().zip(&targets) {
                    self.set(r, place.clone());
                }
                let then = self.region_into(then, &targets, true);
                let otherwise = self.region_into(otherwise, &targets, true);
                out.push(Inst { results: inst.results.clone(), op: Op::If { cond: *cond, then, otherwise }, scratch });
                return;
            }
            tile::Op::BlockId { .. } | tile::Op::Sym(_) => {
                self.set(inst.results[0], Place::Uniform);
                inst.op.clone()
            }
            tile::Op::Full { .. } | tile::Op::Iota { .. } => {
                let r = inst.results[0];
                let place = if single(self, r) { Place::Uniform } else { Place::Lazy };
                self.set(r, place);
                inst.op.clone()
            }
            tile::Op::Load { .. } | tile::Op::Gather { .. } | tile::Op::Map { .. } => {
                let op = self.with_readable(&inst.op, out);
                let r = inst.results[0];
                let place = self.elementwise_place(r, &op);
                self.set(r, place);
                op
            }
            tile::Op::Reshape { x, .. } | tile::Op::Permute { x, .. } | tile::Op::Slice { x, .. } => {
                let r = inst.results[0];
                if single(self, r) {
                    self.set(r, Place::Uniform);
                    self.with_readable(&inst.op, out)
                } else if self.fragments.contains(&r) && matches!(self.place(*x), Place::Fragment(_)) {
                    let place = self.place(*x).clone();
                    self.set(r, place);
                    inst.op.clone()
                } else {
                    self.fragments.remove(&r);
                    self.set(r, Place::Lazy);
                    self.with_readable(&inst.op, out)
                }
            }
            tile::Op::Concat { .. } => {
                let op = self.with_readable(&inst.op, out);
                let place = self.shared(inst.results[0]);
                self.set(inst.results[0], place);
                op
            }
            tile::Op::Reduce { x, axis, kind } => {
                let fragment = matches!(self.place(*x), Place::Fragment(_));
                let direct = fragment && self.tile(*x).shape.len() == 2 && !self.is_line(*x);
                let x = if direct { *x } else { self.readable(*x, out) };
                let t = self.tile(x);
                let r = inst.results[0];
                let outputs = self.tile(r).elements() as u32;
                let place = match self.place(x).clone() {
                    _ if outputs == 1 => Place::Uniform,
                    place if direct && self.lines.contains_key(&r) => place,
                    _ => self.shared(r),
                };
                self.set(r, place);
                let warps = self.threads / self.lanes;
                scratch = match (direct, self.place(x).clone()) {
                    // One partial result a row (or column) for each warp along the reduced axis.
                    (true, Place::Fragment(f)) => {
                        let along = f.warps[*axis as usize];
                        self.scratch(if along > 1 || outputs == 1 { outputs * along * 4 } else { 0 })
                    }
                    _ => {
                        let inner: u32 = t.shape[*axis as usize + 1..].iter().product();
                        let lines = [outputs, t.shape[*axis as usize], inner];
                        let whole = by_block(lines, (*kind, t.dtype), [self.threads, self.lanes]);
                        self.scratch(if whole { outputs * warps * 4 } else { 0 })
                    }
                };
                tile::Op::Reduce { x, axis: *axis, kind: *kind }
            }
            tile::Op::Scan { x, axis, kind } => {
                let x = self.stored(*x, true, out);
                let place = self.shared(inst.results[0]);
                self.set(inst.results[0], place);
                tile::Op::Scan { x, axis: *axis, kind: *kind }
            }
            tile::Op::Dot { a, b, acc, trans_b } => {
                let (a, b) = (self.stored(*a, false, out), self.stored(*b, false, out));
                let r = inst.results[0];
                let place = self.fragment(r);
                self.set(r, place);
                tile::Op::Dot { a, b, acc: *acc, trans_b: *trans_b }
            }
            tile::Op::TopkInit { .. } => {
                let r = inst.results[0];
                let bytes = self.state_of(r).bytes();
                let id = self.buffer(
                    format!("v{}_topk", r.0),
                    DType::I32,
                    [1, bytes.div_ceil(4)],
                    bytes.next_multiple_of(16),
                );
                self.set(r, Place::Shared(id));
                inst.op.clone()
            }
            tile::Op::TopkPush { state, values, base } => {
                let values = self.stored(*values, true, out);
                let place = self.place(*state).clone();
                self.set(inst.results[0], place);
                scratch = self.topk_scratch(*state);
                tile::Op::TopkPush { state: *state, values, base: *base }
            }
            tile::Op::TopkTake { state } => {
                for &r in &inst.results {
                    let place = self.shared(r);
                    self.set(r, place);
                }
                scratch = self.topk_scratch(*state);
                inst.op.clone()
            }
            tile::Op::Store { view, index, value } => {
                let value = if self.is_line(*value) { self.readable(*value, out) } else { *value };
                tile::Op::Store { view: *view, index: index.clone(), value }
            }
            tile::Op::Scatter { .. } => self.with_readable(&inst.op, out),
        };
        if let Some(r) = result {
            self.defs.insert(r, op.clone());
        }
        out.push(Inst { results: inst.results.clone(), op: Op::Tile(op), scratch });
    }

    /// The selection that a value is a version of.
    fn state_of(&self, v: ValueId) -> topk::State {
        let mut ops = Vec::new();
        each(&self.program.body, &mut |inst| {
            if let tile::Op::TopkInit { .. } | tile::Op::TopkPush { .. } | tile::Op::TopkTake { .. } = &inst.op {
                ops.push((inst.results[0], &inst.op));
            }
        });
        topk::State::of(&self.types[v.0 as usize], &ops, &self.types)
    }

    fn topk_scratch(&mut self, v: ValueId) -> Option<BufferId> {
        let bytes = self.state_of(v).scratch_bytes(self.threads);
        self.scratch(bytes)
    }

    /// The op with fragments among its operands replaced by shared copies, except where it works on fragments itself.
    fn with_readable(&mut self, op: &tile::Op, out: &mut Vec<Inst>) -> tile::Op {
        let mut op = op.clone();
        match &mut op {
            tile::Op::Map { inputs, .. } => {
                // Arithmetic on a fragment stays there; other fragments of its inputs are read from memory.
                let shapes: Vec<Vec<u32>> = inputs.iter().map(|&i| self.tile(i).shape).collect();
                let wide = shapes.iter().map(|s| s.iter().product::<u32>()).max().unwrap_or(1);
                let is_whole = |s: &Vec<u32>| s.iter().product::<u32>() == wide;
                let mut fragments =
                    inputs.iter().zip(&shapes).filter(|(_, s)| is_whole(s)).map(|(&v, _)| self.place(v));
                let own = fragments.find(|p| matches!(p, Place::Fragment(_))).cloned();
                for i in 0..inputs.len() {
                    let whole = is_whole(&shapes[i]);
                    // A row's number is where its elements are.
                    if self.is_line(inputs[i]) && own.as_ref() == Some(self.place(inputs[i])) {
                        continue;
                    }
                    if !whole || wide == 1 {
                        inputs[i] = self.readable(inputs[i], out);
                    }
                }
            }
            tile::Op::Gather { rows, .. } => *rows = self.readable(*rows, out),
            tile::Op::Scatter { rows, value, .. } => {
                *rows = self.readable(*rows, out);
                *value = self.readable(*value, out);
            }
            tile::Op::Reshape { x, .. } | tile::Op::Permute { x, .. } | tile::Op::Slice { x, .. } => {
                *x = self.readable(*x, out);
            }
            tile::Op::Concat { xs, .. } => {
                for x in xs {
                    *x = self.readable(*x, out);
                }
            }
            _ => {}
        }
        op
    }

    /// Where the result of a load, a gather or a map goes.
    fn elementwise_place(&mut self, r: ValueId, op: &tile::Op) -> Place {
        let elements = self.tile(r).elements();
        if elements == 1 {
            return Place::Uniform;
        }
        if let tile::Op::Map { inputs, .. } = op {
            let fragment = inputs
                .iter()
                .find(|&&i| matches!(self.place(i), Place::Fragment(_)) && self.tile(i).elements() == elements);
            if let Some(&i) = fragment {
                return self.place(i).clone();
            }
            self.fragments.remove(&r);
        }
        // What is read must be what was there before later stores.
        let updated =
            matches!(op, tile::Op::Load { view, .. } | tile::Op::Gather { view, .. } if self.updated.contains(view));
        if updated || self.operands.contains_key(&r) {
            return self.shared(r);
        }
        let uses = self.uses.get(&r).copied().unwrap_or_default();
        let once = uses.count <= 1 && !uses.elsewhere && uses.reach <= 4 * elements;
        // Of a few conversions of loads, reading the bytes anew is less than putting them down for it.
        let near = self.sparing && uses.count <= 2 && !uses.elsewhere && uses.reach <= elements;
        let again = (self.lean || near) && self.can_read_again(op);
        if once || again || self.is_index_arithmetic(op) || self.lies_narrow(op) { Place::Lazy } else { self.shared(r) }
    }

    /// Whether an op only widens what lies in shared memory, where it is put now if it may be.
    fn lies_narrow(&mut self, op: &tile::Op) -> bool {
        let tile::Op::Map { inputs, body } = op else { return false };
        let (&[x], [MapInst { op: ScalarOp::Cast(DType::F32), .. }]) = (&inputs[..], &body.insts[..]) else {
            return false;
        };
        let made =
            matches!(self.defs.get(&x), Some(tile::Op::Load { .. } | tile::Op::Gather { .. } | tile::Op::Map { .. }));
        match self.place(x) {
            _ if !self.sparing || !matches!(self.tile(x).dtype, DType::Bf16 | DType::F16) => false,
            Place::Shared(_) => true,
            // Nothing but this reads it.
            Place::Lazy if made => {
                let place = self.shared(x);
                self.set(x, place);
                true
            }
            _ => false,
        }
    }

    /// A load, or conversions of loads: the bytes stay where they are, and are near after the first time.
    fn can_read_again(&self, op: &tile::Op) -> bool {
        match op {
            tile::Op::Load { .. } => true,
            tile::Op::Map { inputs, body } => {
                let lazy = |v: &ValueId| match (self.place(*v), self.defs.get(v)) {
                    (Place::Uniform, _) => true,
                    (Place::Lazy, Some(op)) => self.can_read_again(op),
                    _ => false,
                };
                body.insts.len() <= 2 && inputs.iter().all(lazy)
            }
            _ => false,
        }
    }

    /// Integer or boolean arithmetic on counters and single elements: cheaper to repeat than to keep.
    fn is_index_arithmetic(&self, op: &tile::Op) -> bool {
        let tile::Op::Map { inputs, body } = op else { return false };
        let cheap = |op: &ScalarOp| !matches!(op, ScalarOp::Exp2 | ScalarOp::Sqrt | ScalarOp::Cast(DType::E4m3));
        body.insts.len() <= 8
            && body.insts.iter().all(|i| cheap(&i.op))
            && inputs.iter().all(|&i| match self.place(i) {
                Place::Uniform => true,
                Place::Lazy => match self.defs.get(&i) {
                    Some(tile::Op::Full { .. } | tile::Op::Iota { .. }) => true,
                    Some(op) => self.is_index_arithmetic(op),
                    None => false,
                },
                _ => false,
            })
    }

    /// Where a value that a loop carries or a branch gives lies.
    fn result_place(&mut self, v: ValueId) -> Place {
        if self.is_state(v) {
            return Place::Lazy;
        }
        if self.tile(v).elements() == 1 {
            Place::Uniform
        } else if let Some(&of) = self.lines.get(&v) {
            self.fragment(of)
        } else if self.fragments.contains(&v) {
            self.fragment(v)
        } else {
            self.shared(v)
        }
    }

    fn for_loop(
        &mut self,
        inst: &tile::Inst,
        (lo, hi, step): (Index, Index, u32),
        init: &[ValueId],
        body: &Region,
        out: &mut Vec<Inst>,
    ) {
        let mut init = init.to_vec();
        let mut targets = Vec::new();
        self.set(body.args[0], Place::Uniform);
        for (i, first) in init.iter_mut().enumerate() {
            let (arg, result) = (body.args[i + 1], inst.results[i]);
            let place = match self.result_place(arg) {
                Place::Lazy => self.place(*first).clone(),
                place => place,
            };
            if place == Place::Uniform {
                *first = self.readable(*first, out);
            }
            // The initial value moves to where the loop keeps it.
            if let Place::Shared(_) = place
                && !self.is_state(arg)
            {
                let from = self.readable(*first, out);
                *first = self.copy(from, place.clone(), out);
            }
            self.set(arg, place.clone());
            self.set(result, place.clone());
            targets.push(place);
        }
        let mut body = self.region_into(body, &targets, false);
        // New values are complete before the first of the old ones is overwritten.
        for (i, target) in targets.iter().enumerate() {
            let v = body.yields[i];
            if matches!(target, Place::Shared(_))
                && !self.is_state(v)
                && targets.contains(self.place(v))
                && v != body.args[i + 1]
            {
                let copy = self.copy_elsewhere(v, &mut body.insts);
                body.yields[i] = copy;
            }
        }
        for (i, target) in targets.iter().enumerate() {
            let v = body.yields[i];
            if matches!(target, Place::Shared(_)) && !self.is_state(v) && v != body.args[i + 1] {
                body.yields[i] = self.copy(v, target.clone(), &mut body.insts);
            }
        }
        let results = inst.results.clone();
        out.push(Inst { results, op: Op::For { lo, hi, step, init, body }, scratch: None });
    }

    /// A shared copy in a buffer of its own.
    fn copy_elsewhere(&mut self, v: ValueId, out: &mut Vec<Inst>) -> ValueId {
        let place = self.shared(v);
        self.copy(v, place, out)
    }
}
