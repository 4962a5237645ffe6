//! The built-in stage blocks of MBLM.
#![warn(missing_docs)]

pub mod mamba1;
pub mod mamba2;
pub mod transformer;
