//! Section `io`: what to read, and what to write where.

use std::path::PathBuf;

use mblm_yaml::{ConfigError, Document};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check;
use crate::journal::folder::LONGEST_NAME;

/// Section `io`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IoSection {
    /// Name of the model; part of the run folder's name.
    pub name_model: String,
    /// The folder in which run folders are created.
    pub output_dir: PathBuf,
    /// The data. For `bytes`: a file, a folder or a glob.
    pub dataset_dir: String,
    /// The data set that reads `dataset_dir`.
    pub dataset_id: String,
    /// Options of the data set.
    #[serde(default)]
    pub dataset_args: Option<serde_json::Value>,
    /// Maximum number of best checkpoints to keep.
    pub num_models_to_save: usize,
    /// Number of validations, each with a checkpoint, in the whole run.
    pub validate_amount: usize,
    /// Number of times that the training loss is logged in the whole run.
    pub log_train_loss_amount: usize,
    /// The processes of a run on several whose training losses are logged, counted from 0; the default is the first.
    #[serde(default)]
    pub enabled_loss_log_for_gpus: Option<Vec<usize>>,
    /// Free text.
    #[serde(default)]
    pub description: Option<String>,
}

impl IoSection {
    pub(super) fn check(&self, document: &Document) -> Result<(), ConfigError> {
        let name = &self.name_model;
        let is_name = !name.trim().is_empty() && !name.contains(['/', '\\', '\0']) && name != "." && name != "..";
        let expected = "a name for the run folder, without slashes";
        check(document, "io.name_model", is_name, expected, format!("{name:?}"))?;
        let len = name.len();
        let expected = format!("a name of at most {LONGEST_NAME} bytes");
        check(document, "io.name_model", len <= LONGEST_NAME, &expected, format!("{len} bytes"))?;
        let output = self.output_dir.as_os_str().as_encoded_bytes();
        let is_folder = !output.is_empty() && !output.contains(&0);
        let expected = "a folder (`.` is the one that the program is started in)";
        check(document, "io.output_dir", is_folder, expected, format!("{:?}", self.output_dir))?;
        let (validate, log) = (self.validate_amount, self.log_train_loss_amount);
        check(document, "io.validate_amount", validate > 0, "a positive integer", validate)?;
        check(document, "io.log_train_loss_amount", log > 0, "a positive integer", log)?;
        match &self.dataset_args {
            Some(args) if !args.is_object() => check(document, "io.dataset_args", false, "a mapping or nothing", args),
            _ => Ok(()),
        }
    }
}
