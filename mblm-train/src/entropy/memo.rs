//! Where the patches of sequences end by the rule `entropy`, remembered from one epoch and one run to the next: an entry for
//! every sequence, in memory and in a file of the small model's run.
//!
//! An entry is found by the beginning of its sequence: by as many ids as the largest power of two that is not above its length.
//! So a sequence is found at the start of longer ones, in a time that does not depend on how many sequences begin alike.
//!
//! The file is a row of records, each written at once and so by several processes side by side:
//! `length (u32), beginning (u64), all (u128), ceil(length / 8) bytes of bits, CRC-32C (u32)`, all little-endian. `beginning` and
//! `all` are the first bytes of the SHA-256 of the beginning and of all ids, each id as a u32.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use sha2::{Digest, Sha256};

use super::Criterion;
use super::small::Small;
use crate::checkpoint;
use crate::journal::crc32c::crc32c;

/// No more than this is kept in memory and in the file: the sequences of about five times as many bytes.
const MOST_BYTES: u64 = 1 << 30;
/// Changes when anything does on which the ends depend, or the form of the file.
const VERSION: &str = "mblm patches 2";

static MEMOS: Mutex<Vec<&'static Memo>> = Mutex::new(Vec::new());

/// What is remembered of one rule.
pub(super) struct Memo {
    sum: String,
    cut: Criterion,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// The lengths of the sequences with a beginning.
    lens: HashMap<u64, BTreeSet<u32>>,
    /// By all ids.
    entries: HashMap<u128, Box<[u8]>>,
    bytes: u64,
    file: Option<File>,
}

/// One sequence.
struct Entry {
    len: u32,
    beginning: u64,
    all: u128,
    bits: Box<[u8]>,
}

impl std::fmt::Debug for Memo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memo({} {:?})", self.sum, self.cut)
    }
}

impl Memo {
    /// That of `small` and `cut`: one per process.
    pub(super) fn of(small: &Small, cut: Criterion) -> &'static Self {
        let mut memos = MEMOS.lock().unwrap_or_else(|poison| poison.into_inner());
        if let Some(memo) = memos.iter().find(|memo| memo.sum == small.sum() && memo.cut == cut) {
            return memo;
        }
        let path = folder(small.checkpoint()).map(|folder| folder.join(file_name(small, cut)));
        let kept = path.map_or_else(Kept::default, |path| Kept::open(&path));
        let memo: &'static Memo = Box::leak(Box::new(Memo { sum: small.sum().into(), cut, kept: Mutex::new(kept) }));
        memos.push(memo);
        memo
    }

    /// Whether a patch ends after each of the first of `ids`: of as many as the longest sequence has that they begin with.
    pub(super) fn find(&self, ids: &[u32]) -> Option<Vec<bool>> {
        let kept = self.lock();
        let powers = (0..usize::BITS).map(|n| 1usize << n).take_while(|len| *len <= ids.len());
        powers.collect::<Vec<_>>().into_iter().rev().find_map(|len| {
            let lens = kept.lens.get(&start(&ids[..len]))?;
            let found = |&len: &u32| Some((len, kept.entries.get(&all(ids.get(..len as usize)?))?));
            let (len, bits) = lens.iter().rev().find_map(found)?;
            Some((0..len as usize).map(|i| bits[i / 8] >> (i % 8) & 1 == 1).collect())
        })
    }

    /// Remembers where the patches of a sequence end.
    pub(super) fn keep(&self, ids: &[u32], ends: &[bool]) {
        if ids.is_empty() {
            return;
        }
        let mut bits = vec![0; ids.len().div_ceil(8)];
        ends.iter().enumerate().filter(|(_, ends)| **ends).for_each(|(i, _)| bits[i / 8] |= 1 << (i % 8));
        let beginning = start(&ids[..1 << ids.len().ilog2()]);
        self.lock().keep(Entry { len: ids.len() as u32, beginning, all: all(ids), bits: bits.into() });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

impl Kept {
    /// Reads the file at `path` and goes on with it. Nothing is lost with it but time: without a file, or if it is damaged, all
    /// is computed again.
    fn open(path: &Path) -> Self {
        let mut kept = Kept::default();
        if let Ok(bytes) = fs::read(path) {
            let mut rest = &bytes[..];
            while let Some((entry, after)) = Entry::read(rest) {
                kept.insert(entry);
                rest = after;
            }
            if !rest.is_empty() {
                let _ = replace(path, &bytes[..bytes.len() - rest.len()]);
            }
        }
        let create = || {
            path.parent().map(fs::create_dir_all).transpose()?;
            OpenOptions::new().create(true).append(true).open(path)
        };
        kept.file = create().ok();
        kept
    }

    fn keep(&mut self, entry: Entry) {
        if self.bytes >= MOST_BYTES || self.entries.contains_key(&entry.all) {
            return;
        }
        let written = self.file.as_mut().map(|file| file.write_all(&entry.record()));
        if written.is_some_and(|written| written.is_err()) {
            self.file = None;
        }
        self.insert(entry);
    }

    fn insert(&mut self, entry: Entry) {
        self.bytes += (entry.bits.len() + size_of::<Entry>()) as u64;
        self.lens.entry(entry.beginning).or_default().insert(entry.len);
        self.entries.insert(entry.all, entry.bits);
    }
}

/// Puts a file with `bytes` in the place of a damaged one, to which another process may still write.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut whole = tempfile::NamedTempFile::new_in(folder)?;
    whole.write_all(bytes)?;
    whole.persist(path)?;
    Ok(())
}

impl Entry {
    fn record(&self) -> Vec<u8> {
        let (len, beginning, all) = (self.len.to_le_bytes(), self.beginning.to_le_bytes(), self.all.to_le_bytes());
        let mut record = [&len[..], &beginning, &all, &self.bits].concat();
        let sum = crc32c(&record);
        record.extend_from_slice(&sum.to_le_bytes());
        record
    }

    /// The record at the start of `bytes`, and what follows it; none if it is damaged or cut off.
    fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (beginning, rest) = rest.split_first_chunk()?;
        let (all, rest) = rest.split_first_chunk()?;
        let len = u32::from_le_bytes(*len);
        let (bits, rest) = rest.split_at_checked(len.div_ceil(8) as usize)?;
        let (sum, rest) = rest.split_first_chunk()?;
        let body = &bytes[..bytes.len() - rest.len() - sum.len()];
        let (beginning, all) = (u64::from_le_bytes(*beginning), u128::from_le_bytes(*all));
        let entry = Entry { len, beginning, all, bits: bits.into() };
        (u32::from_le_bytes(*sum) == crc32c(body)).then_some((entry, rest))
    }
}

/// The folder of a checkpoint's run for what is remembered; none for a checkpoint that lies elsewhere.
fn folder(checkpoint: &Path) -> Option<PathBuf> {
    let checkpoints = checkpoint.parent()?;
    (checkpoints.file_name()? == checkpoint::FOLDER).then(|| checkpoints.with_file_name("patches"))
}

fn file_name(small: &Small, cut: Criterion) -> String {
    let rule = format!("{VERSION} {} {cut:?}", small.sum());
    format!("{:016x}.ends", u64::from_le_bytes(first_of(&Sha256::digest(rule))))
}

/// Of the ids of a beginning.
fn start(ids: &[u32]) -> u64 {
    u64::from_le_bytes(first_of(&hash(ids)))
}

/// Of the ids of a whole sequence.
fn all(ids: &[u32]) -> u128 {
    u128::from_le_bytes(first_of(&hash(ids)))
}

fn hash(ids: &[u32]) -> impl AsRef<[u8]> + use<> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Sha256::digest(bytes)
}

fn first_of<const N: usize>(hash: &impl AsRef<[u8]>) -> [u8; N] {
    let mut first = [0; N];
    first.copy_from_slice(&hash.as_ref()[..N]);
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(seed: u32, len: u32) -> Vec<u32> {
        (0..len).map(|i| (i * i + seed) % 251).collect()
    }

    fn memo(path: &Path) -> Memo {
        Memo { sum: String::new(), cut: Criterion::Above(1.0), kept: Mutex::new(Kept::open(path)) }
    }

    fn ends(ids: &[u32]) -> Vec<bool> {
        ids.iter().map(|id| id % 3 == 0).collect()
    }

    #[test]
    fn what_was_kept_is_found_at_the_start_of_longer_sequences_and_by_another_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("patches/x.ends");
        let (one, two) = (memo(&path), memo(&path));
        let (a, b) = (sequence(1, 200), sequence(2, 90));
        one.keep(&a[..150], &ends(&a[..150]));
        two.keep(&b, &ends(&b));
        assert_eq!(one.find(&a), Some(ends(&a[..150])));
        assert_eq!(one.find(&a[..149]), None, "not known by its beginning alone");
        assert_eq!(one.find(&b), None);
        let later = memo(&path);
        assert_eq!((later.find(&a), later.find(&b)), (Some(ends(&a[..150])), Some(ends(&b))));
        // Sequences with the same beginning.
        let mut other = a.clone();
        other[100] += 1;
        assert_eq!(later.find(&other), None);
        later.keep(&other, &ends(&other));
        assert_eq!((later.find(&other), later.find(&a)), (Some(ends(&other)), Some(ends(&a[..150]))));
    }

    #[test]
    fn sequences_of_any_length_are_found_and_the_longest_first() {
        let folder = tempfile::tempdir().unwrap();
        let memo = memo(&folder.path().join("x.ends"));
        let zeros = vec![0; 300];
        for len in [1, 5, 7, 100, 120] {
            memo.keep(&zeros[..len], &ends(&zeros[..len]));
            assert_eq!(memo.find(&zeros), Some(ends(&zeros[..len])), "{len}");
        }
        assert_eq!(memo.find(&zeros[..119]), Some(ends(&zeros[..100])));
        assert_eq!(memo.find(&zeros[..4]), Some(ends(&zeros[..1])));
        assert_eq!((memo.find(&[1, 0, 0]), memo.find(&[])), (None, None));
    }

    #[test]
    fn of_a_damaged_file_what_is_whole_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.ends");
        let (a, b) = (sequence(1, 80), sequence(2, 80));
        memo(&path).keep(&a, &ends(&a));
        let whole = fs::read(&path).unwrap();
        memo(&path).keep(&b, &ends(&b));
        let both = fs::read(&path).unwrap();
        fs::write(&path, &both[..both.len() - 7]).unwrap();
        for _ in 0..2 {
            assert_eq!((memo(&path).find(&a), memo(&path).find(&b)), (Some(ends(&a)), None));
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        memo(&path).keep(&b, &ends(&b));
        assert_eq!(fs::read(&path).unwrap(), both);
        fs::write(&path, [&whole[..9], b"x", &whole[10..]].concat()).unwrap();
        assert_eq!(memo(&path).find(&a), None);
    }
}
