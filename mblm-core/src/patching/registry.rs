//! The registry of rules that are linked into the program, and how one is read from YAML.

use std::sync::Arc;

use mblm_base::nearest::suggestion;
use mblm_base::value::from_deserializer;
use mblm_yaml::{ConfigError, Document, describe, join};
use serde::de::value::MapDeserializer;
use serde_yaml::Value;

use super::{PatchRule, RuleModel, TAG};

/// A rule that is linked in. Made by [`register_patching!`](crate::register_patching).
pub struct RuleInfo {
    /// Its `patching_type`.
    pub name: &'static str,
    /// The JSON Schema of its fields.
    pub schema: fn() -> schemars::Schema,
    /// The source file and line of its registration.
    pub location: &'static str,
}

inventory::collect!(RuleInfo);

/// Registers a rule of patching: `register_patching!(Spacelike, name = "spacelike")`. `name` must be the one in its
/// `#[typetag::serde(name = …)]`.
#[macro_export]
macro_rules! register_patching {
    ($rule:ty, name = $name:literal $(,)?) => {
        $crate::inventory::submit! {
            $crate::patching::registry::RuleInfo {
                name: $name,
                schema: || $crate::schemars::schema_for!($rule),
                location: concat!(file!(), ":", line!()),
            }
        }
    };
}

/// The rules, sorted by name.
pub fn all() -> Vec<&'static RuleInfo> {
    let mut all: Vec<&RuleInfo> = inventory::iter::<RuleInfo>.into_iter().collect();
    all.sort_by_key(|rule| rule.name);
    all
}

/// The rule called `name`.
pub fn known(name: &str) -> Option<&'static RuleInfo> {
    all().into_iter().find(|rule| rule.name == name)
}

/// Reads the field `patching` at `path` for a model of stages of `seq_lens` tokens: a rule for each stage but the first, from
/// the outside in. One rule alone, or a shorter list, is of the innermost patches.
pub(crate) fn parse(
    document: &Document,
    path: &str,
    seq_lens: &[usize],
    model: &RuleModel,
) -> Result<Vec<Arc<dyn PatchRule>>, ConfigError> {
    let levels = seq_lens.len().saturating_sub(1);
    let paths: Vec<String> = match document.get(path) {
        None | Some(Value::Null) => vec![],
        Some(Value::Sequence(rules)) => (0..rules.len()).map(|i| format!("{path}[{i}]")).collect(),
        Some(_) => vec![path.into()],
    };
    if paths.len() > levels {
        let message = match levels {
            0 => "a model of one stage has no patches; remove it, or add a stage".into(),
            _ => format!("expected at most {levels}, one rule per stage but the first, found {}", paths.len()),
        };
        return Err(document.error(path, message));
    }
    let longest = &seq_lens[seq_lens.len() - paths.len()..];
    let rules = paths.iter().zip(longest).map(|(path, &longest)| rule(document, path, longest, model));
    let rules: Vec<Arc<dyn PatchRule>> = rules.collect::<Result<_, _>>()?;
    Ok(rules.into_iter().skip_while(|rule| rule.is_fixed()).collect())
}

/// Reads the rule at `path`, of patches of at most `longest` tokens.
fn rule(document: &Document, path: &str, longest: usize, model: &RuleModel) -> Result<Arc<dyn PatchRule>, ConfigError> {
    let (name, fields, name_path) = match document.require(path)? {
        Value::String(name) => (name.clone(), Default::default(), path.to_string()),
        Value::Mapping(fields) => {
            let (mut fields, name_path) = (fields.clone(), join(path, TAG));
            match fields.shift_remove(TAG) {
                Some(Value::String(name)) => (name, fields, name_path),
                Some(other) => {
                    let message = format!("expected the name of a rule, found {}", describe(&other));
                    return Err(document.error(&name_path, message));
                }
                None => return Err(document.error(path, format!("missing field `{TAG}`, which names the rule"))),
            }
        }
        other => {
            let message = format!("expected a rule, such as `spacelike`, found {}", describe(other));
            return Err(document.error(path, message));
        }
    };
    match all().into_iter().filter(|rule| rule.name == name).collect::<Vec<_>>()[..] {
        [_] => {}
        [] => {
            let names: Vec<&str> = all().iter().map(|rule| rule.name).collect();
            let message = format!("unknown patching rule {name:?}; {}", suggestion(&name, &names));
            return Err(document.error(&name_path, message));
        }
        [one, other, ..] => {
            let (one, other) = (one.location, other.location);
            let message = format!("the patching rule {name:?} is registered twice: in {one} and in {other}");
            return Err(document.error(&name_path, message));
        }
    }
    let tag = (Value::from(TAG), Value::from(name));
    let fields = MapDeserializer::new(std::iter::once(tag).chain(fields));
    let rule: Box<dyn PatchRule> = from_deserializer(fields).map_err(|error| document.error_in(path, error))?;
    if let Err(error) = rule.validate(model) {
        return Err(document.error(&join(path, &error.field), error.message));
    }
    match rule.max_patch() {
        Some(most) if most == 0 || most > longest => {
            let message = format!("expected a number from 1 to {longest}, the stage's entry of seq_lens, found {most}");
            Err(document.error(&join(path, "max_patch"), message))
        }
        _ => Ok(Arc::from(rule)),
    }
}
