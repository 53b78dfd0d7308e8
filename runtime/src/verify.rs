//! Compares a model with expected outputs that another implementation computed.
//!
//! Two layouts of `golden.safetensors` are known: `input_ids`, `logits`, `hidden.i`, `topk.i`, `greedy_ids`; and `prompt_ids`,
//! `logits`, `topk.i`, `greedy.long.ids` with further `greedy.i.prompt_ids` and `greedy.i.ids`.
//!
//! In `exact` numerics selections must be the expected ones, except where scores tie; positions that follow a tie (`ties`) are left
//! out of what is compared after it, and all others must agree to rounding. In `deployed` numerics rounding moves scores, and
//! selections with them. A trained model hardly cares; one of random weights has no reason to give others at all similar outputs. So
//! there, once a layer's selections agree too little, what comes after it is reported and not judged.

mod kernels;
pub mod launches;
mod ties;

pub use kernels::{KernelReport, tolerance, verify_kernels};

use crate::checkpoint::{Checkpoint, StorageDtype};
use crate::error::Error;
use crate::sample::Sampler;
use crate::session::{LogitsWanted, SequenceInput, Session, StepOutput, TapData, TapOutput};
use dsc_ir::artifact::Numerics;
use std::collections::BTreeSet;
use std::path::Path;
use ties::{Excuse, Scores, Selection, Taint, excuse};

/// How far outputs may be from the expected ones.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Tolerances {
    /// `‖out − ref‖ / ‖ref‖` of the logits over all positions.
    pub logits: f64,
    /// The same of the worst position.
    pub logits_worst: f64,
    /// The same of each `hidden.i` over all positions.
    pub hidden: f64,
    /// The same of its worst position.
    pub hidden_worst: f64,
    /// Selected positions.
    pub selections: SelectionRule,
    /// A greedy choice may differ where the logit of the expected token is this close to the largest.
    pub greedy_tie: f64,
    /// Least share of greedy choices that agree (or nearly tie).
    pub greedy: f64,
}

/// Which selections are right.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectionRule {
    /// The expected ones, and others that differ only in positions whose scores tie.
    EqualButTies,
    /// A share of the expected positions.
    Share {
        /// Least share in the first layer that selects.
        first: f64,
        /// The same of its row that keeps the least: a kernel that fails a row fails it here, where nothing else has moved yet.
        first_row: f64,
        /// Least share in later layers.
        later: f64,
        /// Under this share in one layer, nothing that its attention reaches is judged.
        trusted: f64,
        /// The same of the row that keeps the least: with few keys a row, one that moved is much of what the row sees.
        trusted_row: f64,
    },
}

impl Tolerances {
    /// What a correct artifact of these numerics keeps, when the expected outputs were made without quantised activations.
    pub fn of(numerics: Numerics) -> Tolerances {
        match numerics {
            Numerics::Exact => Tolerances {
                logits: 2e-4,
                logits_worst: 2e-4,
                hidden: 2e-4,
                hidden_worst: 2e-4,
                selections: SelectionRule::EqualButTies,
                greedy_tie: 1e-3,
                greedy: 1.0,
            },
            Numerics::Deployed => Tolerances {
                logits: 0.15,
                logits_worst: 0.5,
                hidden: 0.3,
                hidden_worst: f64::INFINITY,
                selections: SelectionRule::Share {
                    first: 0.9,
                    first_row: 0.5,
                    later: 0.8,
                    trusted: 0.95,
                    trusted_row: 0.8,
                },
                greedy_tie: 0.25,
                greedy: 0.9,
            },
        }
    }
}

/// Error of one tensor: relative, in the 2-norm.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TensorError {
    /// Its name.
    pub name: String,
    /// Over all positions that are compared.
    pub relative: f64,
    /// Of the worst position.
    pub worst: f64,
    /// That position.
    pub worst_position: usize,
    /// Elements that are NaN here and not there, or there and not here.
    pub nan_mismatches: usize,
    /// Positions left out because they follow a tie.
    pub left_out: usize,
    /// Whether it must be within the tolerances; otherwise selections differ too much before it.
    pub judged: bool,
}

/// Agreement of the positions that one layer selects.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TopkOverlap {
    /// The layer.
    pub layer: usize,
    /// Share of the expected positions that are selected, over all rows that are compared. Ties at the edge cost a little.
    pub overlap: f64,
    /// The least share of a row.
    pub worst: f64,
    /// That row.
    pub worst_row: usize,
    /// Rows left out because they follow a tie.
    pub left_out: usize,
    /// Compared rows that select otherwise where scores tie.
    pub ties: usize,
    /// Compared rows that select otherwise because positions which follow a tie score otherwise.
    pub after_ties: usize,
    /// Compared rows that see more positions than are selected.
    pub choices: usize,
    /// Compared rows that select otherwise for no good reason, and why it is none. Only where ties are looked for.
    pub unexplained: Vec<(usize, String)>,
    /// Whether it must be within the tolerances; otherwise selections differ too much before it.
    pub judged: bool,
}

/// Agreement of greedy choices, each after the expected text before it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct GreedyAgreement {
    /// Name of the expected tokens.
    pub name: String,
    /// Tokens compared.
    pub tokens: usize,
    /// Choices that agree.
    pub equal: usize,
    /// Choices that differ within the tolerance for ties.
    pub near_ties: usize,
    /// First token that differs, and by how much its expected logit is below the largest.
    pub first_difference: Option<(usize, f64)>,
    /// Whether it must agree; otherwise positions of its prompt follow a tie, or selections differ too much.
    pub judged: bool,
}

/// Everything that was compared.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
    /// Positions of the prompt.
    pub positions: usize,
    /// Those that follow a tie at the edge of a selection, after the last layer.
    pub after_ties: usize,
    /// Logits, if expected ones are there.
    pub logits: Option<TensorError>,
    /// Hidden states.
    pub hidden: Vec<TensorError>,
    /// Selected positions by layer.
    pub topk: Vec<TopkOverlap>,
    /// Greedy continuations.
    pub greedy: Vec<GreedyAgreement>,
    /// Expected tensors that the artifact has no tap for.
    pub not_compared: Vec<String>,
    /// What was allowed.
    pub tolerances: Tolerances,
    /// What is beyond the tolerances, one sentence each.
    pub failures: Vec<String>,
}

impl Report {
    /// Whether everything is within the tolerances.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }
}

impl Session {
    /// Compares the model with a file of expected outputs.
    ///
    /// # Errors
    /// [`Error::Golden`] for a file without prompt or expectation; as [`Session::step`].
    pub fn verify(&mut self, golden: &Path, tolerances: &Tolerances) -> Result<Report, Error> {
        let golden = Golden(Checkpoint::open_file(golden)?);
        let prompt = match golden.tokens("input_ids")? {
            Some(prompt) => prompt,
            None => {
                golden.tokens("prompt_ids")?.ok_or_else(|| Error::Golden("it has no input_ids or prompt_ids".into()))?
            }
        };
        let facts = &self.header().model;
        let (layers, k) = (facts.layers as usize, facts.index_topk.min(facts.max_context) as usize);
        let mut comparison = Comparison::new(layers, k, prompt.len(), tolerances);
        self.in_sequence(|session, seq| {
            let output = session.step(&[SequenceInput { seq, tokens: &prompt }], LogitsWanted::All, true)?;
            let session = std::cell::RefCell::new(session);
            comparison.tensors(&golden, &output, &|layer| session.borrow_mut().index_keys(seq, layer))
        })?;
        for (name, text) in golden.continuations(&prompt)? {
            let expected = golden.tokens(&name)?.unwrap_or_default();
            let mut agreement = self.greedy_agreement(name, &text, &expected, tolerances)?;
            agreement.judged = comparison.continuation_judged(&prompt, &text);
            comparison.report.greedy.push(agreement);
        }
        let mut report = comparison.report;
        if report.logits.is_none() && report.greedy.is_empty() && report.hidden.is_empty() && report.topk.is_empty() {
            return Err(Error::Golden("it has no logits and nothing else to compare".into()));
        }
        report.judge(k);
        Ok(report)
    }

    fn in_sequence<R>(&mut self, run: impl FnOnce(&mut Session, crate::session::SeqId) -> R) -> R {
        let seq = self.add_sequence();
        let result = run(self, seq);
        self.remove_sequence(seq);
        result
    }

    /// Feeds the expected tokens one by one, so that one difference does not hide what comes after it.
    fn greedy_agreement(
        &mut self,
        name: String,
        prompt: &[u32],
        expected: &[u32],
        tolerances: &Tolerances,
    ) -> Result<GreedyAgreement, Error> {
        let mut result = GreedyAgreement {
            name,
            tokens: expected.len(),
            equal: 0,
            near_ties: 0,
            first_difference: None,
            judged: true,
        };
        self.in_sequence(|session, seq| {
            let mut feed = prompt;
            for (i, token) in expected.iter().enumerate() {
                let output = session.step(&[SequenceInput { seq, tokens: feed }], LogitsWanted::Last, false)?;
                let logits = output.row(0);
                let choice = Sampler::Greedy.pick(logits, 0)?;
                let margin = match logits.get(*token as usize) {
                    Some(&logit) => f64::from(logits[choice as usize]) - f64::from(logit),
                    None => {
                        return Err(Error::Golden(format!("{}: token {token} is outside the vocabulary", result.name)));
                    }
                };
                if choice == *token {
                    result.equal += 1;
                } else {
                    result.near_ties += usize::from(margin <= tolerances.greedy_tie);
                    result.first_difference.get_or_insert((i, margin));
                }
                feed = std::slice::from_ref(token);
            }
            Ok(result)
        })
    }
}

impl Report {
    /// Of rows that choose, ties may explain this share in a layer: a model whose scores are all equal would excuse everything.
    const MOST_TIES: f64 = 0.25;

    fn judge(&mut self, k: usize) {
        let t = self.tolerances;
        let mut failures = Vec::new();
        // Written so that NaN fails.
        let mut least = |ok: bool, what: String| {
            if !ok {
                failures.push(what);
            }
        };
        let logits = self.logits.iter().map(|e| (e, t.logits, t.logits_worst));
        let hidden = self.hidden.iter().map(|e| (e, t.hidden, t.hidden_worst));
        for (e, all, worst) in logits.chain(hidden).filter(|(e, ..)| e.judged) {
            least(e.nan_mismatches == 0, format!("{}: {} NaNs differ", e.name, e.nan_mismatches));
            least(e.relative <= all, format!("{}: relative error {:.3e} is above {all:.1e}", e.name, e.relative));
            least(
                e.worst <= worst,
                format!(
                    "{}: relative error {:.3e} at position {} is above {worst:.1e}",
                    e.name, e.worst, e.worst_position
                ),
            );
        }
        for (i, s) in self.topk.iter().enumerate().filter(|(_, s)| s.judged) {
            match t.selections {
                SelectionRule::EqualButTies => {
                    for (row, why) in s.unexplained.iter().take(3) {
                        least(false, format!("topk.{}: row {row} {why}", s.layer));
                    }
                    let more = s.unexplained.len().saturating_sub(3);
                    least(more == 0, format!("topk.{}: {more} more rows differ, not by ties", s.layer));
                    least(
                        s.ties as f64 <= Self::MOST_TIES * s.choices as f64,
                        format!("topk.{}: {} of {} rows would differ by ties, too many", s.layer, s.ties, s.choices),
                    );
                }
                SelectionRule::Share { first, first_row, later, .. } => {
                    let share = if i == 0 { first } else { later };
                    least(
                        i > 0 || s.worst >= first_row,
                        format!(
                            "topk.{}: {:.4} of the positions of row {} agree, under {first_row}",
                            s.layer, s.worst, s.worst_row
                        ),
                    );
                    least(
                        s.overlap >= share,
                        format!("topk.{}: {:.4} of the positions agree, under {share}", s.layer, s.overlap),
                    );
                }
            }
        }
        let left = self.positions - self.after_ties;
        least(
            left >= k.min(self.positions),
            format!("only {left} of {} positions follow no tie: too few to compare", self.positions),
        );
        for g in self.greedy.iter().filter(|g| g.judged) {
            let share = (g.equal + g.near_ties) as f64 / g.tokens.max(1) as f64;
            least(
                g.tokens == 0 || share >= t.greedy,
                format!("{}: {} of {} greedy tokens agree", g.name, g.equal, g.tokens),
            );
        }
        self.failures = failures;
    }
}

/// Reads the index keys of a layer, if they are plain.
type ReadKeys<'a> = dyn Fn(usize) -> Result<Option<Vec<f32>>, Error> + 'a;

/// A comparison of the prompt, layer by layer.
struct Comparison {
    layers: usize,
    /// Positions that a row selects.
    k: usize,
    rows: usize,
    taint: Taint,
    /// Selections of a layer agree too little: what comes after it is not judged.
    distrust: bool,
    report: Report,
}

impl Comparison {
    fn new(layers: usize, k: usize, rows: usize, tolerances: &Tolerances) -> Comparison {
        let report = Report {
            positions: rows,
            after_ties: 0,
            logits: None,
            hidden: Vec::new(),
            topk: Vec::new(),
            greedy: Vec::new(),
            not_compared: Vec::new(),
            tolerances: *tolerances,
            failures: Vec::new(),
        };
        Comparison { layers, k, rows, taint: Taint::new(rows), distrust: false, report }
    }

    fn tensors(&mut self, golden: &Golden, output: &StepOutput, keys: &ReadKeys<'_>) -> Result<(), Error> {
        let mut selection = None;
        for layer in 0..=self.layers {
            self.hidden(golden, output, layer)?;
            if layer == self.layers {
                break;
            }
            let mut excused = BTreeSet::new();
            let name = format!("topk.{layer}");
            let found = output.integers(&name);
            if let Some(found) = found {
                let expected = golden.integers(&name)?;
                let compared = expected.is_some();
                if expected.as_ref().is_some_and(|e| !e.len().is_multiple_of(self.rows)) {
                    return Err(Error::Golden(format!("{name} has no row a token of the prompt")));
                }
                let now = Selection::new(found, expected.as_deref().unwrap_or(found), self.rows);
                if compared {
                    let rows = self.rows;
                    excused = self.selection(layer, &now, &|| index_scores(output, layer, rows, keys))?;
                }
                selection = Some(now);
            } else if golden.0.contains(&name) {
                self.report.not_compared.push(name);
            }
            self.taint.pass(selection.as_ref(), &excused);
        }
        self.report.after_ties = self.taint.count();
        let beyond = |name: &str| {
            let number = |prefix| name.strip_prefix(prefix).and_then(|n| n.parse::<usize>().ok());
            number("hidden.").is_some_and(|i| i > self.layers) || number("topk.").is_some_and(|i| i >= self.layers)
        };
        self.report.not_compared.extend(golden.0.names().filter(|n| beyond(n)).map(str::to_string));
        if let Some(expected) = golden.floats("logits")? {
            self.report.logits = Some(self.tensor("logits", &output.logits, &expected)?);
        }
        Ok(())
    }

    fn hidden(&mut self, golden: &Golden, output: &StepOutput, layer: usize) -> Result<(), Error> {
        let name = format!("hidden.{layer}");
        match (golden.floats(&name)?, output.floats(&name)) {
            (Some(expected), Some(found)) => {
                let mut error = self.tensor(&name, found, &expected)?;
                // One layer of rounding and of moved selections is no excuse.
                error.judged |= layer <= 1;
                self.report.hidden.push(error);
            }
            (Some(_), None) => self.report.not_compared.push(name),
            (None, _) => {}
        }
        Ok(())
    }

    fn tensor(&self, name: &str, found: &[f32], expected: &[f32]) -> Result<TensorError, Error> {
        Ok(TensorError { judged: !self.distrust, ..tensor_error(name, found, expected, &self.taint.positions)? })
    }

    /// Reports a layer's selections; the rows that may differ from what is expected.
    fn selection<'a>(
        &mut self,
        layer: usize,
        selection: &Selection,
        scores: &dyn Fn() -> Result<Option<IndexScores<'a>>, Error>,
    ) -> Result<BTreeSet<usize>, Error> {
        let mut result = topk_overlap(layer, selection, &self.taint.positions, self.k);
        result.judged = !self.distrust;
        let mut excused = BTreeSet::new();
        match self.report.tolerances.selections {
            SelectionRule::Share { trusted, trusted_row, .. } => {
                self.distrust |= result.overlap < trusted || result.worst < trusted_row;
            }
            SelectionRule::EqualButTies => {
                let compared = |t: &usize| !self.taint.positions[*t];
                let differ: Vec<usize> = (0..self.rows).filter(compared).filter(|&t| selection.differs(t)).collect();
                let scores = if differ.is_empty() { None } else { scores()? };
                for row in differ {
                    let (found, expected) = (&selection.found[row], &selection.expected[row]);
                    let excuse = match &scores {
                        Some(s) => excuse(self.k, found, expected, &s.of(self.rows).row(row), &self.taint.positions),
                        None => Err("selects otherwise, and the artifact does not show index scores".into()),
                    };
                    match excuse {
                        Ok(Excuse::Tie) => result.ties += 1,
                        Ok(Excuse::Taint) => result.after_ties += 1,
                        Err(why) => {
                            result.unexplained.push((row, why));
                            continue;
                        }
                    }
                    excused.insert(row);
                }
            }
        }
        self.report.topk.push(result);
        Ok(excused)
    }

    /// Whether the continuation of a text must agree: not if a position that it shares with the prompt follows a tie.
    fn continuation_judged(&self, prompt: &[u32], text: &[u32]) -> bool {
        let shared = prompt.iter().zip(text).take_while(|(a, b)| a == b).count();
        !self.distrust && !self.taint.positions[..shared].contains(&true)
    }
}

/// What the index scores of a layer are made of, in memory of its own where they are not taps.
struct IndexScores<'a> {
    queries: &'a [f32],
    weights: &'a [f32],
    keys: Vec<f32>,
}

impl IndexScores<'_> {
    fn of(&self, rows: usize) -> Scores<'_> {
        Scores { queries: self.queries, weights: self.weights, keys: &self.keys, rows }
    }
}

fn index_scores<'a>(
    output: &'a StepOutput,
    layer: usize,
    rows: usize,
    keys: &ReadKeys<'_>,
) -> Result<Option<IndexScores<'a>>, Error> {
    let tap = |what: &str| output.floats(&format!("index_{what}.{layer}"));
    let (Some(queries), Some(weights), Some(keys)) = (tap("q"), tap("w"), keys(layer)?) else { return Ok(None) };
    let scores = IndexScores { queries, weights, keys };
    Ok(scores.of(rows).fit().then_some(scores))
}

impl StepOutput {
    fn floats(&self, tap: &str) -> Option<&[f32]> {
        match self.taps.get(tap)? {
            TapOutput { data: TapData::F32(data), .. } => Some(data),
            _ => None,
        }
    }

    fn integers(&self, tap: &str) -> Option<&[i32]> {
        match self.taps.get(tap)? {
            TapOutput { data: TapData::I32(data), .. } => Some(data),
            _ => None,
        }
    }
}

/// Compares the rows that are not `left_out`.
fn tensor_error(name: &str, found: &[f32], expected: &[f32], left_out: &[bool]) -> Result<TensorError, Error> {
    let rows = left_out.len();
    if found.len() != expected.len() || rows == 0 || !found.len().is_multiple_of(rows) {
        let what = format!("{name}: {} elements are expected, the model gives {}", expected.len(), found.len());
        return Err(Error::Golden(what));
    }
    let columns = found.len() / rows;
    let mut error = TensorError {
        name: name.into(),
        relative: 0.0,
        worst: 0.0,
        worst_position: 0,
        nan_mismatches: 0,
        left_out: rows,
        judged: true,
    };
    let (mut differences, mut norms) = (0.0, 0.0);
    for row in (0..rows).filter(|&row| !left_out[row]) {
        error.left_out -= 1;
        let at = row * columns..(row + 1) * columns;
        let (mut difference, mut norm) = (0.0, 0.0);
        for (&x, &y) in found[at.clone()].iter().zip(&expected[at]) {
            if x.is_nan() || y.is_nan() {
                error.nan_mismatches += usize::from(x.is_nan() != y.is_nan());
                continue;
            }
            difference += (f64::from(x) - f64::from(y)).powi(2);
            norm += f64::from(y).powi(2);
        }
        let relative = difference.sqrt() / norm.sqrt().max(1e-30);
        if relative > error.worst {
            (error.worst, error.worst_position) = (relative, row);
        }
        differences += difference;
        norms += norm;
    }
    error.relative = differences.sqrt() / f64::max(norms.sqrt(), 1e-30);
    Ok(error)
}

/// Compares the rows that are not `left_out`; `k` is how many positions a row selects.
fn topk_overlap(layer: usize, selection: &Selection, left_out: &[bool], k: usize) -> TopkOverlap {
    let mut result = TopkOverlap {
        layer,
        overlap: 1.0,
        worst: 1.0,
        worst_row: 0,
        left_out: left_out.len(),
        ties: 0,
        after_ties: 0,
        choices: 0,
        unexplained: Vec::new(),
        judged: true,
    };
    let (mut common, mut total) = (0, 0);
    for row in (0..left_out.len()).filter(|&row| !left_out[row]) {
        result.left_out -= 1;
        result.choices += usize::from(row >= k);
        let (a, b) = (&selection.found[row], &selection.expected[row]);
        let both = a.intersection(b).count();
        // Selecting too many must not count as agreement.
        let most = a.len().max(b.len());
        let share = if most == 0 { 1.0 } else { both as f64 / most as f64 };
        if share < result.worst {
            (result.worst, result.worst_row) = (share, row);
        }
        common += both;
        total += most;
    }
    if total > 0 {
        result.overlap = common as f64 / total as f64;
    }
    result
}

/// A file of expected outputs.
struct Golden(Checkpoint);

impl Golden {
    fn words<T>(
        &self,
        name: &str,
        dtype: StorageDtype,
        decode: impl Fn([u8; 4]) -> T,
    ) -> Result<Option<Vec<T>>, Error> {
        if !self.0.contains(name) {
            return Ok(None);
        }
        let view = self.0.tensor(name)?;
        if view.dtype != dtype {
            return Err(Error::Golden(format!("{name} is {:?}, expected {dtype:?}", view.dtype)));
        }
        Ok(Some(view.data.chunks_exact(4).map(|b| decode([b[0], b[1], b[2], b[3]])).collect()))
    }

    fn floats(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        self.words(name, StorageDtype::F32, f32::from_le_bytes)
    }

    fn integers(&self, name: &str) -> Result<Option<Vec<i32>>, Error> {
        self.words(name, StorageDtype::I32, i32::from_le_bytes)
    }

    fn tokens(&self, name: &str) -> Result<Option<Vec<u32>>, Error> {
        self.words(name, StorageDtype::I32, u32::from_le_bytes)
    }

    /// Names of expected greedy continuations, with what they continue.
    fn continuations(&self, prompt: &[u32]) -> Result<Vec<(String, Vec<u32>)>, Error> {
        let mut found = Vec::new();
        for name in self.0.names() {
            if name == "greedy_ids" || name == "greedy.long.ids" {
                found.push((name.to_string(), prompt.to_vec()));
            } else if let Some(stem) = name.strip_prefix("greedy.").and_then(|n| n.strip_suffix(".ids"))
                && let Some(prompt) = self.tokens(&format!("greedy.{stem}.prompt_ids"))?
            {
                found.push((name.to_string(), prompt));
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_and_name_the_worst_row() {
        let e = tensor_error("x", &[1.0, 0.0, 3.0, 4.4], &[1.0, 0.0, 3.0, 4.0], &[false; 2]).unwrap();
        assert!((e.worst - 0.08).abs() < 1e-6 && e.worst_position == 1, "{e:?}");
        assert!((e.relative - 0.4 / 26f64.sqrt()).abs() < 1e-6);
        let nan = tensor_error("x", &[f32::NAN, 1.0], &[0.0, 1.0], &[false]).unwrap();
        assert_eq!(nan.nan_mismatches, 1);
        assert!(tensor_error("x", &[1.0], &[1.0, 2.0], &[false]).is_err());
        let rest = tensor_error("x", &[1.0, 7.0, 3.0], &[1.0, f32::NAN, 3.0], &[false, true, false]).unwrap();
        assert_eq!((rest.left_out, rest.relative, rest.nan_mismatches), (1, 0.0, 0));
    }

    #[test]
    fn selections_are_sets_without_padding() {
        let overlap = |layer, found: &[i32], expected: &[i32], left_out: [bool; 3]| {
            topk_overlap(layer, &Selection::new(found, expected, 3), &left_out, 2)
        };
        // Row 0 sees position 0 only; row 2 sees three.
        let expected = [0, 2, 1, 0, 2, 0];
        let same = overlap(3, &[0, -1, 0, 1, 0, 2], &expected, [false; 3]);
        assert_eq!((same.layer, same.overlap, same.choices), (3, 1.0, 1));
        let other = overlap(0, &[0, -1, 0, 1, 1, 2], &expected, [false; 3]);
        assert_eq!((other.overlap, other.worst, other.worst_row), (0.8, 0.5, 2));
        let rest = overlap(0, &[0, -1, 0, 1, 1, 2], &expected, [false, false, true]);
        assert_eq!((rest.overlap, rest.left_out, rest.choices), (1.0, 1, 0));
        assert!(overlap(0, &[0, 1, 2, 0, 1, 2, 0, 1, 2], &expected, [false; 3]).overlap < 1.0, "too many");
    }

    /// A comparison of two layers of one head and width 1, where position `s` has the key `keys[s]`: a row's score of it too.
    struct Toy {
        comparison: Comparison,
        keys: Vec<f32>,
    }

    impl Toy {
        fn new(keys: &[f32], numerics: Numerics) -> Toy {
            let comparison = Comparison::new(2, 2, keys.len(), &Tolerances::of(numerics));
            Toy { comparison, keys: keys.to_vec() }
        }

        fn layer(&mut self, found: &[i32], expected: &[i32]) -> Vec<usize> {
            let rows = self.keys.len();
            let selection = Selection::new(found, expected, rows);
            let (layer, ones) = (self.comparison.report.topk.len(), vec![1.0; rows]);
            let keys = self.keys.clone();
            let scores = || Ok(Some(IndexScores { queries: &ones, weights: &ones, keys: keys.clone() }));
            let excused = self.comparison.selection(layer, &selection, &scores).unwrap();
            self.comparison.taint.pass(Some(&selection), &excused);
            self.comparison.report.after_ties = self.comparison.taint.count();
            self.comparison.taint.positions.iter().enumerate().filter(|(_, t)| **t).map(|(p, _)| p).collect()
        }

        fn failures(mut self) -> Vec<String> {
            self.comparison.report.judge(2);
            self.comparison.report.failures
        }
    }

    /// Selections of eight rows, of which some differ from the first two positions.
    fn pairs(changed: &[(usize, [i32; 2])]) -> Vec<i32> {
        let row =
            |t: usize| changed.iter().find(|(row, _)| *row == t).map_or([0, if t == 0 { -1 } else { 1 }], |c| c.1);
        (0..8).flat_map(row).collect()
    }

    #[test]
    fn ties_taint_and_the_rest_is_compared() {
        let mut toy = Toy::new(&[3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], Numerics::Exact);
        assert_eq!(toy.layer(&pairs(&[]), &pairs(&[(4, [0, 2])])), [4]);
        // Row 6 selects the tainted position 4 there, which scores better there.
        assert_eq!(toy.layer(&pairs(&[]), &pairs(&[(4, [6, 7]), (6, [0, 4])])), [4, 6]);
        let [first, second] = &toy.comparison.report.topk[..] else { panic!() };
        assert_eq!((first.ties, first.choices, second.after_ties, second.left_out), (1, 6, 1, 1));
        assert!(!toy.comparison.continuation_judged(&[5; 8], &[5; 9]));
        assert!(toy.comparison.continuation_judged(&[5; 8], &[5, 5, 5, 5, 6]));
        let (found, expected) = ([0.0; 8], [0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 9.0, 0.0]);
        let error = toy.comparison.tensor("logits", &found, &expected).unwrap();
        assert_eq!((error.worst, error.left_out), (0.0, 2));
        assert_eq!(toy.failures(), [""; 0]);
    }

    #[test]
    fn a_wrong_selection_fails_and_taints_nothing() {
        let mut toy = Toy::new(&[3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], Numerics::Exact);
        assert_eq!(toy.layer(&pairs(&[(4, [0, 3])]), &pairs(&[])), [0; 0]);
        let failures = toy.failures();
        assert!(failures.len() == 1 && failures[0].starts_with("topk.0: row 4 selects position 3"), "{failures:?}");

        // The same where what is expected is tainted: it excuses position 4 and not position 5.
        let mut toy = Toy::new(&[3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], Numerics::Exact);
        toy.layer(&pairs(&[]), &pairs(&[(4, [0, 2])]));
        assert_eq!(toy.layer(&pairs(&[]), &pairs(&[(6, [4, 5])])), [4, 6], "position 4 is read there");
        let failures = toy.failures();
        assert!(failures[0].contains("row 6 is expected to select position 5 of score 1.0"), "{failures:?}");
    }

    #[test]
    fn scores_that_all_tie_excuse_little() {
        let mut toy = Toy::new(&[0.0; 8], Numerics::Exact);
        assert_eq!(toy.layer(&pairs(&[]), &pairs(&[(3, [1, 2]), (5, [2, 3])])), [3, 5]);
        assert!(toy.failures()[0].contains("2 of 6 rows would differ by ties, too many"));
    }

    #[test]
    fn deployed_selections_are_shares_and_distrust_what_follows() {
        let mut toy = Toy::new(&[3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], Numerics::Deployed);
        assert_eq!(toy.layer(&pairs(&[(4, [0, 3])]), &pairs(&[])), [0; 0]);
        assert!(!toy.comparison.continuation_judged(&[5], &[5]) && toy.comparison.distrust);
        assert!(!toy.comparison.tensor("hidden.2", &[1.0; 8], &[0.0; 8]).unwrap().judged);
        toy.layer(&pairs(&[(4, [2, 3]), (5, [2, 3]), (6, [2, 3])]), &pairs(&[]));
        assert!(!toy.comparison.report.topk[1].judged);
        assert_eq!(toy.failures(), [""; 0]);
        let mut toy = Toy::new(&[3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], Numerics::Deployed);
        toy.layer(&pairs(&[(4, [2, 3]), (5, [2, 3]), (6, [2, 3])]), &pairs(&[]));
        let row = "topk.0: 0.0000 of the positions of row 4 agree, under 0.5";
        assert_eq!(toy.failures(), [row, "topk.0: 0.6000 of the positions agree, under 0.9"]);
        // One position of one row among many: few of all, but half of what that row sees.
        let mut toy = Toy::new(&[1.0; 24], Numerics::Deployed);
        let rows = |other: &[i32]| [&[0, -1], [0, 1].repeat(22).as_slice(), other].concat();
        toy.layer(&rows(&[0, 1]), &rows(&[0, 1]));
        assert!(!toy.comparison.distrust);
        toy.layer(&rows(&[0, 2]), &rows(&[0, 1]));
        let moved = &toy.comparison.report.topk[1];
        assert!(moved.overlap > 0.95 && toy.comparison.distrust, "{moved:?}");
        // A row that is wrong altogether is no rounding.
        let mut toy = Toy::new(&[1.0; 24], Numerics::Deployed);
        toy.layer(&rows(&[2, 3]), &rows(&[0, 1]));
        assert_eq!(toy.failures(), ["topk.0: 0.0000 of the positions of row 23 agree, under 0.5"]);
    }

    #[test]
    fn a_nan_fails() {
        let mut report = Comparison::new(1, 2, 4, &Tolerances::of(Numerics::Exact)).report;
        let nan = tensor_error("logits", &[f32::NAN; 4], &[1.0; 4], &[false; 4]).unwrap();
        report.logits = Some(TensorError { relative: f64::NAN, nan_mismatches: 0, ..nan });
        report.judge(2);
        assert!(!report.passed());
        report.logits = None;
        report.judge(2);
        assert!(report.passed());
    }
}
