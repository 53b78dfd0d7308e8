//! `dsc run`.

use super::{BundleArgs, Failure, Outcome, check_destination, check_tokens, print_json, tell, write_atomically};
use dsc_runtime::tokenizer::{Detokenizer, TokenizerError};
use dsc_runtime::{
    FinishReason, GenerateOptions, LogitsWanted, Sampler, SeqId, SequenceInput, Session, StepOutput, Timings, Tokenizer,
};
use safetensors::tensor::{Dtype, TensorView};
use std::error::Error;
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

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
    /// Choose the likeliest token each time; the default without --temperature
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "seed"])]
    greedy: bool,
    /// Sample, with the distribution sharpened (below 1) or flattened (above 1); 0 is greedy
    #[arg(long, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Sample only from the likeliest tokens that make up this probability
    #[arg(long, default_value_t = 1.0, value_name = "P", requires = "temperature",
          value_parser = top_p, allow_negative_numbers = true)]
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

fn temperature(text: &str) -> Result<f32, String> {
    let usable = |t: &f32| *t >= 0.0 && t.is_finite();
    text.parse().ok().filter(usable).ok_or_else(|| "give a number of at least 0, such as 0.7".into())
}

fn top_p(text: &str) -> Result<f32, String> {
    let usable = |p: &f32| *p > 0.0 && *p <= 1.0;
    text.parse().ok().filter(usable).ok_or_else(|| "give a number above 0 and up to 1, such as 0.95".into())
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Answer {
    prompt_tokens: usize,
    token_ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    finish_reason: FinishReason,
    timings: Timings,
}

pub fn run(args: Args) -> Outcome {
    let sampler = match args.temperature {
        Some(temperature) => Sampler::new(temperature, args.top_p, args.seed)?,
        None => Sampler::Greedy,
    };
    if let Some(path) = &args.dump_logits {
        check_destination(path)?;
    }
    // Whatever can be wrong with the request is found before gigabytes of weights are read.
    let facts = args.bundle.facts()?;
    let tokenizer = tokenizer(&args)?;
    let prompt = match (&args.token_ids, &args.prompt, &tokenizer) {
        (Some(path), _, _) => read_token_ids(path)?,
        (None, Some(text), Some(tokenizer)) => tokenizer.encode(text)?,
        _ => unreachable!("clap requires one input, and a prompt has a tokenizer by now"),
    };
    if prompt.is_empty() {
        return Err(Failure::new("the prompt has no tokens")
            .help("give at least one, such as the model's first-token marker")
            .into());
    }
    check_tokens(&facts, &prompt)?;
    let model = args.bundle.open(&facts, prompt.len().saturating_add(args.max_new_tokens), 1)?;
    let mut session = model.session()?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens,
        sampler,
        ignore_eos: args.ignore_eos,
        ..GenerateOptions::default()
    };
    let mut stream = Stream::new(tokenizer.as_ref(), facts.eos, args.bundle.json);
    if let Some(text) = &args.prompt {
        stream.show(text);
    }
    let mut on_token = |token| stream.token(token);
    let generation = match &args.dump_logits {
        None => session.generate(&prompt, &options, &mut on_token)?,
        Some(path) => {
            let seq = session.add_sequence();
            let (output, prompt_s) = dump_logits(&mut session, seq, &prompt, path)?;
            let last = output.row(output.rows.saturating_sub(1));
            let first = options.sampler.pick(last, prompt.len() as u64)?;
            let mut generation = session.continue_from(seq, Some(first), &options, &mut on_token)?;
            generation.timings.prompt_s = prompt_s;
            generation
        }
    };
    let text = stream.finish()?;
    if args.bundle.json {
        print_json(&Answer {
            prompt_tokens: prompt.len(),
            token_ids: generation.token_ids,
            text,
            finish_reason: generation.finish_reason,
            timings: generation.timings,
        })?;
    } else {
        let t = &generation.timings;
        let rate = if t.decode_tokens > 0 { format!(" at {:.0}/s", t.decode_tokens_per_s()) } else { String::new() };
        tell(format_args!(
            "[prompt of {} tokens at {:.0}/s, {} new{rate}]",
            t.prompt_tokens,
            t.prompt_tokens_per_s(),
            generation.token_ids.len(),
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// The tokenizer beside the weights. Token ids do without: then one that is missing or broken only costs the text.
fn tokenizer(args: &Args) -> Result<Option<Tokenizer>, TokenizerError> {
    match args.bundle.tokenizer() {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(e) if args.prompt.is_some() => Err(e),
        Err(TokenizerError::Missing { .. } | TokenizerError::NoFolder) => Ok(None),
        Err(e) => {
            tell(format_args!("note: {e}; the answer comes as token ids"));
            Ok(None)
        }
    }
}

fn read_token_ids(path: &Path) -> Result<Vec<u32>, Failure> {
    let (name, text) = if path.as_os_str() == "-" {
        let mut text = String::new();
        ("standard input".into(), std::io::stdin().read_to_string(&mut text).map(|_| text))
    } else {
        (path.display().to_string(), std::fs::read_to_string(path))
    };
    let text = text.map_err(|e| Failure::new(format!("cannot read token ids from {name}: {e}")))?;
    let parse = |(place, word): (usize, &str)| {
        word.parse().map_err(|_| {
            let shown: String = word.chars().take(40).collect();
            Failure::new(format!("{name}: `{shown}`, word {} of it, is not a token id", place + 1))
                .help("give whole numbers from 0, separated by white space")
        })
    };
    text.split_whitespace().enumerate().map(parse).collect()
}

/// Feeds the prompt and writes its logits; what the step gave, and the seconds it took.
fn dump_logits(
    session: &mut Session,
    seq: SeqId,
    prompt: &[u32],
    path: &Path,
) -> Result<(StepOutput, f64), Box<dyn Error>> {
    let start = Instant::now();
    let output = session.step(&[SequenceInput { seq, tokens: prompt }], LogitsWanted::All, false)?;
    let prompt_s = start.elapsed().as_secs_f64();
    let bytes: Vec<u8> = output.logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let vocab = output.logits.len() / output.rows.max(1);
    let view = TensorView::new(Dtype::F32, vec![output.rows, vocab], &bytes)?;
    write_atomically(path, &safetensors::serialize([("logits", view)], None)?)?;
    Ok((output, prompt_s))
}

/// Shows tokens as they come: text where there is a tokenizer, ids otherwise; nothing with `--json`.
struct Stream<'a> {
    decoder: Option<Detokenizer<'a>>,
    eos: Vec<u32>,
    json: bool,
    text: String,
    /// Why showing ended early.
    broken: Option<Broken>,
}

enum Broken {
    /// The reader closed its end of the pipe: it has seen enough.
    Pipe,
    Stdout(std::io::Error),
    Decode(TokenizerError),
}

impl<'a> Stream<'a> {
    fn new(tokenizer: Option<&'a Tokenizer>, eos: Vec<u32>, json: bool) -> Stream<'a> {
        Stream { decoder: tokenizer.map(|t| t.detokenizer(true)), eos, json, text: String::new(), broken: None }
    }

    /// Shows a piece at once.
    fn show(&mut self, piece: &str) {
        if self.json || self.broken.is_some() {
            return;
        }
        let mut out = std::io::stdout().lock();
        if let Err(e) = out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
            let closed = e.kind() == std::io::ErrorKind::BrokenPipe;
            self.broken = Some(if closed { Broken::Pipe } else { Broken::Stdout(e) });
        }
    }

    fn token(&mut self, token: u32) -> ControlFlow<()> {
        match &mut self.decoder {
            None => self.show(&format!("{token} ")),
            Some(_) if self.eos.contains(&token) => {}
            Some(decoder) => match decoder.push(token) {
                Ok(piece) => self.piece(piece),
                Err(e) => self.broken = Some(Broken::Decode(e)),
            },
        }
        if self.broken.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn piece(&mut self, piece: Option<String>) {
        if let Some(piece) = piece {
            self.show(&piece);
            self.text.push_str(&piece);
        }
    }

    /// The whole text, if there is a tokenizer.
    fn finish(mut self) -> Result<Option<String>, Box<dyn Error>> {
        let decodes = self.decoder.is_some();
        if let Some(decoder) = self.decoder.take() {
            let tail = decoder.finish()?;
            self.piece(tail);
        }
        self.show("\n");
        match self.broken {
            Some(Broken::Decode(e)) => Err(e.into()),
            Some(Broken::Stdout(e)) => Err(Failure::new(format!("cannot write to stdout: {e}")).into()),
            Some(Broken::Pipe) | None => Ok(decodes.then_some(self.text)),
        }
    }
}
