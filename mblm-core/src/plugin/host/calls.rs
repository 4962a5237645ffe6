//! Calls into plugins: what the host offers them, and how their failures come back.

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::LazyLock;

use mblm_sdk::abi::{self, Status, Text};

use super::surroundings::kept;

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

/// Makes a call that returns a status: `what` of the contract's functions, of `whose` block or plugin.
pub(crate) fn call(whose: &str, what: &str, work: impl FnOnce() -> Status) -> Result<(), Failure> {
    ERROR.with(|error| error.borrow_mut().take());
    match kept(whose, what, work) {
        abi::OK => Ok(()),
        status => {
            let (field, message) = ERROR.with(|error| error.borrow_mut().take()).unwrap_or_default();
            Err(Failure { status, field, message })
        }
    }
}
