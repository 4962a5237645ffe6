//! `mblm plugin list`: what was found, and what was not loaded.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::plugin::host::Skipped;
use mblm::train::terminal::Output;

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
    let mut out = Output::new();
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
        for skipped in found.skipped.iter().filter(|skipped| skipped.looks_like_one) {
            writeln!(out, "  {}: {}", skipped.path.display(), skipped.reason)?;
        }
        for ((folder, reason), names) in others(&found.skipped) {
            writeln!(out, "  {}: {}: {reason}", folder.display(), names.join(", "))?;
        }
    }
    Ok(())
}

/// The names of what is not called like a plugin, which may be many in a folder that is not for plugins alone.
fn others(skipped: &[Skipped]) -> BTreeMap<(&Path, &str), Vec<String>> {
    let mut groups: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for Skipped { path, reason, .. } in skipped.iter().filter(|skipped| !skipped.looks_like_one) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        groups.entry((path.parent().unwrap_or(path), reason.as_str())).or_default().push(name);
    }
    groups
}
