//! The built-in stage blocks of MBLM.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod mamba1;
pub mod mamba2;
mod passes;
pub mod transformer;
