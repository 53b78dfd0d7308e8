//! `config.json`: nothing panics, from the text to a plan. What is accepted and small enough becomes a graph that verifies, whose text
//! parses again, and goes through the passes and the planner for a decode and two prefill classes; the plan passes the artifact's check.
#![no_main]

use dsc::front::config::ModelConfig;
use dsc::front::model::{BuildOptions, build};
use dsc::kernels::KernelError;
use dsc::passes::{self, Class, Cx};
use dsc::plan::{Plan, PlanError, Scheduler, plan};
use dsc_ir::SymValues;
use dsc_ir::artifact::{Header, KernelEntry, ModelFacts, Numerics, ParamEntry, Section};
use dsc_ir::graph::{Graph, text, verify::verify};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile;
use libfuzzer_sys::fuzz_target;

/// Beyond these the graph of a few layers is too large to be built thousands of times a second.
const MAX_EXPERTS: usize = 16;
const MAX_LAYERS: usize = 3;

fuzz_target!(|data: &[u8]| {
    let Ok(json) = str::from_utf8(data) else { return };
    match ModelConfig::from_json(json) {
        Ok(config) => accepted(&config),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
});

fn accepted(config: &ModelConfig) {
    assert!(config.softmax_scale().is_finite() && config.parameters() > 0);
    // Half of a head; 2^24 at most.
    if config.qk_rope_head_dim <= 1 << 12 {
        assert!(config.rope_frequencies().iter().all(|f| f.is_finite()));
    }
    if config.n_routed_experts > MAX_EXPERTS {
        return;
    }
    for numerics in [Numerics::Exact, Numerics::Deployed] {
        let layers = (0..config.layers.min(MAX_LAYERS)).collect();
        let max_context = config.max_position_embeddings.min(1 << 16) as u32;
        let graph = build(config, &BuildOptions { numerics, layers: Some(layers), max_context });
        let problems = verify(&graph);
        if problems.is_empty() {
            compile(config, &graph, numerics, max_context);
        }
    }
}

fn compile(config: &ModelConfig, graph: &Graph, numerics: Numerics, max_context: u32) {
    let printed = graph.to_string();
    assert!(text::parse(&printed).is_ok_and(|again| again == *graph), "{printed}");
    let mut graphs = Vec::new();
    for (name, tokens, keep_mha) in [("decode", 1, false), ("short", 64, true), ("prefill", 64, false)] {
        let context = if keep_mha { max_context.min(config.index_topk as u32) } else { max_context };
        let pages = max_context.div_ceil(64);
        let max = SymValues([tokens, 1, pages, tokens, 1 << 10, context]);
        let class = Class { name: name.into(), max, keep_mha, pieces: None };
        let index_topk = config.index_topk as u32;
        let cx = Cx {
            class: class.clone(),
            target_fp8: false,
            bf16_weights: false,
            blocks: 0,
            block_bytes: 0,
            boxes: false,
            beside: false,
            teams: Default::default(),
            numerics,
            index_topk,
        };
        let mut graph = graph.clone();
        if let Err(e) = passes::run(&mut graph, &cx, &mut |_, _, _| {}) {
            panic!("{e}");
        }
        graphs.push((class, graph));
    }
    let scheduler = Scheduler { choose: &|shape, class| Schedule::heuristic(shape, class.max.0[0]), fits: &|_| true };
    match plan(&graphs, &scheduler) {
        Ok(plan) => check(config, numerics, plan),
        Err(PlanError::Kernel { source: KernelError::Unsupported { .. } | KernelError::Alias { .. }, .. }) => {}
        Err(e) => panic!("{e}"),
    }
}

/// What a plan becomes passes the check of artifacts, whatever the code is.
fn check(config: &ModelConfig, numerics: Numerics, plan: Plan) {
    let kernels = plan.kernels.iter().map(|k| {
        assert_eq!(tile::verify(&k.program), []);
        let view = |p: &tile::Param| k.program.view(p.value).expect("verified: parameters are views").clone();
        let param = |p: &tile::Param| ParamEntry { name: p.name.clone(), view: view(p), write: p.access.writes() };
        KernelEntry {
            name: k.program.name.clone(),
            what: k.what.clone(),
            entry: 0,
            code_bytes: 1,
            scratch_bytes: 0,
            grid: k.program.grid.clone(),
            params: k.program.params.iter().map(param).collect(),
            schedule: k.schedule.clone(),
            work: Default::default(),
            gpu: None,
        }
    });
    let header = Header {
        entries: Vec::new(),
        library: None,
        compiler: String::new(),
        target: String::new(),
        features: Vec::new(),
        numerics,
        model: ModelFacts {
            model_type: String::new(),
            config_hash: String::new(),
            vocab: config.vocab as u32,
            layers: config.layers as u32,
            index_topk: config.index_topk as u32,
            bos: config.bos,
            eos: config.eos.clone(),
            max_context: config.max_position_embeddings as u32,
            ranks: 1,
            rank: 0,
        },
        kernels: kernels.collect(),
        weights: plan.weights,
        states: plan.states,
        steps: plan.steps,
        sections: vec![Section { name: "code".into(), offset: 0, bytes: 1, hash: String::new() }],
    };
    if let Err(problems) = header.check() {
        panic!("{}", problems.join("\n"));
    }
}
