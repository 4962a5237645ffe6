//! Which plugins a command can use. A library is opened only if a configuration names a block type that is not built in,
//! and only from where the user pointed: `--plugin-dir`, `MBLM_PLUGIN_PATH`, the user's data folder and trusted folders.

pub mod trust;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::Result;
use mblm::base::terminal;
use mblm::block::PluginOrigin;
use mblm::plugin::host::probe::Probe;
use mblm::plugin::host::{CANNOT_LOAD, Found, SearchPath, libraries_in, load};
use mblm::registry::BlockRegistry;

/// The subcommand that a probe runs.
pub const PROBE: &str = "probe-plugin";

/// Where to look for plugins.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Plugins {
    /// Search this folder (or this library) for plugins before all other places; may be repeated
    #[arg(long, value_name = "DIR", global = true)]
    plugin_dir: Vec<PathBuf>,
}

impl Plugins {
    /// The folders and libraries that the command line names.
    pub fn named(&self) -> &[PathBuf] {
        &self.plugin_dir
    }

    /// The built-in block types. Plugins are looked for when a configuration asks for another type; those in the folder
    /// `plugins` beside `config` only if the user trusts that folder.
    pub fn registry(&self, config: Option<&Path>) -> Result<BlockRegistry> {
        let (search, beside) = (self.search(config)?, config.map(folder_beside));
        let plugins = BlockRegistry::builtin()?;
        let look = move || {
            let found = search.load_or_warn(plugins, &|_| true);
            let advice = advice(beside.as_deref(), &found);
            found.registry.with_advice(advice)
        };
        Ok(BlockRegistry::builtin()?.with_fallback(look))
    }

    /// The built-in block types. The plugins that a run was trained with are looked for when its configuration asks for
    /// another type: by their SHA-256, never by the path that the run recorded, which may come from somebody else. With
    /// `allow_change`, plugins with other sums are taken too.
    pub fn registry_of_run(&self, run: &Path, recorded: &[PluginOrigin], allow_change: bool) -> Result<BlockRegistry> {
        let trusted = trust::Trust::read_or_warn().folders();
        let search = Search::new(SearchPath::new(&self.plugin_dir, trusted)?)?;
        let (run, recorded, plugins) = (run.to_path_buf(), recorded.to_vec(), BlockRegistry::builtin()?);
        let look = move || {
            let sums: BTreeSet<&str> = recorded.iter().map(|plugin| plugin.sha256.as_str()).collect();
            let found = search.load_or_warn(plugins, &|sum| allow_change || sums.contains(sum));
            let advice = advice_of_run(&run, &recorded, &search.path, &found);
            found.registry.with_advice(advice)
        };
        Ok(BlockRegistry::builtin()?.with_fallback(look))
    }

    /// The built-in block types and those of all plugins that are found.
    pub fn whole_registry(&self) -> Result<BlockRegistry> {
        Ok(self.search(None)?.load_or_warn(BlockRegistry::builtin()?, &|_| true).registry)
    }

    /// All plugins that are found, also in the trusted folder `plugins` beside `config`, and what was not loaded.
    pub fn find(&self, config: Option<&Path>) -> Result<Found> {
        Ok(self.search(config)?.load(BlockRegistry::builtin()?, &|_| true))
    }

    /// The places that are looked in.
    pub fn search_path(&self, config: Option<&Path>) -> Result<SearchPath> {
        Ok(self.search(config)?.path)
    }

    fn search(&self, config: Option<&Path>) -> Result<Search> {
        let trusted = config.and_then(|config| trust::Trust::read_or_warn().of(&folder_beside(config)));
        Search::new(SearchPath::new(&self.plugin_dir, trusted.into_iter().collect())?)
    }
}

/// A search that has not begun.
struct Search {
    path: SearchPath,
    probe: Probe,
}

impl Search {
    fn new(path: SearchPath) -> Result<Self> {
        Ok(Search { path, probe: Probe::new(std::env::current_exe()?, &[PROBE]) })
    }

    /// Opens the libraries whose SHA-256 is `wanted`.
    fn load(&self, registry: BlockRegistry, wanted: &dyn Fn(&str) -> bool) -> Found {
        load(registry, &self.path, wanted, Some(&self.probe))
    }

    /// Opens the libraries whose SHA-256 is `wanted`. What looks like a plugin and cannot be loaded is a warning: only a
    /// configuration that needs it is in trouble.
    fn load_or_warn(&self, registry: BlockRegistry, wanted: &dyn Fn(&str) -> bool) -> Found {
        let found = self.load(registry, wanted);
        for skipped in found.skipped.iter().filter(|skipped| skipped.looks_like_one) {
            terminal::line(format_args!(
                "warning: plugin {} was not loaded: {}",
                skipped.path.display(),
                skipped.reason
            ));
        }
        found
    }
}

/// The folder of plugins that belong to a configuration.
pub fn folder_beside(config: &Path) -> PathBuf {
    config.parent().unwrap_or(Path::new("")).join("plugins")
}

/// The libraries in the folder beside a configuration that were left alone, since the folder is not trusted.
pub fn left_alone(folder: &Path, found: &Found) -> Vec<PathBuf> {
    let loaded = found.libraries.iter().map(|library| &library.origin().path);
    let known: BTreeSet<&PathBuf> = loaded.chain(found.skipped.iter().map(|skipped| &skipped.path)).collect();
    let is_known = |path: &PathBuf| path.canonicalize().is_ok_and(|path| known.contains(&path));
    libraries_in(folder).into_iter().filter(|path| !is_known(path)).collect()
}

/// Where else a block type may be.
fn advice(beside: Option<&Path>, found: &Found) -> String {
    if let Some(reason) = CANNOT_LOAD {
        return reason.into();
    }
    let waiting = beside.map(|folder| (folder, left_alone(folder, found))).filter(|(_, files)| !files.is_empty());
    match waiting {
        None => "if it comes from a plugin, pass its folder with --plugin-dir".into(),
        Some((folder, files)) => {
            let names =
                files.iter().map(|file| file.file_name().unwrap_or_default().to_string_lossy()).collect::<Vec<_>>();
            let (folder, names) = (folder.display(), names.join(", "));
            format!(
                "{folder} holds {names}, and a library beside a configuration is loaded only if you trust it: run \
                 `mblm plugin trust {folder}` once, or add --plugin-dir {folder}"
            )
        }
    }
}

/// Which of a run's plugins are missing, and where they were looked for.
fn advice_of_run(run: &Path, recorded: &[PluginOrigin], path: &SearchPath, found: &Found) -> String {
    if let Some(reason) = CANNOT_LOAD {
        return reason.into();
    }
    let is_there = |plugin: &PluginOrigin| found.libraries.iter().any(|library| library.origin().is_file_of(plugin));
    let missing = recorded.iter().filter(|plugin| !is_there(plugin)).map(|plugin| {
        // The folder was that of the machine that trained.
        let file = plugin.path.file_name().unwrap_or_default().to_string_lossy();
        format!("plugin {} {} ({file}, sha256 {})", plugin.name, plugin.version, plugin.short_sum())
    });
    let missing = missing.collect::<Vec<_>>().join(", ");
    if missing.is_empty() {
        return format!("{} records no plugin that provides it", run.display());
    }
    let places = path.places().map(|place| place.display().to_string()).collect::<Vec<_>>();
    let places = if places.is_empty() { "nowhere".into() } else { places.join(", ") };
    format!(
        "{} was trained with {missing}, and no library with that SHA-256 was found (looked in: {places}); name its folder with \
         --plugin-dir DIR, or accept another build of it with --allow-plugin-change",
        run.display()
    )
}
