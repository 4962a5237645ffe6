//! Data, optimizer, schedule, trainer and checkpoints of MBLM.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(test)]
mod bigram;
pub mod checkpoint;
pub mod config;
pub mod cost;
pub mod doctor;
pub mod documents;
pub mod entropy;
pub mod error;
pub mod evaluate;
pub mod import;
pub mod journal;
pub mod model;
pub mod patches;
pub mod processes;
pub mod progress;
pub mod schema;
pub mod session;
pub mod trainer;

pub use error::{Error, Result};
