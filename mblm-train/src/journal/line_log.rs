//! A text file of one record per line that a run adds to, and that a resumed run goes on with.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use mblm_base::files;

use crate::error::{AtPath, Result};

/// The file, open for more lines. A process that does not write has none.
pub(crate) struct LineLog {
    path: PathBuf,
    file: Option<File>,
}

impl LineLog {
    /// Opens or makes the file `name` in `folder`: `header` if there is one, then the lines that were there and that
    /// `keep` wants. A last line that a crash cut short is dropped. The old file is replaced at once or not at all.
    pub fn open(folder: &Path, name: &str, header: Option<&str>, mut keep: impl FnMut(&str) -> bool) -> Result<Self> {
        let path = folder.join(name);
        let before = match files::open(&path, files::LOG) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            opened => Some(opened.at(&path)?),
        };
        let file = files::replace(&path, |file| {
            header.map_or(Ok(()), |header| writeln!(file, "{header}"))?;
            for line in before.into_iter().flat_map(files::lines) {
                let line = line?;
                // A power cut may leave anything.
                match String::from_utf8_lossy(&line) {
                    line if keep(&line) => writeln!(file, "{line}")?,
                    _ => {}
                }
            }
            Ok(())
        });
        Ok(LineLog { file: Some(file.at(&path)?), path })
    }

    /// Keeps nothing: another process does.
    pub fn nowhere() -> Self {
        LineLog { path: PathBuf::new(), file: None }
    }

    /// Whether nothing is kept.
    pub fn is_nowhere(&self) -> bool {
        self.file.is_none()
    }

    /// Adds a line in one write: a crash cuts at most the last one short.
    pub fn add(&mut self, line: &str) -> Result<()> {
        match &mut self.file {
            Some(file) => file.write_all(format!("{line}\n").as_bytes()).at(&self.path),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn wanted_lines_stay_and_more_follow() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let open = |keep: fn(&str) -> bool| LineLog::open(folder.path(), "a.log", Some("head"), keep).unwrap();
        let mut log = open(|_| true);
        ["one", "two", "three"].iter().for_each(|line| log.add(line).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "head\none\ntwo\nthree\n");
        fs::write(&path, b"head\none\n\0\xff\ntwo\nthree\nthre").unwrap();
        let mut log = open(|line| line.starts_with('t'));
        assert_eq!(fs::read_to_string(&path).unwrap(), "head\ntwo\nthree\n", "the last line was cut short");
        log.add("four").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "head\ntwo\nthree\nfour\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn an_error_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a.log")).unwrap();
        let error = LineLog::open(folder.path(), "a.log", None, |_| true).err().unwrap();
        assert!(error.to_string().contains("a.log: "), "{error}");
    }
}
