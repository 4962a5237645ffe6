//! Going on from a checkpoint, possibly with a changed configuration: which batch comes next, how many are left, and at
//! which learning rates.

use mblm_data::Fingerprint;
use mblm_data::batches::Cursor;
use mblm_data::files::record::DataRecord;

use super::Trainer;
use crate::checkpoint::{Checkpoint, Sizes, TrainState, Window};
use crate::config::{LossAverage, RunConfig, TrainSection};
use crate::entropy::forget_places;
use crate::error::{Error, Result};
use crate::trainer::plan::RunPlan;
use crate::trainer::schedule::Schedule;

/// A rate below this share of the peak does not train much.
const LOW: f64 = 0.1;

/// What there is to say about a run that goes on, in lines.
#[derive(Debug, Default)]
pub struct Remarks {
    /// What changes.
    pub notes: Vec<String>,
    /// What may not be meant.
    pub warnings: Vec<String>,
}

impl Trainer<'_> {
    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// The checkpoint is damaged, or of another model, other data, or another seed.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<Remarks> {
        let (saved, before) = (checkpoint.state()?, checkpoint.sizes()?);
        check_data(checkpoint, &self.data)?;
        if saved.seed != self.state.seed {
            return Err(Error::Config(format!(
                "train.seed: found {}, expected {}, with which {} was trained",
                self.state.seed,
                saved.seed,
                checkpoint.path().display()
            )));
        }
        check_optimizer(checkpoint, &before, &self.config.train)?;
        check_patching(checkpoint, &before, self.config)?;
        let mut remarks = Remarks::default();
        let next = self.place(checkpoint, &saved, &before, &mut remarks)?;
        let plan = RunPlan::resumed(self.config, &saved, self.sequence_bytes, self.processes.size())?;
        let schedule = self.schedule(&saved, &before, &plan, &mut remarks)?;
        remarks.warnings.extend(self.rounds_otherwise(&saved));
        self.go_to(next);
        let epoch_batches = self.state.epoch_batches;
        let (plugins, data) = (std::mem::take(&mut self.state.plugins), std::mem::take(&mut self.state.data));
        let strategy = self.config.train.target_elements_strategy;
        self.state = TrainState {
            plugins,
            data,
            threads: self.state.threads,
            processes: self.processes.size(),
            instructions: self.state.instructions.take(),
            device: self.state.device.take(),
            version: self.state.version.take(),
            sequence_bytes: self.state.sequence_bytes,
            next,
            epoch_batches,
            schedule: Some(schedule),
            elements_seen: saved.elements_seen_by(strategy),
            window: self.window(saved.window, &before.train),
            ..checkpoint.restore(self.model.params(), &mut self.optimizer)?
        };
        self.plan = plan;
        self.plan.schedule = schedule;
        if !self.processes.is_first() {
            // What waits does so once.
            self.state.window = Window { batches: self.state.window.batches, ..Window::default() };
            self.model.params().zero_grad();
        }
        Ok(remarks)
    }

    /// What computes now and did not before: the run then does not go on bit for bit.
    fn rounds_otherwise(&self, saved: &TrainState) -> Option<String> {
        let now = &self.state;
        let threads = saved.threads.zip(now.threads).filter(|(before, now)| before != now);
        let instructions = saved.instructions.as_ref().zip(now.instructions.as_ref()).filter(|(a, b)| a != b);
        let device = saved.device.as_ref().zip(now.device.as_ref()).filter(|(before, now)| before != now);
        let version = saved.version.as_ref().zip(now.version.as_ref()).filter(|(before, now)| before != now);
        let processes = Some((saved.processes, now.processes)).filter(|(before, now)| before != now);
        let differences = [
            processes.map(|(before, now)| format!("{now} process(es) instead of {before}")),
            threads.map(|(before, now)| format!("{now} threads instead of {before} (set RAYON_NUM_THREADS={before})")),
            instructions.map(|(before, now)| format!("{now} instructions instead of {before}")),
            device.map(|(before, now)| format!("device {now} instead of {before}")),
            version.map(|(before, now)| format!("version {now} of the program instead of {before}")),
        ];
        let differences: Vec<String> = differences.into_iter().flatten().collect();
        let effect = "sums are rounded in another order, so the run does not resume bit for bit";
        (!differences.is_empty()).then(|| format!("{}: {effect}", differences.join("; ")))
    }

    /// The batch that comes next. In batches of another size it is the first that holds nothing of those before, and so it
    /// is with another number of processes, if the data were not shared out anew.
    fn place(
        &self,
        checkpoint: &Checkpoint,
        state: &TrainState,
        before: &Sizes,
        remarks: &mut Remarks,
    ) -> Result<Cursor> {
        let saved = state.next;
        let bytes = |size: usize, len: usize, processes: usize| size as u128 * len as u128 * processes as u128;
        let (count, now) = (self.processes.size(), &self.train);
        let old = bytes(before.train.batch_size, before.seq_len(), state.processes);
        let new = bytes(now.batch_size, now.seq_len, count).max(1);
        if count != state.processes {
            remarks.warnings.push(
                "each process now has another share of the data: in this epoch some sequences come again, and some not \
                 at all"
                    .into(),
            );
        }
        if old != new {
            let batch = (u128::from(saved.batch) * old).div_ceil(new) as u64;
            let next = match batch.checked_sub(1) {
                Some(last) => self.train.after(Cursor { batch: last, ..saved }),
                None => saved,
            };
            remarks.notes.push(format!(
                "data: goes on at batch {} of epoch {}, which was batch {} of epoch {} in batches of the old size",
                next.batch, next.epoch, saved.batch, saved.epoch
            ));
            return Ok(next);
        }
        let batches = self.train.num_batches(saved.epoch);
        match saved.batch < batches {
            true => Ok(saved),
            false => Err(Error::Config(format!(
                "{} goes on at batch {} of epoch {}, which has {batches}: its state contradicts its data",
                checkpoint.path().display(),
                saved.batch,
                saved.epoch
            ))),
        }
    }

    /// The learning rates of the rest of the run. Where a changed configuration gives it another number of steps or another
    /// schedule, they begin with the rate that was reached. A warm-up that this change of the configuration asks for is not
    /// asked for again by the next one: what the run keeps of the configuration is without it.
    fn schedule(
        &mut self,
        saved: &TrainState,
        before: &Sizes,
        plan: &RunPlan,
        remarks: &mut Remarks,
    ) -> Result<Schedule> {
        let train = &self.config.train;
        let old = saved.schedule.unwrap_or_else(|| {
            let batches = before.train.target_elements.div_ceil(before.train.elements_per_batch(before.seq_len()));
            let steps = batches.div_ceil(before.train.gradient_accumulate_every.max(1) as u64);
            Schedule::new(before.train.learning_rate, steps, before.train.warmup_steps_perc, before.train.shape())
        });
        let course = |train: &TrainSection, seq_len, processes| {
            let target = (train.target_elements, train.target_elements_strategy);
            (target, train.batch_size, train.gradient_accumulate_every, seq_len, processes)
        };
        let rewarm = train.rewarm_steps_perc;
        let is_same = course(&before.train, before.seq_len(), saved.processes)
            == course(train, self.train.seq_len, self.processes.size())
            && before.train.shape() == train.shape()
            && (rewarm.is_none() || rewarm == before.train.rewarm_steps_perc);
        let (step, left) = (saved.step, plan.steps - saved.step);
        let new = match old.with_peak(train.learning_rate) {
            // A run without a step has no rate yet to go on from.
            _ if step == 0 => plan.schedule,
            same if is_same => same,
            same => same.extended(step, left, rewarm.unwrap_or(0.0), train.shape()),
        };
        if step > 0 && train.warmup_steps_perc != before.train.warmup_steps_perc {
            remarks.warnings.push(
                "train.warmup_steps_perc has no effect after the first gradient step; use train.rewarm_steps_perc to \
                 warm up again"
                    .into(),
            );
        }
        if new != old {
            remarks.notes.push(format!("learning rate schedule before: {}", old.describe(step)));
            remarks.notes.push(format!("learning rate schedule now: {}", new.describe(step)));
            if left > 0 && new.highest(step) < LOW * new.peak {
                remarks.warnings.push(format!(
                    "the learning rate stays below {LOW} of train.learning_rate, to which it had fallen; to \
                     train further, have it warm up again: --set train.rewarm_steps_perc=0.1"
                ));
            }
        }
        if !is_same && step > 0 && rewarm.is_some() {
            let train = TrainSection { rewarm_steps_perc: None, ..train.clone() };
            self.config_yaml = RunConfig { train, ..self.config.clone() }.to_yaml()?;
            remarks.notes.push("train.rewarm_steps_perc is used for this change, and the run no longer has it".into());
        }
        Ok(new)
    }

    /// The gradients that wait, weighed as `loss_average` has it.
    fn window(&self, saved: Window, before: &TrainSection) -> Window {
        let weight = match self.config.train.loss_average {
            now if now == before.loss_average || saved.weight == 0.0 => return saved,
            LossAverage::Batch => saved.batches as f64,
            LossAverage::Window => (saved.batches * (self.train.batch_size * self.train.seq_len) as u64) as f64,
        };
        Window { weight, unit: weight * saved.unit / saved.weight, ..saved }
    }
}

/// Refuses to give the moments of one optimizer to another.
pub(super) fn check_optimizer(checkpoint: &Checkpoint, before: &Sizes, now: &TrainSection) -> Result<()> {
    match before.train.optimizer == now.optimizer {
        true => Ok(()),
        false => Err(Error::Config(format!(
            "train.optimizer: found {}, expected {}, with which {} was trained: the moments of one do not fit the other; to \
             start a new run from the weights, export them as a .pth file and name it in resume.checkpoint_file",
            now.optimizer,
            before.train.optimizer,
            checkpoint.path().display()
        ))),
    }
}

/// Refuses weights that were trained with patches cut by another rule.
pub(super) fn check_patching(checkpoint: &Checkpoint, before: &Sizes, now: &RunConfig) -> Result<()> {
    let rules = &now.params.model.hierarchy().patching;
    let mut before = before.patching().clone();
    let mut now = match now.params.model.hierarchy().is_fixed() {
        true => serde_yaml::Value::Null,
        false => rules.iter().map(|rule| serde_yaml::to_value(&**rule).unwrap_or_default()).collect(),
    };
    [&mut before, &mut now].into_iter().for_each(forget_places);
    let shown = |rules: &serde_yaml::Value| match rules {
        serde_yaml::Value::Null => "fixed".into(),
        rules => serde_json::to_string(rules).unwrap_or_default(),
    };
    match before == now {
        true => Ok(()),
        false => Err(Error::Config(format!(
            "params.patching: found {}, expected {}, with which {} was trained; to start a new run from the weights, export them \
             as a .pth file and name it in resume.checkpoint_file",
            shown(&now),
            shown(&before),
            checkpoint.path().display()
        ))),
    }
}

/// Refuses data that are not those of a checkpoint. Look at this first: that data are too few now, for example, follows from
/// their change.
pub(crate) fn check_data(checkpoint: &Checkpoint, now: &Fingerprint) -> Result<()> {
    let saved = checkpoint.state()?.data;
    if saved.is_empty() || now.is(&saved) {
        return Ok(());
    }
    Err(Error::Config(format!(
        "io.dataset_dir: the data are not those of {}: {}; restore them, or start a new run",
        checkpoint.path().display(),
        DataRecord::changes(checkpoint.path(), &saved, now)
    )))
}
