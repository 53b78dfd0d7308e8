//! A hand-made artifact and checkpoint for the tests of this crate.

use dsc_ir::artifact::{
    self, Arg, Header, KernelEntry, Launch, ModelFacts, Numerics, ParamEntry, Step, TensorPart, WeightEntry,
    WeightSource,
};
use dsc_ir::extent::GridDim;
use dsc_ir::graph::{Elem, State, StateFormat};
use dsc_ir::tile::ViewType;
use dsc_ir::{DType, Sym, SymValues};
use std::path::{Path, PathBuf};

/// x86-64: adds 1 to the 32-bit element of each block.
pub(crate) const COUNT_KERNEL: &[u8] = &[
    0x48, 0x8b, 0x07, // mov rax, [rdi]
    0x4c, 0x39, 0xc1, // loop: cmp rcx, r8
    0x73, 0x09, // jae end
    0x83, 0x04, 0x88, 0x01, // add dword [rax + 4 rcx], 1
    0x48, 0xff, 0xc1, // inc rcx
    0xeb, 0xf2, // jmp loop
    0xc3, // end: ret
];

/// A header with one kernel, one launch of it, one weight and one cache.
pub(crate) fn header() -> Header {
    let rows = GridDim { extent: Sym::T.into(), tile: 1 };
    let view = ViewType::dense(DType::I32, &[Sym::T.into()]);
    Header {
        compiler: "0.0.0-test".into(),
        target: "cpu".into(),
        features: Vec::new(),
        numerics: Numerics::Exact,
        model: ModelFacts {
            model_type: "toy".into(),
            config_hash: String::new(),
            vocab: 8,
            layers: 1,
            index_topk: 4,
            bos: Some(0),
            eos: vec![1],
            max_context: 64,
            ranks: 1,
            rank: 0,
        },
        weights: vec![WeightEntry {
            name: "w".into(),
            shape: vec![4],
            elem: Elem::Plain(DType::F32),
            source: WeightSource::Tensors(vec![part("w", [1, 4])]),
        }],
        states: vec![State { name: "keys".into(), format: StateFormat::Index { dim: 4, dtype: DType::F32 } }],
        kernels: vec![KernelEntry {
            name: "count".into(),
            what: "adds one".into(),
            entry: 0,
            code_bytes: COUNT_KERNEL.len() as u64,
            scratch_bytes: 0,
            grid: vec![rows],
            params: vec![ParamEntry { name: "out".into(), view, write: true }],
            schedule: Default::default(),
            work: Default::default(),
            gpu: None,
        }],
        library: None,
        entries: Vec::new(),
        steps: vec![Step {
            name: "all".into(),
            max: SymValues([16, 4, 4, 16, 16, 64]),
            arena_bytes: 256,
            launches: vec![Launch { kernel: 0, args: vec![Arg::Arena(64)], node: "count".into() }],
            loops: Vec::new(),
            collectives: Vec::new(),
            sampling: 1,
            taps: Vec::new(),
        }],
        sections: Vec::new(),
    }
}

/// A whole tensor without scales.
pub(crate) fn part(tensor: &str, shape: [u32; 2]) -> TensorPart {
    TensorPart {
        tensor: tensor.into(),
        scale: None,
        scale_block: [128, 128],
        shape,
        rows: [0, shape[0]],
        cols: [0, shape[1]],
    }
}

/// Writes `toy.dsc`.
pub(crate) fn write_artifact(dir: &Path, header: &mut Header, code: &[u8]) -> PathBuf {
    let path = dir.join("toy.dsc");
    std::fs::write(&path, artifact::write(header, &[("code", code)])).unwrap();
    path
}

/// Writes the checkpoint of [`header`].
pub(crate) fn write_checkpoint(dir: &Path) {
    write_tensors(
        &dir.join("model.safetensors"),
        &[("w", "F32", &[4], [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|x| x.to_le_bytes()).collect())],
    );
}

/// Name, dtype, shape and bytes of a tensor.
pub(crate) type RawTensor<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>);

/// Writes a safetensors file.
pub(crate) fn write_tensors(path: &Path, tensors: &[RawTensor<'_>]) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend(bytes);
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.to_string(), entry);
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    std::fs::write(path, file).unwrap();
}
