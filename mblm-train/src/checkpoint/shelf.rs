//! The checkpoints of a run: saves the next, finds the newest or the best, and deletes the others.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use mblm_base::files;

use super::{Checkpoint, MANIFEST, Snapshot};
use crate::error::{AtPath, Error, Result};

/// The folder of a run that holds its checkpoints.
pub(crate) const FOLDER: &str = "checkpoints";

/// How the name of a checkpoint begins.
pub(crate) const PREFIX: &str = "batch-";
/// Names that are never taken for a checkpoint: one being written, one being replaced, one being deleted.
const WRITING: &str = ".writing-";
const REPLACED: &str = ".replaced-";
const DELETING: &str = ".deleting-";

/// Which checkpoint of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Which {
    /// The one that saw the most batches.
    #[default]
    Newest,
    /// The one with the lowest validation loss.
    Best,
}

/// Opens what `path` names: the folder of a checkpoint, or of a run, of which `which` is taken.
pub fn find(path: &Path, which: Which) -> Result<Checkpoint> {
    if path.join(MANIFEST).is_file() {
        return Checkpoint::open(path);
    }
    let shelf = Shelf::of_run(path)?;
    match which {
        Which::Newest => shelf.newest(),
        Which::Best => shelf.best(),
    }
}

/// The checkpoints in a folder, named by the number of batches they saw.
#[derive(Clone, Debug)]
pub struct Shelf {
    folder: PathBuf,
}

impl Shelf {
    /// The checkpoints in `folder`.
    pub fn new(folder: PathBuf) -> Self {
        Shelf { folder }
    }

    /// The checkpoints of the run at `path`.
    ///
    /// # Errors
    /// It is no run's folder.
    pub fn of_run(path: &Path) -> Result<Self> {
        let folder = path.join(FOLDER);
        if !folder.is_dir() {
            return Err(Error::Config(format!(
                "{}: expected a run folder (with {FOLDER}/) or a checkpoint (with {MANIFEST}), found neither",
                path.display()
            )));
        }
        Ok(Shelf::new(folder))
    }

    /// Their folders, oldest first. One that a crash left between the two renames of its replacement is there too.
    pub fn list(&self) -> Result<Vec<PathBuf>> {
        let batches = |name: &str| {
            let original = name.strip_prefix(REPLACED).filter(|original| !self.folder.join(original).exists());
            original.unwrap_or(name).strip_prefix(PREFIX)?.parse().ok()
        };
        let names = self.names()?.into_iter();
        let mut found: Vec<(u64, PathBuf)> =
            names.filter_map(|name| Some((batches(&name)?, self.folder.join(name)))).collect();
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }

    fn names(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.folder).at(&self.folder)?;
        entries.map(|entry| Ok(entry.at(&self.folder)?.file_name().to_string_lossy().into_owned())).collect()
    }

    /// The newest checkpoint; if it is damaged, that is an error, and the message names an older one that is whole.
    pub fn newest(&self) -> Result<Checkpoint> {
        let mut paths = self.list()?;
        let newest = paths.pop().ok_or_else(|| Error::checkpoint(&self.folder, "no checkpoint yet"))?;
        let checked = |path: &Path| Checkpoint::open(path).and_then(|found| found.verify().map(|()| found));
        checked(&newest).map_err(|error| match paths.iter().rev().find_map(|path| checked(path).ok()) {
            Some(older) => Error::checkpoint(
                &newest,
                format!(
                    "{error}; {} is intact: to continue from there, delete or move the damaged one",
                    older.path.display()
                ),
            ),
            None => error,
        })
    }

    /// The checkpoint with the lowest validation loss.
    pub fn best(&self) -> Result<Checkpoint> {
        let ranked = self.ranked()?;
        let (path, _) =
            ranked.first().ok_or_else(|| Error::checkpoint(&self.folder, "no checkpoint has been validated"))?;
        Checkpoint::open(path)
    }

    /// The readable checkpoints that were validated, best first; of equals the older.
    fn ranked(&self) -> Result<Vec<(PathBuf, f64)>> {
        let mut ranked = Vec::new();
        for path in self.list()? {
            if let Some(loss) = Checkpoint::open(&path).and_then(|found| found.state()).ok().and_then(|s| s.valid_loss)
            {
                ranked.push((path, loss));
            }
        }
        ranked.sort_by(|a, b| a.1.total_cmp(&b.1));
        Ok(ranked)
    }

    /// Saves a checkpoint; then, the new one being safe, deletes all but it and the `keep_best` best.
    pub fn save(&self, snapshot: Snapshot, keep_best: usize) -> Result<PathBuf> {
        let name = format!("{PREFIX}{:010}", snapshot.state.batches);
        let (writing, replaced) = (self.at(WRITING, &name), self.at(REPLACED, &name));
        remove(&writing)?;
        let written = snapshot.write(&writing).and_then(|()| Checkpoint::open(&writing)?.verify());
        if let Err(error) = written {
            let _ = fs::remove_dir_all(&writing); // the error that matters is the first
            return Err(error);
        }
        let place = self.folder.join(&name);
        if fs::symlink_metadata(&place).is_ok() {
            remove(&replaced)?;
            fs::rename(&place, &replaced).at(&place)?;
        }
        fs::rename(&writing, &place).at(&place)?;
        files::sync_folder(&self.folder).at(&self.folder)?;
        remove(&replaced)?;
        self.prune(&place, keep_best)?;
        Ok(place)
    }

    /// Deletes all but `newest` and the `keep_best` best. What cannot be read is left for its owner to look at.
    fn prune(&self, newest: &Path, keep_best: usize) -> Result<()> {
        let ranked = self.ranked()?;
        let best: BTreeSet<&Path> = ranked.iter().take(keep_best).map(|(path, _)| path.as_path()).collect();
        for path in self.list()? {
            if path == newest || best.contains(path.as_path()) || Checkpoint::open(&path).is_err() {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let deleting = self.at(DELETING, &name);
            fs::rename(&path, &deleting).at(&path)?;
            remove(&deleting)?;
        }
        Ok(())
    }

    /// Clears away what an earlier crash left half done.
    pub fn recover(&self) -> Result<()> {
        for name in self.names()? {
            let path = self.folder.join(&name);
            if let Some(original) = name.strip_prefix(REPLACED) {
                let place = self.folder.join(original);
                if !place.exists() {
                    fs::rename(&path, &place).at(&path)?;
                    continue;
                }
            }
            if [WRITING, REPLACED, DELETING].iter().any(|prefix| name.starts_with(prefix)) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn at(&self, prefix: &str, name: &str) -> PathBuf {
        self.folder.join(format!("{prefix}{name}"))
    }
}

/// Deletes whatever has this name; a link and not what it points to.
fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.at(path)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{config_yaml, state, store};
    use super::super::{CONFIG, WEIGHTS};
    use super::*;
    use crate::trainer::optimizer::{AdamConfig, Optimizer};

    fn shelf() -> (tempfile::TempDir, Shelf) {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join(FOLDER);
        fs::create_dir(&folder).unwrap();
        (run, Shelf::new(folder))
    }

    fn save(shelf: &Shelf, batches: u64, valid_loss: Option<f64>, keep_best: usize) -> Result<PathBuf> {
        let store = store(batches as f32);
        let optimizer = Optimizer::new(&store, AdamConfig::default());
        let state = state(batches, valid_loss);
        shelf.save(
            Snapshot { store: &store, optimizer: &optimizer, state: &state, config_yaml: &config_yaml() },
            keep_best,
        )
    }

    fn batches(shelf: &Shelf) -> Vec<u64> {
        let batches = |path: &PathBuf| Checkpoint::open(path).unwrap().state().unwrap().batches;
        shelf.list().unwrap().iter().map(batches).collect()
    }

    #[test]
    fn the_newest_and_the_best_are_kept() {
        let (run, shelf) = shelf();
        for (batch, loss) in [(9, Some(3.0)), (10, Some(1.0)), (11, Some(2.0)), (12, None), (13, Some(4.0))] {
            save(&shelf, batch, loss, 2).unwrap();
        }
        assert_eq!(batches(&shelf), [10, 11, 13]);
        let found = |which| find(run.path(), which).unwrap().state().unwrap().batches;
        assert_eq!((found(Which::Newest), found(Which::Best)), (13, 10));
        save(&shelf, 14, Some(5.0), 0).unwrap();
        assert_eq!(batches(&shelf), [14], "the newest stays even if no best is kept");
        assert_eq!(find(&shelf.list().unwrap()[0], Which::Best).unwrap().state().unwrap().batches, 14);
    }

    #[test]
    fn a_checkpoint_half_written_is_not_seen_and_is_cleared_away() {
        let (run, shelf) = shelf();
        save(&shelf, 5, Some(1.0), 1).unwrap();
        let place = save(&shelf, 6, Some(2.0), 1).unwrap();
        // A crash while the next was written, and one between the two renames of a replacement.
        fs::create_dir(shelf.at(WRITING, "batch-0000000007")).unwrap();
        fs::rename(&place, shelf.at(REPLACED, "batch-0000000006")).unwrap();
        assert_eq!(batches(&shelf), [5, 6]);
        shelf.recover().unwrap();
        assert_eq!(batches(&shelf), [5, 6]);
        assert_eq!(fs::read_dir(run.path().join(FOLDER)).unwrap().count(), 2);
    }

    #[test]
    fn a_checkpoint_can_be_written_again() {
        let (_run, shelf) = shelf();
        save(&shelf, 5, Some(1.0), 1).unwrap();
        save(&shelf, 5, Some(0.5), 1).unwrap();
        assert_eq!(shelf.newest().unwrap().state().unwrap().valid_loss, Some(0.5));
        assert_eq!(shelf.names().unwrap().len(), 1);
    }

    #[test]
    fn a_damaged_newest_is_an_error_that_names_a_whole_one() {
        let (run, shelf) = shelf();
        save(&shelf, 5, Some(1.0), 1).unwrap();
        let newest = save(&shelf, 6, Some(2.0), 1).unwrap();
        fs::write(newest.join(CONFIG), "x").unwrap();
        let error = find(run.path(), Which::Newest).unwrap_err().to_string();
        assert!(error.contains("batch-0000000006") && error.contains("batch-0000000005 is intact"), "{error}");
        let mut weights = fs::read(newest.join(WEIGHTS)).unwrap();
        weights.reverse();
        fs::write(newest.join(WEIGHTS), weights).unwrap();
        save(&shelf, 7, Some(3.0), 1).unwrap();
        assert_eq!(shelf.list().unwrap().len(), 3, "a damaged checkpoint is not deleted");
    }

    #[test]
    fn what_is_no_run_is_said() {
        let (run, shelf) = shelf();
        assert!(find(run.path(), Which::Newest).unwrap_err().to_string().contains("no checkpoint yet"));
        let error = find(&shelf.folder, Which::Newest).unwrap_err();
        assert!(error.is_configuration() && error.to_string().contains("found neither"), "{error}");
    }
}
