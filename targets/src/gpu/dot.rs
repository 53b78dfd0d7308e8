//! Matrix products of tiles in shared memory: `mma.sync` where the types allow, else fused multiply-adds.
//!
//! Operands are read from padded rows (see [`super::schedule`]), so that the eight rows of an 8x8 matrix lie in different banks.

use super::emit::Emitter;
use super::fragment::Spread;
use super::isa;
use super::mlir::{Ty, Val, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Buffer, Place};
use dsc_ir::tile::ValueId;

/// Steps of `k` written out in a loop's body.
const STEPS: u32 = 4;

impl<'a> Emitter<'a> {
    /// `acc + a · b`.
    pub fn dot(&mut self, r: ValueId, (a, b): (ValueId, ValueId), acc: Option<ValueId>, trans_b: bool) {
        let Place::Fragment(f) = self.place(r) else { unreachable!("products are fragments") };
        let s = Spread::new(self, *f, self.shape(r));
        let acc = match acc {
            Some(acc) => self.fragment(acc, &s),
            None => self.zeros(&s),
        };
        let (a_buffer, b_buffer) = (self.root_buffer(a), self.root_buffer(b));
        let k = self.shape(a).last().copied().unwrap_or(1);
        let values = match f.atom {
            Atom::Fma => self.dot_fma(&s, (a_buffer, self.dtype(a)), (b_buffer, self.dtype(b)), k, trans_b, acc),
            _ => self.dot_mma(&s, self.dtype(a), a_buffer, b_buffer, k, trans_b, acc),
        };
        self.fragments.insert(r, values);
    }

    #[allow(clippy::too_many_arguments)]
    fn dot_mma(
        &mut self,
        s: &Spread,
        dtype: DType,
        a: &Buffer,
        b: &Buffer,
        k: u32,
        trans_b: bool,
        acc: Vec<Val>,
    ) -> Vec<Val> {
        let bytes = dtype.bytes() as u32;
        let step = 32 / bytes;
        let lane = self.t.lane;
        let shared = self.t.shared32;
        // Addresses of this lane's row in the first step: four 8x8 matrices an instruction.
        let f = &mut self.t.f;
        let low = f.bin("and", lane, i32(15));
        let high = f.bin("lshr", lane, i32(4));
        let first = f.mul(s.warp[0], i32(s.block[0].into()));
        let row = f.add(first, low);
        let chunk = f.mul(high, i32(16));
        let a_rows: Vec<Val> = (0..s.block[0] / 16)
            .map(|tile| {
                let row = self.t.f.add(row, i32((tile * 16).into()));
                let row = self.at_most(row, a.shape[0] - 1, s.block[0] * s.warps[0] > a.shape[0]);
                let byte = self.t.f.mul(row, i32(a.pitch.into()));
                let byte = self.t.f.add(byte, chunk);
                let byte = self.t.f.add(byte, i32(a.offset.into()));
                self.t.f.add(shared, byte)
            })
            .collect();
        let tiles = s.block[1] / 8;
        let first = self.t.f.mul(s.warp[1], i32(s.block[1].into()));
        let b_rows: Vec<Val> = (0..tiles.div_ceil(2))
            .map(|pair| {
                let n0 = self.t.f.add(first, i32((pair * 16).into()));
                let beyond = s.block[1].next_multiple_of(16) * s.warps[1];
                let byte = if trans_b {
                    let f = &mut self.t.f;
                    let in_eight = f.bin("and", lane, i32(7));
                    let second = f.mul(high, i32(8));
                    let row = f.add(in_eight, second);
                    let row = f.add(n0, row);
                    let half = f.bin("lshr", lane, i32(3));
                    let half = f.bin("and", half, i32(1));
                    let half = f.mul(half, i32(16));
                    let row = self.at_most(row, b.shape[0] - 1, beyond > b.shape[0]);
                    let byte = self.t.f.mul(row, i32(b.pitch.into()));
                    self.t.f.add(byte, half)
                } else {
                    let col = self.t.f.mul(high, i32(8));
                    let col = self.t.f.add(n0, col);
                    let col = self.at_most(col, b.shape[1].saturating_sub(8), beyond > b.shape[1]);
                    let byte = self.t.f.mul(low, i32(b.pitch.into()));
                    let col = self.t.f.mul(col, i32(bytes.into()));
                    self.t.f.add(byte, col)
                };
                let byte = self.t.f.add(byte, i32(b.offset.into()));
                self.t.f.add(shared, byte)
            })
            .collect();
        let b_step = if trans_b { 32 } else { step * b.pitch };
        let one = |e: &mut Self, acc: &mut [Val], a_at: Val, b_at: Val| {
            let lefts: Vec<Vec<Val>> = a_rows
                .iter()
                .map(|&row| {
                    let at = e.t.f.add(row, a_at);
                    isa::ldmatrix(&mut e.t.f, at, false)
                })
                .collect();
            for (pair, &row) in b_rows.iter().enumerate() {
                let at = e.t.f.add(row, b_at);
                let right = isa::ldmatrix(&mut e.t.f, at, !trans_b);
                for half in 0..2.min(tiles as usize - 2 * pair) {
                    let gi = 2 * pair + half;
                    for (tile, left) in lefts.iter().enumerate() {
                        let regs: Vec<usize> =
                            [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(h, i)| s.register(2 * tile + h, gi, i)).to_vec();
                        let c: Vec<Val> = regs.iter().map(|&r| acc[r]).collect();
                        let d = isa::mma(&mut e.t.f, dtype, &c, left, &right[2 * half..2 * half + 2]);
                        for (&r, v) in regs.iter().zip(d) {
                            acc[r] = v;
                        }
                    }
                }
            }
        };
        self.steps(k.div_ceil(step), acc, |e, acc, at| {
            let (a_at, b_at) = (e.t.f.mul(at, i32(32)), e.t.f.mul(at, i32(b_step.into())));
            one(e, acc, a_at, b_at);
        })
    }

    fn dot_fma(
        &mut self,
        s: &Spread,
        (a, a_type): (&Buffer, DType),
        (b, b_type): (&Buffer, DType),
        k: u32,
        trans_b: bool,
        acc: Vec<Val>,
    ) -> Vec<Val> {
        let arch = self.t.arch;
        // Neighbours along k in one load.
        let n = super::emit::power_of_two_in(k).min(4);
        let row_bytes = |e: &mut Self, row: Val, b: &Buffer| {
            let byte = e.t.f.mul(row, i32(b.pitch.into()));
            e.t.f.add(byte, i32(b.offset.into()))
        };
        let a_rows: Vec<Val> = s.rows.iter().map(|&(row, _)| row_bytes(self, row, a)).collect();
        let columns: Vec<Val> = s
            .groups
            .iter()
            .flat_map(|&(col, _)| (0..s.width).map(move |i| (col, i)))
            .map(|(col, i)| {
                let c = self.t.f.add(col, i32(i.into()));
                let ragged = s.block[1] * s.warps[1] > s.shape[1] || !s.even();
                self.at_most(c, s.shape[1] - 1, ragged)
            })
            .collect();
        let b_rows: Vec<Val> = columns
            .iter()
            .map(|&c| {
                if trans_b {
                    row_bytes(self, c, b)
                } else {
                    let byte = self.t.f.mul(c, i32(b_type.bytes() as i64));
                    self.t.f.add(byte, i32(b.offset.into()))
                }
            })
            .collect();
        let read = |e: &mut Self, byte: Val, dtype: DType, n: u32| -> Vec<Val> {
            let ty = isa::stored(dtype);
            let most = n.min(16 / ty.bytes());
            let mut out = Vec::new();
            for i in (0..n).step_by(most as usize) {
                let byte = e.t.f.add(byte, i32((i * ty.bytes()).into()));
                let values = e.t.load_shared(byte, ty, most);
                out.extend(values.into_iter().map(|v| {
                    let wide = isa::widen(&mut e.t.f, arch, v, dtype);
                    if wide.ty() == Ty::I32 { e.t.f.cast("sitofp", wide, Ty::F32) } else { wide }
                }));
            }
            out
        };
        let (a_bytes, b_bytes) = (a_type.bytes() as i64, b_type.bytes() as i64);
        self.steps(k / n, acc, |e, acc, at| {
            let a_at = e.t.f.mul(at, i32(i64::from(n) * a_bytes));
            let lefts: Vec<Vec<Val>> = a_rows
                .iter()
                .map(|&row| {
                    let byte = e.t.f.add(row, a_at);
                    read(e, byte, a_type, n)
                })
                .collect();
            for (c, &row) in b_rows.iter().enumerate() {
                let right: Vec<Val> = if trans_b {
                    let b_at = e.t.f.mul(at, i32(i64::from(n) * b_bytes));
                    let byte = e.t.f.add(row, b_at);
                    read(e, byte, b_type, n)
                } else {
                    (0..n)
                        .map(|i| {
                            let kk = e.t.f.mul(at, i32(n.into()));
                            let kk = e.t.f.add(kk, i32(i.into()));
                            let b_at = e.t.f.mul(kk, i32(b.pitch.into()));
                            let byte = e.t.f.add(row, b_at);
                            read(e, byte, b_type, 1)[0]
                        })
                        .collect()
                };
                let (group, i) = (c / s.width as usize, c as u32 % s.width);
                for (ri, left) in lefts.iter().enumerate() {
                    let r = s.register(ri, group, i);
                    for kk in 0..n as usize {
                        acc[r] = e.t.f.intrinsic("fma", &[left[kk], right[kk], acc[r]]);
                    }
                }
            }
        })
    }

    fn at_most(&mut self, v: Val, limit: u32, needed: bool) -> Val {
        if needed { self.t.f.intrinsic("smin", &[v, i32(limit.into())]) } else { v }
    }

    /// Runs `body` for steps `0..count` on the accumulators: written out if few, else looped over.
    fn steps(&mut self, count: u32, mut acc: Vec<Val>, mut body: impl FnMut(&mut Self, &mut [Val], Val)) -> Vec<Val> {
        let unrolled = if acc.len() > 64 { STEPS / 2 } else { STEPS };
        if count <= 2 * unrolled {
            for i in 0..count {
                body(self, &mut acc, i32(i.into()));
            }
            return acc;
        }
        let looped = count / unrolled * unrolled;
        let l = self.t.f.open_loop(i32(0), i32(looped.into()), &acc);
        acc = l.args[1..].to_vec();
        for i in 0..unrolled {
            let at = self.t.f.add(l.args[0], i32(i.into()));
            body(self, &mut acc, at);
        }
        self.t.f.close_loop(&l, i32(unrolled.into()), &acc);
        acc = l.args[1..].to_vec();
        for i in looped..count {
            body(self, &mut acc, i32(i.into()));
        }
        acc
    }
}
