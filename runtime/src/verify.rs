//! Compares a model with expected outputs that another implementation computed.
//!
//! Two layouts of `golden.safetensors` are known: `input_ids`, `logits`, `hidden.i`, `topk.i`, `greedy_ids`; and `prompt_ids`,
//! `logits`, `topk.i`, `greedy.long.ids` with further `greedy.i.prompt_ids` and `greedy.i.ids`.

use crate::checkpoint::{Checkpoint, StorageDtype};
use crate::error::Error;
use crate::sample::Sampler;
use crate::session::{LogitsWanted, SequenceInput, Session, StepOutput, TapData, TapOutput};
use dsc_ir::artifact::Numerics;
use std::path::Path;

/// How far outputs may be from the expected ones.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Tolerances {
    /// `‖out − ref‖ / ‖ref‖` of the logits over all positions.
    pub logits: f64,
    /// The same of the worst position.
    pub logits_worst: f64,
    /// The same of each `hidden.i` over all positions.
    pub hidden: f64,
    /// Least share of a layer's selected positions that are the expected ones.
    pub topk: f64,
    /// A greedy choice may differ where the logit of the expected token is this close to the largest.
    pub greedy_tie: f64,
    /// Least share of greedy choices that agree (or nearly tie).
    pub greedy: f64,
}

impl Tolerances {
    /// What a correct artifact of these numerics keeps, when the expected outputs were made without quantised activations.
    pub fn of(numerics: Numerics) -> Tolerances {
        match numerics {
            Numerics::Exact => {
                Tolerances { logits: 1e-3, logits_worst: 1e-2, hidden: 1e-3, topk: 0.99, greedy_tie: 1e-3, greedy: 1.0 }
            }
            Numerics::Deployed => {
                Tolerances { logits: 0.15, logits_worst: 0.5, hidden: 0.15, topk: 0.8, greedy_tie: 0.25, greedy: 0.9 }
            }
        }
    }
}

/// Error of one tensor: relative, in the 2-norm.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TensorError {
    /// Its name.
    pub name: String,
    /// Over all positions.
    pub relative: f64,
    /// Of the worst position.
    pub worst: f64,
    /// That position.
    pub worst_position: usize,
    /// Elements that are NaN here and not there, or there and not here.
    pub nan_mismatches: usize,
}

/// Agreement of the positions that one layer selects.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct TopkOverlap {
    /// The layer.
    pub layer: usize,
    /// Share of the expected positions that are selected, over all rows. Near-ties at the edge cost a little.
    pub overlap: f64,
    /// The least share of a row.
    pub worst: f64,
    /// That row.
    pub worst_row: usize,
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
}

/// Everything that was compared.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Report {
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
        let mut report = Report {
            logits: None,
            hidden: Vec::new(),
            topk: Vec::new(),
            greedy: Vec::new(),
            not_compared: Vec::new(),
            tolerances: *tolerances,
            failures: Vec::new(),
        };
        let output = self.in_sequence(|session, seq| {
            session.step(&[SequenceInput { seq, tokens: &prompt }], LogitsWanted::All, true)
        })?;
        compare_tensors(&golden, &prompt, &output, &mut report)?;
        for (name, prompt) in golden.continuations(&prompt)? {
            let expected = golden.tokens(&name)?.unwrap_or_default();
            report.greedy.push(self.greedy_agreement(name, &prompt, &expected, tolerances)?);
        }
        if report.logits.is_none() && report.greedy.is_empty() && report.hidden.is_empty() && report.topk.is_empty() {
            return Err(Error::Golden("it has no logits and nothing else to compare".into()));
        }
        report.judge();
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
        let mut result =
            GreedyAgreement { name, tokens: expected.len(), equal: 0, near_ties: 0, first_difference: None };
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
    fn judge(&mut self) {
        let t = self.tolerances;
        let mut failures = Vec::new();
        // Written so that NaN fails.
        let mut least = |ok: bool, what: String| {
            if !ok {
                failures.push(what);
            }
        };
        for (e, all, worst) in self
            .logits
            .iter()
            .map(|e| (e, t.logits, t.logits_worst))
            .chain(self.hidden.iter().map(|e| (e, t.hidden, f64::INFINITY)))
        {
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
        for k in &self.topk {
            least(
                k.overlap >= t.topk,
                format!("topk.{}: {:.4} of the positions agree, under {}", k.layer, k.overlap, t.topk),
            );
        }
        for g in &self.greedy {
            let share = (g.equal + g.near_ties) as f64 / g.tokens.max(1) as f64;
            least(
                g.tokens == 0 || share >= t.greedy,
                format!("{}: {} of {} greedy tokens agree", g.name, g.equal, g.tokens),
            );
        }
        self.failures = failures;
    }
}

fn compare_tensors(golden: &Golden, prompt: &[u32], output: &StepOutput, report: &mut Report) -> Result<(), Error> {
    let rows = prompt.len();
    if let Some(expected) = golden.floats("logits")? {
        report.logits = Some(tensor_error("logits", &output.logits, &expected, rows)?);
    }
    let names: Vec<String> = golden.0.names().map(str::to_string).collect();
    let numbered = |prefix: &str| {
        let mut found: Vec<(usize, &String)> =
            names.iter().filter_map(|n| Some((n.strip_prefix(prefix)?.parse().ok()?, n))).collect();
        found.sort_unstable();
        found
    };
    for (_, name) in numbered("hidden.") {
        let (Some(expected), Some(TapOutput { data: TapData::F32(data), .. })) =
            (golden.floats(name)?, output.taps.get(name))
        else {
            report.not_compared.push(name.clone());
            continue;
        };
        report.hidden.push(tensor_error(name, data, &expected, rows)?);
    }
    for (layer, name) in numbered("topk.") {
        let (Some(expected), Some(TapOutput { data: TapData::I32(data), .. })) =
            (golden.integers(name)?, output.taps.get(name))
        else {
            report.not_compared.push(name.clone());
            continue;
        };
        report.topk.push(topk_overlap(layer, data, &expected, rows));
    }
    Ok(())
}

fn tensor_error(name: &str, found: &[f32], expected: &[f32], rows: usize) -> Result<TensorError, Error> {
    if found.len() != expected.len() || rows == 0 || !found.len().is_multiple_of(rows) {
        let what = format!("{name}: {} elements are expected, the model gives {}", expected.len(), found.len());
        return Err(Error::Golden(what));
    }
    let columns = found.len() / rows;
    let mut error = TensorError { name: name.into(), relative: 0.0, worst: 0.0, worst_position: 0, nan_mismatches: 0 };
    let (mut differences, mut norms) = (0.0, 0.0);
    for row in 0..rows {
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

/// Rows are compared as sets of positions up to the row's own; what is beyond, or negative, is padding.
fn topk_overlap(layer: usize, found: &[i32], expected: &[i32], rows: usize) -> TopkOverlap {
    let set = |all: &[i32], row: usize| -> std::collections::BTreeSet<i32> {
        let k = all.len() / rows;
        all[row * k..(row + 1) * k].iter().copied().filter(|&p| p >= 0 && p as usize <= row).collect()
    };
    let mut result = TopkOverlap { layer, overlap: 1.0, worst: 1.0, worst_row: 0 };
    let (mut common, mut total) = (0, 0);
    for row in 0..rows {
        let (a, b) = (set(found, row), set(expected, row));
        let both = a.intersection(&b).count();
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
        let e = tensor_error("x", &[1.0, 0.0, 3.0, 4.4], &[1.0, 0.0, 3.0, 4.0], 2).unwrap();
        assert!((e.worst - 0.08).abs() < 1e-6 && e.worst_position == 1, "{e:?}");
        assert!((e.relative - 0.4 / 26f64.sqrt()).abs() < 1e-6);
        let nan = tensor_error("x", &[f32::NAN, 1.0], &[0.0, 1.0], 1).unwrap();
        assert_eq!(nan.nan_mismatches, 1);
        assert!(tensor_error("x", &[1.0], &[1.0, 2.0], 1).is_err());
    }

    #[test]
    fn selections_are_sets_without_padding() {
        // Row 0 sees position 0 only; row 2 sees three.
        let expected = [0, 2, 1, 0, 2, 0];
        let same = topk_overlap(3, &[0, -1, 0, 1, 0, 2], &expected, 3);
        assert_eq!((same.layer, same.overlap), (3, 1.0));
        let other = topk_overlap(0, &[0, -1, 0, 1, 1, 2], &expected, 3);
        assert_eq!((other.overlap, other.worst, other.worst_row), (0.8, 0.5, 2));
        assert!(topk_overlap(0, &[0, 1, 2, 0, 1, 2, 0, 1, 2], &expected, 3).overlap < 1.0, "too many");
    }

    #[test]
    fn a_nan_fails() {
        let mut report = Report {
            logits: Some(TensorError {
                name: "logits".into(),
                relative: f64::NAN,
                worst: 0.0,
                worst_position: 0,
                nan_mismatches: 0,
            }),
            hidden: Vec::new(),
            topk: Vec::new(),
            greedy: Vec::new(),
            not_compared: Vec::new(),
            tolerances: Tolerances::of(Numerics::Exact),
            failures: Vec::new(),
        };
        report.judge();
        assert!(!report.passed());
        report.logits = None;
        report.judge();
        assert!(report.passed());
    }
}
