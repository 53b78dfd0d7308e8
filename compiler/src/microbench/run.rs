//! Memory for some copies of a kernel's operands, and its times over them.
//!
//! A kernel that is run on the same operands again finds them in a cache, where a model's step would not. So there are copies of
//! everything, together larger than any cache, and each run takes the next.

use super::data::{self, Fill};
use dsc_ir::artifact::{Arg, Header, Launch};
use dsc_ir::graph::StepInput;
use dsc_ir::tile::ViewType;
use dsc_ir::work::Cost;
use dsc_ir::{Sym, SymValues};
use dsc_runtime::device::{BoundLaunch, Buffer, Code, LaunchTime, LaunchTimes};
use dsc_runtime::{Device, DeviceError};
use std::time::{Duration, Instant};

/// Copies at most, and bytes of all of them.
const MOST_COPIES: u64 = 256;
const MOST_BYTES: u64 = 4 << 30;
/// Times taken, least and most, and rounds over all copies that make one.
const TIMES: (usize, usize) = (5, 1000);
const ROUNDS: u32 = 2;
/// Rounds in which each launch is timed by itself.
const SINGLE_ROUNDS: u32 = 3;
/// Bytes uploaded at once, about.
const UPLOAD: usize = 1 << 22;

/// Times of a kernel.
pub struct Timing {
    /// Microseconds of one run of the kernel's launches, by round over all copies.
    pub us: Vec<f64>,
    /// Copies of the operands.
    pub copies: usize,
    /// Bytes of one copy.
    pub copy_bytes: u64,
    /// Work of one run.
    pub cost: Cost,
    /// The launches of a run.
    pub launches: Vec<TimedLaunch>,
}

/// One launch of the kernel, timed by itself.
pub struct TimedLaunch {
    /// The graph node.
    pub node: String,
    /// The kernel.
    pub kernel: String,
    /// Work of one run.
    pub cost: Cost,
    /// Runs.
    pub runs: u64,
    /// Mean microseconds of a run.
    pub us: f64,
}

/// Runs the first step's kernels, but those of nodes called `setup..`, on a fresh device for about `patience`, on so many copies of their
/// operands that they move `rotate` bytes before they come back to the first (fewer if they took too much memory). The symbols are the
/// most that the step takes.
///
/// # Errors
/// What the device refuses.
pub fn time(
    header: &Header,
    code: Code,
    device: &mut dyn Device,
    patience: Duration,
    rotate: u64,
) -> Result<Timing, DeviceError> {
    device.load_code(header, code)?;
    let Some(step) = header.steps.first() else { return Err(no_step()) };
    let syms = &step.max;
    let timed: Vec<&Launch> = step.launches.iter().filter(|l| is_timed(l)).collect();
    let mut cost = Cost::default();
    timed.iter().for_each(|l| cost += &header.kernels[l.kernel as usize].work.eval(syms));
    let copy_bytes = bytes_of_copy(header, syms);
    let wanted = (rotate as f64 / cost.bytes.max(1.0)).ceil() as u64;
    let copies = wanted.min(MOST_BYTES / copy_bytes.max(1)).clamp(1, MOST_COPIES) as usize;

    let mut all = Vec::new();
    for _ in 0..copies {
        let memory = Memory::new(header, syms, device)?;
        let bind = |l: &Launch| memory.bind(l);
        let once = device.bind(&step.launches.iter().map(bind).collect::<Vec<_>>(), syms)?;
        device.run(once, 0..step.launches.len(), syms, None)?;
        all.extend(timed.iter().map(|l| memory.bind(l)));
    }
    let bound = device.bind(&all, syms)?;
    let mut times = LaunchTimes::default();
    for _ in 0..SINGLE_ROUNDS {
        device.run(bound, 0..all.len(), syms, Some(&mut times))?;
    }
    let (start, mut us) = (Instant::now(), Vec::new());
    while us.len() < TIMES.0 || (start.elapsed() < patience && us.len() < TIMES.1) {
        let round = device.time(bound, 0..all.len(), syms, ROUNDS)?;
        us.push(round.as_secs_f64() * 1e6 / copies as f64);
    }
    let launches = timed.iter().enumerate().map(|(i, launch)| {
        let of_copies = times.launches.iter().skip(i).step_by(timed.len());
        timed_launch(header, launch, syms, of_copies)
    });
    let launches = launches.collect();
    Ok(Timing { us, copies, copy_bytes, cost, launches })
}

fn timed_launch<'a>(
    header: &Header,
    launch: &Launch,
    syms: &SymValues,
    times: impl Iterator<Item = &'a LaunchTime>,
) -> TimedLaunch {
    let kernel = &header.kernels[launch.kernel as usize];
    let (runs, total) = times.fold((0, Duration::ZERO), |(runs, total), t| (runs + t.runs, total + t.total));
    TimedLaunch {
        node: launch.node.clone(),
        kernel: kernel.name.clone(),
        cost: kernel.work.eval(syms),
        runs,
        us: total.as_secs_f64() * 1e6 / runs.max(1) as f64,
    }
}

/// What the timed launches of the first step write, once run on a fresh device: each parameter's view and the bytes from where it is
/// bound.
///
/// # Errors
/// What the device refuses.
pub fn results(header: &Header, code: Code, device: &mut dyn Device) -> Result<Vec<(ViewType, Vec<u8>)>, DeviceError> {
    device.load_code(header, code)?;
    let Some(step) = header.steps.first() else { return Err(no_step()) };
    let memory = Memory::new(header, &step.max, device)?;
    // What kernels leave out is the same in all.
    let zeros = vec![0; UPLOAD];
    for at in (0..step.arena_bytes).step_by(UPLOAD) {
        let n = (step.arena_bytes - at).min(UPLOAD as u64) as usize;
        device.upload(memory.arena, at, &zeros[..n])?;
    }
    let launches: Vec<BoundLaunch> = step.launches.iter().map(|l| memory.bind(l)).collect();
    let bound = device.bind(&launches, &step.max)?;
    device.run(bound, 0..launches.len(), &step.max, None)?;
    let mut all = Vec::new();
    for (launch, planned) in launches.iter().zip(&step.launches).filter(|(_, planned)| is_timed(planned)) {
        let params = &header.kernels[planned.kernel as usize].params;
        for (param, &(buffer, at)) in params.iter().zip(&launch.args).filter(|(param, _)| param.write) {
            let end = param.span(&step.max).ok().flatten().map_or(0, |(_, end)| end);
            let mut written = vec![0; usize::try_from(end).unwrap_or(0)];
            device.read(buffer, at, &mut written)?;
            all.push((param.view.clone(), written));
        }
    }
    Ok(all)
}

fn no_step() -> DeviceError {
    DeviceError::Misuse("the artifact has no step to time".into())
}

/// Whether a launch is of the kernel, not of what feeds it.
fn is_timed(launch: &Launch) -> bool {
    !launch.node.starts_with("setup")
}

fn bytes_of_copy(header: &Header, syms: &SymValues) -> u64 {
    let weights: u64 = header.weights.iter().filter_map(|w| w.bytes(syms.get(Sym::C))).sum();
    let states: u64 = header.states.iter().map(|s| state_bytes(s.format.page_bytes(), syms)).sum();
    weights + states + header.steps[0].arena_bytes
}

fn state_bytes(page_bytes: u32, syms: &SymValues) -> u64 {
    u64::from(page_bytes) * u64::from(syms.get(Sym::N))
}

/// One copy of everything that launches are bound to.
struct Memory {
    arena: Buffer,
    logits: Buffer,
    inputs: Vec<Buffer>,
    weights: Vec<Buffer>,
    states: Vec<Buffer>,
}

impl Memory {
    fn new(header: &Header, syms: &SymValues, device: &mut dyn Device) -> Result<Memory, DeviceError> {
        let mut inputs = Vec::new();
        for input in StepInput::ALL {
            let bytes = data::input(input, syms, header.model.vocab);
            let buffer = device.alloc(bytes.len() as u64, "step inputs")?;
            device.upload(buffer, 0, &bytes)?;
            inputs.push(buffer);
        }
        let mut weights = Vec::new();
        for weight in &header.weights {
            let bytes = weight.bytes(syms.get(Sym::C)).unwrap_or(u64::MAX);
            weights.push(filled(device, bytes, "weights", || data::weight(weight, bytes))?);
        }
        let mut states = Vec::new();
        for state in &header.states {
            let bytes = state_bytes(state.format.page_bytes(), syms);
            states.push(filled(device, bytes, "caches", || data::state(state.format, bytes))?);
        }
        Ok(Memory {
            arena: device.alloc(header.steps[0].arena_bytes, "intermediate results")?,
            logits: device.alloc(u64::from(syms.get(Sym::L)) * u64::from(header.model.vocab) * 4, "logits")?,
            inputs,
            weights,
            states,
        })
    }

    fn bind(&self, launch: &Launch) -> BoundLaunch {
        let place = |arg: &Arg| match *arg {
            Arg::Arena(at) => (self.arena, at),
            Arg::Weight(i, at) => (self.weights[i as usize], at),
            Arg::State(i) => (self.states[i as usize], 0),
            Arg::Input(input) => (self.inputs[input as usize], 0),
            Arg::Logits | Arg::Tokens | Arg::Caller(_) | Arg::Workspace(_) => (self.logits, 0),
        };
        let args = launch.args.iter().map(place).collect();
        BoundLaunch { kernel: launch.kernel, node: launch.node.clone(), args }
    }
}

fn filled(
    device: &mut dyn Device,
    bytes: u64,
    what: &'static str,
    fills: impl FnOnce() -> Vec<Fill>,
) -> Result<Buffer, DeviceError> {
    let buffer = device.alloc(bytes, what)?;
    for Fill { at, end, period } in fills() {
        if period.is_empty() {
            continue;
        }
        let chunk = period.repeat(UPLOAD.div_ceil(period.len()));
        let mut at = at;
        while at < end {
            let n = (chunk.len() as u64).min(end - at);
            device.upload(buffer, at, &chunk[..n as usize])?;
            at += n;
        }
    }
    Ok(buffer)
}
