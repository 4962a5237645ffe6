//! What is on a shelf: each checkpoint with its losses and whether it is whole.

use std::path::{Path, PathBuf};

use super::shelf::PREFIX;
use super::{Checkpoint, Shelf, TrainState};
use crate::error::{Error, Result};

/// A checkpoint of a run, as far as it can be read.
#[derive(Debug)]
pub struct Entry {
    /// Its folder.
    pub path: PathBuf,
    /// Where the run stood, if that can be read.
    pub state: Option<TrainState>,
    /// Bytes of its files, if they can be read.
    pub bytes: Option<u64>,
    /// What is wrong with it.
    pub fault: Option<Error>,
    /// Whether it saw the most batches.
    pub is_newest: bool,
    /// Whether it has the lowest validation loss.
    pub is_best: bool,
}

impl Entry {
    fn new(path: PathBuf) -> Self {
        let opened = Checkpoint::open(&path);
        let opened = opened.as_ref();
        Entry {
            state: opened.ok().and_then(|checkpoint| checkpoint.state().ok()),
            bytes: opened.ok().map(Checkpoint::bytes),
            fault: check(&path).err(),
            path,
            is_newest: false,
            is_best: false,
        }
    }
}

impl Shelf {
    /// All checkpoints, oldest first, each file of them checked against its sum.
    pub fn survey(&self) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = self.list()?.into_iter().map(Entry::new).collect();
        let best = self.best().ok();
        for entry in &mut entries {
            entry.is_best = best.as_ref().is_some_and(|best| best.path() == entry.path);
        }
        if let Some(newest) = entries.last_mut() {
            newest.is_newest = true;
        }
        Ok(entries)
    }
}

/// Checks every file of a checkpoint against its sum, and that all its tensors are finite.
pub fn check(path: &Path) -> Result<()> {
    Checkpoint::open(path)?.check_contents()
}

/// Whether `path` is called like a checkpoint, and the shelf that it then stands on.
pub fn shelf_of(path: &Path) -> Option<Shelf> {
    let is_checkpoint = path.file_name()?.to_str()?.starts_with(PREFIX) && path.is_dir();
    is_checkpoint.then(|| Shelf::new(path.parent().unwrap_or(Path::new("")).into()))
}
