//! Few members of short rows that are pushed once, as expert gating has them: a warp a row holds the row in registers and takes its
//! maximum `k` times. No barrier but the last.

use super::super::block::Threads;
use super::super::mlir::{Ty, Val, f32, i32};
use super::{key, lowest_bit, sum_lanes, word};

/// Whether [`select`] does a selection of `k` members of `n` columns pushed once.
pub(super) fn selects(k: u32, n: u32) -> bool {
    k <= 32 && n <= 1024
}

/// Of f32 `[rows, n]` dense at byte `from`, columns numbered from `base`, the `k` best to `values` and `numbers` as
/// [`super::take`] does. For shapes that [`selects`] allows. All threads; ends with a barrier.
pub(super) fn select(t: &mut Threads, [rows, n, k]: [u32; 3], from: u32, base: Val, values: u32, numbers: u32) {
    let few = Few { n, k, each: n.div_ceil(32), from, base, values, numbers };
    let bounds = (t.warp, i32(rows.into()), i32((t.threads / 32).into()));
    t.for_loop(bounds, &[], |t, row, _| {
        few.row(t, row);
        Vec::new()
    });
    t.barrier();
}

struct Few {
    n: u32,
    k: u32,
    /// Columns of a lane: neighbours, so that a lower lane has lower numbers.
    each: u32,
    from: u32,
    base: Val,
    values: u32,
    numbers: u32,
}

impl Few {
    fn row(&self, t: &mut Threads, row: Val) {
        let first = t.f.mul(t.lane, i32(self.each.into()));
        let columns = self.load(t, row, first);
        let mut keys = Vec::new();
        for &(value, inside) in &columns {
            let real = t.f.fcmp("ogt", value, f32(f32::NEG_INFINITY));
            let real = t.f.bin("and", inside, real);
            let key = key(t, value);
            keys.push(t.f.select(real, key, i32(0)));
        }
        let chosen = self.choose(t, keys);
        let mine = t.arch.popcount(&mut t.f, chosen);
        let sum = sum_lanes(t, mine, 32);
        let total = t.arch.shuffle_from(t, sum, i32(31));
        let out = t.f.mul(row, i32(self.k.into()));
        let mut position = t.f.sub(sum, mine);
        position = t.f.add(out, position);
        for (e, (value, _)) in columns.iter().enumerate() {
            let bit = t.f.bin("lshr", chosen, i32(e as i64));
            let bit = t.f.bin("and", bit, i32(1));
            let is = t.f.cast("trunc", bit, Ty::I1);
            let column = t.f.add(first, i32(e as i64));
            let number = t.f.add(self.base, column);
            t.when(is, |t| self.store(t, position, *value, number));
            position = t.f.add(position, bit);
        }
        let above = t.f.cmp("sge", t.lane, total);
        let below = t.f.cmp("slt", t.lane, i32(self.k.into()));
        let tail = t.f.bin("and", above, below);
        let position = t.f.add(out, t.lane);
        t.when(tail, |t| self.store(t, position, f32(f32::NEG_INFINITY), i32(-1)));
    }
    /// This lane's values, and whether there are such columns.
    fn load(&self, t: &mut Threads, row: Val, first: Val) -> Vec<(Val, Val)> {
        let start = t.f.mul(row, i32(self.n.into()));
        // Vectors of four lie in the row, or beyond it, as a whole.
        let width = if self.each.is_multiple_of(4) && self.n.is_multiple_of(4) { 4 } else { 1 };
        let mut columns = Vec::new();
        for e in (0..self.each).step_by(width) {
            let column = t.f.add(first, i32(e.into()));
            let inside = t.f.cmp("slt", column, i32(self.n.into()));
            let element = t.f.add(start, column);
            let byte = word(t, i32(self.from.into()), element);
            let byte = t.f.select(inside, byte, i32(self.from.into()));
            columns.extend(t.load_shared(byte, Ty::F32, width as u32).into_iter().map(|v| (v, inside)));
        }
        columns
    }

    /// `k` times the largest key of the warp, in the lowest lane and column that has it; a bit for each of this lane's columns.
    fn choose(&self, t: &mut Threads, keys: Vec<Val>) -> Val {
        let mut carried = keys;
        carried.push(i32(0));
        let out = t.for_loop((i32(0), i32(self.k.into()), i32(1)), &carried, |t, _, carried| {
            let (chosen, keys) = (carried[carried.len() - 1], &carried[..carried.len() - 1]);
            let best = keys[1..].iter().fold(keys[0], |best, &key| t.f.intrinsic("umax", &[best, key]));
            let largest = t.arch.reduce_warp(t, "umax", best);
            // Zeros are what cannot be chosen.
            let some = t.f.cmp("ne", largest, i32(0));
            let here = t.f.cmp("eq", best, largest);
            let here = t.f.bin("and", here, some);
            let lanes = t.arch.ballot(t, here);
            let lane = lowest_bit(t, lanes);
            let mut free = t.f.cmp("eq", lane, t.lane);
            let (mut next, mut chosen) = (Vec::new(), chosen);
            for (e, &key) in keys.iter().enumerate() {
                let equal = t.f.cmp("eq", key, largest);
                let hit = t.f.bin("and", equal, free);
                let other = t.f.cmp("ne", key, largest);
                free = t.f.bin("and", other, free);
                let bit = t.f.select(hit, i32(i64::from(1i32 << e)), i32(0));
                chosen = t.f.bin("or", bit, chosen);
                next.push(t.f.select(hit, i32(0), key));
            }
            next.push(chosen);
            next
        });
        out[out.len() - 1]
    }

    fn store(&self, t: &mut Threads, position: Val, value: Val, number: Val) {
        let (value_to, number_to) =
            (word(t, i32(self.values.into()), position), word(t, i32(self.numbers.into()), position));
        t.store_shared(value_to, &[value]);
        t.store_shared(number_to, &[number]);
    }
}
