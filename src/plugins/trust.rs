//! The folders beside configurations whose plugins the user trusts: which libraries, by SHA-256. A library that is changed
//! or added later is not trusted. The list is `trusted-plugins.json` in the user's folder of settings.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mblm::base::{files, terminal};
use mblm::plugin::host::{LibraryFile, TrustedFolder, folders, libraries_in, ownership};
use serde::{Deserialize, Serialize};

use crate::exit::Usage;

/// A longer list is not one of ours.
const MAX_BYTES: u64 = 1 << 24;

/// The sums of the libraries in a folder, by their file names.
pub type Sums = BTreeMap<String, String>;

/// What the user trusts.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trust {
    /// By the folder's path without symbolic links.
    pub folders: BTreeMap<PathBuf, Sums>,
}

impl Trust {
    /// Reads the list; it is empty if there is none.
    ///
    /// # Errors
    /// The list is damaged, or somebody else can write to it.
    pub fn read() -> Result<Self> {
        let Some(path) = list().filter(|path| path.exists()) else { return Ok(Trust::default()) };
        let shown = path.display();
        if let Err(fault) = ownership::check(&path) {
            bail!(Usage(format!("{shown}: the list of trusted plugins is ignored, because {fault}")));
        }
        let text = files::read(&path, MAX_BYTES).with_context(|| shown.to_string())?;
        serde_json::from_slice(&text).map_err(|error| {
            Usage(format!("{shown}: not a list of trusted plugins: {error}; delete it, and trust your folders again"))
                .into()
        })
    }

    /// Reads the list; trusts nothing, with a warning, if it cannot be used.
    pub fn read_or_warn() -> Self {
        Self::read().unwrap_or_else(|error| {
            terminal::line(format_args!("warning: {error:#}"));
            Trust::default()
        })
    }

    /// Writes the list.
    pub fn write(&self) -> Result<()> {
        let Some(path) = list() else {
            bail!(Usage("no folder for the list of trusted plugins; set HOME to an absolute path".into()));
        };
        let folder = path.parent().unwrap_or(&path);
        let written = make_folder(folder).and_then(|()| {
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.as_file().sync_all()?;
            Ok(file.persist(&path).map(drop)?)
        });
        written.with_context(|| format!("cannot write {}", path.display()))
    }

    /// What is trusted in a folder.
    pub fn of(&self, folder: &Path) -> Option<TrustedFolder> {
        let sums = self.folders.get(&folder.canonicalize().ok()?)?;
        Some(TrustedFolder { path: folder.into(), sums: sums.values().cloned().collect() })
    }

    /// Everything that is trusted.
    pub fn folders(&self) -> Vec<TrustedFolder> {
        let trusted = |(path, sums): (&PathBuf, &Sums)| TrustedFolder {
            path: path.clone(),
            sums: sums.values().cloned().collect(),
        };
        self.folders.iter().map(trusted).collect()
    }

    /// Trusts the libraries that are in a folder now. None of them is opened.
    ///
    /// # Errors
    /// There is no library; somebody else can change one, or the folder.
    pub fn add(&mut self, folder: &Path) -> Result<&Sums> {
        let refuse = |what: String| Usage(format!("{}: {what}", folder.display()));
        let place = folder.canonicalize().map_err(|error| refuse(error.to_string()))?;
        let libraries = libraries_in(&place);
        if libraries.is_empty() {
            let below = folder.join("plugins");
            let hint = if libraries_in(&below).is_empty() {
                String::new()
            } else {
                format!("; did you mean {}?", below.display())
            };
            bail!(refuse(format!("it contains no shared library{hint}")));
        }
        let mut sums = Sums::new();
        for library in libraries {
            let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let file = LibraryFile::read(&library).map_err(|fault| refuse(format!("{name}: {fault}")))?;
            sums.insert(name, file.sha256);
        }
        self.folders.insert(place.clone(), sums);
        Ok(&self.folders[&place])
    }
}

/// Where the list is.
fn list() -> Option<PathBuf> {
    folders::settings().map(|folder| folder.join("trusted-plugins.json"))
}

/// Makes a folder that nobody else can write to, whatever the umask.
fn make_folder(folder: &Path) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    Ok(builder.recursive(true).create(folder)?)
}
