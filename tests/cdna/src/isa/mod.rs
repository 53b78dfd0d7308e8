//! What instructions do, a file a family. Each family's `find` gives the function that executes a mnemonic and a number for it.

mod atomics;
mod bits;
mod buffer;
mod compare;
mod control;
mod convert;
mod cross;
mod ds;
mod float;
mod global;
mod half;
mod integer;
mod matrix;
mod minifloat;
mod packed;
mod scalar;

use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use crate::lanes::Unused;
use crate::lds::Lds;
use crate::memory::Memory;
use crate::object::Chip;
use crate::wave::{Lanes, Lanes64, Wave};

/// What an instruction comes to.
pub type Done = Result<(), Cause>;
/// Executes an instruction.
pub type Handler = fn(&mut Cx<'_>, &Inst) -> Done;

/// What is the same for all waves of a launch.
#[derive(Debug)]
pub struct Env<'a> {
    /// Global memory.
    pub memory: &'a Memory,
    /// The chip.
    pub chip: Chip,
    /// Where the code object is mapped.
    pub image: u64,
    /// Addresses of instructions in the code object, rising.
    pub addresses: &'a [u64],
}

/// What an instruction works on.
#[derive(Debug)]
pub struct Cx<'a> {
    /// The wave.
    pub w: &'a mut Wave,
    /// Its block's memory.
    pub lds: &'a mut Lds,
    /// The launch.
    pub env: &'a Env<'a>,
}

/// The function that executes a mnemonic, and what tells it apart from others that this function executes.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let plain = |f: Handler| (f, 0);
    if name.starts_with("s_") {
        return control::find(name).or_else(|| scalar::find(name)).map(plain).or_else(|| scalar::find_compare(name));
    }
    if let Some(rest) = name.strip_prefix("ds_") {
        return atomics::find_ds(rest).or_else(|| cross::find_ds(name).map(plain)).or_else(|| ds::find(rest));
    }
    if name.starts_with("buffer_") {
        return buffer::find(name);
    }
    if ["global_", "flat_", "scratch_"].iter().any(|p| name.starts_with(p)) {
        return atomics::find_global(name).or_else(|| global::find(name));
    }
    if name.starts_with("v_mfma") {
        return matrix::find(name);
    }
    if name.starts_with("v_cmp") {
        return compare::find(name);
    }
    let families =
        [integer::find, bits::find, float::find, half::find, convert::find, minifloat::find, packed::find, cross::find];
    families.iter().find_map(|f| f(name)).map(plain)
}

/// Lanes of which a function is computed.
#[inline(always)]
pub fn map1<A: Copy, R: Copy + Default>(a: &[A; 64], f: impl Fn(A) -> R) -> [R; 64] {
    let mut out = [R::default(); 64];
    for l in 0..64 {
        out[l] = f(a[l]);
    }
    out
}

/// As [`map1`].
#[inline(always)]
pub fn map2<A: Copy, B: Copy, R: Copy + Default>(a: &[A; 64], b: &[B; 64], f: impl Fn(A, B) -> R) -> [R; 64] {
    let mut out = [R::default(); 64];
    for l in 0..64 {
        out[l] = f(a[l], b[l]);
    }
    out
}

/// As [`map1`].
#[inline(always)]
pub fn map3<A: Copy, B: Copy, C: Copy, R: Copy + Default>(
    a: &[A; 64],
    b: &[B; 64],
    c: &[C; 64],
    f: impl Fn(A, B, C) -> R,
) -> [R; 64] {
    let mut out = [R::default(); 64];
    for l in 0..64 {
        out[l] = f(a[l], b[l], c[l]);
    }
    out
}

/// Bits of lanes for which a predicate holds.
#[inline(always)]
pub fn ballot(f: impl Fn(usize) -> bool) -> u64 {
    let mut bits = 0;
    for l in 0..64 {
        bits |= u64::from(f(l)) << l;
    }
    bits
}

impl Cx<'_> {
    /// Operand `k` of vector arithmetic: DPP and SDWA applied, no arithmetic modifiers.
    #[inline(always)]
    pub fn b32(&mut self, i: &Inst, k: usize) -> Result<Lanes, Cause> {
        if i.dpp.is_none() && i.sdwa.is_none() {
            return self.w.raw32(i.ops[k]);
        }
        self.exchanged(i, k)
    }

    /// An operand of an instruction with DPP or SDWA.
    #[inline(never)]
    fn exchanged(&mut self, i: &Inst, k: usize) -> Result<Lanes, Cause> {
        if let Some(dpp) = i.dpp.as_ref().filter(|_| k == i.first) {
            let before = std::mem::replace(&mut self.w.known, !0);
            let value = self.w.raw32(i.ops[k])?;
            let valid = dpp.valid(self.w.exec());
            let known = dpp.permute_bits(self.w.known, valid);
            self.w.known = before & known;
            self.w.mask &= dpp.writes;
            if !dpp.zero {
                self.w.mask &= valid;
            }
            return Ok(dpp.permute(&value, valid));
        }
        let value = self.w.raw32(i.ops[k])?;
        Ok(match &i.sdwa {
            Some(sdwa) if k == i.first || k == i.first + 1 => map1(&value, |v| sdwa.extract(k - i.first, v)),
            _ => value,
        })
    }

    /// Operand `k` as words, without DPP or SDWA.
    #[inline(always)]
    pub fn raw(&mut self, i: &Inst, k: usize) -> Result<Lanes, Cause> {
        self.w.raw32(i.ops[k])
    }

    /// Operand `k` of 64 bits, integers.
    #[inline(always)]
    pub fn b64(&mut self, i: &Inst, k: usize) -> Result<Lanes64, Cause> {
        match i.ops[k] {
            Operand::V(n) => {
                let low = *self.w.v(n)?;
                let high = *self.w.v(n + 1)?;
                Ok(map2(&low, &high, |l, h| u64::from(l) | u64::from(h) << 32))
            }
            op => Ok([self.w.scalar64(op)?; 64]),
        }
    }

    /// Operand `k` as f32, with its modifiers and the mode.
    #[inline(always)]
    pub fn f32(&mut self, i: &Inst, k: usize) -> Result<[f32; 64], Cause> {
        let mut v = self.b32(i, k)?;
        if (i.abs | i.neg) >> k & 1 != 0 {
            let (keep, flip) = masks(i, k, 0x7fff_ffff, 0x8000_0000);
            v = map1(&v, |x| x & keep ^ flip);
        }
        let out = map1(&v, f32::from_bits);
        Ok(if self.w.mode.flush_in { map1(&out, flush) } else { out })
    }

    /// Operand `k` as f64, with its modifiers.
    #[inline(always)]
    pub fn f64(&mut self, i: &Inst, k: usize) -> Result<[f64; 64], Cause> {
        let mut v = match i.ops[k] {
            Operand::Const(c) => [c.f64; 64],
            _ => self.b64(i, k)?,
        };
        if (i.abs | i.neg) >> k & 1 != 0 {
            let keep = if i.abs >> k & 1 != 0 { !0 >> 1 } else { !0 };
            let flip = if i.negated(k) { 1 << 63 } else { 0 };
            v = map1(&v, |x| x & keep ^ flip);
        }
        Ok(map1(&v, f64::from_bits))
    }

    /// Writes words to operand `k`.
    #[inline(always)]
    pub fn put(&mut self, i: &Inst, k: usize, value: &Lanes) -> Done {
        let Operand::V(n) = i.ops[k] else { return Err(Cause::Unknown(format!("{} (its destination)", i.text))) };
        match &i.sdwa {
            None => self.w.set_v(n, value),
            Some(sdwa) => {
                let old = self.w.v[n as usize];
                if sdwa.unused == Unused::Preserve {
                    let known = self.w.v_known(n);
                    self.w.known &= known;
                }
                let value = map2(&old, value, |o, v| sdwa.insert(o, v));
                self.w.set_v(n, &value)
            }
        }
    }

    /// Writes double words to operand `k`.
    #[inline(always)]
    pub fn put64(&mut self, i: &Inst, k: usize, value: &Lanes64) -> Done {
        let Operand::V(n) = i.ops[k] else { return Err(Cause::Unknown(format!("{} (its destination)", i.text))) };
        self.w.set_v(n, &map1(value, |v| v as u32))?;
        self.w.set_v(n + 1, &map1(value, |v| (v >> 32) as u32))
    }

    /// Writes f32 to operand `k`: factor, clamp and the mode applied.
    #[inline(always)]
    pub fn put_f32(&mut self, i: &Inst, k: usize, mut value: [f32; 64]) -> Done {
        if i.omod != 1.0 {
            value = map1(&value, |x| x * i.omod);
        }
        if i.flags.clamp {
            let nan = if self.w.mode.clamp_nan { 0.0 } else { f32::NAN };
            value = map1(&value, |x| if x.is_nan() { nan } else { x.clamp(0.0, 1.0) });
        }
        if self.w.mode.flush_out {
            value = map1(&value, flush);
        }
        self.put(i, k, &map1(&value, f32::to_bits))
    }

    /// Writes f64 to operand `k`.
    #[inline(always)]
    pub fn put_f64(&mut self, i: &Inst, k: usize, mut value: [f64; 64]) -> Done {
        if i.omod != 1.0 {
            value = map1(&value, |x| x * f64::from(i.omod));
        }
        if i.flags.clamp {
            value = map1(&value, |x| if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) });
        }
        self.put64(i, k, &map1(&value, f64::to_bits))
    }

    /// Writes a mask of lanes to scalar operand `k`: what inactive lanes have is 0.
    #[inline(always)]
    pub fn put_mask(&mut self, i: &Inst, k: usize, bits: u64) -> Done {
        let exec = self.w.exec();
        match i.ops[k] {
            Operand::S(n) => self.w.set_bits64(n, bits & exec, self.w.known | !exec),
            _ => Err(Cause::Unknown(format!("{} (its scalar destination)", i.text))),
        }
    }

    /// A mask of lanes that scalar operand `k` is; lanes whose bit was never written become unknown.
    #[inline(always)]
    pub fn mask(&mut self, i: &Inst, k: usize) -> Result<u64, Cause> {
        let (value, known) = self.w.bits64(i.ops[k])?;
        self.w.known &= known;
        Ok(value)
    }

    /// A function of one word.
    #[inline(always)]
    pub fn unary(&mut self, i: &Inst, f: impl Fn(u32) -> u32) -> Done {
        let a = self.b32(i, 1)?;
        self.put(i, 0, &map1(&a, f))
    }

    /// A function of two words.
    #[inline(always)]
    pub fn binary(&mut self, i: &Inst, f: impl Fn(u32, u32) -> u32) -> Done {
        let (a, b) = (self.b32(i, 1)?, self.b32(i, 2)?);
        self.put(i, 0, &map2(&a, &b, f))
    }

    /// A function of three words.
    #[inline(always)]
    pub fn ternary(&mut self, i: &Inst, f: impl Fn(u32, u32, u32) -> u32) -> Done {
        let (a, b, c) = (self.b32(i, 1)?, self.b32(i, 2)?, self.b32(i, 3)?);
        self.put(i, 0, &map3(&a, &b, &c, f))
    }
}

/// Denormals as zero.
#[inline(always)]
pub fn flush(x: f32) -> f32 {
    if x.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// What modifiers of source `k` keep and flip.
#[inline(always)]
fn masks(i: &Inst, k: usize, magnitude: u32, sign: u32) -> (u32, u32) {
    (if i.abs >> k & 1 != 0 { magnitude } else { !0 }, if i.negated(k) { sign } else { 0 })
}
