//! `mblm checkpoint export`: the weights as one file under the Python package's names.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::train::checkpoint::{self, Checkpoint, Which, export_pth, export_safetensors};

use mblm::train::model::TrainModel;
use mblm::train::terminal::Output;

use crate::plugins::Plugins;
use crate::{Usage, model};

/// Arguments of `mblm checkpoint export`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: model::Args,
    /// The file to write, which must not exist: FILE.safetensors, or FILE.pth with --pth-names
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Write a .pth file that the Python package loads: its state_dict and the validation loss
    #[arg(long)]
    pth_names: bool,
}

/// Runs `mblm checkpoint export`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let (suffix, how) = match args.pth_names {
        true => ("pth", "what --pth-names writes"),
        false => ("safetensors", "or --pth-names for a .pth file"),
    };
    if args.out.extension().is_none_or(|found| found != suffix) {
        return Err(
            Usage(format!("--out {}: expected a name that ends in .{suffix}, {how}", args.out.display())).into()
        );
    }
    match args.pth_names {
        true => write_pth(args, plugins)?,
        false => {
            let which = if args.model.best { Which::Best } else { Which::Newest };
            export_safetensors(&checkpoint::find(&args.model.run, which)?, &args.out)?;
        }
    }
    Ok(writeln!(Output::new(), "{}", args.out.display())?)
}

/// The package wants all of its `state_dict`, of which the model knows what is no parameter.
fn write_pth(args: &Args, plugins: &Plugins) -> Result<()> {
    let trained = model::load(&args.model, plugins)?;
    let checkpoint = Checkpoint::open(&trained.checkpoint)?;
    let mut tensors = checkpoint.weights()?;
    tensors.extend(trained.model.buffers().into_iter().map(|(name, values)| (name, (vec![values.len()], values))));
    export_pth(&tensors, checkpoint.state()?.valid_loss, &args.out)?;
    Ok(())
}
