//! The buffer that backward passes add a parameter's gradient to: its own memory, or a host's for the length of a call.

use std::ops::{Deref, DerefMut};

/// The memory of an accumulated gradient: a parameter's own, or a host's for the length of a call.
#[derive(Debug, Default)]
pub struct Gradient {
    own: Vec<f32>,
    lent: Option<Lent>,
}

impl Gradient {
    /// Zeros for `len` elements, unless there is memory already.
    pub(super) fn allocate(&mut self, len: usize) {
        if self.is_empty() {
            self.own.resize(len, 0.0);
        }
    }

    /// Uses `memory` until [`end_loan`](Self::end_loan).
    ///
    /// # Safety
    /// `memory` must outlive the loan, and nothing else may access it meanwhile.
    pub(super) unsafe fn lend(&mut self, memory: &mut [f32]) {
        self.lent = Some(Lent(memory));
    }

    pub(super) fn end_loan(&mut self) {
        self.lent = None;
    }
}

#[derive(Clone, Copy, Debug)]
struct Lent(*mut [f32]);

// SAFETY: whoever lends has the only borrow of that memory, and gives it to whoever holds the gradient's lock.
unsafe impl Send for Lent {}

impl Deref for Gradient {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self.lent {
            // SAFETY: borrowed for as long as it is lent, by the contract of `lend`.
            Some(Lent(memory)) => unsafe { &*memory },
            None => &self.own,
        }
    }
}

impl DerefMut for Gradient {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self.lent {
            // SAFETY: as above; the lock makes this the only access.
            Some(Lent(memory)) => unsafe { &mut *memory },
            None => &mut self.own,
        }
    }
}
