//! Running a kernel in the precision that is asked for, with the best instructions of this machine.

use super::arithmetic::WithArithmetic;
#[cfg(target_arch = "x86_64")]
use super::bf16;
use super::floats::InFloats;
use super::precision::Precision;
use crate::simd;

/// Runs `work` in `precision` with the best instructions of this machine.
pub(crate) fn dispatch(precision: Precision, work: impl WithArithmetic) {
    match precision {
        Precision::F32 => simd::dispatch(InFloats(work)),
        #[cfg(test)]
        Precision::Bf16 if !precision.has_instructions() => super::portable::dispatch(work),
        #[cfg(target_arch = "x86_64")]
        Precision::Bf16 => bf16::dispatch(work),
        #[cfg(not(target_arch = "x86_64"))]
        Precision::Bf16 => unreachable!("`autocast` refuses what this machine does not have"),
    }
}
