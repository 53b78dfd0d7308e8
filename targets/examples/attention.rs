//! Sparse attention for Hopper as cubins, with what a program needs to launch them:
//! `cargo run --release -p dsc-targets --features nvidia --example attention DIR`. `tests/bench/attention.py DIR` checks and times them.

#[path = "../tests/support/attention.rs"]
mod attention;
#[path = "support/cubins.rs"]
mod cubins;

use attention::Attention;
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::{Access, Builder, Program, ReduceKind, ValueId};
use dsc_ir::{DType, Extent, Sym};
use dsc_targets::Kernel;
use std::collections::BTreeSet;
use std::path::PathBuf;

const PREFILL: Attention = Attention {
    heads: 128,
    tile: 64,
    latent: 512,
    rope: 64,
    k: 2048,
    keys: 64,
    fp8: false,
    parts: None,
    searched: false,
};
const DECODE: Attention = Attention { fp8: true, ..PREFILL };
/// Heads of a token and of a block, and parts of the list, of decoding kernels.
const DECODES: [(u32, u32, &[u32]); 4] =
    [(16, 16, &[1, 2, 8, 16, 32]), (64, 64, &[1, 8, 32]), (128, 64, &[1, 2, 4, 16, 32]), (128, 16, &[16])];

/// The same where blocks of so many divide the list and join what they have.
const JOINED: [(u32, u32, &[u32]); 8] = [
    (16, 8, &[4, 8]),
    (16, 16, &[2, 4, 8, 16]),
    (64, 16, &[4, 8, 16]),
    (64, 32, &[4, 8, 16]),
    (64, 64, &[2, 4, 8, 16]),
    (128, 16, &[4, 8, 16]),
    (128, 32, &[4, 8, 16]),
    (128, 64, &[2, 4, 8, 16]),
];

/// Names of a program's parameters.
fn params(program: &Program) -> String {
    format!("{:?}", program.params.iter().map(|p| &p.name).collect::<Vec<_>>())
}

/// Programs by name, and what a launch has to know of each, as JSON.
fn described() -> Vec<(String, Kernel, String)> {
    let mut all = Vec::new();
    let mut kernel = |name: String, a: Attention, cluster: u32, (split, apart): (u32, bool)| {
        let (parts, fp8) = (a.parts.unwrap_or(0), a.fp8);
        let program = a.program(&name);
        let text = format!(
            r#""kind":"attention","heads":{},"tile":{},"k":{},"fp8":{fp8},"parts":{parts},"row_bytes":{},"params":{}"#,
            a.heads,
            a.tile,
            a.k,
            a.row_bytes(),
            params(&program)
        );
        all.push((name, Kernel { program, schedule: Schedule { cluster, split, apart, ..Schedule::default() } }, text));
    };
    for heads in [64, 128] {
        kernel(format!("prefill_h{heads}"), Attention { heads, ..PREFILL }, 0, (0, false));
    }
    for (heads, tile, parts) in DECODES {
        let name = if tile < heads.min(64) { format!("decode_h{heads}t{tile}") } else { format!("decode_h{heads}") };
        for &parts in parts {
            let attention = Attention { heads, tile, parts: (parts > 1).then_some(parts), ..DECODE };
            kernel(format!("{name}_p{parts}"), attention, 0, (0, false));
            if heads > tile && tile == 64 {
                // Each block computes all keys itself.
                kernel(format!("{name}_p{parts}_alone"), attention, 1, (0, false));
            }
        }
    }
    kernel("decode_h128_p4_searched".into(), Attention { parts: Some(4), searched: true, ..DECODE }, 0, (0, false));
    for (heads, tile, splits) in JOINED {
        let name = if tile < heads.min(64) { format!("decode_h{heads}t{tile}") } else { format!("decode_h{heads}") };
        for &split in splits {
            kernel(format!("{name}_s{split}"), Attention { heads, tile, ..DECODE }, 0, (split, false));
            if heads > tile && tile == 64 {
                kernel(format!("{name}_s{split}_alone"), Attention { heads, tile, ..DECODE }, 1, (split, false));
            }
        }
    }
    // Through memory.
    for heads in [16, 64, 128] {
        for split in [2, 4, 8, 16, 32] {
            let attention = Attention { heads, tile: heads.min(64), ..DECODE };
            kernel(format!("decode_h{heads}_m{split}"), attention, 0, (split, true));
        }
    }
    for heads in [16, 64, 128] {
        let splits = DECODES.iter().filter(|d| d.0 == heads).flat_map(|d| d.2);
        let splits: BTreeSet<u32> = splits.copied().filter(|&parts| parts > 1).collect();
        for parts in splits {
            let name = format!("combine_h{heads}_p{parts}");
            let program = combine(&name, heads, parts, 512);
            let text = format!(r#""kind":"combine","heads":{heads},"parts":{parts},"params":{}"#, params(&program));
            all.push((name, Kernel { program, schedule: Schedule::default() }, text));
        }
    }
    all
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("give the folder to write to")?);
    let only = args.next().unwrap_or_default();
    let kernels = described().into_iter().filter(|(name, ..)| name.contains(&only));
    let kernels: Vec<_> = kernels.map(|(_, kernel, text)| (kernel, text)).collect();
    cubins::write(&folder, &kernels)
}

/// Columns of a block that joins parts.
const WIDE: u32 = 512;

/// Joins parts: `sums [T, heads, parts, columns]`, `largest` and `totals [T, heads, parts]` to `y [T, heads, columns]`.
fn combine(name: &str, heads: u32, parts: u32, columns: u32) -> Program {
    let mut b = Builder::new(name);
    let stats: [Extent; 3] = [Sym::T.into(), heads.into(), parts.into()];
    let sums = b.param("sums", DType::F32, &[stats[0], stats[1], stats[2], columns.into()], Access::Read);
    let [largest, totals] = ["largest", "totals"].map(|name| b.param(name, DType::F32, &stats, Access::Read));
    let y = b.param("y", DType::Bf16, &[stats[0], stats[1], columns.into()], Access::Write);
    let (head, token) = (b.grid(heads, 1), b.grid(Sym::T, 1));
    let column = b.grid(columns, WIDE);
    let column = b.map(&[column], |m, v| {
        let n = m.i32(WIDE as i32);
        m.mul(v[0], n)
    });
    let all = |b: &mut Builder, view: ValueId| {
        let x = b.load(view, &[token.into(), head.into(), 0.into()], &[1, 1, parts]);
        b.reshape(x, &[1, parts])
    };
    let (maxima, sizes) = (all(&mut b, largest), all(&mut b, totals));
    let top = b.reduce(maxima, 1, ReduceKind::Max);
    let weighted = b.map(&[maxima, top, sizes], |m, v| {
        let d = m.sub(v[0], v[1]);
        let w = m.exp2(d);
        m.mul(w, v[2])
    });
    let total = b.reduce(weighted, 1, ReduceKind::Sum);
    let inverse = b.map(&[total], |m, v| {
        let (zero, one) = (m.f32(0.0), m.f32(1.0));
        let some = m.lt(zero, v[0]);
        let total = m.select(some, v[0], one);
        m.div(one, total)
    });
    let x = b.load(sums, &[token.into(), head.into(), 0.into(), column.into()], &[1, 1, parts, WIDE]);
    let x = b.reshape(x, &[parts, WIDE]);
    let weights = b.map(&[maxima, top, inverse], |m, v| {
        let d = m.sub(v[0], v[1]);
        let w = m.exp2(d);
        m.mul(w, v[2])
    });
    let weights = b.reshape(weights, &[parts, 1]);
    let x = b.map(&[x, weights], |m, v| m.mul(v[0], v[1]));
    let out = b.reduce(x, 0, ReduceKind::Sum);
    let out = b.cast(out, DType::Bf16);
    let out = b.reshape(out, &[1, 1, WIDE]);
    b.store(y, &[token.into(), head.into(), column.into()], out);
    b.finish().expect("the program is well-typed")
}
