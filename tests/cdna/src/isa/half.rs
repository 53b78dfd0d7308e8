//! Arithmetic of f16.

use super::float::{fma, max, median, min};
use super::{Cx, Done, Handler, map1, map2, map3};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use half::f16;

/// Source `k` as f32: the half that `op_sel` or SDWA says, with its modifiers.
pub fn source(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[f32; 64], Cause> {
    let high = i.op_sel >> (k - 1) & 1 != 0;
    let a = match i.ops[k] {
        Operand::Const(n) => [u32::from(n.b16); 64],
        _ => c.b32(i, k)?,
    };
    let (absolute, negated, flush) = (i.abs >> k & 1 != 0, i.negated(k), c.w.mode.flush_16);
    Ok(map1(&a, |a| {
        let mut bits = (if high { a >> 16 } else { a }) as u16;
        if absolute {
            bits &= 0x7fff;
        }
        if negated {
            bits ^= 0x8000;
        }
        if flush && bits & 0x7c00 == 0 {
            bits &= 0x8000;
        }
        f16::from_bits(bits).to_f32()
    }))
}

/// Rounds to f16 and writes the half that `op_sel` says; the low one clears the other.
pub fn put(c: &mut Cx<'_>, i: &Inst, value: [f32; 64], sources: usize) -> Done {
    let (clamp, flush) = (i.flags.clamp, c.w.mode.flush_16);
    let bits = map1(&value, |mut x| {
        x *= i.omod;
        if clamp {
            x = if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) };
        }
        let bits = f16::from_f32(x).to_bits();
        u32::from(if flush && bits & 0x7c00 == 0 { bits & 0x8000 } else { bits })
    });
    if i.op_sel >> sources & 1 != 0 {
        let old = c.raw(i, 0)?;
        return c.put(i, 0, &map2(&old, &bits, |o, v| o & 0xffff | v << 16));
    }
    c.put(i, 0, &bits)
}

fn one(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32) -> f32) -> Done {
    let a = source(c, i, 1)?;
    put(c, i, map1(&a, f), 1)
}

fn two(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32) -> f32) -> Done {
    let (a, b) = (source(c, i, 1)?, source(c, i, 2)?);
    put(c, i, map2(&a, &b, f), 2)
}

fn three(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32, f32) -> f32) -> Done {
    let (a, b, d) = (source(c, i, 1)?, source(c, i, 2)?, source(c, i, 3)?);
    put(c, i, map3(&a, &b, &d, f), 3)
}

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_f16" => |c, i| two(c, i, |a, b| a + b),
        "v_sub_f16" => |c, i| two(c, i, |a, b| a - b),
        "v_subrev_f16" => |c, i| two(c, i, |a, b| b - a),
        "v_mul_f16" => |c, i| two(c, i, |a, b| a * b),
        "v_min_f16" => |c, i| two(c, i, min),
        "v_max_f16" => |c, i| two(c, i, max),
        "v_min3_f16" => |c, i| three(c, i, |a, b, d| min(min(a, b), d)),
        "v_max3_f16" => |c, i| three(c, i, |a, b, d| max(max(a, b), d)),
        "v_med3_f16" => |c, i| three(c, i, median),
        "v_fma_f16" | "v_fmaak_f16" | "v_fmamk_f16" => |c, i| three(c, i, round_once),
        "v_mad_f16" | "v_mad_legacy_f16" => |c, i| three(c, i, |a, b, d| f16::from_f32(a * b).to_f32() + d),
        "v_fmac_f16" => |c, i| {
            let (a, b) = (source(c, i, 1)?, source(c, i, 2)?);
            let d = map1(&c.raw(i, 0)?, |d| f16::from_bits(d as u16).to_f32());
            put(c, i, map3(&a, &b, &d, round_once), 2)
        },
        "v_exp_f16" => |c, i| one(c, i, f32::exp2),
        "v_log_f16" => |c, i| one(c, i, f32::log2),
        "v_rcp_f16" => |c, i| one(c, i, f32::recip),
        "v_rsq_f16" => |c, i| one(c, i, |a| a.sqrt().recip()),
        "v_sqrt_f16" => |c, i| one(c, i, f32::sqrt),
        "v_floor_f16" => |c, i| one(c, i, f32::floor),
        "v_ceil_f16" => |c, i| one(c, i, f32::ceil),
        "v_trunc_f16" => |c, i| one(c, i, f32::trunc),
        "v_rndne_f16" => |c, i| one(c, i, f32::round_ties_even),
        "v_fract_f16" => |c, i| one(c, i, |a| a - a.floor()),
        "v_ldexp_f16" => |c, i| {
            let (a, n) = (source(c, i, 1)?, c.b32(i, 2)?);
            put(c, i, map2(&a, &n, |a, n| a * f32::from(n as i16).clamp(-100.0, 100.0).exp2()), 2)
        },
        "v_pack_b32_f16" => |c, i| {
            let bits = |c: &mut Cx<'_>, k| source(c, i, k).map(|a| map1(&a, |a| u32::from(f16::from_f32(a).to_bits())));
            let (low, high) = (bits(c, 1)?, bits(c, 2)?);
            c.put(i, 0, &map2(&low, &high, |l, h| l | h << 16))
        },
        _ => return None,
    })
}

/// A fused sum in f32 bits of which the last is sticky, so that rounding to f16 rounds it once.
pub fn round_once(a: f32, b: f32, d: f32) -> f32 {
    let exact = f64::from(a) * f64::from(b) + f64::from(d);
    let near = fma(a, b, d);
    let odd = near.to_bits() | 1;
    if f64::from(near) == exact || !near.is_finite() { near } else { f32::from_bits(odd) }
}
