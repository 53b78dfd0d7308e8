//! From fields to a config: what is read, refused, and checked against what.

use super::fields::{Fields, MAX_DIM};
use super::{ConfigError, Family, IndexerKind, MlpKind, ModelConfig, Quantization, Rope, Yarn};
use serde_json::{Map, Value};
use std::cell::RefCell;

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

pub(super) fn parse_object(file: &'static str, text: &str) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_str(text).map_err(|error| ConfigError::Json { file, what: error.to_string() })
}

pub(super) fn read_config(
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
