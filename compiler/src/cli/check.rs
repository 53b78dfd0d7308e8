//! `dsc check`.

use super::{DeviceArgs, Outcome, print, print_json, progress, table};
use dsc_runtime::{Artifact, verify_kernels};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    /// The artifact that `dsc compile` wrote
    bundle: PathBuf,
    /// Only kernels whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    kernel: String,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Outcome {
    let artifact = Artifact::open(&args.bundle)?;
    let mut device = args.device.open(&artifact.header().target)?;
    let bar = progress::bar("Checking", artifact.header().kernels.len() as u64);
    let reports = verify_kernels(&artifact, &mut *device, &args.kernel, &|done, all, _| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let passed = reports.iter().all(|r| r.failures.is_empty());
    if args.json {
        print_json(&reports)?;
    } else {
        let rows = reports.iter().map(|r| {
            let worst: Vec<String> = r.worst.iter().map(|(dtype, e)| format!("{dtype} {e:.1e}")).collect();
            let verdict = match (&r.skipped, r.failures.as_slice()) {
                (Some(why), _) => format!("not run: {why}"),
                (None, []) => "passed".into(),
                (None, [first, ..]) => format!("FAILED {} of {}: {first}", r.failures.len(), r.launches),
            };
            vec![r.kernel.clone(), r.launches.to_string(), worst.join(", "), verdict]
        });
        print(table(&["kernel", "launches", "largest error", ""], rows))?;
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
