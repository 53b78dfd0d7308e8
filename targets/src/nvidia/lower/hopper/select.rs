//! The best of a row in memory, by several blocks of a cluster.
//!
//! A program that begins a selection, offers it every column of a row that lies in memory, and takes it (`topk_init`, a loop of
//! `topk_push`, `topk_take`) needs no stream: the row can be read again. A cluster runs one block of the grid; each of its blocks has a
//! share of the columns, each warp of that a share.
//!
//! Rows are selected by a sample where that works ([`super::filter`]); this is what works always:
//!
//! 1. Columns become integers that order like the floats ([`KEYS`] of them stay in shared memory; further ones are computed again each
//!    time), and their first [`DIGIT`] bits are counted.
//! 2. Each block adds up the counts of all and finds the digit in which the `k`-th largest lies. If the selection is not a whole number of
//!    digits, those that have this digit are counted by their next bits, and so on: three passes at most.
//! 3. Warps count what they have above the digit found, and equal to it. Sums over the warps before give every selected column its place, so
//!    that the result is in ascending order, and of equals the lowest numbers are in it.
//!
//! Counts are integers: the atomic additions commute, and the result depends on nothing else. Nothing is dropped whatever the
//! values are: no buffer holds candidates.
//!
//! **Cost.** One read of the row; a barrier of the cluster a pass, one for the places and one at the end. Floor: the row's bytes.

use super::emit::{Emit, Held};
use super::filter::{self, Stores};
use super::ptx;
use crate::Kernel;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::block::Threads;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, i32};
use dsc_ir::sched::{self, Op, Scheduled};
use dsc_ir::tile::{self, Index, Program, Type, ValueId};

/// Threads of a block.
pub const THREADS: u32 = 512;
pub const WARPS: u32 = THREADS / Arch::WARP;
/// Keys of a block that stay in shared memory.
const KEYS: u32 = 16 * 1024;
/// Bits of a key that a pass looks at, from the top; the last pass has the rest.
const DIGIT: u32 = 11;
const BINS: u32 = 1 << DIGIT;
/// Neighbouring keys that a lane looks at together, and keys of a warp's step.
const GROUP: u32 = 4;
const STEP: u32 = GROUP * Arch::WARP;
/// Keys of a thread whose columns are read at a time.
const BATCH: u32 = 8;

/// Bytes of shared memory where things start.
const HISTOGRAMS: u32 = KEYS * 4;
/// Totals of the warps, in the search for a digit.
const SCAN: u32 = HISTOGRAMS + 3 * BINS * 4;
/// By pass: the digit, how many of it are wanted, how many there are.
const FOUND: u32 = SCAN + WARPS * 4;
/// By warp: columns above the digit, and equal to it.
const TOTALS: u32 = FOUND + 3 * 16;
/// The block's sums of those.
const BLOCK: u32 = TOTALS + WARPS * 8;
/// Bytes of what counting uses.
const COUNTING: u32 = BLOCK + 8;
/// Candidates that this block has listed, the largest key, whether lists were enough; what each block of the cluster says of its own; the barriers of what blocks
/// send each other: what they say, lists, and whether they were enough; of each pass of a search, and of what it has found.
pub const COUNT: u32 = if filter::BYTES > COUNTING { filter::BYTES } else { COUNTING };
pub const MOST: u32 = COUNT + 4;
pub const VERDICT: u32 = COUNT + 8;
pub const COUNTS: u32 = COUNT + 16;
pub const HEARD: u32 = COUNTS + 16 * MOST_BLOCKS;
pub const LISTED: u32 = HEARD + 8;
pub const JUDGED: u32 = HEARD + 16;
pub const MET: u32 = HEARD + 24;
/// Columns selected, in order.
pub const OUT: u32 = HEARD + 64;
pub const OUT_BYTES: u32 = 4 * filter::MOST_K;
/// End.
const BYTES: u32 = OUT + OUT_BYTES;

/// Places of a thread that are written together.
const DELIVERED: u32 = 4;
/// Bins of a thread.
const OWN: u32 = BINS / THREADS;

/// Blocks of a cluster that every GPU with clusters runs.
pub const MOST_BLOCKS: u32 = 8;

/// The selection of a scheduled kernel.
pub struct Stream {
    /// The columns offered: bounds, and so many at a time.
    pub range: (Index, Index, u32),
    pub counter: ValueId,
    pub values: ValueId,
    pub base: ValueId,
    pub k: u32,
}

/// The plain schedule of such a program, for a cluster of so many blocks as the kernel's schedule says; none if it is no such program.
pub fn plan(kernel: &Kernel, arch: &Arch) -> Option<Scheduled> {
    selects_a_row(&kernel.program).then_some(())?;
    let mut s = crate::gpu::schedule::schedule(kernel, arch).ok()?;
    s.team = kernel.schedule.cluster.clamp(1, MOST_BLOCKS);
    s.threads = THREADS;
    stream(&s)?;
    Some(s)
}

/// Whether a program is one such selection, of one row a block, and elementwise arithmetic.
fn selects_a_row(program: &Program) -> bool {
    let (mut inits, mut takes, mut loops) = (0, Vec::new(), 0);
    for inst in &program.body.insts {
        match &inst.op {
            tile::Op::TopkInit { rows: 1, .. } => inits += 1,
            tile::Op::TopkTake { .. } => takes.push(inst.results[0]),
            tile::Op::For { body, init, .. } => {
                loops += 1;
                let pushes = body.insts.iter().filter(|i| matches!(i.op, tile::Op::TopkPush { .. })).count();
                let plain = |i: &tile::Inst| elementwise(&i.op) || matches!(i.op, tile::Op::TopkPush { .. });
                if pushes != 1 || init.len() != 1 || !body.insts.iter().all(plain) {
                    return false;
                }
            }
            tile::Op::Store { .. } => {}
            // Of one row.
            tile::Op::Reduce { x, kind: tile::ReduceKind::Max, .. }
                if program.tile(*x).is_some_and(|t| t.elements() == 1) => {}
            op if elementwise(op) => {}
            _ => return false,
        }
    }
    let uses_values = |v: ValueId| program.body.insts.iter().any(|i| tile::operands(&i.op).contains(&v));
    let &[values] = takes.as_slice() else { return false };
    inits == 1 && loops == 1 && !uses_values(values)
}

fn elementwise(op: &tile::Op) -> bool {
    matches!(
        op,
        tile::Op::BlockId { .. }
            | tile::Op::Sym(_)
            | tile::Op::Full { .. }
            | tile::Op::Iota { .. }
            | tile::Op::Load { .. }
            | tile::Op::Gather { .. }
            | tile::Op::Map { .. }
            | tile::Op::Reshape { .. }
    )
}

fn stream(s: &Scheduled) -> Option<Stream> {
    let (lo, hi, step, body) = s.common.insts.iter().find_map(|i| match &i.op {
        Op::For { lo, hi, step, body, .. } => Some((*lo, *hi, *step, body)),
        _ => None,
    })?;
    let push = body.insts.iter().find_map(|i| match &i.op {
        Op::Tile(tile::Op::TopkPush { state, values, base }) => Some((*state, *values, *base)),
        _ => None,
    });
    let (state, values, base) = push?;
    let Type::Topk { k, .. } = s.types[state.0 as usize] else { return None };
    let whole = matches!(&s.types[values.0 as usize], Type::Tile(t) if t.shape == [1, step]);
    whole.then_some(Stream { range: (lo, hi, step), counter: body.args[0], values, base, k })
}

/// Whether a scheduled kernel is one of [`plan`].
pub fn is_selection(s: &Scheduled) -> bool {
    s.roles.is_empty() && stream(s).is_some()
}

/// Bytes of shared memory of a block.
pub fn shared_bytes() -> u32 {
    BYTES
}

/// Which keys are selected: those with `key >> drop` above `bound`, and the first `ties` of those equal to it.
#[derive(Clone, Copy)]
struct Rule {
    bound: Val,
    drop: Val,
    ties: Val,
}

/// A block's share of the columns, and its warp's part of that.
#[derive(Clone, Copy)]
struct Share {
    /// The share's first column, counted from the loop's first.
    first: Val,
    /// The warp's first key within the share, and past its last.
    from: Val,
    to: Val,
    /// All columns.
    all: Val,
}

impl<'a> Emit<'a> {
    /// The body of a kernel that selects.
    pub fn selection(&mut self) -> Result<(), String> {
        let s = self.s;
        let f = &mut self.t.f;
        let number = if s.team > 1 { isa::sreg(f, "clusterid.x") } else { isa::sreg(f, "ctaid.x") };
        let [y, z] = ["y", "z"].map(|axis| isa::sreg(f, &format!("ctaid.{axis}")));
        self.block = [number, y, z];
        let mut inside = Val::Int(1, Ty::I1);
        for (axis, dim) in s.grid.iter().enumerate() {
            let extent = self.extent(dim.extent);
            let first = self.t.f.mul(self.block[axis], i32(dim.tile.into()));
            let here = self.t.f.cmp("slt", first, extent);
            inside = self.t.f.bin("and", inside, here);
        }
        // Whole clusters are beyond the grid or none of their blocks.
        let after = self.t.f.open_if(inside);
        let stream = stream(s).ok_or("no selection")?;
        for inst in &s.common.insts {
            match &inst.op {
                // The row is read where the selection is taken.
                Op::Barrier | Op::For { .. } | Op::Tile(tile::Op::TopkInit { .. }) => {}
                Op::Tile(tile::Op::TopkTake { .. }) => self.take_row(&stream, inst.results[1], &stores(s))?,
                Op::Tile(op) => self.uniform_inst(inst, op)?,
                _ => return Err("this in a selection".into()),
            }
        }
        self.t.f.close_if(after);
        Ok(())
    }

    /// Finds what is selected, and writes it.
    fn take_row(&mut self, stream: &Stream, numbers: ValueId, stores: Stores<'_, 'a>) -> Result<(), String> {
        let all = self.columns(stream)?;
        let window = if stream.k <= filter::MOST_K { self.window(stream, all)? } else { None };
        let counts = match window {
            None => Val::Int(1, Ty::I1),
            Some((window, inside)) => {
                let (tries, join) = (self.t.f.label(), self.t.f.label());
                self.t.f.cond_br(inside, (tries, &[]), (join, &[i32(1)]));
                self.t.f.start(tries, &[]);
                let done = self.filtered(stream, &window, numbers, stores)?;
                let rest = self.t.f.bin("xor", done, Val::Int(1, Ty::I1));
                let rest = self.t.f.cast("zext", rest, Ty::I32);
                self.t.f.br(join, &[rest]);
                let counts = self.t.f.start(join, &[Ty::I32])[0];
                self.t.f.cmp("ne", counts, i32(0))
            }
        };
        let after = self.t.f.open_if(counts);
        // What was listed is read no more.
        self.t.barrier();
        let (rule, share) = self.find(stream, all)?;
        self.give(stream, rule, share, numbers, stores)?;
        // Others have read what this block has counted.
        self.together();
        self.t.f.close_if(after);
        Ok(())
    }

    /// Columns offered, in whole steps: what a program offers beyond the end, it has to say is nothing.
    fn columns(&mut self, stream: &Stream) -> Result<Val, String> {
        let (lo, hi, step) = stream.range;
        let (lo, hi) = (self.index(lo)?, self.index(hi)?);
        let f = &mut self.t.f;
        let columns = f.sub(hi, lo);
        let columns = f.intrinsic("smax", &[columns, i32(0)]);
        let columns = f.add(columns, i32(i64::from(step) - 1));
        let steps = f.div(columns, step);
        Ok(f.mul(steps, i32(step.into())))
    }

    /// Scalars are computed where they stand; tiles where they are used.
    fn uniform_inst(&mut self, inst: &'a sched::Inst, op: &'a tile::Op) -> Result<(), String> {
        let Some(&r) = inst.results.first() else { return Ok(()) };
        let one = matches!(&self.s.types[r.0 as usize], Type::Tile(t) if t.shape.is_empty());
        if one {
            let v = self.lazy_scalar(r, op)?;
            self.held.insert(r, Held::Scalar(v));
        }
        Ok(())
    }

    fn lazy_scalar(&mut self, r: ValueId, op: &'a tile::Op) -> Result<Val, String> {
        match op {
            tile::Op::BlockId { axis } => Ok(self.block[*axis as usize]),
            tile::Op::Sym(sym) => Ok(self.syms[*sym as usize]),
            _ => self.flat_element(r, i32(0)),
        }
    }

    /// All threads of the cluster wait for one another; shared memory written before is visible after, in every block.
    pub fn together(&mut self) {
        if self.s.team > 1 {
            ptx::cluster_arrive(&mut self.t.f);
            ptx::cluster_wait(&mut self.t.f);
        } else {
            self.t.barrier();
        }
    }

    /// Sets the loop's counter to the round of a column of its range; where in the round that column is.
    fn enter_round(&mut self, stream: &Stream, column: Val) -> Result<Val, String> {
        let (lo, _, step) = stream.range;
        let lo = self.index(lo)?;
        let within = self.t.f.rem(column, step);
        let counter = self.t.f.sub(column, within);
        let counter = self.t.f.add(lo, counter);
        self.held.insert(stream.counter, Held::Scalar(counter));
        Ok(within)
    }

    /// The key of a column of the loop's range: 0 if it can not be selected.
    pub fn key_of(&mut self, stream: &Stream, column: Val) -> Result<Val, String> {
        let within = self.enter_round(stream, column)?;
        let value = self.flat_element(stream.values, within)?;
        Ok(self.key(value))
    }

    /// The candidate number of a column of the loop's range.
    pub fn number_of(&mut self, stream: &Stream, column: Val) -> Result<Val, String> {
        let within = self.enter_round(stream, column)?;
        let base = self.flat_element(stream.base, i32(0))?;
        Ok(self.t.f.add(base, within))
    }

    /// Runs `body` on the keys of this warp's part, [`GROUP`] neighbours a lane: those keys, and the place of the first in the share. Beyond the
    /// part keys are 0. All lanes take part. Keys are those kept in shared memory, or computed again.
    fn sweep(
        &mut self,
        stream: &Stream,
        share: Share,
        carried: &[Val],
        mut body: impl FnMut(&mut Self, &[Val], Val, &[Val]) -> Result<Vec<Val>, String>,
    ) -> Result<Vec<Val>, String> {
        let mut carried = carried.to_vec();
        let kept = self.t.f.intrinsic("smin", &[share.to, i32(KEYS.into())]);
        let kept = self.t.f.intrinsic("smax", &[kept, share.from]);
        for (lo, hi, again) in [(share.from, kept, false), (kept, share.to, true)] {
            let l = self.t.f.open_loop(lo, hi, &carried);
            let own = self.t.f.mul(self.t.lane, i32(GROUP.into()));
            let place = self.t.f.add(l.args[0], own);
            let keys = if again {
                let mut keys = Vec::new();
                for i in 0..GROUP {
                    let column = self.t.f.add(share.first, place);
                    let column = self.t.f.add(column, i32(i.into()));
                    let here = self.t.f.cmp("slt", column, share.all);
                    let column = self.t.f.select(here, column, i32(0));
                    let key = self.key_of(stream, column)?;
                    keys.push(self.t.f.select(here, key, i32(0)));
                }
                keys
            } else {
                // Parts, and what is kept of them, are whole steps of a warp.
                let byte = self.t.f.mul(place, i32(4));
                self.t.load_shared(byte, Ty::I32, GROUP)
            };
            let next = body(self, &keys, place, &l.args[1..])?;
            self.t.f.close_loop(&l, i32(STEP.into()), &next);
            carried = l.args[1..].to_vec();
        }
        Ok(carried)
    }

    /// Adds one to a bin of a pass's histogram where `c` holds.
    fn count(&mut self, pass: u32, bin: Val, c: Val) {
        let shared = self.t.shared32;
        self.t.when(c, |t| {
            let byte = t.f.mul(bin, i32(4));
            let at = t.f.add(shared, byte);
            let at = t.f.add(at, i32((HISTOGRAMS + pass * BINS * 4).into()));
            isa::shared_atomic_add(&mut t.f, at, i32(1));
        });
    }

    /// Finds which columns are selected.
    fn find(&mut self, stream: &Stream, all: Val) -> Result<(Rule, Share), String> {
        let cluster = self.s.team;
        let rank = if cluster > 1 { isa::sreg(&mut self.t.f, "cluster.ctarank") } else { i32(0) };
        let f = &mut self.t.f;
        let lanes = WARPS * STEP * cluster;
        let part = f.add(all, i32(i64::from(lanes) - 1));
        let part = f.div(part, lanes);
        let part = f.mul(part, i32(STEP.into()));
        let each = f.mul(part, i32(WARPS.into()));
        let first = f.mul(rank, each);
        let from = f.mul(self.t.warp, part);
        let to = f.add(from, part);
        let share = Share { first, from, to, all };

        let threads = i32(THREADS.into());
        let words = i32((3 * BINS).into());
        let tid = self.t.tid;
        self.t.for_loop((tid, words, threads), &[], |t, i, _| {
            let byte = t.f.mul(i, i32(4));
            let at = t.f.add(byte, i32(HISTOGRAMS.into()));
            t.store_shared(at, &[i32(0)]);
            Vec::new()
        });
        let three = self.t.f.cmp("slt", tid, i32(3));
        self.t.when(three, |t| {
            let byte = t.f.mul(tid, i32(16));
            let at = t.f.add(byte, i32(FOUND.into()));
            t.store_shared(at, &[i32(-1), i32(0), i32(0), i32(0)]);
        });
        self.t.barrier();

        // Read, keep and count, several columns of a lane at a time.
        let l = self.t.f.open_loop(from, to, &[]);
        let mut batch = Vec::new();
        for i in 0..BATCH {
            let place = self.t.f.add(l.args[0], self.t.lane);
            let place = self.t.f.add(place, i32((32 * i).into()));
            let column = self.t.f.add(share.first, place);
            let mine = self.t.f.cmp("slt", place, to);
            let there = self.t.f.cmp("slt", column, all);
            let here = self.t.f.bin("and", mine, there);
            // Beyond its part a lane reads the first column, whose value it does not use.
            let column = self.t.f.select(here, column, i32(0));
            let key = self.key_of(stream, column)?;
            let key = self.t.f.select(here, key, i32(0));
            batch.push((place, mine, key));
        }
        for (place, mine, key) in batch {
            let fits = self.t.f.cmp("slt", place, i32(KEYS.into()));
            let keep = self.t.f.bin("and", mine, fits);
            self.t.when(keep, |t| {
                let byte = t.f.mul(place, i32(4));
                t.store_shared(byte, &[key]);
            });
            let some = self.t.f.cmp("ne", key, i32(0));
            let bin = self.t.f.bin("lshr", key, i32((32 - DIGIT).into()));
            self.count(0, bin, some);
        }
        self.t.f.close_loop(&l, i32((32 * BATCH).into()), &[]);

        self.together();
        let k = i32(stream.k.into());
        let [digit, wanted, there] = self.digit(0, k);
        // Fewer candidates than places: all of them.
        let few = self.t.f.cmp("slt", digit, i32(0));
        let drop = self.t.f.select(few, i32(0), i32((32 - DIGIT).into()));
        let bound = self.t.f.select(few, i32(0), digit);
        let done = self.t.f.cmp("eq", wanted, there);
        let mut state = [bound, drop, wanted, self.t.f.cast("zext", done, Ty::I32)];
        for pass in 1..3 {
            let shift = 32u32.saturating_sub(DIGIT * (pass + 1));
            let more = self.t.f.cmp("eq", state[3], i32(0));
            let rounds = self.t.f.cast("zext", more, Ty::I32);
            let l = self.t.f.open_loop(i32(0), rounds, &state);
            let [bound, drop, ties] = [l.args[1], l.args[2], l.args[3]];
            self.sweep(stream, share, &[], |e, keys, _, _| {
                let bits = if pass == 1 { DIGIT } else { 32 - 2 * DIGIT };
                for &key in keys {
                    let high = e.t.f.bin("lshr", key, drop);
                    let same = e.t.f.cmp("eq", high, bound);
                    let some = e.t.f.cmp("ne", key, i32(0));
                    let same = e.t.f.bin("and", same, some);
                    let bin = e.t.f.bin("lshr", key, i32(shift.into()));
                    let bin = e.t.f.bin("and", bin, i32((1 << bits) - 1));
                    e.count(pass, bin, same);
                }
                Ok(Vec::new())
            })?;
            self.together();
            let [digit, wanted, there] = self.digit(pass, ties);
            let bits = if pass == 1 { DIGIT } else { 32 - 2 * DIGIT };
            let f = &mut self.t.f;
            let longer = f.bin("shl", bound, i32(bits.into()));
            let bound = f.bin("or", longer, digit);
            let done = f.cmp("eq", wanted, there);
            let done = f.cast("zext", done, Ty::I32);
            self.t.f.close_loop(&l, i32(1), &[bound, i32(shift.into()), wanted, done]);
            state = [l.args[1], l.args[2], l.args[3], l.args[4]];
        }
        Ok((Rule { bound: state[0], drop: state[1], ties: state[2] }, share))
    }

    /// Of a pass's histograms, all of the cluster: the digit in which number `wanted` from the top lies, how many of it are wanted, and how
    /// many there are; digit −1 if there are fewer. All threads; the histograms are complete.
    fn digit(&mut self, pass: u32, wanted: Val) -> [Val; 3] {
        let cluster = self.s.team;
        let tid = self.t.tid;
        // The first thread's bins are the highest.
        let low = self.t.f.mul(tid, i32(OWN.into()));
        let low = self.t.f.sub(i32(i64::from(BINS - OWN)), low);
        let byte = self.t.f.mul(low, i32(4));
        let at = self.t.f.add(byte, i32((HISTOGRAMS + pass * BINS * 4).into()));
        let mut bins = vec![i32(0); OWN as usize];
        for rank in 0..cluster {
            for i in (0..OWN as usize).step_by(2) {
                let at = self.t.f.add(at, i32(4 * i as i64));
                let pair = self.remote(at, rank);
                bins[i] = self.t.f.add(bins[i], pair[0]);
                bins[i + 1] = self.t.f.add(bins[i + 1], pair[1]);
            }
        }
        let own = bins.iter().skip(1).fold(bins[0], |sum, &n| self.t.f.add(sum, n));
        let upto = self.sum_upto(own);
        let last = self.t.f.cmp("eq", self.t.lane, i32(31));
        let warp = self.t.warp;
        let slot = self.t.f.mul(warp, i32(4));
        let slot = self.t.f.add(slot, i32(SCAN.into()));
        self.t.when(last, |t| t.store_shared(slot, &[upto]));
        self.t.barrier();
        let other = self.t.f.intrinsic("smin", &[self.t.lane, i32(i64::from(WARPS) - 1)]);
        let byte = self.t.f.mul(other, i32(4));
        let byte = self.t.f.add(byte, i32(SCAN.into()));
        let of_warp = self.t.load_shared(byte, Ty::I32, 1)[0];
        let before = self.t.f.cmp("slt", self.t.lane, warp);
        let of_warp = self.t.f.select(before, of_warp, i32(0));
        let before = isa::reduce_warp(&mut self.t.f, "add", of_warp);
        let upto = self.t.f.add(before, upto);
        let above = self.t.f.sub(upto, own);
        self.note_digit(wanted, (low, above), &bins, i32((FOUND + 16 * pass).into()));
        self.t.barrier();
        let found = self.t.load_shared(i32((FOUND + 16 * pass).into()), Ty::I32, 4);
        [found[0], found[1], found[2]]
    }

    /// A pair of words at a byte of the shared memory of that block of the cluster.
    pub fn remote(&mut self, byte: Val, rank: u32) -> Vec<Val> {
        if self.s.team == 1 {
            return self.t.load_shared(byte, Ty::I32, 2);
        }
        let at = self.t.f.add(self.t.shared32, byte);
        isa::load_cluster_pair(&mut self.t.f, at, i32(rank.into()))
    }

    /// Whether a key is above the bound, and whether equal to it.
    fn judged(&mut self, rule: Rule, key: Val) -> [Val; 2] {
        let f = &mut self.t.f;
        let high = f.bin("lshr", key, rule.drop);
        let some = f.cmp("ne", key, i32(0));
        let (above, equal) = (f.cmp("ugt", high, rule.bound), f.cmp("eq", high, rule.bound));
        [f.bin("and", above, some), f.bin("and", equal, some)]
    }

    /// Writes the selected columns to their places.
    fn give(
        &mut self,
        stream: &Stream,
        rule: Rule,
        share: Share,
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let counts = self.sweep(stream, share, &[i32(0), i32(0)], |e, keys, _, counts| {
            let mut counts = counts.to_vec();
            for &key in keys {
                for (count, judged) in counts.iter_mut().zip(e.judged(rule, key)) {
                    let one = e.t.f.cast("zext", judged, Ty::I32);
                    *count = e.t.f.add(*count, one);
                }
            }
            Ok(counts)
        })?;
        let counts = [0, 1].map(|i| isa::reduce_warp(&mut self.t.f, "add", counts[i]));
        let (warp, lane) = (self.t.warp, self.t.lane);
        let first = self.t.f.cmp("eq", lane, i32(0));
        let slot = self.t.f.mul(warp, i32(8));
        let slot = self.t.f.add(slot, i32(TOTALS.into()));
        self.t.when(first, |t| t.store_shared(slot, &counts));
        self.t.barrier();
        let other = self.t.f.intrinsic("smin", &[lane, i32(i64::from(WARPS) - 1)]);
        let byte = self.t.f.mul(other, i32(8));
        let byte = self.t.f.add(byte, i32(TOTALS.into()));
        let of_warp = self.t.load_shared(byte, Ty::I32, 2);
        let real = self.t.f.cmp("slt", lane, i32(WARPS.into()));
        let of_warp = [0, 1].map(|i| self.t.f.select(real, of_warp[i], i32(0)));
        let before = self.t.f.cmp("slt", lane, warp);
        let mut start = [0, 1].map(|i| {
            let v = self.t.f.select(before, of_warp[i], i32(0));
            isa::reduce_warp(&mut self.t.f, "add", v)
        });
        let mut totals = [0, 1].map(|i| isa::reduce_warp(&mut self.t.f, "add", of_warp[i]));
        let cluster = self.s.team;
        let mut leads = Val::Int(1, Ty::I1);
        if cluster > 1 {
            let rank = isa::sreg(&mut self.t.f, "cluster.ctarank");
            leads = self.t.f.cmp("eq", rank, i32(0));
            let tid = self.t.tid;
            let one = self.t.f.cmp("eq", tid, i32(0));
            self.t.when(one, |t| t.store_shared(i32(BLOCK.into()), &totals));
            self.together();
            totals = [i32(0), i32(0)];
            for other in 0..cluster {
                let pair = self.remote(i32(BLOCK.into()), other);
                let before = self.t.f.cmp("sgt", rank, i32(other.into()));
                for i in 0..2 {
                    totals[i] = self.t.f.add(totals[i], pair[i]);
                    let v = self.t.f.select(before, pair[i], i32(0));
                    start[i] = self.t.f.add(start[i], v);
                }
            }
        }
        self.sweep(stream, share, &start, |e, keys, place, before| {
            let judged: Vec<[Val; 2]> = keys.iter().map(|&key| e.judged(rule, key)).collect();
            // Members before this lane's: those of lower lanes, and then its own one by one.
            let mut next = before.to_vec();
            let mut mine = before.to_vec();
            let mut any = Val::Int(0, Ty::I1);
            for &[above, equal] in &judged {
                for (i, c) in [above, equal].into_iter().enumerate() {
                    let ballot = isa::ballot(&mut e.t.f, c);
                    let (all, below) = (isa::popcount(&mut e.t.f, ballot), lanes_below(&mut e.t, ballot));
                    next[i] = e.t.f.add(next[i], all);
                    mine[i] = e.t.f.add(mine[i], below);
                }
                let either = e.t.f.bin("or", above, equal);
                any = if any.int().is_some() { either } else { e.t.f.bin("or", any, either) };
            }
            let after = e.t.f.open_if(any);
            for (i, [above, equal]) in judged.into_iter().enumerate() {
                let fits = e.t.f.cmp("slt", mine[1], rule.ties);
                let fits = e.t.f.bin("and", equal, fits);
                let chosen = e.t.f.bin("or", above, fits);
                let ties = e.t.f.intrinsic("smin", &[mine[1], rule.ties]);
                let to = e.t.f.add(mine[0], ties);
                let skip = e.t.f.open_if(chosen);
                let column = e.t.f.add(share.first, place);
                let column = e.t.f.add(column, i32(i as i64));
                let number = e.number_of(stream, column)?;
                e.put(numbers, number, to, stores)?;
                e.t.f.close_if(skip);
                for (mine, c) in mine.iter_mut().zip([above, equal]) {
                    let one = e.t.f.cast("zext", c, Ty::I32);
                    *mine = e.t.f.add(*mine, one);
                }
            }
            e.t.f.close_if(after);
            Ok(next)
        })?;
        // What is left of the places holds −1.
        let ties = self.t.f.intrinsic("smin", &[totals[1], rule.ties]);
        let end = self.t.f.add(totals[0], ties);
        let after = self.t.f.open_if(leads);
        self.fill_up(stream.k, end, numbers, stores)?;
        self.t.f.close_if(after);
        Ok(())
    }

    /// Stores what the program makes of a number at a place of the selection.
    pub fn put(&mut self, numbers: ValueId, number: Val, place: Val, stores: Stores<'_, 'a>) -> Result<(), String> {
        self.put_all(numbers, &[(number, place, Val::Int(1, Ty::I1))], stores)
    }

    /// Stores what the program makes of these numbers at their places, each where that is wanted.
    fn put_all(&mut self, numbers: ValueId, given: &[(Val, Val, Val)], stores: Stores<'_, 'a>) -> Result<(), String> {
        for (view, index, value) in stores {
            // All are computed before one is stored: loads that they need are then under way together.
            let mut words = Vec::new();
            for &(number, place, _) in given {
                self.held.insert(numbers, Held::Scalar(number));
                words.push(self.flat_element(*value, place)?);
            }
            self.held.remove(&numbers);
            for (&word, &(_, place, wanted)) in words.iter().zip(given) {
                let own = self.unravelled(self.shape(*value), place);
                let mut at = Vec::new();
                for (&i, own) in index.iter().zip(own) {
                    let start = self.lazy_index(i)?;
                    at.push(self.t.f.add(start, own));
                }
                let (address, inside) = self.element_at(*view, &at);
                let inside = self.t.f.bin("and", inside, wanted);
                isa::store_global_if(&mut self.t.f, inside, address, &[word]);
            }
        }
        Ok(())
    }

    /// Stores what the program makes of the columns at [`OUT`], so many, and of −1 behind them. All threads of the block.
    pub fn deliver(&mut self, k: u32, count: Val, numbers: ValueId, stores: Stores<'_, 'a>) -> Result<(), String> {
        let each = k.div_ceil(THREADS).min(DELIVERED);
        let l = self.t.f.open_loop(i32(0), i32(k.into()), &[]);
        let mut given = Vec::new();
        for i in 0..each {
            let place = self.t.f.add(l.args[0], self.t.tid);
            let place = self.t.f.add(place, i32((i * THREADS).into()));
            let wanted = self.t.f.cmp("slt", place, i32(k.into()));
            let some = self.t.f.cmp("slt", place, count);
            let some = self.t.f.bin("and", some, wanted);
            let place = self.t.f.select(wanted, place, i32(0));
            let byte = self.t.f.mul(place, i32(4));
            let at = self.t.f.add(byte, i32(OUT.into()));
            let column = self.t.load_shared(at, Ty::I32, 1)[0];
            given.push((self.t.f.select(some, column, i32(-1)), place, wanted));
        }
        self.put_all(numbers, &given, stores)?;
        self.t.f.close_loop(&l, i32((each * THREADS).into()), &[]);
        Ok(())
    }

    /// The same for a part of the selection: the columns at [`OUT`], so many, belong to the places from `start` on.
    pub fn deliver_part(
        &mut self,
        k: u32,
        (start, count): (Val, Val),
        numbers: ValueId,
        stores: Stores<'_, 'a>,
    ) -> Result<(), String> {
        let each = k.div_ceil(THREADS).min(DELIVERED);
        let l = self.t.f.open_loop(i32(0), count, &[]);
        let mut given = Vec::new();
        for i in 0..each {
            let own = self.t.f.add(l.args[0], self.t.tid);
            let own = self.t.f.add(own, i32((i * THREADS).into()));
            let wanted = self.t.f.cmp("slt", own, count);
            let own = self.t.f.select(wanted, own, i32(0));
            let byte = self.t.f.mul(own, i32(4));
            let at = self.t.f.add(byte, i32(OUT.into()));
            let column = self.t.load_shared(at, Ty::I32, 1)[0];
            given.push((column, self.t.f.add(start, own), wanted));
        }
        self.put_all(numbers, &given, stores)?;
        self.t.f.close_loop(&l, i32((each * THREADS).into()), &[]);
        Ok(())
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

/// The stores of a kernel.
fn stores(s: &Scheduled) -> Vec<(ValueId, &[Index], ValueId)> {
    let of = |op| match op {
        &Op::Tile(tile::Op::Store { view, ref index, value }) => Some((view, index.as_slice(), value)),
        _ => None,
    };
    s.common.insts.iter().filter_map(|i| of(&i.op)).collect()
}

/// Bits of `ballot` of the lanes below this one.
pub fn lanes_below(t: &mut Threads, ballot: Val) -> Val {
    let bit = t.f.bin("shl", i32(1), t.lane);
    let below = t.f.sub(bit, i32(1));
    let below = t.f.bin("and", ballot, below);
    isa::popcount(&mut t.f, below)
}
