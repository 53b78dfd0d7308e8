//! Tests of the passes: their effect on a small model, and that they keep what it computes.

mod meaning;
mod mini;
mod real;
mod shape;

use super::{Class, Cx};
use dsc_ir::artifact::Numerics;
use dsc_ir::{Sym, SymValues};

const BOTH: [Numerics; 2] = [Numerics::Exact, Numerics::Deployed];

fn cx(numerics: Numerics, target_fp8: bool, keep_mha: bool) -> Cx {
    let class = Class { name: "test".into(), max: SymValues([8; 6]), keep_mha, pieces: None };
    let index_topk = mini::TOP_K;
    Cx {
        class,
        target_fp8,
        bf16_weights: false,
        blocks: 0,
        block_bytes: 0,
        teams: Default::default(),
        boxes: false,
        beside: false,
        numerics,
        index_topk,
    }
}

/// For a target that runs many blocks at once.
fn wide(numerics: Numerics, target_fp8: bool, keep_mha: bool) -> Cx {
    Cx { blocks: 132, block_bytes: 192 << 10, boxes: true, beside: true, ..cx(numerics, target_fp8, keep_mha) }
}

/// For a chunk of one sequence that selects each row of its context many times.
fn chunk(numerics: Numerics) -> Cx {
    let mut cx = wide(numerics, true, false);
    cx.class.max = cx.class.max.with(Sym::T, 64).with(Sym::S, 1);
    cx
}

/// Every combination of what a pipeline can be asked for.
fn all() -> Vec<Cx> {
    let mut all = Vec::new();
    for numerics in BOTH {
        for (fp8, mha) in [(false, false), (false, true), (true, false), (true, true)] {
            all.push(cx(numerics, fp8, mha));
            all.push(wide(numerics, fp8, mha));
        }
    }
    all
}
