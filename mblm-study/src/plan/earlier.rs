//! Holds the runs in a study's folder against its plan: a study goes on only as what it began as.

use std::fs;
use std::path::PathBuf;

use mblm_train::checkpoint::Shelf;
use mblm_train::config::RunConfig;
use mblm_train::error::{AtPath, Error, Result};
use mblm_train::journal::folder::RunFolder;
use mblm_yaml::Document;

use super::{Plan, PlanFile, PlannedRun, failure_file, outcome};
use crate::course::follow;

/// Where runs go that do not fit the plan any more.
const REPLACED: &str = "replaced";

/// A run that does not fit the plan.
#[derive(Clone, Debug)]
pub struct Misfit {
    /// Its name.
    pub name: String,
    why: String,
}

impl Plan<'_> {
    /// Holds the runs that are there against the plan; `force` lets the plan differ from that of an earlier call.
    ///
    /// # Errors
    /// The design of the study has changed, or a run was trained with another configuration or on other data.
    pub fn check_earlier_runs(&self, force: bool) -> Result<Vec<Misfit>> {
        let misfits = self.misfits()?;
        let changes = match PlanFile::read(self.folder()) {
            Ok(earlier) if self.has_runs() => changes(&earlier, &self.file()),
            _ => vec![],
        };
        if force || (misfits.is_empty() && changes.is_empty()) {
            return Ok(misfits);
        }
        if changes.is_empty()
            && let [one] = &misfits[..]
        {
            return Err(Error::Config(format!("{}\n{}", one.why, self.advice())));
        }
        let lines: Vec<&str> = changes.iter().map(|line| &line[..]).chain(misfits.iter().map(|m| &m.why[..])).collect();
        Err(Error::Config(format!(
            "the study in {} has changed since its runs:\n  {}\n{}",
            self.folder().display(),
            lines.join("\n  "),
            self.advice()
        )))
    }

    /// What to do about runs that do not fit.
    fn advice(&self) -> String {
        format!(
            "restore what it was, or name another output_dir, or let --force keep the runs that still fit and move the \
             others to {}",
            self.folder().join(REPLACED).display()
        )
    }

    fn has_runs(&self) -> bool {
        fs::read_dir(self.folder().join("runs")).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// The runs in the study's folder that do not fit, among those that its course comes to.
    fn misfits(&self) -> Result<Vec<Misfit>> {
        let course = follow(&self.file(), &|name| outcome(self.folder(), name));
        let mut misfits: Vec<Misfit> = Vec::new();
        for run in course.runs() {
            if let Some(why) = self.misfit(run)?
                && !misfits.iter().any(|other| other.name == run.name)
            {
                misfits.push(Misfit { name: run.name.clone(), why });
            }
        }
        Ok(misfits)
    }

    /// Why a run that is there does not fit.
    pub(crate) fn misfit(&self, run: &PlannedRun) -> Result<Option<String>> {
        let folder = self.run_folder(run);
        let variant = &self.variants[run.variant];
        let state = Shelf::of_run(&folder).and_then(|shelf| shelf.newest()).and_then(|newest| newest.state());
        if state.is_ok_and(|state| !state.data.is_empty() && !variant.data.is(&state.data)) {
            return Ok(Some(format!("{} was trained on other data", folder.display())));
        }
        if !folder.exists() || variant.about.bytes.is_none() {
            return Ok(None);
        }
        let name = folder.join("config.yaml").display().to_string();
        let document = Document::parse(&RunFolder::config_yaml(&folder)?, &name)
            .map_err(|error| Error::Config(error.to_string()))?;
        let mut before =
            RunConfig::from_document(&document, self.registry).map_err(|error| Error::Config(error.to_string()))?;
        let now = self.config(run)?;
        // A study's folder may be moved, or named in another way.
        before.io.output_dir.clone_from(&now.io.output_dir);
        let changes = before.differences(&now)?;
        Ok((!changes.is_empty())
            .then(|| format!("{} was trained with another configuration: {}", folder.display(), changes.join(", "))))
    }

    /// Moves the runs that do not fit out of the way, and says where each one is now. Others may be found behind them.
    pub fn replace(&self, misfits: Vec<Misfit>) -> Result<Vec<String>> {
        let (mut misfits, mut said) = (misfits, Vec::new());
        while !misfits.is_empty() {
            for misfit in &misfits {
                let folder = self.folder().join("runs").join(&misfit.name);
                let place = self.free_place(&misfit.name)?;
                fs::rename(&folder, &place).at(&folder)?;
                let failure = failure_file(self.folder(), &misfit.name);
                if failure.exists() {
                    fs::remove_file(&failure).at(&failure)?;
                }
                said.push(format!("{}; it is {} now", misfit.why, place.display()));
            }
            misfits = self.misfits()?;
        }
        Ok(said)
    }

    /// A folder for a replaced run, which none has yet.
    fn free_place(&self, name: &str) -> Result<PathBuf> {
        let replaced = self.folder().join(REPLACED);
        fs::create_dir_all(&replaced).at(&replaced)?;
        let places = (1..).map(|n| replaced.join(if n == 1 { name.into() } else { format!("{name}.{n}") }));
        Ok(places.into_iter().find(|place| !place.exists()).unwrap_or(replaced))
    }
}

/// How the design of a study differs from an earlier one, as far as runs of the earlier one would not count any more.
fn changes(before: &PlanFile, now: &PlanFile) -> Vec<String> {
    let mut changes = Vec::new();
    let mut changed = |what: &str, before: String, now: String| {
        if before != now {
            changes.push(format!("{what}: {before}, now {now}"));
        }
    };
    if now.scale.is_none() || before.scale.is_none() {
        changed("budget", before.amount.to_string(), now.amount.to_string());
    }
    changed("tune", shown(&before.tune), shown(&now.tune));
    let gone = |what: &str, names: Vec<String>| {
        (!names.is_empty())
            .then(|| format!("{what} {}, which runs were trained with, does not count any more", names.join(", ")))
    };
    let (seeds, variants) = (now.seeds.all(), &now.variants);
    let lost_seeds = before.seeds.all().into_iter().filter(|seed| !seeds.contains(seed)).map(|seed| seed.to_string());
    let lost_variants = before.variants.iter().filter(|old| !variants.iter().any(|new| new.name == old.name));
    let lost_variants = lost_variants.map(|variant| variant.name.clone()).collect();
    changes.extend(gone("seed", lost_seeds.collect()));
    changes.extend(gone("variant", lost_variants));
    changes
}

/// A section as one line.
fn shown<T: serde::Serialize>(section: &Option<T>) -> String {
    match section {
        None => "none".into(),
        Some(section) => serde_yaml::to_value(section).map_or("?".into(), |value| mblm_yaml::difference::shown(&value)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::plan_file;
    use super::*;
    use crate::spec::seeds::Seeds;

    #[test]
    fn what_is_added_is_no_change_and_what_is_gone_is() {
        let before = plan_file(&["a", "b"], Seeds::Listed(vec![1, 2]));
        assert_eq!(changes(&before, &plan_file(&["a", "b", "c"], Seeds::Until { start: 2, most: 9 })), [""; 0]);
        let now = plan_file(&["a"], Seeds::Listed(vec![2, 3]));
        let want = [
            "seed 1, which runs were trained with, does not count any more",
            "variant b, which runs were trained with, does not count any more",
        ];
        assert_eq!(changes(&before, &now), want);
    }
}
