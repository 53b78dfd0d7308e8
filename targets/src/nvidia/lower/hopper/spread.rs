//! The best of a row that the blocks of a cluster can hold in their registers: read once, exactly, whatever its values are.
//!
//! Each block has a stretch of the row, as [`super::short`] has all of it. A radix pass counts in each block by itself; then every thread sends its bins to
//! all blocks, if it has any there, and adds up what came, so that all find the same digit and none has to be told. What is sent comes with its own barrier: no block fences its
//! memory, which would take longer than the way. The blocks tell each other how many of theirs are in and
//! how many tie with the last; the sums over those before are where a block's part of the result begins, and it writes that part itself: what is
//! selected is in ascending order, and of equals the first are in it.
//!
//! **Cost.** One read of the row; an exchange a pass, three passes at most, and one for the sums.

use super::emit::Emit;
use super::filter::{self, SELECTABLE, Stores};
use super::group::{self, Group};
use super::ptx;
use super::select::{MET, MOST_BLOCKS, OUT, Stream, THREADS, WARPS};
use super::sends;
use super::short;
use super::window::Window;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::tile::ValueId;

const BINS: u32 = group::bins(THREADS);
/// Passes of a search.
const PASSES: u32 = 32u32.div_ceil(BINS.ilog2());
/// Bins of a thread, which it sends as so many bytes; what a block gets in a pass from each of the others.
const OWN: u32 = BINS / THREADS;
const SENT: u32 = 2 * OWN;
const SLOT: u32 = SENT * THREADS;
/// Two passes' from the first byte of shared memory on: who sends a third time has got what was sent after the first was read.
const BUFFER: u32 = (MOST_BLOCKS - 1) * SLOT;
/// Of each pass and other block, by warp: which lanes' bins are not all empty.
const FILLED: u32 = 2 * BUFFER;
const FILLED_SLOT: u32 = 4 * WARPS;
const FILLED_PASS: u32 = (MOST_BLOCKS - 1) * FILLED_SLOT;
/// What blocks tell each other: members, and those that tie.
const TOLD: u32 = FILLED + PASSES * FILLED_PASS;
/// Blocks whose counts can be added up in 16 bits.
const TOGETHER: u32 = 3;
const _: () = assert!(OWN == 4 && TOLD + 4 * MOST_BLOCKS <= filter::WORK && TOGETHER * short::capacity(8) < 1 << 16);
const _: () = assert!(MET + 8 * (PASSES + 1) <= OUT);

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
        self.begin_meeting();
        let keys = self.keys_of(w, first, vectors);
        self.group_wait(g);
        // All barriers are there.
        ptx::cluster_wait(&mut self.t.f);
        let all = SELECTABLE.map(i32).into();
        let wanted = (i32(stream.k.into()), i32(0));
        let mut count_keys =
            |e: &mut Self, count: &mut dyn FnMut(&mut Self, Val)| keys.iter().for_each(|&k| count(e, k));
        let mut merge = |e: &mut Self, own: Vec<Val>, pass: Val| e.bins_of_all(rank, own, pass);
        let best = self.search_merged(g, all, wanted, &mut count_keys, Some(&mut merge));
        let sure = self.sure(&best, &keys);
        // Mostly none ties.
        let open = self.t.f.bin("xor", best.done, i32(1));
        let ties = self.t.f.open_loop(i32(0), open, &vec![i32(0); sure.len()]);
        let tied = self.tied(&best, &keys);
        self.t.f.close_loop(&ties, i32(1), &tied);
        let equal = ties.args[1..].to_vec();
        let (sure_count, ties) = (self.popcount(&sure), self.popcount(&equal));
        // No more than all columns of a block, which 16 bits hold.
        let ties = self.t.f.bin("shl", ties, i32(16));
        let both = self.t.f.bin("or", sure_count, ties);
        let (_, own) = self.group_scan(g, both);
        let [before, all] = self.told(rank, own);
        let all_ties = self.t.f.intrinsic("umin", &[all[1], best.ties]);
        let total = self.t.f.add(all[0], all_ties);
        let ties = self.t.f.intrinsic("umin", &[before[1], best.ties]);
        let start = self.t.f.add(before[0], ties);
        let masks = self.with_ties(g, &best, &keys, (sure, Some(equal)), before[1]);
        let (places, own) = self.places(g, &masks, vectors);
        let column = self.column_of(w, first);
        self.list_members(&masks, &places, column);
        self.group_wait(g);
        self.deliver_part(stream.k, (start, own), numbers, stores)?;
        let leads = self.t.f.cmp("eq", rank, i32(0));
        let after = self.t.f.open_if(leads);
        self.fill_up(stream.k, total, numbers, stores)?;
        self.t.f.close_if(after);
        Ok(())
    }

    /// Makes barriers of what blocks send each other.
    fn begin_meeting(&mut self) {
        let team = self.s.team;
        let zero = self.t.f.cmp("eq", self.t.tid, i32(0));
        self.t.when(zero, |t| {
            let senders = (0..PASSES).map(|pass| (MET + 8 * pass, WARPS * (team - 1), 0));
            let all: Vec<_> = senders.chain([(MET + 8 * PASSES, 1, 4 * team)]).collect();
            sends::make_barriers(t, &all);
        });
        ptx::cluster_arrive_relaxed(&mut self.t.f);
    }

    /// The running thread's bins of a pass, all blocks' added up. What a block has of a thread's bins is sent only if it has some: a row's values are alike in
    /// their first bits, few are alike in more, and what blocks send takes its time.
    fn bins_of_all(&mut self, rank: Val, own: Vec<Val>, pass: Val) -> Vec<Val> {
        let team = self.s.team;
        let any = own[1..].iter().fold(own[0], |any, &n| self.t.f.bin("or", any, n));
        let some = self.t.f.cmp("ne", any, i32(0));
        let filled = isa::ballot(&mut self.t.f, some);
        let f = &mut self.t.f;
        let byte = f.mul(pass, i32(8));
        let barrier = f.add(self.t.shared32, byte);
        let barrier = f.add(barrier, i32(MET.into()));
        let words = f.mul(pass, i32(FILLED_PASS.into()));
        let warp = f.mul(self.t.warp, i32(4));
        let words = f.add(words, warp);
        let words = f.add(words, i32(FILLED.into()));
        let second = f.bin("and", pass, i32(1));
        let buffer = f.mul(second, i32(BUFFER.into()));
        let thread = f.mul(self.t.tid, i32(SENT.into()));
        let pairs = f.add(buffer, thread);
        self.announce(rank, filled, (barrier, words));
        let packed: Vec<Val> = own.chunks(2).map(|pair| self.two_counts(pair)).collect();
        self.t.when(some, |t| {
            for i in 1..team {
                let other = t.f.add(rank, i32(i.into()));
                let other = t.f.rem(other, team);
                let at = t.f.add(pairs, i32(((i - 1) * SLOT).into()));
                let at = t.f.add(t.shared32, at);
                let [at, barrier] = [at, barrier].map(|at| ptx::address_in(&mut t.f, at, other));
                ptx::send_words(&mut t.f, at, barrier, &packed);
            }
        });
        ptx::barrier_wait(&mut self.t.f, barrier, i32(0));
        self.with_sent(own, (words, pairs))
    }

    /// A lane tells each of the other blocks which lanes send, so many bytes.
    fn announce(&mut self, rank: Val, filled: Val, (barrier, words): (Val, Val)) {
        let team = self.s.team;
        let count = isa::popcount(&mut self.t.f, filled);
        let bytes = self.t.f.mul(count, i32(SENT.into()));
        let bytes = self.t.f.add(bytes, i32(4));
        let tells = self.t.f.cmp("slt", self.t.lane, i32(i64::from(team) - 1));
        let lane = self.t.lane;
        self.t.when(tells, |t| {
            let other = t.f.add(rank, lane);
            let other = t.f.add(other, i32(1));
            let other = t.f.rem(other, team);
            let slot = t.f.mul(lane, i32(FILLED_SLOT.into()));
            let at = t.f.add(words, slot);
            let at = t.f.add(t.shared32, at);
            let [at, barrier] = [at, barrier].map(|at| ptx::address_in(&mut t.f, at, other));
            ptx::barrier_arrive_sending(&mut t.f, barrier, bytes);
            ptx::send_words(&mut t.f, at, barrier, &[filled]);
        });
    }

    /// Two counts in a word.
    fn two_counts(&mut self, pair: &[Val]) -> Val {
        let high = self.t.f.bin("shl", pair[1], i32(16));
        self.t.f.bin("or", pair[0], high)
    }

    /// The running thread's bins and those that the others have sent it.
    fn with_sent(&mut self, own: Vec<Val>, (words, pairs): (Val, Val)) -> Vec<Val> {
        let mut bins = own;
        let others: Vec<u32> = (0..self.s.team - 1).collect();
        for some in others.chunks(TOGETHER as usize) {
            let mut sums = [i32(0); 2];
            for &i in some {
                let at = self.t.f.add(words, i32((i * FILLED_SLOT).into()));
                let filled = self.t.load_shared(at, Ty::I32, 1)[0];
                let bit = self.t.f.bin("lshr", filled, self.t.lane);
                let bit = self.t.f.bin("and", bit, i32(1));
                let sent = self.t.f.cmp("ne", bit, i32(0));
                let at = self.t.f.add(pairs, i32((i * SLOT).into()));
                let pair = self.t.load_shared(at, Ty::I32, 2);
                for (sum, word) in sums.iter_mut().zip(pair) {
                    let word = self.t.f.select(sent, word, i32(0));
                    *sum = self.t.f.add(*sum, word);
                }
            }
            for (i, sum) in sums.into_iter().enumerate() {
                let low = self.t.f.bin("and", sum, i32(0xffff));
                let high = self.t.f.bin("lshr", sum, i32(16));
                bins[2 * i] = self.t.f.add(bins[2 * i], low);
                bins[2 * i + 1] = self.t.f.add(bins[2 * i + 1], high);
            }
        }
        bins
    }

    /// Tells the other blocks a pair of 16-bit numbers, the first the low one: their sums over the blocks before this one, and over all.
    fn told(&mut self, rank: Val, own: Val) -> [[Val; 2]; 2] {
        let team = self.s.team;
        let barrier = MET + 8 * PASSES;
        let slot = self.t.f.mul(rank, i32(4));
        let slot = self.t.f.add(slot, i32(TOLD.into()));
        self.send_all((slot, barrier), &[own]);
        self.wait_for(barrier);
        let other = self.t.f.rem(self.t.lane, team);
        let slot = self.t.f.mul(other, i32(4));
        let slot = self.t.f.add(slot, i32(TOLD.into()));
        let both = self.t.load_shared(slot, Ty::I32, 1)[0];
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
