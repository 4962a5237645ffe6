//! Configuration errors, and serde's messages in words a user of a YAML file understands.

use std::fmt;

pub use mblm_base::value::ValueError;
use mblm_base::value::from_deserializer;
use serde::de::DeserializeOwned;
use serde_yaml::Value;

/// Where a field was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of the file, counted from 1.
    Line(usize),
    /// A line of another file, which overrides this one.
    Other(String, usize),
    /// An override on the command line, such as `train.learning_rate=3e-4`.
    Set(String),
}

/// A mistake in a configuration file.
///
/// Shown as `configs/my.yaml: params.num_tokens: expected a positive integer, found "many" (line 14)`.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigError {
    /// The file, as it was given.
    pub file: String,
    /// The field, such as `params.block[1].attn_num_heads`; empty for the whole file.
    pub path: String,
    /// Where the field, or the section that lacks it, was given.
    pub place: Option<Place>,
    /// What was found, what was expected and what to do. Further lines are details.
    pub message: String,
}

impl ConfigError {
    /// The line of the file, if that is where the mistake is.
    pub fn line(&self) -> Option<usize> {
        match self.place {
            Some(Place::Line(line)) => Some(line),
            _ => None,
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (message, details) = self.message.split_at(self.message.find('\n').unwrap_or(self.message.len()));
        write!(f, "{}: ", self.file)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(message)?;
        match &self.place {
            Some(Place::Line(line)) => write!(f, " (line {line})")?,
            Some(Place::Other(file, line)) => write!(f, " ({file} line {line})")?,
            Some(Place::Set(assignment)) => write!(f, " (--set {assignment})")?,
            None => {}
        }
        f.write_str(details)
    }
}

impl std::error::Error for ConfigError {}

/// Deserialises a value.
///
/// # Errors
/// Says which field of it is wrong, what was found and what was expected.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, ValueError> {
    from_deserializer(value)
}

/// A value as an error message shows it.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => format!("{value:?}"),
        Value::Sequence(_) => "a list".into(),
        Value::Mapping(_) | Value::Tagged(_) => "a mapping".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "lowercase")]
    #[allow(dead_code)]
    struct All {
        int: Option<usize>,
        signed: Option<i64>,
        float: Option<f64>,
        flag: Option<bool>,
        text: Option<String>,
        list: Option<Vec<u8>>,
        map: Option<BTreeMap<String, u8>>,
        kind: Option<Kind>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Fixed,
        Rope,
    }

    #[test]
    fn serde_speaks_the_users_language() {
        let cases = [
            ("int: sixteen", "int: expected a positive integer, found \"sixteen\""),
            ("int: 'a, expected b'", "int: expected a positive integer, found \"a, expected b\""),
            ("int: -3", "int: expected a positive integer, found -3"),
            ("int: 1.5", "int: expected a positive integer, found 1.5"),
            ("signed: [1]", "signed: expected an integer, found a list"),
            ("float: true", "float: expected a number, found true"),
            ("flag: 1", "flag: expected true or false, found 1"),
            ("text: {a: 1}", "text: expected a string, found a mapping"),
            ("list: 3", "list: expected a list, found 3"),
            ("list: [1, 300]", "list[1]: expected a positive integer, found 300"),
            ("list: [~]", "list[0]: expected a positive integer, found nothing"),
            ("map: [1]", "map: expected a mapping, found a list"),
            ("map: {a: x}", "map.a: expected a positive integer, found \"x\""),
            ("kind: ropes", "kind: unknown value \"ropes\"; did you mean `rope`?"),
            ("kind: learned", "kind: unknown value \"learned\"; expected one of `fixed`, `rope`"),
            ("kind: 3", "kind: expected a name, found 3"),
            ("flga: true", "flga: unknown field; did you mean `flag`?"),
            ("3", "expected a mapping, found 3"),
        ];
        for (text, want) in cases {
            let value = serde_yaml::from_str(text).unwrap();
            assert_eq!(from_value::<All>(&value).unwrap_err().to_string(), want, "{text}");
        }
    }
}
