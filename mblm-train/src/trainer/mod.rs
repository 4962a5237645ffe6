//! The training loop: reads batches; accumulates, clips and applies gradients; logs losses, validates and saves
//! checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mblm_base::random::mix;
use mblm_core::Mode;
use mblm_core::device::{self, has_bf16};
use mblm_core::gemm::{Precision, autocast};
use mblm_core::simd::instruction_set;
use mblm_data::batches::{Batches, Cursor};
use mblm_data::prefetch::Prefetch;
use mblm_data::share::share;
use mblm_data::{Fingerprint, Splits};

use crate::checkpoint::{Checkpoint, Shelf, Snapshot, TrainState, Window};
use crate::config::{LossAverage, ResumeSection, RunConfig};
use crate::error::{AtPath, Error, Result};
use crate::journal::folder::{LossEntry, LossLog, replace_config};
use crate::journal::metrics::{Kind, Metrics, Point, Scalars, activation_norms, loss_scalars, stage_grad_norms};
use crate::journal::timemem::TimeMem;
use crate::journal::timestamp::Timestamp;
use crate::model::{Loss, LossSum, TrainModel, sequences};
use crate::processes::{Processes, caught};
use crate::progress::{Course, Progress};
use crate::trainer::optimizer::{Adam, AdamConfig, GradNorm, clip_grad_norm, scale_grads};
use crate::trainer::plan::RunPlan;

mod alike;
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

/// What a process found of a batch.
struct Trained {
    loss: LossSum,
    /// Of each stage, where they were asked for.
    activations: Vec<f64>,
    /// The time that reading took.
    read: Duration,
    forward: Duration,
    backward: Duration,
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
    adam: Adam,
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
        let plan = RunPlan::new(config, processes.size())?;
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
        let test = splits.test.map(|dataset| batches(dataset, false, 0, false));
        let train = Arc::new(train);
        let (beta1, beta2) = section.betas;
        let adam_config = AdamConfig { beta1, beta2, weight_decay: section.weight_decay, ..AdamConfig::default() };
        let state = TrainState {
            data: splits.fingerprint.as_str().into(),
            schedule: Some(plan.schedule),
            threads: Some(rayon::current_num_threads()),
            processes: processes.size(),
            instructions: Some(instruction_set().into()),
            device: Some(device::name(&model.params().place().device)),
            version: Some(env!("CARGO_PKG_VERSION").into()),
            ..TrainState::new(section.seed, config.plugins())
        };
        let adam = Adam::new(model.params(), adam_config);
        let ahead = Prefetch::new(train.clone());
        let data = splits.fingerprint;
        let config_yaml = config.to_yaml()?;
        let mut trainer =
            Trainer { model, processes, config, config_yaml, train, ahead, valid, test, plan, adam, data, state };
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
    /// is finished and a checkpoint saved, at the time limit with a validation. Several processes finish the gradient step.
    ///
    /// # Errors
    /// A loss or a gradient is not finite. The run ends before the weights change; checkpoints stay.
    pub fn run(&mut self, record: &mut Record, stop: &AtomicBool, started: Instant) -> Result<Outcome> {
        let limit = self.config.train.max_seconds;
        let is_late = || limit.is_some_and(|limit| started.elapsed().as_secs_f64() >= limit);
        self.must_be_alike()?;
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

    /// Whether the gradients that wait are those of a whole step: of all batches that belong to it, or of the last ones
    /// of the run. One in which nothing counts takes more batches in.
    fn window_is_complete(&self) -> bool {
        self.window_is_full() && self.processes.any(self.state.window.weight > 0.0)
    }

    fn window_is_full(&self) -> bool {
        self.state.window.batches >= self.plan.accumulate || self.state.batches >= self.plan.batches
    }

    fn train_batch(&mut self, record: &mut Record) -> Result<()> {
        let started = Instant::now();
        let at = self.state.next;
        let is_point = self.plan.train_points.contains(self.state.batches);
        let mine = caught(|| self.compute(at, is_point));
        let computed = Instant::now();
        let mine = self.processes.agree(mine)?;
        let waited = computed.elapsed();
        let mut summed = Duration::ZERO;
        let mut loss = [mine.loss.sum, mine.loss.count as f64];
        self.processes.sum(&mut loss);
        let value = LossSum { sum: loss[0], count: loss[1] as u64 }.mean();
        // A batch in which nothing counts has none.
        let losses = if is_point { self.processes.gather(mine.loss.mean().unwrap_or(f64::NAN)) } else { vec![] };
        let cum_batch = self.state.cum_batch();
        let (size, long) = (self.sequences_per_batch(), self.train.seq_len as u64);
        self.state.count(size, long, self.config.train.target_elements_strategy);
        self.go_to(self.train.after(at));
        self.state.valid_loss = None;
        let lr = self.plan.schedule.lr(self.state.step);
        let entries = self.train_entries(at, &losses, lr);
        let mut scalars = match value.filter(|_| is_point) {
            Some(value) => [loss_scalars(value), vec![("lr".into(), lr)]].concat(),
            None => Scalars::new(),
        };
        scalars.extend(activation_norms(&mine.activations));
        if self.window_is_full() {
            match self.processes.any(self.state.window.weight > 0.0) {
                true => {
                    let stepped = self.measured_step(&mut scalars);
                    summed = self.processes.agree(stepped)?;
                }
                // Every window of several processes has the same number of batches.
                false if self.processes.size() > 1 => self.state.window = Window::default(),
                false => {}
            }
        }
        record.progress.batch(self.state.batches, value, mine.read);
        if let Some(value) = value.filter(|_| is_point) {
            record.progress.train_loss(self.state.batches, value, lr);
        }
        record.metrics.trained(self.bytes_per_batch(), started.elapsed().as_secs_f64(), mine.read.as_secs_f64());
        if self.processes.size() > 1 {
            record.metrics.together(waited.as_secs_f64(), summed.as_secs_f64());
        }
        if is_point {
            scalars.extend(record.metrics.pace());
        }
        let noted = self.note_batch(record, cum_batch, &mine, &entries, scalars);
        self.processes.agree(noted)
    }

    /// Reads the batch at `at`, and adds its gradient to those that wait.
    fn compute(&mut self, at: Cursor, is_point: bool) -> Result<Trained> {
        let started = Instant::now();
        let batch = self.ahead.take(at)?;
        let read = started.elapsed();
        // As one process would draw that trains on the same batches, one after the other.
        let index = self.state.batches * self.processes.size() as u64 + self.processes.rank() as u64;
        let mode = Mode::train(mix(mix(self.state.seed) ^ index));
        let sequences = sequences(&batch);
        let (loss, activations) = autocast(self.config.train.precision, || match is_point {
            true => self.model.measured_loss(&sequences, mode),
            false => Ok((self.model.loss(&sequences, mode)?, Vec::new())),
        })?;
        let found = loss.sum()?;
        if let Some(value) = found.mean().filter(|value| !value.is_finite()) {
            return Err(self.non_finite_loss(value, &sequences));
        }
        let forward = started.elapsed() - read;
        self.add_gradient(&loss)?;
        let backward = started.elapsed() - read - forward;
        Ok(Trained { loss: found, activations, read, forward, backward })
    }

    /// Rows of `loss.csv` for the batch at `at`, one of each process that is to have some.
    fn train_entries(&self, at: Cursor, losses: &[f64], lr: f64) -> Vec<LossEntry> {
        let wanted = |rank: &usize| match &self.config.io.enabled_loss_log_for_gpus {
            Some(ranks) if losses.len() > 1 => ranks.contains(rank),
            _ => *rank == 0,
        };
        let all = losses.iter().copied().enumerate();
        let found = all.filter(|(rank, loss)| wanted(rank) && !loss.is_nan());
        found.map(|(rank, loss)| LossEntry { gpu_rank: rank as u32, lr, ..self.entry("train", at, loss) }).collect()
    }

    fn note_batch(
        &self,
        record: &mut Record,
        cum_batch: u64,
        mine: &Trained,
        entries: &[LossEntry],
        scalars: Scalars,
    ) -> Result<()> {
        let (forward, backward) = (mine.forward.as_secs_f64(), mine.backward.as_secs_f64());
        record.timemem.train(cum_batch, self.train.batch_size, forward, backward)?;
        entries.iter().try_for_each(|entry| record.losses.add(entry))?;
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

    /// A gradient step; if a training point lies in the batches it is of, with the norms of its gradients. Returns how long
    /// it took to add up those of all processes.
    fn measured_step(&mut self, scalars: &mut Scalars) -> Result<Duration> {
        let window = self.state.batches - self.state.window.batches..self.state.batches;
        let is_measured = self.plan.train_points.any_in(window);
        let started = Instant::now();
        self.complete_window()?;
        let summed = started.elapsed();
        let stages = if is_measured { stage_grad_norms(self.model.params())? } else { Scalars::new() };
        let GradNorm { norm, factor, .. } = self.gradient_step()?;
        if is_measured {
            scalars.extend([("grad_norm".into(), norm), ("grad_norm_clipped".into(), norm * factor)]);
            scalars.extend(stages);
        }
        Ok(summed)
    }

    /// Makes the gradients that wait, in all processes, those of their mean.
    fn complete_window(&mut self) -> Result<()> {
        let window = std::mem::take(&mut self.state.window);
        let mut weight = [window.weight];
        self.processes.sum(&mut weight);
        scale_grads(self.model.params(), window.scale(weight[0]))?;
        self.sum_gradients()
    }

    fn sum_gradients(&self) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let store = self.model.params();
        let mut there: Vec<f64> = store.gradients_there().into_iter().map(|there| f64::from(u8::from(there))).collect();
        self.processes.sum(&mut there);
        let there: Vec<bool> = there.into_iter().map(|count| count > 0.0).collect();
        Ok(store.flat_gradients(&there, |all| self.processes.sum_gradients(all))?)
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

    /// Has the first process write something, and the others wait for it: their result is the run's folder.
    fn write(&self, record: &mut Record, work: impl FnOnce(&Self, &mut Record) -> Result<PathBuf>) -> Result<PathBuf> {
        let written = if self.processes.is_first() { work(self, record) } else { Ok(record.folder.clone()) };
        self.processes.agree(written)
    }

    /// Saves a checkpoint.
    pub(crate) fn save(&self, record: &mut Record) -> Result<PathBuf> {
        self.must_be_alike()?;
        self.write(record, Self::save_here)
    }

    fn save_here(&self, record: &mut Record) -> Result<PathBuf> {
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
        let save = |trainer: &Self, record: &mut Record| {
            trainer.write_config(record, &trainer.config.to_yaml()?)?;
            trainer.save_here(record)
        };
        self.write(record, save).map(drop)
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

    /// Of all processes.
    fn sequences_per_batch(&self) -> u64 {
        (self.train.batch_size * self.processes.size()) as u64
    }

    fn bytes_per_batch(&self) -> u64 {
        self.sequences_per_batch() * self.train.seq_len as u64
    }
}

#[cfg(test)]
mod tests;
