//! Branches, waits, barriers, and scalar loads.

use super::{Cx, Done, Handler};
use crate::decode::{Inst, Operand, VCC};
use crate::fault::Cause;
use crate::memory::Access;
use crate::wave::{State, Target};

/// The function of a mnemonic.
pub fn find(name: &str) -> Option<Handler> {
    Some(match name {
        // Priorities, caches, hints and traces change nothing here.
        "s_nop" | "s_sleep" | "s_setprio" | "s_icache_inv" | "s_dcache_inv" | "s_dcache_wb" | "s_sethalt"
        | "s_incperflevel" | "s_decperflevel" | "s_ttracedata" | "s_code_end" => |_, _| Ok(()),
        "s_endpgm" | "s_endpgm_saved" => |c, _| {
            c.w.state = State::Ended;
            Ok(())
        },
        "s_barrier" => |c, _| {
            c.w.state = State::Barrier;
            Ok(())
        },
        "s_waitcnt" => waitcnt,
        "s_branch" => |c, i| jump(c, i, true),
        "s_cbranch_scc0" => |c, i| on_scc(c, i, false),
        "s_cbranch_scc1" => |c, i| on_scc(c, i, true),
        "s_cbranch_vccz" => |c, i| on_mask(c, i, true),
        "s_cbranch_vccnz" => |c, i| on_mask(c, i, false),
        "s_cbranch_execz" => |c, i| {
            let zero = c.w.exec() == 0;
            jump(c, i, zero)
        },
        "s_cbranch_execnz" => |c, i| {
            let zero = c.w.exec() == 0;
            jump(c, i, !zero)
        },
        "s_getpc_b64" => |c, i| {
            let next = c.env.image + i.address + 4;
            put_address(c, i, next)
        },
        "s_setpc_b64" => |c, i| {
            let to = c.w.scalar64(i.ops[0])?;
            go(c, to)
        },
        "s_swappc_b64" => |c, i| {
            let to = c.w.scalar64(i.ops[1])?;
            c.w.require(!0, "the address of a call")?;
            put_address(c, i, c.env.image + i.address + 4)?;
            go(c, to)
        },
        "s_setreg_b32" | "s_setreg_imm32_b32" => setreg,
        "s_load_dword" => |c, i| load::<1>(c, i),
        "s_load_dwordx2" => |c, i| load::<2>(c, i),
        "s_load_dwordx4" => |c, i| load::<4>(c, i),
        "s_load_dwordx8" => |c, i| load::<8>(c, i),
        "s_load_dwordx16" => |c, i| load::<16>(c, i),
        "s_buffer_load_dword" => |c, i| buffer::<1>(c, i),
        "s_buffer_load_dwordx2" => |c, i| buffer::<2>(c, i),
        "s_buffer_load_dwordx4" => |c, i| buffer::<4>(c, i),
        "s_buffer_load_dwordx8" => |c, i| buffer::<8>(c, i),
        "s_buffer_load_dwordx16" => |c, i| buffer::<16>(c, i),
        _ => return None,
    })
}

/// vmcnt is in bits 3..0 and 15..14, lgkmcnt in 11..8; expcnt counts nothing that kernels use.
fn waitcnt(c: &mut Cx<'_>, i: &Inst) -> Done {
    let n = usize::from(i.simm16());
    c.w.wait(n & 15 | n >> 14 << 4, n >> 8 & 15);
    Ok(())
}

fn jump(c: &mut Cx<'_>, i: &Inst, taken: bool) -> Done {
    if taken {
        if i.target == usize::MAX {
            return Err(Cause::Jump(i.address.wrapping_add_signed(4 + 4 * i64::from(i.simm16() as i16))));
        }
        c.w.pc = i.target;
    }
    Ok(())
}

fn on_scc(c: &mut Cx<'_>, i: &Inst, when: bool) -> Done {
    let scc = c.w.condition()?;
    c.w.require(!0, "SCC, which decides a branch,")?;
    jump(c, i, scc == when)
}

fn on_mask(c: &mut Cx<'_>, i: &Inst, zero: bool) -> Done {
    let (vcc, known) = c.w.bits64(Operand::S(VCC))?;
    // One bit that is set decides.
    if vcc & known == 0 && known != !0 {
        return Err(Cause::Undefined("VCC, which decides a branch,".into()));
    }
    jump(c, i, (vcc & known == 0) == zero)
}

fn put_address(c: &mut Cx<'_>, i: &Inst, address: u64) -> Done {
    match i.ops[0] {
        Operand::S(n) => c.w.set_s64(n, address),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

fn go(c: &mut Cx<'_>, to: u64) -> Done {
    c.w.require(!0, "the address of a jump")?;
    let address = to.wrapping_sub(c.env.image);
    c.w.pc = c.env.addresses.binary_search(&address).map_err(|_| Cause::Jump(address))?;
    Ok(())
}

/// Of the hardware registers only MODE is written: rounding (bits 3..0) must stay to nearest, denormals (7..4) may change.
fn setreg(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (register, offset, size) = (i.simm16() & 63, u32::from(i.simm16() >> 6 & 31), u32::from(i.simm16() >> 11) + 1);
    let value = if i.name == "s_setreg_imm32_b32" { i.words[1] } else { c.w.scalar32(i.ops[0])? };
    c.w.require(!0, "what a mode is set to")?;
    let mode = &mut c.w.mode;
    for bit in 0..size {
        let on = value >> bit & 1 != 0;
        match (register, offset + bit) {
            (1, 0..=3) if !on => {}
            (1, 4) => mode.flush_in = !on,
            (1, 5) => mode.flush_out = !on,
            (1, 6 | 7) => mode.flush_16 = !on,
            (1, 8) => mode.clamp_nan = on,
            (1, 9) => mode.ieee = on,
            (1, 23) => mode.saturate = on,
            _ => return Err(Cause::Unknown(i.text.clone())),
        }
    }
    Ok(())
}

/// The base must be in registers; what is added to it is a constant or a register, and a constant more.
fn load<const N: usize>(c: &mut Cx<'_>, i: &Inst) -> Done {
    let base = c.w.scalar64(i.ops[1])?;
    let offset = match i.ops[2] {
        Operand::Const(k) => i64::from(k.b32 as i32),
        op => i64::from(c.w.scalar32(op)?),
    };
    c.w.require(!0, "the address of a scalar load")?;
    // The hardware drops the low bits of both.
    let address = (base & !3).wrapping_add_signed((offset + i64::from(i.offset)) & !3);
    if base & 3 != 0 || (offset + i64::from(i.offset)) & 3 != 0 {
        return Err(Cause::Misaligned { lane: 0, address: base.wrapping_add_signed(offset), bytes: 4 * N });
    }
    let words = c.env.memory.load_words::<N>(0, address)?;
    put_words(c, i, &words)
}

/// Words beyond the descriptor's records are zero.
fn buffer<const N: usize>(c: &mut Cx<'_>, i: &Inst) -> Done {
    let Operand::S(n) = i.ops[1] else { return Err(Cause::Unknown(i.text.clone())) };
    let base = u64::from(c.w.s(n)?) | u64::from(c.w.s(n + 1)? & 0xffff) << 32;
    let records = u64::from(c.w.s(n + 2)?);
    let offset = u64::from(c.w.scalar32(i.ops[2])?).wrapping_add_signed(i64::from(i.offset)) & !3;
    c.w.require(!0, "the address of a scalar load")?;
    let mut words = [0; N];
    for (k, word) in words.iter_mut().enumerate() {
        let at = offset + 4 * k as u64;
        if at + 4 <= records {
            *word = c.env.memory.load(Access { lane: 0, address: base + at, bytes: 4 })?;
        }
    }
    put_words(c, i, &words)
}

fn put_words(c: &mut Cx<'_>, i: &Inst, words: &[u32]) -> Done {
    let Operand::S(n) = i.ops[0] else { return Err(Cause::Unknown(i.text.clone())) };
    for (k, &word) in words.iter().enumerate() {
        c.w.set_s(n + k as u8, word)?;
    }
    c.w.issue_scalar(Target::S(n, words.len() as u8));
    Ok(())
}
