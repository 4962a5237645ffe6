//! What every part of MBLM stands on: files that others may have made, the terminal, memory, the host's name and
//! pseudo-random numbers.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod files;
pub mod host;
pub mod memory;
pub mod nearest;
pub mod random;
#[doc(hidden)]
pub mod scramble;
pub mod terminal;
pub mod value;
