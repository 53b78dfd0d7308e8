//! `dsc bench`: a compiled model ([`model`]), or one kernel alone ([`kernel`]).

#[cfg(feature = "compile")]
mod kernel;
mod model;
mod report;

use super::{BundleArgs, DeviceArgs, Failure, Outcome, WeightsArg, print, print_json, table, weights_arg};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// The artifact that `dsc compile` wrote
    #[arg(required_unless_present = "kernel", conflicts_with = "kernel")]
    bundle: Option<PathBuf>,
    /// The model folder with the original weights; or random:SEED, made-up ones
    #[arg(long, value_name = "MODEL_DIR|random:SEED", value_parser = weights_arg(),
          required_unless_present = "kernel", conflicts_with = "kernel")]
    weights: Option<WeightsArg>,
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
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Outcome {
    if args.kernel.is_some() {
        return one_kernel(&args);
    }
    let (Some(bundle), Some(weights)) = (args.bundle, args.weights) else {
        unreachable!("clap requires a bundle and weights where there is no kernel")
    };
    let bundle = BundleArgs { bundle, weights, device: args.device, json: args.json };
    model::run(&bundle, &args.load)
}

#[cfg(feature = "compile")]
fn one_kernel(args: &Args) -> Outcome {
    kernel::run(args)
}

#[cfg(not(feature = "compile"))]
fn one_kernel(_: &Args) -> Outcome {
    Err(Failure::new("--kernel compiles the kernel that it times, and this dsc was built without the compiler")
        .help("use a dsc with the `compile` feature, or time an artifact")
        .into())
}
