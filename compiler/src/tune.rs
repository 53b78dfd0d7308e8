//! The tuner: which schedule of a kernel is the fastest on a device.
//!
//! ```text
//! kernel, sizes, target ─▶ space: schedules near the target's own, compiled   ─▶ a folder: one artifact each, candidates.json
//! folder, device        ─▶ search: checked, timed, the best timed again       ─▶ a rule for `dsc compile --schedules`, or none
//! ```
//!
//! **Checked**: what a schedule writes is compared with what the target's own writes, on the operands that are timed. (That the own is
//! right is the business of `dsc check`: the interpreter would take minutes at these sizes.)
//!
//! The folder is all that passes from one half to the other, so that they may run on two machines: one with a compiler, one with
//! the device and no compiler.

#[cfg(feature = "compile")]
mod space;

#[cfg(feature = "compile")]
pub use space::compile;

use crate::microbench::{self, Timing};
use dsc_ir::DType;
use dsc_ir::schedule::Rule;
use dsc_ir::tile::ViewType;
use dsc_runtime::device::Code;
use dsc_runtime::verify::launches::compare_views;
use dsc_runtime::verify::tolerance;
use dsc_runtime::{Artifact, Device, DeviceError, Error};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The file that lists a folder's candidates.
const LIST: &str = "candidates.json";
/// Candidates that are timed again, and how often.
const FINALISTS: usize = 6;
const ROUNDS: usize = 3;
/// How long a trial times, the first and in the final rounds.
const PATIENCE: [Duration; 2] = [Duration::from_millis(60), Duration::from_millis(250)];
/// Operands take turns in this much memory: more than any last-level cache.
const ROTATE: u64 = 128 << 20;
/// Two changes are not tried together if one of them alone takes more than this share of the own time.
const SLOW: f64 = 1.2;
/// Share of the time that the first trials may take.
const FIRST: f64 = 0.7;
/// A schedule wins if it takes at most this share of the time of the target's own: less is noise.
const GAIN: f64 = 0.98;

/// A kernel at several schedules, as files of a folder.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidates {
    /// The kernel family.
    pub kernel: String,
    /// Its sizes.
    pub shape: String,
    /// The target's name.
    pub target: String,
    /// The schedules; the target's own comes first, as a rule that changes nothing.
    pub candidates: Vec<Candidate>,
    /// Schedules that the target refused, or that make the code of another.
    pub dropped: usize,
}

/// One of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// The artifact's name in the folder.
    pub file: String,
    /// What makes the schedule of the target's own.
    pub rule: Rule,
}

impl Candidates {
    /// Reads a folder's list.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(folder: &Path) -> Result<Candidates, String> {
        let path = folder.join(LIST);
        let wrong = |e: String| format!("{}: {e}; give a folder that `dsc tune --save` wrote", path.display());
        let text = std::fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
        let all: Candidates = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        if all.candidates.is_empty() {
            return Err(wrong("it lists no candidate".into()));
        }
        // A name that leads out of the folder is no name of a file in it.
        let plain = |c: &Candidate| Path::new(&c.file).file_name().is_some_and(|name| name == c.file.as_str());
        match all.candidates.iter().find(|c| !plain(c)) {
            Some(c) => Err(wrong(format!("`{}` is no file name", c.file))),
            None => Ok(all),
        }
    }
}

/// What became of a candidate.
#[derive(Clone, Debug, Serialize)]
pub struct Trial {
    /// What makes the schedule of the target's own.
    pub rule: Rule,
    /// Median microseconds of its last round; none if it was not timed.
    pub us: Option<f64>,
    /// Why it was not timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<Untimed>,
}

/// Why a candidate was not timed.
#[derive(Clone, Debug)]
pub enum Untimed {
    /// The search had to end.
    Late,
    /// It has a change that alone was slow.
    SlowPart,
    /// It writes something else than the target's own.
    Wrong(String),
}

impl std::fmt::Display for Untimed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Untimed::Late => f.write_str("the time was up"),
            Untimed::SlowPart => f.write_str("a part of it is slow"),
            Untimed::Wrong(what) => write!(f, "wrong: {what}"),
        }
    }
}

impl Serialize for Untimed {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Every candidate, the fastest first.
    pub trials: Vec<Trial>,
    /// Microseconds of the target's own schedule.
    pub own_us: f64,
    /// The faster rule, if one is faster by more than noise.
    pub winner: Option<Trial>,
    /// Whether all were timed before the time was up.
    pub complete: bool,
}

/// Opens a device for artifacts of that target.
pub type Open<'a> = dyn Fn(&str) -> Result<Box<dyn Device>, DeviceError> + 'a;

/// Checks and times the candidates of a folder until `end`; `progress` is told how many are done.
///
/// # Errors
/// If a file cannot be read, or the device refuses.
pub fn search(
    folder: &Path,
    all: &Candidates,
    open: &Open,
    end: Instant,
    progress: &dyn Fn(usize),
) -> Result<Found, Box<dyn std::error::Error>> {
    let mut trials: Vec<(PathBuf, Trial)> = all
        .candidates
        .iter()
        .map(|c| (folder.join(&c.file), Trial { rule: c.rule.clone(), us: None, why: None }))
        .collect();
    let mut complete = true;
    let mut own = None;
    let first_end = Instant::now() + end.saturating_duration_since(Instant::now()).mul_f64(FIRST);
    for i in 0..trials.len() {
        if i > 0 && Instant::now() > first_end {
            complete = false;
            trials[i].1.why = Some(Untimed::Late);
            continue;
        }
        if has_slow_part(&trials, i) {
            trials[i].1.why = Some(Untimed::SlowPart);
            continue;
        }
        let (path, trial) = &mut trials[i];
        let artifact = Artifact::open(path)?;
        let results = results(&artifact, open)?;
        match difference(&artifact, &results, own.get_or_insert_with(|| results.clone())) {
            Some(what) => trial.why = Some(Untimed::Wrong(what)),
            None => trial.us = Some(time(&artifact, open, PATIENCE[0])?),
        }
        progress(i + 1);
    }
    // The target's own stays in however slow it is: what is faster must be so in the same rounds.
    let own = trials.remove(0);
    trials.sort_by(|a, b| by_time(&a.1, &b.1));
    trials.insert(0, own);
    let finalists = trials.iter().take_while(|(_, t)| t.us.is_some()).count().min(FINALISTS + 1);
    let mut times = vec![Vec::new(); finalists];
    for round in 0..ROUNDS {
        if round > 0 && Instant::now() > end {
            break;
        }
        for (i, (path, _)) in trials[..finalists].iter().enumerate() {
            times[i].push(time(&Artifact::open(path)?, open, PATIENCE[1])?);
        }
    }
    for ((_, trial), times) in trials.iter_mut().zip(times) {
        trial.us = median(times);
    }
    let mut trials: Vec<Trial> = trials.into_iter().map(|(_, trial)| trial).collect();
    let own_us = trials[0].us.unwrap_or(f64::INFINITY);
    trials.sort_by(by_time);
    let winner = trials.first().filter(|t| t.us.is_some_and(|us| us <= own_us * GAIN)).cloned();
    Ok(Found { trials, own_us, winner, complete })
}

/// Whether a rule of several fields has one that alone was slow.
fn has_slow_part(trials: &[(PathBuf, Trial)], i: usize) -> bool {
    let limit = trials[0].1.us.unwrap_or(f64::INFINITY) * SLOW;
    let fields = &trials[i].1.rule.schedule;
    let slow = |t: &Trial| t.us.is_none_or(|us| us > limit) && t.rule.schedule.len() == 1;
    let part = |t: &Trial| t.rule.schedule.iter().all(|(key, value)| fields.get(key) == Some(value));
    fields.len() > 1 && trials[..i].iter().any(|(_, t)| slow(t) && part(t))
}

/// What the candidate's kernels write.
fn results(artifact: &Artifact, open: &Open) -> Result<Vec<(ViewType, Vec<u8>)>, Error> {
    let mut device = open(&artifact.header().target)?;
    Ok(microbench::results(artifact.header(), code(artifact)?, &mut *device)?)
}

/// Where results differ by more than the order of sums explains.
fn difference(artifact: &Artifact, got: &[(ViewType, Vec<u8>)], wanted: &[(ViewType, Vec<u8>)]) -> Option<String> {
    let header = artifact.header();
    let views = header.kernels.iter().flat_map(|k| &k.params).map(|p| &p.view);
    let fp8 = views.into_iter().any(|v| v.dtype == DType::E4m3);
    let syms = &header.steps.first()?.max;
    if got.len() != wanted.len() || got.iter().zip(wanted).any(|(g, w)| g.0.shape != w.0.shape) {
        return Some("it writes other tensors".into());
    }
    got.iter().zip(wanted).find_map(|((view, got), (_, wanted))| match compare_views(view, syms, got, wanted) {
        Ok(worst) => (worst.error > tolerance(view.dtype, fp8)).then_some(worst.what),
        Err(what) => Some(what),
    })
}

fn code(artifact: &Artifact) -> Result<Code<'_>, Error> {
    let portable = if artifact.header().section("asm").is_some() { artifact.section("asm")? } else { &[] };
    Ok(Code { native: artifact.section("code")?, portable })
}

/// Median microseconds of the candidate's kernels.
fn time(artifact: &Artifact, open: &Open, patience: Duration) -> Result<f64, Error> {
    let mut device = open(&artifact.header().target)?;
    let Timing { us, .. } = microbench::time(artifact.header(), code(artifact)?, &mut *device, patience, ROTATE)?;
    Ok(median(us).unwrap_or(f64::INFINITY))
}

fn by_time(a: &Trial, b: &Trial) -> std::cmp::Ordering {
    let us = |t: &Trial| t.us.unwrap_or(f64::INFINITY);
    us(a).total_cmp(&us(b))
}

fn median(mut times: Vec<f64>) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied()
}
