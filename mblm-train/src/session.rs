//! A run from start to end, as in `mblm train`. Nothing is written until everything has been validated. A run that
//! fails continues from its newest checkpoint, up to the requested number of retries.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mblm_base::terminal;
use mblm_core::simd;
use mblm_data::files::record::DataRecord;
use mblm_data::{self, DatasetOptions, Fingerprint, Splits, unigram_entropy};

use crate::checkpoint::Checkpoint;
use crate::config::{RunConfig, TrainSection};
use crate::error::{Error, Result};
use crate::import;
use crate::journal::folder::{RunFolder, has_test_loss};
use crate::journal::metrics::Metrics;
use crate::journal::timemem::TimeMem;
use crate::model::{Model, TrainModel};
use crate::patches::PatchLengths;
use crate::processes::{Processes, Solo, caught};
use crate::progress::{Course, Progress};
use crate::trainer::plan::RunPlan;
use crate::trainer::{End, Outcome, Record, Trainer, check_data};

/// The pause before the first retry; before each further one it is twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How often a pause looks whether it should end.
const GLANCE: Duration = Duration::from_millis(20);

/// Opens the data that `config` names. Relative paths start at the current directory.
pub fn open_data(config: &RunConfig) -> Result<Splits> {
    open_data_in(config, Path::new(""))
}

/// Opens the data of a run, wherever the program is called from. Relative paths start where they did when the run began:
/// relative to the run's folder if that was moved with its data, else in the same directory as then, else in the current
/// one.
///
/// # Errors
/// Those of the data; where they were looked for, if that is in several places.
pub fn open_data_of(run: &Path, config: &RunConfig) -> Result<(Splits, PathBuf)> {
    let record = DataRecord::read(run);
    let starts = DataRecord::starts(record.as_ref(), run, &config.io.dataset_dir);
    let mut opened = Vec::new();
    for start in &starts {
        let splits = open_data_in(config, start);
        match (splits, &record) {
            (Ok(splits), Some(record)) if record.is_of(&splits.fingerprint) => return Ok((splits, start.clone())),
            (splits, _) => opened.push(splits.map(|splits| (splits, start.clone()))),
        }
    }
    // Data that are not those of the record are refused with the checkpoint, with more to say.
    if let Some(place) = opened.iter().position(Result::is_ok) {
        return opened.swap_remove(place);
    }
    match opened.swap_remove(0) {
        Err(Error::Config(mut message)) => {
            // What is wrong with data that were good once follows from what was done to them.
            let changes = |start: &PathBuf| record.as_ref()?.changed_sizes(&start.join(&config.io.dataset_dir));
            if let Some(changes) = starts.iter().find_map(changes) {
                message += &format!("; since the run was trained, its data files changed: {changes}");
            }
            if starts.len() > 1 {
                let here = std::env::current_dir().unwrap_or_default();
                let tried: Vec<String> = starts.iter().map(|start| here.join(start).display().to_string()).collect();
                message += &format!("; relative paths were tried in {}", tried.join(", "));
            }
            Err(Error::Config(message))
        }
        opened => opened,
    }
}

/// Opens the data that `config` names; relative paths start in `start`.
fn open_data_in(config: &RunConfig, start: &Path) -> Result<Splits> {
    let cut = config.params.cut();
    let options = DatasetOptions {
        dir: &start.join(&config.io.dataset_dir),
        output_dir: Some(&start.join(&config.io.output_dir)),
        args: config.io.dataset_args.as_ref(),
        seq_len: config.params.input_seq_len,
        num_tokens: config.params.model.hierarchy().num_tokens,
        pad_token_id: config.params.model.hierarchy().pad_token_id,
        cut: cut.as_ref(),
    };
    Ok(mblm_data::open(&config.io.dataset_id, &options)?)
}

/// Does what [`Session::train`] does before it makes a run's folder, but for running a sequence: what is wrong with
/// `config` and its data after this is what only training shows. Returns the plan.
///
/// # Errors
/// Mistakes in `config` or its data, or in the checkpoint that it begins with.
pub fn check(model: &dyn TrainModel, splits: Splits, config: &RunConfig) -> Result<RunPlan> {
    let mut trainer = Trainer::new(model, splits, config, &Solo)?;
    if let Some(resume) = &config.resume {
        let warnings = import::begin(&mut trainer, model, resume)?;
        warnings.iter().for_each(|warning| terminal::line(format_args!("warning: {warning}")));
    }
    trainer.check_data()?;
    Ok(trainer.plan().clone())
}

/// Everything that a run is trained with.
pub struct Session<'a> {
    /// Its configuration.
    pub config: &'a RunConfig,
    /// Builds its model: at the start, and for each retry, since a block that panicked is not to be trusted.
    pub build: Box<dyn Fn() -> Result<Box<dyn TrainModel + 'a>> + 'a>,
    /// The run's folder, which must not be there yet; else one with a name of its own in `io.output_dir`.
    pub place: Option<PathBuf>,
    /// After a failure the run goes on from its newest checkpoint, at most so often. Everything that ends training counts
    /// as one but a loss or a gradient that is not finite, which would come again bit for bit.
    pub retries: u32,
    /// For a resumed run: how the configuration differs from that of its newest checkpoint, a line per field.
    pub changes: Vec<String>,
    /// Whether nothing is shown; the run's log has it all.
    pub quiet: bool,
    /// The processes that train it. All of them have a session that differs in nothing else.
    pub processes: &'a dyn Processes,
    /// Set to end with a checkpoint.
    pub stop: &'a AtomicBool,
    /// Whether it trains, so that `stop` will be noticed: at other times nothing is lost if the process just ends.
    pub listening: Option<&'a AtomicBool>,
}

impl<'a> Session<'a> {
    /// A session that trains the model of `config`, without retries.
    ///
    /// # Errors
    /// A block's configuration cannot be written.
    pub fn new(config: &'a RunConfig, stop: &'a AtomicBool) -> Result<Self> {
        let build =
            || Ok(Box::new(Model::at(config, config.train.seed, config.train.place()?)?) as Box<dyn TrainModel>);
        let build = Box::new(build);
        let (place, retries, changes, quiet, listening) = (None, 0, vec![], false, None);
        Ok(Session { config, build, place, retries, changes, quiet, processes: &Solo, stop, listening })
    }

    /// Starts a run and trains until its end, or until `stop` is set. Returns the run's folder and how it ended.
    ///
    /// # Errors
    /// Errors in the configuration or its data, before anything is written. Later: whatever ends the run.
    pub fn train(&self) -> Result<(PathBuf, Outcome)> {
        let started = OnceCell::new();
        let (run, ended) = self.start(&started)?;
        Ok((run.path().into(), self.retry(&run, ended, &started)?))
    }

    /// Resumes a run from its newest checkpoint. The configuration is the run's
    /// [`config.yaml`](RunFolder::config_yaml), or differs from it by [`changes`](Self::changes); then the run keeps it
    /// from now on. A finished run stays as it is.
    ///
    /// # Errors
    /// The newest checkpoint is damaged, or the configuration or the data do not fit it; nothing in the folder has
    /// changed. Later: whatever ends the run.
    pub fn resume(&self, run: &RunFolder) -> Result<Outcome> {
        let started = OnceCell::new();
        let ended = self.go_on(run, &started, self.config, &self.changes)?;
        self.retry(run, ended, &started)
    }

    /// Makes a run and trains it; the inner result is that of the training.
    fn start(&self, started: &OnceCell<Instant>) -> Result<(RunFolder, Result<Outcome>)> {
        let all = self.processes;
        let is_free = self.place.as_ref().map_or(Ok(()), |place| RunFolder::check_free(place));
        all.agree(is_free)?;
        let splits = all.agree(open_data(self.config))?;
        let (about, fingerprint) = (splits.about.clone(), splits.fingerprint.clone());
        let model = all.agree((self.build)())?;
        let mut trainer = all.agree(Trainer::new(&*model, splits, self.config, all))?;
        let begun = match &self.config.resume {
            Some(resume) => import::begin(&mut trainer, &*model, resume),
            None => Ok(vec![]),
        };
        let warnings = all.agree(begun)?;
        trainer.check_data()?;
        all.agree(trainer.rehearse())?;
        trainer.must_be_alike()?;
        let run = self.make_folder(&trainer, &fingerprint)?;
        let mut record = all.agree(self.record(&run, &trainer))?;
        let progress = &mut record.progress;
        progress.line(&format!("run: {}", run.path().display()));
        progress.line(&format!("data: {about}"));
        if let Some(resume) = &self.config.resume {
            progress.line(&format!("starts from the weights of {}", resume.checkpoint_file.display()));
        }
        warnings.iter().for_each(|warning| progress.warn(warning));
        let introduced = if all.is_first() { introduce(progress, &trainer, &*model, self.config) } else { Ok(()) };
        let ended = all.agree(introduced).and_then(|()| self.attempt(&mut trainer, &mut record, started));
        Ok((run, ended))
    }

    /// Makes the run's folder, in the first process; the others learn its name.
    fn make_folder(&self, trainer: &Trainer, fingerprint: &Fingerprint) -> Result<RunFolder> {
        let io = &self.config.io;
        let make = || {
            let run = match &self.place {
                Some(place) => RunFolder::create_at(place, trainer.snapshot())?,
                None => RunFolder::create(&io.output_dir, &io.name_model, trainer.snapshot())?,
            };
            DataRecord::new(run.path(), &io.dataset_dir, Path::new(""), fingerprint).write(run.path())?;
            Ok(Some(run))
        };
        let made = self.processes.agree(if self.processes.is_first() { make() } else { Ok(None) })?;
        let mut path = made.as_ref().map_or_else(Vec::new, |run| run.path().as_os_str().as_encoded_bytes().to_vec());
        self.processes.broadcast(0, &mut path);
        // SAFETY: the first process is the same program on the same kind of system, and has these bytes from a path.
        let path = || PathBuf::from(unsafe { OsString::from_encoded_bytes_unchecked(path) });
        Ok(made.unwrap_or_else(|| RunFolder::of_another(path())))
    }

    /// Trains on from the newest checkpoint, whose configuration is `config` but for `changes`; the inner result is that of
    /// the training.
    fn go_on(
        &self,
        run: &RunFolder,
        started: &OnceCell<Instant>,
        config: &RunConfig,
        changes: &[String],
    ) -> Result<Result<Outcome>> {
        let all = self.processes;
        let checkpoint = all.agree(run.checkpoints().newest())?;
        let (splits, start) = all.agree(open_data_of(run.path(), config))?;
        all.agree(check_data(&checkpoint, &splits.fingerprint))?;
        let about = splits.about.clone();
        let data = DataRecord::new(run.path(), &config.io.dataset_dir, &start, &splits.fingerprint);
        let model = all.agree((self.build)())?;
        let mut trainer = all.agree(Trainer::new(&*model, splits, config, all))?;
        let remarks = all.agree(trainer.restore(&checkpoint))?;
        trainer.must_be_alike()?;
        let is_tested = all.agree(has_test_loss(run.path()))?;
        if trainer.is_finished() && (!trainer.has_test() || is_tested) {
            // A kill may have come while the last checkpoint that was not kept was deleted.
            let recovered = if all.is_first() { run.checkpoints().recover() } else { Ok(()) };
            all.agree(recovered)?;
            self.say_finished(&trainer, &checkpoint);
            let (checkpoint, state) = (checkpoint.path().into(), trainer.state().clone());
            return Ok(Ok(Outcome { checkpoint, end: End::Finished, state }));
        }
        // From here on the folder changes.
        let clear = || {
            run.recover()?;
            Ok(data.write(run.path())?)
        };
        all.agree(if all.is_first() { clear() } else { Ok(()) })?;
        let mut record = all.agree(self.record(run, &trainer))?;
        let (done, total) = (trainer.state().batches, trainer.plan().batches);
        let progress = &mut record.progress;
        progress.line(&format!("resume: batch {done} of {total}, from {}", checkpoint.path().display()));
        progress.line(&format!("data: {about}"));
        changes.iter().for_each(|change| progress.line(&format!("note: the configuration changes: {change}")));
        remarks.notes.iter().for_each(|note| progress.line(note));
        remarks.warnings.iter().for_each(|warning| progress.warn(warning));
        if !changes.is_empty() {
            // The run has the configuration from here on, whatever happens next.
            trainer.save_changed(&mut record)?;
        }
        Ok(self.attempt(&mut trainer, &mut record, started))
    }

    fn say_finished(&self, trainer: &Trainer, checkpoint: &Checkpoint) {
        if self.quiet || !self.processes.is_first() {
            return;
        }
        let (done, place) = (trainer.state().batches, checkpoint.path().display());
        terminal::line(format_args!(
            "finished: all {done} batches are trained, saved {place}; to train further, add --force \
             --set train.target_elements=N with a larger N, and --set train.rewarm_steps_perc=0.1 to warm up again"
        ));
        if !self.changes.is_empty() {
            terminal::line(format_args!("note: nothing is left to train, so the changed configuration is discarded:"));
            self.changes.iter().for_each(|change| terminal::line(format_args!("  {change}")));
        }
    }

    /// Goes on after failures for as long as that is asked for.
    fn retry(&self, run: &RunFolder, mut ended: Result<Outcome>, started: &OnceCell<Instant>) -> Result<Outcome> {
        let mut pause = FIRST_PAUSE;
        for retry in 1..=self.retries {
            let stopped = self.processes.any(self.stopped());
            let error = match ended {
                Err(error) if !error.is_not_finite() && !stopped => error,
                ended => return logged(run, ended),
            };
            let most = self.retries;
            let text = format!("training failed; retry {retry} of {most} in {} s: {error}", pause.as_secs());
            run.note(&text);
            if self.processes.is_first() {
                terminal::line(&text);
            }
            let rested = rest(pause, self.stop);
            if self.processes.any(!rested) {
                return Err(error);
            }
            pause = LONGEST_PAUSE.min(2 * pause);
            // What was fit to train with before is so again, or this is one more failure that may pass.
            ended = self.again(run, started).and_then(|ended| ended);
        }
        logged(run, ended)
    }

    /// Trains on after a failure. The run has its changed configuration by now, and has begun to warm up again if it was to.
    fn again(&self, run: &RunFolder, started: &OnceCell<Instant>) -> Result<Result<Outcome>> {
        let newest = run.checkpoints().newest().and_then(|newest| newest.sizes());
        let rewarm_steps_perc = self.processes.agree(newest)?.train.rewarm_steps_perc;
        let train = TrainSection { rewarm_steps_perc, ..self.config.train.clone() };
        self.go_on(run, started, &RunConfig { train, ..self.config.clone() }, &[])
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Trains; at the end, measures the best model on the test split. A panic, of a block for example, is an error.
    /// `started` is when the first attempt began, from which `train.max_seconds` count.
    fn attempt(&self, trainer: &mut Trainer, record: &mut Record, started: &OnceCell<Instant>) -> Result<Outcome> {
        let training = || {
            let outcome = trainer.run(record, self.stop, *started.get_or_init(Instant::now))?;
            if outcome.end != End::Stopped {
                trainer.test(record, self.stop)?;
            }
            let how = match outcome.end {
                End::Finished => "finished",
                End::TimeLimit => "time limit reached",
                End::Stopped => "interrupted",
            };
            record.progress.summary();
            record.progress.line(&format!("{how}: saved {}", outcome.checkpoint.display()));
            Ok(outcome)
        };
        let listens = |listens| self.listening.into_iter().for_each(|flag| flag.store(listens, Ordering::SeqCst));
        listens(true);
        // From here on every process has something of its own to say.
        terminal::hush(false);
        // Whatever a panic leaves half done is dropped with the trainer and its model.
        let ended = caught(training);
        listens(false);
        ended
    }

    fn record(&self, run: &RunFolder, trainer: &Trainer) -> Result<Record> {
        let state = trainer.state();
        let course = Course {
            batches: trainer.plan().batches,
            done: state.batches,
            done_bytes: state.bytes_seen,
            bytes_per_batch: trainer.bytes_per_batch(),
            best_valid_loss: state.best_valid_loss,
        };
        let Some(log) = run.log()? else {
            return Ok(Record::elsewhere(run.path().into(), run.checkpoints(), course));
        };
        Ok(Record {
            folder: run.path().into(),
            checkpoints: run.checkpoints(),
            losses: run.losses(state.cum_batch())?,
            metrics: Metrics::open(run.path(), state.cum_batch())?,
            timemem: TimeMem::open(run.path(), state.first_batch, state.cum_batch())?,
            progress: Progress::new(log, course, self.quiet),
        })
    }
}

/// Waits; false if `stop` is raised meanwhile or was before.
pub fn rest(pause: Duration, stop: &AtomicBool) -> bool {
    let started = Instant::now();
    while !stop.load(Ordering::Relaxed) && started.elapsed() < pause {
        std::thread::sleep(GLANCE);
    }
    !stop.load(Ordering::Relaxed)
}

/// Notes an error in the run's log; the program shows it.
fn logged(run: &RunFolder, ended: Result<Outcome>) -> Result<Outcome> {
    ended.inspect_err(|error| run.note(&format!("error: {error}")))
}

/// Says what is going to be trained on what.
fn introduce(progress: &mut Progress, trainer: &Trainer, model: &dyn TrainModel, config: &RunConfig) -> Result<()> {
    if let Some(counts) = trainer.training_data().dataset.byte_counts()? {
        let entropy = unigram_entropy(&counts);
        progress.line(&format!("byte-unigram entropy of the training bytes: {entropy:.4} bits"));
        let pad = config.params.model.hierarchy().pad_token_id;
        if let Some(count @ 1..) = counts.get(pad) {
            progress.warn(&format!(
                "the pad token {pad} is also a byte of the training data ({count} times), which is not \
                 learned; a pad_token_id of 256 or more avoids that"
            ));
        }
    }
    let (batches, hierarchy) = (trainer.training_data(), config.params.model.hierarchy());
    if let Some(patches) = PatchLengths::measure(hierarchy, &*batches.dataset, batches.seq_len)? {
        progress.line(&format!(
            "patches: {:.2} bytes on average, {:.1}% end because they are full; sequences of {} patches",
            patches.mean(),
            100.0 * patches.full,
            config.params.cut().map_or(0, |cut| cut.patches),
        ));
        patches.warning().iter().for_each(|warning| progress.warn(warning));
    }
    let plan = trainer.plan();
    progress.line(&format!("model: {} parameters", model.params().num_elements()));
    let each = match trainer.state().processes {
        1 => String::new(),
        size => format!("{size} processes, each with its share of the data and "),
    };
    progress.line(&format!(
        "training: {each}{} batches of {} x {} bytes, {} gradient steps, {} batches per epoch",
        plan.batches,
        config.train.batch_size,
        trainer.sequence_bytes(),
        plan.steps,
        trainer.training_data().num_batches(0)
    ));
    match plan.batches % plan.accumulate {
        0 => {}
        left => progress.line(&format!(
            "training: the last gradient step is of {left} batch(es), fewer than gradient_accumulate_every ({})",
            plan.accumulate
        )),
    }
    progress.line(&format!("learning rate schedule: {}", plan.describe_rates(&config.train, 0)));
    let device = trainer.state().device.as_deref().unwrap_or("cpu");
    let (threads, instructions) = (rayon::current_num_threads(), simd::instruction_set());
    let each = if trainer.state().processes > 1 { " each" } else { "" };
    progress.line(&format!("device: {device}, threads: {threads}{each}, instruction set: {instructions}"));
    Ok(())
}
