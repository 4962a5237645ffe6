//! Opening a library in a child process first: what crashes, exits or hangs there does so without harm.
//!
//! The child answers through its standard input, which is a pipe that it writes to. Whatever the library prints goes
//! nowhere, so that it can neither be taken for an answer nor fill a buffer.

use std::io::{PipeReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::file::LibraryFile;
use super::library::Library;

/// How long a library may take to open.
const LIMIT: Duration = Duration::from_secs(10);

/// The child's answer if the library can be used; any other is the reason why not.
const ACCEPTED: &str = "accepted";
/// Bytes of an answer. Less than what a pipe holds, so that the child never waits for a reader.
const ANSWER_BYTES: usize = 2000;

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
        let failed = |error: std::io::Error| format!("cannot be probed: {}: {error}", self.program.display());
        let (answer, childs_end) = std::io::pipe().map_err(failed)?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .arg(&file.path)
            .arg(&file.sha256)
            .stdin(childs_end)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = spawn(&mut command).map_err(failed)?;
        drop(command); // and with it this process's copy of the child's end
        let Some(status) = wait(&mut child, self.limit) else {
            return Err(format!("hangs: it was not open after {} s", self.limit.as_secs_f64()));
        };
        match (read_answer(answer).as_str(), status.success()) {
            (ACCEPTED, true) => Ok(()),
            (ACCEPTED, false) => Err(format!("{} after it was opened, when the process ended", fate(status))),
            ("", _) => Err(format!("{} when it was opened", fate(status))),
            (reason, _) => Err(reason.into()),
        }
    }
}

/// What the child has written. It has ended, so this waits for nothing, even if a process that the library left behind
/// still holds the pipe.
fn read_answer(mut pipe: PipeReader) -> String {
    #[cfg(unix)]
    // SAFETY: sets a flag of a descriptor that `pipe` owns.
    unsafe {
        libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&pipe), libc::F_SETFL, libc::O_NONBLOCK);
    }
    let mut bytes = [0; 2 * ANSWER_BYTES];
    let len = pipe.read(&mut bytes).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// Starts a process at the head of a group of its own, so that [`wait`] can end what it leaves behind.
pub fn spawn(command: &mut Command) -> std::io::Result<Child> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(command, 0);
    command.spawn()
}

/// How a process ended, in words.
pub fn fate(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let name = match signal {
            4 => " (illegal instruction)",
            6 => " (abort)",
            7 => " (bus error)",
            8 => " (arithmetic)",
            11 => " (segmentation fault)",
            _ => "",
        };
        return format!("crashed by signal {signal}{name}");
    }
    match status.code() {
        Some(code) => format!("ended the process with exit code {code}"),
        None => "ended the process".into(),
    }
}

/// Waits for a child; kills it if it takes longer than `limit`. Processes that it started and left behind are killed too,
/// if it was started by [`spawn`].
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    let is_late = loop {
        if has_ended(child) {
            break false;
        }
        if start.elapsed() > limit {
            break true;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let _ = child.kill(); // it may have ended meanwhile
    #[cfg(unix)]
    // SAFETY: the child was not waited for yet, so its number is still its own; without such a group nothing happens.
    unsafe {
        libc::kill(-(child.id() as libc::pid_t), libc::SIGKILL);
    }
    let status = child.wait().ok();
    if is_late { None } else { status }
}

/// Whether a child has ended; it can still be waited for.
#[cfg(unix)]
fn has_ended(child: &Child) -> bool {
    // SAFETY: all zeros is a valid value, which the call fills in.
    unsafe {
        let mut about: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_PID, child.id() as libc::id_t, &mut about, flags) != 0 || about.si_pid() != 0
    }
}

#[cfg(not(unix))]
fn has_ended(child: &mut Child) -> bool {
    !matches!(child.try_wait(), Ok(None))
}

/// The child's side: opens the library, if it has this SHA-256, and says how that went.
pub fn answer(path: &Path, sha256: &str) {
    // The parent waits for this process, so it outlives it only by being killed.
    #[cfg(target_os = "linux")]
    // SAFETY: sets a property of this process.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    let opened = LibraryFile::read(path).and_then(|file| match file.sha256 == sha256 {
        true => Library::open_file(&file),
        false => Err("it was written to while it was read; try again".into()),
    });
    let mut verdict = match opened {
        Ok(_) => ACCEPTED.into(),
        Err(reason) => reason,
    };
    verdict.truncate(verdict.floor_char_boundary(ANSWER_BYTES));
    write_answer(&verdict);
}

#[cfg(unix)]
fn write_answer(verdict: &str) {
    use std::os::fd::AsFd;
    let pipe = std::io::stdin().as_fd().try_clone_to_owned().map(std::fs::File::from);
    // Without an answer the parent reports how this process ended.
    let _ = pipe.and_then(|mut pipe| pipe.write_all(verdict.as_bytes()));
}

#[cfg(not(unix))]
fn write_answer(verdict: &str) {
    use std::os::windows::io::AsHandle;
    let pipe = std::io::stdin().as_handle().try_clone_to_owned().map(std::fs::File::from);
    let _ = pipe.and_then(|mut pipe| pipe.write_all(verdict.as_bytes()));
}
