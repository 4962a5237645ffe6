//! Names the plugin when the process crashes or exits inside a call into it.
//!
//! A signal cannot become an error of the run: the plugin may have left anything behind. All that can be done is to write
//! a line before the process ends, from a handler that may do almost nothing. An exit code of 0 from inside a plugin, on
//! the other hand, would look like success to whoever started the program, so it is replaced by 1.

use std::cell::Cell;
use std::ptr;
#[cfg(unix)]
use std::sync::atomic::AtomicBool;
use std::sync::atomic::{AtomicPtr, Ordering};

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
static BEFORE: [std::sync::OnceLock<libc::sigaction>; SIGNALS.len()] = [const { std::sync::OnceLock::new() }; 5];

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
    // SAFETY: a function that lives for ever. If it cannot be registered, exit codes stay as they are.
    unsafe { libc::atexit(on_exit) };
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

/// Exit code 0 from inside a plugin is no success of the program.
#[cfg(unix)]
extern "C" fn on_exit() {
    // SAFETY: a call in progress lives; see `during`.
    if let Some(call) = unsafe { CALL.get().as_ref() } {
        write(&["error: ", call.whose, ": ", call.what, " called exit; a plugin returns an error instead\n"]);
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) };
    }
}

/// Writes to standard error as a handler may: without memory of the heap, in one piece, control bytes shown as `?`.
#[cfg(unix)]
fn write(parts: &[&str]) {
    let mut text = [0; 1024];
    let mut len = 0;
    for (at, part) in parts.iter().enumerate() {
        for byte in part.bytes().take(text.len() - len) {
            let is_end = at + 1 == parts.len() && byte == b'\n';
            text[len] = if byte.is_ascii_control() && !is_end { b'?' } else { byte };
            len += 1;
        }
    }
    // SAFETY: a buffer of `len` bytes. There is nobody to tell if it cannot be written.
    unsafe { libc::write(2, text.as_ptr().cast(), len) };
}
