//! Runs the text that [`super::mlir::Fn`] writes on the threads of one block: what the emitters mean, checked without a GPU.
//!
//! Threads run one after another between the points where they must meet; warps in an order that a seed chooses. Stricter than
//! the hardware: the lanes of a warp must meet at the same instruction and all threads at the same barrier, accesses must be
//! aligned and inside their memory, no shift may be as wide as its type, and two threads that touch a byte of shared
//! memory between two barriers, one of them writing, are a race unless both are atomic.

use std::collections::HashMap;

/// The memory a block sees, and what running it took.
#[derive(Debug, Default)]
pub struct Machine {
    /// Shared memory; what the kernel has not written is whatever the caller left.
    pub shared: Vec<u8>,
    /// Global memory: an address is an offset.
    pub global: Vec<u8>,
    /// The function's arguments.
    pub args: Vec<u64>,
    /// Chooses the order of warps between barriers.
    pub seed: u64,
    /// Instructions that thread 0 ran.
    pub steps: u64,
    /// Barriers that the block passed.
    pub barriers: u64,
}

/// A scalar, or the elements of a vector or struct.
type Value = [u64; 4];

#[derive(Clone, Copy, Debug)]
enum Src {
    Reg(usize),
    Arg(usize),
}

#[derive(Clone, Debug)]
struct Goto {
    block: usize,
    args: Vec<Src>,
}

#[derive(Clone, Debug, PartialEq)]
enum Code {
    Const(u64),
    Binary(String),
    Compare(String),
    Select,
    Cast(String, u32),
    Intrinsic(String),
    Offset(i64),
    Load { shared: bool, n: usize, align: u64 },
    Store { shared: bool, n: usize, align: u64 },
    Undef,
    Insert,
    Extract,
    Field(usize),
    Special(String),
    AtomicAdd,
    Warp(String),
    Barrier { any: bool },
    Jump,
    Branch,
    Return,
}

#[derive(Clone, Debug)]
struct Inst {
    code: Code,
    /// Bits of the operands' type (of an element, for vectors).
    bits: u32,
    dst: usize,
    args: Vec<Src>,
    to: Vec<Goto>,
    line: String,
}

#[derive(Default)]
struct Body {
    insts: Vec<Inst>,
    /// First instruction and arguments of each block.
    blocks: HashMap<usize, (usize, Vec<usize>)>,
    registers: usize,
}

fn bits_of(ty: &str) -> u32 {
    let ty = ty.trim();
    let ty = ty.strip_prefix("vector<").and_then(|t| t.split_once('x')).map_or(ty, |t| t.1.trim_end_matches('>'));
    match ty {
        "i1" => 1,
        "i8" => 8,
        "i16" => 16,
        "i32" | "f32" => 32,
        _ => 64,
    }
}

fn lanes_of(ty: &str) -> usize {
    ty.trim().strip_prefix("vector<").and_then(|t| t.split_once('x')).map_or(1, |t| t.0.parse().unwrap())
}

/// The `%names` of a text in order.
fn operands(text: &str) -> Vec<Src> {
    let name = |part: &str| {
        let end = part.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(part.len());
        match part[..end].strip_prefix('v') {
            Some(n) => Src::Reg(n.parse().unwrap()),
            None => Src::Arg(part[..end].parse().unwrap()),
        }
    };
    text.split('%').skip(1).map(name).collect()
}

fn number(text: &str) -> u64 {
    let text = text.trim();
    match (text, text.strip_prefix("0x")) {
        ("true", _) => 1,
        ("false", _) => 0,
        (_, Some(hex)) => u64::from_str_radix(hex, 16).unwrap(),
        _ => text.parse::<i64>().unwrap() as u64,
    }
}

fn goto(text: &str) -> Goto {
    let label = text.trim().trim_start_matches('^').trim_start_matches("bb");
    let end = label.find(|c: char| !c.is_ascii_digit()).unwrap_or(label.len());
    Goto { block: label[..end].parse().unwrap(), args: operands(&label[end..]) }
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

fn parse(line: &str) -> Result<Inst, String> {
    let (dst, text) = match line.split_once(" = ") {
        Some((dst, rest)) if dst.starts_with("%v") => (dst[2..].parse().unwrap(), rest),
        _ => (0, line),
    };
    let head_end = text.find([' ', '(']).unwrap_or(text.len());
    let (head, rest) = (&text[..head_end], text[head_end..].trim());
    let name = head.strip_prefix("llvm.").unwrap_or(head);
    let last_type = rest.rsplit(" : ").next().unwrap_or("");
    let quoted = |n: usize| rest.split('"').nth(n).unwrap_or("").to_owned();
    let align = || rest.split("alignment = ").nth(1).map_or(1, |t| number(t.split(' ').next().unwrap()));
    let mut to = Vec::new();
    let (code, bits) = match name {
        "mlir.constant" => {
            let bits = bits_of(last_type);
            (Code::Const(number(rest[1..].split([' ', ')']).next().unwrap()) & mask(bits)), bits)
        }
        "add" | "sub" | "mul" | "shl" | "lshr" | "ashr" | "and" | "or" | "xor" | "udiv" | "urem" | "sdiv" | "srem"
        | "fadd" | "fsub" | "fmul" | "fdiv" => (Code::Binary(name.into()), bits_of(last_type)),
        "icmp" | "fcmp" => (Code::Compare(quoted(1)), bits_of(last_type)),
        "select" => (Code::Select, 64),
        "zext" | "sext" | "trunc" | "bitcast" | "sitofp" | "ptrtoint" | "inttoptr" => {
            let (from, into) = last_type.split_once(" to ").ok_or(line)?;
            (Code::Cast(name.into(), bits_of(into)), bits_of(from))
        }
        "getelementptr" => {
            let index = rest.split(['[', ']']).nth(1).unwrap();
            let by = if index.starts_with('%') { 0 } else { number(index) as i64 };
            let ty = rest.split([',', ')']).nth(1).unwrap_or("");
            (Code::Offset(by), if index.starts_with('%') { bits_of(ty) } else { 64 })
        }
        "load" => {
            let (pointer, ty) = last_type.split_once(" -> ").ok_or(line)?;
            (Code::Load { shared: pointer.contains("<3>"), n: lanes_of(ty), align: align() }, bits_of(ty))
        }
        "store" => {
            let (ty, pointer) = last_type.split_once(", ").ok_or(line)?;
            (Code::Store { shared: pointer.contains("<3>"), n: lanes_of(ty), align: align() }, bits_of(ty))
        }
        "mlir.undef" => (Code::Undef, 64),
        "mlir.addressof" => (Code::Const(0), 64),
        "insertelement" => (Code::Insert, 64),
        "extractelement" => (Code::Extract, 64),
        "extractvalue" => (Code::Field(number(rest.split(['[', ']']).nth(1).unwrap()) as usize), 64),
        "br" => {
            to.push(goto(rest));
            (Code::Jump, 1)
        }
        "cond_br" => {
            to.extend(rest.split('^').skip(1).map(goto));
            (Code::Branch, 1)
        }
        "return" => (Code::Return, 1),
        "inline_asm" => return assembly(dst, line, &quoted(1), rest),
        "nvvm.barrier0" => (Code::Barrier { any: false }, 1),
        "nvvm.barrier" if rest.contains("reduction<or>") => (Code::Barrier { any: true }, 32),
        "nvvm.redux.sync" => (Code::Warp(format!("redux {}", rest.split(' ').next().unwrap())), 32),
        "nvvm.vote.sync" => (Code::Warp("ballot".into()), 1),
        "nvvm.shfl.sync" => (Code::Warp(format!("shfl {}", rest.split(' ').next().unwrap())), 32),
        _ if name.starts_with("intr.") => {
            (Code::Intrinsic(name[5..].into()), bits_of(last_type.split("-> ").nth(1).unwrap_or("i32")))
        }
        _ if name.starts_with("nvvm.read.ptx.sreg.") => (Code::Special(name[19..].into()), 32),
        _ => return Err(format!("cannot run `{line}`")),
    };
    let before_targets = if to.is_empty() { rest } else { rest.split('^').next().unwrap() };
    Ok(Inst { code, bits, dst, args: operands(before_targets), to, line: line.into() })
}

/// Inline assembly, by its instruction.
fn assembly(dst: usize, line: &str, text: &str, rest: &str) -> Result<Inst, String> {
    let args = operands(rest.rsplit('"').next().unwrap());
    let code = match text.split(' ').next().unwrap() {
        "popc.b32" => Code::Intrinsic("ctpop".into()),
        "clz.b32" => Code::Intrinsic("ctlz".into()),
        "atom.shared.add.u32" => Code::AtomicAdd,
        _ => return Err(format!("cannot run `{line}`")),
    };
    Ok(Inst { code, bits: 32, dst, args, to: Vec::new(), line: line.into() })
}

fn program(text: &str) -> Result<Body, String> {
    let mut p = Body::default();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let index = |s: &Src| if let Src::Reg(n) = s { *n } else { 0 };
        if let Some(label) = line.strip_prefix("^bb") {
            let end = label.find(|c: char| !c.is_ascii_digit()).unwrap();
            let args: Vec<usize> = operands(label).iter().map(index).collect();
            p.registers = args.iter().map(|a| a + 1).chain([p.registers]).max().unwrap();
            p.blocks.insert(label[..end].parse().unwrap(), (p.insts.len(), args));
        } else {
            let inst = parse(line)?;
            p.registers = p.registers.max(inst.dst + 1);
            p.insts.push(inst);
        }
    }
    Ok(p)
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum At {
    Running,
    Warp,
    Barrier,
    Done,
}

struct Thread {
    id: u64,
    pc: usize,
    at: At,
    registers: Vec<Value>,
}

/// Who touched a byte since the last barrier: thread + 1, or 0; `MANY` threads.
#[derive(Clone, Copy, Default)]
struct Touch {
    epoch: u64,
    read: u64,
    write: u64,
    atomic: u64,
}

const MANY: u64 = u64::MAX;

struct Run<'a> {
    m: &'a mut Machine,
    p: &'a Body,
    touched: Vec<Touch>,
}

impl Machine {
    /// Runs a function's body on `threads` threads.
    ///
    /// # Errors
    ///
    /// What the body does that hardware would not, or not always, do as meant; with the instruction.
    pub fn run(&mut self, text: &str, threads: u32) -> Result<(), String> {
        let p = program(text)?;
        let touched = vec![Touch::default(); self.shared.len()];
        let new = |id| Thread { id, pc: 0, at: At::Running, registers: vec![[0; 4]; p.registers] };
        let mut all: Vec<Thread> = (0..threads.into()).map(new).collect();
        self.steps = 0;
        self.barriers = 0;
        let mut run = Run { m: self, p: &p, touched };
        let mut random = run.m.seed;
        loop {
            let mut order: Vec<usize> = (0..all.len() / 32).collect();
            for i in (1..order.len()).rev() {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                order.swap(i, (random >> 33) as usize % (i + 1));
            }
            for w in order {
                run.warp(&mut all[w * 32..w * 32 + 32])?;
            }
            if all.iter().all(|t| t.at == At::Done) {
                return Ok(());
            }
            run.barrier(&mut all)?;
        }
    }
}

impl Run<'_> {
    /// Runs a warp until its lanes wait for the block or end.
    fn warp(&mut self, lanes: &mut [Thread]) -> Result<(), String> {
        loop {
            for lane in lanes.iter_mut() {
                while lane.at == At::Running {
                    self.step(lane)?;
                }
            }
            if lanes.iter().any(|l| (l.pc, l.at) != (lanes[0].pc, lanes[0].at)) {
                let at: Vec<usize> = lanes.iter().map(|l| l.pc).collect();
                return Err(format!("lanes diverge: {at:?}, at `{}`", self.p.insts[lanes[0].pc].line));
            }
            if lanes[0].at != At::Warp {
                return Ok(());
            }
            self.together(lanes)?;
        }
    }

    fn barrier(&mut self, all: &mut [Thread]) -> Result<(), String> {
        let (pc, inst) = (all[0].pc, &self.p.insts[all[0].pc]);
        if all.iter().any(|t| t.at != At::Barrier || t.pc != pc) {
            return Err(format!("not all threads meet at `{}`", inst.line));
        }
        self.m.barriers += 1;
        let any = match inst.code {
            Code::Barrier { any: true } => all.iter().any(|t| self.value(t, inst.args[0])[0] != 0),
            _ => false,
        };
        for t in all {
            t.registers[inst.dst][0] = any.into();
            t.pc += 1;
            t.at = At::Running;
        }
        Ok(())
    }

    /// An instruction of all lanes of a warp.
    fn together(&mut self, lanes: &mut [Thread]) -> Result<(), String> {
        let inst = &self.p.insts[lanes[0].pc];
        let column = |n: usize| lanes.iter().map(|l| self.value(l, inst.args[n])[0]).collect::<Vec<u64>>();
        let Code::Warp(how) = &inst.code else { unreachable!() };
        let results: Vec<u64> = match how.as_str() {
            "ballot" => {
                let votes = column(1);
                vec![votes.iter().enumerate().map(|(i, v)| (v & 1) << i).sum(); 32]
            }
            "redux add" => vec![column(0).iter().sum::<u64>() & mask(32); 32],
            "redux umax" => vec![*column(0).iter().max().unwrap(); 32],
            "redux umin" => vec![*column(0).iter().min().unwrap(); 32],
            _ => {
                let (v, by) = (column(1), column(2));
                let from = |i: usize| match how.as_str() {
                    "shfl bfly" => i ^ by[i] as usize,
                    "shfl up" => i.checked_sub(by[i] as usize).unwrap_or(i),
                    _ => by[i] as usize % 32,
                };
                (0..32).map(|i| v[from(i)]).collect()
            }
        };
        for (lane, v) in lanes.iter_mut().zip(results) {
            lane.registers[inst.dst][0] = v;
            lane.pc += 1;
            lane.at = At::Running;
        }
        Ok(())
    }

    fn value(&self, t: &Thread, src: Src) -> Value {
        match src {
            Src::Reg(n) => t.registers[n],
            Src::Arg(n) => [self.m.args[n], 0, 0, 0],
        }
    }

    fn jump(&mut self, t: &mut Thread, to: &Goto) {
        let (pc, args) = &self.p.blocks[&to.block];
        let values: Vec<Value> = to.args.iter().map(|&a| self.value(t, a)).collect();
        for (&a, v) in args.iter().zip(values) {
            t.registers[a] = v;
        }
        t.pc = *pc;
    }

    fn step(&mut self, t: &mut Thread) -> Result<(), String> {
        let p = self.p;
        let inst = &p.insts[t.pc];
        self.m.steps += u64::from(t.id == 0);
        let args: Vec<Value> = inst.args.iter().map(|&a| self.value(t, a)).collect();
        let wrong = |why: &str| Err(format!("{why}: thread {}, `{}`, {args:x?}", t.id, inst.line));
        let (bits, mut out) = (inst.bits, [0; 4]);
        match &inst.code {
            Code::Warp(_) => {
                t.at = At::Warp;
                return Ok(());
            }
            Code::Barrier { .. } => {
                t.at = At::Barrier;
                return Ok(());
            }
            Code::Return => {
                t.at = At::Done;
                return Ok(());
            }
            Code::Jump => {
                self.jump(t, &inst.to[0]);
                return Ok(());
            }
            Code::Branch => {
                self.jump(t, &inst.to[usize::from(args[0][0] & 1 == 0)]);
                return Ok(());
            }
            Code::Const(n) => out[0] = *n,
            Code::Binary(op) => match binary(op, args[0][0], args[1][0], bits) {
                Some(v) => out[0] = v & mask(bits),
                None => return wrong("undefined"),
            },
            Code::Compare(how) => out[0] = compare(how, args[0][0], args[1][0], bits).into(),
            Code::Select => out = args[if args[0][0] & 1 == 1 { 1 } else { 2 }],
            Code::Cast(op, to) => {
                out[0] = match op.as_str() {
                    "sext" => signed(args[0][0], bits) as u64,
                    "sitofp" => (signed(args[0][0], bits) as f32).to_bits().into(),
                    _ => args[0][0],
                } & mask(*to);
            }
            Code::Intrinsic(name) => match intrinsic(name, &args) {
                Some(v) => out[0] = v & mask(bits),
                None => return wrong("unknown"),
            },
            Code::Offset(by) => {
                let by = args.get(1).map_or(*by, |v| signed(v[0], bits));
                out[0] = args[0][0].wrapping_add(by as u64);
            }
            Code::Load { shared, n, align } => {
                let bytes = self.touch(t.id, *shared, args[0][0], *n as u64 * u64::from(bits.div_ceil(8)), *align, 'r');
                let Ok(at) = bytes else { return wrong(&bytes.unwrap_err()) };
                let memory = if *shared { &self.m.shared } else { &self.m.global };
                for (i, part) in memory[at].chunks(bits.div_ceil(8) as usize).enumerate() {
                    out[i] = part.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
                }
            }
            Code::Store { shared, n, align } => {
                let bytes = self.touch(t.id, *shared, args[1][0], *n as u64 * u64::from(bits.div_ceil(8)), *align, 'w');
                let Ok(at) = bytes else { return wrong(&bytes.unwrap_err()) };
                let memory = if *shared { &mut self.m.shared } else { &mut self.m.global };
                for (i, part) in memory[at].chunks_mut(bits.div_ceil(8) as usize).enumerate() {
                    part.copy_from_slice(&args[0][i].to_le_bytes()[..part.len()]);
                }
            }
            Code::AtomicAdd => {
                let bytes = self.touch(t.id, true, args[0][0], 4, 4, 'a');
                let Ok(at) = bytes else { return wrong(&bytes.unwrap_err()) };
                let word = &mut self.m.shared[at];
                let old = u32::from_le_bytes((&*word).try_into().unwrap());
                word.copy_from_slice(&old.wrapping_add(args[1][0] as u32).to_le_bytes());
                out[0] = old.into();
            }
            Code::Undef => out = [0xbad; 4],
            Code::Insert => {
                out = args[1];
                out[args[2][0] as usize] = args[0][0];
            }
            Code::Extract => out[0] = args[0][args[1][0] as usize],
            Code::Field(n) => out[0] = args[0][*n],
            Code::Special(name) if name == "tid.x" => out[0] = t.id,
            Code::Special(_) => {}
        }
        t.registers[inst.dst] = out;
        t.pc += 1;
        Ok(())
    }

    /// The range of an access, after checks; `how` is `r`, `w` or `a`.
    fn touch(
        &mut self,
        id: u64,
        shared: bool,
        at: u64,
        n: u64,
        align: u64,
        how: char,
    ) -> Result<std::ops::Range<usize>, String> {
        let size = if shared { self.m.shared.len() } else { self.m.global.len() };
        if !at.is_multiple_of(align) || at.checked_add(n).is_none_or(|end| end > size as u64) {
            return Err(format!("{n} bytes at {at} of {size}, align {align}"));
        }
        let range = at as usize..(at + n) as usize;
        if shared {
            for byte in range.clone() {
                let seen = &mut self.touched[byte];
                if seen.epoch != self.m.barriers {
                    *seen = Touch { epoch: self.m.barriers, ..Touch::default() };
                }
                let me = id + 1;
                let others = |who: u64| who != 0 && who != me;
                let race = match how {
                    'r' => others(seen.write) || others(seen.atomic),
                    'w' => others(seen.write) || others(seen.atomic) || others(seen.read),
                    _ => others(seen.write) || others(seen.read),
                };
                if race {
                    return Err(format!("race with thread {:?} at byte {byte}", (seen.read, seen.write, seen.atomic)));
                }
                let slot = match how {
                    'r' => &mut seen.read,
                    'w' => &mut seen.write,
                    _ => &mut seen.atomic,
                };
                *slot = if *slot == 0 || *slot == me { me } else { MANY };
            }
        }
        Ok(range)
    }
}

fn signed(v: u64, bits: u32) -> i64 {
    (v << (64 - bits)) as i64 >> (64 - bits)
}

fn float(v: u64) -> f32 {
    f32::from_bits(v as u32)
}

fn binary(op: &str, a: u64, b: u64, bits: u32) -> Option<u64> {
    let (x, y) = (float(a), float(b));
    let f = |v: f32| Some(u64::from(v.to_bits()));
    match op {
        "add" => Some(a.wrapping_add(b)),
        "sub" => Some(a.wrapping_sub(b)),
        "mul" => Some(a.wrapping_mul(b)),
        "shl" | "lshr" | "ashr" if b >= bits.into() => None,
        "shl" => Some(a << b),
        "lshr" => Some(a >> b),
        "ashr" => Some((signed(a, bits) >> b) as u64),
        "and" => Some(a & b),
        "or" => Some(a | b),
        "xor" => Some(a ^ b),
        "udiv" => a.checked_div(b),
        "urem" => a.checked_rem(b),
        "sdiv" => signed(a, bits).checked_div(signed(b, bits)).map(|v| v as u64),
        "srem" => signed(a, bits).checked_rem(signed(b, bits)).map(|v| v as u64),
        "fadd" => f(x + y),
        "fsub" => f(x - y),
        "fmul" => f(x * y),
        _ => f(x / y),
    }
}

fn compare(how: &str, a: u64, b: u64, bits: u32) -> bool {
    let (s, r, x, y) = (signed(a, bits), signed(b, bits), float(a), float(b));
    match how {
        "eq" => a == b,
        "ne" => a != b,
        "slt" => s < r,
        "sle" => s <= r,
        "sgt" => s > r,
        "sge" => s >= r,
        "ult" => a < b,
        "ule" => a <= b,
        "ugt" => a > b,
        "uge" => a >= b,
        "olt" => x < y,
        "ole" => x <= y,
        "oeq" => x == y,
        "ogt" => x > y,
        "oge" => x >= y,
        "une" => x != y,
        _ => panic!("comparison {how}"),
    }
}

/// Of 32-bit operands.
fn intrinsic(name: &str, args: &[Value]) -> Option<u64> {
    let (a, b) = (args[0][0] as u32, args.get(1).map_or(0, |v| v[0] as u32));
    let (x, y) = (f32::from_bits(a), f32::from_bits(b));
    Some(
        match name {
            "ctpop" => a.count_ones(),
            "ctlz" => a.leading_zeros(),
            "umin" => a.min(b),
            "umax" => a.max(b),
            "smin" => (a as i32).min(b as i32) as u32,
            "smax" => (a as i32).max(b as i32) as u32,
            "maximum" if x.is_nan() || y.is_nan() => f32::NAN.to_bits(),
            "maximum" => {
                if x >= y {
                    a
                } else {
                    b
                }
            }
            _ => return None,
        }
        .into(),
    )
}
