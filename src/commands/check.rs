//! `mblm check`: a training configuration, its data and its plugins, without a run.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::{self, Output};
use mblm::data;
use mblm::train::config::RunConfig;
use mblm::train::model::TrainModel;
use mblm::train::session;
use mblm::train::trainer::plan::RunPlan;
use mblm::yaml::Document;

use crate::commands::train::{find_checkpoint, outline};
use crate::plugins::Plugins;

/// Arguments of `mblm check`.
#[derive(clap::Args)]
pub struct Args {
    /// The training configuration
    config: PathBuf,
    /// Override a field of the configuration, e.g. `--set train.learning_rate=3e-4`; may be repeated
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Skip the data and the checkpoint to start from, for example because they are on another machine
    #[arg(long)]
    no_data: bool,
}

/// Runs `mblm check`: the resolved configuration goes to standard output, what was found to standard error.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let mut document = Document::read(&args.config)?;
    args.set.iter().try_for_each(|assignment| document.set(assignment))?;
    let mut config = RunConfig::from_document(&document, &plugins.registry(Some(&args.config))?)?;
    find_checkpoint(&mut config, &args.config, &args.set);
    let located = |error: mblm::train::Error| error.located(&document);
    let data = match args.no_data {
        true => {
            data::kind(&config.io.dataset_id).map_err(|error| located(error.into()))?;
            None
        }
        false => Some(session::open_data(&config).map_err(located)?),
    };
    let about = data.as_ref().map_or_else(|| "not checked".into(), |data| data.about.clone());
    // A machine without the data may also be another one than that to train on.
    let model = outline(&config, !args.no_data).map_err(located)?;
    let plan = match data {
        Some(data) => session::check(&model, data, &config),
        None => RunPlan::new(&config, config.params.input_seq_len, 1),
    };
    let plan = plan.map_err(located)?;
    Output::new().write_all(resolved(&config)?.as_bytes())?;
    terminal::line(format_args!("data: {about}"));
    terminal::line(format_args!(
        "model: {} parameters; training: {} batches, {} gradient steps",
        model.params().num_elements(),
        plan.batches,
        plan.steps
    ));
    terminal::line(format_args!("learning rate schedule: {}", plan.describe_rates(&config.train, 0)));
    terminal::line(format_args!("{}: no problems found", args.config.display()));
    Ok(())
}

/// The configuration with every default, and the section `resume` if there is one.
fn resolved(config: &RunConfig) -> Result<String> {
    let resume = config.resume.iter().map(|resume| serde_yaml::to_string(&BTreeMap::from([("resume", resume)])));
    Ok(config.to_yaml()? + &resume.collect::<Result<String, _>>()?)
}
