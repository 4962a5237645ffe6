//! What a launcher starts on the machine that it chose: one run, taken to its end there.
//!
//! The same command may come again, when a job is requeued after its machine died for example: it goes on where the run is.
//! Two on one run are kept apart by the lock of its log.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mblm_base::{files, terminal};
use mblm_train::config::RunConfig;
use mblm_train::error::{AtPath, Result};

use super::lease::{self, Watch};
use crate::folder::{PlanFile, failure_file};
use crate::task::{Fate, Phase, Task, cores, number};

/// How often the lease is looked at.
const GLANCE: Duration = Duration::from_millis(500);
/// How long a run may take to end that is not wanted any more. Its process ends soon after this one.
const GRACE: Duration = Duration::from_secs(60);
/// Whoever kills a run with all else of its job has killed this process too after so long.
const SAME_BLOW: Duration = Duration::from_secs(2);

/// A run of a study, as another machine is asked for it.
pub struct Errand<'a> {
    /// The program, whose `train` and `measure-run` are called.
    pub program: &'a Path,
    /// The study's folder.
    pub study: &'a Path,
    /// The run's name.
    pub name: &'a str,
    /// What its study knows this start by.
    pub ticket: &'a str,
    /// Its configuration: that of [`config_file`](Errand::config_file).
    pub config: &'a RunConfig,
    /// What its sample continues.
    pub prompt: Option<&'a str>,
}

/// How an errand ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The study's folder says how the run ended.
    Ended,
    /// It was stopped, and can go on from its newest checkpoint: why, unless that was a signal.
    Stopped(Option<&'static str>),
}

impl Errand<'_> {
    /// Where the study has written the configuration of its run `name`.
    pub fn config_file(study: &Path, name: &str) -> std::path::PathBuf {
        crate::task::config_file(study, name)
    }

    /// Takes the run to its end, until `stop` is raised, which happens here too when the study does not want it any more.
    ///
    /// # Errors
    /// The study's folder cannot be read or written, or the process of an earlier start does not end.
    pub fn run(&self, stop: &'static AtomicBool) -> Result<Outcome> {
        let Errand { program, study, name, ticket, config, prompt } = *self;
        let mut watch = Watch::new(study, name, ticket);
        if let Some(why) = watch.lost() {
            return Ok(Outcome::Stopped(Some(why)));
        }
        lease::begin(study, name, ticket)?;
        let lost = Arc::new(OnceLock::new());
        let told = Arc::clone(&lost);
        std::thread::spawn(move || stop_when_lost(watch, &told, stop));
        let jobs = PlanFile::read(study)?.jobs;
        let task = Task { program, study, name, config, prompt, jobs, threads: threads() };
        let fate = task.run(stop, |phase| {
            if phase == Phase::Waiting {
                terminal::line("waiting for the process of an earlier start to end");
            }
        })?;
        if let Fate::Failed(why) = &fate {
            std::thread::sleep(SAME_BLOW);
            if !stop.load(Ordering::Relaxed) {
                let path = failure_file(study, name);
                files::replace_text(&path, why).at(&path)?;
                return Ok(Outcome::Ended);
            }
        }
        match fate {
            Fate::Finished => Ok(Outcome::Ended),
            _ => Ok(Outcome::Stopped(lost.get().copied())),
        }
    }
}

/// Raises `stop` when the lease is lost. Ends this process if it then goes on: code in a block may hang.
fn stop_when_lost(mut watch: Watch, lost: &OnceLock<&'static str>, stop: &AtomicBool) {
    loop {
        if let Some(why) = watch.lost() {
            let _ = lost.set(why);
            stop.store(true, Ordering::SeqCst);
            std::thread::sleep(GRACE);
            std::process::exit(1);
        }
        std::thread::sleep(GLANCE);
    }
}

/// Threads of a run here: the processors that the job was given, or as many as the user asks for.
fn threads() -> usize {
    let cores = cores();
    number("SLURM_CPUS_PER_TASK").map_or(cores, |given| given.clamp(1, cores))
}
