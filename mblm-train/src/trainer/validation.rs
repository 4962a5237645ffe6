//! The losses on the validation and the test split, and what is recorded of them.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use mblm_data::batches::Cursor;

use super::{End, Record, Trainer};
use crate::error::{Error, Result};
use crate::evaluate::{bpb, losses};
use crate::journal::folder::LossEntry;
use crate::journal::metrics::{Kind, Point, loss_scalars};
use crate::model::LossSum;

impl Trainer<'_> {
    /// Validates; false if it was stopped meanwhile.
    pub(super) fn validate(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<bool> {
        let started = Instant::now();
        let Some(loss) = self.measure_valid_loss(stop)? else { return Ok(false) };
        let seconds = started.elapsed().as_secs_f64();
        let is_best = self.state.best_valid_loss.is_none_or(|best| loss < best);
        self.state.valid_loss = Some(loss);
        self.state.stale_validations += 1;
        if is_best {
            self.state.best_valid_loss = Some(loss);
            self.state.stale_validations = 0;
        }
        let noted = self.note_validation(record, loss, is_best, seconds);
        self.processes.agree(noted).map(|()| true)
    }

    fn note_validation(&self, record: &mut Record, loss: f64, is_best: bool, seconds: f64) -> Result<()> {
        let at = self.last_batch();
        record.losses.add(&LossEntry { avg_grad: -1.0, avg_grad_clipped: -1.0, ..self.entry("valid", at, loss) })?;
        record.progress.valid_loss(self.state.batches, loss, is_best);
        record.metrics.record(&self.point(Kind::Valid, loss_scalars(loss)))?;
        record.timemem.valid(self.state.cum_batch() - 1, self.state.elements_seen, seconds)
    }

    /// The mean loss on the validation split; none if it was stopped meanwhile.
    pub(super) fn measure_valid_loss(&self, stop: &AtomicBool) -> Result<Option<f64>> {
        let found = losses(self.model, &self.valid, self.config.train.max_eval_steps, stop, self.processes);
        let found = found.map_err(|error| match error {
            Error::Core(mblm_core::Error::NotFinite(what)) => self.non_finite(format!("in validation {what}")),
            other => other,
        })?;
        let Some(found) = found else { return Ok(None) };
        match found.mean() {
            Some(loss) if !loss.is_finite() => Err(self.non_finite(format!("the validation loss is {loss}"))),
            None => Err(self.nothing_to_predict("validation")),
            loss => Ok(loss),
        }
    }

    /// Validates what was reached within the time limit. This is no point of the run's course: it counts as one batch
    /// further, so that a run that is resumed drops it, and goes on as if it had not been interrupted.
    pub(super) fn validate_at_limit(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<End> {
        let seconds = self.config.train.max_seconds.unwrap_or_default();
        let (done, all) = (self.state.batches, self.plan.batches);
        record.progress.line(&format!("time limit of {seconds} s reached after batch {done} of {all}"));
        if self.at_valid_point() && self.state.valid_loss.is_some() {
            return Ok(End::TimeLimit);
        }
        let Some(loss) = self.measure_valid_loss(stop)? else { return Ok(End::Stopped) };
        let is_best = self.state.best_valid_loss.is_none_or(|best| loss < best);
        self.state.valid_loss = Some(loss);
        let noted = self.note_limit(record, loss, is_best);
        self.processes.agree(noted).map(|()| End::TimeLimit)
    }

    fn note_limit(&self, record: &mut Record, loss: f64, is_best: bool) -> Result<()> {
        let cum_batch = self.state.cum_batch();
        let entry = LossEntry { cum_batch: cum_batch as i64, ..self.entry("valid", self.last_batch(), loss) };
        record.losses.add(&LossEntry { avg_grad: -1.0, avg_grad_clipped: -1.0, ..entry })?;
        record.progress.valid_loss(self.state.batches, loss, is_best);
        record.metrics.record(&Point { batch: cum_batch, ..self.point(Kind::Valid, loss_scalars(loss)) })
    }

    /// Measures the best model on the test split, if the data set has one; the model keeps its weights.
    pub fn test(&mut self, record: &mut Record, stop: &AtomicBool) -> Result<()> {
        let Some(test) = &self.test else { return Ok(()) };
        // What the first process has just written may not yet be seen by the others.
        let loaded = if self.processes.is_first() { self.load_best(record).map(Some) } else { Ok(None) };
        let best = self.processes.agree(loaded)?;
        self.weights_of_the_first()?;
        let most = self.config.train.max_eval_steps;
        let Some(found) = losses(self.model, test, most, stop, self.processes)? else { return Ok(()) };
        let noted = match best {
            Some(best) => self.note_test(record, found, &best),
            None => Ok(()),
        };
        self.processes.agree(noted)
    }

    /// Takes over the weights of the best checkpoint, or of the newest if none has a validation loss; says which.
    fn load_best(&self, record: &Record) -> Result<PathBuf> {
        let best = match record.checkpoints.best() {
            Ok(best) => best,
            Err(_) => record.checkpoints.newest()?,
        };
        self.model.params().load(&best.weights()?)?;
        Ok(best.path().into())
    }

    fn note_test(&self, record: &mut Record, found: LossSum, best: &Path) -> Result<()> {
        let Some(loss) = found.mean() else {
            record.progress.line("no test loss: the test data have nothing to predict");
            return Ok(());
        };
        // Counted as one batch further, so that a run that goes on after its end has one test. The row of `loss.csv`
        // comes last: it says that the test is done.
        let point = self.point(Kind::Test, loss_scalars(loss));
        record.metrics.record(&Point { batch: self.state.cum_batch(), ..point })?;
        let row = LossEntry {
            elements_seen: -1,
            epoch: -1,
            batch: -1,
            cum_batch: -1,
            ..self.entry("test", Cursor::default(), loss)
        };
        record.losses.add(&LossEntry { avg_grad: -1.0, avg_grad_clipped: -1.0, ..row })?;
        record.progress.line(&format!("test loss {loss:.4} ({:.4} bpb), of {}", bpb(loss), best.display()));
        Ok(())
    }
}
