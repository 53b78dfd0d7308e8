//! What graphs look like after passes.

use super::mini::{self, Mini};
use super::{BOTH, all, chunk, cx};
use crate::passes::fuse_rows::is_row_op;
use crate::passes::*;
use dsc_ir::DType;
use dsc_ir::graph::verify::verify;
use dsc_ir::graph::{Elem, Fused, FusedKind, NodeId, State, StateFormat, StepInput, Value};
use expect_test::{Expect, expect};

fn after(mut graph: Graph, cx: &Cx, passes: &[fn(&mut Graph, &Cx) -> usize]) -> Graph {
    for pass in passes {
        pass(&mut graph, cx);
        graph.remove_dead();
        assert_eq!(verify(&graph), []);
    }
    graph
}

fn piped(mut graph: Graph, cx: &Cx) -> Graph {
    run(&mut graph, cx, &mut |_, _, _| {}).unwrap_or_else(|e| panic!("{cx:?}: {e}"));
    graph
}

fn short(op: &Op) -> String {
    match op {
        Op::Fused(f) => {
            let mut ops: Vec<String> = Vec::new();
            for n in f.body.order() {
                if !matches!(f.body.dag[n].op, Op::Arg(_)) {
                    ops.push(short(&f.body.dag[n].op));
                }
            }
            format!("{:?}{{{}}}", f.kind, ops.join(" "))
        }
        op => format!("{op:?}").split([' ', '(']).next().unwrap_or_default().to_string(),
    }
}

/// The launches of a graph, a line each.
pub(super) fn listing(graph: &Graph) -> String {
    let mut out = String::new();
    for n in graph.order().into_iter().filter(|&n| is_launch(&graph.dag[n].op)) {
        out += &format!("{}: {}\n", graph.dag[n].name, short(&graph.dag[n].op));
    }
    out
}

fn check(graph: &Graph, expected: Expect) {
    expected.assert_eq(&listing(graph));
}

fn find(graph: &Graph, name: &str) -> Vec<NodeId> {
    graph.order().into_iter().filter(|&n| short(&graph.dag[n].op) == name).collect()
}

fn bodies(graph: &Graph) -> Vec<&Fused> {
    graph
        .dag
        .node_weights()
        .filter_map(|n| match &n.op {
            Op::Fused(f) => Some(&**f),
            _ => None,
        })
        .collect()
}

#[test]
fn the_pipeline_verifies_and_repeats() {
    for cx in all() {
        for graph in [Mini::model(cx.numerics), Mini::moe_layers(cx.numerics, 3)] {
            assert_eq!(verify(&graph), []);
            let mut names = Vec::new();
            let mut once = graph.clone();
            run(&mut once, &cx, &mut |name, _, _| names.push(name)).unwrap_or_else(|e| panic!("{cx:?}: {e}"));
            assert_eq!(names, PASSES);
            assert!(once == piped(graph, &cx));
            let outputs: Vec<&String> = once.outputs.iter().map(|(name, _)| name).collect();
            assert!(outputs.iter().any(|name| *name == "topk.0") && outputs.iter().any(|name| *name == "logits"));
        }
    }
}

#[test]
fn every_row_op_is_in_a_cluster() {
    for cx in all() {
        let graph = piped(Mini::model(cx.numerics), &cx);
        for n in graph.dag.node_weights() {
            assert!(!is_row_op(&n.op), "{}", n.name);
        }
        let total = graph.dag.node_count();
        assert_eq!(graph.order().len(), total, "no cycle");
    }
}

#[test]
fn absorption_leaves_no_expanded_cache() {
    for numerics in BOTH {
        for fp8 in [false, true] {
            let graph = after(Mini::model(numerics), &cx(numerics, fp8, false), &[absorb_mla]);
            assert_eq!(
                find(&graph, "MhaAttention").len()
                    + find(&graph, "CacheLatent").len()
                    + find(&graph, "CacheRope").len(),
                0
            );
            assert_eq!((find(&graph, "MqaAttention").len(), find(&graph, "HeadLinear").len()), (2, 4));
            let weight = graph.inputs(find(&graph, "HeadLinear")[0])[1];
            let bf16 = fp8 && numerics == Numerics::Deployed;
            assert_eq!(graph.tensor(weight).elem, Elem::Plain(if bf16 { DType::Bf16 } else { DType::F32 }));
            let name = if bf16 { "0.attn.kv_b@bf16" } else { "0.attn.kv_b" };
            assert!(graph.weights.iter().any(|w| w.name == name));
            // The rotation is of the rotated part only.
            let rope = graph.inputs(find(&graph, "MqaAttention")[0])[1];
            assert_eq!(graph.dag[rope.node].op, Op::Rope { layout: dsc_ir::graph::RopeLayout::Interleaved, start: 0 });
        }
    }
    let mha = after(Mini::model(Numerics::Exact), &cx(Numerics::Exact, false, true), &[absorb_mla]);
    assert!(mha == Mini::model(Numerics::Exact));
}

#[test]
fn fp8_operands_and_caches_are_expanded() {
    let cx = cx(Numerics::Deployed, false, false);
    let graph = after(Mini::model(Numerics::Deployed), &cx, &[share_repeats, absorb_mla, expand_fp8]);
    assert!(graph.weights.iter().all(|w| matches!(w.ty.elem, Elem::Plain(_))));
    for name in ["Linear", "ExpertLinear", "IndexerLogits"] {
        for n in find(&graph, name) {
            assert!(matches!(graph.tensor(graph.inputs(n)[0]).elem, Elem::Plain(_)));
        }
    }
    for n in find(&graph, "CacheWrite") {
        for part in graph.inputs(n).into_iter().skip(2) {
            assert_eq!(graph.tensor(part).elem, Elem::Plain(DType::F32));
        }
    }
    let plain = |s: &State| matches!(s.format, StateFormat::Latent { .. } | StateFormat::Index { .. });
    assert!(graph.states.iter().all(plain));
    for n in find(&graph, "Quantize") {
        let dequantized =
            graph.users(Value { node: n, output: 0 }).into_iter().filter(|(u, _)| graph.dag[*u].op == Op::Dequantize);
        assert!(dequantized.count() <= 1);
    }
}

#[test]
fn projections_of_one_activation_become_one() {
    let cx = cx(Numerics::Deployed, true, false);
    let graph = after(Mini::model(Numerics::Deployed), &cx, &[share_repeats, absorb_mla, merge_projections]);
    let names: Vec<&str> = find(&graph, "Linear").into_iter().map(|n| graph.dag[n].name.as_str()).collect();
    // kv_a has 28 rows in blocks of 8: it goes last.
    expect![[r#"
        [
            "0.attn.indexer.weights_proj",
            "0.attn.q_a+0.attn.indexer.wk+0.attn.kv_a",
            "0.attn.q_b+0.attn.indexer.wq_b",
            "0.attn.o",
            "0.mlp.gate+0.mlp.up",
            "0.mlp.down",
            "1.attn.q_a+1.attn.kv_a",
            "1.attn.q_b",
            "1.attn.o",
            "1.mlp.gate",
            "1.mlp.shared.gate+1.mlp.shared.up",
            "1.mlp.shared.down",
            "lm_head",
        ]
    "#]]
    .assert_debug_eq(&names);
    // Slices are of the product, not of a slice.
    for n in find(&graph, "SliceLast") {
        assert_ne!(short(&graph.dag[graph.inputs(n)[0].node].op), "SliceLast");
    }
}

#[test]
fn a_shared_selection_is_a_second_result() {
    let cx = cx(Numerics::Deployed, true, false);
    let passes = [absorb_mla, fuse_sparse_attention, skip_short_selection];
    let graph = after(Mini::model(Numerics::Deployed), &cx, &passes);
    let fused: Vec<&Fused> = bodies(&graph);
    assert_eq!(fused.iter().map(|f| f.body.outputs.len()).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(fused.iter().map(|f| f.select_all_below).collect::<Vec<_>>(), [0, mini::TOP_K]);
    let selected = graph.outputs.iter().find(|(name, _)| name == "topk.0").unwrap().1;
    assert_eq!(selected.output, 1);
    assert_eq!(find(&graph, "TopK").len(), 0);
}

#[test]
fn the_mha_class_selects_in_a_node_of_its_own() {
    let cx = cx(Numerics::Exact, false, true);
    let passes = [absorb_mla, fuse_sparse_attention, skip_short_selection];
    let graph = after(Mini::model(Numerics::Exact), &cx, &passes);
    let fused = bodies(&graph);
    assert_eq!(fused.len(), 1);
    assert_eq!((fused[0].select_all_below, fused[0].body.outputs.len()), (mini::TOP_K, 1));
    assert_eq!(find(&graph, "MhaAttention").len(), 2);
}

#[test]
fn rows_that_are_selected_often_are_expanded_once() {
    let expanded = |cx: &Cx| {
        let graph = piped(Mini::model(cx.numerics), cx);
        let rows = find(&graph, "CacheRows");
        for &n in &rows {
            assert_eq!(graph.tensor(Value { node: n, output: 0 }).elem, Elem::Plain(DType::Bf16));
        }
        let attentions = bodies(&graph).into_iter().filter(|f| f.body.dag.node_weights().any(|n| is_mqa(&n.op)));
        let inputs: Vec<usize> =
            attentions.map(|f| f.body.order().iter().map(|&n| inputs_of_mqa(&f.body, n)).sum()).collect();
        (rows.len(), inputs)
    };
    let often = chunk(Numerics::Deployed);
    assert_eq!(expanded(&often), (2, vec![4, 4]));
    let changed = |change: &dyn Fn(&mut Cx)| {
        let mut cx = often.clone();
        change(&mut cx);
        expanded(&cx)
    };
    // Positions of several sequences are no rows of one matrix; few tokens select few rows; without codes there is nothing to convert.
    assert_eq!(changed(&|cx| cx.class.max = cx.class.max.with(Sym::S, 2)).0, 0);
    assert_eq!(changed(&|cx| cx.class.max = cx.class.max.with(Sym::C, 64)).0, 0);
    assert_eq!(changed(&|cx| cx.target_fp8 = false).0, 0);
    assert_eq!(expanded(&chunk(Numerics::Exact)).0, 0);
}

fn is_mqa(op: &Op) -> bool {
    matches!(op, Op::MqaAttention { .. } | Op::MqaPartial { .. })
}

fn inputs_of_mqa(body: &Graph, node: NodeId) -> usize {
    if is_mqa(&body.dag[node].op) { body.inputs(node).len() } else { 0 }
}

#[test]
fn gates_and_routes() {
    let mut cx = cx(Numerics::Exact, false, false);
    let graph = after(Mini::model(Numerics::Exact), &cx, &[fuse_gate, group_experts]);
    let gates: Vec<_> = bodies(&graph).into_iter().filter(|f| f.kind == FusedKind::Gate).collect();
    assert_eq!(gates.len(), 1);
    assert_eq!(short(&Op::Fused(Box::new(gates[0].clone()))), "Gate{Sigmoid Add GroupTopK TakeAlong Normalize}");
    assert_eq!(find(&graph, "Route").len(), 1);
    for n in find(&graph, "ExpertLinear") {
        assert_eq!(graph.inputs(n).len(), 4);
    }
    // One token has fewer experts than there are: products look for their rows by place.
    cx.class.max = cx.class.max.with(Sym::T, 1);
    let graph = after(Mini::model(Numerics::Exact), &cx, &[fuse_gate, group_experts]);
    for n in find(&graph, "ExpertLinear") {
        assert_eq!(graph.inputs(n)[4], Value { node: find(&graph, "Route")[0], output: 2 });
    }
}

#[test]
fn clusters_that_would_wait_for_each_other_stay_apart() {
    // a → la → b and c → lc → d. a and d read x, b and c read y: {a, d} and {b, c} would wait for each other.
    let t = dsc_ir::Extent::from(Sym::T);
    let ty = || dsc_ir::graph::TensorType::plain(DType::F32, &[t, 8.into()]);
    let mut g = Graph::default();
    let input = |g: &mut Graph| {
        let rows =
            g.add1("rows", Op::Input(StepInput::Tokens), &[], dsc_ir::graph::TensorType::plain(DType::I32, &[t]));
        let table =
            g.add1("table", Op::Arg(0), &[], dsc_ir::graph::TensorType::plain(DType::F32, &[4.into(), 8.into()]));
        g.add1("x", Op::Embed, &[rows, table], ty())
    };
    let (x, y) = (input(&mut g), input(&mut g));
    let w = g.add1("w", Op::Arg(1), &[], dsc_ir::graph::TensorType::plain(DType::F32, &[8.into(), 8.into()]));
    let row = |g: &mut Graph, name: &str, a: Value, b: Value| g.add1(name, Op::Add, &[a, b], ty());
    let a = row(&mut g, "a", x, x);
    let la = g.add1("la", Op::Linear, &[a, w], ty());
    let b = row(&mut g, "b", la, y);
    let c = row(&mut g, "c", y, y);
    let lc = g.add1("lc", Op::Linear, &[c, w], ty());
    let d = row(&mut g, "d", lc, x);
    g.outputs = vec![("b".into(), b), ("d".into(), d)];
    fuse_rows(&mut g, &cx(Numerics::Exact, false, false));
    assert_eq!(g.order().len(), g.dag.node_count());
    // Whatever joins, both products are still fed and both results made.
    assert_eq!(bodies(&g).iter().map(|f| f.body.outputs.len()).sum::<usize>(), 4);
    assert_eq!(bodies(&g).len(), 3);
}

/// Launches that one more layer of experts adds, and all of them.
fn layer_launches(cx: &Cx) -> usize {
    let count = |layers| launches(&piped(Mini::moe_layers(cx.numerics, layers), cx));
    count(3) - count(2)
}

#[test]
fn launches_of_a_layer() {
    let counts: Vec<usize> = all().iter().map(layer_launches).collect();
    // Without fp8, with it; in MQA form, in MHA form; blocks one after another, all at once.
    assert_eq!(counts, [17, 18, 19, 19, 17, 18, 19, 19, 20, 22, 23, 23, 20, 18, 23, 21]);
}

#[test]
fn a_deployed_layer() {
    check(
        &piped(Mini::moe_layers(Numerics::Deployed, 1), &cx(Numerics::Deployed, true, false)),
        expect![[r#"
            embed: Embed
            0.input_norm..0.attn.q_a.quantize: Row{RmsNorm Quantize}
            0.attn.indexer.weights_proj: Linear
            0.attn.q_a+0.attn.indexer.wk+0.attn.kv_a: Linear
            0.attn.indexer.scale..0.attn.indexer.keys.write: Row{Scale RmsNorm Rope Quantize CacheWrite RmsNorm Quantize LayerNorm Rope Hadamard Quantize CacheWrite}
            0.attn.q_b+0.attn.indexer.wq_b: Linear
            0.attn.mha.q_latent: HeadLinear
            0.attn.q_rope..0.attn.indexer.q.quantize: Row{Rope Rope Hadamard Quantize}
            0.attn.mha: SparseAttention{IndexerLogits TopK MqaAttention}
            0.attn.mha.value: HeadLinear
            0.attn.o.quantize: Row{Quantize}
            0.attn.o: Linear
            0.post_norm.add..0.mlp.gate_up.quantize: Row{Add RmsNorm Cast Quantize}
            0.mlp.gate: Linear
            0.mlp.shared.gate+0.mlp.shared.up: Linear
            0.mlp.gate.ids: Gate{Sigmoid Add GroupTopK TakeAlong Normalize}
            0.mlp.gate.ids.route: Route
            0.mlp.gate_up: ExpertLinear
            0.mlp.shared.swiglu..0.mlp.down.quantize: Row{SwiGlu Quantize SwiGlu Quantize}
            0.mlp.down: ExpertLinear
            0.mlp.shared.down: Linear
            0.mlp.sum..1.input_norm: Row{WeightedSum Add Add RmsNorm}
            take_rows: Row{TakeRows}
            lm_head: Linear
        "#]],
    );
}

#[test]
fn an_exact_layer() {
    check(
        &piped(Mini::moe_layers(Numerics::Exact, 1), &cx(Numerics::Exact, false, false)),
        expect![[r#"
            embed: Embed
            0.input_norm: Row{RmsNorm}
            0.attn.q_a+0.attn.kv_a+0.attn.indexer.wk+0.attn.indexer.weights_proj: Linear
            0.attn.kv_norm..0.attn.indexer.scale: Row{RmsNorm Rope CacheWrite RmsNorm LayerNorm Rope CacheWrite Scale}
            0.attn.q_b+0.attn.indexer.wq_b: Linear
            0.attn.mha.q_latent: HeadLinear
            0.attn.q_rope..0.attn.indexer.q_rope: Row{Rope Rope}
            0.attn.mha: SparseAttention{IndexerLogits TopK MqaAttention}
            0.attn.mha.value: HeadLinear
            0.attn.o: Linear
            0.post_norm.add..0.post_norm: Row{Add RmsNorm}
            0.mlp.gate+0.mlp.shared.gate+0.mlp.shared.up: Linear
            0.mlp.gate.ids: Gate{Sigmoid Add GroupTopK TakeAlong Normalize}
            0.mlp.gate.ids.route: Route
            0.mlp.gate_up: ExpertLinear
            0.mlp.shared.swiglu..0.mlp.swiglu: Row{SwiGlu SwiGlu}
            0.mlp.down: ExpertLinear
            0.mlp.shared.down: Linear
            0.mlp.sum..1.input_norm: Row{WeightedSum Add Add RmsNorm}
            take_rows: Row{TakeRows}
            lm_head: Linear
        "#]],
    );
}
