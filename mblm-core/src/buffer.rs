//! Reused scratch memory: a fresh large `Vec` costs several times a reused one in page faults, so the fused layers
//! take their temporaries and tapes from a pool and give them back when dropped.

use std::ops::{Deref, DerefMut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

static POOL: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());
static POISON: AtomicBool = AtomicBool::new(false);

/// From now on every buffer arrives filled with NaN, so that a kernel that reads what it did not write fails its test.
pub fn poison_buffers() {
    POISON.store(true, Ordering::Relaxed);
}

/// A slice of `f32` from the pool. Its contents are whatever its last user left.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    /// `len` floats of arbitrary (initialised) contents; whoever takes it must write before reading.
    pub fn take(len: usize) -> Self {
        let mut pool = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The smallest buffer that fits, and not one more than twice too large.
        let fit = (0..pool.len())
            .filter(|&i| pool[i].capacity() >= len && pool[i].capacity() / 2 <= len)
            .min_by_key(|&i| pool[i].capacity());
        let mut data = fit.map(|i| pool.swap_remove(i)).unwrap_or_default();
        drop(pool);
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
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.capacity() > 0 {
            let data = std::mem::take(&mut self.0);
            POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(data);
        }
    }
}

/// Frees every buffer that is not in use, for example between a training run and a long generation.
pub fn release_unused() {
    POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
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
}
