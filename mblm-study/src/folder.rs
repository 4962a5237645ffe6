//! A study's folder: what `study.json` says of its design, and where its runs are.

use std::path::{Path, PathBuf};

use mblm_base::files;
use mblm_train::cost;
use mblm_train::error::{AtPath, Error, Result};
use serde::{Deserialize, Serialize};

use crate::design::budget::Amount;
use crate::design::scale::Scale;
use crate::design::seeds::Seeds;
use crate::design::tune::Tune;

const FILE: &str = "study.json";
/// A plan with more runs than this must be damaged.
const MAX_RUNS: usize = 100_000;

/// A variant as `study.json` has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AboutVariant {
    /// Its name.
    pub name: String,
    /// In a scaling study: its variant, size and budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cell: Option<Cell>,
    /// Its own values of the tuned fields, around which they are tuned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tuned_from: Vec<f64>,
    /// Training bytes of each run; none if that is measured first.
    pub bytes: Option<u64>,
    /// What was solved for, and how close it is.
    pub solved: Option<String>,
    /// How its configuration differs from the base's.
    pub differences: Vec<String>,
    /// What it costs.
    pub cost: cost::ModelCost,
}

/// A variant in one size for one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// The variant's name.
    pub variant: String,
    /// The parameters that were asked for.
    pub size: u64,
    /// Floating point operations of training.
    pub flops: f64,
}

/// What `study.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanFile {
    /// The study's name.
    pub name: String,
    /// What it asks.
    pub description: Option<String>,
    /// What was equal.
    pub amount: Amount,
    /// Whether models were brought to one size.
    pub equal_parameters: bool,
    /// The seeds of the scored runs.
    pub seeds: Seeds,
    /// What is tuned before the variants are scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tune: Option<Tune>,
    /// The sizes and budgets of a scaling study.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// Runs at a time.
    pub jobs: usize,
    /// The variants.
    pub variants: Vec<AboutVariant>,
}

impl PlanFile {
    /// Reads the plan of the study in `folder`.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let text = files::read(&path, files::SMALL).at(&path)?;
        let plan: PlanFile = serde_json::from_slice(&text).map_err(|error| {
            let cure = "start the study again with --force to write a new one";
            Error::Config(format!("{} is damaged: {error}; {cure}", path.display()))
        })?;
        match plan.variants.len().saturating_mul(plan.seeds.all().len()) {
            0..=MAX_RUNS => Ok(plan),
            runs => Err(Error::Config(format!("{}: {runs} runs; expected at most {MAX_RUNS}", path.display()))),
        }
    }

    /// Writes it to the study's `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let text = serde_json::to_string_pretty(self).map_err(std::io::Error::from).at(&path)?;
        files::replace_text(&path, &text).at(&path)
    }

    /// Whether `folder` looks like a study's.
    pub fn is_in(folder: &Path) -> bool {
        folder.join(FILE).is_file()
    }
}

/// Where a study says why the run `name` failed.
pub(crate) fn failure_file(study: &Path, name: &str) -> PathBuf {
    study.join("failed").join(format!("{name}.txt"))
}

/// The folder of the run `name` in a study's folder.
pub(crate) fn run_folder(study: &Path, name: &str) -> PathBuf {
    study.join("runs").join(name)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A plan of variants with these names that tunes nothing.
    pub(crate) fn plan_file(names: &[&str], seeds: Seeds) -> PlanFile {
        let cost = crate::report::matrix::tests::cost(&[]);
        let about = |name: &&str| AboutVariant {
            name: name.to_string(),
            cell: None,
            tuned_from: vec![],
            bytes: Some(1000),
            solved: None,
            differences: vec![],
            cost: cost.clone(),
        };
        PlanFile {
            name: "s".into(),
            description: None,
            amount: Amount::Bytes(1000),
            equal_parameters: false,
            seeds,
            tune: None,
            scale: None,
            jobs: 1,
            variants: names.iter().map(about).collect(),
        }
    }
}
