//! The text of tile programs: what people read, write in tests and compare. One operation a line:
//!
//! ```text
//! kernel double grid(T/1)
//!     read %x: view<[T, 64] f32>
//!     write %y: view<[T, 64] f32>
//! {
//!     %2 = block_id 0 : i32
//!     %3 = load %x[%2, 0] : tile<1x64xf32>
//!     %4 = map(%3) { a -> t1 = mul a, 2.0; t1 } : tile<1x64xf32>
//!     store %y[%2, 0], %4
//! }
//! ```
//!
//! Parameters go by name, other values by number. Loops and branches:
//!
//! ```text
//! %9 = for %5 = 0 to %n step 64 iter(%6 = %4: f32) {
//!     yield %6
//! }
//! %12 = if %10 : f32 {
//!     yield %9
//! } else {
//!     yield %4
//! }
//! ```
//!
//! Inside `map`, inputs are `a`, `b`, ..; `t3` is the fourth instruction; a constant that is used once, right after its
//! definition, stands where it is used. Floats print with the fewest digits that give the same bits back; a NaN other than
//! the usual one prints its bits, `0x7fc00001`. A type after `:` is also where shapes come from. `//` starts a comment.
//!
//! **Invariants.** Values are numbered in the order of their definition ([`canonical`]): parameters, then for each operation its
//! regions (arguments first) and then its results. Printing always prints the canonical program, so for every program that
//! verifies, `parse(print(p)) == [canonical(p)]`. The parser checks only that the text can be represented, and leaves the rules
//! to the verifier. It never panics, and its recursion and memory are bounded by [`MAX_DEPTH`](super::verify::MAX_DEPTH) and the length of the text.
//!
//! **Cost.** Linear in the text, both ways.

mod parse;

pub use parse::{ParseError, parse};
pub(crate) use parse::{Parsed, Parser};

use super::verify::for_each_operand;
use super::{Access, Index, MapArg, MapFn, Op, Param, Program, ReduceKind, Region, Scalar, ScalarOp, Type, ValueId};
use crate::extent::GridDim;
use std::collections::HashMap;
use std::fmt;

/// Longest text that [`parse`] takes, in bytes.
pub const MAX_TEXT: usize = 1 << 24;

/// The same program with its values numbered in the order of definition, and no others. Uses of undefined values, which only
/// an invalid program has, become `u32::MAX`.
pub fn canonical(program: &Program) -> Program {
    let mut out = program.clone();
    let mut numbers: HashMap<ValueId, ValueId> = HashMap::new();
    let mut types = Vec::new();
    let mut define = |v: ValueId| {
        let next = ValueId(numbers.len() as u32);
        if *numbers.entry(v).or_insert(next) == next
            && let Some(ty) = program.types.get(v.0 as usize)
        {
            types.push(ty.clone());
        }
    };
    out.params.iter().for_each(|p| define(p.value));
    visit(&mut out.body, &mut |defined, v| {
        if defined {
            define(*v);
        }
    });
    let number = |v: ValueId| numbers.get(&v).copied().unwrap_or(ValueId(u32::MAX));
    out.params.iter_mut().for_each(|p| p.value = number(p.value));
    visit(&mut out.body, &mut |_, v| *v = number(*v));
    out.types = types;
    out
}

/// Calls `f(is a definition, value)` on every value of a region in the order of the numbering.
fn visit(region: &mut Region, f: &mut dyn FnMut(bool, &mut ValueId)) {
    region.args.iter_mut().for_each(|v| f(true, v));
    for inst in &mut region.insts {
        for_each_operand(&mut inst.op, &mut |v| f(false, v));
        match &mut inst.op {
            Op::For { body, .. } => visit(body, f),
            Op::If { then, otherwise, .. } => {
                visit(then, f);
                visit(otherwise, f);
            }
            _ => {}
        }
        inst.results.iter_mut().for_each(|v| f(true, v));
    }
    region.yields.iter_mut().for_each(|v| f(false, v));
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = canonical(self);
        let printer = Printer::new(&program.params, &program.types);
        writeln!(f, "kernel {} grid({})", program.name, grid_text(&program.grid))?;
        printer.params(f, &program.params)?;
        writeln!(f, "{{")?;
        printer.region(f, &program.body, 1)?;
        writeln!(f, "}}")
    }
}

/// `T/1, 4/2`
pub(crate) fn grid_text(grid: &[GridDim]) -> String {
    grid.iter().map(GridDim::to_string).collect::<Vec<_>>().join(", ")
}

const ACCESSES: [Access; 4] = [Access::Read, Access::Constant, Access::Write, Access::ReadWrite];

fn access_name(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Constant => "constant",
        Access::Write => "write",
        Access::ReadWrite => "readwrite",
    }
}

fn reduce_name(kind: ReduceKind) -> &'static str {
    match kind {
        ReduceKind::Sum => "sum",
        ReduceKind::Max => "max",
    }
}

/// Every scalar operation without parameters.
const SCALAR_OPS: [(ScalarOp, &str); 20] = [
    (ScalarOp::Add, "add"),
    (ScalarOp::Sub, "sub"),
    (ScalarOp::Mul, "mul"),
    (ScalarOp::Div, "div"),
    (ScalarOp::Rem, "rem"),
    (ScalarOp::Min, "min"),
    (ScalarOp::Max, "max"),
    (ScalarOp::Fma, "fma"),
    (ScalarOp::Neg, "neg"),
    (ScalarOp::Abs, "abs"),
    (ScalarOp::Sqrt, "sqrt"),
    (ScalarOp::Exp2, "exp2"),
    (ScalarOp::And, "and"),
    (ScalarOp::Or, "or"),
    (ScalarOp::Xor, "xor"),
    (ScalarOp::Shl, "shl"),
    (ScalarOp::Shr, "shr"),
    (ScalarOp::Lt, "lt"),
    (ScalarOp::Le, "le"),
    (ScalarOp::Eq, "eq"),
];

/// The name of a scalar operation, its type parameter included; a constant's is its literal.
fn scalar_op_name(op: ScalarOp) -> String {
    match op {
        ScalarOp::Const(value) => value.to_string(),
        ScalarOp::Select => "select".into(),
        ScalarOp::Cast(to) => format!("cast<{to}>"),
        ScalarOp::Bitcast(to) => format!("bitcast<{to}>"),
        op => SCALAR_OPS.iter().find(|(o, _)| *o == op).map_or("?", |(_, name)| name).into(),
    }
}

/// Bits of [`f32::NAN`], the NaN that prints as `nan`.
const NAN_BITS: u32 = 0x7fc0_0000;

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Scalar::F32(x) if x.to_bits() == NAN_BITS => f.write_str("nan"),
            Scalar::F32(x) if x.is_nan() => write!(f, "{:#010x}", x.to_bits()),
            Scalar::F32(x) => write!(f, "{x:?}"),
            Scalar::I32(x) => write!(f, "{x}"),
            Scalar::Bool(x) => write!(f, "{x}"),
        }
    }
}

/// A map's body, as between the braces.
impl fmt::Display for MapFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inlined = inlined_constants(self);
        let arg = |a: &MapArg| match *a {
            MapArg::Input(i) => input_name(i),
            MapArg::Inst(i) if inlined.get(i as usize) == Some(&true) => scalar_op_name(self.insts[i as usize].op),
            MapArg::Inst(i) => format!("t{i}"),
        };
        for (i, inst) in self.insts.iter().enumerate().filter(|(i, _)| !inlined[*i]) {
            let args: Vec<String> = inst.args.iter().map(arg).collect();
            let gap = if args.is_empty() { "" } else { " " };
            write!(f, "t{i} = {}{gap}{}; ", scalar_op_name(inst.op), args.join(", "))?;
        }
        f.write_str(&arg(&self.result))
    }
}

/// `a` to `z`, then `in26` and on.
fn input_name(i: u32) -> String {
    match u8::try_from(i) {
        Ok(small @ 0..26) => char::from(b'a' + small).to_string(),
        _ => format!("in{i}"),
    }
}

/// Which constants can stand where they are used, because a parser that defines constants just before their user, in the
/// order of its operands, puts them back where they were.
fn inlined_constants(body: &MapFn) -> Vec<bool> {
    let mut uses = vec![0u32; body.insts.len()];
    for &arg in body.insts.iter().flat_map(|i| &i.args).chain([&body.result]) {
        if let MapArg::Inst(i) = arg
            && let Some(n) = uses.get_mut(i as usize)
        {
            *n += 1;
        }
    }
    let mut inlined = vec![false; body.insts.len()];
    for (j, inst) in body.insts.iter().enumerate() {
        let mut next = j;
        for &arg in inst.args.iter().rev() {
            let Some(before) = next.checked_sub(1) else { break };
            let candidate = &body.insts[before];
            let constant = matches!(candidate.op, ScalarOp::Const(_)) && candidate.args.is_empty();
            if arg == MapArg::Inst(before as u32) && constant && uses[before] == 1 {
                inlined[before] = true;
                next = before;
            }
        }
        if matches!(body.result, MapArg::Inst(i) if i as usize == j) {
            inlined[j] = false;
        }
    }
    inlined
}

/// Prints operations. Parameters go by name.
pub(crate) struct Printer<'a> {
    pub(crate) types: &'a [Type],
    pub(crate) names: HashMap<ValueId, &'a str>,
}

impl<'a> Printer<'a> {
    pub(crate) fn new(params: &'a [Param], types: &'a [Type]) -> Printer<'a> {
        Printer { types, names: params.iter().map(|p| (p.value, p.name.as_str())).collect() }
    }

    /// A line a parameter.
    pub(crate) fn params(&self, f: &mut fmt::Formatter<'_>, params: &[Param]) -> fmt::Result {
        params.iter().try_for_each(|p| writeln!(f, "    {} %{}: {}", access_name(p.access), p.name, self.ty(p.value)))
    }

    pub(crate) fn v(&self, v: ValueId) -> String {
        self.names.get(&v).map_or_else(|| format!("%{}", v.0), |name| format!("%{name}"))
    }

    pub(crate) fn vs(&self, vs: &[ValueId]) -> String {
        vs.iter().map(|&v| self.v(v)).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn ty(&self, v: ValueId) -> String {
        self.types.get(v.0 as usize).map_or("?".into(), Type::to_string)
    }

    fn types(&self, vs: &[ValueId]) -> String {
        vs.iter().map(|&v| self.ty(v)).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn index(&self, i: &Index) -> String {
        match i {
            Index::Const(c) => c.to_string(),
            Index::Value(v) => self.v(*v),
        }
    }

    /// `%x[rows %1, 0, %2]`
    pub(crate) fn access(&self, view: ValueId, rows: Option<ValueId>, index: &[Index]) -> String {
        let rows = rows.map(|r| format!("rows {}", self.v(r)));
        let all: Vec<String> = rows.into_iter().chain(index.iter().map(|i| self.index(i))).collect();
        format!("{}[{}]", self.v(view), all.join(", "))
    }

    fn region(&self, f: &mut fmt::Formatter<'_>, region: &Region, depth: usize) -> fmt::Result {
        let indent = "    ".repeat(depth);
        for inst in &region.insts {
            write!(f, "{indent}")?;
            if !inst.results.is_empty() {
                write!(f, "{} = ", self.vs(&inst.results))?;
            }
            match &inst.op {
                Op::For { lo, hi, step, init, body } => {
                    let counter = body.args.first().map_or("?".into(), |&v| self.v(v));
                    write!(f, "for {counter} = {} to {} step {step} ", self.index(lo), self.index(hi))?;
                    let carried = body.args.iter().skip(1).zip(init);
                    let carried: Vec<String> =
                        carried.map(|(&a, &v)| format!("{} = {}: {}", self.v(a), self.v(v), self.ty(a))).collect();
                    if !carried.is_empty() {
                        write!(f, "iter({}) ", carried.join(", "))?;
                    }
                    self.block(f, body, depth)?;
                }
                Op::If { cond, then, otherwise } => {
                    write!(f, "if {} ", self.v(*cond))?;
                    if !inst.results.is_empty() {
                        write!(f, ": {} ", self.types(&inst.results))?;
                    }
                    self.block(f, then, depth)?;
                    if *otherwise != Region::default() {
                        write!(f, " else ")?;
                        self.block(f, otherwise, depth)?;
                    }
                }
                op => {
                    write!(f, "{}", self.op(op))?;
                    if !inst.results.is_empty() {
                        write!(f, " : {}", self.types(&inst.results))?;
                    }
                }
            }
            writeln!(f)?;
        }
        if !region.yields.is_empty() {
            writeln!(f, "{indent}yield {}", self.vs(&region.yields))?;
        }
        Ok(())
    }

    fn block(&self, f: &mut fmt::Formatter<'_>, region: &Region, depth: usize) -> fmt::Result {
        writeln!(f, "{{")?;
        self.region(f, region, depth + 1)?;
        write!(f, "{}}}", "    ".repeat(depth))
    }

    /// An operation without regions, its types left out.
    pub(crate) fn op(&self, op: &Op) -> String {
        match op {
            Op::BlockId { axis } => format!("block_id {axis}"),
            Op::Sym(sym) => format!("sym {}", sym.name()),
            Op::Full { value, .. } => format!("full {value}"),
            Op::Iota { axis, .. } => format!("iota {axis}"),
            Op::Load { view, index, .. } => format!("load {}", self.access(*view, None, index)),
            Op::Store { view, index, value } => {
                format!("store {}, {}", self.access(*view, None, index), self.v(*value))
            }
            Op::Gather { view, rows, index, .. } => format!("gather {}", self.access(*view, Some(*rows), index)),
            Op::Scatter { view, rows, index, value } => {
                format!("scatter {}, {}", self.access(*view, Some(*rows), index), self.v(*value))
            }
            Op::Map { inputs, body } => {
                let names: String = (0..inputs.len() as u32).map(|i| format!("{}, ", input_name(i))).collect();
                let names = names.strip_suffix(", ").map_or(String::new(), |names| format!("{names} "));
                format!("map({}) {{ {names}-> {body} }}", self.vs(inputs))
            }
            Op::Reduce { x, axis, kind } => format!("reduce {} {} axis {axis}", reduce_name(*kind), self.v(*x)),
            Op::Scan { x, axis, kind } => format!("scan {} {} axis {axis}", reduce_name(*kind), self.v(*x)),
            Op::Dot { a, b, acc, trans_b } => {
                let acc = acc.map_or(String::new(), |acc| format!(" acc {}", self.v(acc)));
                format!("{} {}, {}{acc}", if *trans_b { "dot_t" } else { "dot" }, self.v(*a), self.v(*b))
            }
            Op::Reshape { x, .. } => format!("reshape {}", self.v(*x)),
            Op::Permute { x, perm } => format!("permute {} {perm:?}", self.v(*x)),
            Op::Slice { x, offsets, .. } => format!("slice {} {offsets:?}", self.v(*x)),
            Op::Concat { xs, axis } => format!("concat {} axis {axis}", self.vs(xs)),
            Op::TopkInit { .. } => "topk_init".into(),
            Op::TopkPush { state, values, base } => format!("topk_push {}", self.vs(&[*state, *values, *base])),
            Op::TopkTake { state } => format!("topk_take {}", self.v(*state)),
            Op::For { .. } | Op::If { .. } => String::new(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
