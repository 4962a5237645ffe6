//! `mblm report`: compare runs that are there.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use mblm::base::terminal::{self, Output};
use mblm::registry::BlockRegistry;
use mblm::study::PlanFile;
use mblm::study::report::{Report, Run, Seen};
use mblm::train::config::RunConfig;
use mblm::train::cost::{ModelCost as Cost, Step};
use mblm::train::journal::folder::RunFolder;
use mblm::train::model::{Model, TrainModel};
use mblm::yaml::Document;

use crate::exit::Usage;

/// Arguments of `mblm report`.
#[derive(clap::Args)]
pub struct Args {
    /// Run folders (of the Python package too), or the folder of one study; other folders are skipped with exit code 1
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The folder for report.html, report.md, tables and charts
    #[arg(long, value_name = "DIR", default_value = "report")]
    out: PathBuf,
}

/// Runs `mblm report`.
pub fn run(args: &Args) -> Result<()> {
    let (report, skipped) = match &args.runs[..] {
        [study] if PlanFile::is_in(study) => (Report::of_study(study)?, 0),
        folders => {
            let (runs, skipped) = read(folders)?;
            (Report::of_runs(runs, |run| cost(run).ok()), skipped)
        }
    };
    report.write(&args.out)?;
    writeln!(Output::new(), "{}\nreport: {}", report.to_text(), args.out.join("report.html").display())?;
    match skipped {
        0 => Ok(()),
        n => bail!("{n} of {} folders could not be read; the report is of the others", args.runs.len()),
    }
}

/// Reads the runs, each once, and counts the folders that cannot be read.
fn read(folders: &[PathBuf]) -> Result<(Vec<Run>, usize)> {
    let (mut runs, mut skipped, mut seen) = (Vec::new(), 0, Seen::default());
    for folder in folders {
        match (Run::read(folder), seen.again(folder)) {
            (Ok(run), None) => runs.push(run),
            (Ok(_), Some(why)) => terminal::line(format_args!("skipped: {} is {why}", folder.display())),
            (Err(error), _) => {
                skipped += 1;
                terminal::line(format_args!("skipped: {error}"));
            }
        }
    }
    match runs.is_empty() {
        true => Err(Usage("none of these folders is a run".into()).into()),
        false => Ok((runs, skipped)),
    }
}

/// What the model of a run costs, from its configuration. The cost of a plugin's block stays unknown: a report on runs
/// from anywhere opens no library.
fn cost(run: &Path) -> Result<Cost> {
    let document = Document::parse(&RunFolder::config_yaml(run)?, &run.join("config.yaml").display().to_string())?;
    let config = RunConfig::from_document(&document, &BlockRegistry::builtin()?)?;
    if !config.params.model.hierarchy().is_fixed() {
        bail!("the cost depends on the lengths of patches in the data");
    }
    let model = Model::outline(&config, 0)?;
    let step = Step { batch: config.train.batch_size, bytes: config.params.input_seq_len };
    Ok(Cost::new(config.params.model.hierarchy(), model.params(), &model.stage_models(), step))
}
