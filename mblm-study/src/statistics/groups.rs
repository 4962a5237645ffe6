//! Groups in a ranking: which variants are distinguishable, and from which.

use std::collections::BTreeMap;

use super::ALPHA;
use super::holm::holm;
use super::paired::{Paired, paired};

/// The bits per byte that a variant reached, by seed. The same seed means the same data in the same order.
pub type Losses = BTreeMap<u64, f64>;

/// Where a variant stands in a ranking.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Standing {
    /// Its group, counted from 1: those in group 1 are not distinguishable from the first. None: it was not tested.
    pub group: Option<usize>,
    /// How far it lies above the first. None for the first itself, and if that was not tested.
    pub to_first: Option<Difference>,
}

/// How far a variant lies above another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// The test over the seeds that both have. Its interval and its p-value are not adjusted.
    pub paired: Paired,
    /// The p-value, adjusted for the number of variants (Holm) and of looks (Bonferroni).
    pub adjusted_p: f64,
}

/// The standing of each of `variants`, which are sorted by their mean, best first.
///
/// Each variant is compared with the first by a paired t test over the seeds that both have. Those that are not
/// distinguishable from it (adjusted p above [`ALPHA`]) are group 1. The best of the rest leads group 2, with which those
/// that are left are compared, and so on. Holm's adjustment counts the comparisons with one leader.
///
/// * The mean that ranks a variant is over all of its seeds, but a difference is over shared seeds. The two can disagree: a
///   variant that lies below the leader on the seeds they share is in its group, whatever its p-value.
/// * A variant that shares fewer than two seeds with a leader that it would be compared with is not tested. With one seed,
///   nothing is.
/// * Groups need not follow the ranking: a variant whose seeds vary a lot may be in group 1 below one of group 2.
///
/// `looks` counts how often the seeds were looked at while more were added. Every p-value is multiplied by it: that is the
/// price of adding seeds until a difference is found.
pub fn groups(variants: &[Losses], looks: usize) -> Vec<Standing> {
    let mut standings = vec![Standing::default(); variants.len()];
    let mut left: Vec<usize> = (0..variants.len()).collect();
    for group in 1.. {
        let Some((&leader, rest)) = left.split_first() else { break };
        let compared: Vec<(usize, Difference)> = compare(variants, leader, rest, looks);
        // The first is of a group if something was compared with it; the next leaders were compared with the first.
        standings[leader].group = (group > 1 || !compared.is_empty()).then_some(group);
        for (i, difference) in &compared {
            if group == 1 {
                standings[*i].to_first = Some(*difference);
            }
            if !difference.is_above() {
                standings[*i].group = Some(group);
            }
        }
        left = compared.iter().filter(|(_, difference)| difference.is_above()).map(|(i, _)| *i).collect();
    }
    standings
}

impl Difference {
    /// Whether the variant is distinguishable from the other, and worse.
    pub fn is_above(&self) -> bool {
        self.adjusted_p <= ALPHA && self.paired.mean > 0.0
    }
}

/// The tests of those of `rest` that can be tested against `leader`.
fn compare(variants: &[Losses], leader: usize, rest: &[usize], looks: usize) -> Vec<(usize, Difference)> {
    let tested: Vec<(usize, Paired)> =
        rest.iter().filter_map(|&i| Some((i, paired(&differences(&variants[i], &variants[leader]))?))).collect();
    let adjusted = holm(&tested.iter().map(|(_, paired)| paired.p).collect::<Vec<_>>());
    let looks = looks.max(1) as f64;
    let difference = |((i, paired), p): ((usize, Paired), f64)| {
        let adjusted_p = (p * looks).min(1.0);
        (i, Difference { paired, adjusted_p })
    };
    tested.into_iter().zip(adjusted).map(difference).collect()
}

/// `a` less `b`, for each seed that both have.
pub fn differences(a: &Losses, b: &Losses) -> Vec<f64> {
    a.iter().filter_map(|(seed, value)| Some(value - b.get(seed)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::near;
    use super::*;

    fn seeds(values: &[f64]) -> Losses {
        (1..).zip(values.iter().copied()).collect()
    }

    fn found(variants: &[Losses], looks: usize) -> Vec<Option<usize>> {
        groups(variants, looks).iter().map(|standing| standing.group).collect()
    }

    /// Each variant's seeds move together, so that differences have a small spread.
    fn ranking() -> Vec<Losses> {
        [
            [2.310, 2.340, 2.300, 2.330],
            [2.311, 2.339, 2.303, 2.332],
            [2.360, 2.391, 2.349, 2.381],
            [2.361, 2.390, 2.351, 2.383],
            [2.500, 2.531, 2.490, 2.519],
        ]
        .map(|values| seeds(&values))
        .to_vec()
    }

    #[test]
    fn those_that_are_not_distinguishable_are_a_group() {
        assert_eq!(found(&ranking(), 1), [Some(1), Some(1), Some(2), Some(2), Some(3)]);
        let standings = groups(&ranking(), 1);
        assert_eq!(standings[0].to_first, None);
        // statsmodels 0.15.0, multipletests([scipy.stats.ttest_rel(variant, first).pvalue …], method="holm")[1]
        let want = [0.23944259863600298, 5.7183284610631435e-06, 8.155528475662675e-06, 8.750559874358499e-08];
        for (standing, want) in standings[1..].iter().zip(want) {
            assert!(near(standing.to_first.unwrap().adjusted_p, want), "{standing:?}");
        }
    }

    #[test]
    fn every_look_has_its_price() {
        let p = |looks| groups(&ranking(), looks)[2].to_first.unwrap().adjusted_p;
        assert!(near(p(3), 3.0 * p(1)) && p(1_000_000_000) == 1.0);
        assert_eq!(found(&ranking(), 1_000_000_000), [Some(1); 5]);
    }

    #[test]
    fn without_shared_seeds_nothing_is_tested() {
        let one = [seeds(&[2.0]), seeds(&[3.0])];
        assert_eq!(groups(&one, 1), [Standing::default(); 2]);
        assert_eq!((found(&one[..1], 1), found(&[], 1)), (vec![None], vec![]));
        let other: Losses = [(8, 3.0), (9, 3.1)].into();
        let mut ranking = ranking();
        ranking.insert(3, other);
        assert_eq!(found(&ranking, 1), [Some(1), Some(1), Some(2), None, Some(2), Some(3)]);
    }

    #[test]
    fn a_variant_that_is_better_where_both_were_measured_is_not_worse() {
        let first: Losses = [(1, 2.0), (2, 2.01), (3, 1.0), (4, 1.0)].into();
        let second: Losses = [(1, 1.9), (2, 1.909)].into();
        let standing = groups(&[first, second], 1)[1];
        assert!(standing.to_first.unwrap().adjusted_p < ALPHA, "{standing:?}");
        assert_eq!(standing.group, Some(1));
    }
}
