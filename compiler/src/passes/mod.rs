//! Graph passes: from the front end's canonical graph to one node a kernel launch.
//!
//! Every pass is one file with one free function `name(graph, cx) -> usize` (how many rewrites it made); the file opens with
//! what it does, the IR before and after, why that is legal and what it buys. [`run`] is the whole pipeline, top to bottom.
//!
//! **Invariants.** A pass never changes what a graph output means (its rounding, at most, and then its file says so). After every
//! pass the graph verifies. Passes know the class of steps they compile for and two facts about the target ([`Cx`]): they never
//! name a target. Fused bodies are made by `outline` only, and only of sets that it found convex. Passes cut nodes off rather than
//! remove them: ids are not used again within a pass, so what is done to each of many equal layers comes out equal.

mod absorb_mla;
mod compact_tables;
mod expand_cache;
mod expand_fp8;
mod fuse_beside;
mod fuse_gate;
mod fuse_heads;
mod fuse_products;
mod fuse_rows;
mod fuse_sparse_attention;
mod group_experts;
mod match_operands;
mod merge_projections;
mod merge_shared_expert;
mod narrow_weights;
mod outline;
mod share_repeats;
mod skip_short_selection;
mod sort_experts;
mod split_products;
#[cfg(test)]
mod tests;

pub use absorb_mla::absorb_mla;
pub use compact_tables::compact_tables;
pub use expand_cache::expand_cache;
pub use expand_fp8::expand_fp8;
pub use fuse_beside::fuse_beside;
pub use fuse_gate::fuse_gate;
pub use fuse_heads::fuse_heads;
pub use fuse_products::fuse_products;
pub use fuse_rows::fuse_rows;
pub use fuse_sparse_attention::fuse_sparse_attention;
pub use group_experts::group_experts;
pub use match_operands::match_operands;
pub use merge_projections::merge_projections;
pub use merge_shared_expert::merge_shared_expert;
pub use narrow_weights::narrow_weights;
pub use share_repeats::share_repeats;
pub use skip_short_selection::skip_short_selection;
pub use sort_experts::sort_experts;
pub use split_products::split_products;

use dsc_ir::artifact::{Numerics, Pieces};
use dsc_ir::graph::verify::verify;
use dsc_ir::graph::{Graph, Op};
use dsc_ir::schedule::Teams;
use dsc_ir::{Sym, SymValues};
use std::time::{Duration, Instant};

/// The steps one compiled step graph serves: the passes choose forms by it, the kernels choose tiles.
///
/// The kernel library sees the same class (`kernels` re-uses this type rather than having its own).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Such as `decode` or `prefill`; unique in an artifact.
    pub name: String,
    /// It serves every step whose symbols are all at most these.
    pub max: SymValues,
    /// Keep attention in its MHA form: keys and values of the whole context are expanded once. Meant for a short prefill of one
    /// sequence (`S == 1`) whose context is at most `index_topk`, so that everything is selected.
    pub keep_mha: bool,
    /// Write the indexer's scores to memory however many tokens there are, and select from there: in such pieces of the tokens, so that they fit.
    pub pieces: Option<Pieces>,
}

/// What passes know besides the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cx {
    /// The steps compiled for.
    pub class: Class,
    /// Whether the target multiplies e4m3 tiles; otherwise quantised operands are dequantised first.
    pub target_fp8: bool,
    /// Whether every matrix of the checkpoint is exactly bf16 (false if the weights are not known).
    pub bf16_weights: bool,
    /// Blocks that a launch needs to fill the target, where it runs all of them at once; 0 where a few workers take them one
    /// after another. If not 0, work is split over more and smaller launches rather than done by few blocks.
    pub blocks: u32,
    /// Bytes of operands that a block can keep beside what else it needs; no bound where `blocks` is 0.
    pub block_bytes: u32,
    /// Which blocks can join parts of a loop by themselves.
    pub teams: Teams,
    /// Whether the target's copies bring boxes of rows that lie together faster than rows chosen by number.
    pub boxes: bool,
    /// Whether blocks of one launch run different products as fast as blocks of two launches do.
    pub beside: bool,
    /// Numerics of the artifact.
    pub numerics: Numerics,
    /// Keys the indexer selects.
    pub index_topk: u32,
}

impl Cx {
    /// Whether steps have so few tokens that blocks of tokens alone do not fill the target: work splits over keys, contracted
    /// columns and pages too.
    fn few_tokens(&self) -> bool {
        self.class.max.get(Sym::T) < self.blocks
    }
}

/// A pass left a graph that the verifier rejects: a defect of that pass (of the front end, if `pass` is `input`).
#[derive(Debug, thiserror::Error)]
#[error("the graph is not valid after {pass}:{}", .diagnostics.iter().map(|d| format!("\n  {d}")).collect::<String>())]
pub struct PassError {
    /// The pass, or `input`.
    pub pass: &'static str,
    /// What the verifier reported.
    pub diagnostics: Vec<String>,
}

/// Every pass by name, in the order [`run`] runs them.
pub const PASSES: &[&str] = &[
    "share_repeats",
    "absorb_mla",
    "expand_fp8",
    "match_operands",
    "narrow_weights",
    "merge_shared_expert",
    "merge_projections",
    "split_products",
    "expand_cache",
    "fuse_sparse_attention",
    "skip_short_selection",
    "group_experts",
    "sort_experts",
    "fuse_gate",
    "fuse_products",
    "fuse_heads",
    "fuse_rows",
    "fuse_beside",
    "compact_tables",
];

/// The pipeline. `observer` sees the graph after each pass and how long the pass took, verification excluded.
///
/// # Errors
/// [`PassError`] at the first pass after which the graph does not verify.
pub fn run(
    graph: &mut Graph,
    cx: &Cx,
    observer: &mut dyn FnMut(&'static str, &Graph, Duration),
) -> Result<(), PassError> {
    check("input", graph)?;
    let mut stage = |name, pass: fn(&mut Graph, &Cx) -> usize| {
        let start = Instant::now();
        pass(graph, cx);
        graph.remove_dead();
        graph.close_gaps();
        observer(name, graph, start.elapsed());
        check(name, graph)
    };

    // Forms: what is computed.
    stage("share_repeats", share_repeats)?;
    stage("absorb_mla", absorb_mla)?;
    stage("expand_fp8", expand_fp8)?;
    stage("match_operands", match_operands)?;
    stage("narrow_weights", narrow_weights)?;
    stage("merge_shared_expert", merge_shared_expert)?;
    stage("merge_projections", merge_projections)?;
    stage("split_products", split_products)?;
    stage("expand_cache", expand_cache)?;

    // Kernels: what is launched together.
    stage("fuse_sparse_attention", fuse_sparse_attention)?;
    stage("skip_short_selection", skip_short_selection)?;
    stage("group_experts", group_experts)?;
    stage("sort_experts", sort_experts)?;
    stage("fuse_gate", fuse_gate)?;
    stage("fuse_products", fuse_products)?;
    stage("fuse_heads", fuse_heads)?;
    stage("fuse_rows", fuse_rows)?;
    stage("fuse_beside", fuse_beside)?;

    // Tables: what the artifact lists.
    stage("compact_tables", compact_tables)
}

fn check(pass: &'static str, graph: &Graph) -> Result<(), PassError> {
    let diagnostics: Vec<String> = verify(graph).iter().map(ToString::to_string).collect();
    if diagnostics.is_empty() { Ok(()) } else { Err(PassError { pass, diagnostics }) }
}

/// Whether running the node launches a kernel: data that is already there and views of it launch nothing.
pub fn is_launch(op: &Op) -> bool {
    !is_source(op) && !is_view(op)
}

/// Kernel launches of one step.
pub fn launches(graph: &Graph) -> usize {
    graph.dag.node_indices().filter(|&n| is_launch(&graph.dag[n].op)).count()
}

/// Ops without inputs: what a step finds in memory.
fn is_source(op: &Op) -> bool {
    matches!(op, Op::Input(_) | Op::Weight(_) | Op::State(_) | Op::Arg(_))
}

/// Ops that only rename elements: kernels read through them.
fn is_view(op: &Op) -> bool {
    matches!(op, Op::SliceLast { .. } | Op::Reshape)
}
