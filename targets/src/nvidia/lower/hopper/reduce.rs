//! The largest element of each row of a fragment.
//!
//! A thread takes the maximum of its registers, lanes that share rows exchange theirs, and warps that share rows meet in shared
//! memory: a line a part, an element a row. Afterwards every thread has the maxima of its own rows.

use super::config::ROWS;
use super::emit::{Emit, Held};
use super::fragment::{Geometry, Register};
use super::ptx;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::isa;
use crate::nvidia::lower::mlir::{Val, f32, i32};
use dsc_ir::sched::{BufferId, Place};
use dsc_ir::tile::ValueId;
use std::collections::HashMap;

impl Emit<'_> {
    /// Makes `r`, a value a row, of a tile of results.
    pub fn row_maxima(&mut self, r: ValueId, x: ValueId, scratch: Option<BufferId>) -> Result<(), String> {
        let g = self.the_geometry()?;
        // Lanes with the same rows: of a quad, or those at the same place in every quad.
        let lanes: &[u32] = if g.transposed { &[4, 8, 16] } else { &[1, 2] };
        let mut seen = HashMap::new();
        let mut maxima = Vec::new();
        for row in g.varying(true, false) {
            let mut most = f32(f32::NEG_INFINITY);
            for column in g.varying(false, true) {
                let at = Register {
                    sub: row.sub + column.sub,
                    j: row.j + column.j,
                    h: row.h + column.h,
                    e: row.e + column.e,
                };
                let element = self.element(x, at, &mut seen)?;
                most = self.larger(most, element);
            }
            for &lane in lanes {
                let other = isa::shuffle_xor(&mut self.t.f, most, lane);
                most = self.larger(most, other);
            }
            maxima.push(most);
        }
        if let Some(buffer) = scratch {
            maxima = self.met(&g, maxima, buffer);
        }
        let held = match (&self.s.places[r.0 as usize], maxima.first()) {
            (Place::Uniform, Some(&first)) => Held::Scalar(first),
            _ => Held::Registers(maxima, [true, false]),
        };
        self.held.insert(r, held);
        Ok(())
    }

    fn larger(&mut self, a: Val, b: Val) -> Val {
        self.t.f.intrinsic("maximum", &[a, b])
    }

    /// The same over all warps that share rows.
    fn met(&mut self, g: &Geometry, parts: Vec<Val>, buffer: BufferId) -> Vec<Val> {
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
            let mut most = f32(f32::NEG_INFINITY);
            for part in 0..count {
                let at = self.t.f.add(row, i32((part * pitch).into()));
                let v = ptx::load_shared_f32(&mut self.t.f, at);
                most = self.larger(most, v);
            }
            met.push(most);
        }
        met
    }
}
