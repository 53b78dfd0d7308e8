//! `dsc compile` and `dsc targets`.

use super::{Failure, Outcome, bytes, check_destination, print, print_json, progress, table, tell, write_atomically};
use crate::compile::{self, Compiled, Event, Options};
use crate::front::model::Shard;
use crate::passes;
use crate::remember::Remember;
use dsc_ir::artifact::{Header, Numerics};
use dsc_ir::schedule::Rule;
use dsc_targets::{Level, TargetOptions};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[path = "compile/library.rs"]
mod library;

#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face model folder: config.json, and the weights if they are to be checked
    #[arg(required_unless_present = "kernels", conflicts_with = "kernels")]
    model_dir: Option<PathBuf>,
    #[command(flatten)]
    library: library::LibraryArgs,
    /// What to compile for (`dsc targets` lists them)
    #[arg(long, default_value = "cpu")]
    target: String,
    /// The artifact to write [default: MODEL_DIR's name with .dsc, in this folder]
    #[arg(short, long, value_name = "OUT.dsc")]
    output: Option<PathBuf>,
    /// Numerics: f32 throughout, or what serving engines run (fp8 activations and caches)
    #[arg(long, value_enum, default_value = "deployed")]
    numerics: NumericsArg,
    /// Devices that share the model by tensor parallelism: an artifact each; compiled only, not run yet
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tp: u32,
    /// Which of their artifacts to make: `all`, or a number from 0
    #[arg(long, default_value = "all", value_name = "R", value_parser = parse_rank)]
    rank: Rank,
    /// Longest context in tokens [default: the model's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_context: Option<u32>,
    /// Tokens of a prefill step; longer prompts go in chunks [default: 4096 on NVIDIA GPUs, else 512]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16384))]
    chunk: Option<u32>,
    /// Sequences of a decode step; larger batches go in several steps [default: 256 on Hopper, 64 on other GPUs, else 16]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    max_batch: Option<u32>,
    /// Compile only these layers, for measurements: 0,3,4 in ascending order
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    layers: Option<Vec<usize>>,
    /// Also write these levels as text
    #[arg(long, value_delimiter = ',', value_enum, value_name = "LEVELS")]
    emit: Vec<Emit>,
    /// Where --emit writes
    #[arg(long, default_value = ".", value_name = "DIR")]
    emit_dir: PathBuf,
    /// A JSON list of rules that change schedules, such as `dsc tune` writes:
    /// [{"op": "attention", "class": "decode16", "schedule": {"tile_n": 32}}]
    #[arg(long, value_name = "FILE")]
    schedules: Option<PathBuf>,
    /// The assembler that makes NVIDIA machine code, or `none` [default: DSC_PTXAS, or one that is installed]
    #[arg(long, value_name = "PATH")]
    ptxas: Option<PathBuf>,
    /// The ld.lld that links AMD code objects [default: DSC_LLD, or one that is installed]
    #[arg(long, value_name = "PATH")]
    lld: Option<PathBuf>,
    /// Print the graph after this pass, once a shape class, on stderr
    #[arg(long, value_name = "PASS", value_parser = clap::builder::PossibleValuesParser::new(passes::PASSES))]
    print_after: Vec<String>,
    /// Print how long each pass and stage took, on stderr
    #[arg(long)]
    time_passes: bool,
    /// Print a JSON summary on stdout
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What `--schedules` holds.
    fn rules(&self) -> Result<Vec<Rule>, Failure> {
        let Some(path) = &self.schedules else { return Ok(Vec::new()) };
        let failure = |e: String| Failure::new(format!("--schedules {}: {e}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| failure(e.to_string()))?;
        Rule::parse(&text).map_err(failure)
    }
}

/// Which ranks to compile.
#[derive(Clone, Copy)]
enum Rank {
    All,
    One(u32),
}

fn parse_rank(text: &str) -> Result<Rank, String> {
    match text {
        "all" => Ok(Rank::All),
        _ => text.parse().map(Rank::One).map_err(|_| "give `all`, or a number from 0".into()),
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum NumericsArg {
    Exact,
    Deployed,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Emit {
    /// The fused graph of each shape class
    Graph,
    /// The tile program of each kernel
    Tile,
    /// The schedule of each kernel, as JSON
    Sched,
    /// MLIR, for targets lowered through it
    Mlir,
    /// LLVM IR, for targets lowered through it
    Llvm,
    /// The target's assembly
    Asm,
}

impl Emit {
    /// The level inside the target; none for what the compiler itself has.
    fn level(self) -> Option<Level> {
        match self {
            Emit::Graph | Emit::Tile => None,
            Emit::Sched => Some(Level::Sched),
            Emit::Mlir => Some(Level::Mlir),
            Emit::Llvm => Some(Level::Llvm),
            Emit::Asm => Some(Level::Asm),
        }
    }
}

pub fn run(args: Args) -> Outcome {
    let codegen = TargetOptions {
        levels: args.emit.iter().filter_map(|emit| emit.level()).collect(),
        ptxas: args.ptxas.clone(),
        lld: args.lld.clone(),
    };
    check(&args, &codegen)?;
    let target = dsc_targets::target_with(&args.target, &codegen)?;
    let target = Remember::new(&*target);
    let output = args.output.clone().unwrap_or_else(|| default_output(&args));
    let ranks = match args.rank {
        Rank::All => 0..args.tp,
        Rank::One(rank) => rank..rank + 1,
    };
    for rank in ranks {
        let output = if args.tp > 1 { output.with_extension(format!("rank{rank}.dsc")) } else { output.clone() };
        compile_rank(&args, (&codegen, &target), rank, &output)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Compiles one rank's part of the model, or all of what is not split.
fn compile_rank(
    args: &Args,
    (codegen, target): (&TargetOptions, &Remember),
    rank: u32,
    output: &Path,
) -> Result<(), Box<dyn std::error::Error>> {
    let started = Instant::now();
    check_destination(output)?;
    let mut times: Vec<(String, Duration)> = Vec::new();
    let bar = progress::bar("Compiling", 0);
    let mut observe = |event: Event| match event {
        Event::Pass { class, name, graph, took } => {
            bar.set_message(format!("{class}: {name}"));
            bar.tick();
            times.push((format!("{class}: {name}"), took));
            if args.print_after.iter().any(|p| p == name) {
                bar.suspend(|| tell(format_args!("// {class}, after {name}\n{graph}")));
            }
        }
        Event::Stage { name, took } => {
            bar.set_message(name.to_owned());
            bar.tick();
            times.push((name.to_owned(), took));
        }
    };
    let compiled = match &args.model_dir {
        Some(dir) => {
            let options = Options { shard: Shard { ranks: args.tp, rank }, ..model_options(args, codegen.clone())? };
            compile::compile_dir_for(target, dir, &options, &mut observe)?
        }
        None => crate::library::compile(&args.library.options(args, codegen.clone())?, &mut observe)?,
    };
    bar.finish_and_clear();
    emit(args, &compiled)?;
    // Last: where the artifact is, all else is.
    write_atomically(output, &compiled.bytes)?;
    if args.time_passes {
        let rows = times.iter().map(|(name, took)| vec![name.clone(), format!("{:.2} ms", took.as_secs_f64() * 1e3)]);
        tell(table(&["pass", "time"], rows));
    }
    summary(args, output, &compiled, started.elapsed())
}

fn model_options(args: &Args, codegen: TargetOptions) -> Result<Options, Failure> {
    Ok(Options {
        target: args.target.clone(),
        numerics: match args.numerics {
            NumericsArg::Exact => Numerics::Exact,
            NumericsArg::Deployed => Numerics::Deployed,
        },
        max_context: args.max_context,
        chunk: args.chunk,
        max_batch: args.max_batch,
        shard: Shard::default(),
        layers: args.layers.clone(),
        codegen,
        schedules: args.rules()?,
    })
}

/// Refuses what can be refused before any work.
fn check(args: &Args, codegen: &TargetOptions) -> Result<(), Box<dyn std::error::Error>> {
    if args.model_dir.is_none() && args.tp != 1 {
        return Err(Failure::new(format!("--tp {}: a kernel library is one rank's", args.tp))
            .help("leave --tp out, and say how many heads a rank has")
            .into());
    }
    if let Rank::One(rank) = args.rank
        && rank >= args.tp
    {
        return Err(Failure::new(format!("--rank {rank}: there are {} ranks", args.tp))
            .help("ranks are numbered from 0; --tp says how many there are")
            .into());
    }
    let target = dsc_targets::target_with(&args.target, codegen)?;
    for (emit, name) in [(Emit::Mlir, "mlir"), (Emit::Llvm, "llvm")] {
        if args.emit.contains(&emit) && emit.level().is_some_and(|level| !target.levels().contains(&level)) {
            return Err(Failure::new(format!("--emit {name}: target {} is not lowered through it", args.target))
                .help("--emit graph,tile,sched,asm works for every target")
                .into());
        }
    }
    if args.ptxas.is_some() && !args.target.starts_with("sm_") {
        return Err(Failure::new(format!("--ptxas: target {} has no use for it", args.target))
            .help("ptxas assembles for the NVIDIA targets, sm_*")
            .into());
    }
    if args.lld.is_some() && !args.target.starts_with("gfx") {
        return Err(Failure::new(format!("--lld: target {} has no use for it", args.target))
            .help("lld links for the AMD targets, gfx*")
            .into());
    }
    Ok(())
}

fn default_output(args: &Args) -> PathBuf {
    let Some(model_dir) = &args.model_dir else { return PathBuf::from(format!("{}.dsc", args.library.name())) };
    let absolute = fs::canonicalize(model_dir).unwrap_or_else(|_| model_dir.clone());
    let stem = absolute.file_name().map_or("model".into(), |n| n.to_string_lossy().into_owned());
    PathBuf::from(format!("{stem}.dsc"))
}

fn emit(args: &Args, compiled: &Compiled) -> Result<(), Box<dyn std::error::Error>> {
    if args.emit.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(&args.emit_dir)
        .map_err(|e| Failure::new(format!("cannot make the folder {}: {e}", args.emit_dir.display())))?;
    let write = |name: String, text: &str| {
        let path = args.emit_dir.join(name);
        fs::write(&path, text).map_err(|e| Failure::new(format!("cannot write {}: {e}", path.display())))
    };
    for level in &args.emit {
        match level {
            Emit::Graph => {
                for (class, graph) in &compiled.graphs {
                    write(format!("{}.graph", class.name.replace('/', ".")), &graph.to_string())?;
                }
            }
            Emit::Tile => {
                for kernel in &compiled.plan.kernels {
                    write(format!("{}.tile", kernel.program.name), &format!("// {}\n{}", kernel.what, kernel.program))?;
                }
            }
            Emit::Sched => {
                let all: BTreeMap<&str, _> =
                    compiled.plan.kernels.iter().map(|k| (k.program.name.as_str(), &k.schedule)).collect();
                write("schedules.json".into(), &serde_json::to_string_pretty(&all)?)?;
            }
            Emit::Asm => {
                if let Some(text) = &compiled.module.asm {
                    write("kernels.asm".into(), text)?;
                }
            }
            Emit::Mlir | Emit::Llvm => {}
        }
    }
    for listing in &compiled.module.listings {
        let suffix = match listing.level {
            Level::Sched => "sched",
            Level::Mlir => "mlir",
            Level::Llvm => "ll",
            Level::Asm if args.target.starts_with("sm_") => "ptx",
            Level::Asm => "s",
        };
        write(format!("{}.{suffix}", listing.kernel), &listing.text)?;
    }
    Ok(())
}

fn summary(args: &Args, output: &Path, compiled: &Compiled, took: Duration) -> Result<(), Box<dyn std::error::Error>> {
    let header = &compiled.header;
    if args.json {
        let steps: Vec<_> = header
            .steps
            .iter()
            .map(|s| serde_json::json!({"name": s.name, "launches": s.launches.len(), "arena_bytes": s.arena_bytes}))
            .collect();
        print_json(&serde_json::json!({
            "output": output,
            "bytes": compiled.bytes.len(),
            "target": header.target,
            "kernels": header.kernels.len(),
            "rank": header.model.rank,
            "ranks": header.model.ranks,
            "weights": header.weights.len(),
            "machine_code_kernels": machine_code(header),
            "warnings": compiled.module.warnings,
            "steps": steps,
            "entries": header.entries.iter().map(|e| format!("{}/{}", e.op, e.class)).collect::<Vec<_>>(),
            "seconds": took.as_secs_f64(),
        }))?;
        return Ok(());
    }
    let rows = header.steps.iter().map(|s| {
        vec![
            format!("  {}", s.name),
            format!("{} launches", s.launches.len()),
            format!("{} of intermediate results", bytes(s.arena_bytes)),
        ]
    });
    let entries = header.entries.iter().map(|e| {
        let workspace = e.workspace(&e.max, &e.piece(&e.max)).map_or(0, |w| w.1);
        vec![
            format!("  {}", e.op),
            e.class.clone(),
            match e.pieced {
                0 => format!("{} launches", e.launches.len()),
                n => format!("{n} launches a piece, {} behind them", e.launches.len() - n as usize),
            },
            format!("at most {} of workspace", bytes(workspace)),
        ]
    });
    let entries = if header.entries.is_empty() { String::new() } else { format!("{}\n", table(&[], entries)) };
    let mut text = format!(
        "{}: {}, {} kernels for {}, {:.2} s\n{}",
        output.display(),
        bytes(compiled.bytes.len() as u64),
        header.kernels.len(),
        header.target,
        took.as_secs_f64(),
        if header.steps.is_empty() { entries } else { format!("{}\n", table(&[], rows)) }
    );
    if args.target.starts_with("sm_") {
        text +=
            &format!("machine code for {} of {} kernels, PTX for all\n", machine_code(header), header.kernels.len());
    }
    for warning in &compiled.module.warnings {
        text += &format!("warning: {warning}\n");
    }
    if let Some(dir) = args.model_dir.as_ref().filter(|dir| !compile::has_weights(dir)) {
        text += &format!("note: no weights in {}: their names and shapes were not checked\n", dir.display());
    }
    tell(text.trim_end());
    Ok(())
}

/// Kernels that need no compiler in the driver.
fn machine_code(header: &Header) -> usize {
    header.kernels.iter().filter(|k| k.code_bytes > 0).count()
}

pub fn targets(json: bool) -> Outcome {
    let all = dsc_targets::targets();
    if json {
        print_json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows = all.iter().map(|t| [t.name, t.description, t.lowering, t.note].map(str::to_owned).to_vec());
    print(table(&["target", "device", "code by", "state"], rows))?;
    Ok(ExitCode::SUCCESS)
}
