//! Sessions: sequences whose keys live in one paged cache.
//!
//! A request runs as one or more *device steps*. Each takes the longest prefix of the remaining tokens that some step of the
//! artifact admits, and runs the first that admits it; so long prompts come in chunks, and the way they are cut depends on the
//! request alone. Pages are handed out lowest first. Nothing depends on time or on the number of threads: the same requests
//! give the same bits.

mod generate;
mod parts;
#[cfg(test)]
mod tests;

pub use generate::{FinishReason, GenerateOptions, Generation, Timings};

use crate::Model;
use crate::artifact::Artifact;
use crate::device::{Buffer, Device, LaunchTime, LaunchTimes};
use crate::error::{DeviceError, Error, RequestError};
use crate::inputs::{Feed, Layout};
use crate::limits::Limits;
use crate::sample::{SampleError, Sampler};
use dsc_ir::artifact::{Arg, Header, Step, Tap};
use dsc_ir::graph::{PAGE_TOKENS, StateFormat};
use dsc_ir::sample::Draw;
use dsc_ir::{DType, Sym, SymValues};
use parts::{Binding, Parts};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A sequence of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(u64);

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct SequenceInput<'a> {
    /// The sequence they follow.
    pub seq: SeqId,
    /// The tokens; at least one.
    pub tokens: &'a [u32],
}

/// Which tokens' logits a step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsWanted<'a> {
    /// Of the last token of each input, in their order.
    Last,
    /// Of every token, in the order of the inputs.
    All,
    /// Of these tokens, numbered over all inputs, in ascending order.
    Rows(&'a [u32]),
}

/// What a step gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// `[rows, vocab]`, row-major.
    pub logits: Vec<f32>,
    /// Rows of `logits`.
    pub rows: usize,
    /// Intermediate results by name, if they were asked for: one row a token.
    pub taps: BTreeMap<String, TapOutput>,
}

impl StepOutput {
    /// The logits of one row.
    pub fn row(&self, row: usize) -> &[f32] {
        let vocab = self.logits.len() / self.rows.max(1);
        &self.logits[row * vocab..(row + 1) * vocab]
    }
}

/// An intermediate result, `[tokens, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct TapOutput {
    /// Columns.
    pub columns: usize,
    /// Rows one after another.
    pub data: TapData,
}

/// Elements of an intermediate result; smaller floats are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum TapData {
    /// Real numbers.
    F32(Vec<f32>),
    /// Integers.
    I32(Vec<i32>),
}

/// How long the launches of one step class took: a line of a profile.
#[derive(Clone, Debug)]
pub struct ProfileRow {
    /// The step class.
    pub step: String,
    /// Number of the launch in it.
    pub launch: usize,
    /// The graph node.
    pub node: String,
    /// The kernel.
    pub kernel: String,
    /// Its times.
    pub time: LaunchTime,
}

/// Sequences with a common cache, on one device.
pub struct Session {
    artifact: Arc<Artifact>,
    device: Box<dyn Device>,
    steps: Vec<ReadyStep>,
    arena: Buffer,
    logits: Buffer,
    /// Chosen tokens, one a row of logits.
    tokens: Buffer,
    inputs: Buffer,
    states: Vec<Buffer>,
    pages: u32,
    /// Free pages, the lowest last.
    free: Vec<u32>,
    sequences: BTreeMap<SeqId, Sequence>,
    next_seq: u64,
    context_limit: u32,
    /// By step of the header; present while profiling.
    profile: Option<Vec<LaunchTimes>>,
    /// What the last request ran: steps of the header and their symbols.
    ran: Vec<(usize, SymValues)>,
}

/// A step of the header that admits the session's cache.
struct ReadyStep {
    index: usize,
    limits: SymValues,
    parts: Parts,
    layout: Layout,
}

#[derive(Default)]
struct Sequence {
    tokens: u32,
    pages: Vec<u32>,
}

/// The tokens of one device step.
struct Chunk<'a> {
    /// Index in `Session::steps`.
    step: usize,
    /// Pieces of inputs: sequence, tokens.
    pieces: Vec<(SeqId, &'a [u32])>,
    /// Wanted rows, numbered inside the chunk.
    rows: Vec<u32>,
    /// How each of them chooses its token; none where logits are wanted.
    draws: Vec<Draw>,
    syms: SymValues,
}

impl Session {
    /// On a device with the model's code and weights.
    pub(crate) fn new(model: &Model, mut device: Box<dyn Device>, weights: &[Buffer]) -> Result<Session, Error> {
        let artifact = Arc::clone(&model.artifact);
        let header = artifact.header();
        let pages = model.pages;
        let states = header.states.iter().map(|s| u64::from(pages) * u64::from(s.format.page_bytes()));
        let states = states.map(|bytes| device.alloc(bytes, "caches")).collect::<Result<Vec<_>, _>>()?;

        let context_limit = model.context_limit();
        let limits: Vec<(usize, SymValues)> = header
            .steps
            .iter()
            .enumerate()
            .filter_map(|(i, step)| Some((i, limits(step, pages, context_limit)?)))
            .collect();
        let most = |sym| limits.iter().map(|(_, l)| u64::from(l.get(sym))).max().unwrap_or(0);
        let arena_bytes = header.steps.iter().map(|s| s.arena_bytes).max().unwrap_or(0);
        let arena = device.alloc(arena_bytes, "intermediate results")?;
        let logits = device.alloc(most(Sym::L) * u64::from(header.model.vocab) * 4, "logits")?;
        let tokens = device.alloc(most(Sym::L) * 4, "tokens")?;
        let input_bytes = limits.iter().map(|(_, l)| Layout::new(l).bytes()).max().unwrap_or(0);
        let inputs = device.alloc(input_bytes, "step inputs")?;
        let address = |arg: &Arg, layout: &Layout| match *arg {
            Arg::Arena(at) => (arena, at),
            Arg::Weight(i, at) => (weights[i as usize], at),
            Arg::State(i) => (states[i as usize], 0),
            Arg::Input(input) => (inputs, layout.at(input)),
            Arg::Logits => (logits, 0),
            Arg::Tokens => (tokens, 0),
            // The header was checked: entry points alone have them.
            Arg::Caller(_) | Arg::Workspace(_) => (arena, 0),
        };
        let mut steps = Vec::new();
        for (index, limits) in limits {
            let layout = Layout::new(&limits);
            let binding = Binding { header, limits, address: &|arg| address(arg, &layout) };
            let parts = Parts::bind(&mut *device, &header.steps[index], &binding)?;
            steps.push(ReadyStep { index, limits, parts, layout });
        }
        Ok(Session {
            device,
            steps,
            arena,
            logits,
            tokens,
            inputs,
            states,
            pages,
            free: (0..pages).rev().collect(),
            sequences: BTreeMap::new(),
            next_seq: 0,
            context_limit,
            profile: None,
            ran: Vec::new(),
            artifact,
        })
    }

    /// The artifact's description.
    pub fn header(&self) -> &Header {
        self.artifact.header()
    }

    /// The device, in a line.
    pub fn device(&self) -> String {
        self.device.describe()
    }

    /// Longest context of a sequence, in tokens.
    pub fn context_limit(&self) -> u32 {
        self.context_limit
    }

    /// A new, empty sequence.
    pub fn add_sequence(&mut self) -> SeqId {
        let seq = SeqId(self.next_seq);
        self.next_seq += 1;
        self.sequences.insert(seq, Sequence::default());
        seq
    }

    /// A new sequence with the tokens of another, cached in pages of its own: the caches are copied, nothing is computed.
    ///
    /// # Errors
    /// [`RequestError::Sequence`], [`RequestError::Pages`]; [`Error::Device`].
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId, Error> {
        let Sequence { tokens, pages } = self.sequences.get(&seq).ok_or(RequestError::Sequence)?;
        let (tokens, from) = (*tokens, pages.clone());
        if from.len() > self.free.len() {
            return Err(RequestError::Pages { wanted: from.len() as u64, free: self.free.len() }.into());
        }
        let to: Vec<u32> = self.free.split_off(self.free.len() - from.len()).into_iter().rev().collect();
        let fork = self.add_sequence();
        self.sequences.insert(fork, Sequence { tokens, pages: to.clone() });
        // Runs of pages that follow one another on both sides are one copy.
        let places: Vec<(u32, u32)> = from.into_iter().zip(to).collect();
        let formats: Vec<StateFormat> = self.artifact.header().states.iter().map(|s| s.format).collect();
        for (format, &state) in formats.iter().zip(&self.states) {
            let page = u64::from(format.page_bytes());
            for run in places.chunk_by(|a, b| b.0 == a.0.wrapping_add(1) && b.1 == a.1.wrapping_add(1)) {
                let (from, to) = (u64::from(run[0].0) * page, u64::from(run[0].1) * page);
                self.device.copy(state, from, to, run.len() as u64 * page)?;
            }
        }
        Ok(fork)
    }

    /// Ends a sequence; its pages are free again.
    pub fn remove_sequence(&mut self, seq: SeqId) {
        if let Some(sequence) = self.sequences.remove(&seq) {
            self.release(sequence.pages);
        }
    }

    /// Tokens of a sequence; none if it does not exist.
    pub fn sequence_tokens(&self, seq: SeqId) -> Option<u32> {
        self.sequences.get(&seq).map(|s| s.tokens)
    }

    /// The index keys that a layer has cached for a sequence, one row a token; none where they are not plain f32.
    pub(crate) fn index_keys(&mut self, seq: SeqId, layer: usize) -> Result<Option<Vec<f32>>, Error> {
        let name = format!("layers.{layer}.index");
        let (header, sequence) = (self.artifact.header(), self.sequences.get(&seq).ok_or(RequestError::Sequence)?);
        let Some(state) = header.states.iter().position(|s| s.name == name) else { return Ok(None) };
        let format = header.states[state].format;
        let StateFormat::Index { dtype: DType::F32, .. } = format else { return Ok(None) };
        let bytes = sequence.tokens as usize * format.row_bytes() as usize;
        let mut data = vec![0; bytes.next_multiple_of(format.page_bytes() as usize)];
        for (page, data) in sequence.pages.iter().zip(data.chunks_exact_mut(format.page_bytes() as usize)) {
            self.device.read(self.states[state], u64::from(*page) * u64::from(format.page_bytes()), data)?;
        }
        let words = data[..bytes].chunks_exact(4);
        Ok(Some(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()))
    }

    /// Forgets all but the first `tokens` tokens of a sequence.
    pub fn truncate_sequence(&mut self, seq: SeqId, tokens: u32) {
        let Some(sequence) = self.sequences.get_mut(&seq) else { return };
        sequence.tokens = sequence.tokens.min(tokens);
        let pages = sequence.pages.split_off(sequence.tokens.div_ceil(PAGE_TOKENS) as usize);
        self.release(pages);
    }

    fn release(&mut self, pages: Vec<u32>) {
        self.free.extend(pages);
        self.free.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// The device steps of the last request: which step of the header each ran, and its symbols.
    pub fn last_steps(&self) -> &[(usize, SymValues)] {
        &self.ran
    }

    /// How fast the device can be at best on so many bytes; see [`Device::limits`].
    pub fn limits(&mut self, working_set: u64) -> Option<Limits> {
        self.device.limits(working_set)
    }

    /// Bytes of device memory in use since the device was opened; see [`Device::memory_used`].
    pub fn memory_used(&mut self) -> Option<u64> {
        self.device.memory_used()
    }

    /// Starts to time every launch, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(vec![LaunchTimes::default(); self.header().steps.len()]);
    }

    /// Ends profiling; the launches that ran, by step and in their order.
    pub fn take_profile(&mut self) -> Vec<ProfileRow> {
        let Some(profile) = self.profile.take() else { return Vec::new() };
        let header = self.artifact.header();
        let rows = profile.iter().zip(&header.steps).flat_map(|(times, step)| {
            times.launches.iter().enumerate().filter(|(_, time)| time.runs > 0).map(|(i, &time)| ProfileRow {
                step: step.name.clone(),
                launch: i,
                node: step.launches[i].node.clone(),
                kernel: header.kernels[step.launches[i].kernel as usize].name.clone(),
                time,
            })
        });
        rows.collect()
    }

    /// Appends tokens to sequences and runs the model on them. On a request that is refused nothing has changed.
    ///
    /// # Errors
    /// [`Error::Request`] says what to change; [`Error::Device`] is not the request's fault.
    pub fn step(
        &mut self,
        inputs: &[SequenceInput<'_>],
        logits: LogitsWanted<'_>,
        taps: bool,
    ) -> Result<StepOutput, Error> {
        let wanted = wanted_rows(inputs, logits)?;
        self.check_request(inputs)?;
        let chunks = self.cut(inputs, &wanted, &[])?;
        let mut output = StepOutput::default();
        let elements = wanted.len().saturating_mul(self.header().model.vocab as usize);
        output.logits.try_reserve_exact(elements).map_err(|e| DeviceError::Memory {
            what: "logits (ask for fewer rows)",
            bytes: 4 * elements as u64,
            reason: e.to_string(),
        })?;
        self.ran.clear();
        for chunk in &chunks {
            self.ran.push((self.steps[chunk.step].index, chunk.syms));
            self.run_chunk(chunk, taps, &mut output)?;
        }
        Ok(output)
    }

    /// As [`Session::step`], and chooses the token that follows each input, by the sampler of the same place. The device does: no
    /// logits come to the host.
    ///
    /// # Errors
    /// As [`Session::step`]; [`Error::Sample`]. [`RequestError::Samplers`] if there are not as many samplers as inputs.
    pub fn choose(&mut self, inputs: &[SequenceInput<'_>], samplers: &[Sampler]) -> Result<Vec<u32>, Error> {
        if samplers.len() != inputs.len() {
            return Err(RequestError::Samplers { samplers: samplers.len(), inputs: inputs.len() }.into());
        }
        let wanted = wanted_rows(inputs, LogitsWanted::Last)?;
        self.check_request(inputs)?;
        let draw = |(input, sampler): (&SequenceInput<'_>, &Sampler)| {
            let before = self.sequence_tokens(input.seq).unwrap_or(0);
            sampler.draw(u64::from(before) + input.tokens.len() as u64)
        };
        let draws = inputs.iter().zip(samplers).map(draw).collect::<Result<Vec<_>, _>>()?;
        let mut tokens = Vec::with_capacity(inputs.len());
        let chunks = self.cut(inputs, &wanted, &draws)?;
        self.ran.clear();
        for chunk in &chunks {
            self.ran.push((self.steps[chunk.step].index, chunk.syms));
            self.feed(chunk)?;
            let ReadyStep { index, parts, .. } = &self.steps[chunk.step];
            let launches = 0..self.artifact.header().steps[*index].launches.len();
            let times = self.profile.as_mut().map(|p| &mut p[*index]);
            parts.run(&mut *self.device, launches, &chunk.syms, times)?;
            self.keep(chunk);
            // Chunks without rows do not wait: what follows them on the device does.
            let mut words = vec![0; 4 * chunk.rows.len()];
            if !words.is_empty() {
                self.device.read(self.tokens, 0, &mut words)?;
            }
            tokens.extend(words.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        }
        let vocab = self.header().model.vocab;
        let token = |t: i32| u32::try_from(t).ok().filter(|&t| t < vocab).ok_or(SampleError::NoLogits(vocab as usize));
        Ok(tokens.into_iter().map(token).collect::<Result<_, _>>()?)
    }

    fn check_request(&self, inputs: &[SequenceInput<'_>]) -> Result<(), RequestError> {
        let vocab = self.header().model.vocab;
        let mut seen = std::collections::BTreeSet::new();
        let mut wanted = 0u64;
        for input in inputs {
            let sequence = self.sequences.get(&input.seq).ok_or(RequestError::Sequence)?;
            if !seen.insert(input.seq) {
                return Err(RequestError::Twice);
            }
            if let Some(place) = input.tokens.iter().position(|&t| t >= vocab) {
                return Err(RequestError::Token { token: input.tokens[place], place, vocab });
            }
            let context = u64::from(sequence.tokens) + input.tokens.len() as u64;
            if context > u64::from(self.context_limit) {
                return Err(RequestError::Context {
                    wanted: context,
                    limit: self.context_limit,
                    remedy: self.context_remedy(),
                });
            }
            wanted += context.div_ceil(u64::from(PAGE_TOKENS)).saturating_sub(sequence.pages.len() as u64);
        }
        if wanted > self.free.len() as u64 {
            return Err(RequestError::Pages { wanted, free: self.free.len() });
        }
        Ok(())
    }

    fn context_remedy(&self) -> String {
        if self.context_limit < self.header().model.max_context && self.context_limit == self.pages * PAGE_TOKENS {
            let most = self.header().model.max_context;
            format!("shorten it, or open the model with a larger `context_tokens` (the artifact serves {most})")
        } else {
            "shorten it, or compile the model with a larger `--max-context`".into()
        }
    }

    /// Cuts a checked request into device steps; `draws` has one for each row of `wanted`, or none at all.
    fn cut<'a>(
        &self,
        inputs: &[SequenceInput<'a>],
        wanted: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<Chunk<'a>>, RequestError> {
        let mut left: Vec<(SeqId, u32, &[u32])> =
            inputs.iter().map(|i| (i.seq, self.sequences[&i.seq].tokens, i.tokens)).collect();
        left.reverse(); // the next one last
        let (mut chunks, mut first) = (Vec::new(), 0u32);
        let (mut wanted, mut draws) = (wanted, draws);
        while let Some(&(_, start, _)) = left.last() {
            let best = self.steps.iter().map(|s| admitted(&s.limits, &left, first, wanted)).max().unwrap_or(0);
            let fits = |s: &ReadyStep| best > 0 && admitted(&s.limits, &left, first, wanted) == best;
            let Some(step) = self.steps.iter().position(fits) else {
                let remedy = "compile the model again with larger limits".into();
                return Err(RequestError::NoStep { context: start + 1, pages: self.pages, remedy });
            };
            let (mut pieces, mut tokens) = (Vec::new(), 0);
            let (mut context, mut pages) = (0, 0);
            while tokens < best
                && let Some(entry) = left.last_mut()
            {
                let (head, tail) = entry.2.split_at(entry.2.len().min((best - tokens) as usize));
                tokens += head.len() as u32;
                entry.1 += head.len() as u32;
                entry.2 = tail;
                context = context.max(entry.1);
                pages = pages.max(entry.1.div_ceil(PAGE_TOKENS));
                pieces.push((entry.0, head));
                if tail.is_empty() {
                    left.pop();
                }
            }
            let count = wanted.iter().take_while(|&&row| row < first + tokens).count();
            let rows: Vec<u32> = wanted[..count].iter().map(|row| row - first).collect();
            wanted = &wanted[count..];
            let (drawn, rest) = draws.split_at(count.min(draws.len()));
            draws = rest;
            first += tokens;
            let syms = SymValues::default()
                .with(Sym::T, tokens)
                .with(Sym::S, pieces.len() as u32)
                .with(Sym::P, pages)
                .with(Sym::L, count as u32)
                .with(Sym::N, self.pages)
                .with(Sym::C, context);
            chunks.push(Chunk { step, pieces, rows, draws: drawn.to_vec(), syms });
        }
        Ok(chunks)
    }

    fn run_chunk(&mut self, chunk: &Chunk<'_>, taps: bool, output: &mut StepOutput) -> Result<(), Error> {
        self.feed(chunk)?;
        let artifact = Arc::clone(&self.artifact);
        let ReadyStep { index, parts, .. } = &self.steps[chunk.step];
        let step = &artifact.header().steps[*index];
        let mut times = self.profile.as_mut().map(|p| &mut p[*index]);
        let mut done = 0;
        if taps {
            let mut order: Vec<&Tap> = step.taps.iter().collect();
            order.sort_by_key(|tap| tap.after);
            for tap in order {
                let after = tap.after as usize;
                parts.run(&mut *self.device, done..after, &chunk.syms, times.as_deref_mut())?;
                done = after;
                let bytes = u64::from(chunk.syms.get(Sym::T)) * u64::from(tap.columns) * tap.dtype.bytes() as u64;
                let mut data = vec![0; bytes as usize];
                self.device.read(self.arena, tap.at, &mut data)?;
                append_tap(output.taps.entry(tap.name.clone()), tap, &data);
            }
        }
        parts.run(&mut *self.device, done..step.sampling as usize, &chunk.syms, times)?;
        let count = chunk.rows.len() * artifact.header().model.vocab as usize;
        let mut bytes = vec![0; count * 4];
        self.device.read(self.logits, 0, &mut bytes)?;
        output.logits.extend(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
        output.rows += chunk.rows.len();
        self.keep(chunk);
        Ok(())
    }

    /// Counts a chunk's tokens as those of their sequences.
    fn keep(&mut self, chunk: &Chunk<'_>) {
        for (seq, tokens) in &chunk.pieces {
            if let Some(sequence) = self.sequences.get_mut(seq) {
                sequence.tokens += tokens.len() as u32;
            }
        }
    }

    /// Takes pages for a chunk's tokens and uploads its inputs, in one copy.
    fn feed(&mut self, chunk: &Chunk<'_>) -> Result<(), Error> {
        let columns = chunk.syms.get(Sym::P) as usize;
        let mut feed = Feed { logit_rows: chunk.rows.clone(), draws: chunk.draws.clone(), ..Feed::default() };
        for (row, (seq, new)) in chunk.pieces.iter().enumerate() {
            let sequence = self.sequences.get_mut(seq).ok_or(RequestError::Sequence)?;
            let end = sequence.tokens + new.len() as u32;
            while sequence.pages.len() < end.div_ceil(PAGE_TOKENS) as usize {
                let none = RequestError::Pages { wanted: 1, free: 0 };
                sequence.pages.push(self.free.pop().ok_or(none)?);
            }
            feed.tokens.extend_from_slice(new);
            feed.seqs.extend(new.iter().map(|_| row as u32));
            for position in sequence.tokens..end {
                feed.positions.push(position);
                feed.slots
                    .push(sequence.pages[(position / PAGE_TOKENS) as usize] * PAGE_TOKENS + position % PAGE_TOKENS);
            }
            feed.page_table.extend(sequence.pages.iter().take(columns));
            feed.page_table.resize((row + 1) * columns, u32::MAX); // −1
        }
        self.device.upload(self.inputs, 0, &self.steps[chunk.step].layout.pack(&feed))?;
        Ok(())
    }

    /// Whether the cache has room for one more token of a sequence.
    fn can_append(&self, seq: SeqId) -> bool {
        let Some(s) = self.sequences.get(&seq) else { return false };
        !self.free.is_empty() || (s.tokens as usize) < s.pages.len() * PAGE_TOKENS as usize
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} sequences, {} of {} pages free, on {}",
            self.sequences.len(),
            self.free.len(),
            self.pages,
            self.device()
        )
    }
}

/// What a step may be run with in a session; none if it does not admit the session's cache.
fn limits(step: &Step, pages: u32, context: u32) -> Option<SymValues> {
    let max = |sym| step.max.get(sym);
    if max(Sym::N) < pages {
        return None;
    }
    let tokens = max(Sym::T).min(pages * PAGE_TOKENS);
    Some(
        SymValues::default()
            .with(Sym::T, tokens)
            .with(Sym::S, max(Sym::S).min(tokens))
            .with(Sym::P, max(Sym::P).min(pages))
            .with(Sym::L, max(Sym::L).min(tokens))
            .with(Sym::N, pages)
            .with(Sym::C, max(Sym::C).min(context)),
    )
}

/// How many of the next tokens a step admits. `left`: sequence, its length so far, new tokens, the next one last; `first`:
/// number of the next token; `wanted`: rows wanted from there on.
fn admitted(limits: &SymValues, left: &[(SeqId, u32, &[u32])], first: u32, wanted: &[u32]) -> u32 {
    let most_rows = limits.get(Sym::L) as usize;
    // The token after the last row that still fits may come too, up to the first row that does not.
    let by_rows = wanted.get(most_rows).map_or(u32::MAX, |row| row - first);
    let context = limits.get(Sym::C).min(limits.get(Sym::P).saturating_mul(PAGE_TOKENS));
    let most = limits.get(Sym::T).min(by_rows);
    let mut tokens = 0;
    for (_, length, new) in left.iter().rev().take(limits.get(Sym::S) as usize) {
        let fits = (new.len() as u32).min(context.saturating_sub(*length)).min(most - tokens);
        tokens += fits;
        if (fits as usize) < new.len() {
            break;
        }
    }
    tokens
}

/// The numbers of the wanted tokens, in ascending order.
fn wanted_rows(inputs: &[SequenceInput<'_>], logits: LogitsWanted<'_>) -> Result<Vec<u32>, RequestError> {
    let tokens: usize = inputs.iter().map(|i| i.tokens.len()).sum();
    if inputs.iter().any(|i| i.tokens.is_empty()) || tokens == 0 {
        return Err(RequestError::Empty);
    }
    if tokens > i32::MAX as usize {
        let remedy = "feed it in pieces".into();
        return Err(RequestError::Context { wanted: tokens as u64, limit: i32::MAX as u32, remedy });
    }
    match logits {
        LogitsWanted::All => Ok((0..tokens as u32).collect()),
        LogitsWanted::Last => {
            let ends = inputs.iter().scan(0, |end, i| {
                *end += i.tokens.len() as u32;
                Some(*end - 1)
            });
            Ok(ends.collect())
        }
        LogitsWanted::Rows(rows) => {
            let unsorted = rows.windows(2).find(|w| w[0] >= w[1]).map(|w| w[1]);
            match unsorted.or_else(|| rows.last().copied().filter(|&row| row as usize >= tokens)) {
                Some(row) => Err(RequestError::Row { row, tokens }),
                None => Ok(rows.to_vec()),
            }
        }
    }
}

fn append_tap(entry: std::collections::btree_map::Entry<'_, String, TapOutput>, tap: &Tap, bytes: &[u8]) {
    let integers = tap.dtype == DType::I32;
    let output = entry.or_insert_with(|| TapOutput {
        columns: tap.columns as usize,
        data: if integers { TapData::I32(Vec::new()) } else { TapData::F32(Vec::new()) },
    });
    let words = bytes.chunks_exact(tap.dtype.bytes());
    match (&mut output.data, tap.dtype) {
        (TapData::I32(data), _) => data.extend(words.map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        (TapData::F32(data), DType::F32) => data.extend(words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        (TapData::F32(data), DType::Bf16) => {
            data.extend(words.map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()))
        }
        (TapData::F32(data), DType::F16) => data.extend(words.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32())),
        (TapData::F32(data), _) => data.extend(words.map(|b| dsc_ir::dtype::e4m3_to_f32(b[0]))),
    }
}
