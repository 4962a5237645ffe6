//! `mblm plugin list`: what was found, and what was not loaded.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::base::terminal::Output;
use mblm::plugin::host::{CANNOT_LOAD, Skipped};

use crate::exit::Usage;
use crate::plugins::{Plugins, folder_beside, left_alone};

/// Arguments of `mblm plugin list`.
#[derive(clap::Args)]
pub struct Args {
    /// Also search the folder `plugins` beside this configuration, if you trust it
    config: Option<PathBuf>,
}

/// Runs `mblm plugin list`.
pub fn run(args: &Args, plugins: &Plugins) -> Result<()> {
    if let Some(reason) = CANNOT_LOAD {
        return Err(Usage(reason.into()).into());
    }
    let mut found = plugins.find(args.config.as_deref())?;
    if let Some(folder) = args.config.as_deref().map(folder_beside) {
        let reason = format!("not trusted; to trust the folder: mblm plugin trust {}", folder.display());
        let files = left_alone(&folder, &found);
        let skipped = files.into_iter().map(|path| Skipped { path, reason: reason.clone(), looks_like_one: true });
        found.skipped.extend(skipped.collect::<Vec<_>>());
    }
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
