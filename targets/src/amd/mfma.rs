//! Matrix products of a wave by MFMA.
//!
//! Of `D = A · B` the instruction gives lane `l` four rows of column `l mod 16`. The operands change places, so that a lane has four
//! neighbours of one row instead, which is one store.
//!
//! A lane reads 16 bytes of its row in a step of [`STEP_BYTES`]: which `k` an instruction takes is free, as long as both operands agree, so
//! the two halves of the 16 bytes are two instructions where the chip has the narrower ones only. Rows are padded by 16 bytes, which
//! leaves eight neighbouring rows in different banks.
//!
//! CDNA 4 multiplies 128 elements of e4m3 in one instruction, at twice the rate of 32: there two steps of a lane are one operand.
//!
//! A right operand that lies as it is multiplied has a lane's `k` in eight rows. A lane reads four or eight neighbours of each, which are
//! columns of as many instructions; its 16 or 32 columns of their results are neighbours too ([`Atom::Mfma16x64`], [`Atom::Mfma16x128`]).

use super::arch::Arch;
use super::isa::call;
use crate::gpu::emit::Emitter;
use crate::gpu::fragment::Spread;
use crate::gpu::isa::{HeldLeft, Isa, Left, Product};
use crate::gpu::mlir::{Fn, Ty, Val, f32, i32};
use dsc_ir::DType;
use dsc_ir::sched::{Atom, Buffer};

/// Bytes of a row that a step contracts: 16 in each of the four lanes of a row.
pub const STEP_BYTES: u32 = 64;

/// Steps of a product that are written out: a loop of them would wait for its operands in every round.
const STRAIGHT: u32 = 16;

/// Selector of `v_perm` for the upper halves of two words: numbers 0 to 3 are bytes of the second operand, 4 to 7 of the first.
pub const UPPER: i64 = 0x0706_0302;

/// 16 bytes of an operand in registers, as SSA names of what an instruction takes.
type Operand = Vec<String>;

/// `acc + a · b`, for a spread of an atom of 16 rows.
pub fn product(arch: &Arch, e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val> {
    // Products of FNUZ operands are a fourth, so they are summed by themselves.
    let apart = arch.converts(p.dtype);
    let start = if apart { vec![f32(0.0); acc.len()] } else { acc.clone() };
    let sums = sums(arch, e, s, p, start);
    if !apart {
        return sums;
    }
    sums.iter().zip(acc).map(|(&sum, acc)| e.t.f.intrinsic("fma", &[sum, f32(4.0), acc])).collect()
}

/// Whether a left operand can stay in registers: whole steps, written out.
pub fn holds_left(dtype: DType, k: u32) -> bool {
    let bytes = k * dtype.bytes() as u32;
    dtype.bytes() <= 2 && bytes.is_multiple_of(STEP_BYTES) && bytes / STEP_BYTES <= STRAIGHT
}

/// A left operand.
enum Rows<'b> {
    Lines(Lines<'b>),
    Held(&'b HeldLeft),
}

impl Rows<'_> {
    /// The rows' pieces of a step.
    fn read(&self, arch: &Arch, e: &mut Emitter, dtype: DType, at: Val) -> Vec<Operand> {
        let held = match self {
            Rows::Lines(lines) => return lines.read(arch, e, dtype, at),
            Rows::Held(held) => at.int().and_then(|at| held.get(at as usize)),
        };
        if held.is_none() {
            e.fault = Some("an operand is in registers of which a loop would choose".into());
        }
        held.into_iter().flatten().map(|&quad| of_quad(arch, &mut e.t.f, dtype, quad)).collect()
    }
}

/// 16 bytes of a row as what instructions take.
fn of_quad(arch: &Arch, f: &mut Fn, dtype: DType, quad: Val) -> Operand {
    let (quad, ty) = (f.name(quad), operand_type(arch, dtype));
    if arch.cdna4 && dtype.bytes() == 2 {
        let whole = f.op(&format!("llvm.bitcast {quad} : vector<4xf32> to {ty}"), Ty::I32);
        return vec![f.name(whole)];
    }
    let halves = f.op(&format!("llvm.bitcast {quad} : vector<4xf32> to vector<2xi64>"), Ty::I64);
    let halves = f.name(halves);
    (0..2)
        .map(|i| {
            let half = element(f, &halves, i, "vector<2xi64>", Ty::I64);
            let half = f.name(half);
            if dtype == DType::E4m3 {
                return half;
            }
            let half = f.op(&format!("llvm.bitcast {half} : i64 to {ty}"), Ty::I64);
            f.name(half)
        })
        .collect()
}

/// Where a lane reads an operand.
struct Lines<'b> {
    /// First byte of the lane's piece in each block of 16 rows: from here, and as far behind.
    rows: Vec<(Val, u32)>,
    buffer: &'b Buffer,
    /// Byte of the lane's piece in the first step of its row, as a swizzle puts it.
    piece: Val,
    convert: bool,
}

impl<'b> Lines<'b> {
    /// Of an operand that lies along `k`; `d` is its dimension of the result.
    fn along(
        e: &mut Emitter,
        s: &Spread,
        p: &Product<'b>,
        (buffer, d): (&'b Buffer, usize),
        convert: bool,
    ) -> Lines<'b> {
        let (in_row, chunk) = (e.t.f.rem(s.lane, 16), e.t.f.div(s.lane, 16));
        let piece = e.t.f.mul(chunk, i32(16));
        // Blocks begin at multiples of 16 rows, after which swizzles repeat.
        let piece = e.swizzled(buffer, in_row, piece);
        let first = e.t.f.mul(s.warp[d], i32(s.block[d].into()));
        let row = e.t.f.add(first, in_row);
        let ragged = s.block[d] * s.warps[d] > buffer.shape[0];
        let start = |e: &mut Emitter, row: Val| {
            let byte = e.t.f.mul(row, i32(buffer.pitch.into()));
            let byte = e.t.f.add(byte, p.first[d]);
            e.t.f.add(byte, piece)
        };
        let tiles = 0..s.block[d] / 16;
        let rows = if ragged {
            tiles
                .map(|tile| {
                    let row = e.t.f.add(row, i32((tile * 16).into()));
                    let row = e.at_most(row, buffer.shape[0] - 1, true);
                    (start(e, row), buffer.offset)
                })
                .collect()
        } else {
            let start = start(e, row);
            tiles.map(|tile| (start, buffer.offset + tile * 16 * buffer.pitch)).collect()
        };
        Lines { rows, buffer, piece, convert }
    }

    /// The rows' pieces of a step.
    fn read(&self, arch: &Arch, e: &mut Emitter, dtype: DType, at: Val) -> Vec<Operand> {
        let byte = e.t.f.mul(at, i32(STEP_BYTES.into()));
        let by = if self.buffer.swizzle <= STEP_BYTES {
            byte
        } else {
            // The piece has a bit of the swizzle where the step counts.
            let other = e.t.f.bin("xor", self.piece, byte);
            e.t.f.sub(other, self.piece)
        };
        let rows = self.rows.iter();
        rows.map(|&(start, behind)| {
            // What is the same for all blocks first: the rest is part of the instruction.
            let byte = e.t.f.add(start, by);
            let byte = e.t.f.add(byte, i32(behind.into()));
            read(arch, e, dtype, byte, self.convert)
        })
        .collect()
    }
}

fn sums(arch: &Arch, e: &mut Emitter, s: &Spread, p: &Product, acc: Vec<Val>) -> Vec<Val> {
    let Product { dtype, trans_b, .. } = *p;
    let step = STEP_BYTES / dtype.bytes() as u32;
    let convert = p.ready.map(|ready| !ready && arch.converts(dtype));
    let left = match p.a {
        Left::Shared(buffer) => Rows::Lines(Lines::along(e, s, p, (buffer, 0), convert[0])),
        Left::Held(held) => Rows::Held(held),
    };
    let steps = p.k.div_ceil(step);
    if !trans_b {
        return sums_across(arch, e, s, p, &left, acc);
    }
    let right = Rows::Lines(Lines::along(e, s, p, (p.b, 1), convert[1]));
    // Twice the rate, where two steps make one instruction.
    let pairs = arch.cdna4 && dtype == DType::E4m3 && steps.is_multiple_of(2);
    let unit = if pairs { 2 } else { 1 };
    let both = |e: &mut Emitter, lines: &Rows, at: Val| -> Vec<Operand> {
        let at = e.t.f.mul(at, i32(unit.into()));
        let mut operands = lines.read(arch, e, dtype, at);
        if pairs {
            let next = e.t.f.add(at, i32(1));
            let others = lines.read(arch, e, dtype, next);
            operands = operands.iter().zip(&others).map(|(a, b)| vec![join(&mut e.t.f, a, b)]).collect();
        }
        operands
    };
    let multiply = |e: &mut Emitter, acc: &mut [Val], lefts: &[Operand], (gi, right): (usize, &Operand)| {
        for (ri, left) in lefts.iter().enumerate() {
            let registers = [0, 1, 2, 3].map(|i| s.register(ri, gi, i));
            accumulate(arch, e, dtype, (right, left), acc, registers);
        }
    };
    if e.alternating.is_some() {
        let read: Vec<(Vec<Operand>, Vec<Operand>)> =
            (0..steps / unit).map(|at| (both(e, &left, i32(at.into())), both(e, &right, i32(at.into())))).collect();
        e.begin_product();
        let mut acc = acc;
        for (lefts, rights) in &read {
            rights.iter().enumerate().for_each(|right| multiply(e, &mut acc, lefts, right));
        }
        e.end_product();
        return acc;
    }
    e.steps((steps / unit, STRAIGHT), p.atom, acc, |e, acc, at| {
        let (lefts, rights) = (both(e, &left, at), both(e, &right, at));
        rights.iter().enumerate().for_each(|right| multiply(e, acc, &lefts, right));
    })
}

/// Of right operands that lie as they are multiplied.
fn sums_across(arch: &Arch, e: &mut Emitter, s: &Spread, p: &Product, left: &Rows, acc: Vec<Val>) -> Vec<Val> {
    let Product { dtype, b, .. } = *p;
    let bytes = dtype.bytes() as u32;
    let step = STEP_BYTES / bytes;
    let (in_row, chunk) = (e.t.f.rem(s.lane, 16), e.t.f.div(s.lane, 16));
    // Neighbours that a lane reads of a row, and columns of a block.
    let (each, unit) = match p.atom {
        Atom::Mfma16x128 => (8, 128),
        Atom::Mfma16x64 => (4, 64),
        _ => (1, 16),
    };
    // First byte of this lane's column, in its first row of a step.
    let first = e.t.f.mul(s.warp[1], i32(s.block[1].into()));
    let own = e.t.f.mul(in_row, i32(each.into()));
    let column = e.t.f.add(first, own);
    let row = e.t.f.mul(chunk, i32((16 / bytes * b.pitch).into()));
    let columns: Vec<Val> = (0..s.block[1] / unit)
        .map(|tile| {
            let column = e.t.f.add(column, i32((tile * unit).into()));
            let column = e.at_most(column, b.shape[1] - each, s.block[1] * s.warps[1] > b.shape[1]);
            let byte = e.t.f.mul(column, i32(bytes.into()));
            let byte = e.t.f.add(byte, row);
            e.t.f.add(byte, i32(b.offset.into()))
        })
        .collect();
    e.steps((p.k.div_ceil(step), STRAIGHT), p.atom, acc, |e, acc, at| {
        let lefts = left.read(arch, e, dtype, at);
        let b_at = e.t.f.mul(at, i32((step * b.pitch).into()));
        for (gi, &column) in columns.iter().enumerate() {
            let byte = e.t.f.add(column, b_at);
            if each > 1 {
                let rights = read_patch(arch, e, dtype, byte, (b.pitch, each));
                for (ri, left) in lefts.iter().enumerate() {
                    for (j, right) in rights.iter().enumerate() {
                        let registers = [0, 1, 2, 3].map(|i| s.register(ri, gi, i * each + j as u32));
                        accumulate(arch, e, dtype, (right, left), acc, registers);
                    }
                }
                continue;
            }
            let right = read_column(arch, e, dtype, byte, b.pitch);
            for (ri, left) in lefts.iter().enumerate() {
                let registers = [0, 1, 2, 3].map(|i| s.register(ri, gi, i));
                accumulate(arch, e, dtype, (&right, left), acc, registers);
            }
        }
    })
}

/// Two operands of two halves each as one of 32 bytes.
fn join(f: &mut Fn, a: &Operand, b: &Operand) -> String {
    let halves: Vec<&String> = a.iter().chain(b).collect();
    let whole = format!("vector<{}xi64>", halves.len());
    let mut built = f.op(&format!("llvm.mlir.undef : {whole}"), Ty::I64);
    for (i, half) in halves.into_iter().enumerate() {
        let (i, before) = (f.name(i32(i as i64)), f.name(built));
        built = f.op(&format!("llvm.insertelement {half}, {before}[{i} : i32] : {whole}"), Ty::I64);
    }
    let built = f.name(built);
    let words = f.op(&format!("llvm.bitcast {built} : {whole} to vector<8xi32>"), Ty::I32);
    f.name(words)
}

/// The instructions of a step on four of the accumulators.
fn accumulate(
    arch: &Arch,
    e: &mut Emitter,
    dtype: DType,
    (right, left): (&Operand, &Operand),
    acc: &mut [Val],
    registers: [usize; 4],
) {
    let before = registers.map(|r| acc[r]);
    let mut c = pack(&mut e.t.f, &before, "f32");
    // Four pieces of 64 bits joined to one operand, where there were four.
    let whole = dtype == DType::E4m3 && left.len() == 1;
    for (left, right) in left.iter().zip(right) {
        c = if whole {
            multiply_128(&mut e.t.f, right, left, &c)
        } else {
            multiply(arch, &mut e.t.f, dtype, right, left, &c)
        };
    }
    for (i, r) in registers.into_iter().enumerate() {
        acc[r] = element(&mut e.t.f, &c, i, "vector<4xf32>", Ty::F32);
    }
}

/// Eight rows of four or eight 16-bit elements: for each of the columns the lane's neighbours along `k`. One read a row, and the columns are
/// put together from their halves of words.
fn read_patch(arch: &Arch, e: &mut Emitter, dtype: DType, byte: Val, (pitch, columns): (u32, u32)) -> Vec<Operand> {
    const HALVES: [i64; 2] = [0x0504_0100, UPPER];
    let rows: Vec<Vec<Val>> = (0..8)
        .map(|i| {
            let byte = e.t.f.add(byte, i32((i * pitch).into()));
            e.t.load_shared(byte, Ty::I32, columns / 2)
        })
        .collect();
    let ty = operand_type(arch, dtype);
    let words = if arch.cdna4 { 4 } else { 2 };
    (0..columns as usize)
        .map(|column| {
            let pairs: Vec<Val> = rows
                .chunks(2)
                .map(|two| {
                    let (lower, upper) = (two[0][column / 2], two[1][column / 2]);
                    call(&mut e.t.f, "llvm.amdgcn.perm", &[upper, lower, i32(HALVES[column % 2])], Ty::I32)
                })
                .collect();
            let operand = |part: &[Val]| {
                let bits = pack(&mut e.t.f, part, "i32");
                let v = e.t.f.op(&format!("llvm.bitcast {bits} : vector<{words}xi32> to {ty}"), Ty::I32);
                e.t.f.name(v)
            };
            pairs.chunks(words).map(operand).collect()
        })
        .collect()
}

/// The type of an operand of one instruction.
fn operand_type(arch: &Arch, dtype: DType) -> &'static str {
    match (dtype, arch.cdna4) {
        (DType::Bf16, true) => "vector<8xbf16>",
        (DType::Bf16, false) => "vector<4xi16>",
        (DType::F16, true) => "vector<8xf16>",
        (DType::F16, false) => "vector<4xf16>",
        _ => "i64",
    }
}

/// One instruction.
fn multiply(arch: &Arch, f: &mut Fn, dtype: DType, a: &str, b: &str, c: &str) -> String {
    let name = match (dtype, arch.cdna4) {
        (DType::Bf16, true) => "16x16x32.bf16",
        (DType::Bf16, false) => "16x16x16bf16.1k",
        (DType::F16, true) => "16x16x32.f16",
        (DType::F16, false) => "16x16x16f16",
        _ => "16x16x32.fp8.fp8",
    };
    let ty = operand_type(arch, dtype);
    let zero = f.name(i32(0));
    let d = f.op(
        &format!(
            "llvm.call_intrinsic \"llvm.amdgcn.mfma.f32.{name}\"({a}, {b}, {c}, {zero}, {zero}, {zero}) : \
             ({ty}, {ty}, vector<4xf32>, i32, i32, i32) -> vector<4xf32>"
        ),
        Ty::F32,
    );
    f.name(d)
}

/// The instruction for 128 elements of e4m3: scales of one, which is what a scale that is the constant 0 selects.
fn multiply_128(f: &mut Fn, a: &str, b: &str, c: &str) -> String {
    let zero = f.name(i32(0));
    let d = f.op(
        &format!(
            "llvm.call_intrinsic \"llvm.amdgcn.mfma.scale.f32.16x16x128.f8f6f4.v8i32.v8i32\"\
             ({a}, {b}, {c}, {zero}, {zero}, {zero}, {zero}, {zero}, {zero}) : \
             (vector<8xi32>, vector<8xi32>, vector<4xf32>, i32, i32, i32, i32, i32, i32) -> vector<4xf32>"
        ),
        Ty::F32,
    );
    f.name(d)
}

/// 16 bytes of shared memory, converted if need be.
fn read(arch: &Arch, e: &mut Emitter, dtype: DType, byte: Val, convert: bool) -> Operand {
    let at = e.t.shared_at(byte);
    let f = &mut e.t.f;
    if convert {
        let words: Vec<Val> = f.load(at, Ty::I32, 4).into_iter().map(|w| arch.operand_word(f, dtype, w)).collect();
        return words
            .chunks(2)
            .map(|pair| {
                let pair = pack(f, pair, "i32");
                let whole = f.op(&format!("llvm.bitcast {pair} : vector<2xi32> to i64"), Ty::I64);
                f.name(whole)
            })
            .collect();
    }
    let at = f.name(at);
    let load = |f: &mut Fn, ty: &str| {
        let v = f.op(&format!("llvm.load {at} {{alignment = 16 : i64}} : !llvm.ptr<3> -> {ty}"), Ty::I32);
        f.name(v)
    };
    match (dtype, arch.cdna4) {
        (DType::Bf16 | DType::F16, true) => vec![load(f, operand_type(arch, dtype))],
        (DType::Bf16 | DType::F16, false) => {
            let ty = if dtype == DType::Bf16 { "vector<8xi16>" } else { "vector<8xf16>" };
            let whole = load(f, ty);
            ["0, 1, 2, 3", "4, 5, 6, 7"]
                .map(|lanes| {
                    let half = f.op(&format!("llvm.shufflevector {whole}, {whole} [{lanes}] : {ty}"), Ty::I32);
                    f.name(half)
                })
                .into()
        }
        _ => {
            let whole = load(f, "vector<2xi64>");
            (0..2)
                .map(|i| {
                    let half = element(f, &whole, i, "vector<2xi64>", Ty::I64);
                    f.name(half)
                })
                .collect()
        }
    }
}

/// A lane's neighbours along `k`, one a row, of 16-bit elements.
fn read_column(arch: &Arch, e: &mut Emitter, dtype: DType, byte: Val, pitch: u32) -> Operand {
    let values: Vec<Val> = (0..8)
        .map(|i| {
            let byte = e.t.f.add(byte, i32((i * pitch).into()));
            e.t.load_shared(byte, Ty::I16, 1)[0]
        })
        .collect();
    let n = if arch.cdna4 { 8 } else { 4 };
    let ty = operand_type(arch, dtype);
    values
        .chunks(n)
        .map(|part| {
            let bits = pack(&mut e.t.f, part, "i16");
            if ty == "vector<4xi16>" {
                return bits;
            }
            let v = e.t.f.op(&format!("llvm.bitcast {bits} : vector<{n}xi16> to {ty}"), Ty::I32);
            e.t.f.name(v)
        })
        .collect()
}

/// A vector of values.
pub fn pack(f: &mut Fn, values: &[Val], ty: &str) -> String {
    let vector = format!("vector<{}x{ty}>", values.len());
    let mut built = f.op(&format!("llvm.mlir.undef : {vector}"), Ty::I32);
    for (i, &v) in values.iter().enumerate() {
        let (v, i, whole) = (f.name(v), f.name(i32(i as i64)), f.name(built));
        built = f.op(&format!("llvm.insertelement {v}, {whole}[{i} : i32] : {vector}"), Ty::I32);
    }
    f.name(built)
}

/// An element of a vector.
pub fn element(f: &mut Fn, vector: &str, i: usize, ty: &str, element: Ty) -> Val {
    let i = f.name(i32(i as i64));
    f.op(&format!("llvm.extractelement {vector}[{i} : i32] : {ty}"), element)
}
