//! Instructions of one thread that touch no memory.

use half::{bf16, f16};

/// Operands, bits of an operand, bits of the result; none where the hardware says nothing of the result. Bits above the result's are
/// dropped by the caller; operands have none above theirs.
pub type Scalar = fn([u64; 3], u32, u32) -> Option<u64>;

/// Sign-extended.
pub fn signed(v: u64, bits: u32) -> i64 {
    (v << (64 - bits)) as i64 >> (64 - bits)
}

/// The lowest bits.
pub fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

fn float(v: u64) -> f32 {
    f32::from_bits(v as u32)
}

fn real(x: f32) -> Option<u64> {
    Some(x.to_bits().into())
}

fn half(x: f32, is_bf16: bool) -> u64 {
    if is_bf16 { bf16::from_f32(x).to_bits().into() } else { f16::from_f32(x).to_bits().into() }
}

/// An operation of the llvm dialect, by its name.
pub fn operation(name: &str) -> Option<Scalar> {
    Some(match name {
        "add" => |[a, b, _], _, _| Some(a.wrapping_add(b)),
        "sub" => |[a, b, _], _, _| Some(a.wrapping_sub(b)),
        "mul" => |[a, b, _], _, _| Some(a.wrapping_mul(b)),
        "shl" => |[a, b, _], bits, _| (b < bits.into()).then(|| a << b),
        "lshr" => |[a, b, _], bits, _| (b < bits.into()).then(|| a >> b),
        "ashr" => |[a, b, _], bits, _| (b < bits.into()).then(|| (signed(a, bits) >> b) as u64),
        "and" => |[a, b, _], _, _| Some(a & b),
        "or" => |[a, b, _], _, _| Some(a | b),
        "xor" => |[a, b, _], _, _| Some(a ^ b),
        "udiv" => |[a, b, _], _, _| a.checked_div(b),
        "urem" => |[a, b, _], _, _| a.checked_rem(b),
        "sdiv" => |[a, b, _], bits, _| signed(a, bits).checked_div(signed(b, bits)).map(|v| v as u64),
        "srem" => |[a, b, _], bits, _| signed(a, bits).checked_rem(signed(b, bits)).map(|v| v as u64),
        "fadd" => |[a, b, _], _, _| real(float(a) + float(b)),
        "fsub" => |[a, b, _], _, _| real(float(a) - float(b)),
        "fmul" => |[a, b, _], _, _| real(float(a) * float(b)),
        "fdiv" => |[a, b, _], _, _| real(float(a) / float(b)),
        "fneg" => |[a, ..], _, _| real(-float(a)),
        "select" => |[c, a, b], _, _| Some(if c & 1 == 1 { a } else { b }),
        "sext" => |[a, ..], bits, _| Some(signed(a, bits) as u64),
        "sitofp" => |[a, ..], bits, _| real(signed(a, bits) as f32),
        "zext" | "trunc" | "bitcast" | "ptrtoint" | "inttoptr" => |[a, ..], _, _| Some(a),
        // The index is of the width given, and signed.
        "getelementptr" => |[a, b, _], bits, _| Some(a.wrapping_add(signed(b, bits) as u64)),
        _ => return None,
    })
}

/// `icmp` and `fcmp`, by their predicate.
pub fn comparison(how: &str) -> Option<Scalar> {
    Some(match how {
        "eq" => |[a, b, _], _, _| Some((a == b).into()),
        "ne" => |[a, b, _], _, _| Some((a != b).into()),
        "slt" => |[a, b, _], n, _| Some((signed(a, n) < signed(b, n)).into()),
        "sle" => |[a, b, _], n, _| Some((signed(a, n) <= signed(b, n)).into()),
        "sgt" => |[a, b, _], n, _| Some((signed(a, n) > signed(b, n)).into()),
        "sge" => |[a, b, _], n, _| Some((signed(a, n) >= signed(b, n)).into()),
        "ult" => |[a, b, _], _, _| Some((a < b).into()),
        "ule" => |[a, b, _], _, _| Some((a <= b).into()),
        "ugt" => |[a, b, _], _, _| Some((a > b).into()),
        "uge" => |[a, b, _], _, _| Some((a >= b).into()),
        "olt" => |[a, b, _], _, _| Some((float(a) < float(b)).into()),
        "ole" => |[a, b, _], _, _| Some((float(a) <= float(b)).into()),
        "oeq" => |[a, b, _], _, _| Some((float(a) == float(b)).into()),
        "ogt" => |[a, b, _], _, _| Some((float(a) > float(b)).into()),
        "oge" => |[a, b, _], _, _| Some((float(a) >= float(b)).into()),
        "une" => |[a, b, _], _, _| Some((float(a) != float(b)).into()),
        _ => return None,
    })
}

/// An intrinsic of the llvm dialect on 32 bits, by its name.
pub fn intrinsic(name: &str) -> Option<Scalar> {
    Some(match name {
        "ctpop" => |[a, ..], _, _| Some(a.count_ones().into()),
        "ctlz" => |[a, ..], _, _| Some((a as u32).leading_zeros().into()),
        "umin" => |[a, b, _], _, _| Some(a.min(b)),
        "umax" => |[a, b, _], _, _| Some(a.max(b)),
        "smin" => |[a, b, _], n, _| Some(signed(a, n).min(signed(b, n)) as u64),
        "smax" => |[a, b, _], n, _| Some(signed(a, n).max(signed(b, n)) as u64),
        "minimum" => |[a, b, _], _, _| extreme(a, b, float(a) < float(b)),
        "maximum" => |[a, b, _], _, _| extreme(a, b, float(a) > float(b)),
        "fma" => |[a, b, c], _, _| real(float(a).mul_add(float(b), float(c))),
        "sqrt" => |[a, ..], _, _| real(float(a).sqrt()),
        "fabs" => |[a, ..], _, _| real(float(a).abs()),
        _ => return None,
    })
}

/// The first if it wins, the second if not; NaN if either is.
fn extreme(a: u64, b: u64, first: bool) -> Option<u64> {
    if float(a).is_nan() || float(b).is_nan() {
        return real(f32::NAN);
    }
    Some(if first { a } else { b })
}

/// A PTX instruction of registers, by its full name. Of two sources that are packed the first is the high half.
pub fn ptx(name: &str) -> Option<Scalar> {
    Some(match name {
        "popc.b32" => |[a, ..], _, _| Some(a.count_ones().into()),
        "clz.b32" => |[a, ..], _, _| Some((a as u32).leading_zeros().into()),
        "max.f32" => |[a, b, _], _, _| real(float(a).max(float(b))),
        "ex2.approx.ftz.f32" => |[a, ..], _, _| real(float(a).exp2()),
        "cvt.rn.bf16.f32" => |[a, ..], _, _| Some(half(float(a), true)),
        "cvt.rn.f16.f32" => |[a, ..], _, _| Some(half(float(a), false)),
        "cvt.rn.bf16x2.f32" => |[a, b, _], _, _| Some(half(float(a), true) << 16 | half(float(b), true)),
        "cvt.rn.f16x2.f32" => |[a, b, _], _, _| Some(half(float(a), false) << 16 | half(float(b), false)),
        "cvt.rn.satfinite.e4m3x2.f32" => {
            |[a, b, _], _, _| Some(u64::from(e4m3(float(a))) << 8 | u64::from(e4m3(float(b))))
        }
        "cvt.rn.f16x2.e4m3x2" => |[a, ..], _, _| {
            let one = |code: u64| half(dsc_ir::dtype::e4m3_to_f32(code as u8), false);
            Some(one(a >> 8) << 16 | one(a))
        },
        "cvt.f32.f16" => |[a, ..], _, _| real(f16::from_bits(a as u16).to_f32()),
        // Towards zero, saturating; NaN is 0: what `as` does.
        "cvt.rzi.s32.f32" => |[a, ..], _, _| Some((float(a) as i32) as u32 as u64),
        "setp.ge.f32" => |[a, b, _], _, _| Some((float(a) >= float(b)).into()),
        "add.s32" => |[a, b, _], _, _| Some((a as u32).wrapping_add(b as u32).into()),
        "setp.ne.b32" => |[a, b, _], _, _| Some((a != b).into()),
        _ => return None,
    })
}

/// NaN loses its sign.
fn e4m3(x: f32) -> u8 {
    if x.is_nan() { 0x7f } else { dsc_ir::dtype::f32_to_e4m3(x) }
}

/// Half of a packed word.
pub fn half_of(high: bool) -> Scalar {
    if high { |[a, ..], _, _| Some(a >> 16) } else { |[a, ..], _, _| Some(a) }
}

/// A copy.
pub fn copy() -> Scalar {
    |[a, ..], _, _| Some(a)
}
