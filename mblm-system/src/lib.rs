//! How MBLM meets the operating system: files that others may have made, the terminal, memory.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod files;
pub mod memory;
pub mod terminal;
pub mod usage;
