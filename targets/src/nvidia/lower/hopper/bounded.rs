//! The best of a row of some thousand columns, without counting all of it: what the largest of small groups say bounds what is selected.
//!
//! 1. Each thread has some columns in registers and the largest of each of [`GROUPS`] groups of them. `k` groups have a member no smaller than the `k`-th
//!    largest of those, so none of the selected is smaller: that is found by radix of few words ([`super::group`]), and as soon as it is near.
//! 2. What is as large is listed in the first block's shared memory: for a row without order half as many again as are wanted. Groups are of columns far apart, so
//!    that a row that rises or falls has as few.
//! 3. The first block finds the best of these exactly and puts them in order, each thread a few candidates in registers.
//!
//! **Several blocks** have every so many vectors of the row each, and bounds of their own: a block's part of `k`, and four standard deviations of what
//! chance makes of that. None is told another's bound before it lists. What is selected is right if no bound is above the last that is selected,
//! which the first block sees and tells. Where that is not so, or a list has no room, the row is selected from in the way that always works.
//!
//! **Where blocks share a multiprocessor** a thread has no registers for its columns: they are read twice, half of them the second time from shared memory, where lists and order
//! leave room.
//!
//! **Cost.** One read of the row (two, the second from the cache, of a half); by count of the code some 15 instructions a column of a thread, and 900
//! more; two exchanges of the cluster.

use super::emit::Emit;
use super::filter::{BATCH, CANDIDATE, LOWEST, SELECTABLE, Stores, WORK};
use super::group::{self, Group};
use super::ptx;
use super::select::{COUNT, COUNTS, HEARD, JUDGED, LISTED, MOST, OUT, OUT_BYTES, Stream, THREADS, VERDICT};
use super::sends;
use super::window::{VECTOR, Window};
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32};
use dsc_ir::tile::ValueId;

/// Groups of a thread: columns at the same place of every second of its vectors.
const GROUPS: u32 = 2 * VECTOR;
/// Candidates of a thread of the first block.
const EACH: u32 = 8;
/// Bytes of what a block says of its list to each.
const SAID: u32 = 16;
/// Bytes of lists, and of a block's vector a thread.
const LISTS: u32 = EACH * THREADS * CANDIDATE;
const SLOT: u32 = VECTOR * 4 * THREADS;
/// Most columns selected: of so many groups of a block alone the bound is still a bound, and lists have room.
pub const MOST_K: u32 = GROUPS * THREADS / 2;
const _: () = assert!(2 * MOST_K <= EACH * THREADS && LISTS <= WORK);

/// How a thread has its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    Registers,
    /// Read again when they are listed.
    Twice,
}

/// What the running block does in a selection.
#[derive(Clone, Copy)]
struct Part {
    /// Its warp's first vector, and from one vector of a lane to its next.
    first: Val,
    step: u32,
    rank: Val,
    leads: Val,
}

/// What blocks say of their lists.
struct Told {
    /// Candidates of each.
    counts: Vec<Val>,
    /// The least and the highest of their bounds.
    least: Val,
    highest: Val,
    /// The largest of their keys; of one block it is in its memory.
    most: Option<Val>,
}

impl<'a> Emit<'a> {
    /// Selects from a row of which each thread of the cluster has so many vectors, a multiple of [`BATCH`], whether that was possible (i32), which all blocks
    /// agree on: then the result is written.
    pub fn bounded_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        (w, vectors, columns): (&Window, u32, Columns),
        (rank, leads): (Val, Val),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let team = self.s.team;
        self.begin_exchange();
        let first = self.first_vector(rank);
        let part = Part { first, step: THREADS * team, rank, leads };
        let (values, largest) = self.largest_of_groups(w, &part, (vectors, columns));
        let most = largest[1..].iter().fold(largest[0], |most, &v| ptx::larger(&mut self.t.f, most, v));
        if columns == Columns::Registers {
            self.group_clear_bits(g);
        }
        let bound = self.bound(stream.k, g, &largest);
        self.list_bounded(w, &part, (vectors, &values), bound);
        self.tell_most(most, false);
        self.group_wait(g);
        let told = if team > 1 { self.exchange(&part, bound) } else { self.own_told(bound) };
        let ok = self.enough(stream.k, &told);
        if columns == Columns::Twice {
            self.group_clear_bits(g);
        }
        let [tries, join] = [0; 2].map(|_| self.t.f.label());
        self.t.f.cond_br(ok, (tries, &[]), (join, &[i32(0)]));
        self.t.f.start(tries, &[]);
        let done = self.finish_bounded(stream, g, (w, columns), &part, &told, numbers, stores)?;
        self.t.f.br(join, &[done]);
        let done = self.t.f.start(join, &[Ty::I32])[0];
        // Whoever goes another way has read what that one writes over.
        self.group_wait(g);
        Ok(done)
    }

    /// A batch of the running lane's vectors.
    fn own_batch(&mut self, w: &Window, part: &Part, batch: u32, again: bool) -> Vec<Val> {
        let first = self.t.f.add(part.first, i32((batch * BATCH * part.step).into()));
        self.batch(w, (first, part.step, BATCH), again)
    }

    /// The running thread's columns, if it keeps them, and the largest of each group of them.
    fn largest_of_groups(
        &mut self,
        w: &Window,
        part: &Part,
        (vectors, columns): (u32, Columns),
    ) -> (Vec<Val>, Vec<Val>) {
        let mut values = Vec::new();
        let mut largest = vec![f32(f32::NEG_INFINITY); GROUPS as usize];
        for batch in 0..vectors / BATCH {
            let some = self.own_batch(w, part, batch, false);
            for (i, &v) in some.iter().enumerate() {
                let most = &mut largest[i % GROUPS as usize];
                *most = ptx::larger(&mut self.t.f, *most, v);
            }
            match columns {
                Columns::Registers => values.extend(some),
                Columns::Twice => self.keep(batch, &some),
            }
        }
        (values, largest)
    }

    /// Where a thread's vector of that number stays in shared memory while the row is read for the first time: where nothing else is until the
    /// row has been read twice. None if there is no room.
    fn slot(&mut self, number: u32) -> Option<Val> {
        let order = WORK + group::bits(THREADS);
        let regions = [(LISTS, WORK), (order, WORK + group::bytes(THREADS)), (OUT, OUT + OUT_BYTES)];
        let slots = regions.into_iter().flat_map(|(from, to)| (from..=to.saturating_sub(SLOT)).step_by(SLOT as usize));
        let at = slots.clone().nth(number as usize)?;
        let own = self.t.f.mul(self.t.tid, i32((4 * VECTOR).into()));
        Some(self.t.f.add(own, i32(at.into())))
    }

    fn keep(&mut self, batch: u32, values: &[Val]) {
        for (i, vector) in values.chunks(VECTOR as usize).enumerate() {
            let Some(at) = self.slot(batch * BATCH + i as u32) else { return };
            self.t.store_shared(at, vector);
        }
    }

    /// A batch once more: from shared memory, or from the row if not all of it is there.
    fn batch_again(&mut self, w: &Window, part: &Part, batch: u32) -> Vec<Val> {
        let slots: Vec<Val> = (0..BATCH).map_while(|i| self.slot(batch * BATCH + i)).collect();
        if slots.len() < BATCH as usize {
            return self.own_batch(w, part, batch, true);
        }
        slots.into_iter().flat_map(|at| self.t.load_shared(at, Ty::F32, VECTOR)).collect()
    }

    /// A key, at least [`LOWEST`], that no column of this block is below that is selected, in all likelihood if there are other blocks.
    fn bound(&mut self, k: u32, g: &Group, largest: &[Val]) -> Val {
        let team = self.s.team;
        let keys: Vec<Val> = largest.iter().map(|&v| self.selectable(v)).collect();
        self.group_wait(g);
        let own = k.div_ceil(team);
        let (wanted, slack) = if team > 1 {
            let wanted = own + 4 * own.isqrt();
            (wanted, wanted / 16)
        } else {
            (own, own / 8)
        };
        let all = SELECTABLE.map(i32).into();
        let wanted = (i32(wanted.into()), i32(slack.into()));
        let found = self.search(g, all, wanted, &mut |e, count| keys.iter().for_each(|&key| count(e, key)));
        found.low
    }

    /// Lists the columns of this block that are no smaller than `bound`, in any order.
    fn list_bounded(&mut self, w: &Window, part: &Part, (vectors, values): (u32, &[Val]), bound: Val) {
        let room = EACH * THREADS / self.s.team;
        let list = (self.own_list_of(part.rank, room), room, false);
        let least = self.value(bound);
        if !values.is_empty() {
            return self.list_values(w, list, (part.first, part.step), values, least);
        }
        for batch in 0..vectors / BATCH {
            let some = self.batch_again(w, part, batch);
            let first = self.t.f.add(part.first, i32((batch * BATCH * part.step).into()));
            self.list_values(w, list, (first, part.step), &some, least);
        }
    }

    /// Counts what is listed from nothing on, and makes barriers of what blocks send each other.
    fn begin_exchange(&mut self) {
        let team = self.s.team;
        let zero = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(zero, |t| {
            t.store_shared(i32(COUNT.into()), &[i32(0); 2]);
            if team == 1 {
                return;
            }
            sends::make_barriers(t, &[(HEARD, 1, SAID * team), (LISTED, 1, 0), (JUDGED, 1, 4)]);
        });
        if team > 1 {
            ptx::cluster_arrive_relaxed(&mut self.t.f);
        }
    }

    /// What a block that is alone says.
    fn own_told(&mut self, bound: Val) -> Told {
        let counts = self.t.load_shared(i32(COUNT.into()), Ty::I32, 1);
        Told { counts, least: bound, highest: bound, most: None }
    }

    /// Sends the first block this block's list, and all blocks what it says of it: what all say. The list is complete; the first block has all of them then. No
    /// fence waits for what is under way: barriers count its bytes.
    fn exchange(&mut self, part: &Part, bound: Val) -> Told {
        let team = self.s.team;
        let room = EACH * THREADS / team;
        let own = self.t.load_shared(i32(COUNT.into()), Ty::I32, 2);
        // All barriers are there.
        ptx::cluster_wait(&mut self.t.f);
        let follows = self.t.f.bin("xor", part.leads, Val::Int(1, Ty::I1));
        let fits = self.t.f.cmp("sle", own[0], i32(room.into()));
        let sends = self.t.f.bin("and", follows, fits);
        let sent = self.t.f.select(sends, own[0], i32(0));
        let list = self.t.f.mul(part.rank, i32((room * CANDIDATE).into()));
        for first in (0..room).step_by(THREADS as usize) {
            let place = self.t.f.add(self.t.tid, i32(first.into()));
            let here = self.t.f.cmp("slt", place, sent);
            let byte = self.t.f.mul(place, i32(CANDIDATE.into()));
            self.t.when(here, |t| {
                let byte = t.f.add(list, byte);
                let pair = t.load_shared(byte, Ty::I32, 2);
                let at = t.f.add(t.shared32, byte);
                let barrier = t.f.add(t.shared32, i32(LISTED.into()));
                let [at, barrier] = [at, barrier].map(|at| ptx::address_in(&mut t.f, at, i32(0)));
                ptx::send_words(&mut t.f, at, barrier, &pair);
            });
        }
        let slot = self.t.f.mul(part.rank, i32(SAID.into()));
        let slot = self.t.f.add(slot, i32(COUNTS.into()));
        self.send_all((slot, HEARD), &[own[0], bound, own[1], i32(0)]);
        self.wait_for(HEARD);
        let told = self.all_told();
        let leader = self.t.f.open_if(part.leads);
        let lists = told.counts[1..].to_vec();
        let one = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(one, |t| {
            let mut bytes = i32(0);
            for count in lists {
                let fits = t.f.cmp("sle", count, i32(room.into()));
                let count = t.f.select(fits, count, i32(0));
                bytes = t.f.add(bytes, count);
            }
            let bytes = t.f.mul(bytes, i32(CANDIDATE.into()));
            let barrier = t.f.add(t.shared32, i32(LISTED.into()));
            ptx::barrier_expect_some(&mut t.f, barrier, bytes);
        });
        self.wait_for(LISTED);
        self.t.f.close_if(leader);
        told
    }

    /// What all blocks have said.
    fn all_told(&mut self) -> Told {
        let mut said = Vec::new();
        for i in 0..self.s.team {
            said.push(self.t.load_shared(i32((COUNTS + SAID * i).into()), Ty::I32, 4));
        }
        let mut of_all = |how: &str, word: usize| {
            said[1..].iter().fold(said[0][word], |all, one| self.t.f.intrinsic(how, &[all, one[word]]))
        };
        let (least, highest, most) = (of_all("umin", 1), of_all("umax", 1), of_all("umax", 2));
        Told { counts: said.iter().map(|one| one[0]).collect(), least, highest, most: Some(most) }
    }

    /// Whether lists had room, and have all that can be selected or as many as are.
    fn enough(&mut self, k: u32, told: &Told) -> Val {
        let room = EACH * THREADS / self.s.team;
        let mut ok = Val::Int(1, Ty::I1);
        let mut total = i32(0);
        for &count in &told.counts {
            let fits = self.t.f.cmp("sle", count, i32(room.into()));
            ok = self.t.f.bin("and", ok, fits);
            total = self.t.f.add(total, count);
        }
        let many = self.t.f.cmp("sge", total, i32(k.into()));
        let everything = self.t.f.cmp("eq", told.highest, i32(LOWEST));
        let many = self.t.f.bin("or", many, everything);
        self.t.f.bin("and", ok, many)
    }

    /// Where the first of the running thread's candidates is, and how many of its list's are from there on; they are so many bytes apart.
    fn own_list(&mut self, counts: &[Val]) -> (Val, Val, u32) {
        let threads = THREADS / self.s.team;
        let number = self.t.f.div(self.t.tid, threads);
        let own = self.t.f.rem(self.t.tid, threads);
        let mut count = counts[0];
        for (i, &n) in counts.iter().enumerate().skip(1) {
            let here = self.t.f.cmp("eq", number, i32(i as i64));
            count = self.t.f.select(here, n, count);
        }
        let list = self.t.f.mul(number, i32((EACH * threads * CANDIDATE).into()));
        let byte = self.t.f.mul(own, i32(CANDIDATE.into()));
        (self.t.f.add(list, byte), self.t.f.sub(count, own), threads * CANDIDATE)
    }

    /// The running thread's candidates: key, 0 for none, and column. `keep`: they come to lie where they were, as what they are.
    fn own_candidates(&mut self, (first, count, apart): (Val, Val, u32), keep: bool) -> Vec<[Val; 2]> {
        let mut candidates = Vec::new();
        for i in 0..EACH {
            let real = self.t.f.cmp("sgt", count, i32((i * apart / CANDIDATE).into()));
            let at = self.t.f.add(first, i32((i * apart).into()));
            let pair = self.t.load_shared(at, Ty::I32, 2);
            let value = self.t.f.cast("bitcast", pair[0], Ty::F32);
            let key = self.ordered(value);
            let key = self.t.f.select(real, key, i32(0));
            if keep {
                self.t.store_shared(at, &[key, pair[1]]);
            }
            candidates.push([key, pair[1]]);
        }
        candidates
    }

    /// Those that were kept.
    fn kept_candidates(&mut self, (first, _, apart): (Val, Val, u32)) -> Vec<[Val; 2]> {
        let mut candidates = Vec::new();
        for i in 0..EACH {
            let at = self.t.f.add(first, i32((i * apart).into()));
            let pair = self.t.load_shared(at, Ty::I32, 2);
            candidates.push([pair[0], pair[1]]);
        }
        candidates
    }

    /// The first block writes the best of the candidates, in order, if no block's bound is above them; whether that was so (i32).
    #[allow(clippy::too_many_arguments, reason = "what the ways to select have in common, and what was listed")]
    fn finish_bounded(
        &mut self,
        stream: &Stream,
        g: &Group,
        (w, columns): (&Window, Columns),
        part: &Part,
        told: &Told,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let team = self.s.team;
        let first = self.t.f.open_if(part.leads);
        let list = self.own_list(&told.counts);
        // Without registers for columns there are none for candidates.
        let held = columns == Columns::Registers;
        let candidates = self.own_candidates(list, !held);
        let most = told.most.unwrap_or_else(|| self.t.load_shared(i32(MOST.into()), Ty::I32, 1)[0]);
        let mut all = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| {
            let kept = if held { Vec::new() } else { e.kept_candidates(list) };
            take(e, if held { &candidates } else { &kept });
        };
        let choice = self.choose(g, [told.least, most], (stream.k, 0), &mut all);
        let right = self.t.f.cmp("uge", choice.best.low, told.highest);
        if team > 1 {
            let verdict = self.t.f.cast("zext", right, Ty::I32);
            self.send_all((i32(VERDICT.into()), JUDGED), &[verdict]);
        }
        let after = self.t.f.open_if(right);
        let counts = &told.counts;
        let total = counts[1..].iter().fold(counts[0], |sum, &n| self.t.f.add(sum, n));
        self.write_chosen(stream, g, w, (&choice, total), &mut all, numbers, stores)?;
        self.t.f.close_if(after);
        self.t.f.close_if(first);
        if team == 1 {
            // The bound is one of all columns.
            return Ok(i32(1));
        }
        self.wait_for(JUDGED);
        Ok(self.t.load_shared(i32(VERDICT.into()), Ty::I32, 1)[0])
    }
}
