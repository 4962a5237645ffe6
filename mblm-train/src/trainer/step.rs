//! A gradient step over the batches of a window, those of all processes.

use std::time::{Duration, Instant};

use mblm_core::gemm::autocast;

use super::Trainer;
use super::optimizer::{GradNorm, clip_grad_norm, scale_grads};
use crate::error::{Error, Result};
use crate::journal::metrics::{Scalars, stage_grad_norms};

impl Trainer<'_> {
    /// Whether the gradients that wait are those of a whole step: of all batches that belong to it, or of the last ones
    /// of the run. One in which nothing counts takes more batches in.
    pub(super) fn window_is_complete(&self) -> bool {
        self.window_is_full() && self.processes.any(self.state.window.weight > 0.0)
    }

    pub(super) fn window_is_full(&self) -> bool {
        self.state.window.batches >= self.plan.accumulate || self.state.batches >= self.plan.batches
    }

    /// A gradient step; if a training point lies in the batches it is of, with the norms of its gradients. Returns how long
    /// it took to add up those of all processes.
    pub(super) fn measured_step(&mut self, scalars: &mut Scalars) -> Result<Duration> {
        let window = self.state.batches - self.state.window.batches..self.state.batches;
        let is_measured = self.plan.train_points.any_in(window);
        let started = Instant::now();
        self.complete_window()?;
        let summed = started.elapsed();
        let stages = if is_measured { stage_grad_norms(self.model.params())? } else { Scalars::new() };
        let GradNorm { norm, factor, .. } = self.gradient_step()?;
        if is_measured {
            scalars.extend([("grad_norm".into(), norm), ("grad_norm_clipped".into(), norm * factor)]);
            scalars.extend(stages);
        }
        Ok(summed)
    }

    /// Makes the gradients that wait, in all processes, those of their mean.
    pub(super) fn complete_window(&mut self) -> Result<()> {
        let window = std::mem::take(&mut self.state.window);
        let mut weight = [window.weight];
        self.processes.sum(&mut weight);
        self.processes.agree(scale_grads(self.model.params(), window.scale(weight[0])))?;
        self.sum_gradients()
    }

    fn sum_gradients(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let store = self.model.params();
        let mut there: Vec<f64> = store.gradients_there().into_iter().map(|there| f64::from(u8::from(there))).collect();
        self.processes.sum(&mut there);
        let there: Vec<bool> = there.into_iter().map(|count| count > 0.0).collect();
        let summed = store.flat_gradients(&there, |all| self.processes.sum_gradients(all));
        self.processes.agree(summed.map_err(Error::from))
    }

    pub(super) fn gradient_step(&mut self) -> Result<GradNorm> {
        let store = self.model.params();
        let norm = clip_grad_norm(store, self.config.train.gradient_clipping.unwrap_or(f64::INFINITY))?;
        if !norm.norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        let lr = self.plan.schedule.lr(self.state.step);
        autocast(self.config.train.precision, || self.optimizer.step(store, lr))?;
        store.zero_grad();
        self.state.step += 1;
        self.state.optimizer_step = self.optimizer.step_count();
        self.state.avg_grad = (norm.mean, norm.mean * norm.factor);
        Ok(norm)
    }
}
