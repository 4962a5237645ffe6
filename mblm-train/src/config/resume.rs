//! Section `resume`: what a new run begins with.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Section `resume`: a new run that begins with the weights of an earlier one, further on in the data. A run writes it
/// into its `config.yaml`, so that training with that file chains runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResumeSection {
    /// A run, one of its checkpoints, or a `.pth` file of the package.
    pub checkpoint_file: PathBuf,
    /// The epoch to begin in.
    pub next_epoch_index: u64,
    /// The batch of that epoch to begin with.
    pub next_batch_index: u64,
    /// Whether the weights may be of a model with fewer tokens.
    #[serde(default)]
    pub migrate_embeddings: bool,
    /// Accepted for the package's configs: names of its earlier versions are known without.
    #[serde(default)]
    pub rename_modules: bool,
    /// What the run that wrote this section began with.
    #[serde(default)]
    pub resumed_from: Option<PathBuf>,
}
