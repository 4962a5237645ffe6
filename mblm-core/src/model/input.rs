//! Byte ids as they come from a caller: checked, padded and folded.

use candle_core::{DType, Tensor};

use crate::config::MblmConfig;
use mblm_sdk::error::{Error, Result};

/// Ids padded to whole patches.
pub(crate) struct Ids {
    /// `(B, padded_len)`
    pub(crate) values: Vec<u32>,
    pub(crate) batch: usize,
    /// Bytes of each sequence as given.
    pub(crate) len: usize,
    /// Bytes of each sequence with padding: a multiple of `P_2 · … · P_N`.
    pub(crate) padded_len: usize,
    /// The shape they came in, if it was `(B, P_1', P_2, …, P_N)`.
    pub(crate) folded: Option<Vec<usize>>,
}

impl Ids {
    /// Reads ids `(B, L)` or `(B, P_1', P_2, …, P_N)` of any integer type.
    pub(crate) fn new(ids: &Tensor, config: &MblmConfig) -> Result<Self> {
        let dims = ids.dims();
        let inner = &config.seq_lens[1..];
        let folded = match dims {
            [_, _] => None,
            _ if dims.len() == config.num_stages() + 1 && dims[2..] == *inner => Some(dims.to_vec()),
            _ => {
                return Err(Error::Input(format!(
                    "ids have shape {dims:?}; expected (batch, bytes) or (batch, patches{})",
                    inner.iter().map(|p| format!(", {p}")).collect::<String>()
                )));
            }
        };
        let (batch, len) = (dims[0], dims[1..].iter().product::<usize>());
        let flat = to_u32(ids, config.num_tokens)?;
        let padded_len = len.next_multiple_of(inner.iter().product::<usize>().max(1));
        let mut values = vec![config.pad_token_id as u32; batch * padded_len];
        for (row, ids) in values.chunks_exact_mut(padded_len.max(1)).zip(flat.chunks_exact(len.max(1))) {
            row[..len].copy_from_slice(ids);
        }
        Ok(Ids { values, batch, len, padded_len, folded })
    }

    /// The shape that per-byte results `(B, L, …)` are given back in.
    pub(crate) fn result_shape(&self, width: usize) -> Vec<usize> {
        match &self.folded {
            Some(dims) => dims.iter().copied().chain([width]).collect(),
            None => vec![self.batch, self.len, width],
        }
    }

    /// Checks that a tensor that comes with the ids has their shape, and flattens it.
    pub(crate) fn beside(&self, what: &str, tensor: &Tensor) -> Result<Vec<f32>> {
        let expected = self.folded.clone().unwrap_or(vec![self.batch, self.len]);
        if tensor.dims() != expected {
            let message = format!("{what} has shape {:?}; expected that of the ids, {expected:?}", tensor.dims());
            return Err(Error::Input(message));
        }
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}

/// Integer ids as `u32`, each checked against the vocabulary.
pub(crate) fn to_u32(ids: &Tensor, vocab: usize) -> Result<Vec<u32>> {
    if !ids.dtype().is_int() {
        return Err(Error::Input(format!("ids are of type {:?}; expected integers", ids.dtype())));
    }
    let wide = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    if let Some(at) = wide.iter().position(|&id| id < 0 || id >= vocab as i64) {
        return Err(Error::Input(format!(
            "id {} at flat position {at} lies outside the vocabulary of {vocab} tokens (0 to {})",
            wide[at],
            vocab - 1
        )));
    }
    Ok(wide.into_iter().map(|id| id as u32).collect())
}
