//! `mblm plugin`: list, check and make plugins.

mod check;
mod list;
mod new;
mod schema;
mod trust;

use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::plugin::host::probe::Probe;
use mblm::plugin::host::{Library, LibraryFile};

use crate::exit::Usage;
use crate::plugins::{PROBE, Plugins};

/// Arguments of `mblm plugin`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the plugins that are found, and the files that are not loaded and why
    List(list::Args),
    /// Test a plugin against the contract
    Check(check::Args),
    /// Create a new plugin that builds and passes `check`
    New(new::Args),
    /// Print the JSON Schema of a plugin's block
    Schema(schema::Args),
    /// Trust the libraries that are in a folder now
    Trust(trust::Args),
}

/// Runs `mblm plugin`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    match &args.command {
        Command::List(args) => list::run(args, plugins),
        Command::Check(args) => check::run(args),
        Command::New(args) => new::run(args),
        Command::Schema(args) => schema::run(args),
        Command::Trust(args) => trust::run(args),
    }
}

/// The file that was named.
fn library_file(file: &Path) -> Result<PathBuf> {
    let reason = match file.canonicalize() {
        Ok(path) if path.is_file() => return Ok(path),
        Ok(path) if path.is_dir() => "a folder".to_string(),
        Ok(_) => "not a regular file".to_string(),
        Err(error) => error.to_string(),
    };
    Err(Usage(format!("{}: {reason}; expected a shared library", file.display())).into())
}

/// Opens a file that was named, after a probe.
fn open(file: &Path) -> Result<std::sync::Arc<Library>> {
    let path = library_file(file)?;
    let probe = Probe::new(std::env::current_exe()?, &[PROBE]);
    let opened = LibraryFile::read(&path).and_then(|file| probe.run(&file).and_then(|()| Library::open_file(&file)));
    opened.map_err(|reason| Usage(format!("{}: {reason}", file.display())).into())
}

/// Arguments of the probe, which runs in a process of its own.
#[derive(clap::Args)]
pub struct ProbeArgs {
    file: PathBuf,
    sha256: String,
}

/// Runs the probe.
pub fn probe(args: &ProbeArgs) {
    mblm::plugin::host::probe::answer(&args.file, &args.sha256);
}
