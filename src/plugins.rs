//! Which plugins a command can use: the search path from the command line, and those that a run was trained with.

use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::block::PluginOrigin;
use mblm::plugin::host::probe::Probe;
use mblm::plugin::host::{Found, SearchPath, load};
use mblm::registry::BlockRegistry;
use mblm::train::terminal;

/// The subcommand that a probe runs.
pub const PROBE: &str = "probe-plugin";

/// Where to look for plugins.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Plugins {
    /// Look for plugins in this folder (or take this file) before all others; may be repeated
    #[arg(long, value_name = "DIR", global = true)]
    plugin_dir: Vec<PathBuf>,
}

impl Plugins {
    /// The built-in block types and those of all plugins that are found, also in the folder `plugins` beside `config`.
    /// What looks like a plugin and cannot be loaded is a warning: only a configuration that needs it is in trouble.
    pub fn registry(&self, config: Option<&Path>) -> Result<BlockRegistry> {
        let found = self.find(config)?;
        for skipped in found.skipped.iter().filter(|skipped| skipped.looks_like_one) {
            terminal::line(format_args!(
                "warning: plugin {} was not loaded: {}",
                skipped.path.display(),
                skipped.reason
            ));
        }
        Ok(found.registry)
    }

    /// The block types for a run that was trained with `recorded` plugins: these are looked for where they were.
    ///
    /// # Errors
    /// A plugin that is not found.
    pub fn registry_of_run(&self, run: &Path, recorded: &[PluginOrigin]) -> Result<BlockRegistry> {
        let mut plugins = self.clone();
        plugins.plugin_dir.extend(recorded.iter().map(|plugin| plugin.path.clone()).filter(|path| path.is_file()));
        let found = plugins.find(None)?;
        let is_there = |plugin: &PluginOrigin| found.libraries.iter().any(|l| l.origin().name == plugin.name);
        if let Some(missing) = recorded.iter().find(|plugin| !is_there(plugin)) {
            let refused = found.skipped.iter().find(|skipped| skipped.path == missing.path);
            let why = refused.map_or("is not found".into(), |skipped| format!("was not loaded: {}", skipped.reason));
            let (run, path) = (run.display(), missing.path.display());
            return Err(crate::Usage(format!(
                "{run} was trained with plugin {} {} ({path}), which {why}; put it back, or name its folder with \
                 --plugin-dir",
                missing.name, missing.version
            ))
            .into());
        }
        Ok(found.registry)
    }

    /// Everything that was found, and what was not loaded.
    pub fn find(&self, config: Option<&Path>) -> Result<Found> {
        let path = self.search_path(config)?;
        let probe = Probe::new(std::env::current_exe()?, &[PROBE]);
        Ok(load(BlockRegistry::builtin()?, &path, Some(&probe)))
    }

    /// The places that are looked in.
    pub fn search_path(&self, config: Option<&Path>) -> Result<SearchPath> {
        Ok(SearchPath::new(&self.plugin_dir, config)?)
    }
}
