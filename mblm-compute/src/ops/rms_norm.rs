//! RMSNorm over the last dimension (Zhang & Sennrich 2019, eq. 4), in the two forms of the field, optionally after a
//! token shift.

use candle_core::{D, Tensor};

use crate::error::Result;
use crate::layer::Dims;
use crate::parallel::{Shared, for_rows, reduce_rows};
use crate::simd::{self, vectorize};

/// Where the epsilon stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Eps {
    /// `x / max(‖x‖ / √D, eps)`, as in MEGABYTE.
    Floor(f32),
    /// `x / √(mean(x²) + eps)`, as in Mamba.
    Inside(f32),
}

/// The definition.
///
/// # Shapes
/// - `x`: `(…, D)`, `gain`: `(D)`; returns `(…, D)`
pub fn rms_norm_composed(x: &Tensor, gain: &Tensor, eps: Eps) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let rms = match eps {
        Eps::Floor(eps) => mean_square.sqrt()?.maximum(eps as f64)?,
        Eps::Inside(eps) => (mean_square + eps as f64)?.sqrt()?,
    };
    Ok(x.broadcast_div(&rms)?.broadcast_mul(gain)?)
}

/// Moves the second half of the channels one position later, zero in front (Peng et al. 2023, token shift).
///
/// # Shapes
/// - `x`: `(B, S, D)`; returns the same
pub fn token_shift_composed(x: &Tensor) -> Result<Tensor> {
    let (_, seq, dim) = x.dims3()?;
    let kept = x.narrow(2, 0, dim.div_ceil(2))?;
    let moved = x.narrow(2, dim.div_ceil(2), dim / 2)?;
    let moved = moved.narrow(1, 0, seq - 1)?.pad_with_zeros(1, 1, 0)?;
    Ok(Tensor::cat(&[&kept, &moved], 2)?)
}

/// The norm of a layer: gain, epsilon, and whether a token shift comes first.
#[derive(Clone, Copy)]
pub struct RmsNorm<'a> {
    /// `(D)`
    pub gain: &'a [f32],
    /// Where the epsilon stands.
    pub eps: Eps,
    /// Whether the second half of the channels is taken from the position before.
    pub shift: bool,
}

/// The two pieces of row `row` after the shift; the second is `None` for zeros.
#[inline(always)]
fn shifted(x: &[f32], row: usize, dims: Dims, shift: bool) -> (&[f32], Option<&[f32]>) {
    let half = if shift { dims.dim.div_ceil(2) } else { dims.dim };
    let kept = &x[row * dims.dim..][..half];
    if half == dims.dim {
        return (kept, Some(&[]));
    }
    let moved = (!row.is_multiple_of(dims.seq)).then(|| &x[(row - 1) * dims.dim + half..row * dims.dim]);
    (kept, moved)
}

impl RmsNorm<'_> {
    /// `1 / rms` of a row, and whether the floor is in force (then it does not depend on the row).
    #[inline(always)]
    fn inverse(&self, sum_of_squares: f32, dim: usize) -> (f32, bool) {
        let mean_square = sum_of_squares / dim as f32;
        match self.eps {
            Eps::Floor(eps) => (1.0 / mean_square.sqrt().max(eps), mean_square.sqrt() < eps),
            Eps::Inside(eps) => (1.0 / (mean_square + eps).sqrt(), false),
        }
    }

    /// # Shapes
    /// - `x`, `y`: `(B, S, D)`; `y` is overwritten
    pub fn forward(&self, x: &[f32], dims: Dims, y: &mut [f32]) {
        let y = Shared::new(y);
        for_rows(dims.rows(), dims.dim, |rows| {
            // SAFETY: ranges of rows do not overlap.
            let y = unsafe { y.slice(rows.start * dims.dim..rows.end * dims.dim) };
            vectorize(
                #[inline(always)]
                || {
                    for (row, y) in rows.zip(y.chunks_exact_mut(dims.dim)) {
                        let (kept, moved) = shifted(x, row, dims, self.shift);
                        let squares = simd::dot(kept, kept) + moved.map_or(0.0, |m| simd::dot(m, m));
                        let (inv, _) = self.inverse(squares, dims.dim);
                        let (y_kept, y_moved) = y.split_at_mut(kept.len());
                        let (gain_kept, gain_moved) = self.gain.split_at(kept.len());
                        scaled(kept, gain_kept, inv, y_kept);
                        match moved {
                            Some(moved) => scaled(moved, gain_moved, inv, y_moved),
                            None => y_moved.fill(0.0),
                        }
                    }
                },
            );
        });
    }

    /// Adds the gradient of the input to `dx` and that of the gain to `dgain`.
    ///
    /// # Shapes
    /// - `x`, `dy`, `dx`: `(B, S, D)`; `dgain`: `(D)`
    pub fn backward(&self, x: &[f32], dims: Dims, dy: &[f32], dx: &mut [f32], dgain: &mut [f32]) {
        let shared = Shared::new(dx);
        // By sequences, since a shifted row writes to the row before.
        reduce_rows(dims.batch, dims.seq * dims.dim, dgain, |sequences, dgain| {
            let rows = sequences.start * dims.seq..sequences.end * dims.seq;
            // SAFETY: ranges of sequences do not overlap.
            let dx = unsafe { shared.slice(rows.start * dims.dim..rows.end * dims.dim) };
            let x = &x[rows.start * dims.dim..rows.end * dims.dim];
            let dy = &dy[rows.start * dims.dim..rows.end * dims.dim];
            vectorize(
                #[inline(always)]
                || {
                    for row in 0..rows.len() {
                        self.backward_row(x, row, dims, &dy[row * dims.dim..][..dims.dim], dx, dgain);
                    }
                },
            );
        });
    }

    /// With `u = gain · dy` and `r = 1/rms`: `dx = r u - x r³ (x·u) / D`, `dgain += dy · x r`.
    #[inline(always)]
    fn backward_row(&self, x: &[f32], row: usize, dims: Dims, dy: &[f32], dx: &mut [f32], dgain: &mut [f32]) {
        let (kept, moved) = shifted(x, row, dims, self.shift);
        let half = kept.len();
        let squares = simd::dot(kept, kept) + moved.map_or(0.0, |m| simd::dot(m, m));
        let (inv, floored) = self.inverse(squares, dims.dim);
        let mut along = dot3(kept, &dy[..half], &self.gain[..half]);
        if let Some(moved) = moved {
            along += dot3(moved, &dy[half..], &self.gain[half..]);
        }
        let pull = if floored { 0.0 } else { along * inv * inv * inv / dims.dim as f32 };
        let here = row * dims.dim;
        row_grad(kept, &dy[..half], &self.gain[..half], inv, pull, &mut dx[here..here + half], &mut dgain[..half]);
        if let Some(moved) = moved.filter(|m| !m.is_empty()) {
            let before = here - dims.dim + half;
            let dx = &mut dx[before..here];
            row_grad(moved, &dy[half..], &self.gain[half..], inv, pull, dx, &mut dgain[half..]);
        }
    }
}

#[inline(always)]
fn scaled(x: &[f32], gain: &[f32], inv: f32, y: &mut [f32]) {
    for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
        *y = x * inv * gain;
    }
}

#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (a, b, c) = (a.chunks(16), b.chunks(16), c.chunks(16));
    for ((a, b), c) in a.zip(b).zip(c) {
        for (((lane, a), b), c) in lanes.iter_mut().zip(a).zip(b).zip(c) {
            *lane = (a * b).mul_add(*c, *lane);
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn row_grad(x: &[f32], dy: &[f32], gain: &[f32], inv: f32, pull: f32, dx: &mut [f32], dgain: &mut [f32]) {
    for ((((x, dy), gain), dx), dgain) in x.iter().zip(dy).zip(gain).zip(dx).zip(dgain) {
        *dx += dy * gain * inv - x * pull;
        *dgain += dy * x * inv;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device};

    use super::*;
    use crate::layer::{Context, Layer, param_like};
    use crate::mode::Mode;
    use crate::param::{Init, Param, ParamStore};
    use crate::testing::{check_layer, perturb};

    struct Norm {
        gain: Arc<Param>,
        eps: Eps,
        shift: bool,
    }

    impl Layer for Norm {
        type Tape = ();
        fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
            let x = if self.shift { token_shift_composed(x)? } else { x.clone() };
            rms_norm_composed(&x, &param_like(&self.gain, &x, mode)?, self.eps)
        }
        fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) {
            RmsNorm { gain: &self.gain.values(), eps: self.eps, shift: self.shift }.forward(x, context.dims, y);
        }
        fn backward(&self, x: &[f32], context: Context, _: (), dy: &[f32], dx: &mut [f32]) {
            dx.fill(0.0);
            let norm = RmsNorm { gain: &self.gain.values(), eps: self.eps, shift: self.shift };
            norm.backward(x, context.dims, dy, dx, &mut self.gain.grad_mut());
        }
    }

    #[test]
    fn fused_equals_composed() {
        for (batch, seq, dim) in [(1, 1, 2), (3, 7, 33), (40, 9, 64)] {
            for eps in [Eps::Floor(1e-8), Eps::Floor(0.6), Eps::Inside(1e-5)] {
                for shift in [false, true] {
                    let mut store = ParamStore::new(0);
                    let gain = store.root().param("g", &[dim], Init::Const(1.0)).unwrap();
                    perturb(&store);
                    let layer = Arc::new(Norm { gain, eps, shift });
                    if seq == 1 && shift {
                        continue; // half of the gain then sees zeros only
                    }
                    check_layer(&layer, &store, Dims { batch, seq, dim }, None, Mode::train(0));
                }
            }
        }
    }

    #[test]
    fn a_shifted_row_takes_its_second_half_from_the_row_before() {
        let x = Tensor::arange(1f32, 9., &Device::Cpu).unwrap().reshape((1, 2, 4)).unwrap();
        let y = token_shift_composed(&x).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(y.flatten_all().unwrap().to_vec1::<f32>().unwrap(), [1., 2., 0., 0., 5., 6., 3., 4.]);
    }
}
