//! A parsed YAML file that knows where each field was given.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use mblm_base::nearest::suggestion;
use mblm_base::value::join;
use serde::de::DeserializeOwned;
use serde_yaml::Value;

use crate::error::{ConfigError, Place, ValueError, describe, from_value};
use crate::parse;
use crate::path::{Segment, is_within, segments, split_last};

/// Bytes of a file, at most.
const MAX_LEN: u64 = 1 << 26;

/// Opening a named pipe waits for its other end, perhaps for ever. A shell's `<(…)` is a pipe too, below `/dev` or `/proc`.
fn may_be_opened(path: &Path) -> std::io::Result<()> {
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_fifo(&path.metadata()?.file_type())
        && !["/dev", "/proc"].iter().any(|folder| path.starts_with(folder))
    {
        return Err(std::io::Error::new(ErrorKind::InvalidInput, "this is a named pipe; expected a regular file"));
    }
    Ok(())
}

/// A YAML text, parsed.
#[derive(Clone, Debug)]
pub struct Document {
    name: String,
    value: Value,
    /// Where each field was given. The root has no entry.
    places: BTreeMap<String, Place>,
}

impl Document {
    /// Reads and parses a file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let wrong = |message: String| ConfigError { file: name.clone(), path: String::new(), place: None, message };
        let mut text = String::new();
        let read = |file: File| file.take(MAX_LEN + 1).read_to_string(&mut text);
        may_be_opened(path).and_then(|()| File::open(path)).and_then(read).map_err(|error| match error.kind() {
            ErrorKind::NotFound => wrong("no such file; check the path, which starts at the current directory".into()),
            ErrorKind::IsADirectory => {
                wrong("this is a folder; expected a YAML file, such as the config.yaml in the folder of a run".into())
            }
            _ => wrong(format!("cannot be read: {error}")),
        })?;
        if text.len() as u64 > MAX_LEN {
            return Err(wrong(format!("larger than {MAX_LEN} bytes, expected a configuration")));
        }
        Self::parse(&text, &name)
    }

    /// Parses a text that errors call `name`.
    ///
    /// Plain numbers may hold underscores (`200_000_000_000`), and `2e9` is an integer. Aliases and merge keys (`<<`)
    /// are resolved; a key given twice is an error.
    pub fn parse(text: &str, name: &str) -> Result<Self, ConfigError> {
        let (value, places) = parse::parse(text).map_err(|(line, message)| ConfigError {
            file: name.into(),
            path: String::new(),
            place: Some(Place::Line(line)),
            message,
        })?;
        Ok(Document { name: name.into(), value, places })
    }

    /// What errors call the text: the path of its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value at `path`; the whole for an empty path.
    pub fn get(&self, path: &str) -> Option<&Value> {
        segments(path)?.into_iter().try_fold(&self.value, |value, segment| match segment {
            Segment::Field(name) => value.as_mapping()?.get(name),
            Segment::Index(index) => value.as_sequence()?.get(index),
        })
    }

    /// An error at `path`.
    pub fn error(&self, path: &str, message: impl Into<String>) -> ConfigError {
        ConfigError { file: self.name.clone(), path: path.into(), place: self.place(path), message: message.into() }
    }

    /// An error in the section `path`.
    pub fn error_in(&self, path: &str, error: ValueError) -> ConfigError {
        self.error(&join(path, &error.path), error.message)
    }

    /// Deserialises the section `path`; an empty path is the whole document.
    pub fn section<T: DeserializeOwned>(&self, path: &str) -> Result<T, ConfigError> {
        from_value(self.require(path)?).map_err(|error| self.error_in(path, error))
    }

    /// The value at `path`, or the error that it is missing.
    pub fn require(&self, path: &str) -> Result<&Value, ConfigError> {
        self.get(path).ok_or_else(|| {
            let (parent, field) = split_last(path);
            self.error(parent, format!("missing field `{field}`"))
        })
    }

    /// Checks that the section `path` is a mapping without fields other than `accepted`.
    pub fn check_fields(&self, path: &str, accepted: &[&str]) -> Result<(), ConfigError> {
        let value = self.require(path)?;
        let Some(mapping) = value.as_mapping() else {
            return Err(self.error(path, format!("expected a mapping, found {}", describe(value))));
        };
        match mapping.keys().filter_map(Value::as_str).find(|name| !accepted.contains(name)) {
            Some(name) => {
                let message = format!("unknown field; {}", suggestion(name, accepted));
                Err(self.error(&join(path, name), message))
            }
            None => Ok(()),
        }
    }

    /// Applies an override such as `train.learning_rate=3e-4`; the value is YAML.
    ///
    /// The section must be there; the field need not. Whether it is a known one is for whoever reads the section.
    pub fn set(&mut self, assignment: &str) -> Result<(), ConfigError> {
        let place = Place::Set(assignment.into());
        let file = self.name.clone();
        let error = |path: &str, message: String| ConfigError {
            file: file.clone(),
            path: path.into(),
            place: Some(place.clone()),
            message,
        };
        let Some((path, text)) = assignment.split_once('=') else {
            return Err(error("", "expected NAME=VALUE, such as train.learning_rate=3e-4".into()));
        };
        let path = path.trim();
        let (new, _) = parse::parse(text).map_err(|(_, message)| error(path, message))?;
        self.put(path, new, BTreeMap::from([(String::new(), place)]))
    }

    /// Replaces the value at `path`, or adds it, as [`set`](Self::set) does. It stands at `from` in `source`, a string
    /// whose fields may hold dots, and errors will name that place.
    pub fn graft(&mut self, path: &str, value: Value, source: &Document, from: &str) -> Result<(), ConfigError> {
        let elsewhere = |place: &Place| match place {
            Place::Line(line) => Place::Other(source.name.clone(), *line),
            other => other.clone(),
        };
        let within = |(place, at): (&String, &Place)| {
            let rest = place.strip_prefix(from).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']))?;
            Some((rest.trim_start_matches('.').to_string(), elsewhere(at)))
        };
        self.put(path, value, source.places.iter().filter_map(within).collect())
    }

    /// The section `path` as a document of its own, in which every field keeps its line.
    pub fn extract(&self, path: &str) -> Option<Document> {
        let value = self.get(path)?.clone();
        let places = self.places.iter().filter(|(place, _)| is_within(place, path) && *place != path);
        let places = places.map(|(place, at)| (place[path.len()..].trim_start_matches('.').to_string(), at.clone()));
        Some(Document { name: self.name.clone(), value, places: places.collect() })
    }

    /// Puts a value at `path`; `places` says where it and its fields were given.
    fn put(&mut self, path: &str, new: Value, places: BTreeMap<String, Place>) -> Result<(), ConfigError> {
        let place = places.get("").cloned();
        let file = self.name.clone();
        let error =
            |path: &str, message| ConfigError { file: file.clone(), path: path.into(), place: place.clone(), message };
        let Some(names) = segments(path).filter(|names| !names.is_empty()) else {
            return Err(error("", format!("expected a field such as `params.block[1].dropout`, found `{path}`")));
        };
        let mut slot = &mut self.value;
        let mut walked = String::new();
        for (i, name) in names.iter().enumerate() {
            let is_last = i + 1 == names.len();
            slot = descend(slot, name, is_last).map_err(|message| error(&walked, message))?;
            walked = join(&walked, &name.to_string());
        }
        *slot = new;
        self.places.retain(|place, _| !is_within(place, path));
        self.places.extend(places.into_iter().map(|(field, place)| (join(path, &field), place)));
        Ok(())
    }

    /// Where `path` was given, or the section that it would belong to.
    fn place(&self, path: &str) -> Option<Place> {
        let mut path = path;
        while !path.is_empty() {
            if let Some(place) = self.places.get(path) {
                return Some(place.clone());
            }
            path = split_last(path).0;
        }
        None
    }
}

/// One step of [`Document::set`]: the slot of `name` in `value`, made if it `is_last`.
fn descend<'a>(value: &'a mut Value, name: &Segment, is_last: bool) -> Result<&'a mut Value, String> {
    let found = describe(value);
    match (name, value) {
        (Segment::Field(name), Value::Mapping(mapping)) => {
            if !is_last && !mapping.contains_key(*name) {
                let names: Vec<&str> = mapping.keys().filter_map(Value::as_str).collect();
                return Err(format!("no section `{name}`; {}", suggestion(name, &names)));
            }
            Ok(mapping.entry(Value::String((*name).into())).or_insert(Value::Null))
        }
        (Segment::Index(index), Value::Sequence(items)) => {
            let len = items.len();
            items.get_mut(*index).ok_or_else(|| format!("no entry [{index}] in a list of {len}"))
        }
        (Segment::Field(name), _) => Err(format!("expected a mapping with a field `{name}`, found {found}")),
        (Segment::Index(index), _) => Err(format!("expected a list with an entry [{index}], found {found}")),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    const TEXT: &str = "\
# a comment
train:
  steps: 200_000
  rates: [0.1, {final: 1e-3}]
  name: run
io: {dir: /data, keep: 3}
";

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Train {
        steps: usize,
        rates: (f64, BTreeMap<String, f64>),
        name: String,
    }

    fn document(sets: &[&str]) -> Document {
        let mut document = Document::parse(TEXT, "a.yaml").unwrap();
        sets.iter().for_each(|set| document.set(set).unwrap());
        document
    }

    #[test]
    #[cfg(unix)]
    fn a_named_pipe_is_refused_instead_of_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("config.yaml");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let error = Document::read(&pipe).unwrap_err().to_string();
        assert!(error.ends_with("cannot be read: this is a named pipe; expected a regular file"), "{error}");
    }

    #[test]
    fn a_section_is_read_with_its_numbers() {
        let train: Train = document(&[]).section("train").unwrap();
        let want = Train { steps: 200_000, rates: (0.1, BTreeMap::from([("final".into(), 1e-3)])), name: "run".into() };
        assert_eq!(train, want);
        assert_eq!(document(&[]).section::<u8>("io.keep").unwrap(), 3);
    }

    #[test]
    fn overrides_reach_any_depth() {
        let document = document(&["train.rates[1].final=1_0", "train.steps=2e9", "io.new={a: [1]}", "io.new.a[0]=7"]);
        let train: Train = document.section("train").unwrap();
        assert_eq!((train.steps, train.rates.1["final"]), (2_000_000_000, 10.0));
        assert_eq!(document.get("io.new.a[0]"), Some(&Value::from(7)));
    }

    #[test]
    fn errors_name_line_or_override() {
        let of = |sets: &[&str]| document(sets).section::<Train>("train").unwrap_err().to_string();
        let cases: [(&[&str], &str); 5] = [
            (&["train.steps=x"], "a.yaml: train.steps: expected a positive integer, found \"x\" (--set train.steps=x)"),
            (&["train.rates=[1]"], "a.yaml: train.rates: expected a list of 2, found one of 1 (--set train.rates=[1])"),
            (&["train={}"], "a.yaml: train: missing field `steps` (--set train={})"),
            (&["train.nam=x"], "a.yaml: train.nam: unknown field; did you mean `name`? (--set train.nam=x)"),
            (&["train.name=5"], "a.yaml: train.name: expected a string, found 5 (--set train.name=5)"),
        ];
        for (sets, want) in cases {
            assert_eq!(of(sets), want);
        }
        let error = document(&[]).error("train.rates[1].final", "wrong");
        assert_eq!(
            (error.line(), error.to_string().as_str()),
            (Some(4), "a.yaml: train.rates[1].final: wrong (line 4)")
        );
        assert_eq!(document(&[]).error("io.keep", "x").line(), Some(6));
        assert_eq!(document(&[]).error("io.missing", "x").line(), Some(6), "falls back to the section");
        assert_eq!(document(&[]).error("other", "x").to_string(), "a.yaml: other: x");
    }

    #[test]
    fn wrong_overrides_say_what_is_there() {
        let cases = [
            ("train", "a.yaml: expected NAME=VALUE, such as train.learning_rate=3e-4 (--set train)"),
            ("trian.steps=1", "a.yaml: no section `trian`; did you mean `train`? (--set trian.steps=1)"),
            ("io.x.y=1", "a.yaml: io: no section `x`; expected one of `dir`, `keep` (--set io.x.y=1)"),
            ("io.keep.y=1", "a.yaml: io.keep: expected a mapping with a field `y`, found 3 (--set io.keep.y=1)"),
            ("train.rates[2]=1", "a.yaml: train.rates: no entry [2] in a list of 2 (--set train.rates[2]=1)"),
            ("io[0]=1", "a.yaml: io: expected a list with an entry [0], found a mapping (--set io[0]=1)"),
            ("a[b]=1", "a.yaml: expected a field such as `params.block[1].dropout`, found `a[b]` (--set a[b]=1)"),
            ("=1", "a.yaml: expected a field such as `params.block[1].dropout`, found `` (--set =1)"),
            ("io.dir=[", "a.yaml: io.dir: not valid YAML: "),
        ];
        for (set, want) in cases {
            let found = document(&[]).set(set).unwrap_err().to_string();
            assert!(if want.ends_with(": ") { found.starts_with(want) } else { found == want }, "{found}");
        }
    }

    #[test]
    fn what_another_file_overrides_is_named_there() {
        let study = "base: {train: {steps: 1, rates: [2, {}], name: x}}\nset:\n  train.rates[1]:\n    final: 3\n";
        let study = Document::parse(study, "study.yaml").unwrap();
        let mut base = study.extract("base").unwrap();
        assert_eq!(base.error("train.steps", "x").to_string(), "study.yaml: train.steps: x (line 1)");
        let value = study.get("set").unwrap()["train.rates[1]"].clone();
        let mut other = document(&[]);
        for document in [&mut base, &mut other] {
            document.graft("train.rates[1]", value.clone(), &study, "set.train.rates[1]").unwrap();
            assert_eq!(document.get("train.rates[1].final"), Some(&Value::from(3)));
        }
        let error = other.error("train.rates[1].final", "x").to_string();
        assert_eq!(error, "a.yaml: train.rates[1].final: x (study.yaml line 4)");
        let error = other.graft("train.x.y", value, &study, "set.train.rates[1]").unwrap_err().to_string();
        assert!(error.starts_with("a.yaml: train: no section `x`"), "{error}");
        assert!(error.ends_with("(study.yaml line 3)"), "{error}");
    }

    #[test]
    fn fields_are_checked() {
        let error = |accepted: &[&str]| document(&[]).check_fields("io", accepted).unwrap_err().to_string();
        assert_eq!(error(&["dir"]), "a.yaml: io.keep: unknown field; expected `dir` (line 6)");
        assert_eq!(error(&["keep", "dirs"]), "a.yaml: io.dir: unknown field; did you mean `dirs`? (line 6)");
        document(&[]).check_fields("io", &["dir", "keep"]).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_file_without_end_is_an_error() {
        let error = Document::read("/dev/zero").unwrap_err().to_string();
        assert_eq!(error, "/dev/zero: larger than 67108864 bytes, expected a configuration");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Document::read("no/such.yaml").unwrap_err().to_string();
        let want = "no/such.yaml: no such file; check the path, which starts at the current directory";
        assert_eq!(error, want);
    }
}
