//! The best of a row in memory without counting all of it: a sample says how large the best are, and only what is as large is kept.
//!
//! 1. Each block of the cluster reads the same [`SAMPLES`] columns, spread over the row, and finds in them a value that a few more columns
//!    than wanted exceed. The same sample gives the same value: nothing is exchanged.
//! 2. Each block reads its share of the columns once, vectors of four, and lists those that are no smaller in the first block's shared memory.
//!    Warps take turns along the row, so that what is large in one stretch of it is spread over all.
//! 3. The first block finds the best of the lists exactly and puts them in order ([`super::group`]).
//!
//! A row that one block, or all of a cluster, can take in registers needs no sample ([`super::short`], [`super::spread`]); with more columns, up to 32 or 64 a thread, a bound is enough ([`super::bounded`]). If the lists have too few candidates, or more than there is
//! room for (no sample can say much of rows of equal values), all blocks know and the row is counted instead ([`super::select`]). A
//! sample therefore decides how long a selection takes, never what it is.
//!
//! **Cost.** One read of the row, one barrier of the cluster. Floors: the row's bytes; by count of the code some 10 instructions a
//! column of a thread's share, and 500 more.

use super::bounded::{self, Columns};
use super::emit::Emit;
use super::group::{self, Choice, Group, Members};
use super::ptx;
use super::select::{COUNT, COUNTS, MOST, OUT, Stream, THREADS, WARPS};
use super::short;
use super::window::{VECTOR, Window};
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Label, Ty, Val, i32};
use dsc_ir::tile::{Index, ValueId};

/// Vectors of a thread of a block that takes a row, or its part of one, in its registers: as few as the row needs; only the first where blocks share a
/// multiprocessor, and the first two where a cluster could do the rest.
const VECTORS: [u32; 3] = [4, 8, 16];
/// Vectors of a thread from which on reading a row twice is faster than a sample of it.
const FEWEST_TWICE: u32 = 12;
/// Most candidates of a row.
const LIST: u32 = 8192;
/// Vectors of the sample of a thread, and columns of all: so many that a count of `k` in a row, which few of a sample are, is known well enough.
const SAMPLE: u32 = 2;
const SAMPLES: u32 = SAMPLE * THREADS * VECTOR;
/// Most columns selected: there must be room for candidates that are not.
pub const MOST_K: u32 = LIST / 2;
/// Vectors of a thread that are read at a time.
pub const BATCH: u32 = 4;
/// The key of the lowest number that can be selected.
pub const LOWEST: i64 = 0x0080_0000;
/// All keys that can be selected: the first, how much larger the last is, and their bits.
pub const SELECTABLE: [i64; 3] = [LOWEST, 0xff00_0000_u32 as i32 as i64, 32];
/// Candidates of a thread that are read at a time.
const TOGETHER: u32 = 4;
/// Bytes of a candidate: value and column.
pub const CANDIDATE: u32 = 8;
/// Where lists and then the group's memory lie; what counting a row uses lies there too.
pub const WORK: u32 = LIST * CANDIDATE;
/// Bytes of both.
pub const BYTES: u32 = WORK + group::bytes(THREADS);

pub type Stores<'s, 'a> = &'s [(ValueId, &'a [Index], ValueId)];

/// A block's part of the row.
#[derive(Clone, Copy)]
struct Share {
    /// The warp's first vector, and its lane's.
    first: Val,
    /// From one vector of a lane to its next.
    step: u32,
    rank: Val,
}

impl<'a> Emit<'a> {
    /// Selects from a stretch of a row; whether that was possible, which all blocks of a cluster agree on.
    pub fn filtered(
        &mut self,
        stream: &Stream,
        w: &Window,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let tid = self.t.tid;
        let g = Group { base: i32(WORK.into()), tid, warp: self.t.warp, threads: THREADS, barrier: None };
        let rank = if self.s.team > 1 { isa::sreg(&mut self.t.f, "cluster.ctarank") } else { i32(0) };
        let leads = self.t.f.cmp("eq", rank, i32(0));
        let join = self.t.f.label();
        self.group_clear(&g);
        let team = self.s.team;
        let alone = match team {
            _ if self.sharing > 1 => &VECTORS[..1],
            1 => &VECTORS[..],
            _ => &VECTORS[..2],
        };
        // With more columns a thread, a sample is faster.
        let together = if team > 1 && self.sharing == 1 { &VECTORS[..2] } else { &[] };
        let all = alone.iter().map(|&n| (n, 1)).chain(together.iter().map(|&n| (n, team)));
        for (vectors, blocks) in all {
            let (short, long) = (self.t.f.label(), self.t.f.label());
            let few = self.t.f.cmp("sle", w.vectors, i32((blocks * short::capacity(vectors) / VECTOR).into()));
            self.t.f.cond_br(few, (short, &[]), (long, &[]));
            self.t.f.start(short, &[]);
            // Fewer columns a thread and fewer blocks are as fast without a bound.
            if blocks >= 4 && vectors > VECTORS[0] && stream.k <= bounded::MOST_K {
                let way = (w, vectors, Columns::Registers);
                self.bounded_or(stream, &g, way, (rank, leads), join, numbers, stores)?;
            }
            if blocks > 1 {
                self.spread_row(stream, &g, (w, vectors), rank, numbers, stores)?;
            } else {
                let after = self.t.f.open_if(leads);
                self.short_row(stream, &g, (w, vectors), numbers, stores)?;
                self.t.f.close_if(after);
            }
            self.t.f.br(join, &[i32(1)]);
            self.t.f.start(long, &[]);
        }
        if stream.k <= bounded::MOST_K
            && let Some(columns) = self.more_columns()
        {
            let (short, long) = (self.t.f.label(), self.t.f.label());
            let columns_of = |vectors: u32| i32((team * short::capacity(vectors) / VECTOR).into());
            let mut few = self.t.f.cmp("sle", w.vectors, columns_of(VECTORS[2]));
            if columns == Columns::Twice {
                // A sample is faster with fewer.
                let more = self.t.f.cmp("sgt", w.vectors, columns_of(FEWEST_TWICE));
                few = self.t.f.bin("and", few, more);
            }
            self.t.f.cond_br(few, (short, &[]), (long, &[]));
            self.t.f.start(short, &[]);
            self.bounded_or(stream, &g, (w, VECTORS[2], columns), (rank, leads), join, numbers, stores)?;
            self.t.f.br(long, &[]);
            self.t.f.start(long, &[]);
        }
        let done = self.long_row(stream, &g, w, (rank, leads), numbers, stores)?;
        self.t.f.br(join, &[done]);
        let done = self.t.f.start(join, &[Ty::I32])[0];
        Ok(self.t.f.cmp("ne", done, i32(0)))
    }

    /// How a thread has the most columns of a row for which there is a bound but nothing else that takes them; none if it has them in another way.
    fn more_columns(&self) -> Option<Columns> {
        match (self.s.team, self.sharing) {
            (1, 1) | (8.., _) => None,
            (1, _) => Some(Columns::Twice),
            (_, 1) => Some(Columns::Registers),
            _ => None,
        }
    }

    /// Goes to `join` if a bound says which columns are selected, and on where that can not be.
    #[allow(clippy::too_many_arguments, reason = "what the ways to select have in common, and where it ends")]
    fn bounded_or(
        &mut self,
        stream: &Stream,
        g: &Group,
        way: (&Window, u32, Columns),
        block: (Val, Val),
        join: Label,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let done = self.bounded_row(stream, g, way, block, numbers, stores)?;
        let found = self.t.f.cmp("ne", done, i32(0));
        let rest = self.t.f.label();
        self.t.f.cond_br(found, (join, &[i32(1)]), (rest, &[]));
        self.t.f.start(rest, &[]);
        Ok(())
    }

    /// Counts what is listed from nothing on.
    fn begin_listing(&mut self) {
        let zero = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(zero, |t| t.store_shared(i32(COUNT.into()), &[i32(0); 2]));
        if self.s.team > 1 {
            // The first block's memory is there, and as it is now, when the others write to it.
            ptx::cluster_arrive(&mut self.t.f);
        }
    }

    /// The first vector of the running warp, where the warps of all blocks take turns.
    pub fn first_vector(&mut self, rank: Val) -> Val {
        let first = self.t.f.mul(self.t.warp, i32(self.s.team.into()));
        let first = self.t.f.add(first, rank);
        self.t.f.mul(first, i32(32))
    }

    /// Selects from more columns; whether the sample told enough (i32).
    fn long_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        w: &Window,
        (rank, leads): (Val, Val),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let team = self.s.team;
        self.begin_listing();
        self.group_clear_bits(g);
        let first = self.first_vector(rank);
        let share = Share { first, step: THREADS * team, rank };
        // On their way while the sample is looked at. A block that has a row to itself shares the multiprocessor with others instead.
        let batch = if team > 1 { self.next_batch(w, &share, first) } else { Vec::new() };
        let cut = self.least_of_sample(stream, g, w);
        if team > 1 {
            ptx::cluster_wait(&mut self.t.f);
        }
        self.list(w, &share, batch, cut);
        let (counts, ok) = self.listed(g, stream.k, rank, cut);
        let finishes = self.t.f.bin("and", ok, leads);
        let after = self.t.f.open_if(finishes);
        self.finish_row(stream, g, w, (counts, cut), numbers, stores)?;
        self.t.f.close_if(after);
        Ok(self.t.f.cast("zext", ok, Ty::I32))
    }

    /// A key, at least [`LOWEST`], that more columns than are wanted reach in all likelihood: half as many more of the sample and sixteen, which are
    /// more than four standard deviations of its count.
    fn least_of_sample(&mut self, stream: &Stream, g: &Group, w: &Window) -> Val {
        let mut sample = Vec::new();
        for i in 0..SAMPLE {
            let number = self.t.f.add(self.t.tid, i32((i * THREADS).into()));
            let vector = self.t.f.mul(number, w.whole[1]);
            let vector = self.t.f.div(vector, SAMPLE * THREADS);
            let vector = self.t.f.add(vector, w.whole[0]);
            let column = self.column_of(w, vector);
            let at = self.column_address(w, column);
            for v in ptx::load_four_if(&mut self.t.f, Val::Int(1, Ty::I1), at, false) {
                let key = self.key(v);
                sample.push(self.t.f.intrinsic("umax", &[key, i32(1)]));
            }
        }
        self.group_wait(g);
        let f = &mut self.t.f;
        let columns = f.sub(w.to, w.from);
        let expected = f.bin("udiv", i32(i64::from(SAMPLES) * i64::from(stream.k)), columns);
        let half = f.div(expected, 2);
        let wanted = f.add(expected, half);
        let wanted = f.add(wanted, i32(16));
        let slack = f.div(wanted, 8);
        let all = (i32(1), i32(-2), i32(32));
        let found = self.search(g, all, (wanted, slack), &mut |e, count| sample.iter().for_each(|&key| count(e, key)));
        self.t.f.intrinsic("umax", &[found.low, i32(LOWEST)])
    }

    /// The next vectors of the running lane, of the share from that vector of its warp on.
    fn next_batch(&mut self, w: &Window, share: &Share, first: Val) -> Vec<Val> {
        self.batch(w, (first, share.step, BATCH), false)
    }

    /// Lists the columns of this block's share whose keys are at least `cut`, in any order, and notes the largest key. `ahead`: the first batch, if each is read while the one
    /// before is looked at.
    fn list(&mut self, w: &Window, share: &Share, ahead: Vec<Val>, cut: Val) {
        let room = LIST / self.s.team;
        let list = self.list_of(share.rank, room);
        let least = self.value(cut);
        let carried: Vec<Val> = [least].into_iter().chain(ahead.iter().copied()).collect();
        let l = self.t.f.open_loop(share.first, w.vectors, &carried);
        let (values, following) = if ahead.is_empty() {
            (self.next_batch(w, share, l.args[0]), Vec::new())
        } else {
            let next = self.t.f.add(l.args[0], i32((BATCH * share.step).into()));
            (l.args[2..].to_vec(), self.next_batch(w, share, next))
        };
        let most = values.iter().fold(l.args[1], |most, &v| ptx::larger(&mut self.t.f, most, v));
        self.list_values(w, (list, room, self.s.team > 1), (l.args[0], share.step), &values, least);
        let carried: Vec<Val> = [most].into_iter().chain(following).collect();
        self.t.f.close_loop(&l, i32((BATCH * share.step).into()), &carried);
        self.tell_most(l.args[1], self.s.team > 1);
    }

    /// The first block's list of this block, which has room for so many.
    fn list_of(&mut self, rank: Val, room: u32) -> Val {
        let list = self.own_list_of(rank, room);
        if self.s.team > 1 { ptx::address_in(&mut self.t.f, list, i32(0)) } else { list }
    }

    /// The same place in this block.
    pub fn own_list_of(&mut self, rank: Val, room: u32) -> Val {
        let byte = self.t.f.mul(rank, i32((room * CANDIDATE).into()));
        self.t.f.add(self.t.shared32, byte)
    }

    /// Makes this block's largest key, or the first's, at least that of this value.
    pub fn tell_most(&mut self, most: Val, first: bool) {
        let most = self.ordered(most);
        let most = isa::reduce_warp(&mut self.t.f, "umax", most);
        let at = self.t.f.add(self.t.shared32, i32(MOST.into()));
        let at = if first { ptx::address_in(&mut self.t.f, at, i32(0)) } else { at };
        let one = self.t.f.cmp("eq", self.t.lane, i32(0));
        ptx::shared_most_if(&mut self.t.f, one, at, most, first);
    }

    /// Lists those of the running thread's values that are at least `least`, in a list, of this block or of another, with room for so many: of vectors from `first` of its warp on, every `step`th.
    pub fn list_values(
        &mut self,
        w: &Window,
        (list, room, other): (Val, u32, bool),
        (first, step): (Val, u32),
        values: &[Val],
        least: Val,
    ) {
        let own = values.chunks(VECTOR as usize).fold(i32(0), |sum, v| ptx::count_least(&mut self.t.f, sum, v, least));
        let upto = self.sum_upto(own);
        let last = self.t.f.cmp("eq", self.t.lane, i32(31));
        let counter = self.t.f.add(self.t.shared32, i32(COUNT.into()));
        let start = self.t.when_value(last, i32(0), |t| isa::shared_atomic_add(&mut t.f, counter, upto));
        let start = isa::shuffle_from(&mut self.t.f, start, i32(31));
        // The same for all lanes, which the assembler does not know: to compare again takes an instruction, to keep what was found three.
        let many = values.len() > (BATCH * VECTOR) as usize;
        let least = if many { isa::shuffle_from(&mut self.t.f, least, i32(0)) } else { least };
        let end = self.t.f.add(start, upto);
        let fits = self.t.f.cmp("sle", end, i32(room.into()));
        let after = self.t.f.open_if(fits);
        let place = self.t.f.sub(end, own);
        let byte = self.t.f.mul(place, i32(CANDIDATE.into()));
        let mut at = self.t.f.add(list, byte);
        let vector = self.t.f.add(first, self.t.lane);
        let column = self.column_of(w, vector);
        for (i, some) in values.chunks(VECTOR as usize).enumerate() {
            let column = self.t.f.add(column, i32((i as u32 * step * VECTOR).into()));
            at = ptx::list_least(&mut self.t.f, at, some, least, column, other);
        }
        self.t.f.close_if(after);
    }

    /// How many candidates each block has listed, and whether they are all that is needed.
    fn listed(&mut self, g: &Group, k: u32, rank: Val, cut: Val) -> (Vec<Val>, Val) {
        let team = self.s.team;
        self.group_wait(g);
        let counts = if team > 1 {
            // Each block tells all.
            let to = self.t.f.cmp("slt", self.t.tid, i32(team.into()));
            let slot = self.t.f.mul(rank, i32(4));
            let slot = self.t.f.add(slot, i32(COUNTS.into()));
            let tid = self.t.tid;
            self.t.when(to, |t| {
                let count = t.load_shared(i32(COUNT.into()), Ty::I32, 1)[0];
                let at = t.f.add(t.shared32, slot);
                let at = ptx::address_in(&mut t.f, at, tid);
                ptx::store_cluster_word(&mut t.f, at, count);
            });
            self.together();
            (0..team).flat_map(|i| self.t.load_shared(i32((COUNTS + 4 * i).into()), Ty::I32, 1)).collect()
        } else {
            self.t.load_shared(i32(COUNT.into()), Ty::I32, 1)
        };
        let mut ok = Val::Int(1, Ty::I1);
        let mut total = i32(0);
        for &count in &counts {
            let room = self.t.f.cmp("sle", count, i32((LIST / team).into()));
            ok = self.t.f.bin("and", ok, room);
            total = self.t.f.add(total, count);
        }
        let enough = self.t.f.cmp("sge", total, i32(k.into()));
        let everything = self.t.f.cmp("eq", cut, i32(LOWEST));
        let enough = self.t.f.bin("or", enough, everything);
        (counts, self.t.f.bin("and", ok, enough))
    }

    /// Hands the running thread's candidates to `take`, key and column, key 0 for none: lists are shared out among as many groups of threads. Several
    /// are read at a time, which hides how long that takes.
    fn each_candidate(&mut self, (list, count): (Val, Val), take: &mut dyn FnMut(&mut Self, &[[Val; 2]])) {
        let threads = THREADS / self.s.team;
        let own = self.t.f.rem(self.t.tid, threads);
        let l = self.t.f.open_loop(own, count, &[]);
        let mut pairs = Vec::new();
        for i in 0..TOGETHER {
            let place = self.t.f.add(l.args[0], i32((i * threads).into()));
            let real = self.t.f.cmp("slt", place, count);
            let place = self.t.f.select(real, place, l.args[0]);
            let byte = self.t.f.mul(place, i32(CANDIDATE.into()));
            let at = self.t.f.add(list, byte);
            pairs.push((real, self.t.load_shared(at, Ty::I32, 2)));
        }
        let mut some = Vec::new();
        for (real, pair) in pairs {
            let value = self.t.f.cast("bitcast", pair[0], Ty::F32);
            let key = self.ordered(value);
            some.push([self.t.f.select(real, key, i32(0)), pair[1]]);
        }
        take(self, &some);
        self.t.f.close_loop(&l, i32((TOGETHER * threads).into()), &[]);
    }

    /// Writes the best of the candidates, in order.
    fn finish_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        w: &Window,
        (counts, cut): (Vec<Val>, Val),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let team = self.s.team;
        let number = self.t.f.div(self.t.tid, THREADS / team);
        let list = self.t.f.mul(number, i32((LIST / team * CANDIDATE).into()));
        let (mut count, mut total) = (counts[0], counts[0]);
        for (i, &n) in counts.iter().enumerate().skip(1) {
            let here = self.t.f.cmp("eq", number, i32(i as i64));
            count = self.t.f.select(here, n, count);
            total = self.t.f.add(total, n);
        }
        let own = (list, count);
        let most = self.t.load_shared(i32(MOST.into()), Ty::I32, 1)[0];
        let mut candidates = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| e.each_candidate(own, take);
        let choice = self.choose(g, [cut, most], (stream.k, 0), &mut candidates);
        self.write_chosen(stream, g, w, (&choice, total), &mut candidates, numbers, stores)
    }

    /// Writes those of the candidates, so many in all, that are of the choice, in order.
    #[allow(clippy::too_many_arguments, reason = "what the ways to select have in common, and what was chosen")]
    pub fn write_chosen(
        &mut self,
        stream: &Stream,
        g: &Group,
        w: &Window,
        (choice, total): (&Choice, Val),
        candidates: Members<'_, 'a>,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let end = self.t.f.sub(w.to, w.from);
        let mut members = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| {
            candidates(e, &mut |e, some| {
                let mut members = Vec::new();
                for &[key, column] in some {
                    let chosen = e.is_chosen(choice, [key, column]);
                    members.push([chosen, e.t.f.sub(column, w.from)]);
                }
                take(e, &members);
            });
        };
        self.in_order(g, end, &mut members, &mut |e, number, place, real| {
            let column = e.t.f.add(number, w.from);
            let byte = e.t.f.mul(place, i32(4));
            let at = e.t.f.add(byte, i32(OUT.into()));
            let at = e.t.f.add(e.t.shared32, at);
            ptx::store_shared_word_if(&mut e.t.f, real, at, column);
        });
        self.deliver(stream.k, total, numbers, stores)
    }
}

const _: () = assert!(THREADS == 32 * WARPS);
