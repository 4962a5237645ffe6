//! Opening a library in a child process first: what crashes, exits or hangs there does so without harm.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::library::Library;

/// How long a library may take to open.
const LIMIT: Duration = Duration::from_secs(10);

/// What the child's answer begins with, amid anything that a library may print.
const ANSWER: &str = "mblm-probe:";
const ACCEPTED: &str = "accepted";

/// A program that opens a library and says how that went: it calls [`answer`] with the path it is given.
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

    /// Has the child open `path`.
    ///
    /// # Errors
    /// Why the library is not to be opened.
    pub fn run(&self, path: &Path) -> Result<(), String> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("cannot be probed: {}: {error}", self.program.display()))?;
        // Read on another thread: a full pipe would stop the child.
        let mut stdout = child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = stdout.as_mut().map(|out| out.read_to_end(&mut bytes)); // what came until then is the answer
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let Some(status) = wait(&mut child, self.limit) else {
            return Err(format!("hangs: it was not open after {} s", self.limit.as_secs_f64()));
        };
        let output = reader.join().unwrap_or_default();
        let answer = output.rsplit_once(ANSWER).map(|(_, answer)| answer.trim());
        match (answer, status.success()) {
            (Some(ACCEPTED), true) => Ok(()),
            (Some(ACCEPTED), false) => Err(format!("{} after it was opened, when the process ended", fate(status))),
            (Some(reason), _) => Err(reason.into()),
            (None, _) => Err(format!("{} when it was opened", fate(status))),
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

/// Waits for a child; kills it if it takes longer than `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if start.elapsed() > limit {
            let _ = child.kill(); // it may have ended meanwhile
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The child's side: opens the library and prints how that went.
pub fn answer(path: &Path) {
    let verdict = match Library::open(path) {
        Ok(_) => ACCEPTED.into(),
        Err(reason) => reason,
    };
    // Who asked may be gone.
    let _ = writeln!(std::io::stdout(), "\n{ANSWER} {verdict}");
}
