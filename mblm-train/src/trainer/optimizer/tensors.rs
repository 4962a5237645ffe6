//! AdamW, Muon and sums of gradients over tensors, where parameters lie on a device or are `f64`.

use candle_core::{DType, Tensor};
use mblm_core::ops::adam::Step;
use mblm_core::ops::newton_schulz::newton_schulz_composed;
use mblm_core::{Mode, Param, transfer};

use super::{Moments, muon};
use crate::error::{Error, Result};

/// The moments of a parameter as tensors of its place; none before its first gradient.
#[derive(Clone, Debug, Default)]
pub(super) struct TensorMoments {
    m: Option<Tensor>,
    v: Option<Tensor>,
}

impl TensorMoments {
    /// Moments that were saved.
    pub(super) fn new(param: &Param, moments: &Moments) -> Result<Self> {
        let place = |values: &[f32]| {
            let place = param.place();
            Ok::<_, Error>(transfer::to_tensor(values, param.shape(), &place.device)?.to_dtype(place.dtype)?)
        };
        Ok(TensorMoments { m: Some(place(&moments.m)?), v: moments.v.as_deref().map(place).transpose()? })
    }

    /// A copy of the values; Muon has no second moment.
    pub(super) fn read(&self, param: &Param, is_muon: bool) -> Result<Moments> {
        let values = |moment: &Option<Tensor>| match moment {
            Some(moment) => Ok(transfer::to_vec(moment)?),
            None => Ok::<_, Error>(vec![0.0; param.len()]),
        };
        let v = if is_muon { None } else { Some(values(&self.v)?) };
        Ok(Moments { m: values(&self.m)?, v })
    }

    /// The parameter and its gradient. Without a gradient nothing changes before the first one, and after it the gradient
    /// counts as 0.
    fn operands(&self, param: &Param) -> Result<Option<(Tensor, Tensor)>> {
        let p = param.tensor(Mode::Eval);
        let grad = param.grad().tensor().cloned();
        Ok(match (grad, &self.m) {
            (None, None) => None,
            (Some(g), _) => Some((p, g)),
            (None, Some(_)) => Some((p.clone(), p.zeros_like()?)),
        })
    }

    /// Changes the parameter and its moments by its gradient, as AdamW does.
    pub(super) fn adam(&mut self, param: &Param, s: &Step) -> Result<()> {
        let Some((p, g)) = self.operands(param)? else { return Ok(()) };
        let zeros = |moment: Option<Tensor>| moment.map_or_else(|| p.zeros_like(), Ok);
        let (m, v) = (zeros(self.m.take())?, zeros(self.v.take())?);
        #[cfg(feature = "cuda")]
        if mblm_core::cuda::available(&p) {
            mblm_core::cuda::adam(&p, &g, &m, &v, s)?;
            param.changed();
            (self.m, self.v) = (Some(m), Some(v));
            return Ok(());
        }
        let m = (&m + ((&g - &m)? * f64::from(s.one_minus_beta1))?)?;
        let v = ((v * f64::from(s.beta2))? + (g.sqr()? * f64::from(s.one_minus_beta2))?)?;
        let root = v.sqrt()?.affine(1.0 / f64::from(s.root_bias2), f64::from(s.eps))?;
        let change = (&m / root)?;
        param.set(&((p * f64::from(s.decay))? - (change * f64::from(s.step_size))?)?)?;
        (self.m, self.v) = (Some(m), Some(v));
        Ok(())
    }

    /// Changes a matrix and its momentum by its gradient, as Muon does.
    pub(super) fn muon(&mut self, param: &Param, s: &muon::Step) -> Result<()> {
        let Some((p, g)) = self.operands(param)? else { return Ok(()) };
        let m = self.m.take().map_or_else(|| p.zeros_like(), Ok)?;
        let toward_gradient = |m: &Tensor| m + ((&g - m)? * f64::from(s.one_minus_momentum))?;
        let m = toward_gradient(&m)?;
        let update = newton_schulz_composed(&toward_gradient(&m)?)?;
        param.set(&((p * f64::from(s.decay))? - (update * f64::from(s.step_size))?)?)?;
        self.m = Some(m);
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
