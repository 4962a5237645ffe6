//! Adam and sums of gradients over tensors, where parameters lie on a device or are `f64`.

use candle_core::{DType, Tensor};
use mblm_core::Param;

use super::{Moments, Scalars};
use crate::error::Result;

/// The moments of a parameter as tensors of its place; none before its first gradient.
#[derive(Clone, Debug, Default)]
pub(super) struct TensorMoments(Option<[Tensor; 2]>);

impl TensorMoments {
    /// Moments that were saved.
    pub(super) fn new(param: &Param, moments: &Moments) -> Result<Self> {
        let place = |values: &[f32]| {
            let values = Tensor::from_slice(values, param.shape(), &candle_core::Device::Cpu)?;
            values.to_dtype(param.place().dtype)?.to_device(&param.place().device)
        };
        Ok(TensorMoments(Some([place(&moments.m)?, place(&moments.v)?])))
    }

    /// A copy of the values.
    pub(super) fn read(&self, param: &Param) -> Result<Moments> {
        let Some(moments) = &self.0 else {
            return Ok(Moments { m: vec![0.0; param.len()], v: vec![0.0; param.len()] });
        };
        let read = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        Ok(Moments { m: read(&moments[0])?, v: read(&moments[1])? })
    }

    /// Changes the parameter and its moments by its gradient. Without a gradient nothing changes before the first one,
    /// and after it the gradient counts as 0.
    pub(super) fn update(&mut self, param: &Param, s: &Scalars) -> Result<()> {
        let p = param.tensor(mblm_core::Mode::Eval);
        let grad = param.grad().tensor().cloned();
        let (g, [m, v]) = match (grad, self.0.take()) {
            (None, None) => return Ok(()),
            (Some(g), None) => (g, [p.zeros_like()?, p.zeros_like()?]),
            (Some(g), Some(moments)) => (g, moments),
            (None, Some(moments)) => (p.zeros_like()?, moments),
        };
        let m = (&m + ((&g - &m)? * f64::from(s.one_minus_beta1))?)?;
        let v = ((v * f64::from(s.beta2))? + (g.sqr()? * f64::from(s.one_minus_beta2))?)?;
        let root = v.sqrt()?.affine(1.0 / f64::from(s.root_bias2), f64::from(s.eps))?;
        let change = (&m / root)?;
        param.set(&((p * f64::from(s.decay))? - (change * f64::from(s.step_size))?)?)?;
        self.0 = Some([m, v]);
        Ok(())
    }
}

/// The sum and the sum of squares of each tensor, in one copy from the device.
pub(super) fn sums_of_tensors<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Vec<(f64, f64)>> {
    let mut sums = Vec::new();
    for tensor in tensors {
        let tensor = tensor.flatten_all()?;
        sums.extend([tensor.sum_all()?, tensor.sqr()?.sum_all()?]);
    }
    if sums.is_empty() {
        return Ok(vec![]);
    }
    let sums = Tensor::stack(&sums, 0)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    Ok(sums.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}
