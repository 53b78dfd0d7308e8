//! Text of tile programs: nothing panics; what verifies prints to text that parses to the same program; and if it is small, it runs
//! the same before and after.
#![no_main]

use dsc_fuzz::{MAX_COST, cost, texts};
use dsc_ir::SymValues;
use dsc_ir::tile::interp::{Binding, Options, block_count, run_blocks};
use dsc_ir::tile::{Program, canonical, parse, verify};
use libfuzzer_sys::fuzz_target;

const BUFFER_BYTES: usize = 512;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = str::from_utf8(data) else { return };
    texts(text).iter().for_each(|text| read(text));
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
