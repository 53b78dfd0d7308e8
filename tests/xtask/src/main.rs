//! `cargo xtask COMMAND`: the project's own commands.
//!
//! * `demo`: builds `dsc` (Cranelift only), compiles the tiny model of examples/ and streams text from it.
//! * `test`: everything the suite needs (LLVM 22, a ptxas), then the suite.
//! * `ci`: `test`, formatting, lints, docs, and that compiling twice gives the same bytes.
//! * `bench`: decode and prefill of the tiny model, and Hugging Face transformers on the same machine if it is installed.
//! * `wheel [OPTIONS]`: the Python module of the kernel library with all it needs, in target/wheel; options are those of
//!   `dsc compile --kernels dsa`, such as `--target sm_90a --heads 16`.
//! * `loops DIR [TEXT] [--check]`: what the loops of AMD kernels issue, from their assembly.
//! * `fuzz [SECONDS]`: every fuzz target for that long (default 60).
//!
//! Nothing is installed behind your back: what is missing is named with the reason and the command, and installed only where
//! that needs no question (as root on Debian).

mod loops;
mod setup;

use setup::{need, need_llvm};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let outcome = match args.first().map(String::as_str) {
        Some("demo") => demo(),
        Some("test") => test(&args[1..]),
        Some("ci") => ci(),
        Some("bench") => bench(&args[1..]),
        Some("wheel") => wheel(&args[1..]),
        Some("loops") => loops::run(&args[1..]),
        Some("fuzz") => fuzz(args.get(1)),
        _ => Err("usage: cargo xtask demo | test | ci | bench | wheel [OPTIONS] | loops DIR | fuzz [SECONDS]".into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The repository's root: xtask lives two folders below it.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders down").to_owned()
}

/// Runs a command in the repository's root and fails with its line.
fn run(program: &str, args: &[&str]) -> Outcome {
    run_with(program, args, &[])
}

fn run_with(program: &str, args: &[&str], env: &[(&str, &str)]) -> Outcome {
    let line = format!("{program} {}", args.join(" "));
    eprintln!("$ {line}");
    let mut command = Command::new(program);
    command.args(args).current_dir(root()).envs(env.iter().copied());
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`{line}` ended with {status}")),
        Err(e) => Err(format!("`{line}` did not start: {e}")),
    }
}

fn cargo(args: &[&str]) -> Outcome {
    run(env!("CARGO"), args)
}

fn dsc() -> PathBuf {
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    target.join("release").join("dsc")
}

fn demo() -> Outcome {
    need("cc", "gcc", "to link Rust programs")?;
    cargo(&["build", "--release", "--package", "dsc"])?;
    let (dsc, bundle) = (dsc(), dsc().with_file_name("tiny-model.dsc"));
    let (dsc, bundle) = (dsc.to_string_lossy(), bundle.to_string_lossy());
    run(&dsc, &["compile", "examples/tiny-model", "--target", "cpu", "-o", &bundle])?;
    let prompt = "\"My dear Watson,\" said Sherlock Holmes,";
    run(
        &dsc,
        &[
            "run",
            &bundle,
            "--weights",
            "examples/tiny-model",
            "--prompt",
            prompt,
            "--max-new-tokens",
            "120",
            "--temperature",
            "0.7",
            "--top-p",
            "0.95",
            "--seed",
            "1",
        ],
    )
}

/// What the whole suite is built with: all targets, where LLVM is there or can be installed.
fn features() -> &'static [&'static str] {
    match need_llvm() {
        Ok(()) => &["--features", "dsc/nvidia,dsc-tests/amd,dsc-cdna/llvm"],
        Err(reason) => {
            eprintln!("xtask: {reason}");
            eprintln!("xtask: going on WITHOUT LLVM: code generation for GPUs is not tested");
            &[]
        }
    }
}

fn test(extra: &[String]) -> Outcome {
    need("cc", "gcc", "to link Rust programs")?;
    let features = features();
    let ptxas = setup::ptxas();
    let env: Vec<(&str, &str)> = ptxas.iter().map(|path| ("DSC_PTXAS", path.as_str())).collect();
    let mut args = vec!["test", "--workspace"];
    args.extend(features);
    args.extend(extra.iter().map(String::as_str));
    run_with(env!("CARGO"), &args, &env)
}

fn ci() -> Outcome {
    cargo(&["fmt", "--all", "--check"])?;
    test(&[])?;
    let features = features();
    let clippy = ["clippy", "--workspace", "--all-targets"];
    cargo(&[&clippy[..], features, &["--", "-D", "warnings"]].concat())?;
    let doc = ["doc", "--workspace", "--no-deps"];
    run_with(env!("CARGO"), &[&doc[..], features].concat(), &[("RUSTDOCFLAGS", "-D warnings")])?;
    runtime_only_is_small()?;
    demo()?;
    same_bytes_twice()
}

/// A build without the compiler is what serving machines get: it must stay small.
fn runtime_only_is_small() -> Outcome {
    const LIMIT: u64 = 20_000_000;
    cargo(&["build", "--release", "--package", "dsc", "--no-default-features"])?;
    let path = dsc();
    let size = std::fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?.len();
    eprintln!("xtask: dsc without the compiler is {size} bytes");
    if size < LIMIT { Ok(()) } else { Err(format!("dsc without the compiler is {size} bytes, over {LIMIT}")) }
}

/// Compiles the real config twice and compares the artifacts.
fn same_bytes_twice() -> Outcome {
    let dsc = dsc();
    let mut artifacts = Vec::new();
    for name in ["first", "second"] {
        let path = dsc.with_file_name(format!("v3.2-{name}.dsc"));
        run(&dsc.to_string_lossy(), &["compile", "examples/deepseek-v3.2", "-o", &path.to_string_lossy()])?;
        artifacts.push(std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?);
    }
    if artifacts[0] == artifacts[1] { Ok(()) } else { Err("compiling twice gave different bytes".into()) }
}

fn bench(extra: &[String]) -> Outcome {
    cargo(&["build", "--release", "--package", "dsc"])?;
    let mut args = vec!["tests/bench/cpu.py"];
    let dsc = dsc();
    let dsc = dsc.to_string_lossy();
    args.push(&dsc);
    args.extend(extra.iter().map(String::as_str));
    run("python3", &args)
}

/// Builds libdsc and the compiler, compiles the kernel library (for sm_90a, unless the options say otherwise) and packs both.
fn wheel(extra: &[String]) -> Outcome {
    let target = extra.iter().any(|a| a.starts_with("--target"));
    let cpu = extra.iter().any(|a| a == "cpu" || a == "--target=cpu");
    let features: &[&str] = if cpu { &[] } else { features() };
    cargo(&[&["build", "--release", "--package", "dsc"], features].concat())?;
    cargo(&["build", "--release", "--package", "dsc-capi"])?;
    let out = root().join("target").join("wheel");
    std::fs::create_dir_all(&out).map_err(|e| format!("{}: {e}", out.display()))?;
    let kernels = out.join("dsa.dsc");
    let (dsc, lib, kernels) = (dsc(), dsc().with_file_name("libdsc_capi.so"), kernels.to_string_lossy().into_owned());
    let ptxas = setup::ptxas();
    let env: Vec<(&str, &str)> = ptxas.iter().map(|path| ("DSC_PTXAS", path.as_str())).collect();
    let mut args = vec!["compile", "--kernels", "dsa", "-o", &kernels];
    if !target {
        args.extend(["--target", "sm_90a"]);
    }
    args.extend(extra.iter().map(String::as_str));
    run_with(&dsc.to_string_lossy(), &args, &env)?;
    let (lib, out) = (lib.to_string_lossy(), out.to_string_lossy());
    let version = env!("CARGO_PKG_VERSION");
    let pack = ["python/make_wheel.py", "--lib", &lib, "--kernels", &kernels, "--version", version, "--out", &out];
    run("python3", &pack)
}

/// Runs every fuzz target on its seeds (`tests/fuzz/corpus`, and the file tests of its IR) and on what earlier runs found; an input
/// that breaks one is left in `target/fuzz`. Stable Rust: the counters that libFuzzer steers by come from an LLVM pass by name.
fn fuzz(seconds: Option<&String>) -> Outcome {
    let seconds = seconds.map_or("60", String::as_str);
    need("c++", "g++", "to build libFuzzer")?;
    let coverage = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Ccodegen-units=1";
    // The target, its seeds and words, and more seeds.
    let targets = [
        ("artifact", "artifact", None),
        ("checkpoint", "checkpoint", None),
        ("weights", "weights", None),
        ("config", "config", None),
        ("graph_text", "graph_text", Some("tests/filetests/graph")),
        ("sched_text", "sched_text", Some("tests/filetests/sched")),
        ("tile_text", "tile_text", Some("tests/filetests/tile")),
        ("tile_cpu", "tile_text", Some("tests/filetests/tile")),
    ];
    let (manifest, built) = ("tests/fuzz/Cargo.toml", "tests/fuzz/target");
    // Naming a target keeps the counters out of build scripts.
    let triple = "x86_64-unknown-linux-gnu";
    let build = ["build", "--release", "--manifest-path", manifest, "--target", triple, "--target-dir", built];
    run_with(env!("CARGO"), &build, &[("RUSTFLAGS", coverage)])?;
    for (target, seeds, more_seeds) in targets {
        let binary = root().join(built).join(triple).join("release").join(target);
        let work = root().join("target/fuzz").join(target);
        std::fs::create_dir_all(&work).map_err(|e| format!("{}: {e}", work.display()))?;
        let work = work.to_string_lossy().into_owned();
        let limit = format!("-max_total_time={seconds}");
        let (words, found) = (format!("-dict=tests/fuzz/{seeds}.dict"), format!("-artifact_prefix={work}-"));
        let corpus = format!("tests/fuzz/corpus/{seeds}");
        let mut args = vec![limit.as_str(), "-rss_limit_mb=4096", "-timeout=10", &words, &found, &work, &corpus];
        args.extend(more_seeds);
        run(&binary.to_string_lossy(), &args)?;
    }
    Ok(())
}
