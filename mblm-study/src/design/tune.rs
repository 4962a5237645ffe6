//! What is tuned for each variant before it is scored.
//!
//! ```yaml
//! tune:
//!   train.learning_rate: {factor: 2, points: 5}     # a grid in steps of a factor, around the variant's own value
//!   train.weight_decay: [0.0, 0.01, 0.1]            # these values; the variant's own must be one of them
//!   seeds: [1000]                                   # of the tries; default: 1000, or the next free one
//!   share: 0.5                                      # of the budget, for each try; default: 1
//!   widen: 4                                        # a grid is extended at most this often; default: 4
//! ```
//!
//! Fields are tuned one at a time, in this order, each with the best values of the fields before it.

use std::fmt;

use mblm_yaml::{ConfigError, Document, describe, join};
use serde::{Deserialize, Serialize};
use serde_yaml::{Mapping, Value};

use super::seeds::{Seeds, listed};

const PATH: &str = "tune";
/// Keys that are not fields of a training configuration.
const OPTIONS: [&str; 3] = ["seeds", "share", "widen"];
/// Sections whose fields can be tuned.
const TUNABLE: [&str; 2] = ["train.", "params."];
/// Fields that the study decides, or that change what the loss is measured on.
const DECIDED: [&str; 8] = [
    "train.seed",
    "train.target_elements",
    "train.max_eval_steps",
    "train.max_seconds",
    "train.validate_every",
    "params.input_seq_len",
    "params.num_tokens",
    "params.pad_token_id",
];
/// The first seed to consider if none is given.
const FIRST_SEED: u64 = 1000;
/// How often a grid may be extended, unless the study says otherwise.
const WIDEN: usize = 4;
/// More values of one field than this are a mistake.
const MOST_POINTS: usize = 100;
/// The names of folders contain the values, which limits the number of fields.
const MOST_FIELDS: usize = 4;

/// Section `tune` of a study.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tune {
    /// The fields, in the order in which they are tuned.
    pub fields: Vec<Field>,
    /// The seeds of the tries, which no scored run uses.
    pub seeds: Vec<u64>,
    /// The share of the budget that a try trains for.
    pub share: f64,
    /// How often a grid may be extended while a best value lies at an edge.
    pub widen: usize,
}

/// A field and the values that it is tried with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Field {
    /// The field, `train.learning_rate`.
    pub path: String,
    /// Its values.
    pub values: Values,
}

/// The values that a field is tried with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Values {
    /// These.
    Listed(Vec<f64>),
    /// A grid around the variant's own value, in equal steps on a logarithmic axis.
    Grid {
        /// The ratio of two neighbours.
        factor: f64,
        /// The number of values, which is odd.
        points: usize,
    },
}

impl Tune {
    /// Reads section `tune`, if there is one. Its seeds must differ from those of the scored runs.
    pub(super) fn from_document(document: &Document, scoring: &Seeds) -> Result<Option<Self>, ConfigError> {
        let section = match document.get(PATH) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Mapping(section)) => section,
            Some(other) => {
                let message = format!(
                    "expected fields and their values, such as {{train.learning_rate: {{factor: 2, points: 5}}}}, found {}",
                    describe(other)
                );
                return Err(document.error(PATH, message));
            }
        };
        let fields = fields(document, section)?;
        let share: f64 = if section.contains_key("share") { document.section("tune.share")? } else { 1.0 };
        if !(share > 0.0 && share <= 1.0) {
            let message = format!("expected a share of the budget, above 0 and at most 1, found {share}");
            return Err(document.error("tune.share", message));
        }
        let widen = if section.contains_key("widen") { document.section("tune.widen")? } else { WIDEN };
        if widen > MOST_POINTS {
            let message = format!("expected at most {MOST_POINTS} further tries, found {widen}");
            return Err(document.error("tune.widen", message));
        }
        Ok(Some(Tune { fields, seeds: seeds(document, section, scoring)?, share, widen }))
    }

    /// The number of values that a variant tries before any grid is extended.
    pub(crate) fn points(&self) -> usize {
        // A field's first value was already tried with the field before it.
        self.fields.iter().map(|field| field.values.len()).sum::<usize>() - (self.fields.len() - 1)
    }

    /// The number of values that a variant tries at most.
    pub(crate) fn most_points(&self) -> usize {
        let grids = self.fields.iter().filter(|field| matches!(field.values, Values::Grid { .. })).count();
        self.points() + grids * self.widen
    }
}

impl fmt::Display for Tune {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fields: Vec<String> = self.fields.iter().map(|field| format!("{} {}", field.path, field.values)).collect();
        write!(f, "{}; share {}, widen {}, seeds {:?}", fields.join(", "), self.share, self.widen, self.seeds)
    }
}

impl fmt::Display for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Values::Listed(values) => write!(f, "{values:?}"),
            Values::Grid { factor, points } => write!(f, "{{factor: {factor}, points: {points}}}"),
        }
    }
}

impl Values {
    /// The number of values before a grid is extended.
    pub(crate) fn len(&self) -> usize {
        match self {
            Values::Listed(values) => values.len(),
            Values::Grid { points, .. } => *points,
        }
    }
}

fn fields(document: &Document, section: &Mapping) -> Result<Vec<Field>, ConfigError> {
    let mut fields = Vec::new();
    for (path, values) in section {
        let path = path.as_str().unwrap_or_default();
        if OPTIONS.contains(&path) {
            continue;
        }
        let place = join(PATH, path);
        if !TUNABLE.iter().any(|start| path.starts_with(start)) {
            let message = format!(
                "expected a field of `train` or `params`, such as train.learning_rate, or one of {}",
                OPTIONS.map(|option| format!("`{option}`")).join(", ")
            );
            return Err(document.error(&place, message));
        }
        if DECIDED.contains(&path) {
            let message = "cannot be tuned: the study sets it, or it changes what the loss is measured on; remove it";
            return Err(document.error(&place, message));
        }
        fields.push(Field { path: path.into(), values: read_values(document, &place, values)? });
    }
    match fields.len() {
        0 => {
            Err(document
                .error(PATH, "has no field to tune; add one, such as train.learning_rate: {factor: 2, points: 5}"))
        }
        1..=MOST_FIELDS => Ok(fields),
        n => Err(document.error(PATH, format!("expected at most {MOST_FIELDS} fields, found {n}"))),
    }
}

fn read_values(document: &Document, place: &str, values: &Value) -> Result<Values, ConfigError> {
    const EXPECTED: &str = "expected {factor: F, points: N}, or a list of numbers";
    let error = |message: String| document.error(place, message);
    match values {
        Value::Sequence(list) => {
            let numbers: Option<Vec<f64>> = list.iter().map(|value| value.as_f64().filter(|v| v.is_finite())).collect();
            let numbers = numbers.ok_or_else(|| error(format!("{EXPECTED}, found {}", describe(values))))?;
            let twice = (1..numbers.len()).find(|&i| numbers[..i].contains(&numbers[i]));
            match (numbers.len(), twice) {
                (_, Some(i)) => Err(error(format!("the value {} is given twice", numbers[i]))),
                (2..=MOST_POINTS, _) => Ok(Values::Listed(numbers)),
                (n, _) => Err(error(format!("expected 2 to {MOST_POINTS} values, found {n}"))),
            }
        }
        Value::Mapping(mapping) => {
            let unknown = mapping.keys().filter_map(Value::as_str).find(|key| !["factor", "points"].contains(key));
            if let Some(key) = unknown {
                return Err(error(format!("unknown field `{key}`; {EXPECTED}")));
            }
            let factor = mapping.get("factor").and_then(Value::as_f64).unwrap_or(2.0);
            if !(factor > 1.0 && factor.is_finite()) {
                return Err(error(format!("factor: expected a number above 1, found {factor}")));
            }
            match mapping.get("points").map_or(Some(5), Value::as_u64) {
                Some(points) if points % 2 == 1 && points >= 3 && points <= MOST_POINTS as u64 => {
                    Ok(Values::Grid { factor, points: points as usize })
                }
                _ => Err(error(format!(
                    "points: expected an odd number from 3 to {MOST_POINTS}, so that the variant's own value is in the \
                     middle, found {}",
                    mapping.get("points").map_or("nothing".into(), describe)
                ))),
            }
        }
        other => Err(error(format!("{EXPECTED}, found {}", describe(other)))),
    }
}

fn seeds(document: &Document, section: &Mapping, scoring: &Seeds) -> Result<Vec<u64>, ConfigError> {
    let scoring = scoring.all();
    if !section.contains_key("seeds") {
        return Ok((FIRST_SEED..).find(|seed| !scoring.contains(seed)).into_iter().collect());
    }
    let seeds = listed(document, "tune.seeds")?;
    match seeds.iter().position(|seed| scoring.contains(seed)) {
        None => Ok(seeds),
        Some(i) => Err(document.error(
            &format!("tune.seeds[{i}]"),
            format!(
                "the seed {} is also in `seeds`: a value that won by luck with this seed would profit from the same \
                 luck in the score; choose another seed",
                seeds[i]
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<Tune>, String> {
        let document = Document::parse(text, "s.yaml").unwrap();
        Tune::from_document(&document, &Seeds::Listed(vec![1, 1000])).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_tuned_is_read() {
        let tune =
            read("tune: {train.learning_rate: {factor: 2, points: 5}, train.weight_decay: [0, 0.1], share: 0.5}");
        let tune = tune.unwrap().unwrap();
        assert_eq!(tune.fields[0].values, Values::Grid { factor: 2.0, points: 5 });
        assert_eq!(tune.fields[1], Field { path: "train.weight_decay".into(), values: Values::Listed(vec![0.0, 0.1]) });
        assert_eq!((&tune.seeds[..], tune.share, tune.widen), (&[1001][..], 0.5, 4), "seed 1000 scores");
        assert_eq!((tune.points(), tune.most_points()), (6, 10));
        assert_eq!(read("x: 1").unwrap(), None);
    }

    #[test]
    fn mistakes_say_what_was_expected() {
        for (text, want) in [
            ("tune: 3", "tune: expected fields and their values"),
            ("tune: {share: 1}", "tune: has no field to tune; add one"),
            ("tune: {learning_rate: [1, 2]}", "tune.learning_rate: expected a field of `train` or `params`, such as"),
            ("tune: {train.seed: [1, 2]}", "tune.train.seed: cannot be tuned: the study sets it, or"),
            ("tune: {train.lr: [1, 2], widen: 1000}", "tune.widen: expected at most 100 further tries, found 1000"),
            ("tune: {train.lr: 3}", "tune.train.lr: expected {factor: F, points: N}, or a list of numbers, found 3"),
            ("tune: {train.lr: [1, 1]}", "the value 1 is given twice"),
            ("tune: {train.lr: [1, x]}", "or a list of numbers, found a list"),
            ("tune: {train.lr: [1]}", "expected 2 to 100 values, found 1"),
            ("tune: {train.lr: {factor: 1}}", "factor: expected a number above 1, found 1"),
            ("tune: {train.lr: {factr: 1}}", "unknown field `factr`"),
            ("tune: {train.lr: {points: 4}}", "points: expected an odd number from 3 to 100"),
            ("tune: {train.lr: [1, 2], share: 2}", "tune.share: expected a share of the budget"),
            ("tune: {train.lr: [1, 2], seeds: [5, 1]}", "tune.seeds[1]: the seed 1 is also in `seeds`"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(want), "{found}\n{want}");
        }
    }
}
