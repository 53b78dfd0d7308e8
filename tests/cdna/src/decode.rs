//! The disassembler's text, parsed once into instructions that point at the function that executes them.

use crate::fault::{Cause, Error};
use crate::isa::{self, Handler};
use crate::lanes::{Dpp, Sdwa, Select};

/// Where AGPRs begin among the vector registers of a wave.
pub const AGPR: u16 = 256;
/// Scalar registers by their number in the encoding.
pub const VCC: u8 = 106;
/// As [`VCC`].
pub const M0: u8 = 124;
/// As [`VCC`].
pub const EXEC: u8 = 126;
/// High half of generic addresses that lead to LDS.
pub const SHARED_APERTURE: u64 = 0x1_0000;
/// High half of generic addresses that lead to scratch.
pub const PRIVATE_APERTURE: u64 = 0x2_0000;

/// A constant as operands of each width have it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constant {
    /// As a 64-bit integer operand: literals are zero-extended, inline integers sign-extended.
    pub b64: u64,
    /// As a double.
    pub f64: u64,
    /// As 32 bits.
    pub b32: u32,
    /// As 16 bits, f16 if it is real.
    pub b16: u16,
}

/// What an instruction names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operand {
    /// Nothing (`off`, `null`, or not there).
    #[default]
    None,
    /// Vector registers from the first, AGPRs from [`AGPR`].
    V(u16),
    /// Scalar registers from the first.
    S(u8),
    /// A constant.
    Const(Constant),
    /// SCC.
    Scc,
    /// Whether EXEC is zero.
    ExecZ,
    /// Whether VCC is zero.
    VccZ,
}

/// Flags of memory instructions and of arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Results go to 0..1.
    pub clamp: bool,
    /// An atomic returns what was there.
    pub sc0: bool,
    /// A load goes to LDS.
    pub lds: bool,
    /// A buffer takes an offset from a vector register.
    pub offen: bool,
    /// A buffer takes an index from a vector register.
    pub idxen: bool,
    /// A DS instruction reaches the global data share.
    pub gds: bool,
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// What executes it.
    pub run: Handler,
    /// The mnemonic without the encoding's suffix.
    pub name: String,
    /// As LLVM prints it.
    pub text: String,
    /// Its address in the code object.
    pub address: u64,
    /// Its encoding.
    pub words: [u32; 2],
    /// Operands as they are printed: destinations come first.
    pub ops: [Operand; 6],
    /// How many there are.
    pub count: usize,
    /// Index of the first source of vector arithmetic in `ops`.
    pub first: usize,
    /// Which operands are negated, by index.
    pub neg: u8,
    /// Of which the absolute value is taken.
    pub abs: u8,
    /// Bits of `op_sel`, `op_sel_hi`, `neg_lo`, `neg_hi` by source.
    pub op_sel: u8,
    /// As `op_sel`; ones if not printed.
    pub op_sel_hi: u8,
    /// As `op_sel`.
    pub neg_lo: u8,
    /// As `op_sel`.
    pub neg_hi: u8,
    /// Factor on the result.
    pub omod: f32,
    /// `offset` or `offset0`.
    pub offset: i32,
    /// `offset1`.
    pub offset1: i32,
    /// `cbsz`, `abid`, `blgp` of matrix instructions.
    pub matrix: [u8; 3],
    /// Flags.
    pub flags: Flags,
    /// Lanes exchange the first source.
    pub dpp: Option<Box<Dpp>>,
    /// Parts of registers are used.
    pub sdwa: Option<Box<Sdwa>>,
    /// Index of the instruction after a taken branch.
    pub target: usize,
    /// The comparison of a compare, the operation of an atomic and the like.
    pub sub: u8,
}

impl Inst {
    /// Whether source `k` (an index in `ops`) is negated.
    #[inline(always)]
    pub fn negated(&self, k: usize) -> bool {
        self.neg >> k & 1 != 0
    }

    /// The low 16 bits of the encoding: the immediate of SOPP and SOPK, offsets of DS.
    pub fn simm16(&self) -> u16 {
        self.words[0] as u16
    }
}

/// Parses all that the disassembler printed; addresses rise.
///
/// # Errors
/// If the text is not the disassembler's.
pub fn decode(text: &str) -> Result<Vec<Inst>, Error> {
    let mut all = Vec::new();
    for line in text.lines() {
        let Some((body, comment)) = line.split_once("//") else { continue };
        let Some((address, encoding)) = comment.split_once(':') else { continue };
        let bad = || Error::Object(format!("cannot read the disassembler's line `{line}`"));
        let address = u64::from_str_radix(address.trim(), 16).map_err(|_| bad())?;
        let mut words = [0; 2];
        let mut size = 0;
        for (i, word) in encoding.split_whitespace().take_while(|w| !w.starts_with('<')).enumerate() {
            let word = u32::from_str_radix(word, 16).map_err(|_| bad())?;
            if let Some(slot) = words.get_mut(i) {
                *slot = word;
            }
            size += 4;
        }
        if size == 0 {
            return Err(bad());
        }
        all.push(instruction(body.trim(), address, words));
    }
    link(&mut all);
    Ok(all)
}

/// Finds where branches go.
fn link(all: &mut [Inst]) {
    let addresses: Vec<u64> = all.iter().map(|i| i.address).collect();
    for inst in all {
        if inst.name.starts_with("s_cbranch") || inst.name == "s_branch" {
            let to = inst.address.wrapping_add_signed(4 + 4 * i64::from(inst.simm16() as i16));
            inst.target = addresses.binary_search(&to).unwrap_or(usize::MAX);
        }
    }
}

/// The function of instructions that cannot be executed.
fn unknown(_: &mut isa::Cx<'_>, inst: &Inst) -> Result<(), Cause> {
    Err(Cause::Unknown(inst.text.clone()))
}

fn instruction(text: &str, address: u64, words: [u32; 2]) -> Inst {
    let (mnemonic, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let mut name = mnemonic;
    let mut sdwa = false;
    for suffix in ["_sdwa", "_dpp", "_e32", "_e64"] {
        if let Some(short) = name.strip_suffix(suffix) {
            (name, sdwa) = (short, sdwa || suffix == "_sdwa");
        }
    }
    let mut inst = Inst {
        run: unknown,
        name: name.to_owned(),
        text: text.split_whitespace().collect::<Vec<_>>().join(" "),
        address,
        words,
        ops: [Operand::None; 6],
        count: 0,
        first: 1,
        neg: 0,
        abs: 0,
        op_sel: 0,
        op_sel_hi: 0xff,
        neg_lo: 0,
        neg_hi: 0,
        omod: 1.0,
        offset: 0,
        offset1: 0,
        matrix: [0; 3],
        flags: Flags::default(),
        dpp: None,
        sdwa: sdwa.then(Box::default),
        target: usize::MAX,
        sub: 0,
    };
    let mut known = true;
    // Their immediates are read from the encoding.
    let plain = ["s_waitcnt", "s_sendmsg", "s_getreg_b32", "s_setreg_b32", "s_setreg_imm32_b32", "s_sleep", "s_nop"];
    if plain.contains(&name) || name.starts_with("s_cbranch") || name == "s_branch" {
        if let Some(Ok((operand, ..))) = words_of(rest).first().map(|w| operand(w)) {
            inst.ops[0] = operand;
        }
    } else {
        for word in words_of(rest) {
            match operand(&word) {
                Ok((operand, neg, abs)) if inst.count < inst.ops.len() => {
                    inst.neg |= u8::from(neg) << inst.count;
                    inst.abs |= u8::from(abs) << inst.count;
                    inst.ops[inst.count] = operand;
                    inst.count += 1;
                }
                _ => known &= modifier(&mut inst, &word).is_some(),
            }
        }
    }
    if name.contains("_co_")
        || name.starts_with("v_div_scale")
        || name.starts_with("v_mad_u64")
        || name.starts_with("v_mad_i64")
    {
        inst.first = 2;
    }
    if let Some((run, sub)) = isa::find(name).filter(|_| known) {
        (inst.run, inst.sub) = (run, sub);
    }
    inst
}

/// Splits at commas and spaces that are in no bracket.
fn words_of(text: &str) -> Vec<String> {
    let (mut words, mut word, mut depth) = (Vec::new(), String::new(), 0);
    for c in text.chars() {
        match c {
            '[' | '(' => depth += 1,
            ']' | ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 && (c == ',' || c.is_whitespace()) {
            if !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
        } else {
            word.push(c);
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// An operand, whether it is negated, whether its absolute value is taken.
fn operand(word: &str) -> Result<(Operand, bool, bool), ()> {
    if let Some(inner) = word.strip_prefix("neg(").and_then(|w| w.strip_suffix(')')) {
        return operand(inner).map(|(o, n, a)| (o, !n, a));
    }
    if let Some(inner) = word.strip_prefix('|').and_then(|w| w.strip_suffix('|')) {
        return operand(inner).map(|(o, n, _)| (o, n, true));
    }
    if let Some(found) = register(word).or_else(|| constant(word).map(Operand::Const)) {
        return Ok((found, false, false));
    }
    match word.strip_prefix('-') {
        Some(inner) => operand(inner).map(|(o, n, a)| (o, !n, a)),
        None => Err(()),
    }
}

fn register(word: &str) -> Option<Operand> {
    let special = |n: u8| Some(Operand::S(n));
    match word {
        "off" | "null" => return Some(Operand::None),
        "vcc" | "vcc_lo" => return special(VCC),
        "vcc_hi" => return special(VCC + 1),
        "exec" | "exec_lo" => return special(EXEC),
        "exec_hi" => return special(EXEC + 1),
        "m0" => return special(M0),
        "flat_scratch" | "flat_scratch_lo" => return special(102),
        "flat_scratch_hi" => return special(103),
        "scc" | "src_scc" => return Some(Operand::Scc),
        "src_execz" => return Some(Operand::ExecZ),
        "src_vccz" => return Some(Operand::VccZ),
        "src_shared_base" => return Some(aperture(SHARED_APERTURE)),
        "src_private_base" => return Some(aperture(PRIVATE_APERTURE)),
        _ => {}
    }
    let (kind, digits) = word.split_at_checked(1)?;
    let digits = digits.strip_prefix('[').and_then(|d| d.strip_suffix(']')).unwrap_or(digits);
    let (first, last) = digits.split_once(':').unwrap_or((digits, digits));
    let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
    match kind {
        "v" if first <= last && last < 256 => Some(Operand::V(first)),
        "a" if first <= last && last < 256 => Some(Operand::V(AGPR + first)),
        "s" if first <= last && last < 102 => Some(Operand::S(first as u8)),
        _ => None,
    }
}

fn aperture(high: u64) -> Operand {
    Operand::Const(Constant { b64: high << 32, f64: high << 32, b32: 0, b16: 0 })
}

fn constant(word: &str) -> Option<Constant> {
    if let Some(hex) = word.strip_prefix("0x") {
        let v = u64::from_str_radix(hex, 16).ok()?;
        return Some(Constant { b64: v, f64: v << 32, b32: v as u32, b16: v as u16 });
    }
    if word.contains('.') {
        let v: f64 = word.parse().ok()?;
        // The one constant that is not exact in few digits: 1 / 2π.
        let [b32, b16] = if word.trim_start_matches('-').starts_with("0.159") {
            [0x3e22_f983, 0x3118]
        } else {
            [(v as f32).to_bits(), u32::from(half::f16::from_f64(v).to_bits())]
        };
        let f64 = if b32 == 0x3e22_f983 { 0x3fc4_5f30_6dc9_c882 } else { v.to_bits() };
        return Some(Constant { b64: f64, f64, b32, b16: b16 as u16 });
    }
    let v: i64 = word.parse().ok()?;
    Some(Constant { b64: v as u64, f64: v as u64, b32: v as u32, b16: v as u16 })
}

/// `[a,b,c]` as bits.
fn bits(list: &str) -> Option<u8> {
    let inner = list.strip_prefix('[')?.strip_suffix(']')?;
    let mut all = 0;
    for (i, bit) in inner.split(',').enumerate() {
        all |= u8::from(bit.trim() == "1") << i;
    }
    Some(all)
}

fn integer(text: &str) -> Option<i32> {
    match text.strip_prefix("0x") {
        Some(hex) => i32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn select(text: &str) -> Option<Select> {
    Some(match text {
        "DWORD" => Select::Dword,
        "WORD_0" => Select::Word(0),
        "WORD_1" => Select::Word(1),
        _ => Select::Byte(text.strip_prefix("BYTE_")?.parse().ok()?),
    })
}

/// Reads a modifier into the instruction; none if it is not known.
fn modifier(inst: &mut Inst, word: &str) -> Option<()> {
    let (key, value) = word.split_once(':').unwrap_or((word, ""));
    match key {
        "op_sel" => inst.op_sel = bits(value)?,
        "op_sel_hi" => inst.op_sel_hi = bits(value)?,
        "neg_lo" => inst.neg_lo = bits(value)?,
        "neg_hi" => inst.neg_hi = bits(value)?,
        "clamp" => inst.flags.clamp = true,
        "mul" => inst.omod = integer(value)? as f32,
        "div" => inst.omod = 1.0 / integer(value)? as f32,
        // The encoding has the pattern of a swizzle, whose text is long.
        "offset" if value.starts_with("swizzle") => inst.offset = i32::from(inst.simm16()),
        "offset" | "offset0" => inst.offset = integer(value)?,
        "offset1" => inst.offset1 = integer(value)?,
        "sc0" | "glc" => inst.flags.sc0 = true,
        "lds" => inst.flags.lds = true,
        "offen" => inst.flags.offen = true,
        "idxen" => inst.flags.idxen = true,
        "gds" => inst.flags.gds = true,
        // Caches are not modelled.
        "sc1" | "nt" | "slc" | "dlc" => {}
        "cbsz" => inst.matrix[0] = integer(value)? as u8,
        // Only one instruction has it, which has no other of these.
        "bitop3" => inst.matrix[0] = integer(value)? as u8,
        "abid" => inst.matrix[1] = integer(value)? as u8,
        "blgp" => inst.matrix[2] = integer(value)? as u8,
        "dst_sel" => inst.sdwa.as_mut()?.dst = select(value)?,
        "src0_sel" => inst.sdwa.as_mut()?.src[0] = select(value)?,
        "src1_sel" => inst.sdwa.as_mut()?.src[1] = select(value)?,
        "dst_unused" => inst.sdwa.as_mut()?.unused = value.parse().ok()?,
        "row_mask" => inst.dpp.as_mut()?.mask_rows(integer(value)?),
        "bank_mask" => inst.dpp.as_mut()?.mask_banks(integer(value)?),
        "bound_ctrl" => inst.dpp.as_mut()?.zero = true,
        _ if key.starts_with("sext(") => {
            let (inner, ..) = operand(key.strip_prefix("sext(")?.strip_suffix(')')?).ok()?;
            inst.sdwa.as_mut()?.sext[inst.count.checked_sub(1)?.min(1)] = true;
            inst.ops[inst.count] = inner;
            inst.count += 1;
        }
        _ => inst.dpp = Some(Box::new(Dpp::parse(key, value)?)),
    }
    Some(())
}
