//! Atomics of LDS and of global memory.

use super::ds::{addresses, register};
use super::global::{GLOBAL, Place, places};
use super::{Cx, Done, Handler};
use crate::decode::Inst;
use crate::fault::Cause;
use crate::memory::Access;
use crate::wave::Target;

/// The operations, by their number in [`Inst::sub`]; names of LDS and of global memory.
const OPS: [(&str, &str); 16] = [
    ("add_u32", "add"),
    ("sub_u32", "sub"),
    ("min_i32", "smin"),
    ("max_i32", "smax"),
    ("min_u32", "umin"),
    ("max_u32", "umax"),
    ("and_b32", "and"),
    ("or_b32", "or"),
    ("xor_b32", "xor"),
    ("inc_u32", "inc"),
    ("dec_u32", "dec"),
    ("wrxchg_b32", "swap"),
    ("cmpst_b32", "cmpswap"),
    ("add_f32", "add_f32"),
    ("min_f32", "min_f32"),
    ("max_f32", "max_f32"),
];
const COMPARE: u8 = 12;
/// Of 64 bits, in LDS.
const WIDE: u8 = 64;
/// It returns what was there.
const RETURNS: u8 = 128;

/// What an operation makes of a word, with its operand and, for an exchange on equality, what is compared.
fn apply(op: u8, old: u32, value: u32, compared: u32) -> u32 {
    let real = |f: fn(f32, f32) -> f32| f(f32::from_bits(old), f32::from_bits(value)).to_bits();
    match op {
        0 => old.wrapping_add(value),
        1 => old.wrapping_sub(value),
        2 => (old as i32).min(value as i32) as u32,
        3 => (old as i32).max(value as i32) as u32,
        4 => old.min(value),
        5 => old.max(value),
        6 => old & value,
        7 => old | value,
        8 => old ^ value,
        9 if old >= value => 0,
        9 => old + 1,
        10 if old == 0 || old > value => value,
        10 => old - 1,
        11 => value,
        COMPARE if old == compared => value,
        COMPARE => old,
        13 => real(|a, b| a + b),
        14 => real(super::float::min),
        _ => real(super::float::max),
    }
}

/// As [`apply`], of 64 bits.
fn apply_wide(op: u8, old: u64, value: u64, compared: u64) -> u64 {
    match op {
        0 => old.wrapping_add(value),
        1 => old.wrapping_sub(value),
        2 => (old as i64).min(value as i64) as u64,
        3 => (old as i64).max(value as i64) as u64,
        4 => old.min(value),
        5 => old.max(value),
        6 => old & value,
        7 => old | value,
        8 => old ^ value,
        COMPARE if old != compared => old,
        _ => value,
    }
}

/// The function of a DS mnemonic without its `ds_`, and which operation.
pub fn find_ds(name: &str) -> Option<(Handler, u8)> {
    let plain = name.replace("_rtn", "");
    let returns = if plain == name { 0 } else { RETURNS };
    if let Some(op) = OPS.iter().position(|(ds, _)| *ds == plain) {
        return Some((lds, op as u8 | returns));
    }
    let narrow = plain.replace("64", "32");
    let op = OPS.iter().position(|(ds, _)| *ds == narrow)? as u8;
    (op <= 8 || op == 11 || op == COMPARE).then_some((lds_wide as Handler, op | WIDE | returns))
}

/// The function of a global or flat mnemonic, and which operation.
pub fn find_global(name: &str) -> Option<(Handler, u8)> {
    let op = name.strip_prefix("global_atomic_")?;
    let op = OPS.iter().position(|(_, global)| *global == op)?;
    Some((global, op as u8))
}

/// Operands: destination if it returns, address, compared if it compares, value.
fn lds(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (op, first) = (i.sub & 31, usize::from(i.sub & RETURNS != 0));
    let at = addresses(c, i, first)?;
    let value = c.raw(i, first + 1)?;
    let (value, compared) = if op == COMPARE { (c.raw(i, first + 2)?, value) } else { (value, value) };
    let (exec, who) = (c.w.exec(), c.w.who(false));
    c.w.require(exec, "what an atomic works with")?;
    let mut out = [0; 64];
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let address = u64::from(at[l].wrapping_add(i.offset as u32));
        out[l] = c.lds.update(who, l, address, |old| apply(op, old, value[l], compared[l]))?;
    }
    if first == 0 {
        c.w.issue_lds(Target::Nothing);
        return Ok(());
    }
    let to = register(i, 0)?;
    c.w.set_v(to, &out)?;
    c.w.issue_lds(Target::V(to, 1));
    Ok(())
}

fn lds_wide(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (op, first) = (i.sub & 31, usize::from(i.sub & RETURNS != 0));
    let at = addresses(c, i, first)?;
    let value = c.b64(i, first + 1)?;
    let (value, compared) = if op == COMPARE { (c.b64(i, first + 2)?, value) } else { (value, value) };
    let (exec, who) = (c.w.exec(), c.w.who(false));
    c.w.require(exec, "what an atomic works with")?;
    let mut out = [0; 64];
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let address = u64::from(at[l].wrapping_add(i.offset as u32));
        c.lds.aligned(l, address, 8, 8)?;
        // No other wave runs between the four.
        let low = c.lds.update(who, l, address, |old| old)?;
        let high = c.lds.update(who, l, address + 4, |old| old)?;
        out[l] = u64::from(low) | u64::from(high) << 32;
        let new = apply_wide(op, out[l], value[l], compared[l]);
        c.lds.update(who, l, address, |_| new as u32)?;
        c.lds.update(who, l, address + 4, |_| (new >> 32) as u32)?;
    }
    if first == 0 {
        c.w.issue_lds(Target::Nothing);
        return Ok(());
    }
    let to = register(i, 0)?;
    c.put64(i, 0, &out)?;
    c.w.issue_lds(Target::V(to, 2));
    Ok(())
}

/// Operands: destination if it returns, address, value (and what is compared in the next register), scalar base.
fn global(c: &mut Cx<'_>, i: &Inst) -> Done {
    let returns = i.flags.sc0;
    let first = usize::from(returns);
    let at = places_of(c, i, first)?;
    let value = register(i, first + 1)?;
    let words = *c.w.v(value)?;
    let compared = if i.sub == COMPARE { *c.w.v(value + 1)? } else { words };
    let exec = c.w.exec();
    c.w.require(exec, "what an atomic works with")?;
    let mut out = [0; 64];
    for l in (0..64).filter(|l| exec >> l & 1 != 0) {
        let access = Access { lane: l, address: at[l], bytes: 4 };
        out[l] = c.env.memory.update(access, |old| apply(i.sub, old, words[l], compared[l]))?;
    }
    let target = if returns {
        let to = register(i, 0)?;
        c.w.set_v(to, &out)?;
        Target::V(to, 1)
    } else {
        Target::Nothing
    };
    c.w.issue_vm(target);
    Ok(())
}

fn places_of(c: &mut Cx<'_>, i: &Inst, first: usize) -> Result<[u64; 64], Cause> {
    Ok(places(c, i, GLOBAL, first, first + 2)?.map(|p| match p {
        Place::Global(a) | Place::Lds(a) | Place::Scratch(a) => a,
    }))
}
