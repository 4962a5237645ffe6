//! A run's folder: `output_dir/name_model-YYYYMMDD-HHMMSS` (UTC), with
//!
//! | file | holds |
//! |---|---|
//! | `config.yaml` | the configuration of the run, and where another one can begin: training with it chains runs |
//! | `data.json` | the data files with sizes and sums, and where relative paths start |
//! | `train.log` | what the terminal showed, with the time |
//! | `loss.csv` | the losses, in the reference package's columns |
//! | `metrics.jsonl`, `tensorboard/` | the [metrics](super::metrics::Metrics) |
//! | `timemem.csv` | [what the first batches cost](crate::journal::timemem) |
//! | `checkpoints/` | [checkpoints](crate::checkpoint::Checkpoint) |
//!
//! It appears under its name only when it is complete, with a first checkpoint, so that a run can always be resumed.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mblm_base::files;
use mblm_core::plugin::host::blame;
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Shelf, Snapshot};
use crate::error::{AtPath, Error, Result};
use crate::journal::line_log::LineLog;
use crate::journal::metrics;
use crate::journal::timestamp::{Timestamp, write_now};

const CONFIG: &str = "config.yaml";
const LOG: &str = "train.log";
const LOSSES: &str = "loss.csv";
/// How the name of a run in the making begins.
const MAKING: &str = ".making-";
/// The longest name of a model or a variant, in bytes: a time, a seed or a suffix is added to it, and a file's name has no
/// more than 255.
pub const LONGEST_NAME: usize = 200;
const MADE_BY: &str = "made by ";

/// How often, and how long apart, the maker of a run looks whether it can have the lock.
const GLANCES: usize = 10;
const GLANCE: Duration = Duration::from_millis(20);

/// The folder of a run that this process alone writes to, or another one that trains with it.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    /// None if another process writes.
    log: Option<File>,
    /// Has it told by which plugin the process was ended.
    _blame: Option<blame::Log>,
}

impl RunFolder {
    /// `log` is locked.
    fn new(path: PathBuf, log: File) -> Result<Self> {
        let copy = log.try_clone().at(&path.join(LOG))?;
        let _blame = Some(blame::log_to(copy, write_now));
        Ok(RunFolder { path, log: Some(log), _blame })
    }

    /// The folder of a run that another process writes to: here it is only read.
    pub fn of_another(path: PathBuf) -> Self {
        RunFolder { path, log: None, _blame: None }
    }

    /// Makes the folder of a new run, which begins with the checkpoint `first`.
    pub fn create(output_dir: &Path, name_model: &str, first: Snapshot) -> Result<Self> {
        let cannot = |error: io::Error| {
            let place = output_dir.display();
            Error::Config(format!(
                "io.output_dir: cannot create a run folder in {place}: {error}; choose a writable folder"
            ))
        };
        fs::create_dir_all(output_dir).map_err(cannot)?;
        let base = format!("{name_model}-{}", Timestamp::now().compact());
        let names = std::iter::once(base.clone()).chain((2..).map(|n| format!("{base}-{n}")));
        for name in names {
            let place = output_dir.join(name);
            if fs::symlink_metadata(&place).is_ok() {
                continue;
            }
            match Making::begin(&place) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                making => return making.map_err(cannot)?.complete(first),
            }
        }
        unreachable!("there is always another number")
    }

    /// As [`create`](Self::create), under the name `place`, which must be free.
    ///
    /// # Errors
    /// The name is taken, or another process makes a run of this name.
    pub fn create_at(place: &Path, first: Snapshot) -> Result<Self> {
        Self::check_free(place)?;
        let cannot = |error| Error::Config(format!("{}: cannot create this folder: {error}", place.display()));
        fs::create_dir_all(files::folder_of(place)).map_err(cannot)?;
        Making::begin(place).map_err(cannot)?.complete(first)
    }

    /// Whether a run can have the name `place`, as far as that can be told without making it.
    ///
    /// # Errors
    /// The name is taken, or is none.
    pub fn check_free(place: &Path) -> Result<()> {
        let refuse = |why: String| Err(Error::Config(format!("{}: {why}", place.display())));
        match place.file_name().map(|name| name.len()) {
            None => refuse("expected a name for the run's folder".into()),
            Some(len) if len > LONGEST_NAME + 40 => refuse(format!(
                "the name has {len} bytes; expected at most {}; choose a shorter one",
                LONGEST_NAME + 40
            )),
            Some(_) if fs::symlink_metadata(place).is_ok() => refuse("already exists; choose another folder".into()),
            Some(_) => Ok(()),
        }
    }

    /// Whether `folder` is that of a run.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(CONFIG).is_file() && folder.join(checkpoint::FOLDER).is_dir()
    }

    /// The run whose folder `path` is or lies in, whether or not `path` is there.
    pub fn around(path: &Path) -> Option<PathBuf> {
        let path = std::path::absolute(path).ok()?;
        let there = path.ancestors().find_map(|folder| folder.canonicalize().ok())?;
        there.ancestors().find(|folder| Self::is_in(folder)).map(Path::to_path_buf)
    }

    /// Opens the folder of an existing run to go on with it.
    ///
    /// # Errors
    /// It is no run's folder, or another process is training in it.
    pub fn open(path: &Path) -> Result<Self> {
        for name in [CONFIG, LOG, checkpoint::FOLDER] {
            if !path.join(name).exists() {
                let path = path.display();
                return Err(Error::Config(format!("{path}: expected a run folder, found no {name} in it")));
            }
        }
        for folder in [path.join(checkpoint::FOLDER)].into_iter().chain(metrics::folders(path)) {
            if fs::symlink_metadata(&folder).is_ok() {
                files::own_folder(&folder).at(&folder)?;
            }
        }
        let log = path.join(LOG);
        match lock(&log).at(&log)? {
            Some(log) => Self::new(path.into(), log),
            None => Err(Error::Config(format!("{}: another process is training in this folder", log.display()))),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration the run was started with.
    pub fn config_yaml(path: &Path) -> Result<String> {
        let path = path.join(CONFIG);
        match files::read_text(&path, files::SMALL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Config(format!(
                "{}: not found; expected a run folder, which contains {CONFIG}",
                path.display()
            ))),
            text => text.at(&path),
        }
    }

    /// Its checkpoints.
    pub fn checkpoints(&self) -> Shelf {
        Shelf::new(self.path.join(checkpoint::FOLDER))
    }

    /// Clears away what an earlier crash left half done.
    pub fn recover(&self) -> Result<()> {
        files::remove_leftovers(&self.path).at(&self.path)?;
        self.checkpoints().recover()
    }

    /// Adds a line to `train.log`. The log never ends a run: a full disk shows when the next checkpoint is saved.
    pub fn note(&self, text: &str) {
        if let Some(mut log) = self.log.as_ref() {
            let _ = writeln!(log, "{} {text}", Timestamp::now());
        }
    }

    /// A handle to append to `train.log`; none if another process writes.
    pub fn log(&self) -> Result<Option<File>> {
        self.log.as_ref().map(|log| log.try_clone().at(&self.path.join(LOG))).transpose()
    }

    /// The losses, without what lies at or after batch `batches`, which a resumed run will see again.
    pub fn losses(&self, batches: u64) -> Result<LossLog> {
        LossLog::open(&self.path, batches)
    }
}

/// Replaces the configuration of the run in `folder`; a crash leaves the old one or the new one.
pub fn replace_config(folder: &Path, config_yaml: &str) -> Result<()> {
    let place = folder.join(CONFIG);
    files::replace_text(&place, config_yaml).at(&place)
}

/// A run's folder in the making, under a hidden name. Whoever makes it holds the lock of its `train.log`, so that the
/// folder of a maker that was killed can be told from one of a maker that lives.
struct Making {
    hidden: PathBuf,
    place: PathBuf,
    log: File,
}

impl Making {
    /// Begins to make `place`, in a folder that is there. What a killed process has left of this run, and of others beside
    /// it, is deleted; what no maker has made is not.
    ///
    /// # Errors
    /// [`ResourceBusy`](io::ErrorKind::ResourceBusy) if another process makes this run. The hidden folder holds something
    /// else.
    fn begin(place: &Path) -> io::Result<Self> {
        let folder = files::folder_of(place);
        remove_abandoned(folder);
        let mut name = OsString::from(MAKING);
        name.push(place.file_name().unwrap_or_default());
        let hidden = folder.join(name);
        let (log, locked) = (hidden.join(LOG), Self::locked(&hidden)?);
        let Some(mut locked) = locked else {
            let who = files::read_text(&log, files::SMALL).unwrap_or_default();
            let who = who.split_once(MADE_BY).map_or("another process", |(_, who)| who.trim());
            let message = format!("{who} is creating this run; wait for it, or choose another folder");
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, message));
        };
        clear(&hidden)?;
        locked.set_len(0)?;
        // At once: half a line would not be known again.
        locked.write_all(format!("{} {MADE_BY}process {}\n", Timestamp::now(), std::process::id()).as_bytes())?;
        Ok(Making { hidden, place: place.into(), log: locked })
    }

    /// The lock of a hidden folder, which is made if it is not there. None if another process keeps it for longer than it
    /// takes to look for abandoned folders.
    fn locked(hidden: &Path) -> io::Result<Option<File>> {
        for _ in 0..GLANCES {
            match Self::try_lock(hidden) {
                Ok(Some(locked)) => return Ok(Some(locked)),
                // It may be deleted as abandoned before it has its lock.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => std::thread::sleep(GLANCE),
            }
        }
        Ok(None)
    }

    fn try_lock(hidden: &Path) -> io::Result<Option<File>> {
        files::own_folder(hidden)?;
        if let Some(foreign) = foreign(hidden)? {
            let message = format!(
                "{} does not belong to a run that is being created; move it away, or choose another folder",
                foreign.display()
            );
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, message));
        }
        let log = hidden.join(LOG);
        // A maker may give the folder its name, and another one begin anew, before the lock is looked at.
        Ok(lock(&log)?.filter(|locked| files::is_at(locked, &log)))
    }

    /// Fills the folder and gives it its name.
    fn complete(self, first: Snapshot) -> Result<RunFolder> {
        let Making { hidden, place, log } = self;
        let folder = files::folder_of(&place);
        let filled = fill(&hidden, first).and_then(|()| {
            fs::rename(&hidden, &place).at(&place)?;
            files::sync_folder(folder).at(folder)
        });
        match filled {
            Ok(()) => RunFolder::new(place, log),
            Err(error) => {
                let _ = fs::remove_dir_all(&hidden); // the error that matters is the first
                Err(error)
            }
        }
    }
}

/// Deletes the runs in `folder` whose makers were killed, as far as that is allowed: others may work in it too.
fn remove_abandoned(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (hidden, log) = (entry.path(), entry.path().join(LOG));
        let is_hidden = entry.file_name().as_encoded_bytes().starts_with(MAKING.as_bytes());
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // Without a log its maker has only just begun.
        if is_hidden && is_folder && files::size(&log).is_ok() && foreign(&hidden).is_ok_and(|found| found.is_none()) {
            // The lock is held until the folder is gone: its maker may have only just begun, and then begins again.
            if let Ok(log) = files::append(&log)
                && log.try_lock().is_ok()
                && files::is_at(&log, &hidden.join(LOG))
            {
                let _ = fs::remove_dir_all(&hidden);
            }
        }
    }
}

/// Something in a hidden folder that no maker of a run has left there: then nothing of it may be deleted.
fn foreign(hidden: &Path) -> io::Result<Option<PathBuf>> {
    let paths = |folder: &Path| fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let checkpoints = hidden.join(checkpoint::FOLDER);
    let mut found = paths(hidden)?;
    if fs::symlink_metadata(&checkpoints).is_ok_and(|found| found.is_dir()) {
        found.extend(paths(&checkpoints)?);
    }
    for path in found {
        let is_made = match path.file_name().and_then(|name| name.to_str()).unwrap_or_default() {
            // It is empty if the maker was killed at once.
            LOG => files::size(&path)? == 0 || made(&path)?.is_some(),
            CONFIG | LOSSES | checkpoint::FOLDER => true,
            name => name.starts_with(files::FRESH) || name.starts_with(checkpoint::PREFIX),
        };
        if !is_made {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// When and by whom a run was made: the first line of its log, which no other run has. None if it is no such line.
pub fn made(log: &Path) -> io::Result<Option<String>> {
    let line = files::lines(files::open(log, files::LOG)?).next().transpose()?;
    let line = line.and_then(|line| String::from_utf8(line).ok());
    Ok(line.filter(|line| line.split_once(MADE_BY).is_some_and(|(time, _)| Timestamp::parse(time).is_some())))
}

/// Deletes all but the log, which is locked.
fn clear(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            _ if entry.file_name() == LOG => {}
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

fn fill(folder: &Path, first: Snapshot) -> Result<()> {
    replace_config(folder, first.config_yaml)?;
    let checkpoints = folder.join(checkpoint::FOLDER);
    fs::create_dir(&checkpoints).at(&checkpoints)?;
    Shelf::new(checkpoints).save(first, 0)?;
    LossLog::open(folder, 0)?;
    Ok(())
}

/// Opens `train.log`, whose lock says that somebody trains here. None if another process holds it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let log = files::append(path)?;
    match log.try_lock() {
        Ok(()) => Ok(Some(log)),
        Err(TryLockError::WouldBlock) => Ok(None),
        // Some network file systems have no locks; that is no reason not to train.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(Some(log)),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// A row of `loss.csv`; the columns are the reference package's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossEntry {
    /// The process whose batch it is of, counted from 0; of a loss that all of them measured, 0.
    pub gpu_rank: u32,
    /// When, in UTC.
    pub timestamp: String,
    /// Elements seen, as `target_elements_strategy` counts them; -1 in the test, as the next three.
    pub elements_seen: i64,
    /// `train`, `valid` or `test`.
    pub kind: String,
    /// The epoch.
    pub epoch: i64,
    /// The batch in the epoch.
    pub batch: i64,
    /// The batch in the data: counted from 0 over all epochs, so that it goes on from one chained run to the next.
    pub cum_batch: i64,
    /// The mean loss in nats.
    pub loss: f64,
    /// The learning rate of the next gradient step, -1 in validation.
    pub lr: f64,
    /// The mean gradient of the last step, -1 in validation and before the first step.
    pub avg_grad: f64,
    /// The same after clipping.
    pub avg_grad_clipped: f64,
}

/// `loss.csv`, open for more rows.
pub struct LossLog(LineLog);

impl LossLog {
    /// Keeps nothing: another process does.
    pub fn nowhere() -> Self {
        LossLog(LineLog::nowhere())
    }
}

const HEADER: &str = "gpu_rank,timestamp,elements_seen,kind,epoch,batch,cum_batch,loss,lr,avg_grad,avg_grad_clipped";

impl LossLog {
    /// Opens or makes the file in a run's folder, keeping the rows of batches below `batches`; a test is run again.
    fn open(folder: &Path, batches: u64) -> Result<Self> {
        let cum_batch = |line: &str| line.split(',').nth(6)?.parse().ok();
        let keep = |line: &str| cum_batch(line).is_some_and(|batch| (0..batches as i64).contains(&batch));
        Ok(LossLog(LineLog::open(folder, LOSSES, Some(HEADER), keep)?))
    }

    /// Adds a row.
    pub fn add(&mut self, entry: &LossEntry) -> Result<()> {
        let mut row = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        let written = row.serialize(entry).map_err(io::Error::from);
        let row = written.and_then(|()| row.into_inner().map_err(|error| error.into_error())).at(Path::new(LOSSES))?;
        self.0.add(String::from_utf8_lossy(&row).trim_end())
    }
}

/// The rows of a `loss.csv`; a last one cut short by a crash is left out.
pub fn read_losses(path: &Path) -> Result<Vec<LossEntry>> {
    let mut reader = csv::Reader::from_reader(files::open(path, files::LOG).at(path)?);
    Ok(reader.deserialize().filter_map(|row| row.ok()).collect())
}

/// Whether the run in `folder` has measured its test split.
pub fn has_test_loss(folder: &Path) -> Result<bool> {
    Ok(read_losses(&folder.join(LOSSES))?.iter().any(|entry| entry.kind == "test"))
}

#[cfg(test)]
mod tests {
    use mblm_base::files::folder_of;

    use super::*;
    use crate::checkpoint::tests::{state, store};
    use crate::trainer::optimizer::{AdamConfig, Optimizer};

    fn create(output_dir: &Path) -> Result<RunFolder> {
        let store = store(1.0);
        let optimizer = Optimizer::new(&store, AdamConfig::default());
        let first = Snapshot { store: &store, optimizer: &optimizer, state: &state(0, None), config_yaml: "a: 1\n" };
        RunFolder::create(output_dir, "m", first)
    }

    fn entry(cum_batch: i64) -> LossEntry {
        LossEntry {
            gpu_rank: 0,
            timestamp: Timestamp::now().to_string(),
            elements_seen: 5,
            kind: "train".into(),
            epoch: 0,
            batch: cum_batch,
            cum_batch,
            loss: 0.1 + 0.2,
            lr: 1e-4 / 3.0,
            avg_grad: -1.0,
            avg_grad_clipped: -1.0,
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_in_place_of_its_folders_are_refused() {
        let (output, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let run = create(output.path()).unwrap().path().to_path_buf();
        let board = run.join("tensorboard");
        for link in [board.clone(), board.join("train"), board.join("test")] {
            fs::create_dir_all(folder_of(&link)).unwrap();
            // It leads to a folder, or nowhere.
            for target in [elsewhere.path().into(), elsewhere.path().join("new")] {
                std::os::unix::fs::symlink(target, &link).unwrap();
                let error = RunFolder::open(&run).unwrap_err().to_string();
                let want = format!("{}: this is a symbolic link; expected a folder", link.display());
                assert_eq!(error, want);
                fs::remove_file(&link).unwrap();
            }
        }
        RunFolder::open(&run).unwrap();
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }

    #[test]
    fn runs_of_the_same_second_get_numbers() {
        let output = tempfile::tempdir().unwrap();
        let make = || create(&output.path().join("deep")).unwrap();
        let runs: Vec<RunFolder> = (0..3).map(|_| make()).collect();
        let mut names: Vec<String> = fs::read_dir(output.path().join("deep"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names.len(), 3, "{names:?}");
        assert!(names.iter().all(|name| name.starts_with("m-2")), "{names:?}");
        assert_eq!(RunFolder::config_yaml(runs[1].path()).unwrap(), "a: 1\n");
        runs[1].checkpoints().newest().unwrap().verify().unwrap();
        assert_eq!(fs::read_to_string(runs[0].path().join(LOSSES)).unwrap(), format!("{HEADER}\n"));
    }

    #[test]
    fn a_run_is_trained_in_by_one_process_at_a_time() {
        let output = tempfile::tempdir().unwrap();
        let run = create(output.path()).unwrap();
        let error = RunFolder::open(run.path()).unwrap_err().to_string();
        assert!(error.contains("another process is training"), "{error}");
        let path = run.path().to_path_buf();
        drop(run);
        RunFolder::open(&path).unwrap();
        let error = RunFolder::open(output.path()).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains("found no config.yaml"), "{error}");
    }

    #[test]
    fn what_a_killed_maker_left_is_taken_over_and_a_live_one_is_named() {
        let output = tempfile::tempdir().unwrap();
        let at = |name: &str| output.path().join(name);
        let killed = |hidden: &Path| {
            fs::create_dir_all(hidden.join("checkpoints/.writing-batch-0000000000")).unwrap();
            fs::write(hidden.join(CONFIG), "half").unwrap();
        };
        // One that died before it had a log, one that died later, and one of another run.
        killed(&at(".making-R"));
        [".making-S", ".making-other-20260101-000000"].iter().for_each(|name| {
            killed(&at(name));
            fs::write(at(name).join(LOG), "").unwrap();
        });
        let make = |place: &Path| {
            let (store, state) = (store(1.0), state(0, None));
            let optimizer = Optimizer::new(&store, AdamConfig::default());
            RunFolder::create_at(
                place,
                Snapshot { store: &store, optimizer: &optimizer, state: &state, config_yaml: "a: 1\n" },
            )
        };
        let run = make(&at("R")).unwrap();
        assert_eq!(RunFolder::config_yaml(run.path()).unwrap(), "a: 1\n");
        assert_eq!(fs::read_dir(run.path().join(checkpoint::FOLDER)).unwrap().count(), 1);
        assert!(!at(".making-other-20260101-000000").exists() && !at(".making-S").exists());

        let alive = Making::begin(&at("S")).unwrap();
        let error = make(&at("S")).unwrap_err();
        let who = format!("process {} is creating this run; wait for it", std::process::id());
        assert!(error.is_configuration() && error.to_string().contains(&who), "{error}");
        make(&at("T")).unwrap();
        assert!(at(".making-S").exists(), "it is not deleted while its maker lives");
        drop(alive);
        make(&at("S")).unwrap();
    }

    /// Another process that looks for abandoned folders may take a new one for such, before its maker has locked it.
    #[test]
    fn a_folder_that_is_deleted_when_it_has_just_begun_is_begun_again() {
        let output = tempfile::tempdir().unwrap();
        let hidden = output.path().join(".making-R");
        fs::create_dir(&hidden).unwrap();
        let looker = lock(&hidden.join(LOG)).unwrap().unwrap();
        let made = std::thread::scope(|scope| {
            let maker = scope.spawn(|| Making::begin(&output.path().join("R")).map(|made| made.hidden));
            std::thread::sleep(2 * GLANCE);
            fs::remove_dir_all(&hidden).unwrap();
            drop(looker);
            maker.join().unwrap()
        });
        assert!(made.is_ok_and(|made| made == hidden && hidden.join(LOG).exists()));
    }

    #[test]
    fn what_no_maker_left_is_not_deleted() {
        for name in ["notes.txt", "checkpoints/notes.txt", LOG] {
            let output = tempfile::tempdir().unwrap();
            let (hidden, other) = (output.path().join(".making-R"), output.path().join(".making-old"));
            for folder in [&hidden, &other] {
                fs::create_dir_all(folder.join("checkpoints")).unwrap();
                fs::write(folder.join(LOG), "").unwrap();
                fs::write(folder.join(name), "precious\n").unwrap();
            }
            let error = Making::begin(&output.path().join("R")).map(|_| ()).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{name} does not belong to a run that is being created; move it away")),
                "{error}"
            );
            for folder in [&hidden, &other] {
                assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), "precious\n");
            }
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_in_a_run_are_not_written_through() {
        use std::os::unix::fs::symlink;
        let (output, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = create(output.path()).unwrap().path().to_path_buf();
        for name in [LOG, checkpoint::FOLDER] {
            let (link, kept) = (path.join(name), path.join("kept"));
            let there = elsewhere.path().join(name);
            fs::rename(&link, &kept).unwrap();
            match kept.is_dir() {
                true => fs::create_dir(&there).unwrap(),
                false => fs::write(&there, "precious").unwrap(),
            }
            symlink(&there, &link).unwrap();
            let error = RunFolder::open(&path).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("this is a symbolic link; expected a"), "{error}");
            fs::remove_file(&link).unwrap();
            fs::rename(&kept, &link).unwrap();
        }
        assert_eq!(fs::read_to_string(elsewhere.path().join(LOG)).unwrap(), "precious");
        RunFolder::open(&path).unwrap();
    }

    #[test]
    fn rows_that_will_be_seen_again_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOSSES);
        let mut log = LossLog::open(folder.path(), 0).unwrap();
        let entries: Vec<LossEntry> = (0..4).chain([-1]).map(entry).collect();
        entries.iter().for_each(|e| log.add(e).unwrap());
        drop(log);
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("0,2024-01-01,5,tra");
        fs::write(&path, text).unwrap();
        let mut log = LossLog::open(folder.path(), 2).unwrap();
        log.add(&entry(2)).unwrap();
        let read = read_losses(&path).unwrap();
        assert_eq!(read[..2], entries[..2]);
        assert_eq!(read.len(), 3);
    }

    #[test]
    fn an_output_folder_that_cannot_be_made_is_a_mistake_of_the_configuration() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = create(&file.path().join("x")).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains("io.output_dir"), "{error}");
    }
}
