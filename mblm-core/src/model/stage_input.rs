//! What enters a stage: its tokens with their positions, plus what the stage above says of them, behind the start
//! token, which gets neither.

use std::sync::Arc;

use candle_core::{Device, Shape, Tensor};
use mblm_sdk::block::PosEmb;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::layer::Dims;
use mblm_sdk::mode::Mode;
use mblm_sdk::node::{Node, apply1, apply2};
use mblm_sdk::ops::on_device;
use mblm_sdk::ops::tables::Tables;
use mblm_sdk::parallel::{Shared, for_rows, reduce_rows};
use mblm_sdk::param::{Param, ParamScope};
use mblm_sdk::simd::{self, vectorize};

/// How positions enter.
#[derive(Clone)]
pub(crate) enum Positions {
    None,
    /// `(P, D)`, added.
    Fixed(Arc<Param>),
    /// Pairs of neighbouring channels are rotated.
    Rope(Arc<Rope>),
}

/// How pairs of channels are rotated.
pub(crate) struct Rope {
    /// Radians per position of each pair.
    frequencies: Vec<f32>,
    /// Sines and cosines, `(2, positions, D / 2)`, for compositions.
    tables: Tables,
}

impl Positions {
    pub(crate) fn new(kind: Option<PosEmb>, seq_len: usize, dim: usize, params: &mut ParamScope) -> Result<Self> {
        match kind {
            None => Ok(Positions::None),
            Some(PosEmb::Fixed) => Ok(Positions::Fixed(params.embedding(seq_len, dim, None)?)),
            Some(PosEmb::Rope) if dim % 2 == 1 => Err(Error::Block(format!(
                "pos_emb_type rope rotates pairs of channels: expected an even hidden_dim, found {dim}"
            ))),
            Some(PosEmb::Rope) => {
                let frequency = |i: usize| 1.0 / 10_000f32.powf((2 * i) as f32 / dim as f32);
                let frequencies = (0..dim / 2).map(frequency).collect();
                Ok(Positions::Rope(Arc::new(Rope { frequencies, tables: Tables::new() })))
            }
        }
    }

    /// Adds position `position` to a token (or takes it out of a gradient).
    pub(crate) fn enter(&self, position: usize, row: &mut [f32]) {
        match self {
            Positions::None => {}
            Positions::Fixed(table) => simd::add(&table.values()[position * row.len()..][..row.len()], row),
            Positions::Rope(rope) => rotate(&rope.frequencies, position, row, 1.0),
        }
    }

    /// [`enter`](Self::enter) for tokens `(R, S, D)` at the positions from `first` on, as a composition.
    pub(crate) fn composed(&self, tokens: &Tensor, first: usize, mode: Mode) -> Result<Tensor> {
        match self {
            Positions::None => Ok(tokens.clone()),
            Positions::Fixed(table) => {
                on_device::add_to_rows(tokens, &table.tensor(mode).narrow(0, first, tokens.dim(1)?)?)
            }
            Positions::Rope(rope) => rope.composed(tokens, first),
        }
    }
}

/// Su et al. 2021, eq. 34: channels 2i and 2i + 1 rotate by `position · θ_i`.
fn rotate(frequencies: &[f32], position: usize, row: &mut [f32], sign: f32) {
    for (pair, frequency) in row.chunks_exact_mut(2).zip(frequencies) {
        let (sin, cos) = ((position as f32 * frequency) as f64).sin_cos();
        let (sin, cos) = (sin as f32 * sign, cos as f32);
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
    }
}

impl Rope {
    /// [`rotate`] of every position of `x`, `(R, S, D)`, from `first` on, as a composition.
    fn composed(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        let tables = self.tables.get(first + seq, x.dtype(), x.device(), |positions| {
            let angles = (0..positions).flat_map(|at| self.frequencies.iter().map(move |f| (at as f32 * f) as f64));
            let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
            Ok(Tensor::from_vec([sin, cos].concat(), (2, positions, dim / 2), &Device::Cpu)?)
        })?;
        let (sin, cos) = (tables.get(0)?.narrow(0, first, seq)?, tables.get(1)?.narrow(0, first, seq)?);
        let pairs = x.reshape((batch, seq, dim / 2, 2))?;
        let (even, odd) = (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?);
        let first = (even.broadcast_mul(&cos)? - odd.broadcast_mul(&sin)?)?;
        let second = (odd.broadcast_mul(&cos)? + even.broadcast_mul(&sin)?)?;
        Ok(Tensor::stack(&[first, second], 3)?.reshape((batch, seq, dim))?)
    }
}

/// The input of one stage.
#[derive(Clone)]
pub(crate) struct StageInput {
    pub(crate) positions: Positions,
    /// `(D)`; encoders have none.
    pub(crate) start: Option<Arc<Param>>,
}

impl StageInput {
    pub(crate) fn params(&self) -> impl Iterator<Item = &Arc<Param>> {
        let fixed = match &self.positions {
            Positions::Fixed(table) => Some(table),
            _ => None,
        };
        fixed.into_iter().chain(&self.start)
    }

    /// # Shapes
    /// - `tokens`, `above`: `(R, S, D)`; returns `(R, 1 + S, D)`, or `(R, S, D)` without start tokens
    pub(crate) fn forward(&self, tokens: &Tensor, above: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let (batch, seq, dim) = tokens.dims3()?;
        let node = Assemble { input: self.clone(), dims: Dims { batch, seq, dim } };
        match above {
            Some(above) => apply2(node, tokens, above, mode),
            None => apply1(node, tokens, mode),
        }
    }
}

/// The start token of each sequence, `(R, 1, D)`.
pub(crate) fn start_rows(start: &Param, batch: usize, mode: Mode) -> Result<Tensor> {
    Ok(start.tensor(mode).reshape((1, 1, start.len()))?.broadcast_as((batch, 1, start.len()))?.contiguous()?)
}

struct Assemble {
    input: StageInput,
    /// Of the tokens.
    dims: Dims,
}

impl Assemble {
    /// Number of start tokens per sequence: 1 or 0.
    fn starts(&self) -> usize {
        self.input.start.is_some() as usize
    }

    /// Floats of one sequence of the output.
    fn long(&self) -> usize {
        (self.starts() + self.dims.seq) * self.dims.dim
    }
}

impl Node for Assemble {
    type Tape = ();

    fn shape(&self) -> Shape {
        (self.dims.batch, self.starts() + self.dims.seq, self.dims.dim).into()
    }

    fn forward(&self, inputs: &[&[f32]], y: &mut [f32]) -> Result<()> {
        let Dims { batch, seq, dim } = self.dims;
        let (long, short) = (self.long(), seq * dim);
        let start = self.input.start.as_ref().map(|s| s.values());
        let fixed = match &self.input.positions {
            Positions::Fixed(table) => Some(table.values()),
            _ => None,
        };
        let y = Shared::new(y);
        for_rows(batch, long, |range| {
            // SAFETY: ranges of sequences do not overlap.
            let y = unsafe { y.slice(range.start * long..range.end * long) };
            vectorize(
                #[inline(always)]
                || {
                    for (y, r) in y.chunks_exact_mut(long).zip(range) {
                        let (first, rest) = y.split_at_mut(long - short);
                        if let Some(start) = &start {
                            first.copy_from_slice(start);
                        }
                        rest.copy_from_slice(&inputs[0][r * short..][..short]);
                        if let Some(fixed) = &fixed {
                            simd::add(&fixed[..short], rest);
                        }
                        if let Positions::Rope(rope) = &self.input.positions {
                            let rows = rest.chunks_exact_mut(dim).enumerate();
                            rows.for_each(|(i, row)| rotate(&rope.frequencies, i, row, 1.0));
                        }
                        if let Some(above) = inputs.get(1) {
                            simd::add(&above[r * short..][..short], rest);
                        }
                    }
                },
            );
        });
        Ok(())
    }

    fn backward(&self, _: &[&[f32]], (): (), dy: &[f32], grads: &mut [Vec<f32>]) -> Result<()> {
        let Dims { batch, seq, dim } = self.dims;
        let (long, short) = (self.long(), seq * dim);
        let grads: Vec<Shared> = grads.iter_mut().map(|g| Shared::new(g)).collect();
        // The sum over sequences: the start token's gradient, then that of each position.
        let mut sum = vec![0.0; long];
        reduce_rows(batch, long, &mut sum, |range, sum| {
            vectorize(
                #[inline(always)]
                || {
                    for r in range {
                        let dy = &dy[r * long..][..long];
                        simd::add(dy, sum);
                        let dy = &dy[long - short..];
                        for (i, grad) in grads.iter().enumerate() {
                            // SAFETY: ranges of sequences do not overlap.
                            let grad = unsafe { grad.slice(r * short..(r + 1) * short) };
                            grad.copy_from_slice(dy);
                            if let (0, Positions::Rope(rope)) = (i, &self.input.positions) {
                                let rows = grad.chunks_exact_mut(dim).enumerate();
                                rows.for_each(|(i, row)| rotate(&rope.frequencies, i, row, -1.0));
                            }
                        }
                    }
                },
            );
        });
        let (first, rest) = sum.split_at(long - short);
        if let Some(start) = &self.input.start {
            simd::add(first, &mut start.grad_mut());
        }
        if let Positions::Fixed(table) = &self.input.positions {
            simd::add(rest, &mut table.grad_mut()[..short]);
        }
        Ok(())
    }

    fn composed(&self, inputs: &[&Tensor], mode: Mode) -> Result<Tensor> {
        let batch = self.dims.batch;
        let mut y = self.input.positions.composed(inputs[0], 0, mode)?;
        if let Some(above) = inputs.get(1) {
            y = (y + *above)?;
        }
        match &self.input.start {
            Some(start) => Ok(Tensor::cat(&[&start_rows(start, batch, mode)?, &y], 1)?),
            None => Ok(y),
        }
    }
}
