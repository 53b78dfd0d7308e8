//! Launches of single kernels on random memory, and how what they leave there is compared with what the interpreter leaves.
//!
//! Buffers hold random numbers of the types of their views, and integers that are mostly good indices, some −1, and some beyond every
//! table: bounds are part of what a tile program means. Sizes are small and ragged. `dsc check` and this project's tests share this;
//! what runs the launches, and how much its results may differ, is theirs.

use dsc_ir::artifact::{Arg, Step};
use dsc_ir::dtype::{e4m3_to_f32, f32_to_e4m3};
use dsc_ir::graph::{PAGE_TOKENS, StepInput};
use dsc_ir::sample::Draw;
use dsc_ir::tile::interp::{self, Binding};
use dsc_ir::tile::{Program, ViewType};
use dsc_ir::{DType, Sym, SymValues};
use std::collections::HashMap;

/// Bytes and elements of one view, at most.
const MOST: u64 = 64 << 20;

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

/// Bytes from the bound address that a view spans at these symbols; none if it goes downwards, or is beyond reason.
fn span(view: &ViewType, syms: &SymValues) -> Option<usize> {
    let (mut end, mut elements) = (view.offset, 1u64);
    for (extent, stride) in view.shape.iter().zip(&view.strides) {
        let count = extent.eval(syms);
        if count == 0 {
            return Some(0);
        }
        let step = u64::try_from(stride.bytes).ok()?.checked_mul(stride.sym.map_or(1, |s| u64::from(syms.get(s))))?;
        end = end.checked_add((count - 1).checked_mul(step)?)?;
        elements = elements.checked_mul(count)?;
    }
    end = end.checked_add(view.dtype.bytes() as u64)?;
    (end <= MOST && elements <= MOST).then_some(end as usize)
}

fn encode(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        DType::E4m3 => vec![f32_to_e4m3(x)],
        DType::I32 | DType::Bool => Vec::new(), // integers are filled elsewhere, truth values are never in memory
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
        DType::Bool => bytes[0].into(),
    }
}

/// The byte of every element of a view, from the bound address.
fn places(view: &ViewType, syms: &SymValues) -> Vec<usize> {
    let mut all = Vec::new();
    for_each_place(view, syms, &mut |at| all.push(at));
    all
}

fn for_each_place(view: &ViewType, syms: &SymValues, found: &mut dyn FnMut(usize)) {
    fn go(view: &ViewType, syms: &SymValues, d: usize, at: usize, found: &mut dyn FnMut(usize)) {
        let Some(extent) = view.shape.get(d) else { return found(at) };
        let stride = view.strides[d];
        let step = stride.bytes as usize * stride.sym.map_or(1, |s| syms.get(s) as usize);
        for i in 0..extent.eval(syms) as usize {
            go(view, syms, d + 1, at + i * step, found);
        }
    }
    go(view, syms, 0, view.offset as usize, found);
}

/// Sizes of a step.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Tokens.
    pub tokens: u32,
    /// Sequences they are of.
    pub seqs: u32,
    /// Positions before the step's.
    pub before: u32,
}

impl Sizes {
    /// Ragged and small ones that fit a step class.
    pub fn of(max: &SymValues) -> Vec<Sizes> {
        let all = [(1, 1, 0), (1, 1, 130), (7, 1, 3), (19, 1, 70), (5, 5, 67), (3, 3, 0)];
        let fits = |s: &Sizes| {
            s.tokens <= max.get(Sym::T)
                && s.seqs <= max.get(Sym::S)
                && s.before + s.tokens.div_ceil(s.seqs) <= max.get(Sym::C)
                // The largest class of tokens is the only one with two.
                && (max.get(Sym::T) < 32 || s.tokens > 1)
        };
        let mut sizes: Vec<Sizes> =
            all.into_iter().map(|(tokens, seqs, before)| Sizes { tokens, seqs, before }).filter(fits).collect();
        if sizes.is_empty() {
            // A class of short contexts, of a model that selects few positions.
            sizes.push(Sizes { tokens: max.get(Sym::C).min(max.get(Sym::T)), seqs: 1, before: 0 });
        }
        sizes
    }
}

/// What buffers hold.
#[derive(Clone, Copy, Debug)]
pub struct Contents {
    /// Chooses the random numbers.
    pub seed: u64,
    /// Whether some integers lead nowhere.
    pub wild: bool,
    /// Whether scales of quantised values are powers of two, as those of caches are.
    pub pow2_scales: bool,
}

/// A launch: buffers with what they are bound to.
pub struct Launch<'a> {
    /// The kernel.
    pub program: &'a Program,
    /// Values of its symbols.
    pub syms: SymValues,
    /// Memory.
    pub buffers: Vec<Vec<u8>>,
    /// Where each parameter is bound.
    pub bindings: Vec<Binding>,
}

/// What an integer parameter of `n` elements holds.
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
        (Arg::Input(StepInput::Draws), _) => (0..n.div_ceil(3)).flat_map(|_| draw(rng, wild).bits()).take(n).collect(),
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

/// How a row chooses its token: greedy, of everything or of a nucleus.
fn draw(rng: &mut Rng, wild: bool) -> Draw {
    let quantile = (rng.real() + 1.0) / 2.0;
    match rng.below(4) {
        0 => Draw::GREEDY,
        1 => Draw { temperature: 0.5, top_p: 1.0, quantile },
        2 if wild => Draw { temperature: f32::NAN, top_p: -1.0, quantile: 2.0 },
        _ => Draw { temperature: 0.5, top_p: 0.7, quantile },
    }
}

impl<'a> Launch<'a> {
    /// Launch `index` of a step, of a kernel whose program verifies and has a parameter for each argument; none if its buffers are
    /// beyond reason.
    pub fn new(
        step: &Step,
        index: usize,
        program: &'a Program,
        sizes: Sizes,
        contents: Contents,
    ) -> Option<Launch<'a>> {
        let args = &step.launches.get(index)?.args;
        let context = sizes.before + sizes.tokens.div_ceil(sizes.seqs);
        let most = |sym, n: u32| n.min(step.max.get(sym));
        let syms = SymValues::default()
            .with(Sym::T, sizes.tokens)
            .with(Sym::S, sizes.seqs)
            .with(Sym::P, most(Sym::P, context.div_ceil(PAGE_TOKENS)))
            .with(Sym::L, sizes.tokens.div_ceil(2))
            .with(Sym::N, 5)
            .with(Sym::C, most(Sym::C, context));
        let views: Vec<&ViewType> = program.params.iter().filter_map(|p| program.view(p.value)).collect();
        if views.len() != args.len() || program.params.len() != args.len() {
            return None;
        }
        // Parameters of one tensor share its buffer: cells of a cache, outputs that are read again.
        let mut known: HashMap<String, usize> = HashMap::new();
        let mut launch = Launch { program, syms, buffers: Vec::new(), bindings: Vec::new() };
        for (&view, arg) in views.iter().zip(args) {
            let buffer = *known.entry(format!("{arg:?}")).or_insert_with(|| {
                launch.buffers.push(Vec::new());
                launch.buffers.len() - 1
            });
            let bytes = span(view, &syms)?.max(launch.buffers[buffer].len());
            launch.buffers[buffer].resize(bytes, 0x11);
            launch.bindings.push(Binding { buffer, offset: 0 });
        }
        let mut rng = Rng(contents.seed);
        for (i, (&view, arg)) in views.iter().zip(args).enumerate() {
            launch.fill(i, view, arg, sizes, contents, &mut rng);
        }
        Some(launch)
    }

    fn fill(&mut self, i: usize, view: &ViewType, arg: &Arg, sizes: Sizes, contents: Contents, rng: &mut Rng) {
        let (name, buffer) = (self.program.params[i].name.as_str(), self.bindings[i].buffer);
        let places = places(view, &self.syms);
        if view.dtype == DType::I32 {
            let values = integers(rng, name, arg, sizes, &self.syms, places.len(), contents.wild);
            for (at, v) in places.into_iter().zip(values) {
                self.buffers[buffer][at..at + 4].copy_from_slice(&v.to_le_bytes());
            }
            return;
        }
        // Scales, weights and activations of one size each; scales of quantised values are positive.
        let scale = name.contains("scale");
        let query = ["q_latent", "q_rope"].contains(&name);
        let score = self.program.name.starts_with("dsa_index") && ["q", "weights", "keys"].contains(&name);
        let logit = *arg == Arg::Logits && !self.program.params[i].access.writes();
        for at in places {
            let x = rng.real();
            let x = match view.dtype {
                _ if scale && contents.pow2_scales => (2.0f32).powi(-4 - (rng.below(4) as i32)),
                _ if scale => (x + 1.5) * 0.02,
                DType::E4m3 if !score => x * 100.0,
                // Eighths: their sums are exact in any order, so that selections are equal, and many scores are.
                _ if score => (x * 8.0).round() / 8.0,
                // Few that weigh anything, so that hardly any running sum comes near its target; equal ones among them.
                _ if logit && rng.below(16) > 0 => -500.0 + x,
                _ if logit => (x * 8.0).round() / 8.0,
                // Small, so that the exponents of a softmax are, whose error is that of the largest.
                _ if query => x * 0.2,
                _ => x,
            };
            let bytes = encode(view.dtype, x);
            self.buffers[buffer][at..at + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// The buffers as the interpreter leaves them.
    ///
    /// # Errors
    /// What it says.
    pub fn interpret(&self) -> Result<Vec<Vec<u8>>, String> {
        let blocks = interp::block_count(self.program, &self.syms).ok_or("its grid is beyond reason")?;
        let mut buffers = self.buffers.clone();
        let options = interp::Options::default();
        interp::run_blocks(self.program, &self.syms, &mut buffers, &self.bindings, 0..blocks, options)
            .map_err(|e| format!("the interpreter: {e}"))?;
        Ok(buffers)
    }

    /// Where a quantised result (`y`, `y_scales`) has twice or half the scale that is wanted, for few groups only, writes the wanted
    /// values in that scale: a largest element beside a power of two may round to either side of it.
    fn adopt_scales(&self, got: &[Vec<u8>], wanted: &mut [Vec<u8>]) {
        let written = |name: &str, dtype: DType| {
            let mut all = self.program.params.iter().zip(&self.bindings);
            all.find_map(|(p, binding)| {
                let view = self.program.view(p.value).filter(|v| v.dtype == dtype && p.access.writes())?;
                (p.name == name).then(|| (binding.buffer, places(view, &self.syms), view))
            })
        };
        for param in &self.program.params {
            let (Some((data, codes, view)), Some((factors, scales, scale_view))) =
                (written(&param.name, DType::E4m3), written(&format!("{}_scales", param.name), DType::F32))
            else {
                continue;
            };
            let columns = |v: &ViewType| v.shape.last().map_or(1, |n| n.eval(&self.syms)).max(1) as usize;
            let (width, groups) = (columns(view), columns(scale_view));
            let each = if width.div_ceil(128) == groups { 128 } else { width.div_ceil(groups) };
            let scale = |b: &[Vec<u8>], at: usize| decode(DType::F32, &b[factors][at..at + 4]);
            let ratio = |wanted: &[Vec<u8>], at: usize| scale(wanted, at) / scale(got, at);
            let other = |wanted: &[Vec<u8>], at: usize| matches!(ratio(wanted, at), 0.5 | 2.0);
            let differ = scales.iter().filter(|&&at| other(wanted, at)).count();
            if differ > 1 + scales.len() / 64 {
                continue;
            }
            for (i, &at) in codes.iter().enumerate() {
                let Some(&of) = scales.get(i / width * groups + i % width / each) else { continue };
                if other(wanted, of) {
                    let code = e4m3_to_f32(wanted[data][at]) * ratio(wanted, of) as f32;
                    wanted[data][at] = f32_to_e4m3(code);
                }
            }
            for at in scales {
                if other(wanted, at) {
                    wanted[factors][at..at + 4].copy_from_slice(&got[factors][at..at + 4]);
                }
            }
        }
    }

    /// Compares buffers as a launch has left them with those of [`Launch::interpret`]. Integers and NaNs must be equal, and what no
    /// parameter writes as it was.
    ///
    /// # Errors
    /// What differs that may not.
    pub fn compare(&self, got: &[Vec<u8>]) -> Result<Errors, String> {
        let mut wanted = self.interpret()?;
        self.adopt_scales(got, &mut wanted);
        let mut all = Errors::new();
        for (param, binding) in self.program.params.iter().zip(&self.bindings) {
            let Some(view) = self.program.view(param.value).filter(|_| param.access.writes()) else { continue };
            let (got, wanted) = (&got[binding.buffer], &wanted[binding.buffer]);
            let found = compare_views(view, &self.syms, got, wanted).map_err(|e| format!("%{}{e}", param.name))?;
            if found.error > all.get(&view.dtype).map_or(0.0, |w: &Worst| w.error) {
                all.insert(view.dtype, Worst { what: format!("%{}{}", param.name, found.what), ..found });
            }
        }
        for (i, (a, b)) in got.iter().zip(&self.buffers).enumerate() {
            let mut params = self.program.params.iter().zip(&self.bindings);
            if !params.any(|(p, b)| p.access.writes() && b.buffer == i) && a != b {
                return Err(format!("it wrote to buffer {i}, which it only reads"));
            }
        }
        Ok(all)
    }
}

/// The worst element of a view on two buffers.
///
/// # Errors
/// The first element that is not a number in one of them alone, infinite in one, or an integer that differs.
pub fn compare_views(view: &ViewType, syms: &SymValues, got: &[u8], wanted: &[u8]) -> Result<Worst, String> {
    let bytes = view.dtype.bytes();
    let value = |b: &[u8], at: usize| b.get(at..at + bytes).map_or(f64::NAN, |b| decode(view.dtype, b));
    let (mut squares, mut count) = (0.0, 0usize);
    for_each_place(view, syms, &mut |at| {
        let square = value(wanted, at).powi(2);
        squares += if square.is_finite() { square } else { 0.0 };
        count += 1;
    });
    let size = (squares / count.max(1) as f64).sqrt();
    let (mut i, mut worst, mut wrong) = (0usize, Worst::default(), None);
    for_each_place(view, syms, &mut |at| {
        let (g, w) = (value(got, at), value(wanted, at));
        let say = || format!("[element {i}, byte {at}] is {g:?}, not {w:?}");
        if g.is_nan() != w.is_nan()
            || (view.dtype == DType::I32 && g != w)
            || (g.is_infinite() || w.is_infinite()) && g != w
        {
            wrong.get_or_insert_with(say);
        } else if g != w && !g.is_nan() {
            let error = (g - w).abs() / w.abs().max(size);
            if error > worst.error {
                worst = Worst { error, what: say() };
            }
        }
        i += 1;
    });
    wrong.map_or(Ok(worst), Err)
}

/// The worst element of all written parameters: relative to the larger of itself and the root mean square of its tensor.
#[derive(Clone, Debug, Default)]
pub struct Worst {
    /// Its error.
    pub error: f64,
    /// Which it is.
    pub what: String,
}

/// The worst of each type.
pub type Errors = HashMap<DType, Worst>;
