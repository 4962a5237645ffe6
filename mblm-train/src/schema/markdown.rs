//! The schema as a page to read: a table of fields for each section, block and data set.

use std::fmt::Write;

use serde_json::{Map, Value};

/// The page for what [`schema`](super::schema) gave.
pub fn markdown(schema: &Value) -> String {
    let page = Page { definitions: &schema["definitions"], text: String::new() };
    page.write(schema)
}

struct Page<'a> {
    definitions: &'a Value,
    text: String,
}

impl Page<'_> {
    fn write(mut self, schema: &Value) -> String {
        self.section("`params`", "The model that predicts the next byte.", &self.definitions["generative"]);
        let about = "With `mblm_config`, `params` is an encoder, which restores masked bytes.";
        self.section("`params` of an encoder", about, &self.definitions["encoder"]);
        let about = "The fields of `params` without `input_seq_len`.";
        self.section("`params.mblm_config`", about, &self.definitions["mblm_config"]);
        let sections = &schema["properties"];
        for name in ["train", "io", "resume"] {
            self.section(&format!("`{name}`"), text(&sections[name], "description"), &self.definitions[name]);
        }
        for choice in self.choices(&self.definitions["io"]["properties"]["dataset_id"]) {
            let (id, about) = (text(choice, "const"), text(choice, "description"));
            let args = &self.definitions[format!("data set {id}")];
            self.section(&format!("`io.dataset_args` of `{id}`"), &format!("Reads {about}."), args);
        }
        for choice in self.choices(&self.definitions["block"]["properties"]["block_type"]) {
            let name = text(choice, "const");
            let block = &self.definitions[name];
            if !block.is_null() {
                self.section(&format!("Block `{name}`"), &format!("{}.", text(choice, "description")), block);
            }
        }
        self.text
    }

    /// The choices of a field that says what each means.
    fn choices<'v>(&self, field: &'v Value) -> &'v [Value] {
        field["oneOf"].as_array().map_or(&[], Vec::as_slice)
    }

    /// A heading and the table of the fields: those that must be given first.
    fn section(&mut self, heading: &str, about: &str, schema: &Value) {
        let _ = writeln!(self.text, "\n## {heading}\n\n{about}");
        let empty = Map::new();
        let fields = schema["properties"].as_object().unwrap_or(&empty);
        let required = |name: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
        let mut names: Vec<&String> = fields.keys().filter(|name| *name != "block_type").collect();
        names.sort_by_key(|name| !required(name));
        if names.is_empty() {
            return self.text.push_str("\nIt has no fields.\n");
        }
        self.text.push_str("\n| field | value | default | meaning |\n|---|---|---|---|\n");
        for name in names {
            let field = &fields[name];
            let default = match field.get("default") {
                Some(default) => format!("`{default}`"),
                None if required(name) => "must be given".into(),
                None => "`null`".into(),
            };
            let meaning = text(field, "description").replace('\n', " ").replace('|', "\\|");
            let _ = writeln!(self.text, "| `{name}` | {} | {default} | {meaning} |", self.kind(field));
        }
    }

    /// What a field may hold, in words.
    fn kind(&self, field: &Value) -> String {
        if let Some(name) = text(field, "$ref").strip_prefix("#/definitions/") {
            return match self.definitions[name].get("properties") {
                Some(_) => format!("a mapping, see `params.{name}`"),
                None => self.kind(&self.definitions[name]),
            };
        }
        for key in ["anyOf", "oneOf", "allOf"] {
            if let Some(choices) = field[key].as_array() {
                let mut kinds: Vec<String> = choices.iter().map(|choice| self.kind(choice)).collect();
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
            _ => return if field.get("if").is_some() { "a block, or a list of blocks" } else { "anything" }.into(),
        };
        let is_number = types.iter().any(|kind| ["integer", "number"].contains(kind));
        let words = types.iter().filter(|kind| !(is_number && **kind == "string")).map(|kind| match *kind {
            "array" => self.list(field),
            "boolean" => "true or false".into(),
            "object" => "a mapping".into(),
            "null" => "`null`".into(),
            kind => kind.to_string(),
        });
        words.collect::<Vec<_>>().join(" or ")
    }

    fn list(&self, field: &Value) -> String {
        match &field["items"] {
            Value::Array(items) => format!("list of {} numbers", items.len()),
            item => match field["minItems"].as_u64() {
                Some(count) if field["maxItems"] == count => format!("list of {count}, each {}", self.kind(item)),
                _ => format!("list, each {}", self.kind(item)),
            },
        }
    }
}

fn text<'v>(value: &'v Value, field: &str) -> &'v str {
    value[field].as_str().unwrap_or_default()
}
