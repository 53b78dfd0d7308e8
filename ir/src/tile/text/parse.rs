//! Text to tile programs.

use super::super::verify::MAX_DEPTH;
use super::super::{
    Index, Inst, MapArg, MapFn, MapInst, Op, Param, Program, ReduceKind, Region, Scalar, ScalarOp, Stride, TileType,
    Type, ValueId, ViewType,
};
use super::{ACCESSES, MAX_TEXT, NAN_BITS, SCALAR_OPS, access_name};
use crate::dtype::DType;
use crate::extent::{Extent, GridDim, Sym};
use std::collections::HashMap;
use std::str::FromStr;

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
        let access = access.ok_or_else(|| self.error("a parameter is `read`, `constant`, `write` or `readwrite`"))?;
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
    pub(super) fn literal(&mut self) -> Parsed<Option<Scalar>> {
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
