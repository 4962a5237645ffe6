//! The values of tuned fields in configurations.

use mblm_core::registry::BlockRegistry;
use mblm_train::config::RunConfig;
use mblm_train::error::{Error, Result};
use mblm_yaml::{Document, describe, join};
use serde_yaml::Value;

use super::solve::num_parameters;
use crate::course::search;
use crate::design::tune::{Tune, Values};

/// The values that a configuration itself has in the tuned fields, around which they are tuned.
///
/// # Errors
/// A field is not a number there, or one of the first values to try cannot be trained or changes the model's size. The
/// error names the place in the study's YAML, `document`.
pub(super) fn base_values(
    tune: &Tune,
    config: &RunConfig,
    registry: &BlockRegistry,
    document: &Document,
) -> Result<Vec<f64>> {
    let (parameters, yaml) = (num_parameters(config)?, as_document(config)?);
    let mut base = Vec::new();
    for field in &tune.fields {
        let path = &field.path;
        let refuse = |message: String| -> Error { document.error(&join("tune", path), message).into() };
        let value = yaml.get(path);
        let Some(own) = value.and_then(Value::as_f64) else {
            let found = value.map_or("no such field".into(), describe);
            return Err(refuse(format!("expected a field that is a number in every variant, found {found}")));
        };
        match &field.values {
            _ if (path == "train.batch_size" || path.starts_with("params.patching"))
                && config.train.max_eval_steps.is_some() =>
            {
                return Err(refuse(
                    "cannot be tuned with train.max_eval_steps, which counts batches; remove train.max_eval_steps"
                        .into(),
                ));
            }
            Values::Listed(values) if !values.contains(&own) => {
                return Err(refuse(format!("the variant's own value, {own}, is not among the values; add it")));
            }
            Values::Grid { .. } if is_whole(config, path, own, registry) => {
                return Err(refuse("accepts only whole numbers; give a list of values".into()));
            }
            Values::Grid { .. } if own <= 0.0 => {
                return Err(refuse(format!(
                    "a grid needs a positive value in its middle, found {own}; give a list of values"
                )));
            }
            _ => {}
        }
        for value in search::first(&field.values, own) {
            let tried = with_values(config, &[(path.clone(), value)], registry)
                .map_err(|error| refuse(format!("the value {value} cannot be trained: {error}")))?;
            if num_parameters(&tried)? != parameters {
                return Err(refuse(format!(
                    "the value {value} changes the number of parameters; vary the field in `grid` instead"
                )));
            }
        }
        base.push(own);
    }
    Ok(base)
}

/// Whether a field accepts only whole numbers.
fn is_whole(config: &RunConfig, path: &str, own: f64, registry: &BlockRegistry) -> bool {
    own.fract() == 0.0
        && with_values(config, &[(path.into(), own + 0.5)], registry).is_err()
        && with_values(config, &[(path.into(), own + 1.0)], registry).is_ok()
}

/// A configuration with these values in its fields.
pub(super) fn with_values(config: &RunConfig, values: &[(String, f64)], registry: &BlockRegistry) -> Result<RunConfig> {
    if values.is_empty() {
        return Ok(config.clone());
    }
    let mut document = as_document(config)?;
    for (path, value) in values {
        let is_integer = document.get(path).is_some_and(|now| now.is_i64() || now.is_u64());
        let text = if is_integer && value.fract() == 0.0 { format!("{value}") } else { format!("{value:?}") };
        document.set(&format!("{path}={text}"))?;
    }
    Ok(RunConfig::from_document(&document, registry)?)
}

fn as_document(config: &RunConfig) -> Result<Document> {
    Ok(Document::parse(&config.to_yaml()?, "the configuration")?)
}
