//! RMSNorm with a gradient.

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::ops;

/// [`candle_nn::RmsNorm`] with a gradient.
#[derive(Clone, Debug)]
pub struct RmsNorm(candle_nn::RmsNorm);

impl RmsNorm {
    /// `weight`: `(D)`
    pub fn new(weight: Tensor, eps: f64) -> Self {
        RmsNorm(candle_nn::RmsNorm::new(weight, eps))
    }

    /// The gain, `(D)`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, self.weight(), self.0.eps() as f32)
    }
}

/// As [`candle_nn::rms_norm`].
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    Ok(RmsNorm(candle_nn::rms_norm(size, eps, vb)?))
}
