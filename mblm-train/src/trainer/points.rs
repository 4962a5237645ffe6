//! The batches at which a run logs or validates. There is no table of them: a run may have any number of batches.

use std::ops::Range;

/// Batches of a run, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Points {
    /// As many as `amount`, but not more than `total`, spread evenly over `start..start + total`, the first and the last
    /// among them; 1 gives the first batch alone.
    ///
    /// The same numbers as the reference package's `torch.linspace(start, start + total - 1, amount).long()`, single
    /// precision included.
    Spread {
        /// Batches in all.
        total: u64,
        /// The first of them.
        start: u64,
        /// How many points.
        amount: u64,
    },
    /// The last of every so many; at least one.
    Every(u64),
}

impl Points {
    /// Whether `batch` is one of them.
    pub fn contains(&self, batch: u64) -> bool {
        self.any_in(batch..batch.saturating_add(1))
    }

    /// Whether one of them lies in `range`.
    pub fn any_in(&self, range: Range<u64>) -> bool {
        match *self {
            Points::Every(every) => range.start / every < range.end / every,
            Points::Spread { total, start, amount } => {
                let amount = amount.min(total);
                // The second half is counted from the end, and rounding may let it begin before the first one ends.
                let halves = if amount == 1 { [0..1, 1..1] } else { [0..amount / 2, amount / 2..amount] };
                halves.into_iter().any(|half| {
                    let first = first_from(half.clone(), |i| spread(total, start, amount, i) >= range.start);
                    first < half.end && spread(total, start, amount, first) < range.end
                })
            }
        }
    }
}

/// Point `i` of `amount`.
fn spread(total: u64, start: u64, amount: u64, i: u64) -> u64 {
    let (first, last) = (start as f32, (start + total - 1) as f32);
    let step = (last - first) / (amount.max(2) - 1) as f32;
    let point =
        if amount == 1 || i < amount / 2 { first + step * i as f32 } else { last - step * (amount - 1 - i) as f32 };
    point as u64
}

/// The first number of `range` that `is_behind`, as all after it are; the end if none is.
fn first_from(range: Range<u64>, is_behind: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low + (high - low) / 2;
        if is_behind(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Deserialize)]
    struct Golden {
        logging_points: Vec<GoldenPoints>,
    }

    #[derive(serde::Deserialize)]
    struct GoldenPoints {
        total: u64,
        start: u64,
        amount: u64,
        indices: Vec<u64>,
    }

    fn listed(points: Points, range: Range<u64>) -> Vec<u64> {
        range.filter(|&batch| points.contains(batch)).collect()
    }

    #[test]
    fn points_are_the_packages() {
        let golden: Golden = serde_json::from_str(include_str!("../../../tests/golden/schedule.json")).unwrap();
        assert_eq!(golden.logging_points.len(), 3);
        for GoldenPoints { total, start, amount, mut indices } in golden.logging_points {
            indices.dedup();
            assert_eq!(listed(Points::Spread { total, start, amount }, 0..start + total + 5), indices);
        }
    }

    #[test]
    fn points_of_few_batches() {
        let spread = |total, start, amount| listed(Points::Spread { total, start, amount }, 0..20);
        assert_eq!(spread(3, 0, 10), [0, 1, 2]);
        assert_eq!(spread(5, 2, 1), [2]);
        assert_eq!(spread(5, 2, 0), [0; 0]);
        assert_eq!(listed(Points::Every(3), 0..10), [2, 5, 8]);
        assert_eq!(listed(Points::Every(u64::MAX), 0..10), [0; 0]);
    }

    #[test]
    fn each_of_a_million_points_is_found_and_no_other() {
        let (total, amount) = (1_000_003, 70_001);
        let points = Points::Spread { total, start: 0, amount };
        let mut want: Vec<u64> = (0..amount).map(|i| spread(total, 0, amount, i)).collect();
        want.sort_unstable();
        want.dedup();
        assert_eq!(listed(points, 0..total), want);
        assert!(!points.any_in(want[100] + 1..want[101]) && points.any_in(want[100] + 1..want[101] + 1));
    }

    #[test]
    fn any_number_of_batches_costs_no_memory() {
        let total = 1_000_000_000_000;
        let (every, spread) = (Points::Every(1), Points::Spread { total, start: 0, amount: total });
        assert!(every.contains(total - 1) && every.contains(total / 3));
        assert!(spread.contains(0) && spread.contains(1 << 30) && !Points::Every(2).any_in(4..5));
    }
}
