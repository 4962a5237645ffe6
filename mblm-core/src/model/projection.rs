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

/// `D_n -> P_{n+1} · D_{n+1}`.
#[derive(Clone)]
pub(crate) struct NextStage {
    weight: Arc<Param>,
    bias: Arc<Param>,
    next_seq: usize,
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
            next_seq,
            next_dim,
        })
    }

    /// Projects the first `keep` positions of each sequence.
    ///
    /// # Shapes
    /// - `x`: `(R, S, D_n)`; returns `(R keep, P_{n+1}, D_{n+1})`
    pub(crate) fn forward(&self, x: &Tensor, keep: usize, mode: Mode) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        apply1(Project { next: self.clone(), dims: Dims { batch, seq, dim }, keep }, x, mode)
    }

    /// Projects the rows of `x`, for decoding.
    pub(crate) fn rows(&self, x: &[f32], y: &mut [f32]) {
        linear::step(x, &self.weight.values(), Some(&self.bias.values()), self.weight.shape()[1], Update::Set, y);
    }
}

struct Project {
    next: NextStage,
    /// Of the input.
    dims: Dims,
    keep: usize,
}

impl Project {
    /// The kept rows of the input, one after another.
    fn kept(&self, x: &[f32]) -> Buffer {
        let Dims { batch, seq, dim } = self.dims;
        let mut rows = Buffer::take(batch * self.keep * dim);
        for (kept, x) in rows.chunks_exact_mut(self.keep * dim).zip(x.chunks_exact(seq * dim)) {
            kept.copy_from_slice(&x[..self.keep * dim]);
        }
        rows
    }
}

impl Node for Project {
    type Tape = ();

    fn shape(&self) -> Shape {
        (self.dims.batch * self.keep, self.next.next_seq, self.next.next_dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        linear::forward(&self.kept(inputs[0]), &self.next.weight.values(), self.dims.dim, Update::Set, y);
        linear::add_bias(&self.next.bias.values(), y);
        Ok(())
    }

    fn backward(&self, inputs: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let Dims { seq, dim, .. } = self.dims;
        let mut rows = self.kept(inputs[0]);
        linear::backward_weight(dy, &rows, dim, &mut self.next.weight.grad_mut());
        linear::backward_bias(dy, &mut self.next.bias.grad_mut());
        linear::backward_input(dy, &self.next.weight.values(), dim, Update::Set, &mut rows);
        for (kept, grad) in rows.chunks_exact(self.keep * dim).zip(grads[0].chunks_exact_mut(seq * dim)) {
            grad[..self.keep * dim].copy_from_slice(kept);
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], mode: Mode) -> Result<Tensor> {
        let kept = inputs[0].narrow(1, 0, self.keep)?.contiguous()?;
        let (weight, bias) = (self.next.weight.tensor(mode), self.next.bias.tensor(mode));
        Ok(on_device::linear(&kept, &weight, Some(&bias))?.reshape(self.shape())?)
    }
}
