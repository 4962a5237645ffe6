//! Runs on other machines: a launcher such as `srun` starts each of them there, and what goes wrong with it is tried again.
//!
//! The launcher is not relied on for anything but that it starts the command that follows it, somewhere with the same
//! files, and ends when that has ended. Whether a run has ended, and how, is read from the study's folder: a run that has
//! neither a result nor a failure there is started again, and goes on from its newest checkpoint. A [`lease`] takes the
//! place of standard input and of signals, which launchers do not pass on in one way.

mod errand;
pub(crate) mod launcher;
pub(crate) mod lease;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

pub use errand::{Errand, Outcome};
use launcher::Launcher;
use lease::Lease;
use mblm_base::files;
use mblm_train::checkpoint::Shelf;
use mblm_train::error::{AtPath, Result};
use mblm_train::session::rest;

use crate::child::{ChildLog, Exit};
use crate::folder::failure_file;
use crate::report::{RunResult, duration};
use crate::task::{Fate, Phase, Task};

/// The subcommand that the launcher starts.
pub const ERRAND: &str = "run-of-study";

/// The pause after a first failure of the launcher; after each further one it is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long a file that another machine has written may stay unseen: network file systems remember that it was missing.
const UNSEEN: Duration = Duration::from_secs(60);
/// How often a launched run is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How often a pause looks whether it should end.
const GLANCE: Duration = Duration::from_millis(50);

/// A run that a launcher starts.
pub(crate) struct Launch<'a> {
    pub(crate) launcher: &'a Launcher,
    pub(crate) task: &'a Task<'a>,
    /// So many starts in a row may bring the run no further.
    pub(crate) tries: u32,
}

impl Launch<'_> {
    /// Takes the run to its end, from wherever it stands. `say` shows what goes wrong on the way.
    pub(crate) fn run(&self, stop: &AtomicBool, say: &dyn Fn(&str), mut watch: impl FnMut(Phase)) -> Result<Fate> {
        let failure = failure_file(self.task.study, self.task.name);
        if failure.exists() {
            fs::remove_file(&failure).at(&failure)?;
        }
        let (mut fruitless, mut pause) = (0, FIRST_PAUSE);
        loop {
            let before = self.batches();
            let exit = self.start(stop, &mut watch)?;
            if let Some(fate) = self.fate(&exit, stop) {
                return Ok(fate);
            }
            if self.batches() > before {
                (fruitless, pause) = (0, FIRST_PAUSE);
            }
            fruitless += 1;
            let why = exit.of_launcher();
            if fruitless >= self.tries {
                let times = if fruitless == 1 { "once".into() } else { format!("{fruitless} times in a row") };
                return Ok(Fate::Failed(format!(
                    "the launcher was tried {times} without bringing the run further: {why}"
                )));
            }
            say(&format!("{why}; starting it again in {}", duration(pause.as_secs_f64())));
            watch(Phase::Queued);
            if !rest(pause, stop) {
                return Ok(Fate::Stopped);
            }
            pause = LONGEST_PAUSE.min(2 * pause);
        }
    }

    /// Has the launcher start the run, and waits until the launcher ends.
    fn start(&self, stop: &AtomicBool, watch: &mut impl FnMut(Phase)) -> Result<Exit> {
        let Task { program, study, name, config, prompt, .. } = *self.task;
        let mut lease = Lease::grant(study, name)?;
        let mut command = self.launcher.command(program);
        command.arg(ERRAND).arg(study).arg(name).arg("--ticket").arg(&lease.ticket);
        if let Some(prompt) = prompt {
            command.arg("--prompt").arg(prompt);
        }
        for plugin in config.plugins() {
            command.arg("--plugin-dir").arg(plugin.path);
        }
        let log = ChildLog::shared(&study.join("logs").join(format!("{name}.launcher.log")))?;
        let (mut looked, mut is_begun) = (Instant::now(), false);
        log.run(command, stop, |launcher| {
            if looked.elapsed() < LOOK {
                return;
            }
            looked = Instant::now();
            is_begun = is_begun || lease.is_begun();
            if !stop.load(Ordering::Relaxed) {
                lease.renew();
            } else {
                // A run that was begun ends by itself, with a checkpoint. Others need not wait for their turn.
                lease.revoke();
                if !is_begun {
                    terminate(launcher);
                }
            }
            watch(if is_begun { Phase::Training } else { Phase::Queued });
        })
    }

    /// How the run has ended, if it has. What a launcher says that succeeded, a file must say too, sooner or later.
    fn fate(&self, exit: &Exit, stop: &AtomicBool) -> Option<Fate> {
        let started = Instant::now();
        loop {
            if RunResult::read(&self.task.folder()).is_some() {
                return Some(Fate::Finished);
            }
            if let Ok(why) = files::read_text(&failure_file(self.task.study, self.task.name), files::SMALL) {
                return Some(Fate::Failed(why));
            }
            if stop.load(Ordering::Relaxed) {
                return Some(Fate::Stopped);
            }
            if !exit.is_success() || started.elapsed() >= UNSEEN {
                return None;
            }
            std::thread::sleep(GLANCE);
        }
    }

    /// The batches that the run's newest checkpoint has trained.
    fn batches(&self) -> Option<u64> {
        let newest = Shelf::of_run(&self.task.folder()).and_then(|shelf| shelf.newest());
        newest.and_then(|checkpoint| checkpoint.state()).ok().map(|state| state.batches)
    }
}

/// Asks a launcher, and what it has started here, to end.
fn terminate(launcher: u32) {
    #[cfg(unix)]
    // SAFETY: sends a signal to the process group that the launcher leads; it is a child that has not been waited for.
    unsafe {
        libc::kill(-(launcher as libc::pid_t), libc::SIGTERM);
    }
    #[cfg(not(unix))]
    let _ = launcher;
}
