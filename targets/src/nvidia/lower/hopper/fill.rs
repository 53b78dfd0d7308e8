//! Tiles that a role writes into a stage: what products left in registers, or keys computed from gathered rows.

use super::begin::Begun;
use super::emit::{Emit, Held};
use super::fragment::{Geometry, Register};
use super::ptx;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use crate::nvidia::lower::{arith, isa};
use dsc_ir::DType;
use dsc_ir::sched::{Block, Buffer, ChannelId, Inst, Op};
use dsc_ir::tile::{self, Index, MapArg, MapFn, ScalarOp, ValueId};
use std::collections::HashMap;

/// Threads that bring or compute a row together.
pub const ROW_THREADS: u32 = 8;
/// Neighbouring elements of a row that a thread computes at a time: 16 codes are one load.
const PIECE: u32 = 16;
/// Registers that loads may take which run a round ahead.
pub(super) const MOST_LOADED: usize = 40;
/// Bytes that a thread writes at a time.
const WORD_BYTES: u32 = 16;

/// What a thread has loaded of gathered rows.
#[derive(Default)]
pub(super) struct Loaded {
    /// 16 codes as words, by gather, row of the thread's and first column of the row's threads.
    words: HashMap<(ValueId, u32, u32), Vec<Val>>,
    /// The same decoded.
    floats: HashMap<(ValueId, u32, u32), Vec<Val>>,
    /// One f32, by gather, row and column.
    scalars: HashMap<(ValueId, u32, u32), Val>,
}

impl Loaded {
    /// What a row's computation from these gathers leaves is of no use to the next.
    fn forget(&mut self, row: u32, gathers: &[ValueId]) {
        let kept = |k: &(ValueId, u32, u32)| k.1 != row || !gathers.contains(&k.0);
        self.words.retain(|k, _| kept(k));
        self.floats.retain(|k, _| kept(k));
        self.scalars.retain(|k, _| kept(k));
    }

    /// What is there, in order: gather, row and column, and whether it is codes.
    pub(super) fn keys(&self) -> Vec<((ValueId, u32, u32), bool)> {
        let words = self.words.keys().map(|&k| (k, true));
        let mut keys: Vec<_> = words.chain(self.scalars.keys().map(|&k| (k, false))).collect();
        keys.sort_unstable();
        keys
    }

    /// The registers of that.
    pub(super) fn values(&self, keys: &[((ValueId, u32, u32), bool)]) -> Vec<Val> {
        let of = |&(key, codes): &((ValueId, u32, u32), bool)| match codes {
            true => self.words[&key].clone(),
            false => vec![self.scalars[&key]],
        };
        keys.iter().flat_map(of).collect()
    }

    /// The same again from registers.
    fn of(keys: &[((ValueId, u32, u32), bool)], mut values: &[Val]) -> Loaded {
        let mut loaded = Loaded::default();
        for &(key, codes) in keys {
            let (own, rest) = values.split_at(if codes { 4 } else { 1 });
            values = rest;
            if codes {
                loaded.words.insert(key, own.to_vec());
            } else {
                loaded.scalars.insert(key, own[0]);
            }
        }
        loaded
    }
}

/// Where an element of a computed tile is.
#[derive(Clone, Copy)]
struct Spot {
    /// Which of the thread's rows.
    row: u32,
    /// First column that the row's threads compute together; what has one column for several counts those.
    base: u32,
    /// Which of the thread's own.
    e: u32,
}

/// A tile that a stage is filled with, and whether the blocks of the cluster compute it together.
#[derive(Clone, Copy)]
pub(super) struct Filled {
    value: ValueId,
    shared: bool,
}

/// The tiles that a body fills stages with.
pub(super) fn fills_of(body: &Block) -> Vec<Filled> {
    let fill = |i: &Inst| match &i.op {
        Op::Fill { value, shared, .. } => Some(Filled { value: *value, shared: *shared }),
        _ => None,
    };
    body.insts.iter().filter_map(fill).collect()
}

/// The number of a thread's row, by what gives the numbers and the first of the rows that threads bring together.
pub type Numbered = ((ValueId, u32), Val);

impl<'a> Emit<'a> {
    /// Writes a tile to a slot of the acquired stage.
    pub fn fill(&mut self, channel: ChannelId, slot: u32, value: ValueId) -> Result<(), String> {
        let s = self.s;
        let buffer = &s.buffers[s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let stage = self.rings[channel.0 as usize].stage;
        let base = self.slot_at(channel, slot, stage);
        let geometry = self.seen_in(value)?;
        match (buffer.swizzle, geometry.transposed) {
            (0, _) => self.fill_rows(&geometry, value, buffer, base),
            (_, false) => self.fill_matrix(&geometry, value, buffer, base),
            (_, true) => self.fill_turned(&geometry, value, base),
        }
    }

    /// One f32 a row: a thread of each that have it.
    pub fn fill_rows(&mut self, g: &Geometry, value: ValueId, buffer: &Buffer, base: Val) -> Result<(), String> {
        let mut seen = HashMap::new();
        let writes = self.writes_rows(g);
        for at in g.varying(true, false) {
            let [row, _] = g.coordinates(&mut self.t, at);
            let byte = self.t.f.mul(row, i32(buffer.pitch.into()));
            let to = self.t.f.add(base, byte);
            let v = self.element(value, at, &mut seen)?;
            ptx::store_shared_f32_if(&mut self.t.f, writes, to, v);
        }
        Ok(())
    }

    /// The same read again: every thread takes the values of its own rows, `pitch` bytes apart, by how many bytes they are behind the first.
    pub fn read_rows(&mut self, r: ValueId, pitch: u32, load: impl Fn(&mut Self, Val) -> Val) -> Result<(), String> {
        let geometry = self.seen_in(r)?;
        let mut values = Vec::new();
        for at in geometry.varying(true, false) {
            let [row, _] = geometry.coordinates(&mut self.t, at);
            let byte = self.t.f.mul(row, i32(pitch.into()));
            values.push(load(self, byte));
        }
        self.held.insert(r, Held::Registers(values, [true, false]));
        Ok(())
    }

    /// Whether this thread is the one of those that have a row's value.
    pub fn writes_rows(&mut self, g: &Geometry) -> Val {
        let (lane, warp) = (self.t.lane, g.warp);
        if g.transposed {
            let (quad, first) = (self.t.f.cmp("ult", lane, i32(4)), self.t.f.cmp("eq", warp, i32(0)));
            return self.t.f.bin("and", quad, first);
        }
        let within = self.t.f.rem(lane, 4);
        self.t.f.cmp("eq", within, i32(0))
    }

    /// 16-bit elements, each warp its 16 rows.
    fn fill_matrix(&mut self, g: &Geometry, value: ValueId, buffer: &Buffer, base: Val) -> Result<(), String> {
        if g.subs != 1 || !g.wide.is_multiple_of(16) {
            return Err("a tile of other than 64 rows is handed on".into());
        }
        let lane = self.t.lane;
        let top = self.t.f.mul(g.warp, i32(16));
        let row = self.t.f.rem(lane, 16);
        let row = self.t.f.add(top, row);
        let half = self.t.f.div(lane, 16);
        let mut seen = HashMap::new();
        for j in (0..g.wide / 8).step_by(2) {
            let mut words = Vec::new();
            for (j, h) in [(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)] {
                words.push(self.packed(value, [0, 1].map(|e| Register { sub: 0, j, h, e }), &mut seen)?);
            }
            let piece = self.t.f.add(half, i32((j % 8).into()));
            let byte = self.swizzled(row, piece);
            let byte = self.t.f.add(byte, i32((j / 8 * buffer.panel_bytes()).into()));
            let to = self.t.f.add(base, byte);
            ptx::store_matrix(&mut self.t.f, to, &words, false);
        }
        Ok(())
    }

    /// The same where the instruction's rows are the tile's columns: each warp has 16 columns.
    fn fill_turned(&mut self, g: &Geometry, value: ValueId, base: Val) -> Result<(), String> {
        if g.subs != 1 {
            return Err("a tile of other than 64 columns is handed on".into());
        }
        let lane = self.t.lane;
        let pieces = self.t.f.mul(g.warp, i32(2));
        let (matrix, row) = (self.t.f.div(lane, 8), self.t.f.rem(lane, 8));
        let (side, below) = (self.t.f.rem(matrix, 2), self.t.f.div(matrix, 2));
        let below = self.t.f.mul(below, i32(8));
        let row = self.t.f.add(row, below);
        let piece = self.t.f.add(pieces, side);
        let mut seen = HashMap::new();
        for j in (0..g.wide / 8).step_by(2) {
            let mut words = Vec::new();
            let two = j + 1 < g.wide / 8;
            for (j, h) in [(j, 0), (j, 1), (j + 1, 0), (j + 1, 1)].into_iter().take(if two { 4 } else { 2 }) {
                words.push(self.packed(value, [0, 1].map(|e| Register { sub: 0, j, h, e }), &mut seen)?);
            }
            let row = self.t.f.add(row, i32((8 * j).into()));
            let byte = self.swizzled(row, piece);
            let to = self.t.f.add(base, byte);
            ptx::store_matrix(&mut self.t.f, to, &words, true);
        }
        Ok(())
    }

    /// Whether a loop's body fills stages with tiles computed from gathered rows.
    pub fn computes_rows(&self, body: &Block) -> bool {
        self.geometries_are_none() && body.insts.iter().any(|i| matches!(i.op, Op::Fill { .. }))
    }

    /// A loop that computes rows. Loads run ahead: those of all tiles are issued at the end of the round before, or, where there are no
    /// registers for so many, those of a tile at the end of the tile before. None is issued between uses of others: the assembler
    /// counts all of them together, and a use would wait for the youngest. What numbers of rows are looked up by is read a round
    /// earlier. Rows are loaded by eight threads, each 16 neighbours of every 128 columns.
    pub fn pipelined(
        &mut self,
        inst: &'a Inst,
        (lo, hi, step): (Index, Index, u32),
        body: &'a Block,
    ) -> Result<(), String> {
        if !inst.results.is_empty() {
            return Err("a loop that computes rows and carries values".into());
        }
        let fills = fills_of(body);
        self.find_peers(&fills);
        let (lo, hi) = (self.index(lo)?, self.index(hi)?);
        let step = i32(step.into());
        let Begun { numbers, listed, loaded, ahead } = match self.begun.take() {
            Some(begun) => begun,
            None => self.first_round((lo, Some(hi), step), body, &fills)?,
        };
        let mut carried: Vec<Val> = self.ring_state();
        let counters = carried.len();
        let keys = loaded.keys();
        carried.extend(loaded.values(&keys));
        let names = |numbered: &[Numbered]| numbered.iter().map(|n| n.0).collect::<Vec<_>>();
        let (named, named_listed) = (names(&numbers), names(&listed));
        carried.extend(numbers.iter().chain(&listed).map(|n| n.1));
        ptx::warp_waits(&mut self.t.f);
        let end = self.counted((lo, hi, step), &carried, |e, counter, values| {
            e.resume(&values[..counters]);
            let (values, after) = values[counters..].split_at(values.len() - counters - named_listed.len());
            let (words, own) = values.split_at(values.len() - named.len());
            let mut loaded = Loaded::of(&keys, words);
            let again = |names: &[(ValueId, u32)], values: &[Val]| -> Vec<Numbered> {
                names.iter().copied().zip(values.iter().copied()).collect()
            };
            let (numbers, listed) = (again(&named, own), again(&named_listed, after));
            e.uniforms_at(body, counter)?;
            e.numbers = numbers.iter().copied().collect();
            e.sources.clear();
            let mut filled = 0;
            for inst in &body.insts {
                match &inst.op {
                    Op::Fill { channel, slot, value, shared } => {
                        let fill = Filled { value: *value, shared: *shared };
                        e.fill_computed(*channel, *slot, fill, &mut loaded)?;
                        filled += 1;
                        if ahead < fills.len() && filled < fills.len() {
                            e.load_rows(fills[filled], &numbers, &mut loaded)?;
                        }
                    }
                    Op::Acquire(_) if e.sources.is_empty() => {
                        e.prepare_rows(body, true)?;
                        e.inst(inst)?;
                    }
                    _ => e.inst(inst)?,
                }
            }
            let next = e.t.f.add(counter, step);
            let next_numbers = e.numbers_at(body, next, Some(hi), &listed)?;
            for &fill in &fills[..ahead] {
                e.load_rows(fill, &next_numbers, &mut loaded)?;
            }
            let after = e.t.f.add(next, step);
            let listed = e.read_lists(body, after)?;
            let mut out: Vec<Val> = e.ring_state();
            out.extend(loaded.values(&keys));
            out.extend(next_numbers.iter().chain(&listed).map(|n| n.1));
            Ok(out)
        })?;
        self.resume(&end[..counters]);
        Ok(())
    }

    /// Finds where the other blocks of the cluster are, if some tile is theirs too.
    fn find_peers(&mut self, fills: &[Filled]) {
        self.peers.clear();
        for other in 1..self.cluster {
            if !fills.iter().any(|f| f.shared) {
                return;
            }
            let rank = self.t.f.add(self.rank, i32(other.into()));
            let rank = self.t.f.bin("urem", rank, i32(self.cluster.into()));
            let rank = self.rank_of(rank);
            let peer = ptx::to_block(&mut self.t.f, self.t.shared32, rank);
            self.peers.push(peer);
        }
    }

    /// Bytes of a stage that the other blocks of the cluster write.
    pub fn others_bytes(&self, channel: ChannelId) -> u32 {
        let mut bytes = 0;
        let mut pending: Vec<&Block> = self.s.roles.iter().map(|r| &r.body).collect();
        while let Some(block) = pending.pop() {
            for inst in &block.insts {
                match &inst.op {
                    Op::Fill { channel: c, value, shared: true, .. } if *c == channel => {
                        bytes += self.shape(*value).iter().product::<u32>() * self.dtype(*value).bytes() as u32;
                    }
                    op => pending.extend(op.blocks()),
                }
            }
        }
        bytes / self.cluster * (self.cluster - 1)
    }

    /// The numbers of rows that this thread uses: what gives them, and the first of the rows that threads bring together.
    fn numbered(&self, body: &Block) -> Vec<(ValueId, u32)> {
        let mut chosen: Vec<(ValueId, u32)> = Vec::new();
        for inst in &body.insts {
            let (rows, count) = match &inst.op {
                Op::Copy { rows: Some(rows), shape, .. } => (*rows, shape[0]),
                Op::Tile(tile::Op::Gather { rows, shape, .. }) => (*rows, shape[0]),
                _ => continue,
            };
            for start in (0..count).step_by(self.rows_at_once() as usize) {
                // What numbers themselves are gathered by is no row of keys.
                let own = body.insts.iter().any(|i| i.results.contains(&rows));
                let wide =
                    matches!(&inst.op, Op::Copy { .. }) || self.shape(inst.results[0]).iter().skip(1).any(|&n| n > 1);
                if own && wide && !chosen.contains(&(rows, start)) {
                    chosen.push((rows, start));
                }
            }
        }
        chosen
    }

    /// Computes what in a body is the same for all threads, in the round of that counter.
    pub fn uniforms_at(&mut self, body: &'a Block, counter: Val) -> Result<(), String> {
        self.held.insert(body.args[0], Held::Scalar(counter));
        body.insts.iter().filter(|i| matches!(i.op, Op::Tile(_))).try_for_each(|inst| self.inst(inst))
    }

    /// What numbers of rows are computed from and where that is read at a known place: lists in memory.
    fn lists_of(&self, v: ValueId, found: &mut Vec<ValueId>) {
        match self.defs.get(&v).map(|i| &i.op) {
            Some(_) if matches!(self.held.get(&v), Some(Held::Scalar(_))) || found.contains(&v) => {}
            Some(Op::Tile(tile::Op::Load { .. })) => found.push(v),
            Some(Op::Tile(op)) => tile::operands(op).into_iter().for_each(|v| self.lists_of(v, found)),
            _ => {}
        }
    }

    /// Reads this thread's elements of the lists that numbers of rows come from, in the round of that counter.
    pub fn read_lists(&mut self, body: &'a Block, counter: Val) -> Result<Vec<Numbered>, String> {
        self.uniforms_at(body, counter)?;
        let first = self.t.f.div(self.role_tid, ROW_THREADS);
        let mut listed: Vec<Numbered> = Vec::new();
        for (rows, start) in self.numbered(body) {
            let mut lists = Vec::new();
            self.lists_of(rows, &mut lists);
            for list in lists {
                if !listed.iter().any(|n| n.0 == (list, start)) {
                    let row = self.t.f.add(first, i32(start.into()));
                    listed.push(((list, start), self.row_element(list, row)?));
                }
            }
        }
        Ok(listed)
    }

    /// Numbers of this thread's rows in the round of that counter, from what was read for it; none of any view where it is known that
    /// there is no such round.
    pub(super) fn numbers_at(
        &mut self,
        body: &'a Block,
        counter: Val,
        hi: Option<Val>,
        listed: &[Numbered],
    ) -> Result<Vec<Numbered>, String> {
        self.uniforms_at(body, counter)?;
        let some = hi.map(|hi| self.t.f.cmp("slt", counter, hi));
        let first = self.t.f.div(self.role_tid, ROW_THREADS);
        let mut numbers = Vec::new();
        for (rows, start) in self.numbered(body) {
            let row = self.t.f.add(first, i32(start.into()));
            let here = listed.iter().filter(|n| n.0.1 == start).map(|n| (n.0.0, n.1));
            let number = self.vector_element(rows, row, &mut here.collect())?;
            let number = some.map_or(number, |some| self.t.f.select(some, number, i32(-1)));
            numbers.push(((rows, start), number));
        }
        Ok(numbers)
    }

    /// Rows of a computed tile that a thread has a part of.
    fn rows_of(&self, fill: Filled) -> Result<u32, String> {
        let &[rows, columns] = self.shape(fill.value) else { return Err("a computed tile that is no matrix".into()) };
        let (together, apart) = (ROW_THREADS * PIECE, self.rows_at_once());
        let apart = if fill.shared { apart * self.cluster } else { apart };
        if !columns.is_multiple_of(together) || !rows.is_multiple_of(apart) {
            return Err(format!("a computed tile of {rows}x{columns}"));
        }
        Ok(rows / apart)
    }

    /// Issues the loads of a tile's rows.
    pub(super) fn load_rows(&mut self, fill: Filled, numbers: &[Numbered], loaded: &mut Loaded) -> Result<(), String> {
        (0..self.rows_of(fill)?).try_for_each(|row| self.load_row(fill, row, numbers, loaded))
    }

    /// Issues the loads of one row.
    fn load_row(&mut self, fill: Filled, row: u32, numbers: &[Numbered], loaded: &mut Loaded) -> Result<(), String> {
        let (value, each) = (fill.value, self.rows_of(fill)?);
        let mut chosen: Vec<Numbered> = numbers.to_vec();
        if fill.shared {
            // Of the rows at that place in every block's part, those of this block's.
            let apart = self.rows_at_once();
            let at = |rank: u32| (row + rank * each) * apart;
            let find = |rows: ValueId, rank: u32| numbers.iter().find(|n| n.0 == (rows, at(rank))).map(|n| n.1);
            chosen.clear();
            for &((rows, _), number) in numbers.iter().filter(|n| n.0.1 == at(0)) {
                let mut own = number;
                for rank in 1..self.cluster {
                    let here = self.t.f.cmp("eq", self.rank, i32(rank.into()));
                    let other = find(rows, rank).ok_or("rows whose numbers are not known")?;
                    own = self.t.f.select(here, other, own);
                }
                chosen.push(((rows, row * apart), own));
            }
        }
        let numbers = &chosen;
        let own = self.t.f.rem(self.role_tid, ROW_THREADS);
        let within = self.t.f.mul(own, i32(PIECE.into()));
        let columns = self.shape(value)[1];
        for pass in (0..columns).step_by((ROW_THREADS * PIECE) as usize) {
            self.load_computed(value, Spot { row, base: pass, e: 0 }, (numbers, within), loaded)?;
        }
        Ok(())
    }

    /// Computes a 16-bit tile of rows that are loaded, into a slot.
    fn fill_computed(
        &mut self,
        channel: ChannelId,
        slot: u32,
        fill: Filled,
        loaded: &mut Loaded,
    ) -> Result<(), String> {
        let s = self.s;
        let buffer = &s.buffers[s.channels[channel.0 as usize].slots[slot as usize].0 as usize];
        let stage = self.rings[channel.0 as usize].stage;
        let base = self.slot_at(channel, slot, stage);
        let value = fill.value;
        let (count, columns) = (self.rows_of(fill)?, self.shape(value)[1]);
        let (before, to) = self.rounded(value)?;
        let (first, own) = (self.t.f.div(self.role_tid, ROW_THREADS), self.t.f.rem(self.role_tid, ROW_THREADS));
        let apart = self.rows_at_once();
        // A block's part of the rows starts behind those of the blocks before.
        let first = if fill.shared {
            let skipped = self.t.f.mul(self.rank, i32((count * apart).into()));
            self.t.f.add(first, skipped)
        } else {
            first
        };
        // The thread's 16 elements are two pieces of 16 bytes, at an even place in a panel.
        // Threads of one panel write even pieces first and those of the other odd ones, so that all use other banks.
        let (side, place) = (self.t.f.div(own, 4), self.t.f.rem(own, 4));
        let panel = self.t.f.mul(side, i32(buffer.panel_bytes().into()));
        let place = self.t.f.mul(place, i32(2));
        let mut halves = Vec::new();
        for half in 0..2 {
            let turn = self.t.f.bin("xor", side, i32(half));
            let piece = self.t.f.add(place, turn);
            let at = self.swizzled(first, piece);
            let at = self.t.f.add(at, panel);
            halves.push(self.t.f.add(base, at));
        }
        let mut gathers = Vec::new();
        self.gathers_of(value, &mut gathers);
        for row in 0..count {
            for pass in (0..columns).step_by((ROW_THREADS * PIECE) as usize) {
                let mut words = Vec::new();
                for e in (0..PIECE).step_by(2) {
                    let mut pair = Vec::new();
                    for e in [e, e + 1] {
                        pair.push(self.computed(&before, Spot { row, base: pass, e }, loaded)?);
                    }
                    words.push(isa::pack(&mut self.t.f, to, pair[0], pair[1]));
                }
                let panels = pass * 2 / buffer.pitch * buffer.panel_bytes();
                for (half, words) in words.chunks((WORD_BYTES / 4) as usize).enumerate() {
                    let at = self.t.f.add(halves[half], i32((panels + row * apart * buffer.pitch).into()));
                    ptx::store_shared_words(&mut self.t.f, at, words);
                }
            }
            loaded.forget(row, &gathers);
        }
        if fill.shared {
            self.copy_to_peers(buffer, base, count * apart, (channel, stage));
        }
        Ok(())
    }

    /// Brings this block's rows of a stage, which the role's threads have written, to the other blocks of the cluster. Whole panels by the copy
    /// engine: words that threads write there come one by one, and keep products from their operands.
    fn copy_to_peers(&mut self, buffer: &Buffer, base: Val, rows: u32, (channel, stage): (ChannelId, Val)) {
        ptx::fence_async(&mut self.t.f);
        self.role_waits();
        let bytes = rows * buffer.pitch;
        let skipped = self.t.f.mul(self.rank, i32(bytes.into()));
        let from = self.t.f.add(base, skipped);
        let full = self.barrier_at(channel, false, stage);
        let (drives, peers) = (self.drives(), self.peers.clone());
        let (panels, panel_bytes) = (buffer.panels(), buffer.panel_bytes());
        self.t.when(drives, |t| {
            for peer in peers {
                let barrier = t.f.add(full, peer);
                for panel in 0..panels {
                    let from = t.f.add(from, i32((panel * panel_bytes).into()));
                    let to = t.f.add(from, peer);
                    ptx::copy_to_block(&mut t.f, to, from, bytes, barrier);
                }
            }
        });
        ptx::warp_waits(&mut self.t.f);
    }

    /// A tile that ends in a rounding, as the map before it: inputs' value, arithmetic; and the type it rounds to.
    fn rounded(&self, value: ValueId) -> Result<((ValueId, MapFn), DType), String> {
        let dtype = self.dtype(value);
        if let Some(Op::Tile(tile::Op::Map { body, .. })) = self.defs.get(&value).map(|i| &i.op)
            && let MapArg::Inst(last) = body.result
            && let Some(rounding) = body.insts.get(last as usize)
            && rounding.op == ScalarOp::Cast(dtype)
            && let Some(&from) = rounding.args.first()
            && dtype.bytes() == 2
        {
            let before = MapFn { insts: body.insts[..last as usize].to_vec(), result: from };
            return Ok(((value, before), dtype));
        }
        Err("a computed tile that does not end in a rounding to 16 bits".into())
    }

    fn computed_inputs(&self, v: ValueId) -> &'a [ValueId] {
        match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(tile::Op::Map { inputs, .. })) => inputs,
            Some(Op::Tile(tile::Op::Reshape { x, .. })) => std::slice::from_ref(x),
            _ => &[],
        }
    }

    /// The gathers that a computed tile is made of.
    fn gathers_of(&self, v: ValueId, found: &mut Vec<ValueId>) {
        if let Some(Op::Tile(tile::Op::Gather { .. })) = self.defs.get(&v).map(|i| &i.op) {
            found.push(v);
        }
        self.computed_inputs(v).iter().for_each(|&v| self.gathers_of(v, found));
    }

    /// Where an input of a tile is read: what has one column for several, at the number of those.
    fn spot_of(&self, input: ValueId, of: ValueId, at: Spot) -> Spot {
        match (self.shape(input), self.shape(of)) {
            ([.., 1], [.., wide]) if *wide > 1 => Spot { base: at.base / wide, e: 0, ..at },
            _ => at,
        }
    }

    /// Issues the loads behind a thread's neighbours.
    fn load_computed(
        &mut self,
        v: ValueId,
        at: Spot,
        (numbers, within): (&[Numbered], Val),
        loaded: &mut Loaded,
    ) -> Result<(), String> {
        if let Some(Op::Tile(tile::Op::Gather { view, rows, index, .. })) = self.defs.get(&v).map(|i| &i.op) {
            let key = (v, at.row, at.base);
            let codes = self.dtype(v) == DType::E4m3;
            let &[Index::Const(start)] = index.as_slice() else { return Err("columns that are not known".into()) };
            let name = (*rows, at.row * self.rows_at_once());
            let number = numbers.iter().find(|n| n.0 == name).ok_or("rows whose numbers are not known")?.1;
            let mut column = i32(start + i64::from(at.base));
            if codes {
                column = self.t.f.add(column, within);
            }
            let (address, inside) = self.element_at(*view, &[number, column]);
            if codes {
                // The half of its elements that the thread writes first.
                let side = self.t.f.rem(self.role_tid, ROW_THREADS);
                let side = self.t.f.div(side, 4);
                let byte = self.t.f.mul(side, i32(8));
                let mut words = Vec::new();
                for half in 0..2 {
                    let byte = self.t.f.bin("xor", byte, i32(8 * half));
                    let byte = self.t.f.cast("zext", byte, Ty::I64);
                    let address = self.t.f.offset(address, byte);
                    words.extend(ptx::load_words_if(&mut self.t.f, inside, address));
                }
                loaded.words.insert(key, words);
            } else {
                loaded.scalars.entry(key).or_insert_with(|| ptx::load_f32_if(&mut self.t.f, inside, address));
            }
            return Ok(());
        }
        for &input in self.computed_inputs(v) {
            if self.shape(input).iter().product::<u32>() > 1 {
                self.load_computed(input, self.spot_of(input, v, at), (numbers, within), loaded)?;
            }
        }
        Ok(())
    }

    /// One element: `v` names the tile, whose arithmetic is given.
    fn computed(&mut self, (v, body): &(ValueId, MapFn), at: Spot, loaded: &mut Loaded) -> Result<Val, String> {
        let mut args = Vec::new();
        for &input in self.computed_inputs(*v) {
            args.push(self.computed_input(input, self.spot_of(input, *v, at), loaded)?);
        }
        Ok(arith::apply(&mut self.t.f, self.t.arch, body, &args).0)
    }

    fn computed_input(&mut self, v: ValueId, at: Spot, loaded: &mut Loaded) -> Result<(Val, DType), String> {
        if let Some(Held::Scalar(x)) = self.held.get(&v) {
            return Ok((*x, self.dtype(v)));
        }
        let op = match self.defs.get(&v).map(|i| &i.op) {
            Some(Op::Tile(op)) => op,
            _ => return Err(format!("%{} is not computed here", v.0)),
        };
        let key = (v, at.row, at.base);
        match op {
            tile::Op::Gather { .. } if self.dtype(v) == DType::E4m3 => {
                if !loaded.floats.contains_key(&key) {
                    let mut floats = Vec::new();
                    for word in loaded.words.get(&key).cloned().unwrap_or_default() {
                        for high in [false, true] {
                            floats.extend(ptx::widen_e4m3(&mut self.t.f, word, high));
                        }
                    }
                    loaded.floats.insert(key, floats);
                }
                let x = loaded.floats.get(&key).and_then(|f| f.get(at.e as usize)).copied();
                // Decoded already: a cast to f32 leaves it as it is.
                Ok((x.ok_or("a code that was not loaded")?, DType::F32))
            }
            tile::Op::Gather { .. } if self.dtype(v) == DType::F32 => {
                Ok((loaded.scalars.get(&key).copied().ok_or("a scale that was not loaded")?, DType::F32))
            }
            tile::Op::Reshape { x, .. } => self.computed_input(*x, at, loaded),
            tile::Op::Map { body, .. } => {
                let x = self.computed(&(v, body.clone()), at, loaded)?;
                Ok((x, self.dtype(v)))
            }
            _ => Err(format!("%{} is no elementwise arithmetic of gathered rows", v.0)),
        }
    }
}
