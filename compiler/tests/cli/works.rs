//! What must work.

use crate::lab::{BUNDLE, MAX_CONTEXT, TINY, TRAINED, Tensors, dsc, repository, run, succeed, succeed_json, text};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use tempfile::tempdir;

fn here() -> &'static Path {
    Path::new(".")
}

fn words(ids: &[i32]) -> String {
    ids.iter().map(|id| format!("{id}\n")).collect()
}

#[test]
fn the_tiny_model_says_what_it_should() {
    let dir = tempdir().unwrap();
    succeed(dir.path(), &["compile", text(&TRAINED), "--numerics", "exact", "--max-context", "512", "-o", "t.dsc"]);
    let golden = Tensors::read(&TRAINED.join("golden.safetensors"));
    let (prompt, expected) = (golden.i32s("greedy.0.prompt_ids"), golden.i32s("greedy.0.ids"));
    fs::write(dir.path().join("ids"), words(&prompt)).unwrap();
    let n = expected.len().to_string();
    let base = ["run", "t.dsc", "--weights", text(&TRAINED), "--ignore-eos", "--max-new-tokens", &n];
    let answer = succeed_json(dir.path(), &[&base[..], &["--token-ids", "ids", "--greedy", "--json"]].concat());
    let fields: Vec<&str> = answer.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(fields, ["finish_reason", "prompt_tokens", "text", "timings", "token_ids"]);
    assert_eq!(answer["token_ids"], serde_json::json!(expected));
    assert_eq!((&answer["prompt_tokens"], &answer["finish_reason"]), (&prompt.len().into(), &"length".into()));
    for time in ["prompt_s", "decode_s"] {
        assert!(answer["timings"][time].as_f64().unwrap() > 0.0);
    }
    // As text the same: the prompt's, then the answer's.
    let shown = succeed(dir.path(), &[&base[..], &["--token-ids", "ids"]].concat());
    assert_eq!(shown.trim_end_matches('\n'), answer["text"].as_str().unwrap().trim_end_matches('\n'));
    let shown =
        succeed(dir.path(), &["run", "t.dsc", "--weights", text(&TRAINED), "--prompt", "The", "--max-new-tokens", "3"]);
    assert!(shown.starts_with("The") && shown.ends_with('\n') && shown.len() > 4, "{shown}");

    let sample = |seed: &str, threads: &str| {
        let sampling =
            ["--prompt", "The", "--temperature", "1.2", "--top-p", "0.9", "--seed", seed, "--threads", threads];
        succeed(dir.path(), &[&base[..], &sampling].concat())
    };
    assert_eq!(sample("1", "1"), sample("1", "2"));
    assert_ne!(sample("1", "1"), sample("2", "1"));

    let text_file = dir.path().join("text");
    fs::write(&text_file, &fs::read(TRAINED.join("eval.txt")).unwrap()[..2000]).unwrap();
    let eval = ["eval", "t.dsc", "--weights", text(&TRAINED), "--text", "text", "--window", "256"];
    let loss = succeed_json(dir.path(), &[&eval[..], &["--json"]].concat());
    assert!((1.0..5.0).contains(&loss["nats_per_token"].as_f64().unwrap()), "{loss}");
    assert!(succeed(dir.path(), &eval).contains("bits/byte"));
}

#[test]
fn ranks_are_compiled_but_not_run() {
    let dir = tempdir().unwrap();
    let compile = ["compile", text(&TINY), "--numerics", "exact", "--max-context", "128", "--tp", "2", "-o", "t.dsc"];
    succeed(dir.path(), &compile);
    let shard = |rank: u32| succeed_json(dir.path(), &["inspect", &format!("t.rank{rank}.dsc"), "--json"]);
    let (zero, one) = (shard(0), shard(1));
    assert_eq!((&zero["model"]["ranks"], &one["model"]["rank"]), (&2.into(), &1.into()), "{zero}");
    assert_eq!(zero["kernels"], one["kernels"]);
    assert_ne!(zero["weights"], one["weights"]);
    fs::write(dir.path().join("ids"), "1 2 3").unwrap();
    let refused = run(dir.path(), &["run", "t.rank1.dsc", "--weights", text(&TINY), "--token-ids", "ids"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("rank 1 of 2"), "{refused:?}");
}

#[test]
fn golden_outputs_are_verified() {
    let golden = TINY.join("golden-lowest.safetensors");
    let verify = ["verify", text(&BUNDLE), "--weights", text(&TINY), "--golden", text(&golden)];
    let report = succeed_json(here(), &[&verify[..], &["--json"]].concat());
    assert_eq!(report["failures"], serde_json::json!([]));
    assert!(succeed(here(), &verify).ends_with("passed\n"));
    let strict = run(here(), &[&verify[..], &["--tolerance", "0"]].concat());
    assert_eq!(strict.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&strict.stdout).contains("FAILED logits"));
}

#[test]
fn logits_are_dumped() {
    let dir = tempdir().unwrap();
    // Of equal scores these outputs select the lowest positions, as dsc does.
    let golden = Tensors::read(&TINY.join("golden-lowest.safetensors"));
    let mut child = dsc(dir.path(), &["run", text(&BUNDLE), "--weights", text(&TINY), "--token-ids", "-"])
        .args(["--max-new-tokens", "4", "--dump-logits", "l.safetensors", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(words(&golden.i32s("input_ids")).as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answer.get("text").is_none(), "there is no tokenizer: {answer}");
    assert_eq!(answer["token_ids"], serde_json::json!(golden.i32s("greedy_ids")[..4]));
    let logits = Tensors::read(&dir.path().join("l.safetensors"));
    assert_eq!((logits.shape("logits"), &logits.header["logits"]["dtype"]), (vec![80, 512], &"F32".into()));
    let error = logits.f32s("logits").iter().zip(golden.f32s("logits")).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < 1e-2, "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_full_context_ends_the_text() {
    let dir = tempdir().unwrap();
    let prompt = vec![7; MAX_CONTEXT as usize - 2];
    fs::write(dir.path().join("ids"), words(&prompt)).unwrap();
    let run = ["run", text(&BUNDLE), "--weights", text(&TINY), "--token-ids", "ids", "--ignore-eos", "--json"];
    let most = usize::MAX.to_string();
    let answer = succeed_json(dir.path(), &[&run[..], &["--max-new-tokens", &most]].concat());
    assert_eq!((&answer["finish_reason"], answer["token_ids"].as_array().unwrap().len()), (&"context".into(), 3));
    let answer = succeed_json(dir.path(), &[&run[..], &["--max-new-tokens", "0"]].concat());
    assert_eq!((&answer["finish_reason"], answer["token_ids"].as_array().unwrap().len()), (&"length".into(), 0));
}

#[test]
fn compiling_twice_gives_the_same_bytes() {
    let dir = tempdir().unwrap();
    for name in ["a.dsc", "b.dsc"] {
        let summary = succeed_json(dir.path(), &["compile", text(&TINY), "-o", name, "--json"]);
        assert_eq!((&summary["output"], &summary["target"]), (&name.into(), &"cpu".into()));
    }
    assert!(fs::read(dir.path().join("a.dsc")).unwrap() == fs::read(dir.path().join("b.dsc")).unwrap());
}

#[test]
fn every_level_is_written() {
    let dir = tempdir().unwrap();
    let emit = ["--emit", "graph,tile,sched,asm", "--emit-dir", "e/f", "--print-after", "fuse_rows", "--time-passes"];
    let output = run(dir.path(), &[&["compile", text(&TINY), "--layers", "0,1"], &emit[..]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.is_empty(), "{stderr}");
    assert!(stderr.contains("// prefill, after fuse_rows\ngraph {") && stderr.contains("generate code"), "{stderr}");
    let size = |name: &str| fs::metadata(dir.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}")).len();
    for name in ["v32-tiny.dsc", "e/f/decode1.graph", "e/f/prefill.graph", "e/f/schedules.json", "e/f/kernels.asm"] {
        assert!(size(name) > 100, "{name}");
    }
    let names = fs::read_dir(dir.path().join("e/f")).unwrap().map(|e| e.unwrap().file_name());
    assert!(names.filter(|n| n.to_string_lossy().ends_with(".tile")).count() > 10);
}

#[test]
fn real_configs_compile_without_weights() {
    let dir = tempdir().unwrap();
    for (model, layers) in [("examples/deepseek-v3.2", 61), ("examples/glm-5", 78)] {
        let model = repository(model);
        let output = run(dir.path(), &["compile", text(&model), "-o", "m.dsc"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.contains("note: no weights in"), "{stderr}");
        let header = succeed_json(dir.path(), &["inspect", "m.dsc", "--json"]);
        assert_eq!(header["model"]["layers"], layers);
    }
}

#[test]
fn artifacts_are_inspected() {
    let bundle = text(&BUNDLE);
    let shown = succeed(here(), &["inspect", bundle, "--launches", "--weights"]);
    assert!(shown.starts_with("deepseek_v32 for cpu, exact numerics") && shown.contains(" caches, "), "{shown}");
    assert!(shown.lines().all(|line| line == line.trim_end()), "lines end in blanks");
    let header = succeed_json(here(), &["inspect", bundle, "--json"]);
    let name = header["kernels"][0]["name"].as_str().unwrap();
    assert!(succeed(here(), &["inspect", bundle, "--kernel", name]).starts_with(&format!("kernel {name} ")));
    let kernel = succeed_json(here(), &["inspect", bundle, "--kernel", name, "--json"]);
    assert_eq!(kernel["kernel"]["name"], name);
}

#[test]
fn steps_are_timed() {
    let base = ["bench", text(&BUNDLE), "--weights", text(&TINY), "--repeat", "1", "--steps", "2", "--profile"];
    let times = succeed_json(here(), &[&base[..], &["--json"]].concat());
    for step in ["prefill", "decode"] {
        let us = ["min_us", "median_us", "max_us"].map(|k| times[step][k].as_f64().unwrap());
        assert!(us[0] > 0.0 && us[0] <= us[1] && us[1] <= us[2], "{times}");
        let work = &times[format!("{step}_work")];
        for rate in ["flop", "bytes", "tflop_per_s", "gb_per_s", "floor_us", "share_of_limit"] {
            assert!(work[rate].as_f64().unwrap() > 0.0, "{step} {rate}: {work}");
        }
        let kernels = times[format!("{step}_profile")].as_object().unwrap();
        let flop: f64 = kernels.values().map(|k| k["flop"].as_f64().unwrap()).sum();
        let runs = if step == "decode" { 2.0 } else { 1.0 };
        assert!((flop / runs / work["flop"].as_f64().unwrap() - 1.0).abs() < 1e-6, "{times}");
    }
    let shown = succeed(here(), &base);
    assert!(shown.contains("tokens/s") && shown.contains("of limit") && shown.contains("GB/s"), "{shown}");
}

#[test]
fn schedules_are_searched() {
    let dir = tempdir().unwrap();
    let kernel = ["tune", "linear", "--shape", "m=2,n=64,k=128,dtype=f32", "--limit", "2"];
    let found = succeed_json(dir.path(), &[&kernel[..], &["--threads", "1", "-o", "rules.json", "--json"]].concat());
    let trials = found["found"]["trials"].as_array().unwrap();
    let own = trials.iter().find(|t| t["rule"]["schedule"] == serde_json::json!({})).expect("the target's own");
    assert!(trials.len() > 3 && own["us"].as_f64().unwrap() > 0.0, "{found}");
    assert!(trials.iter().all(|t| t["us"].is_f64() || !t["why"].as_str().unwrap().starts_with("wrong")), "{found}");
    let rules: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("rules.json")).unwrap()).unwrap();
    let winner = &found["found"]["winner"];
    assert_eq!(rules, if winner.is_null() { serde_json::json!([]) } else { serde_json::json!([winner["rule"]]) });
    succeed(dir.path(), &["compile", text(&TINY), "--max-context", "128", "--schedules", "rules.json", "-o", "t.dsc"]);

    // Compiled in one place, timed in another.
    assert_eq!(succeed(dir.path(), &[&kernel[..], &["--save", "there"]].concat()), "");
    let shown = succeed(dir.path(), &["tune", "--from", "there", "--limit", "1"]);
    assert!(shown.starts_with("linear m=2,n=64,k=128,dtype=f32, for cpu") && shown.contains("own"), "{shown}");
}

#[test]
fn single_kernels_are_timed() {
    let list = succeed(here(), &["bench", "--kernel", "list"]);
    let families = succeed_json(here(), &["bench", "--kernel", "list", "--json"]);
    for family in families.as_array().unwrap() {
        assert!(list.contains(&format!("{}: ", family["kernel"].as_str().unwrap())), "{list}");
    }
    let small = ["bench", "--kernel", "linear", "--shape", "m=2,n=64,k=128,dtype=f32", "--threads", "1"];
    let times = succeed_json(here(), &[&small[..], &["--json"]].concat());
    assert_eq!(times["shape"], "m=2,n=64,k=128,dtype=f32");
    assert_eq!(times["work"]["flop"], f64::from(2 * 2 * 64 * 128));
    assert_eq!(times["launches"].as_array().unwrap().len(), 1);
    assert!(times["times"]["median_us"].as_f64().unwrap() > 0.0 && times["copies"].as_u64().unwrap() > 1);
    assert!(succeed(here(), &small).contains("linear m=2,n=64,k=128,dtype=f32, for cpu"));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    // `dsc run ... | head -1`: the text ends early, and so does the work.
    let mut child = dsc(here(), &["run", text(&BUNDLE), "--weights", text(&TINY), "--token-ids", "-", "--ignore-eos"])
        .args(["--max-new-tokens", "200"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(b"1 2 3").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains(", 1 new]"), "{stderr}");

    for args in [&["inspect", text(&BUNDLE)][..], &["targets"], &["completions", "bash"]] {
        let mut child = dsc(here(), args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty() && !line.is_empty(), "{args:?}: {stderr}");
    }
}

#[test]
fn shells_accept_completions() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(succeed(here(), &["completions", shell]).contains("--token-ids") || shell == "fish");
    }
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("dsc.bash"), succeed(here(), &["completions", "bash"])).unwrap();
    // Where there is no bash there is nothing to complete.
    if let Ok(output) = std::process::Command::new("bash").arg("-n").arg(dir.path().join("dsc.bash")).output() {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn help_and_targets() {
    let help = succeed(here(), &["--help"]);
    for command in ["compile", "run", "verify", "eval", "bench", "inspect", "targets", "completions"] {
        assert!(help.contains(&format!("  {command} ")), "{command}");
        assert!(succeed(here(), &[command, "--help"]).contains("Usage: dsc"));
    }
    assert_eq!(succeed(here(), &["--version"]), format!("dsc {}\n", env!("CARGO_PKG_VERSION")));
    assert!(succeed(here(), &["targets"]).contains("sm_90a"));
    assert!(succeed_json(here(), &["targets", "--json"]).as_array().unwrap().iter().any(|t| t["name"] == "cpu"));
}
