//! `dsc bench`: a compiled model ([`model`]), or one kernel alone ([`kernel`]).

#[cfg(feature = "compile")]
mod kernel;
mod model;
mod report;

use super::{BundleArgs, Failure, Outcome, print, print_json, table};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// The artifact that `dsc compile` wrote
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    bundle: Option<PathBuf>,
    /// The model folder with the original weights
    #[arg(long, value_name = "MODEL_DIR", required_unless_present = "kernel", conflicts_with = "kernel")]
    weights: Option<PathBuf>,
    #[command(flatten)]
    load: model::LoadArgs,
    /// Time one kernel of the library instead, on random data; `list` shows them
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Sizes of the kernel, where they are not the default: m=16,k=7168
    #[arg(long, value_name = "KEY=VALUE,...", requires = "kernel", conflicts_with = "bundle", value_delimiter = ',')]
    shape: Vec<String>,
    /// What to compile the kernel for (`dsc targets`)
    #[arg(long, default_value = "cpu", value_name = "NAME", requires = "kernel", conflicts_with = "bundle")]
    target: String,
    /// Worker threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Outcome {
    match (args.kernel, args.bundle, args.weights) {
        (Some(name), ..) => one_kernel(&name, &args.shape, &args.target, args.threads, args.json),
        (None, Some(bundle), Some(weights)) => {
            model::run(&BundleArgs { bundle, weights, threads: args.threads, json: args.json }, &args.load)
        }
        _ => unreachable!("clap requires a bundle and weights where there is no kernel"),
    }
}

#[cfg(feature = "compile")]
fn one_kernel(name: &str, shape: &[String], target: &str, threads: Option<u16>, json: bool) -> Outcome {
    kernel::run(name, shape, target, threads, json)
}

#[cfg(not(feature = "compile"))]
fn one_kernel(_: &str, _: &[String], _: &str, _: Option<u16>, _: bool) -> Outcome {
    Err(Failure::new("--kernel compiles the kernel that it times, and this dsc was built without the compiler")
        .help("use a dsc with the `compile` feature, or time an artifact")
        .into())
}
