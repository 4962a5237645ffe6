//! What keeps a run from being trained: data without anything to predict, inputs that the model rejects, and numbers that
//! are not finite.

use mblm_core::model::Sequences;
use mblm_core::{Mode, Param, device};

use super::optimizer::first_non_finite;
use super::{Record, Trainer};
use crate::checkpoint::TrainState;
use crate::error::{Error, Result};
use crate::evaluate::anything_counts;
use crate::model::sequences;

impl Trainer<'_> {
    /// What a failed batch means. If a device ran out of memory, the run ends where it was `before` the batch, with a
    /// checkpoint; gradients that waited then are lost, and the newest checkpoint stands.
    pub(super) fn failed(&mut self, error: Error, before: TrainState, record: &mut Record) -> Error {
        let reason = error.to_string();
        if !reason.to_lowercase().replace('_', " ").contains("out of memory") {
            return error;
        }
        let (device, batch) = (device::name(&self.model.params().place().device), before.cum_batch());
        let may_save = before.window.batches == 0 && before.step == self.state.step;
        self.state = before;
        self.model.params().zero_grad();
        let is_saved = record.checkpoints.list().is_ok_and(|all| all.last().is_some_and(|newest| self.is_of(newest)));
        if may_save
            && !is_saved
            && self.processes.is_first()
            && let Err(error) = self.save_here(record)
        {
            return error;
        }
        Error::OutOfMemory { device, batch, reason: reason.lines().next().unwrap_or_default().into() }
    }

    /// Checks that the training and the validation data have something to predict.
    ///
    /// # Errors
    /// Every element is the pad token, or its loss has weight 0.
    pub fn check_data(&self) -> Result<()> {
        let (pad, most) = (self.pad(), self.config.train.max_eval_steps);
        for (what, batches, most) in [("training", &*self.train, None), ("validation", &self.valid, most)] {
            let found = self.processes.agree(anything_counts(batches, most, pad))?;
            if !self.processes.any(found) {
                return Err(self.nothing_to_predict(what));
            }
        }
        Ok(())
    }

    fn pad(&self) -> usize {
        self.config.params.model.hierarchy().pad_token_id
    }

    pub(super) fn nothing_to_predict(&self, what: &str) -> Error {
        Error::Config(format!(
            "params.pad_token_id: the {what} data have nothing to predict: every element is the pad token {}, or its loss \
             has weight 0",
            self.pad()
        ))
    }

    /// Runs one training sequence through the model and changes nothing, so that an input that the model rejects is
    /// found before a run folder is created.
    pub fn rehearse(&self) -> Result<()> {
        let batch = self.train.read(self.state.next)?;
        match self.model.loss(&sequences(&batch).first(), Mode::Eval) {
            Err(mblm_core::Error::Input(message)) => Err(Error::Config(format!(
                "params.input_seq_len: the model does not take sequences of {} bytes: {message}",
                self.config.params.input_seq_len
            ))),
            result => Ok(result.map(drop)?),
        }
    }

    /// Names the parameter that is not finite, or else the stage whose output is not.
    pub(super) fn non_finite_loss(&self, loss: f64, sequences: &Sequences) -> Error {
        let finite = |param: &Param| param.values().iter().all(|value| value.is_finite());
        if let Some(name) = first_non_finite(self.model.params(), finite) {
            return self.non_finite(format!("the loss is {loss}, and so is a value of parameter {name}"));
        }
        // Outside training such a loss is an error that names the stage.
        match self.model.loss(sequences, Mode::Eval) {
            Err(mblm_core::Error::NotFinite(what)) => {
                self.non_finite(format!("{what}, while all parameters are finite"))
            }
            _ => self.non_finite(format!("the loss is {loss}, while all parameters are finite")),
        }
    }

    pub(super) fn non_finite(&self, what: String) -> Error {
        Error::NonFinite { step: self.state.step, batch: self.state.batches, what }
    }

    pub(super) fn non_finite_gradient(&self) -> Error {
        let finite = |param: &Param| param.grad().iter().all(|grad| grad.is_finite());
        let name = first_non_finite(self.model.params(), finite).unwrap_or_default();
        let what = format!("the gradient of {name} is not finite");
        Error::NonFinite { step: self.state.step, batch: self.state.batches.saturating_sub(1), what }
    }
}
