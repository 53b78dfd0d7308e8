//! The reader of that text.

use super::ATOMS;
use crate::dtype::DType;
use crate::sched::{Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled};
use crate::tile::text::{ParseError, Parsed, Parser};
use crate::tile::verify::MAX_DEPTH;
use crate::tile::{TileType, Type, ValueId};
use std::collections::HashMap;
use std::str::FromStr;

/// The kernels of a text, in order. They are well-formed but not verified.
///
/// # Errors
/// What is wrong with the text and where.
pub fn parse(text: &str) -> Result<Vec<Scheduled>, ParseError> {
    let mut kernels = Vec::new();
    let mut p = BlockParser { p: Parser::new(text)?, places: Vec::new() };
    while !p.p.rest().is_empty() {
        kernels.push(p.kernel()?);
    }
    Ok(kernels)
}

/// The tile parser, and the places of the values it has defined.
struct BlockParser<'a> {
    p: Parser<'a>,
    places: Vec<Place>,
}

/// `,` if it is not the first, then a word and the number behind it.
fn field<T: FromStr>(p: &mut Parser<'_>, name: &str, first: bool) -> Parsed<T> {
    if !first {
        p.expect(",")?;
    }
    p.expect(name)?;
    p.integer()
}

/// `b3`, `c0`: a letter and a number.
fn numbered(p: &mut Parser<'_>, letter: char, what: &str) -> Parsed<u32> {
    let word = p.word(what)?;
    let number = word.strip_prefix(letter).and_then(|n| n.parse().ok());
    number.ok_or_else(|| p.error(format!("expected {what}, such as {letter}0, not {word}")))
}

fn buffer_id(p: &mut Parser<'_>) -> Parsed<BufferId> {
    Ok(BufferId(numbered(p, 'b', "a buffer")?))
}

fn channel_id(p: &mut Parser<'_>) -> Parsed<ChannelId> {
    Ok(ChannelId(numbered(p, 'c', "a channel")?))
}

/// `4x2`
fn pair(p: &mut Parser<'_>) -> Parsed<[u32; 2]> {
    let first = p.integer()?;
    p.times()?;
    Ok([first, p.integer()?])
}

/// `c0.1`
fn slot(p: &mut Parser<'_>) -> Parsed<(ChannelId, u32)> {
    let channel = channel_id(p)?;
    p.expect(".")?;
    Ok((channel, p.integer()?))
}

fn place(p: &mut Parser<'_>) -> Parsed<Place> {
    p.expect("@")?;
    let word = p.word("a place")?;
    let simple = match word {
        "view" => Some(Place::View),
        "uniform" => Some(Place::Uniform),
        "lazy" => Some(Place::Lazy),
        "held" => Some(Place::Held),
        _ => None,
    };
    if let Some(place) = simple {
        return Ok(place);
    }
    p.expect("(")?;
    let place = match word {
        "shared" => Place::Shared(buffer_id(p)?),
        "slot" => {
            let channel = channel_id(p)?;
            p.expect(",")?;
            Place::Slot(channel, p.integer()?)
        }
        "frag" => {
            let word = p.word("an atom")?;
            let atom = ATOMS.iter().find(|(_, name)| *name == word).map(|(atom, _)| *atom);
            let atom = atom.ok_or_else(|| p.error(format!("no atom {word}")))?;
            p.expect(",")?;
            Place::Fragment(Fragment { atom, warps: pair(p)? })
        }
        _ => return Err(p.error(format!("no place @{word}"))),
    };
    p.expect(")")?;
    Ok(place)
}

/// A type and its place.
fn placed(p: &mut Parser<'_>) -> Parsed<(Type, Place)> {
    Ok((p.ty()?, place(p)?))
}

impl<'a> BlockParser<'a> {
    fn define(&mut self, name: &'a str, ty: Type, place: Place) -> Parsed<ValueId> {
        let v = self.p.define(name, ty)?;
        self.places.push(place);
        Ok(v)
    }

    fn kernel(&mut self) -> Parsed<Scheduled> {
        (self.p.names, self.p.types, self.places) = (HashMap::new(), Vec::new(), Vec::new());
        self.p.expect("scheduled")?;
        let name = self.p.word("the kernel's name")?.to_owned();
        let grid = self.p.grid()?;
        let persistent = if self.p.eat("persistent") { Some(self.p.integer()?) } else { None };
        let folded = self.p.eat("folded");
        let cluster = if self.p.eat("cluster") {
            let blocks = self.p.integer()?;
            Some(Cluster { blocks, axis: field(&mut self.p, "along", true)? })
        } else {
            None
        };
        let team = if self.p.eat("team") { self.p.integer()? } else { 1 };
        let alternate = self.p.eat("alternate");
        let dies = if self.p.eat("dies") { self.p.integer()? } else { 1 };
        self.p.expect("threads")?;
        let threads = self.p.integer()?;
        let (mut params, mut buffers, mut channels) = (Vec::new(), Vec::new(), Vec::new());
        while !self.p.eat("{") {
            match self.p.word("`{`, a parameter, a buffer or a channel")? {
                "buffer" => buffers.push(self.buffer(buffers.len())?),
                "channel" => channels.push(self.channel(channels.len())?),
                word => {
                    params.push(self.p.param(word)?);
                    self.places.push(Place::View);
                }
            }
        }
        let common = self.block(1, Vec::new())?;
        let mut roles = Vec::new();
        while self.p.eat("role") {
            roles.push(self.role()?);
        }
        let (types, places) = (std::mem::take(&mut self.p.types), std::mem::take(&mut self.places));
        Ok(Scheduled {
            name,
            grid,
            persistent,
            folded,
            cluster,
            team,
            alternate,
            dies,
            params,
            types,
            places,
            threads,
            buffers,
            channels,
            common,
            roles,
        })
    }

    /// `b0 = name:`, where the number counts the table's lines.
    fn table_line(&mut self, letter: char, what: &str, line: usize) -> Parsed<String> {
        let number = numbered(&mut self.p, letter, what)?;
        if number as usize != line {
            return Err(self.p.error(format!("{letter}{number} should be {letter}{line}: the table is in order")));
        }
        self.p.expect("=")?;
        let name = self.p.word("a name")?.to_owned();
        self.p.expect(":")?;
        Ok(name)
    }

    fn buffer(&mut self, line: usize) -> Parsed<Buffer> {
        let name = self.table_line('b', "a buffer", line)?;
        let p = &mut self.p;
        let (dtype, shape) = (p.dtype()?, pair(p)?);
        let offset = field(p, "offset", false)?;
        let bytes: u32 = field(p, "bytes", false)?;
        let (pitch, swizzle) = (field(p, "pitch", false)?, field(p, "swizzle", false)?);
        let copies = field(p, "copies", false)?;
        let mut buffer = Buffer { name, dtype, shape, pitch, swizzle, copies, offset, outside: false };
        if buffer.bytes() != bytes {
            let n = buffer.bytes();
            return Err(p.error(format!("{} rows, pitch and copies make {n} bytes, not {bytes}", buffer.name)));
        }
        buffer.outside = p.eat("outside");
        Ok(buffer)
    }

    fn channel(&mut self, line: usize) -> Parsed<Channel> {
        let name = self.table_line('c', "a channel", line)?;
        let stages = field(&mut self.p, "stages", true)?;
        self.p.expect(",")?;
        let turns = if self.p.eat("turns") {
            let turns = self.p.integer()?;
            self.p.expect(",")?;
            turns
        } else {
            1
        };
        self.p.expect("slots")?;
        Ok(Channel { name, stages, turns, slots: self.p.list("[", "]", buffer_id)? })
    }

    fn role(&mut self) -> Parsed<Role> {
        let p = &mut self.p;
        let name = p.word("the role's name")?.to_owned();
        let first = field(p, "warps", true)?;
        p.expect("..")?;
        let warps = [first, p.integer()?];
        let registers = if p.eat("registers") { Some(p.integer()?) } else { None };
        let elected = p.eat("elected");
        p.expect("{")?;
        Ok(Role { name, warps, registers, elected, body: self.block(1, Vec::new())? })
    }

    /// After `{`, up to and with `}`.
    fn block(&mut self, depth: usize, args: Vec<ValueId>) -> Parsed<Block> {
        if depth > MAX_DEPTH {
            return Err(self.p.error(format!("blocks are nested more than {MAX_DEPTH} deep")));
        }
        let mut block = Block { args, ..Block::default() };
        loop {
            if self.p.eat("}") {
                return Ok(block);
            }
            if self.p.eat("yield") {
                block.yields = self.p.items(Parser::value)?;
                self.p.expect("}")?;
                return Ok(block);
            }
            block.insts.push(self.inst(depth)?);
        }
    }

    fn inst(&mut self, depth: usize) -> Parsed<Inst> {
        let mut names = Vec::new();
        if self.p.rest().starts_with('%') {
            names = self.p.items(Parser::name)?;
            self.p.expect("=")?;
        }
        let (op, types) = match self.p.word("an operation")? {
            "for" => self.for_loop(depth)?,
            "if" => self.branch(depth)?,
            keyword => match self.sync_op(keyword)? {
                Some(op) => (op, self.result_types()?),
                None => {
                    let op = self.p.op(keyword)?;
                    let types = self.result_types()?;
                    let plain: Vec<Type> = types.iter().map(|(ty, _)| ty.clone()).collect();
                    (Op::Tile(self.p.with_shape(op, &plain)?), types)
                }
            },
        };
        let scratch = if self.p.eat("scratch") { Some(buffer_id(&mut self.p)?) } else { None };
        if names.len() != types.len() {
            return Err(self.p.error(format!("{} results of {} types", names.len(), types.len())));
        }
        let named = names.into_iter().zip(types);
        let results = named.map(|(name, (ty, place))| self.define(name, ty, place)).collect::<Parsed<_>>()?;
        Ok(Inst { results, op, scratch })
    }

    fn result_types(&mut self) -> Parsed<Vec<(Type, Place)>> {
        if self.p.eat(":") { self.p.items(placed) } else { Ok(Vec::new()) }
    }

    fn for_loop(&mut self, depth: usize) -> Parsed<(Op, Vec<(Type, Place)>)> {
        let p = &mut self.p;
        let counter = p.name()?;
        p.expect("=")?;
        let lo = p.index()?;
        p.expect("to")?;
        let hi = p.index()?;
        let step = field(p, "step", true)?;
        let mut carried = Vec::new();
        if p.eat("iter") {
            carried = p.list("(", ")", |p| {
                let name = p.name()?;
                p.expect("=")?;
                let init = p.value()?;
                p.expect(":")?;
                Ok((name, init, placed(p)?))
            })?;
        }
        p.expect("{")?;
        let mut args = vec![self.define(counter, Type::Tile(TileType::scalar(DType::I32)), Place::Uniform)?];
        for (name, _, (ty, place)) in &carried {
            args.push(self.define(name, ty.clone(), place.clone())?);
        }
        let body = self.block(depth + 1, args)?;
        let (init, types) = carried.into_iter().map(|(_, init, ty)| (init, ty)).unzip();
        Ok((Op::For { lo, hi, step, init, body }, types))
    }

    fn branch(&mut self, depth: usize) -> Parsed<(Op, Vec<(Type, Place)>)> {
        let cond = self.p.value()?;
        let types = self.result_types()?;
        self.p.expect("{")?;
        let then = self.block(depth + 1, Vec::new())?;
        let mut otherwise = Block::default();
        if self.p.eat("else") {
            self.p.expect("{")?;
            otherwise = self.block(depth + 1, Vec::new())?;
        }
        Ok((Op::If { cond, then, otherwise }, types))
    }

    /// An operation that tile programs do not have, after its keyword.
    fn sync_op(&mut self, keyword: &str) -> Parsed<Option<Op>> {
        let p = &mut self.p;
        Ok(Some(match keyword {
            "barrier" => Op::Barrier,
            "number" => Op::Number,
            "meet" => Op::Meet,
            "put" => {
                let buffer = buffer_id(p)?;
                p.expect(",")?;
                Op::Put { buffer, value: p.value()? }
            }
            "get" => Op::Get { buffer: buffer_id(p)?, after: field(p, "after", true)?, own: p.eat("own") },
            "part" => {
                let end = p.eat("end");
                if !end {
                    p.expect("begin")?;
                }
                let lo = p.value()?;
                p.expect("to")?;
                Op::Part { lo, hi: p.value()?, end }
            }
            "acquire" => Op::Acquire(channel_id(p)?),
            "commit" => Op::Commit(channel_id(p)?),
            "wait" => Op::Wait(channel_id(p)?),
            "take" => {
                let (channel, slot) = slot(p)?;
                Op::Take { channel, slot }
            }
            "fill" => {
                let shared = p.eat("shared");
                let (channel, slot) = slot(p)?;
                p.expect(",")?;
                Op::Fill { channel, slot, value: p.value()?, shared }
            }
            "release" => Op::Release { channel: channel_id(p)?, lag: field(p, "lag", true)? },
            "copy" => {
                let shared = p.eat("shared");
                let (channel, slot) = slot(p)?;
                p.expect(",")?;
                let (view, rows, index) = p.access_or_rows()?;
                p.expect(":")?;
                let Type::Tile(TileType { dtype, shape }) = p.ty()? else {
                    return Err(p.error("a copy is of a tile"));
                };
                match p.types.get(view.0 as usize) {
                    Some(Type::View(t)) if t.dtype != dtype => {
                        return Err(p.error(format!("a copy of {dtype} from {t}")));
                    }
                    _ => Op::Copy { channel, slot, view, rows, index, shape, shared },
                }
            }
            _ => return Ok(None),
        }))
    }
}
