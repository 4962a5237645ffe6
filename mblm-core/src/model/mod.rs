//! The hierarchy: a decoder ([`Mblm`]) and an encoder ([`MblmEncoder`]) that share their stages.

mod encoder;
mod hierarchy;
mod input;
mod layout;
mod local_loss;
mod projection;
mod reader;
mod recompute;
mod stage;
mod stage_input;
mod token_embedding;
mod tokens;
mod watch;

use candle_core::Tensor;
pub use encoder::MblmEncoder;
pub(crate) use hierarchy::Hierarchy;
use input::Ids;
pub use input::Sequences;
use layout::Bytes;
use mblm_sdk::block::StageModel;
use mblm_sdk::device::Place;
use mblm_sdk::error::{Error, Result};
use mblm_sdk::mode::Mode;
use mblm_sdk::node::apply1;
use mblm_sdk::ops::cross_entropy::{CrossEntropy, Target};
use mblm_sdk::param::ParamStore;
use mblm_sdk::transfer;
pub(crate) use projection::Parents;
pub use reader::Reader;
pub(crate) use stage::Stage;
pub(crate) use stage_input::{Positions, start_rows};
pub(crate) use tokens::Tokens;
pub use watch::{Mean, Seen};

use crate::config::MblmConfig;

/// Rows whose logits exist at the same time where every byte's loss is asked for.
const LOGIT_ROWS: usize = 4096;

/// A Multiscale Byte Language Model: predicts each byte from all bytes before it.
///
/// Results have the shape of the ids: flat ids `(B, L)` give `(B, L, …)`, folded ids `(B, P_1', P_2, …, P_N)` give `(B,
/// P_1', P_2, …, P_N, …)`. Start positions are dropped. An empty input `(B, 0)` gives one position, computed from the
/// start tokens.
pub struct Mblm {
    hierarchy: Hierarchy,
}

impl Mblm {
    /// Builds the model. `seed` determines its initial values.
    ///
    /// # Errors
    /// A block rejects its width or is not causal, or the parameters do not fit in memory.
    pub fn new(config: &MblmConfig, seed: u64) -> Result<Self> {
        let model = Self::build(config, ParamStore::new(seed))?;
        model.params().draw();
        Ok(model)
    }

    /// Like [`new`](Self::new), but without allocating the parameters, to count a model of any size. Values that are
    /// read anyway are drawn then.
    pub fn outline(config: &MblmConfig, seed: u64) -> Result<Self> {
        Self::build(config, ParamStore::unlimited(seed))
    }

    /// Like [`new`](Self::new), with the parameters at `place`. Inputs and results stay on the CPU but for tensors that go
    /// through the model.
    pub fn at(config: &MblmConfig, seed: u64, place: Place) -> Result<Self> {
        let model = Self::build(config, ParamStore::new(seed).at(place))?;
        model.params().draw();
        Ok(model)
    }

    fn build(config: &MblmConfig, params: ParamStore) -> Result<Self> {
        let hierarchy = Hierarchy::new(config, params, true)?;
        match hierarchy.stages.iter().position(|stage| !stage.model.is_causal()) {
            Some(n) => Err(Error::Block(format!(
                "the block of stage {} sees bytes that it should predict; it can run only in an encoder (`mblm_config`)",
                n + 1
            ))),
            None => Ok(Mblm { hierarchy }),
        }
    }

    /// The configuration that the model was built from.
    pub fn config(&self) -> &MblmConfig {
        &self.hierarchy.config
    }

    /// Its parameters.
    pub fn params(&self) -> &ParamStore {
        &self.hierarchy.params
    }

    /// The model of each stage, from global to local.
    pub fn stage_models(&self) -> impl Iterator<Item = &dyn StageModel> {
        self.hierarchy.stages.iter().map(|stage| &*stage.model)
    }

    /// Runs `work` and measures the scale of the stages' outputs, from global to local: the root mean square over all
    /// elements (sequences, positions including start tokens and padding, channels). NaN for a stage that did not run.
    /// Passes on other threads at the same time count too.
    pub fn measure_activations<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<f64>) {
        self.hierarchy.measure_activations(work)
    }

    /// Runs `work` and returns what was seen of the stages in its training passes, from global to local.
    pub fn watch_stages<R>(&self, work: impl FnOnce() -> R) -> (R, Vec<Seen>) {
        self.hierarchy.watch_stages(work)
    }

    pub(crate) fn hierarchy(&self) -> &Hierarchy {
        &self.hierarchy
    }

    /// The input of the output layer. Position l predicts byte l + 1.
    ///
    /// # Shapes
    /// - `ids`: `(B, L)` or `(B, P_1', P_2, …, P_N)`, integers; returns `(B, L, D_N)` or `(B, P_1', …, P_N, D_N)`
    pub fn hidden_state(&self, ids: &Tensor, mode: Mode) -> Result<Tensor> {
        let ids = self.read(ids)?;
        match ids.len {
            0 => self.empty(ids.batch, mode),
            _ => self.per_byte(&ids, &self.hierarchy.run(&ids, None, mode)?),
        }
    }

    /// The logits of the next byte at every position.
    ///
    /// # Shapes
    /// - `ids`: `(B, L)` or folded; returns `(B, L, V)`, `(B, 1, V)` for `L = 0`, or folded likewise
    pub fn logits(&self, ids: &Tensor, mode: Mode) -> Result<Tensor> {
        self.hierarchy.logits(&self.hidden_state(ids, mode)?, mode)
    }

    /// The mean loss in nats over all bytes that are not the pad token and have a nonzero weight. The first byte is
    /// predicted from the first start token. Returns 0 with a warning if there is no such byte.
    ///
    /// # Shapes
    /// - `ids`: `(B, L)` or folded; `loss_mask`: the same shape, weights; returns a scalar
    pub fn loss(&self, ids: &Tensor, loss_mask: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let ids = self.read(ids)?;
        let weights = loss_mask.map(|mask| ids.beside("loss_mask", mask)).transpose()?;
        Ok(warned(self.mean_loss(&ids, weights.as_deref(), mode)?))
    }

    /// Like [`loss`](Self::loss), and returns the number of bytes too, so that losses of several batches can be
    /// averaged. Returns 0 of 0 bytes without a warning.
    pub fn counted_loss(&self, sequences: &Sequences, mode: Mode) -> Result<(Tensor, usize)> {
        self.mean_loss(&self.take(sequences)?, sequences.loss_mask, mode)
    }

    fn mean_loss(&self, ids: &Ids, weights: Option<&[f32]>, mode: Mode) -> Result<(Tensor, usize)> {
        let targets = self.targets(ids, weights);
        let count = targets.len();
        match count {
            0 => Ok((self.hierarchy.zero()?, 0)),
            _ => Ok((self.hierarchy.loss(ids, targets, None, mode)?, count)),
        }
    }

    /// Computes [`loss`](Self::loss) and [`logits`](Self::logits) in one forward pass.
    pub fn loss_and_logits(&self, ids: &Tensor, loss_mask: Option<&Tensor>, mode: Mode) -> Result<(Tensor, Tensor)> {
        let read = self.read(ids)?;
        let weights = loss_mask.map(|mask| read.beside("loss_mask", mask)).transpose()?;
        let targets = self.targets(&read, weights.as_deref());
        if targets.is_empty() {
            return Ok((warned((self.hierarchy.zero()?, 0)), self.logits(ids, mode)?));
        }
        let local = self.hierarchy.run(&read, None, mode)?;
        let logits = self.hierarchy.logits(&self.per_byte(&read, &local)?, mode)?;
        Ok((self.cross_entropy(&local, targets, mode)?, logits))
    }

    /// The loss in nats of every byte. Its mean is [`loss`](Self::loss). NaN for the pad token, which is never
    /// predicted.
    ///
    /// # Errors
    /// A loss is not finite. The error names the stage that caused it.
    ///
    /// # Shapes
    /// - returns `(B, L)`
    pub fn byte_losses(&self, sequences: &Sequences) -> Result<Vec<f32>> {
        let ids = self.take(sequences)?;
        let targets = self.targets(&ids, None);
        let local = self.hierarchy.run(&ids, None, Mode::Eval)?.flatten_to(1)?;
        let known = self.losses_at(&local, &targets)?;
        if let Some(loss) = known.iter().find(|loss| !loss.is_finite()) {
            let pass = || self.hierarchy.run(&ids, None, Mode::Eval);
            return Err(self.hierarchy.not_finite(&format!("the loss of a byte is {loss}"), pass));
        }
        let mut known = known.into_iter();
        let loss = |token: &u32| match *token as usize == self.config().pad_token_id {
            true => f32::NAN,
            false => known.next().unwrap_or(f32::NAN),
        };
        Ok(sequences.ids.iter().map(loss).collect())
    }

    /// The losses of targets, in nats, from rows of the local stage's output, `(rows, D_N)`.
    fn losses_at(&self, hidden: &Tensor, targets: &[Target]) -> Result<Vec<f32>> {
        let mut losses = Vec::with_capacity(targets.len());
        for targets in targets.chunks(LOGIT_ROWS) {
            let rows: Vec<u32> = targets.iter().map(|target| target.row).collect();
            let hidden = hidden.index_select(&transfer::to_tensor(&rows, rows.len(), hidden.device())?, 0)?;
            let logits = transfer::to_vec::<f32>(&self.hierarchy.logits(&hidden, Mode::Eval)?)?;
            let logits = logits.chunks_exact(self.config().num_tokens);
            losses.extend(logits.zip(targets).map(|(logits, target)| surprise(logits, target.token)));
        }
        Ok(losses)
    }

    fn read(&self, ids: &Tensor) -> Result<Ids> {
        let ids = Ids::new(ids, &self.hierarchy.config, 1)?;
        self.hierarchy.check_length(&ids)?;
        Ok(ids)
    }

    fn take(&self, sequences: &Sequences) -> Result<Ids> {
        let ids = Ids::of(sequences, &self.hierarchy.config, 1)?;
        self.hierarchy.check_length(&ids)?;
        Ok(ids)
    }

    fn cross_entropy(&self, local: &Tensor, targets: Vec<Target>, mode: Mode) -> Result<Tensor> {
        let (weight, bias) = (self.hierarchy.out_weight.clone(), self.hierarchy.out_bias.clone());
        apply1(CrossEntropy { weight, bias, targets, training: mode != Mode::Eval }, local, mode)
    }

    /// Which row of the local stage's output predicts which byte. Start positions predict nothing but the first byte
    /// of all: every other byte is predicted from the one before it, across patch borders too.
    fn targets(&self, ids: &Ids, weights: Option<&[f32]>) -> Vec<Target> {
        let config = self.config();
        // The one stage of a plain language model is as long as its input.
        let padded_len = ids.layout.padded_len;
        let local = if config.num_stages() == 1 { padded_len } else { config.seq_lens[config.num_stages() - 1] };
        let row = |b: usize, l: usize| match &ids.layout.bytes {
            Some(bytes) => bytes.rows[b * ids.len + l] as usize,
            None => b * (padded_len / local.max(1) * (1 + local)) + l / local * (1 + local) + 1 + l % local,
        };
        let target = |(b, l): (usize, usize)| {
            // The start of a sequence stands before its first byte.
            let row = if l == 0 { row(b, 0) - 1 } else { row(b, l - 1) };
            let weight = weights.map_or(1.0, |w| w[b * ids.len + l]);
            Target { row: row as u32, token: ids.token(b, l), weight }
        };
        let all = (0..ids.batch).flat_map(|b| (0..ids.len).map(move |l| (b, l)));
        let wanted = |t: &Target| t.token as usize != config.pad_token_id && t.weight != 0.0;
        all.map(target).filter(wanted).collect()
    }

    /// Drops start positions and padding from the local stage's output.
    fn per_byte(&self, ids: &Ids, local: &Tensor) -> Result<Tensor> {
        let (_, positions, dim) = local.dims3()?;
        let bytes = match &ids.layout.bytes {
            Some(Bytes { rows, .. }) => {
                local.flatten_to(1)?.index_select(&transfer::to_tensor(rows, rows.len(), local.device())?, 0)?
            }
            None => {
                let bytes = local.narrow(1, 1, positions - 1)?;
                bytes.reshape((ids.batch, ids.layout.padded_len, dim))?.narrow(1, 0, ids.len)?
            }
        };
        Ok(bytes.reshape(ids.result_shape(dim))?)
    }

    /// `L = 0`: each stage sees its start token alone, to which, here and only here, the stage above adds.
    fn empty(&self, batch: usize, mode: Mode) -> Result<Tensor> {
        let mut above: Option<Tensor> = None;
        for stage in &self.hierarchy.stages {
            let Some(start) = &stage.input.start else { continue };
            let mut input = start_rows(start, batch, mode)?;
            if let Some(above) = above {
                input = (input + above)?;
            }
            let output = stage.watch.run(&input, mode, |x| stage.model.forward(x, None, mode))?;
            let Some(next) = &stage.next else { return Ok(output) };
            above = Some(next.forward(&output, &Parents::First(1), 1, mode)?);
        }
        unreachable!("the last stage has no next")
    }
}

/// `-ln softmax(logits)[token]`
fn surprise(logits: &[f32], token: u32) -> f32 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, logit| max.max(*logit));
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    (sum.ln() - f64::from(logits[token as usize] - max)) as f32
}

/// A loss by itself, where nobody learns how many targets it is of.
fn warned((loss, count): (Tensor, usize)) -> Tensor {
    if count == 0 {
        tracing::warn!("all targets are padding or masked out; the loss is 0");
    }
    loss
}
