//! A wave: registers, what was ever written of them, loads under way, and how instructions read and write them.

use crate::decode::{AGPR, EXEC, Operand, VCC};
use crate::fault::Cause;
use crate::lds::{Done, Who};
use crate::object::Mode;
use std::collections::VecDeque;

/// A vector register: one word of each lane.
pub type Lanes = [u32; 64];
/// Two registers: one double word of each lane.
pub type Lanes64 = [u64; 64];

/// Registers that a load under way will write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Vector registers.
    V(u16, u16),
    /// Scalar registers.
    S(u8, u8),
    /// None: a store, or a load to LDS.
    Nothing,
}

/// An access that a counter counts.
#[derive(Clone, Copy, Debug)]
struct Outstanding {
    target: Target,
    /// Number of it among the wave's, 0 for scalar loads.
    seq: u32,
}

/// What a wave does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The next instruction.
    Running,
    /// It waits at a barrier.
    Barrier,
    /// Nothing.
    Ended,
}

/// A wave of 64 lanes.
#[derive(Debug)]
pub struct Wave {
    /// Its number in the block.
    pub id: u8,
    /// Vector registers, then AGPRs.
    pub v: Vec<Lanes>,
    /// Lanes of each that were written.
    v_known: Vec<u64>,
    /// Loads under way to each.
    v_pending: Vec<u8>,
    /// How many vector registers and AGPRs there are.
    limits: (u16, u16),
    s: [u32; 128],
    /// Bits of each that were written: masks of lanes may have some that were not.
    s_known: [u32; 128],
    s_pending: u128,
    /// The scalar condition, none if nothing set it.
    pub scc: Option<bool>,
    /// Index of the next instruction.
    pub pc: usize,
    /// Rounding, denormals, clamping.
    pub mode: Mode,
    /// What it does next.
    pub state: State,
    /// Barriers passed.
    pub epoch: u32,
    vm: VecDeque<Outstanding>,
    lds: VecDeque<Outstanding>,
    scalar: Vec<Outstanding>,
    issued: Done,
    /// What waits have covered.
    pub done: Done,
    /// Lanes for which all sources of the instruction so far were written.
    pub known: u64,
    /// Lanes that the instruction may write, beside EXEC.
    pub mask: u64,
    /// Memory of each lane, word by word.
    pub scratch: Vec<Lanes>,
    /// Whether each word of it was written, by lane.
    pub scratch_known: Vec<u64>,
}

impl Wave {
    /// A wave with that many vector registers, AGPRs and bytes of scratch a lane.
    pub fn new(id: u8, limits: (u16, u16), scratch_bytes: usize, mode: Mode) -> Wave {
        let all = usize::from(AGPR + limits.1);
        Wave {
            id,
            v: vec![[0xdead_beef; 64]; all],
            v_known: vec![0; all],
            v_pending: vec![0; all],
            limits,
            s: [0xdead_beef; 128],
            s_known: std::array::from_fn(|n| if n >= EXEC as usize { !0 } else { 0 }),
            s_pending: 0,
            scc: None,
            pc: 0,
            mode,
            state: State::Running,
            epoch: 0,
            vm: VecDeque::new(),
            lds: VecDeque::new(),
            scalar: Vec::new(),
            issued: Done::default(),
            done: Done::default(),
            known: !0,
            mask: !0,
            scratch: vec![[0xdead_beef; 64]; scratch_bytes.div_ceil(4)],
            scratch_known: vec![0; scratch_bytes.div_ceil(4)],
        }
    }

    /// Sets a scalar register before the first instruction.
    pub fn preset_s(&mut self, n: usize, value: u32) {
        self.s[n] = value;
        self.s_known[n] = !0;
    }

    /// Sets a vector register before the first instruction.
    pub fn preset_v(&mut self, n: usize, value: Lanes) {
        self.v[n] = value;
        self.v_known[n] = !0;
    }

    /// The active lanes.
    #[inline(always)]
    pub fn exec(&self) -> u64 {
        u64::from(self.s[EXEC as usize]) | u64::from(self.s[EXEC as usize + 1]) << 32
    }

    /// Who accesses LDS, as one more access that lgkmcnt counts, or vmcnt if it is a load to LDS.
    pub fn who(&self, direct: bool) -> Who {
        let seq = 1 + if direct { self.issued.vm } else { self.issued.lgkm };
        Who { wave: self.id, epoch: self.epoch, seq, done: self.done }
    }

    // Scalar registers.

    #[inline(always)]
    fn check_s(&self, n: u8) -> Result<(), Cause> {
        if self.s_pending >> n & 1 != 0 {
            return Err(Cause::Pending(scalar_name(n)));
        }
        Ok(())
    }

    /// A scalar register. One that was never written makes the instruction's result unknown.
    #[inline(always)]
    pub fn s(&mut self, n: u8) -> Result<u32, Cause> {
        self.check_s(n)?;
        if self.s_known[n as usize] != !0 {
            self.known = 0;
        }
        Ok(self.s[n as usize])
    }

    /// Writes a scalar register; it is known if all that the instruction read was.
    #[inline(always)]
    pub fn set_s(&mut self, n: u8, value: u32) -> Result<(), Cause> {
        self.set_bits(n, value, if self.known != 0 { !0 } else { 0 })
    }

    /// Writes a scalar register of which these bits are known.
    #[inline(always)]
    pub fn set_bits(&mut self, n: u8, value: u32, known: u32) -> Result<(), Cause> {
        self.check_s(n)?;
        self.s[n as usize] = value;
        self.s_known[n as usize] = known;
        if n >= EXEC && known != !0 {
            return Err(Cause::Undefined("what EXEC is set to".into()));
        }
        Ok(())
    }

    /// As [`set_bits`](Wave::set_bits), of a pair.
    #[inline(always)]
    pub fn set_bits64(&mut self, n: u8, value: u64, known: u64) -> Result<(), Cause> {
        self.set_bits(n, value as u32, known as u32)?;
        self.set_bits(n + 1, (value >> 32) as u32, (known >> 32) as u32)
    }

    /// A scalar operand and which of its bits are known.
    #[inline(always)]
    pub fn bits32(&mut self, op: Operand) -> Result<(u32, u32), Cause> {
        if let Operand::S(n) = op {
            self.check_s(n)?;
            return Ok((self.s[n as usize], self.s_known[n as usize]));
        }
        let before = std::mem::replace(&mut self.known, !0);
        let value = self.scalar32(op)?;
        let known = std::mem::replace(&mut self.known, before);
        Ok((value, if known == !0 { !0 } else { 0 }))
    }

    /// As [`bits32`](Wave::bits32), of 64 bits.
    #[inline(always)]
    pub fn bits64(&mut self, op: Operand) -> Result<(u64, u64), Cause> {
        match op {
            Operand::S(n) => {
                let (low, high) = (self.bits32(op)?, self.bits32(Operand::S(n + 1))?);
                Ok((u64::from(low.0) | u64::from(high.0) << 32, u64::from(low.1) | u64::from(high.1) << 32))
            }
            Operand::Const(c) => Ok((c.b64, !0)),
            _ => self.bits32(op).map(|(v, k)| (u64::from(v), if k == !0 { !0 } else { 0 })),
        }
    }

    /// As [`set_s`](Wave::set_s), of a pair.
    #[inline(always)]
    pub fn set_s64(&mut self, n: u8, value: u64) -> Result<(), Cause> {
        self.set_s(n, value as u32)?;
        self.set_s(n + 1, (value >> 32) as u32)
    }

    /// A scalar operand.
    #[inline(always)]
    pub fn scalar32(&mut self, op: Operand) -> Result<u32, Cause> {
        Ok(match op {
            Operand::S(n) => self.s(n)?,
            Operand::Const(c) => c.b32,
            Operand::Scc => u32::from(self.condition()?),
            Operand::ExecZ => u32::from(self.exec() == 0),
            Operand::VccZ => {
                let (value, known) = self.bits64(Operand::S(VCC))?;
                if known != !0 && value & known == 0 {
                    self.known = 0;
                }
                u32::from(value & known == 0)
            }
            Operand::V(_) | Operand::None => return Err(Cause::Unknown("a scalar operand of this kind".into())),
        })
    }

    /// A scalar operand of 64 bits.
    #[inline(always)]
    pub fn scalar64(&mut self, op: Operand) -> Result<u64, Cause> {
        Ok(match op {
            Operand::S(n) => u64::from(self.s(n)?) | u64::from(self.s(n + 1)?) << 32,
            Operand::Const(c) => c.b64,
            _ => u64::from(self.scalar32(op)?),
        })
    }

    /// SCC.
    pub fn condition(&mut self) -> Result<bool, Cause> {
        if self.scc.is_none() {
            self.known = 0;
        }
        Ok(self.scc.unwrap_or(false))
    }

    /// Sets SCC to what the instruction found, if what it read was known.
    #[inline(always)]
    pub fn set_scc(&mut self, value: bool) {
        self.scc = (self.known != 0).then_some(value);
    }

    /// Fails if anything read since the last reset was never written in the lanes.
    #[inline(always)]
    pub fn require(&self, lanes: u64, what: &str) -> Result<(), Cause> {
        if self.known & lanes != lanes {
            let lane = (lanes & !self.known).trailing_zeros();
            return Err(Cause::Undefined(format!("{what} (lane {lane})")));
        }
        Ok(())
    }

    // Vector registers.

    #[inline(always)]
    fn check_v(&self, n: u16) -> Result<(), Cause> {
        let outside = if n < AGPR { n >= self.limits.0 } else { n - AGPR >= self.limits.1 };
        if outside {
            return Err(Cause::Register(vector_name(n)));
        }
        if self.v_pending[n as usize] != 0 {
            return Err(Cause::Pending(vector_name(n)));
        }
        Ok(())
    }

    /// A vector register.
    #[inline(always)]
    pub fn v(&mut self, n: u16) -> Result<&Lanes, Cause> {
        self.check_v(n)?;
        self.known &= self.v_known[n as usize];
        Ok(&self.v[n as usize])
    }

    /// The lanes of a register that were written.
    pub fn v_known(&self, n: u16) -> u64 {
        self.v_known.get(n as usize).copied().unwrap_or(0)
    }

    /// An operand for each lane, before modifiers.
    #[inline(always)]
    pub fn raw32(&mut self, op: Operand) -> Result<Lanes, Cause> {
        match op {
            Operand::V(n) => self.v(n).copied(),
            _ => Ok([self.scalar32(op)?; 64]),
        }
    }

    /// Writes the active lanes that may be written.
    #[inline(always)]
    pub fn set_v(&mut self, n: u16, value: &Lanes) -> Result<(), Cause> {
        let mask = self.exec() & self.mask;
        self.set_v_lanes(n, value, mask)
    }

    /// Writes the lanes of a mask.
    #[inline(always)]
    pub fn set_v_lanes(&mut self, n: u16, value: &Lanes, mask: u64) -> Result<(), Cause> {
        self.check_v(n)?;
        let known = &mut self.v_known[n as usize];
        *known = *known & !mask | mask & self.known;
        let to = &mut self.v[n as usize];
        if mask == !0 {
            *to = *value;
        } else {
            for l in 0..64 {
                if mask >> l & 1 != 0 {
                    to[l] = value[l];
                }
            }
        }
        Ok(())
    }

    /// Writes what a load of global memory brings. Such loads return in their order, so it may follow others to the same register that
    /// are under way and that nobody waits for.
    pub fn set_loaded(&mut self, n: u16, value: &Lanes) -> Result<(), Cause> {
        let held = self.v_pending.get_mut(n as usize).map_or(0, std::mem::take);
        let to_it =
            |o: &&Outstanding| matches!(o.target, Target::V(first, count) if (first..first + count).contains(&n));
        if held != 0 && usize::from(held) != self.vm.iter().filter(to_it).count() {
            return Err(Cause::Pending(vector_name(n)));
        }
        let done = self.set_v(n, value);
        if let Some(pending) = self.v_pending.get_mut(n as usize) {
            *pending = held;
        }
        done
    }

    /// Writes one lane, whether active or not.
    pub fn set_lane(&mut self, n: u16, lane: usize, value: u32) -> Result<(), Cause> {
        self.check_v(n)?;
        self.v[n as usize][lane] = value;
        let bit = 1 << lane;
        let known = &mut self.v_known[n as usize];
        *known = if self.known != 0 { *known | bit } else { *known & !bit };
        Ok(())
    }

    // Loads under way.

    fn hold(&mut self, target: Target) {
        match target {
            Target::V(n, count) => self.v_pending[n as usize..(n + count) as usize].iter_mut().for_each(|p| *p += 1),
            Target::S(n, count) => self.s_pending |= ((1 << count) - 1) << n,
            Target::Nothing => {}
        }
    }

    fn release(&mut self, target: Target) {
        match target {
            Target::V(n, count) => self.v_pending[n as usize..(n + count) as usize].iter_mut().for_each(|p| *p -= 1),
            Target::S(n, count) => self.s_pending &= !(((1 << count) - 1) << n),
            Target::Nothing => {}
        }
    }

    /// An access that vmcnt counts.
    pub fn issue_vm(&mut self, target: Target) {
        self.hold(target);
        self.issued.vm += 1;
        self.vm.push_back(Outstanding { target, seq: self.issued.vm });
    }

    /// An access of LDS, which lgkmcnt counts.
    pub fn issue_lds(&mut self, target: Target) {
        self.hold(target);
        self.issued.lgkm += 1;
        self.lds.push_back(Outstanding { target, seq: self.issued.lgkm });
    }

    /// A scalar load, which lgkmcnt counts and which returns in any order.
    pub fn issue_scalar(&mut self, target: Target) {
        self.hold(target);
        self.scalar.push(Outstanding { target, seq: 0 });
    }

    /// Waits until at most so many are under way.
    pub fn wait(&mut self, vm: usize, lgkm: usize) {
        while self.vm.len() > vm {
            let Some(o) = self.vm.pop_front() else { break };
            self.release(o.target);
            self.done.vm = o.seq;
        }
        // Scalar loads may be what is left of a count above 0.
        while self.lds.len() > lgkm {
            let Some(o) = self.lds.pop_front() else { break };
            self.release(o.target);
            self.done.lgkm = o.seq;
        }
        if lgkm == 0 {
            for o in std::mem::take(&mut self.scalar) {
                self.release(o.target);
            }
        }
    }
}

/// `v3` or `a3`.
pub fn vector_name(n: u16) -> String {
    if n < AGPR { format!("v{n}") } else { format!("a{}", n - AGPR) }
}

fn scalar_name(n: u8) -> String {
    match n {
        VCC => "vcc_lo".into(),
        107 => "vcc_hi".into(),
        124 => "m0".into(),
        126 => "exec_lo".into(),
        127 => "exec_hi".into(),
        _ => format!("s{n}"),
    }
}
