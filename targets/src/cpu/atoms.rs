//! Atoms: the inner loops of dot products and weight decoding, as straight machine code.
//!
//! An atom is a leaf routine of static sizes, called by the code that Cranelift makes. Operands are rows at any byte
//! distance, so weights are read where they lie in memory. All sums are taken in one fixed order.
//!
//! * [`Atom::GemmNn`]: `c (+)= a · b`, `b` given as `[k, n]`. A block of rows by vectors of columns stays in registers (12 x 2
//!   of 32 registers, or 6 x 2 of 16); each step of `k` loads the vectors of `b` once and broadcasts one element a row. That
//!   is 24 multiply-adds for 14 loads, so the two multipliers are the limit and not the two load ports. Few rows take more
//!   vectors each, so that there are still enough independent sums to hide the latency of 4 cycles.
//! * [`Atom::GemmNt`]: `b` given as `[n, k]`, both operands contiguous along `k`: the sums run along `k` and are added across
//!   lanes at the end. No rearranging, which is right for few rows (decode): the weights are read once, in order, and
//!   decoded from bf16, f16 or e4m3 on the way.
//! * [`Atom::Pack`]: rearranges `[n, k]` into panels `[n / P][k][P]` for [`Atom::GemmNn`], which pays from a dozen rows on.
//! * [`Atom::Cast`]: decodes rows of bf16, f16 or e4m3 to f32.
//!
//! e4m3 is decoded without f32 denormals (each costs ~150 cycles): shifted into place the code is the f16 of 1/256 of the
//! value, subnormal exactly where the code is, and the f16 conversion takes those at full speed. Code 0x7f becomes NaN by a
//! compare.

use super::asm::*;
use dsc_ir::DType;

/// A leaf routine by what it computes; equal atoms share one copy in a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Atom {
    /// `fn(a, lda, b, ldb, c, ldc)`. `zero`: `c` is written, not added to.
    GemmNn { m: u32, n: u32, k: u32, b: Right, zero: bool },
    /// `fn(a, lda, b, ldb, c, ldc)`.
    GemmNt { m: u32, n: u32, k: u32, b: DType, zero: bool },
    /// `fn(dst, src, ld_src)`. `from` is f32 or bf16.
    Pack { n: u32, k: u32, from: DType },
    /// `fn(dst, ld_dst, src, ld_src)`.
    Cast { rows: u32, cols: u32, from: DType },
}

/// The right operand of [`Atom::GemmNn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Right {
    /// Panels as [`Atom::Pack`] makes them; `ldb` is not used.
    Packed,
    /// Rows of f32, bf16 or f16.
    Rows(DType),
}

/// Lanes of a packed panel, for vectors of `width`.
pub(crate) fn panel_lanes(width: Width) -> u32 {
    2 * width.lanes()
}

/// Bytes of `[n, k]` in panels.
pub(crate) fn packed_bytes(width: Width, n: u32, k: u32) -> u64 {
    u64::from(n.div_ceil(panel_lanes(width)) * panel_lanes(width)) * u64::from(k) * 4
}

/// Whether [`Atom::GemmNt`] and [`Atom::Cast`] can decode rows of `cols` elements of `from`.
pub(crate) fn decodes(width: Width, from: DType, cols: u32) -> bool {
    match from {
        DType::F32 => true,
        DType::Bf16 | DType::F16 | DType::E4m3 => width == Width::Z || cols.is_multiple_of(width.lanes()),
        DType::I32 | DType::Bool => false,
    }
}

/// The code of an atom.
pub(crate) fn assemble(atom: Atom, width: Width) -> Vec<u8> {
    let mut g = Gen { a: Asm::default(), w: width, consts: Vec::new() };
    match atom {
        Atom::GemmNn { m, n, k, b, zero } => Nn::new(width, [m, n, k], b, zero).emit(&mut g),
        Atom::GemmNt { m, n, k, b, zero } => Nt::new(width, m, n, k, b, zero).emit(&mut g),
        Atom::Pack { n, k, from } => emit_pack(&mut g, n, k, from),
        Atom::Cast { rows, cols, from } => emit_cast(&mut g, rows, cols, from),
    }
    g.finish()
}

const SAVED: [Gpr; 6] = [RBX, RBP, R12, R13, R14, R15];
/// Mask register that holds the lanes of a partial vector.
const K_TAIL: u8 = 1;

struct Gen {
    a: Asm,
    w: Width,
    consts: Vec<(Label, Vec<u8>)>,
}

impl Gen {
    fn finish(mut self) -> Vec<u8> {
        for (label, bytes) in self.consts {
            self.a.bind(label);
            self.a.data(&bytes);
        }
        self.a.finish()
    }

    fn prologue(&mut self) {
        for r in SAVED {
            self.a.push(r);
        }
    }

    fn epilogue(&mut self) {
        self.a.vzeroupper();
        for r in SAVED.into_iter().rev() {
            self.a.pop(r);
        }
        self.a.ret();
    }

    /// `body` `count` times, counted in `counter`; nothing is counted for one.
    fn repeat(&mut self, counter: Gpr, count: u32, body: impl FnOnce(&mut Gen)) {
        match count {
            0 => {}
            1 => body(self),
            _ => {
                self.a.mov_imm(counter, count);
                let top = self.a.here_aligned();
                body(self);
                self.a.dec(counter);
                self.a.jump_if(NOT_ZERO, top);
            }
        }
    }

    fn constant(&mut self, bytes: Vec<u8>) -> Label {
        let label = self.a.label();
        self.consts.push((label, bytes));
        label
    }

    /// Every word of the register `r` of half the width.
    fn splat_words(&mut self, r: u8, word: u16) {
        let label = self.constant([word.to_le_bytes(), word.to_le_bytes()].concat());
        self.a.v_const(half(self.w), PBROADCASTD, r, label);
    }

    fn splat_f32(&mut self, width: Width, r: u8, x: f32) {
        let label = self.constant(x.to_le_bytes().to_vec());
        self.a.v_const(width, BROADCASTSS, r, label);
    }

    /// Prepares partial vectors of `lanes`: a mask register, or a vector of masks in `r`.
    fn set_tail(&mut self, r: u8, lanes: u32) {
        if self.w == Width::Z {
            self.a.mov_imm(RAX, (1 << lanes) - 1);
            self.a.kmovw(K_TAIL, RAX);
        } else {
            let bytes = (0..self.w.lanes()).flat_map(|i| (if i < lanes { -1i32 } else { 0 }).to_le_bytes()).collect();
            let label = self.constant(bytes);
            self.a.v_const(self.w, MOVUPS_LOAD, r, label);
        }
    }

    fn load(&mut self, r: u8, m: Mem, tail: Option<u8>) {
        match (tail, self.w) {
            (None, w) => self.a.v(w, MOVUPS_LOAD, r, 0, m),
            (Some(_), Width::Z) => self.a.v_zeroing(Width::Z, MOVUPS_LOAD, r, m, K_TAIL),
            (Some(mask), w) => self.a.v(w, MASKMOVPS_LOAD, r, mask, m),
        }
    }

    fn store(&mut self, m: Mem, r: u8, tail: Option<u8>) {
        match (tail, self.w) {
            (None, w) => self.a.v(w, MOVUPS_STORE, r, 0, m),
            (Some(_), Width::Z) => self.a.v_merging(Width::Z, MOVUPS_STORE, r, m, K_TAIL),
            (Some(mask), w) => self.a.v(w, MASKMOVPS_STORE, r, mask, m),
        }
    }

    /// The constants that [`Gen::decode`] wants for `from`.
    fn decode_constants(&mut self, from: DType, regs: &DecodeRegs) {
        if from == DType::E4m3 {
            self.splat_words(regs.magnitude, 0x3f80);
            self.splat_words(regs.sign, 0x4000);
        }
    }

    /// A vector of `from` at `m` as f32 in `r`; e4m3 comes out as 1/256 of its value.
    fn decode(&mut self, from: DType, r: u8, m: Mem, tail: Option<u8>, regs: &DecodeRegs) {
        let (w, h) = (self.w, half(self.w));
        let mut load = |width, op| match tail {
            Some(_) => self.a.v_zeroing(width, op, r, m, K_TAIL),
            None => self.a.v(width, op, r, 0, m),
        };
        match from {
            DType::Bf16 => {
                load(w, PMOVZXWD);
                self.a.shift(w, PSHIFTD_IMM, 6, r, r, 16);
            }
            DType::F16 => load(w, CVTPH2PS),
            DType::E4m3 => {
                load(h, PMOVZXBW);
                let (nan, sign) = (regs.temp, regs.temp2);
                self.a.shift(h, PSHIFTW_IMM, 6, r, r, 7);
                self.a.v(h, PAND, nan, r, regs.magnitude);
                self.a.v(h, PAND, sign, r, regs.sign);
                self.a.v(h, PCMPEQW, nan, nan, regs.magnitude);
                self.a.v(h, PADDW, r, r, sign);
                self.a.v(h, POR, r, r, nan);
                self.a.v(w, CVTPH2PS, r, 0, r);
            }
            _ => self.load(r, m, tail),
        }
    }
}

/// Registers that decoding e4m3 uses.
struct DecodeRegs {
    magnitude: u8,
    sign: u8,
    temp: u8,
    temp2: u8,
}

fn half(w: Width) -> Width {
    if w == Width::Z { Width::Y } else { Width::X }
}

/// `[base of row]` for rows three apart on successive base registers: row `r` is `bases[r / 3] + (r % 3) * ld`.
fn row(bases: &[Gpr], ld: Gpr, r: u32, disp: i32) -> Mem {
    let index = match r % 3 {
        0 => None,
        s => Some((ld, s as u8)),
    };
    Mem { base: bases[r as usize / 3], index, disp }
}

/// Fills `bases[1..]` so that [`row`] reaches `rows` rows.
fn set_bases(a: &mut Asm, bases: &[Gpr], ld: Gpr, rows: u32) {
    for i in 1..rows.div_ceil(3) as usize {
        a.lea(bases[i], Mem { base: bases[i - 1], index: Some((ld, 2)), disp: 0 });
        a.add(bases[i], ld);
    }
}

/// The `[k, n]` form.
struct Nn {
    w: Width,
    m: u32,
    n: u32,
    k: u32,
    packed: bool,
    b: DType,
    zero: bool,
    /// Rows and vectors of a register block.
    rows: u32,
    vectors: u32,
}

impl Nn {
    const A: [Gpr; 4] = [R11, R12, R13, R14];

    fn new(w: Width, [m, n, k]: [u32; 3], right: Right, zero: bool) -> Nn {
        let (packed, b) = match right {
            Right::Packed => (true, DType::F32),
            Right::Rows(b) => (false, b),
        };
        let (most, vectors) = match (w, m) {
            _ if packed => (if w == Width::Z { 12 } else { 6 }, 2),
            (Width::Z, 1 | 2) => (2, 8),
            (Width::Z, 3 | 4) => (4, 4),
            (Width::Z, 5..=8) => (8, 3),
            (Width::Z, _) => (12, 2),
            (_, 1) => (1, 8),
            (_, 2) => (2, 4),
            _ => (6, 2),
        };
        let rows = m.div_ceil(m.div_ceil(most));
        Nn { w, m, n, k, packed, b, zero, rows, vectors }
    }

    fn lanes(&self) -> u32 {
        self.w.lanes()
    }

    fn acc(&self, r: u32, v: u32, vectors: u32) -> u8 {
        let first = if self.w == Width::Z { 8 } else { 4 };
        (first + r * vectors + v) as u8
    }

    fn emit(&self, g: &mut Gen) {
        let (panel, mask) = (self.vectors * self.lanes(), 3);
        g.prologue();
        if !self.n.is_multiple_of(self.lanes()) {
            g.set_tail(mask, self.n % self.lanes());
        }
        g.repeat(RBX, self.n / panel, |g| {
            self.panel(g, self.vectors, None);
            g.a.add_imm(R8, (panel * 4) as i32);
            let row_bytes = panel * self.b.bytes() as u32;
            let step = if self.packed { self.k * panel_lanes(self.w) * 4 } else { row_bytes };
            g.a.add_imm(RDX, step as i32);
        });
        let rest = self.n % panel;
        if rest != 0 {
            let tail = (!rest.is_multiple_of(self.lanes())).then_some(mask);
            self.panel(g, rest.div_ceil(self.lanes()), tail);
        }
        g.epilogue();
    }

    fn panel(&self, g: &mut Gen, vectors: u32, tail: Option<u8>) {
        g.a.mov(R11, RDI);
        g.a.mov(R15, R8);
        g.repeat(RBP, self.m / self.rows, |g| self.block(g, self.rows, vectors, tail));
        if !self.m.is_multiple_of(self.rows) {
            self.block(g, self.m % self.rows, vectors, tail);
        }
    }

    /// One register block; leaves `R11` and `R15` at the next one.
    fn block(&self, g: &mut Gen, rows: u32, vectors: u32, tail: Option<u8>) {
        let (a, ldb, lda, ldc) = (&Self::A, RCX, RSI, R9);
        let bytes = (self.lanes() * 4) as i32;
        let tail_of = |v: u32| if v + 1 == vectors { tail } else { None };
        g.a.mov(R10, RDX);
        set_bases(&mut g.a, a, lda, rows);
        if !self.zero {
            g.a.mov(RAX, R15);
        }
        for r in 0..rows {
            for v in 0..vectors {
                let acc = self.acc(r, v, vectors);
                if self.zero {
                    g.a.zero(acc);
                } else {
                    g.load(acc, at(RAX, v as i32 * bytes), tail_of(v));
                }
            }
            if !self.zero {
                g.a.add(RAX, ldc);
            }
        }
        let unroll = if rows * vectors > 12 { 2 } else { 4 }.min(self.k);
        let rounds = self.k / unroll;
        let pitch = (panel_lanes(self.w) * 4) as i32;
        let b_vector = (self.lanes() * self.b.bytes() as u32) as i32;
        let step = |g: &mut Gen, u: u32| {
            let b = |v: u32| at(R10, v as i32 * b_vector + if self.packed { u as i32 * pitch } else { 0 });
            let b_tail = |v: u32| if self.packed { None } else { tail_of(v) };
            // Loading bf16 and f16 takes no constants.
            let decode = |g: &mut Gen, v: u32, x: u8| g.decode(self.b, x, b(v), b_tail(v), &Nt::DECODE);
            if vectors <= 3 && (rows > 4 || vectors <= 2) {
                for v in 0..vectors {
                    decode(g, v, v as u8);
                }
                for r in 0..rows {
                    let x = match self.w {
                        Width::Z => (vectors + r % (8 - vectors)) as u8,
                        _ => 2,
                    };
                    g.a.v(self.w, BROADCASTSS, x, 0, row(a, lda, r, u as i32 * 4));
                    for v in 0..vectors {
                        g.a.v(self.w, FMADD231PS, self.acc(r, v, vectors), x, v as u8);
                    }
                }
            } else {
                for r in 0..rows {
                    g.a.v(self.w, BROADCASTSS, r as u8, 0, row(a, lda, r, u as i32 * 4));
                }
                for v in 0..vectors {
                    let x = if self.w == Width::Z { 4 + (v % 4) as u8 } else { 2 };
                    decode(g, v, x);
                    for r in 0..rows {
                        g.a.v(self.w, FMADD231PS, self.acc(r, v, vectors), r as u8, x);
                    }
                }
            }
            if !self.packed {
                g.a.add(R10, ldb);
            }
        };
        let advance = |g: &mut Gen| {
            for &base in &a[..rows.div_ceil(3) as usize] {
                g.a.add_imm(base, unroll as i32 * 4);
            }
            if self.packed {
                g.a.add_imm(R10, unroll as i32 * pitch);
            }
        };
        g.repeat(RAX, rounds, |g| {
            for u in 0..unroll {
                step(g, u);
            }
            advance(g);
        });
        for u in 0..self.k % unroll {
            step(g, u);
        }
        for r in 0..rows {
            for v in 0..vectors {
                g.store(at(R15, v as i32 * bytes), self.acc(r, v, vectors), tail_of(v));
            }
            g.a.add(R15, ldc);
        }
        next_rows(&mut g.a, a, lda, rows, (rounds * unroll * 4) as i32);
    }
}

/// Moves `bases[0]` to the row after the block, and back by the `advanced` bytes of its walk along the row.
fn next_rows(a: &mut Asm, bases: &[Gpr], ld: Gpr, rows: u32, advanced: i32) {
    let last = rows.div_ceil(3) - 1;
    let left = rows - 3 * last;
    let scale = if left == 1 { 1 } else { 2 };
    a.lea(bases[0], Mem { base: bases[last as usize], index: Some((ld, scale)), disp: -advanced });
    if left == 3 {
        a.add(bases[0], ld);
    }
}

/// The `[n, k]` form.
struct Nt {
    w: Width,
    m: u32,
    n: u32,
    k: u32,
    b: DType,
    zero: bool,
    rows: u32,
    cols: u32,
}

impl Nt {
    const A: [Gpr; 2] = [R11, R14];
    const B: [Gpr; 3] = [R10, R12, R13];
    /// Registers below the accumulators: rows of `a`, then one vector of `b` and what decoding needs.
    const X: u8 = 4;
    const DECODE: DecodeRegs = DecodeRegs { magnitude: 6, sign: 7, temp: 5, temp2: 3 };
    const MASK: u8 = 6;
    const FIRST_ACC: u32 = 8;

    fn new(w: Width, m: u32, n: u32, k: u32, b: DType, zero: bool) -> Nt {
        let (rows, cols) = match (w, m, b) {
            (Width::Z, 1..=3, _) => (m, 8),
            (Width::Z, _, DType::E4m3) => (3, 8),
            (Width::Z, _, _) => (4, 6),
            (_, 1, _) => (1, 8),
            _ => (2, 4),
        };
        Nt { w, m, n, k, b, zero, rows, cols }
    }

    fn emit(&self, g: &mut Gen) {
        let ldb = RCX;
        g.prologue();
        let tail = self.k % self.w.lanes();
        if tail != 0 {
            g.set_tail(Self::MASK, tail);
        }
        g.decode_constants(self.b, &Self::DECODE);
        g.repeat(RBX, self.n / self.cols, |g| {
            self.panel(g, self.cols);
            g.a.add_imm(R8, (self.cols * 4) as i32);
            // R12/R13 still name rows of this panel, but where along the row is not known: step from its base.
            for _ in 0..self.cols / 2 {
                g.a.lea(RDX, Mem { base: RDX, index: Some((ldb, 2)), disp: 0 });
            }
        });
        if !self.n.is_multiple_of(self.cols) {
            self.panel(g, self.n % self.cols);
        }
        g.epilogue();
    }

    fn panel(&self, g: &mut Gen, cols: u32) {
        g.a.mov(R11, RDI);
        g.a.mov(R15, R8);
        g.repeat(RBP, self.m / self.rows, |g| self.block(g, self.rows, cols));
        if !self.m.is_multiple_of(self.rows) {
            self.block(g, self.m % self.rows, cols);
        }
    }

    fn acc(r: u32, c: u32, cols: u32) -> u8 {
        (Self::FIRST_ACC + r * cols + c) as u8
    }

    fn block(&self, g: &mut Gen, rows: u32, cols: u32) {
        let (lda, ldb, lanes) = (RSI, RCX, self.w.lanes());
        let b_bytes = self.b.bytes() as u32;
        g.a.mov(R10, RDX);
        set_bases(&mut g.a, &Self::B, ldb, cols);
        set_bases(&mut g.a, &Self::A, lda, rows);
        for r in 0..rows {
            for c in 0..cols {
                g.a.zero(Self::acc(r, c, cols));
            }
        }
        let step = |g: &mut Gen, u: u32, tail: Option<u8>| {
            for r in 0..rows {
                g.load(r as u8, row(&Self::A, lda, r, (u * lanes * 4) as i32), tail);
            }
            for c in 0..cols {
                let m = row(&Self::B, ldb, c, (u * lanes * b_bytes) as i32);
                if rows == 1 && self.b == DType::F32 && tail.is_none() {
                    g.a.v(self.w, FMADD231PS, Self::acc(0, c, cols), 0, m);
                    continue;
                }
                g.decode(self.b, Self::X, m, tail, &Self::DECODE);
                for r in 0..rows {
                    g.a.v(self.w, FMADD231PS, Self::acc(r, c, cols), r as u8, Self::X);
                }
            }
        };
        let vectors = self.k / lanes;
        let unroll = 2.min(vectors.max(1));
        let rounds = vectors / unroll;
        g.repeat(RAX, rounds, |g| {
            for u in 0..unroll {
                step(g, u, None);
            }
            for &base in &Self::A[..rows.div_ceil(3) as usize] {
                g.a.add_imm(base, (unroll * lanes * 4) as i32);
            }
            for &base in &Self::B[..cols.div_ceil(3) as usize] {
                g.a.add_imm(base, (unroll * lanes * b_bytes) as i32);
            }
        });
        let rest = vectors % unroll;
        for u in 0..rest {
            step(g, u, None);
        }
        if !self.k.is_multiple_of(lanes) {
            step(g, rest, Some(Self::MASK));
        }
        for r in 0..rows {
            self.finish_row(g, r, cols);
        }
        next_rows(&mut g.a, &Self::A, lda, rows, (rounds * unroll * lanes * 4) as i32);
    }

    /// Adds the lanes of each sum of a row and puts them into `c`; leaves `R15` at the next row.
    fn finish_row(&self, g: &mut Gen, r: u32, cols: u32) {
        let ldc = R9;
        for first in (0..cols).step_by(4) {
            let count = (cols - first).min(4);
            for i in 0..count {
                let (acc, x) = (Self::acc(r, first + i, cols), i as u8);
                if self.w == Width::Z {
                    g.a.vi(Width::Z, EXTRACTF64X4, acc, 0, 4, 1);
                    g.a.v(Width::Y, ADDPS, x, 4, acc);
                    g.a.vi(Width::Y, EXTRACTF128, x, 0, 4, 1);
                    g.a.v(Width::X, ADDPS, x, x, 4);
                } else {
                    g.a.vi(Width::Y, EXTRACTF128, acc, 0, 4, 1);
                    g.a.v(Width::X, ADDPS, x, acc, 4);
                }
            }
            let pick = |i: u8| if u32::from(i) < count { i } else { 0 };
            g.a.v(Width::X, HADDPS, 4, pick(0), pick(1));
            g.a.v(Width::X, HADDPS, 5, pick(2), pick(3));
            g.a.v(Width::X, HADDPS, 0, 4, 5);
            if self.b == DType::E4m3 {
                g.splat_f32(Width::X, 4, 256.0);
                g.a.v(Width::X, MULPS, 0, 0, 4);
            }
            let c = |disp: u32| at(R15, ((first + disp) * 4) as i32);
            if !self.zero {
                match count {
                    4 => g.a.v(Width::X, MOVUPS_LOAD, 1, 0, c(0)),
                    1 => g.a.v(Width::X, MOVSS_LOAD, 1, 0, c(0)),
                    _ => g.a.v(Width::X, MOVSD_LOAD, 1, 0, c(0)),
                }
                if count == 3 {
                    g.a.vi(Width::X, INSERTPS, 1, 1, c(2), 0x20);
                }
                g.a.v(Width::X, ADDPS, 0, 0, 1);
            }
            match count {
                4 => g.a.v(Width::X, MOVUPS_STORE, 0, 0, c(0)),
                1 => g.a.v(Width::X, MOVSS_STORE, 0, 0, c(0)),
                _ => g.a.v(Width::X, MOVSD_STORE, 0, 0, c(0)),
            }
            if count == 3 {
                g.a.vi(Width::X, EXTRACTPS, 0, 0, c(2), 2);
            }
        }
        g.a.add(R15, ldc);
    }
}

fn emit_pack(g: &mut Gen, n: u32, k: u32, from: DType) {
    let panel = panel_lanes(g.w);
    g.prologue();
    if from == DType::Bf16 {
        let label = g.constant(0xffff_0000u32.to_le_bytes().to_vec());
        g.a.v_const(g.w, PBROADCASTD, PACK_MASK, label);
    }
    g.repeat(RBX, n / panel, |g| pack_panel(g, panel, k, from));
    if !n.is_multiple_of(panel) {
        pack_panel(g, n % panel, k, from);
    }
    g.epilogue();
}

/// Register that keeps the upper halves of dwords.
const PACK_MASK: u8 = 15;

/// One panel of `rows` rows; leaves `RSI` at the next rows and `RDI` at the next panel.
fn pack_panel(g: &mut Gen, rows: u32, k: u32, from: DType) {
    let (lanes, pitch) = (g.w.lanes(), (panel_lanes(g.w) * 4) as i32);
    for group in 0..rows.div_ceil(lanes) {
        let valid = (rows - group * lanes).min(lanes);
        pack_rows(g, valid, k, from, (group * lanes * 4) as i32, pitch);
        for _ in 0..lanes / 8 {
            g.a.lea(RSI, Mem { base: RSI, index: Some((RDX, 8)), disp: 0 });
        }
    }
    g.a.add_imm(RDI, k as i32 * pitch);
}

/// Transposes a vector's worth of rows. Rows that do not exist repeat the last one: their columns are never stored.
///
/// bf16 is transposed in pairs, as if a dword were one element; then the lower halves are the even columns and the upper ones the
/// odd, each an f32 once the other half is cleared.
fn pack_rows(g: &mut Gen, valid: u32, k: u32, from: DType, column: i32, pitch: i32) {
    const BASES: [Gpr; 6] = [R10, R11, R12, R13, R14, R15];
    let (w, lanes, ld) = (g.w, g.w.lanes(), RDX);
    let pairs = from == DType::Bf16;
    let chunk = if pairs { 8 } else { 4 };
    g.a.mov(R10, RSI);
    set_bases(&mut g.a, &BASES, ld, valid);
    g.a.mov(RCX, RDI);
    let source = |r: u32, disp: i32| row(&BASES, ld, r.min(valid - 1), disp);
    g.repeat(RAX, k / chunk, |g| {
        // Register r holds rows r, r + 4, r + 8, .. side by side, four dwords each; a 4 x 4 transposition in each 128 bits
        // then gives the columns.
        for r in 0..4 {
            let x = r as u8;
            g.a.v(Width::X, MOVUPS_LOAD, x, 0, source(r, 0));
            for quarter in 1..lanes / 4 {
                g.a.vi(w, INSERTF128, x, x, source(r + 4 * quarter, 0), quarter as u8);
            }
        }
        g.a.v(w, UNPCKLPS, 4, 0, 1);
        g.a.v(w, UNPCKHPS, 5, 0, 1);
        g.a.v(w, UNPCKLPS, 6, 2, 3);
        g.a.v(w, UNPCKHPS, 7, 2, 3);
        g.a.v(w, UNPCKLPD, 8, 4, 6);
        g.a.v(w, UNPCKHPD, 9, 4, 6);
        g.a.v(w, UNPCKLPD, 10, 5, 7);
        g.a.v(w, UNPCKHPD, 11, 5, 7);
        for j in 0..4i32 {
            let x = 8 + j as u8;
            if pairs {
                g.a.shift(w, PSHIFTD_IMM, 6, 12, x, 16);
                g.a.v(w, PAND, x, x, PACK_MASK);
                g.a.v(w, MOVUPS_STORE, 12, 0, at(RCX, column + 2 * j * pitch));
                g.a.v(w, MOVUPS_STORE, x, 0, at(RCX, column + (2 * j + 1) * pitch));
            } else {
                g.a.v(w, MOVUPS_STORE, x, 0, at(RCX, column + j * pitch));
            }
        }
        for &base in &BASES[..valid.div_ceil(3) as usize] {
            g.a.add_imm(base, 16);
        }
        g.a.add_imm(RCX, chunk as i32 * pitch);
    });
    for j in 0..(k % chunk) as i32 {
        for r in 0..valid {
            if pairs {
                g.a.load16_high(RAX, source(r, j * 2));
            } else {
                g.a.load32(RAX, source(r, j * 4));
            }
            g.a.store32(at(RCX, column + j * pitch + r as i32 * 4), RAX);
        }
    }
}

fn emit_cast(g: &mut Gen, rows: u32, cols: u32, from: DType) {
    const REGS: DecodeRegs = DecodeRegs { magnitude: 6, sign: 7, temp: 5, temp2: 3 };
    const SCALE: u8 = 8;
    let (w, lanes, bytes) = (g.w, g.w.lanes(), from.bytes() as u32);
    let vectors = cols / lanes;
    let unroll = 2.min(vectors.max(1));
    g.prologue();
    if !cols.is_multiple_of(lanes) {
        g.set_tail(0, cols % lanes);
    }
    g.decode_constants(from, &REGS);
    if from == DType::E4m3 {
        g.splat_f32(w, SCALE, 256.0);
    }
    let step = |g: &mut Gen, u: u32, tail: Option<u8>| {
        let r = 1 + (u % 2) as u8;
        g.decode(from, r, at(R10, (u * lanes * bytes) as i32), tail, &REGS);
        if from == DType::E4m3 {
            g.a.v(w, MULPS, r, r, SCALE);
        }
        g.store(at(R11, (u * lanes * 4) as i32), r, tail);
    };
    g.repeat(RBX, rows, |g| {
        g.a.mov(R10, RDX);
        g.a.mov(R11, RDI);
        g.repeat(RAX, vectors / unroll, |g| {
            for u in 0..unroll {
                step(g, u, None);
            }
            g.a.add_imm(R10, (unroll * lanes * bytes) as i32);
            g.a.add_imm(R11, (unroll * lanes * 4) as i32);
        });
        for u in 0..vectors % unroll {
            step(g, u, None);
        }
        if !cols.is_multiple_of(lanes) {
            step(g, vectors % unroll, Some(0));
        }
        g.a.add(RDX, RCX);
        g.a.add(RDI, RSI);
    });
    g.epilogue();
}

/// `fn(dst, ld_dst, src, ld_src, rows, row_bytes)` in 512 bits: four registers at a time, then one, then what is left under
/// a mask. The rows do not overlap.
pub(crate) fn assemble_copy() -> Vec<u8> {
    let mut a = Asm::default();
    emit_copy(&mut a);
    a.finish()
}

fn emit_copy(a: &mut Asm) {
    let (dst, ld_dst, src, ld_src, rows, bytes) = (RDI, RSI, RDX, RCX, R8, R9);
    let (to, from, left) = (R10, R11, RAX);
    let (done, row_done) = (a.label(), a.label());
    a.cmp_imm(rows, 0);
    a.jump_if(LESS_EQUAL, done);
    a.mov(left, bytes);
    a.and_imm(left, 63);
    a.k_low_bits(K_TAIL, left, to);
    let row_start = a.here_aligned();
    a.mov(to, dst);
    a.mov(from, src);
    a.mov(left, bytes);
    for registers in [4, 1] {
        let length = registers * 64;
        let end = a.label();
        a.cmp_imm(left, length);
        a.jump_if(LESS, end);
        let top = a.here_aligned();
        for r in 0..registers {
            a.v(Width::Z, MOVUPS_LOAD, r as u8, 0, at(from, r * 64));
        }
        for r in 0..registers {
            a.v(Width::Z, MOVUPS_STORE, r as u8, 0, at(to, r * 64));
        }
        a.add_imm(to, length);
        a.add_imm(from, length);
        a.add_imm(left, -length);
        a.cmp_imm(left, length);
        a.jump_if(GREATER_EQUAL, top);
        a.bind(end);
    }
    a.cmp_imm(left, 0);
    a.jump_if(ZERO, row_done);
    a.v_zeroing(Width::Z, MOVDQU8_LOAD, 0, at(from, 0), K_TAIL);
    a.v_merging(Width::Z, MOVDQU8_STORE, 0, at(to, 0), K_TAIL);
    a.bind(row_done);
    a.add(dst, ld_dst);
    a.add(src, ld_src);
    a.dec(rows);
    a.jump_if(NOT_ZERO, row_start);
    a.bind(done);
    a.vzeroupper();
    a.ret();
}
