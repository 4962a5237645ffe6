//! What two configurations do not have in common, for a run that is gone on with.

use mblm_yaml::difference::differences;

use super::RunConfig;
use crate::entropy::forget_places;

impl RunConfig {
    /// What is another one in `other`, a line per field: `train.batch_size: 8, now 16`.
    pub fn differences(&self, other: &RunConfig) -> mblm_core::Result<Vec<String>> {
        let value = |config: &RunConfig| -> mblm_core::Result<serde_yaml::Value> {
            let mut value = serde_yaml::to_value(config).map_err(|error| {
                mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}"))
            })?;
            if let Some(patching) = value.get_mut("params").and_then(|params| params.get_mut("patching")) {
                forget_places(patching);
            }
            Ok(value)
        };
        Ok(differences(&value(self)?, &value(other)?))
    }
}
