//! Machine code of tile programs: what verifies compiles; what is small enough runs, touches nothing outside of its buffers, and where
//! every op is exact it leaves what the interpreter leaves.
#![no_main]

use dsc_fuzz::{MAX_COST, cost, texts};
use dsc_ir::artifact::{Header, KernelEntry, ModelFacts, Numerics, ParamEntry};
use dsc_ir::dtype::e4m3_to_f32;
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::interp::{Binding, Options, block_count, run_blocks};
use dsc_ir::tile::{Op, Program, ReduceKind, Region, ScalarOp, parse, verify};
use dsc_ir::{DType, SymValues};
use dsc_runtime::device::{BoundLaunch, Code};
use dsc_runtime::{CpuDevice, Device};
use dsc_targets::{Kernel, Module};
use libfuzzer_sys::fuzz_target;

const SYMS: SymValues = SymValues([3, 2, 2, 1, 2, 9]);
const BUFFER_BYTES: usize = 512;
const AROUND: usize = 256;
/// Larger programs take the code generator too long.
const MAX_VALUES: usize = 200;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    let programs = texts(text).iter().filter_map(|text| parse(text).ok()).flatten().collect::<Vec<_>>();
    programs.iter().filter(|p| p.types.len() <= MAX_VALUES && verify(p).is_empty()).for_each(check);
});

fn check(program: &Program) {
    if cost(program, &SYMS) > MAX_COST {
        return;
    }
    let buffer = |i: usize| (0..BUFFER_BYTES).map(|b| (b * 7 + i * 31) as u8).collect();
    let memory: Vec<Vec<u8>> = (0..program.params.len()).map(buffer).collect();
    let mut want = memory.clone();
    let bindings: Vec<Binding> = (0..memory.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let blocks = 0..block_count(program, &SYMS).unwrap_or(0);
    // Launches that the interpreter refuses are nobody's to run.
    if run_blocks(program, &SYMS, &mut want, &bindings, blocks, Options { check_races: true }).is_err() {
        return;
    }
    let target = dsc_targets::target("cpu", false).expect("the target of this machine");
    let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
    let module = target.compile(&[kernel]).unwrap_or_else(|e| panic!("{e}\n{program}"));
    let Some(got) = run(program, &module, &memory) else { return };
    for ((param, got), want) in program.params.iter().zip(&got).zip(&want) {
        let (inside, dtype) = (AROUND..AROUND + BUFFER_BYTES, program.view(param.value).map(|v| v.dtype));
        let outside = got[..AROUND].iter().chain(&got[inside.end..]);
        assert!(outside.into_iter().all(|&b| b == 0xa5), "%{} is left\n{program}", param.name);
        if exact(&program.body) {
            let same = numbers(dtype, &got[inside]).eq(numbers(dtype, want));
            assert!(same, "%{} differs\n{program}", param.name);
        }
    }
}

/// What the buffers hold afterwards, with what is around them; none if a view could leave its buffer.
fn run(program: &Program, module: &Module, memory: &[Vec<u8>]) -> Option<Vec<Vec<u8>>> {
    let mut device = CpuDevice::new(1).expect("a thread");
    device.load_code(&header(program, module), Code::native(&module.code)).expect("the machine's own features");
    let mut args = Vec::new();
    for bytes in memory {
        let padded = [&[0xa5; AROUND], bytes.as_slice(), &[0xa5; AROUND]].concat();
        let buffer = device.alloc(padded.len() as u64, "a parameter").expect("memory");
        device.upload(buffer, 0, &padded).expect("it fits");
        args.push((buffer, AROUND as u64));
    }
    let bound = device.bind(&[BoundLaunch { kernel: 0, node: String::new(), args: args.clone() }], &SYMS).ok()?;
    device.run(bound, 0..1, &SYMS, None).expect("a launch");
    let mut read = |buffer| {
        let mut bytes = vec![0; BUFFER_BYTES + 2 * AROUND];
        device.read(buffer, 0, &mut bytes).expect("it fits");
        bytes
    };
    Some(args.into_iter().map(|(buffer, _)| read(buffer)).collect())
}

fn header(program: &Program, module: &Module) -> Header {
    let view = |p: &dsc_ir::tile::Param| program.view(p.value).expect("verified: parameters are views").clone();
    let params =
        program.params.iter().map(|p| ParamEntry { name: p.name.clone(), view: view(p), write: p.access.writes() });
    let code = &module.kernels[0];
    let kernel = KernelEntry {
        name: program.name.clone(),
        what: String::new(),
        entry: code.entry,
        code_bytes: code.code_bytes,
        scratch_bytes: code.scratch_bytes,
        grid: program.grid.clone(),
        params: params.collect(),
        schedule: Schedule::default(),
        work: Default::default(),
        gpu: None,
    };
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
    Header {
        compiler: String::new(),
        target: "cpu".into(),
        features: module.features.clone(),
        numerics: Numerics::Exact,
        model,
        weights: Vec::new(),
        states: Vec::new(),
        kernels: vec![kernel],
        library: None,
        entries: Vec::new(),
        steps: Vec::new(),
        sections: Vec::new(),
    }
}

/// Whether the ops leave nothing to the executor: no order of sums, no approximation, no payloads of NaNs, no signs of zeros.
fn exact(region: &Region) -> bool {
    region.insts.iter().all(|inst| match &inst.op {
        Op::Dot { .. } => false,
        Op::Reduce { kind, .. } | Op::Scan { kind, .. } => *kind == ReduceKind::Max,
        Op::Map { body, .. } => !body.insts.iter().any(|i| {
            matches!(i.op, ScalarOp::Exp2 | ScalarOp::Bitcast(_) | ScalarOp::Div | ScalarOp::Shl | ScalarOp::Shr)
        }),
        Op::For { body, .. } => exact(body),
        Op::If { then, otherwise, .. } => exact(then) && exact(otherwise),
        _ => true,
    })
}

/// Elements as text, all NaNs and both zeros alike.
fn numbers(dtype: Option<DType>, bytes: &[u8]) -> impl Iterator<Item = String> {
    let dtype = dtype.unwrap_or(DType::I32);
    bytes.chunks_exact(dtype.bytes()).map(move |b| match (dtype, b) {
        (DType::F32, &[a, b, c, d]) => format!("{:?}", f32::from_le_bytes([a, b, c, d]) + 0.0),
        (DType::Bf16, &[a, b]) => format!("{:?}", f32::from_le_bytes([0, 0, a, b]) + 0.0),
        (DType::F16, &[a, b]) if b & 0x7f >= 0x7c && (b & 3 != 0 || a != 0) => "NaN".into(),
        (DType::F16, &[0, 0x80]) => format!("{:?}", [0, 0]),
        (DType::E4m3, &[code]) => format!("{:?}", e4m3_to_f32(code) + 0.0),
        _ => format!("{b:?}"),
    })
}
