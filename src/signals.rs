//! The signals that ask the program to end: SIGINT (Ctrl-C), SIGTERM, and SIGHUP, which a closed terminal sends.
//!
//! A command that has something to save listens meanwhile: it is told, and ends when its work is saved. At any other time,
//! and at a second SIGINT or SIGTERM, the program ends at once, as if nothing were caught. A signal that was ignored when
//! the program started, as SIGHUP is under `nohup`, stays ignored.
//!
//! Signals are blocked, and a thread waits for them, so that they interrupt no system call.

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use libc::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, c_int, sigset_t};
use mblm::base::terminal;

/// Raised when the program is to end while it is [`LISTENING`].
pub static STOP: AtomicBool = AtomicBool::new(false);

/// Whether a raised [`STOP`] will be noticed.
pub static LISTENING: AtomicBool = AtomicBool::new(false);

/// Whether another process tells the user of a signal.
static SAYS_NOTHING: AtomicBool = AtomicBool::new(false);

/// From now on nothing is shown when a signal is heard.
#[cfg_attr(not(feature = "mpi"), expect(dead_code, reason = "one process speaks for itself"))]
pub fn say_nothing() {
    SAYS_NOTHING.store(true, SeqCst);
}

/// The signal that raised [`STOP`].
static HEARD: AtomicI32 = AtomicI32::new(0);

/// `timeout`, shells and service managers send a signal twice, or SIGHUP after SIGTERM. What comes this soon after the
/// first is no second wish.
const ECHO: Duration = Duration::from_millis(300);

/// The error of a command that was asked to end, and did when its work was saved.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by signal {0}")]
pub struct Interrupted(c_int);

impl Interrupted {
    /// Whether it was Ctrl-C, or the like of it.
    pub fn is_ctrl_c(&self) -> bool {
        self.0 == SIGINT
    }

    /// What a shell reports for a program that the signal ended.
    pub fn exit_code(&self) -> u8 {
        128 + self.0 as u8
    }
}

/// # Errors
/// [`STOP`] was raised.
pub fn check() -> Result<(), Interrupted> {
    if STOP.load(SeqCst) { Err(interrupted()) } else { Ok(()) }
}

/// What to end with after an interruption: the signal that was heard, or SIGTERM if another process heard it.
pub fn interrupted() -> Interrupted {
    match HEARD.load(SeqCst) {
        0 => Interrupted(SIGTERM),
        heard => Interrupted(heard),
    }
}

/// Waits for signals from now on; `hint` is shown when one is heard. Call it before there are other threads, which must
/// have the signals blocked too.
pub fn catch(hint: Option<&'static str>) {
    // A shell without job control starts `command &` with these two ignored, so that Ctrl-C ends the command in front
    // alone. So it does, but a SIGINT that another process sends is meant for this one.
    let is_in_background = cfg!(target_os = "linux") && is_ignored(SIGINT) && is_ignored(SIGQUIT);
    let is_caught = |signal: &c_int| !is_ignored(*signal) || (*signal == SIGINT && is_in_background);
    let caught = set(&[SIGINT, SIGTERM, SIGHUP].into_iter().filter(is_caught).collect::<Vec<_>>());
    // SAFETY: `caught` is a valid set, and the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &caught, std::ptr::null_mut()) };
    std::thread::spawn(move || {
        let mut first = Instant::now();
        loop {
            match wait(&caught) {
                Some((SIGINT, true)) if is_in_background => {}
                Some((signal, _)) => hear(signal, &mut first, hint),
                None => {}
            }
        }
    });
}

/// Raises [`STOP`] if that will be noticed, or ends the program as `signal` does. `first` is when it was raised.
fn hear(signal: c_int, first: &mut Instant, hint: Option<&str>) {
    let is_listening = LISTENING.load(SeqCst);
    match STOP.load(SeqCst) {
        false if is_listening => {
            *first = Instant::now();
            raise(signal);
            hint.filter(|_| !SAYS_NOTHING.load(SeqCst))
                .into_iter()
                .for_each(|hint| terminal::line(format_args!("\n{hint}")));
        }
        true if is_listening && (signal == SIGHUP || first.elapsed() < ECHO) => {}
        _ => end(signal),
    }
}

/// Raises [`STOP`] as `signal` does.
fn raise(signal: c_int) {
    HEARD.store(signal, SeqCst);
    STOP.store(true, SeqCst);
}

/// Does what SIGTERM does when standard input ends.
pub fn catch_end_of_input() {
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink()); // an error is an end too
        match LISTENING.load(SeqCst) {
            true => raise(SIGTERM),
            false => end(SIGTERM),
        }
    });
}

/// Ends the program as a signal does that nobody catches.
fn end(signal: c_int) -> ! {
    // SAFETY: gives the signal its default action, which needs no handler, and lets it through to this thread.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set(&[signal]), std::ptr::null_mut());
        libc::raise(signal);
    }
    std::process::exit(128 + signal)
}

fn is_ignored(signal: c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: changes nothing, and fills `action`, for which zeros are valid too.
    let action = unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}

fn set(signals: &[c_int]) -> sigset_t {
    let mut set = MaybeUninit::<sigset_t>::zeroed();
    // SAFETY: `sigemptyset` makes the set a valid one, to which valid signals are added.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// The next signal of a set, and whether the system sent it, as it does for Ctrl-C, and not another process.
#[cfg(target_os = "linux")]
fn wait(set: &sigset_t) -> Option<(c_int, bool)> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: both are valid, and zeros are a valid `info`.
    let (signal, info) = unsafe { (libc::sigwaitinfo(set, info.as_mut_ptr()), info.assume_init()) };
    (signal > 0).then_some((signal, info.si_code > 0))
}

/// The next signal of a set; who sent it is not known.
#[cfg(not(target_os = "linux"))]
fn wait(set: &sigset_t) -> Option<(c_int, bool)> {
    let mut signal = 0;
    // SAFETY: both are valid.
    let failed = unsafe { libc::sigwait(set, &mut signal) } != 0;
    (!failed).then_some((signal, false))
}
