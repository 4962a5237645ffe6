//! YAML configurations with errors that say where: a [`Document`] knows the line, or the `--set`, of every field.
//!
//! Fields are named by paths such as `params.block[1].attn_num_heads`.
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod difference;
mod document;
mod error;
mod parse;
mod path;

pub use document::Document;
pub use error::{ConfigError, Place, ValueError, describe, from_value};
pub use mblm_base::value::join;
