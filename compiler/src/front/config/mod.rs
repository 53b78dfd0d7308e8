//! The model's shape: `config.json`, read once and checked whole.
//!
//! Two families share the architecture (`deepseek_v32`, `glm_moe_dsa`) and two styles of file share
//! the names: the official one (`rope_scaling` + `rope_theta`, `torch_dtype`) and the newer one
//! (`rope_parameters`, `dtype`). Both become one [`ModelConfig`] of plain values. A value that dsc
//! does not implement, or that contradicts another, is refused here, with every problem of the file
//! in one error: nothing after this file asks whether a config makes sense.
//!
//! While reading, a size that could not be read stands as 0. No valid size is 0, so checks that
//! span fields skip zeros: that problem is on the list already.

mod fields;
mod read;

use read::{parse_object, read_config};
use std::f64::consts::PI;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Which `model_type` the file declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `deepseek_v32`: DeepSeek-V3.2 and V3.2-Exp.
    DeepseekV32,
    /// `glm_moe_dsa`: GLM-5 and its successors with the same block.
    GlmMoeDsa,
}

impl Family {
    /// The `model_type`.
    pub fn name(self) -> &'static str {
        match self {
            Family::DeepseekV32 => "deepseek_v32",
            Family::GlmMoeDsa => "glm_moe_dsa",
        }
    }
}

/// What the feed-forward half of a layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// One SwiGLU of width `intermediate`.
    Dense,
    /// Routed experts plus the shared ones, each of width `moe_intermediate`.
    Moe,
}

/// Where a layer's top-k list comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexerKind {
    /// The layer has an indexer of its own.
    Full,
    /// The layer has no indexer weights and reuses the list of the nearest full layer before it.
    Shared,
}

/// YaRN: long-context rotary frequencies (arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Context extension; low frequencies are divided by it. At least 1.
    pub factor: f64,
    /// Rotations over the original context above which a frequency is left alone.
    pub beta_fast: f64,
    /// Rotations over the original context below which a frequency is fully interpolated.
    pub beta_slow: f64,
    /// Equal to `mscale_all_dim`, so cos and sin are not scaled.
    pub mscale: f64,
    /// Weight of ln(factor) in the softmax scale.
    pub mscale_all_dim: f64,
    /// Context length before extension, in tokens.
    pub original_max_position_embeddings: usize,
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, above 1.
    pub theta: f64,
    /// Absent: plain rotary embedding.
    pub yarn: Option<Yarn>,
}

/// Block-scaled FP8 weights (e4m3 with one F32 multiplier a block).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantization {
    /// Rows (outputs) and columns (inputs) of a block.
    pub block: [usize; 2],
    /// Activation scales are rounded up to powers of two (`scale_fmt: ue8m0`).
    pub scale_pow2: bool,
}

/// A checked model configuration. Every size is at least 1 unless its line says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub family: Family,
    /// Width of the residual stream (`hidden_size`).
    pub hidden: usize,
    /// Main layers, without the MTP ones (`num_hidden_layers`).
    pub layers: usize,
    /// Feed-forward kind of each main layer, `layers` long.
    pub mlps: Vec<MlpKind>,
    /// Indexer kind of each main layer, `layers` long; the first is full.
    pub indexers: Vec<IndexerKind>,
    /// Width of a dense MLP (`intermediate_size`).
    pub intermediate: usize,
    /// Width of one expert (`moe_intermediate_size`).
    pub moe_intermediate: usize,
    /// Experts the router chooses from.
    pub n_routed_experts: usize,
    /// Experts every token passes through; may be 0.
    pub n_shared_experts: usize,
    /// Experts chosen a token (`num_experts_per_tok`).
    pub experts_per_token: usize,
    /// Groups of consecutive experts; divides `n_routed_experts` into groups of two or more.
    pub n_group: usize,
    /// Groups kept before experts are chosen; at most `n_group`.
    pub topk_group: usize,
    /// Factor on the chosen experts' weights.
    pub routed_scaling_factor: f64,
    /// Whether the chosen experts' weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// Query heads (`num_attention_heads`).
    pub heads: usize,
    /// Width of the query latent, which the indexer reads too.
    pub q_lora_rank: usize,
    /// Width of the key/value latent.
    pub kv_lora_rank: usize,
    /// Part of a query or key head without position.
    pub qk_nope_head_dim: usize,
    /// Part of a query or key head with rotary position; even.
    pub qk_rope_head_dim: usize,
    /// Width of a value head.
    pub v_head_dim: usize,
    /// Heads of the indexer.
    pub index_n_heads: usize,
    /// Width of an indexer head; its first `qk_rope_head_dim` elements are rotated.
    pub index_head_dim: usize,
    /// Keys a query attends to.
    pub index_topk: usize,
    /// Whether the indexer rotates neighbours (2i, 2i + 1) rather than halves (i, i + rope/2). MLA
    /// always rotates neighbours.
    pub indexer_rope_interleaved: bool,
    /// Tokens in the embedding (`vocab_size`).
    pub vocab: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Absent: weights are stored unquantised.
    pub quantization: Option<Quantization>,
    /// Multi-token-prediction layers stored after the main ones; may be 0.
    pub num_nextn_predict_layers: usize,
    /// Begin-of-text token (`bos_token_id`).
    pub bos: Option<u32>,
    /// Tokens that end generation, ascending (`eos_token_id`); may be empty.
    pub eos: Vec<u32>,
}

/// One thing wrong with a config file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, with its object before it: `rope_scaling.factor`.
    pub field: String,
    /// The field's value as JSON, cut short, or `absent`.
    pub value: String,
    /// What is supported instead.
    pub expected: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is {}: {}", self.field, self.value, self.expected)
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}; give a Hugging Face model folder", path = .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The text is not a JSON object.
    #[error("{file} is not a JSON object: {what}")]
    Json {
        /// Name of the file.
        file: &'static str,
        /// What the parser said, with line and column.
        what: String,
    },
    /// The fields are missing, unsupported or contradict each other.
    #[error("the model's configuration cannot be compiled:{}", .0.iter().map(|p| format!("\n  {p}")).collect::<String>())]
    Invalid(Vec<Problem>),
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// Unknown fields are ignored; `null` counts as absent; of a duplicate key the last one counts.
    ///
    /// # Errors
    /// [`ConfigError::Json`], or [`ConfigError::Invalid`] with all problems of the file.
    pub fn from_json(text: &str) -> Result<ModelConfig, ConfigError> {
        let object = parse_object("config.json", text)?;
        read_config(&object, None)
    }

    /// Reads `config.json` in `dir`, and adds the end tokens of `generation_config.json` where
    /// there is one.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`], for either file; [`ConfigError::Io`] when a file cannot be
    /// read.
    pub fn read(dir: &Path) -> Result<ModelConfig, ConfigError> {
        let path = dir.join("config.json");
        let text = fs::read_to_string(&path).map_err(|source| ConfigError::Io { path, source })?;
        let object = parse_object("config.json", &text)?;

        let path = dir.join("generation_config.json");
        let generation = match fs::read_to_string(&path) {
            Ok(text) => Some(parse_object("generation_config.json", &text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(ConfigError::Io { path, source }),
        };
        read_config(&object, generation.as_ref())
    }

    /// Width of a query or key head: the part without position, then the rotated part.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Factor on the attention scores: `qk_head_dim`^-1/2, times m² under YaRN with m = 0.1 ·
    /// mscale_all_dim · ln(factor) + 1.
    pub fn softmax_scale(&self) -> f64 {
        let m = self.rope.yarn.map_or(1.0, |yarn| 0.1 * yarn.mscale_all_dim * yarn.factor.ln() + 1.0);
        m * m / (self.qk_head_dim() as f64).sqrt()
    }

    /// Rotary frequencies in radians a token, `qk_rope_head_dim` / 2 of them, highest first.
    ///
    /// Computed in f64 and rounded once. Under YaRN, frequencies that turn less than `beta_slow`
    /// times over the original context are divided by `factor`, those that turn more than
    /// `beta_fast` times are kept, with a linear ramp between.
    pub fn rope_frequencies(&self) -> Vec<f32> {
        let dim = self.qk_rope_head_dim as f64;
        let plain = (0..self.qk_rope_head_dim / 2).map(|i| self.rope.theta.powf(-2.0 * i as f64 / dim));
        let Some(yarn) = self.rope.yarn else {
            return plain.map(|frequency| frequency as f32).collect();
        };

        // The index of the frequency that turns `rotations` times over the original context.
        let index_of = |rotations: f64| {
            let context = yarn.original_max_position_embeddings as f64;
            dim * (context / (2.0 * PI * rotations)).ln() / (2.0 * self.rope.theta.ln())
        };
        let low = index_of(yarn.beta_fast).floor().clamp(0.0, dim - 1.0);
        let mut high = index_of(yarn.beta_slow).ceil().clamp(0.0, dim - 1.0);
        if high == low {
            high += 0.001;
        }
        plain
            .enumerate()
            .map(|(i, frequency)| {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (frequency / yarn.factor * ramp + frequency * (1.0 - ramp)) as f32
            })
            .collect()
    }

    /// Parameters of the main model: the tensors of `layers` layers, embedding, head and norms; no
    /// scales, no MTP layer.
    pub fn parameters(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let [hidden, heads, q_lora, kv_lora] = [self.hidden, self.heads, self.q_lora_rank, self.kv_lora_rank].map(wide);
        let [nope, rope, v] = [self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim].map(wide);
        let [index_heads, index_dim] = [self.index_n_heads, self.index_head_dim].map(wide);
        let [experts, shared] = [self.n_routed_experts, self.n_shared_experts].map(wide);

        let attention = q_lora * hidden
            + q_lora
            + heads * (nope + rope) * q_lora
            + (kv_lora + rope) * hidden
            + kv_lora
            + heads * (nope + v) * kv_lora
            + hidden * heads * v;
        let indexer = index_heads * index_dim * q_lora + index_dim * hidden + 2 * index_dim + index_heads * hidden;
        let dense = 3 * hidden * wide(self.intermediate);
        let moe = (experts + shared) * 3 * hidden * wide(self.moe_intermediate) + experts * hidden + experts;

        let mlps: u128 = self.mlps.iter().map(|kind| if *kind == MlpKind::Dense { dense } else { moe }).sum();
        let full = self.indexers.iter().filter(|kind| **kind == IndexerKind::Full).count();
        let vocab_matrices = if self.tie_word_embeddings { 1 } else { 2 };
        wide(self.layers) * (attention + 2 * hidden)
            + wide(full) * indexer
            + mlps
            + vocab_matrices * wide(self.vocab) * hidden
            + hidden
    }

    /// An upper bound of the elements of one weight: of the experts stacked, or of projections of one activation.
    fn largest_weight(&self) -> u128 {
        let wide = |size: usize| size as u128;
        let experts = 2 * wide(self.n_routed_experts) * wide(self.moe_intermediate) * wide(self.hidden);
        let mlp = 2 * wide(self.intermediate.max(self.n_shared_experts * self.moe_intermediate)) * wide(self.hidden);
        let from_hidden =
            self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim + self.index_head_dim + self.index_n_heads;
        let from_query = self.heads * self.qk_head_dim() + self.index_n_heads * self.index_head_dim;
        let values = wide(self.heads) * wide(self.qk_nope_head_dim + self.v_head_dim) * wide(self.kv_lora_rank);
        let out = wide(self.hidden) * wide(self.heads) * wide(self.v_head_dim);
        let head = wide(self.vocab) * wide(self.hidden);
        let products = [wide(from_hidden) * wide(self.hidden), wide(from_query) * wide(self.q_lora_rank)];
        [experts, mlp, values, out, head].into_iter().chain(products).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
