//! Every kernel of a plan on random memory, by whatever runs it, against the interpreter.

use dsc::plan::Plan;
use dsc_ir::DType;
use dsc_runtime::verify::launches::{Contents, Sizes, Worst};
pub use dsc_runtime::verify::launches::{Errors, Launch};

/// Largest error that another order of sums explains. Elements of small types may round the other way: one unit.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::Bf16 => 1e-2,
        DType::F16 => 2e-3,
        _ => 0.13,
    }
}

/// Every kernel of a plan, in the first launch that has it, in steps of several sizes. `check` runs a kernel and compares.
pub fn check_plan(what: &str, plan: &Plan, check: &dyn Fn(usize, &Launch) -> Result<Errors, String>) {
    let trace = std::env::var_os("DSC_TRACE").is_some();
    let mut seen = vec![false; plan.kernels.len()];
    let (mut launches, mut failures) = (0, Vec::new());
    let mut worst = Errors::new();
    for step in &plan.steps {
        for (l, planned) in step.launches.iter().enumerate() {
            if std::mem::replace(&mut seen[planned.kernel as usize], true) {
                continue;
            }
            for (i, sizes) in Sizes::of(&step.max).into_iter().enumerate() {
                for wild in [false, true] {
                    let seed = u64::from(planned.kernel) * 100 + 2 * i as u64 + u64::from(wild);
                    let program = &plan.kernels[planned.kernel as usize].program;
                    let contents = Contents { seed, wild, pow2_scales: false };
                    let launch = Launch::new(step, l, program, sizes, contents).expect("a small launch");
                    launches += 1;
                    let name = format!(
                        "{} in {} of {} tokens, {} sequences after {} (wild: {wild})",
                        launch.program.name, step.name, sizes.tokens, sizes.seqs, sizes.before
                    );
                    if trace {
                        eprintln!("{name}");
                    }
                    match check(planned.kernel as usize, &launch) {
                        Err(e) => failures.push(format!("{name}: {e}")),
                        Ok(errors) => {
                            for (dtype, w) in errors {
                                if w.error > tolerance(dtype) {
                                    failures.push(format!("{name}: {:.1e}: {}", w.error, w.what));
                                }
                                let all = worst.entry(dtype).or_default();
                                if w.error > all.error {
                                    *all = Worst { error: w.error, what: format!("{name}: {}", w.what) };
                                }
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{what}: {} kernels, {launches} launches", seen.len());
    for (dtype, w) in &worst {
        println!("  worst {dtype}: {:.1e}: {}", w.error, w.what);
    }
    assert!(seen.iter().all(|s| *s), "a kernel has no launch");
    assert!(failures.is_empty(), "{} of {launches}:\n{}", failures.len(), failures.join("\n"));
}
