//! The best of a row in memory without counting all of it: a sample says how large the best are, and only what is as large is kept.
//!
//! 1. Each block of the cluster reads the same [`SAMPLES`] columns, spread over the row, and finds in them a value that a few more columns
//!    than wanted exceed. The same sample gives the same value: nothing is exchanged.
//! 2. Each block reads its share of the columns once, and lists those that are no smaller in its shared memory.
//! 3. The first block reads the lists of all, finds the best exactly and puts them in order ([`super::group`]).
//!
//! A row of at most [`LIST`] columns needs no sample: all of it are candidates. If the lists have too few candidates, or more than there is
//! room for (no sample can say much of rows of equal values), all blocks know and the row is counted instead ([`super::select`]). A
//! sample therefore decides how long a selection takes, never what it is.
//!
//! **Cost.** One read of the row, two barriers of the cluster. Floor: the row's bytes.

use super::emit::Emit;
use super::group::{self, Group};
use super::ptx;
use super::select::{COUNT, Stream, THREADS};
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::tile::{Index, ValueId};

/// Candidates in each thread's registers at the end.
const EACH: u32 = 8;
/// Most candidates of a row.
const LIST: u32 = EACH * THREADS;
/// Columns of the sample of a thread, and of all: so many that a count of `k` in a row, which few of a sample are, is known well enough.
const SAMPLE: u32 = 4;
const SAMPLES: u32 = SAMPLE * THREADS;
/// Most columns selected: there must be room for candidates that are not.
pub const MOST_K: u32 = LIST / 2;
/// Columns of a thread that are read at a time.
const BATCH: u32 = 16;
/// Bytes of a candidate: key and column.
const CANDIDATE: u32 = 8;
/// Where lists and then the group's memory lie; what counting a row uses lies there too.
const WORK: u32 = LIST * CANDIDATE;
/// Bytes of both.
pub const BYTES: u32 = WORK + group::bytes(THREADS);

type Stores<'s, 'a> = &'s [(ValueId, &'a [Index], ValueId)];

impl<'a> Emit<'a> {
    /// Selects by a sample; whether that was possible, which all blocks of a cluster agree on.
    pub fn filtered(
        &mut self,
        stream: &Stream,
        all: Val,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let tid = self.t.tid;
        let g = Group { base: i32(WORK.into()), tid, warp: self.t.warp, threads: THREADS, barrier: None };
        let rank = if self.s.team > 1 { isa::sreg(&mut self.t.f, "cluster.ctarank") } else { i32(0) };
        let leads = self.t.f.cmp("eq", rank, i32(0));
        let [short, long, join] = [0; 3].map(|_| self.t.f.label());
        self.group_clear(&g);
        let few = self.t.f.cmp("sle", all, i32(LIST.into()));
        self.t.f.cond_br(few, (short, &[]), (long, &[]));

        self.t.f.start(short, &[]);
        let mut keys = Vec::new();
        let mut columns = Vec::new();
        for i in 0..EACH {
            let column = self.t.f.add(tid, i32((i * THREADS).into()));
            let key = self.key_in(stream, column, all)?;
            keys.push(key);
            columns.push(column);
        }
        keys.append(&mut columns);
        keys.push(i32(1));
        self.t.f.br(join, &keys);

        self.t.f.start(long, &[]);
        let cut = self.least_of_sample(stream, &g, all)?;
        self.list(stream, (rank, all), cut)?;
        self.together();
        let found = self.listed(stream.k, cut, leads);
        self.t.f.br(join, &found);

        let types = vec![Ty::I32; 2 * EACH as usize + 1];
        let mut found = self.t.f.start(join, &types);
        let ok = found.pop().ok_or("no lists")?;
        let ok = self.t.f.cmp("ne", ok, i32(0));
        let finishes = self.t.f.bin("and", ok, leads);
        let after = self.t.f.open_if(finishes);
        let (keys, columns) = found.split_at(EACH as usize);
        let candidates: Vec<[Val; 2]> = keys.iter().zip(columns).map(|(&key, &column)| [key, column]).collect();
        self.finish_row(stream, &g, &candidates, all, numbers, stores)?;
        self.t.f.close_if(after);
        Ok(ok)
    }

    /// The key of a column, 0 beyond the end.
    fn key_in(&mut self, stream: &Stream, column: Val, end: Val) -> Result<Val, String> {
        let here = self.t.f.cmp("slt", column, end);
        // Beyond the end a thread reads the first column, whose value it does not use.
        let column = self.t.f.select(here, column, i32(0));
        let key = self.key_of(stream, column)?;
        Ok(self.t.f.select(here, key, i32(0)))
    }

    /// A key, at least 1, that more columns than are wanted reach in all likelihood: half as many more of the sample and sixteen, which are
    /// more than four standard deviations of its count.
    fn least_of_sample(&mut self, stream: &Stream, g: &Group, all: Val) -> Result<Val, String> {
        let zero = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(zero, |t| t.store_shared(i32(COUNT.into()), &[i32(0)]));
        self.group_wait(g);
        let (whole, rest) = (self.t.f.div(all, SAMPLES), self.t.f.rem(all, SAMPLES));
        let mut sample = Vec::new();
        for i in 0..SAMPLE {
            let number = self.t.f.add(self.t.tid, i32((i * THREADS).into()));
            let column = self.t.f.mul(number, whole);
            let more = self.t.f.mul(number, rest);
            let more = self.t.f.div(more, SAMPLES);
            let column = self.t.f.add(column, more);
            let key = self.key_of(stream, column)?;
            sample.push(self.t.f.intrinsic("umax", &[key, i32(1)]));
        }
        let f = &mut self.t.f;
        let expected = f.bin("udiv", i32(i64::from(SAMPLES) * i64::from(stream.k)), all);
        let half = f.div(expected, 2);
        let wanted = f.add(expected, half);
        let wanted = f.add(wanted, i32(16));
        let slack = f.div(wanted, 8);
        let found = self.search(g, (sample.len(), i32(SAMPLES.into())), (wanted, slack), &|_, i| sample[i]);
        let least = self.t.f.bin("shl", found.bound, found.drop);
        Ok(self.t.f.intrinsic("umax", &[least, i32(1)]))
    }

    /// Lists the columns of this block's share whose keys are at least `cut`, in any order.
    fn list(&mut self, stream: &Stream, (rank, all): (Val, Val), cut: Val) -> Result<(), String> {
        let team = self.s.team;
        let share = self.t.f.add(all, i32(i64::from(team) - 1));
        let share = self.t.f.div(share, team);
        let first = self.t.f.mul(rank, share);
        let end = self.t.f.add(first, share);
        let end = self.t.f.intrinsic("smin", &[end, all]);
        let l = self.t.f.open_loop(first, end, &[]);
        let mut batch = Vec::new();
        for i in 0..BATCH {
            let column = self.t.f.add(l.args[0], self.t.tid);
            let column = self.t.f.add(column, i32((i * THREADS).into()));
            let key = self.key_in(stream, column, end)?;
            batch.push((key, column));
        }
        let mut kept = Vec::new();
        let mut total = i32(0);
        for (key, column) in batch {
            let keep = self.t.f.cmp("uge", key, cut);
            let ballot = isa::ballot(&mut self.t.f, keep);
            kept.push((keep, ballot, [key, column], total));
            let n = isa::popcount(&mut self.t.f, ballot);
            total = self.t.f.add(total, n);
        }
        let some = self.t.f.cmp("ne", total, i32(0));
        let after = self.t.f.open_if(some);
        let one = self.t.f.cmp("eq", self.t.lane, i32(0));
        let at = self.t.f.add(self.t.shared32, i32(COUNT.into()));
        let start = self.t.when_value(one, i32(0), |t| isa::shared_atomic_add(&mut t.f, at, total));
        let start = isa::shuffle_from(&mut self.t.f, start, i32(0));
        for (keep, ballot, pair, before) in kept {
            let below = super::select::lanes_below(&mut self.t, ballot);
            let place = self.t.f.add(start, before);
            let place = self.t.f.add(place, below);
            let room = self.t.f.cmp("slt", place, i32(LIST.into()));
            let keep = self.t.f.bin("and", keep, room);
            let byte = self.t.f.mul(place, i32(CANDIDATE.into()));
            let at = self.t.f.add(self.t.shared32, byte);
            ptx::store_shared_pair_if(&mut self.t.f, keep, at, pair);
        }
        self.t.f.close_if(after);
        self.t.f.close_loop(&l, i32((BATCH * THREADS).into()), &[]);
        Ok(())
    }

    /// Keys and columns of all lists, this thread's part of them, and whether they are all that is needed; only one block reads them.
    fn listed(&mut self, k: u32, cut: Val, leads: Val) -> Vec<Val> {
        let team = self.s.team;
        let mut starts = Vec::new();
        let mut total = i32(0);
        for rank in 0..team {
            starts.push(total);
            let count = self.remote(i32(COUNT.into()), rank)[0];
            total = self.t.f.add(total, count);
        }
        let room = self.t.f.cmp("sle", total, i32(LIST.into()));
        let enough = self.t.f.cmp("sge", total, i32(k.into()));
        let everything = self.t.f.cmp("eq", cut, i32(1));
        let enough = self.t.f.bin("or", enough, everything);
        let ok = self.t.f.bin("and", room, enough);
        let reads = self.t.f.bin("and", ok, leads);
        let (mut keys, mut columns) = (Vec::new(), Vec::new());
        for i in 0..EACH {
            let place = self.t.f.add(self.t.tid, i32((i * THREADS).into()));
            let real = self.t.f.cmp("slt", place, total);
            let real = self.t.f.bin("and", real, reads);
            let (mut rank, mut start) = (i32(0), i32(0));
            for (other, &first) in starts.iter().enumerate().skip(1) {
                let beyond = self.t.f.cmp("sge", place, first);
                rank = self.t.f.select(beyond, i32(other as i64), rank);
                start = self.t.f.select(beyond, first, start);
            }
            let within = self.t.f.sub(place, start);
            let within = self.t.f.select(real, within, i32(0));
            let rank = self.t.f.select(real, rank, i32(0));
            let byte = self.t.f.mul(within, i32(CANDIDATE.into()));
            let pair = match team {
                1 => self.t.load_shared(byte, Ty::I32, 2),
                _ => {
                    let at = self.t.f.add(self.t.shared32, byte);
                    isa::load_cluster_pair(&mut self.t.f, at, rank)
                }
            };
            keys.push(self.t.f.select(real, pair[0], i32(0)));
            columns.push(pair[1]);
        }
        keys.append(&mut columns);
        keys.push(self.t.f.cast("zext", ok, Ty::I32));
        keys
    }

    /// Writes the best of the candidates, in order.
    fn finish_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        candidates: &[[Val; 2]],
        all: Val,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let mut own = i32(0);
        for c in candidates {
            let real = self.t.f.cmp("ne", c[0], i32(0));
            let real = self.t.f.cast("zext", real, Ty::I32);
            own = self.t.f.add(own, real);
        }
        let (_, total) = self.group_scan(g, own);
        let choice = self.choose(g, candidates, total, stream.k);
        let members: Vec<(Val, Val)> = candidates.iter().map(|&c| (self.is_chosen(&choice, c), c[1])).collect();
        self.in_order(g, &members, all, &mut |e, column, place| {
            let number = e.number_of(stream, column)?;
            e.put(numbers, number, place, stores)
        })?;
        self.fill_up(stream.k, total, numbers, stores)
    }

    /// Writes −1 to the places behind so many.
    pub fn fill_up(&mut self, k: u32, count: Val, numbers: ValueId, stores: Stores<'_, 'a>) -> Result<(), String> {
        let from = self.t.f.intrinsic("smin", &[count, i32(k.into())]);
        let from = self.t.f.add(from, self.t.tid);
        let l = self.t.f.open_loop(from, i32(k.into()), &[]);
        self.put(numbers, i32(-1), l.args[0], stores)?;
        self.t.f.close_loop(&l, i32(THREADS.into()), &[]);
        Ok(())
    }
}
