//! What a run will do, computed from its configuration: how many batches and steps, at which learning rates, and when
//! to log and to validate.

use std::collections::BTreeSet;

use crate::config::{RunConfig, TargetStrategy};
use crate::error::{Error, Result};
use crate::schedule::{Schedule, logging_points};

/// The course of a run.
///
/// It differs from the reference package's in two places. Batches are accumulated over the whole run, where the
/// package starts a new count in every epoch, and so never steps if an epoch is shorter than
/// `gradient_accumulate_every`. And the last batch always validates, also if `validate_amount` is 1.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Batches in all: `target_elements` rounded up.
    pub batches: u64,
    /// What a batch adds to the elements seen.
    pub elements_per_batch: u64,
    /// Batches per gradient step; what is left after the last full window is not stepped on.
    pub accumulate: u64,
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// Batches, counted from 0, whose training loss is logged.
    pub train_points: BTreeSet<u64>,
    /// Batches after which the run validates and saves.
    pub valid_points: BTreeSet<u64>,
}

impl Plan {
    /// The course that `config` describes.
    ///
    /// # Errors
    /// A setting with which nothing could be trained.
    pub fn new(config: &RunConfig) -> Result<Self> {
        let (train, io) = (&config.train, &config.io);
        let require = |ok: bool, field: &str, expected: &str, found: &dyn std::fmt::Display| {
            if ok { Ok(()) } else { Err(Error::Config(format!("{field}: expected {expected}, found {found}"))) }
        };
        let positive = |value: u64, field: &str| require(value > 0, field, "a positive integer", &value);
        positive(config.params.input_seq_len as u64, "params.input_seq_len")?;
        positive(train.target_elements, "train.target_elements")?;
        positive(train.batch_size as u64, "train.batch_size")?;
        positive(train.gradient_accumulate_every as u64, "train.gradient_accumulate_every")?;
        positive(io.validate_amount as u64, "io.validate_amount")?;
        let lr = train.learning_rate;
        require(lr > 0.0 && lr.is_finite(), "train.learning_rate", "a positive number", &lr)?;
        let warmup = train.warmup_steps_perc;
        require((0.0..=1.0).contains(&warmup), "train.warmup_steps_perc", "a number from 0 to 1", &warmup)?;
        let decay = train.weight_decay;
        require(decay >= 0.0 && decay.is_finite(), "train.weight_decay", "a number, at least 0", &decay)?;
        if let Some(norm) = train.gradient_clipping {
            require(norm > 0.0, "train.gradient_clipping", "a positive number or null", &norm)?;
        }

        let elements_per_batch = match train.target_elements_strategy {
            TargetStrategy::Batch => train.batch_size,
            TargetStrategy::Sequence => train.batch_size * config.params.input_seq_len,
        } as u64;
        let batches = train.target_elements.div_ceil(elements_per_batch);
        let accumulate = train.gradient_accumulate_every as u64;
        let steps = batches / accumulate;
        if steps == 0 {
            return Err(Error::Config(format!(
                "train.target_elements: {} elements are {batches} batch(es), fewer than gradient_accumulate_every \
                 ({accumulate}): not one gradient step; expected at least {} elements",
                train.target_elements,
                (accumulate - 1) * elements_per_batch + 1
            )));
        }
        let mut valid_points: BTreeSet<u64> = match train.validate_every {
            Some(every) => (1..=batches / every.max(1)).map(|n| n * every - 1).collect(),
            None => logging_points(batches, 0, io.validate_amount).into_iter().collect(),
        };
        valid_points.insert(batches - 1);
        Ok(Plan {
            batches,
            elements_per_batch,
            accumulate,
            schedule: Schedule::new(lr, steps, warmup),
            train_points: logging_points(batches, 0, io.log_train_loss_amount).into_iter().collect(),
            valid_points,
        })
    }

    /// Gradient steps in all.
    pub fn steps(&self) -> u64 {
        self.batches / self.accumulate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bigram::config;

    #[test]
    fn elements_are_rounded_up_to_batches() {
        let mut config = config();
        config.train.batch_size = 3;
        config.params.input_seq_len = 8;
        config.train.target_elements = 49;
        config.train.gradient_accumulate_every = 2;
        config.io.validate_amount = 1;
        let plan = Plan::new(&config).unwrap();
        assert_eq!((plan.batches, plan.elements_per_batch, plan.steps()), (3, 24, 1));
        assert_eq!(plan.valid_points, BTreeSet::from([0, 2]), "the last batch validates too");
        config.train.validate_every = Some(2);
        assert_eq!(Plan::new(&config).unwrap().valid_points, BTreeSet::from([1, 2]));
        config.train.target_elements_strategy = TargetStrategy::Batch;
        assert_eq!(Plan::new(&config).unwrap().batches, 17);
    }

    #[test]
    fn settings_that_cannot_train_are_named() {
        type Change = fn(&mut RunConfig);
        let cases: [(Change, &str); 7] = [
            (|c| c.train.batch_size = 0, "train.batch_size: expected a positive integer, found 0"),
            (|c| c.io.validate_amount = 0, "io.validate_amount: expected a positive integer"),
            (|c| c.train.learning_rate = f64::NAN, "train.learning_rate: expected a positive number, found NaN"),
            (|c| c.train.warmup_steps_perc = 1.5, "train.warmup_steps_perc: expected a number from 0 to 1, found 1.5"),
            (|c| c.train.gradient_clipping = Some(0.0), "train.gradient_clipping: expected a positive number or null"),
            (|c| c.train.weight_decay = -1.0, "train.weight_decay"),
            (|c| c.train.gradient_accumulate_every = 1000, "not one gradient step; expected at least"),
        ];
        for (change, want) in cases {
            let mut config = config();
            change(&mut config);
            let error = Plan::new(&config).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
        }
    }
}
