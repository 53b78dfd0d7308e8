//! Every kernel of some compiled models: as machine code against the tile interpreter, on the same random memory.
//!
//! Models are compiled whole, for all shape classes, so kernels have the shapes and schedules that run; but each kernel is run by
//! itself. Its buffers hold random numbers of the types of its views, and integers that are mostly good indices, some −1, and some
//! beyond every table: bounds are part of what a tile program means. Sizes are small and ragged.
//!
//! A kernel that kills the process is the last that `DSC_TRACE=1 cargo test --test differential -- --test-threads 1` names.

mod launches;
#[path = "../../targets/tests/support/mod.rs"]
mod support;

use dsc::compile::{Options, compile_dir};
use dsc_ir::artifact::Numerics;
use dsc_ir::tile::interp::{self, Binding};
use dsc_ir::tile::{Access, Builder};
use dsc_ir::{DType, Sym, SymValues};
use dsc_targets::Kernel;
use launches::{Errors, Launch, check_plan};
use std::path::Path;
use support::Mapped;

/// Bytes around buffers that must stay as they are.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0x5a;

/// Runs blocks of a kernel. `buffers` have [`GUARD`] bytes before and after what is bound.
fn call(
    mapped: &Mapped,
    kernel: usize,
    buffers: &mut [Vec<u8>],
    bindings: &[Binding],
    syms: &SymValues,
    blocks: std::ops::Range<u64>,
) {
    let starts: Vec<*mut u8> = buffers.iter_mut().map(|b| b.as_mut_ptr()).collect();
    let args: Vec<*mut u8> = bindings.iter().map(|b| starts[b.buffer].wrapping_add(GUARD + b.offset)).collect();
    mapped.call(kernel, &args, syms, blocks.start, blocks.end);
}

/// Runs a launch both ways.
fn check(mapped: &Mapped, kernel: usize, launch: &Launch) -> Result<Errors, String> {
    let mut guarded: Vec<Vec<u8>> =
        launch.buffers.iter().map(|b| [vec![GUARD_BYTE; GUARD], b.clone(), vec![GUARD_BYTE; GUARD]].concat()).collect();
    // In two calls, the later blocks first.
    let blocks = interp::block_count(launch.program, &launch.syms).expect("a small grid");
    for range in [blocks / 2..blocks, 0..blocks / 2] {
        call(mapped, kernel, &mut guarded, &launch.bindings, &launch.syms, range);
    }
    for (i, b) in guarded.iter_mut().enumerate() {
        if b[..GUARD].iter().chain(&b[b.len() - GUARD..]).any(|&x| x != GUARD_BYTE) {
            return Err(format!("it wrote outside of buffer {i}"));
        }
        b.drain(..GUARD);
        b.truncate(b.len() - GUARD);
    }
    launch.compare(&guarded)
}

/// Tiles of one row at rows that data says, before and behind a view: they read zero, and are not written.
#[test]
fn rows_outside_of_a_view() {
    let mut b = Builder::new("rows_outside");
    let at = b.param("at", DType::I32, &[Sym::T.into()], Access::Read);
    let x = b.param("x", DType::F32, &[4.into(), 8.into()], Access::Read);
    let y = b.param("y", DType::F32, &[Sym::T.into(), 8.into()], Access::Write);
    let z = b.param("z", DType::F32, &[4.into(), 8.into()], Access::Write);
    let block = b.grid(Sym::T, 1);
    let row = b.load_scalar(at, &[block.into()]);
    let tile = b.load(x, &[row.into(), 0.into()], &[1, 8]);
    b.store(y, &[block.into(), 0.into()], tile);
    let one = b.full(1.0, &[1, 8]);
    b.store(z, &[row.into(), 0.into()], one);
    let program = b.finish().expect("a program");
    let target = dsc_targets::target("cpu", false).expect("a target");
    let kernel = Kernel { program: program.clone(), schedule: Default::default() };
    let module = target.compile(&[kernel]).expect("code");
    let mapped = Mapped::new(module);
    // Near enough that a wrong access is one to a guard, not to nowhere.
    let rows = [0, -1, 4, -2, 3, -4, 5];
    let at: Vec<u8> = rows.iter().flat_map(|r: &i32| r.to_le_bytes()).collect();
    let x: Vec<u8> = (0..32).flat_map(|i| (i as f32 + 1.0).to_le_bytes()).collect();
    let buffers = vec![at, x, vec![0; rows.len() * 32], vec![0; 128]];
    let syms = SymValues::default().with(Sym::T, rows.len() as u32);
    let bindings = (0..4).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let worst = check(&mapped, 0, &Launch { program: &program, syms, buffers, bindings });
    assert_eq!(worst.map(|w| w.values().map(|w| w.what.clone()).collect()), Ok(Vec::<String>::new()));
}

/// Every kernel of a model as the processor runs it.
fn check_model(folder: &str, numerics: Numerics) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let options = Options { numerics, max_context: Some(1024), ..Options::default() };
    let compiled = compile_dir(&dir, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let mapped = Mapped::new(compiled.module.clone());
    check_plan(&format!("{folder} {numerics:?}"), &compiled.plan, &|kernel, launch| check(&mapped, kernel, launch));
}

#[test]
fn v32_odd_exact() {
    check_model("golden/v32-odd", Numerics::Exact);
}

#[test]
fn v32_odd_deployed() {
    check_model("golden/v32-odd", Numerics::Deployed);
}

#[test]
fn glm_odd_exact() {
    check_model("golden/glm-odd", Numerics::Exact);
}

#[test]
fn glm_odd_deployed() {
    check_model("golden/glm-odd", Numerics::Deployed);
}

#[test]
fn v32_heads_fp8_exact() {
    check_model("golden/v32-heads-fp8", Numerics::Exact);
}

#[test]
fn v32_heads_fp8_deployed() {
    check_model("golden/v32-heads-fp8", Numerics::Deployed);
}

#[test]
fn tiny_model_deployed() {
    check_model("../examples/tiny-model", Numerics::Deployed);
}
