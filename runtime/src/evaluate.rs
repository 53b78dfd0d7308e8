//! How well a model predicts a text: the number that sees wrong numerics.

use crate::error::{Error, RequestError};
use crate::session::{LogitsWanted, SequenceInput, Session};
use crate::tokenizer::Tokenizer;

/// Loss of a model on a text.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// Tokens scored.
    pub scored_tokens: usize,
    /// Bytes of their text, if it is known.
    pub scored_bytes: Option<usize>,
    /// Mean of `−ln p` of the scored tokens.
    pub nats_per_token: f64,
    /// `e` to the power of that.
    pub perplexity: f64,
    /// Sum of `−log2 p` a byte of text, if the bytes are known.
    pub bits_per_byte: Option<f64>,
    /// Sum of `−ln p` of each window.
    pub window_nats: Vec<f64>,
}

impl Session {
    /// Scores tokens in windows of `bos` and `window − 1` consecutive tokens, each from scratch; the tail that fills no window
    /// is left out.
    ///
    /// # Errors
    /// [`RequestError::Window`] if no window is filled; as [`Session::step`].
    pub fn evaluate(&mut self, tokens: &[u32], window: usize, bos: u32) -> Result<Evaluation, Error> {
        let width = window.saturating_sub(1);
        if width == 0 || tokens.len() < width {
            return Err(RequestError::Window { tokens: tokens.len(), window }.into());
        }
        let rows: Vec<u32> = (0..width as u32).collect();
        let mut window_nats = Vec::new();
        for scored in tokens.chunks_exact(width) {
            let fed: Vec<u32> = std::iter::once(bos).chain(scored[..width - 1].iter().copied()).collect();
            let seq = self.add_sequence();
            let output = self.step(&[SequenceInput { seq, tokens: &fed }], LogitsWanted::Rows(&rows), false);
            self.remove_sequence(seq);
            let output = output?;
            if let Some((place, &token)) = scored.iter().enumerate().find(|(_, t)| **t >= self.header().model.vocab) {
                return Err(RequestError::Token { token, place, vocab: self.header().model.vocab }.into());
            }
            window_nats.push(scored.iter().enumerate().map(|(i, &token)| surprise(output.row(i), token)).sum());
        }
        let scored_tokens = window_nats.len() * width;
        let nats_per_token = window_nats.iter().sum::<f64>() / scored_tokens as f64;
        Ok(Evaluation {
            scored_tokens,
            nats_per_token,
            perplexity: nats_per_token.exp(),
            window_nats,
            ..Evaluation::default()
        })
    }

    /// Scores a text; see [`Session::evaluate`]. Windows start with the model's first token, or 0 if it names none.
    ///
    /// # Errors
    /// As [`Session::evaluate`]; [`Error::Tokenizer`].
    pub fn evaluate_text(&mut self, text: &str, tokenizer: &Tokenizer, window: usize) -> Result<Evaluation, Error> {
        let tokens = tokenizer.encode(text)?;
        let bos = self.header().model.bos.unwrap_or(0);
        let mut result = self.evaluate(&tokens, window, bos)?;
        let scored = tokenizer.decode(&tokens[..result.scored_tokens], false)?;
        result.set_bytes(scored.len());
        Ok(result)
    }
}

impl Evaluation {
    /// Sets the bytes of the scored tokens' text, and what follows from them.
    pub fn set_bytes(&mut self, bytes: usize) {
        self.scored_bytes = Some(bytes);
        let bits = self.nats_per_token * self.scored_tokens as f64 / std::f64::consts::LN_2;
        self.bits_per_byte = (bytes > 0).then(|| bits / bytes as f64);
    }
}

/// `−ln softmax(logits)[token]`.
fn surprise(logits: &[f32], token: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(most)).exp()).sum();
    sum.ln() + f64::from(most) - f64::from(logits[token as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn surprise_is_minus_log_softmax() {
        assert!((surprise(&[0.0; 8], 3) - 8f64.ln()).abs() < 1e-12);
        assert!((surprise(&[1000.0, 0.0], 1) - 1000.0).abs() < 1e-9);
        assert!(surprise(&[f32::NAN, 0.0], 1).is_nan());
    }

    #[test]
    fn bits_per_byte_of_the_tiny_model() {
        let mut e = Evaluation { scored_tokens: 8184, nats_per_token: 3.289_273_6, ..Evaluation::default() };
        e.set_bytes(24228);
        assert!((e.bits_per_byte.unwrap() - 1.602_959_6).abs() < 1e-6);
    }
}
