//! `dsc eval`.

use super::{BundleArgs, Outcome, open, print_json};
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
    #[arg(long, default_value_t = 1024, value_name = "N")]
    window: usize,
}

pub fn run(args: Args) -> Outcome {
    let text = std::fs::read_to_string(&args.text).map_err(|e| format!("cannot read {}: {e}", args.text.display()))?;
    let model = open(&args.bundle, Some(args.window))?;
    let tokenizer = model.tokenizer()?;
    let result = model.session()?.evaluate_text(&text, &tokenizer, args.window)?;
    if args.bundle.json {
        print_json(&result)?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("nats/token  {:.5}  ({} tokens)", result.nats_per_token, result.scored_tokens);
    println!("perplexity  {:.3}", result.perplexity);
    if let (Some(bits), Some(bytes)) = (result.bits_per_byte, result.scored_bytes) {
        println!("bits/byte   {bits:.5}  ({bytes} bytes)");
    }
    Ok(ExitCode::SUCCESS)
}
