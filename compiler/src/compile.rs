//! The whole way down: model folder to artifact.
//!
//! ```text
//! config.json -> front::model::build -> Graph        (one a shape class)
//!             -> passes::run         -> fused Graph
//!             -> plan::plan          -> kernels (tile programs), launches, memory
//!             -> Target::compile     -> machine code
//!             -> artifact::write     -> bytes
//! ```

use crate::front::config::{ConfigError, ModelConfig};
use crate::front::model::{self, BuildOptions, Shard};
use crate::passes::{self, Class, Cx, PassError};
use crate::plan::{self, Plan, PlanError};
use dsc_ir::artifact::{self, Header, KernelEntry, LibraryFacts, ModelFacts, Numerics, ParamEntry, Pieces};
use dsc_ir::graph::Graph;
use dsc_ir::schedule::{KernelShape, Rule, Schedule};
use dsc_ir::{Sym, SymValues};
use dsc_runtime::checkpoint::Checkpoint;
use dsc_targets::{Kernel, Module, Target, TargetError, TargetOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to compile for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Target name, such as `cpu`.
    pub target: String,
    /// Numerics of the kernels.
    pub numerics: Numerics,
    /// Longest context in tokens; the config's own limit if none.
    pub max_context: Option<u32>,
    /// Tokens a prefill step takes at most; longer prompts go in chunks. The target's choice, as far as contexts are as long, if none.
    pub chunk: Option<u32>,
    /// Sequences a decode step takes at most; larger batches go in several steps. The target's choice if none.
    pub max_batch: Option<u32>,
    /// Which part of the model, if several devices run it together.
    pub shard: Shard,
    /// Only these layers of the model, for measurements.
    pub layers: Option<Vec<usize>>,
    /// What the target is told: text to keep, tools to use.
    pub codegen: TargetOptions,
    /// Changes of the target's schedules.
    pub schedules: Vec<Rule>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            target: "cpu".into(),
            numerics: Numerics::Deployed,
            max_context: None,
            chunk: None,
            max_batch: None,
            shard: Shard::default(),
            layers: None,
            codegen: TargetOptions::default(),
            schedules: Vec::new(),
        }
    }
}

/// Why a model could not be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The model's config is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Weights and config disagree.
    #[error("the weights in {dir} do not fit its config.json:\n{problems}")]
    Weights {
        /// The folder.
        dir: PathBuf,
        /// One line a problem.
        problems: String,
    },
    /// The weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] dsc_runtime::checkpoint::CheckpointError),
    /// An option is out of range.
    #[error("{0}")]
    Option(String),
    /// A pass broke the graph: a fault of the compiler.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// No plan: a fault of the compiler.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The target refused.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The artifact would not load: a fault of the compiler.
    #[error("the artifact would not pass its own check:\n{0}")]
    Artifact(String),
}

/// What observers are told while compiling.
pub enum Event<'a> {
    /// A pass of a class has run.
    Pass {
        /// The shape class.
        class: &'a str,
        /// The pass.
        name: &'a str,
        /// The graph after it.
        graph: &'a Graph,
        /// How long it took.
        took: Duration,
    },
    /// A stage other than a pass has ended.
    Stage {
        /// Its name.
        name: &'a str,
        /// How long it took.
        took: Duration,
    },
}

/// A compiled model.
pub struct Compiled {
    /// The artifact's description.
    pub header: Header,
    /// The artifact's bytes.
    pub bytes: Vec<u8>,
    /// The plan, with its tile programs and schedules.
    pub plan: Plan,
    /// The graph of each class after all passes.
    pub graphs: Vec<(Class, Graph)>,
    /// The target's output.
    pub module: Module,
}

/// Compiles the model in `dir`. If weights are there, their names, types and shapes are checked first.
pub fn compile_dir(dir: &Path, options: &Options, observe: &mut dyn FnMut(Event)) -> Result<Compiled, CompileError> {
    let target = dsc_targets::target_with(&options.target, &options.codegen)?;
    compile_dir_for(&*target, dir, options, observe)
}

/// [`compile_dir`] for a target that is at hand; what the options say of theirs is not looked at.
pub fn compile_dir_for(
    target: &dyn Target,
    dir: &Path,
    options: &Options,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let config = ModelConfig::read(dir)?;
    let path = dir.join("config.json");
    let text = std::fs::read(&path).map_err(|source| ConfigError::Io { path, source })?;
    let checkpoint = has_weights(dir).then(|| Checkpoint::open(dir)).transpose()?;
    let hash = blake3::hash(&text).to_hex();
    compile_for(target, &config, hash.as_str(), checkpoint.as_ref().map(|c| (dir, c)), options, observe)
}

/// Whether a folder has safetensors files to check against.
pub fn has_weights(dir: &Path) -> bool {
    dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
}

/// Compiles a model from its config and, if they are at hand, its weights and their folder (they are looked at, not taken along);
/// `config_hash` is the blake3 of its file, in hex.
pub fn compile(
    config: &ModelConfig,
    config_hash: &str,
    checkpoint: Option<(&Path, &Checkpoint)>,
    options: &Options,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let target = dsc_targets::target_with(&options.target, &options.codegen)?;
    compile_for(&*target, config, config_hash, checkpoint, options, observe)
}

/// [`compile`] for a target that need not have a name; what the options say of theirs is not looked at.
pub fn compile_for(
    target: &dyn Target,
    config: &ModelConfig,
    config_hash: &str,
    checkpoint: Option<(&Path, &Checkpoint)>,
    options: &Options,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let max_context = max_context(config, options)?;
    check_layers(config, options)?;
    options.shard.check(config, options.numerics).map_err(|e| CompileError::Option(format!("--tp: {e}")))?;
    let stage = Instant::now();
    let build = BuildOptions { numerics: options.numerics, layers: options.layers.clone(), max_context };
    let graph = model::build_rank(config, &build, options.shard);
    observe(Event::Stage { name: "build graph", took: stage.elapsed() });

    let bf16_weights = checkpoint.is_some_and(|(_, c)| dsc_runtime::weights::bf16_exact(&graph.weights, c));
    let mut graphs = Vec::new();
    for class in classes(config, options, max_context, target) {
        let mut graph = graph.clone();
        let cx = context(target, class.clone(), options.numerics, bf16_weights, config.index_topk as u32);
        passes::run(&mut graph, &cx, &mut |name, graph, took| {
            observe(Event::Pass { class: &class.name, name, graph, took });
        })?;
        graphs.push((class, graph));
    }
    let facts = facts(config, config_hash, options, max_context);
    lower(graphs, facts, options.numerics, (target, &options.schedules), checkpoint, observe)
}

/// What passes know when they compile for a target.
pub fn context(target: &dyn Target, class: Class, numerics: Numerics, bf16_weights: bool, index_topk: u32) -> Cx {
    Cx {
        class,
        target_fp8: target.multiplies_fp8(),
        bf16_weights,
        blocks: target.blocks(),
        block_bytes: target.block_bytes(),
        teams: target.teams(),
        boxes: target.copies_boxes(),
        beside: target.runs_beside(),
        numerics,
        index_topk,
    }
}

/// The target's schedule of such a kernel, as the rules change it.
pub(crate) fn schedule(target: &dyn Target, rules: &[Rule], shape: &KernelShape, class: &Class) -> Schedule {
    let tokens = class.max.get(Sym::T);
    Rule::applied(rules, target.schedule(shape, tokens), shape, tokens, &class.name)
}

/// The way from fused graphs, one a shape class, to an artifact; `rules` change the target's schedules. Weights that are at hand are compared with what the graphs want
/// before code is made.
pub fn lower(
    graphs: Vec<(Class, Graph)>,
    model: ModelFacts,
    numerics: Numerics,
    (target, rules): (&dyn Target, &[Rule]),
    checkpoint: Option<(&Path, &Checkpoint)>,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let stage = Instant::now();
    let scheduler = plan::Scheduler {
        choose: &|shape, class| schedule(target, rules, shape, class),
        fits: &|kernel| target.fits(kernel),
    };
    let plan = plan::plan(&graphs, &scheduler)?;
    observe(Event::Stage { name: "plan", took: stage.elapsed() });
    if let Some((dir, checkpoint)) = checkpoint {
        check_weights(dir, checkpoint, &plan)?;
    }
    finish(graphs, plan, (model, None), numerics, target, observe)
}

/// The way from a plan to an artifact; `graphs` is what was planned.
pub(crate) fn finish(
    graphs: Vec<(Class, Graph)>,
    plan: Plan,
    facts: (ModelFacts, Option<LibraryFacts>),
    numerics: Numerics,
    target: &dyn Target,
    observe: &mut dyn FnMut(Event),
) -> Result<Compiled, CompileError> {
    let stage = Instant::now();
    let kernels: Vec<Kernel> =
        plan.kernels.iter().map(|k| Kernel { program: k.program.clone(), schedule: k.schedule.clone() }).collect();
    let module = target.compile(&kernels)?;
    observe(Event::Stage { name: "generate code", took: stage.elapsed() });

    let stage = Instant::now();
    let mut header = header(facts, numerics, &plan, &module, target.name());
    let tile_text: String = plan.kernels.iter().map(|k| format!("// {}\n{}\n", k.what, k.program)).collect();
    let mut sections = vec![("code", module.code.as_slice()), ("tile", tile_text.as_bytes())];
    sections.extend(module.portable.as_deref().map(|asm| ("asm", asm)));
    let bytes = artifact::write(&mut header, &sections);
    header.check().map_err(|problems| CompileError::Artifact(problems.join("\n")))?;
    observe(Event::Stage { name: "write artifact", took: stage.elapsed() });
    Ok(Compiled { header, bytes, plan, graphs, module })
}

fn max_context(config: &ModelConfig, options: &Options) -> Result<u32, CompileError> {
    let limit = config.max_position_embeddings as u32;
    match options.max_context {
        Some(0) => Err(CompileError::Option("--max-context must be at least 1".into())),
        Some(n) if n > limit => Err(CompileError::Option(format!(
            "--max-context {n} is beyond what the model was made for, {limit} (`max_position_embeddings`): give at most that"
        ))),
        Some(n) => Ok(n),
        None => Ok(limit),
    }
}

/// The layers asked for must be there, each once, in the model's order.
fn check_layers(config: &ModelConfig, options: &Options) -> Result<(), CompileError> {
    let Some(layers) = &options.layers else { return Ok(()) };
    if let Some(layer) = layers.iter().find(|&&l| l >= config.layers) {
        return Err(CompileError::Option(format!(
            "there is no layer {layer}: the model has {}, numbered from 0",
            config.layers
        )));
    }
    if layers.is_empty() || layers.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(CompileError::Option(format!(
            "layers {layers:?} are not a choice of layers: give at least one, each once, in ascending order"
        )));
    }
    Ok(())
}

/// The shape classes of a model, the preferred first: the runtime takes the first that admits a step. A target that needs `blocks`
/// blocks at once has matrix units, whose tiles are made for a number of tokens: it has more classes.
fn classes(config: &ModelConfig, options: &Options, max_context: u32, target: &dyn Target) -> Vec<Class> {
    let class = |name: &str, tokens: u32, seqs: u32, context: u32, keep_mha: bool| Class {
        name: name.into(),
        max: SymValues::default()
            .with(Sym::T, tokens)
            .with(Sym::S, seqs)
            .with(Sym::P, max_context.div_ceil(dsc_ir::graph::PAGE_TOKENS))
            .with(Sym::L, tokens)
            .with(Sym::N, MAX_PAGES)
            .with(Sym::C, context),
        keep_mha,
        pieces: None,
    };
    let short = max_context.min(config.index_topk as u32);
    let chunk = options.chunk.unwrap_or_else(|| target.chunk().min(max_context));
    let batch = options.max_batch.unwrap_or(target.batch()).max(1);
    let usual = if target.blocks() > 0 { BATCHES } else { &BATCHES[..2] };
    let mut batches: Vec<(String, u32)> =
        usual.iter().filter(|b| b.1 <= batch).map(|&(name, most)| (name.into(), most)).collect();
    if batches.iter().all(|b| b.1 != batch) {
        batches.push((format!("decode{batch}"), batch));
    }
    let decode = |(name, most): (String, u32)| class(&name, most, most, max_context, false);
    let in_pieces = |class: Class| Class { pieces: target.selects_from_memory().then_some(PIECES), ..class };
    // Prompts of more tokens than a usual batch are for prefill, whatever else admits them.
    let (few, many): (Vec<_>, Vec<_>) = batches.into_iter().partition(|b| usual.iter().any(|u| b.1 <= u.1));
    let mut classes: Vec<Class> = few.into_iter().map(decode).collect();
    classes.push(class("prefill_short", chunk, 1, short, true));
    classes.push(in_pieces(class("prefill", chunk, 1, max_context, false)));
    classes.extend(many.into_iter().map(decode).map(in_pieces));
    classes
}

/// Classes of decode steps and how many sequences they take at most; the last for targets with matrix units.
const BATCHES: &[(&str, u32)] = &[("decode1", 1), ("decode", 16), ("decode_wide", 64)];

/// In what pieces scores of a chunk go to memory: of a matrix of 256 MiB, which with many heads is smaller than what attention makes behind it.
const PIECES: Pieces = Pieces { tokens: 2048, bytes: 256 << 20 };
/// Pages a cache may have: 2^24 pages are 2^30 tokens.
const MAX_PAGES: u32 = 1 << 24;

fn facts(config: &ModelConfig, config_hash: &str, options: &Options, max_context: u32) -> ModelFacts {
    ModelFacts {
        model_type: config.family.name().into(),
        config_hash: config_hash.into(),
        vocab: config.vocab as u32,
        layers: options.layers.as_ref().map_or(config.layers, Vec::len) as u32,
        index_topk: config.index_topk as u32,
        bos: config.bos,
        eos: config.eos.clone(),
        max_context,
        ranks: options.shard.ranks,
        rank: options.shard.rank,
    }
}

fn header(
    (model, library): (ModelFacts, Option<LibraryFacts>),
    numerics: Numerics,
    plan: &Plan,
    module: &Module,
    target: &str,
) -> Header {
    let kernels = plan.kernels.iter().zip(&module.kernels).map(|(planned, code)| {
        let program = &planned.program;
        let param = |p: &dsc_ir::tile::Param| ParamEntry {
            name: p.name.clone(),
            view: program.view(p.value).expect("verified: parameters are views").clone(),
            write: p.access.writes(),
        };
        KernelEntry {
            name: program.name.clone(),
            what: planned.what.clone(),
            entry: code.entry,
            code_bytes: code.code_bytes,
            scratch_bytes: code.scratch_bytes,
            grid: program.grid.clone(),
            params: program.params.iter().map(param).collect(),
            schedule: planned.schedule.clone(),
            work: planned.work.clone(),
            gpu: code.gpu.clone(),
        }
    });
    Header {
        compiler: env!("CARGO_PKG_VERSION").into(),
        target: target.into(),
        features: module.features.clone(),
        numerics,
        model,
        weights: plan.weights.clone(),
        states: plan.states.clone(),
        kernels: kernels.collect(),
        steps: plan.steps.clone(),
        library,
        entries: plan.entries.clone(),
        sections: Vec::new(),
    }
}

/// Compares every tensor that the weight map names with the checkpoint's headers.
fn check_weights(dir: &Path, checkpoint: &Checkpoint, plan: &Plan) -> Result<(), CompileError> {
    let problems = dsc_runtime::weights::check(&plan.weights, checkpoint);
    if problems.is_empty() {
        return Ok(());
    }
    let mut lines: Vec<String> = problems.iter().take(20).map(|p| format!("  {p}")).collect();
    if problems.len() > lines.len() {
        lines.push(format!("  ... and {} more", problems.len() - lines.len()));
    }
    Err(CompileError::Weights { dir: dir.to_owned(), problems: lines.join("\n") })
}
