//! What layers call where they do not run fused: a kernel of the device if there is one, and the composition elsewhere.

use candle_core::Tensor;

use super::attention::{attention_composed, join_heads, split_heads};
use super::conv1d::conv1d_silu_composed;
use super::dropout::dropout_composed;
use super::gated_rms_norm::gated_rms_norm_composed;
use super::layer_norm::layer_norm_composed;
use super::linear::linear_composed;
use super::rms_norm::{Eps, rms_norm_composed, token_shift_composed};
use super::rotary::Rotary;
use super::selective_scan::selective_scan_composed;
use super::ssd::ssd_composed;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::Result;
use crate::mode::Dropout;

/// [`linear_composed`]
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::linear(x, weight, bias);
    }
    linear_composed(x, weight, bias)
}

/// [`rms_norm_composed`], after a token shift if `shift`.
///
/// # Shapes
/// - `x`: `(B, S, D)`, `gain`: `(D)`; returns `(B, S, D)`
pub fn rms_norm(x: &Tensor, gain: &Tensor, eps: Eps, shift: bool) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::rms_norm(x, gain, eps, shift);
    }
    match shift {
        true => rms_norm_composed(&token_shift_composed(x)?, gain, eps),
        false => rms_norm_composed(x, gain, eps),
    }
}

/// The sums of the columns of `x`.
///
/// # Shapes
/// - `x`: `(R, D)`; returns `(D)`
pub fn column_sums(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::column_sums(&x.contiguous()?);
    }
    Ok(x.sum(0)?)
}

/// [`layer_norm_composed`]
pub fn layer_norm(x: &Tensor, gain: &Tensor, bias: &Tensor, eps: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::layer_norm(x, gain, bias, eps);
    }
    layer_norm_composed(x, gain, bias, eps)
}

/// Adds `row` to each of the rows that `x` has of its length.
///
/// # Shapes
/// - `x`: `(B, …)`, `row`: `(…)`; returns `(B, …)`
pub fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::add_to_rows(x, row);
    }
    Ok(x.broadcast_add(row)?)
}

/// [`gated_rms_norm_composed`]
pub fn gated_rms_norm(y: &Tensor, z: &Tensor, gain: &Tensor, eps: f32) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(y) {
        return cuda::rms_norm(&(y * z.contiguous()?.silu()?)?, gain, Eps::Inside(eps), false);
    }
    gated_rms_norm_composed(y, z, gain, eps)
}

/// A linear map, the exact GELU, and dropout.
///
/// # Shapes
/// - `x`: `(…, I)`, `weight`: `(O, I)`, `bias`: `(O)`; returns `(…, O)`
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) {
        return cuda::bias_gelu(&cuda::linear(x, weight, None)?, bias, dropout);
    }
    dropout_composed(&linear_composed(x, weight, Some(bias))?.gelu_erf()?, dropout)
}

/// [`conv1d_silu_composed`] of the columns `first..first + C` of `x`.
///
/// # Shapes
/// - `x`: `(B, S, width)`, `weight`: `(C, 1, K)`, `bias`: `(C)`; returns `(B, S, C)`
pub fn conv1d_silu(x: &Tensor, first: usize, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(x) && weight.dim(2)? <= 8 {
        return cuda::conv1d_silu(x, first, weight, bias);
    }
    conv1d_silu_composed(&x.narrow(2, first, bias.elem_count())?, weight, bias)
}

/// [`ssd_composed`]
pub fn ssd(inputs: [&Tensor; 4], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(inputs[0]) {
        return cuda::ssd(inputs, a_log, d, dt_bias);
    }
    ssd_composed(inputs, a_log, d, dt_bias)
}

/// [`selective_scan_composed`]
pub fn selective_scan(inputs: [&Tensor; 5], a_log: &Tensor, d: &Tensor, dt_bias: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if cuda::available(inputs[0]) {
        return cuda::selective_scan(inputs, a_log, d, dt_bias);
    }
    selective_scan_composed(inputs, a_log, d, dt_bias)
}

/// Attention over rows of heads.
pub struct Attention<'a> {
    /// Heads.
    pub heads: usize,
    /// Whether a position sees itself and the past alone.
    pub causal: bool,
    /// `(B, S)`, `u8`, nonzero = attend.
    pub mask: Option<&'a Tensor>,
    /// Dropout of the weights.
    pub dropout: Option<Dropout>,
    /// Rotates queries and keys.
    pub rotary: Option<&'a Rotary>,
}

impl Attention<'_> {
    /// # Shapes
    /// - `q`: `(B, S, H d)`, `kv`: `(B, S, 2 H d)`, keys first; returns `(B, S, H d)`
    pub fn forward(self, q: &Tensor, kv: &Tensor) -> Result<Tensor> {
        let inner = q.dim(2)?;
        #[cfg(feature = "cuda")]
        if cuda::available(q) {
            let rotary = self.rotary.map(|rotary| rotary.half_tables(q.dim(1)?, q)).transpose()?;
            let (mask, causal, dropout) = (self.mask.cloned(), self.causal, self.dropout);
            return cuda::Attention { heads: self.heads, causal, mask, dropout, rotary }.forward(q, kv);
        }
        let heads = |rows: &Tensor| split_heads(rows, self.heads);
        let (mut q, mut k) = (heads(q)?, heads(&kv.narrow(2, 0, inner)?)?);
        let v = heads(&kv.narrow(2, inner, inner)?)?;
        if let Some(rotary) = self.rotary {
            (q, k) = (rotary.composed(&q, 0)?, rotary.composed(&k, 0)?);
        }
        join_heads(&attention_composed(&q, &k, &v, self.causal, self.mask, self.dropout)?)
    }
}
