//! A model opened for use: an artifact, its weights, and the device that it was compiled for.

use crate::artifact::Artifact;
use crate::checkpoint::Checkpoint;
use crate::cpu::CpuDevice;
use crate::device::{Buffer, Code, Device, Vendor};
use crate::error::{CallError, DeviceError, Error, RequestError};
use crate::gpu::{self, GpuDevice};
use crate::session::Session;
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::{self, Weights};
use dsc_ir::Sym;
use dsc_ir::artifact::{Header, Numerics};
use dsc_ir::graph::PAGE_TOKENS;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

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
    pub(crate) artifact: Arc<Artifact>,
    weights: Arc<Weights>,
    /// The checkpoint folder, if there is one.
    weights_dir: Option<PathBuf>,
    threads: usize,
    /// Pages of a session's cache.
    pub(crate) pages: u32,
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
