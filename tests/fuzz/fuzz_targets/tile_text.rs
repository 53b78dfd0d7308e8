//! Text of tile programs: nothing panics; what verifies prints to text that parses to the same program; and if it is small, it runs
//! the same before and after.
#![no_main]

use dsc_ir::SymValues;
use dsc_ir::tile::interp::{Binding, Options, block_count, run_blocks};
use dsc_ir::tile::{Index, Op, Program, Region, Type, canonical, parse, verify};
use libfuzzer_sys::fuzz_target;

/// What a program may cost to be run: elements written, over all blocks and rounds of loops.
const MAX_COST: u64 = 1 << 16;
const BUFFER_BYTES: usize = 512;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    // The file tests are seeds: texts between lines of their harness.
    text.split('\n').collect::<Vec<_>>().split(|line| line.starts_with(';')).for_each(|lines| read(&lines.join("\n")));
});

fn read(text: &str) {
    match parse(text) {
        Ok(programs) => programs.iter().for_each(check),
        Err(e) => assert!(e.line >= 1 && e.column >= 1 && !e.to_string().is_empty()),
    }
}

fn check(program: &Program) {
    let diagnostics = verify(program);
    let text = program.to_string();
    if !diagnostics.is_empty() {
        assert!(diagnostics.iter().all(|d| !d.to_string().is_empty()));
        return;
    }
    let numbered = canonical(program);
    assert_eq!(parse(&text).as_deref(), Ok([numbered.clone()].as_slice()), "{text}");
    assert_eq!(numbered.to_string(), text);
    for syms in [SymValues([3, 2, 2, 1, 2, 9]), SymValues::default()] {
        if cost(program, &syms) <= MAX_COST {
            assert_eq!(run(program, &syms), run(&numbered, &syms), "{text}");
        }
    }
}

fn run(program: &Program, syms: &SymValues) -> (Vec<Vec<u8>>, Result<(), String>) {
    let buffer = |i: usize| (0..BUFFER_BYTES).map(|b| (b * 7 + i * 31) as u8).collect();
    let mut buffers: Vec<Vec<u8>> = (0..program.params.len()).map(buffer).collect();
    let bindings: Vec<Binding> = (0..buffers.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let blocks = 0..block_count(program, syms).unwrap_or(0);
    let result = run_blocks(program, syms, &mut buffers, &bindings, blocks, Options { check_races: true });
    (buffers, result.map_err(|e| e.to_string().replace(|c: char| c.is_ascii_digit(), "")))
}

/// An upper bound of the elements written; saturates where a loop's bound comes from data.
fn cost(program: &Program, syms: &SymValues) -> u64 {
    let blocks = block_count(program, syms).unwrap_or(u64::MAX);
    blocks.saturating_mul(region_cost(program, &program.body, syms).saturating_add(1))
}

fn region_cost(program: &Program, region: &Region, syms: &SymValues) -> u64 {
    let mut known = Vec::new();
    let mut total = 1u64;
    for inst in &region.insts {
        if let (Op::Sym(sym), Some(&v)) = (&inst.op, inst.results.first()) {
            known.push((v, i64::from(syms.get(*sym))));
        }
        let bound = |i: &Index| match i {
            Index::Const(c) => Some(*c),
            Index::Value(v) => known.iter().find(|(k, _)| k == v).map(|(_, n)| *n),
        };
        let inner = match &inst.op {
            Op::For { lo, hi, step, body, .. } => match (bound(lo), bound(hi)) {
                (Some(lo), Some(hi)) => {
                    let rounds = (hi.saturating_sub(lo).max(0) as u64).div_ceil(u64::from((*step).max(1)));
                    rounds.saturating_mul(region_cost(program, body, syms))
                }
                _ => u64::MAX,
            },
            Op::If { then, otherwise, .. } => {
                region_cost(program, then, syms).max(region_cost(program, otherwise, syms))
            }
            Op::Dot { a, b, .. } => elements(program.ty(*a)).saturating_mul(elements(program.ty(*b))),
            Op::Map { body, .. } => {
                let width: u64 = inst.results.iter().map(|&v| elements(program.ty(v))).sum();
                width.saturating_mul(body.insts.len() as u64)
            }
            Op::Store { value, .. } | Op::Scatter { value, .. } => elements(program.ty(*value)),
            _ => 0,
        };
        let made = inst.results.iter().fold(0u64, |n, &v| n.saturating_add(elements(program.ty(v))));
        total = total.saturating_add(inner).saturating_add(made);
    }
    total
}

fn elements(ty: &Type) -> u64 {
    match ty {
        Type::Tile(t) => t.shape.iter().map(|&n| u64::from(n)).product(),
        Type::View(_) => 0,
        Type::Topk { rows, k } => u64::from(*rows) * u64::from(*k),
    }
}
