//! Loads and stores of buffers: a descriptor in four scalar registers, offsets, and a bound beyond which loads give 0 and stores do nothing.
//!
//! Descriptors are raw (stride 0) or linear with an index; swizzled ones are not modelled.

use super::ds::{high, low};
use super::global::direct;
use super::{Cx, Done, Handler};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use crate::memory::Access;
use crate::wave::Target;

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let handler: Handler = match name.strip_prefix("buffer_")? {
        // Caches are not modelled.
        "wbl2" | "inv" | "wbinvl1" | "wbinvl1_vol" | "invl2" => |_, _| Ok(()),
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
        "load_short_d16" => |c, i| part(c, i, 2, low),
        "load_short_d16_hi" => |c, i| part(c, i, 2, high),
        "store_dword" => |c, i| store(c, i, 4, 0),
        "store_dwordx2" => |c, i| store(c, i, 8, 0),
        "store_dwordx3" => |c, i| store(c, i, 12, 0),
        "store_dwordx4" => |c, i| store(c, i, 16, 0),
        "store_byte" => |c, i| store(c, i, 1, 0),
        "store_short" => |c, i| store(c, i, 2, 0),
        "store_byte_d16_hi" => |c, i| store(c, i, 1, 16),
        "store_short_d16_hi" => |c, i| store(c, i, 2, 16),
        _ => return None,
    };
    Some((handler, 0))
}

/// Where each lane's access begins, and how many bytes from there lie inside of the bound.
struct Window {
    address: [u64; 64],
    inside: [u64; 64],
}

impl Window {
    /// The address of `bytes` bytes at an offset, if they are inside.
    fn at(&self, lane: usize, offset: usize, bytes: usize) -> Option<u64> {
        (offset as u64 + bytes as u64 <= self.inside[lane]).then(|| self.address[lane] + offset as u64)
    }
}

/// Operands from `k`: vector offset or index, descriptor, scalar offset.
fn window(c: &mut Cx<'_>, i: &Inst, k: usize) -> Result<Window, Cause> {
    let Operand::S(n) = i.ops[k + 1] else { return Err(Cause::Unknown(i.text.clone())) };
    let words = [c.w.s(n)?, c.w.s(n + 1)?, c.w.s(n + 2)?, c.w.s(n + 3)?];
    let base = u64::from(words[0]) | u64::from(words[1] & 0xffff) << 32;
    let (stride, records) = (u64::from(words[1] >> 16 & 0x3fff), u64::from(words[2]));
    if words[1] >> 31 != 0 || words[3] >> 23 & 1 != 0 {
        return Err(Cause::Unknown(format!("{} (a swizzled buffer)", i.text)));
    }
    let scalar = u64::from(c.w.scalar32(i.ops[k + 2])?);
    let vector = |c: &mut Cx<'_>, add: u16| match i.ops[k] {
        Operand::V(n) => c.w.v(n + add).copied(),
        _ => Ok([0; 64]),
    };
    let index = if i.flags.idxen { vector(c, 0)? } else { [0; 64] };
    let offset = if i.flags.offen { vector(c, u16::from(i.flags.idxen))? } else { [0; 64] };
    c.w.require(c.w.exec(), "the address of a buffer access")?;
    let mut out = Window { address: [0; 64], inside: [0; 64] };
    for l in 0..64 {
        let at = u64::from(offset[l]) + i.offset as u64;
        let index = u64::from(index[l]);
        out.address[l] = base.wrapping_add(index * stride).wrapping_add(at).wrapping_add(scalar);
        // Raw: the offset counts bytes; with a stride, records are counted.
        let bound = if stride == 0 {
            records
        } else if index < records {
            stride
        } else {
            0
        };
        out.inside[l] = bound.saturating_sub(at);
    }
    Ok(out)
}

fn destination(i: &Inst) -> Result<u16, Cause> {
    match i.ops[0] {
        Operand::V(n) => Ok(n),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

fn load(c: &mut Cx<'_>, i: &Inst, words: usize) -> Done {
    if i.flags.lds {
        let window = window(c, i, 0)?;
        let at = std::array::from_fn(|l| window.at(l, 0, 4 * words));
        return direct(c, i, &at, words);
    }
    let (to, window, exec) = (destination(i)?, window(c, i, 1)?, c.w.exec());
    for k in 0..words {
        let mut out = [0; 64];
        for l in (0..64).filter(|l| exec >> l & 1 != 0) {
            if let Some(address) = window.at(l, 4 * k, 4) {
                out[l] = c.env.memory.load(Access { lane: l, address, bytes: 4 })?;
            }
        }
        c.w.known = !0;
        c.w.set_v(to + k as u16, &out)?;
    }
    c.w.issue_vm(Target::V(to, words as u16));
    Ok(())
}

fn part(c: &mut Cx<'_>, i: &Inst, bytes: usize, f: impl Fn(u32, u32) -> u32) -> Done {
    let (to, window, exec) = (destination(i)?, window(c, i, 1)?, c.w.exec());
    let mut out = *c.w.v(to)?;
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let value = match window.at(l, 0, bytes) {
            Some(address) => c.env.memory.load(Access { lane: l, address, bytes })?,
            None => 0,
        };
        out[l] = f(out[l], value);
    }
    c.w.known = !0;
    c.w.set_v(to, &out)?;
    c.w.issue_vm(Target::V(to, 1));
    Ok(())
}

fn store(c: &mut Cx<'_>, i: &Inst, bytes: usize, shift: u32) -> Done {
    let (from, window, exec) = (destination(i)?, window(c, i, 1)?, c.w.exec());
    for k in 0..bytes.div_ceil(4) {
        c.w.known = !0;
        let value = *c.w.v(from + k as u16)?;
        let part = bytes.min(4);
        for l in (0..64).filter(|l| exec >> l & 1 != 0) {
            let Some(address) = window.at(l, 4 * k, part) else { continue };
            c.w.require(1 << l, "what is stored")?;
            c.env.memory.store(Access { lane: l, address, bytes: part }, value[l] >> shift)?;
        }
    }
    c.w.issue_vm(Target::Nothing);
    Ok(())
}
