//! What a run will do, computed from its configuration: how many batches and steps, at which learning rates, and when
//! to log and to validate.

use std::ops::Range;

use crate::checkpoint::TrainState;
use crate::config::{RunConfig, TrainSection};
use crate::error::{Error, Result};
use crate::trainer::points::Points;
use crate::trainer::schedule::Schedule;

/// The course of a run.
///
/// It differs from the reference package's in three places. Batches are accumulated over the whole run, where the
/// package starts a new count in every epoch, and so never steps if an epoch is shorter than
/// `gradient_accumulate_every`. The batches after the last full window are stepped on too, as a smaller window. And the
/// last batch always validates, also if `validate_amount` is 1.
#[derive(Clone, Debug)]
pub struct RunPlan {
    /// Batches in all: `target_elements` rounded up.
    pub batches: u64,
    /// What a batch adds to the elements seen.
    pub elements_per_batch: u64,
    /// Batches per gradient step; the last step may have fewer.
    pub accumulate: u64,
    /// Gradient steps in all.
    pub steps: u64,
    /// The learning rate of each step.
    pub schedule: Schedule,
    /// Batches, counted from 0, whose training loss is logged.
    pub train_points: Points,
    /// Batches after which the run validates and saves; it does so after its last one too.
    valid_points: Points,
}

impl RunPlan {
    /// The course that `config` describes for each of `processes`, in sequences that count for `sequence_bytes` each:
    /// `input_seq_len`, or their mean length where patches follow the content.
    ///
    /// # Errors
    /// A setting with which nothing could be trained.
    pub fn new(config: &RunConfig, sequence_bytes: usize, processes: usize) -> Result<Self> {
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

        let elements_per_batch = train.elements_per_batch(sequence_bytes);
        let batches = train.batches_of(train.target_elements, sequence_bytes, processes);
        let accumulate = train.gradient_accumulate_every as u64;
        if batches < accumulate {
            return Err(Error::Config(format!(
                "train.target_elements: {} elements are {batches} batch(es){}, fewer than gradient_accumulate_every \
                 ({accumulate}): not one gradient step; expected at least {} elements",
                train.target_elements,
                if processes == 1 { "" } else { " of each process" },
                (accumulate - 1).saturating_mul(elements_per_batch).saturating_add(1).saturating_mul(processes as u64)
            )));
        }
        Ok(RunPlan::over(config, sequence_bytes, batches, batches.div_ceil(accumulate)))
    }

    /// The course of a run that stands at `state`: as many batches more of each of `processes` as `target_elements` wants. The schedule of
    /// learning rates is that of a run that began with `config`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn resumed(config: &RunConfig, state: &TrainState, sequence_bytes: usize, processes: usize) -> Result<Self> {
        RunPlan::new(config, sequence_bytes, processes)?;
        let (batches, steps) = state.left(&config.train, sequence_bytes, processes);
        Ok(RunPlan::over(config, sequence_bytes, state.batches + batches, state.step + steps))
    }

    fn over(config: &RunConfig, sequence_bytes: usize, batches: u64, steps: u64) -> Self {
        let (train, io) = (&config.train, &config.io);
        let spread = |amount: usize| Points::Spread { total: batches, start: 0, amount: amount as u64 };
        RunPlan {
            batches,
            elements_per_batch: train.elements_per_batch(sequence_bytes),
            accumulate: train.gradient_accumulate_every as u64,
            steps,
            schedule: Schedule::new(train.learning_rate, steps, train.warmup_steps_perc, train.shape()),
            train_points: spread(io.log_train_loss_amount),
            valid_points: train.validate_every.map_or(spread(io.validate_amount), |every| Points::Every(every.max(1))),
        }
    }

    /// The learning rates from step `step` on, in words, with what `train` multiplies them by for each stage.
    pub fn describe_rates(&self, train: &TrainSection, step: u64) -> String {
        let mut said = self.schedule.describe(step);
        if let Some(scale) = &train.lr_scale {
            let stages = scale.iter().enumerate().map(|(n, scale)| format!("stage {} x {scale}", n + 1));
            said += &format!("; {}", stages.collect::<Vec<_>>().join(", "));
        }
        said
    }

    /// Whether the run validates and saves after one of `batches`.
    pub fn validates_in(&self, batches: Range<u64>) -> bool {
        let last = self.batches.saturating_sub(1);
        self.valid_points.any_in(batches.clone()) || batches.contains(&last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bigram::config;
    use crate::config::TargetStrategy;

    #[test]
    fn elements_are_rounded_up_to_batches() {
        let mut config = config();
        config.train.batch_size = 3;
        config.params.input_seq_len = 8;
        config.train.target_elements = 49;
        config.train.gradient_accumulate_every = 2;
        config.io.validate_amount = 1;
        let plan = RunPlan::new(&config, config.params.input_seq_len, 1).unwrap();
        assert_eq!((plan.batches, plan.elements_per_batch, plan.steps), (3, 24, 2));
        let validated =
            |plan: &RunPlan| (0..5).filter(|&batch| plan.validates_in(batch..batch + 1)).collect::<Vec<u64>>();
        assert_eq!(validated(&plan), [0, 2], "the last batch validates too");
        config.train.validate_every = Some(2);
        assert_eq!(validated(&RunPlan::new(&config, config.params.input_seq_len, 1).unwrap())[..2], [1, 2]);
        config.train.target_elements_strategy = TargetStrategy::Batch;
        assert_eq!(RunPlan::new(&config, config.params.input_seq_len, 1).unwrap().batches, 17);
    }

    #[test]
    fn the_target_is_that_of_all_processes() {
        let mut config = config();
        (config.train.batch_size, config.params.input_seq_len, config.train.target_elements) = (3, 8, 24 * 9 + 1);
        config.train.gradient_accumulate_every = 2;
        let plan = |processes| {
            RunPlan::new(&config, config.params.input_seq_len, processes).map(|plan| (plan.batches, plan.steps))
        };
        assert_eq!(plan(1).unwrap(), (10, 5));
        assert_eq!(plan(2).unwrap(), (5, 3));
        assert_eq!(plan(3).unwrap(), (3, 2), "what is left over of the target is not counted");
        let error = plan(11).unwrap_err().to_string();
        assert!(error.contains("1 batch(es) of each process") && error.contains("at least 275 elements"), "{error}");
    }

    #[test]
    fn a_resumed_run_has_what_is_left_of_its_target() {
        let mut config = config();
        let plan = RunPlan::new(&config, config.params.input_seq_len, 1).unwrap();
        assert_eq!((plan.batches, plan.steps), (20, 7), "the last step is of two batches");
        let mut state = TrainState::new(0, vec![]);
        for batch in 1..=20 {
            state.count(4, 16, TargetStrategy::Sequence);
            (state.step, state.window.batches) = if batch == 20 { (7, 0) } else { (batch / 3, batch % 3) };
            let resumed = RunPlan::resumed(&config, &state, config.params.input_seq_len, 1).unwrap();
            assert_eq!((resumed.batches, resumed.steps), (20, 7), "unchanged, at batch {batch}");
        }
        // 13 batches of 4 sequences are seen, and 7 · 4 sequences are left.
        let mut state = TrainState::new(0, vec![]);
        (0..13).for_each(|_| state.count(4, 16, TargetStrategy::Sequence));
        (state.step, state.window.batches) = (4, 1);
        let mut resumed = |change: fn(&mut TrainSection)| {
            change(&mut config.train);
            let plan = RunPlan::resumed(&config, &state, config.params.input_seq_len, 1).unwrap();
            (plan.batches, plan.steps)
        };
        assert_eq!(resumed(|t| t.batch_size = 8), (13 + 4, 4 + 2));
        assert_eq!(resumed(|t| t.gradient_accumulate_every = 1), (13 + 4, 4 + 5), "what waits is stepped on at once");
        assert_eq!(resumed(|t| t.target_elements = 20 * 64 + 1), (13 + 4, 4 + 5));
        assert_eq!(resumed(|t| t.target_elements_strategy = TargetStrategy::Batch), (13 + 154, 4 + 155));
    }

    #[test]
    fn a_point_after_every_batch_of_a_run_without_end_costs_nothing() {
        let mut config = config();
        (config.train.target_elements, config.train.validate_every) = (u64::MAX, Some(1));
        (config.io.log_train_loss_amount, config.io.validate_amount) = (usize::MAX, usize::MAX);
        let plan = RunPlan::new(&config, config.params.input_seq_len, 1).unwrap();
        assert!(plan.validates_in(1 << 40..(1 << 40) + 1) && plan.train_points.contains(0), "{plan:?}");
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
            let error = RunPlan::new(&config, config.params.input_seq_len, 1).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(want), "{error}");
        }
    }
}
