//! The largest element of each row of a fragment, or the sum.
//!
//! A thread combines its registers, lanes that share rows exchange theirs, and warps that share rows meet in shared
//! memory: a line a part, an element a row. Afterwards every thread has the results of its own rows. The order is fixed.

use super::config::ROWS;
use super::emit::{Emit, Held};
use super::fragment::{Geometry, Register};
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Ty, Val, f32, i32};
use dsc_ir::sched::{BufferId, Op, Place};
use dsc_ir::tile::{self, MapArg, ReduceKind, Scalar, ScalarOp, ValueId};
use std::collections::HashMap;

/// Elements of a long vector that a lane looks at together; where the search may end before, fewer.
const LOADED: u32 = 32;
const LOADED_BACKWARDS: u32 = 16;

/// What combines with anything to that.
fn start(kind: ReduceKind) -> Val {
    match kind {
        ReduceKind::Max => f32(f32::NEG_INFINITY),
        ReduceKind::Sum => f32(0.0),
    }
}

impl Emit<'_> {
    /// Makes `r`, a value a row, of a tile of results.
    pub fn reduce_rows(
        &mut self,
        r: ValueId,
        x: ValueId,
        kind: ReduceKind,
        scratch: Option<BufferId>,
    ) -> Result<(), String> {
        let g = self.seen_in(x)?;
        // Lanes with the same rows: of a quad, or those at the same place in every quad.
        let lanes: &[u32] = if g.transposed { &[4, 8, 16] } else { &[1, 2] };
        let mut seen = HashMap::new();
        let mut maxima = Vec::new();
        for row in g.varying(true, false) {
            let mut elements = Vec::new();
            for column in g.varying(false, true) {
                let at = Register {
                    sub: row.sub + column.sub,
                    j: row.j + column.j,
                    h: row.h + column.h,
                    e: row.e + column.e,
                };
                elements.push(self.element(x, at, &mut seen)?);
            }
            // Pairs of pairs: one after the other each would wait for the one before.
            while elements.len() > 1 {
                let pairs: Vec<Val> = elements
                    .chunks(2)
                    .map(|pair| match *pair {
                        [a, b] => self.both(kind, a, b),
                        _ => pair[0],
                    })
                    .collect();
                elements = pairs;
            }
            let mut most = elements.first().copied().unwrap_or_else(|| start(kind));
            for &lane in lanes {
                let other = isa::shuffle_xor(&mut self.t.f, most, lane);
                most = self.both(kind, most, other);
            }
            maxima.push(most);
        }
        if let Some(buffer) = scratch {
            maxima = self.met(&g, maxima, kind, buffer);
        }
        let held = match (&self.s.places[r.0 as usize], maxima.first()) {
            (Place::Uniform, Some(&first)) => Held::Scalar(first),
            _ => Held::Registers(maxima, [true, false]),
        };
        self.held.insert(r, held);
        Ok(())
    }

    fn both(&mut self, kind: ReduceKind, a: Val, b: Val) -> Val {
        match kind {
            ReduceKind::Max => self.t.f.intrinsic("maximum", &[a, b]),
            ReduceKind::Sum => self.t.f.bin("fadd", a, b),
        }
    }

    /// Makes the scalar `r`, the largest of a vector of integers, every warp by itself.
    pub fn largest(&mut self, r: ValueId, x: ValueId) -> Result<(), String> {
        let count = self.shape(x).iter().product::<u32>();
        if self.is_last_place(x) {
            return self.last_place(r, x, count);
        }
        let together = LOADED * Arch::WARP;
        let looped = count / together * together;
        let mut most = i32(i32::MIN.into());
        // So many are on their way at once: all would take as many registers.
        if looped > together {
            let ends =
                self.counted((i32(0), i32(looped.into()), i32(together.into())), &[most], |e, first, most| {
                    Ok(vec![e.larger(x, most[0], first, together)?])
                })?;
            most = ends[0];
        }
        let first = if looped > together { looped } else { 0 };
        if first < count {
            most = self.larger(x, most, i32(first.into()), count - first)?;
        }
        let most = isa::reduce_warp(&mut self.t.f, "max", most);
        self.held.insert(r, Held::Scalar(most));
        Ok(())
    }

    /// Whether a vector has at each place either 0 or the place's number, counted from 1: its largest is where the last is that is not 0.
    fn is_last_place(&self, x: ValueId) -> bool {
        let Some(Op::Tile(tile::Op::Map { inputs, body })) = self.defs.get(&x).map(|i| &i.op) else { return false };
        let inst = |arg: &MapArg| match arg {
            MapArg::Inst(i) => body.insts.get(*i as usize),
            MapArg::Input(_) => None,
        };
        let constant = |arg: &MapArg, n: i32| inst(arg).is_some_and(|i| i.op == ScalarOp::Const(Scalar::I32(n)));
        let numbers = |arg: &MapArg| match arg {
            MapArg::Input(i) => inputs.get(*i as usize).is_some_and(|v| {
                matches!(self.defs.get(v).map(|i| &i.op), Some(Op::Tile(tile::Op::Iota { .. })))
                    && self.shape(*v).len() == 1
            }),
            MapArg::Inst(_) => false,
        };
        let place = |arg: &MapArg| {
            inst(arg).is_some_and(|i| {
                i.op == ScalarOp::Add && matches!(i.args.as_slice(), [a, b] if numbers(a) && constant(b, 1))
            })
        };
        inst(&body.result).is_some_and(|i| {
            let either = |a: &MapArg, b: &MapArg| constant(a, 0) && place(b);
            i.op == ScalarOp::Select && matches!(i.args.as_slice(), [_, a, b] if either(a, b) || either(b, a))
        })
    }

    /// The largest of such a vector, from its end on: a list is mostly full, so one look at its last elements, a lane each, is enough. Else many
    /// are looked at together; what would be in front of the first counts as none.
    fn last_place(&mut self, r: ValueId, x: ValueId, count: u32) -> Result<(), String> {
        let together = LOADED_BACKWARDS * Arch::WARP;
        let start = i32(count.saturating_sub(Arch::WARP).into());
        let at = self.t.f.add(self.t.lane, start);
        let mut last = self.vector_element(x, at, &mut HashMap::new())?;
        if count < Arch::WARP {
            let within = self.t.f.cmp("ult", at, i32(count.into()));
            last = self.t.f.select(within, last, i32(0));
        }
        let last = self.t.f.intrinsic("smax", &[last, i32(0)]);
        let last = isa::reduce_warp(&mut self.t.f, "max", last);
        let (head, inside, after) = (self.t.f.label(), self.t.f.label(), self.t.f.label());
        self.t.f.br(head, &[start, last]);
        let state = self.t.f.start(head, &[Ty::I32, Ty::I32]);
        let (left, none) = (self.t.f.cmp("sgt", state[0], i32(0)), self.t.f.cmp("eq", state[1], i32(0)));
        let more = self.t.f.bin("and", left, none);
        self.t.f.cond_br(more, (inside, &[]), (after, &[]));
        self.t.f.start(inside, &[]);
        let first = self.t.f.sub(state[0], i32(together.into()));
        let own = self.t.f.add(first, self.t.lane);
        let mut most = i32(0);
        for skip in (0..together).step_by(Arch::WARP as usize) {
            let at = self.t.f.add(own, i32(skip.into()));
            let element = self.vector_element(x, at, &mut HashMap::new())?;
            let there = self.t.f.cmp("sge", at, i32(0));
            let element = self.t.f.select(there, element, i32(0));
            most = self.t.f.intrinsic("smax", &[most, element]);
        }
        let most = isa::reduce_warp(&mut self.t.f, "max", most);
        self.t.f.br(head, &[first, most]);
        self.t.f.start(after, &[]);
        self.held.insert(r, Held::Scalar(state[1]));
        Ok(())
    }

    /// The largest of `most` and of a lane's elements among `count` from `first` on.
    fn larger(&mut self, x: ValueId, mut most: Val, first: Val, count: u32) -> Result<Val, String> {
        let own = self.t.f.add(first, self.t.lane);
        for skip in (0..count).step_by(Arch::WARP as usize) {
            let at = self.t.f.add(own, i32(skip.into()));
            let mut element = self.vector_element(x, at, &mut HashMap::new())?;
            if skip + Arch::WARP > count {
                let within = self.t.f.cmp("ult", self.t.lane, i32((count - skip).into()));
                element = self.t.f.select(within, element, i32(i32::MIN.into()));
            }
            most = self.t.f.intrinsic("smax", &[most, element]);
        }
        Ok(most)
    }

    /// The same over all warps that share rows.
    fn met(&mut self, g: &Geometry, parts: Vec<Val>, kind: ReduceKind, buffer: BufferId) -> Vec<Val> {
        let data = &self.s.buffers[buffer.0 as usize];
        let (count, pitch) = (data.shape[0], data.pitch);
        let base = self.t.f.add(self.t.shared32, i32(data.offset.into()));
        let (part, writes) = if g.transposed {
            let group = self.t.f.div(g.first[0], g.subs * ROWS);
            let first = self.t.f.mul(group, i32((super::config::WARPGROUP / Arch::WARP).into()));
            (self.t.f.add(first, g.warp), self.t.f.cmp("ult", self.t.lane, i32(4)))
        } else {
            let within = self.t.f.rem(self.t.lane, 4);
            (self.t.f.div(g.first[1], g.wide), self.t.f.cmp("eq", within, i32(0)))
        };
        let own = self.t.f.mul(part, i32(pitch.into()));
        let mut rows = Vec::new();
        for at in g.varying(true, false) {
            let [row, _] = g.coordinates(&mut self.t, at);
            let byte = self.t.f.mul(row, i32(4));
            rows.push(self.t.f.add(base, byte));
        }
        for (&row, v) in rows.iter().zip(parts) {
            let at = self.t.f.add(row, own);
            ptx::store_shared_f32_if(&mut self.t.f, writes, at, v);
        }
        self.role_waits();
        if g.shape[0] == 1 {
            // The others are padding, and every thread wants the only one.
            rows = vec![base];
        }
        let mut met = Vec::new();
        for row in rows {
            let mut most = start(kind);
            for part in 0..count {
                let at = self.t.f.add(row, i32((part * pitch).into()));
                let v = ptx::load_shared_f32(&mut self.t.f, at);
                most = self.both(kind, most, v);
            }
            met.push(most);
        }
        met
    }
}
