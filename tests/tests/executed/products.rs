//! Matrix products as large steps of real models take them: rings of copies, halves that alternate, blocks dealt to dies. Small models are too
//! narrow for them.

use super::Executed;
use super::attention::Attention;
use super::launches::Launch;
use super::linear::Linear;
use dsc_ir::schedule::Schedule;
use dsc_ir::tile::Program;
use dsc_ir::tile::interp::Binding;
use dsc_ir::{DType, SymValues};
use dsc_targets::{Kernel, Level, Target};

/// Rows: ragged in every tile.
const ROWS: u32 = 300;
/// Tokens of attention, and rows that they choose of.
const TOKENS: u32 = 5;

/// A product, its schedule, and on which chips its loop copies its operands.
struct Case {
    linear: Linear,
    schedule: Schedule,
    copies: &'static [&'static str],
}

const BOTH: &[&str] = &["gfx942", "gfx950"];
/// gfx942 converts e4m3 on its way.
const OCP: &[&str] = &["gfx950"];

fn cases() -> Vec<Case> {
    let bf16 =
        |n, k, tile, step| Linear { dtype: DType::Bf16, n, k, tile, step, out: DType::Bf16, glu: false, part: None };
    let fp8 = |n, k, tile| Linear { dtype: DType::E4m3, ..bf16(n, k, tile, 128) };
    let plain = Schedule::default();
    let halves = Schedule { threads: 512, stages: 3, alternate: true, dies: 8, ..Schedule::default() };
    let case = |linear, schedule: &Schedule, copies| Case { linear, schedule: schedule.clone(), copies };
    vec![
        case(bf16(256, 448, [128, 128], 32), &plain, BOTH),
        case(bf16(200, 512, [64, 64], 64), &plain, BOTH),
        // A weight whose last tile is ragged, and fewer rounds than stages.
        case(bf16(72, 64, [16, 64], 32), &Schedule { stages: 4, ..Schedule::default() }, BOTH),
        case(Linear { part: Some(256), out: DType::F32, ..bf16(128, 640, [16, 64], 64) }, &plain, BOTH),
        case(fp8(256, 1024, [128, 128]), &plain, OCP),
        case(fp8(192, 512, [16, 64]), &plain, OCP),
        case(Linear { part: Some(384), out: DType::F32, ..fp8(128, 1024, [16, 64]) }, &plain, OCP),
        case(Linear { glu: true, out: DType::E4m3, ..fp8(256, 640, [64, 128]) }, &plain, OCP),
        case(fp8(256, 640, [256, 128]), &halves, OCP),
        case(Linear { glu: true, out: DType::E4m3, ..fp8(256, 512, [64, 128]) }, &halves, OCP),
        case(bf16(384, 320, [128, 128], 32), &halves, BOTH),
        case(bf16(384, 320, [256, 128], 64), &halves, OCP),
        // As kernels of a library take sizes.
        case(bf16(64, 128, [64, 64], 64), &Schedule { symbols_by_value: true, ..Schedule::default() }, BOTH),
        // Columns that do not divide into rounds are loaded.
        case(bf16(64, 200, [64, 64], 64), &plain, &[]),
    ]
}

/// Attention over several rounds of keys, with and without codes; the columns of real models, and few.
fn attention() -> Vec<Attention> {
    let real = Attention {
        heads: 16,
        tile: 16,
        latent: 512,
        rope: 64,
        k: 160,
        keys: 32,
        fp8: true,
        parts: None,
        searched: false,
    };
    vec![
        real,
        Attention { latent: 128, heads: 8, tile: 8, parts: Some(2), searched: true, ..real },
        Attention { latent: 64, fp8: false, ..real },
    ]
}

/// Random contents: factors near one, codes and numbers that are no NaN.
fn launch(program: &Program, rows: u32) -> Launch<'_> {
    let syms = SymValues([rows; 6]);
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let buffers = program.params.iter().map(|p| {
        let view = program.view(p.value).expect("a parameter is a view");
        let last: u64 = view.shape.iter().zip(&view.strides).map(|(e, s)| (e.eval(&syms) - 1) * s.bytes as u64).sum();
        let elements = (view.offset + last) / view.dtype.bytes() as u64 + 1;
        let mut bytes = Vec::new();
        for _ in 0..elements {
            let n = next();
            match view.dtype {
                // Numbers of rows, some of which there are not, and how many a token has.
                DType::I32 if p.name == "indices" => bytes.extend((n as i32 % (rows as i32 + 6) - 3).to_le_bytes()),
                DType::I32 => bytes.extend((n as i32 % 200).to_le_bytes()),
                DType::F32 => bytes.extend((0.5 + (n % 1000) as f32 / 1000.0).to_le_bytes()),
                DType::Bf16 => bytes.extend(((n & 0x81ff | 0x3e00) as u16).to_le_bytes()),
                _ => bytes.push((n & 0x80 | (0x20 + n % 32)) as u8),
            }
        }
        bytes
    });
    let buffers: Vec<Vec<u8>> = buffers.collect();
    let bindings = (0..buffers.len()).map(|buffer| Binding { buffer, offset: 0 }).collect();
    Launch { program, syms, buffers, bindings }
}

fn check(chip: &str, target: &Executed) {
    let cases = cases();
    let products = cases.iter().enumerate();
    let mut kernels: Vec<Kernel> = products
        .map(|(i, c)| Kernel { program: c.linear.program(&format!("product{i}")), schedule: c.schedule.clone() })
        .collect();
    let attention = attention().into_iter().enumerate();
    kernels.extend(
        attention.map(|(i, a)| Kernel { program: a.program(&format!("attention{i}")), schedule: Schedule::default() }),
    );
    let module = target.compile(&kernels).unwrap_or_else(|e| panic!("{chip}: {e}"));
    let mut failures = Vec::new();
    for (i, kernel) in kernels.iter().enumerate() {
        let (sched, name) = (&module.listings[i].text, &kernel.program.name);
        match cases.get(i) {
            Some(case) => {
                let (copies, alternates) = (sched.contains("copy c0.0"), sched.contains(" alternate "));
                let expected = case.copies.contains(&chip);
                if copies != expected || alternates != (expected && case.schedule.alternate) {
                    failures.push(format!("{name}: copies: {copies}, alternates: {alternates}"));
                }
            }
            None if !sched.contains("= gather %latent") || !sched.contains("@held") => {
                failures.push(format!("{name} gathers nothing ahead"));
            }
            None => {}
        }
        let rows = if i < cases.len() { ROWS } else { TOKENS };
        match target.check(i, &launch(&kernel.program, rows)) {
            Err(e) => failures.push(format!("{name}: {e}")),
            Ok(errors) => {
                for (dtype, worst) in errors {
                    let most = match dtype {
                        DType::F32 => 1e-5,
                        DType::Bf16 => 1e-2,
                        _ => 0.13,
                    };
                    if worst.error > most {
                        failures.push(format!("{name}, {dtype}: {:.1e}: {}", worst.error, worst.what));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{chip}: {}", failures.join("\n"));
}

fn target(chip: &str) -> Executed {
    Executed::keeping(chip, vec![Level::Sched])
}

#[test]
fn products_gfx942() {
    check("gfx942", &target("gfx942"));
}

#[test]
fn products_gfx950() {
    check("gfx950", &target("gfx950"));
}

#[test]
fn products_with_folded_bounds() {
    for chip in ["gfx942", "gfx950"] {
        check(chip, &target(chip).folding());
    }
}
