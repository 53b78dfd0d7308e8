//! The best of a row that a block can hold in its registers: read once, and nothing of it is ever written.
//!
//! Each warp has a stretch of the row, of which a lane has every 32nd vector of neighbours. The `k`-th largest is found by radix
//! ([`super::group`]); a thread then knows which of its own are in. Sums over the warps before, and over the lanes before of each vector apart, are
//! their places, in ascending order. Of equals the first are taken by the same sums.
//!
//! **Cost.** One read of the row; by count of the code some 25 instructions a column of a thread, and 300 more.

use super::emit::Emit;
use super::filter::{LOWEST, SELECTABLE, Stores};
use super::group::{Found, Group};
use super::ptx;
use super::select::{OUT, Stream, THREADS};
use super::window::{VECTOR, Window};
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::tile::ValueId;

/// Vectors whose counts a word has, and whose bits.
const COUNTED: u32 = 4;
const MASKED: u32 = 32 / VECTOR;
/// Bits of a count: at most all columns of a vector in all lanes of a warp.
const COUNT_BITS: u32 = 8;
const _: () = assert!(VECTOR * 32 < 1 << COUNT_BITS);

/// Columns of a row that a block can take with so many vectors a thread.
pub const fn capacity(vectors: u32) -> u32 {
    vectors * VECTOR * THREADS
}

impl<'a> Emit<'a> {
    /// Selects from a row of which each thread has so many vectors, a multiple of [`COUNTED`]. All threads of one block.
    pub fn short_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        (w, vectors): (&Window, u32),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let first = self.t.f.mul(self.t.warp, i32((32 * vectors).into()));
        let first = self.t.f.add(first, self.t.lane);
        let keys = self.keys_of(w, first, vectors);
        // Where no more are offered than wanted there is nothing to find.
        let offered = self.t.f.sub(w.to, w.from);
        let many = self.t.f.cmp("sgt", offered, i32(stream.k.into()));
        let rounds = self.t.f.cast("zext", many, Ty::I32);
        self.group_wait(g);
        let found = self.t.f.open_loop(i32(0), rounds, &[i32(LOWEST), i32(0), i32(0), i32(1)]);
        let wanted = (i32(stream.k.into()), i32(0));
        let best =
            self.search(g, SELECTABLE.map(i32).into(), wanted, &mut |e, count| keys.iter().for_each(|&k| count(e, k)));
        self.t.f.close_loop(&found, i32(1), &[best.low, best.last, best.ties, best.done]);
        let [low, last, ties, done] = [1, 2, 3, 4].map(|i| found.args[i]);
        let best = Found { low, last, ties, done };
        let sure = self.sure(&best, &keys);
        let masks = self.with_ties(g, &best, &keys, (sure, None), i32(0));
        let (places, total) = self.places(g, &masks, vectors);
        let column = self.column_of(w, first);
        self.list_members(&masks, &places, column);
        self.group_wait(g);
        self.deliver(stream.k, total, numbers, stores)
    }

    /// Keys, of which those below [`LOWEST`] are of nothing, of so many vectors of the running thread, every 32nd from `first` on.
    pub fn keys_of(&mut self, w: &Window, first: Val, vectors: u32) -> Vec<Val> {
        let mut keys = Vec::new();
        for batch in (0..vectors).step_by(COUNTED as usize) {
            let own: Vec<Val> = (batch..batch + COUNTED).map(|i| self.t.f.add(first, i32((32 * i).into()))).collect();
            keys.extend(self.vectors(w, &own));
        }
        keys.into_iter().map(|v| self.selectable(v)).collect()
    }

    /// Writes the columns of members, of which the first vector begins at `column`, to their vectors' places.
    pub fn list_members(&mut self, masks: &[Val], places: &[Val], column: Val) {
        for (i, &place) in places.iter().enumerate() {
            let byte = self.t.f.mul(place, i32(4));
            let at = self.t.f.add(byte, i32(OUT.into()));
            let mut at = self.t.f.add(self.t.shared32, at);
            for j in 0..VECTOR {
                let bit = self.bit(masks, i as u32 * VECTOR + j);
                let chosen = self.t.f.cmp("ne", bit, i32(0));
                let number = self.t.f.add(column, i32((32 * VECTOR * i as u32 + j).into()));
                ptx::store_shared_word_if(&mut self.t.f, chosen, at, number);
                let bytes = self.t.f.mul(bit, i32(4));
                at = self.t.f.add(at, bytes);
            }
        }
    }

    /// Which of the running thread's keys are in whatever is taken of those that tie, as bits.
    pub fn sure(&mut self, best: &Found, keys: &[Val]) -> Vec<Val> {
        let done = self.t.f.cmp("ne", best.done, i32(0));
        let beyond = self.t.f.add(best.low, best.last);
        let beyond = self.t.f.add(beyond, i32(1));
        let least = self.t.f.select(done, best.low, beyond);
        self.bits(keys, &mut |e, key| e.t.f.cmp("uge", key, least))
    }

    /// Which of them tie with the last.
    pub fn tied(&mut self, best: &Found, keys: &[Val]) -> Vec<Val> {
        // How far a key is no pass of the search knows, where it would be computed for here: registers and code.
        let low = if self.sharing == 1 { ptx::pin_word(&mut self.t.f, best.low) } else { best.low };
        self.bits(keys, &mut |e, key| {
            let far = e.t.f.sub(key, low);
            e.t.f.cmp("ule", far, best.last)
        })
    }

    /// Those that are sure and, of those that tie, if it is not known yet which, as many as there are places for, `before` of which are other blocks'.
    pub fn with_ties(
        &mut self,
        g: &Group,
        best: &Found,
        keys: &[Val],
        (sure, equal): (Vec<Val>, Option<Vec<Val>>),
        before: Val,
    ) -> Vec<Val> {
        let open = self.t.f.bin("xor", best.done, i32(1));
        let tied = self.t.f.open_loop(i32(0), open, &sure);
        let equal = equal.unwrap_or_else(|| self.tied(best, keys));
        let (places, _) = self.places(g, &equal, keys.len() as u32 / VECTOR);
        let mut masks = sure;
        for (i, &first) in places.iter().enumerate() {
            let mut place = self.t.f.add(first, before);
            for j in 0..VECTOR {
                let number = i as u32 * VECTOR + j;
                let bit = self.bit(&equal, number);
                let fits = self.t.f.cmp("slt", place, best.ties);
                let taken = self.t.f.select(fits, bit, i32(0));
                let taken = self.t.f.bin("shl", taken, i32((number % 32).into()));
                let mask = &mut masks[number as usize / 32];
                *mask = self.t.f.bin("or", *mask, taken);
                place = self.t.f.add(place, bit);
            }
        }
        self.group_wait(g);
        self.t.f.close_loop(&tied, i32(1), &masks);
        tied.args[1..].to_vec()
    }

    /// Whether each of the keys is so, as bits.
    fn bits(&mut self, keys: &[Val], test: &mut dyn FnMut(&mut Self, Val) -> Val) -> Vec<Val> {
        let mut masks = Vec::new();
        for some in keys.chunks(32) {
            let mut mask = i32(0);
            for (i, &key) in some.iter().enumerate() {
                let holds = test(self, key);
                let bit = self.t.f.select(holds, i32(1 << i), i32(0));
                mask = self.t.f.bin("or", mask, bit);
            }
            masks.push(mask);
        }
        masks
    }

    /// A bit, as 0 or 1.
    fn bit(&mut self, masks: &[Val], number: u32) -> Val {
        let bit = self.t.f.bin("lshr", masks[number as usize / 32], i32((number % 32).into()));
        self.t.f.bin("and", bit, i32(1))
    }

    /// How many bits are set.
    pub fn popcount(&mut self, masks: &[Val]) -> Val {
        let own = masks.iter().map(|&m| isa::popcount(&mut self.t.f, m)).collect::<Vec<_>>();
        own.iter().skip(1).fold(own[0], |sum, &n| self.t.f.add(sum, n))
    }

    /// Of members that each vector of the running thread has: the place of the first of each, and how many all threads have.
    pub fn places(&mut self, g: &Group, masks: &[Val], vectors: u32) -> (Vec<Val>, Val) {
        let own = self.popcount(masks);
        let (before, all) = self.group_scan(g, own);
        // No lane of the warp is before its first.
        let mut warp = isa::shuffle_from(&mut self.t.f, before, i32(0));
        let mut places = Vec::new();
        for word in 0..vectors / COUNTED {
            let mut packed = i32(0);
            for i in 0..COUNTED {
                let vector = word * COUNTED + i;
                let mask = masks[(vector / MASKED) as usize];
                let bits = i64::from((1u32 << VECTOR) - 1) << (vector % MASKED * VECTOR);
                let n = self.t.f.bin("and", mask, i32(i64::from(bits as u32 as i32)));
                let n = isa::popcount(&mut self.t.f, n);
                let n = self.t.f.bin("shl", n, i32((i * COUNT_BITS).into()));
                packed = self.t.f.bin("or", packed, n);
            }
            let upto = self.sum_upto(packed);
            let before = self.t.f.sub(upto, packed);
            let all = isa::shuffle_from(&mut self.t.f, upto, i32(31));
            for i in 0..COUNTED {
                let [before, all] = [before, all].map(|v| {
                    let v = self.t.f.bin("lshr", v, i32((i * COUNT_BITS).into()));
                    self.t.f.bin("and", v, i32((1 << COUNT_BITS) - 1))
                });
                places.push(self.t.f.add(warp, before));
                warp = self.t.f.add(warp, all);
            }
        }
        (places, all)
    }
}
