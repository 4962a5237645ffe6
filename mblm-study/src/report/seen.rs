//! Which runs were read already, so that none counts twice: by another path, or as a copy.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use mblm_base::files;
use mblm_train::journal::folder::made;
use sha2::{Digest, Sha256};

use super::run::{LOG, LOSSES};

/// The runs that were read already.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<Mark, PathBuf>);

/// What no two runs have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Folder(PathBuf),
    /// When and by whom it was made.
    Made(String),
    /// A sum of its losses, which are logged with their times.
    Losses(Vec<u8>),
}

impl Seen {
    /// Notes the run in `folder`; if it is one that was noted before, says which.
    pub fn again(&mut self, folder: &Path) -> Option<String> {
        let origin = made(&folder.join(LOG)).ok().flatten().map(Mark::Made).or_else(|| losses(folder).ok().flatten());
        let marks: Vec<Mark> = folder.canonicalize().ok().map(Mark::Folder).into_iter().chain(origin).collect();
        let again = marks.iter().find_map(|mark| {
            let first = self.0.get(mark)?.display();
            Some(match mark {
                Mark::Folder(_) => format!("the same folder as {first}; a run counts once"),
                Mark::Made(_) => format!("a copy of {first} (their logs begin with the same line); a run counts once"),
                Mark::Losses(_) => format!("a copy of {first} (their losses are the same); a run counts once"),
            })
        });
        if again.is_none() {
            self.0.extend(marks.into_iter().map(|mark| (mark, folder.into())));
        }
        again
    }
}

/// The mark of a run whose log does not tell, as that of the Python package; none before its first loss.
fn losses(folder: &Path) -> io::Result<Option<Mark>> {
    let (mut sum, mut lines) = (Sha256::new(), 0);
    for line in files::lines(files::open(&folder.join(LOSSES), files::LOG)?) {
        sum.update(line?);
        sum.update(b"\n");
        lines += 1;
    }
    Ok((lines > 1).then(|| Mark::Losses(sum.finalize().to_vec())))
}

#[cfg(test)]
mod tests {
    use super::super::run::tests::folder;
    use super::*;

    const LOG_A: &str = "2024-01-01 10:00:00.123456 made by process 7\n";

    #[test]
    fn a_run_is_known_again() {
        let (header, loss) = ("kind,loss\n", "train,1.5\n");
        let losses = [header, loss].concat();
        let folders = [
            folder(&[("train.log", LOG_A), ("loss.csv", &losses)]),
            // A copy that was trained on.
            folder(&[("train.log", &format!("{LOG_A}2024-01-02 10:00:00.1 resume: x\n"))]),
            // Another run with the same numbers.
            folder(&[("train.log", &LOG_A.replace("process 7", "process 8")), ("loss.csv", &losses)]),
            // Two of the package, two that have not begun.
            folder(&[("loss.csv", &losses)]),
            folder(&[("loss.csv", &losses)]),
            folder(&[("loss.csv", header)]),
            folder(&[("loss.csv", header)]),
        ];
        let mut seen = Seen::default();
        let mut again = |i: usize| seen.again(folders[i].path());
        let place = |i: usize| folders[i].path().display();
        assert_eq!(again(0), None);
        let want = format!("a copy of {} (their logs begin with the same line); a run counts once", place(0));
        assert_eq!(again(1), Some(want));
        assert_eq!((again(2), again(3)), (None, None));
        assert_eq!(again(4), Some(format!("a copy of {} (their losses are the same); a run counts once", place(3))));
        assert_eq!((again(5), again(6)), (None, None));
        assert_eq!(again(6), Some(format!("the same folder as {}; a run counts once", place(6))));
    }
}
