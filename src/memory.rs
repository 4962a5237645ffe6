//! The allocators: memory that was used once is kept, since giving it back and getting it again costs more page faults
//! than the work that fills it. Memory that cannot be had ends the program with a plain error.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The bytes that could not be had last; 0 if that has not happened.
static LACKING: AtomicUsize = AtomicUsize::new(0);

/// mimalloc, which notes what it cannot give.
struct Allocator;

// SAFETY: everything is mimalloc's; a null pointer is passed on as it is.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that mimalloc asks for; the same below.
        noted(unsafe { MiMalloc.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: see `alloc`.
        noted(unsafe { MiMalloc.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: see `alloc`.
        noted(unsafe { MiMalloc.realloc(block, layout, size) }, size)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: see `alloc`.
        unsafe { MiMalloc.dealloc(block, layout) }
    }
}

fn noted(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() {
        LACKING.store(size, Relaxed);
    }
    block
}

/// Rust aborts when memory cannot be had: has that end the program as any other error does. Other aborts stay.
fn end_plainly() {
    // SAFETY: the handler does what a handler may.
    unsafe { libc::signal(libc::SIGABRT, on_abort as *const () as libc::sighandler_t) };
}

extern "C" fn on_abort(signal: libc::c_int) {
    const TEXT: &str = "error: the memory does not suffice; make the batch, the sequence or the model smaller\n";
    // SAFETY: three calls that a handler may make. The last gives the signal the action that it has without this handler.
    unsafe {
        if LACKING.load(Relaxed) > 0 {
            libc::write(2, TEXT.as_ptr().cast(), TEXT.len());
            libc::_exit(1);
        }
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// mimalloc's `mi_option_purge_delay`, which its bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Tells this program's allocator, and the C library's, which plugins use, to keep memory, and has a lack of it end the
/// program plainly. Call it before there are other threads.
pub fn keep() {
    end_plainly();
    // SAFETY: sets an integer option, before any other thread exists. -1: never.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets integer options. One arena, which grows as far as it must and is never trimmed, and no mappings.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}
