//! Keeps what surrounds a call into a plugin as it was: the floating-point modes of the thread and, of the process, the
//! current directory, the standard streams, and what happens on SIGPIPE and SIGCHLD.
//!
//! Libraries change these by accident. One that is linked with `-ffast-math` flushes small numbers to zero from the moment
//! it is opened, so the numbers of a run would depend on the thread that opened it. One that changes the directory sends
//! checkpoints elsewhere. One that closes standard error has the next file that is opened receive messages. One that resets
//! SIGPIPE has the run end with the pipe that shows it.

/// Rounding, the treatment of small numbers, and which exceptions trap.
#[cfg(target_arch = "x86_64")]
pub(super) mod float {
    use std::arch::asm;

    /// Bits that say which exceptions have happened. They are no mode.
    const HAPPENED: u32 = 0x3f;

    pub fn modes() -> u32 {
        let mut modes = 0_u32;
        // SAFETY: stores four bytes.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut modes, options(nostack, preserves_flags)) };
        modes & !HAPPENED
    }

    pub fn restore(before: u32) {
        if modes() != before {
            // SAFETY: loads four bytes, which the register held before.
            unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const before, options(nostack, preserves_flags, readonly)) };
        }
    }
}

#[cfg(target_arch = "aarch64")]
pub(super) mod float {
    use std::arch::asm;

    pub fn modes() -> u64 {
        let modes: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, fpcr", out(reg) modes, options(nomem, nostack, preserves_flags)) };
        modes
    }

    pub fn restore(before: u64) {
        if modes() != before {
            // SAFETY: what the register held before.
            unsafe { asm!("msr fpcr, {}", in(reg) before, options(nomem, nostack, preserves_flags)) };
        }
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) mod float {
    pub fn modes() {}
    pub fn restore((): ()) {}
}

#[cfg(unix)]
pub(super) mod process {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::sync::LazyLock;

    use crate::plugin::host::blame;

    const STREAMS: [&str; 3] = ["standard input", "standard output", "standard error"];

    /// Copies of the standard streams, as they were when the first plugin was opened.
    static COPIES: LazyLock<[Option<OwnedFd>; 3]> = LazyLock::new(|| [0, 1, 2].map(copy));

    /// What happened then on a write to a closed pipe, and at the end of a child process.
    static ACTIONS: LazyLock<[(libc::c_int, libc::sigaction); 2]> =
        LazyLock::new(|| [libc::SIGPIPE, libc::SIGCHLD].map(|signal| (signal, action(signal))));

    pub struct Surroundings {
        id: u32,
        directory: Option<OwnedFd>,
    }

    impl Surroundings {
        pub fn now() -> Self {
            LazyLock::force(&COPIES);
            LazyLock::force(&ACTIONS);
            Surroundings { id: std::process::id(), directory: directory() }
        }

        /// Restores what the call `what` changed. The process ends if that cannot be done: if the plugin has closed files
        /// that are not its own, or in a child that the plugin has forked and that returns from the call.
        pub fn restore(self, whose: &str, what: &str) {
            if std::process::id() != self.id {
                blame::end(whose, what, "forked, and the child process returned from the call; the child ends here");
            }
            // SAFETY: a number that was a directory of this process before the call.
            let goes_back = |directory: &OwnedFd| unsafe { libc::fchdir(directory.as_raw_fd()) == 0 };
            if self.directory.as_ref().is_some_and(|directory| !goes_back(directory) && is_bad_file()) {
                blame::end(whose, what, "closed files that are not its own, so the process cannot go on");
            }
            for (stream, (name, copy)) in (0..).zip(STREAMS.iter().zip(&*COPIES)) {
                let Some(copy) = copy.as_ref().filter(|_| !is_open(stream)) else { continue };
                // SAFETY: `stream` is closed, so nothing is lost.
                if unsafe { libc::dup2(copy.as_raw_fd(), stream) } == stream {
                    tracing::warn!("{whose}: {what} closed {name}, which was restored");
                }
            }
            for (signal, before) in &*ACTIONS {
                let now = action(*signal).sa_sigaction;
                // A handler of the plugin's own is there for a reason, and ends nothing.
                if now != before.sa_sigaction && [libc::SIG_DFL, libc::SIG_IGN].contains(&now) {
                    // SAFETY: an action that the system has given.
                    unsafe { libc::sigaction(*signal, before, std::ptr::null_mut()) };
                }
            }
            #[cfg(target_os = "linux")]
            pass_on_signals();
        }
    }

    /// What happens on a signal.
    fn action(signal: libc::c_int) -> libc::sigaction {
        // SAFETY: zeros are a valid action, which the call fills in.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action);
            action
        }
    }

    fn is_bad_file() -> bool {
        io::Error::last_os_error().raw_os_error() == Some(libc::EBADF)
    }

    fn is_open(stream: libc::c_int) -> bool {
        // SAFETY: asks for flags.
        unsafe { libc::fcntl(stream, libc::F_GETFD) != -1 }
    }

    fn copy(stream: libc::c_int) -> Option<OwnedFd> {
        // SAFETY: a copy above the standard streams, which is this function's own.
        unsafe {
            let copy = libc::fcntl(stream, libc::F_DUPFD_CLOEXEC, 3);
            (copy >= 0).then(|| OwnedFd::from_raw_fd(copy))
        }
    }

    /// The current directory, if it can be opened.
    fn directory() -> Option<OwnedFd> {
        #[cfg(target_os = "linux")]
        let how = libc::O_PATH;
        #[cfg(not(target_os = "linux"))]
        let how = libc::O_RDONLY;
        // SAFETY: a string that ends with 0; the result is this function's own.
        unsafe {
            let directory = libc::open(c".".as_ptr(), how | libc::O_DIRECTORY | libc::O_CLOEXEC);
            (directory >= 0).then(|| OwnedFd::from_raw_fd(directory))
        }
    }

    /// Sends a request to end that the plugin has raised, and that therefore waits for this thread alone, to the process.
    #[cfg(target_os = "linux")]
    fn pass_on_signals() {
        // SAFETY: zeros are a valid set, which the calls fill in. No time is waited for.
        unsafe {
            let mut pending: libc::sigset_t = std::mem::zeroed();
            if libc::sigpending(&mut pending) != 0 {
                return;
            }
            for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
                if libc::sigismember(&pending, signal) != 1 {
                    continue;
                }
                let mut one: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut one);
                libc::sigaddset(&mut one, signal);
                let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
                if libc::sigtimedwait(&one, std::ptr::null_mut(), &now) == signal {
                    libc::kill(libc::getpid(), signal);
                }
            }
        }
    }
}
