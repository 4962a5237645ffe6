//! What a run trains: a model that predicts the next byte, or an encoder that restores masked bytes.

use candle_core::Tensor;
use mblm_base::random::mix;
use mblm_core::device::Place;
use mblm_core::model::{Mblm, MblmEncoder, Seen, Sequences};
use mblm_core::{Mode, ParamStore, StageModel, transfer};
use mblm_data::batches::Batch;

use crate::config::{ModelConfig, RunConfig};
use crate::error::Result;

/// The loss of a batch.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The mean in nats over the elements that count, a scalar; 0 if none does.
    pub mean: Tensor,
    /// How many count: those that are not the pad token and whose weight is not zero.
    pub count: u64,
}

impl Loss {
    /// The loss as a number, which joins those of other batches.
    pub fn sum(&self) -> Result<LossSum> {
        let mean = transfer::to_scalar::<f32>(&self.mean)?;
        Ok(LossSum { sum: f64::from(mean) * self.count as f64, count: self.count })
    }
}

impl From<(Tensor, usize)> for Loss {
    fn from((mean, count): (Tensor, usize)) -> Self {
        Loss { mean, count: count as u64 }
    }
}

/// Losses, added up: a mean over several batches is made at the end, so that every element counts the same.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// The sum in nats.
    pub sum: f64,
    /// How many elements it is of.
    pub count: u64,
}

impl LossSum {
    /// Takes other losses in.
    pub fn add(&mut self, other: LossSum) {
        self.sum += other.sum;
        self.count += other.count;
    }

    /// The mean in nats; none if nothing counts.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// A batch as a model takes it.
pub(crate) fn sequences(batch: &Batch) -> Sequences<'_> {
    Sequences { ids: &batch.ids, len: batch.seq_len, loss_mask: batch.loss_mask.as_deref() }
}

/// What can be trained.
pub trait TrainModel {
    /// The parameters, which training changes.
    fn params(&self) -> &ParamStore;

    /// The loss of a batch, whose backward pass reaches [`params`](Self::params).
    ///
    /// # Shapes
    /// - the loss is a scalar
    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss>;

    /// [`loss`](Self::loss), and the root mean square of each stage's output, from global to local; none if not known.
    fn measured_loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<(Loss, Vec<f64>)> {
        Ok((self.loss(sequences, mode)?, Vec::new()))
    }

    /// The loss of every byte, `(B, L)`, in nats; NaN for the pad token. `None` if the model predicts no bytes.
    fn byte_losses(&self, _sequences: &Sequences) -> mblm_core::Result<Option<Vec<f32>>> {
        Ok(None)
    }

    /// The vectors of the reference package's `state_dict` that are no parameters, by name.
    fn buffers(&self) -> Vec<(String, Vec<f32>)> {
        Vec::new()
    }
}

impl TrainModel for Mblm {
    fn params(&self) -> &ParamStore {
        self.params()
    }

    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss> {
        self.counted_loss(sequences, mode).map(Loss::from)
    }

    fn byte_losses(&self, sequences: &Sequences) -> mblm_core::Result<Option<Vec<f32>>> {
        self.byte_losses(sequences).map(Some)
    }
}

/// The model of a configuration.
pub enum Model {
    /// Predicts the next byte.
    Generative(Mblm),
    /// Restores masked bytes.
    Masked(MaskedBytes),
}

impl Model {
    /// Builds the model that `config` describes, with initial values that follow from `seed`.
    pub fn new(config: &RunConfig, seed: u64) -> Result<Self> {
        Self::at(config, seed, Place::default())
    }

    /// Like [`new`](Self::new), with the parameters at `place`.
    pub fn at(config: &RunConfig, seed: u64, place: Place) -> Result<Self> {
        Self::of(&config.params.model, config.train.masking_proba.unwrap_or_default(), seed, place)
    }

    /// Like [`new`](Self::new), but without allocating the parameters, to count a model of any size. Values that are
    /// read anyway are drawn then.
    pub fn outline(config: &RunConfig, seed: u64) -> Result<Self> {
        Self::outline_of(&config.params.model, config.train.masking_proba.unwrap_or_default(), seed)
    }

    /// As [`outline`](Self::outline), without the rest of a training configuration; `masking_proba` is for encoders.
    pub fn outline_of(model: &ModelConfig, masking_proba: f64, seed: u64) -> Result<Self> {
        Ok(match model {
            ModelConfig::Generative(model) => Model::Generative(Mblm::outline(model, seed)?),
            ModelConfig::Encoder(encoder) => {
                Model::Masked(MaskedBytes { encoder: MblmEncoder::outline(encoder, seed)?, masking_proba })
            }
        })
    }

    /// As [`at`](Self::at), without the rest of a training configuration; `masking_proba` is for encoders.
    pub fn of(model: &ModelConfig, masking_proba: f64, seed: u64, place: Place) -> Result<Self> {
        Ok(match model {
            ModelConfig::Generative(model) => Model::Generative(Mblm::at(model, seed, place)?),
            ModelConfig::Encoder(encoder) => {
                Model::Masked(MaskedBytes { encoder: MblmEncoder::at(encoder, seed, place)?, masking_proba })
            }
        })
    }

    /// Runs `work` and returns what was seen of the stages in its training passes, from global to local.
    pub fn watch_stages<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Seen>) {
        match self {
            Model::Generative(model) => model.watch_stages(work),
            Model::Masked(model) => model.encoder.watch_stages(work),
        }
    }

    /// The model of each stage, from global to local.
    pub fn stage_models(&self) -> Vec<&dyn StageModel> {
        match self {
            Model::Generative(model) => model.stage_models().collect(),
            Model::Masked(model) => model.encoder.stage_models().collect(),
        }
    }
}

impl TrainModel for Model {
    fn params(&self) -> &ParamStore {
        match self {
            Model::Generative(model) => model.params(),
            Model::Masked(model) => model.params(),
        }
    }

    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss> {
        match self {
            Model::Generative(model) => TrainModel::loss(model, sequences, mode),
            Model::Masked(model) => model.loss(sequences, mode),
        }
    }

    fn measured_loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<(Loss, Vec<f64>)> {
        let loss = || self.loss(sequences, mode);
        let (loss, activations) = match self {
            Model::Generative(model) => model.measure_activations(loss),
            Model::Masked(model) => model.encoder.measure_activations(loss),
        };
        Ok((loss?, activations))
    }

    fn byte_losses(&self, sequences: &Sequences) -> mblm_core::Result<Option<Vec<f32>>> {
        match self {
            Model::Generative(model) => model.byte_losses(sequences).map(Some),
            Model::Masked(_) => Ok(None),
        }
    }

    fn buffers(&self) -> Vec<(String, Vec<f32>)> {
        let named = |(n, stage): (usize, &dyn StageModel)| {
            let buffers = stage.buffers().into_iter();
            buffers.map(move |(name, values)| (format!("stage_models.{n}.{name}"), values)).collect::<Vec<_>>()
        };
        self.stage_models().into_iter().enumerate().flat_map(named).collect()
    }
}

/// An encoder and its task (Devlin et al. 2018, without the share of masked tokens that are kept or replaced): each byte
/// is replaced by the mask token with some probability, and the loss is that of restoring those.
///
/// Training draws other bytes in every batch, evaluation the same for the same sequence. All bytes but padding are attended
/// to, the masked ones included.
pub struct MaskedBytes {
    encoder: MblmEncoder,
    masking_proba: f64,
}

impl MaskedBytes {
    /// The encoder.
    pub fn encoder(&self) -> &MblmEncoder {
        &self.encoder
    }
}

impl TrainModel for MaskedBytes {
    fn params(&self) -> &ParamStore {
        self.encoder.params()
    }

    fn loss(&self, sequences: &Sequences, mode: Mode) -> mblm_core::Result<Loss> {
        let labels = sequences.ids;
        let weight = |i: usize| sequences.loss_mask.map_or(1.0, |mask| mask[i]);
        let config = self.encoder.config();
        let pad = config.mblm_config.pad_token_id as u32;
        let may_be = |i: &usize| labels[*i] != pad && weight(*i) != 0.0;
        let masked = match mode {
            Mode::Train { seed } => draw((0..labels.len()).filter(may_be).collect(), self.masking_proba, seed),
            // Of each sequence by itself, whatever else is in the batch.
            Mode::Eval => {
                let long = sequences.len.max(1);
                let sequence = |start: usize| {
                    let range = start..start + long;
                    let seed = labels[range.clone()].iter().fold(0, |hash, label| mix(hash ^ u64::from(*label)));
                    let drawn = draw((0..long).filter(|i| may_be(&(start + i))).collect(), self.masking_proba, seed);
                    drawn.into_iter().map(move |i| start + i)
                };
                (0..labels.len()).step_by(long).flat_map(sequence).collect()
            }
        };
        let (mut inputs, mut weights) = (labels.to_vec(), vec![0.0; labels.len()]);
        for i in masked {
            inputs[i] = config.mask_token_id as u32;
            weights[i] = weight(i);
        }
        let masked = Sequences { ids: &inputs, loss_mask: Some(&weights), ..*sequences };
        self.encoder.counted_loss(&masked, labels, mode).map(Loss::from)
    }
}

/// Each of `places` with probability `share`; one of them if chance takes none, so that there is something to restore.
fn draw(places: Vec<usize>, share: f64, seed: u64) -> Vec<usize> {
    let is_drawn = |i: &usize| ((mix(seed ^ mix(*i as u64)) >> 11) as f64) < share * (1u64 << 53) as f64;
    let drawn: Vec<usize> = places.iter().copied().filter(is_drawn).collect();
    match places.len() {
        len if drawn.is_empty() && len > 0 => vec![places[(mix(seed) % len as u64) as usize]],
        _ => drawn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_drawn_as_asked_for_and_others_each_time() {
        let places: Vec<usize> = (0..10_000).map(|i| 2 * i).collect();
        let drawn = draw(places.clone(), 0.15, 7);
        assert!((1400..1600).contains(&drawn.len()), "{}", drawn.len());
        assert!(drawn.iter().all(|i| i % 2 == 0), "only of the places given");
        assert_eq!(drawn, draw(places.clone(), 0.15, 7));
        let both = draw(places, 0.15, 8).iter().filter(|i| drawn.contains(i)).count();
        assert!((150..300).contains(&both), "{both} of two draws are the same, expected about 225");
        assert_eq!(draw(vec![5], 1e-9, 3), [5]);
        assert_eq!(draw(vec![], 0.5, 3), [0; 0]);
    }
}
