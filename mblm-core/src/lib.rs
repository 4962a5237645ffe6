//! The core of MBLM: a byte sequence is cut into patches of patches, and each level of that hierarchy, a *stage*, is
//! run by a block of its own.
//!
//! Shape letters: `B` batch, `L` bytes, `P_n` sequence length of stage n, `D_n` its width, `V` vocabulary.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod config;
pub mod generate;
pub mod model;
pub mod plugin;
pub mod registry;
pub mod schema;

#[doc(no_inline)]
pub use mblm_sdk::*;
