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
    let chunks = Chunks::new(inputs, a_log, dt_bias)?;
    let mut y = chunks.within()?;
    if chunks.count > 1 {
        let starts = carry(&chunks.log_totals()?, &chunks.own_states()?)?;
        y = (y + chunks.by_starts(&starts)?)?;
    }
    chunks.output(&y, inputs[0], d)
}

/// [`ssd_composed`] of the next positions, for decoding: goes on from `state`, which no position has left at the start of a
/// sequence, and leaves its own.
///
/// # Shapes
/// - as in [`ssd_composed`]; `state`: `(B, 1, H, N P)`
pub fn ssd_from(
    state: &mut Option<Tensor>,
    inputs: [&Tensor; 4],
    a_log: &Tensor,
    d: &Tensor,
    dt_bias: &Tensor,
) -> Result<Tensor> {
    let seq = inputs[0].dim(1)?;
    let mut outputs = vec![];
    for first in (0..seq).step_by(CHUNK) {
        let [x, dt, b, c] = inputs.map(|input| input.narrow(1, first, CHUNK.min(seq - first)));
        let (x, dt, b, c) = (x?, dt?, b?, c?);
        let chunk = Chunks::new([&x, &dt, &b, &c], a_log, dt_bias)?;
        let (mut y, mut end) = (chunk.within()?, chunk.own_states()?);
        if let Some(start) = &*state {
            y = (y + chunk.by_starts(start)?)?;
            end = (end + start.broadcast_mul(&chunk.log_totals()?.exp()?.unsqueeze(3)?)?)?;
        }
        outputs.push(chunk.output(&y, &x, d)?);
        *state = Some(end);
    }
    Ok(Tensor::cat(&outputs, 1)?)
}

/// The inputs, cut into chunks of Q positions; G are the chunks of all sequences.
struct Chunks {
    batch: usize,
    /// Positions of a sequence.
    seq: usize,
    /// Chunks of a sequence.
    count: usize,
    /// `δ x`, `(G, Q, H, P)`
    input: Tensor,
    /// `(G, Q, N)`
    b: Tensor,
    /// `(G, Q, N)`
    c: Tensor,
    /// Log decays, `(G, H, Q)`.
    log: Tensor,
    sums: LogSums,
}

impl Chunks {
    fn new([x, dt, b, c]: [&Tensor; 4], a_log: &Tensor, dt_bias: &Tensor) -> Result<Self> {
        let (batch, seq, inner) = x.dims3()?;
        let (heads, d_state) = (a_log.elem_count(), b.dim(2)?);
        let headdim = inner / heads;
        let len = CHUNK.min(seq);
        let count = seq.div_ceil(len);
        let cut = |v: &Tensor, width: usize| -> Result<Tensor> {
            Ok(v.pad_with_zeros(1, 0, count * len - seq)?.reshape((batch * count, len, width))?)
        };
        let delta = softplus_composed(&dt.broadcast_add(dt_bias)?)?;
        let x = x.reshape((batch, seq, heads, headdim))?;
        let input = cut(&x.broadcast_mul(&delta.unsqueeze(3)?)?.reshape((batch, seq, inner))?, inner)?;
        let input = input.reshape((batch * count, len, heads, headdim))?;
        let (b, c) = (cut(b, d_state)?, cut(c, d_state)?);
        let log = cut(&delta.broadcast_mul(&a_log.exp()?.neg()?)?, heads)?.transpose(1, 2)?.contiguous()?;
        let sums = LogSums::new(&log, Through::Itself)?;
        Ok(Chunks { batch, seq, count, input, b, c, log, sums })
    }

    /// What the positions of a chunk give each other, `(G, Q, H, P)`.
    fn within(&self) -> Result<Tensor> {
        let (len, dtype, device) = (self.c.dim(1)?, self.c.dtype(), self.c.device());
        let cb = self.c.matmul(&self.b.t()?)?.broadcast_mul(&Through::Itself.mask(len, dtype, device)?)?;
        let weights = self.sums.between.exp()?.broadcast_mul(&cb.unsqueeze(1)?)?;
        Ok(weights.matmul(&self.input.transpose(1, 2)?.contiguous()?)?.transpose(1, 2)?)
    }

    /// The state that each chunk alone would leave, `(B, chunks, H, N P)`.
    fn own_states(&self) -> Result<Tensor> {
        let ((groups, len, heads, headdim), d_state) = (self.input.dims4()?, self.b.dim(2)?);
        let kept = self.input.broadcast_mul(&by_position(&self.sums.after)?)?;
        let states = self.b.t()?.matmul(&kept.reshape((groups, len, heads * headdim))?)?;
        let states = states.reshape((self.batch, self.count, d_state, heads, headdim))?.transpose(2, 3)?;
        Ok(states.reshape((self.batch, self.count, heads, d_state * headdim))?)
    }

    /// The logarithm of what is left of a state after each chunk, `(B, chunks, H)`.
    fn log_totals(&self) -> Result<Tensor> {
        Ok(self.log.sum(2)?.reshape((self.batch, self.count, self.log.dim(1)?))?)
    }

    /// What the states before the chunks, `(B, chunks, H, N P)`, give their positions, `(G, Q, H, P)`.
    fn by_starts(&self, starts: &Tensor) -> Result<Tensor> {
        let ((groups, len, heads, headdim), d_state) = (self.input.dims4()?, self.c.dim(2)?);
        let starts = starts.reshape((self.batch, self.count, heads, d_state, headdim))?.transpose(2, 3)?;
        let y = self.c.matmul(&starts.reshape((groups, d_state, heads * headdim))?)?;
        Ok(y.reshape((groups, len, heads, headdim))?.broadcast_mul(&by_position(&self.sums.since_start)?)?)
    }

    /// The output: `y`, `(G, Q, H, P)`, by sequence, and `D x`.
    fn output(&self, y: &Tensor, x: &Tensor, d: &Tensor) -> Result<Tensor> {
        let (groups, len, heads, headdim) = y.dims4()?;
        let (batch, seq) = (self.batch, self.seq);
        let y = y.reshape((batch, groups / batch * len, heads, headdim))?.narrow(1, 0, seq)?;
        let x = x.reshape((batch, seq, heads, headdim))?;
        Ok((y + x.broadcast_mul(&d.reshape((heads, 1))?)?)?.reshape((batch, seq, heads * headdim))?)
    }
}

/// The exponential of sums of log decays, `(G, H, Q)`, as factors of what each position has, `(G, Q, H, 1)`.
fn by_position(sums: &Tensor) -> Result<Tensor> {
    Ok(sums.exp()?.transpose(1, 2)?.unsqueeze(3)?)
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
