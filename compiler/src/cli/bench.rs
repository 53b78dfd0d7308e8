//! `dsc bench`.

use super::{BundleArgs, Failure, Outcome, print, print_json, table};
use dsc_runtime::{LogitsWanted, ProfileRow, SequenceInput, Session};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Instant;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Tokens of the prefill that is timed [default: 1024, or what the artifact serves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    prefill: Option<u32>,
    /// Tokens in the context before decoding starts [default: 384, or what the artifact serves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// Sequences decoded together
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    batch: u32,
    /// Decode steps that are timed
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    steps: u32,
    /// Prefills that are timed
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    repeat: u32,
    /// Split steps by kernel
    #[arg(long)]
    profile: bool,
}

/// Median, least and largest of some microseconds.
#[derive(serde::Serialize)]
struct Summary {
    median_us: f64,
    min_us: f64,
    max_us: f64,
}

impl Summary {
    fn of(mut us: Vec<f64>) -> Summary {
        us.sort_by(f64::total_cmp);
        let at = |i: usize| us.get(i).copied().unwrap_or(0.0);
        Summary { median_us: at(us.len() / 2), min_us: at(0), max_us: at(us.len().saturating_sub(1)) }
    }
}

/// What is timed.
struct Load {
    prefill: usize,
    context: usize,
    batch: usize,
    steps: usize,
    repeat: usize,
    profile: bool,
}

/// Decode steps before those that are timed.
const WARM_UP: usize = 4;

impl Load {
    fn new(args: &Args, max_context: u32) -> Result<Load, Failure> {
        let decoded = args.steps + WARM_UP as u32;
        let load = Load {
            prefill: args.prefill.unwrap_or(max_context.min(1024)) as usize,
            context: args.context.unwrap_or(max_context.saturating_sub(decoded).clamp(1, 384)) as usize,
            batch: args.batch as usize,
            steps: args.steps as usize,
            repeat: args.repeat as usize,
            profile: args.profile,
        };
        let beyond = |what: String| {
            Failure::new(format!("{what} are beyond the artifact's longest context, {max_context}"))
                .help("give smaller numbers, or compile the model with a larger --max-context")
        };
        if load.prefill > max_context as usize {
            return Err(beyond(format!("--prefill {} tokens", load.prefill)));
        }
        if load.sequence() > max_context as usize {
            return Err(beyond(format!("--context {} and --steps {} with {WARM_UP} before", load.context, load.steps)));
        }
        Ok(load)
    }

    /// Tokens of a decoded sequence at its end.
    fn sequence(&self) -> usize {
        self.context + self.steps + WARM_UP
    }
}

pub fn run(args: Args) -> Outcome {
    let facts = args.bundle.facts()?;
    let load = Load::new(&args, facts.max_context)?;
    let sequences = load.prefill.div_ceil(load.sequence()).max(load.batch);
    let model = args.bundle.open(&facts, load.sequence(), sequences)?;
    let mut session = model.session()?;
    let prefill = time_prefill(&mut session, &load, facts.vocab)?;
    let prefill_profile = session.take_profile();
    let decode = time_decode(&mut session, &load, facts.vocab)?;
    let decode_profile = session.take_profile();
    let per_s = |s: &Summary, tokens: usize| tokens as f64 / s.median_us * 1e6;
    let (prefill_rate, decode_rate) = (per_s(&prefill, load.prefill), per_s(&decode, load.batch));
    if args.bundle.json {
        print_json(&serde_json::json!({
            "device": session.device(),
            "target": model.header().target,
            "numerics": model.header().numerics,
            "prefill_tokens": load.prefill, "prefill": prefill, "prefill_tokens_per_s": prefill_rate,
            "batch": load.batch, "context": load.context, "decode": decode, "decode_tokens_per_s": decode_rate,
            "prefill_profile": by_kernel(&prefill_profile), "decode_profile": by_kernel(&decode_profile),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let line = |what: String, s: &Summary, rate: f64| {
        let us = [s.median_us, s.min_us, s.max_us, rate].map(|x| format!("{x:.0}"));
        [vec![what], us.to_vec()].concat()
    };
    let rows = [
        line(format!("prefill of {}", load.prefill), &prefill, prefill_rate),
        line(format!("decode step, batch {}, context {}", load.batch, load.context), &decode, decode_rate),
    ];
    let mut text = format!("{}\n", session.device());
    text += &table(&["", "median us", "min", "max", "tokens/s"], rows);
    for (name, profile) in [("prefill", &prefill_profile), ("decode", &decode_profile)] {
        if !profile.is_empty() {
            write!(text, "\n{}", profile_table(name, profile))?;
        }
    }
    print(text)?;
    Ok(ExitCode::SUCCESS)
}

/// Token ids that differ from each other and from run to run of the loop, the same every time.
fn tokens(n: usize, salt: u64, vocab: u32) -> Vec<u32> {
    let mix = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab.max(1);
    (0..n as u64).map(|i| mix(i + salt * 1_000_003)).collect()
}

fn time_prefill(session: &mut Session, load: &Load, vocab: u32) -> Result<Summary, Box<dyn std::error::Error>> {
    let mut us = Vec::new();
    for round in 0..=load.repeat {
        let ids = tokens(load.prefill, round as u64, vocab);
        let seq = session.add_sequence();
        let start = Instant::now();
        session.step(&[SequenceInput { seq, tokens: &ids }], LogitsWanted::Last, false)?;
        us.push(start.elapsed().as_secs_f64() * 1e6);
        session.remove_sequence(seq);
        if round == 0 {
            us.clear(); // the first touches memory for the first time
            if load.profile {
                session.start_profile();
            }
        }
    }
    Ok(Summary::of(us))
}

fn time_decode(session: &mut Session, load: &Load, vocab: u32) -> Result<Summary, Box<dyn std::error::Error>> {
    let seqs: Vec<_> = (0..load.batch).map(|_| session.add_sequence()).collect();
    for (i, &seq) in seqs.iter().enumerate() {
        let ids = tokens(load.context, i as u64, vocab);
        session.step(&[SequenceInput { seq, tokens: &ids }], LogitsWanted::Last, false)?;
    }
    let mut us = Vec::new();
    for step in 0..load.steps + WARM_UP {
        if step == WARM_UP && load.profile {
            session.start_profile();
        }
        let ids = tokens(load.batch, step as u64 + 77, vocab);
        let inputs: Vec<_> =
            seqs.iter().zip(&ids).map(|(&seq, id)| SequenceInput { seq, tokens: std::slice::from_ref(id) }).collect();
        let start = Instant::now();
        session.step(&inputs, LogitsWanted::Last, false)?;
        if step >= WARM_UP {
            us.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    for seq in seqs {
        session.remove_sequence(seq);
    }
    Ok(Summary::of(us))
}

/// One kernel's share of a profile.
#[derive(Default, serde::Serialize)]
struct KernelShare {
    launches: u64,
    total_us: f64,
}

fn by_kernel(profile: &[ProfileRow]) -> BTreeMap<String, KernelShare> {
    let mut shares: BTreeMap<String, KernelShare> = BTreeMap::new();
    for row in profile {
        let share = shares.entry(format!("{}: {}", row.step, row.kernel)).or_default();
        share.launches += row.time.runs;
        share.total_us += row.time.total.as_secs_f64() * 1e6;
    }
    shares
}

fn profile_table(name: &str, profile: &[ProfileRow]) -> String {
    let mut shares: Vec<_> = by_kernel(profile).into_iter().collect();
    shares.sort_by(|a, b| b.1.total_us.total_cmp(&a.1.total_us));
    let all: f64 = shares.iter().map(|(_, s)| s.total_us).sum();
    let rows = shares.iter().map(|(kernel, s)| {
        let each = s.total_us / s.launches.max(1) as f64;
        vec![kernel.clone(), s.launches.to_string(), format!("{each:.1}"), format!("{:.1} %", 100.0 * s.total_us / all)]
    });
    table(&[name, "launches", "us each", "share"], rows)
}
