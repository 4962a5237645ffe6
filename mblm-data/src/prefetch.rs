//! The next batch is read while the model computes on this one.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::batches::{Batch, Batches, Cursor};
use crate::error::Result;

/// Between two looks at a reader that is not ready.
const IDLE: Duration = Duration::from_micros(50);

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
            Some((ready, reader)) if ready == at => wait_for(reader),
            _ => self.batches.read(at),
        };
        let (batches, next) = (self.batches.clone(), self.batches.after(at));
        self.ahead = Some((next, std::thread::spawn(move || batches.read(next))));
        batch
    }
}

/// Waits for a reader. A thread of the pool does the pool's work meanwhile: the reader may need the pool, and this may be its
/// only thread.
fn wait_for(reader: JoinHandle<Result<Batch>>) -> Result<Batch> {
    while !reader.is_finished() {
        match rayon::yield_now() {
            Some(rayon::Yield::Executed) => {}
            Some(rayon::Yield::Idle) => std::thread::sleep(IDLE),
            // No thread of the pool.
            None => break,
        }
    }
    match reader.join() {
        Ok(batch) => batch,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

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

    /// Its samples need the pool of threads.
    struct InParallel;

    impl Dataset for InParallel {
        fn num_sequences(&self, _: u64) -> u64 {
            6
        }
        fn sample(&self, _: u64, index: u64, ids: &mut [u32], _: &mut [f32]) -> Result<()> {
            ids.par_iter_mut().for_each(|id| *id = index as u32);
            Ok(())
        }
    }

    #[test]
    fn readers_may_need_the_only_thread_of_the_pool() {
        let (done, is_done) = std::sync::mpsc::channel();
        let work = move || {
            // Jobs of the reader go to the global pool: all of its threads wait for one.
            rayon::broadcast(|_| {
                let batches = Batches {
                    dataset: Box::new(InParallel),
                    batch_size: 1,
                    seq_len: 1000,
                    shuffle: None,
                    drop_last: true,
                };
                let mut prefetch = Prefetch::new(Arc::new(batches));
                for batch in 0..6 {
                    assert_eq!(prefetch.take(Cursor { epoch: 0, batch }).unwrap().ids, [batch as u32; 1000]);
                }
            });
            done.send(()).unwrap();
        };
        std::thread::spawn(work);
        is_done.recv_timeout(Duration::from_secs(60)).expect("the threads wait for each other");
    }
}
