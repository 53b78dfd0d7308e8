//! Which differences follow from ties at the edge of a selection.
//!
//! Where several positions score the same as the k-th best, which of them are selected is nobody's rule, and two right
//! implementations may choose differently. One other member changes the row's hidden state; through it the row's keys in later
//! layers, and so the rows that select it. Such positions are *tainted*: they follow a tie, and comparing them says nothing.
//!
//! Nothing is tainted at first. For each layer, and each row that is untainted on its input:
//!
//! 1. A selection other than the expected one must be excused ([`excuse`]): both must be a best choice by this model's own scores,
//!    up to rounding. Scores of tainted positions are not the other implementation's, so they may be anything there; all others count.
//! 2. The row is tainted from the next layer on if its selection differs (and is excused), or if a selected position is tainted here.
//!
//! Every other row reads nothing but what must be equal, so it must be equal itself. A difference that is not excused taints nothing.

use std::collections::BTreeSet;

/// Scores that differ by at most this share of the row's largest are equal within rounding ..
const RELATIVE: f64 = 1e-5;
/// .. or by this.
const ABSOLUTE: f64 = 1e-9;

/// Selected positions of one layer, row by row.
pub(super) struct Selection {
    pub(super) found: Vec<BTreeSet<usize>>,
    pub(super) expected: Vec<BTreeSet<usize>>,
}

impl Selection {
    /// Negative positions are padding; so is what is expected beyond the row's own position.
    pub(super) fn new(found: &[i32], expected: &[i32], rows: usize) -> Selection {
        let sets = |all: &[i32], most: &dyn Fn(usize) -> usize| -> Vec<BTreeSet<usize>> {
            let k = all.len() / rows.max(1);
            let row = |t: usize| all[t * k..(t + 1) * k].iter().filter_map(|&p| usize::try_from(p).ok());
            (0..rows).map(|t| row(t).filter(|&p| p <= most(t)).collect()).collect()
        };
        Selection { found: sets(found, &|_| usize::MAX), expected: sets(expected, &|t| t) }
    }

    pub(super) fn differs(&self, row: usize) -> bool {
        self.found[row] != self.expected[row]
    }
}

/// What a layer's index scores are made of: `Σ_h max(q_h · k_s, 0) w_h`.
pub(super) struct Scores<'a> {
    /// `[rows, heads · width]`.
    pub(super) queries: &'a [f32],
    /// `[rows, heads]`.
    pub(super) weights: &'a [f32],
    /// `[rows, width]`.
    pub(super) keys: &'a [f32],
    pub(super) rows: usize,
}

impl Scores<'_> {
    /// Whether the sizes fit each other.
    pub(super) fn fit(&self) -> bool {
        let columns = |x: &[f32]| (self.rows > 0 && x.len().is_multiple_of(self.rows)).then(|| x.len() / self.rows);
        match (columns(self.queries), columns(self.weights), columns(self.keys)) {
            (Some(q), Some(heads), Some(width)) => width > 0 && heads > 0 && q == heads * width,
            _ => false,
        }
    }

    /// Scores of the positions that a row sees, its own the last.
    pub(super) fn row(&self, row: usize) -> Vec<f64> {
        let [heads, width] = [self.weights, self.keys].map(|x| x.len() / self.rows);
        let queries = &self.queries[row * heads * width..][..heads * width];
        let weights = &self.weights[row * heads..][..heads];
        let keys = self.keys.chunks_exact(width).take(row + 1);
        let score = |key: &[f32]| -> f64 {
            let of_head = |(query, &weight): (&[f32], &f32)| {
                let product: f64 = query.iter().zip(key).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                product.max(0.0) * f64::from(weight)
            };
            queries.chunks_exact(width).zip(weights).map(of_head).sum()
        };
        keys.map(score).collect()
    }
}

/// Why a selection may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Excuse {
    /// Scores tie at the edge.
    Tie,
    /// Tainted positions score differently.
    Taint,
}

/// Whether two selections of one row may differ; if not, says so. `scores` are this model's, of all positions that the row sees.
pub(super) fn excuse(
    k: usize,
    found: &BTreeSet<usize>,
    expected: &BTreeSet<usize>,
    scores: &[f64],
    tainted: &[bool],
) -> Result<Excuse, String> {
    let members = k.min(scores.len());
    for (set, whose) in [(found, "selects"), (expected, "is expected to select")] {
        if set.len() != members || set.last().is_some_and(|&p| p >= scores.len()) {
            return Err(format!("{whose} {} positions of {}, not {members}", set.len(), scores.len()));
        }
    }
    if scores.iter().any(|s| !s.is_finite()) {
        return Err("scores that are not finite".into());
    }
    let eps = RELATIVE * scores.iter().fold(0.0, |most, s| s.abs().max(most)) + ABSOLUTE;
    best_choice(found, scores, eps, &|_| true).map_err(|why| format!("selects {why}"))?;
    let expects = |why| format!("is expected to select {why}");
    match best_choice(expected, scores, eps, &|_| true) {
        Ok(()) => Ok(Excuse::Tie),
        Err(_) => best_choice(expected, scores, eps, &|p| !tainted[p]).map(|()| Excuse::Taint).map_err(expects),
    }
}

/// Whether no position that counts scores better than a selected one; if so, says which.
fn best_choice(set: &BTreeSet<usize>, scores: &[f64], eps: f64, counts: &dyn Fn(usize) -> bool) -> Result<(), String> {
    let by_score = |a: &usize, b: &usize| scores[*a].total_cmp(&scores[*b]);
    let worst = set.iter().copied().filter(|&p| counts(p)).min_by(by_score);
    let left = (0..scores.len()).filter(|p| counts(*p) && !set.contains(p)).max_by(by_score);
    match (worst, left) {
        (Some(a), Some(b)) if scores[b] - scores[a] > eps => Err(format!(
            "position {a} of score {:.6e} and not position {b} of {:.6e} (a tie is within {eps:.1e})",
            scores[a], scores[b]
        )),
        _ => Ok(()),
    }
}

/// The positions that follow a tie.
pub(super) struct Taint {
    pub(super) positions: Vec<bool>,
}

impl Taint {
    pub(super) fn new(rows: usize) -> Taint {
        Taint { positions: vec![false; rows] }
    }

    pub(super) fn count(&self) -> usize {
        self.positions.iter().filter(|&&t| t).count()
    }

    /// From a layer's input to the next layer's: `selection` is what its attention reads (none: everything), `excused` the rows
    /// that select otherwise than expected and may.
    pub(super) fn pass(&mut self, selection: Option<&Selection>, excused: &BTreeSet<usize>) {
        let before = self.positions.clone();
        let is_tainted = |p: &usize| before.get(*p) == Some(&true);
        for (row, tainted) in self.positions.iter_mut().enumerate() {
            *tainted |= excused.contains(&row)
                || match selection {
                    Some(s) => s.found[row].iter().chain(&s.expected[row]).any(is_tainted),
                    None => (0..row).any(|p| before[p]),
                };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(positions: &[usize]) -> BTreeSet<usize> {
        positions.iter().copied().collect()
    }

    fn judge(found: &[usize], expected: &[usize], scores: &[f64], tainted: &[usize]) -> Result<Excuse, String> {
        let tainted: Vec<bool> = (0..scores.len()).map(|p| tainted.contains(&p)).collect();
        excuse(2, &set(found), &set(expected), scores, &tainted)
    }

    #[test]
    fn ties_at_the_edge_are_excused_and_nothing_else() {
        assert_eq!(judge(&[1, 0], &[1, 3], &[0.0, 5.0, 0.0, 0.0], &[]), Ok(Excuse::Tie));
        assert_eq!(judge(&[0, 1], &[2, 3], &[1.0, 1.0, 1.0, 1.0], &[]), Ok(Excuse::Tie));
        assert_eq!(judge(&[0, 1], &[1, 2], &[1.0, 2.0, 1.0 + 1e-5, 0.0], &[]), Ok(Excuse::Tie), "within rounding");
        // A right selection and a wrong one, either way round.
        let scores = [1.0, 2.0, 1.1, 0.0];
        let wrong = judge(&[0, 1], &[1, 2], &scores, &[]).unwrap_err();
        assert!(wrong.starts_with("selects position 0 of score 1.0") && wrong.contains("not position 2"), "{wrong}");
        let other = judge(&[1, 2], &[0, 1], &scores, &[]).unwrap_err();
        assert!(other.starts_with("is expected to select position 0"), "{other}");
        // A tie elsewhere is no excuse: 0 and 2 tie, but 3 is better than both.
        assert!(judge(&[1, 3], &[1, 2], &[1.0, 3.0, 1.0, 2.0], &[]).is_err());
        assert!(judge(&[0, 1], &[1, 2], &[1.0, 3.0, 1.0, 2.0], &[]).is_err(), "both leave out 3");
    }

    #[test]
    fn sizes_ranges_and_nans_are_no_ties() {
        let scores = [0.0; 4];
        assert!(judge(&[0], &[0, 1], &scores, &[]).unwrap_err().starts_with("selects 1 positions of 4"));
        assert!(judge(&[0, 1, 2], &[0, 1], &scores, &[]).is_err());
        assert!(judge(&[0, 7], &[0, 1], &scores, &[]).is_err(), "beyond the row");
        assert!(judge(&[0, 1], &[0, 2], &[0.0, f64::NAN, 0.0, 0.0], &[]).is_err());
    }

    #[test]
    fn tainted_positions_may_score_anything_but_only_they() {
        let scores = [1.0, 4.0, 2.0, 3.0];
        // There, 3 scored less: 2 takes its place; or 0 scored more.
        assert_eq!(judge(&[1, 3], &[1, 2], &scores, &[3]), Ok(Excuse::Taint));
        assert_eq!(judge(&[1, 3], &[0, 1], &scores, &[0]), Ok(Excuse::Taint));
        // 0 cannot take the place of 3: 2 comes first.
        assert!(judge(&[1, 3], &[0, 1], &scores, &[3]).unwrap_err().contains("not position 2"));
        // Our own selection must be right whatever is tainted.
        assert!(judge(&[0, 1], &[1, 3], &scores, &[0, 2, 3]).unwrap_err().starts_with("selects position 0"));
    }

    #[test]
    fn taint_follows_selections() {
        let rows = 5;
        let found = [0, -1, 0, 1, 1, 2, 0, 3, 3, 4];
        let expected = [0, 4, 1, 0, 0, 2, 0, 3, 3, 4];
        let selection = Selection::new(&found, &expected, rows);
        assert_eq!((0..rows).filter(|&t| selection.differs(t)).collect::<Vec<_>>(), [2]);
        let mut taint = Taint::new(rows);
        taint.pass(Some(&selection), &set(&[]));
        assert_eq!(taint.count(), 0, "a difference without excuse taints nothing");
        taint.pass(Some(&selection), &set(&[2]));
        assert_eq!(taint.positions, [false, false, true, false, false]);
        // Row 3 selects the tainted position on one side only; row 4 follows a layer later.
        let next = Selection::new(&[0, -1, 0, 1, 1, 2, 0, 2, 3, 4], &[0, 1, 0, 1, 1, 2, 0, 1, 3, 4], rows);
        taint.pass(Some(&next), &set(&[]));
        assert_eq!(taint.positions, [false, false, true, true, false]);
        taint.pass(Some(&next), &set(&[]));
        assert_eq!(taint.positions, [false, false, true, true, true]);
        let mut dense = Taint { positions: vec![false, true, false] };
        dense.pass(None, &set(&[]));
        assert_eq!(dense.positions, [false, true, true]);
    }

    #[test]
    fn a_future_position_is_a_difference() {
        let selection = Selection::new(&[1, 0, 1], &[2, 0, 1], 3);
        assert_eq!(selection.expected, [set(&[]), set(&[0]), set(&[1])]);
        assert!(selection.differs(0) && !selection.differs(1));
    }

    #[test]
    fn scores_are_weighted_sums_of_positive_products() {
        let scores = Scores {
            queries: &[9.0, 9.0, 9.0, 9.0, 1.0, 2.0, -1.0, 0.0],
            weights: &[9.0, 9.0, 0.5, -3.0],
            keys: &[1.0, 1.0, -2.0, 0.0],
            rows: 2,
        };
        assert!(scores.fit());
        assert_eq!(scores.row(1), [1.5, -6.0]);
        assert_eq!(scores.row(0).len(), 1);
        assert!(!Scores { weights: &[1.0], ..scores }.fit());
    }
}
