//! The plugin's side of the ABI. [`export_plugin!`](crate::export_plugin) exports the blocks that a `cdylib` registers.
//! The blocks are the same code as built-in ones. What crosses the boundary is copied here, once.
//!
//! candle's autograd runs inside the plugin for blocks in plain candle operations. Fused layers add their gradients to
//! the buffers as they do in the program. Every call runs on the plugin's own thread pool, whose size the host sets. A
//! panic becomes an error.

mod calls;
mod instance;

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use mblm_compute::error::Error;

use crate::abi::{self, Status, Text};
use crate::registration::Registration;

/// Turns a `cdylib` into a plugin that exports every block registered with [`register_block!`](crate::register_block).
///
/// Use `export_plugin!(deterministic = false)` if the blocks do not give the same bits every time.
#[macro_export]
macro_rules! export_plugin {
    () => {
        $crate::export_plugin!(deterministic = true);
    };
    (deterministic = $deterministic:literal) => {
        /// The one symbol of a plugin.
        #[unsafe(no_mangle)]
        pub extern "C" fn mblm_plugin_entry() -> *const $crate::abi::Plugin {
            $crate::plugin::entry(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"), $deterministic)
        }
    };
}

/// Set where the check of panics runs: `forward` panics then.
pub const PANIC_VARIABLE: &str = "MBLM_PLUGIN_PANIC";

/// Bytes of stack of a thread, of which only what is used takes memory. candle's backward pass recurses once per operation,
/// so a block that loops over positions goes deep.
const STACK: usize = 64 << 20;

/// What the host offers, from `init` on.
static HOST: OnceLock<abi::Host> = OnceLock::new();

/// The newest panic's message and place, for the error that it becomes.
static PANIC: Mutex<Option<String>> = Mutex::new(None);

/// The plugin's table; null if it cannot be made.
#[doc(hidden)]
pub fn entry(name: &'static str, version: &'static str, deterministic: bool) -> *const abi::Plugin {
    static TABLE: OnceLock<abi::Plugin> = OnceLock::new();
    let made = catch_unwind(|| TABLE.get_or_init(|| table(name, version, deterministic)) as *const _);
    made.unwrap_or(std::ptr::null())
}

/// Tables are static: what they hold is leaked, once.
fn table(name: &'static str, version: &'static str, deterministic: bool) -> abi::Plugin {
    let flags = abi::BACKWARD | abi::STEP | abi::MASK | if deterministic { abi::DETERMINISTIC } else { 0 };
    let mut registrations: Vec<&Registration> = inventory::iter::<Registration>.into_iter().collect();
    registrations.sort_by_key(|registration| registration.name);
    let blocks: Vec<*const abi::Block> = registrations
        .into_iter()
        .map(|registration| {
            let (schema, about) = registration.describe();
            let leaked = |text: String| Text::of(Box::leak(text.into_boxed_str()));
            let block = calls::block(registration, flags, Text::of(version), leaked(about), leaked(schema.to_string()));
            Box::leak(Box::new(block)) as *const _
        })
        .collect();
    abi::Plugin {
        magic: abi::MAGIC,
        struct_size: abi::size::<abi::Plugin>(),
        major: abi::MAJOR,
        minor: 0,
        name: Text::of(name),
        version: Text::of(version),
        num_blocks: blocks.len() as u64,
        blocks: Box::leak(blocks.into_boxed_slice()).as_ptr(),
        init: Some(init),
    }
}

unsafe extern "C" fn init(host: *const abi::Host) -> Status {
    // SAFETY: valid until the process ends, by the contract; copied, so that a larger struct of a later minor is no harm.
    let host = HOST.get_or_init(|| unsafe { *host });
    guard(None, || {
        std::panic::set_hook(Box::new(|info| {
            *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(info.to_string());
        }));
        // Fails where a pool was made before, which is as good.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(host.num_threads as usize).stack_size(STACK);
        let _ = pool.build_global();
        Ok(())
    })
}

/// Whether `forward` panics, for the check of what becomes of a panic. Asked once.
fn panics_on_demand() -> bool {
    static DEMANDED: OnceLock<bool> = OnceLock::new();
    *DEMANDED.get_or_init(|| std::env::var_os(PANIC_VARIABLE).is_some())
}

/// Writes a line to the host's log; `level` is one of `abi::LOG_…`.
pub fn log(level: i32, message: &str) {
    if let Some((host, log)) = HOST.get().and_then(|host| Some((host, host.log?))) {
        // SAFETY: the host's function, called as its contract says.
        unsafe { log(host.context, level, Text::of(message)) };
    }
}

/// Why a call failed.
pub(super) struct Failure {
    status: Status,
    field: String,
    message: String,
}

impl Failure {
    pub(super) fn new(status: Status, field: impl Into<String>, message: impl Into<String>) -> Self {
        Failure { status, field: field.into(), message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(abi::FAILED, "", error.to_string())
    }
}

impl From<candle_core::Error> for Failure {
    fn from(error: candle_core::Error) -> Self {
        Error::from(error).into()
    }
}

/// Runs a call on the plugin's pool; turns errors and panics into a status and the host's `set_error`. After a panic,
/// `panicked` is raised, and further calls fail at once.
fn guard(panicked: Option<&AtomicBool>, work: impl FnOnce() -> Result<(), Failure> + Send) -> Status {
    let failure = if panicked.is_some_and(|flag| flag.load(Ordering::Acquire)) {
        Failure::new(abi::PANICKED, "", "an earlier call panicked")
    } else {
        match catch_unwind(AssertUnwindSafe(|| rayon::scope(|_| work()))) {
            Ok(Ok(())) => return abi::OK,
            Ok(Err(failure)) => failure,
            Err(payload) => {
                if let Some(flag) = panicked {
                    flag.store(true, Ordering::Release);
                }
                Failure::new(abi::PANICKED, "", panic_message(&*payload))
            }
        }
    };
    set_error(&failure);
    failure.status
}

fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let hooked = PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    hooked.or(text).or(payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panicked".into())
}

fn set_error(failure: &Failure) {
    if let Some((host, set_error)) = HOST.get().and_then(|host| Some((host, host.set_error?))) {
        // SAFETY: the host's function, called as its contract says, on the thread that called.
        unsafe { set_error(host.context, Text::of(&failure.field), Text::of(&failure.message)) };
    }
}

/// A registration as a block's `user` pointer, and back.
fn user(registration: &'static Registration) -> *mut c_void {
    registration as *const Registration as *mut c_void
}

/// # Safety
/// `block` must be one that [`table`] made.
unsafe fn registration(block: *const abi::Block) -> &'static Registration {
    // SAFETY: `user` was made from a static registration.
    unsafe { &*((*block).user as *const Registration) }
}
