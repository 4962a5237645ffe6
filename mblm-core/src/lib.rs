//! The core of MBLM: a byte sequence is cut into patches of patches, and each level of that hierarchy, a *stage*, is
//! run by a block of its own.
//!
//! Shape letters: `B` batch, `L` bytes, `P_n` sequence length of stage n, `D_n` its width, `V` vocabulary.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod block;
pub mod buffer;
pub mod config;
pub mod error;
pub mod gemm;
pub mod generate;
pub mod layer;
pub mod mode;
pub mod model;
pub mod node;
pub mod ops;
pub mod parallel;
pub mod param;
pub mod plugin;
mod recompute;
pub mod registry;
pub mod rows;
pub mod schema;
pub mod simd;
pub mod testing;

pub use block::{PosEmb, StageBlock, StageDecoder, StageModel};
pub use error::{Error, Result};
pub use mode::Mode;
pub use param::{Init, Param, ParamScope, ParamStore};
#[doc(hidden)]
pub use {inventory, schemars, serde_json, typetag};
