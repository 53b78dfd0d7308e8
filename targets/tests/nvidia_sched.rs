//! Plain schedules of every kernel of the file tests: they verify within each architecture's budget, and on the interpreter of scheduled
//! kernels they leave what the tile program leaves, to the bit.
#![cfg(feature = "nvidia")]

#[path = "support/programs.rs"]
mod programs;

use dsc_ir::sched::{self, Budget};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{self, Program, interp};
use dsc_ir::{DType, SymValues};
use dsc_targets::Kernel;
use dsc_targets::nvidia::arch::Arch;
use dsc_targets::nvidia::lower::lower;
use programs::programs;

/// Bytes of every parameter: more than any kernel of the file tests reaches with these symbols.
const BYTES: u32 = 1 << 16;
const SYMS: SymValues = SymValues([3; 6]);

fn budget(arch: &Arch) -> Budget {
    Budget {
        shared_bytes: arch.shared_per_block,
        registers: Arch::REGISTERS_PER_SM,
        thread_registers: Arch::REGISTERS_PER_THREAD,
        named_barriers: 15,
        threads: Arch::THREADS_PER_BLOCK,
    }
}

#[test]
fn schedules_are_sound_and_change_nothing() {
    let mut problems = Vec::new();
    for program in programs() {
        for name in ["sm_80", "sm_90a"] {
            let arch = Arch::named(name).expect("it is in the table");
            let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
            let lowered = lower(&kernel, arch).unwrap_or_else(|e| panic!("{}: {e}", program.name));
            let parsed = sched::parse(&lowered.sched).unwrap_or_else(|e| panic!("{e}\n{}", lowered.sched));
            for scheduled in parsed {
                problems.extend(
                    sched::verify(&scheduled, &budget(arch)).iter().map(|d| format!("{name}: {d}\n{scheduled}")),
                );
                problems.extend(differs(&program, &scheduled).map(|e| format!("{name}: {e}\n{scheduled}")));
            }
        }
    }
    assert!(problems.is_empty(), "{} problems\n{}", problems.len(), problems.join("\n"));
}

/// How the two interpreters disagree.
fn differs(program: &Program, scheduled: &sched::Scheduled) -> Option<String> {
    let params = program.params.len();
    let bindings: Vec<interp::Binding> = (0..params).map(|buffer| interp::Binding { buffer, offset: 0 }).collect();
    let fresh = || program.params.iter().map(|p| bytes(program, p)).collect::<Vec<Vec<u8>>>();
    let (mut want, before) = (fresh(), fresh());
    interp::run(program, &SYMS, &mut want, &bindings).ok()?;
    (0..4).find_map(|seed| {
        let mut got = before.clone();
        let options = sched::interp::Options { seed, check_races: false };
        match sched::interp::run(scheduled, &SYMS, &mut got, &bindings, options) {
            Err(e) => Some(e.to_string()),
            Ok(()) => (got != want).then(|| format!("seed {seed} leaves other results")),
        }
    })
}

/// Integers small enough to be rows and trip counts, some of them inside; other bytes such that floats of every type are tame.
fn bytes(program: &Program, param: &tile::Param) -> Vec<u8> {
    match program.view(param.value).map(|view| view.dtype) {
        Some(DType::I32) => (0..BYTES as i32 / 4).flat_map(|i| (i % 7 - 1).to_le_bytes()).collect(),
        _ => (0..BYTES).map(|b| ((b * 7 + param.value.0) % 64) as u8).collect(),
    }
}

/// Weights that a block holds from its start on.
const HASTY: &str = "kernel hasty grid(T/1, 2/1)
    read %x: view<[T, 256] f32>
    constant %w: view<[512] f32>
    write %y: view<[T, 256] f32>
{
    %1 = block_id 0 : i32
    %2 = block_id 1 : i32
    %3 = map(%2) { a -> t0 = 256; t1 = mul a, t0; t1 } : i32
    %4 = load %x[%1, 0] : tile<1x256xf32>
    %5 = reduce sum %4 axis 1 : tile<1x1xf32>
    %6 = load %w[%3] : tile<256xf32>
    %7 = reshape %6 : tile<1x256xf32>
    %8 = map(%4, %5, %7) { a, b, c -> t0 = mul a, b; t1 = mul t0, c; t1 } : tile<1x256xf32>
    store %y[%1, 0], %8
}
";

/// How many loads of global memory stand in front of the first wait for the launches before, and how many waits there are.
fn before_the_wait(program: &str, schedule: &Schedule, arch: &str) -> (usize, usize) {
    let program = tile::parse(program).expect("a program").remove(0);
    let kernel = Kernel { program, schedule: schedule.clone() };
    let mlir = lower(&kernel, Arch::named(arch).expect("it is in the table")).expect("lowers").mlir;
    let wait = "griddepcontrol.wait";
    let global = |text: &str| text.matches("llvm.load").count() - text.matches("!llvm.ptr<3> ->").count();
    (global(mlir.split(wait).next().unwrap_or_default()), mlir.matches(wait).count())
}

#[test]
fn constants_are_loaded_before_the_launches_before_end() {
    let early = Schedule { early: true, ..Schedule::default() };
    let none = before_the_wait(HASTY, &Schedule::default(), "sm_90a");
    // A wait where the work begins, and one for blocks that have none.
    assert_eq!(none.1, 2);
    let constant = before_the_wait(HASTY, &early, "sm_90a");
    assert!(constant.0 > none.0 && constant.1 == 2, "{constant:?} {none:?}");
    // What launches write is not read before they have.
    assert_eq!(before_the_wait(&HASTY.replace("constant", "read"), &early, "sm_90a"), none);
    let late = Schedule { late: true, ..early.clone() };
    assert_eq!(before_the_wait(HASTY, &late, "sm_90a").1, 1);
    assert_eq!(before_the_wait(HASTY, &early, "sm_80").1, 0, "launches do not overlap there");
}
