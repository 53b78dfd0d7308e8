//! `dsc inspect`.

use super::{Failure, Outcome, bytes, print, print_json, table};
use dsc_ir::artifact::{Header, KernelEntry, Numerics, WeightSource};
use dsc_ir::graph::Elem;
use dsc_runtime::Artifact;
use std::error::Error;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    /// The artifact that `dsc compile` wrote
    bundle: PathBuf,
    /// Print its whole description, or with --kernel that of one kernel, as one JSON object
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
        show_kernel(&artifact, name, args.json)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.json {
        print_json(header)?;
        return Ok(ExitCode::SUCCESS);
    }
    let m = &header.model;
    let numerics = match header.numerics {
        Numerics::Exact => "exact",
        Numerics::Deployed => "deployed",
    };
    let mut text = format!("{} for {}, {numerics} numerics, by dsc {}\n", m.model_type, header.target, header.compiler);
    writeln!(
        text,
        "{} layers, vocabulary {}, top-k {}, context up to {}",
        m.layers, m.vocab, m.index_topk, m.max_context
    )?;
    if !header.features.is_empty() {
        writeln!(text, "processor features: {}", header.features.join(" "))?;
    }
    text.push('\n');
    text += &steps(header, args.launches);
    text += &kernels(header);
    text += &multiprocessor(header);
    text += &memory(header, args.weights);
    print(text)?;
    Ok(ExitCode::SUCCESS)
}

fn show_kernel(artifact: &Artifact, name: &str, json: bool) -> Result<(), Box<dyn Error>> {
    let Some(kernel) = artifact.header().kernels.iter().find(|k| k.name == name) else {
        let help = format!("`dsc inspect {}` lists the kernels", artifact.path().display());
        return Err(Failure::new(format!("{} has no kernel `{name}`", artifact.path().display())).help(help).into());
    };
    let program = kernel_text(artifact, name)?;
    if json {
        return print_json(&serde_json::json!({ "kernel": kernel, "program": program }));
    }
    Ok(print(program)?)
}

/// The tile section's text of one kernel.
fn kernel_text(artifact: &Artifact, name: &str) -> Result<String, Box<dyn Error>> {
    let text = String::from_utf8_lossy(artifact.section("tile")?);
    let start = text.find(&format!("kernel {name} ")).ok_or("the artifact holds no text of its tile programs")?;
    let rest = &text[start..];
    let end = rest.find("\n}\n").map_or(rest.len(), |i| i + 3);
    Ok(rest[..end].to_owned())
}

/// Entry points of a kernel library, and with `launches` what they run.
fn entries(header: &Header, launches: bool) -> String {
    let rows = header.entries.iter().map(|e| {
        let args = e.args.iter().map(|a| format!("{} {:?}", a.name, a.shape)).collect::<Vec<_>>().join(", ");
        let max = dsc_ir::Sym::ALL.map(|sym| format!("{} <= {}", sym.name(), e.max.get(sym))).join(", ");
        vec![e.op.clone(), e.class.clone(), args, max]
    });
    let mut text = table(&["operation", "class", "arguments", "serves"], rows) + "\n";
    for entry in header.entries.iter().filter(|_| launches) {
        let rows = entry.launches.iter().map(|l| vec![l.node.clone(), header.kernels[l.kernel as usize].name.clone()]);
        text += &table(&[&format!("{} {}", entry.op, entry.class), "kernel"], rows);
        text += "\n";
    }
    text
}

fn steps(header: &Header, launches: bool) -> String {
    if header.steps.is_empty() {
        return entries(header, launches);
    }
    let rows = header.steps.iter().map(|s| {
        let max = dsc_ir::Sym::ALL.map(|sym| format!("{} <= {}", sym.name(), s.max.get(sym))).join(", ");
        vec![s.name.clone(), s.launches.len().to_string(), s.arena_bytes.to_string(), max]
    });
    let mut text = table(&["step", "launches", "arena bytes", "serves"], rows) + "\n";
    for step in header.steps.iter().filter(|_| launches) {
        let rows = step
            .launches
            .iter()
            .enumerate()
            .map(|(i, l)| vec![i.to_string(), l.node.clone(), header.kernels[l.kernel as usize].name.clone()]);
        text += &table(&[&step.name, "node", "kernel"], rows);
        text += "\n";
    }
    text
}

fn kernels(header: &Header) -> String {
    let rows = header.kernels.iter().map(|k| {
        let grid = k.grid.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
        vec![k.name.clone(), k.what.clone(), grid, k.code_bytes.to_string(), bytes(k.scratch_bytes)]
    });
    table(&["kernel", "computes", "grid", "code bytes", "scratch"], rows) + "\n"
}

/// What each GPU kernel takes of a multiprocessor; nothing for other targets.
fn multiprocessor(header: &Header) -> String {
    let row = |k: &KernelEntry| {
        let gpu = k.gpu.as_ref()?;
        let shape = [k.name.clone(), gpu.threads.to_string(), gpu.cluster.to_string()];
        let taken = match gpu.resources {
            Some(r) => [
                match (r.accumulators, r.scalar_registers) {
                    (0, 0) => r.registers.to_string(),
                    (a, s) => format!("{} ({a} for accumulators), {s} scalar", r.registers),
                },
                match (r.spill_bytes, r.scalar_spills) {
                    ([stores, loads], 0) => format!("{stores} / {loads}"),
                    ([stores, loads], n) => format!("{stores} / {loads}, {n} scalar registers"),
                },
                r.stack_bytes.to_string(),
                format!("{} + {}", gpu.shared_bytes, r.static_shared_bytes),
                r.blocks_per_sm.to_string(),
            ],
            // The driver assembles it, and only then is it known.
            None => ["-".into(), "-".into(), "-".into(), gpu.shared_bytes.to_string(), "-".into()],
        };
        Some(shape.into_iter().chain(taken).chain([(gpu.asm[1] - gpu.asm[0]).to_string()]).collect::<Vec<_>>())
    };
    let rows: Vec<Vec<String>> = header.kernels.iter().filter_map(row).collect();
    if rows.is_empty() {
        return String::new();
    }
    let columns = [
        "kernel",
        "threads",
        "cluster",
        "registers",
        "spill stores / loads",
        "stack bytes",
        "shared bytes",
        "blocks per SM",
        "PTX bytes",
    ];
    table(&columns, rows) + "\n"
}

fn memory(header: &Header, weights: bool) -> String {
    let total: u64 = header.weights.iter().filter_map(|w| w.bytes(0)).sum();
    let per_token: u64 = header.states.iter().map(|s| u64::from(s.format.row_bytes())).sum();
    let mut text = format!(
        "{} weights, {} in memory (rope tables not counted)\n{} caches, {per_token} bytes a token\n",
        header.weights.len(),
        bytes(total),
        header.states.len()
    );
    if weights {
        let rows = header.weights.iter().map(|w| {
            let from = match &w.source {
                WeightSource::Tensors(parts) if parts.len() == 1 => parts[0].tensor.clone(),
                WeightSource::Tensors(parts) => format!("{} and {} more, stacked", parts[0].tensor, parts.len() - 1),
                WeightSource::RopeTable { frequencies } => format!("rope table of {} frequencies", frequencies.len()),
                WeightSource::Hadamard { n } => format!("Hadamard matrix of order {n}"),
            };
            vec![w.name.clone(), format!("{:?}", w.shape), storage(&w.elem), from]
        });
        text += "\n";
        text += &table(&["weight", "shape", "storage", "from"], rows);
    }
    text
}

fn storage(elem: &Elem) -> String {
    match elem {
        Elem::Plain(dtype) => dtype.to_string(),
        Elem::Quant(q) => format!("e4m3, one scale for {} x {}", q.block[0], q.block[1]),
    }
}
