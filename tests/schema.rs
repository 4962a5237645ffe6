//! `mblm schema`: what it writes accepts every configuration that the program accepts, refuses misspelt ones, and is what
//! lies in `configs/` and `docs/`.

mod compiled;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::{Map, Value};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// What `mblm schema` prints with the plugins of this repository.
fn schema(args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mingru = compiled::compile("plugins/mingru/mingru.c", folder.path(), "libmingru", &[]);
    let mut command = Command::cargo_bin("mblm").unwrap();
    command.arg("schema").args(args).arg("--plugin-dir").arg(compiled::lstm()).arg("--plugin-dir").arg(mingru);
    let output = command.output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_committed_schema_and_reference_are_current() {
    const PLUGINS: &str = "--plugin-dir target/release --plugin-dir plugins/mingru";
    for (file, args) in [("configs/mblm.schema.json", vec![]), ("docs/config.md", vec!["--markdown"])] {
        let found = fs::read_to_string(Path::new(ROOT).join(file)).unwrap_or_default();
        let command = format!("mblm schema {} {PLUGINS} > {file}", args.join(" "));
        assert!(found == schema(&args), "{file} is not what this program writes; write it again:\n  {command}");
    }
}

/// A configuration as the schema sees it. The header names the schema to editors.
fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap();
    if path.starts_with(Path::new(ROOT).join("configs")) {
        assert!(text.starts_with("# yaml-language-server: $schema=mblm.schema.json\n"), "{}", path.display());
    }
    serde_yaml::from_str(&text).unwrap()
}

/// A study is no training configuration: it has one as its base.
fn is_study(path: &Path) -> bool {
    fs::read_to_string(path).unwrap().lines().any(|line| line.starts_with("base:"))
}

fn configs() -> Vec<PathBuf> {
    let in_folder = |folder: &str| Path::new(ROOT).join(folder).read_dir().unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = ["configs", "tests/upstream-configs"].into_iter().flat_map(in_folder).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml") && !is_study(path));
    paths
}

#[test]
fn every_shipped_and_upstream_configuration_fits_and_no_misspelt_one_does() {
    let schema: Value = serde_json::from_str(&schema(&[])).unwrap();
    let fits = |value: &Value| check(&schema, &schema, value, "");
    let paths = configs();
    assert!(paths.len() >= 7, "{paths:?}");
    for path in paths {
        let whole = read(&path);
        assert_eq!(fits(&whole), Ok(()), "{}", path.display());
        // Each field of each mapping, misspelt in turn, is refused.
        for pointer in fields("", &whole) {
            let mut misspelt = whole.clone();
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            let parent = misspelt.pointer_mut(parent).unwrap().as_object_mut().unwrap();
            let value = parent.remove(name).unwrap();
            parent.insert(format!("{name}x"), value);
            assert!(fits(&misspelt).is_err(), "{}: {pointer}x is accepted", path.display());
        }
    }
}

/// The JSON pointers of all fields.
fn fields(at: &str, value: &Value) -> Vec<String> {
    match value {
        Value::Object(fields_of) => fields_of
            .iter()
            .flat_map(|(name, value)| {
                let at = format!("{at}/{name}");
                [vec![at.clone()], fields(&at, value)].concat()
            })
            .collect(),
        Value::Array(items) => {
            items.iter().enumerate().flat_map(|(i, item)| fields(&format!("{at}/{i}"), item)).collect()
        }
        _ => vec![],
    }
}

#[test]
fn encoders_data_sets_and_blocks_are_told_apart() {
    let schema: Value = serde_json::from_str(&schema(&[])).unwrap();
    let quickstart = read(&Path::new(ROOT).join("configs/quickstart.yaml"));
    let with = |pointer: &str, value: &str| {
        let mut changed = quickstart.clone();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        let value: Value = serde_yaml::from_str(value).unwrap();
        match changed.pointer_mut(parent).unwrap() {
            Value::Object(fields) => drop(fields.insert(field.into(), value)),
            list => list[field.parse::<usize>().unwrap()] = value,
        }
        check(&schema, &schema, &changed, "")
    };
    let encoder = "{input_seq_len: 64, mask_token_id: 257, mblm_config: {num_tokens: 258, pad_token_id: 256, \
                   hidden_dims: [32], num_layers: [1], seq_lens: [64], block: {block_type: transformerEncoder, \
                   attn_head_dims: 8, attn_num_heads: 4, attn_use_rot_embs: true}}}";
    let cases = [
        ("/params", encoder, true),
        ("/params", &encoder.replace("mask_token_id", "mask_token"), false),
        ("/params", &encoder.replace("seq_lens", "seq_lense"), false),
        ("/io/dataset_id", "clevr", false), // its arguments are others
        ("/io/dataset_id", "byte", false),
        ("/io/dataset_args", "null", true),
        ("/train/target_elements", "'200_000_000_000'", true), // as YAML 1.2 reads the number
        ("/train/target_elements", "many", false),
        ("/train/precision", "f33", false),
        ("/train/betas", "[0.9, 0.95]", true),
        ("/params/block", "{d_state: 1, d_conv: 1, expand: 1, headdim: 1}", true),
        ("/params/block", "{block_type: mamba, d_state: 1, d_conv: 1, expand: 1, headdim: 1}", true),
        ("/params/block", "{block_type: mamba3, d_state: 1, d_conv: 1, expand: 1, headdim: 1}", false),
        ("/params/block/0", "{block_type: lstm, dropout: 0}", true),
        ("/params/block/0", "{block_type: lstm, drop: 0}", false),
        ("/params/block/0/pos_emb_type", "learned", false),
    ];
    for (pointer, value, want) in cases {
        let found = with(pointer, value);
        assert_eq!(found.is_ok(), want, "{pointer}: {value}: {found:?}");
    }
}

/// Whether `value` fits `schema`, for the keywords that `mblm schema` uses; any other keyword is a panic, so that none
/// is passed over.
fn check(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Value::Object(keywords) = schema else {
        return if *schema == Value::Bool(true) { Ok(()) } else { Err(format!("{at}: {schema}")) };
    };
    let fits = |schema: &Value| check(root, schema, value, at);
    for (keyword, rule) in keywords {
        let rules = || rule.as_array().unwrap().iter();
        let ok = match keyword.as_str() {
            "$schema"
            | "title"
            | "description"
            | "default"
            | "definitions"
            | "then"
            | "else"
            | "additionalProperties" => true,
            "$ref" => {
                fits(root.pointer(rule.as_str().unwrap().strip_prefix('#').unwrap()).expect("a definition"))?;
                true
            }
            "type" => rule.as_str().map_or_else(|| rules().any(|one| is(one, value)), |_| is(rule, value)),
            "const" => rule == value,
            "enum" => rules().any(|one| one == value),
            "anyOf" => {
                let all: Vec<_> = rules().map(fits).collect();
                all.iter().any(Result::is_ok)
            }
            "oneOf" => rules().filter(|one| fits(one).is_ok()).count() == 1,
            "allOf" => {
                rules().try_for_each(fits)?;
                true
            }
            "if" => {
                let branch = if fits(rule).is_ok() { "then" } else { "else" };
                fits(keywords.get(branch).unwrap_or(&Value::Bool(true)))?;
                true
            }
            "required" => {
                value.as_object().is_none_or(|map| rules().all(|name| map.contains_key(name.as_str().unwrap())))
            }
            "properties" => {
                properties(root, keywords, value, at)?;
                true
            }
            "items" => match rule {
                Value::Array(rules) => value
                    .as_array()
                    .is_none_or(|all| all.iter().zip(rules).all(|(item, rule)| check(root, rule, item, at).is_ok())),
                rule => value.as_array().is_none_or(|all| all.iter().all(|item| check(root, rule, item, at).is_ok())),
            },
            "minItems" => value.as_array().is_none_or(|all| all.len() as u64 >= rule.as_u64().unwrap()),
            "maxItems" => value.as_array().is_none_or(|all| all.len() as u64 <= rule.as_u64().unwrap()),
            "minimum" => value.as_f64().is_none_or(|number| number >= rule.as_f64().unwrap()),
            "maximum" => value.as_f64().is_none_or(|number| number <= rule.as_f64().unwrap()),
            "exclusiveMinimum" => value.as_f64().is_none_or(|number| number > rule.as_f64().unwrap()),
            // Both patterns are of numbers, with underscores.
            "pattern" => value.as_str().is_none_or(|text| text.replace('_', "").parse::<f64>().is_ok()),
            other => panic!("{other} is not known to this test"),
        };
        if !ok {
            return Err(format!("{at}: {value} does not fit {keyword}: {rule}"));
        }
    }
    Ok(())
}

fn properties(root: &Value, keywords: &Map<String, Value>, value: &Value, at: &str) -> Result<(), String> {
    let known = keywords["properties"].as_object().unwrap();
    for (name, value) in value.as_object().into_iter().flatten() {
        let at = format!("{at}/{name}");
        match known.get(name) {
            Some(schema) => check(root, schema, value, &at)?,
            None if keywords.get("additionalProperties") == Some(&Value::Bool(false)) => {
                return Err(format!("{at}: unknown"));
            }
            None => {}
        }
    }
    Ok(())
}

fn is(kind: &Value, value: &Value) -> bool {
    match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("{other} is no type"),
    }
}
