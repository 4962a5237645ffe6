//! Memory as macOS tells of it. A process is counted by its footprint, as Activity Monitor does.

use std::mem::{size_of, zeroed};
use std::ptr;

use super::{Limit, Memory, Owner};

impl Memory {
    /// Now; `None` where the system does not tell.
    pub fn now() -> Option<Self> {
        let usage = usage(std::process::id())?;
        let (resident, resident_max) = (usage.ri_phys_footprint, usage.ri_lifetime_max_phys_footprint);
        Some(Memory { resident, resident_max: resident_max.max(resident), total: total()? })
    }

    /// The most that process `pid` ever held; `None` when it has ended.
    pub fn peak_of(pid: u32) -> Option<u64> {
        Some(usage(pid)?.ri_lifetime_max_phys_footprint)
    }
}

fn usage(pid: u32) -> Option<libc::rusage_info_v4> {
    // SAFETY: zeros are a valid value, which the call fills in; the buffer is as long as this version says.
    unsafe {
        let mut usage: libc::rusage_info_v4 = zeroed();
        let done = libc::proc_pid_rusage(pid.cast_signed(), libc::RUSAGE_INFO_V4, (&raw mut usage).cast());
        (done == 0).then_some(usage)
    }
}

/// What the machine has.
fn total() -> Option<u64> {
    let (mut bytes, mut len) = (0u64, size_of::<u64>());
    // SAFETY: a name that ends with 0, and a buffer of `len` bytes.
    let done =
        unsafe { libc::sysctlbyname(c"hw.memsize".as_ptr(), (&raw mut bytes).cast(), &mut len, ptr::null_mut(), 0) };
    (done == 0).then_some(bytes)
}

/// The limit; `None` where the system does not tell.
///
/// Pages that other processes use count too, unless they are wired: the system compresses them and swaps them out, and makes
/// its swap files larger as it needs them.
pub(super) fn limit() -> Option<Limit> {
    // SAFETY: zeros are a valid value, which the call fills in up to `count`; the page size never changes.
    let (pages, page) = unsafe {
        let mut pages: libc::vm_statistics64 = zeroed();
        let mut count = libc::HOST_VM_INFO64_COUNT;
        #[expect(deprecated, reason = "its replacement is another crate")]
        let host = libc::mach_host_self();
        let done = libc::host_statistics64(host, libc::HOST_VM_INFO64, (&raw mut pages).cast(), &mut count);
        ((done == libc::KERN_SUCCESS).then_some(pages)?, libc::vm_page_size as u64)
    };
    let count = u64::from(pages.free_count) + u64::from(pages.active_count) + u64::from(pages.inactive_count);
    Some(Limit { bytes: count * page, owner: Owner::Machine })
}
