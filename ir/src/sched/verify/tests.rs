use super::*;
use crate::sched::parse;
use expect_test::{Expect, expect};

const LIMITS: Budget =
    Budget { shared_bytes: 65536, registers: 65536, thread_registers: 255, named_barriers: 15, threads: 1024 };

/// Verifies a kernel of `T` rows: a readable %x, a writable %y and buffers b0, b1 of 1x64 f32, one behind the other.
fn check(rest: &str, expected: Expect) {
    check_kernel(
        &format!(
            "scheduled k grid(T/1) threads 128
             read %x: view<[T, 64] f32> write %y: view<[T, 64] f32>
             buffer b0 = first: f32 1x64, offset 0, bytes 256, pitch 256, swizzle 0, copies 1
             buffer b1 = second: f32 1x64, offset 256, bytes 256, pitch 256, swizzle 0, copies 1
             {rest}"
        ),
        expected,
    );
}

fn check_kernel(text: &str, expected: Expect) {
    let kernel = parse(text).unwrap_or_else(|e| panic!("{e}\n{text}")).remove(0);
    let lines: Vec<String> = verify(&kernel, &LIMITS).iter().map(|d| d.to_string()).collect();
    expected.assert_eq(&lines.join("\n"));
}

#[test]
fn types_and_scopes_are_those_of_tile_programs() {
    check(
        "{ %2 = load %x[0, 0] : tile<1x64xbf16> @lazy }",
        expect!["kernel k, inst %2: %2 is declared tile<1x64xbf16>, but is tile<1x64xf32>"],
    );
    check(
        "channel c0 = ring: stages 1, slots [b0]
         { } role a warps 0..2 { acquire c0 copy c0.0, %x[0, 64] : tile<1x64xf32> commit c0
             %2 = block_id 0 : i32 @uniform }
         role b warps 2..4 { wait c0 %3 = take c0.0 : tile<1x64xf32> @slot(c0, 0) release c0 lag 0 }",
        expect!["kernel k, copy c0.0: index 64 of dim 1 is outside %x, view<[T, 64] f32>"],
    );
}

#[test]
fn only_persistent_blocks_have_turns() {
    check_kernel(
        "scheduled k grid(T/1) folded threads 32 { }",
        expect!["kernel k: turns that go back and forth are those of a persistent kernel"],
    );
}

#[test]
fn all_roles_have_both_ends_of_their_part() {
    let role = |name: &str, warps: &str, ends: &str| {
        format!(
            "role {name} warps {warps} {{ %{name}a = sym T : i32 @uniform %{name}b = sym C : i32 @uniform {ends} }}\n"
        )
    };
    let part = |name: &str, end: &str| format!("%{name}{end} = part {end} %{name}a to %{name}b : i32 @uniform ");
    let both = |name: &str| part(name, "begin") + &part(name, "end");
    let kernel = |how: &str, b: &str| {
        let (a, b) = (role("x", "0..1", &both("x")), role("y", "1..2", b));
        format!("scheduled k grid(T/1) {how} threads 64 {{ }}\n{a}{b}")
    };
    check_kernel(&kernel("persistent 1", &both("y")), expect![""]);
    check_kernel(
        &kernel("persistent 1", &part("y", "begin")),
        expect!["kernel k, y: all roles have both ends of their part of a tile, once"],
    );
    check_kernel(
        &kernel("persistent 1", &format!("for %yi = 0 to 2 step 1 {{ {} }}", both("y"))),
        expect![[r#"
            kernel k, y: all roles have both ends of their part of a tile, once
            kernel k: parts of tiles are those of blocks that are persistent and each by themselves, in the bodies of roles"#]],
    );
    check_kernel(
        &kernel("persistent 1 folded", &both("y")),
        expect![
            "kernel k: parts of tiles are those of blocks that are persistent and each by themselves, in the bodies of roles"
        ],
    );
}

/// A role's part of `T..C`.
fn both_ends(role: &str) -> String {
    format!(
        "%{role}a = sym T : i32 @uniform %{role}b = sym C : i32 @uniform
         %{role}lo = part begin %{role}a to %{role}b : i32 @uniform %{role}hi = part end %{role}a to %{role}b : i32 @uniform"
    )
}

#[test]
fn parts_take_stages_in_turns_alone() {
    let stages = |turns: &str, warps: &str, consumer: &str| {
        format!(
            "scheduled k grid(T/1) persistent 1 threads 160
             read %x: view<[T, 64] f32> write %y: view<[T, 64] f32>
             buffer b0 = ring: f32 1x64, offset 0, bytes 1024, pitch 256, swizzle 0, copies 4
             channel c0 = ring: stages 4, {turns}slots [b0]
             {{ }}
             role x warps 0..1 {{ {} for %i = %xlo to %xhi step 1 {{
                 acquire c0 copy c0.0, %x[%i, 0] : tile<1x64xf32> commit c0 }} }}
             role y warps {warps} {{ {} {consumer} }}",
            both_ends("x"),
            both_ends("y"),
        )
    };
    let round = "wait c0 %t = take c0.0 : tile<1x64xf32> @slot(c0, 0) store %y[%j, 0], %t release c0 lag 0";
    let rounds = |what: &str| format!("for %j = %ylo to %yhi step 1 {{ {what} }}");
    check_kernel(&stages("turns 2, ", "1..5", &rounds(round)), expect![""]);
    check_kernel(
        &stages("turns 3, ", "1..5", &rounds(round)),
        expect!["kernel k, channel c0: 4 stages are no multiple of 3 turns"],
    );
    check_kernel(
        &stages("turns 2, ", "1..4", &rounds(round)),
        expect!["kernel k, role y: warps 1..4 are no 2 parts that take turns"],
    );
    check_kernel(
        &stages("turns 2, ", "1..5 elected", &rounds(round)),
        expect!["kernel k, role y: warps 1..5 are no 2 parts that take turns"],
    );
    check_kernel(
        &stages("turns 2, ", "1..5", &rounds(&format!("barrier {round}"))),
        expect!["kernel k, role y: parts that take turns meet no barrier, fill no stage and have no scratch"],
    );
    // All rounds of a tile are not the block's, and every second is not each.
    for elsewhere in ["%ya to %yb step 1", "%ylo to %yhi step 2"] {
        check_kernel(
            &stages("turns 2, ", "1..5", &format!("for %j = {elsewhere} {{ {round} }}")),
            expect!["kernel k, role y: waits in turns for c0 otherwise than once in each round of its part"],
        );
    }
    check_kernel(
        &stages("turns 2, ", "1..5", &rounds(&format!("{round} wait c0 release c0 lag 0"))),
        expect!["kernel k, role y: waits in turns for c0 otherwise than once in each round of its part"],
    );
    check_kernel(
        "scheduled k grid(T/1) persistent 1 threads 160
         read %x: view<[T, 64] f32>
         buffer b0 = ring: f32 1x64, offset 0, bytes 1024, pitch 256, swizzle 0, copies 4
         channel c0 = ring: stages 4, turns 2, slots [b0]
         { }
         role x warps 0..1 { for %i = 0 to 4 step 1 { acquire c0 copy c0.0, %x[%i, 0] : tile<1x64xf32> commit c0 } }
         role y warps 1..5 { for %j = 0 to 4 step 1 { wait c0 release c0 lag 0 } }",
        expect![[r#"
            kernel k: stages are taken in turns where blocks divide the rounds of tiles
            kernel k, role y: waits in turns for c0 otherwise than once in each round of its part"#]],
    );
}

#[test]
fn what_is_taken_in_turns_together_is_so_by_as_many() {
    check_kernel(
        &format!(
            "scheduled k grid(T/1) persistent 1 threads 160
             read %x: view<[T, 64] f32>
             buffer b0 = first: f32 1x64, offset 0, bytes 1024, pitch 256, swizzle 0, copies 4
             buffer b1 = second: f32 1x64, offset 1024, bytes 1024, pitch 256, swizzle 0, copies 4
             channel c0 = first: stages 4, turns 2, slots [b0]
             channel c1 = second: stages 4, turns 4, slots [b1]
             {{ }}
             role x warps 0..1 {{ {} for %i = %xlo to %xhi step 1 {{
                 acquire c0 copy c0.0, %x[%i, 0] : tile<1x64xf32> commit c0
                 acquire c1 copy c1.0, %x[%i, 0] : tile<1x64xf32> commit c1 }} }}
             role y warps 1..5 {{ {} for %j = %ylo to %yhi step 1 {{
                 wait c0 wait c1 release c0 lag 0 release c1 lag 0 }} }}",
            both_ends("x"),
            both_ends("y"),
        ),
        expect!["kernel k, role y: takes stages of some channels in 4 turns, of others in fewer"],
    );
}

#[test]
fn values_of_a_role_are_its_own() {
    let mut kernel = parse(
        "scheduled k grid(T/1) threads 64 { }
         role a warps 0..1 { %0 = sym T : i32 @uniform } role b warps 1..2 { %1 = sym T : i32 @uniform }",
    )
    .unwrap()
    .remove(0);
    let read = crate::tile::Op::Reshape { x: crate::tile::ValueId(0), shape: Vec::new() };
    kernel.roles[1].body.insts[0].op = crate::sched::Op::Tile(read);
    let messages: Vec<String> = verify(&kernel, &LIMITS).iter().map(|d| d.to_string()).collect();
    assert_eq!(messages, ["kernel k, inst %1: %0 is used but not defined here"]);
}

#[test]
fn places() {
    check(
        "{ %2 = load %x[0, 0] : tile<1x64xf32> @uniform
           %3 = load %x[0, 0] : tile<2x64xf32> @shared(b0)
           %4 = load %x[0, 0] : tile<1x64xf32> @shared(b7)
           %5 = reduce sum %2 axis 1 : tile<1x1xf32> @lazy
           %6 = load %x[0, 0] : tile<1x64xf32> @frag(mma16x8, 2x1)
           %7 = load %x[0, 0] : tile<1x64xf32> @slot(c0, 0) }",
        expect![[r#"
            kernel k, common, inst %2: %2, tile<1x64xf32>, is no single element, so it is not @uniform
            kernel k, common, inst %3: %3, tile<2x64xf32>, does not fit b0, f32 1x64
            kernel k, common, inst %4: there is no buffer b7
            kernel k, common, inst %5: %5, tile<1x1xf32>, is @lazy, but only elementwise operations, loads and changes of shape are
            kernel k, common, inst %6: %6, tile<1x64xf32>, is spread over 2 warps, but there are 4
            kernel k, common, inst %7: %7, tile<1x64xf32>, is @slot(c0, 0), which only a take from it gives"#]],
    );
}

#[test]
fn roles_and_tables() {
    check(
        "channel c0 = ring: stages 2, slots [b0, b0, b9]
         { } role a warps 0..3 registers 30 { } role a warps 2..5 elected { barrier }",
        expect![[r#"
            kernel k, channel c0: b0 has 1 copies for 2 stages
            kernel k, channel c0: b0 is a slot twice
            kernel k, channel c0: there is no buffer b9
            kernel k, role a: registers move between groups of four warps, so the role's warps are such groups
            kernel k, role a: registers of a thread come in multiples of 8
            kernel k, role a: roles have different names, each an identifier
            kernel k, role a: warps 2..5 are not within the block's 4
            kernel k, role a: warps 2..5 are also of role a, 0..3"#]],
    );
    check(
        "{ } role a warps 1..4 { %2 = full 0.0 : tile<64x64xf32> @frag(wgmma, 1x1) }
         role b warps 0..1 elected { barrier %3 = load %x[0, 0] : tile<1x64xf32> @shared(b0) }",
        expect![[r#"
            kernel k, role a, inst %2: %2, tile<64x64xf32>, is by groups of four warps, but warps 1..4 are not such groups
            kernel k, role b, barrier: a single thread meets no barrier and has no scratch memory
            kernel k, role b, inst %3: %3, tile<1x64xf32>, is @shared(b0), but a single thread has values of its own only"#]],
    );
}

#[test]
fn budgets_come_with_the_table() {
    check_kernel(
        "scheduled k grid(T/1) threads 2048
         buffer b0 = small: f32 8x64, offset 0, bytes 2048, pitch 256, swizzle 0, copies 1
         buffer b1 = large: bf16 512x64, offset 2048, bytes 65536, pitch 128, swizzle 128, copies 1
         { } role a warps 0..4 registers 240 {
             %0 = full 0.0 : tile<128x512xf32> @frag(wgmma, 1x1)
             %1 = full 1.0 : tile<128x512xf32> @frag(wgmma, 1x1)
             %2 = map(%0, %1) { a, b -> t0 = add a, b; t0 } : tile<128x512xf32> @frag(wgmma, 1x1) }
         role b warps 4..20 registers 240 { }",
        expect![[r#"
            kernel k: 2048 threads, but a block has at most 1024
            kernel k: 67584 bytes of shared memory, but a block has 65536; choose smaller tiles or fewer stages
                b1 = large: bf16 512x64, offset 2048, bytes 65536, pitch 128, swizzle 128, copies 1
                b0 = small: f32 8x64, offset 0, bytes 2048, pitch 256, swizzle 0, copies 1
            kernel k: roles have 153600 registers together, but a block has 65536
            kernel k: a keeps 1024 registers a thread, but has 240; spread its tiles over more warps"#]],
    );
}

/// 65536 registers are 102 for each of 640 threads, of which a launch gives them 96.
#[test]
fn registers_that_no_launch_gives_are_not_there_to_move() {
    let kernel = |registers: u32| {
        format!(
            "scheduled k grid(T/1) threads 640
             {{ }} role a warps 0..16 registers {registers} {{ }} role b warps 16..20 registers 40 {{ }}"
        )
    };
    check_kernel(&kernel(104), expect![""]);
    check_kernel(&kernel(112), expect!["kernel k: roles have 62464 registers together, but a block has 61440"]);
}

/// A ring of two stages, filled and emptied by roles of their own.
fn ring(producer: &str, consumer: &str, expected: Expect) {
    check_kernel(
        &format!(
            "scheduled k grid(T/1) threads 64
             read %x: view<[T, 64] f32> write %y: view<[T, 64] f32>
             buffer b0 = tiles: f32 1x64, offset 0, bytes 512, pitch 256, swizzle 0, copies 2
             channel c0 = ring: stages 2, slots [b0]
             {{ %n = sym T : i32 @uniform %m = sym C : i32 @uniform }}
             role producer warps 0..1 elected {{ {producer} }}
             role consumer warps 1..2 {{ {consumer} }}"
        ),
        expected,
    );
}

const FILL: &str = "acquire c0 copy c0.0, %x[0, 0] : tile<1x64xf32> commit c0";
const TAKE: &str = "wait c0 %t = take c0.0 : tile<1x64xf32> @slot(c0, 0)";

#[test]
fn channels_that_pair_up() {
    let take = format!("{TAKE} store %y[0, 0], %t");
    // Peeled, lagging, and with a trip count that each side computes for itself.
    ring(
        &format!(
            "%h = map(%n) {{ a -> t0 = mul a, 3; t1 = add t0, 1; t1 }} : i32 @uniform for %i = 0 to %h step 2 {{ {FILL} }} {FILL}"
        ),
        &format!(
            "{TAKE} store %y[0, 0], %t
             %k = map(%n) {{ a -> t0 = mul a, 3; t1 = add t0, 1; t1 }} : i32 @uniform
             for %j = 0 to %k step 2 {{ {} release c0 lag 1 }} release c0 lag 0",
            take.replace("%t", "%u")
        ),
        expect![""],
    );
}

#[test]
fn channels_that_do_not() {
    let take = format!("{TAKE} store %y[0, 0], %t");
    let lopsided = |producer: &str, consumer: &str, expected| {
        ring(
            &format!("for %i = 0 to {producer} step 1 {{ {FILL} }}"),
            &format!("for %j = 0 to {consumer} step 1 {{ {take} release c0 lag 0 }}"),
            expected,
        );
    };
    lopsided("%n", "%n", expect![""]);
    lopsided(
        "7",
        "8",
        expect!["kernel k, role consumer, wait c0: waits for ever: no stage is committed (where sizes are 0)"],
    );
    lopsided(
        "8",
        "7",
        expect!["kernel k, channel c0: 8 stages are committed, but consumer waits for 7 (where sizes are 0)"],
    );
    lopsided(
        "12",
        "7",
        expect!["kernel k, role producer, acquire c0: waits for ever: no stage is given back (where sizes are 0)"],
    );
    lopsided("%n", "%m", expect!["kernel k, role consumer, wait c0: waits for ever: no stage is committed"]);
    let looped = |body: &str, expected| {
        let fill = format!("for %i = 0 to 4 step 1 {{ {FILL} }}");
        ring(&fill, &format!("for %j = 0 to 4 step 1 {{ {body} }}"), expected);
    };
    looped(
        &take,
        expect![
            "kernel k, role producer, acquire c0: waits for ever: no stage is given back (where sizes are 0)\nkernel k, role consumer, wait c0: waits for ever: no stage is committed (where sizes are 0)"
        ],
    );
    looped(
        &format!("{take} release c0 lag 2"),
        expect!["kernel k, role consumer, release c0: a lag of 2 keeps all 2 stages: the producer never gets one"],
    );
    looped(
        &format!("{take} release c0 lag 1"),
        expect!["kernel k, role consumer, release c0: releases with a lag of 1 after 1 waits"],
    );
    looped(
        &format!("{TAKE} release c0 lag 0 store %y[0, 0], %t"),
        expect!["kernel k, role consumer, store of %6: reads %6 after its stage of c0 was released"],
    );
    looped(
        &format!("{take} release c0 lag 0 release c0 lag 0"),
        expect!["kernel k, role consumer, release c0: releases stage 1 where 2 is the next in order"],
    );
}

#[test]
fn a_stage_is_filled_between_acquire_and_commit() {
    let take = format!("{TAKE} store %y[0, 0], %t release c0 lag 0");
    ring(
        "acquire c0 commit c0",
        &take,
        expect!["kernel k, role producer, commit c0: commits a stage whose slot 0 is not filled"],
    );
    ring(
        "copy c0.0, %x[0, 0] : tile<1x64xf32> acquire c0 commit c0",
        &take,
        expect!["kernel k, role producer, copy c0.0: fills a stage that it did not acquire"],
    );
    ring(
        "acquire c0 acquire c0",
        &take,
        expect!["kernel k, role producer, acquire c0: acquires a stage before it committed the last one"],
    );
    ring("", &take, expect!["kernel k, channel c0: a channel has one producer; this has none"]);
    ring(&format!("{FILL} {take}"), "", expect![""]);
}

#[test]
fn crossed_channels_hang() {
    let kernel = |first: &str, second: &str| {
        format!(
            "scheduled k grid(T/1) threads 64
             read %x: view<[T, 64] f32>
             buffer b0 = there: f32 1x64, offset 0, bytes 256, pitch 256, swizzle 0, copies 1
             buffer b1 = back: f32 1x64, offset 256, bytes 256, pitch 256, swizzle 0, copies 1
             channel c0 = there: stages 1, slots [b0]
             channel c1 = back: stages 1, slots [b1]
             {{ }}
             role a warps 0..1 {{ {first} }}
             role b warps 1..2 {{ wait c0 release c0 lag 0 {second} }}"
        )
    };
    let fill = |c: u32| format!("acquire c{c} copy c{c}.0, %x[0, 0] : tile<1x64xf32> commit c{c}");
    check_kernel(&kernel(&format!("{} wait c1 release c1 lag 0", fill(0)), &fill(1)), expect![""]);
    check_kernel(
        &kernel(&format!("wait c1 release c1 lag 0 {}", fill(0)), &fill(1)),
        expect![[r#"
            kernel k, role a, wait c1: waits for ever: no stage is committed (where sizes are 0)
            kernel k, role b, wait c0: waits for ever: no stage is committed (where sizes are 0)"#]],
    );
}

#[test]
fn channels_to_and_fro_may_have_one_buffer() {
    let kernel = |stages: u32, a: &str, b: &str| {
        format!(
            "scheduled k grid(T/1) persistent 1 threads 64
             read %x: view<[T, 64] f32>
             buffer b0 = both: f32 1x64, offset 0, bytes {}, pitch 256, swizzle 0, copies {stages}
             channel c0 = there: stages {stages}, slots [b0]
             channel c1 = back: stages {stages}, slots [b0]
             {{ }}
             role a warps 0..1 {{ %n = sym C : i32 @uniform for %i = 0 to %n step 1 {{ {a} }} }}
             role b warps 1..2 {{ %m = sym C : i32 @uniform for %j = 0 to %m step 1 {{ {b} }} }}",
            256 * stages
        )
    };
    let fill = |c: u32| format!("acquire c{c} copy c{c}.0, %x[0, 0] : tile<1x64xf32> commit c{c} ");
    let empty = |c: u32| format!("wait c{c} release c{c} lag 0 ");
    let there_and_back = [fill(0) + &empty(1), empty(0) + &fill(1)];
    check_kernel(&kernel(1, &there_and_back[0], &there_and_back[1]), expect![""]);
    // Nothing may come back.
    check_kernel(&kernel(1, &(fill(0) + &empty(1) + &fill(0)), &(empty(0) + &fill(1) + &empty(0))), expect![""]);
    check_kernel(
        &kernel(1, &there_and_back[0], &format!("wait c0 {} release c0 lag 0", fill(1))),
        expect!["kernel k, role b, acquire c1: fills a buffer that c0 has too, of which a stage is full or held"],
    );
    check_kernel(
        &kernel(1, &(fill(0) + &fill(0) + &empty(1)), &(empty(0) + &fill(1) + &empty(0))),
        expect!["kernel k, role a, acquire c0: c0 and c1 have a buffer in common, and both may be filled at once"],
    );
    check_kernel(
        &kernel(2, &there_and_back[0], &there_and_back[1]),
        expect![[r#"
            kernel k, channel c0: has a buffer of c1, and the two are not of one stage each, to and fro between two roles
            kernel k, channel c1: has a buffer of c0, and the two are not of one stage each, to and fro between two roles"#]],
    );
}

#[test]
fn warps_overwrite_their_own_rows_of_a_buffer_of_two_channels() {
    let kernel = |between: &str, left: &str, right: &str| {
        format!(
            "scheduled k grid(T/1) threads 256
             read %x: view<[T, 64] bf16>
             write %y: view<[T, 64] f32>
             buffer b0 = both: bf16 64x64, offset 0, bytes 8192, pitch 128, swizzle 128, copies 1
             buffer b1 = values: bf16 64x64, offset 8192, bytes 8192, pitch 128, swizzle 128, copies 1
             channel c0 = there: stages 1, slots [b0]
             channel c1 = back: stages 1, slots [b0]
             channel c2 = values: stages 1, slots [b1]
             {{ }}
             role a warps 0..4 {{ acquire c0 copy c0.0, %x[0, 0] : tile<64x64xbf16> commit c0
                 acquire c2 copy c2.0, %x[0, 0] : tile<64x64xbf16> commit c2 wait c1 release c1 lag 0 }}
             role b warps 4..8 {{ wait c0 %p = take c0.0 : tile<64x64xbf16> @slot(c0, 0)
                 wait c2 %v = take c2.0 : tile<64x64xbf16> @slot(c2, 0)
                 %d = dot %{left}, %{right} : tile<64x64xf32> @frag(wgmma, 1x1)
                 %w = map(%d) {{ a -> t0 = cast<bf16> a; t0 }} : tile<64x64xbf16> @frag(wgmma, 1x1)
                 release c0 lag 0 release c2 lag 0 {between} acquire c1 fill c1.0, %w commit c1 }}"
        )
    };
    check_kernel(&kernel("", "p", "v"), expect![""]);
    check_kernel(
        &kernel("", "v", "p"),
        expect![
            "kernel k, role b, fill c1.0: fills b0, which other threads may still read by another channel, without a barrier between"
        ],
    );
    check_kernel(
        &kernel("", "p", "p"),
        expect![
            "kernel k, role b, fill c1.0: fills b0, which other threads may still read by another channel, without a barrier between"
        ],
    );
    check_kernel(&kernel("barrier", "v", "p"), expect![""]);
}

#[test]
fn barriers() {
    let load = "%2 = load %x[0, 0] : tile<1x64xf32> @shared(b0)";
    check(&format!("{{ {load} barrier store %y[0, 0], %2 }}"), expect![""]);
    check(
        &format!("{{ {load} store %y[0, 0], %2 }}"),
        expect!["kernel k, common, store of %2: reads b0, written by other threads, without a barrier between"],
    );
    // A lazy value reads where it is used.
    check(
        &format!(
            "{{ {load} barrier %3 = map(%2) {{ a -> t0 = neg a; t0 }} : tile<1x64xf32> @lazy
           %4 = load %x[1, 0] : tile<1x64xf32> @shared(b1) store %y[0, 0], %3 }}"
        ),
        expect![""],
    );
    check(
        &format!("{{ {load} barrier store %y[0, 0], %2 %3 = load %x[1, 0] : tile<1x64xf32> @shared(b0) }}"),
        expect!["kernel k, common, inst %3: writes b0, read by other threads, without a barrier between"],
    );
    // On the way round a loop.
    check(
        "{ for %i = 0 to 4 step 1 { %2 = load %x[%i, 0] : tile<1x64xf32> @shared(b0) barrier store %y[%i, 0], %2 } }",
        expect!["kernel k, common, inst %3: writes b0, read by other threads, without a barrier between"],
    );
    check(
        "{ for %i = 0 to 4 step 1 { %2 = load %x[%i, 0] : tile<1x64xf32> @shared(b0) barrier store %y[%i, 0], %2 barrier } }",
        expect![""],
    );
    // A barrier in one arm only.
    check(
        &format!("{{ {load} %3 = full true : bool @uniform if %3 {{ barrier }} store %y[0, 0], %2 }}"),
        expect!["kernel k, common, store of %2: reads b0, written by other threads, without a barrier between"],
    );
    // What common writes is settled by a barrier there, not by one of the role.
    let role = "role a warps 0..2 { barrier store %y[0, 0], %2 }";
    check(
        &format!("{{ {load} }} {role}"),
        expect![
            "kernel k, role a, store of %2: reads b0, written by other threads in common, without a barrier between"
        ],
    );
    check(&format!("{{ {load} barrier }} {role}"), expect![""]);
}

#[test]
fn what_is_overwritten_in_place() {
    let load = "%2 = load %x[0, 0] : tile<1x64xf32> @shared(b0) barrier";
    check(&format!("{{ {load} %3 = map(%2) {{ a -> t0 = neg a; t0 }} : tile<1x64xf32> @shared(b0) }}"), expect![""]);
    check(
        &format!(
            "{{ {load} %4 = slice %2 [0, 1] : tile<1x32xf32> @lazy %5 = concat %4, %4 axis 1 : tile<1x64xf32> @shared(b0) }}"
        ),
        expect!["kernel k, common, inst %4: reads and overwrites b0 at once, and not element by element"],
    );
}

#[test]
fn buffers_that_live_at_once() {
    let two = |between: &str, end: &str| {
        format!(
            "{{ %2 = load %x[0, 0] : tile<1x64xf32> @shared(b0) barrier {between}
                %3 = load %x[1, 0] : tile<1x64xf32> @shared(b0) barrier store %y[0, 0], %3 {end} }}"
        )
    };
    check(&two("store %y[1, 0], %2 barrier", ""), expect![""]);
    check(
        &two("", "store %y[1, 0], %2"),
        expect!["kernel k, common: b0 for %2 and b0 for %3 are needed at once and overlap"],
    );
    check_kernel(
        "scheduled k grid(T/1) threads 64
         read %x: view<[T, 64] f32> write %y: view<[T, 64] f32>
         buffer b0 = first: f32 1x64, offset 0, bytes 256, pitch 256, swizzle 0, copies 1
         buffer b1 = second: f32 1x64, offset 128, bytes 256, pitch 256, swizzle 0, copies 1
         { %2 = load %x[0, 0] : tile<1x64xf32> @shared(b0) barrier
           for %i = 0 to 2 step 1 { store %y[%i, 0], %2 barrier %3 = load %x[1, 0] : tile<1x64xf32> @shared(b1) barrier } }",
        expect!["kernel k, common: b0 for %2 and b1 for %4 are needed at once and overlap"],
    );
}

#[test]
fn roles_run_at_once() {
    check(
        "{ } role a warps 0..2 { %2 = load %x[0, 0] : tile<1x64xf32> @shared(b0) }
         role b warps 2..4 { %3 = load %x[0, 0] : tile<1x64xf32> @shared(b0) }",
        expect!["kernel k: b0 of role a and b0 of role b overlap, and roles run at once"],
    );
}
