//! Names the plugin if the process crashes or exits during a call into it.
//!
//! A signal cannot become an error of the run: the plugin may have left anything behind. All that can be done is to write
//! a line before the process ends, from a handler that may do almost nothing. An exit code of 0 from inside a plugin, on
//! the other hand, would look like success to whoever started the program, so it is replaced by 1. With glibc that covers
//! `_exit`, `quick_exit` and threads of the plugin's own; a plugin that makes the system call itself is not noticed.
//!
//! The line goes to standard error, and to the log of the run in progress if there is one.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
#[cfg(unix)]
use std::os::fd::AsRawFd;
use std::ptr;
#[cfg(unix)]
use std::sync::OnceLock;
#[cfg(unix)]
use std::sync::atomic::AtomicI32;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// A call into a plugin.
struct Call<'a> {
    /// Whom to blame: plugin, file, and block and stage if there are any.
    whose: &'a str,
    /// The function of the contract.
    what: &'a str,
}

thread_local! {
    /// The call in progress on this thread, null if there is none. A handler may read it: it needs no initialisation.
    static CALL: Cell<*const Call<'static>> = const { Cell::new(ptr::null()) };
}

/// The opened plugins as text, for a crash on a thread that is in no call: a plugin may have threads of its own.
static OPENED: AtomicPtr<String> = AtomicPtr::new(ptr::null_mut());

/// Whether the program is at work: then nobody but a plugin ends the process with exit code 0.
static AT_WORK: AtomicBool = AtomicBool::new(false);

/// The process that opened plugins. A child that a plugin forks ends as it likes.
#[cfg(unix)]
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// A program calls this when it begins its work and when it has done it. In between, an exit code of 0 is a fault of a
/// plugin, also on a thread that is in no call.
pub fn at_work(is_at_work: bool) {
    AT_WORK.store(is_at_work, Ordering::SeqCst);
}

/// The file descriptor of the log, -1 if there is none, and what writes the time before a line of it.
#[cfg(unix)]
static LOG: AtomicI32 = AtomicI32::new(-1);
#[cfg(unix)]
static TIME: OnceLock<WriteTime> = OnceLock::new();

/// Writes the time. A signal handler calls it on a stack of a few kilobytes, so it must not allocate or lock anything, and
/// needs little stack.
pub type WriteTime = fn(&mut dyn fmt::Write) -> fmt::Result;

/// As long as this lives, the line is written to a log too.
#[derive(Debug)]
pub struct Log {
    #[cfg(unix)]
    file: File,
}

/// Has the line written to `file` too, after the time. The last call counts.
pub fn log_to(file: File, time: WriteTime) -> Log {
    #[cfg(unix)]
    {
        TIME.get_or_init(|| time);
        LOG.store(file.as_raw_fd(), Ordering::SeqCst);
        Log { file }
    }
    #[cfg(not(unix))]
    {
        let _ = (file, time);
        Log {}
    }
}

#[cfg(unix)]
impl Drop for Log {
    fn drop(&mut self) {
        // Another log may have taken its place.
        let _ = LOG.compare_exchange(self.file.as_raw_fd(), -1, Ordering::SeqCst, Ordering::SeqCst);
    }
}

/// Runs a call into a plugin. If the process ends in it, the message says `whose` call it was and `what` was called.
pub(super) fn during<R>(whose: &str, what: &str, work: impl FnOnce() -> R) -> R {
    struct Outer(*const Call<'static>);
    impl Drop for Outer {
        fn drop(&mut self) {
            CALL.set(self.0);
        }
    }
    let call = Call { whose, what };
    // The lifetime is forgotten, and `Outer` removes the pointer before the call is gone.
    let _outer = Outer(CALL.replace(ptr::from_ref(&call).cast()));
    work()
}

/// Lists an opened plugin, and from the first one on watches how the process ends.
pub(super) fn opened(plugin: &str) {
    let before = OPENED.load(Ordering::Acquire);
    // SAFETY: null, or a string that was leaked below.
    let text = unsafe { before.as_ref() }.map_or_else(|| plugin.into(), |before| format!("{before}, {plugin}"));
    // A handler may be reading the text of before, so it is never freed: a few bytes per library.
    OPENED.store(Box::into_raw(Box::new(text)), Ordering::Release);
    #[cfg(unix)]
    if before.is_null() {
        watch();
    }
}

#[cfg(unix)]
const SIGNALS: [(libc::c_int, &str); 5] = [
    (libc::SIGSEGV, "SIGSEGV (invalid memory access)"),
    (libc::SIGBUS, "SIGBUS (memory that is not there)"),
    (libc::SIGFPE, "SIGFPE (arithmetic)"),
    (libc::SIGILL, "SIGILL (illegal instruction)"),
    (libc::SIGABRT, "SIGABRT (abort)"),
];

/// What was done on each of [`SIGNALS`] before; Rust's own message about a stack overflow is among that.
#[cfg(unix)]
static BEFORE: [OnceLock<libc::sigaction>; SIGNALS.len()] = [const { OnceLock::new() }; 5];

#[cfg(unix)]
fn watch() {
    for (&(signal, _), before) in SIGNALS.iter().zip(&BEFORE) {
        // SAFETY: all zeros is a valid action, whose fields are then set; the handler does what a handler may.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, ptr::null(), &mut old);
            if before.set(old).is_err() {
                continue;
            }
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &action, ptr::null_mut());
        }
    }
    PROCESS.store(std::process::id().cast_signed(), Ordering::SeqCst);
    watch_exit();
}

/// Writes what crashed, and lets the signal do what it did before.
#[cfg(unix)]
extern "C" fn on_signal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    static WRITTEN: AtomicBool = AtomicBool::new(false);
    let Some(at) = SIGNALS.iter().position(|(known, _)| *known == signal) else { return };
    // A stack overflow comes twice: as itself, and as the abort after Rust's message.
    if !WRITTEN.swap(true, Ordering::Relaxed) {
        let name = SIGNALS[at].1;
        // SAFETY: a call in progress lives; see `during`. A text of opened plugins is never freed.
        match unsafe { (CALL.get().as_ref(), OPENED.load(Ordering::Acquire).as_ref()) } {
            (Some(call), _) => write(&["error: ", call.whose, ": ", call.what, " crashed: ", name, "\n"]),
            (None, Some(opened)) => write(&[
                "error: ",
                name,
                " on a thread that was in no call into a plugin; perhaps a plugin's own thread. Opened plugins: ",
                opened,
                "\n",
            ]),
            (None, None) => {}
        }
    }
    // SAFETY: the action of before is restored. A fault comes back when its instruction is repeated; a signal that was
    // sent, as abort does, must be sent again.
    unsafe {
        libc::sigaction(signal, BEFORE[at].get().map_or(ptr::null(), ptr::from_ref), ptr::null_mut());
        if info.as_ref().is_none_or(|info| info.si_code <= 0) {
            libc::raise(signal);
        }
    }
}

/// Blames a plugin, if there is one to blame, for having called `function`, which ends the process.
#[cfg(unix)]
fn blames(function: &str) -> bool {
    if PROCESS.load(Ordering::SeqCst) != std::process::id().cast_signed() {
        return false;
    }
    // SAFETY: a call in progress lives; see `during`. A text of opened plugins is never freed.
    match unsafe { (CALL.get().as_ref(), OPENED.load(Ordering::Acquire).as_ref()) } {
        (Some(call), _) => {
            let end = "; a plugin returns an error instead\n";
            write(&["error: ", call.whose, ": ", call.what, " called ", function, end]);
        }
        (None, Some(opened)) if AT_WORK.load(Ordering::SeqCst) => {
            let place = " was called on a thread that was in no call into a plugin; perhaps a plugin's own thread. ";
            write(&["error: ", function, place, "Opened plugins: ", opened, "\n"]);
        }
        _ => return false,
    }
    true
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn watch_exit() {
    unsafe extern "C" {
        fn on_exit(function: extern "C" fn(libc::c_int, *mut libc::c_void), data: *mut libc::c_void) -> libc::c_int;
        fn at_quick_exit(function: extern "C" fn()) -> libc::c_int;
    }
    extern "C" fn at_exit(code: libc::c_int, _: *mut libc::c_void) {
        if code == 0 && blames("exit") {
            end_process(1);
        }
    }
    extern "C" fn at_quick() {
        if blames("quick_exit") {
            end_process(1);
        }
    }
    // SAFETY: functions that live for ever. If they cannot be registered, exit codes stay as they are.
    unsafe {
        on_exit(at_exit, ptr::null_mut());
        at_quick_exit(at_quick);
    }
}

#[cfg(all(unix, not(all(target_os = "linux", target_env = "gnu"))))]
fn watch_exit() {
    extern "C" fn at_exit() {
        // SAFETY: a call in progress lives; see `during`. Ends the process.
        unsafe {
            if !CALL.get().is_null() && blames("exit") {
                libc::_exit(1);
            }
        }
    }
    // SAFETY: a function that lives for ever. If it cannot be registered, exit codes stay as they are.
    unsafe { libc::atexit(at_exit) };
}

/// Ends the process at once, as `_exit(code)` does; from inside a plugin, not with 0. A program that exports this function
/// as `_exit` is the one whose `_exit` plugins call.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn end_process(code: libc::c_int) -> ! {
    let code = if code == 0 && blames("_exit") { 1 } else { code };
    loop {
        // SAFETY: the system call ends the process and touches no memory.
        unsafe { libc::syscall(libc::SYS_exit_group, code) };
    }
}

/// Ends the process after a call that did what leaves no other way.
#[cfg(unix)]
pub(super) fn end(whose: &str, what: &str, did: &str) -> ! {
    write(&["error: ", whose, ": ", what, " ", did, "\n"]);
    // SAFETY: ends the process at once. Its exit handlers and open files may not be its own any more.
    unsafe { libc::_exit(1) }
}

/// Writes a line to standard error and to the log as a handler may: without memory of the heap, in one piece each, control
/// bytes shown as `?`.
#[cfg(unix)]
fn write(parts: &[&str]) {
    let mut line = Line::default();
    line.add(parts);
    line.send(2);
    if let (log @ 0.., Some(time)) = (LOG.load(Ordering::SeqCst), TIME.get()) {
        let mut line = Line::default();
        let _ = time(&mut line); // a line has space for it
        line.add(&[" "]);
        line.add(parts);
        line.send(log);
    }
}

/// As much of a line as fits.
#[cfg(unix)]
struct Line {
    text: [u8; 1024],
    len: usize,
}

#[cfg(unix)]
impl Default for Line {
    fn default() -> Self {
        Line { text: [0; 1024], len: 0 }
    }
}

#[cfg(unix)]
impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.add(&[text]);
        Ok(())
    }
}

#[cfg(unix)]
impl Line {
    fn add(&mut self, parts: &[&str]) {
        let space = self.text[self.len..].iter_mut();
        let bytes = parts.iter().flat_map(|part| part.bytes());
        self.len += space.zip(bytes).map(|(place, byte)| *place = byte).count();
    }

    fn send(mut self, to: libc::c_int) {
        let text = &mut self.text[..self.len];
        text.iter_mut().filter(|byte| byte.is_ascii_control()).for_each(|byte| *byte = b'?');
        if let Some(last) = text.last_mut() {
            *last = b'\n';
        }
        // SAFETY: a buffer of that length. There is nobody to tell if it cannot be written.
        unsafe { libc::write(to, text.as_ptr().cast(), text.len()) };
    }
}
