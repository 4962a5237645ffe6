//! `mblm inspect`: what a configuration builds, stage by stage, and what that costs.

mod report;

use std::io::Write;
use std::path::PathBuf;

use mblm_core::config::MblmConfig;
use mblm_core::model::Mblm;
use mblm_core::registry::BlockRegistry;
use mblm_core::yaml::Document;
use mblm_train::config::RunConfig;

use crate::plugins::Plugins;
use report::{Report, Step};

/// Arguments of `mblm inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A model's YAML, or a whole training YAML
    config: PathBuf,
    /// Sequences in a training step [default: `train.batch_size`, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Override a field of the configuration, as in `--set params.num_layers=[4,2]`
    #[arg(long, value_name = "FIELD=VALUE")]
    set: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs `mblm inspect`.
pub fn run(args: &Args, plugins: &Plugins) -> anyhow::Result<()> {
    let mut document = Document::read(&args.config)?;
    args.set.iter().try_for_each(|assignment| document.set(assignment))?;
    let registry = plugins.registry(Some(&args.config))?;
    let (config, mut step) = read(&document, &registry)?;
    if let Some(batch) = args.batch {
        step.batch = batch as usize;
    }
    let model = Mblm::new(&config, 0)?;
    let report = Report::new(&config, model.params(), &model.stage_models().collect::<Vec<_>>(), step);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    Ok(())
}

fn read(document: &Document, registry: &BlockRegistry) -> anyhow::Result<(MblmConfig, Step)> {
    if document.get("mblm_config").is_some() {
        let message = "is the configuration of an encoder; `mblm inspect` reads those of decoders";
        return Err(document.error("mblm_config", message).into());
    }
    if ["params", "train", "io"].iter().all(|section| document.get(section).is_none()) {
        let config = MblmConfig::from_document(document, "", registry)?;
        let bytes = config.context_len();
        return Ok((config, Step { batch: 1, bytes }));
    }
    let run = RunConfig::from_document(document, registry)?;
    let step = Step { batch: run.train.batch_size, bytes: run.params.input_seq_len };
    Ok((run.params.model, step))
}
