//! A model opened for use, and sessions: sequences whose keys live in one paged cache.
//!
//! A request runs as one or more *device steps*. Each takes the longest prefix of the remaining tokens that some step of the
//! artifact admits, and runs the first that admits it; so long prompts come in chunks, and the way they are cut depends on the
//! request alone. Pages are handed out lowest first. Nothing depends on time or on the number of threads: the same requests
//! give the same bits.

use crate::artifact::Artifact;
use crate::checkpoint::Checkpoint;
use crate::cpu::CpuDevice;
use crate::device::{Bound, BoundLaunch, Buffer, Code, Device, LaunchTime, LaunchTimes, Vendor};
use crate::error::{CallError, DeviceError, Error, RequestError};
use crate::gpu::{self, GpuDevice};
use crate::inputs::{Feed, Layout};
use crate::limits::Limits;
use crate::sample::{SampleError, Sampler};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::{self, Weights};
use dsc_ir::artifact::{Arg, Header, Numerics, Step, Tap};
use dsc_ir::graph::{PAGE_TOKENS, StateFormat};
use dsc_ir::sample::Draw;
use dsc_ir::{DType, Sym, SymValues};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Context capacity when none is asked for, in tokens.
const DEFAULT_CONTEXT: u32 = 8192;

/// How a model is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Threads; 0 is one for each processor that the system grants.
    pub threads: usize,
    /// Tokens that the cache of a session holds, over all its sequences: rounded up to a multiple of 64. The longest context is
    /// this or the artifact's limit. None: 8192, or the artifact's limit if that is less.
    pub context_tokens: Option<u32>,
    /// Number of the GPU, as its driver counts, for artifacts that run on one.
    pub device: u32,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum WeightsFrom<'a> {
    /// A checkpoint folder.
    Folder(&'a Path),
    /// Made up from a seed, without files: for measurements.
    Random(u64),
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for WeightsFrom<'a> {
    fn from(folder: &'a P) -> WeightsFrom<'a> {
        WeightsFrom::Folder(folder.as_ref())
    }
}

/// Seconds that opening a model took, by phase.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Opening {
    /// Reading and checking the artifact.
    pub artifact_s: f64,
    /// Starting the device.
    pub device_s: f64,
    /// Loading kernels.
    pub code_s: f64,
    /// Making weights, and bringing them to the device.
    pub weights_s: f64,
}

/// An artifact and its weights, shared by sessions.
pub struct Model {
    artifact: Arc<Artifact>,
    weights: Arc<Weights>,
    /// The checkpoint folder, if there is one.
    weights_dir: Option<PathBuf>,
    threads: usize,
    pages: u32,
    /// The GPU with code and weights on it, if the artifact runs on one.
    gpu: Option<gpu::Loaded>,
    opening: Opening,
}

impl Model {
    /// Opens an artifact with its weights, on the device that it was compiled for.
    ///
    /// # Errors
    /// What [`Artifact::open`], [`open`](crate::device::open), [`Checkpoint::open`] and [`Weights::load`] say; [`RequestError::Context`] for a
    /// capacity that the artifact does not serve.
    pub fn open<'a>(artifact: &Path, weights: impl Into<WeightsFrom<'a>>, options: &Options) -> Result<Model, Error> {
        Model::open_with(artifact, weights, options, &|_, _| {})
    }

    /// As [`Model::open`]; `progress` is told the bytes of weights made and to be made.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_with<'a>(
        artifact: &Path,
        weights: impl Into<WeightsFrom<'a>>,
        options: &Options,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Model, Error> {
        let mut opening = Opening::default();
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();
        let artifact = Artifact::open(artifact)?;
        let header = artifact.header();
        if header.steps.is_empty() {
            return Err(CallError::NoModel { path: artifact.path().to_path_buf() }.into());
        }
        if header.model.ranks > 1 {
            let (rank, ranks) = (header.model.rank, header.model.ranks);
            return Err(DeviceError::Ranks { rank, ranks }.into());
        }
        let pages = capacity_pages(header, options)?;
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        // Refuse a machine that cannot run the artifact before reading gigabytes for it.
        let code = code_of(&artifact)?;
        opening.artifact_s = lap();
        let mut gpu = None;
        if let Some(vendor) = Vendor::of(&header.target) {
            let device = gpu.insert(GpuDevice::open(vendor, options.device, threads)?);
            opening.device_s = lap();
            device.load_code(header, code)?;
        } else {
            CpuDevice::new(1)?.load_code(header, code)?;
        }
        opening.code_s = lap();
        // Rope tables need a row for each position, and a cache of many sequences holds more tokens than one may have.
        let positions = (pages * PAGE_TOKENS).min(header.model.max_context);
        let from = weights.into();
        let mut weights = open_weights(header, from, positions)?;
        match &mut gpu {
            Some(device) => device.check_room(&weights, session_bytes(header, pages))?,
            None => weights.make(threads, progress)?,
        }
        let weights = Arc::new(weights);
        if let Some(device) = &mut gpu {
            device.load_weights(&weights, progress)?;
        }
        opening.weights_s = lap();
        Ok(Model {
            opening,
            gpu: gpu.map(|device| device.loaded()),
            artifact: Arc::new(artifact),
            weights,
            weights_dir: match from {
                WeightsFrom::Folder(dir) => Some(dir.to_path_buf()),
                WeightsFrom::Random(_) => None,
            },
            threads,
            pages,
        })
    }

    /// Opens an artifact with its weights in host memory, to be run by a device that the caller has: [`Model::session_on`].
    ///
    /// # Errors
    /// As [`Model::open`], but of no device.
    pub fn open_detached<'a>(
        artifact: &Path,
        weights: impl Into<WeightsFrom<'a>>,
        options: &Options,
    ) -> Result<Model, Error> {
        let artifact = Artifact::open(artifact)?;
        let header = artifact.header();
        let pages = capacity_pages(header, options)?;
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let from = weights.into();
        let mut weights = open_weights(header, from, (pages * PAGE_TOKENS).min(header.model.max_context))?;
        weights.make(threads, &|_, _| {})?;
        let weights_dir = match from {
            WeightsFrom::Folder(dir) => Some(dir.to_path_buf()),
            WeightsFrom::Random(_) => None,
        };
        let (artifact, weights) = (Arc::new(artifact), Arc::new(weights));
        Ok(Model { opening: Opening::default(), gpu: None, artifact, weights, weights_dir, threads, pages })
    }

    /// The artifact's description.
    pub fn header(&self) -> &Header {
        self.artifact.header()
    }

    /// The artifact.
    pub fn artifact(&self) -> &Artifact {
        &self.artifact
    }

    /// Weights as the kernels read them; in host memory if that is where kernels run.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// How long it took to open.
    pub fn opening(&self) -> Opening {
        self.opening
    }

    /// Bytes of device memory that weights and one session take by the plan.
    pub fn planned_bytes(&self) -> u64 {
        self.weights.total_bytes() + session_bytes(self.header(), self.pages)
    }

    /// Longest context of a sequence, in tokens.
    pub fn context_limit(&self) -> u32 {
        context_limit(self.header(), self.pages)
    }

    /// Tokens that the cache of a session holds.
    pub fn capacity_tokens(&self) -> u32 {
        self.pages * PAGE_TOKENS
    }

    /// The tokenizer beside the weights.
    ///
    /// # Errors
    /// As [`Tokenizer::load`]; made-up weights have none.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        let dir = self.weights_dir.as_deref().ok_or(TokenizerError::NoFolder)?;
        Ok(Tokenizer::load(dir)?)
    }

    /// A session on the device that the artifact was compiled for, with a cache of its own.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn session(&self) -> Result<Session, Error> {
        match &self.gpu {
            None => self.session_on(Box::new(CpuDevice::new(self.threads)?)),
            Some(loaded) => {
                let device = GpuDevice::sharing(loaded.clone(), self.threads)?;
                let weights: Vec<Buffer> = (0..self.weights.len()).map(Buffer).collect();
                Session::new(self, Box::new(device), &weights)
            }
        }
    }

    /// A session on another device, which must have no code yet.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn session_on(&self, mut device: Box<dyn Device>) -> Result<Session, Error> {
        device.load_code(self.header(), code_of(&self.artifact)?)?;
        let weights = device.load_weights(&self.weights, &|_, _| {})?;
        Session::new(self, device, &weights)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} from {}", self.header().model.model_type, self.artifact.path().display())
    }
}

/// The code sections of an artifact.
fn code_of(artifact: &Artifact) -> Result<Code<'_>, Error> {
    // The CPU's assembly is for people. A GPU's stands in for machine code where there is none, or none for the GPU.
    let portable = Vendor::of(&artifact.header().target).is_some() && artifact.header().section("asm").is_some();
    Ok(Code { native: artifact.section("code")?, portable: if portable { artifact.section("asm")? } else { &[] } })
}

fn open_weights(header: &Header, from: WeightsFrom<'_>, positions: u32) -> Result<Weights, Error> {
    match from {
        WeightsFrom::Random(seed) => Ok(Weights::random(&header.weights, seed, positions)?),
        WeightsFrom::Folder(dir) => {
            let checkpoint = Arc::new(Checkpoint::open(dir)?);
            if header.numerics == Numerics::Exact {
                weights::check_exact(&header.weights, &checkpoint)?;
            }
            Ok(Weights::open(&header.weights, &checkpoint, positions)?)
        }
    }
}

/// Bytes of a session's caches, logits and intermediate results.
fn session_bytes(header: &Header, pages: u32) -> u64 {
    let states: u64 = header.states.iter().map(|s| u64::from(pages) * u64::from(s.format.page_bytes())).sum();
    let rows = header.steps.iter().map(|s| s.max.get(Sym::L).min(pages * PAGE_TOKENS)).max().unwrap_or(0);
    let logits = u64::from(rows) * (u64::from(header.model.vocab) + 1) * 4;
    states + logits + header.steps.iter().map(|s| s.arena_bytes).max().unwrap_or(0)
}

fn capacity_pages(header: &Header, options: &Options) -> Result<u32, RequestError> {
    let most = header.model.max_context;
    let pages = match options.context_tokens {
        Some(0) => return Err(RequestError::Context { wanted: 0, limit: most, remedy: "give at least 1".into() }),
        Some(n) => n.div_ceil(PAGE_TOKENS),
        None => most.min(DEFAULT_CONTEXT).div_ceil(PAGE_TOKENS),
    };
    let limit = header.steps.iter().map(|s| s.max.get(Sym::N)).max().unwrap_or(0);
    if pages > limit || pages > i32::MAX as u32 / PAGE_TOKENS {
        let limit = limit.saturating_mul(PAGE_TOKENS);
        let remedy = "the artifact's kernels admit no larger cache; give a smaller `context_tokens`".into();
        return Err(RequestError::Context { wanted: u64::from(pages) * 64, limit, remedy });
    }
    Ok(pages)
}

fn context_limit(header: &Header, pages: u32) -> u32 {
    let steps = header.steps.iter().filter(|s| s.max.get(Sym::N) >= pages);
    let most = steps.map(|s| s.max.get(Sym::C).min(s.max.get(Sym::P).saturating_mul(PAGE_TOKENS))).max().unwrap_or(0);
    header.model.max_context.min(pages * PAGE_TOKENS).min(most)
}

/// A sequence of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(u64);

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct SequenceInput<'a> {
    /// The sequence they follow.
    pub seq: SeqId,
    /// The tokens; at least one.
    pub tokens: &'a [u32],
}

/// Which tokens' logits a step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted<'a> {
    /// Of the last token of each input, in their order.
    Last,
    /// Of every token, in the order of the inputs.
    All,
    /// Of these tokens, numbered over all inputs, in ascending order.
    Rows(&'a [u32]),
}

/// What a step gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// `[rows, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Rows of `logits`.
    pub rows: usize,
    /// Intermediate results by name, if they were asked for: one row a token.
    pub taps: BTreeMap<String, TapOutput>,
}

impl StepOutput {
    /// The logits of one row.
    pub fn row(&self, row: usize) -> &[f32] {
        let vocab = self.logits.len() / self.rows.max(1);
        &self.logits[row * vocab..(row + 1) * vocab]
    }
}

/// An intermediate result, `[tokens, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TapOutput {
    /// Columns.
    pub columns: usize,
    /// Rows one after another.
    pub data: TapData,
}

/// Elements of an intermediate result; smaller floats are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum TapData {
    /// Real numbers.
    F32(Vec<f32>),
    /// Integers.
    I32(Vec<i32>),
}

/// How long the launches of one step class took: a line of a profile.
#[derive(Clone, Debug)]
pub struct ProfileRow {
    /// The step class.
    pub step: String,
    /// Number of the launch in it.
    pub launch: usize,
    /// The graph node.
    pub node: String,
    /// The kernel.
    pub kernel: String,
    /// Its times.
    pub time: LaunchTime,
}

/// When a generation ends, and how tokens are chosen.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens generated at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Tokens that end the text; none: those of the model.
    pub eos: Option<Vec<u32>>,
    /// Whether to go on after one of them.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions { max_new_tokens: 128, sampler: Sampler::Greedy, eos: None, ignore_eos: false }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended the text: the last token is one of `eos`.
    Stop,
    /// `max_new_tokens` are there.
    Length,
    /// The context is full.
    Context,
    /// The callback asked for it.
    Cancelled,
}

/// A generated text.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Generation {
    /// The generated tokens; a token of `eos` that ended them is the last.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Seconds until the prompt was processed.
    pub prompt_s: f64,
    /// Tokens fed after the prompt, one at a time.
    pub decode_tokens: usize,
    /// Seconds they took.
    pub decode_s: f64,
}

impl Timings {
    /// Prompt tokens a second.
    pub fn prompt_tokens_per_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_s.max(1e-9)
    }

    /// Generated tokens a second, after the first.
    pub fn decode_tokens_per_s(&self) -> f64 {
        self.decode_tokens as f64 / self.decode_s.max(1e-9)
    }
}

/// Sequences with a common cache, on one device.
pub struct Session {
    artifact: Arc<Artifact>,
    device: Box<dyn Device>,
    steps: Vec<ReadyStep>,
    arena: Buffer,
    logits: Buffer,
    /// Chosen tokens, one a row of logits.
    tokens: Buffer,
    inputs: Buffer,
    states: Vec<Buffer>,
    pages: u32,
    /// Free pages, the lowest last.
    free: Vec<u32>,
    sequences: BTreeMap<SeqId, Sequence>,
    next_seq: u64,
    context_limit: u32,
    /// By step of the header; present while profiling.
    profile: Option<Vec<LaunchTimes>>,
    /// What the last request ran: steps of the header and their symbols.
    ran: Vec<(usize, SymValues)>,
}

/// A step of the header that admits the session's cache.
struct ReadyStep {
    index: usize,
    limits: SymValues,
    bound: Bound,
    layout: Layout,
}

#[derive(Default)]
struct Sequence {
    tokens: u32,
    pages: Vec<u32>,
}

/// The tokens of one device step.
struct Chunk<'a> {
    /// Index in `Session::steps`.
    step: usize,
    /// Pieces of inputs: sequence, tokens.
    pieces: Vec<(SeqId, &'a [u32])>,
    /// Wanted rows, numbered inside the chunk.
    rows: Vec<u32>,
    /// How each of them chooses its token; none where logits are wanted.
    draws: Vec<Draw>,
    syms: SymValues,
}

impl Session {
    /// On a device with the model's code and weights.
    fn new(model: &Model, mut device: Box<dyn Device>, weights: &[Buffer]) -> Result<Session, Error> {
        let artifact = Arc::clone(&model.artifact);
        let header = artifact.header();
        let pages = model.pages;
        let states = header.states.iter().map(|s| u64::from(pages) * u64::from(s.format.page_bytes()));
        let states = states.map(|bytes| device.alloc(bytes, "caches")).collect::<Result<Vec<_>, _>>()?;

        let context_limit = model.context_limit();
        let limits: Vec<(usize, SymValues)> = header
            .steps
            .iter()
            .enumerate()
            .filter_map(|(i, step)| Some((i, limits(step, pages, context_limit)?)))
            .collect();
        let most = |sym| limits.iter().map(|(_, l)| u64::from(l.get(sym))).max().unwrap_or(0);
        let arena_bytes = header.steps.iter().map(|s| s.arena_bytes).max().unwrap_or(0);
        let arena = device.alloc(arena_bytes, "intermediate results")?;
        let logits = device.alloc(most(Sym::L) * u64::from(header.model.vocab) * 4, "logits")?;
        let tokens = device.alloc(most(Sym::L) * 4, "tokens")?;
        let input_bytes = limits.iter().map(|(_, l)| Layout::new(l).bytes()).max().unwrap_or(0);
        let inputs = device.alloc(input_bytes, "step inputs")?;
        let address = |arg: &Arg, layout: &Layout| match *arg {
            Arg::Arena(at) => (arena, at),
            Arg::Weight(i, at) => (weights[i as usize], at),
            Arg::State(i) => (states[i as usize], 0),
            Arg::Input(input) => (inputs, layout.at(input)),
            Arg::Logits => (logits, 0),
            Arg::Tokens => (tokens, 0),
            // The header was checked: entry points alone have them.
            Arg::Caller(_) | Arg::Workspace(_) => (arena, 0),
        };
        let mut steps = Vec::new();
        for (index, limits) in limits {
            let layout = Layout::new(&limits);
            let bind = |l: &dsc_ir::artifact::Launch| BoundLaunch {
                kernel: l.kernel,
                node: l.node.clone(),
                args: l.args.iter().map(|arg| address(arg, &layout)).collect(),
            };
            let launches: Vec<BoundLaunch> = header.steps[index].launches.iter().map(bind).collect();
            steps.push(ReadyStep { index, limits, bound: device.bind(&launches, &limits)?, layout });
        }
        Ok(Session {
            device,
            steps,
            arena,
            logits,
            tokens,
            inputs,
            states,
            pages,
            free: (0..pages).rev().collect(),
            sequences: BTreeMap::new(),
            next_seq: 0,
            context_limit,
            profile: None,
            ran: Vec::new(),
            artifact,
        })
    }

    /// The artifact's description.
    pub fn header(&self) -> &Header {
        self.artifact.header()
    }

    /// The device, in a line.
    pub fn device(&self) -> String {
        self.device.describe()
    }

    /// Longest context of a sequence, in tokens.
    pub fn context_limit(&self) -> u32 {
        self.context_limit
    }

    /// A new, empty sequence.
    pub fn add_sequence(&mut self) -> SeqId {
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, Sequence::default());
        seq
    }

    /// A new sequence with the tokens of another, cached in pages of its own: the caches are copied, nothing is computed.
    ///
    /// # Errors
    /// [`RequestError::Sequence`], [`RequestError::Pages`]; [`Error::Device`].
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId, Error> {
        let Sequence { tokens, pages } = self.sequences.get(&seq).ok_or(RequestError::Sequence)?;
        let (tokens, from) = (*tokens, pages.clone());
        if from.len() > self.free.len() {
            return Err(RequestError::Pages { wanted: from.len() as u64, free: self.free.len() }.into());
        }
        let to: Vec<u32> = self.free.split_off(self.free.len() - from.len()).into_iter().rev().collect();
        let fork = self.add_sequence();
        self.sequences.insert(fork, Sequence { tokens, pages: to.clone() });
        // Runs of pages that follow one another on both sides are one copy.
        let places: Vec<(u32, u32)> = from.into_iter().zip(to).collect();
        let formats: Vec<StateFormat> = self.artifact.header().states.iter().map(|s| s.format).collect();
        for (format, &state) in formats.iter().zip(&self.states) {
            let page = u64::from(format.page_bytes());
            for run in places.chunk_by(|a, b| b.0 == a.0.wrapping_add(1) && b.1 == a.1.wrapping_add(1)) {
                let (from, to) = (u64::from(run[0].0) * page, u64::from(run[0].1) * page);
                self.device.copy(state, from, to, run.len() as u64 * page)?;
            }
        }
        Ok(fork)
    }

    /// Ends a sequence; its pages are free again.
    pub fn remove_sequence(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.remove(&seq) {
            self.release(sequence.pages);
        }
    }

    /// Tokens of a sequence; none if it does not exist.
    pub fn sequence_tokens(&self, seq: SeqId) -> Option<u32> {
        self.sequences.get(&seq).map(|s| s.tokens)
    }

    /// The index keys that a layer has cached for a sequence, one row a token; none where they are not plain f32.
    pub(crate) fn index_keys(&mut self, seq: SeqId, layer: usize) -> Result<Option<Vec<f32>>, Error> {
        let name = format!("layers.{layer}.index");
        let (header, sequence) = (self.artifact.header(), self.sequences.get(&seq).ok_or(RequestError::Sequence)?);
        let Some(state) = header.states.iter().position(|s| s.name == name) else { return Ok(None) };
        let format = header.states[state].format;
        let StateFormat::Index { dtype: DType::F32, .. } = format else { return Ok(None) };
        let bytes = sequence.tokens as usize * format.row_bytes() as usize;
        let mut data = vec![0; bytes.next_multiple_of(format.page_bytes() as usize)];
        for (page, data) in sequence.pages.iter().zip(data.chunks_exact_mut(format.page_bytes() as usize)) {
            self.device.read(self.states[state], u64::from(*page) * u64::from(format.page_bytes()), data)?;
        }
        let words = data[..bytes].chunks_exact(4);
        Ok(Some(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }

    /// Forgets all but the first `tokens` tokens of a sequence.
    pub fn truncate_sequence(&mut self, seq: SeqId, tokens: u32) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        sequence.tokens = sequence.tokens.min(tokens);
        let pages = sequence.pages.split_off(sequence.tokens.div_ceil(PAGE_TOKENS) as usize);
        self.release(pages);
    }

    fn release(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
        self.free.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// The device steps of the last request: which step of the header each ran, and its symbols.
    pub fn last_steps(&self) -> &[(usize, SymValues)] {
        &self.ran
    }

    /// How fast the device can be at best on so many bytes; see [`Device::limits`].
    pub fn limits(&mut self, working_set: u64) -> Option<Limits> {
        self.device.limits(working_set)
    }

    /// Bytes of device memory in use since the device was opened; see [`Device::memory_used`].
    pub fn memory_used(&mut self) -> Option<u64> {
        self.device.memory_used()
    }

    /// Starts to time every launch, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(vec![LaunchTimes::default(); self.header().steps.len()]);
    }

    /// Ends profiling; the launches that ran, by step and in their order.
    pub fn take_profile(&mut self) -> Vec<ProfileRow> {
        let Some(profile) = self.profile.take() else { return Vec::new() };
        let header = self.artifact.header();
        let rows = profile.iter().zip(&header.steps).flat_map(|(times, step)| {
            times.launches.iter().enumerate().filter(|(_, time)| time.runs > 0).map(|(i, &time)| ProfileRow {
                step: step.name.clone(),
                launch: i,
                node: step.launches[i].node.clone(),
                kernel: header.kernels[step.launches[i].kernel as usize].name.clone(),
                time,
            })
        });
        rows.collect()
    }

    /// Appends tokens to sequences and runs the model on them. On a request that is refused nothing has changed.
    ///
    /// # Errors
    /// [`Error::Request`] says what to change; [`Error::Device`] is not the request's fault.
    pub fn step(
        &mut self,
        inputs: &[SequenceInput<'_>],
        logits: LogitsWanted<'_>,
        taps: bool,
    ) -> Result<StepOutput, Error> {
        let wanted = wanted_rows(inputs, logits)?;
        self.check_request(inputs)?;
        let chunks = self.cut(inputs, &wanted, &[])?;
        let mut output = StepOutput::default();
        let elements = wanted.len().saturating_mul(self.header().model.vocab as usize);
        output.logits.try_reserve_exact(elements).map_err(|e| DeviceError::Memory {
            what: "logits (ask for fewer rows)",
            bytes: 4 * elements as u64,
            reason: e.to_string(),
        })?;
        self.ran.clear();
        for chunk in &chunks {
            self.ran.push((self.steps[chunk.step].index, chunk.syms));
            self.run_chunk(chunk, taps, &mut output)?;
        }
        Ok(output)
    }

    /// As [`Session::step`], and chooses the token that follows each input, by the sampler of the same place. The device does: no
    /// logits come to the host.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Sample`]. [`RequestError::Samplers`] if there are not as many samplers as inputs.
    pub fn choose(&mut self, inputs: &[SequenceInput<'_>], samplers: &[Sampler]) -> Result<Vec<u32>, Error> {
        if samplers.len() != inputs.len() {
            return Err(RequestError::Samplers { samplers: samplers.len(), inputs: inputs.len() }.into());
        }
        let wanted = wanted_rows(inputs, LogitsWanted::Last)?;
        self.check_request(inputs)?;
        let draw = |(input, sampler): (&SequenceInput<'_>, &Sampler)| {
            let before = self.sequence_tokens(input.seq).unwrap_or(0);
            sampler.draw(u64::from(before) + input.tokens.len() as u64)
        };
        let draws = inputs.iter().zip(samplers).map(draw).collect::<Result<Vec<_>, _>>()?;
        let mut tokens = Vec::with_capacity(inputs.len());
        let chunks = self.cut(inputs, &wanted, &draws)?;
        self.ran.clear();
        for chunk in &chunks {
            self.ran.push((self.steps[chunk.step].index, chunk.syms));
            let ReadyStep { index, bound, .. } = self.steps[chunk.step];
            self.feed(chunk)?;
            let launches = 0..self.artifact.header().steps[index].launches.len();
            self.device.run(bound, launches, &chunk.syms, self.profile.as_mut().map(|p| &mut p[index]))?;
            self.keep(chunk);
            // Chunks without rows do not wait: what follows them on the device does.
            let mut words = vec![0; 4 * chunk.rows.len()];
            if !words.is_empty() {
                self.device.read(self.tokens, 0, &mut words)?;
            }
            tokens.extend(words.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        let vocab = self.header().model.vocab;
        let token = |t: i32| u32::try_from(t).ok().filter(|&t| t < vocab).ok_or(SampleError::NoLogits(vocab as usize));
        Ok(tokens.into_iter().map(token).collect::<Result<_, _>>()?)
    }

    fn check_request(&self, inputs: &[SequenceInput<'_>]) -> Result<(), RequestError> {
        let vocab = self.header().model.vocab;
        let mut seen = std::collections::BTreeSet::new();
        let mut wanted = 0u64;
        for input in inputs {
            let sequence = self.sequences.get(&input.seq).ok_or(RequestError::Sequence)?;
            if !seen.insert(input.seq) {
                return Err(RequestError::Twice);
            }
            if let Some(place) = input.tokens.iter().position(|&t| t >= vocab) {
                return Err(RequestError::Token { token: input.tokens[place], place, vocab });
            }
            let context = u64::from(sequence.tokens) + input.tokens.len() as u64;
            if context > u64::from(self.context_limit) {
                return Err(RequestError::Context {
                    wanted: context,
                    limit: self.context_limit,
                    remedy: self.context_remedy(),
                });
            }
            wanted += context.div_ceil(u64::from(PAGE_TOKENS)).saturating_sub(sequence.pages.len() as u64);
        }
        if wanted > self.free.len() as u64 {
            return Err(RequestError::Pages { wanted, free: self.free.len() });
        }
        Ok(())
    }

    fn context_remedy(&self) -> String {
        if self.context_limit < self.header().model.max_context && self.context_limit == self.pages * PAGE_TOKENS {
            let most = self.header().model.max_context;
            format!("shorten it, or open the model with a larger `context_tokens` (the artifact serves {most})")
        } else {
            "shorten it, or compile the model with a larger `--max-context`".into()
        }
    }

    /// Cuts a checked request into device steps; `draws` has one for each row of `wanted`, or none at all.
    fn cut<'a>(
        &self,
        inputs: &[SequenceInput<'a>],
        wanted: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<Chunk<'a>>, RequestError> {
        let mut left: Vec<(SeqId, u32, &[u32])> =
            inputs.iter().map(|i| (i.seq, self.sequences[&i.seq].tokens, i.tokens)).collect();
        left.reverse(); // the next one last
        let (mut chunks, mut first) = (Vec::new(), 0u32);
        let (mut wanted, mut draws) = (wanted, draws);
        while let Some(&(_, start, _)) = left.last() {
            let best = self.steps.iter().map(|s| admitted(&s.limits, &left, first, wanted)).max().unwrap_or(0);
            let fits = |s: &ReadyStep| best > 0 && admitted(&s.limits, &left, first, wanted) == best;
            let Some(step) = self.steps.iter().position(fits) else {
                let remedy = "compile the model again with larger limits".into();
                return Err(RequestError::NoStep { context: start + 1, pages: self.pages, remedy });
            };
            let (mut pieces, mut tokens) = (Vec::new(), 0);
            let (mut context, mut pages) = (0, 0);
            while tokens < best
                && let Some(entry) = left.last_mut()
            {
                let (head, tail) = entry.2.split_at(entry.2.len().min((best - tokens) as usize));
                tokens += head.len() as u32;
                entry.1 += head.len() as u32;
                entry.2 = tail;
                context = context.max(entry.1);
                pages = pages.max(entry.1.div_ceil(PAGE_TOKENS));
                pieces.push((entry.0, head));
                if tail.is_empty() {
                    left.pop();
                }
            }
            let count = wanted.iter().take_while(|&&row| row < first + tokens).count();
            let rows: Vec<u32> = wanted[..count].iter().map(|row| row - first).collect();
            wanted = &wanted[count..];
            let (drawn, rest) = draws.split_at(count.min(draws.len()));
            draws = rest;
            first += tokens;
            let syms = SymValues::default()
                .with(Sym::T, tokens)
                .with(Sym::S, pieces.len() as u32)
                .with(Sym::P, pages)
                .with(Sym::L, count as u32)
                .with(Sym::N, self.pages)
                .with(Sym::C, context);
            chunks.push(Chunk { step, pieces, rows, draws: drawn.to_vec(), syms });
        }
        Ok(chunks)
    }

    fn run_chunk(&mut self, chunk: &Chunk<'_>, taps: bool, output: &mut StepOutput) -> Result<(), Error> {
        self.feed(chunk)?;
        let artifact = Arc::clone(&self.artifact);
        let ReadyStep { index, bound, .. } = self.steps[chunk.step];
        let step = &artifact.header().steps[index];
        let mut times = self.profile.as_mut().map(|p| &mut p[index]);
        let mut done = 0;
        if taps {
            let mut order: Vec<&Tap> = step.taps.iter().collect();
            order.sort_by_key(|tap| tap.after);
            for tap in order {
                let after = tap.after as usize;
                self.device.run(bound, done..after, &chunk.syms, times.as_deref_mut())?;
                done = after;
                let bytes = u64::from(chunk.syms.get(Sym::T)) * u64::from(tap.columns) * tap.dtype.bytes() as u64;
                let mut data = vec![0; bytes as usize];
                self.device.read(self.arena, tap.at, &mut data)?;
                append_tap(output.taps.entry(tap.name.clone()), tap, &data);
            }
        }
        self.device.run(bound, done..step.sampling as usize, &chunk.syms, times)?;
        let count = chunk.rows.len() * artifact.header().model.vocab as usize;
        let mut bytes = vec![0; count * 4];
        self.device.read(self.logits, 0, &mut bytes)?;
        output.logits.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        output.rows += chunk.rows.len();
        self.keep(chunk);
        Ok(())
    }

    /// Counts a chunk's tokens as those of their sequences.
    fn keep(&mut self, chunk: &Chunk<'_>) {
        for (seq, tokens) in &chunk.pieces {
            if let Some(sequence) = self.sequences.get_mut(seq) {
                sequence.tokens += tokens.len() as u32;
            }
        }
    }

    /// Takes pages for a chunk's tokens and uploads its inputs, in one copy.
    fn feed(&mut self, chunk: &Chunk<'_>) -> Result<(), Error> {
        let columns = chunk.syms.get(Sym::P) as usize;
        let mut feed = Feed { logit_rows: chunk.rows.clone(), draws: chunk.draws.clone(), ..Feed::default() };
        for (row, (seq, new)) in chunk.pieces.iter().enumerate() {
            let sequence = self.sequences.get_mut(seq).ok_or(RequestError::Sequence)?;
            let end = sequence.tokens + new.len() as u32;
            while sequence.pages.len() < end.div_ceil(PAGE_TOKENS) as usize {
                let none = RequestError::Pages { wanted: 1, free: 0 };
                sequence.pages.push(self.free.pop().ok_or(none)?);
            }
            feed.tokens.extend_from_slice(new);
            feed.seqs.extend(new.iter().map(|_| row as u32));
            for position in sequence.tokens..end {
                feed.positions.push(position);
                feed.slots
                    .push(sequence.pages[(position / PAGE_TOKENS) as usize] * PAGE_TOKENS + position % PAGE_TOKENS);
            }
            feed.page_table.extend(sequence.pages.iter().take(columns));
            feed.page_table.resize((row + 1) * columns, u32::MAX); // −1
        }
        self.device.upload(self.inputs, 0, &self.steps[chunk.step].layout.pack(&feed))?;
        Ok(())
    }

    /// Continues a prompt token by token; `on_token` is told each, and may stop the generation.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Sample`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let seq = self.add_sequence();
        let result = self.generate_in(seq, prompt, options, on_token);
        self.remove_sequence(seq);
        result
    }

    fn generate_in(
        &mut self,
        seq: SeqId,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let start = Instant::now();
        let input = [SequenceInput { seq, tokens: prompt }];
        let mut first = None;
        if options.max_new_tokens > 0 {
            first = self.choose(&input, &[options.sampler])?.pop();
        } else {
            self.step(&input, LogitsWanted::Rows(&[]), false)?;
        }
        let prompt_s = start.elapsed().as_secs_f64();
        let mut generation = self.continue_from(seq, first, options, on_token)?;
        generation.timings.prompt_s = prompt_s;
        Ok(generation)
    }

    /// Continues a sequence whose next token is `first`, which is told and fed as those that follow; none: the generation is over.
    /// All tokens of the sequence count as the prompt, whose time the caller knows.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn continue_from(
        &mut self,
        seq: SeqId,
        first: Option<u32>,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let prompt_tokens = self.sequence_tokens(seq).ok_or(RequestError::Sequence)? as usize;
        let eos = options.eos.clone().unwrap_or_else(|| self.header().model.eos.clone());
        let mut token_ids: Vec<u32> = Vec::new();
        let mut decode = Duration::ZERO;
        let mut next = first;
        let finish_reason = loop {
            let Some(token) = next.filter(|_| token_ids.len() < options.max_new_tokens) else {
                break FinishReason::Length;
            };
            let position = (prompt_tokens + token_ids.len()) as u64;
            token_ids.push(token);
            if on_token(token).is_break() {
                break FinishReason::Cancelled;
            }
            if !options.ignore_eos && eos.contains(&token) {
                break FinishReason::Stop;
            }
            if token_ids.len() == options.max_new_tokens {
                break FinishReason::Length;
            }
            if position >= u64::from(self.context_limit) || !self.can_append(seq) {
                break FinishReason::Context;
            }
            let start = Instant::now();
            next = self.choose(&[SequenceInput { seq, tokens: &[token] }], &[options.sampler])?.pop();
            decode += start.elapsed();
        };
        let timings = Timings {
            prompt_tokens,
            prompt_s: 0.0,
            decode_tokens: token_ids.len().saturating_sub(1),
            decode_s: decode.as_secs_f64(),
        };
        Ok(Generation { token_ids, finish_reason, timings })
    }

    /// Whether the cache has room for one more token of a sequence.
    fn can_append(&self, seq: SeqId) -> bool {
        let Some(s) = self.sequences.get(&seq) else { return false };
        !self.free.is_empty() || (s.tokens as usize) < s.pages.len() * PAGE_TOKENS as usize
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} sequences, {} of {} pages free, on {}",
            self.sequences.len(),
            self.free.len(),
            self.pages,
            self.device()
        )
    }
}

/// What a step may be run with in a session; none if it does not admit the session's cache.
fn limits(step: &Step, pages: u32, context: u32) -> Option<SymValues> {
    let max = |sym| step.max.get(sym);
    if max(Sym::N) < pages {
        return None;
    }
    let tokens = max(Sym::T).min(pages * PAGE_TOKENS);
    Some(
        SymValues::default()
            .with(Sym::T, tokens)
            .with(Sym::S, max(Sym::S).min(tokens))
            .with(Sym::P, max(Sym::P).min(pages))
            .with(Sym::L, max(Sym::L).min(tokens))
            .with(Sym::N, pages)
            .with(Sym::C, max(Sym::C).min(context)),
    )
}

/// How many of the next tokens a step admits. `left`: sequence, its length so far, new tokens, the next one last; `first`:
/// number of the next token; `wanted`: rows wanted from there on.
fn admitted(limits: &SymValues, left: &[(SeqId, u32, &[u32])], first: u32, wanted: &[u32]) -> u32 {
    let most_rows = limits.get(Sym::L) as usize;
    // The token after the last row that still fits may come too, up to the first row that does not.
    let by_rows = wanted.get(most_rows).map_or(u32::MAX, |row| row - first);
    let context = limits.get(Sym::C).min(limits.get(Sym::P).saturating_mul(PAGE_TOKENS));
    let most = limits.get(Sym::T).min(by_rows);
    let mut tokens = 0;
    for (_, length, new) in left.iter().rev().take(limits.get(Sym::S) as usize) {
        let fits = (new.len() as u32).min(context.saturating_sub(*length)).min(most - tokens);
        tokens += fits;
        if (fits as usize) < new.len() {
            break;
        }
    }
    tokens
}

/// The numbers of the wanted tokens, in ascending order.
fn wanted_rows(inputs: &[SequenceInput<'_>], logits: LogitsWanted<'_>) -> Result<Vec<u32>, RequestError> {
    let tokens: usize = inputs.iter().map(|i| i.tokens.len()).sum();
    if inputs.iter().any(|i| i.tokens.is_empty()) || tokens == 0 {
        return Err(RequestError::Empty);
    }
    if tokens > i32::MAX as usize {
        let remedy = "feed it in pieces".into();
        return Err(RequestError::Context { wanted: tokens as u64, limit: i32::MAX as u32, remedy });
    }
    match logits {
        LogitsWanted::All => Ok((0..tokens as u32).collect()),
        LogitsWanted::Last => {
            let ends = inputs.iter().scan(0, |end, i| {
                *end += i.tokens.len() as u32;
                Some(*end - 1)
            });
            Ok(ends.collect())
        }
        LogitsWanted::Rows(rows) => {
            let unsorted = rows.windows(2).find(|w| w[0] >= w[1]).map(|w| w[1]);
            match unsorted.or_else(|| rows.last().copied().filter(|&row| row as usize >= tokens)) {
                Some(row) => Err(RequestError::Row { row, tokens }),
                None => Ok(rows.to_vec()),
            }
        }
    }
}

fn append_tap(entry: std::collections::btree_map::Entry<'_, String, TapOutput>, tap: &Tap, bytes: &[u8]) {
    let integers = tap.dtype == DType::I32;
    let output = entry.or_insert_with(|| TapOutput {
        columns: tap.columns as usize,
        data: if integers { TapData::I32(Vec::new()) } else { TapData::F32(Vec::new()) },
    });
    let words = bytes.chunks_exact(tap.dtype.bytes());
    match (&mut output.data, tap.dtype) {
        (TapData::I32(data), _) => data.extend(words.map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        (TapData::F32(data), DType::F32) => data.extend(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        (TapData::F32(data), DType::Bf16) => {
            data.extend(words.map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()))
        }
        (TapData::F32(data), DType::F16) => data.extend(words.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())),
        (TapData::F32(data), _) => data.extend(words.map(|b| dsc_ir::dtype::e4m3_to_f32(b[0]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::tests::toy::{VOCAB, model};
    use dsc_ir::graph::StepInput;

    /// A model without kernels: the device below stands in for them.
    mod toy {
        use super::*;
        use crate::testing::{header, write_artifact, write_checkpoint};

        pub(super) const VOCAB: u32 = 11;

        pub(super) fn model(
            steps: &[(&str, [u32; 6])],
            context: Option<u32>,
        ) -> Result<(Model, tempfile::TempDir), Error> {
            let mut header = header();
            header.model.vocab = VOCAB;
            header.model.eos = vec![10];
            header.model.max_context = 1000;
            header.kernels.clear();
            let step = |(name, max): &(&str, [u32; 6])| Step {
                name: name.to_string(),
                max: SymValues(*max),
                arena_bytes: 1 << 16,
                launches: Vec::new(),
                collectives: Vec::new(),
                sampling: 0,
                taps: vec![Tap { name: "hidden.0".into(), after: 0, at: 64, columns: 2, dtype: DType::Bf16 }],
            };
            header.steps = steps.iter().map(step).collect();
            let dir = tempfile::tempdir().unwrap();
            write_checkpoint(dir.path());
            let path = write_artifact(dir.path(), &mut header, &[0xc3]);
            let options = Options { threads: 1, context_tokens: context, ..Options::default() };
            Model::open(&path, dir.path(), &options).map(|m| (m, dir))
        }
    }

    /// Keeps what it is given, and makes logits that depend on all tokens of the sequence, read through the page table.
    #[derive(Default)]
    struct FakeDevice {
        buffers: Vec<Vec<u8>>,
        names: Vec<&'static str>,
        cache: BTreeMap<u32, u32>,
        bound: Vec<Layout>,
        runs: Arc<std::sync::Mutex<Vec<SymValues>>>,
    }

    impl FakeDevice {
        fn buffer(&self, name: &str) -> usize {
            self.names.iter().position(|n| *n == name).unwrap()
        }
        fn input(&self, bound: Bound, input: StepInput) -> Vec<u32> {
            let bytes = &self.buffers[self.buffer("step inputs")][self.bound[bound.0].at(input) as usize..];
            bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
    }

    impl Device for FakeDevice {
        fn describe(&self) -> String {
            "fake".into()
        }
        fn load_code(&mut self, _: &Header, _: Code<'_>) -> Result<(), DeviceError> {
            Ok(())
        }
        fn load_weights(
            &mut self,
            _: &Arc<Weights>,
            _: &(dyn Fn(u64, u64) + Sync),
        ) -> Result<Vec<Buffer>, DeviceError> {
            Ok(vec![Buffer(usize::MAX); 8])
        }
        fn alloc(&mut self, bytes: u64, what: &'static str) -> Result<Buffer, DeviceError> {
            self.buffers.push(vec![0; bytes as usize]);
            self.names.push(what);
            Ok(Buffer(self.buffers.len() - 1))
        }
        fn upload(&mut self, buffer: Buffer, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
            self.buffers[buffer.0][at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }
        fn read(&mut self, buffer: Buffer, at: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
            bytes.copy_from_slice(&self.buffers[buffer.0][at as usize..at as usize + bytes.len()]);
            Ok(())
        }
        fn bind(&mut self, _: &[BoundLaunch], limits: &SymValues) -> Result<Bound, DeviceError> {
            self.bound.push(Layout::new(limits));
            Ok(Bound(self.bound.len() - 1))
        }
        fn run(
            &mut self,
            bound: Bound,
            _: std::ops::Range<usize>,
            syms: &SymValues,
            _: Option<&mut LaunchTimes>,
        ) -> Result<(), DeviceError> {
            self.runs.lock().unwrap().push(*syms);
            let [tokens, positions, seqs] =
                [StepInput::Tokens, StepInput::Positions, StepInput::Seqs].map(|i| self.input(bound, i));
            let [slots, table, rows, draws] =
                [StepInput::Slots, StepInput::PageTable, StepInput::LogitRows, StepInput::Draws]
                    .map(|i| self.input(bound, i));
            for t in 0..syms.get(Sym::T) as usize {
                self.cache.insert(slots[t], tokens[t]);
            }
            let (logits, chosen) = (self.buffer("logits"), self.buffer("tokens"));
            for (l, &row) in rows.iter().take(syms.get(Sym::L) as usize).enumerate() {
                let row = row as usize;
                let mut sum = 7u32;
                for p in 0..=positions[row] {
                    let page = table[(seqs[row] * syms.get(Sym::P) + p / PAGE_TOKENS) as usize];
                    sum = sum.wrapping_mul(31).wrapping_add(self.cache[&(page * PAGE_TOKENS + p % PAGE_TOKENS)]);
                }
                let row: Vec<f32> = (0..VOCAB).map(|v| (sum.wrapping_mul(v + 1) >> 8) as f32).collect();
                for (v, x) in row.iter().enumerate() {
                    let at = (l * VOCAB as usize + v) * 4;
                    self.buffers[logits][at..at + 4].copy_from_slice(&x.to_le_bytes());
                }
                let draw = Draw::from_bits([draws[3 * l], draws[3 * l + 1], draws[3 * l + 2]].map(|b| b as i32));
                let token = draw.pick(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()).map_or(-1, |t| t as i32);
                self.buffers[chosen][4 * l..4 * l + 4].copy_from_slice(&token.to_le_bytes());
            }
            Ok(())
        }
    }

    const STEPS: &[(&str, [u32; 6])] = &[
        ("decode", [4, 4, 1000, 4, 1 << 20, 1000]),
        ("prefill_short", [100, 1, 1000, 100, 1 << 20, 50]),
        ("prefill", [100, 1, 1000, 100, 1 << 20, 1000]),
    ];

    type Runs = Arc<std::sync::Mutex<Vec<SymValues>>>;

    fn session(context: u32) -> (Session, Runs, tempfile::TempDir) {
        let (model, dir) = model(STEPS, Some(context)).unwrap();
        let device = FakeDevice::default();
        let runs = Arc::clone(&device.runs);
        (model.session_on(Box::new(device)).unwrap(), runs, dir)
    }

    fn text(length: usize, salt: u32) -> Vec<u32> {
        (0..length as u32).map(|i| (i * 7 + salt) % VOCAB).collect()
    }

    #[test]
    fn chunks_do_not_change_results() {
        let (mut session, runs, _dir) = session(1024);
        let tokens = text(300, 3);
        let whole = session.add_sequence();
        let all = session.step(&[SequenceInput { seq: whole, tokens: &tokens }], LogitsWanted::All, true).unwrap();
        assert_eq!((all.rows, all.logits.len()), (300, 300 * VOCAB as usize));
        assert_eq!(all.taps["hidden.0"].columns, 2);
        assert_eq!(all.taps["hidden.0"].data, TapData::F32(vec![0.0; 600]));
        let lengths: Vec<u32> = runs.lock().unwrap().iter().map(|s| s.get(Sym::T)).collect();
        assert_eq!(lengths, [100, 100, 100, 100, 100, 100], "two runs a chunk: before and after the tap");

        let (mut at, split) = (0, session.add_sequence());
        for length in [1, 2, 63, 64, 65, 105] {
            let input = SequenceInput { seq: split, tokens: &tokens[at..at + length] };
            let last = session.step(&[input], LogitsWanted::Last, false).unwrap();
            at += length;
            assert_eq!(last.row(0), all.row(at - 1));
        }
        session.truncate_sequence(split, 70);
        let again = SequenceInput { seq: split, tokens: &tokens[70..80] };
        assert_eq!(session.step(&[again], LogitsWanted::Rows(&[0, 9]), false).unwrap().row(1), all.row(79));
    }

    #[test]
    fn batches_do_not_change_results() {
        let (mut session, runs, _dir) = session(512);
        let texts = [text(3, 1), text(70, 2), text(1, 3), text(2, 4), text(1, 5)];
        let alone: Vec<Vec<f32>> = texts
            .iter()
            .map(|tokens| {
                let seq = session.add_sequence();
                let out = session.step(&[SequenceInput { seq, tokens }], LogitsWanted::Last, false).unwrap();
                session.remove_sequence(seq);
                out.logits
            })
            .collect();
        runs.lock().unwrap().clear();
        let inputs: Vec<SequenceInput<'_>> =
            texts.iter().map(|tokens| SequenceInput { seq: session.add_sequence(), tokens }).collect();
        let together = session.step(&inputs, LogitsWanted::Last, false).unwrap();
        assert_eq!(together.rows, 5);
        for (i, logits) in alone.iter().enumerate() {
            assert_eq!(together.row(i), logits);
        }
        let shapes: Vec<(u32, u32)> = runs.lock().unwrap().iter().map(|s| (s.get(Sym::T), s.get(Sym::S))).collect();
        assert_eq!(shapes, [(4, 2), (69, 1), (4, 3)]);
    }

    #[test]
    fn pages_come_back_and_limits_have_names() {
        let (mut session, _, _dir) = session(128);
        assert_eq!(session.context_limit(), 128);
        let (a, b) = (session.add_sequence(), session.add_sequence());
        let mut run = |seq, tokens: &[u32]| {
            session
                .step(&[SequenceInput { seq, tokens }], LogitsWanted::Last, false)
                .map(drop)
                .map_err(|e| e.to_string())
        };
        run(a, &text(64, 0)).unwrap();
        run(b, &text(64, 0)).unwrap();
        assert!(run(a, &[1]).unwrap_err().contains("0 free pages of 64 tokens, 1 are needed"));
        let long = run(a, &text(65, 0)).unwrap_err();
        assert!(long.contains("129 tokens is beyond the limit of 128") && long.contains("context_tokens"), "{long}");
        assert!(run(a, &[VOCAB]).unwrap_err().contains("outside the vocabulary of 11"));
        assert!(run(a, &[]).unwrap_err().contains("no tokens"));
        assert!(run(SeqId(99), &[1]).unwrap_err().contains("another session"));
        session.remove_sequence(b);
        let input = SequenceInput { seq: a, tokens: &[1] };
        assert!(session.step(&[input, input], LogitsWanted::Last, false).is_err());
        assert!(session.step(&[input], LogitsWanted::Rows(&[1]), false).is_err());
        session.step(&[input], LogitsWanted::Last, false).unwrap();
        assert_eq!(session.sequence_tokens(a), Some(65));
    }

    #[test]
    fn forks_have_pages_of_their_own() {
        let (mut session, _, _dir) = session(512);
        let seq = session.add_sequence();
        session.step(&[SequenceInput { seq, tokens: &text(70, 2) }], LogitsWanted::Last, false).unwrap();
        let fork = session.fork(seq).unwrap();
        assert_eq!(session.sequence_tokens(fork), Some(70));
        let pages = |s: SeqId| session.sequences[&s].pages.clone();
        assert_eq!((pages(seq), pages(fork)), (vec![0, 1], vec![2, 3]));
        for _ in 0..2 {
            session.fork(seq).unwrap();
        }
        assert!(session.fork(seq).unwrap_err().to_string().contains("0 free pages"));
        assert!(session.fork(SeqId(99)).is_err());
    }

    #[test]
    fn one_rank_of_several_is_refused() {
        let mut header = crate::testing::header();
        (header.model.ranks, header.model.rank) = (8, 3);
        let dir = tempfile::tempdir().unwrap();
        let path = crate::testing::write_artifact(dir.path(), &mut header, &[0xc3; 18]);
        let error = Model::open(&path, dir.path(), &Options::default()).unwrap_err().to_string();
        assert!(error.contains("rank 3 of 8") && error.contains("--tp 1"), "{error}");
    }

    #[test]
    fn capacity_beyond_the_kernels_is_refused() {
        let steps = [("decode", [4, 4, 2, 4, 2, 1000])];
        assert!(model(&steps, Some(129)).unwrap_err().to_string().contains("beyond the limit of 128"));
        assert!(model(&steps, Some(128)).is_ok());
        assert!(model(&steps, Some(0)).is_err());
    }

    #[test]
    fn generates() {
        let (mut session, _, _dir) = session(128);
        let options = GenerateOptions { max_new_tokens: 500, ignore_eos: true, ..GenerateOptions::default() };
        let mut seen = Vec::new();
        let all = session
            .generate(&text(100, 1), &options, &mut |t| {
                seen.push(t);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!((all.finish_reason, all.token_ids.len()), (FinishReason::Context, 29));
        assert_eq!(seen, all.token_ids);
        let short = GenerateOptions { max_new_tokens: 3, ..options.clone() };
        let three = session.generate(&text(100, 1), &short, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!((three.finish_reason, &three.token_ids[..]), (FinishReason::Length, &all.token_ids[..3]));
        let stop = GenerateOptions { eos: Some(vec![all.token_ids[1]]), ignore_eos: false, ..options.clone() };
        let stopped = session.generate(&text(100, 1), &stop, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(stopped.finish_reason, FinishReason::Stop);
        assert_eq!(stopped.token_ids.last(), Some(&all.token_ids[1]));
        let one = session.generate(&text(100, 1), &options, &mut |_| ControlFlow::Break(())).unwrap();
        assert_eq!((one.finish_reason, one.token_ids.len()), (FinishReason::Cancelled, 1));
    }

    #[test]
    fn evaluates_by_windows() {
        let (mut session, _, _dir) = session(128);
        let result = session.evaluate(&text(35, 2), 11, 0).unwrap();
        assert_eq!((result.scored_tokens, result.window_nats.len()), (30, 3));
        assert!((result.nats_per_token - result.window_nats.iter().sum::<f64>() / 30.0).abs() < 1e-9);
        assert!(session.evaluate(&text(5, 2), 11, 0).unwrap_err().to_string().contains("fill no window"));
        assert!(session.evaluate(&text(5, 2), 1, 0).is_err());
    }

    #[test]
    fn verifies_both_layouts() {
        use crate::testing::{RawTensor, write_tensors};
        use crate::verify::Tolerances;
        let (mut session, _, dir) = session(256);
        let prompt = text(40, 1);
        let seq = session.add_sequence();
        let all = session.step(&[SequenceInput { seq, tokens: &prompt }], LogitsWanted::All, true).unwrap();
        session.remove_sequence(seq);
        let options = GenerateOptions { max_new_tokens: 6, ignore_eos: true, ..GenerateOptions::default() };
        let greedy = session.generate(&prompt, &options, &mut |_| ControlFlow::Continue(())).unwrap().token_ids;
        let ids = |ids: &[u32]| ids.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let path = dir.path().join("golden.safetensors");
        let mut verify = |tensors: &[RawTensor<'_>]| {
            write_tensors(&path, tensors);
            session.verify(&path, &Tolerances::of(Numerics::Exact))
        };

        let logits = ("logits", "F32", &[40, 11][..], floats(&all.logits));
        let report = verify(&[
            ("input_ids", "I32", &[40], ids(&prompt)),
            logits.clone(),
            ("hidden.0", "F32", &[40, 2], floats(&[0.0; 80])),
            ("hidden.7", "F32", &[40, 2], floats(&[0.0; 80])),
            ("greedy_ids", "I32", &[6], ids(&greedy)),
        ])
        .unwrap();
        assert!(report.passed(), "{report:?}");
        assert_eq!(
            (report.greedy[0].equal, report.hidden.len(), &report.not_compared[..]),
            (6, 1, &["hidden.7".into()][..])
        );

        let mut wrong = greedy.clone();
        wrong[2] = (wrong[2] + 1) % VOCAB;
        let report = verify(&[
            ("prompt_ids", "I32", &[40], ids(&prompt)),
            logits,
            ("greedy.long.ids", "I32", &[6], ids(&greedy)),
            ("greedy.0.prompt_ids", "I32", &[40], ids(&prompt)),
            ("greedy.0.ids", "I32", &[3], ids(&wrong[..3])),
        ])
        .unwrap();
        assert_eq!(report.failures, ["greedy.0.ids: 2 of 3 greedy tokens agree"]);
        assert_eq!(report.greedy[0].first_difference.map(|d| d.0), Some(2));
        assert!(verify(&[("x", "U8", &[1], vec![0])]).unwrap_err().to_string().contains("no input_ids"));
        assert!(verify(&[("input_ids", "I32", &[1], ids(&[3]))]).is_err());
    }

    #[test]
    fn admits_the_longest_prefix() {
        let limits = SymValues([8, 2, 100, 3, 100, 20]);
        let tokens = [0; 30];
        let left = |parts: &[(u32, usize)]| -> Vec<(SeqId, u32, &[u32])> {
            parts.iter().rev().map(|&(start, n)| (SeqId(0), start, &tokens[..n])).collect()
        };
        assert_eq!(admitted(&limits, &left(&[(0, 5)]), 0, &[4]), 5);
        assert_eq!(admitted(&limits, &left(&[(0, 30)]), 0, &[29]), 8);
        assert_eq!(admitted(&limits, &left(&[(15, 30)]), 0, &[29]), 5, "context");
        assert_eq!(admitted(&limits, &left(&[(0, 1), (0, 1), (0, 1)]), 7, &[7, 8, 9]), 2, "sequences");
        assert_eq!(admitted(&limits, &left(&[(0, 8)]), 10, &[10, 11, 13, 16]), 6, "rows");
        assert_eq!(admitted(&limits, &left(&[(20, 1)]), 0, &[]), 0);
    }
}
