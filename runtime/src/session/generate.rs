//! Continuing a text token by token.

use super::{LogitsWanted, SeqId, SequenceInput, Session};
use crate::error::{Error, RequestError};
use crate::sample::Sampler;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// When a generation ends, and how tokens are chosen.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens generated at most.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Tokens that end the text; none: those of the model.
    pub eos: Option<Vec<u32>>,
    /// Whether to go on after one of them.
    pub ignore_eos: bool,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions { max_new_tokens: 128, sampler: Sampler::Greedy, eos: None, ignore_eos: false }
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended the text: the last token is one of `eos`.
    Stop,
    /// `max_new_tokens` are there.
    Length,
    /// The context is full.
    Context,
    /// The callback asked for it.
    Cancelled,
}

/// A generated text.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Generation {
    /// The generated tokens; a token of `eos` that ended them is the last.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timings: Timings,
}

/// How long a generation took.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Seconds until the prompt was processed.
    pub prompt_s: f64,
    /// Tokens fed after the prompt, one at a time.
    pub decode_tokens: usize,
    /// Seconds they took.
    pub decode_s: f64,
}

impl Timings {
    /// Prompt tokens a second.
    pub fn prompt_tokens_per_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_s.max(1e-9)
    }

    /// Generated tokens a second, after the first.
    pub fn decode_tokens_per_s(&self) -> f64 {
        self.decode_tokens as f64 / self.decode_s.max(1e-9)
    }
}

impl Session {
    /// Continues a prompt token by token; `on_token` is told each, and may stop the generation.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Sample`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let seq = self.add_sequence();
        let result = self.generate_in(seq, prompt, options, on_token);
        self.remove_sequence(seq);
        result
    }

    fn generate_in(
        &mut self,
        seq: SeqId,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let start = Instant::now();
        let input = [SequenceInput { seq, tokens: prompt }];
        let mut first = None;
        if options.max_new_tokens > 0 {
            first = self.choose(&input, &[options.sampler])?.pop();
        } else {
            self.step(&input, LogitsWanted::Rows(&[]), false)?;
        }
        let prompt_s = start.elapsed().as_secs_f64();
        let mut generation = self.continue_from(seq, first, options, on_token)?;
        generation.timings.prompt_s = prompt_s;
        Ok(generation)
    }

    /// Continues a sequence whose next token is `first`, which is told and fed as those that follow; none: the generation is over.
    /// All tokens of the sequence count as the prompt, whose time the caller knows.
    ///
    /// # Errors
    /// As [`Session::generate`].
    pub fn continue_from(
        &mut self,
        seq: SeqId,
        first: Option<u32>,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Generation, Error> {
        let prompt_tokens = self.sequence_tokens(seq).ok_or(RequestError::Sequence)? as usize;
        let eos = options.eos.clone().unwrap_or_else(|| self.header().model.eos.clone());
        let mut token_ids: Vec<u32> = Vec::new();
        let mut decode = Duration::ZERO;
        let mut next = first;
        let finish_reason = loop {
            let Some(token) = next.filter(|_| token_ids.len() < options.max_new_tokens) else {
                break FinishReason::Length;
            };
            let position = (prompt_tokens + token_ids.len()) as u64;
            token_ids.push(token);
            if on_token(token).is_break() {
                break FinishReason::Cancelled;
            }
            if !options.ignore_eos && eos.contains(&token) {
                break FinishReason::Stop;
            }
            if token_ids.len() == options.max_new_tokens {
                break FinishReason::Length;
            }
            if position >= u64::from(self.context_limit) || !self.can_append(seq) {
                break FinishReason::Context;
            }
            let start = Instant::now();
            next = self.choose(&[SequenceInput { seq, tokens: &[token] }], &[options.sampler])?.pop();
            decode += start.elapsed();
        };
        let timings = Timings {
            prompt_tokens,
            prompt_s: 0.0,
            decode_tokens: token_ids.len().saturating_sub(1),
            decode_s: decode.as_secs_f64(),
        };
        Ok(Generation { token_ids, finish_reason, timings })
    }
}
