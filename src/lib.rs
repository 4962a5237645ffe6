//! MBLM: Multiscale Byte Language Models. This crate gathers the library: the core, the built-in blocks and training.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub use mblm_blocks as blocks;
pub use mblm_core::*;
pub use mblm_system as system;
pub use mblm_train as train;
pub use mblm_yaml as yaml;
