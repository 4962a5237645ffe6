//! The JSON Schema of a whole training YAML, for editors: the sections from the structs that read them, the blocks from
//! the registry, plugins' included, `io.dataset_args` from the registered data sets.
//!
//! It accepts whatever the program accepts. The program also checks what a schema does not say well, such as lists of one
//! length.

pub mod markdown;

use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::patching;
use mblm_core::registry::{BlockInfo, BlockRegistry, TAG};
use mblm_data::{self, DatasetKind};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::config::{IoSection, ResumeSection, SECTIONS, SUMMARY, TrainSection};
use crate::error::Result;

/// The field of an encoder's `params` that holds its stages.
const HIERARCHY: &str = "mblm_config";

/// The schema, draft 7, with `registry`'s blocks.
///
/// # Errors
/// Two data sets with one id.
pub fn schema(registry: &BlockRegistry) -> Result<Value> {
    let kinds = mblm_data::kinds()?;
    let mut definitions = Definitions::default();
    definitions.add("generative", params::<MblmConfig>());
    definitions.add("encoder", params::<MblmEncoderConfig>());
    let reference = definitions.add(HIERARCHY, of::<MblmConfig>());
    definitions.0["encoder"]["properties"][HIERARCHY] = json!({"description": "The hierarchy.", "allOf": [reference]});
    for model in ["generative", HIERARCHY] {
        definitions.0[model]["properties"]["block"] = json!({
            "description": "What runs at each stage: one block for all, or a list with one per stage.",
            "if": {"type": "array"},
            "then": {"type": "array", "items": {"$ref": "#/definitions/block"}},
            "else": {"$ref": "#/definitions/block"},
        });
        let patching = &mut definitions.0[model]["properties"]["patching"];
        patching["if"] = json!({"type": "array"});
        patching["then"] = json!({"type": "array", "items": {"$ref": "#/definitions/patching"}});
        patching["else"] = json!({"anyOf": [{"$ref": "#/definitions/patching"}, {"type": "null"}]});
    }
    for block in registry.blocks() {
        definitions.add_block(block);
    }
    definitions.add_rules();
    definitions.0.insert("block".into(), block(registry));
    definitions.add("train", of::<TrainSection>());
    definitions.add("resume", of::<ResumeSection>());
    definitions.add("io", of::<IoSection>());
    definitions.add_datasets(&kinds);
    let mut schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "MBLM training configuration",
        "type": "object",
        "properties": {
            "params": {
                "description": "The model. With `mblm_config`, it is an encoder that restores masked bytes.",
                "type": "object",
                "if": {"required": ["mblm_config"]},
                "then": {"$ref": "#/definitions/encoder"},
                "else": {"$ref": "#/definitions/generative"},
            },
            "train": {"description": "How to train.", "allOf": [{"$ref": "#/definitions/train"}]},
            "io": {"description": "What to read and where to write.", "allOf": [{"$ref": "#/definitions/io"}]},
            "resume": {
                "description": "The checkpoint that a new run starts from.",
                "anyOf": [{"$ref": "#/definitions/resume"}, {"type": "null"}],
            },
            SUMMARY: {"description": "Written by the package into its output; accepted and ignored."},
        },
        "required": SECTIONS,
        "additionalProperties": false,
        "definitions": definitions.0,
    });
    finish(&mut schema);
    Ok(schema)
}

/// The schema of one type, a document of its own.
fn of<T: JsonSchema>() -> Value {
    SchemaGenerator::new(SchemaSettings::draft07()).into_root_schema_for::<T>().to_value()
}

/// The section `params` around a model.
fn params<T: JsonSchema>() -> Value {
    let mut schema = of::<T>();
    let length = json!({"description": "Bytes of one training sequence.", "type": "integer", "minimum": 1});
    schema["properties"]["input_seq_len"] = length;
    if let Some(required) = schema["required"].as_array_mut() {
        required.push("input_seq_len".into());
    }
    schema
}

/// What other parts of the schema refer to, by name.
#[derive(Default)]
struct Definitions(Map<String, Value>);

impl Definitions {
    /// Adds a schema that is a document of its own; what it defines stands beside it as `name.…`. Returns a reference.
    fn add(&mut self, name: &str, mut schema: Value) -> Value {
        if let Some(fields) = schema.as_object_mut() {
            for key in ["$defs", "definitions"] {
                let Some(Value::Object(inner)) = fields.remove(key) else { continue };
                for (inner_name, mut inner) in inner {
                    requalify(&mut inner, name);
                    self.0.insert(format!("{name}.{inner_name}"), inner);
                }
            }
            fields.remove("$schema");
            fields.insert("title".into(), name.into());
        }
        requalify(&mut schema, name);
        self.0.insert(name.into(), schema);
        json!({"$ref": format!("#/definitions/{name}")})
    }

    /// Adds the fields of a block type, among which `block_type` then is.
    fn add_block(&mut self, block: &BlockInfo) {
        let mut schema = block.schema.clone();
        if let Some(fields) = schema.as_object_mut() {
            fields.insert("description".into(), block.about.clone().into());
            // A plugin may describe its fields by anything; properties that are no object stay as they are.
            if let Value::Object(properties) = fields.entry("properties").or_insert_with(|| json!({})) {
                properties.insert(TAG.into(), json!({"enum": names(block)}));
            }
        }
        self.add(&definition(block), schema);
    }

    /// Adds the rules of patching: each by its name, or with its fields.
    fn add_rules(&mut self) {
        let mut choices = vec![];
        for rule in patching::registry::all() {
            let mut schema = (rule.schema)().to_value();
            schema["properties"][patching::TAG] = json!({"const": rule.name});
            let about = schema["description"].as_str().and_then(|text| text.lines().next()).unwrap_or_default();
            // A name alone is enough for a rule that needs no field.
            if schema["required"].is_null() {
                choices.push(json!({"const": rule.name, "description": about}));
            }
            match &mut schema["required"] {
                Value::Array(required) => required.push(patching::TAG.into()),
                required => *required = json!([patching::TAG]),
            }
            choices.push(self.add(&format!("rule {}", rule.name), schema));
        }
        self.0.insert("patching".into(), json!({"title": "patching", "anyOf": choices}));
    }

    /// Says which data sets there are, and what each takes in `dataset_args`.
    fn add_datasets(&mut self, kinds: &[&DatasetKind]) {
        let choice = |kind: &&DatasetKind| json!({"const": kind.id, "description": kind.about});
        let choices: Vec<Value> = kinds.iter().map(choice).collect();
        self.0["io"]["properties"]["dataset_id"]["oneOf"] = choices.into();
        let mut arguments = vec![];
        for kind in kinds {
            let Some(args) = kind.args else { continue };
            let reference = self.add(&format!("data set {}", kind.id), args().to_value());
            arguments.push(json!({
                "if": {"properties": {"dataset_id": {"const": kind.id}}},
                "then": {"properties": {"dataset_args": {"anyOf": [reference, {"type": "null"}]}}},
            }));
        }
        self.0["io"]["allOf"] = arguments.into();
    }
}

/// A block of any type: `block_type` decides; without it, a type that may be inferred.
fn block(registry: &BlockRegistry) -> Value {
    let reference = |block: &BlockInfo| json!({"$ref": format!("#/definitions/{}", definition(block))});
    let choices: Vec<Value> = registry
        .blocks()
        .flat_map(|block| names(block).into_iter().map(|name| json!({"const": name, "description": block.about})))
        .collect();
    let mut cases: Vec<Value> = registry
        .blocks()
        .map(|block| {
            let named = json!({"properties": {TAG: {"enum": names(block)}}, "required": [TAG]});
            json!({"if": named, "then": reference(block)})
        })
        .collect();
    let inferred: Vec<Value> = registry.blocks().filter(|block| block.infers).map(reference).collect();
    cases.push(json!({"if": {"required": [TAG]}, "else": {"anyOf": inferred}}));
    json!({
        "description": "What runs at a stage.",
        "type": "object",
        "properties": {TAG: {
            "description": "The block type. May be left out if only one type has these fields.",
            "oneOf": choices,
        }},
        "allOf": cases,
    })
}

/// The name of the definition of a block's fields, which is no other definition's whatever the block is called.
fn definition(block: &BlockInfo) -> String {
    format!("block {}", block.name)
}

/// The name of a block type and its aliases.
fn names(block: &BlockInfo) -> Vec<&str> {
    std::iter::once(&block.name).chain(&block.aliases).map(String::as_str).collect()
}

/// Has the references of a schema that was a document of its own point to where its definitions are now.
fn requalify(schema: &mut Value, name: &str) {
    visit(schema, &mut |fields| {
        if let Some(Value::String(reference)) = fields.get_mut("$ref") {
            let inner = ["#/$defs/", "#/definitions/"].iter().find_map(|old| reference.strip_prefix(old));
            match (inner, reference.as_str()) {
                (Some(inner), _) => *reference = format!("#/definitions/{name}.{inner}"),
                (None, "#") => *reference = format!("#/definitions/{name}"),
                (None, _) => {}
            }
        }
    });
}

/// Drops what says nothing to an editor, and lets numbers have underscores, as configurations do (`200_000_000_000`,
/// which YAML 1.2 takes for a string).
fn finish(schema: &mut Value) {
    visit(schema, &mut |fields| {
        fields.remove("format");
        if let Some(items) = fields.remove("prefixItems") {
            fields.insert("items".into(), items);
        }
        let types = match fields.get("type") {
            Some(Value::String(one)) => vec![json!(one)],
            Some(Value::Array(several)) => several.clone(),
            _ => return,
        };
        let pattern = match () {
            () if types.contains(&json!("string")) => return,
            () if types.contains(&json!("integer")) => "^[0-9][0-9_]*$",
            () if types.contains(&json!("number")) => "^[-+]?[0-9][0-9_]*(\\.[0-9_]*)?([eE][-+]?[0-9]+)?$",
            () => return,
        };
        fields.insert("type".into(), [types, vec![json!("string")]].concat().into());
        fields.insert("pattern".into(), pattern.into());
    });
}

/// Calls `change` with every object of a schema, outer ones first.
fn visit(schema: &mut Value, change: &mut dyn FnMut(&mut Map<String, Value>)) {
    match schema {
        Value::Object(fields) => {
            change(fields);
            fields.values_mut().for_each(|value| visit(value, change));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| visit(item, change)),
        _ => {}
    }
}
