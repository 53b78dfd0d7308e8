//! Moves, bits and shifts of lanes.

use super::{Cx, Done, Handler, map2, map3};
use crate::decode::Inst;

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    moves(name).or_else(|| logic(name)).or_else(|| shifts(name)).or_else(|| fields(name))
}

fn moves(name: &str) -> Option<Handler> {
    Some(match name {
        "v_nop" => |_, _| Ok(()),
        "v_mov_b32" | "v_accvgpr_read_b32" | "v_accvgpr_write_b32" | "v_accvgpr_mov_b32" => |c, i| c.unary(i, |a| a),
        "v_mov_b64" => |c, i| {
            let a = c.b64(i, 1)?;
            c.put64(i, 0, &a)
        },
        "v_swap_b32" => |c, i| {
            let a = c.raw(i, 0)?;
            let known = std::mem::replace(&mut c.w.known, !0);
            let b = c.raw(i, 1)?;
            c.put(i, 0, &b)?;
            c.w.known = known;
            c.put(i, 1, &a)
        },
        "v_cndmask_b32" => cndmask,
        _ => return None,
    })
}

/// The second source where the mask has a bit, with what was written of that one only.
fn cndmask(c: &mut Cx<'_>, i: &Inst) -> Done {
    let mask = c.mask(i, 3)?;
    let by = std::mem::replace(&mut c.w.known, !0);
    let a = select_source(c, i, 1)?;
    let known_a = std::mem::replace(&mut c.w.known, !0);
    let b = select_source(c, i, 2)?;
    let known_b = c.w.known;
    c.w.known = by & (known_a & !mask | known_b & mask);
    let mut out = a;
    for l in 0..64 {
        out[l] = if mask >> l & 1 != 0 { b[l] } else { a[l] };
    }
    c.put(i, 0, &out)
}

/// Signs may be changed on the way.
fn select_source(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<crate::wave::Lanes, crate::fault::Cause> {
    let a = c.b32(i, k)?;
    if (i.abs | i.neg) >> k & 1 == 0 {
        return Ok(a);
    }
    let (keep, flip) = super::masks(i, k, 0x7fff_ffff, 0x8000_0000);
    Ok(super::map1(&a, |a| a & keep ^ flip))
}

fn logic(name: &str) -> Option<Handler> {
    Some(match name {
        "v_not_b32" => |c, i| c.unary(i, |a| !a),
        "v_and_b32" => |c, i| c.binary(i, |a, b| a & b),
        "v_or_b32" => |c, i| c.binary(i, |a, b| a | b),
        "v_xor_b32" => |c, i| c.binary(i, |a, b| a ^ b),
        "v_xnor_b32" => |c, i| c.binary(i, |a, b| !(a ^ b)),
        "v_or3_b32" => |c, i| c.ternary(i, |a, b, d| a | b | d),
        "v_and_or_b32" => |c, i| c.ternary(i, |a, b, d| a & b | d),
        "v_lshl_or_b32" => |c, i| c.ternary(i, |a, b, d| a << (b & 31) | d),
        "v_bfi_b32" => |c, i| c.ternary(i, |a, b, d| a & b | !a & d),
        "v_bitop3_b32" => |c, i| {
            let table = bitop_table(i);
            c.ternary(i, |a, b, d| bitop(table, a, b, d))
        },
        "v_bitop3_b16" => |c, i| {
            let table = bitop_table(i);
            c.ternary(i, |a, b, d| bitop(table, a, b, d) & 0xffff)
        },
        _ => return None,
    })
}

/// The truth table of a bitop3, which LLVM prints as a modifier.
fn bitop_table(i: &Inst) -> u32 {
    i.matrix[0].into()
}

/// For each bit, the entry of the table that the three sources' bits name.
fn bitop(table: u32, a: u32, b: u32, c: u32) -> u32 {
    let pick = |x: u32, bit: u32| if bit != 0 { x } else { !x };
    (0..8).filter(|k| table >> k & 1 != 0).fold(0, |all, k| all | pick(a, k & 4) & pick(b, k & 2) & pick(c, k & 1))
}

fn shifts(name: &str) -> Option<Handler> {
    Some(match name {
        "v_lshlrev_b32" => |c, i| c.binary(i, |a, b| b << (a & 31)),
        "v_lshrrev_b32" => |c, i| c.binary(i, |a, b| b >> (a & 31)),
        "v_ashrrev_i32" => |c, i| c.binary(i, |a, b| (b as i32 >> (a & 31)) as u32),
        "v_lshlrev_b64" => |c, i| shift64(c, i, |a, b| b << (a & 63)),
        "v_lshrrev_b64" => |c, i| shift64(c, i, |a, b| b >> (a & 63)),
        "v_ashrrev_i64" => |c, i| shift64(c, i, |a, b| (b as i64 >> (a & 63)) as u64),
        "v_alignbit_b32" => |c, i| c.ternary(i, |a, b, d| ((u64::from(a) << 32 | u64::from(b)) >> (d & 31)) as u32),
        "v_alignbyte_b32" => {
            |c, i| c.ternary(i, |a, b, d| ((u64::from(a) << 32 | u64::from(b)) >> (8 * (d & 3))) as u32)
        }
        _ => return None,
    })
}

fn shift64(c: &mut Cx<'_>, i: &Inst, f: impl Fn(u32, u64) -> u64) -> Done {
    let (a, b) = (c.raw(i, 1)?, c.b64(i, 2)?);
    c.put64(i, 0, &map2(&a, &b, f))
}

fn fields(name: &str) -> Option<Handler> {
    Some(match name {
        "v_bfe_u32" => |c, i| c.ternary(i, |a, at, bits| a >> (at & 31) & ((1u32 << (bits & 31)) - 1)),
        "v_bfe_i32" => |c, i| {
            c.ternary(i, |a, at, bits| {
                let bits = bits & 31;
                if bits == 0 { 0 } else { ((a as i32 >> (at & 31)) << (32 - bits) >> (32 - bits)) as u32 }
            })
        },
        "v_bfm_b32" => |c, i| c.binary(i, |a, b| ((1u32 << (a & 31)) - 1) << (b & 31)),
        "v_bfrev_b32" => |c, i| c.unary(i, u32::reverse_bits),
        "v_bcnt_u32_b32" => |c, i| c.binary(i, |a, b| b.wrapping_add(a.count_ones())),
        "v_ffbl_b32" => |c, i| c.unary(i, |a| if a == 0 { !0 } else { a.trailing_zeros() }),
        "v_ffbh_u32" => |c, i| c.unary(i, |a| if a == 0 { !0 } else { a.leading_zeros() }),
        "v_ffbh_i32" => |c, i| {
            c.unary(i, |a| {
                let n = (if (a as i32) < 0 { !a } else { a }).leading_zeros();
                if n == 32 { !0 } else { n }
            })
        },
        "v_perm_b32" => |c, i| {
            let (a, b, s) = (c.b32(i, 1)?, c.b32(i, 2)?, c.b32(i, 3)?);
            c.put(i, 0, &map3(&a, &b, &s, perm))
        },
        _ => return None,
    })
}

/// Each byte of the selector names one of the eight of `b` (0 to 3) and `a` (4 to 7), a sign, 0 or 0xff.
fn perm(a: u32, b: u32, selector: u32) -> u32 {
    let both = u64::from(a) << 32 | u64::from(b);
    let mut out = 0;
    for k in 0..4 {
        let byte = match selector >> (8 * k) & 0xff {
            s @ 0..=7 => (both >> (8 * s)) as u32 & 0xff,
            // Signs of the four halves.
            s @ 8..=11 => 0xff * (both >> (16 * (s - 8) + 15) & 1) as u32,
            12 => 0,
            _ => 0xff,
        };
        out |= byte << (8 * k);
    }
    out
}
