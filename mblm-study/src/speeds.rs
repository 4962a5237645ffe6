//! How fast variants train, measured in short trainings that are thrown away.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use mblm_base::terminal;
use mblm_train::config::RunConfig;
use mblm_train::error::{AtPath, Result};

use crate::child::ChildLog;
use crate::design::budget::Amount;
use crate::plan::step_bytes;
use crate::report::{Run, RunResult, Speed, with_unit};
use crate::runner::Runner;

/// For a budget in seconds, a variant's speed is measured for this share of it, within bounds.
const CALIBRATION_SHARE: f64 = 0.1;
const CALIBRATION_SECONDS: (f64, f64) = (1.0, 20.0);
/// A finished run's speed is measured for so long.
const SECONDS_AGAIN: f64 = 5.0;
/// Gradient steps that such a measurement never comes to.
const MOST_STEPS: u64 = 100_000;

impl Runner<'_, '_> {
    /// For a budget in seconds: measures how many bytes each variant trains in that time, where that is not known yet.
    /// False if it was stopped.
    pub fn calibrate(&mut self, stop: &AtomicBool) -> Result<bool> {
        let Amount::Seconds(seconds) = self.plan.spec.budget.amount else { return Ok(true) };
        let (least, most) = CALIBRATION_SECONDS;
        for i in 0..self.plan.variants.len() {
            let variant = &self.plan.variants[i];
            if variant.about.bytes.is_some() {
                continue;
            }
            terminal::line(format_args!("measuring the speed of {}", variant.about.name));
            let measured = (seconds * CALIBRATION_SHARE).clamp(least, most);
            let Some(rate) = self.speed(&variant.config, measured, self.plan.spec.jobs, stop)? else {
                return Ok(false);
            };
            let step = step_bytes(&variant.config);
            // A variant that cannot be trained gets the least: its runs will say why.
            let steps = (rate.unwrap_or(0.0) * seconds / step as f64).round() as u64;
            self.plan.variants[i].about.bytes = Some(steps.max(1) * step);
            self.plan.write()?;
        }
        Ok(true)
    }

    /// Measures the finished runs that score again, one after the other with all cores: how fast each trains and
    /// generates. The first seed of every variant comes first, then the second, so that a slow minute hits all alike.
    /// False if it was stopped.
    pub fn measure_again(&self, stop: &AtomicBool) -> Result<bool> {
        let scoring = self.course().scoring;
        for run in &scoring {
            let folder = self.plan.run_folder(run);
            let Some(before) = RunResult::read(&folder) else { continue };
            let config = self.plan.config(run)?;
            let task = self.task(&run.name, &config, 1);
            let log = self.plan.folder().join("logs").join(format!("{}.log", run.name));
            let (Some(rate), Some(log)) =
                (self.speed(&config, SECONDS_AGAIN, 1, stop)?, ChildLog::open(&log, stop, || ())?)
            else {
                return Ok(false);
            };
            let measured = task.measure(&log)?;
            let speed = rate.map(|bytes_per_second| Speed { bytes_per_second, threads: task.threads });
            // What was measured then is better than nothing.
            let measured = if measured.missing.is_some() { before.measured } else { measured };
            RunResult { speed: speed.or(before.speed), measured, ..before }.write(&folder)?;
            let rate = rate.map_or("its speed could not be measured".into(), |rate| with_unit(rate, "B/s"));
            terminal::line(format_args!("{}: {rate}", run.name));
        }
        Ok(true)
    }

    /// Training bytes per second of a configuration, in a short training whose folder is removed; the inner none if that
    /// fails, the outer one if it was stopped.
    fn speed(&self, config: &RunConfig, seconds: f64, jobs: usize, stop: &AtomicBool) -> Result<Option<Option<f64>>> {
        let place = self.plan.folder().join("runs").join(".calibration");
        let clear = || if place.exists() { fs::remove_dir_all(&place).at(&place) } else { Ok(()) };
        clear()?;
        let mut config = config.clone();
        config.train.max_seconds = Some(seconds);
        config.train.target_elements = MOST_STEPS * step_bytes(&config);
        config.train.validate_every = Some(u64::MAX);
        config.train.max_eval_steps = Some(1);
        config.io.log_train_loss_amount = usize::MAX;
        let Some(log) = ChildLog::open(&self.plan.folder().join("logs/calibration.log"), stop, || ())? else {
            return Ok(None);
        };
        let task = self.task("calibration", &config, jobs);
        task.write_config()?;
        let exit = log.run(task.train(&place), stop, |_| ())?;
        let rate = Run::read(&place).ok().and_then(|run| run.train_rate());
        clear()?;
        match stop.load(Ordering::Relaxed) {
            true => Ok(None),
            false => Ok(Some(rate.filter(|_| exit.failure("").is_none()))),
        }
    }
}
