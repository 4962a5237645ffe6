//! How the program ends: exit codes, and which errors are mistakes of the user.

use mblm::Error;

/// A mistake in a configuration or on the command line; clap uses the same code.
pub const EXIT_USAGE: u8 = 2;

/// For `--help`.
pub const EXIT_CODES: &str = "\
Exit codes: 0 finished (or reached train.max_seconds), 1 failed, 2 error in the arguments, configuration or data,
128 + N interrupted by signal N (130: Ctrl-C, 143: SIGTERM)";

/// A mistake on the command line that clap cannot know of.
#[derive(Debug)]
pub struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Whether the user must change the command line, the configuration or the data.
pub fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
        || error.is::<mblm::yaml::ConfigError>()
        || matches!(error.downcast_ref::<Error>(), Some(Error::Input(_)))
        || error.downcast_ref::<mblm::data::Error>().is_some_and(|error| error.is_configuration())
        || error.downcast_ref::<mblm::train::Error>().is_some_and(|error| error.is_configuration())
}

/// Whether another process shows the error.
pub fn is_elsewhere(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<mblm::train::Error>(), Some(mblm::train::Error::Elsewhere { .. }))
}

/// Whoever reads our output, such as `head`, has had enough.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |error: &std::io::Error| error.kind() == std::io::ErrorKind::BrokenPipe;
    match error.downcast_ref::<Error>() {
        Some(Error::Io(error)) => closed(error),
        _ => error.downcast_ref::<std::io::Error>().is_some_and(closed),
    }
}
