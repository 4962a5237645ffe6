//! The learning rate of every gradient step.
//!
//! A linear warm-up is followed by one of four shapes. The default is cosine annealing (Loshchilov & Hutter 2017, eq. 5,
//! without restarts), as the reference package composes both from PyTorch's `LinearLR`, `CosineAnnealingLR` and
//! `SequentialLR`. Where a run's number of steps changes while it trains, a new schedule begins at the rate that was
//! reached.

use serde::{Deserialize, Serialize};

/// The share of the peak at which warm-up starts.
const START_FACTOR: f64 = 0.1;

/// How the rates go on after warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    /// To zero, along a cosine.
    Cosine,
    /// To zero, in a straight line.
    Linear,
    /// At the peak.
    Constant,
    /// At the peak, then to zero in a straight line (warm-up, stable, decay: Hu et al. 2024, Hägele et al. 2024).
    Wsd {
        /// The share of the run's steps in which it decays.
        decay_steps_perc: f64,
    },
}

impl Shape {
    /// How many of the `left` steps after warm-up are stable, and in how many the rate decays. The run has `steps` in all.
    fn split(self, steps: u64, left: u64) -> (u64, u64) {
        let decay = match self {
            Shape::Cosine | Shape::Linear => left,
            Shape::Constant => 0,
            Shape::Wsd { decay_steps_perc } => share_of(steps, decay_steps_perc).min(left),
        };
        (left - decay, decay)
    }

    fn decay(self) -> Decay {
        if self == Shape::Cosine { Decay::Cosine } else { Decay::Linear }
    }
}

/// The whole steps in a share of `steps`.
fn share_of(steps: u64, share: f64) -> u64 {
    (steps as f64 * share).floor() as u64
}

/// The way down to zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Decay {
    /// The only one of earlier versions.
    #[default]
    Cosine,
    Linear,
}

/// The learning rate as a function of the gradient step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The highest rate, at the end of warm-up.
    pub peak: f64,
    /// The gradient step of the run with which it begins.
    first_step: u64,
    /// The share of the peak that it begins with.
    start: f64,
    /// Steps from there to `top`, in a straight line.
    warmup_steps: u64,
    /// The share of the peak after warm-up.
    top: f64,
    /// Steps at `top`.
    #[serde(default)]
    stable_steps: u64,
    /// Steps from `top` to zero.
    #[serde(alias = "cosine_steps")]
    decay_steps: u64,
    /// How they fall.
    #[serde(default)]
    decay: Decay,
}

impl Schedule {
    /// A run of `gradient_steps`, the first `floor(gradient_steps * warmup_steps_perc)` of which warm up to `peak`.
    pub fn new(peak: f64, gradient_steps: u64, warmup_steps_perc: f64, shape: Shape) -> Self {
        let warmup_steps = share_of(gradient_steps, warmup_steps_perc);
        let (stable_steps, decay_steps) = shape.split(gradient_steps, gradient_steps.saturating_sub(warmup_steps));
        let (first_step, start, top, decay) = (0, START_FACTOR, 1.0, shape.decay());
        Schedule { peak, first_step, start, warmup_steps, top, stable_steps, decay_steps, decay }
    }

    /// The same with another peak; every rate changes in proportion.
    pub fn with_peak(self, peak: f64) -> Self {
        Schedule { peak, ..self }
    }

    /// Goes on for `steps_left` steps from gradient step `step`, where the rate is what it was, or what the last step
    /// had if this schedule has ended. A warm-up that is going on is finished; of a run that became shorter it keeps its
    /// share, and is over if that share is. After it, the rates have `shape`, from the rate that was reached; if
    /// `rewarm_steps_perc` is not 0, they rise to the peak first, in that share of the steps that are left, at least one.
    pub fn extended(self, step: u64, steps_left: u64, rewarm_steps_perc: f64, shape: Shape) -> Self {
        let (before, now) = (self.end() - self.first_step, step + steps_left - self.first_step);
        let share = u128::from(self.warmup_steps) * u128::from(now.min(before)) / u128::from(before.max(1));
        let warmup_left = (self.first_step + share as u64).saturating_sub(step);
        let begins = if warmup_left == 0 {
            let start = self.share(step.min(self.end().saturating_sub(1)));
            let asked = share_of(steps_left, rewarm_steps_perc);
            let warmup_steps = asked.max(u64::from(rewarm_steps_perc > 0.0)).min(steps_left);
            let top = if warmup_steps > 0 { 1.0 } else { start };
            Schedule { first_step: step, start, warmup_steps, top, ..self }
        } else if share == u128::from(self.warmup_steps) {
            self
        } else {
            Schedule { first_step: step, start: self.share(step), warmup_steps: warmup_left, ..self }
        };
        let (end, warm) = (step + steps_left, begins.first_step + begins.warmup_steps);
        let (stable_steps, decay_steps) = shape.split(end, end - warm);
        Schedule { stable_steps, decay_steps, decay: shape.decay(), ..begins }
    }

    /// The learning rate of step `step`, counted from 0 over the whole run; zero once all steps are done.
    pub fn lr(&self, step: u64) -> f64 {
        self.peak * self.share(step)
    }

    /// The number of steps after which the rate is zero.
    pub fn end(&self) -> u64 {
        self.warm() + self.stable_steps + self.decay_steps
    }

    /// The first step after warm-up.
    fn warm(&self) -> u64 {
        self.first_step + self.warmup_steps
    }

    /// The highest rate from step `step` on.
    pub fn highest(&self, step: u64) -> f64 {
        if step < self.warm() { self.peak * self.top } else { self.lr(step) }
    }

    /// The rates from step `step` on, in words.
    pub fn describe(&self, step: u64) -> String {
        let (warm, end) = (self.warm(), self.end());
        let falls = match self.decay {
            _ if self.decay_steps == 0 => None,
            Decay::Cosine => Some(format!("anneals to 0 at step {end}")),
            Decay::Linear => Some(format!("falls linearly to 0 at step {end}")),
        };
        if step >= end {
            let annealed = falls.map_or_else(String::new, |_| format!(", annealed to 0 at step {end}"));
            return format!("{:.3e} at the last step{annealed}", self.lr(end.saturating_sub(1)));
        }
        let rises = (step < warm).then(|| format!("rises to {:.3e} at step {warm}", self.peak * self.top));
        let until = warm + self.stable_steps;
        let stays = (step < until && self.stable_steps > 0).then(|| format!("stays there until step {until}"));
        let then: Vec<String> = [rises, stays, falls].into_iter().flatten().collect();
        format!("{:.3e} at step {step}, {}", self.lr(step), then.join(", then "))
    }

    /// The rate as a share of the peak.
    fn share(&self, step: u64) -> f64 {
        let step = step.saturating_sub(self.first_step);
        if step < self.warmup_steps {
            let progress = step as f64 / self.warmup_steps as f64;
            return self.start + (self.top - self.start) * progress;
        }
        let step = step - self.warmup_steps;
        if step < self.stable_steps {
            return self.top;
        }
        let step = step - self.stable_steps;
        if step >= self.decay_steps {
            return 0.0;
        }
        let progress = step as f64 / self.decay_steps as f64;
        self.top
            * match self.decay {
                Decay::Cosine => (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0,
                Decay::Linear => 1.0 - progress,
            }
    }

    /// Refuses numbers that a run with the rate `peak` cannot come to. It stands at `step`, of `steps` in all.
    pub(crate) fn check(&self, peak: f64, step: u64, steps: u64) -> Result<(), String> {
        let Schedule { first_step, warmup_steps, stable_steps, decay_steps, .. } = *self;
        if self.peak != peak {
            return Err(format!("peak is {:?}, but train.learning_rate is {peak:?}", self.peak));
        }
        for (name, share) in [("start", self.start), ("top", self.top)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("{name} is {share}, not a share from 0 to 1"));
            }
        }
        if first_step > step {
            return Err(format!("first_step is {first_step}, after step {step}"));
        }
        let parts = [first_step, warmup_steps, stable_steps, decay_steps];
        match parts.iter().try_fold(0u64, |sum, part| sum.checked_add(*part)) {
            // It may have more steps: one is lost where all batches of a window are padding.
            Some(end) if end >= steps => Ok(()),
            end => Err(format!(
                "first_step, warmup_steps, stable_steps and decay_steps are {first_step}, {warmup_steps}, {stable_steps} \
                 and {decay_steps}, {} in all, but the run has {steps} steps",
                end.map_or("too many".into(), |end| end.to_string())
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        lr: Vec<GoldenLr>,
        lr_without_warmup: Vec<GoldenLr>,
    }

    #[derive(serde::Deserialize)]
    struct GoldenLr {
        gradient_steps: u64,
        warmup_steps_perc: f64,
        learning_rate: f64,
        lr_at_step: Vec<f64>,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("../../../tests/golden/schedule.json")).unwrap()
    }

    #[test]
    fn every_learning_rate_is_the_packages() {
        let mut checked = 0;
        for case in golden().lr {
            let schedule =
                Schedule::new(case.learning_rate, case.gradient_steps, case.warmup_steps_perc, Shape::Cosine);
            for (step, &want) in case.lr_at_step.iter().enumerate() {
                let got = schedule.lr(step as u64);
                assert!((got - want).abs() <= 1e-9 * want, "step {step}: {got}, want {want}");
                checked += 1;
            }
        }
        assert_eq!(checked, 250);
    }

    /// `docs/differences.md`: the package never leaves the factor that its warm-up begins with.
    #[test]
    fn without_warm_up_the_package_stays_near_a_tenth_and_this_begins_at_the_peak() {
        for case in golden().lr_without_warmup {
            let schedule =
                Schedule::new(case.learning_rate, case.gradient_steps, case.warmup_steps_perc, Shape::Cosine);
            assert_eq!(schedule.lr(0), case.learning_rate);
            assert!((case.lr_at_step[0] - 0.1 * case.learning_rate).abs() < 1e-12);
            assert!(case.lr_at_step.iter().all(|&lr| lr < 0.11 * case.learning_rate));
        }
    }

    #[test]
    fn without_warm_up_or_without_annealing_the_peak_is_reached() {
        assert_eq!(Schedule::new(2.0, 10, 0.0, Shape::Cosine).lr(0), 2.0);
        assert_eq!(Schedule::new(2.0, 10, 1.0, Shape::Cosine).lr(9), 2.0 * (0.1 + 0.9 * 0.9));
        assert_eq!(Schedule::new(2.0, 10, 0.5, Shape::Cosine).lr(10), 0.0);
    }

    /// The largest difference of two neighbouring rates.
    fn largest_jump(lr: impl Fn(u64) -> f64, steps: std::ops::Range<u64>) -> f64 {
        steps.map(|step| (lr(step + 1) - lr(step)).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn an_extended_schedule_goes_on_from_the_rate_that_was_reached() {
        let old = Schedule::new(2.0, 100, 0.1, Shape::Cosine);
        for (step, rewarm) in [(5, 0.0), (50, 0.0), (50, 0.2), (80, 0.5)] {
            let new = old.extended(step, 200, rewarm, Shape::Cosine);
            let lr = |at: u64| if at < step { old.lr(at) } else { new.lr(at) };
            assert_eq!(new.lr(step), old.lr(step), "at step {step}");
            // The first warm-up rises by 0.18 a step.
            let jump = largest_jump(lr, 0..step + 200);
            assert!(jump < 0.19, "{jump} at {step}, {rewarm}");
            assert_eq!((new.end(), new.lr(step + 200)), (step + 200, 0.0));
        }
        // A run that has ended goes on with the rate of its last step, or warms up again from there.
        let (low, warm) = (old.extended(100, 100, 0.0, Shape::Cosine), old.extended(100, 100, 0.1, Shape::Cosine));
        assert_eq!((low.lr(100), warm.lr(100)), (old.lr(99), old.lr(99)));
        assert!(low.lr(101) < low.lr(100));
        assert_eq!((warm.lr(110), warm.end()), (2.0, 200));
        assert_eq!(warm.extended(150, 50, 0.0, Shape::Cosine).lr(175), warm.lr(150) / 2.0);
        let few = old.extended(100, 3, 0.1, Shape::Cosine);
        assert_eq!((few.lr(100), few.lr(101), few.end()), (old.lr(99), 2.0, 103), "one step at least");
        assert_eq!(old.with_peak(1.0).lr(50), old.lr(50) / 2.0);
        // A run that becomes shorter while it warms up: a tenth of what it is now, or no more.
        let long = Schedule::new(2.0, 1000, 0.1, Shape::Cosine);
        let (shorter, short) = (long.extended(50, 550, 0.0, Shape::Cosine), long.extended(50, 50, 0.0, Shape::Cosine));
        assert_eq!((shorter.lr(50), shorter.lr(60), shorter.end()), (long.lr(50), 2.0, 600));
        assert_eq!((short.lr(50), short.lr(75), short.end()), (long.lr(50), long.lr(50) / 2.0, 100));
        let said = warm.describe(100);
        assert!(said.ends_with("at step 100, rises to 2.000e0 at step 110, then anneals to 0 at step 200"), "{said}");
    }

    #[test]
    fn a_schedule_of_nonsense_is_refused() {
        let good = Schedule::new(2.0, 100, 0.1, Shape::Cosine);
        let fault = |schedule: Schedule, step| schedule.check(2.0, step, 100).unwrap_err();
        good.check(2.0, 0, 100).unwrap();
        good.check(2.0, 0, 99).unwrap();
        good.extended(50, 200, 0.1, Shape::Cosine).check(2.0, 50, 250).unwrap();
        good.extended(50, 0, 0.0, Shape::Cosine).check(2.0, 50, 50).unwrap();
        assert_eq!(fault(Schedule { peak: f64::NAN, ..good }, 0), "peak is NaN, but train.learning_rate is 2.0");
        assert_eq!(fault(Schedule { top: 2.0, ..good }, 0), "top is 2, not a share from 0 to 1");
        assert_eq!(fault(Schedule { start: f64::NAN, ..good }, 0), "start is NaN, not a share from 0 to 1");
        assert_eq!(fault(Schedule { first_step: 4, ..good }, 3), "first_step is 4, after step 3");
        let ends = fault(Schedule { decay_steps: 0, ..good }, 0);
        assert!(ends.contains("decay_steps are 0, 10, 0 and 0, 10 in all, but the run has 100 steps"), "{ends}");
        assert!(fault(Schedule { first_step: u64::MAX, ..good }, u64::MAX).contains("too many in all"));
    }

    const WSD: Shape = Shape::Wsd { decay_steps_perc: 0.2 };

    #[test]
    fn every_shape_follows_the_same_warm_up() {
        let cases = [
            (Shape::Linear, [2.0, 2.0 * 50.0 / 90.0, 2.0 / 90.0], "falls linearly to 0 at step 100"),
            (Shape::Constant, [2.0; 3], "stays there until step 100"),
            (WSD, [2.0, 2.0, 0.1], "stays there until step 80, then falls linearly to 0 at step 100"),
        ];
        for (shape, want, words) in cases {
            let (schedule, cosine) = (Schedule::new(2.0, 100, 0.1, shape), Schedule::new(2.0, 100, 0.1, Shape::Cosine));
            assert!((0..=10).all(|step| schedule.lr(step) == cosine.lr(step)), "{shape:?}");
            for (step, want) in [10, 50, 99].into_iter().zip(want) {
                let got = schedule.lr(step);
                assert!((got - want).abs() < 1e-12, "{shape:?}, step {step}: {got}, want {want}");
            }
            assert_eq!((schedule.end(), schedule.lr(100)), (100, 0.0), "{shape:?}");
            schedule.check(2.0, 0, 100).unwrap();
            let said = schedule.describe(0);
            assert_eq!(said, format!("2.000e-1 at step 0, rises to 2.000e0 at step 10, then {words}"));
        }
        assert_eq!(
            Schedule::new(2.0, 100, 0.1, WSD).describe(90),
            "1.000e0 at step 90, falls linearly to 0 at step 100"
        );
        assert_eq!(Schedule::new(2.0, 100, 0.1, Shape::Constant).describe(100), "2.000e0 at the last step");
        // A warm-up that leaves fewer steps than the decay asks for.
        let short = Schedule::new(2.0, 10, 0.9, WSD);
        assert_eq!((short.lr(9), short.end()), (2.0, 10));
    }

    #[test]
    fn a_stable_rate_goes_on_where_a_run_is_extended_before_its_decay() {
        let (old, long) = (Schedule::new(2.0, 100, 0.1, WSD), Schedule::new(2.0, 300, 1.0 / 30.0, WSD));
        for step in [5, 10, 50, 80] {
            let new = old.extended(step, 300 - step, 0.0, WSD);
            assert!((step..=300).all(|at| new.lr(at) == long.lr(at)), "as if it had been planned, at {step}");
        }
        // In its decay, it stays at the rate that was reached, or warms up again.
        let (low, warm) = (old.extended(90, 110, 0.0, WSD), old.extended(90, 110, 0.1, WSD));
        assert_eq!([90, 150, 160, 180].map(|step| low.lr(step)), [1.0, 1.0, 1.0, 0.5]);
        assert_eq!([90, 101, 159, 180].map(|step| warm.lr(step)), [1.0, 2.0, 2.0, 1.0]);
        // A run without an end is given one: it cools down.
        let constant = Schedule::new(2.0, 100, 0.1, Shape::Constant);
        let cooled = constant.extended(100, 20, 0.0, Shape::Linear);
        assert_eq!([100, 110, 120].map(|step| cooled.lr(step)), [2.0, 1.0, 0.0]);
    }

    #[test]
    fn a_schedule_of_an_earlier_version_goes_on_as_it_did() {
        let saved =
            r#"{"peak": 2.0, "first_step": 0, "start": 0.1, "warmup_steps": 10, "top": 1.0, "cosine_steps": 90}"#;
        let read: Schedule = serde_json::from_str(saved).unwrap();
        assert_eq!(read, Schedule::new(2.0, 100, 0.1, Shape::Cosine));
        let again = serde_json::to_string(&Schedule::new(2.0, 100, 0.1, WSD)).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&again).unwrap(), Schedule::new(2.0, 100, 0.1, WSD));
    }
}
