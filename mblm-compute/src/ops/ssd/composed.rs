//! The definition as matrix products over chunks (Dao & Gu 2024, listing 1), in candle ops with gradients.
//!
//! Log decays are at most 0, and every decay is the exponential of a plain sum of them. Nothing overflows, and no two
//! large sums are subtracted, so that `f32` is enough.

use candle_core::{DType, Device, Tensor};

use super::CHUNK;
use crate::error::Result;
use crate::ops::selective_scan::softplus_composed;
use crate::ops::tables::positions;

/// The definition: `h_t = exp(δ_t a) h_{t-1} + δ_t B_t x_tᵀ`, `y_t = C_t h_t + D x_t`, head by head.
///
/// # Shapes
/// - `x`: `(B, S, H P)`, `dt`: `(B, S, H)`, `b`, `c`: `(B, S, N)`; returns `(B, S, H P)`
/// - `a_log`, `d`, `dt_bias`: `(H)`
pub fn ssd_composed(inputs: [&Tensor; 4], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let [x, dt, b, c] = inputs;
    let (batch, seq, inner) = x.dims3()?;
    let (heads, d_state) = (d.elem_count(), b.dim(2)?);
    let headdim = inner / heads;
    let len = CHUNK.min(seq);
    let chunks = seq.div_ceil(len);
    let cut = |v: &Tensor, width: usize| -> Result<Tensor> {
        Ok(v.pad_with_zeros(1, 0, chunks * len - seq)?.reshape((batch * chunks, len, width))?)
    };
    let delta = softplus_composed(&dt.broadcast_add(dt_bias)?)?;
    let x = x.reshape((batch, seq, heads, headdim))?;
    let input = cut(&x.broadcast_mul(&delta.unsqueeze(3)?)?.reshape((batch, seq, inner))?, inner)?;
    let input = input.reshape((batch * chunks, len, heads, headdim))?;
    let (b, c) = (cut(b, d_state)?, cut(c, d_state)?);
    let log = cut(&delta.broadcast_mul(&a_log.exp()?.neg()?)?, heads)?.transpose(1, 2)?.contiguous()?;
    let sums = LogSums::new(&log, Through::Itself)?;

    let cb = c.matmul(&b.t()?)?.broadcast_mul(&Through::Itself.mask(len, x.dtype(), x.device())?)?;
    let weights = sums.between.exp()?.broadcast_mul(&cb.unsqueeze(1)?)?;
    let mut y = weights.matmul(&input.transpose(1, 2)?.contiguous()?)?.transpose(1, 2)?;
    if chunks > 1 {
        let by_position = |sums: &Tensor| sums.exp()?.transpose(1, 2)?.unsqueeze(3);
        let kept = input.broadcast_mul(&by_position(&sums.after)?)?.reshape((batch * chunks, len, inner))?;
        let states = b.t()?.matmul(&kept)?.reshape((batch, chunks, d_state, heads, headdim))?;
        let states = states.transpose(2, 3)?.reshape((batch, chunks, heads, d_state * headdim))?;
        let starts = carry(&log.sum(2)?.reshape((batch, chunks, heads))?, &states)?;
        let starts = starts.reshape((batch, chunks, heads, d_state, headdim))?.transpose(2, 3)?;
        let from_start = c.matmul(&starts.reshape((batch * chunks, d_state, inner))?)?;
        let from_start = from_start.reshape((batch * chunks, len, heads, headdim))?;
        y = (y + from_start.broadcast_mul(&by_position(&sums.since_start)?)?)?;
    }
    let y = y.reshape((batch, chunks * len, heads, headdim))?.narrow(1, 0, seq)?;
    Ok((y + x.broadcast_mul(&d.reshape((heads, 1))?)?)?.reshape((batch, seq, inner))?)
}

/// The state before every step of `S_{t+1} = e^{log_t} S_t + inputs_t`, from zero. Steps are cut into chunks in turn.
///
/// # Shapes
/// - `log`: `(B, T, H)`, `inputs`: `(B, T, H, M)`; returns `(B, T, H, M)`
fn carry(log: &Tensor, inputs: &Tensor) -> Result<Tensor> {
    let (batch, steps, heads, width) = inputs.dims4()?;
    let len = CHUNK.min(steps);
    let chunks = steps.div_ceil(len);
    let cut = |v: &Tensor, width: usize| -> Result<Tensor> {
        let v = v.pad_with_zeros(1, 0, chunks * len - steps)?.reshape((batch * chunks, len, heads, width))?;
        Ok(v.transpose(1, 2)?.reshape((batch * chunks * heads, len, width))?)
    };
    let (log, inputs) = (cut(&log.unsqueeze(3)?, 1)?.transpose(1, 2)?, cut(inputs, width)?);
    let sums = LogSums::new(&log, Through::Previous)?;
    let mask = Through::Previous.mask(len, inputs.dtype(), inputs.device())?;
    let decays = sums.between.squeeze(1)?.exp()?.broadcast_mul(&mask)?;
    let mut states = decays.matmul(&inputs)?;
    if chunks > 1 {
        let ends = sums.after.exp()?.matmul(&inputs)?.reshape((batch, chunks, heads, width))?;
        let starts = carry(&log.sum(2)?.reshape((batch, chunks, heads))?, &ends)?;
        let starts = starts.reshape((batch * chunks * heads, 1, width))?;
        states = (states + sums.since_start.exp()?.transpose(1, 2)?.broadcast_mul(&starts)?)?;
    }
    let states = states.reshape((batch * chunks, heads, len, width))?.transpose(1, 2)?;
    Ok(states.reshape((batch, chunks * len, heads, width))?.narrow(1, 0, steps)?)
}

/// The last step whose decay counts at position i: i itself for outputs, the one before for states at the start.
#[derive(Clone, Copy, PartialEq)]
enum Through {
    Itself,
    Previous,
}

impl Through {
    /// 1 where position j (the column) counts at position i (the row), `(Q, Q)`.
    fn mask(self, len: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let at = positions(len, device)?;
        let (i, j) = (at.reshape((len, 1))?, at.reshape((1, len))?);
        let mask = if self == Through::Itself { j.broadcast_le(&i)? } else { j.broadcast_lt(&i)? };
        Ok(mask.to_dtype(dtype)?)
    }
}

/// Sums of log decays over parts of a chunk.
struct LogSums {
    /// Of `j < k <= i`, `(G, H, Q, Q)` with i before j; 0 where there is no such k.
    between: Tensor,
    /// Of `k <= i`, `(G, H, Q)`.
    since_start: Tensor,
    /// Of `k > j`, `(G, H, Q)`.
    after: Tensor,
}

impl LogSums {
    /// Products with tables of 0 and 1. With [`Through::Previous`], `k <= i` is `k < i`.
    ///
    /// # Shapes
    /// - `log`: `(G, H, Q)`
    fn new(log: &Tensor, through: Through) -> Result<Self> {
        let (groups, heads, len) = log.dims3()?;
        let (dtype, device) = (log.dtype(), log.device());
        let up_to = through.mask(len, dtype, device)?.t()?.contiguous()?;
        let after = Through::Previous.mask(len, dtype, device)?;
        let between = up_to.unsqueeze(2)?.broadcast_mul(&after.unsqueeze(1)?)?.reshape((len, len * len))?;
        let log = log.reshape((groups * heads, len))?;
        Ok(LogSums {
            between: log.matmul(&between)?.reshape((groups, heads, len, len))?,
            since_start: log.matmul(&up_to)?.reshape((groups, heads, len))?,
            after: log.matmul(&after)?.reshape((groups, heads, len))?,
        })
    }
}
