//! The allocators: memory that was used once is kept, since giving it back and getting it again costs more page faults
//! than the work that fills it.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// mimalloc's `mi_option_purge_delay`, which its bindings leave out.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;

/// Tells this program's allocator, and the C library's, which plugins use. Call it before there are other threads.
pub fn keep() {
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
