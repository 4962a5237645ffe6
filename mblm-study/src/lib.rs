//! Studies: several variants of a model, trained under one budget on the same bytes, each with several seeds.
//!
//! A study's YAML is read to a [`Spec`]; with the block types it becomes a [`Plan`], in which everything is checked and
//! every width is solved for; a [`Runner`] trains the runs of a plan, each in a process of its own, here or, with a
//! [`Launcher`], on other machines that see the same files. Its folder:
//!
//! | file or folder | holds |
//! |---|---|
//! | `study.json` | the plan, for the report |
//! | `study.log` | what the terminal showed, with the time |
//! | `configs/` | the configuration of each run |
//! | `runs/NAME-seedN/` | an ordinary run folder, and `result.json`: what was measured when it had ended |
//! | `logs/` | what the process of each run said |
//! | `launched/` | with a launcher: which start of a run may train it, and on which machines it was |
//! | `failed/` | why a run failed; while that file is there, the run is not tried again |
//! | `report.html`, … | the [report](crate::report::Report) |
#![warn(missing_docs)]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod budget;
mod child;
mod launch;
mod plan;
mod progress;
pub mod report;
mod runner;
mod solve;
mod spec;
mod task;

pub use budget::{Amount, Budget, Parameters};
pub use launch::launcher::Launcher;
pub use launch::{ERRAND, Errand, Outcome};
pub use plan::{AboutVariant, Plan, PlanFile, PlannedRun, PlannedVariant};
pub use runner::{Ended, Options, Runner};
pub use spec::Spec;
