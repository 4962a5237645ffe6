//! Initial values of parameters. Each parameter draws from its own random stream.

use mblm_base::random;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::RngCore;

/// The distribution of initial values. Random ones draw from a stream that is keyed by seed and parameter name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All elements have this value.
    Const(f32),
    /// Normal with mean 0 and standard deviation 1 (`torch.nn.Embedding`, `torch.randn`).
    Normal,
    /// Normal with this mean and standard deviation.
    NormalWith {
        /// The mean.
        mean: f32,
        /// The standard deviation.
        std: f32,
    },
    /// Uniform in `[-bound, bound]`.
    Uniform(f32),
    /// Uniform in `[low, high]`.
    UniformBetween {
        /// The lower bound.
        low: f32,
        /// The upper bound.
        high: f32,
    },
    /// `ln u` with `u` uniform in `[low, high]` (Mamba-2's `A_log`).
    LogUniform(f32, f32),
    /// `ln(1), …, ln(n)` along the last dimension (Mamba-1's `A_log`, the S4D-real initialisation).
    LogRange,
    /// The inverse softplus of a step size drawn log-uniformly from `[0.001, 0.1]`, at least 1e-4 (Mamba's `dt` bias).
    InverseSoftplusDt,
}

impl Init {
    /// PyTorch's default for the weight and the bias of `Linear` and `Conv1d`: uniform within `1 / sqrt(fan_in)`.
    pub fn linear(fan_in: usize) -> Self {
        Init::Uniform(1.0 / (fan_in as f32).sqrt())
    }

    /// These draws, multiplied by `gain`.
    pub fn times(self, gain: f32) -> Start {
        Start { init: self, gain }
    }

    pub(super) fn values(self, shape: &[usize], rng: &mut ChaCha8Rng) -> Vec<f32> {
        let last = shape.last().copied().unwrap_or(1);
        let uniform = |rng: &mut ChaCha8Rng| (rng.next_u32() >> 8) as f64 / (1u32 << 24) as f64;
        let normal = |rng: &mut ChaCha8Rng| random::normal(uniform(rng), uniform(rng));
        let draw = |i: usize, rng: &mut ChaCha8Rng| -> f64 {
            match self {
                Init::Const(value) => value as f64,
                Init::Normal => normal(rng),
                Init::NormalWith { mean, std } => mean as f64 + std as f64 * normal(rng),
                Init::Uniform(bound) => (2.0 * uniform(rng) - 1.0) * bound as f64,
                Init::UniformBetween { low, high } => low as f64 + uniform(rng) * (high as f64 - low as f64),
                Init::LogUniform(low, high) => (low as f64 + uniform(rng) * (high - low) as f64).ln(),
                Init::LogRange => ((i % last + 1) as f64).ln(),
                Init::InverseSoftplusDt => {
                    let (low, high) = (0.001f64.ln(), 0.1f64.ln());
                    let dt = (low + uniform(rng) * (high - low)).exp().max(1e-4);
                    dt + (-(-dt).exp_m1()).ln()
                }
            }
        };
        (0..shape.iter().product()).map(|i| draw(i, rng) as f32).collect()
    }
}

/// How a parameter was initialized: a distribution, times a gain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// The distribution.
    pub init: Init,
    /// The factor that its draws are multiplied by.
    pub gain: f32,
}

impl From<Init> for Start {
    fn from(init: Init) -> Self {
        init.times(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::param::ParamStore;
    use rand_chacha::rand_core::SeedableRng;

    #[test]
    fn normal_and_uniform_have_their_moments() {
        let mut store = ParamStore::new(0);
        let normal = store.root().param("n", &[100_000], Init::Normal).unwrap().values().to_vec();
        let mean = normal.iter().sum::<f32>() / 1e5;
        let variance = normal.iter().map(|v| v * v).sum::<f32>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        let uniform = store.root().param("u", &[10_000], Init::linear(16)).unwrap().values().to_vec();
        assert!(uniform.iter().all(|v| v.abs() <= 0.25) && uniform.iter().any(|v| v.abs() > 0.249));
        let moved = store.root().param("m", &[100_000], Init::NormalWith { mean: -3.0, std: 0.5 }).unwrap();
        let mean = moved.values().iter().sum::<f32>() / 1e5;
        let variance = moved.values().iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        assert!((mean + 3.0).abs() < 0.01 && (variance - 0.25).abs() < 0.01, "mean {mean}, variance {variance}");
        let between = store.root().param("b", &[10_000], Init::UniformBetween { low: 1.0, high: 3.0 }).unwrap();
        let (low, high) = between.values().iter().fold((9f32, -9f32), |(low, high), v| (low.min(*v), high.max(*v)));
        assert!((1.0..1.01).contains(&low) && high <= 3.0 && high > 2.99, "{low} to {high}");
    }

    #[test]
    fn draws_stay_as_they_are() {
        let draw = |init: Init| init.values(&[4], &mut ChaCha8Rng::seed_from_u64(7));
        let before = [
            (Init::Normal, [0x3E99_F36D, 0x3E9F_F484, 0xBE66_3E66, 0xBD21_C1C3]),
            (Init::Uniform(1.0), [0xBF38_517A, 0xBF2F_355A, 0xBF22_C9AE, 0xBF29_FD4E]),
            (Init::InverseSoftplusDt, [0xC0C8_62D2, 0xC0C5_C2EA, 0xC0C2_2EBB, 0xC0C4_41F6]),
        ];
        for (init, bits) in before {
            assert_eq!(draw(init), bits.map(f32::from_bits), "{init:?}: a seed must give the same weights as before");
        }
    }
}
