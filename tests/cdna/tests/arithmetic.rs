//! Instructions one by one, against values worked out here.

mod common;

use common::{Snippet, lanes, reals};

const CHIP: &str = "gfx942";

fn ramp() -> impl Iterator<Item = u32> {
    (0..64u32).map(|l| l.wrapping_mul(0x9e37_79b9) ^ l << 7)
}

#[test]
fn integers() {
    let v: Vec<u32> = ramp().collect();
    let check = |body: &str, f: &dyn Fn(usize, u32) -> u32| {
        let wanted: Vec<u32> = v.iter().enumerate().map(|(l, &x)| f(l, x)).collect();
        assert_eq!(lanes(CHIP, body, v.clone()), wanted, "{body}");
    };
    check("v_add_u32 v3, v2, v0", &|l, x| x.wrapping_add(l as u32));
    check("v_subrev_u32 v3, v2, v0", &|l, x| (l as u32).wrapping_sub(x));
    check("v_mul_hi_i32 v3, v2, v2", &|_, x| ((x as i32 as i64 * x as i32 as i64) >> 32) as u32);
    check("v_mad_u32_u24 v3, v2, v0, v0", &|l, x| (x & 0xff_ffff).wrapping_mul(l as u32).wrapping_add(l as u32));
    check("v_bfe_i32 v3, v2, 5, 9", &|_, x| ((x << 18) as i32 >> 23) as u32);
    check("v_alignbit_b32 v3, v2, v0, 12", &|l, x| x << 20 | (l as u32) >> 12);
    check("s_mov_b32 s8, 0x07060100\n v_perm_b32 v3, v2, v0, s8", &|l, x| x & 0xffff_0000 | l as u32 & 0xffff);
    check("v_med3_i32 v3, v2, -16, 64", &|_, x| (x as i32).clamp(-16, 64) as u32);
    check("v_lshl_or_b32 v3, v2, 4, v0", &|l, x| x << 4 | l as u32);
    check("v_xad_u32 v3, v2, -1, 1", &|_, x| (!x).wrapping_add(1));
    check("v_cmp_gt_u32 vcc, v2, v0\n v_cndmask_b32 v3, v0, v2, vcc", &|l, x| x.max(l as u32));
    check("v_cmp_lt_i32 s[8:9], v2, 0\n v_cndmask_b32 v3, 1, 2, s[8:9]", &|_, x| if (x as i32) < 0 { 2 } else { 1 });
    check("v_mov_b32 v4, 0\n v_add_co_u32 v3, vcc, v2, v2\n v_addc_co_u32 v3, vcc, v4, v4, vcc", &|_, x| x >> 31);
    check("v_mbcnt_lo_u32_b32 v3, -1, 0\n v_mbcnt_hi_u32_b32 v3, -1, v3", &|l, _| l as u32);
    check("v_lshlrev_b16 v3, 3, v2", &|_, x| x << 3 & 0xffff);
    check("v_bcnt_u32_b32 v3, v2, 5", &|_, x| x.count_ones() + 5);
    check("v_ffbh_u32 v3, v2", &|_, x| if x == 0 { !0 } else { x.leading_zeros() });
    check("v_pk_add_u16 v3, v2, v0 op_sel_hi:[1,0]", &|l, x| {
        (x & 0xffff).wrapping_add(l as u32) & 0xffff | ((x >> 16).wrapping_add(l as u32) & 0xffff) << 16
    });
    check(
        "v_mov_b32 v4, 5\n v_mov_b32 v5, 1\n v_mad_u64_u32 v[6:7], vcc, v2, v0, v[4:5]\n v_mov_b32 v3, v7",
        &|l, x| ((u64::from(x) * l as u64 + (1 << 32) + 5) >> 32) as u32,
    );
    check("v_lshl_add_u64 v[6:7], s[4:5], 0, v[0:1]\n v_mov_b32 v3, v2", &|_, x| x);
}

#[test]
fn scalars() {
    let check = |body: &str, wanted: u32| {
        let body = format!("s_movk_i32 s8, -5\n s_mov_b32 s9, 0x12345678\n {body}\n v_mov_b32 v3, s10\n");
        assert_eq!(lanes(CHIP, &body, ramp())[7], wanted, "{body}");
    };
    check("s_add_u32 s10, s8, s9\n s_addc_u32 s10, s10, 0", 0x1234_5674);
    check("s_mul_hi_i32 s10, s8, s9", ((-5i64 * 0x1234_5678) >> 32) as u32);
    check("s_bfe_u32 s10, s9, 0x80008", 0x56);
    check("s_bfe_i32 s10, s8, 0x80000", -5i32 as u32);
    check("s_cmp_lt_i32 s8, s9\n s_cselect_b32 s10, 3, 4", 3);
    check("s_cmp_lt_u32 s8, s9\n s_cselect_b32 s10, 3, 4", 4);
    check("s_cmpk_eq_i32 s8, -5\n s_cselect_b32 s10, 3, 4", 3);
    check("s_flbit_i32_b32 s10, s9", 3);
    check("s_ff1_i32_b32 s10, s9", 3);
    check("s_pack_lh_b32_b16 s10, s8, s9", 0x1234_fffb);
    check("s_lshl_b64 s[10:11], s[8:9], 8\n s_mov_b32 s10, s11", 0x3456_78ff);
    check("s_and_b64 s[10:11], exec, 3", 3);
    check("s_bcnt1_i32_b64 s10, exec", 64);
    check("s_abs_i32 s10, s8", 5);
    check("s_bitcmp1_b32 s9, 3\n s_cselect_b32 s10, 1, 0", 1);
    check("s_mov_b32 s10, 0\nloop:\n s_addk_i32 s10, 3\n s_cmp_lt_i32 s10, 20\n s_cbranch_scc1 loop", 21);
}

#[test]
fn floats() {
    let v: Vec<f32> = (0..64).map(|l| (l as f32 - 31.5) * 1.375e-1).collect();
    let check = |body: &str, f: &dyn Fn(f32) -> f32| {
        for (&x, got) in v.iter().zip(reals(CHIP, body, v.clone())) {
            let wanted = f(x);
            assert!(got == wanted || got.is_nan() && wanted.is_nan(), "{body} of {x}: {got}, not {wanted}");
        }
    };
    check("v_add_f32 v3, v2, v2", &|x| x + x);
    check("v_sub_f32 v3, 1.0, v2", &|x| 1.0 - x);
    check("v_mul_f32 v3, -v2, |v2|", &|x| -x * x.abs());
    check("v_add_f32 v3, v2, 1.0 clamp", &|x| (x + 1.0).clamp(0.0, 1.0));
    check("v_mul_f32 v3, v2, v2 mul:4", &|x| x * x * 4.0);
    check("v_fma_f32 v3, v2, v2, -1.0", &|x| x.mul_add(x, -1.0));
    check("v_mov_b32 v3, v2\n v_fmac_f32 v3, v2, v2", &|x| x.mul_add(x, x));
    check("v_med3_f32 v3, v2, -1.0, 2.0", &|x| x.clamp(-1.0, 2.0));
    check("v_max3_f32 v3, v2, 0.5, -v2", &|x| x.abs().max(0.5));
    check("v_exp_f32 v3, v2", &|x| f64::from(x).exp2() as f32);
    check("v_log_f32 v3, v2", &|x| f64::from(x).log2() as f32);
    check("v_rcp_f32 v3, v2", &|x| 1.0 / x);
    check("v_rsq_f32 v3, v2", &|x| (1.0 / f64::from(x).sqrt()) as f32);
    check("v_cvt_i32_f32 v3, v2\n v_cvt_f32_i32 v3, v3", &f32::trunc);
    check("v_rndne_f32 v3, v2", &|x| x.round_ties_even());
    check("v_ldexp_f32 v3, v2, 5", &|x| x * 32.0);
    check("v_cvt_f16_f32 v3, v2\n v_cvt_f32_f16 v3, v3", &|x| half::f16::from_f32(x).to_f32());
    check("v_cmp_class_f32 vcc, v2, 0x3c\n v_cndmask_b32 v3, 0, 1.0, vcc", &|x| if x < 0.0 { 1.0 } else { 0.0 });
    check(
        "v_mov_b32 v4, v2\n v_mov_b32 v5, 2.0\n v_pk_mul_f32 v[6:7], v[4:5], v[4:5] op_sel:[1,0] op_sel_hi:[0,1]\n v_add_f32 v3, v6, v7",
        &|x| 2.0 * x + x * 2.0,
    );
    check("v_cvt_pkrtz_f16_f32 v3, v2, 0\n v_cvt_f32_f16 v3, v3", &|x| {
        let near = half::f16::from_f32(x);
        let away = near.to_f32().abs() > x.abs();
        half::f16::from_bits(near.to_bits() - u16::from(away)).to_f32()
    });
}

#[test]
fn fused_sums_round_once() {
    // The product is 1 + 2^-11 + 2^-24 + …: rounding it first loses what decides.
    let x = 1.0f32 + 2f32.powi(-12);
    let near = reals(CHIP, "v_fma_f32 v3, v2, v2, -v2", [x; 64])[0];
    assert_eq!(near, x.mul_add(x, -x));
    let tiny = reals(CHIP, "v_fma_f32 v3, v2, v2, 1.0", [2f32.powi(-13); 64])[0];
    assert_eq!(tiny, 1.0);
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        f32::from_bits((state >> 32) as u32 & 0x807f_ffff | ((120 + (state >> 20 & 15)) as u32) << 23)
    };
    for _ in 0..20 {
        let v: Vec<f32> = (0..64).map(|_| next()).collect();
        let k = next();
        let body = format!("s_mov_b32 s8, {:#x}\n v_fma_f32 v3, v2, s8, v2", k.to_bits());
        for (x, got) in v.iter().zip(reals(CHIP, &body, v.clone())) {
            assert_eq!(got, x.mul_add(k, *x));
        }
    }
}

#[test]
fn lanes_exchange() {
    let v: Vec<u32> = (100..164).collect();
    let check = |body: &str, f: &dyn Fn(usize) -> u32| {
        let wanted: Vec<u32> = (0..64).map(f).collect();
        assert_eq!(lanes(CHIP, body, v.clone()), wanted, "{body}");
    };
    let at = |l: usize| 100 + l as u32;
    check("v_mov_b32_dpp v3, v2 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", &|l| at(l ^ 1));
    check("v_mov_b32 v3, 7\n v_mov_b32_dpp v3, v2 row_shr:1 row_mask:0xf bank_mask:0xf", &|l| {
        if l % 16 == 0 { 7 } else { at(l - 1) }
    });
    check("v_mov_b32_dpp v3, v2 row_shl:4 row_mask:0xf bank_mask:0xf bound_ctrl:0", &|l| {
        if l % 16 < 12 { at(l + 4) } else { 0 }
    });
    check("v_mov_b32_dpp v3, v2 row_ror:3 row_mask:0xf bank_mask:0xf", &|l| at(l & !15 | ((l + 13) % 16)));
    check("v_mov_b32_dpp v3, v2 row_mirror row_mask:0xf bank_mask:0xf", &|l| at(l ^ 15));
    check("v_mov_b32_dpp v3, v2 row_half_mirror row_mask:0xf bank_mask:0xf", &|l| at(l ^ 7));
    check("v_mov_b32_dpp v3, v2 row_newbcast:5 row_mask:0xf bank_mask:0xf", &|l| at(l & !15 | 5));
    check("v_mov_b32 v3, 1\n v_mov_b32_dpp v3, v2 row_bcast:15 row_mask:0xa bank_mask:0xf", &|l| {
        if l / 16 % 2 == 1 { at(l / 16 * 16 - 1) } else { 1 }
    });
    check("v_mov_b32 v3, 1\n v_add_u32_dpp v3, v2, v2 row_bcast:31 row_mask:0xc bank_mask:0xf", &|l| {
        if l >= 32 { at(31) + at(l) } else { 1 }
    });
    check("v_mov_b32_dpp v3, v2 wave_shr:1 row_mask:0xf bank_mask:0xf bound_ctrl:0", &|l| {
        if l == 0 { 0 } else { at(l - 1) }
    });
    check("v_xor_b32 v4, 0x80, v1\n ds_bpermute_b32 v3, v4, v2\n s_waitcnt lgkmcnt(0)", &|l| at(l ^ 32));
    check("v_xor_b32 v4, 12, v1\n ds_permute_b32 v3, v4, v2\n s_waitcnt lgkmcnt(0)", &|l| at(l ^ 3));
    check("ds_swizzle_b32 v3, v2 offset:swizzle(SWAP,16)\n s_waitcnt lgkmcnt(0)", &|l| at(l ^ 16));
    check("ds_swizzle_b32 v3, v2 offset:swizzle(BROADCAST,8,3)\n s_waitcnt lgkmcnt(0)", &|l| at(l & !7 | 3));
    check("v_readlane_b32 s8, v2, 9\n v_mov_b32 v3, s8", &|_| at(9));
    check("s_mov_b64 exec, 0xf0\n v_readfirstlane_b32 s8, v2\n s_mov_b64 exec, -1\n v_mov_b32 v3, s8", &|_| at(4));
    check("v_mov_b32 v3, v2\n s_movk_i32 s8, 77\n v_writelane_b32 v3, s8, 12", &|l| if l == 12 { 77 } else { at(l) });
    check("v_add_u32_sdwa v3, v2, v0 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:WORD_0", &|l| {
        ((at(l) + l as u32) & 0xff) << 8
    });
    check(
        "v_mov_b32 v4, 0x8001ff80\n v_add_u32_sdwa v3, sext(v4), v0 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:DWORD",
        &|l| 0xffff_8001u32.wrapping_add(l as u32),
    );
}

#[test]
fn halves_swap_on_gfx950() {
    let body = "global_load_dword v3, v1, s[4:5]\n s_waitcnt vmcnt(0)\n v_add_u32 v4, 0x100, v3\n v_permlane32_swap_b32 v3, v4\n \
        global_store_dword v1, v3, s[6:7]\n global_store_dword v1, v4, s[6:7] offset:256";
    let got = Snippet::new("gfx950", body).input(0..64).output(128).words();
    let wanted = |l: u32| if l < 32 { l } else { 0x100 + l - 32 };
    assert_eq!(got[..64], (0..64).map(wanted).collect::<Vec<_>>());
    let wanted = |l: u32| if l < 32 { l + 32 } else { 0x100 + l };
    assert_eq!(got[64..], (0..64).map(wanted).collect::<Vec<_>>());
}

/// Values of e4m3 by the definitions of OCP and of FNUZ.
fn e4m3(bits: u32, fnuz: bool) -> f32 {
    let (sign, e, m) = (bits >> 7, (bits >> 3 & 15) as i32, (bits & 7) as f32);
    if bits == 0x80 && fnuz || bits & 0x7f == 0x7f && !fnuz {
        return f32::NAN;
    }
    let bias = if fnuz { 8 } else { 7 };
    let x = if e == 0 { m / 8.0 * 2f32.powi(1 - bias) } else { (1.0 + m / 8.0) * 2f32.powi(e - bias) };
    if sign == 1 { -x } else { x }
}

#[test]
fn fp8_of_both_chips() {
    for (chip, fnuz) in [("gfx942", true), ("gfx950", false)] {
        for first in (0..256).step_by(64) {
            let codes = first..first + 64;
            let got = lanes(chip, "v_cvt_f32_fp8 v3, v2", codes.clone());
            let back = lanes(
                chip,
                "v_cvt_f32_fp8 v4, v2\n v_mov_b32 v3, 0\n v_cvt_pk_fp8_f32 v3, v4, -v4 op_sel:[0,0,1]",
                codes.clone(),
            );
            for (code, (got, back)) in codes.zip(got.into_iter().zip(back)) {
                let (got, wanted) = (f32::from_bits(got), e4m3(code, fnuz));
                assert!(got == wanted || got.is_nan() && wanted.is_nan(), "{chip} {code:#x}: {got}, not {wanted}");
                if !got.is_nan() {
                    let minus = if fnuz && code == 0 { 0 } else { code ^ 0x80 };
                    assert_eq!(back, code << 16 | minus << 24, "{chip} {code:#x}");
                }
            }
        }
        // Nearest, ties to even; what is too large is NaN.
        let cases = [1.0, 1.0625, 1.0626, 1.1875, -0.0, 1e-9, if fnuz { 240.0 } else { 448.0 }, 1e4];
        let got = lanes(
            chip,
            "v_mov_b32 v3, 0\n v_cvt_pk_fp8_f32 v3, v2, 0",
            cases.map(f32::to_bits).into_iter().cycle().take(64),
        );
        let reals: Vec<f32> = got.iter().take(8).map(|&c| e4m3(c & 0xff, fnuz)).collect();
        assert_eq!(reals[..7], [1.0, 1.0, 1.125, 1.25, 0.0, 0.0, cases[6]], "{chip}");
        assert!(reals[7].is_nan());
    }
}

#[test]
fn bf16_on_gfx950() {
    let v: Vec<f32> = (0..64).map(|l| (l as f32 - 20.0) * 1.003).collect();
    let got = lanes("gfx950", "v_cvt_pk_bf16_f32 v3, v2, -v2", v.iter().map(|x| x.to_bits()));
    for (x, got) in v.iter().zip(got) {
        let bits = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
        assert_eq!(got, bits(*x) | bits(-x) << 16);
    }
}

#[test]
fn denormals_follow_the_mode() {
    let tiny = f32::from_bits(0x0040_0000);
    assert_eq!(reals(CHIP, "v_add_f32 v3, v2, v2", [tiny; 64])[0], 0.0, "the assembler's default flushes");
    let body = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 2), 3\n v_add_f32 v3, v2, v2";
    assert_eq!(reals(CHIP, body, [tiny; 64])[0], tiny + tiny);
}
