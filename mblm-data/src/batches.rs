//! Batches of sequences, and the place in them at which a run stands.

use mblm_base::random::mix;
use serde::{Deserialize, Serialize};

use crate::dataset::Dataset;
use crate::error::Result;
use crate::order::Permutation;

/// One batch.
pub struct Batch {
    /// `(B, L)`
    pub ids: Vec<u32>,
    /// The weight of each position's loss, `(B, L)`, if the data set has one.
    pub loss_mask: Option<Vec<f32>>,
    /// `L`
    pub seq_len: usize,
}

/// Which batch comes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Passes over the data before this one.
    pub epoch: u64,
    /// Batches of this epoch that were taken.
    pub batch: u64,
}

/// How a split is cut into batches.
pub struct Batches {
    /// The split.
    pub dataset: Box<dyn Dataset>,
    /// `B`.
    pub batch_size: usize,
    /// `L`.
    pub seq_len: usize,
    /// The seed of a random order, another one in each epoch; `None` keeps the order.
    pub shuffle: Option<u64>,
    /// Whether sequences that do not fill a batch are left out, or make a smaller one.
    pub drop_last: bool,
}

impl Batches {
    /// The number of batches in epoch `epoch`.
    pub fn num_batches(&self, epoch: u64) -> u64 {
        let (sequences, size) = (self.dataset.num_sequences(epoch), self.batch_size as u64);
        if self.drop_last { sequences / size } else { sequences.div_ceil(size) }
    }

    /// How many batches of the first epoch are read if it is to be no more than `most`; 0 is no limit either.
    pub fn first(&self, most: Option<usize>) -> u64 {
        let available = self.num_batches(0);
        most.filter(|&most| most > 0).map_or(available, |most| available.min(most as u64))
    }

    /// Reads a batch. Panics if the epoch has no such batch.
    pub fn read(&self, at: Cursor) -> Result<Batch> {
        let sequences = self.dataset.num_sequences(at.epoch);
        let first = at.batch * self.batch_size as u64;
        let rows = (sequences - first).min(self.batch_size as u64) as usize;
        let order = self.shuffle.map(|seed| Permutation::new(sequences, mix(seed) ^ at.epoch));
        let mut ids = vec![0; rows * self.seq_len];
        let mask_len = if self.dataset.has_loss_mask() { self.seq_len } else { 0 };
        let mut mask = vec![0.0; rows * mask_len];
        for row in 0..rows {
            let index = first + row as u64;
            let index = order.map_or(index, |order| order.at(index));
            let ids = &mut ids[row * self.seq_len..(row + 1) * self.seq_len];
            self.dataset.sample(at.epoch, index, ids, &mut mask[row * mask_len..(row + 1) * mask_len])?;
        }
        Ok(Batch { ids, loss_mask: (mask_len > 0).then_some(mask), seq_len: self.seq_len })
    }

    /// The place after `at`: the next batch, or the start of the next epoch that has any. Only for a split of which
    /// some epoch has a batch.
    pub fn after(&self, at: Cursor) -> Cursor {
        let mut next = Cursor { batch: at.batch + 1, ..at };
        while next.batch >= self.num_batches(next.epoch) {
            next = Cursor { epoch: next.epoch + 1, batch: 0 };
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sequence i of epoch e is `[e, i]`, five of them in even epochs and four in odd ones.
    struct Counting {
        masked: bool,
    }

    impl Dataset for Counting {
        fn num_sequences(&self, epoch: u64) -> u64 {
            5 - epoch % 2
        }
        fn sample(&self, epoch: u64, index: u64, ids: &mut [u32], loss_mask: &mut [f32]) -> Result<()> {
            ids.copy_from_slice(&[epoch as u32, index as u32]);
            loss_mask.fill(index as f32);
            Ok(())
        }
        fn has_loss_mask(&self) -> bool {
            self.masked
        }
    }

    fn batches(batch_size: usize, shuffle: Option<u64>, drop_last: bool) -> Batches {
        Batches { dataset: Box::new(Counting { masked: false }), batch_size, seq_len: 2, shuffle, drop_last }
    }

    fn indices(batches: &Batches, epoch: u64) -> Vec<u32> {
        let read = |batch| batches.read(Cursor { epoch, batch }).unwrap().ids;
        (0..batches.num_batches(epoch)).flat_map(read).skip(1).step_by(2).collect()
    }

    #[test]
    fn the_last_batch_is_dropped_or_smaller() {
        assert_eq!(indices(&batches(2, None, true), 0), [0, 1, 2, 3]);
        let all = batches(2, None, false);
        assert_eq!(indices(&all, 0), [0, 1, 2, 3, 4]);
        assert_eq!(all.read(Cursor { epoch: 0, batch: 2 }).unwrap().ids.len(), 2);
    }

    #[test]
    fn a_shuffled_epoch_has_every_sequence_in_an_order_of_its_own() {
        let shuffled = batches(1, Some(1), true);
        let orders: Vec<Vec<u32>> = (0..8).map(|i| indices(&shuffled, 2 * i)).collect();
        for order in &orders {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
        }
        assert!(orders.iter().any(|order| order != &orders[0]));
        assert_eq!(orders[3], indices(&batches(1, Some(1), true), 6), "an order can be had again");
    }

    #[test]
    fn the_cursor_passes_over_epochs_without_batches() {
        let five = batches(5, None, true);
        assert_eq!(five.after(Cursor::default()), Cursor { epoch: 2, batch: 0 }, "epoch 1 has only four sequences");
        let two = batches(2, None, true);
        assert_eq!(two.after(Cursor::default()), Cursor { epoch: 0, batch: 1 });
        assert_eq!(two.after(Cursor { epoch: 0, batch: 1 }), Cursor { epoch: 1, batch: 0 });
    }

    #[test]
    fn a_loss_mask_comes_along_only_where_there_is_one() {
        let plain = batches(2, None, true);
        assert!(plain.read(Cursor::default()).unwrap().loss_mask.is_none());
        let masked = Batches { dataset: Box::new(Counting { masked: true }), ..plain };
        let mask = masked.read(Cursor { epoch: 0, batch: 1 }).unwrap().loss_mask.unwrap();
        assert_eq!(mask, [2.0, 2.0, 3.0, 3.0]);
    }
}
