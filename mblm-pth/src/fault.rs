//! What goes wrong in a file.

use std::path::PathBuf;

/// What went wrong in a file, without the file's name.
pub(crate) type Fault = String;
pub(crate) type Parsed<T> = Result<T, Fault>;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// What was found, what was expected, and what to do.
    pub fault: String,
}
