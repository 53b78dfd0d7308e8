//! Entry points of a kernel library.

use super::check::MAX_ROW;
use super::{Arg, Launch, MAX_BUFFER_BYTES};
use crate::DType;
use crate::extent::{Extent, Sym, SymValues};
use crate::graph::StateFormat;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// What a kernel library was compiled for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LibraryFacts {
    /// `dsa`: sparse attention of the DeepSeek-V3.2 family.
    pub kind: String,
    /// Heads of attention on this rank.
    pub heads: u32,
    /// Heads of the indexer.
    pub index_heads: u32,
    /// Elements of an index key.
    pub index_dim: u32,
    /// Elements of the latent.
    pub latent: u32,
    /// Elements of the rope key.
    pub rope: u32,
    /// Keys selected.
    pub topk: u32,
    /// Multiplies the scores of attention.
    pub scale: f32,
    /// Query tokens of a sequence that decoding takes.
    pub queries: Vec<u32>,
    /// Longest context in tokens.
    pub max_context: u32,
    /// Whether the latent cache is fp8 with scales ([`StateFormat::LatentFp8`]) rather than bf16.
    pub fp8_cache: bool,
}

/// What an argument of an entry point holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArgElem {
    /// Elements of that type.
    Plain(DType),
    /// Bytes: pages of a cache in this format, `[N, page bytes]`.
    Pages(StateFormat),
}

impl ArgElem {
    /// Bytes of an element.
    pub fn bytes(self) -> u64 {
        match self {
            ArgElem::Plain(dtype) => dtype.bytes() as u64,
            ArgElem::Pages(_) => 1,
        }
    }
}

/// An argument of an entry point: memory of the caller, row-major.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryArg {
    /// Its name, unique in the entry point.
    pub name: String,
    /// What it holds.
    pub elem: ArgElem,
    /// Its shape.
    pub shape: Vec<Extent>,
    /// Whether it is a result.
    pub write: bool,
}

impl EntryArg {
    /// Whether rows may be further apart than they are long: matrices whose rows have no constant length. The symbol of their
    /// last dim is then that distance.
    pub fn pitched(&self) -> bool {
        matches!(self.shape.as_slice(), [_, last] if last.sym.is_some() && last.factor == 1)
    }

    /// Its bytes at these sizes.
    pub fn bytes(&self, syms: &SymValues) -> Option<u64> {
        self.shape.iter().try_fold(self.elem.bytes(), |n, e| n.checked_mul(e.eval(syms)))
    }
}

/// A part of an entry point's workspace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkspacePart {
    /// Bytes of an element.
    pub element_bytes: u32,
    /// Its shape.
    pub shape: Vec<Extent>,
}

/// How a call of a library with many tokens is made, or a [`Loop`](super::Loop) of a step: in pieces of tokens, one after the other in the same memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces {
    /// Tokens of a piece at most: a power of two, so that what has an element a token stays aligned.
    pub tokens: u32,
    /// Bytes at most of the workspace that pieces have in turn, or of a loop's matrix, unless [`Pieces::FEWEST`] tokens take more.
    pub bytes: u64,
}

impl Pieces {
    /// Tokens that a piece has if there are as many.
    pub const FEWEST: u32 = 64;
}

/// One operation of a kernel library for one shape class.
///
/// A caller gives an array for each argument; their shapes bind the symbols. Intermediate results lie in a workspace of the
/// caller, one part after the other, each at a multiple of [`WORKSPACE_ALIGN`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The operation, such as `topk`.
    pub op: String,
    /// The shape class.
    pub class: String,
    /// It takes calls whose symbols are all at most these.
    pub max: SymValues,
    /// Sizes that are equal in every call: each first one has a factor of 1. It binds a symbol that no shape has.
    pub relations: Vec<(Extent, Extent)>,
    /// Arguments, in order.
    pub args: Vec<EntryArg>,
    /// Parts of the workspace.
    pub workspace: Vec<WorkspacePart>,
    /// Launches in order.
    pub launches: Vec<Launch>,
    /// Whether some are made in pieces: then tokens are the first dim of all that these have of them, and no token needs another.
    pub pieces: Option<Pieces>,
    /// How many, from the first on; the others are made once, behind all pieces. What both have of the workspace is that of all tokens.
    pub pieced: u32,
}

/// Why a call is not one of a class; of several classes the latest says most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// Shapes disagree with each other, or with what was compiled.
    Shape(String),
    /// Sizes are not related as in this class.
    Relation(String),
    /// A size is beyond this class.
    Limit(String),
}

impl Misfit {
    /// How much of the call was in order.
    pub fn rank(&self) -> u8 {
        match self {
            Misfit::Shape(_) => 0,
            Misfit::Relation(_) => 1,
            Misfit::Limit(_) => 2,
        }
    }
}

impl std::fmt::Display for Misfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Misfit::Shape(what) | Misfit::Relation(what) | Misfit::Limit(what)) = self;
        f.write_str(what)
    }
}

/// Parts of a workspace start at multiples of this, and so must the workspace.
pub const WORKSPACE_ALIGN: u64 = 256;

impl Entry {
    /// The symbols of a call whose arguments have these shapes (of [`EntryArg::pitched`] ones the last dim is the distance of rows,
    /// in elements). Symbols that nothing binds are 1.
    ///
    /// # Errors
    /// Which argument does not fit, and how; or that the call is beyond the class.
    pub fn symbols(&self, shapes: &[&[u64]]) -> Result<SymValues, Misfit> {
        if shapes.len() != self.args.len() {
            return Err(Misfit::Shape(format!("{} arguments, {} takes {}", shapes.len(), self.op, self.args.len())));
        }
        let mut found: [Option<u32>; 6] = [None; 6];
        for (arg, shape) in self.args.iter().zip(shapes) {
            let name = &arg.name;
            if shape.len() != arg.shape.len() {
                return Err(Misfit::Shape(format!("{name} has {} dims, wants {:?}", shape.len(), arg.shape)));
            }
            for (extent, &n) in arg.shape.iter().zip(*shape) {
                let wrong = || Misfit::Shape(format!("{name} is {shape:?}, wants {:?}{}", arg.shape, bound(&found)));
                let Some(sym) = extent.sym else {
                    if n != u64::from(extent.factor) {
                        return Err(wrong());
                    }
                    continue;
                };
                let factor = u64::from(extent.factor.max(1));
                let value = u32::try_from(n / factor).ok().filter(|_| n % factor == 0).ok_or_else(wrong)?;
                match found[sym as usize] {
                    Some(known) if known != value => return Err(wrong()),
                    _ => found[sym as usize] = Some(value),
                }
            }
        }
        for (one, other) in &self.relations {
            let (Some(a), Some(b)) = (one.sym, other.sym) else { continue };
            let value = found[b as usize].unwrap_or(1).checked_mul(other.factor);
            let known = found[a as usize].unwrap_or(0);
            let wrong = || Misfit::Relation(format!("{one} is {known}, wants {other}{}", bound(&found)));
            let value = value.ok_or_else(wrong)?;
            if found[a as usize].is_some_and(|known| known != value) {
                return Err(wrong());
            }
            found[a as usize] = Some(value);
        }
        let syms = SymValues(found.map(|n| n.unwrap_or(1)));
        for sym in Sym::ALL {
            if syms.get(sym) > self.max.get(sym) {
                let (n, most) = (syms.get(sym), self.max.get(sym));
                return Err(Misfit::Limit(format!("{n} {} are more than {most}", sym.name())));
            }
        }
        Ok(syms)
    }

    /// The sizes of the first piece of a call, which is its largest: half as many tokens, and half of that, until what pieces have in turn is small
    /// enough.
    pub fn piece(&self, syms: &SymValues) -> SymValues {
        let Some(pieces) = self.pieces else { return *syms };
        let in_turn = |syms: &SymValues| {
            let own = (0..self.workspace.len()).filter(|&i| !self.is_whole(i));
            own.map(|i| self.part_bytes(i, syms)).try_fold(0u64, |n, bytes| n.checked_add(bytes?))
        };
        let mut tokens = pieces.tokens;
        while tokens > Pieces::FEWEST && in_turn(&syms.with(Sym::T, tokens)).is_none_or(|n| n > pieces.bytes) {
            tokens /= 2;
        }
        syms.with(Sym::T, tokens.min(syms.get(Sym::T)).max(1))
    }

    /// Whether a part of the workspace is that of all tokens of a call: no piece makes it, or not for itself alone.
    fn is_whole(&self, part: usize) -> bool {
        let once = self.launches.get(self.pieced as usize..).unwrap_or_default();
        self.pieces.is_none() || once.iter().any(|l| l.args.contains(&Arg::Workspace(part as u32)))
    }

    /// Bytes from a piece's first token to the next piece's in an argument of a launch, if pieces have so many tokens; 0 in what they share.
    pub fn piece_bytes(&self, arg: Arg, piece: &SymValues) -> u64 {
        let shape = match arg {
            Arg::Caller(i) => self.args.get(i as usize).map(|a| &a.shape),
            Arg::Workspace(i) if self.is_whole(i as usize) => self.workspace.get(i as usize).map(|w| &w.shape),
            _ => None,
        };
        let by_token = shape.and_then(|s| s.first()).is_some_and(|e| e.sym == Some(Sym::T));
        if by_token { self.buffer(arg, piece).map_or(0, |b| b.0) } else { 0 }
    }

    /// Bytes of a part of the workspace.
    fn part_bytes(&self, part: usize, syms: &SymValues) -> Option<u64> {
        let part = self.workspace.get(part)?;
        part.shape.iter().try_fold(u64::from(part.element_bytes), |n, e| n.checked_mul(e.eval(syms)))
    }

    /// Where each part of the workspace of a call starts, and the bytes of all; of what pieces have in turn, one of that size.
    pub fn workspace(&self, syms: &SymValues, piece: &SymValues) -> Option<(Vec<u64>, u64)> {
        let mut at = 0u64;
        let mut starts = Vec::with_capacity(self.workspace.len());
        for part in 0..self.workspace.len() {
            starts.push(at);
            let bytes = self.part_bytes(part, if self.is_whole(part) { syms } else { piece })?;
            at = at.checked_add(bytes.checked_next_multiple_of(WORKSPACE_ALIGN)?)?;
        }
        Some((starts, at))
    }

    /// Bytes of the memory behind an argument of a launch of that size, and the argument's place in it.
    pub fn buffer(&self, arg: Arg, syms: &SymValues) -> Option<(u64, u64)> {
        match arg {
            Arg::Caller(i) => Some((self.args.get(i as usize)?.bytes(syms)?, 0)),
            Arg::Workspace(i) => Some((self.part_bytes(i as usize, syms)?, 0)),
            _ => None,
        }
    }

    pub(super) fn writable(&self, arg: Arg) -> bool {
        match arg {
            Arg::Caller(i) => self.args.get(i as usize).is_some_and(|a| a.write),
            other => matches!(other, Arg::Workspace(_)),
        }
    }

    /// What is wrong with it, but for its launches.
    pub(super) fn check(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut expect = |ok: bool, what: &str| {
            if !ok {
                problems.push(what.to_owned());
            }
        };
        let named = |name: &str| (1..=4096).contains(&name.len());
        expect(named(&self.op) && named(&self.class), "its name is empty or endless");
        expect(self.max.0.iter().all(|&n| (1..=i32::MAX as u32).contains(&n)), "its largest sizes are out of range");
        let mut names = BTreeSet::new();
        expect(self.args.iter().all(|a| named(&a.name) && names.insert(&a.name)), "names of arguments are not unique");
        expect(self.args.len() <= 64 && self.workspace.len() <= 64 && self.launches.len() <= 64, "it is too large");
        let ranks = self.args.iter().map(|a| a.shape.len()).chain(self.workspace.iter().map(|w| w.shape.len()));
        expect(ranks.into_iter().all(|n| (1..=8).contains(&n)), "an argument has no dims, or too many");
        let pages = |a: &EntryArg| match a.elem {
            ArgElem::Plain(dtype) => dtype != DType::Bool,
            ArgElem::Pages(format) => {
                checked_page_bytes(format).is_some_and(|n| a.shape == [Sym::N.into(), Extent::from(n)])
            }
        };
        expect(self.args.iter().all(pages), "an argument's type or pages cannot be");
        expect(self.relations.iter().all(|(a, _)| a.factor == 1), "a relation binds a multiple");
        let tokens = |e: &Extent| e.sym == Some(Sym::T);
        let leads = |shape: &[Extent]| {
            !shape.iter().skip(1).any(tokens) && shape.first().is_none_or(|e| !tokens(e) || e.factor == 1)
        };
        let apart = self.args.iter().all(|a| leads(&a.shape))
            && self.workspace.iter().enumerate().all(|(i, w)| !self.is_whole(i) || leads(&w.shape))
            && !self.relations.iter().any(|(a, b)| tokens(a) || tokens(b));
        let even = |p: Pieces| p.tokens.is_power_of_two() && p.tokens >= Pieces::FEWEST;
        expect(self.pieces.is_none_or(|p| apart && even(p)), "it cannot be made in pieces of tokens");
        let some = (self.pieced > 0) == self.pieces.is_some() && self.pieced as usize <= self.launches.len();
        expect(some, "no such launches are made in pieces");
        let fits = |n: Option<u64>| n.is_some_and(|n| n <= MAX_BUFFER_BYTES);
        expect(self.args.iter().all(|a| fits(a.bytes(&self.max))), "an argument is beyond reason");
        let workspace = self.workspace(&self.max, &self.piece(&self.max));
        expect(fits(workspace.map(|w| w.1)), "its workspace is beyond reason");
        problems
    }
}

/// Bytes of a page of a format of sane size.
fn checked_page_bytes(format: StateFormat) -> Option<u32> {
    let sizes = match format {
        StateFormat::LatentFp8 { latent, rope } | StateFormat::Latent { latent, rope, .. } => [latent, rope],
        StateFormat::IndexFp8 { dim } | StateFormat::Index { dim, .. } => [dim, 1],
    };
    sizes.iter().all(|n| (1..=MAX_ROW).contains(n)).then(|| format.page_bytes())
}

/// Symbols that are bound, for messages.
fn bound(found: &[Option<u32>; 6]) -> String {
    let known: Vec<String> =
        Sym::ALL.iter().filter_map(|&s| found[s as usize].map(|n| format!("{} = {n}", s.name()))).collect();
    if known.is_empty() { String::new() } else { format!(" where {}", known.join(", ")) }
}
