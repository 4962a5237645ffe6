//! Means of variants that were not trained with the same seeds.

use super::groups::Losses;

/// Rounds of the iteration, each of which comes closer.
const ROUNDS: usize = 1000;
/// Smaller changes than this are none.
const EXACT: f64 = 1e-13;

/// An estimate of each variant's mean over all seeds, from the additive model `loss = variant + seed`. It is fitted by
/// least squares, and the effects of all seeds sum to zero. So hard seeds that only one variant was trained with do not
/// make it look worse. If all variants have the same seeds, these are their means. Infinite for a variant without losses.
pub fn adjusted(variants: &[Losses]) -> Vec<f64> {
    let seeds: Vec<u64> = {
        let mut seeds: Vec<u64> = variants.iter().flat_map(|losses| losses.keys().copied()).collect();
        seeds.sort_unstable();
        seeds.dedup();
        seeds
    };
    let mean = |numbers: &mut dyn Iterator<Item = f64>| {
        let (sum, count) = numbers.fold((0.0, 0), |(sum, count), number| (sum + number, count + 1));
        if count > 0 { sum / count as f64 } else { f64::INFINITY }
    };
    let of_variant = |losses: &Losses, effects: &[f64]| {
        let effect = |seed: &u64| seeds.binary_search(seed).map_or(0.0, |place| effects[place]);
        mean(&mut losses.iter().map(|(seed, loss)| loss - effect(seed)))
    };
    let mut effects = vec![0.0; seeds.len()];
    let mut means: Vec<f64> = variants.iter().map(|losses| of_variant(losses, &effects)).collect();
    for _ in 0..ROUNDS {
        for (seed, effect) in seeds.iter().zip(&mut effects) {
            let rests = variants.iter().zip(&means).filter_map(|(losses, mean)| Some(losses.get(seed)? - mean));
            *effect = mean(&mut rests.into_iter());
        }
        let centre = mean(&mut effects.iter().copied());
        effects.iter_mut().for_each(|effect| *effect -= centre);
        let before = means.clone();
        means = variants.iter().map(|losses| of_variant(losses, &effects)).collect();
        if means.iter().zip(&before).all(|(now, before)| now == before || (now - before).abs() <= EXACT * before.abs())
        {
            break;
        }
    }
    means
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(of: &[(u64, f64)]) -> Losses {
        of.iter().copied().collect()
    }

    #[test]
    fn the_same_seeds_give_plain_means() {
        let means = adjusted(&[losses(&[(1, 2.0), (2, 3.0)]), losses(&[(1, 2.5), (2, 3.5)]), losses(&[])]);
        assert_eq!(means, [2.5, 3.0, f64::INFINITY]);
    }

    /// The second is worse with every seed that it shares, and has a lower plain mean.
    #[test]
    fn a_hard_seed_is_not_held_against_those_that_had_it() {
        let a = losses(&[(1, 2.0), (2, 2.0), (3, 8.0)]);
        let b = losses(&[(1, 2.5), (2, 2.5)]);
        let means = adjusted(&[a, b]);
        assert!((means[0] - 4.0).abs() < 1e-9 && (means[1] - 4.5).abs() < 1e-9, "{means:?}");
    }

    #[test]
    fn seeds_that_nobody_shares_leave_plain_means_apart_by_their_own_effects() {
        let means = adjusted(&[losses(&[(1, 2.0)]), losses(&[(2, 3.0)])]);
        assert!(means.iter().all(|mean| mean.is_finite()), "{means:?}");
        assert!(means[0] < means[1]);
    }
}
