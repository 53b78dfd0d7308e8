//! What a group of threads does with candidates of a selection: finds the best, and puts their numbers in order.
//!
//! A candidate is a key, an integer that orders like the value and is 0 for none, and its number. Who has candidates, in registers or in
//! memory, hands each of them to what is done here.
//!
//! **Search.** The `k`-th largest word is found by radix, as many bits a pass as there are bins for; it ends early when all that have
//! the digits found so far are wanted. The digits are those of the distance from the least word that there may be, leading zeros
//! left out: the best of a row are often alike in their first bits, and would all be counted in a few bins, one after another. Where more
//! are equal to the last than have room, a second search takes those of the lowest numbers.
//!
//! **Order.** Numbers become bits of a window in shared memory; counts of the bits before a number are its place. So the result is in
//! ascending order, and neither it nor what is selected depends on which thread has what.

use super::emit::Emit;
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32};

/// Threads that work together, seen by one of them.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// First byte of its shared memory, of [`bytes`].
    pub base: Val,
    /// Number of the thread, and of its warp, in the group.
    pub tid: Val,
    pub warp: Val,
    pub threads: u32,
    /// The group's named barrier; none if it is the block.
    pub barrier: Option<Val>,
}

/// Bytes of the group's memory where things start: what a pass finds, totals of warps, largest of warps, a word a lane that no one reads, a histogram, which is zero
/// but in a pass, then bits, and counts before each two words of them.
const FOUND: u32 = 0;
const SCAN: u32 = 16;
const MOST: u32 = SCAN + 128;
const OTHERS: u32 = MOST + 128;
const HISTOGRAM: u32 = OTHERS + 4 * Arch::WARP;

/// Bins of a histogram.
pub const fn bins(threads: u32) -> u32 {
    if threads < 256 { 1024 } else { 2048 }
}

/// Words of bits: numbers that are put in order at a time are 32 times as many.
const fn words(threads: u32) -> u32 {
    if threads < 256 { 1024 } else { 4096 }
}

/// Where the bits are.
pub const fn bits(threads: u32) -> u32 {
    HISTOGRAM + 4 * bins(threads)
}

/// Bytes of shared memory of a group of so many threads, a power of two from 128 to 1024.
pub const fn bytes(threads: u32) -> u32 {
    bits(threads) + 4 * words(threads) + 2 * words(threads)
}

/// What a pass of a search counts: words from `low` on, up to `last` larger, by their distance from it without the last `shift` bits.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    pub low: Val,
    pub last: Val,
    pub shift: Val,
    /// Address of the histogram.
    pub histogram: Val,
    /// Address of where the running lane counts all others.
    pub others: Val,
}

/// A search's result: words above `low + last` are in, and `ties` of those from `low` on: all of them if `done`.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    pub low: Val,
    pub last: Val,
    pub ties: Val,
    pub done: Val,
}

/// The best of candidates.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    pub best: Found,
    /// Of those that tie, those whose inverted number is at least this.
    least: Val,
}

/// A window of numbers that are put in order: how many were given out before, where its bits and counts are.
struct Bits {
    given: Val,
    bits_at: u32,
    counts_at: u32,
}

/// Hands each word of the running thread to what counts it.
pub type Words<'w, 'a> = &'w mut dyn FnMut(&mut Emit<'a>, &mut dyn FnMut(&mut Emit<'a>, Val));

/// Hands the candidates of the running thread, of each its key or whether it is in and its number, to what takes them: as many at a time as it has in registers.
pub type Members<'m, 'a> = &'m mut dyn FnMut(&mut Emit<'a>, &mut dyn FnMut(&mut Emit<'a>, &[[Val; 2]]));
/// Takes a number, its place, and whether it is in.
pub type Put<'p, 'a> = &'p mut dyn FnMut(&mut Emit<'a>, Val, Val, Val);

/// Adds up bins of all blocks of a pass of that number.
pub type Merge<'m, 'a> = &'m mut dyn FnMut(&mut Emit<'a>, Vec<Val>, Val) -> Vec<Val>;

impl<'a> Emit<'a> {
    /// The sum of the lanes up to this one.
    pub fn sum_upto(&mut self, v: Val) -> Val {
        let mut sum = v;
        for by in [1, 2, 4, 8, 16] {
            let f = &mut self.t.f;
            // Where warps are many, or do other things too, comparisons of the lane cost no register.
            if self.sharing > 1 || !self.s.roles.is_empty() {
                let has = f.cmp("sge", self.t.lane, i32(by.into()));
                let below = isa::shuffle_up(f, sum, by);
                let below = f.select(has, below, i32(0));
                sum = f.add(sum, below);
            } else {
                let (below, has) = isa::shuffle_up_if(f, sum, by);
                sum = ptx::add_if(f, has, sum, below);
            }
        }
        sum
    }

    pub fn group_wait(&mut self, g: &Group) {
        match g.barrier {
            Some(barrier) => ptx::barrier_of(&mut self.t.f, barrier, g.threads),
            None => self.t.barrier(),
        }
    }

    /// Byte of word `i` of an array of the group's memory.
    fn group_word(&mut self, g: &Group, at: u32, i: Val) -> Val {
        let byte = self.t.f.mul(i, i32(4));
        let at = self.t.f.add(byte, i32(at.into()));
        self.t.f.add(g.base, at)
    }

    /// An integer that orders like the float; both zeros give the same.
    pub fn ordered(&mut self, v: Val) -> Val {
        let f = &mut self.t.f;
        let v = f.bin("fadd", v, f32(0.0));
        let bits = f.cast("bitcast", v, Ty::I32);
        let sign = f.bin("ashr", bits, i32(31));
        let flip = f.bin("or", sign, i32(i32::MIN.into()));
        f.bin("xor", bits, flip)
    }

    /// The same, of a value that cannot be selected less than of any that can.
    pub fn selectable(&mut self, v: Val) -> Val {
        let v = ptx::larger(&mut self.t.f, v, f32(f32::NEG_INFINITY));
        self.ordered(v)
    }

    /// The float of [`Self::ordered`].
    pub fn value(&mut self, key: Val) -> Val {
        let f = &mut self.t.f;
        let sign = f.bin("ashr", key, i32(31));
        let flip = f.bin("xor", sign, i32(-1));
        let flip = f.bin("or", flip, i32(i32::MIN.into()));
        let bits = f.bin("xor", key, flip);
        f.cast("bitcast", bits, Ty::F32)
    }

    /// Empties the histogram: before the first search, and a barrier.
    pub fn group_clear(&mut self, g: &Group) {
        let each = bins(g.threads) / g.threads;
        let first = self.t.f.mul(g.tid, i32(each.into()));
        let own = self.group_word(g, HISTOGRAM, first);
        self.store_zeros(own, each);
    }

    /// Empties the bits: before numbers are put in order, and a barrier.
    pub fn group_clear_bits(&mut self, g: &Group) {
        let own = words(g.threads) / g.threads;
        let first = self.t.f.mul(g.tid, i32(own.into()));
        let own_bits = self.group_word(g, bits(g.threads), first);
        self.store_zeros(own_bits, own);
    }

    /// Writes so many zeros, a multiple of two, at a byte of shared memory.
    fn store_zeros(&mut self, byte: Val, count: u32) {
        let n = count.min(4);
        for i in (0..count).step_by(n as usize) {
            let at = self.t.f.add(byte, i32((4 * i).into()));
            self.t.store_shared(at, &vec![i32(0); n as usize]);
        }
    }

    /// The sum over the group's threads before this one, and over all. A barrier is within; another comes before the next sum.
    pub fn group_scan(&mut self, g: &Group, v: Val) -> (Val, Val) {
        let sum = self.sum_upto(v);
        let last = self.t.f.cmp("eq", self.t.lane, i32(31));
        let slot = self.group_word(g, SCAN, g.warp);
        self.t.when(last, |t| t.store_shared(slot, &[sum]));
        self.group_wait(g);
        let warps = g.threads / Arch::WARP;
        let own = self.t.f.intrinsic("smin", &[self.t.lane, i32(i64::from(warps) - 1)]);
        let slot = self.group_word(g, SCAN, own);
        let of_warp = self.t.load_shared(slot, Ty::I32, 1)[0];
        let real = self.t.f.cmp("slt", self.t.lane, i32(warps.into()));
        let earlier = self.t.f.cmp("slt", self.t.lane, g.warp);
        let [all, before] = [real, earlier].map(|c| {
            let v = self.t.f.select(c, of_warp, i32(0));
            isa::reduce_warp(&mut self.t.f, "add", v)
        });
        let within = self.t.f.sub(sum, v);
        (self.t.f.add(before, within), all)
    }

    /// The thread one of whose bins has the `wanted`-th largest notes which, how many are wanted of it, and how many it has. Bins are
    /// counts, the highest last, of numbers from `low` on; `above` are in higher ones.
    pub fn note_digit(&mut self, wanted: Val, (low, above): (Val, Val), bins: &[Val], found: Val) {
        let mut above = above;
        for (i, &n) in bins.iter().enumerate().rev() {
            let upto = self.t.f.add(above, n);
            let over = self.t.f.cmp("slt", above, wanted);
            let within = self.t.f.cmp("sle", wanted, upto);
            let it = self.t.f.bin("and", over, within);
            self.t.when(it, |t| {
                let digit = t.f.add(low, i32(i as i64));
                let rest = t.f.sub(wanted, above);
                t.store_shared(found, &[digit, rest, n, i32(0)]);
            });
            above = upto;
        }
    }

    /// The `wanted` largest of the words from `low` on, none more than `last` larger, a number of `bits` bits; or so few more that `slack` is
    /// not exceeded; all, if there are no more.
    pub fn search(
        &mut self,
        g: &Group,
        (low, last, bits): (Val, Val, Val),
        (wanted, slack): (Val, Val),
        words: Words<'_, 'a>,
    ) -> Found {
        self.search_merged(g, (low, last, bits), (wanted, slack), words, None)
    }

    /// The same among the words of several groups, whose bins `merge` adds up.
    pub fn search_merged(
        &mut self,
        g: &Group,
        (low, last, bits): (Val, Val, Val),
        (wanted, slack): (Val, Val),
        words: Words<'_, 'a>,
        merge: Option<Merge<'_, 'a>>,
    ) -> Found {
        let (bins, each) = (bins(g.threads), bins(g.threads) / g.threads);
        let digit = bins.ilog2();
        let histogram = self.group_word(g, HISTOGRAM, i32(0));
        let histogram = self.t.f.add(self.t.shared32, histogram);
        let others = self.counted_nowhere(g);
        let per = self.t.f.mul(g.tid, i32(each.into()));
        let first = self.t.f.sub(i32(i64::from(bins - each)), per);
        let own = self.group_word(g, HISTOGRAM, first);
        let [head, pass, end] = [0; 3].map(|_| self.t.f.label());
        let first_state = [low, last, bits, wanted, i32(0), i32(0)];
        let carried = if merge.is_some() { 6 } else { 5 };
        self.t.f.br(head, &first_state[..carried]);
        let state = self.t.f.start(head, &vec![Ty::I32; carried]);
        let &[low, last, bits, wanted, done, ..] = state.as_slice() else { unreachable!("five were asked for") };
        let open = self.t.f.cmp("eq", done, i32(0));
        let more = self.t.f.cmp("sgt", bits, i32(0));
        let more = self.t.f.bin("and", open, more);
        self.t.f.cond_br(more, (pass, &[]), (end, &[]));
        self.t.f.start(pass, &[]);
        let shift = self.t.f.sub(bits, i32(digit.into()));
        let shift = self.t.f.intrinsic("smax", &[shift, i32(0)]);
        let counted = Pass { low, last, shift, histogram, others };
        words(self, &mut |e, word| e.tally(&counted, word));
        self.group_wait(g);
        // A thread's bins, the first thread's the highest.
        let n = each.min(4);
        let mut own_bins = Vec::new();
        for i in (0..each).step_by(n as usize) {
            let at = self.t.f.add(own, i32((4 * i).into()));
            own_bins.extend(self.t.load_shared(at, Ty::I32, n));
        }
        self.store_zeros(own, each);
        let own_bins = match merge {
            Some(merge) => merge(self, own_bins, state[5]),
            None => own_bins,
        };
        let sum = own_bins.iter().skip(1).fold(own_bins[0], |sum, &n| self.t.f.add(sum, n));
        let (above, all) = self.group_scan(g, sum);
        let next = self.narrowed(g, &counted, (first, above), &own_bins, [all, wanted, slack]);
        let mut next = vec![next.low, next.last, shift, next.ties, next.done];
        if let Some(&number) = state.get(5) {
            next.push(self.t.f.add(number, i32(1)));
        }
        self.t.f.br(head, &next);
        self.t.f.start(end, &[]);
        Found { low: state[0], last: state[1], ties: state[3], done: state[4] }
    }

    /// What a pass has found, once each thread has counts of its own bins, from `low` on, with so many in higher ones; `all`: of all bins. A barrier is within.
    pub fn narrowed(
        &mut self,
        g: &Group,
        pass: &Pass,
        (low, above): (Val, Val),
        own: &[Val],
        [all, wanted, slack]: [Val; 3],
    ) -> Found {
        let found = self.t.f.add(g.base, i32(FOUND.into()));
        self.note_digit(wanted, (low, above), own, found);
        self.group_wait(g);
        let v = self.t.load_shared(found, Ty::I32, 4);
        let some = self.t.f.cmp("sge", all, wanted);
        let [digit, rest, n] = [0, 1, 2].map(|i| self.t.f.select(some, v[i], i32(0)));
        let f = &mut self.t.f;
        let far = f.bin("shl", digit, pass.shift);
        let low = f.add(pass.low, far);
        let span = f.bin("shl", i32(1), pass.shift);
        let last = f.sub(span, i32(1));
        let over = f.sub(n, rest);
        let done = f.cmp("sle", over, slack);
        Found { low, last, ties: rest, done: f.cast("zext", done, Ty::I32) }
    }

    /// Where the running lane counts what a pass is not about.
    pub fn counted_nowhere(&mut self, g: &Group) -> Val {
        let lane = self.t.lane;
        let at = self.group_word(g, OTHERS, lane);
        self.t.f.add(self.t.shared32, at)
    }

    /// Counts a word if the pass is about it. All lanes count something: no branch, for which they would wait for one another.
    pub fn tally(&mut self, pass: &Pass, word: Val) {
        let far = self.t.f.sub(word, pass.low);
        let counts = self.t.f.cmp("ule", far, pass.last);
        let bin = self.t.f.bin("lshr", far, pass.shift);
        let byte = self.t.f.mul(bin, i32(4));
        let at = self.t.f.add(pass.histogram, byte);
        let at = self.t.f.select(counts, at, pass.others);
        ptx::shared_count(&mut self.t.f, at);
    }

    /// The largest of the words that all threads have. Two barriers come before the next such question.
    pub fn group_most(&mut self, g: &Group, word: Val) -> Val {
        let v = isa::reduce_warp(&mut self.t.f, "umax", word);
        let lane = self.t.f.cmp("eq", self.t.lane, i32(0));
        let slot = self.group_word(g, MOST, g.warp);
        self.t.when(lane, |t| t.store_shared(slot, &[v]));
        self.group_wait(g);
        let warps = g.threads / Arch::WARP;
        let own = self.t.f.intrinsic("smin", &[self.t.lane, i32(i64::from(warps) - 1)]);
        let slot = self.group_word(g, MOST, own);
        let v = self.t.load_shared(slot, Ty::I32, 1)[0];
        isa::reduce_warp(&mut self.t.f, "umax", v)
    }

    /// The `k` best of candidates, a key from `low`, at least 1, to `most` and a number each (key 0: none): the largest keys, or so few more that `slack`
    /// is not exceeded, of equals the lowest numbers. All threads of the group.
    pub fn choose(
        &mut self,
        g: &Group,
        [low, most]: [Val; 2],
        (k, slack): (u32, u32),
        candidates: Members<'_, 'a>,
    ) -> Choice {
        let last = self.t.f.sub(most, low);
        let zeros = isa::leading_zeros(&mut self.t.f, last);
        let bits = self.t.f.sub(i32(32), zeros);
        let wanted = (i32(k.into()), i32(slack.into()));
        let best = self.search(g, (low, last, bits), wanted, &mut |e, count| {
            candidates(e, &mut |e, some| some.iter().for_each(|&[key, _]| count(e, key)));
        });
        let second = self.t.f.bin("xor", best.done, i32(1));
        let second = self.t.f.open_loop(i32(0), second, &[i32(0)]);
        // Inverted numbers have the highest bit, those that do not tie are 0.
        let inverted = (i32(i32::MIN.into()), i32(i32::MAX.into()), i32(31));
        let lowest = self.search(g, inverted, (best.ties, i32(0)), &mut |e, count| {
            candidates(e, &mut |e, some| {
                for &[key, number] in some {
                    let far = e.t.f.sub(key, best.low);
                    let ties = e.t.f.cmp("ule", far, best.last);
                    let inverse = e.t.f.bin("xor", number, i32(-1));
                    let word = e.t.f.select(ties, inverse, i32(0));
                    count(e, word);
                }
            });
        });
        self.t.f.close_loop(&second, i32(1), &[lowest.low]);
        Choice { best, least: second.args[1] }
    }

    /// Whether a candidate is of the choice.
    pub fn is_chosen(&mut self, c: &Choice, [key, number]: [Val; 2]) -> Val {
        let f = &mut self.t.f;
        let far = f.sub(key, c.best.low);
        let highest = f.add(c.best.low, c.best.last);
        let above = f.cmp("ugt", key, highest);
        let equal = f.cmp("ule", far, c.best.last);
        let inverse = f.bin("xor", number, i32(-1));
        let early = f.cmp("uge", inverse, c.least);
        let tied = f.bin("and", equal, early);
        f.bin("or", above, tied)
    }

    /// Hands each number below `end` that is in, with its place among all of them, to `put`. Bits are empty. Where a thread has several at a time there is no
    /// branch around one: their loads are under way together.
    pub fn in_order(&mut self, g: &Group, end: Val, members: Members<'_, 'a>, put: Put<'_, 'a>) {
        let window = 32 * words(g.threads);
        let windows = self.t.f.open_loop(i32(0), end, &[i32(0)]);
        let (start, given) = (windows.args[0], windows.args[1]);
        // Bits of this thread, words side by side, and counts before each two.
        let own = words(g.threads) / g.threads;
        let first = self.t.f.mul(g.tid, i32(own.into()));
        let bits_at = bits(g.threads);
        let counts_at = bits_at + 4 * words(g.threads);
        let own_bits = self.group_word(g, bits_at, first);
        let pairs = self.t.f.div(first, 2);
        let own_counts = self.group_word(g, counts_at, pairs);
        let all_bits = self.group_word(g, bits_at, i32(0));
        let all_bits = self.t.f.add(self.t.shared32, all_bits);
        let others = self.counted_nowhere(g);
        members(self, &mut |e, some| {
            for &member in some {
                let several = some.len() > 1 && e.sharing == 1;
                let (own, here) = e.in_window(start, window, member, several);
                let f = &mut e.t.f;
                let word = f.bin("lshr", own, i32(5));
                let byte = f.mul(word, i32(4));
                let lane = f.bin("and", own, i32(31));
                let bit = f.bin("shl", i32(1), lane);
                let at = f.add(all_bits, byte);
                if some.len() == 1 {
                    ptx::shared_or_if(f, here, at, bit);
                } else {
                    let (at, bit) = (f.select(here, at, others), f.select(here, bit, i32(0)));
                    ptx::shared_or(f, at, bit);
                }
            }
        });
        self.group_wait(g);
        let mut counts = Vec::new();
        let mut sum = i32(0);
        for i in (0..own).step_by(4) {
            let at = self.t.f.add(own_bits, i32((4 * i).into()));
            for (j, word) in self.t.load_shared(at, Ty::I32, 4).into_iter().enumerate() {
                if j % 2 == 0 {
                    counts.push(sum);
                }
                let n = isa::popcount(&mut self.t.f, word);
                sum = self.t.f.add(sum, n);
            }
        }
        let (earlier, all) = self.group_scan(g, sum);
        let counts: Vec<Val> = counts.into_iter().map(|n| self.t.f.add(n, earlier)).collect();
        for (i, some) in counts.chunks(4).enumerate() {
            let at = self.t.f.add(own_counts, i32(16 * i as i64));
            self.t.store_shared(at, some);
        }
        self.group_wait(g);
        let at = Bits { given, bits_at, counts_at };
        members(self, &mut |e, some| {
            if let &[[real, number]] = some {
                let (own, here) = e.in_window(start, window, [real, number], false);
                let after = e.t.f.open_if(here);
                let found = e.bits_of(g, &at, own);
                let rank = e.rank(&at, own, &found);
                put(e, number, rank, Val::Int(1, Ty::I1));
                e.t.f.close_if(after);
                return;
            }
            let mut found = Vec::new();
            for &member in some {
                let (own, here) = e.in_window(start, window, member, e.sharing == 1);
                let own = e.t.f.select(here, own, i32(0));
                found.push((own, here, e.bits_of(g, &at, own)));
            }
            for ((own, here, bits), &[_, number]) in found.iter().zip(some) {
                let rank = e.rank(&at, *own, bits);
                put(e, number, rank, *here);
            }
        });
        self.group_wait(g);
        let next = self.t.f.add(start, i32(window.into()));
        let more = self.t.f.cmp("slt", next, end);
        let after = self.t.f.open_if(more);
        self.group_clear_bits(g);
        self.group_wait(g);
        self.t.f.close_if(after);
        let given = self.t.f.add(given, all);
        self.t.f.close_loop(&windows, i32(window.into()), &[given]);
    }

    /// Where a member's number is in the window, and whether it is in it. Of `several` members who is one is kept in the number, not beside it.
    fn in_window(&mut self, start: Val, window: u32, [real, number]: [Val; 2], several: bool) -> (Val, Val) {
        let f = &mut self.t.f;
        let number = if several { f.select(real, number, i32(-1)) } else { number };
        let own = f.sub(number, start);
        let here = f.cmp("ult", own, i32(window.into()));
        (own, if several { here } else { f.bin("and", here, real) })
    }

    /// The two words of bits in which a number of the window is, and how many bits are set before them.
    fn bits_of(&mut self, g: &Group, at: &Bits, own: Val) -> [Val; 3] {
        let pair = self.t.f.bin("lshr", own, i32(6));
        let word = self.t.f.mul(pair, i32(2));
        let byte = self.group_word(g, at.bits_at, word);
        let both = self.t.load_shared(byte, Ty::I32, 2);
        let byte = self.group_word(g, at.counts_at, pair);
        let rank = self.t.load_shared(byte, Ty::I32, 1)[0];
        [both[0], both[1], rank]
    }

    /// The place of a number of the window.
    fn rank(&mut self, at: &Bits, own: Val, &[low, high, rank]: &[Val; 3]) -> Val {
        let f = &mut self.t.f;
        let second = f.bin("and", own, i32(32));
        let second = f.cmp("ne", second, i32(0));
        let lane = f.bin("and", own, i32(31));
        let bit = f.bin("shl", i32(1), lane);
        let below = f.sub(bit, i32(1));
        let word = f.select(second, high, low);
        let before = f.select(second, low, i32(0));
        let below = f.bin("and", word, below);
        let below = isa::popcount(f, below);
        let before = isa::popcount(f, before);
        let rank = f.add(rank, at.given);
        let rank = f.add(rank, below);
        f.add(rank, before)
    }
}
