//! Adam (Kingma & Ba 2015, algorithm 1) with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2), as PyTorch
//! computes it.

use mblm_core::Param;
use mblm_core::ops::adam::Step;
use mblm_core::parallel::MIN_PARALLEL;
use mblm_core::simd::vectorize;
use rayon::prelude::*;

use super::Moments;
use crate::error::Result;

/// What the reference package trains with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamConfig {
    /// The decay of the first moment.
    pub beta1: f64,
    /// The decay of the second moment.
    pub beta2: f64,
    /// Keeps the division finite.
    pub eps: f64,
    /// The share of a decaying parameter that is taken away per unit of learning rate.
    pub weight_decay: f64,
}

impl Default for AdamConfig {
    fn default() -> Self {
        AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 }
    }
}

impl AdamConfig {
    /// The scalars of step `count`, counted from 1, which multiplies a parameter by `decay`.
    pub(super) fn step(&self, count: u64, lr: f64, decay: f64) -> Step {
        let AdamConfig { beta1, beta2, eps, .. } = *self;
        let bias = |beta: f64| 1.0 - beta.powf(count as f64);
        Step {
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            root_bias2: bias(beta2).sqrt() as f32,
            eps: eps as f32,
            step_size: (lr / bias(beta1)) as f32,
            decay: decay as f32,
        }
    }
}

/// Changes a parameter of the CPU that has a gradient.
pub(super) fn update(param: &Param, moments: &mut Moments, scalars: &Step) -> Result<()> {
    let (grad, Moments { m, v: Some(v) }) = (param.grad(), moments) else {
        unreachable!("{param:?} has no second moment")
    };
    if grad.is_empty() {
        return Ok(());
    }
    Ok(param.update(|values| {
        values
            .par_chunks_mut(MIN_PARALLEL)
            .zip(grad.par_chunks(MIN_PARALLEL))
            .zip(m.par_chunks_mut(MIN_PARALLEL))
            .zip(v.par_chunks_mut(MIN_PARALLEL))
            .for_each(|(((p, g), m), v)| vectorize(|| update_chunk(p, g, m, v, scalars)));
    })?)
}

#[inline(always)]
fn update_chunk(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: &Step) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        *m += s.one_minus_beta1 * (g - *m);
        *v = s.beta2 * *v + s.one_minus_beta2 * g * g;
        *p = s.decay * *p - s.step_size * (*m / (v.sqrt() / s.root_bias2 + s.eps));
    }
}
