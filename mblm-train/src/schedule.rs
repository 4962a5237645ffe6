//! The learning rate of every gradient step, and the batches at which a run logs and validates.
//!
//! A linear warm-up is followed by cosine annealing (Loshchilov & Hutter 2017, eq. 5, without restarts), as the
//! reference package composes them from PyTorch's `LinearLR`, `CosineAnnealingLR` and `SequentialLR`.

/// The share of the peak at which warm-up starts.
const START_FACTOR: f64 = 0.1;

/// The learning rate as a function of the gradient step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    warmup_steps: u64,
    cosine_steps: u64,
}

impl Schedule {
    /// A run of `gradient_steps`, the first `floor(gradient_steps * warmup_steps_perc)` of which warm up to `peak`.
    pub fn new(peak: f64, gradient_steps: u64, warmup_steps_perc: f64) -> Self {
        let warmup_steps = (gradient_steps as f64 * warmup_steps_perc).floor() as u64;
        Schedule { peak, warmup_steps, cosine_steps: gradient_steps.saturating_sub(warmup_steps) }
    }

    /// The learning rate of step `step`, counted from 0; zero once all steps are done.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            let progress = step as f64 / self.warmup_steps as f64;
            return self.peak * (START_FACTOR + (1.0 - START_FACTOR) * progress);
        }
        let step = step - self.warmup_steps;
        if step >= self.cosine_steps {
            return 0.0;
        }
        let progress = step as f64 / self.cosine_steps as f64;
        self.peak * (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0
    }
}

/// `amount` batches spread evenly over `start..start + total`, the first and the last among them; `amount` is clipped
/// to `total`, and 1 gives the first batch alone.
///
/// The same numbers as the reference package's `torch.linspace(start, start + total - 1, amount).long()`, single
/// precision included.
pub fn logging_points(total: u64, start: u64, amount: usize) -> Vec<u64> {
    let amount = amount.min(usize::try_from(total).unwrap_or(usize::MAX));
    if amount <= 1 {
        return vec![start; amount];
    }
    let (first, last) = (start as f32, (start + total - 1) as f32);
    let step = (last - first) / (amount - 1) as f32;
    let point = |i: usize| {
        if i < amount / 2 { first + step * i as f32 } else { last - step * (amount - 1 - i) as f32 }
    };
    (0..amount).map(|i| point(i) as u64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        lr: Vec<GoldenLr>,
        logging_points: Vec<GoldenPoints>,
    }

    #[derive(serde::Deserialize)]
    struct GoldenLr {
        gradient_steps: u64,
        warmup_steps_perc: f64,
        learning_rate: f64,
        lr_at_step: Vec<f64>,
    }

    #[derive(serde::Deserialize)]
    struct GoldenPoints {
        total: u64,
        start: u64,
        amount: usize,
        indices: Vec<u64>,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("../../tests/golden/schedule.json")).unwrap()
    }

    #[test]
    fn every_learning_rate_is_the_packages() {
        let mut checked = 0;
        for case in golden().lr {
            let schedule = Schedule::new(case.learning_rate, case.gradient_steps, case.warmup_steps_perc);
            for (step, &want) in case.lr_at_step.iter().enumerate() {
                let got = schedule.lr(step as u64);
                assert!((got - want).abs() <= 1e-9 * want, "step {step}: {got}, want {want}");
                checked += 1;
            }
        }
        assert_eq!(checked, 250);
    }

    #[test]
    fn logging_points_are_the_packages() {
        let cases = golden().logging_points;
        assert_eq!(cases.len(), 3);
        for case in cases {
            assert_eq!(logging_points(case.total, case.start, case.amount), case.indices);
        }
    }

    #[test]
    fn logging_points_of_few_batches() {
        assert_eq!(logging_points(3, 0, 10), [0, 1, 2]);
        assert_eq!(logging_points(5, 2, 1), [2]);
        assert_eq!(logging_points(5, 2, 0), [0; 0]);
    }

    #[test]
    fn without_warm_up_or_without_annealing_the_peak_is_reached() {
        assert_eq!(Schedule::new(2.0, 10, 0.0).lr(0), 2.0);
        assert_eq!(Schedule::new(2.0, 10, 1.0).lr(9), 2.0 * (0.1 + 0.9 * 0.9));
        assert_eq!(Schedule::new(2.0, 10, 0.5).lr(10), 0.0);
    }
}
