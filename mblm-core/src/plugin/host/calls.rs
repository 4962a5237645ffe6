//! Calls into plugins: what the host offers them, and how their failures come back.

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use mblm_sdk::abi::{self, Status, Text};
use mblm_sdk::error::Error;

use super::blame;
use super::surroundings::float;
#[cfg(unix)]
use super::surroundings::process::Surroundings;

/// What the host offers. Lives for ever, as the contract says.
pub(super) static HOST: LazyLock<abi::Host> = LazyLock::new(|| abi::Host {
    struct_size: abi::size::<abi::Host>(),
    major: abi::MAJOR,
    minor: abi::MINOR,
    num_threads: rayon::current_num_threads() as u32,
    context: std::ptr::null_mut(),
    set_error: Some(set_error),
    log: Some(log),
});

thread_local! {
    /// What the call in progress on this thread said of its failure.
    static ERROR: RefCell<Option<(String, String)>> = const { RefCell::new(None) };
}

unsafe extern "C" fn set_error(_: *mut c_void, field: Text, message: Text) {
    // SAFETY: texts that are valid during the call, by the contract.
    let [field, message] = [field, message].map(|text| String::from_utf8_lossy(unsafe { text.bytes() }).into_owned());
    ERROR.with(|error| *error.borrow_mut() = Some((field, message)));
}

unsafe extern "C" fn log(_: *mut c_void, level: i32, message: Text) {
    // SAFETY: a text that is valid during the call, by the contract.
    let message = String::from_utf8_lossy(unsafe { message.bytes() });
    match level {
        abi::LOG_ERROR => tracing::error!("{message}"),
        abi::LOG_WARN => tracing::warn!("{message}"),
        abi::LOG_INFO => tracing::info!("{message}"),
        _ => tracing::debug!("{message}"),
    }
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// Whose function failed, and which one.
    place: String,
    /// The status that the plugin returned.
    pub status: Status,
    /// The field of the configuration that is at fault, or empty.
    pub field: String,
    /// What the plugin says.
    pub message: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.status {
            abi::INVALID => "invalid",
            abi::UNSUPPORTED => "not supported",
            abi::FAILED => "failed",
            abi::PANICKED => "panicked",
            _ => "unknown status",
        };
        match (self.field.as_str(), self.message.as_str()) {
            ("", "") => write!(f, "{kind} (status {}; the plugin does not say why)", self.status),
            ("", message) => write!(f, "{message} ({kind})"),
            (field, message) => write!(f, "{field}: {message} ({kind})"),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Error::Block(format!("{}: {failure}", failure.place))
    }
}

/// The function that decodes one position. It may take less time than a look at the process, so only the floating-point
/// modes are restored after it.
#[cfg(unix)]
const SHORT: &str = "step";

/// The functions that free something. They are called even after a panic.
const FREES: [&str; 3] = ["destroy", "tape_free", "state_free"];

/// A plugin, block or instance that is called.
pub(crate) struct Callee {
    /// What messages call it.
    pub name: String,
    /// Held during a call, unless calls may overlap.
    calling: Option<Mutex<()>>,
    panicked: AtomicBool,
}

impl Callee {
    /// One whose calls may overlap, or not.
    pub fn new(name: String, overlap: bool) -> Self {
        Callee { name, calling: (!overlap).then(Mutex::default), panicked: AtomicBool::new(false) }
    }

    /// Makes a call of the contract's function `what`. All calls into plugins are made here: one at a time, not after a
    /// panic, blamed for the end of the process, and with the surroundings restored.
    pub fn call(&self, what: &str, work: impl FnOnce() -> Status) -> Result<(), Failure> {
        let _calling = self.calling.as_ref().map(|calling| calling.lock().unwrap_or_else(PoisonError::into_inner));
        if self.panicked.load(Ordering::Acquire) && !FREES.contains(&what) {
            return Err(self.failure(what, abi::PANICKED, "not called, because an earlier call panicked"));
        }
        ERROR.take();
        let modes = float::modes();
        #[cfg(unix)]
        let surroundings = (what != SHORT).then(Surroundings::now);
        let status = blame::during(&self.name, what, work);
        float::restore(modes);
        #[cfg(unix)]
        if let Some(surroundings) = surroundings {
            surroundings.restore(&self.name, what);
        }
        if status == abi::OK {
            return Ok(());
        }
        if status == abi::PANICKED {
            self.panicked.store(true, Ordering::Release);
        }
        let (field, message) = ERROR.take().unwrap_or_default();
        Err(Failure { field, ..self.failure(what, status, &message) })
    }

    /// As [`call`](Self::call), of a function that has no status.
    pub fn call_void(&self, what: &str, work: impl FnOnce()) {
        let done = || {
            work();
            abi::OK
        };
        let _ = self.call(what, done); // only a status is a failure
    }

    /// A failure that concerns no field.
    pub fn failure(&self, what: &str, status: Status, message: &str) -> Failure {
        Failure { place: format!("{}: {what}", self.name), status, field: String::new(), message: message.into() }
    }
}
