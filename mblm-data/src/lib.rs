//! Data sets: what a training run reads, in which order, and whether it has changed since the run started.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod batches;
pub mod bytes;
pub mod clevr;
pub mod cut;
mod dataset;
mod error;
pub mod files;
pub mod order;
pub mod pg19;
pub mod prefetch;
pub mod registry;
pub mod share;

pub use dataset::{Dataset, DatasetOptions, NoArgs, Splits, unigram_entropy};
pub use error::{Error, Result};
pub use files::fingerprint::{FileSum, Fingerprint};
pub use registry::{DatasetKind, kind, kinds, open};
#[doc(hidden)]
pub use {inventory, schemars};
