//! `mblm blocks`: the block types that a configuration can use.

use std::io::Write;

use mblm::base::terminal::Output;

use crate::exit::Usage;
use crate::plugins::Plugins;

/// Arguments of `mblm blocks`.
#[derive(clap::Args)]
pub struct Args {
    /// Print the JSON Schema of this type's fields
    #[arg(long, value_name = "NAME")]
    schema: Option<String>,
}

/// Runs `mblm blocks`.
pub fn run(args: &Args, plugins: &Plugins) -> anyhow::Result<()> {
    let registry = plugins.whole_registry()?;
    let mut out = Output::new();
    if let Some(name) = &args.schema {
        let Some(block) = registry.get(name) else {
            return Err(Usage(format!("unknown block type {name:?}; {}", registry.suggestion(name))).into());
        };
        writeln!(out, "{}", serde_json::to_string_pretty(&block.schema)?)?;
        return Ok(());
    }
    let names = |block: &mblm_core::registry::BlockInfo| match block.aliases.as_slice() {
        [] => block.name.clone(),
        aliases => format!("{} ({})", block.name, aliases.join(", ")),
    };
    let width = registry.blocks().map(|block| names(block).len()).max().unwrap_or(0);
    for block in registry.blocks() {
        writeln!(out, "{:width$}  {}", names(block), block.about)?;
    }
    Ok(())
}
