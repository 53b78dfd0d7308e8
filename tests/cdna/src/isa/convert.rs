//! Conversions between integers, f16, bf16, f32 and f64.

use super::half::{put as put_half, source as half_source};
use super::{Cx, Done, Handler, map1, map2};
use crate::decode::Inst;
use half::{bf16, f16};

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    words(name).or_else(|| halves(name)).or_else(|| doubles(name)).or_else(|| packs(name))
}

/// An integer of f32.
fn to_int(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32) -> u32) -> Done {
    let a = c.f32(i, 1)?;
    c.put(i, 0, &map1(&a, f))
}

/// f32 of a word.
fn to_f32(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32) -> f32) -> Done {
    let a = c.b32(i, 1)?;
    c.put_f32(i, 0, map1(&a, f))
}

fn words(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_f32_u32" => |c, i| to_f32(c, i, |a| a as f32),
        "v_cvt_f32_i32" => |c, i| to_f32(c, i, |a| a as i32 as f32),
        "v_cvt_f32_ubyte0" => |c, i| to_f32(c, i, |a| (a & 0xff) as f32),
        "v_cvt_f32_ubyte1" => |c, i| to_f32(c, i, |a| (a >> 8 & 0xff) as f32),
        "v_cvt_f32_ubyte2" => |c, i| to_f32(c, i, |a| (a >> 16 & 0xff) as f32),
        "v_cvt_f32_ubyte3" => |c, i| to_f32(c, i, |a| (a >> 24) as f32),
        "v_cvt_off_f32_i4" => |c, i| to_f32(c, i, |a| ((a << 28) as i32 >> 28) as f32 / 16.0),
        // Rust's casts saturate and make 0 of NaN, as hardware does.
        "v_cvt_u32_f32" => |c, i| to_int(c, i, |a| a as u32),
        "v_cvt_i32_f32" => |c, i| to_int(c, i, |a| a as i32 as u32),
        "v_cvt_flr_i32_f32" => |c, i| to_int(c, i, |a| a.floor() as i32 as u32),
        "v_cvt_rpi_i32_f32" => |c, i| to_int(c, i, |a| (a + 0.5).floor() as i32 as u32),
        "v_cvt_pk_u8_f32" => |c, i| {
            let (a, at, old) = (c.f32(i, 1)?, c.raw(i, 2)?, c.raw(i, 3)?);
            let mut out = old;
            for l in 0..64 {
                let shift = 8 * (at[l] & 3);
                out[l] = old[l] & !(0xff << shift) | u32::from(a[l].round_ties_even() as u8) << shift;
            }
            c.put(i, 0, &out)
        },
        _ => return None,
    })
}

fn halves(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_f16_f32" => |c, i| {
            let a = c.f32(i, 1)?;
            put_half(c, i, a, 1)
        },
        "v_cvt_f32_f16" => |c, i| {
            let a = half_source(c, i, 1)?;
            c.put_f32(i, 0, a)
        },
        "v_cvt_f16_u16" => |c, i| {
            let a = c.b32(i, 1)?;
            put_half(c, i, map1(&a, |a| (a & 0xffff) as f32), 1)
        },
        "v_cvt_f16_i16" => |c, i| {
            let a = c.b32(i, 1)?;
            put_half(c, i, map1(&a, |a| f32::from(a as i16)), 1)
        },
        "v_cvt_u16_f16" => |c, i| {
            let a = half_source(c, i, 1)?;
            c.put(i, 0, &map1(&a, |a| u32::from(a as u16)))
        },
        "v_cvt_i16_f16" => |c, i| {
            let a = half_source(c, i, 1)?;
            c.put(i, 0, &map1(&a, |a| u32::from(a as i16 as u16)))
        },
        "v_cvt_f32_bf16" => |c, i| {
            let high = i.op_sel & 1 != 0;
            to_f32(c, i, |a| f32::from_bits(if high { a & 0xffff_0000 } else { a << 16 }))
        },
        _ => return None,
    })
}

fn doubles(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_f64_f32" => |c, i| {
            let a = c.f32(i, 1)?;
            c.put_f64(i, 0, map1(&a, f64::from))
        },
        "v_cvt_f32_f64" => |c, i| {
            let a = c.f64(i, 1)?;
            c.put_f32(i, 0, map1(&a, |a| a as f32))
        },
        "v_cvt_f64_u32" => |c, i| {
            let a = c.b32(i, 1)?;
            c.put_f64(i, 0, map1(&a, f64::from))
        },
        "v_cvt_f64_i32" => |c, i| {
            let a = c.b32(i, 1)?;
            c.put_f64(i, 0, map1(&a, |a| f64::from(a as i32)))
        },
        "v_cvt_u32_f64" => |c, i| {
            let a = c.f64(i, 1)?;
            c.put(i, 0, &map1(&a, |a| a as u32))
        },
        "v_cvt_i32_f64" => |c, i| {
            let a = c.f64(i, 1)?;
            c.put(i, 0, &map1(&a, |a| a as i32 as u32))
        },
        _ => return None,
    })
}

/// Two halves of two f32.
fn pack(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32) -> u16) -> Done {
    let (a, b) = (c.f32(i, 1)?, c.f32(i, 2)?);
    c.put(i, 0, &map2(&a, &b, |a, b| u32::from(f(a)) | u32::from(f(b)) << 16))
}

/// Rounds towards zero.
fn truncated(a: f32) -> u16 {
    let near = f16::from_f32(a);
    if near.is_infinite() && a.is_finite() {
        return if a > 0.0 { 0x7bff } else { 0xfbff };
    }
    let away = near.to_f32().abs() > a.abs();
    near.to_bits() - u16::from(away)
}

fn packs(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_pkrtz_f16_f32" => |c, i| pack(c, i, truncated),
        "v_cvt_pk_f16_f32" => |c, i| pack(c, i, |a| f16::from_f32(a).to_bits()),
        "v_cvt_pk_bf16_f32" => |c, i| pack(c, i, |a| bf16::from_f32(a).to_bits()),
        "v_cvt_pknorm_i16_f32" => |c, i| pack(c, i, |a| (a.clamp(-1.0, 1.0) * 32767.0).round_ties_even() as i16 as u16),
        "v_cvt_pknorm_u16_f32" => |c, i| pack(c, i, |a| (a.clamp(0.0, 1.0) * 65535.0).round_ties_even() as u16),
        "v_cvt_pk_u16_u32" => |c, i| c.binary(i, |a, b| a.min(0xffff) | b.min(0xffff) << 16),
        "v_cvt_pk_i16_i32" => |c, i| {
            let short = |a: u32| (a as i32).clamp(-0x8000, 0x7fff) as u32 & 0xffff;
            c.binary(i, |a, b| short(a) | short(b) << 16)
        },
        _ => return None,
    })
}
