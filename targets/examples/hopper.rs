//! Matrix products for Hopper as cubins, with what a program needs to launch them:
//! `cargo run --release -p dsc-targets --features nvidia --example hopper DIR [TEXT]`, those with the text in their names.
//! `tests/bench/hopper.py DIR` checks and times them.

#[path = "support/cubins.rs"]
mod cubins;
#[path = "../tests/support/experts.rs"]
mod experts;
#[path = "../tests/support/heads.rs"]
mod heads;
#[path = "../tests/support/linear.rs"]
mod linear;

use dsc_ir::DType;
use dsc_ir::schedule::Schedule;
use dsc_targets::Kernel;
use experts::Experts;
use heads::Heads;
use linear::Linear;
use std::fmt::Write;
use std::path::PathBuf;

/// Outputs and contracted lengths of the model's projections.
const PROJECTIONS: [(u32, u32); 5] = [(2112, 7168), (4096, 7168), (7168, 2048), (24576, 1536), (7168, 16384)];

/// Row counts that a kernel is run with.
type Rows = &'static [u32];

fn bf16(n: u32, k: u32, tile: [u32; 2]) -> Linear {
    Linear { dtype: DType::Bf16, n, k, tile, step: 64, out: DType::Bf16, glu: false, part: None }
}

fn fp8(n: u32, k: u32, tile: [u32; 2]) -> Linear {
    Linear { dtype: DType::E4m3, n, k, tile, step: 128, out: DType::Bf16, glu: false, part: None }
}

/// The products of a layer, at prefill and at decode, and how many blocks share what they bring.
fn products() -> Vec<(Linear, u32, Rows)> {
    let bf16_wide = [128, 256];
    let mut all: Vec<(Linear, u32, Rows)> = vec![
        (bf16(4096, 4096, bf16_wide), 1, &[4096, 4000]),
        (bf16(8192, 8192, bf16_wide), 1, &[8192]),
        (Linear { out: DType::F32, ..bf16(4096, 4096, bf16_wide) }, 1, &[4096]),
    ];
    for (n, k) in PROJECTIONS {
        for cluster in [1, 2] {
            all.push((fp8(n, k, [128, 128]), cluster, &[4096, 1000]));
        }
        for cluster in [1, 2] {
            all.push((fp8(n, k, [256, 128]), cluster, &[4096]));
            all.push((fp8(n, k, [192, 128]), cluster, &[4096]));
        }
        all.push((fp8(n, k, [16, 64]), 1, &[1, 16]));
        all.push((fp8(n, k, [32, 64]), 1, &[32]));
    }
    // As many tiles as multiprocessors, or a little fewer.
    for (n, k, tiles) in [
        (2112, 7168, [[64, 16], [64, 32]]),
        (4096, 7168, [[64, 32], [64, 64]]),
        (7168, 2048, [[64, 64], [128, 64]]),
        (24576, 1536, [[64, 64], [128, 64]]),
        (7168, 16384, [[64, 64], [128, 64]]),
    ] {
        for (tile, rows) in tiles.into_iter().zip([&[64], &[128]]) {
            all.push((fp8(n, k, tile), 1, rows));
        }
    }
    // Few outputs: parts of the sum, stored apart.
    for (n, k, columns) in [(2112, 7168, 1792), (4096, 7168, 3584), (7168, 16384, 8192)] {
        all.push((Linear { part: Some(columns), out: DType::F32, ..fp8(n, k, [16, 64]) }, 1, &[1, 16]));
    }
    for columns in [64, 128] {
        for cluster in [1, 2] {
            all.push((Linear { glu: true, ..fp8(2048, 7168, [128, columns]) }, cluster, &[4096]));
        }
    }
    all.push((Linear { glu: true, ..fp8(2048, 7168, [16, 64]) }, 1, &[16]));
    all.push((bf16(4096, 7168, [16, 64]), 1, &[16]));
    all.push((Linear { out: DType::F32, ..bf16(129_280, 7168, [16, 128]) }, 1, &[3]));
    all
}

/// The products of experts, 8 a token: gate and up, with SwiGLU or without, and down, for all experts and for those of one rank of eight; row
/// counts are of (token, expert) pairs.
fn experts() -> Vec<(Experts, Rows)> {
    let mut all: Vec<(Experts, Rows)> = Vec::new();
    for (per_token, n, k) in [(8, 4096, 7168), (0, 7168, 2048)] {
        let of = |experts, tile, parts| Experts {
            experts,
            per_token,
            n,
            k,
            tile,
            parts,
            apart: false,
            glu: false,
            sorted: false,
        };
        let many = of(32, [128, 128], 4);
        all.push((many, &[4096, 32768]));
        all.push((of(32, [128, 128], 1), &[2048, 4096]));
        for (experts, tile, parts) in [
            (32, [128, 128], 4),
            (32, [192, 128], 1),
            (32, [192, 128], 6),
            (32, [256, 128], 1),
            (32, [256, 128], 4),
            (256, [128, 128], 1),
            (256, [128, 128], 4),
            (256, [192, 128], 1),
            (256, [256, 128], 1),
        ] {
            all.push((Experts { sorted: true, ..of(experts, tile, parts) }, &[32768]));
        }
        let apart = Experts { sorted: true, apart: true, ..of(32, [192, 128], 6) };
        all.push((apart, &[32768]));
        all.push((of(32, [64, 128], 1), &[1000, 2048]));
        all.push((of(32, [32, 64], 1), &[512]));
        all.push((of(32, [16, 64], 1), &[8, 128]));
        all.push((of(256, [128, 128], 4), &[16384, 32768]));
        all.push((of(256, [128, 128], 1), &[16384, 32768]));
        all.push((of(256, [32, 64], 1), &[4096]));
        all.push((of(256, [16, 64], 1), &[1024]));
        all.push((of(256, [8, 64], 1), &[8, 128]));
        if per_token > 0 {
            all.push((Experts { glu: true, n: n / 2, ..many }, &[4096, 32768]));
            all.push((Experts { glu: true, n: n / 2, ..of(256, [128, 128], 4) }, &[32768]));
            all.push((Experts { glu: true, n: n / 2, ..of(256, [8, 128], 1) }, &[8, 128]));
            all.push((Experts { glu: true, n: n / 2, ..of(256, [16, 128], 1) }, &[512]));
            for (experts, parts) in [(32, 4), (256, 1), (256, 4)] {
                let sorted = Experts { sorted: true, ..of(experts, [128, 128], parts) };
                all.push((Experts { glu: true, n: n / 2, ..sorted }, &[32768]));
            }
        }
    }
    all
}

/// A kernel and what a launch has to know of it, as JSON.
fn described() -> Vec<(Kernel, String, Rows)> {
    let mut all = Vec::new();
    for (l, cluster, rows) in products() {
        let [m, n] = l.tile;
        let glu = if l.glu { "_glu" } else { "" };
        let part = l.part.map_or(String::new(), |p| format!("_part{p}"));
        let together = if cluster > 1 { format!("_cluster{cluster}") } else { String::new() };
        let name = format!("{}_n{}_k{}_{m}x{n}_{}{glu}{part}{together}", l.dtype, l.n, l.k, l.out);
        let mut text = format!(r#""kind":"linear","dtype":"{}","out":"{}","n":{},"k":{},"#, l.dtype, l.out, l.n, l.k);
        let _ = write!(text, r#""tile":{:?},"glu":{},"part":{}"#, l.tile, l.glu, l.part.unwrap_or(0));
        let schedule = Schedule { cluster, ..Schedule::default() };
        all.push((Kernel { program: l.program(&name), schedule }, text, rows));
    }
    // A product a head: queries into the space of latents.
    for tile in [[128, 128], [128, 256]] {
        let h = Heads { heads: 128, n: 512, k: 128, tile, step: 64 };
        let name = format!("heads{}_n{}_k{}_{}x{}", h.heads, h.n, h.k, tile[0], tile[1]);
        let text = format!(
            r#""kind":"heads","dtype":"bf16","out":"bf16","n":{},"k":{},"heads":{},"tile":{tile:?}"#,
            h.n, h.k, h.heads
        );
        all.push((Kernel { program: h.program(&name), schedule: Schedule::default() }, text, &[4096, 1000]));
    }
    for (e, rows) in experts() {
        let [m, n] = e.tile;
        let (parts, glu) = (if e.parts > 1 { "_parts" } else { "" }, if e.glu { "_glu" } else { "" });
        let apart = if e.apart { "_apart" } else { "" };
        let sorted = if e.sorted { "_sorted" } else { "" };
        let name = format!("experts{}_n{}_k{}_{m}x{n}{glu}{sorted}{parts}{apart}", e.experts, e.n, e.k);
        let mut text = format!(r#""kind":"experts","dtype":"e4m3","out":"bf16","n":{},"k":{},"#, e.n, e.k);
        let _ = write!(
            text,
            r#""tile":{:?},"experts":{},"per_token":{},"parts":{},"glu":{},"sorted":{}"#,
            e.tile, e.experts, e.per_token, e.parts, e.glu, e.sorted
        );
        all.push((Kernel { program: e.program(&name), schedule: Schedule::default() }, text, rows));
    }
    all
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("give the folder to write to")?);
    let only = std::env::args().nth(2).unwrap_or_default();
    let described = described().into_iter().filter(|(kernel, ..)| kernel.program.name.contains(&only));
    let kernels: Vec<_> =
        described.map(|(kernel, text, rows)| (kernel, format!(r#"{text},"rows":{rows:?}"#))).collect();
    cubins::write(&folder, &kernels)
}
