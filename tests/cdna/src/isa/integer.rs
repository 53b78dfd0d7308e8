//! Integer arithmetic of lanes.

use super::{Cx, Done, Handler, ballot, map1, map2, map3};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    sums(name).or_else(|| carries(name)).or_else(|| products(name)).or_else(|| extremes(name)).or_else(|| short(name))
}

fn signed(f: impl Fn(i32, i32) -> i32) -> impl Fn(u32, u32) -> u32 {
    move |a, b| f(a as i32, b as i32) as u32
}

/// Wrapping, or saturating where the instruction clamps.
fn add(c: &mut Cx<'_>, i: &Inst, wrap: impl Fn(u32, u32) -> u32, clamp: impl Fn(u32, u32) -> u32) -> Done {
    if i.flags.clamp { c.binary(i, clamp) } else { c.binary(i, wrap) }
}

fn sums(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_u32" => |c, i| add(c, i, u32::wrapping_add, u32::saturating_add),
        "v_sub_u32" => |c, i| add(c, i, u32::wrapping_sub, u32::saturating_sub),
        "v_subrev_u32" => |c, i| add(c, i, |a, b| b.wrapping_sub(a), |a, b| b.saturating_sub(a)),
        "v_add_i32" => |c, i| add(c, i, u32::wrapping_add, signed(i32::saturating_add)),
        "v_sub_i32" => |c, i| add(c, i, u32::wrapping_sub, signed(i32::saturating_sub)),
        "v_add3_u32" => |c, i| c.ternary(i, |a, b, d| a.wrapping_add(b).wrapping_add(d)),
        "v_lshl_add_u32" => |c, i| c.ternary(i, |a, b, d| (a << (b & 31)).wrapping_add(d)),
        "v_add_lshl_u32" => |c, i| c.ternary(i, |a, b, d| a.wrapping_add(b) << (d & 31)),
        "v_xad_u32" => |c, i| c.ternary(i, |a, b, d| (a ^ b).wrapping_add(d)),
        "v_lshl_add_u64" => |c, i| {
            let (a, n, b) = (c.b64(i, 1)?, c.raw(i, 2)?, c.b64(i, 3)?);
            c.put64(i, 0, &map3(&a, &n, &b, |a, n, b| (a << (n & 7)).wrapping_add(b)))
        },
        "v_sad_u8" => {
            |c, i| c.ternary(i, |a, b, d| (0..4).fold(d, |s, k| s.wrapping_add(byte(a, k).abs_diff(byte(b, k)))))
        }
        "v_sad_u32" => |c, i| c.ternary(i, |a, b, d| d.wrapping_add(a.abs_diff(b))),
        "v_sad_u16" => |c, i| {
            c.ternary(i, |a, b, d| {
                d.wrapping_add((a & 0xffff).abs_diff(b & 0xffff)).wrapping_add((a >> 16).abs_diff(b >> 16))
            })
        },
        _ => return None,
    })
}

fn byte(a: u32, k: u32) -> u32 {
    a >> (8 * k) & 0xff
}

/// Sums with a carry out in the second operand and, of four sources, in from the last.
fn with_carry(c: &mut Cx<'_>, i: &Inst, carries_in: bool, f: impl Fn(u64, u64, u64) -> u64) -> Done {
    let (a, b) = (c.b32(i, 2)?, c.b32(i, 3)?);
    let carry = if carries_in { c.mask(i, 4)? } else { 0 };
    let mut sums = [0; 64];
    for l in 0..64 {
        sums[l] = f(u64::from(a[l]), u64::from(b[l]), carry >> l & 1);
    }
    let known = c.w.known;
    c.put(i, 0, &map1(&sums, |s| s as u32))?;
    c.w.known = known;
    c.put_mask(i, 1, ballot(|l| sums[l] >> 32 & 1 != 0))
}

fn carries(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| a + b),
        "v_sub_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| a.wrapping_sub(b)),
        "v_subrev_co_u32" => |c, i| with_carry(c, i, false, |a, b, _| b.wrapping_sub(a)),
        "v_addc_co_u32" => |c, i| with_carry(c, i, true, |a, b, k| a + b + k),
        "v_subb_co_u32" => |c, i| with_carry(c, i, true, |a, b, k| a.wrapping_sub(b).wrapping_sub(k)),
        "v_subbrev_co_u32" => |c, i| with_carry(c, i, true, |a, b, k| b.wrapping_sub(a).wrapping_sub(k)),
        "v_mad_u64_u32" => |c, i| mad64(c, i, |a, b, d| u128::from(a) * u128::from(b) + u128::from(d)),
        "v_mad_i64_i32" => |c, i| {
            mad64(c, i, |a, b, d| {
                (i128::from(a as i32) * i128::from(b as i32) + i128::from(d as i64)) as u128 & ((1 << 64) - 1)
            })
        },
        _ => return None,
    })
}

/// The low word does not depend on the addend's high one, which may be anything.
fn mad64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32, u64) -> u128) -> Done {
    let (a, b) = (c.raw(i, 2)?, c.raw(i, 3)?);
    let factors = c.w.known;
    let d = c.b64(i, 4)?;
    let all = c.w.known;
    let low = match i.ops[4] {
        Operand::V(n) => factors & c.w.v_known(n),
        _ => all,
    };
    let Operand::V(to) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
    let sums = map3(&a, &b, &d, f);
    c.w.known = low;
    c.w.set_v(to, &map1(&sums, |s| s as u32))?;
    c.w.known = all;
    c.w.set_v(to + 1, &map1(&sums, |s| (s >> 32) as u32))?;
    c.put_mask(i, 1, ballot(|l| sums[l] >> 64 & 1 != 0))
}

/// 24 bits with their sign.
fn low24(a: u32) -> i64 {
    i64::from((a << 8) as i32 >> 8)
}

fn products(name: &str) -> Option<Handler> {
    Some(match name {
        "v_mul_lo_u32" => |c, i| c.binary(i, u32::wrapping_mul),
        "v_mul_hi_u32" => |c, i| c.binary(i, |a, b| (u64::from(a) * u64::from(b) >> 32) as u32),
        "v_mul_hi_i32" => |c, i| c.binary(i, |a, b| (i64::from(a as i32) * i64::from(b as i32) >> 32) as u32),
        "v_mul_u32_u24" => |c, i| c.binary(i, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)),
        "v_mul_i32_i24" => |c, i| c.binary(i, |a, b| (low24(a) * low24(b)) as u32),
        "v_mul_hi_u32_u24" => {
            |c, i| c.binary(i, |a, b| (u64::from(a & 0xff_ffff) * u64::from(b & 0xff_ffff) >> 32) as u32)
        }
        "v_mul_hi_i32_i24" => |c, i| c.binary(i, |a, b| (low24(a) * low24(b) >> 32) as u32),
        "v_mad_u32_u24" => |c, i| c.ternary(i, |a, b, d| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(d)),
        "v_mad_i32_i24" => |c, i| c.ternary(i, |a, b, d| (low24(a) * low24(b)).wrapping_add(i64::from(d)) as u32),
        "v_dot4_i32_i8" | "v_dot4c_i32_i8" => |c, i| {
            let f = |a, b, d: u32| {
                (0..4)
                    .fold(d, |s, k| s.wrapping_add((i32::from(byte(a, k) as i8) * i32::from(byte(b, k) as i8)) as u32))
            };
            if i.name == "v_dot4c_i32_i8" { accumulate(c, i, f) } else { c.ternary(i, f) }
        },
        "v_dot4_u32_u8" => {
            |c, i| c.ternary(i, |a, b, d| (0..4).fold(d, |s, k| s.wrapping_add(byte(a, k) * byte(b, k))))
        }
        _ => return None,
    })
}

/// The destination is the third source.
fn accumulate(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32, u32) -> u32) -> Done {
    let (a, b, d) = (c.b32(i, 1)?, c.b32(i, 2)?, c.raw(i, 0)?);
    c.put(i, 0, &map3(&a, &b, &d, f))
}

fn median<T: Ord>(a: T, b: T, c: T) -> T {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    high.min(low.max(c))
}

fn extremes(name: &str) -> Option<Handler> {
    Some(match name {
        "v_min_u32" => |c, i| c.binary(i, u32::min),
        "v_max_u32" => |c, i| c.binary(i, u32::max),
        "v_min_i32" => |c, i| c.binary(i, signed(i32::min)),
        "v_max_i32" => |c, i| c.binary(i, signed(i32::max)),
        "v_min3_u32" => |c, i| c.ternary(i, |a, b, d| a.min(b).min(d)),
        "v_max3_u32" => |c, i| c.ternary(i, |a, b, d| a.max(b).max(d)),
        "v_min3_i32" => |c, i| c.ternary(i, |a, b, d| (a as i32).min(b as i32).min(d as i32) as u32),
        "v_max3_i32" => |c, i| c.ternary(i, |a, b, d| (a as i32).max(b as i32).max(d as i32) as u32),
        "v_med3_u32" => |c, i| c.ternary(i, median),
        "v_med3_i32" => |c, i| c.ternary(i, |a, b, d| median(a as i32, b as i32, d as i32) as u32),
        _ => return None,
    })
}

/// 16 bits of each source: what `op_sel` says, the low half if it says nothing.
fn half(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[u16; 64], Cause> {
    let high = i.op_sel >> (k - 1) & 1 != 0;
    let a = match i.ops[k] {
        Operand::Const(n) => [u32::from(n.b16); 64],
        _ => c.b32(i, k)?,
    };
    Ok(map1(&a, |a| (if high { a >> 16 } else { a }) as u16))
}

/// Writes 16 bits: the high half of the destination or the low one, whose other half becomes 0.
fn put_half(c: &mut Cx<'_>, i: &Inst, value: [u16; 64]) -> Done {
    let sources = i.count - 1;
    if i.op_sel >> sources & 1 != 0 {
        let old = c.raw(i, 0)?;
        return c.put(i, 0, &map2(&old, &value, |o, v| o & 0xffff | u32::from(v) << 16));
    }
    c.put(i, 0, &map1(&value, u32::from))
}

fn two16(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u16, u16) -> u16) -> Done {
    let (a, b) = (half(c, i, 1)?, half(c, i, 2)?);
    put_half(c, i, map2(&a, &b, f))
}

fn three16(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u16, u16, u16) -> u16) -> Done {
    let (a, b, d) = (half(c, i, 1)?, half(c, i, 2)?, half(c, i, 3)?);
    put_half(c, i, map3(&a, &b, &d, f))
}

fn short(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_u16" => |c, i| two16(c, i, u16::wrapping_add),
        "v_sub_u16" => |c, i| two16(c, i, u16::wrapping_sub),
        "v_subrev_u16" => |c, i| two16(c, i, |a, b| b.wrapping_sub(a)),
        "v_mul_lo_u16" => |c, i| two16(c, i, u16::wrapping_mul),
        "v_lshlrev_b16" => |c, i| two16(c, i, |a, b| b << (a & 15)),
        "v_lshrrev_b16" => |c, i| two16(c, i, |a, b| b >> (a & 15)),
        "v_ashrrev_i16" => |c, i| two16(c, i, |a, b| (b as i16 >> (a & 15)) as u16),
        "v_max_u16" => |c, i| two16(c, i, u16::max),
        "v_min_u16" => |c, i| two16(c, i, u16::min),
        "v_max_i16" => |c, i| two16(c, i, |a, b| (a as i16).max(b as i16) as u16),
        "v_min_i16" => |c, i| two16(c, i, |a, b| (a as i16).min(b as i16) as u16),
        "v_mad_u16" | "v_mad_legacy_u16" => |c, i| three16(c, i, |a, b, d| a.wrapping_mul(b).wrapping_add(d)),
        "v_mad_i16" | "v_mad_legacy_i16" => |c, i| three16(c, i, |a, b, d| a.wrapping_mul(b).wrapping_add(d)),
        "v_add_i16" => |c, i| two16(c, i, u16::wrapping_add),
        "v_sub_i16" => |c, i| two16(c, i, u16::wrapping_sub),
        "v_max3_u16" => |c, i| three16(c, i, |a, b, d| a.max(b).max(d)),
        "v_min3_u16" => |c, i| three16(c, i, |a, b, d| a.min(b).min(d)),
        "v_mad_u32_u16" => |c, i| {
            let (a, b, d) = (half(c, i, 1)?, half(c, i, 2)?, c.raw(i, 3)?);
            c.put(i, 0, &map3(&a, &b, &d, |a, b, d| (u32::from(a) * u32::from(b)).wrapping_add(d)))
        },
        "v_mad_i32_i16" => |c, i| {
            let (a, b, d) = (half(c, i, 1)?, half(c, i, 2)?, c.raw(i, 3)?);
            c.put(
                i,
                0,
                &map3(&a, &b, &d, |a, b, d| (i32::from(a as i16) * i32::from(b as i16)).wrapping_add(d as i32) as u32),
            )
        },
        _ => return None,
    })
}
