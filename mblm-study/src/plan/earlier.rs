//! Checks the runs in a study's folder against its plan: a study may only continue with the design that it began with.

use std::fs;
use std::path::{Path, PathBuf};

use mblm_train::checkpoint::Shelf;
use mblm_train::config::RunConfig;
use mblm_train::error::{AtPath, Error, Result};
use mblm_train::journal::folder::RunFolder;
use mblm_yaml::Document;

use super::Plan;
use crate::course::outcome::outcomes;
use crate::course::{PlannedRun, follow};
use crate::design::slug;
use crate::folder::{PlanFile, failure_file};

/// The folder for runs that no longer fit the plan.
const REPLACED: &str = "replaced";

/// A run that does not fit the plan.
#[derive(Clone, Debug)]
pub(crate) struct Misfit {
    name: String,
    why: String,
}

impl Plan<'_> {
    /// Checks the existing runs against the plan; with `force`, the plan may differ from that of an earlier call.
    ///
    /// # Errors
    /// The design of the study has changed, or a run was trained with another configuration or on other data.
    pub fn check_earlier_runs(&self, force: bool) -> Result<()> {
        let runs = self.run_names();
        if runs.is_empty() || force {
            return Ok(());
        }
        let changes = match PlanFile::read(self.folder()) {
            Ok(earlier) => changes(&earlier, &self.file(), &runs),
            Err(error) => vec![format!("the earlier plan cannot be read: {error}")],
        };
        let misfits = self.misfits()?;
        match misfits.is_empty() && changes.is_empty() {
            true => Ok(()),
            false => Err(self.refused(&changes, &misfits)),
        }
    }

    /// The error that names what has changed.
    pub(crate) fn refused(&self, changes: &[String], misfits: &[Misfit]) -> Error {
        if changes.is_empty()
            && let [one] = misfits
        {
            return Error::Config(format!("{}\n{}", one.why, self.advice()));
        }
        let lines: Vec<&str> = changes.iter().map(|line| &line[..]).chain(misfits.iter().map(|m| &m.why[..])).collect();
        Error::Config(format!(
            "the study in {} has changed since its runs:\n  {}\n{}",
            self.folder().display(),
            lines.join("\n  "),
            self.advice()
        ))
    }

    /// What to do about runs that do not fit.
    fn advice(&self) -> String {
        format!(
            "undo the change, choose another output_dir, or use --force: it keeps the runs that still fit and moves \
             those with another configuration or other data to {}",
            self.folder().join(REPLACED).display()
        )
    }

    /// The names of the runs that are there.
    fn run_names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder().join("runs")).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with('.')).collect()
    }

    /// The runs in the study's folder that do not fit, among those that the course of the study includes.
    pub(crate) fn misfits(&self) -> Result<Vec<Misfit>> {
        let course = follow(&self.file(), &outcomes(self.folder()));
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

    /// Why an existing run does not fit.
    fn misfit(&self, run: &PlannedRun) -> Result<Option<String>> {
        let folder = self.run_folder(run);
        let variant = &self.variants[run.variant];
        let state = Shelf::of_run(&folder).and_then(|shelf| shelf.newest()).and_then(|newest| newest.state());
        if state.is_ok_and(|state| !state.data.is_empty() && !variant.data.is(&state.data)) {
            return Ok(Some(format!("{} was trained on other data", folder.display())));
        }
        if !folder.exists() || variant.about.bytes.is_none() {
            return Ok(None);
        }
        // If a field does not accept its value, the run fails when it starts.
        let Ok(now) = self.config(run) else { return Ok(None) };
        let mut before = match self.config_of(&folder) {
            Ok(before) => before,
            Err(error) => return Ok(Some(format!("{} cannot be read: {error}", folder.display()))),
        };
        // A study's folder may be moved, or named in another way.
        before.io.output_dir.clone_from(&now.io.output_dir);
        let changes = before.differences(&now)?;
        Ok((!changes.is_empty())
            .then(|| format!("{} was trained with another configuration: {}", folder.display(), changes.join(", "))))
    }

    /// The configuration that the run in `folder` was begun with.
    fn config_of(&self, folder: &Path) -> Result<RunConfig> {
        let name = folder.join("config.yaml").display().to_string();
        Ok(RunConfig::from_document(&Document::parse(&RunFolder::config_yaml(folder)?, &name)?, self.registry)?)
    }

    /// Moves the runs that do not fit out of the way, and says where. This may reveal others that do not fit.
    pub(crate) fn replace(&self, misfits: Vec<Misfit>) -> Result<Vec<String>> {
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
                said.push(format!("{}; moved to {}", misfit.why, place.display()));
            }
            misfits = self.misfits()?;
        }
        Ok(said)
    }

    /// A folder for a replaced run that does not exist yet.
    fn free_place(&self, name: &str) -> Result<PathBuf> {
        let replaced = self.folder().join(REPLACED);
        fs::create_dir_all(&replaced).at(&replaced)?;
        let places = (1..).map(|n| replaced.join(if n == 1 { name.into() } else { format!("{name}.{n}") }));
        Ok(places.into_iter().find(|place| !place.exists()).unwrap_or(replaced))
    }
}

/// The changes in the design of a study that make runs of its earlier design useless. `runs` has the names of these runs.
fn changes(before: &PlanFile, now: &PlanFile, runs: &[String]) -> Vec<String> {
    let mut changes = Vec::new();
    let mut changed = |what: &str, before: String, now: String| {
        if before != now {
            changes.push(format!("{what}: {before}, now {now}"));
        }
    };
    if now.scale.is_none() || before.scale.is_none() {
        changed("budget", before.amount.to_string(), now.amount.to_string());
    }
    let tune = |plan: &PlanFile| plan.tune.as_ref().map_or("nothing".into(), ToString::to_string);
    changed("tune", tune(before), tune(now));
    let seeds = now.seeds.all();
    for seed in before.seeds.all().iter().filter(|seed| !seeds.contains(seed)) {
        let of_seed = runs.iter().filter(|name| name.ends_with(&format!("-seed{seed}"))).count();
        if of_seed > 0 {
            changes.push(format!("the seed {seed} was removed: {}", no_longer(of_seed)));
        }
    }
    for old in before.variants.iter().filter(|old| !now.variants.iter().any(|new| new.name == old.name)) {
        let slug = slug(&old.name);
        let of_variant = |name: &&String| {
            name.strip_prefix(&slug).is_some_and(|rest| rest.starts_with("--") || rest.starts_with("-seed"))
        };
        let of_variant = runs.iter().filter(of_variant).count();
        if of_variant > 0 {
            changes.push(format!("the variant {:?} was removed: {}", old.name, no_longer(of_variant)));
        }
    }
    changes
}

/// `1 run no longer counts`, `2 runs no longer count`
fn no_longer(runs: usize) -> String {
    if runs == 1 { "1 run no longer counts".into() } else { format!("{runs} runs no longer count") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::design::seeds::Seeds;
    use crate::design::tune::{Field, Tune, Values};
    use crate::folder::tests::plan_file;

    #[test]
    fn what_is_added_is_no_change_and_what_is_gone_is() {
        let before = plan_file(&["a", "b"], Seeds::Listed(vec![1, 2]));
        let runs = ["a-seed1", "a-seed2", "b--0.1-seed2", "b--try-0.1-seed1000"].map(String::from);
        let changes = |now: &PlanFile| changes(&before, now, &runs);
        assert_eq!(changes(&plan_file(&["a", "b", "c"], Seeds::Until { start: 2, most: 9 })), [""; 0]);
        let now = plan_file(&["a"], Seeds::Listed(vec![2, 3]));
        let want =
            ["the seed 1 was removed: 1 run no longer counts", "the variant \"b\" was removed: 2 runs no longer count"];
        assert_eq!(changes(&now), want);
        let mut tuned = plan_file(&["a", "b"], Seeds::Listed(vec![1, 2]));
        let field = |points| Field { path: "train.lr".into(), values: Values::Grid { factor: 2.0, points } };
        let tune = |points| Tune { fields: vec![field(points)], seeds: vec![7], share: 0.5, widen: 4 };
        tuned.tune = Some(tune(3));
        let text = "train.lr {factor: 2, points: 3}; share 0.5, widen 4, seeds [7]";
        assert_eq!(changes(&tuned), [format!("tune: nothing, now {text}")]);
        let wider = PlanFile { tune: Some(tune(5)), ..tuned.clone() };
        assert_eq!(super::changes(&tuned, &wider, &runs), [format!("tune: {text}, now {}", text.replace('3', "5"))]);
    }
}
