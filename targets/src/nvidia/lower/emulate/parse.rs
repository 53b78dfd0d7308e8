//! The text of a function to instructions on numbered slots.
//!
//! A slot holds 64 bits of every thread. Vectors and structs are lists of slots, so building and taking them apart costs nothing;
//! neither do constants, which have slots of their own.

use super::scalar::{self, Scalar};
use super::warp::Product;
use std::collections::HashMap;

/// Number of a slot.
pub type Slot = u32;

/// Where an address of shared memory has its block's number in the cluster, counted from 1; 0: the own block's.
pub const RANK_SHIFT: u32 = 24;

/// What an instruction does. Operands and results are slots of its [`Inst`].
#[derive(Clone, Debug)]
pub enum Code {
    /// Of registers; with the bits of operands and result.
    Scalar(Scalar, u32, u32),
    /// Neighbours of so many bytes each, from an address.
    Load { shared: bool, bytes: u64, align: u64 },
    /// The address, then neighbours.
    Store { shared: bool, bytes: u64, align: u64 },
    /// Shared word and what is combined with it; what was there.
    Atomic(fn(u32, u32) -> u32),
    /// Exchanges between lanes.
    Warp(String),
    /// `ldmatrix` of four.
    Matrices { transposed: bool },
    /// `mma.sync`: accumulators, left, right.
    Multiply(Product),
    /// All threads meet; whether the operand holds in any.
    Barrier { any: bool },
    /// All threads of the cluster meet.
    Cluster,
    /// All threads of the block wait until a barrier in shared memory has its arrivals and bytes: two words, of what is still to come.
    Wait,
    /// This thread's number.
    Thread,
    /// Its block's in the cluster.
    Rank,
    /// This block's number along an axis.
    Block(usize),
    /// To a block.
    Jump,
    /// To the first of two blocks if the operand holds.
    Branch,
    /// The thread ends.
    Return,
}

/// Where to go on, with what.
#[derive(Clone, Debug)]
pub struct Goto {
    /// The label's number.
    pub label: usize,
    /// Values of its arguments.
    pub args: Vec<Slot>,
}

/// One instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    /// What it does.
    pub code: Code,
    /// Operands.
    pub args: Vec<Slot>,
    /// Results.
    pub dst: Vec<Slot>,
    /// Runs only in threads where this holds.
    pub predicate: Option<Slot>,
    /// Targets of a branch.
    pub to: Vec<Goto>,
    /// Its line in [`Body::lines`].
    pub line: usize,
}

/// A function's body.
#[derive(Default)]
pub struct Body {
    /// In the order of the text.
    pub insts: Vec<Inst>,
    /// The text.
    pub lines: Vec<String>,
    /// First instruction and arguments of each label.
    pub labels: HashMap<usize, (usize, Vec<Slot>)>,
    /// Slots and what they hold from the start.
    pub constants: Vec<(Slot, u64)>,
    /// Slots of the function's arguments.
    pub args: Vec<(usize, Slot)>,
    /// How many there are.
    pub slots: u32,
}

/// What is known while reading.
#[derive(Default)]
struct Reader {
    body: Body,
    values: HashMap<String, Vec<Slot>>,
    known: HashMap<u64, Slot>,
    numbers: HashMap<Slot, u64>,
}

/// Reads a function's body, alone or in its module.
///
/// # Errors
/// The line that is not understood.
pub fn parse(text: &str) -> Result<Body, String> {
    let mut reader = Reader::default();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && *l != "}") {
        if ["module", "llvm.mlir.global", "llvm.func"].iter().any(|head| line.starts_with(head)) {
            continue;
        }
        reader.body.lines.push(line.to_owned());
        reader.line(line).ok_or_else(|| format!("cannot run `{line}`"))?;
    }
    Ok(reader.body)
}

fn bits_of(ty: &str) -> Option<u32> {
    Some(match ty.trim() {
        "i1" => 1,
        "i8" => 8,
        "i16" => 16,
        "i32" | "f32" => 32,
        "i64" | "!llvm.ptr" | "!llvm.ptr<1>" | "!llvm.ptr<3>" => 64,
        _ => return None,
    })
}

/// Bits of an element, and elements.
fn vector_of(ty: &str) -> Option<(u32, usize)> {
    match ty.trim().strip_prefix("vector<").and_then(|t| t.strip_suffix('>')).and_then(|t| t.split_once('x')) {
        Some((n, ty)) => Some((bits_of(ty)?, n.parse().ok()?)),
        None => Some((bits_of(ty)?, 1)),
    }
}

fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    match (text, text.strip_prefix("0x")) {
        ("true", _) => Some(1),
        ("false", _) => Some(0),
        (_, Some(hex)) => u64::from_str_radix(hex, 16).ok(),
        _ => text.parse::<i64>().ok().map(|n| n as u64),
    }
}

impl Reader {
    fn slot(&mut self) -> Slot {
        self.body.slots += 1;
        self.body.slots - 1
    }

    fn constant(&mut self, value: u64) -> Slot {
        if let Some(&slot) = self.known.get(&value) {
            return slot;
        }
        let slot = self.slot();
        self.known.insert(value, slot);
        self.numbers.insert(slot, value);
        self.body.constants.push((slot, value));
        slot
    }

    /// The `%names` of a text in order, with their slots.
    fn operands(&mut self, text: &str) -> Option<Vec<Vec<Slot>>> {
        let mut out = Vec::new();
        for part in text.split('%').skip(1) {
            let name = &part[..part.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(part.len())];
            if !self.values.contains_key(name) {
                let argument = name.parse().ok()?;
                let slot = self.slot();
                self.body.args.push((argument, slot));
                self.values.insert(name.to_owned(), vec![slot]);
            }
            out.push(self.values[name].clone());
        }
        Some(out)
    }

    fn flat(&mut self, text: &str) -> Option<Vec<Slot>> {
        Some(self.operands(text)?.concat())
    }

    fn push(&mut self, code: Code, args: Vec<Slot>, dst: Vec<Slot>) {
        let line = self.body.lines.len() - 1;
        self.body.insts.push(Inst { code, args, dst, predicate: None, to: Vec::new(), line });
    }

    fn goto(&mut self, text: &str) -> Option<Goto> {
        let label = text.trim().trim_start_matches('^').strip_prefix("bb")?;
        let end = label.find(|c: char| !c.is_ascii_digit()).unwrap_or(label.len());
        Some(Goto { label: label[..end].parse().ok()?, args: self.flat(&label[end..])? })
    }

    fn line(&mut self, line: &str) -> Option<()> {
        if let Some(label) = line.strip_prefix("^bb") {
            let end = label.find(|c: char| !c.is_ascii_digit())?;
            let mut args = Vec::new();
            for part in label.split("%v").skip(1) {
                let name = &part[..part.find(':')?];
                let slot = self.slot();
                self.values.insert(format!("v{name}"), vec![slot]);
                args.push(slot);
            }
            self.body.labels.insert(label[..end].parse().ok()?, (self.body.insts.len(), args));
            return Some(());
        }
        let (name, text) = match line.split_once(" = ") {
            Some((name, text)) if name.starts_with("%v") => (&name[1..], text),
            _ => ("", line),
        };
        let head_end = text.find([' ', '(']).unwrap_or(text.len());
        let (head, rest) = (&text[..head_end], text[head_end..].trim());
        let dst = self.operation(head.strip_prefix("llvm.").unwrap_or(head), rest)?;
        if !name.is_empty() {
            self.values.insert(name.to_owned(), dst);
        }
        Some(())
    }

    /// An operation of scalars: its result's slot.
    fn scalar(&mut self, f: Scalar, from: u32, to: u32, args: Vec<Slot>) -> Vec<Slot> {
        let dst = vec![self.slot()];
        self.push(Code::Scalar(f, from, to), args, dst.clone());
        dst
    }

    /// Reads an operation; its results.
    fn operation(&mut self, name: &str, rest: &str) -> Option<Vec<Slot>> {
        let last_type = rest.rsplit(": ").next().unwrap_or("");
        let quoted = |n: usize| rest.split('"').nth(n);
        let align = || rest.split("alignment = ").nth(1).map_or(Some(1), |t| number(t.split(' ').next()?));
        match name {
            "mlir.constant" => {
                let value = number(rest.strip_prefix('(')?.split([' ', ')']).next()?)?;
                Some(vec![self.constant(value & scalar::mask(bits_of(last_type)?))])
            }
            "mlir.undef" => {
                let slot = self.constant(0xbad);
                Some(vec![slot; vector_of(last_type)?.1])
            }
            "mlir.addressof" => Some(vec![self.constant(0)]),
            "insertelement" => {
                let args = self.operands(rest)?;
                let mut whole = args[1].clone();
                *whole.get_mut(self.index(args[2][0])?)? = args[0][0];
                Some(whole)
            }
            "extractelement" => {
                let args = self.operands(rest)?;
                let i = self.index(args[1][0])?;
                Some(vec![*args[0].get(i)?])
            }
            "extractvalue" => {
                let i = number(rest.split(['[', ']']).nth(1)?)? as usize;
                Some(vec![*self.operands(rest)?.first()?.get(i)?])
            }
            "icmp" | "fcmp" => {
                let (f, args) = (scalar::comparison(quoted(1)?)?, self.flat(rest)?);
                Some(self.scalar(f, bits_of(last_type)?, 1, args))
            }
            "zext" | "sext" | "trunc" | "bitcast" | "sitofp" | "ptrtoint" | "inttoptr" => {
                let (from, to) = last_type.split_once(" to ")?;
                let args = self.flat(rest)?;
                Some(self.scalar(scalar::operation(name)?, bits_of(from)?, bits_of(to)?, args))
            }
            "select" => {
                let (bits, args) = (bits_of(last_type.split(',').nth(1)?)?, self.flat(rest)?);
                Some(self.scalar(scalar::operation(name)?, bits, bits, args))
            }
            "getelementptr" => {
                let index = rest.split(['[', ']']).nth(1)?;
                let mut args = self.flat(rest)?;
                let bits = match index.strip_prefix('%') {
                    Some(_) => bits_of(last_type.split([',', ')']).nth(1)?)?,
                    None => {
                        args.push(self.constant(number(index)?));
                        64
                    }
                };
                Some(self.scalar(scalar::operation(name)?, bits, 64, args))
            }
            "load" => {
                let (pointer, ty) = last_type.split_once(" -> ")?;
                let ((bits, n), align, args) = (vector_of(ty)?, align()?, self.flat(rest)?);
                let dst: Vec<Slot> = (0..n).map(|_| self.slot()).collect();
                let bytes = bits.div_ceil(8).into();
                self.push(Code::Load { shared: pointer.contains("<3>"), bytes, align }, args, dst.clone());
                Some(dst)
            }
            "store" => {
                let (ty, pointer) = last_type.split_once(", ")?;
                let ((bits, _), align) = (vector_of(ty)?, align()?);
                let operands = self.operands(rest)?;
                let args = [operands.get(1)?.as_slice(), &operands[0]].concat();
                let bytes = bits.div_ceil(8).into();
                self.push(Code::Store { shared: pointer.contains("<3>"), bytes, align }, args, vec![]);
                Some(Vec::new())
            }
            "br" => {
                let to = vec![self.goto(rest)?];
                self.push(Code::Jump, vec![], vec![]);
                self.body.insts.last_mut()?.to = to;
                Some(Vec::new())
            }
            "cond_br" => {
                let to = rest.split('^').skip(1).map(|t| self.goto(t)).collect::<Option<Vec<_>>>()?;
                let condition = self.flat(rest.split('^').next()?)?;
                self.push(Code::Branch, condition, vec![]);
                self.body.insts.last_mut()?.to = to;
                Some(Vec::new())
            }
            "return" => {
                self.push(Code::Return, vec![], vec![]);
                Some(Vec::new())
            }
            "inline_asm" => self.assembly(quoted(1)?, rest),
            _ if name.starts_with("nvvm.") => self.nvvm(&name[5..], rest),
            _ => {
                let args = self.flat(rest)?;
                let (f, bits) = match name.strip_prefix("intr.") {
                    Some(name) => (scalar::intrinsic(name)?, bits_of(last_type.split("-> ").nth(1)?)?),
                    None => (scalar::operation(name)?, bits_of(last_type)?),
                };
                Some(self.scalar(f, bits, bits, args))
            }
        }
    }

    /// The number that a slot holds from the start.
    fn index(&self, slot: Slot) -> Option<usize> {
        self.numbers.get(&slot).map(|&n| n as usize)
    }

    fn nvvm(&mut self, name: &str, rest: &str) -> Option<Vec<Slot>> {
        let how = rest.split(' ').next()?;
        let args = self.flat(rest)?;
        let (code, args) = match name {
            "barrier0" => {
                self.push(Code::Barrier { any: false }, vec![], vec![]);
                return Some(Vec::new());
            }
            "barrier" if rest.contains("reduction<or>") => (Code::Barrier { any: true }, args),
            "redux.sync" => (Code::Warp(format!("redux {how}")), vec![args[0], args[0]]),
            "vote.sync" => (Code::Warp("ballot".into()), vec![args[1], args[1]]),
            "shfl.sync" if rest.contains("return_value_and_is_valid") => {
                let both = vec![self.slot(), self.slot()];
                for (&dst, what) in both.iter().zip(["", " has"]) {
                    self.push(Code::Warp(format!("shfl {how}{what}")), vec![args[1], args[2]], vec![dst]);
                }
                return Some(both);
            }
            "shfl.sync" => (Code::Warp(format!("shfl {how}")), vec![args[1], args[2]]),
            "read.ptx.sreg.tid.x" => (Code::Thread, vec![]),
            "read.ptx.sreg.ctaid.x" | "read.ptx.sreg.clusterid.x" => (Code::Block(0), vec![]),
            "read.ptx.sreg.cluster.ctarank" => (Code::Rank, vec![]),
            "read.ptx.sreg.ctaid.y" => (Code::Block(1), vec![]),
            "read.ptx.sreg.ctaid.z" => (Code::Block(2), vec![]),
            _ => return None,
        };
        let dst = vec![self.slot()];
        self.push(code, args, dst.clone());
        Some(dst)
    }

    /// Inline assembly, statement by statement. Its registers and outputs become slots.
    fn assembly(&mut self, text: &str, rest: &str) -> Option<Vec<Slot>> {
        let (constraints, inputs) = (rest.split('"').nth(3)?, self.flat(rest.rsplit('"').next()?)?);
        let outputs = constraints.split(',').filter(|c| c.starts_with('=')).count();
        let dst: Vec<Slot> = (0..outputs).map(|_| self.slot()).collect();
        let mut names: HashMap<String, Slot> = HashMap::new();
        for (i, &slot) in dst.iter().chain(&inputs).enumerate() {
            names.insert(format!("${i}"), slot);
        }
        let text = text.replace("\\0A", "\n");
        let text = text.trim();
        if text.is_empty() {
            // Results are the inputs that are in their registers.
            let places = constraints.split(',').filter(|c| !c.starts_with(['=', '~']));
            for (place, &input) in places.zip(&inputs) {
                let result = *dst.get(place.parse::<usize>().ok()?)?;
                self.push(Code::Scalar(scalar::copy(), 64, 64), vec![input], vec![result]);
            }
            return Some(dst);
        }
        // A loop until the first phase of a barrier is over.
        if text.contains("mbarrier.try_wait.parity") {
            self.push(Code::Wait, inputs, vec![]);
            return Some(dst);
        }
        let text = text.strip_prefix("{\n").map_or(text, |t| t.trim_end_matches('}'));
        for statement in text.split(';').map(str::trim).filter(|s| !s.is_empty()) {
            if let Some(list) = statement.strip_prefix(".reg ") {
                for name in list.split_once(' ')?.1.split(',') {
                    let slot = self.slot();
                    names.insert(name.trim().to_owned(), slot);
                }
                continue;
            }
            let (predicate, statement) = match statement.strip_prefix('@') {
                Some(s) => s.split_once(' ').map(|(p, s)| (Some(p), s))?,
                None => (None, statement),
            };
            // Launches run one after another.
            if statement.starts_with("griddepcontrol.") {
                continue;
            }
            // Blocks meet where they wait, and see what was written before.
            if statement.starts_with("fence.mbarrier_init") {
                continue;
            }
            if statement.starts_with("barrier.cluster.arrive") {
                continue;
            }
            if statement.starts_with("barrier.cluster.wait") {
                self.push(Code::Cluster, vec![], vec![]);
                continue;
            }
            let (name, list) = statement.split_once(' ')?;
            let mut slots = Vec::new();
            for word in list.split([',', ' ', '{', '}', '[', ']']).filter(|w| !w.is_empty()) {
                slots.push(match names.get(word) {
                    Some(&slot) => slot,
                    // A result that no one wants.
                    None if word == "_" => self.constant(0),
                    None => self.constant(number(word)?),
                });
            }
            let before = self.body.insts.len();
            self.ptx(name, slots)?;
            for inst in &mut self.body.insts[before..] {
                inst.predicate = match predicate {
                    Some(p) => Some(*names.get(p)?),
                    None => None,
                };
            }
        }
        Some(dst)
    }

    /// Adds to, or takes from, what a word of a barrier says is still to come.
    fn counted(&mut self, barrier: Slot, word: u64, by: Slot, how: fn(u32, u32) -> u32) -> Option<()> {
        let (word, at, old) = (self.constant(word), self.slot(), self.slot());
        self.push(Code::Scalar(scalar::ptx("add.s32")?, 32, 32), vec![barrier, word], vec![at]);
        self.push(Code::Atomic(how), vec![at, by], vec![old]);
        Some(())
    }

    /// One PTX instruction, its operands in the order written.
    fn ptx(&mut self, name: &str, slots: Vec<Slot>) -> Option<()> {
        let parts: Vec<&str> = name.split('.').collect();
        match parts.as_slice() {
            ["st", "global", how @ ..] => {
                let bits: u64 = how.last()?.strip_prefix('b')?.parse().ok()?;
                let (bytes, n) = (bits / 8, slots.len() as u64 - 1);
                self.push(Code::Store { shared: false, bytes, align: bytes * n }, slots, vec![]);
            }
            ["st", "shared" | "shared::cluster", how @ ..] => {
                let bits: u64 = how.last()?.strip_prefix('b')?.parse().ok()?;
                let (bytes, n) = (bits / 8, slots.len() as u64 - 1);
                self.push(Code::Store { shared: true, bytes, align: bytes * n }, slots, vec![]);
            }
            // What no one writes meanwhile.
            ["ld", "global", "nc", "b32"] => {
                self.push(Code::Load { shared: false, bytes: 4, align: 4 }, slots[1..].to_vec(), slots[..1].to_vec());
            }
            ["ld", "global", "nc", "v4", "b32"] => {
                self.push(Code::Load { shared: false, bytes: 4, align: 16 }, slots[4..].to_vec(), slots[..4].to_vec());
            }
            ["ld", "shared::cluster", how @ ..] => {
                let n = slots.len() - 1;
                let align = match how {
                    ["b32"] | ["v2" | "v4", "b32"] => 4 * n as u64,
                    _ => return None,
                };
                self.push(Code::Load { shared: true, bytes: 4, align }, slots[n..].to_vec(), slots[..n].to_vec());
            }
            ["mbarrier", "init", ..] => {
                let none = self.constant(0);
                self.push(Code::Store { shared: true, bytes: 4, align: 8 }, [slots, vec![none]].concat(), vec![]);
            }
            ["mbarrier", "arrive", "expect_tx", ..] => {
                let one = self.constant(1);
                self.counted(slots[1], 0, one, u32::wrapping_sub)?;
                self.counted(slots[1], 4, slots[2], u32::wrapping_add)?;
            }
            ["st", "async", ..] => {
                let (barrier, words) = slots[1..].split_last()?;
                let bytes = self.constant(4 * words.len() as u64);
                let align = 4 * words.len() as u64;
                let all = [&slots[..1], words].concat();
                self.push(Code::Store { shared: true, bytes: 4, align }, all, vec![]);
                self.counted(*barrier, 4, bytes, u32::wrapping_sub)?;
            }
            ["mapa", "shared::cluster", "u32"] => {
                let address: Scalar = |[at, rank, _], _, _| Some((rank + 1) << RANK_SHIFT | at);
                self.push(Code::Scalar(address, 32, 32), slots[1..].to_vec(), slots[..1].to_vec());
            }
            ["red", "shared" | "shared::cluster", how, "u32" | "b32"] => {
                let combine: fn(u32, u32) -> u32 = match *how {
                    "add" => u32::wrapping_add,
                    "or" => |a, b| a | b,
                    "max" => u32::max,
                    _ => return None,
                };
                let old = self.slot();
                self.push(Code::Atomic(combine), slots, vec![old]);
            }
            ["atom", "shared", "add", "u32"] => {
                self.push(Code::Atomic(u32::wrapping_add), slots[1..].to_vec(), slots[..1].to_vec());
            }
            ["ldmatrix", "sync", "aligned", "m8n8", "x4", how @ ..] => {
                let transposed = how.first() == Some(&"trans");
                self.push(Code::Matrices { transposed }, slots[4..].to_vec(), slots[..4].to_vec());
            }
            ["mma", "sync", "aligned", shape, "row", "col", "f32", a, b, "f32"] if a == b => {
                let product = match (*shape, *a) {
                    ("m16n8k16", "bf16") => Product::Bf16,
                    ("m16n8k16", "f16") => Product::F16,
                    ("m16n8k32", "e4m3") => Product::E4m3,
                    _ => return None,
                };
                let (left, right, acc) = (&slots[4..8], &slots[8..10], &slots[10..14]);
                self.push(Code::Multiply(product), [acc, left, right].concat(), slots[..4].to_vec());
            }
            ["mov", "b32"] if slots.len() == 3 => {
                for (i, &half) in slots[..2].iter().enumerate() {
                    self.push(Code::Scalar(scalar::half_of(i == 1), 32, 16), vec![slots[2]], vec![half]);
                }
            }
            ["mov", _] => self.push(Code::Scalar(scalar::copy(), 64, 64), slots[1..].to_vec(), slots[..1].to_vec()),
            _ => {
                let to = match parts.as_slice() {
                    ["setp", ..] => 1,
                    ["cvt", .., to @ ("bf16" | "f16"), "f32"] if !to.is_empty() => 16,
                    ["cvt", .., "e4m3x2", "f32"] => 16,
                    _ => 32,
                };
                self.push(Code::Scalar(scalar::ptx(name)?, 32, to), slots[1..].to_vec(), slots[..1].to_vec());
            }
        }
        Some(())
    }
}
