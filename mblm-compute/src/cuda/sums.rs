//! Sums over rows and over whole tensors, in an order that never changes.

use candle_core::{DType, Tensor};

use super::launch::{Arg, Grid, launch, unwritten};
use crate::error::Result;

/// Blocks that each sum up a share of the rows.
pub(super) const SLICES: usize = 128;

/// The sums of the columns of `x`, `(…, D)`, over all rows.
pub fn column_sums(x: &Tensor) -> Result<Tensor> {
    let columns = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count() / columns;
    let slices = rows.div_ceil(32).clamp(1, SLICES);
    let partial = unwritten(&[slices, columns], DType::F32, x.device())?;
    let grid = Grid { blocks: (columns.div_ceil(128), slices), threads: 128, shared: 0 };
    let args = [Arg::Tensor(x), Arg::Tensor(&partial), Arg::Long(rows), Arg::Int(columns)];
    launch(x.device(), "column_sums", grid, &args)?;
    if slices == 1 { Ok(partial.squeeze(0)?) } else { column_sums(&partial) }
}

/// The sum and the sum of squares of `x` in `f64`, `(parts, 2)`, to be added up.
pub fn sums(x: &Tensor) -> Result<Tensor> {
    let x = &x.contiguous()?;
    let blocks = x.elem_count().div_ceil(4096).clamp(1, 64);
    let out = unwritten(&[blocks, 2], DType::F64, x.device())?;
    let grid = Grid { blocks: (blocks, 1), threads: 256, shared: 0 };
    launch(x.device(), "sums", grid, &[Arg::Tensor(x), Arg::Tensor(&out), Arg::Long(x.elem_count())])?;
    Ok(out)
}
