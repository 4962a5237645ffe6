//! LayerNorm over the last dimension (Ba et al. 2016), PyTorch's: biased variance, eps inside the root.

use candle_core::{D, Tensor};

use crate::error::Result;
use crate::parallel::{Shared, for_rows, reduce_rows};
use crate::simd::{self, vectorize};

/// PyTorch's default.
pub const EPS: f32 = 1e-5;

/// The definition.
///
/// # Shapes
/// - `x`: `(…, D)`, `weight`, `bias`: `(D)`; returns `(…, D)`
pub fn layer_norm_composed(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps as f64)?.sqrt()?;
    Ok(centred.broadcast_div(&deviation)?.broadcast_mul(weight)?.broadcast_add(bias)?)
}

/// Mean and inverse standard deviation of a row.
#[inline(always)]
fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = simd::sum(x) / x.len() as f32;
    let mut lanes = [0.0f32; 16];
    for chunk in x.chunks(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = (x - mean).mul_add(x - mean, *lane);
        }
    }
    (mean, 1.0 / (simd::sum(&lanes) / x.len() as f32 + eps).sqrt())
}

/// # Shapes
/// - `x`, `y`: `(R, D)`, `weight`, `bias`: `(D)`; `y` is overwritten
pub fn forward(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
    let dim = weight.len();
    let rows = x.len() / dim;
    let y = Shared::new(y);
    for_rows(rows, dim, |range| {
        // SAFETY: ranges of rows do not overlap.
        let y = unsafe { y.slice(range.start * dim..range.end * dim) };
        let x = &x[range.start * dim..range.end * dim];
        vectorize(
            #[inline(always)]
            || {
                for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact_mut(dim)) {
                    let (mean, inverse) = moments(x, eps);
                    for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = ((x - mean) * inverse).mul_add(*weight, *bias);
                    }
                }
            },
        );
    });
}

/// Turns the gradient of the output, `dy`, into that of the input, in place; adds to `dweight` and `dbias`.
///
/// # Shapes
/// - `x`, `dy`: `(R, D)`; `weight`, `dweight`, `dbias`: `(D)`
pub fn backward(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32], dweight: &mut [f32], dbias: &mut [f32]) {
    let dim = weight.len();
    let shared = Shared::new(dy);
    let mut sums = vec![0.0; 2 * dim];
    reduce_rows(x.len() / dim, dim, &mut sums, |range, sums| {
        // SAFETY: ranges of rows do not overlap.
        let dy = unsafe { shared.slice(range.start * dim..range.end * dim) };
        let (dweight, dbias) = sums.split_at_mut(dim);
        let x = &x[range.start * dim..range.end * dim];
        vectorize(
            #[inline(always)]
            || {
                for (x, dy) in x.chunks_exact(dim).zip(dy.chunks_exact_mut(dim)) {
                    row_backward(x, weight, eps, dy, dweight, dbias);
                }
            },
        );
    });
    simd::add(&sums[..dim], dweight);
    simd::add(&sums[dim..], dbias);
}

/// With `n = (x - mean) / σ` and `u = weight · dy`: `dx = (u - mean(u) - n mean(u n)) / σ`.
#[inline(always)]
fn row_backward(x: &[f32], weight: &[f32], eps: f32, dy: &mut [f32], dweight: &mut [f32], dbias: &mut [f32]) {
    let (mean, inverse) = moments(x, eps);
    let (mut along, mut total) = ([0.0f32; 16], [0.0f32; 16]);
    for ((x, weight), dy) in x.chunks(16).zip(weight.chunks(16)).zip(dy.chunks(16)) {
        for (lane, ((x, weight), dy)) in x.iter().zip(weight).zip(dy).enumerate() {
            total[lane] += weight * dy;
            along[lane] += weight * dy * (x - mean);
        }
    }
    let count = x.len() as f32;
    let (total, along) = (simd::sum(&total) / count, simd::sum(&along) * inverse / count);
    for ((((x, weight), dy), dweight), dbias) in x.iter().zip(weight).zip(dy).zip(dweight).zip(dbias) {
        let n = (x - mean) * inverse;
        *dweight += *dy * n;
        *dbias += *dy;
        *dy = (weight * *dy - total - n * along) * inverse;
    }
}
