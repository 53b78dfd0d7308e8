//! Times the steps of a compiled model, and their kernels.

use super::report::{self, Achieved, HEADER, KernelShare, Requests, Summary, by_kernel, limits_line, profile_table};
use super::{BundleArgs, Failure, Outcome, print, print_json, table};
use dsc_ir::artifact::Header;
use dsc_runtime::{Limits, Sampler, SequenceInput, Session};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Instant;

/// What to time.
#[derive(clap::Args)]
pub struct LoadArgs {
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
    /// Draw tokens at this temperature, with a nucleus of 0.95; 0: the likeliest
    #[arg(long, default_value_t = 0.0, value_name = "T")]
    temperature: f32,
    /// Split steps by kernel
    #[arg(long)]
    profile: bool,
}

/// What is timed.
struct Load {
    prefill: usize,
    context: usize,
    batch: usize,
    steps: usize,
    repeat: usize,
    sampler: Sampler,
    profile: bool,
}

/// Decode steps before those that are timed.
const WARM_UP: usize = 4;

impl Load {
    fn new(args: &LoadArgs, max_context: u32) -> Result<Load, Failure> {
        let decoded = args.steps + WARM_UP as u32;
        let load = Load {
            prefill: args.prefill.unwrap_or(max_context.min(1024)) as usize,
            context: args.context.unwrap_or(max_context.saturating_sub(decoded).clamp(1, 384)) as usize,
            batch: args.batch as usize,
            steps: args.steps as usize,
            repeat: args.repeat as usize,
            sampler: Sampler::new(args.temperature, 0.95, 1).map_err(|e| Failure::new(e.to_string()))?,
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

pub fn run(bundle: &BundleArgs, args: &LoadArgs) -> Outcome {
    let facts = bundle.facts()?;
    let load = Load::new(args, facts.max_context)?;
    let sequences = load.prefill.div_ceil(load.sequence()).max(load.batch);
    let started = Instant::now();
    let model = bundle.open(&facts, load.sequence(), sequences)?;
    let opened_s = started.elapsed().as_secs_f64();
    let mut session = model.session()?;
    let session_s = started.elapsed().as_secs_f64() - opened_s;
    let first_s = first_token(&mut session)?;
    let prefill = report("prefill", &mut session, &load, |s, profile| time_prefill(s, &load, facts.vocab, profile))?;
    let decode = report("decode", &mut session, &load, |s, profile| time_decode(s, &load, facts.vocab, profile))?;
    let per_s = |timed: &Report, tokens: usize| tokens as f64 / timed.times.median_us * 1e6;
    let (prefill_rate, decode_rate) = (per_s(&prefill, load.prefill), per_s(&decode, load.batch));
    if bundle.json {
        print_json(&serde_json::json!({
            "device": session.device(),
            "target": model.header().target,
            "opening": model.opening(), "session_s": session_s, "first_token_s": first_s,
            "memory_planned": model.planned_bytes(), "memory_used": session.memory_used(),
            "numerics": model.header().numerics,
            "prefill_tokens": load.prefill, "prefill": prefill.times, "prefill_tokens_per_s": prefill_rate,
            "batch": load.batch, "context": load.context, "decode": decode.times, "decode_tokens_per_s": decode_rate,
            "prefill_work": prefill.work, "decode_work": decode.work,
            "prefill_limits": prefill.limits, "decode_limits": decode.limits,
            "prefill_profile": prefill.shares, "decode_profile": decode.shares,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let line = |what: String, timed: &Report, rate: f64| {
        let s = &timed.times;
        let us = [s.median_us, s.min_us, s.max_us, rate].map(|x| format!("{x:.0}"));
        [vec![what], us.to_vec(), timed.work.cells()].concat()
    };
    let rows = [
        line(format!("prefill of {}", load.prefill), &prefill, prefill_rate),
        line(format!("decode step, batch {}, context {}", load.batch, load.context), &decode, decode_rate),
    ];
    let mut text = format!("{}\n", session.device());
    let o = model.opening();
    let ms = [o.artifact_s, o.device_s, o.code_s, o.weights_s, session_s, first_s].map(|s| format!("{:.0}", s * 1e3));
    let [artifact, device, code, weights, ready, first] = ms;
    writeln!(
        text,
        "opened in ms: artifact {artifact}, device {device}, kernels {code}, weights {weights}, session {ready}, first token {first}"
    )?;
    if let Some(used) = session.memory_used() {
        let planned = model.planned_bytes();
        let more = (used as f64 / planned as f64 - 1.0) * 100.0;
        writeln!(text, "memory: {used} bytes in use, {planned} planned ({more:+.2} %)")?;
    }
    text += &table(&[&["", "median us", "min", "max", "tokens/s"][..], &HEADER].concat(), rows);
    for timed in [&prefill, &decode] {
        if let Some(limits) = &timed.limits {
            writeln!(text, "{} {}", timed.name, limits_line(limits))?;
        }
    }
    for timed in [&prefill, &decode] {
        if !timed.shares.is_empty() {
            write!(text, "\n{}", profile_table(timed.name, &timed.shares))?;
        }
    }
    print(text)?;
    Ok(ExitCode::SUCCESS)
}

/// Seconds from a prompt of one token to the token after it, in a session that has run nothing yet.
fn first_token(session: &mut Session) -> Result<f64, Box<dyn std::error::Error>> {
    let seq = session.add_sequence();
    let start = Instant::now();
    session.choose(&[SequenceInput { seq, tokens: &[0] }], &[Sampler::Greedy])?;
    let took = start.elapsed().as_secs_f64();
    session.remove_sequence(seq);
    Ok(took)
}

/// Requests that were timed.
#[derive(Default)]
struct Timed {
    us: Vec<f64>,
    requests: Requests,
}

impl Timed {
    /// Takes the time of one request.
    fn add(&mut self, session: &Session, start: Instant) {
        self.us.push(start.elapsed().as_secs_f64() * 1e6);
        self.requests.push(session.last_steps().to_vec());
    }

    /// Compares with the device's limits; ends the session's profile.
    fn report(self, session: &mut Session, name: &'static str) -> Report {
        let profile = session.take_profile();
        let limits = session.limits(report::working_set(session.header(), &self.requests));
        let header: &Header = session.header();
        let shares = by_kernel(header, &profile, &self.requests, limits.as_ref());
        let all = report::tally(header, &self.requests, limits.as_ref());
        let times = Summary::of(self.us);
        let work = Achieved::new(&all.divided(self.requests.len()), times.median_us);
        Report { name, times, work, limits, shares }
    }
}

/// What is told of some requests.
struct Report {
    name: &'static str,
    times: Summary,
    /// Of one request, on average.
    work: Achieved,
    limits: Option<Limits>,
    /// By step and kernel; empty unless they were profiled.
    shares: BTreeMap<String, KernelShare>,
}

/// Token ids that differ from each other and from run to run of the loop, the same every time.
fn tokens(n: usize, salt: u64, vocab: u32) -> Vec<u32> {
    let mix = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % vocab.max(1);
    (0..n as u64).map(|i| mix(i + salt * 1_000_003)).collect()
}

/// Times requests, and, if asked for, splits others like them by kernel: launches that are timed one by one do not overlap.
fn report(
    name: &'static str,
    session: &mut Session,
    load: &Load,
    time: impl Fn(&mut Session, bool) -> Result<Timed, Box<dyn std::error::Error>>,
) -> Result<Report, Box<dyn std::error::Error>> {
    let mut report = time(session, false)?.report(session, name);
    if load.profile {
        report.shares = time(session, true)?.report(session, name).shares;
    }
    Ok(report)
}

fn time_prefill(
    session: &mut Session,
    load: &Load,
    vocab: u32,
    profile: bool,
) -> Result<Timed, Box<dyn std::error::Error>> {
    let mut timed = Timed::default();
    if profile {
        session.start_profile();
    }
    for round in usize::from(profile)..=load.repeat {
        let ids = tokens(load.prefill, round as u64, vocab);
        let seq = session.add_sequence();
        let start = Instant::now();
        session.choose(&[SequenceInput { seq, tokens: &ids }], &[load.sampler])?;
        timed.add(session, start);
        session.remove_sequence(seq);
        if round == 0 {
            timed = Timed::default(); // the first touches memory for the first time
        }
    }
    Ok(timed)
}

fn time_decode(
    session: &mut Session,
    load: &Load,
    vocab: u32,
    profile: bool,
) -> Result<Timed, Box<dyn std::error::Error>> {
    // All sequences have the same past, each a copy of its own; what is decoded differs.
    let first = session.add_sequence();
    let ids = tokens(load.context, 0, vocab);
    session.choose(&[SequenceInput { seq: first, tokens: &ids }], &[load.sampler])?;
    let mut seqs = vec![first];
    for _ in 1..load.batch {
        seqs.push(session.fork(first)?);
    }
    let mut timed = Timed::default();
    for step in 0..load.steps + WARM_UP {
        if step == WARM_UP && profile {
            session.start_profile();
        }
        let ids = tokens(load.batch, step as u64 + 77, vocab);
        let inputs: Vec<_> =
            seqs.iter().zip(&ids).map(|(&seq, id)| SequenceInput { seq, tokens: std::slice::from_ref(id) }).collect();
        let start = Instant::now();
        session.choose(&inputs, &vec![load.sampler; inputs.len()])?;
        if step >= WARM_UP {
            timed.add(session, start);
        }
    }
    for seq in seqs {
        session.remove_sequence(seq);
    }
    Ok(timed)
}
