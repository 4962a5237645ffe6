//! The exact GELU, `x Φ(x)` (Hendrycks & Gimpel 2016, eq. 2), with the dropout that follows it.

use crate::mode::Dropout;
use crate::parallel::{Shared, for_rows};
use crate::simd::{normal_cdf_pdf, vectorize};

/// `y = gelu(x)`, dropped out.
///
/// # Shapes
/// - `x`, `y`: any, the same; `y` is overwritten
pub fn forward(x: &[f32], dropout: Option<Dropout>, y: &mut [f32]) {
    let y = Shared::new(y);
    for_rows(x.len(), 1, |range| {
        // SAFETY: ranges do not overlap.
        let y = unsafe { y.slice(range.clone()) };
        let x = &x[range.clone()];
        vectorize(
            #[inline(always)]
            || {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = x * normal_cdf_pdf(*x).0;
                }
                if let Some(dropout) = dropout {
                    for (y, i) in y.iter_mut().zip(range) {
                        *y *= dropout.factor(i);
                    }
                }
            },
        );
    });
}

/// Turns the gradient of the output, `dy`, into that of the input, in place.
pub fn backward(x: &[f32], dropout: Option<Dropout>, dy: &mut [f32]) {
    let dy = Shared::new(dy);
    for_rows(x.len(), 1, |range| {
        // SAFETY: ranges do not overlap.
        let dy = unsafe { dy.slice(range.clone()) };
        let x = &x[range.clone()];
        vectorize(
            #[inline(always)]
            || {
                for (dy, x) in dy.iter_mut().zip(x) {
                    let (cdf, pdf) = normal_cdf_pdf(*x);
                    *dy *= x.mul_add(pdf, cdf);
                }
                if let Some(dropout) = dropout {
                    for (dy, i) in dy.iter_mut().zip(range) {
                        *dy *= dropout.factor(i);
                    }
                }
            },
        );
    });
}
