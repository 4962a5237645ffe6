//! The size and SHA-256 of a file, taken while its bytes go by.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use mblm_base::files;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a manifest says of a file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FileSum {
    pub bytes: u64,
    pub sha256: String,
}

impl FileSum {
    pub fn of(bytes: &[u8]) -> Self {
        let mut summed = Summed { to: io::sink(), bytes: 0, hash: Sha256::new() };
        summed.take(bytes);
        summed.finish()
    }

    /// Reads a file to its end, of at most `most` bytes, without holding it in memory.
    pub fn of_file(path: &Path, most: u64) -> io::Result<Self> {
        let mut summed = Summed { to: io::sink(), bytes: 0, hash: Sha256::new() };
        io::copy(&mut files::open(path, most)?, &mut summed)?;
        Ok(summed.finish())
    }

    /// Writes a file, which must not exist yet, and syncs it.
    pub fn of_new_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<Self> {
        let file = BufWriter::new(File::create_new(path)?);
        let mut summed = Summed { to: file, bytes: 0, hash: Sha256::new() };
        write(&mut summed)?;
        summed.flush()?;
        summed.to.get_ref().sync_all()?;
        Ok(summed.finish())
    }
}

/// Passes bytes on and sums them.
struct Summed<W> {
    to: W,
    bytes: u64,
    hash: Sha256,
}

impl<W> Summed<W> {
    fn take(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn finish(self) -> FileSum {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        FileSum { bytes: self.bytes, sha256 }
    }
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.take(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_the_same_on_each_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; // FIPS 180-2, B.1
        let written = FileSum::of_new_file(&path, |file| file.write_all(b"a").and_then(|()| file.write_all(b"bc")));
        let written = written.unwrap();
        assert_eq!((written.bytes, &written.sha256[..]), (3, want));
        assert_eq!(FileSum::of(b"abc"), written);
        assert_eq!(FileSum::of_file(&path, 3).unwrap(), written);
        FileSum::of_file(&path, 2).unwrap_err();
        assert_eq!(FileSum::of_new_file(&path, |_| Ok(())).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
