//! How losses depend on size and budget: what a scaling study measured, and what was fitted to it.

mod table;
mod words;

pub(super) use table::COLUMNS;

use super::run::{Run, Status};
use super::variant::Variant;
use crate::folder::PlanFile;
use crate::statistics::scaling::{Best, Bootstrap, Fit, Point, budgets};

/// What a scaling study measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScalingData {
    /// In the order of the study: others are compared with the first.
    pub variants: Vec<ScalingVariant>,
}

/// A variant in several sizes under several budgets.
#[derive(Clone, Debug, PartialEq)]
pub struct ScalingVariant {
    /// Its name.
    pub name: String,
    /// Each size under each budget, with the bits per byte of its seeds.
    pub points: Vec<Point>,
}

/// What was measured, with the curves that were fitted to it.
#[derive(Clone, Debug)]
pub struct Scaling {
    pub(super) variants: Vec<ScalingVariant>,
    /// Floating point operations of training, ascending.
    pub(super) budgets: Vec<f64>,
    /// One per variant.
    pub(super) fits: Vec<Fit>,
    bootstrap: Option<Bootstrap>,
    /// The number of each variant's colour.
    pub(super) colours: Vec<usize>,
}

/// How far a variant lies above the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Above {
    /// In bits per byte.
    pub(super) mean: f64,
    /// Its 95% interval, if there are seeds enough.
    pub(super) interval: Option<(f64, f64)>,
}

/// Where the power laws of two variants are equal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Crossing {
    pub(super) budget: f64,
    /// Whether it lies between the smallest and the largest budget.
    pub(super) is_inside: bool,
}

impl ScalingData {
    /// Of a study whose plan has sizes and budgets; `variants` are those of the plan.
    pub(super) fn of_study(plan: &PlanFile, variants: &[Variant]) -> Self {
        let mut data = ScalingData::default();
        for (about, variant) in plan.variants.iter().zip(variants) {
            let Some(cell) = &about.cell else { continue };
            let finished = variant.runs.iter().filter(|run| run.status == Status::Finished);
            let losses = finished.filter_map(|run: &Run| Some((run.seed?, run.valid_bpb()?))).collect();
            let point = Point { parameters: about.cost.total.parameters as f64, flops: cell.flops, losses };
            match data.variants.iter_mut().find(|known| known.name == cell.variant) {
                Some(known) => known.points.push(point),
                None => data.variants.push(ScalingVariant { name: cell.variant.clone(), points: vec![point] }),
            }
        }
        data
    }
}

impl Scaling {
    /// Fits curves to what was measured. None if nothing was.
    pub fn of(data: ScalingData) -> Option<Self> {
        let ScalingData { variants } = data;
        if variants.iter().flat_map(|variant| &variant.points).all(|point| point.losses.is_empty()) {
            return None;
        }
        let budgets = budgets(variants.iter().flat_map(|variant| &variant.points));
        let fits = variants.iter().map(|variant| Fit::of(&variant.points, &budgets)).collect();
        let points: Vec<&[Point]> = variants.iter().map(|variant| &variant.points[..]).collect();
        let bootstrap = Bootstrap::of(&points, &budgets);
        let colours = (0..variants.len()).collect();
        Some(Scaling { variants, budgets, fits, bootstrap, colours })
    }

    /// With the colours that the report's other charts have: `ranked` are the names of the variants there, best first.
    pub(super) fn coloured_as(mut self, ranked: &[&str]) -> Self {
        let place = |name: &str| ranked.iter().position(|ranked| *ranked == name);
        let others = ranked.len()..;
        let colours = self.variants.iter().zip(others).map(|(variant, other)| place(&variant.name).unwrap_or(other));
        self.colours = colours.collect();
        self
    }

    /// The best size of a variant under a budget, both by their numbers.
    pub(super) fn best(&self, variant: usize, budget: usize) -> Option<Best> {
        self.fits[variant].budgets[budget]
    }

    /// The 95% interval of the loss at the best size.
    pub(super) fn best_interval(&self, variant: usize, budget: usize) -> Option<(f64, f64)> {
        self.bootstrap.as_ref()?.interval(|fits| Some(fits[variant].budgets[budget]?.loss))
    }

    /// The 95% interval of the loss that a variant's power law gives.
    pub(super) fn law_interval(&self, variant: usize, flops: f64) -> Option<(f64, f64)> {
        self.bootstrap.as_ref()?.interval(|fits| fits[variant].loss_at(flops))
    }

    /// How far a variant lies above the first under a budget, each in its best size.
    pub(super) fn above_first(&self, variant: usize, budget: usize) -> Option<Above> {
        let above = |fits: &[Fit]| Some(fits[variant].budgets[budget]?.loss - fits[0].budgets[budget]?.loss);
        let interval = self.bootstrap.as_ref().and_then(|all| all.interval(above));
        Some(Above { mean: above(&self.fits)?, interval })
    }

    /// How far the power law of a variant lies above that of the first.
    pub(super) fn law_above_first(&self, variant: usize, flops: f64) -> Option<f64> {
        Some(self.fits[variant].loss_at(flops)? - self.fits[0].loss_at(flops)?)
    }

    /// Where the power law of a variant crosses that of the first.
    pub(super) fn crossing(&self, variant: usize) -> Option<Crossing> {
        let budget = self.fits[variant].law.ok()?.crossing(&self.fits[0].law.ok()?)?;
        let (low, high) = (self.budgets.first()?, self.budgets.last()?);
        Some(Crossing { budget, is_inside: (low..=high).contains(&&budget) })
    }

    /// `n` budgets from the smallest to the largest, in equal ratios.
    pub(super) fn between(&self, n: usize) -> Vec<f64> {
        let (Some(low), Some(high)) = (self.budgets.first(), self.budgets.last()) else { return vec![] };
        (0..n).map(|i| low * (high / low).powf(i as f64 / (n - 1) as f64)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::statistics::scaling::tests::points;

    pub(crate) const NOISE: [f64; 3] = [-0.02, 0.03, -0.01];

    pub(crate) fn scaling(variants: &[(&str, Vec<Point>)]) -> Scaling {
        let variants =
            variants.iter().map(|(name, points)| ScalingVariant { name: name.to_string(), points: points.clone() });
        Scaling::of(ScalingData { variants: variants.collect() }).unwrap()
    }

    /// Two variants whose laws cross between the budgets, with these seeds.
    pub(crate) fn crossing(noise: &[f64]) -> Scaling {
        scaling(&[("<a>", points(20.0, 0.06, noise)), ("<b>", points(15.0, 0.0514, noise))])
    }

    #[test]
    fn a_crossing_is_found_where_the_laws_are_equal() {
        let scaling = crossing(&NOISE);
        let Crossing { budget, is_inside } = scaling.crossing(1).unwrap();
        let (first, last) = (scaling.above_first(1, 0).unwrap(), scaling.above_first(1, 2).unwrap());
        assert!(is_inside && budget > 1e14 && budget < 1e15, "{budget:e}");
        assert!(first.interval.unwrap().1 < 0.0 && last.interval.unwrap().0 > 0.0, "{first:?} {last:?}");
        assert!(scaling.law_above_first(1, budget).unwrap().abs() < 1e-9);
        assert_eq!(scaling.crossing(0), None, "a law does not cross itself");
    }

    #[test]
    fn a_variant_has_the_colour_of_its_rank() {
        assert_eq!(crossing(&NOISE).colours, [0, 1]);
        assert_eq!(crossing(&NOISE).coloured_as(&["<b>", "<a>"]).colours, [1, 0]);
        assert_eq!(crossing(&NOISE).coloured_as(&["<b>"]).colours, [1, 0]);
    }

    #[test]
    fn few_seeds_have_no_interval() {
        let scaling = crossing(&NOISE[..2]);
        assert_eq!((scaling.best_interval(0, 0), scaling.law_interval(0, 1e14)), (None, None));
        assert_eq!(scaling.above_first(1, 0).unwrap().interval, None);
        assert!(Scaling::of(ScalingData::default()).is_none());
    }
}
