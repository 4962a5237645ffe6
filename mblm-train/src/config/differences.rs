//! What two configurations do not have in common, for a run that is gone on with.

use mblm_yaml::difference::differences;

use super::RunConfig;

impl RunConfig {
    /// What is another one in `other`, a line per field: `train.batch_size: 8, now 16`.
    pub fn differences(&self, other: &RunConfig) -> mblm_core::Result<Vec<String>> {
        let value = |config: &RunConfig| {
            serde_yaml::to_value(config)
                .map_err(|error| mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}")))
        };
        Ok(differences(&value(self)?, &value(other)?))
    }
}
