//! What the curves say, in sentences that do not say more than they do.

use super::{Crossing, Scaling};
use crate::report::format::{count, flop};
use crate::statistics::parabola::WhyNot;
use crate::statistics::scaling::Best;

/// A crossing that lies further outside of the budgets is none, as a factor.
const FAR: f64 = 100.0;

impl Scaling {
    /// What was trained.
    pub(in crate::report) fn about(&self) -> String {
        let of_budget = |budget: &f64| {
            let of =
                |variant: &super::ScalingVariant| variant.points.iter().filter(|point| point.is_of(*budget)).count();
            self.variants.iter().map(of).max().unwrap_or(0)
        };
        let sizes = self.budgets.iter().map(of_budget).max().unwrap_or(0);
        format!(
            "{} in {} under {}, with {}. Losses are bits per byte in validation.",
            count(self.variants.len(), "variant"),
            count(sizes, "size"),
            count(self.budgets.len(), "budget"),
            count(self.most_seeds(), "seed")
        )
    }

    /// What intervals are, or why there are none.
    pub(in crate::report) fn about_intervals(&self) -> String {
        let seeds = count(self.most_seeds(), "seed");
        // One resample in 27 has the lowest seed alone, and one the highest: more than the 2.5% beyond each end.
        let of_three = match self.most_seeds() {
            3 => {
                " With 3 seeds, an interval is about the range of the seeds: it excludes 0 if all seeds agree on the \
                  sign, which chance alone brings about one time in four."
            }
            _ => "",
        };
        match &self.bootstrap {
            None => format!(
                "There are no intervals, and nothing is tested: a bootstrap needs 3 seeds, and this study has {seeds}."
            ),
            Some(_) => format!(
                "Intervals are 95% percentile intervals of a bootstrap over {seeds}, in which all variants get the same \
                 seeds. With few seeds they are coarse and tend to be too narrow.{of_three} They are not adjusted for the \
                 number of budgets or variants."
            ),
        }
    }

    /// What the marks and lines of the charts against the budget are.
    pub(in crate::report) fn about_marks(&self) -> String {
        let laws = self.fits.iter().filter(|fit| fit.law.is_ok()).count();
        let (law, none) = (
            " Lines are power laws through the diamonds, and bands are their 95% intervals. A cross marks where two laws \
             are equal.",
            " Dashed lines only join points, and bars are 95% intervals: no power law was fitted.",
        );
        let lines = match laws {
            0 => none.into(),
            n if n == self.fits.len() => law.into(),
            _ => format!("{law}{none}"),
        };
        format!("Diamonds are fitted optima; circles are the best measured sizes.{lines}")
    }

    /// What was found: the law of each variant, what could not be fitted, and how the variants compare.
    pub(in crate::report) fn findings(&self) -> Vec<String> {
        let mut findings: Vec<String> = (0..self.variants.len()).map(|variant| self.law(variant)).collect();
        findings.extend((0..self.variants.len()).flat_map(|variant| self.unfitted(variant)));
        for variant in 1..self.variants.len() {
            findings.extend(self.comparison(variant));
            findings.extend(self.crossing_in_words(variant));
        }
        findings.extend(self.missing());
        findings
    }

    /// A name within a sentence, isolated so that right-to-left letters do not reorder the text around it.
    fn name(&self, variant: usize) -> String {
        format!("\u{2068}{}\u{2069}", self.variants[variant].name)
    }

    fn most_seeds(&self) -> usize {
        let points = self.variants.iter().flat_map(|variant| &variant.points);
        points.map(|point| point.losses.len()).max().unwrap_or(0)
    }

    fn law(&self, variant: usize) -> String {
        let name = self.name(variant);
        match self.fits[variant].law {
            Ok(law) => format!(
                "{name}: ten times the budget multiplies the loss at the best size by {:.3} (a power law with exponent \
                 {:.4}). The law fits every budget within {:.2}%.",
                10f64.powf(-law.exponent),
                -law.exponent,
                100.0 * law.worst.exp_m1()
            ),
            Err(why) => format!("{name}: no power law was fitted: {why}."),
        }
    }

    /// The budgets without a parabola, by the reason.
    fn unfitted(&self, variant: usize) -> Vec<String> {
        let mut reasons: Vec<(Option<WhyNot>, Vec<String>)> = Vec::new();
        for (budget, best) in self.budgets.iter().zip(&self.fits[variant].budgets) {
            let why = match best {
                Some(Best { parabola: Ok(_), .. }) => continue,
                Some(Best { parabola: Err(why), .. }) => Some(*why),
                None => None,
            };
            match reasons.iter_mut().find(|(other, _)| *other == why) {
                Some((_, budgets)) => budgets.push(flop(*budget)),
                None => reasons.push((why, vec![flop(*budget)])),
            }
        }
        let name = self.name(variant);
        let sentence = |(why, budgets): (Option<WhyNot>, Vec<String>)| match why {
            None => format!("{name}: there is no loss yet under {}.", listed(&budgets)),
            Some(why) => {
                format!(
                    "{name}: no optimum was fitted under {}: {why}. The best measured size is used instead.",
                    listed(&budgets)
                )
            }
        };
        reasons.into_iter().map(sentence).collect()
    }

    /// Under which budgets a variant is better or worse than the first, as far as that was tested.
    fn comparison(&self, variant: usize) -> Option<String> {
        let (mut better, mut worse, mut open) = (vec![], vec![], vec![]);
        for (i, budget) in self.budgets.iter().enumerate() {
            match self.above_first(variant, i)?.interval? {
                (_, high) if high < 0.0 => better.push(flop(*budget)),
                (low, _) if low > 0.0 => worse.push(flop(*budget)),
                _ => open.push(flop(*budget)),
            }
        }
        let part = |what: &str, budgets: &[String]| match budgets {
            [] => None,
            budgets => Some(format!("{what} under {}", listed(budgets))),
        };
        let parts = [part("better", &better), part("worse", &worse), part("not distinguishable from it", &open)];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        Some(format!("{} compared with {}, by the intervals: {}.", self.name(variant), self.name(0), parts.join("; ")))
    }

    fn crossing_in_words(&self, variant: usize) -> Option<String> {
        let (name, first) = (self.name(variant), self.name(0));
        self.fits[variant].law.ok().and(self.fits[0].law.ok())?;
        let (low, high) = (*self.budgets.first()?, *self.budgets.last()?);
        Some(match self.crossing(variant) {
            Some(Crossing { budget, is_inside: true }) => {
                let is_better_above = self.law_above_first(variant, high)? < 0.0;
                let (above, below) = if is_better_above { (&name, &first) } else { (&first, &name) };
                format!(
                    "The power laws of {first} and {name} cross at {}: {below} is better below it, and {above} above.",
                    flop(budget)
                )
            }
            Some(Crossing { budget, .. }) if (low / FAR..=high * FAR).contains(&budget) => format!(
                "The power laws of {first} and {name} would cross at {}, outside the measured budgets: this is an \
                 extrapolation, not a result.",
                flop(budget)
            ),
            _ => {
                format!(
                    "The power laws of {first} and {name} do not cross within a factor of 100 of the measured budgets."
                )
            }
        })
    }

    fn missing(&self) -> Option<String> {
        let points = || self.variants.iter().flat_map(|variant| &variant.points);
        let missing = points().filter(|point| point.losses.is_empty()).count();
        let all = points().count();
        let text =
            format!("{missing} of {all} pairs of size and budget have no loss: their runs failed or have not ended.");
        (missing > 0).then_some(text)
    }
}

/// A sentence without the marks around names.
pub(super) fn plain(text: &str) -> String {
    text.replace(['\u{2068}', '\u{2069}'], "")
}

/// `a, b and c`
fn listed(names: &[String]) -> String {
    match names {
        [rest @ .., last] if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOISE, crossing, scaling};
    use super::*;
    use crate::statistics::scaling::tests::points;

    fn found(scaling: &Scaling) -> Vec<String> {
        let findings = scaling.findings();
        assert!(findings[0].starts_with('\u{2068}'), "{findings:#?}");
        findings.iter().map(|finding| plain(finding)).collect()
    }

    #[test]
    fn budgets_are_told_apart() {
        let scaling = crossing(&NOISE);
        assert_eq!(
            scaling.about(),
            "2 variants in 4 sizes under 3 budgets, with 3 seeds. Losses are bits per byte in validation."
        );
        let findings = found(&scaling);
        assert_eq!(findings.len(), 4, "{findings:#?}");
        assert!(
            findings[0].starts_with("<a>: ten times the budget multiplies the loss at the best size by 0.8"),
            "{findings:#?}"
        );
        assert_eq!(
            findings[2],
            "<b> compared with <a>, by the intervals: better under 100 TFLOP and 300 TFLOP; worse under 1 PFLOP."
        );
        assert!(scaling.about_intervals().contains("With 3 seeds, an interval is about the range of the seeds"));
        assert!(findings[3].ends_with("<b> is better below it, and <a> above."), "{findings:#?}");
    }

    #[test]
    fn what_was_not_fitted_is_said() {
        let mut few = points(20.0, 0.06, &[0.0]);
        few.retain(|point| !point.is_of(1e15) || point.parameters < 2e6);
        few[3].losses.clear();
        let scaling = scaling(&[("a", few), ("b", points(20.0, 0.05, &[0.0]))]);
        assert!(scaling.about_intervals().ends_with("a bootstrap needs 3 seeds, and this study has 1 seed."));
        let findings = found(&scaling);
        assert_eq!(findings[0], "a: no power law was fitted: it needs 3 budgets with an optimum, and 2 have one.");
        assert_eq!(
            findings[2],
            "a: no optimum was fitted under 1 PFLOP: a parabola needs 3 sizes with a loss, and 2 have one. The best \
             measured size is used instead."
        );
        assert_eq!(
            findings[3..],
            ["1 of 22 pairs of size and budget have no loss: their runs failed or have not ended."]
        );
    }

    #[test]
    fn an_extrapolation_is_called_one() {
        let of = |scale: f64, exponent: f64| {
            scaling(&[("a", points(20.0, 0.06, &NOISE)), ("b", points(scale, exponent, &NOISE))])
        };
        assert!(found(&of(16.5, 0.055))[3].contains("extrapolation"), "{:#?}", found(&of(16.5, 0.055)));
        assert!(found(&of(21.0, 0.06))[3].ends_with("a factor of 100 of the measured budgets."));
    }
}
