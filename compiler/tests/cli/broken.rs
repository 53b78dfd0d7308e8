//! Inputs that must be refused: with the right exit code and a sentence that names the thing at fault, without a panic, and
//! without a trace among the user's files.

use crate::lab::{BUNDLE, FP8, TINY, TRAINED, Tensors, run, text, write_tensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One broken input.
struct Case {
    name: &'static str,
    /// Makes it in the case's folder.
    set_up: Box<dyn Fn(&Path)>,
    /// The command line. `$TINY`, `$FP8` and `$TRAINED` are checkpoints, `$BUNDLE` an artifact of the first, `''` an empty word.
    args: &'static str,
    code: i32,
    /// What stderr must say.
    says: &'static [&'static str],
}

fn case(
    name: &'static str,
    set_up: impl Fn(&Path) + 'static,
    args: &'static str,
    code: i32,
    says: &'static [&'static str],
) -> Case {
    Case { name, set_up: Box::new(set_up), args, code, says }
}

const COMPILE: &str = "compile m -o out.dsc";
const RUN: &str = "run $BUNDLE --weights m --token-ids ids --max-new-tokens 2";
const RUN_GOOD: &str = "run b.dsc --weights $TINY --token-ids ids --max-new-tokens 2";

// ---- how to break things ----

fn nothing(_: &Path) {}

/// A file of the case's folder.
fn file(name: &'static str, content: impl AsRef<[u8]> + 'static) -> impl Fn(&Path) {
    move |dir| {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &content).unwrap();
    }
}

/// `m/config.json` of the small model with one value changed; null removes it.
fn config(field: &'static str, value: Value) -> impl Fn(&Path) {
    move |dir| {
        let text = fs::read(TINY.join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config[field] = value.clone();
        file("m/config.json", config.to_string())(dir);
    }
}

fn folder(name: &'static str) -> impl Fn(&Path) {
    move |dir| fs::create_dir_all(dir.join(name)).unwrap()
}

/// The folder `m` with config and changed weights of a checkpoint, and `ids`.
fn weights_of(source: &'static std::sync::LazyLock<std::path::PathBuf>, edit: impl Fn(&mut Tensors)) -> impl Fn(&Path) {
    move |dir| {
        folder("m")(dir);
        fs::copy(source.join("config.json"), dir.join("m/config.json")).unwrap();
        let mut tensors = Tensors::read(&source.join("model.safetensors"));
        edit(&mut tensors);
        tensors.write(&dir.join("m/model.safetensors"));
        ids("1 2 3")(dir);
    }
}

fn weights(edit: impl Fn(&mut Tensors)) -> impl Fn(&Path) {
    weights_of(&TINY, edit)
}

/// `m/model.safetensors` of these bytes.
fn raw_weights(bytes: impl Fn() -> Vec<u8>) -> impl Fn(&Path) {
    move |dir| {
        config("vocab_size", json!(512))(dir);
        fs::write(dir.join("m/model.safetensors"), bytes()).unwrap();
        ids("1 2 3")(dir);
    }
}

/// `m` with this index and, as `a.safetensors`, all weights.
fn index(text: &'static str) -> impl Fn(&Path) {
    move |dir| {
        config("vocab_size", json!(512))(dir);
        std::os::unix::fs::symlink(TINY.join("model.safetensors"), dir.join("m/a.safetensors")).unwrap();
        file("m/model.safetensors.index.json", text)(dir);
        ids("1 2 3")(dir);
    }
}

fn ids(text: &'static str) -> impl Fn(&Path) {
    file("ids", text)
}

/// `b.dsc`: the artifact with its bytes changed.
fn artifact(edit: impl Fn(&mut Vec<u8>)) -> impl Fn(&Path) {
    move |dir| {
        let mut bytes = fs::read(&*BUNDLE).unwrap();
        edit(&mut bytes);
        fs::write(dir.join("b.dsc"), bytes).unwrap();
        ids("1 2 3")(dir);
    }
}

/// The first byte of a section of an artifact.
fn section(bytes: &[u8], name: &str) -> usize {
    let header = dsc_ir::artifact::read(bytes).unwrap();
    header.sections.iter().find(|s| s.name == name).unwrap().offset as usize
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const BIAS: &str = "model.layers.1.mlp.gate.e_score_correction_bias";
const SCALE: &str = "model.layers.0.self_attn.q_a_proj.weight_scale_inv";

// ---- the tables ----

fn configs() -> Vec<Case> {
    let bad = |name, field, value: Value, says| case(name, config(field, value), COMPILE, 1, says);
    vec![
        case("no model folder", nothing, COMPILE, 1, &["m/config.json", "help: give a Hugging Face model folder"]),
        case("a file as model folder", file("m", "{}"), COMPILE, 1, &["m/config.json"]),
        case("config is empty", file("m/config.json", ""), COMPILE, 1, &["config.json is not a JSON object"]),
        case("config is no JSON", file("m/config.json", "hidden_size: 7"), COMPILE, 1, &["config.json is not a JSON"]),
        case("config is an array", file("m/config.json", "[1]"), COMPILE, 1, &["config.json is not a JSON object"]),
        case(
            "config is cut off",
            file("m/config.json", "{\"a\": 1"),
            COMPILE,
            1,
            &["config.json is not a JSON object"],
        ),
        case("config is nested deeply", file("m/config.json", "[".repeat(100_000)), COMPILE, 1, &["not a JSON object"]),
        case("config is not UTF-8", file("m/config.json", [0xff, 0xfe, 0]), COMPILE, 1, &["m/config.json"]),
        case("config is empty of fields", file("m/config.json", "{}"), COMPILE, 1, &["`model_type` is absent"]),
        bad("another model", "model_type", json!("llama"), &["`model_type` is \"llama\"", "deepseek_v32"]),
        bad("negative size", "hidden_size", json!(-128), &["`hidden_size` is -128"]),
        bad("fractional size", "hidden_size", json!(12.5), &["`hidden_size` is 12.5"]),
        bad("huge size", "vocab_size", json!(1u64 << 40), &["`vocab_size` is 1099511627776"]),
        bad("huge width", "hidden_size", json!(1 << 24), &["`hidden_size` is 16777216"]),
        bad("zero heads", "num_attention_heads", json!(0), &["`num_attention_heads` is 0"]),
        bad("odd rope", "qk_rope_head_dim", json!(15), &["`qk_rope_head_dim` is 15", "even"]),
        bad("unsupported activation", "hidden_act", json!("gelu"), &["`hidden_act` is \"gelu\"", "silu"]),
        bad("list too short", "mlp_layer_types", json!(["dense", "sparse"]), &["`mlp_layer_types`"]),
        bad("list of something else", "layer_types", json!(["full_attention"]), &["`layer_types`"]),
        bad("groups do not divide", "n_group", json!(3), &["`n_group` is 3", "divide"]),
        bad("end token beyond vocabulary", "eos_token_id", json!(512), &["`eos_token_id` is 512"]),
        case(
            "generation config is broken",
            |dir| {
                config("vocab_size", json!(512))(dir);
                file("m/generation_config.json", "{")(dir);
            },
            COMPILE,
            1,
            &["generation_config.json is not a JSON object"],
        ),
    ]
}

fn compile_options() -> Vec<Case> {
    let c = |name, args, code, says| case(name, nothing, args, code, says);
    vec![
        c("no model", "compile", 2, &["<MODEL_DIR>"]),
        c("layer out of range", "compile $TINY -o out.dsc --layers 0,4", 1, &["there is no layer 4: the model has 4"]),
        c("layer repeated", "compile $TINY -o out.dsc --layers 0,0", 1, &["layers [0, 0]", "each once"]),
        c("layers out of order", "compile $TINY -o out.dsc --layers 2,1", 1, &["layers [2, 1]", "ascending"]),
        c("layer is no number", "compile $TINY -o out.dsc --layers x", 2, &["'x'", "--layers"]),
        c("context of 0", "compile $TINY -o out.dsc --max-context 0", 2, &["--max-context", "0"]),
        c("context negative", "compile $TINY -o out.dsc --max-context=-1", 2, &["--max-context"]),
        c("context too large", "compile $TINY -o out.dsc --max-context 163841", 1, &["--max-context 163841", "163840"]),
        c("chunk of 0", "compile $TINY -o out.dsc --chunk 0", 2, &["--chunk"]),
        c("batch of 0", "compile $TINY -o out.dsc --max-batch 0", 2, &["--max-batch"]),
        c("batch too large", "compile $TINY -o out.dsc --max-batch 1025", 2, &["--max-batch", "1025"]),
        c("unknown target", "compile $TINY -o out.dsc --target sm_1", 1, &["target sm_1", "dsc targets"]),
        c(
            "planned target",
            "compile $TINY -o out.dsc --target ascend910b",
            1,
            &["target ascend910b", "not implemented"],
        ),
        c(
            "ranks that do not divide",
            "compile $TINY -o out.dsc --tp 7",
            1,
            &["--tp", "heads cannot be split over 7 ranks"],
        ),
        c("unknown numerics", "compile $TINY -o out.dsc --numerics fast", 2, &["'fast'", "deployed"]),
        c("unknown level", "compile $TINY -o out.dsc --emit graph,ptx", 2, &["'ptx'", "sched"]),
        c("assembler of another target", "compile $TINY -o out.dsc --ptxas x", 1, &["--ptxas", "target cpu", "sm_*"]),
        c(
            "level of another target",
            "compile $TINY -o out.dsc --emit mlir",
            1,
            &["--emit mlir", "target cpu", "help:"],
        ),
        c("unknown pass", "compile $TINY -o out.dsc --print-after fuse_all", 2, &["'fuse_all'", "fuse_rows"]),
        c(
            "output into a missing folder",
            "compile $TINY -o no/out.dsc",
            1,
            &["no/out.dsc", "no does not exist", "help:"],
        ),
        case("output is a folder", folder("d"), "compile $TINY -o d", 1, &["cannot write d", "is a folder"]),
        case(
            "emit folder is a file",
            file("f", ""),
            "compile $TINY --layers 0 -o out.dsc --emit graph --emit-dir f",
            1,
            &["cannot make the folder f"],
        ),
    ]
}

fn checkpoints() -> Vec<Case> {
    let offsets = |name: &'static str, range: [u64; 2]| weights(move |t| t.header[name]["data_offsets"] = json!(range));
    vec![
        case(
            "no weights",
            config("vocab_size", json!(512)),
            "run $BUNDLE --weights m --token-ids /dev/null",
            1,
            &["no tokens"],
        ),
        case(
            "no weights at all",
            |d| (folder("m")(d), ids("1")(d)).0,
            RUN,
            1,
            &["m has neither model.safetensors", "help: give"],
        ),
        case("weights are empty", raw_weights(Vec::new), RUN, 1, &["m/model.safetensors is damaged", "help: download"]),
        case(
            "header cut off",
            raw_weights(|| [&100u64.to_le_bytes()[..], b"{\"a\""].concat()),
            RUN,
            1,
            &["runs past the end"],
        ),
        case(
            "header beyond the file",
            raw_weights(|| (1u64 << 20).to_le_bytes().to_vec()),
            RUN,
            1,
            &["runs past the end"],
        ),
        case(
            "header beyond reason",
            raw_weights(|| u64::MAX.to_le_bytes().to_vec()),
            RUN,
            1,
            &["18446744073709551615 bytes"],
        ),
        case(
            "header is no JSON",
            raw_weights(|| [&4u64.to_le_bytes()[..], b"{{{{"].concat()),
            RUN,
            1,
            &["is damaged: header"],
        ),
        case(
            "tensor twice",
            |dir| {
                raw_weights(Vec::new)(dir);
                let one = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
                write_tensors(&dir.join("m/model.safetensors"), format!("{{{one},{one}}}").as_bytes(), &[0]);
            },
            RUN,
            1,
            &["is damaged", "a"],
        ),
        case("offsets overlap", offsets(EMBEDDING, [0, 131072]), RUN, 1, &["is damaged", "overlaps"]),
        case(
            "offsets beyond the file",
            weights(|t| {
                let end = |tensor: &Value| tensor["data_offsets"][1].as_u64();
                let tensors = t.header.as_object_mut().unwrap().values_mut();
                tensors.max_by_key(|tensor| end(tensor)).unwrap()["data_offsets"] = json!([1u64 << 40, 1u64 << 41]);
            }),
            RUN,
            1,
            &["is damaged", "offsets are 1099511627776..2199023255552"],
        ),
        case("offsets do not fit the shape", offsets(EMBEDDING, [0, 1]), RUN, 1, &[EMBEDDING, "offsets are 0..1"]),
        case("offsets reversed", offsets(EMBEDDING, [131072, 0]), RUN, 1, &[EMBEDDING, "is damaged"]),
        case(
            "data cut off",
            weights(|t| t.data.truncate(1 << 20)),
            RUN,
            1,
            &["is damaged", "of which there are 1048576"],
        ),
        case("data left over", weights(|t| t.data.push(0)), RUN, 1, &["1 bytes follow the last tensor"]),
        case(
            "unknown dtype",
            weights(|t| t.header[EMBEDDING]["dtype"] = json!("F99")),
            RUN,
            1,
            &["is damaged: header", "F99"],
        ),
        case(
            "dtype dsc does not read",
            weights(|t| t.header[EMBEDDING]["dtype"] = json!("I16")),
            RUN,
            1,
            &[EMBEDDING, "I16"],
        ),
        case("integer weights", weights(|t| t.header[BIAS]["dtype"] = json!("I32")), RUN, 1, &[BIAS, "stored as I32"]),
        case(
            "tensor missing",
            weights(|t| t.rename(EMBEDDING, "model.embed_token.weight")),
            RUN,
            1,
            &["no tensor `model.embed_tokens.weight`", "help: did you mean `model.embed_token.weight`"],
        ),
        case(
            "tensor missing in compile",
            weights(|t| t.rename(EMBEDDING, "x")),
            "compile m --layers 0 -o out.dsc",
            1,
            &["the weights in m do not fit", EMBEDDING],
        ),
        case(
            "tensor misshapen",
            weights(|t| t.header[EMBEDDING]["shape"] = json!([128, 512])),
            RUN,
            1,
            &[EMBEDDING, "[128, 512]", "[512, 128]"],
        ),
        case(
            "scale missing",
            weights_of(&FP8, |t| t.rename(SCALE, "x")),
            "compile m --layers 0 -o out.dsc",
            1,
            &[SCALE],
        ),
        case(
            "scale misshapen",
            weights_of(&FP8, |t| {
                let scales: u64 = t.shape(SCALE).iter().product();
                t.header[SCALE]["shape"] = json!([1, 1, scales, 1]);
            }),
            "compile m --layers 0 -o out.dsc",
            1,
            &[SCALE, "expected F32"],
        ),
        case(
            "scale of another dtype",
            weights_of(&FP8, |t| t.header[SCALE]["dtype"] = json!("I32")),
            "compile m --layers 0 -o out.dsc",
            1,
            &[SCALE, "I32", "expected F32"],
        ),
        case(
            "index names an absent file",
            index(r#"{"weight_map":{"a":"b.safetensors"}}"#),
            RUN,
            1,
            &["`b.safetensors`, which is missing"],
        ),
        case(
            "index leaves the folder",
            index(r#"{"weight_map":{"a":"../a.safetensors"}}"#),
            RUN,
            1,
            &["`../a.safetensors`", "beside it"],
        ),
        case("index is no JSON", index("{"), RUN, 1, &["model.safetensors.index.json is damaged"]),
        case("index without map", index("{}"), RUN, 1, &["model.safetensors.index.json is damaged", "weight_map"]),
        case(
            "shard lacks the tensor",
            index(r#"{"weight_map":{"zz":"a.safetensors"}}"#),
            RUN,
            1,
            &["tensor `zz`", "does not hold it"],
        ),
        case(
            "a folder as weights",
            |d| (folder("m/model.safetensors")(d), ids("1")(d)).0,
            RUN,
            1,
            &["not a regular file"],
        ),
        case(
            "weights are NaN",
            weights(|t| {
                let [start, end] = [0, 1].map(|i| t.header[EMBEDDING]["data_offsets"][i].as_u64().unwrap() as usize);
                for element in t.data[start..end].chunks_exact_mut(2) {
                    element.copy_from_slice(&0x7fc0u16.to_le_bytes());
                }
            }),
            RUN,
            1,
            &["none of the 512 logits is a number", "help: run `dsc verify`"],
        ),
        case(
            "weights of another model",
            ids("1 2 3"),
            "run $BUNDLE --weights $FP8 --token-ids ids",
            1,
            &["not of the model"],
        ),
    ]
}

fn artifacts() -> Vec<Case> {
    let cut = |name, bytes: usize, says| case(name, artifact(move |b| b.truncate(bytes)), RUN_GOOD, 1, says);
    let half = artifact(|b| b.truncate(b.len() / 2));
    vec![
        case("no artifact", ids("1"), RUN_GOOD, 1, &["cannot read b.dsc"]),
        case(
            "artifact is a folder",
            |d| (folder("b.dsc")(d), ids("1")(d)).0,
            RUN_GOOD,
            1,
            &["b.dsc: it is not a dsc artifact"],
        ),
        cut("artifact is empty", 0, &["b.dsc: it is not a dsc artifact", "help: give a file that `dsc compile` wrote"]),
        case("artifact is something else", artifact(|b| b[0] = b'X'), RUN_GOOD, 1, &["not a dsc artifact"]),
        cut("artifact cut in the magic", 5, &["is cut off"]),
        cut("artifact cut before the header", 40, &["is cut off", "help: copy or compile it again"]),
        cut("artifact cut in the header", 2000, &["is cut off"]),
        case("artifact cut in a section", half, RUN_GOOD, 1, &["is cut off"]),
        case("artifact cut by a byte", artifact(|b| b.truncate(b.len() - 1)), "inspect b.dsc", 1, &["is cut off"]),
        case("artifact with a tail", artifact(|b| b.push(0)), "inspect b.dsc", 1, &["bytes follow its end"]),
        case("artifact's header flipped", artifact(|b| b[100] ^= 1), RUN_GOOD, 1, &["its header is damaged"]),
        case("artifact's hash flipped", artifact(|b| b[30] ^= 1), RUN_GOOD, 1, &["its header is damaged"]),
        case("artifact's header endless", artifact(|b| b[16..24].fill(0xff)), RUN_GOOD, 1, &["its header is damaged"]),
        case(
            "artifact's code flipped",
            artifact(|b| {
                let at = section(b, "code");
                b[at] ^= 1;
            }),
            RUN_GOOD,
            1,
            &["section `code` is damaged"],
        ),
        case(
            "artifact's text flipped",
            artifact(|b| {
                let at = section(b, "tile");
                b[at] ^= 1;
            }),
            "inspect b.dsc",
            1,
            &["section `tile` is damaged"],
        ),
        case("artifact is newer", artifact(|b| b[8] = 99), RUN_GOOD, 1, &["format version 99", "update dsc"]),
    ]
}

fn requests() -> Vec<Case> {
    let c = |name, args, code, says| case(name, ids("1 2 3"), args, code, says);
    let token = |name, text, says| case(name, ids(text), "run $BUNDLE --weights $TINY --token-ids ids", 1, says);
    vec![
        case("no subcommand", nothing, "", 2, &["Usage"]),
        case("unknown subcommand", nothing, "serve", 2, &["'serve'"]),
        c("no input", "run $BUNDLE --weights $TINY", 2, &["--prompt", "--token-ids"]),
        c("both inputs", "run $BUNDLE --weights $TINY --prompt a --token-ids ids", 2, &["cannot be used with"]),
        c(
            "weights folder missing",
            "run $BUNDLE --weights no --prompt a",
            1,
            &["there is no folder no", "help: give the"],
        ),
        c("no --weights", "run $BUNDLE --token-ids ids", 2, &["--weights"]),
        token("bad token id", "1 two 3", &["ids: `two`, word 2", "help:"]),
        token("negative token id", "1 -2", &["`-2`"]),
        token("token id beyond u32", "4294967296", &["`4294967296`"]),
        token("token beyond the vocabulary", "1 512", &["token 512 at place 1", "vocabulary of 512"]),
        token("no tokens", " \n", &["the prompt has no tokens"]),
        case(
            "prompt too long",
            |dir| fs::write(dir.join("ids"), "7 ".repeat(257)).unwrap(),
            "run $BUNDLE --weights $TINY --token-ids ids",
            1,
            &["257 tokens", "256", "help: shorten it, or compile the model with a larger --max-context"],
        ),
        c("empty prompt", "run $BUNDLE --weights $TRAINED --prompt ''", 1, &["the prompt has no tokens"]),
        c(
            "prompt without a tokenizer",
            "run $BUNDLE --weights $TINY --prompt a",
            1,
            &["no tokenizer.json", "help: give --token-ids"],
        ),
        case(
            "tokenizer is broken",
            file("m/tokenizer.json", "{}"),
            "run $BUNDLE --weights m --prompt a",
            1,
            &["m/tokenizer.json is not a tokenizer"],
        ),
        c("token ids are missing", "run $BUNDLE --weights $TINY --token-ids none", 1, &["none", "No such file"]),
        c("token ids are a folder", "run $BUNDLE --weights $TINY --token-ids .", 1, &["token ids from ."]),
        c(
            "temperature negative",
            "run $BUNDLE --weights $TINY --token-ids ids --temperature -1",
            2,
            &["'-1'", "--temperature"],
        ),
        c(
            "temperature NaN",
            "run $BUNDLE --weights $TINY --token-ids ids --temperature nan",
            2,
            &["'nan'", "--temperature"],
        ),
        c(
            "temperature infinite",
            "run $BUNDLE --weights $TINY --token-ids ids --temperature inf",
            2,
            &["--temperature"],
        ),
        c(
            "top-p of 0",
            "run $BUNDLE --weights $TINY --token-ids ids --temperature 1 --top-p 0",
            2,
            &["'0'", "--top-p"],
        ),
        c(
            "top-p of 2",
            "run $BUNDLE --weights $TINY --token-ids ids --temperature 1 --top-p 2",
            2,
            &["'2'", "--top-p"],
        ),
        c(
            "top-p without temperature",
            "run $BUNDLE --weights $TINY --token-ids ids --top-p 0.5",
            2,
            &["--temperature"],
        ),
        c(
            "greedy and temperature",
            "run $BUNDLE --weights $TINY --token-ids ids --greedy --temperature 1",
            2,
            &["cannot be used with"],
        ),
        c("no threads", "run $BUNDLE --weights $TINY --token-ids ids --threads 0", 2, &["--threads"]),
        c("a million threads", "run $BUNDLE --weights $TINY --token-ids ids --threads 1000000", 2, &["--threads"]),
        c(
            "logits into a missing folder",
            "run $BUNDLE --weights $TINY --token-ids ids --dump-logits no/l",
            1,
            &["no/l", "no does not exist"],
        ),
        c("logits over a folder", "run $BUNDLE --weights $TINY --token-ids ids --dump-logits .", 1, &["is a folder"]),
        c("golden file missing", "verify $BUNDLE --weights $TINY --golden none", 1, &["cannot read none"]),
        c("golden file is text", "verify $BUNDLE --weights $TINY --golden ids", 1, &["ids is damaged"]),
        c(
            "golden file without ids",
            "verify $BUNDLE --weights $TINY --golden $TINY/model.safetensors",
            1,
            &["input_ids"],
        ),
        c("tolerance negative", "verify $BUNDLE --weights $TINY --golden ids --tolerance -1", 2, &["--tolerance"]),
        c("tolerance NaN", "verify $BUNDLE --weights $TINY --golden ids --tolerance nan", 2, &["--tolerance"]),
        c("text missing", "eval $BUNDLE --weights $TRAINED --text none", 1, &["cannot read none"]),
        case("text not UTF-8", file("t", [0xff]), "eval $BUNDLE --weights $TRAINED --text t", 1, &["cannot read t"]),
        c("text without a tokenizer", "eval $BUNDLE --weights $TINY --text ids --window 8", 1, &["tokenizer.json"]),
        c("window of 1", "eval $BUNDLE --weights $TRAINED --text ids --window 1", 2, &["--window"]),
        c(
            "window beyond the context",
            "eval $BUNDLE --weights $TRAINED --text ids",
            1,
            &["--window 1024", "256", "help:"],
        ),
        case(
            "text too short",
            |dir| {
                weights(|_| ())(dir);
                fs::copy(TRAINED.join("tokenizer.json"), dir.join("m/tokenizer.json")).unwrap();
            },
            "eval $BUNDLE --weights m --text ids --window 100",
            1,
            &["fill no window of 100", "help:"],
        ),
        c("batch of 0", "bench $BUNDLE --weights $TINY --batch 0", 2, &["--batch"]),
        c("prefill beyond the context", "bench $BUNDLE --weights $TINY --prefill 257", 1, &["--prefill 257", "256"]),
        c("steps beyond the context", "bench $BUNDLE --weights $TINY --steps 300", 1, &["--steps 300", "256", "help:"]),
        c("nothing to time", "bench", 2, &["--weights", "BUNDLE"]),
        c("a kernel and a bundle", "bench $BUNDLE --kernel linear", 2, &["cannot be used with"]),
        c("a shape and no kernel", "bench $BUNDLE --weights $TINY --shape m=1", 2, &["cannot be used with"]),
        c("no such kernel to time", "bench --kernel gemm", 1, &["no kernel `gemm`", "help: give one of linear"]),
        c(
            "unknown size",
            "bench --kernel linear --shape q=1",
            1,
            &["linear has no `q`", "help: give m, n, k or dtype"],
        ),
        c("size of 0", "bench --kernel linear --shape m=0", 1, &["m=0", "help: give a whole number"]),
        c("sizes that contradict", "bench --kernel gate --shape groups=7", 1, &["do not fit together", "kernel.topk"]),
        c("kernel for no target", "bench --kernel linear --target vax", 1, &["target vax", "dsc targets"]),
        c("no kernel to tune", "tune gemm", 1, &["no kernel `gemm`", "help: give one of linear"]),
        c("nothing to tune", "tune", 2, &["KERNEL"]),
        c("no time to tune", "tune linear --limit 0", 2, &["--limit"]),
        c("tuned elsewhere than in a folder", "tune --from none", 1, &["none/candidates.json", "help: give a folder"]),
        case(
            "candidates that are no list",
            file("candidates.json", *b"[]"),
            "tune --from .",
            1,
            &["candidates.json", "help: give a folder"],
        ),
        case(
            "a candidate outside of its folder",
            file(
                "candidates.json",
                *br#"{"kernel": "linear", "shape": "", "target": "cpu", "dropped": 0,
                      "candidates": [{"file": "../x.dsc", "rule": {"schedule": {}}}]}"#,
            ),
            "tune --from .",
            1,
            &["`../x.dsc` is no file name"],
        ),
        c("unknown kernel", "inspect $BUNDLE --kernel none", 1, &["no kernel `none`", "help:"]),
        c("unknown shell", "completions cobol", 2, &["'cobol'"]),
    ]
}

/// Names and contents of all files under a folder.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match path.is_dir() {
            true => all.extend(contents(&path)),
            false => drop(all.insert(text(&path).to_owned(), fs::read(&path).unwrap())),
        }
    }
    all
}

fn check(case: &Case, output_exists: bool) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    (case.set_up)(dir.path());
    if output_exists {
        fs::write(dir.path().join("out.dsc"), "what was there before").unwrap();
    }
    let before = contents(dir.path());
    let paths = [("$TINY", &*TINY), ("$FP8", &*FP8), ("$TRAINED", &*TRAINED), ("$BUNDLE", &*BUNDLE)];
    let expand = |word: &str| match word {
        "''" => String::new(),
        _ => paths.iter().fold(word.to_owned(), |word, (name, path)| word.replace(name, text(path))),
    };
    let args: Vec<String> = case.args.split_whitespace().map(expand).collect();
    let output = run(dir.path(), &args.iter().map(String::as_str).collect::<Vec<_>>());
    let stderr = String::from_utf8_lossy(&output.stderr);
    let mut faults = Vec::new();
    if output.status.code() != Some(case.code) {
        faults.push(format!("it ends with {}, not {}", output.status, case.code));
    }
    let silent = case.says.iter().filter(|words| !stderr.contains(**words));
    faults.extend(silent.map(|words| format!("stderr does not say {words:?}")));
    if stderr.contains("panicked") {
        faults.push("it panics".into());
    }
    if !case.args.is_empty() && stderr.lines().filter(|line| line.starts_with("error: ")).count() != 1 {
        faults.push("stderr has not one line that starts with `error: `".into());
    }
    if !output.stdout.is_empty() {
        faults.push(format!("stdout says {:?}", String::from_utf8_lossy(&output.stdout)));
    }
    if contents(dir.path()) != before {
        faults.push(format!("its files are now {:?}", contents(dir.path()).keys()));
    }
    if faults.is_empty() { Ok(()) } else { Err(format!("{}: {}\n{stderr}", case.name, faults.join("; "))) }
}

/// Checks a table, half of its cases with an output file that exists.
fn check_all(cases: &[Case]) {
    let results = cases.iter().enumerate().map(|(i, case)| check(case, i % 2 == 0));
    let failed: Vec<String> = results.filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} of {} cases:\n\n{}", failed.len(), cases.len(), failed.join("\n"));
}

#[test]
fn broken_configs() {
    check_all(&configs());
}

#[test]
fn broken_compile_options() {
    check_all(&compile_options());
}

#[test]
fn broken_checkpoints() {
    check_all(&checkpoints());
}

#[test]
fn broken_artifacts() {
    check_all(&artifacts());
}

#[test]
fn broken_requests() {
    check_all(&requests());
}
