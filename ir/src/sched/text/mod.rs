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
//! A channel whose stages parts of a role take in turns says how many: `stages 8, turns 4, slots [b0]`.
//!
//! Places: `@uniform`, `@lazy`, `@shared(b3)`, `@slot(c0, 1)` and `@frag(ATOM, ROWSxCOLUMNS)` with warps along rows and columns and
//! `ATOM` one of `mma16x8`, `wgmma`, `wgmma_t` and `fma`. A loop counter is uniform, and a loop's results lie where its carried values do, so neither
//! is written. Scratch memory stands last: `scratch b4`.
//!
//! **Invariants.** As for tile programs: printing prints the [`canonical`] kernel, and for every kernel that verifies
//! `parse(print(k)) == [canonical(k)]`. The parser checks only what the text must hold to be represented; it never panics.

mod parse;
#[cfg(test)]
mod tests;

use super::visit::visit;
use super::{Atom, Block, Buffer, BufferId, Channel, ChannelId, Cluster, Fragment, Inst, Op, Place, Role, Scheduled};
use crate::dtype::DType;
use crate::tile::text::{Printer, grid_text};
use crate::tile::{TileType, Type, ValueId};
pub use parse::parse;
use std::collections::HashMap;
use std::fmt;

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
        for (i, Channel { name, stages, turns, slots }) in kernel.channels.iter().enumerate() {
            let slots: Vec<String> = slots.iter().map(BufferId::to_string).collect();
            let turns = if *turns == 1 { String::new() } else { format!("turns {turns}, ") };
            writeln!(f, "    channel c{i} = {name}: stages {stages}, {turns}slots [{}]", slots.join(", "))?;
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
            Op::Part { lo, hi, end } => {
                let what = if *end { "end" } else { "begin" };
                format!("part {what} {} to {}", self.tile.v(*lo), self.tile.v(*hi))
            }
            Op::For { .. } | Op::If { .. } => String::new(),
        }
    }
}
