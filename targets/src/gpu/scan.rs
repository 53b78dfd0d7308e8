//! Running sums and maxima along one axis of a tile in shared memory.
//!
//! A tile `[outer, len, inner]` has `outer * inner` lines. Where there are many, each thread walks a line of its own; where there are few
//! and they are long, a warp takes 32 elements of a line at a time: five shuffles combine them, and the last lane's result goes into the
//! next 32. Either way the order in which f32 are added is fixed by the shape and the number of threads.

use super::block::Threads;
use super::mlir::{Ty, Val, f32, i32};
use dsc_ir::tile::ReduceKind;

/// Cycles, roughly: an element in a thread's walk waits for its load and its sum, 32 in a warp's for five shuffles and sums too.
const CYCLES_ONE: u32 = 12;
const CYCLES_32: u32 = 170;

/// Inclusive scan along the middle axis of `shape`, of f32 or i32 (`ty`) dense at byte `from` of shared memory, to byte `to`, which
/// may be `from`. All threads; what is at `from` must be visible; ends with a barrier.
pub fn scan(t: &mut Threads, from: u32, to: u32, shape: [u32; 3], ty: Ty, kind: ReduceKind) {
    let [outer, len, inner] = shape;
    let (lines, warps) = (outer * inner, t.threads / 32);
    let by_thread = u64::from(lines.div_ceil(t.threads)) * u64::from(len) * u64::from(CYCLES_ONE);
    let by_warp = u64::from(lines.div_ceil(warps)) * u64::from(len.div_ceil(32)) * u64::from(CYCLES_32);
    let warp_each = by_warp < by_thread;
    let (first, step) = if warp_each { (t.warp, warps) } else { (t.tid, t.threads) };
    t.for_loop((first, i32(lines.into()), i32(step.into())), &[], |t, line, _| {
        let (o, i) = (t.f.div(line, inner), t.f.rem(line, inner));
        let start = t.f.mul(o, i32((len * inner).into()));
        let start = t.f.add(start, i);
        let walk = Line { from, to, start, len, inner, ty, kind };
        if warp_each {
            walk.by_warp(t)
        } else {
            walk.by_thread(t)
        }
        Vec::new()
    });
    t.barrier();
}

struct Line {
    from: u32,
    to: u32,
    /// Its first element.
    start: Val,
    len: u32,
    /// Elements from one to the next.
    inner: u32,
    ty: Ty,
    kind: ReduceKind,
}

impl Line {
    /// The byte of element `n`, from the start of the tile.
    fn byte(&self, t: &mut Threads, n: Val) -> Val {
        let along = t.f.mul(n, i32(self.inner.into()));
        let element = t.f.add(self.start, along);
        t.f.mul(element, i32(4))
    }

    fn load(&self, t: &mut Threads, byte: Val) -> Val {
        let at = t.f.add(byte, i32(self.from.into()));
        t.load_shared(at, self.ty, 1)[0]
    }

    fn store(&self, t: &mut Threads, byte: Val, v: Val) {
        let at = t.f.add(byte, i32(self.to.into()));
        t.store_shared(at, &[v]);
    }

    fn combine(&self, t: &mut Threads, a: Val, b: Val) -> Val {
        match (self.kind, self.ty) {
            (ReduceKind::Sum, Ty::F32) => t.f.bin("fadd", a, b),
            (ReduceKind::Sum, _) => t.f.add(a, b),
            (ReduceKind::Max, Ty::F32) => t.f.intrinsic("maximum", &[a, b]),
            (ReduceKind::Max, _) => t.f.intrinsic("smax", &[a, b]),
        }
    }

    fn by_thread(&self, t: &mut Threads) {
        let byte = self.byte(t, i32(0));
        let first = self.load(t, byte);
        self.store(t, byte, first);
        t.for_loop((i32(1), i32(self.len.into()), i32(1)), &[first], |t, n, sum| {
            let byte = self.byte(t, n);
            let x = self.load(t, byte);
            let sum = self.combine(t, sum[0], x);
            self.store(t, byte, sum);
            vec![sum]
        });
    }

    fn by_warp(&self, t: &mut Threads) {
        let len = i32(self.len.into());
        let sum = self.chunk(t, t.lane, None);
        t.for_loop((i32(32), len, i32(32)), &[sum], |t, first, before| {
            let n = t.f.add(first, t.lane);
            vec![self.chunk(t, n, Some(before[0]))]
        });
    }

    /// Scans 32 elements, this lane's being `n`, continuing from an earlier result, and gives the last one. Lanes beyond the end take part
    /// with zero, which reaches no lane below them.
    fn chunk(&self, t: &mut Threads, n: Val, before: Option<Val>) -> Val {
        let inside = t.f.cmp("slt", n, i32(self.len.into()));
        let byte = self.byte(t, n);
        let zero = if self.ty == Ty::F32 { f32(0.0) } else { i32(0) };
        let mut sum = t.when_value(inside, zero, |t| self.load(t, byte));
        for by in [1, 2, 4, 8, 16] {
            let below = t.arch.shuffle_up(t, sum, by);
            let both = self.combine(t, below, sum);
            let has = t.f.cmp("sge", t.lane, i32(by.into()));
            sum = t.f.select(has, both, sum);
        }
        if let Some(before) = before {
            sum = self.combine(t, before, sum);
        }
        t.when(inside, |t| self.store(t, byte, sum));
        t.arch.shuffle_from(t, sum, i32(31))
    }
}

#[cfg(test)]
mod tests {
    use super::super::mlir;
    use super::*;
    use crate::nvidia::arch::ARCHS;
    use crate::nvidia::lower::emulate::Machine;

    /// Scans words in place, or behind them.
    fn run(x: &[u32], shape: [u32; 3], ty: Ty, kind: ReduceKind, threads: u32, in_place: bool) -> Vec<u32> {
        let bytes = x.len() as u32 * 4;
        let to = if in_place { 0 } else { bytes };
        let mut t = Threads::new(mlir::Fn::default(), &ARCHS[0], threads);
        scan(&mut t, 0, to, shape, ty, kind);
        t.f.raw("llvm.return");
        let mut m = Machine { shared: x.iter().flat_map(|v| v.to_le_bytes()).collect(), ..Machine::default() };
        m.shared.resize((to + bytes) as usize, 0xcb);
        m.run(t.f.text(), threads).unwrap_or_else(|e| panic!("{e}"));
        m.shared[to as usize..].chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn expected(x: &[u32], [outer, len, inner]: [u32; 3], combine: impl Fn(u32, u32) -> u32) -> Vec<u32> {
        let mut out = x.to_vec();
        for line in 0..outer * inner {
            let at = |n: u32| ((line / inner * len + n) * inner + line % inner) as usize;
            for n in 1..len {
                out[at(n)] = combine(out[at(n - 1)], out[at(n)]);
            }
        }
        out
    }

    #[test]
    fn scans_agree_with_a_walk() {
        let float = |f: fn(f32, f32) -> f32| move |a, b| f(f32::from_bits(a), f32::from_bits(b)).to_bits();
        let largest = |a: f32, b: f32| if a.is_nan() || a >= b { a } else { b };
        for shape in [[1, 1, 1], [1, 100, 1], [2, 33, 3], [300, 5, 1], [1, 7, 200], [1, 1000, 1], [3, 64, 1]] {
            let n = shape.iter().product::<u32>();
            let ints: Vec<u32> = (0..n).map(|i| i.wrapping_mul(2_654_435_761) ^ i).collect();
            // Small integers: their sums are exact in any order.
            let floats: Vec<u32> = ints.iter().map(|&i| ((i % 64) as f32 - 30.0).to_bits()).collect();
            let mut odd = floats.clone();
            odd[n as usize / 2] = f32::NAN.to_bits();
            for (threads, in_place) in [(32, true), (128, false)] {
                let check = |x: &[u32], ty, kind, combine: &dyn Fn(u32, u32) -> u32| {
                    let got = run(x, shape, ty, kind, threads, in_place);
                    assert_eq!(got, expected(x, shape, combine), "{shape:?} {ty:?} {kind:?} in {threads} threads");
                };
                check(&ints, Ty::I32, ReduceKind::Sum, &u32::wrapping_add);
                check(&ints, Ty::I32, ReduceKind::Max, &|a, b| (a as i32).max(b as i32) as u32);
                check(&floats, Ty::F32, ReduceKind::Sum, &float(|a, b| a + b));
                check(&odd, Ty::F32, ReduceKind::Max, &float(largest));
            }
        }
    }
}
