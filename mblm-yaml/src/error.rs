//! Configuration errors, and serde's messages in words a user of a YAML file understands.

use std::fmt;

use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;
use serde_yaml::Value;

use crate::nearest::suggestion;
use crate::path::join;

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

/// A mistake in a value, before it is known which file the value comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct ValueError {
    /// The field within the value, such as `heads[0]`; empty for the whole.
    pub path: String,
    /// What was found and what was expected.
    pub message: String,
}

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.message),
            path => write!(f, "{path}: {}", self.message),
        }
    }
}

/// Deserialises a value; an error says which field of it is wrong.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, ValueError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let mut path = String::new();
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => path.push_str(&format!("[{index}]")),
                Segment::Map { key } => path = join(&path, key),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        ValueError { path, message: in_words(&error.inner().to_string()) }
    })
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

/// Translates serde's message.
fn in_words(message: &str) -> String {
    let invalid = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    if let Some((found, expected)) = invalid.and_then(|rest| rest.rsplit_once(", expected ")) {
        return format!("expected {}, found {}", expected_in_words(expected), found_in_words(found));
    }
    let length = message.strip_prefix("invalid length ").and_then(|rest| rest.split_once(", expected "));
    if let Some((found, expected)) = length {
        let expected: String = expected.chars().filter(char::is_ascii_digit).collect();
        return format!("expected a list of {expected}, found one of {found}");
    }
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match (names.as_slice(), message) {
        ([name, accepted @ ..], message) if message.starts_with("unknown field") => {
            format!("unknown field; {}", suggestion(name, accepted))
        }
        ([name, accepted @ ..], message) if message.starts_with("unknown variant") => {
            format!("unknown value {name:?}; {}", suggestion(name, accepted))
        }
        _ => message.into(),
    }
}

fn expected_in_words(expected: &str) -> &str {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a positive integer",
        "i8" | "i16" | "i32" | "i64" | "isize" => "an integer",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a mapping",
        _ if expected.starts_with("struct ") => "a mapping",
        _ if expected.starts_with("a tuple") => "a list",
        _ if expected.contains("enum") => "a name",
        _ => expected,
    }
}

fn found_in_words(found: &str) -> &str {
    match found {
        "unit value" | "null" | "Option value" => "nothing",
        "sequence" => "a list",
        "map" => "a mapping",
        _ => match found.split_once(' ') {
            Some(("string", text)) => text,
            Some(_) => found.split('`').nth(1).unwrap_or(found),
            None => found,
        },
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
