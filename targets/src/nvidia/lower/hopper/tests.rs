//! Scheduled contractions: valid, within the budget, and equal to their tile programs on the interpreters.

#[path = "../../../../tests/support/attention.rs"]
mod attention;
#[path = "../../../../tests/support/experts.rs"]
mod experts;
#[path = "../../../../tests/support/heads.rs"]
mod heads;
#[path = "../../../../tests/support/linear.rs"]
mod linear;
#[path = "../../../../tests/support/scores.rs"]
mod scores;
#[path = "../../../../tests/support/select.rs"]
mod select;

use super::{How, attention_plan, beside, compile, lower, plan, schedule};
use crate::Kernel;
use crate::nvidia::arch::Arch;
use crate::nvidia::lower::mlir::Ty;
use attention::Attention;
use dsc_ir::sched::verify::Budget;
use dsc_ir::sched::{self, Scheduled};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::interp::{self, Binding};
use dsc_ir::tile::{self, Program, Type};
use dsc_ir::{DType, Sym, SymValues};
use experts::Experts;
use heads::Heads;
use linear::Linear;
use scores::Scores;
use select::Select;

const GLOBAL: How = How { symbols: Ty::Global, sharing: 1, late: false };

const BF16: Linear =
    Linear { dtype: DType::Bf16, n: 256, k: 256, tile: [128, 256], step: 64, out: DType::Bf16, glu: false, part: None };
const FP8: Linear = Linear {
    dtype: DType::E4m3,
    n: 256,
    k: 512,
    tile: [128, 128],
    step: 128,
    out: DType::Bf16,
    glu: false,
    part: None,
};

const EXPERTS: Experts = Experts {
    experts: 3,
    per_token: 2,
    n: 128,
    k: 256,
    tile: [64, 128],
    parts: 1,
    apart: false,
    glu: false,
    sorted: false,
};

const BUDGET: Budget = Budget {
    // As of sm_90a.
    shared_bytes: 232_448,
    registers: Arch::REGISTERS_PER_SM,
    thread_registers: Arch::REGISTERS_PER_THREAD,
    named_barriers: 15,
    threads: Arch::THREADS_PER_BLOCK,
};

fn scheduled(program: Program) -> Scheduled {
    clustered(program, 1)
}

fn clustered(program: Program, cluster: u32) -> Scheduled {
    let kernel = Kernel { program, schedule: Schedule { cluster, ..Schedule::default() } };
    schedule(&kernel, hopper()).expect("a contraction that Hopper's way takes")
}

/// Asserts that a program's schedule is valid, and that both interpreters agree on small integers.
fn check(program: &Program, syms: SymValues, set: impl FnOnce(&mut [Vec<u8>])) {
    check_scheduled(program, scheduled(program.clone()), syms, set);
}

/// The same of a schedule of it.
fn check_scheduled(program: &Program, scheduled: Scheduled, syms: SymValues, set: impl FnOnce(&mut [Vec<u8>])) {
    assert_eq!(sched::verify::verify(&scheduled, &BUDGET), vec![], "{scheduled}");
    let bindings: Vec<Binding> = (0..program.params.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let mut seed = 7u32;
    let mut buffers: Vec<Vec<u8>> =
        program.params.iter().map(|p| fill(program.ty(p.value), &syms, &mut seed)).collect();
    set(&mut buffers);
    let mut expected = buffers.clone();
    interp::run(program, &syms, &mut expected, &bindings).expect("runs");
    for seed in 0..3 {
        let options = sched::interp::Options { seed, check_races: true };
        sched::interp::run(&scheduled, &syms, &mut buffers, &bindings, options).expect("runs");
        assert!(buffers == expected, "seed {seed} of\n{scheduled}");
    }
    lower(&scheduled, hopper(), GLOBAL).unwrap_or_else(|e| panic!("{e}, in\n{scheduled}"));
}

impl Linear {
    fn check(self, tokens: u32) {
        check(&self.program("linear"), SymValues([3; 6]).with(Sym::T, tokens), |_| ());
    }
}

impl Experts {
    /// Rows go to experts as `counts` says.
    fn check(self, tokens: u32, counts: &[i32]) {
        let rows: i32 = counts.iter().sum();
        let syms = SymValues([3; 6]).with(Sym::T, tokens).with(Sym::L, rows as u32);
        check(&self.program("experts"), syms, |buffers| {
            let bytes = |v: Vec<i32>| v.into_iter().flat_map(i32::to_le_bytes).collect::<Vec<u8>>();
            // Any order of the rows will do.
            buffers[4] = bytes((0..rows).map(|i| (i * 7 + 3) % rows).collect());
            buffers[5] = bytes((0..=counts.len()).map(|e| counts[..e].iter().sum()).collect());
        });
    }
}

fn hopper() -> &'static Arch {
    Arch::named("sm_90a").expect("it is in the table")
}

/// Bytes of a view of small integers, whose sums every order of additions gives exactly; scales are powers of two.
fn fill(ty: &Type, syms: &SymValues, seed: &mut u32) -> Vec<u8> {
    let Type::View(view) = ty else { return Vec::new() };
    let count: u64 = view.shape.iter().map(|e| e.eval(syms)).product();
    let mut next = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *seed >> 16
    };
    let element = |n: u32| -> Vec<u8> {
        let bits: u32 = match (view.dtype, n % 4) {
            (DType::E4m3, n) => return vec![[0x38u8, 0xb8, 0x40, 0x00][n as usize]],
            (DType::Bf16, n) => return [0x3f80u16, 0xbf80, 0x4000, 0][n as usize].to_le_bytes().to_vec(),
            (_, n) => [1.0f32, 0.5, 2.0, 0.25][n as usize].to_bits(),
        };
        bits.to_le_bytes().to_vec()
    };
    (0..count).flat_map(|_| element(next())).collect()
}

#[test]
fn whole_and_ragged_tiles() {
    BF16.check(128);
    Linear { n: 264, k: 192, ..BF16 }.check(150);
    Linear { out: DType::F32, tile: [64, 128], step: 128, ..BF16 }.check(65);
    Linear { k: 64, tile: [192, 64], n: 64, ..BF16 }.check(1);
}

#[test]
fn scales_are_applied_a_block() {
    FP8.check(128);
    Linear { k: 384, n: 136, ..FP8 }.check(130);
    Linear { k: 128, tile: [64, 64], ..FP8 }.check(3);
}

#[test]
fn two_products_of_one_operand() {
    Linear { glu: true, tile: [128, 64], ..FP8 }.check(130);
    Linear { glu: true, tile: [128, 128], ..BF16 }.check(20);
    Linear { glu: true, tile: [8, 64], ..FP8 }.check(5);
    // One partial sum in flight at a time.
    Linear { glu: true, tile: [128, 128], ..FP8 }.check(130);
}

#[test]
fn rows_are_quantised_by_their_maxima() {
    let quantised = Linear { out: DType::E4m3, glu: true, tile: [64, 128], ..FP8 };
    quantised.check(130);
    Linear { n: 192, k: 128, ..quantised }.check(5);
    Linear { tile: [16, 128], ..quantised }.check(20);
    Linear { tile: [24, 128], glu: false, ..quantised }.check(24);
    Linear { tile: [1, 128], ..quantised }.check(3);
    Linear { tile: [128, 128], glu: false, ..quantised }.check(140);
    Linear { tile: [64, 128], out: DType::E4m3, step: 128, ..BF16 }.check(70);
}

#[test]
fn tall_tiles_are_made_in_halves() {
    let tall = Linear { tile: [256, 128], ..FP8 };
    let halves = scheduled(tall.program("linear"));
    let slots: Vec<&str> =
        halves.channels[0].slots.iter().map(|b| halves.buffers[b.0 as usize].name.as_str()).collect();
    assert_eq!(slots, ["left", "left", "right"]);
    tall.check(512);
    // The lower half is cut, or empty.
    tall.check(200);
    tall.check(100);
    Linear { n: 136, k: 384, out: DType::F32, ..tall }.check(300);
    Linear { out: DType::E4m3, k: 128, ..tall }.check(130);
}

#[test]
fn three_warpgroups_share_a_tile() {
    let three = Linear { tile: [192, 128], ..FP8 };
    let roles = scheduled(three.program("linear")).roles;
    assert_eq!(roles.iter().map(|r| r.warps).collect::<Vec<_>>(), [[0, 4], [4, 16]]);
    three.check(384);
    // The last warpgroup's rows are cut, or there are none.
    three.check(340);
    Linear { n: 136, k: 384, ..three }.check(130);
    Linear { out: DType::E4m3, k: 128, ..three }.check(200);
}

#[test]
fn parts_of_the_sum() {
    Linear { part: Some(256), out: DType::F32, tile: [16, 64], ..FP8 }.check(7);
    // The last part is short.
    Linear { part: Some(384), out: DType::F32, tile: [128, 64], ..FP8 }.check(20);
    Linear { part: Some(128), out: DType::F32, tile: [16, 64], ..BF16 }.check(16);
}

#[test]
fn gathered_rows() {
    let experts = EXPERTS;
    experts.check(41, &[70, 0, 12]);
    Experts { per_token: 0, tile: [128, 64], ..experts }.check(0, &[5, 130, 2]);
    Experts { tile: [16, 64], k: 384, ..experts }.check(9, &[0, 17, 1]);
    Experts { tile: [8, 64], ..experts }.check(4, &[1, 1, 6]);
    Experts { parts: 4, ..experts }.check(41, &[70, 0, 12]);
    Experts { tile: [192, 64], ..experts }.check(101, &[200, 1, 0]);
    Experts { glu: true, parts: 2, k: 1024, ..experts }.check(71, &[130, 3, 8]);
    let sorted = Experts { sorted: true, per_token: 0, ..experts };
    sorted.check(0, &[70, 0, 12]);
    Experts { tile: [192, 64], parts: 2, ..sorted }.check(0, &[300, 1, 65]);
    Experts { tile: [256, 128], k: 1024, ..sorted }.check(0, &[130, 5, 0]);
    // Turns at an expert's tiles along an axis of the grid: of 4 x 64 rows two tiles, neither of 64; none; a tile and a row.
    let apart = Experts { apart: true, tile: [192, 64], k: 1024, ..sorted };
    Experts { parts: 2, ..apart }.check(0, &[256, 0, 193]);
    Experts { parts: 3, ..apart }.check(0, &[0, 700, 64]);
}

/// Two products of the same rows, each by blocks of its own: one of 64 x 128 tiles in two parts, one of 64 x 64 tiles.
const BESIDE: &str = "kernel beside grid(T/64, 7/1)
    read %x: view<[T, 512] bf16>
    read %v: view<[300, 512] bf16>
    read %w: view<[64, 512] bf16>
    write %y: view<[T, 2, 300] f32>
    write %z: view<[T, 64] f32>
{
    %1 = block_id 0 : i32
    %2 = block_id 1 : i32
    %3 = map(%2) { a -> t0 = 6; t1 = lt a, t0; t1 } : bool
    if %3 {
        %4 = map(%2) { a -> t0 = 3; t1 = rem a, t0; t1 } : i32
        %5 = map(%2) { a -> t0 = 3; t1 = div a, t0; t1 } : i32
        %6 = map(%1) { a -> t0 = 64; t1 = mul a, t0; t1 } : i32
        %7 = map(%4) { a -> t0 = 128; t1 = mul a, t0; t1 } : i32
        %8 = full 0.0 : tile<64x128xf32>
        %9 = map(%5) { a -> t0 = 256; t1 = mul a, t0; t1 } : i32
        %10 = map(%9) { a -> t0 = 256; t1 = add a, t0; t1 } : i32
        %11 = for %12 = %9 to %10 step 64 iter(%13 = %8: tile<64x128xf32>) {
            %14 = load %x[%6, %12] : tile<64x64xbf16>
            %15 = load %v[%7, %12] : tile<128x64xbf16>
            %16 = dot_t %14, %15 acc %13 : tile<64x128xf32>
            yield %16
        }
        %17 = reshape %11 : tile<64x1x128xf32>
        store %y[%6, %5, %7], %17
    } else {
        %18 = map(%1) { a -> t0 = 64; t1 = mul a, t0; t1 } : i32
        %19 = map(%2) { a -> t0 = 6; t1 = sub a, t0; t1 } : i32
        %20 = map(%19) { a -> t0 = 64; t1 = mul a, t0; t1 } : i32
        %21 = full 0.0 : tile<64x64xf32>
        %22 = for %23 = 0 to 512 step 64 iter(%24 = %21: tile<64x64xf32>) {
            %25 = load %x[%18, %23] : tile<64x64xbf16>
            %26 = load %w[%20, %23] : tile<64x64xbf16>
            %27 = dot_t %25, %26 acc %24 : tile<64x64xf32>
            yield %27
        }
        store %z[%18, %20], %22
    }
}
";

#[test]
fn halves_run_beside_each_other() {
    let program = tile::parse(BESIDE).expect("a program").remove(0);
    let kernel = Kernel { program: program.clone(), schedule: Schedule::default() };
    let beside::Halves { halves, first } = beside::apart(&program).expect("two halves");
    let halves = halves.map(|program| {
        assert_eq!(tile::verify(&program), vec![], "{program}");
        let scheduled = plan::plan(&Kernel { program, ..kernel.clone() }, hopper()).expect("a contraction");
        assert_eq!(sched::verify::verify(&scheduled, &BUDGET), vec![], "{scheduled}");
        scheduled
    });
    assert_eq!((first, halves[0].threads, halves[1].threads), (6, 384, 160));
    // Each half for itself, on the same memory, does what all blocks do.
    let (syms, mut seed) = (SymValues([3; 6]).with(Sym::T, 70), 7);
    let bindings: Vec<Binding> = (0..program.params.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let mut buffers: Vec<Vec<u8>> =
        program.params.iter().map(|p| fill(program.ty(p.value), &syms, &mut seed)).collect();
    let mut expected = buffers.clone();
    interp::run(&program, &syms, &mut expected, &bindings).expect("runs");
    for half in &halves {
        let options = sched::interp::Options { seed: 1, check_races: true };
        sched::interp::run(half, &syms, &mut buffers, &bindings, options).expect("runs");
    }
    assert!(buffers == expected);
    // One launch of both: threads of the larger, of which those of the smaller wait for one another; tiles of x are brought by the same descriptor.
    let (_, mlir, gpu) = compile(&kernel, hopper(), Ty::Global).expect("lowered");
    assert_eq!((gpu.threads, gpu.persistent, gpu.maps.len()), (384, false, 3));
    assert!(mlir.contains("bar.sync 0, 160;"), "{mlir}");
}

#[test]
fn operands_across_what_is_contracted() {
    let check = |heads: Heads, tokens: u32| {
        check(&heads.program("heads"), SymValues([3; 6]).with(Sym::T, tokens), |_| ());
    };
    let heads = Heads { heads: 3, n: 192, k: 128, tile: [128, 128], step: 64 };
    check(heads, 130);
    check(Heads { n: 256, k: 256, tile: [128, 256], step: 128, ..heads }, 5);
    let refused =
        |h: Heads| schedule(&Kernel { program: h.program("heads"), schedule: Schedule::default() }, hopper()).is_none();
    // Two warpgroups would share out the columns; the operands would change places.
    assert!(refused(Heads { tile: [64, 128], ..heads }) && refused(Heads { tile: [16, 64], ..heads }));
}

#[test]
fn few_rows_change_places_with_columns() {
    Linear { tile: [16, 64], ..FP8 }.check(16);
    Linear { tile: [1, 128], k: 384, ..FP8 }.check(1);
    Linear { tile: [24, 64], out: DType::F32, ..BF16 }.check(40);
}

#[test]
fn what_the_copy_engine_cannot_bring_is_left_to_the_plain_way() {
    let refused =
        |l: Linear| schedule(&Kernel { program: l.program("linear"), schedule: Schedule::default() }, hopper());
    assert!(refused(Linear { k: 100, step: 100, ..BF16 }).is_none());
    assert!(refused(Linear { dtype: DType::F32, ..BF16 }).is_none());
    assert!(refused(Linear { tile: [256, 256], ..FP8 }).is_none());
    let ampere = Arch::named("sm_80").expect("it is in the table");
    assert!(schedule(&Kernel { program: BF16.program("linear"), schedule: Schedule::default() }, ampere).is_none());
}

#[test]
fn clusters_share_the_larger_operand() {
    let check = |l: Linear, cluster: u32, tokens: u32, axis: u32, shared: &str| {
        let program = l.program("linear");
        let kernel = clustered(program.clone(), cluster);
        assert_eq!(kernel.cluster.map(|c| (c.axis, c.blocks)), Some((axis, cluster)));
        assert_eq!(kernel.to_string().matches(&format!("copy shared c0.{shared}, ")).count(), 1, "{kernel}");
        check_scheduled(&program, kernel, SymValues([3; 6]).with(Sym::T, tokens), |_| ());
    };
    check(FP8, 2, 300, 1, "0");
    check(Linear { tile: [128, 32], ..FP8 }, 4, 130, 1, "0");
    check(BF16, 2, 128, 0, "1");
    // What rows cannot be split for, and rows that are gathered, each block brings itself.
    let alone = |program: Program, cluster| assert_eq!(clustered(program, cluster).cluster, None);
    alone(Linear { tile: [64, 8], ..FP8 }.program("linear"), 16);
    alone(EXPERTS.program("experts"), 2);
}

#[test]
fn products_stay_in_flight() {
    let waits = |l: Linear| -> Vec<u32> {
        let (mlir, _) = lower(&scheduled(l.program("linear")), hopper(), GLOBAL).expect("lowers");
        let found = mlir.match_indices("wgmma.wait_group.sync.aligned ");
        found
            .map(|(at, text)| mlir[at + text.len()..].chars().next().and_then(|c| c.to_digit(10)).unwrap_or(9))
            .collect()
    };
    // In the loop the stage before is released with one group in flight; after it the last one is waited for.
    assert_eq!(waits(BF16), [1, 0]);
    // A partial sum is added while the next is made; none is in flight at the end of a turn.
    assert_eq!(waits(FP8), [1, 1, 1, 0]);
}

const SPARSE: Attention = Attention {
    heads: 64,
    tile: 64,
    latent: 512,
    rope: 64,
    k: 192,
    keys: 64,
    fp8: false,
    parts: None,
    searched: false,
};

impl Attention {
    /// Asserts that the schedule is valid, and that it gives what the program gives but for rounding.
    fn check(self, tokens: u32, lengths: &[i32]) {
        self.check_split(1, tokens, lengths);
    }

    /// The same where so many blocks divide the keys.
    fn check_split(self, split: u32, tokens: u32, lengths: &[i32]) {
        self.check_schedule(Schedule { split, ..Schedule::default() }, tokens, lengths);
    }

    /// The same where they join through memory.
    fn check_apart(self, split: u32, tokens: u32, lengths: &[i32]) {
        self.check_schedule(Schedule { split, apart: true, ..Schedule::default() }, tokens, lengths);
    }

    fn check_schedule(self, schedule: Schedule, tokens: u32, lengths: &[i32]) {
        let (split, apart) = (schedule.split.max(1), schedule.apart);
        let program = self.program("attention");
        let kernel = Kernel { program: program.clone(), schedule };
        let scheduled = attention_plan::plan(&kernel, hopper()).expect("it is attention");
        assert_eq!((scheduled.team, scheduled.apart()), (split, apart));
        // Weights round relative to the base of each part.
        let tolerance = if split > 1 { 6e-3 } else { 2e-3 };
        assert_eq!(sched::verify::verify(&scheduled, &BUDGET), vec![], "{scheduled}");
        let rows = 300u32;
        let syms = SymValues([3; 6]).with(Sym::T, tokens).with(Sym::C, rows);
        let of = |name: &str| program.params.iter().position(|p| p.name == name).expect("it is a parameter");
        let (q, indices) = (of("q"), of("indices"));
        let mut bindings: Vec<Binding> =
            (0..program.params.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
        // Views of one row each.
        for (name, whole) in [("q_rope", "q"), ("rope", "latent"), ("scales", "latent")] {
            if let Some(p) = program.params.iter().position(|p| p.name == name) {
                bindings[p].buffer = of(whole);
            }
        }
        let mut random = 7u32;
        let mut next = || {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            random >> 8
        };
        let bf16 = |n: u32| half::bf16::from_f32((n % 512) as f32 / 128.0 - 2.0).to_le_bytes();
        let mut buffers: Vec<Vec<u8>> = Vec::new();
        for p in &program.params {
            let Type::View(view) = program.ty(p.value) else { continue };
            let size: u64 = view.shape.iter().map(|e| e.eval(&syms)).product::<u64>() * view.dtype.bytes() as u64;
            buffers.push(vec![0; size as usize]);
        }
        buffers[q] = (0..tokens * self.heads * (self.latent + self.rope)).flat_map(|_| bf16(next())).collect();
        let mut cache = Vec::new();
        for _ in 0..rows {
            if self.fp8 {
                cache.extend((0..self.latent).map(|_| (next() % 0x38) as u8 | ((next() % 2) << 7) as u8));
                cache.extend((0..self.latent.div_ceil(128)).flat_map(|_| (0.5 + (next() % 8) as f32).to_le_bytes()));
            } else {
                cache.extend((0..self.latent).flat_map(|_| bf16(next())));
            }
            cache.extend((0..self.rope).flat_map(|_| bf16(next())));
        }
        buffers[of("latent")] = cache;
        buffers[indices] = (0..tokens * self.k).flat_map(|_| (next() as i32 % 340 - 20).to_le_bytes()).collect();
        buffers[of("lengths")] = lengths.iter().flat_map(|n| n.to_le_bytes()).collect();
        let outputs: Vec<usize> = ["y", "largest_scores", "sums", "largest", "totals"]
            .iter()
            .filter_map(|name| program.params.iter().position(|p| p.name == *name))
            .collect();
        for &o in &outputs {
            buffers[o].fill(0xff);
        }
        let mut expected = buffers.clone();
        interp::run(&program, &syms, &mut expected, &bindings).expect("runs");
        let mut first: Option<Vec<Vec<u8>>> = None;
        for seed in 0..2 {
            let mut got = buffers.clone();
            let options = sched::interp::Options { seed, check_races: true };
            sched::interp::run(&scheduled, &syms, &mut got, &bindings, options).expect("runs");
            for &o in &outputs {
                let bytes = if program.params[o].name == "y" { 2 } else { 4 };
                let float = |b: &[u8]| match *b {
                    [a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                    [a, b] => half::bf16::from_le_bytes([a, b]).to_f32(),
                    _ => f32::NAN,
                };
                let (mut wrong, mut norm) = (0.0f64, 1e-30f64);
                for (a, b) in got[o].chunks(bytes).zip(expected[o].chunks(bytes)) {
                    let (a, b) = (f64::from(float(a)), f64::from(float(b)));
                    wrong += (a - b).powi(2);
                    norm += b * b;
                }
                assert!(
                    (wrong / norm).sqrt() < tolerance,
                    "seed {seed}: {} {wrong} {norm}\n{scheduled}",
                    program.params[o].name
                );
            }
            let same = first.get_or_insert_with(|| got.clone());
            assert!(*same == got, "seed {seed} gives other bits");
        }
        lower(&scheduled, hopper(), GLOBAL).expect("lowers");
    }
}

#[test]
fn attention_over_gathered_rows() {
    SPARSE.check(2, &[192, 70]);
    Attention { heads: 128, ..SPARSE }.check(1, &[100]);
    Attention { latent: 128, k: 100, ..SPARSE }.check(3, &[100, 0, 64]);
    Attention { searched: true, ..SPARSE }.check(2, &[192, 150]);
    // Lists whose last element is far from their end, and one that has none.
    Attention { searched: true, k: 700, ..SPARSE }.check(3, &[700, 20, 0]);
}

#[test]
fn two_warpgroups_score_in_turn() {
    let scheduled = clustered(SPARSE.program("attention"), 0);
    let names: Vec<&str> = scheduled.roles.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["keys0", "a", "b"]);
    // Weights have one buffer both ways, which leaves room for all keys of two rounds.
    let stages = |name: &str| scheduled.channels.iter().find(|c| c.name == name).map(|c| c.stages);
    assert_eq!(["keys0", "keys1", "keys2"].map(stages), [Some(2), Some(2), Some(2)]);
    let first = |name: &str| scheduled.channels.iter().find(|c| c.name == name).map(|c| c.slots[0]);
    assert_eq!(first("weights_a"), first("weights_b"));
    let (mlir, _) = lower(&scheduled, hopper(), GLOBAL).expect("lowers");
    // A stage of keys is given back by each warp: who has no use for it comes to it by no product.
    let stage = |count: u32| mlir.matches(&format!("mbarrier.init.shared::cta.b64 [$0], {count};")).count();
    assert_eq!((stage(8), stage(2)), (6, 1), "six stages of keys, one of queries");
    // Own weights are multiplied from registers: four instructions where a round is scored, three loops of the first and one of the second.
    assert_eq!(mlir.matches("m64n256k16.f32.bf16.bf16").count(), 4 * 8);
    assert_eq!(mlir.matches("$256, $257, $258, $259}, $260, p, 1, 1, 1;").count(), 4 * 4);
    // Each of them rescales the accumulator before, where some factor is not 1.
    assert_eq!(mlir.matches("vote.sync.any.pred").count(), 8);
    // The first scores a round before it gives the other's values of the round before back.
    let loop_of = |inst: &'_ sched::Inst| match &inst.op {
        sched::Op::For { body, .. } => Some(body.clone()),
        _ => None,
    };
    let of_a: Vec<sched::Block> = scheduled.roles[1].body.insts.iter().filter_map(loop_of).collect();
    let body = &of_a[1];
    let weights_of_b = scheduled.channels_of(first("weights_b").expect("a buffer")).last();
    let gives_back =
        |i: &sched::Inst| matches!(i.op, sched::Op::Release { channel, .. } if Some(channel) == weights_of_b);
    let last = body.insts.iter().rposition(gives_back);
    let products = body.insts[last.expect("weights are given back")..]
        .iter()
        .filter(|i| matches!(i.op, sched::Op::Tile(tile::Op::Dot { .. })));
    assert_eq!((of_a.len(), products.count()), (4, 2), "two of a round's three products follow");
    // Who scores a round gives its own values back first, so that the next in their place are brought first.
    let keys = scheduled.roles[0].body.insts.iter().find_map(|i| match &i.op {
        sched::Op::For { body, .. } => Some(body),
        _ => None,
    });
    let filled = keys.expect("a loop").insts.iter().filter_map(|i| match i.op {
        sched::Op::Acquire(channel) => Some(scheduled.channels[channel.0 as usize].name.as_str()),
        _ => None,
    });
    assert_eq!(filled.collect::<Vec<_>>(), ["keys0", "keys1", "keys2", "keys1", "keys0", "keys2"]);
    // With none, one, an even and an odd number of rounds.
    SPARSE.check(4, &[0, 64, 128, 192]);
    Attention { k: 320, ..SPARSE }.check(2, &[256, 320]);
}

#[test]
fn attention_over_codes() {
    Attention { fp8: true, ..SPARSE }.check(2, &[192, 1]);
}

#[test]
fn pairs_of_blocks_share_computed_keys() {
    let many = Attention { fp8: true, heads: 128, ..SPARSE };
    let pairs = |a: Attention, cluster| {
        let scheduled = clustered(a.program("attention"), cluster);
        let shared = scheduled.to_string().matches("fill shared").count();
        (scheduled.cluster.map(|c| (c.axis, c.blocks)), shared)
    };
    assert_eq!(pairs(many, 0), (Some((1, 2)), 2));
    assert_eq!(pairs(many, 1), (None, 0));
    // Keys that are copied, and heads of one block.
    assert_eq!(pairs(Attention { fp8: false, ..many }, 0), (None, 0));
    assert_eq!(pairs(SPARSE, 0), (None, 0));
    assert_eq!(pairs(Attention { heads: 192, ..many }, 0), (None, 0));
    many.check(2, &[192, 1]);
    Attention { parts: Some(2), searched: true, ..many }.check(1, &[130]);
}

#[test]
fn attention_in_parts() {
    Attention { parts: Some(2), ..SPARSE }.check(2, &[192, 65]);
    Attention { parts: Some(3), fp8: true, ..SPARSE }.check(1, &[130]);
}

#[test]
fn blocks_of_a_team_join_their_parts() {
    // Shares that are empty, of one token that has no key at all, and of odd and even numbers of rounds.
    let codes = Attention { fp8: true, ..SPARSE };
    codes.check_split(2, 2, &[192, 0]);
    Attention { k: 384, ..codes }.check_split(4, 3, &[384, 64, 300]);
    Attention { fp8: true, heads: 128, ..SPARSE }.check_split(8, 1, &[130]);
    codes.check_split(16, 1, &[192]);
    let few = Attention { heads: 16, tile: 16, fp8: true, ..SPARSE };
    few.check_split(4, 1, &[192]);
    few.check_split(8, 2, &[192, 70]);
    // Fewer pieces than blocks.
    few.check_split(16, 1, &[192]);
    Attention { heads: 32, tile: 32, ..few }.check_split(16, 1, &[100]);
}

#[test]
fn teams_that_are_no_clusters_join_through_memory() {
    let codes = Attention { fp8: true, ..SPARSE };
    codes.check_apart(2, 2, &[192, 0]);
    Attention { k: 384, ..codes }.check_apart(4, 5, &[384, 64, 300, 384, 1]);
    // Pairs that share keys, and more blocks than a cluster has.
    Attention { fp8: true, heads: 128, ..SPARSE }.check_apart(16, 1, &[130]);
    codes.check_apart(32, 1, &[192]);
    // The first round begins before the end of the list is known, also where there is no such round.
    Attention { searched: true, ..codes }.check_apart(4, 2, &[130, 0]);
    let few = Attention { heads: 16, tile: 16, fp8: true, ..SPARSE };
    few.check_apart(8, 2, &[192, 70]);
    few.check_apart(32, 1, &[192]);
}

#[test]
fn what_is_no_softmax_is_not_joined() {
    let schedule = |split| Schedule { split, ..Schedule::default() };
    let team = |program: Program, split: u32| {
        attention_plan::plan(&Kernel { program, schedule: schedule(split) }, hopper()).map(|s| s.team)
    };
    // Pairs that share keys, and no more blocks than a cluster has.
    let pairs = Attention { fp8: true, heads: 128, ..SPARSE };
    assert_eq!(team(pairs.program("attention"), 16), Some(8));
    // Which also gives the largest score.
    assert_eq!(team(SPARSE.program("attention"), 2), Some(1));
    let mut program = Attention { fp8: true, ..SPARSE }.program("attention");
    assert_eq!(team(program.clone(), 2), Some(2));
    // A base that follows otherwise.
    let Some(tile::Op::For { body, .. }) =
        program.body.insts.iter_mut().map(|i| &mut i.op).find(|op| matches!(op, tile::Op::For { .. }))
    else {
        panic!("attention has a loop")
    };
    let mut changed = 0;
    for inst in &mut body.insts {
        if let tile::Op::Map { body, .. } = &mut inst.op
            && body.insts.len() == 7
            && body.insts[6].op == tile::ScalarOp::Select
            && body.insts[2].op == tile::ScalarOp::Lt
            && matches!(body.insts[1].op, tile::ScalarOp::Const(tile::Scalar::F32(_)))
        {
            body.insts[2].op = tile::ScalarOp::Le;
            changed += 1;
        }
    }
    assert_eq!(changed, 1);
    assert_eq!(team(program, 2), Some(1));
}

#[test]
fn attention_of_few_heads() {
    let few = Attention { heads: 16, tile: 16, ..SPARSE };
    few.check(2, &[192, 70]);
    Attention { fp8: true, ..few }.check(1, &[128]);
    Attention { heads: 8, tile: 8, parts: Some(2), ..few }.check(1, &[192]);
}

impl Scores {
    /// With contexts as given, in one sequence or, a token each, in as many.
    fn check(self, contexts: &[i32]) {
        self.check_with(|s| scheduled(s.program("scores")), contexts);
    }

    /// The same of another schedule of it.
    fn check_with(self, schedule: impl Fn(Scores) -> Scheduled, contexts: &[i32]) {
        let longest = contexts.iter().copied().max().unwrap_or(1) as u32;
        let (tokens, pages) = (contexts.len() as u32, longest.div_ceil(64));
        let sequences = if self.rows == 1 { tokens } else { 1 };
        let syms = SymValues([3; 6])
            .with(Sym::T, tokens)
            .with(Sym::S, sequences)
            .with(Sym::P, pages)
            .with(Sym::N, pages * sequences)
            .with(Sym::C, longest);
        let program = self.program("scores");
        check_scheduled(&program, schedule(self), syms, |buffers| {
            let bytes = |v: Vec<i32>| v.into_iter().flat_map(i32::to_le_bytes).collect::<Vec<u8>>();
            let number = |name: &str| program.params.iter().position(|p| p.name == name);
            buffers[number("positions").unwrap()] = bytes(contexts.iter().map(|c| c - 1).collect());
            if let (Some(seqs), Some(table)) = (number("seqs"), number("pages")) {
                buffers[seqs] = bytes((0..tokens as i32).map(|t| if sequences == 1 { 0 } else { t }).collect());
                let all = (pages * sequences) as i32;
                // One page that does not exist: it reads zero.
                buffers[table] = bytes((0..all).map(|i| if i == 2 { -1 } else { all - 1 - i }).collect());
                let keys = number("keys").unwrap();
                let page: Vec<u8> = (0..8192u32).map(|i| [0x38, 0xb8, 0x40, 0][(i * 7 % 11 % 4) as usize]).collect();
                let scales: Vec<u8> = (0..64).flat_map(|i| [1.0f32, 0.5, 2.0][i % 3].to_le_bytes()).collect();
                buffers[keys] = [page, scales].concat().repeat(all as usize);
                buffers[number("scales").unwrap()] = buffers[keys].clone();
            }
        });
    }
}

const SCORES: Scores = Scores { heads: 64, rows: 1, pages: 2, paged: true, scaled: true, fill: true, select: None };

#[test]
fn scores_of_a_token_each() {
    SCORES.check(&[1, 64, 65, 300, 129]);
    Scores { heads: 32, pages: 1, scaled: false, ..SCORES }.check(&[200, 70]);
    // Tiles that nobody sees anything of.
    Scores { fill: false, pages: 1, ..SCORES }.check(&[1, 300, 64]);
}

#[test]
fn the_next_launch_waits_for_a_late_one() {
    let starts_first = |late| {
        let how = How { late, ..GLOBAL };
        let (mlir, _) = lower(&scheduled(BF16.program("linear")), hopper(), how).expect("lowers");
        mlir.find("griddepcontrol.launch_dependents") < mlir.find("griddepcontrol.wait")
    };
    assert_eq!([false, true].map(starts_first), [true, false]);
}

/// What of these stands in a kernel, in order.
fn order(mlir: &str, what: &[&str]) -> Vec<usize> {
    let mut found: Vec<(usize, usize)> =
        what.iter().enumerate().flat_map(|(i, w)| mlir.match_indices(w).map(move |(at, _)| (at, i))).collect();
    found.sort_unstable();
    found.into_iter().map(|f| f.1).collect()
}

#[test]
fn weights_are_on_their_way_before_the_launches_before_end() {
    const WHAT: [&str; 3] = ["griddepcontrol.launch_dependents", "griddepcontrol.wait", "mbarrier::complete_tx"];
    let of = |linear: Linear, late| {
        let how = How { late, ..GLOBAL };
        let (mlir, _) = lower(&scheduled(linear.program("linear")), hopper(), how).expect("lowers");
        order(&mlir, &WHAT)
    };
    for linear in [FP8, Linear { tile: [16, 64], ..FP8 }] {
        // One thread waits and copies rows, one copies weights, and the consumers wait.
        assert_eq!(of(linear, false), [0, 1, 2, 2, 1], "{linear:?}");
        assert_eq!(of(linear, true), [1, 0, 2, 2], "{linear:?}");
    }
    // Which weights an expert's rows need is a result of the launches before.
    let (mlir, _) = lower(&scheduled(EXPERTS.program("experts")), hopper(), GLOBAL).expect("lowers");
    assert_eq!(order(&mlir, &WHAT)[..2], [0, 1]);
    assert_eq!(mlir.matches(WHAT[1]).count(), 1);
}

#[test]
fn scores_of_several_tokens() {
    Scores { rows: 8, pages: 4, ..SCORES }.check(&(300..311).collect::<Vec<_>>());
    Scores { rows: 4, paged: false, scaled: false, ..SCORES }.check(&[130, 131, 132, 133, 134]);
    Scores { rows: 2, paged: false, ..SCORES }.check(&[63, 64, 65]);
    Scores { rows: 8, pages: 1, paged: false, fill: false, ..SCORES }.check(&(60..76).collect::<Vec<_>>());
}

#[test]
fn sums_of_many_tokens_are_made_while_others_multiply() {
    let text = |s: Scores| sched::canonical(&clustered(s.program("scores"), 0)).to_string();
    // Two rounds in one and one round, of two products each; the first stage of two is given back with the second in hand.
    let many = text(Scores { rows: 8, paged: false, ..SCORES });
    assert_eq!(many.matches("= dot_t").count(), 6);
    assert_eq!(many.matches("release c1 lag 1").count(), 1);
    // Two tokens have one product a round, and one token leaves it at a round.
    let two = text(Scores { rows: 2, paged: false, ..SCORES });
    assert_eq!(two.matches("= dot_t").count(), 3);
    assert_eq!(two.matches("release c1 lag 1").count(), 1);
    assert_eq!(text(SCORES).matches("= dot_t").count(), 1);
    Scores { rows: 2, pages: 8, paged: false, scaled: false, ..SCORES }.check(&[430, 431, 432, 433]);
    let odd = Scores { rows: 8, pages: 8, paged: false, fill: false, scaled: false, ..SCORES };
    odd.check(&(440..452).collect::<Vec<_>>());
}

#[test]
fn tiles_of_many_tokens_are_dealt_back_and_forth() {
    let turns = |s: Scores| {
        let scheduled = clustered(s.program("scores"), 0);
        (scheduled.persistent, scheduled.folded)
    };
    assert_eq!(turns(Scores { rows: 8, paged: false, ..SCORES }), (Some(1), true));
    assert!(!turns(Scores { rows: 2, ..SCORES }).1);
    assert!(!turns(Scores { rows: 8, select: Some(64), ..SCORES }).1);
}

#[test]
fn blocks_divide_the_rounds_of_rows() {
    let ranges = |s: Scores| {
        let schedule = Schedule { ranges: true, ..Schedule::default() };
        super::schedule(&Kernel { program: s.program("scores"), schedule }, hopper()).expect("scores of Hopper's way")
    };
    let whole = Scores { rows: 2, pages: 64, fill: false, paged: false, scaled: false, ..SCORES };
    let scheduled = ranges(whole);
    let text = sched::canonical(&scheduled).to_string();
    // The producer and the consumers each have both ends; a round is by itself.
    assert_eq!(["= part begin", "= part end", "= dot_t"].map(|s| text.matches(s).count()), [2, 2, 1]);
    let (_, gpu) = lower(&scheduled, hopper(), GLOBAL).expect("lowers");
    assert!(gpu.ranges && gpu.persistent);
    // What a block has is a part, whichever: all is right for the interpreter's.
    whole.check_with(ranges, &[430, 431, 432, 433]);
    Scores { rows: 1, paged: true, ..whole }.check_with(ranges, &[300, 1, 129]);
    Scores { paged: true, scaled: true, fill: true, ..whole }.check_with(ranges, &[300, 1, 129, 64]);
}

#[test]
fn warpgroups_take_stages_in_turns() {
    let two = Scores { rows: 2, pages: 64, fill: false, ..SCORES };
    let plan = |s: Scores| {
        let schedule = Schedule { ranges: true, ..Schedule::default() };
        super::schedule(&Kernel { program: s.program("scores"), schedule }, hopper()).expect("scores of Hopper's way")
    };
    let scheduled = plan(two);
    let [resident, stream] = scheduled.channels.as_slice() else { panic!("{scheduled}") };
    assert_eq!([resident.turns, stream.turns, scheduled.turns(&scheduled.roles[1])], [1, 4, 4]);
    assert_eq!(stream.stages, 8, "{scheduled}");
    // A multiprocessor's warpgroups have one block's queries; their weights come with these, and stay in registers.
    assert_eq!((scheduled.threads, resident.stages, resident.slots.len()), (640, 2, 2), "{scheduled}");
    let text = sched::canonical(&scheduled).to_string();
    assert!(!text.contains("@shared") && !text.contains("barrier"), "{text}");
    let (mlir, _) = lower(&scheduled, hopper(), GLOBAL).expect("lowers");
    assert!(mlir.contains("setmaxnreg.inc") && mlir.contains("nvvm.minctasm = 1"), "{mlir}");
    // A token's rows leave room for several blocks.
    assert!(plan(Scores { rows: 1, ..two }).channels.iter().all(|c| c.turns == 1));
}

#[test]
fn selections_grow_with_scores() {
    let select = |k| Scores { rows: 8, select: Some(k), ..SCORES };
    select(64).check(&(300..311).collect::<Vec<_>>());
    Scores { rows: 4, paged: false, ..select(512) }.check(&[130, 700, 132, 133, 134]);
}

impl Select {
    /// Rows of so many columns, on the emulator: what is selected of them is what the tile interpreter selects.
    fn check(self, lengths: &[u32], value: impl Fn(u32) -> f32) {
        // Where blocks share a multiprocessor, fewer columns are short.
        for sharing in [1, 2] {
            self.check_blocks((1, sharing), lengths, &value);
        }
    }

    /// By clusters of so many blocks, of which a multiprocessor has so many.
    fn check_blocks(self, (cluster, sharing): (u32, u32), lengths: &[u32], value: &dyn Fn(u32) -> f32) {
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let (rows, pages) = (lengths.len() as u32, longest.div_ceil(64));
        let syms = SymValues([rows; 6]).with(Sym::P, pages).with(Sym::N, rows * pages).with(Sym::C, longest);
        let schedule = Schedule { cluster, sharing, ..Schedule::default() };
        let kernel = Kernel { program: self.program("select"), schedule };
        let lowered = crate::nvidia::lower::lower(&kernel, hopper()).expect("lowers");
        assert!(lowered.sched.contains("threads 512"), "a row is selected from at once");
        assert!(lowered.mlir.contains("ld.global.nc.v4"), "columns are read four at a time");
        let ints = |v: &mut dyn Iterator<Item = i32>| v.flat_map(i32::to_le_bytes).collect::<Vec<u8>>();
        let x = (0..rows * longest).flat_map(|i| value(i).to_le_bytes()).collect();
        let mut buffers = vec![x, ints(&mut lengths.iter().map(|&n| n as i32 - 1))];
        if self.slots {
            buffers.push(ints(&mut (0..rows as i32)));
            buffers.push(ints(&mut (0..(rows * pages) as i32).rev()));
        }
        buffers.push(vec![0; (rows * self.k * 4) as usize]);
        let bindings: Vec<Binding> = (0..buffers.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
        let (mut want, mut got) = (buffers.clone(), buffers);
        interp::run(&kernel.program, &syms, &mut want, &bindings).expect("runs");
        crate::nvidia::lower::emulate::run_blocks(&kernel.program, &lowered, &syms, &mut got, &bindings, 5)
            .expect("runs");
        assert!(got == want, "{self:?} of {lengths:?}");
    }
}

/// Numbers of no order.
fn scattered(i: u32) -> f32 {
    (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 16384.0 - 512.0
}

const SELECT: Select = Select { k: 96, step: 128, slots: false };

#[test]
fn short_rows_are_all_candidates() {
    SELECT.check(&[700, 50, 96, 1], scattered);
    Select { slots: true, ..SELECT }.check(&[300, 20], |i| (i % 5) as f32);
    // Rows that begin anywhere; more equal ones than there are places, few that can be selected, and zeros of both signs.
    SELECT.check(&[8191, 7002, 2, 1, 95], scattered);
    SELECT.check(&[5003, 501, 97], |_| 1.5);
    SELECT.check(&[903, 811], |i| if i % 13 == 0 { scattered(i) } else { f32::NEG_INFINITY });
    SELECT.check(&[803], |i| if i % 2 == 0 { 0.0 } else { -0.0 });
    SELECT.check(&[603, 601], |i| if i % 9 == 0 { f32::INFINITY } else { f32::from_bits(0x3f80_0000 + i % 70) });
}

#[test]
fn samples_find_the_best_of_long_rows() {
    SELECT.check(&[20001, 8193, 8203, 16385], scattered);
    SELECT.check(&[40003], scattered);
    SELECT.check(&[10000], |i| (i % 3) as f32);
    Select { k: 2048, step: 512, ..SELECT }.check(&[16500], |i| scattered(i) / scattered(i + 1));
}

#[test]
fn rows_are_spread_over_the_blocks_of_a_cluster() {
    for cluster in [2, 8] {
        let check = |select: Select, lengths: &[u32], value: &dyn Fn(u32) -> f32| {
            select.check_blocks((cluster, 1), lengths, value);
        };
        check(SELECT, &[20001, 8193, 8190, 50], &scattered);
        // Of equal ones the first, which are the first block's, or all of a block's and some of the next.
        check(SELECT, &[9003], &|_| 1.5);
        check(Select { k: 2048, step: 512, ..SELECT }, &[9003, 10001], &|i| {
            if i % 9 == 0 { 2.0 } else { (i % 4) as f32 }
        });
        check(SELECT, &[9001], &|i| if i % 1013 == 0 { scattered(i) } else { f32::NEG_INFINITY });
        check(Select { slots: true, ..SELECT }, &[10002, 8700], &|i| f32::from_bits(0x3f80_0000 + i % 700));
    }
    // More columns a thread, and a sample.
    SELECT.check_blocks((2, 1), &[32001, 33001], &scattered);
}

#[test]
fn bounds_say_what_may_be_the_best() {
    let many = Select { k: 2048, step: 512, ..SELECT };
    // Two blocks a multiprocessor read a row twice; of values that are few, or that are the largest of few groups, too many reach the bound.
    for value in [&scattered as &dyn Fn(u32) -> f32, &|i| (i % 5) as f32, &|i| (i / 128 % 8) as f32, &|i| i as f32] {
        many.check_blocks((1, 2), &[30011], value);
    }
    SELECT.check_blocks((1, 2), &[25003, 32760], &scattered);
    // Four blocks, of which one has all of the best: others' bounds are no bounds.
    for value in [&scattered as &dyn Fn(u32) -> f32, &|i| scattered(i) + if i / 128 % 4 == 1 { 2048.0 } else { 0.0 }] {
        many.check_blocks((4, 1), &[40003], value);
        many.check_blocks((2, 1), &[40001], value);
    }
    many.check_blocks((4, 1), &[34000], &|i| if i % 40 == 0 { scattered(i) } else { f32::NEG_INFINITY });
    SELECT.check_blocks((4, 1), &[50001, 66000], &|i| -(i as f32));
}

#[test]
fn rows_of_which_samples_say_little_are_counted() {
    SELECT.check(&[33000], |i| if i % 7 == 0 { f32::NEG_INFINITY } else { 1.5 });
}
