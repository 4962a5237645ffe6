//! The training loop: batches in, gradients accumulated, clipped and stepped on; losses logged, validated and saved.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Tensor;
use mblm_core::model::Mblm;
use mblm_core::{Mode, Param, ParamStore};

use crate::checkpoint::{Checkpoint, Shelf, Snapshot, TrainState};
use crate::config::RunConfig;
use crate::data::Splits;
use crate::data::batches::{Batches, Cursor};
use crate::data::order::mix;
use crate::error::{Error, Result};
use crate::evaluate::{loss_of, mean_loss};
use crate::optimizer::{Adam, AdamConfig, clip_grad_norm, first_non_finite};
use crate::plan::Plan;
use crate::progress::Progress;
use crate::run::{LossEntry, LossLog};
use crate::timestamp::Timestamp;

/// What can be trained.
pub trait TrainModel {
    /// The parameters, which training changes.
    fn params(&self) -> &ParamStore;

    /// The mean loss in nats, a scalar; its backward pass reaches [`params`](Self::params).
    ///
    /// # Shapes
    /// - `ids`: `(B, L)`, `u32`; `loss_mask`: the same, `f32`
    fn loss(&self, ids: &Tensor, loss_mask: Option<&Tensor>, mode: Mode) -> mblm_core::Result<Tensor>;
}

impl TrainModel for Mblm {
    fn params(&self) -> &ParamStore {
        self.params()
    }

    fn loss(&self, ids: &Tensor, loss_mask: Option<&Tensor>, mode: Mode) -> mblm_core::Result<Tensor> {
        self.loss(ids, loss_mask, mode)
    }
}

/// Where a run leaves what it finds.
pub struct Record {
    /// Its checkpoints.
    pub checkpoints: Shelf,
    /// Its losses.
    pub losses: LossLog,
    /// Its display.
    pub progress: Progress,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// Whether it was stopped before its end.
    pub interrupted: bool,
    /// Where it stands.
    pub state: TrainState,
}

/// A model in training. All that decides its future is in its parameters, its optimizer and its [`TrainState`].
pub struct Trainer<'a> {
    model: &'a dyn TrainModel,
    config: &'a RunConfig,
    config_yaml: &'a str,
    train: Batches,
    valid: Batches,
    plan: Plan,
    adam: Adam,
    state: TrainState,
}

impl<'a> Trainer<'a> {
    /// A trainer at the start of a run.
    ///
    /// # Errors
    /// The configuration does not fit the data.
    pub fn new(model: &'a dyn TrainModel, splits: Splits, config: &'a RunConfig, config_yaml: &'a str) -> Result<Self> {
        let plan = Plan::new(config)?;
        let section = &config.train;
        let (batch_size, seq_len) = (section.batch_size, config.params.input_seq_len);
        let batches = |dataset, shuffle: bool, seed, drop_last| Batches {
            dataset,
            batch_size,
            seq_len,
            shuffle: shuffle.then_some(seed),
            drop_last,
        };
        let train = batches(splits.train, section.shuffle_train, section.seed, true);
        let valid = batches(splits.valid, section.shuffle_eval, !section.seed, false);
        if train.num_batches(0) == 0 {
            return Err(Error::Config(format!(
                "train.batch_size: found {batch_size}, but the training data are {} sequence(s) of {seq_len} bytes \
                 (input_seq_len); expected at most that many: lower one of the two or add data",
                train.dataset.num_sequences(0)
            )));
        }
        let adam_config = AdamConfig { weight_decay: section.weight_decay, ..AdamConfig::default() };
        let state = TrainState {
            step: 0,
            batches: 0,
            accumulated: 0,
            next: Cursor::default(),
            elements_seen: 0,
            seed: section.seed,
            data: splits.fingerprint,
            valid_loss: None,
            best_valid_loss: None,
            avg_grad: (-1.0, -1.0),
            plugins: config.plugins(),
        };
        let adam = Adam::new(model.params(), adam_config);
        Ok(Trainer { model, config, config_yaml, train, valid, plan, adam, state })
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// The checkpoint is damaged, or of another model, other data, or a configuration that reads them differently.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let saved = checkpoint.state()?;
        let place = checkpoint.path().display();
        if !saved.data.is_empty() && saved.data != self.state.data {
            return Err(Error::Config(format!(
                "io.dataset_dir: the data are not those of {place}: files were added, removed, renamed or resized since; \
                 expected the same, so that the run goes on with what it has not seen"
            )));
        }
        if saved.seed != self.state.seed {
            return Err(Error::Config(format!(
                "train.seed: found {}, expected {}, with which {place} was trained",
                self.state.seed, saved.seed
            )));
        }
        if saved.next.batch >= self.train.num_batches(saved.next.epoch) {
            return Err(Error::Config(format!(
                "{place} goes on at batch {} of an epoch, which now has {}; expected the batch_size and input_seq_len \
                 of before",
                saved.next.batch,
                self.train.num_batches(saved.next.epoch)
            )));
        }
        let (plugins, data) = (std::mem::take(&mut self.state.plugins), std::mem::take(&mut self.state.data));
        self.state = TrainState { plugins, data, ..checkpoint.restore(self.model.params(), &mut self.adam)? };
        Ok(())
    }

    /// What the run will do.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Where it stands.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// How its training data are read.
    pub fn training_data(&self) -> &Batches {
        &self.train
    }

    /// Runs one training sequence through the model and changes nothing: what the model does not take shows now, and
    /// not when a run folder has been made.
    pub fn rehearse(&self) -> Result<()> {
        let batch = self.train.read(self.state.next)?;
        let one = |tensor: &Tensor| tensor.narrow(0, 0, 1);
        let mask = batch.loss_mask.as_ref().map(one).transpose()?;
        match loss_of(self.model, &one(&batch.ids)?, mask.as_ref()) {
            Err(Error::Core(mblm_core::Error::Input(message))) => Err(Error::Config(format!(
                "params.input_seq_len: the model does not take sequences of {} bytes: {message}",
                self.config.params.input_seq_len
            ))),
            result => result.map(drop),
        }
    }

    /// Trains to the end, or until `stop` is raised: then the current batch is finished and a checkpoint saved.
    ///
    /// # Errors
    /// A loss or a gradient that is not finite ends the run before the weights change; checkpoints stay.
    pub fn run(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<Outcome> {
        let mut checkpoint = None;
        // A run that was interrupted while it validated does that first.
        let mut validates = self.state.batches > 0 && self.state.valid_loss.is_none() && self.at_valid_point();
        loop {
            if validates && self.validate(record, stop)? {
                checkpoint = Some(self.save(record)?);
            }
            let finished = self.state.batches >= self.plan.batches;
            if finished || stop.load(Ordering::Relaxed) {
                let interrupted = !finished || (validates && self.state.valid_loss.is_none());
                let checkpoint = match checkpoint {
                    Some(path) if self.is_of(&path) => path,
                    _ => self.save(record)?,
                };
                return Ok(Outcome { checkpoint, interrupted, state: self.state.clone() });
            }
            self.train_batch(record)?;
            validates = self.at_valid_point();
        }
    }

    /// Whether `checkpoint` holds this very state.
    fn is_of(&self, checkpoint: &Path) -> bool {
        Checkpoint::open(checkpoint).and_then(|found| found.state()).is_ok_and(|state| state == self.state)
    }

    /// Whether the last batch is one to validate after.
    fn at_valid_point(&self) -> bool {
        self.plan.valid_points.contains(&(self.state.batches.wrapping_sub(1)))
    }

    fn train_batch(&mut self, record: &mut Record) -> Result<()> {
        let at = self.state.next;
        let index = self.state.batches;
        let batch = self.train.read(at)?;
        let mode = Mode::train(mix(mix(self.state.seed) ^ index));
        let mut loss = self.model.loss(&batch.ids, batch.loss_mask.as_ref(), mode)?;
        let value = loss.to_scalar::<f32>()? as f64;
        if !value.is_finite() {
            return Err(self.non_finite_loss(value));
        }
        if self.plan.accumulate > 1 {
            loss = (loss / self.plan.accumulate as f64)?;
        }
        self.model.params().backward(&loss)?;
        self.state.batches += 1;
        self.state.accumulated += 1;
        self.state.elements_seen += self.plan.elements_per_batch;
        self.state.next = self.train.after(at);
        self.state.valid_loss = None;
        record.progress.batch(self.state.batches, value);
        if self.plan.train_points.contains(&index) {
            let lr = self.plan.schedule.lr(self.state.step);
            record.losses.add(&LossEntry { lr, ..self.entry("train", at, value) })?;
            record.progress.train_loss(self.state.batches, value, lr);
        }
        if self.state.accumulated == self.plan.accumulate {
            self.gradient_step()?;
        }
        Ok(())
    }

    fn gradient_step(&mut self) -> Result<()> {
        let store = self.model.params();
        let norm = clip_grad_norm(store, self.config.train.gradient_clipping.unwrap_or(f64::INFINITY));
        if !norm.norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        self.adam.step(store, self.plan.schedule.lr(self.state.step))?;
        store.zero_grad();
        self.state.step += 1;
        self.state.accumulated = 0;
        self.state.avg_grad = (norm.mean, norm.mean * norm.factor);
        Ok(())
    }

    /// Validates; false if it was stopped meanwhile.
    fn validate(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<bool> {
        let Some(loss) = mean_loss(self.model, &self.valid, self.config.train.max_eval_steps, stop)? else {
            return Ok(false);
        };
        if !loss.is_finite() {
            return Err(self.non_finite_loss(loss));
        }
        let is_best = self.state.best_valid_loss.is_none_or(|best| loss < best);
        self.state.valid_loss = Some(loss);
        if is_best {
            self.state.best_valid_loss = Some(loss);
        }
        let at = self.last_batch();
        record.losses.add(&LossEntry { avg_grad: -1.0, avg_grad_clipped: -1.0, ..self.entry("valid", at, loss) })?;
        record.progress.valid_loss(self.state.batches, loss, is_best);
        Ok(true)
    }

    /// The place of the batch before the next one.
    fn last_batch(&self) -> Cursor {
        let mut at = self.state.next;
        while at.batch == 0 && at.epoch > 0 {
            at.epoch -= 1;
            at.batch = self.train.num_batches(at.epoch);
        }
        Cursor { batch: at.batch.saturating_sub(1), ..at }
    }

    fn save(&mut self, record: &mut Record) -> Result<PathBuf> {
        let store = self.model.params();
        // Gradients that wait in the checkpoint must be good ones.
        if self.state.accumulated > 0 && !clip_grad_norm(store, f64::INFINITY).norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        let snapshot = Snapshot { store, adam: &self.adam, state: &self.state, config_yaml: self.config_yaml };
        record.checkpoints.save(snapshot, self.config.io.num_models_to_save)
    }

    /// A row of `loss.csv` for the last batch, `at`.
    fn entry(&self, kind: &str, at: Cursor, loss: f64) -> LossEntry {
        LossEntry {
            gpu_rank: 0,
            timestamp: Timestamp::now().to_string(),
            elements_seen: self.state.elements_seen,
            kind: kind.into(),
            epoch: at.epoch,
            batch: at.batch,
            cum_batch: self.state.batches - 1,
            loss,
            lr: -1.0,
            avg_grad: self.state.avg_grad.0,
            avg_grad_clipped: self.state.avg_grad.1,
        }
    }

    fn non_finite_loss(&self, loss: f64) -> Error {
        let finite = |param: &Param| param.values().iter().all(|value| value.is_finite());
        let what = match first_non_finite(self.model.params(), finite) {
            Some(name) => format!("the loss is {loss}, and so is a value of parameter {name}"),
            None => format!("the loss is {loss}, while all parameters are finite"),
        };
        Error::NonFinite { step: self.state.step, batch: self.state.batches, what }
    }

    fn non_finite_gradient(&self) -> Error {
        let finite = |param: &Param| param.grad().iter().all(|grad| grad.is_finite());
        let name = first_non_finite(self.model.params(), finite).unwrap_or_default();
        let what = format!("the gradient of {name} is not finite");
        Error::NonFinite { step: self.state.step, batch: self.state.batches.saturating_sub(1), what }
    }
}

#[cfg(test)]
mod tests;
