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

/// Sequences of one length that lie one after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Number of sequences.
    pub batch: usize,
    /// Positions per sequence.
    pub seq: usize,
}

/// The context of a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Shape of input and output. Where the sequences have several lengths, all rows are one sequence here.
    pub dims: Dims,
    /// The sequences if they have several lengths, group by group; else empty.
    pub packed: &'a [Group],
    /// `(batch, seq)`, nonzero = attend.
    pub mask: Option<&'a [u8]>,
    /// Whether a backward pass follows, and the dropout seed.
    pub mode: Mode,
}

impl<'a> Context<'a> {
    /// The groups of sequences of equal length, each with its first row and a context of its own: all sequences, if there
    /// is one length.
    pub fn groups(&self) -> impl Iterator<Item = (usize, Context<'a>)> + use<'a> {
        let whole = *self;
        let (mut row, mut sequence) = (0, 0);
        let group = move |group: &Group| {
            let dims = Dims { batch: group.batch, seq: group.seq, dim: whole.dims.dim };
            let found = (row, Context { dims, packed: &[], mask: None, mode: whole.mode.part(sequence) });
            row += dims.rows();
            sequence += group.batch;
            found
        };
        let one = whole.packed.is_empty().then_some((0, whole));
        one.into_iter().chain(whole.packed.iter().map(group))
    }
}

/// A shape-preserving function `(batch, seq, dim) -> (batch, seq, dim)` with parameters and a hand-written backward.
pub trait Layer: Send + Sync + 'static {
    /// What forward keeps for the backward pass.
    type Tape: Send + 'static;

    /// The definition in differentiable candle operations. Tests compare the fused version with it, and other types and
    /// devices run it. Read parameters with [`param_like`].
    fn composed(&self, x: &Tensor, mask: Option<&Tensor>, mode: Mode) -> Result<Tensor>;

    /// Writes the output to `y` and returns the tape. The previous contents of `y` are arbitrary. A layer that runs
    /// [packed](apply_packed) does what crosses positions group by group.
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
    let node = Fused { layer: layer.clone(), dims, packed: Arc::default(), mask, mode };
    apply1(node, x, mode)
}

/// Runs `layer` on sequences of several lengths at once: what works row by row runs on all rows together.
///
/// # Shapes
/// - `x`: `(1, rows, dim)`, the sequences of the groups one after another; returns the same shape
pub fn apply_packed<L: Layer>(layer: &Arc<L>, x: &Tensor, groups: &Arc<[Group]>, mode: Mode) -> Result<Tensor> {
    if !device::fuses(x) {
        return by_group(x, groups, mode, |x, mode| layer.composed(x, None, mode));
    }
    let (batch, seq, dim) = x.dims3()?;
    let node = Fused { layer: layer.clone(), dims: Dims { batch, seq, dim }, packed: groups.clone(), mask: None, mode };
    apply1(node, x, mode)
}

/// Runs each group of sequences by itself.
///
/// # Shapes
/// - `x`: `(1, rows, dim)`, the sequences of the groups one after another; returns the same shape
/// - `run`: `(batch, seq, dim) -> (batch, seq, dim)`
pub fn by_group(
    x: &Tensor,
    groups: &[Group],
    mode: Mode,
    run: impl Fn(&Tensor, Mode) -> Result<Tensor>,
) -> Result<Tensor> {
    let (mut row, mut sequence, mut outputs) = (0, 0, Vec::with_capacity(groups.len()));
    for &Group { batch, seq } in groups {
        let part = x.narrow(1, row, batch * seq)?.reshape((batch, seq, x.dim(2)?))?;
        outputs.push(run(&part, mode.part(sequence))?.reshape((1, batch * seq, x.dim(2)?))?);
        row += batch * seq;
        sequence += batch;
    }
    Ok(Tensor::cat(&outputs, 1)?)
}

struct Fused<L: Layer> {
    layer: Arc<L>,
    dims: Dims,
    packed: Arc<[Group]>,
    mask: Option<Vec<u8>>,
    mode: Mode,
}

impl<L: Layer> Fused<L> {
    fn context(&self) -> Context<'_> {
        Context { dims: self.dims, packed: &self.packed, mask: self.mask.as_deref(), mode: self.mode }
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
