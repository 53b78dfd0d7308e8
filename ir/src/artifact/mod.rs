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

mod check;
mod entries;
mod file;
mod loops;
mod sizes;

pub use entries::{ArgElem, Entry, EntryArg, LibraryFacts, Misfit, Pieces, WORKSPACE_ALIGN, WorkspacePart};
pub use file::{ArtifactError, MAX_HEADER_BYTES, read, section, write};
pub use loops::Loop;
pub use sizes::Overflow;

use crate::DType;
use crate::extent::{GridDim, SymValues};
use crate::graph::{Elem, State, StepInput};
use crate::tile::ViewType;
use crate::work::Work;
use serde::{Deserialize, Serialize};

/// First bytes of every artifact.
pub const MAGIC: [u8; 8] = *b"DSC\x7fART\n";
/// The version this crate writes and reads.
pub const FORMAT_VERSION: u32 = 5;
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
/// order of [`Sym::ALL`](crate::Sym::ALL)), which lie in device memory so that a captured graph serves steps of any size, or these 24 bytes by value
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
    /// Blocks of a cluster along x; 1 without clusters. Of a persistent kernel each [team](GpuKernel::team) takes a tile; else a cluster runs
    /// one block of the grid together.
    pub cluster: u32,
    /// Blocks of a cluster that run one tile of a persistent kernel together; 0 or 1: each has its own.
    #[serde(skip_serializing_if = "is_zero")]
    pub team: u32,
    /// The blocks of a team are of different clusters, and wait for one another through memory: each team has a counter of [`COUNTER_PITCH`] bytes in front of
    /// the memory that its blocks have to themselves, counted backwards. A launch is of whole teams, whose blocks all run at once.
    #[serde(skip_serializing_if = "is_false")]
    pub apart: bool,
    /// Blocks go on to further tiles: a launch with fewer blocks than the grid has does all of it. As many as the device holds at a
    /// time are best.
    pub persistent: bool,
    /// Tiles of the grid for each block of a persistent kernel whose tiles differ in their work: the device then gives blocks to whatever processor is
    /// free, in order. 0: as many blocks as the device holds.
    #[serde(skip_serializing_if = "is_zero")]
    pub turns: u32,
    /// Blocks divide the rounds of tiles of a persistent kernel rather than its tiles: a launch has as many blocks as the device holds, however few the tiles.
    #[serde(skip_serializing_if = "is_false")]
    pub ranges: bool,
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

fn is_false(b: &bool) -> bool {
    !b
}

/// Bytes from one team's counter to the next.
pub const COUNTER_PITCH: u64 = 64;
/// Teams that have one: in front of the memory of blocks are so many, of zeros before the first launch. Each launch leaves its counters as
/// the next may find them: all but the first bit are zeros.
pub const COUNTERS: u32 = 1024;

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
    /// Scalar registers kept in lanes of vector registers.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub scalar_spills: u32,
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
    /// Launches among them that are made in pieces of the tokens, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loops: Vec<Loop>,
    /// Sums over ranks, in order.
    pub collectives: Vec<Collective>,
    /// Launches that make the logits; those behind them choose tokens, which a step that wants no tokens leaves out.
    pub sampling: u32,
    /// Intermediate results.
    pub taps: Vec<Tap>,
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
/// Largest buffer that a plan may ask for, in bytes.
pub const MAX_BUFFER_BYTES: u64 = 1 << 42;

#[cfg(test)]
mod tests;
