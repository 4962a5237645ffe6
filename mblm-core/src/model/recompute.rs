//! Memory for time: a stage runs its sequences in chunks and keeps their inputs alone; backward runs each chunk forward
//! once more (Chen et al. 2016). What the package calls `train_checkpoint_chunks`. Evaluation takes the same chunks, so that
//! it does not need more memory than training.

use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{Device, Shape, Tensor, Var};
use mblm_sdk::backward::{backward_from, recomputed};
use mblm_sdk::block::StageModel;
use mblm_sdk::error::Result;
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1, with_floats};
use mblm_sdk::param::{Param, fold_gradients};

/// Runs `model` on `x` in `chunks` chunks of sequences. Gradients are those of one pass over all; with dropout, each
/// chunk draws a mask of its own.
///
/// # Shapes
/// - `x`: `(R, S, D)`; returns the same
/// - `mask`: `(R, S)`, `u8`, 1 = attend
///
/// `params` are the model's: those that candle's graph differentiates get their gradients here.
pub(crate) fn recompute(
    model: &Arc<dyn StageModel>,
    params: &[Arc<Param>],
    x: &Tensor,
    mask: Option<&Tensor>,
    chunks: usize,
    mode: Mode,
) -> Result<Tensor> {
    let (batch, seq, dim) = x.dims3()?;
    let (dims, rows) = (Dims { batch, seq, dim }, batch.div_ceil(chunks).max(1));
    let node = Recompute { model: model.clone(), params: params.to_vec(), mask: mask.cloned(), dims, rows, mode };
    apply1(node, x, mode)
}

struct Recompute {
    model: Arc<dyn StageModel>,
    params: Vec<Arc<Param>>,
    mask: Option<Tensor>,
    dims: Dims,
    /// Sequences of a chunk.
    rows: usize,
    mode: Mode,
}

impl Recompute {
    /// The chunks as (first row, rows, mode).
    fn chunks(&self) -> impl Iterator<Item = (usize, usize, Mode)> + use<'_> {
        let batch = self.dims.batch;
        let chunk = move |first| (first, self.rows.min(batch - first), self.mode.part(first));
        (0..batch).step_by(self.rows).map(chunk)
    }

    /// The rows of a chunk as a tensor of its own.
    fn part(&self, all: &[f32], first: usize, rows: usize) -> Result<Tensor> {
        let Dims { seq, dim, .. } = self.dims;
        Ok(Tensor::from_slice(&all[first * seq * dim..][..rows * seq * dim], (rows, seq, dim), &Device::Cpu)?)
    }

    /// The mask of a chunk.
    fn mask(&self, first: usize, rows: usize) -> Result<Option<Tensor>> {
        Ok(self.mask.as_ref().map(|mask| mask.narrow(0, first, rows)?.contiguous()).transpose()?)
    }
}

impl Node for Recompute {
    type Tape = ();

    fn shape(&self) -> Shape {
        (self.dims.batch, self.dims.seq, self.dims.dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        let row = self.dims.seq * self.dims.dim;
        for (first, rows, mode) in self.chunks() {
            // Not a variable of the graph: the chunk's tape goes with its output.
            let x = self.part(inputs[0], first, rows)?;
            let out = self.model.forward(&x, self.mask(first, rows)?.as_ref(), mode)?;
            with_floats(&out, |out| y[first * row..][..rows * row].copy_from_slice(out))?;
        }
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let row = self.dims.seq * self.dims.dim;
        for (first, rows, mode) in self.chunks() {
            let x = Var::from_tensor(&self.part(inputs[0], first, rows)?)?;
            let y = self.model.forward(x.as_tensor(), self.mask(first, rows)?.as_ref(), mode)?;
            let found = backward_from(&y, self.part(dy, first, rows)?)?;
            fold_gradients(self.params.iter(), &found)?;
            if let Some(grad) = found.get(x.as_tensor()) {
                with_floats(grad, |grad| grads[0][first * row..][..rows * row].copy_from_slice(grad))?;
            }
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], _: Mode) -> Result<Tensor> {
        let chunk = |(first, rows, mode)| {
            let (model, mask, params) = (self.model.clone(), self.mask(first, rows)?, self.params.clone());
            let run = move |x: &[&Tensor]| model.forward(x[0], mask.as_ref(), mode);
            let fold = move |found: &GradStore| fold_gradients(params.iter(), found);
            recomputed(&[&inputs[0].narrow(0, first, rows)?.contiguous()?], run, fold)
        };
        Ok(Tensor::cat(&self.chunks().map(chunk).collect::<Result<Vec<_>>>()?, 0)?)
    }
}
