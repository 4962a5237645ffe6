//! What tells a run on another machine that its study lives and still wants it: a file that the study renews.
//!
//! In the study's folder, which both machines see:
//!
//! | file | holds |
//! |---|---|
//! | `launched/NAME.lease` | the ticket of the start that may train the run, and a number that grows while the study lives |
//! | `launched/NAME.starts` | a line per start: when, on which machine, with which ticket |
//!
//! Clocks of machines differ, so no time is compared with another machine's.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mblm_base::{files, host};
use mblm_train::error::{AtPath, Result};
use mblm_train::journal::timestamp::Timestamp;

const FOLDER: &str = "launched";
const LEASE: &str = "lease";
/// How often a lease is renewed.
const BEAT: Duration = Duration::from_secs(5);
/// How long a run goes on that does not hear of its study: file servers have pauses.
const PATIENCE: Duration = Duration::from_secs(60);

/// The study's side. Dropped, it is revoked.
pub(super) struct Lease {
    path: PathBuf,
    starts: PathBuf,
    pub(super) ticket: String,
    beats: u64,
    renewed: Instant,
}

impl Lease {
    /// Lets a new start train the run, and no earlier one any more.
    pub(super) fn grant(study: &Path, name: &str) -> Result<Self> {
        let folder = study.join(FOLDER);
        fs::create_dir_all(&folder).at(&folder)?;
        let starts = starts_file(study, name);
        files::append(&starts).at(&starts)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ticket = format!("{}-{}-{}", host::name(), std::process::id(), now.as_nanos());
        let lease = Lease { path: lease_file(study, name), starts, ticket, beats: 0, renewed: Instant::now() };
        lease.write().at(&lease.path)?;
        Ok(lease)
    }

    /// Says that the study lives, if it is time to. A file that cannot be written now may be so at the next call.
    pub(super) fn renew(&mut self) {
        if self.renewed.elapsed() >= BEAT {
            (self.renewed, self.beats) = (Instant::now(), self.beats + 1);
            let _ = self.write();
        }
    }

    fn write(&self) -> io::Result<()> {
        files::replace_text(&self.path, &format!("{} {}\n", self.ticket, self.beats))
    }

    /// Whether a machine has begun with this start.
    pub(super) fn is_begun(&self) -> bool {
        starts(&self.starts).iter().any(|(_, ticket)| *ticket == self.ticket)
    }

    /// Has the run end, with a checkpoint.
    pub(super) fn revoke(&self) {
        let _ = fs::remove_file(&self.path); // once is enough
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.revoke();
    }
}

/// Has all runs of the study end that were launched, with a checkpoint.
pub(crate) fn revoke_all(study: &Path) -> Result<()> {
    let folder = study.join(FOLDER);
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(&folder).at(&folder)? {
        let path = entry.at(&folder)?.path();
        if path.extension().is_some_and(|extension| extension == LEASE) {
            fs::remove_file(&path).at(&path)?;
        }
    }
    files::remove_leftovers(&folder).at(&folder)
}

/// The run's side.
pub(super) struct Watch {
    path: PathBuf,
    ticket: String,
    /// What the lease said last, and when it said something new.
    last: String,
    heard: Instant,
    patience: Duration,
}

impl Watch {
    pub(super) fn new(study: &Path, name: &str, ticket: &str) -> Self {
        let (path, heard) = (lease_file(study, name), Instant::now());
        Watch { path, ticket: ticket.into(), last: String::new(), heard, patience: PATIENCE }
    }

    /// Looks at the lease. Says why this start may not train any more, if so.
    pub(super) fn lost(&mut self) -> Option<&'static str> {
        match files::read_text(&self.path, files::SMALL) {
            // Another machine may see a new file before its content.
            Ok(text) if text.is_empty() => {}
            Ok(text) if text.split(' ').next() != Some(&self.ticket) => {
                return Some("the study has started this run anew elsewhere");
            }
            Ok(text) if text != self.last => (self.last, self.heard) = (text, Instant::now()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Some("the study has stopped this run");
            }
            // A file server that does not answer now may do so later.
            _ => {}
        }
        (self.heard.elapsed() >= self.patience).then_some("the study has not been heard of for a minute")
    }
}

/// Notes that this machine begins with the start that `ticket` is for.
pub(super) fn begin(study: &Path, name: &str, ticket: &str) -> Result<()> {
    let path = starts_file(study, name);
    let line = format!("{} {} {ticket}\n", Timestamp::now(), host::name());
    files::append(&path).and_then(|mut file| file.write_all(line.as_bytes())).at(&path)
}

/// The machines that have trained the run, in the order of time; none if no launcher was used.
pub(crate) fn hosts(study: &Path, name: &str) -> Vec<String> {
    let mut hosts = Vec::new();
    for (host, _) in starts(&starts_file(study, name)) {
        if !hosts.contains(&host) {
            hosts.push(host);
        }
    }
    hosts
}

/// The machine and the ticket of each start.
fn starts(path: &Path) -> Vec<(String, String)> {
    let text = files::read_text(path, files::SMALL).unwrap_or_default();
    let start = |line: &str| {
        let mut words = line.split(' ').skip(2);
        Some((words.next()?.to_string(), words.next()?.to_string()))
    };
    text.lines().filter_map(start).collect()
}

fn lease_file(study: &Path, name: &str) -> PathBuf {
    study.join(FOLDER).join(format!("{name}.{LEASE}"))
}

fn starts_file(study: &Path, name: &str) -> PathBuf {
    study.join(FOLDER).join(format!("{name}.starts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_wanted_until_it_is_revoked_or_replaced_or_the_study_falls_silent() {
        let study = tempfile::tempdir().unwrap();
        let mut lease = Lease::grant(study.path(), "a").unwrap();
        let mut watch = Watch::new(study.path(), "a", &lease.ticket);
        assert_eq!(watch.lost(), None);
        watch.patience = Duration::ZERO;
        assert_eq!(watch.lost(), Some("the study has not been heard of for a minute"));
        lease.beats += 1;
        lease.write().unwrap();
        watch.patience = PATIENCE;
        assert_eq!(watch.lost(), None);
        fs::write(&lease.path, "").unwrap();
        assert_eq!(watch.lost(), None);
        lease.revoke();
        assert_eq!(watch.lost(), Some("the study has stopped this run"));
        let _newer = Lease::grant(study.path(), "a").unwrap();
        assert_eq!(watch.lost(), Some("the study has started this run anew elsewhere"));
        revoke_all(study.path()).unwrap();
        assert_eq!(watch.lost(), Some("the study has stopped this run"));
    }

    #[test]
    fn a_start_is_known_by_its_ticket() {
        let study = tempfile::tempdir().unwrap();
        let lease = Lease::grant(study.path(), "a").unwrap();
        begin(study.path(), "a", "another").unwrap();
        assert!(!lease.is_begun());
        begin(study.path(), "a", &lease.ticket).unwrap();
        assert!(lease.is_begun());
        assert_eq!((hosts(study.path(), "a"), hosts(study.path(), "b")), (vec![host::name()], vec![]));
    }
}
