//! The precision of matrix products: `f32`, or bfloat16 operands with sums in `f32`.

use std::cell::Cell;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operands of a matrix product are rounded to. Sums, and everything between products, are `f32` always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// To bfloat16: 8 bits of mantissa, the exponents of `f32`.
    Bf16,
}

impl Precision {
    /// Whether this machine has instructions for it.
    pub fn is_available(self) -> bool {
        // The tests of this crate have a portable form of the kernels.
        cfg!(test) || self.has_instructions()
    }

    pub(super) fn has_instructions(self) -> bool {
        match self {
            Precision::F32 => true,
            #[cfg(target_arch = "x86_64")]
            Precision::Bf16 => super::bf16::available(),
            #[cfg(not(target_arch = "x86_64"))]
            Precision::Bf16 => false,
        }
    }
}

thread_local! {
    static CURRENT: Cell<Precision> = const { Cell::new(Precision::F32) };
}

/// The precision of [`autocast`] around this call, for this machine's processor: `f32` if it has no instructions for the
/// other, as where a model lies on a GPU that has.
pub(crate) fn current() -> Precision {
    Some(requested()).filter(|precision| precision.is_available()).unwrap_or_default()
}

/// The precision of [`autocast`] around this call, for a device or for threads that work for this one.
pub fn requested() -> Precision {
    CURRENT.get()
}

/// Runs `work`, with the matrix products that it hands to the whole pool in `precision` (as `torch.autocast` does), and
/// those of attention over many keys. A processor without the instructions computes in `f32`: see
/// [`Precision::is_available`].
pub fn autocast<R>(precision: Precision, work: impl FnOnce() -> R) -> R {
    let _restore = Restore(CURRENT.replace(precision));
    work()
}

/// Ends the scope, also when it panics.
struct Restore(Precision);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}
