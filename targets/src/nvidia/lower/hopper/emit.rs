//! Scheduled kernels with roles to MLIR.
//!
//! Every block walks its tiles; each role runs its body once a tile, with its counters of the rings in registers from one to the next.
//! A stage of a ring has two barriers: `full`, on which the copies of a stage count their bytes, and `empty`, on which consumers
//! arrive: all threads where they read a stage themselves; else one thread of each warpgroup, where a product that read it or a barrier
//! has brought its warps together, or of each warp. Products stay in flight until something needs their end: [`super::wgmma`].

use super::begin::Begun;
use super::channels::{self, any, waits};
use super::constants::{self, Brings};
use super::fragment::Geometry;
use super::parts::Range;
use super::ptx;
use super::quads::Share;
use super::ring::Ring;
use super::select;
use super::stream::{self, Lists};
use super::sums::Sums;
use super::team;
use super::tensor_map::Maps;
use super::wgmma::Flight;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Fn, Ty, Val, i32, i64};
use crate::nvidia::lower::symbols_parameter;
use dsc_ir::Sym;
use dsc_ir::artifact::GpuKernel;
use dsc_ir::sched::verify::registers;
use dsc_ir::sched::{Atom, Block, BufferId, ChannelId, Fragment, Inst, Op, Place, Role, Scheduled};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{self, ValueId};
use std::collections::{HashMap, HashSet};

use super::config::WARPGROUP;

/// Warps of a warpgroup.
const GROUP_WARPS: u32 = WARPGROUP / Arch::WARP;
/// Nanoseconds between the starts of a role's warpgroups: about what a round of a large tile takes.
const APART_NS: u32 = 500;
/// Tiles of a block where they differ in their work: two, so that the copies of the second overlap the stores of the first.
const TURNS: u32 = 2;
/// Registers that values of a thread take at most where two blocks share a multiprocessor.
const FEW_REGISTERS: u32 = 80;
/// Registers that such a thread needs for addresses and the like.
const OTHER_REGISTERS: u32 = 43;
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
    /// Where the barriers lie at which the block's roles meet, if its team exchanges through memory.
    pub meeting: u32,
    /// Whether this block has a further tile, where its team exchanges through memory.
    pub more: Option<Val>,
    /// What this thread has put of its block's own pieces, by buffer.
    pub own_pieces: HashMap<BufferId, Vec<Val>>,
    /// Bytes from an address in this block's shared memory to the same place in those of the others of the cluster.
    pub peers: Vec<Val>,
    /// The tile's coordinates in the grid.
    pub block: [Val; 3],
    /// The block's range of the rounds of all tiles, where blocks divide these.
    pub range: Option<Range>,
    /// This thread's number in its role, or in its part of the role.
    pub role_tid: Val,
    /// This warp's.
    pub role_warp: Val,
    /// The part that this thread is in, where parts of a role take stages in turns.
    pub part: Val,
    /// Whether one thread runs the role.
    pub elected: bool,
    /// The barrier of this role's threads: its number, and how many they are.
    role_barrier: (u32, u32),
    /// Where the elements of this role's products lie.
    pub geometries: HashMap<(Fragment, [u32; 2]), Geometry>,
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
    /// This block's number among those of the launch that run this kernel, and how many they are; none if all do.
    pub share: Option<[Val; 2]>,
    /// Whether the block has threads that do not run it.
    pub fewer: bool,
    /// Whether the next launch starts no earlier than this one's work.
    pub late: bool,
    /// The role whose constants a thread brings before the launches before have ended.
    two_threads: Option<usize>,
    /// What of its role's copies the running thread makes.
    pub brings: Brings,
    /// The first round of the next loop that computes rows, if it is under way.
    pub begun: Option<Begun>,
    /// The last rows that lanes of quads got of four blocks of the team, each of one: from where, by fours, and whether of the own piece.
    pub rows_of_four: Option<((BufferId, u32, bool), Vec<Val>)>,
}

/// What of a schedule is not in the scheduled kernel.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Where symbols are read from ([`Threads::symbols`]).
    pub symbols: Ty,
    /// Blocks for which a multiprocessor has registers.
    pub sharing: u32,
    /// Whether the next launch starts no earlier than this one's work ([`Schedule::late`](dsc_ir::schedule::Schedule::late)).
    pub late: bool,
}

impl How {
    /// As a schedule says.
    pub fn of(schedule: &Schedule, symbols: Ty) -> How {
        How { symbols, sharing: schedule.sharing.max(1), late: schedule.late }
    }
}

/// MLIR of a scheduled kernel, and how to launch it.
///
/// # Errors
/// What of the kernel this lowering does not do.
pub fn lower(s: &Scheduled, arch: &Arch, how: How) -> Result<(String, GpuKernel), String> {
    // Results that matrix units made have no more bits than that; a division by IEEE's rules is a call an element.
    let arch = &Arch { exact_division: false, ..*arch };
    let How { symbols, sharing, .. } = how;
    let mut e = Emit::new(s, arch, how);
    let selects = select::is_selection(s);
    if selects {
        e.start();
        e.selection()
    } else {
        e.kernel()
    }?;
    let gpu = GpuKernel {
        threads: s.threads,
        shared_bytes: if selects { select::shared_bytes() } else { e.meeting + team::meeting_bytes(s) },
        cluster: if selects { s.team } else { e.cluster * if s.apart() { 1 } else { e.team } },
        team: if e.team > 1 { e.team } else { 0 },
        apart: s.apart(),
        persistent: s.persistent.is_some(),
        turns: if uneven(s) { TURNS } else { 0 },
        ranges: s.parts(),
        dependent: true,
        maps: e.maps.0.clone(),
        scratch_bytes: scratch_bytes(s),
        ..GpuKernel::default()
    };
    let sharing = occupancy(s, gpu.shared_bytes, arch, sharing);
    Ok((module(s, &gpu, symbols, sharing, e.t.f.text()), gpu))
}

/// Blocks for which a multiprocessor is to have registers: that many, or more if they fit by what they need of all else.
pub fn occupancy(s: &Scheduled, shared_bytes: u32, arch: &Arch, sharing: u32) -> u32 {
    // Where a second block of a contraction fits and accumulators are few, the assembler leaves it registers.
    let fits = |n: u32| n <= FEW_REGISTERS && n + OTHER_REGISTERS <= Arch::registers(2, s.threads);
    let few = s.channels.len() == 1 && registers(s).into_iter().max().is_some_and(fits);
    // So it does where sums are made while the next product is.
    let sums = |p: &Place| matches!(p, Place::Fragment(Fragment { atom: Atom::WgmmaSums, .. }));
    let still = s.roles.iter().all(|r| r.registers.is_none()) && scratch_bytes(s) == 0;
    let few = few || still && s.places.iter().any(sums);
    let fitting = arch.shared_per_sm / (shared_bytes + Arch::SHARED_RESERVED);
    if few { sharing.max(fitting.min(2)) } else { sharing }
}

/// Whether tiles of a contraction differ in their work, and each has much: the contraction is in a loop of its own, and large. Where blocks take
/// turns at that loop along an axis of the grid of their own, all have about as much.
pub fn uneven(s: &Scheduled) -> bool {
    let multiplies = |b: &Block| any(b, &|op| matches!(op, Op::Tile(tile::Op::Dot { .. })));
    let around = |b: &Block| b.insts.iter().any(|i| i.op.blocks().into_iter().any(multiplies));
    let moved = s.roles.iter().filter(|r| r.registers.is_some());
    s.grid.len() < 3
        && s.channels.len() == 1
        && moved.flat_map(|r| &r.body.insts).any(|i| i.op.blocks().into_iter().any(around))
}

/// Bytes of memory that a block has to itself: what it puts there for its team, or the lists of selections.
pub fn scratch_bytes(s: &Scheduled) -> u64 {
    if s.apart() {
        return team::outside_bytes(s);
    }
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
pub fn module(s: &Scheduled, gpu: &GpuKernel, symbols: Ty, sharing: u32, body: &str) -> String {
    let scratch = (gpu.scratch_bytes > 0).then(|| format!("%{}: !llvm.ptr<1>", s.params.len() + 1));
    let addresses = s.params.len() + 1 + usize::from(scratch.is_some());
    let pointers = (0..s.params.len()).map(|i| format!("%{i}: !llvm.ptr<1>"));
    let pointers = pointers.chain([symbols_parameter(s.params.len(), symbols)]).chain(scratch);
    // Without grid_constant the map would be copied to the stack, where the copy engine cannot read it.
    let map = "!llvm.ptr {llvm.byval = !llvm.array<128 x i8>, llvm.align = 64 : i64, nvvm.grid_constant}";
    let maps = (0..gpu.maps.len()).map(|i| format!("%{}: {map}", addresses + i));
    let params: Vec<String> = pointers.chain(maps).collect();
    // A selection's cluster is always launched as one: no block has to ask what a barrier of it means.
    let cluster = gpu.cluster > 1 && select::is_selection(s);
    let cluster = if cluster { ", nvvm.cluster_dim = array<i32: 0, 0, 0>" } else { "" };
    format!(
        "module {{\n  llvm.mlir.global external @shared() {{addr_space = 3 : i32, alignment = {ALIGN} : i64}} : !llvm.array<0 x i8>\n  \
         llvm.func @{}({}) attributes {{nvvm.kernel, nvvm.reqntid = array<i32: {}, 1, 1>, nvvm.minctasm = {sharing} : i32{cluster}}} {{\n{body}    \
         llvm.return\n  }}\n}}\n",
        s.name,
        params.join(", "),
        gpu.threads
    )
}

impl<'a> Emit<'a> {
    /// A kernel at its start.
    pub fn new(s: &'a Scheduled, arch: &'a Arch, how: How) -> Emit<'a> {
        Emit::within(Fn::default(), s, arch, how)
    }

    /// A kernel of some blocks of a launch, which goes on in that function: this block's number among them and how many they are, and whether
    /// blocks have further threads.
    pub fn of_share(f: Fn, s: &'a Scheduled, arch: &'a Arch, how: How, share: [Val; 2], fewer: bool) -> Emit<'a> {
        Emit { share: Some(share), fewer, ..Emit::within(f, s, arch, how) }
    }

    fn within(f: Fn, s: &'a Scheduled, arch: &'a Arch, how: How) -> Emit<'a> {
        let mut t = Threads::new(f, arch, s.threads);
        t.symbols = how.symbols;
        let data = s.buffers.iter().map(|b| b.offset + b.bytes()).max().unwrap_or(0).next_multiple_of(8);
        let (rings, meeting) = channels::rings(s, data);
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
            meeting,
            more: None,
            own_pieces: HashMap::new(),
            peers: Vec::new(),
            block: [i32(0); 3],
            range: None,
            role_tid: i32(0),
            role_warp: i32(0),
            part: i32(0),
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
            sharing: how.sharing,
            share: None,
            fewer: false,
            late: how.late,
            two_threads: constants::of_two_threads(s, &how),
            brings: Brings::All,
            begun: None,
            rows_of_four: None,
            spare: Vec::new(),
            never: i32(0),
            settled: None,
            shares: HashMap::new(),
            anchors: HashMap::new(),
            shared_out: HashMap::new(),
        };
        s.roles.iter().map(|r| &r.body).chain([&s.common]).for_each(|b| define(b, &mut e.defs));
        e
    }

    /// All of it, from its barriers on.
    pub fn kernel(&mut self) -> Result<(), String> {
        if !self.s.common.insts.is_empty() {
            return Err("instructions before the roles".into());
        }
        let warp = ptx::uniform(&mut self.t.f, self.t.warp);
        self.t.warp = warp;
        if self.s.apart() {
            self.begin_apart();
        } else if self.cluster * self.team > 1 {
            self.rank = isa::sreg(&mut self.t.f, "cluster.ctarank");
            if self.team > 1 {
                let rank = self.rank;
                (self.rank, self.member) = (self.t.f.rem(rank, self.cluster), self.t.f.div(rank, self.cluster));
            }
        }
        self.fetch_maps()?;
        self.init_barriers();
        self.start();
        self.find_range()?;
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
            let two = self.two_threads == Some(number);
            if self.two_threads.is_some() && !two {
                isa::await_launches(&mut self.t.f);
            }
            self.role(role, two)?;
            self.t.f.br(end, &[]);
            self.t.f.start(next, &[]);
        }
        self.t.f.br(end, &[]);
        self.t.f.start(end, &[]);
        if self.cluster > 1 && (self.team == 1 || self.s.apart()) {
            // Another block may still fill this one's memory, or arrive on its barriers.
            ptx::cluster_barrier(&mut self.t.f);
        }
        Ok(())
    }

    /// What every thread begins with: the launches before, unless roles wait for them, and the values of the symbols.
    pub fn start(&mut self) {
        match self.two_threads {
            Some(_) => isa::launch_next(&mut self.t.f),
            None => isa::launch_wait(&mut self.t.f, self.late),
        }
        let syms = Val::Arg(self.s.params.len() as u32, self.t.symbols);
        for sym in Sym::ALL {
            let at = self.t.f.offset(syms, i64(4 * sym as i64));
            self.syms[sym as usize] = self.t.f.load(at, Ty::I32, 1)[0];
        }
    }

    /// One role: its registers, then its body for every tile of this block; of one thread, or of two that bring different things.
    fn role(&mut self, role: &'a Role, two: bool) -> Result<(), String> {
        self.begin_role(role)?;
        let even = self.s.threads / Arch::WARP;
        if let Some(registers) = role.registers {
            // What a thread has at the start follows from the block's size.
            let at_start = Arch::REGISTERS_PER_SM / (even * Arch::WARP);
            let kind = if registers < at_start { "dec" } else { "inc" };
            ptx::set_registers(&mut self.t.f, kind, registers);
        }
        self.role_tid = self.t.f.sub(self.t.tid, i32((role.warps[0] * Arch::WARP).into()));
        self.role_warp = self.t.f.sub(self.t.warp, i32(role.warps[0].into()));
        self.take_turns(role);
        if role.registers.is_some() && self.s.turns(role) == 1 && adds_apart(&role.body, false) {
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
        let threads: &[Brings] = if two { &[Brings::Rest, Brings::Constants] } else { &[Brings::All] };
        for (number, &brings) in (role.warps[0]..).zip(threads) {
            self.begin_role(role)?;
            self.brings = brings;
            self.one_thread(role, number)?;
        }
        self.brings = Brings::All;
        Ok(())
    }

    /// A role's body as one thread of that warp runs it.
    fn one_thread(&mut self, role: &'a Role, number: u32) -> Result<(), String> {
        let (first, chosen, out) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        let warp = self.t.warp;
        let is_first = self.t.f.cmp("eq", warp, i32(number.into()));
        self.t.f.cond_br(is_first, (first, &[]), (out, &[]));
        self.t.f.start(first, &[]);
        let one = ptx::elect(&mut self.t.f);
        self.t.f.cond_br(one, (chosen, &[]), (out, &[]));
        self.t.f.start(chosen, &[]);
        if self.brings == Brings::Rest {
            isa::await_launches(&mut self.t.f);
        }
        self.tiles(&role.body)?;
        self.t.f.br(out, &[]);
        self.t.f.start(out, &[]);
        Ok(())
    }

    /// Forgets what the roles before have computed.
    fn begin_role(&mut self, role: &'a Role) -> Result<(), String> {
        self.held.clear();
        self.descriptors.clear();
        self.lefts.clear();
        self.geometries.clear();
        self.sources.clear();
        self.stores_boxes = false;
        self.numbers.clear();
        self.flight = Flight::default();
        self.rings.iter_mut().for_each(|r| r.restart(None));
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

    /// Runs a block's instructions.
    pub fn block(&mut self, block: &'a Block) -> Result<(), String> {
        let fills = |i: &Inst| matches!(i.op, Op::Acquire(_));
        let first = block.insts.iter().position(fills);
        let begun = self.begin_rows(block)?;
        for (i, inst) in block.insts.iter().enumerate() {
            if inst.results.first().is_some_and(|r| begun.contains(r)) {
                continue;
            }
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
            Op::Part { lo, hi, end } => {
                let at = self.part(*lo, *hi, *end)?;
                self.held.insert(inst.results[0], Held::Scalar(at));
                Ok(())
            }
            Op::Meet => self.meet(),
            Op::Put { buffer, value } => self.put_part(*buffer, *value),
            Op::Get { buffer, after, own } => self.get_part(inst.results[0], *buffer, *after, *own),
            Op::If { .. } => Err("branches inside roles".into()),
        }
    }

    /// Whether the role has the block's first thread.
    pub fn first_role(&self) -> bool {
        self.role_barrier.0 <= 1
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
}

/// Whether loops make partial sums that are added apart from their products.
fn adds_apart(block: &Block, in_loop: bool) -> bool {
    let starts = |op: &Op| in_loop && matches!(op, Op::Tile(tile::Op::Dot { acc: None, .. }));
    block.insts.iter().any(|i| starts(&i.op) || i.op.blocks().into_iter().any(|b| adds_apart(b, true)))
}
