//! What the runs of a study have come to, read from its folder.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use mblm_base::files;
use mblm_train::error::NON_FINITE;

use crate::design::tune::Tune;
use crate::folder::{failure_file, run_folder};
use crate::report::run::{Run, RunResult};

/// The start of the failure of a try whose field does not accept the value.
pub(crate) const UNFIT: &str = "the value cannot be trained";

/// What a run has come to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It has not ended.
    Open,
    /// Its loss was not finite, or it could not have the value that was to be tried: a result.
    Diverged,
    /// It failed for another reason, which says nothing about the value that was tried.
    Failed,
    /// The bits per byte of its validation.
    Loss(f64),
}

/// Why a variant cannot be tuned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Lost {
    /// No try of the field of this number ended with a finite loss.
    NoValue(usize),
    /// The run of this name failed.
    Failed(String),
}

/// What the runs of the study in `folder` have come to, each of which is read once.
pub(crate) fn outcomes(folder: &Path) -> impl Fn(&str) -> Outcome + '_ {
    let known: RefCell<BTreeMap<String, Outcome>> = RefCell::default();
    move |name| *known.borrow_mut().entry(name.into()).or_insert_with(|| outcome(folder, name))
}

fn outcome(folder: &Path, name: &str) -> Outcome {
    let place = run_folder(folder, name);
    match RunResult::read(&place).is_some() {
        true => {
            let loss = Run::read(&place).ok().and_then(|run| run.valid_bpb());
            loss.map_or(Outcome::Diverged, Outcome::Loss)
        }
        false => match files::read_text(&failure_file(folder, name), files::SMALL) {
            Ok(why) if why.contains(NON_FINITE) || why.starts_with(UNFIT) => Outcome::Diverged,
            Ok(_) => Outcome::Failed,
            Err(_) => Outcome::Open,
        },
    }
}

/// Why a variant is not scored.
pub(crate) fn why_lost(study: &Path, tune: Option<&Tune>, lost: &Lost) -> String {
    match lost {
        Lost::NoValue(field) => {
            let path = tune.map_or("", |tune| &tune.fields[*field].path);
            format!("no value of {path} gave a finite loss; tune it in a lower range, or change the base")
        }
        Lost::Failed(run) => {
            let why = files::read_text(&failure_file(study, run), files::SMALL).unwrap_or_default();
            format!(
                "it could not be tuned, since {run} failed: {}; --retry-failed runs that again",
                why.lines().next().unwrap_or_default()
            )
        }
    }
}
