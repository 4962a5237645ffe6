//! How much memory this process holds, and how much it may still take. Linux and macOS tell; other systems are not asked.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(target_os = "macos")]
mod macos;
#[cfg(not(target_os = "macos"))]
mod proc;

#[cfg(target_os = "macos")]
use macos::limit;
#[cfg(not(target_os = "macos"))]
use proc::limit;

/// The processes of this machine that share its memory.
static SHARING: AtomicU64 = AtomicU64::new(1);

/// From now on the memory of the machine is that of so many processes, which all need the same.
pub fn share_among(processes: usize) {
    SHARING.store(processes.max(1) as u64, Ordering::Relaxed);
}

/// The part of the machine's memory that is this process's, where [others](share_among) need as much.
pub fn share(bytes: u64) -> u64 {
    bytes / SHARING.load(Ordering::Relaxed)
}

/// The tightest limit on memory that this process takes from now on; `None` where the system does not tell. What the
/// machine or the container has is shared with [the others](share_among).
pub fn available() -> Option<Limit> {
    limit().map(|limit| match limit.owner {
        Owner::Process => limit,
        _ => Limit { bytes: share(limit.bytes), ..limit },
    })
}

/// The tightest limit, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes.
    pub bytes: u64,
    owner: Owner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(target_os = "macos", expect(dead_code, reason = "macOS tells of the machine alone"))]
enum Owner {
    Machine,
    Container,
    Process,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = gib(self.bytes);
        let each = match SHARING.load(Ordering::Relaxed) {
            1 => String::new(),
            processes => format!(" for each of {processes} processes"),
        };
        match self.owner {
            Owner::Machine => write!(f, "this machine has {size} of memory available{each}"),
            Owner::Container => write!(f, "the memory limit of this container is {size}{each}"),
            Owner::Process => write!(f, "the limit of this process's address space (ulimit -v) leaves {size}"),
        }
    }
}

/// A size in GiB.
pub fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

/// Bytes of memory at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What this process holds of the machine's memory.
    pub resident: u64,
    /// The most it ever held.
    pub resident_max: u64,
    /// What the machine has.
    pub total: u64,
}

#[cfg(all(test, any(target_os = "linux", target_os = "macos")))]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_some() {
        let limit = available().unwrap();
        assert!(limit.bytes > 1 << 20, "{limit}");
    }

    #[test]
    fn what_is_written_to_is_resident() {
        let before = Memory::now().unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = Memory::now().unwrap();
        drop(held);
        assert!(after.resident >= before.resident + (32 << 20), "{before:?} {after:?}");
        assert!(after.resident <= after.resident_max && after.resident_max <= after.total, "{after:?}");
    }
}
