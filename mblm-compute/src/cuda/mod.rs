//! Kernels for NVIDIA cards, for what costs most there: one kernel where the composition is many. Each op has the shapes and
//! the result of its composition. The source of the kernels is `kernels.cu` and `selective_scan.cu`, which NVRTC compiles
//! for the card when the first one runs.

mod adam;
mod attention;
mod conv1d;
mod cross_entropy;
mod dropout;
mod launch;
mod linear;
pub mod memory;
mod norms;
mod selective_scan;
mod sums;
#[cfg(test)]
mod tests;

pub use adam::adam;
pub use attention::Attention;
pub use conv1d::conv1d_silu;
pub use cross_entropy::cross_entropy;
pub use dropout::dropout_factors;
pub use launch::available;
pub use linear::{add_to_rows, bias_gelu, linear};
pub(crate) use memory::take;
pub use norms::{layer_norm, rms_norm};
pub use selective_scan::{selective_scan, ssd};
pub use sums::{column_sums, sums};
