//! Each fault, by a kernel that has it and one that is right.

mod common;

use common::Snippet;
use dsc_cdna::Cause;

const CHIP: &str = "gfx942";

fn cause(body: &str) -> Cause {
    Snippet::new(CHIP, body).cause()
}

#[test]
fn accesses_outside_of_memory() {
    let body = "v_mov_b32 v3, 1\n global_store_dword v1, v3, s[6:7] offset:4";
    assert!(matches!(cause(body), Cause::GlobalBounds { lane: 63, what: "writes", bytes: 4, .. }), "{:?}", cause(body));
    let body = "global_load_dword v3, v1, s[4:5] offset:-4\n s_waitcnt vmcnt(0)";
    assert!(matches!(cause(body), Cause::GlobalBounds { lane: 0, what: "reads", .. }));
    // A sum of which the carry is dropped leads nowhere.
    let body = "s_add_u32 s4, s4, 0x2000\n s_load_dword s8, s[4:5], 0x0\n s_waitcnt lgkmcnt(0)";
    assert!(matches!(cause(body), Cause::GlobalBounds { .. }));
    assert!(matches!(cause("s_load_dword s8, s[4:5], 0x100"), Cause::GlobalBounds { .. }));
    assert!(matches!(cause("v_mov_b32 v3, 1\n global_store_dword v1, v3, s[4:5]"), Cause::ReadOnly { lane: 0, .. }));
    // Lanes that are not active access nothing.
    let body = "v_mov_b32 v3, 1\n s_mov_b64 exec, 0xff\n global_store_dword v1, v3, s[6:7] offset:200";
    assert_eq!(Snippet::new(CHIP, body).words().iter().sum::<u32>(), 8);
}

#[test]
fn accesses_outside_of_lds() {
    let lds = |body: &str| Snippet::new(CHIP, body).lds(256).cause();
    let bounds = |cause| matches!(cause, Cause::LdsBounds { lane: 63, size: 256, .. });
    assert!(bounds(lds("ds_write_b32 v1, v0 offset:4")));
    assert!(bounds(lds("ds_read_b32 v4, v1 offset:4\n s_waitcnt lgkmcnt(0)")));
    assert!(matches!(lds("v_add_u32 v1, 2, v1\n ds_write_b32 v1, v0"), Cause::Misaligned { lane: 0, .. }));
    assert!(matches!(
        lds("v_add_u32 v1, 4, v1\n ds_write_b64 v1, v[0:1]"),
        Cause::Misaligned { lane: 0, bytes: 8, .. }
    ));
    assert!(matches!(lds("v_mov_b32 v1, -4\n ds_write_b32 v1, v0"), Cause::LdsBounds { lane: 0, .. }));
}

#[test]
fn loads_that_nothing_waited_for() {
    let load = "global_load_dword v2, v1, s[4:5]\n global_load_dword v3, v1, s[4:5]\n";
    let wait = |count: u32, of: u32| format!("{load} s_waitcnt vmcnt({count})\n v_add_u32 v4, v{of}, v{of}");
    assert_eq!(cause(&wait(1, 3)), Cause::Pending("v3".into()));
    Snippet::new(CHIP, &wait(1, 2)).words();
    Snippet::new(CHIP, &wait(0, 3)).words();
    // The other counter does not cover it.
    assert_eq!(cause(&format!("{load} s_waitcnt lgkmcnt(0)\n v_mov_b32 v4, v2")), Cause::Pending("v2".into()));
    // Overwriting is wrong too: the load would come later.
    assert_eq!(cause(&format!("{load} v_mov_b32 v2, 0")), Cause::Pending("v2".into()));
    // But not by another load, which comes later still; that one must be waited for.
    let again = |count: u32| {
        let load = "global_load_dword v2, v1, s[4:5]\n";
        format!("{load} {load} s_waitcnt vmcnt({count})\n v_add_u32 v4, v2, v2")
    };
    Snippet::new(CHIP, &again(0)).words();
    assert_eq!(cause(&again(1)), Cause::Pending("v2".into()));
    let other = "ds_read_b32 v2, v1\n global_load_dword v2, v1, s[4:5]";
    let cause_of = |body: &str| Snippet::new(CHIP, &format!("ds_write_b32 v1, v0\n {body}")).lds(256).cause();
    assert_eq!(cause_of(other), Cause::Pending("v2".into()));
    assert_eq!(cause("s_load_dword s8, s[4:5], 0x0\n s_add_u32 s8, s8, 1"), Cause::Pending("s8".into()));
    // Scalar loads return in any order: only waiting for all of them helps.
    let two = "s_load_dword s8, s[4:5], 0x0\n s_load_dword s9, s[4:5], 0x4\n";
    assert_eq!(cause(&format!("{two} s_waitcnt lgkmcnt(1)\n s_mov_b32 s10, s8")), Cause::Pending("s8".into()));
    let reads = "ds_write_b32 v1, v0\n ds_read_b32 v2, v1\n ds_read_b32 v3, v1\n";
    let lds = |body: &str| Snippet::new(CHIP, body).lds(256).run();
    assert!(lds(&format!("{reads} s_waitcnt lgkmcnt(1)\n v_mov_b32 v4, v2")).is_ok());
    assert!(lds(&format!("{reads} s_waitcnt lgkmcnt(1)\n v_mov_b32 v4, v3")).is_err());
    // A scalar load that may return later could be what is left of the count.
    let mixed = format!("ds_write_b32 v1, v0\n ds_read_b32 v2, v1\n {two} s_waitcnt lgkmcnt(2)\n v_mov_b32 v4, v2");
    assert!(lds(&mixed).is_err());
}

#[test]
fn what_was_never_written() {
    let undefined = |cause: Cause| matches!(cause, Cause::Undefined(_));
    assert!(undefined(cause("global_store_dword v1, v9, s[6:7]")));
    assert!(undefined(cause("v_add_u32 v3, v1, v9\n v_mul_f32 v3, v3, v3\n global_store_dword v1, v3, s[6:7]")));
    assert!(undefined(cause("global_load_dword v3, v9, s[4:5]")));
    assert!(undefined(cause("s_cmp_eq_u32 s20, 0\n s_cbranch_scc1 next\nnext:")));
    assert!(undefined(cause("v_cmp_eq_u32 vcc, v9, v0\n s_cbranch_vccz next\nnext:")));
    // A select takes only what it chooses.
    let body = "s_mov_b64 vcc, -1\n v_cndmask_b32 v3, v9, v0, vcc\n global_store_dword v1, v3, s[6:7]";
    assert_eq!(Snippet::new(CHIP, body).words()[5], 5);
    // Lanes count one by one.
    let body = "s_mov_b64 exec, 1\n v_mov_b32 v3, 7\n s_mov_b64 exec, -1\n global_store_dword v1, v3, s[6:7]";
    assert!(matches!(cause(body), Cause::Undefined(what) if what.contains("lane 1")));
    let body = "ds_read_b32 v3, v1\n s_waitcnt lgkmcnt(0)\n global_store_dword v1, v3, s[6:7]";
    assert!(undefined(Snippet::new(CHIP, body).lds(256).cause()));
    assert!(matches!(cause("v_mov_b32 v159, v0"), Cause::Register(name) if name == "v159"));
}

/// Wave `w` writes its part and reads that of the next one, with something between.
fn exchange(between: &str, seed: u64) -> Result<Vec<u32>, dsc_cdna::Error> {
    let body = format!(
        "v_mul_u32_u24 v2, 3, v0\n ds_write_b32 v1, v2\n {between}\n v_add_u32 v3, 0x100, v1\n v_and_b32 v3, 0x3ff, v3\n \
         ds_read_b32 v4, v3\n s_waitcnt lgkmcnt(0)\n global_store_dword v1, v4, s[6:7]"
    );
    Snippet::new(CHIP, &body).lds(1024).waves(4).seed(seed).run()
}

#[test]
fn races() {
    for seed in 0..6 {
        let race = |between: &str| match exchange(between, seed) {
            Err(dsc_cdna::Error::Fault(fault)) => matches!(fault.cause, Cause::Race { .. } | Cause::Undefined(_)),
            _ => false,
        };
        let right = exchange("s_waitcnt lgkmcnt(0)\n s_barrier", seed).expect("no race");
        assert_eq!(right, (0..256).map(|t| (t + 64) % 256 * 3).collect::<Vec<u32>>());
        assert!(race("s_waitcnt lgkmcnt(0)"), "no barrier, seed {seed}");
        assert!(race("s_barrier"), "no wait before the barrier, seed {seed}");
    }
    // Reading before a barrier and writing after none.
    let body = "ds_write_b32 v1, v0\n s_waitcnt lgkmcnt(0)\n s_barrier\n v_xor_b32 v3, 0x100, v1\n ds_read_b32 v4, v3\n \
        s_waitcnt lgkmcnt(0)\n ds_write_b32 v1, v4";
    for seed in 0..4 {
        let cause = Snippet::new(CHIP, body).lds(512).waves(2).seed(seed).cause();
        assert!(matches!(cause, Cause::Race { .. }), "{cause:?}");
    }
    // Bytes of one word may belong to different waves: each of two writes every other byte.
    let body = "v_and_b32 v2, 63, v0\n v_lshlrev_b32 v2, 1, v2\n v_lshrrev_b32 v3, 6, v0\n v_add_u32 v2, v2, v3\n \
        ds_write_b8 v2, v0\n s_waitcnt lgkmcnt(0)\n s_barrier\n ds_read_u8 v4, v0\n s_waitcnt lgkmcnt(0)\n \
        global_store_dword v1, v4, s[6:7]";
    let got = Snippet::new(CHIP, body).lds(128).waves(2).words();
    assert_eq!(got, (0..128).map(|b| b / 2 + 64 * (b % 2)).collect::<Vec<u32>>());
    assert!(matches!(
        Snippet::new(CHIP, &body.replace("s_barrier", "s_nop 0")).lds(128).waves(2).cause(),
        Cause::Race { .. } | Cause::Undefined(_)
    ));
    // Atomics do not race with each other.
    let body = "v_mov_b32 v3, 0\n v_mov_b32 v5, 1\n s_mov_b64 exec, 1\n ds_write_b32 v3, v3\n s_mov_b64 exec, -1\n";
    let atomics = "s_waitcnt lgkmcnt(0)\n s_barrier\n ds_add_u32 v3, v5\n s_waitcnt lgkmcnt(0)\n s_barrier\n ds_read_b32 v4, v3\n \
        s_waitcnt lgkmcnt(0)\n global_store_dword v1, v4, s[6:7]";
    let first = "v_readfirstlane_b32 s8, v0\n s_cmp_lg_u32 s8, 0\n s_cbranch_scc1 others\n";
    let setup = body.replace("s_mov_b64 exec, 1\n", &format!("{first} s_mov_b64 exec, 1\n")) + "others:\n";
    assert_eq!(Snippet::new(CHIP, &format!("{setup} {atomics}")).lds(4).waves(4).words(), [256; 256]);
    assert!(matches!(Snippet::new(CHIP, &format!("{body} {atomics}")).lds(4).waves(4).cause(), Cause::Race { .. }));
}

#[test]
fn loads_to_lds_need_a_wait() {
    let body = |between: &str| {
        format!(
            "s_mov_b32 m0, 0x40\n global_load_lds_dword v1, s[4:5]\n {between}\n ds_read_b32 v4, v1 offset:64\n \
             s_waitcnt lgkmcnt(0)\n global_store_dword v1, v4, s[6:7]"
        )
    };
    let run = |between: &str| Snippet::new(CHIP, &body(between)).input(10..74).lds(320).run();
    assert_eq!(run("s_waitcnt vmcnt(0)").expect("right"), (10..74).collect::<Vec<u32>>());
    assert!(matches!(run(""), Err(dsc_cdna::Error::Fault(f)) if matches!(f.cause, Cause::Race { .. })));
    assert!(
        matches!(run("s_waitcnt lgkmcnt(0)"), Err(dsc_cdna::Error::Fault(f)) if matches!(f.cause, Cause::Race { .. }))
    );
    let wide = "s_mov_b32 m0, 0\n v_lshlrev_b32 v1, 4, v0\n global_load_lds_dwordx4 v1, s[4:5]\n s_waitcnt vmcnt(0)\n \
        ds_read_b128 v[4:7], v1\n s_waitcnt lgkmcnt(0)\n global_store_dwordx4 v1, v[4:7], s[6:7]";
    let got = Snippet::new("gfx950", wide).input(0..256).output(256).lds(1024).words();
    assert_eq!(got, (0..256).collect::<Vec<u32>>());
}

#[test]
fn endings() {
    assert_eq!(cause("s_memtime s[8:9]"), Cause::Unknown("s_memtime s[8:9]".into()));
    assert!(matches!(cause("s_mov_b64 s[8:9], 0x1000\n s_setpc_b64 s[8:9]"), Cause::Jump(_)));
    // Three of four waves end; the barrier does not wait for them.
    let body = "v_readfirstlane_b32 s8, v0\n s_cmp_eq_u32 s8, 0\n s_cbranch_scc0 done\n s_barrier\n v_mov_b32 v3, 9\n \
        global_store_dword v1, v3, s[6:7]\ndone:";
    assert_eq!(Snippet::new(CHIP, body).waves(4).words()[..64], [9; 64]);
}
