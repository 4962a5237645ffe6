//! Plugin code in a process of its own. It may crash there, exit, hang, fork or print without end: the process and all that
//! it started end within a time limit, and only an answer counts.
//!
//! The child answers through its standard input, which is a pipe that it writes to. Whatever the plugin prints on standard
//! output goes nowhere, so that it cannot be taken for an answer. Of standard error the end is kept, for the reason.

use std::io::{self, PipeReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How much is kept of what a child writes: the last bytes.
const KEPT: usize = 1 << 18;
/// How long a pipe may stay open after the child has ended. It closes at once, unless a process that left the child's
/// group holds it.
const GRACE: Duration = Duration::from_millis(500);

/// An environment variable that a child and whatever it starts have in common, by which they are found when it has ended.
#[cfg(target_os = "linux")]
const MARK: &str = "MBLM_CHILD";
/// How often what a child left behind is looked for: more may be started while some are killed.
#[cfg(target_os = "linux")]
const ROUNDS: usize = 100;

/// How a child ended.
#[derive(Debug)]
pub struct Ended<T> {
    /// Its exit status; `None` if it was killed at the time limit.
    pub status: Option<ExitStatus>,
    /// Its answer, if it gave one.
    pub answer: Option<T>,
    /// What it said last on standard error that begins with `error: `.
    pub error: Option<String>,
}

/// Runs a program that calls [`answer`], for at most `limit`. When it ends, so does its process group and, on Linux, every
/// other process that it left behind.
///
/// # Errors
/// The program cannot be started.
pub fn ask<T: DeserializeOwned>(mut command: Command, limit: Duration) -> io::Result<Ended<T>> {
    let ((answer, answers), (errors, said)) = (io::pipe()?, io::pipe()?);
    command.stdin(answers).stdout(Stdio::null()).stderr(said);
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    #[cfg(target_os = "linux")]
    let mark = mark(&mut command);
    let mut child = command.spawn()?;
    drop(command); // and with it this process's copies of the child's ends
    let (answer, errors) = (read(answer), read(errors));
    let status = wait(&mut child, limit);
    #[cfg(target_os = "linux")]
    kill_all(&mark);
    let (answer, errors) = (answer.end(), errors.end());
    let errors = String::from_utf8_lossy(&errors);
    let error = errors.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(String::from);
    Ok(Ended { status, answer: serde_json::from_slice(&answer).ok(), error })
}

/// A pipe that is read on a thread of its own, since a full one would stop the child.
struct Reading {
    kept: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

fn read(pipe: PipeReader) -> Reading {
    let (sender, end) = mpsc::channel();
    let reading = Reading { kept: Arc::default(), end };
    let kept = reading.kept.clone();
    std::thread::spawn(move || keep_last(pipe, &kept, sender));
    reading
}

impl Reading {
    /// The last bytes, once the pipe is closed, or a moment after the child has ended.
    fn end(self) -> Vec<u8> {
        let _ = self.end.recv_timeout(GRACE); // an error is the end of the pipe, or of the patience
        std::mem::take(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Reads to the end and keeps the last bytes. The sender is dropped at the end.
fn keep_last(mut pipe: impl Read, kept: &Mutex<Vec<u8>>, _end: Sender<()>) {
    let mut bytes = [0; 1 << 14];
    while let Ok(len @ 1..) = pipe.read(&mut bytes) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&bytes[..len]);
        if kept.len() > 2 * KEPT {
            let old = kept.len() - KEPT;
            kept.drain(..old);
        }
    }
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

/// Waits for a child, and kills it if it takes longer than `limit`. Processes that it left behind are killed too.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
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

/// Gives a command an environment variable like no other one's, and returns it.
#[cfg(target_os = "linux")]
fn mark(command: &mut Command) -> String {
    static ASKED: AtomicU64 = AtomicU64::new(0);
    let value = format!("{}-{}", std::process::id(), ASKED.fetch_add(1, Ordering::Relaxed));
    command.env(MARK, &value);
    format!("{MARK}={value}")
}

/// Kills all processes that were started with this environment variable, also those that left the group with `setsid`.
#[cfg(target_os = "linux")]
fn kill_all(mark: &str) {
    for _ in 0..ROUNDS {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut all_gone = true;
        for process in processes {
            let Some(id) = process.file_name().to_str().and_then(|name| name.parse::<libc::pid_t>().ok()) else {
                continue;
            };
            // That of a process that has ended is empty, and that of another user cannot be read.
            let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
                all_gone = false;
                // SAFETY: sends a signal.
                unsafe { libc::kill(id, libc::SIGKILL) };
            }
        }
        if all_gone {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a child has ended; it can still be waited for.
#[cfg(unix)]
fn has_ended(child: &mut Child) -> bool {
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

/// The child's side: answers whoever [`ask`]s.
pub fn answer<T: Serialize>(answer: &T) {
    // Without an answer, whoever asked reports how this process ended.
    if let Ok(json) = serde_json::to_vec(answer) {
        let _ = pipe().and_then(|mut pipe| pipe.write_all(&json));
    }
}

#[cfg(unix)]
fn pipe() -> io::Result<std::fs::File> {
    use std::os::fd::AsFd;
    io::stdin().as_fd().try_clone_to_owned().map(std::fs::File::from)
}

#[cfg(not(unix))]
fn pipe() -> io::Result<std::fs::File> {
    use std::os::windows::io::AsHandle;
    io::stdin().as_handle().try_clone_to_owned().map(std::fs::File::from)
}

/// The child's side: ends this process when the one that [`ask`]s does, even while a plugin hangs.
pub fn end_with_parent() {
    #[cfg(target_os = "linux")]
    // SAFETY: sets a property of this process.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str) -> Ended<String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        ask(command, Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn an_answer_is_not_what_is_printed() {
        let ended = shell("echo '\"printed\"'; echo 'error: no' >&2; echo bye >&2; printf '\"a\\\\nb\"' >&0; exit 3");
        assert_eq!((ended.answer.as_deref(), ended.error.as_deref()), (Some("a\nb"), Some("no")));
        assert_eq!(ended.status.map(fate).as_deref(), Some("ended the process with exit code 3"));
        let ended = shell("echo 'no JSON' >&0; kill -SEGV $$");
        assert_eq!((ended.answer, ended.error), (None, None));
        assert_eq!(ended.status.map(fate).as_deref(), Some("crashed by signal 11 (segmentation fault)"));
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let ended = ask::<String>(command, Duration::from_millis(50)).unwrap();
        assert!(ended.status.is_none() && ended.answer.is_none());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_child_leaves_behind_is_killed() {
        // In the child's group, and in a session of its own.
        for start in ["sleep 1000 &", "setsid sleep 1000 &"] {
            let ended = shell(&format!("{start} printf '\"%s\"' $! >&0; sleep 0.1"));
            let stat = format!("/proc/{}/stat", ended.answer.unwrap());
            // Gone, or a zombie until somebody asks for its status.
            let lives = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
            let is_gone = (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(5));
                !lives()
            });
            assert!(is_gone, "{stat} of `{start}` is still there");
        }
    }

    #[test]
    fn endless_output_takes_bounded_memory() {
        let kept = Mutex::new(vec![]);
        keep_last(io::repeat(b'x').take(5 * KEPT as u64).chain(&b"end"[..]), &kept, mpsc::channel().0);
        let kept = kept.into_inner().unwrap();
        assert!(kept.len() <= 2 * KEPT && kept.ends_with(b"end"), "{}", kept.len());
    }
}
