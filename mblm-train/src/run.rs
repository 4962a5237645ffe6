//! A run's folder: `output_dir/name_model-YYYYMMDD-HHMMSS` (UTC), with
//!
//! | file | holds |
//! |---|---|
//! | `config.yaml` | the configuration of the run, and where another one can begin: training with it chains runs |
//! | `data.json` | the data files with sizes and sums, and where relative paths start |
//! | `train.log` | what the terminal showed, with the time |
//! | `loss.csv` | the losses, in the reference package's columns |
//! | `metrics.jsonl`, `tensorboard/` | the [metrics](crate::metrics) |
//! | `timemem.csv` | [what the first batches cost](crate::timemem) |
//! | `checkpoints/` | [checkpoints](crate::checkpoint) |
//!
//! It appears under its name only when it is complete, with a first checkpoint, so that a run can always be resumed.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Shelf, Snapshot};
use crate::error::{AtPath, Error, Result};
use crate::files;
use crate::line_log::LineLog;
use crate::timestamp::Timestamp;

const CONFIG: &str = "config.yaml";
const LOG: &str = "train.log";
const LOSSES: &str = "loss.csv";

/// The folder of a run that this process alone trains in.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    log: File,
}

impl RunFolder {
    /// Makes the folder of a new run, which begins with the checkpoint `first`.
    pub fn create(output_dir: &Path, name_model: &str, first: Snapshot) -> Result<Self> {
        let cannot = |error: io::Error| {
            let place = output_dir.display();
            Error::Config(format!(
                "io.output_dir: cannot make a run folder in {place}: {error}; choose a writable folder"
            ))
        };
        fs::create_dir_all(output_dir).map_err(cannot)?;
        let base = format!("{name_model}-{}", Timestamp::now().compact());
        let names = std::iter::once(base.clone()).chain((2..).map(|n| format!("{base}-{n}")));
        for name in names {
            let (place, making) = (output_dir.join(&name), output_dir.join(format!(".making-{name}")));
            if place.exists() {
                continue;
            }
            match fs::create_dir(&making) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made.map_err(cannot)?,
            }
            return Self::complete(&making, &place, output_dir, first);
        }
        unreachable!("there is always another number")
    }

    /// As [`create`](Self::create), under the name `place`, which must be free.
    pub fn create_at(place: &Path, first: Snapshot) -> Result<Self> {
        let (Some(name), folder) = (place.file_name(), place.parent().unwrap_or(Path::new(""))) else {
            return Err(Error::Config(format!("{}: expected a name for the run's folder", place.display())));
        };
        if place.exists() {
            return Err(Error::Config(format!("{}: exists already; name another folder", place.display())));
        }
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let cannot = |error| Error::Config(format!("{}: cannot make this folder: {error}", place.display()));
        fs::create_dir_all(folder).map_err(cannot)?;
        let making = folder.join(format!(".making-{}", name.to_string_lossy()));
        fs::create_dir(&making).map_err(cannot)?;
        Self::complete(&making, place, folder, first)
    }

    /// Fills a folder and gives it its name.
    fn complete(making: &Path, place: &Path, parent: &Path, first: Snapshot) -> Result<Self> {
        let filled = fill(making, first).and_then(|log| {
            fs::rename(making, place).at(place)?;
            files::sync_folder(parent).at(parent)?;
            Ok(log)
        });
        match filled {
            Ok(log) => Ok(RunFolder { path: place.into(), log }),
            Err(error) => {
                let _ = fs::remove_dir_all(making); // the error that matters is the first
                Err(error)
            }
        }
    }

    /// Opens the folder of an existing run to go on with it.
    ///
    /// # Errors
    /// It is no run's folder, or another process is training in it.
    pub fn open(path: &Path) -> Result<Self> {
        for name in [CONFIG, LOG, checkpoint::FOLDER] {
            if !path.join(name).exists() {
                let path = path.display();
                return Err(Error::Config(format!("{path}: expected the folder of a run, found no {name} in it")));
            }
        }
        let log = open_log(&path.join(LOG))?;
        Ok(RunFolder { path: path.into(), log })
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
                "{}: not found; expected the folder of a run, which holds {CONFIG}",
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
        let _ = writeln!(&self.log, "{} {text}", Timestamp::now());
    }

    /// A handle to append to `train.log`.
    pub fn log(&self) -> Result<File> {
        self.log.try_clone().at(&self.path.join(LOG))
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

fn fill(folder: &Path, first: Snapshot) -> Result<File> {
    replace_config(folder, first.config_yaml)?;
    let checkpoints = folder.join(checkpoint::FOLDER);
    fs::create_dir(&checkpoints).at(&checkpoints)?;
    Shelf::new(checkpoints).save(first, 0)?;
    LossLog::open(folder, 0)?;
    open_log(&folder.join(LOG))
}

/// Opens `train.log`, whose lock says that somebody trains here.
fn open_log(path: &Path) -> Result<File> {
    let log = files::append(path).at(path)?;
    match log.try_lock() {
        Ok(()) => Ok(log),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Config(format!("{}: another process is training in this folder", path.display())))
        }
        // Some network file systems have no locks; that is no reason not to train.
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(log),
        Err(TryLockError::Error(error)) => Err(Error::Io { path: path.into(), error }),
    }
}

/// A row of `loss.csv`; the columns are the reference package's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossEntry {
    /// Always 0: one process trains.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::{state, store};
    use crate::optimizer::{Adam, AdamConfig};

    fn create(output_dir: &Path) -> Result<RunFolder> {
        let store = store(1.0);
        let adam = Adam::new(&store, AdamConfig::default());
        let first = Snapshot { store: &store, adam: &adam, state: &state(0, None), config_yaml: "a: 1\n" };
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
