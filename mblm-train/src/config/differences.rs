//! What two configurations do not have in common, for a run that is gone on with.

use mblm_core::yaml::{describe, join};
use serde_yaml::Value;

use super::RunConfig;

impl RunConfig {
    /// What is another one in `other`, a line per field: `train.batch_size: 8, now 16`.
    pub fn differences(&self, other: &RunConfig) -> mblm_core::Result<Vec<String>> {
        let value = |config: &RunConfig| {
            serde_yaml::to_value(config)
                .map_err(|error| mblm_core::Error::Block(format!("a block's configuration cannot be written: {error}")))
        };
        let mut lines = Vec::new();
        compare("", &value(self)?, &value(other)?, &mut lines);
        Ok(lines)
    }
}

/// Adds a line for each field of two values that differs.
fn compare(path: &str, old: &Value, new: &Value, lines: &mut Vec<String>) {
    match (old, new) {
        (Value::Mapping(a), Value::Mapping(b)) => {
            let keys: Vec<&Value> = a.keys().chain(b.keys().filter(|key| !a.contains_key(key))).collect();
            for key in keys {
                let (old, new) = (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
                compare(&join(path, key.as_str().unwrap_or("?")), old, new, lines);
            }
        }
        (Value::Sequence(a), Value::Sequence(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(i, (a, b))| compare(&format!("{path}[{i}]"), a, b, lines));
        }
        _ if old == new => {}
        _ => lines.push(format!("{path}: {}, now {}", describe(old), describe(new))),
    }
}
