//! A program that embeds the runtime: loads an artifact, streams text, reads logits.
//!
//! ```text
//! dsc compile examples/tiny-model -o tiny.dsc
//! cargo run --release --package dsc-examples --example embed -- tiny.dsc examples/tiny-model "My lord, I have"
//! ```

use dsc_runtime::{GenerateOptions, LogitsWanted, Model, Options, Sampler, SequenceInput};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, bundle, weights, prompt] = args.as_slice() else {
        return Err("usage: embed BUNDLE MODEL_DIR PROMPT".into());
    };
    // A model is what several sessions share: the mapped artifact and the weights.
    let options = Options { context_tokens: Some(2048), ..Options::default() };
    let model = Model::open(Path::new(bundle), Path::new(weights), &options)?;
    let tokenizer = model.tokenizer()?;
    let tokens = tokenizer.encode(prompt)?;
    let mut session = model.session()?;

    // Generation, token by token.
    let sampler = Sampler::new(0.7, 0.95, 1)?;
    let mut text = tokenizer.detokenizer(true);
    let options = GenerateOptions { max_new_tokens: 64, sampler, ..GenerateOptions::default() };
    let generation = session.generate(&tokens, &options, &mut |token| {
        if let Ok(Some(piece)) = text.push(token) {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
        ControlFlow::Continue(())
    })?;
    println!("\n[{:?}, {:.0} tokens/s]", generation.finish_reason, generation.timings.decode_tokens_per_s());

    // Or step by step, with logits in hand: two sequences in one step.
    let (a, b) = (session.add_sequence(), session.add_sequence());
    let inputs = [SequenceInput { seq: a, tokens: &tokens }, SequenceInput { seq: b, tokens: &tokens[..1] }];
    let output = session.step(&inputs, LogitsWanted::Last, false)?;
    for row in 0..output.rows {
        let logits = output.row(row);
        let best = (0..logits.len()).max_by(|&i, &j| logits[i].total_cmp(&logits[j])).unwrap_or(0);
        println!("sequence {row}: token {best} comes next, with logit {:.3}", logits[best]);
    }
    Ok(())
}
