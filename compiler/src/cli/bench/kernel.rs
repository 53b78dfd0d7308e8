//! Times one kernel of the library.

use super::report::{Achieved, HEADER, Summary, Tally, limits_line};
use super::{Args, Outcome, print, print_json, table};
use crate::microbench::{self, Bench, Choice, FAMILIES, Timing};
use dsc_ir::work::Cost;
use dsc_runtime::Limits;
use std::process::ExitCode;
use std::time::Duration;

/// How long a kernel is timed.
const PATIENCE: Duration = Duration::from_millis(700);
/// Operands take turns in this much memory: more than any last-level cache.
const ROTATE: u64 = 512 << 20;

pub fn run(args: &Args) -> Outcome {
    let name = args.kernel.as_deref().unwrap_or("list");
    if name == "list" {
        return list(args.json);
    }
    let choice = Choice::parse(name, &args.shape)?;
    let target = dsc_targets::target(&args.target, false)?;
    let bench = microbench::prepare(choice, &*target, &[])?;
    let mut device = args.device.open(&bench.compiled.header.target)?;
    let timing = microbench::time(&bench.compiled.header, bench.code(), &mut *device, PATIENCE, ROTATE)?;
    let limits = device.limits((timing.cost.bytes * timing.copies as f64) as u64);
    show(&bench, &timing, limits.as_ref(), &device.describe(), args.json)
}

fn achieved(costs: &[&Cost], us: f64, limits: Option<&Limits>) -> Achieved {
    let mut tally = Tally::default();
    costs.iter().for_each(|cost| tally.add(cost, limits));
    Achieved::new(&tally, us)
}

fn show(bench: &Bench, timing: &Timing, limits: Option<&Limits>, device: &str, json: bool) -> Outcome {
    let times = Summary::of(timing.us.clone());
    let costs: Vec<&Cost> = timing.launches.iter().map(|l| &l.cost).collect();
    let all = achieved(&costs, times.median_us, limits);
    let (name, shape) = (bench.choice.family.name, bench.choice.describe());
    let target = &bench.compiled.header.target;
    if json {
        let launch = |l: &microbench::TimedLaunch| {
            let achieved = achieved(&[&l.cost], l.us, limits);
            serde_json::json!({"node": l.node, "kernel": l.kernel, "us": l.us, "runs": l.runs, "work": achieved})
        };
        print_json(&serde_json::json!({
            "device": device, "target": target, "kernel": name, "shape": shape,
            "copies": timing.copies, "copy_bytes": timing.copy_bytes, "rounds": timing.us.len(),
            "times": times, "work": all, "limits": limits,
            "launches": timing.launches.iter().map(launch).collect::<Vec<_>>(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = vec![
        [
            vec![name.to_string()],
            [times.median_us, times.min_us, times.max_us].map(|x| format!("{x:.1}")).to_vec(),
            all.cells(),
        ]
        .concat(),
    ];
    for l in &timing.launches {
        let times = vec![format!("  {}", l.kernel), format!("{:.1}", l.us), String::new(), String::new()];
        rows.push([times, achieved(&[&l.cost], l.us, limits).cells()].concat());
    }
    let mut text = format!("{device}\n{name} {shape}, for {target}\n");
    text += &table(&[&["", "median us", "min", "max"][..], &HEADER].concat(), rows);
    text += &format!("operands rotate over {} copies of {}\n", timing.copies, super::super::bytes(timing.copy_bytes));
    if let Some(limits) = limits {
        text += &format!("{}\n", limits_line(limits));
    }
    print(text)?;
    Ok(ExitCode::SUCCESS)
}

/// The families with their keys and defaults.
fn list(json: bool) -> Outcome {
    if json {
        let family = |f: &microbench::Family| {
            let sizes: serde_json::Map<String, serde_json::Value> =
                f.sizes.iter().map(|(k, v)| (k.to_string(), (*v).into())).collect();
            serde_json::json!({"kernel": f.name, "what": f.what, "sizes": sizes, "dtypes": f.dtypes})
        };
        print_json(&FAMILIES.iter().map(family).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let entry = |f: &microbench::Family| {
        let mut shape: Vec<String> = f.sizes.iter().map(|(k, v)| format!("{k}={v}")).collect();
        if !f.dtypes.is_empty() {
            shape.push(format!("dtype={}", f.dtypes.join("|")));
        }
        format!("{}: {}\n    {}\n", f.name, f.what, shape.join(","))
    };
    print(FAMILIES.iter().map(entry).collect::<String>())?;
    Ok(ExitCode::SUCCESS)
}
