//! Ends a process of a study when the study has died, whatever the process is doing then.
//!
//! Such a process is asked to end by the end of its standard input. That is not enough: a block may hang in native code,
//! where no flag is looked at.

use std::time::Duration;

/// How often the parent is looked at.
const GLANCE: Duration = Duration::from_millis(200);

/// Ends this process `grace` after the process that started it has died, which is the time for a last checkpoint. Only
/// where parents are known by a number.
pub fn end_with_parent(grace: Duration) {
    #[cfg(unix)]
    {
        use std::os::unix::process::parent_id;
        let parent = parent_id();
        std::thread::spawn(move || {
            while parent_id() == parent {
                std::thread::sleep(GLANCE);
            }
            std::thread::sleep(grace);
            // SAFETY: ends the process at once. What waits for the thread that hangs, such as exit handlers, does not run.
            unsafe { libc::_exit(1) };
        });
    }
    #[cfg(not(unix))]
    let _ = (grace, GLANCE);
}
