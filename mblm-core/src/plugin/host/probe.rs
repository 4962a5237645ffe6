//! Opens a library in a child process first, where a crash, an exit or a hang does no harm.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::child::{self, fate};
use super::file::LibraryFile;
use super::library::Library;

/// How long a library may take to open.
const LIMIT: Duration = Duration::from_secs(10);

/// A program that opens a library and says how that went: it calls [`answer`] with the path and the sum that it is given.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The program.
    pub program: PathBuf,
    /// What stands before the path.
    pub args: Vec<String>,
    /// How long it may take.
    pub limit: Duration,
}

impl Probe {
    /// A program, its arguments before the path, and the usual time limit.
    pub fn new(program: impl Into<PathBuf>, args: &[&str]) -> Self {
        Probe { program: program.into(), args: args.iter().map(|arg| arg.to_string()).collect(), limit: LIMIT }
    }

    /// Has the child open a library. It opens the bytes that were read, or nothing.
    ///
    /// # Errors
    /// Why the library is not to be opened.
    pub fn run(&self, file: &LibraryFile) -> Result<(), String> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).arg(&file.path).arg(&file.sha256);
        let ended = child::ask::<Result<(), String>>(command, self.limit)
            .map_err(|error| format!("cannot be probed: {}: {error}", self.program.display()))?;
        let Some(status) = ended.status else {
            return Err(format!("hangs: opening it took more than {} s", self.limit.as_secs_f64()));
        };
        match (ended.answer, status.success()) {
            (Some(Ok(())), true) => Ok(()),
            (Some(Ok(())), false) => Err(format!("{} after it was opened, at the end of the process", fate(status))),
            (Some(Err(reason)), _) => Err(reason),
            (None, _) => Err(format!("{} when it was opened", fate(status))),
        }
    }
}

/// The child's side: opens the library, if it has this SHA-256, and says how that went.
pub fn answer(path: &Path, sha256: &str) {
    child::end_with_parent();
    let opened = LibraryFile::read(path).and_then(|file| match file.sha256 == sha256 {
        true => Library::open_file(&file).map(drop),
        false => Err("it changed while it was read; try again".into()),
    });
    child::answer(&opened);
}
