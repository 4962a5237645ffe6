//! Training or evaluation, and the dropout masks of training.

use candle_core::{Device, Tensor};

use crate::error::Result;

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
        let mut key = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream;
        // SplitMix64's finaliser (Steele et al. 2014).
        key = (key ^ (key >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        key = (key ^ (key >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let threshold = (p as f64 * u32::MAX as f64) as u32;
        Dropout { key: key ^ (key >> 31), threshold, scale: if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 } }
    }

    /// The factor of element `index`: 0 with probability `p`, otherwise `1 / (1 - p)`.
    #[inline(always)]
    pub fn factor(&self, index: usize) -> f32 {
        let mixed = (index as u64).wrapping_add(self.key);
        let mut hash = (mixed as u32) ^ ((mixed >> 32) as u32).wrapping_mul(0x9E37_79B9);
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x7FEB_352D);
        hash = (hash ^ (hash >> 15) ^ (self.key >> 32) as u32).wrapping_mul(0x846C_A68B);
        hash ^= hash >> 16;
        if hash < self.threshold { 0.0 } else { self.scale }
    }

    /// The factors of `len` elements as a tensor, for compositions.
    pub fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        let factors: Vec<f32> = (0..shape.iter().product()).map(|i| self.factor(i)).collect();
        Ok(Tensor::from_vec(factors, shape, &Device::Cpu)?)
    }
}

/// A stream number for [`Mode::dropout`] from a module's parameter prefix.
pub fn stream(prefix: &str) -> u64 {
    // FNV-1a
    prefix.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x0000_0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
