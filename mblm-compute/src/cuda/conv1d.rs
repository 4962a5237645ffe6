//! The short causal convolution of Mamba with its SiLU.

use candle_core::{DType, Tensor};

use super::launch::{Grid, launch, like, sized, unwritten};
use super::sums::{SLICES, column_sums};
use crate::backward::with_own_backward;
use crate::error::Result;

/// See [`conv1d_silu_composed`](crate::ops::conv1d::conv1d_silu_composed).
///
/// # Shapes
/// - `x`: `(B, S, width)`, of which columns `first..first + C` are read; `weight`: `(C, 1, K)`, `K` at most 8; `bias`: `(C)`
/// - returns `(B, S, C)`
pub fn conv1d_silu(x: &Tensor, first: usize, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (batch, seq, width) = x.dims3()?;
    let (channels, _, taps) = weight.dims3()?;
    let len = batch * seq * channels;
    let sizes = [seq, channels, taps, width, first];
    let y = unwritten(&[batch, seq, channels], DType::F32, x.device())?;
    let args = sized(&[x, weight, bias, &y], len, &sizes);
    launch(x.device(), "conv1d_silu", Grid::elements(len), &args)?;
    with_own_backward(&[x, weight, bias], y, move |inputs, dy| {
        let (du, dx) = (like(dy)?, like(dy)?);
        let args = sized(&[inputs[0], inputs[1], inputs[2], dy, &du], len, &sizes);
        launch(dy.device(), "conv1d_silu_backward", Grid::elements(len), &args)?;
        let args = sized(&[inputs[1], &du, &dx], len, &sizes[..3]);
        launch(dy.device(), "conv1d_input_backward", Grid::elements(len), &args)?;
        let slices = (batch * seq).div_ceil(32).clamp(1, SLICES);
        let partial = unwritten(&[slices, channels * (taps + 1)], DType::F32, dy.device())?;
        let args = sized(&[inputs[0], &du, &partial], batch * seq, &sizes);
        let grid = Grid { blocks: (channels.div_ceil(128), slices), threads: 128, shared: 0 };
        launch(dy.device(), "conv1d_weight_backward", grid, &args)?;
        let sums = column_sums(&partial)?.reshape((channels, taps + 1))?;
        let dweight = sums.narrow(1, 0, taps)?.contiguous()?.reshape((channels, 1, taps))?;
        let dbias = sums.narrow(1, taps, 1)?.contiguous()?.flatten_all()?;
        // The other columns of the rows get no gradient from here.
        let dx = dx.pad_with_zeros(2, first, width - first - channels)?;
        Ok(vec![dx, dweight, dbias])
    })
}
