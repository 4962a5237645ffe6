//! Studies: several variants of a model, trained under one budget on the same bytes, each with several seeds.
//!
//! A study's YAML is read to a [`Spec`]; with the block types it becomes a [`Plan`], in which everything is checked and
//! every width is solved for. Which runs come next follows from the plan and from what the runs before have come to
//! (`course`): first the tries of each variant, then those that score. A [`Runner`] trains them, each in a process of its
//! own, here or, with a [`Launcher`], on other machines that see the same files. Its folder:
//!
//! | file or folder | holds |
//! |---|---|
//! | `study.json` | the plan, for the report |
//! | `study.log` | what the terminal showed, with the time |
//! | `configs/` | the configuration of each run |
//! | `runs/NAME--try-VALUE-seedN/` | a run that tunes |
//! | `runs/NAME-seedN/` | a run that scores, `NAME--VALUE-seedN` where values were tuned: an ordinary run folder, and `result.json`: what was measured when it had ended |
//! | `logs/` | what the process of each run said |
//! | `launched/` | with a launcher: which start of a run may train it, and on which machines it was |
//! | `replaced/` | runs that did not fit the study any more, after `--force` |
//! | `failed/` | why a run failed; while that file is there, the run is not tried again |
//! | `report.html`, … | the [report](crate::report::Report) |
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod child;
mod course;
mod design;
mod folder;
mod launch;
pub mod passage;
mod plan;
mod progress;
pub mod report;
mod runner;
mod speeds;
pub mod statistics;
mod task;

pub use course::PlannedRun;
pub use design::Spec;
pub use design::budget::{Amount, Budget, Parameters};
pub use design::scale::Scale;
pub use design::seeds::Seeds;
pub use design::tune::Tune;
pub use folder::{AboutVariant, Cell, PlanFile};
pub use launch::launcher::Launcher;
pub use launch::{ERRAND, Errand, Outcome};
pub use plan::{Plan, PlannedVariant};
pub use runner::{Ended, Options, Runner};
