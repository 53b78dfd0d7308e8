//! Which warps do what with a contraction, and how much shared memory the ring gets.

use super::contraction::{Contraction, STEP_BYTES};
use crate::nvidia::arch::Arch;
use dsc_ir::DType;

/// Threads of a warpgroup.
pub const WARPGROUP: u32 = 128;
/// Rows that one product instruction of a warpgroup makes.
pub const ROWS: u32 = 64;
/// Columns it makes at most.
const MOST_COLUMNS: u32 = 256;
/// Registers of a thread that accumulators and products in flight may take.
const MOST_REGISTERS: u32 = 192;
/// The same of three consumer warpgroups.
const MOST_REGISTERS_OF_THREE: u32 = 128;
/// Registers of accumulators up to which products are so short that more of them have to be in flight.
const FEW_REGISTERS: u32 = 16;
/// Rows of a tile from which its columns, not its rows, are the instruction's columns.
const STRAIGHT_FROM: u32 = 64;
/// Registers of accumulators from which they are scarce, and products long enough to hide four rounds' loads.
pub const MANY_REGISTERS: u32 = 64;
/// Rounds whose loads lanes share out.
const QUAD: u32 = 4;
/// Deepest ring.
const MOST_STAGES: u32 = 16;
/// Bytes of an 8-row group of the 128-byte swizzle, to which operands are aligned.
const ALIGN: u32 = 1024;

/// The shape of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Whether the operands change places.
    pub transposed: bool,
    /// Warpgroups along rows and columns of the tile.
    pub groups: [u32; 2],
    /// Products of which partial sums are in flight at a time.
    pub partials: u32,
    /// Rounds between loading what a round's sums are scaled by and using it: memory answers meanwhile. What rounds of a turn of the loop
    /// are is a multiple, so that registers need not change hands.
    pub loads_ahead: u32,
    /// Stages of the ring.
    pub stages: u32,
    /// Bytes of a stage's left operand, and of each right one.
    pub slot_bytes: [u32; 2],
    /// Bytes of staging for a result, over all warpgroups.
    pub staging_bytes: u32,
    /// How many results can be staged at a time.
    pub staged: u32,
    /// Warps that have a part of each row, and so of its maximum; 0 without maxima, 1 if each row is in one warp.
    pub row_parts: u32,
}

/// What a program does with the product, as far as that takes shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epilogue {
    /// 16-bit results go to memory through shared memory.
    pub staged: bool,
    /// Stores of a tile.
    pub stores: u32,
    /// Maxima of rows are taken.
    pub reduced: bool,
}

/// Bytes of the buffer in which warps exchange their parts of `rows` maxima.
pub fn part_bytes(parts: u32, rows: u32) -> u32 {
    if parts > 1 { parts * rows.next_multiple_of(8) * DType::F32.bytes() as u32 } else { 0 }
}

impl Config {
    /// How to run `rows` x `columns` results of that contraction, if the hardware can.
    pub fn of(c: &Contraction<'_>, epilogue: Epilogue, arch: &Arch) -> Option<Config> {
        let [rows, columns] = c.shape();
        let transposed = rows < STRAIGHT_FROM;
        let (long, short) = if transposed { (columns, rows) } else { (rows, columns) };
        let groups = match (long / ROWS, short) {
            _ if !long.is_multiple_of(ROWS) => return None,
            (n, _) if n.is_multiple_of(2) => [2, 1],
            (3, _) if !transposed => [3, 1],
            (1, n) if !transposed && n.is_multiple_of(2 * ROWS) => [1, 2],
            _ => [1, 1],
        };
        let wide = short / groups[1];
        let padded = wide.next_multiple_of(8);
        if padded > MOST_COLUMNS || (!transposed && padded != wide) {
            return None;
        }
        let product = long / groups[0] / ROWS * padded / 2;
        let accumulators = product * c.dots.len() as u32;
        let most = if groups[0] * groups[1] > 2 { MOST_REGISTERS_OF_THREE } else { MOST_REGISTERS };
        let partials = match () {
            () if c.direct => 0,
            // Results of eight rows leave registers for two rounds of two products; of more, two blocks of a multiprocessor have them for one.
            () if product <= FEW_REGISTERS / 4 && c.rounds.is_some_and(|n| n > 3) => 4,
            () if accumulators <= FEW_REGISTERS && c.rounds.is_some_and(|n| n > 3) => 4 / c.dots.len() as u32,
            () if accumulators + 2 * product <= most && c.rounds.is_some_and(|n| n > 1) => 2,
            () => 1,
        };
        if accumulators + product * partials > most {
            return None;
        }
        let warpgroups = groups[0] * groups[1];
        let panels = if transposed { 1 } else { (wide * 2).div_ceil(STEP_BYTES).min(2) };
        let staging_rows = if transposed { padded.next_multiple_of(16) } else { ROWS };
        let staging_bytes = if epilogue.staged { warpgroups * staging_rows * panels * STEP_BYTES } else { 0 };
        let row_parts = match () {
            () if !epilogue.reduced => 0,
            () if transposed => groups[0] * WARPGROUP / Arch::WARP,
            () => groups[1],
        };
        let slot_bytes = [rows, columns].map(|r| r.next_multiple_of(8) * STEP_BYTES);
        let stage = slot_bytes[0] * c.lefts.len() as u32 + slot_bytes[1] * c.rights.len() as u32;
        // Small tiles wait for memory, not for the multiplier: two blocks a multiprocessor overlap one's end with the other's start.
        let limit = if transposed { arch.shared_per_sm / 2 - Arch::SHARED_RESERVED } else { arch.shared_per_block };
        // The lower half of the rows does not wait for the upper one to be stored; every tile begins with the same buffer.
        let halves = c.lefts.len() as u32;
        let staged = match staging_bytes {
            0 => 0,
            _ if epilogue.stores.is_multiple_of(halves) => halves,
            _ => 1,
        };
        let beside = staged * staging_bytes + part_bytes(row_parts, rows);
        let stages = ((limit - beside.next_multiple_of(ALIGN) - ALIGN) / (stage + 16)).min(MOST_STAGES);
        let parts = c.step / c.stage_k();
        let partials = partials.min(stages / parts).max(partials.min(1));
        let rounds_held = partials.div_ceil(c.dots.len() as u32) + u32::from(partials > 1 && c.dots.len() > 1);
        let held = (rounds_held * parts).max(2);
        let depth = stages >= held;
        depth.then_some(Config {
            transposed,
            groups: if transposed { [groups[1], groups[0]] } else { groups },
            partials,
            // Where a product is short, memory takes longer; where operands change places there are many factors to keep.
            loads_ahead: match () {
                () if accumulators <= FEW_REGISTERS && !transposed => 2 * partials,
                () if !transposed
                    && accumulators >= MANY_REGISTERS
                    && (c.dots.len() == 1 || partials == 1)
                    && c.rounds.is_some_and(|n| n >= QUAD) =>
                {
                    QUAD
                }
                () => 2,
            },
            stages,
            slot_bytes,
            staging_bytes,
            staged,
            row_parts,
        })
    }

    /// Warpgroups that multiply.
    pub fn warpgroups(&self) -> u32 {
        self.groups[0] * self.groups[1]
    }
}
