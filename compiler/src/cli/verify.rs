//! `dsc verify`.

use super::{BundleArgs, Outcome, print, print_json, table};
use dsc_runtime::{Checkpoint, Report, Tolerances};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Expected outputs: `input_ids` or `prompt_ids`, with any of `logits`, `hidden.i`, `topk.i`, `greedy_ids`
    #[arg(long, value_name = "golden.safetensors")]
    golden: PathBuf,
    /// Largest relative error of logits and hidden states [default: by the artifact's numerics]
    #[arg(long, value_name = "X", value_parser = tolerance, allow_negative_numbers = true)]
    tolerance: Option<f64>,
}

fn tolerance(text: &str) -> Result<f64, String> {
    let at_least_zero = |x: &f64| *x >= 0.0 && x.is_finite();
    text.parse().ok().filter(at_least_zero).ok_or_else(|| "give a number of at least 0, such as 0.001".into())
}

pub fn run(args: Args) -> Outcome {
    let golden = Checkpoint::open_file(&args.golden)?;
    // No prompt with its continuation is longer than all tokens of the file together.
    let ids = golden.names().filter(|name| name.ends_with("ids")).filter_map(|name| golden.tensor(name).ok());
    let tokens = ids.map(|ids| ids.shape.iter().product::<usize>()).fold(0, usize::saturating_add);
    let model = args.bundle.open(&args.bundle.facts()?, tokens, 1)?;
    let mut tolerances = Tolerances::of(model.header().numerics);
    if let Some(tolerance) = args.tolerance {
        tolerances.logits = tolerance;
        tolerances.hidden = tolerance;
        tolerances.logits_worst = tolerances.logits_worst.max(tolerance);
        tolerances.hidden_worst = tolerances.hidden_worst.max(tolerance);
    }
    let report = model.session()?.verify(&args.golden, &tolerances)?;
    if args.bundle.json {
        print_json(&report)?;
    } else {
        print(shown(&report)?)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn shown(report: &Report) -> Result<String, std::fmt::Error> {
    let mut rows = Vec::new();
    let note = |judged: bool, left_out: usize| match (judged, left_out) {
        (false, _) => "not judged: selections differ upstream".to_owned(),
        (true, 0) => String::new(),
        (true, n) => format!("{n} of {} positions follow a tie", report.positions),
    };
    for t in report.logits.iter().chain(&report.hidden) {
        let detail = format!("worst position {} at {:.2e}", t.worst_position, t.worst);
        let error = format!("relative error {:.2e}", t.relative);
        rows.push(vec![t.name.clone(), error, detail, note(t.judged, t.left_out)]);
    }
    for t in &report.topk {
        let detail = format!("worst row {} at {:.2} %", t.worst_row, t.worst * 100.0);
        let counts = [
            (t.ties, "rows tie"),
            (t.after_ties, "rows choose among those"),
            (t.unexplained.len(), "rows differ without a tie"),
        ];
        let mut notes = vec![note(t.judged, t.left_out)];
        notes.extend(counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} of {} {what}", t.choices)));
        notes.retain(|n| !n.is_empty());
        let overlap = format!("overlap {:.3} %", t.overlap * 100.0);
        rows.push(vec![format!("topk.{}", t.layer), overlap, detail, notes.join("; ")]);
    }
    for g in &report.greedy {
        let detail = match g.first_difference {
            Some((at, margin)) => format!("first difference at token {at}, {margin:.2e} below the largest logit"),
            None => "all agree".into(),
        };
        let note = match (g.judged, report.after_ties) {
            (true, _) => "",
            (false, 0) => "not judged: selections differ upstream",
            (false, _) => "not judged: it follows a tie",
        };
        let agree = format!("{} of {} agree, {} near ties", g.equal, g.tokens, g.near_ties);
        rows.push(vec![g.name.clone(), agree, detail, note.into()]);
    }
    let mut text = table(&["tensor", "against expected", "", ""], rows);
    if !report.not_compared.is_empty() {
        writeln!(text, "not compared: {}", report.not_compared.join(", "))?;
    }
    if report.after_ties > 0 {
        let (n, all) = (report.after_ties, report.positions);
        writeln!(
            text,
            "{n} of {all} positions follow a tie at the k-th score, where either choice is right, and were left out"
        )?;
    }
    let tensors = report.logits.iter().chain(&report.hidden);
    if tensors.map(|t| t.judged).chain(report.topk.iter().map(|t| t.judged)).any(|judged| !judged) {
        writeln!(
            text,
            "not judged: quantisation moved selections upstream. A trained model keeps nearly all of them; one of random \
             weights is not expected to, and what comes after differs"
        )?;
    }
    for failure in &report.failures {
        writeln!(text, "FAILED {failure}")?;
    }
    if report.passed() {
        writeln!(text, "passed")?;
    }
    Ok(text)
}
