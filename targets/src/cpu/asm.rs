//! A small assembler for the instructions that Cranelift does not have: 256- and 512-bit vectors.
//!
//! Cranelift's vectors are 128 bits wide, a quarter of what the multipliers of a server core take per cycle. The dot
//! products and the decoding of weights are where the time goes, so their inner loops ([`super::atoms`]) are assembled
//! here, by the same generator for both widths: [`Width::Y`] is encoded with VEX (AVX2), [`Width::Z`] with EVEX (AVX-512).
//!
//! The assembler knows only what the atoms use. An instruction is its [`Op`] (map, prefix, opcode, W bit and the scale of a
//! compressed displacement), a width and operands; which prefix to use follows from the operands.

/// A general register by its number: rax 0, rcx 1, rdx 2, rbx 3, rsp 4, rbp 5, rsi 6, rdi 7, r8 and up.
pub(crate) type Gpr = u8;
pub(crate) const RAX: Gpr = 0;
pub(crate) const RCX: Gpr = 1;
pub(crate) const RDX: Gpr = 2;
pub(crate) const RBX: Gpr = 3;
pub(crate) const RBP: Gpr = 5;
pub(crate) const RSI: Gpr = 6;
pub(crate) const RDI: Gpr = 7;
pub(crate) const R8: Gpr = 8;
pub(crate) const R9: Gpr = 9;
pub(crate) const R10: Gpr = 10;
pub(crate) const R11: Gpr = 11;
pub(crate) const R12: Gpr = 12;
pub(crate) const R13: Gpr = 13;
pub(crate) const R14: Gpr = 14;
pub(crate) const R15: Gpr = 15;

/// Vector length of one instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Width {
    X,
    Y,
    Z,
}

impl Width {
    /// f32 elements in a register.
    pub(crate) const fn lanes(self) -> u32 {
        match self {
            Width::X => 4,
            Width::Y => 8,
            Width::Z => 16,
        }
    }
}

/// `[base + index * scale + disp]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub(crate) base: Gpr,
    pub(crate) index: Option<(Gpr, u8)>,
    pub(crate) disp: i32,
}

/// `[base + disp]`.
pub(crate) fn at(base: Gpr, disp: i32) -> Mem {
    Mem { base, index: None, disp }
}

/// The last operand of a vector instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rm {
    Reg(u8),
    Mem(Mem),
}

impl From<u8> for Rm {
    fn from(r: u8) -> Rm {
        Rm::Reg(r)
    }
}
impl From<Mem> for Rm {
    fn from(m: Mem) -> Rm {
        Rm::Mem(m)
    }
}

/// How an instruction is encoded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    /// 1: 0F, 2: 0F38, 3: 0F3A.
    map: u8,
    /// 0: none, 1: 66, 2: F3, 3: F2.
    pp: u8,
    opcode: u8,
    w: u8,
    /// Bytes of the memory operand of a 512-bit instruction (its compressed displacement counts in these), before scaling
    /// by width when `scales`.
    tuple: u8,
    scales: bool,
}

const fn op(map: u8, pp: u8, opcode: u8, w: u8, tuple: u8, scales: bool) -> Op {
    Op { map, pp, opcode, w, tuple, scales }
}

pub(crate) const MOVUPS_LOAD: Op = op(1, 0, 0x10, 0, 64, true);
pub(crate) const MOVUPS_STORE: Op = op(1, 0, 0x11, 0, 64, true);
pub(crate) const BROADCASTSS: Op = op(2, 1, 0x18, 0, 4, false);
pub(crate) const FMADD231PS: Op = op(2, 1, 0xb8, 0, 64, true);
pub(crate) const ADDPS: Op = op(1, 0, 0x58, 0, 64, true);
pub(crate) const MULPS: Op = op(1, 0, 0x59, 0, 64, true);
pub(crate) const PXOR: Op = op(1, 1, 0xef, 0, 64, true);
pub(crate) const PMOVZXWD: Op = op(2, 1, 0x33, 0, 32, true);
pub(crate) const PMOVZXBW: Op = op(2, 1, 0x30, 0, 32, true);
pub(crate) const PAND: Op = op(1, 1, 0xdb, 0, 64, true);
pub(crate) const POR: Op = op(1, 1, 0xeb, 0, 64, true);
pub(crate) const PADDW: Op = op(1, 1, 0xfd, 0, 64, true);
pub(crate) const PCMPEQW: Op = op(1, 1, 0x75, 0, 64, true);
pub(crate) const PSHIFTW_IMM: Op = op(1, 1, 0x71, 0, 64, true);
pub(crate) const PSHIFTD_IMM: Op = op(1, 1, 0x72, 0, 64, true);
pub(crate) const CVTPH2PS: Op = op(2, 1, 0x13, 0, 32, true);
pub(crate) const EXTRACTF64X4: Op = op(3, 1, 0x1b, 1, 32, false);
pub(crate) const EXTRACTF128: Op = op(3, 1, 0x19, 0, 16, false);
pub(crate) const INSERTF128: Op = op(3, 1, 0x18, 0, 16, false);
pub(crate) const HADDPS: Op = op(1, 3, 0x7c, 0, 64, true);
pub(crate) const UNPCKLPS: Op = op(1, 0, 0x14, 0, 64, true);
pub(crate) const UNPCKHPS: Op = op(1, 0, 0x15, 0, 64, true);
pub(crate) const UNPCKLPD: Op = op(1, 1, 0x14, 1, 64, true);
pub(crate) const UNPCKHPD: Op = op(1, 1, 0x15, 1, 64, true);
pub(crate) const MOVSS_LOAD: Op = op(1, 2, 0x10, 0, 4, false);
pub(crate) const MOVSS_STORE: Op = op(1, 2, 0x11, 0, 4, false);
pub(crate) const MOVSD_LOAD: Op = op(1, 3, 0x10, 1, 8, false);
pub(crate) const MOVSD_STORE: Op = op(1, 3, 0x11, 1, 8, false);
pub(crate) const EXTRACTPS: Op = op(3, 1, 0x17, 0, 4, false);
pub(crate) const INSERTPS: Op = op(3, 1, 0x21, 0, 4, false);
pub(crate) const MASKMOVPS_LOAD: Op = op(2, 1, 0x2c, 0, 64, true);
pub(crate) const MASKMOVPS_STORE: Op = op(2, 1, 0x2e, 0, 64, true);
pub(crate) const SUBPS: Op = op(1, 0, 0x5c, 0, 64, true);
pub(crate) const DIVPS: Op = op(1, 0, 0x5e, 0, 64, true);
pub(crate) const MINPS: Op = op(1, 0, 0x5d, 0, 64, true);
pub(crate) const MAXPS: Op = op(1, 0, 0x5f, 0, 64, true);
pub(crate) const SQRTPS: Op = op(1, 0, 0x51, 0, 64, true);
pub(crate) const FMADD213PS: Op = op(2, 1, 0xa8, 0, 64, true);
pub(crate) const PADDD: Op = op(1, 1, 0xfe, 0, 64, true);
pub(crate) const PSUBD: Op = op(1, 1, 0xfa, 0, 64, true);
pub(crate) const PMULLD: Op = op(2, 1, 0x40, 0, 64, true);
pub(crate) const PMINSD: Op = op(2, 1, 0x39, 0, 64, true);
pub(crate) const PMAXSD: Op = op(2, 1, 0x3d, 0, 64, true);
pub(crate) const PSLLVD: Op = op(2, 1, 0x47, 0, 64, true);
pub(crate) const PSRLVD: Op = op(2, 1, 0x45, 0, 64, true);
pub(crate) const CVTDQ2PS: Op = op(1, 0, 0x5b, 0, 64, true);
pub(crate) const CVTTPS2DQ: Op = op(1, 2, 0x5b, 0, 64, true);
/// To a mask register; the immediate is the predicate.
pub(crate) const CMPPS: Op = op(1, 0, 0xc2, 0, 64, true);
/// To a mask register; the immediate is the predicate.
pub(crate) const PCMPD: Op = op(3, 1, 0x1f, 0, 64, true);
pub(crate) const PMOVM2D: Op = op(2, 2, 0x38, 0, 64, true);
/// Bitwise function of three operands; 0xca is `dst ? vvvv : rm`.
pub(crate) const PTERNLOGD: Op = op(3, 1, 0x25, 0, 64, true);
pub(crate) const PSHUFD: Op = op(1, 1, 0x70, 0, 64, true);
/// Dwords to words or bytes; the register is the source.
pub(crate) const PMOVDW: Op = op(2, 2, 0x33, 0, 32, true);
pub(crate) const PMOVDB: Op = op(2, 2, 0x31, 0, 16, true);
pub(crate) const PMOVZXBD: Op = op(2, 1, 0x31, 0, 16, true);
/// The register is the source; immediate 0 rounds to nearest even.
pub(crate) const CVTPS2PH: Op = op(3, 1, 0x1d, 0, 32, true);
pub(crate) const MOVDQU8_LOAD: Op = op(1, 3, 0x6f, 0, 64, true);
pub(crate) const MOVDQU8_STORE: Op = op(1, 3, 0x7f, 0, 64, true);
pub(crate) const PBROADCASTD: Op = op(2, 1, 0x58, 0, 4, false);

/// Which lanes an EVEX instruction touches.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mask {
    /// The mask register; 0 means all lanes.
    k: u8,
    /// Whether other lanes are cleared instead of kept.
    zeroing: bool,
}

impl Mask {
    const NONE: Mask = Mask { k: 0, zeroing: false };
}

/// A place in the code that jumps may name before it is bound.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Label(usize);

/// Condition of a jump after `sub`/`dec`.
pub(crate) const NOT_ZERO: u8 = 5;
/// Conditions of a jump after `cmp`, unsigned and signed.
pub(crate) const BELOW: u8 = 2;
pub(crate) const ZERO: u8 = 4;
pub(crate) const LESS: u8 = 12;
pub(crate) const GREATER_EQUAL: u8 = 13;
pub(crate) const LESS_EQUAL: u8 = 14;

/// Bytes under construction.
#[derive(Default)]
pub(crate) struct Asm {
    code: Vec<u8>,
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, Label)>,
}

impl Asm {
    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, label) in std::mem::take(&mut self.fixups) {
            let target = self.labels[label.0].expect("every label is bound by the atom that made it");
            let displacement = (target as i64 - (at as i64 + 4)) as i32;
            self.code[at..at + 4].copy_from_slice(&displacement.to_le_bytes());
        }
        self.code
    }

    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    /// A label bound here, on a boundary that suits the fetch of a hot loop.
    pub(crate) fn here_aligned(&mut self) -> Label {
        const NOPS: [&[u8]; 8] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0x00],
            &[0x0f, 0x1f, 0x40, 0x00],
            &[0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
            &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
        ];
        while !self.code.len().is_multiple_of(32) {
            let gap = (32 - self.code.len() % 32).min(7);
            self.code.extend_from_slice(NOPS[gap]);
        }
        let label = self.label();
        self.bind(label);
        label
    }

    pub(crate) fn jump_if(&mut self, condition: u8, target: Label) {
        self.code.extend_from_slice(&[0x0f, 0x80 | condition]);
        self.fixups.push((self.code.len(), target));
        self.code.extend_from_slice(&[0; 4]);
    }

    fn imm32(&mut self, v: i32) {
        self.code.extend_from_slice(&v.to_le_bytes());
    }

    fn rex_w(&mut self, reg: u8, index: u8, base: u8) {
        self.code.push(0x48 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3);
    }

    /// ModRM, SIB and displacement. `unit` is what an 8-bit displacement counts in.
    fn modrm(&mut self, reg: u8, rm: Rm, unit: i32) {
        let reg = (reg & 7) << 3;
        let m = match rm {
            Rm::Reg(r) => return self.code.push(0xc0 | reg | (r & 7)),
            Rm::Mem(m) => m,
        };
        let short = m.disp % unit == 0 && i8::try_from(m.disp / unit).is_ok();
        let mode = match (m.disp, short) {
            (0, _) if m.base & 7 != 5 => 0x00,
            (_, true) => 0x40,
            _ => 0x80,
        };
        match m.index {
            Some((index, scale)) => {
                debug_assert_ne!(index, 4, "rsp is no index");
                self.code.push(mode | reg | 4);
                self.code.push((scale.trailing_zeros() as u8) << 6 | (index & 7) << 3 | (m.base & 7));
            }
            None if m.base & 7 == 4 => {
                self.code.push(mode | reg | 4);
                self.code.push(0x24);
            }
            None => self.code.push(mode | reg | (m.base & 7)),
        }
        match mode {
            0x40 => self.code.push((m.disp / unit) as i8 as u8),
            0x80 => self.imm32(m.disp),
            _ => {}
        }
    }

    /// `op reg, vvvv, rm` with an optional mask register (0: none) that zeroes when `zeroing`.
    fn vector_masked(&mut self, width: Width, op: Op, reg: u8, vvvv: u8, rm: Rm, mask: Mask) {
        let (index, base, rm_high) = match rm {
            Rm::Reg(r) => (r >> 1 & 8, r & 15, r >= 16),
            Rm::Mem(m) => (m.index.map_or(0, |i| i.0), m.base, false),
        };
        let evex = width == Width::Z || reg >= 16 || vvvv >= 16 || rm_high || mask != Mask::NONE;
        if evex {
            self.evex(width, op, reg, vvvv, rm, mask);
        } else {
            // W is ignored or zero in every VEX form used here but those that EVEX alone has.
            let w = if op.map == 3 { op.w } else { 0 };
            let p0 = (!reg >> 3 & 1) << 7 | (!index >> 3 & 1) << 6 | (!base >> 3 & 1) << 5 | op.map;
            let p1 = w << 7 | (!vvvv & 15) << 3 | (width as u8) << 2 | op.pp;
            self.code.extend_from_slice(&[0xc4, p0, p1, op.opcode]);
            self.modrm(reg, rm, 1);
        }
    }

    fn evex(&mut self, width: Width, op: Op, reg: u8, vvvv: u8, rm: Rm, mask: Mask) {
        let (index, base, rm_high) = match rm {
            Rm::Reg(r) => (0, r & 15, r >= 16),
            Rm::Mem(m) => (m.index.map_or(0, |i| i.0), m.base, false),
        };
        let x = if matches!(rm, Rm::Reg(_)) { u8::from(rm_high) } else { index >> 3 };
        let p0 = (!reg >> 3 & 1) << 7 | (x ^ 1) << 6 | (!base >> 3 & 1) << 5 | (!reg >> 4 & 1) << 4 | op.map;
        let p1 = op.w << 7 | (!vvvv & 15) << 3 | 4 | op.pp;
        let p2 = u8::from(mask.zeroing) << 7 | (width as u8) << 5 | (!vvvv >> 4 & 1) << 3 | mask.k;
        self.code.extend_from_slice(&[0x62, p0, p1, p2, op.opcode]);
        let shrink = if op.scales { 2 - width as u8 } else { 0 };
        self.modrm(reg, rm, i32::from(op.tuple >> shrink));
    }

    /// `op reg, vvvv, rm`; two-operand instructions take `vvvv` 0.
    pub(crate) fn v(&mut self, width: Width, op: Op, reg: u8, vvvv: u8, rm: impl Into<Rm>) {
        self.vector_masked(width, op, reg, vvvv, rm.into(), Mask::NONE);
    }

    /// `op reg, vvvv, [label]`, for constants behind the code.
    pub(crate) fn v_const(&mut self, width: Width, op: Op, reg: u8, label: Label) {
        // Encoded with base rbp and no displacement byte it would be `[rbp + disp8]`; mode 0 with base 5 is `[rip + disp32]`.
        self.v(width, op, reg, 0, at(RBP, 0));
        self.code.truncate(self.code.len() - 2);
        self.code.push((reg & 7) << 3 | 5);
        self.fixups.push((self.code.len(), label));
        self.code.extend_from_slice(&[0; 4]);
    }

    /// `op reg, vvvv, [label]` with one dword repeated in all lanes (EVEX only).
    pub(crate) fn v_splat_const(&mut self, op: Op, reg: u8, vvvv: u8, label: Label) {
        self.v_masked_splat_const(op, reg, vvvv, label, 0);
    }

    /// The same under a mask that keeps the register's other lanes.
    pub(crate) fn v_masked_splat_const(&mut self, op: Op, reg: u8, vvvv: u8, label: Label, mask: u8) {
        let start = self.code.len();
        self.evex(Width::Z, op, reg, vvvv, at(RBP, 0).into(), Mask { k: mask, zeroing: false });
        self.code[start + 3] |= 0x10;
        self.code.truncate(self.code.len() - 2);
        self.code.push((reg & 7) << 3 | 5);
        self.fixups.push((self.code.len(), label));
        self.code.extend_from_slice(&[0; 4]);
    }

    /// `op reg{mask}, vvvv, rm`, 512 bits; lanes that the mask excludes keep what `reg` has.
    pub(crate) fn z_merging(&mut self, op: Op, reg: u8, vvvv: u8, rm: impl Into<Rm>, mask: u8) {
        self.evex(Width::Z, op, reg, vvvv, rm.into(), Mask { k: mask, zeroing: false });
    }

    /// Compares into mask register `k`.
    pub(crate) fn z_compare(&mut self, op: Op, k: u8, a: u8, b: u8, predicate: u8) {
        self.evex(Width::Z, op, k, a, b.into(), Mask::NONE);
        self.code.push(predicate);
    }

    /// `k_dst |= k_src`, 16 lanes.
    pub(crate) fn korw(&mut self, dst: u8, src: u8) {
        self.code.extend_from_slice(&[0xc5, 0x80 | (!dst & 15) << 3 | 4, 0x45, 0xc0 | dst << 3 | src]);
    }

    /// `k_dst &= k_src`, 16 lanes.
    pub(crate) fn kandw(&mut self, dst: u8, src: u8) {
        self.code.extend_from_slice(&[0xc5, 0x80 | (!dst & 15) << 3 | 4, 0x41, 0xc0 | dst << 3 | src]);
    }

    /// `k_dst = k_src`, 16 lanes.
    pub(crate) fn kmovk(&mut self, dst: u8, src: u8) {
        self.code.extend_from_slice(&[0xc5, 0xf8, 0x90, 0xc0 | dst << 3 | src]);
    }

    /// Words of two 256-bit registers that are equal, into mask register `k`.
    pub(crate) fn y_compare_words(&mut self, k: u8, a: u8, b: u8) {
        self.evex(Width::Y, PCMPEQW, k, a, b.into(), Mask::NONE);
    }

    /// The dword at `label` into the lanes that the mask names; the others stay.
    pub(crate) fn v_masked_splat_const_load(&mut self, reg: u8, label: Label, mask: u8) {
        let start = self.code.len();
        self.evex(Width::Z, BROADCASTSS, reg, 0, at(RBP, 0).into(), Mask { k: mask, zeroing: false });
        debug_assert_eq!(self.code.len() - start, 7);
        self.code.truncate(self.code.len() - 2);
        self.code.push((reg & 7) << 3 | 5);
        self.fixups.push((self.code.len(), label));
        self.code.extend_from_slice(&[0; 4]);
    }

    /// `k =` the lowest `count` bits set, up to 64; clobbers `temp`.
    pub(crate) fn k_low_bits(&mut self, k: u8, count: Gpr, temp: Gpr) {
        // or temp, -1; bzhi temp, temp, count; kmovq k, temp
        self.rex_w(0, 0, temp);
        self.code.push(0x83);
        self.modrm(1, Rm::Reg(temp), 1);
        self.code.push(0xff);
        let p0 = (!temp >> 3 & 1) << 7 | 0x40 | (!temp >> 3 & 1) << 5 | 2;
        self.code.extend_from_slice(&[0xc4, p0, 0x80 | (!count & 15) << 3, 0xf5]);
        self.modrm(temp, Rm::Reg(temp), 1);
        let p0 = 0x80 | 0x40 | (!temp >> 3 & 1) << 5 | 1;
        self.code.extend_from_slice(&[0xc4, p0, 0xfb, 0x92, 0xc0 | k << 3 | (temp & 7)]);
    }

    /// `dst &= imm`, 64 bits.
    pub(crate) fn and_imm(&mut self, dst: Gpr, imm: i8) {
        self.rex_w(0, 0, dst);
        self.code.push(0x83);
        self.modrm(4, Rm::Reg(dst), 1);
        self.code.push(imm as u8);
    }

    /// `dst = src * imm`, 64 bits.
    pub(crate) fn imul_imm(&mut self, dst: Gpr, src: Gpr, imm: i32) {
        self.rex_w(dst, 0, src);
        self.code.push(0x69);
        self.modrm(dst, Rm::Reg(src), 1);
        self.imm32(imm);
    }

    /// Clears a mask register.
    pub(crate) fn kclear(&mut self, k: u8) {
        self.code.extend_from_slice(&[0xc5, 0x80 | (!k & 15) << 3 | 4, 0x47, 0xc0 | k << 3 | k]);
    }

    /// Moves a mask register's 16 lanes to a general register.
    pub(crate) fn kmovw_out(&mut self, r: Gpr, k: u8) {
        let p0 = (!r >> 3 & 1) << 7 | 0x60 | 1;
        self.code.extend_from_slice(&[0xc4, p0, 0x78, 0x93, 0xc0 | (r & 7) << 3 | k]);
    }

    /// Sets the flags by `r32`, for [`NOT_ZERO`].
    pub(crate) fn test32(&mut self, r: Gpr) {
        debug_assert!(r < 8);
        self.code.extend_from_slice(&[0x85, 0xc0 | r << 3 | r]);
    }

    /// 64-bit load.
    pub(crate) fn load64(&mut self, dst: Gpr, m: Mem) {
        self.rex_w(dst, m.index.map_or(0, |i| i.0), m.base);
        self.code.push(0x8b);
        self.modrm(dst, m.into(), 1);
    }

    /// `dst += [m]`, 64 bits.
    pub(crate) fn add_mem(&mut self, dst: Gpr, m: Mem) {
        self.rex_w(dst, m.index.map_or(0, |i| i.0), m.base);
        self.code.push(0x03);
        self.modrm(dst, m.into(), 1);
    }

    /// `dst -= src`, 64 bits.
    pub(crate) fn sub(&mut self, dst: Gpr, src: Gpr) {
        self.rex_w(src, 0, dst);
        self.code.push(0x29);
        self.modrm(src, Rm::Reg(dst), 1);
    }

    /// `[m] += imm`, 32 bits.
    pub(crate) fn add_mem32_imm(&mut self, m: Mem, imm: i32) {
        debug_assert!(m.base < 8 && m.index.is_none());
        self.code.push(0x81);
        self.modrm(0, m.into(), 1);
        self.imm32(imm);
    }

    /// Compares with a constant, for [`BELOW`].
    pub(crate) fn cmp_imm(&mut self, r: Gpr, imm: i32) {
        self.rex_w(0, 0, r);
        self.code.push(0x81);
        self.modrm(7, Rm::Reg(r), 1);
        self.imm32(imm);
    }

    /// Bytes that are data.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// The same with an 8-bit immediate.
    pub(crate) fn vi(&mut self, width: Width, op: Op, reg: u8, vvvv: u8, rm: impl Into<Rm>, imm: u8) {
        self.v(width, op, reg, vvvv, rm);
        self.code.push(imm);
    }

    /// A load that leaves zero where the mask register is clear.
    pub(crate) fn v_zeroing(&mut self, width: Width, op: Op, reg: u8, rm: Mem, mask: u8) {
        self.vector_masked(width, op, reg, 0, rm.into(), Mask { k: mask, zeroing: true });
    }

    /// A store that leaves memory alone where the mask register is clear.
    pub(crate) fn v_merging(&mut self, width: Width, op: Op, reg: u8, rm: Mem, mask: u8) {
        self.vector_masked(width, op, reg, 0, rm.into(), Mask { k: mask, zeroing: false });
    }

    /// `dst = src << imm` (or another shift by its `/digit`) of words or dwords.
    pub(crate) fn shift(&mut self, width: Width, op: Op, digit: u8, dst: u8, src: u8, imm: u8) {
        self.vi(width, op, digit, dst, src, imm);
    }

    /// Clears a register of any number.
    pub(crate) fn zero(&mut self, r: u8) {
        if r < 16 {
            self.v(Width::X, PXOR, r, r, r);
        } else {
            self.v(Width::Z, PXOR, r, r, r);
        }
    }

    /// `k = low bits of r32`.
    pub(crate) fn kmovw(&mut self, k: u8, r: Gpr) {
        let p0 = 0xc0 | (!r >> 3 & 1) << 5 | 1;
        self.code.extend_from_slice(&[0xc4, p0, 0x78, 0x92, 0xc0 | k << 3 | (r & 7)]);
    }

    pub(crate) fn vzeroupper(&mut self) {
        self.code.extend_from_slice(&[0xc5, 0xf8, 0x77]);
    }

    pub(crate) fn mov(&mut self, dst: Gpr, src: Gpr) {
        self.rex_w(src, 0, dst);
        self.code.push(0x89);
        self.modrm(src, Rm::Reg(dst), 1);
    }

    pub(crate) fn mov_imm(&mut self, dst: Gpr, imm: u32) {
        if dst >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0xb8 | (dst & 7));
        self.imm32(imm as i32);
    }

    pub(crate) fn add(&mut self, dst: Gpr, src: Gpr) {
        self.rex_w(src, 0, dst);
        self.code.push(0x01);
        self.modrm(src, Rm::Reg(dst), 1);
    }

    pub(crate) fn add_imm(&mut self, dst: Gpr, imm: i32) {
        self.rex_w(0, 0, dst);
        if let Ok(short) = i8::try_from(imm) {
            self.code.push(0x83);
            self.modrm(0, Rm::Reg(dst), 1);
            self.code.push(short as u8);
        } else {
            self.code.push(0x81);
            self.modrm(0, Rm::Reg(dst), 1);
            self.imm32(imm);
        }
    }

    /// Subtracts one and sets the flags for [`NOT_ZERO`].
    pub(crate) fn dec(&mut self, dst: Gpr) {
        self.rex_w(0, 0, dst);
        self.code.push(0x83);
        self.modrm(5, Rm::Reg(dst), 1);
        self.code.push(1);
    }

    pub(crate) fn lea(&mut self, dst: Gpr, m: Mem) {
        self.rex_w(dst, m.index.map_or(0, |i| i.0), m.base);
        self.code.push(0x8d);
        self.modrm(dst, m.into(), 1);
    }

    /// 32-bit load.
    pub(crate) fn load32(&mut self, dst: Gpr, m: Mem) {
        self.code.push(0x40 | (dst >> 3) << 2 | (m.index.map_or(0, |i| i.0) >> 3) << 1 | m.base >> 3);
        self.code.push(0x8b);
        self.modrm(dst, m.into(), 1);
    }

    /// 16-bit load into the upper half of a 32-bit register.
    pub(crate) fn load16_high(&mut self, dst: Gpr, m: Mem) {
        self.code.push(0x40 | (dst >> 3) << 2 | (m.index.map_or(0, |i| i.0) >> 3) << 1 | m.base >> 3);
        self.code.extend_from_slice(&[0x0f, 0xb7]);
        self.modrm(dst, m.into(), 1);
        self.code.push(0x40 | dst >> 3);
        self.code.push(0xc1);
        self.modrm(4, Rm::Reg(dst), 1);
        self.code.push(16);
    }

    /// 32-bit store.
    pub(crate) fn store32(&mut self, m: Mem, src: Gpr) {
        self.code.push(0x40 | (src >> 3) << 2 | (m.index.map_or(0, |i| i.0) >> 3) << 1 | m.base >> 3);
        self.code.push(0x89);
        self.modrm(src, m.into(), 1);
    }

    pub(crate) fn push(&mut self, r: Gpr) {
        if r >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0x50 | (r & 7));
    }

    pub(crate) fn pop(&mut self, r: Gpr) {
        if r >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0x58 | (r & 7));
    }

    pub(crate) fn ret(&mut self) {
        self.code.push(0xc3);
    }
}
