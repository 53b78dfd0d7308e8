//! A kernel's graph, compiled as a model of these sizes would be.

use super::Choice;
use crate::compile::{self, CompileError, Compiled};
use crate::passes::{self, Class, PassError};
use dsc_ir::artifact::{ModelFacts, Numerics};
use dsc_ir::schedule::Rule;
use dsc_runtime::device::Code;
use dsc_targets::Target;

/// Why a kernel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is no such family.
    #[error("there is no kernel `{name}`: give one of {known}")]
    Name {
        /// What was asked for.
        name: String,
        /// Every family.
        known: String,
    },
    /// A size is not one of the family's, or not a size.
    #[error("{0}")]
    Shape(String),
    /// The sizes do not make a graph.
    #[error("these sizes do not fit together: {0}")]
    Sizes(#[from] PassError),
    /// The kernel could not be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

/// A compiled kernel and the step it is timed in.
pub struct Bench {
    /// The family and its sizes.
    pub choice: Choice,
    /// One step, of launches whose nodes are called `setup..` or `kernel..`, and whose symbols are the most that it takes.
    pub compiled: Compiled,
}

impl Bench {
    /// What a device loads.
    pub fn code(&self) -> Code<'_> {
        let module = &self.compiled.module;
        Code { native: &module.code, portable: module.portable.as_deref().unwrap_or_default() }
    }
}

/// Compiles the kernel of that choice, at the target's schedules as `rules` change them.
///
/// # Errors
/// [`BenchError::Sizes`] if they contradict each other, [`BenchError::Compile`] if the target refuses.
pub fn prepare(choice: Choice, target: &dyn Target, rules: &[Rule]) -> Result<Bench, BenchError> {
    let case = choice.build();
    let syms = case.syms();
    let class = Class { name: "bench".into(), max: syms, keep_mha: case.keep_mha, pieces: None };
    let numerics = if choice.exact() { Numerics::Exact } else { Numerics::Deployed };
    let mut graph = case.graph;
    let cx = compile::context(target, class.clone(), numerics, !choice.exact(), case.selected);
    passes::run(&mut graph, &cx, &mut |_, _, _| {})?;
    let facts = ModelFacts {
        model_type: format!("kernel {}", choice.family.name),
        config_hash: String::new(),
        vocab: case.vocab,
        layers: 1,
        index_topk: case.selected,
        bos: None,
        eos: Vec::new(),
        max_context: case.context,
        ranks: 1,
        rank: 0,
    };
    let compiled = compile::lower(vec![(class, graph)], facts, numerics, (target, rules), None, &mut |_| {})?;
    Ok(Bench { choice, compiled })
}

#[cfg(test)]
mod tests {
    use super::super::{FAMILIES, Family, Timing, time};
    use super::*;
    use dsc_runtime::CpuDevice;

    /// Sizes that take no time.
    const SMALL: &[(&str, &[&str])] = &[
        ("linear", &["m=3", "n=40", "k=96"]),
        ("linear", &["m=3", "n=130", "k=200", "dtype=fp8"]),
        ("head_linear", &["m=3", "heads=4", "n=24", "k=16"]),
        ("expert_linear", &["m=5", "experts=6", "topk=2", "n=40", "k=64"]),
        ("expert_linear", &["m=5", "experts=6", "topk=2", "n=40", "k=64", "dtype=fp8"]),
        ("attention", &["batch=3", "context=90", "heads=4", "latent=32", "rope=8", "topk=24"]),
        (
            "sparse_attention",
            &["m=7", "context=90", "heads=4", "latent=32", "rope=8", "topk=24", "index_heads=2", "index_dim=16"],
        ),
        ("indexer_logits", &["batch=2", "context=90", "heads=2", "dim=16"]),
        ("top_k", &["m=4", "context=90", "k=9"]),
        ("mha", &["m=20", "context=20", "heads=2", "nope=16", "rope=8", "value=16"]),
        ("gate", &["m=5", "experts=12", "groups=3", "keep=2", "topk=4"]),
        ("rows", &["m=5", "n=96"]),
        ("embed", &["m=5", "n=96", "vocab=50"]),
    ];

    fn bench(name: &str, sizes: &[&str]) -> Bench {
        let sizes: Vec<String> = sizes.iter().map(|s| s.to_string()).collect();
        let choice = Choice::parse(name, &sizes).unwrap_or_else(|e| panic!("{name}: {e}"));
        let target = dsc_targets::target("cpu", false).unwrap();
        prepare(choice, &*target, &[]).unwrap_or_else(|e| panic!("{name} {sizes:?}: {e}"))
    }

    fn timed(bench: &Bench, device: &mut CpuDevice, rotate: u64) -> Timing {
        time(&bench.compiled.header, bench.code(), device, std::time::Duration::ZERO, rotate).unwrap()
    }

    #[test]
    fn every_family_runs_and_has_work() {
        let covered = |f: &Family| SMALL.iter().any(|(name, _)| *name == f.name);
        assert!(FAMILIES.iter().all(covered));
        for (name, sizes) in SMALL {
            for dtype in [None, Some("dtype=f32"), Some("dtype=bf16")] {
                let known = FAMILIES.iter().find(|f| f.name == *name).unwrap();
                if dtype.is_some() && (known.dtypes.is_empty() || sizes.iter().any(|s| s.starts_with("dtype"))) {
                    continue;
                }
                let bench = bench(name, &[*sizes, &dtype.into_iter().collect::<Vec<_>>()].concat());
                let mut device = CpuDevice::new(2).unwrap();
                let timing = timed(&bench, &mut device, 1 << 16);
                assert!(timing.us.iter().all(|&us| us > 0.0) && timing.launches.iter().all(|l| l.runs > 0), "{name}");
                assert!(timing.cost.bytes > 0.0, "{name}");
                let multiplies = !["top_k", "gate", "rows", "embed"].contains(name);
                assert_eq!(timing.cost.all_flop() > 0.0, multiplies, "{name}");
            }
        }
    }

    /// By hand: of bf16, 3 rows of 96 and 40 x 96 weights, to 3 rows of 40.
    #[test]
    fn a_linear_moves_its_operands_once() {
        let bench = bench("linear", &["m=3", "n=40", "k=96"]);
        let timing = timed(&bench, &mut CpuDevice::new(1).unwrap(), 0);
        assert_eq!(timing.cost.all_flop(), f64::from(2 * 3 * 40 * 96));
        assert_eq!(timing.cost.bytes, f64::from(2 * (3 * 96 + 40 * 96 + 3 * 40)));
        assert_eq!(timing.copies, 1);
    }

    #[test]
    fn wrong_names_and_sizes_are_explained() {
        let error = |name: &str, sizes: &[&str]| {
            let sizes: Vec<String> = sizes.iter().map(|s| s.to_string()).collect();
            Choice::parse(name, &sizes).err().unwrap().to_string()
        };
        assert!(error("lineal", &[]).contains("`lineal`: give one of linear, head_linear"));
        assert!(error("linear", &["q=3"]).contains("linear has no `q`: give m, n, k or dtype"));
        assert!(error("linear", &["m"]).contains("m: give a key and a value"));
        assert!(error("linear", &["m=0"]).contains("m=0"));
        assert!(error("linear", &["m=3", "m=4"]).contains("twice"));
        assert!(error("linear", &["dtype=int4"]).contains("bf16, fp8 or f32"));
        assert!(error("head_linear", &["dtype=fp8"]).contains("bf16 or f32"));
        assert!(error("attention", &["m=9", "context=5"]).contains("context=5"));
        let choice = Choice::parse("gate", &["groups=7".into()]).unwrap();
        let target = dsc_targets::target("cpu", false).unwrap();
        assert!(matches!(prepare(choice, &*target, &[]), Err(BenchError::Sizes(_))));
    }
}
