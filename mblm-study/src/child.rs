//! A process that trains or measures one run: whatever happens in it, a crash or too little memory, ends that run alone.
//!
//! Its output goes to a log file whose lock it holds for as long as it lives, so that a study that was killed and is
//! started again knows which of its processes are still ending. It ends, with a checkpoint, when its standard input does,
//! which is when the study wants it or has ended itself.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mblm_base::files;
use mblm_base::memory::Memory;
use mblm_train::error::{AtPath, Error, Result};

/// How often a process is looked at.
const GLANCE: Duration = Duration::from_millis(20);
/// How long a process of a study that was killed may take to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// The log of a run's processes, locked.
pub(super) struct ChildLog {
    path: PathBuf,
    file: File,
}

/// How a process ended.
pub(super) struct Exit {
    status: ExitStatus,
    /// The most memory it held.
    pub(super) peak: Option<u64>,
    /// What it wrote to its log.
    said: String,
}

impl ChildLog {
    /// Opens a log, once no process writes to it any more; `waits` is told if one does. None if `stop` is raised meanwhile.
    pub(super) fn open(path: &Path, stop: &AtomicBool, waits: impl FnOnce()) -> Result<Option<Self>> {
        let file = files::append(path).at(path)?;
        let start = Instant::now();
        let mut waits = Some(waits);
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if stop.load(Ordering::Relaxed) => return Ok(None),
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                    if let Some(waits) = waits.take() {
                        waits();
                    }
                    std::thread::sleep(GLANCE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Config(format!(
                        "{}: a process of an earlier start of this study still runs; end it first",
                        path.display()
                    )));
                }
                // Some network file systems have no locks.
                Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => break,
                Err(TryLockError::Error(error)) => return Err(Error::Io { path: path.into(), error }),
            }
        }
        Ok(Some(ChildLog { path: path.into(), file }))
    }

    /// Opens a log to which processes of earlier starts may still write.
    pub(super) fn shared(path: &Path) -> Result<Self> {
        Ok(ChildLog { path: path.into(), file: files::append(path).at(path)? })
    }

    /// Runs `command` to its end, which comes early if `stop` is raised. `glance` is called all the while with the
    /// process's number.
    pub(super) fn run(&self, mut command: Command, stop: &AtomicBool, mut glance: impl FnMut(u32)) -> Result<Exit> {
        let log = || self.file.try_clone().map(Stdio::from).at(&self.path);
        command.stdin(Stdio::piped()).stdout(log()?).stderr(log()?);
        let start = self.file.metadata().at(&self.path)?.len();
        let mut child = self.spawn(&mut command)?;
        let mut peak = None;
        let status = loop {
            if stop.load(Ordering::Relaxed) {
                drop(child.stdin.take());
            }
            peak = peak.max(Memory::peak_of(child.id()));
            match child.try_wait().at(&self.path)? {
                Some(status) => break status,
                None => std::thread::sleep(GLANCE),
            }
            glance(child.id());
        };
        Ok(Exit { status, peak, said: self.since(start)? })
    }

    /// Runs `command` and returns what it printed.
    pub(super) fn ask(&self, mut command: Command) -> Result<(Exit, Vec<u8>)> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(self.file.try_clone().at(&self.path)?);
        let start = self.file.metadata().at(&self.path)?.len();
        let output = self.spawn(&mut command)?.wait_with_output().at(&self.path)?;
        Ok((Exit { status: output.status, peak: None, said: self.since(start)? }, output.stdout))
    }

    fn spawn(&self, command: &mut Command) -> Result<Child> {
        // Ctrl-C is for the study, which then ends its processes one by one.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(command, 0);
        command.spawn().at(Path::new(command.get_program()))
    }

    fn since(&self, start: u64) -> Result<String> {
        let mut text = Vec::new();
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start)).and_then(|_| file.read_to_end(&mut text)).at(&self.path)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Exit {
    /// Whether it was asked to end, by this study or by somebody else: its exit code is that of an interrupted run, or a
    /// signal ended it that asks for an end.
    pub(super) fn was_interrupted(&self) -> bool {
        let asks = |signal| matches!(signal, 1 | 2 | 15); // SIGHUP, SIGINT, SIGTERM
        #[cfg(unix)]
        if std::os::unix::process::ExitStatusExt::signal(&self.status).is_some_and(asks) {
            return true;
        }
        self.status.code().is_some_and(|code| asks(code - 128))
    }

    pub(super) fn is_success(&self) -> bool {
        self.status.success()
    }

    /// How a launcher ended, and what it said last; an error of this program that it started says more than its own.
    pub(super) fn of_launcher(&self) -> String {
        let lines = || self.said.lines().map(str::trim).filter(|line| !line.is_empty());
        #[cfg(unix)]
        let signal = std::os::unix::process::ExitStatusExt::signal(&self.status);
        #[cfg(not(unix))]
        let signal: Option<i32> = None;
        let how = match (self.status.code(), signal) {
            (Some(code), _) => format!("the launcher ended with exit code {code}"),
            (None, Some(signal)) => format!("the launcher was ended by signal {signal}"),
            (None, None) => format!("the launcher ended with {}", self.status),
        };
        match lines().rfind(|line| line.starts_with("error: ")).or_else(|| lines().next_back()) {
            Some(line) => format!("{how} ({line})"),
            None => how,
        }
    }

    /// Why it failed, if it did. If it did not say so itself, the plugins that it ran are `suspects`.
    pub(super) fn failure(&self, suspects: &str) -> Option<String> {
        (!self.status.success()).then(|| reason(&self.said, &format!("{}{suspects}", how(self.status))))
    }
}

/// How a process ended, in words.
fn how(status: ExitStatus) -> String {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        let why = if signal == 9 { ", as the system does when memory runs out" } else { "" };
        return format!("the process was ended by signal {signal}{why}");
    }
    format!("the process ended with {status}")
}

/// The error in what a process said: its own message, or the panic's, or else `how` it ended.
fn reason(said: &str, how: &str) -> String {
    let from = |at: usize| said[at..].trim().to_string();
    let at_line = |start: &str| {
        if said.starts_with(start) { Some(0) } else { said.rfind(&format!("\n{start}")).map(|at| at + 1) }
    };
    if let Some(at) = at_line("error: ") {
        return from(at + "error: ".len());
    }
    match said.rfind("' panicked at ").or_else(|| said.rfind(" panicked at ")) {
        Some(at) => {
            let panic: String =
                said[at..].trim_start_matches('\'').trim().lines().take(2).collect::<Vec<_>>().join(" ");
            format!("{panic}; {how}")
        }
        None => how.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_the_process_said() {
        let cases = [
            ("run: a\nerror: first\nbatch 3\nerror: the loss is NaN\n  more\n", "the loss is NaN\n  more"),
            ("error: only", "only"),
            (
                "a\nthread 'main' panicked at src/x.rs:3:4:\nindex out of bounds\nnote: …\n",
                "panicked at src/x.rs:3:4: index out of bounds; HOW",
            ),
            ("batch 3 error: no\n", "HOW"),
        ];
        for (said, want) in cases {
            assert_eq!(reason(said, "HOW"), want);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_process_is_ended_and_its_failure_told() {
        let folder = tempfile::tempdir().unwrap();
        let log = ChildLog::open(&folder.path().join("a.log"), &AtomicBool::new(false), || ()).unwrap().unwrap();
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let stop = AtomicBool::new(false);
        let exit = log.run(shell("echo 'error: gone' >&2; exit 3"), &stop, |_| ()).unwrap();
        assert_eq!(exit.failure("").as_deref(), Some("gone"));
        let exit = log.run(shell("kill -SEGV $$"), &stop, |_| ()).unwrap();
        assert_eq!(exit.failure("; P").as_deref(), Some("the process was ended by signal 11; P"));
        let exit = log.run(shell("kill -9 $$"), &stop, |_| ()).unwrap();
        assert!(exit.failure("").unwrap().contains("signal 9"), "{:?}", exit.failure(""));
        let (exit, out) = log.ask(shell("echo hello")).unwrap();
        assert_eq!((exit.failure(""), &out[..]), (None, &b"hello\n"[..]));
        // Of a launcher, the last thing it said, or what this program said that it started.
        let exit = log.run(shell("echo queued; echo 'srun: gone'; exit 9"), &stop, |_| ()).unwrap();
        assert_eq!(exit.of_launcher(), "the launcher ended with exit code 9 (srun: gone)");
        let exit = log.run(shell("echo 'error: no file'; echo 'srun: gone'; kill -9 $$"), &stop, |_| ()).unwrap();
        assert_eq!(exit.of_launcher(), "the launcher was ended by signal 9 (error: no file)");
        // Reads until its input ends, which it does when the study wants it.
        stop.store(true, Ordering::Relaxed);
        let exit = log.run(shell("cat; echo ended"), &stop, |_| ()).unwrap();
        assert_eq!((exit.failure(""), &exit.said[..]), (None, "ended\n"));
        let ended = |script: &str| log.run(shell(script), &AtomicBool::new(false), |_| ()).unwrap().was_interrupted();
        assert_eq!(["exit 143", "kill -TERM $$", "exit 1", "kill -9 $$"].map(ended), [true, true, false, false]);
    }
}
