//! Which files a data set reads: each regular file once, in an order that depends on names alone.
//!
//! * A folder is read with all folders below it. Links to files and folders are followed; each folder is entered once.
//! * A file counts once, however many paths, links or hard links lead to it.
//! * Hidden files and folders are left out of folders and of globs, unless the glob spells out the leading dot.
//! * Run folders, study folders and `io.output_dir` are left out, so that training does not change its own data.
//! * FIFOs, sockets and devices are never opened.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Component, Path, PathBuf};

use glob::{MatchOptions, Pattern, PatternError};

use crate::error::{AtPath, Error, Result};
use crate::files::reader::DataFile;

/// The folder of checkpoints in a run's folder.
const CHECKPOINTS: &str = "checkpoints";

/// A file to read.
#[derive(Debug)]
pub struct Listed {
    /// Its path below the folder that was searched, which decides its place.
    pub name: PathBuf,
    pub(crate) data: DataFile,
}

/// What a search found.
#[derive(Debug)]
pub struct Listing {
    /// The files that hold bytes, in the order of their names.
    pub files: Vec<Listed>,
    /// What was not taken.
    pub left_out: LeftOut,
}

/// What a search met and left out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LeftOut {
    /// Folders of runs and studies, and `io.output_dir`.
    output_folders: usize,
    /// Links that lead nowhere.
    broken_links: usize,
    /// FIFOs, sockets and devices.
    special_files: usize,
}

impl fmt::Display for LeftOut {
    /// Nothing, or `; left out: …`.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let counts = [
            (self.output_folders, "output folder(s) of training"),
            (self.broken_links, "broken link(s)"),
            (self.special_files, "special file(s)"),
        ];
        let parts: Vec<String> =
            counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
        if parts.is_empty() { Ok(()) } else { write!(f, "; left out: {}", parts.join(", ")) }
    }
}

impl Listing {
    /// The files that `place` names: a file, a folder or a glob; with `patterns`, those that these name below `place`.
    /// `output_dir` is left out where it lies below a folder that is searched.
    ///
    /// # Errors
    /// Nothing is there, it is no regular file or folder, or it cannot be read.
    pub fn find(place: &Path, patterns: &[String], output_dir: Option<&Path>) -> Result<Self> {
        let output_dir = output_dir.and_then(|folder| fs::canonicalize(folder).ok());
        let mut search = Search { output_dir, found: Vec::new(), left_out: LeftOut::default() };
        if patterns.is_empty() {
            search.place(place)?;
        }
        for pattern in patterns {
            // A place that is a folder is one even if its name looks like a glob.
            match fs::symlink_metadata(place.join(pattern)) {
                Err(_) if place.is_dir() && is_glob(pattern) => search.glob(place, pattern)?,
                _ => search.place(&place.join(pattern))?,
            }
        }
        let root = root(place);
        Ok(search.finish(&fs::canonicalize(&root).unwrap_or(root)))
    }
}

/// The folder that the names of files start in.
pub(super) fn root(place: &Path) -> PathBuf {
    if place.is_dir() {
        place.into()
    } else if place.is_file() {
        parent(place)
    } else {
        or_here(literal(place).0)
    }
}

fn is_glob(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The folder before the first wildcard, and the rest.
fn literal(place: &Path) -> (PathBuf, PathBuf) {
    let mut parts = place.components().peekable();
    let mut folder = PathBuf::new();
    while let Some(part) = parts.next_if(|part| !is_glob(&part.as_os_str().to_string_lossy())) {
        folder.push(part);
    }
    (folder, parts.collect())
}

fn parent(file: &Path) -> PathBuf {
    or_here(file.parent().unwrap_or(Path::new("")).into())
}

fn or_here(folder: PathBuf) -> PathBuf {
    if folder.as_os_str().is_empty() { ".".into() } else { folder }
}

/// A file that was met, under one of its names.
struct Found {
    /// The way to it from its canonical starting folder; links on that way have the names that the user gave them.
    shown: PathBuf,
    real: PathBuf,
    hard_link: Option<(u64, u64)>,
    data: DataFile,
}

struct Search {
    output_dir: Option<PathBuf>,
    found: Vec<Found>,
    left_out: LeftOut,
}

/// A folder on the way.
struct Folder {
    path: PathBuf,
    real: PathBuf,
    /// Its path below the folder where the search began, and the number of parts of that.
    below: PathBuf,
    depth: usize,
}

impl Search {
    fn place(&mut self, place: &Path) -> Result<()> {
        let cannot =
            |error: &dyn fmt::Display| Error::Config(format!("io.dataset_dir: cannot read {place:?}: {error}"));
        match fs::metadata(place) {
            Ok(found) if found.is_dir() => self.folder(place, &Wanted::all()),
            Ok(found) if found.is_file() => {
                let folder = fs::canonicalize(parent(place)).map_err(|error| cannot(&error))?;
                let real = fs::canonicalize(place).map_err(|error| cannot(&error))?;
                self.add(place.into(), folder.join(place.file_name().unwrap_or_default()), real, &found);
                Ok(())
            }
            Ok(_) => Err(cannot(&"it is a FIFO, a socket or a device; expected a file, a folder or a glob")),
            Err(error) => match place.to_str().filter(|text| is_glob(text)) {
                Some(_) => {
                    let (folder, rest) = literal(place);
                    self.glob(&folder, &rest.to_string_lossy())
                }
                None if place.is_symlink() => Err(cannot(&"the link is broken")),
                None if error.kind() == ErrorKind::NotFound => Err(nothing(place)),
                None => Err(cannot(&error)),
            },
        }
    }

    /// Adds the files below `folder` whose paths match `pattern`.
    fn glob(&mut self, folder: &Path, pattern: &str) -> Result<()> {
        let (literal, rest) = literal(Path::new(pattern));
        let folder = or_here(folder.join(literal));
        let place = folder.join(&rest);
        let wanted = Wanted::matching(&rest.to_string_lossy())
            .map_err(|error| Error::Config(format!("io.dataset_dir: glob {place:?}: {error}")))?;
        let before = self.found.len();
        if folder.is_dir() {
            self.folder(&folder, &wanted)?;
        }
        if self.found.len() == before { Err(nothing(&place)) } else { Ok(()) }
    }

    /// Adds what is wanted below a folder, each folder below it once: links may lead back.
    fn folder(&mut self, path: &Path, wanted: &Wanted) -> Result<()> {
        let start = fs::canonicalize(path).at(path)?;
        let mut entered = HashSet::new();
        let mut left = vec![Folder { path: path.into(), real: start.clone(), below: PathBuf::new(), depth: 0 }];
        while let Some(folder) = left.pop() {
            if entered.insert(folder.real.clone()) {
                let inner = self.entries(&folder, &start, wanted)?;
                left.extend(inner.into_iter().rev());
            }
        }
        Ok(())
    }

    /// Adds the wanted files in a folder. Returns the folders in it that may hold more.
    fn entries(&mut self, folder: &Folder, start: &Path, wanted: &Wanted) -> Result<Vec<Folder>> {
        let entries = fs::read_dir(&folder.path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = entries.at(&folder.path)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        if folder.depth > 0 && self.is_output(folder, &entries) {
            self.left_out.output_folders += 1;
            return Ok(Vec::new());
        }
        let mut inner = Vec::new();
        for entry in entries {
            let (name, path) = (entry.file_name(), entry.path());
            let (enters, below) = (wanted.enters(folder.depth, &name), folder.below.join(&name));
            let takes = wanted.takes(folder.depth, &below);
            if !enters && !takes {
                continue;
            }
            let (mut kind, mut real) = (entry.file_type().at(&path)?, folder.real.join(&name));
            if kind.is_symlink() {
                let Ok(target) = fs::canonicalize(&path) else {
                    self.left_out.broken_links += 1;
                    continue;
                };
                (kind, real) = (fs::metadata(&path).at(&path)?.file_type(), target);
            }
            if kind.is_dir() {
                inner.extend(enters.then(|| Folder { path, real, below, depth: folder.depth + 1 }));
            } else if takes && kind.is_file() {
                let found = fs::metadata(&path).at(&path)?;
                self.add(path, start.join(below), real, &found);
            } else if takes {
                self.left_out.special_files += 1;
            }
        }
        Ok(inner)
    }

    /// Whether a folder holds what training wrote.
    fn is_output(&self, folder: &Folder, entries: &[fs::DirEntry]) -> bool {
        let has = |name: &str| entries.iter().any(|entry| entry.file_name() == name);
        has("config.yaml") && has(CHECKPOINTS)
            || has("study.json") && has("runs")
            || self.output_dir.as_ref() == Some(&folder.real)
    }

    fn add(&mut self, path: PathBuf, shown: PathBuf, real: PathBuf, found: &Metadata) {
        #[cfg(unix)]
        let hard_link = {
            use std::os::unix::fs::MetadataExt;
            // Some file systems number different files alike; a file with one name needs no number.
            (found.nlink() > 1).then(|| (found.dev(), found.ino()))
        };
        #[cfg(not(unix))]
        let hard_link = None;
        self.found.push(Found { shown, real, hard_link, data: DataFile { path, len: found.len() } });
    }

    /// The files, each once, with their names relative to `root`.
    fn finish(self, root: &Path) -> Listing {
        let mut files: Vec<(PathBuf, Found)> =
            self.found.into_iter().map(|found| (relative(&found.shown, root), found)).collect();
        // The shortest name of a file counts, and of those the first.
        files.sort_by(|(a, _), (b, _)| a.components().count().cmp(&b.components().count()).then_with(|| a.cmp(b)));
        let (mut paths, mut numbers) = (HashSet::new(), HashSet::new());
        files.retain(|(_, found)| {
            paths.insert(found.real.clone()) && found.hard_link.is_none_or(|number| numbers.insert(number))
        });
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        let files = files.into_iter().filter(|(_, found)| found.data.len > 0);
        let files = files.map(|(name, found)| Listed { name, data: found.data }).collect();
        Listing { files, left_out: self.left_out }
    }
}

fn nothing(place: &Path) -> Error {
    Error::Config(format!(
        "io.dataset_dir: {place:?} does not exist; expected a file, a folder or a glob that matches files (relative \
         paths start at the current directory)"
    ))
}

/// The path to `path` from the folder `from`; both are absolute.
pub fn relative(path: &Path, from: &Path) -> PathBuf {
    let shared = path.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(path.components().skip(shared)).collect()
}

/// Which paths below a folder are wanted.
struct Wanted {
    /// `None` for all that are not hidden.
    glob: Option<Glob>,
}

struct Glob {
    whole: Pattern,
    /// The parts of the pattern, between slashes.
    parts: Vec<Pattern>,
}

/// `*` and `?` match no slash, and no dot at the start of a name.
const MATCH: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

impl Wanted {
    fn all() -> Self {
        Wanted { glob: None }
    }

    fn matching(pattern: &str) -> std::result::Result<Self, PatternError> {
        let (whole, mut parts) = (Pattern::new(pattern)?, Vec::new());
        for part in pattern.split('/') {
            parts.push(Pattern::new(part)?);
        }
        Ok(Wanted { glob: Some(Glob { whole, parts }) })
    }

    /// Whether a folder called `name` in a folder at `depth` may hold what is wanted.
    fn enters(&self, depth: usize, name: &OsStr) -> bool {
        let is_hidden = is_hidden(name);
        let Some(Glob { parts, .. }) = &self.glob else { return !is_hidden };
        match parts.iter().position(|part| part.as_str() == "**") {
            Some(deep) if deep <= depth => {
                !is_hidden || parts[deep..].iter().any(|part| part.as_str().starts_with('.'))
            }
            _ => depth + 1 < parts.len() && parts[depth].matches_with(&name.to_string_lossy(), MATCH),
        }
    }

    /// Whether the file `below`, in a folder at `depth`, is wanted. What is not UTF-8 in its name matches wildcards.
    fn takes(&self, depth: usize, below: &Path) -> bool {
        match &self.glob {
            None => !is_hidden(below.file_name().unwrap_or_default()),
            Some(Glob { whole, parts }) => {
                let deep = parts.iter().any(|part| part.as_str() == "**");
                (deep || depth + 1 == parts.len()) && whole.matches_with(&below.to_string_lossy(), MATCH)
            }
        }
    }
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn find(place: &Path, patterns: &[&str]) -> Result<Listing> {
        let patterns: Vec<String> = patterns.iter().map(|pattern| pattern.to_string()).collect();
        Listing::find(place, &patterns, None)
    }

    /// The names that are found, in their order.
    fn names(place: &Path, patterns: &[&str]) -> Vec<String> {
        let files = find(place, patterns).unwrap().files;
        files.into_iter().map(|file| file.name.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_names_without_hidden_and_empty_files() {
        let folder = folder(&[
            ("b.txt", "1"),
            ("a/z.txt", "2"),
            ("a/b.txt", "3"),
            ("a.txt", "4"),
            (".hidden", "5"),
            (".git/x", "6"),
            ("empty", ""),
        ]);
        assert_eq!(names(folder.path(), &[]), ["a/b.txt", "a/z.txt", "a.txt", "b.txt"]);
        assert_eq!(names(&folder.path().join(".git"), &[]), ["x"], "what is named is read");
        assert_eq!(names(&folder.path().join(".hidden"), &[]), [".hidden"]);
    }

    #[test]
    fn globs_match_as_in_a_shell() {
        let files = ["a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", "x[1].txt", ".h/e.txt", "sub/.f.txt", "x1.txt"];
        let folder = folder(&files.map(|name| (name, name)));
        let at = |glob: &str| names(&folder.path().join(glob), &[]);
        assert_eq!(at("*.md"), ["b.md"]);
        assert_eq!(at("*"), ["a.txt", "b.md", "x1.txt", "x[1].txt"]);
        assert_eq!(at("**/*.txt"), ["a.txt", "sub/c.txt", "sub/deep/d.txt", "x1.txt", "x[1].txt"]);
        assert_eq!(at("**"), ["a.txt", "b.md", "sub/c.txt", "sub/deep/d.txt", "x1.txt", "x[1].txt"]);
        assert_eq!(at("*/*.txt"), ["sub/c.txt"]);
        assert_eq!(at("sub/**/d.*"), ["deep/d.txt"]);
        assert_eq!(at("x[1].txt"), ["x[1].txt"], "a name that looks like a glob");
        assert_eq!((at(".h/*"), at(".*/*")), (vec!["e.txt".to_string()], vec![".h/e.txt".to_string()]));
        assert_eq!(at("**/.*"), ["sub/.f.txt"]);
        assert_eq!(
            names(folder.path(), &["*.md", "sub", "*.md", "sub/c.txt"]),
            ["b.md", "sub/c.txt", "sub/deep/d.txt"]
        );
        let brackets = folder.path().join("y[1]");
        fs::create_dir(&brackets).unwrap();
        fs::write(brackets.join("g.txt"), "g").unwrap();
        assert_eq!(names(&brackets, &["*.txt"]), ["g.txt"], "a folder that looks like a glob");
    }

    #[test]
    fn what_is_not_there_is_said() {
        let folder = folder(&[("a.txt", "1")]);
        for place in ["none", "*.md", "**/*.md", "a.txt/*", "none/*"] {
            let error = find(&folder.path().join(place), &[]).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains("does not exist"), "{error}");
        }
        let error = find(folder.path(), &["a.txt", "*.md"]).unwrap_err().to_string();
        assert!(error.contains("/*.md\" does not exist"), "{error}");
        let error = find(folder.path(), &["a**"]).unwrap_err().to_string();
        assert!(error.contains("io.dataset_dir: glob ") && error.contains("recursive wildcards"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_counts_once_whatever_leads_to_it() {
        use std::os::unix::fs::symlink;
        let folder = folder(&[("a/x.txt", "1"), ("b/y.txt", "2")]);
        let root = folder.path();
        fs::hard_link(root.join("a/x.txt"), root.join("b/a.txt")).unwrap();
        symlink("../a/x.txt", root.join("b/z.txt")).unwrap();
        symlink("..", root.join("a/up")).unwrap();
        symlink(".", root.join("itself")).unwrap();
        symlink("a", root.join("c")).unwrap();
        symlink("nowhere", root.join("broken.txt")).unwrap();
        let want = ["a/x.txt", "b/y.txt"];
        for patterns in [&[][..], &["**/*.txt"], &["**/*.txt", "b/../a/x.txt", "a"], &["./b", "b/a.txt", "**"]] {
            assert_eq!(names(root, patterns), want, "{patterns:?}");
        }
        assert_eq!(names(&root.join("b/.."), &[]), want);
        assert_eq!(names(&root.join("c"), &[]), ["up/b/y.txt", "x.txt"], "links to folders are followed");
        assert_eq!(find(root, &[]).unwrap().left_out.to_string(), "; left out: 1 broken link(s)");
        let error = find(&root.join("broken.txt"), &[]).unwrap_err().to_string();
        assert!(error.contains("the link is broken"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn fifos_are_not_opened_and_names_need_not_be_text() {
        use std::os::unix::ffi::OsStrExt;
        let folder = folder(&[("a.txt", "1")]);
        let name = OsStr::from_bytes(b"\xff.txt");
        fs::write(folder.path().join(name), "2").unwrap();
        assert_eq!(names(folder.path(), &[]), ["a.txt", "\u{fffd}.txt"]);
        assert_eq!(names(folder.path(), &["*.txt"]), ["a.txt", "\u{fffd}.txt"]);
        let fifo = folder.path().join("b.txt");
        let path = std::ffi::CString::new(fifo.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a C string that lives until the call returns.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
        let found = find(folder.path(), &[]).unwrap();
        assert_eq!((found.files.len(), found.left_out.to_string().as_str()), (2, "; left out: 1 special file(s)"));
        assert_eq!(names(folder.path(), &["*.txt"]), ["a.txt", "\u{fffd}.txt"]);
        let error = find(&fifo, &[]).unwrap_err().to_string();
        assert!(error.contains("it is a FIFO, a socket or a device"), "{error}");
    }

    #[test]
    fn what_training_wrote_is_left_out() {
        let folder = folder(&[
            ("a.txt", "1"),
            ("runs/m-1/config.yaml", "2"),
            ("runs/m-1/checkpoints/1/weights", "3"),
            ("runs/notes.txt", "4"),
            ("study/study.json", "5"),
            ("study/runs/x", "6"),
            (".making-m/config.yaml", "7"),
            ("other/config.yaml", "8"),
        ]);
        let list = |place: &str, output: &str| {
            let output = folder.path().join(output);
            let found = Listing::find(&folder.path().join(place), &[], Some(&output)).unwrap();
            let names = found.files.iter().map(|file| file.name.to_str().unwrap().to_string());
            (names.collect::<Vec<_>>(), found.left_out.output_folders)
        };
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        assert_eq!(list("", "runs"), (owned(&["a.txt", "other/config.yaml"]), 2));
        assert_eq!(list("**/*", "runs"), (owned(&["a.txt", "other/config.yaml"]), 2));
        assert_eq!(list("", "none"), (owned(&["a.txt", "other/config.yaml", "runs/notes.txt"]), 2));
        assert_eq!(list("runs", "runs"), (owned(&["notes.txt"]), 1), "what is named is read");
        assert_eq!(list("runs/m-1", "runs").0, ["checkpoints/1/weights", "config.yaml"]);
    }

    #[test]
    fn paths_are_told_from_a_folder() {
        let from = |path: &str, from: &str| relative(Path::new(path), Path::new(from)).to_str().unwrap().to_string();
        assert_eq!(from("/a/b/c", "/a"), "b/c");
        assert_eq!(from("/a/b", "/a/c/d"), "../../b");
        assert_eq!(from("/a", "/a/runs/x"), "../..");
    }
}
