//! `mblm import`: a checkpoint of the Python package as a run.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use mblm::base::terminal::Output;
use mblm::pth;
use mblm::train::config::RunConfig;
use mblm::train::import::{ImportOptions, import, shown_loss};
use mblm::yaml::Document;

use crate::exit::Usage;
use crate::plugins::Plugins;

/// Arguments of `mblm import`.
#[derive(clap::Args)]
pub struct Args {
    /// A .pth file that the Python package saved
    file: PathBuf,
    /// The training configuration of this model; its data need not exist
    #[arg(long)]
    config: PathBuf,
    /// The run folder to create [default: a new folder in `io.output_dir`]
    #[arg(long, value_name = "RUN")]
    out: Option<PathBuf>,
    /// Accept embeddings for fewer tokens than the model has; the others start from random values
    #[arg(long)]
    migrate_embeddings: bool,
}

/// Runs `mblm import`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    if !args.file.is_file() {
        return Err(Usage(format!("{}: no such file; expected a .pth checkpoint", args.file.display())).into());
    }
    let document = Document::read(&args.config)?;
    let config = RunConfig::from_document(&document, &plugins.registry(Some(&args.config))?)?;
    let saved = pth::read(&args.file)?;
    let source = args.file.display().to_string();
    let (tensors, loss) = (saved.weights.len(), saved.loss);
    let options =
        ImportOptions { place: args.out.as_deref(), migrate_embeddings: args.migrate_embeddings, source: &source };
    let checkpoint = import(&config, &config.to_yaml()?, saved, &options).with_context(|| source.clone())?;
    Ok(writeln!(Output::new(), "{source}: {tensors} tensors, {}\n{}", shown_loss(loss), checkpoint.display())?)
}
