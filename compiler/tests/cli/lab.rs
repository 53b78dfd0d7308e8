//! Runs `dsc`, and makes artifacts and checkpoints to run it on.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use tempfile::TempDir;

/// A folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path).canonicalize().expect("it is in the repository")
}

/// A small checkpoint in bf16, without a tokenizer.
pub static TINY: LazyLock<PathBuf> = LazyLock::new(|| repository("tests/golden/v32-tiny"));
/// One with block-scaled fp8 weights, of another model.
pub static FP8: LazyLock<PathBuf> = LazyLock::new(|| repository("tests/golden/v32-heads-fp8"));
/// The trained one, with a tokenizer.
pub static TRAINED: LazyLock<PathBuf> = LazyLock::new(|| repository("examples/tiny-model"));

/// Tokens that [`BUNDLE`] serves at most.
pub const MAX_CONTEXT: u32 = 256;
/// `TINY`, compiled with exact numerics; its folder lives as long as the process.
pub static BUNDLE: LazyLock<PathBuf> = LazyLock::new(|| {
    static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder for artifacts"));
    let path = DIR.path().join("tiny.dsc");
    let max_context = MAX_CONTEXT.to_string();
    let args = ["--numerics", "exact", "--max-context", &max_context, "-o"];
    succeed(DIR.path(), &[&["compile", text(&TINY)], &args[..], &[text(&path)]].concat());
    path
});

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

/// `dsc` in a folder.
pub fn dsc(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsc"));
    command.current_dir(dir).args(args).stdin(Stdio::null()).env("RUST_BACKTRACE", "0");
    command
}

/// Runs it to its end.
pub fn run(dir: &Path, args: &[&str]) -> Output {
    dsc(dir, args).output().expect("dsc was built")
}

/// Runs it, and gives what it printed.
pub fn succeed(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "dsc {}: {}\n{stderr}", args.join(" "), output.status);
    String::from_utf8(output.stdout).expect("output is UTF-8")
}

/// Runs it, and reads the JSON object that it printed.
pub fn succeed_json(dir: &Path, args: &[&str]) -> Value {
    let text = succeed(dir, args);
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// A safetensors file in pieces.
pub struct Tensors {
    /// Its header.
    pub header: Value,
    /// What follows it.
    pub data: Vec<u8>,
}

impl Tensors {
    pub fn read(path: &Path) -> Tensors {
        let file = fs::read(path).expect("a safetensors file");
        let (length, rest) = file.split_first_chunk::<8>().expect("a header's length");
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        Tensors { header: serde_json::from_slice(header).expect("a header"), data: data.to_vec() }
    }

    pub fn write(&self, path: &Path) {
        write_tensors(path, self.header.to_string().as_bytes(), &self.data);
    }

    /// The i32 values of a tensor.
    pub fn i32s(&self, name: &str) -> Vec<i32> {
        self.bytes(name).chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four"))).collect()
    }

    /// The f32 values of a tensor.
    pub fn f32s(&self, name: &str) -> Vec<f32> {
        self.bytes(name).chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect()
    }

    fn bytes(&self, name: &str) -> &[u8] {
        let at = |i: usize| self.header[name]["data_offsets"][i].as_u64().expect("an offset") as usize;
        &self.data[at(0)..at(1)]
    }

    pub fn shape(&self, name: &str) -> Vec<u64> {
        let shape = self.header[name]["shape"].as_array().expect("a shape");
        shape.iter().map(|n| n.as_u64().expect("a size")).collect()
    }

    /// Gives a tensor another name.
    pub fn rename(&mut self, from: &str, to: &str) {
        let header = self.header.as_object_mut().expect("an object");
        let entry = header.remove(from).expect("the tensor");
        header.insert(to.into(), entry);
    }
}

/// Writes a safetensors file whose header may be nonsense.
pub fn write_tensors(path: &Path, header: &[u8], data: &[u8]) {
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header, data].concat()).expect("a file of the test");
}
