//! The error type of the library. Messages say what was found, what was expected, and what to do.

use std::io;
use std::path::{Path, PathBuf};

use mblm_yaml::Document;

/// How the error begins of a run whose loss or gradient was not finite.
pub const NON_FINITE: &str = "training stopped at gradient step";

/// Everything that can go wrong in `mblm-train`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration, or the data it names, cannot be trained on.
    #[error("{0}")]
    Config(String),
    /// A file could not be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A checkpoint is missing, damaged, or belongs to another run.
    #[error("{path}: {message}")]
    Checkpoint {
        /// The checkpoint, or the file in it.
        path: PathBuf,
        /// Which check failed.
        message: String,
    },
    /// A loss or a gradient is infinite or NaN. The weights are those before the step.
    #[error(
        "{} {step} (batch {batch}), before the weights changed: {what}; lower train.learning_rate or set \
         train.gradient_clipping, then resume from the last checkpoint",
        NON_FINITE
    )]
    NonFinite {
        /// Gradient steps taken before.
        step: u64,
        /// The batch it happened in, counted from 0 over the whole run.
        batch: u64,
        /// The first tensor that is not finite.
        what: String,
    },
    /// A device has no memory left for a training step. The weights are those before the step.
    #[error(
        "training stopped at batch {batch}: {device} has no memory left for a step ({reason}); lower train.batch_size or \
         params.input_seq_len, or recompute stages in chunks (params.train_checkpoint_chunks), with \
         `mblm train --resume RUN --force --set FIELD=VALUE`"
    )]
    OutOfMemory {
        /// What the device is called.
        device: String,
        /// The batch it happened in, counted from 0 over the whole run.
        batch: u64,
        /// What the device said.
        reason: String,
    },
    /// Something panicked during training, for example a block.
    #[error("training panicked: {0}")]
    Panic(String),
    /// Another of the processes that train together failed.
    #[error("process {rank}: {}", .failure.message)]
    Elsewhere {
        /// Which one.
        rank: usize,
        /// What it said.
        failure: Failure,
    },
    /// The configuration is invalid. The message has file, field, line, what was found, and what was expected.
    #[error(transparent)]
    Yaml(#[from] mblm_yaml::ConfigError),
    /// The model failed.
    #[error(transparent)]
    Core(#[from] mblm_core::Error),
}

/// What a process says of its failure to the others.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// What it shows.
    pub message: String,
    /// Whether the user must change the configuration, the data or the command line.
    pub is_configuration: bool,
    /// Whether a loss, a gradient or logits were not finite.
    pub is_not_finite: bool,
}

impl Failure {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let kind = u8::from(self.is_configuration) | u8::from(self.is_not_finite) << 1;
        [&[kind], self.message.as_bytes()].concat()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let (kind, message) = bytes.split_first().unwrap_or((&0, &[]));
        let message = String::from_utf8_lossy(message).into_owned();
        Failure { message, is_configuration: kind & 1 != 0, is_not_finite: kind & 2 != 0 }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Failure {
            message: error.to_string(),
            is_configuration: error.is_configuration(),
            is_not_finite: error.is_not_finite(),
        }
    }
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the user must change the configuration, the data or the command line; the program then exits with 2.
    pub fn is_configuration(&self) -> bool {
        use mblm_core::Error as Core;
        match self {
            Error::Elsewhere { failure, .. } => failure.is_configuration,
            _ => matches!(self, Error::Config(_) | Error::Yaml(_) | Error::Core(Core::Input(_))),
        }
    }

    /// Whether a loss, a gradient or logits were not finite. A retry would give the same result, bit for bit.
    pub fn is_not_finite(&self) -> bool {
        match self {
            Error::Elsewhere { failure, .. } => failure.is_not_finite,
            _ => matches!(self, Error::NonFinite { .. } | Error::Core(mblm_core::Error::NotFinite(_))),
        }
    }

    /// Names the file and the line of the field that a mistake in the configuration begins with, if `document` has it.
    pub fn located(self, document: &Document) -> Self {
        let Error::Config(text) = &self else { return self };
        match text.split_once(": ") {
            Some((field, message)) if document.get(field).is_some() => {
                Error::Config(document.error(field, message).to_string())
            }
            _ => self,
        }
    }

    /// A checkpoint, or a file in it, is not as it must be.
    pub fn checkpoint(path: &Path, message: impl Into<String>) -> Self {
        Error::Checkpoint { path: path.into(), message: message.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Core(error.into())
    }
}

impl From<mblm_data::Error> for Error {
    fn from(error: mblm_data::Error) -> Self {
        match error {
            mblm_data::Error::Config(message) => Error::Config(message),
            mblm_data::Error::Io { path, error } => Error::Io { path, error },
        }
    }
}

impl From<mblm_pth::Error> for Error {
    fn from(error: mblm_pth::Error) -> Self {
        Error::checkpoint(&error.path, error.fault)
    }
}

/// Names the file in an I/O error.
pub trait AtPath<T> {
    /// The error with `path`.
    fn at(self, path: &Path) -> Result<T>;
}

impl<T> AtPath<T> for io::Result<T> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|error| Error::Io { path: path.into(), error })
    }
}
