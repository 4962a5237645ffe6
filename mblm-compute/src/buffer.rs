//! Reused scratch memory. Page faults make a new large `Vec` several times as expensive as a reused one, so fused
//! layers take their temporaries and tapes from a pool and return them when dropped.
//!
//! Two rules bound the pool where lengths vary, as they do in generation and evaluation. Capacities come in steps of an
//! eighth, so that a length that grows by one each time seldom needs a new buffer. And the pool keeps at most
//! twice the memory that was in use at once: what was returned longest ago is freed first.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

static POOL: Mutex<Pool> = Mutex::new(Pool::new());
static POISON: AtomicBool = AtomicBool::new(false);

/// Idle and used floats together, at most, relative to the most used at once. A training step settles well below it, since
/// its sizes come back in every step.
const SLACK: usize = 2;
/// Floats that are always worth keeping.
const SMALL_POOL: usize = 256 * 1024;
/// The smallest step between two capacities, in floats.
const SMALLEST_STEP: usize = 256;

/// From now on every buffer arrives filled with NaN, so that a kernel that reads what it did not write fails its test.
pub fn poison_buffers() {
    POISON.store(true, Ordering::Relaxed);
}

/// Frees every buffer that is not in use, and forgets how much was used at once.
pub fn release_unused() {
    let mut pool = pool();
    pool.peak = pool.used;
    pool.idle_floats = 0;
    pool.idle.clear();
}

/// Bytes of all buffers, in use or kept for the next user.
pub fn held_bytes() -> usize {
    pool().floats() * size_of::<f32>()
}

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The buffers that nobody uses, and how much is in use.
struct Pool {
    /// By capacity; of one capacity in the order of their return.
    idle: BTreeMap<usize, Vec<Idle>>,
    idle_floats: usize,
    used: usize,
    /// The most that was used at once.
    peak: usize,
    returns: u64,
}

struct Idle {
    data: Vec<f32>,
    /// How many buffers had been returned before it.
    returned: u64,
}

impl Pool {
    const fn new() -> Self {
        Pool { idle: BTreeMap::new(), idle_floats: 0, used: 0, peak: 0, returns: 0 }
    }

    fn floats(&self) -> usize {
        self.idle_floats + self.used
    }

    /// A vector of any length with room for `len` floats, and what must be freed for it.
    fn take(&mut self, len: usize) -> (Vec<f32>, Vec<Idle>) {
        let capacity = capacity(len);
        // The smallest that fits, and not one more than twice too large.
        let fit = self.idle.range(capacity..=2 * capacity).next().map(|(found, _)| *found);
        let found = fit.and_then(|found| self.remove(found, Vec::pop));
        let data = found.map_or_else(|| Vec::with_capacity(capacity), |idle| idle.data);
        self.used += data.capacity();
        self.peak = self.peak.max(self.used);
        (data, self.trim())
    }

    /// Takes a vector back, and tells what must be freed.
    fn give_back(&mut self, data: Vec<f32>) -> Vec<Idle> {
        let capacity = data.capacity();
        self.used -= capacity;
        self.idle_floats += capacity;
        self.idle.entry(capacity).or_default().push(Idle { data, returned: self.returns });
        self.returns += 1;
        self.trim()
    }

    /// Removes what was returned longest ago until the pool is within its bound.
    fn trim(&mut self) -> Vec<Idle> {
        let most = (SLACK * self.peak).max(SMALL_POOL);
        let mut freed = Vec::new();
        while self.floats() > most {
            let oldest = self.idle.iter().min_by_key(|(_, same)| same.first().map(|idle| idle.returned));
            let Some(capacity) = oldest.map(|(capacity, _)| *capacity) else { break };
            freed.extend(self.remove(capacity, |same| (!same.is_empty()).then(|| same.remove(0))));
        }
        freed
    }

    fn remove(&mut self, capacity: usize, which: impl FnOnce(&mut Vec<Idle>) -> Option<Idle>) -> Option<Idle> {
        let same = self.idle.get_mut(&capacity)?;
        let removed = which(same);
        if same.is_empty() {
            self.idle.remove(&capacity);
        }
        self.idle_floats -= removed.as_ref().map_or(0, |idle| idle.data.capacity());
        removed
    }
}

/// The next of eight steps between two powers of two.
fn capacity(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 16).max(SMALLEST_STEP))
}

/// A slice of `f32` from the pool. Its contents are arbitrary.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    /// Takes `len` floats with arbitrary (initialized) contents. Write before you read.
    pub fn take(len: usize) -> Self {
        if len == 0 {
            return Self::default();
        }
        // What is freed is freed without the lock.
        let (mut data, _freed) = pool().take(len);
        if POISON.load(Ordering::Relaxed) {
            data.clear();
            data.resize(len, f32::NAN);
        } else if data.len() < len {
            data.resize(len, 0.0);
        } else {
            data.truncate(len);
        }
        Buffer(data)
    }

    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::take(len);
        buffer.fill(0.0);
        buffer
    }

    /// The same floats so many times, one after another.
    pub fn repeated(&self, times: usize) -> Self {
        let mut buffer = Self::take(self.len() * times);
        buffer.chunks_exact_mut(self.len().max(1)).for_each(|part| part.copy_from_slice(self));
        buffer
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.capacity() > 0 {
            let _freed = pool().give_back(std::mem::take(&mut self.0));
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_reused_and_arrives_poisoned_in_tests() {
        poison_buffers();
        let len = 123_457;
        let mut first = Buffer::take(len);
        first.fill(1.0);
        let address = first.as_ptr();
        drop(first);
        let second = Buffer::take(len - 7);
        assert_eq!(second.as_ptr(), address);
        assert!(second.iter().all(|v| v.is_nan()), "a reader of stale contents must be caught");
    }

    /// Takes buffers of these lengths together and gives them back.
    fn round(pool: &mut Pool, lens: &[usize]) -> Vec<*const f32> {
        let taken: Vec<Vec<f32>> = lens.iter().map(|len| pool.take(*len).0).collect();
        let mut places: Vec<*const f32> = taken.iter().map(|data| data.as_ptr()).collect();
        places.sort();
        taken.into_iter().for_each(|data| drop(pool.give_back(data)));
        places
    }

    #[test]
    fn lengths_that_grow_do_not_pile_up() {
        let mut pool = Pool::new();
        let mut places = std::collections::BTreeSet::new();
        // Scores of 16 heads, one position more in each step of a generation.
        for positions in 1..=20_000 {
            places.extend(round(&mut pool, &[16 * positions, 64, 16 * positions]));
        }
        assert!(pool.peak < 2 * 16 * 20_000 * 9 / 8 + 3 * SMALLEST_STEP, "{}", pool.peak);
        assert!(pool.floats() <= SLACK * pool.peak, "{} of at most {}", pool.floats(), pool.peak);
        assert!(places.len() < 300, "{} different buffers for 60,000 uses", places.len());
    }

    #[test]
    fn lengths_without_order_stay_within_the_bound() {
        let mut pool = Pool::new();
        let mut len = 1;
        for _ in 0..5_000 {
            len = len * 75 % 1_000_003;
            round(&mut pool, &[len, len / 3 + 1]);
            assert!(pool.floats() <= SLACK * pool.peak.max(SMALL_POOL));
        }
        assert_eq!(pool.used, 0);
    }

    #[test]
    fn lengths_that_come_back_are_served_from_the_pool() {
        let mut pool = Pool::new();
        let sizes = [[3_000_000, 1_000_000, 500_000], [2_000_000, 900_000, 900_000], [4_000_000, 10, 10]];
        let step = |pool: &mut Pool| sizes.map(|lens| round(pool, &lens));
        step(&mut pool);
        let second = step(&mut pool);
        (0..10).for_each(|_| assert_eq!(step(&mut pool), second));
    }
}
