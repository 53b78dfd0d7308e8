//! Top-k selection: a buffer of candidates a row in shared memory, cut back to the `k` best when it is full.
//!
//! A row's state is a header (members, where the current push's go, threshold) and an array each of values and numbers, in ascending
//! order of number.
//!
//! **Push.** Warps compare 32 columns at a time with their row's threshold and keep the ballots; one barrier, which also tells whether any
//! bit is set, and if none is that was all. Otherwise a warp a row turns bits into positions (prefix sums of their counts); a second
//! barrier tells whether a row lacks room, in which case it is cut; then winners are copied to their positions, and a third
//! barrier ends it. A value equal to the threshold loses to the `k` kept ones, which have lower numbers. The threshold starts at
//! −inf, which excludes −inf and, as a comparison, NaN.
//!
//! **Cut.** `cut` finds the `k` best exactly and leaves them in order.
//!
//! **Cost.** What a push takes is mostly waiting, so it is counted in barriers: one where nothing wins, three where something does. A cut
//! takes two, one a pass (at most four) and one for each 8 members a thread; there is one in `min(k / 2, 1024)` winners at most.
//!
//! **Once.** What is pushed only once, and of which few are kept (expert gating), needs no buffer: `few` selects right then, and the
//! state is the result.

mod cut;
mod few;
#[cfg(test)]
mod tests;

use super::block::Threads;
use super::mlir::{Ty, Val, f32, i32};
use cut::Cut;
use dsc_ir::tile::{Op, Type, ValueId};

/// A streaming selection: its shape, from which its memory follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Independent selections.
    pub rows: u32,
    /// Members kept a row.
    pub k: u32,
    /// Columns pushed at once, at most.
    pub most: u32,
    /// Whether every selection is begun, pushed to once, and taken.
    pub once: bool,
}

/// Bytes of a row's header: members, position of the current push's first, threshold, and what found no room.
const HEADER: u32 = 16;
const START: u32 = 4;
const THRESHOLD: u32 = 8;
const WAITING: u32 = 12;
/// Bytes of the histogram of a pass.
const BINS: u32 = 256 * 4;
/// Loads of a thread that are on their way at once.
const BATCH: u32 = 8;

impl State {
    /// The state of all selections of that type in a program: `ops` are its operations on selections, in order and with their results;
    /// `types` those of all values.
    pub fn of(ty: &Type, ops: &[(ValueId, &Op)], types: &[Type]) -> State {
        let Type::Topk { rows, k } = *ty else { unreachable!("verified: a selection") };
        let of = |v: &ValueId| types[v.0 as usize] == *ty;
        let (mut begun, mut pushed, mut most, mut once) = (Vec::new(), Vec::new(), 1, true);
        for (result, op) in ops {
            match op {
                Op::TopkInit { .. } if of(result) => begun.push(*result),
                Op::TopkPush { state, values, .. } if of(state) => {
                    if let Type::Tile(values) = &types[values.0 as usize] {
                        most = most.max(values.shape[1]);
                    }
                    once &= begun.contains(state);
                    pushed.push(*result);
                }
                Op::TopkTake { state } if of(state) => once &= pushed.contains(state),
                _ => {}
            }
        }
        State { rows, k, most, once }
    }

    /// Whether a push selects without a buffer.
    fn at_once(&self) -> bool {
        self.once && few::selects(self.k, self.most)
    }

    /// Candidates a row holds. The room beyond `k` is as much as a push brings, or more, so that cuts are rare.
    fn capacity(&self) -> u32 {
        let slack = self.most.max((self.k / 2).min(1024));
        self.k.saturating_add(slack).saturating_add(3) / 4 * 4
    }

    /// Bytes of state in shared memory; saturating, so that a shape beyond all memory is seen as such.
    pub fn bytes(&self) -> u32 {
        if self.at_once() {
            return self.rows.saturating_mul(self.k).saturating_mul(8);
        }
        self.rows.saturating_mul(HEADER).saturating_add(self.rows.saturating_mul(self.capacity()).saturating_mul(8))
    }

    /// Bytes of shared memory that [`push`] and [`take`] need while they run.
    pub fn scratch_bytes(&self, threads: u32) -> u32 {
        if self.at_once() {
            return 0;
        }
        Scratch::new(self, 0, threads).end
    }

    fn header(&self, t: &mut Threads, at: u32, row: Val) -> Val {
        let byte = t.f.mul(row, i32(HEADER.into()));
        t.f.add(byte, i32(at.into()))
    }

    /// First bytes of a row's values and numbers.
    fn arrays(&self, t: &mut Threads, at: u32, row: Val) -> (Val, Val) {
        let capacity = self.capacity();
        let byte = t.f.mul(row, i32(i64::from(capacity) * 8));
        let values = t.f.add(byte, i32(i64::from(at) + i64::from(self.rows) * i64::from(HEADER)));
        let numbers = t.f.add(values, i32(i64::from(capacity) * 4));
        (values, numbers)
    }
}

/// Where the parts of the scratch memory start.
#[derive(Clone, Copy)]
struct Scratch {
    /// Ballots of a push, by row and chunk of 32 columns; zeros up to a whole number of batches.
    ballots: u32,
    /// Winners of the row before each chunk.
    before: u32,
    /// Histograms, one a pass.
    bins: u32,
    /// A pair of words a warp: its smallest and largest key.
    range: u32,
    /// Two words a warp, taken in turns: what its part of a sweep keeps.
    kept: u32,
    end: u32,
}

impl Scratch {
    fn new(s: &State, at: u32, threads: u32) -> Scratch {
        let (chunks, warps) = (s.most.div_ceil(32), threads / 32);
        let units = s.rows.saturating_mul(chunks).div_ceil(warps).saturating_add(BATCH).saturating_mul(warps);
        let bytes = units.saturating_mul(4).saturating_add(15) / 16 * 16;
        let bins = at.saturating_add(bytes.saturating_mul(2));
        let range = bins.saturating_add(4 * BINS);
        let kept = range.saturating_add(warps * 8);
        Scratch {
            ballots: at,
            before: at.saturating_add(bytes),
            bins,
            range,
            kept,
            end: kept.saturating_add(warps * 8),
        }
    }
}

/// Runs `body` for each of `0..n`, spread over the threads.
fn each(t: &mut Threads, n: u32, body: impl FnOnce(&mut Threads, Val)) {
    let (tid, step) = (t.tid, i32(t.threads.into()));
    if n == t.threads {
        body(t, tid);
    } else if n < t.threads {
        let mine = t.f.cmp("slt", tid, i32(n.into()));
        t.when(mine, |t| body(t, tid));
    } else {
        t.for_loop((tid, i32(n.into()), step), &[], |t, i, _| {
            body(t, i);
            Vec::new()
        });
    }
}

/// The byte of element `i` of an array of words.
fn word(t: &mut Threads, array: Val, i: Val) -> Val {
    let byte = t.f.mul(i, i32(4));
    t.f.add(array, byte)
}

fn load(t: &mut Threads, byte: Val, ty: Ty) -> Val {
    t.load_shared(byte, ty, 1)[0]
}

fn load_field(t: &mut Threads, header: Val, field: u32, ty: Ty) -> Val {
    let at = t.f.add(header, i32(field.into()));
    load(t, at, ty)
}

/// Set bits of `bits` below this lane's.
fn bits_below(t: &mut Threads, bits: Val) -> Val {
    let bit = t.f.bin("shl", i32(1), t.lane);
    let below = t.f.sub(bit, i32(1));
    let below = t.f.bin("and", bits, below);
    t.arch.popcount(&mut t.f, below)
}

/// Whether this lane's bit is set.
fn bit_here(t: &mut Threads, bits: Val) -> Val {
    let bit = t.f.bin("lshr", bits, t.lane);
    t.f.cast("trunc", bit, Ty::I1)
}

/// The sum of the lanes up to this one, of the first `lanes`.
fn sum_lanes(t: &mut Threads, v: Val, lanes: u32) -> Val {
    let mut sum = v;
    for by in [1, 2, 4, 8, 16].into_iter().filter(|&by| by < lanes) {
        let below = t.arch.shuffle_up(t, sum, by);
        let both = t.f.add(sum, below);
        let has = t.f.cmp("sge", t.lane, i32(by.into()));
        sum = t.f.select(has, both, sum);
    }
    sum
}

/// An unsigned integer that orders like the float; both zeros give the same. Of what is above −inf it is never 0.
fn key(t: &mut Threads, value: Val) -> Val {
    // −0 + 0 is +0.
    let value = t.f.bin("fadd", value, f32(0.0));
    let bits = t.f.cast("bitcast", value, Ty::I32);
    let sign = t.f.bin("ashr", bits, i32(31));
    let flip = t.f.bin("or", sign, i32(i32::MIN.into()));
    t.f.bin("xor", bits, flip)
}

/// Makes the selection whose state is at byte `at` empty. All threads; ends with a barrier, if it does anything.
pub fn init(t: &mut Threads, s: &State, at: u32) {
    if s.at_once() {
        return;
    }
    each(t, s.rows, |t, row| {
        let header = s.header(t, at, row);
        let lowest = i32((f32::NEG_INFINITY.to_bits() as i32).into());
        t.store_shared(header, &[i32(0), i32(0), lowest, i32(0)]);
    });
    t.barrier();
}

/// Offers candidates: f32 `[rows, n]`, dense at byte `values` of shared memory and visible; column `j` is number `base + j`. All
/// threads; has passed a barrier since it read `values` and `scratch`.
pub fn push(t: &mut Threads, s: &State, at: u32, scratch: u32, values: u32, n: u32, base: Val) {
    if s.at_once() {
        return few::select(t, [s.rows, n, s.k], values, base, at, at + s.rows * s.k * 4);
    }
    let p = Push { s, at, scratch: Scratch::new(s, scratch, t.threads), values, n, chunks: n.div_ceil(32), base };
    let some = p.vote(t);
    let some = t.arch.barrier_any(t, some);
    t.when(some, |t| {
        let full = p.place(t);
        let full = t.arch.barrier_any(t, full);
        t.when(full, |t| p.make_room(t));
        p.append(t);
        t.barrier();
    });
}

struct Push<'a> {
    s: &'a State,
    at: u32,
    scratch: Scratch,
    values: u32,
    n: u32,
    /// Groups of 32 columns.
    chunks: u32,
    base: Val,
}

/// 32 columns of a row, a lane each.
struct Unit {
    row: Val,
    column: Val,
    /// The value's byte.
    byte: Val,
    /// Whether there is such a column.
    inside: Val,
}

impl Push<'_> {
    fn units(&self) -> u32 {
        self.s.rows * self.chunks
    }

    /// Units of all warps' batches together, and of a warp's batch.
    fn batch(&self, t: &Threads) -> (u32, u32) {
        let warps = t.threads / 32;
        let each = self.units().div_ceil(warps);
        let batch = each.min(BATCH);
        (each.next_multiple_of(batch) * warps, batch)
    }

    /// Runs `body` on the numbers of this warp's units, several at a time; numbers beyond [`Push::units`] are less than a batch of all
    /// warps beyond.
    fn batches(
        &self,
        t: &mut Threads,
        carried: &[Val],
        body: impl FnOnce(&mut Threads, &[Val], &[Val]) -> Vec<Val>,
    ) -> Vec<Val> {
        let (warps, warp) = (t.threads / 32, t.warp);
        let (reached, batch) = self.batch(t);
        let units =
            |t: &mut Threads, first| (0..batch).map(|i| t.f.add(first, i32((i * warps).into()))).collect::<Vec<Val>>();
        if reached == warps * batch {
            let units = units(t, warp);
            return body(t, &units, carried);
        }
        let bounds = (warp, i32(self.units().into()), i32((batch * warps).into()));
        t.for_loop(bounds, carried, |t, first, carried| {
            let units = units(t, first);
            body(t, &units, carried)
        })
    }

    fn unit(&self, t: &mut Threads, unit: Val) -> Unit {
        let one = self.s.rows == 1;
        let row = if one { i32(0) } else { t.f.div(unit, self.chunks) };
        let chunk = if one { unit } else { t.f.rem(unit, self.chunks) };
        let first = t.f.mul(chunk, i32(32));
        let column = t.f.add(first, t.lane);
        let whole = self.n.is_multiple_of(32);
        let mut inside = if whole { Val::Int(1, Ty::I1) } else { t.f.cmp("slt", column, i32(self.n.into())) };
        if self.batch(t).0 != self.units() {
            let real = t.f.cmp("slt", unit, i32(self.units().into()));
            inside = t.f.bin("and", inside, real);
        }
        let start = t.f.mul(row, i32(self.n.into()));
        let element = t.f.add(start, column);
        let byte = word(t, i32(self.values.into()), element);
        Unit { row, column, byte, inside }
    }

    /// Ballots of what exceeds the thresholds, to scratch; whether this warp has any.
    fn vote(&self, t: &mut Threads) -> Val {
        let some = self.batches(t, &[i32(0)], |t, numbers, some| {
            let units: Vec<Unit> = numbers.iter().map(|&u| self.unit(t, u)).collect();
            // All loads first, so that they are waited for once. What does not exist reads the first value.
            let pairs: Vec<(Val, Val)> = units
                .iter()
                .map(|u| {
                    let byte = t.f.select(u.inside, u.byte, i32(self.values.into()));
                    let row = t.f.select(u.inside, u.row, i32(0));
                    let header = self.s.header(t, self.at, row);
                    (load(t, byte, Ty::F32), load_field(t, header, THRESHOLD, Ty::F32))
                })
                .collect();
            let mut some = some[0];
            let mut ballots = Vec::new();
            for (u, (value, threshold)) in units.iter().zip(pairs) {
                let wins = t.f.fcmp("ogt", value, threshold);
                let wins = t.f.bin("and", u.inside, wins);
                let ballot = t.arch.ballot(t, wins);
                some = t.f.bin("or", ballot, some);
                ballots.push(ballot);
            }
            let first = t.f.cmp("eq", t.lane, i32(0));
            t.when(first, |t| {
                for (&unit, ballot) in numbers.iter().zip(ballots) {
                    let to = word(t, i32(self.scratch.ballots.into()), unit);
                    t.store_shared(to, &[ballot]);
                }
            });
            vec![some]
        });
        t.f.cmp("ne", some[0], i32(0))
    }

    /// A warp a row: how many win before each chunk, and room for them in the row; whether there is none.
    fn place(&self, t: &mut Threads) -> Val {
        let (rows, warps) = (i32(self.s.rows.into()), i32((t.threads / 32).into()));
        let full = t.for_loop((t.warp, rows, warps), &[i32(0)], |t, row, full| {
            let first = t.f.mul(row, i32(self.chunks.into()));
            let mut total = i32(0);
            for from in (0..self.chunks).step_by(32) {
                let lanes = (self.chunks - from).min(32);
                let chunk = t.f.add(t.lane, i32(from.into()));
                let inside = if from + 32 <= self.chunks {
                    Val::Int(1, Ty::I1)
                } else {
                    t.f.cmp("slt", chunk, i32(self.chunks.into()))
                };
                let unit = t.f.add(first, chunk);
                let n = t.when_value(inside, i32(0), |t| {
                    let at = word(t, i32(self.scratch.ballots.into()), unit);
                    let ballot = load(t, at, Ty::I32);
                    t.arch.popcount(&mut t.f, ballot)
                });
                let sum = sum_lanes(t, n, lanes);
                let sum = t.f.add(total, sum);
                let before = t.f.sub(sum, n);
                t.when(inside, |t| {
                    let to = word(t, i32(self.scratch.before.into()), unit);
                    t.store_shared(to, &[before]);
                });
                total = t.arch.shuffle_from(t, sum, i32(i64::from(lanes) - 1));
            }
            let first = t.f.cmp("eq", t.lane, i32(0));
            let more = t.when_value(first, i32(0), |t| self.reserve(t, row, total));
            vec![t.f.bin("or", full[0], more)]
        });
        t.f.cmp("ne", full[0], i32(0))
    }

    /// One thread: gives the row's winners their place behind its members, or leaves them waiting; how many wait.
    fn reserve(&self, t: &mut Threads, row: Val, winners: Val) -> Val {
        let header = self.s.header(t, self.at, row);
        let members = load(t, header, Ty::I32);
        let grown = t.f.add(members, winners);
        let full = t.f.cmp("sgt", grown, i32(self.s.capacity().into()));
        let now = t.f.select(full, members, grown);
        t.store_shared(header, &[now, members]);
        let waiting = t.f.select(full, winners, i32(0));
        let to = t.f.add(header, i32(WAITING.into()));
        t.store_shared(to, &[waiting]);
        waiting
    }

    /// Cuts the rows whose winners wait.
    fn make_room(&self, t: &mut Threads) {
        t.for_loop((i32(0), i32(self.s.rows.into()), i32(1)), &[], |t, row, _| {
            let header = self.s.header(t, self.at, row);
            let waiting = load_field(t, header, WAITING, Ty::I32);
            let waits = t.f.cmp("ne", waiting, i32(0));
            t.when(waits, |t| Cut::new(t, self.s, self.at, self.scratch, row).run(t, waiting));
            Vec::new()
        });
    }

    /// Copies the winners to their places.
    fn append(&self, t: &mut Threads) {
        self.batches(t, &[], |t, numbers, _| {
            for &number in numbers {
                let at = word(t, i32(self.scratch.ballots.into()), number);
                let ballot = load(t, at, Ty::I32);
                let wins = bit_here(t, ballot);
                t.when(wins, |t| {
                    let unit = self.unit(t, number);
                    let value = load(t, unit.byte, Ty::F32);
                    let at = word(t, i32(self.scratch.before.into()), number);
                    let before = load(t, at, Ty::I32);
                    let header = self.s.header(t, self.at, unit.row);
                    let start = load_field(t, header, START, Ty::I32);
                    let position = t.f.add(start, before);
                    let below = bits_below(t, ballot);
                    let position = t.f.add(position, below);
                    let number = t.f.add(self.base, unit.column);
                    let (values, numbers) = self.s.arrays(t, self.at, unit.row);
                    let (value_to, number_to) = (word(t, values, position), word(t, numbers, position));
                    t.store_shared(value_to, &[value]);
                    t.store_shared(number_to, &[number]);
                });
            }
            Vec::new()
        });
    }
}

/// Ends a selection: f32 `[rows, k]` to byte `values` and i32 `[rows, k]` to byte `numbers` of shared memory, outside its state and
/// scratch; ascending by number, the tail −inf and −1. All threads; ends with a barrier. The state is used up.
pub fn take(t: &mut Threads, s: &State, at: u32, scratch: u32, values: u32, numbers: u32) {
    if s.at_once() {
        return give(t, s, at, values, numbers);
    }
    let scratch = Scratch::new(s, scratch, t.threads);
    t.for_loop((i32(0), i32(s.rows.into()), i32(1)), &[], |t, row, _| {
        let cut = Cut::new(t, s, at, scratch, row);
        let many = t.f.cmp("sgt", cut.count, i32(s.k.into()));
        t.when(many, |t| cut.run(t, i32(0)));
        Vec::new()
    });
    each(t, s.rows * s.k, |t, i| {
        let (row, j) = (t.f.div(i, s.k), t.f.rem(i, s.k));
        let header = s.header(t, at, row);
        let members = load(t, header, Ty::I32);
        let (from_values, from_numbers) = s.arrays(t, at, row);
        let (value_at, number_at) = (word(t, from_values, j), word(t, from_numbers, j));
        let (value, number) = (load(t, value_at, Ty::F32), load(t, number_at, Ty::I32));
        let real = t.f.cmp("slt", j, members);
        let value = t.f.select(real, value, f32(f32::NEG_INFINITY));
        let number = t.f.select(real, number, i32(-1));
        let (value_to, number_to) = (word(t, i32(values.into()), i), word(t, i32(numbers.into()), i));
        t.store_shared(value_to, &[value]);
        t.store_shared(number_to, &[number]);
    });
    t.barrier();
}

/// [`take`] of what [`few::select`] left.
fn give(t: &mut Threads, s: &State, at: u32, values: u32, numbers: u32) {
    let n = s.rows * s.k;
    each(t, n, |t, i| {
        for (from, to) in [(at, values), (at + n * 4, numbers)] {
            let (from, to) = (word(t, i32(from.into()), i), word(t, i32(to.into()), i));
            let word = load(t, from, Ty::I32);
            t.store_shared(to, &[word]);
        }
    });
    t.barrier();
}

/// The number of the lowest bit set; −1 if none is.
fn lowest_bit(t: &mut Threads, bits: Val) -> Val {
    let minus = t.f.sub(i32(0), bits);
    let lowest = t.f.bin("and", bits, minus);
    let zeros = t.arch.leading_zeros(&mut t.f, lowest);
    t.f.sub(i32(31), zeros)
}
