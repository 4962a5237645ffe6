//! What a whole model that generates promises: no output depends on later bytes or on other sequences, and decoding gives
//! the outputs of the forward pass.

use candle_core::{Device, Tensor};
use mblm_core::Mode;
use mblm_core::generate::Decoder;
use mblm_core::model::{Mblm, Sequences};
use mblm_core::patching::Cutter;
use mblm_core::testing::difference;
use mblm_core::transfer;
use serde::Serialize;

use crate::error::{Error, Result};

/// One promise and whether it is kept.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What is promised.
    pub name: &'static str,
    /// The stage, from 1; none for the whole model.
    pub stage: Option<usize>,
    /// What is wrong; none if nothing is.
    pub fault: Option<String>,
}

pub(super) const CAUSAL: &str = "causal";
pub(super) const PATCHES: &str = "causal patches";
pub(super) const CACHED: &str = "cached == full";
pub(super) const INDEPENDENT: &str = "independent sequences";
pub(super) const SAME_OUTPUTS: &str = "same outputs again";
pub(super) const SAME_BITS: &str = "same bits again";

/// How far decoded outputs may be from those of the forward pass, relative to the largest at a position.
pub(super) const TOLERANCE: f32 = 1e-3;
/// The longest sequences that a decoder is tried on.
pub(super) const LONGEST_DECODED: usize = 257;

pub(super) fn whole(model: &Mblm, sequences: &Sequences) -> Result<Vec<Check>> {
    let config = model.config();
    let patch: usize = config.seq_lens[1..].iter().product();
    let whole = Whole {
        model,
        ids: sequences.ids.chunks(sequences.len).map(<[u32]>::to_vec).collect(),
        patch,
        vocab: config.num_tokens,
    };
    let logits = whole.logits(&whole.ids)?;
    let check = |name, fault| Check { name, stage: None, fault };
    let patches = (!config.is_fixed()).then(|| whole.patches()).transpose()?;
    let patches = patches.map(|fault| check(PATCHES, fault));
    let checks = [
        check(CAUSAL, whole.causal(&logits)?),
        check(CACHED, or_not_finite(whole.cached(&logits))?),
        check(INDEPENDENT, whole.independent(&logits)?),
    ];
    Ok(patches.into_iter().chain(checks).collect())
}

/// Positions to change something at: at both ends, in the middle, and around the end of the first patch.
pub(super) fn spread(len: usize, patch: usize) -> Vec<usize> {
    let mut positions = vec![0, 1, patch.saturating_sub(1), patch, len / 2, len.saturating_sub(2), len - 1];
    positions.retain(|position| *position < len);
    positions.sort_unstable();
    positions.dedup();
    positions
}

/// Logits that are not finite are a fault of the model, which the report names beside all others.
fn or_not_finite(fault: Result<Option<String>>) -> Result<Option<String>> {
    match fault {
        Err(Error::Core(mblm_core::Error::NotFinite(what))) => Ok(Some(what)),
        fault => fault,
    }
}

struct Whole<'m> {
    model: &'m Mblm,
    ids: Vec<Vec<u32>>,
    /// Bytes of a token of the first stage.
    patch: usize,
    vocab: usize,
}

impl Whole<'_> {
    /// The logits of each sequence, a row of `V` for every byte.
    fn logits(&self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let shape = (ids.len(), ids[0].len());
        let logits = self.model.logits(&Tensor::from_vec(ids.concat(), shape, &Device::Cpu)?, Mode::Eval)?;
        let rows = transfer::to_vec::<f32>(&logits)?;
        Ok(rows.chunks_exact(rows.len() / ids.len()).map(<[f32]>::to_vec).collect())
    }

    /// Whether each byte shows in the logits that follow it, and in none before.
    fn causal(&self, before: &[Vec<f32>]) -> Result<Option<String>> {
        let row = |logits: &[f32], at: usize| logits[at * self.vocab..(at + 1) * self.vocab].to_vec();
        for t in spread(self.ids[0].len(), self.patch) {
            let mut changed = self.ids.clone();
            changed.iter_mut().for_each(|ids| ids[t] = self.other(ids[t]));
            for (after, before) in self.logits(&changed)?.iter().zip(before) {
                let leak = (0..t).find_map(|at| Some((at, difference(&row(after, at), &row(before, at), 1e-5)?)));
                if let Some((at, difference)) = leak {
                    return Ok(Some(format!("the logits at byte {at} depend on byte {t}: {difference}")));
                }
                if row(after, t) == row(before, t) {
                    return Ok(Some(format!("the logits at byte {t} do not depend on that byte")));
                }
            }
        }
        Ok(None)
    }

    /// Whether a changed byte moves no border of patches before it.
    fn patches(&self) -> Result<Option<String>> {
        let places = |ids: &[u32]| Cutter::new(self.model.config()).places(ids);
        for ids in &self.ids {
            let before = places(ids)?;
            for t in spread(ids.len(), self.patch) {
                let mut changed = ids.clone();
                changed[t] = self.other(ids[t]);
                let moved =
                    places(&changed)?.iter().zip(&before).take(t + 1).position(|(after, before)| after != before);
                if let Some(at) = moved {
                    return Ok(Some(format!("byte {t} changes the place of byte {at}, which is not behind it")));
                }
            }
        }
        Ok(None)
    }

    /// Another byte that is not the pad token.
    fn other(&self, byte: u32) -> u32 {
        let next = |byte: u32| (byte + 1) % self.vocab.min(256) as u32;
        let other = next(byte);
        if other as usize == self.model.config().pad_token_id { next(other) } else { other }
    }

    /// Whether a decoder gives the logits of the forward pass: after half the bytes at once, then byte by byte.
    fn cached(&self, logits: &[Vec<f32>]) -> Result<Option<String>> {
        let len = self.ids[0].len().min(LONGEST_DECODED.max(3 * self.patch));
        let mut decoder = Decoder::new(self.model, self.ids.len())?;
        let half = len / 2;
        decoder.prefill(&self.ids.iter().flat_map(|ids| &ids[..half]).copied().collect::<Vec<_>>())?;
        for at in half..=len {
            for (sequence, decoded) in decoder.logits().chunks_exact(self.vocab).enumerate().filter(|_| at > 0) {
                let full = &logits[sequence][(at - 1) * self.vocab..at * self.vocab];
                if let Some(difference) = difference(decoded, full, TOLERANCE) {
                    return Ok(Some(format!("the logits after {at} bytes: {difference}")));
                }
            }
            if at < len {
                decoder.step(&self.ids.iter().map(|ids| ids[at]).collect::<Vec<_>>())?;
            }
        }
        Ok(None)
    }

    /// Whether the last sequence has the same logits alone.
    fn independent(&self, logits: &[Vec<f32>]) -> Result<Option<String>> {
        let last = self.ids.len() - 1;
        let alone = self.logits(&self.ids[last..])?;
        let found = difference(&logits[last], &alone[0], 1e-4);
        Ok(found.map(|difference| {
            format!("the last sequence of the batch gives a different result when it runs alone: {difference}")
        }))
    }
}
