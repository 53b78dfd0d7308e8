use super::check::MAX_PROBLEMS;
use super::*;
use crate::extent::{Extent, Sym, SymValues};
use crate::graph::{PAGE_TOKENS, Quant, StateFormat, StepInput};
use crate::tile::Stride;

fn part(tensor: &str, shape: [u32; 2]) -> TensorPart {
    let (scale, scale_block) = (Some(format!("{tensor}_scale_inv")), [128, 128]);
    TensorPart { tensor: tensor.into(), scale, scale_block, shape, rows: [0, shape[0]], cols: [0, shape[1]] }
}

fn param(name: &str, write: bool, dtype: DType, shape: &[Extent]) -> ParamEntry {
    ParamEntry { name: name.into(), view: ViewType::dense(dtype, shape), write }
}

fn sample() -> Header {
    let quant = Elem::Quant(Quant { block: [128, 128], pow2: true });
    let keys = Extent { factor: PAGE_TOKENS, sym: Some(Sym::N) };
    Header {
        compiler: "0.1.0".into(),
        target: "cpu".into(),
        features: vec!["avx2".into()],
        numerics: Numerics::Deployed,
        model: ModelFacts {
            model_type: "deepseek_v32".into(),
            config_hash: "00".into(),
            vocab: 512,
            layers: 1,
            index_topk: 16,
            bos: Some(0),
            eos: vec![1],
            max_context: 1000,
            ranks: 1,
            rank: 0,
        },
        weights: vec![
            WeightEntry {
                name: "q".into(),
                shape: vec![320, 192],
                elem: quant,
                source: WeightSource::Tensors(vec![part("a", [256, 192]), part("b", [64, 192])]),
            },
            WeightEntry {
                name: "rope".into(),
                shape: vec![0, 4],
                elem: Elem::Plain(DType::F32),
                source: WeightSource::RopeTable { frequencies: vec![1.0, 0.1] },
            },
        ],
        states: vec![State { name: "keys".into(), format: StateFormat::Index { dim: 8, dtype: DType::Bf16 } }],
        kernels: vec![KernelEntry {
            name: "k".into(),
            what: "all".into(),
            entry: 0,
            code_bytes: 100,
            scratch_bytes: 64,
            grid: vec![GridDim { extent: Sym::T.into(), tile: 4 }],
            params: vec![
                param("x", false, DType::F32, &[Sym::T.into(), 8.into()]),
                param("y", true, DType::Bf16, &[Sym::T.into(), 8.into()]),
                param("w", false, DType::E4m3, &[320.into(), 192.into()]),
                param("scales", false, DType::F32, &[3.into(), 2.into()]),
                param("table", false, DType::F32, &[Sym::C.into(), 4.into()]),
                param("keys", true, DType::Bf16, &[keys, 8.into()]),
                param("pages", false, DType::I32, &[Sym::S.into(), Sym::P.into()]),
                param("logits", true, DType::F32, &[Sym::L.into(), 512.into()]),
            ],
            schedule: Default::default(),
            work: Default::default(),
            gpu: None,
        }],
        library: None,
        entries: Vec::new(),
        steps: vec![Step {
            name: "all".into(),
            max: SymValues([10, 2, 16, 10, 1 << 20, 1000]),
            arena_bytes: 640,
            launches: vec![Launch {
                kernel: 0,
                args: vec![
                    Arg::Arena(0),
                    Arg::Arena(320),
                    Arg::Weight(0, 0),
                    Arg::Weight(0, 320 * 192),
                    Arg::Weight(1, 0),
                    Arg::State(0),
                    Arg::Input(StepInput::PageTable),
                    Arg::Logits,
                ],
                node: "layers.0".into(),
            }],
            loops: Vec::new(),
            collectives: Vec::new(),
            sampling: 1,
            taps: vec![Tap { name: "hidden.0".into(), after: 1, at: 0, columns: 8, dtype: DType::F32 }],
        }],
        sections: Vec::new(),
    }
}

fn of_pieces(first: u32, launches: u32, tokens: u32) -> Loop {
    Loop { first, launches, matrix: 0, pieces: Pieces { tokens, bytes: 1 } }
}

fn file() -> (Header, Vec<u8>) {
    let mut header = sample();
    let bytes = write(&mut header, &[("code", &[0xc3; 5000]), ("tile", b"kernel k")]);
    (header, bytes)
}

#[test]
fn written_is_read_and_the_same_again() {
    let (header, bytes) = file();
    assert_eq!(read(&bytes).unwrap(), header);
    assert_eq!(file().1, bytes);
    assert_eq!(section(&bytes, &header, "tile").unwrap(), b"kernel k");
    assert_eq!(section(&bytes, &header, "code").unwrap(), [0xc3; 5000]);
    assert_eq!(section(&bytes, &header, "ptx"), Err(ArtifactError::NoSection("ptx".into())));
    assert!(header.sections.iter().all(|s| s.offset.is_multiple_of(ALIGN)));
}

#[test]
fn every_flipped_byte_is_found() {
    let (_, bytes) = file();
    for i in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[i] ^= 1 << (i % 8);
        let result =
            read(&damaged).and_then(|h| section(&damaged, &h, "code").and(section(&damaged, &h, "tile")).map(|_| ()));
        assert!(result.is_err(), "byte {i}");
    }
}

#[test]
fn every_cut_is_found() {
    let (_, bytes) = file();
    for end in (0..bytes.len()).step_by(64).chain([1, 7, 8, 55, 56, 57, bytes.len() - 1]) {
        let error = read(&bytes[..end]).unwrap_err();
        let fits = if end == 0 {
            ArtifactError::NotAnArtifact == error
        } else {
            matches!(error, ArtifactError::Truncated { .. })
        };
        assert!(fits, "{end}: {error}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(matches!(read(&longer), Err(ArtifactError::HeaderDamaged(_))));
}

#[test]
fn other_versions_say_who_wrote_them() {
    let (_, mut bytes) = file();
    bytes[8] = FORMAT_VERSION as u8 + 1;
    let error = read(&bytes).unwrap_err().to_string();
    let says = format!("version {}, written by 0.1.0", FORMAT_VERSION + 1);
    assert!(error.contains(&says) && error.contains("update dsc"), "{error}");
    bytes[8] = 0;
    assert!(read(&bytes).unwrap_err().to_string().ends_with("compile the model again"));
    bytes[60] ^= 1;
    assert!(matches!(read(&bytes), Err(ArtifactError::Version { compiler: None, .. })));
    assert_eq!(read(b"GGUF....................................................."), Err(ArtifactError::NotAnArtifact));
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(ArtifactError::HeaderDamaged(_))));
}

#[test]
fn a_header_of_another_shape_is_invalid() {
    for json in [&b"{}"[..], b"[1]", b"\xff\xfe", b"{\"compiler\": 3}", b""] {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT_VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend((json.len() as u64).to_le_bytes());
        bytes.extend(blake3::hash(json).as_bytes());
        bytes.extend(json);
        assert!(matches!(read(&bytes), Err(ArtifactError::Invalid(_))));
    }
}

/// What `check` says of the sample after an edit.
fn edited(edit: impl FnOnce(&mut Header)) -> String {
    let (mut header, _) = file();
    edit(&mut header);
    header.check().map_or_else(|problems| problems.join("\n"), |()| "fine".into())
}

#[test]
fn what_leaves_a_table_or_a_buffer_is_named() {
    assert_eq!(edited(|_| ()), "fine");
    type Edit = Box<dyn FnOnce(&mut Header)>;
    let cases: Vec<(&str, Edit)> = vec![
        ("kernel 1 of 1", Box::new(|h| h.steps[0].launches[0].kernel = 1)),
        ("7 arguments for the 8 parameters", Box::new(|h| h.steps[0].launches[0].args.truncate(7))),
        ("parameter x: Arena", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Weight(9, 0))),
        ("parameter x: view", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(324))),
        ("not aligned to its f32", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(2))),
        ("parameter y: view", Box::new(|h| h.steps[0].launches[0].args[1] = Arg::Arena(482))),
        ("parameter x: view", Box::new(|h| h.steps[0].launches[0].args[0] = Arg::Arena(u64::MAX - 3))),
        ("parameter y writes Weight(0, 0)", Box::new(|h| h.steps[0].launches[0].args[1] = Arg::Weight(0, 0))),
        ("parameter w: view", Box::new(|h| h.steps[0].launches[0].args[2] = Arg::Weight(0, 512))),
        ("parameter scales: view", Box::new(|h| h.steps[0].launches[0].args[3] = Arg::Weight(0, 320 * 192 + 4))),
        ("State(1) does not exist", Box::new(|h| h.steps[0].launches[0].args[5] = Arg::State(1))),
        ("parameter keys: view", Box::new(|h| h.kernels[0].params[5].view.offset = 2)),
        ("parameter keys: view", Box::new(|h| h.kernels[0].params[5].view.strides[0].bytes = -16)),
        ("parameter pages: view", Box::new(|h| h.kernels[0].params[6].view.shape[0] = 3.into())),
        ("parameter logits: view", Box::new(|h| h.model.vocab = 511)),
        (
            "overflows",
            Box::new(|h| {
                h.kernels[0].params[0].view.shape[0] = Extent { factor: u32::MAX, sym: Some(Sym::N) };
                h.kernels[0].params[0].view.strides[0] = Stride { bytes: 1 << 62, sym: Some(Sym::N) };
            }),
        ),
        (
            "parameter x: view",
            Box::new(|h| h.kernels[0].params[0].view.shape[0] = Extent { factor: u32::MAX, sym: Some(Sym::N) }),
        ),
        ("2 dims with 1 strides", Box::new(|h| h.kernels[0].params[0].view.strides.truncate(1))),
        ("not inside the code section", Box::new(|h| h.kernels[0].entry = 4901)),
        ("not inside the code section", Box::new(|h| h.kernels[0].entry = u64::MAX)),
        ("not inside the code section", Box::new(|h| drop(h.sections.remove(0)))),
        ("scratch bytes are beyond reason", Box::new(|h| h.kernels[0].scratch_bytes = 1 << 40)),
        ("a tile of 0", Box::new(|h| h.kernels[0].grid[0].tile = 0)),
        (
            "the grid of k is beyond reason",
            Box::new(|h| {
                h.kernels[0].grid =
                    vec![GridDim { extent: Extent { factor: u32::MAX, sym: Some(Sym::N) }, tile: 1 }; 3];
            }),
        ),
        ("at most 4294967295 N", Box::new(|h| h.steps[0].max.0[4] = u32::MAX)),
        ("at most 0 T", Box::new(|h| h.steps[0].max.0[0] = 0)),
        ("an arena of", Box::new(|h| h.steps[0].arena_bytes = u64::MAX)),
        ("there is no step", Box::new(|h| h.steps.clear())),
        ("step all: the name occurs twice", Box::new(|h| h.steps.push(h.steps[0].clone()))),
        ("tap hidden.0: its type, launch", Box::new(|h| h.steps[0].taps[0].after = 2)),
        ("tap hidden.0: it leaves the arena", Box::new(|h| h.steps[0].taps[0].columns = 1 << 30)),
        ("tap hidden.0: it leaves the arena", Box::new(|h| h.steps[0].taps[0].at = u64::MAX - 3)),
        ("loop 0: no such launches", Box::new(|h| h.steps[0].loops = vec![of_pieces(0, 2, 64)])),
        ("loop 1: no such launches", Box::new(|h| h.steps[0].loops = vec![of_pieces(0, 1, 64); 2])),
        ("loop 0: pieces of tokens that are", Box::new(|h| h.steps[0].loops = vec![of_pieces(0, 1, 96)])),
        ("loop 0: its matrix is not inside", Box::new(|h| h.steps[0].loops = vec![of_pieces(0, 1, 64)])),
        (
            "loop 0: something is read before",
            Box::new(|h| {
                let launch = h.steps[0].launches[0].clone();
                h.steps[0].launches.push(launch);
                (h.steps[0].sampling, h.steps[0].loops) = (2, vec![of_pieces(0, 2, 64)]);
            }),
        ),
        ("eos 512 is outside", Box::new(|h| h.model.eos.push(512))),
        ("vocabulary of 0", Box::new(|h| h.model.vocab = 0)),
        ("state keys", Box::new(|h| h.states[0].format = StateFormat::Index { dim: u32::MAX, dtype: DType::F32 })),
        ("offset 1 is not aligned", Box::new(|h| h.sections[0].offset = 1)),
        ("beyond reason", Box::new(|h| h.sections[0].bytes = u64::MAX)),
        ("weight q: its parts have", Box::new(|h| with_parts(h, |p| drop(p.pop())))),
        ("weight q: shape", Box::new(|h| h.weights[0].shape = vec![u32::MAX; 4])),
        ("weight q: blocks", Box::new(|h| h.weights[0].elem = Elem::Quant(Quant { block: [0, 1], pow2: true }))),
        ("weight rope: a rope table", Box::new(|h| h.weights[1].shape[1] = 6)),
        ("weight q: a Hadamard matrix", Box::new(|h| h.weights[0].source = WeightSource::Hadamard { n: 3 })),
        ("tensor a: rows 0..300", Box::new(|h| with_parts(h, |p| p[0].rows = [0, 300]))),
        ("tensor b: its scales", Box::new(|h| with_parts(h, |p| p.swap(0, 1)))),
        ("tensor a: its scales", Box::new(|h| with_parts(h, |p| p[0].scale = None))),
        ("tensor a: 191 columns", Box::new(|h| with_parts(h, |p| p[0].cols = [1, 192]))),
    ];
    for (i, (expected, edit)) in cases.into_iter().enumerate() {
        let problems = edited(edit);
        let expected = expected.replace("Arena", "Weight(9, 0) does not exist");
        assert!(problems.contains(&expected), "{i}: {expected}: {problems}");
    }
}

fn with_parts(header: &mut Header, edit: impl FnOnce(&mut Vec<TensorPart>)) {
    match &mut header.weights[0].source {
        WeightSource::Tensors(parts) => edit(parts),
        other => panic!("{other:?}"),
    }
}

#[test]
fn sizes_of_weights() {
    let header = sample();
    assert_eq!(header.weights[0].bytes(7), Some(320 * 192 + 3 * 2 * 4));
    assert_eq!(header.weights[0].scale_range(), Some(61440..61464));
    assert_eq!(header.weights[1].bytes(7), Some(7 * 16));
    let experts = WeightEntry { shape: vec![3, 129, 100], ..header.weights[0].clone() };
    assert_eq!(experts.bytes(0), Some((3u64 * 129 * 100).next_multiple_of(256) + 3 * 2 * 4));
}

#[test]
fn problems_are_bounded() {
    let mut header = sample();
    header.model.eos = vec![1000; 10_000];
    assert_eq!(header.check().unwrap_err().len(), MAX_PROBLEMS);
}

fn entry() -> Entry {
    let arg = |name: &str, shape: &[Extent], write| EntryArg {
        name: name.into(),
        elem: ArgElem::Plain(DType::F32),
        shape: shape.to_vec(),
        write,
    };
    Entry {
        op: "toy".into(),
        class: "all".into(),
        max: SymValues([8, 4, 4, 1, 1, 256]),
        relations: vec![
            (Sym::T.into(), Extent::from(Sym::S).times(2)),
            (Sym::C.into(), Extent::from(Sym::P).times(64)),
        ],
        args: vec![
            arg("x", &[Sym::T.into(), 3.into()], false),
            arg("table", &[Sym::S.into(), Sym::P.into()], false),
            arg("y", &[Sym::T.into()], true),
        ],
        workspace: vec![
            WorkspacePart { element_bytes: 4, shape: vec![Sym::T.into(), Sym::C.into()] },
            WorkspacePart { element_bytes: 2, shape: vec![Sym::T.into()] },
        ],
        launches: Vec::new(),
        pieces: None,
        pieced: 0,
    }
}

#[test]
fn calls_are_cut_where_the_workspace_is_too_large() {
    let mut e = entry();
    e.relations.clear();
    let launch = |args: &[Arg]| Launch { kernel: 0, args: args.to_vec(), node: "n".into() };
    e.launches = vec![launch(&[Arg::Workspace(0)]), launch(&[Arg::Workspace(0), Arg::Workspace(1)])];
    let tokens = |e: &Entry, t: u32, c: u32| e.piece(&SymValues([t, 1, 1, 1, 1, c])).get(Sym::T);
    assert_eq!(tokens(&e, 5000, 1 << 17), 5000);
    (e.pieces, e.pieced) = (Some(Pieces { tokens: 1024, bytes: 128 << 20 }), 2);
    // 4 bytes a column and 2 besides.
    assert_eq!([1, 700, 5000].map(|t| tokens(&e, t, 8192)), [1, 700, 1024]);
    assert_eq!([16384, 32768, 131072].map(|c| tokens(&e, 5000, c)), [1024, 512, 128]);
    assert_eq!([1 << 20, 1 << 30].map(|c| tokens(&e, 5000, c)), [64, 64]);
    let piece = SymValues([64, 3, 5, 1, 1, 7]);
    let pitches = |e: &Entry| {
        let callers = [0, 1, 2, 3].map(|i| e.piece_bytes(Arg::Caller(i), &piece));
        (callers, [0, 1].map(|i| e.piece_bytes(Arg::Workspace(i), &piece)))
    };
    assert_eq!(pitches(&e), ([64 * 3 * 4, 0, 64 * 4, 0], [0, 0]));
    let call = SymValues([150, 3, 5, 1, 1, 7]);
    let workspace = |e: &Entry| e.workspace(&call, &piece).unwrap();
    assert_eq!(workspace(&e), (vec![0, 64 * 4 * 7], 64 * 4 * 7 + 256));
    // What a launch behind the pieces needs is there for all tokens, and no reason to cut.
    e.launches.push(launch(&[Arg::Workspace(1)]));
    assert_eq!(pitches(&e), ([64 * 3 * 4, 0, 64 * 4, 0], [0, 64 * 2]));
    assert_eq!(workspace(&e), (vec![0, 64 * 4 * 7], 64 * 4 * 7 + 512));
    assert_eq!([16384, 32768, 131072].map(|c| tokens(&e, 5000, c)), [1024, 1024, 256]);
}

#[test]
fn shapes_of_a_call_bind_its_sizes() {
    let e = entry();
    let syms = |shapes: [&[u64]; 3]| e.symbols(&shapes).map(|s| s.0).map_err(|m| (m.rank(), m.to_string()));
    assert_eq!(syms([&[4, 3], &[2, 3], &[4]]), Ok([4, 2, 3, 1, 1, 192]));
    assert_eq!(syms([&[4, 2], &[2, 3], &[4]]), Err((0, "x is [4, 2], wants [T, 3] where T = 4".into())));
    assert_eq!(syms([&[4, 3], &[2, 3], &[5]]).unwrap_err().0, 0);
    let unrelated = "T is 3, wants 2*S where T = 3, S = 2, P = 3".to_string();
    assert_eq!(syms([&[3, 3], &[2, 3], &[3]]), Err((1, unrelated)));
    assert_eq!(syms([&[10, 3], &[5, 3], &[10]]), Err((2, "10 T are more than 8".into())));
    let syms = SymValues([4, 2, 3, 1, 1, 192]);
    let (starts, bytes) = e.workspace(&syms, &syms).unwrap();
    assert_eq!((starts, bytes), (vec![0, 3072], 3072 + 256));
    assert_eq!(e.buffer(Arg::Workspace(1), &e.max), Some((16, 0)));
    assert_eq!(e.buffer(Arg::Caller(2), &e.max), Some((32, 0)));
    assert_eq!([Arg::Caller(3), Arg::Workspace(2), Arg::Arena(0)].map(|a| e.buffer(a, &e.max)), [None; 3]);
    assert!(e.args[1].pitched() && !e.args[0].pitched() && !e.args[2].pitched());
}

#[test]
fn what_is_wrong_with_an_entry_point_is_found() {
    let wrong = |edit: &dyn Fn(&mut Entry), wanted: &str| {
        let (mut header, _) = file();
        let mut e = entry();
        edit(&mut e);
        header.entries = vec![e];
        let problems = header.check().unwrap_err().join("\n");
        assert!(problems.contains(wanted), "{problems}");
    };
    wrong(&|e| e.max = e.max.with(Sym::N, 0), "largest sizes");
    wrong(&|e| e.args[1].name = "x".into(), "not unique");
    wrong(&|e| e.args[0].elem = ArgElem::Plain(DType::Bool), "type or pages");
    wrong(&|e| e.args[0].elem = ArgElem::Pages(StateFormat::IndexFp8 { dim: 1 << 30 }), "type or pages");
    wrong(&|e| e.args[0].shape = vec![], "no dims");
    wrong(&|e| e.relations[0].0.factor = 2, "binds a multiple");
    wrong(&|e| e.workspace[0].element_bytes = u32::MAX, "workspace is beyond reason");
    let cut = |tokens| Some(Pieces { tokens, bytes: 1 });
    wrong(&|e| e.pieces = cut(64), "in pieces");
    for tokens in [0, 32, 96] {
        wrong(&|e| (e.pieces, e.relations) = (cut(tokens), Vec::new()), "in pieces");
    }
    wrong(&|e| (e.pieces, e.relations[0].0, e.args[1].shape[1]) = (cut(64), Sym::L.into(), Sym::T.into()), "in pieces");
    wrong(&|e| (e.pieces, e.relations) = (cut(64), Vec::new()), "no such launches");
    wrong(&|e| e.pieced = 1, "no such launches");
    wrong(&|e| (e.pieces, e.pieced, e.relations) = (cut(64), 1, Vec::new()), "no such launches");
    let launch = |arg| Launch { kernel: 0, args: vec![arg], node: "n".into() };
    wrong(&|e| e.launches = vec![launch(Arg::Caller(9))], "does not exist");
    wrong(&|e| e.launches = vec![launch(Arg::Arena(0))], "does not exist");
    wrong(&|e| e.launches = vec![Launch { kernel: 77, ..launch(Arg::Caller(0)) }], "kernel 77 of");
}
