//! Steps that follow one another, each cut into parts that run side by side: a recurrence whose units are spread over
//! the threads. All steps run in one parallel region, for waking the pool at each would cost as much as the step.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mblm_sdk::parallel::{MIN_PARALLEL, for_rows};

/// How often a thread looks again before it offers its core to others: a few microseconds.
const SPINS: usize = 500;

/// Calls `work(step, part)` once for every part of every step; no step starts before all parts of the last are done.
///
/// Each thread looks after a part of its own and then takes those that nobody has begun. So it needs no number of
/// threads to get ahead: a busy pool makes it slower, and never hangs.
pub(crate) fn lockstep(parts: usize, steps: usize, work: impl Fn(usize, usize) + Sync) {
    let progress = Progress {
        begun: (0..parts).map(|_| AtomicUsize::new(0)).collect(),
        done: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
    };
    for_rows(parts, MIN_PARALLEL, |own| own.for_each(|part| progress.take_part(part, steps, &work)));
}

struct Progress {
    /// Per part, the number of steps in which somebody has begun it.
    begun: Vec<AtomicUsize>,
    /// Parts that are done, over all steps.
    done: AtomicUsize,
    failed: AtomicBool,
}

impl Progress {
    fn take_part(&self, own: usize, steps: usize, work: &impl Fn(usize, usize)) {
        let parts = self.begun.len();
        for step in 0..steps {
            for part in (own..parts).chain(0..own) {
                // Whoever is first has the part. What it reads was published by `done`.
                let begun = &self.begun[part];
                if begun.compare_exchange(step, step + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                    let alarm = Alarm(&self.failed);
                    work(step, part);
                    std::mem::forget(alarm);
                    self.done.fetch_add(1, Ordering::AcqRel);
                }
            }
            if !self.wait((step + 1) * parts) {
                return;
            }
        }
    }

    /// Waits until that many parts are done; false if they never will be.
    fn wait(&self, parts: usize) -> bool {
        let mut spins = 0;
        while self.done.load(Ordering::Acquire) < parts {
            if self.failed.load(Ordering::Relaxed) {
                return false;
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        true
    }
}

/// Raised if `work` panics, so that nobody waits for it.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_part_runs_once_and_after_the_last_step() {
        for parts in [1, 2, 7] {
            let steps = 1000;
            // Two rows that the steps fill in turn, each from the sum of the other: wrong if a part is early or late.
            let rows: Vec<Vec<AtomicU64>> = (0..2).map(|_| (0..parts).map(|_| AtomicU64::new(1)).collect()).collect();
            lockstep(parts, steps, |step, part| {
                let sum = rows[step % 2].iter().fold(0u64, |s, v| s.wrapping_add(v.load(Ordering::Relaxed)));
                let mixed = sum.wrapping_mul(31).wrapping_add(part as u64);
                // Parts of different lengths, long enough for other threads to join in.
                (0..100 * (part + 1)).for_each(|_| std::hint::spin_loop());
                rows[(step + 1) % 2][part].store(mixed, Ordering::Relaxed);
            });
            let mut want = vec![1u64; parts];
            for _ in 0..steps {
                let sum = want.iter().fold(0u64, |s, v| s.wrapping_add(*v));
                want = (0..parts as u64).map(|part| sum.wrapping_mul(31).wrapping_add(part)).collect();
            }
            let got: Vec<u64> = rows[steps % 2].iter().map(|v| v.load(Ordering::Relaxed)).collect();
            assert_eq!(got, want, "{parts} parts");
        }
    }

    #[test]
    fn many_at_once_do_not_starve_each_other() {
        let count = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    lockstep(4, 200, |_, _| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                });
            }
        });
        assert_eq!(count.into_inner(), 8 * 4 * 200);
    }

    #[test]
    #[should_panic(expected = "step 5")]
    fn a_panic_reaches_the_caller() {
        lockstep(4, 100, |step, part| assert!((step, part) != (5, 1), "step 5"));
    }
}
