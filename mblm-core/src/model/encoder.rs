//! The encoder: the hierarchy without start tokens and with an attention mask. It is trained to restore masked bytes.

use candle_core::Tensor;
use mblm_sdk::block::StageModel;
use mblm_sdk::device::Place;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::mode::Mode;
use mblm_sdk::ops::cross_entropy::Target;
use mblm_sdk::param::ParamStore;
use mblm_sdk::transfer;

use super::hierarchy::Hierarchy;
use super::input::{Ids, Sequences, check_vocabulary, to_u32};
use super::warned;
use super::watch::Seen;
use crate::config::{MaskReduce, MblmEncoderConfig};

/// A Multiscale Byte Language Model that sees the whole sequence. Shapes as in [`Mblm`](super::Mblm).
pub struct MblmEncoder {
    config: MblmEncoderConfig,
    hierarchy: Hierarchy,
}

impl MblmEncoder {
    /// Builds the model. `seed` determines its initial values.
    ///
    /// # Errors
    /// Those of [`Mblm::new`](super::Mblm::new).
    pub fn new(config: &MblmEncoderConfig, seed: u64) -> Result<Self> {
        let model = Self::build(config, ParamStore::new(seed))?;
        model.params().draw();
        Ok(model)
    }

    /// Like [`Mblm::outline`](super::Mblm::outline).
    pub fn outline(config: &MblmEncoderConfig, seed: u64) -> Result<Self> {
        Self::build(config, ParamStore::unlimited(seed))
    }

    /// Like [`Mblm::at`](super::Mblm::at).
    pub fn at(config: &MblmEncoderConfig, seed: u64, place: Place) -> Result<Self> {
        let model = Self::build(config, ParamStore::new(seed).at(place))?;
        model.params().draw();
        Ok(model)
    }

    fn build(config: &MblmEncoderConfig, params: ParamStore) -> Result<Self> {
        Ok(MblmEncoder { hierarchy: Hierarchy::new(&config.mblm_config, params, false)?, config: config.clone() })
    }

    /// The configuration that the model was built from.
    pub fn config(&self) -> &MblmEncoderConfig {
        &self.config
    }

    /// Its parameters.
    pub fn params(&self) -> &ParamStore {
        &self.hierarchy.params
    }

    /// The model of each stage, from global to local.
    pub fn stage_models(&self) -> impl Iterator<Item = &dyn StageModel> {
        self.hierarchy.stages.iter().map(|stage| &*stage.model)
    }

    /// Like [`Mblm::measure_activations`](super::Mblm::measure_activations); an encoder has no start tokens.
    pub fn measure_activations<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<f64>) {
        self.hierarchy.measure_activations(work)
    }

    /// Like [`Mblm::watch_stages`](super::Mblm::watch_stages).
    pub fn watch_stages<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Seen>) {
        self.hierarchy.watch_stages(work)
    }

    /// The input of the output layer.
    ///
    /// # Shapes
    /// - `ids`: `(B, L)` or folded; `attention_mask`: the same, nonzero = attend; returns `(B, L, D_N)` or folded
    pub fn hidden_state(&self, ids: &Tensor, attention_mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let ids = self.read(ids)?;
        let masks = self.masks(&ids, &given_mask(&ids, attention_mask)?)?;
        self.per_byte(&ids, &self.hierarchy.run(&ids, Some(&masks), mode)?)
    }

    /// The logits of the byte at every position.
    pub fn logits(&self, ids: &Tensor, attention_mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        self.hierarchy.logits(&self.hidden_state(ids, attention_mask, mode)?, mode)
    }

    /// The mean loss in nats over all positions that are attended to and have a nonzero weight.
    ///
    /// # Shapes
    /// - `ids`, `labels`, `attention_mask`, `loss_mask`: `(B, L)` or folded; returns a scalar
    pub fn loss(
        &self,
        ids: &Tensor,
        labels: &Tensor,
        attention_mask: Option<&Tensor>,
        loss_mask: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let ids = self.read(ids)?;
        let attend = given_mask(&ids, attention_mask)?;
        ids.beside("labels", labels)?;
        let labels = to_u32(labels, self.hierarchy.config.num_tokens)?;
        let weights = loss_mask.map(|mask| ids.beside("loss_mask", mask)).transpose()?;
        Ok(warned(self.mean_loss(&ids, &labels, &attend, weights.as_deref(), mode)?))
    }

    /// [`loss`](Self::loss) of restoring `labels`, as many as there are ids, where those are attended to that are not the pad token; and
    /// the number of positions that it is the mean of: 0 of none, without a warning.
    pub fn counted_loss(&self, sequences: &Sequences, labels: &[u32], mode: Mode) -> Result<(Tensor, usize)> {
        let ids = self.checked(Ids::of(sequences, &self.hierarchy.config, 0)?)?;
        check_vocabulary(labels, self.hierarchy.config.num_tokens)?;
        let pad = self.hierarchy.config.pad_token_id as u32;
        let attend = padded_mask(&ids, |at| labels[at] != pad);
        self.mean_loss(&ids, labels, &attend, sequences.loss_mask, mode)
    }

    fn mean_loss(
        &self,
        ids: &Ids,
        labels: &[u32],
        attend: &[u8],
        weights: Option<&[f32]>,
        mode: Mode,
    ) -> Result<(Tensor, usize)> {
        let targets = targets(ids, labels, attend, weights);
        let count = targets.len();
        match count {
            0 => Ok((self.hierarchy.zero()?, 0)),
            _ => Ok((self.hierarchy.loss(ids, targets, Some(&self.masks(ids, attend)?), mode)?, count)),
        }
    }

    fn read(&self, ids: &Tensor) -> Result<Ids> {
        self.checked(Ids::new(ids, &self.hierarchy.config, 0)?)
    }

    fn checked(&self, ids: Ids) -> Result<Ids> {
        if ids.len == 0 {
            return Err(Error::Input("an encoder needs at least one byte".into()));
        }
        self.hierarchy.check_length(&ids)?;
        Ok(ids)
    }

    /// The mask of each stage from that of the bytes.
    fn masks(&self, ids: &Ids, attend: &[u8]) -> Result<Vec<Tensor>> {
        (0..self.hierarchy.stages.len()).map(|n| self.mask(ids, attend, n)).collect()
    }

    /// The mask of stage `n`, `(sequences, P_n)`, from that of the bytes.
    fn mask(&self, ids: &Ids, attend: &[u8], n: usize) -> Result<Tensor> {
        let patch = self.hierarchy.patch_len(n);
        let reduced: Vec<u8> = attend
            .chunks_exact(patch)
            .map(|bytes| match self.config.mask_reduce_strat {
                MaskReduce::Any => bytes.iter().any(|b| *b != 0) as u8,
                MaskReduce::All => bytes.iter().all(|b| *b != 0) as u8,
            })
            .collect();
        let seq = if n > 0 { self.hierarchy.stages[n].seq_len } else { ids.layout.padded_len / patch };
        let sequences = reduced.len() / seq;
        transfer::to_tensor(&reduced, (sequences, seq), &self.hierarchy.params.place().device)
    }

    fn per_byte(&self, ids: &Ids, local: &Tensor) -> Result<Tensor> {
        let dim = local.dims3()?.2;
        let bytes = local.reshape((ids.batch, ids.layout.padded_len, dim))?;
        Ok(bytes.narrow(1, 0, ids.len)?.reshape(ids.result_shape(dim))?)
    }
}

/// What is to be restored: the positions that are attended to and whose weight is not zero.
fn targets(ids: &Ids, labels: &[u32], attend: &[u8], weights: Option<&[f32]>) -> Vec<Target> {
    let all = (0..ids.batch).flat_map(|b| (0..ids.len).map(move |l| (b * ids.layout.padded_len + l, b * ids.len + l)));
    let target = |(row, flat): (usize, usize)| {
        let weight = weights.map_or(1.0, |w| w[flat]) * (attend[row] != 0) as u8 as f32;
        Target { row: row as u32, token: labels[flat], weight }
    };
    all.map(target).filter(|t| t.weight != 0.0).collect()
}

/// Which of the padded bytes are attended to: those of a mask `(B, L)`, or all; padding is not.
fn given_mask(ids: &Ids, attention_mask: Option<&Tensor>) -> Result<Vec<u8>> {
    let given = attention_mask.map(|mask| ids.beside("attention_mask", mask)).transpose()?;
    Ok(padded_mask(ids, |at| given.as_ref().is_none_or(|given| given[at] != 0.0)))
}

fn padded_mask(ids: &Ids, attends: impl Fn(usize) -> bool) -> Vec<u8> {
    let mut mask = vec![0; ids.batch * ids.layout.padded_len];
    for (b, row) in mask.chunks_exact_mut(ids.layout.padded_len).enumerate() {
        for (l, attended) in row[..ids.len].iter_mut().enumerate() {
            *attended = attends(b * ids.len + l) as u8;
        }
    }
    mask
}
