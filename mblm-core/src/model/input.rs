//! Byte ids as they come from a caller: checked, padded and folded.

use candle_core::Tensor;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::transfer;

use super::layout::{self, Layout};
use super::tokens::Tokens;
use crate::config::MblmConfig;

/// Sequences of equal length, as data sets give them. The model copies the ids once, when it pads them.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// `(B, L)`
    pub ids: &'a [u32],
    /// `L`, at least 1.
    pub len: usize,
    /// The weight of each byte's loss, `(B, L)`; without, each has the weight 1.
    pub loss_mask: Option<&'a [f32]>,
}

impl<'a> Sequences<'a> {
    /// `B`. Panics if [`len`](Self::len) is 0.
    pub fn batch(&self) -> usize {
        self.ids.len() / self.len
    }

    /// The first sequence alone.
    pub fn first(&self) -> Sequences<'a> {
        Sequences { ids: &self.ids[..self.len], loss_mask: self.loss_mask.map(|mask| &mask[..self.len]), ..*self }
    }
}

/// Ids in whole patches.
pub(crate) struct Ids {
    /// The id at each place, `(B, padded_len)`.
    pub(crate) values: Tokens,
    pub(crate) batch: usize,
    /// Bytes of each sequence as given.
    pub(crate) len: usize,
    /// Which place each byte has, and what runs at each stage.
    pub(crate) layout: Layout,
    /// The shape they came in, if it was `(B, P_1', P_2, …, P_N)`.
    pub(crate) folded: Option<Vec<usize>>,
}

impl Ids {
    /// Reads ids `(B, L)` or `(B, P_1', P_2, …, P_N)` of any integer type. `starts`: start tokens of a sequence of a stage.
    pub(crate) fn new(ids: &Tensor, config: &MblmConfig, starts: usize) -> Result<Self> {
        let dims = ids.dims();
        let inner = &config.seq_lens[1..];
        let folded = match dims {
            [_, _] => None,
            _ if !config.is_fixed() => {
                let message = "patches follow the content (patching): expected ids (batch, bytes)";
                return Err(Error::Input(format!("{message}, found shape {dims:?}")));
            }
            _ if dims.len() == config.num_stages() + 1 && dims[2..] == *inner => Some(dims.to_vec()),
            _ => {
                return Err(Error::Input(format!(
                    "ids have shape {dims:?}; expected (batch, bytes) or (batch, patches{})",
                    inner.iter().map(|p| format!(", {p}")).collect::<String>()
                )));
            }
        };
        let (batch, len) = (dims[0], dims[1..].iter().product::<usize>());
        let laid_out = Self::laid_out(&to_u32(ids, config.num_tokens)?, batch, len, config, starts)?;
        Ok(Ids { folded, ..laid_out })
    }

    /// Takes sequences `(B, L)`.
    ///
    /// # Errors
    /// An id outside the vocabulary, or numbers that are no whole sequences.
    pub(crate) fn of(sequences: &Sequences, config: &MblmConfig, starts: usize) -> Result<Self> {
        let (count, len) = (sequences.ids.len(), sequences.len);
        if len == 0 || count % len != 0 {
            return Err(Error::Input(format!("{count} ids are no whole sequences of {len} bytes")));
        }
        if let Some(mask) = sequences.loss_mask.filter(|mask| mask.len() != count) {
            return Err(Error::Input(format!(
                "loss_mask has {} weights; expected one for each of {count} ids",
                mask.len()
            )));
        }
        check_vocabulary(sequences.ids, config.num_tokens)?;
        Self::laid_out(sequences.ids, count / len, len, config, starts)
    }

    fn laid_out(flat: &[u32], batch: usize, len: usize, config: &MblmConfig, starts: usize) -> Result<Self> {
        if !config.is_fixed() && len > 0 {
            let (values, layout) = layout::cut(flat, len, config, starts)?;
            return Ok(Ids { values, batch, len, layout, folded: None });
        }
        let padded_len = len.next_multiple_of(config.seq_lens[1..].iter().product::<usize>().max(1));
        let mut values = vec![config.pad_token_id as u32; batch * padded_len];
        for (row, ids) in values.chunks_exact_mut(padded_len.max(1)).zip(flat.chunks_exact(len.max(1))) {
            row[..len].copy_from_slice(ids);
        }
        let values = Tokens::new(values);
        let layout = Layout::full(&values, padded_len, config);
        Ok(Ids { values, batch, len, layout, folded: None })
    }

    /// Byte `l` of sequence `b`.
    pub(crate) fn token(&self, b: usize, l: usize) -> u32 {
        match &self.layout.bytes {
            Some(bytes) => bytes.ids[b * self.len + l],
            None => self.values[b * self.layout.padded_len + l],
        }
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
        transfer::to_vec(tensor)
    }
}

/// Integer ids as `u32`, each checked against the vocabulary.
pub(crate) fn to_u32(ids: &Tensor, vocab: usize) -> Result<Vec<u32>> {
    if !ids.dtype().is_int() {
        return Err(Error::Input(format!("ids are of type {:?}; expected integers", ids.dtype())));
    }
    let wide = transfer::to_vec::<i64>(ids)?;
    if let Some(at) = wide.iter().position(|&id| id < 0 || id >= vocab as i64) {
        return Err(outside(wide[at], at, vocab));
    }
    Ok(wide.into_iter().map(|id| id as u32).collect())
}

/// Checks that every id is below `vocab`.
pub(crate) fn check_vocabulary(ids: &[u32], vocab: usize) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab) {
        Some(at) => Err(outside(ids[at].into(), at, vocab)),
        None => Ok(()),
    }
}

fn outside(id: i64, at: usize, vocab: usize) -> Error {
    let last = vocab - 1;
    Error::Input(format!("id {id} at flat position {at} lies outside the vocabulary of {vocab} tokens (0 to {last})"))
}
