//! The best of a row that a block can hold in its registers: read once, and nothing of it is ever written.
//!
//! A thread has [`super::filter::SHORT`] columns over the threads of a block, in vectors of neighbours. The `k`-th largest is found by radix
//! ([`super::group`]); a thread then knows which of its own are in, and sums over the threads before it, of each of its vectors apart, are
//! their places, in ascending order. Of equals the first are taken by the same sums.

use super::emit::Emit;
use super::filter::{SHORT, Stores};
use super::group::{Found, Group};
use super::ptx;
use super::select::{OUT, Stream, THREADS};
use super::window::{VECTOR, Window};
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::tile::ValueId;

/// Vectors of a thread, whose counts two sums have in halves of a word.
const VECTORS: u32 = SHORT / (VECTOR * THREADS);
const _: () = assert!(VECTORS == 4 && VECTOR * THREADS < 1 << 16);

impl<'a> Emit<'a> {
    /// Selects from a row of at most [`SHORT`] columns. All threads of one block.
    pub fn short_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        w: &Window,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let tid = self.t.tid;
        let own: Vec<Val> = (0..VECTORS).map(|i| self.t.f.add(tid, i32((i * THREADS).into()))).collect();
        let values = self.vectors(w, &own);
        let keys: Vec<Val> = values.into_iter().map(|v| self.key(v)).collect();
        let columns: Vec<Val> = own.into_iter().map(|v| self.column_of(w, v)).collect();
        // Where no more are offered than wanted there is nothing to find.
        let offered = self.t.f.sub(w.to, w.from);
        let many = self.t.f.cmp("sgt", offered, i32(stream.k.into()));
        let rounds = self.t.f.cast("zext", many, Ty::I32);
        self.group_wait(g);
        let found = self.t.f.open_loop(i32(0), rounds, &[i32(1), i32(0), i32(0), i32(1)]);
        let wanted = (i32(stream.k.into()), i32(0));
        let best =
            self.search(g, (i32(1), i32(-2), i32(32)), wanted, &mut |e, count| keys.iter().for_each(|&k| count(e, k)));
        self.t.f.close_loop(&found, i32(1), &[best.low, best.last, best.ties, best.done]);
        let [low, last, ties, done] = [1, 2, 3, 4].map(|i| found.args[i]);
        let best = Found { low, last, ties, done };
        let mask = self.members(g, &best, &keys);
        let counts = self.counts(mask);
        let (places, total) = self.places(g, counts);
        for (i, (&column, &place)) in columns.iter().zip(&places).enumerate() {
            let byte = self.t.f.mul(place, i32(4));
            let at = self.t.f.add(byte, i32(OUT.into()));
            let mut at = self.t.f.add(self.t.shared32, at);
            for j in 0..VECTOR {
                let bit = self.t.f.bin("lshr", mask, i32((i as u32 * VECTOR + j).into()));
                let bit = self.t.f.bin("and", bit, i32(1));
                let chosen = self.t.f.cmp("ne", bit, i32(0));
                let number = self.t.f.add(column, i32(j.into()));
                ptx::store_shared_word_if(&mut self.t.f, chosen, at, number);
                let bytes = self.t.f.mul(bit, i32(4));
                at = self.t.f.add(at, bytes);
            }
        }
        self.group_wait(g);
        self.deliver(stream.k, total, numbers, stores)
    }

    /// Which of the running thread's keys are in, as bits.
    fn members(&mut self, g: &Group, best: &Found, keys: &[Val]) -> Val {
        let done = self.t.f.cmp("ne", best.done, i32(0));
        let beyond = self.t.f.add(best.low, best.last);
        let beyond = self.t.f.add(beyond, i32(1));
        let least = self.t.f.select(done, best.low, beyond);
        let sure = self.bits(keys, &mut |e, key| e.t.f.cmp("uge", key, least));
        let open = self.t.f.bin("xor", best.done, i32(1));
        let tied = self.t.f.open_loop(i32(0), open, &[sure]);
        let equal = self.bits(keys, &mut |e, key| {
            let far = e.t.f.sub(key, best.low);
            e.t.f.cmp("ule", far, best.last)
        });
        let counts = self.counts(equal);
        let (places, _) = self.places(g, counts);
        let mut mask = sure;
        for (i, &first) in places.iter().enumerate() {
            let mut place = first;
            for j in 0..VECTOR {
                let number = i as u32 * VECTOR + j;
                let bit = self.t.f.bin("lshr", equal, i32(number.into()));
                let bit = self.t.f.bin("and", bit, i32(1));
                let fits = self.t.f.cmp("slt", place, best.ties);
                let taken = self.t.f.select(fits, bit, i32(0));
                let taken = self.t.f.bin("shl", taken, i32(number.into()));
                mask = self.t.f.bin("or", mask, taken);
                place = self.t.f.add(place, bit);
            }
        }
        self.group_wait(g);
        self.t.f.close_loop(&tied, i32(1), &[mask]);
        tied.args[1]
    }

    fn bits(&mut self, keys: &[Val], test: &mut dyn FnMut(&mut Self, Val) -> Val) -> Val {
        let mut mask = i32(0);
        for (i, &key) in keys.iter().enumerate() {
            let holds = test(self, key);
            let bit = self.t.f.select(holds, i32(1 << i), i32(0));
            mask = self.t.f.bin("or", mask, bit);
        }
        mask
    }

    /// Bits of each vector.
    fn counts(&mut self, mask: Val) -> [Val; VECTORS as usize] {
        [0, 1, 2, 3].map(|i| {
            let own = self.t.f.bin("and", mask, i32(((1 << VECTOR) - 1) << (VECTOR * i)));
            isa::popcount(&mut self.t.f, own)
        })
    }

    /// Of members that each vector of the running thread has: the place of the first of each, and how many all threads have.
    fn places(&mut self, g: &Group, counts: [Val; VECTORS as usize]) -> ([Val; VECTORS as usize], Val) {
        let packed = [0, 2].map(|i| {
            let high = self.t.f.bin("shl", counts[i + 1], i32(16));
            self.t.f.bin("or", counts[i], high)
        });
        let sums = self.group_scans(g, &packed);
        let mut total = i32(0);
        let places = [0, 1, 2, 3].map(|i| {
            let (before, all) = sums[i / 2];
            let [before, all] = [before, all].map(|v| match i % 2 {
                0 => self.t.f.bin("and", v, i32(0xffff)),
                _ => self.t.f.bin("lshr", v, i32(16)),
            });
            let place = self.t.f.add(total, before);
            total = self.t.f.add(total, all);
            place
        });
        (places, total)
    }
}
