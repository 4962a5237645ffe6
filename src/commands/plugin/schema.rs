//! `mblm plugin schema`: the fields of a plugin's block.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use mblm::base::terminal::Output;

use crate::exit::Usage;

/// Arguments of `mblm plugin schema`.
#[derive(clap::Args)]
pub struct Args {
    /// The shared library
    file: PathBuf,
    /// The block type
    #[arg(value_name = "TYPE")]
    block_type: String,
}

/// Runs `mblm plugin schema`.
pub fn run(args: &Args) -> Result<()> {
    let library = super::open(&args.file)?;
    let Some(block) = library.block(&args.block_type) else {
        let known: Vec<&str> = library.blocks().iter().map(|block| block.block_type).collect();
        let suggestion = mblm::base::nearest::suggestion(&args.block_type, &known);
        let message = format!("{} has no block type {:?}; {suggestion}", args.file.display(), args.block_type);
        return Err(Usage(message).into());
    };
    writeln!(Output::new(), "{}", serde_json::to_string_pretty(&block.schema)?)?;
    Ok(())
}
