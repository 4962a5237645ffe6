//! The YAML of a study: a base, variants of it, a grid over fields, seeds and a budget.
//!
//! ```yaml
//! base: quickstart.yaml               # a training configuration, beside this file; or written out here
//! set: {train.batch_size: 8}          # of every variant
//! variants:
//!   - name: as it is
//!   - name: mamba
//!     set: {"params.block[0]": {block_type: mamba1, d_state: 16, d_conv: 4, expand: 2}}
//!   - name: another one
//!     config: other.yaml              # a whole configuration
//! grid:                               # all combinations, of each variant
//!   train.learning_rate: [1e-3, 3e-3]
//!   "params.block[1]": {lstm: {block_type: lstm}, transformer: {…}}    # values with names of their own
//! seeds: [1, 2, 3]                    # or {start: 3, most: 10}
//! tune: {train.learning_rate: {factor: 2, points: 5}}
//! budget: {bytes: 2_000_000, parameters: base}
//! ```

pub(crate) mod budget;
pub(crate) mod scale;
pub(crate) mod seeds;
pub(crate) mod tune;
mod variants;

use std::path::{Path, PathBuf};

use mblm_yaml::{ConfigError, Document, describe, join};
use serde_yaml::{Mapping, Value};

use crate::launch::launcher::Launcher;
use budget::Budget;
use scale::Scale;
use seeds::Seeds;
use tune::Tune;

const FIELDS: [&str; 13] = [
    "name",
    "description",
    "output_dir",
    "base",
    "set",
    "variants",
    "grid",
    "seeds",
    "tune",
    "scale",
    "budget",
    "prompt",
    "jobs",
];
/// The sections of a training configuration: an override that begins so is for every variant.
const SECTIONS: [&str; 4] = ["params", "train", "io", "resume"];

/// A study as its YAML says.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name.
    pub name: String,
    /// The question that it asks, in words.
    pub description: Option<String>,
    /// Its folder.
    pub output_dir: PathBuf,
    /// What variants are compared with.
    pub base: Document,
    /// The configuration of each variant, by name.
    pub variants: Vec<(String, Document)>,
    /// The seeds that each variant is trained with.
    pub seeds: Seeds,
    /// What is tuned for each variant before it is scored.
    pub tune: Option<Tune>,
    /// In which sizes, and for which budgets, every variant is trained.
    pub scale: Option<Scale>,
    /// What is equal between them.
    pub budget: Budget,
    /// What samples continue; the beginning of the validation data, if none.
    pub prompt: Option<String>,
    /// Runs at a time.
    pub jobs: usize,
    /// Starts the runs on other machines. Never from the YAML, which must not say what programs are started.
    pub launcher: Option<Launcher>,
    /// The study's own YAML, for errors.
    pub document: Document,
}

impl Spec {
    /// Reads a study. Overrides such as `seeds=[1]` or `budget.bytes=1000` change the study, those such as
    /// `io.dataset_dir=DIR` every variant.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut document = Document::read(path)?;
        let (of_variants, of_study): (Vec<&String>, Vec<&String>) = overrides.iter().partition(|assignment| {
            let end = assignment.find(['.', '=', '[']).unwrap_or(assignment.len());
            SECTIONS.contains(&assignment[..end].trim())
        });
        of_study.into_iter().try_for_each(|assignment| document.set(assignment))?;
        if document.get("params").is_some() && document.get("base").is_none() {
            let message =
                "this is a training configuration; train it with `mblm train`, or name it as the `base` of a study";
            return Err(document.error("", message));
        }
        document.check_fields("", &FIELDS)?;
        let reader = Reader { document: &document, folder: path.parent().unwrap_or(Path::new("")), of_variants };
        let stem = path.file_stem().map_or("study".into(), |stem| stem.to_string_lossy().into_owned());
        let name = reader.optional("name")?.unwrap_or(stem);
        if slug(&name).is_empty() {
            return Err(document.error("name", format!("expected a name with letters or digits, found {name:?}")));
        }
        reader.check_length("name", &name)?;
        let output_dir = reader.optional("output_dir")?.unwrap_or_else(|| Path::new("runs").join(slug(&name)));
        if output_dir.as_os_str().is_empty() {
            return Err(document.error("output_dir", "expected the study's folder, found \"\""));
        }
        let base = reader.base()?;
        let variants = reader.variants(&base)?;
        let jobs = reader.optional("jobs")?.unwrap_or(1);
        if jobs == 0 {
            return Err(document.error("jobs", "expected a positive integer, found 0"));
        }
        let (seeds, scale) = (Seeds::from_document(&document)?, Scale::from_document(&document)?);
        if let (Seeds::Until { .. }, Some(_)) = (&seeds, &scale) {
            let message = "a scaling study trains every size with the same seeds; give a list, such as [1, 2, 3]";
            return Err(document.error("seeds", message));
        }
        let tune = Tune::from_document(&document, &seeds)?;
        if let Some(Value::Mapping(grid)) = document.get("grid")
            && let Some(twice) = tune.iter().flat_map(|tune| &tune.fields).find(|field| grid.contains_key(&field.path))
        {
            let message = "is also in `tune`, which would overwrite the grid's values; remove it from one of the two";
            return Err(document.error(&join("grid", &twice.path), message));
        }
        Ok(Spec {
            name,
            description: reader.optional("description")?,
            output_dir,
            base,
            variants,
            tune,
            budget: Budget::from_document(&document, scale.as_ref())?,
            seeds,
            scale,
            prompt: reader.optional("prompt")?,
            jobs,
            launcher: None,
            document,
        })
    }
}

/// A name as part of a file's name: small letters, digits and single dashes.
pub(super) fn slug(name: &str) -> String {
    let plain = name.to_lowercase().replace(|c: char| !c.is_alphanumeric() && c != '_' && c != '.', "-");
    let parts: Vec<&str> = plain.split('-').filter(|part| !part.is_empty()).collect();
    parts.join("-").trim_matches('.').to_string()
}

struct Reader<'a> {
    document: &'a Document,
    /// Where paths begin.
    folder: &'a Path,
    /// Overrides for every variant.
    of_variants: Vec<&'a String>,
}

impl Reader<'_> {
    fn optional<T: serde::de::DeserializeOwned>(&self, field: &str) -> Result<Option<T>, ConfigError> {
        match self.document.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => self.document.section(field).map(Some),
        }
    }

    fn base(&self) -> Result<Document, ConfigError> {
        let base = match self.document.require("base")? {
            Value::String(path) => self.config("base", path)?,
            Value::Mapping(_) => self.document.extract("base").unwrap_or_else(|| self.document.clone()),
            other => {
                let message =
                    format!("expected the path of a configuration, or a configuration, found {}", describe(other));
                return Err(self.document.error("base", message));
            }
        };
        self.with_common(base)
    }

    /// The configuration in the file at `path`, which field `field` names.
    fn config(&self, field: &str, path: &str) -> Result<Document, ConfigError> {
        let place = self.folder.join(path);
        match place.is_file() {
            true => Document::read(place),
            false => Err(self.document.error(
                field,
                format!(
                    "there is no file {}; expected the path of a configuration, from the study's folder",
                    place.display()
                ),
            )),
        }
    }

    /// What all variants share: `set`, and the command line's overrides.
    fn with_common(&self, mut config: Document) -> Result<Document, ConfigError> {
        self.apply(&mut config, "set")?;
        self.of_variants.iter().try_for_each(|assignment| config.set(assignment))?;
        Ok(config)
    }

    /// Applies the mapping of fields to values at `path`, if there is one.
    fn apply(&self, config: &mut Document, path: &str) -> Result<(), ConfigError> {
        for (field, value) in self.mapping(path)?.into_iter().flatten() {
            let field = field.as_str().unwrap_or_default();
            config.graft(field, value.clone(), self.document, &join(path, field))?;
        }
        Ok(())
    }

    fn mapping(&self, path: &str) -> Result<Option<&Mapping>, ConfigError> {
        match self.document.get(path) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Mapping(mapping)) => Ok(Some(mapping)),
            Some(other) => {
                let message =
                    format!("expected a mapping of fields, such as params.num_layers, found {}", describe(other));
                Err(self.document.error(path, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use mblm_yaml::difference::shown;

    use super::*;

    const BASE: &str = "params: {num_layers: [1, 2], block: [{block_type: a}, {block_type: b}]}\ntrain: {lr: 1}\n";

    fn read(text: &str, overrides: &[&str]) -> Result<Spec, String> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("base.yaml"), BASE).unwrap();
        fs::write(folder.path().join("other.yaml"), "params: {num_layers: [9]}\ntrain: {lr: 9}\n").unwrap();
        let path = folder.path().join("My study.yaml");
        fs::write(&path, text).unwrap();
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        let place = format!("{}/", folder.path().display());
        Spec::read(&path, &overrides).map_err(|error| error.to_string().replace(&place, ""))
    }

    /// Names of the variants with a field of each.
    fn variants(spec: &Spec, field: &str) -> Vec<(String, String)> {
        spec.variants.iter().map(|(name, config)| (name.clone(), shown(config.get(field).unwrap()))).collect()
    }

    #[test]
    fn variants_change_the_base() {
        let text = "base: base.yaml\nset: {train.lr: 5}\nbudget: {bytes: 10}\nseeds: [3, 1]\nvariants:\n  - name: plain\n  \
                    - {name: Deep one, set: {'params.num_layers[1]': 7}}\n  - {name: c, config: other.yaml}\n";
        let spec = read(text, &[]).unwrap();
        let want = [("plain", "[1, 2]"), ("Deep one", "[1, 7]"), ("c", "[9]")];
        assert_eq!(variants(&spec, "params.num_layers"), want.map(|(a, b)| (a.to_string(), b.to_string())));
        assert!(variants(&spec, "train.lr").iter().all(|(_, lr)| lr == "5"));
        assert_eq!((&spec.name[..], spec.output_dir.to_str(), spec.jobs), ("My study", Some("runs/my-study"), 1));
        assert_eq!(spec.seeds, Seeds::Listed(vec![3, 1]));
        let spec = read(text, &["train.lr=6", "seeds=[4]", "jobs=2", "variants[0].name=x"]).unwrap();
        assert!(variants(&spec, "train.lr").iter().all(|(_, lr)| lr == "6"), "the command line has the last word");
        assert_eq!((spec.seeds, spec.jobs, &spec.variants[0].0[..]), (Seeds::Listed(vec![4]), 2, "x"));
    }

    #[test]
    fn a_grid_is_a_product() {
        let text = "base: base.yaml\nbudget: {bytes: 10}\ngrid:\n  params.block[0]: {one: {block_type: x}, two: {block_type: y}}\n  \
                    train.lr: [1, 2]\n  params.block[1]: [{block_type: z}]\n";
        let names: Vec<String> =
            variants(&read(text, &[]).unwrap(), "train.lr").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["one / lr=1 / z", "one / lr=2 / z", "two / lr=1 / z", "two / lr=2 / z"]);
        let spec = read(&format!("{text}variants: [{{name: v}}, {{name: w}}]\n"), &[]).unwrap();
        assert_eq!((spec.variants.len(), &spec.variants[7].0[..]), (8, "w / two / lr=2 / z"));
        assert_eq!(shown(spec.variants[7].1.get("params.block").unwrap()), "[{block_type: y}, {block_type: z}]");
    }

    #[test]
    fn an_inline_base_keeps_its_lines() {
        let spec = read("budget: {bytes: 10}\nbase:\n  train:\n    lr: 1\n", &[]).unwrap();
        assert_eq!(variants(&spec, "train.lr"), [("base".to_string(), "1".to_string())]);
        let error = spec.base.error("train.lr", "wrong").to_string();
        assert!(error.ends_with("My study.yaml: train.lr: wrong (line 4)"), "{error}");
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        let cases = [
            ("bse: base.yaml", "My study.yaml: bse: unknown field; did you mean `base`? (line 1)"),
            ("budget: {bytes: 1}", "My study.yaml: missing field `base`"),
            (
                "params: {}\ntrain: {}",
                "My study.yaml: this is a training configuration; train it with `mblm train`, or",
            ),
            ("base: no.yaml", "My study.yaml: base: there is no file no.yaml; expected the path"),
            ("base: base.yaml", "My study.yaml: missing field `budget`"),
            (
                "base: base.yaml\ngrid: {train.lr: [1, 2]}\ntune: {train.lr: {points: 3}}\nbudget: {bytes: 1}",
                "grid.train.lr: is also in `tune`, which would overwrite the grid's values; remove it from one of the two",
            ),
            (
                "base: base.yaml\nseeds: {start: 3, most: 5}\nscale: {sizes: [1M], budgets: [1T]}",
                "seeds: a scaling study trains",
            ),
            ("base: base.yaml\njobs: 0", "jobs: expected a positive integer, found 0"),
            ("base: base.yaml\nvariants: {}", "variants: expected a list of variants"),
            ("base: base.yaml\nvariants: [{set: {}}]", "variants[0]: missing field `name` (line 2)"),
            (
                "base: base.yaml\nvariants: [{name: a, sets: {}}]",
                "variants[0].sets: unknown field; did you mean `set`?",
            ),
            ("base: base.yaml\nvariants: [{name: '/'}]", "variants[0].name: expected a name with letters or digits"),
            (
                "base: base.yaml\nvariants: [{name: A b}, {name: a-b}]",
                "variants: the variants \"a-b\" and \"A b\" would share a folder; give them different names",
            ),
            (
                "base: base.yaml\nvariants:\n  - name: a\n    set:\n      parms.num_layers: 3",
                "base.yaml: no section `parms`; did you mean `params`? (My study.yaml line 5)",
            ),
            ("base: base.yaml\ngrid: {train.lr: 3}", "grid.train.lr: expected a list of values"),
            ("base: base.yaml\ngrid: {train.lr: []}", "grid.train.lr: expected at least one value"),
            (
                "base: base.yaml\ngrid: [1]",
                "grid: expected a mapping of fields, such as params.num_layers, found a list",
            ),
        ];
        for (text, want) in cases {
            let found = read(text, &[]).unwrap_err();
            assert!(found.contains(want), "{found}\n{want}");
        }
        let text = format!("base: base.yaml\nvariants: [{{name: {}}}]", "x".repeat(300));
        let found = read(&text, &[]).unwrap_err();
        assert!(
            found.contains("variants: the name \"xxxxx") && found.contains("has 300 bytes; expected at most"),
            "{found}"
        );
        let many: Vec<String> = (0..40).map(|n| n.to_string()).collect();
        let text = format!("base: base.yaml\ngrid: {{train.lr: [{0}], params.x: [{0}]}}", many.join(", "));
        assert!(read(&text, &[]).unwrap_err().contains("grid: 1600 combinations; expected at most 1000"));
    }

    #[test]
    fn names_become_folders() {
        for (name, want) in
            [("mamba1 / LSTM", "mamba1-lstm"), ("num_layers=[2, 1]", "num_layers-2-1"), ("..", ""), ("é 3", "é-3")]
        {
            assert_eq!(slug(name), want);
        }
    }
}
