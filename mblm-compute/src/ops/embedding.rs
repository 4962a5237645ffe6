//! Rows of a table by their ids.

use candle_core::{DType, Tensor};

use crate::backward::with_backward;
use crate::error::Result;
use crate::ops::tables::positions;

/// Ids whose one-hot rows exist at the same time.
const CHUNK: usize = 1 << 16;

/// The rows `ids` of `table`. The gradient of the table is a product with one-hot rows: adding row by row would be a
/// loop over the ids on a GPU.
///
/// # Shapes
/// - `table`: `(V, D)`, `ids`: `(ids)`, `u32`; returns `(ids, D)`
pub fn embedding_composed(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ids = ids.clone();
    let rows = table.detach().index_select(&ids, 0)?;
    with_backward(&[table], &rows, move |table, dy| {
        let (vocab, dim) = table[0].dims2()?;
        let tokens = positions(vocab, dy.device())?.to_dtype(DType::U32)?.unsqueeze(1)?;
        let mut sum = Tensor::zeros((vocab, dim), dy.dtype(), dy.device())?;
        for first in (0..ids.elem_count()).step_by(CHUNK) {
            let count = CHUNK.min(ids.elem_count() - first);
            let one_hot = tokens.broadcast_eq(&ids.narrow(0, first, count)?.unsqueeze(0)?)?.to_dtype(dy.dtype())?;
            sum = (sum + one_hot.matmul(&dy.narrow(0, first, count)?)?)?;
        }
        Ok(vec![sum])
    })
}
