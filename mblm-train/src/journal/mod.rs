//! What a run leaves behind: its folder, with a log, losses, metrics and the cost of its first batches.

pub(crate) mod crc32c;
pub mod folder;
mod line_log;
pub mod metrics;
mod tensorboard;
pub mod timemem;
pub mod timestamp;
