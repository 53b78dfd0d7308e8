//! Loads and stores of global memory, of scratch, and of generic addresses, and global loads that go to LDS.

use super::ds::{high, low};
use super::{Cx, Done, Handler};
use crate::decode::{Inst, M0, Operand, PRIVATE_APERTURE, SHARED_APERTURE};
use crate::fault::Cause;
use crate::lds::Kind;
use crate::memory::Access;
use crate::wave::Target;

/// Which address space, in [`Inst::sub`].
pub const GLOBAL: u8 = 0;
const FLAT: u8 = 1;
const SCRATCH: u8 = 2;

/// The function of a mnemonic, and its address space.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let (space, rest) = name.split_once('_')?;
    let space = match space {
        "global" => GLOBAL,
        "flat" => FLAT,
        "scratch" => SCRATCH,
        _ => return None,
    };
    let direct = rest.strip_prefix("load_lds_").filter(|_| space != SCRATCH).and_then(|kind| -> Option<Handler> {
        Some(match kind {
            "dword" => |c, i| to_lds(c, i, 1),
            "dwordx3" => |c, i| to_lds(c, i, 3),
            "dwordx4" => |c, i| to_lds(c, i, 4),
            _ => return None,
        })
    });
    if let Some(handler) = direct {
        return Some((handler, space));
    }
    let handler: Handler = match rest {
        "load_dword" => |c, i| load(c, i, 1),
        "load_dwordx2" => |c, i| load(c, i, 2),
        "load_dwordx3" => |c, i| load(c, i, 3),
        "load_dwordx4" => |c, i| load(c, i, 4),
        "load_ubyte" => |c, i| part(c, i, 1, |_, v| v),
        "load_sbyte" => |c, i| part(c, i, 1, |_, v| i32::from(v as i8) as u32),
        "load_ushort" => |c, i| part(c, i, 2, |_, v| v),
        "load_sshort" => |c, i| part(c, i, 2, |_, v| i32::from(v as i16) as u32),
        "load_ubyte_d16" => |c, i| part(c, i, 1, low),
        "load_ubyte_d16_hi" => |c, i| part(c, i, 1, high),
        "load_sbyte_d16" => |c, i| part(c, i, 1, |o, v| low(o, i32::from(v as i8) as u32 & 0xffff)),
        "load_sbyte_d16_hi" => |c, i| part(c, i, 1, |o, v| high(o, i32::from(v as i8) as u32)),
        "load_short_d16" => |c, i| part(c, i, 2, low),
        "load_short_d16_hi" => |c, i| part(c, i, 2, high),
        "store_dword" => |c, i| store(c, i, 4, 4),
        "store_dwordx2" => |c, i| store(c, i, 8, 4),
        "store_dwordx3" => |c, i| store(c, i, 12, 4),
        "store_dwordx4" => |c, i| store(c, i, 16, 4),
        "store_byte" => |c, i| store(c, i, 1, 0),
        "store_short" => |c, i| store(c, i, 2, 0),
        "store_byte_d16_hi" => |c, i| store(c, i, 1, 16),
        "store_short_d16_hi" => |c, i| store(c, i, 2, 16),
        _ => return None,
    };
    Some((handler, space))
}

/// Where a lane's access goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// Global memory.
    Global(u64),
    /// LDS.
    Lds(u64),
    /// The lane's scratch.
    Scratch(u64),
}

/// The addresses of the active lanes in an address space: vector operand `k`, the scalar operand `scalar` if it is one, and the offset.
pub fn places(c: &mut Cx<'_>, i: &Inst, space: u8, k: usize, scalar: usize) -> Result<[Place; 64], Cause> {
    let scalar = i.ops[scalar];
    let offset = i64::from(i.offset);
    let mut out = [Place::Global(0); 64];
    if space == SCRATCH {
        let base = match scalar {
            Operand::S(n) => c.w.s(n)?,
            _ => 0,
        };
        let at = match i.ops[k] {
            Operand::V(n) => *c.w.v(n)?,
            _ => [0; 64],
        };
        for l in 0..64 {
            out[l] = Place::Scratch(u64::from(at[l].wrapping_add(base).wrapping_add(offset as u32)));
        }
    } else if let Operand::S(n) = scalar {
        let base = c.w.scalar64(Operand::S(n))?;
        let at = c.raw(i, k)?;
        for l in 0..64 {
            out[l] = Place::Global(base.wrapping_add(u64::from(at[l])).wrapping_add_signed(offset));
        }
    } else {
        let at = c.b64(i, k)?;
        for l in 0..64 {
            let address = at[l].wrapping_add_signed(offset);
            out[l] = match at[l] >> 32 {
                SHARED_APERTURE if space == FLAT => Place::Lds(address & 0xffff_ffff),
                PRIVATE_APERTURE if space == FLAT => Place::Scratch(address & 0xffff_ffff),
                _ => Place::Global(address),
            };
        }
    }
    c.w.require(c.w.exec(), "an address")?;
    Ok(out)
}

/// A part of a word, or a word; and whether it was written.
fn get(c: &mut Cx<'_>, place: Place, lane: usize, bytes: usize) -> Result<(u32, bool), Cause> {
    match place {
        Place::Global(address) => Ok((c.env.memory.load(Access { lane, address, bytes })?, true)),
        Place::Lds(address) => {
            let who = c.w.who(false);
            c.lds.read(who, lane, address, bytes)
        }
        Place::Scratch(address) => {
            let (word, shift) = scratch(c, lane, address, bytes)?;
            let value = c.w.scratch[word][lane] >> shift;
            let value = if bytes == 4 { value } else { value & ((1 << (8 * bytes)) - 1) };
            Ok((value, c.w.scratch_known[word] >> lane & 1 != 0))
        }
    }
}

fn set(c: &mut Cx<'_>, place: Place, lane: usize, bytes: usize, value: (u32, bool)) -> Done {
    match place {
        Place::Global(address) => {
            if !value.1 {
                return Err(Cause::Undefined(format!("what lane {lane} stores")));
            }
            c.env.memory.store(Access { lane, address, bytes }, value.0)
        }
        Place::Lds(address) => {
            let who = c.w.who(false);
            c.lds.write(who, Kind::Write, (lane, address), bytes, value)
        }
        Place::Scratch(address) => {
            let (word, shift) = scratch(c, lane, address, bytes)?;
            let mask = if bytes == 4 { !0 } else { ((1 << (8 * bytes)) - 1) << shift };
            let old = &mut c.w.scratch[word][lane];
            *old = *old & !mask | value.0 << shift & mask;
            let known = &mut c.w.scratch_known[word];
            *known = *known & !(1 << lane) | u64::from(value.1) << lane;
            Ok(())
        }
    }
}

/// The word of scratch and where in it.
fn scratch(c: &Cx<'_>, lane: usize, address: u64, bytes: usize) -> Result<(usize, u32), Cause> {
    let size = 4 * c.w.scratch.len();
    if address as usize + bytes > size {
        return Err(Cause::ScratchBounds { lane, address, bytes, size });
    }
    if !(address as usize).is_multiple_of(bytes) {
        return Err(Cause::Misaligned { lane, address, bytes });
    }
    Ok((address as usize / 4, 8 * (address as u32 % 4)))
}

fn advance(place: Place, by: u64) -> Place {
    match place {
        Place::Global(a) => Place::Global(a.wrapping_add(by)),
        Place::Lds(a) => Place::Lds(a + by),
        Place::Scratch(a) => Place::Scratch(a + by),
    }
}

/// Counts an access: generic ones by both counters.
fn issue(c: &mut Cx<'_>, i: &Inst, target: Target) {
    c.w.issue_vm(target);
    if i.sub == FLAT {
        c.w.issue_lds(target);
    }
}

fn destination(i: &Inst) -> Result<u16, Cause> {
    match i.ops[0] {
        Operand::V(n) => Ok(n),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

fn widen<const N: usize>(words: [u32; N]) -> [u32; 4] {
    std::array::from_fn(|k| words.get(k).copied().unwrap_or(0))
}

fn load(c: &mut Cx<'_>, i: &Inst, words: usize) -> Done {
    if i.flags.lds {
        return to_lds(c, i, words);
    }
    let (to, at, exec) = (destination(i)?, places(c, i, i.sub, 1, 2)?, c.w.exec());
    let (mut out, mut known) = ([[0; 64]; 4], [0u64; 4]);
    for l in 0..64 {
        if exec >> l & 1 == 0 {
            continue;
        }
        if let Place::Global(address) = at[l] {
            let memory = c.env.memory;
            let row = match words {
                4 => memory.load_words::<4>(l, address)?,
                3 => widen(memory.load_words::<3>(l, address)?),
                2 => widen(memory.load_words::<2>(l, address)?),
                _ => widen(memory.load_words::<1>(l, address)?),
            };
            for (out, word) in out.iter_mut().zip(row) {
                out[l] = word;
            }
            known.iter_mut().for_each(|k| *k |= 1 << l);
            continue;
        }
        for k in 0..words {
            let (value, defined) = get(c, advance(at[l], 4 * k as u64), l, 4)?;
            out[k][l] = value;
            known[k] |= u64::from(defined) << l;
        }
    }
    for k in 0..words {
        c.w.known = known[k];
        // Generic loads may come from LDS, and then not in their order.
        if i.sub == FLAT {
            c.w.set_v(to + k as u16, &out[k])?
        } else {
            c.w.set_loaded(to + k as u16, &out[k])?
        };
    }
    issue(c, i, Target::V(to, words as u16));
    Ok(())
}

/// Loads a part of a word; `f` puts it in its place.
fn part(c: &mut Cx<'_>, i: &Inst, bytes: usize, f: impl Fn(u32, u32) -> u32) -> Done {
    let (to, at, exec) = (destination(i)?, places(c, i, i.sub, 1, 2)?, c.w.exec());
    // Those that leave half of the register as it is read it; others may follow a load to it that is under way.
    let keeps = i.name.contains("_d16");
    let mut out = if keeps { *c.w.v(to)? } else { [0; 64] };
    let mut known = 0;
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let (value, defined) = get(c, at[l], l, bytes)?;
        out[l] = f(out[l], value);
        known |= u64::from(defined) << l;
    }
    c.w.known = known;
    if keeps || i.sub != GLOBAL {
        c.w.set_v(to, &out)?;
    } else {
        c.w.set_loaded(to, &out)?;
    }
    issue(c, i, Target::V(to, 1));
    Ok(())
}

/// Stores words, or with fewer than four bytes the part of a register from bit `shift`.
fn store(c: &mut Cx<'_>, i: &Inst, bytes: usize, shift: u32) -> Done {
    let (at, exec) = (places(c, i, i.sub, 0, 2)?, c.w.exec());
    let Operand::V(from) = i.ops[1] else { return Err(Cause::Unknown(i.text.clone())) };
    let shift = if bytes < 4 { shift } else { 0 };
    for k in 0..bytes.div_ceil(4) {
        c.w.known = !0;
        let value = *c.w.v(from + k as u16)?;
        let known = c.w.known;
        for l in 0..64 {
            if exec >> l & 1 != 0 {
                let place = advance(at[l], 4 * k as u64);
                set(c, place, l, bytes.min(4), (value[l] >> shift, known >> l & 1 != 0))?;
            }
        }
    }
    issue(c, i, Target::Nothing);
    Ok(())
}

/// Loads to LDS: lane `l` writes at M0 + offset + `l` times the size.
fn to_lds(c: &mut Cx<'_>, i: &Inst, words: usize) -> Done {
    let at = places(c, i, i.sub, 0, 1)?;
    let places = at.map(|p| match p {
        Place::Global(address) => Some(address),
        Place::Lds(_) | Place::Scratch(_) => None,
    });
    direct(c, i, &places, words)
}

/// Copies words from global addresses (zeros where there is none) to LDS.
pub fn direct(c: &mut Cx<'_>, i: &Inst, at: &[Option<u64>; 64], words: usize) -> Done {
    if 4 * words > c.env.chip.direct_bytes {
        return Err(Cause::Unknown(format!(
            "{} (a load of {} bytes to LDS on {})",
            i.text,
            4 * words,
            c.env.chip.name
        )));
    }
    let base = c.w.s(M0)?;
    c.w.require(!0, "M0, where a load to LDS goes,")?;
    let (exec, who) = (c.w.exec(), c.w.who(true));
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        for k in 0..words {
            let value = match at[l] {
                Some(address) => c.env.memory.load(Access { lane: l, address: address + 4 * k as u64, bytes: 4 })?,
                None => 0,
            };
            let to = u64::from(base).wrapping_add_signed(i64::from(i.offset)) + 4 * (l * words + k) as u64;
            c.lds.write(who, Kind::Direct, (l, to), 4, (value, true))?;
        }
    }
    c.w.issue_vm(Target::Nothing);
    Ok(())
}
