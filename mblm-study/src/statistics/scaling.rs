//! The fits of a scaling study: for each variant the best size under each budget and a power law through these, and
//! intervals of anything that follows from them, by bootstrap over seeds (Efron 1979).

use std::collections::{BTreeMap, BTreeSet};

use mblm_base::random::XorShift;

use super::ALPHA;
use super::groups::Losses;
use super::parabola::{Parabola, WhyNot, parabola};
use super::power_law::{PowerLaw, power_law};

/// A size under a budget.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Parameters of its model.
    pub parameters: f64,
    /// The budget: floating point operations of its training.
    pub flops: f64,
    /// The loss of each seed.
    pub losses: Losses,
}

/// What was fitted to the points of a variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// For each budget; None if no point under it has a loss.
    pub budgets: Vec<Option<Best>>,
    /// Through the lowest losses of the budgets that have a parabola.
    pub law: Result<PowerLaw, WhyNot>,
}

/// The best size under a budget.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// Where the parabola is lowest; if there is none, the best of the measured sizes.
    pub parameters: f64,
    /// The loss there.
    pub loss: f64,
    /// The parabola, or why there is none.
    pub parabola: Result<Parabola, WhyNot>,
}

/// Budgets that differ by less than this share are one: runs end after whole steps.
const SAME_BUDGET: f64 = 0.05;
/// Resamples of the bootstrap.
const RESAMPLES: usize = 1000;
/// The bootstrap's own seed.
const SEED: u64 = 1;
/// Losses that a bootstrap needs.
const LEAST_SEEDS: usize = 3;
/// An interval needs this share of the resamples to have a number.
const LEAST_SHARE: f64 = 0.9;

/// The budgets of all points, ascending. Those that differ by less than 5% are one, their mean.
pub fn budgets<'a>(points: impl IntoIterator<Item = &'a Point>) -> Vec<f64> {
    let mut flops: Vec<f64> = points.into_iter().map(|point| point.flops).filter(|flops| *flops > 0.0).collect();
    flops.sort_by(f64::total_cmp);
    let groups = flops.chunk_by(|a, b| is_same(*a, *b));
    groups
        .map(|group| group[0] + group.iter().map(|flops| flops - group[0]).sum::<f64>() / group.len() as f64)
        .collect()
}

fn is_same(a: f64, b: f64) -> bool {
    (a - b).abs() <= SAME_BUDGET * a.max(b)
}

impl Point {
    /// Whether it is a point of this budget.
    pub fn is_of(&self, budget: f64) -> bool {
        is_same(self.flops, budget)
    }

    /// The mean loss, in which each seed counts as often as `weights` says. None if no seed counts.
    fn mean(&self, weights: &BTreeMap<u64, f64>) -> Option<f64> {
        let weighed: Vec<(f64, f64)> =
            self.losses.iter().filter_map(|(seed, loss)| Some((*weights.get(seed)?, *loss))).collect();
        let total: f64 = weighed.iter().map(|(weight, _)| weight).sum();
        (total > 0.0).then(|| weighed.iter().map(|(weight, loss)| weight * loss).sum::<f64>() / total)
    }
}

impl Fit {
    /// The fit of `points` under each of `budgets`, to the mean loss of their seeds.
    pub fn of(points: &[Point], budgets: &[f64]) -> Self {
        let weights = points.iter().flat_map(|point| point.losses.keys()).map(|seed| (*seed, 1.0)).collect();
        Fit::weighed(points, budgets, &weights)
    }

    fn weighed(points: &[Point], budgets: &[f64], weights: &BTreeMap<u64, f64>) -> Self {
        let best = |budget: &f64| {
            let of_budget = points.iter().filter(|point| point.is_of(*budget) && point.parameters > 0.0);
            Best::of(
                &of_budget.filter_map(|point| Some((point.parameters.ln(), point.mean(weights)?))).collect::<Vec<_>>(),
            )
        };
        let best: Vec<Option<Best>> = budgets.iter().map(best).collect();
        let fitted = budgets.iter().zip(&best).filter_map(|(budget, best)| {
            let best = best.as_ref()?;
            best.parabola.is_ok().then_some((*budget, best.loss))
        });
        let law = power_law(&fitted.collect::<Vec<_>>());
        Fit { budgets: best, law }
    }

    /// The loss that its power law gives at a budget.
    pub fn loss_at(&self, budget: f64) -> Option<f64> {
        Some(self.law.as_ref().ok()?.at(budget))
    }
}

impl Best {
    /// Of points of ln(size) and loss; None without points.
    fn of(points: &[(f64, f64)]) -> Option<Self> {
        let parabola = parabola(points);
        let lowest = points.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
        let (log_size, loss) = parabola.map_or(*lowest, |parabola| (parabola.log_size, parabola.loss));
        Some(Best { parameters: log_size.exp(), loss, parabola })
    }
}

/// Fits of all variants to seeds that are resampled with replacement. All variants get the same seeds in a resample, so
/// that their runs stay paired.
///
/// Few seeds have few different resamples (three have ten), so their intervals are coarse and tend to be too narrow.
#[derive(Clone, Debug, PartialEq)]
pub struct Bootstrap(Vec<Vec<Fit>>);

impl Bootstrap {
    /// 1000 resamples, the same ones in every call. None with fewer than three seeds.
    pub fn of(variants: &[&[Point]], budgets: &[f64]) -> Option<Self> {
        let points = variants.iter().flat_map(|points| points.iter());
        let seeds: BTreeSet<u64> = points.flat_map(|point| point.losses.keys().copied()).collect();
        let seeds = Vec::from_iter(seeds);
        if seeds.len() < LEAST_SEEDS {
            return None;
        }
        let mut stream = XorShift::new(SEED);
        let mut resample = || {
            let mut weights = BTreeMap::new();
            for _ in &seeds {
                let drawn = ((stream.draw() >> 32) * seeds.len() as u64) >> 32;
                *weights.entry(seeds[drawn as usize]).or_insert(0.0) += 1.0;
            }
            weights
        };
        let fits = |weights| variants.iter().map(|points| Fit::weighed(points, budgets, &weights)).collect();
        Some(Bootstrap((0..RESAMPLES).map(|_| fits(resample())).collect()))
    }

    /// The 95% percentile interval of a number that follows from the fits of all variants. None if more than a tenth of the
    /// resamples have no such number, because a curve could not be fitted.
    pub fn interval(&self, number: impl Fn(&[Fit]) -> Option<f64>) -> Option<(f64, f64)> {
        let mut numbers: Vec<f64> = self.0.iter().filter_map(|fits| number(fits)).filter(|n| n.is_finite()).collect();
        numbers.sort_by(f64::total_cmp);
        let is_enough = !numbers.is_empty() && numbers.len() as f64 >= LEAST_SHARE * self.0.len() as f64;
        is_enough.then(|| (percentile(&numbers, ALPHA / 2.0), percentile(&numbers, 1.0 - ALPHA / 2.0)))
    }
}

/// The place in `sorted` below which a share of it lies, between its neighbours as NumPy has it.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::tests::near;
    use super::*;

    pub(crate) const SIZES: [f64; 4] = [3e5, 1e6, 3e6, 1e7];
    pub(crate) const BUDGETS: [f64; 3] = [1e14, 3e14, 1e15];

    /// Cells of a law `scale · budget^-exponent`, whose best size grows with the root of the budget; `noise` of each seed
    /// is the same in all points.
    pub(crate) fn points(scale: f64, exponent: f64, noise: &[f64]) -> Vec<Point> {
        let point = |parameters: f64, flops: f64| {
            let best = (flops / 1e14).sqrt() * 1e6;
            let loss = scale * flops.powf(-exponent) + 0.02 * (parameters / best).ln().powi(2);
            Point { parameters, flops, losses: (1..).zip(noise.iter().map(|noise| loss + noise)).collect() }
        };
        BUDGETS.iter().flat_map(|flops| SIZES.map(|parameters| point(parameters, *flops))).collect()
    }

    const NOISE: [f64; 4] = [-0.02, 0.03, 0.01, -0.02];

    #[test]
    fn a_law_is_found_again() {
        let points = points(20.0, 0.06, &[0.0]);
        let fit = Fit::of(&points, &budgets(&points));
        let best: Vec<Best> = fit.budgets.iter().map(|best| best.unwrap()).collect();
        for (best, budget) in best.iter().zip(BUDGETS) {
            assert!(near(best.loss, 20.0 * budget.powf(-0.06)), "{best:?}");
            assert!((best.parameters / ((budget / 1e14).sqrt() * 1e6) - 1.0).abs() < 1e-9, "{best:?}");
        }
        let law = fit.law.unwrap();
        assert!(near(law.exponent, 0.06) && near(law.log_scale.exp(), 20.0), "{law:?}");
        assert_eq!(Bootstrap::of(&[&points], &BUDGETS), None, "there is one seed");
    }

    #[test]
    fn without_a_parabola_the_best_size_counts_but_not_for_the_law() {
        let mut points = points(20.0, 0.06, &[0.0]);
        points.retain(|point| !point.is_of(1e15) || point.parameters < 2e6);
        let fit = Fit::of(&points, &BUDGETS);
        let best = fit.budgets[2].unwrap();
        assert_eq!((best.parabola, best.parameters.round()), (Err(WhyNot::TooFewSizes(2)), 1e6));
        assert_eq!(fit.law, Err(WhyNot::TooFewBudgets(2)));
    }

    #[test]
    fn budgets_of_whole_steps_are_one() {
        let point = |flops| Point { parameters: 1e6, flops, losses: Losses::new() };
        let points = [3.0e14, 1.0e14, 1.01e14].map(point);
        let found = budgets(&points);
        assert_eq!(found, [1.005e14, 3e14]);
        assert!(points[2].is_of(found[0]) && !points[0].is_of(found[0]));
    }

    #[test]
    fn pairs_stay_pairs() {
        let (a, b) = (points(20.0, 0.06, &NOISE), points(20.5, 0.06, &NOISE));
        let all = Bootstrap::of(&[&a, &b], &BUDGETS).unwrap();
        let loss = |fits: &[Fit], i: usize| fits[i].budgets[0].map(|best| best.loss);
        let (low, high) = all.interval(|fits| loss(fits, 0)).unwrap();
        assert!(high - low > 0.02, "seeds differ: {low} {high}");
        let (low, high) = all.interval(|fits| Some(loss(fits, 1)? - loss(fits, 0)?)).unwrap();
        let want = 0.5 * BUDGETS[0].powf(-0.06);
        assert!(high - low < 1e-9 && (low - want).abs() < 1e-9, "but their differences do not: {low} {high}");
        assert_eq!(Bootstrap::of(&[&a, &b], &BUDGETS).unwrap(), all, "the same in every call");
        assert_eq!(all.interval(|_| None), None);
    }

    #[test]
    fn an_interval_is_that_of_all_resamples() {
        // Of four seeds, all 4⁴ resamples: numpy.percentile(means, [2.5, 97.5])
        let a = points(20.0, 0.06, &NOISE);
        let centre = 20.0 * BUDGETS[0].powf(-0.06);
        let all = Bootstrap::of(&[&a], &BUDGETS).unwrap();
        let (low, high) = all.interval(|fits| Some(fits[0].budgets[0]?.loss - centre)).unwrap();
        let mut exact: Vec<f64> = (0..256)
            .map(|i| [i & 3, (i >> 2) & 3, (i >> 4) & 3, i >> 6].map(|k| NOISE[k]).iter().sum::<f64>() / 4.0)
            .collect();
        exact.sort_by(f64::total_cmp);
        let want = [percentile(&exact, 0.025), percentile(&exact, 0.975)];
        assert!((low - want[0]).abs() < 1e-9 && (high - want[1]).abs() < 1e-9, "{low} {high} {want:?}");
    }

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile([3, 1, 4, 1, 5, 9, 2, 6], [2.5, 97.5])
        let sorted = [1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0];
        assert!(near(percentile(&sorted, 0.025), 1.0) && near(percentile(&sorted, 0.975), 8.475));
    }
}
