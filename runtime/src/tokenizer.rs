//! Text to token ids and back, by the checkpoint's `tokenizer.json`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const FILE: &str = "tokenizer.json";

/// Why text cannot be turned into tokens or back.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The folder has no tokenizer.
    #[error("{dir} has no {FILE}; give --token-ids instead of text, or copy the file there", dir = .dir.display())]
    Missing {
        /// The folder.
        dir: PathBuf,
    },
    /// The weights are made up and come with no tokenizer.
    #[error("made-up weights have no tokenizer; give --token-ids instead of text")]
    NoFolder,
    /// The file cannot be read.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no tokenizer.
    #[error("{path} is not a tokenizer: {what}; download it again", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        what: String,
    },
    /// The tokenizer refused a text.
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
    /// The tokenizer refused tokens.
    #[error("the tokens cannot be decoded: {0}")]
    Decode(String),
}

/// The tokenizer of a checkpoint.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir`. Truncation and padding in the file are ignored: a prompt is
    /// encoded whole.
    ///
    /// # Errors
    /// [`TokenizerError::Missing`] when there is no such file; [`TokenizerError::Io`] or
    /// [`TokenizerError::Damaged`] when it cannot be used.
    pub fn load(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        let path = dir.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(TokenizerError::Missing { dir: dir.to_path_buf() });
            }
            Err(source) => return Err(TokenizerError::Io { path, source }),
        };
        let inner = parse(&bytes).map_err(|error| TokenizerError::Damaged { path, what: error.to_string() })?;
        Ok(Tokenizer { inner })
    }

    /// The ids of `text`: added tokens written in it, such as `<think>`, become their ids; none is
    /// put around it.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`. Ids without a token give nothing; bytes that are not UTF-8 give U+FFFD;
    /// special tokens such as end of sentence are left out if `skip_special`.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// Decodes a text token by token.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer<'_> {
        Detokenizer { tokenizer: self, skip_special, window: Vec::new(), given: 0 }
    }

    /// The id of a token, by its text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Tokens, added ones included. A model's `vocab_size` may be larger.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn parse(bytes: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    // The tokenizers crate panics on some malformed JSON, so that is found first.
    serde_json::from_slice::<serde_json::Value>(bytes)?;
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
    inner.with_truncation(None)?.with_padding(None);
    Ok(inner)
}

/// Turns a stream of ids into text whose pieces are whole characters.
///
/// A character may be spread over tokens, and until its last byte is there the decoder writes
/// U+FFFD for it. So up to three of these at the end (a character has four bytes) are held back
/// until more comes. Only a window of the last ids is decoded at each step; where it slides, text
/// already given is not given again.
#[derive(Debug)]
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    window: Vec<u32>,
    /// Bytes of the window's text that were given out.
    given: usize,
}

/// Ids after which the window slides, and ids it keeps then.
const WINDOW: usize = 32;
const KEPT: usize = 16;

impl Detokenizer<'_> {
    /// Adds a token; returns the text that is complete now, `None` when there is none.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        self.window.push(id);
        let text = self.text()?;
        let piece = self.give(&text, whole_characters(&text));
        if self.window.len() >= WINDOW {
            self.window.drain(..WINDOW - KEPT);
            self.given = whole_characters(&self.text()?);
        }
        Ok(piece)
    }

    /// Ends the stream; returns what was held back, with U+FFFD for a character that never became
    /// whole.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`].
    pub fn finish(mut self) -> Result<Option<String>, TokenizerError> {
        let text = self.text()?;
        Ok(self.give(&text, text.len()))
    }

    fn text(&self) -> Result<String, TokenizerError> {
        self.tokenizer.decode(&self.window, self.skip_special)
    }

    /// The text from what was given up to byte `end`, when there is any.
    fn give(&mut self, text: &str, end: usize) -> Option<String> {
        let piece = text.get(self.given..end).filter(|piece| !piece.is_empty())?;
        self.given = end;
        Some(piece.to_string())
    }
}

/// Length in bytes of the text without the characters that may be incomplete.
fn whole_characters(text: &str) -> usize {
    let held = text.chars().rev().take(3).take_while(|c| *c == char::REPLACEMENT_CHARACTER).count();
    text.len() - held * char::REPLACEMENT_CHARACTER.len_utf8()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte-level BPE of the family's kind: a few letters, three bytes of 反, four of 😀, one merge
    /// and added tokens.
    const SMALL: &str = r#"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
                    "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
        "added_tokens": [
            {"id": 11, "content": "<eos>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true},
            {"id": 12, "content": "<think>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": true, "special": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "å": 3, "ı": 4, "į": 5, "ð": 6, "Ł": 7, "ĺ": 8, "Ģ": 9, "ab": 10},
            "merges": [["a", "b"]]}
    }"#;

    fn small() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), SMALL).unwrap();
        Tokenizer::load(dir.path()).unwrap()
    }

    fn stream(ids: &[u32], skip_special: bool) -> (Vec<Option<String>>, Option<String>) {
        let tokenizer = small();
        let mut detokenizer = tokenizer.detokenizer(skip_special);
        let pieces = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
        (pieces, detokenizer.finish().unwrap())
    }

    fn joined(ids: &[u32]) -> String {
        let (pieces, last) = stream(ids, false);
        pieces.into_iter().chain([last]).flatten().collect()
    }

    #[test]
    fn encodes_whole_text_and_added_tokens() {
        let tokenizer = small();
        assert_eq!(tokenizer.encode("ab a<think>反b<eos>").unwrap(), [10, 2, 0, 12, 3, 4, 5, 1, 11]);
        assert!(tokenizer.encode("").unwrap().is_empty());
        assert_eq!((tokenizer.len(), tokenizer.is_empty()), (13, false));
        assert_eq!((tokenizer.token_id("<think>"), tokenizer.token_id("x")), (Some(12), None));
    }

    #[test]
    fn decodes() {
        let tokenizer = small();
        let ids = [10, 2, 0, 12, 3, 4, 5, 11];
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "ab a<think>反<eos>");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab a<think>反");
        assert_eq!(tokenizer.decode(&[0, 19, u32::MAX], false).unwrap(), "a");
        assert_eq!(tokenizer.decode(&[], false).unwrap(), "");
    }

    #[test]
    fn streams_whole_characters() {
        let some = |text: &str| Some(text.to_string());
        let (pieces, last) = stream(&[10, 3, 4, 5, 6, 7, 8, 9, 11], true);
        assert_eq!(pieces, [some("ab"), None, None, some("反"), None, None, None, some("😀"), None]);
        assert_eq!(last, None);

        let (pieces, last) = stream(&[0, 3, 4], false);
        assert_eq!(pieces, [some("a"), None, None]);
        assert_eq!(last, some("\u{fffd}"));
    }

    #[test]
    fn stream_equals_decode_over_any_ids() {
        let tokenizer = small();
        let known = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 99];
        let mut state = 1u64;
        for length in 0..300 {
            let ids: Vec<u32> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    known[(state >> 33) as usize % known.len()]
                })
                .collect();
            assert_eq!(joined(&ids), tokenizer.decode(&ids, false).unwrap());
        }
        let smileys = [6, 7, 8, 9].repeat(50);
        assert_eq!(joined(&smileys), "😀".repeat(50));
        assert_eq!(joined(&[4; 100]), "\u{fffd}".repeat(100));
        assert_eq!(joined(&[6, 7, 8].repeat(40)), "\u{fffd}".repeat(40));
    }

    #[test]
    fn broken_files() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, TokenizerError::Missing { .. }), "{error}");
        assert!(error.to_string().contains("--token-ids"), "{error}");

        let path = dir.path().join(FILE);
        let unknown_merge = SMALL.replace(r#"["a", "b"]"#, r#"["a", "z"]"#);
        for text in ["", "{}", "[]", &SMALL[..500], &SMALL.replace("BPE", "Magic"), &unknown_merge] {
            fs::write(&path, text).unwrap();
            let error = Tokenizer::load(dir.path()).unwrap_err();
            assert!(matches!(error, TokenizerError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(FILE), "{error}");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(TokenizerError::Io { .. })));
    }
}
