//! `mblm inspect`: what a configuration builds, stage by stage, and what that costs.

use std::io::Write;
use std::path::PathBuf;

use mblm_base::terminal::Output;
use mblm_core::config::{MblmConfig, MblmEncoderConfig};
use mblm_core::model::{Mblm, MblmEncoder};
use mblm_core::registry::BlockRegistry;
use mblm_train::config::{ModelConfig, RunConfig};
use mblm_train::cost::{ModelCost, Step};
use mblm_yaml::Document;

use crate::plugins::Plugins;

/// Arguments of `mblm inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A model configuration, or a training configuration
    config: PathBuf,
    /// Sequences in a training step [default: `train.batch_size`, or 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Override a field of the configuration, e.g. `--set params.num_layers=[4,2]`; may be repeated
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
    let report = match &config {
        ModelConfig::Generative(config) => {
            let model = Mblm::outline(config, 0)?;
            ModelCost::new(config, model.params(), &model.stage_models().collect::<Vec<_>>(), step)
        }
        ModelConfig::Encoder(config) => {
            let model = MblmEncoder::outline(config, 0)?;
            ModelCost::new(&config.mblm_config, model.params(), &model.stage_models().collect::<Vec<_>>(), step)
        }
    };
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.to_string() };
    Output::new().write_all(text.as_bytes())?;
    Ok(())
}

/// The model of a training YAML or of a model's, and what a step of its training reads.
pub fn read(document: &Document, registry: &BlockRegistry) -> anyhow::Result<(ModelConfig, Step)> {
    if ["params", "train", "io", "budget"].iter().any(|section| document.get(section).is_some()) {
        let run = RunConfig::from_document(document, registry)?;
        let step = Step { batch: run.train.batch_size, bytes: run.params.input_seq_len };
        return Ok((run.params.model, step));
    }
    let config = match document.get("mblm_config") {
        Some(_) => ModelConfig::Encoder(MblmEncoderConfig::from_document(document, "", registry)?),
        None => ModelConfig::Generative(MblmConfig::from_document(document, "", registry)?),
    };
    let bytes = config.hierarchy().context_len();
    Ok((config, Step { batch: 1, bytes }))
}
