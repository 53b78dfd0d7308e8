//! Scalar arithmetic.

use super::{Cx, Done, Handler};
use crate::decode::{EXEC, Inst, Operand};
use crate::fault::Cause;

fn put(c: &mut Cx<'_>, i: &Inst, value: u32) -> Done {
    match i.ops[0] {
        Operand::S(n) => c.w.set_s(n, value),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

fn put64(c: &mut Cx<'_>, i: &Inst, value: u64) -> Done {
    match i.ops[0] {
        Operand::S(n) => c.w.set_s64(n, value),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// One source; SCC stays.
fn un(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32) -> u32) -> Done {
    let a = c.w.scalar32(i.ops[1])?;
    put(c, i, f(a))
}

/// One source; SCC says whether the result is not 0.
fn un_scc(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32) -> u32) -> Done {
    let a = f(c.w.scalar32(i.ops[1])?);
    c.w.set_scc(a != 0);
    put(c, i, a)
}

fn un64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64) -> u64) -> Done {
    let a = c.w.scalar64(i.ops[1])?;
    put64(c, i, f(a))
}

fn un64_scc(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64) -> u64) -> Done {
    let a = f(c.w.scalar64(i.ops[1])?);
    c.w.set_scc(a != 0);
    put64(c, i, a)
}

fn count64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64) -> u32) -> Done {
    let a = f(c.w.scalar64(i.ops[1])?);
    put(c, i, a)
}

fn count64_scc(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64) -> u32) -> Done {
    let a = f(c.w.scalar64(i.ops[1])?);
    c.w.set_scc(a != 0);
    put(c, i, a)
}

/// Two sources; SCC stays.
fn two(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32) -> u32) -> Done {
    let (a, b) = (c.w.scalar32(i.ops[1])?, c.w.scalar32(i.ops[2])?);
    put(c, i, f(a, b))
}

/// Two sources; `f` gives SCC too.
fn two_scc(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32) -> (u32, bool)) -> Done {
    let (a, b) = (c.w.scalar32(i.ops[1])?, c.w.scalar32(i.ops[2])?);
    let (value, scc) = f(a, b);
    c.w.set_scc(scc);
    put(c, i, value)
}

/// A function of bits, one by one, and which bits of the result are known: those that come out the same whatever an unknown bit is.
fn known_bits(a: (u64, u64), b: (u64, u64), f: impl Fn(u64, u64) -> u64) -> (u64, u64) {
    let value = f(a.0, b.0);
    let others = [f(a.0 ^ !a.1, b.0), f(a.0, b.0 ^ !b.1), f(a.0 ^ !a.1, b.0 ^ !b.1)];
    (value, others.iter().fold(!0, |known, other| known & !(value ^ other)))
}

/// SCC says whether the result is not 0; one known bit of it is enough.
fn not_zero(c: &mut Cx<'_>, (value, known): (u64, u64)) {
    c.w.scc = if value & known != 0 { Some(true) } else { (known == !0).then_some(false) };
}

/// Bits of two sources.
fn logic(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32) -> u32) -> Done {
    let (a, b) = (c.w.bits32(i.ops[1])?, c.w.bits32(i.ops[2])?);
    let wide = |(v, k): (u32, u32)| (u64::from(v), u64::from(k) | !0 << 32);
    let (value, known) = known_bits(wide(a), wide(b), |a, b| u64::from(f(a as u32, b as u32)));
    not_zero(c, (value, known));
    match i.ops[0] {
        Operand::S(n) => c.w.set_bits(n, value as u32, known as u32),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// As [`logic`], of 64 bits: masks of lanes, of which those of inactive lanes may never have been written.
fn logic64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u64) -> u64) -> Done {
    let (a, b) = (c.w.bits64(i.ops[1])?, c.w.bits64(i.ops[2])?);
    let (value, known) = known_bits(a, b, f);
    not_zero(c, (value, known));
    put_bits64(c, i, value, known)
}

fn put_bits64(c: &mut Cx<'_>, i: &Inst, value: u64, known: u64) -> Done {
    match i.ops[0] {
        Operand::S(n) => c.w.set_bits64(n, value, known),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// Words of two sources; SCC says whether the result is not 0.
fn word(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u32) -> u32) -> Done {
    two_scc(c, i, |a, b| (f(a, b), f(a, b) != 0))
}

/// A double word and a count.
fn shift64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u32) -> u64) -> Done {
    let (a, b) = (c.w.scalar64(i.ops[1])?, c.w.scalar32(i.ops[2])?);
    let value = f(a, b);
    c.w.set_scc(value != 0);
    put64(c, i, value)
}

/// With SCC as carry.
fn carry(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u64, u64) -> u64) -> Done {
    let (a, b) = (c.w.scalar32(i.ops[1])?, c.w.scalar32(i.ops[2])?);
    let carry = u64::from(c.w.condition()?);
    let sum = f(u64::from(a), u64::from(b), carry);
    c.w.set_scc(sum >> 32 & 1 != 0);
    put(c, i, sum as u32)
}

/// EXEC goes to the destination, `f` of the source and EXEC to EXEC.
fn save(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u64) -> u64) -> Done {
    let exec = to_exec(c, i, f)?;
    put64(c, i, exec)
}

/// As [`save`], with the new EXEC in the destination.
fn wrexec(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u64) -> u64) -> Done {
    to_exec(c, i, f)?;
    let exec = c.w.exec();
    put64(c, i, exec)
}

/// Sets EXEC and SCC; returns the old EXEC.
fn to_exec(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u64, u64) -> u64) -> Result<u64, Cause> {
    let (a, exec) = (c.w.bits64(i.ops[1])?, c.w.exec());
    let (value, known) = known_bits(a, (exec, !0), f);
    c.w.set_bits64(EXEC, value, known)?;
    not_zero(c, (value, known));
    Ok(exec)
}

/// The low word of the destination with a constant of 16 bits.
fn with_k(c: &mut Cx<'_>, i: &Inst, f: impl Fn(i32, i32) -> (i32, Option<bool>)) -> Done {
    let (a, k) = (c.w.scalar32(i.ops[0])?, i32::from(i.simm16() as i16));
    let (value, scc) = f(a as i32, k);
    if let Some(scc) = scc {
        c.w.set_scc(scc);
    }
    put(c, i, value as u32)
}

/// A field: offset in the low bits, width from bit 16.
fn field(value: u64, at: u32, bits: u32, signed: bool, size: u32) -> u64 {
    let (at, bits) = (at & (size - 1), bits.min(size));
    if bits == 0 {
        return 0;
    }
    let v = if signed { ((value as i64) << (64 - size) >> (64 - size) >> at) as u64 } else { value >> at };
    if bits >= 64 {
        v
    } else if signed {
        ((v << (64 - bits)) as i64 >> (64 - bits)) as u64
    } else {
        v & ((1 << bits) - 1)
    }
}

fn flbit_signed(v: i32) -> u32 {
    let n = if v < 0 { (!v).leading_zeros() } else { v.leading_zeros() };
    if n == 32 { !0 } else { n }
}

/// -1 where nothing was found.
fn found(n: u32, size: u32) -> u32 {
    if n == size { !0 } else { n }
}

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    words(name).or_else(|| doubles(name)).or_else(|| masks(name))
}

fn words(name: &str) -> Option<Handler> {
    Some(match name {
        "s_mov_b32" => |c, i| un(c, i, |a| a),
        "s_movk_i32" => |c, i| put(c, i, i32::from(i.simm16() as i16) as u32),
        "s_cmov_b32" => |c, i| cmov(c, i, 1),
        "s_cmovk_i32" => |c, i| cmov(c, i, 0),
        "s_not_b32" => |c, i| un_scc(c, i, |a| !a),
        "s_brev_b32" => |c, i| un(c, i, u32::reverse_bits),
        "s_bcnt0_i32_b32" => |c, i| un_scc(c, i, u32::count_zeros),
        "s_bcnt1_i32_b32" => |c, i| un_scc(c, i, u32::count_ones),
        "s_ff0_i32_b32" => |c, i| un(c, i, |a| found(a.trailing_ones(), 32)),
        "s_ff1_i32_b32" => |c, i| un(c, i, |a| found(a.trailing_zeros(), 32)),
        "s_flbit_i32_b32" => |c, i| un(c, i, |a| found(a.leading_zeros(), 32)),
        "s_flbit_i32" => |c, i| un(c, i, |a| flbit_signed(a as i32)),
        "s_sext_i32_i8" => |c, i| un(c, i, |a| i32::from(a as i8) as u32),
        "s_sext_i32_i16" => |c, i| un(c, i, |a| i32::from(a as i16) as u32),
        "s_abs_i32" => |c, i| un_scc(c, i, |a| (a as i32).unsigned_abs()),
        "s_add_u32" => |c, i| two_scc(c, i, u32::overflowing_add),
        "s_sub_u32" => |c, i| two_scc(c, i, u32::overflowing_sub),
        "s_add_i32" => |c, i| two_scc(c, i, |a, b| signed((a as i32).overflowing_add(b as i32))),
        "s_sub_i32" => |c, i| two_scc(c, i, |a, b| signed((a as i32).overflowing_sub(b as i32))),
        "s_addc_u32" => |c, i| carry(c, i, |a, b, k| a + b + k),
        "s_subb_u32" => |c, i| carry(c, i, |a, b, k| a.wrapping_sub(b).wrapping_sub(k)),
        "s_min_i32" => |c, i| two_scc(c, i, |a, b| ((a as i32).min(b as i32) as u32, (a as i32) < (b as i32))),
        "s_max_i32" => |c, i| two_scc(c, i, |a, b| ((a as i32).max(b as i32) as u32, (a as i32) > (b as i32))),
        "s_min_u32" => |c, i| two_scc(c, i, |a, b| (a.min(b), a < b)),
        "s_max_u32" => |c, i| two_scc(c, i, |a, b| (a.max(b), a > b)),
        "s_and_b32" => |c, i| logic(c, i, |a, b| a & b),
        "s_or_b32" => |c, i| logic(c, i, |a, b| a | b),
        "s_xor_b32" => |c, i| logic(c, i, |a, b| a ^ b),
        "s_andn2_b32" => |c, i| logic(c, i, |a, b| a & !b),
        "s_orn2_b32" => |c, i| logic(c, i, |a, b| a | !b),
        "s_nand_b32" => |c, i| logic(c, i, |a, b| !(a & b)),
        "s_nor_b32" => |c, i| logic(c, i, |a, b| !(a | b)),
        "s_xnor_b32" => |c, i| logic(c, i, |a, b| !(a ^ b)),
        "s_lshl_b32" => |c, i| word(c, i, |a, b| a << (b & 31)),
        "s_lshr_b32" => |c, i| word(c, i, |a, b| a >> (b & 31)),
        "s_ashr_i32" => |c, i| word(c, i, |a, b| (a as i32 >> (b & 31)) as u32),
        "s_bfm_b32" => |c, i| two(c, i, |a, b| ((1 << (a & 31)) - 1) << (b & 31)),
        "s_bfe_u32" => |c, i| word(c, i, |a, b| field(a.into(), b & 31, b >> 16 & 0x7f, false, 32) as u32),
        "s_bfe_i32" => |c, i| word(c, i, |a, b| field(a.into(), b & 31, b >> 16 & 0x7f, true, 32) as u32),
        "s_mul_i32" => |c, i| two(c, i, u32::wrapping_mul),
        "s_mul_hi_u32" => |c, i| two(c, i, |a, b| (u64::from(a) * u64::from(b) >> 32) as u32),
        "s_mul_hi_i32" => |c, i| two(c, i, |a, b| (i64::from(a as i32) * i64::from(b as i32) >> 32) as u32),
        "s_absdiff_i32" => |c, i| word(c, i, |a, b| (a as i32).wrapping_sub(b as i32).unsigned_abs()),
        "s_lshl1_add_u32" => |c, i| lshl_add(c, i, 1),
        "s_lshl2_add_u32" => |c, i| lshl_add(c, i, 2),
        "s_lshl3_add_u32" => |c, i| lshl_add(c, i, 3),
        "s_lshl4_add_u32" => |c, i| lshl_add(c, i, 4),
        "s_pack_ll_b32_b16" => |c, i| two(c, i, |a, b| a & 0xffff | b << 16),
        "s_pack_lh_b32_b16" => |c, i| two(c, i, |a, b| a & 0xffff | b & 0xffff_0000),
        "s_pack_hh_b32_b16" => |c, i| two(c, i, |a, b| a >> 16 | b & 0xffff_0000),
        "s_bitset0_b32" => |c, i| bitset(c, i, false),
        "s_bitset1_b32" => |c, i| bitset(c, i, true),
        "s_addk_i32" => |c, i| with_k(c, i, |a, k| (a.wrapping_add(k), Some(a.checked_add(k).is_none()))),
        "s_mulk_i32" => |c, i| with_k(c, i, |a, k| (a.wrapping_mul(k), None)),
        "s_cselect_b32" => |c, i| {
            let (a, b) = (i.ops[1], i.ops[2]);
            let chosen = if c.w.condition()? { a } else { b };
            let value = c.w.scalar32(chosen)?;
            put(c, i, value)
        },
        _ => return None,
    })
}

fn doubles(name: &str) -> Option<Handler> {
    Some(match name {
        "s_mov_b64" => |c, i| {
            let (value, known) = c.w.bits64(i.ops[1])?;
            put_bits64(c, i, value, known)
        },
        "s_cmov_b64" => |c, i| {
            let taken = c.w.condition()?;
            let old = c.w.scalar64(i.ops[0])?;
            un64(c, i, |a| if taken { a } else { old })
        },
        "s_not_b64" => |c, i| {
            let (value, known) = c.w.bits64(i.ops[1])?;
            not_zero(c, (!value, known));
            put_bits64(c, i, !value, known)
        },
        "s_wqm_b64" => |c, i| un64_scc(c, i, wqm),
        "s_brev_b64" => |c, i| un64(c, i, u64::reverse_bits),
        "s_bcnt0_i32_b64" => |c, i| count64_scc(c, i, u64::count_zeros),
        "s_bcnt1_i32_b64" => |c, i| count64_scc(c, i, u64::count_ones),
        "s_ff0_i32_b64" => |c, i| count64(c, i, |a| found(a.trailing_ones(), 64)),
        "s_ff1_i32_b64" => |c, i| count64(c, i, |a| found(a.trailing_zeros(), 64)),
        "s_flbit_i32_b64" => |c, i| count64(c, i, |a| found(a.leading_zeros(), 64)),
        "s_flbit_i32_i64" => {
            |c, i| count64(c, i, |a| found(if (a as i64) < 0 { (!a).leading_zeros() } else { a.leading_zeros() }, 64))
        }
        "s_and_b64" => |c, i| logic64(c, i, |a, b| a & b),
        "s_or_b64" => |c, i| logic64(c, i, |a, b| a | b),
        "s_xor_b64" => |c, i| logic64(c, i, |a, b| a ^ b),
        "s_andn2_b64" => |c, i| logic64(c, i, |a, b| a & !b),
        "s_orn2_b64" => |c, i| logic64(c, i, |a, b| a | !b),
        "s_nand_b64" => |c, i| logic64(c, i, |a, b| !(a & b)),
        "s_nor_b64" => |c, i| logic64(c, i, |a, b| !(a | b)),
        "s_xnor_b64" => |c, i| logic64(c, i, |a, b| !(a ^ b)),
        "s_lshl_b64" => |c, i| shift64(c, i, |a, b| a << (b & 63)),
        "s_lshr_b64" => |c, i| shift64(c, i, |a, b| a >> (b & 63)),
        "s_ashr_i64" => |c, i| shift64(c, i, |a, b| (a as i64 >> (b & 63)) as u64),
        "s_bfe_u64" => |c, i| shift64(c, i, |a, b| field(a, b & 63, b >> 16 & 0x7f, false, 64)),
        "s_bfe_i64" => |c, i| shift64(c, i, |a, b| field(a, b & 63, b >> 16 & 0x7f, true, 64)),
        "s_bfm_b64" => |c, i| {
            let (a, b) = (c.w.scalar32(i.ops[1])?, c.w.scalar32(i.ops[2])?);
            put64(c, i, ((1 << (a & 63)) - 1) << (b & 63))
        },
        "s_bitset0_b64" => |c, i| bitset64(c, i, false),
        "s_bitset1_b64" => |c, i| bitset64(c, i, true),
        "s_bitreplicate_b64_b32" => |c, i| {
            let a = c.w.scalar32(i.ops[1])?;
            put64(c, i, (0..32).fold(0, |all, k| all | u64::from(a >> k & 1) * 3 << (2 * k)))
        },
        "s_cselect_b64" => |c, i| {
            let (a, b) = (i.ops[1], i.ops[2]);
            let chosen = if c.w.condition()? { a } else { b };
            let (value, known) = c.w.bits64(chosen)?;
            let decided = c.w.known != 0;
            put_bits64(c, i, value, if decided { known } else { 0 })
        },
        _ => return None,
    })
}

fn masks(name: &str) -> Option<Handler> {
    Some(match name {
        "s_and_saveexec_b64" => |c, i| save(c, i, |a, e| a & e),
        "s_or_saveexec_b64" => |c, i| save(c, i, |a, e| a | e),
        "s_xor_saveexec_b64" => |c, i| save(c, i, |a, e| a ^ e),
        "s_andn2_saveexec_b64" => |c, i| save(c, i, |a, e| a & !e),
        "s_orn2_saveexec_b64" => |c, i| save(c, i, |a, e| a | !e),
        "s_nand_saveexec_b64" => |c, i| save(c, i, |a, e| !(a & e)),
        "s_nor_saveexec_b64" => |c, i| save(c, i, |a, e| !(a | e)),
        "s_xnor_saveexec_b64" => |c, i| save(c, i, |a, e| !(a ^ e)),
        "s_andn1_saveexec_b64" => |c, i| save(c, i, |a, e| !a & e),
        "s_orn1_saveexec_b64" => |c, i| save(c, i, |a, e| !a | e),
        "s_andn1_wrexec_b64" => |c, i| wrexec(c, i, |a, e| !a & e),
        "s_andn2_wrexec_b64" => |c, i| wrexec(c, i, |a, e| a & !e),
        _ => return None,
    })
}

fn signed((value, overflow): (i32, bool)) -> (u32, bool) {
    (value as u32, overflow)
}

/// Each group of four bits as a whole.
fn wqm(a: u64) -> u64 {
    (0..16).fold(0, |all, q| if a >> (4 * q) & 15 != 0 { all | 15 << (4 * q) } else { all })
}

fn lshl_add(c: &mut Cx<'_>, i: &Inst, n: u32) -> Done {
    two_scc(c, i, |a, b| {
        let sum = (u64::from(a) << n) + u64::from(b);
        (sum as u32, sum >> 32 != 0)
    })
}

fn cmov(c: &mut Cx<'_>, i: &Inst, source: usize) -> Done {
    if !c.w.condition()? {
        return c.w.require(!0, "SCC, which decides a move,");
    }
    let value = if source == 0 { i32::from(i.simm16() as i16) as u32 } else { c.w.scalar32(i.ops[source])? };
    put(c, i, value)
}

fn bitset(c: &mut Cx<'_>, i: &Inst, on: bool) -> Done {
    let (old, bit) = (c.w.scalar32(i.ops[0])?, 1 << (c.w.scalar32(i.ops[1])? & 31));
    put(c, i, if on { old | bit } else { old & !bit })
}

fn bitset64(c: &mut Cx<'_>, i: &Inst, on: bool) -> Done {
    let (old, bit) = (c.w.scalar64(i.ops[0])?, 1 << (c.w.scalar32(i.ops[1])? & 63));
    put64(c, i, if on { old | bit } else { old & !bit })
}

/// Compares that set SCC: which comparison, with 8 added where the second is a constant of 16 bits.
pub fn find_compare(name: &str) -> Option<(Handler, u8)> {
    let rest = name.strip_prefix("s_cmp").or_else(|| name.strip_prefix("s_bitcmp"))?;
    if name.starts_with("s_bitcmp") {
        return Some((bitcmp, u8::from(rest.starts_with('1')) | u8::from(rest.ends_with("64")) << 1));
    }
    let (k, rest) = rest.strip_prefix('k').map_or((0, rest), |r| (8, r));
    let (op, kind) = rest.strip_prefix('_')?.split_once('_')?;
    let op = ["eq", "lg", "gt", "ge", "lt", "le"].iter().position(|o| *o == op)? as u8;
    let handler: Handler = match kind {
        "i32" => |c, i| compare(c, i, |a| i64::from(a as i32)),
        "u32" => |c, i| compare(c, i, i64::from),
        "u64" => |c, i| {
            let (a, b) = (c.w.scalar64(i.ops[0])?, c.w.scalar64(i.ops[1])?);
            c.w.set_scc((a == b) == (i.sub & 7 == 0));
            Ok(())
        },
        _ => return None,
    };
    Some((handler, op | k))
}

fn compare(c: &mut Cx<'_>, i: &Inst, wide: impl Fn(u32) -> i64) -> Done {
    let a = wide(c.w.scalar32(i.ops[0])?);
    let b = match i.sub & 8 {
        0 => wide(c.w.scalar32(i.ops[1])?),
        _ if i.name.ends_with("u32") => i64::from(i.simm16()),
        _ => i64::from(i.simm16() as i16),
    };
    c.w.set_scc(match i.sub & 7 {
        0 => a == b,
        1 => a != b,
        2 => a > b,
        3 => a >= b,
        4 => a < b,
        _ => a <= b,
    });
    Ok(())
}

fn bitcmp(c: &mut Cx<'_>, i: &Inst) -> Done {
    let bit = c.w.scalar32(i.ops[1])?;
    let a = if i.sub & 2 != 0 {
        c.w.scalar64(i.ops[0])? >> (bit & 63)
    } else {
        u64::from(c.w.scalar32(i.ops[0])?) >> (bit & 31)
    };
    c.w.set_scc((a & 1) as u8 == i.sub & 1);
    Ok(())
}
