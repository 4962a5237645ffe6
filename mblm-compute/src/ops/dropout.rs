//! Dropout (Srivastava et al. 2014) with a mask computed from element numbers.

use candle_core::Tensor;

use crate::error::Result;
use crate::mode::Dropout;
use crate::parallel::{Shared, for_rows};
use crate::simd::vectorize;

/// The definition: `x` times the mask.
pub fn dropout_composed(x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    match dropout {
        Some(dropout) => Ok((x * dropout.tensor(x.dims(), x.device())?.to_dtype(x.dtype())?)?),
        None => Ok(x.clone()),
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
