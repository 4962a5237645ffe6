//! One batch: read, its gradient added to those that wait, a gradient step if it is the last one of a window, and what is
//! recorded of it.

use std::time::{Duration, Instant};

use mblm_base::random::mix;
use mblm_core::Mode;
use mblm_core::gemm::autocast;
use mblm_data::batches::Cursor;

use super::{Record, Trainer};
use crate::checkpoint::Window;
use crate::config::LossAverage;
use crate::error::Result;
use crate::journal::folder::LossEntry;
use crate::journal::metrics::{Kind, Scalars, activation_norms, loss_scalars};
use crate::model::{Loss, LossSum, sequences};
use crate::processes::caught;

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

impl Trainer<'_> {
    pub(super) fn train_batch(&mut self, record: &mut Record) -> Result<()> {
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
        let (size, long) = (self.sequences_per_batch(), self.sequence_bytes as u64);
        self.state.count(size, long, self.config.train.target_elements_strategy);
        self.go_to(self.train.after(at));
        self.state.valid_loss = None;
        let lr = self.plan.schedule.lr(self.state.step);
        let entries = self.train_entries(at, &losses, lr);
        let mut scalars = match value.filter(|_| is_point) {
            Some(value) => [loss_scalars(value), self.rates(lr)].concat(),
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

    /// The learning rate, and that of each stage where they differ.
    fn rates(&self, lr: f64) -> Scalars {
        let scale = self.config.train.lr_scale.iter().flatten().enumerate();
        let of_stages = scale.map(|(n, scale)| (format!("stage{}/lr", n + 1), lr * scale));
        [("lr".into(), lr)].into_iter().chain(of_stages).collect()
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
    pub(super) fn add_gradient(&mut self, loss: &Loss) -> Result<()> {
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
}
