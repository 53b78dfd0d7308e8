//! `dsc inspect`.

use super::{Outcome, bytes, print_json, table};
use dsc_ir::artifact::{Header, WeightSource};
use dsc_runtime::Artifact;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    /// The artifact that `dsc compile` wrote
    bundle: PathBuf,
    /// Print its whole description as one JSON object
    #[arg(long)]
    json: bool,
    /// Print the tile program of this kernel
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// List the launches of each step
    #[arg(long)]
    launches: bool,
    /// List the weight map
    #[arg(long)]
    weights: bool,
}

pub fn run(args: Args) -> Outcome {
    let artifact = Artifact::open(&args.bundle)?;
    let header = artifact.header();
    for section in &header.sections {
        artifact.section(&section.name)?;
    }
    if let Some(name) = &args.kernel {
        print!("{}", kernel_text(&artifact, name)?);
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        print_json(header)?;
        return Ok(ExitCode::SUCCESS);
    }
    let m = &header.model;
    println!("{} for {} ({:?} numerics), by dsc {}", m.model_type, header.target, header.numerics, header.compiler);
    println!("{} layers, vocabulary {}, top-k {}, context up to {}", m.layers, m.vocab, m.index_topk, m.max_context);
    println!("processor features: {}\n", header.features.join(" "));
    show_steps(header, args.launches);
    show_kernels(header);
    show_memory(header, args.weights);
    Ok(ExitCode::SUCCESS)
}

/// The tile section's text of one kernel.
fn kernel_text(artifact: &Artifact, name: &str) -> Result<String, Box<dyn std::error::Error>> {
    if !artifact.header().kernels.iter().any(|k| k.name == name) {
        return Err(format!("there is no kernel `{name}`; `dsc inspect` lists them").into());
    }
    let text = String::from_utf8_lossy(artifact.section("tile")?);
    let start = text.find(&format!("kernel {name} ")).ok_or("the artifact holds no text of its tile programs")?;
    let rest = &text[start..];
    let end = rest.find("\n}\n").map_or(rest.len(), |i| i + 3);
    Ok(rest[..end].to_owned())
}

fn show_steps(header: &Header, launches: bool) {
    let rows = header.steps.iter().map(|s| {
        let max = dsc_ir::Sym::ALL.map(|sym| format!("{} <= {}", sym.name(), s.max.get(sym))).join(", ");
        vec![s.name.clone(), s.launches.len().to_string(), s.arena_bytes.to_string(), max]
    });
    println!("{}\n", table(&["step", "launches", "arena bytes", "serves"], rows));
    for step in header.steps.iter().filter(|_| launches) {
        let rows = step.launches.iter().enumerate().map(|(i, l)| {
            vec![i.to_string(), l.node.clone(), header.kernels[l.kernel as usize].name.clone()]
        });
        println!("{}\n", table(&[&step.name, "node", "kernel"], rows));
    }
}

fn show_kernels(header: &Header) {
    let rows = header.kernels.iter().map(|k| {
        let grid = k.grid.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
        vec![k.name.clone(), k.what.clone(), grid, k.code_bytes.to_string(), bytes(k.scratch_bytes)]
    });
    println!("{}\n", table(&["kernel", "computes", "grid", "code bytes", "scratch"], rows));
}

fn show_memory(header: &Header, weights: bool) {
    let total: u64 = header.weights.iter().filter_map(|w| w.bytes(0)).sum();
    println!("{} weights, {} in memory (rope tables not counted)", header.weights.len(), bytes(total));
    let per_token: u64 = header.states.iter().map(|s| u64::from(s.format.row_bytes())).sum();
    println!("{} caches, {per_token} bytes a token", header.states.len());
    if weights {
        let rows = header.weights.iter().map(|w| {
            let from = match &w.source {
                WeightSource::Tensors(parts) if parts.len() == 1 => parts[0].tensor.clone(),
                WeightSource::Tensors(parts) => format!("{} and {} more, stacked", parts[0].tensor, parts.len() - 1),
                WeightSource::RopeTable { frequencies } => format!("rope table of {} frequencies", frequencies.len()),
                WeightSource::Hadamard { n } => format!("Hadamard matrix of order {n}"),
            };
            vec![w.name.clone(), format!("{:?}", w.shape), format!("{:?}", w.elem), from]
        });
        println!("\n{}", table(&["weight", "shape", "storage", "from"], rows));
    }
}
