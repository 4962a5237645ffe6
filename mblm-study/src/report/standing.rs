//! What is distinguishable in a ranking: groups, and differences to the best with their intervals.

use serde_json::{Value, json};

use super::format::signed;
use super::variant::{Variant, levels};
use crate::statistics::groups::{Losses, Standing, groups};
use crate::statistics::paired::Paired;

/// The standings of ranked variants.
pub(super) struct Standings {
    /// As many as there are variants.
    of: Vec<Standing>,
    /// How far the mean of each lies above that of the first, whether that is tested or not.
    behind: Vec<Option<f64>>,
    /// How often the study may look at the data while it adds seeds.
    pub(super) looks: usize,
    /// Whether a variant has several runs whose seeds are not known, so that its runs cannot be paired.
    pub(super) has_unknown_seeds: bool,
}

impl Standings {
    /// Of `variants`, which are sorted, best first. Only finished runs whose seeds are known are compared.
    pub(super) fn of(variants: &[Variant], looks: usize) -> Self {
        let finished: Vec<&Variant> = variants.iter().take_while(|variant| variant.is_finished()).collect();
        let losses: Vec<Losses> = finished.iter().map(|variant| variant.losses()).collect();
        let mut of = groups(&losses, looks);
        of.resize(variants.len(), Standing::default());
        let levels = levels(variants);
        let behind = |(variant, level): (&Variant, &f64)| {
            let behind = finished.first().and(variant.valid_bpb()).map(|_| level - levels[0])?;
            (behind > 0.0).then_some(behind)
        };
        let is_unknown = |variant: &&Variant| {
            let runs = variant.counted();
            runs.len() > 1 && runs.iter().any(|run| run.seed.is_none())
        };
        Standings {
            of,
            behind: variants.iter().zip(&levels).map(behind).collect(),
            looks,
            has_unknown_seeds: finished.iter().any(is_unknown),
        }
    }

    /// How far a variant lies above the first.
    pub(super) fn behind(&self, variant: usize) -> f64 {
        self.behind[variant].unwrap_or(0.0)
    }

    /// Whether anything was tested.
    pub(super) fn is_tested(&self) -> bool {
        self.compared() > 0
    }

    /// How many variants were compared with the first.
    pub(super) fn compared(&self) -> usize {
        self.of.iter().filter(|standing| standing.to_first.is_some()).count()
    }

    /// The fewest seeds that a difference is over.
    pub(super) fn fewest_seeds(&self) -> Option<usize> {
        self.of.iter().filter_map(|standing| Some(standing.to_first?.paired.n)).min()
    }

    /// The group of a variant, counted from 1.
    pub(super) fn group(&self, variant: usize) -> Option<usize> {
        self.of[variant].group
    }

    /// The difference of a variant to the first, over the seeds that both have.
    pub(super) fn to_first(&self, variant: usize) -> Option<&Paired> {
        self.of[variant].to_first.as_ref().map(|difference| &difference.paired)
    }

    /// The difference in words: `+0.031 (0.012 to 0.050)`, or that of the means alone if it was not tested.
    pub(super) fn difference(&self, variant: usize) -> Option<String> {
        match self.to_first(variant) {
            Some(paired) => {
                let Paired { mean, low, high, .. } = paired;
                Some(format!("{} ({} to {})", signed(*mean, 3), minus(*low), minus(*high)))
            }
            None => self.behind[variant].map(|behind| signed(behind, 3)),
        }
    }

    /// For `results.json`.
    pub(super) fn json(&self, variant: usize) -> Value {
        let to_first = self.of[variant].to_first.map(|difference| {
            let Paired { mean, standard_error, low, high, p, n } = difference.paired;
            json!({"mean": mean, "standard_error": standard_error, "low": low, "high": high, "p": p,
                "adjusted_p": difference.adjusted_p, "seeds": n})
        });
        json!({"group": self.group(variant), "to_best": to_first})
    }
}

fn minus(number: f64) -> String {
    format!("{number:.3}").replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::super::run::Status::{Finished, Unfinished};
    use super::super::variant::tests::{run, variant};
    use super::*;

    #[test]
    fn finished_runs_of_known_seeds_are_compared() {
        let of = |name: &str, bpbs: &[f64]| {
            variant(name, bpbs.iter().zip(1..).map(|(bpb, seed)| run(seed, Finished, &[*bpb])).collect())
        };
        let mut variants = vec![
            of("a", &[2.0, 2.1, 2.2]),
            of("b", &[2.01, 2.08, 2.25]),
            of("c", &[2.5, 2.61, 2.69]),
            variant("d", vec![run(1, Unfinished, &[1.0])]),
        ];
        let standings = Standings::of(&variants, 1);
        let groups: Vec<_> = (0..4).map(|i| standings.group(i)).collect();
        assert_eq!(groups, [Some(1), Some(1), Some(2), None]);
        assert_eq!((standings.compared(), standings.fewest_seeds()), (2, Some(3)));
        assert_eq!(standings.difference(0), None);
        assert!(standings.difference(2).unwrap().starts_with("+0.500 (0.4"), "{:?}", standings.difference(2));
        assert_eq!(standings.json(1)["to_best"]["seeds"], 3);
        variants[0].runs.iter_mut().for_each(|run| run.seed = None);
        let standings = Standings::of(&variants, 1);
        assert!(!standings.is_tested() && standings.has_unknown_seeds);
        assert_eq!(standings.difference(2).unwrap(), "+0.500");
    }
}
