//! `mblm report`: compare runs that are there.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::base::terminal::{self, Output};
use mblm::registry::BlockRegistry;
use mblm::study::PlanFile;
use mblm::study::report::{Report, Run};
use mblm::train::config::RunConfig;
use mblm::train::cost::{ModelCost as Cost, Step};
use mblm::train::journal::folder::RunFolder;
use mblm::train::model::{Model, TrainModel};
use mblm::yaml::Document;

use crate::exit::Usage;

/// Arguments of `mblm report`.
#[derive(clap::Args)]
pub struct Args {
    /// Run folders, also of the Python package, or the folder of one study
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where to write report.html and the rest
    #[arg(long, value_name = "DIR", default_value = "report")]
    out: PathBuf,
}

/// Runs `mblm report`.
pub fn run(args: &Args) -> Result<()> {
    let report = match &args.runs[..] {
        [study] if PlanFile::is_in(study) => Report::of_study(study)?,
        folders => Report::of_runs(read(folders)?, |run| cost(run).ok()),
    };
    report.write(&args.out)?;
    Ok(writeln!(Output::new(), "{}\nreport: {}", report.to_text(), args.out.join("report.html").display())?)
}

/// Reads the runs; what is none is named and skipped.
fn read(folders: &[PathBuf]) -> Result<Vec<Run>> {
    let (mut runs, mut seen) = (Vec::new(), BTreeSet::new());
    for folder in folders {
        let is_new = folder.canonicalize().map_or(true, |place| seen.insert(place));
        match Run::read(folder) {
            Ok(_) if !is_new => terminal::line(format_args!("skipped: {} is named twice", folder.display())),
            Ok(run) => runs.push(run),
            Err(error) => terminal::line(format_args!("skipped: {error}")),
        }
    }
    match runs.is_empty() {
        true => Err(Usage("none of these folders is one of a run".into()).into()),
        false => Ok(runs),
    }
}

/// What the model of a run costs, from its configuration. The cost of a plugin's block stays unknown: a report on runs
/// from anywhere opens no library.
fn cost(run: &Path) -> Result<Cost> {
    let document = Document::parse(&RunFolder::config_yaml(run)?, &run.join("config.yaml").display().to_string())?;
    let config = RunConfig::from_document(&document, &BlockRegistry::builtin()?)?;
    let model = Model::outline(&config, 0)?;
    let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
    Ok(Cost::new(config.params.model.hierarchy(), model.params(), &model.stage_models(), step))
}
