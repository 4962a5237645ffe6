//! Data that lie in files: which files there are, how they are read as one sequence of bytes, and whether they are still
//! those that a run began with.

pub mod corpus;
pub mod fingerprint;
pub mod listing;
pub(crate) mod reader;
pub mod record;
