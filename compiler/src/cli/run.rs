//! `dsc run`.

use super::{BundleArgs, Outcome, open, print_json};
use dsc_runtime::{GenerateOptions, LogitsWanted, Model, Sampler, SequenceInput, Session};
use safetensors::tensor::{Dtype, TensorView};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("input").required(true))]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Text to continue (needs tokenizer.json in the model folder)
    #[arg(long, group = "input", value_name = "TEXT")]
    prompt: Option<String>,
    /// Token ids to continue: a file of integers separated by white space, or - for standard input
    #[arg(long, group = "input", value_name = "FILE|-")]
    token_ids: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_new_tokens: usize,
    /// Choose the likeliest token each time [default, unless --temperature is given]
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "seed"])]
    greedy: bool,
    /// Sample, with the distribution sharpened (below 1) or flattened (above 1)
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Sample only from the likeliest tokens that make up this probability
    #[arg(long, default_value_t = 1.0, value_name = "P", requires = "temperature")]
    top_p: f32,
    /// Seed of the sampling: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "S", requires = "temperature")]
    seed: u64,
    /// Go on after the end-of-text token
    #[arg(long)]
    ignore_eos: bool,
    /// Also write the prompt's logits: `logits` f32 [prompt tokens, vocab]
    #[arg(long, value_name = "OUT.safetensors")]
    dump_logits: Option<PathBuf>,
}

pub fn run(args: Args) -> Outcome {
    let sampler = match args.temperature {
        Some(temperature) => Sampler::new(temperature, args.top_p, args.seed)?,
        None => Sampler::Greedy,
    };
    let ids = args.token_ids.as_deref().map(read_token_ids).transpose()?;
    let prompt_hint = ids.as_ref().map_or(args.prompt.as_ref().map_or(0, String::len), Vec::len);
    let model = open(&args.bundle, Some(prompt_hint + args.max_new_tokens))?;
    let tokenizer = match (&args.prompt, model.tokenizer()) {
        (_, Ok(tokenizer)) => Some(tokenizer),
        (None, Err(_)) => None,
        (Some(_), Err(e)) => return Err(format!("{e}\n  --prompt needs a tokenizer; give --token-ids instead").into()),
    };
    let prompt = match (ids, &args.prompt, &tokenizer) {
        (Some(ids), _, _) => ids,
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
        _ => unreachable!("clap requires one input, and a prompt has a tokenizer by now"),
    };
    if prompt.is_empty() {
        return Err("the prompt has no tokens".into());
    }
    let mut session = model.session()?;
    if let Some(path) = &args.dump_logits {
        dump_logits(&mut session, &prompt, path)?;
    }
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampler,
        ignore_eos: args.ignore_eos,
        ..GenerateOptions::default()
    };
    let mut stream = Stream::new(&model, tokenizer.as_ref(), args.bundle.json);
    if let (Some(text), false) = (&args.prompt, args.bundle.json) {
        stream.text(text);
    }
    let generation = session.generate(&prompt, &options, &mut |token| stream.token(token))?;
    let text = stream.finish()?;
    if args.bundle.json {
        print_json(&serde_json::json!({
            "prompt_tokens": prompt.len(),
            "token_ids": generation.token_ids,
            "text": text,
            "finish_reason": generation.finish_reason,
            "timings": generation.timings,
        }))?;
    } else {
        let t = &generation.timings;
        eprintln!(
            "[{} prompt tokens at {:.0}/s, {} new at {:.0}/s]",
            t.prompt_tokens,
            t.prompt_tokens_per_s(),
            generation.token_ids.len(),
            t.decode_tokens_per_s()
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn read_token_ids(path: &Path) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
    let mut text = String::new();
    match path.to_str() {
        Some("-") => std::io::stdin().read_to_string(&mut text).map_err(|e| format!("cannot read token ids: {e}"))?,
        _ => {
            text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            text.len()
        }
    };
    let parse = |(place, word): (usize, &str)| {
        word.parse().map_err(|_| format!("{}: `{word}` (number {}) is not a token id", path.display(), place + 1))
    };
    Ok(text.split_whitespace().enumerate().map(parse).collect::<Result<_, _>>()?)
}

fn dump_logits(session: &mut Session, prompt: &[u32], path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let seq = session.add_sequence();
    let output = session.step(&[SequenceInput { seq, tokens: prompt }], LogitsWanted::All, false)?;
    session.remove_sequence(seq);
    let bytes: Vec<u8> = output.logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let vocab = output.logits.len() / output.rows.max(1);
    let view = TensorView::new(Dtype::F32, vec![output.rows, vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    Ok(super::write_atomically(path, &file)?)
}

/// Shows tokens as they come: text where there is a tokenizer, ids otherwise; nothing with `--json`.
struct Stream<'a> {
    decoder: Option<dsc_runtime::tokenizer::Detokenizer<'a>>,
    json: bool,
    text: String,
    eos: Vec<u32>,
    broken: Option<String>,
}

impl<'a> Stream<'a> {
    fn new(model: &Model, tokenizer: Option<&'a dsc_runtime::Tokenizer>, json: bool) -> Stream<'a> {
        let decoder = tokenizer.map(|t| t.detokenizer(true));
        Stream { decoder, json, text: String::new(), eos: model.header().model.eos.clone(), broken: None }
    }

    /// Prints a piece of text; a closed pipe is not worth a word.
    fn text(&mut self, piece: &str) {
        if !self.json {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(piece.as_bytes()).and_then(|()| out.flush());
        }
    }

    fn token(&mut self, token: u32) -> ControlFlow<()> {
        let Some(decoder) = &mut self.decoder else {
            self.text(&format!("{token} "));
            return ControlFlow::Continue(());
        };
        if self.eos.contains(&token) {
            return ControlFlow::Continue(());
        }
        match decoder.push(token) {
            Ok(Some(piece)) => {
                self.text.push_str(&piece);
                self.text(&piece);
                ControlFlow::Continue(())
            }
            Ok(None) => ControlFlow::Continue(()),
            Err(e) => {
                self.broken = Some(e.to_string());
                ControlFlow::Break(())
            }
        }
    }

    /// The whole text, if there is a tokenizer.
    fn finish(mut self) -> Result<Option<String>, Box<dyn std::error::Error>> {
        if let Some(message) = self.broken {
            return Err(message.into());
        }
        let tail = match self.decoder.take() {
            Some(decoder) => decoder.finish()?,
            None => {
                self.text("\n");
                return Ok(None);
            }
        };
        if let Some(tail) = tail {
            self.text.push_str(&tail);
            self.text(&tail);
        }
        self.text("\n");
        Ok(Some(self.text))
    }
}
