//! Training or evaluation, and the dropout masks of training.

use mblm_base::random;

/// Training keeps what the backward pass needs and applies dropout. Evaluation does neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A forward pass that is followed by backward.
    Train {
        /// The dropout seed. Use a new one for every forward pass.
        seed: u64,
    },
    /// Only a forward pass.
    Eval,
}

impl Mode {
    /// Training with this dropout seed.
    pub fn train(seed: u64) -> Self {
        Mode::Train { seed }
    }

    /// The mode of a part of the sequences that begins with sequence `first`: a part draws dropout of its own.
    pub fn part(self, first: usize) -> Self {
        match self {
            Mode::Train { seed } => Mode::train(seed.wrapping_add(random::spread(first as u64))),
            Mode::Eval => Mode::Eval,
        }
    }

    /// The dropout at one place in the model (`stream`) with probability `p`. `None` outside training.
    pub fn dropout(self, p: f32, stream: u64) -> Option<Dropout> {
        match self {
            Mode::Train { seed } if p > 0.0 => Some(Dropout::new(p, seed, stream)),
            _ => None,
        }
    }
}

/// A dropout mask that is computed from element indices. Forward, backward and recomputation agree on it with any
/// number of threads, without storing it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    key: u64,
    /// Elements whose hash lies below are dropped.
    threshold: u32,
    scale: f32,
}

impl Dropout {
    pub(crate) fn new(p: f32, seed: u64, stream: u64) -> Self {
        let key = random::finish(random::spread(seed) ^ stream);
        let threshold = (p as f64 * u32::MAX as f64) as u32;
        Dropout { key, threshold, scale: if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 } }
    }

    /// The factor of element `index`: 0 with probability `p`, otherwise `1 / (1 - p)`.
    #[inline(always)]
    pub fn factor(&self, index: usize) -> f32 {
        if random::at(index as u64, self.key) < self.threshold { 0.0 } else { self.scale }
    }

    /// Key, threshold and scale, for kernels that compute the factors where the elements are.
    #[cfg(feature = "cuda")]
    pub(crate) fn parts(&self) -> (u64, u32, f32) {
        (self.key, self.threshold, self.scale)
    }
}

/// A stream number for [`Mode::dropout`] from a module's parameter prefix.
pub fn stream(prefix: &str) -> u64 {
    random::hash(prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_parts_stay_as_they_are() {
        let before = [3, 0x9E37_79B9_7F4A_7C18, 0xB54C_DA58_FBBE_E881];
        assert_eq!([0, 1, 6].map(|first| Mode::train(3).part(first)), before.map(Mode::train));
        assert_eq!(Mode::Eval.part(1), Mode::Eval);
    }

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() {
        let dropout = Mode::train(3).dropout(0.3, stream("stage_models.0")).unwrap();
        let factors: Vec<f32> = (0..100_000).map(|i| dropout.factor(i)).collect();
        let dropped = factors.iter().filter(|&&f| f == 0.0).count() as f64 / 1e5;
        assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
        // Neighbours are independent: both of a pair are dropped with probability p².
        let pairs = factors.windows(2).filter(|w| w[0] == 0.0 && w[1] == 0.0).count() as f64 / 1e5;
        assert!((pairs - 0.09).abs() < 0.01, "{pairs}");
        let other = Mode::train(4).dropout(0.3, stream("stage_models.0")).unwrap();
        let same = (0..100_000).filter(|&i| (other.factor(i) == 0.0) == (factors[i] == 0.0)).count() as f64 / 1e5;
        assert!((same - 0.58).abs() < 0.01, "masks of two seeds are independent, {same}");
    }

    #[test]
    fn no_dropout_outside_training() {
        assert!(Mode::Eval.dropout(0.5, 0).is_none() && Mode::train(0).dropout(0.0, 0).is_none());
    }

    #[test]
    fn masks_stay_as_they_are() {
        let dropout = Mode::train(3).dropout(0.3, stream("stage_models.0")).unwrap();
        let dropped =
            |from: usize| (0..64).filter(|i| dropout.factor(from + i) == 0.0).fold(0u64, |mask, i| mask | 1 << i);
        let before = [0xC831_02CE_43F6_4663, 0x008C_9046_48B0_9C48, 0xA047_109A_1400_5000];
        assert_eq!([0, 1 << 20, 1 << 40].map(dropped), before, "a run that is resumed needs the same masks");
        assert_eq!(stream("stage_models.0"), 0xF9B2_4842_6FA1_83DE);
    }
}
