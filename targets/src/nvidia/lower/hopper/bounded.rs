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
//! more; two barriers of the cluster.

use super::emit::Emit;
use super::filter::{BATCH, CANDIDATE, LOWEST, Stores, WORK};
use super::group::{self, Group};
use super::ptx;
use super::select::{BOUNDS, COUNT, COUNTS, MOST, OUT, OUT_BYTES, Stream, THREADS, VERDICT};
use super::window::{VECTOR, Window};
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32};
use dsc_ir::tile::ValueId;

/// Groups of a thread: columns at the same place of every second of its vectors.
const GROUPS: u32 = 2 * VECTOR;
/// Candidates of a thread of the first block.
const EACH: u32 = 8;
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
        self.begin_listing();
        let first = self.first_vector(rank);
        let part = Part { first, step: THREADS * team, rank, leads };
        let (values, largest) = self.largest_of_groups(w, &part, (vectors, columns));
        let most = largest[1..].iter().fold(largest[0], |most, &v| ptx::larger(&mut self.t.f, most, v));
        if columns == Columns::Registers {
            self.group_clear_bits(g);
        }
        let bound = self.bound(stream.k, g, &largest);
        if team > 1 {
            ptx::cluster_wait(&mut self.t.f);
        }
        self.list_bounded(w, &part, (vectors, &values), bound);
        self.tell_most(most);
        self.group_wait(g);
        let (counts, bounds) = self.told_bounds(rank, bound);
        let ok = self.enough(stream.k, &counts, bounds[1]);
        if columns == Columns::Twice {
            self.group_clear_bits(g);
        }
        let [tries, join] = [0; 2].map(|_| self.t.f.label());
        self.t.f.cond_br(ok, (tries, &[]), (join, &[i32(0)]));
        self.t.f.start(tries, &[]);
        let done = self.finish_bounded(stream, g, (w, columns), &part, (&counts, bounds), numbers, stores)?;
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
        let keys: Vec<Val> = largest.iter().map(|&v| self.key(v)).collect();
        self.group_wait(g);
        let own = k.div_ceil(team);
        let (wanted, slack) = if team > 1 {
            let wanted = own + 4 * own.isqrt();
            (wanted, wanted / 16)
        } else {
            (own, own / 8)
        };
        let all = (i32(1), i32(-2), i32(32));
        let wanted = (i32(wanted.into()), i32(slack.into()));
        let found = self.search(g, all, wanted, &mut |e, count| keys.iter().for_each(|&key| count(e, key)));
        self.t.f.intrinsic("umax", &[found.low, i32(LOWEST)])
    }

    /// Lists the columns of this block that are no smaller than `bound`, in any order.
    fn list_bounded(&mut self, w: &Window, part: &Part, (vectors, values): (u32, &[Val]), bound: Val) {
        let room = EACH * THREADS / self.s.team;
        let list = (self.list_of(part.rank, room), room);
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

    /// How many candidates each block has listed, and the least and the largest of their bounds. The block's list is complete.
    fn told_bounds(&mut self, rank: Val, bound: Val) -> (Vec<Val>, [Val; 2]) {
        let team = self.s.team;
        if team == 1 {
            return (self.t.load_shared(i32(COUNT.into()), Ty::I32, 1), [bound; 2]);
        }
        let count = self.t.load_shared(i32(COUNT.into()), Ty::I32, 1)[0];
        let slot = self.t.f.mul(rank, i32(4));
        for (at, word) in [(COUNTS, count), (BOUNDS, bound)] {
            let at = self.t.f.add(slot, i32(at.into()));
            self.tell_all(at, word);
        }
        self.together();
        let mut told = |at: u32| -> Vec<Val> {
            (0..team).flat_map(|i| self.t.load_shared(i32((at + 4 * i).into()), Ty::I32, 1)).collect()
        };
        let (counts, bounds) = (told(COUNTS), told(BOUNDS));
        let of_all =
            |e: &mut Self, how: &str| bounds[1..].iter().fold(bounds[0], |all, &b| e.t.f.intrinsic(how, &[all, b]));
        let ends = [of_all(self, "umin"), of_all(self, "umax")];
        (counts, ends)
    }

    /// Whether lists had room, and have all that can be selected or as many as are.
    fn enough(&mut self, k: u32, counts: &[Val], highest: Val) -> Val {
        let room = EACH * THREADS / self.s.team;
        let mut ok = Val::Int(1, Ty::I1);
        let mut total = i32(0);
        for &count in counts {
            let fits = self.t.f.cmp("sle", count, i32(room.into()));
            ok = self.t.f.bin("and", ok, fits);
            total = self.t.f.add(total, count);
        }
        let many = self.t.f.cmp("sge", total, i32(k.into()));
        let everything = self.t.f.cmp("eq", highest, i32(LOWEST));
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
        (counts, [least, highest]): (&[Val], [Val; 2]),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<Val, String> {
        let team = self.s.team;
        let first = self.t.f.open_if(part.leads);
        let list = self.own_list(counts);
        // Without registers for columns there are none for candidates.
        let held = columns == Columns::Registers;
        let candidates = self.own_candidates(list, !held);
        let most = self.t.load_shared(i32(MOST.into()), Ty::I32, 1)[0];
        let mut all = |e: &mut Self, take: &mut dyn FnMut(&mut Self, &[[Val; 2]])| {
            let kept = if held { Vec::new() } else { e.kept_candidates(list) };
            take(e, if held { &candidates } else { &kept });
        };
        let choice = self.choose(g, [least, most], (stream.k, 0), &mut all);
        let right = self.t.f.cmp("uge", choice.best.low, highest);
        if team > 1 {
            let verdict = self.t.f.cast("zext", right, Ty::I32);
            self.tell_all(i32(VERDICT.into()), verdict);
            ptx::cluster_arrive(&mut self.t.f);
        }
        let after = self.t.f.open_if(right);
        let total = counts[1..].iter().fold(counts[0], |sum, &n| self.t.f.add(sum, n));
        self.write_chosen(stream, g, w, (&choice, total), &mut all, numbers, stores)?;
        self.t.f.close_if(after);
        self.t.f.close_if(first);
        if team == 1 {
            // The bound is one of all columns.
            return Ok(i32(1));
        }
        let follows = self.t.f.bin("xor", part.leads, Val::Int(1, Ty::I1));
        let others = self.t.f.open_if(follows);
        ptx::cluster_arrive(&mut self.t.f);
        self.t.f.close_if(others);
        ptx::cluster_wait(&mut self.t.f);
        Ok(self.t.load_shared(i32(VERDICT.into()), Ty::I32, 1)[0])
    }

    /// Writes a word at a byte of each block's shared memory.
    fn tell_all(&mut self, byte: Val, word: Val) {
        let to = self.t.f.cmp("slt", self.t.tid, i32(self.s.team.into()));
        let tid = self.t.tid;
        self.t.when(to, |t| {
            let at = t.f.add(t.shared32, byte);
            let at = ptx::address_in(&mut t.f, at, tid);
            ptx::store_cluster_word(&mut t.f, at, word);
        });
    }
}
