//! Many positions at once through a decoder that keeps a state.

use mblm_sdk::Result;
use mblm_sdk::block::StageDecoder;
use mblm_sdk::buffer::Buffer;
use mblm_sdk::layer::Dims;
use mblm_sdk::rows::swap;

/// Rows that a pass runs at once: what it holds for them stays small.
const ROWS: usize = 1024;
/// Positions from which on a pass is faster than steps.
const LEAST: usize = 4;

/// Advances by `seq` positions with `pass`, which advances by those that it gets and returns their outputs.
///
/// # Shapes
/// - `x`, `y`: `(seq, batch, dim)`; of a pass: `(batch, seq, dim)`
pub(crate) fn prefill<D: StageDecoder>(
    decoder: &mut D,
    x: &[f32],
    y: &mut [f32],
    seq: usize,
    dim: usize,
    pass: impl Fn(&mut D, Dims, Buffer) -> Buffer,
) -> Result<()> {
    if seq == 0 {
        return Ok(());
    }
    let row = x.len() / seq;
    let batch = row / dim;
    let rows = (ROWS / batch).max(LEAST) * row;
    for (x, y) in x.chunks(rows).zip(y.chunks_mut(rows)) {
        let dims = Dims { batch, seq: x.len() / row, dim };
        if dims.seq < LEAST {
            x.chunks_exact(row).zip(y.chunks_exact_mut(row)).try_for_each(|(x, y)| decoder.step(x, y))?;
            continue;
        }
        let mut rows = Buffer::take(x.len());
        swap(x, dims.seq, dim, &mut rows);
        swap(&pass(decoder, dims, rows), batch, dim, y);
    }
    Ok(())
}
