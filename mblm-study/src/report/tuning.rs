//! What tuning found: how the loss of each variant depends on a field, and how sure its best value is.

use serde::Serialize;

use super::variant::Variant;
use crate::course::outcome::Outcome;
use crate::course::{Course, Unit};
use crate::design::scale::compact;
use crate::design::tune::Tune;
use crate::folder::PlanFile;

/// A field that was tuned for each variant.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Tuned {
    /// Its path, `train.learning_rate`.
    pub field: String,
    /// The seeds of the tries, which no scored run uses.
    pub seeds: Vec<u64>,
    /// The share of the budget that a try trained for.
    pub share: f64,
    /// Whether its variants are the ranked ones, in that order. If not, each is a variant in one size.
    pub is_ranked: bool,
    /// The variants.
    pub variants: Vec<TunedVariant>,
}

/// What was tried for a variant.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TunedVariant {
    /// Its name.
    pub name: String,
    /// The tries that have ended, by ascending value.
    pub tries: Vec<Try>,
    /// The value that it is scored with, or the best one so far; none if all tries failed.
    pub chosen: Option<f64>,
}

/// A value and what it led to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Try {
    /// The value.
    pub value: f64,
    /// Bits per byte in validation; none if the run failed, or its loss was not finite.
    pub bpb: Option<f64>,
}

/// What a value other than the chosen one costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cost {
    /// So many bits per byte more; less if it is negative.
    Bits(f64),
    /// The next value on that side failed.
    Fails,
    /// Nothing was tried on that side, or not so far out.
    Unknown,
}

/// What tuning found in the study of `plan`, a part per field; `ranked` are its variants, best first.
pub(super) fn of_study(plan: &PlanFile, course: &Course, ranked: &[Variant]) -> Vec<Tuned> {
    let Some(tune) = &plan.tune else { return vec![] };
    let place = |name: &str| ranked.iter().position(|variant| variant.name == name).unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    for (i, field) in tune.fields.iter().enumerate() {
        let mut variants: Vec<TunedVariant> = course.units.iter().filter_map(|unit| variant(plan, unit, i)).collect();
        // Those that are not ranked stay in the study's order.
        variants.sort_by_key(|variant| place(&variant.name));
        let Tune { seeds, share, .. } = tune.clone();
        parts.push(Tuned { field: field.path.clone(), seeds, share, is_ranked: plan.scale.is_none(), variants });
    }
    parts.retain(|part| part.variants.iter().any(|variant| !variant.tries.is_empty()));
    parts
}

fn variant(plan: &PlanFile, unit: &Unit, field: usize) -> Option<TunedVariant> {
    let about = &plan.variants[unit.variants[0]];
    let name = match &about.cell {
        Some(cell) => format!("{}, {}", cell.variant, compact(cell.size as f64)),
        None => about.name.clone(),
    };
    let tries = unit.searches.get(field)?.tries.iter().filter_map(|tried| {
        let bpb = match tried.outcome {
            // One that failed for another reason tells nothing.
            Outcome::Open | Outcome::Failed => return None,
            Outcome::Diverged => None,
            Outcome::Loss(loss) => Some(loss),
        };
        Some(Try { value: tried.value, bpb })
    });
    Some(TunedVariant::new(name, tries.collect()))
}

impl TunedVariant {
    /// A variant and its tries, of which the best is chosen.
    pub fn new(name: String, mut tries: Vec<Try>) -> Self {
        tries.sort_by(|a, b| a.value.total_cmp(&b.value));
        let finite = tries.iter().filter_map(|tried| Some((tried.value, tried.bpb?)));
        let chosen = finite.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(value, _)| value);
        TunedVariant { name, tries, chosen }
    }

    /// The tries with a loss: values and bits per byte.
    pub(super) fn finite(&self) -> Vec<(f64, f64)> {
        self.tries.iter().filter_map(|tried| Some((tried.value, tried.bpb?))).collect()
    }

    /// The values that failed.
    pub(super) fn failed(&self) -> impl Iterator<Item = f64> {
        self.tries.iter().filter(|tried| tried.bpb.is_none()).map(|tried| tried.value)
    }

    /// The place of the chosen value among the tries.
    fn place(&self) -> Option<usize> {
        self.tries.iter().position(|tried| Some(tried.value) == self.chosen)
    }

    /// Bits per byte with the chosen value.
    pub(super) fn best(&self) -> Option<f64> {
        self.tries[self.place()?].bpb
    }

    /// Whether nothing was tried beyond the chosen value on one side, so that the best may lie further out.
    pub(super) fn is_at_edge(&self) -> bool {
        self.place().is_some_and(|place| place == 0 || place + 1 == self.tries.len())
    }

    /// What `factor` times the chosen value costs, between tries on a logarithmic axis.
    pub(super) fn cost_of(&self, factor: f64) -> Cost {
        let (Some(place), Some(best), Some(chosen)) = (self.place(), self.best(), self.chosen) else {
            return Cost::Unknown;
        };
        let wanted = chosen * factor;
        // Values have four digits, so that a grid of this factor misses its own neighbours a little.
        let reaches = |value: f64| if factor > 1.0 { value >= wanted * 0.999 } else { value <= wanted * 1.001 };
        let outwards: Vec<&Try> = match factor > 1.0 {
            true => self.tries[place + 1..].iter().collect(),
            false => self.tries[..place].iter().rev().collect(),
        };
        let (mut value, mut bpb) = (chosen, best);
        for next in outwards {
            let Some(next_bpb) = next.bpb else { return Cost::Fails };
            if value <= 0.0 || next.value <= 0.0 {
                return Cost::Unknown;
            }
            if reaches(next.value) {
                let share = ((wanted / value).ln() / (next.value / value).ln()).min(1.0);
                return Cost::Bits(bpb + share * (next_bpb - bpb) - best);
            }
            (value, bpb) = (next.value, next_bpb);
        }
        Cost::Unknown
    }

    /// Its row in a table: name, best value, bits per byte with it, the cost of half and of twice that value, and tries.
    pub(super) fn cells(&self) -> [String; 6] {
        let none = || "–".to_string();
        let edge = if self.is_at_edge() { ", at the edge" } else { "" };
        let tries = match self.failed().count() {
            0 => self.tries.len().to_string(),
            failed => format!("{}, {failed} failed", self.tries.len()),
        };
        [
            self.name.clone(),
            self.chosen.map_or_else(none, |value| value_text(value) + edge),
            self.best().map_or_else(none, |bpb| format!("{bpb:.3}")),
            self.cost_of(0.5).text(),
            self.cost_of(2.0).text(),
            tries,
        ]
    }
}

impl Cost {
    pub(super) fn text(self) -> String {
        match self {
            Cost::Bits(bits) => super::format::signed(bits, 3),
            Cost::Fails => "fails".into(),
            Cost::Unknown => "not tried".into(),
        }
    }
}

impl Tuned {
    /// What is put before a variant's number where it is not its rank.
    pub(super) fn mark(&self) -> &'static str {
        if self.is_ranked { "" } else { "tuned" }
    }

    /// How it was tuned, in words.
    pub(super) fn about(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        let seeds = match &seeds[..] {
            [one] => format!("seed {one}, which no scored run uses"),
            many => format!("seeds {}, which no scored run uses", many.join(", ")),
        };
        // Sizes are tuned once, for all budgets.
        let (whole, part) = if self.is_ranked {
            ("the whole budget", "the budget")
        } else {
            ("the smallest budget", "the smallest budget")
        };
        let budget = match self.share {
            1.0 => whole.into(),
            share => format!("{:.0}% of {part}", 100.0 * share),
        };
        let tries = || self.variants.iter().map(|variant| variant.tries.len());
        let tries = match (tries().min().unwrap_or(0), tries().max().unwrap_or(0)) {
            (least, most) if least == most => format!("{most} values were tried for each variant"),
            (least, most) => format!("{least} to {most} values were tried for each variant so far"),
        };
        format!("{tries}, on {budget}, with {seeds}.")
    }
}

/// A value of a field as a person writes it: `0.004`, `1e-5`.
pub(super) fn value_text(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if (1e-4..1e6).contains(&size) => format!("{value}"),
        _ => format!("{value:e}"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn tuned(name: &str, tries: &[(f64, Option<f64>)]) -> TunedVariant {
        TunedVariant::new(name.into(), tries.iter().map(|&(value, bpb)| Try { value, bpb }).collect())
    }

    #[test]
    fn a_factor_off_costs_what_the_curve_says() {
        let variant = tuned("a", &[(0.004, Some(2.3)), (0.001, Some(2.5)), (0.002, Some(2.2)), (0.008, None)]);
        assert_eq!((variant.chosen, variant.best(), variant.is_at_edge()), (Some(0.002), Some(2.2), false));
        let bits = |cost| match cost {
            Cost::Bits(bits) => bits,
            other => panic!("{other:?}"),
        };
        assert!((bits(variant.cost_of(2.0)) - 0.1).abs() < 1e-12 && (bits(variant.cost_of(0.5)) - 0.3).abs() < 1e-12);
        assert!((bits(variant.cost_of(2f64.sqrt())) - 0.05).abs() < 1e-12, "halfway on a logarithmic axis");
        assert_eq!((variant.cost_of(4.0), variant.cost_of(0.25)), (Cost::Fails, Cost::Unknown));
        assert_eq!(Cost::Bits(0.1).text() + &Cost::Bits(-0.01).text(), "+0.100−0.010");
    }

    #[test]
    fn an_edge_is_where_nothing_was_tried_beyond() {
        assert!(tuned("a", &[(1.0, Some(2.0)), (2.0, Some(3.0))]).is_at_edge());
        assert!(!tuned("a", &[(1.0, Some(2.0)), (2.0, Some(3.0)), (0.5, None)]).is_at_edge(), "what is beyond fails");
        let edge = tuned("a", &[(1.0, Some(2.0)), (2.0, Some(3.0)), (4.0, None)]);
        assert_eq!(edge.cells(), ["a", "1, at the edge", "2.000", "not tried", "+1.000", "3, 1 failed"]);
        let lost = tuned("a", &[(1.0, None)]);
        assert!(lost.chosen.is_none() && !lost.is_at_edge() && lost.cost_of(2.0) == Cost::Unknown);
        for (at_0, at_1, factor) in [(1.0, 2.0, 2.0), (2.0, 1.0, 0.5)] {
            let zero = tuned("a", &[(0.0, Some(at_0)), (1.0, Some(at_1))]);
            assert_eq!(zero.cost_of(factor), Cost::Unknown, "0 has no place on a logarithmic axis");
        }
    }

    #[test]
    fn values_are_written_as_people_do() {
        assert_eq!([0.004, 1e-5, 0.0, 2e7, 1.414].map(value_text), ["0.004", "1e-5", "0", "2e7", "1.414"]);
    }

    #[test]
    fn it_says_how_many_tries_and_which_seeds() {
        let one = tuned("a", &[(1.0, None), (2.0, None)]);
        let mut part = Tuned {
            field: "x".into(),
            seeds: vec![1000],
            share: 0.5,
            is_ranked: true,
            variants: vec![one.clone(), one],
        };
        let want =
            "2 values were tried for each variant, on 50% of the budget, with seed 1000, which no scored run uses.";
        assert_eq!(part.about(), want);
        part.variants[0].tries.pop();
        (part.seeds, part.share) = (vec![5, 6], 1.0);
        let want = "1 to 2 values were tried for each variant so far, on the whole budget, with seeds 5, 6, which no scored run uses.";
        assert_eq!(part.about(), want);
        part.is_ranked = false;
        assert!(part.about().contains(", on the smallest budget, "), "{}", part.about());
    }
}
