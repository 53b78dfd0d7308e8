//! The pipeline on the models as configured: every class verifies, and each layer launches as many kernels as expected.

use super::shape::listing;
use super::{BOTH, cx, wide};
use crate::front::config::ModelConfig;
use crate::front::model::{BuildOptions, build};
use crate::kernels::{self, default_schedule, shape_of};
use crate::passes::*;
use dsc_ir::graph::Graph;
use std::collections::BTreeSet;

const DEEPSEEK: &str = include_str!("../../../../examples/deepseek-v3.2/config.json");
const GLM: &str = include_str!("../../../../examples/glm-5/config.json");

fn layers(config: &str, layers: &[usize], cx: &Cx) -> Graph {
    let config = ModelConfig::from_json(config).unwrap_or_else(|e| panic!("{e}"));
    let layers = Some(layers.to_vec());
    let mut graph = build(&config, &BuildOptions { numerics: cx.numerics, layers, max_context: 131_072 });
    run(&mut graph, cx, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{cx:?}: {e}"));
    graph
}

/// Launches that one more layer of the kind adds.
fn per_layer(config: &str, first: usize, cx: &Cx) -> usize {
    launches(&layers(config, &[first, first + 1], cx)) - launches(&layers(config, &[first], cx))
}

#[test]
fn launches_of_each_kind_of_layer() {
    let mut table = String::from("dense, moe\n");
    for (name, config) in [("deepseek", DEEPSEEK), ("glm", GLM)] {
        for numerics in BOTH {
            for (form, fp8, mha) in [
                ("mqa", true, false),
                ("mha", true, true),
                ("mqa no fp8", false, false),
                ("mqa wide token", true, false),
                ("mqa wide", true, false),
                ("mqa wide prefill", true, false),
            ] {
                let mut cx = cx(numerics, fp8, mha);
                if form.contains("wide") {
                    (cx.blocks, cx.block_bytes) = (132, 141 << 10);
                }
                if form.contains("prefill") {
                    cx.class.max = cx.class.max.with(Sym::T, 512);
                }
                if form.contains("token") {
                    cx.class.max = cx.class.max.with(Sym::T, 1);
                }
                let (dense, moe) = (per_layer(config, 0, &cx), per_layer(config, 10, &cx));
                table += &format!("{name} {numerics:?} {form}: {dense} {moe}\n");
            }
        }
    }
    expect_test::expect![[r#"
        dense, moe
        deepseek Exact mqa: 13 17
        deepseek Exact mha: 15 19
        deepseek Exact mqa no fp8: 13 17
        deepseek Exact mqa wide token: 14 16
        deepseek Exact mqa wide: 14 17
        deepseek Exact mqa wide prefill: 13 16
        deepseek Deployed mqa: 15 20
        deepseek Deployed mha: 17 22
        deepseek Deployed mqa no fp8: 15 20
        deepseek Deployed mqa wide token: 14 16
        deepseek Deployed mqa wide: 14 17
        deepseek Deployed mqa wide prefill: 14 17
        glm Exact mqa: 13 17
        glm Exact mha: 15 19
        glm Exact mqa no fp8: 13 17
        glm Exact mqa wide token: 14 16
        glm Exact mqa wide: 14 17
        glm Exact mqa wide prefill: 13 16
        glm Deployed mqa: 14 19
        glm Deployed mha: 16 21
        glm Deployed mqa no fp8: 14 19
        glm Deployed mqa wide token: 15 17
        glm Deployed mqa wide: 15 18
        glm Deployed mqa wide prefill: 14 17
    "#]]
    .assert_eq(&table);
}

#[test]
fn the_whole_model() {
    let cx = cx(Numerics::Deployed, true, false);
    let graph = layers(DEEPSEEK, &(0..61).collect::<Vec<_>>(), &cx);
    // 3 dense layers, 58 with experts; embedding, rows, head, the first norm, which later layers have with the sum, and two that
    // choose tokens.
    assert_eq!(launches(&graph), 3 * 15 + 58 * 20 + 6);
    assert!(graph.weights.iter().any(|w| w.name == "layers.60.self_attn.kv_b_proj.weight@bf16"));
}

/// A decode step of one token, of a layer with experts, where launches run all blocks at once.
#[test]
fn a_wide_deployed_layer() {
    let mut cx = wide(Numerics::Deployed, true, false);
    cx.class.max = cx.class.max.with(Sym::T, 1);
    let all = listing(&layers(DEEPSEEK, &[10, 11], &cx));
    let layer: Vec<&str> = all.lines().filter(|l| l.starts_with("layers.11.")).map(|l| &l[10..]).collect();
    expect_test::expect![[r#"
        self_attn.q_a_proj+layers.11.self_attn.indexer.wk+layers.11.self_attn.kv_a_proj_with_mqa+layers.11.self_attn.indexer.weights_proj: Beside{LinearPartial LinearPartial}
        self_attn.indexer.weights_proj.sum..layers.11.self_attn.indexer.k_cache: Row{SumPartials Scale SumPartials SliceLast RmsNorm SliceLast Rope Quantize CacheWrite SliceLast RmsNorm Quantize SliceLast LayerNorm Rope Hadamard Quantize CacheWrite}
        self_attn.q_b_proj+layers.11.self_attn.indexer.wq_b: Linear
        self_attn.q_rope: Heads{Rope HeadLinear Rope Hadamard Quantize}
        self_attn.indexer.logits: SparseAttention{IndexerLogits}
        self_attn.indexer.topk: SparseAttention{TopK}
        self_attn.attention: MqaPartial
        self_attn.attention.combine: Product{MqaCombine HeadLinear Reshape Quantize}
        self_attn.o_proj: LinearPartial
        self_attn.o_proj.sum..layers.11.post_attention_layernorm.quant: Row{SumPartials Add RmsNorm Cast Quantize}
        mlp.gate: LinearPartial
        mlp.gate.topk: Gate{SumPartials Sigmoid Add GroupTopK TakeAlong Normalize Append Append Route}
        mlp.experts.gate_up_proj: Product{ExpertLinear SliceLast SliceLast SwiGlu Quantize}
        mlp.experts.down_proj: ExpertLinear
        mlp.add_shared..norm: Row{WeightedSum Add RmsNorm}"#]].assert_eq(&layer.join("\n"));
}

/// Layers of one kind share all their kernels.
#[test]
fn equal_layers_make_equal_kernels() {
    for cx in [cx(Numerics::Deployed, false, false), wide(Numerics::Deployed, true, false)] {
        let kernels = |which: &[usize]| {
            let graph = layers(DEEPSEEK, which, &cx);
            let emit = |n| {
                let schedule = default_schedule(&shape_of(&graph, n, &cx.class), &cx.class);
                kernels::emit(&graph, n, &schedule, &cx.class).unwrap_or_else(|e| panic!("{e}")).program.name
            };
            let launches = graph.dag.node_indices().filter(|&n| is_launch(&graph.dag[n].op));
            launches.map(emit).collect::<BTreeSet<String>>()
        };
        let few = kernels(&[0, 1, 2, 3, 4]);
        assert_eq!(few, kernels(&(0..20).collect::<Vec<_>>()), "{}", cx.blocks);
    }
}
