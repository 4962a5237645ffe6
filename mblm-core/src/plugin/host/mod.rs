//! The program's side: finding plugins, opening them, and running their blocks like built-in ones.

pub mod blame;
mod block;
mod calls;
pub mod child;
mod file;
pub mod folders;
mod instance;
mod library;
mod model;
pub mod ownership;
pub mod probe;
mod search;
mod surroundings;

pub use block::PluginSource;
pub(crate) use calls::Callee;
pub use calls::Failure;
pub use file::LibraryFile;
pub use instance::{Instance, ParamSpec, ParamValues, Pass, State, Tape};
pub(crate) use library::check_table;
pub use library::{CANNOT_LOAD, Library, LibraryBlock};
pub use search::{Found, PATH_VARIABLE, SearchPath, Skipped, TrustedFolder, libraries_in, load};
