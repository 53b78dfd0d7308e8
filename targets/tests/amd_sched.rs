//! Schedules with rings and with loads ahead for AMD chips: they verify within each chip's budget, and on the interpreter of scheduled kernels, with copies that
//! arrive at any time, they leave what the tile program leaves.
#![cfg(feature = "emulate")]

#[path = "support/attention.rs"]
#[allow(dead_code)]
mod attention;
#[path = "support/experts.rs"]
#[allow(dead_code)]
mod experts;
#[path = "support/linear.rs"]
#[allow(dead_code)]
mod linear;

use attention::Attention;
use dsc_ir::sched::{self, Budget, Scheduled};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{self, Program, interp};
use dsc_ir::{DType, SymValues};
use dsc_targets::Kernel;
use dsc_targets::amd::arch::{ARCHS, Arch};
use dsc_targets::amd::lower::{Bounds, lower};
use experts::Experts;
use linear::Linear;

/// Rows: ragged in every tile.
const SYMS: SymValues = SymValues([21; 6]);

fn budget(arch: &Arch) -> Budget {
    Budget {
        shared_bytes: arch.lds_bytes,
        registers: Arch::REGISTERS * Arch::SIMDS * Arch::WAVE,
        thread_registers: Arch::REGISTERS,
        named_barriers: 0,
        threads: Arch::THREADS_PER_BLOCK,
    }
}

fn programs() -> Vec<Program> {
    let bf16 =
        |n, k| Linear { dtype: DType::Bf16, n, k, tile: [16, 32], step: 32, out: DType::F32, glu: false, part: None };
    let fp8 = |n, k| Linear { dtype: DType::E4m3, step: 128, ..bf16(n, k) };
    let experts = Experts {
        experts: 3,
        per_token: 2,
        n: 64,
        k: 256,
        tile: [16, 32],
        parts: 1,
        apart: false,
        glu: false,
        sorted: false,
    };
    vec![
        bf16(48, 160).program("plain"),
        // Fewer rounds than stages.
        bf16(32, 32).program("one_round"),
        Linear { part: Some(96), ..bf16(32, 224) }.program("parts"),
        fp8(64, 384).program("scaled"),
        Linear { glu: true, ..fp8(64, 256) }.program("gate_and_up"),
        experts.program("experts"),
    ]
}

/// What differs between the two interpreters.
fn differs(program: &Program, scheduled: &Scheduled) -> Option<String> {
    let bindings: Vec<interp::Binding> =
        (0..program.params.len()).map(|buffer| interp::Binding { buffer, offset: 0 }).collect();
    let before: Vec<Vec<u8>> = program.params.iter().map(|p| bytes(program, p)).collect();
    let mut want = before.clone();
    interp::run(program, &SYMS, &mut want, &bindings).unwrap_or_else(|e| panic!("{}: {e}", program.name));
    (0..4).find_map(|seed| {
        let mut got = before.clone();
        let options = sched::interp::Options { seed, check_races: false };
        match sched::interp::run(scheduled, &SYMS, &mut got, &bindings, options) {
            Err(e) => Some(e.to_string()),
            Ok(()) => (got != want).then(|| format!("seed {seed} leaves other results")),
        }
    })
}

/// Integers that are experts' rows, in order or thereabouts; other bytes such that numbers of every type are tame.
fn bytes(program: &Program, param: &tile::Param) -> Vec<u8> {
    let view = program.view(param.value).expect("a parameter is a view");
    // From the buffer's first byte to the view's last.
    let last: u64 = view
        .shape
        .iter()
        .zip(&view.strides)
        .map(|(e, s)| (e.eval(&SYMS) - 1) * s.bytes as u64 * s.sym.map_or(1, |sym| u64::from(SYMS.get(sym))))
        .sum();
    let elements = (view.offset + last) / view.dtype.bytes() as u64 + 1;
    match view.dtype {
        // Numbers of rows in no order, some of which there are not.
        DType::I32 if param.name == "indices" => {
            (0..elements as i32).flat_map(|i| ((i * 7 + i / 3) % 29 - 4).to_le_bytes()).collect()
        }
        DType::I32 if param.name == "lengths" => (0..elements as i32).flat_map(|i| (i * 9).to_le_bytes()).collect(),
        DType::I32 if param.name == "offsets" => (0..elements as i32).flat_map(|i| (i * 7).to_le_bytes()).collect(),
        DType::I32 => (0..elements as i32).flat_map(i32::to_le_bytes).collect(),
        DType::F32 => (0..elements).flat_map(|i| (1.0 + (i % 5) as f32 / 8.0).to_le_bytes()).collect(),
        DType::Bf16 => (0..elements).flat_map(|i| (0x3f00 + (i * 37 % 128) as u16).to_le_bytes()).collect(),
        _ => (0..elements * view.dtype.bytes() as u64).map(|i| 0x28 + (i * 7 % 16) as u8).collect(),
    }
}

#[test]
fn rings_are_sound_and_change_nothing() {
    let mut problems = Vec::new();
    for program in programs() {
        for (arch, stages) in ARCHS.iter().flat_map(|a| [(a, 2), (a, 4)]) {
            let schedule = Schedule { stages, near: true, dies: 3, ..Schedule::default() };
            let kernel = Kernel { program: program.clone(), schedule };
            let lowered = lower(&kernel, arch, Bounds::Tested).unwrap_or_else(|e| panic!("{}: {e}", program.name));
            let name = format!("{} on {} in {stages} stages", program.name, arch.name);
            let converts = arch.name == "gfx942" && lowered.sched.contains("e4m3");
            if lowered.sched.contains("copy c0.0") == converts {
                problems.push(format!("{name}: a ring is not where it should be\n{}", lowered.sched));
            }
            let parsed = sched::parse(&lowered.sched).unwrap_or_else(|e| panic!("{e}\n{}", lowered.sched));
            for scheduled in parsed {
                let found = sched::verify(&scheduled, &budget(arch));
                problems.extend(found.iter().map(|d| format!("{name}: {d}\n{scheduled}")));
                problems.extend(differs(&program, &scheduled).map(|e| format!("{name}: {e}\n{scheduled}")));
            }
        }
    }
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
}

/// Loops that load ahead: keys of a selection, two loads deep, and operands that gfx942 converts.
#[test]
fn loads_ahead_are_sound_and_change_nothing() {
    let attention = Attention {
        heads: 16,
        tile: 16,
        latent: 128,
        rope: 32,
        k: 160,
        keys: 32,
        fp8: true,
        parts: None,
        searched: false,
    };
    let fp8 = Linear {
        dtype: DType::E4m3,
        n: 64,
        k: 384,
        tile: [16, 32],
        step: 128,
        out: DType::F32,
        glu: false,
        part: None,
    };
    let cases = [
        (attention.program("selected"), ARCHS),
        (Attention { parts: Some(3), searched: true, ..attention }.program("parts"), ARCHS),
        (Attention { fp8: false, ..attention }.program("plain_keys"), ARCHS),
        (fp8.program("converted"), &ARCHS[..1]),
    ];
    let mut problems = Vec::new();
    for (program, archs) in cases {
        for arch in archs {
            let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
            let lowered = lower(&kernel, arch, Bounds::Tested).unwrap_or_else(|e| panic!("{}: {e}", program.name));
            let name = format!("{} on {}", program.name, arch.name);
            if !lowered.sched.contains("@held") {
                problems.push(format!("{name}: nothing is loaded ahead\n{}", lowered.sched));
            }
            for scheduled in sched::parse(&lowered.sched).unwrap_or_else(|e| panic!("{e}\n{}", lowered.sched)) {
                let found = sched::verify(&scheduled, &budget(arch));
                problems.extend(found.iter().map(|d| format!("{name}: {d}\n{scheduled}")));
                problems.extend(differs(&program, &scheduled).map(|e| format!("{name}: {e}\n{scheduled}")));
            }
        }
    }
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
}
