//! Schedules: how a target runs a tile program. Plain data; a choice in a schedule cannot change results.

mod rules;

pub use rules::Rule;

use crate::extent::Extent;
use serde::{Deserialize, Serialize};

/// Tile sizes and placement of one kernel. What a field does not say, the target decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Rows (tokens) a block takes.
    pub tile_m: u32,
    /// Columns (outputs, keys) a block takes.
    pub tile_n: u32,
    /// Contraction length of one inner step.
    pub tile_k: u32,
    /// Heads a block of attention takes at a time; 0: 64.
    #[serde(skip_serializing_if = "is_zero")]
    pub tile_h: u32,
    /// Threads of a block on targets that have such; 0: the target decides.
    #[serde(skip_serializing_if = "is_zero")]
    pub threads: u32,
    /// Whether a GPU kernel takes the symbols by value rather than the address of them: for callers that capture launches themselves.
    #[serde(skip_serializing_if = "is_false")]
    pub symbols_by_value: bool,
    /// Whether, where launches overlap, the next one may start only when this one has waited for those before it: then one is ahead at most, and
    /// its blocks keep no others from the multiprocessors that they want.
    #[serde(skip_serializing_if = "is_false")]
    pub late: bool,
    /// Whether a block begins with loads that need nothing of what it computes, and keeps them in registers until it does, on targets that say how many
    /// it has for that: where launches have few blocks, which then wait once.
    #[serde(skip_serializing_if = "is_false")]
    pub early: bool,
    /// Blocks that share what they bring, or run one block of the grid together, on targets whose blocks can; 0: the target decides.
    #[serde(skip_serializing_if = "is_zero")]
    pub cluster: u32,
    /// Blocks that run a block of the grid together, each a part of its loop over keys, on targets whose blocks can join what they have; 0 or 1: one. Of
    /// rows, blocks that independent results are divided among, at most.
    #[serde(skip_serializing_if = "is_zero")]
    pub split: u32,
    /// Whether these blocks join through memory rather than in a cluster: they must all run at once.
    #[serde(skip_serializing_if = "is_false")]
    pub apart: bool,
    /// Whether blocks divide the rounds of all tiles rather than the tiles, where each tile is one loop over what all its rounds share, on targets whose
    /// blocks go from tile to tile: each then has a range of neighbouring rounds, as long as the others', and fetches what is shared once for them.
    #[serde(skip_serializing_if = "is_false")]
    pub ranges: bool,
    /// Tiles of rows that a block takes one after the other, where it makes something that is the same for all; 0: one.
    #[serde(skip_serializing_if = "is_zero")]
    pub in_turn: u32,
    /// Blocks for which a processor shall have registers, where they share one; 0: the target decides.
    #[serde(skip_serializing_if = "is_zero")]
    pub sharing: u32,
    /// Rounds of a loop's operands that shared memory holds, on targets that copy to it without registers: one is multiplied while the
    /// next are on their way. 1: none ahead; 0: the target decides.
    #[serde(skip_serializing_if = "is_zero")]
    pub stages: u32,
    /// Whether rows chosen by number are within 2 GiB of their view's first element, whatever the step, so that 32 bits reach them.
    #[serde(skip_serializing_if = "is_false")]
    pub near: bool,
    /// Whether two halves of a block's waves take turns: one reads operands while the other multiplies. Needs `stages`.
    #[serde(skip_serializing_if = "is_false")]
    pub alternate: bool,
    /// Dies that the device deals blocks to in turn, each with a cache of its own: neighbours in the grid go to one of them. 0: as they come.
    #[serde(skip_serializing_if = "is_zero")]
    pub dies: u32,
    /// Blocks a worker takes at a time from the launch's queue; 0 lets the executor decide.
    pub blocks_per_task: u32,
}

/// What of a target's blocks can join what they have, so that those of a team divide a loop ([`Schedule::split`]): how many run at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Teams {
    /// Blocks, which can wait for one another through memory ([`Schedule::apart`]).
    pub blocks: u32,
    /// Clusters of two blocks, which can read one another's memory; 0: blocks are each by themselves.
    pub pairs: u32,
}

/// How attention is divided: into how many parts, and whether through memory.
pub type Split = (u32, bool);

impl Teams {
    /// Heads of a block where blocks have teams.
    pub const HEADS: u32 = 64;
    /// Most parts of a team; of fewer heads, those that there are pieces for.
    const MOST: [u32; 2] = [16, 8];
    /// The same of blocks by themselves, or where so many leave half of the blocks out: in pairs, with all of them, what they exchange takes
    /// longer than a round.
    const MOST_ALONE: u32 = 32;
    /// Tokens of fewer heads up to which more parts than that, which another launch joins, are faster.
    const FEW: u32 = 4;

    /// Into how many parts a team divides the selected keys, that many rounds of a loop, of attention of that many tokens; 1: not. As many as
    /// all run at once.
    pub fn split(&self, tokens: u32, heads: u32, rounds: u32) -> Split {
        let few = heads < Self::HEADS;
        if self.pairs == 0 || !few && !heads.is_multiple_of(Self::HEADS) {
            return (1, false);
        }
        let tiles = u64::from(tokens) * u64::from(heads.div_ceil(Self::HEADS));
        // Blocks of two tiles of heads share keys, and are in one cluster then.
        let alone = !(heads / Self::HEADS).is_multiple_of(2);
        if few && tokens <= Self::FEW {
            return (1, false);
        }
        // One part each leaves half of the blocks out, two in a cluster do not.
        if alone && tiles <= self.pairs.into() && 2 * tiles > self.pairs.into() {
            return (2, false);
        }
        let half = 2 * tiles * u64::from(Self::MOST_ALONE) <= self.blocks.into();
        let most = if !few && (alone || half) { Self::MOST_ALONE } else { Self::MOST[usize::from(few)] };
        let most = most.min(rounds.max(1));
        let parts = u32::try_from(u64::from(self.blocks) / tiles).unwrap_or(0).clamp(1, most);
        let parts = 1 << parts.ilog2();
        (parts, parts > 1)
    }
}

fn is_false(x: &bool) -> bool {
    !x
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// What a schedule is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelShape {
    /// The op, or the kind of fused body: `linear`, `head_linear`, `expert_linear`, `expert_linear_sorted`, `row`, `heads`, `gate`, `route`, `sparse_attention` (with
    /// indexer), `attention` (over a given selection), `attention_part` (in parts that another kernel joins), `mha_attention`, `indexer_logits`, or any other op's name.
    pub op: &'static str,
    /// Rows: tokens, or flat (token, expert) pairs.
    pub m: Extent,
    /// The most rows in this class.
    pub m_max: u64,
    /// Results a row: outputs of a product, latent or value elements of a head, elements of a row. Of `indexer_logits` tokens of a sequence, where all
    /// sequences of a cache have as many; else 1.
    pub n: u32,
    /// Contracted length; keys selected, for attention. Elements of an index key with such tokens.
    pub k: u32,
    /// Heads or experts; 1 where there are none. Heads of the indexer where it is part of the kernel.
    pub heads: u32,
    /// Products of the same rows that a block makes: 2 where SwiGLU is part of the kernel, else 1.
    pub products: u32,
}

impl Schedule {
    /// Tiles for targets that run all blocks of a launch at once and multiply by matrix units: as wide as steps of at most `tokens`
    /// tokens fill them, and enough blocks. What is split over contracted columns or keys was split before, as ops of the graph.
    pub fn wide(shape: &KernelShape, tokens: u32) -> Schedule {
        let outputs = shape.n.max(1);
        // A matrix unit's rows: all tokens of a small step in one tile, so that each weight is read once.
        let rows = |most: u32| tokens.next_multiple_of(16).clamp(16, most);
        let products = |tile_m: u32, tile_n: u32| Schedule {
            tile_m,
            tile_n: tile_n.min(outputs),
            tile_k: 128.min(shape.k.max(1)),
            ..Schedule::default()
        };
        match shape.op {
            "linear" | "expert_linear" | "expert_linear_sorted" if tokens <= 64 => products(rows(64), 64),
            // Large steps; experts share them, so their tiles stay half as tall.
            "linear" => products(rows(128), 128),
            "expert_linear" | "expert_linear_sorted" => products(64, 128),
            "head_linear" => products(rows(128), 128),
            // Rows of scores: tokens times heads of the indexer.
            "sparse_attention" | "indexer_logits" => {
                let most = (256 / shape.heads.max(1)).clamp(1, tokens.max(1));
                Schedule { tile_m: most, tile_n: 64, ..Schedule::default() }
            }
            // One token: fewer heads a block, each of which reads the keys anew, take less long to start and to end.
            "attention" | "attention_part" => {
                let most = if tokens == 1 { 16 } else { 64 };
                Schedule { tile_m: 1, tile_n: 64, tile_h: shape.heads.clamp(1, most), ..Schedule::default() }
            }
            "mha_attention" => Schedule { tile_m: 64, tile_n: 64, ..Schedule::default() },
            // One row: results that are independent, and columns of products, in blocks of their own.
            "heads" if tokens == 1 => Schedule { tile_m: rows(64), tile_n: 128, split: 8, ..Schedule::default() },
            "heads" => Schedule { tile_m: rows(64), ..Schedule::default() },
            // Experts of a block, and rows that it looks at at a time: 32 lines of 65.
            "route" => Schedule { tile_m: 2080, tile_n: 8, ..Schedule::default() },
            "row" if tokens <= 64 && shape.heads <= 1 => Schedule { tile_m: 1, split: 8, ..Schedule::default() },
            // All heads of a row, until a block has no room for them.
            "row" if shape.heads > 1 => Schedule { tile_m: 1, tile_h: shape.heads, ..Schedule::default() },
            _ => Schedule { tile_m: 1, ..Schedule::default() },
        }
    }

    /// Makes the largest tile the next smaller power of two: the contracted step first, then columns and heads, then rows. False if nothing is
    /// left to make smaller.
    pub fn shrink(&mut self) -> bool {
        let least = [(&mut self.tile_k, 64), (&mut self.tile_h, 8), (&mut self.tile_n, 16), (&mut self.tile_m, 1)];
        let largest = least.into_iter().filter(|(n, least)| **n > *least).max_by_key(|(n, _)| **n);
        let Some((tile, least)) = largest else { return false };
        *tile = (tile.next_power_of_two() / 2).max(least);
        true
    }

    /// A schedule that is never wrong: tiles by shape alone, for steps of at most `tokens` tokens. Targets start from it.
    pub fn heuristic(shape: &KernelShape, tokens: u32) -> Schedule {
        let rows = |most: u32| u64::from(most).min(shape.m_max.max(1)) as u32;
        // Few outputs: narrower tiles, so that all cores have some.
        let outputs = match shape.n {
            2048.. => 64,
            512.. => 32,
            _ => 16,
        };
        let products = |tile_m: u32| Schedule {
            tile_m,
            tile_n: outputs.min(shape.n.max(1)),
            tile_k: shape.k.clamp(1, 512),
            ..Schedule::default()
        };
        match shape.op {
            "linear" | "head_linear" => products(rows(if tokens <= 16 { 16 } else { 32 })),
            // An expert sees a token at most once.
            "expert_linear" | "expert_linear_sorted" => products(rows(tokens.clamp(1, 32))),
            "sparse_attention" | "indexer_logits" => {
                Schedule { tile_m: rows((256 / shape.heads.max(1)).clamp(1, 16)), tile_n: 64, ..Schedule::default() }
            }
            "attention" | "attention_part" => Schedule {
                tile_m: 1,
                tile_n: 64,
                tile_h: if tokens <= 16 { shape.heads.div_ceil(16).max(8) } else { 64 },
                ..Schedule::default()
            },
            "mha_attention" => Schedule { tile_m: rows(32), tile_n: 64, ..Schedule::default() },
            "embed" => Schedule { tile_m: rows(8), ..Schedule::default() },
            "route" => Schedule { tile_m: 64, ..Schedule::default() },
            _ => Schedule { tile_m: 1, ..Schedule::default() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_divide_keys_where_their_clusters_run_at_once() {
        let teams = Teams { blocks: 132, pairs: 66 };
        let split = |heads: u32| [1, 2, 4, 8, 16, 32, 64, 96, 128].map(|tokens| teams.split(tokens, heads, 32).0);
        assert_eq!(split(64), [32, 32, 32, 16, 8, 4, 2, 1, 1]);
        assert_eq!(split(128), [32, 16, 16, 8, 4, 2, 1, 1, 1]);
        assert_eq!(split(16), [1, 1, 1, 8, 8, 4, 2, 1, 1]);
        assert_eq!([4, 64].map(|tokens| teams.split(tokens, 64, 32).1), [true, false]);
        // A part has a round of its own at least.
        assert_eq!(teams.split(4, 128, 8), (8, true));
        assert_eq!(teams.split(4, 96, 32), (1, false));
        assert_eq!(Teams::default().split(4, 64, 32), (1, false));
    }

    #[test]
    fn tiles_shrink_to_powers_of_two() {
        let mut schedule = Schedule { tile_m: 192, tile_n: 128, tile_k: 100, tile_h: 16, ..Schedule::default() };
        let mut seen = Vec::new();
        while schedule.shrink() {
            seen.push([schedule.tile_m, schedule.tile_n, schedule.tile_k, schedule.tile_h]);
        }
        assert_eq!(seen[0], [128, 128, 100, 16]);
        assert!(seen.contains(&[64, 64, 64, 16]));
        assert_eq!(seen.last(), Some(&[1, 16, 64, 8]));
    }
}
