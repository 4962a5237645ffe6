//! Threads in place of processes, for tests of what all engines have in common.

use std::sync::{Barrier, Mutex};

use super::Processes;

/// What the threads share.
struct Meeting {
    barrier: Barrier,
    /// What each brings.
    brought: Mutex<Vec<Vec<u8>>>,
}

/// One of the threads.
struct Thread<'a> {
    rank: usize,
    size: usize,
    meeting: &'a Meeting,
}

/// Runs `work` in `size` threads, and returns what each found.
pub(crate) fn together<R: Send>(size: usize, work: impl Fn(&dyn Processes) -> R + Sync) -> Vec<R> {
    let meeting = Meeting { barrier: Barrier::new(size), brought: Mutex::new(vec![vec![]; size]) };
    std::thread::scope(|scope| {
        let (meeting, work) = (&meeting, &work);
        let start = |rank| scope.spawn(move || work(&Thread { rank, size, meeting }));
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Thread<'_> {
    /// Brings `mine`, and takes what all have brought.
    fn exchange(&self, mine: Vec<u8>) -> Vec<Vec<u8>> {
        self.meeting.brought.lock().unwrap()[self.rank] = mine;
        self.meeting.barrier.wait();
        let all = self.meeting.brought.lock().unwrap().clone();
        self.meeting.barrier.wait();
        all
    }
}

impl Processes for Thread<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn sum(&self, numbers: &mut [f64]) {
        let all = self.exchange(numbers.iter().flat_map(|x| x.to_le_bytes()).collect());
        numbers.fill(0.0);
        for of in all {
            assert_eq!(of.len(), 8 * numbers.len(), "all add up the same");
            for (sum, x) in numbers.iter_mut().zip(of.as_chunks::<8>().0) {
                *sum += f64::from_le_bytes(*x);
            }
        }
    }

    fn sum_gradients(&self, gradients: &mut [f32]) {
        let all = self.exchange(gradients.iter().flat_map(|x| x.to_le_bytes()).collect());
        gradients.fill(0.0);
        for of in all {
            assert_eq!(of.len(), 4 * gradients.len(), "all add up the same");
            for (sum, x) in gradients.iter_mut().zip(of.as_chunks::<4>().0) {
                *sum += f32::from_le_bytes(*x);
            }
        }
    }

    fn broadcast(&self, from: usize, bytes: &mut Vec<u8>) {
        *bytes = self.exchange(bytes.clone()).swap_remove(from);
    }
}
