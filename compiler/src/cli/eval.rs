//! `dsc eval`.

use super::{BundleArgs, Failure, Outcome, check_context, print, print_json};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// The text to score
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens of a window, the first-token marker included
    #[arg(long, default_value_t = 1024, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    window: u32,
}

pub fn run(args: Args) -> Outcome {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|e| Failure::new(format!("cannot read {}: {e}", args.text.display())))?;
    let facts = args.bundle.facts()?;
    let window = args.window as usize;
    // A window's last token is scored, not fed.
    check_context(&facts, window - 1).map_err(|_| {
        Failure::new(format!("--window {window} is beyond the artifact's longest context, {}", facts.max_context))
            .help("give a smaller --window, or compile the model with a larger --max-context")
    })?;
    let tokenizer = args.bundle.tokenizer()?;
    let model = args.bundle.open(&facts, window, 1)?;
    let result = model.session()?.evaluate_text(&text, &tokenizer, window)?;
    if !result.nats_per_token.is_finite() {
        return Err(Failure::new(format!(
            "the loss is {}: the weights or the kernels are wrong",
            result.nats_per_token
        ))
        .help("run `dsc verify` with golden outputs of these weights")
        .into());
    }
    if args.bundle.json {
        print_json(&result)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut shown = format!("nats/token  {:.5}  ({} tokens)\n", result.nats_per_token, result.scored_tokens);
    writeln!(shown, "perplexity  {:.3}", result.perplexity)?;
    if let (Some(bits), Some(bytes)) = (result.bits_per_byte, result.scored_bytes) {
        writeln!(shown, "bits/byte   {bits:.5}  ({bytes} bytes)")?;
    }
    print(shown)?;
    Ok(ExitCode::SUCCESS)
}
