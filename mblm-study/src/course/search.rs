//! The search for a field's best value: a first grid, and further values while that is not settled.

use crate::design::tune::Values;

/// Digits of a value: more make no difference to training, and are hard to read.
const DIGITS: i32 = 4;

/// A value that was tried, and its loss; none if no try of it ended with a finite one.
pub(crate) type Tried = (f64, Option<f64>);

/// The values that are tried first, ascending or as listed; `base` is the variant's own.
pub(crate) fn first(values: &Values, base: f64) -> Vec<f64> {
    match values {
        Values::Listed(values) => values.clone(),
        Values::Grid { factor, points } => {
            let half = (*points / 2) as i32;
            let value = |step| if step == 0 { base } else { rounded(base * factor.powi(step)) };
            (-half..=half).map(value).collect()
        }
    }
}

/// The place of the best value.
pub(crate) fn best(tried: &[Tried]) -> Option<usize> {
    let losses = tried.iter().enumerate().filter_map(|(i, (_, loss))| Some((i, (*loss)?)));
    losses.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

/// Whether the best value may lie beyond those that were tried. One beside a value that failed does not.
pub(crate) fn is_at_edge(tried: &[Tried]) -> bool {
    let Some(best) = best(tried) else { return true };
    let value = tried[best].0;
    !tried.iter().any(|(other, _)| *other < value) || !tried.iter().any(|(other, _)| *other > value)
}

/// The next value to try, of a grid in steps of `factor`: beyond the edge where the best lies there, and below all where
/// every value failed; else between the best and its farther neighbour, or the better one of two as far, so that every
/// variant is tried equally often. None if that was tried before.
pub(crate) fn next(factor: f64, tried: &[Tried]) -> Option<f64> {
    let values = || tried.iter().map(|(value, _)| *value);
    let lowest = values().fold(f64::INFINITY, f64::min);
    let value = match best(tried).map(|i| tried[i].0) {
        None => lowest / factor,
        Some(best) if best == lowest => best / factor,
        Some(best) if is_at_edge(tried) => best * factor,
        Some(best) => {
            let below = tried.iter().filter(|(value, _)| *value < best).max_by(|a, b| a.0.total_cmp(&b.0));
            let above = tried.iter().filter(|(value, _)| *value > best).min_by(|a, b| a.0.total_cmp(&b.0));
            let gap = |neighbour: &Tried| rounded((neighbour.0 / best).ln().abs());
            let loss = |neighbour: &Tried| neighbour.1.unwrap_or(f64::INFINITY);
            let wider = |a: &&Tried, b: &&Tried| gap(a).total_cmp(&gap(b)).then(loss(b).total_cmp(&loss(a)));
            (best * above.into_iter().chain(below).max_by(wider)?.0).sqrt()
        }
    };
    let value = rounded(value);
    (value != 0.0 && value.is_finite() && !values().any(|other| other == value)).then_some(value)
}

/// To so many digits.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    // By way of text, since powers of ten are not exact.
    format!("{value:.*e}", DIGITS as usize - 1).parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_is_centred_and_exact() {
        let grid = Values::Grid { factor: 2.0, points: 5 };
        assert_eq!(first(&grid, 0.002), [0.0005, 0.001, 0.002, 0.004, 0.008]);
        assert_eq!(first(&Values::Grid { factor: 3.0, points: 3 }, 0.001), [0.0003333, 0.001, 0.003]);
        assert_eq!(first(&Values::Listed(vec![0.1, 0.0]), 0.0), [0.1, 0.0]);
    }

    #[test]
    fn the_best_is_followed_beyond_an_edge_and_settled_between_neighbours() {
        let low = [(1.0, Some(2.0)), (2.0, Some(3.0)), (4.0, Some(4.0))];
        assert!(is_at_edge(&low));
        assert_eq!(next(2.0, &low), Some(0.5));
        let high = [(1.0, Some(4.0)), (2.0, Some(3.0)), (4.0, Some(2.0))];
        assert!(is_at_edge(&high));
        assert_eq!(next(2.0, &high), Some(8.0));
        let inside = [(1.0, Some(2.5)), (2.0, Some(2.0)), (4.0, Some(3.0))];
        assert!(!is_at_edge(&inside));
        assert_eq!(next(2.0, &inside), Some(1.414), "the lower neighbour is the better one");
        let closer = [inside[0], (1.414, Some(2.1)), inside[1], inside[2]];
        assert_eq!(next(2.0, &closer), Some(2.828), "the upper neighbour is farther");
    }

    #[test]
    fn failures_bound_a_search() {
        let diverged = [(1.0, Some(2.5)), (2.0, Some(2.0)), (4.0, None)];
        assert_eq!((best(&diverged), is_at_edge(&diverged)), (Some(1), false));
        assert_eq!(next(2.0, &diverged), Some(1.414));
        let hopeless = [(1.0, None), (2.0, None)];
        assert!(is_at_edge(&hopeless));
        assert_eq!((best(&hopeless), next(2.0, &hopeless)), (None, Some(0.5)));
    }

    #[test]
    fn nothing_is_tried_twice() {
        assert_eq!(next(1.0001, &[(1.0, Some(2.0)), (1.0001, Some(1.0)), (1.0002, Some(3.0))]), None);
    }
}
