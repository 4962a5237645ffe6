//! Files as one run of bytes: found by path or glob, read across their borders, never loaded whole.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::files::fingerprint::{FileSum, Fingerprint, hex};
use crate::files::listing::{LeftOut, Listing};
use crate::files::reader::{DataFile, OpenFiles};

/// The bytes that a thread reads at a time when all of the data are scanned.
const CHUNK: u64 = 1 << 20;

/// The bytes of several files, one after the other, in the order of their names.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<PlacedFile>,
    open: OpenFiles,
    len: u64,
    left_out: LeftOut,
}

#[derive(Debug)]
struct PlacedFile {
    /// Where its first byte stands among those of all files.
    start: u64,
    /// Its path below the data folder.
    name: PathBuf,
    data: DataFile,
}

/// Bytes of one file.
#[derive(Clone, Copy, Debug)]
struct Part {
    file: usize,
    /// The offset of its first byte in the file.
    start: u64,
    len: u64,
}

impl Corpus {
    /// The files that `place` names: a file, a folder or a glob; with `globs`, the files that these name below `place`.
    ///
    /// # Errors
    /// Nothing is there, or it cannot be read.
    pub fn open(place: impl AsRef<Path>, globs: &[String]) -> Result<Self> {
        Ok(Self::new(Listing::find(place.as_ref(), globs, None)?))
    }

    pub(crate) fn new(Listing { files, left_out }: Listing) -> Self {
        let mut len = 0;
        let placed = files.into_iter().map(|file| {
            len += file.data.len;
            PlacedFile { start: len - file.data.len, name: file.name, data: file.data }
        });
        Corpus { files: placed.collect(), open: OpenFiles::default(), len, left_out }
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

    /// What was met and is not read; shown, nothing or `; left out: …`.
    pub fn left_out(&self) -> LeftOut {
        self.left_out
    }

    /// The files that hold bytes, each with the place of its first byte.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|file| (file.data.path.as_path(), file.start))
    }

    /// The files' parts of `start..end`, in order.
    fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = Part> {
        let first = self.files.partition_point(|file| file.start + file.data.len <= start);
        self.files.iter().enumerate().skip(first).take_while(move |(_, file)| file.start < end).map(
            move |(number, file)| {
                let from = start.saturating_sub(file.start);
                Part { file: number, start: from, len: (end - file.start).min(file.data.len) - from }
            },
        )
    }

    fn read_part(&self, part: Part, bytes: &mut [u8]) -> Result<()> {
        let data = &self.files[part.file].data;
        data.read(&*self.open.get(part.file, data)?, part.start, bytes)
    }

    /// Reads the bytes from `start` on into `ids`. Panics if there are not enough.
    ///
    /// # Errors
    /// A file cannot be read, or is shorter than it was.
    pub fn read(&self, start: u64, ids: &mut [u32]) -> Result<()> {
        assert!(start + ids.len() as u64 <= self.len, "{} bytes at {start} of {}", ids.len(), self.len);
        let mut bytes = vec![0; ids.len()];
        let mut rest = &mut bytes[..];
        for part in self.parts(start, start + ids.len() as u64) {
            let (now, later) = rest.split_at_mut(part.len as usize);
            self.read_part(part, now)?;
            rest = later;
        }
        ids.iter_mut().zip(bytes).for_each(|(id, byte)| *id = byte.into());
        Ok(())
    }

    /// Reads `start..end` chunk by chunk on all threads. `look` gets each chunk and where it stands; its results come in
    /// any order.
    fn scan<T: Send>(
        &self,
        start: u64,
        end: u64,
        look: impl Fn(Part, &[u8]) -> T + Send + Sync,
    ) -> impl ParallelIterator<Item = Result<T>> {
        let parts: Vec<Part> = self.parts(start, end).collect();
        parts
            .into_par_iter()
            .flat_map(|part| (0..part.len.div_ceil(CHUNK)).into_par_iter().map(move |n| (part, n)))
            .map(move |(part, n)| {
                let chunk = Part { start: part.start + n * CHUNK, len: CHUNK.min(part.len - n * CHUNK), ..part };
                let mut bytes = vec![0; chunk.len as usize];
                let data = &self.files[chunk.file].data;
                data.read(&data.open()?, chunk.start, &mut bytes)?;
                Ok(look(chunk, &bytes))
            })
    }

    /// How often each value occurs in `start..end`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn byte_counts(&self, start: u64, end: u64) -> Result<[u64; 256]> {
        let sum = |a: [u64; 256], b: [u64; 256]| Ok(std::array::from_fn(|byte| a[byte] + b[byte]));
        self.scan(start, end, |_, bytes| count(bytes)).try_reduce(|| [0; 256], sum)
    }

    /// The first byte that is `limit` or more, with its file and its place in it.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn first_at_least(&self, limit: usize) -> Result<Option<(u8, &Path, u64)>> {
        let in_chunk = |chunk: Part, bytes: &[u8]| {
            let at = bytes.iter().position(|&byte| byte as usize >= limit)?;
            Some((bytes[at], self.files[chunk.file].data.path.as_path(), chunk.start + at as u64))
        };
        self.scan(0, self.len, in_chunk).find_map_first(Result::transpose).transpose()
    }

    /// Identifies its contents.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        Ok(Fingerprint::new(self.sums("")?, self.names_and_sizes()))
    }

    /// The files with their sums, whose names begin with `folder`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub(crate) fn sums(&self, folder: &str) -> Result<Vec<FileSum>> {
        let sum = |PlacedFile { name, data, .. }: &PlacedFile| {
            FileSum::new(&Path::new(folder).join(name), data, &data.open()?)
        };
        self.files.par_iter().map(sum).collect()
    }

    /// A hash of the files' names and sizes, which was the fingerprint in earlier versions.
    pub(crate) fn names_and_sizes(&self) -> String {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update(file.data.path.file_name().unwrap_or_default().as_encoded_bytes());
            hash.update([0]);
            hash.update(file.data.len.to_le_bytes());
        }
        hex(hash)[..32].into()
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

#[cfg(test)]
mod tests {
    use std::fs;

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

    #[test]
    fn reading_crosses_the_borders_of_files() {
        let folder = folder(&[("a", b"012"), ("b", b"3"), ("c", b"456789")]);
        let corpus = Corpus::open(folder.path(), &[]).unwrap();
        for start in 0..10u64 {
            for len in 0..=10 - start {
                let mut ids = vec![0; len as usize];
                corpus.read(start, &mut ids).unwrap();
                let want: Vec<u32> = (start..start + len).map(|i| b'0' as u32 + i as u32).collect();
                assert_eq!(ids, want);
            }
        }
    }

    #[test]
    fn bytes_are_counted_within_the_range() {
        let folder = folder(&[("a", b"aab"), ("b", b"bcc\xff")]);
        let corpus = Corpus::open(folder.path(), &[]).unwrap();
        let counts = corpus.byte_counts(1, 6).unwrap();
        assert_eq!((counts[b'a' as usize], counts[b'b' as usize], counts[b'c' as usize]), (1, 2, 2));
        assert_eq!(counts.iter().sum::<u64>(), 5);
        let (byte, path, place) = corpus.first_at_least(128).unwrap().unwrap();
        assert_eq!((byte, path.file_name().unwrap().to_str(), place), (255, Some("b"), 3));
        assert!(corpus.first_at_least(256).unwrap().is_none());
    }

    #[test]
    fn data_that_shrink_are_an_error_of_every_reader() {
        let folder = folder(&[("a", b"0123"), ("b", &[b'x'; 3 << 20])]);
        let corpus = Corpus::open(folder.path(), &[]).unwrap();
        corpus.read(0, &mut [0; 10]).unwrap();
        fs::write(folder.path().join("b"), "x").unwrap();
        let errors = [
            corpus.read(0, &mut [0; 10]).unwrap_err(),
            corpus.byte_counts(0, corpus.len()).unwrap_err(),
            corpus.first_at_least(256).unwrap_err(),
            corpus.sums("").unwrap_err(),
        ];
        for error in errors.map(|error| error.to_string()) {
            assert!(
                error.contains("/b: this data file was 3145728 bytes long when it was opened and is 1 "),
                "{error}"
            );
        }
        corpus.read(0, &mut [0; 4]).unwrap();
    }

    #[test]
    fn scans_see_every_byte_once() {
        let mut bytes = vec![b'x'; (2 * CHUNK + 7) as usize];
        bytes[CHUNK as usize] = 200;
        bytes[CHUNK as usize + 9] = 201;
        let folder = folder(&[("a", b"ab"), ("b", &bytes)]);
        let corpus = Corpus::open(folder.path(), &[]).unwrap();
        let counts = corpus.byte_counts(1, corpus.len() - 1).unwrap();
        assert_eq!((counts[b'a' as usize], counts[b'b' as usize], counts[200]), (0, 1, 1));
        assert_eq!(counts.iter().sum::<u64>(), corpus.len() - 2);
        let (byte, path, place) = corpus.first_at_least(128).unwrap().unwrap();
        assert_eq!((byte, path.file_name().unwrap().to_str(), place), (200, Some("b"), CHUNK));
    }

    #[test]
    fn earlier_versions_knew_names_and_sizes() {
        let folder = folder(&[("sub/a", b"012"), ("sub/b", b"34567")]);
        let corpus = Corpus::open(folder.path(), &[]).unwrap();
        assert_eq!(corpus.names_and_sizes(), "33d17b8fa8e63966e30b92c5afc6821e");
        let names: Vec<String> = corpus.sums("train").unwrap().into_iter().map(|sum| sum.file).collect();
        assert_eq!(names, ["train/sub/a", "train/sub/b"]);
    }
}
