//! Choosing a token from a row of logits: the definition that every executor of [`Op::Sample`](crate::graph::Op::Sample) follows.
//!
//! With `m` the largest logit, token `v` weighs `e^((x_v − m) / temperature)`; a logit that is not a number weighs nothing. The
//! *nucleus* (Holtzman et al., ICLR 2020) is made of all tokens that are likely enough: those whose [`likelihood`], the weight cut
//! down to bf16, is at least the highest one at which they weigh `top_p` of all. So tokens as likely as each other, to 1 %, are in it
//! together or not at all. The token chosen is the first, in order of their numbers, at which the running sum of the nucleus's
//! weights exceeds `quantile` of its sum. Executors differ by the rounding of weights and sums alone.

/// How one row chooses its token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 or less takes the largest logit, the lowest token among equals.
    pub temperature: f32,
    /// Weight of the nucleus over that of all tokens, in (0, 1]; at 1 or more all tokens are in it.
    pub top_p: f32,
    /// Where in the nucleus the token lies, in [0, 1).
    pub quantile: f32,
}

impl Draw {
    /// The largest logit.
    pub const GREEDY: Draw = Draw { temperature: 0.0, top_p: 1.0, quantile: 0.0 };

    /// As a row of [`StepInput::Draws`](crate::graph::StepInput::Draws): the bits of the three.
    pub fn bits(self) -> [i32; 3] {
        [self.temperature, self.top_p, self.quantile].map(|x| x.to_bits() as i32)
    }

    /// From what [`Draw::bits`] gave.
    pub fn from_bits(bits: [i32; 3]) -> Draw {
        let [temperature, top_p, quantile] = bits.map(|b| f32::from_bits(b as u32));
        Draw { temperature, top_p, quantile }
    }

    /// The token of a row of logits; `None` if none of them is a number.
    pub fn pick(self, logits: &[f64]) -> Option<usize> {
        let best = largest(logits)?;
        let most = logits[best];
        if self.temperature.is_nan() || self.temperature <= 0.0 || !most.is_finite() {
            return Some(best);
        }
        let weight = |x: f64| if x.is_nan() { 0.0 } else { ((x - most) / f64::from(self.temperature)).exp() };
        let weights: Vec<f64> = logits.iter().map(|&x| weight(x)).collect();
        let cut = if self.top_p < 1.0 { cut(&weights, f64::from(self.top_p)) } else { 0 };
        let kept = |w: f64| if likelihood(w) >= cut { w } else { 0.0 };
        let target = f64::from(self.quantile) * weights.iter().map(|&w| kept(w)).sum::<f64>();
        let mut sum = 0.0;
        let reached = weights.iter().position(|&w| {
            sum += kept(w);
            sum > target
        });
        Some(reached.unwrap_or(best)) // `best` only when rounding used up the sum
    }
}

/// Index of the largest number, the lowest of equal ones; `None` when there is no number.
fn largest(logits: &[f64]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, logit) in logits.iter().enumerate() {
        if !logit.is_nan() && best.is_none_or(|best| *logit > logits[best]) {
            best = Some(i);
        }
    }
    best
}

/// A weight in [0, 1] as nuclei compare it: the upper 16 bits of the f32, 0 to [`LIKELIEST`].
pub fn likelihood(weight: f64) -> u32 {
    (weight as f32).to_bits() >> 16
}

/// The [`likelihood`] of the largest logit.
pub const LIKELIEST: u32 = 0x3f80;

/// The highest likelihood such that the tokens of at least that one weigh `top_p` of all.
fn cut(weights: &[f64], top_p: f64) -> u32 {
    let mut sorted: Vec<f64> = weights.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let target = top_p * sorted.iter().sum::<f64>();
    let mut sum = 0.0;
    let last = sorted.iter().position(|&w| {
        sum += w;
        sum >= target
    });
    last.map_or(0, |i| likelihood(sorted[i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f64 = f64::NAN;
    const INF: f64 = f64::INFINITY;

    #[test]
    fn the_largest_is_the_lowest_of_equals() {
        let pick = |logits: &[f64]| Draw::GREEDY.pick(logits);
        assert_eq!(pick(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(pick(&[NAN, -2.0, NAN, -1.0]), Some(3));
        assert_eq!(pick(&[-INF, -INF]), Some(0));
        assert_eq!(pick(&[-0.0, 0.0]), Some(0));
        assert_eq!([pick(&[NAN, NAN]), pick(&[])], [None, None]);
    }

    #[test]
    fn quantiles_walk_the_nucleus_in_order() {
        let logits = [0.1f64, 0.5, 0.15, 0.25].map(f64::ln);
        let pick = |top_p, quantile| Draw { temperature: 1.0, top_p, quantile }.pick(&logits);
        assert_eq!([0.0, 0.09, 0.11, 0.59, 0.61, 0.74, 0.76].map(|q| pick(1.0, q)), [0, 0, 1, 1, 2, 2, 3].map(Some));
        assert_eq!([0.0, 0.999].map(|q| pick(0.4, q)), [1, 1].map(Some));
        assert_eq!([0.0, 0.66, 0.67, 0.999].map(|q| pick(0.7, q)), [1, 1, 3, 3].map(Some));
        // Equal tokens go together.
        let equal = Draw { temperature: 1.0, top_p: 0.3, quantile: 0.9 };
        assert_eq!(equal.pick(&[0.0; 4]), Some(3));
        assert_eq!(Draw::from_bits(equal.bits()), equal);
    }
}
