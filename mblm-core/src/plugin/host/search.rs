//! Where plugins are looked for, in this order: the folders (or files) given, those in `MBLM_PLUGIN_PATH`, the folder
//! `plugins` beside the configuration, and the user's data folder. Never the current directory by itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::block::PluginSource;
use super::library::Library;
use super::probe::Probe;
use crate::error::{Error, Result};
use crate::registry::BlockRegistry;

/// The environment variable that lists folders, separated as in `PATH`.
pub const PATH_VARIABLE: &str = "MBLM_PLUGIN_PATH";

/// Folders, or files, to look in.
#[derive(Clone, Debug, Default)]
pub struct SearchPath(Vec<PathBuf>);

impl SearchPath {
    /// The whole search path. `given` must exist; `config` is the configuration beside which `plugins` is looked for.
    pub fn new(given: &[PathBuf], config: Option<&Path>) -> Result<Self> {
        if let Some(missing) = given.iter().find(|path| !path.exists()) {
            return Err(Error::Input(format!(
                "--plugin-dir {}: there is no such folder or file; the path starts at the current directory",
                missing.display()
            )));
        }
        let mut path = SearchPath(given.to_vec());
        path.0.extend(std::env::var_os(PATH_VARIABLE).iter().flat_map(std::env::split_paths));
        // A configuration in the current directory has an empty parent, which is that directory.
        path.0.extend(config.and_then(Path::parent).map(|folder| Path::new(".").join(folder).join("plugins")));
        path.0.extend(user_folder());
        path.0.retain(|place| !place.as_os_str().is_empty());
        Ok(path)
    }

    /// Puts a place in front of all others.
    pub fn prepend(&mut self, place: PathBuf) {
        self.0.insert(0, place);
    }

    /// The places, in order.
    pub fn places(&self) -> &[PathBuf] {
        &self.0
    }

    /// The files in these places, in order, symbolic links resolved, each once; and what is no shared library.
    fn files(&self) -> (Vec<PathBuf>, Vec<Skipped>) {
        let (mut files, mut skipped, mut seen) = (vec![], vec![], BTreeSet::new());
        for path in self.0.iter().flat_map(|place| entries(place)) {
            match candidate(&path) {
                Ok(file) if seen.insert(file.clone()) => files.push(file),
                Ok(_) => {}
                Err(kind) => skipped.push(Skipped { path, ..kind }),
            }
        }
        (files, skipped)
    }
}

/// A plugin's folder for all of a user's projects.
fn user_folder() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let data = match std::env::consts::OS {
        "windows" => std::env::var_os("APPDATA").map(PathBuf::from),
        "macos" => home().map(|home| home.join("Library/Application Support")),
        _ => match std::env::var_os("XDG_DATA_HOME").filter(|folder| !folder.is_empty()) {
            Some(folder) => Some(folder.into()),
            None => home().map(|home| home.join(".local/share")),
        },
    };
    data.map(|folder| folder.join("mblm").join("plugins"))
}

/// What lies in a place: itself if it is a file, sorted if it is a folder, nothing if it cannot be read.
fn entries(place: &Path) -> Vec<PathBuf> {
    if place.is_file() {
        return vec![place.into()];
    }
    let mut paths: Vec<PathBuf> =
        place.read_dir().into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

/// The file behind a path, if it is called like a shared library.
fn candidate(path: &Path) -> Result<PathBuf, Skipped> {
    let skipped = |reason: String, looks_like_one| Skipped { path: path.into(), reason, looks_like_one };
    let extension = path.extension().and_then(|extension| extension.to_str());
    let is_library = extension == Some(std::env::consts::DLL_EXTENSION) || (cfg!(unix) && extension == Some("so"));
    let file = path.canonicalize();
    match file {
        Ok(file) if file.is_dir() => Err(skipped("a folder".into(), is_library)),
        _ if !is_library => {
            Err(skipped(format!("not called like a shared library (.{})", std::env::consts::DLL_EXTENSION), false))
        }
        Ok(file) => Ok(file),
        Err(error) if path.is_symlink() => Err(skipped(format!("a symbolic link to nothing: {error}"), true)),
        Err(error) => Err(skipped(error.to_string(), true)),
    }
}

/// A file that was not loaded.
#[derive(Clone, Debug, PartialEq)]
pub struct Skipped {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
    /// Whether it is called like a plugin, so that its user should know.
    pub looks_like_one: bool,
}

/// What was found.
pub struct Found {
    /// The types of `registry` and those of all plugins that were loaded.
    pub registry: BlockRegistry,
    /// The plugins.
    pub libraries: Vec<Arc<Library>>,
    /// What was not loaded.
    pub skipped: Vec<Skipped>,
}

/// Loads all plugins in `path` and adds their types to `registry`. A file that cannot be loaded stops nothing: it is
/// listed in [`Found::skipped`]. Without a probe, a library that crashes when it is opened takes the program with it.
pub fn load(mut registry: BlockRegistry, path: &SearchPath, probe: Option<&Probe>) -> Found {
    let (files, mut skipped) = path.files();
    let mut libraries: Vec<Arc<Library>> = vec![];
    for path in files {
        let opened = probe.map_or(Ok(()), |probe| probe.run(&path)).and_then(|()| Library::open(&path));
        let added = opened.and_then(|library| {
            let added = registry.add_source(PluginSource(library.clone()));
            added.map(|()| library).map_err(|error| error.to_string())
        });
        match added {
            Ok(library) => libraries.push(library),
            Err(reason) => skipped.push(Skipped { path, reason, looks_like_one: true }),
        }
    }
    Found { registry, libraries, skipped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_sorted_resolved_and_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b.so", "a.so", "README.md"] {
            std::fs::write(at(name), "no library").unwrap();
        }
        std::fs::create_dir(at("folder.so")).unwrap();
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("a.so", at("link.so")).unwrap();
            std::os::unix::fs::symlink("nowhere", at("broken.so")).unwrap();
        }
        let given = [at("b.so"), folder.path().to_path_buf()];
        let (files, skipped) = SearchPath::new(&given, None).unwrap().files();
        let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap().to_string()).collect();
        assert_eq!(names, ["b.so", "a.so"], "a file given comes first; a link to a known file is that file");
        let reason = |name: &str| {
            let found = skipped.iter().find(|s| s.path == at(name)).unwrap();
            (found.reason.split(':').next().unwrap().to_string(), found.looks_like_one)
        };
        assert_eq!(reason("folder.so"), ("a folder".into(), true));
        assert_eq!(reason("README.md"), ("not called like a shared library (.so)".into(), false));
        assert_eq!(reason("broken.so"), ("a symbolic link to nothing".into(), true));
        let error = SearchPath::new(&[at("none")], None).unwrap_err().to_string();
        assert!(error.contains("none: there is no such folder or file"), "{error}");
    }

    #[test]
    fn what_is_no_library_is_listed_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("text.so"), "no library").unwrap();
        let path = SearchPath::new(&[folder.path().into()], None).unwrap();
        let found = load(BlockRegistry::empty(), &path, None);
        assert_eq!((found.libraries.len(), found.skipped.len()), (0, 1));
        assert!(found.skipped[0].reason.starts_with("cannot be opened: "), "{:?}", found.skipped);
    }
}
