//! Gradients before a step: their sums, and clipping of their norm as PyTorch computes it.

use candle_core::Tensor;
use mblm_core::parallel::MIN_PARALLEL;
use mblm_core::simd::{self, vectorize};
use mblm_core::{Param, ParamStore};
use rayon::prelude::*;

use super::tensors::sums_of_tensors;
use crate::error::Result;

/// What [`clip_grad_norm`] found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradNorm {
    /// The Euclidean norm of all gradients together, before clipping. Not finite if any gradient is not.
    pub norm: f64,
    /// The mean over parameters of the mean of each one's gradient, before clipping: the reference package's
    /// `avg_grad`.
    pub mean: f64,
    /// What the gradients were multiplied by, at most 1.
    pub factor: f64,
}

/// Scales all gradients so that their common norm is at most `max_norm`: by `max_norm / (norm + 1e-6)` if that is
/// less than 1. An infinite `max_norm` only measures.
pub fn clip_grad_norm(store: &ParamStore, max_norm: f64) -> Result<GradNorm> {
    let (mut squares, mut means, mut count) = (0.0, 0.0, 0u64);
    let found = grad_sums(store)?;
    for (param, (sum, square)) in store.iter().zip(found).filter_map(|(param, sums)| Some((param, sums?))) {
        squares += square;
        means += sum / param.len() as f64;
        count += 1;
    }
    let norm = f64::sqrt(squares);
    let coefficient = max_norm / (norm + 1e-6);
    let factor = if norm.is_finite() && coefficient < 1.0 { coefficient } else { 1.0 };
    scale_grads(store, factor)?;
    Ok(GradNorm { norm, mean: means / count.max(1) as f64, factor })
}

/// The sum and the sum of squares of each parameter's gradient, in the order of the store; none for one without.
/// From a device, all of them come in one copy.
pub(crate) fn grad_sums(store: &ParamStore) -> Result<Vec<Option<(f64, f64)>>> {
    let tensors: Vec<Option<Tensor>> = store.iter().map(|param| param.grad().tensor().cloned()).collect();
    let mut of_tensors = sums_of_tensors(tensors.iter().flatten())?.into_iter();
    let sums_of = |(param, tensor): (&std::sync::Arc<Param>, &Option<Tensor>)| match tensor {
        Some(_) => of_tensors.next(),
        None => Some(param.grad()).filter(|grad| !grad.is_empty()).map(|grad| sums(&grad)),
    };
    Ok(store.iter().zip(&tensors).map(sums_of).collect())
}

/// Multiplies all gradients by `factor`.
pub fn scale_grads(store: &ParamStore, factor: f64) -> Result<()> {
    if factor == 1.0 {
        return Ok(());
    }
    for param in store.iter() {
        let mut grad = param.grad();
        match grad.tensor().map(|sum| sum.affine(factor, 0.0)) {
            Some(scaled) => grad.set_tensor(scaled?),
            None => {
                let scale = |chunk: &mut [f32]| vectorize(|| simd::scale(factor as f32, chunk));
                grad.par_chunks_mut(MIN_PARALLEL).for_each(scale);
            }
        }
    }
    Ok(())
}

/// The sum and the sum of squares, chunk by chunk: the same bits on any number of threads.
pub(crate) fn sums(grad: &[f32]) -> (f64, f64) {
    let partial: Vec<(f64, f64)> =
        grad.par_chunks(MIN_PARALLEL).map(|chunk| vectorize(|| simd::sum_and_squares(chunk))).collect();
    partial.iter().fold((0.0, 0.0), |(sum, square), part| (sum + part.0, square + part.1))
}

/// The first parameter, by name, for which `part` holds an infinity or a NaN.
pub fn first_non_finite(store: &ParamStore, part: impl Fn(&Param) -> bool) -> Option<String> {
    store.iter().find(|param| !part(param)).map(|param| param.name().to_string())
}

#[cfg(test)]
mod tests {
    use mblm_core::Init;

    use super::super::tests::{set_grads, store};
    use super::*;

    #[test]
    fn clipping_scales_only_what_is_too_long_and_measures_the_mean() {
        let store = store();
        set_grads(&store, ([3.0, 0.0, 0.0, 1.0], [4.0, 0.0]));
        let norm = clip_grad_norm(&store, f64::INFINITY).unwrap();
        assert_eq!((norm.norm, norm.mean, norm.factor), (26f64.sqrt(), 1.5, 1.0));
        let norm = clip_grad_norm(&store, 2.0).unwrap();
        assert!((norm.factor - 2.0 / (26f64.sqrt() + 1e-6)).abs() < 1e-12);
        assert!((clip_grad_norm(&store, 2.0).unwrap().norm - 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_long_gradient_has_the_norm_of_its_f64_sum() {
        let mut store = ParamStore::new(0);
        let len = 3 * MIN_PARALLEL + 5;
        let param = store.root().param("w", &[len], Init::Const(0.0)).unwrap();
        param.grad_mut().iter_mut().enumerate().for_each(|(i, g)| *g = (i % 7) as f32);
        let want: f64 = (0..len).map(|i| ((i % 7) * (i % 7)) as f64).sum();
        assert_eq!(clip_grad_norm(&store, f64::INFINITY).unwrap().norm, want.sqrt());
    }

    #[test]
    fn a_nan_gradient_shows_in_the_norm_and_is_not_spread() {
        let store = store();
        set_grads(&store, ([1.0, 0.0, 0.0, 0.0], [f32::NAN, 1.0]));
        let norm = clip_grad_norm(&store, 0.5).unwrap();
        assert!(norm.norm.is_nan() && norm.factor == 1.0);
        let found = first_non_finite(&store, |param| param.grad().iter().all(|g| g.is_finite()));
        assert_eq!(found.as_deref(), Some("q.weight"));
    }
}
