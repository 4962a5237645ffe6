//! Samples the next byte from its logits.

use mblm_sdk::error::{Error, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How to sample the next byte. The filters apply one after the other, in the order of the fields.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits: below 1 is sharper, above 1 is flatter, 0 always takes the most likely byte.
    pub temperature: f32,
    /// The Python package's filter: keeps the `max(⌊(1 - filter_thres) V⌋, 1)` most likely tokens; 1 keeps only the
    /// most likely one.
    pub filter_thres: Option<f64>,
    /// Keeps the `k` most likely tokens.
    pub top_k: Option<usize>,
    /// Keeps the smallest set of tokens whose probabilities sum to `p` (Holtzman et al. 2019).
    pub top_p: Option<f32>,
    /// Keeps tokens that are at least `p` times as likely as the most likely one.
    pub min_p: Option<f32>,
    /// The same seed gives the same bytes.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 1.0, filter_thres: None, top_k: None, top_p: None, min_p: None, seed: 0 }
    }
}

impl Sampling {
    /// Always takes the most likely byte, and the lowest id among equals.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, ..Self::default() }
    }

    fn validate(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Input(what.to_string()));
        let fraction = |p: f64| (0.0..=1.0).contains(&p);
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return wrong(&format!("temperature: expected a number of at least 0, found {}", self.temperature));
        }
        if let Some(p) = self.filter_thres.filter(|p| !fraction(*p)) {
            return wrong(&format!("filter_thres: expected a number in [0, 1], found {p}"));
        }
        for (name, p) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            if let Some(p) = p.filter(|p| !fraction(f64::from(*p))) {
                return wrong(&format!("{name}: expected a number in [0, 1], found {p}"));
            }
        }
        match self.top_k {
            Some(0) => wrong("top_k: expected a positive integer, found 0"),
            _ => Ok(()),
        }
    }
}

/// A [`Sampling`] with its random stream.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// A setting is outside its range.
    pub fn new(sampling: Sampling) -> Result<Self> {
        sampling.validate()?;
        Ok(Sampler { rng: ChaCha8Rng::seed_from_u64(sampling.seed), sampling })
    }

    /// Draws a token from `logits`: `(V)`.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        // By falling logit; equal ones by id, so that the result does not depend on the sort.
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        let s = &self.sampling;
        if s.temperature == 0.0 {
            return order[0];
        }
        if let Some(thres) = s.filter_thres {
            order.truncate((((1.0 - thres) * logits.len() as f64) as usize).max(1));
        }
        order.truncate(s.top_k.unwrap_or(usize::MAX));
        let top = logits[order[0] as usize];
        let weight = |id: u32| (((logits[id as usize] - top) / s.temperature) as f64).exp();
        let mut weights: Vec<f64> = order.iter().map(|id| weight(*id)).collect();
        if let Some(p) = s.top_p {
            let (total, mut sum) = (weights.iter().sum::<f64>(), 0.0);
            let enough = weights.iter().position(|w| {
                sum += w;
                sum >= p as f64 * total
            });
            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }
        if let Some(p) = s.min_p {
            let kept = weights.iter().take_while(|w| **w >= p as f64).count();
            weights.truncate(kept.max(1));
        }
        let unit = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = unit * weights.iter().sum::<f64>();
        for (id, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *id;
            }
        }
        order[weights.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probabilities 0.5, 0.25, 0.15, 0.1 of the tokens 3, 1, 0, 2.
    fn logits() -> Vec<f32> {
        [0.15f32, 0.25, 0.1, 0.5].iter().map(|p| p.ln()).collect()
    }

    fn frequencies(sampling: Sampling) -> Vec<f64> {
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = vec![0.0; 4];
        (0..20_000).for_each(|_| counts[sampler.sample(&logits()) as usize] += 1.0 / 20_000.0);
        counts
    }

    #[track_caller]
    fn assert_near(got: Vec<f64>, want: [f64; 4]) {
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.015), "{got:?}, want {want:?}");
    }

    #[test]
    fn frequencies_follow_the_filtered_distribution() {
        let base = Sampling::default();
        assert_near(frequencies(base.clone()), [0.15, 0.25, 0.1, 0.5]);
        assert_near(frequencies(Sampling { top_k: Some(2), ..base.clone() }), [0.0, 1.0 / 3.0, 0.0, 2.0 / 3.0]);
        assert_near(frequencies(Sampling { top_p: Some(0.7), ..base.clone() }), [0.0, 1.0 / 3.0, 0.0, 2.0 / 3.0]);
        assert_near(
            frequencies(Sampling { min_p: Some(0.25), ..base.clone() }),
            [1.0 / 6.0, 5.0 / 18.0, 0.0, 5.0 / 9.0],
        );
        assert_near(
            frequencies(Sampling { filter_thres: Some(0.5), ..base.clone() }),
            [0.0, 1.0 / 3.0, 0.0, 2.0 / 3.0],
        );
        assert_near(frequencies(Sampling { filter_thres: Some(1.0), ..base.clone() }), [0.0, 0.0, 0.0, 1.0]);
        // Squared probabilities.
        let squares = [0.0225, 0.0625, 0.01, 0.25].map(|p| p / 0.345);
        assert_near(frequencies(Sampling { temperature: 0.5, ..base }), squares);
    }

    /// Python's `int((1 - 0.9) * 260)` is 25: in single precision it would be 26.
    #[test]
    fn the_packages_filter_keeps_as_many_as_the_package() {
        for (thres, vocab, kept) in [(0.9, 260, 25), (0.9, 257, 25), (0.7, 10, 3), (0.8, 5, 1), (0.1, 10, 9)] {
            let sampling = Sampling { filter_thres: Some(thres), temperature: 1e3, ..Sampling::default() };
            let mut sampler = Sampler::new(sampling).unwrap();
            // All but equally likely, falling with the id.
            let logits: Vec<f32> = (0..vocab).map(|id| -(id as f32) * 1e-3).collect();
            let last = (0..5_000).map(|_| sampler.sample(&logits)).max();
            assert_eq!(last, Some(kept - 1), "{thres} of {vocab}");
        }
    }

    #[test]
    fn greedy_takes_the_likeliest_and_the_first_of_equals() {
        let mut greedy = Sampler::new(Sampling::greedy()).unwrap();
        assert_eq!((greedy.sample(&logits()), greedy.sample(&[1.0, 2.0, 2.0])), (3, 1));
    }

    #[test]
    fn a_seed_fixes_the_bytes() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..Sampling::default() }).unwrap();
            (0..50).map(|_| sampler.sample(&logits())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn settings_outside_their_range_are_refused() {
        for (sampling, part) in [
            (Sampling { temperature: -1.0, ..Sampling::default() }, "temperature"),
            (Sampling { top_k: Some(0), ..Sampling::default() }, "top_k"),
            (Sampling { top_p: Some(1.5), ..Sampling::default() }, "top_p: expected a number in [0, 1], found 1.5"),
            (Sampling { min_p: Some(f32::NAN), ..Sampling::default() }, "min_p"),
        ] {
            let message = Sampler::new(sampling).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
