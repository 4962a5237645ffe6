//! The buffer that backward passes add a parameter's gradient to: its own memory, or a host's for the length of a call. The
//! gradient of a parameter on another device is a tensor there.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use super::arena::Arena;
use crate::error::Result;
use crate::parallel;
use crate::transfer;

/// The memory of an accumulated gradient: a parameter's own, or a host's for the length of a call.
#[derive(Debug, Default)]
pub struct Gradient {
    own: Own,
    lent: Option<Lent>,
    away: Option<Away>,
}

/// The memory that is a parameter's own.
#[derive(Debug)]
enum Own {
    /// By itself; empty as long as the parameter has no gradient.
    Alone(Vec<f32>),
    /// Among those of the other parameters.
    InArena {
        arena: Arc<Arena>,
        range: Range<usize>,
        /// Whether the parameter has a gradient.
        is_used: bool,
    },
}

impl Default for Own {
    fn default() -> Self {
        Own::Alone(Vec::new())
    }
}

/// A gradient that is no slice of this process.
#[derive(Debug)]
struct Away {
    sum: Tensor,
    /// What was read of it here.
    copy: OnceLock<Vec<f32>>,
}

impl Away {
    fn read(&self) -> Result<Vec<f32>> {
        transfer::to_vec(&self.sum)
    }
}

impl Gradient {
    /// Zeros for `len` elements, unless there is memory already.
    pub(super) fn allocate(&mut self, len: usize) {
        if self.is_empty() {
            match &mut self.own {
                Own::Alone(memory) => memory.resize(len, 0.0),
                Own::InArena { is_used, .. } => *is_used = true,
            }
        }
    }

    /// Moves into `range` of `arena`, which nobody else uses and which is zero; only once.
    pub(super) fn move_to(&mut self, arena: &Arc<Arena>, range: Range<usize>) {
        let Own::Alone(memory) = &mut self.own else { return };
        let memory = std::mem::take(memory);
        self.own = Own::InArena { arena: arena.clone(), range, is_used: !memory.is_empty() };
        self.own_mut().copy_from_slice(&memory);
    }

    fn own(&self) -> &[f32] {
        match &self.own {
            Own::Alone(memory) => memory,
            Own::InArena { is_used: false, .. } => &[],
            // SAFETY: the range is this gradient's alone, whose lock is held.
            Own::InArena { arena, range, .. } => unsafe { arena.part(range.clone()) },
        }
    }

    fn own_mut(&mut self) -> &mut [f32] {
        match &mut self.own {
            Own::Alone(memory) => memory,
            Own::InArena { is_used: false, .. } => &mut [],
            // SAFETY: as above; the lock makes this the only access.
            Own::InArena { arena, range, .. } => unsafe { arena.part_mut(range.clone()) },
        }
    }

    /// Whether something was added since the parameter was made; on another device than the CPU, since the last step.
    pub fn is_there(&self) -> bool {
        self.away.is_some() || !self.own().is_empty()
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

    /// Sets the gradient to zero. On another device than the CPU, where passes bring the memory, there is none then.
    pub fn clear(&mut self) {
        self.away = None;
        parallel::clear(self);
    }

    /// The gradient on its device, if the parameter lies on another one and has a gradient.
    pub fn tensor(&self) -> Option<&Tensor> {
        self.away.as_ref().map(|away| &away.sum)
    }

    /// Replaces the gradient of a parameter on another device.
    pub fn set_tensor(&mut self, sum: Tensor) {
        self.away = Some(Away { sum, copy: OnceLock::new() });
    }

    /// Adds to the gradient of a parameter on another device.
    pub(super) fn add_tensor(&mut self, grad: &Tensor) -> Result<()> {
        let sum = match self.tensor() {
            Some(sum) => (sum + grad)?,
            None => grad.contiguous()?.detach(),
        };
        self.set_tensor(sum);
        Ok(())
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
            None => match &self.away {
                // What cannot be read is no number, which every reader notices.
                Some(away) => {
                    away.copy.get_or_init(|| away.read().unwrap_or_else(|_| vec![f32::NAN; away.sum.elem_count()]))
                }
                None => self.own(),
            },
        }
    }
}

impl DerefMut for Gradient {
    fn deref_mut(&mut self) -> &mut [f32] {
        match self.lent {
            // SAFETY: as above; the lock makes this the only access.
            Some(Lent(memory)) => unsafe { &mut *memory },
            None => self.own_mut(),
        }
    }
}
