//! The `dsc` command.
//!
//! One file a subcommand. Results go to stdout (`--json`: one object), everything else to stderr. Exit codes: 0 done, 1 the
//! request failed or a check did not pass, 2 the command line is wrong.

mod bench;
#[cfg(feature = "compile")]
mod compile;
mod eval;
mod inspect;
mod progress;
mod run;
mod verify;

use clap::{CommandFactory, Parser, Subcommand};
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
    /// Measure nats a token, perplexity and bits a byte on a text
    Eval(eval::Args),
    /// Time steps and kernels
    Bench(bench::Args),
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
    /// The model folder with the original weights
    #[arg(long, value_name = "MODEL_DIR")]
    weights: PathBuf,
    /// Worker threads (default: all cores)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

/// What a subcommand ends with: an error that `main` prints with its causes and, if there is one, a remedy.
type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

/// Parses the command line, runs the subcommand, prints errors.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        #[cfg(feature = "compile")]
        Command::Compile(args) => compile::run(args),
        Command::Run(args) => run::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Inspect(args) => inspect::run(args),
        #[cfg(feature = "compile")]
        Command::Targets { json } => compile::targets(json),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "dsc", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        // A reader that closed its end of the pipe wants no more; that is no failure to report.
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        eprintln!("error: {error}");
        let mut cause = error.source();
        while let Some(e) = cause {
            eprintln!("  caused by: {e}");
            cause = e.source();
        }
        ExitCode::FAILURE
    })
}

/// Prints a value as one line of JSON.
fn print_json(value: &impl serde::Serialize) -> Result<(), Box<dyn std::error::Error>> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    Ok(writeln!(out)?)
}

/// Writes beside the destination and renames, so that a failure leaves no half-written file.
fn write_atomically(path: &std::path::Path, bytes: &[u8]) -> Result<(), String> {
    use std::io::Write;
    let temporary = path.with_extension(format!("tmp{}", std::process::id()));
    let written = std::fs::File::create(&temporary).and_then(|mut f| {
        f.write_all(bytes)?;
        f.sync_all()
    });
    written.and_then(|()| std::fs::rename(&temporary, path)).map_err(|e| {
        // Nothing more can be done about a leftover file than to try.
        let _ = std::fs::remove_file(&temporary);
        format!("cannot write {}: {e}", path.display())
    })
}

/// Opens an artifact with its weights, showing progress; `need` is how many tokens of cache the request takes at most.
fn open(args: &BundleArgs, need: Option<usize>) -> Result<dsc_runtime::Model, dsc_runtime::Error> {
    let bar = progress::bar("Loading", 1);
    let need = need.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let options = dsc_runtime::Options { threads: args.threads.unwrap_or(0), context_tokens: need };
    let model = dsc_runtime::Model::open_with(&args.bundle, &args.weights, &options, &|done, total| {
        bar.set_length(total.max(1));
        bar.set_position(done);
    });
    bar.finish_and_clear();
    model
}

/// A table for people: a header row and rows of cells.
fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING).set_header(header);
    table.add_rows(rows);
    table
}

/// Bytes for people.
fn bytes(n: u64) -> String {
    match n {
        0..=9999 => format!("{n} B"),
        10_000..=9_999_999 => format!("{:.1} KB", n as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}
