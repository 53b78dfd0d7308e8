//! The schema of a `.dsc` file: what the compiler writes and the runtime loads.
//!
//! Layout, little-endian, sections aligned to [`ALIGN`]:
//!
//! ```text
//! 0    8   magic  "DSC\x7fART\n"
//! 8    4   format version
//! 12   4   zero
//! 16   8   header length in bytes
//! 24   32  blake3 of the header
//! 56   ..  header: JSON of `Header`
//! ..       sections, each named, sized and hashed in the header
//! ```
//!
//! Sections fill the file in order, with zeros up to the next multiple of [`ALIGN`] between them. The header of every format
//! version is a JSON object that has `compiler`, so that any dsc can say which one wrote a file.
//!
//! The file holds no time, path or host name: the same input gives the same bytes. Nothing in it is trusted: [`read`] finds
//! every damaged byte outside sections, [`section`] those inside, and [`Header::check`] rules out every index and range that
//! would leave its table or its buffer. Machine code is code, though: run artifacts only of people whose programs you would run.
//!
//! Views grow with symbols: within one step's limits a larger symbol never shrinks what a view spans. So a view that stays
//! inside its buffer at the limits does so in every step within them.

use crate::DType;
use crate::extent::{Extent, GridDim, Sym, SymValues};
use crate::graph::{Elem, PAGE_TOKENS, State, StateFormat, StepInput};
use crate::tile::ViewType;
use crate::work::Work;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// First bytes of every artifact.
pub const MAGIC: [u8; 8] = *b"DSC\x7fART\n";
/// The version this crate writes and reads.
pub const FORMAT_VERSION: u32 = 2;
/// Alignment of sections in bytes: a page, so that code can be mapped from the file.
pub const ALIGN: u64 = 4096;

/// Numerics an artifact was compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numerics {
    /// f32 activations and caches, no activation quantisation, no Hadamard transform.
    Exact,
    /// What serving engines run: bf16 and fp8 activations, Hadamard transform, fp8 caches.
    Deployed,
}

/// One tensor of the checkpoint, or a range of its rows, as part of a weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorPart {
    /// Tensor name.
    pub tensor: String,
    /// Name of its block scales (`weight_scale_inv`), which exist if the stored tensor is e4m3.
    pub scale: Option<String>,
    /// Rows and columns of one scale.
    pub scale_block: [u32; 2],
    /// Stored shape as rows and columns; vectors have one row.
    pub shape: [u32; 2],
    /// Rows taken, first and past-the-end.
    pub rows: [u32; 2],
    /// Columns taken, first and past-the-end.
    pub cols: [u32; 2],
}

/// How a weight is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightSource {
    /// Parts stacked by rows and converted to the weight's element type: dequantised if that is plain, copied if it is
    /// quantised with the same blocks.
    Tensors(Vec<TensorPart>),
    /// Row `p`: `frequencies.len()` cosines, then as many sines, of the f32 product `p · frequency`.
    RopeTable {
        /// Angular frequency of each pair.
        frequencies: Vec<f32>,
    },
    /// `n^-0.5 (−1)^popcount(i & j)`, `[n, n]`.
    Hadamard {
        /// Order, a power of two.
        n: u32,
    },
}

/// A weight in device memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightEntry {
    /// Unique name.
    pub name: String,
    /// Shape; constant, except that a rope table has as many rows as the context capacity (given as 0).
    pub shape: Vec<u32>,
    /// Storage. Quantised weights hold codes, then, at the next multiple of 256 bytes, scales.
    pub elem: Elem,
    /// How it is made.
    pub source: WeightSource,
}

/// A parameter of a kernel: the window it may touch, relative to the address it is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamEntry {
    /// Name, for people.
    pub name: String,
    /// What the kernel's accesses are masked by.
    pub view: ViewType,
    /// Whether the kernel writes through it.
    pub write: bool,
}

/// Machine code of one kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelEntry {
    /// Unique name.
    pub name: String,
    /// What it computes, for people: the fused ops and shapes.
    pub what: String,
    /// Byte of its first instruction in the code section.
    pub entry: u64,
    /// Bytes of its code.
    pub code_bytes: u64,
    /// Bytes of scratch memory a worker needs.
    pub scratch_bytes: u64,
    /// Blocks of its grid.
    pub grid: Vec<GridDim>,
    /// Parameters, in order of the arguments.
    pub params: Vec<ParamEntry>,
    /// The schedule, for people and tools.
    pub schedule: crate::schedule::Schedule,
    /// What it has to compute and to move, for benches.
    #[serde(default)]
    pub work: Work,
    /// How a GPU launches it; none on a CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuKernel>,
}

/// What a launch on a GPU needs besides grid and arguments.
///
/// The kernel's parameters are, in order: the address of each argument (64 bits each); the address of the six symbols (i32, in the
/// order of [`Sym::ALL`]), which lie in device memory so that a captured graph serves steps of any size, or these 24 bytes by value
/// ([`Schedule::symbols_by_value`](crate::schedule::Schedule::symbols_by_value)); the address of [`GpuKernel::scratch_bytes`] for each
/// block, if it needs any; and each of
/// [`GpuKernel::maps`] by value (128 bytes, 64-aligned). Axis 0, 1 and 2 of the grid are x, y and z; blocks beyond the grid at
/// the symbols' values return at once, so a launch may have more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuKernel {
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster along x; 1 without clusters. Of a persistent kernel each block takes a tile; else a cluster runs
    /// one block of the grid together.
    pub cluster: u32,
    /// Blocks go on to further tiles: a launch with fewer blocks than the grid has does all of it. As many as the device holds at a
    /// time are best.
    pub persistent: bool,
    /// Before it touches memory it waits, by itself, for the launches before it, and it lets the next one start: such launches may overlap.
    pub dependent: bool,
    /// Tensor maps, for hardware that copies tiles by descriptor.
    pub maps: Vec<TensorMap>,
    /// Bytes of memory that each block of a launch needs to itself while it runs; the address of all of it is then a parameter behind that of
    /// the symbols. Launches that run at once must not share it.
    pub scratch_bytes: u64,
    /// Bytes of the kernel's portable assembly in section `asm` (PTX), first and past-the-end.
    pub asm: [u64; 2],
    /// Bytes of machine code are in section `code` at [`KernelEntry::entry`]; what its assembler reported, or none if there is
    /// no machine code and the driver has to make it from `asm`.
    pub resources: Option<Resources>,
}

/// A descriptor of a parameter's view: the driver encodes it when arguments are bound.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMap {
    /// Which parameter; its view at the binding's limits gives dims and strides.
    pub param: u32,
    /// Elements of the box along each dim of the view, outermost first.
    pub tile: Vec<u32>,
    /// Bytes of the shared-memory swizzle: 0, 32, 64 or 128.
    pub swizzle: u32,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What a kernel takes of a multiprocessor or compute unit, from its assembler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Registers of a thread, accumulators included.
    pub registers: u32,
    /// Accumulator registers among them, where these are registers of their own.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub accumulators: u32,
    /// Scalar registers of a wave, where there are such.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub scalar_registers: u32,
    /// Bytes a thread spills: stores and loads.
    pub spill_bytes: [u32; 2],
    /// Bytes of a thread's stack frame.
    pub stack_bytes: u32,
    /// Bytes of static shared memory of a block.
    pub static_shared_bytes: u32,
    /// Blocks that a multiprocessor holds at a time.
    pub blocks_per_sm: u32,
}

/// What a kernel parameter is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arg {
    /// Bytes of the step's arena from this offset.
    Arena(u64),
    /// A weight, from this byte of it.
    Weight(u32, u64),
    /// A cache.
    State(u32),
    /// A step input.
    Input(StepInput),
    /// The logits.
    Logits,
    /// The chosen tokens, i32 `[L]`.
    Tokens,
    /// An argument of an entry point ([`Entry::args`]).
    Caller(u32),
    /// A part of an entry point's workspace ([`Entry::workspace`]).
    Workspace(u32),
}

/// One kernel launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Index in [`Header::kernels`].
    pub kernel: u32,
    /// One argument a parameter.
    pub args: Vec<Arg>,
    /// The graph node it runs, for people and profiles.
    pub node: String,
}

/// Where an intermediate result can be read, right after a launch and before a later one reuses its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    /// `hidden.i` or `topk.i`.
    pub name: String,
    /// Number of launches done when it is valid.
    pub after: u32,
    /// Where it is.
    pub at: u64,
    /// Columns of its `[T, columns]` matrix.
    pub columns: u32,
    /// Element type.
    pub dtype: DType,
}

/// A sum over all ranks, in place, between two launches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collective {
    /// Launches before it.
    pub after: u32,
    /// Where its `[T, columns]` matrix is in the arena.
    pub at: u64,
    /// Columns.
    pub columns: u32,
    /// Element type.
    pub dtype: DType,
}

/// The launches of one shape class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Such as `decode` or `prefill`.
    pub name: String,
    /// It runs every step whose symbols are all at most these.
    pub max: SymValues,
    /// Arena bytes.
    pub arena_bytes: u64,
    /// Launches in order.
    pub launches: Vec<Launch>,
    /// Sums over ranks, in order.
    pub collectives: Vec<Collective>,
    /// Launches that make the logits; those behind them choose tokens, which a step that wants no tokens leaves out.
    pub sampling: u32,
    /// Intermediate results.
    pub taps: Vec<Tap>,
}

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

    /// Where each part of the workspace starts, and the bytes of all.
    pub fn workspace(&self, syms: &SymValues) -> Option<(Vec<u64>, u64)> {
        let mut at = 0u64;
        let mut starts = Vec::with_capacity(self.workspace.len());
        for part in &self.workspace {
            starts.push(at);
            let bytes =
                part.shape.iter().try_fold(u64::from(part.element_bytes), |n, e| n.checked_mul(e.eval(syms)))?;
            at = at.checked_add(bytes.checked_next_multiple_of(WORKSPACE_ALIGN)?)?;
        }
        Some((starts, at))
    }

    /// Bytes of the memory behind an argument of a launch, and the argument's place in it.
    pub fn buffer(&self, arg: Arg, syms: &SymValues) -> Option<(u64, u64)> {
        match arg {
            Arg::Caller(i) => Some((self.args.get(i as usize)?.bytes(syms)?, 0)),
            Arg::Workspace(i) => {
                let (starts, bytes) = self.workspace(syms)?;
                let start = *starts.get(i as usize)?;
                let end = starts.get(i as usize + 1).copied().unwrap_or(bytes);
                Some((end - start, 0))
            }
            _ => None,
        }
    }

    fn writable(&self, arg: Arg) -> bool {
        match arg {
            Arg::Caller(i) => self.args.get(i as usize).is_some_and(|a| a.write),
            other => matches!(other, Arg::Workspace(_)),
        }
    }

    /// What is wrong with it, but for its launches.
    fn check(&self) -> Vec<String> {
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
        let fits = |n: Option<u64>| n.is_some_and(|n| n <= MAX_BUFFER_BYTES);
        expect(self.args.iter().all(|a| fits(a.bytes(&self.max))), "an argument is beyond reason");
        expect(fits(self.workspace(&self.max).map(|w| w.1)), "its workspace is beyond reason");
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

/// What the runtime must know of the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Such as `deepseek_v32`.
    pub model_type: String,
    /// blake3 of config.json, hex.
    pub config_hash: String,
    /// Vocabulary size.
    pub vocab: u32,
    /// Decoder layers.
    pub layers: u32,
    /// Keys the indexer selects.
    pub index_topk: u32,
    /// First token of a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Longest context in tokens that the artifact serves.
    pub max_context: u32,
    /// Ranks that the model is split over; this artifact is one of theirs.
    pub ranks: u32,
    /// Which.
    pub rank: u32,
}

/// A byte range of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// `code`, or `tile` (the tile programs as text), ...
    pub name: String,
    /// First byte, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// blake3, hex.
    pub hash: String,
}

/// Everything in the artifact but the bytes of its sections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of the compiler that wrote it.
    pub compiler: String,
    /// Target name.
    pub target: String,
    /// Processor features the code needs, by the target's names.
    pub features: Vec<String>,
    /// Numerics.
    pub numerics: Numerics,
    /// The model.
    pub model: ModelFacts,
    /// Weights.
    pub weights: Vec<WeightEntry>,
    /// Caches.
    pub states: Vec<State>,
    /// Kernels.
    pub kernels: Vec<KernelEntry>,
    /// Shape classes, the preferred first; none in a kernel library.
    pub steps: Vec<Step>,
    /// What a kernel library was compiled for; none in a model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<LibraryFacts>,
    /// Entry points of a kernel library: by operation, of each the preferred shape class first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entries: Vec<Entry>,
    /// Sections.
    pub sections: Vec<Section>,
}

/// Bytes that scales of quantised weights are aligned to, behind the codes.
pub const SCALE_ALIGN: u64 = 256;
/// Largest header that is read, in bytes.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Largest buffer that a plan may ask for, in bytes.
pub const MAX_BUFFER_BYTES: u64 = 1 << 42;

/// Entries a table may have.
const MAX_ENTRIES: usize = 1 << 20;
/// Elements of a cache row's part, and of a Hadamard matrix's side.
const MAX_ROW: u32 = 1 << 16;
/// Scratch bytes a worker may need.
const MAX_SCRATCH_BYTES: u64 = 1 << 32;
/// Shared memory of a block; no hardware has as much.
const MAX_SHARED_BYTES: u32 = 1 << 20;
/// Blocks of one launch.
const MAX_BLOCKS: u64 = 1 << 48;
/// Bytes before the header.
const PREFIX: usize = 56;
/// Problems reported at most.
const MAX_PROBLEMS: usize = 50;

/// Why bytes are no artifact that this dsc can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArtifactError {
    /// The first bytes are not [`MAGIC`].
    #[error("it is not a dsc artifact; give a file that `dsc compile` wrote")]
    NotAnArtifact,
    /// Another format version.
    #[error(
        "it has format version {found}, written by {writer}; this dsc reads version {FORMAT_VERSION}: {remedy}",
        writer = .compiler.as_deref().unwrap_or("another dsc"),
        remedy = if *.found > FORMAT_VERSION { "update dsc, or compile the model again with this one" } else { "compile the model again" }
    )]
    Version {
        /// The file's version.
        found: u32,
        /// Which compiler wrote it, if the header says so.
        compiler: Option<String>,
    },
    /// The file ends early.
    #[error("it is cut off: {have} bytes of at least {need}; copy or compile it again")]
    Truncated {
        /// Bytes it should have.
        need: u64,
        /// Bytes it has.
        have: u64,
    },
    /// The header is not what was written.
    #[error("its header is damaged ({0}); copy or compile it again")]
    HeaderDamaged(String),
    /// A section is not what was written.
    #[error("its section `{0}` is damaged (the bytes do not have their hash); copy or compile it again")]
    SectionDamaged(String),
    /// A section is wanted that is not there.
    #[error("it has no section `{0}`; compile the model again")]
    NoSection(String),
    /// The header breaks the schema: a fault of the compiler that wrote it.
    #[error("it is intact but invalid, which is a bug of the dsc that wrote it:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// The bytes of an artifact. Puts the offsets, sizes and hashes of `sections` in the header.
pub fn write(header: &mut Header, sections: &[(&str, &[u8])]) -> Vec<u8> {
    let entry = |(name, bytes): &(&str, &[u8])| Section {
        name: name.to_string(),
        offset: 0,
        bytes: bytes.len() as u64,
        hash: blake3::hash(bytes).to_hex().to_string(),
    };
    header.sections = sections.iter().map(entry).collect();
    // Offsets are part of the header and follow from its length: more digits may push them on, never back.
    let json = loop {
        let json = serde_json::to_vec(header).expect("strings, numbers and lists are JSON");
        let mut at = (PREFIX + json.len()) as u64;
        let mut settled = true;
        for section in &mut header.sections {
            at = at.next_multiple_of(ALIGN);
            settled &= section.offset == at;
            section.offset = at;
            at += section.bytes;
        }
        if settled {
            break json;
        }
    };
    let mut file = Vec::new();
    file.extend(MAGIC);
    file.extend(FORMAT_VERSION.to_le_bytes());
    file.extend([0; 4]);
    file.extend((json.len() as u64).to_le_bytes());
    file.extend(blake3::hash(&json).as_bytes());
    file.extend(json);
    for (section, (_, bytes)) in header.sections.iter().zip(sections) {
        file.resize(section.offset as usize, 0);
        file.extend(*bytes);
    }
    file
}

/// Reads and checks all but the contents of sections (see [`section`]).
pub fn read(file: &[u8]) -> Result<Header, ArtifactError> {
    let damaged = |what: &str| Err(ArtifactError::HeaderDamaged(what.to_string()));
    if !file.starts_with(&MAGIC[..file.len().min(8)]) || file.is_empty() {
        return Err(ArtifactError::NotAnArtifact);
    }
    if file.len() < PREFIX {
        return Err(ArtifactError::Truncated { need: PREFIX as u64, have: file.len() as u64 });
    }
    let version = u32::from_le_bytes([file[8], file[9], file[10], file[11]]);
    let length = u64::from_le_bytes([16, 17, 18, 19, 20, 21, 22, 23].map(|i| file[i]));
    if length > MAX_HEADER_BYTES {
        return damaged("its length is beyond reason");
    }
    let end = PREFIX as u64 + length;
    let json = file.get(PREFIX..end as usize).ok_or(ArtifactError::Truncated { need: end, have: file.len() as u64 })?;
    let intact = blake3::hash(json).as_bytes() == &file[24..PREFIX];
    if version != FORMAT_VERSION {
        #[derive(Deserialize)]
        struct Writer {
            compiler: String,
        }
        let writer = serde_json::from_slice::<Writer>(json).ok().filter(|_| intact);
        return Err(ArtifactError::Version { found: version, compiler: writer.map(|w| w.compiler) });
    }
    if !intact {
        return damaged("it does not have its hash");
    }
    if file[12..16] != [0; 4] {
        return damaged("reserved bytes are set");
    }
    let header: Header =
        serde_json::from_slice(json).map_err(|e| ArtifactError::Invalid(vec![format!("header: {e}")]))?;
    header.check().map_err(ArtifactError::Invalid)?;
    check_layout(file, end, &header.sections)?;
    Ok(header)
}

/// Sections follow the header and one another, with zeros between, up to the end of the file.
fn check_layout(file: &[u8], header_end: u64, sections: &[Section]) -> Result<(), ArtifactError> {
    let mut at = header_end;
    for s in sections {
        if s.offset != at.next_multiple_of(ALIGN) {
            return Err(ArtifactError::Invalid(vec![format!(
                "section {}: starts at {}, not behind what is before it",
                s.name, s.offset
            )]));
        }
        let gap = (at, s.offset);
        at = s.offset + s.bytes;
        if file.len() as u64 >= gap.1 && file[gap.0 as usize..gap.1 as usize].iter().any(|&b| b != 0) {
            return Err(ArtifactError::HeaderDamaged(format!("bytes before section {} are set", s.name)));
        }
    }
    let have = file.len() as u64;
    match have.cmp(&at) {
        std::cmp::Ordering::Less => Err(ArtifactError::Truncated { need: at, have }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(ArtifactError::HeaderDamaged(format!("{} bytes follow its end", have - at))),
    }
}

/// The bytes of a section, once they have been compared with their hash. `header` is what [`read`] gave for `file`.
pub fn section<'a>(file: &'a [u8], header: &Header, name: &str) -> Result<&'a [u8], ArtifactError> {
    let section = header.section(name).ok_or_else(|| ArtifactError::NoSection(name.to_string()))?;
    let end = section.offset.saturating_add(section.bytes);
    let bytes = file
        .get(section.offset as usize..end as usize)
        .ok_or(ArtifactError::Truncated { need: end, have: file.len() as u64 })?;
    if blake3::hash(bytes).to_hex().as_str() != section.hash {
        return Err(ArtifactError::SectionDamaged(name.to_string()));
    }
    Ok(bytes)
}

impl WeightEntry {
    /// The shape with the open dim of a rope table bound.
    pub fn bound_shape(&self, context_rows: u32) -> Vec<u32> {
        let mut shape = self.shape.clone();
        if let (WeightSource::RopeTable { .. }, Some(rows)) = (&self.source, shape.first_mut()) {
            *rows = context_rows;
        }
        shape
    }

    /// Bytes of plain elements or of codes; `None` on overflow.
    pub fn code_bytes(&self, context_rows: u32) -> Option<u64> {
        let element = match self.elem {
            Elem::Plain(dtype) => dtype.bytes() as u64,
            Elem::Quant(_) => 1,
        };
        self.bound_shape(context_rows).iter().try_fold(element, |bytes, &n| bytes.checked_mul(u64::from(n)))
    }

    /// Where the scales of a quantised weight are: from its start, in bytes. `None` if it has none, or on overflow.
    pub fn scale_range(&self) -> Option<Range<u64>> {
        let Elem::Quant(quant) = self.elem else { return None };
        let start = self.code_bytes(0)?.checked_next_multiple_of(SCALE_ALIGN)?;
        let rank = self.shape.len();
        let mut count = 1u64;
        for (dim, &n) in self.shape.iter().enumerate() {
            let block = match rank - dim {
                1 => quant.block[1],
                2 => quant.block[0],
                _ => 1,
            };
            count = count.checked_mul(u64::from(n.div_ceil(block.max(1))))?;
        }
        Some(start..start.checked_add(count.checked_mul(4)?)?)
    }

    /// Bytes of the weight in device memory, when the context capacity is `context_rows` tokens: codes, then at the next multiple
    /// of [`SCALE_ALIGN`] the f32 scales. `None` on overflow.
    pub fn bytes(&self, context_rows: u32) -> Option<u64> {
        match self.elem {
            Elem::Plain(_) => self.code_bytes(context_rows),
            Elem::Quant(_) => self.scale_range().map(|r| r.end),
        }
    }
}

impl ParamEntry {
    /// The bytes the view can touch relative to the bound address when symbols are at most `limits`, first and past-the-end;
    /// `Ok(None)` if it is empty, `Err` if the arithmetic overflows.
    pub fn span(&self, limits: &SymValues) -> Result<Option<(i128, i128)>, Overflow> {
        let mut low = i128::from(self.view.offset);
        let mut high = low;
        for (extent, stride) in self.view.shape.iter().zip(&self.view.strides) {
            let count = extent.eval(limits);
            if count == 0 {
                return Ok(None);
            }
            let step = i128::from(stride.bytes) * stride.sym.map_or(1, |s| i128::from(limits.get(s)));
            let reach = step.checked_mul(i128::from(count - 1)).ok_or(Overflow)?;
            let end = if reach < 0 { &mut low } else { &mut high };
            *end = end.checked_add(reach).ok_or(Overflow)?;
        }
        Ok(Some((low, high + self.view.dtype.bytes() as i128)))
    }

    /// Checks that the view, bound at byte `at` of a buffer of `bytes`, stays inside while symbols are at most `limits`.
    pub fn check_binding(&self, at: u64, bytes: u64, limits: &SymValues) -> Result<(), String> {
        let name = &self.name;
        if !at.is_multiple_of(self.view.dtype.bytes() as u64) {
            return Err(format!(
                "parameter {name} is bound at byte {at}, which is not aligned to its {}",
                self.view.dtype
            ));
        }
        match self.span(limits) {
            Err(Overflow) => Err(format!("parameter {name}: the size of {} overflows", self.view)),
            Ok(None) => Ok(()),
            Ok(Some((low, high))) if i128::from(at) + low < 0 || high > i128::from(bytes) - i128::from(at) => {
                Err(format!(
                    "parameter {name}: {} spans bytes {low}..{high} from byte {at} of a buffer of {bytes} at limits {:?}",
                    self.view, limits.0
                ))
            }
            Ok(Some(_)) => Ok(()),
        }
    }
}

/// A size does not fit its integer type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

impl KernelEntry {
    /// Blocks of a launch; `None` beyond reason (2^48).
    pub fn blocks(&self, syms: &SymValues) -> Option<u64> {
        self.grid.iter().try_fold(1u64, |n, dim| n.checked_mul(dim.eval(syms))).filter(|&n| n <= MAX_BLOCKS)
    }
}

impl Header {
    /// The section of that name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// Bytes of the buffer that an argument is bound to, and the argument's place in it, when symbols are at most `limits` (rope
    /// tables have `limits.C` rows). `None` if its index is foreign or the size overflows.
    pub fn buffer(&self, arg: Arg, arena_bytes: u64, limits: &SymValues) -> Option<(u64, u64)> {
        let rows = limits.get(Sym::C);
        Some(match arg {
            Arg::Arena(at) => (arena_bytes, at),
            Arg::Weight(i, at) => (self.weights.get(i as usize)?.bytes(rows)?, at),
            Arg::State(i) => (
                u64::from(limits.get(Sym::N))
                    .checked_mul(u64::from(self.states.get(i as usize)?.format.page_bytes()))?,
                0,
            ),
            Arg::Input(input) => (input.shape().iter().try_fold(4u64, |n, e| n.checked_mul(e.eval(limits)))?, 0),
            Arg::Logits => (u64::from(limits.get(Sym::L)).checked_mul(u64::from(self.model.vocab))?.checked_mul(4)?, 0),
            Arg::Tokens => (u64::from(limits.get(Sym::L)) * 4, 0),
            Arg::Caller(_) | Arg::Workspace(_) => return None,
        })
    }

    /// Everything that is wrong with the header: every index, range, count and size, and that each view stays inside what it is
    /// bound to at its step's limits. The list is not empty and ends after 50 problems.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut check = Check { header: self, problems: Vec::new() };
        check.model();
        check.sections();
        check.weights();
        // Sizes of states are computed without care for overflow, so what follows relies on these being sane.
        check.states();
        if check.problems.is_empty() {
            check.kernels();
        }
        if check.problems.is_empty() {
            check.steps();
            check.entries();
        }
        if check.problems.is_empty() { Ok(()) } else { Err(check.problems) }
    }
}

/// Walks a header and collects what is wrong.
struct Check<'a> {
    header: &'a Header,
    problems: Vec<String>,
}

impl<'a> Check<'a> {
    fn problem(&mut self, what: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(what);
        }
    }

    fn expect(&mut self, ok: bool, what: impl FnOnce() -> String) {
        if !ok {
            self.problem(what());
        }
    }

    /// Names must be there and differ, tables be of sane size.
    fn names(&mut self, what: &str, names: impl ExactSizeIterator<Item = &'a str>) {
        self.expect(names.len() <= MAX_ENTRIES, || format!("more than {MAX_ENTRIES} {what}s"));
        let mut seen = BTreeSet::new();
        for name in names {
            self.expect(!name.is_empty() && name.len() <= 4096, || format!("a {what} has an empty or endless name"));
            self.expect(seen.insert(name), || format!("{what} {name}: the name occurs twice"));
        }
    }

    fn model(&mut self) {
        let m = &self.header.model;
        self.expect((1..=i32::MAX as u32).contains(&m.vocab), || format!("model: vocabulary of {}", m.vocab));
        self.expect((1..=i32::MAX as u32).contains(&m.max_context), || format!("model: context of {}", m.max_context));
        self.expect(m.rank < m.ranks, || format!("model: rank {} of {}", m.rank, m.ranks));
        for &token in m.bos.iter().chain(&m.eos) {
            self.expect(token < m.vocab, || {
                format!("model: bos or eos {token} is outside the vocabulary of {}", m.vocab)
            });
        }
    }

    fn sections(&mut self) {
        self.names("section", self.header.sections.iter().map(|s| s.name.as_str()));
        for s in &self.header.sections {
            self.expect(s.offset.is_multiple_of(ALIGN), || {
                format!("section {}: offset {} is not aligned", s.name, s.offset)
            });
            self.expect(s.offset.checked_add(s.bytes).is_some_and(|end| end <= MAX_BUFFER_BYTES), || {
                format!("section {}: {} bytes at {} are beyond reason", s.name, s.bytes, s.offset)
            });
        }
    }

    fn weights(&mut self) {
        self.names("weight", self.header.weights.iter().map(|w| w.name.as_str()));
        for w in &self.header.weights {
            if let Err(what) = check_weight(w) {
                self.problem(format!("weight {}: {what}", w.name));
            }
        }
    }

    fn states(&mut self) {
        self.names("state", self.header.states.iter().map(|s| s.name.as_str()));
        for s in &self.header.states {
            let (sizes, dtype) = match s.format {
                StateFormat::LatentFp8 { latent, rope } => ([latent, rope], DType::E4m3),
                StateFormat::Latent { latent, rope, dtype } => ([latent, rope], dtype),
                StateFormat::IndexFp8 { dim } => ([dim, 1], DType::E4m3),
                StateFormat::Index { dim, dtype } => ([dim, 1], dtype),
            };
            self.expect(sizes.iter().all(|n| (1..=MAX_ROW).contains(n)) && dtype != DType::Bool, || {
                format!("state {}: {:?} is beyond reason", s.name, s.format)
            });
        }
    }

    fn kernels(&mut self) {
        self.names("kernel", self.header.kernels.iter().map(|k| k.name.as_str()));
        let code = self.header.section("code").map_or(0, |s| s.bytes);
        let asm = self.header.section("asm").map_or(0, |s| s.bytes);
        for k in &self.header.kernels {
            let mut fault = |ok: bool, what: &dyn Fn() -> String| {
                self.expect(ok, || format!("kernel {}: {}", k.name, what()));
            };
            let end = k.entry.checked_add(k.code_bytes);
            // Without machine code, the driver makes it from assembly.
            let portable = k.gpu.as_ref().is_some_and(|g| g.resources.is_none() && g.asm[0] < g.asm[1]);
            fault((k.code_bytes > 0 || portable) && end.is_some_and(|end| end <= code), &|| {
                format!("its {} bytes at {} are not inside the code section of {code}", k.code_bytes, k.entry)
            });
            if let Some(gpu) = &k.gpu {
                fault((1..=1024).contains(&gpu.threads), &|| format!("{} threads a block", gpu.threads));
                fault(gpu.shared_bytes <= MAX_SHARED_BYTES, &|| format!("{} bytes of shared memory", gpu.shared_bytes));
                fault((1..=16).contains(&gpu.cluster), &|| format!("clusters of {} blocks", gpu.cluster));
                fault(gpu.scratch_bytes <= MAX_SCRATCH_BYTES, &|| {
                    format!("{} scratch bytes are beyond reason", gpu.scratch_bytes)
                });
                fault(gpu.scratch_bytes == 0 || gpu.persistent, &|| {
                    "memory of its own for every block of a grid".into()
                });
                fault(gpu.asm[0] <= gpu.asm[1] && gpu.asm[1] <= asm, &|| "its assembly is outside its section".into());
                for map in &gpu.maps {
                    let rank = k.params.get(map.param as usize).map_or(0, |p| p.view.shape.len());
                    let boxed = rank == map.tile.len() && (1..=5).contains(&rank);
                    fault(boxed && map.tile.iter().all(|n| (1..=256).contains(n)), &|| {
                        format!("a tensor map of parameter {} with box {:?}", map.param, map.tile)
                    });
                    fault([0, 32, 64, 128].contains(&map.swizzle), &|| format!("a swizzle of {} bytes", map.swizzle));
                }
            }
            fault(k.scratch_bytes <= MAX_SCRATCH_BYTES, &|| {
                format!("{} scratch bytes are beyond reason", k.scratch_bytes)
            });
            fault(k.grid.len() <= 3 && k.grid.iter().all(|d| d.tile > 0), &|| {
                "its grid has over 3 axes, or a tile of 0".into()
            });
            fault(k.params.len() <= 256, &|| format!("{} parameters are beyond reason", k.params.len()));
            for p in &k.params {
                let (view, bytes) = (&p.view, p.view.dtype.bytes() as i64);
                fault(view.dtype != DType::Bool, &|| format!("parameter {}: truth values in memory", p.name));
                fault(view.shape.len() == view.strides.len() && view.shape.len() <= 8, &|| {
                    format!("parameter {}: {} dims with {} strides", p.name, view.shape.len(), view.strides.len())
                });
                let aligned =
                    view.offset.is_multiple_of(bytes as u64) && view.strides.iter().all(|s| s.bytes % bytes == 0);
                fault(aligned, &|| {
                    format!("parameter {}: offset or strides are not aligned to its {}", p.name, view.dtype)
                });
            }
        }
    }

    fn steps(&mut self) {
        let empty = self.header.steps.is_empty() && self.header.entries.is_empty();
        self.expect(!empty, || "there is no step".into());
        self.names("step", self.header.steps.iter().map(|s| s.name.as_str()));
        let mut taps = BTreeMap::new();
        for step in &self.header.steps {
            for sym in Sym::ALL {
                let (value, least) = (step.max.get(sym), u32::from(sym != Sym::L));
                let most = if sym == Sym::N { i32::MAX as u32 / PAGE_TOKENS } else { i32::MAX as u32 };
                self.expect((least..=most).contains(&value), || {
                    format!("step {}: at most {value} {} is outside {least}..={most}", step.name, sym.name())
                });
            }
            self.expect(step.arena_bytes <= MAX_BUFFER_BYTES, || {
                format!("step {}: an arena of {} bytes is beyond reason", step.name, step.arena_bytes)
            });
            self.expect(step.sampling as usize <= step.launches.len(), || {
                format!("step {}: sampling begins at launch {} of {}", step.name, step.sampling, step.launches.len())
            });
            self.expect(step.launches.len() <= MAX_ENTRIES, || format!("step {}: too many launches", step.name));
            for (i, launch) in step.launches.iter().enumerate() {
                for what in self.launch(step, launch) {
                    self.problem(format!("step {}, launch {i} ({}): {what}", step.name, launch.node));
                }
            }
            self.expect(self.header.model.ranks > 1 || step.collectives.is_empty(), || {
                format!("step {}: sums over the ranks of a model that has one", step.name)
            });
            for (i, sum) in step.collectives.iter().enumerate() {
                if let Err(what) = check_rows(step, sum.at, sum.columns, sum.dtype, sum.after) {
                    self.problem(format!("step {}, sum {i} over ranks: {what}", step.name));
                }
            }
            self.names("tap", step.taps.iter().map(|t| t.name.as_str()));
            for tap in &step.taps {
                if let Err(what) = check_rows(step, tap.at, tap.columns, tap.dtype, tap.after) {
                    self.problem(format!("step {}, tap {}: {what}", step.name, tap.name));
                }
                let kind = (tap.columns, tap.dtype);
                self.expect(*taps.entry(tap.name.as_str()).or_insert(kind) == kind, || {
                    format!("step {}, tap {}: it differs from that of another step", step.name, tap.name)
                });
            }
        }
    }

    fn entries(&mut self) {
        self.expect(self.header.entries.len() <= MAX_ENTRIES, || format!("more than {MAX_ENTRIES} entry points"));
        for entry in &self.header.entries {
            let place = format!("entry point {} ({})", entry.op, entry.class);
            for what in entry.check() {
                self.problem(format!("{place}: {what}"));
            }
            for (i, launch) in entry.launches.iter().enumerate() {
                let buffer = |arg| entry.buffer(arg, &entry.max);
                for what in self.launch_of(launch, &entry.max, &buffer, &|arg| entry.writable(arg)) {
                    self.problem(format!("{place}, launch {i} ({}): {what}", launch.node));
                }
            }
        }
    }

    fn launch(&self, step: &Step, launch: &Launch) -> Vec<String> {
        let buffer = |arg| self.header.buffer(arg, step.arena_bytes, &step.max);
        self.launch_of(launch, &step.max, &buffer, &|arg| !matches!(arg, Arg::Weight(..) | Arg::Input(_)))
    }

    fn launch_of(
        &self,
        launch: &Launch,
        max: &SymValues,
        buffer: &dyn Fn(Arg) -> Option<(u64, u64)>,
        writable: &dyn Fn(Arg) -> bool,
    ) -> Vec<String> {
        let Some(kernel) = self.header.kernels.get(launch.kernel as usize) else {
            return vec![format!("kernel {} of {}", launch.kernel, self.header.kernels.len())];
        };
        let mut problems = Vec::new();
        if launch.args.len() != kernel.params.len() {
            problems.push(format!(
                "{} arguments for the {} parameters of {}",
                launch.args.len(),
                kernel.params.len(),
                kernel.name
            ));
        }
        if kernel.blocks(max).is_none() {
            problems.push(format!("the grid of {} is beyond reason", kernel.name));
        }
        for (param, &arg) in kernel.params.iter().zip(&launch.args) {
            if param.write && !writable(arg) {
                problems.push(format!("parameter {} writes {arg:?}", param.name));
            }
            match buffer(arg) {
                None => {
                    problems.push(format!("parameter {}: {arg:?} does not exist, or its size overflows", param.name))
                }
                Some((bytes, at)) => problems.extend(param.check_binding(at, bytes, max).err()),
            }
        }
        problems
    }
}

/// Whether `[T, columns]` at byte `at` can be read after so many launches.
fn check_rows(step: &Step, at: u64, columns: u32, dtype: DType, after: u32) -> Result<(), String> {
    let bytes = dtype.bytes() as u64;
    if dtype == DType::Bool || after > step.sampling || !at.is_multiple_of(bytes) {
        return Err("its type, launch or alignment cannot be".into());
    }
    let size = (u64::from(step.max.get(Sym::T)) * u64::from(columns)).checked_mul(bytes);
    match size.and_then(|size| at.checked_add(size)) {
        Some(end) if end <= step.arena_bytes => Ok(()),
        _ => Err(format!("it leaves the arena of {} bytes", step.arena_bytes)),
    }
}

fn check_weight(w: &WeightEntry) -> Result<(), String> {
    let rope = matches!(w.source, WeightSource::RopeTable { .. });
    if !(1..=4).contains(&w.shape.len()) || w.shape.iter().skip(usize::from(rope)).any(|&n| n == 0) {
        return Err(format!("shape {:?}", w.shape));
    }
    match w.elem {
        Elem::Plain(DType::Bool) => return Err("truth values in memory".into()),
        Elem::Quant(q) if q.block.contains(&0) || (w.shape.len() == 1 && q.block[0] != 1) => {
            return Err(format!("blocks {:?}", q.block));
        }
        _ => {}
    }
    if w.bytes(i32::MAX as u32).is_none_or(|n| n > MAX_BUFFER_BYTES) {
        return Err(format!("shape {:?} is beyond reason", w.shape));
    }
    match &w.source {
        WeightSource::RopeTable { frequencies } => {
            let columns = 2 * frequencies.len() as u64;
            let fits = w.shape.len() == 2 && w.shape[0] == 0 && u64::from(w.shape[1]) == columns;
            if !fits || w.elem != Elem::Plain(DType::F32) || frequencies.iter().any(|f| !f.is_finite()) {
                return Err(format!("a rope table of {} frequencies is f32 [0, {columns}]", frequencies.len()));
            }
        }
        WeightSource::Hadamard { n } => {
            let plain = matches!(w.elem, Elem::Plain(d) if d.is_float());
            if !n.is_power_of_two() || *n > MAX_ROW || w.shape != [*n, *n] || !plain {
                return Err(format!("a Hadamard matrix of order {n} is [{n}, {n}], of plain floats, a power of two"));
            }
        }
        WeightSource::Tensors(parts) => check_parts(w, parts)?,
    }
    Ok(())
}

/// The parts, stacked by rows, must make the weight's shape; those of quantised weights on its grid of scales.
fn check_parts(w: &WeightEntry, parts: &[TensorPart]) -> Result<(), String> {
    let columns = w.shape[w.shape.len() - 1];
    let slab = w.shape[..w.shape.len() - 1].last().map_or(1, |&n| u64::from(n));
    let (mut rows, mut elements) = (0u64, 0u64);
    for part in parts {
        let fault = |what: String| Err(format!("tensor {}: {what}", part.tensor));
        let [r0, r1] = part.rows;
        let [c0, c1] = part.cols;
        if r0 > r1 || r1 > part.shape[0] || c0 > c1 || c1 > part.shape[1] || part.scale_block.contains(&0) {
            return fault(format!(
                "rows {r0}..{r1}, columns {c0}..{c1} of {:?}, scales each {:?}",
                part.shape, part.scale_block
            ));
        }
        let count = u64::from(r1 - r0);
        if w.shape.len() > 1 && c1 - c0 != columns {
            return fault(format!("{} columns of {columns}", c1 - c0));
        }
        if let Elem::Quant(q) = w.elem {
            let (first, end) = (rows % slab, rows % slab + count);
            let block = u64::from(q.block[0]);
            let one_slab = end <= slab || slab.is_multiple_of(block);
            let aligned = first.is_multiple_of(block) && r0.is_multiple_of(q.block[0]) && c0.is_multiple_of(q.block[1]);
            let ends = count.is_multiple_of(block) || end.is_multiple_of(slab);
            if part.scale_block != q.block || part.scale.is_none() || !one_slab || !aligned || !ends {
                return fault(format!("its scales are not those of blocks {:?} of the weight", q.block));
            }
        }
        rows += count;
        elements += count * u64::from(c1 - c0);
    }
    if Some(elements) != w.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(u64::from(d))) {
        return Err(format!("its parts have {elements} elements, its shape is {:?}", w.shape));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use crate::graph::Quant;
    use crate::tile::Stride;

    fn part(tensor: &str, shape: [u32; 2]) -> TensorPart {
        let (scale, scale_block) = (Some(format!("{tensor}_scale_inv")), [128, 128]);
        TensorPart { tensor: tensor.into(), scale, scale_block, shape, rows: [0, shape[0]], cols: [0, shape[1]] }
    }

    fn param(name: &str, write: bool, dtype: DType, shape: &[Extent]) -> ParamEntry {
        ParamEntry { name: name.into(), view: ViewType::dense(dtype, shape), write }
    }

    fn sample() -> Header {
        let quant = Elem::Quant(Quant { block: [128, 128], pow2: true });
        let keys = Extent { factor: PAGE_TOKENS, sym: Some(Sym::N) };
        Header {
            compiler: "0.1.0".into(),
            target: "cpu".into(),
            features: vec!["avx2".into()],
            numerics: Numerics::Deployed,
            model: ModelFacts {
                model_type: "deepseek_v32".into(),
                config_hash: "00".into(),
                vocab: 512,
                layers: 1,
                index_topk: 16,
                bos: Some(0),
                eos: vec![1],
                max_context: 1000,
                ranks: 1,
                rank: 0,
            },
            weights: vec![
                WeightEntry {
                    name: "q".into(),
                    shape: vec![320, 192],
                    elem: quant,
                    source: WeightSource::Tensors(vec![part("a", [256, 192]), part("b", [64, 192])]),
                },
                WeightEntry {
                    name: "rope".into(),
                    shape: vec![0, 4],
                    elem: Elem::Plain(DType::F32),
                    source: WeightSource::RopeTable { frequencies: vec![1.0, 0.1] },
                },
            ],
            states: vec![State { name: "keys".into(), format: StateFormat::Index { dim: 8, dtype: DType::Bf16 } }],
            kernels: vec![KernelEntry {
                name: "k".into(),
                what: "all".into(),
                entry: 0,
                code_bytes: 100,
                scratch_bytes: 64,
                grid: vec![GridDim { extent: Sym::T.into(), tile: 4 }],
                params: vec![
                    param("x", false, DType::F32, &[Sym::T.into(), 8.into()]),
                    param("y", true, DType::Bf16, &[Sym::T.into(), 8.into()]),
                    param("w", false, DType::E4m3, &[320.into(), 192.into()]),
                    param("scales", false, DType::F32, &[3.into(), 2.into()]),
                    param("table", false, DType::F32, &[Sym::C.into(), 4.into()]),
                    param("keys", true, DType::Bf16, &[keys, 8.into()]),
                    param("pages", false, DType::I32, &[Sym::S.into(), Sym::P.into()]),
                    param("logits", true, DType::F32, &[Sym::L.into(), 512.into()]),
                ],
                schedule: Default::default(),
                work: Default::default(),
                gpu: None,
            }],
            library: None,
            entries: Vec::new(),
            steps: vec![Step {
                name: "all".into(),
                max: SymValues([10, 2, 16, 10, 1 << 20, 1000]),
                arena_bytes: 640,
                launches: vec![Launch {
                    kernel: 0,
                    args: vec![
                        Arg::Arena(0),
                        Arg::Arena(320),
                        Arg::Weight(0, 0),
                        Arg::Weight(0, 320 * 192),
                        Arg::Weight(1, 0),
                        Arg::State(0),
                        Arg::Input(StepInput::PageTable),
                        Arg::Logits,
                    ],
                    node: "layers.0".into(),
                }],
                collectives: Vec::new(),
                sampling: 1,
                taps: vec![Tap { name: "hidden.0".into(), after: 1, at: 0, columns: 8, dtype: DType::F32 }],
            }],
            sections: Vec::new(),
        }
    }

    fn file() -> (Header, Vec<u8>) {
        let mut header = sample();
        let bytes = write(&mut header, &[("code", &[0xc3; 5000]), ("tile", b"kernel k")]);
        (header, bytes)
    }

    #[test]
    fn written_is_read_and_the_same_again() {
        let (header, bytes) = file();
        assert_eq!(read(&bytes).unwrap(), header);
        assert_eq!(file().1, bytes);
        assert_eq!(section(&bytes, &header, "tile").unwrap(), b"kernel k");
        assert_eq!(section(&bytes, &header, "code").unwrap(), [0xc3; 5000]);
        assert_eq!(section(&bytes, &header, "ptx"), Err(ArtifactError::NoSection("ptx".into())));
        assert!(header.sections.iter().all(|s| s.offset.is_multiple_of(ALIGN)));
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let (_, bytes) = file();
        for i in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[i] ^= 1 << (i % 8);
            let result = read(&damaged)
                .and_then(|h| section(&damaged, &h, "code").and(section(&damaged, &h, "tile")).map(|_| ()));
            assert!(result.is_err(), "byte {i}");
        }
    }

    #[test]
    fn every_cut_is_found() {
        let (_, bytes) = file();
        for end in (0..bytes.len()).step_by(64).chain([1, 7, 8, 55, 56, 57, bytes.len() - 1]) {
            let error = read(&bytes[..end]).unwrap_err();
            let fits = if end == 0 {
                ArtifactError::NotAnArtifact == error
            } else {
                matches!(error, ArtifactError::Truncated { .. })
            };
            assert!(fits, "{end}: {error}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(read(&longer), Err(ArtifactError::HeaderDamaged(_))));
    }

    #[test]
    fn other_versions_say_who_wrote_them() {
        let (_, mut bytes) = file();
        bytes[8] = 3;
        let error = read(&bytes).unwrap_err().to_string();
        assert!(error.contains("version 3, written by 0.1.0") && error.contains("update dsc"), "{error}");
        bytes[8] = 0;
        assert!(read(&bytes).unwrap_err().to_string().ends_with("compile the model again"));
        bytes[60] ^= 1;
        assert!(matches!(read(&bytes), Err(ArtifactError::Version { compiler: None, .. })));
        assert_eq!(
            read(b"GGUF....................................................."),
            Err(ArtifactError::NotAnArtifact)
        );
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(read(&bytes), Err(ArtifactError::HeaderDamaged(_))));
    }

    #[test]
    fn a_header_of_another_shape_is_invalid() {
        for json in [&b"{}"[..], b"[1]", b"\xff\xfe", b"{\"compiler\": 3}", b""] {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(FORMAT_VERSION.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend((json.len() as u64).to_le_bytes());
            bytes.extend(blake3::hash(json).as_bytes());
            bytes.extend(json);
            assert!(matches!(read(&bytes), Err(ArtifactError::Invalid(_))));
        }
    }

    /// What `check` says of the sample after an edit.
    fn edited(edit: impl FnOnce(&mut Header)) -> String {
        let (mut header, _) = file();
        edit(&mut header);
        header.check().map_or_else(|problems| problems.join("\n"), |()| "fine".into())
    }

    #[test]
    fn what_leaves_a_table_or_a_buffer_is_named() {
        assert_eq!(edited(|_| ()), "fine");
        type Edit = Box<dyn FnOnce(&mut Header)>;
        let cases: Vec<(&str, Edit)> = vec![
            ("kernel 1 of 1", Box::new(|h| h.steps[0].launches[0].kernel = 1)),
            ("7 arguments for the 8 parameters", Box::new(|h| h.steps[0].launches[0].args.truncate(7))),
            ("parameter x: Arena", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Weight(9, 0))),
            ("parameter x: view", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(324))),
            ("not aligned to its f32", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(2))),
            ("parameter y: view", Box::new(|h| h.steps[0].launches[0].args[1] = Arg::Arena(482))),
            ("parameter x: view", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(u64::MAX - 3))),
            ("parameter y writes Weight(0, 0)", Box::new(|h| h.steps[0].launches[0].args[1] = Arg::Weight(0, 0))),
            ("parameter w: view", Box::new(|h| h.steps[0].launches[0].args[2] = Arg::Weight(0, 512))),
            ("parameter scales: view", Box::new(|h| h.steps[0].launches[0].args[3] = Arg::Weight(0, 320 * 192 + 4))),
            ("State(1) does not exist", Box::new(|h| h.steps[0].launches[0].args[5] = Arg::State(1))),
            ("parameter keys: view", Box::new(|h| h.kernels[0].params[5].view.offset = 2)),
            ("parameter keys: view", Box::new(|h| h.kernels[0].params[5].view.strides[0].bytes = -16)),
            ("parameter pages: view", Box::new(|h| h.kernels[0].params[6].view.shape[0] = 3.into())),
            ("parameter logits: view", Box::new(|h| h.model.vocab = 511)),
            (
                "overflows",
                Box::new(|h| {
                    h.kernels[0].params[0].view.shape[0] = Extent { factor: u32::MAX, sym: Some(Sym::N) };
                    h.kernels[0].params[0].view.strides[0] = Stride { bytes: 1 << 62, sym: Some(Sym::N) };
                }),
            ),
            (
                "parameter x: view",
                Box::new(|h| h.kernels[0].params[0].view.shape[0] = Extent { factor: u32::MAX, sym: Some(Sym::N) }),
            ),
            ("2 dims with 1 strides", Box::new(|h| h.kernels[0].params[0].view.strides.truncate(1))),
            ("not inside the code section", Box::new(|h| h.kernels[0].entry = 4901)),
            ("not inside the code section", Box::new(|h| h.kernels[0].entry = u64::MAX)),
            ("not inside the code section", Box::new(|h| drop(h.sections.remove(0)))),
            ("scratch bytes are beyond reason", Box::new(|h| h.kernels[0].scratch_bytes = 1 << 40)),
            ("a tile of 0", Box::new(|h| h.kernels[0].grid[0].tile = 0)),
            (
                "the grid of k is beyond reason",
                Box::new(|h| {
                    h.kernels[0].grid =
                        vec![GridDim { extent: Extent { factor: u32::MAX, sym: Some(Sym::N) }, tile: 1 }; 3];
                }),
            ),
            ("at most 4294967295 N", Box::new(|h| h.steps[0].max.0[4] = u32::MAX)),
            ("at most 0 T", Box::new(|h| h.steps[0].max.0[0] = 0)),
            ("an arena of", Box::new(|h| h.steps[0].arena_bytes = u64::MAX)),
            ("there is no step", Box::new(|h| h.steps.clear())),
            ("step all: the name occurs twice", Box::new(|h| h.steps.push(h.steps[0].clone()))),
            ("tap hidden.0: its type, launch", Box::new(|h| h.steps[0].taps[0].after = 2)),
            ("tap hidden.0: it leaves the arena", Box::new(|h| h.steps[0].taps[0].columns = 1 << 30)),
            ("tap hidden.0: it leaves the arena", Box::new(|h| h.steps[0].taps[0].at = u64::MAX - 3)),
            ("eos 512 is outside", Box::new(|h| h.model.eos.push(512))),
            ("vocabulary of 0", Box::new(|h| h.model.vocab = 0)),
            ("state keys", Box::new(|h| h.states[0].format = StateFormat::Index { dim: u32::MAX, dtype: DType::F32 })),
            ("offset 1 is not aligned", Box::new(|h| h.sections[0].offset = 1)),
            ("beyond reason", Box::new(|h| h.sections[0].bytes = u64::MAX)),
            ("weight q: its parts have", Box::new(|h| with_parts(h, |p| drop(p.pop())))),
            ("weight q: shape", Box::new(|h| h.weights[0].shape = vec![u32::MAX; 4])),
            ("weight q: blocks", Box::new(|h| h.weights[0].elem = Elem::Quant(Quant { block: [0, 1], pow2: true }))),
            ("weight rope: a rope table", Box::new(|h| h.weights[1].shape[1] = 6)),
            ("weight q: a Hadamard matrix", Box::new(|h| h.weights[0].source = WeightSource::Hadamard { n: 3 })),
            ("tensor a: rows 0..300", Box::new(|h| with_parts(h, |p| p[0].rows = [0, 300]))),
            ("tensor b: its scales", Box::new(|h| with_parts(h, |p| p.swap(0, 1)))),
            ("tensor a: its scales", Box::new(|h| with_parts(h, |p| p[0].scale = None))),
            ("tensor a: 191 columns", Box::new(|h| with_parts(h, |p| p[0].cols = [1, 192]))),
        ];
        for (i, (expected, edit)) in cases.into_iter().enumerate() {
            let problems = edited(edit);
            let expected = expected.replace("Arena", "Weight(9, 0) does not exist");
            assert!(problems.contains(&expected), "{i}: {expected}: {problems}");
        }
    }

    fn with_parts(header: &mut Header, edit: impl FnOnce(&mut Vec<TensorPart>)) {
        match &mut header.weights[0].source {
            WeightSource::Tensors(parts) => edit(parts),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn sizes_of_weights() {
        let header = sample();
        assert_eq!(header.weights[0].bytes(7), Some(320 * 192 + 3 * 2 * 4));
        assert_eq!(header.weights[0].scale_range(), Some(61440..61464));
        assert_eq!(header.weights[1].bytes(7), Some(7 * 16));
        let experts = WeightEntry { shape: vec![3, 129, 100], ..header.weights[0].clone() };
        assert_eq!(experts.bytes(0), Some((3u64 * 129 * 100).next_multiple_of(256) + 3 * 2 * 4));
    }

    #[test]
    fn problems_are_bounded() {
        let mut header = sample();
        header.model.eos = vec![1000; 10_000];
        assert_eq!(header.check().unwrap_err().len(), MAX_PROBLEMS);
    }

    fn entry() -> Entry {
        let arg = |name: &str, shape: &[Extent], write| EntryArg {
            name: name.into(),
            elem: ArgElem::Plain(DType::F32),
            shape: shape.to_vec(),
            write,
        };
        Entry {
            op: "toy".into(),
            class: "all".into(),
            max: SymValues([8, 4, 4, 1, 1, 256]),
            relations: vec![
                (Sym::T.into(), Extent::from(Sym::S).times(2)),
                (Sym::C.into(), Extent::from(Sym::P).times(64)),
            ],
            args: vec![
                arg("x", &[Sym::T.into(), 3.into()], false),
                arg("table", &[Sym::S.into(), Sym::P.into()], false),
                arg("y", &[Sym::T.into()], true),
            ],
            workspace: vec![
                WorkspacePart { element_bytes: 4, shape: vec![Sym::T.into(), Sym::C.into()] },
                WorkspacePart { element_bytes: 2, shape: vec![Sym::T.into()] },
            ],
            launches: Vec::new(),
        }
    }

    #[test]
    fn shapes_of_a_call_bind_its_sizes() {
        let e = entry();
        let syms = |shapes: [&[u64]; 3]| e.symbols(&shapes).map(|s| s.0).map_err(|m| (m.rank(), m.to_string()));
        assert_eq!(syms([&[4, 3], &[2, 3], &[4]]), Ok([4, 2, 3, 1, 1, 192]));
        assert_eq!(syms([&[4, 2], &[2, 3], &[4]]), Err((0, "x is [4, 2], wants [T, 3] where T = 4".into())));
        assert_eq!(syms([&[4, 3], &[2, 3], &[5]]).unwrap_err().0, 0);
        let unrelated = "T is 3, wants 2*S where T = 3, S = 2, P = 3".to_string();
        assert_eq!(syms([&[3, 3], &[2, 3], &[3]]), Err((1, unrelated)));
        assert_eq!(syms([&[10, 3], &[5, 3], &[10]]), Err((2, "10 T are more than 8".into())));
        let (starts, bytes) = e.workspace(&SymValues([4, 2, 3, 1, 1, 192])).unwrap();
        assert_eq!((starts, bytes), (vec![0, 3072], 3072 + 256));
        assert_eq!(e.buffer(Arg::Workspace(1), &e.max), Some((256, 0)));
        assert_eq!(e.buffer(Arg::Caller(2), &e.max), Some((32, 0)));
        assert_eq!([Arg::Caller(3), Arg::Workspace(2), Arg::Arena(0)].map(|a| e.buffer(a, &e.max)), [None; 3]);
        assert!(e.args[1].pitched() && !e.args[0].pitched() && !e.args[2].pitched());
    }

    #[test]
    fn what_is_wrong_with_an_entry_point_is_found() {
        let wrong = |edit: &dyn Fn(&mut Entry), wanted: &str| {
            let (mut header, _) = file();
            let mut e = entry();
            edit(&mut e);
            header.entries = vec![e];
            let problems = header.check().unwrap_err().join("\n");
            assert!(problems.contains(wanted), "{problems}");
        };
        wrong(&|e| e.max = e.max.with(Sym::N, 0), "largest sizes");
        wrong(&|e| e.args[1].name = "x".into(), "not unique");
        wrong(&|e| e.args[0].elem = ArgElem::Plain(DType::Bool), "type or pages");
        wrong(&|e| e.args[0].elem = ArgElem::Pages(StateFormat::IndexFp8 { dim: 1 << 30 }), "type or pages");
        wrong(&|e| e.args[0].shape = vec![], "no dims");
        wrong(&|e| e.relations[0].0.factor = 2, "binds a multiple");
        wrong(&|e| e.workspace[0].element_bytes = u32::MAX, "workspace is beyond reason");
        let launch = |arg| Launch { kernel: 0, args: vec![arg], node: "n".into() };
        wrong(&|e| e.launches = vec![launch(Arg::Caller(9))], "does not exist");
        wrong(&|e| e.launches = vec![launch(Arg::Arena(0))], "does not exist");
        wrong(&|e| e.launches = vec![Launch { kernel: 77, ..launch(Arg::Caller(0)) }], "kernel 77 of");
    }
}
