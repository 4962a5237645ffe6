//! How two configurations differ, field by field.

use mblm_base::value::join;
use serde_yaml::Value;

use crate::error::describe;

/// The field that names the type of a block.
const TAG: &str = "block_type";

/// Longer lists are not written out.
const MAX_SHOWN: usize = 120;

/// A line for each field of two values that differs: `train.batch_size: 8, now 16`.
pub fn differences(old: &Value, new: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    compare("", old, new, &mut lines);
    lines
}

fn compare(path: &str, old: &Value, new: &Value, lines: &mut Vec<String>) {
    match (old, new) {
        // Blocks of two types have few fields in common.
        (Value::Mapping(a), Value::Mapping(b)) if a.get(TAG) != b.get(TAG) => {
            let text = |value| flow(value).unwrap_or_else(|| describe(value));
            lines.push(format!("{path}: {}, now {}", text(old), text(new)));
        }
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
        _ => lines.push(format!("{path}: {}, now {}", shown(old), shown(new))),
    }
}

/// A value as YAML in a line, if that is short.
pub fn shown(value: &Value) -> String {
    match value {
        Value::Sequence(_) | Value::Mapping(_) => match flow(value) {
            Some(text) if text.chars().count() <= MAX_SHOWN => text,
            _ => describe(value),
        },
        _ => describe(value),
    }
}

/// YAML in one line, `{a: [1, 2]}`.
fn flow(value: &Value) -> Option<String> {
    match value {
        Value::Sequence(items) => Some(format!("[{}]", items.iter().map(flow).collect::<Option<Vec<_>>>()?.join(", "))),
        Value::Mapping(fields) => {
            let field = |(key, value): (&Value, &Value)| Some(format!("{}: {}", key.as_str()?, flow(value)?));
            Some(format!("{{{}}}", fields.iter().map(field).collect::<Option<Vec<_>>>()?.join(", ")))
        }
        Value::String(text) => Some(text.clone()),
        Value::Null => Some("null".into()),
        scalar => Some(describe(scalar)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lists_and_what_is_missing() {
        let value = |text: &str| serde_yaml::from_str::<Value>(text).unwrap();
        let old = value("{a: 1, b: [1, {c: x}], d: [1, 2], e: 5}");
        let new = value("{a: 1, b: [1, {c: y}], d: [1], f: {g: [h]}}");
        let want = ["b[1].c: \"x\", now \"y\"", "d: [1, 2], now [1]", "e: 5, now nothing", "f: nothing, now {g: [h]}"];
        assert_eq!(differences(&old, &new), want);
        let (old, new) = (value("{p: {block_type: a, x: 1}}"), value("{p: {block_type: b, y: 2}}"));
        assert_eq!(differences(&old, &new), ["p: {block_type: a, x: 1}, now {block_type: b, y: 2}"]);
        let long = value(&format!("[{}]", vec!["abcdefgh"; 20].join(", ")));
        assert_eq!(shown(&long), "a list");
    }
}
