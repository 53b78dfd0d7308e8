//! Packed arithmetic (VOP3P): two halves, or two f32, of a register or a pair; and sums of products of halves.

use super::float::{fma, max, min};
use super::half::round_once;
use super::{Cx, Done, Handler, map1, map2, map3};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use half::{bf16, f16};

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    floats(name).or_else(|| integers(name)).or_else(|| doubles(name)).or_else(|| mixed(name)).or_else(|| dots(name))
}

/// Both halves that source `k` gives, for the low and the high result.
fn halves(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[(u16, u16); 64], Cause> {
    // Of a real constant only the low half is not 0; integers are extended.
    let a = match i.ops[k] {
        Operand::Const(n) if n.b32 >> 16 != 0 && n.b32 >> 16 != 0xffff => [u32::from(n.b16); 64],
        _ => c.raw(i, k)?,
    };
    let shift = |bits: u8| if bits >> (k - 1) & 1 != 0 { 16 } else { 0 };
    let (low, high) = (shift(i.op_sel), shift(i.op_sel_hi));
    Ok(map1(&a, |a| ((a >> low) as u16, (a >> high) as u16)))
}

/// As [`halves`], as f32 with signs changed.
fn real_halves(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[(f32, f32); 64], Cause> {
    let a = halves(c, i, k)?;
    let flip = |bits: u8| if bits >> (k - 1) & 1 != 0 { 0x8000 } else { 0 };
    let (low, high) = (flip(i.neg_lo), flip(i.neg_hi));
    Ok(map1(&a, |(l, h)| (f16::from_bits(l ^ low).to_f32(), f16::from_bits(h ^ high).to_f32())))
}

fn put_real(c: &mut Cx<'_>, i: &Inst, value: [(f32, f32); 64]) -> Done {
    let clamp = i.flags.clamp;
    let bits = |x: f32| u32::from(f16::from_f32(if clamp { max(x.min(1.0), 0.0) } else { x }).to_bits());
    c.put(i, 0, &map1(&value, |(l, h)| bits(l) | bits(h) << 16))
}

fn two(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32) -> f32) -> Done {
    let (a, b) = (real_halves(c, i, 1)?, real_halves(c, i, 2)?);
    put_real(c, i, map2(&a, &b, |a, b| (f(a.0, b.0), f(a.1, b.1))))
}

fn floats(name: &str) -> Option<Handler> {
    Some(match name {
        "v_pk_add_f16" => |c, i| two(c, i, |a, b| a + b),
        "v_pk_mul_f16" => |c, i| two(c, i, |a, b| a * b),
        "v_pk_min_f16" => |c, i| two(c, i, min),
        "v_pk_max_f16" => |c, i| two(c, i, max),
        "v_pk_fma_f16" => |c, i| {
            let (a, b, d) = (real_halves(c, i, 1)?, real_halves(c, i, 2)?, real_halves(c, i, 3)?);
            put_real(c, i, map3(&a, &b, &d, |a, b, d| (round_once(a.0, b.0, d.0), round_once(a.1, b.1, d.1))))
        },
        _ => return None,
    })
}

fn two16(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u16, u16) -> u16) -> Done {
    let (a, b) = (halves(c, i, 1)?, halves(c, i, 2)?);
    c.put(i, 0, &map2(&a, &b, |a, b| u32::from(f(a.0, b.0)) | u32::from(f(a.1, b.1)) << 16))
}

fn integers(name: &str) -> Option<Handler> {
    Some(match name {
        "v_pk_add_u16" | "v_pk_add_i16" => |c, i| two16(c, i, u16::wrapping_add),
        "v_pk_sub_u16" | "v_pk_sub_i16" => |c, i| two16(c, i, u16::wrapping_sub),
        "v_pk_mul_lo_u16" => |c, i| two16(c, i, u16::wrapping_mul),
        "v_pk_min_u16" => |c, i| two16(c, i, u16::min),
        "v_pk_max_u16" => |c, i| two16(c, i, u16::max),
        "v_pk_min_i16" => |c, i| two16(c, i, |a, b| (a as i16).min(b as i16) as u16),
        "v_pk_max_i16" => |c, i| two16(c, i, |a, b| (a as i16).max(b as i16) as u16),
        "v_pk_lshlrev_b16" => |c, i| two16(c, i, |a, b| b << (a & 15)),
        "v_pk_lshrrev_b16" => |c, i| two16(c, i, |a, b| b >> (a & 15)),
        "v_pk_ashrrev_i16" => |c, i| two16(c, i, |a, b| (b as i16 >> (a & 15)) as u16),
        "v_pk_mad_u16" | "v_pk_mad_i16" => |c, i| {
            let (a, b, d) = (halves(c, i, 1)?, halves(c, i, 2)?, halves(c, i, 3)?);
            let f = |a: u16, b: u16, d: u16| u32::from(a.wrapping_mul(b).wrapping_add(d));
            c.put(i, 0, &map3(&a, &b, &d, |a, b, d| f(a.0, b.0, d.0) | f(a.1, b.1, d.1) << 16))
        },
        _ => return None,
    })
}

/// The words that source `k`, a pair, gives for the low and the high result.
fn pair(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[[u32; 64]; 2], Cause> {
    let pick = [i.op_sel >> (k - 1) & 1 != 0, i.op_sel_hi >> (k - 1) & 1 != 0];
    let mut out = [[0; 64]; 2];
    for (out, high) in out.iter_mut().zip(pick) {
        *out = match i.ops[k] {
            Operand::V(n) => *c.w.v(n + u16::from(high))?,
            Operand::S(n) => [c.w.s(n + u8::from(high))?; 64],
            Operand::Const(n) if !high => [n.b32; 64],
            _ => return Err(Cause::Unknown(format!("{} (the high word of a constant)", i.text))),
        };
    }
    Ok(out)
}

fn real_pair(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[[f32; 64]; 2], Cause> {
    let words = pair(c, i, k)?;
    let flip = |bits: u8| if bits >> (k - 1) & 1 != 0 { 1 << 31 } else { 0 };
    let (low, high) = (flip(i.neg_lo), flip(i.neg_hi));
    Ok([map1(&words[0], |a| f32::from_bits(a ^ low)), map1(&words[1], |a| f32::from_bits(a ^ high))])
}

fn put_pair(c: &mut Cx<'_>, i: &Inst, mut value: [[f32; 64]; 2]) -> Done {
    let Operand::V(n) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
    if i.flags.clamp {
        value = value.map(|v| map1(&v, |x| if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) }));
    }
    if c.w.mode.flush_out {
        value = value.map(|v| map1(&v, super::flush));
    }
    c.w.set_v(n, &map1(&value[0], f32::to_bits))?;
    c.w.set_v(n + 1, &map1(&value[1], f32::to_bits))
}

fn two32(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32) -> f32 + Copy) -> Done {
    let (a, b) = (real_pair(c, i, 1)?, real_pair(c, i, 2)?);
    put_pair(c, i, [map2(&a[0], &b[0], f), map2(&a[1], &b[1], f)])
}

fn doubles(name: &str) -> Option<Handler> {
    Some(match name {
        "v_pk_add_f32" => |c, i| two32(c, i, |a, b| a + b),
        "v_pk_mul_f32" => |c, i| two32(c, i, |a, b| a * b),
        "v_pk_fma_f32" => |c, i| {
            let (a, b, d) = (real_pair(c, i, 1)?, real_pair(c, i, 2)?, real_pair(c, i, 3)?);
            put_pair(c, i, [map3(&a[0], &b[0], &d[0], fma), map3(&a[1], &b[1], &d[1], fma)])
        },
        // The low word of the first source and the high one of the second, by `op_sel` only.
        "v_pk_mov_b32" => |c, i| {
            let Operand::V(n) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
            let low = i.op_sel & 1;
            let high = i.op_sel >> 1 & 1;
            let word = |c: &mut Cx<'_>, k: usize, at: u8| match i.ops[k] {
                Operand::V(n) => c.w.v(n + u16::from(at)).copied(),
                Operand::S(n) => Ok([c.w.s(n + at)?; 64]),
                op => c.w.raw32(op),
            };
            let (a, b) = (word(c, 1, low)?, word(c, 2, high)?);
            c.w.set_v(n, &a)?;
            c.w.set_v(n + 1, &b)
        },
        _ => return None,
    })
}

/// Source `k` of a mixed sum: f16 where `op_sel_hi` says so, else f32.
fn mix_source(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[f32; 64], Cause> {
    // Nothing printed means f32 here.
    let halves = if i.op_sel_hi == 0xff { 0 } else { i.op_sel_hi };
    let bit = |bits: u8| bits >> (k - 1) & 1 != 0;
    let a = match i.ops[k] {
        Operand::Const(n) if bit(halves) => [u32::from(n.b16); 64],
        _ => c.raw(i, k)?,
    };
    let shift = if bit(i.op_sel) { 16 } else { 0 };
    let (absolute, negated, half) = (i.abs >> k & 1 != 0, i.negated(k), bit(halves));
    Ok(map1(&a, |a| {
        let x = if half { f16::from_bits((a >> shift) as u16).to_f32() } else { f32::from_bits(a) };
        let x = if absolute { x.abs() } else { x };
        if negated { -x } else { x }
    }))
}

fn mix(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32, f32) -> f32) -> Result<[f32; 64], Cause> {
    let (a, b, d) = (mix_source(c, i, 1)?, mix_source(c, i, 2)?, mix_source(c, i, 3)?);
    Ok(map3(&a, &b, &d, f))
}

/// Writes one half of the destination as f16; the other stays.
fn put_mix(c: &mut Cx<'_>, i: &Inst, value: [f32; 64], high: bool) -> Done {
    let known = c.w.known;
    let old = c.raw(i, 0)?;
    c.w.known = known;
    let clamp = i.flags.clamp;
    let value = map1(&value, |x| u32::from(f16::from_f32(if clamp { max(x.min(1.0), 0.0) } else { x }).to_bits()));
    c.put(i, 0, &map2(&old, &value, |o, v| if high { o & 0xffff | v << 16 } else { o & 0xffff_0000 | v }))
}

fn mixed(name: &str) -> Option<Handler> {
    Some(match name {
        "v_fma_mix_f32" | "v_mad_mix_f32" => |c, i| {
            let value = mix(c, i, fma)?;
            c.put_f32(i, 0, value)
        },
        "v_fma_mixlo_f16" | "v_mad_mixlo_f16" => |c, i| {
            let value = mix(c, i, round_once)?;
            put_mix(c, i, value, false)
        },
        "v_fma_mixhi_f16" | "v_mad_mixhi_f16" => |c, i| {
            let value = mix(c, i, round_once)?;
            put_mix(c, i, value, true)
        },
        _ => return None,
    })
}

/// Products of both halves and an addend, the destination itself where there are two sources.
fn dot2(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u16) -> f32) -> Done {
    let both = |c: &mut Cx<'_>, k: usize| -> Result<[(f32, f32); 64], Cause> {
        let a = halves(c, i, k)?;
        let sign = |bits: u8, x: f32| if bits >> (k - 1) & 1 != 0 { -x } else { x };
        Ok(map1(&a, |(l, h)| (sign(i.neg_lo, f(l)), sign(i.neg_hi, f(h)))))
    };
    let (a, b) = (both(c, 1)?, both(c, 2)?);
    let d = if i.count > 3 { c.f32(i, 3)? } else { map1(&c.raw(i, 0)?, f32::from_bits) };
    let sum = |a: (f32, f32), b: (f32, f32), d: f32| {
        (f64::from(a.0) * f64::from(b.0) + f64::from(a.1) * f64::from(b.1) + f64::from(d)) as f32
    };
    c.put_f32(i, 0, map3(&a, &b, &d, sum))
}

fn dots(name: &str) -> Option<Handler> {
    Some(match name {
        "v_dot2_f32_f16" | "v_dot2c_f32_f16" => |c, i| dot2(c, i, |b| f16::from_bits(b).to_f32()),
        "v_dot2_f32_bf16" | "v_dot2c_f32_bf16" => |c, i| dot2(c, i, |b| bf16::from_bits(b).to_f32()),
        _ => return None,
    })
}
