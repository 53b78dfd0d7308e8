//! Comparisons of lanes.

use super::half::source as half_source;
use super::{Cx, Done, Handler, ballot};
use crate::decode::{EXEC, Inst, Operand};

/// Whether it writes EXEC too.
const TO_EXEC: u8 = 32;

const FLOATS: [&str; 16] =
    ["f", "lt", "eq", "le", "gt", "lg", "ge", "o", "u", "nge", "nlg", "ngt", "nle", "neq", "nlt", "tru"];
const INTEGERS: [&str; 8] = ["f", "lt", "eq", "le", "gt", "ne", "ge", "t"];

/// The function of a mnemonic, and which comparison.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let rest = name.strip_prefix("v_cmp")?;
    let (exec, rest) = rest.strip_prefix('x').map_or((0, rest), |r| (TO_EXEC, r));
    let (op, kind) = rest.strip_prefix('_')?.split_once('_')?;
    if op == "class" {
        let handler: Handler = match kind {
            "f32" => |c, i| {
                let a = c.f32(i, 1)?;
                class(c, i, |l| classify(f64::from(a[l]), a[l].is_subnormal(), a[l].to_bits() & 0x40_0000 != 0))
            },
            "f16" => |c, i| {
                let a = half_source(c, i, 1)?;
                class(c, i, |l| classify(f64::from(a[l]), a[l] != 0.0 && a[l].abs() < 6.103_515_6e-5, true))
            },
            "f64" => |c, i| {
                let a = c.f64(i, 1)?;
                class(c, i, |l| classify(a[l], a[l].is_subnormal(), a[l].to_bits() >> 51 & 1 != 0))
            },
            _ => return None,
        };
        return Some((handler, exec));
    }
    let names: &[&str] = if kind.starts_with('f') { &FLOATS } else { &INTEGERS };
    let op = names.iter().position(|n| *n == op)? as u8 | exec;
    let handler: Handler = match kind {
        "f32" => |c, i| {
            let (a, b) = (c.f32(i, 1)?, c.f32(i, 2)?);
            floats(c, i, &a, &b)
        },
        "f16" => |c, i| {
            let (a, b) = (half_source(c, i, 1)?, half_source(c, i, 2)?);
            floats(c, i, &a, &b)
        },
        "f64" => |c, i| {
            let (a, b) = (c.f64(i, 1)?, c.f64(i, 2)?);
            floats(c, i, &a, &b)
        },
        "u32" => |c, i| {
            let (a, b) = (c.b32(i, 1)?, c.b32(i, 2)?);
            integers(c, i, &a, &b)
        },
        "i32" => |c, i| words(c, i, |a| a as i32),
        "u16" => |c, i| words(c, i, |a| a as u16),
        "i16" => |c, i| words(c, i, |a| a as i16),
        "u64" => |c, i| {
            let (a, b) = (c.b64(i, 1)?, c.b64(i, 2)?);
            integers(c, i, &a, &b)
        },
        "i64" => |c, i| {
            let (a, b) = (c.b64(i, 1)?, c.b64(i, 2)?);
            integers(c, i, &a.map(|a| a as i64), &b.map(|b| b as i64))
        },
        _ => return None,
    };
    Some((handler, op))
}

fn words<T: PartialOrd + Copy>(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32) -> T + Copy) -> Done {
    let (a, b) = (c.b32(i, 1)?, c.b32(i, 2)?);
    integers(c, i, &a.map(f), &b.map(f))
}

fn put(c: &mut Cx<'_>, i: &Inst, bits: u64) -> Done {
    if i.sub & TO_EXEC != 0 {
        let bits = bits & c.w.exec();
        let known = c.w.known | !c.w.exec();
        c.put_mask(i, 0, bits)?;
        return c.w.set_bits64(EXEC, bits, known);
    }
    c.put_mask(i, 0, bits)
}

fn floats<T: PartialOrd + Copy>(c: &mut Cx<'_>, i: &Inst, a: &[T; 64], b: &[T; 64]) -> Done {
    #[allow(clippy::neg_cmp_op_on_partial_ord, clippy::double_comparisons, reason = "numbers may be unordered")]
    let bits = match i.sub & 15 {
        0 => 0,
        1 => ballot(|l| a[l] < b[l]),
        2 => ballot(|l| a[l] == b[l]),
        3 => ballot(|l| a[l] <= b[l]),
        4 => ballot(|l| a[l] > b[l]),
        5 => ballot(|l| a[l] < b[l] || a[l] > b[l]),
        6 => ballot(|l| a[l] >= b[l]),
        7 => ballot(|l| a[l].partial_cmp(&b[l]).is_some()),
        8 => ballot(|l| a[l].partial_cmp(&b[l]).is_none()),
        9 => ballot(|l| !(a[l] >= b[l])),
        10 => ballot(|l| !(a[l] < b[l] || a[l] > b[l])),
        11 => ballot(|l| !(a[l] > b[l])),
        12 => ballot(|l| !(a[l] <= b[l])),
        13 => ballot(|l| a[l] != b[l]),
        14 => ballot(|l| !(a[l] < b[l])),
        _ => !0,
    };
    put(c, i, bits)
}

fn integers<T: PartialOrd + Copy>(c: &mut Cx<'_>, i: &Inst, a: &[T; 64], b: &[T; 64]) -> Done {
    let bits = match i.sub & 7 {
        0 => 0,
        1 => ballot(|l| a[l] < b[l]),
        2 => ballot(|l| a[l] == b[l]),
        3 => ballot(|l| a[l] <= b[l]),
        4 => ballot(|l| a[l] > b[l]),
        5 => ballot(|l| a[l] != b[l]),
        6 => ballot(|l| a[l] >= b[l]),
        _ => !0,
    };
    put(c, i, bits)
}

/// The bit of a number's class: signaling NaN, NaN, −∞, −normal, −denormal, −0, 0, denormal, normal, ∞.
fn classify(a: f64, subnormal: bool, quiet: bool) -> u32 {
    let positive = match () {
        () if a.is_nan() => return if quiet { 1 << 1 } else { 1 },
        () if a.is_infinite() => 0,
        () if a == 0.0 => 3,
        () if subnormal => 2,
        () => 1,
    };
    if a.is_sign_negative() { 1 << (2 + positive) } else { 1 << (9 - positive) }
}

fn class(c: &mut Cx<'_>, i: &Inst, f: impl Fn(usize) -> u32) -> Done {
    let mask = match i.ops[2] {
        Operand::Const(n) => [n.b32; 64],
        _ => c.b32(i, 2)?,
    };
    put(c, i, ballot(|l| f(l) & mask[l] != 0))
}
