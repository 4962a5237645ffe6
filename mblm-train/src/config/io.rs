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
    /// Name of the model, part of the run folder's name.
    pub name_model: String,
    /// Where run folders are made.
    pub output_dir: PathBuf,
    /// The data: a file, a folder or a glob for `bytes`.
    pub dataset_dir: String,
    /// Which data set reads it.
    pub dataset_id: String,
    /// Options of the data set.
    #[serde(default)]
    pub dataset_args: Option<serde_json::Value>,
    /// At most this many best models are kept.
    pub num_models_to_save: usize,
    /// How often to validate (and save) in all.
    pub validate_amount: usize,
    /// How often to log the training loss in all.
    pub log_train_loss_amount: usize,
    /// Only the first worker logs here; accepted for the package's configs.
    #[serde(default)]
    pub enabled_loss_log_for_gpus: Option<Vec<usize>>,
    /// Anything worth remembering.
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
