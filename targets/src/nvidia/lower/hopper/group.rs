//! What a group of threads does with candidates of a selection: finds the best, and puts their numbers in order.
//!
//! A candidate is a key, an integer that orders like the value and is 0 for none, and its number; each thread has some in registers.
//!
//! **Search.** The `k`-th largest key is found by radix, as many bits a pass as there are bins for, two a thread; it ends early when all
//! that have the digits found so far are wanted. The digits are those of the distance from the least key, leading zeros left out: the best
//! of a row are often alike in their first bits, and would all be counted in a few bins, one after another. Where more are equal to the
//! last than have room, a second search takes those of the lowest numbers.
//!
//! **Order.** Numbers become bits of a window in shared memory; counts of the bits before a number are its place. So the result is in
//! ascending order, and neither it nor what is selected depends on which thread has what.

use super::emit::Emit;
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};

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

/// Bytes of the group's memory where things start: what a pass finds, totals of warps, largest and least of warps, a histogram, which is zero
/// but in a pass, then bits, and counts before each word of them.
const FOUND: u32 = 0;
const SCAN: u32 = 16;
const MOST: u32 = SCAN + 128;
const LEAST: u32 = MOST + 128;
const HISTOGRAM: u32 = LEAST + 128;

/// Words of bits: numbers that are put in order at a time are 32 times as many.
const fn words(threads: u32) -> u32 {
    if threads < 512 { 2048 } else { 4 * threads }
}

const fn bits(threads: u32) -> u32 {
    HISTOGRAM + 8 * threads
}

/// Bytes of shared memory of a group of so many threads, a power of two from 64 to 1024.
pub const fn bytes(threads: u32) -> u32 {
    bits(threads) + 8 * words(threads)
}

/// A search's result: words with `word >> drop` above `bound` are in, and `ties` of those equal to it: all of them if `done`.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    pub bound: Val,
    pub drop: Val,
    pub ties: Val,
    pub done: Val,
}

/// The best of candidates.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    best: Found,
    /// The least key, and the leading zeros of distances from it.
    first: Val,
    shift: Val,
    /// Of those equal to the bound, those whose inverted number, without its last `drop` bits, is at least this.
    least: Val,
    drop: Val,
}

impl Emit<'_> {
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
        let v = f.bin("fadd", v, crate::nvidia::lower::mlir::f32(0.0));
        let bits = f.cast("bitcast", v, Ty::I32);
        let sign = f.bin("ashr", bits, i32(31));
        let flip = f.bin("or", sign, i32(i32::MIN.into()));
        f.bin("xor", bits, flip)
    }

    /// Empties the histogram: before the first search, and a barrier.
    pub fn group_clear(&mut self, g: &Group) {
        let pair = self.t.f.mul(g.tid, i32(2));
        let own = self.group_word(g, HISTOGRAM, pair);
        self.t.store_shared(own, &[i32(0); 2]);
    }

    /// The sum over the group's threads before this one, and over all. A barrier is within; another comes before the next sum.
    pub fn group_scan(&mut self, g: &Group, v: Val) -> (Val, Val) {
        let mut sum = v;
        for by in [1, 2, 4, 8, 16] {
            let below = isa::shuffle_up(&mut self.t.f, sum, by);
            let both = self.t.f.add(sum, below);
            let has = self.t.f.cmp("sge", self.t.lane, i32(by.into()));
            sum = self.t.f.select(has, both, sum);
        }
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
        let before = self.t.f.add(before, within);
        (before, all)
    }

    /// The thread one of whose two bins has the `wanted`-th largest notes which (from `low` on), how many are wanted of it, and how many it has. Of a
    /// bin: its number, how many are in those above, how many up to it, how many in it.
    pub fn note_digit(&mut self, (wanted, low): (Val, Val), bins: [(i64, Val, Val, Val); 2], found: Val) {
        for (digit, above, upto, n) in bins {
            let over = self.t.f.cmp("slt", above, wanted);
            let within = self.t.f.cmp("sle", wanted, upto);
            let it = self.t.f.bin("and", over, within);
            self.t.when(it, |t| {
                let digit = t.f.add(low, i32(digit));
                let rest = t.f.sub(wanted, above);
                t.store_shared(found, &[digit, rest, n, i32(0)]);
            });
        }
    }

    /// The `wanted` largest of `count` words that are not zero, or so few more that `slack` is not exceeded; all, if there are no more. `word`
    /// gives those of this thread, `each` of them.
    pub fn search(
        &mut self,
        g: &Group,
        (each, count): (usize, Val),
        (wanted, slack): (Val, Val),
        word: &dyn Fn(&mut Self, usize) -> Val,
    ) -> Found {
        let digit = (2 * g.threads).ilog2();
        let more = self.t.f.cmp("sgt", count, wanted);
        let enough = self.t.f.cast("zext", more, Ty::I32);
        let enough = self.t.f.bin("xor", enough, i32(1));
        // Without a pass every word that is not zero is above the bound.
        let drop = self.t.f.select(more, i32(32), i32(0));
        let ties = self.t.f.select(more, wanted, i32(0));
        let passes = self.t.f.open_loop(i32(0), i32(32u32.div_ceil(digit).into()), &[i32(0), ties, enough, drop]);
        let [bound, wanted, done, drop] = [passes.args[1], passes.args[2], passes.args[3], passes.args[4]];
        let rounds = self.t.f.bin("xor", done, i32(1));
        let pass = self.t.f.open_loop(i32(0), rounds, &[bound, wanted, done, drop]);
        let shift = self.t.f.sub(drop, i32(digit.into()));
        let shift = self.t.f.intrinsic("smax", &[shift, i32(0)]);
        let width = self.t.f.sub(drop, shift);
        let bins = self.t.f.bin("shl", i32(1), width);
        let mask = self.t.f.sub(bins, i32(1));
        for i in 0..each {
            let w = word(self, i);
            let f = &mut self.t.f;
            let high = f.bin("lshr", w, shift);
            let bin = f.bin("and", high, mask);
            let high = f.bin("lshr", high, width);
            let same = f.cmp("eq", high, bound);
            let real = f.cmp("ne", w, i32(0));
            let counts = f.bin("and", same, real);
            let at = self.group_word(g, HISTOGRAM, bin);
            let at = self.t.f.add(self.t.shared32, at);
            ptx::shared_count_if(&mut self.t.f, counts, at);
        }
        self.group_wait(g);
        // Two bins a thread, the highest first.
        let pair = self.t.f.mul(g.tid, i32(2));
        let low = self.t.f.sub(i32(i64::from(2 * g.threads) - 2), pair);
        let at = self.group_word(g, HISTOGRAM, low);
        let bins = self.t.load_shared(at, Ty::I32, 2);
        let (lower, upper) = (bins[0], bins[1]);
        let both = self.t.f.add(lower, upper);
        let (above, _) = self.group_scan(g, both);
        // All have read their bins.
        self.group_clear(g);
        let middle = self.t.f.add(above, upper);
        let upto = self.t.f.add(above, both);
        let found = self.t.f.add(g.base, i32(FOUND.into()));
        self.note_digit((wanted, low), [(1, above, middle, upper), (0, middle, upto, lower)], found);
        self.group_wait(g);
        let v = self.t.load_shared(found, Ty::I32, 4);
        let (digit, rest, n) = (v[0], v[1], v[2]);
        let f = &mut self.t.f;
        let longer = f.bin("shl", bound, width);
        let bound = f.bin("or", longer, digit);
        let over = f.sub(n, rest);
        let whole = f.cmp("sle", over, slack);
        let whole = f.cast("zext", whole, Ty::I32);
        self.t.f.close_loop(&pass, i32(1), &[bound, rest, whole, shift]);
        self.t.f.close_loop(&passes, i32(1), &pass.args[1..]);
        let [bound, ties, done, drop] = [passes.args[1], passes.args[2], passes.args[3], passes.args[4]];
        Found { bound, drop, ties, done }
    }

    /// Notes what a warp has, its least (`umin`) or largest (`umax`) word. A barrier comes before others look.
    fn warps_have(&mut self, g: &Group, how: &str, at: u32, word: Val) {
        let v = isa::reduce_warp(&mut self.t.f, how, word);
        let lane = self.t.f.cmp("eq", self.t.lane, i32(0));
        let slot = self.group_word(g, at, g.warp);
        self.t.when(lane, |t| t.store_shared(slot, &[v]));
    }

    /// What the group has, of what warps have.
    fn group_has(&mut self, g: &Group, how: &str, at: u32) -> Val {
        let warps = g.threads / Arch::WARP;
        let own = self.t.f.intrinsic("smin", &[self.t.lane, i32(i64::from(warps) - 1)]);
        let slot = self.group_word(g, at, own);
        let v = self.t.load_shared(slot, Ty::I32, 1)[0];
        isa::reduce_warp(&mut self.t.f, how, v)
    }

    /// The distance of a key from the least, as words are searched: the more leading zeros they lack, the finer are the first bins.
    fn distance(&mut self, key: Val, first: Val, shift: Val) -> Val {
        let f = &mut self.t.f;
        let real = f.cmp("ne", key, i32(0));
        let far = f.sub(key, first);
        let far = f.add(far, i32(1));
        let far = f.bin("shl", far, shift);
        f.select(real, far, i32(0))
    }

    /// The `k` best of `count` candidates: the largest keys, of equals the lowest numbers. All threads of the group.
    pub fn choose(&mut self, g: &Group, candidates: &[[Val; 2]], count: Val, k: u32) -> Choice {
        let (mut most, mut least) = (i32(0), i32(-1));
        for c in candidates {
            most = self.t.f.intrinsic("umax", &[most, c[0]]);
            // Of no candidate, 0 − 1 is the largest.
            let before = self.t.f.add(c[0], i32(-1));
            least = self.t.f.intrinsic("umin", &[least, before]);
        }
        self.warps_have(g, "umax", MOST, most);
        self.warps_have(g, "umin", LEAST, least);
        self.group_wait(g);
        let (most, least) = (self.group_has(g, "umax", MOST), self.group_has(g, "umin", LEAST));
        let first = self.t.f.add(least, i32(1));
        let range = self.t.f.sub(most, least);
        let shift = isa::leading_zeros(&mut self.t.f, range);
        let shift = self.t.f.intrinsic("umin", &[shift, i32(31)]);
        let each = candidates.len();
        let best =
            self.search(g, (each, count), (i32(k.into()), i32(0)), &|e, i| e.distance(candidates[i][0], first, shift));
        let second = self.t.f.bin("xor", best.done, i32(1));
        let second = self.t.f.open_loop(i32(0), second, &[i32(0), i32(0)]);
        // As many as there may be: more are equal than have room.
        let lowest = self.search(g, (each, count), (best.ties, i32(0)), &|e, i| {
            let word = e.distance(candidates[i][0], first, shift);
            let equal = e.t.f.cmp("eq", word, best.bound);
            let inverse = e.t.f.bin("xor", candidates[i][1], i32(-1));
            e.t.f.select(equal, inverse, i32(0))
        });
        self.t.f.close_loop(&second, i32(1), &[lowest.bound, lowest.drop]);
        Choice { best, first, shift, least: second.args[1], drop: second.args[2] }
    }

    /// The least that the keys of a choice can be, where there were more candidates than chosen.
    pub fn least_chosen(&mut self, c: &Choice) -> Val {
        let f = &mut self.t.f;
        let word = f.bin("shl", c.best.bound, c.best.drop);
        let far = f.bin("lshr", word, c.shift);
        let before = f.sub(c.first, i32(1));
        f.add(before, far)
    }

    /// Whether a candidate is of the choice.
    pub fn is_chosen(&mut self, c: &Choice, [key, number]: [Val; 2]) -> Val {
        let word = self.distance(key, c.first, c.shift);
        let f = &mut self.t.f;
        let high = f.bin("lshr", word, c.best.drop);
        let above = f.cmp("ugt", high, c.best.bound);
        let equal = f.cmp("eq", high, c.best.bound);
        let inverse = f.bin("xor", number, i32(-1));
        let inverse = f.bin("lshr", inverse, c.drop);
        let low = f.cmp("uge", inverse, c.least);
        let tied = f.bin("and", equal, low);
        let keep = f.bin("or", above, tied);
        let real = f.cmp("ne", key, i32(0));
        f.bin("and", keep, real)
    }

    /// One more than the largest of the numbers that all threads have.
    pub fn group_end(&mut self, g: &Group, numbers: &[Val]) -> Val {
        let highest = numbers.iter().fold(i32(0), |most, &n| self.t.f.intrinsic("umax", &[most, n]));
        self.warps_have(g, "umax", MOST, highest);
        self.group_wait(g);
        let highest = self.group_has(g, "umax", MOST);
        self.t.f.add(highest, i32(1))
    }

    /// Hands each number below `end` that is in, with its place among all of them, to `put`. A member is whether it is in, and its number.
    pub fn in_order(
        &mut self,
        g: &Group,
        members: &[(Val, Val)],
        end: Val,
        put: &mut dyn FnMut(&mut Self, Val, Val) -> Result<(), String>,
    ) -> Result<(), String> {
        let window = 32 * words(g.threads);
        let windows = self.t.f.open_loop(i32(0), end, &[i32(0)]);
        let (start, given) = (windows.args[0], windows.args[1]);
        // Bits and counts of this thread: words side by side.
        let own = words(g.threads) / g.threads;
        let first = self.t.f.mul(g.tid, i32(own.into()));
        let bits_at = bits(g.threads);
        let counts_at = bits_at + 4 * words(g.threads);
        let (bits, before) = (self.group_word(g, bits_at, first), self.group_word(g, counts_at, first));
        for i in (0..own).step_by(4) {
            let at = self.t.f.add(bits, i32((4 * i).into()));
            self.t.store_shared(at, &[i32(0); 4]);
        }
        self.group_wait(g);
        let mut inside = Vec::new();
        for &(real, number) in members {
            let f = &mut self.t.f;
            let own = f.sub(number, start);
            let here = f.cmp("ult", own, i32(window.into()));
            let here = f.bin("and", here, real);
            let word = f.bin("lshr", own, i32(5));
            let word = f.select(here, word, i32(0));
            let lane = f.bin("and", own, i32(31));
            let bit = f.bin("shl", i32(1), lane);
            let at = self.group_word(g, bits_at, word);
            let address = self.t.f.add(self.t.shared32, at);
            ptx::shared_or_if(&mut self.t.f, here, address, bit);
            inside.push((here, word, bit, number));
        }
        self.group_wait(g);
        let mut counts = Vec::new();
        let mut sum = i32(0);
        for i in (0..own).step_by(4) {
            let at = self.t.f.add(bits, i32((4 * i).into()));
            for word in self.t.load_shared(at, Ty::I32, 4) {
                counts.push(sum);
                let n = isa::popcount(&mut self.t.f, word);
                sum = self.t.f.add(sum, n);
            }
        }
        let (earlier, all) = self.group_scan(g, sum);
        for (i, four) in counts.chunks(4).enumerate() {
            let at = self.t.f.add(before, i32(16 * i as i64));
            let four = [0, 1, 2, 3].map(|j| self.t.f.add(four[j], earlier));
            self.t.store_shared(at, &four);
        }
        self.group_wait(g);
        for (here, word, bit, number) in inside {
            let after = self.t.f.open_if(here);
            let at = self.group_word(g, bits_at, word);
            let bits = self.t.load_shared(at, Ty::I32, 1)[0];
            let below = self.t.f.sub(bit, i32(1));
            let below = self.t.f.bin("and", bits, below);
            let below = isa::popcount(&mut self.t.f, below);
            let at = self.group_word(g, counts_at, word);
            let rank = self.t.load_shared(at, Ty::I32, 1)[0];
            let rank = self.t.f.add(rank, below);
            let rank = self.t.f.add(rank, given);
            put(self, number, rank)?;
            self.t.f.close_if(after);
        }
        self.group_wait(g);
        let given = self.t.f.add(given, all);
        self.t.f.close_loop(&windows, i32(window.into()), &[given]);
        Ok(())
    }
}
