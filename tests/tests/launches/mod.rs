//! Launches of a plan's kernels on random memory, and how what they leave is compared.

use dsc::plan::Plan;
use dsc_ir::artifact::Arg;
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::graph::{PAGE_TOKENS, StepInput};
use dsc_ir::tile::interp::{self, Binding};
use dsc_ir::tile::{Access, Program, ViewType};
use dsc_ir::{DType, Sym, SymValues};
use std::collections::HashMap;

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Even in −1..1.
    fn real(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// `n` different numbers below `of`.
    fn distinct(&mut self, n: usize, of: u64) -> Vec<i32> {
        let mut all: Vec<i32> = (0..of as i32).collect();
        for i in 0..n.min(all.len()) {
            let j = i + self.below((all.len() - i) as u64) as usize;
            all.swap(i, j);
        }
        all.truncate(n);
        all
    }
}

/// Bytes from the bound address that a view spans at these symbols.
fn span(view: &ViewType, syms: &SymValues) -> usize {
    let mut end = view.offset as i64;
    for (extent, stride) in view.shape.iter().zip(&view.strides) {
        let count = extent.eval(syms) as i64;
        if count == 0 {
            return 0;
        }
        assert!(stride.bytes >= 0, "views of kernels go upwards");
        end += (count - 1) * stride.bytes * stride.sym.map_or(1, |s| i64::from(syms.get(s)));
    }
    end as usize + view.dtype.bytes()
}

fn encode(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        DType::E4m3 => vec![f32_to_e4m3(x)],
        DType::I32 | DType::Bool => panic!("not real"),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    f64::from(match dtype {
        DType::F32 => f32::from_le_bytes(bytes.try_into().expect("4 bytes")),
        DType::Bf16 => half::bf16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
        DType::F16 => half::f16::from_le_bytes(bytes.try_into().expect("2 bytes")).to_f32(),
        DType::E4m3 => e4m3_to_f32(bytes[0]),
        DType::I32 => return f64::from(i32::from_le_bytes(bytes.try_into().expect("4 bytes"))),
        DType::Bool => panic!("never in memory"),
    })
}

/// Every element of a view: its coordinates' byte in the buffer.
fn for_each(view: &ViewType, syms: &SymValues, base: usize, f: &mut dyn FnMut(usize)) {
    fn go(view: &ViewType, syms: &SymValues, d: usize, at: usize, f: &mut dyn FnMut(usize)) {
        let Some(extent) = view.shape.get(d) else { return f(at) };
        let stride = view.strides[d];
        let step = stride.bytes as usize * stride.sym.map_or(1, |s| syms.get(s) as usize);
        for i in 0..extent.eval(syms) as usize {
            go(view, syms, d + 1, at + i * step, f);
        }
    }
    go(view, syms, 0, base + view.offset as usize, f);
}

/// Sizes of a step.
#[derive(Clone, Copy)]
pub struct Sizes {
    pub tokens: u32,
    pub seqs: u32,
    /// Positions before the step's.
    pub before: u32,
}

/// A launch: buffers with what they are bound to.
pub struct Launch<'a> {
    pub program: &'a Program,
    pub syms: SymValues,
    pub buffers: Vec<Vec<u8>>,
    pub bindings: Vec<Binding>,
}

/// What an integer parameter of `n` elements holds. `wild`: whether some of them lead nowhere.
fn integers(rng: &mut Rng, name: &str, arg: &Arg, sizes: Sizes, syms: &SymValues, n: usize, wild: bool) -> Vec<i32> {
    let (t, s, pages) = (u64::from(sizes.tokens), u64::from(sizes.seqs), u64::from(syms.get(Sym::N)));
    let each = t.div_ceil(s);
    let below = |rng: &mut Rng, of: u64| match rng.below(24) {
        0 if wild => -1,
        1 if wild => 1 << 24,
        2 if wild => i32::MIN,
        3 if wild => i32::MAX,
        _ => rng.below(of) as i32,
    };
    // Rows of one scatter, which are different; those that lead nowhere too.
    let rows = |rng: &mut Rng, of: u64| -> Vec<i32> {
        let mut rows = rng.distinct(n, of);
        for (i, row) in rows.iter_mut().enumerate() {
            match rng.below(12) {
                0 if wild => *row = -1 - i as i32,
                1 if wild => *row = (1 << 24) + i as i32,
                _ => {}
            }
        }
        rows
    };
    match (arg, name) {
        (Arg::Input(StepInput::Tokens), _) => (0..n).map(|_| below(rng, 131)).collect(),
        // One after another in each sequence, as a session numbers them.
        (Arg::Input(StepInput::Positions), _) => {
            (0..n as u64).map(|i| sizes.before as i32 + (i % each) as i32).collect()
        }
        (Arg::Input(StepInput::Seqs), _) => {
            (0..n as u64).map(|i| if wild && rng.below(8) == 0 { below(rng, s) } else { (i / each) as i32 }).collect()
        }
        (Arg::Input(StepInput::Slots), _) => rows(rng, pages * u64::from(PAGE_TOKENS)),
        (Arg::Input(StepInput::PageTable), _) => (0..n).map(|_| below(rng, pages)).collect(),
        (Arg::Input(StepInput::LogitRows), _) => (0..n).map(|_| below(rng, t)).collect(),
        (_, "order") => rows(rng, n as u64),
        // Where each expert's rows begin and the last one's end; the bounds of a loop, which a kernel of ours has counted.
        (_, "offsets") => {
            let mut ends: Vec<i32> = (0..n).map(|_| rng.below(t + 1) as i32).collect();
            ends.sort_unstable();
            ends
        }
        // Selected positions; those that lead nowhere are not too large, as the largest is the bound of a loop.
        (_, "selected") => {
            let near = |v: i32| v.min(sizes.before as i32 + 200);
            (0..n).map(|_| near(below(rng, u64::from(sizes.before) + each))).collect()
        }
        // Experts.
        _ => (0..n).map(|_| below(rng, 6)).collect(),
    }
}

/// A launch of a kernel as some step of the model has it, on random memory.
fn launch<'a>(plan: &'a Plan, step: usize, index: usize, sizes: Sizes, seed: u64, wild: bool) -> Launch<'a> {
    let step = &plan.steps[step];
    let launch = &step.launches[index];
    let program = &plan.kernels[launch.kernel as usize].program;
    let context = sizes.before + sizes.tokens.div_ceil(sizes.seqs);
    let most = |sym, n: u32| n.min(step.max.get(sym));
    let syms = SymValues::default()
        .with(Sym::T, sizes.tokens)
        .with(Sym::S, sizes.seqs)
        .with(Sym::P, most(Sym::P, context.div_ceil(PAGE_TOKENS)))
        .with(Sym::L, sizes.tokens.div_ceil(2))
        .with(Sym::N, 5)
        .with(Sym::C, most(Sym::C, context));
    let mut rng = Rng(seed);
    let view = |i: usize| program.view(program.params[i].value).expect("parameters are views");
    // Parameters of one tensor share its buffer: cells of a cache, outputs that are read again.
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut buffers: Vec<Vec<u8>> = Vec::new();
    let mut bindings = Vec::new();
    for (i, arg) in launch.args.iter().enumerate() {
        let buffer = *places.entry(format!("{arg:?}")).or_insert_with(|| {
            buffers.push(Vec::new());
            buffers.len() - 1
        });
        let bytes = span(view(i), &syms).max(buffers[buffer].len());
        buffers[buffer].resize(bytes, 0x11);
        bindings.push(Binding { buffer, offset: 0 });
    }
    for (i, arg) in launch.args.iter().enumerate() {
        let (view, buffer) = (view(i), bindings[i].buffer);
        let mut places = Vec::new();
        for_each(view, &syms, 0, &mut |at| places.push(at));
        if view.dtype == DType::I32 {
            let values = integers(&mut rng, &program.params[i].name, arg, sizes, &syms, places.len(), wild);
            for (at, v) in places.into_iter().zip(values) {
                buffers[buffer][at..at + 4].copy_from_slice(&v.to_le_bytes());
            }
            continue;
        }
        // Scales, weights and activations of one size each; scales of quantised values are positive.
        let scale = program.params[i].name.contains("scale");
        let query = ["q_latent", "q_rope"].contains(&program.params[i].name.as_str());
        let score =
            program.name.starts_with("dsa_index") && ["q", "weights", "keys"].contains(&&*program.params[i].name);
        for at in places {
            let x = rng.real();
            let x = match view.dtype {
                _ if scale => (x + 1.5) * 0.02,
                DType::E4m3 => x * 100.0,
                // Eighths: their sums are exact in any order, so that selections are equal, and many scores are.
                _ if score => (x * 8.0).round() / 8.0,
                // Small, so that the exponents of a softmax are, whose error is that of the largest.
                _ if query => x * 0.2,
                _ => x,
            };
            buffers[buffer][at..at + view.dtype.bytes()].copy_from_slice(&encode(view.dtype, x));
        }
    }
    Launch { program, syms, buffers, bindings }
}

/// The worst element of all written parameters: relative to the larger of itself and the root mean square of its tensor.
#[derive(Clone, Debug, Default)]
pub struct Worst {
    pub error: f64,
    pub what: String,
}

/// The worst of each type.
pub type Errors = HashMap<DType, Worst>;

impl Launch<'_> {
    /// Compares what the launch has left in its buffers with what the interpreter leaves. Integers and NaNs must be equal.
    pub fn compare(&self, got: &[Vec<u8>]) -> Result<Errors, String> {
        let blocks = interp::block_count(self.program, &self.syms).expect("a small grid");
        let mut wanted = self.buffers.clone();
        let options = interp::Options::default();
        interp::run_blocks(self.program, &self.syms, &mut wanted, &self.bindings, 0..blocks, options)
            .map_err(|e| e.to_string())?;
        let mut all = Errors::new();
        for (param, binding) in self.program.params.iter().zip(&self.bindings) {
            if param.access == Access::Read {
                continue;
            }
            let view = self.program.view(param.value).expect("a view");
            let (dtype, bytes) = (view.dtype, view.dtype.bytes());
            let (got, wanted) = (&got[binding.buffer], &wanted[binding.buffer]);
            let mut places = Vec::new();
            for_each(view, &self.syms, binding.offset, &mut |at| places.push(at));
            let value = |b: &[u8], at: usize| decode(dtype, &b[at..at + bytes]);
            let squares = places.iter().map(|&at| value(wanted, at).powi(2)).filter(|x| x.is_finite());
            let size = (squares.sum::<f64>() / places.len().max(1) as f64).sqrt();
            for (i, at) in places.into_iter().enumerate() {
                let (g, w) = (value(got, at), value(wanted, at));
                let say = || format!("%{}[element {i}, byte {at}] is {g:?}, the interpreter has {w:?}", param.name);
                if g.is_nan() != w.is_nan()
                    || (dtype == DType::I32 && g != w)
                    || (g.is_infinite() || w.is_infinite()) && g != w
                {
                    return Err(say());
                }
                if g == w || g.is_nan() {
                    continue;
                }
                let error = (g - w).abs() / w.abs().max(size);
                let worst = all.entry(dtype).or_default();
                if error > worst.error {
                    *worst = Worst { error, what: say() };
                }
            }
        }
        // What no parameter writes is as it was.
        for (i, (a, b)) in got.iter().zip(&self.buffers).enumerate() {
            let written =
                self.program.params.iter().zip(&self.bindings).any(|(p, b)| p.access != Access::Read && b.buffer == i);
            if !written && a != b {
                return Err(format!("it wrote to buffer {i}, which it only reads"));
            }
        }
        Ok(all)
    }
}

/// Largest error that another order of sums explains. Elements of small types may round the other way: one unit.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::Bf16 => 1e-2,
        DType::F16 => 2e-3,
        _ => 0.13,
    }
}

/// Sizes that fit a class, ragged and small.
fn sizes(max: &SymValues) -> Vec<Sizes> {
    let all = [
        Sizes { tokens: 1, seqs: 1, before: 0 },
        Sizes { tokens: 1, seqs: 1, before: 130 },
        Sizes { tokens: 7, seqs: 1, before: 3 },
        Sizes { tokens: 19, seqs: 1, before: 70 },
        Sizes { tokens: 5, seqs: 5, before: 67 },
        Sizes { tokens: 3, seqs: 3, before: 0 },
    ];
    let fits = |s: &Sizes| {
        s.tokens <= max.get(Sym::T)
            && s.seqs <= max.get(Sym::S)
            && s.before + s.tokens.div_ceil(s.seqs) <= max.get(Sym::C)
            // The largest class of tokens is the only one with two.
            && (max.get(Sym::T) < 32 || s.tokens > 1)
    };
    all.into_iter().filter(fits).collect()
}

/// Every kernel of a plan, in the first launch that has it, in steps of several sizes. `check` runs a kernel and compares.
pub fn check_plan(what: &str, plan: &Plan, check: &dyn Fn(usize, &Launch) -> Result<Errors, String>) {
    let trace = std::env::var_os("DSC_TRACE").is_some();
    let mut seen = vec![false; plan.kernels.len()];
    let (mut launches, mut failures) = (0, Vec::new());
    let mut worst = Errors::new();
    for (s, step) in plan.steps.iter().enumerate() {
        for (l, planned) in step.launches.iter().enumerate() {
            if std::mem::replace(&mut seen[planned.kernel as usize], true) {
                continue;
            }
            for (i, sizes) in sizes(&step.max).into_iter().enumerate() {
                for wild in [false, true] {
                    let seed = u64::from(planned.kernel) * 100 + 2 * i as u64 + u64::from(wild);
                    let launch = launch(plan, s, l, sizes, seed, wild);
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
