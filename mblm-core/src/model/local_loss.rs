//! The local stage and the loss in chunks of its sequences, for `train_checkpoint_chunks`: what the local stage makes of
//! all bytes never exists at once, neither forward nor backward. Backward runs each chunk forward once more (Chen et al.
//! 2016), from the tokens' ids and what the stage above says of them.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Shape, Tensor, Var};
use mblm_sdk::backward::{backward_from, recomputed};
use mblm_sdk::error::Result;
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1, with_floats};
use mblm_sdk::ops::cross_entropy::{CrossEntropy, Target};
use mblm_sdk::param::{Param, fold_gradients};
use mblm_sdk::transfer;

use super::stage::Stage;
use super::tokens::Tokens;

/// The mean loss as a function of what the stage above says.
#[derive(Clone)]
pub(crate) struct LocalLoss {
    pub(crate) stage: Stage,
    /// `(R · S)`
    pub(crate) ids: Tokens,
    /// `S`
    pub(crate) seq: usize,
    /// `(R, S)`, `u8`, 1 = attend
    pub(crate) mask: Option<Tensor>,
    /// In the order of their rows.
    pub(crate) targets: Vec<Target>,
    /// `(V, D)` and `(V)`
    pub(crate) out: [Arc<Param>; 2],
    pub(crate) chunks: usize,
    pub(crate) mode: Mode,
}

impl LocalLoss {
    /// # Shapes
    /// - `above`: `(R, S, D)`; returns a scalar
    pub(crate) fn apply(self, above: &Tensor) -> Result<Tensor> {
        let mode = self.mode;
        apply1(self, above, mode)
    }

    /// The shape of `above`.
    fn dims(&self) -> Dims {
        let (seq, dim) = (self.seq, self.stage.dim);
        Dims { batch: self.ids.len() / seq, seq, dim }
    }

    /// First sequence and number of sequences of each chunk.
    fn chunks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let sequences = self.dims().batch;
        let size = sequences.div_ceil(self.chunks).max(1);
        (0..sequences).step_by(size).map(move |first| (first, size.min(sequences - first)))
    }

    /// The part of `above` that a chunk sees, as a tensor of its own.
    fn part(&self, above: &[f32], first: usize, rows: usize) -> Result<Tensor> {
        let Dims { seq, dim, .. } = self.dims();
        Ok(Tensor::from_slice(&above[first * seq * dim..][..rows * seq * dim], (rows, seq, dim), &Device::Cpu)?)
    }

    /// A chunk's share of the loss, if it has any; `above`: `(rows, S, D)`.
    fn chunk(&self, above: &Tensor, first: usize, keep: bool) -> Result<Option<Tensor>> {
        let (rows, seq, dim) = above.dims3()?;
        let mode = self.mode.part(first);
        let ids = self.ids.part(first * seq..(first + rows) * seq);
        let tokens = self.stage.embedding.forward(&ids, mode)?.reshape((rows, seq, dim))?;
        let input = self.stage.input.forward(&tokens, Some(above), mode)?;
        let mask = self.mask.as_ref().map(|mask| mask.narrow(0, first, rows)?.contiguous()).transpose()?;
        let output = self.stage.watch.run(&input, mode, |x| self.stage.model.forward(x, mask.as_ref(), mode))?;
        let long = output.dim(1)?;
        let begin = self.targets.partition_point(|target| (target.row as usize) < first * long);
        let end = self.targets.partition_point(|target| (target.row as usize) < (first + rows) * long);
        if begin == end {
            return Ok(None);
        }
        let here = |target: &Target| Target { row: target.row - (first * long) as u32, ..*target };
        let targets: Vec<Target> = self.targets[begin..end].iter().map(here).collect();
        let share = targets.len() as f64 / self.targets.len() as f64;
        let [weight, bias] = self.out.clone();
        let loss = CrossEntropy { weight, bias, targets, training: keep };
        let loss = apply1(loss, &output, if keep { mode } else { Mode::Eval })?;
        Ok(Some((loss * share)?))
    }
}

impl Node for LocalLoss {
    type Tape = ();

    fn shape(&self) -> Shape {
        Shape::from(())
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        let mut sum = 0.0;
        for (first, rows) in self.chunks() {
            // Not a variable of the graph: what the chunk keeps goes with its loss.
            if let Some(loss) = self.chunk(&self.part(inputs[0], first, rows)?, first, false)? {
                sum += f64::from(transfer::to_scalar::<f32>(&loss)?);
            }
        }
        y[0] = sum as f32;
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let row = self.dims().seq * self.dims().dim;
        for (first, rows) in self.chunks() {
            let above = Var::from_tensor(&self.part(inputs[0], first, rows)?)?;
            let Some(loss) = self.chunk(above.as_tensor(), first, true)? else { continue };
            let found = backward_from(&loss, Tensor::new(dy[0], &Device::Cpu)?)?;
            fold_gradients(self.stage.all_params(), &found)?;
            if let Some(grad) = found.get(above.as_tensor()) {
                with_floats(grad, |grad| grads[0][first * row..][..rows * row].copy_from_slice(grad))?;
            }
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], _: Mode) -> Result<Tensor> {
        let (this, above) = (Arc::new(self.clone()), inputs[0]);
        let mut sum = Tensor::zeros((), above.dtype(), above.device())?;
        for (first, rows) in self.chunks() {
            let (run, fold) = (this.clone(), this.clone());
            // The first run is for the loss alone; backward runs the chunk again, over a variable.
            let loss = move |part: &[&Tensor]| match run.chunk(part[0], first, part[0].track_op())? {
                Some(loss) => Ok(loss),
                None => Ok(part[0].sum_all()?.affine(0.0, 0.0)?),
            };
            let fold = move |found: &GradStore| fold_gradients(fold.stage.all_params().chain(&fold.out), found);
            sum = (sum + recomputed(&[&above.narrow(0, first, rows)?.contiguous()?], loss, fold)?)?;
        }
        Ok(sum)
    }
}
