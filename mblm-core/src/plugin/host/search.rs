//! The search path of plugins, in this order: the given folders (or files), those in `MBLM_PLUGIN_PATH`, folders that
//! the user trusts, and the user's data folder. Never the current directory by default, and never a folder that
//! somebody else can write to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mblm_sdk::error::Error;

use super::block::PluginSource;
use super::file::LibraryFile;
use super::library::Library;
use super::probe::Probe;
use super::{blame, folders, ownership};
use crate::registry::BlockRegistry;

/// The environment variable that lists folders, separated as in `PATH`.
pub const PATH_VARIABLE: &str = "MBLM_PLUGIN_PATH";

/// A folder of which only some libraries are trusted.
#[derive(Clone, Debug)]
pub struct TrustedFolder {
    /// The folder.
    pub path: PathBuf,
    /// The SHA-256 sums of its libraries that may be opened.
    pub sums: BTreeSet<String>,
}

/// Folders, or files, to look in.
#[derive(Clone, Debug)]
pub struct SearchPath(Vec<Place>);

#[derive(Clone, Debug)]
struct Place {
    path: PathBuf,
    /// The sums of what may be opened; none if everything may.
    sums: Option<BTreeSet<String>>,
}

impl SearchPath {
    /// The whole search path. What is `given` must exist.
    pub fn new(given: &[PathBuf], trusted: Vec<TrustedFolder>) -> mblm_sdk::Result<Self> {
        if let Some(missing) = given.iter().find(|path| !path.exists()) {
            return Err(Error::Input(format!(
                "--plugin-dir {}: no such folder or file; check the path, which starts at the current directory",
                missing.display()
            )));
        }
        let everything = |path| Place { path, sums: None };
        let variable = std::env::var_os(PATH_VARIABLE);
        let mut places: Vec<Place> = given.iter().cloned().map(everything).collect();
        places.extend(variable.iter().flat_map(std::env::split_paths).map(everything));
        places.extend(trusted.into_iter().map(|TrustedFolder { path, sums }| Place { path, sums: Some(sums) }));
        places.extend(folders::plugins().map(everything));
        places.retain(|place| !place.path.as_os_str().is_empty());
        Ok(SearchPath(places))
    }

    /// The places, in order.
    pub fn places(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|place| place.path.as_path())
    }

    /// What lies in these places, in order: the files behind symbolic links, each once, or why a path is no library.
    fn candidates(&self) -> Vec<(&Place, Result<PathBuf, Skipped>)> {
        let mut seen = BTreeSet::new();
        let paths = self.0.iter().flat_map(|place| entries(&place.path).into_iter().map(move |path| (place, path)));
        let candidates = paths.map(|(place, path)| (place, candidate(&path)));
        candidates.filter(|(_, found)| found.as_ref().map_or(true, |file| seen.insert(file.clone()))).collect()
    }
}

impl Place {
    /// Reads a library of this place.
    fn read(&self, file: &Path) -> Result<LibraryFile, String> {
        if self.path.is_dir() {
            // A link in a folder that others can write to may lead anywhere.
            ownership::check_one(&self.path).map_err(|fault| format!("refused, since {fault}"))?;
        }
        LibraryFile::read(file)
    }

    /// Whether a library of this place may be opened.
    fn admit(&self, file: &LibraryFile) -> Result<(), String> {
        match &self.sums {
            Some(sums) if !sums.contains(&file.sha256) => Err(format!(
                "not the library that was trusted, or a new one; trust it with: mblm plugin trust {}",
                self.path.display()
            )),
            _ => Ok(()),
        }
    }
}

/// The libraries in a folder, by their names alone; nothing is read or opened.
pub fn libraries_in(folder: &Path) -> Vec<PathBuf> {
    entries(folder).into_iter().filter(|path| candidate(path).is_ok()).collect()
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
            Err(skipped(format!("not named like a shared library (.{})", std::env::consts::DLL_EXTENSION), false))
        }
        Ok(file) => Ok(file),
        Err(error) if path.is_symlink() => Err(skipped(format!("a broken symbolic link: {error}"), true)),
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

/// Loads the plugins in `path` whose SHA-256 is `wanted`, and adds their types to `registry`. A file is hashed before it is
/// opened. One that cannot be loaded stops nothing: it is listed in [`Found::skipped`]. Without a probe, a library that
/// crashes when it is opened takes the program with it.
pub fn load(registry: BlockRegistry, path: &SearchPath, wanted: &dyn Fn(&str) -> bool, probe: Option<&Probe>) -> Found {
    let mut found = Found { registry, libraries: vec![], skipped: vec![] };
    for (place, candidate) in path.candidates() {
        let path = match candidate {
            Ok(path) => path,
            Err(skipped) => {
                found.skipped.push(skipped);
                continue;
            }
        };
        let opened = place.read(&path).and_then(|file| match wanted(&file.sha256) {
            true => place.admit(&file).and_then(|()| open(&file, probe)).map(Some),
            false => Ok(None),
        });
        match opened {
            Ok(Some(library)) => found.add(library, path),
            Ok(None) => {}
            Err(reason) => found.skipped.push(Skipped { path, reason, looks_like_one: true }),
        }
    }
    // A library that this process has opened is there, even if its file was replaced since.
    for library in Library::opened().into_iter().filter(|library| wanted(&library.origin().sha256)) {
        let path = library.origin().path.clone();
        if !found.has(&library) && !found.skipped.iter().any(|skipped| skipped.path == path) {
            found.add(library, path);
        }
    }
    found
}

impl Found {
    fn has(&self, library: &Arc<Library>) -> bool {
        self.libraries.iter().any(|known| Arc::ptr_eq(known, library))
    }

    /// Adds the types of the library that was found at `path`.
    fn add(&mut self, library: Arc<Library>, path: PathBuf) {
        if self.has(&library) {
            let reason = format!("a copy of {}", library.origin().path.display());
            self.skipped.push(Skipped { path, reason, looks_like_one: false });
            return;
        }
        match self.registry.add_source(PluginSource(library.clone())) {
            Ok(()) => self.libraries.push(library),
            Err(error) => self.skipped.push(Skipped { path, reason: error.to_string(), looks_like_one: true }),
        }
    }
}

fn open(file: &LibraryFile, probe: Option<&Probe>) -> Result<Arc<Library>, String> {
    if !Library::is_open(&file.sha256) {
        probe.map_or(Ok(()), |probe| probe.run(file))?;
        blame::opened(&file.path.display().to_string());
    }
    Library::open_file(file)
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
        let path = SearchPath::new(&given, vec![]).unwrap();
        let (files, skipped): (Vec<_>, Vec<_>) =
            path.candidates().into_iter().map(|(_, found)| found).partition(Result::is_ok);
        let (files, skipped) =
            (files.into_iter().flatten(), skipped.into_iter().filter_map(Result::err).collect::<Vec<_>>());
        let names: Vec<_> = files.map(|f| f.file_name().unwrap().to_str().unwrap().to_string()).collect();
        assert_eq!(names, ["b.so", "a.so"], "a file given comes first; a link to a known file is that file");
        let reason = |name: &str| {
            let found = skipped.iter().find(|s| s.path == at(name)).unwrap();
            (found.reason.split(':').next().unwrap().to_string(), found.looks_like_one)
        };
        assert_eq!(reason("folder.so"), ("a folder".into(), true));
        assert_eq!(reason("README.md"), ("not named like a shared library (.so)".into(), false));
        assert_eq!(reason("broken.so"), ("a broken symbolic link".into(), true));
        let error = SearchPath::new(&[at("none")], vec![]).unwrap_err().to_string();
        assert!(error.contains("none: no such folder or file"), "{error}");
    }

    #[test]
    fn what_is_no_library_is_listed_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("text.so"), "no library").unwrap();
        let path = SearchPath::new(&[folder.path().into()], vec![]).unwrap();
        let found = load(BlockRegistry::empty(), &path, &|_| true, None);
        assert_eq!((found.libraries.len(), found.skipped.len()), (0, 1));
        assert!(found.skipped[0].reason.starts_with("cannot be opened: "), "{:?}", found.skipped);
    }
}
