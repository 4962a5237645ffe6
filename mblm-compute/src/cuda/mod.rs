//! Kernels for NVIDIA cards, for what costs most there: one kernel where the composition is many. Their source is
//! `kernels.cu` and `selective_scan.cu`, which NVRTC compiles for the card when the first one runs.

mod launch;
pub mod memory;
pub mod ops;
mod selective_scan;
#[cfg(test)]
mod tests;

pub use launch::available;
pub(crate) use memory::take;
