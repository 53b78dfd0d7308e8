//! Matrix products by `mma.sync`, from rows of shared memory that `ldmatrix` reads: the padding leaves the eight rows of an 8x8 matrix in
//! different banks.

use super::isa;
use crate::gpu::emit::Emitter;
use crate::gpu::fragment::Spread;
use crate::gpu::isa::{Left, Product};
use crate::gpu::mlir::{Val, i32};

/// `acc + a · b`.
pub fn product(e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val> {
    let Product { dtype, a: Left::Shared(a), b, k, trans_b, .. } = *p else {
        unreachable!("no operand stays in registers here")
    };
    let bytes = dtype.bytes() as u32;
    let step = 32 / bytes;
    let lane = e.t.lane;
    let shared = e.t.shared32;
    // Addresses of this lane's row in the first step: four 8x8 matrices an instruction.
    let f = &mut e.t.f;
    let low = f.bin("and", lane, i32(15));
    let high = f.bin("lshr", lane, i32(4));
    let first = f.mul(s.warp[0], i32(s.block[0].into()));
    let row = f.add(first, low);
    let chunk = f.mul(high, i32(16));
    let a_rows: Vec<Val> = (0..s.block[0] / 16)
        .map(|tile| {
            let row = e.t.f.add(row, i32((tile * 16).into()));
            let row = e.at_most(row, a.shape[0] - 1, s.block[0] * s.warps[0] > a.shape[0]);
            let byte = e.t.f.mul(row, i32(a.pitch.into()));
            let byte = e.t.f.add(byte, chunk);
            let byte = e.t.f.add(byte, i32(a.offset.into()));
            e.t.f.add(shared, byte)
        })
        .collect();
    let tiles = s.block[1] / 8;
    let first = e.t.f.mul(s.warp[1], i32(s.block[1].into()));
    let b_rows: Vec<Val> = (0..tiles.div_ceil(2))
        .map(|pair| {
            let n0 = e.t.f.add(first, i32((pair * 16).into()));
            let beyond = s.block[1].next_multiple_of(16) * s.warps[1];
            let byte = if trans_b {
                let f = &mut e.t.f;
                let in_eight = f.bin("and", lane, i32(7));
                let second = f.mul(high, i32(8));
                let row = f.add(in_eight, second);
                let row = f.add(n0, row);
                let half = f.bin("lshr", lane, i32(3));
                let half = f.bin("and", half, i32(1));
                let half = f.mul(half, i32(16));
                let row = e.at_most(row, b.shape[0] - 1, beyond > b.shape[0]);
                let byte = e.t.f.mul(row, i32(b.pitch.into()));
                e.t.f.add(byte, half)
            } else {
                let col = e.t.f.mul(high, i32(8));
                let col = e.t.f.add(n0, col);
                let col = e.at_most(col, b.shape[1].saturating_sub(8), beyond > b.shape[1]);
                let byte = e.t.f.mul(low, i32(b.pitch.into()));
                let col = e.t.f.mul(col, i32(bytes.into()));
                e.t.f.add(byte, col)
            };
            let byte = e.t.f.add(byte, i32(b.offset.into()));
            e.t.f.add(shared, byte)
        })
        .collect();
    let b_step = if trans_b { 32 } else { step * b.pitch };
    let one = |e: &mut Emitter, acc: &mut [Val], a_at: Val, b_at: Val| {
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
    e.steps((k.div_ceil(step), 0), p.atom, acc, |e, acc, at| {
        let (a_at, b_at) = (e.t.f.mul(at, i32(32)), e.t.f.mul(at, i32(b_step.into())));
        one(e, acc, a_at, b_at);
    })
}
