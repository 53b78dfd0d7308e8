//! Floats of 8, 6 and 4 bits, and conversions of f32 to and from them: FNUZ on gfx942, OCP on gfx950.

use super::{Cx, Done, Handler, map1, map2};
use crate::decode::Inst;
use crate::lanes::Select;
use std::sync::LazyLock;

/// How a small float stores numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    exponent: u32,
    mantissa: u32,
    bias: i32,
    special: Special,
}

/// What is not a finite number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    /// Nothing.
    None,
    /// Zero with a sign is NaN (FNUZ).
    MinusZero,
    /// All ones is NaN (e4m3fn).
    AllOnes,
    /// As IEEE 754 has infinities and NaNs (e5m2).
    Ieee,
}

/// e4m3 of OCP.
pub const E4M3: Format = Format { exponent: 4, mantissa: 3, bias: 7, special: Special::AllOnes };
/// e4m3 of gfx942.
pub const E4M3_FNUZ: Format = Format { exponent: 4, mantissa: 3, bias: 8, special: Special::MinusZero };
/// e5m2 of OCP.
pub const E5M2: Format = Format { exponent: 5, mantissa: 2, bias: 15, special: Special::Ieee };
/// e5m2 of gfx942.
pub const E5M2_FNUZ: Format = Format { exponent: 5, mantissa: 2, bias: 16, special: Special::MinusZero };
/// e2m3 of OCP.
pub const E2M3: Format = Format { exponent: 2, mantissa: 3, bias: 1, special: Special::None };
/// e3m2 of OCP.
pub const E3M2: Format = Format { exponent: 3, mantissa: 2, bias: 3, special: Special::None };
/// e2m1 of OCP.
pub const E2M1: Format = Format { exponent: 2, mantissa: 1, bias: 1, special: Special::None };

impl Format {
    /// fp8 of a chip: e4m3, or e5m2 if `wide`.
    pub fn of(ocp: bool, wide: bool) -> Format {
        match (ocp, wide) {
            (true, false) => E4M3,
            (true, true) => E5M2,
            (false, false) => E4M3_FNUZ,
            (false, true) => E5M2_FNUZ,
        }
    }

    /// Bits of a number.
    pub fn bits(self) -> u32 {
        1 + self.exponent + self.mantissa
    }

    /// What bits mean.
    pub fn decode(self, bits: u8) -> f32 {
        let bits = u32::from(bits) & ((1 << self.bits()) - 1);
        let sign = bits >> (self.bits() - 1);
        let magnitude = bits & ((1 << (self.bits() - 1)) - 1);
        let (e, m) = ((magnitude >> self.mantissa) as i32, magnitude & ((1 << self.mantissa) - 1));
        let top = (1 << self.exponent) - 1;
        match self.special {
            Special::MinusZero if sign == 1 && magnitude == 0 => return f32::NAN,
            Special::AllOnes if magnitude == (1 << (self.bits() - 1)) - 1 => return f32::NAN,
            Special::Ieee if e == top && m != 0 => return f32::NAN,
            Special::Ieee if e == top => return if sign == 1 { f32::NEG_INFINITY } else { f32::INFINITY },
            _ => {}
        }
        let hidden = if e > 0 { 1 << self.mantissa } else { 0 };
        let value = (hidden + m) as f32 * ((e.max(1) - self.bias - self.mantissa as i32) as f32).exp2();
        if sign == 1 { -value } else { value }
    }

    /// The bits of the largest number.
    fn largest(self) -> u32 {
        let all = (1 << (self.bits() - 1)) - 1;
        match self.special {
            Special::AllOnes => all - 1,
            Special::Ieee => (((1 << self.exponent) - 1) << self.mantissa) - 1,
            _ => all,
        }
    }

    /// The bits nearest to a number, ties to even. What is too large is NaN (an infinity where there is one), or the largest number if
    /// `saturate`.
    pub fn encode(self, x: f32, saturate: bool) -> u8 {
        let sign = u32::from(x.is_sign_negative()) << (self.bits() - 1);
        let nan = match self.special {
            Special::MinusZero => 1 << (self.bits() - 1),
            _ => sign | ((1 << (self.bits() - 1)) - 1),
        };
        let infinity = if self.special == Special::Ieee { sign | self.largest() + 1 } else { nan };
        if x.is_nan() {
            return nan as u8;
        }
        let a = f64::from(x.abs());
        let e = if a == 0.0 { i32::MIN } else { (a.to_bits() >> 52) as i32 - 1023 };
        let e = e.max(1 - self.bias);
        let steps = if a.is_finite() {
            (a * f64::from(self.mantissa as i32 - e).exp2()).round_ties_even()
        } else {
            f64::INFINITY
        };
        // A denormal has exponent field 0; its steps count from there too.
        let magnitude = f64::from(e + self.bias - 1) * f64::from(1 << self.mantissa) + steps;
        let largest = f64::from(self.largest());
        let bits = match magnitude {
            m if m <= largest => sign | m as u32,
            _ if saturate || self.special == Special::None => sign | self.largest(),
            _ => infinity,
        };
        // There is no zero with a sign.
        if self.special == Special::MinusZero && magnitude == 0.0 { 0 } else { bits as u8 }
    }
}

/// What every byte means, by [`index`].
static TABLES: LazyLock<Vec<[f32; 256]>> = LazyLock::new(|| {
    let all = [E4M3_FNUZ, E5M2_FNUZ, E4M3, E5M2];
    all.iter().map(|f| std::array::from_fn(|b| f.decode(b as u8))).collect()
});

/// What every byte means in fp8 of a chip.
pub fn table(ocp: bool, wide: bool) -> &'static [f32; 256] {
    &TABLES[2 * usize::from(ocp) + usize::from(wide)]
}

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_f32_fp8" => |c, i| widen(c, i, false),
        "v_cvt_f32_bf8" => |c, i| widen(c, i, true),
        "v_cvt_pk_f32_fp8" => |c, i| widen_pair(c, i, false),
        "v_cvt_pk_f32_bf8" => |c, i| widen_pair(c, i, true),
        "v_cvt_pk_fp8_f32" => |c, i| narrow(c, i, false),
        "v_cvt_pk_bf8_f32" => |c, i| narrow(c, i, true),
        _ => return scaled(name),
    })
}

/// One byte, which SDWA selects.
fn widen(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let t = table(c.env.chip.ocp, wide);
    let a = c.b32(i, 1)?;
    let k = 8 * u32::from(i.op_sel & 3);
    c.put_f32(i, 0, map1(&a, |a| t[(a >> k & 0xff) as usize]))
}

/// Two bytes: of the low half, or of the high one if SDWA or `op_sel` says so.
fn widen_pair(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let t = table(c.env.chip.ocp, wide);
    let high = i.op_sel & 1 != 0 || i.sdwa.as_ref().is_some_and(|s| s.src[0] == Select::Word(1));
    let a = map1(&c.raw(i, 1)?, |a| if high { a >> 16 } else { a });
    let word = |k: u32| map1(&a, |a| u64::from(t[(a >> (8 * k) & 0xff) as usize].to_bits()));
    c.put64(i, 0, &map2(&word(0), &word(1), |l, h| l | h << 32))
}

/// Two bytes of two f32, to the half that `op_sel` says; the other stays.
fn narrow(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let (format, saturate) = (Format::of(c.env.chip.ocp, wide), c.w.mode.saturate);
    let (a, b) = (c.f32(i, 1)?, c.f32(i, 2)?);
    let pairs = map2(&a, &b, |a, b| u32::from(format.encode(a, saturate)) | u32::from(format.encode(b, saturate)) << 8);
    put_pair(c, i, &pairs, i.op_sel >> 2 & 1 != 0)
}

/// Writes 16 bits of a register. What the other half was need not have been written: two such instructions make one register.
fn put_pair(c: &mut Cx<'_>, i: &Inst, pairs: &[u32; 64], high: bool) -> Done {
    let known = c.w.known;
    let old = c.raw(i, 0)?;
    c.w.known = known;
    c.put(i, 0, &map2(&old, pairs, |o, p| if high { o & 0xffff | p << 16 } else { o & 0xffff_0000 | p }))
}

/// Conversions with a scale (gfx950): the scale is the exponent of an f32.
fn scaled(name: &str) -> Option<Handler> {
    Some(match name {
        "v_cvt_scalef32_pk_f32_fp8" => |c, i| scaled_widen(c, i, false),
        "v_cvt_scalef32_pk_f32_bf8" => |c, i| scaled_widen(c, i, true),
        "v_cvt_scalef32_pk_bf16_fp8" => |c, i| scaled_half(c, i, false, |x| half::bf16::from_f32(x).to_bits()),
        "v_cvt_scalef32_pk_bf16_bf8" => |c, i| scaled_half(c, i, true, |x| half::bf16::from_f32(x).to_bits()),
        "v_cvt_scalef32_pk_f16_fp8" => |c, i| scaled_half(c, i, false, |x| half::f16::from_f32(x).to_bits()),
        "v_cvt_scalef32_pk_f16_bf8" => |c, i| scaled_half(c, i, true, |x| half::f16::from_f32(x).to_bits()),
        "v_cvt_scalef32_pk_fp8_f32" => |c, i| scaled_narrow(c, i, false),
        "v_cvt_scalef32_pk_bf8_f32" => |c, i| scaled_narrow(c, i, true),
        "v_cvt_scalef32_pk_fp8_bf16" => |c, i| scaled_from_half(c, i, false, bf16_to_f32),
        "v_cvt_scalef32_pk_bf8_bf16" => |c, i| scaled_from_half(c, i, true, bf16_to_f32),
        "v_cvt_scalef32_pk_fp8_f16" => |c, i| scaled_from_half(c, i, false, |b| half::f16::from_bits(b).to_f32()),
        "v_cvt_scalef32_pk_bf8_f16" => |c, i| scaled_from_half(c, i, true, |b| half::f16::from_bits(b).to_f32()),
        "v_cvt_scalef32_f32_fp8" => |c, i| scaled_one(c, i, false),
        "v_cvt_scalef32_f32_bf8" => |c, i| scaled_one(c, i, true),
        _ => return None,
    })
}

fn bf16_to_f32(bits: u16) -> f32 {
    half::bf16::from_bits(bits).to_f32()
}

/// The power of two that an f32 is cut to.
fn scale_of(x: f32) -> f32 {
    f32::from_bits(x.to_bits() & 0x7f80_0000)
}

fn scaled_pair(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Result<[(f32, f32); 64], crate::fault::Cause> {
    let t = table(c.env.chip.ocp, wide);
    let high = 16 * u32::from(i.op_sel & 1);
    let (a, s) = (c.raw(i, 1)?, c.f32(i, 2)?);
    Ok(map2(&a, &s, |a, s| {
        let value = |k: u32| t[(a >> (high + 8 * k) & 0xff) as usize] * scale_of(s);
        (value(0), value(1))
    }))
}

fn scaled_one(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let t = table(c.env.chip.ocp, wide);
    let k = 8 * u32::from(i.op_sel & 3);
    let (a, s) = (c.raw(i, 1)?, c.f32(i, 2)?);
    c.put_f32(i, 0, map2(&a, &s, |a, s| t[(a >> k & 0xff) as usize] * scale_of(s)))
}

fn scaled_widen(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let pairs = scaled_pair(c, i, wide)?;
    c.put64(i, 0, &map1(&pairs, |(l, h)| u64::from(l.to_bits()) | u64::from(h.to_bits()) << 32))
}

fn scaled_half(c: &mut Cx<'_>, i: &Inst, wide: bool, f: impl Fn(f32) -> u16) -> Done {
    let pairs = scaled_pair(c, i, wide)?;
    c.put(i, 0, &map1(&pairs, |(l, h)| u32::from(f(l)) | u32::from(f(h)) << 16))
}

fn scaled_narrow(c: &mut Cx<'_>, i: &Inst, wide: bool) -> Done {
    let (format, saturate) = (Format::of(c.env.chip.ocp, wide), c.w.mode.saturate);
    let (a, b, s) = (c.f32(i, 1)?, c.f32(i, 2)?, c.f32(i, 3)?);
    let code = |x: f32, s: f32| u32::from(format.encode(x / scale_of(s), saturate));
    let pairs = super::map3(&a, &b, &s, |a, b, s| code(a, s) | code(b, s) << 8);
    put_pair(c, i, &pairs, i.op_sel >> 3 & 1 != 0)
}

fn scaled_from_half(c: &mut Cx<'_>, i: &Inst, wide: bool, f: impl Fn(u16) -> f32) -> Done {
    let (format, saturate) = (Format::of(c.env.chip.ocp, wide), c.w.mode.saturate);
    let (a, s) = (c.raw(i, 1)?, c.f32(i, 2)?);
    let code = |x: f32, s: f32| u32::from(format.encode(x / scale_of(s), saturate));
    let pairs = map2(&a, &s, |a, s| code(f(a as u16), s) | code(f((a >> 16) as u16), s) << 8);
    put_pair(c, i, &pairs, i.op_sel >> 2 & 1 != 0)
}
