//! RMSNorm as a layer with a parameter: the last one of a stage.

use std::sync::Arc;

use candle_core::Tensor;

use super::on_device;
use super::rms_norm::{Eps, RmsNorm};
use crate::error::Result;
use crate::layer::{Context, Dims, Layer, param_like};
use crate::mode::Mode;
use crate::param::Param;

/// A norm as a layer of its own.
pub struct RmsNormLayer {
    /// `(D)`
    pub gain: Arc<Param>,
    /// Where the epsilon stands.
    pub eps: Eps,
}

impl RmsNormLayer {
    fn kernel<'a>(&self, gain: &'a [f32]) -> RmsNorm<'a> {
        RmsNorm { gain, eps: self.eps, shift: false }
    }

    /// One row at a time, for decoders.
    pub fn step(&self, x: &[f32], dim: usize, y: &mut [f32]) {
        let dims = Dims { batch: x.len() / dim, seq: 1, dim };
        self.kernel(&self.gain.values()).forward(x, dims, y);
    }
}

impl Layer for RmsNormLayer {
    type Tape = ();

    fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        on_device::rms_norm(x, &param_like(&self.gain, x, mode)?, self.eps, false)
    }

    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) {
        self.kernel(&self.gain.values()).forward(x, context.dims, y);
    }

    fn backward(&self, x: &[f32], context: Context, (): (), dy: &[f32], dx: &mut [f32]) {
        dx.fill(0.0);
        self.kernel(&self.gain.values()).backward(x, context.dims, dy, dx, &mut self.gain.grad_mut());
    }
}
