//! Layer-wide fused ops. A [`Layer`] owns its parameters, computes forward and backward over slices, and adds the
//! gradients of its parameters directly to their buffers. [`apply`] makes it one node of candle's graph.
//!
//! The contract is that of a plugin's instance, with Rust types: forward returns a tape, and backward consumes it.

use std::sync::Arc;

use candle_core::{Shape, Tensor};

use crate::device;
use crate::error::Result;
use crate::mode::Mode;
use crate::node::{Node, apply1};
use crate::transfer;

/// The shape `(batch, seq, dim)` of a layer's input and output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Number of sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq: usize,
    /// Width.
    pub dim: usize,
}

impl Dims {
    /// The number of rows, `batch * seq`.
    pub fn rows(&self) -> usize {
        self.batch * self.seq
    }

    /// The number of floats.
    pub fn len(&self) -> usize {
        self.rows() * self.dim
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The context of a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Shape of input and output.
    pub dims: Dims,
    /// `(batch, seq)`, nonzero = attend.
    pub mask: Option<&'a [u8]>,
    /// Whether a backward pass follows, and the dropout seed.
    pub mode: Mode,
}

/// A shape-preserving function `(batch, seq, dim) -> (batch, seq, dim)` with parameters and a hand-written backward.
pub trait Layer: Send + Sync + 'static {
    /// What forward keeps for the backward pass.
    type Tape: Send + 'static;

    /// The definition in differentiable candle operations. Tests compare the fused version with it, and other types and
    /// devices run it. Read parameters with [`param_like`].
    fn composed(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor>;

    /// Writes the output to `y` and returns the tape. The previous contents of `y` are arbitrary.
    fn forward(&self, x: &[f32], context: Context, y: &mut [f32]) -> Self::Tape;

    /// Writes the gradient of the input to `dx`, whose previous contents are arbitrary, and adds those of the
    /// parameters to their buffers.
    fn backward(&self, x: &[f32], context: Context, tape: Self::Tape, dy: &[f32], dx: &mut [f32]);
}

/// Returns a parameter as a tensor with the type of `x`, for compositions.
pub fn param_like(param: &crate::param::Param, x: &Tensor, mode: Mode) -> Result<Tensor> {
    Ok(param.tensor(mode).to_dtype(x.dtype())?)
}

/// Runs `layer` on `x`: fused where [`device::fuses`] says so, and composed elsewhere.
///
/// # Shapes
/// - `x`: `(batch, seq, dim)`; returns the same shape
/// - `mask`: `(batch, seq)`, `u8`
pub fn apply<L: Layer>(layer: &Arc<L>, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
    if !device::fuses(x) {
        return layer.composed(x, mask, mode);
    }
    let (batch, seq, dim) = x.dims3()?;
    let dims = Dims { batch, seq, dim };
    let mask = mask.map(transfer::to_vec::<u8>).transpose()?;
    let node = Fused { layer: layer.clone(), dims, mask, mode };
    apply1(node, x, mode)
}

struct Fused<L: Layer> {
    layer: Arc<L>,
    dims: Dims,
    mask: Option<Vec<u8>>,
    mode: Mode,
}

impl<L: Layer> Fused<L> {
    fn context(&self) -> Context<'_> {
        Context { dims: self.dims, mask: self.mask.as_deref(), mode: self.mode }
    }
}

impl<L: Layer> Node for Fused<L> {
    type Tape = L::Tape;

    fn shape(&self) -> Shape {
        (self.dims.batch, self.dims.seq, self.dims.dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<L::Tape> {
        Ok(self.layer.forward(inputs[0], self.context(), y))
    }

    fn backward(&self, inputs: &[&[f32]], tape: L::Tape, dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        self.layer.backward(inputs[0], self.context(), tape, dy, &mut grads[0]);
        Ok(())
    }
}
