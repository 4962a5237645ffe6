//! Whether standard input and output were open when the program started.
//!
//! Rust's runtime opens those that are closed as `/dev/null` before `main`, and takes what is written to a descriptor that
//! cannot be written for written. So this is looked at earlier, by a function that the system calls before the runtime.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use libc::{F_GETFL, O_ACCMODE, O_RDONLY, O_WRONLY, STDIN_FILENO, STDOUT_FILENO};

static INPUT: AtomicBool = AtomicBool::new(true);
static OUTPUT: AtomicBool = AtomicBool::new(true);

#[used]
#[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__mod_init_func"))]
#[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".init_array"))]
static BEFORE_MAIN: extern "C" fn() = look;

extern "C" fn look() {
    let is_open = |descriptor, useless| {
        // SAFETY: asks for the flags of a descriptor, which need not be open, and needs nothing of Rust's runtime.
        let flags = unsafe { libc::fcntl(descriptor, F_GETFL) };
        flags != -1 && flags & O_ACCMODE != useless
    };
    INPUT.store(is_open(STDIN_FILENO, O_WRONLY), Relaxed);
    OUTPUT.store(is_open(STDOUT_FILENO, O_RDONLY), Relaxed);
}

/// # Errors
/// Standard input was closed, or was not open for reading.
pub fn check_input() -> io::Result<()> {
    check(&INPUT, "standard input: it is closed; expected a file, a pipe or a terminal to read from")
}

/// # Errors
/// Standard output was closed, or was not open for writing.
pub fn check_output() -> io::Result<()> {
    check(&OUTPUT, "standard output: it is closed; expected a file, a pipe or a terminal to write to")
}

fn check(is_open: &AtomicBool, closed: &'static str) -> io::Result<()> {
    if is_open.load(Relaxed) { Ok(()) } else { Err(io::Error::other(closed)) }
}
