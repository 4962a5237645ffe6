//! What this machine is called.

use std::fs;

/// The machine's name, of letters, digits, `-`, `.` and `_`; `localhost` where the system does not tell.
pub fn name() -> String {
    let known = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = known.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-._".contains(*c)).collect();
    if name.is_empty() { "localhost".into() } else { name }
}
