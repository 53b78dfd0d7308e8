//! Element types and the exact conversions between them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The type of one element in memory or in a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of an [`DType::F32`].
    Bf16,
    /// IEEE binary16.
    F16,
    /// OCP `e4m3fn`: bias 7, no infinity, `0x7f`/`0xff` are NaN, largest finite 448.
    E4m3,
    /// Two's complement 32-bit integer: indices, positions, ids.
    I32,
    /// A truth value. Lives in tiles only, never in memory.
    Bool,
}

impl DType {
    /// Every element type, for tests and parsers.
    pub const ALL: [DType; 6] = [DType::F32, DType::Bf16, DType::F16, DType::E4m3, DType::I32, DType::Bool];

    /// Bytes of one element in memory ([`DType::Bool`] counts as one; it is never stored).
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::E4m3 | DType::Bool => 1,
        }
    }

    /// Whether values are real numbers (as opposed to integers and truth values).
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::Bf16 | DType::F16 | DType::E4m3)
    }

    /// The lower-case name used by every text form.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::E4m3 => "e4m3",
            DType::I32 => "i32",
            DType::Bool => "bool",
        }
    }

    /// The type of that [`name`](DType::name).
    pub fn from_name(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.name() == name)
    }

    /// `x` as this type holds it: rounded to nearest even; e4m3 saturates at ±448. Integers truncate.
    pub fn round(self, x: f32) -> f32 {
        match self {
            DType::F32 => x,
            DType::Bf16 => half::bf16::from_f32(x).to_f32(),
            DType::F16 => half::f16::from_f32(x).to_f32(),
            DType::E4m3 => e4m3_to_f32(f32_to_e4m3(x)),
            DType::I32 => x as i32 as f32,
            DType::Bool => f32::from(x != 0.0),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Largest finite e4m3 value.
pub const E4M3_MAX: f32 = 448.0;

/// Encodes to e4m3fn: round to nearest, ties to even, saturating at ±448; NaN gives `0x7f` with its sign.
pub fn f32_to_e4m3(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    if x.is_nan() {
        return sign | 0x7f;
    }
    let a = x.abs().min(E4M3_MAX);
    if a < 0.015_625 {
        // Below 2^-6 the codes are subnormal: multiples of 2^-9. Adding 2^14 (whose ulp is 2^-9) rounds to them.
        return sign | ((a + 16384.0).to_bits() - 16384.0f32.to_bits()) as u8;
    }
    let bits = a.to_bits();
    let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
    sign | (rounded - (120 << 3)) as u8
}

/// Decodes e4m3fn.
pub fn e4m3_to_f32(code: u8) -> f32 {
    let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
    let (exponent, mantissa) = ((code >> 3) & 15, f32::from(code & 7));
    sign * match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    }
}

/// The smallest power of two that is at least `x`, for positive normal `x` (facts: activation scales, `ue8m0`).
pub fn pow2_ceil(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 0x7f_ffff) & 0x7f80_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_vectors_of_the_specification() {
        for (x, code) in [
            (1.0, 0x38),
            (0.3, 0x2a),
            (-2.7, 0xc3),
            (17.0, 0x58),
            (1.0625, 0x38),
            (216.0, 0x76),
            (232.0, 0x76),
            (248.0, 0x78),
            (2f32.powi(-9), 0x01),
            (2f32.powi(-10), 0x00),
            (1.5 * 2f32.powi(-10), 0x01),
            (448.0, 0x7e),
            (1e9, 0x7e),
            (-1e9, 0xfe),
        ] {
            assert_eq!(f32_to_e4m3(x), code, "{x}");
        }
        for code in 0..=255u8 {
            let x = e4m3_to_f32(code);
            assert!(x.is_nan() || f32_to_e4m3(x) == code, "{code:#x}");
        }
    }

    #[test]
    fn power_of_two_scales() {
        let scale = |amax: f32| pow2_ceil(amax.max(1e-4) * (1.0 / 448.0f32));
        for (amax, exponent) in [(0.0, -22), (0.4375, -10), (1.0, -8), (3.5, -7), (448.0, 0), (449.0, 1), (28672.0, 6)]
        {
            assert_eq!(scale(amax), 2f32.powi(exponent), "{amax}");
        }
    }
}
