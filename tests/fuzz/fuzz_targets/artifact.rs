//! `.dsc` files: nothing panics, every damage is found, and what the check lets through stays inside its buffers.
//!
//! An input that starts with the magic bytes is a file, read as it is and with the hash of its header put right. Any other input is
//! the JSON of a header: it is read behind a valid prefix, and as a file that `write` makes of it.
#![no_main]

use dsc_ir::artifact::{self, Arg, FORMAT_VERSION, Header, MAGIC, Step, WeightEntry};
use dsc_ir::{Sym, SymValues};
use libfuzzer_sys::fuzz_target;

/// Largest section that is filled in.
const MAX_SECTION_BYTES: u64 = 1 << 16;

fuzz_target!(|data: &[u8]| {
    if data.starts_with(&MAGIC) {
        read(data);
        read(&with_header_hash(data));
    } else {
        read(&framed(data));
        if let Ok(header) = serde_json::from_slice(data) {
            written(header);
        }
    }
});

/// The same file with the hash that its header should have.
fn with_header_hash(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    if let Some((prefix, rest)) = file.split_at_mut_checked(56) {
        let length = u64::from_le_bytes(prefix[16..24].try_into().expect("8 bytes"));
        let json = &rest[..rest.len().min(length as usize)];
        prefix[24..].copy_from_slice(blake3::hash(json).as_bytes());
    }
    file
}

/// A file of a header only.
fn framed(json: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend(FORMAT_VERSION.to_le_bytes());
    file.extend([0; 4]);
    file.extend((json.len() as u64).to_le_bytes());
    file.extend(blake3::hash(json).as_bytes());
    file.extend(json);
    file
}

fn read(file: &[u8]) {
    match artifact::read(file) {
        Ok(header) => {
            for section in &header.sections {
                let _ = artifact::section(file, &header, &section.name).map(<[u8]>::len);
            }
            accepted(&header);
        }
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

/// What `write` makes of a header is read again exactly if its check passes, and no byte of it can change unnoticed.
fn written(mut header: Header) {
    if header.sections.iter().any(|s| s.bytes > MAX_SECTION_BYTES) {
        return;
    }
    let named: Vec<(String, Vec<u8>)> =
        header.sections.iter().map(|s| (s.name.clone(), (0..s.bytes).map(|i| i as u8 ^ 0xa5).collect())).collect();
    let sections: Vec<(&str, &[u8])> = named.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let mut file = artifact::write(&mut header, &sections);
    let valid = header.check().is_ok();
    match artifact::read(&file) {
        Ok(again) => assert!(valid && again == header),
        Err(e) => assert!(!valid, "{e}"),
    }
    if !valid {
        return;
    }
    accepted(&header);
    for (name, bytes) in &sections {
        assert_eq!(artifact::section(&file, &header, name), Ok(*bytes));
    }
    // One byte, chosen by the header, so that the choice is the same for the same input.
    let hash = blake3::hash(&file);
    let at = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("8 bytes")) % file.len() as u64;
    file[at as usize] ^= 1 << (hash.as_bytes()[8] % 8);
    let intact = |header: Header| header.sections.iter().all(|s| artifact::section(&file, &header, &s.name).is_ok());
    assert!(!artifact::read(&file).is_ok_and(intact), "byte {at} of {} changed unnoticed", file.len());
}

/// What a device relies on: for symbols within a step's limits, every argument exists and every view stays inside the buffer
/// that it has at the limits.
fn accepted(header: &Header) {
    for weight in &header.weights {
        weight_sizes(weight);
    }
    for step in &header.steps {
        loops(header, step);
        for syms in [step.max, half(step.max), SymValues([1; 6]), SymValues::default()] {
            // What loops are bound to, `loops` looks at.
            for (_, launch) in step.launches.iter().enumerate().filter(|(i, _)| step.loop_of(*i).is_none()) {
                let kernel = &header.kernels[launch.kernel as usize];
                assert!(kernel.blocks(&syms).is_some() && kernel.params.len() == launch.args.len());
                for (param, &arg) in kernel.params.iter().zip(&launch.args) {
                    let (bytes, at) = header.buffer(arg, step.arena_bytes, &step.max).expect("a buffer");
                    assert!(!param.write || !matches!(arg, Arg::Weight(..) | Arg::Input(_)));
                    param.check_binding(at, bytes, &syms).expect("a smaller step stays inside");
                }
            }
        }
    }
}

/// Every piece of a step's loops, of the largest step and of a smaller one, is inside the arena.
fn loops(header: &Header, step: &Step) {
    for l in &step.loops {
        for max in [step.max, half(step.max)] {
            for size in l.sizes(&max) {
                let tokens = size.get(Sym::T);
                let last = max.get(Sym::T).saturating_sub(1) / tokens * tokens;
                for first in [0, last] {
                    let syms = size.with(Sym::T, tokens.min(max.get(Sym::T) - first));
                    for launch in &step.launches[l.range()] {
                        let kernel = &header.kernels[launch.kernel as usize];
                        for (param, &arg) in kernel.params.iter().zip(&launch.args) {
                            let (bytes, at) = header.buffer(arg, step.arena_bytes, &step.max).expect("a buffer");
                            let at = at + l.pitch(param, arg).expect("rows of tokens") * u64::from(first);
                            param.check_binding(at, bytes, &syms).expect("a piece stays inside");
                        }
                    }
                }
            }
        }
    }
}

fn half(max: SymValues) -> SymValues {
    Sym::ALL.into_iter().fold(max, |syms, sym| syms.with(sym, max.get(sym) / 2))
}

fn weight_sizes(weight: &WeightEntry) {
    for rows in [0, 1, i32::MAX as u32] {
        let (bytes, codes) = (weight.bytes(rows).expect("a size"), weight.code_bytes(rows).expect("a size"));
        assert!(codes <= bytes);
        assert_eq!(weight.bound_shape(rows).len(), weight.shape.len());
    }
    assert!(weight.scale_range().is_none_or(|r| r.start <= r.end && Some(r.end) == weight.bytes(0)));
}
