//! Memory for time: a stage runs its sequences in chunks and keeps their inputs alone; backward runs each chunk forward
//! once more (Chen et al. 2016). What the package calls `train_checkpoint_chunks`. Evaluation takes the same chunks, so that
//! it does not need more memory than training.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor, Var};

use mblm_sdk::block::StageModel;
use mblm_sdk::error::Result;
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{backward_from, floats, with_floats};
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
    let rows = x.dim(0)?.div_ceil(chunks).max(1);
    let op = Recompute { model: model.clone(), params: params.to_vec(), mask: mask.cloned(), rows, mode };
    let x = x.contiguous()?;
    Ok(match mode {
        Mode::Train { .. } => x.apply_op1(op)?,
        Mode::Eval => x.apply_op1_no_bwd(&op)?,
    })
}

/// The mode of the chunk that begins with sequence `first`: training with a dropout seed of its own, or evaluation.
pub(crate) fn chunk_mode(mode: Mode, first: usize) -> Mode {
    match mode {
        Mode::Train { seed } => Mode::train(seed.wrapping_add((first as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15))),
        Mode::Eval => Mode::Eval,
    }
}

struct Recompute {
    model: Arc<dyn StageModel>,
    params: Vec<Arc<Param>>,
    mask: Option<Tensor>,
    /// Sequences of a chunk.
    rows: usize,
    mode: Mode,
}

impl Recompute {
    /// The chunks as (first row, rows, mode).
    fn chunks(&self, rows: usize) -> impl Iterator<Item = (usize, usize, Mode)> + use<'_> {
        (0..rows)
            .step_by(self.rows)
            .map(move |first| (first, self.rows.min(rows - first), chunk_mode(self.mode, first)))
    }

    /// The mask of a chunk.
    fn mask(&self, first: usize, rows: usize) -> Result<Option<Tensor>> {
        Ok(self.mask.as_ref().map(|mask| mask.narrow(0, first, rows)?.contiguous()).transpose()?)
    }

    /// `x`: `(batch, seq, dim)`
    fn forward(&self, x: &[f32], Dims { batch, seq, dim }: Dims) -> Result<Vec<f32>> {
        let mut out = Vec::with_capacity(x.len());
        for (first, rows, mode) in self.chunks(batch) {
            let x = &x[first * seq * dim..][..rows * seq * dim];
            // Not a variable of the graph: the chunk's tape goes with its output.
            let x = Tensor::from_slice(x, (rows, seq, dim), &Device::Cpu)?;
            let y = self.model.forward(&x, self.mask(first, rows)?.as_ref(), mode)?;
            with_floats(&y, |y| out.extend_from_slice(y))?;
        }
        Ok(out)
    }

    fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let mut dx = Vec::with_capacity(x.elem_count());
        for (first, rows, mode) in self.chunks(x.dim(0)?) {
            let x = Var::from_tensor(&x.narrow(0, first, rows)?.contiguous()?)?;
            let y = self.model.forward(x.as_tensor(), self.mask(first, rows)?.as_ref(), mode)?;
            let dy = dy.narrow(0, first, rows)?.contiguous()?;
            let found = backward_from(&y, dy)?;
            fold_gradients(self.params.iter(), &found)?;
            match found.get(x.as_tensor()) {
                Some(grad) => with_floats(grad, |grad| dx.extend_from_slice(grad))?,
                None => dx.resize(dx.len() + x.elem_count(), 0.0),
            }
        }
        Ok(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?)
    }
}

impl CustomOp1 for Recompute {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (batch, seq, dim) = layout.shape().dims3()?;
        let y = self.forward(floats(storage, layout)?, Dims { batch, seq, dim })?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.backward(&x.detach(), dy)?))
    }
}
