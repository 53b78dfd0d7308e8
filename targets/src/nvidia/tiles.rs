//! Tiles of matrix products, of scores and of selections on Hopper, by shape: the one place where they are chosen.
//!
//! What was measured on an H200 (`docs/nvidia.md`) says:
//!
//! * Up to `FEW` rows each weight is read once, and 64 outputs a block are enough: the operands change places.
//! * Above, a launch takes as many turns as its tiles need of all multiprocessors, and a turn as long as what a block reads: the sum of a tile's
//!   sides. So of the tiles that the multiplier likes, that with the least product of the two is taken: with few outputs the
//!   narrow ones, so that there is one for every multiprocessor, with many rows the largest.
//! * With many rows the multiplier decides. Three warpgroups keep it the busiest, and tiles of 192 rows take 9 % less time a row than those of
//!   128; tiles of 256 rows, made in halves, 4 % less. Which wastes the least of its last turn counts more. A kernel with two products has
//!   no registers for them.
//! * Experts share the rows, and each has its own weights: a tile holds the rows that an expert has on average, and room for the scatter
//!   of small numbers, so that most experts' weights are read once.
//! * Blocks that share copies ([`Schedule::cluster`]) save the cache requests and lose by waiting for one another: 1 to 8 % slower in all.
//! * The more tokens there are, the more keys a block can score with the queries that it has fetched and still leave blocks enough.
//! * A row is selected from by so many blocks together that those of few rows fill the device.

use dsc_ir::schedule::{KernelShape, Rule, Schedule};
use std::sync::LazyLock;

/// Rows up to which the operands of a product change places.
const FEW: u32 = 32;
/// Rows of tiles.
const ROWS: [u32; 2] = [128, 64];
/// Rows of tiles that only the Hopper path makes, with how long such a tile takes a row, beside one of 128 rows at [`WEIGHT`].
const TALL: [(u32, u64); 2] = [(192, 64), (256, 67)];
const WEIGHT: u64 = 70;
/// Rows that an expert has at most, mostly, from which on tall tiles of rows that lie together are the fastest.
const SORTED: u32 = 200;
/// Rows from which on a routing is long work.
const ROUTED: u64 = 8192;
/// Tokens of steps of which launches take as long as what a block waits for.
const WAITING: u32 = 64;
/// Elements of a row from which on its arithmetic takes longer than what it waits for.
const LONG_ROW: u32 = 4096;
/// Threads of blocks of shorter rows of many tokens, and of experts' scores.
const WARP: u32 = 32;
/// Blocks of longer rows that share a multiprocessor.
const LONG_ROWS: u32 = 6;
/// Threads of blocks that route many rows.
const ROUTE_THREADS: u32 = 512;
/// Blocks that share a multiprocessor where each makes a matrix for its rows, and rows that it takes in turn at most.
const RESIDENT: u32 = 3;
const MOST_IN_TURN: u32 = 16;
/// Columns of tiles.
const COLUMNS: [u32; 4] = [128, 64, 32, 16];

/// Rows of scores of a block: tokens times heads of the indexer.
const SCORED: u32 = 512;
/// Most tokens of a block that scores.
const TOKENS: u32 = 8;
/// Tokens from which on scores of two tokens a sequence are made by blocks that divide all rounds: of fewer, finding a block's range takes longer than it saves.
const RANGES: u32 = 32;
/// Most blocks that select from a row together.
const TEAM: u32 = 8;

/// What `dsc tune` found to be faster than what [`choose`] says, on an H200.
pub fn measured() -> &'static [Rule] {
    static RULES: LazyLock<Vec<Rule>> =
        LazyLock::new(|| Rule::parse(include_str!("schedules.json")).expect("a test reads it"));
    &RULES
}

/// The schedule of such a kernel in steps of at most `tokens` tokens, on a device of `sms` multiprocessors; none for other kernels.
pub fn choose(shape: &KernelShape, tokens: u32, sms: u32) -> Option<Schedule> {
    let products = |[tile_m, tile_n]: [u32; 2]| Schedule {
        tile_m,
        tile_n: tile_n.min(shape.n.max(1)),
        tile_k: 128.min(shape.k.max(1)),
        ..Schedule::default()
    };
    let few = |rows: u32| [rows.next_multiple_of(16).max(16), 64];
    match shape.op {
        "linear" if tokens <= FEW => Some(products(few(tokens))),
        "linear" => Some(products(balanced(shape, sms))),
        // Experts of a block: as few as there are multiprocessors for, as all rows are looked at for each; they make 128 lines of 35.
        "route" if shape.m_max >= ROUTED => {
            Some(Schedule { tile_m: 4608, tile_n: 2, threads: ROUTE_THREADS, ..Schedule::default() })
        }
        // All heads of a row; a block multiplies by the matrix of a Hadamard transform.
        "row" if shape.heads > 1 => {
            // Rows enough for blocks that all run at once make that matrix once for those that they take in turn.
            let in_turn = if tokens > ROWS[0] { tokens.div_ceil((sms * RESIDENT).max(1)).min(MOST_IN_TURN) } else { 0 };
            let sharing = if in_turn > 1 { RESIDENT } else { 0 };
            Some(Schedule { tile_m: 1, tile_h: shape.heads, tile_k: 16, in_turn, sharing, ..Schedule::default() })
        }
        // A warp waits for no other; of long rows, what all threads of several blocks have on their way counts.
        "row" | "gate" if tokens > WAITING && shape.n < LONG_ROW => {
            Some(Schedule { tile_m: 1, threads: WARP, ..Schedule::default() })
        }
        "row" if tokens > WAITING => Some(Schedule { tile_m: 1, sharing: LONG_ROWS, ..Schedule::default() }),
        // One token's parts of attention are joined and multiplied in one round, by threads enough to have all of its bytes on their way.
        "head_linear" if tokens == 1 => {
            let threads = if shape.k >= 512 { 512 } else { 0 };
            Some(Schedule { tile_k: 512.min(shape.k.max(1)), threads, ..products([16, COLUMNS[0]]) })
        }
        // What is contracted is short: the wider a tile, the less is read for what it writes.
        "head_linear" if tokens > ROWS[0] => {
            Some(Schedule { tile_k: 64.min(shape.k.max(1)), ..products([ROWS[0], 2 * COLUMNS[0]]) })
        }
        "expert_linear" | "expert_linear_sorted" => {
            // Each row is an expert's with the same chance: few have more than twice the average and a handful.
            let average = (shape.m_max / u64::from(shape.heads.max(1))) as u32;
            Some(products(match (2 * average + 8).min(tokens) {
                // A token has a row of an expert at most; of fewer rows than experts hardly one has more than eight but the shared one.
                _ if tokens <= 8 || average == 0 => [8, 64],
                most if most <= 16 => few(16),
                most if most <= 40 => few(32),
                // From 47 rows on, some have more than 64, and their weights are read twice.
                most if most <= 100 => [64, 128],
                // A warpgroup without rows leaves the multiplier to the others, so that a tile that holds nearly every expert's rows costs
                // little more than they do. Gathered rows leave no registers for three warpgroups, nor does a second product.
                most if most >= SORTED && shape.op == "expert_linear_sorted" && shape.products == 1 => {
                    [TALL[0].0, COLUMNS[0]]
                }
                _ => [ROWS[0], COLUMNS[0]],
            }))
        }
        "sparse_attention" => {
            Some(Schedule { tile_m: scored(shape, tokens), tile_n: 64, cluster: 1, ..Schedule::default() })
        }
        "indexer_logits" => {
            let pages = match tokens {
                0..=1 => 1,
                2..=8 => 2,
                9..=24 => 4,
                25..=128 => 8,
                // Many sequences, perhaps with several tokens each; of more tokens a block takes several.
                129..=2048 => 16,
                _ => 64,
            };
            // Two tokens a sequence have more than a page to wait for: queries, which all pages of a row share.
            let ranges = shape.n == 2 && shape.k == 128 && tokens >= RANGES;
            Some(Schedule { tile_m: scored(shape, tokens), tile_n: 64 * pages, ranges, ..Schedule::default() })
        }
        "top_k" => {
            // Large clusters leave some multiprocessors out, and what their blocks read of each other takes its time.
            let cluster = match tokens {
                _ if tokens * 2 * TEAM <= sms => TEAM,
                _ if tokens * TEAM <= sms => 4,
                _ if tokens * 2 <= sms => 2,
                _ => 1,
            };
            // More rows than multiprocessors hide in turns what one waits for.
            let sharing = if tokens > sms { 2 } else { 1 };
            Some(Schedule { tile_m: 1, cluster, sharing, ..Schedule::default() })
        }
        _ => None,
    }
}

/// Of few tokens: a block begins with what it will wait for, or has more threads where it computes longer.
pub fn hasten(schedule: &mut Schedule, shape: &KernelShape, tokens: u32) {
    match shape.op {
        _ if tokens > WAITING => {}
        "row" if shape.n >= LONG_ROW => schedule.threads = 512,
        "row" | "heads" | "head_linear" => schedule.early = true,
        _ => {}
    }
}

/// Tokens of a block that scores keys, a power of two.
fn scored(shape: &KernelShape, tokens: u32) -> u32 {
    1 << (SCORED / shape.heads.max(1)).clamp(1, tokens.clamp(1, TOKENS)).ilog2()
}

/// The tile whose turns take the least together; of equals the largest.
fn balanced(shape: &KernelShape, sms: u32) -> [u32; 2] {
    let cost = |&tile: &[u32; 2]| tiles(shape, tile).div_ceil(sms.max(1).into()) * u64::from(tile[0] + tile[1]);
    let all = ROWS.into_iter().flat_map(|rows| COLUMNS.map(|columns| [rows, columns]));
    let best = all.min_by_key(cost).unwrap_or([ROWS[0], COLUMNS[0]]);
    if best != [ROWS[0], COLUMNS[0]] || shape.products > 1 {
        return best;
    }
    let time = |&(rows, weight): &(u32, u64)| {
        tiles(shape, [rows, COLUMNS[0]]).div_ceil(sms.max(1).into()) * u64::from(rows) * weight
    };
    let all = TALL.into_iter().rev().chain([(ROWS[0], WEIGHT)]);
    all.min_by_key(time).map_or(best, |(rows, _)| [rows, COLUMNS[0]])
}

/// Whether only the Hopper path makes tiles of so many rows.
pub fn is_tall(rows: u32) -> bool {
    TALL.iter().any(|t| t.0 == rows)
}

/// Tiles of that size that the results make.
fn tiles(shape: &KernelShape, [rows, columns]: [u32; 2]) -> u64 {
    shape.m_max.div_ceil(rows.into()) * u64::from(shape.n.div_ceil(columns) * shape.heads.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsc_ir::{Extent, Sym};

    fn chosen(op: &'static str, tokens: u32, (n, k, heads): (u32, u32, u32), products: u32) -> Schedule {
        let each = if op.starts_with("expert_linear") { 8 } else { 1 };
        let m = Extent::from(Sym::T).times(each);
        let shape = KernelShape { op, m, m_max: u64::from(tokens * each), n, k, heads, products };
        choose(&shape, tokens, 132).expect("a product")
    }

    fn tile(op: &'static str, tokens: u32, sizes: (u32, u32, u32)) -> [u32; 2] {
        let chosen = chosen(op, tokens, sizes, 1);
        [chosen.tile_m, chosen.tile_n]
    }

    #[test]
    fn two_products_have_the_tiles_of_one() {
        let linear = |tokens, n, products| {
            let chosen = chosen("linear", tokens, (n, 7168, 1), products);
            (chosen.tile_m, chosen.tile_n)
        };
        assert_eq!(linear(4096, 36864, 2), (128, 128));
        let experts = chosen("expert_linear", 4096, (4096, 7168, 257), 2);
        assert_eq!((experts.tile_m, experts.tile_n), (128, 128));
    }

    #[test]
    fn tiles_fill_the_multiprocessors() {
        let linear = |tokens, n, k| tile("linear", tokens, (n, k, 1));
        assert_eq!(linear(1, 2112, 7168), [16, 64]);
        assert_eq!(linear(20, 4096, 7168), [32, 64]);
        assert_eq!(linear(64, 2112, 7168), [64, 16]);
        assert_eq!(linear(64, 4096, 7168), [64, 32]);
        assert_eq!(linear(64, 7168, 2048), [64, 64]);
        assert_eq!(linear(128, 2112, 7168), [64, 32]);
        assert_eq!(linear(128, 4096, 7168), [64, 64]);
        assert_eq!(linear(128, 7168, 16384), [128, 64]);
        assert_eq!(linear(4096, 2112, 7168), [192, 128]);
        assert_eq!(linear(4096, 4096, 7168), [256, 128]);
        assert_eq!(linear(4096, 24576, 1536), [192, 128]);
        assert_eq!(linear(4096, 7168, 2048), [256, 128]);
        assert_eq!(linear(4096, 7168, 16384), [256, 128]);
    }

    #[test]
    fn experts_have_room_for_more_rows_than_the_average() {
        let experts = |tokens| tile("expert_linear", tokens, (4096, 7168, 256));
        assert_eq!([1, 16, 28].map(experts), [[8, 64]; 3]);
        assert_eq!(experts(32), [16, 64]);
        assert_eq!(experts(64), [16, 64]);
        assert_eq!(experts(512), [32, 64]);
        assert_eq!(experts(1024), [64, 128]);
        assert_eq!(experts(4096), [128, 128]);
        let sorted = |tokens| tile("expert_linear_sorted", tokens, (7168, 2048, 256));
        assert_eq!([1024, 2048, 4096].map(sorted), [[64, 128], [128, 128], [192, 128]]);
    }

    #[test]
    fn scores_of_two_tokens_of_many_sequences_are_made_in_ranges() {
        let ranges = |n, tokens| {
            let m = Extent::from(Sym::T);
            let shape = KernelShape { op: "indexer_logits", m, m_max: tokens, n, k: 128, heads: 64, products: 1 };
            choose(&shape, tokens as u32, 132).expect("scores").ranges
        };
        assert_eq!([16, 32, 2048].map(|tokens| ranges(2, tokens)), [false, true, true]);
        assert!(!ranges(1, 2048) && !ranges(4, 2048));
    }

    #[test]
    fn few_rows_are_selected_from_by_many_blocks() {
        let shape = KernelShape { op: "top_k", m: Extent::from(Sym::T), m_max: 1, n: 1, k: 1, heads: 1, products: 1 };
        let cluster = |tokens| choose(&shape, tokens, 132).expect("a selection").cluster;
        assert_eq!([1, 8, 16, 32, 64, 128, 16384].map(cluster), [8, 8, 4, 2, 2, 1, 1]);
    }

    #[test]
    fn measured_rules_change_what_is_chosen() {
        for rule in measured() {
            let (Some([tokens, _]), Some(n), Some(k)) = (rule.tokens, rule.n, rule.k) else {
                panic!("{rule:?} says not of what size")
            };
            let shape = KernelShape {
                op: "linear",
                m: Extent::from(Sym::T),
                m_max: tokens.into(),
                n,
                k,
                heads: 1,
                products: 1,
            };
            let own = choose(&shape, tokens, 132).expect("a product");
            assert_ne!(Rule::applied(measured(), own.clone(), &shape, tokens, ""), own, "{rule:?}");
        }
    }

    #[test]
    fn rows_of_many_tokens_have_few_threads_where_they_are_short() {
        let row = |op, tokens: u32, n, heads| {
            let shape = KernelShape { op, m: Extent::from(Sym::T), m_max: tokens.into(), n, k: 1, heads, products: 1 };
            choose(&shape, tokens, 132)
        };
        let threads = |op, tokens, n| row(op, tokens, n, 1).map(|s| s.threads);
        assert_eq!([threads("row", 4096, 512), threads("gate", 4096, 8)], [Some(32); 2]);
        assert_eq!([threads("row", 64, 512), threads("row", 64, 7168), threads("gate", 64, 8)], [None; 3]);
        let long = row("row", 4096, 7168, 1).map(|s| (s.threads, s.sharing));
        assert_eq!(long, Some((0, 6)));
        // Blocks that all run at once share a matrix each.
        let turns = |tokens| row("row", tokens, 64, 128).map(|s| (s.in_turn, s.sharing));
        assert_eq!([turns(4096), turns(512), turns(64)], [Some((11, 3)), Some((2, 3)), Some((0, 0))]);
    }

    #[test]
    fn other_kernels_are_not_its_affair() {
        let shape = KernelShape { op: "row", m: Extent::from(1), m_max: 1, n: 1, k: 1, heads: 1, products: 1 };
        assert_eq!(choose(&shape, 1, 132), None);
    }
}
