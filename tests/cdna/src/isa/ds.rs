//! Reads and writes of LDS.

use super::{Cx, Done, Handler};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use crate::lds::Kind;
use crate::wave::Target;

/// The function of a mnemonic, given without its `ds_`.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let handler: Handler = match name {
        "read_b32" => |c, i| read(c, i, 1),
        "read_b64" => |c, i| read(c, i, 2),
        "read_b96" => |c, i| read(c, i, 3),
        "read_b128" => |c, i| read(c, i, 4),
        "read_u8" => |c, i| part(c, i, 1, |_, v| v),
        "read_i8" => |c, i| part(c, i, 1, |_, v| i32::from(v as i8) as u32),
        "read_u16" => |c, i| part(c, i, 2, |_, v| v),
        "read_i16" => |c, i| part(c, i, 2, |_, v| i32::from(v as i16) as u32),
        "read_u8_d16" => |c, i| part(c, i, 1, low),
        "read_u8_d16_hi" => |c, i| part(c, i, 1, high),
        "read_i8_d16" => |c, i| part(c, i, 1, |o, v| low(o, i32::from(v as i8) as u32 & 0xffff)),
        "read_i8_d16_hi" => |c, i| part(c, i, 1, |o, v| high(o, i32::from(v as i8) as u32)),
        "read_u16_d16" => |c, i| part(c, i, 2, low),
        "read_u16_d16_hi" => |c, i| part(c, i, 2, high),
        "read2_b32" => |c, i| read2(c, i, 1, 4),
        "read2_b64" => |c, i| read2(c, i, 2, 8),
        "read2st64_b32" => |c, i| read2(c, i, 1, 256),
        "read2st64_b64" => |c, i| read2(c, i, 2, 512),
        "write_b32" => |c, i| write(c, i, 1),
        "write_b64" => |c, i| write(c, i, 2),
        "write_b96" => |c, i| write(c, i, 3),
        "write_b128" => |c, i| write(c, i, 4),
        "write_b8" => |c, i| write_part(c, i, 1, 0),
        "write_b16" => |c, i| write_part(c, i, 2, 0),
        "write_b8_d16_hi" => |c, i| write_part(c, i, 1, 16),
        "write_b16_d16_hi" => |c, i| write_part(c, i, 2, 16),
        "write2_b32" => |c, i| write2(c, i, 1, 4),
        "write2_b64" => |c, i| write2(c, i, 2, 8),
        "write2st64_b32" => |c, i| write2(c, i, 1, 256),
        "write2st64_b64" => |c, i| write2(c, i, 2, 512),
        "nop" => |_, _| Ok(()),
        _ => return None,
    };
    Some((handler, 0))
}

/// A half of a register with the other one kept.
pub fn low(old: u32, value: u32) -> u32 {
    old & 0xffff_0000 | value & 0xffff
}

/// As [`low`].
pub fn high(old: u32, value: u32) -> u32 {
    old & 0xffff | value << 16
}

/// The registers of an operand.
pub fn register(i: &Inst, k: usize) -> Result<u16, Cause> {
    match i.ops[k] {
        Operand::V(n) if !i.flags.gds => Ok(n),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// What each lane's address is, before the offset; it must have been written.
pub fn addresses(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<[u32; 64], Cause> {
    let at = c.raw(i, k)?;
    c.w.require(c.w.exec(), "an address of LDS")?;
    Ok(at)
}

/// How an access of words must be aligned: to its size, three words to one.
fn alignment(words: usize) -> usize {
    if words == 3 { 4 } else { 4 * words }
}

/// Reads words of each lane at an offset into registers.
fn read_at(c: &mut Cx<'_>, at: &[u32; 64], offset: u32, to: u16, words: usize) -> Done {
    let (exec, who) = (c.w.exec(), c.w.who(false));
    let (mut out, mut known) = ([[0; 64]; 4], [0u64; 4]);
    for l in 0..64 {
        if exec >> l & 1 == 0 {
            continue;
        }
        let address = u64::from(at[l].wrapping_add(offset));
        c.lds.aligned(l, address, 4 * words, alignment(words))?;
        for k in 0..words {
            let (value, defined) = c.lds.read(who, l, address + 4 * k as u64, 4)?;
            out[k][l] = value;
            known[k] |= u64::from(defined) << l;
        }
    }
    for k in 0..words {
        c.w.known = known[k];
        c.w.set_v(to + k as u16, &out[k])?;
    }
    Ok(())
}

fn read(c: &mut Cx<'_>, i: &Inst, words: usize) -> Done {
    let (to, at) = (register(i, 0)?, addresses(c, i, 1)?);
    read_at(c, &at, i.offset as u32, to, words)?;
    c.w.issue_lds(Target::V(to, words as u16));
    Ok(())
}

fn read2(c: &mut Cx<'_>, i: &Inst, words: usize, unit: u32) -> Done {
    let (to, at) = (register(i, 0)?, addresses(c, i, 1)?);
    read_at(c, &at, i.offset as u32 * unit, to, words)?;
    read_at(c, &at, i.offset1 as u32 * unit, to + words as u16, words)?;
    c.w.issue_lds(Target::V(to, 2 * words as u16));
    Ok(())
}

/// Reads a part of a word; `f` puts it in its place.
fn part(c: &mut Cx<'_>, i: &Inst, bytes: usize, f: impl Fn(u32, u32) -> u32) -> Done {
    let (to, at) = (register(i, 0)?, addresses(c, i, 1)?);
    let mut out = *c.w.v(to)?;
    let (exec, who) = (c.w.exec(), c.w.who(false));
    let mut known = 0;
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let address = u64::from(at[l].wrapping_add(i.offset as u32));
        let (value, defined) = c.lds.read(who, l, address, bytes)?;
        out[l] = f(out[l], value);
        known |= u64::from(defined) << l;
    }
    c.w.known = known;
    c.w.set_v(to, &out)?;
    c.w.issue_lds(Target::V(to, 1));
    Ok(())
}

/// Writes words of each lane at an offset.
fn write_at(c: &mut Cx<'_>, at: &[u32; 64], offset: u32, from: u16, words: usize) -> Done {
    let (exec, who) = (c.w.exec(), c.w.who(false));
    let mut known = [0; 4];
    for (k, known) in known.iter_mut().enumerate().take(words) {
        c.w.known = !0;
        c.w.v(from + k as u16)?;
        *known = c.w.known;
    }
    for l in 0..64 {
        if exec >> l & 1 == 0 {
            continue;
        }
        let address = u64::from(at[l].wrapping_add(offset));
        c.lds.aligned(l, address, 4 * words, alignment(words))?;
        for k in 0..words {
            let value = (c.w.v[from as usize + k][l], known[k] >> l & 1 != 0);
            c.lds.write(who, Kind::Write, (l, address + 4 * k as u64), 4, value)?;
        }
    }
    Ok(())
}

fn write(c: &mut Cx<'_>, i: &Inst, words: usize) -> Done {
    let (at, from) = (addresses(c, i, 0)?, register(i, 1)?);
    write_at(c, &at, i.offset as u32, from, words)?;
    c.w.issue_lds(Target::Nothing);
    Ok(())
}

fn write2(c: &mut Cx<'_>, i: &Inst, words: usize, unit: u32) -> Done {
    let (at, first, second) = (addresses(c, i, 0)?, register(i, 1)?, register(i, 2)?);
    write_at(c, &at, i.offset as u32 * unit, first, words)?;
    write_at(c, &at, i.offset1 as u32 * unit, second, words)?;
    c.w.issue_lds(Target::Nothing);
    Ok(())
}

fn write_part(c: &mut Cx<'_>, i: &Inst, bytes: usize, shift: u32) -> Done {
    let (at, from) = (addresses(c, i, 0)?, register(i, 1)?);
    let (exec, who) = (c.w.exec(), c.w.who(false));
    c.w.known = !0;
    let value = *c.w.v(from)?;
    let known = c.w.known;
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let address = u64::from(at[l].wrapping_add(i.offset as u32));
        c.lds.write(who, Kind::Write, (l, address), bytes, (value[l] >> shift, known >> l & 1 != 0))?;
    }
    c.w.issue_lds(Target::Nothing);
    Ok(())
}
