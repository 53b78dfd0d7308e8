//! The best of a row that the blocks of a cluster can hold in their registers: read once, exactly, whatever its values are.
//!
//! Each block has a stretch of the row, as [`super::short`] has all of it. A radix pass counts in each block by itself; then every thread adds up
//! its bins of all blocks that have any there, so that all find the same digit and none has to be told. The blocks tell each other how many of theirs are in and
//! how many tie with the last; the sums over those before are where a block's part of the result begins, and it writes that part itself: what is
//! selected is in ascending order, and of equals the first are in it.
//!
//! **Cost.** One read of the row; a barrier of the cluster a pass, three passes at most, one for the sums and one at the end.

use super::emit::Emit;
use super::filter::{self, Stores};
use super::group::{self, Found, Group, Pass};
use super::ptx;
use super::select::{Stream, THREADS, WARPS};
use super::short;
use super::window::Window;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::tile::ValueId;

const BINS: u32 = group::bins(THREADS);
/// Passes of a search: a histogram each, from the first byte of shared memory on.
const PASSES: u32 = 32u32.div_ceil(BINS.ilog2());
/// Bins of a thread.
const OWN: u32 = BINS / THREADS;
/// What a block tells the others: members, and those that tie.
const TOLD: u32 = PASSES * BINS * 4;
/// By pass and warp: which lanes' bins are not all empty.
const FILLED: u32 = TOLD + 4;
const _: () = assert!(OWN == 4 && FILLED + PASSES * WARPS * 4 <= filter::WORK && short::capacity(16) < 1 << 16);

impl<'a> Emit<'a> {
    /// Selects from a row of which each thread of the cluster has so many vectors. All threads of all its blocks.
    pub fn spread_row(
        &mut self,
        stream: &Stream,
        g: &Group,
        (w, vectors): (&Window, u32),
        rank: Val,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let warp = self.t.f.mul(rank, i32(WARPS.into()));
        let warp = self.t.f.add(warp, self.t.warp);
        let first = self.t.f.mul(warp, i32((32 * vectors).into()));
        let first = self.t.f.add(first, self.t.lane);
        self.clear_histograms();
        let keys = self.keys_of(w, first, vectors);
        self.group_wait(g);
        let best = self.search_together(g, i32(stream.k.into()), rank, &keys);
        let (sure, equal) = (self.sure(&best, &keys), self.tied(&best, &keys));
        let (sure_count, ties) = (self.popcount(&sure), self.popcount(&equal));
        let done = self.t.f.cmp("ne", best.done, i32(0));
        let ties = self.t.f.select(done, i32(0), ties);
        // No more than all columns of a block, which 16 bits hold.
        let ties = self.t.f.bin("shl", ties, i32(16));
        let both = self.t.f.bin("or", sure_count, ties);
        let (_, own) = self.group_scan(g, both);
        let [before, all] = self.told(rank, own);
        let all_ties = self.t.f.intrinsic("umin", &[all[1], best.ties]);
        let total = self.t.f.add(all[0], all_ties);
        let ties = self.t.f.intrinsic("umin", &[before[1], best.ties]);
        let start = self.t.f.add(before[0], ties);
        let masks = self.with_ties(g, &best, &keys, sure, before[1]);
        let (places, own) = self.places(g, &masks, vectors);
        let column = self.column_of(w, first);
        self.list_members(&masks, &places, column);
        self.group_wait(g);
        self.deliver_part(stream.k, (start, own), numbers, stores)?;
        let leads = self.t.f.cmp("eq", rank, i32(0));
        let after = self.t.f.open_if(leads);
        self.fill_up(stream.k, total, numbers, stores)?;
        self.t.f.close_if(after);
        // Others may still read what this block tells.
        ptx::cluster_wait(&mut self.t.f);
        Ok(())
    }

    fn clear_histograms(&mut self) {
        let own = self.t.f.mul(self.t.tid, i32((4 * OWN).into()));
        for pass in 0..PASSES {
            let at = self.t.f.add(own, i32((pass * BINS * 4).into()));
            self.t.store_shared(at, &[i32(0); OWN as usize]);
        }
    }

    /// The `wanted` largest keys of all blocks; all but zeros, if there are no more. The same in every block.
    fn search_together(&mut self, g: &Group, wanted: Val, rank: Val, keys: &[Val]) -> Found {
        let per = self.t.f.mul(self.t.tid, i32(OWN.into()));
        let first = self.t.f.sub(i32(i64::from(BINS - OWN)), per);
        let own = self.t.f.mul(first, i32(4));
        let others = self.counted_nowhere(g);
        let [head, pass, end] = [0; 3].map(|_| self.t.f.label());
        self.t.f.br(head, &[i32(1), i32(-2), i32(32), wanted, i32(0), i32(0)]);
        let state = self.t.f.start(head, &[Ty::I32; 6]);
        let &[low, last, bits, wanted, done, byte] = state.as_slice() else { unreachable!("six were asked for") };
        let open = self.t.f.cmp("eq", done, i32(0));
        let more = self.t.f.cmp("sgt", bits, i32(0));
        let more = self.t.f.bin("and", open, more);
        self.t.f.cond_br(more, (pass, &[]), (end, &[]));
        self.t.f.start(pass, &[]);
        let shift = self.t.f.sub(bits, i32(BINS.ilog2().into()));
        let shift = self.t.f.intrinsic("smax", &[shift, i32(0)]);
        let histogram = self.t.f.add(self.t.shared32, byte);
        let counted = Pass { low, last, shift, histogram, others };
        keys.iter().for_each(|&key| self.tally(&counted, key));
        let bins = self.bins_of_all(g, rank, byte, own);
        let sum = bins[1..].iter().fold(bins[0], |sum, &n| self.t.f.add(sum, n));
        let (above, all) = self.group_scan(g, sum);
        let next = self.narrowed(g, &counted, (first, above), &bins, [all, wanted, i32(0)]);
        let byte = self.t.f.add(byte, i32((BINS * 4).into()));
        self.t.f.br(head, &[next.low, next.last, shift, next.ties, next.done, byte]);
        self.t.f.start(end, &[]);
        Found { low, last, ties: wanted, done }
    }

    /// The running thread's bins, all blocks' added up, of the histogram at that byte. What another block has of a thread's bins is read only if it has
    /// some: a row's values are alike in their first bits, few are alike in more, and what blocks read of each other takes its time.
    fn bins_of_all(&mut self, g: &Group, rank: Val, byte: Val, own: Val) -> Vec<Val> {
        let team = self.s.team;
        self.group_wait(g);
        let at = self.t.f.add(byte, own);
        let mut bins = self.t.load_shared(at, Ty::I32, OWN);
        let any = bins[1..].iter().fold(bins[0], |any, &n| self.t.f.bin("or", any, n));
        let some = self.t.f.cmp("ne", any, i32(0));
        let some = isa::ballot(&mut self.t.f, some);
        // A word a warp and pass.
        let slot = self.t.f.div(byte, BINS * 4 / WARPS);
        let warp = self.t.f.add(slot, self.t.warp);
        let slot = self.t.f.mul(warp, i32(4));
        let slot = self.t.f.add(slot, i32(FILLED.into()));
        let first = self.t.f.cmp("eq", self.t.lane, i32(0));
        self.t.when(first, |t| t.store_shared(slot, &[some]));
        self.together();
        // A lane has the word of the block so many behind this one.
        let others = self.t.f.add(rank, self.t.lane);
        let others = self.t.f.rem(others, team);
        let slot = self.t.f.add(self.t.shared32, slot);
        let slot = ptx::address_in(&mut self.t.f, slot, others);
        let filled = ptx::load_cluster_word(&mut self.t.f, slot);
        let at = self.t.f.add(self.t.shared32, at);
        for i in 1..team {
            let filled = isa::shuffle_from(&mut self.t.f, filled, i32(i.into()));
            let own = self.t.f.bin("lshr", filled, self.t.lane);
            let own = self.t.f.bin("and", own, i32(1));
            let some = self.t.f.cmp("ne", own, i32(0));
            let other = self.t.f.add(rank, i32(i.into()));
            let other = self.t.f.rem(other, team);
            let at = ptx::address_in(&mut self.t.f, at, other);
            for (sum, n) in bins.iter_mut().zip(ptx::load_cluster_words_if(&mut self.t.f, some, at)) {
                *sum = self.t.f.add(*sum, n);
            }
        }
        bins
    }

    /// Tells the other blocks a pair of 16-bit numbers, the first the low one: their sums over the blocks before this one, and over all.
    fn told(&mut self, rank: Val, own: Val) -> [[Val; 2]; 2] {
        let one = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(one, |t| t.store_shared(i32(TOLD.into()), &[own]));
        self.together();
        let team = self.s.team;
        let other = self.t.f.rem(self.t.lane, team);
        let at = self.t.f.add(self.t.shared32, i32(TOLD.into()));
        let at = ptx::address_in(&mut self.t.f, at, other);
        let both = ptx::load_cluster_word(&mut self.t.f, at);
        ptx::cluster_arrive(&mut self.t.f);
        let low = self.t.f.bin("and", both, i32(0xffff));
        let high = self.t.f.bin("lshr", both, i32(16));
        let real = self.t.f.cmp("slt", self.t.lane, i32(team.into()));
        let earlier = self.t.f.cmp("slt", self.t.lane, rank);
        [earlier, real].map(|c| {
            [low, high].map(|v| {
                let v = self.t.f.select(c, v, i32(0));
                isa::reduce_warp(&mut self.t.f, "add", v)
            })
        })
    }
}
