//! What goes wrong when data are opened and read.

use std::io;
use std::path::{Path, PathBuf};

/// Everything that can go wrong in `mblm-data`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration, or the data it names, cannot be used. Says which field, what was found and what was expected.
    #[error("{0}")]
    Config(String),
    /// A file could not be read.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// A result with this crate's [`Error`] by default.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the user must change the configuration or the data.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Error::Config(_))
    }
}

/// Names the file in an I/O error.
pub(crate) trait AtPath<T> {
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> AtPath<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|error| Error::Io { path: path.into(), error })
    }
}
