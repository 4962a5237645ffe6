//! Data, optimizer, schedule, trainer and checkpoints of MBLM.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(test)]
mod bigram;
pub mod checkpoint;
pub mod config;
pub mod cost;
mod crc32c;
pub mod doctor;
pub mod error;
pub mod evaluate;
pub mod import;
mod line_log;
pub mod metrics;
pub mod model;
pub mod optimizer;
pub mod plan;
pub mod points;
pub mod progress;
pub mod run;
pub mod schedule;
pub mod schema;
pub mod session;
mod tensorboard;
pub mod timemem;
pub mod trainer;

pub use error::{Error, Result};
