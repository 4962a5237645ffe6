//! A trained model from its run folder.

use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::model::Mblm;
use mblm::registry::BlockRegistry;
use mblm::train::checkpoint::{self, Which};
use mblm::train::config::RunConfig;
use mblm::yaml::Document;

/// Which model to load.
#[derive(clap::Args)]
pub struct Args {
    /// A run folder, or one of its checkpoints
    pub run: PathBuf,
    /// The checkpoint with the lowest validation loss rather than the newest
    #[arg(long)]
    pub best: bool,
}

/// A model with its trained weights.
pub struct Trained {
    pub model: Mblm,
    pub config: RunConfig,
    pub checkpoint: PathBuf,
}

/// Loads a checkpoint; every file of it is checked against its sum.
pub fn load(args: &Args, registry: &BlockRegistry) -> Result<Trained> {
    let which = if args.best { Which::Best } else { Which::Newest };
    let checkpoint = checkpoint::find(&args.run, which)?;
    let document = Document::parse(&checkpoint.config_yaml()?, &name(checkpoint.path()))?;
    let config = RunConfig::from_document(&document, registry)?;
    let model = Mblm::new(&config.params.model, 0)?;
    model.params().load(&checkpoint.weights()?)?;
    Ok(Trained { model, config, checkpoint: checkpoint.path().into() })
}

fn name(checkpoint: &Path) -> String {
    checkpoint.join("config.yaml").display().to_string()
}
