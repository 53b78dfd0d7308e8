//! Kernels that clang has compiled: its conventions of arguments, waits, spills and division, and all it makes of plain code.

use dsc_cdna::{CodeObject, Launch, Memory, Options, tools};

const CHIPS: [&str; 2] = ["gfx942", "gfx950"];

const HEAD: &str = "
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
#define TID __builtin_amdgcn_workitem_id_x()
#define GROUP __builtin_amdgcn_workgroup_id_x()
#define SIZE __builtin_amdgcn_workgroup_size_x()
void barrier(void) {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, \"workgroup\");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, \"workgroup\");
}
";

struct Run {
    grid: u32,
    block: u32,
    dynamic_lds: u32,
    seed: u64,
}

/// Compiles a kernel `k`, runs it on buffers and integers in that order, and returns the buffers.
fn run(chip: &str, source: &str, buffers: &[Vec<u8>], numbers: &[i32], run: Run) -> Vec<Vec<u8>> {
    let code = tools::compile(&format!("{HEAD}{source}"), chip).unwrap_or_else(|e| panic!("{e}"));
    let object = CodeObject::parse(&code).unwrap_or_else(|e| panic!("{e}"));
    let mut memory = Memory::new();
    let at: Vec<u64> = buffers.iter().map(|b| memory.alloc(b)).collect();
    let mut arguments: Vec<u8> = at.iter().flat_map(|a| a.to_le_bytes()).collect();
    arguments.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
    let launch = Launch {
        kernel: "k",
        grid: [run.grid, 1, 1],
        block: [run.block, 1, 1],
        dynamic_lds: run.dynamic_lds,
        arguments: &arguments,
    };
    let options = Options { seed: run.seed, ..Options::default() };
    object.launch(&launch, &mut memory, options).unwrap_or_else(|e| panic!("{chip}: {e}"));
    at.iter().map(|&a| memory.read(a)).collect()
}

fn bytes(v: &[f32]) -> Vec<u8> {
    v.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn floats(b: &[u8]) -> Vec<f32> {
    b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

#[test]
fn softmax_of_a_row() {
    let source = "
kernel void k(global float* out, global const float* in, int n) {
  local float part[256];
  float most = -1e30f;
  for (int i = TID; i < n; i += SIZE) most = __builtin_fmaxf(most, in[GROUP * n + i]);
  part[TID] = most; barrier();
  for (int s = 128; s; s /= 2) { if (TID < s) part[TID] = __builtin_fmaxf(part[TID], part[TID + s]); barrier(); }
  most = part[0]; barrier();
  float sum = 0;
  for (int i = TID; i < n; i += SIZE) sum += __builtin_exp2f(in[GROUP * n + i] - most);
  part[TID] = sum; barrier();
  for (int s = 128; s; s /= 2) { if (TID < s) part[TID] += part[TID + s]; barrier(); }
  sum = part[0];
  for (int i = TID; i < n; i += SIZE) out[GROUP * n + i] = __builtin_exp2f(in[GROUP * n + i] - most) / sum;
}";
    let (rows, n) = (3usize, 301usize);
    let input: Vec<f32> = (0..rows * n).map(|i| ((i * 37) % 101) as f32 * 0.13 - 5.0).collect();
    for chip in CHIPS {
        for seed in [0, 1, 2] {
            let buffers = [vec![0; 4 * rows * n], bytes(&input)];
            let run_ = Run { grid: rows as u32, block: 256, dynamic_lds: 0, seed };
            let got = floats(&run(chip, source, &buffers, &[n as i32], run_)[0]);
            for (row, got) in input.chunks(n).zip(got.chunks(n)) {
                let most = row.iter().fold(f32::MIN, |a, &b| a.max(b));
                let sum: f64 = row.iter().map(|x| f64::from(x - most).exp2()).sum();
                for (x, got) in row.iter().zip(got) {
                    let wanted = f64::from(x - most).exp2() / sum;
                    assert!((f64::from(*got) / wanted - 1.0).abs() < 2e-6, "{chip}: {got}, not {wanted}");
                }
            }
        }
    }
}

#[test]
fn integer_division_and_atomics() {
    let source = "
kernel void k(global uint* out, global const uint* in) {
  local uint counts[16];
  if (TID < 16) counts[TID] = 0;
  barrier();
  uint x = in[TID], d = x % 97 + 1;
  __atomic_fetch_add(&counts[x % 16], 1u, __ATOMIC_RELAXED);
  barrier();
  ulong wide = (ulong)x * 0x123456789ul;
  out[TID] = x / d + (uint)(wide / (x | 1)) + ((int)x / (int)(d + 3)) + __builtin_popcount(x) + counts[TID % 16];
}";
    let x: Vec<u32> = (0..192u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let counts: Vec<u32> = (0..16).map(|c| x.iter().filter(|&&x| x % 16 == c).count() as u32).collect();
    for chip in CHIPS {
        let input = x.iter().flat_map(|w| w.to_le_bytes()).collect();
        let run_ = Run { grid: 1, block: 192, dynamic_lds: 0, seed: 3 };
        let got = run(chip, source, &[vec![0; 768], input], &[], run_);
        let got: Vec<u32> = got[0].chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        for (i, (&x, got)) in x.iter().zip(got).enumerate() {
            let d = x % 97 + 1;
            let wide = u64::from(x).wrapping_mul(0x1_2345_6789) / u64::from(x | 1);
            let wanted = (x / d)
                .wrapping_add(wide as u32)
                .wrapping_add((x as i32 / (d as i32 + 3)) as u32)
                .wrapping_add(x.count_ones())
                .wrapping_add(counts[i % 16]);
            assert_eq!(got, wanted, "{chip}, {i}");
        }
    }
}

#[test]
fn division_is_exact() {
    let source = "
kernel void k(global float* out, global const float* a, global const float* b) { int i = GROUP * SIZE + TID; out[i] = a[i] / b[i]; }";
    let special = [0.0, -0.0, 1.0, f32::INFINITY, f32::NAN, 1e-40, 3e38, -7.5, 1e-38, 1e30, f32::MIN_POSITIVE, 1e-45];
    let mut pairs: Vec<(f32, f32)> = special.iter().flat_map(|&a| special.iter().map(move |&b| (a, b))).collect();
    let mut state = 1u64;
    while pairs.len() < 1024 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        pairs.push((f32::from_bits((state >> 32) as u32), f32::from_bits((state >> 16) as u32)));
    }
    let (a, b): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
    let run_ = Run { grid: 4, block: 256, dynamic_lds: 0, seed: 0 };
    let got = floats(&run("gfx942", source, &[vec![0; 4096], bytes(&a), bytes(&b)], &[], run_)[0]);
    for ((a, b), got) in pairs.into_iter().zip(got) {
        // OpenCL lets a quotient be off by 2.5 units, which clang uses: it multiplies by an approximate reciprocal.
        let wanted = a / b;
        let near = wanted == got
            || wanted.is_nan() && got.is_nan()
            || (wanted.to_bits() as i32).wrapping_sub(got.to_bits() as i32).unsigned_abs() <= 3
            || wanted.abs() < 2.0 * f32::MIN_POSITIVE && got.abs() < 2.0 * f32::MIN_POSITIVE;
        assert!(near, "{a:e} / {b:e}: {got:e}, not {wanted:e}");
    }
}

#[test]
fn small_types_and_dynamic_lds() {
    let source = "
kernel void k(global ushort* out, global const ushort* in, int n, local ushort* part) {
  for (int i = TID; i < n; i += SIZE) part[n - 1 - i] = in[i];
  barrier();
  for (int i = TID; i < n; i += SIZE) out[i] = part[i] + 1;
}";
    let n = 77u16;
    for chip in CHIPS {
        let input: Vec<u8> = (0..n).flat_map(|i| (i * 3).to_le_bytes()).collect();
        let run_ = Run { grid: 1, block: 64, dynamic_lds: 2 * u32::from(n), seed: 0 };
        // The pointer to dynamic LDS is an argument: its offset.
        let got = run(chip, source, &[vec![0; 154], input], &[i32::from(n), 0], run_);
        let wanted: Vec<u8> = (0..n).flat_map(|i| ((n - 1 - i) * 3 + 1).to_le_bytes()).collect();
        assert_eq!(got[0], wanted, "{chip}");
    }
}

#[test]
fn scratch_and_indexing() {
    let source = "
kernel void k(global uint* out, global const uint* in) {
  uint table[24];
  for (int i = 0; i < 24; i++) table[i] = in[(i * 7 + TID) % 64];
  uint at = TID, sum = 0;
  for (int i = 0; i < 24; i++) { at = table[at % 24] + i; sum += at; table[(at + i) % 24] ^= sum; }
  out[TID] = sum;
}";
    let input: Vec<u32> = (0..64u32).map(|i| i.wrapping_mul(2_654_435_761) >> 7).collect();
    let wanted: Vec<u32> = (0..64u32)
        .map(|tid| {
            let mut table: Vec<u32> = (0..24).map(|i| input[(i * 7 + tid as usize) % 64]).collect();
            let (mut at, mut sum) = (tid, 0u32);
            for i in 0..24u32 {
                at = table[at as usize % 24].wrapping_add(i);
                sum = sum.wrapping_add(at);
                table[at.wrapping_add(i) as usize % 24] ^= sum;
            }
            sum
        })
        .collect();
    for chip in CHIPS {
        let bytes = input.iter().flat_map(|w| w.to_le_bytes()).collect();
        let run_ = Run { grid: 1, block: 64, dynamic_lds: 0, seed: 0 };
        let got = run(chip, source, &[vec![0; 256], bytes], &[], run_);
        let got: Vec<u32> = got[0].chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        assert_eq!(got, wanted, "{chip}");
    }
}

#[test]
fn a_missing_barrier_is_found() {
    let source = "
kernel void k(global uint* out) { local uint part[128]; part[TID] = TID; out[TID] = part[127 - TID]; }";
    let code = tools::compile(&format!("{HEAD}{source}"), "gfx942").unwrap_or_else(|e| panic!("{e}"));
    let object = CodeObject::parse(&code).unwrap_or_else(|e| panic!("{e}"));
    for seed in 0..4 {
        let mut memory = Memory::new();
        let out = memory.alloc(&[0; 512]).to_le_bytes();
        let launch = Launch { kernel: "k", grid: [1; 3], block: [128, 1, 1], dynamic_lds: 0, arguments: &out };
        let options = Options { seed, ..Options::default() };
        let error = object.launch(&launch, &mut memory, options).expect_err("a race").to_string();
        assert!(error.contains("LDS") || error.contains("never written"), "{error}");
    }
}

#[test]
fn launches_that_do_not_suit() {
    let source = "kernel void k(global uint* out) { out[TID] = 1; }";
    let code = tools::compile(&format!("{HEAD}{source}"), "gfx942").unwrap_or_else(|e| panic!("{e}"));
    let object = CodeObject::parse(&code).unwrap_or_else(|e| panic!("{e}"));
    let launch = |kernel, block, dynamic_lds, arguments: &[u8]| {
        let launch = Launch { kernel, grid: [1; 3], block: [block, 1, 1], dynamic_lds, arguments };
        object.launch(&launch, &mut Memory::new(), Options::default()).expect_err("it does not suit").to_string()
    };
    assert!(launch("j", 64, 0, &[0; 8]).contains("no kernel `j` (there are: k)"));
    assert!(launch("k", 2048, 0, &[0; 8]).contains("2048 threads"));
    assert!(launch("k", 64, 1 << 17, &[0; 8]).contains("gfx942 has 65536"));
    assert!(launch("k", 64, 0, &[0; 4]).contains("4 bytes of arguments, it takes 8"));
    assert!(CodeObject::parse(&code[..100]).is_err() && CodeObject::parse(b"\x7fELF").is_err());
}
