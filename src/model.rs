//! A trained model from its run folder.

use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::device::DeviceName;
use mblm::model::Mblm;
use mblm::train::checkpoint::{self, TrainState, Which};
use mblm::train::config::RunConfig;
use mblm::train::model::{Model, TrainModel};
use mblm::yaml::Document;

use crate::exit::Usage;
use crate::plugins::Plugins;

/// Which model to load.
#[derive(Clone, clap::Args)]
pub struct Args {
    /// A run folder, or one of its checkpoints
    pub run: PathBuf,
    /// Use the checkpoint with the lowest validation loss instead of the newest
    #[arg(long)]
    pub best: bool,
    /// Where the model runs: cpu, cuda, cuda:N, metal or auto
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub device: DeviceName,
    /// Accept a plugin whose file differs from the one that the run was trained with
    #[arg(long)]
    pub allow_plugin_change: bool,
}

/// A model with its trained weights.
pub struct Trained {
    pub model: Model,
    pub config: RunConfig,
    pub checkpoint: PathBuf,
}

impl Trained {
    /// The model, if it generates.
    pub fn generative(&self) -> Result<&Mblm> {
        match &self.model {
            Model::Generative(model) => Ok(model),
            Model::Masked(_) => Err(Usage(format!(
                "{} is an encoder, which cannot generate; use `mblm eval` to measure it",
                self.checkpoint.display()
            ))
            .into()),
        }
    }
}

/// Loads a checkpoint; every file of it is checked against its sum.
pub fn load(args: &Args, plugins: &Plugins) -> Result<Trained> {
    let which = if args.best { Which::Best } else { Which::Newest };
    let checkpoint = checkpoint::find(&args.run, which)?;
    let name = checkpoint.path().join("config.yaml").display().to_string();
    let document = Document::parse(&checkpoint.config_yaml()?, &name)?;
    let config = config_of_run(&args.run, &checkpoint.state()?, &document, args.allow_plugin_change, plugins)?;
    let model = Model::at(&config, 0, args.device.open()?.into())?;
    model.params().load(&checkpoint.weights()?)?;
    Ok(Trained { model, config, checkpoint: checkpoint.path().into() })
}

/// The configuration of a run, with the plugins that it was trained with.
///
/// # Errors
/// A plugin is missing, or is another one and `allow_change` is not set.
pub fn config_of_run(
    run: &Path,
    state: &TrainState,
    document: &Document,
    allow_change: bool,
    plugins: &Plugins,
) -> Result<RunConfig> {
    let registry = plugins.registry_of_run(run, &state.plugins, allow_change)?;
    let config = RunConfig::from_document(document, &registry)?;
    if !allow_change {
        state.check_plugins(&config.plugins())?;
    }
    Ok(config)
}
