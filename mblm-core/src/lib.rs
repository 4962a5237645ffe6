//! The core of MBLM. A byte sequence is cut into patches, and patches into larger patches. Each level of this
//! hierarchy, a *stage*, runs its own block.
//!
//! Shape letters: `B` batch, `L` bytes, `P_n` sequence length of stage n, `D_n` its width, `V` vocabulary.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod config;
pub mod generate;
pub mod model;
pub mod patching;
pub mod plugin;
pub mod registry;
pub mod schema;

#[doc(no_inline)]
pub use mblm_sdk::*;
