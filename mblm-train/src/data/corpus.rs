//! Files as one run of bytes: found by path or glob, memory-mapped, read across their borders, never loaded whole.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::{AtPath, Error, Result};

/// What one thread counts at a time.
const CHUNK: usize = 1 << 22;

/// The bytes of several files, one after the other, in the order of their paths.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<MappedFile>,
    len: u64,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    start: u64,
    bytes: Mmap,
}

impl Corpus {
    /// Maps what `place` names: a file, a folder (all files below it but the hidden ones) or a glob; with `globs`,
    /// these, below `place`. Empty files do no harm.
    ///
    /// # Errors
    /// Nothing is there, or it cannot be read.
    pub fn open(place: &str, globs: &[String]) -> Result<Self> {
        let mut paths = Vec::new();
        if globs.is_empty() {
            find(place, &mut paths)?;
        }
        for glob in globs {
            let below = Path::new(place).join(glob);
            let below = below.to_str().ok_or_else(|| Error::Config(format!("{place:?} is not valid UTF-8")))?;
            find(below, &mut paths)?;
        }
        Self::map(paths)
    }

    /// Maps the files below `folder` whose names end in `.extension`, without the hidden ones; maybe none.
    ///
    /// # Errors
    /// The folder cannot be read, or a file in it.
    pub fn open_folder(folder: &Path, extension: &str) -> Result<Self> {
        let mut paths = Vec::new();
        walk(folder, &mut paths)?;
        paths.retain(|path| path.extension().is_some_and(|found| found == extension));
        Self::map(paths)
    }

    fn map(mut paths: Vec<PathBuf>) -> Result<Self> {
        paths.sort();
        paths.dedup();
        let mut files = Vec::with_capacity(paths.len());
        let mut len = 0;
        for path in paths {
            let unreadable = |error| Error::Config(format!("io.dataset_dir: cannot read {}: {error}", path.display()));
            let file = File::open(&path).map_err(unreadable)?;
            if file.metadata().map_err(unreadable)?.len() == 0 {
                continue;
            }
            // SAFETY: the map is only read. Whoever truncates the file meanwhile ends the program by a signal, as for
            // every memory-mapped file; the documentation of the data set says so.
            let bytes = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
            len += bytes.len() as u64;
            files.push(MappedFile { path, start: len - bytes.len() as u64, bytes });
        }
        Ok(Corpus { files, len })
    }

    /// The number of bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True without any byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of files that hold bytes.
    pub fn num_files(&self) -> usize {
        self.files.len()
    }

    /// The files that hold bytes, each with the place of its first byte.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|file| (file.path.as_path(), file.start))
    }

    /// The files' parts of `start..end`, in order.
    fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = (&MappedFile, &[u8])> {
        let first = self.files.partition_point(|file| file.start + file.bytes.len() as u64 <= start);
        self.files[first..].iter().take_while(move |file| file.start < end).map(move |file| {
            let from = start.saturating_sub(file.start) as usize;
            let to = (end - file.start).min(file.bytes.len() as u64) as usize;
            (file, &file.bytes[from..to])
        })
    }

    /// Reads the bytes from `start` on into `ids`. Panics if there are not enough.
    pub fn read(&self, start: u64, ids: &mut [u32]) {
        assert!(start + ids.len() as u64 <= self.len, "{} bytes at {start} of {}", ids.len(), self.len);
        let mut rest = &mut *ids;
        for (_, part) in self.parts(start, start + rest.len() as u64) {
            let (now, later) = rest.split_at_mut(part.len());
            now.iter_mut().zip(part).for_each(|(id, &byte)| *id = byte as u32);
            rest = later;
        }
    }

    /// How often each value occurs in `start..end`.
    pub fn byte_counts(&self, start: u64, end: u64) -> [u64; 256] {
        let mut counts = [0; 256];
        for (_, part) in self.parts(start, end) {
            let partial: Vec<[u64; 256]> = part.par_chunks(CHUNK).map(count).collect();
            partial.iter().for_each(|more| counts.iter_mut().zip(more).for_each(|(sum, n)| *sum += n));
        }
        counts
    }

    /// The first byte that is `limit` or more, with its file and its place in it.
    pub fn first_at_least(&self, limit: usize) -> Option<(u8, &Path, usize)> {
        self.files.iter().find_map(|file| {
            let place = file.bytes.par_chunks(CHUNK).enumerate().find_map_first(|(i, chunk)| {
                chunk.iter().position(|&byte| byte as usize >= limit).map(|at| i * CHUNK + at)
            })?;
            Some((file.bytes[place], file.path.as_path(), place))
        })
    }

    /// A hash of the files' names and sizes.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(file.path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update([0]);
            hash.update((file.bytes.len() as u64).to_le_bytes());
        }
        hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

fn count(chunk: &[u8]) -> [u64; 256] {
    // Four tables: equal neighbours, frequent in text, do not wait for each other.
    let mut tables = [[0u64; 256]; 4];
    let (groups, rest) = chunk.as_chunks::<4>();
    for group in groups {
        for (table, &byte) in tables.iter_mut().zip(group) {
            table[byte as usize] += 1;
        }
    }
    rest.iter().for_each(|&byte| tables[0][byte as usize] += 1);
    std::array::from_fn(|byte| tables.iter().map(|table| table[byte]).sum())
}

/// Adds the files that `place` names to `paths`.
fn find(place: &str, paths: &mut Vec<PathBuf>) -> Result<()> {
    let path = Path::new(place);
    if path.is_dir() {
        return walk(path, paths);
    }
    if path.is_file() {
        paths.push(path.into());
        return Ok(());
    }
    let bad_glob = |error: &dyn std::fmt::Display| Error::Config(format!("io.dataset_dir: glob {place:?}: {error}"));
    let before = paths.len();
    if place.contains(['*', '?', '[']) {
        for found in glob::glob(place).map_err(|error| bad_glob(&error))? {
            let found = found.map_err(|error| bad_glob(&error))?;
            if found.is_file() {
                paths.push(found);
            }
        }
    }
    if paths.len() == before {
        return Err(Error::Config(format!(
            "io.dataset_dir: {place:?} names nothing; expected a file, a folder or a glob that matches files (relative \
             paths start at the current directory)"
        )));
    }
    Ok(())
}

/// Adds every file below `folder`. Hidden ones are skipped, and links to folders, which could lead back.
fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if entry.file_type().at(&path)?.is_dir() {
            walk(&path, paths)?;
        } else if path.is_file() {
            paths.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        folder
    }

    fn all(corpus: &Corpus) -> Vec<u8> {
        let mut ids = vec![0; corpus.len() as usize];
        corpus.read(0, &mut ids);
        ids.into_iter().map(|id| id as u8).collect()
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_paths_without_hidden_files() {
        let folder = folder(&[
            ("b.txt", b"BB"),
            ("a/z.txt", b"az"),
            ("a/b.txt", b"ab"),
            (".hidden", b"no"),
            (".git/x", b"no"),
            ("empty", b""),
        ]);
        let corpus = Corpus::open(folder.path().to_str().unwrap(), &[]).unwrap();
        assert_eq!((all(&corpus), corpus.num_files()), (b"abazBB".to_vec(), 3));
    }

    #[test]
    fn globs_and_single_files_are_read() {
        let folder = folder(&[("a.txt", b"1"), ("b.md", b"2"), ("sub/c.txt", b"3"), ("x[1].txt", b"4")]);
        let place = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
        assert_eq!(all(&Corpus::open(&place("*.md"), &[]).unwrap()), b"2");
        assert_eq!(all(&Corpus::open(&place("**/*.txt"), &[]).unwrap()), b"134");
        assert_eq!(all(&Corpus::open(&place("x[1].txt"), &[]).unwrap()), b"4", "a name that looks like a glob");
        let globs = ["*.md".to_string(), "sub".to_string(), "*.md".to_string()];
        assert_eq!(all(&Corpus::open(&place(""), &globs).unwrap()), b"23");
    }

    #[test]
    fn what_is_not_there_is_said() {
        for place in ["/nowhere/at/all", "/nowhere/*.txt"] {
            let error = Corpus::open(place, &[]).unwrap_err();
            assert!(error.is_configuration() && error.to_string().contains(place), "{error}");
        }
    }

    #[test]
    fn reading_crosses_the_borders_of_files() {
        let folder = folder(&[("a", b"012"), ("b", b"3"), ("c", b"456789")]);
        let corpus = Corpus::open(folder.path().to_str().unwrap(), &[]).unwrap();
        for start in 0..10u64 {
            for len in 0..=10 - start {
                let mut ids = vec![0; len as usize];
                corpus.read(start, &mut ids);
                let want: Vec<u32> = (start..start + len).map(|i| b'0' as u32 + i as u32).collect();
                assert_eq!(ids, want);
            }
        }
    }

    #[test]
    fn bytes_are_counted_within_the_range() {
        let folder = folder(&[("a", b"aab"), ("b", b"bcc\xff")]);
        let corpus = Corpus::open(folder.path().to_str().unwrap(), &[]).unwrap();
        let counts = corpus.byte_counts(1, 6);
        assert_eq!((counts[b'a' as usize], counts[b'b' as usize], counts[b'c' as usize]), (1, 2, 2));
        assert_eq!(counts.iter().sum::<u64>(), 5);
        let (byte, path, place) = corpus.first_at_least(128).unwrap();
        assert_eq!((byte, path.file_name().unwrap().to_str(), place), (255, Some("b"), 3));
        assert!(corpus.first_at_least(256).is_none());
    }

    #[test]
    fn the_fingerprint_changes_with_a_size() {
        let fingerprint =
            |files: &[(&str, &[u8])]| Corpus::open(folder(files).path().to_str().unwrap(), &[]).unwrap().fingerprint();
        assert_eq!(fingerprint(&[("a", b"1"), ("b", b"2")]), fingerprint(&[("a", b"1"), ("b", b"2")]));
        assert_ne!(fingerprint(&[("a", b"1"), ("b", b"2")]), fingerprint(&[("a", b"12"), ("b", b"2")]));
    }
}
