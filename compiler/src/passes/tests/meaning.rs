//! Passes keep what graphs compute: the interpreter's results after each pass against those before it.

use super::mini::{self, Mini};
use super::{all, chunk, cx, wide};
use crate::front::config::ModelConfig;
use crate::front::model::{BuildOptions, build};
use crate::passes::*;
use dsc_ir::DType;
use dsc_ir::artifact::WeightSource;
use dsc_ir::dtype::e4m3_to_f32;
use dsc_ir::graph::interp::{Interp, StepInputs, StepValue};
use dsc_ir::graph::weights::{Stored, materialize};
use std::collections::{BTreeMap, HashMap};

/// Tensors as a checkpoint stores them, by name.
type Checkpoint = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

/// Numbers that look random and are the same on every machine.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as u32
    }

    /// In [−1, 1).
    fn float(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// Every tensor that the weights name: e4m3 and scales where they say so, f32 elsewhere.
fn checkpoint(graph: &Graph, seed: u64) -> Checkpoint {
    let (mut random, mut tensors) = (Random(seed), Checkpoint::new());
    for weight in &graph.weights {
        let WeightSource::Tensors(parts) = &weight.source else { continue };
        for part in parts {
            let [rows, cols] = part.shape.map(|n| n as usize);
            let Some(scale) = &part.scale else {
                let gain = if rows == 1 { 1.0 } else { 0.0 };
                let bytes = (0..rows * cols).flat_map(|_| (gain + 0.5 * random.float()).to_le_bytes()).collect();
                tensors.insert(part.tensor.clone(), (DType::F32, vec![rows, cols], bytes));
                continue;
            };
            let code = |random: &mut Random| loop {
                let code = random.bits() as u8;
                if e4m3_to_f32(code).abs() < 2.0 {
                    return code;
                }
            };
            let codes = (0..rows * cols).map(|_| code(&mut random)).collect();
            tensors.insert(part.tensor.clone(), (DType::E4m3, vec![rows, cols], codes));
            let shape = vec![rows.div_ceil(part.scale_block[0] as usize), cols.div_ceil(part.scale_block[1] as usize)];
            let scales = (0..shape[0] * shape[1]).flat_map(|_| (0.3 + 0.1 * random.float()).to_le_bytes()).collect();
            tensors.insert(scale.clone(), (DType::F32, shape, scales));
        }
    }
    tensors
}

/// A prompt longer than the selection in two chunks, then two tokens one by one.
fn one_sequence() -> Vec<StepInputs> {
    let tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3];
    [(0, 3), (3, 8), (8, 9), (9, 10)].map(|(start, end)| StepInputs::sequence(&tokens[start..end], start)).to_vec()
}

/// Two sequences of different lengths in one step, then a token for each, logits of the last only.
fn two_sequences() -> Vec<StepInputs> {
    let page_table = vec![vec![1], vec![0]];
    let first = StepInputs {
        tokens: vec![7, 8, 2, 0, 10, 4, 4, 1],
        positions: vec![0, 1, 2, 3, 4, 5, 0, 1],
        seqs: vec![0, 0, 0, 0, 0, 0, 1, 1],
        slots: vec![64, 65, 66, 67, 68, 69, 0, 1],
        page_table: page_table.clone(),
        logit_rows: vec![5, 7],
        draws: Vec::new(),
    };
    let second = StepInputs {
        tokens: vec![6, 3],
        positions: vec![6, 2],
        seqs: vec![0, 1],
        slots: vec![70, 2],
        page_table,
        logit_rows: vec![1],
        draws: Vec::new(),
    };
    vec![first, second]
}

/// Everything the steps return, as numbers by output name.
fn results(graph: &Graph, checkpoint: &Checkpoint, steps: &[StepInputs]) -> Vec<BTreeMap<String, Vec<f64>>> {
    let fetch = |name: &str| {
        checkpoint.get(name).map(|(dtype, shape, bytes)| Stored { dtype: *dtype, shape: shape.clone(), bytes })
    };
    let mut interp = Interp::<f64>::new(graph, &|w| materialize(w, mini::POSITIONS as usize, &fetch))
        .unwrap_or_else(|e| panic!("{e}"));
    steps.iter().map(|s| numbers(interp.step(s).unwrap_or_else(|e| panic!("{e}")))).collect()
}

fn numbers(outputs: HashMap<String, StepValue<f64>>) -> BTreeMap<String, Vec<f64>> {
    let values = |value: StepValue<f64>| match value {
        StepValue::Tensor(t) if !t.ints().is_empty() => t.ints().iter().map(|&i| f64::from(i)).collect(),
        StepValue::Tensor(t) => t.values().to_vec(),
        StepValue::State(cache) => (0..).map_while(|slot| cache.row(slot)).flatten().collect(),
    };
    outputs.into_iter().map(|(name, value)| (name, values(value))).collect()
}

/// Largest difference over all results, relative to the largest magnitude of each.
fn distance(a: &[BTreeMap<String, Vec<f64>>], b: &[BTreeMap<String, Vec<f64>>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut worst = 0.0f64;
    for (a, b) in a.iter().zip(b) {
        assert!(a.keys().eq(b.keys()));
        for (name, x) in a {
            assert_eq!(x.len(), b[name].len(), "{name}");
            let size = x.iter().fold(1e-300, |m: f64, v| m.max(v.abs()));
            for (u, v) in x.iter().zip(&b[name]) {
                assert!(u.is_finite() && v.is_finite(), "{name}");
                worst = worst.max((u - v).abs() / size);
            }
        }
    }
    worst
}

/// How far a pass may move results, relative to their size.
fn tolerance(pass: &str, cx: &Cx) -> f64 {
    match (pass, cx.numerics) {
        // The order of sums.
        ("absorb_mla", Numerics::Exact) => 1e-12,
        // bf16 roundings in other places, and e4m3 codes (steps of 1/8) of activations that change with them; see
        // `comparable`. What is computed is pinned by the exact numerics above.
        ("absorb_mla", Numerics::Deployed) => 0.1,
        // Products of code and scale rather than sums of products of codes.
        ("expand_fp8", _) => 1e-12,
        // The order of sums, and in deployed numerics a rounding that it tips.
        ("split_products" | "fuse_sparse_attention" | "merge_shared_expert", Numerics::Exact) => 1e-12,
        ("split_products" | "fuse_sparse_attention" | "merge_shared_expert", Numerics::Deployed) => 0.01,
        // Probabilities in bf16.
        ("match_operands", Numerics::Deployed) => 0.1,
        _ => 0.0,
    }
}

/// Where roundings differ, later selections (of keys, of experts) differ: only results before those can be compared.
fn comparable(pass: &str, cx: &Cx, mut results: Vec<BTreeMap<String, Vec<f64>>>) -> Vec<BTreeMap<String, Vec<f64>>> {
    let absorbed = pass == "absorb_mla" && !cx.class.keep_mha;
    if (absorbed || pass == "match_operands") && cx.numerics == Numerics::Deployed {
        results
            .iter_mut()
            .for_each(|r| r.retain(|name, _| name == "hidden.0" || name == "topk.0" || name.starts_with("0.")));
    }
    results
}

#[test]
fn every_pass_keeps_the_results() {
    for cx in all() {
        for graph in [Mini::model(cx.numerics), Mini::moe_layers(cx.numerics, 2)] {
            for steps in [one_sequence(), two_sequences()] {
                for seed in 1..4 {
                    check(graph.clone(), &cx, &steps, seed);
                }
            }
        }
    }
}

/// Values of expanded rows are those of the codes.
#[test]
fn chunks_of_one_sequence_keep_the_results() {
    for seed in 1..4 {
        check(Mini::model(Numerics::Deployed), &chunk(Numerics::Deployed), &one_sequence(), seed);
    }
}

/// Models of the front end have what the small one here has not: a shared expert that joins the routed ones.
#[test]
fn models_of_the_front_end_keep_their_results() {
    for name in ["v32-tiny", "glm-tiny"] {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
        let config = ModelConfig::read(&dir).unwrap_or_else(|e| panic!("{e}"));
        for numerics in super::BOTH {
            let options = BuildOptions { numerics, layers: None, max_context: mini::POSITIONS };
            let graph = build(&config, &options);
            let cx = Cx { index_topk: config.index_topk as u32, ..wide(numerics, true, false) };
            let mut merged = graph.clone();
            assert!(merge_shared_expert(&mut merged, &cx) > 0, "{name}");
            check(graph, &cx, &one_sequence(), 5);
        }
    }
}

fn check(mut graph: Graph, cx: &Cx, steps: &[StepInputs], seed: u64) {
    let checkpoint = checkpoint(&graph, seed);
    let mut before = results(&graph, &checkpoint, steps);
    let moved = |results: &[BTreeMap<String, Vec<f64>>]| results.iter().flat_map(|r| &r["logits"]).any(|&x| x != 0.0);
    assert!(moved(&before));
    run(&mut graph, cx, &mut |pass, graph, _| {
        let after = results(graph, &checkpoint, steps);
        let distance = distance(&comparable(pass, cx, before.clone()), &comparable(pass, cx, after.clone()));
        assert!(distance <= tolerance(pass, cx), "{pass} moved results by {distance:e} ({cx:?}, seed {seed})");
        before = after;
    })
    .unwrap_or_else(|e| panic!("{e}"));
}

/// A single pass must stand on its own as well.
#[test]
fn passes_keep_the_results_in_any_company() {
    let numerics = Numerics::Deployed;
    let passes: [fn(&mut Graph, &Cx) -> usize; 6] =
        [expand_fp8, merge_projections, fuse_sparse_attention, fuse_gate, group_experts, fuse_rows];
    let mut graph = Mini::model(numerics);
    assert!(share_repeats(&mut graph, &cx(numerics, true, false)) > 0);
    graph.remove_dead();
    let (checkpoint, steps) = (checkpoint(&graph, 9), one_sequence());
    let before = results(&graph, &checkpoint, &steps);
    for pass in passes {
        let mut graph = graph.clone();
        assert!(pass(&mut graph, &cx(numerics, false, false)) > 0);
        graph.remove_dead();
        assert!(distance(&before, &results(&graph, &checkpoint, &steps)) <= 1e-12);
    }
}
