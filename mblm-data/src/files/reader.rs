//! Data files are read by position. A file that shrinks under a running program is then an error that names it; a
//! memory map would end the program with SIGBUS.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use mblm_base::files;

use crate::error::{Error, Result};

/// A data set keeps at most this many files open. A data set of many thousand files stays below every usual limit.
const MAX_OPEN: usize = 64;

/// A data file and its length when the data set was opened.
#[derive(Clone, Debug)]
pub(crate) struct DataFile {
    pub path: PathBuf,
    pub len: u64,
}

impl DataFile {
    /// # Errors
    /// The file is not there or not a regular file: a FIFO or a device is never opened.
    pub fn new(path: &Path) -> Result<Self> {
        let unreadable = |error| Error::Config(format!("io.dataset_dir: cannot read {}: {error}", path.display()));
        Ok(DataFile { path: path.into(), len: files::size(path).map_err(unreadable)? })
    }

    pub fn open(&self) -> Result<File> {
        files::open(&self.path, u64::MAX).map(io::Take::into_inner).map_err(|error| self.lost(error))
    }

    /// Fills `bytes` from the offset `start` on. `file` is what [`open`](Self::open) returned.
    pub fn read(&self, file: &File, start: u64, bytes: &mut [u8]) -> Result<()> {
        read_exact_at(file, bytes, start).map_err(|error| self.lost(error))
    }

    /// The error of a file that could be read before.
    fn lost(&self, error: io::Error) -> Error {
        let what = match fs::metadata(&self.path) {
            Ok(now) if now.len() < self.len => format!("is {} bytes long now", now.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => "is gone now".into(),
            _ => format!("cannot be read now: {error}"),
        };
        let message = format!(
            "this data file was {} bytes long when it was opened and {what}; restore it, then resume or start a new run",
            self.len
        );
        Error::Io { path: self.path.clone(), error: io::Error::new(error.kind(), message) }
    }
}

/// The data files that are open: those used last.
#[derive(Debug, Default)]
pub(crate) struct OpenFiles(Mutex<VecDeque<(usize, Arc<File>)>>);

impl OpenFiles {
    /// Number `index`, which is opened if it is not open yet.
    pub fn get(&self, index: usize, data: &DataFile) -> Result<Arc<File>> {
        // A panic elsewhere cannot leave the list half changed.
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let used = match open.iter().position(|(number, _)| *number == index).and_then(|place| open.remove(place)) {
            Some(used) => used,
            None => (index, Arc::new(data.open()?)),
        };
        let file = used.1.clone();
        open.push_front(used);
        open.truncate(MAX_OPEN);
        Ok(file)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    // A file has one position, and several threads read.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrinks_or_vanishes_is_named_with_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "0123456789").unwrap();
        let data = DataFile::new(&path).unwrap();
        let file = data.open().unwrap();
        let mut bytes = [0; 4];
        data.read(&file, 6, &mut bytes).unwrap();
        assert_eq!(&bytes, b"6789");

        fs::write(&path, "012").unwrap();
        let error = data.read(&file, 2, &mut bytes).unwrap_err();
        assert!(!error.is_configuration());
        let (error, path_shown) = (error.to_string(), path.display());
        let want = format!("{path_shown}: this data file was 10 bytes long when it was opened and is 3 bytes long now");
        assert!(error.starts_with(&want), "{error}");
        fs::remove_file(&path).unwrap();
        assert!(data.open().unwrap_err().to_string().contains("was 10 bytes long when it was opened and is gone now"));
        fs::create_dir(&path).unwrap();
        assert!(data.open().unwrap_err().to_string().contains("this is a folder; expected a regular file"));
        assert!(DataFile::new(&path).unwrap_err().to_string().contains("expected a regular file"));
    }

    #[test]
    fn few_files_are_open_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<DataFile> = (0..3 * MAX_OPEN)
            .map(|number| {
                let path = folder.path().join(number.to_string());
                fs::write(&path, number.to_string()).unwrap();
                DataFile::new(&path).unwrap()
            })
            .collect();
        let open = OpenFiles::default();
        let first = open.get(0, &files[0]).unwrap();
        for (number, data) in files.iter().enumerate() {
            let file = open.get(number, data).unwrap();
            let mut bytes = vec![0; data.len as usize];
            data.read(&file, 0, &mut bytes).unwrap();
            assert_eq!(bytes, number.to_string().as_bytes());
            assert!(Arc::ptr_eq(&open.get(0, &files[0]).unwrap(), &first), "what is used stays open");
        }
        assert_eq!(open.0.lock().unwrap().len(), MAX_OPEN);
    }
}
