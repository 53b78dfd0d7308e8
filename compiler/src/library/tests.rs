//! Every operation of a small library: compiled for the CPU, called through the runtime, compared with the graph interpreter.

use super::*;
use crate::plan::wide::Wide;
use dsc_ir::artifact::{ArgElem, Entry, EntryArg};
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::graph::interp::{Cache, Interp, StepValue};
use dsc_ir::graph::weights::{Data, TensorData};
use dsc_runtime::library::Tensor;
use dsc_runtime::{CallError, Library};
use half::bf16;
use std::sync::{Arc, OnceLock};

fn small() -> LibraryFacts {
    LibraryFacts {
        heads: 3,
        index_heads: 4,
        index_dim: 32,
        latent: 128,
        rope: 16,
        topk: 70,
        scale: 0.09,
        max_context: 512,
        ..v32()
    }
}

/// A small library, compiled once.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<(tempfile::TempDir, Library)> = OnceLock::new();
    &LIBRARY.get_or_init(|| opened(&*dsc_targets::target("cpu", false).expect("it is there"), |_| ())).1
}

/// The same as if for many blocks at once. A prefill of more than 64 tokens is cut.
fn in_pieces() -> &'static Library {
    static LIBRARY: OnceLock<(tempfile::TempDir, Library)> = OnceLock::new();
    let cut = |compiled: &mut Compiled| {
        let cut = compiled.header.entries.iter_mut().find(|e| e.op == "prefill" && e.max.get(Sym::T) > 64);
        let cut = cut.expect("a class of many tokens");
        assert_eq!((cut.pieces, cut.pieced, cut.launches.len()), (Some(PIECES), 2, 3));
        cut.pieces = Some(Pieces { tokens: 64, bytes: 1 });
    };
    &LIBRARY.get_or_init(|| opened(&Wide(dsc_targets::target("cpu", false).expect("it is there")), cut)).1
}

fn opened(target: &dyn Target, edit: impl FnOnce(&mut Compiled)) -> (tempfile::TempDir, Library) {
    let options =
        Options { target: "cpu".into(), codegen: TargetOptions::default(), facts: small(), schedules: Vec::new() };
    let mut compiled = compile_for(target, &options, &mut |_| ()).expect("it compiles");
    edit(&mut compiled);
    let sections: Vec<(String, Vec<u8>)> = compiled.header.sections.iter().map(|s| section(&compiled, s)).collect();
    let sections: Vec<(&str, &[u8])> = sections.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    let bytes = dsc_ir::artifact::write(&mut compiled.header, &sections);
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("small.dsc");
    std::fs::write(&path, bytes).expect("room");
    let library = Library::open(&path, 2, 0).expect("it opens");
    (dir, library)
}

fn section(compiled: &Compiled, s: &dsc_ir::artifact::Section) -> (String, Vec<u8>) {
    let bytes = dsc_ir::artifact::section(&compiled.bytes, &compiled.header, &s.name).expect("whole");
    (s.name.clone(), bytes.to_vec())
}

/// Numbers in 0..1, the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }

    fn signed(&mut self) -> f32 {
        2.0 * self.next() - 1.0
    }
}

/// An array of a call: bytes, of which the first is aligned to 16.
struct Array {
    memory: Vec<u8>,
    at: usize,
    bytes: usize,
    shape: Vec<i64>,
    dtype: Option<DType>,
}

impl Array {
    fn new(arg: &EntryArg, syms: &SymValues) -> Array {
        let shape: Vec<i64> = arg.shape.iter().map(|e| e.eval(syms) as i64).collect();
        let bytes = arg.bytes(syms).expect("a size") as usize;
        let dtype = match arg.elem {
            ArgElem::Plain(dtype) => Some(dtype),
            ArgElem::Pages(_) => None,
        };
        let memory = vec![0; bytes + 16];
        let at = memory.as_ptr().align_offset(16);
        Array { memory, at, bytes, shape, dtype }
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.at..][..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..][..self.bytes]
    }

    fn tensor(&self) -> Tensor<'_> {
        let data = self.bytes().as_ptr().cast_mut().cast();
        Tensor { data, dtype: self.dtype, shape: &self.shape, strides: None }
    }

    fn ints(&self) -> Vec<i32> {
        self.bytes().chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    fn set_ints(&mut self, ints: &[i32]) {
        let bytes: Vec<u8> = ints.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.bytes_mut().copy_from_slice(&bytes);
    }

    fn floats(&self) -> Vec<f32> {
        match self.dtype {
            Some(DType::Bf16) => {
                self.bytes().chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            Some(DType::E4m3) => self.bytes().iter().map(|&b| e4m3_to_f32(b)).collect(),
            _ => self.bytes().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    fn fill(&mut self, arg: &EntryArg, random: &mut Random) {
        let scale = |random: &mut Random| (random.next() * 0.01 + 0.005).to_le_bytes();
        match arg.elem {
            ArgElem::Plain(DType::F32) => {
                let positive = arg.name.ends_with("_scales");
                for b in self.bytes_mut().chunks_exact_mut(4) {
                    let x = if positive { scale(random) } else { random.signed().to_le_bytes() };
                    b.copy_from_slice(&x);
                }
            }
            ArgElem::Plain(DType::Bf16) => self
                .bytes_mut()
                .chunks_exact_mut(2)
                .for_each(|b| b.copy_from_slice(&bf16::from_f32(random.signed()).to_le_bytes())),
            ArgElem::Plain(_) => self.bytes_mut().iter_mut().for_each(|b| *b = f32_to_e4m3(random.signed() * 40.0)),
            ArgElem::Pages(format) => self.fill_pages(format, random),
        }
    }

    fn fill_pages(&mut self, format: StateFormat, random: &mut Random) {
        let tokens = PAGE_TOKENS as usize;
        for page in self.bytes_mut().chunks_exact_mut(format.page_bytes() as usize) {
            match format {
                StateFormat::IndexFp8 { dim } => {
                    let (codes, scales) = page.split_at_mut(tokens * dim as usize);
                    codes.iter_mut().for_each(|b| *b = f32_to_e4m3(random.signed() * 40.0));
                    for b in scales.chunks_exact_mut(4) {
                        b.copy_from_slice(&(random.next() * 0.01 + 0.005).to_le_bytes());
                    }
                }
                StateFormat::LatentFp8 { latent, rope } => {
                    for row in page.chunks_exact_mut(format.row_bytes() as usize) {
                        let (codes, rest) = row.split_at_mut(latent as usize);
                        codes.iter_mut().for_each(|b| *b = f32_to_e4m3(random.signed() * 100.0));
                        let (scales, keys) = rest.split_at_mut(latent.div_ceil(128) as usize * 4);
                        scales.chunks_exact_mut(4).for_each(|b| b.copy_from_slice(&0.0078125f32.to_le_bytes()));
                        for b in keys[..2 * rope as usize].chunks_exact_mut(2) {
                            b.copy_from_slice(&bf16::from_f32(random.signed()).to_le_bytes());
                        }
                    }
                }
                _ => unreachable!("the small library has fp8 caches"),
            }
        }
    }
}

/// The arguments of one call, by name.
struct Made {
    library: &'static Library,
    entry: &'static Entry,
    syms: SymValues,
    arrays: Vec<Array>,
}

impl Made {
    fn new(op: &str, syms: SymValues) -> Made {
        Made::of(library(), op, syms)
    }

    fn of(library: &'static Library, op: &str, syms: SymValues) -> Made {
        let entry = library.header().entries.iter().find(|e| e.op == op).expect("an operation");
        let mut random = Random(7 + op.len() as u64 * 1000 + u64::from(syms.get(Sym::T)));
        let make = |arg: &EntryArg| {
            let mut array = Array::new(arg, &syms);
            array.fill(arg, &mut random);
            array
        };
        Made { library, entry, syms, arrays: entry.args.iter().map(make).collect() }
    }

    fn place(&self, name: &str) -> usize {
        self.entry.args.iter().position(|a| a.name == name).expect("an argument")
    }

    fn get(&self, name: &str) -> &Array {
        &self.arrays[self.place(name)]
    }

    fn set(&mut self, name: &str, ints: &[i32]) {
        let place = self.place(name);
        self.arrays[place].set_ints(ints);
    }

    /// A table that gives each sequence pages of its own, last first.
    fn set_pages(&mut self) {
        let pages = (self.syms.get(Sym::S) * self.syms.get(Sym::P)) as i32;
        self.set("page_table", &(0..pages).rev().collect::<Vec<_>>());
    }

    fn call(&self) -> Result<(), CallError> {
        let tensors: Vec<Tensor> = self.arrays.iter().map(Array::tensor).collect();
        let bytes = self.library.workspace_bytes(&self.entry.op, &tensors)?;
        let mut workspace = vec![[0u128; 16]; bytes.div_ceil(256) as usize + 1];
        let at = workspace.as_mut_ptr().cast::<u8>();
        let at = at.wrapping_add(at.align_offset(256));
        // SAFETY: the arrays and the workspace are of the sizes that were asked for, and outlive the call.
        unsafe { self.library.launch(&self.entry.op, &tensors, (at.cast(), bytes), std::ptr::null_mut()) }
    }

    /// What the interpreter makes of the same arguments.
    fn expected(&self) -> Vec<Vec<f32>> {
        let all = operations(&small());
        let graph = &all[self.entry.op.as_str()];
        let mut values: Vec<StepValue<f32>> = Vec::new();
        let mut arrays = self.arrays.iter();
        for arg in &graph.args {
            let array = arrays.next().expect("an array");
            let shape: Vec<usize> = array.shape.iter().map(|&n| n as usize).collect();
            values.push(match &arg.ty {
                ValueType::State(format) => StepValue::State(Arc::new(Cache::from_bytes(*format, array.bytes()))),
                ValueType::Tensor(t) => StepValue::Tensor(Arc::new(match t.elem {
                    dsc_ir::graph::Elem::Quant(quant) => {
                        let scales = arrays.next().expect("scales").floats();
                        let codes = array.bytes().to_vec();
                        TensorData::new(shape, Data::Quant { codes, scales, quant })
                    }
                    dsc_ir::graph::Elem::Plain(DType::I32) => TensorData::int(shape, array.ints()),
                    dsc_ir::graph::Elem::Plain(_) => TensorData::real(shape, array.floats()),
                })),
            });
        }
        let interp = Interp::<f32>::new(graph, &|_| Err::<TensorData<f32>, _>("no weights")).expect("a valid graph");
        let made = interp.call(&values, self.syms).expect("results");
        made.iter()
            .map(|v| {
                let tensor = v.tensor().expect("a tensor");
                match &tensor.data {
                    Data::Int(ints) => ints.iter().map(|&n| n as f32).collect(),
                    _ => tensor.values().to_vec(),
                }
            })
            .collect()
    }

    /// Calls it and compares every result within `relative` of the larger of the element and its array's root mean square; `looked`
    /// says which elements of the first one count.
    fn check(&self, relative: f32, looked: impl Fn(usize) -> bool) {
        self.call().expect("it runs");
        let results = self.arrays.iter().zip(&self.entry.args).filter(|(_, a)| a.write);
        for (number, ((array, arg), expected)) in results.zip(self.expected()).enumerate() {
            let found = match array.dtype {
                Some(DType::I32) => array.ints().iter().map(|&n| n as f32).collect(),
                _ => array.floats(),
            };
            assert_eq!(found.len(), expected.len(), "{}", arg.name);
            let finite: Vec<f32> = expected.iter().copied().filter(|x| x.is_finite()).collect();
            let mean = (finite.iter().map(|x| x * x).sum::<f32>() / finite.len().max(1) as f32).sqrt();
            for (i, (x, y)) in found.iter().zip(&expected).enumerate().filter(|(i, _)| number > 0 || looked(*i)) {
                let close = x == y || (x - y).abs() <= relative * y.abs().max(mean);
                assert!(close, "{} of {} {:?}: element {i} is {x}, expected {y}", arg.name, self.entry.op, self.syms);
            }
        }
    }
}

fn sizes(t: u32, s: u32, p: u32, n: u32, c: u32) -> SymValues {
    SymValues([t, s, p, 1, n, c])
}

#[test]
fn paged_logits() {
    for (seqs, queries, ends) in [(1, 1, vec![200]), (3, 1, vec![0, 65, 256]), (2, 2, vec![63, 64, 255, 256])] {
        let mut made = Made::new("paged_logits", sizes(seqs * queries, seqs, 4, seqs * 4, 256));
        made.set_pages();
        made.set("ends", &ends);
        made.check(1e-5, |i| (i as i32 % 256) < ends[i / 256]);
    }
}

#[test]
fn ragged_logits() {
    let (starts, ends) = ([0, 0, 70, 130, 200], [1, 70, 71, 200, 200]);
    let mut made = Made::new("ragged_logits", sizes(5, 1, 1, 1, 200));
    made.set("starts", &starts);
    made.set("ends", &ends);
    made.check(1e-5, |i| (starts[i / 200]..ends[i / 200]).contains(&(i as i32 % 200)));
}

#[test]
fn topk_is_exact_and_takes_the_lowest_of_equals() {
    for (op, t) in [("topk_decode", 3), ("topk_prefill", 3), ("topk_prefill", 70)] {
        let mut made = Made::new(op, sizes(t, 1, 1, 1, 300));
        let ends: Vec<i32> = (0..t as i32).map(|i| [300, 50, 0, 171][i as usize % 4]).collect();
        made.set("ends", &ends);
        if op == "topk_prefill" {
            made.set("starts", &ends.iter().map(|&e| (e / 2 - 20).max(0)).collect::<Vec<_>>());
        }
        made.check(0.0, |_| true);
        // All equal.
        let place = made.place("logits");
        made.arrays[place].bytes_mut().fill(0x41);
        made.check(0.0, |_| true);
        if op == "topk_decode" {
            assert_eq!(made.get("selected").ints()[..70], (0..70).collect::<Vec<_>>());
        }
    }
}

/// Empty rows, selections that are outside, and full ones.
fn selection(rows: i32, bound: i32) -> Vec<i32> {
    let row = |r: i32| {
        (0..70).map(move |i| match r % 4 {
            0 => (i * 7 + r) % bound,
            1 => -1,
            2 if i % 3 == 0 => bound + i,
            2 => (i * 5) % bound,
            _ if i > 20 => -1,
            _ => i,
        })
    };
    (0..rows).flat_map(row).collect()
}

#[test]
fn attention_over_slots() {
    for t in [1, 6, 20] {
        let mut made = Made::new("mla_decode", sizes(t, 1, 1, 5, 1));
        made.set("selected", &selection(t as i32, 320));
        made.check(2e-2, |_| true);
        if t > 1 {
            assert!(made.get("lse").floats()[3..6].iter().all(|&x| x == f32::INFINITY));
            assert!(made.get("out").floats()[3 * 128..6 * 128].iter().all(|&x| x == 0.0));
        }
    }
    for t in [6, 70] {
        let mut made = Made::new("mla_prefill", sizes(t, 1, 1, 1, 190));
        made.set("selected", &selection(t as i32, 190));
        made.check(2e-2, |_| true);
        assert!(made.get("max_logits").floats()[3..6].iter().all(|&x| x == f32::NEG_INFINITY));
    }
}

/// What a chain gives is what its operations give one after the other: then rounding is the same, and so are selections.
#[test]
fn chains() {
    for (seqs, queries, ends) in [(1, 1, vec![200]), (5, 1, vec![256, 0, 65, 70, 254]), (2, 2, vec![63, 64, 255, 256])]
    {
        let mut made = Made::new("decode", sizes(seqs * queries, seqs, 4, seqs * 4, 256));
        made.set_pages();
        made.set("ends", &ends);
        made.check(2e-2, |_| true);
    }
    // In one piece, two and three, but for attention.
    for (library, t) in [(library(), 5), (library(), 70), (in_pieces(), 5), (in_pieces(), 70), (in_pieces(), 150)] {
        let mut made = Made::of(library, "prefill", sizes(t, 1, 1, 1, 200));
        let ends: Vec<i32> = (0..t as i32).map(|i| 200 - (i * 29) % 190).collect();
        made.set("ends", &ends);
        made.set("starts", &ends.iter().map(|&e| (e - 100).max(0)).collect::<Vec<_>>());
        made.check(2e-2, |_| true);
    }
}

#[test]
fn wrong_calls_are_refused() {
    let refused = |edit: &dyn Fn(&mut Made), wanted: &str| {
        let mut made = Made::new("paged_logits", sizes(2, 2, 4, 8, 256));
        made.set_pages();
        made.set("ends", &[1, 1]);
        edit(&mut made);
        let error = made.call().unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    };
    refused(&|m| m.arrays[0].dtype = None, "argument q holds bytes, wants e4m3");
    refused(&|m| m.arrays[0].shape = vec![2, 4], "argument q has 2 dims");
    refused(&|m| m.arrays[0].shape[1] = 5, "q is [2, 5, 32], wants [T, 4, 32]");
    refused(&|m| m.arrays[3].shape[0] = 1, "ends is [1], wants [T] where T = 2");
    refused(&|m| m.arrays[4].shape = vec![4, 4], "T is 2, wants 2*S where T = 2, S = 4");
    refused(&|m| m.arrays[4].shape = vec![2, 40], "40 P are more than 8");
    refused(&|m| m.arrays.truncate(3), "3 arguments, and wants: q, weights, keys, ends, page_table, logits");
    let made = Made::new("topk_decode", sizes(1, 1, 1, 1, 64));
    let mut tensors: Vec<Tensor> = made.arrays.iter().map(Array::tensor).collect();
    let launch = |tensors: &[Tensor], op: &str| {
        // SAFETY: what is wrong is found before anything is read.
        unsafe { library().launch(op, tensors, (std::ptr::null_mut(), 0), std::ptr::null_mut()) }.unwrap_err()
    };
    assert!(launch(&tensors, "sort").to_string().contains("no operation sort; it has decode, mla_decode"));
    tensors[0].strides = Some(&[128, 2]);
    assert!(launch(&tensors, "topk_decode").to_string().contains("strides [128, 2]"));
    tensors[0].strides = None;
    tensors[0].data = tensors[0].data.wrapping_byte_add(4);
    assert!(launch(&tensors, "topk_decode").to_string().contains("16 bytes do not divide"));
    tensors[0].data = std::ptr::null_mut();
    assert!(launch(&tensors, "topk_decode").to_string().contains("logits has no address"));
}

#[test]
fn workspace_grows_with_the_call() {
    let bytes = |t: u32, c: u32| {
        let made = Made::new("decode", sizes(t, t, c / 64, t * 8, c));
        let tensors: Vec<Tensor> = made.arrays.iter().map(Array::tensor).collect();
        library().workspace_bytes("decode", &tensors).expect("a size")
    };
    assert!(bytes(1, 64) <= bytes(4, 512));
    assert_eq!(bytes(4, 512), bytes(4, 512));
}

#[test]
fn what_cannot_be_compiled_is_refused_and_a_bf16_cache_is_not() {
    let refused = |edit: &dyn Fn(&mut LibraryFacts), wanted: &str| {
        let mut facts = small();
        edit(&mut facts);
        let error = check(&facts).unwrap_err();
        assert!(error.contains(wanted), "{error}");
    };
    refused(&|f| f.heads = 0, "heads of 0");
    refused(&|f| f.index_dim = 40, "multiples of 16");
    refused(&|f| f.latent = 144, "do not divide 144");
    refused(&|f| f.queries = vec![9], "query tokens");
    refused(&|f| f.scale = f32::NAN, "scale of NaN");
    let facts = LibraryFacts { fp8_cache: false, queries: vec![1], ..small() };
    let options = Options { target: "cpu".into(), codegen: TargetOptions::default(), facts, schedules: Vec::new() };
    let compiled = compile(&options, &mut |_| ()).expect("it compiles");
    let entry = compiled.header.entries.iter().find(|e| e.op == "mla_decode").expect("an entry point");
    assert_eq!(entry.args[1].shape, [Extent::from(Sym::N), (64 * 2 * (128 + 16)).into()]);
}
