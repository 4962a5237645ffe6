//! Whether data are those that a run began with.
//!
//! A fingerprint covers the files' names below the data folder, their order, sizes and contents. A file of up to 256 KiB is
//! hashed whole. Of a larger one, 32 blocks of 8 KiB are, spread evenly from its first byte to its last, so that a data
//! set of any size opens in seconds; a change between those blocks at equal size goes unnoticed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::files::reader::DataFile;

/// Files of up to this many bytes are hashed whole.
const WHOLE: u64 = 256 << 10;
/// Of larger files, so many blocks of so many bytes are.
const BLOCKS: u64 = 32;
const BLOCK: u64 = WHOLE / BLOCKS;

/// Fingerprints of this rule begin with it. Those of the rule before are hashes of names and sizes alone.
const RULE: &str = "2:";

/// A message names at most this many files of a kind.
const SHOWN: usize = 5;

/// What a data set was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint {
    sum: String,
    /// The fingerprint that checkpoints of earlier versions hold.
    before: Option<String>,
    files: Vec<FileSum>,
}

/// A data file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileSum {
    /// Its path below the data folder.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// The SHA-256 sum of what is hashed of it.
    pub sha256: String,
}

/// A fingerprint of a data set's own making: any text that changes when the data do.
impl From<&str> for Fingerprint {
    fn from(sum: &str) -> Self {
        Fingerprint { sum: sum.into(), before: None, files: Vec::new() }
    }
}

impl From<String> for Fingerprint {
    fn from(sum: String) -> Self {
        Fingerprint { sum, before: None, files: Vec::new() }
    }
}

impl Fingerprint {
    /// The fingerprint of files. `before` is what earlier versions of this program recorded for them.
    pub(crate) fn new(files: Vec<FileSum>, before: String) -> Self {
        let mut hash = Sha256::new();
        for FileSum { file, bytes, sha256 } in &files {
            hash.update(format!("{file}\0{bytes}\0{sha256}\n"));
        }
        Fingerprint { sum: format!("{RULE}{}", &hex(hash)[..32]), before: Some(before), files }
    }

    /// The text that a checkpoint keeps.
    pub fn as_str(&self) -> &str {
        &self.sum
    }

    /// The files, in the order in which they are read; none if the data set does not say.
    pub fn files(&self) -> &[FileSum] {
        &self.files
    }

    /// Whether a checkpoint that keeps `saved` was trained on these data. Of a checkpoint of an earlier version, names and
    /// sizes are compared.
    pub fn is(&self, saved: &str) -> bool {
        self.sum == saved || self.before.as_deref() == Some(saved)
    }

    /// Whether `saved` is a fingerprint of contents, and not one of an earlier version or of a data set's own making.
    pub(crate) fn has_contents(saved: &str) -> bool {
        saved.starts_with(RULE)
    }

    /// Which files are not as they were in `before`, for a message.
    pub fn changes(&self, before: &[FileSum]) -> String {
        let by_name = |files: &[FileSum]| -> BTreeMap<String, FileSum> {
            files.iter().map(|file| (file.file.clone(), file.clone())).collect()
        };
        let (old, new) = (by_name(before), by_name(&self.files));
        let (mut renamed, mut missing, mut resized, mut changed) = (vec![], vec![], vec![], vec![]);
        let mut added: Vec<&FileSum> = new.values().filter(|file| !old.contains_key(&file.file)).collect();
        for was in old.values() {
            match new.get(&was.file) {
                Some(now) if now == was => {}
                Some(now) if now.bytes == was.bytes => changed.push(was.file.clone()),
                Some(now) => resized.push(format!("{} ({} bytes, now {})", was.file, was.bytes, now.bytes)),
                None => match added.iter().position(|now| now.sha256 == was.sha256 && now.bytes == was.bytes) {
                    Some(place) => renamed.push(format!("{} (now {})", was.file, added.remove(place).file)),
                    None => missing.push(was.file.clone()),
                },
            }
        }
        let added = added.into_iter().map(|file| file.file.clone()).collect();
        let kinds =
            [("changed", changed), ("resized", resized), ("renamed", renamed), ("missing", missing), ("added", added)];
        let kinds = kinds.iter().filter(|(_, names)| !names.is_empty());
        kinds.map(|(what, names)| format!("{what}: {}", list(names))).collect::<Vec<_>>().join("; ")
    }
}

fn list(names: &[String]) -> String {
    let shown = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{shown} and {} more", names.len() - SHOWN) } else { shown }
}

impl FileSum {
    /// Reads what is hashed of `data`, which is open as `file`.
    pub(crate) fn new(name: &Path, data: &DataFile, file: &File) -> Result<Self> {
        let mut hash = Sha256::new();
        let mut bytes = vec![0; WHOLE.min(data.len) as usize];
        if data.len <= WHOLE {
            data.read(file, 0, &mut bytes)?;
        } else {
            for (n, block) in (0..BLOCKS).zip(bytes.chunks_exact_mut(BLOCK as usize)) {
                // The product of a length and a block's number may not fit 64 bits.
                let start = u128::from(data.len - BLOCK) * u128::from(n) / u128::from(BLOCKS - 1);
                data.read(file, start as u64, block)?;
            }
        }
        hash.update(&bytes);
        Ok(FileSum { file: shown(name), bytes: data.len, sha256: hex(hash) })
    }
}

/// A name as text; one that is not UTF-8 is escaped.
fn shown(name: &Path) -> String {
    match name.to_str() {
        Some(name) => name.into(),
        None => name.as_os_str().as_encoded_bytes().escape_ascii().to_string(),
    }
}

pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> FileSum {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let data = DataFile::new(file.path()).unwrap();
        FileSum::new(Path::new("a"), &data, &data.open().unwrap()).unwrap()
    }

    #[test]
    fn small_files_are_hashed_whole_and_large_ones_from_end_to_end() {
        assert_eq!(sum(b"abc").sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let whole = vec![7; WHOLE as usize];
        let large = vec![7; 3 * WHOLE as usize + 5];
        for bytes in [whole, large] {
            let before = sum(&bytes);
            for place in [0, bytes.len() - 1] {
                let mut changed = bytes.clone();
                changed[place] = 8;
                assert_ne!(sum(&changed), before, "byte {place} of {}", bytes.len());
            }
        }
    }

    #[test]
    fn what_changed_is_listed() {
        let file = |file: &str, bytes, sha256: &str| FileSum { file: file.into(), bytes, sha256: sha256.into() };
        let before =
            [file("a/x", 1, "s1"), file("b", 2, "s2"), file("c", 3, "s3"), file("d", 4, "s4"), file("e", 5, "s5")];
        let now =
            vec![file("b", 2, "s3"), file("c", 30, "s3"), file("e", 5, "s5"), file("f", 6, "s6"), file("z/x", 1, "s1")];
        let now = Fingerprint::new(now, "old".into());
        let want = "changed: b; resized: c (3 bytes, now 30); renamed: a/x (now z/x); missing: d; added: f";
        assert_eq!(now.changes(&before), want);
        let many: Vec<FileSum> = (0..8).map(|n| file(&format!("{n}"), 1, &format!("t{n}"))).collect();
        assert_eq!(Fingerprint::new(many, "".into()).changes(&[]), "added: 0, 1, 2, 3, 4 and 3 more");
    }

    #[test]
    fn a_checkpoint_of_an_earlier_version_is_compared_by_its_rule() {
        let now = Fingerprint::new(vec![sum(b"abc")], "0123".into());
        assert!(now.is("0123") && now.is(now.as_str()) && !now.is("0124"));
        assert!(now.as_str().starts_with("2:"));
        let own = Fingerprint::from("sums 1");
        assert!(own.is("sums 1") && !own.is("sums 2") && !own.is(""));
    }
}
