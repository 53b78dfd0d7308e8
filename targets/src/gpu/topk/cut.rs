//! The cut of a row to its `k` best: exact, in place, order kept.
//!
//! The `k`-th largest is found by radix selection over integers that order like the floats, eight bits a pass. They are first shifted
//! so that the range that occurs fills 32 bits: scores that share sign and exponent would otherwise all count in one bin, and the
//! first pass tell little. A pass that needs its whole bin is the last. Then a stable compaction: what is greater, and of what is
//! equal the first so many as still fit. Counts are integers, so the atomic additions to the histograms commute: the result does not
//! depend on the order of threads.

use super::super::block::Threads;
use super::super::mlir::{Ty, Val, i32};
use super::{BATCH, BINS, Scratch, State, bit_here, bits_below, each, key, load, lowest_bit, sum_lanes, word};

/// The cut of one row. All threads, uniformly.
pub(super) struct Cut<'a> {
    s: &'a State,
    scratch: Scratch,
    header: Val,
    values: Val,
    numbers: Val,
    /// Members: more than `k`, where it is run.
    pub(super) count: Val,
}

/// Which keys stay: with `normal = (key - low) << shift`, those whose `normal >> drop` is greater than `bound`, and the first `ties`
/// of those where it is equal.
struct Rule {
    low: Val,
    shift: Val,
    drop: Val,
    bound: Val,
    ties: Val,
}

impl<'a> Cut<'a> {
    pub(super) fn new(t: &mut Threads, s: &'a State, at: u32, scratch: Scratch, row: Val) -> Cut<'a> {
        let header = s.header(t, at, row);
        let (values, numbers) = s.arrays(t, at, row);
        let count = load(t, header, Ty::I32);
        Cut { s, scratch, header, values, numbers, count }
    }

    /// Cuts, and makes room for `waiting` more behind. Ends with a barrier.
    pub(super) fn run(&self, t: &mut Threads, waiting: Val) {
        let (low, shift) = self.range(t);
        let rule = self.find(t, low, shift);
        self.compact(t, &rule);
        let first = t.f.cmp("eq", t.tid, i32(0));
        t.when(first, |t| {
            let k = i32(self.s.k.into());
            let members = t.f.add(k, waiting);
            // The least that a kept value can be: what is not above it would lose.
            let least = t.f.bin("shl", rule.bound, rule.drop);
            let least = t.f.bin("lshr", least, rule.shift);
            let least = t.f.add(least, rule.low);
            let threshold = value_bits(t, least);
            t.store_shared(self.header, &[members, k, threshold, i32(0)]);
        });
        t.barrier();
    }

    /// The smallest key, and the shift that makes the difference to the largest fill 32 bits. Also clears the histograms.
    fn range(&self, t: &mut Threads) -> (Val, Val) {
        each(t, 4 * BINS / 16, |t, i| {
            let byte = t.f.mul(i, i32(16));
            let to = t.f.add(byte, i32(self.scratch.bins.into()));
            t.store_shared(to, &[i32(0); 4]);
        });
        let bounds = (t.tid, self.count, i32(t.threads.into()));
        let range = t.for_loop(bounds, &[i32(-1), i32(0)], |t, i, range| {
            let key = self.key(t, i);
            vec![t.f.intrinsic("umin", &[range[0], key]), t.f.intrinsic("umax", &[range[1], key])]
        });
        let low = t.arch.reduce_warp(t, "umin", range[0]);
        let high = t.arch.reduce_warp(t, "umax", range[1]);
        let first = t.f.cmp("eq", t.lane, i32(0));
        let byte = t.f.mul(t.warp, i32(8));
        let to = t.f.add(byte, i32(self.scratch.range.into()));
        t.when(first, |t| t.store_shared(to, &[low, high]));
        t.barrier();
        let warp = t.f.bin("and", t.lane, i32(i64::from(t.threads / 32) - 1));
        let byte = t.f.mul(warp, i32(8));
        let from = t.f.add(byte, i32(self.scratch.range.into()));
        let pair = t.load_shared(from, Ty::I32, 2);
        let low = t.arch.reduce_warp(t, "umin", pair[0]);
        let high = t.arch.reduce_warp(t, "umax", pair[1]);
        let span = t.f.sub(high, low);
        let span = t.f.bin("or", span, i32(1));
        (low, t.arch.leading_zeros(&mut t.f, span))
    }

    fn key(&self, t: &mut Threads, i: Val) -> Val {
        let at = word(t, self.values, i);
        let value = load(t, at, Ty::F32);
        key(t, value)
    }

    /// Radix selection of the `k`-th largest.
    fn find(&self, t: &mut Threads, low: Val, shift: Val) -> Rule {
        let (pass, done) = (t.f.label(), t.f.label());
        t.f.br(pass, &[i32(24), i32(0), i32(self.s.k.into()), i32(self.scratch.bins.into())]);
        let args = t.f.start(pass, &[Ty::I32; 4]);
        // `bound`: the digits found so far; `ties`: the rank wanted among the keys with these digits.
        let (drop, bound, ties, bins) = (args[0], args[1], args[2], args[3]);
        let bounds = (t.tid, self.count, i32(t.threads.into()));
        t.for_loop(bounds, &[], |t, i, _| {
            let key = self.key(t, i);
            let normal = t.f.sub(key, low);
            let normal = t.f.bin("shl", normal, shift);
            let digits = t.f.bin("lshr", normal, drop);
            let above = t.f.bin("lshr", digits, i32(8));
            let shares = t.f.cmp("eq", above, bound);
            t.when(shares, |t| {
                let digit = t.f.bin("and", digits, i32(255));
                let at = word(t, bins, digit);
                let at = t.f.add(t.shared32, at);
                t.arch.shared_atomic_add(&mut t.f, at, i32(1));
            });
            Vec::new()
        });
        t.barrier();
        let (digit, above, equal) = pick(t, bins, ties);
        let bound = t.f.bin("shl", bound, i32(8));
        let bound = t.f.bin("or", bound, digit);
        let ties = t.f.sub(ties, above);
        // Either all of the bin stay, or its keys are all equal: below `shift` there are only zeros.
        let whole = t.f.cmp("eq", equal, ties);
        let last = t.f.cmp("sle", drop, shift);
        let over = t.f.bin("or", whole, last);
        let next = t.f.sub(drop, i32(8));
        let next_bins = t.f.add(bins, i32(BINS.into()));
        t.f.cond_br(over, (done, &[drop, bound, ties]), (pass, &[next, bound, ties, next_bins]));
        let found = t.f.start(done, &[Ty::I32; 3]);
        Rule { low, shift, drop: found[0], bound: found[1], ties: found[2] }
    }

    /// Moves what stays to the front, in order. A sweep reads a stretch into registers, meets at a barrier and writes, to places
    /// that this sweep or earlier ones have read.
    fn compact(&self, t: &mut Threads, rule: &Rule) {
        let each = self.s.capacity().div_ceil(t.threads).min(BATCH);
        let stretch = i32((t.threads * each).into());
        let slots = i32(self.scratch.kept.into());
        let before = [i32(0), i32(0), slots];
        t.for_loop((i32(0), self.count, stretch), &before, |t, from, before| {
            let mine = t.f.mul(t.warp, i32((32 * each).into()));
            let first = t.f.add(from, mine);
            let first = t.f.add(first, t.lane);
            let members: Vec<Member> = (0..each).map(|e| self.member(t, rule, first, e)).collect();
            let (earlier, all) = self.meet(t, &members, before[2]);
            let [mut greater, mut equal] = [0, 1].map(|i| t.f.add(before[i], earlier[i]));
            for m in &members {
                self.settle(t, rule, m, greater, equal);
                let (g, e) = (t.arch.popcount(&mut t.f, m.greater), t.arch.popcount(&mut t.f, m.equal));
                greater = t.f.add(greater, g);
                equal = t.f.add(equal, e);
            }
            let turn = t.f.sub(i32(i64::from(self.scratch.kept) * 2 + i64::from(t.threads / 32) * 4), before[2]);
            vec![t.f.add(before[0], all[0]), t.f.add(before[1], all[1]), turn]
        });
    }

    fn member(&self, t: &mut Threads, rule: &Rule, first: Val, e: u32) -> Member {
        let i = t.f.add(first, i32((32 * e).into()));
        let inside = t.f.cmp("slt", i, self.count);
        let i = t.f.intrinsic("smin", &[i, i32(i64::from(self.s.capacity()) - 1)]);
        let (value_at, number_at) = (word(t, self.values, i), word(t, self.numbers, i));
        let (value, number) = (load(t, value_at, Ty::F32), load(t, number_at, Ty::I32));
        let key = key(t, value);
        let normal = t.f.sub(key, rule.low);
        let normal = t.f.bin("shl", normal, rule.shift);
        let digits = t.f.bin("lshr", normal, rule.drop);
        let greater = t.f.cmp("ugt", digits, rule.bound);
        let greater = t.f.bin("and", inside, greater);
        let equal = t.f.cmp("eq", digits, rule.bound);
        let equal = t.f.bin("and", inside, equal);
        let (greater, equal) = (t.arch.ballot(t, greater), t.arch.ballot(t, equal));
        Member { value, number, greater, equal }
    }

    /// Exchanges the warps' counts of greater and equal members: those of the warps before this one, and of all.
    fn meet(&self, t: &mut Threads, members: &[Member], slots: Val) -> ([Val; 2], [Val; 2]) {
        // Both counts in a word: a stretch has at most 1024 * 8 members.
        let mut counts = i32(0);
        for m in members {
            let (g, e) = (t.arch.popcount(&mut t.f, m.greater), t.arch.popcount(&mut t.f, m.equal));
            let e = t.f.bin("shl", e, i32(16));
            let both = t.f.add(g, e);
            counts = t.f.add(counts, both);
        }
        let first = t.f.cmp("eq", t.lane, i32(0));
        let to = word(t, slots, t.warp);
        t.when(first, |t| t.store_shared(to, &[counts]));
        t.barrier();
        let warps = i64::from(t.threads / 32);
        let other = t.f.bin("and", t.lane, i32(warps - 1));
        let from = word(t, slots, other);
        let theirs = load(t, from, Ty::I32);
        let real = t.f.cmp("slt", t.lane, i32(warps));
        let earlier = t.f.cmp("slt", t.lane, t.warp);
        [earlier, real]
            .map(|counted| {
                let counted = t.f.select(counted, theirs, i32(0));
                let sum = t.arch.reduce_warp(t, "add", counted);
                [t.f.bin("and", sum, i32(0xffff)), t.f.bin("lshr", sum, i32(16))]
            })
            .into()
    }

    /// Writes a member to its place if it stays, with `greater` and `equal` ones before its warp's 32.
    fn settle(&self, t: &mut Threads, rule: &Rule, m: &Member, greater: Val, equal: Val) {
        let (is_greater, is_equal) = (bit_here(t, m.greater), bit_here(t, m.equal));
        let (g, e) = (bits_below(t, m.greater), bits_below(t, m.equal));
        let (greater, equal) = (t.f.add(greater, g), t.f.add(equal, e));
        let fits = t.f.cmp("slt", equal, rule.ties);
        let tie = t.f.bin("and", is_equal, fits);
        let stays = t.f.bin("or", is_greater, tie);
        t.when(stays, |t| {
            let ties = t.f.intrinsic("smin", &[equal, rule.ties]);
            let position = t.f.add(greater, ties);
            let (value_to, number_to) = (word(t, self.values, position), word(t, self.numbers, position));
            t.store_shared(value_to, &[m.value]);
            t.store_shared(number_to, &[m.number]);
        });
    }
}

/// A candidate in a thread's registers, and the ballots of its warp's 32.
struct Member {
    value: Val,
    number: Val,
    greater: Val,
    equal: Val,
}

/// The float's bits for a [`key`].
fn value_bits(t: &mut Threads, key: Val) -> Val {
    let positive = t.f.bin("ashr", key, i32(31));
    let negative = t.f.bin("xor", positive, i32(-1));
    let flip = t.f.bin("or", negative, i32(i32::MIN.into()));
    t.f.bin("xor", key, flip)
}

/// The highest bin at byte `bins` down to which there are `wanted` keys: its digit, the keys above it, and those in it. Every warp finds
/// it for itself.
fn pick(t: &mut Threads, bins: Val, wanted: Val) -> (Val, Val, Val) {
    // Lane 0 has the highest eight.
    let from_top = t.f.sub(i32(31), t.lane);
    let byte = t.f.mul(from_top, i32(32));
    let at = t.f.add(bins, byte);
    let high_at = t.f.add(at, i32(16));
    let mut counts = t.load_shared(at, Ty::I32, 4);
    counts.extend(t.load_shared(high_at, Ty::I32, 4));
    let mine = counts[1..].iter().fold(counts[0], |sum, &n| t.f.add(sum, n));
    let sum = sum_lanes(t, mine, 32);
    let reached = t.f.cmp("sge", sum, wanted);
    let reached = t.arch.ballot(t, reached);
    let lane = lowest_bit(t, reached);
    let mut above = t.f.sub(sum, mine);
    // From the lowest bin up: the first one found from the top overwrites the others.
    let mut tops = Vec::new();
    for &n in counts.iter().rev() {
        tops.push(above);
        above = t.f.add(above, n);
    }
    let first = t.f.mul(from_top, i32(8));
    let mut found = (first, tops[7], counts[0]);
    for (b, &n) in counts.iter().enumerate().skip(1) {
        let top = tops[7 - b];
        let sum = t.f.add(top, n);
        let reaches = t.f.cmp("sge", sum, wanted);
        let digit = t.f.add(first, i32(b as i64));
        found =
            (t.f.select(reaches, digit, found.0), t.f.select(reaches, top, found.1), t.f.select(reaches, n, found.2));
    }
    let mut get = |v| t.arch.shuffle_from(t, v, lane);
    (get(found.0), get(found.1), get(found.2))
}
