//! Every kernel of an artifact, on a device, against the tile interpreter on the same random memory.
//!
//! Kernels have the shapes and schedules that run, but each is run by itself. Its buffers hold random numbers of the types of its
//! views, and integers that are mostly good indices, some −1, and some beyond every table: bounds are part of what a tile program
//! means. Sizes are small and ragged. Buffers lie between guard bytes, which must stay as they are.

use crate::artifact::Artifact;
use crate::device::{BoundLaunch, Buffer, Code, Device};
use crate::error::{DeviceError, Error};
use dsc_ir::artifact::{Arg, Header};
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::graph::{PAGE_TOKENS, StepInput};
use dsc_ir::tile::interp::{self, Binding, run_blocks};
use dsc_ir::tile::{self, Access, Program, ViewType};
use dsc_ir::{DType, Sym, SymValues};
use std::collections::{BTreeMap, HashMap};

/// Bytes around buffers that must stay as they are.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0x5a;
/// Multiplications and elements that one check may cost the interpreter, at most; larger launches are left out.
const MOST_BYTES: usize = 64 << 20;

/// How one kernel did.
#[derive(Clone, Debug, serde::Serialize)]
pub struct KernelReport {
    /// Its name.
    pub kernel: String,
    /// What it computes.
    pub what: String,
    /// Launches compared.
    pub launches: u32,
    /// Worst element of each type: relative to the larger of itself and the root mean square of its tensor.
    pub worst: BTreeMap<String, f64>,
    /// What went wrong, with the launch.
    pub failures: Vec<String>,
    /// Why it was not run.
    pub skipped: Option<String>,
}

/// Runs every kernel of an artifact whose name contains `filter` on a fresh device, and compares it with the interpreter.
/// `progress` is told the kernels done and to be done.
///
/// # Errors
/// [`Error`] if the artifact has no readable tile programs, or the device refuses it.
pub fn verify_kernels(
    artifact: &Artifact,
    device: &mut dyn Device,
    filter: &str,
    progress: &dyn Fn(usize, usize, &str),
) -> Result<Vec<KernelReport>, Error> {
    let header = artifact.header();
    let text = std::str::from_utf8(artifact.section("tile")?).unwrap_or_default();
    let programs: HashMap<String, Program> = tile::parse(text)
        .map_err(|e| DeviceError::Misuse(format!("the artifact's tile programs cannot be read: {e}")))?
        .into_iter()
        .map(|p| (p.name.clone(), p))
        .collect();
    let portable = if header.section("asm").is_some() { artifact.section("asm")? } else { &[] };
    device.load_code(header, Code { native: artifact.section("code")?, portable })?;
    let mut seen = vec![false; header.kernels.len()];
    let mut reports = Vec::new();
    for (s, step) in header.steps.iter().enumerate() {
        for (l, planned) in step.launches.iter().enumerate() {
            let entry = &header.kernels[planned.kernel as usize];
            if std::mem::replace(&mut seen[planned.kernel as usize], true) || !entry.name.contains(filter) {
                continue;
            }
            progress(reports.len(), header.kernels.len(), &entry.name);
            let mut report = KernelReport {
                kernel: entry.name.clone(),
                what: entry.what.clone(),
                launches: 0,
                worst: BTreeMap::new(),
                failures: Vec::new(),
                skipped: None,
            };
            match programs.get(&entry.name) {
                Some(program) => check_kernel(header, (s, l), program, device, &mut report)?,
                None => report.skipped = Some("the artifact has no tile program of it".into()),
            }
            reports.push(report);
        }
    }
    Ok(reports)
}

fn check_kernel(
    header: &Header,
    (s, l): (usize, usize),
    program: &Program,
    device: &mut dyn Device,
    report: &mut KernelReport,
) -> Result<(), Error> {
    let step = &header.steps[s];
    let e4m3 = |p: &&tile::Param| program.view(p.value).is_some_and(|v| v.dtype == DType::E4m3);
    let fp8 = program.params.iter().any(|p| e4m3(&p));
    for (i, sizes) in sizes(&step.max).into_iter().enumerate() {
        for wild in [false, true] {
            let seed = u64::from(step.launches[l].kernel) * 100 + 2 * i as u64 + u64::from(wild);
            let Some(launch) = launch(header, (s, l), program, sizes, seed, wild) else {
                report.skipped = Some("its buffers are too large for the interpreter".into());
                return Ok(());
            };
            let name = format!(
                "{} tokens of {} sequences after {} in {}{}",
                sizes.tokens,
                sizes.seqs,
                sizes.before,
                step.name,
                if wild { ", with bad indices" } else { "" }
            );
            report.launches += 1;
            match check(device, step.launches[l].kernel, &launch)? {
                Err(e) => report.failures.push(format!("{name}: {e}")),
                Ok(errors) => {
                    for (dtype, w) in errors {
                        if w.error > tolerance(dtype, fp8) {
                            report.failures.push(format!("{name}: {:.1e}: {}", w.error, w.what));
                        }
                        let all = report.worst.entry(dtype.name().into()).or_default();
                        *all = all.max(w.error);
                    }
                }
            }
        }
    }
    Ok(())
}

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
        DType::I32 | DType::Bool => unreachable!("integers are filled elsewhere"),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> f64 {
    let two = || u16::from_le_bytes([bytes[0], bytes[1]]);
    let four = || [bytes[0], bytes[1], bytes[2], bytes[3]];
    match dtype {
        DType::F32 => f32::from_le_bytes(four()).into(),
        DType::Bf16 => half::bf16::from_bits(two()).to_f64(),
        DType::F16 => half::f16::from_bits(two()).to_f64(),
        DType::E4m3 => e4m3_to_f32(bytes[0]).into(),
        DType::I32 => i32::from_le_bytes(four()).into(),
        DType::Bool => unreachable!("truth values are never in memory"),
    }
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
struct Sizes {
    tokens: u32,
    seqs: u32,
    /// Positions before the step's.
    before: u32,
}

/// A launch: buffers with what they are bound to.
struct Launch<'a> {
    program: &'a Program,
    syms: SymValues,
    buffers: Vec<Vec<u8>>,
    bindings: Vec<Binding>,
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
        // Selected positions, ascending with -1 behind them.
        (_, "selected") => (0..n).map(|_| below(rng, u64::from(sizes.before) + each)).collect(),
        // Experts.
        _ => (0..n).map(|_| below(rng, 6)).collect(),
    }
}

/// A launch of a kernel as some step of the model has it, on random memory; none if its buffers are beyond reason.
fn launch<'a>(
    header: &Header,
    (s, l): (usize, usize),
    program: &'a Program,
    sizes: Sizes,
    seed: u64,
    wild: bool,
) -> Option<Launch<'a>> {
    let step = &header.steps[s];
    let launch = &step.launches[l];
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
    let views: Vec<&ViewType> = program.params.iter().filter_map(|p| program.view(p.value)).collect();
    // Parameters of one tensor share its buffer: cells of a cache, outputs that are read again.
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut buffers: Vec<Vec<u8>> = Vec::new();
    let mut bindings = Vec::new();
    for (&view, arg) in views.iter().zip(&launch.args) {
        let buffer = *places.entry(format!("{arg:?}")).or_insert_with(|| {
            buffers.push(Vec::new());
            buffers.len() - 1
        });
        let bytes = span(view, &syms).max(buffers[buffer].len());
        if bytes > MOST_BYTES {
            return None;
        }
        buffers[buffer].resize(bytes, 0x11);
        bindings.push(Binding { buffer, offset: 0 });
    }
    for (i, arg) in launch.args.iter().enumerate() {
        let (view, buffer) = (views[i], bindings[i].buffer);
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
        let name = program.params[i].name.as_str();
        let scale = name.contains("scale");
        let query = ["q_latent", "q_rope"].contains(&name);
        let score = program.name.starts_with("dsa_index") && ["q", "weights", "keys"].contains(&name);
        for at in places {
            let x = rng.real();
            let x = match view.dtype {
                // Powers of two, as scales of caches are.
                _ if scale => (2.0f32).powi(-4 - (rng.below(4) as i32)),
                DType::E4m3 if !score => x * 100.0,
                // Eighths: their sums are exact in any order, so that selections are equal, and many scores are.
                _ if score => (x * 8.0).round() / 8.0,
                // Small, so that the exponents of a softmax are, whose error is that of the largest.
                _ if query => x * 0.2,
                _ => x,
            };
            buffers[buffer][at..at + view.dtype.bytes()].copy_from_slice(&encode(view.dtype, x));
        }
    }
    Some(Launch { program, syms, buffers, bindings })
}

/// The worst element of all written parameters.
#[derive(Clone, Debug, Default)]
struct Worst {
    error: f64,
    what: String,
}

/// Compares what a launch has written. Integers and NaNs must be equal.
fn compare(launch: &Launch, got: &[Vec<u8>], wanted: &[Vec<u8>]) -> Result<HashMap<DType, Worst>, String> {
    let mut all: HashMap<DType, Worst> = HashMap::new();
    for (param, binding) in launch.program.params.iter().zip(&launch.bindings) {
        if param.access == Access::Read {
            continue;
        }
        let Some(view) = launch.program.view(param.value) else { continue };
        let (dtype, bytes) = (view.dtype, view.dtype.bytes());
        let (got, wanted) = (&got[binding.buffer], &wanted[binding.buffer]);
        let mut places = Vec::new();
        for_each(view, &launch.syms, binding.offset, &mut |at| places.push(at));
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
    Ok(all)
}

/// Largest error that another order of sums explains. Elements of small types may round the other way: one unit.
fn tolerance(dtype: DType, fp8: bool) -> f64 {
    match dtype {
        // Matrix units keep fewer bits of sums of e4m3 products than f32 has.
        DType::F32 if fp8 => 2e-3,
        DType::F32 => 1e-4,
        DType::Bf16 => 1e-2,
        DType::F16 => 2e-3,
        _ => 0.13,
    }
}

/// Runs a launch on the device and on the interpreter.
fn check(
    device: &mut dyn Device,
    kernel: u32,
    launch: &Launch,
) -> Result<Result<HashMap<DType, Worst>, String>, Error> {
    let blocks = interp::block_count(launch.program, &launch.syms).unwrap_or(0);
    let mut wanted = launch.buffers.clone();
    let options = interp::Options::default();
    if let Err(e) = run_blocks(launch.program, &launch.syms, &mut wanted, &launch.bindings, 0..blocks, options) {
        return Ok(Err(format!("the interpreter: {e}")));
    }
    let mut on_device: Vec<Buffer> = Vec::new();
    for bytes in &launch.buffers {
        let guarded = [vec![GUARD_BYTE; GUARD], bytes.clone(), vec![GUARD_BYTE; GUARD]].concat();
        let buffer = device.alloc(guarded.len() as u64, "a kernel's check")?;
        device.upload(buffer, 0, &guarded)?;
        on_device.push(buffer);
    }
    let args = launch.bindings.iter().map(|b| (on_device[b.buffer], GUARD as u64)).collect();
    let bound = device.bind(&[BoundLaunch { kernel, node: launch.program.name.clone(), args }], &launch.syms)?;
    device.run(bound, 0..1, &launch.syms, None)?;
    let mut got = Vec::new();
    for (i, bytes) in launch.buffers.iter().enumerate() {
        let mut guarded = vec![0; bytes.len() + 2 * GUARD];
        device.read(on_device[i], 0, &mut guarded)?;
        let outside = guarded[..GUARD].iter().chain(&guarded[GUARD + bytes.len()..]);
        if outside.copied().any(|b| b != GUARD_BYTE) {
            return Ok(Err(format!("it wrote outside of buffer {i}")));
        }
        got.push(guarded[GUARD..GUARD + bytes.len()].to_vec());
    }
    let result = compare(launch, &got, &wanted);
    // What no parameter writes is as it was.
    for (i, (a, b)) in got.iter().zip(&launch.buffers).enumerate() {
        let mut params = launch.program.params.iter().zip(&launch.bindings);
        if !params.any(|(p, b)| p.access != Access::Read && b.buffer == i) && a != b {
            return Ok(Err(format!("it wrote to buffer {i}, which it only reads")));
        }
    }
    Ok(result)
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
