//! Kernels for NVIDIA cards, for what costs most there: one kernel where the composition is many. Their source is
//! `kernels.cu`, which the driver's compiler turns into code for the card when the first one runs.

mod launch;
pub mod memory;
pub mod ops;

pub use launch::available;
