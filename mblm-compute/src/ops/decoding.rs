//! What layers keep of the positions before to decode by tensors, on the device of their inputs: for the token shift, for
//! attention and for the convolution. The state of a scan is a tensor
//! ([`selective_scan_from`](super::selective_scan::selective_scan_from), [`ssd_from`](super::ssd::ssd_from)).

use candle_core::Tensor;

use super::attention::{attention_of_last, join_heads, split_heads};
use super::on_device;
use super::rotary::Rotary;
use crate::error::Result;

/// The newest row before the next ones, for a token shift.
#[derive(Default)]
pub struct ShiftedRow(Option<Tensor>);

impl ShiftedRow {
    /// See [`token_shift_composed`](super::rms_norm::token_shift_composed).
    ///
    /// # Shapes
    /// - `x`: `(B, S, D)`; returns the same
    pub fn token_shift(&mut self, x: &Tensor) -> Result<Tensor> {
        let (_, seq, dim) = x.dims3()?;
        let last = x.narrow(1, seq - 1, 1)?.contiguous()?;
        let before = self.0.replace(last.clone()).map_or_else(|| last.zeros_like(), Ok)?;
        if dim == 1 {
            return Ok(x.clone());
        }
        let before = match seq {
            1 => before,
            _ => Tensor::cat(&[&before, &x.narrow(1, 0, seq - 1)?], 1)?,
        };
        let half = dim.div_ceil(2);
        Ok(Tensor::cat(&[x.narrow(2, 0, half)?, before.narrow(2, half, dim - half)?], 2)?)
    }
}

/// Positions that a cache has room for at first.
const ROOM: usize = 64;

/// The keys and values of all positions so far.
#[derive(Default)]
pub struct KeysAndValues {
    /// `(B, H, room, d)` each, written in place; the room doubles when it is used up.
    held: Option<[Tensor; 2]>,
    /// Positions so far.
    len: usize,
}

impl KeysAndValues {
    /// Causal attention of the next positions to themselves and to all before.
    ///
    /// # Shapes
    /// - `q`: `(B, S, H d)`, `kv`: `(B, S, 2 H d)`, keys first; returns `(B, S, H d)`
    pub fn attend(&mut self, q: &Tensor, kv: &Tensor, heads: usize, rotary: Option<&Rotary>) -> Result<Tensor> {
        let (_, seq, inner) = q.dims3()?;
        let part = |which: usize| split_heads(&kv.narrow(2, which * inner, inner)?, heads);
        let (mut q, mut k, v) = (split_heads(q, heads)?, part(0)?, part(1)?);
        if let Some(rotary) = rotary {
            (q, k) = (rotary.composed(&q, self.len)?, rotary.composed(&k, self.len)?);
        }
        let [keys, values] = self.append([&k, &v])?;
        self.len += seq;
        join_heads(&attention_of_last(&q, &keys.narrow(2, 0, self.len)?, &values.narrow(2, 0, self.len)?)?)
    }

    /// Writes the next rows behind those that are held, and returns the memory of all.
    fn append(&mut self, next: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let (batch, heads, seq, head_dim) = next[0].dims4()?;
        let has_room = |held: &&[Tensor; 2]| self.len + seq <= held[0].dims()[2];
        let held = match self.held.as_ref().filter(has_room) {
            Some(held) => held.clone(),
            None => {
                let room = (self.len + seq).next_power_of_two().max(ROOM);
                let zeros = || Tensor::zeros((batch, heads, room, head_dim), next[0].dtype(), next[0].device());
                let larger = [zeros()?, zeros()?];
                for (larger, held) in larger.iter().zip(self.held.iter().flatten()) {
                    larger.slice_set(held, 2, 0)?;
                }
                larger
            }
        };
        for (held, next) in held.iter().zip(next) {
            held.slice_set(&next.contiguous()?, 2, self.len)?;
        }
        self.held = Some(held.clone());
        Ok(held)
    }
}

/// The last inputs of a convolution.
#[derive(Default)]
pub struct Window(Option<Tensor>);

impl Window {
    /// See [`on_device::conv1d_silu`].
    ///
    /// # Shapes
    /// - `x`: `(B, S, width)`, `weight`: `(C, 1, K)`, `bias`: `(C)`; returns `(B, S, C)`
    pub fn conv1d_silu(&mut self, x: &Tensor, first: usize, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (channels, _, taps) = weight.dims3()?;
        let (seq, reach) = (x.dim(1)?, taps - 1);
        if reach == 0 {
            return on_device::conv1d_silu(x, first, weight, bias);
        }
        let x = x.narrow(2, first, channels)?;
        let x = match &self.0 {
            Some(before) => Tensor::cat(&[before, &x], 1)?,
            None => x.pad_with_zeros(1, reach, 0)?,
        };
        self.0 = Some(x.narrow(1, seq, reach)?.contiguous()?);
        Ok(on_device::conv1d_silu(&x, 0, weight, bias)?.narrow(1, reach, seq)?.contiguous()?)
    }
}
