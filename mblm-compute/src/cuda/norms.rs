//! RMSNorm and LayerNorm.

use candle_core::{DType, Tensor};

use super::launch::{Arg, Grid, launch, like, sized, unwritten};
use super::sums::{SLICES, column_sums};
use crate::backward::with_own_backward;
use crate::error::Result;
use crate::ops::rms_norm::Eps;

/// See [`rms_norm_composed`](crate::ops::rms_norm::rms_norm_composed); after a token shift if `shift`.
///
/// # Shapes
/// - `x`: `(B, S, D)`, `gain`: `(D)`; returns `(B, S, D)`
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: Eps, shift: bool) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let (_, seq, dim) = x.dims3()?;
    let (rows, half) = (x.elem_count() / dim, if shift { dim.div_ceil(2) } else { dim });
    let (floor, inside) = match eps {
        Eps::Floor(floor) => (floor, 0.0),
        Eps::Inside(inside) => (0.0, inside),
    };
    let (y, inverse) = (like(x)?, unwritten(&[rows], DType::F32, x.device())?);
    let args = [
        Arg::Tensor(x),
        Arg::Tensor(gain),
        Arg::Tensor(&y),
        Arg::Tensor(&inverse),
        Arg::Int(seq),
        Arg::Int(dim),
        Arg::Int(half),
        Arg::Float(floor),
        Arg::Float(inside),
    ];
    launch(x.device(), "rms_norm", Grid::rows(rows, dim), &args)?;
    with_own_backward(&[x, gain], y, move |inputs, dy| {
        let [x, gain] = inputs else { return Ok(vec![]) };
        let blocks = rows.clamp(1, 4 * SLICES);
        let (dx, partial) = (like(x)?, unwritten(&[blocks, dim], DType::F32, x.device())?);
        let args = [
            Arg::Tensor(x),
            Arg::Tensor(gain),
            Arg::Tensor(&inverse),
            Arg::Tensor(dy),
            Arg::Tensor(&dx),
            Arg::Tensor(&partial),
            Arg::Long(rows),
            Arg::Int(seq),
            Arg::Int(dim),
            Arg::Int(half),
        ];
        let grid = Grid { blocks: (blocks, 1), shared: dim * size_of::<f32>(), ..Grid::rows(rows, dim) };
        launch(x.device(), "rms_norm_backward", grid, &args)?;
        Ok(vec![dx, column_sums(&partial)?])
    })
}

/// See [`layer_norm_composed`](crate::ops::layer_norm::layer_norm_composed).
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let dim = gain.elem_count();
    let rows = x.elem_count() / dim;
    let (y, stats) = (like(x)?, unwritten(&[rows, 2], DType::F32, x.device())?);
    let tensors = [x, gain, bias, &y, &stats].map(Arg::Tensor);
    let args: Vec<Arg> = tensors.into_iter().chain([Arg::Int(dim), Arg::Float(eps)]).collect();
    launch(x.device(), "layer_norm", Grid::rows(rows, dim), &args)?;
    with_own_backward(&[x, gain, bias], y, move |inputs, dy| {
        let blocks = rows.clamp(1, 4 * SLICES);
        let (dx, partial) = (like(dy)?, unwritten(&[blocks, 2 * dim], DType::F32, dy.device())?);
        let args = sized(&[inputs[0], inputs[1], &stats, dy, &dx, &partial], rows, &[dim]);
        let grid = Grid { blocks: (blocks, 1), ..Grid::rows(rows, dim) };
        launch(dy.device(), "layer_norm_backward", grid, &args)?;
        let sums = column_sums(&partial)?;
        Ok(vec![dx, sums.narrow(0, 0, dim)?.contiguous()?, sums.narrow(0, dim, dim)?.contiguous()?])
    })
}
