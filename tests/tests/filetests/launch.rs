//! Launches of kernels: on the interpreter, and the same on every target.
//!
//! ```text
//! ; run T=2                 symbols; 0 where they are not given
//! ; in %x = 1 2 3 4         memory of a parameter, element by element; more of it may follow on lines that start with `;   `
//! ; in %ids = seed 7 -1..9  random integers (floats: multiples of 1/8 up to 2 either way, so that sums are exact)
//! ; out %y = 2 4 6 8        what the interpreter leaves there; memory that is not given is `nan` and `-1` before
//! ; error: ...              or why the interpreter refuses the launch
//! ```
//!
//! Scheduled kernels run on their interpreter, several times: however their roles interleave, they must leave the same.

use super::Outcome;
use dsc_ir::artifact::{Header, KernelEntry, ModelFacts, Numerics, ParamEntry};
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::sched::{self, Scheduled};
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::interp::{Binding, InterpError, Options, block_count, run_blocks};
use dsc_ir::tile::{self, Program, ViewType};
use dsc_ir::{DType, Sym, SymValues};
use dsc_runtime::device::{BoundLaunch, Code};
use dsc_runtime::{CpuDevice, Device, DeviceError};
use dsc_targets::nvidia::arch::Arch;
use dsc_targets::nvidia::lower::{emulate, lower};
use dsc_targets::{Kernel, Module};
use half::{bf16, f16};

/// What launches run on besides the interpreter; those that this machine lacks are left out.
const TARGETS: [&str; 2] = ["cpu-v3", "cpu-v4"];

/// Architectures whose code is emulated, lowered the plain way.
const EMULATED: [&str; 2] = ["sm_80", "sm_90a"];

/// Runs of a scheduled kernel, each with units interleaved in another way.
const SEEDS: u64 = 8;

/// Memory before and after a launch.
struct Ran<'a> {
    syms: &'a SymValues,
    before: &'a [Vec<u8>],
    after: &'a mut [Vec<u8>],
    bindings: &'a [Binding],
}

/// Runs one launch: its notes, with what the interpreter leaves in memory.
pub fn launch(program: &Program, notes: &[String]) -> Outcome<Vec<String>> {
    run_notes(program, notes, &|Ran { syms, before, after, bindings }| {
        let blocks = 0..block_count(program, syms).ok_or("the grid is endless")?;
        let result = run_blocks(program, syms, after, bindings, blocks, Options { check_races: true });
        if result.is_ok() {
            TARGETS.into_iter().try_for_each(|target| on_target(target, program, syms, before, after))?;
            EMULATED.into_iter().try_for_each(|arch| emulated(arch, program, syms, before, after, bindings))?;
        }
        Ok(result)
    })
}

/// The same for a scheduled kernel.
pub fn launch_scheduled(kernel: &Scheduled, notes: &[String]) -> Outcome<Vec<String>> {
    let interface = Program {
        name: kernel.name.clone(),
        grid: kernel.grid.clone(),
        params: kernel.params.clone(),
        types: kernel.types.clone(),
        body: tile::Region::default(),
    };
    run_notes(&interface, notes, &|Ran { syms, before, after, bindings }| {
        let run = |seed| {
            let mut memory = before.to_vec();
            let result = sched::interp::run(
                kernel,
                syms,
                &mut memory,
                bindings,
                sched::interp::Options { seed, check_races: true },
            );
            (result, memory)
        };
        let (result, memory) = run(0);
        if let Some(seed) = (1..SEEDS).find(|&seed| run(seed) != (result.clone(), memory.clone())) {
            return Err(format!("what {} leaves depends on how its units interleave: seed {seed}", kernel.name).into());
        }
        after.clone_from_slice(&memory);
        Ok(result)
    })
}

fn run_notes(
    program: &Program,
    notes: &[String],
    run: &dyn Fn(Ran<'_>) -> Outcome<Result<(), InterpError>>,
) -> Outcome<Vec<String>> {
    let words = notes.first().and_then(|n| n.strip_prefix("run")).ok_or("a launch starts with `; run`")?;
    let mut syms = SymValues::default();
    for word in words.split_whitespace() {
        let (name, value) = word.split_once('=').ok_or_else(|| format!("`{word}` is not SYMBOL=VALUE"))?;
        syms = syms.with(Sym::from_name(name).ok_or_else(|| format!("no symbol {name}"))?, value.parse()?);
    }
    let groups: Vec<&[String]> = notes[1..].chunk_by(|_, next| next.starts_with("  ")).collect();
    let entries = params(program);
    let mut memory = Vec::new();
    for p in &entries {
        let bytes = p.span(&syms).map_err(|_| format!("%{} is endless", p.name))?.map_or(0, |(_, end)| end as usize);
        let line = groups
            .iter()
            .map(|g| g.join(" "))
            .find_map(|line| Some(line.strip_prefix(&format!("in %{} =", p.name))?.to_string()));
        memory.push(match line {
            Some(line) => {
                values(&line, p.view.dtype, bytes / p.view.dtype.bytes()).map_err(|e| format!("%{}: {e}", p.name))?
            }
            None if p.write => vec![0xff; bytes],
            None => return Err(format!("%{} has no values", p.name).into()),
        });
    }
    let bindings: Vec<Binding> = (0..memory.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    let mut left = memory.clone();
    let result = run(Ran { syms: &syms, before: &memory, after: &mut left, bindings: &bindings })?;
    let mut new = notes[..1].to_vec();
    for group in groups {
        let of = |word| entries.iter().position(|p| group[0].starts_with(&format!("{word} %{} =", p.name)));
        match (of("in"), of("out")) {
            (Some(_), _) => new.extend_from_slice(group),
            (_, Some(i)) if result.is_ok() => new.extend(print(&entries[i], &decode(entries[i].view.dtype, &left[i]))),
            (_, out) if out.is_some() || group[0].starts_with("error:") => {}
            _ => return Err(format!("`{}` means nothing here", group[0]).into()),
        }
    }
    if let Err(e) = result {
        new.push(format!("error: {e}"));
    }
    Ok(new)
}

fn params(program: &Program) -> Vec<ParamEntry> {
    let entry = |p: &tile::Param| {
        let view = program.view(p.value).cloned().unwrap_or_else(|| ViewType::dense(DType::F32, &[]));
        ParamEntry { name: p.name.clone(), view, write: p.access.writes() }
    };
    program.params.iter().map(entry).collect()
}

/// Compiles and runs the kernel, and compares what it leaves with what the interpreter left. Bytes around each buffer show whether it
/// reads or writes outside.
fn on_target(name: &str, program: &Program, syms: &SymValues, memory: &[Vec<u8>], want: &[Vec<u8>]) -> Outcome {
    const AROUND: usize = 256;
    let target = dsc_targets::target(name, false)?;
    let module = target.compile(&[Kernel { program: program.clone(), schedule: Schedule::default() }])?;
    let mut device = CpuDevice::new(2)?;
    match device.load_code(&header(program, &module), Code::native(&module.code)) {
        Err(DeviceError::Features { .. }) => return Ok(()),
        loaded => loaded?,
    }
    let mut args = Vec::new();
    for bytes in memory {
        let padded = [&[0xa5; AROUND], bytes.as_slice(), &[0xa5; AROUND]].concat();
        let buffer = device.alloc(padded.len() as u64, "a parameter")?;
        device.upload(buffer, 0, &padded)?;
        args.push((buffer, AROUND as u64));
    }
    let bound = device.bind(&[BoundLaunch { kernel: 0, node: program.name.clone(), args: args.clone() }], syms)?;
    device.run(bound, 0..1, syms, None)?;
    for ((p, want), (buffer, _)) in params(program).iter().zip(want).zip(args) {
        let mut got = vec![0; want.len() + 2 * AROUND];
        device.read(buffer, 0, &mut got)?;
        let inside = AROUND..AROUND + want.len();
        if got[..inside.start].iter().chain(&got[inside.end..]).any(|&b| b != 0xa5) {
            return Err(format!("{name} writes outside of %{}", p.name).into());
        }
        compare(p.view.dtype, want, &got[inside]).map_err(|e| format!("{name}, %{}: {e}", p.name))?;
    }
    Ok(())
}

/// Lowers the kernel for an NVIDIA architecture and emulates that, with warps in two orders.
fn emulated(
    name: &str,
    program: &Program,
    syms: &SymValues,
    memory: &[Vec<u8>],
    want: &[Vec<u8>],
    bindings: &[Binding],
) -> Outcome {
    let arch = Arch::named(name).ok_or("no such architecture")?;
    let arch = Arch { has_wgmma: false, has_tma: false, ..*arch };
    let lowered = lower(&Kernel { program: program.clone(), schedule: Schedule::default() }, &arch)?;
    for seed in 0..2 {
        let mut got = memory.to_vec();
        emulate::run_blocks(program, &lowered, syms, &mut got, bindings, seed).map_err(|e| format!("{name}: {e}"))?;
        for ((p, want), got) in params(program).iter().zip(want).zip(&got) {
            compare(p.view.dtype, want, got).map_err(|e| format!("{name}, %{}: {e}", p.name))?;
        }
    }
    Ok(())
}

fn header(program: &Program, module: &Module) -> Header {
    let code = &module.kernels[0];
    let kernel = KernelEntry {
        name: program.name.clone(),
        what: String::new(),
        entry: code.entry,
        code_bytes: code.code_bytes,
        scratch_bytes: code.scratch_bytes,
        grid: program.grid.clone(),
        params: params(program),
        schedule: Schedule::default(),
        work: Default::default(),
        gpu: None,
    };
    let model = ModelFacts {
        model_type: String::new(),
        config_hash: String::new(),
        vocab: 1,
        layers: 0,
        index_topk: 1,
        bos: None,
        eos: vec![],
        max_context: 1,
        ranks: 1,
        rank: 0,
    };
    Header {
        compiler: String::new(),
        target: "cpu".into(),
        features: module.features.clone(),
        numerics: Numerics::Exact,
        model,
        weights: vec![],
        states: vec![],
        kernels: vec![kernel],
        steps: vec![],
        library: None,
        entries: Vec::new(),
        sections: vec![],
    }
}

/// NaNs in the same places, integers equal, floats within a few units of the last place.
fn compare(dtype: DType, want: &[u8], got: &[u8]) -> Outcome {
    let tolerance = match dtype {
        DType::F32 => 1e-5,
        DType::Bf16 => 1.0 / 128.0,
        DType::F16 => 1.0 / 1024.0,
        DType::E4m3 => 1.0 / 8.0,
        DType::I32 | DType::Bool => 0.0,
    };
    for (i, (want, got)) in decode(dtype, want).into_iter().zip(decode(dtype, got)).enumerate() {
        let near = (want - got).abs() <= tolerance * want.abs().max(1.0 / 64.0);
        if !(near || want == got || (want.is_nan() && got.is_nan())) {
            return Err(format!("element {i} is {got}, must be {want}").into());
        }
    }
    Ok(())
}

/// Memory from `1 2 3`, or from `seed N` and perhaps `LO..HI`.
fn values(text: &str, dtype: DType, count: usize) -> Outcome<Vec<u8>> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let numbers: Vec<f64> = match words.as_slice() {
        ["seed", seed, range @ ..] => {
            let unit = if dtype == DType::I32 { 1.0 } else { 8.0 };
            let range = range.first().copied().unwrap_or(if unit == 1.0 { "-8..8" } else { "-2..2" });
            let (lo, hi) = range.split_once("..").ok_or("a range is LO..HI")?;
            let (lo, hi, mut state): (f64, f64, u64) = (lo.parse()?, hi.parse()?, seed.parse()?);
            let mut random = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                lo + ((state >> 33) as f64 % ((hi - lo) * unit).max(1.0)).floor() / unit
            };
            (0..count).map(|_| random()).collect()
        }
        words => words.iter().map(|w| w.parse()).collect::<Result<_, _>>()?,
    };
    if numbers.len() != count {
        return Err(format!("{} values for {count} elements", numbers.len()).into());
    }
    Ok(numbers.iter().flat_map(|&x| encode(dtype, x)).collect())
}

fn encode(dtype: DType, x: f64) -> Vec<u8> {
    match dtype {
        DType::F32 => (x as f32).to_le_bytes().to_vec(),
        DType::Bf16 => bf16::from_f64(x).to_le_bytes().to_vec(),
        DType::F16 => f16::from_f64(x).to_le_bytes().to_vec(),
        DType::E4m3 => vec![f32_to_e4m3(x as f32)],
        DType::I32 => (x as i32).to_le_bytes().to_vec(),
        DType::Bool => vec![u8::from(x != 0.0)],
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    let one = |b: &[u8]| match dtype {
        DType::F32 => f32::from_bits(word(b)).into(),
        DType::I32 => (word(b) as i32).into(),
        DType::Bf16 => bf16::from_bits(half(b)).into(),
        DType::F16 => f16::from_bits(half(b)).into(),
        DType::E4m3 => e4m3_to_f32(b[0]).into(),
        DType::Bool => b[0].into(),
    };
    bytes.chunks_exact(dtype.bytes()).map(one).collect()
}

/// The `out` lines of a parameter: one, or one for each row of its memory.
fn print(p: &ParamEntry, values: &[f64]) -> Vec<String> {
    let row = match p.view.strides.as_slice() {
        [.., s, _] if s.sym.is_none() && s.bytes > 0 => s.bytes as usize / p.view.dtype.bytes(),
        _ => values.len(),
    };
    let number = |&x: &f64| match p.view.dtype {
        DType::I32 => format!("{x}"),
        _ if x.is_nan() => "nan".into(),
        _ => format!("{:?}", x as f32).trim_end_matches(".0").to_string(),
    };
    let line = |row: &[f64]| row.iter().map(number).collect::<Vec<_>>().join(" ");
    let rows: Vec<String> = values.chunks(row.max(1)).flat_map(|row| row.chunks(16)).map(line).collect();
    match rows.as_slice() {
        [] => vec![format!("out %{} =", p.name)],
        [row] => vec![format!("out %{} = {row}", p.name)],
        rows => [format!("out %{} =", p.name)].into_iter().chain(rows.iter().map(|r| format!("  {r}"))).collect(),
    }
}
