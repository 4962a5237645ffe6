//! `mblm checkpoint export`: the weights as one file under the Python package's names.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::registry::BlockRegistry;
use mblm::train::checkpoint::{self, Checkpoint, Which, export_pth, export_safetensors};
use mblm::train::config::RunConfig;
use mblm::train::model::{Model, TrainModel};
use mblm::yaml::Document;

use crate::exit::Usage;
use crate::model;

/// Arguments of `mblm checkpoint export`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// The file to create: FILE.safetensors, or FILE.pth with `--pth-names`
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write a .pth file for the Python package: its `state_dict` and the validation loss
    #[arg(long)]
    pth_names: bool,
}

/// Runs `mblm checkpoint export`.
pub fn run(args: &Args) -> Result<()> {
    let (suffix, how) = match args.pth_names {
        true => ("pth", "what --pth-names writes"),
        false => ("safetensors", "or --pth-names for a .pth file"),
    };
    if args.out.extension().is_none_or(|found| found != suffix) {
        return Err(
            Usage(format!("--out {}: expected a name that ends in .{suffix}, {how}", args.out.display())).into()
        );
    }
    let which = if args.model.best { Which::Best } else { Which::Newest };
    let checkpoint = checkpoint::find(&args.model.run, which)?;
    match args.pth_names {
        true => write_pth(args, &checkpoint)?,
        false => export_safetensors(&checkpoint, &args.out)?,
    }
    Ok(writeln!(Output::new(), "{}", args.out.display())?)
}

/// The package wants all of its `state_dict`, of which the model knows what is no parameter. It has no plugins, so a model
/// with blocks of plugins is not for it, and no library is opened.
fn write_pth(args: &Args, checkpoint: &Checkpoint) -> Result<()> {
    let name = checkpoint.path().join("config.yaml").display().to_string();
    let document = Document::parse(&checkpoint.config_yaml()?, &name)?;
    let registry = BlockRegistry::builtin()?
        .with_advice("the Python package cannot load blocks of plugins; export without --pth-names");
    let model = Model::new(&RunConfig::from_document(&document, &registry)?, 0)?;
    let mut tensors = checkpoint.weights()?;
    tensors.extend(model.buffers().into_iter().map(|(name, values)| (name, (vec![values.len()], values))));
    export_pth(&tensors, checkpoint.state()?.valid_loss, &args.out)?;
    Ok(())
}
