//! Checkpoints, and the configuration beside them. The first process writes; the others wait for it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::optimizer::clip_grad_norm;
use super::{Record, Trainer};
use crate::checkpoint::Snapshot;
use crate::config::ResumeSection;
use crate::error::{AtPath, Error, Result};
use crate::journal::folder::replace_config;

impl Trainer<'_> {
    /// Has the first process write something, and the others wait for it: their result is the run's folder.
    pub(super) fn write(
        &self,
        record: &mut Record,
        work: impl FnOnce(&Self, &mut Record) -> Result<PathBuf>,
    ) -> Result<PathBuf> {
        let written = if self.processes.is_first() { work(self, record) } else { Ok(record.folder.clone()) };
        self.processes.agree(written)
    }

    /// Saves a checkpoint.
    pub(crate) fn save(&self, record: &mut Record) -> Result<PathBuf> {
        self.must_be_alike()?;
        self.write(record, Self::save_here)
    }

    pub(super) fn save_here(&self, record: &mut Record) -> Result<PathBuf> {
        let store = self.model.params();
        // Gradients that wait in the checkpoint must be good ones.
        if self.state.window.weight > 0.0 && !clip_grad_norm(store, f64::INFINITY)?.norm.is_finite() {
            return Err(self.non_finite_gradient());
        }
        let saved = record.checkpoints.save(self.snapshot(), self.config.io.num_models_to_save)?;
        record.progress.saved(self.state.batches, &saved);
        self.write_config(record, &self.config_yaml)?;
        Ok(saved)
    }

    /// Saves a checkpoint with a changed configuration. The run's `config.yaml` comes first: if the run is killed before the
    /// checkpoint is there, a resume names what changed and takes it with `--force`, as this one did.
    pub(crate) fn save_changed(&self, record: &mut Record) -> Result<()> {
        let save = |trainer: &Self, record: &mut Record| {
            trainer.write_config(record, &trainer.config.to_yaml()?)?;
            trainer.save_here(record)
        };
        self.write(record, save).map(drop)
    }

    /// Writes the run's `config.yaml`, which also says how another run begins where this one is. The checkpoint is named by
    /// its place in the run, which may be moved or copied.
    fn write_config(&self, record: &Record, config_yaml: &str) -> Result<()> {
        let best = match record.checkpoints.best() {
            Ok(best) => best,
            Err(_) => record.checkpoints.newest()?,
        };
        let best = best.path();
        let resume = ResumeSection {
            checkpoint_file: best.strip_prefix(&record.folder).unwrap_or(best).into(),
            next_epoch_index: self.state.next.epoch,
            next_batch_index: self.state.next.batch,
            migrate_embeddings: false,
            rename_modules: false,
            // For a reader: a name that is not UTF-8 must not keep the run from being saved.
            resumed_from: self.state.resumed_from.as_ref().map(|path| path.to_string_lossy().into_owned().into()),
            run: record.folder.canonicalize().at(&record.folder)?.to_str().map(PathBuf::from),
        };
        let section = serde_yaml::to_string(&BTreeMap::from([("resume", resume)]))
            .map_err(|error| Error::Config(format!("{}: {error}", best.display())))?;
        replace_config(&record.folder, &format!("{config_yaml}{section}"))
    }

    /// What a checkpoint of this moment holds.
    pub fn snapshot(&self) -> Snapshot<'_> {
        let (store, optimizer, state) = (self.model.params(), &self.optimizer, &self.state);
        Snapshot { store, optimizer, state, config_yaml: &self.config_yaml }
    }
}
