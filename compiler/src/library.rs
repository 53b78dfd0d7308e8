//! Kernel libraries: operations of sparse attention as entry points that other programs call on their own memory.
//!
//! Each operation is a graph of the same ops that a model is made of, whose arguments the caller gives. It takes the model's way
//! down: passes, kernels, plan, target. So what is gained for a model is gained here, and the other way round.
//!
//! | operation | arguments | results |
//! |---|---|---|
//! | `paged_logits` | `q [T, Hi, Di]` e4m3, `weights [T, Hi]` f32, index `keys` pages, `ends [T]`, `page_table [S, P]` | `logits [T, C]` f32 |
//! | `ragged_logits` | `q`, `weights`, `keys [C, Di]` e4m3, `keys_scales [C, 1]` f32, `starts [T]`, `ends [T]` | `logits [T, C]` |
//! | `topk_decode` | `logits [T, C]`, `ends [T]` | `selected [T, k]` |
//! | `topk_prefill` | `logits [T, C]`, `starts [T]`, `ends [T]` | `selected [T, k]` |
//! | `mla_decode` | `q [T, H, L + R]` bf16, latent `cache` pages, `selected [T, k]` slots | `out [T, H, L]` bf16, `lse [T, H]` |
//! | `mla_prefill` | `q`, `kv [C, L + R]` bf16, `selected [T, k]` rows | `out`, `lse`, `max_logits [T, H]` |
//! | `decode` | `index_q`, `weights`, index `keys`, `ends`, `page_table`, `q`, latent `cache` | `out`, `lse` |
//! | `prefill` | `index_q`, `weights`, `keys`, `keys_scales`, `starts`, `ends`, `q`, `kv` | `out`, `lse` |
//!
//! Integers are i32. `T` tokens; where there is a page table, `queries` of each of `S` sequences, in order. `logits[t, s]` is
//! `scale_s Σ_h max(q_h · k_s, 0) weights_h` for `s` below `ends[t]` (from `starts[t]` on), and unspecified elsewhere. A selection is
//! exact, ascending, the lowest column first among equals, −1 behind its end. `lse` is the natural logarithm of `Σ exp(scale · score)`;
//! where nothing is selected `out` is 0, `lse` +inf and `max_logits` −inf; −1 and what is outside the cache select nothing.
//!
//! **Shape classes.** An operation is compiled for small, middle and large numbers of tokens ([`SEQUENCES`], [`TOKENS`]); a call
//! takes the first class that admits it.

use crate::compile::{self, CompileError, Compiled, Event};
use crate::passes::{self, Class};
use crate::plan::entry::{Function, plan_entries};
use crate::plan::{self};
use dsc_ir::artifact::{LibraryFacts, ModelFacts, Numerics, Pieces};
use dsc_ir::graph::{Argument, Graph, Op, PAGE_TOKENS, Quant, StateFormat, TensorType, Value, ValueType};
use dsc_ir::schedule::{Rule, Schedule};
use dsc_ir::{DType, Extent, Sym, SymValues};
use dsc_targets::{Target, TargetOptions};
use std::collections::BTreeMap;
use std::time::Instant;

/// Softmax scale of DeepSeek-V3.2: `192^-0.5 (0.1 ln 40 + 1)^2`.
pub const V32_SCALE: f32 = 0.135_233_78;
/// Sequences that decoding takes at most, by class.
pub const SEQUENCES: [u32; 10] = [1, 2, 4, 8, 16, 32, 64, 96, 128, 1024];
/// Tokens that prefill takes at most, by class. The first is so small that a matrix of its scores has less than 64 MiB.
pub const TOKENS: [u32; 2] = [64, 16384];
/// How scores and selection of a prefill's chain are made: scores of a piece are a matrix in memory, 128 MiB with 32K columns or more. Attention
/// follows, of all tokens. (Scores and selection in one kernel need no matrix, and take a fifth longer.)
pub const PIECES: Pieces = Pieces { tokens: 2048, bytes: 128 << 20 };
/// Pages a cache may have.
const MAX_PAGES: u32 = 1 << 24;

/// What to compile.
#[derive(Clone, Debug)]
pub struct Options {
    /// Target name.
    pub target: String,
    /// What the target is told.
    pub codegen: TargetOptions,
    /// Dims and formats.
    pub facts: LibraryFacts,
    /// Schedules to use instead of the target's.
    pub schedules: Vec<Rule>,
}

/// The dims of DeepSeek-V3.2 on one rank.
pub fn v32() -> LibraryFacts {
    LibraryFacts {
        kind: "dsa".into(),
        heads: 128,
        index_heads: 64,
        index_dim: 128,
        latent: 512,
        rope: 64,
        topk: 2048,
        scale: V32_SCALE,
        queries: vec![1, 2],
        max_context: 163_840,
        fp8_cache: true,
    }
}

/// Compiles a kernel library.
///
/// # Errors
/// [`CompileError::Option`] for dims that cannot be; else faults of the compiler or limits of the target.
pub fn compile(options: &Options, observe: &mut dyn FnMut(Event)) -> Result<Compiled, CompileError> {
    let target = dsc_targets::target_with(&options.target, &options.codegen)?;
    compile_for(&*target, options, observe)
}

/// [`compile()`] for a target that need not have a name.
///
/// # Errors
/// As [`compile()`].
pub fn compile_for(
    target: &dyn Target,
    options: &Options,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let facts = &options.facts;
    check(facts).map_err(CompileError::Option)?;
    let mut functions = functions(facts);
    for function in &mut functions {
        if target.blocks() == 0 {
            // There a chain is one kernel, which keeps no matrix.
            function.pieces = None;
        }
        let cx = compile::context(target, function.class.clone(), Numerics::Deployed, true, facts.topk);
        let class = function.class.name.clone();
        passes::run(&mut function.graph, &cx, &mut |name, graph, took| {
            observe(Event::Pass { class: &class, name, graph, took });
        })?;
    }
    let stage = Instant::now();
    let choose = |shape: &crate::kernels::KernelShape, class: &Class| Schedule {
        symbols_by_value: true,
        // Chains of few, short launches: their blocks would wait on multiprocessors that those before them want.
        late: true,
        ..compile::schedule(target, &options.schedules, shape, class)
    };
    let scheduler = plan::Scheduler { choose: &choose, fits: &|kernel| target.fits(kernel) };
    let mut plan = plan_entries(&functions, &scheduler)?;
    for entry in &mut plan.entries {
        if let Some((_, class)) = entry.class.split_once('/') {
            entry.class = class.to_owned();
        }
    }
    observe(Event::Stage { name: "plan", took: stage.elapsed() });
    let graphs = functions.into_iter().map(|f| (f.class, f.graph)).collect();
    compile::finish(graphs, plan, (model_facts(facts), Some(facts.clone())), Numerics::Deployed, target, observe)
}

fn model_facts(facts: &LibraryFacts) -> ModelFacts {
    ModelFacts {
        model_type: format!("{} kernels", facts.kind),
        config_hash: String::new(),
        vocab: 1,
        layers: 0,
        index_topk: facts.topk,
        bos: None,
        eos: Vec::new(),
        max_context: facts.max_context,
        ranks: 1,
        rank: 0,
    }
}

fn check(f: &LibraryFacts) -> Result<(), String> {
    let ranges = [
        ("heads", f.heads, 1..=1024),
        ("index heads", f.index_heads, 1..=256),
        ("index dim", f.index_dim, 16..=512),
        ("latent dim", f.latent, 16..=4096),
        ("rope dim", f.rope, 2..=1024),
        ("top-k", f.topk, 1..=16384),
        ("the longest context", f.max_context, 64..=1 << 24),
    ];
    for (what, n, range) in ranges {
        if !range.contains(&n) {
            return Err(format!("{what} of {n} is outside {}..={}", range.start(), range.end()));
        }
    }
    if !f.index_dim.is_multiple_of(16) || !f.latent.is_multiple_of(16) || !f.rope.is_multiple_of(2) {
        return Err("index and latent dims are multiples of 16, the rope dim of 2".into());
    }
    if f.fp8_cache && !f.latent.is_multiple_of(StateFormat::GROUP) {
        return Err(format!("an fp8 cache has a scale for each 128 elements, which do not divide {}", f.latent));
    }
    if f.queries.is_empty() || f.queries.iter().any(|q| !(1..=8).contains(q)) {
        return Err(format!("{:?} query tokens a sequence: give some of 1 to 8", f.queries));
    }
    if !f.scale.is_finite() || f.scale <= 0.0 {
        return Err(format!("a softmax scale of {}", f.scale));
    }
    Ok(())
}

/// Every operation for every class.
fn functions(facts: &LibraryFacts) -> Vec<Function> {
    let mut all = Vec::new();
    for &queries in &facts.queries {
        let per_sequence = vec![(Extent::from(Sym::T), Extent::from(Sym::S).times(queries))];
        for seqs in SEQUENCES {
            let class = |op: &str| class(facts, op, &decode_name(seqs, queries), (seqs * queries, seqs));
            let mut add = |op: &str, graph: Graph, relations: Vec<(Extent, Extent)>| {
                all.push(Function { op: op.into(), class: class(op), graph, relations, pieces: None });
            };
            add("paged_logits", paged_logits(facts), per_sequence.clone());
            let mut relations = per_sequence.clone();
            relations.push((Sym::C.into(), Extent::from(Sym::P).times(PAGE_TOKENS)));
            add("decode", decode(facts), relations);
        }
    }
    for tokens in SEQUENCES {
        let class = |op: &str| class(facts, op, &decode_name(tokens, 1), (tokens, tokens));
        for (op, graph) in [("topk_decode", topk(facts, false)), ("mla_decode", mla_decode(facts))] {
            all.push(Function { op: op.into(), class: class(op), graph, relations: Vec::new(), pieces: None });
        }
    }
    for tokens in TOKENS {
        let operations = [
            ("ragged_logits", ragged_logits(facts)),
            ("topk_prefill", topk(facts, true)),
            ("mla_prefill", mla_prefill(facts)),
            ("prefill", prefill(facts)),
        ];
        for (op, graph) in operations {
            let mut class = class(facts, op, &format!("prefill{tokens}"), (tokens, 1));
            let pieces = (op == "prefill" && tokens > PIECES.tokens).then_some(PIECES);
            class.pieces = pieces;
            all.push(Function { op: op.into(), class, graph, relations: Vec::new(), pieces });
        }
    }
    all.sort_by(|a, b| a.op.cmp(&b.op));
    all
}

fn decode_name(seqs: u32, queries: u32) -> String {
    if queries == 1 { format!("decode{seqs}") } else { format!("decode{seqs}x{queries}") }
}

fn class(facts: &LibraryFacts, op: &str, name: &str, (tokens, seqs): (u32, u32)) -> Class {
    let pages = facts.max_context.div_ceil(PAGE_TOKENS);
    let max = SymValues::default()
        .with(Sym::T, tokens)
        .with(Sym::S, seqs)
        .with(Sym::P, pages)
        .with(Sym::L, 1)
        .with(Sym::N, MAX_PAGES)
        .with(Sym::C, pages * PAGE_TOKENS);
    Class { name: format!("{op}/{name}"), max, keep_mha: false, pieces: None }
}

/// A graph on the way.
#[derive(Default)]
struct Make(Graph);

impl Make {
    fn arg(&mut self, name: &str, ty: ValueType) -> Value {
        let number = self.0.args.len() as u32;
        self.0.args.push(Argument { name: name.into(), ty: ty.clone() });
        Value { node: self.0.add(name, Op::Arg(number), &[], vec![ty]), output: 0 }
    }

    fn tensor(&mut self, name: &str, dtype: DType, shape: &[Extent]) -> Value {
        self.arg(name, ValueType::Tensor(TensorType::plain(dtype, shape)))
    }

    fn ints(&mut self, name: &str) -> Value {
        self.tensor(name, DType::I32, &[Sym::T.into()])
    }

    fn page_table(&mut self) -> Value {
        self.tensor("page_table", DType::I32, &[Sym::S.into(), Sym::P.into()])
    }

    /// Queries and head weights of the indexer.
    fn index_queries(&mut self, name: &str, f: &LibraryFacts) -> [Value; 2] {
        let heads = Extent::from(f.index_heads);
        let q = self.tensor(name, DType::E4m3, &[Sym::T.into(), heads, f.index_dim.into()]);
        [q, self.tensor("weights", DType::F32, &[Sym::T.into(), heads])]
    }

    /// Index keys as a matrix of codes, and a scale a row.
    fn key_matrix(&mut self, f: &LibraryFacts) -> Value {
        let quant = Quant { block: [1, f.index_dim], pow2: false };
        self.arg("keys", ValueType::Tensor(TensorType::quant(quant, &[Sym::C.into(), f.index_dim.into()])))
    }

    fn logits(&mut self, inputs: &[Value]) -> Value {
        let ty = TensorType::plain(DType::F32, &[Sym::T.into(), Sym::C.into()]);
        self.0.add1("logits", Op::IndexerLogits, inputs, ty)
    }

    fn topk(&mut self, f: &LibraryFacts, inputs: &[Value]) -> Value {
        let ty = TensorType::plain(DType::I32, &[Sym::T.into(), f.topk.into()]);
        self.0.add1("topk", Op::TopK { k: f.topk }, inputs, ty)
    }

    /// The two parts of queries, as views.
    fn queries(&mut self, f: &LibraryFacts) -> [Value; 2] {
        let shape = |n: u32| [Sym::T.into(), Extent::from(f.heads), n.into()];
        let q = self.tensor("q", DType::Bf16, &shape(f.latent + f.rope));
        let mut part = |name: &str, start: u32, len: u32| {
            let ty = TensorType::plain(DType::Bf16, &shape(len));
            self.0.add1(name, Op::SliceLast { start, len }, &[q], ty)
        };
        [part("q_latent", 0, f.latent), part("q_rope", f.latent, f.rope)]
    }

    /// Attention over a selection, with so many results.
    fn attend(&mut self, f: &LibraryFacts, inputs: &[Value], results: usize) {
        let (t, heads) = (Extent::from(Sym::T), Extent::from(f.heads));
        let each = ValueType::Tensor(TensorType::plain(DType::F32, &[t, heads]));
        let mut types = vec![ValueType::Tensor(TensorType::plain(DType::Bf16, &[t, heads, f.latent.into()]))];
        types.resize(results, each);
        let node = self.0.add("attention", Op::MqaAttention { scale: f.scale, narrow: true }, inputs, types);
        for (output, name) in ["out", "lse", "max_logits"].into_iter().take(results).enumerate() {
            self.result(name, Value { node, output: output as u32 });
        }
    }

    fn result(&mut self, name: &str, value: Value) {
        self.0.outputs.push((name.into(), value));
    }
}

fn index_cache(f: &LibraryFacts) -> ValueType {
    ValueType::State(StateFormat::IndexFp8 { dim: f.index_dim })
}

fn latent_cache(f: &LibraryFacts) -> ValueType {
    let (latent, rope) = (f.latent, f.rope);
    ValueType::State(match f.fp8_cache {
        true => StateFormat::LatentFp8 { latent, rope },
        false => StateFormat::Latent { latent, rope, dtype: DType::Bf16 },
    })
}

fn paged_logits(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [q, weights] = make.index_queries("q", f);
    let keys = make.arg("keys", index_cache(f));
    let (ends, pages) = (make.ints("ends"), make.page_table());
    let logits = make.logits(&[q, weights, keys, ends, pages]);
    make.result("logits", logits);
    make.0
}

fn ragged_logits(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [q, weights] = make.index_queries("q", f);
    let keys = make.key_matrix(f);
    let (starts, ends) = (make.ints("starts"), make.ints("ends"));
    let logits = make.logits(&[q, weights, keys, starts, ends]);
    make.result("logits", logits);
    make.0
}

fn topk(f: &LibraryFacts, starts: bool) -> Graph {
    let mut make = Make::default();
    let mut inputs = vec![make.tensor("logits", DType::F32, &[Sym::T.into(), Sym::C.into()])];
    if starts {
        inputs.push(make.ints("starts"));
    }
    inputs.push(make.ints("ends"));
    let selected = make.topk(f, &inputs);
    make.result("selected", selected);
    make.0
}

fn selection(make: &mut Make, f: &LibraryFacts) -> Value {
    make.tensor("selected", DType::I32, &[Sym::T.into(), f.topk.into()])
}

fn kv_matrix(make: &mut Make, f: &LibraryFacts) -> Value {
    make.tensor("kv", DType::Bf16, &[Sym::C.into(), (f.latent + f.rope).into()])
}

fn mla_decode(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [latent, rope] = make.queries(f);
    let cache = make.arg("cache", latent_cache(f));
    let selected = selection(&mut make, f);
    make.attend(f, &[latent, rope, cache, selected], 2);
    make.0
}

fn mla_prefill(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [latent, rope] = make.queries(f);
    let kv = kv_matrix(&mut make, f);
    let selected = selection(&mut make, f);
    make.attend(f, &[latent, rope, kv, selected], 3);
    make.0
}

fn decode(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [index_q, weights] = make.index_queries("index_q", f);
    let keys = make.arg("keys", index_cache(f));
    let (ends, pages) = (make.ints("ends"), make.page_table());
    let [latent, rope] = make.queries(f);
    let cache = make.arg("cache", latent_cache(f));
    let logits = make.logits(&[index_q, weights, keys, ends, pages]);
    let selected = make.topk(f, &[logits, ends]);
    make.attend(f, &[latent, rope, cache, selected, pages], 2);
    make.0
}

fn prefill(f: &LibraryFacts) -> Graph {
    let mut make = Make::default();
    let [index_q, weights] = make.index_queries("index_q", f);
    let keys = make.key_matrix(f);
    let (starts, ends) = (make.ints("starts"), make.ints("ends"));
    let [latent, rope] = make.queries(f);
    let kv = kv_matrix(&mut make, f);
    let logits = make.logits(&[index_q, weights, keys, starts, ends]);
    let selected = make.topk(f, &[logits, starts, ends]);
    make.attend(f, &[latent, rope, kv, selected], 2);
    make.0
}

/// The graph of each operation before all passes: what it computes.
pub fn operations(facts: &LibraryFacts) -> BTreeMap<&'static str, Graph> {
    BTreeMap::from([
        ("paged_logits", paged_logits(facts)),
        ("ragged_logits", ragged_logits(facts)),
        ("topk_decode", topk(facts, false)),
        ("topk_prefill", topk(facts, true)),
        ("mla_decode", mla_decode(facts)),
        ("mla_prefill", mla_prefill(facts)),
        ("decode", decode(facts)),
        ("prefill", prefill(facts)),
    ])
}

#[cfg(test)]
#[path = "library/tests.rs"]
mod tests;
