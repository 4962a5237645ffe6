//! The definition over chunks of positions, in candle ops: the recurrence runs through all chunks at once, and a short loop
//! carries the states over the chunks. Nothing of the size `(B, S, E, N)` is kept for backward, which runs the recurrence
//! again.

use candle_core::{D, Tensor};

use crate::backward::with_backward;
use crate::error::Result;

/// The definition, with `a = -exp(a_log)` and `δ = softplus(dt + dt_bias)`:
/// `h_t = exp(δ_t a) h_{t-1} + δ_t B_t x_t`, `y_t = (C_t · h_t + D x_t) silu(z_t)`.
///
/// # Shapes
/// - `x`, `dt`, `z`: `(B, S, E)`, `b`, `c`: `(B, S, N)`; returns `(B, S, E)`
/// - `a_log`: `(E, N)`, `d`, `dt_bias`: `(E)`
pub fn selective_scan_composed(inputs: [&Tensor; 5], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    let [x, .., z] = inputs;
    let [channels, maps, a] = operands(inputs, a_log, dt_bias)?;
    let scan = Scan::new(&channels, &maps, &a)?;
    let (y, _) = scan.forward(&scan.zeros(scan.cut.batch)?)?;
    let y = with_backward(&[&channels, &maps, &a], &y, |inputs, dy| {
        let (batch, seq, width) = dy.dims3()?;
        let count = (STATES / (batch * seq * inputs[2].dim(1)?)).clamp(1, width);
        backward(inputs[0], inputs[1], inputs[2], dy, count)
    })?;
    Ok(((y + x.broadcast_mul(d)?)? * z.silu()?)?)
}

/// [`selective_scan_composed`] of the next positions, for decoding: goes on from `state`, which no position has left at the
/// start of a sequence, and leaves its own.
///
/// # Shapes
/// - as in [`selective_scan_composed`]; `state`: `(B, E, N)`
pub fn selective_scan_from(
    state: &mut Option<Tensor>,
    inputs: [&Tensor; 5],
    a_log: &Tensor,
    d: &Tensor,
    dt_bias: &Tensor,
) -> Result<Tensor> {
    let [x, .., z] = inputs;
    let [channels, maps, a] = operands(inputs, a_log, dt_bias)?;
    let scan = Scan::new(&channels, &maps, &a)?;
    let (y, end) = scan.forward(&state.take().map_or_else(|| scan.zeros(scan.cut.batch), Ok)?)?;
    *state = Some(end);
    Ok(((y + x.broadcast_mul(d)?)? * z.silu()?)?)
}

/// What a [`Scan`] is made of: channels, maps and `a`.
fn operands([x, dt, b, c, _]: [&Tensor; 5], a_log: &Tensor, dt_bias: &Tensor) -> Result<[Tensor; 3]> {
    let delta = softplus_composed(&dt.broadcast_add(dt_bias)?)?;
    let channels = Tensor::cat(&[&(x * &delta)?, &delta], D::Minus1)?;
    Ok([channels, Tensor::cat(&[b, c], D::Minus1)?, a_log.exp()?.neg()?])
}

/// `ln(1 + e^x)` as `max(x, 0) + ln(1 + u)` with `u = e^-|x|`, which does not overflow. What rounding takes from `1 + u` is
/// put back: without it, small steps would have few correct digits.
pub fn softplus_composed(x: &Tensor) -> Result<Tensor> {
    let u = x.abs()?.neg()?.exp()?;
    let sum = (&u + 1.0)?;
    let lost = ((u - (&sum - 1.0)?)? / &sum)?.detach();
    Ok((x.relu()? + sum.log()? + lost)?)
}

/// Numbers of states that backward holds at once; more channels than that take turns.
const STATES: usize = 1 << 28;

/// The gradients of `channels`, `maps` and `a`, for `count` channels at a time.
///
/// # Shapes
/// - as in [`Scan::new`]; `dy`: `(B, S, E)`
pub(super) fn backward(channels: &Tensor, maps: &Tensor, a: &Tensor, dy: &Tensor, count: usize) -> Result<Vec<Tensor>> {
    let width = a.dim(0)?;
    let (mut du, mut ddelta, mut da) = (vec![], vec![], vec![]);
    let mut dmaps = maps.zeros_like()?;
    for first in (0..width).step_by(count) {
        let count = count.min(width - first);
        let part = |at: usize| channels.narrow(2, at + first, count);
        let scan = Scan::new(&Tensor::cat(&[part(0)?, part(width)?], 2)?, maps, &a.narrow(0, first, count)?)?;
        let grads = scan.backward(&dy.narrow(2, first, count)?)?;
        du.push(grads.u);
        ddelta.push(grads.delta);
        da.push(grads.a);
        dmaps = (dmaps + Tensor::cat(&[grads.b, grads.c], 2)?)?;
    }
    du.append(&mut ddelta);
    Ok(vec![Tensor::cat(&du, 2)?, dmaps, Tensor::cat(&da, 0)?])
}

/// `h_t = exp(δ_t a) h_{t-1} + u_t B_t`, `y_t = C_t · h_t`, by offsets within a chunk: G are the chunks of all sequences, Q
/// the positions of a chunk.
struct Scan {
    /// `(Q, G, E)`
    u: Tensor,
    /// `(Q, G, E)`
    delta: Tensor,
    /// `(Q, G, N)`
    b: Tensor,
    /// `(Q, G, N)`
    c: Tensor,
    /// `(E, N)`
    a: Tensor,
    cut: Cut,
}

/// The gradients of the inputs, in the shapes of whole sequences.
struct ScanGrads {
    u: Tensor,
    delta: Tensor,
    b: Tensor,
    c: Tensor,
    a: Tensor,
}

impl Scan {
    /// # Shapes
    /// - `channels`: `(B, S, 2 E)`, u and δ; `maps`: `(B, S, 2 N)`, B and C; `a`: `(E, N)`
    fn new(channels: &Tensor, maps: &Tensor, a: &Tensor) -> Result<Self> {
        let (batch, seq, _) = channels.dims3()?;
        let cut = Cut::new(batch, seq);
        let half = |both: &Tensor, which: usize| {
            let width = both.dim(2)? / 2;
            cut.by_offset(&both.detach().narrow(2, which * width, width)?)
        };
        let (u, delta) = (half(channels, 0)?, half(channels, 1)?);
        Ok(Scan { u, delta, b: half(maps, 0)?, c: half(maps, 1)?, a: a.detach().contiguous()?, cut })
    }

    /// `exp(δ a)` for `(G, E)` step sizes, `(G, E, N)`.
    fn decay(&self, delta: &Tensor) -> Result<Tensor> {
        Ok(delta.unsqueeze(2)?.broadcast_mul(&self.a.unsqueeze(0)?)?.exp()?)
    }

    /// The state at offset `t` of every chunk, from the one before it.
    fn advance(&self, t: usize, state: &Tensor) -> Result<Tensor> {
        let input = self.u.get(t)?.unsqueeze(2)?.broadcast_mul(&self.b.get(t)?.unsqueeze(1)?)?;
        Ok(((self.decay(&self.delta.get(t)?)? * state)? + input)?)
    }

    /// The gradient of the state at offset `t`, from that of the next state with respect to this one.
    fn retreat(&self, t: usize, grad: &Tensor, dy: &Tensor) -> Result<Tensor> {
        Ok((grad + dy.get(t)?.unsqueeze(2)?.broadcast_mul(&self.c.get(t)?.unsqueeze(1)?)?)?)
    }

    /// States of zero.
    fn zeros(&self, groups: usize) -> Result<Tensor> {
        let (channels, d_state) = self.a.dims2()?;
        Ok(Tensor::zeros((groups, channels, d_state), self.u.dtype(), self.u.device())?)
    }

    /// The state before every chunk, `(G, E, N)`, from that before each sequence, `(B, E, N)`.
    fn starts(&self, start: &Tensor) -> Result<Tensor> {
        if self.cut.chunks == 1 {
            return Ok(start.clone());
        }
        let mut state = self.zeros(self.cut.groups())?;
        for t in 0..self.cut.len {
            state = self.advance(t, &state)?;
        }
        self.cut.carry(&self.decay(&self.delta.sum(0)?)?, &state, start, 0..self.cut.chunks)
    }

    /// The outputs, `(B, S, E)`, and the state after each sequence, `(B, E, N)`, from that before it. The zeros that fill up
    /// the last chunk leave the state as it is.
    fn forward(&self, start: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut state = self.starts(start)?;
        let mut ys = Vec::with_capacity(self.cut.len);
        for t in 0..self.cut.len {
            state = self.advance(t, &state)?;
            ys.push(state.matmul(&self.c.get(t)?.unsqueeze(2)?)?.squeeze(2)?);
        }
        Ok((self.cut.by_sequence(&ys)?, self.cut.last(&state)?))
    }

    /// The gradient of the state after every chunk, `(G, E, N)`.
    fn grads_of_ends(&self, dy: &Tensor) -> Result<Tensor> {
        let end = self.zeros(self.cut.batch)?;
        if self.cut.chunks == 1 {
            return Ok(end);
        }
        let mut grad = self.zeros(self.cut.groups())?;
        for t in (0..self.cut.len).rev() {
            grad = (self.retreat(t, &grad, dy)? * self.decay(&self.delta.get(t)?)?)?;
        }
        self.cut.carry(&self.decay(&self.delta.sum(0)?)?, &grad, &end, (0..self.cut.chunks).rev())
    }

    /// # Shapes
    /// - `dy`: `(B, S, E)`
    fn backward(&self, dy: &Tensor) -> Result<ScanGrads> {
        let dy = self.cut.by_offset(dy)?;
        let mut states = vec![self.starts(&self.zeros(self.cut.batch)?)?];
        for t in 0..self.cut.len {
            states.push(self.advance(t, &states[t])?);
        }
        let mut grad = self.grads_of_ends(&dy)?;
        let (mut u, mut delta, mut b, mut c) = (vec![], vec![], vec![], vec![]);
        let mut a = self.a.zeros_like()?;
        for t in (0..self.cut.len).rev() {
            grad = self.retreat(t, &grad, &dy)?;
            c.push(dy.get(t)?.unsqueeze(1)?.matmul(&states[t + 1])?.squeeze(1)?);
            b.push(self.u.get(t)?.unsqueeze(1)?.matmul(&grad)?.squeeze(1)?);
            u.push(grad.matmul(&self.b.get(t)?.unsqueeze(2)?)?.squeeze(2)?);
            states.truncate(t + 1);
            grad = (grad * self.decay(&self.delta.get(t)?)?)?;
            let of_log = (&grad * &states[t])?;
            delta.push(of_log.broadcast_mul(&self.a)?.sum(2)?);
            a = (a + of_log.broadcast_mul(&self.delta.get(t)?.unsqueeze(2)?)?.sum(0)?)?;
        }
        let whole = |mut parts: Vec<Tensor>| {
            parts.reverse();
            self.cut.by_sequence(&parts)
        };
        Ok(ScanGrads { u: whole(u)?, delta: whole(delta)?, b: whole(b)?, c: whole(c)?, a })
    }
}

/// How sequences are cut into chunks: about as many chunks as positions in a chunk.
struct Cut {
    batch: usize,
    seq: usize,
    chunks: usize,
    /// Positions of a chunk.
    len: usize,
}

impl Cut {
    fn new(batch: usize, seq: usize) -> Self {
        let len = seq.isqrt().next_power_of_two().clamp(8, 64).min(seq);
        Cut { batch, seq, chunks: seq.div_ceil(len), len }
    }

    /// Chunks of all sequences, G.
    fn groups(&self) -> usize {
        self.batch * self.chunks
    }

    /// Of `(G, E, N)`, what the last chunk of each sequence has, `(B, E, N)`.
    fn last(&self, of_chunks: &Tensor) -> Result<Tensor> {
        let (_, channels, d_state) = of_chunks.dims3()?;
        let by_sequence = of_chunks.reshape((self.batch, self.chunks, channels, d_state))?;
        Ok(by_sequence.narrow(1, self.chunks - 1, 1)?.squeeze(1)?.contiguous()?)
    }

    /// `(B, S, W)` to `(Q, G, W)`, the last chunk filled up with zeros.
    fn by_offset(&self, v: &Tensor) -> Result<Tensor> {
        let width = v.dim(2)?;
        let v = v.pad_with_zeros(1, 0, self.chunks * self.len - self.seq)?;
        Ok(v.reshape((self.batch * self.chunks, self.len, width))?.transpose(0, 1)?.contiguous()?)
    }

    /// Q of `(G, W)` to `(B, S, W)`.
    fn by_sequence(&self, parts: &[Tensor]) -> Result<Tensor> {
        let (_, width) = parts[0].dims2()?;
        let v = Tensor::stack(parts, 1)?.reshape((self.batch, self.chunks * self.len, width))?;
        Ok(v.narrow(1, 0, self.seq)?.contiguous()?)
    }

    /// What the chunks before each, in this order, leave to it: `S_{i+1} = decay_i S_i + own_i` from `start`, `(B, E, N)`;
    /// returns `(G, E, N)`.
    fn carry(
        &self,
        decay: &Tensor,
        own: &Tensor,
        start: &Tensor,
        order: impl Iterator<Item = usize>,
    ) -> Result<Tensor> {
        let (groups, channels, d_state) = own.dims3()?;
        let by_chunk =
            |v: &Tensor| v.reshape((self.batch, self.chunks, channels * d_state))?.transpose(0, 1)?.contiguous();
        let (decay, own) = (by_chunk(decay)?, by_chunk(own)?);
        let mut state = start.reshape((self.batch, channels * d_state))?;
        let mut states = vec![state.clone(); self.chunks];
        for i in order {
            states[i] = state.clone();
            state = ((decay.get(i)? * state)? + own.get(i)?)?;
        }
        Ok(Tensor::stack(&states, 1)?.reshape((groups, channels, d_state))?)
    }
}
