//! Arithmetic of f32 and f64.

use super::{Cx, Done, Handler, ballot, flush, map1, map2, map3};
use crate::decode::{Inst, Operand, VCC};

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    sums(name)
        .or_else(|| fused(name))
        .or_else(|| transcendental(name))
        .or_else(|| division(name))
        .or_else(|| double(name))
}

fn one(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32) -> f32) -> Done {
    let a = c.f32(i, 1)?;
    c.put_f32(i, 0, map1(&a, f))
}

fn two(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32) -> f32) -> Done {
    let (a, b) = (c.f32(i, 1)?, c.f32(i, 2)?);
    c.put_f32(i, 0, map2(&a, &b, f))
}

fn three(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f32, f32, f32) -> f32) -> Done {
    let (a, b, d) = (c.f32(i, 1)?, c.f32(i, 2)?, c.f32(i, 3)?);
    c.put_f32(i, 0, map3(&a, &b, &d, f))
}

/// The other one if one is NaN; of zeros, the negative one is less.
pub fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

/// As [`min`].
pub fn max(a: f32, b: f32) -> f32 {
    -min(-a, -b)
}

/// The middle one; the least if one is NaN.
pub fn median(a: f32, b: f32, c: f32) -> f32 {
    if a.is_nan() || b.is_nan() || c.is_nan() { min(min(a, b), c) } else { max(min(a, b), min(max(a, b), c)) }
}

/// NaN if one is.
fn minimum(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { min(a, b) }
}

fn maximum(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { max(a, b) }
}

/// 0 times anything is 0.
fn legacy(a: f32, b: f32) -> f32 {
    if a == 0.0 || b == 0.0 { 0.0 } else { a * b }
}

fn sums(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_f32" => |c, i| two(c, i, |a, b| a + b),
        "v_sub_f32" => |c, i| two(c, i, |a, b| a - b),
        "v_subrev_f32" => |c, i| two(c, i, |a, b| b - a),
        "v_mul_f32" => |c, i| two(c, i, |a, b| a * b),
        "v_mul_legacy_f32" => |c, i| two(c, i, legacy),
        "v_min_f32" => |c, i| two(c, i, min),
        "v_max_f32" => |c, i| two(c, i, max),
        "v_min3_f32" => |c, i| three(c, i, |a, b, d| min(min(a, b), d)),
        "v_max3_f32" => |c, i| three(c, i, |a, b, d| max(max(a, b), d)),
        "v_med3_f32" => |c, i| three(c, i, median),
        "v_minimum3_f32" => |c, i| three(c, i, |a, b, d| minimum(minimum(a, b), d)),
        "v_maximum3_f32" => |c, i| three(c, i, |a, b, d| maximum(maximum(a, b), d)),
        _ => return None,
    })
}

/// Rust's `mul_add` is slow where the machine has no instruction for it; in f64 the product is exact, and a sum that f64 has to round
/// is rounded to odd, so that rounding it again to f32 gives what rounding once would.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    if !sum.is_finite() {
        return sum as f32;
    }
    // What the rounding of the sum has lost.
    let part = sum - product;
    let lost = (product - (sum - part)) + (c - part);
    let bits = sum.to_bits();
    let odd = if lost == 0.0 || bits & 1 != 0 {
        bits
    } else if (lost > 0.0) == (sum > 0.0) {
        bits + 1
    } else {
        bits - 1
    };
    f64::from_bits(odd) as f32
}

/// `a · b + d` with the destination as `d`.
fn fmac(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (a, b, d) = (c.f32(i, 1)?, c.f32(i, 2)?, old(c, i)?);
    c.put_f32(i, 0, map3(&a, &b, &d, fma))
}

fn old(c: &mut Cx<'_>, i: &Inst) -> Result<[f32; 64], crate::fault::Cause> {
    let d = map1(&c.raw(i, 0)?, f32::from_bits);
    Ok(if c.w.mode.flush_in { map1(&d, flush) } else { d })
}

fn fused(name: &str) -> Option<Handler> {
    Some(match name {
        "v_fma_f32" => |c, i| three(c, i, fma),
        "v_fmac_f32" => fmac,
        "v_fmaak_f32" | "v_fmamk_f32" => |c, i| three(c, i, fma),
        "v_mad_f32" => |c, i| three(c, i, |a, b, d| a * b + d),
        "v_mac_f32" => |c, i| {
            let (a, b, d) = (c.f32(i, 1)?, c.f32(i, 2)?, old(c, i)?);
            c.put_f32(i, 0, map3(&a, &b, &d, |a, b, d| a * b + d))
        },
        _ => return None,
    })
}

/// Of one f32, denormals being zero before and after whatever the mode; right to less than one unit, as hardware is to about one.
fn approximate(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f64) -> f64) -> Done {
    one(c, i, |a| flush(f(f64::from(flush(a))) as f32))
}

fn transcendental(name: &str) -> Option<Handler> {
    Some(match name {
        "v_exp_f32" => |c, i| approximate(c, i, f64::exp2),
        "v_log_f32" => |c, i| approximate(c, i, f64::log2),
        "v_rcp_f32" | "v_rcp_iflag_f32" => |c, i| approximate(c, i, f64::recip),
        "v_rsq_f32" => |c, i| approximate(c, i, |a| a.sqrt().recip()),
        "v_sqrt_f32" => |c, i| approximate(c, i, f64::sqrt),
        // In turns, as far as hardware takes them.
        "v_sin_f32" => {
            |c, i| approximate(c, i, |a| if a.abs() > 256.0 { 0.0 } else { (a * std::f64::consts::TAU).sin() })
        }
        "v_cos_f32" => {
            |c, i| approximate(c, i, |a| if a.abs() > 256.0 { 1.0 } else { (a * std::f64::consts::TAU).cos() })
        }
        "v_fract_f32" => |c, i| one(c, i, |a| min(a - a.floor(), 1.0 - f32::EPSILON / 2.0)),
        "v_floor_f32" => |c, i| one(c, i, f32::floor),
        "v_ceil_f32" => |c, i| one(c, i, f32::ceil),
        "v_trunc_f32" => |c, i| one(c, i, f32::trunc),
        "v_rndne_f32" => |c, i| one(c, i, f32::round_ties_even),
        "v_ldexp_f32" => |c, i| {
            let (a, n) = (c.f32(i, 1)?, c.raw(i, 2)?);
            c.put_f32(i, 0, map2(&a, &n, |a, n| ldexp(a, n as i32)))
        },
        "v_frexp_mant_f32" => {
            |c, i| one(c, i, |a| if a == 0.0 || !a.is_finite() { a } else { ldexp(a, -frexp_exp(a)) })
        }
        "v_frexp_exp_i32_f32" => |c, i| {
            let a = c.f32(i, 1)?;
            c.put(i, 0, &map1(&a, |a| if a == 0.0 || !a.is_finite() { 0 } else { frexp_exp(a) as u32 }))
        },
        _ => return None,
    })
}

fn ldexp(a: f32, n: i32) -> f32 {
    (f64::from(a) * f64::from(n.clamp(-1000, 1000)).exp2()) as f32
}

/// The exponent with which the mantissa is in 0.5..1.
fn frexp_exp(a: f32) -> i32 {
    (f64::from(a).to_bits() >> 52 & 0x7ff) as i32 - 1022
}

/// The steps of LLVM's exact division: scale, refine with the scale undone, and special cases.
fn division(name: &str) -> Option<Handler> {
    Some(match name {
        "v_div_scale_f32" => div_scale,
        "v_div_fmas_f32" => |c, i| {
            let (a, b, d) = (c.f32(i, 1)?, c.f32(i, 2)?, c.f32(i, 3)?);
            let (vcc, known) = c.w.bits64(Operand::S(VCC))?;
            c.w.known &= known;
            let mut out = map3(&a, &b, &d, fma);
            for l in 0..64 {
                if vcc >> l & 1 != 0 {
                    out[l] = (f64::from(out[l]) * scale_back(d[l])) as f32;
                }
            }
            c.put_f32(i, 0, out)
        },
        "v_div_fixup_f32" => |c, i| three(c, i, fixup),
        _ => return None,
    })
}

/// By the size of the addend: what was scaled up is scaled down.
fn scale_back(addend: f32) -> f64 {
    if exponent(addend) > 127 { 2f64.powi(64) } else { 2f64.powi(-64) }
}

fn exponent(a: f32) -> i32 {
    (a.to_bits() >> 23 & 0xff) as i32
}

/// The quotient's special cases: `q` approximates `numerator / denominator`.
fn fixup(q: f32, denominator: f32, numerator: f32) -> f32 {
    let sign = denominator.is_sign_negative() != numerator.is_sign_negative();
    let signed = |x: f32| if sign { -x } else { x };
    let zeros = denominator == 0.0 && numerator == 0.0;
    let infinities = denominator.is_infinite() && numerator.is_infinite();
    if numerator.is_nan() || denominator.is_nan() || zeros || infinities {
        f32::NAN
    } else if denominator == 0.0 || numerator.is_infinite() {
        signed(f32::INFINITY)
    } else if denominator.is_infinite() || numerator == 0.0 {
        signed(0.0)
    } else if exponent(numerator) - exponent(denominator) < -150 {
        signed(f32::from_bits(1) / 4.0)
    } else if exponent(denominator) == 255 {
        signed(f32::INFINITY)
    } else {
        signed(q.abs())
    }
}

/// Whether a quotient is denormal.
fn small(numerator: f32, denominator: f32) -> bool {
    (f64::from(numerator) / f64::from(denominator)).abs() < f64::from(f32::MIN_POSITIVE)
}

/// Scales numerator (source 3) or denominator (source 2), whichever source 1 is, so that the quotient's refinement neither overflows nor
/// loses bits; the mask says in which lanes the quotient is to be scaled back.
fn div_scale(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (s0, s1, s2) = (c.f32(i, 2)?, c.f32(i, 3)?, c.f32(i, 4)?);
    let (mut out, mut mask) = (s0, 0u64);
    for l in 0..64 {
        let (den, num) = (s1[l], s2[l]);
        let is_den = s0[l].to_bits() == den.to_bits();
        let is_num = s0[l].to_bits() == num.to_bits();
        let up = |x: f32| ldexp(x, 64);
        let mut back = false;
        if num == 0.0 || den == 0.0 {
            out[l] = f32::NAN;
        } else if exponent(num) - exponent(den) >= 96 {
            back = true;
            if is_den {
                out[l] = up(s0[l]);
            }
        } else if exponent(den) == 0 {
            out[l] = up(s0[l]);
        } else if small(1.0, den) && small(num, den) {
            back = true;
            if is_den {
                out[l] = up(s0[l]);
            }
        } else if small(1.0, den) {
            out[l] = ldexp(s0[l], -64);
        } else if small(num, den) {
            back = true;
            if is_num {
                out[l] = up(s0[l]);
            }
        } else if exponent(num) <= 23 {
            out[l] = up(s0[l]);
        }
        mask |= u64::from(back) << l;
    }
    let known = c.w.known;
    c.put_f32(i, 0, out)?;
    c.w.known = known;
    c.put_mask(i, 1, ballot(|l| mask >> l & 1 != 0))
}

fn two64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f64, f64) -> f64) -> Done {
    let (a, b) = (c.f64(i, 1)?, c.f64(i, 2)?);
    c.put_f64(i, 0, map2(&a, &b, f))
}

fn one64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(f64) -> f64) -> Done {
    let a = c.f64(i, 1)?;
    c.put_f64(i, 0, map1(&a, f))
}

fn double(name: &str) -> Option<Handler> {
    Some(match name {
        "v_add_f64" => |c, i| two64(c, i, |a, b| a + b),
        "v_mul_f64" => |c, i| two64(c, i, |a, b| a * b),
        "v_min_f64" => |c, i| two64(c, i, f64::min),
        "v_max_f64" => |c, i| two64(c, i, f64::max),
        "v_fma_f64" => |c, i| {
            let (a, b, d) = (c.f64(i, 1)?, c.f64(i, 2)?, c.f64(i, 3)?);
            c.put_f64(i, 0, map3(&a, &b, &d, f64::mul_add))
        },
        "v_fmac_f64" => |c, i| {
            let (a, b) = (c.f64(i, 1)?, c.f64(i, 2)?);
            let d = map1(&c.b64(i, 0)?, f64::from_bits);
            c.put_f64(i, 0, map3(&a, &b, &d, f64::mul_add))
        },
        "v_rcp_f64" => |c, i| one64(c, i, f64::recip),
        "v_rsq_f64" => |c, i| one64(c, i, |a| a.sqrt().recip()),
        "v_sqrt_f64" => |c, i| one64(c, i, f64::sqrt),
        "v_floor_f64" => |c, i| one64(c, i, f64::floor),
        "v_ceil_f64" => |c, i| one64(c, i, f64::ceil),
        "v_trunc_f64" => |c, i| one64(c, i, f64::trunc),
        "v_rndne_f64" => |c, i| one64(c, i, f64::round_ties_even),
        "v_fract_f64" => |c, i| one64(c, i, |a| a - a.floor()),
        "v_ldexp_f64" => |c, i| {
            let (a, n) = (c.f64(i, 1)?, c.raw(i, 2)?);
            let scale = |a: f64, n: u32| {
                let n = (n as i32).clamp(-2200, 2200);
                a * f64::from(n / 2).exp2() * f64::from(n - n / 2).exp2()
            };
            c.put_f64(i, 0, map2(&a, &n, scale))
        },
        _ => return None,
    })
}
