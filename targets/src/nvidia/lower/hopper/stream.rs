//! Selections that grow while sums are made: each warpgroup keeps those of its own rows.
//!
//! A row has a list of candidates in memory of the block's own (it stays in the cache), with a counter and a threshold in shared memory.
//!
//! **Push.** A thread compares its sums with their row's threshold; a warp reserves places for what is greater with one atomic addition a
//! row, and writes value and number. A sum equal to the threshold loses to the `k` that are kept, which have lower numbers. Every [`PUSHES`]
//! pushes the warpgroup meets, and cuts lists that are nearly full.
//!
//! **Cut.** The `k` best of a list are found, or a few more ([`super::group`]); each pass reads it from the cache. They are written to its front, in any order, and the least that the `k`-th can be is the new threshold.
//!
//! **Take.** After a last cut, numbers are put in order.
//!
//! **Cost.** Of `n` random numbers about `k (1 + log2(n / k))` are ever listed, and `log2(n / k)` times a list is cut; both hide behind the
//! products of the other warpgroup.

use super::config::WARPGROUP;
use super::emit::{Emit, Held};
use super::group::Group;
use super::ptx;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32, i64};
use dsc_ir::sched::{BufferId, Op};
use dsc_ir::tile::{self, Index, Type, ValueId};

/// Candidates of a list.
const LIST: u32 = 4096;
/// Those in each thread's registers while it is cut, so few that a product has room beside them.
const EACH: u32 = 16;
/// The largest key.
const INFINITY: i64 = 0xff80_0000_u32 as i32 as i64;
/// Bytes of a candidate: key and number.
const CANDIDATE: u32 = 8;
/// Most that a row gets in one push: columns of sums.
const PUSH: u32 = 64;
/// Pushes after which lists are looked at.
const PUSHES: u32 = 4;
/// Candidates that a list may have when it is looked at: there must be room for the next pushes.
const MOST: u32 = LIST - PUSHES * PUSH;
/// Most members of a selection: a cut must make room.
pub const MOST_K: u32 = LIST - 8 * PUSH;

/// Bytes of a warpgroup's shared memory where things start: counters of its rows, thresholds, what the group works with.
const THRESHOLDS: u32 = 16;
const WORK: u32 = 32;
/// Bytes of a warpgroup's shared memory.
pub const SHARED: u32 = WORK + super::group::bytes(WARPGROUP);
/// Named barriers of roles come before those of warpgroups.
const FIRST_BARRIER: i64 = 8;

/// Bytes of memory of its own that a block needs for so many rows.
pub fn scratch_bytes(rows: u32) -> u64 {
    u64::from(rows) * u64::from(LIST) * u64::from(CANDIDATE)
}

/// What a thread knows of its warpgroup's selections.
#[derive(Clone, Debug)]
pub struct Lists {
    /// First byte of its shared memory, an address in i32.
    shared: Val,
    /// Its first list.
    lists: Val,
    group: Group,
    k: u32,
    /// Rows of the group.
    rows: u32,
    /// The group's first row in the tile.
    first_row: Val,
}

impl<'a> Emit<'a> {
    fn lists(&self) -> Result<Lists, String> {
        self.lists.clone().ok_or_else(|| "a selection that is not begun".into())
    }

    fn list_waits(&mut self, l: &Lists) {
        self.group_wait(&l.group);
    }

    /// Begins the selections of a tile's rows.
    pub fn begin_lists(&mut self, state: ValueId, buffer: BufferId) -> Result<(), String> {
        let Type::Topk { k, rows } = self.s.types[state.0 as usize] else { return Err("no selection".into()) };
        let offset = self.s.buffers[buffer.0 as usize].offset;
        let all = rows;
        let rows = self.the_sums()?.rows;
        let f = &mut self.t.f;
        let group = f.div(self.role_tid, WARPGROUP);
        let own = f.mul(group, i32(SHARED.into()));
        let own = f.add(own, i32(offset.into()));
        let base = f.add(own, i32(WORK.into()));
        let shared = f.add(self.t.shared32, own);
        let block = isa::sreg(f, "ctaid.x");
        let block = f.cast("zext", block, Ty::I64);
        let bytes = f.mul(block, i64(scratch_bytes(all) as i64));
        let first_row = f.mul(group, i32(rows.into()));
        let own = f.cast("zext", first_row, Ty::I64);
        let own = f.mul(own, i64(scratch_bytes(1) as i64));
        let bytes = f.add(bytes, own);
        let scratch = Val::Arg(self.s.params.len() as u32 + 1, Ty::Global);
        let lists = f.offset(scratch, bytes);
        let tid = f.rem(self.role_tid, WARPGROUP);
        let warp = f.div(tid, 32);
        let barrier = f.add(group, i32(FIRST_BARRIER));
        let group = Group { base, tid, warp, threads: WARPGROUP, barrier: Some(barrier) };
        let l = Lists { shared, lists, group, k, rows, first_row };
        // No thread is still at the last tile's.
        self.list_waits(&l);
        self.group_clear(&group);
        let mine = self.t.f.cmp("slt", tid, i32(rows.into()));
        let counter = self.word(shared, 0, tid);
        self.t.when(mine, |t| {
            ptx::store_shared_word(&mut t.f, counter, i32(0));
            let threshold = t.f.add(counter, i32(THRESHOLDS.into()));
            ptx::store_shared_word(&mut t.f, threshold, i32((f32::NEG_INFINITY.to_bits() as i32).into()));
        });
        self.list_waits(&l);
        self.lists = Some(l);
        Ok(())
    }

    /// Address of word `i` of an array at a byte of shared memory.
    fn word(&mut self, base: Val, at: u32, i: Val) -> Val {
        let byte = self.t.f.mul(i, i32(4));
        let at = self.t.f.add(byte, i32(at.into()));
        self.t.f.add(base, at)
    }

    /// Address of a candidate of one of the group's lists.
    fn candidate(&mut self, l: &Lists, row: Val, i: Val) -> Val {
        let list = self.t.f.mul(row, i32(LIST.into()));
        let at = self.t.f.add(list, i);
        let byte = self.t.f.mul(at, i32(CANDIDATE.into()));
        self.t.f.offset(l.lists, byte)
    }

    /// Offers this thread's sums: column `j` is number `base + j`.
    pub fn push_sums(&mut self, values: ValueId, base: ValueId) -> Result<(), String> {
        let (l, s) = (self.lists()?, self.the_sums()?);
        let Some(Held::Sums(values)) = self.held.get(&values).cloned() else { return Err("a push of no sums".into()) };
        let base = self.index(Index::Value(base))?;
        let row = self.t.f.sub(s.at[0][0], l.first_row);
        let at = self.word(l.shared, THRESHOLDS, row);
        let threshold = ptx::load_shared_f32(&mut self.t.f, at);
        let mut ballots = Vec::new();
        let mut wins = Vec::new();
        for &v in &values {
            let above = self.t.f.fcmp("ogt", v, threshold);
            let above = self.t.f.bin("and", above, s.first);
            ballots.push(isa::ballot(&mut self.t.f, above));
            wins.push(above);
        }
        let some = ballots.iter().skip(1).fold(ballots[0], |all, &b| self.t.f.bin("or", all, b));
        let some = self.t.f.cmp("ne", some, i32(0));
        // Lanes with the same row.
        let alike = match l.rows {
            1 => i32(-1),
            2 => {
                let q = self.t.f.rem(self.t.lane, 2);
                self.t.f.bin("shl", i32(0x5555_5555), q)
            }
            _ => {
                let q = self.t.f.rem(self.t.lane, 4);
                self.t.f.bin("shl", i32(0x1111_1111), q)
            }
        };
        let bit = self.t.f.bin("shl", i32(1), self.t.lane);
        let below = self.t.f.sub(bit, i32(1));
        let after = self.t.f.open_if(some);
        let own: Vec<Val> = ballots.iter().map(|&b| self.t.f.bin("and", b, alike)).collect();
        let counts: Vec<Val> = own.iter().map(|&b| isa::popcount(&mut self.t.f, b)).collect();
        let total = counts.iter().skip(1).fold(counts[0], |all, &n| self.t.f.add(all, n));
        let leads = self.t.f.cmp("eq", self.t.lane, row);
        let counter = self.word(l.shared, 0, row);
        let start = self.t.when_value(leads, i32(0), |t| isa::shared_atomic_add(&mut t.f, counter, total));
        let mut start = isa::shuffle_from(&mut self.t.f, start, row);
        for (u, &v) in values.iter().enumerate() {
            let before = self.t.f.bin("and", own[u], below);
            let before = isa::popcount(&mut self.t.f, before);
            let place = self.t.f.add(start, before);
            let at = self.candidate(&l, row, place);
            let key = self.ordered(v);
            let number = self.t.f.add(base, s.at[u][1]);
            isa::store_global_if(&mut self.t.f, wins[u], at, &[key, number]);
            start = self.t.f.add(start, counts[u]);
        }
        self.t.f.close_if(after);
        // There is room for some more pushes when lists are looked at.
        let number = self.t.f.div(base, PUSH);
        let number = self.t.f.rem(number, PUSHES);
        let due = self.t.f.cmp("eq", number, i32(i64::from(PUSHES) - 1));
        let after = self.t.f.open_if(due);
        let counter = self.word(l.shared, 0, row);
        let count = ptx::load_shared_word(&mut self.t.f, counter);
        // The warp that has added last has seen all of it.
        let full = self.t.f.cmp("sgt", count, i32(MOST.into()));
        let full = self.t.f.cast("zext", full, Ty::I32);
        let barrier = l.group.barrier.ok_or("a selection of no warpgroup")?;
        let full = ptx::group_barrier_any(&mut self.t.f, barrier, WARPGROUP, full);
        let cuts = self.t.f.open_if(full);
        self.cut_lists(&l, MOST, (l.k / 8).min((MOST - l.k) / 2))?;
        self.t.f.close_if(cuts);
        self.t.f.close_if(after);
        Ok(())
    }

    /// Cuts the lists of more than `most` candidates.
    fn cut_lists(&mut self, l: &Lists, most: u32, slack: u32) -> Result<(), String> {
        let rows = self.t.f.open_loop(i32(0), i32(l.rows.into()), &[]);
        let row = rows.args[0];
        let counter = self.word(l.shared, 0, row);
        let count = ptx::load_shared_word(&mut self.t.f, counter);
        let long = self.t.f.cmp("sgt", count, i32(most.into()));
        let after = self.t.f.open_if(long);
        self.cut_list(l, row, count, slack);
        self.t.f.close_if(after);
        self.t.f.close_loop(&rows, i32(1), &[]);
        // Nobody adds to a counter that others still look at.
        self.list_waits(l);
        Ok(())
    }

    /// Candidates of the running thread among those of a list from a place on, with zeros behind its end.
    fn chunk(&mut self, l: &Lists, row: Val, (from, count): (Val, Val)) -> Vec<[Val; 2]> {
        let own = self.t.f.add(from, l.group.tid);
        let mut chunk = Vec::new();
        for i in 0..EACH {
            let place = self.t.f.add(own, i32((i * WARPGROUP).into()));
            let real = self.t.f.cmp("slt", place, count);
            let at = self.candidate(l, row, place);
            chunk.push(ptx::load_pair_if(&mut self.t.f, real, at));
        }
        chunk
    }

    /// Keeps the `k` best of a list that has more, or so few more that `slack` is not exceeded.
    fn cut_list(&mut self, l: &Lists, row: Val, count: Val, slack: u32) {
        let counter = self.word(l.shared, 0, row);
        let at = self.t.f.add(counter, i32(THRESHOLDS.into()));
        // What is listed was more than the threshold.
        let threshold = ptx::load_shared_f32(&mut self.t.f, at);
        let lowest = self.ordered(threshold);
        let mut candidates = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| {
            let chunks = e.t.f.open_loop(i32(0), count, &[]);
            for candidate in e.chunk(l, row, (chunks.args[0], count)) {
                take(e, &[candidate]);
            }
            e.t.f.close_loop(&chunks, i32((EACH * WARPGROUP).into()), &[]);
        };
        let choice = self.choose(&l.group, [lowest, i32(INFINITY)], (l.k, slack), &mut candidates);
        let chunks = self.t.f.open_loop(i32(0), count, &[i32(0)]);
        let given = chunks.args[1];
        let chunk = self.chunk(l, row, (chunks.args[0], count));
        let mut mask = i32(0);
        for (i, &c) in chunk.iter().enumerate() {
            let keep = self.is_chosen(&choice, c);
            let bit = self.t.f.select(keep, i32(1 << i), i32(0));
            mask = self.t.f.bin("or", mask, bit);
        }
        let own = isa::popcount(&mut self.t.f, mask);
        // All have read the chunk when one writes, and no more is kept than was read.
        let (before, kept) = self.group_scan(&l.group, own);
        let mut place = self.t.f.add(given, before);
        for (i, &c) in chunk.iter().enumerate() {
            let bit = self.t.f.bin("lshr", mask, i32(i as i64));
            let bit = self.t.f.bin("and", bit, i32(1));
            let keep = self.t.f.cmp("ne", bit, i32(0));
            let at = self.candidate(l, row, place);
            isa::store_global_if(&mut self.t.f, keep, at, &c);
            place = self.t.f.add(place, bit);
        }
        self.list_waits(l);
        let given = self.t.f.add(given, kept);
        self.t.f.close_loop(&chunks, i32((EACH * WARPGROUP).into()), &[given]);
        let kept = chunks.args[1];
        let first = self.t.f.cmp("eq", l.group.tid, i32(0));
        let least = self.value(choice.best.low);
        self.t.when(first, |t| {
            ptx::store_shared_word(&mut t.f, counter, kept);
            ptx::store_shared_word(&mut t.f, at, least);
        });
        self.list_waits(l);
    }

    /// Ends the selections: stores what the program makes of their numbers.
    pub fn take_lists(&mut self, numbers: ValueId) -> Result<(), String> {
        let l = self.lists()?;
        let s = self.s;
        let stores: Vec<(ValueId, &'a [Index], ValueId)> = s
            .roles
            .iter()
            .flat_map(|r| &r.body.insts)
            .filter_map(|i| match &i.op {
                Op::Tile(tile::Op::Store { view, index, value }) => Some((*view, index.as_slice(), *value)),
                _ => None,
            })
            .collect();
        self.list_waits(&l);
        self.cut_lists(&l, l.k, 0)?;
        let rows = self.t.f.open_loop(i32(0), i32(l.rows.into()), &[]);
        let row = rows.args[0];
        let counter = self.word(l.shared, 0, row);
        let count = ptx::load_shared_word(&mut self.t.f, counter);
        let mut members = Vec::new();
        for i in 0..l.k.div_ceil(WARPGROUP) {
            let place = self.t.f.add(l.group.tid, i32((i * WARPGROUP).into()));
            let real = self.t.f.cmp("slt", place, count);
            let at = self.candidate(&l, row, place);
            let pair = ptx::load_pair_if(&mut self.t.f, real, at);
            members.push((real, pair[1]));
        }
        self.group_clear_bits(&l.group);
        let highest = members.iter().fold(i32(0), |most, m| self.t.f.intrinsic("umax", &[most, m.1]));
        let highest = self.group_most(&l.group, highest);
        let end = self.t.f.add(highest, i32(1));
        let line = self.t.f.add(l.first_row, row);
        let line = self.t.f.mul(line, i32(l.k.into()));
        let mut fault = Ok(());
        let mut hand = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| {
            members.iter().for_each(|&(real, number)| take(e, &[[real, number]]));
        };
        self.in_order(&l.group, end, &mut hand, &mut |e, number, rank, _| {
            let place = e.t.f.add(line, rank);
            if let Err(e) = e.put(numbers, number, place, &stores) {
                fault = Err(e);
            }
        });
        fault?;
        // What is left of the places holds −1.
        let given = self.t.f.intrinsic("smin", &[count, i32(l.k.into())]);
        let from = self.t.f.add(given, l.group.tid);
        let rest = self.t.f.open_loop(from, i32(l.k.into()), &[]);
        let place = self.t.f.add(line, rest.args[0]);
        self.put(numbers, i32(-1), place, &stores)?;
        self.t.f.close_loop(&rest, i32(WARPGROUP.into()), &[]);
        self.t.f.close_loop(&rows, i32(1), &[]);
        Ok(())
    }
}
