//! The gated norm of Mamba-2 (Dao & Gu 2024, §7.1): RMSNorm of `y silu(z)` over the last dimension.

use candle_core::Tensor;

use super::rms_norm::{Eps, rms_norm_composed};
use crate::buffer::Buffer;
use crate::error::Result;
use crate::parallel::{for_rows, reduce_rows};
use crate::rows::{Rows, RowsMut};
use crate::simd::{self, sigmoid, silu, vectorize};

/// The definition.
///
/// # Shapes
/// - `y`, `z`: `(…, E)`, `gain`: `(E)`; returns `(…, E)`
pub fn gated_rms_norm_composed(y: &Tensor, z: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor> {
    rms_norm_composed(&(y * z.silu()?)?, gain, Eps::Inside(eps))
}

/// The norm's gain and epsilon.
#[derive(Clone, Copy)]
pub struct GatedRmsNorm<'a> {
    /// `(E)`
    pub gain: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

impl GatedRmsNorm<'_> {
    #[inline(always)]
    fn inverse(&self, gated: &[f32]) -> f32 {
        1.0 / (simd::dot(gated, gated) / gated.len() as f32 + self.eps).sqrt()
    }

    /// # Shapes
    /// - `y`, `out`: `(R, E)`, `z`: `(R, E)`; `out` is overwritten
    pub fn forward(&self, y: &[f32], z: Rows, out: &mut [f32]) {
        let (inner, y) = (self.gain.len(), Rows::new(y, self.gain.len()));
        let out = RowsMut::new(out, inner);
        for_rows(y.rows(), inner, |rows| {
            vectorize(
                #[inline(always)]
                || {
                    for row in rows {
                        // SAFETY: ranges of rows do not overlap.
                        let out = unsafe { out.row(row, 0..inner) };
                        out.iter_mut().zip(y.row(row)).zip(z.row(row)).for_each(|((out, y), z)| *out = y * silu(*z));
                        let inv = self.inverse(out);
                        out.iter_mut().zip(self.gain).for_each(|(out, gain)| *out *= inv * gain);
                    }
                },
            );
        });
    }

    /// Turns the gradient of the output, `dout`, into that of `y` in place, writes that of the gate to `dz` and adds
    /// that of the gain to `dgain`.
    ///
    /// # Shapes
    /// - `y`, `dout`: `(R, E)`, `z`, `dz`: `(R, E)`, `dgain`: `(E)`
    pub fn backward(&self, y: &[f32], z: Rows, dout: &mut [f32], dz: RowsMut, dgain: &mut [f32]) {
        let (inner, y) = (self.gain.len(), Rows::new(y, self.gain.len()));
        let dout = RowsMut::new(dout, inner);
        reduce_rows(y.rows(), inner, dgain, |rows, dgain| {
            let mut gated = Buffer::take(inner);
            vectorize(
                #[inline(always)]
                || {
                    for row in rows {
                        // SAFETY: ranges of rows do not overlap.
                        let (dout, dz) = unsafe { (dout.row(row, 0..inner), dz.row(row, 0..inner)) };
                        self.backward_row(y.row(row), z.row(row), &mut gated, dout, dz, dgain);
                    }
                },
            );
        });
    }

    /// With `g = y silu(z)`, `u = gain · dout` and `r = 1/rms`: `dg = r u - g r³ (g·u) / E`.
    #[inline(always)]
    fn backward_row(
        &self,
        y: &[f32],
        z: &[f32],
        gated: &mut [f32],
        dout: &mut [f32],
        dz: &mut [f32],
        dgain: &mut [f32],
    ) {
        gated.iter_mut().zip(y).zip(z).for_each(|((g, y), z)| *g = y * silu(*z));
        let inv = self.inverse(gated);
        for (((dgain, dout), g), gain) in dgain.iter_mut().zip(dout.iter_mut()).zip(&*gated).zip(self.gain) {
            *dgain += *dout * g * inv;
            *dout *= gain;
        }
        let pull = simd::dot(dout, gated) * inv * inv * inv / gated.len() as f32;
        for ((((dy, dz), y), z), g) in dout.iter_mut().zip(dz).zip(y).zip(z).zip(gated) {
            let (dg, s) = (*dy * inv - *g * pull, sigmoid(*z));
            *dy = dg * z * s;
            *dz = dg * y * s * (1.0 + z * (1.0 - s));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::layer::{Context, Dims, Layer, param_like};
    use crate::mode::Mode;
    use crate::parallel::Shared;
    use crate::param::{Init, Param, ParamStore};
    use crate::testing::{check_layer, perturb};

    /// Inputs packed into one row: y, z. The output is `(out, 0)`.
    struct Packed(Arc<Param>);

    impl Packed {
        fn y(&self, packed: &[f32]) -> Vec<f32> {
            packed.chunks_exact(2 * self.0.len()).flat_map(|row| row[..self.0.len()].to_vec()).collect()
        }
    }

    impl Layer for Packed {
        type Tape = ();
        fn composed(&self, x: &Tensor, _: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
            let e = self.0.len();
            let (y, z) = (x.narrow(2, 0, e)?, x.narrow(2, e, e)?);
            Ok(gated_rms_norm_composed(&y, &z, &param_like(&self.0, x, mode)?, 1e-5)?.pad_with_zeros(2, 0, e)?)
        }
        fn forward(&self, x: &[f32], _: Context, out: &mut [f32]) {
            let (e, gain) = (self.0.len(), self.0.values());
            let mut narrow = vec![f32::NAN; x.len() / 2];
            let norm = GatedRmsNorm { gain: &gain, eps: 1e-5 };
            norm.forward(&self.y(x), Rows::columns(x, 2 * e, e..2 * e), &mut narrow);
            out.fill(0.0);
            out.chunks_exact_mut(2 * e).zip(narrow.chunks_exact(e)).for_each(|(o, n)| o[..e].copy_from_slice(n));
        }
        fn backward(&self, x: &[f32], _: Context, (): (), dout: &[f32], dx: &mut [f32]) {
            let (e, gain, mut dy) = (self.0.len(), self.0.values(), self.y(dout));
            let norm = GatedRmsNorm { gain: &gain, eps: 1e-5 };
            let dz = RowsMut::columns(Shared::new(dx), 2 * e, e..2 * e);
            norm.backward(&self.y(x), Rows::columns(x, 2 * e, e..2 * e), &mut dy, dz, &mut self.0.grad_mut());
            dx.chunks_exact_mut(2 * e).zip(dy.chunks_exact(e)).for_each(|(d, n)| d[..e].copy_from_slice(n));
        }
    }

    #[test]
    fn fused_equals_composed() {
        for (batch, seq, inner) in [(1, 1, 1), (2, 5, 33), (40, 9, 64)] {
            let mut store = ParamStore::new(0);
            let gain = store.root().param("g", &[inner], Init::Const(1.0)).unwrap();
            perturb(&store);
            check_layer(&Arc::new(Packed(gain)), &store, Dims { batch, seq, dim: 2 * inner }, None, Mode::train(0));
        }
    }
}
