//! Scheduled tile IR: a tile program with every decision of its schedule made explicit.
//!
//! A [`Scheduled`] kernel says who computes what and where it lies: threads and their [`Role`]s, shared memory as [`Buffer`]s at fixed
//! offsets, [`Channel`]s (rings of buffers that one role fills and others empty), barriers, and a [`Place`] for every value. A target
//! lowers it instruction by instruction and decides nothing more.
//!
//! **Execution.** All threads run [`Scheduled::common`]; then the threads of each role run its body, roles at once and in any
//! interleaving that channels allow. Within a role instructions run in order; a value of place [`Place::Lazy`] is computed where it
//! is used, so its inputs must be valid there. Reading a shared buffer that other threads wrote needs a [`Op::Barrier`] between, and
//! so does overwriting one that others may still read.
//!
//! **Channels.** A channel has `stages` copies of its slots. Its producer acquires the next free stage, fills the slots and
//! commits; each consumer waits for the next full stage, takes its slots and releases it. Stages go round in order. Counters are implicit:
//! the n-th acquire of a role and the n-th wait of another mean the same stage. What fills a slot is a copy from memory ([`Op::Copy`]), or a tile that the
//! producer computed ([`Op::Fill`]): that is how roles hand values to each other.
//!
//! **Teams.** Where several blocks run one tile ([`Scheduled::team`]) they exchange tiles in phases, between which they meet: through one
//! another's shared memory, in a cluster, or through memory ([`Buffer::outside`]).
//!
//! **Invariants** ([`mod@verify`]): every wait has a commit and every acquire finds a release (no deadlock), roles own disjoint ranges of warps,
//! buffers that live at once do not overlap, and budgets (shared memory, registers, barriers, threads) hold.

pub mod interp;
mod memory;
mod ring;
pub mod text;
pub mod verify;
mod visit;
mod walk;

pub use text::{canonical, parse};
pub use verify::{Budget, verify};
pub use visit::{Definitions, operands, reads};

use crate::dtype::DType;
use crate::extent::GridDim;
use crate::tile::{self, Index, Param, Type, ValueId};

/// Number of a [`Buffer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// Number of a [`Channel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId(pub u32);

/// A kernel with its schedule applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scheduled {
    /// Name: a C identifier.
    pub name: String,
    /// Blocks along each axis.
    pub grid: Vec<GridDim>,
    /// A block goes on to further tiles of the grid: it runs the roles' bodies once a tile, and channels go on from one to the
    /// next. Tiles are taken down axis 0 in bands of this many, so that those which run together share operands. None: a tile a block.
    pub persistent: Option<u32>,
    /// The turns of a persistent kernel's blocks go back and forth over the tiles, and those begin at the end of the last axis: where tiles have
    /// the more work the further along they are, all blocks then have about as much, and the last turn has little.
    pub folded: bool,
    /// Blocks that run together, if they share copies. Such a kernel is persistent; where the grid ends within a cluster, the blocks
    /// beyond do the same with tiles that are outside of every view.
    pub cluster: Option<Cluster>,
    /// Blocks of the hardware that run one block of the grid together, each a share of it; 1 is usual. Without roles how they divide it is the
    /// lowering's affair: there is one place for every value, and a barrier is one for all of them. With roles each runs all of them, divides
    /// by its [`Op::Number`], and finds at an [`Op::Meet`] what the others have [`Op::Put`]. Blocks that share copies are then at once in one
    /// cluster and of different teams; where teams exchange through memory ([`Scheduled::apart`]) nobody else is in it.
    pub team: u32,
    /// Two halves of the threads take turns in loops with a channel of `common`: while one reads operands of products from shared memory the other
    /// multiplies. A barrier is one for all of them all the same.
    pub alternate: bool,
    /// Dies that the hardware deals blocks to in turn. Blocks along axes 0 and 1 are then numbered so that neighbours, first along axis 0, are on
    /// one die; 1 is as they come.
    pub dies: u32,
    /// Parameters, as of the tile program.
    pub params: Vec<Param>,
    /// Types of all values, by [`ValueId`].
    pub types: Vec<Type>,
    /// Where each value lies, by [`ValueId`]; views have [`Place::View`].
    pub places: Vec<Place>,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory.
    pub buffers: Vec<Buffer>,
    /// Rings.
    pub channels: Vec<Channel>,
    /// Run by every thread before the roles.
    pub common: Block,
    /// Disjoint ranges of warps and what they run; none if `common` is all.
    pub roles: Vec<Role>,
}

/// Most blocks of a cluster, and so of a team that is one.
pub const MOST_IN_CLUSTER: u32 = 16;
/// Most blocks of a team that exchanges through memory.
pub const MOST_APART: u32 = 64;

impl Scheduled {
    /// Whether the blocks of a team exchange through memory. They must all run at once.
    pub fn apart(&self) -> bool {
        self.buffers.iter().any(|b| b.outside)
    }

    /// The channels that a buffer is a slot of; none if it is none, two if these have it in common.
    pub fn channels_of(&self, b: BufferId) -> impl Iterator<Item = ChannelId> {
        let of = move |(i, c): (usize, &Channel)| c.slots.contains(&b).then_some(ChannelId(i as u32));
        self.channels.iter().enumerate().filter_map(of)
    }

    /// Whether blocks divide the rounds of tiles rather than tiles.
    pub fn parts(&self) -> bool {
        self.roles.iter().flat_map(|r| &r.body.insts).any(|i| matches!(i.op, Op::Part { .. }))
    }

    /// Parts of a role's warps that take stages in turns, as the channels say that it empties; 1 is usual.
    pub fn turns(&self, role: &Role) -> u32 {
        self.turns_of(&role.body)
    }

    fn turns_of(&self, block: &Block) -> u32 {
        let of = |i: &Inst| match i.op {
            Op::Wait(c) => self.channels.get(c.0 as usize).map_or(1, |c| c.turns),
            _ => i.op.blocks().into_iter().map(|b| self.turns_of(b)).max().unwrap_or(1),
        };
        block.insts.iter().map(of).max().unwrap_or(1).max(1)
    }
}

/// Blocks that run together and fill one another's shared memory: neighbours along an axis of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cluster {
    /// The axis: 0 or 1.
    pub axis: u32,
    /// How many.
    pub blocks: u32,
}

/// A range of warps with a body of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Such as `producer`.
    pub name: String,
    /// First warp and past-the-end.
    pub warps: [u32; 2],
    /// Registers of a thread, if they are redistributed between roles.
    pub registers: Option<u32>,
    /// Whether a single thread of the role runs the body (a copy engine's driver).
    pub elected: bool,
    /// What it runs.
    pub body: Block,
}

/// A ring of stages, each with a copy of every slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Name, for people.
    pub name: String,
    /// Depth of the ring.
    pub stages: u32,
    /// Equal parts of a consumer's warps that take its stages in turns, a round of the loop each; 1: all of them take every stage. Whatever is outside
    /// of such loops each part does by itself, and rounds know nothing of one another. Depth is a multiple of it.
    pub turns: u32,
    /// One buffer a slot; a buffer of a slot holds `stages` copies one after another.
    pub slots: Vec<BufferId>,
}

/// A range of shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Name, for people.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Rows and columns of one copy; a tile of another rank is flattened to its last axis.
    pub shape: [u32; 2],
    /// Bytes from row to row. A row that is longer goes on in the next panel: all rows' first `pitch` bytes, then all rows' next.
    pub pitch: u32,
    /// Bytes of the XOR swizzle: 16-byte chunk `c` of row `r` is stored at chunk `c ^ (r mod swizzle/16)` of its swizzle-wide span;
    /// 0 for none.
    pub swizzle: u32,
    /// Copies one after another: a channel's stages, else 1.
    pub copies: u32,
    /// First byte, from the start of the block's shared memory, or of what it has outside.
    pub offset: u32,
    /// Whether it lies in memory instead, where the blocks of a team can read one another's: what is put there needs no cluster.
    pub outside: bool,
}

impl Buffer {
    /// Panels side by side: 1 unless rows are longer than the pitch.
    pub fn panels(&self) -> u32 {
        let row = self.shape[1].saturating_mul(self.dtype.bytes() as u32);
        row.div_ceil(self.pitch.max(1)).max(1)
    }

    /// Bytes of one panel. Saturates, as [`Buffer::bytes`] does, where a text says more than 4 GiB.
    pub fn panel_bytes(&self) -> u32 {
        self.shape[0].saturating_mul(self.pitch)
    }

    /// Bytes of one copy. Saturates as well.
    pub fn copy_bytes(&self) -> u32 {
        self.panel_bytes().saturating_mul(self.panels())
    }

    /// Bytes of all copies.
    pub fn bytes(&self) -> u32 {
        self.copy_bytes().saturating_mul(self.copies)
    }
}

/// Where a value lies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A view: a parameter.
    View,
    /// The same in every thread, in a register.
    Uniform,
    /// Nowhere: computed where it is used, element by element.
    Lazy,
    /// In registers, on its way: what a load or gather brings, or a loop carries of it, until it is put down in shared memory. Each thread has what
    /// it needs for its part of the tile that reads it there, and nothing else reads it but where further such loads come from. Or what a product
    /// takes as its left operand: each thread has what its part of the instructions takes.
    Held,
    /// In shared memory, elements in row-major order over the buffer's rows.
    Shared(BufferId),
    /// A slot of the stage taken last.
    Slot(ChannelId, u32),
    /// Distributed over registers of the role's warps as a matrix product leaves it. A tile with one row or one column is what a product's
    /// is combined with: each thread has the elements of its own columns or rows.
    Fragment(Fragment),
}

/// How a two-dimensional f32 tile is spread over warps by the instruction that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fragment {
    /// The instruction.
    pub atom: Atom,
    /// Warps (warpgroups, for [`Atom::Wgmma`]) along rows and columns: each owns a contiguous block of `ceil(shape / warps)` rounded
    /// up to the atom.
    pub warps: [u32; 2],
}

/// A matrix-product instruction, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Atom {
    /// 16x8 results a warp of 32 threads: thread `t`, register `2h + e` holds row `t/4 + 8h`, column `2 (t mod 4) + e`.
    Mma16x8,
    /// 64xN results a warpgroup of four warps, each a stack of 16-row fragments as [`Atom::Mma16x8`] (`N` is the columns per warpgroup).
    Wgmma,
    /// The transpose of what [`Atom::Wgmma`] leaves: the operands change places, so that few rows are the instruction's `N`.
    WgmmaTransposed,
    /// 16x16 results of 64 threads: thread `t`, register `e` holds row `t mod 16`, column `4 (t / 16) + e`.
    Mfma16x16,
    /// 16x64 results of 64 threads: thread `t` holds row `t mod 16`, the 16 columns from `16 (t / 16)`.
    Mfma16x64,
    /// 16x128 results of 64 threads: thread `t` holds row `t mod 16`, the 32 columns from `32 (t / 16)`.
    Mfma16x128,
    /// What sums over equal groups of rows of an [`Atom::WgmmaTransposed`] tile leave: 1, 2 or 4 rows a warpgroup, 64 columns. The lanes of
    /// a quad, `q = t mod 4`, divide rows and column halves `c = 16 (t / 32) + (t mod 32) / 4 + 8h` between them: of 4 rows lane `q` has row
    /// `q`, both `h`; of 2 row `q mod 2`, `h = q / 2`; of 1 `h = q mod 2`, twice.
    WgmmaSums,
    /// No instruction: fused multiply-adds. Thread `t` of a warp holds a 4x4 patch at row `4 (t / 8)`, column `4 (t mod 8)` of each
    /// 16x32 tile.
    Fma,
}

/// Instructions in order, with arguments and yields as in [`tile::Region`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Values defined on entry.
    pub args: Vec<ValueId>,
    /// In order.
    pub insts: Vec<Inst>,
    /// Handed to the enclosing instruction.
    pub yields: Vec<ValueId>,
}

/// One instruction and the values it defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inst {
    /// Values defined.
    pub results: Vec<ValueId>,
    /// What it does.
    pub op: Op,
    /// Shared memory that it may use while it runs. A store splits it between groups of threads, each of which orders its own uses.
    pub scratch: Option<BufferId>,
}

/// What an instruction does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// An operation of the tile program, any but loops and branches.
    Tile(tile::Op),
    /// As [`tile::Op::For`].
    For {
        /// First value of the counter.
        lo: Index,
        /// Bound, exclusive.
        hi: Index,
        /// Positive.
        step: u32,
        /// Initial carried values.
        init: Vec<ValueId>,
        /// The loop's body.
        body: Block,
    },
    /// As [`tile::Op::If`].
    If {
        /// bool scalar, the same in every thread.
        cond: ValueId,
        /// When true.
        then: Block,
        /// When false.
        otherwise: Block,
    },
    /// All threads of the block (in `common`) or of the role wait for one another; shared memory written before is visible after.
    Barrier,
    /// Waits until the next stage is free.
    Acquire(ChannelId),
    /// Starts filling a slot of the acquired stage from memory: the tile at `index`, or rows chosen by number as of
    /// [`tile::Op::Gather`]; zero outside the view. Complete when the stage is full.
    Copy {
        /// The channel.
        channel: ChannelId,
        /// Which slot.
        slot: u32,
        /// The view.
        view: ValueId,
        /// i32 tile of rank 1: coordinates in dim 0, if rows are chosen; `index` is then of the other dims.
        rows: Option<ValueId>,
        /// Start along each dim.
        index: Vec<Index>,
        /// Shape of the tile.
        shape: Vec<u32>,
        /// Whether the blocks of the cluster share it: each brings an equal part of the rows to all of them. It is the same tile for each.
        shared: bool,
    },
    /// Writes a tile to a slot of the acquired stage, by the threads of the role. Complete when the stage is full.
    Fill {
        /// The channel.
        channel: ChannelId,
        /// Which slot.
        slot: u32,
        /// The tile.
        value: ValueId,
        /// Whether the blocks of the cluster share it: each computes an equal part of the rows and writes it to all of them. It is the same
        /// tile for each.
        shared: bool,
    },
    /// The acquired stage is full once its copies and fills are complete.
    Commit(ChannelId),
    /// Waits until the next stage is full.
    Wait(ChannelId),
    /// The tile in a slot of the stage waited for last.
    Take {
        /// The channel.
        channel: ChannelId,
        /// Which slot.
        slot: u32,
    },
    /// The stage waited for `lag` waits before the last one is free; there was such a wait, and every stage is released once and in order.
    /// `lag` keeps a stage while a product that reads it is in flight: a loop that releases late has its first round in front of it.
    Release {
        /// The channel.
        channel: ChannelId,
        /// Waits since.
        lag: u32,
    },
    /// This block's number in its team: an i32.
    Number,
    /// All threads of all blocks of the team wait for one another. Every role has as many, none in a loop, and one as its last instruction, so that the
    /// tile is in phases: buffers of different phases may share memory. No stage of any channel is full or being filled then. What was put before
    /// is released, what is got behind it acquired. Teams that are apart need not wait at the end of their last tile.
    Meet,
    /// Writes a tile to a buffer that no channel has, by the threads of the role: behind the next [`Op::Meet`] the team's blocks find it there. Either all
    /// such buffers of a kernel are [outside](Buffer::outside) or none.
    Put {
        /// The buffer.
        buffer: BufferId,
        /// The tile, as large as the buffer.
        value: ValueId,
    },
    /// What another block of the team has put into that buffer.
    Get {
        /// The buffer.
        buffer: BufferId,
        /// How many places behind this block the other is, round the team: 0 is this block.
        after: u32,
        /// Whether it is a piece: the result's shape divides the tile into pieces, numbered down its rows first, and this block's has its own number; where
        /// there are fewer, others get one of the last columns.
        own: bool,
    },
    /// Of the rounds `lo..hi` of this tile the first one that is this block's, or the end of those: an i32. Where a kernel has such, each block comes to
    /// all tiles, in order, and what it has of them is a range of the rounds of all tiles; all blocks' ranges are about equal. Every role has one of
    /// each kind in its body, of the same bounds.
    Part {
        /// i32: the first round.
        lo: ValueId,
        /// i32: the bound, exclusive; not above `lo` where there is no round.
        hi: ValueId,
        /// Whether it is the end.
        end: bool,
    },
}
