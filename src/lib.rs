//! MBLM: Multiscale Byte Language Models. This crate re-exports the library: the core, the built-in blocks, data sets,
//! training and studies.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub use mblm_base as base;
pub use mblm_blocks as blocks;
pub use mblm_core::*;
pub use mblm_data as data;
pub use mblm_pth as pth;
pub use mblm_study as study;
pub use mblm_train as train;
pub use mblm_yaml as yaml;
