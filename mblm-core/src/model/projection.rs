//! From a stage to the one below: each output becomes, by one Linear, a vector for every token of its patch.

use std::sync::Arc;

use candle_core::{Shape, Tensor};
use mblm_sdk::buffer::Buffer;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::gemm::Update;
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1};
use mblm_sdk::ops::{linear, on_device};
use mblm_sdk::param::{Init, Param, ParamScope};
use mblm_sdk::transfer;

/// `D_n -> P_{n+1} · D_{n+1}`.
#[derive(Clone)]
pub(crate) struct NextStage {
    weight: Arc<Param>,
    bias: Arc<Param>,
    next_dim: usize,
}

impl NextStage {
    pub(crate) fn new(dim: usize, next_seq: usize, next_dim: usize, params: &mut ParamScope) -> Result<Self> {
        let outputs = next_seq.checked_mul(next_dim).ok_or_else(|| {
            let sizes = format!("a sequence of {next_seq} tokens, {next_dim} wide each");
            Error::Input(format!("{sizes}, does not fit 64 bits; lower seq_lens of the next stage"))
        })?;
        Ok(NextStage {
            weight: params.weight("weight", &[outputs, dim], Init::linear(dim))?,
            bias: params.param("bias", &[outputs], Init::linear(dim))?,
            next_dim,
        })
    }

    /// Projects the positions `parents` of `x`, each to the first `len` tokens of its sequence in the stage below.
    ///
    /// # Shapes
    /// - `x`: `(R, S, D_n)`; returns `(parents, len, D_{n+1})`
    pub(crate) fn forward(&self, x: &Tensor, parents: &Parents, len: usize, mode: Mode) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        apply1(Project { next: self.clone(), dims: Dims { batch, seq, dim }, parents: parents.clone(), len }, x, mode)
    }

    /// Projects the rows of `x`, for decoding.
    pub(crate) fn rows(&self, x: &[f32], y: &mut [f32]) {
        linear::step(x, &self.weight.values(), Some(&self.bias.values()), self.weight.shape()[1], Update::Set, y);
    }
}

/// The positions of a stage's output that are projected, one for each sequence of the stage below.
#[derive(Clone, Debug)]
pub(crate) enum Parents {
    /// The first so many positions of each sequence.
    First(usize),
    /// Positions by their number among those of all sequences.
    Listed(Arc<[u32]>),
}

struct Project {
    next: NextStage,
    /// Of the input.
    dims: Dims,
    parents: Parents,
    /// Tokens that each position is projected to.
    len: usize,
}

impl Project {
    fn num_rows(&self) -> usize {
        match &self.parents {
            Parents::First(keep) => self.dims.batch * keep,
            Parents::Listed(rows) => rows.len(),
        }
    }

    /// Where the projected positions stand in the input.
    fn rows(&self) -> impl Iterator<Item = usize> + '_ {
        let (seq, keep, listed) = match &self.parents {
            Parents::First(keep) => (self.dims.seq, *keep, None),
            Parents::Listed(rows) => (0, 1, Some(rows)),
        };
        (0..self.num_rows()).map(move |i| listed.map_or(i / keep * seq + i % keep, |rows| rows[i] as usize))
    }

    /// The projected positions, one after another.
    fn kept(&self, x: &[f32]) -> Buffer {
        let dim = self.dims.dim;
        let mut kept = Buffer::take(self.num_rows() * dim);
        for (kept, row) in kept.chunks_exact_mut(dim).zip(self.rows()) {
            kept.copy_from_slice(&x[row * dim..][..dim]);
        }
        kept
    }

    /// Outputs of the projection that are computed: those of the first tokens.
    fn outputs(&self) -> usize {
        self.len * self.next.next_dim
    }
}

impl Node for Project {
    type Tape = ();

    fn shape(&self) -> Shape {
        (self.num_rows(), self.len, self.next.next_dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        let (dim, outputs) = (self.dims.dim, self.outputs());
        let weight = self.next.weight.values();
        linear::forward(&self.kept(inputs[0]), &weight[..outputs * dim], dim, Update::Set, y);
        linear::add_bias(&self.next.bias.values()[..outputs], y);
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let (dim, outputs) = (self.dims.dim, self.outputs());
        let mut kept = self.kept(inputs[0]);
        linear::backward_weight(dy, &kept, dim, &mut self.next.weight.grad_mut()[..outputs * dim]);
        linear::backward_bias(dy, &mut self.next.bias.grad_mut()[..outputs]);
        linear::backward_input(dy, &self.next.weight.values()[..outputs * dim], dim, Update::Set, &mut kept);
        for (kept, row) in kept.chunks_exact(dim).zip(self.rows()) {
            grads[0][row * dim..][..dim].copy_from_slice(kept);
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], mode: Mode) -> Result<Tensor> {
        let x = inputs[0];
        let kept = match &self.parents {
            Parents::First(keep) => x.narrow(1, 0, *keep)?.contiguous()?,
            Parents::Listed(rows) => {
                x.flatten_to(1)?.index_select(&transfer::to_tensor(rows, rows.len(), x.device())?, 0)?
            }
        };
        let weight = self.next.weight.tensor(mode).narrow(0, 0, self.outputs())?;
        let bias = self.next.bias.tensor(mode).narrow(0, 0, self.outputs())?;
        Ok(on_device::linear(&kept, &weight, Some(&bias))?.reshape(self.shape())?)
    }
}
