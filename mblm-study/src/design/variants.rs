//! The variants of a study: its list, and all combinations of its grid.

use std::collections::BTreeMap;

use mblm_core::registry::TAG;
use mblm_train::journal::folder::LONGEST_NAME;
use mblm_yaml::difference::shown;
use mblm_yaml::{ConfigError, Document, describe, join};
use serde_yaml::Value;

use super::{Reader, slug};

/// More combinations than this are a mistake.
const MAX_VARIANTS: usize = 1000;

/// One value of a field in a grid, with the name it has there and its place.
struct Choice<'a> {
    field: &'a str,
    name: String,
    value: &'a Value,
    place: String,
}

impl Reader<'_> {
    pub(super) fn variants(&self, base: &Document) -> Result<Vec<(String, Document)>, ConfigError> {
        let named = self.named_variants(base)?;
        let grid = self.grid()?;
        let combinations = grid.iter().fold(named.len(), |product, choices| product.saturating_mul(choices.len()));
        if combinations > MAX_VARIANTS {
            let message = format!("{combinations} combinations; expected at most {MAX_VARIANTS}");
            return Err(self.document.error("grid", message));
        }
        let is_list = self.document.get("variants").is_some();
        let mut variants: Vec<(String, Document)> = named;
        for (i, choices) in grid.iter().enumerate() {
            let mut next = Vec::with_capacity(variants.len() * choices.len());
            for (name, config) in &variants {
                for choice in choices {
                    let mut config = config.clone();
                    config.graft(choice.field, choice.value.clone(), self.document, &choice.place)?;
                    let first = i == 0 && !is_list;
                    next.push((if first { choice.name.clone() } else { format!("{name} / {}", choice.name) }, config));
                }
            }
            variants = next;
        }
        self.check_names(&variants)?;
        Ok(variants)
    }

    /// Those of `variants`; without such a list, the base alone.
    fn named_variants(&self, base: &Document) -> Result<Vec<(String, Document)>, ConfigError> {
        let list = match self.document.get("variants") {
            None | Some(Value::Null) => return Ok(vec![("base".into(), base.clone())]),
            Some(Value::Sequence(list)) if !list.is_empty() => list,
            Some(other) => {
                let message = format!(
                    "expected a list of variants, such as [{{name: …, set: {{…}}}}], found {}",
                    describe(other)
                );
                return Err(self.document.error("variants", message));
            }
        };
        (0..list.len()).map(|i| self.variant(&format!("variants[{i}]"), base)).collect()
    }

    fn variant(&self, path: &str, base: &Document) -> Result<(String, Document), ConfigError> {
        self.document.check_fields(path, &["name", "set", "config"])?;
        let name: String = self.document.section(&join(path, "name"))?;
        if slug(&name).is_empty() {
            let message = format!("expected a name with letters or digits, found {name:?}");
            return Err(self.document.error(&join(path, "name"), message));
        }
        let file = join(path, "config");
        let mut config = match self.document.get(&file) {
            Some(_) => self.with_common(self.config(&file, &self.document.section::<String>(&file)?)?)?,
            None => base.clone(),
        };
        self.apply(&mut config, &join(path, "set"))?;
        Ok((name, config))
    }

    /// For each field of `grid`, its values.
    fn grid(&self) -> Result<Vec<Vec<Choice<'_>>>, ConfigError> {
        let fields = self.mapping("grid")?.into_iter().flatten();
        fields.map(|(field, values)| self.choices(field.as_str().unwrap_or_default(), values)).collect()
    }

    fn choices<'a>(&self, field: &'a str, values: &'a Value) -> Result<Vec<Choice<'a>>, ConfigError> {
        let place = join("grid", field);
        let choices: Vec<Choice> = match values {
            Value::Sequence(values) => {
                let choice = |(i, value)| Choice {
                    field,
                    name: choice_name(field, value),
                    value,
                    place: format!("{place}[{i}]"),
                };
                values.iter().enumerate().map(choice).collect()
            }
            Value::Mapping(values) => {
                let named = values.iter().filter_map(|(name, value)| Some((name.as_str()?, value)));
                named
                    .map(|(name, value)| Choice { field, name: name.into(), value, place: join(&place, name) })
                    .collect()
            }
            other => {
                let message =
                    format!("expected a list of values, or a mapping of names to values, found {}", describe(other));
                return Err(self.document.error(&place, message));
            }
        };
        match choices.is_empty() {
            true => Err(self.document.error(&place, "expected at least one value, found none")),
            false => Ok(choices),
        }
    }

    /// Variants must differ in their names, and in the folders that are named after them.
    fn check_names(&self, variants: &[(String, Document)]) -> Result<(), ConfigError> {
        let path = if self.document.get("variants").is_some() { "variants" } else { "grid" };
        let mut seen = BTreeMap::new();
        for (name, _) in variants {
            self.check_length(path, name)?;
            if let Some(other) = seen.insert(slug(name), name) {
                let message =
                    format!("the variants {name:?} and {other:?} would share a folder; give them different names");
                return Err(self.document.error(path, message));
            }
        }
        Ok(())
    }

    /// Refuses a name that is too long for a file.
    pub(super) fn check_length(&self, path: &str, name: &str) -> Result<(), ConfigError> {
        match slug(name).len() {
            0..=LONGEST_NAME => Ok(()),
            len => {
                let start: String = name.chars().take(40).collect();
                let message = format!(
                    "the name \"{start}…\" has {len} bytes; expected at most {LONGEST_NAME}, since it \
                     becomes the name of a folder; give a shorter one (a grid accepts a mapping of names to values)"
                );
                Err(self.document.error(path, message))
            }
        }
    }
}

/// What a value of a grid is called: `num_layers=[2, 1]`, or a block by its type.
fn choice_name(field: &str, value: &Value) -> String {
    let block = value.get(TAG).and_then(Value::as_str);
    let last = field.rsplit('.').next().unwrap_or(field);
    block.map_or_else(|| format!("{last}={}", shown(value).replace('"', "")), String::from)
}
