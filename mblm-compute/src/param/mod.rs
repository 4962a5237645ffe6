//! Parameters: values, gradient buffers that accumulate, and reproducible initial values.
//!
//! Names are those of the Python package's `state_dict`, so weights can be exchanged in both directions. Creating a
//! parameter allocates nothing: its values are drawn when they are first read. A model can therefore be counted without
//! its memory.

mod arena;
mod candle;
mod flat;
mod gradient;
mod init;
mod part;
mod store;
mod value;

pub use candle::CandleModule;
pub use gradient::Gradient;
pub use init::{Init, Start};
pub use part::Part;
pub use store::{MAX_TENSORS, decays_by_name, fold_gradients};
pub use store::{ParamScope, ParamStore};
pub use value::{Loan, Param, Values};
