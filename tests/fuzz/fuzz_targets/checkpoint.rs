//! Checkpoint folders: headers and indices may say anything; nothing panics, and every tensor's bytes can be read.
//!
//! The first byte says what the rest is: a `model.safetensors`; the header of one, with as much data as the second byte says; or
//! an index and the header of its one shard `s`, with a zero byte between them.
#![no_main]

use dsc_runtime::checkpoint::{Checkpoint, TensorView};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "s";

fuzz_target!(|data: &[u8]| {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| tempfile::tempdir().expect("a folder for temporary files")).path();
    match data {
        [b'f', file @ ..] => open(dir, &[(SINGLE, file)]),
        [b'h', length, header @ ..] => open(dir, &[(SINGLE, &framed(header, *length))]),
        [b'i', length, rest @ ..] => {
            let end = rest.iter().position(|&b| b == 0).unwrap_or(rest.len());
            let header = rest.get(end + 1..).unwrap_or_default();
            open(dir, &[(INDEX, &rest[..end]), (SHARD, &framed(header, *length))]);
        }
        _ => {}
    }
});

/// A safetensors file with that header and so many bytes of data.
fn framed(header: &[u8], data: u8) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(0..data);
    file
}

fn open(dir: &Path, files: &[(&str, &[u8])]) {
    for (name, bytes) in files {
        fs::write(dir.join(name), bytes).expect("the folder is ours");
    }
    match Checkpoint::open(dir) {
        Ok(checkpoint) => read(&checkpoint),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
    for (name, _) in files {
        fs::remove_file(dir.join(name)).expect("the folder is ours");
    }
}

fn read(checkpoint: &Checkpoint) {
    let mut bytes = 0;
    for name in checkpoint.names() {
        assert!(checkpoint.contains(name));
        match checkpoint.tensor(name) {
            Ok(tensor) => bytes += tensor_bytes(&tensor),
            Err(e) => assert!(e.to_string().contains("dsc reads"), "{e}"),
        }
        let mut other = name.to_string();
        other.push('?');
        let _ = checkpoint.tensor(&other).map_err(|e| e.to_string());
    }
    assert!(bytes <= checkpoint.total_bytes());
}

fn tensor_bytes(tensor: &TensorView) -> u64 {
    let elements: usize = tensor.shape.iter().product();
    assert_eq!(tensor.data.len(), elements * tensor.dtype.size());
    let sum: u64 = tensor.data.iter().map(|&b| u64::from(b)).sum();
    let rows = tensor.shape.first().copied().unwrap_or(0);
    for range in [0..rows, 0..1, rows / 2..rows, rows..rows + 1, rows + 1..rows, 0..usize::MAX] {
        if let Ok(part) = tensor.rows(range) {
            assert!(part.iter().map(|&b| u64::from(b)).sum::<u64>() <= sum);
        }
    }
    tensor.data.len() as u64
}
