//! The pipeline on the models as configured: every class verifies, and each layer launches as many kernels as expected.

use super::{BOTH, cx};
use crate::front::config::ModelConfig;
use crate::front::model::{BuildOptions, build};
use crate::passes::*;
use dsc_ir::graph::Graph;

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
                ("mqa wide", true, false),
                ("mqa wide prefill", true, false),
            ] {
                let mut cx = cx(numerics, fp8, mha);
                if form.contains("wide") {
                    cx.blocks = 132;
                }
                if form.contains("prefill") {
                    cx.class.max = cx.class.max.with(Sym::T, 512);
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
        deepseek Exact mqa wide: 14 16
        deepseek Exact mqa wide prefill: 13 16
        deepseek Deployed mqa: 15 20
        deepseek Deployed mha: 17 22
        deepseek Deployed mqa no fp8: 15 20
        deepseek Deployed mqa wide: 15 17
        deepseek Deployed mqa wide prefill: 14 17
        glm Exact mqa: 13 17
        glm Exact mha: 15 19
        glm Exact mqa no fp8: 13 17
        glm Exact mqa wide: 14 16
        glm Exact mqa wide prefill: 13 16
        glm Deployed mqa: 14 19
        glm Deployed mha: 16 21
        glm Deployed mqa no fp8: 14 19
        glm Deployed mqa wide: 15 17
        glm Deployed mqa wide prefill: 14 17
    "#]]
    .assert_eq(&table);
}

#[test]
fn the_whole_model() {
    let cx = cx(Numerics::Deployed, true, false);
    let graph = layers(DEEPSEEK, &(0..61).collect::<Vec<_>>(), &cx);
    // 3 dense layers, 58 with experts; embedding, rows, head, and the first norm, which later layers have with the sum.
    assert_eq!(launches(&graph), 3 * 15 + 58 * 20 + 4);
    assert!(graph.weights.iter().any(|w| w.name == "layers.60.self_attn.kv_b_proj.weight@bf16"));
}
