use super::*;
use serde_json::{Value, json};

const V32: &str = include_str!("../../../../examples/deepseek-v3.2/config.json");
const GLM5: &str = include_str!("../../../../examples/glm-5/config.json");
const V32_TINY: &str = include_str!("../../../../tests/golden/v32-tiny/config.json");
const V32_HEADS_FP8: &str = include_str!("../../../../tests/golden/v32-heads-fp8/config.json");
const GLM_TINY: &str = include_str!("../../../../tests/golden/glm-tiny/config.json");

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
    let mut block = json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40, "beta_fast": 32, "beta_slow": 1});
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
