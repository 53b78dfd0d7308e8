//! The text of scheduled kernels: what `--emit sched` writes and file tests compare. Operations are written as in tile programs
//! ([`crate::tile::text`]); a value's place follows its type.
//!
//! ```text
//! scheduled scale grid(T/1) threads 64
//!     read %x: view<[T, 64] bf16>
//!     write %y: view<[T, 64] f32>
//!     buffer b0 = x: bf16 1x64, offset 0, bytes 256, pitch 128, swizzle 0, copies 2
//!     channel c0 = rows: stages 2, slots [b0]
//! {
//!     %2 = block_id 0 : i32 @uniform
//! }
//! role producer warps 0..1 registers 24 elected {
//!     acquire c0
//!     copy c0.0, %x[%2, 0] : tile<1x64xbf16>
//!     commit c0
//! }
//! role consumer warps 1..2 {
//!     wait c0
//!     %3 = take c0.0 : tile<1x64xbf16> @slot(c0, 0)
//!     %4 = map(%3) { a -> t0 = cast<f32> a; t0 } : tile<1x64xf32> @lazy
//!     store %y[%2, 0], %4
//!     release c0 lag 0
//! }
//! ```
//!
//! A kernel with clusters says so behind its grid: `persistent 16 cluster 2 along 0`; a copy that they share is `copy shared c0.1, ...`, a tile
//! of which each computes a part `fill shared c0.1, ...`. A team's blocks have a `number`, `put b3, %4`, `meet`, and `get b3 after 1 own` (a piece)
//! or `get b3 after 1`, where `b3` of a team that exchanges through memory ends in `outside`. Halves that take turns and blocks dealt to dies stand there too: `alternate dies 8`.
//!
//! Places: `@uniform`, `@lazy`, `@shared(b3)`, `@slot(c0, 1)` and `@frag(ATOM, ROWSxCOLUMNS)` with warps along rows and columns and
//! `ATOM` one of `mma16x8`, `wgmma`, `wgmma_t` and `fma`. A loop counter is uniform, and a loop's results lie where its carried values do, so neither
//! is written. Scratch memory stands last: `scratch b4`.
//!
//! **Invariants.** As for tile programs: printing prints the [`canonical`] kernel, and for every kernel that verifies
//! `parse(print(k)) == [canonical(k)]`. The parser checks only what the text must hold to be represented; it never panics.

use super::visit::visit;
use super::{Atom, Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled};
use crate::dtype::DType;
use crate::tile::text::{ParseError, Parsed, Parser, Printer, grid_text};
use crate::tile::verify::MAX_DEPTH;
use crate::tile::{TileType, Type, ValueId};
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

/// The same kernel with its values numbered in the order of definition, and no others: parameters, `common`, then the roles in order.
/// Uses of undefined values, which only an invalid kernel has, become `u32::MAX`.
pub fn canonical(kernel: &Scheduled) -> Scheduled {
    let mut out = kernel.clone();
    let mut numbers: HashMap<ValueId, ValueId> = HashMap::new();
    let (mut types, mut places) = (Vec::new(), Vec::new());
    let mut define = |v: ValueId| {
        let next = ValueId(numbers.len() as u32);
        let old = v.0 as usize;
        if *numbers.entry(v).or_insert(next) == next
            && let (Some(ty), Some(place)) = (kernel.types.get(old), kernel.places.get(old))
        {
            types.push(ty.clone());
            places.push(place.clone());
        }
    };
    out.params.iter().for_each(|p| define(p.value));
    let mut defined = |is_definition: bool, v: &mut ValueId| {
        if is_definition {
            define(*v);
        }
    };
    visit(&mut out.common, &mut defined);
    out.roles.iter_mut().for_each(|r| visit(&mut r.body, &mut defined));
    let number = |v: ValueId| numbers.get(&v).copied().unwrap_or(ValueId(u32::MAX));
    out.params.iter_mut().for_each(|p| p.value = number(p.value));
    visit(&mut out.common, &mut |_, v| *v = number(*v));
    out.roles.iter_mut().for_each(|r| visit(&mut r.body, &mut |_, v| *v = number(*v)));
    (out.types, out.places) = (types, places);
    out
}

impl fmt::Display for BufferId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}", self.0)
    }
}

impl fmt::Display for ChannelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c{}", self.0)
    }
}

const ATOMS: [(Atom, &str); 8] = [
    (Atom::Mma16x8, "mma16x8"),
    (Atom::Wgmma, "wgmma"),
    (Atom::WgmmaTransposed, "wgmma_t"),
    (Atom::Mfma16x16, "mfma16x16"),
    (Atom::Mfma16x64, "mfma16x64"),
    (Atom::Mfma16x128, "mfma16x128"),
    (Atom::WgmmaSums, "wgmma_sums"),
    (Atom::Fma, "fma"),
];

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::View => write!(f, "@view"),
            Place::Uniform => write!(f, "@uniform"),
            Place::Lazy => write!(f, "@lazy"),
            Place::Held => write!(f, "@held"),
            Place::Shared(b) => write!(f, "@shared({b})"),
            Place::Slot(c, slot) => write!(f, "@slot({c}, {slot})"),
            Place::Fragment(Fragment { atom, warps: [rows, columns] }) => {
                let name = ATOMS.iter().find(|(a, _)| a == atom).map_or("?", |(_, name)| name);
                write!(f, "@frag({name}, {rows}x{columns})")
            }
        }
    }
}

/// A line of the table of buffers: `b0 = x: bf16 1x64, offset 0, bytes 256, pitch 128, swizzle 0, copies 2`, less the number.
impl fmt::Display for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Buffer { name, dtype, shape: [rows, columns], pitch, swizzle, copies, offset, outside } = self;
        let bytes = self.bytes();
        write!(f, "{name}: {dtype} {rows}x{columns}, offset {offset}, bytes {bytes}, ")?;
        write!(f, "pitch {pitch}, swizzle {swizzle}, copies {copies}{}", if *outside { " outside" } else { "" })
    }
}

impl fmt::Display for Scheduled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = canonical(self);
        let printer = BlockPrinter { tile: Printer::new(&kernel.params, &kernel.types), places: &kernel.places };
        write!(f, "scheduled {} grid({}) ", kernel.name, grid_text(&kernel.grid))?;
        if let Some(band) = kernel.persistent {
            write!(f, "persistent {band} ")?;
        }
        if kernel.folded {
            write!(f, "folded ")?;
        }
        if let Some(Cluster { axis, blocks }) = kernel.cluster {
            write!(f, "cluster {blocks} along {axis} ")?;
        }
        if kernel.team != 1 {
            write!(f, "team {} ", kernel.team)?;
        }
        if kernel.alternate {
            write!(f, "alternate ")?;
        }
        if kernel.dies != 1 {
            write!(f, "dies {} ", kernel.dies)?;
        }
        writeln!(f, "threads {}", kernel.threads)?;
        printer.tile.params(f, &kernel.params)?;
        for (i, buffer) in kernel.buffers.iter().enumerate() {
            writeln!(f, "    buffer b{i} = {buffer}")?;
        }
        for (i, Channel { name, stages, slots }) in kernel.channels.iter().enumerate() {
            let slots: Vec<String> = slots.iter().map(BufferId::to_string).collect();
            writeln!(f, "    channel c{i} = {name}: stages {stages}, slots [{}]", slots.join(", "))?;
        }
        writeln!(f, "{{")?;
        printer.insts(f, &kernel.common, 1)?;
        writeln!(f, "}}")?;
        for Role { name, warps: [first, end], registers, elected, body } in &kernel.roles {
            write!(f, "role {name} warps {first}..{end} ")?;
            if let Some(registers) = registers {
                write!(f, "registers {registers} ")?;
            }
            write!(f, "{}", if *elected { "elected " } else { "" })?;
            printer.block(f, body, 0)?;
            writeln!(f)?;
        }
        Ok(())
    }
}

struct BlockPrinter<'a> {
    tile: Printer<'a>,
    places: &'a [Place],
}

impl BlockPrinter<'_> {
    /// A type and its place.
    fn ty(&self, v: ValueId) -> String {
        let place = self.places.get(v.0 as usize).map_or("?".into(), Place::to_string);
        format!("{} {place}", self.tile.ty(v))
    }

    fn types(&self, vs: &[ValueId]) -> String {
        vs.iter().map(|&v| self.ty(v)).collect::<Vec<_>>().join(", ")
    }

    fn insts(&self, f: &mut fmt::Formatter<'_>, block: &Block, depth: usize) -> fmt::Result {
        let indent = "    ".repeat(depth);
        for inst in &block.insts {
            write!(f, "{indent}")?;
            if !inst.results.is_empty() {
                write!(f, "{} = ", self.tile.vs(&inst.results))?;
            }
            self.inst(f, inst, depth)?;
            if let Some(scratch) = inst.scratch {
                write!(f, " scratch {scratch}")?;
            }
            writeln!(f)?;
        }
        if !block.yields.is_empty() {
            writeln!(f, "{indent}yield {}", self.tile.vs(&block.yields))?;
        }
        Ok(())
    }

    fn inst(&self, f: &mut fmt::Formatter<'_>, inst: &Inst, depth: usize) -> fmt::Result {
        match &inst.op {
            Op::For { lo, hi, step, init, body } => {
                let tile = &self.tile;
                let counter = body.args.first().map_or("?".into(), |&v| tile.v(v));
                write!(f, "for {counter} = {} to {} step {step} ", tile.index(lo), tile.index(hi))?;
                let carried = body.args.iter().skip(1).zip(init);
                let carried: Vec<String> =
                    carried.map(|(&a, &v)| format!("{} = {}: {}", tile.v(a), tile.v(v), self.ty(a))).collect();
                if !carried.is_empty() {
                    write!(f, "iter({}) ", carried.join(", "))?;
                }
                self.block(f, body, depth)
            }
            Op::If { cond, then, otherwise } => {
                write!(f, "if {} ", self.tile.v(*cond))?;
                if !inst.results.is_empty() {
                    write!(f, ": {} ", self.types(&inst.results))?;
                }
                self.block(f, then, depth)?;
                if *otherwise != Block::default() {
                    write!(f, " else ")?;
                    self.block(f, otherwise, depth)?;
                }
                Ok(())
            }
            op => {
                write!(f, "{}", self.op(op))?;
                if !inst.results.is_empty() {
                    write!(f, " : {}", self.types(&inst.results))?;
                }
                Ok(())
            }
        }
    }

    fn block(&self, f: &mut fmt::Formatter<'_>, block: &Block, depth: usize) -> fmt::Result {
        writeln!(f, "{{")?;
        self.insts(f, block, depth + 1)?;
        write!(f, "{}}}", "    ".repeat(depth))
    }

    /// An operation without blocks, its results' types left out.
    fn op(&self, op: &Op) -> String {
        match op {
            Op::Tile(op) => self.tile.op(op),
            Op::Barrier => "barrier".into(),
            Op::Acquire(c) => format!("acquire {c}"),
            Op::Copy { channel, slot, view, rows, index, shape, shared } => {
                // The element type is the view's; a shape is all that the copy says itself.
                let dtype = match self.tile.types.get(view.0 as usize) {
                    Some(Type::View(t)) => t.dtype,
                    _ => DType::F32,
                };
                let tile = TileType { dtype, shape: shape.clone() };
                let shared = if *shared { "shared " } else { "" };
                format!("copy {shared}{channel}.{slot}, {} : {tile}", self.tile.access(*view, *rows, index))
            }
            Op::Fill { channel, slot, value, shared } => {
                let shared = if *shared { "shared " } else { "" };
                format!("fill {shared}{channel}.{slot}, {}", self.tile.v(*value))
            }
            Op::Commit(c) => format!("commit {c}"),
            Op::Wait(c) => format!("wait {c}"),
            Op::Take { channel, slot } => format!("take {channel}.{slot}"),
            Op::Release { channel, lag } => format!("release {channel} lag {lag}"),
            Op::Number => "number".into(),
            Op::Meet => "meet".into(),
            Op::Put { buffer, value } => format!("put {buffer}, {}", self.tile.v(*value)),
            Op::Get { buffer, after, own } => format!("get {buffer} after {after}{}", if *own { " own" } else { "" }),
            Op::For { .. } | Op::If { .. } => String::new(),
        }
    }
}

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
        self.p.expect("slots")?;
        Ok(Channel { name, stages, slots: self.p.list("[", "]", buffer_id)? })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::text::tests::random_program;
    use crate::tile::{self, Program, Region};
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    /// The example of the documentation.
    const EXAMPLE: &str = "scheduled scale grid(T/1) threads 64
    read %x: view<[T, 64] bf16>
    write %y: view<[T, 64] f32>
    buffer b0 = x: bf16 1x64, offset 0, bytes 256, pitch 128, swizzle 0, copies 2
    buffer b1 = sums: f32 1x1, offset 256, bytes 4, pitch 4, swizzle 0, copies 1
    channel c0 = rows: stages 2, slots [b0]
{
    %2 = block_id 0 : i32 @uniform
    %5 = for %3 = 0 to 4 step 1 iter(%4 = %2: i32 @uniform) {
        yield %4
    }
    barrier
}
role producer warps 0..1 registers 24 elected {
    acquire c0
    copy c0.0, %x[%2, 0] : tile<1x64xbf16>
    commit c0
}
role consumer warps 1..2 {
    wait c0
    %6 = take c0.0 : tile<1x64xbf16> @slot(c0, 0)
    %7 = map(%6) { a -> t0 = cast<f32> a; t0 } : tile<1x64xf32> @lazy
    %8 = reduce sum %7 axis 1 : tile<1x1xf32> @shared(b1) scratch b1
    %9 = full 0.0 : tile<16x16xf32> @frag(mma16x8, 2x1)
    %10 = full true : bool @uniform
    %11 = if %10 : tile<1x64xf32> @lazy {
        yield %7
    } else {
        yield %7
    }
    store %y[%2, 0], %7
    release c0 lag 1
}
";

    #[test]
    fn prints_what_it_parses() {
        let kernels = parse(EXAMPLE).unwrap();
        assert_eq!(kernels.len(), 1);
        assert_eq!(kernels[0].to_string(), EXAMPLE);
        assert_eq!(canonical(&kernels[0]), kernels[0]);
        let twice = format!("{EXAMPLE}\n{EXAMPLE}");
        assert_eq!(parse(&twice).unwrap(), [kernels[0].clone(), kernels[0].clone()]);
    }

    fn check_error(from: &str, to: &str, expected: Expect) {
        assert!(EXAMPLE.contains(from), "{from}");
        expected.assert_eq(&parse(&EXAMPLE.replacen(from, to, 1)).unwrap_err().to_string());
    }

    #[test]
    fn errors_have_a_place_and_a_reason() {
        check_error("@lazy", "", expect!["23:5: expected `@`"]);
        check_error("@lazy", "@nowhere", expect!["23:5: expected `(`"]);
        check_error("mma16x8", "mma8", expect!["24:47: no atom mma8"]);
        check_error("wait c0", "wait b0", expect!["20:12: expected a channel, such as c0, not b0"]);
        check_error("bytes 256", "bytes 128", expect!["4:82: x rows, pitch and copies make 256 bytes, not 128"]);
        check_error("buffer b1", "buffer b2", expect!["5:14: b2 should be b1: the table is in order"]);
        check_error("tile<1x64xbf16>\n", "tile<1x64xf32>\n", expect!["16:42: a copy of f32 from view<[T, 64] bf16>"]);
        check_error("elected", "chosen", expect!["14:39: expected `{`"]);
        check_error("lag 1", "lag", expect!["33:1: expected an integer in range"]);
    }

    /// A tile program as a kernel whose places, roles and synchronisation bytes choose, without sense.
    fn schedule(program: &Program, bytes: &[u8]) -> Scheduled {
        let mut next = bytes.iter().copied().chain(std::iter::repeat(0));
        let buffer = |i: u32| Buffer {
            name: format!("b{i}"),
            dtype: DType::F32,
            shape: [i, 16],
            pitch: 64,
            swizzle: i % 2 * 64,
            copies: 1 + i,
            offset: i * 1024,
            outside: i % 3 == 1,
        };
        let mut place = |ty: &Type| match (ty, next.next().unwrap_or(0)) {
            (Type::View(_), _) => Place::View,
            (_, n @ 0..50) => Place::Shared(BufferId(n.into())),
            (_, n @ 50..100) => Place::Slot(ChannelId(n.into()), 1),
            (_, n @ 100..200) => Place::Fragment(Fragment {
                atom: ATOMS[n as usize % ATOMS.len()].0,
                warps: [n.into(), u32::from(n) % 3],
            }),
            (_, 200..228) => Place::Lazy,
            (_, 228..236) => Place::Held,
            _ => Place::Uniform,
        };
        let mut kernel = Scheduled {
            name: program.name.clone(),
            grid: program.grid.clone(),
            persistent: bytes.first().filter(|&&n| n > 100).map(|&n| n.into()),
            cluster: bytes.first().filter(|&&n| n > 140).map(|&n| Cluster { axis: u32::from(n) % 2, blocks: n.into() }),
            team: bytes.first().map_or(1, |&n| u32::from(n) % 3 + 1),
            folded: bytes.len() % 5 > 2,
            alternate: bytes.len().is_multiple_of(2),
            dies: bytes.len() as u32 % 3 + 1,
            params: program.params.clone(),
            types: program.types.clone(),
            places: program.types.iter().map(&mut place).collect(),
            threads: bytes.len() as u32,
            buffers: (0..bytes.len() as u32 % 4).map(buffer).collect(),
            channels: vec![Channel { name: "ring".into(), stages: 3, slots: vec![BufferId(0), BufferId(1)] }],
            common: Block::default(),
            roles: Vec::new(),
        };
        let body = block(&program.body, &mut kernel, &mut bytes.iter().copied());
        match bytes.first() {
            Some(&n) if n > 128 => {
                let role = |name: &str, body| Role {
                    name: name.into(),
                    warps: [0, n.into()],
                    registers: (n % 2 == 0).then_some(40),
                    elected: n % 3 == 0,
                    body,
                };
                kernel.roles = vec![role("first", body), role("second", Block::default())];
            }
            _ => kernel.common = body,
        }
        kernel
    }

    fn block(region: &Region, kernel: &mut Scheduled, bytes: &mut dyn Iterator<Item = u8>) -> Block {
        let mut out = Block { args: region.args.clone(), insts: Vec::new(), yields: region.yields.clone() };
        for inst in &region.insts {
            let plain = |op| Inst { results: Vec::new(), op, scratch: None };
            let channel = ChannelId(bytes.next().unwrap_or(0).into());
            out.insts.extend(match bytes.next() {
                Some(0..12) => Some(plain(Op::Barrier)),
                Some(12..16) => Some(plain(Op::Meet)),
                Some(n @ 16..20) => {
                    let put = |p: &tile::Param| Op::Put { buffer: BufferId(n.into()), value: p.value };
                    kernel.params.first().map(|p| plain(put(p)))
                }
                Some(slot @ 20..40) => {
                    let fill =
                        |p: &tile::Param| Op::Fill { channel, slot: slot.into(), value: p.value, shared: slot > 30 };
                    kernel.params.first().map(|p| plain(fill(p)))
                }
                Some(40..80) => Some(plain(Op::Acquire(channel))),
                Some(80..120) => Some(plain(Op::Commit(channel))),
                Some(120..160) => Some(plain(Op::Wait(channel))),
                Some(lag @ 160..200) => Some(plain(Op::Release { channel, lag: lag.into() })),
                Some(slot @ 200..) => kernel.params.first().map(|p| {
                    let at = [1, -1].map(tile::Index::Const).to_vec();
                    plain(Op::Copy {
                        channel,
                        slot: slot.into(),
                        view: p.value,
                        rows: (slot > 230).then_some(p.value),
                        index: at,
                        shape: vec![8, 4],
                        shared: slot > 220,
                    })
                }),
                None => None,
            });
            let op = match &inst.op {
                tile::Op::For { lo, hi, step, init, body } => {
                    // As the text has it: counters are uniform, results lie where carried values do.
                    let body = block(body, kernel, bytes);
                    kernel.places[body.args[0].0 as usize] = Place::Uniform;
                    for (arg, result) in body.args[1..].iter().zip(&inst.results) {
                        kernel.places[result.0 as usize] = kernel.places[arg.0 as usize].clone();
                    }
                    Op::For { lo: *lo, hi: *hi, step: *step, init: init.clone(), body }
                }
                tile::Op::If { cond, then, otherwise } => {
                    Op::If { cond: *cond, then: block(then, kernel, bytes), otherwise: block(otherwise, kernel, bytes) }
                }
                op => Op::Tile(op.clone()),
            };
            let scratch = bytes.next().filter(|&n| n > 200).map(|n| BufferId(n.into()));
            out.insts.push(Inst { results: inst.results.clone(), op, scratch });
        }
        out
    }

    fn random_kernel() -> impl Strategy<Value = Scheduled> {
        (random_program(), proptest::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(program, bytes)| schedule(&program, &bytes))
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(kernel in random_kernel()) {
            let text = kernel.to_string();
            prop_assert_eq!(parse(&text), Ok(vec![canonical(&kernel)]), "{}", text);
            prop_assert_eq!(canonical(&canonical(&kernel)), canonical(&kernel));
        }

        /// Whatever the text, nothing panics, and what parses prints.
        #[test]
        fn damaged_text_is_survived(at in any::<u16>(), to in any::<u16>(), len in 0..9usize) {
            let mut text: Vec<char> = EXAMPLE.chars().collect();
            let (at, to) = (usize::from(at) % text.len(), usize::from(to) % text.len());
            let piece: Vec<char> = text[to..(to + len).min(text.len())].to_vec();
            text.splice(at..(at + len / 2).min(text.len()), piece);
            for kernel in parse(&text.into_iter().collect::<String>()).unwrap_or_default() {
                let _ = kernel.to_string();
            }
        }
    }
}
