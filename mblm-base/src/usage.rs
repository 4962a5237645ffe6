//! How much memory this process holds and the machine has, as Linux tells in `/proc`.

use std::fs;

use crate::memory::kib;

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

impl Memory {
    /// Now; `None` where there is no `/proc`.
    pub fn now() -> Option<Self> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let machine = fs::read_to_string("/proc/meminfo").ok()?;
        Self::parse(&status, &machine)
    }

    /// The most that process `pid` ever held; `None` when it has ended.
    pub fn peak_of(pid: u32) -> Option<u64> {
        kib(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM:")
    }

    fn parse(status: &str, machine: &str) -> Option<Self> {
        Some(Memory {
            resident: kib(status, "VmRSS:")?,
            resident_max: kib(status, "VmHWM:")?,
            total: kib(machine, "MemTotal:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_kilobytes_are_1024_bytes() {
        let status = "Name:\tmblm\nVmPeak:\t  9000 kB\nVmHWM:\t   5500 kB\nVmRSS:\t   5432 kB\nThreads:\t3\n";
        let machine = "MemTotal:       16384 kB\nMemFree:          100 kB\n";
        let want = Memory { resident: 5432 << 10, resident_max: 5500 << 10, total: 16 << 20 };
        assert_eq!(Memory::parse(status, machine), Some(want));
        assert_eq!(Memory::parse("Name:\tmblm\n", machine), None);
    }

    #[cfg(target_os = "linux")]
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
