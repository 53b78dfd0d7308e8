//! `dsc tune`.

use super::{
    DeviceArgs, Failure, Outcome, check_destination, print, print_json, progress, table, tell, write_atomically,
};
use crate::tune::{self, Candidates, Found, Trial, Untimed};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Compiles a kernel at the target's schedule and at others near it, compares what they write, times them, and writes the fastest
/// as a rule for `dsc compile --schedules`.
#[derive(clap::Args)]
pub struct Args {
    /// The kernel; `dsc bench --kernel list` shows them
    #[arg(required_unless_present = "from", conflicts_with = "from")]
    kernel: Option<String>,
    /// Sizes of the kernel, where they are not the default: m=16,k=7168
    #[arg(long, value_name = "KEY=VALUE,...", conflicts_with = "from", value_delimiter = ',')]
    shape: Vec<String>,
    /// What to compile for (`dsc targets`)
    #[arg(long, default_value = "cpu", value_name = "NAME", conflicts_with = "from")]
    target: String,
    /// Seconds that the search may take; half of them go to compiling
    #[arg(long, default_value_t = 120, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    limit: u64,
    /// Where to write the rules: a JSON list, empty if the target's own schedule is the fastest
    #[arg(short, long, value_name = "FILE", conflicts_with = "save")]
    output: Option<PathBuf>,
    /// Only compile, into this folder, to be timed elsewhere
    #[arg(long, value_name = "DIR", conflicts_with = "from")]
    save: Option<PathBuf>,
    /// Only time what `--save` wrote; needs no compiler
    #[arg(long, value_name = "DIR")]
    from: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Outcome {
    if let Some(output) = &args.output {
        check_destination(output)?;
    }
    let started = Instant::now();
    let limit = Duration::from_secs(args.limit);
    if let Some(folder) = &args.from {
        let all = Candidates::read(folder)?;
        return search(&args, folder, &all, started + limit);
    }
    if let Some(folder) = &args.save {
        std::fs::create_dir_all(folder)
            .map_err(|e| Failure::new(format!("cannot make the folder {}: {e}", folder.display())))?;
        let all = compile(&args, folder, started + limit)?;
        tell(format_args!(
            "{} schedules of {} {} for {} in {}",
            all.candidates.len(),
            all.kernel,
            all.shape,
            all.target,
            folder.display()
        ));
        return Ok(ExitCode::SUCCESS);
    }
    let folder = tempfile::Builder::new().prefix("dsc-tune-").tempdir();
    let folder = folder.map_err(|e| Failure::new(format!("cannot make a folder for temporary files: {e}")))?;
    let all = compile(&args, folder.path(), started + limit / 2)?;
    search(&args, folder.path(), &all, started + limit)
}

#[cfg(feature = "compile")]
fn compile(args: &Args, folder: &Path, end: Instant) -> Result<Candidates, Box<dyn std::error::Error>> {
    let name = args.kernel.as_deref().unwrap_or_default();
    let choice = crate::microbench::Choice::parse(name, &args.shape)?;
    let target = dsc_targets::target(&args.target, false)?;
    let bar = progress::bar("Compiling", 1);
    let all = tune::compile(folder, choice, &*target, end, &|done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    all
}

#[cfg(not(feature = "compile"))]
fn compile(_: &Args, _: &Path, _: Instant) -> Result<Candidates, Box<dyn std::error::Error>> {
    Err(Failure::new("schedules are compiled to be compared, and this dsc was built without the compiler")
        .help("use `--save DIR` of a dsc with the `compile` feature, and `--from DIR` here")
        .into())
}

fn search(args: &Args, folder: &Path, all: &Candidates, end: Instant) -> Outcome {
    let bar = progress::bar("Timing", all.candidates.len() as u64);
    let open = |target: &str| args.device.open(target);
    let found = tune::search(folder, all, &open, end, &|done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let found = found?;
    if let Some(output) = &args.output {
        let rules: Vec<_> = found.winner.iter().map(|w| &w.rule).collect();
        write_atomically(output, format!("{}\n", serde_json::to_string_pretty(&rules)?).as_bytes())?;
    }
    if args.json {
        let device = open(&all.target)?.describe();
        print_json(&serde_json::json!({
            "device": device, "target": all.target, "kernel": all.kernel, "shape": all.shape,
            "dropped": all.dropped, "found": found,
        }))?;
    } else {
        show(all, &found)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn show(all: &Candidates, found: &Found) -> Result<(), Box<dyn std::error::Error>> {
    let mut rows = Vec::new();
    let told = |t: &&Trial| t.us.is_some() || matches!(t.why, Some(Untimed::Wrong(_)));
    for trial in found.trials.iter().filter(told) {
        let schedule = match trial.rule.schedule.is_empty() {
            true => "the target's own".into(),
            false => serde_json::to_string(&trial.rule.schedule)?,
        };
        let us = trial.us.map_or("-".into(), |us| format!("{us:.2}"));
        let share = trial.us.map_or(String::new(), |us| format!("{:.2}", us / found.own_us));
        let why = trial.why.as_ref().map_or(String::new(), Untimed::to_string);
        rows.push(vec![schedule, us, share, why]);
    }
    let timed = rows.len();
    let mut text = format!("{} {}, for {}\n", all.kernel, all.shape, all.target);
    text += &table(&["schedule", "median us", "of the own", ""], rows);
    let rest = found.trials.len() - timed;
    text += &format!("not timed: {rest}; not compiled, or the same code as another: {}\n", all.dropped);
    if !found.complete {
        text += "the time was up before all were timed: --limit gives more\n";
    }
    text += match &found.winner {
        Some(_) => "the first is faster\n",
        None => "none is faster by more than noise: the target's own stays\n",
    };
    print(text)?;
    Ok(())
}
