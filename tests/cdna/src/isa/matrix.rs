//! Matrix products (MFMA): D = A · B + C, or several of them side by side.
//!
//! Of an M × N × K product with one block, lane `l` holds of A row `l % M`, of B column `l % N`, and of both the K values that
//! begin at `l / M` times as many as it holds. An element of C and D is in lane `column + N · (row / 4 % (64 / N))`, in register
//! `row % 4 + 4 · (row / (4 · 64 / N))`; of f64 it is in lane `column + N · (row % 4)`, register pair `row / 4`. EXEC is ignored.

use super::minifloat::{E2M1, E2M3, E3M2, Format, table};
use super::{Cx, Done, Handler};
use crate::decode::{Inst, Operand};
use crate::fault::Cause;
use half::{bf16, f16};

/// A shape: rows, columns, depth, products side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    blocks: usize,
}

impl Shape {
    /// Of `16x16x16` or `4x4x4_16b`.
    fn parse(name: &str) -> Option<Shape> {
        let mut parts = name.split(['x', '_']);
        let mut next = || parts.next()?.parse().ok();
        let (m, n, k): (usize, usize, usize) = (next()?, next()?, next()?);
        let blocks = parts.next().and_then(|b| b.strip_suffix('b')?.parse().ok()).unwrap_or(1);
        Some(Shape { m, n, k, blocks })
    }

    /// Values of A, and of B, that a lane holds.
    fn held(self) -> usize {
        self.k * self.m * self.blocks / 64
    }
}

/// Types of operands, in [`Inst::sub`].
const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;
/// Then fp8 and bf8 of A and B: `FP8 + 2 · (A is bf8) + (B is bf8)`.
const FP8: u8 = 4;

/// The function of a mnemonic, and the types of its operands.
pub fn find(name: &str) -> Option<(Handler, u8)> {
    let rest = name.strip_prefix("v_mfma_")?;
    if let Some(rest) = rest.strip_prefix("i32_") {
        let (_, kind) = rest.rsplit_once('_')?;
        return (kind == "i8").then_some((integers as Handler, 0));
    }
    if let Some(rest) = rest.strip_prefix("f64_") {
        return (rest == "16x16x4_f64").then_some((doubles as Handler, 0));
    }
    let rest = rest.strip_prefix("scale_").unwrap_or(rest).strip_prefix("f32_")?;
    Shape::parse(rest)?;
    let pairs = ["fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"];
    if let Some(at) = pairs.iter().position(|p| rest.ends_with(p)) {
        return Some((floats, FP8 + at as u8));
    }
    match rest.rsplit_once('_')?.1 {
        "f32" | "xf32" => Some((floats, F32)),
        "f16" => Some((floats, F16)),
        "bf16" | "1k" => Some((floats, BF16)),
        "f8f6f4" => Some((f8f6f4, 0)),
        _ => None,
    }
}

fn shape(i: &Inst) -> Result<Shape, Cause> {
    let unknown = || Cause::Unknown(i.text.clone());
    let rest = i.name.strip_prefix("v_mfma_").ok_or_else(unknown)?;
    let rest = rest.strip_prefix("scale_").unwrap_or(rest);
    rest.split_once('_').and_then(|(_, r)| Shape::parse(r)).ok_or_else(unknown)
}

fn register(i: &Inst, k: usize) -> Result<u16, Cause> {
    match i.ops[k] {
        Operand::V(n) => Ok(n),
        _ => Err(Cause::Unknown(i.text.clone())),
    }
}

/// A and B, one row of either (an index of `m` or `n`) after another, and which rows were written.
struct Rows {
    values: Vec<f32>,
    known: Vec<bool>,
}

/// Reads an operand: `read(words, element)` gives a lane's element, `place(lane, element)` its row and its place in that.
fn rows(
    c: &mut Cx<'_>,
    first: u16,
    words: usize,
    (count, depth, held): (usize, usize, usize),
    read: impl Fn(&[u32], usize) -> f32,
    place: impl Fn(usize, usize) -> (usize, usize),
) -> Result<Rows, Cause> {
    let mut out = Rows { values: vec![0.0; count * depth], known: vec![true; count] };
    c.w.known = !0;
    for w in 0..words {
        c.w.v(first + w as u16)?;
    }
    let known = c.w.known;
    let mut lane = [0; 8];
    for l in 0..64 {
        for (w, word) in lane.iter_mut().enumerate().take(words) {
            *word = c.w.v[first as usize + w][l];
        }
        for e in 0..held {
            let (row, k) = place(l, e);
            out.values[row * depth + k] = read(&lane[..words], e);
            out.known[row] &= known >> l & 1 != 0;
        }
    }
    Ok(out)
}

/// Where a lane's elements of an operand of `size` rows lie.
fn plain(size: usize, held: usize, blocks: usize) -> impl Fn(usize, usize) -> (usize, usize) {
    move |l, e| {
        let groups = 64 / size;
        let block = l / size % blocks;
        let group = l / size / blocks;
        debug_assert!(group < groups);
        (block * size + l % size, group * held + e)
    }
}

fn half_of(words: &[u32], e: usize) -> u16 {
    (words[e / 2] >> (16 * (e % 2))) as u16
}

fn byte_of(words: &[u32], e: usize) -> u8 {
    (words[e / 4] >> (8 * (e % 4))) as u8
}

fn floats(c: &mut Cx<'_>, i: &Inst) -> Done {
    let s = shape(i)?;
    if i.matrix != [0; 3] {
        return Err(Cause::Unknown(format!("{} (broadcasts and lane groups)", i.text)));
    }
    let held = s.held();
    let ocp = c.env.chip.ocp;
    let mut operand = |k: usize, size: usize, wide: bool| {
        let (first, sizes) = (register(i, k)?, (size * s.blocks, s.k, held));
        let place = plain(size, held, s.blocks);
        match i.sub {
            F32 => rows(c, first, held, sizes, |w, e| f32::from_bits(w[e]), place),
            F16 => rows(c, first, held.div_ceil(2), sizes, |w, e| f16::from_bits(half_of(w, e)).to_f32(), place),
            BF16 => rows(c, first, held.div_ceil(2), sizes, |w, e| bf16::from_bits(half_of(w, e)).to_f32(), place),
            _ => {
                let t = table(ocp, wide);
                rows(c, first, held.div_ceil(4), sizes, |w, e| t[usize::from(byte_of(w, e))], place)
            }
        }
    };
    let kinds = i.sub.saturating_sub(FP8);
    let a = operand(1, s.m, kinds & 2 != 0)?;
    let b = operand(2, s.n, kinds & 1 != 0)?;
    multiply(c, i, s, &a, &b)
}

/// Operands of 8, 6 or 4 bits, which `cbsz` and `blgp` name, with a power of two for each 32 of them where the instruction scales. Of 8
/// bits a lane holds 16 values and 16 more half of K away; of fewer, 32 in a row. Lane `r + M · b` has the scale of row `r`, block `b`.
fn f8f6f4(c: &mut Cx<'_>, i: &Inst) -> Done {
    let s = shape(i)?;
    let scaled = i.name.contains("scale");
    let mut operand = |k: usize, size: usize, kind: u8| {
        let format = match kind {
            0 => Format::of(true, false),
            1 => Format::of(true, true),
            2 => E2M3,
            3 => E3M2,
            4 => E2M1,
            _ => return Err(Cause::Unknown(i.text.clone())),
        };
        let bits = format.bits() as usize;
        let read = |w: &[u32], e: usize| {
            let at = e * bits;
            let low = u64::from(w[at / 32]) | u64::from(w.get(at / 32 + 1).copied().unwrap_or(0)) << 32;
            format.decode((low >> (at % 32)) as u8)
        };
        let place = |l: usize, e: usize| {
            let (row, group) = (l % size, l / size);
            (row, if bits == 8 { 16 * group + e % 16 + s.k / 2 * (e / 16) } else { 32 * group + e })
        };
        let mut rows = rows(c, register(i, k)?, bits, (size, s.k, 32), read, place)?;
        if scaled {
            let scales = c.raw(i, k + 3)?;
            let select = i.op_sel >> (k - 1) & 1 | (i.op_sel_hi >> (k - 1) & 1) << 1;
            for row in 0..size {
                for k in 0..s.k {
                    let scale = scales[row + size * (k / 32)] >> (8 * select) & 0xff;
                    let factor = if scale == 255 { f32::NAN } else { (scale as f32 - 127.0).exp2() };
                    rows.values[row * s.k + k] *= factor;
                }
            }
            c.w.require(!0, "the scale of a matrix product")?;
        }
        Ok(rows)
    };
    let a = operand(1, s.m, i.matrix[0])?;
    let b = operand(2, s.n, i.matrix[2])?;
    multiply(c, i, s, &a, &b)
}

/// Lane and register of an element of the accumulator.
fn place_of(s: Shape, block: usize, row: usize, column: usize) -> (usize, usize) {
    let groups = 64 / s.n;
    if s.m == 4 {
        // Sixteen products of 4 × 4: each in four lanes.
        return (column + 4 * block, row);
    }
    // Blocks of a product of several follow each other in registers.
    let registers = s.m * s.n / 64;
    (column + s.n * (row / 4 % groups), block * registers + row % 4 + 4 * (row / (4 * groups)))
}

/// D = A · B + C, which is in operand 3.
fn multiply(c: &mut Cx<'_>, i: &Inst, s: Shape, a: &Rows, b: &Rows) -> Done {
    let registers = (s.m * s.n * s.blocks).div_ceil(64);
    let (mut acc, mut known) = (vec![0f32; s.m * s.n * s.blocks], vec![true; s.m * s.n * s.blocks]);
    let each = |f: &mut dyn FnMut(usize, usize, usize)| {
        for at in 0..s.m * s.n * s.blocks {
            let (block, row, column) = (at / (s.m * s.n), at / s.n % s.m, at % s.n);
            let (lane, register) = place_of(s, block, row, column);
            f(at, lane, register);
        }
    };
    match i.ops[3] {
        Operand::V(n) => {
            let mut masks = [0; 32];
            for (r, mask) in masks.iter_mut().enumerate().take(registers) {
                c.w.known = !0;
                c.w.v(n + r as u16)?;
                *mask = c.w.known;
            }
            each(&mut |at, lane, r| {
                acc[at] = f32::from_bits(c.w.v[n as usize + r][lane]);
                known[at] = masks[r] >> lane & 1 != 0;
            });
        }
        Operand::Const(k) => acc.fill(f32::from_bits(k.b32)),
        _ => return Err(Cause::Unknown(i.text.clone())),
    }
    // The modifiers of the accumulator.
    if i.negated(3) {
        acc.iter_mut().for_each(|x| *x = -*x);
    }
    let mut columns = vec![0f32; s.k * s.n];
    for block in 0..s.blocks {
        for k in 0..s.k {
            for n in 0..s.n {
                columns[k * s.n + n] = b.values[(block * s.n + n) * s.k + k];
            }
        }
        for m in 0..s.m {
            let row = &a.values[(block * s.m + m) * s.k..][..s.k];
            let out = &mut acc[(block * s.m + m) * s.n..][..s.n];
            for (&x, column) in row.iter().zip(columns.chunks_exact(s.n)) {
                for (out, &y) in out.iter_mut().zip(column) {
                    *out += x * y;
                }
            }
            for n in 0..s.n {
                known[(block * s.m + m) * s.n + n] &= a.known[block * s.m + m] && b.known[block * s.n + n];
            }
        }
    }
    let to = register(i, 0)?;
    let (mut out, mut masks) = (vec![[0; 64]; registers], vec![0u64; registers]);
    each(&mut |at, lane, r| {
        out[r][lane] = acc[at].to_bits();
        masks[r] |= u64::from(known[at]) << lane;
    });
    for (r, (out, mask)) in out.iter().zip(masks).enumerate() {
        c.w.known = mask;
        c.w.set_v_lanes(to + r as u16, out, !0)?;
    }
    Ok(())
}

/// Products of i8, summed in i32.
fn integers(c: &mut Cx<'_>, i: &Inst) -> Done {
    let s = shape(i)?;
    if s.blocks != 1 || i.matrix != [0; 3] {
        return Err(Cause::Unknown(i.text.clone()));
    }
    let held = s.held();
    let read = |w: &[u32], e: usize| f32::from(byte_of(w, e) as i8);
    let a = rows(c, register(i, 1)?, held / 4, (s.m, s.k, held), read, plain(s.m, held, 1))?;
    let b = rows(c, register(i, 2)?, held / 4, (s.n, s.k, held), read, plain(s.n, held, 1))?;
    if a.known.iter().chain(&b.known).any(|k| !k) {
        return Err(Cause::Undefined("an operand of a matrix product".into()));
    }
    let (to, registers) = (register(i, 0)?, s.m * s.n / 64);
    let mut out = vec![[0; 64]; registers];
    c.w.known = !0;
    for (r, out) in out.iter_mut().enumerate() {
        *out = match i.ops[3] {
            Operand::V(n) => *c.w.v(n + r as u16)?,
            op => c.w.raw32(op)?,
        };
    }
    for m in 0..s.m {
        for n in 0..s.n {
            let (lane, r) = place_of(s, 0, m, n);
            let product = |k: usize| (a.values[m * s.k + k] * b.values[n * s.k + k]) as i32;
            let sum = (0..s.k).fold(out[r][lane] as i32, |sum, k| sum.wrapping_add(product(k)));
            out[r][lane] = sum as u32;
        }
    }
    for (r, out) in out.iter().enumerate() {
        c.w.set_v_lanes(to + r as u16, out, !0)?;
    }
    Ok(())
}

/// 16 × 16 × 4 of f64.
fn doubles(c: &mut Cx<'_>, i: &Inst) -> Done {
    let (a, b) = (c.b64(i, 1)?, c.b64(i, 2)?);
    let to = register(i, 0)?;
    let mut acc = [[0u64; 64]; 4];
    for (r, acc) in acc.iter_mut().enumerate() {
        *acc = match i.ops[3] {
            Operand::V(n) => {
                let (low, high) = (*c.w.v(n + 2 * r as u16)?, *c.w.v(n + 2 * r as u16 + 1)?);
                super::map2(&low, &high, |l, h| u64::from(l) | u64::from(h) << 32)
            }
            Operand::Const(k) => [k.f64; 64],
            _ => return Err(Cause::Unknown(i.text.clone())),
        };
    }
    if c.w.known != !0 {
        c.w.known = 0;
    }
    for row in 0..16 {
        for column in 0..16 {
            let (lane, r) = (column + 16 * (row % 4), row / 4);
            let term = |k: usize| f64::from_bits(a[row + 16 * k]) * f64::from_bits(b[column + 16 * k]);
            let sum = (0..4).fold(f64::from_bits(acc[r][lane]), |sum, k| sum + term(k));
            acc[r][lane] = sum.to_bits();
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        c.w.set_v_lanes(to + 2 * r as u16, &super::map1(acc, |v| v as u32), !0)?;
        c.w.set_v_lanes(to + 2 * r as u16 + 1, &super::map1(acc, |v| (v >> 32) as u32), !0)?;
    }
    Ok(())
}
