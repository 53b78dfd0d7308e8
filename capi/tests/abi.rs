//! The C interface as its users have it: the header is that of the code, the example in C builds and runs, and so does the Python
//! module. Libraries are for the CPU; without `cc` or `python3` a test says that it was left out.

use dsc_compiler::library::{self, Options, v32};
use dsc_targets::TargetOptions;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a folder above").to_owned()
}

/// Puts the library, which Cargo builds before these tests, in a folder under the name that it is shipped with.
fn built(dir: &Path) -> PathBuf {
    let deps = std::env::current_exe().expect("a path").parent().expect("a folder").to_owned();
    let above = deps.parent().expect("a folder above").to_owned();
    let places = [deps, above].map(|dir| dir.join("libdsc_capi.so"));
    let from = places.iter().find(|path| path.exists()).expect("libdsc_capi.so beside the tests");
    let to = dir.join("libdsc.so");
    std::fs::copy(from, &to).expect("room");
    to
}

/// Writes a small library for the CPU.
fn small_library(dir: &Path) -> PathBuf {
    let facts = dsc_ir::artifact::LibraryFacts {
        heads: 2,
        index_heads: 2,
        index_dim: 32,
        latent: 128,
        rope: 16,
        topk: 8,
        max_context: 256,
        queries: vec![1],
        ..v32()
    };
    let options = Options { target: "cpu".into(), codegen: TargetOptions::default(), facts, schedules: Vec::new() };
    let compiled = library::compile(&options, &mut |_| ()).expect("it compiles");
    let path = dir.join("dsa.dsc");
    std::fs::write(&path, compiled.bytes).expect("room");
    path
}

fn runs(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("LEFT OUT: there is no {program}");
    }
    found
}

fn text(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn the_header_is_current() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(here.join("cbindgen.toml")).expect("a config");
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_src(here.join("src/lib.rs"))
        .with_config(config)
        .generate()
        .expect("a header")
        .write(&mut made);
    let path = here.join("include/dsc.h");
    let made = String::from_utf8(made).expect("text");
    if std::env::var_os("DSC_BLESS").is_some() {
        std::fs::write(&path, &made).expect("room");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == made, "capi/include/dsc.h is not what cbindgen makes: run this test with DSC_BLESS=1");
}

#[test]
fn the_example_in_c_runs() {
    if !runs("cc") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let program = dir.path().join("topk");
    built(dir.path());
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-but-set-variable", "-I"])
        .arg(root().join("capi/include"))
        .arg(root().join("examples/c/topk.c"))
        .arg("-L")
        .arg(dir.path())
        .args(["-ldsc", "-o"])
        .arg(&program);
    text(&cc.output().expect("cc starts"));
    let mut run = Command::new(program);
    run.arg(small_library(dir.path())).arg("8").env("LD_LIBRARY_PATH", dir.path());
    let said = text(&run.output().expect("it starts"));
    // Row r holds (37 i + 11 r) mod 100 at column i; the last row sees five columns.
    let largest = |r: i32| {
        let mut all: Vec<i32> = (0..100).collect();
        all.sort_by_key(|i| -((i * 37 + r * 11) % 100));
        all.truncate(8);
        all.sort_unstable();
        all.iter().map(|i| format!(" {i}")).collect::<String>()
    };
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], [&*largest(0), &*largest(1), " 0 1 2 3 4 -1 -1 -1"]);
    assert_eq!(lines[3], "5: argument ends has no address");
}

#[test]
fn the_python_module_runs_without_torch() {
    if !runs("python3") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Command::new("python3");
    run.arg(root().join("python/test_module.py"))
        .arg(small_library(dir.path()))
        .env("DSC_LIBRARY", built(dir.path()))
        .env("PYTHONPATH", root().join("python"))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let said = text(&run.output().expect("it starts"));
    assert!(said.ends_with("all right\n"), "{said}");
}

#[test]
fn a_model_is_no_library() {
    let opened = dsc_runtime::Library::open(&root().join("examples/tiny-model/config.json"), 1, 0);
    assert!(opened.is_err_and(|e| e.to_string().contains("not a dsc artifact")));
}
