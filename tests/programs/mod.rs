//! Starting programs in tests, and reading what they say.

#![allow(dead_code)] // not every test uses all

use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// Has a program hear its signals, even if these tests run in the background of a script, which ignores some. To be called
/// between fork and exec.
pub fn hear_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: allowed between fork and exec.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A program that hears its signals, reads nothing, and whose output is read.
pub fn piped(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: the calls are allowed between fork and exec.
    unsafe {
        command.pre_exec(|| {
            hear_signals();
            Ok(())
        })
    };
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(mut command: Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}\n{}", text(&output.stderr));
    output
}
