//! What MBLM computes with: parameters and their gradients, fused layers as nodes of candle's graph, matrix products,
//! SIMD and threads.
//!
//! Shape letters: `B` batch, `S` positions, `D` width, `E` inner width, `N` state, `H` heads, `V` vocabulary.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod backward;
pub mod buffer;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod error;
pub mod gemm;
pub mod layer;
pub mod mode;
pub mod nn;
pub mod node;
pub mod ops;
pub mod parallel;
pub mod param;
pub mod rows;
pub mod simd;
pub mod testing;
pub mod transfer;

pub use error::{Error, Result};
