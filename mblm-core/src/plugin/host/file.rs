//! A plugin's file before it is opened: read once, so that the sum that is recorded is that of the code that runs.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::ownership;

/// A larger file is refused rather than read.
const MAX_BYTES: u64 = 1 << 30;

/// A library that was read and not opened. No code of it has run.
pub struct LibraryFile {
    /// Where it lies, symbolic links resolved.
    pub path: PathBuf,
    /// The SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    bytes: Vec<u8>,
}

impl LibraryFile {
    /// Reads a file that nobody but the user and root can change.
    ///
    /// # Errors
    /// Why it is not to be opened.
    pub fn read(path: &Path) -> Result<Self, String> {
        let path = path.canonicalize().map_err(|error| error.to_string())?;
        let about = path.metadata().map_err(|error| error.to_string())?;
        if !about.is_file() {
            return Err("not a regular file".into());
        }
        if about.len() > MAX_BYTES {
            return Err(format!("has {} bytes, expected at most {MAX_BYTES}", about.len()));
        }
        ownership::check(&path).map_err(|fault| format!("refused, since {fault}"))?;
        let mut bytes = vec![];
        let read = File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes));
        read.map_err(|error| error.to_string())?;
        let sha256 = Sha256::digest(&bytes).iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // writing to a string cannot fail
            text
        });
        Ok(LibraryFile { path, sha256, bytes })
    }

    /// What to give to the dynamic loader: a private copy of the bytes, so that a build that writes over the file does not
    /// change the code of a running program. A library that asks for companions relative to its own folder (`$ORIGIN`) is
    /// opened where it lies, and so is every library on a system without anonymous files.
    pub(super) fn loadable(&self) -> PathBuf {
        let has = |text: &[u8]| self.bytes.windows(text.len()).any(|window| window == text);
        if has(b"$ORIGIN") || has(b"${ORIGIN}") {
            return self.path.clone();
        }
        private_copy(&self.path, &self.bytes).unwrap_or_else(|| self.path.clone())
    }
}

/// Writes the bytes to an anonymous file, which stays open: the loader and backtraces know the library by this name.
#[cfg(target_os = "linux")]
fn private_copy(path: &Path, bytes: &[u8]) -> Option<PathBuf> {
    use std::io::Write;
    use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
    use std::os::unix::ffi::OsStrExt;

    let name = std::ffi::CString::new(path.file_name()?.as_bytes()).ok()?;
    // SAFETY: a text that ends with NUL; the result is checked.
    let descriptor = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return None;
    }
    // SAFETY: just made, and owned by nobody else.
    let mut copy = unsafe { File::from_raw_fd(descriptor) };
    copy.write_all(bytes).ok()?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", copy.as_raw_fd()));
    // Without /proc the copy has no name, and is closed.
    name.exists().then(|| {
        let _ = copy.into_raw_fd();
        name
    })
}

#[cfg(not(target_os = "linux"))]
fn private_copy(_: &Path, _: &[u8]) -> Option<PathBuf> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_copied_unless_it_has_companions() {
        let folder = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = folder.path().join("a.so");
            std::fs::write(&path, text).unwrap();
            LibraryFile::read(&path).unwrap()
        };
        let alone = file("code");
        assert_eq!(alone.sha256, "5694d08a2e53ffcae0c3103e5ad6f6076abd960eb1f8a56577040bc1028f702b");
        let copy = alone.loadable();
        assert_eq!(copy != alone.path, cfg!(target_os = "linux"));
        let with_companions = file("run path $ORIGIN/lib");
        assert_eq!(with_companions.loadable(), with_companions.path);
        if cfg!(target_os = "linux") {
            assert_eq!(std::fs::read(copy).unwrap(), b"code", "what is written to the file later does not matter");
        }
    }

    #[cfg(unix)]
    #[test]
    fn only_a_regular_file_is_read() {
        assert_eq!(LibraryFile::read(Path::new("/dev/zero")).err().unwrap(), "not a regular file");
    }
}
