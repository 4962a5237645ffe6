//! The training loop: batch after batch, with gradient steps, validations and checkpoints where they are due.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mblm_core::device::{self, has_bf16};
use mblm_core::gemm::Precision;
use mblm_core::simd::instruction_set;
use mblm_data::batches::{Batches, Cursor};
use mblm_data::prefetch::Prefetch;
use mblm_data::share::share;
use mblm_data::{Fingerprint, Splits};

use crate::checkpoint::{Checkpoint, Shelf, TrainState};
use crate::config::{OptimizerKind, RunConfig};
use crate::error::{Error, Result};
use crate::journal::folder::{LossEntry, LossLog};
use crate::journal::metrics::{Kind, Metrics, Point, Scalars};
use crate::journal::timemem::TimeMem;
use crate::journal::timestamp::Timestamp;
use crate::model::TrainModel;
use crate::processes::Processes;
use crate::progress::{Course, Progress};
use crate::trainer::optimizer::Optimizer;
use crate::trainer::plan::RunPlan;

mod alike;
mod batch;
mod faults;
pub mod optimizer;
pub mod plan;
pub mod points;
mod restore;
mod save;
pub mod schedule;
mod step;
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

impl Record {
    /// That of a process which keeps nothing, since the first one does.
    pub fn elsewhere(folder: PathBuf, checkpoints: Shelf, course: Course) -> Self {
        Record {
            folder,
            checkpoints,
            losses: LossLog::nowhere(),
            metrics: Metrics::nowhere(),
            timemem: TimeMem::nowhere(),
            progress: Progress::nowhere(course),
        }
    }
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
    processes: &'a dyn Processes,
    config: &'a RunConfig,
    /// What checkpoints keep of it.
    config_yaml: String,
    train: Arc<Batches>,
    ahead: Prefetch,
    valid: Batches,
    test: Option<Batches>,
    plan: RunPlan,
    /// Bytes that a training sequence counts for: its length, or the mean length where patches follow the content.
    sequence_bytes: usize,
    optimizer: Optimizer,
    data: Fingerprint,
    state: TrainState,
}

impl<'a> Trainer<'a> {
    /// A trainer at the start of a run, one of the `processes` that train it.
    ///
    /// # Errors
    /// The configuration does not fit the data or this machine.
    pub fn new(
        model: &'a dyn TrainModel,
        splits: Splits,
        config: &'a RunConfig,
        processes: &'a dyn Processes,
    ) -> Result<Self> {
        let mean_len = splits.train.mean_len().map(|mean| (mean.round() as usize).max(1));
        let sequence_bytes = mean_len.unwrap_or(config.params.input_seq_len);
        let plan = RunPlan::new(config, sequence_bytes, processes.size())?;
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
        // Each process has an order of its own.
        let order = section.seed ^ (processes.rank() as u64) << 32;
        let sequences = splits.train.num_sequences(0);
        let train = batches(share(splits.train, processes.share()), section.shuffle_train, order, true);
        let valid = batches(splits.valid, section.shuffle_eval, !section.seed, false);
        if train.num_batches(0) == 0 {
            let each = match processes.size() {
                1 => String::new(),
                size => format!(", {} for each of {size} processes", train.dataset.num_sequences(0)),
            };
            return Err(Error::Config(format!(
                "train.batch_size: found {batch_size}, but the training data are {sequences} sequence(s) of {seq_len} \
                 bytes (input_seq_len){each}; expected at most that many: lower one of the two or add data"
            )));
        }
        if let Some(ranks) = &config.io.enabled_loss_log_for_gpus
            && processes.size() > 1
            && !ranks.iter().any(|rank| *rank < processes.size())
        {
            let last = processes.size() - 1;
            return Err(Error::Config(format!(
                "io.enabled_loss_log_for_gpus: expected processes from 0 to {last}, found {ranks:?}"
            )));
        }
        let test = splits.test.map(|dataset| batches(dataset, false, 0, false));
        let train = Arc::new(train);
        let state = TrainState {
            data: splits.fingerprint.as_str().into(),
            schedule: Some(plan.schedule),
            threads: Some(rayon::current_num_threads()),
            processes: processes.size(),
            instructions: Some(instruction_set().into()),
            device: Some(device::name(&model.params().place().device)),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            sequence_bytes: mean_len,
            ..TrainState::new(section.seed, config.plugins())
        };
        let optimizer = Optimizer::new(model.params(), section.optimizer());
        if section.optimizer == OptimizerKind::Muon && optimizer.has_second().all(|has_second| has_second) {
            return Err(Error::Config(
                "train.optimizer: expected adamw: the stages of this model have no weight matrix, which is what Muon \
                 updates, found muon"
                    .into(),
            ));
        }
        let ahead = Prefetch::new(train.clone());
        let data = splits.fingerprint;
        let config_yaml = config.to_yaml()?;
        let mut trainer = Trainer {
            model,
            processes,
            config,
            config_yaml,
            train,
            ahead,
            valid,
            test,
            plan,
            sequence_bytes,
            optimizer,
            data,
            state,
        };
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
        let before = checkpoint.sizes()?;
        restore::check_optimizer(checkpoint, &before, &self.config.train)?;
        restore::check_patching(checkpoint, &before, self.config)?;
        checkpoint.restore(self.model.params(), &mut self.optimizer)?;
        self.state.optimizer_step = self.optimizer.step_count();
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
    /// is finished and a checkpoint saved, at the time limit with a validation. Several processes finish the gradient step.
    ///
    /// # Errors
    /// A loss or a gradient is not finite. The run ends before the weights change; checkpoints stay.
    pub fn run(&mut self, record: &mut Record, stop: &AtomicBool, started: Instant) -> Result<Outcome> {
        let limit = self.config.train.max_seconds;
        let is_late = || limit.is_some_and(|limit| started.elapsed().as_secs_f64() >= limit);
        // A window that a change of the configuration completed.
        if self.window_is_complete() {
            self.complete_window()?;
            let stepped = self.gradient_step();
            self.processes.agree(stepped)?;
            self.state.valid_loss = None;
        }
        // A run that was interrupted while it validated does that first.
        let mut validates = self.state.valid_loss.is_none() && self.at_valid_point();
        loop {
            if validates && self.validate(record, stop)? {
                self.save(record)?;
            }
            let (stopped, is_late) = self.wishes(stop.load(Ordering::Relaxed), is_late());
            let end = match () {
                () if self.is_finished() => Some(End::Finished),
                () if stopped => Some(End::Stopped),
                () if self.is_at_end() => Some(End::Finished),
                () if is_late => Some(self.validate_at_limit(record, stop)?),
                () => None,
            };
            if let Some(end) = end {
                let checkpoint = self.write(record, |trainer, record| match record.checkpoints.list()?.pop() {
                    Some(path) if trainer.is_of(&path) => Ok(path),
                    _ => trainer.save_here(record),
                })?;
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

    /// Whether training is to stop, and whether its time is up, in one of the processes. Several processes end after a
    /// gradient step, so that no checkpoint has to hold what waits in each of them.
    fn wishes(&self, stop: bool, is_late: bool) -> (bool, bool) {
        if self.processes.size() > 1 && self.state.window.batches > 0 {
            return (false, false);
        }
        let mut wishes = [stop, is_late].map(|wish| f64::from(u8::from(wish)));
        self.processes.sum(&mut wishes);
        (wishes[0] > 0.0, wishes[1] > 0.0)
    }

    /// Whether the last batch is one to validate after. Several processes do after the gradient step that the batch is of,
    /// for the same reason.
    fn at_valid_point(&self) -> bool {
        let batches = self.state.batches;
        let since = match self.processes.size() {
            1 => batches.saturating_sub(1),
            _ if self.state.window.batches > 0 => batches,
            _ => batches.saturating_sub(self.plan.accumulate),
        };
        self.plan.validates_in(since..batches)
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

    /// Bytes that a training sequence counts for: its length, or the mean length where patches follow the content.
    pub fn sequence_bytes(&self) -> usize {
        self.sequence_bytes
    }

    /// Of all processes.
    fn sequences_per_batch(&self) -> u64 {
        (self.train.batch_size * self.processes.size()) as u64
    }

    /// Of all processes.
    pub fn bytes_per_batch(&self) -> u64 {
        self.sequences_per_batch() * self.sequence_bytes as u64
    }
}

#[cfg(test)]
mod tests;
