//! Matrix products against plain ones, with operands laid out as AMD's guide has it.

mod common;

use common::Snippet;

/// Small numbers that every type holds: eighths of −8 to 8 for halves, quarters up to 2 for bytes.
fn value(state: &mut u64, small: bool) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let n = (*state >> 40) as i32;
    if small { (n % 8) as f32 / 4.0 } else { (n % 64) as f32 / 8.0 }
}

/// Runs D = A · B + C with each lane's registers given, and returns D's registers.
fn run(chip: &str, name: &str, a: &[[u32; 64]], b: &[[u32; 64]], c: &[[f32; 64]], extra: &str) -> Vec<[f32; 64]> {
    let mut body = String::new();
    let registers: Vec<[u32; 64]> = a.iter().chain(b).copied().chain(c.iter().map(|r| r.map(f32::to_bits))).collect();
    for r in 0..registers.len() {
        body +=
            &format!("global_load_dword v{}, v1, s[4:5]\n s_add_u32 s4, s4, 0x100\n s_addc_u32 s5, s5, 0\n", 16 + r);
    }
    let (na, nb, nc) = (a.len(), b.len(), c.len());
    let range =
        |first: usize, n: usize| if n == 1 { format!("v{first}") } else { format!("v[{first}:{}]", first + n - 1) };
    let acc = range(16 + na + nb, nc);
    body += "s_waitcnt vmcnt(0)\n";
    body += &format!("{name} {acc}, {}, {}, {acc} {extra}\n s_nop 15\n s_nop 15\n", range(16, na), range(16 + na, nb));
    for r in 0..nc {
        body += &format!(
            "global_store_dword v1, v{}, s[6:7]\n s_add_u32 s6, s6, 0x100\n s_addc_u32 s7, s7, 0\n",
            16 + na + nb + r
        );
    }
    let input = registers.iter().flatten().copied();
    let out = Snippet::new(chip, &body).input(input).output(64 * nc).reals();
    out.chunks_exact(64).map(|r| std::array::from_fn(|l| r[l])).collect()
}

/// Packs a lane's elements into registers.
fn pack(bits: usize, held: usize, code: &dyn Fn(usize, usize) -> u32) -> Vec<[u32; 64]> {
    let mut out = vec![[0; 64]; (held * bits).div_ceil(32)];
    for e in 0..held {
        for (l, lane) in out[e * bits / 32].iter_mut().enumerate() {
            *lane |= code(l, e) << (e * bits % 32);
        }
    }
    out
}

fn check(
    chip: &str,
    name: &str,
    (m, n, k): (usize, usize, usize),
    bits: usize,
    code: &dyn Fn(f32) -> u32,
    extra: &str,
) {
    let state = &mut 7u64;
    let a: Vec<f32> = (0..m * k).map(|_| value(state, bits == 8)).collect();
    let b: Vec<f32> = (0..k * n).map(|_| value(state, bits == 8)).collect();
    let c: Vec<f32> = (0..m * n).map(|_| value(state, false)).collect();
    let held = k * m / 64;
    let ra = pack(bits, held, &|l, e| code(a[l % m * k + l / m * held + e]));
    let rb = pack(bits, held, &|l, e| code(b[(l / n * held + e) * n + l % n]));
    // Of 16 × 16: row 4 (l / 16) + r; of 32 × 32: row 8 (r / 4) + 4 (l / 32) + r % 4.
    let row = |l: usize, r: usize| if m == 16 { 4 * (l / 16) + r } else { 8 * (r / 4) + 4 * (l / 32) + r % 4 };
    let rc: Vec<[f32; 64]> = (0..m * n / 64).map(|r| std::array::from_fn(|l| c[row(l, r) * n + l % n])).collect();
    let got = run(chip, name, &ra, &rb, &rc, extra);
    for (r, got) in got.iter().enumerate() {
        for (l, got) in got.iter().enumerate() {
            let (i, j) = (row(l, r), l % n);
            let wanted = (0..k).fold(c[i * n + j], |sum, k_| sum + a[i * k + k_] * b[k_ * n + j]);
            assert_eq!(*got, wanted, "{chip} {name}: row {i}, column {j}");
        }
    }
}

fn f16(x: f32) -> u32 {
    half::f16::from_f32(x).to_bits().into()
}

fn bf16(x: f32) -> u32 {
    half::bf16::from_f32(x).to_bits().into()
}

/// e4m3 of quarters up to 2, by exponent and fraction.
fn e4m3(x: f32, bias: i32) -> u32 {
    if x == 0.0 {
        return 0;
    }
    let e = x.abs().log2().floor() as i32;
    let m = ((x.abs() / (e as f32).exp2() - 1.0) * 8.0) as u32;
    u32::from(x < 0.0) << 7 | ((e + bias) as u32) << 3 | m
}

#[test]
fn halves() {
    for chip in ["gfx942", "gfx950"] {
        check(chip, "v_mfma_f32_16x16x16_f16", (16, 16, 16), 16, &f16, "");
        check(chip, "v_mfma_f32_32x32x8_f16", (32, 32, 8), 16, &f16, "");
        check(chip, "v_mfma_f32_16x16x16_bf16", (16, 16, 16), 16, &bf16, "");
        check(chip, "v_mfma_f32_32x32x8_bf16", (32, 32, 8), 16, &bf16, "");
    }
    check("gfx950", "v_mfma_f32_16x16x32_bf16", (16, 16, 32), 16, &bf16, "");
    check("gfx950", "v_mfma_f32_32x32x16_bf16", (32, 32, 16), 16, &bf16, "");
    check("gfx950", "v_mfma_f32_16x16x32_f16", (16, 16, 32), 16, &f16, "");
}

#[test]
fn words() {
    check("gfx942", "v_mfma_f32_16x16x4_f32", (16, 16, 4), 32, &f32::to_bits, "");
    check("gfx942", "v_mfma_f32_32x32x2_f32", (32, 32, 2), 32, &f32::to_bits, "");
}

#[test]
fn bytes() {
    for (chip, bias) in [("gfx942", 8), ("gfx950", 7)] {
        check(chip, "v_mfma_f32_16x16x32_fp8_fp8", (16, 16, 32), 8, &|x| e4m3(x, bias), "");
        check(chip, "v_mfma_f32_32x32x16_fp8_fp8", (32, 32, 16), 8, &|x| e4m3(x, bias), "");
    }
    // The order of K is the same in A and B, so it does not show here.
    check("gfx950", "v_mfma_f32_16x16x128_f8f6f4", (16, 16, 128), 8, &|x| e4m3(x, 7), "");
    check("gfx950", "v_mfma_f32_32x32x64_f8f6f4", (32, 32, 64), 8, &|x| e4m3(x, 7), "");
}

#[test]
fn scales_of_one() {
    let scale = "v_mov_b32 v14, 0x7f7f7f7f\n v_mfma_scale_f32_16x16x128_f8f6f4";
    check_scaled(scale, "v14, v14 op_sel_hi:[0,0,0]", 1.0);
    let scale = "v_mov_b32 v14, 0x7f7f7f7f\n v_mov_b32 v15, 0x80808080\n v_mfma_scale_f32_16x16x128_f8f6f4";
    check_scaled(scale, "v14, v15 op_sel_hi:[0,0,0]", 2.0);
}

/// A row of twos times columns of ones, scaled.
fn check_scaled(name: &str, extra: &str, factor: f32) {
    let twos = vec![[0x4040_4040; 64]; 8];
    let ones = vec![[0x3838_3838; 64]; 8];
    let got = run("gfx950", name, &twos, &ones, &[[3.0; 64]; 4], &format!(", {extra}"));
    assert!(got.iter().flatten().all(|&x| x == 3.0 + factor * 256.0), "{:?}", got[0][0]);
}

#[test]
fn what_was_never_written_stays_in_its_row() {
    // Row 3 of A is not written: row 3 of D is not, the others are.
    let body = "v_mov_b32 v8, 1.0\n v_mov_b32 v10, 0\n v_mov_b32 v11, 0\n v_mov_b32 v12, 0\n v_mov_b32 v13, 0\n \
        v_cmp_ne_u32 vcc, 3, v0\n s_mov_b64 exec, vcc\n v_mov_b32 v7, 1.0\n s_mov_b64 exec, -1\n \
        v_mfma_f32_16x16x4_f32 v[10:13], v7, v8, v[10:13]\n s_nop 15\n";
    let fine = Snippet::new("gfx942", &format!("{body} global_store_dword v1, v11, s[6:7]\n")).words();
    assert_eq!(fine, [4f32.to_bits(); 64]);
    let cause = Snippet::new("gfx942", &format!("{body} global_store_dword v1, v13, s[6:7]\n")).cause();
    assert!(matches!(cause, dsc_cdna::Cause::Undefined(_)));
}
