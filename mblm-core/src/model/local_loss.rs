//! The local stage and the loss in chunks of its sequences, for `train_checkpoint_chunks`: what the local stage makes of
//! all bytes never exists at once, neither forward nor backward. Backward runs each chunk forward once more (Chen et al.
//! 2016), from the tokens' ids and what the stage above says of them.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor, Var};

use crate::model::recompute::chunk_mode;
use mblm_sdk::error::Result;
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{apply1, backward_from, floats, with_floats};
use mblm_sdk::ops::cross_entropy::{CrossEntropy, Target};
use mblm_sdk::param::{Param, fold_gradients};

use super::stage::Stage;

/// The mean loss as a function of what the stage above says.
pub(crate) struct LocalLoss {
    pub(crate) stage: Stage,
    /// `(R · S)`
    pub(crate) ids: Arc<Vec<u32>>,
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
        let above = above.contiguous()?;
        Ok(match self.mode {
            Mode::Train { .. } => above.apply_op1(self)?,
            Mode::Eval => above.apply_op1_no_bwd(&self)?,
        })
    }

    /// First sequence and number of sequences of each chunk.
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let size = rows.div_ceil(self.chunks).max(1);
        (0..rows).step_by(size).map(move |first| (first, size.min(rows - first)))
    }

    /// A chunk's share of the loss, if it has any; `above`: `(rows, S, D)`.
    fn chunk(&self, above: &Tensor, first: usize, keep: bool) -> Result<Option<Tensor>> {
        let (rows, seq, dim) = above.dims3()?;
        let mode = chunk_mode(self.mode, first);
        let ids = Arc::new(self.ids[first * seq..(first + rows) * seq].to_vec());
        let tokens = self.stage.embedding.forward(&ids, mode)?.reshape((rows, seq, dim))?;
        let input = self.stage.input.forward(&tokens, Some(above), mode)?;
        let mask = self.mask.as_ref().map(|mask| mask.narrow(0, first, rows)?.contiguous()).transpose()?;
        let output = self.stage.model.forward(&input, mask.as_ref(), mode)?;
        self.stage.activations.add(&output)?;
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

    /// `above`: `(batch, seq, dim)`
    fn forward(&self, above: &[f32], Dims { batch, seq, dim }: Dims) -> Result<f32> {
        let mut sum = 0.0;
        for (first, rows) in self.chunks(batch) {
            let above = &above[first * seq * dim..][..rows * seq * dim];
            // Not a variable of the graph: what the chunk keeps goes with its loss.
            let above = Tensor::from_slice(above, (rows, seq, dim), &Device::Cpu)?;
            if let Some(loss) = self.chunk(&above, first, false)? {
                sum += loss.to_scalar::<f32>()? as f64;
            }
        }
        Ok(sum as f32)
    }

    fn backward(&self, above: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let mut dabove = Vec::with_capacity(above.elem_count());
        for (first, rows) in self.chunks(above.dim(0)?) {
            let x = Var::from_tensor(&above.narrow(0, first, rows)?.contiguous()?)?;
            let grads = match self.chunk(x.as_tensor(), first, true)? {
                Some(loss) => Some(backward_from(&loss, dy.clone())?),
                None => None,
            };
            if let Some(grads) = &grads {
                fold_gradients(self.stage.params.iter().chain([self.stage.embedding.table()]), grads)?;
            }
            match grads.as_ref().and_then(|grads| grads.get(x.as_tensor())) {
                Some(grad) => with_floats(grad, |grad| dabove.extend_from_slice(grad))?,
                None => dabove.resize(dabove.len() + x.elem_count(), 0.0),
            }
        }
        Ok(Tensor::from_vec(dabove, above.shape(), &Device::Cpu)?)
    }
}

impl CustomOp1 for LocalLoss {
    fn name(&self) -> &'static str {
        "local-loss"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq, dim) = layout.shape().dims3()?;
        let loss = self.forward(floats(storage, layout)?, Dims { batch, seq, dim })?;
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, above: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.backward(&above.detach(), dy)?))
    }
}
