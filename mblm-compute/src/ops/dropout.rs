//! Dropout (Srivastava et al. 2014) with a mask computed from element numbers.

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::mode::Dropout;
use crate::parallel::{Shared, for_rows};
use crate::simd::vectorize;
use crate::transfer;

/// The definition: `x` times the mask.
pub fn dropout_composed(x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    match dropout {
        Some(dropout) => Ok((x * factors(dropout, x.dims(), x.device())?.to_dtype(x.dtype())?)?),
        None => Ok(x.clone()),
    }
}

/// The factors of elements of this shape in `f32`. A card computes them itself.
pub fn factors(dropout: Dropout, shape: &[usize], device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return crate::cuda::dropout_factors(dropout, shape, device);
    }
    made_at(device, shape, (0..shape.iter().product()).map(|i| dropout.factor(i)))
}

/// Factors that the CPU computes: in place if that is the device.
pub(crate) fn made_at(device: &Device, shape: &[usize], factors: impl Iterator<Item = f32>) -> Result<Tensor> {
    let factors: Vec<f32> = factors.collect();
    match device {
        Device::Cpu => Ok(Tensor::from_vec(factors, shape, &Device::Cpu)?),
        _ => transfer::to_tensor(&factors, shape, device),
    }
}

/// Multiplies `x` by the mask, in place. Its own backward.
pub fn apply(dropout: Dropout, x: &mut [f32]) {
    let len = x.len();
    let x = Shared::new(x);
    for_rows(len, 1, |range| {
        // SAFETY: ranges do not overlap.
        let x = unsafe { x.slice(range.clone()) };
        vectorize(
            #[inline(always)]
            || {
                for (x, i) in x.iter_mut().zip(range) {
                    *x *= dropout.factor(i);
                }
            },
        );
    });
}
