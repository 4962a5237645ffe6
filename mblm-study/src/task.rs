//! One run on this machine: it is trained to its end and then measured, each in a process of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use mblm_base::{files, host};
use mblm_train::checkpoint::Shelf;
use mblm_train::config::RunConfig;
use mblm_train::error::{AtPath, Result};
use mblm_train::trainer::plan::RunPlan;

use crate::child::{ChildLog, Exit};
use crate::folder::run_folder;
use crate::launch::lease;
use crate::report::{Measured, RunResult};

/// Why a run failed whose process said that all went well.
const UNFINISHED: &str = "the process ended with exit code 0 before the run was finished: train.max_seconds ended it, or \
                          code in it did";

/// What is to be trained, and how.
pub(crate) struct Task<'a> {
    /// The program, whose `train` and `measure-run` are called.
    pub(crate) program: &'a Path,
    /// The study's folder.
    pub(crate) study: &'a Path,
    /// The run's name.
    pub(crate) name: &'a str,
    pub(crate) config: &'a RunConfig,
    /// What its sample continues.
    pub(crate) prompt: Option<&'a str>,
    /// Runs of the study that train at a time.
    pub(crate) jobs: usize,
    pub(crate) threads: usize,
}

/// How a run ended.
pub(crate) enum Fate {
    Finished,
    Failed(String),
    Stopped,
}

/// What happens to a run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The process of an earlier start still ends.
    Waiting,
    /// No machine has begun it.
    Queued,
    Training,
    Measuring,
}

impl Task<'_> {
    /// Takes the run to its end, from wherever it stands. `watch` is told what happens, again and again while it trains.
    pub(crate) fn run(&self, stop: &AtomicBool, mut watch: impl FnMut(Phase)) -> Result<Fate> {
        let log = self.study.join("logs").join(format!("{}.log", self.name));
        let Some(log) = ChildLog::open(&log, stop, || watch(Phase::Waiting))? else { return Ok(Fate::Stopped) };
        let mut peak = None;
        if !is_trained(&self.folder(), self.config) {
            let command = if self.folder().exists() { self.resume() } else { self.train(&self.folder()) };
            let exit = log.run(command, stop, |_| watch(Phase::Training))?;
            if exit.was_interrupted() {
                return Ok(Fate::Stopped);
            }
            if let Some(why) = exit.failure(&self.suspects()) {
                return Ok(Fate::Failed(why));
            }
            // Its checkpoints say whether a run is finished: code inside of a block may end the process with any exit code.
            if !is_trained(&self.folder(), self.config) {
                return Ok(Fate::Failed(format!("{UNFINISHED}{}", self.suspects())));
            }
            peak = exit.peak;
        }
        watch(Phase::Measuring);
        let measured = self.measure(&log)?;
        let mut hosts = lease::hosts(self.study, self.name);
        let here = host::name();
        if !hosts.contains(&here) {
            hosts.push(here);
        }
        let (threads, jobs) = (self.threads, self.jobs);
        RunResult { threads, jobs, hosts, peak_bytes: peak, speed: None, measured }.write(&self.folder())?;
        Ok(Fate::Finished)
    }

    /// The run's folder.
    pub(crate) fn folder(&self) -> PathBuf {
        run_folder(self.study, self.name)
    }

    /// Measures the trained model, or says why that failed.
    pub(crate) fn measure(&self, log: &ChildLog) -> Result<Measured> {
        let mut command = self.command();
        command.arg("measure-run").arg(self.folder());
        if let Some(prompt) = self.prompt {
            command.arg("--prompt").arg(prompt);
        }
        let missing = |why| Measured { missing: Some(why), ..Measured::default() };
        let (exit, printed): (Exit, Vec<u8>) = log.ask(command)?;
        Ok(match exit.failure(&self.suspects()) {
            Some(why) => missing(why),
            None if printed.is_empty() => missing(format!("the process ended without a result{}", self.suspects())),
            None => {
                serde_json::from_slice(&printed).unwrap_or_else(|error| missing(format!("not understood: {error}")))
            }
        })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command.env("RAYON_NUM_THREADS", self.threads.to_string());
        for plugin in self.config.plugins() {
            command.arg("--plugin-dir").arg(plugin.path);
        }
        command
    }

    /// The command that begins the run in `folder`, whose configuration was [written](Self::write_config).
    pub(crate) fn train(&self, folder: &Path) -> Command {
        let mut command = self.command();
        command.arg("train").arg(config_file(self.study, self.name)).arg("--until-eof").arg("--out").arg(folder);
        command
    }

    fn resume(&self) -> Command {
        let mut command = self.command();
        command.arg("train").arg("--until-eof").arg("--resume").arg(self.folder());
        command
    }

    /// Writes the configuration that the run begins with.
    pub(crate) fn write_config(&self) -> Result<()> {
        let path = config_file(self.study, self.name);
        files::replace_text(&path, &self.config.to_yaml()?).at(&path)
    }

    /// The plugins that run in the process of a run, for the reason of an end that nothing explains.
    fn suspects(&self) -> String {
        let plugins = self.config.plugins();
        let names =
            plugins.iter().map(|plugin| format!("{} {} ({})", plugin.name, plugin.version, plugin.path.display()));
        match names.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => none,
            names => format!("; it ran code of {names}"),
        }
    }
}

/// The configuration of the run `name` in a study's folder.
pub(crate) fn config_file(study: &Path, name: &str) -> PathBuf {
    study.join("configs").join(format!("{name}.yaml"))
}

/// Whether the run in `folder` has come to the end of what `config` says.
pub(crate) fn is_trained(folder: &Path, config: &RunConfig) -> bool {
    let newest = Shelf::of_run(folder).and_then(|shelf| shelf.newest()).and_then(|checkpoint| checkpoint.state());
    let Ok(state) = newest else { return false };
    let sequence_bytes = state.sequence_bytes.unwrap_or(config.params.input_seq_len);
    let Ok(course) = RunPlan::new(config, sequence_bytes, 1) else { return false };
    let is_stale = config.train.early_stop.is_some_and(|most| state.stale_validations >= most);
    (state.batches >= course.batches || is_stale) && state.valid_loss.is_some()
}

/// The cores of this machine that this process may use, or as many threads as the user asks for.
pub(crate) fn cores() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    number("RAYON_NUM_THREADS").unwrap_or(cores).max(1)
}

/// The number that an environment variable has.
pub(crate) fn number(variable: &str) -> Option<usize> {
    std::env::var(variable).ok()?.parse().ok()
}
