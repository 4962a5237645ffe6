//! `mblm schema`: the JSON Schema of a training configuration, for editors, and the same as a page to read.

use std::io::Write;

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::train::schema::{markdown, schema};

use crate::plugins::Plugins;

/// What precedes the tables of the page.
const HEAD: &str = "\
# Configuration reference

This page is `mblm schema --markdown`, from the same structs that read the YAML. `mblm schema > mblm.schema.json` writes it
for editors: with a first line `# yaml-language-server: $schema=mblm.schema.json`, an editor that has the YAML language
server completes fields and marks mistakes. `mblm check CONFIG` shows a configuration with all defaults filled in.

A block is named by `block_type`, which may be left out where only one type has the fields.
";

/// Arguments of `mblm schema`.
#[derive(clap::Args)]
pub struct Args {
    /// Print a Markdown page
    #[arg(long)]
    markdown: bool,
}

/// Runs `mblm schema`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let schema = schema(&plugins.whole_registry()?)?;
    let text = match args.markdown {
        true => format!("{HEAD}{}", markdown::markdown(&schema)),
        false => serde_json::to_string_pretty(&schema)? + "\n",
    };
    Ok(Output::new().write_all(text.as_bytes())?)
}
