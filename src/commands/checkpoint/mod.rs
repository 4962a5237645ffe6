//! `mblm checkpoint`: what a run saved, whether it is whole, and as a file for other programs.

mod export;
mod list;
mod verify;

use anyhow::Result;

/// Arguments of `mblm checkpoint`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the checkpoints of a run
    List(list::Args),
    /// Verify the SHA-256 of every file, and that all weights are finite
    Verify(verify::Args),
    /// Write the weights to one file for other programs
    Export(export::Args),
}

/// Runs `mblm checkpoint`.
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::List(args) => list::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Export(args) => export::run(args),
    }
}
