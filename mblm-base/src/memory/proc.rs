//! Memory as Linux tells of it in `/proc` and in the control groups: what the machine has left, and the limits of the
//! process and of the container that it runs in.

use std::fs;
use std::path::Path;

use super::{Limit, Memory, Owner};

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

/// The tightest limit. What the machine has available counts memory that the system can take back from its caches, and free swap.
pub(super) fn limit() -> Option<Limit> {
    let limit_of = |owner| move |bytes| Limit { bytes, owner };
    let machine =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| machine(&text)).map(limit_of(Owner::Machine));
    let process = || process(&fs::read_to_string("/proc/self/limits").ok()?, &status()?);
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let container = container(&groups, Path::new("/sys/fs/cgroup")).map(limit_of(Owner::Container));
    let limits = [machine, container, process().map(limit_of(Owner::Process))];
    limits.into_iter().flatten().min_by_key(|limit| limit.bytes)
}

fn status() -> Option<String> {
    fs::read_to_string("/proc/self/status").ok()
}

fn machine(meminfo: &str) -> Option<u64> {
    let available = kib(meminfo, "MemAvailable:").or_else(|| kib(meminfo, "MemTotal:"))?;
    Some(available + kib(meminfo, "SwapFree:").unwrap_or(0))
}

/// What `ulimit -v` leaves; `None` without such a limit.
fn process(limits: &str, status: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    let limit: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(limit.saturating_sub(kib(status, "VmSize:").unwrap_or(0)))
}

/// The lowest limit of the control groups that the process is in, of version 1 or 2, and of those above them. Inside a
/// container the folder of its own group is often the mount's root.
fn container(groups: &str, root: &Path) -> Option<u64> {
    let limit_of = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => return None,
        };
        let folders = Path::new(path.trim_start_matches('/')).ancestors();
        folders.filter_map(|folder| fs::read_to_string(root.join(folder).join(file)).ok()?.trim().parse().ok()).min()
    };
    groups.lines().filter_map(limit_of).min()
}

/// The bytes of a line such as `VmSize:   5432 kB`.
fn kib(text: &str, field: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(field))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_memory_is_what_is_available_with_swap() {
        let text = "MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:   600 kB\nSwapFree:  5 kB\n";
        assert_eq!(machine(text), Some(605 << 10));
        assert_eq!(machine("MemTotal:  1000 kB\n"), Some(1000 << 10));
        assert_eq!(machine(""), None);
    }

    #[test]
    fn a_limit_of_the_process_counts_what_it_has() {
        let limits = "Limit   Soft Limit   Hard Limit   Units\nMax address space   4096000   unlimited   bytes\n";
        assert_eq!(process(limits, "VmSize:  1000 kB\n"), Some(4_096_000 - 1_024_000));
        assert_eq!(process(limits, "VmSize:  10000 kB\n"), Some(0));
        assert_eq!(process("Max address space   unlimited  unlimited  bytes\n", ""), None);
    }

    #[test]
    fn the_lowest_limit_of_all_groups_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert_eq!(container("0::/a/b\n", root.path()), None);
        write("memory.max", "max\n");
        write("a/memory.max", "5000\n");
        write("a/b/memory.max", "7000\n");
        assert_eq!(container("0::/a/b\n", root.path()), Some(5000));
        write("memory/memory.limit_in_bytes", "4000\n");
        assert_eq!(container("4:cpu,memory:/not/mounted/here\n0::/\n", root.path()), Some(4000), "version 1");
        assert_eq!(container("4:cpu:/\n", root.path()), None);
    }

    #[test]
    fn the_kernels_kilobytes_are_1024_bytes() {
        let status = "Name:\tmblm\nVmPeak:\t  9000 kB\nVmHWM:\t   5500 kB\nVmRSS:\t   5432 kB\nThreads:\t3\n";
        let machine = "MemTotal:       16384 kB\nMemFree:          100 kB\n";
        let want = Memory { resident: 5432 << 10, resident_max: 5500 << 10, total: 16 << 20 };
        assert_eq!(Memory::parse(status, machine), Some(want));
        assert_eq!(Memory::parse("Name:\tmblm\n", machine), None);
    }
}
