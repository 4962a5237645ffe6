//! `data.json` in a run's folder: what the run is trained on, and where its relative paths start.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mblm_base::files;
use serde::{Deserialize, Serialize};

use crate::error::{AtPath, Result};
use crate::files::fingerprint::{FileSum, Fingerprint};
use crate::files::listing::{relative, root};

pub(crate) const FILE: &str = "data.json";

/// What a run read, and from where.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct DataRecord {
    /// `io.dataset_dir`, as the configuration has it.
    dataset_dir: String,
    /// The folder where relative paths start; `None` if its name is not UTF-8.
    paths_start_in: Option<String>,
    /// The way there from the run's folder, for a project that is moved as a whole.
    from_run_folder: Option<String>,
    /// As in the run's checkpoints.
    fingerprint: String,
    /// The data files, in the order in which they are read.
    files: Vec<FileSum>,
}

impl DataRecord {
    /// What a run whose paths start in `start` reads.
    pub fn new(run: &Path, dataset_dir: &str, start: &Path, fingerprint: &Fingerprint) -> Self {
        let start = fs::canonicalize(if start.as_os_str().is_empty() { Path::new(".") } else { start }).ok();
        let from_run = start.as_ref().zip(fs::canonicalize(run).ok()).map(|(start, run)| relative(start, &run));
        let text = |path: &PathBuf| path.to_str().map(String::from);
        DataRecord {
            dataset_dir: dataset_dir.into(),
            paths_start_in: start.as_ref().and_then(text),
            from_run_folder: from_run.as_ref().and_then(text),
            fingerprint: fingerprint.as_str().into(),
            files: fingerprint.files().to_vec(),
        }
    }

    /// The record in a run's folder, if there is one that can be read.
    pub fn read(run: &Path) -> Option<Self> {
        serde_json::from_slice(&files::read(&run.join(FILE), files::LOG).ok()?).ok()
    }

    /// Has the run's folder hold this record.
    pub fn write(&self, run: &Path) -> Result<()> {
        if Self::read(run).as_ref() == Some(self) {
            return Ok(());
        }
        let path = run.join(FILE);
        files::replace(&path, |file| serde_json::to_writer_pretty(file, self).map_err(io::Error::from))
            .map(drop)
            .at(&path)
    }

    /// The folders where the relative paths of `dataset_dir` may start, the likeliest first; an empty path is the current
    /// directory. A place for the data that is not the recorded one was given since, and starts in the current directory.
    pub fn starts(record: Option<&Self>, run: &Path, dataset_dir: &str) -> Vec<PathBuf> {
        let mut starts = vec![];
        if Path::new(dataset_dir).is_absolute() {
            return vec![PathBuf::new()];
        }
        if let Some(record) = record.filter(|record| record.dataset_dir == dataset_dir) {
            let beside_run = record.from_run_folder.as_ref().and_then(|way| fs::canonicalize(run.join(way)).ok());
            starts.extend(beside_run);
            starts.extend(record.paths_start_in.as_ref().map(PathBuf::from));
        }
        let here = env::current_dir().unwrap_or_default();
        starts.dedup();
        // Paths are shown as the user wrote them where that is the same.
        starts.iter_mut().filter(|start| **start == here).for_each(|start| *start = PathBuf::new());
        if !starts.contains(&PathBuf::new()) {
            starts.push(PathBuf::new());
        }
        starts
    }

    /// Whether the data are those of the record.
    pub fn is_of(&self, fingerprint: &Fingerprint) -> bool {
        fingerprint.is(&self.fingerprint)
    }

    /// Which files have another size now, or are missing, if some are there. For data that cannot be opened any more.
    pub fn changed_sizes(&self, place: &Path) -> Option<String> {
        let root = root(place);
        let size = |file: &FileSum| Some(FileSum { bytes: files::size(&root.join(&file.file)).ok()?, ..file.clone() });
        let now: Vec<FileSum> = self.files.iter().filter_map(size).collect();
        if now.is_empty() || now == self.files {
            return None;
        }
        Some(Fingerprint::new(now, String::new()).changes(&self.files))
    }

    /// Which files are not as they were when `checkpoint` was made, which keeps the fingerprint `saved`.
    pub fn changes(checkpoint: &Path, saved: &str, now: &Fingerprint) -> String {
        if Fingerprint::has_contents(now.as_str()) && !Fingerprint::has_contents(saved) {
            return "files were added, removed, renamed or resized since, or an earlier version of this program counted \
                    hidden files in globs or one file twice"
                .into();
        }
        let run = checkpoint.ancestors().nth(2);
        match run.and_then(Self::read).filter(|record| record.fingerprint == saved && !now.files().is_empty()) {
            Some(record) => now.changes(&record.files),
            None => "files were added, removed, renamed or changed since".into(),
        }
    }
}
