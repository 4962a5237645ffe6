//! Everything that you need to write a stage block: contracts, parameters, layers and fused ops, and the macro that
//! turns a `cdylib` of blocks into a plugin.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod abi;
pub mod block;
pub mod plugin;
pub mod registration;
pub mod testing;

pub use block::{PosEmb, StageBlock, StageDecoder, StageModel};
#[cfg(feature = "cuda")]
pub use mblm_compute::cuda;
pub use mblm_compute::error::{Error, Result};
pub use mblm_compute::mode::Mode;
pub use mblm_compute::param::{CandleModule, Init, Param, ParamScope, ParamStore};
pub use mblm_compute::{
    backward, buffer, device, error, gemm, layer, mode, nn, node, ops, parallel, param, rows, simd, transfer,
};
#[doc(hidden)]
pub use {inventory, schemars, serde_json, typetag};
