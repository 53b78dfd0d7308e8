//! Scheduled kernels with roles to MLIR.
//!
//! Every block walks its tiles; each role runs its body once a tile, with its counters of the rings in registers from one to the next.
//! A stage of a ring has two barriers: `full`, on which the copies of a stage count their bytes, and `empty`, on which consumers
//! arrive: all threads where they read a stage themselves; else one thread of each warpgroup, where a product that read it or a barrier
//! has brought its warps together, or of each warp. Products stay in flight until something needs their end: [`super::wgmma`].

use super::fragment::{Geometry, Register, varies};
use super::ptx;
use super::quads::Share;
use super::ring::{Delivery, Ring, share_phases};
use super::select;
use super::stream::{self, Lists};
use super::sums::Sums;
use super::tensor_map::Maps;
use super::wgmma::Flight;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::mlir::{Fn, Ty, Val, i32, i64};
use crate::nvidia::lower::symbols_parameter;
use crate::nvidia::lower::{arith, isa};
use dsc_ir::Sym;
use dsc_ir::artifact::GpuKernel;
use dsc_ir::sched::verify::registers;
use dsc_ir::sched::{Atom, Block, BufferId, ChannelId, Fragment, Inst, Op, Place, Role, Scheduled};
use dsc_ir::tile::{self, Index, MapArg, Type, ValueId};
use std::collections::{HashMap, HashSet};

use super::config::{MANY_REGISTERS, WARPGROUP};

/// Warps of a warpgroup.
const GROUP_WARPS: u32 = WARPGROUP / Arch::WARP;
/// Nanoseconds between the starts of a role's warpgroups: about what a round of a large tile takes.
const APART_NS: u32 = 500;
/// Tiles of a block where they differ in their work: two, so that the copies of the second overlap the stores of the first.
const TURNS: u32 = 2;
/// Registers that values of a thread take at most where two blocks share a multiprocessor.
const FEW_REGISTERS: u32 = 80;
/// Registers that such a thread has with addresses and the like.
const ALL_REGISTERS: u32 = 128;
/// Bytes to which operands of products are aligned.
const ALIGN: u32 = 1024;

/// A value as the running thread has it.
#[derive(Clone, Debug)]
pub enum Held {
    /// The same everywhere.
    Scalar(Val),
    /// Registers of a fragment, of a tile that varies along rows, along columns.
    Registers(Vec<Val>, [bool; 2]),
    /// A row whose columns are spread over the lanes of each warp: lane `l` has columns `l`, `l + 32`, and so on.
    Lanes(Vec<Val>),
    /// A 16-bit tile as the left operand of a product that comes from registers: two neighbours a word, in order of their registers.
    Packed(Vec<Val>),
    /// A buffer's copy of that number.
    Stage(BufferId, Val),
    /// This thread's part of a tile of sums.
    Sums(Vec<Val>),
    /// Registers in which that lane of each quad has the elements, of a tile that varies along rows, along columns.
    Shared(Vec<Val>, [bool; 2], u32),
}

/// Elements of a vector whose largest every thread finds for itself.
const EACH_BY_ITSELF: u32 = 16;

/// A kernel being written.
pub struct Emit<'a> {
    /// Threads and the function.
    pub t: Threads<'a>,
    /// The kernel.
    pub s: &'a Scheduled,
    /// What defines each value.
    pub defs: HashMap<ValueId, &'a Inst>,
    /// What this role has computed.
    pub held: HashMap<ValueId, Held>,
    /// Tensor maps used so far.
    pub maps: Maps,
    /// This role's counters, by channel.
    pub rings: Vec<Ring>,
    /// Parities of the rounds of many rings, a bit each.
    pub phases: Val,
    /// Products in flight.
    pub flight: Flight,
    /// Starts of whole buffers in descriptors, by buffer and whether it is the instruction's second operand.
    pub descriptors: HashMap<(BufferId, bool), Val>,
    /// Left operands of products that come from registers.
    pub lefts: HashSet<ValueId>,
    /// Values of the symbols.
    pub syms: [Val; 6],
    /// Blocks that run together; 1 if each is by itself.
    pub cluster: u32,
    /// Blocks that run one tile together.
    pub team: u32,
    /// This block's number among those of its cluster that share copies.
    pub rank: Val,
    /// This block's number in its team.
    pub member: Val,
    /// How often this tile's code has met the team's other blocks.
    pub met: usize,
    /// Bytes from an address in this block's shared memory to the same place in those of the others of the cluster.
    pub peers: Vec<Val>,
    /// The tile's coordinates in the grid.
    pub block: [Val; 3],
    /// This thread's number in its role.
    pub role_tid: Val,
    /// This warp's.
    pub role_warp: Val,
    /// Whether one thread runs the role.
    pub elected: bool,
    /// The barrier of this role's threads: its number, and how many they are.
    role_barrier: (u32, u32),
    geometries: HashMap<(Fragment, [u32; 2]), Geometry>,
    /// Whether the role has the copy engine store results.
    pub stores_boxes: bool,
    /// Addresses of gathered rows that this thread brings, and whether there is such a row.
    pub sources: HashMap<(ValueId, ValueId), Vec<(Val, Val)>>,
    /// Channels that this role both fills and empties: their counter moves when a stage is waited for.
    pub own: Vec<ChannelId>,
    /// Whether products may read what threads wrote, without a fence since.
    pub unfenced: bool,
    /// In how many accumulators products in flight are made, whose sum they are.
    pub split: HashMap<ValueId, usize>,
    /// All but the first of those, as they are now.
    pub others: HashMap<ValueId, Vec<Vec<Val>>>,
    /// Registers of partial sums that have been added.
    pub spare: Vec<Vec<Val>>,
    /// Zero, which the assembler does not know.
    pub never: Val,
    /// An element of the product that ended last in this stretch of code.
    pub settled: Option<Val>,
    /// Loads that lanes of a quad share out.
    pub shares: HashMap<ValueId, Share>,
    /// Where those loads start in the loop at hand, by the first of them.
    pub anchors: HashMap<ValueId, Val>,
    /// What was loaded for several, by the first of them.
    pub shared_out: HashMap<ValueId, Vec<Val>>,
    /// Numbers of those rows, by the first of the rows that threads bring together.
    pub numbers: HashMap<(ValueId, u32), Val>,
    /// Which sums over groups of rows the running thread has.
    pub sums: Option<Sums>,
    /// The selections that the running thread's group keeps.
    pub lists: Option<Lists>,
    /// Blocks for which a multiprocessor has registers.
    pub sharing: u32,
}

/// MLIR of a scheduled kernel, and how to launch it. `symbols` is where they are read from ([`Threads::symbols`]); a multiprocessor has registers
/// for `sharing` blocks.
///
/// # Errors
/// What of the kernel this lowering does not do.
pub fn lower(s: &Scheduled, arch: &Arch, symbols: Ty, sharing: u32) -> Result<(String, GpuKernel), String> {
    // Results that matrix units made have no more bits than that; a division by IEEE's rules is a call an element.
    let arch = &Arch { exact_division: false, ..*arch };
    let mut t = Threads::new(Fn::default(), arch, s.threads);
    t.symbols = symbols;
    let data = s.buffers.iter().map(|b| b.offset + b.bytes()).max().unwrap_or(0).next_multiple_of(8);
    let mut barriers = data;
    let mut rings = Vec::new();
    for channel in &s.channels {
        let number = ChannelId(rings.len() as u32);
        // Threads that read a slot themselves give it back themselves.
        let all_arrive = channel.slots.iter().any(|b| s.buffers[b.0 as usize].swizzle == 0);
        let mut ring = Ring::new(channel.stages, barriers, delivery(s, number), all_arrive);
        ring.warps_arrive = s.roles.iter().any(|r| gives_back_apart(&r.body, number));
        ring.shared = s.roles.iter().any(|r| any(&r.body, &|op| is_shared(op, number)));
        rings.push(ring);
        barriers += 2 * 8 * channel.stages;
    }
    share_phases(s, &mut rings);
    let mut e = Emit {
        t,
        s,
        defs: HashMap::new(),
        held: HashMap::new(),
        maps: Maps::default(),
        rings,
        phases: i32(0),
        flight: Flight::default(),
        descriptors: HashMap::new(),
        lefts: HashSet::new(),
        syms: [i32(0); 6],
        cluster: s.cluster.map_or(1, |c| c.blocks),
        team: if s.roles.is_empty() { 1 } else { s.team.max(1) },
        rank: i32(0),
        member: i32(0),
        met: 0,
        peers: Vec::new(),
        block: [i32(0); 3],
        role_tid: i32(0),
        role_warp: i32(0),
        elected: false,
        role_barrier: (0, s.threads),
        geometries: HashMap::new(),
        stores_boxes: false,
        sources: HashMap::new(),
        numbers: HashMap::new(),
        own: Vec::new(),
        unfenced: false,
        split: HashMap::new(),
        others: HashMap::new(),
        sums: None,
        lists: None,
        sharing,
        spare: Vec::new(),
        never: i32(0),
        settled: None,
        shares: HashMap::new(),
        anchors: HashMap::new(),
        shared_out: HashMap::new(),
    };
    s.roles.iter().map(|r| &r.body).chain([&s.common]).for_each(|b| define(b, &mut e.defs));
    let selects = select::is_selection(s);
    if selects {
        e.start();
        e.selection()
    } else {
        e.kernel()
    }?;
    let gpu = GpuKernel {
        threads: s.threads,
        shared_bytes: if selects { select::shared_bytes() } else { barriers },
        cluster: if selects { s.team } else { e.cluster * e.team },
        team: if e.team > 1 { e.team } else { 0 },
        persistent: s.persistent.is_some(),
        turns: if uneven(s) { TURNS } else { 0 },
        dependent: true,
        maps: e.maps.0.clone(),
        scratch_bytes: scratch_bytes(s),
        ..GpuKernel::default()
    };
    // Where a second block of a contraction fits and accumulators are few, the assembler leaves it registers.
    let fits = |n: u32| n <= FEW_REGISTERS && Arch::REGISTERS_PER_SM / (2 * s.threads) >= ALL_REGISTERS;
    let few = s.channels.len() == 1 && registers(s).into_iter().max().is_some_and(fits);
    let fitting = arch.shared_per_sm / (gpu.shared_bytes + Arch::SHARED_RESERVED);
    let sharing = if few { sharing.max(fitting.min(2)) } else { sharing };
    Ok((module(s, &gpu, symbols, sharing, e.t.f.text()), gpu))
}

/// Whether tiles of a contraction differ in their work, and each has much: the contraction is in a loop of its own, and large.
fn uneven(s: &Scheduled) -> bool {
    let multiplies = |b: &Block| any(b, &|op| matches!(op, Op::Tile(tile::Op::Dot { .. })));
    let around = |b: &Block| b.insts.iter().any(|i| i.op.blocks().into_iter().any(multiplies));
    let moved = s.roles.iter().filter(|r| r.registers.is_some());
    s.channels.len() == 1 && moved.flat_map(|r| &r.body.insts).any(|i| i.op.blocks().into_iter().any(around))
}

/// Bytes of memory that a block has to itself: the lists of selections.
pub fn scratch_bytes(s: &Scheduled) -> u64 {
    let begun = |i: &Inst| match i.op {
        Op::Tile(tile::Op::TopkInit { rows, .. }) if !s.roles.is_empty() => Some(stream::scratch_bytes(rows)),
        _ => None,
    };
    s.roles.iter().flat_map(|r| &r.body.insts).find_map(begun).unwrap_or(0)
}

fn define<'a>(block: &'a Block, into: &mut HashMap<ValueId, &'a Inst>) {
    for inst in &block.insts {
        into.extend(inst.results.iter().map(|&r| (r, inst)));
        inst.op.blocks().into_iter().for_each(|b| define(b, into));
    }
}

/// The module around a body.
fn module(s: &Scheduled, gpu: &GpuKernel, symbols: Ty, sharing: u32, body: &str) -> String {
    let scratch = (gpu.scratch_bytes > 0).then(|| format!("%{}: !llvm.ptr<1>", s.params.len() + 1));
    let addresses = s.params.len() + 1 + usize::from(scratch.is_some());
    let pointers = (0..s.params.len()).map(|i| format!("%{i}: !llvm.ptr<1>"));
    let pointers = pointers.chain([symbols_parameter(s.params.len(), symbols)]).chain(scratch);
    // Without grid_constant the map would be copied to the stack, where the copy engine cannot read it.
    let map = "!llvm.ptr {llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant}";
    let maps = (0..gpu.maps.len()).map(|i| format!("%{}: {map}", addresses + i));
    let params: Vec<String> = pointers.chain(maps).collect();
    format!(
        "module {{\n  llvm.mlir.global external @shared() {{addr_space = 3 : i32, alignment = {ALIGN} : i64}} : !llvm.array<0 x i8>\n  \
         llvm.func @{}({}) attributes {{nvvm.kernel, nvvm.reqntid = array<i32: {}, 1, 1>, nvvm.minctasm = {sharing} : i32}} {{\n{body}    \
         llvm.return\n  }}\n}}\n",
        s.name,
        params.join(", "),
        gpu.threads
    )
}

impl<'a> Emit<'a> {
    fn kernel(&mut self) -> Result<(), String> {
        if !self.s.common.insts.is_empty() {
            return Err("instructions before the roles".into());
        }
        let warp = ptx::uniform(&mut self.t.f, self.t.warp);
        self.t.warp = warp;
        if self.cluster * self.team > 1 {
            self.rank = isa::sreg(&mut self.t.f, "cluster.ctarank");
            if self.team > 1 {
                let rank = self.rank;
                (self.rank, self.member) = (self.t.f.rem(rank, self.cluster), self.t.f.div(rank, self.cluster));
            }
        }
        self.fetch_maps()?;
        self.init_barriers();
        self.start();
        let sign = self.t.f.bin("lshr", self.syms[0], i32(31));
        self.never = ptx::uniform(&mut self.t.f, sign);
        let end = self.t.f.label();
        let s = self.s;
        for (number, role) in s.roles.iter().enumerate() {
            // Barrier 0 is the whole block's.
            self.role_barrier = (number as u32 + 1, (role.warps[1] - role.warps[0]) * Arch::WARP);
            let (body, next) = (self.t.f.label(), self.t.f.label());
            let first = self.t.f.cmp("uge", warp, i32(role.warps[0].into()));
            let last = self.t.f.cmp("ult", warp, i32(role.warps[1].into()));
            let mine = self.t.f.bin("and", first, last);
            self.t.f.cond_br(mine, (body, &[]), (next, &[]));
            self.t.f.start(body, &[]);
            self.role(role)?;
            self.t.f.br(end, &[]);
            self.t.f.start(next, &[]);
        }
        self.t.f.br(end, &[]);
        self.t.f.start(end, &[]);
        if self.cluster > 1 && self.team == 1 {
            // Another block may still fill this one's memory, or arrive on its barriers.
            ptx::cluster_barrier(&mut self.t.f);
        }
        Ok(())
    }

    /// What every thread begins with: the launches before, and the values of the symbols.
    fn start(&mut self) {
        isa::launch_wait(&mut self.t.f);
        let syms = Val::Arg(self.s.params.len() as u32, self.t.symbols);
        for sym in Sym::ALL {
            let at = self.t.f.offset(syms, i64(4 * sym as i64));
            self.syms[sym as usize] = self.t.f.load(at, Ty::I32, 1)[0];
        }
    }

    fn init_barriers(&mut self) {
        let cluster = self.cluster;
        let tid = self.t.tid;
        let one = self.t.f.cmp("eq", tid, i32(0));
        let (s, rings): (&Scheduled, Vec<Ring>) = (self.s, self.rings.clone());
        self.t.when(one, |t| {
            for (number, ring) in rings.iter().enumerate() {
                let consumers = s.roles.iter().filter(|r| waits(&r.body, ChannelId(number as u32)));
                let consumers: u32 =
                    consumers.map(|r| if ring.all_arrive { threads(r) } else { threads(r) / ring.arriving() }).sum();
                // A stage that others fill too is free when it is free in all of them.
                let consumers = if ring.shared { consumers * cluster } else { consumers };
                for stage in 0..ring.stages {
                    let full = t.f.add(t.shared32, i32((ring.barriers + 8 * stage).into()));
                    ptx::barrier_init(&mut t.f, full, ring.delivery.arrivals());
                    let empty = t.f.add(t.shared32, i32((ring.barriers + 8 * (ring.stages + stage)).into()));
                    ptx::barrier_init(&mut t.f, empty, consumers);
                }
            }
            ptx::barrier_init_fence(&mut t.f);
        });
        self.t.barrier();
        if self.cluster > 1 {
            ptx::cluster_barrier(&mut self.t.f);
        }
    }

    /// One role: its registers, then its body for every tile of this block.
    fn role(&mut self, role: &'a Role) -> Result<(), String> {
        self.held.clear();
        self.descriptors.clear();
        self.lefts.clear();
        self.geometries.clear();
        self.sources.clear();
        self.stores_boxes = false;
        self.numbers.clear();
        self.flight = Flight::default();
        self.rings.iter_mut().for_each(Ring::restart);
        self.phases = i32(0);
        self.elected = role.elected;
        self.own.clear();
        self.split.clear();
        self.others.clear();
        self.shares.clear();
        self.anchors.clear();
        self.spare.clear();
        self.shared_out.clear();
        self.settled = None;
        self.unfenced = false;
        self.met = 0;
        for (number, channel) in self.s.channels.iter().enumerate() {
            let number = ChannelId(number as u32);
            let fills = any(&role.body, &|op| matches!(op, Op::Acquire(c) if *c == number));
            if fills && waits(&role.body, number) {
                if channel.stages > 1 {
                    return Err(format!("a role that fills and empties several stages of {}", channel.name));
                }
                self.own.push(number);
            }
        }
        let even = self.s.threads / Arch::WARP;
        if let Some(registers) = role.registers {
            // What a thread has at the start follows from the block's size.
            let at_start = Arch::REGISTERS_PER_SM / (even * Arch::WARP);
            let kind = if registers < at_start { "dec" } else { "inc" };
            ptx::set_registers(&mut self.t.f, kind, registers);
        }
        self.role_tid = self.t.f.sub(self.t.tid, i32((role.warps[0] * Arch::WARP).into()));
        self.role_warp = self.t.f.sub(self.t.warp, i32(role.warps[0].into()));
        if role.registers.is_some() && adds_apart(&role.body, false) {
            // Warpgroups that run in step would all add at once, and none would multiply.
            let late = self.t.f.cmp("uge", self.role_warp, i32(GROUP_WARPS.into()));
            self.t.when(late, |t| ptx::sleep(&mut t.f, APART_NS));
        }
        if !role.elected {
            (self.sums, self.lists) = (None, None);
            self.prepare_sums(&role.body);
            self.prepare(&role.body)?;
            self.tiles(&role.body)?;
            self.end_stores();
            return Ok(());
        }
        let (first, chosen, out) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        let warp = self.t.warp;
        let is_first = self.t.f.cmp("eq", warp, i32(role.warps[0].into()));
        self.t.f.cond_br(is_first, (first, &[]), (out, &[]));
        self.t.f.start(first, &[]);
        let one = ptx::elect(&mut self.t.f);
        self.t.f.cond_br(one, (chosen, &[]), (out, &[]));
        self.t.f.start(chosen, &[]);
        self.tiles(&role.body)?;
        self.t.f.br(out, &[]);
        self.t.f.start(out, &[]);
        Ok(())
    }

    /// What a role needs in every tile, computed once: where its elements lie, and descriptors of operands.
    fn prepare(&mut self, block: &'a Block) -> Result<(), String> {
        self.split_chains(block)?;
        self.share_loads(block);
        for inst in &block.insts {
            if let Op::Tile(tile::Op::Dot { a, b, trans_b, .. }) = &inst.op {
                let geometry = self.geometry(inst.results[0])?;
                if matches!(self.s.places[a.0 as usize], Place::Fragment(_)) {
                    self.lefts.insert(*a);
                }
                self.prepare_descriptors(geometry, [*a, *b], *trans_b)?;
            }
            for inner in inst.op.blocks() {
                self.prepare(inner)?;
            }
        }
        Ok(())
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

    /// Runs a block's instructions.
    pub fn block(&mut self, block: &'a Block) -> Result<(), String> {
        let fills = |i: &Inst| matches!(i.op, Op::Acquire(_));
        let first = block.insts.iter().position(fills);
        for (i, inst) in block.insts.iter().enumerate() {
            if first == Some(i) {
                // Numbers of rows are on their way while stages are not free yet.
                self.numbers.clear();
                self.prepare_rows(block, true)?;
            }
            self.inst(inst)?;
        }
        Ok(())
    }

    pub fn inst(&mut self, inst: &'a Inst) -> Result<(), String> {
        match &inst.op {
            Op::For { lo, hi, step, init, body } => self.for_loop(inst, (*lo, *hi, *step), init, body),
            Op::Acquire(c) => self.acquire(*c),
            Op::Copy { channel, slot, view, rows: None, index, shape, shared } => {
                self.copy((*channel, *slot), *view, index, shape, *shared)
            }
            Op::Copy { channel, slot, view, rows: Some(rows), index, .. } => {
                self.gather_rows(*channel, *slot, *view, *rows, index)
            }
            Op::Fill { shared: true, .. } => {
                Err("a tile that blocks share is computed in no loop over gathered rows".into())
            }
            Op::Fill { channel, slot, value, .. } => self.fill(*channel, *slot, *value),
            Op::Commit(c) => self.commit(*c),
            Op::Wait(c) => self.wait(*c),
            Op::Take { channel, slot } => self.take(*channel, *slot, inst.results[0]),
            Op::Release { channel, lag } => self.release(*channel, *lag),
            Op::Tile(op) => self.tile_op(inst, op),
            Op::Barrier => {
                self.role_waits();
                Ok(())
            }
            Op::Number => {
                self.held.insert(inst.results[0], Held::Scalar(self.member));
                Ok(())
            }
            Op::Meet => self.meet(),
            Op::Put { buffer, value } => self.put_part(*buffer, *value),
            Op::Get { buffer, after, own } => self.get_part(inst.results[0], *buffer, *after, *own),
            Op::If { .. } => Err("branches inside roles".into()),
        }
    }

    /// Threads of the role.
    pub fn role_barrier_threads(&self) -> u32 {
        self.role_barrier.1
    }

    /// All threads of the role wait for one another.
    pub fn role_waits(&mut self) {
        let (id, threads) = self.role_barrier;
        isa::named_barrier(&mut self.t.f, id, threads);
    }

    /// All threads of the warpgroup wait for one another.
    pub fn group_waits(&mut self) {
        // Behind the barriers of the roles, which have one each.
        let first = self.s.roles.len() as u32 + 1;
        let group = self.t.f.div(self.role_tid, WARPGROUP);
        let id = self.t.f.add(group, i32(first.into()));
        ptx::barrier_of(&mut self.t.f, id, WARPGROUP);
    }

    fn tile_op(&mut self, inst: &'a Inst, op: &'a tile::Op) -> Result<(), String> {
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

/// Whether an operation like that is in a block.
fn any(block: &Block, is: &dyn std::ops::Fn(&Op) -> bool) -> bool {
    block.insts.iter().any(|i| is(&i.op) || i.op.blocks().into_iter().any(|b| any(b, is)))
}

/// Whether loops make partial sums that are added apart from their products.
fn adds_apart(block: &Block, in_loop: bool) -> bool {
    let starts = |op: &Op| in_loop && matches!(op, Op::Tile(tile::Op::Dot { acc: None, .. }));
    block.insts.iter().any(|i| starts(&i.op) || i.op.blocks().into_iter().any(|b| adds_apart(b, true)))
}

/// Whether a block waits for stages of a channel.
fn waits(block: &Block, number: ChannelId) -> bool {
    any(block, &|op| matches!(op, Op::Wait(c) if *c == number))
}

/// Whether a block gives back stages of a channel though nothing has brought the warps together since it waited for them: a product of its
/// own that reads what it took (those in loops may have no round), or a barrier.
fn gives_back_apart(block: &Block, number: ChannelId) -> bool {
    let (mut waited, mut together, mut taken) = (false, true, Vec::new());
    for inst in &block.insts {
        match &inst.op {
            Op::Wait(c) if *c == number => (waited, together) = (true, false),
            Op::Take { channel, .. } if *channel == number => taken.extend(inst.results.iter().copied()),
            Op::Barrier => together = true,
            Op::Tile(tile::Op::Dot { a, b, .. }) if taken.contains(a) || taken.contains(b) => together = true,
            Op::Release { channel, .. } if *channel == number && waited && !together => return true,
            _ => {}
        }
    }
    block.insts.iter().any(|i| i.op.blocks().into_iter().any(|b| gives_back_apart(b, number)))
}

/// How stages of a channel become full.
fn delivery(s: &Scheduled, number: ChannelId) -> Delivery {
    for role in &s.roles {
        if any(&role.body, &|op| matches!(op, Op::Fill { channel, .. } if *channel == number)) {
            return Delivery::Written(threads(role));
        }
        if any(&role.body, &|op| matches!(op, Op::Copy { channel, rows: Some(_), .. } if *channel == number)) {
            let engine =
                any(&role.body, &|op| matches!(op, Op::Copy { channel, rows: None, .. } if *channel == number));
            return if engine { Delivery::Both(threads(role)) } else { Delivery::Gathered(threads(role)) };
        }
    }
    Delivery::Engine
}

/// Whether an operation brings to all blocks of a cluster what goes through a channel.
fn is_shared(op: &Op, number: ChannelId) -> bool {
    matches!(op, Op::Copy { channel, shared: true, .. } | Op::Fill { channel, shared: true, .. } if *channel == number)
}

/// Threads of a role.
fn threads(role: &Role) -> u32 {
    (role.warps[1] - role.warps[0]) * Arch::WARP
}
