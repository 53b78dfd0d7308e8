//! `dsc bench`.

use super::{BundleArgs, Outcome, open, print_json, table};
use dsc_runtime::{LogitsWanted, ProfileRow, SequenceInput, Session};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Tokens of the prefill that is timed
    #[arg(long, default_value_t = 1024, value_name = "N")]
    prefill: usize,
    /// Tokens in the context before decoding starts
    #[arg(long, default_value_t = 384, value_name = "N")]
    context: usize,
    /// Sequences decoded together
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Decode steps that are timed
    #[arg(long, default_value_t = 64, value_name = "N")]
    steps: usize,
    /// Prefills that are timed
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeat: usize,
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

pub fn run(args: Args) -> Outcome {
    if args.batch == 0 || args.steps == 0 || args.repeat == 0 || args.prefill == 0 || args.context == 0 {
        return Err("--prefill, --context, --batch, --steps and --repeat must be at least 1".into());
    }
    let need = args.prefill.max((args.context + args.steps + 64).saturating_mul(args.batch));
    let model = open(&args.bundle, Some(need))?;
    let mut session = model.session()?;
    let vocab = model.header().model.vocab;
    let prefill = time_prefill(&mut session, &args, vocab)?;
    let prefill_profile = session.take_profile();
    let decode = time_decode(&mut session, &args, vocab)?;
    let decode_profile = session.take_profile();
    if args.bundle.json {
        print_json(&serde_json::json!({
            "device": session.device(),
            "target": model.header().target,
            "numerics": model.header().numerics,
            "prefill_tokens": args.prefill, "prefill": prefill,
            "batch": args.batch, "context": args.context, "decode": decode,
            "prefill_profile": by_kernel(&prefill_profile), "decode_profile": by_kernel(&decode_profile),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", session.device());
    let line = |what: String, s: &Summary, tokens: usize| {
        let rate = tokens as f64 / s.median_us * 1e6;
        vec![what, format!("{:.0}", s.median_us), format!("{:.0}", s.min_us), format!("{:.0}", s.max_us), format!("{rate:.0}")]
    };
    let rows = [
        line(format!("prefill of {}", args.prefill), &prefill, args.prefill),
        line(format!("decode step, batch {}, context {}", args.batch, args.context), &decode, args.batch),
    ];
    println!("{}", table(&["", "median us", "min", "max", "tokens/s"], rows));
    for (name, profile) in [("prefill", &prefill_profile), ("decode", &decode_profile)] {
        if !profile.is_empty() {
            show_profile(name, profile);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Token ids that differ from each other and from run to run of the loop, the same every time.
fn tokens(n: usize, salt: u64, vocab: u32) -> Vec<u32> {
    let mix = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab.max(1);
    (0..n as u64).map(|i| mix(i + salt * 1_000_003)).collect()
}

fn time_prefill(session: &mut Session, args: &Args, vocab: u32) -> Result<Summary, Box<dyn std::error::Error>> {
    let mut us = Vec::new();
    for round in 0..=args.repeat {
        let ids = tokens(args.prefill, round as u64, vocab);
        let seq = session.add_sequence();
        let start = Instant::now();
        session.step(&[SequenceInput { seq, tokens: &ids }], LogitsWanted::Last, false)?;
        us.push(start.elapsed().as_secs_f64() * 1e6);
        session.remove_sequence(seq);
        if round == 0 {
            us.clear(); // the first touches memory for the first time
            if args.profile {
                session.start_profile();
            }
        }
    }
    Ok(Summary::of(us))
}

fn time_decode(session: &mut Session, args: &Args, vocab: u32) -> Result<Summary, Box<dyn std::error::Error>> {
    let seqs: Vec<_> = (0..args.batch).map(|_| session.add_sequence()).collect();
    for (i, &seq) in seqs.iter().enumerate() {
        let ids = tokens(args.context, i as u64, vocab);
        session.step(&[SequenceInput { seq, tokens: &ids }], LogitsWanted::Last, false)?;
    }
    let mut us = Vec::new();
    const WARM_UP: usize = 4;
    for step in 0..args.steps + WARM_UP {
        if step == WARM_UP && args.profile {
            session.start_profile();
        }
        let ids = tokens(args.batch, step as u64 + 77, vocab);
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

fn show_profile(name: &str, profile: &[ProfileRow]) {
    let mut shares: Vec<_> = by_kernel(profile).into_iter().collect();
    shares.sort_by(|a, b| b.1.total_us.total_cmp(&a.1.total_us));
    let all: f64 = shares.iter().map(|(_, s)| s.total_us).sum();
    let rows = shares.iter().map(|(kernel, s)| {
        let each = s.total_us / s.launches.max(1) as f64;
        vec![kernel.clone(), s.launches.to_string(), format!("{each:.1}"), format!("{:.1} %", 100.0 * s.total_us / all)]
    });
    println!("\n{}", table(&[name, "launches", "us each", "share"], rows));
}
