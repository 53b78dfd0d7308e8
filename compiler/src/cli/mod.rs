//! The `dsc` command.
//!
//! One file a subcommand. Results go to stdout (`--json`: one object), everything else to stderr. Exit codes: 0 done, 1 the
//! request failed or a check did not pass, 2 the command line is wrong.

mod bench;
mod check;
#[cfg(feature = "compile")]
mod compile;
mod eval;
mod failure;
mod inspect;
mod output;
mod progress;
mod run;
mod tune;
mod verify;

use failure::Failure;
use output::{bytes, check_destination, print, print_json, table, tell, write_atomically};

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{CommandFactory, Parser, Subcommand};
use dsc_ir::artifact::ModelFacts;
use dsc_runtime::tokenizer::TokenizerError;
use dsc_runtime::{Artifact, Device, DeviceError, Model, Options, RequestError, Tokenizer, WeightsFrom, device};
use std::path::PathBuf;
use std::process::ExitCode;

/// Ahead-of-time compiler and runtime for the DeepSeek-V3.2 model family.
#[derive(Parser)]
#[command(name = "dsc", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compile a Hugging Face model folder into one artifact
    #[cfg(feature = "compile")]
    Compile(compile::Args),
    /// Generate text or tokens
    Run(run::Args),
    /// Compare an artifact's outputs with golden ones
    Verify(verify::Args),
    /// Compare every kernel of an artifact, on this machine's device, with the interpreter
    Check(check::Args),
    /// Measure nats a token, perplexity and bits a byte on a text
    Eval(eval::Args),
    /// Time steps and kernels
    Bench(bench::Args),
    /// Search the fastest schedule of a kernel on this machine's device
    Tune(tune::Args),
    /// Show kernels, launches, memory plan and weight map of an artifact
    Inspect(inspect::Args),
    /// List targets: what each supports, and what was run on hardware
    #[cfg(feature = "compile")]
    Targets {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// An artifact and the weights it runs with.
#[derive(clap::Args)]
struct BundleArgs {
    /// The artifact that `dsc compile` wrote
    bundle: PathBuf,
    /// The model folder with the original weights; or random:SEED, made-up ones, to measure speed
    #[arg(long, value_name = "MODEL_DIR|random:SEED", value_parser = weights_arg())]
    weights: WeightsArg,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// What runs an artifact.
#[derive(clap::Args)]
struct DeviceArgs {
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Number of the GPU, for what runs on one
    #[arg(long = "device", value_name = "N", default_value_t = 0)]
    number: u32,
}

impl DeviceArgs {
    /// Worker threads; 0: one a core.
    fn threads(&self) -> usize {
        self.threads.unwrap_or(0).into()
    }

    /// Opens the device for artifacts of that target.
    fn open(&self, target: &str) -> Result<Box<dyn Device>, DeviceError> {
        device::open(target, self.threads(), self.number)
    }
}

/// Where weights come from.
#[derive(Clone, Debug)]
enum WeightsArg {
    /// A model folder.
    Folder(PathBuf),
    /// Made up from a seed.
    Random(u64),
}

/// Takes a folder, or `random:SEED`.
fn weights_arg() -> impl TypedValueParser<Value = WeightsArg> {
    PathBufValueParser::new().try_map(|path| match path.to_str().and_then(|text| text.strip_prefix("random:")) {
        None => Ok(WeightsArg::Folder(path)),
        Some(seed) => seed.parse().map(WeightsArg::Random).map_err(|_| "the seed is a whole number, as in random:1"),
    })
}

/// What a subcommand ends with; `main` prints the error.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

/// Parses the command line, runs the subcommand, prints errors.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        #[cfg(feature = "compile")]
        Command::Compile(args) => compile::run(args),
        Command::Run(args) => run::run(args),
        Command::Check(args) => check::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Inspect(args) => inspect::run(args),
        #[cfg(feature = "compile")]
        Command::Targets { json } => compile::targets(json),
        Command::Completions { shell } => completions(shell),
    };
    outcome.unwrap_or_else(|error| {
        tell(failure::report(&*error));
        ExitCode::FAILURE
    })
}

fn completions(shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "dsc", &mut script);
    print(String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}

impl BundleArgs {
    /// What the artifact says of its model, before weights are read.
    fn facts(&self) -> Result<ModelFacts, Box<dyn std::error::Error>> {
        if let WeightsArg::Folder(dir) = &self.weights
            && !dir.is_dir()
        {
            let message = format!("there is no folder {} to read weights from", dir.display());
            return Err(Failure::new(message).help("give the Hugging Face model folder").into());
        }
        Ok(Artifact::open(&self.bundle)?.header().model.clone())
    }

    /// The tokenizer beside the weights.
    fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        match &self.weights {
            WeightsArg::Folder(dir) => Tokenizer::load(dir),
            WeightsArg::Random(_) => Err(TokenizerError::NoFolder),
        }
    }

    /// Opens the artifact with its weights, showing progress; the cache has room for `sequences` of `tokens` tokens each, or of
    /// as many as the artifact serves.
    fn open(&self, facts: &ModelFacts, tokens: usize, sequences: usize) -> Result<Model, dsc_runtime::Error> {
        let page = dsc_ir::graph::PAGE_TOKENS as usize;
        let tokens = tokens.clamp(1, (facts.max_context as usize).max(1));
        let capacity = tokens.next_multiple_of(page).saturating_mul(sequences);
        let options = Options {
            threads: self.device.threads(),
            context_tokens: Some(u32::try_from(capacity).unwrap_or(u32::MAX)),
            device: self.device.number,
        };
        let bar = progress::bar("Loading", 1);
        let weights = match &self.weights {
            WeightsArg::Folder(dir) => WeightsFrom::Folder(dir),
            WeightsArg::Random(seed) => WeightsFrom::Random(*seed),
        };
        let model = Model::open_with(&self.bundle, weights, &options, &|done, total| {
            bar.set_length(total.max(1));
            bar.set_position(done);
        });
        bar.finish_and_clear();
        model
    }
}

/// Refuses tokens that the model cannot take, before gigabytes are read for them.
fn check_tokens(facts: &ModelFacts, tokens: &[u32]) -> Result<(), RequestError> {
    let vocab = facts.vocab;
    if let Some(place) = tokens.iter().position(|&t| t >= vocab) {
        return Err(RequestError::Token { token: tokens[place], place, vocab });
    }
    check_context(facts, tokens.len())
}

fn check_context(facts: &ModelFacts, tokens: usize) -> Result<(), RequestError> {
    match tokens {
        0 => Err(RequestError::Empty),
        n if n as u64 > u64::from(facts.max_context) => Err(RequestError::Context {
            wanted: n as u64,
            limit: facts.max_context,
            remedy: "shorten it, or compile the model with a larger --max-context".into(),
        }),
        _ => Ok(()),
    }
}
