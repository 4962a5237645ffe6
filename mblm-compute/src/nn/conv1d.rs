//! Convolution along positions, as [`candle_nn::Conv1d`] with the right gradient. candle's own gives a wrong gradient of
//! the kernel for batches of more than one sequence and channel: it passes transposed views to a kernel that takes them
//! for contiguous.

use candle_core::{Module, Result, Tensor, bail};
pub use candle_nn::Conv1dConfig;
use candle_nn::{Init, VarBuilder};

use crate::transfer;

/// A convolution of `(batch, channels, length)`: the sum over its taps, as one product of matrices.
#[derive(Clone, Debug)]
pub struct Conv1d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv1dConfig,
}

impl Conv1d {
    /// A convolution with these weights.
    ///
    /// # Shapes
    /// - `weight`: `(out_channels, in_channels / groups, kernel_size)`, `bias`: `(out_channels)`
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv1dConfig) -> Self {
        Conv1d { weight, bias, config }
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv1dConfig {
        &self.config
    }

    /// `(out_channels, in_channels / groups, kernel_size)`
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `(out_channels)`
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What each output position sees of `x`, already padded: `(batch, channels * taps, positions)`.
    fn windows(&self, x: &Tensor, taps: usize) -> Result<Tensor> {
        let (batch, channels, long) = x.dims3()?;
        let Conv1dConfig { stride, dilation, .. } = self.config;
        let reach = dilation * (taps - 1) + 1;
        if long < reach {
            bail!("conv1d: a kernel that reaches {reach} positions does not fit in {long}")
        }
        let positions = (long - reach) / stride + 1;
        let at_tap = |tap: usize| match stride {
            1 => x.narrow(2, tap * dilation, positions),
            _ => {
                let seen: Vec<u32> = (0..positions).map(|i| (i * stride + tap * dilation) as u32).collect();
                x.contiguous()?.index_select(&transfer::to_tensor(&seen, positions, x.device())?, 2)
            }
        };
        let taps = (0..taps).map(at_tap).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&taps, 2)?.reshape((batch, channels * taps.len(), positions))
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out, _, taps) = self.weight.dims3()?;
        let Conv1dConfig { padding, groups, .. } = self.config;
        let x = if padding > 0 { x.pad_with_zeros(2, padding, padding)? } else { x.clone() };
        let group = |(x, weight): (Tensor, Tensor)| {
            let windows = self.windows(&x, taps)?;
            let (batch, seen, _) = windows.dims3()?;
            let weight = weight.reshape((1, weight.dim(0)?, seen))?.broadcast_as((batch, weight.dim(0)?, seen))?;
            weight.contiguous()?.matmul(&windows)
        };
        let parts = x.chunk(groups, 1)?.into_iter().zip(self.weight.chunk(groups, 0)?).map(group);
        let y = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.reshape((1, out, 1))?),
            None => Ok(y),
        }
    }
}

/// As [`candle_nn::conv1d`].
pub fn conv1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let bound = 1.0 / (in_channels as f64).sqrt();
    let bias = vb.get_with_hints(out_channels, "bias", Init::Uniform { lo: -bound, up: bound })?;
    let Conv1d { weight, .. } = conv1d_no_bias(in_channels, out_channels, kernel_size, config, vb)?;
    Ok(Conv1d::new(weight, Some(bias), config))
}

/// As [`candle_nn::conv1d_no_bias`].
pub fn conv1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let shape = (out_channels, in_channels / config.groups, kernel_size);
    let weight = vb.get_with_hints(shape, "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Ok(Conv1d::new(weight, None, config))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::testing::{assert_close, noise};

    #[test]
    fn outputs_are_those_of_candle_and_the_gradient_is_that_of_differences() {
        let tensor = |shape: &[usize], seed| {
            let values = noise(shape.iter().product(), seed);
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
        };
        let flat = |t: &Tensor| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (padding, stride, dilation, groups) in
            [(0, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 1), (3, 2, 2, 4), (2, 3, 2, 2)]
        {
            let config = Conv1dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let (x, bias) = (Var::from_tensor(&tensor(&[3, 8, 11], 1)).unwrap(), tensor(&[4], 3));
            let weight = Var::from_tensor(&tensor(&[4, 8 / groups, 3], 2)).unwrap();
            let ours = Conv1d::new(weight.as_tensor().clone(), Some(bias.clone()), config);
            let candles = candle_nn::Conv1d::new(weight.as_tensor().detach(), Some(bias), config);
            let y = ours.forward(&x).unwrap();
            assert_close(&format!("{config:?}"), &flat(&y), &flat(&candles.forward(&x.detach()).unwrap()), 1e-6);
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            let (dx, dw) = (grads.get(&x).unwrap(), grads.get(&weight).unwrap());
            let loss = |x: &Tensor, weight: Tensor| {
                let y = Conv1d::new(weight, ours.bias.clone(), config).forward(x).unwrap();
                y.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
            };
            let (u, v) = (tensor(x.dims(), 5), tensor(weight.dims(), 6));
            let moved = |step: f64| {
                loss(
                    &(x.as_tensor() + (&u * step).unwrap()).unwrap(),
                    (weight.as_tensor() + (&v * step).unwrap()).unwrap(),
                )
            };
            let along = |grad: &Tensor, direction: &Tensor| {
                (grad * direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap()
            };
            let (found, want) = ((moved(1e-4) - moved(-1e-4)) / 2e-4, along(dx, &u) + along(dw, &v));
            assert!((found - want).abs() < 1e-5 * want.abs(), "{config:?}: {found} and {want}");
        }
    }
}
