//! Section `resume`: what a new run begins with.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::checkpoint;

/// Section `resume`: a new run that begins with the weights of an earlier one, further on in the data. A run writes it
/// into its `config.yaml`, so that training with that file chains runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSection {
    /// A run, one of its checkpoints, or a `.pth` file of the package. A relative path starts at the folder of the
    /// configuration file, or else at the current directory.
    pub checkpoint_file: PathBuf,
    /// The epoch to start in.
    pub next_epoch_index: u64,
    /// The batch of that epoch to start with.
    pub next_batch_index: u64,
    /// Whether to accept weights of a model with fewer tokens.
    #[serde(default)]
    pub migrate_embeddings: bool,
    /// Accepted for compatibility with the package; names of its earlier versions are always recognized.
    #[serde(default)]
    pub rename_modules: bool,
    /// The checkpoint that the run that wrote this section started from.
    #[serde(default)]
    pub resumed_from: Option<PathBuf>,
    /// The run that wrote this section, so that a copy of its configuration finds the checkpoint.
    #[serde(default)]
    pub run: Option<PathBuf>,
}

impl ResumeSection {
    /// Finds a relative `checkpoint_file` of a configuration in `folder`. A run that was moved or copied has its own
    /// checkpoints beside its configuration; a copy of the configuration alone means those of the run that wrote it.
    pub fn resolve(&mut self, folder: &Path) {
        let beside = folder.join(&self.checkpoint_file);
        let is_run = folder.join(checkpoint::FOLDER).is_dir();
        let written = self.run.as_ref().filter(|_| !is_run).map(|run| run.join(&self.checkpoint_file));
        let places = [Some(beside.clone()), written, Some(self.checkpoint_file.clone())];
        let found = places.into_iter().flatten().find(|place| place.exists());
        self.checkpoint_file = found.unwrap_or(beside);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_run_means_its_own_checkpoint_wherever_it_is() {
        let place = tempfile::tempdir().unwrap();
        let run = |name: &str| {
            fs::create_dir_all(place.path().join(name).join("checkpoints/batch-1")).unwrap();
            place.path().join(name)
        };
        let (written, copied) = (run("written"), run("copied"));
        let found = |folder: &Path| {
            let mut section = ResumeSection {
                checkpoint_file: "checkpoints/batch-1".into(),
                next_epoch_index: 0,
                next_batch_index: 0,
                migrate_embeddings: false,
                rename_modules: false,
                resumed_from: None,
                run: Some(written.clone()),
            };
            section.resolve(folder);
            section.checkpoint_file
        };
        assert_eq!(found(&copied), copied.join("checkpoints/batch-1"));
        assert_eq!(found(place.path()), written.join("checkpoints/batch-1"), "a copy of the file alone");
        fs::remove_dir(copied.join("checkpoints/batch-1")).unwrap();
        assert_eq!(found(&copied), copied.join("checkpoints/batch-1"), "not the weights of another run");
        fs::rename(&written, place.path().join("moved")).unwrap();
        assert_eq!(found(&place.path().join("moved")), place.path().join("moved/checkpoints/batch-1"));
    }
}
