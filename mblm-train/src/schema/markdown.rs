//! The schema as a page to read: a table of fields for each section, block and data set.

use std::fmt::Write;

use mblm_core::patching;
use mblm_core::schema::Walk;
use serde_json::Value;

use crate::config::SUMMARY;

/// The page for what [`schema`](super::schema) gave.
pub fn markdown(schema: &Value) -> String {
    let page = Page { schema, definitions: &schema["definitions"], text: String::new() };
    page.write()
}

struct Page<'a> {
    schema: &'a Value,
    definitions: &'a Value,
    text: String,
}

impl<'a> Page<'a> {
    fn write(mut self) -> String {
        self.section("`params`", "The model that predicts the next byte.", &self.definitions["generative"]);
        let about = "With `mblm_config`, `params` describes an encoder, which restores masked bytes.";
        self.section("`params` of an encoder", about, &self.definitions["encoder"]);
        let about = "The fields of `params` without `input_seq_len`.";
        self.section("`params.mblm_config`", about, &self.definitions["mblm_config"]);
        let sections = &self.schema["properties"];
        for name in ["train", "io", "resume"] {
            self.section(&format!("`{name}`"), text(&sections[name], "description"), &self.definitions[name]);
        }
        if let Some(about) = sections[SUMMARY]["description"].as_str() {
            let _ = writeln!(self.text, "\n## `{SUMMARY}`\n\n{about}");
        }
        for choice in self.choices(&self.definitions["io"]["properties"]["dataset_id"]) {
            let (id, about) = (text(choice, "const"), text(choice, "description"));
            let args = &self.definitions[format!("data set {id}")];
            self.section(&format!("`io.dataset_args` of `{id}`"), &format!("Reads {about}."), args);
        }
        for choice in self.choices(&self.definitions["block"]["properties"]["block_type"]) {
            let name = text(choice, "const");
            let block = &self.definitions[format!("block {name}")];
            if !block.is_null() {
                self.section(&format!("Block `{name}`"), &format!("{}.", text(choice, "description")), block);
            }
        }
        for (definition, rule) in self.definitions.as_object().into_iter().flatten() {
            if let Some(name) = definition.strip_prefix("rule ").filter(|name| !name.contains('.')) {
                let about = text(rule, "description").split("\n\n").next().unwrap_or_default().replace('\n', " ");
                self.section(&format!("Patching rule `{name}`"), &about, rule);
            }
        }
        self.text
    }

    /// The choices of a field that says what each means.
    fn choices<'v>(&self, field: &'v Value) -> &'v [Value] {
        field["oneOf"].as_array().map_or(&[], Vec::as_slice)
    }

    /// A heading and the table of the fields: those that must be given first.
    fn section(&mut self, heading: &str, about: &str, schema: &'a Value) {
        let _ = writeln!(self.text, "\n## {heading}\n\n{about}");
        let fields = schema["properties"].as_object().into_iter().flatten();
        let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
        let mut fields: Vec<(&String, &Value)> =
            fields.filter(|(name, _)| !["block_type", patching::TAG].contains(&name.as_str())).collect();
        fields.sort_by_key(|(name, _)| !required(name));
        if fields.is_empty() {
            return self.text.push_str("\nIt has no fields.\n");
        }
        self.text.push_str("\n| field | value | default | meaning |\n|---|---|---|---|\n");
        for (name, field) in fields {
            let default = match field.get("default") {
                Some(default) => format!("`{default}`"),
                None if required(name) => "must be given".into(),
                None => "`null`".into(),
            };
            let meaning = text(field, "description").replace('\n', " ").replace('|', "\\|");
            let _ = writeln!(
                self.text,
                "| `{name}` | {} | {default} | {meaning} |",
                self.kind(&Walk::new(self.schema), field)
            );
        }
    }

    /// What a field may hold, in words; what is too involved to say may be anything.
    fn kind(&self, walk: &Walk<'a>, field: &'a Value) -> String {
        if text(field, "$ref") == "#/definitions/mblm_config" {
            return "a mapping, see `params.mblm_config`".into();
        }
        walk.enter(field, |field| self.kind_of(walk, field)).unwrap_or_else(|| "anything".into())
    }

    fn kind_of(&self, walk: &Walk<'a>, field: &'a Value) -> String {
        for key in ["anyOf", "oneOf", "allOf"] {
            if let Some(choices) = field[key].as_array() {
                let mut kinds: Vec<String> = choices.iter().map(|choice| self.kind(walk, choice)).collect();
                kinds.dedup();
                return kinds.join(" or ");
            }
        }
        if let Some(value) = field.get("const") {
            return format!("`{}`", value.as_str().map_or_else(|| value.to_string(), String::from));
        }
        if let Some(values) = field["enum"].as_array() {
            return values
                .iter()
                .map(|value| format!("`{}`", value.as_str().unwrap_or("null")))
                .collect::<Vec<_>>()
                .join(" or ");
        }
        let types: Vec<&str> = match &field["type"] {
            Value::String(one) => vec![one],
            Value::Array(several) => several.iter().filter_map(Value::as_str).collect(),
            _ if field["else"]["anyOf"].is_array() => return "a rule, or a list of rules".into(),
            _ => return if field.get("if").is_some() { "a block, or a list of blocks" } else { "anything" }.into(),
        };
        let is_number = types.iter().any(|kind| ["integer", "number"].contains(kind));
        let words = types.iter().filter(|kind| !(is_number && **kind == "string")).map(|kind| match *kind {
            "array" => self.list(walk, field),
            "boolean" => "true or false".into(),
            "object" => "a mapping".into(),
            "null" => "`null`".into(),
            kind => kind.to_string(),
        });
        words.collect::<Vec<_>>().join(" or ")
    }

    fn list(&self, walk: &Walk<'a>, field: &'a Value) -> String {
        match &field["items"] {
            Value::Array(items) => format!("list of {} numbers", items.len()),
            item => match field["minItems"].as_u64() {
                Some(count) if field["maxItems"] == count => format!("list of {count}, each {}", self.kind(walk, item)),
                _ => format!("list, each {}", self.kind(walk, item)),
            },
        }
    }
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn references_in_a_circle_end() {
        let block = json!({"properties": {
            "a": {"$ref": "#/definitions/block x.loop"},
            "b": {"anyOf": [{"$ref": "#/definitions/block x.grow"}, {"type": "null"}]},
        }});
        let schema = json!({"definitions": {
            "block": {"properties": {"block_type": {"oneOf": [{"const": "x", "description": "An x"}]}}},
            "block x": block,
            "block x.loop": {"$ref": "#/definitions/block x.loop"},
            "block x.grow": {"anyOf": [{"$ref": "#/definitions/block x.grow"}, {"$ref": "#/definitions/block x.grow"}]},
        }});
        let page = markdown(&schema);
        let (_, fields) = page.split_once("## Block `x`").unwrap();
        assert!(fields.contains("| `a` | anything | `null` |  |\n| `b` | anything"), "{fields}");
        assert!(fields.len() < 1 << 20, "{}", fields.len());
    }
}
