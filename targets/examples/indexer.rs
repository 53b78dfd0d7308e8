//! The lightning indexer for Hopper as cubins, with what a program needs to launch them:
//! `cargo run --release -p dsc-targets --features nvidia --example indexer DIR [ONLY]`. `tests/bench/indexer.py DIR` checks and times them.

#[path = "support/cubins.rs"]
mod cubins;
#[path = "../tests/support/scores.rs"]
mod scores;
#[path = "../tests/support/select.rs"]
mod select;

use dsc_ir::schedule::Schedule;
use dsc_ir::tile::Program;
use dsc_targets::Kernel;
use scores::Scores;
use select::Select;
use std::path::PathBuf;

const DECODE: Scores = Scores { heads: 64, rows: 1, pages: 1, paged: true, scaled: false, fill: false, select: None };
const PREFILL: Scores = Scores { rows: 8, pages: 64, paged: false, ..DECODE };

/// Programs, schedules and descriptions.
fn described() -> Vec<(Program, Schedule, String)> {
    let mut all = Vec::new();
    let mut scores = |s: Scores| {
        let kind = match (s.select, s.paged) {
            (Some(k), _) => format!("best{k}"),
            (None, true) => "decode".into(),
            (None, false) => "prefill".into(),
        };
        let name = format!("{kind}_h{}_r{}_p{}{}", s.heads, s.rows, s.pages, if s.fill { "_fill" } else { "" });
        let text = format!(
            r#""kind":"{}","heads":{},"rows":{},"pages":{},"paged":{},"fill":{},"k":{}"#,
            if s.select.is_some() { "best" } else { "scores" },
            s.heads,
            s.rows,
            s.pages,
            s.paged,
            s.fill,
            s.select.unwrap_or(0)
        );
        all.push((s.program(&name), Schedule::default(), text));
    };
    for pages in [1, 2, 4, 8, 16] {
        scores(Scores { pages, ..DECODE });
    }
    for pages in [1, 2, 4, 8, 16] {
        scores(Scores { rows: 2, pages, ..DECODE });
    }
    scores(Scores { pages: 4, fill: true, ..DECODE });
    scores(Scores { heads: 32, pages: 4, ..DECODE });
    for rows in [4, 8] {
        scores(Scores { rows, ..PREFILL });
    }
    scores(Scores { rows: 8, select: Some(2048), ..PREFILL });
    for (k, cluster, sharing, slots) in [
        (2048, 1, 1, false),
        (2048, 1, 2, false),
        (2048, 2, 1, false),
        (2048, 4, 1, false),
        (2048, 8, 1, false),
        (2048, 8, 1, true),
        (2048, 1, 1, true),
        (512, 8, 1, false),
        (1024, 4, 1, false),
    ] {
        let shared = if sharing > 1 { format!("_s{sharing}") } else { String::new() };
        let name = format!("select{k}_c{cluster}{shared}{}", if slots { "_slots" } else { "" });
        let text = format!(r#""kind":"select","k":{k},"cluster":{cluster},"slots":{slots}"#);
        let program = Select { k, step: 512, slots }.program(&name);
        all.push((program, Schedule { cluster, sharing, ..Schedule::default() }, text));
    }
    all
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().ok_or("give the folder to write to")?);
    let only = args.next().unwrap_or_default();
    let kernels = described().into_iter().filter(|(program, ..)| program.name.contains(&only));
    let kernels = kernels.map(|(program, schedule, text)| {
        let params: Vec<&str> = program.params.iter().map(|p| p.name.as_str()).collect();
        let text = format!(r#"{text},"params":{params:?}"#);
        (Kernel { program, schedule }, text)
    });
    cubins::write(&folder, &kernels.collect::<Vec<_>>())
}
