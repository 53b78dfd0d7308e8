//! What the kernels of the real config must be, statically: nothing spills, scalar registers among it; loops of products keep loads and copies under way, move 16 bytes at a time
//! where the chip does, and have the share of matrix instructions that they had. Floors are a little below what there is; raise them with it.

use super::Executed;
use dsc::compile::{Options, compile_for};
use dsc::front::config::ModelConfig;
use dsc_cdna::loops::{Loop, loops};
use dsc_ir::artifact::Numerics;
use dsc_targets::Level;
use std::path::Path;

/// The loops of kernels, by how their names begin.
struct Floor {
    kernel: &'static str,
    /// The least share of issue cycles, in percent, of the best one.
    share: f64,
    /// The least share of accesses of LDS that are of 16 bytes, in percent, of the one with most.
    wide: f64,
}

const fn floor(kernel: &'static str, share: f64, wide: f64) -> Floor {
    Floor { kernel, share, wide }
}

/// Kernels whose loops gather or load what they multiply, or convert it, and the most barriers of a round.
const AHEAD: [(&str, usize); 5] =
    [("dsa_mqa", 6), ("dsa_index_fp8", 7), ("linear_fp8", 2), ("mha", 4), ("head_linear_combine", 4)];

/// What is wrong with a loop of products.
fn faults(name: &str, l: &Loop, direct_16: bool) -> Vec<&'static str> {
    let copies = l.copies > 0;
    let ahead = AHEAD.iter().find(|(kernel, _)| name.starts_with(kernel));
    let checks = [
        (l.scratch > 0, "touches scratch"),
        (l.waits[0] > 0, "waits until nothing is under way"),
        (!copies && ahead.is_some_and(|(_, most)| l.barriers > *most), "meets more barriers a round than it did"),
        (copies && l.barriers > 4, "meets more than four barriers a round"),
        // Factors of partial sums move by words.
        (copies && direct_16 && l.global[1] - l.global[0] > 2, "copies less than 16 bytes at a time"),
    ];
    checks.into_iter().filter_map(|(wrong, what)| wrong.then_some(what)).collect()
}

fn check(chip: &str, floors: &[Floor], rings: usize) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/deepseek-v3.2");
    let config = ModelConfig::read(&dir).unwrap_or_else(|e| panic!("{e}"));
    let options = Options { numerics: Numerics::Deployed, layers: Some(vec![0, 3]), ..Options::default() };
    let target = Executed::keeping(chip, vec![Level::Asm]);
    compile_for(&target, &config, "", None, &options, &mut |_| {}).unwrap_or_else(|e| panic!("{e}"));
    let module = target.module.borrow();
    let mut problems = module.warnings.clone();
    for kernel in &module.kernels {
        let resources = kernel.gpu.as_ref().and_then(|g| g.resources).expect("machine code");
        if (resources.spill_bytes, resources.scalar_spills, resources.stack_bytes) != ([0, 0], 0, 0) {
            problems.push(format!("{} spills", kernel.name));
        }
    }
    let kernels: Vec<(&str, Vec<Loop>)> = module.listings.iter().map(|l| (l.kernel.as_str(), loops(&l.text))).collect();
    let with_ring = kernels.iter().filter(|(_, loops)| loops.iter().any(|l| l.copies > 0)).count();
    if with_ring < rings {
        problems.push(format!("{with_ring} kernels have rings, which {rings} had"));
    }
    for (name, loops) in &kernels {
        problems
            .extend(loops.iter().flat_map(|l| faults(name, l, chip == "gfx950")).map(|what| format!("{name} {what}")));
    }
    for floor in floors {
        let percent = |of: [f64; 2]| 100.0 * of[0] / of[1].max(1.0);
        let best = |of: &dyn Fn(&Loop) -> f64| {
            let loops = kernels.iter().filter(|(name, _)| name.starts_with(floor.kernel)).flat_map(|(_, loops)| loops);
            loops.map(of).max_by(f64::total_cmp)
        };
        let share = best(&|l| percent(l.cycles));
        let wide = best(&|l| percent(l.local.map(|n| n as f64)));
        for (what, found, least) in
            [("of issue cycles are products", share, floor.share), ("of LDS accesses are wide", wide, floor.wide)]
        {
            match found {
                Some(found) if found >= least => {}
                Some(found) => problems.push(format!("{}: {found:.0} % {what}, {least} % are asked", floor.kernel)),
                None => problems.push(format!("there is no kernel {}", floor.kernel)),
            }
        }
    }
    assert!(problems.is_empty(), "{chip}:\n{}", problems.join("\n"));
}

#[test]
fn hot_loops_gfx942() {
    let floors = [
        floor("linear_bf16_bf16_f32_n129280", 40.0, 99.0),
        floor("linear_fp8_fp8_bf16_n7168_k18432", 30.0, 88.0),
        floor("linear_swiglu_quant_fp8", 27.0, 80.0),
        floor("expert_linear_swiglu", 26.0, 65.0),
        floor("dsa_mqa_bf16", 35.0, 81.0),
        floor("dsa_mqa_part2", 34.0, 81.0),
        floor("dsa_mqa_part32", 18.0, 73.0),
        floor("dsa_index_fp8_top", 18.0, 57.0),
        floor("mha", 27.0, 74.0),
    ];
    check("gfx942", &floors, 5);
}

#[test]
fn hot_loops_gfx950() {
    let floors = [
        floor("linear_bf16_bf16_f32_n129280", 45.0, 99.0),
        floor("linear_fp8_fp8_bf16_n7168_k18432", 28.0, 88.0),
        floor("linear_swiglu_quant_fp8", 30.0, 80.0),
        floor("expert_linear_swiglu", 30.0, 80.0),
        floor("expert_linear_own", 24.0, 80.0),
        floor("dsa_mqa_bf16", 33.0, 83.0),
        floor("dsa_mqa_part2", 33.0, 83.0),
        floor("dsa_mqa_part32", 14.0, 71.0),
        floor("dsa_index_fp8_top", 23.0, 59.0),
        floor("mha", 24.0, 74.0),
    ];
    check("gfx950", &floors, 35);
}
