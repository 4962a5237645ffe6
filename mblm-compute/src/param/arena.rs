//! One flat piece of memory for the gradients of all parameters.

use std::cell::UnsafeCell;
use std::ops::Range;

/// The memory. Each parameter's gradient has a range of it, which its lock guards.
#[derive(Debug)]
pub(super) struct Arena(UnsafeCell<Box<[f32]>>);

// SAFETY: whoever reads or writes a range holds the lock of its gradient, by the contract of the two functions.
unsafe impl Sync for Arena {}

impl Arena {
    pub fn new(len: usize) -> Self {
        Arena(UnsafeCell::new(vec![0.0; len].into()))
    }

    /// # Safety
    /// The caller holds the locks of all gradients in `range`.
    pub unsafe fn part(&self, range: Range<usize>) -> &[f32] {
        // SAFETY: no `part_mut` overlaps while the locks are held; the memory does not move.
        unsafe { std::slice::from_raw_parts((*self.0.get()).as_ptr().add(range.start), range.len()) }
    }

    /// # Safety
    /// The caller holds the locks of all gradients in `range`, and uses no other slice of it meanwhile.
    #[expect(clippy::mut_from_ref, reason = "the locks are the borrows")]
    pub unsafe fn part_mut(&self, range: Range<usize>) -> &mut [f32] {
        // SAFETY: this is the only access while the locks are held; the memory does not move.
        unsafe { std::slice::from_raw_parts_mut((*self.0.get()).as_mut_ptr().add(range.start), range.len()) }
    }
}
