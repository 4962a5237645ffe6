//! The tables: what the plugin says of itself before it is asked to do anything.

use mblm_sdk::abi::{self, Plugin};
use serde_json::{Map, Value};

use super::{Outcome, Subject};
use crate::plugin::host::check_table;
use crate::schema::Walk;

/// The plugin's own table is accepted, and would not be if its version or size were another one.
pub(super) fn header(subject: &Subject) -> Result<Outcome, String> {
    let table = subject.library.table();
    type Change = fn(&mut Plugin);
    let cases: [(&str, Change, bool); 6] = [
        ("a larger struct_size", |t| t.struct_size += 64, true),
        ("a smaller struct_size", |t| t.struct_size = 16, false),
        ("the next major", |t| t.major += 1, false),
        ("the major before", |t| t.major -= 1, false),
        ("a future minor", |t| t.minor = abi::MINOR + 1, false),
        ("another magic", |t| t.magic = !t.magic, false),
    ];
    for (what, change, accepted) in cases {
        let changed = Box::leak(Box::new(*table));
        change(changed);
        // SAFETY: a copy of a whole table, which lives for ever.
        if unsafe { check_table(changed) }.is_ok() != accepted {
            return Err(format!("a table with {what} should be {}", if accepted { "accepted" } else { "refused" }));
        }
    }
    let block = subject.block();
    if block.version.is_empty() || block.about.is_empty() {
        return Err(format!("block `{}` has no version or no line about it", block.block_type));
    }
    Ok(Outcome::Passed(format!("interface {}.{}, {} bytes", table.major, table.minor, table.struct_size)))
}

/// The schema is that of an object, names every field, and accepts the configuration.
pub(super) fn schema(subject: &Subject) -> Result<Outcome, String> {
    let schema = &subject.block().schema;
    if schema["type"] != "object" {
        let without = "a block without fields is written `struct Block {}` in Rust";
        return Err(format!("its type is {}, expected \"object\"; {without}", schema["type"]));
    }
    // A block may have no fields.
    let none = Map::new();
    let properties = match schema.get("properties") {
        Some(properties) => properties.as_object().ok_or("its properties are not an object")?,
        None => &none,
    };
    if schema["additionalProperties"] != false {
        let advice = "in Rust, write #[serde(deny_unknown_fields)] above the struct";
        return Err(format!("additionalProperties is not false, but unknown fields must be refused; {advice}"));
    }
    let config: Value = serde_json::from_str(&subject.config).map_err(|error| error.to_string())?;
    let config = config.as_object().ok_or("the configuration is not an object")?;
    for (name, property) in properties {
        if Walk::new(schema).enter(property, |_| ()).is_none() {
            return Err(format!("the $ref of `{name}` leads nowhere or in a circle"));
        }
    }
    for (name, value) in config {
        let property = properties.get(name).ok_or_else(|| format!("it does not know the field `{name}`"))?;
        if !accepts(&Walk::new(schema), property, value) {
            return Err(format!("it does not accept {name}: {value}, which the block does"));
        }
    }
    let required = schema["required"].as_array().map_or(&[][..], Vec::as_slice);
    match required.iter().filter_map(Value::as_str).find(|name| !config.contains_key(*name)) {
        Some(name) => Err(format!("it requires `{name}`, the block does not")),
        None => Ok(Outcome::Passed(format!("{} field(s)", properties.len()))),
    }
}

/// Whether a property accepts a value, as far as types, enumerations and bounds go. What is too involved to say accepts it.
fn accepts<'a>(walk: &Walk<'a>, schema: &'a Value, value: &Value) -> bool {
    walk.enter(schema, |schema| {
        let choices = ["anyOf", "oneOf"].iter().find_map(|key| schema[key].as_array());
        match choices {
            Some(schemas) => schemas.iter().any(|schema| accepts(walk, schema, value)),
            None => fits(schema, value),
        }
    })
    .unwrap_or(true)
}

/// Whether a value has the type, is one of the values, and lies within the bounds of a schema.
fn fits(schema: &Value, value: &Value) -> bool {
    let is = |kind: &str| match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    };
    let kind = match &schema["type"] {
        Value::String(kind) => is(kind),
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).any(is),
        _ => true,
    };
    let listed = schema["enum"].as_array().is_none_or(|values| values.contains(value));
    let bounded = value.as_f64().is_none_or(|number| {
        schema["minimum"].as_f64().is_none_or(|min| number >= min)
            && schema["maximum"].as_f64().is_none_or(|max| number <= max)
    });
    kind && listed && bounded
}
