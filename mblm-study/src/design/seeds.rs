//! The seeds of the scored runs: a list, or as many as the tests need.

use mblm_yaml::{ConfigError, Document, describe};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

/// More seeds than this must be a mistake.
const MOST: u64 = 1000;
/// Fewer than two pairs cannot be tested.
const LEAST_TESTED: u64 = 2;

/// The seeds that each variant is trained with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Seeds {
    /// These.
    Listed(Vec<u64>),
    /// Seeds 1 to `start`, then one more at a time until the best variant is distinguishable, or `most` are reached.
    Until {
        /// Seeds of every variant.
        start: u64,
        /// The last seed.
        most: u64,
    },
}

impl Seeds {
    /// Reads field `seeds` of a study.
    pub(super) fn from_document(document: &Document) -> Result<Self, ConfigError> {
        const PATH: &str = "seeds";
        match document.get(PATH) {
            None | Some(Value::Null) => Ok(Seeds::Listed(vec![0])),
            Some(Value::Mapping(_)) => {
                document.check_fields(PATH, &["start", "most"])?;
                let (start, most) = (document.section("seeds.start")?, document.section("seeds.most")?);
                if start < LEAST_TESTED {
                    let message =
                        format!("expected at least {LEAST_TESTED}, since fewer cannot be tested, found {start}");
                    return Err(document.error("seeds.start", message));
                }
                if most < start || most > MOST {
                    let message = format!("expected a number from seeds.start = {start} to {MOST}, found {most}");
                    return Err(document.error("seeds.most", message));
                }
                Ok(Seeds::Until { start, most })
            }
            Some(Value::Sequence(_)) => listed(document, PATH).map(Seeds::Listed),
            Some(other) => {
                let message =
                    format!("expected a list, such as [1, 2, 3], or {{start: 3, most: 10}}, found {}", describe(other));
                Err(document.error(PATH, message))
            }
        }
    }

    /// Those that every variant is trained with.
    pub fn first(&self) -> Vec<u64> {
        match self {
            Seeds::Listed(seeds) => seeds.clone(),
            Seeds::Until { start, .. } => (1..=*start).collect(),
        }
    }

    /// All that a variant may be trained with.
    pub fn all(&self) -> Vec<u64> {
        match self {
            Seeds::Listed(seeds) => seeds.clone(),
            Seeds::Until { most, .. } => (1..=*most).collect(),
        }
    }

    /// How often the study may look at the data. Every look may find a difference by chance.
    pub fn looks(&self) -> usize {
        1 + self.all().len() - self.first().len()
    }
}

/// A list of seeds, none of them twice.
pub(super) fn listed(document: &Document, path: &str) -> Result<Vec<u64>, ConfigError> {
    let seeds: Vec<u64> = document.section(path)?;
    let twice = (1..seeds.len()).find(|&i| seeds[..i].contains(&seeds[i]));
    match (seeds.is_empty(), twice) {
        (true, _) => Err(document.error(path, "expected at least one seed, found none")),
        (_, Some(i)) => Err(document.error(&format!("{path}[{i}]"), format!("the seed {} is given twice", seeds[i]))),
        _ => Ok(seeds),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Seeds, String> {
        Seeds::from_document(&Document::parse(text, "s.yaml").unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn seeds_are_a_list_or_as_many_as_it_takes() {
        assert_eq!(read("seeds: [3, 1]").unwrap().first(), [3, 1]);
        assert_eq!(read("x: 1").unwrap(), Seeds::Listed(vec![0]));
        let until = read("seeds: {start: 3, most: 10}").unwrap();
        assert_eq!((until.first(), until.all().len(), until.looks()), (vec![1, 2, 3], 10, 8));
        assert_eq!(read("seeds: [3, 1]").unwrap().looks(), 1);
    }

    #[test]
    fn mistakes_say_what_was_expected() {
        for (text, want) in [
            ("seeds: []", "seeds: expected at least one seed"),
            ("seeds: [1, 2, 1]", "seeds[2]: the seed 1 is given twice (line 1)"),
            ("seeds: 3", "seeds: expected a list, such as [1, 2, 3], or {start: 3, most: 10}, found 3"),
            ("seeds: {start: 1, most: 3}", "seeds.start: expected at least 2, since fewer cannot be tested, found 1"),
            ("seeds: {start: 3, most: 2}", "seeds.most: expected a number from seeds.start = 3 to 1000, found 2"),
            ("seeds: {start: 3}", "missing field `most`"),
            ("seeds: {begin: 3}", "seeds.begin: unknown field"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(want), "{found}\n{want}");
        }
    }
}
