//! An artifact's weights out of a checkpoint: whatever the one asks for and the other holds, what passes the checks is made without
//! leaving any buffer.
//!
//! An input is the bytes of data, the JSON of the weights, a zero byte, and the header of the checkpoint.
#![no_main]

use dsc_ir::SymValues;
use dsc_ir::artifact::{Header, ModelFacts, Numerics, Step, WeightEntry};
use dsc_runtime::Weights;
use dsc_runtime::checkpoint::Checkpoint;
use dsc_runtime::weights::check_exact;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::{Arc, OnceLock};

const CONTEXT_ROWS: u32 = 5;
/// Largest weights that are made, in bytes.
const MAX_BYTES: u64 = 1 << 18;

fuzz_target!(|data: &[u8]| {
    let [length, rest @ ..] = data else { return };
    let Some(end) = rest.iter().position(|&b| b == 0) else { return };
    let Ok(weights) = serde_json::from_slice::<Vec<WeightEntry>>(&rest[..end]) else { return };
    let header = header(weights);
    let bytes = |w: &WeightEntry| w.bytes(CONTEXT_ROWS).unwrap_or(u64::MAX);
    if header.check().is_err() || header.weights.iter().map(bytes).any(|n| n > MAX_BYTES) {
        return;
    }
    if let Some(checkpoint) = checkpoint(&rest[end + 1..], *length) {
        load(&header.weights, &checkpoint);
    }
});

fn header(weights: Vec<WeightEntry>) -> Header {
    let model = ModelFacts {
        model_type: String::new(),
        config_hash: String::new(),
        vocab: 1,
        layers: 0,
        index_topk: 1,
        bos: None,
        eos: Vec::new(),
        max_context: 1,
        ranks: 1,
        rank: 0,
    };
    let max = SymValues([1; 6]);
    let step = Step {
        name: "s".into(),
        max,
        arena_bytes: 0,
        launches: Vec::new(),
        loops: Vec::new(),
        collectives: Vec::new(),
        sampling: 0,
        taps: Vec::new(),
    };
    Header {
        compiler: String::new(),
        target: String::new(),
        features: Vec::new(),
        numerics: Numerics::Exact,
        model,
        weights,
        states: Vec::new(),
        kernels: Vec::new(),
        library: None,
        entries: Vec::new(),
        steps: vec![step],
        sections: Vec::new(),
    }
}

fn checkpoint(header: &[u8], data: u8) -> Option<Arc<Checkpoint>> {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| tempfile::tempdir().expect("a folder for temporary files")).path();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend((0..data).map(|i| i.wrapping_mul(37)));
    let path = dir.join("model.safetensors");
    // A new file each time: the one before may still be mapped.
    let _ = fs::remove_file(&path);
    fs::write(&path, file).expect("the folder is ours");
    Checkpoint::open_file(&path).ok().map(Arc::new)
}

fn load(entries: &[WeightEntry], checkpoint: &Arc<Checkpoint>) {
    let _ = check_exact(entries, checkpoint).map_err(|e| e.to_string());
    match Weights::load(entries, checkpoint, CONTEXT_ROWS, 1, &|_, _| ()) {
        Ok(weights) => {
            assert_eq!(weights.len(), entries.len());
            for (i, entry) in entries.iter().enumerate() {
                assert_eq!(Some(weights.bytes(i).len() as u64), entry.bytes(CONTEXT_ROWS), "{}", entry.name);
            }
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}
