//! How the next token is chosen from a row of logits. The device does it, as a part of the step; [`Sampler::pick`] does the same to
//! logits on the host.
//!
//! Sampling has no state: the random number of a token depends on the seed and on the token's
//! position only. So the same request gives the same text whatever else is in the batch, and a
//! draft can be checked at any position.

use dsc_ir::sample::Draw;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampler {
    /// The largest logit; of equal ones the lowest token.
    Greedy,
    /// A draw from softmax(logits / temperature), cut to the likeliest tokens that together reach
    /// `top_p`.
    TopP {
        /// Divides the logits, above 0.
        temperature: f32,
        /// Probability to keep, in (0, 1]; 1 keeps every token.
        top_p: f32,
        /// Equal seeds give equal draws.
        seed: u64,
    },
}

/// Why no token can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The temperature is NaN or infinite.
    #[error("temperature {0} is not a number; give 0 for greedy decoding or a value such as 1.0")]
    Temperature(f32),
    /// The nucleus is empty or larger than everything.
    #[error("top-p {0} is outside (0, 1]; give 1 to keep every token")]
    TopP(f32),
    /// There is nothing to choose from.
    #[error("none of the {0} logits is a number: the weights or the kernels are wrong; run `dsc verify`")]
    NoLogits(usize),
}

impl Sampler {
    /// A sampler with these parameters; a temperature of 0 or less is greedy.
    ///
    /// # Errors
    /// [`SampleError::Temperature`] when it is not finite, [`SampleError::TopP`] when `top_p` is
    /// outside (0, 1].
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Result<Sampler, SampleError> {
        if !temperature.is_finite() {
            return Err(SampleError::Temperature(temperature));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(SampleError::TopP(top_p));
        }
        Ok(if temperature <= 0.0 { Sampler::Greedy } else { Sampler::TopP { temperature, top_p, seed } })
    }

    /// How the token after `position` tokens is drawn, by the definition of [`dsc_ir::sample`].
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn draw(&self, position: u64) -> Result<Draw, SampleError> {
        let Sampler::TopP { temperature, top_p, seed } = *self else { return Ok(Draw::GREEDY) };
        Ok(match Sampler::new(temperature, top_p, seed)? {
            Sampler::Greedy => Draw::GREEDY,
            Sampler::TopP { .. } => Draw { temperature, top_p, quantile: uniform(seed, position) },
        })
    }

    /// The token after `position` tokens, from its `logits` of shape `[vocab]`: for logits that are on the host anyway. A NaN is
    /// never chosen.
    ///
    /// # Errors
    /// [`SampleError::NoLogits`] when every logit is NaN or there is none; parameters are checked as in [`Sampler::new`].
    pub fn pick(&self, logits: &[f32], position: u64) -> Result<u32, SampleError> {
        let wide: Vec<f64> = logits.iter().map(|&x| x.into()).collect();
        let token = self.draw(position)?.pick(&wide).ok_or(SampleError::NoLogits(logits.len()))?;
        Ok(token as u32)
    }
}

/// Number `counter` of stream `seed`, uniform in [0, 1): SplitMix64 (Steele et al., OOPSLA 2014),
/// its upper 24 bits.
fn uniform(seed: u64, counter: u64) -> f32 {
    (split_mix(seed, counter) >> 40) as f32 / (1u32 << 24) as f32
}

fn split_mix(seed: u64, counter: u64) -> u64 {
    let mut x = seed.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;

    fn top_p(temperature: f32, top_p: f32) -> Sampler {
        Sampler::new(temperature, top_p, 7).unwrap()
    }

    /// Share of each token in many draws.
    fn shares(sampler: Sampler, logits: &[f32]) -> Vec<f64> {
        const DRAWS: u64 = 20_000;
        let mut counts = vec![0; logits.len()];
        for position in 0..DRAWS {
            counts[sampler.pick(logits, position).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / DRAWS as f64).collect()
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let pick = |logits: &[f32]| Sampler::Greedy.pick(logits, 0);
        assert_eq!(pick(&[1.0, 3.0, 3.0]), Ok(1));
        assert_eq!(pick(&[NAN, -2.0, NAN, -1.0]), Ok(3));
        assert_eq!(pick(&[-INF, -INF]), Ok(0));
        assert_eq!(pick(&[0.0, INF, INF]), Ok(1));
        assert_eq!(pick(&[-0.0, 0.0]), Ok(0));
        assert_eq!(pick(&[NAN, NAN]), Err(SampleError::NoLogits(2)));
        assert_eq!(pick(&[]), Err(SampleError::NoLogits(0)));
    }

    #[test]
    fn parameters_are_checked() {
        assert_eq!(Sampler::new(0.0, 0.9, 1), Ok(Sampler::Greedy));
        assert_eq!(Sampler::new(-1.0, 0.9, 1), Ok(Sampler::Greedy));
        for temperature in [NAN, INF, -INF] {
            assert!(matches!(Sampler::new(temperature, 0.9, 1), Err(SampleError::Temperature(_))));
        }
        for top_p in [NAN, 0.0, -0.5, 1.01, INF] {
            assert!(matches!(Sampler::new(1.0, top_p, 1), Err(SampleError::TopP(_))));
        }
        let unchecked = Sampler::TopP { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(unchecked.pick(&[0.0, 1.0], 0), Ok(1));
        let unchecked = Sampler::TopP { temperature: 1.0, top_p: NAN, seed: 0 };
        assert!(unchecked.pick(&[0.0, 1.0], 0).is_err());
    }

    #[test]
    fn random_numbers_are_those_of_the_paper() {
        let expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431];
        assert_eq!(std::array::from_fn(|counter| split_mix(1234567, counter as u64)), expected);
        assert!((0..1000).map(|counter| uniform(3, counter)).all(|x| (0.0..1.0).contains(&x)));
    }

    #[test]
    fn same_seed_same_tokens() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let tokens = |seed| {
            let sampler = Sampler::new(1.0, 0.95, seed).unwrap();
            (0..50).map(|position| sampler.pick(&logits, position).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }

    #[test]
    fn draws_follow_the_softmax() {
        let probabilities = [0.5f32, 0.25, 0.15, 0.1];
        let logits = probabilities.map(f32::ln);
        for (share, probability) in shares(top_p(1.0, 1.0), &logits).iter().zip(probabilities) {
            assert!((share - f64::from(probability)).abs() < 0.015, "{share} is not {probability}");
        }
        // Temperature 1/2 squares the odds.
        let cold = shares(top_p(0.5, 1.0), &logits);
        assert!((cold[0] / cold[1] - 4.0).abs() < 0.4, "{cold:?}");
    }

    #[test]
    fn nucleus_is_the_fewest_tokens_that_reach_top_p() {
        let logits = [0.1f32, 0.5, 0.15, 0.25].map(f32::ln);
        assert_eq!(shares(top_p(1.0, 0.4), &logits), [0.0, 1.0, 0.0, 0.0]);
        let two = shares(top_p(1.0, 0.7), &logits);
        assert!(two[0] == 0.0 && two[2] == 0.0 && (two[1] - 2.0 / 3.0).abs() < 0.015, "{two:?}");
        let three = shares(top_p(1.0, 0.8), &logits);
        assert!(three[0] == 0.0 && three[2] > 0.0, "{three:?}");
        // Equals go together.
        assert!(shares(top_p(1.0, 0.5), &[0.0; 4]).iter().all(|share| (share - 0.25).abs() < 0.015));
    }

    #[test]
    fn draws_survive_odd_logits() {
        let sampler = top_p(1.0, 0.9);
        assert_eq!(shares(sampler, &[NAN, 0.0, -INF, NAN]), [0.0, 1.0, 0.0, 0.0]);
        assert_eq!(sampler.pick(&[0.0, INF, INF], 3), Ok(1));
        assert_eq!(sampler.pick(&[-INF, -INF], 3), Ok(0));
        assert_eq!(sampler.pick(&[NAN], 3), Err(SampleError::NoLogits(1)));
        assert_eq!(top_p(f32::MIN_POSITIVE, 1.0).pick(&[f32::MIN, f32::MAX], 3), Ok(1));
        assert!(top_p(f32::MAX, 1e-6).pick(&[1.0; 10], u64::MAX).is_ok());
    }
}
