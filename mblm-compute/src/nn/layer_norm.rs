//! LayerNorm with a gradient.

use candle_core::{Module, Result, Tensor};
use candle_nn::{LayerNormConfig, VarBuilder};

use super::ops;

/// [`candle_nn::LayerNorm`] with a gradient.
#[derive(Clone, Debug)]
pub struct LayerNorm(candle_nn::LayerNorm);

impl LayerNorm {
    /// With a bias.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        LayerNorm(candle_nn::LayerNorm::new(weight, bias, eps))
    }

    /// Without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        LayerNorm(candle_nn::LayerNorm::new_no_bias(weight, eps))
    }

    /// The gain, `(D)`.
    pub fn weight(&self) -> &Tensor {
        self.0.weight()
    }

    /// The bias, `(D)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.0.bias()
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.bias() {
            Some(bias) if self.0.remove_mean() => ops::layer_norm(x, self.weight(), bias, self.0.eps() as f32),
            // candle-nn composes these.
            _ => self.0.forward(x),
        }
    }
}

/// As [`candle_nn::layer_norm()`].
pub fn layer_norm<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm(candle_nn::layer_norm(size, config, vb)?))
}

/// As [`candle_nn::layer_norm_no_bias`].
pub fn layer_norm_no_bias(size: usize, eps: f64, vb: VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm(candle_nn::layer_norm_no_bias(size, eps, vb)?))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn outputs_are_those_of_candle() {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        let x = Tensor::from_vec(crate::testing::noise(6 * 19, 3), (2, 3, 19), &Device::Cpu).unwrap();
        let floats = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let config = |remove_mean, affine| LayerNormConfig { remove_mean, affine, ..1e-5.into() };
        for config in [config(true, true), config(true, false), config(false, false), config(false, true)] {
            let (ours, theirs) =
                (layer_norm(19, config, vb.clone()).unwrap(), candle_nn::layer_norm(19, config, vb.clone()).unwrap());
            let (got, want) = (floats(ours.forward(&x).unwrap()), floats(theirs.forward(&x).unwrap()));
            crate::testing::assert_close(&format!("{config:?}"), &got, &want, 1e-6);
        }
        assert!(layer_norm_no_bias(19, 1e-5, vb).unwrap().bias().is_none());
    }
}
