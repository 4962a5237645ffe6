//! Cross-entropy and its gradient in one pass over the logits.

use candle_core::{DType, Tensor};

use super::launch::{Grid, launch, sized, unwritten};
use crate::error::Result;

/// Turns `logits` into their gradients, in place, and returns the losses; see
/// [`CrossEntropy`](crate::ops::cross_entropy::CrossEntropy).
///
/// # Shapes
/// - `logits`: `(R, V)`, nobody else holds them; `tokens`: `(R)`, `u32`; `weights`: `(R)`; returns `(R)`
pub fn cross_entropy(logits: &Tensor, tokens: &Tensor, weights: &Tensor) -> Result<Tensor> {
    const WARPS: usize = 8;
    let (rows, vocab) = logits.dims2()?;
    let losses = unwritten(&[rows], DType::F32, logits.device())?;
    let grid = Grid { blocks: (rows.div_ceil(WARPS).max(1), 1), threads: 32 * WARPS, shared: 0 };
    let args = sized(&[logits, tokens, weights, &losses], rows, &[vocab]);
    launch(logits.device(), "cross_entropy", grid, &args)?;
    Ok(losses)
}
