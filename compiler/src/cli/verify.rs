//! `dsc verify`.

use super::{BundleArgs, Outcome, open, print_json, table};
use dsc_runtime::{Report, Tolerances};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Expected outputs: `input_ids` or `prompt_ids`, with any of `logits`, `hidden.i`, `topk.i`, `greedy_ids`
    #[arg(long, value_name = "golden.safetensors")]
    golden: PathBuf,
    /// Largest relative error of the logits [default: by the artifact's numerics]
    #[arg(long, value_name = "X")]
    tolerance: Option<f64>,
}

pub fn run(args: Args) -> Outcome {
    let model = open(&args.bundle, None)?;
    let mut tolerances = Tolerances::of(model.header().numerics);
    if let Some(tolerance) = args.tolerance {
        tolerances.logits = tolerance;
        tolerances.hidden = tolerance;
    }
    let report = model.session()?.verify(&args.golden, &tolerances)?;
    if args.bundle.json {
        print_json(&report)?;
    } else {
        show(&report);
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(report: &Report) {
    let mut rows = Vec::new();
    for t in report.logits.iter().chain(&report.hidden) {
        let detail = format!("worst position {} at {:.2e}", t.worst_position, t.worst);
        rows.push(vec![t.name.clone(), format!("relative error {:.2e}", t.relative), detail]);
    }
    for t in &report.topk {
        let detail = format!("worst row {} at {:.2} %", t.worst_row, t.worst * 100.0);
        rows.push(vec![format!("topk.{}", t.layer), format!("overlap {:.3} %", t.overlap * 100.0), detail]);
    }
    for g in &report.greedy {
        let detail = match g.first_difference {
            Some((at, margin)) => format!("first difference at token {at}, {margin:.2e} below the largest logit"),
            None => "all agree".into(),
        };
        rows.push(vec![g.name.clone(), format!("{} of {} agree, {} near ties", g.equal, g.tokens, g.near_ties), detail]);
    }
    println!("{}", table(&["tensor", "against expected", ""], rows));
    if !report.not_compared.is_empty() {
        println!("not compared: {}", report.not_compared.join(", "));
    }
    for failure in &report.failures {
        println!("FAILED {failure}");
    }
    if report.passed() {
        println!("passed");
    }
}
