//! The share of a data set that one of several processes trains on: all shares are of one size, and none overlaps another.
//!
//! As in the reference package, they are consecutive parts of the data: of the bytes where these are one run that is cut
//! into sequences, and else of the sequences. What is left over at the end belongs to nobody.

use std::ops::Range;

use crate::dataset::Dataset;
pub use crate::dataset::Share;
use crate::error::Result;

/// The part of `dataset` that is `share`.
pub fn share(dataset: Box<dyn Dataset>, share: Share) -> Box<dyn Dataset> {
    match share.size {
        1 => dataset,
        _ => dataset.share(share).unwrap_or_else(|| Box::new(Sequences { dataset, share })),
    }
}

/// A part of the sequences of every epoch.
struct Sequences {
    dataset: Box<dyn Dataset>,
    share: Share,
}

impl Sequences {
    fn range(&self, epoch: u64) -> Range<u64> {
        self.share.range(self.dataset.num_sequences(epoch))
    }
}

impl Dataset for Sequences {
    fn num_sequences(&self, epoch: u64) -> u64 {
        let range = self.range(epoch);
        range.end - range.start
    }

    fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], loss_mask: &mut [f32]) -> Result<()> {
        self.dataset.sample(epoch, self.range(epoch).start + index, ids, loss_mask)
    }

    fn has_loss_mask(&self) -> bool {
        self.dataset.has_loss_mask()
    }

    fn mean_len(&self) -> Option<f64> {
        self.dataset.mean_len()
    }

    fn byte_counts(&self) -> Result<Option<[u64; 256]>> {
        self.dataset.byte_counts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequence i of epoch e is `[e, i]`, eleven of them in even epochs and nine in odd ones.
    struct Counting;

    impl Dataset for Counting {
        fn num_sequences(&self, epoch: u64) -> u64 {
            11 - 2 * (epoch % 2)
        }
        fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], _: &mut [f32]) -> Result<()> {
            ids.copy_from_slice(&[epoch as u32, index as u32]);
            Ok(())
        }
    }

    fn sequences(rank: usize, size: usize, epoch: u64) -> Vec<u32> {
        let part = share(Box::new(Counting), Share { rank, size });
        let read = |index| {
            let mut ids = [0; 2];
            part.sample(epoch, index, &mut ids, &mut []).unwrap();
            assert_eq!(ids[0], epoch as u32);
            ids[1]
        };
        (0..part.num_sequences(epoch)).map(read).collect()
    }

    #[test]
    fn shares_are_consecutive_and_equal() {
        assert_eq!([0, 1, 2].map(|rank| sequences(rank, 3, 0)), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]);
        assert_eq!([0, 1].map(|rank| sequences(rank, 2, 1)), [[0, 1, 2, 3], [4, 5, 6, 7]]);
        assert_eq!(sequences(0, 1, 0).len(), 11);
        assert_eq!(sequences(11, 12, 0).len(), 0, "more processes than sequences");
    }
}
