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

use std::cell::RefCell;
use std::f64::consts::PI;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

/// Largest vocabulary, context or scale block.
const MAX_DIM: usize = 1 << 24;
/// Largest width of the residual stream, of an MLP or of the query latent, and largest selection. Times [`MAX_EXPERTS_PER_TOKEN`]
/// it is what one tile may hold.
const MAX_WIDTH: usize = 1 << 18;
/// Most heads, and largest part of a head: together what one tile may hold.
const MAX_HEADS: usize = 1 << 12;
/// Largest key/value latent.
const MAX_LATENT: usize = 1 << 14;
/// Largest rotated part of a head: its table has a row for each position.
const MAX_ROPE_DIM: usize = 1 << 9;
/// Largest number of layers.
const MAX_LAYERS: usize = 1 << 10;
/// Largest number of experts.
const MAX_EXPERTS: usize = 1 << 12;
/// Most experts a token passes through.
const MAX_EXPERTS_PER_TOKEN: usize = 1 << 8;
/// Largest number of parameters: below it no tensor's size in bytes overflows.
const MAX_PARAMETERS: u128 = 1 << 48;
/// Largest number of elements of one weight in device memory.
const MAX_WEIGHT: u128 = 1 << 38;
/// Largest weight of ln(factor) in the softmax scale.
const MAX_MSCALE: f64 = 100.0;

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

fn parse_object(file: &'static str, text: &str) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text).map_err(|error| ConfigError::Json { file, what: error.to_string() })
}

fn read_config(
    object: &Map<String, Value>,
    generation: Option<&Map<String, Value>>,
) -> Result<ModelConfig, ConfigError> {
    let problems = RefCell::default();
    let fields = Fields { object, place: String::new(), problems: &problems };
    refuse_unsupported(&fields);
    let mut config = read_fields(&fields);
    check_sizes(&fields, &config);
    check_experts(&fields, &config);
    if let Some(object) = generation {
        let fields = Fields { object, place: "generation_config.json: ".into(), problems: &problems };
        config.eos.extend(fields.token_ids("eos_token_id", config.vocab));
    }
    config.eos.sort_unstable();
    config.eos.dedup();

    let problems = problems.into_inner();
    if problems.is_empty() { Ok(config) } else { Err(ConfigError::Invalid(problems)) }
}

/// Fields that select another architecture.
fn refuse_unsupported(fields: &Fields) {
    fields.one_of("hidden_act", &["silu"]);
    fields.one_of("scoring_func", &["sigmoid"]);
    fields.one_of("topk_method", &["noaux_tc"]);
    fields.one_of("dtype", &["bfloat16", "float16", "float32"]);
    fields.one_of("torch_dtype", &["bfloat16", "float16", "float32"]);
    fields.must_be("attention_bias", false, "the projections have no bias");
    fields.must_be("mlp_bias", false, "the projections have no bias");
    fields.must_be("rope_interleave", true, "MLA rotates neighbouring elements");
    if let Some(types) = fields.get("layer_types") {
        let sparse = |kind: &Value| kind.as_str() == Some("deepseek_sparse_attention");
        if !types.as_array().is_some_and(|types| types.iter().all(sparse)) {
            fields.problem("layer_types", "every layer must be \"deepseek_sparse_attention\"");
        }
    }
}

fn read_fields(fields: &Fields) -> ModelConfig {
    let family = read_family(fields);
    let layers = fields.size("num_hidden_layers", MAX_LAYERS);
    let vocab = fields.dim("vocab_size");
    ModelConfig {
        family,
        hidden: fields.size("hidden_size", MAX_WIDTH),
        layers,
        mlps: read_mlps(fields, layers),
        indexers: read_indexers(fields, layers),
        intermediate: fields.size("intermediate_size", MAX_WIDTH),
        moe_intermediate: fields.size("moe_intermediate_size", MAX_WIDTH),
        n_routed_experts: fields.size("n_routed_experts", MAX_EXPERTS),
        n_shared_experts: fields.count_or("n_shared_experts", 0, MAX_EXPERTS_PER_TOKEN),
        experts_per_token: fields.size("num_experts_per_tok", MAX_EXPERTS_PER_TOKEN),
        n_group: fields.size("n_group", MAX_EXPERTS),
        topk_group: fields.size("topk_group", MAX_EXPERTS),
        routed_scaling_factor: fields.positive_or("routed_scaling_factor", 1.0),
        norm_topk_prob: fields.flag_or("norm_topk_prob", true),
        heads: fields.size("num_attention_heads", MAX_HEADS),
        q_lora_rank: fields.size("q_lora_rank", MAX_WIDTH),
        kv_lora_rank: fields.size("kv_lora_rank", MAX_LATENT),
        qk_nope_head_dim: fields.size("qk_nope_head_dim", MAX_HEADS),
        qk_rope_head_dim: fields.size("qk_rope_head_dim", MAX_ROPE_DIM),
        v_head_dim: fields.size("v_head_dim", MAX_HEADS),
        index_n_heads: fields.size("index_n_heads", MAX_HEADS),
        index_head_dim: fields.size("index_head_dim", MAX_HEADS),
        index_topk: fields.size("index_topk", MAX_WIDTH),
        indexer_rope_interleaved: fields.flag_or("indexer_rope_interleave", family == Family::GlmMoeDsa),
        vocab,
        rms_norm_eps: fields.positive("rms_norm_eps"),
        rope: read_rope(fields),
        max_position_embeddings: fields.dim("max_position_embeddings"),
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false),
        quantization: fields.nested("quantization_config").map(|quantization| read_quantization(&quantization)),
        num_nextn_predict_layers: fields.count_or("num_nextn_predict_layers", 0, MAX_LAYERS),
        bos: read_bos(fields, vocab),
        eos: fields.token_ids("eos_token_id", vocab),
    }
}

fn read_family(fields: &Fields) -> Family {
    match fields.get("model_type").and_then(Value::as_str) {
        Some("deepseek_v32") => Family::DeepseekV32,
        Some("glm_moe_dsa") => Family::GlmMoeDsa,
        _ => {
            fields.problem("model_type", "supported: \"deepseek_v32\", \"glm_moe_dsa\"");
            Family::DeepseekV32
        }
    }
}

fn read_bos(fields: &Fields, vocab: usize) -> Option<u32> {
    match fields.token_ids("bos_token_id", vocab).as_slice() {
        [] => None,
        [bos] => Some(*bos),
        _ => {
            fields.problem("bos_token_id", "must be one token id");
            None
        }
    }
}

/// `mlp_layer_types`, or the first `first_k_dense_replace` layers dense and then every
/// `moe_layer_freq`-th a mixture.
fn read_mlps(fields: &Fields, layers: usize) -> Vec<MlpKind> {
    let names = [("dense", MlpKind::Dense), ("sparse", MlpKind::Moe)];
    let listed = fields.layer_list("mlp_layer_types", layers, &names);
    if fields.get("first_k_dense_replace").is_none() {
        if fields.get("mlp_layer_types").is_none() {
            fields.problem("first_k_dense_replace", "give it, or `mlp_layer_types`");
        }
        return listed.unwrap_or_default();
    }

    let most = if layers == 0 { MAX_LAYERS } else { layers };
    let dense = fields.count_or("first_k_dense_replace", 0, most);
    let frequency = fields.size_or("moe_layer_freq", 1, MAX_LAYERS).max(1);
    let kind = |layer| {
        if layer >= dense && layer % frequency == 0 { MlpKind::Moe } else { MlpKind::Dense }
    };
    let counted: Vec<MlpKind> = (0..layers).map(kind).collect();
    if listed.is_some_and(|listed| listed != counted) {
        fields.problem("mlp_layer_types", "must agree with `first_k_dense_replace` and `moe_layer_freq`");
    }
    counted
}

/// `indexer_types`, `index_topk_pattern` or `index_topk_freq`; by default every layer is full.
fn read_indexers(fields: &Fields, layers: usize) -> Vec<IndexerKind> {
    let names = [("full", IndexerKind::Full), ("shared", IndexerKind::Shared)];
    let sources = [
        ("indexer_types", fields.layer_list("indexer_types", layers, &names)),
        ("index_topk_pattern", read_indexer_pattern(fields, layers)),
        ("index_topk_freq", read_indexer_frequency(fields, layers)),
    ];
    let mut given = sources.into_iter().filter_map(|(field, kinds)| Some((field, kinds?)));
    let Some((first, kinds)) = given.next() else {
        return vec![IndexerKind::Full; layers];
    };
    for (field, other) in given {
        if other != kinds {
            fields.problem(field, format!("must agree with `{first}`"));
        }
    }
    if kinds.first() == Some(&IndexerKind::Shared) {
        fields.problem(first, "the first layer has no list to share: it must be full");
    }
    kinds
}

/// One letter a layer: F full, S shared.
fn read_indexer_pattern(fields: &Fields, layers: usize) -> Option<Vec<IndexerKind>> {
    let kind = |letter| match letter {
        'F' => Some(IndexerKind::Full),
        'S' => Some(IndexerKind::Shared),
        _ => None,
    };
    let value = fields.get("index_topk_pattern")?;
    let kinds: Option<Vec<IndexerKind>> = value.as_str().and_then(|letters| letters.chars().map(kind).collect());
    let fits = kinds.filter(|kinds| kinds.len() == layers);
    if fits.is_none() && layers > 0 {
        fields.problem("index_topk_pattern", format!("must be {layers} letters F (full) or S (shared), one a layer"));
    }
    fits
}

/// Layer i is full iff max(i − offset + 1, 0) is a multiple of the frequency.
fn read_indexer_frequency(fields: &Fields, layers: usize) -> Option<Vec<IndexerKind>> {
    fields.get("index_topk_freq")?;
    let frequency = fields.size("index_topk_freq", MAX_LAYERS).max(1);
    let offset = fields.count_or("index_skip_topk_offset", 2, MAX_LAYERS);
    let full = |layer: usize| (layer + 1).saturating_sub(offset).is_multiple_of(frequency);
    Some((0..layers).map(|layer| if full(layer) { IndexerKind::Full } else { IndexerKind::Shared }).collect())
}

fn read_rope(fields: &Fields) -> Rope {
    let new = fields.nested("rope_parameters").map(|block| read_rope_block(fields, &block));
    let old = fields.nested("rope_scaling").map(|block| read_rope_block(fields, &block));
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        fields.problem("rope_scaling", "must agree with `rope_parameters`");
    }
    new.or(old).unwrap_or_else(|| Rope { theta: read_theta(fields), yarn: None })
}

fn read_rope_block(fields: &Fields, block: &Fields) -> Rope {
    let theta = if block.get("rope_theta").is_none() {
        read_theta(fields)
    } else {
        let theta = read_theta(block);
        if fields.get("rope_theta").is_some_and(|outer| outer.as_f64() != Some(theta)) {
            fields.problem("rope_theta", "must agree with the one beside the rotary parameters");
        }
        theta
    };
    if block.get("partial_rotary_factor").is_some_and(|factor| factor.as_f64() != Some(1.0)) {
        block.problem("partial_rotary_factor", "only 1 is supported: `qk_rope_head_dim` says what is rotated");
    }
    let field = if block.get("rope_type").is_some() { "rope_type" } else { "type" };
    let yarn = match block.get(field).map(Value::as_str) {
        Some(Some("yarn")) => Some(read_yarn(block)),
        Some(Some("default")) => None,
        None if block.get("factor").is_none() => None,
        _ => {
            block.problem(field, "supported: \"yarn\", \"default\"");
            None
        }
    };
    Rope { theta, yarn }
}

fn read_theta(fields: &Fields) -> f64 {
    let theta = fields.positive("rope_theta");
    if theta > 0.0 && theta <= 1.0 {
        fields.problem("rope_theta", "must be above 1");
    }
    theta
}

fn read_yarn(block: &Fields) -> Yarn {
    let yarn = Yarn {
        factor: block.positive("factor"),
        beta_fast: block.positive_or("beta_fast", 32.0),
        beta_slow: block.positive_or("beta_slow", 1.0),
        mscale: block.positive("mscale"),
        mscale_all_dim: block.positive("mscale_all_dim"),
        original_max_position_embeddings: block.dim("original_max_position_embeddings"),
    };
    if yarn.factor > 0.0 && yarn.factor < 1.0 {
        block.problem("factor", "must be at least 1");
    }
    if yarn.beta_slow > 0.0 && yarn.beta_fast > 0.0 && yarn.beta_slow >= yarn.beta_fast {
        block.problem("beta_slow", "must be below `beta_fast`");
    }
    if yarn.mscale > 0.0 && yarn.mscale_all_dim > 0.0 && yarn.mscale != yarn.mscale_all_dim {
        block.problem("mscale", "must equal `mscale_all_dim`: cos and sin are not scaled");
    }
    if yarn.mscale_all_dim > MAX_MSCALE {
        block.problem("mscale_all_dim", format!("must be at most {MAX_MSCALE}"));
    }
    if block.get("attention_factor").is_some() {
        block.problem("attention_factor", "not supported: leave it out, `mscale_all_dim` gives the scale");
    }
    block.must_be("truncate", true, "the ramp's ends are whole indices");
    yarn
}

fn read_quantization(fields: &Fields) -> Quantization {
    if fields.get("quant_method").is_none() {
        fields.problem("quant_method", "supported: \"fp8\"");
    }
    fields.one_of("quant_method", &["fp8"]);
    fields.one_of("fmt", &["e4m3"]);
    fields.one_of("activation_scheme", &["dynamic"]);
    fields.one_of("scale_fmt", &["ue8m0"]);

    let size = |value: &Value| usize::try_from(value.as_u64()?).ok().filter(|size| (1..=MAX_DIM).contains(size));
    let block = match fields.get("weight_block_size").and_then(Value::as_array).map(Vec::as_slice) {
        Some([rows, columns]) => size(rows).zip(size(columns)),
        _ => None,
    };
    if block.is_none() {
        fields.problem("weight_block_size", "must be two sizes [rows, columns], such as [128, 128]");
    }
    let (rows, columns) = block.unwrap_or_default();
    Quantization { block: [rows, columns], scale_pow2: fields.get("scale_fmt").is_some() }
}

fn check_sizes(fields: &Fields, config: &ModelConfig) {
    let rope = config.qk_rope_head_dim;
    if !rope.is_multiple_of(2) {
        fields.problem("qk_rope_head_dim", "must be even: elements are rotated in pairs");
    }
    if config.index_head_dim != 0 && rope > config.index_head_dim {
        fields.problem("qk_rope_head_dim", format!("must fit `index_head_dim`, {}", config.index_head_dim));
    }
    if config.qk_nope_head_dim != 0 && rope != 0 {
        let sum = config.qk_head_dim();
        if fields.get("qk_head_dim").is_some_and(|value| value.as_u64() != Some(sum as u64)) {
            fields.problem("qk_head_dim", format!("must be `qk_nope_head_dim` + `qk_rope_head_dim`, {sum}"));
        }
    }
    let listed = fields.get("layer_types").and_then(Value::as_array);
    if config.layers != 0 && listed.is_some_and(|types| types.len() != config.layers) {
        fields.problem("layer_types", format!("must have one entry a layer, {}", config.layers));
    }
    let parameters = config.parameters();
    if parameters > MAX_PARAMETERS {
        fields.problem(
            "hidden_size",
            format!("with the other sizes makes {parameters} parameters, at most {MAX_PARAMETERS}"),
        );
    }
    let largest = config.largest_weight();
    if largest > MAX_WEIGHT {
        fields.problem(
            "hidden_size",
            format!("with the other sizes makes a weight of {largest} elements, at most {MAX_WEIGHT}"),
        );
    }
}

fn check_experts(fields: &Fields, config: &ModelConfig) {
    let ModelConfig { n_routed_experts: experts, n_group, topk_group, experts_per_token: chosen, .. } = *config;
    if [experts, n_group, topk_group, chosen].contains(&0) {
        return;
    }
    if !experts.is_multiple_of(n_group) {
        fields.problem("n_group", format!("must divide `n_routed_experts`, {experts}"));
        return;
    }
    let group = experts / n_group;
    if group < 2 {
        fields.problem(
            "n_group",
            "leaves fewer than two experts a group, and a group's score is the sum of its best two",
        );
        return;
    }
    if topk_group > n_group {
        fields.problem("topk_group", format!("must be at most `n_group`, {n_group}"));
        return;
    }
    let candidates = topk_group * group;
    if chosen > candidates {
        fields
            .problem("num_experts_per_tok", format!("must be at most the {candidates} experts of `topk_group` groups"));
    }
}

/// The fields of one JSON object, and the list of what is wrong with them.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// Written before a field's name in a problem: empty, or `rope_scaling.`.
    place: String,
    problems: &'a RefCell<Vec<Problem>>,
}

impl<'a> Fields<'a> {
    /// The field's value; `null` counts as absent.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    fn problem(&self, field: &str, expected: impl Into<String>) {
        const SHOWN: usize = 60;
        let text = self.object.get(field).map_or_else(|| "absent".to_string(), Value::to_string);
        let mut value: String = text.chars().take(SHOWN).collect();
        if value.len() < text.len() {
            value.push('…');
        }
        let field = format!("{}{field}", self.place);
        self.problems.borrow_mut().push(Problem { field, value, expected: expected.into() });
    }

    /// A required whole number; `None` marks a problem.
    fn whole(&self, field: &str, least: usize, most: usize) -> Option<usize> {
        let value = self.get(field).and_then(Value::as_u64).and_then(|value| usize::try_from(value).ok());
        let fits = value.filter(|value| (least..=most).contains(value));
        if fits.is_none() {
            self.problem(field, format!("must be a whole number from {least} to {most}"));
        }
        fits
    }

    /// A required size from 1 to `most`; 0 marks a problem.
    fn size(&self, field: &str, most: usize) -> usize {
        self.whole(field, 1, most).unwrap_or(0)
    }

    /// [`Fields::size`], with a default when absent.
    fn size_or(&self, field: &str, default: usize, most: usize) -> usize {
        if self.get(field).is_none() { default } else { self.size(field, most) }
    }

    /// A required size of a tensor; 0 marks a problem.
    fn dim(&self, field: &str) -> usize {
        self.size(field, MAX_DIM)
    }

    /// A number from 0 to `most`, with a default when absent.
    fn count_or(&self, field: &str, default: usize, most: usize) -> usize {
        if self.get(field).is_none() { default } else { self.whole(field, 0, most).unwrap_or(default) }
    }

    /// A required number above 0 that is a normal f32 too; 0 marks a problem.
    fn positive(&self, field: &str) -> f64 {
        let usable = |number: &f64| *number > 0.0 && (*number as f32).is_normal();
        self.get(field).and_then(Value::as_f64).filter(usable).unwrap_or_else(|| {
            self.problem(field, "must be a number above 0, within the range of f32");
            0.0
        })
    }

    /// [`Fields::positive`], with a default when absent.
    fn positive_or(&self, field: &str, default: f64) -> f64 {
        if self.get(field).is_none() { default } else { self.positive(field) }
    }

    fn flag_or(&self, field: &str, default: bool) -> bool {
        let Some(value) = self.get(field) else {
            return default;
        };
        value.as_bool().unwrap_or_else(|| {
            self.problem(field, "must be true or false");
            default
        })
    }

    /// An optional flag of which one value is implemented.
    fn must_be(&self, field: &str, supported: bool, why: &str) {
        if self.get(field).is_some_and(|value| value.as_bool() != Some(supported)) {
            self.problem(field, format!("only {supported} is supported: {why}"));
        }
    }

    /// An optional name of which some values are implemented.
    fn one_of(&self, field: &str, supported: &[&str]) {
        let known = |value: &Value| value.as_str().is_some_and(|name| supported.contains(&name));
        if self.get(field).is_some_and(|value| !known(value)) {
            let names: Vec<String> = supported.iter().map(|name| format!("{name:?}")).collect();
            self.problem(field, format!("supported: {}", names.join(", ")));
        }
    }

    /// An optional list with one of the given names for each layer.
    fn layer_list<T: Copy>(&self, field: &str, layers: usize, names: &[(&str, T)]) -> Option<Vec<T>> {
        let kind = |value: &Value| names.iter().find(|(name, _)| value.as_str() == Some(name)).map(|(_, kind)| *kind);
        let value = self.get(field)?;
        let kinds: Option<Vec<T>> = value.as_array().and_then(|entries| entries.iter().map(kind).collect());
        let fits = kinds.filter(|kinds| kinds.len() == layers);
        if fits.is_none() && layers > 0 {
            let names: Vec<String> = names.iter().map(|(name, _)| format!("{name:?}")).collect();
            self.problem(field, format!("must be {layers} of {}, one a layer", names.join(" or ")));
        }
        fits
    }

    /// An optional object inside this one.
    fn nested(&self, field: &str) -> Option<Fields<'a>> {
        let value = self.get(field)?;
        let Some(object) = value.as_object() else {
            self.problem(field, "must be an object");
            return None;
        };
        Some(Fields { object, place: format!("{}{field}.", self.place), problems: self.problems })
    }

    /// An optional token id, or list of them, each below `vocab`.
    fn token_ids(&self, field: &str, vocab: usize) -> Vec<u32> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|id| vocab == 0 || (*id as usize) < vocab);
        let ids: Option<Vec<u32>> = match self.get(field) {
            None => return Vec::new(),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(value) => id(value).map(|id| vec![id]),
        };
        ids.unwrap_or_else(|| {
            self.problem(field, format!("must be token ids below `vocab_size`, {vocab}"));
            Vec::new()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const V32: &str = include_str!("../../../examples/deepseek-v3.2/config.json");
    const GLM5: &str = include_str!("../../../examples/glm-5/config.json");
    const V32_TINY: &str = include_str!("../../../tests/golden/v32-tiny/config.json");
    const V32_HEADS_FP8: &str = include_str!("../../../tests/golden/v32-heads-fp8/config.json");
    const GLM_TINY: &str = include_str!("../../../tests/golden/glm-tiny/config.json");

    /// The file with some fields replaced; `a.b` is field b of object a, `null` removes.
    fn edited(text: &str, edits: &[(&str, Value)]) -> Result<ModelConfig, ConfigError> {
        let mut root: Value = serde_json::from_str(text).unwrap();
        for (field, value) in edits {
            match field.split_once('.') {
                Some((outer, inner)) => root[outer][inner] = value.clone(),
                None => root[*field] = value.clone(),
            }
        }
        ModelConfig::from_json(&root.to_string())
    }

    fn problems(text: &str, edits: &[(&str, Value)]) -> Vec<Problem> {
        match edited(text, edits) {
            Err(ConfigError::Invalid(problems)) => problems,
            other => panic!("{edits:?} gave {other:?}"),
        }
    }

    #[test]
    fn deepseek_v32() {
        let config = ModelConfig::from_json(V32).unwrap();
        assert_eq!(config.family, Family::DeepseekV32);
        assert_eq!((config.hidden, config.layers, config.vocab), (7168, 61, 129280));
        assert_eq!((config.intermediate, config.moe_intermediate), (18432, 2048));
        assert_eq!((config.n_routed_experts, config.n_shared_experts), (256, 1));
        assert_eq!((config.experts_per_token, config.n_group, config.topk_group), (8, 8, 4));
        assert_eq!((config.routed_scaling_factor, config.norm_topk_prob), (2.5, true));
        assert_eq!((config.heads, config.q_lora_rank, config.kv_lora_rank), (128, 1536, 512));
        assert_eq!((config.qk_head_dim(), config.v_head_dim), (192, 128));
        assert_eq!((config.index_n_heads, config.index_head_dim, config.index_topk), (64, 128, 2048));
        assert!(!config.indexer_rope_interleaved && !config.tie_word_embeddings);
        assert_eq!(config.indexers, [IndexerKind::Full; 61]);
        assert_eq!(config.mlps[..3], [MlpKind::Dense; 3]);
        assert_eq!(config.mlps[3..], [MlpKind::Moe; 58]);
        assert_eq!((config.rms_norm_eps, config.max_position_embeddings), (1e-6, 163840));
        assert_eq!(config.quantization, Some(Quantization { block: [128, 128], scale_pow2: true }));
        assert_eq!(config.num_nextn_predict_layers, 1);
        assert_eq!((config.bos, config.eos.as_slice()), (Some(0), [1].as_slice()));
        assert_eq!(config.parameters(), 671_877_944_064);
    }

    #[test]
    fn glm_5() {
        let config = ModelConfig::from_json(GLM5).unwrap();
        assert_eq!(config.family, Family::GlmMoeDsa);
        assert!(config.indexer_rope_interleaved);
        assert_eq!((config.layers, config.heads, config.qk_head_dim()), (78, 64, 256));
        assert_eq!((config.n_group, config.topk_group), (1, 1));
        assert_eq!(config.rope, Rope { theta: 1e6, yarn: None });
        assert_eq!(config.softmax_scale(), 1.0 / 16.0);
        assert_eq!(config.rope_frequencies()[0], 1.0);
        assert_eq!(config.rope_frequencies()[16], 1e-3);
        assert_eq!(config.quantization, None);
        assert_eq!((config.bos, config.eos.as_slice()), (None, [154820, 154827, 154829].as_slice()));
        assert_eq!(config.parameters() / 1_000_000_000, 743);
    }

    #[test]
    fn golden_cases() {
        let tiny = ModelConfig::from_json(V32_TINY).unwrap();
        assert_eq!((tiny.layers, tiny.hidden, tiny.index_topk), (4, 128, 16));
        assert_eq!(tiny.rope.yarn.unwrap().factor, 40.0);
        assert_eq!(tiny.quantization, None);

        let heads = ModelConfig::from_json(V32_HEADS_FP8).unwrap();
        assert_eq!((heads.index_n_heads, heads.kv_lora_rank), (32, 512));
        assert!(heads.quantization.unwrap().scale_pow2);

        let glm = ModelConfig::from_json(GLM_TINY).unwrap();
        assert!(glm.indexer_rope_interleaved);
        use IndexerKind::{Full, Shared};
        assert_eq!(glm.indexers, [Full, Full, Shared, Shared, Full, Shared]);
        assert_eq!(glm.mlps[..2], [MlpKind::Dense, MlpKind::Moe]);
        assert_eq!(glm.rms_norm_eps, 1e-5);
    }

    #[test]
    fn softmax_scale_of_v32() {
        let config = ModelConfig::from_json(V32).unwrap();
        assert!((config.softmax_scale() - 0.1352337788608801).abs() < 1e-16);
    }

    #[test]
    fn rope_frequencies_of_v32() {
        #[rustfmt::skip]
        let expected = [
            1.0, 0.7498942093, 0.5623413252, 0.4216965034, 0.3162277660, 0.2371373706, 0.1778279410,
            0.1333521432, 0.1, 0.07498942093, 0.05623413252, 0.03900692657, 0.02687936011,
            0.01837814622, 0.01244795587, 0.008334508951, 0.0055, 0.003561997494, 0.002249365301,
            0.001370513636, 7.905694150e-4, 4.149903985e-4, 1.778279410e-4, 3.333803580e-5, 2.5e-5,
            1.874735523e-5, 1.405853313e-5, 1.054241259e-5, 7.905694150e-6, 5.928434264e-6,
            4.445698525e-6, 3.333803580e-6,
        ];
        let frequencies = ModelConfig::from_json(V32).unwrap().rope_frequencies();
        assert_eq!(frequencies.len(), expected.len());
        for (i, (got, want)) in frequencies.iter().zip(expected).enumerate() {
            assert!((f64::from(*got) / want - 1.0).abs() < 6.1e-8, "frequency {i}: {got} is not {want}");
        }
    }

    #[test]
    fn both_styles_of_rope_agree() {
        let old = ModelConfig::from_json(V32).unwrap();
        let mut block =
            json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1});
        block["mscale"] = json!(1.0);
        block["mscale_all_dim"] = json!(1.0);
        block["original_max_position_embeddings"] = json!(4096);
        let new = [("rope_scaling", Value::Null), ("rope_theta", Value::Null), ("rope_parameters", block.clone())];
        assert_eq!(edited(V32, &new).unwrap(), old);
        assert_eq!(edited(V32, &[("rope_parameters", block.clone())]).unwrap(), old);
        block["factor"] = json!(20);
        assert_eq!(problems(V32, &[("rope_parameters", block)])[0].field, "rope_scaling");
    }

    #[test]
    fn shared_indexers() {
        let count = |kinds: &[IndexerKind]| kinds.iter().filter(|kind| **kind == IndexerKind::Full).count();
        let sharing = [("index_topk_freq", json!(4)), ("index_skip_topk_offset", json!(3))];
        let glm52 = edited(GLM5, &sharing).unwrap().indexers;
        let full: Vec<usize> = (0..78).filter(|i| glm52[*i] == IndexerKind::Full).collect();
        assert_eq!(count(&glm52), 21);
        assert_eq!(full[..5], [0, 1, 2, 6, 10]);
        assert_eq!(full[20], 74);

        let by_default_offset = edited(GLM5, &[("index_topk_freq", json!(4))]).unwrap().indexers;
        assert_eq!(by_default_offset[..7], glm52[1..8]);

        let pattern: String = glm52.iter().map(|kind| if *kind == IndexerKind::Full { 'F' } else { 'S' }).collect();
        assert_eq!(edited(GLM5, &[("index_topk_pattern", json!(pattern))]).unwrap().indexers, glm52);
    }

    #[test]
    fn broken_configs() {
        let layers = |kind: &str, count| Value::from(vec![kind; count]);
        #[rustfmt::skip]
        let cases = [
            ("model_type", json!("llama"), "supported: \"deepseek_v32\", \"glm_moe_dsa\""),
            ("hidden_act", json!("gelu"), "supported: \"silu\""),
            ("attention_bias", json!(true), "only false"),
            ("rope_interleave", json!(false), "only true"),
            ("scoring_func", json!("softmax"), "\"sigmoid\""),
            ("topk_method", json!("greedy"), "\"noaux_tc\""),
            ("torch_dtype", json!("int8"), "\"bfloat16\""),
            ("hidden_size", json!(null), "whole number from 1"),
            ("hidden_size", json!(0), "whole number from 1"),
            ("hidden_size", json!(-7168), "whole number from 1"),
            ("hidden_size", json!(7168.5), "whole number from 1"),
            ("hidden_size", json!("7168"), "whole number from 1"),
            ("vocab_size", json!((1u64 << 24) + 1), "16777216"),
            ("vocab_size", json!(u64::MAX), "16777216"),
            ("num_hidden_layers", json!(1 << 20), "to 1024"),
            ("hidden_size", json!((1 << 18) + 1), "to 262144"),
            ("num_experts_per_tok", json!(257), "to 256"),
            ("qk_nope_head_dim", json!(4097), "to 4096"),
            ("v_head_dim", json!(4097), "to 4096"),
            ("kv_lora_rank", json!(16385), "to 16384"),
            ("qk_rope_head_dim", json!(514), "to 512"),
            ("q_lora_rank", json!(null), "whole number"),
            ("n_group", json!(7), "must divide `n_routed_experts`, 256"),
            ("n_group", json!(256), "fewer than two experts"),
            ("topk_group", json!(9), "at most `n_group`, 8"),
            ("num_experts_per_tok", json!(129), "at most the 128 experts"),
            ("qk_rope_head_dim", json!(63), "even"),
            ("qk_rope_head_dim", json!(130), "fit `index_head_dim`, 128"),
            ("qk_head_dim", json!(128), "192"),
            ("first_k_dense_replace", json!(62), "0 to 61"),
            ("first_k_dense_replace", json!(null), "mlp_layer_types"),
            ("moe_layer_freq", json!(0), "from 1"),
            ("mlp_layer_types", layers("sparse", 61), "must agree"),
            ("mlp_layer_types", layers("sparse", 60), "61 of \"dense\" or \"sparse\""),
            ("layer_types", layers("full_attention", 61), "deepseek_sparse_attention"),
            ("layer_types", layers("deepseek_sparse_attention", 60), "one entry a layer, 61"),
            ("indexer_types", layers("full", 62), "61 of \"full\" or \"shared\""),
            ("indexer_types", layers("shared", 61), "must be full"),
            ("index_topk_pattern", json!("FS"), "61 letters"),
            ("index_topk_pattern", json!("X".repeat(61)), "61 letters"),
            ("index_topk_freq", json!(0), "from 1"),
            ("rms_norm_eps", json!(0.0), "above 0"),
            ("routed_scaling_factor", json!(1e300), "range of f32"),
            ("rope_theta", json!(1), "above 1"),
            ("rope_scaling", json!("yarn"), "must be an object"),
            ("rope_scaling.type", json!("linear"), "supported: \"yarn\", \"default\""),
            ("rope_scaling.type", json!(null), "supported: \"yarn\", \"default\""),
            ("rope_scaling.factor", json!(0.5), "at least 1"),
            ("rope_scaling.beta_slow", json!(32), "below `beta_fast`"),
            ("rope_scaling.mscale", json!(0.707), "must equal `mscale_all_dim`"),
            ("rope_scaling.mscale_all_dim", json!(null), "above 0"),
            ("rope_scaling.original_max_position_embeddings", json!(null), "whole number"),
            ("rope_scaling.attention_factor", json!(1.2), "leave it out"),
            ("quantization_config.quant_method", json!("awq"), "\"fp8\""),
            ("quantization_config.quant_method", json!(null), "\"fp8\""),
            ("quantization_config.fmt", json!("e5m2"), "\"e4m3\""),
            ("quantization_config.weight_block_size", json!([128]), "two sizes"),
            ("quantization_config.weight_block_size", json!([128, 0]), "two sizes"),
            ("quantization_config.scale_fmt", json!("e5m3"), "\"ue8m0\""),
            ("norm_topk_prob", json!(1), "true or false"),
            ("bos_token_id", json!([0, 1]), "one token id"),
            ("eos_token_id", json!(129280), "below `vocab_size`, 129280"),
            ("eos_token_id", json!([1, "2"]), "below `vocab_size`, 129280"),
        ];
        for (field, value, expected) in cases {
            let problems = problems(V32, &[(field, value)]);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(problems[0].field, field);
            assert!(problems[0].expected.contains(expected), "{}", problems[0]);
        }
    }

    #[test]
    fn all_problems_in_one_error() {
        let edits = [("hidden_act", json!("gelu")), ("n_group", json!(7)), ("rope_scaling.factor", json!("40"))];
        let error = edited(V32, &edits).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 4, "{error}");
        assert!(error.contains("\n  `n_group` is 7: must divide `n_routed_experts`, 256"), "{error}");
        assert!(error.contains("`rope_scaling.factor` is \"40\": must be a number above 0"), "{error}");
    }

    #[test]
    fn absurd_products_and_empty_files() {
        let huge = json!(1 << 18);
        let sizes = [("hidden_size", huge.clone()), ("moe_intermediate_size", huge)];
        assert!(problems(V32, &sizes)[0].expected.contains("parameters, at most"));
        let wide = [("moe_intermediate_size", json!(1 << 17)), ("first_k_dense_replace", json!(60))];
        assert!(problems(V32, &wide)[0].expected.contains("weight of 481036337152 elements"));
        assert!(matches!(ModelConfig::from_json("{}"), Err(ConfigError::Invalid(problems)) if problems.len() > 15));
        for text in ["", "[]", "null", "{\"hidden_size\": 1", "{\"a\": NaN}", &"[".repeat(100_000)] {
            assert!(matches!(ModelConfig::from_json(text), Err(ConfigError::Json { .. })));
        }
    }

    #[test]
    fn folder_joins_the_end_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let error = ModelConfig::read(dir.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");

        fs::write(dir.path().join("config.json"), V32).unwrap();
        assert_eq!(ModelConfig::read(dir.path()).unwrap().eos, [1]);

        let generation = dir.path().join("generation_config.json");
        fs::write(&generation, r#"{"eos_token_id": [7, 1]}"#).unwrap();
        assert_eq!(ModelConfig::read(dir.path()).unwrap().eos, [1, 7]);

        fs::write(&generation, r#"{"eos_token_id": [129280]}"#).unwrap();
        let error = ModelConfig::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("`generation_config.json: eos_token_id` is [129280]"), "{error}");

        fs::write(&generation, "{").unwrap();
        assert!(matches!(ModelConfig::read(dir.path()), Err(ConfigError::Json { .. })));
    }
}
