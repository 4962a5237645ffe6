//! `mblm plugin list`: what was found, and what was not loaded.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;

use crate::plugins::Plugins;

/// Arguments of `mblm plugin list`.
#[derive(clap::Args)]
pub struct Args {
    /// Look in the folder `plugins` beside this configuration too
    config: Option<PathBuf>,
}

/// Runs `mblm plugin list`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    let found = plugins.find(args.config.as_deref())?;
    let mut out = std::io::stdout().lock();
    for library in &found.libraries {
        let origin = library.origin();
        writeln!(out, "{} {}  {}", origin.name, origin.version, origin.path.display())?;
        writeln!(out, "  sha256 {}", origin.sha256)?;
        let width = library.blocks().iter().map(|block| block.block_type.len()).max().unwrap_or(0);
        for block in library.blocks() {
            writeln!(out, "  {:width$}  {}  {}", block.block_type, block.version, block.about)?;
        }
    }
    if found.libraries.is_empty() {
        writeln!(out, "no plugins found; looked in")?;
        for place in plugins.search_path(args.config.as_deref())?.places() {
            writeln!(out, "  {}", place.display())?;
        }
    }
    if !found.skipped.is_empty() {
        writeln!(out, "not loaded:")?;
        for skipped in &found.skipped {
            writeln!(out, "  {}: {}", skipped.path.display(), skipped.reason)?;
        }
    }
    Ok(())
}
