//! Random order without memory: a keyed permutation of `0..len` that gives any place on its own, so that a run can be
//! resumed anywhere and the data may have any size.

use mblm_base::random::mix;

/// More rounds than the four that make a Feistel network indistinguishable from a random permutation (Luby & Rackoff
/// 1988), since the round function is only a hash.
const ROUNDS: u64 = 6;

/// A permutation of `0..len`, decided by a key.
///
/// A Feistel network permutes `0..4^half_bits`, which is at most four times `len`; places outside `0..len` are
/// permuted on until they fall inside (cycle walking, Black & Rogaway 2002).
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The permutation of `0..len` that `key` decides.
    pub fn new(len: u64, key: u64) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Permutation { len, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// What stands at place `index`. Panics if `index` is not below the length.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.len, "place {index} of {}", self.len);
        let mut value = index;
        loop {
            value = self.network(value);
            if value < self.len {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            let hash = mix(right ^ mix(self.key.wrapping_add(round)));
            (left, right) = (right, left ^ (hash & mask));
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_taken_once() {
        for len in [1, 2, 3, 5, 16, 17, 1000, 4097] {
            let order = Permutation::new(len, 9);
            let mut seen: Vec<u64> = (0..len).map(|i| order.at(i)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_order_follows_the_key_and_looks_random() {
        let order = |key| (0..10_000).map(|i| Permutation::new(10_000, key).at(i)).collect::<Vec<u64>>();
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        // Of a random permutation, one place in expectation stays where it is, and neighbours keep their distance
        // once; the probability of more than ten is below 1e-8.
        let order = order(1);
        assert!(order.iter().enumerate().filter(|(i, value)| *i as u64 == **value).count() <= 10);
        assert!(order.windows(2).filter(|pair| pair[1] == pair[0] + 1).count() <= 10);
        // The mean distance of |order(i) - i| is a third of the length.
        let moved: f64 = order.iter().enumerate().map(|(i, v)| (i as f64 - *v as f64).abs()).sum::<f64>() / 1e8;
        assert!((moved - 1.0 / 3.0).abs() < 0.01, "{moved}");
    }

    #[test]
    fn the_longest_data_fits() {
        let order = Permutation::new(u64::MAX >> 1, 3);
        assert_ne!(order.at(0), order.at(1));
    }
}
