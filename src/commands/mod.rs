//! The subcommands: each a file with its arguments and one function that calls the library.

pub mod bench;
pub mod blocks;
pub mod check;
pub mod checkpoint;
pub mod compare;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod import;
pub mod inspect;
pub mod measure;
pub mod plugin;
pub mod report;
pub mod run_of_study;
pub mod schema;
pub mod train;
