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
//! to the verifier. It never panics, and its recursion and memory are bounded by [`MAX_DEPTH`] and the length of the text.
//!
//! **Cost.** Linear in the text, both ways.

use super::verify::{MAX_DEPTH, for_each_operand};
use super::{
    Access, Index, Inst, MapArg, MapFn, MapInst, Op, Param, Program, ReduceKind, Region, Scalar, ScalarOp, Stride,
    TileType, Type, ValueId, ViewType,
};
use crate::dtype::DType;
use crate::extent::{Extent, GridDim, Sym};
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

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

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::ReadWrite];

fn access_name(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
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

/// Why a text is no program, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct ParseError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

/// The kernels of a text, in order. They are well-formed but not verified.
pub fn parse(text: &str) -> Result<Vec<Program>, ParseError> {
    let mut programs = Vec::new();
    let mut p = Parser::new(text)?;
    while !p.rest().is_empty() {
        programs.push(p.kernel()?);
    }
    Ok(programs)
}

pub(crate) type Parsed<T> = Result<T, ParseError>;

/// Recursive descent over characters.
pub(crate) struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// Values of the current kernel.
    pub(crate) names: HashMap<&'a str, ValueId>,
    pub(crate) types: Vec<Type>,
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

impl<'a> Parser<'a> {
    /// At the start of a text, unless it is longer than [`MAX_TEXT`].
    pub(crate) fn new(text: &'a str) -> Parsed<Parser<'a>> {
        let p = Parser { text, at: 0, names: HashMap::new(), types: Vec::new() };
        if text.len() > MAX_TEXT { Err(p.error(format!("a text of more than {MAX_TEXT} bytes"))) } else { Ok(p) }
    }

    pub(crate) fn error(&self, message: impl Into<String>) -> ParseError {
        let before = &self.text[..self.at];
        let line_start = before.rfind('\n').map_or(0, |i| i + 1);
        ParseError {
            line: 1 + before.matches('\n').count(),
            column: 1 + before[line_start..].chars().count(),
            message: message.into(),
        }
    }

    /// What follows, white space and comments skipped.
    pub(crate) fn rest(&mut self) -> &'a str {
        loop {
            let rest = self.text[self.at..].trim_start();
            self.at = self.text.len() - rest.len();
            if !rest.starts_with("//") {
                return rest;
            }
            self.at += rest.find('\n').unwrap_or(rest.len());
        }
    }

    /// Takes that token if it is next. A word must end where the token ends.
    pub(crate) fn eat(&mut self, token: &str) -> bool {
        let rest = self.rest();
        let goes_on = |after: &str| token.ends_with(is_word) && after.starts_with(is_word);
        let found = rest.strip_prefix(token).is_some_and(|after| !goes_on(after));
        self.at += if found { token.len() } else { 0 };
        found
    }

    pub(crate) fn expect(&mut self, token: &str) -> Parsed<()> {
        if self.eat(token) { Ok(()) } else { Err(self.error(format!("expected `{token}`"))) }
    }

    /// The longest prefix of such characters; empty if there is none.
    fn take(&mut self, accept: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !accept(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    pub(crate) fn word(&mut self, what: &str) -> Parsed<&'a str> {
        let start = self.rest();
        if !start.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return Err(self.error(format!("expected {what}")));
        }
        Ok(self.take(is_word))
    }

    pub(crate) fn integer<T: FromStr>(&mut self) -> Parsed<T> {
        let rest = self.rest();
        let digits = rest.strip_prefix('-').unwrap_or(rest);
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len()) + rest.len() - digits.len();
        let n = rest[..end].parse().map_err(|_| self.error("expected an integer in range"))?;
        self.at += end;
        Ok(n)
    }

    /// `open item, item close`
    pub(crate) fn list<T>(&mut self, open: &str, close: &str, item: impl Fn(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        self.expect(open)?;
        if self.eat(close) {
            return Ok(Vec::new());
        }
        let items = self.items(item)?;
        self.expect(close)?;
        Ok(items)
    }

    /// One or more, with commas between.
    pub(crate) fn items<T>(&mut self, item: impl Fn(&mut Self) -> Parsed<T>) -> Parsed<Vec<T>> {
        let mut items = vec![item(self)?];
        while self.eat(",") {
            items.push(item(self)?);
        }
        Ok(items)
    }

    pub(crate) fn name(&mut self) -> Parsed<&'a str> {
        self.expect("%")?;
        match self.text[self.at..].starts_with(is_word) {
            true => Ok(self.take(is_word)),
            false => Err(self.error("expected the name of a value")),
        }
    }

    pub(crate) fn define(&mut self, name: &'a str, ty: Type) -> Parsed<ValueId> {
        let v = ValueId(self.types.len() as u32);
        if self.names.insert(name, v).is_some() {
            return Err(self.error(format!("%{name} is defined twice")));
        }
        self.types.push(ty);
        Ok(v)
    }

    pub(crate) fn value(&mut self) -> Parsed<ValueId> {
        let name = self.name()?;
        self.names.get(name).copied().ok_or_else(|| self.error(format!("%{name} is not defined above")))
    }

    pub(crate) fn index(&mut self) -> Parsed<Index> {
        Ok(if self.rest().starts_with('%') { Index::Value(self.value()?) } else { Index::Const(self.integer()?) })
    }

    fn sym(&mut self) -> Parsed<Sym> {
        let word = self.word("a symbol")?;
        Sym::from_name(word).ok_or_else(|| self.error(format!("no symbol {word}")))
    }

    pub(crate) fn dtype(&mut self) -> Parsed<DType> {
        let word = self.word("an element type")?;
        DType::from_name(word).ok_or_else(|| self.error(format!("no element type {word}")))
    }

    fn extent(&mut self) -> Parsed<Extent> {
        if !self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(self.sym()?.into());
        }
        let factor = self.integer()?;
        let sym = if self.eat("*") { Some(self.sym()?) } else { None };
        Ok(Extent { factor, sym })
    }

    /// The `x` between two sizes, which runs into what follows.
    pub(crate) fn times(&mut self) -> Parsed<()> {
        if !self.rest().starts_with('x') {
            return Err(self.error("expected `x`"));
        }
        self.at += 1;
        Ok(())
    }

    pub(crate) fn ty(&mut self) -> Parsed<Type> {
        if self.eat("tile<") {
            let mut shape = Vec::new();
            while self.rest().starts_with(|c: char| c.is_ascii_digit()) {
                shape.push(self.integer()?);
                self.times()?;
            }
            let dtype = self.dtype()?;
            self.expect(">")?;
            return Ok(Type::Tile(TileType { dtype, shape }));
        }
        if self.eat("topk<") {
            let rows = self.integer()?;
            self.times()?;
            let k = self.integer()?;
            self.expect(">")?;
            return Ok(Type::Topk { rows, k });
        }
        if self.eat("view<") {
            return Ok(Type::View(self.view()?));
        }
        Ok(Type::Tile(TileType::scalar(self.dtype()?)))
    }

    /// After `view<`.
    fn view(&mut self) -> Parsed<ViewType> {
        let shape = self.list("[", "]", Self::extent)?;
        let mut view = ViewType::dense(self.dtype()?, &shape);
        while self.eat(",") {
            if self.eat("offset") {
                view.offset = self.integer()?;
                continue;
            }
            self.expect("strides")?;
            view.strides = self.list("[", "]", |p| {
                let bytes = p.integer()?;
                let sym = if p.eat("*") { Some(p.sym()?) } else { None };
                Ok(Stride { bytes, sym })
            })?;
        }
        self.expect(">")?;
        Ok(view)
    }

    fn kernel(&mut self) -> Parsed<Program> {
        (self.names, self.types) = (HashMap::new(), Vec::new());
        self.expect("kernel")?;
        let name = self.word("the kernel's name")?.to_owned();
        let grid = self.grid()?;
        let mut params = Vec::new();
        while !self.eat("{") {
            let word = self.word("`{` or a parameter")?;
            params.push(self.param(word)?);
        }
        let body = self.region(1, Vec::new())?;
        Ok(Program { name, grid, params, types: std::mem::take(&mut self.types), body })
    }

    /// `grid(T/1)`
    pub(crate) fn grid(&mut self) -> Parsed<Vec<GridDim>> {
        self.expect("grid")?;
        self.list("(", ")", |p| {
            let extent = p.extent()?;
            p.expect("/")?;
            Ok(GridDim { extent, tile: p.integer()? })
        })
    }

    /// A parameter, after its first word.
    pub(crate) fn param(&mut self, word: &str) -> Parsed<Param> {
        let access = ACCESSES.into_iter().find(|&a| access_name(a) == word);
        let access = access.ok_or_else(|| self.error("a parameter is `read`, `write` or `readwrite`"))?;
        let name = self.name()?;
        self.expect(":")?;
        let ty = self.ty()?;
        Ok(Param { name: name.to_owned(), value: self.define(name, ty)?, access })
    }

    /// After `{`, up to and with `}`.
    fn region(&mut self, depth: usize, args: Vec<ValueId>) -> Parsed<Region> {
        if depth > MAX_DEPTH {
            return Err(self.error(format!("regions are nested more than {MAX_DEPTH} deep")));
        }
        let mut region = Region { args, ..Region::default() };
        loop {
            if self.eat("}") {
                return Ok(region);
            }
            if self.eat("yield") {
                region.yields = self.items(Self::value)?;
                self.expect("}")?;
                return Ok(region);
            }
            region.insts.push(self.inst(depth)?);
        }
    }

    fn inst(&mut self, depth: usize) -> Parsed<Inst> {
        let mut names = Vec::new();
        if self.rest().starts_with('%') {
            names = self.items(Self::name)?;
            self.expect("=")?;
        }
        let keyword = self.word("an operation")?;
        let (op, types) = match keyword {
            "for" => self.for_loop(depth)?,
            "if" => self.branch(depth)?,
            _ => {
                let op = self.op(keyword)?;
                let types = if self.eat(":") { self.items(Self::ty)? } else { Vec::new() };
                (self.with_shape(op, &types)?, types)
            }
        };
        if names.len() != types.len() {
            return Err(self.error(format!("{} results of {} types", names.len(), types.len())));
        }
        let results = names.into_iter().zip(types).map(|(name, ty)| self.define(name, ty)).collect::<Parsed<_>>()?;
        Ok(Inst { results, op })
    }

    fn for_loop(&mut self, depth: usize) -> Parsed<(Op, Vec<Type>)> {
        let counter = self.name()?;
        self.expect("=")?;
        let lo = self.index()?;
        self.expect("to")?;
        let hi = self.index()?;
        self.expect("step")?;
        let step = self.integer()?;
        let mut carried = Vec::new();
        if self.eat("iter") {
            carried = self.list("(", ")", |p| {
                let name = p.name()?;
                p.expect("=")?;
                let init = p.value()?;
                p.expect(":")?;
                Ok((name, init, p.ty()?))
            })?;
        }
        self.expect("{")?;
        let mut args = vec![self.define(counter, Type::Tile(TileType::scalar(DType::I32)))?];
        for (name, _, ty) in &carried {
            args.push(self.define(name, ty.clone())?);
        }
        let body = self.region(depth + 1, args)?;
        let (init, types) = carried.into_iter().map(|(_, init, ty)| (init, ty)).unzip();
        Ok((Op::For { lo, hi, step, init, body }, types))
    }

    fn branch(&mut self, depth: usize) -> Parsed<(Op, Vec<Type>)> {
        let cond = self.value()?;
        let types = if self.eat(":") { self.items(Self::ty)? } else { Vec::new() };
        self.expect("{")?;
        let then = self.region(depth + 1, Vec::new())?;
        let mut otherwise = Region::default();
        if self.eat("else") {
            self.expect("{")?;
            otherwise = self.region(depth + 1, Vec::new())?;
        }
        Ok((Op::If { cond, then, otherwise }, types))
    }

    /// The shape that an operation takes from its result's type.
    pub(crate) fn with_shape(&self, mut op: Op, types: &[Type]) -> Parsed<Op> {
        let want = match &mut op {
            Op::Full { shape, .. }
            | Op::Iota { shape, .. }
            | Op::Load { shape, .. }
            | Op::Gather { shape, .. }
            | Op::Reshape { shape, .. }
            | Op::Slice { shape, .. } => match types {
                [Type::Tile(t)] => {
                    shape.clone_from(&t.shape);
                    return Ok(op);
                }
                _ => "a tile",
            },
            Op::TopkInit { rows, k } => match types {
                [Type::Topk { rows: r, k: members }] => {
                    (*rows, *k) = (*r, *members);
                    return Ok(op);
                }
                _ => "a top-k state",
            },
            _ => return Ok(op),
        };
        Err(self.error(format!("the result of this operation is {want}")))
    }

    /// [`Parser::access`] of what may name rows or not.
    pub(crate) fn access_or_rows(&mut self) -> Parsed<(ValueId, Option<ValueId>, Vec<Index>)> {
        let inside = self.rest().split_once('[').map_or("", |(_, inside)| inside);
        self.access(inside.trim_start().starts_with("rows "))
    }

    /// `%x[rows %1, 0, %2]`
    pub(crate) fn access(&mut self, has_rows: bool) -> Parsed<(ValueId, Option<ValueId>, Vec<Index>)> {
        let view = self.value()?;
        self.expect("[")?;
        let mut rows = None;
        if has_rows {
            self.expect("rows")?;
            rows = Some(self.value()?);
            if self.eat("]") {
                return Ok((view, rows, Vec::new()));
            }
            self.expect(",")?;
        } else if self.eat("]") {
            return Ok((view, None, Vec::new()));
        }
        let index = self.items(Self::index)?;
        self.expect("]")?;
        Ok((view, rows, index))
    }

    fn after_comma(&mut self) -> Parsed<ValueId> {
        self.expect(",")?;
        self.value()
    }

    fn axis(&mut self) -> Parsed<u32> {
        self.expect("axis")?;
        self.integer()
    }

    fn reduce_kind(&mut self) -> Parsed<ReduceKind> {
        match self.word("`sum` or `max`")? {
            "sum" => Ok(ReduceKind::Sum),
            "max" => Ok(ReduceKind::Max),
            other => Err(self.error(format!("no reduction {other}"))),
        }
    }

    /// An operation without regions, after its keyword; shapes are left empty.
    pub(crate) fn op(&mut self, keyword: &str) -> Parsed<Op> {
        let shape = Vec::new();
        Ok(match keyword {
            "block_id" => Op::BlockId { axis: self.integer()? },
            "sym" => Op::Sym(self.sym()?),
            "full" => match self.literal()? {
                Some(value) => Op::Full { value, shape },
                None => return Err(self.error("expected a constant")),
            },
            "iota" => Op::Iota { axis: self.integer()?, shape },
            "load" | "store" | "gather" | "scatter" => return self.memory_op(keyword),
            "map" => self.map()?,
            "reduce" => Op::Reduce { kind: self.reduce_kind()?, x: self.value()?, axis: self.axis()? },
            "scan" => Op::Scan { kind: self.reduce_kind()?, x: self.value()?, axis: self.axis()? },
            "dot" | "dot_t" => {
                let (a, b) = (self.value()?, self.after_comma()?);
                let acc = if self.eat("acc") { Some(self.value()?) } else { None };
                Op::Dot { a, b, acc, trans_b: keyword == "dot_t" }
            }
            "reshape" => Op::Reshape { x: self.value()?, shape },
            "permute" => Op::Permute { x: self.value()?, perm: self.list("[", "]", Self::integer)? },
            "slice" => Op::Slice { x: self.value()?, offsets: self.list("[", "]", Self::integer)?, shape },
            "concat" => Op::Concat { xs: self.items(Self::value)?, axis: self.axis()? },
            "topk_init" => Op::TopkInit { rows: 0, k: 0 },
            "topk_push" => {
                Op::TopkPush { state: self.value()?, values: self.after_comma()?, base: self.after_comma()? }
            }
            "topk_take" => Op::TopkTake { state: self.value()? },
            other => return Err(self.error(format!("no operation {other}"))),
        })
    }

    fn memory_op(&mut self, keyword: &str) -> Parsed<Op> {
        let (view, rows, index) = self.access(matches!(keyword, "gather" | "scatter"))?;
        let shape = Vec::new();
        Ok(match (keyword, rows) {
            ("gather", Some(rows)) => Op::Gather { view, rows, index, shape },
            ("scatter", Some(rows)) => Op::Scatter { view, rows, index, value: self.after_comma()? },
            ("store", _) => Op::Store { view, index, value: self.after_comma()? },
            _ => Op::Load { view, index, shape },
        })
    }

    /// A constant, if one is next.
    fn literal(&mut self) -> Parsed<Option<Scalar>> {
        let start = self.at;
        let text = self.take(|c| is_word(c) || matches!(c, '.' | '-' | '+'));
        let value = match text {
            "true" => Some(Scalar::Bool(true)),
            "false" => Some(Scalar::Bool(false)),
            "inf" => Some(Scalar::F32(f32::INFINITY)),
            "-inf" => Some(Scalar::F32(f32::NEG_INFINITY)),
            "nan" => Some(Scalar::F32(f32::from_bits(NAN_BITS))),
            _ if !text.starts_with(|c: char| c.is_ascii_digit() || c == '-') => {
                self.at = start;
                return Ok(None);
            }
            _ => match text.strip_prefix("0x") {
                Some(hex) => u32::from_str_radix(hex, 16).ok().map(|bits| Scalar::F32(f32::from_bits(bits))),
                None if text.contains(['.', 'e']) => text.parse().ok().filter(|x: &f32| x.is_finite()).map(Scalar::F32),
                None => text.parse().ok().map(Scalar::I32),
            },
        };
        value.map(Some).ok_or_else(|| self.error(format!("{text} is no constant")))
    }

    /// After `map`.
    fn map(&mut self) -> Parsed<Op> {
        let inputs = self.list("(", ")", Self::value)?;
        self.expect("{")?;
        let mut names: HashMap<&'a str, MapArg> = HashMap::new();
        if !self.eat("->") {
            for (i, name) in self.items(|p| p.word("an input's name"))?.into_iter().enumerate() {
                if names.insert(name, MapArg::Input(i as u32)).is_some() {
                    return Err(self.error(format!("{name} is defined twice")));
                }
            }
            self.expect("->")?;
        }
        if names.len() != inputs.len() {
            return Err(self.error(format!("{} names for {} inputs", names.len(), inputs.len())));
        }
        let mut insts = Vec::new();
        loop {
            let name = self.word("an instruction or the result")?;
            if !self.eat("=") {
                let result = names.get(name).copied();
                let result = result.ok_or_else(|| self.error(format!("{name} is not defined above")))?;
                self.expect("}")?;
                return Ok(Op::Map { inputs, body: MapFn { insts, result } });
            }
            let result = self.map_inst(&mut insts, &names)?;
            if names.insert(name, result).is_some() {
                return Err(self.error(format!("{name} is defined twice")));
            }
            self.expect(";")?;
        }
    }

    /// The right side of an instruction of a map: a constant, or an operation and its operands.
    fn map_inst(&mut self, insts: &mut Vec<MapInst>, names: &HashMap<&'a str, MapArg>) -> Parsed<MapArg> {
        let push = |insts: &mut Vec<MapInst>, op, args| {
            insts.push(MapInst { op, args });
            MapArg::Inst(insts.len() as u32 - 1)
        };
        if let Some(value) = self.literal()? {
            return Ok(push(insts, ScalarOp::Const(value), Vec::new()));
        }
        let op = self.scalar_op()?;
        let mut args = Vec::new();
        while !self.rest().starts_with(';') {
            if !args.is_empty() {
                self.expect(",")?;
            }
            args.push(match self.literal()? {
                Some(value) => push(insts, ScalarOp::Const(value), Vec::new()),
                None => {
                    let name = self.word("an operand")?;
                    let arg = names.get(name).copied();
                    arg.ok_or_else(|| self.error(format!("{name} is not defined above")))?
                }
            });
        }
        Ok(push(insts, op, args))
    }

    fn scalar_op(&mut self) -> Parsed<ScalarOp> {
        let word = self.word("a scalar operation")?;
        if word == "cast" || word == "bitcast" {
            self.expect("<")?;
            let to = self.dtype()?;
            self.expect(">")?;
            return Ok(if word == "cast" { ScalarOp::Cast(to) } else { ScalarOp::Bitcast(to) });
        }
        if word == "select" {
            return Ok(ScalarOp::Select);
        }
        let found = SCALAR_OPS.iter().find(|(_, name)| *name == word);
        found.map(|(op, _)| *op).ok_or_else(|| self.error(format!("no scalar operation {word}")))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tile::interp::{Binding, Options, block_count, run_blocks};
    use crate::tile::{Builder, MapBuilder, MapVal, verify};
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    fn example() -> Program {
        let mut b = Builder::new("row_sums");
        let x = b.param("x", DType::Bf16, &[Sym::T.into(), Extent::from(Sym::C).times(64)], Access::Read);
        let ids = b.param("ids", DType::I32, &[Sym::T.into()], Access::Read);
        let token = b.grid(Sym::T, 1);
        let n = b.sym(Sym::C);
        let strides = [256, 4].map(|bytes| Stride { bytes, sym: None }).to_vec();
        let shape = vec![Sym::N.into(), 1u32.into()];
        let y = b.param_view("y", ViewType { dtype: DType::F32, shape, strides, offset: 128 }, Access::ReadWrite);
        let rows = b.load(ids, &[token.into()], &[1]);
        let init = b.full(f32::NEG_INFINITY, &[1, 1]);
        let best = b.for_(0, n, 64, &[init], |b, i, acc| {
            let tile = b.load(x, &[token.into(), i.into()], &[1, 64]);
            let wide = b.map(&[tile, acc[0]], |m, v| {
                let (x, half) = (m.cast(v[0], DType::F32), m.f32(0.5));
                let scaled = m.mul(x, half);
                let (s, one) = (m.sigmoid(scaled), m.f32(1.0));
                let t = m.add(s, one);
                m.max(t, v[1])
            });
            vec![b.reduce(wide, 1, ReduceKind::Max)]
        })[0];
        let scalar = b.reshape(best, &[]);
        let positive = b.map(&[scalar], |m, v| {
            let zero = m.f32(0.0);
            m.lt(zero, v[0])
        });
        b.if_(
            positive,
            |b| {
                b.scatter(y, rows, &[0.into()], best);
                vec![]
            },
            |_| vec![],
        );
        b.finish().unwrap()
    }

    #[test]
    fn prints_for_people() {
        let program = example();
        assert_eq!(verify(&program), []);
        assert_eq!(parse(&program.to_string()), Ok(vec![canonical(&program)]));
        expect![[r#"
            kernel row_sums grid(T/1)
                read %x: view<[T, 64*C] bf16>
                read %ids: view<[T] i32>
                readwrite %y: view<[N, 1] f32, strides [256, 4], offset 128>
            {
                %3 = block_id 0 : i32
                %4 = sym C : i32
                %5 = load %ids[%3] : tile<1xi32>
                %6 = full -inf : tile<1x1xf32>
                %12 = for %7 = 0 to %4 step 64 iter(%8 = %6: tile<1x1xf32>) {
                    %9 = load %x[%3, %7] : tile<1x64xbf16>
                    %10 = map(%9, %8) { a, b -> t0 = cast<f32> a; t2 = mul t0, 0.5; t4 = mul t2, -1.442695; t5 = exp2 t4; t6 = 1.0; t7 = add t6, t5; t8 = div t6, t7; t10 = add t8, 1.0; t11 = max t10, b; t11 } : tile<1x64xf32>
                    %11 = reduce max %10 axis 1 : tile<1x1xf32>
                    yield %11
                }
                %13 = reshape %12 : f32
                %14 = map(%13) { a -> t1 = lt 0.0, a; t1 } : bool
                if %14 {
                    scatter %y[rows %5, 0], %12
                }
            }
        "#]].assert_eq(&program.to_string());
    }

    #[test]
    fn floats_keep_their_bits() {
        for bits in
            [0, 1, 0x8000_0000, 0x7f80_0000, 0xff80_0000, NAN_BITS, 0xffc0_0001, 0x7f80_0001, 0x3dcc_cccd, 0x7f7f_ffff]
        {
            let text = Scalar::F32(f32::from_bits(bits)).to_string();
            let mut p = Parser::new(&text).unwrap();
            assert_eq!(p.literal(), Ok(Some(Scalar::F32(f32::from_bits(bits)))), "{text}");
        }
    }

    fn check_error(text: &str, expected: Expect) {
        expected.assert_eq(&parse(text).unwrap_err().to_string());
    }

    #[test]
    fn errors_have_a_place_and_a_reason() {
        check_error("kernel", expect!["1:7: expected the kernel's name"]);
        check_error("kernel k grid(1/1) {\n  %1 = lod %x[0] : f32\n}", expect!["2:11: no operation lod"]);
        check_error("kernel k grid(1/1) {\n  store %x[0], %y\n}", expect!["2:11: %x is not defined above"]);
        check_error("kernel k grid(4294967296/1) {}", expect!["1:15: expected an integer in range"]);
        check_error("kernel k grid(1/1) {\n  %1 = full 1e99 : f32 }", expect!["2:17: 1e99 is no constant"]);
        check_error("kernel k grid(1/1) {\n  %1 = iota 0\n}", expect!["3:1: the result of this operation is a tile"]);
        check_error(
            "kernel k grid(1/1) {\n  %1 = map() { -> t0 = 1.0; t1 } : f32\n}",
            expect!["2:32: t1 is not defined above"],
        );
        check_error("kernel k grid(1/1) { // no end", expect!["1:31: expected an operation"]);
        let deep: String = (0..65).map(|i| format!("for %{i} = 0 to 1 step 1 {{ ")).collect();
        check_error(&format!("kernel k grid(1/1) {{ {deep}"), expect!["1:1675: regions are nested more than 64 deep"]);
    }

    /// Writes a well-typed program as bytes dictate. Loads in loops, top-k through loops, every op and scalar op.
    struct Random<'a> {
        bytes: &'a [u8],
        views: Vec<ValueId>,
    }

    impl Random<'_> {
        fn byte(&mut self) -> usize {
            let Some((&first, rest)) = self.bytes.split_first() else { return 0 };
            self.bytes = rest;
            first.into()
        }

        fn program(&mut self) -> Program {
            let mut b = Builder::new("random");
            let rows = b.grid(Sym::T, 1 + self.byte() as u32 % 3);
            for (i, dtype) in [DType::F32, DType::Bf16, DType::F16, DType::E4m3, DType::I32].into_iter().enumerate() {
                let stride = |bytes| Stride { bytes, sym: None };
                let row = dtype.bytes() as i64 * (16 + (self.byte() % 3) as i64);
                let strides = vec![stride(row), stride(dtype.bytes() as i64)];
                let shape = vec![if self.byte() < 128 { Sym::T.into() } else { 8.into() }, 16.into()];
                let view = ViewType { dtype, shape, strides, offset: self.byte() as u64 / 64 * 4 };
                self.views.push(b.param_view(&format!("p{i}"), view, Access::ReadWrite));
            }
            let mut pool = vec![rows];
            self.block(&mut b, &mut pool, 0);
            b.finish().unwrap()
        }

        fn block(&mut self, b: &mut Builder, pool: &mut Vec<ValueId>, depth: usize) {
            for _ in 0..self.byte() % 12 {
                let made = self.op(b, pool, depth);
                pool.extend(made);
            }
        }

        fn any(&mut self, pool: &[ValueId]) -> ValueId {
            pool[self.byte() % pool.len()]
        }

        /// A value of that shape and type, made if there is none.
        fn of(&mut self, b: &mut Builder, pool: &[ValueId], dtype: DType, shape: &[u32]) -> ValueId {
            let fits: Vec<ValueId> =
                pool.iter().copied().filter(|&v| b.dtype(v) == dtype && b.shape(v) == shape).collect();
            if !fits.is_empty() {
                return self.any(&fits);
            }
            let float = f32::from_bits(u32::from_le_bytes([0; 4].map(|_: u8| self.byte() as u8)));
            let x = if dtype == DType::I32 { b.full_i32(self.byte() as i32 - 9, shape) } else { b.full(float, shape) };
            b.cast(x, dtype)
        }

        fn op(&mut self, b: &mut Builder, pool: &[ValueId], depth: usize) -> Vec<ValueId> {
            let (x, n) = (self.any(pool), 1 + self.byte() as u32 % 4);
            let (shape, dtype) = (b.shape(x), b.dtype(x));
            let axis = self.byte() as u32 % shape.len().max(1) as u32;
            let number = matches!(dtype, DType::F32 | DType::I32) && !shape.is_empty();
            let kind = if n % 2 == 0 { ReduceKind::Sum } else { ReduceKind::Max };
            let view = self.byte() % self.views.len();
            let view = self.views[view];
            let kept = b.dtype(view);
            let index = |me: &mut Self, b: &mut Builder| match me.byte() {
                i @ 0..32 => Index::from(i as i32 % 8 - n as i32 / 2),
                _ => me.of(b, pool, DType::I32, &[]).into(),
            };
            vec![match self.byte() % 17 {
                0 => b.sym(Sym::ALL[self.byte() % 6]),
                1 => b.iota(1, &[n, 2]),
                2 => {
                    let at = [index(self, b), index(self, b)];
                    b.load(view, &at, &[n, 4])
                }
                3 => {
                    let (at, tile) = ([index(self, b), index(self, b)], self.of(b, pool, kept, &[n, 4]));
                    b.store(view, &at, tile);
                    return vec![];
                }
                4 => {
                    let (rows, at) = (self.of(b, pool, DType::I32, &[n]), [index(self, b)]);
                    b.gather(view, rows, &at, &[n, 3])
                }
                5 => {
                    let (rows, at) = (self.of(b, pool, DType::I32, &[n]), [index(self, b)]);
                    let tile = self.of(b, pool, kept, &[n, 3]);
                    b.scatter(view, rows, &at, tile);
                    return vec![];
                }
                6 if number => b.reduce(x, axis, kind),
                7 if number => b.scan(x, axis, kind),
                8 => {
                    let (a, w) = (self.of(b, pool, DType::F32, &[n, 4]), self.of(b, pool, DType::E4m3, &[2, 4]));
                    let acc = (n > 1).then(|| self.of(b, pool, DType::F32, &[n, 2]));
                    if n < 4 { b.dot_t(a, w, acc) } else { b.dot(w, a, None) }
                }
                9 => b.reshape(x, &[1, shape.iter().product()]),
                10 => b.permute(x, &(0..shape.len() as u32).rev().collect::<Vec<_>>()),
                11 => b.slice(x, &vec![0; shape.len()], &vec![1; shape.len()]),
                12 if !shape.is_empty() && shape.iter().product::<u32>() < 256 => b.concat(&[x, x], axis),
                13 => return self.topk(b, pool, n),
                14 if depth < 3 => return self.loops(b, pool, x, depth),
                15 if depth < 3 => return self.branch(b, pool, x, depth),
                _ => self.map(b, pool, x),
            }]
        }

        fn topk(&mut self, b: &mut Builder, pool: &[ValueId], n: u32) -> Vec<ValueId> {
            let (state, values) = (b.topk_init(n, 3), self.of(b, pool, DType::F32, &[n, 2]));
            let state = b.for_(0, 6, 2, &[state], |b, i, state| vec![b.topk_push(state[0], values, i)])[0];
            let (values, numbers) = b.topk_take(state);
            vec![values, numbers]
        }

        fn loops(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId, depth: usize) -> Vec<ValueId> {
            let (dtype, shape) = (b.dtype(x), b.shape(x));
            let hi = self.of(b, &[], DType::I32, &[]);
            let hi = if self.byte() < 128 { hi.into() } else { Index::from(4) };
            b.for_(-1, hi, 100, &[x], |b, i, carried| {
                let mut pool = [pool, &[i], carried].concat();
                self.block(b, &mut pool, depth + 1);
                vec![self.of(b, &pool, dtype, &shape)]
            })
        }

        fn branch(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId, depth: usize) -> Vec<ValueId> {
            let (dtype, shape) = (b.dtype(x), b.shape(x));
            let zero = b.full(0.0, &[]);
            let cond = b.cast(zero, DType::Bool);
            let mut then_pool = pool.to_vec();
            let mut other = Random { bytes: self.bytes, views: self.views.clone() };
            b.if_(
                cond,
                |b| {
                    self.block(b, &mut then_pool, depth + 1);
                    vec![self.of(b, &then_pool, dtype, &shape)]
                },
                |b| vec![other.of(b, pool, dtype, &shape)],
            )
        }

        fn map(&mut self, b: &mut Builder, pool: &[ValueId], x: ValueId) -> ValueId {
            let s = self.of(b, pool, DType::F32, &[]);
            let (dtype, constant) = (b.dtype(x), self.byte() as f32 / 8.0 - 3.0);
            let choices: Vec<usize> = (0..self.byte() % 8).map(|_| self.byte()).collect();
            b.map(&[x, s], |m, v| {
                let mut x = if dtype == DType::Bool { m.select(v[0], v[1], v[1]) } else { m.cast(v[0], DType::F32) };
                for choice in choices {
                    x = Self::scalar(m, choice, x, v[1], constant);
                }
                if constant > 20.0 { m.cast(x, DType::Bf16) } else { x }
            })
        }

        fn scalar(m: &mut MapBuilder, choice: usize, x: MapVal, y: MapVal, constant: f32) -> MapVal {
            let c = m.f32(constant);
            match choice % 16 {
                0 => m.add(x, c),
                1 => m.sub(c, y),
                2 => m.mul(c, c),
                3 => m.div(y, x),
                4 => m.min(x, y),
                5 => m.fma(c, x, y),
                6 => m.neg(x),
                7 => m.abs(x),
                8 => m.sqrt(x),
                9 => m.exp2(x),
                10 => m.sigmoid(x),
                11 => m.pow2_ceil(x),
                12 => {
                    let less = m.le(x, c);
                    m.select(less, x, y)
                }
                13 => {
                    let (i, three) = (m.cast(x, DType::I32), m.i32(3));
                    let (q, r) = (m.div(i, three), m.rem(i, three));
                    let shifted = m.shl(q, r);
                    m.cast(shifted, DType::F32)
                }
                14 => {
                    let (a, b) = (m.eq(x, y), m.lt(x, y));
                    let both = m.or(a, b);
                    m.select(both, c, x)
                }
                _ => c,
            }
        }
    }

    pub(crate) fn random_program() -> impl Strategy<Value = Program> {
        proptest::collection::vec(any::<u8>(), 0..400)
            .prop_map(|bytes| Random { bytes: &bytes, views: Vec::new() }.program())
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(program in random_program()) {
            prop_assert_eq!(verify(&program), []);
            let parsed = parse(&program.to_string());
            prop_assert_eq!(parsed, Ok(vec![canonical(&program)]));
            prop_assert_eq!(canonical(&canonical(&program)), canonical(&program));
        }

        #[test]
        fn a_program_and_its_canonical_form_compute_the_same(program in random_program()) {
            let syms = crate::SymValues([3; 6]);
            let bindings: Vec<Binding> = (0..5).map(|buffer| Binding { buffer, offset: 0 }).collect();
            let run = |program: &Program| {
                let mut buffers: Vec<Vec<u8>> = (0..5).map(|i| (0..1024u32).map(|b| (b * 7 + i) as u8).collect()).collect();
                let blocks = 0..block_count(program, &syms).unwrap();
                let result = run_blocks(program, &syms, &mut buffers, &bindings, blocks, Options::default());
                result.map(|()| buffers)
            };
            let result = run(&program);
            prop_assert!(result.is_ok(), "{:?}", result);
            prop_assert_eq!(run(&canonical(&program)), result);
        }

        /// Whatever the text, nothing panics, and what parses prints again.
        #[test]
        fn damaged_text_is_survived(program in random_program(), cuts in proptest::collection::vec((any::<u16>(), any::<u16>(), 0..9usize), 1..4)) {
            let mut text: Vec<char> = program.to_string().chars().collect();
            for (at, to, len) in cuts {
                let (at, to) = (usize::from(at) % text.len(), usize::from(to) % text.len());
                let piece: Vec<char> = text[to..(to + len).min(text.len())].to_vec();
                text.splice(at..(at + len / 2).min(text.len()), piece);
            }
            let text: String = text.into_iter().collect();
            for program in parse(&text).unwrap_or_default() {
                let clean = verify(&program).is_empty();
                let again = parse(&program.to_string());
                prop_assert!(!clean || again == Ok(vec![program]));
            }
        }

        #[test]
        fn any_text_is_survived(text in "(kernel k grid\\([0-9TC*/]{0,6}\\) ?)?[{}%a-z0-9 =:<>\\[\\],x.;/-]{0,80}") {
            for program in parse(&text).unwrap_or_default() {
                let _ = (verify(&program), program.to_string());
            }
        }
    }
}
