//! The training loop: reads batches; accumulates, clips and applies gradients; logs losses, validates and saves
//! checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mblm_base::random::mix;
use mblm_core::Mode;
use mblm_core::device::{self, has_bf16};
use mblm_core::gemm::{Precision, autocast};
use mblm_core::simd::instruction_set;
use mblm_data::batches::{Batches, Cursor};
use mblm_data::prefetch::Prefetch;
use mblm_data::{Fingerprint, Splits};

use crate::checkpoint::{Checkpoint, Shelf, Snapshot, TrainState, Window};
use crate::config::{LossAverage, ResumeSection, RunConfig};
use crate::error::{AtPath, Error, Result};
use crate::journal::folder::{LossEntry, LossLog, replace_config};
use crate::journal::metrics::{Kind, Metrics, Point, Scalars, activation_norms, loss_scalars, stage_grad_norms};
use crate::journal::timemem::TimeMem;
use crate::journal::timestamp::Timestamp;
use crate::model::{Loss, TrainModel, sequences};
use crate::progress::Progress;
use crate::trainer::optimizer::{Adam, AdamConfig, GradNorm, clip_grad_norm, scale_grads};
use crate::trainer::plan::RunPlan;

mod faults;
pub mod optimizer;
pub mod plan;
pub mod points;
mod restore;
pub mod schedule;
mod validation;

pub use restore::Remarks;
pub(crate) use restore::check_data;

/// Output of a run: checkpoints, losses, metrics, progress.
pub struct Record {
    /// Its folder.
    pub folder: PathBuf,
    /// Its checkpoints.
    pub checkpoints: Shelf,
    /// Its losses.
    pub losses: LossLog,
    /// Its metrics.
    pub metrics: Metrics,
    /// What its first batches cost.
    pub timemem: TimeMem,
    /// Its display.
    pub progress: Progress,
}

/// Why training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It reached the target of its configuration.
    Finished,
    /// It reached `train.max_seconds`.
    TimeLimit,
    /// It was interrupted.
    Stopped,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// Why.
    pub end: End,
    /// Where it stands.
    pub state: TrainState,
}

/// A model in training. Its parameters, its optimizer and its [`TrainState`] determine everything that follows.
pub struct Trainer<'a> {
    model: &'a dyn TrainModel,
    config: &'a RunConfig,
    /// What checkpoints keep of it.
    config_yaml: String,
    train: Arc<Batches>,
    ahead: Prefetch,
    valid: Batches,
    test: Option<Batches>,
    plan: RunPlan,
    adam: Adam,
    data: Fingerprint,
    state: TrainState,
}

impl<'a> Trainer<'a> {
    /// A trainer at the start of a run.
    ///
    /// # Errors
    /// The configuration does not fit the data or this machine.
    pub fn new(model: &'a dyn TrainModel, splits: Splits, config: &'a RunConfig) -> Result<Self> {
        let plan = RunPlan::new(config)?;
        let section = &config.train;
        let device = &model.params().place().device;
        if section.precision == Precision::Bf16 && !has_bf16(device) {
            let reason = match device.is_cpu() {
                true => "this CPU has no AVX-512 BF16 instructions".into(),
                false => {
                    format!("{} has no bfloat16 (cards have it from compute capability 8.0 on)", device::name(device))
                }
            };
            return Err(Error::Config(format!("train.precision: expected f32: {reason}, found bf16")));
        }
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
        let test = splits.test.map(|dataset| batches(dataset, false, 0, false));
        let train = Arc::new(train);
        let (beta1, beta2) = section.betas;
        let adam_config = AdamConfig { beta1, beta2, weight_decay: section.weight_decay, ..AdamConfig::default() };
        let state = TrainState {
            data: splits.fingerprint.as_str().into(),
            schedule: Some(plan.schedule),
            threads: Some(rayon::current_num_threads()),
            instructions: Some(instruction_set().into()),
            device: Some(device::name(&model.params().place().device)),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            ..TrainState::new(section.seed, config.plugins())
        };
        let adam = Adam::new(model.params(), adam_config);
        let ahead = Prefetch::new(train.clone());
        let data = splits.fingerprint;
        let config_yaml = config.to_yaml()?;
        let mut trainer = Trainer { model, config, config_yaml, train, ahead, valid, test, plan, adam, data, state };
        trainer.go_to(Cursor::default());
        Ok(trainer)
    }

    /// Begins a new run at another place in the data, with weights whose validation loss is known or not.
    ///
    /// # Errors
    /// The data have no such place.
    pub fn begin_at(&mut self, next: Cursor, valid_loss: Option<f64>) -> Result<()> {
        let batches = self.train.num_batches(next.epoch);
        if next.batch >= batches {
            return Err(Error::Config(format!(
                "resume.next_batch_index: expected a batch of epoch {}, which has {batches}, found {}",
                next.epoch, next.batch
            )));
        }
        self.go_to(next);
        (self.state.valid_loss, self.state.best_valid_loss) = (valid_loss, valid_loss);
        self.state.first_batch = (0..next.epoch).map(|epoch| self.train.num_batches(epoch)).sum::<u64>() + next.batch;
        let absolute = |file: &Path| file.canonicalize().unwrap_or(file.into()).to_string_lossy().into_owned().into();
        self.state.resumed_from = self.config.resume.as_ref().map(|resume| absolute(&resume.checkpoint_file));
        Ok(())
    }

    fn go_to(&mut self, next: Cursor) {
        (self.state.next, self.state.epoch_batches) = (next, Some(self.train.num_batches(next.epoch)));
    }

    /// Takes over the weights and moments of another run, but not its place in the data and its schedule.
    pub fn take_over(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.restore(self.model.params(), &mut self.adam)?;
        self.state.optimizer_step = self.adam.step_count();
        self.model.params().zero_grad();
        Ok(())
    }

    /// What the run will do.
    pub fn plan(&self) -> &RunPlan {
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

    /// Trains to the end, or until `stop` is raised, or until `train.max_seconds` after `started`: then the current batch
    /// is finished and a checkpoint saved, at the time limit with a validation.
    ///
    /// # Errors
    /// A loss or a gradient is not finite. The run ends before the weights change; checkpoints stay.
    pub fn run(&mut self, record: &mut Record, stop: &AtomicBool, started: Instant) -> Result<Outcome> {
        let is_late = || self.config.train.max_seconds.is_some_and(|limit| started.elapsed().as_secs_f64() >= limit);
        // A window that a change of the configuration completed.
        if self.window_is_complete() {
            self.complete_window()?;
            self.gradient_step()?;
            self.state.valid_loss = None;
        }
        // A run that was interrupted while it validated does that first.
        let mut validates = self.state.valid_loss.is_none() && self.at_valid_point();
        loop {
            if validates && self.validate(record, stop)? {
                self.save(record)?;
            }
            let end = match () {
                () if self.is_finished() => Some(End::Finished),
                () if stop.load(Ordering::Relaxed) => Some(End::Stopped),
                () if self.is_at_end() => Some(End::Finished),
                () if is_late() => Some(self.validate_at_limit(record, stop)?),
                () => None,
            };
            if let Some(end) = end {
                let newest = record.checkpoints.list()?.pop();
                let checkpoint = match newest {
                    Some(path) if self.is_of(&path) => path,
                    _ => self.save(record)?,
                };
                return Ok(Outcome { checkpoint, end, state: self.state.clone() });
            }
            let before = self.state.clone();
            if let Err(error) = self.train_batch(record) {
                return Err(self.failed(error, before, record));
            }
            validates = self.at_valid_point();
        }
    }

    /// Whether nothing is left to train or to validate.
    pub fn is_finished(&self) -> bool {
        self.is_at_end() && self.state.valid_loss.is_some() && !self.window_is_complete()
    }

    fn is_at_end(&self) -> bool {
        self.state.batches >= self.plan.batches || self.is_stale()
    }

    /// Whether the data set has a test split.
    pub fn has_test(&self) -> bool {
        self.test.is_some()
    }

    /// Whether the loss has not become better for as many validations as the configuration allows.
    fn is_stale(&self) -> bool {
        self.config.train.early_stop.is_some_and(|most| self.state.stale_validations >= most)
    }

    /// Whether `checkpoint` holds this very state.
    fn is_of(&self, checkpoint: &Path) -> bool {
        Checkpoint::open(checkpoint).and_then(|found| found.state()).is_ok_and(|state| state == self.state)
    }

    /// Whether the last batch is one to validate after.
    fn at_valid_point(&self) -> bool {
        self.state.batches > 0 && self.plan.validates_after(self.state.batches - 1)
    }

    /// Whether the gradients that wait are those of a whole step: of all batches that belong to it, or of the last ones
    /// of the run. One in which nothing counts takes more batches in.
    fn window_is_complete(&self) -> bool {
        let window = &self.state.window;
        let is_full = window.batches >= self.plan.accumulate || self.state.batches >= self.plan.batches;
        window.weight > 0.0 && is_full
    }

    fn train_batch(&mut self, record: &mut Record) -> Result<()> {
        let at = self.state.next;
        let (index, cum_batch) = (self.state.batches, self.state.cum_batch());
        let started = Instant::now();
        let batch = self.ahead.take(at)?;
        let read = started.elapsed();
        let mode = Mode::train(mix(mix(self.state.seed) ^ index));
        let precision = self.config.train.precision;
        let is_point = self.plan.train_points.contains(index);
        let sequences = sequences(&batch);
        let (loss, activations) = autocast(precision, || match is_point {
            true => self.model.measured_loss(&sequences, mode),
            false => Ok((self.model.loss(&sequences, mode)?, Vec::new())),
        })?;
        let value = loss.sum()?.mean();
        if let Some(value) = value.filter(|value| !value.is_finite()) {
            return Err(self.non_finite_loss(value, &sequences));
        }
        let forward = started.elapsed() - read;
        self.add_gradient(&loss)?;
        let backward = started.elapsed() - read - forward;
        record.timemem.train(cum_batch, self.train.batch_size, forward.as_secs_f64(), backward.as_secs_f64())?;
        let (size, long) = (self.train.batch_size as u64, self.train.seq_len as u64);
        self.state.count(size, long, self.config.train.target_elements_strategy);
        self.go_to(self.train.after(at));
        self.state.valid_loss = None;
        record.progress.batch(self.state.batches, value, read);
        let mut scalars = match value.filter(|_| is_point) {
            Some(value) => self.log_train_loss(record, at, value)?,
            None => Scalars::new(),
        };
        scalars.extend(activation_norms(&activations));
        if self.window_is_complete() {
            self.measured_step(&mut scalars)?;
        }
        record.metrics.trained(self.bytes_per_batch(), started.elapsed().as_secs_f64(), read.as_secs_f64());
        if is_point {
            scalars.extend(record.metrics.pace());
        }
        match scalars.is_empty() {
            true => Ok(()),
            false => record.metrics.record(&self.point(Kind::Train, scalars)),
        }
    }

    /// Adds a batch's gradient to those that wait, as much of it as the batch weighs among them.
    fn add_gradient(&mut self, loss: &Loss) -> Result<()> {
        let weight = match self.config.train.loss_average {
            LossAverage::Window => loss.count as f64,
            LossAverage::Batch => 1.0,
        };
        let times = self.state.window.add(weight);
        if loss.count == 0 {
            return Ok(());
        }
        let loss = if times == 1.0 { loss.mean.clone() } else { (&loss.mean * times)? };
        autocast(self.config.train.precision, || self.model.params().backward(&loss))?;
        Ok(())
    }

    fn log_train_loss(&self, record: &mut Record, at: Cursor, loss: f64) -> Result<Scalars> {
        let lr = self.plan.schedule.lr(self.state.step);
        record.losses.add(&LossEntry { lr, ..self.entry("train", at, loss) })?;
        record.progress.train_loss(self.state.batches, loss, lr);
        let mut scalars = loss_scalars(loss);
        scalars.push(("lr".into(), lr));
        Ok(scalars)
    }

    /// A gradient step; if a training point lies in the batches it is of, with the norms of its gradients.
    fn measured_step(&mut self, scalars: &mut Scalars) -> Result<()> {
        let window = self.state.batches - self.state.window.batches..self.state.batches;
        let is_measured = self.plan.train_points.any_in(window);
        self.complete_window()?;
        let stages = if is_measured { stage_grad_norms(self.model.params())? } else { Scalars::new() };
        let GradNorm { norm, factor, .. } = self.gradient_step()?;
        if is_measured {
            scalars.extend([("grad_norm".into(), norm), ("grad_norm_clipped".into(), norm * factor)]);
            scalars.extend(stages);
        }
        Ok(())
    }

    /// Makes the gradients that wait those of their mean.
    fn complete_window(&mut self) -> Result<()> {
        scale_grads(self.model.params(), self.state.window.scale())?;
        self.state.window = Window::default();
        Ok(())
    }

    fn gradient_step(&mut self) -> Result<GradNorm> {
        let store = self.model.params();
        let norm = clip_grad_norm(store, self.config.train.gradient_clipping.unwrap_or(f64::INFINITY))?;
        if !norm.norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        self.adam.step(store, self.plan.schedule.lr(self.state.step))?;
        store.zero_grad();
        self.state.step += 1;
        self.state.optimizer_step = self.adam.step_count();
        self.state.avg_grad = (norm.mean, norm.mean * norm.factor);
        Ok(norm)
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

    /// Saves a checkpoint.
    pub(crate) fn save(&self, record: &mut Record) -> Result<PathBuf> {
        let store = self.model.params();
        // Gradients that wait in the checkpoint must be good ones.
        if self.state.window.weight > 0.0 && !clip_grad_norm(store, f64::INFINITY)?.norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        let saved = record.checkpoints.save(self.snapshot(), self.config.io.num_models_to_save)?;
        record.progress.saved(self.state.batches, &saved);
        self.write_config(record, &self.config_yaml)?;
        Ok(saved)
    }

    /// Saves a checkpoint with a changed configuration. The run's `config.yaml` comes first: if the run is killed before the
    /// checkpoint is there, a resume names what changed and takes it with `--force`, as this one did.
    pub(crate) fn save_changed(&self, record: &mut Record) -> Result<()> {
        self.write_config(record, &self.config.to_yaml()?)?;
        self.save(record).map(drop)
    }

    /// Writes the run's `config.yaml`, which also says how another run begins where this one is. The checkpoint is named by
    /// its place in the run, which may be moved or copied.
    fn write_config(&self, record: &Record, config_yaml: &str) -> Result<()> {
        let best = match record.checkpoints.best() {
            Ok(best) => best,
            Err(_) => record.checkpoints.newest()?,
        };
        let best = best.path();
        let resume = ResumeSection {
            checkpoint_file: best.strip_prefix(&record.folder).unwrap_or(best).into(),
            next_epoch_index: self.state.next.epoch,
            next_batch_index: self.state.next.batch,
            migrate_embeddings: false,
            rename_modules: false,
            // For a reader: a name that is not UTF-8 must not keep the run from being saved.
            resumed_from: self.state.resumed_from.as_ref().map(|path| path.to_string_lossy().into_owned().into()),
            run: record.folder.canonicalize().at(&record.folder)?.to_str().map(PathBuf::from),
        };
        let section = serde_yaml::to_string(&BTreeMap::from([("resume", resume)]))
            .map_err(|error| Error::Config(format!("{}: {error}", best.display())))?;
        replace_config(&record.folder, &format!("{config_yaml}{section}"))
    }

    /// What a checkpoint of this moment holds.
    pub fn snapshot(&self) -> Snapshot<'_> {
        let (store, adam, state) = (self.model.params(), &self.adam, &self.state);
        Snapshot { store, adam, state, config_yaml: &self.config_yaml }
    }

    /// A row of `loss.csv` for the last batch, `at`.
    fn entry(&self, kind: &str, at: Cursor, loss: f64) -> LossEntry {
        LossEntry {
            gpu_rank: 0,
            timestamp: Timestamp::now().to_string(),
            elements_seen: self.state.elements_seen as i64,
            kind: kind.into(),
            epoch: at.epoch as i64,
            batch: at.batch as i64,
            cum_batch: self.state.cum_batch() as i64 - 1,
            loss,
            lr: -1.0,
            avg_grad: self.state.avg_grad.0,
            avg_grad_clipped: self.state.avg_grad.1,
        }
    }

    /// What was measured after the last batch.
    fn point(&self, kind: Kind, scalars: Scalars) -> Point {
        let TrainState { step, bytes_seen, .. } = self.state;
        let batch = self.state.cum_batch().saturating_sub(1); // a run may end before its first batch
        Point { batch, step, bytes_seen, kind, scalars }
    }

    fn bytes_per_batch(&self) -> u64 {
        (self.train.batch_size * self.train.seq_len) as u64
    }
}

#[cfg(test)]
mod tests;
