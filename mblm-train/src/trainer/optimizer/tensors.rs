//! Adam and sums of gradients over tensors, where parameters lie on a device or are `f64`.

use candle_core::{DType, Tensor};
use mblm_core::Param;
use mblm_core::ops::adam::Step;
use mblm_core::transfer;

use super::Moments;
use crate::error::{Error, Result};

/// The moments of a parameter as tensors of its place; none before its first gradient.
#[derive(Clone, Debug, Default)]
pub(super) struct TensorMoments(Option<[Tensor; 2]>);

impl TensorMoments {
    /// Moments that were saved.
    pub(super) fn new(param: &Param, moments: &Moments) -> Result<Self> {
        let place = |values: &[f32]| {
            let place = param.place();
            Ok::<_, Error>(transfer::to_tensor(values, param.shape(), &place.device)?.to_dtype(place.dtype)?)
        };
        Ok(TensorMoments(Some([place(&moments.m)?, place(&moments.v)?])))
    }

    /// A copy of the values.
    pub(super) fn read(&self, param: &Param) -> Result<Moments> {
        let Some(moments) = &self.0 else {
            return Ok(Moments { m: vec![0.0; param.len()], v: vec![0.0; param.len()] });
        };
        Ok(Moments { m: transfer::to_vec(&moments[0])?, v: transfer::to_vec(&moments[1])? })
    }

    /// Changes the parameter and its moments by its gradient. Without a gradient nothing changes before the first one,
    /// and after it the gradient counts as 0.
    pub(super) fn update(&mut self, param: &Param, s: &Step) -> Result<()> {
        let p = param.tensor(mblm_core::Mode::Eval);
        let grad = param.grad().tensor().cloned();
        let (g, [m, v]) = match (grad, self.0.take()) {
            (None, None) => return Ok(()),
            (Some(g), None) => (g, [p.zeros_like()?, p.zeros_like()?]),
            (Some(g), Some(moments)) => (g, moments),
            (None, Some(moments)) => (p.zeros_like()?, moments),
        };
        #[cfg(feature = "cuda")]
        if mblm_core::cuda::available(&p) {
            mblm_core::cuda::adam(&p, &g, &m, &v, s)?;
            param.changed();
            self.0 = Some([m, v]);
            return Ok(());
        }
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
    let parts = tensors.map(sums).collect::<Result<Vec<_>>>()?;
    if parts.is_empty() {
        return Ok(vec![]);
    }
    let counts: Vec<usize> = parts.iter().map(|parts| parts.elem_count() / 2).collect();
    let all = transfer::to_vec::<f64>(&Tensor::cat(&parts, 0)?)?;
    let mut all = all.chunks_exact(2);
    let sum_of = |count: &usize| {
        let parts = all.by_ref().take(*count);
        parts.fold((0.0, 0.0), |(sum, squares), part| (sum + part[0], squares + part[1]))
    };
    Ok(counts.iter().map(sum_of).collect())
}

/// The sum and the sum of squares in parts to be added up, `(parts, 2)`, in `f64`.
fn sums(tensor: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if mblm_core::cuda::available(tensor) {
        return Ok(mblm_core::cuda::sums(tensor)?);
    }
    let tensor = tensor.flatten_all()?;
    let sums = Tensor::stack(&[tensor.sum_all()?, tensor.sqr()?.sum_all()?], 0)?;
    Ok(sums.to_dtype(DType::F64)?.reshape((1, 2))?)
}
