//! The rules of a header: no index or range that leaves its table or its buffer.

use super::{ALIGN, Arg, Header, Launch, Loop, MAX_BUFFER_BYTES, Section, Step, TensorPart, WeightEntry, WeightSource};
use crate::DType;
use crate::extent::{Sym, SymValues};
use crate::graph::{Elem, PAGE_TOKENS, StateFormat};
use crate::sched::MOST_APART;
use std::collections::{BTreeMap, BTreeSet};

/// Entries a table may have.
const MAX_ENTRIES: usize = 1 << 20;
/// Elements of a cache row's part, and of a Hadamard matrix's side.
pub(super) const MAX_ROW: u32 = 1 << 16;
/// Scratch bytes a worker may need.
const MAX_SCRATCH_BYTES: u64 = 1 << 32;
/// Shared memory of a block; no hardware has as much.
const MAX_SHARED_BYTES: u32 = 1 << 20;
/// Problems reported at most.
pub(super) const MAX_PROBLEMS: usize = 50;

impl Header {
    /// The section of that name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|s| s.name == name)
    }

    /// Bytes of the buffer that an argument is bound to, and the argument's place in it, when symbols are at most `limits` (rope
    /// tables have `limits.C` rows). `None` if its index is foreign or the size overflows.
    pub fn buffer(&self, arg: Arg, arena_bytes: u64, limits: &SymValues) -> Option<(u64, u64)> {
        let rows = limits.get(Sym::C);
        Some(match arg {
            Arg::Arena(at) => (arena_bytes, at),
            Arg::Weight(i, at) => (self.weights.get(i as usize)?.bytes(rows)?, at),
            Arg::State(i) => (
                u64::from(limits.get(Sym::N))
                    .checked_mul(u64::from(self.states.get(i as usize)?.format.page_bytes()))?,
                0,
            ),
            Arg::Input(input) => (input.shape().iter().try_fold(4u64, |n, e| n.checked_mul(e.eval(limits)))?, 0),
            Arg::Logits => (u64::from(limits.get(Sym::L)).checked_mul(u64::from(self.model.vocab))?.checked_mul(4)?, 0),
            Arg::Tokens => (u64::from(limits.get(Sym::L)) * 4, 0),
            Arg::Caller(_) | Arg::Workspace(_) => return None,
        })
    }

    /// Everything that is wrong with the header: every index, range, count and size, and that each view stays inside what it is
    /// bound to at its step's limits. The list is not empty and ends after 50 problems.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut check = Check { header: self, problems: Vec::new() };
        check.model();
        check.sections();
        check.weights();
        // Sizes of states are computed without care for overflow, so what follows relies on these being sane.
        check.states();
        if check.problems.is_empty() {
            check.kernels();
        }
        if check.problems.is_empty() {
            check.steps();
            check.entries();
        }
        if check.problems.is_empty() { Ok(()) } else { Err(check.problems) }
    }
}

/// Walks a header and collects what is wrong.
struct Check<'a> {
    header: &'a Header,
    problems: Vec<String>,
}

impl<'a> Check<'a> {
    fn problem(&mut self, what: String) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(what);
        }
    }

    fn expect(&mut self, ok: bool, what: impl FnOnce() -> String) {
        if !ok {
            self.problem(what());
        }
    }

    /// Names must be there and differ, tables be of sane size.
    fn names(&mut self, what: &str, names: impl ExactSizeIterator<Item = &'a str>) {
        self.expect(names.len() <= MAX_ENTRIES, || format!("more than {MAX_ENTRIES} {what}s"));
        let mut seen = BTreeSet::new();
        for name in names {
            self.expect(!name.is_empty() && name.len() <= 4096, || format!("a {what} has an empty or endless name"));
            self.expect(seen.insert(name), || format!("{what} {name}: the name occurs twice"));
        }
    }

    fn model(&mut self) {
        let m = &self.header.model;
        self.expect((1..=i32::MAX as u32).contains(&m.vocab), || format!("model: vocabulary of {}", m.vocab));
        self.expect((1..=i32::MAX as u32).contains(&m.max_context), || format!("model: context of {}", m.max_context));
        self.expect(m.rank < m.ranks, || format!("model: rank {} of {}", m.rank, m.ranks));
        for &token in m.bos.iter().chain(&m.eos) {
            self.expect(token < m.vocab, || {
                format!("model: bos or eos {token} is outside the vocabulary of {}", m.vocab)
            });
        }
    }

    fn sections(&mut self) {
        self.names("section", self.header.sections.iter().map(|s| s.name.as_str()));
        for s in &self.header.sections {
            self.expect(s.offset.is_multiple_of(ALIGN), || {
                format!("section {}: offset {} is not aligned", s.name, s.offset)
            });
            self.expect(s.offset.checked_add(s.bytes).is_some_and(|end| end <= MAX_BUFFER_BYTES), || {
                format!("section {}: {} bytes at {} are beyond reason", s.name, s.bytes, s.offset)
            });
        }
    }

    fn weights(&mut self) {
        self.names("weight", self.header.weights.iter().map(|w| w.name.as_str()));
        for w in &self.header.weights {
            if let Err(what) = check_weight(w) {
                self.problem(format!("weight {}: {what}", w.name));
            }
        }
    }

    fn states(&mut self) {
        self.names("state", self.header.states.iter().map(|s| s.name.as_str()));
        for s in &self.header.states {
            let (sizes, dtype) = match s.format {
                StateFormat::LatentFp8 { latent, rope } => ([latent, rope], DType::E4m3),
                StateFormat::Latent { latent, rope, dtype } => ([latent, rope], dtype),
                StateFormat::IndexFp8 { dim } => ([dim, 1], DType::E4m3),
                StateFormat::Index { dim, dtype } => ([dim, 1], dtype),
            };
            self.expect(sizes.iter().all(|n| (1..=MAX_ROW).contains(n)) && dtype != DType::Bool, || {
                format!("state {}: {:?} is beyond reason", s.name, s.format)
            });
        }
    }

    fn kernels(&mut self) {
        self.names("kernel", self.header.kernels.iter().map(|k| k.name.as_str()));
        let code = self.header.section("code").map_or(0, |s| s.bytes);
        let asm = self.header.section("asm").map_or(0, |s| s.bytes);
        for k in &self.header.kernels {
            let mut fault = |ok: bool, what: &dyn Fn() -> String| {
                self.expect(ok, || format!("kernel {}: {}", k.name, what()));
            };
            let end = k.entry.checked_add(k.code_bytes);
            // Without machine code, the driver makes it from assembly.
            let portable = k.gpu.as_ref().is_some_and(|g| g.resources.is_none() && g.asm[0] < g.asm[1]);
            fault((k.code_bytes > 0 || portable) && end.is_some_and(|end| end <= code), &|| {
                format!("its {} bytes at {} are not inside the code section of {code}", k.code_bytes, k.entry)
            });
            if let Some(gpu) = &k.gpu {
                fault((1..=1024).contains(&gpu.threads), &|| format!("{} threads a block", gpu.threads));
                fault(gpu.shared_bytes <= MAX_SHARED_BYTES, &|| format!("{} bytes of shared memory", gpu.shared_bytes));
                fault((1..=16).contains(&gpu.cluster), &|| format!("clusters of {} blocks", gpu.cluster));
                fault(
                    gpu.team <= 1
                        || gpu.persistent && gpu.turns == 0 && (gpu.apart || gpu.cluster.is_multiple_of(gpu.team)),
                    &|| format!("teams of {} in clusters of {} blocks", gpu.team, gpu.cluster),
                );
                fault(!gpu.apart || (2..=MOST_APART).contains(&gpu.team) && gpu.scratch_bytes > 0, &|| {
                    format!("teams of {} that exchange through {} bytes of memory", gpu.team, gpu.scratch_bytes)
                });
                fault(gpu.scratch_bytes <= MAX_SCRATCH_BYTES, &|| {
                    format!("{} scratch bytes are beyond reason", gpu.scratch_bytes)
                });
                fault(gpu.scratch_bytes == 0 || gpu.persistent && gpu.turns == 0, &|| {
                    "memory of its own for every block of a grid".into()
                });
                fault(!gpu.ranges || gpu.persistent && gpu.turns == 0 && gpu.cluster <= 1 && gpu.team <= 1, &|| {
                    "ranges of rounds of blocks that are not persistent and each by themselves".into()
                });
                fault(gpu.turns == 0 || gpu.persistent, &|| "turns of a block that takes one tile".into());
                fault(gpu.asm[0] <= gpu.asm[1] && gpu.asm[1] <= asm, &|| "its assembly is outside its section".into());
                for map in &gpu.maps {
                    let rank = k.params.get(map.param as usize).map_or(0, |p| p.view.shape.len());
                    let boxed = rank == map.tile.len() && (1..=5).contains(&rank);
                    fault(boxed && map.tile.iter().all(|n| (1..=256).contains(n)), &|| {
                        format!("a tensor map of parameter {} with box {:?}", map.param, map.tile)
                    });
                    fault([0, 32, 64, 128].contains(&map.swizzle), &|| format!("a swizzle of {} bytes", map.swizzle));
                }
            }
            fault(k.scratch_bytes <= MAX_SCRATCH_BYTES, &|| {
                format!("{} scratch bytes are beyond reason", k.scratch_bytes)
            });
            fault(k.grid.len() <= 3 && k.grid.iter().all(|d| d.tile > 0), &|| {
                "its grid has over 3 axes, or a tile of 0".into()
            });
            fault(k.params.len() <= 256, &|| format!("{} parameters are beyond reason", k.params.len()));
            for p in &k.params {
                let (view, bytes) = (&p.view, p.view.dtype.bytes() as i64);
                fault(view.dtype != DType::Bool, &|| format!("parameter {}: truth values in memory", p.name));
                fault(view.shape.len() == view.strides.len() && view.shape.len() <= 8, &|| {
                    format!("parameter {}: {} dims with {} strides", p.name, view.shape.len(), view.strides.len())
                });
                let aligned =
                    view.offset.is_multiple_of(bytes as u64) && view.strides.iter().all(|s| s.bytes % bytes == 0);
                fault(aligned, &|| {
                    format!("parameter {}: offset or strides are not aligned to its {}", p.name, view.dtype)
                });
            }
        }
    }

    fn steps(&mut self) {
        let empty = self.header.steps.is_empty() && self.header.entries.is_empty();
        self.expect(!empty, || "there is no step".into());
        self.names("step", self.header.steps.iter().map(|s| s.name.as_str()));
        let mut taps = BTreeMap::new();
        for step in &self.header.steps {
            for sym in Sym::ALL {
                let (value, least) = (step.max.get(sym), u32::from(sym != Sym::L));
                let most = if sym == Sym::N { i32::MAX as u32 / PAGE_TOKENS } else { i32::MAX as u32 };
                self.expect((least..=most).contains(&value), || {
                    format!("step {}: at most {value} {} is outside {least}..={most}", step.name, sym.name())
                });
            }
            self.expect(step.arena_bytes <= MAX_BUFFER_BYTES, || {
                format!("step {}: an arena of {} bytes is beyond reason", step.name, step.arena_bytes)
            });
            self.expect(step.sampling as usize <= step.launches.len(), || {
                format!("step {}: sampling begins at launch {} of {}", step.name, step.sampling, step.launches.len())
            });
            self.expect(step.launches.len() <= MAX_ENTRIES, || format!("step {}: too many launches", step.name));
            for what in step.check_loops() {
                self.problem(format!("step {}, {what}", step.name));
            }
            for (i, launch) in step.launches.iter().enumerate() {
                let problems = match step.loop_of(i) {
                    Some(of) => self.looped(step, of, launch),
                    None => self.launch(step, launch),
                };
                for what in problems {
                    self.problem(format!("step {}, launch {i} ({}): {what}", step.name, launch.node));
                }
            }
            self.expect(self.header.model.ranks > 1 || step.collectives.is_empty(), || {
                format!("step {}: sums over the ranks of a model that has one", step.name)
            });
            for (i, sum) in step.collectives.iter().enumerate() {
                if let Err(what) = check_rows(step, sum.at, sum.columns, sum.dtype, sum.after) {
                    self.problem(format!("step {}, sum {i} over ranks: {what}", step.name));
                }
            }
            self.names("tap", step.taps.iter().map(|t| t.name.as_str()));
            for tap in &step.taps {
                if let Err(what) = check_rows(step, tap.at, tap.columns, tap.dtype, tap.after) {
                    self.problem(format!("step {}, tap {}: {what}", step.name, tap.name));
                }
                let kind = (tap.columns, tap.dtype);
                self.expect(*taps.entry(tap.name.as_str()).or_insert(kind) == kind, || {
                    format!("step {}, tap {}: it differs from that of another step", step.name, tap.name)
                });
            }
        }
    }

    fn entries(&mut self) {
        self.expect(self.header.entries.len() <= MAX_ENTRIES, || format!("more than {MAX_ENTRIES} entry points"));
        for entry in &self.header.entries {
            let place = format!("entry point {} ({})", entry.op, entry.class);
            for what in entry.check() {
                self.problem(format!("{place}: {what}"));
            }
            for (i, launch) in entry.launches.iter().enumerate() {
                let buffer = |arg| entry.buffer(arg, &entry.max);
                for what in self.launch_of(launch, &entry.max, &buffer, &|arg| entry.writable(arg)) {
                    self.problem(format!("{place}, launch {i} ({}): {what}", launch.node));
                }
            }
        }
    }

    fn launch(&self, step: &Step, launch: &Launch) -> Vec<String> {
        let buffer = |arg| self.header.buffer(arg, step.arena_bytes, &step.max);
        self.launch_of(launch, &step.max, &buffer, &|arg| !matches!(arg, Arg::Weight(..) | Arg::Input(_)))
    }

    /// Pieces of every size have the matrix, which no other memory is next to; all pieces together have rows of all tokens.
    fn looped(&self, step: &Step, of: &Loop, launch: &Launch) -> Vec<String> {
        let matrix = Arg::Arena(of.matrix);
        let end = of.matrix.saturating_add(of.matrix_bytes(&step.max)).min(step.arena_bytes);
        let buffer = |arg| match arg == matrix {
            true => Some((end, of.matrix)),
            false => self.header.buffer(arg, step.arena_bytes, &step.max),
        };
        let writable = |arg| !matches!(arg, Arg::Weight(..) | Arg::Input(_));
        let mut problems = Vec::new();
        for size in of.sizes(&step.max) {
            let piece = size.with(Sym::T, size.get(Sym::T).min(step.max.get(Sym::T)));
            problems.extend(self.launch_of(launch, &piece, &buffer, &writable));
        }
        let params = self.header.kernels.get(launch.kernel as usize).map_or(&[][..], |k| &k.params);
        for (param, &arg) in params.iter().zip(&launch.args) {
            let rows = of.pitch(param, arg).and_then(|pitch| match (pitch, buffer(arg)) {
                (1.., Some((bytes, at))) => param.check_binding(at, bytes, &step.max),
                _ => Ok(()),
            });
            problems.extend(rows.err());
        }
        problems.dedup();
        problems
    }

    fn launch_of(
        &self,
        launch: &Launch,
        max: &SymValues,
        buffer: &dyn Fn(Arg) -> Option<(u64, u64)>,
        writable: &dyn Fn(Arg) -> bool,
    ) -> Vec<String> {
        let Some(kernel) = self.header.kernels.get(launch.kernel as usize) else {
            return vec![format!("kernel {} of {}", launch.kernel, self.header.kernels.len())];
        };
        let mut problems = Vec::new();
        if launch.args.len() != kernel.params.len() {
            problems.push(format!(
                "{} arguments for the {} parameters of {}",
                launch.args.len(),
                kernel.params.len(),
                kernel.name
            ));
        }
        if kernel.blocks(max).is_none() {
            problems.push(format!("the grid of {} is beyond reason", kernel.name));
        }
        for (param, &arg) in kernel.params.iter().zip(&launch.args) {
            if param.write && !writable(arg) {
                problems.push(format!("parameter {} writes {arg:?}", param.name));
            }
            match buffer(arg) {
                None => {
                    problems.push(format!("parameter {}: {arg:?} does not exist, or its size overflows", param.name))
                }
                Some((bytes, at)) => problems.extend(param.check_binding(at, bytes, max).err()),
            }
        }
        problems
    }
}

/// Whether `[T, columns]` at byte `at` can be read after so many launches.
fn check_rows(step: &Step, at: u64, columns: u32, dtype: DType, after: u32) -> Result<(), String> {
    let bytes = dtype.bytes() as u64;
    if dtype == DType::Bool || after > step.sampling || !at.is_multiple_of(bytes) {
        return Err("its type, launch or alignment cannot be".into());
    }
    let size = (u64::from(step.max.get(Sym::T)) * u64::from(columns)).checked_mul(bytes);
    match size.and_then(|size| at.checked_add(size)) {
        Some(end) if end <= step.arena_bytes => Ok(()),
        _ => Err(format!("it leaves the arena of {} bytes", step.arena_bytes)),
    }
}

fn check_weight(w: &WeightEntry) -> Result<(), String> {
    let rope = matches!(w.source, WeightSource::RopeTable { .. });
    if !(1..=4).contains(&w.shape.len()) || w.shape.iter().skip(usize::from(rope)).any(|&n| n == 0) {
        return Err(format!("shape {:?}", w.shape));
    }
    match w.elem {
        Elem::Plain(DType::Bool) => return Err("truth values in memory".into()),
        Elem::Quant(q) if q.block.contains(&0) || (w.shape.len() == 1 && q.block[0] != 1) => {
            return Err(format!("blocks {:?}", q.block));
        }
        _ => {}
    }
    if w.bytes(i32::MAX as u32).is_none_or(|n| n > MAX_BUFFER_BYTES) {
        return Err(format!("shape {:?} is beyond reason", w.shape));
    }
    match &w.source {
        WeightSource::RopeTable { frequencies } => {
            let columns = 2 * frequencies.len() as u64;
            let fits = w.shape.len() == 2 && w.shape[0] == 0 && u64::from(w.shape[1]) == columns;
            if !fits || w.elem != Elem::Plain(DType::F32) || frequencies.iter().any(|f| !f.is_finite()) {
                return Err(format!("a rope table of {} frequencies is f32 [0, {columns}]", frequencies.len()));
            }
        }
        WeightSource::Hadamard { n } => {
            let plain = matches!(w.elem, Elem::Plain(d) if d.is_float());
            if !n.is_power_of_two() || *n > MAX_ROW || w.shape != [*n, *n] || !plain {
                return Err(format!("a Hadamard matrix of order {n} is [{n}, {n}], of plain floats, a power of two"));
            }
        }
        WeightSource::Tensors(parts) => check_parts(w, parts)?,
    }
    Ok(())
}

/// The parts, stacked by rows, must make the weight's shape; those of quantised weights on its grid of scales.
fn check_parts(w: &WeightEntry, parts: &[TensorPart]) -> Result<(), String> {
    let columns = w.shape[w.shape.len() - 1];
    let slab = w.shape[..w.shape.len() - 1].last().map_or(1, |&n| u64::from(n));
    let (mut rows, mut elements) = (0u64, 0u64);
    for part in parts {
        let fault = |what: String| Err(format!("tensor {}: {what}", part.tensor));
        let [r0, r1] = part.rows;
        let [c0, c1] = part.cols;
        if r0 > r1 || r1 > part.shape[0] || c0 > c1 || c1 > part.shape[1] || part.scale_block.contains(&0) {
            return fault(format!(
                "rows {r0}..{r1}, columns {c0}..{c1} of {:?}, scales each {:?}",
                part.shape, part.scale_block
            ));
        }
        let count = u64::from(r1 - r0);
        if w.shape.len() > 1 && c1 - c0 != columns {
            return fault(format!("{} columns of {columns}", c1 - c0));
        }
        if let Elem::Quant(q) = w.elem {
            let (first, end) = (rows % slab, rows % slab + count);
            let block = u64::from(q.block[0]);
            let one_slab = end <= slab || slab.is_multiple_of(block);
            let aligned = first.is_multiple_of(block) && r0.is_multiple_of(q.block[0]) && c0.is_multiple_of(q.block[1]);
            let ends = count.is_multiple_of(block) || end.is_multiple_of(slab);
            if part.scale_block != q.block || part.scale.is_none() || !one_slab || !aligned || !ends {
                return fault(format!("its scales are not those of blocks {:?} of the weight", q.block));
            }
        }
        rows += count;
        elements += count * u64::from(c1 - c0);
    }
    if Some(elements) != w.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(u64::from(d))) {
        return Err(format!("its parts have {elements} elements, its shape is {:?}", w.shape));
    }
    Ok(())
}
