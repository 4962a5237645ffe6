//! The next batch is read while the model computes on this one.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::batches::{Batch, Batches, Cursor};
use crate::error::Result;

/// Reads batches one ahead, on a thread of its own.
pub struct Prefetch {
    batches: Arc<Batches>,
    ahead: Option<(Cursor, JoinHandle<Result<Batch>>)>,
}

impl Prefetch {
    /// Reads from `batches`.
    pub fn new(batches: Arc<Batches>) -> Self {
        Prefetch { batches, ahead: None }
    }

    /// The batch at `at`; the one after it is begun.
    pub fn take(&mut self, at: Cursor) -> Result<Batch> {
        let batch = match self.ahead.take() {
            Some((ready, reader)) if ready == at => match reader.join() {
                Ok(batch) => batch,
                Err(panic) => std::panic::resume_unwind(panic),
            },
            _ => self.batches.read(at),
        };
        let (batches, next) = (self.batches.clone(), self.batches.after(at));
        self.ahead = Some((next, std::thread::spawn(move || batches.read(next))));
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Dataset;
    use crate::error::Error;

    /// Sequence i is `[i]`; number 4 cannot be read.
    struct Numbers;

    impl Dataset for Numbers {
        fn num_sequences(&self, _: u64) -> u64 {
            6
        }
        fn sample(&self, _: u64, index: u64, ids: &mut [u32], _: &mut [f32]) -> Result<()> {
            ids[0] = index as u32;
            if index == 4 { Err(Error::Config("number 4 is gone".into())) } else { Ok(()) }
        }
    }

    #[test]
    fn batches_come_in_any_order_that_is_asked_for() {
        let batches = Batches { dataset: Box::new(Numbers), batch_size: 1, seq_len: 1, shuffle: None, drop_last: true };
        let mut prefetch = Prefetch::new(Arc::new(batches));
        for batch in [0, 1, 2, 5, 0, 1] {
            let read = prefetch.take(Cursor { epoch: 0, batch }).unwrap();
            assert_eq!(read.ids, [batch as u32]);
        }
        prefetch.take(Cursor { epoch: 0, batch: 3 }).unwrap();
        let error = prefetch.take(Cursor { epoch: 0, batch: 4 }).err().unwrap().to_string();
        assert!(error.contains("number 4 is gone"), "{error}");
    }
}
