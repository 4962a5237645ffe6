//! Deserialising with errors that say which field is wrong, in the words of a user.

use std::fmt;

use serde::Deserializer;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use crate::nearest::suggestion;

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

/// Deserialises a value.
///
/// # Errors
/// Says which field of it is wrong, what was found and what was expected.
pub fn from_deserializer<'de, T: DeserializeOwned>(value: impl Deserializer<'de>) -> Result<T, ValueError> {
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

/// `section` and a field or `[index]` in it as one path.
pub fn join(section: &str, field: &str) -> String {
    let dot = if section.is_empty() || field.is_empty() || field.starts_with('[') { "" } else { "." };
    format!("{section}{dot}{field}")
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
