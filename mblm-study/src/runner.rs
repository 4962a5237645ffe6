//! Trains the runs of a plan, each in a process of its own, some at a time; what has been done before is not done again.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mblm_base::files;
use mblm_train::config::RunConfig;
use mblm_train::cost::bytes as binary;
use mblm_train::error::{AtPath, Error, Result};
use mblm_train::journal::metrics::Kind;
use mblm_train::session::open_data;

use crate::course::outcome::{Outcome, UNFIT, outcomes, why_lost};
use crate::course::{Course, PlannedRun, follow};
use crate::design::budget::Amount;
use crate::folder::failure_file;
use crate::launch::{Launch, lease};
use crate::plan::Plan;
use crate::progress::{Display, RunBar};
use crate::report::{Run, RunResult, duration, with_unit};
use crate::task::{Fate, Phase, Task, cores, is_trained};

const LOG: &str = "study.log";
/// How often the metrics of a running run are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How runs are started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The program, whose `train` and `measure-run` are called.
    pub program: PathBuf,
    /// Try runs again that failed.
    pub retry_failed: bool,
    /// Move runs that no longer fit the study out of the way.
    pub force: bool,
    /// With a launcher: so many starts of a run in a row may bring it no further.
    pub tries: u32,
}

/// How a study ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ended {
    /// Runs that are finished.
    pub finished: usize,
    /// Runs that failed, with the reason.
    pub failed: Vec<(String, String)>,
    /// Variants that could not be tuned and are not scored, with the reason.
    pub lost: Vec<(String, String)>,
    /// Whether runs are left to do.
    pub interrupted: bool,
}

/// Runs a plan. While it lives, no other process can run the same study.
pub struct Runner<'p, 'r> {
    pub(crate) plan: &'p mut Plan<'r>,
    options: Options,
    log: File,
}

impl<'p, 'r> Runner<'p, 'r> {
    /// Opens the study's folder.
    ///
    /// # Errors
    /// Another process runs this study.
    pub fn new(plan: &'p mut Plan<'r>, options: Options) -> Result<Self> {
        let folder = plan.folder();
        for name in ["configs", "runs", "logs", "failed"] {
            let place = folder.join(name);
            fs::create_dir_all(&place).map_err(|error| {
                Error::Config(format!(
                    "output_dir: cannot create {}: {error}; choose a writable folder",
                    place.display()
                ))
            })?;
        }
        let path = folder.join(LOG);
        let log = files::append(&path).at(&path)?;
        match log.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Config(format!("{}: another process runs this study", path.display())));
            }
            Err(TryLockError::Error(error)) if error.kind() != std::io::ErrorKind::Unsupported => {
                return Err(Error::Io { path, error });
            }
            _ => {}
        }
        for folder in [folder.to_path_buf(), folder.join("configs"), folder.join("failed")] {
            files::remove_leftovers(&folder).at(&folder)?;
        }
        lease::revoke_all(folder)?;
        plan.write()?;
        Ok(Runner { plan, options, log })
    }

    /// What is run.
    pub fn plan(&self) -> &Plan<'r> {
        self.plan
    }

    /// Runs what is left to do, until the study has come to its end or `stop` is raised; `after` is called after each run,
    /// one call at a time.
    pub fn run(&self, stop: &AtomicBool, after: &(dyn Fn() + Sync)) -> Result<Ended> {
        if self.options.retry_failed {
            self.forget_failures()?;
        }
        let log = self.log.try_clone().at(&self.plan.folder().join(LOG))?;
        let display = Display::new(log);
        let mut shown = BTreeSet::new();
        loop {
            let course = self.fitting_course(&display)?;
            self.expect(&course, &display);
            for run in course.runs().filter(|run| course.has_ended(run)) {
                if shown.insert(run.name.clone()) {
                    self.ended_before(run, &display)?;
                }
            }
            if course.next.is_empty() || stop.load(Ordering::Relaxed) {
                return self.ended(&course);
            }
            self.train_all(&course.next, &display, stop, after)?;
            shown.extend(course.next.iter().map(|run| run.name.clone()));
        }
    }

    /// Where the study stands, with runs that fit it. Runs of a later round may be of an earlier design too.
    fn fitting_course(&self, display: &Display) -> Result<Course> {
        let misfits = self.plan.misfits()?;
        if !misfits.is_empty() && !self.options.force {
            return Err(self.plan.refused(&[], &misfits));
        }
        self.plan.replace(misfits)?.iter().for_each(|line| display.line(line));
        Ok(self.course())
    }

    /// Where the study stands.
    pub(crate) fn course(&self) -> Course {
        follow(&self.plan.file(), &outcomes(self.plan.folder()))
    }

    /// Failed runs are as if they had not been begun. Tries that diverged have not failed.
    fn forget_failures(&self) -> Result<()> {
        let course = self.course();
        let tries = course.units.iter().flat_map(|unit| &unit.searches).flat_map(|search| &search.tries);
        let failed = tries.filter(|tried| tried.outcome == Outcome::Failed).flat_map(|tried| &tried.runs);
        for run in failed.chain(&course.scoring) {
            let failure = self.failure_file(run);
            if failure.exists() && RunResult::read(&self.plan.run_folder(run)).is_none() {
                fs::remove_file(&failure).at(&failure)?;
            }
        }
        Ok(())
    }

    /// Tells the display how much there is to do, at least.
    fn expect(&self, course: &Course, display: &Display) {
        let known: f64 = course.next.iter().map(|run| self.work(run)).sum();
        let ahead = course.ahead(&self.plan.file());
        let later: f64 = ahead.iter().map(|(variant, share)| share * self.work_of(*variant)).sum();
        let width = course.runs().map(|run| run.name.chars().count()).max().unwrap_or(0);
        display.expect(course.runs().count() + ahead.len(), known + later, width);
    }

    /// Trains runs, so many at a time.
    fn train_all(
        &self,
        runs: &[PlannedRun],
        display: &Display,
        stop: &AtomicBool,
        after: &(dyn Fn() + Sync),
    ) -> Result<()> {
        let queue: Mutex<VecDeque<&PlannedRun>> = Mutex::new(runs.iter().collect());
        let all: Mutex<Result<()>> = Mutex::new(Ok(()));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let worker = || {
            while let Some(run) = next() {
                let result = self.run_one(run, display, stop);
                let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = result {
                    // The study itself is in trouble, its folder for example: nothing more is begun.
                    *all = std::mem::replace(&mut *all, Ok(())).and(Err(error));
                    stop.store(true, Ordering::SeqCst);
                }
                after();
            }
        };
        std::thread::scope(|scope| (0..self.plan.spec.jobs).for_each(|_| drop(scope.spawn(worker))));
        all.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// The result of the study when no run is left to start. A try that diverged is a measurement; a variant whose
    /// tries all diverged is a failure.
    fn ended(&self, course: &Course) -> Result<Ended> {
        let mut ended = Ended { interrupted: !course.next.is_empty(), ..Ended::default() };
        for (unit, lost) in course.units.iter().filter_map(|unit| Some((unit, unit.lost.as_ref()?))) {
            let name = &self.plan.variants[unit.variants[0]].about.name;
            let why = why_lost(self.plan.folder(), self.plan.spec.tune.as_ref(), lost);
            ended.lost.push((name.clone(), why));
        }
        for run in &course.scoring {
            match RunResult::read(&self.plan.run_folder(run)) {
                Some(_) => ended.finished += 1,
                None if course.has_ended(run) => {
                    let failure = self.failure_file(run);
                    ended.failed.push((run.name.clone(), files::read_text(&failure, files::SMALL).at(&failure)?));
                }
                None => {}
            }
        }
        Ok(ended)
    }

    /// What a run costs, in units that are the same for all.
    fn work(&self, run: &PlannedRun) -> f64 {
        run.share * self.work_of(run.variant)
    }

    fn work_of(&self, variant: usize) -> f64 {
        let about = &self.plan.variants[variant].about;
        match self.plan.spec.budget.amount {
            Amount::Seconds(seconds) => seconds,
            _ => about.bytes.unwrap_or(1) as f64 * about.cost.total.flops_per_byte.unwrap_or(1.0),
        }
    }

    fn failure_file(&self, run: &PlannedRun) -> PathBuf {
        failure_file(self.plan.folder(), &run.name)
    }

    /// Shows a run that ended before this call.
    fn ended_before(&self, run: &PlannedRun, display: &Display) -> Result<()> {
        let folder = self.plan.run_folder(run);
        if RunResult::read(&folder).is_some() {
            display.ended(&run.name, &format!("{}  (done before)", summary(&folder)));
            return Ok(());
        }
        let failure = self.failure_file(run);
        let why = files::read_text(&failure, files::SMALL).at(&failure)?;
        display.ended(&run.name, &format!("failed before: {}; try again with --retry-failed", first_line(&why)));
        Ok(())
    }

    /// Takes one run to its end, from wherever it stands.
    fn run_one(&self, run: &PlannedRun, display: &Display, stop: &AtomicBool) -> Result<()> {
        if stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let (folder, failure) = (self.plan.run_folder(run), self.failure_file(run));
        let fate = self.train_and_measure(run, display, stop)?;
        match &fate {
            Fate::Finished => display.ended(&run.name, &summary(&folder)),
            Fate::Failed(why) => {
                files::replace_text(&failure, why).at(&failure)?;
                display.ended(&run.name, &format!("failed: {}", first_line(why)));
            }
            Fate::Stopped => display.line(&format!("{} is stopped", run.name)),
        }
        Ok(())
    }

    fn train_and_measure(&self, run: &PlannedRun, display: &Display, stop: &AtomicBool) -> Result<Fate> {
        let folder = self.plan.run_folder(run);
        let config = match self.plan.config(run) {
            Ok(config) => config,
            // An extended grid may reach values that a field does not accept.
            Err(error) => return Ok(Fate::Failed(format!("{UNFIT}: {error}"))),
        };
        let bytes = config.train.target_elements;
        let mut bar = display.begin(&run.name, self.work(run));
        if !is_trained(&folder, &config)
            && let Err(error) = self.check_data(run, &config)
        {
            return Ok(Fate::Failed(error.to_string()));
        }
        let mut looked = Instant::now();
        let watch = |phase| match phase {
            Phase::Waiting => {
                display.line(&format!("{}: waiting for the process of an earlier start to end", run.name));
            }
            Phase::Queued => bar.say("queued".into()),
            Phase::Training if looked.elapsed() >= LOOK => {
                looked = Instant::now();
                look(&folder, bytes, &mut bar);
            }
            Phase::Training => {}
            Phase::Measuring => bar.at(1.0, "measuring".into()),
        };
        let task = self.task(&run.name, &config, self.plan.spec.jobs);
        task.write_config()?;
        match &self.plan.spec.launcher {
            None => task.run(stop, watch),
            Some(launcher) => {
                let tries = self.options.tries;
                let say = |text: &str| display.line(&format!("{}: {text}", run.name));
                Launch { launcher, task: &task, tries }.run(stop, &say, watch)
            }
        }
    }

    /// Whether the data are still those of the plan: runs on other data cannot be compared.
    fn check_data(&self, run: &PlannedRun, config: &RunConfig) -> Result<()> {
        let (planned, now) = (&self.plan.variants[run.variant].data, open_data(config)?.fingerprint);
        match now.is(planned.as_str()) {
            true => Ok(()),
            false => Err(Error::Config(format!(
                "io.dataset_dir: the data are not those that the study started with: {}; restore them",
                now.changes(planned.files())
            ))),
        }
    }

    /// One of so many runs at a time.
    pub(crate) fn task<'t>(&'t self, name: &'t str, config: &'t RunConfig, jobs: usize) -> Task<'t> {
        let Plan { spec, .. } = &self.plan;
        Task {
            program: &self.options.program,
            study: &spec.output_dir,
            name,
            config,
            prompt: spec.prompt.as_deref(),
            jobs,
            threads: (cores() / jobs).max(1),
        }
    }
}

/// Shows where a running run is.
fn look(folder: &Path, bytes: u64, bar: &mut RunBar<'_>) {
    let Ok(run) = Run::read(folder) else { return };
    let last =
        |kind| run.of_kind(kind).last().and_then(|point| point.bpb).map_or("-".into(), |bpb| format!("{bpb:.3}"));
    let rate = run.points.iter().rev().find_map(|point| point.rate).unwrap_or_default();
    let share = run.bytes().unwrap_or_default() / bytes.max(1) as f64;
    let rate = with_unit(rate, "B/s");
    bar.at(share, format!("bpb {} train, {} valid  {rate}", last(Kind::Train), last(Kind::Valid)));
}

/// What a finished run reached, in a line.
fn summary(folder: &Path) -> String {
    let Ok(run) = Run::read(folder) else { return "finished".into() };
    let bpb = run.valid_bpb().map_or("no validation".into(), |bpb| format!("{bpb:.4} bpb"));
    let rate = run.train_rate().map_or(String::new(), |rate| format!("  {:>9}", with_unit(rate, "B/s")));
    let peak = run.peak_bytes().map_or(String::new(), |peak| format!("  {:>8}", binary(peak)));
    let time = run.seconds().map_or(String::new(), |s| format!("  {}", duration(s)));
    format!("{bpb}{rate}{peak}{time}")
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
