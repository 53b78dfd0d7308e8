//! Between lanes: single lanes to and from scalars, permutes, counts of lanes.

use super::{Cx, Done, Handler, map1};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use crate::wave::{Lanes, Target};

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    Some(match name {
        "v_readlane_b32" => |c, i| {
            let lane = c.w.scalar32(i.ops[2])? & 63;
            read(c, i, lane as usize)
        },
        // The first active lane, or lane 0 if there is none.
        "v_readfirstlane_b32" => |c, i| {
            let exec = c.w.exec();
            let lane = if exec == 0 { 0 } else { exec.trailing_zeros() };
            read(c, i, lane as usize)
        },
        "v_writelane_b32" => |c, i| {
            let (value, lane) = (c.w.scalar32(i.ops[1])?, c.w.scalar32(i.ops[2])? & 63);
            let Operand::V(n) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
            c.w.set_lane(n, lane as usize, value)
        },
        "v_mbcnt_lo_u32_b32" => |c, i| count(c, i, 0),
        "v_mbcnt_hi_u32_b32" => |c, i| count(c, i, 32),
        // Odd rows of the destination change places with even rows of the source, and halves of the wave do.
        "v_permlane16_swap_b32" => |c, i| swap(c, i, 16),
        "v_permlane32_swap_b32" => |c, i| swap(c, i, 32),
        _ => return None,
    })
}

fn read(c: &mut Cx<'_>, i: &Inst, lane: usize) -> Done {
    let a = c.raw(i, 1)?;
    c.w.known = if c.w.known >> lane & 1 != 0 { !0 } else { 0 };
    match i.ops[0] {
        Operand::S(n) => c.w.set_s(n, a[lane]),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// Adds the bits of a mask that lie below the lane, in one half of the mask.
fn count(c: &mut Cx<'_>, i: &Inst, first: usize) -> Done {
    let (mask, base) = (c.b32(i, 1)?, c.b32(i, 2)?);
    let mut out = base;
    for (l, out) in out.iter_mut().enumerate() {
        let below = ((1u64 << l.saturating_sub(first).min(32)) - 1) as u32;
        *out = out.wrapping_add((mask[l] & below).count_ones());
    }
    c.put(i, 0, &out)
}

fn swap(c: &mut Cx<'_>, i: &Inst, rows: usize) -> Done {
    let (Operand::V(x), Operand::V(y)) = (i.ops[0], i.ops[1]) else { return Err(Cause::Unknown(i.text.clone())) };
    let (mut a, mut b) = (c.raw(i, 0)?, c.raw(i, 1)?);
    for l in (0..64).filter(|l| l / rows % 2 == 1) {
        std::mem::swap(&mut a[l], &mut b[l - rows]);
    }
    if c.w.known != !0 {
        c.w.known = 0;
    }
    c.w.set_v(x, &a)?;
    c.w.set_v(y, &b)
}

/// Permutes that go through the LDS unit, though not through its memory.
pub fn find_ds(name: &str) -> Option<Handler> {
    Some(match name {
        "ds_bpermute_b32" => |c, i| {
            let (at, value) = (c.raw(i, 1)?, c.raw(i, 2)?);
            let from = map1(&at, |a| (a.wrapping_add(i.offset as u32) >> 2 & 63) as u8);
            gather(c, i, &value, &from)
        },
        "ds_permute_b32" => permute,
        "ds_swizzle_b32" => |c, i| {
            let value = c.raw(i, 1)?;
            let Some(from) = swizzle(i.offset as u32) else { return Err(Cause::Unknown(i.text.clone())) };
            gather(c, i, &value, &from)
        },
        _ => return None,
    })
}

/// Each lane takes what an active lane has, or 0.
fn gather(c: &mut Cx<'_>, i: &Inst, value: &Lanes, from: &[u8; 64]) -> Done {
    let (exec, known) = (c.w.exec(), c.w.known);
    let (mut out, mut bits) = ([0; 64], 0);
    for l in 0..64 {
        let source = usize::from(from[l]);
        let active = exec >> source & 1 != 0;
        out[l] = if active { value[source] } else { 0 };
        bits |= u64::from(!active || known >> source & 1 != 0) << l;
    }
    c.w.known &= bits;
    finish(c, i, &out)
}

/// Each lane sends its value to another; of several, the highest lane's arrives.
fn permute(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (at, value) = (c.raw(i, 1)?, c.raw(i, 2)?);
    let (exec, known) = (c.w.exec(), c.w.known);
    c.w.require(exec, "where a permute sends")?;
    let (mut out, mut bits) = ([0; 64], !0u64);
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let to = at[l].wrapping_add(i.offset as u32) as usize >> 2 & 63;
        out[to] = value[l];
        bits = bits & !(1 << to) | (known >> l & 1) << to;
    }
    c.w.known = bits;
    finish(c, i, &out)
}

fn finish(c: &mut Cx<'_>, i: &Inst, out: &Lanes) -> Done {
    let Operand::V(n) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
    c.w.set_v(n, out)?;
    c.w.issue_lds(Target::V(n, 1));
    Ok(())
}

/// From which lane each takes: four lanes in any order, or lanes of 32 by and, or and exclusive or of their numbers.
fn swizzle(pattern: u32) -> Option<[u8; 64]> {
    if pattern >= 0xc000 {
        return None;
    }
    Some(std::array::from_fn(|l| {
        let l = l as u32;
        let from = if pattern & 0x8000 != 0 {
            l & !3 | pattern >> (2 * (l & 3)) & 3
        } else {
            l & 32 | ((l & pattern & 31) | pattern >> 5 & 31) ^ pattern >> 10 & 31
        };
        from as u8
    }))
}
